//! The service an engine offers its supervisor, and what crosses it.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::Version;
use crate::log::LogFor;
use crate::sandbox::StepReport;
use crate::secret::{SecretKey, SecretString};

/// Served by an engine, one connection at a time from its supervisor. Each call has a line in [`crate::calls`], which
/// says since which minor of [`crate::PROTO_VERSION`] it is there: 4.0 where nothing is said here.
#[tarpc::service]
pub trait Engine {
    /// Who is there. Always the first call, and the heartbeat after it: the answer comes from the loop that moves
    /// the packets, so that one which stands still is silent here too.
    async fn hello() -> Hello;
    /// Gives the engine its identity and starts the node. Once per process; a second call is refused.
    async fn start(request: Box<StartRequest>) -> Result<(), String>;
    /// Long poll: the status as soon as its `seq` is greater than `after`, at the latest after
    /// [`WATCH_MAX`] and [`WATCH_MARGIN`] before the call's deadline. `watch(0)` answers at once.
    async fn watch(after: u64) -> EngineStatus;
    /// The node's own addresses or resolvers changed.
    async fn set_underlay(underlay: Underlay);
    /// The pod uses other routes of peers from now on; the status with that in force.
    async fn set_routing(routing: Routing) -> EngineStatus;
    /// Counters and gauges for `/metrics`.
    async fn metrics() -> EngineMetrics;
    /// One line per peer.
    async fn peers() -> Vec<PeerStatus>;
    /// Everything known of the way to one peer, which is named by name, address or stable id. Since 4.1.
    async fn way(peer: String) -> Result<Way, String>;
    /// What the network looks like from here, as last measured. Since 4.1.
    async fn netcheck() -> NetReport;
    /// What would become of such a packet now, and which rule says so. Asking changes and counts nothing.
    async fn why(packet: Flow) -> Result<Verdict, String>;
    /// Certificates to trust beyond the built-in roots from now on, PEM; connections that are open stay.
    /// Refused, with the former ones in force, when they do not parse.
    async fn set_roots(extra_roots_pem: String) -> Result<(), String>;
    /// Logs so much for a while, or as the process was started. Since 4.1.
    async fn set_log(wish: Option<LogFor>);
    /// Asks the control server for this host name, one DNS label, from now on. What the node is called then is in
    /// [`EngineStatus::node`] when the server has answered. Since 4.1.
    async fn rename(hostname: String) -> Result<(), String>;
    /// Pings a peer, which is named by name, address or stable id; at the latest after [`PING_MAX`].
    async fn ping(peer: String, kind: PingKind) -> Result<Pong, String>;
    /// The application capabilities that the tailnet's policy gives the peer at this address towards the
    /// pod: by name, each with its arguments as JSON texts.
    async fn peer_caps(peer: IpAddr) -> Vec<(String, Vec<String>)>;
    /// Expires the node key at the control server, so that the device leaves the tailnet.
    /// The engine exits with [`crate::exit::EngineExit::Stopped`] once it has answered.
    async fn logout() -> Result<(), String>;
    /// Begins a planned handover: writes the snapshot for the engine that will stand by, and tells what that
    /// one's [`StartRequest::standby`] has to be.
    async fn prepare_handover() -> Result<u8, String>;
    /// Of a standby: how many peers that it greets have not answered, as soon as that is none, at the latest
    /// after so many milliseconds.
    async fn ready(within_ms: u64) -> u64;
    /// Of a standby: be the node from now on. The other engine is asked to let go, unless it is known to be
    /// gone (`alone`).
    async fn take_over(alone: bool) -> Result<TakenOver, String>;
    /// Writes the snapshot and exits with [`crate::exit::EngineExit::Stopped`].
    async fn stop();
}

/// The longest that [`Engine::watch`] waits before it answers with an unchanged status.
pub const WATCH_MAX: std::time::Duration = std::time::Duration::from_secs(300);

/// How long before its deadline [`Engine::watch`] answers at the latest, so that the deadline tells that an engine
/// hangs.
pub const WATCH_MARGIN: std::time::Duration = std::time::Duration::from_secs(5);

/// The longest that [`Engine::ping`] waits for an answer.
pub const PING_MAX: std::time::Duration = std::time::Duration::from_secs(5);

/// What a ping asks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PingKind {
    /// The path, outside the tunnel.
    #[default]
    Disco,
    /// The other node, inside the tunnel.
    Tsmp,
    /// What is behind the other node: the host or pod itself.
    Icmp,
}

