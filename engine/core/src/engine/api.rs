//! The types that cross the core's border.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::ping::{ControlAnswer, PingResult};
use crate::batch::RegionId;
use crate::health::HealthMessage;
use crate::key::{DiscoPrivate, DiscoPublic, NodePrivate, NodePublic};
pub use crate::peer::PeerList;
use crate::snapshot::Snapshot;
use crate::tailcfg::{EndpointType, MapResponse, NetInfo, Node, NodeId, UnixTime};

/// What an engine is born with.
#[derive(Debug)]
pub struct Config {
    /// WireGuard static key and DERP identity.
    pub node_key: NodePrivate,
    /// Disco key for a start without snapshot; a snapshot's own key takes precedence, since peers know it.
    pub disco_key: DiscoPrivate,
    /// MTU of the TUN.
    pub mtu: u16,
    /// From the system's random source, new for every start.
    pub random_seed: [u8; 32],
    /// Beside a process that is the node until [`Engine::take_over`](super::Engine::take_over): its
    /// [`Engine::index_mark`](super::Engine::index_mark).
    pub standby: Option<u8>,
    /// Wall clock at the `now` given to `Engine::new`.
    pub wall: UnixTime,
    /// What the process before left behind.
    pub snapshot: Option<Snapshot>,
}

/// What happened on a connection to a DERP region.
#[derive(Debug)]
pub enum DerpEvent<'a> {
    /// Packets for the region can be sent now.
    Connected,
    /// The connection is gone; the shell connects again until [`Event::DerpClose`].
    Disconnected,
    /// A packet from a peer, writable because it is decrypted in place of a copy.
    Packet {
        /// Who sent it, as the server vouches.
        source: NodePublic,
        /// The packet.
        payload: &'a mut [u8],
    },
    /// The server cannot reach this peer.
    PeerGone {
        /// Which peer.
        peer: NodePublic,
    },
    /// Something else than a packet came in: a pong, a keepalive.
    Heard,
    /// The server's complaint about this connection, empty when it is well again.
    Health {
        /// The complaint.
        problem: &'a str,
    },
}

/// What happened on the control session.
#[derive(Debug)]
pub enum ControlEvent {
    /// A map stream was opened; its first message replaces the netmap.
    SessionStarted,
    /// Nodes of a message of the map stream whose rest is still to come.
    Peers {
        /// Which of the message's lists they are in.
        list: PeerList,
        /// The nodes.
        nodes: Vec<Node>,
    },
    /// A message of the map stream, or the rest of it.
    Map(Box<MapResponse>),
    /// The message whose nodes came has no end that makes sense. What was told of them stays; nobody goes.
    PeersUnfinished,
    /// The map stream ended. The netmap stays in force.
    SessionLost,
}

/// What the shell has to do or may want to know.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Own name, addresses, routes or key expiry changed.
    SelfChanged,
    /// Endpoints, NetInfo or home region changed: send [`HostUpdate`] to control.
    HostUpdate,
    /// What [`Engine::routes`](super::Engine::routes) tells is different.
    RoutesChanged,
    /// Connect to the region and keep it connected.
    DerpConnect {
        /// Which region.
        region: RegionId,
    },
    /// The region's connection is no longer needed.
    DerpClose {
        /// Which region.
        region: RegionId,
    },
    /// Send a DERP ping on the region's connection; report the pong as [`DerpEvent::Heard`].
    DerpPing {
        /// Which region.
        region: RegionId,
    },
    /// The region's connection is dead although nothing closed it: end it and connect again. No
    /// [`DerpEvent::Disconnected`] is needed.
    DerpReconnect {
        /// Which region.
        region: RegionId,
    },
    /// UDP does not get through: measure how long the region's servers take to answer an HTTPS request for
    /// `/derp/latency-check`, and report it with `handle_https_latency`.
    HttpsLatency {
        /// Which region.
        region: RegionId,
    },
    /// This is the home region now: connect, and send NotePreferred there (and its opposite elsewhere).
    DerpPreferred {
        /// Which region.
        region: RegionId,
    },
    /// Look up a host name and answer with `handle_resolved`.
    Resolve {
        /// The name.
        host: String,
    },
    /// A snapshot taken now would differ from the last one in a way that matters to a restart.
    SnapshotDirty,
    /// Control asked for a sign of life; this is it.
    ControlAnswer(Box<ControlAnswer>),
    /// A ping that [`super::Engine::ping`] began has ended.
    Pong(Box<PingResult>),
    /// The node key has expired.
    KeyExpired,
    /// What [`super::Engine::shield`] tells is different: put it on the UDP sockets.
    ShieldChanged,
    /// Read how many datagrams the kernel dropped and tell it with `handle_shielded`.
    CountShielded,
}

