//! Timestamps of initiations.

use std::time::Instant;

use super::Timestamp;
use crate::tailcfg::UnixTime;

/// 1970 as other WireGuards label it; who compares a node's stamps has seen those of its earlier builds too.
const EPOCH: u64 = (1 << 62) + 37;

/// The wall clock as it was at some moment, counted on from there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    wall: UnixTime,
    at: Instant,
}

impl Clock {
    pub(crate) fn new(wall: UnixTime, at: Instant) -> Self {
        Self { wall, at }
    }

    /// The time as TAI64N: seconds, then nanoseconds, both with the highest byte first.
    pub(crate) fn timestamp(&self, now: Instant) -> Timestamp {
        let elapsed = now.saturating_duration_since(self.at);
        let millis = u128::try_from(self.wall.as_millis()).unwrap_or(0);
        let nanos = millis * 1_000_000 + elapsed.as_nanos();
        let seconds = u64::try_from(nanos / 1_000_000_000).unwrap_or(u64::MAX >> 2);
        let rest = u32::try_from(nanos % 1_000_000_000).unwrap_or(0);
        let mut timestamp = Timestamp::default();
        timestamp[..8].copy_from_slice(&(EPOCH + seconds).to_be_bytes());
        timestamp[8..].copy_from_slice(&rest.to_be_bytes());
        timestamp
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn timestamps_are_tai64n_and_grow_by_the_nanosecond() {
        let at = Instant::now();
        let clock = Clock::new(UnixTime::from_millis(1_500), at);
        assert_eq!(clock.timestamp(at), [0x40, 0, 0, 0, 0, 0, 0, 38, 0x1d, 0xcd, 0x65, 0]);
        assert_eq!(clock.timestamp(at + Duration::from_nanos(1))[8..], [0x1d, 0xcd, 0x65, 1]);
        assert!(
            clock.timestamp(at + Duration::from_millis(500))
                > clock.timestamp(at + Duration::from_millis(499))
        );
    }
}
