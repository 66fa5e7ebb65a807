//! One engine process, from its socket to its end.
//!
//! The supervisor binds and listens on the engine's socket before the process exists, so its connect
//! succeeds at once and the first calls wait in the kernel until the engine accepts: no polling, no
//! retry, nothing between a death and the next `start` but fork and exec.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, sockopt};
use podtether_proto::calls::{self, KnownEngine};
use podtether_proto::engine::{EngineStatus, Hello, StartRequest, WATCH_MARGIN, WATCH_MAX};
use podtether_proto::exit::ExitReason;
use podtether_proto::{PROTO_VERSION, transport};
use tarpc::client::RpcError;
use tarpc::context;
use tarpc::context::Context;
use tokio::process::Child;
use tokio::sync::mpsc;
use tracing::Instrument as _;

use crate::distrust::{self, Pace};
use crate::guard::Used;
use crate::output;
use crate::restart::{Cause, Ended};
use crate::spawn::Process;

/// How often an engine that has run meanwhile has to answer. One that has not run since it answered is as it was
/// then and is left asleep: to wake a hundred of them for nothing would cost more than all else they do at rest.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often one has to answer that seems asleep.
pub const SLOW_HEARTBEAT: Duration = Duration::from_secs(30);
/// From an answer until the engine is asleep again: that its answer was read wakes it once more.
const BACK_TO_SLEEP: Duration = Duration::from_millis(50);
/// Heartbeats of all engines share this many moments of a second, so that the supervisor wakes no more often for
/// a hundred of them, nor all of them at once.
const BEATS_APART: u32 = 10;
/// An engine that does not answer this long is killed.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The same for a heartbeat, less what passes before the next one: an engine that hangs right after it
/// answered is still dead well within six seconds.
const BEAT_ANSWERED_WITHIN: Duration = Duration::from_millis(4500);
/// The first answer may take longer: a node that boots starts all its engines at once.
const FIRST_ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// Statuses that are taken from one engine: the table that they go to is everybody's.
const STATUS_EVERY: Duration = Duration::from_millis(100);
const STATUS_BURST: u32 = 50;
/// Room for what a successor passes back to the engine before it.
const PASSED_BYTES: usize = 4 << 20;
/// Largest exit reason that is read.
const MAX_REASON_BYTES: u64 = 4096;

/// What is learnt about an engine, in order. `Ended` is the last.
#[derive(Debug)]
pub enum Event {
    /// It has taken its start request; calls may go to the client from now on.
    Started {
        /// Its first answer.
        hello: Hello,
        /// To it.
        client: KnownEngine,
        /// From the fork to that answer: the program was executed and confined itself.
        ready: Duration,
    },
    /// Its state.
    Status(Box<EngineStatus>),
    /// The process is gone.
    Ended {
        /// How.
        ended: Ended,
        /// Time from its first answer to its end; `None` when it never answered.
        answered: Option<Duration>,
        /// One sentence.
        reason: String,
    },
}

/// Which of an attachment's two sets of files an engine uses: while one replaces another, there are two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Place {
    /// That of an engine that replaces none.
    #[default]
    First,
    /// The other.
    Second,
}

impl Place {
    /// Both.
    pub const ALL: [Self; 2] = [Self::First, Self::Second];

    /// The one that it is not.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// Files of one engine below `run_dir/engines`.
#[derive(Debug, Clone)]
pub struct Home {
    dir: PathBuf,
    place: Place,
}

impl Home {
    /// Makes the directory.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn make(run_dir: &Path, id: &str) -> io::Result<Home> {
        let dir = run_dir.join("engines").join(id);
        crate::record::private_dir(&dir).map_err(|e| e.source)?;
        Ok(Home { dir, place: Place::First })
    }

    /// The files of a directory that may belong to nobody.
    #[must_use]
    pub fn of(dir: &Path) -> Home {
        Home { dir: dir.to_owned(), place: Place::First }
    }

    /// The same directory, for an engine at `place`.
    #[must_use]
    pub fn at(mut self, place: Place) -> Home {
        self.place = place;
        self
    }

