//! What happens after an engine ends, and what its end is called: pure functions of how it ended and how it
//! had lived.
//!
//! An engine that had answered for [`HEALTHY_AFTER`] restarts at once, however often that happens:
//! its pod loses milliseconds. Deaths before that back off, 100 ms doubling to 30 s with jitter, and
//! a life of [`FORGET_AFTER`] forgets them. A pod is never given up.

use std::time::Duration;

use podtether_proto::exit::EngineExit;

/// An engine that answered this long was healthy.
pub const HEALTHY_AFTER: Duration = Duration::from_secs(1);
/// An engine that answered this long wipes the slate.
pub const FORGET_AFTER: Duration = Duration::from_secs(60);
/// First back-off.
pub const FIRST_DELAY: Duration = Duration::from_millis(100);
/// Longest back-off, before jitter.
pub const MAX_DELAY: Duration = Duration::from_secs(30);
/// New keys in a row before each further one backs off like a death: a credential that mints keys
/// which control refuses must not drain the API's rate limit.
pub const KEYS_AT_ONCE: u32 = 2;

/// Why this supervisor kills an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It did not answer in time: it hangs, or its loop stands still.
    Silent,
    /// Its connection broke, and it lived on: somebody else called it, or what it says makes no sense.
    Disconnected,
    /// It does not take its start request, or speaks another version.
    Refused,
    /// It used a processor up without work that would explain it.
    Runaway,
    /// It left its pod's packets in the TUN's queue.
    Unread,
    /// Its link has to be made anew, and it holds descriptors of the old one.
    LinkRemade,
    /// It could not be put where its limits are, and `require_sandbox` is set.
    Unlimited,
    /// A living engine of an earlier supervisor, not everything about which agreed.
    Unbelieved,
    /// No record names it.
    NoRecord,
    /// Its pod's identity is lost.
    NoIdentity,
    /// Its pod leaves.
    Removed,
    /// Somebody asked for another one, and it did not end by itself in time.
    Replaced,
}

impl Cause {
    /// Every one, for tables.
    pub const ALL: [Self; 12] = [
        Self::Silent,
        Self::Disconnected,
        Self::Refused,
        Self::Runaway,
        Self::Unread,
        Self::LinkRemade,
        Self::Unlimited,
        Self::Unbelieved,
        Self::NoRecord,
        Self::NoIdentity,
        Self::Removed,
        Self::Replaced,
    ];

    /// For metrics and status.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Disconnected => "disconnected",
            Self::Refused => "refused",
            Self::Runaway => "runaway",
            Self::Unread => "unread",
            Self::LinkRemade => "link_remade",
            Self::Unlimited => "unlimited",
            Self::Unbelieved => "unbelieved",
            Self::NoRecord => "no_record",
            Self::NoIdentity => "no_identity",
            Self::Removed => "removed",
            Self::Replaced => "replaced",
        }
    }

    /// Whether an operator or the runtime wanted it.
    #[must_use]
    pub fn is_wish(self) -> bool {
        matches!(self, Self::Removed | Self::Replaced)
    }
}

/// How an engine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// By its own choice.
    Exit(EngineExit),
    /// Signal, panic or unknown code.
    Crash,
    /// Killed by this supervisor.
    Killed(Cause),
    /// Killed by the kernel for a system call that its sandbox forbids.
    ForbiddenCall,
    /// It could not be spawned at all.
    NotSpawned,
}

/// One word for an end, the label `kind` of `podtether_engine_exits_total`. `memory`: the kernel had killed
/// in the engine's memory cgroup since it began.
#[must_use]
pub fn kind(ended: &Ended, memory: bool) -> &'static str {
    match ended {
        Ended::Crash if memory => "memory",
        Ended::Crash => "crash",
        Ended::Killed(cause) => cause.name(),
        Ended::ForbiddenCall => "forbidden_call",
        Ended::NotSpawned => "not_spawned",
        Ended::Exit(EngineExit::Stopped) => "stopped",
        Ended::Exit(EngineExit::BadConfig) => "bad_config",
        Ended::Exit(EngineExit::KeyRejected) => "key_rejected",
        Ended::Exit(EngineExit::NodeKeyExpired) => "node_key_expired",
        Ended::Exit(EngineExit::NodeUnknown) => "node_unknown",
        Ended::Exit(EngineExit::Sandbox) => "sandbox",
        Ended::Exit(EngineExit::LinkLost) => "link_lost",
        Ended::Exit(EngineExit::Orphaned) => "orphaned",
        Ended::Exit(EngineExit::NewPorts) => "new_ports",
    }
}

