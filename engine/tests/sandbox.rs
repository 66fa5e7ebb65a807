//! What a confined process cannot do any more, tried, and what it still can.
//!
//! The engine's own module confines a child of the test, one child per attempt. The list of system calls ends a
//! process at what lies behind it, so each layer is also tried without those above it.

#![allow(clippy::unwrap_used)]
#![allow(clippy::print_stdout, reason = "the harness shows what a failed test printed")]

mod common;
#[path = "../src/confine/mod.rs"]
#[allow(dead_code, unreachable_pub)]
mod confine;

use std::ffi::CStr;
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use common::{Join, PATIENCE, Pod, patient, underlay_addresses};
use confine::{Ids, Report, confine, landlock};
use nix::sys::signal::Signal::{self, SIGABRT, SIGSYS, SIGXFSZ};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig, RegionConfig};
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::exit::EngineExit;
use podtether_proto::sandbox::{Step, StepState};

/// Uids of two engines, where ids are mapped.
const OWN: u32 = 4000;
const OTHER: u32 = 5000;

/// How much is given up before an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layer {
    /// Nothing, to see that an attempt would succeed.
    None,
    /// Ids, capabilities, limits.
    Ids,
    /// And Landlock.
    Landlock,
    /// And the list of calls: everything.
    All,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Worked,
    Refused(nix::errno::Errno),
    Killed(Signal),
}

fn ids_are_mapped() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    map.lines().any(|line| line.split_whitespace().nth(2).is_some_and(|n| n.parse::<u64>().unwrap() > 10_000))
}

fn ids(uid: u32) -> Ids {
    let uid = ids_are_mapped().then_some(uid);
    Ids { uid, gid: uid, require_all: false }
}

/// Tries `attempt` in a child that is confined to `layer`. It returns what a system call does: less than
/// zero for failure, with errno set.
fn tried(layer: Layer, attempt: impl Fn() -> i64) -> Outcome {
    let ids = ids(OWN);
    // SAFETY: the child makes system calls and allocates, which glibc allows after a fork; it never returns.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, 0) => Outcome::Worked,
            WaitStatus::Exited(_, errno) => Outcome::Refused(nix::errno::Errno::from_raw(errno)),
            WaitStatus::Signaled(_, signal, _) => Outcome::Killed(signal),
            other @ (WaitStatus::Stopped(..)
            | WaitStatus::PtraceEvent(..)
            | WaitStatus::PtraceSyscall(_)
            | WaitStatus::Continued(_)
            | WaitStatus::StillAlive) => panic!("{other:?}"),
        },
        ForkResult::Child => {
            let mut report = Report::default();
            let ready = match layer {
                Layer::None => true,
                Layer::Ids => confine::give_up(ids, &mut report).is_ok(),
                Layer::Landlock => {
                    confine::give_up(ids, &mut report).is_ok() && confine::shut_out(&mut report).is_ok()
                }
                Layer::All => confine(ids, None, || Ok(())).is_ok(),
            };
            // Codes of ready-made failures, beyond every errno.
            let code = match ready {
                false => 201,
                true if attempt() < 0 => nix::errno::Errno::last_raw(),
                true => 0,
            };
            // SAFETY: ends the child, running nothing of the test's.
            unsafe { libc::_exit(code) }
        }
    }
}

/// A child that waits to be killed, confined as another engine is.
struct Sibling(Pid);

impl Sibling {
    fn new() -> Self {
        let ids = ids(OTHER);
        let (mut ready, tell) = std::io::pipe().unwrap();
        // SAFETY: as in `tried`.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => {
                drop(tell);
                let mut byte = [0];
                std::io::Read::read_exact(&mut ready, &mut byte).unwrap();
                Self(child)
            }
            ForkResult::Child => {
                let mut report = Report::default();
                let _ = confine::give_up(ids, &mut report);
                let _ = std::io::Write::write(&mut &tell, b"x");
                loop {
                    // SAFETY: waits.
                    unsafe { libc::pause() };
                }
            }
        }
    }
}

