//! Takes up the engine that an earlier supervisor left running.
//!
//! The process is found by its [trace](crate::trace) and believed only when everything agrees: pid and
//! start time of this boot, the peer of its socket, a `hello` that names the pod, and descriptors that
//! lead to this pod's TUN, ports and namespaces. What is found and does not agree is killed, so that the
//! plan goes on as if it had crashed.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use podtether_net::link::{DnsSockets, TUN_NAME};
use podtether_net::{Netns, tun};
use podtether_proto::calls::{self, KnownEngine};
use podtether_proto::engine::{Hello, Role};
use podtether_proto::{PROTO_VERSION, fds, transport};
use tokio::net::unix::pipe;

use crate::engine::{ANSWER_WITHIN, Home, Place, within};
use crate::record::Attachment;
use crate::restart::Cause;
use crate::spawn::Process;
use crate::trace::{self, Trace};

/// A living engine and everything that its supervisor keeps of it.
#[derive(Debug)]
pub struct Adopted {
    /// The process.
    pub process: Arc<Process>,
    /// The one connection to it.
    pub client: KnownEngine,
    /// What it said.
    pub hello: Hello,
    /// The uid it runs under.
    pub uid: u32,
    /// When it was started.
    pub since: Instant,
    /// Duplicates of its descriptors.
    pub descriptors: Descriptors,
    /// What it writes: stdout and stderr.
    pub output: [pipe::Receiver; 2],
    /// Which of the two sets of files it has.
    pub place: Place,
}

/// Duplicates of what the engine was born with, checked.
#[derive(Debug)]
pub struct Descriptors {
    /// The TUN.
    pub tun: OwnedFd,
    /// MagicDNS, IPv4 first.
    pub dns: Vec<DnsSockets>,
    /// Underlay.
    pub udp4: Option<UdpSocket>,
    /// Underlay.
    pub udp6: Option<UdpSocket>,
}

/// Why no engine was taken up, as a sentence's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotAdopted {
    /// There was none.
    None(String),
    /// There was one, and it was killed.
    Killed(String),
}

/// How long a killed process may take to be gone: one that the kernel holds on to is not waited for.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Looks for the engine of `record`; `uid` is what it would be given now, beside the recorded one. Of a
/// handover that its supervisor did not live to finish, the one process that is the node is left.
///
/// # Errors
/// There is none, or none that can be believed.
pub async fn adopt(
    home: &Home,
    record: &Attachment,
    uid: Option<u32>,
    link_netns: &Path,
) -> Result<Adopted, NotAdopted> {
    let mut found = Vec::new();
    let mut why = NotAdopted::None("no process was started".into());
    for home in Place::ALL.map(|place| home.clone().at(place)) {
        let trace = trace::read(&home.trace());
        let ended = trace.as_ref().map(|trace| format!("process {} has ended", trace.pid));
        if let Some((process, trace)) = trace.and_then(|trace| Some((find(&trace)?, trace))) {
            found.push((home, trace, process));
        } else if let Some(process) = untraced(&home, &record.pod.uid).await {
            end(&process, Cause::Unbelieved).await;
            let pid = process.pid();
            let what = format!("process {pid} was killed: the file that tells of it is damaged");
            why = NotAdopted::Killed(what);
        } else if let (Some(ended), NotAdopted::None(_)) = (ended, &why) {
            why = NotAdopted::None(ended);
        }
    }
    if let [(one, _, first), (other, _, second)] = found.as_slice() {
        let kept = settle(role(one, first).await, role(other, second).await);
        for (_, _, process) in found.iter().filter(|(home, ..)| Some(home.place()) != kept) {
            tracing::info!(
                pid = process.pid(),
                "a handover was not finished: this process is not the pod's node"
            );
            end(process, Cause::Replaced).await;
        }
        found.retain(|(home, ..)| Some(home.place()) == kept);
        why = NotAdopted::Killed("neither process of a handover was the pod's node".into());
    }
    let (home, trace, process) = found.pop().ok_or(why)?;
    let believed = async {
        let (client, hello, uid, descriptors) =
            believe(&process, &trace, &home, record, uid, link_netns).await?;
        let output = reopen(&process).map_err(|e| format!("its output cannot be read: {e}"))?;
        Ok::<_, String>((client, hello, uid, descriptors, output))
    };
    match believed.await {
        Ok((client, hello, uid, descriptors, output)) => {
            let since = Instant::now().checked_sub(age(&trace)).unwrap_or_else(Instant::now);
            let (process, place) = (Arc::new(process), home.place());
            Ok(Adopted { process, client, hello, uid, since, descriptors, output, place })
        }
        Err(why) => {
            end(&process, Cause::Unbelieved).await;
            Err(NotAdopted::Killed(format!("process {} was killed: {why}", process.pid())))
        }
    }
}

