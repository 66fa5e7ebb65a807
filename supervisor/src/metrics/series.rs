//! The series of pods, written as text at once: a registry that is filled for one scrape costs many times the
//! memory of its text, and all of the time.
//!
//! No series stands twice, whatever engines call their things and however many attachments a pod has: Prometheus
//! would refuse the whole scrape.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use podtether_proto::engine::EngineMetrics;
use podtether_proto::sandbox::StepState;

use super::link::LinkState;
use super::seen::Seen;
use super::table::{self, Metric};
use crate::cgroup::Hold;
use crate::distrust;
use crate::memory;
use crate::table::PodReport;

/// What of `podtether_pod_*` there is, in the order of [`FAMILIES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
enum Of {
    Bytes,
    Control,
    Derp,
    Drops,
    Cpu,
    Limits,
    Memory,
    Restarts,
    Runs,
    FilterPassed,
    FilterRules,
    FilterUnruled,
    Handovers,
    Handshakes,
    Health,
    HomeConnected,
    HomeDerp,
    HomeRtt,
    Info,
    KeyExpiry,
    LastHandshake,
    LastRecovery,
    Link,
    Login,
    Packets,
    Rtt,
    Peers,
    Rejects,
    Sandbox,
    State,
    Up,
}

/// Their names behind `podtether_pod_`, sorted.
const FAMILIES: [(Of, &str); 31] = [
    (Of::Bytes, "bytes_total"),
    (Of::Control, "control_connected"),
    (Of::Derp, "derp_connected"),
    (Of::Drops, "drops_total"),
    (Of::Cpu, "engine_cpu_seconds_total"),
    (Of::Limits, "engine_limits"),
    (Of::Memory, "engine_memory_bytes"),
    (Of::Restarts, "engine_restarts_total"),
    (Of::Runs, "engine_runs_total"),
    (Of::FilterPassed, "filter_passed_total"),
    (Of::FilterRules, "filter_rules"),
    (Of::FilterUnruled, "filter_unruled_total"),
    (Of::Handovers, "handovers_total"),
    (Of::Handshakes, "handshakes_total"),
    (Of::Health, "health_messages"),
    (Of::HomeConnected, "home_derp_connected"),
    (Of::HomeDerp, "home_derp_region"),
    (Of::HomeRtt, "home_derp_rtt_seconds"),
    (Of::Info, "info"),
    (Of::KeyExpiry, "key_expiry_timestamp_seconds"),
    (Of::LastHandshake, "last_handshake_timestamp_seconds"),
    (Of::LastRecovery, "last_recovery_seconds"),
    (Of::Link, "link"),
    (Of::Login, "needs_login"),
    (Of::Packets, "packets_total"),
    (Of::Rtt, "path_rtt_seconds"),
    (Of::Peers, "peers"),
    (Of::Rejects, "rejects_total"),
    (Of::Sandbox, "sandbox_step"),
    (Of::State, "state"),
    (Of::Up, "up"),
];

/// The labels that every series of a pod has.
const POD: [&str; 3] = ["namespace", "pod", "tailnet"];
/// Characters of an address or a name.
const MAX_INFO: usize = 255;
/// Restarts for these are there from the beginning, so that the first one shows as an increase.
const TOLD_REASONS: [&str; 4] = ["crash", "forbidden_call", "memory", "silent"];
/// States that a pod can be in.
const STATES: [&str; 8] =
    ["backoff", "joining", "leaving", "needs-approval", "needs-login", "restarting", "running", "stopped"];

/// An attachment and what its engine answered.
type Own<'a> = (&'a PodReport, &'a Option<EngineMetrics>);

#[derive(Debug, Clone, Copy)]
enum Value {
    Count(u64),
    Micros(u64),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => count.fmt(f),
            Self::Micros(us) => write!(f, "{}.{:06}", us / 1_000_000, us % 1_000_000),
        }
    }
}

/// Of one pod, by what and the values of its labels, sorted by the labels' names.
#[derive(Debug, Default)]
struct Values(BTreeMap<(Of, [String; 2]), Value>);

impl Values {
    /// The last one counts.
    fn put(&mut self, of: Of, label: &str, value: Value) {
        self.0.insert((of, [label.to_owned(), String::new()]), value);
    }

    fn set(&mut self, of: Of, label: &str, value: u64) {
        self.put(of, label, Value::Count(value));
    }

