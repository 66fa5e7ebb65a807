//! What `/metrics` says: the supervisor's own counters, and per pod what its engine reports. A pod's
//! series are made anew for every scrape, so they end with the pod.

use std::time::Duration;

use futures_util::future::join_all;
use podtether_proto::engine::EngineMetrics;
use podtether_proto::sandbox::StepState;
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};

use crate::cgroup::Hold;
use crate::distrust;
use crate::engine::within;
use crate::refused::Refused;
use crate::table::{Listing, PodReport};

/// How long an engine may take to answer a scrape.
const SCRAPE_WITHIN: Duration = Duration::from_secs(1);
const LABELS: [&str; 3] = ["namespace", "pod", "tailnet"];

/// The supervisor's own counters.
#[derive(Debug, Clone)]
pub struct Counters {
    registry: Registry,
    /// Pods joined.
    pub adds: IntCounter,
    /// ADDs that failed.
    pub adds_failed: IntCounter,
    /// Time from ADD to its answer.
    pub add_seconds: Histogram,
    /// Auth keys asked for.
    pub mints: IntCounter,
    /// Ends of engines, by [kind](crate::restart::kind).
    pub engine_exits: IntCounterVec,
    /// Links that were repaired under a living engine, by what was wrong.
    pub link_repairs: IntCounterVec,
    /// Engines looked for that an earlier supervisor may have left, by what was found.
    pub adoptions: IntCounterVec,
    /// Planned handovers, by what became of them.
    pub handovers: IntCounterVec,
    /// From an engine being asked to let go until its successor read.
    pub handover_gap_seconds: Histogram,
    /// Time from an engine's death to its successor's start.
    pub recovery_seconds: Histogram,
    /// Time from an engine's fork to its first answer.
    pub engine_ready_seconds: Histogram,
    /// What callers sent and files held that cannot be used.
    pub refused: Refused,
}

impl Counters {
    /// Registers them.
    ///
    /// # Errors
    /// Two have one name: a defect.
    pub fn new() -> Result<Counters, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let made = IntCounter::new(name, help)?;
            registry.register(Box::new(made.clone()))?;
            Ok(made)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| -> Result<Histogram, prometheus::Error> {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let made = Histogram::with_opts(options)?;
            registry.register(Box::new(made.clone()))?;
            Ok(made)
        };
        let adds = counter("podtether_adds_total", "Pods joined.")?;
        let adds_failed = counter("podtether_adds_failed_total", "CNI ADDs that failed.")?;
        let mints = counter("podtether_auth_keys_total", "Auth keys asked for.")?;
        let add_seconds = histogram(
            "podtether_add_seconds",
            "Time from CNI ADD to its answer.",
            &[0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0],
        )?;
        let recovery_seconds = histogram(
            "podtether_engine_recovery_seconds",
            "Time from an engine's death to the start of its successor.",
            &[0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0],
        )?;
        let engine_ready_seconds = histogram(
            "podtether_engine_ready_seconds",
            "Time from an engine's fork to its first answer, from its sandbox.",
            &[0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.5, 5.0],
        )?;
        let handover_gap_seconds = histogram(
            "podtether_handover_gap_seconds",
            "Time in a planned handover in which neither engine read.",
            &[0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1],
        )?;
        let options = Opts::new("podtether_handovers_total", "Planned handovers, by outcome.");
        let handovers = IntCounterVec::new(options, &["outcome"])?;
        registry.register(Box::new(handovers.clone()))?;
        let options = Opts::new("podtether_engine_exits_total", "Engines that ended, by kind.");
        let engine_exits = IntCounterVec::new(options, &["kind"])?;
        registry.register(Box::new(engine_exits.clone()))?;
        let options =
            Opts::new("podtether_link_repairs_total", "Links that were repaired, by what was wrong.");
        let link_repairs = IntCounterVec::new(options, &["fault"])?;
        registry.register(Box::new(link_repairs.clone()))?;
        let options =
            Opts::new("podtether_refused_total", "Calls and records that cannot be used, by reason.");
        let refused = IntCounterVec::new(options, &["reason"])?;
        registry.register(Box::new(refused.clone()))?;
        let refused = Refused::new(refused);
        let options = Opts::new(
            "podtether_engine_adoptions_total",
            "Engines of an earlier supervisor, by what was found.",
        );
        let adoptions = IntCounterVec::new(options, &["found"])?;
        registry.register(Box::new(adoptions.clone()))?;
        Ok(Counters {
            adoptions,
            registry,
            adds,
            adds_failed,
            add_seconds,
            mints,
            engine_exits,
            link_repairs,
            handovers,
            handover_gap_seconds,
            recovery_seconds,
            engine_ready_seconds,
            refused,
        })
    }
}

