//! Starts an engine process with exactly the descriptors it is given, and notices its end.
//!
//! The child inherits descriptors 0 to 2 and those named in [`fds::ENV`]; everything else is
//! close-on-exec. It gets its own session and an environment of six variables, and lives on when its
//! supervisor does not; [`crate::trace`] is how the next one finds it.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use podtether_proto::fds;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};

use crate::restart::{self, Cause, Ended};

/// Room for the descriptors an engine is born with.
const MAX_FDS: usize = 64;

/// What a new engine is given.
#[derive(Debug)]
pub struct Birth<'a> {
    /// The engine's program.
    pub program: &'a Path,
    /// Names (see [`fds`]) and descriptors.
    pub fds: &'a [(&'static str, BorrowedFd<'a>)],
    /// Ids to change to; `None` where they are not mapped.
    pub uid: Option<u32>,
    /// The engine ends when its surroundings do not offer a step of its sandbox.
    pub require_sandbox: bool,
    /// Where the process leaves its [trace](crate::trace).
    pub trace: &'a Path,
}

/// A living engine process, or one whose end nobody has asked about yet.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    /// Of this process; whose parent is another tells how it ended only where the kernel says so.
    child: bool,
    /// When it was forked, clock ticks since boot.
    start_ticks: Option<u64>,
    /// Set by the first to learn it, with the wait status: who reaps the child takes that away from the others.
    ended: OnceLock<(Ended, Option<i32>)>,
    /// Why this supervisor killed it.
    killed: OnceLock<Cause>,
    /// Its `/proc/PID/schedstat`, open so that a look costs one call; `None` where the kernel has none.
    schedstat: Option<std::fs::File>,
    /// When this supervisor first had it: for its child, the moment after the fork.
    since: Instant,
}

/// Starts an engine. The child carries the output pipes; [`Process`] tells how it ends.
///
/// # Errors
/// As fork, exec and their preparations.
pub fn spawn(birth: Birth<'_>) -> io::Result<(Process, Child)> {
    if birth.fds.len() > MAX_FDS {
        return Err(io::Error::other("too many descriptors for an engine"));
    }
    keep_low_numbers_free()?;
    let names: Vec<&str> = birth.fds.iter().map(|(name, _)| *name).collect();
    let mut sources = [-1; MAX_FDS];
    for (slot, (_, fd)) in sources.iter_mut().zip(birth.fds) {
        *slot = fd.as_raw_fd();
    }
    let count = birth.fds.len();
    let trace = crate::trace::begin(birth.trace, &names)?;
    let mut command = Command::new(birth.program);
    // Open for its whole life, so nothing of a file system: the end of a pipe that nobody writes to.
    let (stdin, _) = io::pipe()?;
    command
        .arg0("podtether-engine")
        .env_clear()
        .env(fds::ENV, names.join(":"))
        .current_dir("/")
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for (name, value) in passed_on() {
        command.env(name, value);
    }
    if let Some(uid) = birth.uid {
        command.env("PODTETHER_UID", uid.to_string()).env("PODTETHER_GID", uid.to_string());
    }
    if birth.require_sandbox {
        command.env("PODTETHER_REQUIRE_SANDBOX", "1");
    }
    // SAFETY: the closure runs between fork and exec and only makes async-signal-safe system calls on
    // memory it owns: it neither allocates nor locks.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            crate::trace::sign(&trace)?;
            place(&mut sources, count)
        });
    }
    let child = command.spawn()?;
    let pid = child.id().ok_or_else(|| io::Error::other("the engine ended before it began"))?;
    Ok((Process::open(pid, true)?, child))
}

/// Variables an engine may see: how loudly it logs, and how it panics.
fn passed_on() -> Vec<(&'static str, OsString)> {
    ["PODTETHER_LOG", "RUST_BACKTRACE"]
        .into_iter()
        .filter_map(|name| std::env::var_os(name).map(|value| (name, value)))
        .collect()
}

