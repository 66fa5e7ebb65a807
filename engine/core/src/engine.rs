//! The node as a whole: one owner of all protocol state, driven by facts and time.
//!
//! | file | decides |
//! |---|---|
//! | `outbound` | where the pod's packets go, and how WireGuard messages are sent |
//! | `inbound` | what datagrams and relay packets are, and which of their content reaches the pod |
//! | `discovery` | disco and STUN: finding and keeping paths |
//! | `routing` | whose routes and which exit node the pod uses |
//! | `ping` | pings of peers, and what control is answered that asks for them |
//! | `relay` | which DERP regions are connected, and what waits for one |
//! | `load` | how much of what others ask for is done |
//! | `shield` | when the UDP sockets are flooded, and what the kernel then drops |
//! | `handover` | what two processes of one node are to each other while one replaces the other |
//! | `control` | what a netmap change means for peers, filter, names and relays |
//! | `timers` | what is due when |
//! | `view` | what others are shown |
//! | `tsmp` | what nodes tell each other inside the tunnel |
//! | `warm` | what a restart carries over |
//! | `why` | what would become of a packet, and by which rule |

pub mod api;
mod control;
mod discovery;
mod handover;
mod inbound;
mod load;
mod names;
mod outbound;
mod ping;
mod relay;
mod routing;
mod shield;
mod timers;
mod tsmp;
mod view;
mod warm;
mod why;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

pub use api::{
    Config, ControlEvent, Counters, DerpEvent, DropReason, EndpointView, Event, Gauges, HostUpdate, NetView,
    PathView, PeerList, PeerView, RegionView, RoutesView, SelfView, Status, WayView,
};

pub use ping::{ControlAnswer, PingError, PingId, PingKind, PingReply, PingResult};
pub use shield::{Class, Shield};
pub use why::{Decision, Direction, Question, Why};

use crate::batch::{Batch, Outbox, RegionId};
use crate::budget::Bucket;
use crate::disco;
use crate::dns::Dns;
use crate::filter::{FilterBuild, FilterState};
use crate::key::{DiscoPrivate, DiscoPublic, NodePrivate, NodePublic};
use crate::netcheck::{Netcheck, StunRequest};
use crate::netmap::NetMap;
pub use crate::path::Patience;
use crate::path::{Action, PathAgent};
use crate::peer::{Active, PeerTable, Slot};
use crate::random::Random;
use crate::routes::Routing;
use crate::tailcfg::{DerpRegion, EndpointType, NodeId, UnixTime};
use crate::wg::{Identity, Tunnel};

use relay::Relays;

/// So long after we first heard of a peer it may not have heard of us, or neither be at its relay yet.
const ACQUAINTANCE: Duration = Duration::from_secs(10);
/// With more peers in use, handshakes are not retried eagerly: each costs a tenth of a millisecond.
const MAX_EAGER: usize = 64;
/// Packets that wait for handshakes, all peers together.
const MAX_WAITING: usize = 1024;

/// The underlay as the shell last described it. Before that, both families are assumed to work.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Underlay {
    known: bool,
    addresses: Vec<IpAddr>,
    port_v4: Option<u16>,
    port_v6: Option<u16>,
}

impl Underlay {
    fn v4(&self) -> bool {
        !self.known || self.port_v4.is_some()
    }

    fn v6(&self) -> bool {
        !self.known || self.port_v6.is_some()
    }
}

/// One node of a tailnet, without I/O.
pub struct Engine {
    identity: Identity,
    node_key: NodePrivate,
    disco_key: DiscoPrivate,
    disco_public: DiscoPublic,
    mtu: usize,
    started: Instant,
    wall_at_start: UnixTime,
    /// What initiations are stamped with at the start: the wall clock, unless that was set back since an earlier life.
    stamped_at_start: UnixTime,
    random: Random,

    netmap: NetMap,
    running: bool,
    control_connected: bool,
    key_expired: bool,
    own: Vec<IpAddr>,
    /// What control lets this node carry for others besides its addresses.
    own_routes: Vec<ipnet::IpNet>,
    /// The pod's own address of each family, which a masquerade stands for.
    native: [Option<IpAddr>; 2],
    filter: FilterState,
    /// The next filter, while it is put together.
    filter_build: Option<FilterBuild>,
    /// The rules have changed since that began.
    filter_again: bool,
    /// Peers without a tailnet lock signature.
    unsigned: BTreeSet<NodeId>,
    /// The rules would let such a peer in, so none of them is in force.
    filter_discarded: bool,
    rejections: tsmp::Rejections,
    dns: Dns,

