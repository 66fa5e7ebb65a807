//! The heap: one arena whatever threads there are, and given back when many pods have come or gone. And what a
//! process has of memory.

use std::time::{Duration, Instant};

/// A burst of pods is over when nothing was done for any of them for so long.
const QUIET: Duration = Duration::from_secs(3);
/// Steps that are worth a look: those of a few pods.
const WORTH: u64 = 16;

/// Allocations of so many bytes are mappings of their own, which go with them. Without being told, the allocator
/// would put those of a scrape between small ones as soon as it has seen one.
#[cfg(target_env = "gnu")]
const OWN_MAPPING: libc::c_int = 128 << 10;

/// The threads that enter a pod's namespace live for a moment. With an arena for each of some, what one freed
/// would stay where the next does not look. To be called before there is a second thread.
pub fn one_arena() {
    #[cfg(target_env = "gnu")]
    for (what, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, OWN_MAPPING)] {
        // SAFETY: takes two numbers, before any other thread allocates.
        unsafe {
            libc::mallopt(what, value);
        }
    }
}

/// When memory is given back.
#[derive(Debug, Default)]
pub struct Rest {
    given_back: u64,
    done: u64,
    last: Option<Instant>,
}

impl Rest {
    /// Notes how many steps were done by now; whether a burst of them has ended.
    pub fn look(&mut self, done: u64, now: Instant) -> bool {
        if std::mem::replace(&mut self.done, done) != done {
            self.last = Some(now);
        }
        let quiet = self.last.is_some_and(|at| now.saturating_duration_since(at) >= QUIET);
        let ended = quiet && done - self.given_back >= WORTH;
        if ended {
            self.given_back = done;
        }
        ended
    }
}

/// Gives back pages of the heap that nothing is in any more.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number; the allocator locks itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// `RssAnon` of a process, bytes.
#[must_use]
pub fn of_process(pid: u32) -> Option<u64> {
    rss_anon(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

fn rss_anon(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_the_process_alone_has() {
        assert_eq!(
            rss_anon("Name:\tx\nVmRSS:\t  9 kB\nRssAnon:\t    1480 kB\nRssFile:\t 1 kB\n"),
            Some(1_515_520)
        );
        assert_eq!(rss_anon("Name:\tkthread\n"), None);
        assert!(of_process(std::process::id()).is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn memory_is_given_back_once_after_each_burst() {
        let start = Instant::now();
        let mut rest = Rest::default();
        // Forty steps in four seconds, then one every ten, then another burst.
        let done = |second: u32| match second {
            0..=3 => u64::from(second + 1) * 10,
            4..60 => 40 + u64::from(second) / 10,
            _ => 100,
        };
        let at: Vec<u32> =
            (0..100).filter(|n| rest.look(done(*n), start + Duration::from_secs(1) * *n)).collect();
        assert_eq!(at, [6, 63]);
    }
}
