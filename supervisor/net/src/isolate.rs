//! A process in user, mount, network, PID, IPC and UTS namespaces of its own: what tests and the demo run
//! in. Needs root or unprivileged user namespaces, leaves nothing behind however it ends: the first
//! process inside is the PID namespace's init, so that everything below it dies with it, and every mount
//! and interface goes with the namespaces.
//!
//! Root keeps all its ids; anybody else is root inside with the one id they have.

use std::ffi::CStr;
use std::fs;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nix::mount::{MsFlags, mount};

use crate::error::{Error, Result, Step};
use crate::netlink::Netlink;
use crate::netns::Netns;

/// Set in an isolated process, to the directory that [`settle`] makes.
const MARK: &str = "PODTETHER_ISOLATED";

/// Starts `command` isolated. The child is a guard that mirrors the exit code of the process inside, ends
/// with the calling thread and leaves interrupts to the process inside.
///
/// # Errors
/// When namespaces cannot be made here, saying which switch forbids it.
pub fn spawn(command: Command) -> Result<Child> {
    start(command, true)
}

/// As [`spawn`], but root keeps its user namespace, and with it what the kernel grants in the first one alone:
/// socket buffers beyond the system's limit, above all. For measurements; anybody else gets what [`spawn`] gives.
///
/// # Errors
/// As [`spawn`].
pub fn spawn_keeping_root(command: Command) -> Result<Child> {
    start(command, !nix::unistd::geteuid().is_root())
}

fn start(mut command: Command, own_users: bool) -> Result<Child> {
    let step = || "start a process in namespaces of its own".to_owned();
    let ids = if own_users { Some(IdMaps::read().step(step)?) } else { None };
    let (mut pid_reader, pid_writer) = io::pipe().step(step)?;
    let (go_reader, go_writer) = io::pipe().step(step)?;
    command.env(MARK, "1");
    // SAFETY: `enter` makes plain system calls on memory that was prepared before the fork.
    unsafe {
        command.pre_exec(move || enter(&pid_writer, &go_reader, own_users));
    }
    // `Command::spawn` returns only after the exec, so the id maps are written from another thread.
    let mapper = std::thread::Builder::new()
        .name("id-maps".into())
        .spawn(move || write_maps(ids.as_ref(), &mut pid_reader, go_writer))
        .step(step)?;
    let child = command.spawn();
    // Closes this side's writer, so that the mapper ends when the child never asked.
    drop(command);
    let mapped = mapper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    match (child, mapped) {
        (Ok(child), _) => Ok(child),
        (Err(_), Err(e)) => Err(e).step(|| "map ids into a user namespace".into()),
        (Err(e), Ok(())) => Err(e).step(|| {
            "start a process in namespaces of its own (user namespaces may be switched off: \
             user.max_user_namespaces, kernel.unprivileged_userns_clone, \
             kernel.apparmor_restrict_unprivileged_userns)"
                .into()
        }),
    }
}

/// Whether this process was started by [`spawn`].
#[must_use]
pub fn is_isolated() -> bool {
    std::env::var_os(MARK).is_some()
}

/// The first thing an isolated process does: brings its loopback up and returns a directory on a fresh
/// tmpfs.
///
/// # Errors
/// As the kernel says.
pub async fn settle() -> Result<PathBuf> {
    let netlink = Netlink::open(&Netns::current()?).await?;
    if let Some(lo) = netlink.link("lo").await? {
        netlink.set_up(lo.index).await?;
    }
    let place = ["/run", "/mnt", "/tmp", "/var/tmp"]
        .into_iter()
        .map(Path::new)
        .find(|p| p.is_dir() && !in_use(p))
        .ok_or_else(|| Error::Invalid { what: "mount point", reason: "neither /run nor /tmp".into() })?;
    mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0755"))
        .step(|| format!("mount a tmpfs on {}", place.display()))?;
    let dir = place.join("podtether");
    fs::create_dir(&dir).step(|| format!("create {}", dir.display()))?;
    Ok(dir)
}

/// Hiding the program itself, or where it was called from, would break it.
fn in_use(place: &Path) -> bool {
    [std::env::current_exe(), std::env::current_dir()].into_iter().flatten().any(|p| p.starts_with(place))
}

/// The uid and gid maps of the user namespace to be.
struct IdMaps {
    uids: String,
    gids: String,
    deny_setgroups: bool,
}

impl IdMaps {
    fn read() -> io::Result<Self> {
        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        if !uid.is_root() {
            return Ok(Self { uids: format!("0 {uid} 1"), gids: format!("0 {gid} 1"), deny_setgroups: true });
        }
        let own = |file: &str| fs::read_to_string(file).map(|map| same_inside(&map));
        Ok(Self { uids: own("/proc/self/uid_map")?, gids: own("/proc/self/gid_map")?, deny_setgroups: false })
    }