impl Drop for Sibling {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// Returns what a system call returns.
type Attempt = Box<dyn Fn() -> i64>;

/// A system call with up to six numbers.
fn call(number: libc::c_long, args: &[i64]) -> i64 {
    let arg = |n: usize| args.get(n).copied().unwrap_or(0);
    // SAFETY: the attempts pass numbers, or pointers to what outlives the call.
    unsafe { libc::syscall(number, arg(0), arg(1), arg(2), arg(3), arg(4), arg(5)) }
}

fn pointer<T>(to: &T) -> i64 {
    i64::try_from(std::ptr::from_ref(to).addr()).unwrap()
}

fn text(text: &'static CStr) -> i64 {
    i64::try_from(text.as_ptr().addr()).unwrap()
}

fn open(path: &'static CStr, flags: i32) -> i64 {
    call(libc::SYS_openat, &[libc::AT_FDCWD.into(), text(path), flags.into(), 0o600])
}

fn stream_socket() -> i64 {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    call(libc::SYS_socket, &[libc::AF_INET.into(), kind.into(), 0])
}

fn loopback(port: u16) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET.try_into().unwrap(),
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, 1]) },
        sin_zero: [0; 8],
    }
}

fn on_address(number: libc::c_long, fd: i64, address: &libc::sockaddr_in) -> i64 {
    call(number, &[fd, pointer(address), size_of::<libc::sockaddr_in>().try_into().unwrap()])
}

/// A connect that does not wait: under way is good.
fn connect(port: u16) -> i64 {
    match on_address(libc::SYS_connect, stream_socket(), &loopback(port)) {
        -1 if nix::errno::Errno::last() == nix::errno::Errno::EINPROGRESS => 0,
        result => result,
    }
}

fn unix_address(path: &Path) -> libc::sockaddr_un {
    // SAFETY: all zero is a valid address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX.try_into().unwrap();
    for (slot, byte) in address.sun_path.iter_mut().zip(path.as_os_str().as_encoded_bytes()) {
        *slot = libc::c_char::from_ne_bytes([*byte]);
    }
    address
}

