//! The series of pods, written as text at once: a registry that is filled for one scrape costs many times the
//! memory of its text, and all of the time.
//!
//! No series stands twice, whatever engines call their things and however many attachments a pod has: Prometheus
//! would refuse the whole scrape.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use podtether_proto::engine::EngineMetrics;
use podtether_proto::sandbox::StepState;

use crate::cgroup::Hold;
use crate::distrust;
use crate::table::PodReport;

/// What of `podtether_pod_*` there is, in the order of [`FAMILIES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Of {
    Bytes,
    Control,
    Derp,
    Drops,
    Limits,
    Restarts,
    Runs,
    FilterPassed,
    FilterRules,
    Handshakes,
    Health,
    HomeDerp,
    LastHandshake,
    Login,
    Packets,
    Peers,
    Rejects,
    Sandbox,
    State,
    Up,
}

/// Name behind `podtether_pod_`, help, and the label that a pod's series differ in, if they do. Counters are
/// those whose name says so.
const FAMILIES: [(Of, &str, &str, &str); 20] = [
    (Of::Bytes, "bytes_total", "Bytes since the engine started.", "direction"),
    (Of::Control, "control_connected", "1 while the map stream is up.", ""),
    (Of::Derp, "derp_connected", "DERP regions connected.", ""),
    (Of::Drops, "drops_total", "Packets dropped, by reason.", "reason"),
    (Of::Limits, "engine_limits", "1 where the limit holds for the engine, 0 where not.", "limit"),
    (Of::Restarts, "engine_restarts_total", "Engine restarts since the supervisor started.", ""),
    (Of::Runs, "engine_runs_total", "How often the engine woke up and ran.", ""),
    (
        Of::FilterPassed,
        "filter_passed_total",
        "Packets that the packet filter let in, by rule (at most 64 apart) or what else let them.",
        "by",
    ),
    (
        Of::FilterRules,
        "filter_rules",
        "Rules of the packet filter: in force, and parts that were left out.",
        "state",
    ),
    (Of::Handshakes, "handshakes_total", "WireGuard handshakes completed.", ""),
    (Of::Health, "health_messages", "What is wrong, by severity.", "severity"),
    (Of::HomeDerp, "home_derp_region", "Home DERP region, 0 for none.", ""),
    (Of::LastHandshake, "last_handshake_timestamp_seconds", "Last handshake, 0 for none.", ""),
    (Of::Login, "needs_login", "1 while somebody has to open the URL.", "url"),
    (Of::Packets, "packets_total", "Packets since the engine started.", "direction"),
    (Of::Peers, "peers", "Peers by path: all in the netmap, direct, relay.", "path"),
    (
        Of::Rejects,
        "rejects_total",
        "Connections refused by a packet filter and told so: by ours, by a peer's.",
        "direction",
    ),
    (Of::Sandbox, "sandbox_step", "1 where a step of the engine's sandbox is in force.", "step"),
    (Of::State, "state", "1 for the state the pod is in.", "state"),
    (Of::Up, "up", "1 while the pod's engine runs and answers.", ""),
];

/// An attachment and what its engine answered.
type Own<'a> = (&'a PodReport, &'a Option<EngineMetrics>);

/// Of one pod, by what and the value of its label.
#[derive(Debug, Default)]
struct Values(BTreeMap<(Of, String), u64>);

impl Values {
    /// The last one counts.
    fn set(&mut self, of: Of, label: &str, value: u64) {
        self.0.insert((of, label.to_owned()), value);
    }

    fn add(&mut self, of: Of, label: &str, value: u64) {
        let sum = self.0.entry((of, label.to_owned())).or_default();
        *sum = sum.saturating_add(value);
    }

    fn take(&mut self, pod: &PodReport, engine: Option<&EngineMetrics>) {
        self.set(Of::Up, "", u64::from(engine.is_some() && pod.state == "running"));
        self.set(Of::State, pod.state, 1);
        if !pod.login_url.is_empty() {
            self.set(Of::Login, &pod.login_url, 1);
        }
        for severity in ["low", "medium", "high"] {
            let count = pod.health.iter().filter(|message| message.severity == severity).count();
            self.set(Of::Health, severity, u64::try_from(count).unwrap_or(u64::MAX));
        }
        for step in &pod.sandbox {
            self.set(Of::Sandbox, &step.step, u64::from(step.state == StepState::Held));
        }
        self.add(Of::Restarts, "", pod.restarts);
        if let Some(runs) = pod.engine_runs {
            self.add(Of::Runs, "", runs);
        }
        if pod.engine_pid.is_some() {
            for hold in Hold::ALL {
                self.set(Of::Limits, hold.name(), u64::from(pod.limits.contains(&hold.name())));
            }
        }
        let Some(m) = engine else { return };
        self.set(Of::Control, "", u64::from(m.control_connected));
        self.set(Of::HomeDerp, "", m.home_derp.into());
        for (direction, packets, bytes) in
            [("transmit", m.tx_packets, m.tx_bytes), ("receive", m.rx_packets, m.rx_bytes)]
        {
            self.add(Of::Packets, direction, packets);
            self.add(Of::Bytes, direction, bytes);
        }
        for (reason, count) in distrust::drops(m) {
            self.add(Of::Drops, reason, count);
        }
        // One more than the engine tells at most, besides its own words.
        for (by, count) in m.filter_passed.iter().take(72) {
            self.add(Of::FilterPassed, &distrust::label(by), *count);
        }
        self.set(Of::FilterRules, "in_force", m.filter_rules);
        self.set(Of::FilterRules, "left_out", m.filter_skipped);
        self.add(Of::Rejects, "sent", m.rejects_sent);
        self.add(Of::Rejects, "received", m.rejects_received);
        self.add(Of::Handshakes, "", m.handshakes);
        self.set(Of::LastHandshake, "", m.last_handshake_unix_s);
        self.set(Of::Derp, "", m.derp_connected);
        for (path, count) in [("all", m.peers), ("direct", m.peers_direct), ("relay", m.peers_relay)] {
            self.set(Of::Peers, path, count);
        }
    }
}