/// Answer to a ping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pong {
    /// Fully qualified name of the peer.
    pub name: String,
    /// The address that was pinged.
    pub address: IpAddr,
    /// As asked.
    pub kind: PingKind,
    /// Round trip, microseconds.
    pub latency_us: u64,
    /// The way it took (disco), or the way packets take now.
    pub path: PathStatus,
}

/// What an engine is to its pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// It is the pod's node, or will be.
    #[default]
    InCharge,
    /// Another engine is; this one has its sessions and reads nothing.
    Standby,
    /// Another engine is; this one opens what was sent to its sessions, and ends soon.
    LetGo,
}

/// Answer to [`Engine::take_over`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenOver {
    /// From the other engine being asked to let go until this one read, microseconds.
    pub gap_us: u64,
}

/// Answer to `hello`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::PROTO_VERSION`] of the engine's build.
    pub version: Version,
    /// Build version, for people.
    pub build: String,
    /// The engine's own pid as it sees it.
    pub pid: u32,
    /// UID of the pod whose start request this process took; empty before `start`.
    pub pod_uid: String,
    /// Whether it is the pod's node.
    #[serde(default)]
    pub role: Role,
}

/// Which pod, as everything that is logged or reported names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PodRef {
    /// Kubernetes pod UID, or the container id where there is none.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Pod name.
    pub name: String,
}

/// Everything an engine needs to be a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StartRequest {
    /// For logs and `hello`.
    pub pod: PodRef,
    /// Control server, `http://` or `https://`.
    pub control_url: String,
    /// Further roots for control and DERP, PEM; empty for the built-in ones alone.
    pub extra_roots_pem: String,
    /// Requested host name (one DNS label).
    pub hostname: String,
    /// Asks control to forget the node when it is away.
    pub ephemeral: bool,
    /// Tags to request; only where the auth key does not carry them.
    pub request_tags: Vec<String>,
    /// Noise static key.
    pub machine_key: SecretKey,
    /// WireGuard static key.
    pub node_key: SecretKey,
    /// Public half of the node key before a rotation.
    pub old_node_key: Option<[u8; 32]>,
    /// Single-use key; absent when the node is registered already.
    pub auth_key: Option<SecretString>,
    /// A person lets the node in: without an auth key the engine asks for a URL and waits for its visit.
    /// Otherwise it exits with [`crate::exit::EngineExit::KeyRejected`] so that a key is minted.
    pub interactive: bool,
    /// The URL that an earlier engine with the same node key was given; it is waited for again, as long
    /// as control knows it.
    pub login_url: Option<String>,
    /// Proxy for TLS connections to control and DERP.
    pub proxy: Option<ProxySettings>,
    /// MTU of the TUN.
    pub mtu: u16,
    /// The name servers that the stand-in descriptors stand in for, in their order.
    pub name_servers: Vec<IpAddr>,
    /// The node's addresses and resolvers now.
    pub underlay: Underlay,
    /// What the pod uses of the routes that peers offer.
    pub routing: Routing,
    /// Stand by until [`Engine::take_over`], beside the engine whose [`Engine::prepare_handover`] gave this.
    #[serde(default)]
    pub standby: Option<u8>,
    /// Id of the CNI ADD that made the pod's attachment: every line of the log has it.
    #[serde(default)]
    pub join: String,
    /// Logs so much, instead of what the process was started with.
    #[serde(default)]
    pub log: Option<LogFor>,
}

/// What a pod uses of the routes that peers offer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Routing {
    /// Use the subnet routes of peers.
    pub accept_routes: bool,
    /// The peer that carries everything no route covers, by stable id, address or name.
    pub exit_node: Option<String>,
    /// Ranges that neither a route nor the exit node covers: the cluster's own.
    pub exclude: Vec<IpNet>,
}

/// An HTTP proxy that is asked to `CONNECT`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxySettings {
    /// `http://[user:password@]host:port`
    pub url: SecretString,
    /// As the variable `NO_PROXY`: hosts, domains, addresses and ranges that are reached without it.
    pub bypass: String,
}

/// What the engine is told about the node it runs on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Underlay {
    /// Addresses that peers may be able to reach; never a CNI's own.
    pub addresses: Vec<IpAddr>,
    /// Resolvers for control and DERP host names.
    pub name_servers: Vec<SocketAddr>,
    /// `/etc/hosts` entries.
    pub hosts: Vec<(String, IpAddr)>,
}

