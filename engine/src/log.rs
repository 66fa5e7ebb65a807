//! JSON log lines on stdout that never block the driver: the pipe is non-blocking, and a line that
//! does not fit is dropped and counted.
//!
//! Lines longer than `PIPE_BUF` may be cut by a nearly full pipe; the rest is kept and goes out
//! before the next line, so that the reader always sees whole lines.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use podtether_core::tailcfg::UnixTime;
use podtether_proto::log::{LogFor, LogLevel, is_join};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata};

static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Log lines that did not fit into the pipe.
pub(crate) fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// boringtun warns of every handshake that is tried again and of every peer that is away.
const DEFAULT_FILTER: &str = "info,boringtun=off,tarpc=error";
/// How the targets of our own lines begin.
const OURS: &str = "podtether_";

/// Of the pod whose engine this is; every line has it.
static JOIN: OnceLock<String> = OnceLock::new();
static KNOB: Knob = Knob::new();

/// What the start request says of logs.
pub(crate) fn begin(join: &str, wish: Option<LogFor>) {
    if is_join(join) {
        // A second start request is refused.
        let _ = JOIN.set(join.to_owned());
    }
    if wish.is_some() {
        set(wish);
    }
}

/// Another level for our own lines for a while, or what the process was started with.
pub(crate) fn set(wish: Option<LogFor>) {
    KNOB.turn(wish, Instant::now());
    tracing::callsite::rebuild_interest_cache();
    match wish {
        Some(LogFor { level, ms }) => {
            tracing::info!(level = level.name(), for_ms = ms, "the log's level is changed")
        }
        None => tracing::info!("the log's level is the default again"),
    }
}

/// A level in place of the filter's for our own targets. While none is wished for it costs nothing: whether a line
/// is wanted is asked once for each place in the code, and again when the knob is turned.
#[derive(Debug)]
struct Knob {
    /// 0 for none, else [`Knob::number`].
    level: AtomicU8,
    until: Mutex<Option<Instant>>,
}

impl Knob {
    const fn new() -> Self {
        Self { level: AtomicU8::new(0), until: Mutex::new(None) }
    }

    fn turn(&self, wish: Option<LogFor>, now: Instant) {
        let until = wish.and_then(|wish| now.checked_add(Duration::from_millis(wish.ms)));
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = until;
        let number = match wish.map(|wish| wish.level) {
            None => 0,
            Some(LogLevel::Error) => 1,
            Some(LogLevel::Warn) => 2,
            Some(LogLevel::Info) => 3,
            Some(LogLevel::Debug) => 4,
            Some(LogLevel::Trace) => 5,
        };
        self.level.store(number, Ordering::Relaxed);
    }

    fn level(&self) -> Option<LevelFilter> {
        Some(match self.level.load(Ordering::Relaxed) {
            0 => return None,
            1 => LevelFilter::ERROR,
            2 => LevelFilter::WARN,
            3 => LevelFilter::INFO,
            4 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        })
    }

    /// Whether its time is over: no timer wakes an engine for that, each line looks.
    fn is_over(&self, now: Instant) -> bool {
        self.until.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| now >= until)
    }
}

/// Installs the subscriber. `PODTETHER_LOG` holds a filter; the default is `info` of our own.
pub(crate) fn init() {
    let filter = std::env::var("PODTETHER_LOG").ok().and_then(|text| Filter::parse(&text));
    let Some(filter) = filter.or_else(|| Filter::parse(DEFAULT_FILTER)) else { return };
    keep_stderr();
    let Ok(out) = Output::stdout() else { return };
    // A second call (tests) keeps the first subscriber.
    let _ = tracing::subscriber::set_global_default(Log { filter, knob: &KNOB, out: Mutex::new(out) });
}

/// What is told: `level` or `target=level`, with commas between; of several that fit the longest target counts.
#[derive(Debug, PartialEq, Eq)]
struct Filter(Vec<(String, LevelFilter)>);

impl Filter {
    /// `None` when a part of it is neither.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (target, level) = part.split_once('=').unwrap_or(("", part));
            parts.push((target.to_owned(), level.parse().ok()?));
        }
        parts.sort_by_key(|(target, _)| std::cmp::Reverse(target.len()));
        Some(Self(parts))
    }

    fn passes(&self, level: Level, target: &str) -> bool {
        let most = self.0.iter().find(|(start, _)| {
            target
                .strip_prefix(start.as_str())
                .is_some_and(|rest| start.is_empty() || rest.is_empty() || rest.starts_with("::"))
        });
        most.is_some_and(|(_, most)| level <= *most)
    }
}

/// Writes events as lines. Spans are not kept: no line of an engine is told apart by one.
struct Log {
    filter: Filter,
    knob: &'static Knob,
    out: Mutex<Output>,
}

impl Log {
    /// Whether it is told as the process was started.
    fn is_default(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && self.filter.passes(*metadata.level(), metadata.target())
    }
}

