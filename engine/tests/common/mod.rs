//! Plays the supervisor: makes a pod's link, spawns the engine with its descriptors, calls it.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};
use podtether_net::link::{self, LinkSpec, PodConfig};
use podtether_net::netlink::Netlink;
use podtether_net::netns::prepare_dir;
use podtether_net::sockets::{Family, PortChoice, underlay};
use podtether_net::{Netns, sockets};
use podtether_proto::engine::{EngineClient, EngineStatus, NodeState, PodRef, StartRequest, Underlay};
use podtether_proto::exit::ExitReason;
use podtether_proto::secret::{SecretKey, SecretString};
use podtether_proto::{fds, transport};
use tarpc::{client, context};

pub const ENGINE: &str = env!("CARGO_BIN_EXE_podtether-engine");

/// The engine of this build, or the one that `PODTETHER_TEST_ENGINE` names: a release is tested like that.
fn engine() -> PathBuf {
    std::env::var_os("PODTETHER_TEST_ENGINE").map_or_else(|| ENGINE.into(), PathBuf::from)
}
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A pod with its link, and the engine of now.
pub struct Pod {
    pub name: String,
    pub spec: LinkSpec,
    pub link: link::Link,
    tun: OwnedFd,
    udp4: UdpSocket,
    udp6: Option<UdpSocket>,
    dns: Vec<link::DnsSockets>,
    snapshot: File,
    reason: PathBuf,
    dir: PathBuf,
    /// The node's namespace; `None` for the test's own.
    node: Option<Netns>,
    machine_key: [u8; 32],
    pub node_key: [u8; 32],
    /// The public part of the node key before this one, until control knows of the newer.
    old_node_key: Option<[u8; 32]>,
    lives: u32,
    /// Uid and gid for the engine.
    pub ids: Option<u32>,
    pub engine: Option<Running>,
}

/// A living engine.
pub struct Running {
    pub child: Child,
    pub client: EngineClient,
}

/// What to start an engine with, besides the pod.
#[derive(Clone, Default)]
pub struct Join {
    pub control_url: String,
    pub ca_pem: String,
    pub auth_key: Option<String>,
    pub addresses: Vec<IpAddr>,
}

/// Context with room for a long poll.
pub fn patient() -> context::Context {
    let mut context = context::current();
    context.deadline = Instant::now() + Duration::from_secs(30);
    context
}

/// Gives the namespace's loopback these addresses, so that there is an underlay to reach.
pub async fn underlay_addresses(nets: &[&str]) -> Vec<IpAddr> {
    let netlink = Netlink::open(&Netns::current().unwrap()).await.unwrap();
    let lo = netlink.link("lo").await.unwrap().unwrap().index;
    let mut addresses = Vec::new();
    for net in nets {
        let net: IpNet = net.parse().unwrap();
        netlink.add_address(lo, net).await.unwrap();
        addresses.push(net.addr());
    }
    addresses
}

impl Pod {
    /// A pod namespace with a link, and everything an engine needs, under `dir`.
    pub async fn make(dir: &Path, name: &str) -> Self {
        Self::make_on(dir, name, None).await
    }

