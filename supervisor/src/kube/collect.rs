//! The watches' health as metrics.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGaugeVec, Opts};

use super::Cluster;

const LABELS: [&str; 1] = ["what"];

fn current() -> Opts {
    Opts::new(
        "podtether_kubernetes_current",
        "Whether what is known of the API server's objects is up to date.",
    )
}

fn failures() -> Opts {
    Opts::new("podtether_kubernetes_failures_total", "Calls to the API server that failed.")
}

impl Collector for Cluster {
    fn desc(&self) -> Vec<&Desc> {
        self.inner.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let (Ok(current), Ok(failures)) =
            (IntGaugeVec::new(current(), &LABELS), IntCounterVec::new(failures(), &LABELS))
        else {
            return Vec::new();
        };
        for health in self.health() {
            current.with_label_values(&[health.what]).set(i64::from(health.current));
            failures.with_label_values(&[health.what]).inc_by(health.failures);
        }
        current.collect().into_iter().chain(failures.collect()).collect()
    }
}

/// What [`Collector::desc`] borrows.
pub(super) fn descriptions() -> Vec<Desc> {
    let labels = || LABELS.map(str::to_owned).to_vec();
    let desc = |opts: Opts| Desc::new(opts.name, opts.help, labels(), Default::default());
    [current(), failures()].into_iter().filter_map(|opts| desc(opts).ok()).collect()
}