    /// Which set of files.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place
    }

    fn file(&self, name: &str, extension: &str) -> PathBuf {
        let number = match self.place {
            Place::First => "",
            Place::Second => "2",
        };
        self.dir.join(format!("{name}{number}{extension}"))
    }

    /// Removes everything in it.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn remove(run_dir: &Path, id: &str) -> io::Result<()> {
        match std::fs::remove_dir_all(run_dir.join("engines").join(id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// A fresh listening socket; an earlier engine's is gone with its path.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn listen(&self) -> io::Result<OwnedFd> {
        let path = self.socket();
        removed(&path)?;
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener.into())
    }

    /// A fresh socket at which the engine's successor will be announced, see
    /// [`HEIR`](podtether_proto::fds::HEIR).
    ///
    /// # Errors
    /// The file system refuses.
    pub fn await_heir(&self) -> io::Result<OwnedFd> {
        let path = self.heir();
        removed(&path)?;
        let socket = seqpacket(SockFlag::SOCK_CLOEXEC)?;
        socket::bind(socket.as_raw_fd(), &UnixAddr::new(&path)?)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        socket::listen(&socket, Backlog::new(1)?)?;
        Ok(socket)
    }

    /// Announces a successor to the engine here; the result is for the successor.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn announce_heir(&self) -> io::Result<OwnedFd> {
        // Nobody waits: it listens, or is of another build.
        let socket = seqpacket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
        // All that a flood of packets leaves in the kernel's queue at the takeover fits.
        if let Err(e) = socket::setsockopt(&socket, sockopt::SndBufForce, &PASSED_BYTES) {
            tracing::debug!("the queue for a handover stays small: {e}");
        }
        socket::connect(socket.as_raw_fd(), &UnixAddr::new(&self.heir())?)?;
        Ok(socket)
    }

    fn heir(&self) -> PathBuf {
        self.file("heir", ".sock")
    }

    /// Where the process leaves its [trace](crate::trace).
    #[must_use]
    pub fn trace(&self) -> PathBuf {
        self.file("process", "")
    }

    /// The warm snapshot, kept from one engine to the next.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn snapshot(&self) -> io::Result<OwnedFd> {
        open(&self.dir.join("snapshot"), true)
    }

    /// The file for the exit reason, emptied.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn reason(&self) -> io::Result<OwnedFd> {
        let file = std::fs::File::from(open(&self.file("reason", ""), false)?);
        file.set_len(0)?;
        Ok(file.into())
    }

    /// Notes that the pod's questions for names are led to the engine `pid`, for a later supervisor.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn note_intercepting(&self, pid: u32) -> io::Result<()> {
        std::fs::write(self.dir.join("intercepting"), pid.to_string())
    }

    /// Whether that was noted of `pid`.
    #[must_use]
    pub fn is_intercepting(&self, pid: u32) -> bool {
        std::fs::read_to_string(self.dir.join("intercepting")).is_ok_and(|text| text == pid.to_string())
    }

    /// Forgets what the engine had learnt: its identity is another one now.
    pub fn drop_snapshot(&self) {
        let _ = std::fs::remove_file(self.dir.join("snapshot"));
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Path of the socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.file("engine", ".sock")
    }

    pub(crate) fn read_reason(&self) -> Option<ExitReason> {
        use std::io::Read;
        let mut text = String::new();
        let file = std::fs::File::open(self.file("reason", "")).ok()?;
        file.take(MAX_REASON_BYTES).read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }
}

fn open(path: &Path, read: bool) -> io::Result<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(read)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    Ok(file.into())
}