/// What [`Engine::watch`] reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EngineStatus {
    /// Grows with every change.
    pub seq: u64,
    /// Where the node is in its life.
    pub state: NodeState,
    /// Whether the map stream is up.
    pub control_connected: bool,
    /// Milliseconds since the last control message; `None` before the first in this process.
    pub control_age_ms: Option<u64>,
    /// This node, as the netmap (or the snapshot) has it.
    pub node: Option<SelfNode>,
    /// Home DERP region, 0 for none yet.
    pub home_derp: u32,
    /// What control and the engine find wrong.
    pub health: Vec<HealthMessage>,
    /// Grows with every change of `accepted_routes` and `exit_node_id`.
    pub routes_version: u64,
    /// Subnet routes that the pod should send into its link, sorted; empty unless it accepts routes.
    pub accepted_routes: Vec<IpNet>,
    /// Stable id of the exit node; `None` while none is chosen or the chosen one is not among the peers.
    pub exit_node_id: Option<String>,
    /// What the engine has given up, step by step.
    pub sandbox: Vec<StepReport>,
    /// How far this process has come, and when.
    #[serde(default)]
    pub milestones: Milestones,
}

/// When an engine got so far for the first time, microseconds after it took its start request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Milestones {
    /// Control has taken the node in.
    pub registered_us: Option<u64>,
    /// A netmap is in force, from control or from the snapshot.
    pub netmap_us: Option<u64>,
    /// The first WireGuard handshake was complete.
    pub handshake_us: Option<u64>,
}

/// One thing that is wrong, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthMessage {
    /// One line.
    pub title: String,
    /// More, may be empty.
    pub text: String,
    /// `low`, `medium` or `high`.
    pub severity: String,
}

/// Where a node is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeState {
    /// No start request yet.
    Waiting,
    /// Not registered yet, or no netmap yet; the text says what it waits for or what failed last.
    Connecting {
        /// One sentence.
        reason: String,
    },
    /// A person has to open the URL.
    NeedsLogin {
        /// From control.
        url: String,
    },
    /// Registered, but an administrator has to approve the machine.
    NeedsApproval,
    /// A netmap (from control or from the snapshot) is in force.
    Running,
    /// Logged out on request.
    LoggedOut,
}

/// This node in its tailnet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelfNode {
    /// Fully qualified name, no trailing dot.
    pub name: String,
    /// Node addresses (/32 and /128).
    pub addresses: Vec<IpNet>,
    /// ACL tags.
    pub tags: Vec<String>,
    /// Stable node id.
    pub stable_id: String,
    /// Seconds since the epoch; `None` when the key does not expire.
    pub key_expiry_unix_s: Option<i64>,
}

/// How packets reach a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathStatus {
    /// No traffic yet.
    Idle,
    /// Through a DERP region.
    Relay {
        /// The region's id.
        region: u32,
    },
    /// Straight to this address.
    Direct {
        /// The peer's endpoint.
        endpoint: SocketAddr,
        /// Last measured round trip, microseconds.
        rtt_us: u64,
    },
}

/// One peer, for people and metrics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Fully qualified name; the first address of a peer that has none.
    pub name: String,
    /// First addresses.
    pub addresses: Vec<IpAddr>,
    /// Path in use.
    pub path: PathStatus,
    /// Milliseconds since the last completed handshake.
    pub handshake_age_ms: Option<u64>,
    /// Milliseconds since data was last sent to, and received from, the peer.
    pub last_tx_age_ms: Option<u64>,
    /// See `last_tx_age_ms`.
    pub last_rx_age_ms: Option<u64>,
    /// Plaintext bytes sent.
    pub tx_bytes: u64,
    /// Plaintext bytes received.
    pub rx_bytes: u64,
}

/// Answer to [`Engine::way`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Way {
    /// Fully qualified name of the peer.
    pub name: String,
    /// Its first addresses.
    pub addresses: Vec<IpAddr>,
    /// Path in use.
    pub path: PathStatus,
    /// Its home DERP region, 0 for none.
    pub home_derp: u32,
    /// Whether control thinks it is online.
    pub online: Option<bool>,
    /// Milliseconds since the last completed handshake.
    pub handshake_age_ms: Option<u64>,
    /// Where it may be reached without a relay; as many as are tried.
    pub endpoints: Vec<WayEndpoint>,
    /// Why packets cannot be exchanged with it at all, as a word of the metrics.
    pub obstacle: Option<String>,
}

/// An address of a peer's on the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WayEndpoint {
    /// Where.
    pub endpoint: SocketAddr,
    /// Milliseconds since it was last asked; `None` when it was not.
    pub asked_ms_ago: Option<u64>,
    /// Whether this node has a socket that could reach it.
    pub reachable: bool,
}