    fn add(&mut self, of: Of, label: &str, more: u64) {
        let sum = self.0.entry((of, [label.to_owned(), String::new()])).or_insert(Value::Count(0));
        let (Value::Count(sum) | Value::Micros(sum)) = sum;
        *sum = sum.saturating_add(more);
    }

    fn take(&mut self, pod: &PodReport, engine: Option<&EngineMetrics>, seen: &mut Seen) {
        let running = pod.state == "running";
        self.set(Of::Up, "", u64::from(engine.is_some() && running));
        // One state, also of a pod whose sandbox before is still there.
        self.0.retain(|(of, _), _| !matches!(of, Of::State | Of::Link | Of::Info));
        self.set(Of::State, pod.state, 1);
        self.set(Of::Link, LinkState::of(running, engine).name(), 1);
        if !pod.login_url.is_empty() {
            self.set(Of::Login, "", 1);
        }
        for severity in ["low", "medium", "high"] {
            let count = pod.health.iter().filter(|message| message.severity == severity).count();
            self.set(Of::Health, severity, u64::try_from(count).unwrap_or(u64::MAX));
        }
        for step in &pod.sandbox {
            self.set(Of::Sandbox, &step.step, u64::from(step.state == StepState::Held));
        }
        for reason in TOLD_REASONS {
            self.add(Of::Restarts, reason, 0);
        }
        for (reason, count) in &pod.restarts_by {
            self.add(Of::Restarts, reason, *count);
        }
        self.add(Of::Handovers, "", pod.handovers);
        if let Some(us) = pod.last_recovery_us {
            self.put(Of::LastRecovery, "", Value::Micros(us));
        }
        if let Some(at) = pod.key_expiry_unix_s.and_then(|at| u64::try_from(at).ok()) {
            self.set(Of::KeyExpiry, "", at);
        }
        if let Some(address) = pod.addresses.first() {
            let name: String = pod.name.chars().take(MAX_INFO).collect();
            let address = address.to_string();
            // The engine says both, and may say others each time.
            if seen.admits(pod, Of::Info as u8, &format!("{address} {name}")) {
                self.0.insert((Of::Info, [address, name]), Value::Count(1));
            }
        }
        if let Some(runs) = pod.engine_runs {
            self.add(Of::Runs, "", runs);
        }
        if let Some(us) = pod.engine_cpu_us {
            self.0.entry((Of::Cpu, Default::default())).or_insert(Value::Micros(0));
            self.add(Of::Cpu, "", us);
        }
        if let Some(pid) = pod.engine_pid {
            if let Some(bytes) = memory::of_process(pid) {
                self.add(Of::Memory, "", bytes);
            }
            for hold in Hold::ALL {
                self.set(Of::Limits, hold.name(), u64::from(pod.limits.contains(&hold.name())));
            }
        }
        if let Some(engine) = engine {
            self.take_engine(pod, engine, seen);
        }
    }

    fn take_engine(&mut self, pod: &PodReport, m: &EngineMetrics, seen: &mut Seen) {
        self.set(Of::Control, "", u64::from(m.control_connected));
        self.set(Of::HomeDerp, "", m.home_derp.into());
        self.set(Of::HomeConnected, "", u64::from(m.home_derp_connected));
        if let Some(us) = m.home_derp_rtt_us {
            self.put(Of::HomeRtt, "", Value::Micros(us));
        }
        for (direction, packets, bytes) in
            [("transmit", m.tx_packets, m.tx_bytes), ("receive", m.rx_packets, m.rx_bytes)]
        {
            self.add(Of::Packets, direction, packets);
            self.add(Of::Bytes, direction, bytes);
        }
        for (reason, count) in distrust::drops(m) {
            let known = seen.admits(pod, Of::Drops as u8, reason);
            self.add(Of::Drops, if known { reason } else { distrust::OTHER }, count);
        }
        // One more than the engine tells at most, besides its own words.
        for (by, count) in m.filter_passed.iter().take(72) {
            let by = distrust::label(by);
            let known = seen.admits(pod, Of::FilterPassed as u8, &by);
            self.add(Of::FilterPassed, if known { &by } else { distrust::OTHER }, *count);
        }
        for (protocol, count) in m.filter_unruled.iter().take(8) {
            let known = ["tcp", "udp", "icmp"].into_iter().find(|known| known == protocol);
            self.add(Of::FilterUnruled, known.unwrap_or(distrust::OTHER), *count);
        }
        self.set(Of::FilterRules, "in_force", m.filter_rules);
        self.set(Of::FilterRules, "left_out", m.filter_skipped);
        self.add(Of::Rejects, "sent", m.rejects_sent);
        self.add(Of::Rejects, "received", m.rejects_received);
        self.add(Of::Handshakes, "", m.handshakes);
        self.set(Of::LastHandshake, "", m.last_handshake_unix_s);
        self.set(Of::Derp, "", m.derp_connected);
        let used = [("direct", m.peers_direct), ("relay", m.peers_relay), ("unanswered", m.peers_unanswered)];
        let idle = used.iter().fold(m.peers, |left, (_, count)| left.saturating_sub(*count));
        for (path, count) in used.into_iter().chain([("idle", idle)]) {
            self.set(Of::Peers, path, count);
        }
        if let Some(rtt) = m.rtt {
            for (of, us) in [("min", rtt.min_us), ("mean", rtt.mean_us), ("max", rtt.max_us)] {
                self.put(Of::Rtt, of, Value::Micros(us));
            }
        }
    }
}