/// Puts `sources[..count]` at [`fds::FIRST_FD`] and up, without close-on-exec.
fn place(sources: &mut [RawFd; MAX_FDS], count: usize) -> io::Result<()> {
    let first_free = fds::FIRST_FD + libc::c_int::try_from(MAX_FDS).unwrap_or(libc::c_int::MAX);
    for source in &mut sources[..count] {
        // A source may sit where another one has to go.
        // SAFETY: fcntl with integers only.
        let high = unsafe { libc::fcntl(*source, libc::F_DUPFD_CLOEXEC, first_free) };
        if high < 0 {
            return Err(io::Error::last_os_error());
        }
        *source = high;
    }
    let mut target = fds::FIRST_FD;
    for source in &sources[..count] {
        // SAFETY: dup2 with integers only.
        if unsafe { libc::dup2(*source, target) } < 0 {
            return Err(io::Error::last_os_error());
        }
        target += 1;
    }
    let rest = libc::c_uint::try_from(target).unwrap_or(0);
    // What somebody forgot to open close-on-exec does not leak either.
    // SAFETY: close_range with integers only.
    let _ = unsafe { libc::close_range(rest, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    Ok(())
}

/// The standard library reports a failed exec through a pipe of its own; were that pipe at a number
/// that [`place`] overwrites, the report would go to an engine's descriptor.
pub(crate) fn keep_low_numbers_free() -> io::Result<()> {
    use std::sync::Mutex;
    static HELD: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());
    let end = fds::FIRST_FD + libc::c_int::try_from(MAX_FDS).unwrap_or(0);
    loop {
        let fd = OwnedFd::from(std::fs::File::open("/dev/null")?);
        if fd.as_raw_fd() >= end {
            return Ok(());
        }
        if let Ok(mut held) = HELD.lock() {
            held.push(fd);
        }
    }
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: takes integers, returns a descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, libc::PIDFD_NONBLOCK) };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Process {
    /// The process that has `pid` now.
    ///
    /// # Errors
    /// Nobody has it.
    pub fn adopted(pid: u32) -> io::Result<Self> {
        Self::open(pid, false)
    }

    fn open(pid: u32, child: bool) -> io::Result<Self> {
        let pidfd = pidfd_open(pid)?;
        // SAFETY: an OwnedFd gives the same open descriptor for as long as it lives.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let start_ticks = crate::trace::parse_stat(&stat).map(|(_, start_ticks)| start_ticks);
        let schedstat = std::fs::File::open(format!("/proc/{pid}/schedstat")).ok();
        let (ended, killed) = (OnceLock::new(), OnceLock::new());
        let since = Instant::now();
        Ok(Process { pid, pidfd, child, start_ticks, ended, killed, schedstat, since })
    }

    /// A duplicate of the process's descriptor `number`.
    ///
    /// # Errors
    /// It is not open, or the process may not be looked into.
    pub fn descriptor(&self, number: RawFd) -> io::Result<OwnedFd> {
        // SAFETY: takes integers, returns a descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.get_ref().as_raw_fd(), number, 0) };
        let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor and nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Whether it has ended already.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        gone(self.pidfd.get_ref().as_fd())
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the end and tells how it was, leaving the zombie to the owner of the [`Child`]: the
    /// end is seen at once, before the output is drained.
    pub async fn ended(&self) -> Ended {
        loop {
            if let Some((ended, _)) = self.ended.get() {
                return ended.clone();
            }
            let Ok(mut ready) = self.pidfd.readable().await else { return Ended::Crash };
            let pidfd = self.pidfd.get_ref().as_fd();
            let status = if self.child { peek(pidfd) } else { gone(pidfd).then(|| self.status_of_another()) };
            match status {
                Some(status) => {
                    let ended = restart::of_status(status, self.killed.get().copied());
                    return self.ended.get_or_init(|| (ended, status)).0.clone();
                }
                None => ready.clear_ready(),
            }
        }
    }

    /// The wait status of an ended process whose parent is another: from `/proc` while nobody has reaped it,
    /// from its pidfd after that, which Linux 6.15 began to tell.
    fn status_of_another(&self) -> Option<i32> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let start_ticks = crate::trace::parse_stat(&stat).map(|(_, start_ticks)| start_ticks);
        if start_ticks.is_some()
            && start_ticks == self.start_ticks
            && let Some(status) = crate::trace::parse_exit(&stat)
        {
            return Some(status);
        }
        exit_info(self.pidfd.get_ref().as_fd())
    }

    /// How long this supervisor has had it.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// The processor time it has used, and the time it could have run.
    ///
    /// # Errors
    /// It has ended.
    pub fn used(&self) -> io::Result<crate::guard::Used> {
        use std::os::unix::fs::FileExt as _;
        let mut text = [0; 64];
        // An open file stays that process's, whoever gets its pid.
        let read = self.schedstat.as_ref().map(|file| file.read_at(&mut text, 0)).transpose()?;
        let text = read.and_then(|count| std::str::from_utf8(text.get(..count)?).ok());
        if let Some(used) = text.and_then(crate::guard::Used::of_schedstat) {
            return Ok(used);
        }
        let used = crate::guard::Used::read(self.pid)?;
        // Only then was it this process that was read of.
        if self.has_ended() { Err(io::ErrorKind::NotFound.into()) } else { Ok(used) }
    }

    /// How often it has run, where the kernel counts that.
    #[must_use]
    pub fn runs(&self) -> Option<u64> {
        self.used().ok().map(|used| used.times).filter(|times| *times > 0)
    }

    /// Tells how the process ended, from whoever reaped it.
    pub fn reaped(&self, status: ExitStatus) {
        use std::os::unix::process::ExitStatusExt;
        let status = Some(status.into_raw());
        let _ = self.ended.set((restart::of_status(status, self.killed.get().copied()), status));
    }

    /// A sentence on its crash: the signal or exit code, as far as the kernel told it.
    #[must_use]
    pub fn crash(&self) -> String {
        restart::crash(self.ended.get().and_then(|(_, status)| *status))
    }

    /// Ends it now. The first cause is the one that counts.
    pub fn kill(&self, cause: Cause) {
        let _ = self.killed.set(cause);
        let signal = Signal::SIGKILL as libc::c_int;
        let null: *const libc::siginfo_t = std::ptr::null();
        // SAFETY: the descriptor is ours, the pointer may be null; a process that is gone is ESRCH.
        let _ = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.pidfd.get_ref().as_raw_fd(), signal, null, 0)
        };
    }
}

