//! Metrics, dashboards and rules against a lab that lives: a real Prometheus scrapes three nodes with traffic, crashes and
//! refusals, and every panel and rule has to have data of it.

mod dashboards;
mod prometheus;
mod rules;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use self::dashboards::{list, panels, read, substituted, text};
use self::prometheus::{INTERVAL, Prometheus, promtool};
use self::world::World;
use crate::{lab_test, wait_for, wait_for_within};

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Name, type and labels of everything that scrapes said.
#[derive(Default)]
struct Seen {
    kinds: BTreeMap<String, String>,
    labels: BTreeMap<String, BTreeSet<String>>,
}

impl Seen {
    /// Takes a scrape in; of a histogram's series those of its buckets, without `le`.
    fn take(&mut self, scrape: &str) {
        for line in scrape.lines() {
            if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                let had = self.kinds.insert(name.to_owned(), kind.to_owned());
                assert!(had.is_none_or(|had| had == kind), "{name}");
            } else if !line.starts_with('#') {
                let (series, _) = line.rsplit_once(' ').unwrap();
                let (name, labels) = series.split_once('{').unwrap_or((series, ""));
                let whole = ["_bucket", "_sum", "_count"].iter().find_map(|end| {
                    name.strip_suffix(end)
                        .filter(|whole| self.kinds.get(*whole).is_some_and(|k| k == "histogram"))
                });
                let mut keys: Vec<&str> =
                    labels.split("=\"").map(|part| part.rsplit([',', '{']).next().unwrap()).collect();
                keys.pop();
                keys.retain(|key| *key != "le");
                let keys = keys.join(",");
                self.labels.entry(whole.unwrap_or(name).to_owned()).or_default().insert(keys);
            }
        }
    }
}

/// Name, type and labels of every row of the table in `docs/metrics.md`.
fn documented() -> BTreeMap<String, (String, String)> {
    let text = read("docs/metrics.md");
    let mut rows = BTreeMap::new();
    for line in
        text.lines().filter(|line| line.starts_with("| `podtether_") || line.starts_with("| `process_"))
    {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [name, kind, _, labels, _] = cells[..] else { panic!("{line}") };
        let labels = labels.replace(['`', ' '], "");
        rows.insert(name.trim_matches('`').to_owned(), (kind.to_owned(), labels));
    }
    assert!(rows.len() > 50);
    rows
}

/// Everything there is was seen, with its type and labels, and nothing else was.
fn compare(seen: &Seen, documented: &BTreeMap<String, (String, String)>) {
    for (name, kind) in &seen.kinds {
        let row = documented.get(name);
        let (wanted, labels) = row.unwrap_or_else(|| panic!("{name} is not in docs/metrics.md"));
        assert_eq!(kind, wanted, "{name}: type");
        for had in seen.labels.get(name).into_iter().flatten() {
            assert_eq!(had, labels, "{name}: labels");
        }
    }
    for name in seen.labels.keys() {
        assert!(seen.kinds.contains_key(name), "{name} has no # TYPE");
    }
    let missing: Vec<&String> = documented.keys().filter(|name| !seen.labels.contains_key(*name)).collect();
    assert!(missing.is_empty(), "in docs/metrics.md and in no scrape: {missing:?}");
}

/// How a person reads a value of this unit.
fn shown(value: f64, unit: &str) -> String {
    let scaled = |value: f64, base: f64, units: [&str; 4]| {
        let mut value = value;
        let mut units = units.iter();
        let mut unit = units.next().unwrap();
        while value.abs() >= base && units.len() > 0 {
            value /= base;
            unit = units.next().unwrap();
        }
        format!("{value:.3} {unit}")
    };
    let text = match unit {
        "bytes" => scaled(value, 1024.0, ["B", "KiB", "MiB", "GiB"]),
        "bps" => scaled(value, 1000.0, ["bit/s", "kbit/s", "Mbit/s", "Gbit/s"]),
        "percentunit" => format!("{:.2} %", value * 100.0),
        "s" if value.abs() < 1.0 => format!("{:.2} ms", value * 1000.0),
        "s" => format!("{value:.1} s"),
        "pps" | "reqps" | "hertz" => format!("{value:.3}/s"),
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        _ => format!("{value:.3}"),
    };
    text.replace(".000", "").trim().to_owned()
}