#[test]
fn a_forbidden_call_is_the_last() {
    in_namespaces("a_forbidden_call_is_the_last", |_| {
        let sibling = Sibling::new();
        let pid = i64::from(sibling.0.as_raw());
        let address = loopback(9);
        let exec_map = libc::PROT_READ | libc::PROT_EXEC;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let one: libc::c_int = 1;
        let attempts: Vec<(&str, Attempt)> = vec![
            ("open a file", Box::new(|| open(c"/etc/passwd", libc::O_RDONLY))),
            ("open by openat2", Box::new(|| call(libc::SYS_openat2, &[-100, text(c"/etc/passwd"), 0, 0]))),
            ("write to /proc/self", Box::new(|| open(c"/proc/self/mem", libc::O_RDWR))),
            ("stat a file", Box::new(|| call(libc::SYS_statx, &[-100, text(c"/etc/passwd"), 0, 0, 0]))),
            ("read a link", Box::new(|| call(libc::SYS_readlinkat, &[-100, text(c"/proc/self/exe"), 0, 0]))),
            ("remove a file", Box::new(|| call(libc::SYS_unlinkat, &[-100, text(c"/no/such"), 0]))),
            ("exec", Box::new(|| call(libc::SYS_execve, &[text(c"/bin/true"), 0, 0]))),
            ("exec a descriptor", Box::new(|| call(libc::SYS_execveat, &[0, text(c""), 0, 0, 0x1000]))),
            ("a file in memory", Box::new(|| call(libc::SYS_memfd_create, &[text(c"x"), 0]))),
            ("fork or thread", Box::new(|| call(libc::SYS_clone, &[libc::SIGCHLD.into()]))),
            ("fork or thread by clone3", Box::new(|| call(libc::SYS_clone3, &[]))),
            (
                "ptrace a sibling",
                Box::new(move || call(libc::SYS_ptrace, &[libc::PTRACE_ATTACH.into(), pid])),
            ),
            ("read a sibling's memory", Box::new(move || call(libc::SYS_process_vm_readv, &[pid]))),
            ("write a sibling's memory", Box::new(move || call(libc::SYS_process_vm_writev, &[pid]))),
            ("a handle on a sibling", Box::new(move || call(libc::SYS_pidfd_open, &[pid]))),
            ("a descriptor of a sibling", Box::new(|| call(libc::SYS_pidfd_getfd, &[0, 0]))),
            ("kill a sibling", Box::new(move || call(libc::SYS_kill, &[pid, libc::SIGKILL.into()]))),
            ("abort a sibling", Box::new(move || call(libc::SYS_tgkill, &[pid, pid, libc::SIGABRT.into()]))),
            (
                "another signal to itself",
                Box::new(|| {
                    let own = std::process::id().into();
                    call(libc::SYS_tgkill, &[own, own, libc::SIGKILL.into()])
                }),
            ),
            (
                "a netlink socket",
                Box::new(|| call(libc::SYS_socket, &[libc::AF_NETLINK.into(), libc::SOCK_RAW.into()])),
            ),
            (
                "a raw socket",
                Box::new(|| call(libc::SYS_socket, &[libc::AF_INET.into(), libc::SOCK_RAW.into(), 1])),
            ),
            (
                "a packet socket",
                Box::new(|| call(libc::SYS_socket, &[libc::AF_PACKET.into(), libc::SOCK_RAW.into()])),
            ),
            (
                "a Unix socket",
                Box::new(|| call(libc::SYS_socket, &[libc::AF_UNIX.into(), libc::SOCK_STREAM.into()])),
            ),
            (
                "a pair of datagram sockets",
                Box::new(|| call(libc::SYS_socketpair, &[libc::AF_UNIX.into(), libc::SOCK_DGRAM.into()])),
            ),
            ("a vsock", Box::new(|| call(libc::SYS_socket, &[libc::AF_VSOCK.into(), 0x80801]))),
            (
                "MPTCP, past Landlock",
                Box::new(|| call(libc::SYS_socket, &[libc::AF_INET.into(), 0x80801, 262])),
            ),
            (
                "TCP fast open, past Landlock",
                Box::new(move || {
                    let flags = libc::MSG_FASTOPEN.into();
                    call(libc::SYS_sendto, &[stream_socket(), text(c"x"), 1, flags, pointer(&address), 16])
                }),
            ),
            ("bind", Box::new(move || on_address(libc::SYS_bind, stream_socket(), &address))),
            ("listen", Box::new(|| call(libc::SYS_listen, &[3, 1]))),
            (
                "bind to a device",
                Box::new(move || {
                    let option = [
                        stream_socket(),
                        libc::SOL_SOCKET.into(),
                        libc::SO_BINDTODEVICE.into(),
                        pointer(&one),
                        4,
                    ];
                    call(libc::SYS_setsockopt, &option)
                }),
            ),
            ("an option of a protocol", Box::new(|| call(libc::SYS_getsockopt, &[stream_socket(), 6, 11]))),
            ("a signal owner", Box::new(move || call(libc::SYS_fcntl, &[0, libc::F_SETOWN.into(), pid]))),
            ("the terminal", Box::new(|| call(libc::SYS_ioctl, &[0, 0x5412]))),
            ("a TUN of its own", Box::new(|| call(libc::SYS_ioctl, &[0, 0x4004_54ca]))),
            ("mount", Box::new(|| call(libc::SYS_mount, &[text(c"x"), text(c"/"), text(c"tmpfs"), 0, 0]))),
            ("another root", Box::new(|| call(libc::SYS_chroot, &[text(c"/")]))),
            ("another namespace", Box::new(|| call(libc::SYS_setns, &[0, 0]))),
            ("a user namespace", Box::new(|| call(libc::SYS_unshare, &[libc::CLONE_NEWUSER.into()]))),
            ("io_uring", Box::new(|| call(libc::SYS_io_uring_setup, &[1, 0]))),
            ("BPF programs", Box::new(|| call(libc::SYS_bpf, &[0, 0, 0]))),
            ("performance counters", Box::new(|| call(libc::SYS_perf_event_open, &[0, 0, -1, -1, 0]))),
            ("page faults", Box::new(|| call(libc::SYS_userfaultfd, &[0]))),
            ("the key ring", Box::new(|| call(libc::SYS_keyctl, &[0, 0]))),
            ("prctl", Box::new(|| call(libc::SYS_prctl, &[libc::PR_SET_DUMPABLE.into(), 1]))),
            ("another uid", Box::new(|| call(libc::SYS_setuid, &[0]))),
            ("wider limits", Box::new(|| call(libc::SYS_prlimit64, &[0, 7, 0, 0]))),
            ("another list of calls", Box::new(|| call(libc::SYS_seccomp, &[1, 0, 0]))),
            (
                "map code",
                Box::new(move || call(libc::SYS_mmap, &[0, 4096, exec_map.into(), private.into(), -1, 0])),
            ),
            ("make memory code", Box::new(|| call(libc::SYS_mprotect, &[0, 4096, libc::PROT_EXEC.into()]))),
        ];
        for (what, attempt) in &attempts {
            assert_eq!(tried(Layer::All, attempt), Outcome::Killed(SIGSYS), "{what}");
        }
    });
}

