//! Pods that come and go while everything else goes wrong, with a runtime that tries again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::checker::ChurnSeen;
use crate::lab::Node;
use crate::sync::lock;

/// A runtime's patience with one pod.
const TRY_FOR: Duration = Duration::from_secs(60);
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(300);

/// Whether somebody whom an ADD or DEL needs is away: until it is back and for as long as a call that met
/// it may take.
#[derive(Default)]
pub(super) struct Away {
    /// Odd while somebody is away.
    changes: AtomicU64,
}

impl Away {
    /// Somebody goes.
    pub(super) fn begin(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// All are back.
    pub(super) fn end(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    fn now(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    /// Whether nobody was away from when [`Away::now`] said `since` until now.
    fn was_calm(&self, since: u64) -> bool {
        since.is_multiple_of(2) && self.now() == since
    }
}

/// See the module; until it is finished.
pub(super) struct Churn {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<ChurnSeen>>,
}

impl Churn {
    /// Lets one pod after another, called `name`, join and leave again on `node`, with `pause` between.
    pub(super) fn start(mut node: Node, name: &'static str, away: Arc<Away>, pause: Duration) -> Self {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut seen = ChurnSeen::default();
            for round in 0_u64.. {
                let mut pod = match node.create_pod(name) {
                    Ok(pod) => pod,
                    Err(error) => {
                        seen.failures.push(format!("sandbox {round}: {error:#}"));
                        break;
                    }
                };
                pod.uid = format!("uid-churn-{round}");
                pod.container_id = format!("sandbox-churn-{round}");
                let started = Instant::now();
                let joined = persist(&away, &mut seen, || {
                    let added = pod.add(&node).map(drop);
                    if added.is_err() {
                        // As kubelet does with a sandbox that failed.
                        let _ = pod.del(&node);
                    }
                    added
                });
                match joined {
                    Ok(()) => seen.joins.push(started.elapsed()),
                    Err(error) => seen.failures.push(format!("ADD {round} given up: {error:#}")),
                }
                // A DEL without a supervisor succeeds and leaves the device to a later one: kubelet makes it
                // again before it removes the sandbox.
                let left = persist(&away, &mut seen, || {
                    let before = away.now();
                    pod.del(&node)?;
                    if away.was_calm(before) { Ok(()) } else { bail!("DEL while somebody was away") }
                });
                if let Err(error) = left {
                    seen.failures.push(format!("DEL {round} given up: {error:#}"));
                }
                if let Err(error) = node.destroy_last(pod) {
                    seen.failures.push(format!("sandbox {round} cannot go: {error:#}"));
                    break;
                }
                let (stopped, changed) = &*told;
                let waited = changed.wait_timeout_while(lock(stopped), pause, |stopped| !*stopped);
                if waited.is_ok_and(|(stopped, _)| *stopped) {
                    break;
                }
            }
            seen
        });
        Self { stop, thread: Some(thread) }
    }

    /// Waits until the pod has left for good.
    pub(super) fn finish(mut self) -> Result<ChurnSeen> {
        self.tell();
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(seen)) => Ok(seen),
            _ => bail!("the thread with pods that come and go panicked"),
        }
    }

    fn tell(&self) {
        let (stopped, changed) = &*self.stop;
        *lock(stopped) = true;
        changed.notify_all();
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.tell();
    }
}

/// Tries again for a while; failures count as excused when somebody was away during the try.
fn persist(away: &Away, seen: &mut ChurnSeen, mut work: impl FnMut() -> Result<()>) -> Result<()> {
    let until = Instant::now() + TRY_FOR;
    loop {
        let before = away.now();
        let Err(error) = work() else { return Ok(()) };
        let text = format!("{error:#}");
        if away.was_calm(before) { &mut seen.failures } else { &mut seen.excused }.push(text);
        if Instant::now() > until {
            return Err(error);
        }
        std::thread::sleep(TRY_AGAIN_AFTER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_while_somebody_is_away_are_excused() {
        let away = Away::default();
        let mut seen = ChurnSeen::default();
        let mut tries = 0;
        // Away from the first try until within the third.
        persist(&away, &mut seen, || {
            tries += 1;
            match tries {
                1 => away.begin(),
                3 => away.end(),
                _ => {}
            }
            if tries < 5 { bail!("try {tries}") } else { Ok(()) }
        })
        .unwrap();
        assert_eq!(seen.excused, ["try 1", "try 2", "try 3"]);
        assert_eq!(seen.failures, ["try 4"]);
    }
}