/// What control must know about this node's reachability.
#[derive(Debug, Clone, PartialEq)]
pub struct HostUpdate {
    /// Where peers may reach us, most promising first.
    pub endpoints: Vec<(SocketAddr, EndpointType)>,
    /// Home region, latencies, kind of NAT.
    pub net_info: NetInfo,
    /// Public half of the disco key in use.
    pub disco: DiscoPublic,
    /// Stable id of the exit node in use, empty for none.
    pub exit_node_id: String,
}

/// Which destinations beyond the tailnet's own ranges belong into this node's TUN.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RoutesView {
    /// Subnet routes that peers carry, sorted.
    pub accepted: Vec<IpNet>,
    /// Stable id of the exit node; `None` while none is chosen or the chosen one is not in the tailnet.
    pub exit_node: Option<String>,
}

/// The node as its netmap has it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Status {
    /// Whether a netmap (from control or from the snapshot) is in force.
    pub running: bool,
    /// Whether the map stream is up.
    pub control_connected: bool,
    /// This node.
    pub node: Option<SelfView>,
    /// Home region.
    pub home_derp: RegionId,
    /// What control, the home relay and this node itself find wrong.
    pub health: Vec<HealthMessage>,
}

/// This node in its tailnet.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SelfView {
    /// Fully qualified name, no trailing dot.
    pub name: String,
    /// Node addresses.
    pub addresses: Vec<IpNet>,
    /// ACL tags.
    pub tags: Vec<String>,
    /// Stable node id.
    pub stable_id: String,
    /// When the key expires; `None` for never.
    pub key_expiry: Option<UnixTime>,
    /// Whether the machine is approved.
    pub machine_authorized: bool,
}

/// How packets reach a peer now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathView {
    /// No traffic.
    Idle,
    /// Through this region.
    Relay(RegionId),
    /// Straight, with this round trip.
    Direct(SocketAddr, Duration),
}

/// One peer, for people and metrics.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerView {
    /// Control's number for the peer.
    pub id: NodeId,
    /// Node key.
    pub key: NodePublic,
    /// Fully qualified name; the first address of a peer that has none.
    pub name: String,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Path in use.
    pub path: PathView,
    /// Since the last completed handshake.
    pub handshake_age: Option<Duration>,
    /// Since data was last sent.
    pub last_tx_age: Option<Duration>,
    /// Since data was last received.
    pub last_rx_age: Option<Duration>,
    /// Plaintext bytes sent.
    pub tx_bytes: u64,
    /// Plaintext bytes received.
    pub rx_bytes: u64,
}

/// The way to one peer, for people.
#[derive(Debug, Clone, PartialEq)]
pub struct WayView {
    /// The peer.
    pub peer: PeerView,
    /// Its home region.
    pub home: RegionId,
    /// Whether control thinks it is online.
    pub online: Option<bool>,
    /// Where it may be reached without a relay.
    pub endpoints: Vec<EndpointView>,
    /// What keeps packets from being exchanged with it at all.
    pub obstacle: Option<DropReason>,
}