/// What a series is called: its labels in the legend's form, or those by which a person tells it from others.
fn legend(metric: &Value, form: &str) -> String {
    let labels = metric.as_object().unwrap();
    if form.is_empty() || form == "__auto" {
        let shown = labels.iter().filter(|(key, _)| !["__name__", "job", "tailnet"].contains(&key.as_str()));
        return shown.filter_map(|(_, value)| value.as_str()).collect::<Vec<_>>().join(" ");
    }
    let filled = labels.iter().fold(form.to_owned(), |text, (key, value)| {
        text.replace(&format!("{{{{{key}}}}}"), value.as_str().unwrap_or_default())
    });
    assert!(!filled.contains("{{"), "{form}: a label that {metric} has not");
    filled
}

/// The largest few of what a query gave, written by `write` from their names and values; one alone that needs no
/// name has none.
fn told(mut series: Vec<(Value, f64)>, form: &str, write: impl Fn(&str, f64) -> String) -> String {
    series.sort_by(|a, b| b.1.total_cmp(&a.1));
    let count = series.len();
    let one = |(metric, value): &(Value, f64)| {
        let name = if form == "__auto" && count == 1 { String::new() } else { legend(metric, form) };
        format!("{name} {}", write(&name, *value)).trim().to_owned()
    };
    let first: Vec<String> = series.iter().take(3).map(one).collect();
    let more = if count > 3 { format!(", and {} more", count - 3) } else { String::new() };
    first.join(", ") + &more
}

/// What a panel sets for the field of a query, or of a series of that name.
fn property<'a>(panel: &'a Value, query: &str, series: &str, id: &str) -> &'a Value {
    let config = &panel["fieldConfig"];
    let is_for = |matcher: &Value| {
        let options = text(matcher, "options");
        match text(matcher, "id") {
            "byRegexp" => options.trim_matches('/').split('|').any(|name| name == series),
            _ => options == series || options == "Value" || options == format!("Value #{query}"),
        }
    };
    let own = list(config, "overrides").iter().filter(|o| is_for(&o["matcher"]));
    let found = own.flat_map(|o| list(o, "properties")).find(|p| p["id"] == id);
    found.map_or(&config["defaults"][id], |p| &p["value"])
}

/// A value as the panel writes it: by its mappings, else with its unit.
fn written(panel: &Value, query: &str, series: &str, value: f64) -> String {
    let mappings = property(panel, query, series, "mappings").as_array().into_iter().flatten();
    let whole = if value.fract() == 0.0 { format!("{value:.0}") } else { String::new() };
    let mut texts = mappings.filter_map(|mapping| mapping["options"][&whole]["text"].as_str());
    let unit = property(panel, query, series, "unit").as_str().unwrap_or_default();
    texts.next().map_or_else(|| shown(value, unit), str::to_owned)
}

/// Each panel of a dashboard with what it shows; those without data.
fn look(prometheus: &Prometheus, name: &str, board: &Value, from: u64, out: &mut String) -> Vec<String> {
    let everything = name == "fleet";
    let variables = [
        ("datasource", "prometheus"),
        ("instance", if everything { ".*" } else { "node-a" }),
        ("namespace", if name == "pod" { "default" } else { ".*" }),
        ("pod", "web"),
    ];
    let (to, mut empty) = (unix_s(), Vec::new());
    writeln!(out, "\n## {}\n\n| panel | value |\n|---|---|", text(board, "title")).unwrap();
    for panel in panels(board) {
        let title = text(panel, "title");
        let mut values = Vec::new();
        for target in list(panel, "targets") {
            let query = substituted(text(target, "expr"), INTERVAL.as_secs(), 300, &variables);
            let instant = target["instant"] == true;
            let series = if instant { prometheus.now(&query) } else { prometheus.over(&query, from, to) };
            if series.is_empty() {
                empty.push(format!("{name}, {title}: {query}"));
            }
            let of = text(target, "refId");
            let column = property(panel, of, "", "displayName").as_str();
            let column = column.map(|name| format!("{name}: ")).unwrap_or_default();
            let said =
                told(series, text(target, "legendFormat"), |name, value| written(panel, of, name, value));
            values.push(format!("{column}{said}"));
        }
        println!("{name}: {title}: {}", values.join("; "));
        writeln!(out, "| {title} | {} |", values.join("; ")).unwrap();
    }
    // What a person chooses from.
    for variable in list(&board["templating"], "list") {
        let Some((query, label)) = text(variable, "definition")
            .strip_prefix("label_values(")
            .and_then(|d| d.strip_suffix(')')?.rsplit_once(", "))
        else {
            assert_eq!(text(variable, "type"), "datasource");
            continue;
        };
        let query = substituted(query, INTERVAL.as_secs(), 300, &variables);
        let path = format!("/api/v1/label/{label}/values");
        let values = prometheus.api(&path, &[("match[]", &query)]).unwrap();
        println!("{name}: ${}: {values}", text(variable, "name"));
        assert!(values.as_array().is_some_and(|values| !values.is_empty()), "{name}: {query}");
    }
    empty
}