/// Which of two living processes of one engine is kept, by what they say they are: the one in charge, if
/// exactly one is. Without one, both have come too far to go back.
fn settle(first: Option<Role>, second: Option<Role>) -> Option<Place> {
    match (first, second) {
        (Some(Role::InCharge), Some(Role::InCharge)) => None,
        (Some(Role::InCharge), _) => Some(Place::First),
        (_, Some(Role::InCharge)) => Some(Place::Second),
        _ => None,
    }
}

/// What a process says that it is; `None` when it says nothing that can be believed.
async fn role(home: &Home, process: &Process) -> Option<Role> {
    let stream = tokio::net::UnixStream::connect(home.socket()).await.ok()?;
    let pid = stream.peer_cred().ok()?.pid().and_then(|pid| u32::try_from(pid).ok());
    if pid != Some(process.pid()) {
        return None;
    }
    let (_, hello) = calls::greet(transport::framed(stream), within(ANSWER_WITHIN)).await.ok()?;
    (!hello.pod_uid.is_empty()).then_some(hello.role)
}

/// Kills the processes that traces in `dirs` tell of, all at once, and waits a while until they are gone.
/// Their pids.
pub async fn end_left_behind(dirs: &[PathBuf]) -> Vec<u32> {
    let homes = dirs.iter().flat_map(|dir| Place::ALL.map(|place| Home::of(dir).at(place)));
    let living = |home: Home| trace::read(&home.trace()).as_ref().and_then(find);
    let processes: Vec<Process> = homes.filter_map(living).collect();
    join_all(processes.iter().map(|process| end(process, Cause::NoRecord))).await;
    processes.iter().map(Process::pid).collect()
}

async fn end(process: &Process, cause: Cause) {
    process.kill(cause);
    if tokio::time::timeout(GONE_WITHIN, process.ended()).await.is_err() {
        let pid = process.pid();
        tracing::error!(
            pid,
            "a killed engine is still there after {GONE_WITHIN:?}: the kernel holds on to it"
        );
    }
}

/// The engine of this pod whose trace is damaged: it would keep the pod's TUN from any other. It is who listens
/// on the socket in the pod's own directory and says so.
async fn untraced(home: &Home, pod_uid: &str) -> Option<Process> {
    let stream = tokio::net::UnixStream::connect(home.socket()).await.ok()?;
    let pid = stream.peer_cred().ok()?.pid().and_then(|pid| u32::try_from(pid).ok())?;
    let process = Process::adopted(pid).ok()?;
    // What does not answer may be anybody who has this pid by now.
    let (_, hello) = calls::greet(transport::framed(stream), within(ANSWER_WITHIN)).await.ok()?;
    (hello.pid == pid && hello.pod_uid == pod_uid).then_some(process)
}

/// The living process that left `trace`. Its pidfd is opened before it is looked at, so that it cannot become
/// another one in between.
fn find(trace: &Trace) -> Option<Process> {
    let process = Process::adopted(trace.pid).ok()?;
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", trace.pid)).ok()?;
    let boot_id = trace::boot_id().ok()?;
    (trace.is(&boot_id, &stat) && !process.has_ended()).then_some(process)
}

async fn believe(
    process: &Process,
    trace: &Trace,
    home: &Home,
    record: &Attachment,
    uid: Option<u32>,
    link_netns: &Path,
) -> Result<(KnownEngine, Hello, u32, Descriptors), String> {
    let stream = tokio::net::UnixStream::connect(home.socket())
        .await
        .map_err(|e| format!("nobody listens on its socket: {e}"))?;
    let peer = stream.peer_cred().map_err(|e| format!("its socket does not tell whose it is: {e}"))?;
    let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok());
    if pid != Some(process.pid()) {
        return Err(format!("its socket belongs to process {pid:?}"));
    }
    // A supervisor that started it with another uid than before may have died before it wrote that down.
    if record.uid.is_some_and(|recorded| recorded != peer.uid()) && uid != Some(peer.uid()) {
        return Err(format!("its socket belongs to uid {}", peer.uid()));
    }
    let greeted = calls::greet(transport::framed(stream), within(ANSWER_WITHIN)).await;
    let (client, hello) = greeted.map_err(|e| format!("it does not answer: {e}"))?;
    if !PROTO_VERSION.accepts(hello.version) {
        let (theirs, ours) = (hello.version, PROTO_VERSION);
        return Err(format!(
            "it speaks version {}.{}, which version {}.{} does not understand",
            theirs.major, theirs.minor, ours.major, ours.minor
        ));
    }
    if hello.role != Role::InCharge {
        return Err("it is no pod's node".to_owned());
    }
    if hello.pod_uid != record.pod.uid {
        return Err(match hello.pod_uid.as_str() {
            "" => "nobody had told it who it is".to_owned(),
            other => format!("it works for pod {other:?}"),
        });
    }
    if !record.name_servers.is_empty() && !home.is_intercepting(process.pid()) {
        return Err("its pod's questions for names were not led to it yet".to_owned());
    }
    let descriptors = take_back(process, trace, record, link_netns).map_err(|e| e.to_string())?;
    Ok((client, hello, peer.uid(), descriptors))
}