/// Whether the process has ended, reaped or not.
fn gone(pidfd: BorrowedFd<'_>) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    poll(&mut [PollFd::new(pidfd, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// As the kernel has it (linux/pidfd.h), up to what Linux 6.15 has.
#[repr(C)]
#[derive(Debug, Default)]
struct PidfdInfo {
    mask: u64,
    cgroup: u64,
    /// pid, tgid, ppid, and eight ids.
    ids: [u32; 11],
    exit_code: i32,
}

/// `PIDFD_INFO_EXIT`: `exit_code` is asked for, or there.
const INFO_EXIT: u64 = 1 << 3;

nix::ioctl_readwrite!(
    /// `PIDFD_GET_INFO`.
    pidfd_get_info,
    0xff,
    11,
    PidfdInfo
);

/// The wait status of a process that was reaped, if this kernel keeps it for holders of the pidfd.
fn exit_info(pidfd: BorrowedFd<'_>) -> Option<i32> {
    let mut info = PidfdInfo { mask: INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: reads and writes one structure of the size that the number of the call names.
    unsafe { pidfd_get_info(pidfd.as_raw_fd(), &raw mut info) }.ok()?;
    (info.mask & INFO_EXIT != 0).then_some(info.exit_code)
}

/// The wait status of a child that has ended, as far as the kernel tells it; `None` while it lives.
fn peek(pidfd: BorrowedFd<'_>) -> Option<Option<i32>> {
    // SAFETY: siginfo_t is plain data for which all zeroes is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let id = libc::id_t::try_from(pidfd.as_raw_fd()).ok()?;
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: writes one siginfo_t.
    let result = unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, flags) };
    if result != 0 {
        // Reaped by somebody who did not tell.
        return Some(exit_info(pidfd));
    }
    // SAFETY: waitid succeeded, so the field is set; zero means that it lives.
    let pid = unsafe { info.si_pid() };
    // SAFETY: as above.
    let status = unsafe { info.si_status() };
    let status = if info.si_code == libc::CLD_EXITED { (status & 0xff) << 8 } else { status };
    (pid != 0).then_some(Some(status))
}