/// Whether an end was wanted by whoever runs the node, and so is no warning. `asked`: the supervisor had told
/// the engine to stop.
#[must_use]
pub fn is_wish(ended: &Ended, asked: bool) -> bool {
    match ended {
        Ended::Killed(cause) => cause.is_wish(),
        Ended::Exit(EngineExit::Stopped) => true,
        Ended::Exit(EngineExit::NodeKeyExpired | EngineExit::NodeUnknown) => asked,
        Ended::Exit(_) | Ended::Crash | Ended::ForbiddenCall | Ended::NotSpawned => false,
    }
}

/// How a process ended whose wait status is `status`, `None` when the kernel does not tell; `killed` is why
/// this supervisor killed it, if it did.
#[must_use]
pub fn of_status(status: Option<i32>, killed: Option<Cause>) -> Ended {
    let by_us = killed.map_or(Ended::Crash, Ended::Killed);
    let Some(status) = status else { return by_us };
    if libc::WIFEXITED(status) {
        return EngineExit::from_code(libc::WEXITSTATUS(status)).map_or(Ended::Crash, Ended::Exit);
    }
    match libc::WTERMSIG(status) {
        // What seccomp kills a process with.
        libc::SIGSYS => Ended::ForbiddenCall,
        libc::SIGKILL => by_us,
        _ => Ended::Crash,
    }
}

/// A sentence on a crash with this wait status.
#[must_use]
pub fn crash(status: Option<i32>) -> String {
    let Some(status) = status else { return "the engine crashed".to_owned() };
    if libc::WIFEXITED(status) {
        return format!("the engine crashed (exit code {})", libc::WEXITSTATUS(status));
    }
    let number = libc::WTERMSIG(status);
    match nix::sys::signal::Signal::try_from(number) {
        Ok(signal) => format!("the engine crashed ({signal})"),
        Err(_) => format!("the engine crashed (signal {number})"),
    }
}

/// What the past says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    /// Deaths in a row before [`HEALTHY_AFTER`].
    pub early_deaths: u32,
    /// New keys in a row that did not lead to a healthy engine.
    pub keys: u32,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The same again.
    Restart,
    /// With a new auth key.
    NewKey,
    /// With a new node key that names the old one, and a new auth key.
    RotateNodeKey,
    /// As another device: with a new node key that names none, and a new auth key.
    NewNodeKey,
    /// Make the link again first.
    RebuildLink,
    /// Nothing until a person or the runtime acts; reported.
    Stop,
}

/// Decides what follows the end of an engine that had answered for `answered`.
///
/// `asked` is true when the supervisor had told it to stop; `random` gives the jitter.
pub fn decide(
    ended: &Ended,
    asked: bool,
    answered: Option<Duration>,
    history: &mut History,
    random: u64,
) -> (Next, Duration) {
    let lived = answered.unwrap_or_default();
    if lived >= FORGET_AFTER {
        *history = History::default();
    }
    let healthy = lived >= HEALTHY_AFTER;
    if healthy {
        history.early_deaths = 0;
    } else {
        history.early_deaths = history.early_deaths.saturating_add(1);
    }
    let after_death =
        |deaths: u32| if deaths == 0 { Duration::ZERO } else { jittered(backoff(deaths - 1), random) };
    let delay = after_death(history.early_deaths);
    match ended {
        Ended::Exit(EngineExit::Stopped) if asked => (Next::Stop, Duration::ZERO),
        Ended::Exit(EngineExit::BadConfig) | Ended::Killed(Cause::Refused) => (Next::Stop, Duration::ZERO),
        Ended::Exit(EngineExit::KeyRejected) => {
            let delay = key_delay(history, after_death);
            (Next::NewKey, delay)
        }
        Ended::Exit(EngineExit::NodeUnknown) => {
            let delay = key_delay(history, after_death);
            (Next::NewNodeKey, delay)
        }
        Ended::Exit(EngineExit::NodeKeyExpired) => {
            let delay = key_delay(history, after_death);
            (Next::RotateNodeKey, delay)
        }
        Ended::Exit(EngineExit::LinkLost) => (Next::RebuildLink, delay),
        // A step of the sandbox that failed once fails again: never at once.
        Ended::Exit(EngineExit::Sandbox) => (Next::Restart, delay.max(jittered(FIRST_DELAY, random))),
        Ended::Exit(EngineExit::Stopped | EngineExit::Orphaned | EngineExit::NewPorts)
        | Ended::Crash
        | Ended::Killed(_)
        | Ended::ForbiddenCall
        | Ended::NotSpawned => (Next::Restart, delay),
    }
}

