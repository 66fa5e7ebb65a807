//! The process the user started: it puts the demo, or chaos, into namespaces of its own, passes interrupts on, and
//! looks afterwards whether anything is left.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use podtether_net::isolate;
use tokio::signal::unix::{SignalKind, signal};

use super::display::{Row, table};

/// How long the demo inside may take to say goodbye once it was interrupted.
const GOODBYE: Duration = Duration::from_secs(5);

/// Runs this program inside with these arguments, and says what is left of it.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<ExitCode> {
    run_by(isolate::spawn, arguments)
}

/// The same by another of [`isolate`]'s ways to start it.
pub(crate) fn run_by(
    spawn: fn(Command) -> podtether_net::Result<Child>,
    arguments: &[String],
) -> anyhow::Result<ExitCode> {
    let before = Host::look();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // From here on an interrupt no longer ends this process before it has cleaned up.
    let _inside = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;

    let mut command = Command::new(std::env::current_exe().context("own path")?);
    // The lifeline: the demo inside ends when its stdin does, so it never outlives this process.
    command.args(arguments).stdin(Stdio::piped());
    let mut guard = spawn(command)?;
    let mut lifeline = guard.stdin.take().context("no lifeline")?;
    let guard_pid = guard.id();
    let inside = namespaces(&PathBuf::from(format!("/proc/{guard_pid}/ns")));
    // What it is called out here, for the hints it prints.
    writeln!(lifeline, "{}", first_child(guard_pid).unwrap_or(guard_pid)).context("start the demo inside")?;

    let status = runtime.block_on(async move {
        let mut ended = tokio::task::spawn_blocking(move || guard.wait());
        tokio::select! {
            status = &mut ended => return anyhow::Ok(status??),
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        drop(lifeline);
        if let Ok(status) = tokio::time::timeout(GOODBYE, &mut ended).await {
            return Ok(status??);
        }
        kill(guard_pid);
        // Not for ever: a process in an uninterruptible call cannot be waited for.
        Ok(tokio::time::timeout(GOODBYE, ended).await.context("wait for the demo's end")???)
    })?;
    let left = Host::look().beyond(&before, &inside);
    if left.is_empty() {
        let row = Row::passed("left behind", "no process, namespace, mount, link or file");
        show(&row);
    } else {
        show(&Row::failed("left behind", left.join(", ")));
        return Ok(ExitCode::FAILURE);
    }
    Ok(exit_code(status))
}

#[expect(clippy::print_stdout, reason = "a command line tool prints its answers")]
fn show(row: &Row) {
    // One more line of the table that the demo inside has printed.
    for line in table(std::slice::from_ref(row)).lines().skip(2) {
        println!("{line}");
    }
}

fn exit_code(status: ExitStatus) -> ExitCode {
    status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}

fn first_child(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// Ends the guard, and with it everything inside.
fn kill(pid: u32) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}

/// What of this machine the demo could have changed.
struct Host {
    links: BTreeSet<String>,
    mounts: BTreeSet<String>,
    files: BTreeSet<PathBuf>,
}

impl Host {
    fn look() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let links = read("/proc/self/net/dev");
        let links = links.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
        let mounts = read("/proc/self/mountinfo");
        let mounts = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_owned);
        let files = ["/run", "/tmp", "/var/lib", "/etc"].into_iter().filter_map(|dir| fs::read_dir(dir).ok());
        Self {
            links: links.collect(),
            mounts: mounts.collect(),
            files: files.flatten().flatten().map(|entry| entry.path()).collect(),
        }
    }

    /// What is there now and was not before, as far as it can be the demo's: other programs go on
    /// meanwhile.
    fn beyond(&self, before: &Self, inside: &BTreeSet<u64>) -> Vec<String> {
        let ours = |name: &str| name.contains("podtether");
        let mounts = self.mounts.difference(&before.mounts).filter(|m| ours(m)).map(|m| format!("mount {m}"));
        let links = self
            .links
            .difference(&before.links)
            .filter(|l| ["ts0", "pod0", "tun0", "eth0", "br0", "cni0"].contains(&l.as_str()));
        let files = self.files.difference(&before.files).map(|f| f.display().to_string());
        let files = files.filter(|f| ours(f)).map(|f| format!("file {f}"));
        let processes = processes_in(inside).map(|pid| format!("process {pid}"));
        mounts.chain(links.map(|l| format!("interface {l}"))).chain(files).chain(processes).collect()
    }
}

/// Namespaces that this process is not in itself.
fn namespaces(dir: &Path) -> BTreeSet<u64> {
    let ids = |dir: &Path| -> BTreeSet<u64> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| fs::metadata(entry.path()).ok()).map(|meta| meta.ino()).collect()
    };
    ids(dir).difference(&ids(Path::new("/proc/self/ns"))).copied().collect()
}

/// Processes that live in one of these namespaces.
fn processes_in(wanted: &BTreeSet<u64>) -> impl Iterator<Item = u32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).filter(|pid| {
        let dir = format!("/proc/{pid}/ns");
        ["pid", "mnt", "user"]
            .iter()
            .any(|kind| fs::metadata(format!("{dir}/{kind}")).is_ok_and(|meta| wanted.contains(&meta.ino())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(links: &[&str], mounts: &[&str], files: &[&str]) -> Host {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Host { links: set(links), mounts: set(mounts), files: files.iter().map(PathBuf::from).collect() }
    }

    #[test]
    fn only_what_is_new_and_ours_counts_as_left() {
        let before = host(&["lo", "ts0"], &["/"], &["/run/podtether"]);
        let after = host(
            &["lo", "ts0", "docker0", "tun0"],
            &["/", "/mnt", "/run/podtether/netns"],
            &["/run/podtether", "/tmp/other", "/tmp/podtether-x"],
        );
        let nowhere = BTreeSet::new();
        assert!(before.beyond(&before, &nowhere).is_empty());
        assert_eq!(
            after.beyond(&before, &nowhere),
            ["mount /run/podtether/netns", "interface tun0", "file /tmp/podtether-x"]
        );
    }

    #[test]
    fn processes_are_found_by_their_namespaces() {
        let own = fs::metadata("/proc/self/ns/user").unwrap().ino();
        assert!(processes_in(&BTreeSet::from([own])).any(|pid| pid == std::process::id()));
        assert!(namespaces(Path::new("/proc/self/ns")).is_empty());
    }
}