    peers: PeerTable,
    routing: routing::State,
    by_index: HashMap<u32, Slot, BuildHasherDefault<IndexHasher>>,
    timers: BTreeSet<(Instant, Slot)>,
    waiting: usize,
    /// Peers of an earlier life that are to be greeted first thing.
    greet: Vec<Slot>,
    pings: ping::Pings,
    /// Control has spoken in this life, so the clock can be judged.
    control_heard: bool,
    load: load::Load,
    watch: shield::Watch,

    handover: handover::State,
    relays: Relays,
    netcheck: Netcheck,
    underlay: Underlay,
    patience: Patience,
    endpoints: Vec<(SocketAddr, EndpointType)>,
    reported: Option<discovery::Reported>,
    report_at: Option<Instant>,
    last_report: Option<Instant>,
    snapshot_at: Option<Instant>,
    last_snapshot: Option<Instant>,

    events: VecDeque<Event>,
    counters: Counters,
    // Reused between calls.
    scratch: Vec<u8>,
    actions: Vec<Action>,
    stun_requests: Vec<StunRequest>,
    to_resolve: Vec<String>,
}

impl Engine {
    /// A node that starts now; with a snapshot it is running at once.
    #[must_use]
    pub fn new(config: Config, now: Instant) -> Self {
        let disco_key = config.snapshot.as_ref().map_or(config.disco_key, |s| s.disco.clone());
        let mut random = Random::new(config.random_seed);
        let load = load::Load::new(&mut random);
        let mut watch = shield::Watch::new(&mut random, now);
        while config.standby == Some(watch.marks.index) {
            watch = shield::Watch::new(&mut random, now);
        }
        let netcheck = Netcheck::new(watch.marks.stun);
        let dns = Dns::new(random.bytes());
        let earlier = config.snapshot.as_ref().map(|snapshot| (snapshot.body.wall, snapshot.body.stamped));
        let stamped = warm::stamped(config.wall, earlier);
        let mut engine = Self {
            identity: Identity::new(*config.node_key.expose(), stamped, now),
            stamped_at_start: stamped,
            node_key: config.node_key,
            disco_public: disco_key.public(),
            disco_key,
            mtu: usize::from(config.mtu),
            started: now,
            wall_at_start: config.wall,
            random,
            netmap: NetMap::new(),
            running: false,
            control_connected: false,
            key_expired: false,
            own: Vec::new(),
            own_routes: Vec::new(),
            native: [None; 2],
            filter: FilterState::default(),
            filter_build: None,
            filter_again: false,
            unsigned: BTreeSet::new(),
            filter_discarded: false,
            rejections: tsmp::Rejections::default(),
            dns,
            peers: PeerTable::default(),
            routing: routing::State::default(),
            by_index: HashMap::default(),
            timers: BTreeSet::new(),
            waiting: 0,
            greet: Vec::new(),
            pings: ping::Pings::default(),
            control_heard: false,
            load,
            watch,
            handover: handover::State::new(config.standby.is_some()),
            relays: Relays::new(u64::from(config.random_seed[0]) << 8 | u64::from(config.random_seed[1])),
            netcheck,
            underlay: Underlay::default(),
            patience: Patience::default(),
            endpoints: Vec::new(),
            reported: None,
            report_at: None,
            last_report: None,
            snapshot_at: None,
            last_snapshot: None,
            events: VecDeque::new(),
            counters: Counters::default(),
            scratch: vec![0; usize::from(config.mtu) + 256],
            actions: Vec::new(),
            stun_requests: Vec::new(),
            to_resolve: Vec::new(),
        };
        if let Some(snapshot) = config.snapshot {
            engine.restore(snapshot, now);
        }
        engine
    }

    /// Sets how soon peers that become active from here on are doubted.
    pub fn set_patience(&mut self, patience: Patience) {
        self.patience = patience;
    }

    /// The next thing for the shell to do. Ask after every call until there is none.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Wall clock at `now`, as the node's own machine has it.
    fn wall(&self, now: Instant) -> UnixTime {
        self.wall_at_start.saturating_add(now.saturating_duration_since(self.started))
    }