/// Writes every pod's series; `answers` are their engines', in the same order.
pub(super) fn of_pods(
    pods: &[PodReport],
    answers: &[Option<EngineMetrics>],
    seen: &mut Seen,
    text: &mut String,
) {
    seen.keep(pods);
    let mut own: Vec<Own<'_>> = pods.iter().zip(answers).collect();
    own.sort_by_key(|(pod, _)| [&pod.namespace, &pod.pod, &pod.tailnet]);
    let names = FAMILIES.map(|(_, name)| format!("podtether_pod_{name}"));
    let metrics: [Option<&Metric>; FAMILIES.len()] = std::array::from_fn(|at| table::of(names.get(at)?));
    let mut families: [String; FAMILIES.len()] = std::array::from_fn(|_| String::new());
    let is_same = |(a, _): &Own<'_>, (b, _): &Own<'_>| {
        (&a.namespace, &a.pod, &a.tailnet) == (&b.namespace, &b.pod, &b.tailnet)
    };
    for attachments in own.chunk_by(is_same) {
        let mut values = Values::default();
        for (pod, answer) in attachments {
            values.take(pod, answer.as_ref(), seen);
        }
        let Some((pod, _)) = attachments.first() else { continue };
        let own = [&*pod.namespace, &*pod.pod, &*pod.tailnet];
        for ((of, more), value) in &values.0 {
            let at = usize::from(*of as u8);
            if let (Some(Some(metric)), Some(lines)) = (metrics.get(at), families.get_mut(at)) {
                line(metric, own, more, *value, lines);
            }
        }
    }
    for (metric, lines) in metrics.into_iter().zip(families) {
        if let Some(metric) = metric.filter(|_| !lines.is_empty()) {
            head(metric, text);
            text.push_str(&lines);
        }
    }
}

/// How many pods there are, by what they are and by what their links are.
pub(super) fn totals(pods: &[PodReport], answers: &[Option<EngineMetrics>], text: &mut String) {
    let links: Vec<LinkState> = pods
        .iter()
        .zip(answers)
        .map(|(pod, answer)| LinkState::of(pod.state == "running", answer.as_ref()))
        .collect();
    let count = |n: usize| n.to_string();
    let by_link =
        LinkState::ALL.map(|state| (state.name(), count(links.iter().filter(|s| **s == state).count())));
    let by_state = STATES.map(|state| (state, count(pods.iter().filter(|pod| pod.state == state).count())));
    labelled("podtether_links", &by_link, text);
    labelled("podtether_pods", &by_state, text);
}

/// A metric with one label, each value of it once.
fn labelled(name: &str, values: &[(&str, String)], text: &mut String) {
    let Some(metric) = table::of(name) else { return };
    head(metric, text);
    for (label, value) in values {
        let Some(key) = metric.labels.first() else { continue };
        let _ = writeln!(text, "{name}{{{key}=\"{label}\"}} {value}");
    }
}

/// A metric without labels.
pub(super) fn single(name: &str, value: impl fmt::Display, text: &mut String) {
    let Some(metric) = table::of(name) else { return };
    head(metric, text);
    let _ = writeln!(text, "{name} {value}");
}

fn head(metric: &Metric, text: &mut String) {
    let Metric { name, kind, help, .. } = metric;
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {}", kind.name());
}