#[test]
fn landlock_holds_by_itself() {
    in_namespaces("landlock_holds_by_itself", |_| {
        use nix::errno::Errno::{EACCES, EPERM};
        let abi = landlock::abi().expect("these tests need a kernel with Landlock");
        let read: Attempt = Box::new(|| open(c"/etc/passwd", libc::O_RDONLY));
        let list: Attempt = Box::new(|| open(c"/proc", libc::O_RDONLY | libc::O_DIRECTORY));
        for attempt in [&read, &list] {
            assert_eq!(tried(Layer::Ids, attempt), Outcome::Worked);
            assert_eq!(tried(Layer::Landlock, attempt), Outcome::Refused(EACCES));
        }
        let make = || open(c"/tmp/podtether-sandbox", libc::O_CREAT | libc::O_WRONLY);
        assert_eq!(tried(Layer::Landlock, make), Outcome::Refused(EACCES));
        assert!(!Path::new("/tmp/podtether-sandbox").exists());
        let exec = || call(libc::SYS_execve, &[text(c"/bin/true"), 0, 0]);
        assert_eq!(tried(Layer::Landlock, exec), Outcome::Refused(EACCES));
        if abi >= landlock::ABI_TCP {
            let (good, bad) =
                (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
            let [good, bad] = [&good, &bad].map(|l| l.local_addr().unwrap().port());
            let bind = || on_address(libc::SYS_bind, stream_socket(), &loopback(0));
            assert_eq!(tried(Layer::Ids, bind), Outcome::Worked);
            assert_eq!(tried(Layer::Landlock, bind), Outcome::Refused(EACCES));
            for (port, expected) in [(good, Outcome::Worked), (bad, Outcome::Refused(EACCES))] {
                // The list comes last, as it does in an engine: when it knows the relays.
                let attempt = || match landlock::connect_only(&[80, good]) {
                    Ok(()) => connect(port),
                    Err(_) => -1,
                };
                assert_eq!(tried(Layer::None, || connect(port)), Outcome::Worked);
                assert_eq!(tried(Layer::All, attempt), expected, "port {port}, {good} is allowed");
            }
        }
        if abi >= landlock::ABI_SCOPE {
            let sibling = Sibling::new();
            let pid = i64::from(sibling.0.as_raw());
            let kill = || call(libc::SYS_kill, &[pid, 0]);
            assert_eq!(tried(Layer::None, kill), Outcome::Worked);
            assert_eq!(tried(Layer::Landlock, kill), Outcome::Refused(EPERM));
        }
    });
}

#[test]
fn ids_and_limits_hold_by_themselves() {
    in_namespaces("ids_and_limits_hold_by_themselves", |dir| {
        use nix::errno::Errno::{EACCES, EAGAIN, EMFILE, ENOMEM, EPERM};
        let raw = || call(libc::SYS_socket, &[libc::AF_INET.into(), libc::SOCK_RAW.into(), 1]);
        let packet = || call(libc::SYS_socket, &[libc::AF_PACKET.into(), libc::SOCK_RAW.into(), 0]);
        let mount = || call(libc::SYS_mount, &[text(c"x"), text(c"/tmp"), text(c"tmpfs"), 0, 0]);
        assert_eq!(tried(Layer::None, raw), Outcome::Worked);
        for attempt in [&raw as &dyn Fn() -> i64, &packet, &mount] {
            assert_eq!(tried(Layer::Ids, attempt), Outcome::Refused(EPERM));
        }
        let many = || {
            let mut last = 0;
            while last >= 0 {
                last = stream_socket();
            }
            last
        };
        assert_eq!(tried(Layer::Ids, many), Outcome::Refused(EMFILE));
        let locked = || call(libc::SYS_mlockall, &[libc::MCL_FUTURE.into()]);
        assert_eq!(tried(Layer::Ids, locked), Outcome::Refused(EPERM));
        // Memory: the allocator is refused, and only that process feels it.
        let memory = || {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let rw = libc::PROT_READ | libc::PROT_WRITE;
            call(libc::SYS_mmap, &[0, 600 << 20, rw.into(), flags.into(), -1, 0])
        };
        assert_eq!(tried(Layer::None, memory), Outcome::Worked);
        for layer in [Layer::Ids, Layer::All] {
            assert_eq!(tried(layer, memory), Outcome::Refused(ENOMEM));
        }
        // A file that it was given grows no further than two snapshots.
        let file = tempfile::tempfile_in(dir).unwrap();
        let fd = i64::from(std::os::fd::AsRawFd::as_raw_fd(&file));
        let within = || call(libc::SYS_pwrite64, &[fd, text(c"x"), 1, (16 << 20) - 1]);
        let beyond = || call(libc::SYS_pwrite64, &[fd, text(c"x"), 1, 16 << 20]);
        assert_eq!(tried(Layer::All, within), Outcome::Worked);
        assert_eq!(tried(Layer::All, beyond), Outcome::Killed(SIGXFSZ));

        if !ids_are_mapped() {
            println!("no other ids are mapped here: what separates uids is not tried");
            return;
        }
        let sibling = Sibling::new();
        let pid = i64::from(sibling.0.as_raw());
        let socket = dir.join("engine.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&socket, private).unwrap();
        let open_to_all: std::fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir, open_to_all).unwrap();
        let address = unix_address(&socket);
        let size = size_of::<libc::sockaddr_un>().try_into().unwrap();
        let others_socket = || {
            let fd = call(libc::SYS_socket, &[libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0]);
            call(libc::SYS_connect, &[fd, pointer(&address), size])
        };
        assert_eq!(tried(Layer::None, others_socket), Outcome::Worked);
        assert_eq!(tried(Layer::Ids, others_socket), Outcome::Refused(EACCES));
        let kill = || call(libc::SYS_kill, &[pid, libc::SIGKILL.into()]);
        let trace = || call(libc::SYS_ptrace, &[libc::PTRACE_SEIZE.into(), pid, 0, 0]);
        let piece = libc::iovec { iov_base: (&raw const address).cast_mut().cast(), iov_len: 1 };
        let look = || call(libc::SYS_process_vm_readv, &[pid, pointer(&piece), 1, pointer(&piece), 1, 0]);
        assert_eq!(tried(Layer::Ids, kill), Outcome::Refused(EPERM));
        assert_eq!(tried(Layer::Ids, trace), Outcome::Refused(EPERM));
        assert_eq!(tried(Layer::Ids, look), Outcome::Refused(EPERM));
        let fork = || match call(libc::SYS_clone, &[libc::SIGCHLD.into()]) {
            // SAFETY: the child of the child ends at once.
            0 => unsafe { libc::_exit(0) },
            result => result,
        };
        assert_eq!(tried(Layer::Ids, fork), Outcome::Refused(EAGAIN));
    });
}

#[test]
fn what_an_engine_needs_still_works() {
    in_namespaces("what_an_engine_needs_still_works", |_| {
        let worked = |attempt: &dyn Fn() -> i64| assert_eq!(tried(Layer::All, attempt), Outcome::Worked);
        // What the allocator does, call by call: a test's thread has another kind of heap than an engine.
        worked(&|| call(libc::SYS_brk, &[0]));
        worked(&|| {
            let rw = libc::PROT_READ | libc::PROT_WRITE;
            let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let at = call(libc::SYS_mmap, &[0, 1 << 20, rw.into(), private.into(), -1, 0]);
            let moved = call(libc::SYS_mremap, &[at, 1 << 20, 1 << 24, libc::MREMAP_MAYMOVE.into()]);
            let failed = [
                call(libc::SYS_mprotect, &[moved, 4096, libc::PROT_READ.into()]),
                call(libc::SYS_madvise, &[moved, 1 << 24, libc::MADV_DONTNEED.into()]),
                call(libc::SYS_madvise, &[moved, 1 << 24, libc::MADV_FREE.into()]),
                call(libc::SYS_munmap, &[moved, 1 << 24]),
            ];
            failed.into_iter().min().unwrap_or(-1).min(at).min(moved)
        });
        worked(&|| {
            let mut bytes = [0; 32];
            if getrandom::fill(&mut bytes).is_ok() && bytes != [0; 32] { 0 } else { -1 }
        });
        worked(&|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let Ok(runtime) = runtime else { return -1 };
            runtime.block_on(async {
                tokio::time::sleep(Duration::from_millis(1)).await;
                match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
                    Ok(_) => 0,
                    Err(_) => -1,
                }
            })
        });
        assert_eq!(tried(Layer::All, || std::process::abort()), Outcome::Killed(SIGABRT));
        let mutex = std::sync::Mutex::new(());
        worked(&|| i64::from(mutex.lock().is_err()) - i64::from(mutex.is_poisoned()));
    });
}

