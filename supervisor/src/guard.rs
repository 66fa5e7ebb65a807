//! Whether an engine that answers does its work: figures against figures, so that one under an honest flood
//! is left alone.
//!
//! * [`Processor`]: a runaway. Every [`CPU_EVERY`] one small file of the engine is read. An engine that
//!   could have run nearly all the time is asked what it has worked on, and is one only when that does not
//!   explain what it used over [`RUNAWAY_AFTER`].
//! * [`Queue`]: a TUN that nobody reads. Packets that wait at every look are looked at together with the
//!   engine's count of what it has read.
//! * [`Repairs`]: how often a link that does not stay whole is repaired.

use std::io::{self, Read as _};
use std::time::{Duration, Instant};

/// How often links and queues are looked at.
pub const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How often the processor time of an engine is read.
pub const CPU_EVERY: Duration = Duration::from_secs(10);
/// An engine has to be hot and unexplained this long.
pub const RUNAWAY_AFTER: Duration = Duration::from_secs(30);
/// Thousandths of the time that a hot engine could have run: it ran, or waited for a processor.
const HOT: u128 = 900;
/// Thousandths of the time that it has to have run: one that is only kept waiting by a busy node is none.
const MIN_RAN: u128 = 100;
/// Processor time that one packet, datagram, answer or further 256 bytes of a stream explain. What costs most,
/// an initiation of a stranger, takes a third of it without optimisation.
pub const PER_INPUT: Duration = Duration::from_micros(100);
/// What a handshake explains: four Curve25519 operations, without optimisation.
pub const PER_HANDSHAKE: Duration = Duration::from_millis(2);
/// Looks in a row at a queue that is not empty before the engine is asked, and again until it is judged.
const LOOKS: u32 = 3;

/// From an answer until who gave it is asleep. One that never sleeps has run for far longer by the next look.
const TAIL: Duration = Duration::from_millis(10);

/// What a process has used, and what the kernel kept from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// Time on a processor.
    pub ran: Duration,
    /// Time that it was ready to run and waited for one; zero where the kernel does not count that.
    pub waited: Duration,
    /// How often it came to run; zero where the kernel does not count that.
    pub times: u64,
}

impl Used {
    /// Whether the process has not come to run since `before` was read, so that nothing about it can be different:
    /// also who is stopped or frozen runs for a moment first. False where the kernel does not tell.
    ///
    /// `before` may have been read while the process was on its way to sleep, so it may have run on for [`TAIL`].
    #[must_use]
    pub fn is_still(&self, before: &Self) -> bool {
        self.times > 0 && self.times == before.times && self.ran.saturating_sub(before.ran) <= TAIL
    }

    /// Of the first thread of `pid`: an engine has one.
    ///
    /// # Errors
    /// The process has ended.
    pub fn read(pid: u32) -> io::Result<Self> {
        let read = |name: &str| -> io::Result<String> {
            let mut text = String::new();
            std::fs::File::open(format!("/proc/{pid}/{name}"))?.take(4096).read_to_string(&mut text)?;
            Ok(text)
        };
        if let Some(used) = read("schedstat").ok().as_deref().and_then(Self::of_schedstat) {
            return Ok(used);
        }
        Self::of_stat(&read("stat")?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// `/proc/PID/schedstat`: nanoseconds on a processor and in the queue for one, and how often.
    #[must_use]
    pub fn of_schedstat(text: &str) -> Option<Self> {
        let mut fields = text.split_whitespace().map(str::parse);
        let (ran, waited) = (fields.next()?.ok()?, fields.next()?.ok()?);
        let times = fields.next().and_then(Result::ok).unwrap_or(0);
        Some(Self { ran: Duration::from_nanos(ran), waited: Duration::from_nanos(waited), times })
    }

    /// Fields 14 and 15 of `/proc/PID/stat`, which every kernel has, in hundredths of a second.
    #[must_use]
    pub fn of_stat(text: &str) -> Option<Self> {
        let (_, fields) = text.rsplit_once(") ")?;
        let mut fields = fields.split(' ').skip(14 - 3).map(str::parse::<u64>);
        let ticks = fields.next()?.ok()?.checked_add(fields.next()?.ok()?)?;
        Some(Self { ran: Duration::from_millis(ticks.checked_mul(10)?), ..Self::default() })
    }
}

/// What an engine says it has worked on since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// See [`PER_INPUT`].
    pub inputs: u64,
    /// See [`PER_HANDSHAKE`].
    pub handshakes: u64,
}

impl Work {
    /// The most processor time that this explains.
    #[must_use]
    pub fn explains(self) -> Duration {
        let times = |each: Duration, n: u64| each.saturating_mul(u32::try_from(n).unwrap_or(u32::MAX));
        times(PER_INPUT, self.inputs).saturating_add(times(PER_HANDSHAKE, self.handshakes))
    }

