//! What control and relays sent that was passed over, counted by reason; and how often what is refused
//! from anywhere is told of in the log.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

macro_rules! refused {
    ($($name:ident = $text:literal, $meaning:literal;)*) => {
        /// What was passed over.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(usize)]
        pub(crate) enum Refused {
            $(#[doc = $meaning] $name,)*
        }

        impl Refused {
            /// Every reason, its name in metrics and a sentence about it.
            const NAMES: &'static [(Self, &'static str, &'static str)] = &[$((Self::$name, $text, $meaning)),*];
        }
    };
}

refused! {
    ControlReply = "control_http_reply", "the control server answered with what is no HTTP, or to no such request";
    ControlKey = "control_key", "the control server answered /key with something else than its key";
    ControlNoise = "control_noise", "the control connection's Noise handshake or a record of it is broken";
    ControlEarly = "control_early_payload", "the control server began its session with what is neither a payload nor HTTP/2";
    ControlHttp2 = "control_http2", "the control server broke the rules of HTTP/2";
    ControlRegister = "control_register", "the control server answered a registration with what is no such answer";
    MapFrame = "control_map_frame", "the map stream announced a message that is too long";
    MapMessage = "control_map_message", "a message of the map stream is no JSON object";
    MapField = "control_map_field", "a field, list element or map entry of a map message makes no sense";
    DerpGreeting = "derp_greeting", "a relay greeted with something else than DERP, or with another key's words";
    DerpFrame = "derp_bad_frame", "a DERP frame is too short for its type";
    DerpLongFrame = "derp_long_frame", "a DERP frame is over the limit and was passed over unread";
    DerpLongPacket = "derp_long_packet", "a relayed packet is too long for a tunnel";
    DerpOutOfTurn = "derp_out_of_turn", "a DERP frame is none that a server sends to a client, or not at this time";
    RpcFrame = "rpc_frame", "a caller on the engine's socket sent what is no call";
}

static COUNTS: [AtomicU64; Refused::NAMES.len()] = [const { AtomicU64::new(0) }; Refused::NAMES.len()];

impl Refused {
    /// Counts one.
    pub(crate) fn count(self) {
        self.add(1);
    }

    /// Counts several.
    pub(crate) fn add(self, count: u64) {
        if let Some(counter) = COUNTS.get(self as usize) {
            counter.fetch_add(count, Ordering::Relaxed);
        }
    }
}

/// Reasons that occurred.
pub(crate) fn named() -> impl Iterator<Item = (&'static str, u64)> {
    Refused::NAMES
        .iter()
        .zip(&COUNTS)
        .map(|((_, name, _), n)| (*name, n.load(Ordering::Relaxed)))
        .filter(|(_, n)| *n > 0)
}

/// A sentence about one of these reasons.
pub(crate) fn meaning(reason: &str) -> Option<&'static str> {
    Refused::NAMES.iter().find(|(_, name, _)| *name == reason).map(|(_, _, meaning)| *meaning)
}

/// The least time between two lines about one reason.
const LINE_EVERY: Duration = Duration::from_secs(60);
/// Counts are looked at no more often.
const LOOK_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
struct Told {
    at: Instant,
    count: u64,
}

/// Says of each reason at most once a minute how much was refused for it.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    told: BTreeMap<&'static str, Told>,
    looked: Option<Instant>,
    /// Sum of all counts at the last look.
    seen: u64,
    due: Option<Instant>,
}

impl Lines {
    /// When [`Lines::look`] has something to do, given the sum of all counts.
    pub(crate) fn deadline(&self, sum: u64) -> Option<Instant> {
        let soon = (sum != self.seen).then(|| self.looked.map(|at| at + LOOK_EVERY)).flatten();
        soon.into_iter().chain(self.due).min()
    }

    /// Whether anything was looked at yet.
    pub(crate) fn began(&self) -> bool {
        self.looked.is_some()
    }

    /// Calls `tell` with each reason that a line is due for, and the count since its last line.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        counts: impl Iterator<Item = (&'static str, u64)>,
        mut tell: impl FnMut(&'static str, u64),
    ) {
        self.looked = Some(now);
        self.due = None;
        self.seen = 0;
        for (reason, count) in counts {
            self.seen = self.seen.wrapping_add(count);
            let last = self.told.get(reason).copied();
            let untold = count.saturating_sub(last.map_or(0, |told| told.count));
            if untold == 0 {
                continue;
            }
            match last.map(|told| told.at + LINE_EVERY).filter(|next| *next > now) {
                Some(next) => self.due = Some(self.due.map_or(next, |due| due.min(next))),
                None => {
                    self.told.insert(reason, Told { at: now, count });
                    tell(reason, untold);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_documented_with_its_meaning() {
        let document = include_str!("../../docs/metrics.md");
        for (_, name, meaning) in Refused::NAMES {
            assert!(document.contains(&format!("\n| `{name}` | {meaning} |\n")), "{name}");
        }
    }

    #[test]
    fn every_reason_has_its_own_counter() {
        for (index, (why, name, _)) in Refused::NAMES.iter().enumerate() {
            assert_eq!(*why as usize, index, "{name}");
            why.add(2);
            assert!(meaning(name).is_some_and(|m| m.contains(' ')), "{name}");
        }
        assert!(named().filter(|(_, n)| *n >= 2).count() == Refused::NAMES.len());
    }

    #[test]
    fn a_reason_has_one_line_a_minute_with_all_that_came_since() {
        let start = Instant::now();
        let (mut lines, mut told) = (Lines::default(), Vec::new());
        let mut count = 0;
        // A flood of one reason for ten minutes, a look after every tenth of a second.
        for tenth in 0..6000 {
            count += 10_000;
            let now = start + Duration::from_millis(100) * tenth;
            let due = lines.deadline(count + 1);
            if due.is_none_or(|at| at <= now) {
                let counts = [("flood", count), ("once", 1), ("never", 0)];
                lines.look(now, counts.into_iter(), |reason, n| told.push((reason, n)));
            }
        }
        let flood: Vec<u64> = told.iter().filter(|(reason, _)| *reason == "flood").map(|(_, n)| *n).collect();
        assert_eq!(flood.len(), 10, "{flood:?}");
        assert!(flood[1..].iter().all(|n| (5_990_000..=6_110_000).contains(n)), "{flood:?}");
        assert_eq!(told.iter().filter(|(reason, _)| *reason == "once").count(), 1);
        assert!(!told.iter().any(|(reason, _)| *reason == "never"));
    }

    #[test]
    fn what_came_after_a_line_is_told_a_minute_later_without_further_news() {
        let start = Instant::now();
        let mut lines = Lines::default();
        let look = |lines: &mut Lines, at, n| {
            let mut told = Vec::new();
            lines.look(at, [("x", n)].into_iter(), |_, n| told.push(n));
            told
        };
        assert_eq!(look(&mut lines, start, 1), [1]);
        assert_eq!(lines.deadline(1), None, "nothing to wake for");
        assert_eq!(lines.deadline(3), Some(start + LOOK_EVERY));
        assert_eq!(look(&mut lines, start + LOOK_EVERY, 3), [0; 0]);
        assert_eq!(lines.deadline(3), Some(start + LINE_EVERY));
        assert_eq!(look(&mut lines, start + LINE_EVERY, 3), [2]);
        assert_eq!(lines.deadline(3), None);
    }
}