#[test]
fn an_engine_reports_what_holds() {
    in_namespaces("an_engine_reports_what_holds", |dir| {
        block_on(async {
            let devnet = Devnet::start(DevnetConfig::default()).await.unwrap();
            let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() });
            let join = Join {
                control_url: devnet.https_url(),
                ca_pem: devnet.ca_pem().to_owned(),
                auth_key: Some(key.secret),
                addresses: underlay_addresses(&["10.99.0.1/32"]).await,
            };
            let mut pod = Pod::make(dir, "pod").await;
            pod.ids = ids(OWN).uid;
            pod.join(&join).await;
            let pid = pod.engine.as_ref().unwrap().child.id();
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapBnd:\t0000000000000000", "Threads:\t1"] {
                assert!(status.contains(line), "{line} in {status}");
            }
            let held = |step: Step, s: &podtether_proto::engine::EngineStatus| {
                s.sandbox.iter().any(|r| r.step == step.name() && r.state == StepState::Held)
            };
            let abi = landlock::abi().unwrap();
            let told = pod.wait(|s| abi < landlock::ABI_TCP || held(Step::Ports, s)).await.sandbox;
            let state = |step: Step| told.iter().find(|r| r.step == step.name()).map(|r| r.state);
            let own = if ids_are_mapped() { StepState::Held } else { StepState::NotOffered };
            assert_eq!(state(Step::Uid), Some(own));
            for step in [Step::Capabilities, Step::NoNewPrivs, Step::Limits, Step::NoFiles, Step::Calls] {
                assert_eq!(state(step), Some(StepState::Held), "{step:?}");
            }

            // As the supervisor's signal does it.
            nix::sys::signal::kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGTERM).unwrap();
            let (_, reason) = pod.ended().await;
            assert_eq!(reason.unwrap().exit, EngineExit::Stopped);
        });
    });
}