    fn since(self, before: Self) -> Self {
        Self {
            inputs: self.inputs.saturating_sub(before.inputs),
            handshakes: self.handshakes.saturating_sub(before.handshakes),
        }
    }
}

/// Figures of an engine that is killed for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Runaway {
    /// How long it was looked at.
    pub over: Duration,
    /// What it used in that time.
    pub ran: Duration,
    /// What that time's work explains.
    pub explained: Duration,
}

/// One engine's use of the processor.
#[derive(Debug, Clone, Copy, Default)]
pub struct Processor {
    last: Option<(Instant, Used)>,
    /// Where the hot time began, and what the engine had worked on by then.
    hot: Option<(Instant, Used, Work)>,
}

impl Processor {
    /// Whether the engine has to be asked for its [`Work`], to be judged.
    pub fn look(&mut self, now: Instant, used: Used) -> bool {
        let Some((at, before)) = self.last.replace((now, used)) else { return false };
        let (over, ran, waited) = between((at, before), (now, used));
        let hot = !over.is_zero() && permille(ran + waited, over) >= HOT && permille(ran, over) >= MIN_RAN;
        if !hot {
            self.hot = None;
        }
        hot
    }

    /// After [`look`](Self::look) has said so: the figures, when the engine is a runaway.
    pub fn judge(&mut self, work: Work) -> Option<Runaway> {
        let (now, used) = self.last?;
        let Some((since, at_first, had)) = self.hot else {
            self.hot = Some((now, used, work));
            return None;
        };
        let (over, ran, _) = between((since, at_first), (now, used));
        if over < RUNAWAY_AFTER {
            return None;
        }
        self.hot = Some((now, used, work));
        let explained = work.since(had).explains();
        (ran > explained).then_some(Runaway { over, ran, explained })
    }
}

fn between(from: (Instant, Used), to: (Instant, Used)) -> (Duration, Duration, Duration) {
    let over = to.0.saturating_duration_since(from.0);
    (over, to.1.ran.saturating_sub(from.1.ran), to.1.waited.saturating_sub(from.1.waited))
}

fn permille(part: Duration, whole: Duration) -> u128 {
    part.as_nanos().saturating_mul(1000) / whole.as_nanos().max(1)
}

/// The packets that a pod's engine should read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Queue {
    waiting: u32,
    /// What the engine had read when it was first asked.
    read: Option<u64>,
}

impl Queue {
    /// Whether the engine has to be asked how many packets it has read, to be judged.
    pub fn look(&mut self, packets_wait: bool) -> bool {
        if !packets_wait {
            *self = Self::default();
            return false;
        }
        self.waiting += 1;
        self.waiting >= LOOKS
    }

    /// After [`look`](Self::look) has said so: whether nobody reads.
    pub fn judge(&mut self, read: u64) -> bool {
        self.waiting = 0;
        let before = self.read.replace(read);
        before == Some(read)
    }
}

/// Repairs of one link that come as soon as they are wanted.
const REPAIRS_AT_ONCE: u32 = 8;
/// First pause between repairs after those; doubles to [`MAX_REPAIR_PAUSE`].
const REPAIR_PAUSE: Duration = Duration::from_secs(4);
const MAX_REPAIR_PAUSE: Duration = Duration::from_secs(60);

/// When one link may be repaired again.
#[derive(Debug, Clone, Copy, Default)]
pub struct Repairs {
    last: Option<Instant>,
    count: u32,
}