#[cfg(test)]
mod tests {
    use super::*;
    use podtether_proto::exit::EngineExit;
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    fn script(dir: &Path, text: &str) -> std::path::PathBuf {
        let path = dir.join("engine");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    async fn run(text: &str, fds: &[(&'static str, BorrowedFd<'_>)]) -> (Ended, String) {
        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), text);
        let (process, child) = spawn(Birth {
            program: &program,
            fds,
            uid: Some(1234),
            require_sandbox: false,
            trace: &dir.path().join("process"),
        })
        .unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(20), process.ended()).await.unwrap();
        let output = child.wait_with_output().await.unwrap();
        (ended, String::from_utf8(output.stdout).unwrap())
    }

    #[tokio::test]
    async fn an_engine_inherits_what_is_named_and_nothing_else() {
        let _forgotten = std::fs::File::open("/dev/zero").unwrap();
        let mut a = tempfile::tempfile().unwrap();
        let mut b = tempfile::tempfile().unwrap();
        a.write_all(b"first").unwrap();
        b.write_all(b"second").unwrap();
        a.rewind().unwrap();
        b.rewind().unwrap();
        let text = "cat <&3; cat <&4; echo; ls /proc/self/fd | tr '\\n' ' '; echo; env | sort; \
                    ps -o sid= -p $$ 2>/dev/null; exit 65";
        let (ended, output) = run(text, &[("tun", a.as_fd()), ("udp4", b.as_fd())]).await;
        assert_eq!(ended, Ended::Exit(EngineExit::KeyRejected));
        let lines: Vec<&str> = output.lines().collect();
        assert_eq!(lines[0], "firstsecond");
        // 5 is the directory that ls reads.
        assert_eq!(lines[1].trim(), "0 1 2 3 4 5");
        assert!(output.contains("PODTETHER_FDS=tun:udp4\n"), "{output}");
        assert!(output.contains("PODTETHER_UID=1234\n"));
        assert!(!output.contains("HOME="));
        let mut rest = String::new();
        a.read_to_string(&mut rest).unwrap();
    }

    #[tokio::test]
    async fn crossed_numbers_arrive_in_order() {
        let files: Vec<std::fs::File> = (0..6)
            .map(|n| {
                let mut f = tempfile::tempfile().unwrap();
                write!(f, "{n}").unwrap();
                f.rewind().unwrap();
                f
            })
            .collect();
        let fds: Vec<(&'static str, BorrowedFd<'_>)> =
            files.iter().rev().map(|f| ("tun", f.as_fd())).collect();
        let (ended, output) = run("for n in 3 4 5 6 7 8; do eval \"cat <&$n\"; done", &fds).await;
        assert_eq!((ended, output.as_str()), (Ended::Exit(EngineExit::Stopped), "543210"));
    }

    #[tokio::test]
    async fn ends_are_told_apart() {
        assert_eq!(run("exit 101", &[]).await.0, Ended::Crash);
        assert_eq!(run("kill -9 $$", &[]).await.0, Ended::Crash);
        assert_eq!(run("kill -SYS $$", &[]).await.0, Ended::ForbiddenCall);
        assert_eq!(run("exit 72", &[]).await.0, Ended::Exit(EngineExit::Orphaned));
        let dir = tempfile::tempdir().unwrap();
        let program = Path::new("/no/such/engine");
        let missing = Birth {
            program,
            fds: &[],
            uid: None,
            require_sandbox: false,
            trace: &dir.path().join("process"),
        };
        assert_eq!(spawn(missing).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_killed_engine_is_noticed_at_once_though_its_output_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), "exec sleep 600");
        let (process, mut child) = spawn(Birth {
            program: &program,
            fds: &[],
            uid: None,
            require_sandbox: false,
            trace: &dir.path().join("process"),
        })
        .unwrap();
        process.kill(Cause::Silent);
        process.kill(Cause::Removed);
        let silent = Ended::Killed(Cause::Silent);
        assert_eq!(tokio::time::timeout(Duration::from_secs(5), process.ended()).await.unwrap(), silent);
        child.wait().await.unwrap();
        assert_eq!(process.ended().await, silent, "asked again after the reaping");
    }

    #[tokio::test]
    async fn how_another_parents_child_ended_is_told_before_and_after_it_is_reaped() {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut version = kernel.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
        let tells = (version.next().unwrap(), version.next().unwrap()) >= (6, 15);
        if !tells {
            println!("SKIPPED after the reaping: Linux {kernel} does not tell");
        }
        for (end, expected) in [
            ("kill -SYS $$", Ended::ForbiddenCall),
            ("exit 71", Ended::Exit(EngineExit::LinkLost)),
            ("exit 3", Ended::Crash),
            ("kill -9 $$", Ended::Crash),
        ] {
            for reaped in [false, true] {
                if reaped && !tells {
                    continue;
                }
                let mut child = std::process::Command::new("sh")
                    .args(["-c", &format!("read x; {end}")])
                    .stdin(Stdio::piped())
                    .spawn()
                    .unwrap();
                let process = Process::adopted(child.id()).unwrap();
                drop(child.stdin.take());
                if reaped {
                    child.wait().unwrap();
                }
                let ended = tokio::time::timeout(Duration::from_secs(5), process.ended()).await.unwrap();
                assert_eq!(ended, expected, "{end}, reaped {reaped}");
                child.wait().unwrap();
            }
        }
    }
}
