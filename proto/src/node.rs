//! The service the supervisor offers the CNI plugin and the tools.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use crate::Version;
use crate::engine::{Flow, HealthMessage, NetReport, PeerStatus, PingKind, PodRef, Pong, Verdict, Way};
use crate::log::LogFor;
use crate::sandbox::StepReport;

/// Served by the supervisor on `run_dir/supervisor.sock`.
#[tarpc::service]
pub trait Node {
    /// CNI ADD: joins the pod and answers when `ts0` works. The same container asked again gets the
    /// same answer.
    async fn add(request: AddRequest) -> Result<Attached, CniError>;
    /// CNI DEL: removes one attachment, and the identity when it is due. Repeatable.
    async fn del(request: AttachmentId) -> Result<(), CniError>;
    /// CNI CHECK.
    async fn check(request: CheckRequest) -> Result<(), CniError>;
    /// CNI GC: attachments of `network` that are not in `valid` leave.
    async fn gc(request: GcRequest) -> Result<(), CniError>;
    /// Changes which routes of other nodes a pod uses, and answers when that is in force and on disk.
    async fn set_routing(pod: PodSelector, routing: Routing) -> Result<PodRouting, CniError>;
    /// Which routes of other nodes a pod uses.
    async fn routing(pod: PodSelector) -> Result<PodRouting, CniError>;
    /// Pods on this node from number `skip` on, in the order of their names: as many as fit into an answer,
    /// at least one while there are any. `live`: with what their engines have to be asked for.
    async fn pods(skip: u32, live: bool) -> Vec<PodSummary>;
    /// How a pod came to be what it is.
    async fn explain(pod: PodSelector) -> Result<Explained, CniError>;
    /// Peers of a pod from number `skip` on, as many as fit into an answer.
    async fn peers(pod: PodSelector, skip: u32) -> Result<Vec<PeerStatus>, CniError>;
    /// Everything known of the way from a pod to a peer, which is named by name, address or stable id.
    async fn way(pod: PodSelector, peer: String) -> Result<Way, CniError>;
    /// What would become of such a packet in a pod's engine, and which rule says so.
    async fn why(pod: PodSelector, packet: Flow) -> Result<Verdict, CniError>;
    /// What the network looks like from a pod's engine.
    async fn netcheck(pod: PodSelector) -> Result<NetReport, CniError>;
    /// What the supervisor and the pod's engines logged of the pod, from line `after` on: as many lines as fit into
    /// an answer. Also of a pod that has gone, as long as there is room.
    async fn logs(pod: PodSelector, after: u64) -> Vec<LogLine>;
    /// How much the supervisor and the pod's engine log of a pod, changed for a while if so wished.
    async fn log_level(pod: PodSelector, wish: LogWish) -> Result<PodLog, CniError>;
    /// Pings a peer of a pod, named by name, address or stable id.
    async fn ping(pod: PodSelector, peer: String, kind: PingKind) -> Result<Pong, CniError>;
    /// Replaces the pod's engine by a new process, and answers when that is as far as the one before it was.
    async fn renew(pod: PodSelector, how: Renewal) -> Result<Renewed, CniError>;
    /// What was decided about a pod when it was made, joined or not: every setting and the rule that gave it.
    async fn choice(pod: PodSelector) -> Result<Choice, CniError>;
    /// Finds the devices in the tailnets whose pods are no more, and deletes them unless `dry_run`.
    async fn cleanup(dry_run: bool) -> Result<Cleanup, CniError>;
    /// The plugin could not use what its runtime gave it: for the supervisor's counters and log.
    async fn misread(error: CniError);
    /// CNI STATUS, and the first thing any client asks: answers at once or the node is not ready.
    async fn status() -> Version;
}

/// One attachment; a pod's identity is another thing and may outlive it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttachmentId {
    /// CNI network name.
    pub network: String,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// Interface in the pod, `ts0` unless the network configuration says otherwise.
    pub ifname: String,
}

