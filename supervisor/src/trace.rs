//! What an engine process leaves in `run_dir/engines/ID/process` (or `process2`), so that a later supervisor finds it.
//!
//! The supervisor writes the first two lines before it forks; the child appends its own line of
//! `/proc/self/stat` before it executes the engine. So there is no moment at which an engine runs that no
//! file tells of, wherever its supervisor is killed.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use podtether_proto::fds;

/// Largest trace that is read.
const MAX_BYTES: usize = 4096;

/// A process that was started as an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Its pid.
    pub pid: u32,
    /// When it was forked, in clock ticks since boot: with the boot, what tells it from a later process of
    /// the same pid.
    pub start_ticks: u64,
    /// The kernel's id of the boot.
    pub boot_id: String,
    /// Names of the descriptors it was born with, from [`fds::FIRST_FD`] on.
    pub names: Vec<String>,
}

impl Trace {
    /// Reads a trace; `None` while no child has got as far as writing its line, and for anything else that
    /// is not one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let (boot_id, names) = (lines.next()?, lines.next()?);
        let (pid, start_ticks) = parse_stat(lines.next()?)?;
        let names = names.split(':').map(str::to_owned).collect();
        Some(Self { pid, start_ticks, boot_id: boot_id.to_owned(), names })
    }

    /// Numbers of the descriptors with this name, in the engine.
    pub fn numbers(&self, name: &str) -> impl Iterator<Item = i32> {
        (fds::FIRST_FD..).zip(&self.names).filter(move |(_, n)| *n == name).map(|(number, _)| number)
    }

    /// Whether the process is the one that wrote this, given what `/proc` says of its pid now.
    #[must_use]
    pub fn is(&self, boot_id: &str, stat: &str) -> bool {
        self.boot_id == boot_id && parse_stat(stat) == Some((self.pid, self.start_ticks))
    }
}

/// Pid and start time of a line of `/proc/PID/stat`. The name between them may hold anything, parentheses
/// and spaces included, so it ends at the last one (proc_pid_stat(5)).
#[must_use]
pub fn parse_stat(line: &str) -> Option<(u32, u64)> {
    let (pid, rest) = line.split_once(" (")?;
    let (_, fields) = rest.rsplit_once(") ")?;
    // The state is field 3, the start time field 22.
    let start_ticks = fields.split(' ').nth(22 - 3)?;
    Some((pid.parse().ok()?, start_ticks.parse().ok()?))
}

/// The wait status in a line of `/proc/PID/stat`, field 52; only of a process that has ended and was not
/// reaped. `None` for zero, which stands there too when the reader may not know.
#[must_use]
pub fn parse_exit(line: &str) -> Option<i32> {
    let (_, fields) = line.rsplit_once(") ")?;
    let mut fields = fields.trim_end().split(' ');
    let status = (fields.next()? == "Z").then(|| fields.nth(52 - 4)?.parse().ok())??;
    (status != 0).then_some(status)
}

/// The id of this boot.
///
/// # Errors
/// Without `/proc`.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Begins a trace in `path`: the lines that are known before the fork.
///
/// # Errors
/// The file system refuses.
pub fn begin(path: &Path, names: &[&str]) -> io::Result<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    file.write_all(format!("{}\n{}\n", boot_id()?, names.join(":")).as_bytes())?;
    Ok(file.into())
}

/// The trace in `path`, if there is a whole one.
#[must_use]
pub fn read(path: &Path) -> Option<Trace> {
    use std::io::Read as _;
    let mut text = String::new();
    let limit = u64::try_from(MAX_BYTES).unwrap_or(u64::MAX);
    File::open(path).ok()?.take(limit).read_to_string(&mut text).ok()?;
    Trace::parse(&text)
}

/// Appends the calling process's line to `trace`. For the child between fork and exec: it allocates nothing.
///
/// # Errors
/// As the system calls.
pub(crate) fn sign(trace: &impl AsRawFd) -> io::Result<()> {
    let mut line = [0_u8; 1024];
    // SAFETY: a path that ends with a zero byte.
    let stat = unsafe { libc::open(c"/proc/self/stat".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if stat < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: reads at most as much as the buffer holds.
    let length = unsafe { libc::read(stat, line.as_mut_ptr().cast(), line.len()) };
    // SAFETY: the descriptor was opened above and is used nowhere else.
    unsafe { libc::close(stat) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: writes what was read, from the same buffer.
    let written = unsafe { libc::write(trace.as_raw_fd(), line.as_ptr().cast(), length) };
    match usize::try_from(written) {
        Ok(written) if written == length => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "4321 (a) b (c d) S 1 4321 4321 0 -1 4194560 10 0 0 0 1 2 0 0 20 0 1 0 987654 1 2 3\n";

    #[test]
    fn names_of_processes_do_not_confuse() {
        assert_eq!(parse_stat(STAT), Some((4321, 987_654)));
        for bad in ["", "1", "1 (x", "1 (x) S 1 2 3", "x (y) S 1 4 4 0 -1 4 1 0 0 0 1 2 0 0 2 0 1 0 9 1"] {
            assert_eq!(parse_stat(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_status_of_a_process_that_ended() {
        let line = |state: &str, status: &str| format!("7 (a) b) {state} {} {status}\n", ["0"; 48].join(" "));
        assert_eq!(parse_exit(&line("Z", "31")), Some(31));
        assert_eq!(parse_exit(&line("Z", "18176")), Some(71 << 8));
        assert_eq!(parse_exit(&line("Z", "0")), None);
        assert_eq!(parse_exit(&line("S", "31")), None, "it lives");
        assert_eq!(parse_exit("7 (a) Z 1 2"), None);
    }

    #[test]
    fn a_trace_knows_its_process_alone() {
        let text = format!("boot-1\nrpc:tun:dns:dns\n{STAT}");
        let trace = Trace::parse(&text).unwrap();
        assert_eq!((trace.pid, trace.start_ticks), (4321, 987_654));
        assert_eq!(trace.numbers("dns").collect::<Vec<_>>(), [5, 6]);
        assert_eq!(trace.numbers("udp4").count(), 0);
        assert!(trace.is("boot-1", STAT));
        assert!(!trace.is("boot-2", STAT), "another boot");
        assert!(!trace.is("boot-1", &STAT.replace("987654", "987655")), "the pid was given again");
        let cut = [0, 7, 20, 30, 60].map(|n| Trace::parse(&text[..n]));
        assert_eq!(cut, [const { None }; 5], "cut off");
    }

    #[test]
    fn a_child_signs_with_its_own_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("process");
        let file = begin(&path, &["rpc", "tun"]).unwrap();
        assert_eq!(read(&path), None, "nobody has signed yet");
        sign(&file).unwrap();
        let trace = read(&path).unwrap();
        assert_eq!(trace.pid, std::process::id());
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        assert!(trace.is(&boot_id().unwrap(), &stat));
        assert_eq!(trace.names, ["rpc", "tun"]);
    }
}