    fn write(&self, pid: i32) -> io::Result<()> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        if self.deny_setgroups {
            fs::write(dir.join("setgroups"), "deny")?;
        }
        fs::write(dir.join("uid_map"), &self.uids)?;
        fs::write(dir.join("gid_map"), &self.gids)
    }
}

/// Waits for the child to say its pid, writes its maps if it needs any and lets it go on.
fn write_maps(ids: Option<&IdMaps>, pid: &mut PipeReader, mut go: PipeWriter) -> io::Result<()> {
    let mut raw = [0; 4];
    if pid.read_exact(&mut raw).is_err() {
        return Ok(());
    }
    if let Some(ids) = ids {
        ids.write(i32::from_ne_bytes(raw))?;
    }
    go.write_all(&[1])
}

/// Every id that exists here, mapped to itself.
fn same_inside(map: &str) -> String {
    let lines = map.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (inside, count) = (fields.next()?, fields.nth(1)?);
        Some(format!("{inside} {inside} {count}\n"))
    });
    lines.collect()
}

/// Between fork and exec. Two processes leave this function's middle: the guard, which never returns, and
/// the init of the new PID namespace, which goes on to exec.
fn enter(pid: &PipeWriter, go: &PipeReader, own_users: bool) -> io::Result<()> {
    let own = std::process::id().to_ne_bytes();
    let flags = if own_users { libc::CLONE_NEWUSER } else { 0 }
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS;
    // SAFETY: plain system call without pointers.
    check(unsafe { libc::unshare(flags) })?;
    let mut byte = [0_u8; 1];
    write_all(pid.as_raw_fd(), &own)?;
    // SAFETY: reads one byte into a buffer of one byte.
    let read = unsafe { libc::read(go.as_raw_fd(), byte.as_mut_ptr().cast(), 1) };
    if read != 1 {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    // Ids are set anew so that files made from here on belong to the root inside.
    // SAFETY: plain system call.
    check(unsafe { libc::setresgid(0, 0, 0) })?;
    // SAFETY: plain system call.
    check(unsafe { libc::setresuid(0, 0, 0) })?;
    mount_raw(c"none", c"/", c"none", libc::MS_REC | libc::MS_PRIVATE)?;
    // SAFETY: this process has one thread since its own fork.
    let init = check(unsafe { libc::fork() })?;
    if init > 0 {
        guard(init);
    }
    die_with_parent()?;
    mount_raw(c"proc", c"/proc", c"proc", libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC)
}

/// Waits for the process inside and ends as it did.
fn guard(init: libc::pid_t) -> ! {
    // SAFETY: plain system call; keeps the caller's pipes from staying open here.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: SIG_IGN is a valid disposition.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    if die_with_parent().is_ok() {
        let mut status = 0;
        loop {
            // SAFETY: `status` outlives the call.
            let waited = unsafe { libc::waitpid(init, &raw mut status, 0) };
            if waited == init {
                let code = if libc::WIFEXITED(status) {
                    libc::WEXITSTATUS(status)
                } else {
                    128 + libc::WTERMSIG(status)
                };
                // SAFETY: ends this process without running anything of the caller's.
                unsafe { libc::_exit(code) };
            }
            if waited < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
                break;
            }
        }
    }
    // SAFETY: as above.
    unsafe { libc::_exit(125) }
}

fn die_with_parent() -> io::Result<()> {
    // SAFETY: PR_SET_PDEATHSIG takes its argument by value.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }).map(drop)
}

fn mount_raw(source: &CStr, target: &CStr, kind: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the strings outlive the call; no data is passed.
    let result =
        unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) };
    check(result).map(drop)
}

fn write_all(fd: RawFd, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: the buffer outlives the call and has the length given; four bytes never split in a pipe.
    let written = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::in_namespaces;

    #[test]
    fn maps_keep_every_id_that_exists() {
        assert_eq!(same_inside("         0          0 4294967295\n"), "0 0 4294967295\n");
        assert_eq!(same_inside("0 1000 1\n1 100000 65536\n"), "0 0 1\n1 1 65536\n");
    }

    #[test]
    fn the_process_inside_is_root_alone_and_its_end_is_passed_on() {
        in_namespaces("isolate::tests::the_process_inside_is_root_alone_and_its_end_is_passed_on", |dir| {
            assert!(nix::unistd::geteuid().is_root());
            assert_eq!(std::process::id(), 1);
            let processes = fs::read_dir("/proc")
                .unwrap()
                .filter_map(|e| e.unwrap().file_name().to_str()?.parse::<u32>().ok())
                .count();
            assert_eq!(processes, 1, "nobody else is seen");
            fs::write(dir.join("file"), "x").unwrap();

            for (script, code) in [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)] {
                let mut command = Command::new("/bin/sh");
                // One level deeper, where the shell is not the namespace's init.
                command.args(["-c", &format!("/bin/sh -c '{script}'")]);
                assert_eq!(spawn(command).unwrap().wait().unwrap().code(), Some(code), "{script}");
            }
            assert!(spawn(Command::new("/no/such/program")).is_err());
        });
    }
}
