//! The watches' health as metrics.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGaugeVec};

use super::Cluster;
use crate::metrics::table;

const CURRENT: &str = "podtether_kubernetes_current";
const FAILURES: &str = "podtether_kubernetes_failures_total";

fn made() -> Result<(IntGaugeVec, IntCounterVec), prometheus::Error> {
    let ((current, of_current), (failures, of_failures)) = (table::opts(CURRENT)?, table::opts(FAILURES)?);
    Ok((IntGaugeVec::new(current, of_current)?, IntCounterVec::new(failures, of_failures)?))
}

impl Collector for Cluster {
    fn desc(&self) -> Vec<&Desc> {
        self.inner.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Ok((current, failures)) = made() else { return Vec::new() };
        for health in self.health() {
            current.with_label_values(&[health.what]).set(i64::from(health.current));
            failures.with_label_values(&[health.what]).inc_by(health.failures);
        }
        current.collect().into_iter().chain(failures.collect()).collect()
    }
}

/// What [`Collector::desc`] borrows.
pub(super) fn descriptions() -> Vec<Desc> {
    let Ok((current, failures)) = made() else { return Vec::new() };
    current.desc().into_iter().chain(failures.desc()).cloned().collect()
}