/// Which pod a call means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodSelector {
    /// By its interface.
    Attachment(AttachmentId),
    /// By name.
    Pod {
        /// Kubernetes namespace.
        namespace: String,
        /// Pod name.
        name: String,
    },
}

/// Which routes of other nodes a pod uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Routing {
    /// Subnet routers' networks.
    pub accept_routes: bool,
    /// Name, address or stable id of the node that carries everything else but the cluster's own; while it
    /// cannot, that traffic is dropped.
    pub exit_node: Option<String>,
}

/// A pod's routing and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRouting {
    /// Which interface.
    pub attachment: AttachmentId,
    /// As asked for.
    pub routing: Routing,
    /// Routes through the interface as they were made.
    pub routes: Vec<AttachedRoute>,
    /// Stable id of the exit node; `None` while none is chosen or the chosen one is not among the peers.
    pub exit_node_id: Option<String>,
    /// What control and the engine find wrong.
    pub health: Vec<HealthMessage>,
}

/// A pod of [`Node::pods`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSummary {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Pod name.
    pub pod: String,
    /// CNI container id.
    pub container_id: String,
    /// Key of the tailnet.
    pub tailnet: String,
    /// `joining`, `running`, `needs-login`, `needs-approval`, `restarting`, `backoff`, `stopped`, `leaving`.
    pub state: String,
    /// Why it is not running, or what failed last.
    pub reason: String,
    /// Fully qualified name in the tailnet, empty before it is known.
    pub name: String,
    /// Tailnet addresses.
    pub addresses: Vec<IpAddr>,
    /// Engine restarts since the supervisor started.
    pub restarts: u64,
    /// Planned handovers since the supervisor started.
    pub handovers: u64,
    /// What limits its engine, of `cgroup` (outside the supervisor's), `memory`, `pids`, `cpu` and `mounts` (none of
    /// the supervisor's).
    pub limits: Vec<String>,
    /// What its engine has given up, step by step.
    pub sandbox: Vec<StepReport>,
    /// Whether the map stream is up.
    pub control_connected: bool,
    /// Home DERP region, 0 for none.
    pub home_derp: u32,
    /// Whether it uses the networks of subnet routers.
    pub accept_routes: bool,
    /// The exit node it should use.
    pub exit_node: Option<String>,
    /// What control, the engine and the supervisor find wrong.
    pub health: Vec<HealthMessage>,
    /// Kubernetes pod UID.
    #[serde(default)]
    pub uid: String,
    /// ACL tags.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Milliseconds since the epoch of its ADD, 0 when unknown.
    #[serde(default)]
    pub added_unix_ms: u64,
    /// Pid of its engine as the supervisor sees it.
    #[serde(default)]
    pub engine_pid: Option<u32>,
    /// Memory that its engine alone has (`RssAnon`), bytes.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Processor time that its engine has used, microseconds.
    #[serde(default)]
    pub cpu_us: Option<u64>,
    /// What its engine says, where it was asked and answered.
    #[serde(default)]
    pub live: Option<Live>,
}

/// What an engine says of a pod's link.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Live {
    /// Peers in the netmap.
    pub peers: u64,
    /// Peers with a direct path.
    pub peers_direct: u64,
    /// Peers with traffic through a relay.
    pub peers_relay: u64,
    /// Seconds since the epoch of the last handshake, 0 for none.
    pub last_handshake_unix_s: u64,
    /// Plaintext bytes from the pod since the engine started.
    pub tx_bytes: u64,
    /// Plaintext bytes to the pod since the engine started.
    pub rx_bytes: u64,
    /// Packets dropped since the engine started, for whatever reason.
    pub drops: u64,
}

/// How a pod came to be what it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Explained {
    /// What became of it when.
    pub timeline: Timeline,
    /// What was decided when it was added, and by which rules.
    pub choice: Choice,
    /// What is in force besides, or was changed since.
    pub further: Vec<Setting>,
    /// How its last engine ended, empty while none has.
    pub last_exit: String,
    /// Id of the CNI ADD that made it, as every line of the logs has it; empty when unknown.
    pub join: String,
}