/// An address of a peer's on the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointView {
    /// Where.
    pub address: SocketAddr,
    /// Since it was last asked.
    pub asked_age: Option<Duration>,
    /// Whether there is a socket of its family.
    pub reachable: bool,
}

/// What the network looks like from here, for people.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NetView {
    /// Whether a STUN server answered in the last round.
    pub udp: bool,
    /// Our address as STUN servers see it, over IPv4 and IPv6.
    pub mapped: [Option<SocketAddr>; 2],
    /// Whether the NAT gives a new port for each destination.
    pub mapping_varies: Option<bool>,
    /// What peers are told.
    pub endpoints: Vec<SocketAddr>,
    /// Home region.
    pub home: RegionId,
    /// Relay regions, nearest first.
    pub regions: Vec<RegionView>,
    /// Since the last round of measurements began.
    pub age: Option<Duration>,
}

/// A relay region.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegionView {
    /// Its number.
    pub id: RegionId,
    /// Short name.
    pub code: String,
    /// Long name.
    pub name: String,
    /// Best round trip.
    pub latency: Option<Duration>,
    /// Whether a connection to it is up.
    pub connected: bool,
}

macro_rules! drop_reasons {
    ($(#[doc = $doc:literal] $name:ident = $text:literal,)*) => {
        /// Why a packet was dropped. A bounded set: these become metric labels.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum DropReason {
            $(#[doc = $doc] $name,)*
        }

        impl DropReason {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Its name in metrics.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// A sentence about it.
            #[must_use]
            pub fn meaning(self) -> &'static str {
                match self {
                    $(Self::$name => $doc.trim_ascii(),)*
                }
            }
        }
    };
}

drop_reasons! {
    /// Not an IP packet that can be judged.
    Malformed = "malformed",
    /// From the pod to an address that no peer has.
    NoPeer = "no_peer",
    /// From the pod to what the exit node should carry, which is not usable.
    NoExitNode = "no_exit_node",
    /// To a peer whose key has expired.
    PeerExpired = "peer_expired",
    /// From the pod with a source address that is not the node's.
    SourceNotOurs = "source_not_ours",
    /// From the pod to the tailnet's service address.
    ServiceAddress = "service_address",
    /// To a peer that neither a relay nor an address leads to.
    NoPath = "no_path",
    /// Pushed out of the queue that waits for a handshake.
    HandshakeQueueFull = "handshake_queue_full",
    /// Waited for a handshake that never came about.
    HandshakeTimeout = "handshake_timeout",
    /// The outgoing batch or a relay's queue was full.
    QueueFull = "queue_full",
    /// Longer than the TUN's MTU.
    TooBig = "too_big",
    /// From the underlay, not WireGuard, disco or STUN.
    UnknownDatagram = "unknown_datagram",
    /// WireGuard for a session that is not ours (any more).
    UnknownSession = "unknown_session",
    /// WireGuard from a key that the netmap does not have.
    UnknownPeer = "unknown_peer",
    /// WireGuard that does not decrypt or is too old.
    BadCrypto = "bad_crypto",
    /// WireGuard that came before: a second copy or a replay.
    Duplicate = "duplicate",
    /// Handshakes and disco keys beyond what this node works on.
    UnderLoad = "under_load",
    /// Decrypted, from an address that is not the peer's.
    PeerSource = "peer_source",
    /// Decrypted, for an address that is not the node's.
    NotForUs = "not_for_us",
    /// Decrypted, and no rule of the packet filter lets it in.
    Filter = "filter",
    /// Decrypted, from a jailed peer, which may only answer.
    Jailed = "jailed",
    /// Decrypted, to a multicast address.
    Multicast = "multicast",
    /// Decrypted, to a link-local address.
    LinkLocal = "link_local",
    /// A fragment that hides a transport header.
    Fragment = "fragment",
    /// IPv6 with an extension header other than Fragment.
    ExtensionHeader = "extension_header",
    /// TSMP from the pod: only nodes speak it.
    Tsmp = "tsmp_from_pod",
    /// Disco that does not open or does not parse.
    BadDisco = "bad_disco",
    /// Disco from a key that no peer of the netmap has.
    UnknownDisco = "unknown_disco",
    /// More disco from a peer than is answered.
    DiscoFlood = "disco_flood",
    /// From the pod to more peers at once than are begun with.
    TooManyPeers = "too_many_peers",
    /// Dropped by the kernel in a flood, unseen by this process.
    Shielded = "flood_shield",
}