#[test]
fn a_relay_on_another_port_costs_one_restart() {
    in_namespaces("a_relay_on_another_port_costs_one_restart", |dir| {
        block_on(async {
            if landlock::abi().unwrap() < landlock::ABI_TCP {
                println!("this kernel has no rules for TCP ports: nothing is shut, nothing to restart for");
                return;
            }
            let addresses = underlay_addresses(&["10.99.0.1/32"]).await;
            let tailnet = async |region: u32| {
                let regions = vec![RegionConfig::new(region, vec!["127.0.0.1".parse().unwrap()])];
                let config = DevnetConfig { regions, ..DevnetConfig::default() };
                let devnet = Devnet::start(config).await.unwrap();
                let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..Default::default() });
                let join = Join {
                    control_url: devnet.https_url(),
                    ca_pem: devnet.ca_pem().to_owned(),
                    auth_key: Some(key.secret),
                    addresses: addresses.clone(),
                };
                (devnet, join)
            };
            let ports = |status: &podtether_proto::engine::EngineStatus| {
                let report = status.sandbox.iter().find(|r| r.step == Step::Ports.name()).unwrap();
                (report.state, report.why.clone())
            };
            let (first, join) = tailnet(1).await;
            let mut pod = Pod::make(dir, "pod").await;
            pod.join(&join).await;
            let status = pod.wait(|s| s.home_derp == 1 && ports(s).0 == StepState::Held).await;
            let relay = first.regions()[0].derp_port.to_string();
            assert!(ports(&status).1.contains(&relay), "{:?} without {relay}", ports(&status));
            pod.client().stop(patient()).await.unwrap();
            pod.ended().await;

            // The snapshot's map names the first relay; the control server of now names another.
            let (second, join) = tailnet(2).await;
            pod.start(&join).await;
            let (_, reason) = pod.ended().await;
            let reason = reason.unwrap();
            assert_eq!(reason.exit, EngineExit::NewPorts, "{reason:?}");
            let relay = second.regions()[0].derp_port.to_string();
            assert!(reason.reason.contains(&relay), "{reason:?}");
            pod.start(&Join { auth_key: None, ..join }).await;
            let status = pod.wait(|s| s.home_derp == 2 && s.control_connected).await;
            assert!(ports(&status).1.contains(&relay), "{:?} without {relay}", ports(&status));
            let key = podtether_core::key::NodePrivate::from_bytes(pod.node_key).public();
            let began = std::time::Instant::now();
            while !second.is_on_relay(2, &key) {
                assert!(began.elapsed() < PATIENCE, "not connected to the relay");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
    });
}

/// What it adds to each start of an engine, a restart's included.
#[test]
fn confining_takes_next_to_no_time() {
    in_namespaces("confining_takes_next_to_no_time", |_| {
        let mut took: Vec<u64> = (0..20).map(|_| microseconds_to_confine()).collect();
        took.sort_unstable();
        println!("confined in {} us, {} at most", took[took.len() / 2], took[took.len() - 1]);
        // Of a restart that may cost 50 ms in all.
        assert!(took[took.len() / 2] < 20_000, "{took:?}");
    });
}

fn microseconds_to_confine() -> u64 {
    let (mut result, tell) = std::io::pipe().unwrap();
    let ids = ids(OWN);
    // SAFETY: as in `tried`.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => {
            drop(tell);
            let mut bytes = [0; 8];
            std::io::Read::read_exact(&mut result, &mut bytes).unwrap();
            waitpid(child, None).unwrap();
            u64::from_ne_bytes(bytes)
        }
        ForkResult::Child => {
            let began = std::time::Instant::now();
            let confined = confine(ids, None, || Ok(()));
            let took = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            let told = std::io::Write::write(&mut &tell, &took.to_ne_bytes());
            // SAFETY: ends the child, running nothing of the test's.
            unsafe { libc::_exit(i32::from(confined.is_err() || told.is_err())) }
        }
    }
}