/// Answer to [`Engine::netcheck`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NetReport {
    /// Whether a STUN server answered in the last round.
    pub udp: bool,
    /// Our address over IPv4 as STUN servers see it.
    pub mapped_v4: Option<SocketAddr>,
    /// The same over IPv6.
    pub mapped_v6: Option<SocketAddr>,
    /// Whether the NAT gives a new port for each destination.
    pub mapping_varies: Option<bool>,
    /// Addresses that peers are told, most promising first.
    pub endpoints: Vec<SocketAddr>,
    /// Home DERP region, 0 for none.
    pub home_derp: u32,
    /// Relay regions, nearest first.
    pub regions: Vec<NetRegion>,
    /// Milliseconds since the last round of measurements began.
    pub age_ms: Option<u64>,
}

/// A relay region of [`NetReport`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NetRegion {
    /// Its number.
    pub id: u32,
    /// Short name.
    pub code: String,
    /// Long name.
    pub name: String,
    /// Round trip, microseconds: by STUN, or by HTTPS where UDP does not get through.
    pub latency_us: Option<u64>,
    /// Whether a connection to it is up.
    pub connected: bool,
}

/// A packet that opens something: for TCP a SYN, for ICMP an echo request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Source port, 0 where there is none.
    pub src_port: u16,
    /// Destination port, 0 where there is none.
    pub dst_port: u16,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Decision {
    /// It passes here.
    Accept,
    /// It is dropped here.
    Drop,
    /// It passes here, but the peer told that it refuses such packets.
    RefusedByPeer,
}

/// Answer to [`Engine::why`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// From a peer to the pod, or the other way.
    pub inbound: bool,
    /// What becomes of the packet.
    pub decision: Decision,
    /// The rule that decided: the chunk of the packet filter and the place in it, from 0.
    pub rule: Option<(String, u32)>,
    /// Why, as one of the words that the metrics use.
    pub reason: String,
    /// Fully qualified name of the peer at the other end; its first address when it has none.
    pub peer: Option<String>,
}

/// Counters since the engine's start and gauges of now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineMetrics {
    /// Packets read from the TUN, whatever became of them.
    pub tun_packets: u64,
    /// What came in to be worked on, of use or not: packets from the TUN, datagrams, relayed messages, calls,
    /// and every 256 bytes of the control stream.
    pub inputs: u64,
    /// Plaintext from the pod.
    pub tx_packets: u64,
    /// Plaintext from the pod.
    pub tx_bytes: u64,
    /// Plaintext to the pod.
    pub rx_packets: u64,
    /// Plaintext to the pod.
    pub rx_bytes: u64,
    /// Packets dropped, by bounded reason name.
    pub drops: Vec<(String, u64)>,
    /// Packets that the packet filter let in, by rule (`rule base/0`) or what else let them; at most 64
    /// rules one by one, then `other rules`.
    pub filter_passed: Vec<(String, u64)>,
    /// Packets that no rule lets in, by protocol: `tcp`, `udp`, `icmp`, `other`.
    pub filter_unruled: Vec<(String, u64)>,
    /// Rules of the packet filter in force.
    pub filter_rules: u64,
    /// Parts of rules that are left out because they do not parse or are too many.
    pub filter_skipped: u64,
    /// Connections that the filter refused and whose peer was told so.
    pub rejects_sent: u64,
    /// Connections of the pod that a peer said it refuses.
    pub rejects_received: u64,
    /// Disco keys that peers told themselves and that were taken over.
    pub disco_adverts: u64,
    /// WireGuard handshakes completed.
    pub handshakes: u64,
    /// Peers in the netmap.
    pub peers: u64,
    /// Peers with a trusted direct path now.
    pub peers_direct: u64,
    /// Peers with traffic through a relay now.
    pub peers_relay: u64,
    /// Peers that have not answered a handshake for 5 s; they count in neither of the others.
    pub peers_unanswered: u64,
    /// Round trips of the direct paths now.
    pub rtt: Option<Rtt>,
    /// Whether the map stream is up.
    pub control_connected: bool,
    /// DERP regions connected.
    pub derp_connected: u64,
    /// Whether the home region is one of them.
    pub home_derp_connected: bool,
    /// Round trip to the home region as last measured, microseconds.
    pub home_derp_rtt_us: Option<u64>,
    /// Home region, 0 for none.
    pub home_derp: u32,
    /// Seconds since the epoch of the last completed handshake, 0 for none.
    pub last_handshake_unix_s: u64,
}

/// Round trips of several paths, microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rtt {
    /// The shortest.
    pub min_us: u64,
    /// Their mean.
    pub mean_us: u64,
    /// The longest.
    pub max_us: u64,
}
