//! What `/metrics` says: the supervisor's own counters, and per pod what its engine reports. A pod's
//! series are made anew for every scrape, so they end with the pod; [`series`] has them, [`table`] every metric's
//! name, type, labels and meaning.

pub mod link;
mod process;
mod seen;
mod series;
pub mod spans;
pub mod table;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use podtether_proto::PROTO_VERSION;
use prometheus::core::Collector;
use prometheus::{Encoder, Histogram, IntCounter, IntCounterVec, IntGaugeVec, Registry, TextEncoder};

use crate::engine::within;
use crate::refused::Refused;
use crate::table::Listing;
use seen::Seen;

/// How long an engine may take to answer a scrape.
const SCRAPE_WITHIN: Duration = Duration::from_secs(1);
/// What becomes of a wish for an auth key. These, and the ends below, are there from the beginning: of a series that
/// begins with its first event no increase is seen.
const MINTED: [&str; 3] = ["failed", "minted", "refused"];
/// Ends of engines that somebody has to know of.
const ENDS: [&str; 4] = ["crash", "forbidden_call", "memory", "silent"];

/// The supervisor's own counters.
#[derive(Debug, Clone)]
pub struct Counters {
    registry: Registry,
    /// Pods joined.
    pub adds: IntCounter,
    /// ADDs that failed.
    pub adds_failed: IntCounter,
    /// Auth keys asked for, by what came of it.
    pub mints: IntCounterVec,
    /// Steps begun for pods, by [name](crate::plan::Step::name).
    pub steps: IntCounterVec,
    /// Statuses that engines reported because something of theirs had changed.
    pub reports: IntCounter,
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
    /// Time from an engine's death to its successor's first answer.
    pub recovery_seconds: Histogram,
    /// Time from an engine's fork to its first answer.
    pub engine_ready_seconds: Histogram,
    /// What callers sent and files held that cannot be used.
    pub refused: Refused,
    seen: Arc<Mutex<Seen>>,
}

/// Makes what the table has, and has it in every scrape.
struct Maker<'a>(&'a Registry);

impl Maker<'_> {
    fn kept<T: Collector + Clone + 'static>(&self, made: T) -> Result<T, prometheus::Error> {
        self.0.register(Box::new(made.clone()))?;
        Ok(made)
    }

    fn counter(&self, name: &str) -> Result<IntCounter, prometheus::Error> {
        self.kept(IntCounter::with_opts(table::opts(name)?.0)?)
    }

    fn counters(&self, name: &str) -> Result<IntCounterVec, prometheus::Error> {
        let (opts, labels) = table::opts(name)?;
        self.kept(IntCounterVec::new(opts, labels)?)
    }

    fn histogram(&self, name: &str, buckets: &[f64]) -> Result<Histogram, prometheus::Error> {
        self.kept(Histogram::with_opts(table::buckets(name, buckets)?.0)?)
    }
}

/// The version of the calls to engines and plugin.
fn proto() -> String {
    format!("{}.{}", PROTO_VERSION.major, PROTO_VERSION.minor)
}

impl Counters {
    /// Has `more` in every scrape.
    ///
    /// # Errors
    /// Its names are taken: a defect.
    pub fn register(&self, more: Box<dyn Collector>) -> Result<(), prometheus::Error> {
        self.registry.register(more)
    }

    /// Registers them.
    ///
    /// # Errors
    /// Two have one name, or one is not in the table: a defect.
    pub fn new() -> Result<Counters, prometheus::Error> {
        let registry = Registry::new();
        let make = Maker(&registry);
        let (opts, labels) = table::opts("podtether_build_info")?;
        let build = make.kept(IntGaugeVec::new(opts, labels)?)?;
        build.with_label_values(&[&*proto(), env!("CARGO_PKG_VERSION")]).set(1);
        for histogram in spans::histograms()? {
            make.kept(histogram)?;
        }
        let mints = make.counters("podtether_auth_keys_total")?;
        for result in MINTED {
            mints.with_label_values(&[result]);
        }
        let engine_exits = make.counters("podtether_engine_exits_total")?;
        for kind in ENDS {
            engine_exits.with_label_values(&[kind]);
        }
        Ok(Counters {
            adds: make.counter("podtether_adds_total")?,
            adds_failed: make.counter("podtether_adds_failed_total")?,
            mints,
            steps: make.counters("podtether_steps_total")?,
            reports: make.counter("podtether_engine_reports_total")?,
            engine_exits,
            link_repairs: make.counters("podtether_link_repairs_total")?,
            adoptions: make.counters("podtether_engine_adoptions_total")?,
            handovers: make.counters("podtether_handovers_total")?,
            handover_gap_seconds: make.histogram(
                "podtether_handover_gap_seconds",
                &[0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1],
            )?,
            recovery_seconds: make.histogram(
                "podtether_engine_recovery_seconds",
                &[0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0],
            )?,
            engine_ready_seconds: make.histogram(
                "podtether_engine_ready_seconds",
                &[0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.5, 5.0],
            )?,
            refused: Refused::new(make.counters("podtether_refused_total")?),
            registry,
            seen: Arc::default(),
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
    let mut text = Vec::new();
    TextEncoder::new().encode(&counters.registry.gather(), &mut text)?;
    let mut text = String::from_utf8_lossy(&text).into_owned();
    series::single("podtether_records_aside", listing.asides.len(), &mut text);
    for (name, value) in process::own() {
        series::single(name, value, &mut text);
    }
    series::totals(&listing.pods, &answers, &mut text);
    let mut seen = counters.seen.lock().unwrap_or_else(PoisonError::into_inner);
    series::of_pods(&listing.pods, &answers, &mut seen, &mut text);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_empty_node_says_what_it_is() {
        let counters = Counters::new().unwrap();
        let text = scrape(&counters, Listing::default()).await.unwrap();
        let version = env!("CARGO_PKG_VERSION");
        for line in [
            format!("podtether_build_info{{proto=\"{}\",version=\"{version}\"}} 1", proto()),
            "podtether_auth_keys_total{result=\"refused\"} 0".to_owned(),
            "podtether_records_aside 0".to_owned(),
            "podtether_pods{state=\"running\"} 0".to_owned(),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
        for line in text.lines().filter_map(|l| l.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').unwrap();
            assert_eq!(table::of(name).map(|m| m.kind.name()), Some(kind), "{name}");
        }
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
        }
    }
}