/// What an alert compares, without what it compares it with.
fn left_side(query: &str) -> &str {
    let operator = [" == ", " > ", " < "].iter().filter_map(|op| Some((query.rfind(op)?, op))).max();
    let (at, op) = operator.unwrap_or_else(|| panic!("an alert ends with a comparison: {query}"));
    let bound = query[at + op.len()..].trim();
    assert!(bound.parse::<f64>().is_ok(), "an alert ends with a number: {query}");
    &query[..at]
}

/// Each rule with what it gave; those without data, and those that are wrong.
fn judge(prometheus: &Prometheus, from: u64, out: &mut String) -> Vec<String> {
    let groups = prometheus.api("/api/v1/rules", &[]).unwrap();
    let (to, mut empty) = (unix_s(), Vec::new());
    writeln!(out, "\n## Rules\n\n| rule | value |\n|---|---|").unwrap();
    let (mut recorded, mut alerts) = (0, 0);
    for rule in list(&groups, "groups").iter().flat_map(|group| list(group, "rules")) {
        let (name, query) = (text(rule, "name"), text(rule, "query"));
        assert_eq!(rule["health"], "ok", "{name}: {}", rule["lastError"]);
        let is_alert = rule["type"] == "alerting";
        let series = if is_alert {
            alerts += 1;
            prometheus.over(query, from, to);
            prometheus.over(left_side(query), from, to)
        } else {
            recorded += 1;
            assert_eq!(rule["type"], "recording", "{name}");
            prometheus.over(name, from, to)
        };
        if series.is_empty() {
            empty.push(format!("{name}: {query}"));
        }
        let what = if is_alert { "compares " } else { "" };
        let said = format!("{what}{}", told(series, "", |_, value| shown(value, "")));
        println!("{name}: {said}");
        writeln!(out, "| {name} | {said} |").unwrap();
    }
    assert!(recorded > 10 && alerts > 20, "{recorded} {alerts}");
    empty
}

