//! Rules, their unit tests and what a person is told to do.

use std::collections::BTreeSet;

use super::dashboards::{read, root};
use super::prometheus::promtool;

/// What stands behind `key: ` on lines of a rule file.
fn values<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    let start = format!("{key}: ");
    let of_line = |line: &'a str| line.trim().trim_start_matches("- ").strip_prefix(&start);
    text.lines().filter_map(of_line).map(|value| value.trim_matches('"')).collect()
}

#[test]
fn rules_do_what_their_tests_say() {
    let rules = root().join("grafana/rules");
    for arguments in [["check", "rules", "podtether.yaml"], ["test", "rules", "podtether_test.yaml"]] {
        let file = rules.join(arguments[2]);
        let (content, said) = promtool(&[arguments[0], arguments[1], file.to_str().unwrap()], "");
        println!("promtool {}: {said}", arguments.join(" "));
        assert!(content && said.contains("SUCCESS"), "{said}");
    }
}

#[test]
fn every_alert_is_tested_and_has_a_runbook_and_no_runbook_is_left_over() {
    let rules = read("grafana/rules/podtether.yaml");
    let alerts = values(&rules, "alert");
    let unique: BTreeSet<&str> = alerts.iter().copied().collect();
    assert!(alerts.len() == unique.len() && alerts.len() > 20, "{alerts:?}");
    let urls: Vec<String> =
        alerts.iter().map(|alert| format!("docs/runbooks.md#{}", alert.to_lowercase())).collect();
    assert_eq!(values(&rules, "runbook_url"), urls, "in the order of the alerts");
    for key in ["summary", "description", "labels"] {
        assert_eq!(values(&rules, key).len(), alerts.len(), "{key}");
    }

    let runbooks = read("docs/runbooks.md");
    let sections: Vec<&str> = runbooks.split("\n## ").skip(1).collect();
    let titles: BTreeSet<&str> = sections.iter().filter_map(|section| section.lines().next()).collect();
    assert_eq!(titles, unique, "a heading makes the anchor of its name");
    for section in sections {
        let said = section.lines().skip(1).filter(|line| !line.trim().is_empty()).count();
        assert!(said >= 3, "what it means, what to look at, what to do: {section}");
    }

    let tests = read("grafana/rules/podtether_test.yaml");
    let mut fires = BTreeSet::new();
    let mut silent = BTreeSet::new();
    for (at, line) in tests.lines().enumerate() {
        let Some((_, name)) = line.split_once("alertname: ") else { continue };
        let name = name.trim_end_matches([' ', '}']);
        let fired = tests.lines().nth(at + 1).is_some_and(|next| next.trim() == "exp_alerts:");
        if fired {
            fires.insert(name)
        } else {
            silent.insert(name)
        };
    }
    assert_eq!(fires, unique, "each is shown to fire");
    assert!(silent.len() >= 15, "and most not to, where something looks like it: {silent:?}");
}
