//! How long to wait before trying control or a DERP region again.

use std::time::Duration;

/// The longest wait between two tries.
pub const MAX_DELAY: Duration = Duration::from_secs(30);
const UNIT_MS: u64 = 10;

/// n² × 10 ms, times a random factor from 0.5 to 1.5, at most 30 s. Never gives up. The jitter keeps a
/// node's engines from coming back to a restarted server in step.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    failures: u64,
}

impl Backoff {
    /// No failure yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts a failure and says how long to wait. `random` is uniform over all of u64.
    pub fn next(&mut self, random: u64) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let base_ms = self.failures.saturating_mul(self.failures).saturating_mul(UNIT_MS);
        let base = Duration::from_millis(base_ms).min(MAX_DELAY);
        let half = base / 2;
        let span_us = u64::try_from(base.as_micros()).unwrap_or(u64::MAX).max(1);
        (half + Duration::from_micros(random % span_us)).min(MAX_DELAY)
    }

    /// Forgets the failures: the last try worked.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures since the last reset.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn grows_with_the_square_and_stays_under_the_cap() {
        let mut backoff = Backoff::new();
        let lows: Vec<u128> = (0..4).map(|_| backoff.next(0).as_millis()).collect();
        assert_eq!(lows, [5, 20, 45, 80]);
        for _ in 0..1000 {
            backoff.next(0);
        }
        assert_eq!(backoff.next(0), MAX_DELAY / 2);
        assert_eq!(backoff.failures(), 1005);
        backoff.reset();
        assert!(backoff.next(u64::MAX) <= Duration::from_millis(15));
    }

    proptest! {
        #[test]
        fn jitter_is_half_to_one_and_a_half(failures in 1_u64..80, random: u64) {
            let mut backoff = Backoff { failures: failures - 1 };
            let base = Duration::from_millis(failures * failures * 10).min(MAX_DELAY);
            let delay = backoff.next(random);
            prop_assert!(delay >= base / 2 && delay <= (base * 3 / 2).min(MAX_DELAY));
        }
    }
}