impl tracing::Subscriber for Log {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        let default = self.is_default(metadata);
        match self.knob.level().filter(|_| metadata.is_event() && metadata.target().starts_with(OURS)) {
            Some(most) if *metadata.level() <= most => Interest::always(),
            // Left out for a while.
            Some(_) if default => Interest::sometimes(),
            None if default => Interest::always(),
            Some(_) | None => Interest::never(),
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let own = self.knob.level().filter(|_| metadata.is_event() && metadata.target().starts_with(OURS));
        match own.filter(|_| !self.knob.is_over(Instant::now())) {
            Some(most) => *metadata.level() <= most,
            None => self.is_default(metadata),
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        self.filter.0.iter().map(|(_, level)| *level).chain(self.knob.level()).max()
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        // Places that the knob let through are not asked again when its time is over.
        if self.knob.level().is_some() && !self.enabled(event.metadata()) {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = line(event, UnixTime::from_millis(i64::try_from(now.as_millis()).unwrap_or(i64::MAX)));
        self.out.lock().unwrap_or_else(PoisonError::into_inner).line(&line);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// One JSON object and a line feed.
fn line(event: &Event<'_>, at: UnixTime) -> Vec<u8> {
    let metadata = event.metadata();
    let mut line = Line(Vec::with_capacity(256));
    line.0
        .extend_from_slice(format!("{{\"timestamp\":\"{at}\",\"level\":\"{}\"", metadata.level()).as_bytes());
    if let Some(join) = JOIN.get() {
        line.put("join", join);
    }
    event.record(&mut line);
    line.put("target", metadata.target());
    line.0.extend_from_slice(b"}\n");
    line.0
}

struct Line(Vec<u8>);

impl Line {
    fn put(&mut self, name: &str, value: impl serde::Serialize) {
        self.0.push(b',');
        // Neither names nor values of these kinds can fail, and a Vec takes everything.
        let _ = serde_json::to_writer(&mut self.0, name.strip_prefix("r#").unwrap_or(name));
        self.0.push(b':');
        let _ = serde_json::to_writer(&mut self.0, &value);
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field.name(), value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field.name(), value);
    }
}

/// Says the same complaint once and then ever more rarely, so that a long outage does not fill the logs
/// of a node with a hundred pods.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    last: String,
    repeats: u64,
}

impl Complaints {
    /// Calls `log` with the reason and the wait in milliseconds, or does not.
    pub(crate) fn say(&mut self, reason: &str, wait: Duration, log: impl FnOnce(&str, u64)) {
        if self.last == reason {
            self.repeats += 1;
        } else {
            reason.clone_into(&mut self.last);
            self.repeats = 0;
        }
        if self.repeats == 0 || self.repeats.is_power_of_two() && self.repeats >= 8 {
            log(reason, u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
        }
    }
}

/// What the runtime and a panic write must not block either, nor be lost while no supervisor reads it.
fn keep_stderr() {
    static READER: std::sync::OnceLock<Option<OwnedFd>> = std::sync::OnceLock::new();
    let Ok(pipe) = io::stderr().as_fd().try_clone_to_owned() else { return };
    // A terminal's mode is its other users' as well.
    let Some(reader) = reader_of(&pipe) else { return };
    if non_blocking(&pipe).is_ok() {
        let _ = READER.set(Some(reader));
    }
}

fn non_blocking(pipe: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(pipe, FcntlArg::F_GETFL)?);
    fcntl(pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

struct Output {
    pipe: OwnedFd,
    /// End of a line that was cut.
    rest: Vec<u8>,
    /// Keeps the pipe alive while no supervisor reads it, so that an adopter finds what was written.
    _reader: Option<OwnedFd>,
}

impl Output {
    fn stdout() -> io::Result<Self> {
        let pipe = io::stdout().as_fd().try_clone_to_owned()?;
        Self::new(pipe)
    }

    fn new(pipe: OwnedFd) -> io::Result<Self> {
        non_blocking(&pipe)?;
        Ok(Self { _reader: reader_of(&pipe), pipe, rest: Vec::new() })
    }

    fn line(&mut self, line: &[u8]) {
        if !self.rest.is_empty() {
            let sent = self.send(&self.rest.clone());
            self.rest.drain(..sent);
        }
        let sent = if self.rest.is_empty() { self.send(line) } else { 0 };
        match sent {
            0 => {
                DROPPED.fetch_add(1, Ordering::Relaxed);
            }
            sent => self.rest.extend_from_slice(line.get(sent..).unwrap_or_default()),
        }
    }

    fn send(&self, bytes: &[u8]) -> usize {
        let mut sent = 0;
        while sent < bytes.len() {
            match nix::unistd::write(&self.pipe, &bytes[sent..]) {
                Ok(n) => sent += n,
                Err(nix::Error::EINTR) => {}
                Err(_) => break,
            }
        }
        sent
    }
}

fn reader_of(pipe: &OwnedFd) -> Option<OwnedFd> {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    let stat = nix::sys::stat::fstat(pipe).ok()?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFIFO {
        return None;
    }
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
    Some(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn the_same_complaint_becomes_rare() {
        let mut complaints = Complaints::default();
        let mut said = Vec::new();
        for (number, reason) in (0..100).map(|n| (n, "down")).chain([(100, "up"), (101, "down")]) {
            complaints.say(reason, Duration::ZERO, |_, _| said.push(number));
        }
        assert_eq!(said, [0, 8, 16, 32, 64, 100, 101]);
    }

    #[test]
    fn the_longest_target_of_a_filter_counts() {
        let filter = Filter::parse("info, a::b=off,a=debug,boringtun=off").unwrap();
        for (level, target, passes) in [
            (Level::INFO, "podtether_engine::driver", true),
            (Level::DEBUG, "podtether_engine::driver", false),
            (Level::DEBUG, "a", true),
            (Level::DEBUG, "a::c", true),
            (Level::DEBUG, "ab", false),
            (Level::TRACE, "a", false),
            (Level::ERROR, "a::b", false),
            (Level::ERROR, "a::b::c", false),
            (Level::ERROR, "boringtun::noise", false),
        ] {
            assert_eq!(filter.passes(level, target), passes, "{level} {target}");
        }
        assert!(!Filter::parse("a=info").unwrap().passes(Level::ERROR, "b"), "nothing is said of others");
        for bad in ["loud", "a=b=info"] {
            assert_eq!(Filter::parse(bad), None, "{bad}");
        }
        assert!(Filter::parse(DEFAULT_FILTER).is_some());
    }

    #[test]
    fn an_event_is_a_line_of_json() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let filter = Filter::parse("info").unwrap();
        let knob = Box::leak(Box::new(Knob::new()));
        let log = Log { filter, knob, out: Mutex::new(Output::new(writer.into()).unwrap()) };
        tracing::subscriber::with_default(log, || {
            let _span = tracing::info_span!("nobody sees it").entered();
            let error = std::io::Error::other("a \"b\"\n\u{1b}c");
            tracing::warn!(target: "t", %error, n = 7, less = -1, yes = true, half = 0.5, r#in = ?[1], "it {}", "failed");
            tracing::debug!("unsaid");
        });
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text.matches('\n').count(), 1, "{text}");
        let mut said: serde_json::Value = serde_json::from_str(&text).unwrap();
        let at = said["timestamp"].take();
        assert!(at.as_str().unwrap().parse::<UnixTime>().is_ok(), "{at}");
        let wanted = serde_json::json!({
            "timestamp": null, "level": "WARN", "target": "t", "message": "it failed", "error": "a \"b\"\n\u{1b}c",
            "n": 7, "less": -1, "yes": true, "half": 0.5, "in": "[1]",
        });
        assert_eq!(said, wanted);
    }

    #[test]
    fn a_level_is_turned_up_for_our_own_lines_and_turns_back_by_itself() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let knob: &'static Knob = Box::leak(Box::new(Knob::new()));
        let filter = Filter::parse("info").unwrap();
        let log = Log { filter, knob, out: Mutex::new(Output::new(writer.into()).unwrap()) };
        let turn = |level, ms| {
            knob.turn(Some(LogFor { level, ms }), Instant::now());
            tracing::callsite::rebuild_interest_cache();
        };
        tracing::subscriber::with_default(log, || {
            let say = |text: &str| {
                tracing::debug!(text, "fine");
                tracing::debug!(target: "h2", text, "not ours");
                tracing::info!(text, "coarse");
            };
            say("before");
            turn(LogLevel::Debug, 3_600_000);
            say("louder");
            turn(LogLevel::Error, 3_600_000);
            say("quieter");
            turn(LogLevel::Debug, 0);
            say("over");
            say("after");
        });
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let said: Vec<_> =
            text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()).collect();
        let said: Vec<_> =
            said.iter().map(|l| format!("{} {}", l["message"], l["text"]).replace('"', "")).collect();
        assert_eq!(said, ["coarse before", "fine louder", "coarse louder", "coarse over", "coarse after"]);
    }

    #[test]
    fn a_full_pipe_drops_whole_lines_and_never_blocks() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut output = Output::new(writer.into()).unwrap();
        let before = dropped();
        let line = [vec![b'x'; 9_999], vec![b'\n']].concat();
        for _ in 0..20 {
            output.line(&line);
        }
        assert!(dropped() > before);
        // What was read frees the pipe; the cut line is completed before a new one starts.
        let mut text = vec![0; 50_000];
        reader.read_exact(&mut text).unwrap();
        output.line(b"last\n");
        output._reader = None;
        drop(output);
        reader.read_to_end(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.last(), Some(&"last"));
        for whole in &lines[..lines.len() - 1] {
            assert_eq!(whole.len(), 9_999);
        }
    }
}