/// What became of a pod when. Only the first time counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Timeline {
    /// Milliseconds since the epoch of its ADD, 0 when unknown.
    pub added_unix_ms: u64,
    /// In the order in which they were noted.
    pub milestones: Vec<Milestone>,
}

/// A moment of a [`Timeline`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Milestone {
    /// Of `saved`, `link`, `key`, `engine`, `registered`, `netmap`, `configured`, `answered`, `handshake`; other words
    /// may come.
    pub what: String,
    /// Since ADD, microseconds.
    pub after_us: u64,
}

/// A line of [`Node::logs`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogLine {
    /// Its number: ask for the lines after it with this.
    pub seq: u64,
    /// Milliseconds since the epoch.
    pub unix_ms: u64,
    /// `ERROR`, `WARN`, `INFO`, `DEBUG` or `TRACE`.
    pub level: String,
    /// `engine`, or the part of the supervisor that said it.
    pub from: String,
    /// What was said.
    pub message: String,
    /// Further fields, as JSON.
    pub fields: String,
    /// Id of the CNI ADD that made the attachment; empty where none is known.
    #[serde(default)]
    pub join: String,
}

/// What [`Node::log_level`] is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LogWish {
    /// Nothing but tell.
    Tell,
    /// As the supervisor was started.
    Default,
    /// So much for a while.
    For(LogFor),
}

/// How much is logged of a pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodLog {
    /// Instead of the default, and for how long still.
    pub raised: Option<LogFor>,
}

/// What [`Node::cleanup`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Cleanup {
    /// Devices of pods that are no more.
    pub ghosts: Vec<Ghost>,
    /// What was not looked at or could not be deleted, a sentence each.
    pub notes: Vec<String>,
}

/// A device of a pod that is no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ghost {
    /// Key of the tailnet.
    pub tailnet: String,
    /// Its name there.
    pub name: String,
    /// Whether it was deleted.
    pub deleted: bool,
}

/// What was decided about a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Choice {
    /// Whether it joins a tailnet.
    pub joins: bool,
    /// Each setting, its value and where that came from.
    pub settings: Vec<Setting>,
    /// What its annotations ask for and cannot have, a sentence each with the fix. Such a pod joins nothing.
    pub refusals: Vec<String>,
    /// What is odd and changes nothing, a sentence each.
    pub notes: Vec<String>,
}

/// One setting of a [`Choice`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Setting {
    /// `enabled`, `tailnet`, `tags`, `hostname`, `ephemeral`, `exit-node`, `accept-routes` or `required`: after
    /// `tailscale.com/` it is an annotation.
    pub name: String,
    /// As an annotation would have it.
    pub value: String,
    /// Which level decided.
    pub source: Source,
    /// The rule, in words.
    pub rule: String,
}

/// Which level gave a [`Setting`]: a pod's own annotation goes before its namespace's, and that before the
/// cluster's configuration. A policy goes before them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Source {
    /// An annotation of the pod.
    Pod,
    /// An annotation of its namespace.
    Namespace,
    /// The supervisor's or the network's configuration.
    Cluster,
    /// Something that no annotation changes.
    Policy,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Source::Pod => "pod",
            Source::Namespace => "namespace",
            Source::Cluster => "cluster",
            Source::Policy => "policy",
        })
    }
}

/// How [`Node::renew`] replaces an engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Renewal {
    /// The new one is ready before the old one lets go.
    #[default]
    Handover,
    /// The old one ends, then the new one begins.
    Kill,
}

/// What [`Node::renew`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Renewed {
    /// The new engine's pid, as the supervisor sees it.
    pub pid: u32,
    /// From the request until the new engine was there, with its control session if there was one before.
    pub took_ms: u64,
    /// How it was done.
    pub how: Renewal,
    /// Of a handover: how long neither engine read, microseconds.
    pub gap_us: Option<u64>,
}

