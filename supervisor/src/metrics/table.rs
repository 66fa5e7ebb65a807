//! Every metric there is. `docs/metrics.md` shows this table, and a test holds the two together.

use prometheus::{HistogramOpts, Opts};

/// What Prometheus calls its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Grows until its process ends.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Buckets, sum and count.
    Histogram,
}

impl Kind {
    /// As `# TYPE` has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its whole name.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// What its series differ in, sorted.
    pub labels: &'static [&'static str],
    /// `# HELP`, one sentence.
    pub help: &'static str,
}

impl Metric {
    /// In what it counts, by its name.
    #[must_use]
    pub fn unit(&self) -> &'static str {
        let name = self.name.trim_end_matches("_total");
        ["seconds", "bytes", "info"].into_iter().find(|unit| name.ends_with(unit)).unwrap_or("")
    }
}

/// The labels of a pod.
const POD: &[&str] = &["namespace", "pod", "tailnet"];

const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, labels, help }
}

const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, labels, help }
}

const fn histogram(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind: Kind::Histogram, labels, help }
}

/// Sorted by name, as scrapes are.
pub const METRICS: &[Metric] = &[
    counter("podtether_adds_failed_total", &[], "Joins that failed."),
    counter("podtether_adds_total", &[], "Pods joined."),
    histogram(
        "podtether_api_duration_seconds",
        &["api", "result"],
        "Time that a call to the tailnet's admin API or to the Kubernetes API server took, each attempt for itself.",
    ),
    counter("podtether_auth_keys_total", &["result"], "Auth keys asked for, by what came of it."),
    gauge("podtether_build_info", &["proto", "version"], "1, with the supervisor's version as labels."),
    histogram(
        "podtether_cni_duration_seconds",
        &["result", "verb"],
        "Time that the supervisor took to answer a CNI call.",
    ),
    counter(
        "podtether_engine_adoptions_total",
        &["found"],
        "Engines of an earlier supervisor, by what was found.",
    ),
    counter("podtether_engine_exits_total", &["kind"], "Engines that ended, by kind (docs/engine-ends.md)."),
    histogram(
        "podtether_engine_ready_seconds",
        &[],
        "Time from an engine's fork to its first answer, from its sandbox.",
    ),
    histogram(
        "podtether_engine_recovery_seconds",
        &[],
        "Time from an engine's death to the first answer of its successor.",
    ),
    counter(
        "podtether_engine_reports_total",
        &[],
        "Statuses that engines reported because something of theirs had changed.",
    ),
    histogram(
        "podtether_handover_gap_seconds",
        &[],
        "Time in a planned handover in which neither engine read.",
    ),
    counter("podtether_handovers_total", &["outcome"], "Planned handovers, by outcome."),
    gauge(
        "podtether_kubernetes_current",
        &["what"],
        "1 while what is known of the API server's objects is up to date.",
    ),
    counter("podtether_kubernetes_failures_total", &["what"], "Calls to the API server that failed."),
    counter("podtether_link_repairs_total", &["fault"], "Links that were repaired, by what was wrong."),
    gauge("podtether_links", &["state"], "Pods of the node, by the state of their link."),
    counter(
        "podtether_pod_bytes_total",
        &["direction", "namespace", "pod", "tailnet"],
        "Bytes since the engine started.",
    ),
    gauge("podtether_pod_control_connected", POD, "1 while the control session (the map stream) is up."),
    gauge("podtether_pod_derp_connected", POD, "DERP regions connected."),
    counter(
        "podtether_pod_drops_total",
        &["namespace", "pod", "reason", "tailnet"],
        "Packets and messages dropped since the engine started, by reason.",
    ),
    counter("podtether_pod_engine_cpu_seconds_total", POD, "Processor time that the engine has used."),
    gauge(
        "podtether_pod_engine_limits",
        &["limit", "namespace", "pod", "tailnet"],
        "1 where the limit holds for the engine, 0 where not.",
    ),
    gauge("podtether_pod_engine_memory_bytes", POD, "Memory that the engine alone has (RssAnon)."),
    counter(
        "podtether_pod_engine_restarts_total",
        &["namespace", "pod", "reason", "tailnet"],
        "Engine restarts since the supervisor started, by how the engine before had ended.",
    ),
    counter("podtether_pod_engine_runs_total", POD, "How often the engine woke up and ran."),
    counter(
        "podtether_pod_filter_passed_total",
        &["by", "namespace", "pod", "tailnet"],
        "Packets that the packet filter let in, by rule (at most 64 apart) or what else let them.",
    ),
    gauge(
        "podtether_pod_filter_rules",
        &["namespace", "pod", "state", "tailnet"],
        "Rules of the packet filter: in force, and parts that were left out.",
    ),
    counter(
        "podtether_pod_filter_unruled_total",
        &["namespace", "pod", "protocol", "tailnet"],
        "Packets that no rule of the packet filter let in, by protocol.",
    ),
    counter(
        "podtether_pod_handovers_total",
        POD,
        "Planned handovers of the pod since the supervisor started.",
    ),
    counter(
        "podtether_pod_handshakes_total",
        POD,
        "WireGuard handshakes completed since the engine started.",
    ),
    gauge(
        "podtether_pod_health_messages",
        &["namespace", "pod", "severity", "tailnet"],
        "What is wrong, by severity.",
    ),
    gauge("podtether_pod_home_derp_connected", POD, "1 while the home DERP region is connected."),
    gauge("podtether_pod_home_derp_region", POD, "Home DERP region, 0 for none."),
    gauge("podtether_pod_home_derp_rtt_seconds", POD, "Round trip to the home DERP region as last measured."),
    gauge(
        "podtether_pod_info",
        &["address", "name", "namespace", "pod", "tailnet"],
        "1, with the pod's first address and its name in the tailnet as labels.",
    ),
    gauge(
        "podtether_pod_key_expiry_timestamp_seconds",
        POD,
        "When the node key expires, seconds since the epoch; absent where it does not.",
    ),
    gauge(
        "podtether_pod_last_handshake_timestamp_seconds",
        POD,
        "Last WireGuard handshake, seconds since the epoch, 0 for none.",
    ),
    gauge(
        "podtether_pod_last_recovery_seconds",
        POD,
        "Time from the death of the engine before to the first answer of this one; absent where none died.",
    ),
    gauge(
        "podtether_pod_link",
        &["namespace", "pod", "state", "tailnet"],
        "1 for the state that the pod's link is in.",
    ),
    gauge("podtether_pod_needs_login", POD, "1 while somebody has to log the device in; absent otherwise."),
    counter(
        "podtether_pod_packets_total",
        &["direction", "namespace", "pod", "tailnet"],
        "Packets since the engine started.",
    ),
    gauge(
        "podtether_pod_path_rtt_seconds",
        &["namespace", "of", "pod", "tailnet"],
        "Round trips of the direct paths in use: the shortest, their mean, the longest; absent without one.",
    ),
    gauge(
        "podtether_pod_peers",
        &["namespace", "path", "pod", "tailnet"],
        "Peers in the netmap, by the path that leads to them now.",
    ),
    counter(
        "podtether_pod_rejects_total",
        &["direction", "namespace", "pod", "tailnet"],
        "Connections refused by a packet filter and told so: by ours, by a peer's.",
    ),
    gauge(
        "podtether_pod_sandbox_step",
        &["namespace", "pod", "step", "tailnet"],
        "1 where a step of the engine's sandbox is in force.",
    ),
    gauge("podtether_pod_state", &["namespace", "pod", "state", "tailnet"], "1 for the state the pod is in."),
    gauge("podtether_pod_up", POD, "1 while the pod's engine runs and answers."),
    gauge("podtether_pods", &["state"], "Pods of the node, by state."),
    gauge("podtether_records_aside", &[], "Record files that did not load."),
    counter("podtether_refused_total", &["reason"], "Calls and records that cannot be used, by reason."),
    counter("podtether_steps_total", &["step"], "Steps begun for pods, by step."),
    counter("process_cpu_seconds_total", &[], "Processor time that the supervisor has used."),
    gauge("process_open_fds", &[], "Descriptors that the supervisor has open."),
    gauge("process_resident_memory_bytes", &[], "Memory of the supervisor."),
    gauge("process_start_time_seconds", &[], "When the supervisor started, seconds since the epoch."),
];

