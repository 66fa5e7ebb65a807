//! How soon an entry that was dropped is put back.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(60);
/// Within the window, at once.
const FREE: usize = 5;
const LONGEST: Duration = Duration::from_secs(32);

/// What was dropped lately. Two writers that each put their own text back would otherwise keep the node busy.
#[derive(Debug, Default)]
pub(super) struct Pace {
    lost: VecDeque<Instant>,
    /// Doublings since the last quiet window.
    doubled: u32,
}

impl Pace {
    /// It was dropped, and put back, at `now`: how long to leave it if it is dropped again.
    pub(super) fn lost(&mut self, now: Instant) -> Duration {
        while self.lost.front().is_some_and(|first| now.duration_since(*first) > WINDOW) {
            self.lost.pop_front();
        }
        if self.lost.is_empty() {
            self.doubled = 0;
        }
        self.lost.push_back(now);
        if self.lost.len() <= FREE && self.doubled == 0 {
            return Duration::ZERO;
        }
        let wait = Duration::from_secs(1 << self.doubled.min(5));
        self.doubled += 1;
        wait.min(LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_is_followed_at_once_and_a_fight_is_not() {
        let start = Instant::now();
        let mut pace = Pace::default();
        let mut now = start;
        let waits: Vec<u64> = (0..13)
            .map(|_| {
                now += Duration::from_millis(10);
                let wait = pace.lost(now);
                now += wait;
                wait.as_secs()
            })
            .collect();
        assert_eq!(waits, [0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 32, 32]);
        assert_eq!(pace.lost(now + Duration::from_secs(61)), Duration::ZERO, "after a quiet minute");
        let mut slow = Pace::default();
        for n in 0..100 {
            assert_eq!(slow.lost(start + Duration::from_secs(20 * n)), Duration::ZERO);
        }
    }
}
