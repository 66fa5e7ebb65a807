//! What a server said about its rate limit, obeyed by everyone who talks to it.

use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use podtether_core::retry_after;
use podtether_core::tailcfg::UnixTime;
use tokio::sync::Semaphore;

/// Calls at a time to one API.
const AT_ONCE: usize = 8;
/// Longest `Retry-After` that is believed.
const MAX_PAUSE: Duration = Duration::from_secs(600);
/// Pause after a 429 that names none.
const DEFAULT_PAUSE: Duration = Duration::from_secs(2);

/// Shared by all callers of one API.
#[derive(Debug)]
pub(super) struct Limiter {
    not_before: Mutex<Option<Instant>>,
    places: Semaphore,
}

impl Default for Limiter {
    fn default() -> Self {
        Limiter { not_before: Mutex::new(None), places: Semaphore::new(AT_ONCE) }
    }
}

impl Limiter {
    /// When a call may go out; `None` for now.
    pub(super) fn not_before(&self, now: Instant) -> Option<Instant> {
        let held = self.not_before.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        held.filter(|at| *at > now)
    }

    /// Notes a 429 and returns the pause it asks for, jitter included.
    pub(super) fn limited(&self, header: Option<&str>, now: Instant, random: u64) -> Duration {
        let asked = header.and_then(|text| retry_after::parse(text, wall_clock()));
        let asked = asked.unwrap_or(DEFAULT_PAUSE).min(MAX_PAUSE);
        // Never earlier than asked, and not everybody at the same moment.
        let jitter = asked / 4 * u32::try_from(random % 1000).unwrap_or(0) / 1000;
        let pause = asked + jitter;
        let mut held = self.not_before.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *held = Some(held.map_or(now + pause, |at| at.max(now + pause)));
        pause
    }

    /// A place among the calls at a time.
    pub(super) async fn place(&self) -> Option<tokio::sync::SemaphorePermit<'_>> {
        self.places.acquire().await.ok()
    }
}

/// Now, for what servers say in dates.
pub(crate) fn wall_clock() -> UnixTime {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    UnixTime::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_never_shorter_than_asked_and_holds_for_everyone() {
        let limiter = Limiter::default();
        let now = Instant::now();
        assert_eq!(limiter.not_before(now), None);
        for random in [0, 1, 999, u64::MAX] {
            let pause = limiter.limited(Some("3"), now, random);
            assert!(pause >= Duration::from_secs(3) && pause <= Duration::from_millis(3750), "{pause:?}");
        }
        assert!(limiter.not_before(now).unwrap() >= now + Duration::from_secs(3));
        assert_eq!(limiter.not_before(now + Duration::from_secs(4)), None);
        assert!(limiter.limited(Some("soon"), now, 0) == DEFAULT_PAUSE);
        assert!(limiter.limited(Some("99999999999"), now, 0) == MAX_PAUSE);
        assert!(limiter.limited(Some("Fri, 31 Dec 9999 23:59:59 GMT"), now, 0) == MAX_PAUSE);
        assert!(limiter.limited(Some("Wed, 21 Oct 2015 07:28:00 GMT"), now, 0) == Duration::ZERO);
    }
}
