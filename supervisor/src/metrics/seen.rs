//! Labels that come from engines and from control's packet filter. A pod gets so many of them in its life, however
//! many are said one after another: each is a series that Prometheus keeps for hours.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

use crate::table::PodReport;

/// Labels of one pod: all reasons for drops, and as many rules of two packet filters.
const MAX_LABELS: usize = 256;

/// Which labels each pod has had.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Hashes, which are shorter than words; keyed, so that nobody makes two the same.
    pods: HashMap<u64, HashSet<u64>>,
    keyed: RandomState,
}

impl Seen {
    fn pod(&self, pod: &PodReport) -> u64 {
        self.keyed.hash_one((&pod.namespace, &pod.pod, &pod.tailnet))
    }

    /// Forgets pods that are gone.
    pub(super) fn keep(&mut self, pods: &[PodReport]) {
        let alive: HashSet<u64> = pods.iter().map(|pod| self.pod(pod)).collect();
        self.pods.retain(|pod, _| alive.contains(pod));
    }

    /// Whether the pod may have a series with this label.
    pub(super) fn admits(&mut self, pod: &PodReport, metric: u8, label: &str) -> bool {
        let key = self.pod(pod);
        let label = self.keyed.hash_one((metric, label));
        let labels = self.pods.entry(key).or_default();
        let admitted = labels.len() < MAX_LABELS || labels.contains(&label);
        if admitted {
            labels.insert(label);
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_has_so_many_labels_in_its_life_and_the_next_begins_anew() {
        let mut seen = Seen::default();
        let pod = |name: &str| PodReport { pod: name.into(), ..PodReport::default() };
        let (a, b) = (pod("a"), pod("b"));
        let admitted = (0..10_000).filter(|n| seen.admits(&a, 1, &format!("made_up_{n}"))).count();
        assert_eq!(admitted, MAX_LABELS);
        assert!(seen.admits(&a, 1, "made_up_0"), "what has a series keeps it");
        assert!(!seen.admits(&a, 2, "made_up_0") && seen.admits(&b, 1, "x"));
        seen.keep(std::slice::from_ref(&b));
        assert_eq!(seen.pods.len(), 1);
        assert!(seen.admits(&a, 2, "made_up_0"));
    }
}
