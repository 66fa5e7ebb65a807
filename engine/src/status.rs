//! What the engine says about itself, shared between the parts that know and the `watch` call.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use podtether_proto::engine::{EngineStatus, Milestones, NodeState, Role};
use podtether_proto::sandbox::StepReport;
use tokio::sync::watch;

/// Cheap to clone; every clone is the same board.
#[derive(Debug, Clone)]
pub(crate) struct Board(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    status: watch::Sender<EngineStatus>,
    /// Not part of the status, because every control message would otherwise wake the watcher.
    control_heard: Mutex<Option<Instant>>,
    pod_uid: OnceLock<String>,
    role: Mutex<Role>,
}

impl Board {
    pub(crate) fn new(sandbox: Vec<StepReport>) -> Self {
        let (status, _) = watch::channel(EngineStatus {
            seq: 1,
            state: NodeState::Waiting,
            control_connected: false,
            control_age_ms: None,
            node: None,
            home_derp: 0,
            health: Vec::new(),
            routes_version: 0,
            accepted_routes: Vec::new(),
            exit_node_id: None,
            sandbox,
            milestones: Milestones::default(),
        });
        Self(Arc::new(Inner {
            status,
            control_heard: Mutex::new(None),
            pod_uid: OnceLock::new(),
            role: Mutex::default(),
        }))
    }

    /// Changes the status; watchers wake when it is different afterwards.
    pub(crate) fn update(&self, change: impl FnOnce(&mut EngineStatus)) {
        self.0.status.send_if_modified(|status| {
            let mut next = status.clone();
            change(&mut next);
            let changed = next != *status;
            if changed {
                next.seq = status.seq + 1;
                *status = next;
            }
            changed
        });
    }

    /// A control message arrived.
    pub(crate) fn control_heard(&self, now: Instant) {
        *self.0.control_heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    /// Whose engine this is; the first call wins.
    pub(crate) fn set_pod_uid(&self, uid: &str) {
        let _ = self.0.pod_uid.set(uid.to_owned());
    }

    pub(crate) fn pod_uid(&self) -> String {
        self.0.pod_uid.get().cloned().unwrap_or_default()
    }

    /// What this process is to its pod from now on.
    pub(crate) fn set_role(&self, role: Role) {
        *self.0.role.lock().unwrap_or_else(PoisonError::into_inner) = role;
    }

    pub(crate) fn role(&self) -> Role {
        *self.0.role.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The status of now.
    pub(crate) fn read(&self) -> EngineStatus {
        let mut status = self.0.status.borrow().clone();
        let heard = *self.0.control_heard.lock().unwrap_or_else(PoisonError::into_inner);
        status.control_age_ms = heard.map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX));
        status
    }

    /// The status once its `seq` is greater than `after`, or whatever it is after `longest`.
    pub(crate) async fn wait(&self, after: u64, longest: Duration) -> EngineStatus {
        let mut changes = self.0.status.subscribe();
        // Both outcomes are answered the same way: with what is true now.
        let _ = tokio::time::timeout(longest, changes.wait_for(|status| status.seq > after)).await;
        self.read()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_watch_ends_with_a_change_or_with_its_time() {
        let board = Board::new(Vec::new());
        let first = board.wait(0, Duration::from_secs(20)).await;
        assert_eq!((first.seq, &first.state), (1, &NodeState::Waiting));
        board.update(|_| {});
        assert_eq!(board.read().seq, 1, "nothing changed");
        let watcher = tokio::spawn({
            let board = board.clone();
            async move { board.wait(1, Duration::from_secs(20)).await }
        });
        tokio::task::yield_now().await;
        board.update(|s| s.state = NodeState::NeedsApproval);
        let second = watcher.await.unwrap();
        assert_eq!((second.seq, second.state), (2, NodeState::NeedsApproval));
        assert_eq!(board.wait(2, Duration::from_millis(1)).await.seq, 2, "timed out unchanged");
    }
}
