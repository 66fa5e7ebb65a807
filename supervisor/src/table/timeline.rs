//! What became of a pod when, for people.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use podtether_proto::engine::Milestones;
use podtether_proto::node::{Milestone, Timeline};

use super::pod::Pod;

/// Milestones that are kept of a pod.
const MAX_MILESTONES: usize = 16;

/// Where a pod's times are counted from. Nothing is noted of a pod that an earlier supervisor added.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Clock {
    added: Option<Instant>,
    /// When the engine took its start request.
    engine: Option<Instant>,
}

impl Clock {
    /// ADD came in.
    pub(super) fn begin(&mut self, now: Instant) -> Timeline {
        self.added = Some(now);
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let added_unix_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        Timeline { added_unix_ms, milestones: Vec::new() }
    }

    /// What the engine tells is counted from `now` on, or not at all.
    pub(super) fn set_engine(&mut self, now: Option<Instant>) {
        self.engine = now;
    }
}

impl Pod {
    /// Notes that the pod got so far, the first time.
    pub(super) fn reached(&mut self, what: &str) {
        self.reached_at(what, Instant::now());
    }

    /// Notes how far its engine got.
    pub(super) fn engine_reached(&mut self, milestones: Milestones) {
        let Some(engine) = self.clock.engine else { return };
        let Milestones { registered_us, netmap_us, handshake_us } = milestones;
        for (what, after) in
            [("registered", registered_us), ("netmap", netmap_us), ("handshake", handshake_us)]
        {
            let after = after.map(std::time::Duration::from_micros);
            if let Some(at) = after.and_then(|after| engine.checked_add(after)) {
                self.reached_at(what, at);
            }
        }
    }

    fn reached_at(&mut self, what: &str, at: Instant) {
        let Some(added) = self.clock.added else { return };
        let milestones = &mut self.record.timeline.milestones;
        if milestones.len() < MAX_MILESTONES && milestones.iter().all(|known| known.what != what) {
            let after = at.saturating_duration_since(added);
            let after_us = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
            milestones.push(Milestone { what: what.to_owned(), after_us });
        }
    }
}