    /// The same on a node of its own.
    pub async fn make_on(dir: &Path, name: &str, node: Option<&Netns>) -> Self {
        let netns_dir = dir.join("netns");
        std::fs::create_dir_all(&netns_dir).unwrap();
        prepare_dir(&netns_dir).unwrap();
        let pods = dir.join("pods");
        std::fs::create_dir_all(&pods).unwrap();
        prepare_dir(&pods).unwrap();
        let pod_netns = pods.join(name);
        Netns::ensure_pinned(&pod_netns).await.unwrap();
        let spec = LinkSpec { id: name.to_owned(), netns_dir, pod_netns, ifname: "ts0".into(), mtu: 1280 };
        let mut link = link::ensure_link(&spec).await.unwrap();
        let tun = link.open_tun().await.unwrap();
        let dns = link.open_dns().await.unwrap();
        let sockets = || {
            let udp = |family| underlay(family, &PortChoice::default()).unwrap();
            (udp(Family::V4).unwrap(), udp(Family::V6))
        };
        let (udp4, udp6) = match node {
            Some(node) => node.run(sockets).await.unwrap(),
            None => sockets(),
        };
        let snapshot = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join(format!("{name}.snapshot")))
            .unwrap();
        let mut keys = [0; 64];
        getrandom::fill(&mut keys).unwrap();
        Self {
            name: name.to_owned(),
            spec,
            link,
            tun,
            udp4,
            udp6,
            dns,
            snapshot,
            reason: dir.join(format!("{name}.reason")),
            dir: dir.to_owned(),
            node: node.cloned(),
            machine_key: keys[..32].try_into().unwrap(),
            node_key: keys[32..].try_into().unwrap(),
            old_node_key: None,
            lives: 0,
            ids: None,
            engine: None,
        }
    }

    /// Starts with a new node key from now on, which names the old one.
    pub fn rotate_node_key(&mut self) {
        let old = podtether_core::key::NodePrivate::from_bytes(self.node_key).public();
        self.old_node_key = Some(*old.as_bytes());
        getrandom::fill(&mut self.node_key).unwrap();
    }

    pub fn request(&self, join: &Join) -> StartRequest {
        StartRequest {
            pod: PodRef {
                uid: format!("uid-{}", self.name),
                namespace: "test".into(),
                name: self.name.clone(),
            },
            control_url: join.control_url.clone(),
            extra_roots_pem: join.ca_pem.clone(),
            hostname: self.name.clone(),
            ephemeral: false,
            request_tags: Vec::new(),
            machine_key: SecretKey::new(self.machine_key),
            node_key: SecretKey::new(self.node_key),
            old_node_key: self.old_node_key,
            auth_key: join.auth_key.clone().map(SecretString::new),
            interactive: false,
            login_url: None,
            proxy: None,
            mtu: 1280,
            name_servers: Vec::new(),
            underlay: Underlay { addresses: join.addresses.clone(), ..Underlay::default() },
            routing: podtether_proto::engine::Routing::default(),
            standby: None,
            join: String::new(),
            log: None,
        }
    }

    /// Starts an engine process and connects to it.
    pub async fn spawn(&mut self) -> EngineClient {
        self.lives += 1;
        let path = self.dir.join(format!("{}-{}.sock", self.name, self.lives));
        let rpc = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(rpc.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        let reason = File::create(&self.reason).unwrap();
        let mut named: Vec<(&str, BorrowedFd<'_>)> = vec![
            (fds::RPC, rpc.as_fd()),
            (fds::TUN, self.tun.as_fd()),
            (fds::UDP4, self.udp4.as_fd()),
            (fds::SNAPSHOT, self.snapshot.as_fd()),
            (fds::REASON, reason.as_fd()),
        ];
        named.extend(self.udp6.as_ref().map(|s| (fds::UDP6, s.as_fd())));
        named.extend(self.dns.iter().map(|s| (fds::DNS, s.udp.as_fd())));
        named.extend(self.dns.iter().map(|s| (fds::DNS_TCP, s.tcp.as_fd())));
        let child = spawn(&engine(), &named, self.node.as_ref(), self.ids);
        let deadline = Instant::now() + PATIENCE;
        let transport = loop {
            match transport::connect(&path).await {
                Ok(transport) => break transport,
                Err(error) => assert!(Instant::now() < deadline, "no engine behind {path:?}: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        let client = EngineClient::new(client::Config::default(), transport).spawn();
        self.engine = Some(Running { child, client: client.clone() });
        client
    }

    /// Where engines keep their snapshot.
    pub fn snapshot_file(&self) -> &File {
        &self.snapshot
    }

    /// The UDP port of the engine's IPv4 socket.
    pub fn port(&self) -> u16 {
        self.udp4.local_addr().unwrap().port()
    }

    pub fn client(&self) -> EngineClient {
        self.engine.as_ref().unwrap().client.clone()
    }

    /// Spawns and starts.
    pub async fn start(&mut self, join: &Join) -> EngineClient {
        let client = self.spawn().await;
        client.start(patient(), Box::new(self.request(join))).await.unwrap().unwrap();
        client
    }

    /// The status once `wanted` says so.
    pub async fn wait(&self, wanted: impl Fn(&EngineStatus) -> bool) -> EngineStatus {
        let client = self.client();
        let mut seen = 0;
        let mut last = None;
        let waiting = async {
            loop {
                let status = client.watch(patient(), seen).await.unwrap();
                if wanted(&status) {
                    return status;
                }
                seen = status.seq;
                last = Some(status);
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(status) => status,
            Err(_) => panic!("{}: waited in vain; last status {last:?}", self.name),
        }
    }

    /// Waits until it runs and gives the pod its addresses.
    pub async fn configure(&self) -> Vec<IpAddr> {
        let status = self.wait(|s| s.state == NodeState::Running && s.node.is_some()).await;
        let addresses = status.node.unwrap().addresses;
        let config = PodConfig {
            addresses: addresses.clone(),
            routes: link::tailnet_ranges().to_vec(),
            ..PodConfig::default()
        };
        link::configure_pod(&self.spec, &self.link, &config).await.unwrap();
        addresses.iter().map(IpNet::addr).collect()
    }

    /// Starts an engine, waits until it runs, gives the pod its addresses.
    pub async fn join(&mut self, join: &Join) -> Vec<IpAddr> {
        self.start(join).await;
        self.configure().await
    }

    /// A UDP socket inside the pod.
    pub async fn udp(&self, address: SocketAddr) -> tokio::net::UdpSocket {
        let socket = sockets::udp_in(&self.link.pod, address).await.unwrap();
        tokio::net::UdpSocket::from_std(socket).unwrap()
    }

    /// kill -9, and reaped.
    pub fn kill(&mut self) -> ExitStatus {
        let mut engine = self.engine.take().unwrap();
        engine.child.kill().unwrap();
        engine.child.wait().unwrap()
    }

    /// Waits for the engine to end by itself.
    pub async fn ended(&mut self) -> (ExitStatus, Option<ExitReason>) {
        let mut engine = self.engine.take().unwrap();
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = engine.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the engine of {} did not end", self.name);
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        assert_eq!(status.signal(), None);
        let reason = std::fs::read(&self.reason).unwrap();
        (status, serde_json::from_slice(&reason).ok())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts `program` with exactly these descriptors, as `PODTETHER_FDS` says.
pub fn spawn(
    program: &Path,
    named: &[(&str, BorrowedFd<'_>)],
    node: Option<&Netns>,
    ids: Option<u32>,
) -> Child {
    let names: Vec<_> = named.iter().map(|(name, _)| *name).collect();
    let numbers: Vec<RawFd> = named.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
    let namespace = node.map(|ns| ns.as_fd().as_raw_fd());
    let mut command = Command::new(program);
    command.env_clear().env(fds::ENV, names.join(":"));
    command.env("PODTETHER_LOG", std::env::var("PODTETHER_LOG").unwrap_or_else(|_| "info".into()));
    if let Some(id) = ids {
        command.env("PODTETHER_UID", id.to_string()).env("PODTETHER_GID", id.to_string());
    }
    let prepare = move || {
        if let Some(fd) = namespace {
            // SAFETY: setns on a number; the test holds the namespace across the spawn.
            nix::errno::Errno::result(unsafe { libc::setns(fd, libc::CLONE_NEWNET) })?;
        }
        place(&numbers)
    };
    // SAFETY: `prepare` makes plain system calls and allocates nothing.
    unsafe { command.pre_exec(prepare) };
    command.spawn().unwrap()
}

/// Moves the descriptors to 3, 4, …, by way of high numbers so that none is overwritten.
fn place(numbers: &[RawFd]) -> std::io::Result<()> {
    const ASIDE: RawFd = 200;
    for (aside, number) in (ASIDE..).zip(numbers) {
        // SAFETY: dup2 on numbers.
        if unsafe { libc::dup2(*number, aside) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    for (target, (aside, _)) in (fds::FIRST_FD..).zip((ASIDE..).zip(numbers)) {
        // SAFETY: dup2 on numbers.
        if unsafe { libc::dup2(aside, target) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// What came back of probes between two pods.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Probed {
    pub sent: u32,
    pub answered: u32,
    /// Most probes lost in a row, as time.
    pub gap: Duration,
    /// First and last of each run of lost probes.
    pub lost: Vec<(u32, u32)>,
}

/// Answers every datagram at `address` in `pod` for as long as the handle lives.
pub async fn echo(pod: &Pod, address: SocketAddr) -> tokio::task::JoinSet<()> {
    let socket = pod.udp(address).await;
    let mut task = tokio::task::JoinSet::new();
    task.spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], from).await;
        }
    });
    task
}

/// Sends `count` numbered datagrams from `pod` to the echo at `to`, one per `interval`, and waits for the
/// answers.
pub async fn probe(pod: &Pod, from: IpAddr, to: SocketAddr, count: u32, interval: Duration) -> Probed {
    let socket = pod.udp((from, 0).into()).await;
    let mut probed = Probed::default();
    let mut answered = vec![false; usize::try_from(count).unwrap()];
    let mut ticks = tokio::time::interval(interval);
    let mut buffer = [0; 64];
    let mut last_sent = Instant::now();
    while probed.answered < count && last_sent.elapsed() < Duration::from_secs(2) {
        tokio::select! {
            _ = ticks.tick(), if probed.sent < count => {
                // A refused send is a lost probe.
                let _ = socket.send_to(&probed.sent.to_be_bytes(), to).await;
                probed.sent += 1;
                last_sent = Instant::now();
            }
            answer = socket.recv_from(&mut buffer) => {
                if let Ok((4, source)) = answer && source == to {
                    let number = u32::from_be_bytes(buffer[..4].try_into().unwrap());
                    let seen = &mut answered[usize::try_from(number).unwrap()];
                    probed.answered += u32::from(!std::mem::replace(seen, true));
                }
            }
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
        }
    }
    for number in (0..probed.sent).filter(|n| !answered[usize::try_from(*n).unwrap()]) {
        match probed.lost.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => probed.lost.push((number, number)),
        }
    }
    probed.gap =
        probed.lost.iter().map(|(first, last)| interval * (last - first + 1)).max().unwrap_or_default();
    probed
}
