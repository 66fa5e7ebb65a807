//! What an engine holds after a burst of work goes back to the system when the work has ended.
//!
//! It costs one wake-up per burst, and none for what an idle engine does: keepalives, a delta, a question.

use std::time::{Duration, Instant};

use super::Driver;

/// Work has ended when less than [`BUSY`] came for this long.
const QUIET: Duration = Duration::from_secs(5);
/// Inputs, see [`Intake`](crate::intake::Intake::inputs): more than the pings and keepalives that go on for most of
/// a minute after traffic.
const BUSY: u64 = 32;
/// Inputs that are worth a look.
const WORTH: u64 = 256;

/// When memory is given back.
#[derive(Debug, Default)]
pub(super) struct Rest {
    /// Inputs when that was done last.
    given_back: u64,
    /// Inputs when they were last seen to be many, and when.
    busy: u64,
    last_work: Option<Instant>,
}

impl Rest {
    /// Notes how much work there has been by now; whether its end has come.
    pub(super) fn look(&mut self, inputs: u64, now: Instant) -> bool {
        if inputs - self.busy >= BUSY {
            self.busy = inputs;
            self.last_work = Some(now);
        }
        let ended = self.deadline().is_some_and(|at| at <= now);
        if ended {
            self.given_back = self.busy;
        }
        ended
    }

    /// When to look again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.last_work.filter(|_| self.busy - self.given_back >= WORTH).map(|at| at + QUIET)
    }
}

impl Driver {
    /// Gives back what only a burst of work needs.
    pub(super) fn give_back(&mut self) {
        self.from_tun.release();
        self.passed.release();
        self.outbox.release();
        self.tun.release();
        for udp in [&mut self.udp4, &mut self.udp6].into_iter().flatten() {
            udp.release();
        }
        trim_heap();
    }
}

/// Pages of the heap that nothing is in any more.
fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number; the allocator locks itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_once_after_each_burst() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut rest = Rest::default();
        // A burst for four seconds, then a ping every second, then another burst.
        let inputs = |second: u32| match second {
            0..=3 => u64::from(second) * 1000,
            4..60 => 3000 + u64::from(second),
            _ => 5000,
        };
        let at: Vec<u32> = (0..100).filter(|n| rest.look(inputs(*n), start + *n * second)).collect();
        assert_eq!(at, [8, 65]);
        assert_eq!(rest.deadline(), None, "nothing to wake up for");
    }
}