impl DropReason {
    /// Whether somebody sent what no sound program sends, or far too much; the others happen to everybody.
    #[must_use]
    pub fn is_bad_input(self) -> bool {
        matches!(
            self,
            Self::Malformed
                | Self::SourceNotOurs
                | Self::TooBig
                | Self::TooManyPeers
                | Self::UnknownDatagram
                | Self::UnknownSession
                | Self::UnknownPeer
                | Self::BadCrypto
                | Self::UnderLoad
                | Self::PeerSource
                | Self::NotForUs
                | Self::BadDisco
                | Self::UnknownDisco
                | Self::DiscoFlood
                | Self::Shielded
        )
    }
}

/// Counters since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Plaintext from the pod that was sent on.
    pub tx_packets: u64,
    /// See `tx_packets`.
    pub tx_bytes: u64,
    /// Plaintext that was given to the pod.
    pub rx_packets: u64,
    /// See `rx_packets`.
    pub rx_bytes: u64,
    /// WireGuard packets sent straight.
    pub udp_sent: u64,
    /// WireGuard packets sent through relays.
    pub derp_sent: u64,
    /// Connections from peers that the filter refused and whose peer was told so.
    pub rejects_sent: u64,
    /// Connections of the pod that a peer said it refuses.
    pub rejects_received: u64,
    /// Disco keys that peers told themselves and that were taken over.
    pub disco_adverts: u64,
    /// Handshakes completed.
    pub handshakes: u64,
    /// Wall clock of the last one.
    pub last_handshake: Option<UnixTime>,
    /// Parts of map messages that made no sense or were over a bound.
    pub map_ignored: u64,
    /// News of peers that the netmap does not have.
    pub map_unknown: u64,
    pub(crate) drops: [u64; DropReason::ALL.len()],
    /// Sum of `drops`.
    pub(crate) dropped: u64,
}

impl Counters {
    pub(crate) fn drop(&mut self, reason: DropReason, packets: usize) {
        let packets = u64::try_from(packets).unwrap_or(u64::MAX);
        self.drops[reason as usize] += packets;
        self.dropped += packets;
    }

    /// Packets dropped, by reason, zeros included.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> {
        DropReason::ALL.iter().copied().zip(self.drops)
    }
}

/// A peer whose handshake is under way for so long does not answer: retries come after 0.5, 1.5 and 3.5 s.
pub const UNANSWERED_AFTER: Duration = Duration::from_secs(5);

/// Gauges of now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Peers in the netmap.
    pub peers: usize,
    /// Peers with a trusted direct path.
    pub peers_direct: usize,
    /// Peers with traffic through a relay.
    pub peers_relay: usize,
    /// Peers that have not answered a handshake for [`UNANSWERED_AFTER`]; they count in neither of the others.
    pub peers_unanswered: usize,
    /// Round trips of the direct paths: the shortest, their sum, the longest.
    pub rtt: Option<[Duration; 3]>,
    /// Regions connected.
    pub derp_connected: usize,
    /// Whether the home region is one of them.
    pub home_connected: bool,
    /// Round trip to the home region, as last measured.
    pub home_latency: Option<Duration>,
    /// Rules of the packet filter in force.
    pub filter_rules: usize,
    /// Parts of rules that were left out because they do not parse or are too many.
    pub filter_skipped: usize,
}