fn seqpacket(flags: SockFlag) -> io::Result<OwnedFd> {
    Ok(socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

fn removed(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Where events go: into the queue of whoever owns the engine, wrapped as its kind of message.
pub struct Reports<M> {
    /// The queue.
    pub to: mpsc::Sender<M>,
    /// Makes a message of an event.
    pub wrap: Box<dyn Fn(Event) -> M + Send + Sync>,
}

impl<M> Reports<M> {
    async fn send(&self, event: Event) {
        // Nobody listens when the supervisor is ending.
        let _ = self.to.send((self.wrap)(event)).await;
    }
}

/// Lives as long as an engine that was just born: gives it its identity, watches it, and reports.
pub async fn attend<M>(
    process: Arc<Process>,
    child: Child,
    home: Home,
    start: Box<StartRequest>,
    reports: Reports<M>,
) {
    tokio::spawn(output::relay(child, start.pod.clone(), Arc::clone(&process)).in_current_span());
    let mut first_answer = None;
    let verdict = {
        let session = session(&process, &home, start, &mut first_answer, &reports);
        tokio::select! {
            biased;
            ended = process.ended() => Verdict::Died(ended),
            verdict = session => verdict,
        }
    };
    conclude(&process, &home, verdict, first_answer, &reports).await;
}

/// As [`attend`], for an engine that an earlier supervisor had started at `since`.
pub async fn attend_adopted<M>(
    process: Arc<Process>,
    client: KnownEngine,
    home: Home,
    since: Instant,
    reports: Reports<M>,
) {
    let verdict = tokio::select! {
        biased;
        ended = process.ended() => Verdict::Died(ended),
        verdict = follow(&process, &client, &reports) => verdict,
    };
    conclude(&process, &home, verdict, Some(since), &reports).await;
}

/// Sees that the process is gone, and reports how it went.
async fn conclude<M>(
    process: &Process,
    home: &Home,
    verdict: Verdict,
    first_answer: Option<Instant>,
    reports: &Reports<M>,
) {
    let answered = first_answer.map(|at: Instant| at.elapsed());
    let (mut ended, mut reason) = match verdict {
        Verdict::Died(ended) => (ended, String::new()),
        // The connection goes a moment before the process does: let it say itself how it ended.
        Verdict::Lost(why) => match tokio::time::timeout(Duration::from_millis(200), process.ended()).await {
            Ok(ended) => (ended, String::new()),
            Err(_) => (kill(process, Cause::Disconnected).await, why),
        },
        Verdict::Silent(call) => {
            let doing = doing(process.pid());
            (
                kill(process, Cause::Silent).await,
                format!("the engine did not answer {call} in time ({doing}) and was killed"),
            )
        }
        Verdict::Refused(why) => (kill(process, Cause::Refused).await, why),
    };
    if let Some(told) = home.read_reason() {
        // A process that wrote its reason and was killed on its way out did exit by choice.
        if matches!(ended, Ended::Crash | Ended::Killed(_)) && reason.is_empty() {
            ended = Ended::Exit(told.exit);
        }
        if reason.is_empty() {
            reason = told.reason;
        }
    }
    if reason.is_empty() {
        reason = match &ended {
            Ended::Exit(exit) => format!("the engine exited ({exit:?})"),
            Ended::Crash => process.crash(),
            Ended::Killed(cause) => killed_because(*cause).into(),
            Ended::ForbiddenCall => "the engine made a forbidden system call and was killed: it may have been broken \
                                     into, or calls.toml lacks one; the kernel's log names the call (type=1326)"
                .into(),
            Ended::NotSpawned => "the engine could not be started".into(),
        };
    }
    reports.send(Event::Ended { ended, answered, reason }).await;
}

enum Verdict {
    Died(Ended),
    /// The connection broke.
    Lost(String),
    /// No answer in time to this call.
    Silent(String),
    /// It does not take its start request.
    Refused(String),
}

async fn kill(process: &Process, cause: Cause) -> Ended {
    process.kill(cause);
    process.ended().await
}

/// What the kernel says a process is at that does not answer: what to look for differs.
fn doing(pid: u32) -> &'static str {
    match state(pid) {
        Some('R') => "it was running",
        Some('S') => "it was asleep",
        Some('D') => "it was in the kernel",
        Some('T' | 't') => "it was stopped",
        _ => "it was ending",
    }
}

/// One sentence, where nothing more is known.
fn killed_because(cause: Cause) -> &'static str {
    match cause {
        Cause::Silent => "the engine did not answer and was killed",
        Cause::Disconnected => "the connection to the engine broke and it was killed",
        Cause::Refused => "the engine did not take its start request and was killed",
        Cause::Runaway => "the engine used a processor up without work that would explain it and was killed",
        Cause::Unread => "the engine left its pod's packets in the TUN's queue and was killed",
        Cause::LinkRemade => "the engine was killed because its link has to be made anew",
        Cause::Unbelieved => "the engine of an earlier supervisor could not be believed and was killed",
        Cause::NoRecord => "the engine was killed because no record names it",
        Cause::NoIdentity => "the engine was killed because its pod's identity is lost",
        Cause::Removed => "the engine was ended because its pod leaves",
        Cause::Unlimited => "the engine was killed because it could not be put where its limits are",
        Cause::Replaced => "the engine was killed because another one was asked for and it did not end",
    }
}

async fn session<M>(
    process: &Process,
    home: &Home,
    start: Box<StartRequest>,
    first_answer: &mut Option<Instant>,
    reports: &Reports<M>,
) -> Verdict {
    let transport = match transport::connect(home.socket()).await {
        Ok(transport) => transport,
        Err(e) => return Verdict::Lost(format!("cannot connect to the engine's socket: {e}")),
    };
    let (client, hello) = match calls::greet(transport, within(FIRST_ANSWER_WITHIN)).await {
        Ok(there) => there,
        Err(e) => return broken("hello", &e),
    };
    let ready = process.age();
    *first_answer = Some(Instant::now());
    if !PROTO_VERSION.accepts(hello.version) {
        return Verdict::Refused(format!(
            "the engine speaks version {}.{} and this supervisor {}.{}: update both",
            hello.version.major, hello.version.minor, PROTO_VERSION.major, PROTO_VERSION.minor
        ));
    }
    match client.start(within(FIRST_ANSWER_WITHIN), start).await {
        Ok(Ok(())) => {}
        Ok(Err(why)) => return Verdict::Refused(why),
        Err(e) => return broken("start", &e),
    }
    reports.send(Event::Started { hello, client: client.clone(), ready }).await;
    follow(process, &client, reports).await
}

async fn follow<M>(process: &Process, client: &KnownEngine, reports: &Reports<M>) -> Verdict {
    tokio::select! {
        verdict = watch(client, reports) => verdict,
        verdict = heartbeat(process, client) => verdict,
    }
}

async fn watch<M>(client: &KnownEngine, reports: &Reports<M>) -> Verdict {
    let mut seq = 0;
    let mut pace = Pace::new(STATUS_EVERY, STATUS_BURST);
    loop {
        tokio::time::sleep(pace.wait(Instant::now())).await;
        match client.watch(within(WATCH_MAX + WATCH_MARGIN), seq).await {
            Ok(status) => {
                if status.seq != seq || seq == 0 {
                    seq = status.seq;
                    reports.send(Event::Status(Box::new(distrust::status(status)))).await;
                }
            }
            Err(e) => return broken("watch", &e),
        }
    }
}

async fn heartbeat(process: &Process, client: &KnownEngine) -> Verdict {
    let phase = HEARTBEAT / BEATS_APART * (process.pid() % BEATS_APART);
    let mut answered: Option<(Instant, Used)> = None;
    loop {
        tokio::time::sleep_until(next_beat(Instant::now(), phase).into()).await;
        let used = process.used().ok();
        if let Some(((at, then), now)) = answered.zip(used)
            && at.elapsed() < SLOW_HEARTBEAT
            && now.is_still(&then)
        {
            answered = Some((at, now));
            continue;
        }
        // A call's deadline wakes the engine when it comes, also long after the answer.
        match tokio::time::timeout(BEAT_ANSWERED_WITHIN, client.hello(within(WATCH_MAX))).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => return broken("hello", &e),
            Err(_) => return Verdict::Silent("hello".to_owned()),
        }
        tokio::time::sleep(BACK_TO_SLEEP).await;
        let used = process.used().ok();
        // Who was stopped since it answered, or is stuck in the kernel, has run for the last time as well.
        answered = used.filter(|_| state(process.pid()) == Some('S')).map(|used| (Instant::now(), used));
    }
}

/// The kernel's letter for what a process is at.
fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The next moment of a whole second and `phase` by a clock that all engines share.
fn next_beat(now: Instant, phase: Duration) -> Instant {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    let since = now.saturating_duration_since(*BEGAN.get_or_init(|| now));
    let into = (since + HEARTBEAT).saturating_sub(phase).as_nanos() % HEARTBEAT.as_nanos();
    now + HEARTBEAT - Duration::from_nanos(u64::try_from(into).unwrap_or(0))
}

fn broken(call: &str, e: &RpcError) -> Verdict {
    match e {
        RpcError::DeadlineExceeded => Verdict::Silent(call.to_owned()),
        RpcError::Shutdown | RpcError::Send(_) | RpcError::Channel(_) | RpcError::Server(_) => {
            Verdict::Lost(format!("the connection to the engine broke ({call}: {e})"))
        }
    }
}

/// A call's deadline.
#[must_use]
pub fn within(time: Duration) -> Context {
    let mut context = context::current();
    context.deadline = Instant::now() + time;
    context
}