/// One series, its labels by their names: the pod's `own`, and `more` for the others.
fn line(metric: &Metric, own: [&str; 3], more: &[String; 2], value: Value, text: &mut String) {
    text.push_str(metric.name);
    let mut more = more.iter();
    let mut before = '{';
    for key in metric.labels {
        let label = match POD.iter().position(|own| own == key) {
            Some(at) => own.get(at).copied(),
            None => more.next().map(String::as_str),
        };
        let label = label.unwrap_or_default();
        text.push(before);
        before = ',';
        text.push_str(key);
        text.push_str("=\"");
        push_escaped(label, text);
        text.push('"');
    }
    let _ = writeln!(text, "}} {value}");
}

fn push_escaped(label: &str, text: &mut String) {
    // Hardly any has one, and there are a hundred thousand on a full node.
    if !label.bytes().any(|b| matches!(b, b'\\' | b'"' | b'\n')) {
        text.push_str(label);
        return;
    }
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use podtether_proto::engine::Rtt;

    fn pod(name: &str) -> PodReport {
        PodReport {
            namespace: "ns".into(),
            pod: name.into(),
            tailnet: "t\"\\\n".into(),
            state: "running",
            engine_pid: Some(std::process::id()),
            ..PodReport::default()
        }
    }

    fn text_of(pods: &[PodReport], answers: &[Option<EngineMetrics>], seen: &mut Seen) -> String {
        let mut text = String::new();
        of_pods(pods, answers, seen, &mut text);
        text
    }

    fn series(text: &str) -> Vec<&str> {
        text.lines().filter(|l| !l.starts_with('#')).filter_map(|l| Some(l.rsplit_once(' ')?.0)).collect()
    }

    #[test]
    fn families_stand_in_the_order_of_their_kinds_once_and_in_the_table() {
        for (at, (of, name)) in FAMILIES.iter().enumerate() {
            assert_eq!(usize::from(*of as u8), at, "{name}");
            let metric = table::of(&format!("podtether_pod_{name}")).unwrap();
            assert!(metric.labels.len() <= POD.len() + 2, "{name}");
        }
        assert!(FAMILIES.windows(2).all(|two| two[0].1 < two[1].1), "as a registry sorts them");
        let of_pods = table::METRICS.iter().filter(|m| m.name.starts_with("podtether_pod_"));
        assert_eq!(of_pods.count(), FAMILIES.len());
    }

    #[test]
    fn no_series_stands_twice_and_labels_are_quoted() {
        let metrics = |passed: &[(&str, u64)]| EngineMetrics {
            filter_passed: passed.iter().map(|(by, n)| ((*by).to_owned(), *n)).collect(),
            tx_packets: 3,
            rtt: Some(Rtt { min_us: 150, mean_us: 1_000_200, max_us: 2_000_000 }),
            peers: 7,
            peers_direct: 2,
            peers_unanswered: 1,
            ..EngineMetrics::default()
        };
        let first = PodReport {
            restarts_by: [("memory", 2)].into(),
            engine_cpu_us: Some(1_500_000),
            addresses: vec!["100.64.0.1".parse().unwrap()],
            name: "a.tail\"net".into(),
            state: "leaving",
            ..pod("a")
        };
        let second = PodReport {
            engine_cpu_us: Some(2_000_001),
            addresses: vec!["100.64.0.2".parse().unwrap()],
            last_recovery_us: Some(17_000),
            ..pod("a")
        };
        // The same pod's old and new sandbox.
        let pods = [first, second, pod("b")];
        let answers = [Some(metrics(&[("x", 1), ("y", 2)])), Some(metrics(&[("x", 5)])), None];
        let text = text_of(&pods, &answers, &mut Seen::default());
        let mut all = series(&text);
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count, "{text}");
        let tailnet = r#"tailnet="t\"\\\n""#;
        for line in [
            format!(
                r#"podtether_pod_packets_total{{direction="transmit",namespace="ns",pod="a",{tailnet}}} 6"#
            ),
            format!(r#"podtether_pod_filter_passed_total{{by="x",namespace="ns",pod="a",{tailnet}}} 6"#),
            format!(r#"podtether_pod_up{{namespace="ns",pod="b",{tailnet}}} 0"#),
            format!(r#"podtether_pod_link{{namespace="ns",pod="b",state="down",{tailnet}}} 1"#),
            format!(r#"podtether_pod_engine_cpu_seconds_total{{namespace="ns",pod="a",{tailnet}}} 3.500001"#),
            format!(
                r#"podtether_pod_engine_restarts_total{{namespace="ns",pod="a",reason="memory",{tailnet}}} 2"#
            ),
            format!(
                r#"podtether_pod_engine_restarts_total{{namespace="ns",pod="b",reason="crash",{tailnet}}} 0"#
            ),
            format!(
                r#"podtether_pod_info{{address="100.64.0.2",name="",namespace="ns",pod="a",{tailnet}}} 1"#
            ),
            format!(r#"podtether_pod_last_recovery_seconds{{namespace="ns",pod="a",{tailnet}}} 0.017000"#),
            format!(
                r#"podtether_pod_path_rtt_seconds{{namespace="ns",of="mean",pod="a",{tailnet}}} 1.000200"#
            ),
            format!(r#"podtether_pod_peers{{namespace="ns",path="idle",pod="a",{tailnet}}} 4"#),
            "# TYPE podtether_pod_packets_total counter".to_owned(),
            "# TYPE podtether_pod_up gauge".to_owned(),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
        for metric in ["podtether_pod_state{", "podtether_pod_link{", "podtether_pod_info{"] {
            let own = text.lines().filter(|l| l.starts_with(metric) && l.contains(r#"pod="a""#));
            assert_eq!(own.count(), 1, "{metric}: one state of each pod");
        }
    }

    #[test]
    fn an_engine_that_lies_makes_no_more_series_however_long() {
        let mut seen = Seen::default();
        let mut ever = std::collections::HashSet::new();
        for round in 0..200 {
            let made_up = |n: u64| (format!("r{}", round * 1000 + n), 1);
            let hostile = EngineMetrics {
                drops: (0..1000).map(made_up).collect(),
                filter_passed: (0..1000).map(|n| (format!("rule \"}}\n{} {round}", n), 1)).collect(),
                filter_unruled: (0..1000).map(made_up).collect(),
                ..EngineMetrics::default()
            };
            let named = PodReport {
                name: format!("name{round}.test"),
                addresses: vec![std::net::Ipv4Addr::from(u32::try_from(round).unwrap()).into()],
                ..pod("a")
            };
            let text = text_of(&[named], &[Some(hostile)], &mut seen);
            ever.extend(series(&text).into_iter().map(str::to_owned));
        }
        assert!(ever.len() < 400, "{} series of one pod", ever.len());
        let other = ever.iter().filter(|series| series.contains("\"other\"")).count();
        assert_eq!(other, 3, "what is too much is counted all the same");
        // Honest pods beside it keep their labels, and with the pod its series go.
        let honest = EngineMetrics { drops: vec![("filter".into(), 1)], ..EngineMetrics::default() };
        let text = text_of(&[pod("b")], &[Some(honest)], &mut seen);
        assert!(text.contains("reason=\"filter\"") && !text.contains("pod=\"a\""), "{text}");
    }

    #[test]
    fn a_full_node_takes_some_kilobytes_a_pod() {
        use podtether_proto::sandbox::{Step, StepReport};
        let sandbox: Vec<StepReport> = Step::ALL
            .iter()
            .map(|step| StepReport { step: step.name().into(), state: StepState::Held, why: String::new() })
            .collect();
        let pods: Vec<PodReport> = (0..250)
            .map(|n| PodReport {
                namespace: "a-namespace-of-usual-length".into(),
                tailnet: "default".into(),
                sandbox: sandbox.clone(),
                addresses: vec!["100.64.0.1".parse().unwrap()],
                engine_cpu_us: Some(n),
                engine_runs: Some(n),
                ..pod(&format!("deployment-name-7f9c6d5b4-{n:05}"))
            })
            .collect();
        let engine = EngineMetrics {
            drops: (0..12).map(|n| (format!("some_reason_{n}"), n)).collect(),
            filter_passed: (0..10).map(|n| (format!("rule base/{n}"), n)).collect(),
            rtt: Some(Rtt::default()),
            home_derp_rtt_us: Some(1),
            ..EngineMetrics::default()
        };
        let text = text_of(&pods, &vec![Some(engine); pods.len()], &mut Seen::default());
        assert!(text.len() < 250 * (12 << 10), "{} bytes", text.len());
    }

    #[test]
    fn totals_have_every_state_of_pods_that_are_and_are_not() {
        let mut text = String::new();
        let pods = [pod("a"), pod("b"), PodReport { state: "backoff", ..pod("c") }];
        totals(&pods, &[None, None, None], &mut text);
        for line in [
            "podtether_pods{state=\"running\"} 2",
            "podtether_pods{state=\"backoff\"} 1",
            "podtether_pods{state=\"stopped\"} 0",
            "podtether_links{state=\"down\"} 3",
            "podtether_links{state=\"idle\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }
}
