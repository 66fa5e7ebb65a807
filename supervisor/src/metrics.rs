//! What `/metrics` says: the supervisor's own counters, and per pod what its engine reports. A pod's
//! series are made anew for every scrape, so they end with the pod; [`series`] has them.

mod series;

use std::time::Duration;

use futures_util::future::join_all;
use prometheus::{Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry, TextEncoder};

use crate::engine::within;
use crate::refused::Refused;
use crate::table::Listing;

/// How long an engine may take to answer a scrape.
const SCRAPE_WITHIN: Duration = Duration::from_secs(1);

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
    /// Time from an engine's death to its successor's start.
    pub recovery_seconds: Histogram,
    /// Time from an engine's fork to its first answer.
    pub engine_ready_seconds: Histogram,
    /// What callers sent and files held that cannot be used.
    pub refused: Refused,
}

impl Counters {
    /// Has `more` in every scrape.
    ///
    /// # Errors
    /// Its names are taken: a defect.
    pub fn register(&self, more: Box<dyn prometheus::core::Collector>) -> Result<(), prometheus::Error> {
        self.registry.register(more)
    }

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
        let reports = counter(
            "podtether_engine_reports_total",
            "Statuses that engines reported because something of theirs had changed.",
        )?;
        let steps = IntCounterVec::new(
            Opts::new("podtether_steps_total", "Steps begun for pods, by step."),
            &["step"],
        )?;
        registry.register(Box::new(steps.clone()))?;
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
            steps,
            reports,
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
    let mut text = Vec::new();
    TextEncoder::new().encode(&counters.registry.gather(), &mut text)?;
    let mut text = String::from_utf8_lossy(&text).into_owned();
    series::asides(listing.asides.len(), &mut text);
    series::of_pods(&listing.pods, &answers, &mut text);
    Ok(text)
}