/// Duplicates of the descriptors, each looked at: an engine that was broken into may have put others at
/// their numbers.
fn take_back(
    process: &Process,
    trace: &Trace,
    record: &Attachment,
    link_netns: &Path,
) -> Result<Descriptors, Mismatch> {
    let link = Netns::open(link_netns)?;
    let node = Netns::current()?;
    let all = |name: &'static str| {
        let taken: io::Result<Vec<OwnedFd>> = trace.numbers(name).map(|n| process.descriptor(n)).collect();
        taken.map_err(|source| Mismatch::Gone { name, source })
    };
    let tun = all(fds::TUN)?.pop().ok_or(Mismatch::Not { name: fds::TUN, what: "one of its descriptors" })?;
    if Netns::of_tun(&tun)? != link || tun::name_of(&tun)? != TUN_NAME {
        return Err(Mismatch::Not { name: fds::TUN, what: "this pod's TUN" });
    }
    let underlay = |name, port: u16, v4: bool| -> Result<Option<UdpSocket>, Mismatch> {
        let Some(fd) = all(name)?.pop() else { return Ok(None) };
        let wrong = Mismatch::Not { name, what: "bound to the recorded port of this node" };
        if Netns::of_socket(&fd)? != node {
            return Err(wrong);
        }
        let socket = udp_socket(fd).ok_or(Mismatch::Not { name, what: "a UDP socket" })?;
        let bound = socket.local_addr().is_ok_and(|a: SocketAddr| a.is_ipv4() == v4 && a.port() == port);
        if bound && port != 0 { Ok(Some(socket)) } else { Err(wrong) }
    };
    let udp4 = underlay(fds::UDP4, record.udp4_port, true)?;
    let udp6 = underlay(fds::UDP6, record.udp6_port, false)?;
    let mut dns = Vec::new();
    for (udp, tcp) in all(fds::DNS)?.into_iter().zip(all(fds::DNS_TCP)?) {
        let wrong = || Mismatch::Not { name: fds::DNS, what: "this link's MagicDNS" };
        if Netns::of_socket(&udp)? != link || Netns::of_socket(&tcp)? != link {
            return Err(wrong());
        }
        dns.push(DnsSockets { udp: udp_socket(udp).ok_or_else(wrong)?, tcp: TcpListener::from(tcp) });
    }
    Ok(Descriptors { tun, dns, udp4, udp6 })
}

fn udp_socket(fd: OwnedFd) -> Option<UdpSocket> {
    use nix::sys::socket::{SockType, getsockopt, sockopt};
    (getsockopt(&fd, sockopt::SockType).ok()? == SockType::Datagram).then(|| UdpSocket::from(fd))
}

/// Why a descriptor is not believed.
#[derive(Debug, thiserror::Error)]
enum Mismatch {
    #[error("its descriptor {name} cannot be had: {source}")]
    Gone { name: &'static str, source: io::Error },
    #[error("its descriptor {name} is not {what}")]
    Not { name: &'static str, what: &'static str },
    #[error(transparent)]
    Net(#[from] podtether_net::Error),
}

/// Reading ends of its stdout and stderr. Opened anew through `/proc`: the engine writes on while nobody
/// reads, and what it wrote last is still in the pipe.
fn reopen(process: &Process) -> io::Result<[pipe::Receiver; 2]> {
    let open = |number: i32| {
        let path = format!("/proc/{}/fd/{number}", process.pid());
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(path.as_str(), flags, Mode::empty())?;
        pipe::Receiver::from_owned_fd(fd)
    };
    Ok([open(1)?, open(2)?])
}

/// How long ago the process was started.
fn age(trace: &Trace) -> Duration {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    let per_second = ticks.and_then(|ticks| u64::try_from(ticks).ok()).filter(|n| *n > 0).unwrap_or(100);
    let uptime =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    uptime.saturating_sub(Duration::from_millis(trace.start_ticks.saturating_mul(1000) / per_second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_of_a_handover_is_kept_or_none() {
        use Role::*;
        let table = [
            ("the successor gets ready", Some(InCharge), Some(Standby), Some(Place::First)),
            ("the same, the other way round", Some(Standby), Some(InCharge), Some(Place::Second)),
            ("it took over", Some(LetGo), Some(InCharge), Some(Place::Second)),
            ("it took over at the first place", Some(InCharge), Some(LetGo), Some(Place::First)),
            ("between the two", Some(LetGo), Some(Standby), None),
            ("the successor was not told who it is", Some(InCharge), None, Some(Place::First)),
            ("one hangs, the other waits", None, Some(Standby), None),
            ("one hangs, the other took over", None, Some(InCharge), Some(Place::Second)),
            ("asked before and after the takeover", Some(InCharge), Some(InCharge), None),
            ("neither answers", None, None, None),
            ("both wait", Some(Standby), Some(Standby), None),
            ("both let go", Some(LetGo), Some(LetGo), None),
        ];
        for (what, first, second, kept) in table {
            assert_eq!(settle(first, second), kept, "{what}");
        }
    }
}