/// The text of one scrape.
///
/// # Errors
/// Two series have one name: a defect.
pub async fn scrape(counters: &Counters, listing: Listing) -> Result<String, prometheus::Error> {
    let asked = listing.clients.into_iter().map(|client| async move {
        match client {
            Some(client) => client.metrics(within(SCRAPE_WITHIN)).await.ok(),
            None => None,
        }
    });
    let answers = join_all(asked).await;
    let pods = Registry::new();
    let series = Series::new(&pods)?;
    for (pod, answer) in listing.pods.iter().zip(&answers) {
        series.put(pod, answer.as_ref());
    }
    let asides = IntGauge::new("podtether_records_aside", "Record files that did not load.")?;
    asides.set(i64::try_from(listing.asides.len()).unwrap_or(i64::MAX));
    pods.register(Box::new(asides))?;
    let mut text = Vec::new();
    let encoder = TextEncoder::new();
    encoder.encode(&counters.registry.gather(), &mut text)?;
    encoder.encode(&pods.gather(), &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

struct Series {
    up: GaugeVec,
    state: GaugeVec,
    login: GaugeVec,
    health: GaugeVec,
    sandbox: GaugeVec,
    restarts: IntCounterVec,
    runs: IntCounterVec,
    limits: GaugeVec,
    control: GaugeVec,
    home_derp: GaugeVec,
    packets: IntCounterVec,
    bytes: IntCounterVec,
    drops: IntCounterVec,
    filter_passed: IntCounterVec,
    filter_rules: GaugeVec,
    rejects: IntCounterVec,
    handshakes: IntCounterVec,
    last_handshake: GaugeVec,
    peers: GaugeVec,
    derp: GaugeVec,
}

impl Series {
    fn new(registry: &Registry) -> Result<Series, prometheus::Error> {
        let with =
            |more: &[&'static str]| -> Vec<&'static str> { LABELS.iter().chain(more).copied().collect() };
        let gauge = |name: &str, help: &str, more: &[&'static str]| -> Result<GaugeVec, prometheus::Error> {
            let made = GaugeVec::new(Opts::new(format!("podtether_pod_{name}"), help), &with(more))?;
            registry.register(Box::new(made.clone()))?;
            Ok(made)
        };
        let counter =
            |name: &str, help: &str, more: &[&'static str]| -> Result<IntCounterVec, prometheus::Error> {
                let made = IntCounterVec::new(Opts::new(format!("podtether_pod_{name}"), help), &with(more))?;
                registry.register(Box::new(made.clone()))?;
                Ok(made)
            };
        Ok(Series {
            up: gauge("up", "1 while the pod's engine runs and answers.", &[])?,
            state: gauge("state", "1 for the state the pod is in.", &["state"])?,
            login: gauge("needs_login", "1 while somebody has to open the URL.", &["url"])?,
            health: gauge("health_messages", "What is wrong, by severity.", &["severity"])?,
            sandbox: gauge("sandbox_step", "1 where a step of the engine's sandbox is in force.", &["step"])?,
            restarts: counter("engine_restarts_total", "Engine restarts since the supervisor started.", &[])?,
            runs: counter("engine_runs_total", "How often the engine woke up and ran.", &[])?,
            limits: gauge(
                "engine_limits",
                "1 where the limit holds for the engine, 0 where not.",
                &["limit"],
            )?,
            control: gauge("control_connected", "1 while the map stream is up.", &[])?,
            home_derp: gauge("home_derp_region", "Home DERP region, 0 for none.", &[])?,
            packets: counter("packets_total", "Packets since the engine started.", &["direction"])?,
            bytes: counter("bytes_total", "Bytes since the engine started.", &["direction"])?,
            drops: counter("drops_total", "Packets dropped, by reason.", &["reason"])?,
            filter_passed: counter(
                "filter_passed_total",
                "Packets that the packet filter let in, by rule (at most 64 apart) or what else let them.",
                &["by"],
            )?,
            filter_rules: gauge(
                "filter_rules",
                "Rules of the packet filter: in force, and parts that were left out.",
                &["state"],
            )?,
            rejects: counter(
                "rejects_total",
                "Connections refused by a packet filter and told so: by ours, by a peer's.",
                &["direction"],
            )?,
            handshakes: counter("handshakes_total", "WireGuard handshakes completed.", &[])?,
            last_handshake: gauge("last_handshake_timestamp_seconds", "Last handshake, 0 for none.", &[])?,
            peers: gauge("peers", "Peers by path: all in the netmap, direct, relay.", &["path"])?,
            derp: gauge("derp_connected", "DERP regions connected.", &[])?,
        })
    }

    fn put(&self, pod: &PodReport, engine: Option<&EngineMetrics>) {
        let own = [pod.namespace.as_str(), pod.pod.as_str(), pod.tailnet.as_str()];
        let with = |more: &'static str| [own[0], own[1], own[2], more];
        let flag = |on: bool| if on { 1.0 } else { 0.0 };
        self.up.with_label_values(&own).set(flag(engine.is_some() && pod.state == "running"));
        self.state.with_label_values(&with(pod.state)).set(1.0);
        if !pod.login_url.is_empty() {
            self.login.with_label_values(&[own[0], own[1], own[2], &pod.login_url]).set(1.0);
        }
        for severity in ["low", "medium", "high"] {
            let count = pod.health.iter().filter(|message| message.severity == severity).count();
            let count = u64::try_from(count).unwrap_or(u64::MAX);
            self.health.with_label_values(&with(severity)).set(float(count));
        }
        for step in &pod.sandbox {
            let held = flag(step.state == StepState::Held);
            self.sandbox.with_label_values(&[own[0], own[1], own[2], &step.step]).set(held);
        }
        self.restarts.with_label_values(&own).inc_by(pod.restarts);
        if let Some(runs) = pod.engine_runs {
            self.runs.with_label_values(&own).inc_by(runs);
        }
        if pod.engine_pid.is_some() {
            for hold in Hold::ALL {
                let holds = pod.limits.contains(&hold.name());
                self.limits.with_label_values(&with(hold.name())).set(flag(holds));
            }
        }
        let Some(m) = engine else { return };
        self.control.with_label_values(&own).set(flag(m.control_connected));
        self.home_derp.with_label_values(&own).set(m.home_derp.into());
        for (direction, packets, bytes) in
            [("transmit", m.tx_packets, m.tx_bytes), ("receive", m.rx_packets, m.rx_bytes)]
        {
            self.packets.with_label_values(&with(direction)).inc_by(packets);
            self.bytes.with_label_values(&with(direction)).inc_by(bytes);
        }
        for (reason, count) in distrust::drops(m) {
            self.drops.with_label_values(&[own[0], own[1], own[2], reason]).inc_by(count);
        }
        // One more than the engine tells at most, besides its own words.
        for (by, count) in m.filter_passed.iter().take(72) {
            let by = distrust::label(by);
            self.filter_passed.with_label_values(&[own[0], own[1], own[2], &by]).inc_by(*count);
        }
        self.filter_rules.with_label_values(&with("in_force")).set(float(m.filter_rules));
        self.filter_rules.with_label_values(&with("left_out")).set(float(m.filter_skipped));
        self.rejects.with_label_values(&with("sent")).inc_by(m.rejects_sent);
        self.rejects.with_label_values(&with("received")).inc_by(m.rejects_received);
        self.handshakes.with_label_values(&own).inc_by(m.handshakes);
        self.last_handshake.with_label_values(&own).set(float(m.last_handshake_unix_s));
        self.derp.with_label_values(&own).set(float(m.derp_connected));
        for (path, count) in [("all", m.peers), ("direct", m.peers_direct), ("relay", m.peers_relay)] {
            self.peers.with_label_values(&with(path)).set(float(count));
        }
    }
}

/// Counts far below 2^53.
fn float(n: u64) -> f64 {
    f64::from(u32::try_from(n).unwrap_or(u32::MAX))
}