/// Writes every pod's series; `answers` are their engines', in the same order.
pub(super) fn of_pods(pods: &[PodReport], answers: &[Option<EngineMetrics>], text: &mut String) {
    let mut own: Vec<Own<'_>> = pods.iter().zip(answers).collect();
    own.sort_by_key(|(pod, _)| [&pod.namespace, &pod.pod, &pod.tailnet]);
    let mut families: [String; FAMILIES.len()] = std::array::from_fn(|_| String::new());
    let is_same = |(a, _): &Own<'_>, (b, _): &Own<'_>| {
        (&a.namespace, &a.pod, &a.tailnet) == (&b.namespace, &b.pod, &b.tailnet)
    };
    for attachments in own.chunk_by(is_same) {
        let mut values = Values::default();
        for (pod, answer) in attachments {
            values.take(pod, answer.as_ref());
        }
        let Some((pod, _)) = attachments.first() else { continue };
        let own = [("namespace", &*pod.namespace), ("pod", &*pod.pod), ("tailnet", &*pod.tailnet)];
        for ((of, label), value) in &values.0 {
            let at = FAMILIES.iter().position(|(family, ..)| family == of);
            let place = at.and_then(|at| FAMILIES.get(at).zip(families.get_mut(at)));
            let Some(((_, name, _, key), lines)) = place else { continue };
            line(name, own, (!key.is_empty()).then_some((key, label)), *value, lines);
        }
    }
    for ((_, name, help, _), lines) in FAMILIES.iter().zip(families) {
        if !lines.is_empty() {
            let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
            head(&format!("podtether_pod_{name}"), help, kind, text);
            text.push_str(&lines);
        }
    }
}

/// How many record files were put aside.
pub(super) fn asides(count: usize, text: &mut String) {
    head("podtether_records_aside", "Record files that did not load.", "gauge", text);
    let _ = writeln!(text, "podtether_records_aside {count}");
}

fn head(name: &str, help: &str, kind: &str, text: &mut String) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// One series, its labels by their names.
fn line(name: &str, own: [(&str, &str); 3], more: Option<(&str, &str)>, value: u64, text: &mut String) {
    let mut labels = [("", ""); 4];
    for (place, label) in labels.iter_mut().zip(own.into_iter().chain(more)) {
        *place = label;
    }
    labels.sort_unstable();
    text.push_str("podtether_pod_");
    text.push_str(name);
    let mut before = '{';
    for (key, label) in labels.into_iter().filter(|(key, _)| !key.is_empty()) {
        text.push(before);
        before = ',';
        text.push_str(key);
        text.push_str("=\"");
        for part in label.split_inclusive(['\\', '"', '\n']) {
            let plain = part.trim_end_matches(['\\', '"', '\n']);
            text.push_str(plain);
            text.push_str(match part.get(plain.len()..) {
                Some("\\") => "\\\\",
                Some("\"") => "\\\"",
                Some("\n") => "\\n",
                Some(_) | None => "",
            });
        }
        text.push('"');
    }
    let _ = writeln!(text, "}} {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_stand_in_the_order_of_their_kinds_and_once() {
        let kinds: Vec<Of> = FAMILIES.iter().map(|(of, ..)| *of).collect();
        let mut sorted = kinds.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(kinds, sorted);
        assert!(FAMILIES.windows(2).all(|two| two[0].1 < two[1].1), "as a registry sorts them");
    }

    #[test]
    fn no_series_stands_twice_and_labels_are_quoted() {
        let metrics = |passed: &[(&str, u64)]| EngineMetrics {
            filter_passed: passed.iter().map(|(by, n)| ((*by).to_owned(), *n)).collect(),
            tx_packets: 3,
            ..EngineMetrics::default()
        };
        let pod = |name: &str| PodReport {
            namespace: "ns".into(),
            pod: name.into(),
            tailnet: "t\"\\\n".into(),
            state: "running",
            engine_pid: Some(1),
            ..PodReport::default()
        };
        // The same pod's old and new sandbox.
        let pods = [pod("a"), pod("a"), pod("b")];
        let answers = [Some(metrics(&[("x", 1), ("y", 2)])), Some(metrics(&[("x", 5)])), None];
        let mut text = String::new();
        of_pods(&pods, &answers, &mut text);
        let mut series: Vec<&str> = text
            .lines()
            .filter(|l| !l.starts_with('#'))
            .filter_map(|l| l.rsplit_once(' '))
            .map(|l| l.0)
            .collect();
        let all = series.len();
        series.sort_unstable();
        series.dedup();
        assert_eq!(series.len(), all, "{text}");
        let tailnet = r#"tailnet="t\"\\\n""#;
        for line in [
            format!(
                r#"podtether_pod_packets_total{{direction="transmit",namespace="ns",pod="a",{tailnet}}} 6"#
            ),
            format!(r#"podtether_pod_filter_passed_total{{by="x",namespace="ns",pod="a",{tailnet}}} 6"#),
            format!(r#"podtether_pod_up{{namespace="ns",pod="b",{tailnet}}} 0"#),
            "# TYPE podtether_pod_packets_total counter".to_owned(),
            "# TYPE podtether_pod_up gauge".to_owned(),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }
}