/// An engine that handed its pod over was well: the deaths before it do not count against its successor.
pub fn handed_over(history: &mut History) {
    history.early_deaths = 0;
}

/// An engine that reached a netmap used its key well.
pub fn key_worked(history: &mut History) {
    history.keys = 0;
}

fn key_delay(history: &mut History, after_death: impl Fn(u32) -> Duration) -> Duration {
    history.keys = history.keys.saturating_add(1);
    // The exit was control's answer, not a defect of the process: only repetition is held back.
    history.early_deaths = 0;
    after_death(history.keys.saturating_sub(KEYS_AT_ONCE))
}

fn backoff(step: u32) -> Duration {
    FIRST_DELAY.saturating_mul(1_u32.checked_shl(step).unwrap_or(u32::MAX)).min(MAX_DELAY)
}

/// `delay` × 0.5 to 1.5.
pub fn jittered(delay: Duration, random: u64) -> Duration {
    let thousandths = u32::try_from(random % 1001).unwrap_or(500);
    delay / 2 + delay * thousandths / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    const MID: u64 = 500; // jitter factor 1.0

    fn after(ended: &Ended, answered_ms: u64, history: &mut History) -> (Next, u128) {
        let (next, delay) = decide(ended, false, Some(Duration::from_millis(answered_ms)), history, MID);
        (next, delay.as_millis())
    }

    #[test]
    fn exits_decide() {
        use EngineExit::*;
        let table = [
            // ended, asked, answered ms, next, delay ms
            (Ended::Crash, false, 1000, Next::Restart, 0),
            (Ended::ForbiddenCall, false, 1000, Next::Restart, 0),
            (Ended::ForbiddenCall, false, 999, Next::Restart, 100),
            (Ended::Crash, false, 999, Next::Restart, 100),
            (Ended::Killed(Cause::Silent), false, 999, Next::Restart, 100),
            (Ended::Killed(Cause::Silent), false, 60_000, Next::Restart, 0),
            (Ended::Killed(Cause::Runaway), false, 60_000, Next::Restart, 0),
            (Ended::Killed(Cause::Unread), false, 60_000, Next::Restart, 0),
            (Ended::Killed(Cause::LinkRemade), true, 60_000, Next::Restart, 0),
            (Ended::Killed(Cause::Refused), false, 5000, Next::Stop, 0),
            (Ended::Crash, false, 0, Next::Restart, 100),
            (Ended::NotSpawned, false, 0, Next::Restart, 100),
            (Ended::Exit(Stopped), true, 5000, Next::Stop, 0),
            (Ended::Exit(Stopped), false, 5000, Next::Restart, 0),
            (Ended::Exit(BadConfig), false, 0, Next::Stop, 0),
            (Ended::Exit(KeyRejected), false, 0, Next::NewKey, 0),
            (Ended::Exit(NodeUnknown), false, 100_000, Next::NewNodeKey, 0),
            (Ended::Exit(NodeKeyExpired), false, 100_000, Next::RotateNodeKey, 0),
            (Ended::Exit(Sandbox), false, 0, Next::Restart, 100),
            (Ended::Exit(Sandbox), false, 5000, Next::Restart, 100),
            (Ended::Exit(LinkLost), false, 5000, Next::RebuildLink, 0),
            (Ended::Exit(Orphaned), false, 5000, Next::Restart, 0),
            (Ended::Exit(NewPorts), false, 5000, Next::Restart, 0),
        ];
        for (ended, asked, answered, next, delay) in table {
            let got =
                decide(&ended, asked, Some(Duration::from_millis(answered)), &mut History::default(), MID);
            assert_eq!(got, (next, Duration::from_millis(delay)), "{ended:?} asked={asked} {answered} ms");
        }
    }

    #[test]
    fn every_end_has_a_name_of_its_own_and_wishes_are_told_apart() {
        use EngineExit::*;
        let mut seen = std::collections::HashSet::new();
        let own = EngineExit::ALL.map(Ended::Exit).into_iter().chain(Cause::ALL.map(Ended::Killed));
        for ended in own.chain([Ended::Crash, Ended::ForbiddenCall, Ended::NotSpawned]) {
            assert!(seen.insert(kind(&ended, false)), "{ended:?}: {}", kind(&ended, false));
        }
        assert!(seen.insert(kind(&Ended::Crash, true)));
        assert_eq!(kind(&Ended::Crash, true), "memory");
        // The kernel kills in a cgroup of 32 MiB what this supervisor has killed already: the first reason counts.
        assert_eq!(kind(&Ended::Killed(Cause::Silent), true), "silent");
        for (ended, asked, wish) in [
            (Ended::Killed(Cause::Removed), true, true),
            (Ended::Killed(Cause::Replaced), true, true),
            (Ended::Exit(Stopped), true, true),
            (Ended::Exit(Stopped), false, true),
            (Ended::Exit(NodeKeyExpired), true, true),
            (Ended::Exit(NodeKeyExpired), false, false),
            (Ended::Killed(Cause::Silent), false, false),
            (Ended::Killed(Cause::LinkRemade), true, false),
            (Ended::Killed(Cause::Unbelieved), false, false),
            (Ended::Killed(Cause::NoRecord), false, false),
            (Ended::Crash, true, false),
            (Ended::ForbiddenCall, false, false),
        ] {
            assert_eq!(is_wish(&ended, asked), wish, "{ended:?} asked={asked}");
        }
    }

    #[test]
    fn a_wait_status_tells_how_it_was() {
        let exited = |code: i32| Some(code << 8);
        let killed = |signal: i32| Some(signal);
        let dumped = |signal: i32| Some(signal | 0x80);
        let silent = Some(Cause::Silent);
        for (status, cause, ended) in [
            (exited(0), None, Ended::Exit(EngineExit::Stopped)),
            (exited(71), None, Ended::Exit(EngineExit::LinkLost)),
            (exited(71), silent, Ended::Exit(EngineExit::LinkLost)),
            (exited(101), None, Ended::Crash),
            (exited(101), silent, Ended::Crash),
            (killed(libc::SIGKILL), None, Ended::Crash),
            (killed(libc::SIGKILL), silent, Ended::Killed(Cause::Silent)),
            (killed(libc::SIGSYS), None, Ended::ForbiddenCall),
            (dumped(libc::SIGSYS), silent, Ended::ForbiddenCall),
            (dumped(libc::SIGABRT), silent, Ended::Crash),
            (killed(libc::SIGSEGV), None, Ended::Crash),
            (None, None, Ended::Crash),
            (None, silent, Ended::Killed(Cause::Silent)),
        ] {
            assert_eq!(of_status(status, cause), ended, "{status:?} {cause:?}");
        }
        for (status, says) in [
            (None, "the engine crashed"),
            (exited(101), "the engine crashed (exit code 101)"),
            (killed(libc::SIGKILL), "the engine crashed (SIGKILL)"),
            (dumped(libc::SIGABRT), "the engine crashed (SIGABRT)"),
            (killed(64), "the engine crashed (signal 64)"),
        ] {
            assert_eq!(crash(status), says);
        }
    }

    #[test]
    fn early_deaths_double_to_the_cap_and_a_healthy_life_restarts_at_once() {
        let mut history = History::default();
        let delays: Vec<u128> = (0..12).map(|_| after(&Ended::Crash, 0, &mut history).1).collect();
        assert_eq!(delays[..4], [100, 200, 400, 800]);
        assert_eq!(delays[9..], [30_000, 30_000, 30_000]);
        assert_eq!(after(&Ended::Crash, 1500, &mut history), (Next::Restart, 0));
        assert_eq!(after(&Ended::Crash, 10, &mut history), (Next::Restart, 100));
        assert_eq!(after(&Ended::Crash, 10, &mut history), (Next::Restart, 200));
        handed_over(&mut history);
        assert_eq!(after(&Ended::Crash, 10, &mut history), (Next::Restart, 100), "a successor's first");
    }

    #[test]
    fn many_healthy_crashes_never_back_off() {
        let mut history = History::default();
        for _ in 0..1000 {
            assert_eq!(after(&Ended::Crash, 1000, &mut history), (Next::Restart, 0));
        }
    }

    #[test]
    fn keys_are_limited_until_one_works() {
        let mut history = History::default();
        let rejected = Ended::Exit(EngineExit::KeyRejected);
        let delays: Vec<u128> = (0..5).map(|_| after(&rejected, 0, &mut history).1).collect();
        assert_eq!(delays, [0, 0, 100, 200, 400]);
        key_worked(&mut history);
        assert_eq!(after(&rejected, 0, &mut history), (Next::NewKey, 0));
    }

    #[test]
    fn jitter_stays_within_half_and_one_and_a_half() {
        for random in [0, 1, 500, 999, 1000, 1001, u64::MAX] {
            let delay = jittered(Duration::from_secs(30), random);
            assert!(delay >= Duration::from_secs(15) && delay <= Duration::from_secs(45), "{delay:?}");
        }
    }

    #[test]
    fn the_counter_never_overflows() {
        let mut history = History { early_deaths: u32::MAX, keys: u32::MAX };
        assert_eq!(after(&Ended::Crash, 0, &mut history).1, 30_000);
    }
}