impl Repairs {
    /// Whether it may be repaired now, which then counts. A link that stayed whole for twice the longest pause
    /// begins anew.
    pub fn take(&mut self, now: Instant) -> bool {
        let since = self.last.map(|at| now.saturating_duration_since(at));
        if since.is_none_or(|since| since >= 2 * MAX_REPAIR_PAUSE) {
            self.count = 0;
        }
        let doublings = self.count.checked_sub(REPAIRS_AT_ONCE);
        let pause =
            doublings.map_or(Duration::ZERO, |n| REPAIR_PAUSE * (1 << n.min(4))).min(MAX_REPAIR_PAUSE);
        if since.is_some_and(|since| since < pause) {
            return false;
        }
        self.count = self.count.saturating_add(1);
        self.last = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// An engine that every second could run for `ran + waited` ms and works on `inputs`, `handshakes`.
    fn after(seconds: u32, ran: u64, waited: u64, inputs: u64, handshakes: u64) -> Option<u32> {
        let start = Instant::now();
        let mut processor = Processor::default();
        for second in (0..=seconds).step_by(10) {
            let n = u64::from(second);
            let (ran, waited) = (Duration::from_millis(ran * n), Duration::from_millis(waited * n));
            let used = Used { ran, waited, times: n };
            let work = Work { inputs: inputs * n, handshakes: handshakes * n };
            if processor.look(start + second * SECOND, used) && processor.judge(work).is_some() {
                return Some(second);
            }
        }
        None
    }

    #[test]
    fn runaways_and_engines_at_work() {
        for (what, ran, waited, inputs, handshakes, killed) in [
            ("spins, alone on a processor", 1000, 0, 2, 0, true),
            ("spins, seven others want the processor too", 130, 870, 2, 0, true),
            ("spins and a heartbeat and keepalives go on", 1000, 0, 50, 0, true),
            ("spins under an ordinary pod's traffic", 1000, 0, 5000, 0, true),
            ("a flood of garbage", 1000, 0, 300_000, 0, false),
            ("a full speed run", 990, 0, 90_000, 0, false),
            ("a full speed run without optimisation", 900, 50, 12_000, 0, false),
            ("a full speed run on a busy node", 300, 690, 4000, 0, false),
            ("handshakes with a whole tailnet", 1000, 0, 600, 600, false),
            ("idle on a busy node: every wake-up waits", 2, 990, 1, 0, false),
            ("half busy without a reason", 500, 0, 0, 0, false),
            ("idle", 1, 0, 1, 0, false),
        ] {
            let at = after(600, ran, waited, inputs, handshakes);
            assert_eq!(at, killed.then_some(40), "{what}");
        }
    }

    #[test]
    fn the_hot_time_has_to_be_of_one_piece() {
        let start = Instant::now();
        let mut processor = Processor::default();
        let mut ran = Duration::ZERO;
        for look in 0..60 {
            // Two hot looks, then a cool one: a map of thousands of peers that comes again and again.
            ran += if look % 3 == 2 { SECOND } else { 10 * SECOND };
            let used = Used { ran, ..Used::default() };
            if processor.look(start + look * 10 * SECOND, used) {
                assert_eq!(processor.judge(Work::default()), None, "look {look}");
            }
        }
    }

    #[test]
    fn what_the_kernel_says_is_read() {
        let (ran, waited) = (Duration::from_nanos(977_682), Duration::from_nanos(5_726_494));
        let used = Used { ran, waited, times: 2 };
        assert_eq!(Used::of_schedstat("977682 5726494 2\n"), Some(used));
        assert_eq!(Used::of_schedstat("0 0 0"), Some(Used::default()));
        for bad in ["", "1", "x 1 1"] {
            assert_eq!(Used::of_schedstat(bad), None, "{bad}");
        }
        let stat = "43 (a) b) S 1 43 43 0 -1 4194560 10 0 0 0 150 50 0 0 20 0 1 0 987654 1 2 3\n";
        assert_eq!(Used::of_stat(stat), Some(Used { ran: 2 * SECOND, ..Used::default() }));
        assert_eq!(Used::of_stat("43 (a) S 1"), None);
        let own = Used::read(std::process::id()).unwrap();
        let spin = Instant::now();
        while spin.elapsed() < Duration::from_millis(30) {}
        assert!(Used::read(std::process::id()).unwrap().ran >= own.ran);
        assert!(Used::read(u32::MAX).is_err());
    }

    #[test]
    fn who_did_not_run_is_as_it_was() {
        let read = |text| Used::of_schedstat(text).unwrap();
        let before = read("977682 5726494 2");
        for (after, still) in [
            ("977682 5726494 2", true),
            ("10977682 5726494 2", true),
            ("10977683 5726494 2", false),
            ("977682 5726494 3", false),
        ] {
            assert_eq!(read(after).is_still(&before), still, "{after}");
        }
        let unknown = read("0 0 0");
        assert!(!unknown.is_still(&unknown), "this kernel does not count");
        assert!(!Used { ran: SECOND, ..unknown }.is_still(&Used { ran: SECOND, ..unknown }));
    }

    #[test]
    fn a_queue_that_nobody_reads() {
        let looks = |seen: &[(bool, u64)]| {
            let mut queue = Queue::default();
            seen.iter().position(|(wait, read)| queue.look(*wait) && queue.judge(*read))
        };
        assert_eq!(looks(&[(true, 7); 20]), Some(5), "two times three looks");
        assert_eq!(looks(&[(false, 7); 20]), None);
        let flood: Vec<_> = (0..100).map(|n| (true, n)).collect();
        assert_eq!(looks(&flood), None, "there is always something, and it is read");
        let now_and_then: Vec<_> = (0..100).map(|n| (n % 5 != 4, 7)).collect();
        assert_eq!(looks(&now_and_then), None, "it was empty in between");
        let stops: Vec<_> = (0..20).map(|n| (true, n.min(8))).collect();
        assert_eq!(looks(&stops), Some(11));
    }

    #[test]
    fn a_link_that_does_not_stay_whole_is_repaired_ever_less_often() {
        let start = Instant::now();
        let mut repairs = Repairs::default();
        let at: Vec<u32> = (0..300).step_by(2).filter(|s| repairs.take(start + *s * SECOND)).collect();
        assert_eq!(at, [0, 2, 4, 6, 8, 10, 12, 14, 18, 26, 42, 74, 134, 194, 254]);
        assert!(!repairs.take(start + 300 * SECOND));
        assert!(repairs.take(start + 400 * SECOND));
        assert!(repairs.take(start + 402 * SECOND), "it had been whole for long");
    }
}