    /// What keeps packets from being exchanged with a peer at all.
    fn obstacle(&self, slot: Slot, now: Instant) -> Option<DropReason> {
        let wall = self.netmap.control_time(self.wall(now));
        let Some(peer) = self.peers.get(slot) else { return Some(DropReason::NoPeer) };
        if peer.is_expired(wall) {
            return Some(DropReason::PeerExpired);
        }
        // Neither disco nor, as stock sees it, DERP reaches such a peer.
        (peer.disco.is_zero() && !peer.wireguard_only).then_some(DropReason::NoPath)
    }

    /// When the peer's key expires, on this machine's clock. `None` for never, or beyond what an `Instant`
    /// can hold.
    fn peer_expiry(&self, slot: Slot, now: Instant) -> Option<Instant> {
        let expiry = self.peers.get(slot)?.key_expiry?;
        now.checked_add(expiry.saturating_since(self.netmap.control_time(self.wall(now))))
    }

    /// Sees to it that running peers end when their keys expire.
    fn watch_expiry(&mut self, slot: Slot, now: Instant) {
        let expires = self.peer_expiry(slot, now);
        if let Some(active) = self.active(slot).filter(|active| active.expires != expires) {
            active.expires = expires;
            self.schedule(slot);
        }
    }

    /// Gives a peer its running state, unless it has it. False when it can have none.
    fn activate(&mut self, slot: Slot, now: Instant) -> bool {
        let Some(peer) = self.peers.get(slot) else { return false };
        if peer.active.is_some() {
            return true;
        }
        if self.obstacle(slot, now).is_some() {
            return false;
        }
        let expires = self.peer_expiry(slot, now);
        let index = loop {
            // Sixteen bits are enough for `MAX_ACTIVE`; the others tell ours from a stranger's guess.
            let [a, b, ..] = self.random.next_u64().to_le_bytes();
            let index = u32::from_le_bytes([a, b, self.watch.marks.index, 0]);
            if !self.by_index.contains_key(&index) {
                break index;
            }
        };
        let Some(peer) = self.peers.get_mut(slot) else { return false };
        let jitter = self.random.next_u64();
        let mut path = PathAgent::new(peer.wireguard_only, self.patience);
        path.set_endpoints(&peer.facts.endpoints().collect::<Vec<_>>());
        let disco = peer.disco;
        let mut tunnel = Tunnel::new(&self.identity, *peer.key.as_bytes(), index, jitter, now);
        tunnel.remember(peer.newest_initiation);
        if self.patience == Patience::Stock {
            tunnel.be_patient();
        } else if self.by_index.len() < MAX_EAGER {
            tunnel.be_eager(peer.since + ACQUAINTANCE);
        }
        peer.active = Some(Box::new(Active {
            tunnel,
            path,
            index,
            shared: (!disco.is_zero()).then(|| disco::SharedKey::new(&self.disco_key, &disco)),
            scheduled: None,
            expires,
            last_tx: None,
            last_rx: None,
            last_from: None,
            tx_bytes: 0,
            rx_bytes: 0,
            pings: Bucket::default(),
            calls: Bucket::default(),
        }));
        self.by_index.insert(index, slot);
        self.schedule(slot);
        true
    }

    /// Ends a peer's running state.
    fn deactivate(&mut self, slot: Slot) {
        if let Some(active) = self.peers.get_mut(slot).and_then(|peer| peer.active.take()) {
            self.forget(slot, &active);
        }
    }

    fn forget(&mut self, slot: Slot, active: &Active) {
        self.waiting -= active.tunnel.waiting().min(self.waiting);
        self.by_index.remove(&active.index);
        if let Some(at) = active.scheduled {
            self.timers.remove(&(at, slot));
        }
    }
}

/// For receiver indices. We draw them at random, so nobody else can make them collide.
#[derive(Debug, Default)]
struct IndexHasher(u64);

impl Hasher for IndexHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, index: u32) {
        // The table looks at the low and at the high bits.
        self.0 = (self.0 ^ u64::from(index)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_right(20);
    }
}

/// How a packet came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Via {
    Udp(SocketAddr),
    Derp(RegionId, NodePublic),
}

impl Via {
    fn socket(self) -> Option<SocketAddr> {
        match self {
            Self::Udp(from) => Some(from),
            Self::Derp(..) => None,
        }
    }
}