/// The metric of this name; for names that are written in this program.
#[must_use]
pub fn of(name: &str) -> Option<&'static Metric> {
    METRICS.iter().find(|metric| metric.name == name)
}

fn missing(name: &str) -> prometheus::Error {
    prometheus::Error::Msg(format!("{name} is not in the table of metrics"))
}

/// For a counter or gauge of the table.
///
/// # Errors
/// It is not there: a defect.
pub fn opts(name: &str) -> Result<(Opts, &'static [&'static str]), prometheus::Error> {
    let metric = of(name).filter(|m| m.kind != Kind::Histogram).ok_or_else(|| missing(name))?;
    Ok((Opts::new(metric.name, metric.help), metric.labels))
}

/// For a histogram of the table.
///
/// # Errors
/// It is not there: a defect.
pub fn buckets(
    name: &str,
    buckets: &[f64],
) -> Result<(HistogramOpts, &'static [&'static str]), prometheus::Error> {
    let metric = of(name).filter(|m| m.kind == Kind::Histogram).ok_or_else(|| missing(name))?;
    Ok((HistogramOpts::new(metric.name, metric.help).buckets(buckets.to_vec()), metric.labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");

    /// A row as the document has it.
    fn row(metric: &Metric) -> String {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let Metric { name, kind, help, .. } = metric;
        format!("| `{name}` | {} | {} | {} | {help} |", kind.name(), metric.unit(), labels.join(", "))
    }

    /// The code's rows that the document has not, and the document's that the code has not.
    fn differences(document: &str) -> (Vec<String>, Vec<String>) {
        let is_row =
            |line: &&str| ["| `podtether_", "| `process_"].iter().any(|start| line.starts_with(start));
        let written: Vec<&str> = document.lines().filter(is_row).collect();
        let rows: Vec<String> = METRICS.iter().map(row).collect();
        let missing = rows.iter().filter(|row| !written.contains(&row.as_str())).cloned().collect();
        let unknown = written.iter().filter(|line| !rows.contains(&line.to_string()));
        (missing, unknown.map(ToString::to_string).collect())
    }

    #[test]
    fn the_document_has_the_table_and_nothing_else() {
        let document = std::fs::read_to_string(DOCUMENT).unwrap();
        let (missing, unknown) = differences(&document);
        assert!(
            missing.is_empty() && unknown.is_empty(),
            "docs/metrics.md lacks:\n{}\nand has what is not so:\n{}",
            missing.join("\n"),
            unknown.join("\n")
        );
    }

    #[test]
    fn a_row_too_many_and_one_too_few_are_both_found() {
        let rows: Vec<String> = METRICS.iter().map(row).collect();
        assert_eq!(differences(&rows.join("\n")), (Vec::new(), Vec::new()));
        assert_eq!(differences(&rows[1..].join("\n")), (vec![rows[0].clone()], Vec::new()));
        let invented = "| `podtether_invented_total` | counter |  |  | Nothing. |".to_owned();
        let more = [rows.join("\n"), invented.clone()].join("\n");
        assert_eq!(differences(&more), (Vec::new(), vec![invented]));
        let wrong = rows.join("\n").replacen("| counter |", "| gauge |", 1);
        assert_eq!(differences(&wrong).0.len() + differences(&wrong).1.len(), 2);
    }

    #[test]
    fn names_and_labels_are_as_prometheus_wants_them() {
        assert!(METRICS.windows(2).all(|two| two[0].name < two[1].name), "sorted, each once");
        for metric in METRICS {
            let Metric { name, kind, labels, help } = metric;
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
            assert!(*kind != Kind::Histogram || metric.unit() == "seconds", "{name}");
            assert!(labels.windows(2).all(|two| two[0] < two[1]), "{name}: labels sorted, each once");
            assert!(help.ends_with('.') && !help.contains(['\n', '\\', '|']), "{name}");
            assert_eq!(name.starts_with("podtether_pod_"), POD.iter().all(|l| labels.contains(l)), "{name}");
        }
    }
}