#[test]
fn every_metric_panel_and_rule_has_data_of_a_live_lab() {
    lab_test("metrics::every_metric_panel_and_rule_has_data_of_a_live_lab", |dir| {
        let from = unix_s();
        let mut world = World::make(dir);
        let rules = read("grafana/rules/podtether.yaml").replace("interval: 30s", "interval: 1s");
        let targets = world.targets();
        let prometheus = Prometheus::start(world.rig.lab.router(), dir, &targets, &rules);
        wait_for("every node to be scraped", || {
            (prometheus.now("count(up{job=\"podtether\"} == 1)").first()?.1 == 3.0).then_some(())
        });

        let mut seen = Seen::default();
        let mut scrape = |world: &World| {
            for node in &world.rig.nodes[..2] {
                let text = node.http_get("/metrics").unwrap();
                seen.take(&text);
                let (content, said) = promtool(&["check", "metrics"], &text);
                assert!(content && said.trim().is_empty(), "promtool check metrics: {said}\n{text}");
            }
        };
        world.live();
        scrape(&world);
        world.suffer();
        wait_for("a pod without traffic to be told idle", || {
            (prometheus.now("podtether_pod_link{pod=\"quiet\",state=\"idle\"}").len() == 1).then_some(())
        });
        scrape(&world);

        // Nobody is reached: what was idle is disconnected, and the alert for it waits for its time.
        world.cut_off(true);
        wait_for_within(world::LONG, "the idle pod to be told disconnected", || {
            let found = prometheus.now("podtether_pod_link{pod=\"quiet\",state=\"disconnected\"}");
            (found.len() == 1).then_some(())
        });
        wait_for("its alert", || {
            let waiting = prometheus.now("ALERTS{alertname=\"PodtetherPodDisconnected\",pod=\"quiet\"}");
            (!waiting.is_empty()).then_some(())
        });
        scrape(&world);
        world.cut_off(false);
        wait_for_within(world::LONG, "the pod to be idle again", || {
            let found = prometheus.now("podtether_pod_link{pod=\"quiet\",state=\"idle\"}");
            (found.len() == 1).then_some(())
        });
        wait_for_within(world::LONG, "the pod whose peer is away to be told so", || {
            let found = prometheus.now("podtether_pod_link{pod=\"lonely\",state=\"unanswered\"}");
            (found.len() == 1).then_some(())
        });
        // Two more scrapes and evaluations of what happened last.
        let after = f64::from(u32::try_from(unix_s() + 3 * INTERVAL.as_secs()).unwrap());
        wait_for("Prometheus to have seen the last of it", || {
            (prometheus.now("min(timestamp(up))").first()?.1 > after).then_some(())
        });

        scrape(&world);
        compare(&seen, &documented());
        let gone = world.gone();
        for node in &world.rig.nodes[..2] {
            let text = node.http_get("/metrics").unwrap();
            assert!(!text.contains(&format!("pod=\"{gone}\"")), "series of a pod that left: {text}");
        }

        let mut out = String::new();
        let mut empty = Vec::new();
        for (name, board) in dashboards::all() {
            empty.extend(look(&prometheus, &name, &board, from, &mut out));
        }
        empty.extend(judge(&prometheus, from, &mut out));
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("dashboards.md");
        fs::write(&file, &out).unwrap();
        println!("written to {}", file.display());
        assert!(empty.is_empty(), "without data:\n{}\n{}", empty.join("\n"), prometheus.log());

        // Figures that are known.
        let one = |query: &str| prometheus.now(query).first().unwrap_or_else(|| panic!("{query}: no data")).1;
        assert!(one("sum(podtether_pod_engine_restarts_total{pod=\"web\",reason=\"crash\"})") >= 2.0);
        assert_eq!(
            one("sum(podtether_pod_engine_restarts_total{pod=\"web\",reason=\"forbidden_call\"})"),
            1.0
        );
        assert!(one("sum(podtether_pod_filter_unruled_total{pod=\"web\",protocol=\"tcp\"})") >= 1.0);
        assert!(one("sum(podtether_pod_drops_total{pod=\"web\",reason=\"filter\"})") >= 1.0);
        assert_eq!(one("podtether:pod_link:code{pod=\"lonely\"}"), 3.0);
        assert_eq!(one("count(podtether_pod_needs_login)"), 1.0);
        let crashed = prometheus.now("ALERTS{alertname=\"PodtetherEngineForbiddenCall\",pod=\"web\"}");
        assert_eq!(crashed.len(), 1, "the alert for a forbidden call");
    });
}

#[test]
fn an_alert_is_asked_for_what_it_compares() {
    assert_eq!(left_side("a{b=\"c > d\"} > 0"), "a{b=\"c > d\"}");
    assert_eq!(left_side("x - time() < 604800"), "x - time()");
    assert_eq!(left_side("count by (a) (b == 0) > 0"), "count by (a) (b == 0)");
}

#[test]
fn values_are_told_in_their_units() {
    for (value, unit, expected) in [
        (1_536.0, "bytes", "1.500 KiB"),
        (2_000_000.0, "bps", "2 Mbit/s"),
        (0.017, "s", "17.00 ms"),
        (61.0, "s", "61.0 s"),
        (0.5, "percentunit", "50.00 %"),
        (3.0, "short", "3"),
    ] {
        assert_eq!(shown(value, unit), expected);
    }
}
