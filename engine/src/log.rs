//! JSON log lines on stdout that never block the driver: the pipe is non-blocking, and a line that
//! does not fit is dropped and counted.
//!
//! Lines longer than `PIPE_BUF` may be cut by a nearly full pipe; the rest is kept and goes out
//! before the next line, so that the reader always sees whole lines.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Log lines that did not fit into the pipe.
pub(crate) fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// boringtun warns of every handshake that is tried again and of every peer that is away.
const DEFAULT_FILTER: &str = "info,boringtun=off,tarpc=error";

/// Installs the subscriber. `PODTETHER_LOG` holds a filter; the default is `info` of our own.
pub(crate) fn init() {
    let filter = std::env::var("PODTETHER_LOG")
        .ok()
        .and_then(|text| EnvFilter::try_new(text).ok())
        .unwrap_or_else(|| EnvFilter::new(DEFAULT_FILTER));
    keep_stderr();
    let Ok(out) = Output::stdout() else { return };
    // A second call (tests) keeps the first subscriber.
    let _ = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_env_filter(filter)
        .with_writer(Lines(Mutex::new(out)))
        .try_init();
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

struct Lines(Mutex<Output>);

struct Line<'a>(&'a Lines);

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

impl Write for Line<'_> {
    /// The subscriber hands over one whole line at a time.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.0.0.lock() {
            Ok(mut output) => output.line(line),
            Err(poisoned) => poisoned.into_inner().line(line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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
