//! The dashboards of `grafana/` as Grafana reads them: their panels, their variables, their queries.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// The top of the source tree.
pub(super) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

pub(super) fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Every dashboard by the name of its file, sorted.
pub(super) fn all() -> Vec<(String, Value)> {
    let dir = root().join("grafana/dashboards");
    let mut found: Vec<(String, Value)> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let board = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            (path.file_stem().unwrap().to_str().unwrap().to_owned(), board)
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(found.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["fleet", "node", "pod"]);
    found
}

pub(super) fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

pub(super) fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// Panels that show something, in their order.
pub(super) fn panels(board: &Value) -> impl Iterator<Item = &Value> {
    list(board, "panels").iter().filter(|panel| panel["type"] != "row")
}

/// A query as Grafana sends it, with `scrape` seconds as the data source's interval, `range` seconds shown on
/// a panel whose interval is a second, and these values of the dashboard's variables.
pub(super) fn substituted(query: &str, scrape: u64, range: u64, variables: &[(&str, &str)]) -> String {
    let rate_interval = (1 + scrape).max(4 * scrape);
    let mut query = query
        .replace("$__rate_interval", &format!("{rate_interval}s"))
        .replace("$__range", &format!("{range}s"));
    for (name, value) in variables {
        query = query.replace(&format!("${name}"), value);
    }
    assert!(!query.contains('$'), "a variable that nobody sets: {query}");
    query
}

/// Names of metrics and recorded series in a query.
pub(super) fn metrics(query: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let words = query.split(|c| !is_name(c));
    let ours = |word: &&str| ["podtether_", "podtether:", "process_"].iter().any(|p| word.starts_with(p));
    words.filter(ours).map(str::to_owned).collect()
}

#[test]
fn dashboards_are_what_grafana_reads_and_a_person_finds_the_way_in() {
    let mut uids = BTreeSet::new();
    for (name, board) in all() {
        assert!(uids.insert(text(&board, "uid").to_owned()), "{name}: uid");
        assert_eq!(text(&board, "uid"), format!("podtether-{name}"), "links lead there");
        assert!(!text(&board, "title").is_empty() && !text(&board, "description").is_empty(), "{name}");
        assert!(board["schemaVersion"].as_u64().unwrap() >= 39 && board["id"].is_null(), "{name}");
        let variables = list(&board["templating"], "list");
        let has = |wanted: &str| variables.iter().any(|v| text(v, "name") == wanted);
        assert!(has("datasource") && has("namespace"), "{name}");
        let kind = variables.iter().find(|v| text(v, "name") == "datasource").unwrap();
        assert_eq!((text(kind, "type"), text(kind, "query")), ("datasource", "prometheus"));

        let mut ids = BTreeSet::new();
        let mut taken: BTreeSet<(u64, u64)> = BTreeSet::new();
        for panel in list(&board, "panels") {
            let title = format!("{name}: {}", text(panel, "title"));
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: its id is another's");
            let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
            assert!(at("w") > 0 && at("h") > 0 && at("x") + at("w") <= 24, "{title}: beyond the grid");
            for x in at("x")..at("x") + at("w") {
                for y in at("y")..at("y") + at("h") {
                    assert!(taken.insert((x, y)), "{title}: over another panel");
                }
            }
            assert!(!text(panel, "title").is_empty(), "{name}");
            if panel["type"] == "row" {
                continue;
            }
            assert!(!text(panel, "description").is_empty(), "{title}: says nothing of itself");
            assert!(!text(&panel["fieldConfig"]["defaults"], "unit").is_empty(), "{title}: unit");
            assert_eq!(text(&panel["datasource"], "uid"), "${datasource}", "{title}");
            let mut refs = BTreeSet::new();
            assert!(!list(panel, "targets").is_empty(), "{title}: asks nothing");
            for target in list(panel, "targets") {
                assert!(refs.insert(text(target, "refId").to_owned()), "{title}: two queries of one name");
                assert_eq!(text(&target["datasource"], "uid"), "${datasource}", "{title}");
                let query = text(target, "expr");
                assert!(query.contains("job=\"podtether\"") || query.contains("ALERTS{"), "{title}: {query}");
                // No fixed window that is shorter than what a usual Prometheus needs.
                assert!(!query.contains("[1m]") && !query.contains("[30s]"), "{title}: {query}");
            }
        }
    }
}

#[test]
fn dashboards_and_rules_name_what_there_is_and_leave_nothing_out() {
    let documented = read("docs/metrics.md");
    let rules = read("grafana/rules/podtether.yaml");
    let row = |name: &str| documented.lines().any(|line| line.starts_with(&format!("| `{name}` |")));
    let exists = |name: &str| {
        let whole = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        row(name)
            || whole.is_some_and(row)
            || rules.lines().any(|line| line.trim() == format!("- record: {name}"))
    };
    let mut used = BTreeSet::new();
    for (name, board) in all() {
        for panel in panels(&board) {
            for target in list(panel, "targets") {
                used.extend(metrics(text(target, "expr")));
            }
        }
        for variable in list(&board["templating"], "list") {
            used.extend(metrics(text(variable, "definition")));
        }
        assert!(used.len() > 10, "{name}");
    }
    used.extend(metrics(&rules));
    for name in &used {
        assert!(exists(name), "{name} is in no table and recorded by no rule");
    }
    let names = documented.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let of_table = names.filter(|(name, rest)| {
        (name.starts_with("podtether_") || name.starts_with("process_"))
            && ["counter", "gauge", "histogram"].iter().any(|kind| rest.starts_with(kind))
    });
    let shown = |name: &str| used.iter().any(|u| u == name || u.starts_with(&format!("{name}_")));
    let unused: Vec<&str> = of_table.map(|(name, _)| name).filter(|name| !shown(name)).collect();
    // Told of by other series, or counted for tests of what joins cost.
    let for_others = ["podtether_engine_reports_total", "podtether_pod_state"];
    let missing: Vec<&&str> = unused.iter().filter(|name| !for_others.contains(name)).collect();
    assert!(missing.is_empty(), "on no dashboard and in no rule: {missing:?}");
}