/// CNI ADD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddRequest {
    /// Which attachment.
    pub attachment: AttachmentId,
    /// `CNI_NETNS`, a path the supervisor can open.
    pub netns: String,
    /// From `K8S_POD_*`; the uid falls back to the container id.
    pub pod: PodRef,
    /// Key of a `[tailnet.NAME]` table.
    pub tailnet: String,
    /// How long the runtime will wait; the supervisor answers before that.
    pub timeout_ms: u64,
    /// `io.kubernetes.cri.pod-annotations`, empty where the runtime passes none.
    pub annotations: BTreeMap<String, String>,
    /// The pod's name servers as the runtime's `dns` capability tells them, empty where it does not.
    pub name_servers: Vec<IpAddr>,
    /// What prevResult leads to by more than a default route: the networks of its addresses and its routes.
    pub primary: Vec<IpNet>,
    /// Id of this call, for logs; the supervisor makes one where there is none.
    #[serde(default)]
    pub join: String,
}

/// What ADD made. The default, without an interface name, says that the pod joins nothing (an exempt
/// namespace): the plugin then passes prevResult on as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Interface name.
    pub ifname: String,
    /// Its hardware address, lower-case hex with colons.
    pub mac: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Node addresses, IPv4 first.
    pub addresses: Vec<IpNet>,
    /// Routes through the interface.
    pub routes: Vec<AttachedRoute>,
}

impl Attached {
    /// True when the pod joins nothing.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.ifname.is_empty()
    }
}

/// A route of [`Attached`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttachedRoute {
    /// Destination.
    pub dst: IpNet,
    /// Next hop on `ts0`.
    pub gw: Option<IpAddr>,
    /// Table other than the main one.
    pub table: Option<u32>,
}

/// CNI CHECK.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckRequest {
    /// Which attachment.
    pub attachment: AttachmentId,
    /// `CNI_NETNS`.
    pub netns: String,
    /// `ts0`'s addresses in prevResult.
    pub addresses: Vec<IpNet>,
    /// Routes of prevResult that lie in the tailnet ranges.
    pub routes: Vec<IpNet>,
}

/// CNI GC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcRequest {
    /// Only attachments of this network are touched.
    pub network: String,
    /// `cni.dev/valid-attachments`: (container id, interface name as the runtime knows it).
    pub valid: Vec<(String, String)>,
}

/// A CNI error as the specification prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{msg} ({code}){}{details}", if details.is_empty() { "" } else { ": " })]
pub struct CniError {
    /// Specified below 100, ours from 100 on; see [`code`].
    pub code: u32,
    /// What happened, to which pod.
    pub msg: String,
    /// What to do.
    pub details: String,
}

/// Error codes, from the CNI specification and our own from 100 on.
pub mod code {
    /// Incompatible CNI version.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// Unsupported field in the network configuration.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// Container unknown or does not exist.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// A necessary environment variable is missing or wrong.
    pub const BAD_ENV: u32 = 4;
    /// I/O failure.
    pub const IO: u32 = 5;
    /// Undecodable content.
    pub const UNDECODABLE: u32 = 6;
    /// Invalid network configuration.
    pub const BAD_CONFIG: u32 = 7;
    /// Try again later.
    pub const TRY_AGAIN: u32 = 11;
    /// The plugin cannot serve ADD now (STATUS).
    pub const UNAVAILABLE: u32 = 50;
    /// Interface name taken by something that is not ours.
    pub const INTERFACE_EXISTS: u32 = 100;
    /// The tailnet refused the pod (credential, tag, key).
    pub const REFUSED: u32 = 101;
    /// The kernel refused a step of the pod's link.
    pub const LINK: u32 = 102;
    /// CHECK found something missing.
    pub const CHECK_FAILED: u32 = 103;
    /// DEL or GC could not clean everything.
    pub const CLEANUP: u32 = 104;
    /// A person has to act (login URL, approval).
    pub const NEEDS_ACTION: u32 = 105;
}
