//! Real engines on a simulated network with a simulated clock: hosts with and without NAT, lossy and
//! reordering links, relays with STUN, and a control server that hands every change on.

#![allow(dead_code, unused_imports, reason = "each test program uses its part")]

pub(crate) mod faults;
mod frozen;
mod nat;
mod packets;
mod relays;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use podtether_core::batch::{Batch, DerpDestination, Outbox, RegionId};
use podtether_core::engine::{
    Config, ControlEvent, DerpEvent, Engine, Event, PathView, Patience, PingId, PingKind, Shield,
};
use podtether_core::filter::Rule;
use podtether_core::key::{DiscoPrivate, NodePrivate, NodePublic};
use podtether_core::snapshot::Snapshot;
use podtether_core::stun;
use podtether_core::tailcfg::{
    DerpMap, DerpNode, DerpRegion, FilterRule, MapResponse, NetPortRange, Node, NodeId, PortRange, UnixTime,
};

pub(crate) fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub(crate) fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// splitmix64.
#[derive(Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    pub(crate) fn bytes(&mut self) -> [u8; 32] {
        let mut out = [0; 32];
        for chunk in out.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes());
        }
        out
    }
}

pub(crate) use nat::Nat;
use nat::{End, Topology};
pub(crate) use packets::{udp_packet, v6_packet};

pub(crate) struct SimNode {
    pub(crate) engine: Option<Engine>,
    pub(crate) key: NodePrivate,
    /// Public, without NAT.
    pub(crate) v6: Option<SocketAddr>,
    /// Timers as a stock node has them.
    pub(crate) stock: bool,
    pub(crate) tailnet: Ipv4Addr,
    pub(crate) record: Node,
    connected: BTreeSet<RegionId>,
    /// Connected regions whose connections carry nothing any more, and since when.
    silent: BTreeMap<RegionId, Instant>,
    wanted: BTreeSet<RegionId>,
    pub(crate) snapshot: Option<Vec<u8>>,
    life: u32,
    /// Sequence numbers received, with their times.
    pub(crate) received: Vec<(usize, u64, Instant)>,
    pub(crate) events: Vec<Event>,
    joined: bool,
    pub(crate) wakeups: u64,
}

enum What {
    Udp {
        to: usize,
        from: SocketAddr,
        datagram: Vec<u8>,
    },
    /// From a STUN server to a mapped address.
    Stun {
        to: SocketAddr,
        from: SocketAddr,
        datagram: Vec<u8>,
    },
    Derp {
        to: usize,
        life: u32,
        region: RegionId,
        source: NodePublic,
        packet: Vec<u8>,
    },
    DerpUp {
        node: usize,
        life: u32,
        region: RegionId,
    },
    DerpHeard {
        to: usize,
        life: u32,
        region: RegionId,
    },
    StockTimeout {
        node: usize,
        life: u32,
        region: RegionId,
        silent: Instant,
    },
    Latency {
        to: usize,
        life: u32,
        region: RegionId,
        latency: Option<Duration>,
    },
    PeerGone {
        to: usize,
        life: u32,
        region: RegionId,
        peer: NodePublic,
    },
    Control {
        to: usize,
        life: u32,
        message: Box<MapResponse>,
        first: bool,
    },
    HostUpdate {
        from: usize,
        record: Box<Node>,
    },
    Resolved {
        to: usize,
        life: u32,
        host: String,
    },
}

struct Pending {
    at: Instant,
    seq: u64,
    what: What,
}

impl PartialEq for Pending {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.seq) == (other.at, other.seq)
    }
}
impl Eq for Pending {}
impl PartialOrd for Pending {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Pending {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.seq).cmp(&(other.at, other.seq))
    }
}

pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) start: Instant,
    pub(crate) rng: Rng,
    pub(crate) nodes: Vec<SimNode>,
    queue: BinaryHeap<Reverse<Pending>>,
    seq: u64,
    /// Lost UDP datagrams, per mille.
    pub(crate) loss: u64,
    /// One way, fixed and random part.
    pub(crate) latency: Duration,
    pub(crate) jitter: Duration,
    pub(crate) derp_latency: Duration,
    pub(crate) derp_connect: Duration,
    /// Hosts that UDP neither leaves nor reaches.
    pub(crate) udp_blocked: BTreeSet<usize>,
    pub(crate) v6_blocked: bool,
    /// Regions whose relays are gone, and those whose STUN servers are.
    pub(crate) derp_down: BTreeSet<RegionId>,
    pub(crate) stun_down: BTreeSet<RegionId>,
    /// Added to the distance of a region.
    pub(crate) detours: BTreeMap<RegionId, Duration>,
    pub(crate) control_down: bool,
    pub(crate) derp_regions: Vec<u32>,
    pub(crate) control_latency: Duration,
    /// From a change of a node to the others' knowledge of it.
    pub(crate) news_latency: Duration,
    /// UDP datagrams between nodes, and packets through relays, that were WireGuard data.
    pub(crate) udp_data: u64,
    pub(crate) derp_data: u64,
    pub(crate) rules: Vec<Rule>,
    /// Filters on nodes' sockets, and what they dropped since they were asked.
    pub(crate) shields: BTreeMap<usize, (Shield, u64)>,
    /// What waits in the kernel for nodes whose processes stand still.
    frozen: BTreeMap<usize, frozen::Queues>,
    /// In each direction between these.
    pub(crate) blocked_pairs: BTreeSet<(usize, usize)>,
    pub(crate) net: Topology,
}

pub(crate) fn allow_all() -> Vec<Rule> {
    let to = NetPortRange { ip: "*".into(), ports: PortRange::ANY };
    vec![FilterRule { src_ips: vec!["*".into()], dst_ports: vec![to], ..FilterRule::default() }.into()]
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let start = Instant::now() + secs(1_000_000);
        Self {
            now: start,
            start,
            rng: Rng(seed),
            nodes: Vec::new(),
            queue: BinaryHeap::new(),
            seq: 0,
            loss: 0,
            latency: ms(10),
            jitter: ms(0),
            derp_latency: ms(20),
            derp_connect: ms(60),
            udp_blocked: BTreeSet::new(),
            v6_blocked: false,
            derp_down: BTreeSet::new(),
            stun_down: BTreeSet::new(),
            detours: BTreeMap::new(),
            control_down: false,
            derp_regions: vec![1],
            control_latency: ms(30),
            news_latency: ms(30),
            udp_data: 0,
            derp_data: 0,
            rules: allow_all(),
            shields: BTreeMap::new(),
            frozen: BTreeMap::new(),
            blocked_pairs: BTreeSet::new(),
            net: Topology::default(),
        }
    }

    pub(crate) fn derp_map(&self) -> DerpMap {
        let regions = self.derp_regions.iter().map(|id| {
            let octet = u8::try_from(*id).expect("small");
            let node = DerpNode {
                name: format!("{id}a"),
                region_id: RegionId(*id),
                host_name: format!("derp{id}.test"),
                ipv4: if id % 2 == 1 {
                    Ipv4Addr::new(198, 51, 100, octet).to_string()
                } else {
                    String::new()
                },
                ..DerpNode::default()
            };
            let region = DerpRegion { region_id: RegionId(*id), nodes: vec![node], ..DerpRegion::default() };
            (RegionId(*id), region)
        });
        DerpMap { regions: Some(regions.collect()), ..DerpMap::default() }
    }

    pub(crate) fn wall(&self) -> UnixTime {
        UnixTime::from_secs(1_800_000_000).saturating_add(self.now - self.start)
    }

    pub(crate) fn add(&mut self, nat: Nat) -> usize {
        let n = self.net.add_host(nat);
        self.add_node(n)
    }

    /// A node behind a box that others may be behind too.
    pub(crate) fn add_behind(&mut self, nat_box: usize) -> usize {
        let n = self.net.add_host_behind(Some(nat_box));
        self.add_node(n)
    }

    fn add_node(&mut self, n: usize) -> usize {
        let octet = u8::try_from(n + 1).expect("few nodes");
        let key = NodePrivate::from_bytes(self.rng.bytes());
        let tailnet = Ipv4Addr::new(100, 64, 0, octet);
        let addresses: Vec<_> = [format!("{tailnet}/32"), format!("fd7a:115c:a1e0::{octet:x}/128")]
            .iter()
            .map(|net| net.parse().expect("a net"))
            .collect();
        let record = Node {
            id: NodeId(u64::from(octet)),
            stable_id: format!("n{n}"),
            name: format!("n{n}.sim.ts.net."),
            key: key.public(),
            addresses: addresses.clone(),
            allowed_ips: addresses,
            machine_authorized: true,
            ..Node::default()
        };
        self.nodes.push(SimNode {
            engine: None,
            key,
            v6: None,
            stock: false,
            tailnet,
            record,
            connected: BTreeSet::new(),
            silent: BTreeMap::new(),
            wanted: BTreeSet::new(),
            snapshot: None,
            life: 0,
            received: Vec::new(),
            events: Vec::new(),
            joined: false,
            wakeups: 0,
        });
        n
    }

    /// Starts a node's engine: its process begins.
    pub(crate) fn boot(&mut self, n: usize, snapshot: bool) {
        let seed = self.rng.bytes();
        let disco = DiscoPrivate::from_bytes(self.rng.bytes());
        let wall = self.wall();
        let node = &mut self.nodes[n];
        let snapshot = node.snapshot.as_ref().filter(|_| snapshot);
        let snapshot = snapshot.map(|bytes| Snapshot::from_bytes(bytes).expect("our own snapshot"));
        let config = Config {
            node_key: node.key.clone(),
            disco_key: disco,
            mtu: 1280,
            random_seed: seed,
            standby: None,
            wall,
            snapshot,
        };
        let mut engine = Engine::new(config, self.now);
        let mut out = Outbox::default();
        if node.stock {
            engine.set_patience(Patience::Stock);
        }
        node.engine = Some(engine);
        self.tell_underlay(n);
        self.emit(n, &mut out);
        self.open_session(n);
    }

    fn tell_underlay(&mut self, n: usize) {
        let (inside, v6) = (self.net.place(n).address, self.nodes[n].v6);
        let addresses: Vec<IpAddr> = [Some(inside), v6].into_iter().flatten().map(|a| a.ip()).collect();
        let (mut out, now) = (Outbox::default(), self.now);
        let ports = (Some(inside.port()), v6.map(|a| a.port()));
        self.engine(n).handle_underlay(&addresses, ports.0, ports.1, now, &mut out);
        self.emit(n, &mut out);
    }

    fn open_session(&mut self, n: usize) {
        if self.control_down {
            return;
        }
        let update = self.nodes[n].engine.as_ref().expect("booted").host_update();
        let mut record = self.nodes[n].record.clone();
        record.disco_key = update.disco;
        record.endpoints = update.endpoints.iter().map(|e| e.0).collect();
        record.home_derp = update.net_info.preferred_derp;
        self.push(self.control_latency, What::HostUpdate { from: n, record: Box::new(record) });
        let life = self.nodes[n].life;
        // The answer is made when the request arrives; `first` marks it.
        self.push(
            self.control_latency * 2,
            What::Control { to: n, life, message: Box::default(), first: true },
        );
    }

    /// `kill -9`: what was in memory is gone, the socket and its NAT mappings stay.
    pub(crate) fn kill(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        node.engine = None;
        node.life += 1;
        node.connected.clear();
        node.wanted.clear();
        node.silent.clear();
        self.shields.remove(&n);
    }

    /// The host moves to another network, with another address; the process stays. Its connections to
    /// relays do not notice.
    pub(crate) fn roam(&mut self, n: usize) {
        let nat = self.net.nat(n);
        self.roam_to(n, nat);
    }

    pub(crate) fn roam_to(&mut self, n: usize, nat: Nat) {
        self.net.roam(n, nat);
        self.silence_derp(n);
        if self.nodes[n].engine.is_some() {
            self.tell_underlay(n);
        }
    }

    /// Control is away, or back.
    pub(crate) fn set_control(&mut self, up: bool) {
        self.control_down = !up;
        for n in 0..self.nodes.len() {
            if self.nodes[n].engine.is_none() {
                continue;
            }
            if up {
                self.open_session(n);
            } else {
                let (mut out, now) = (Outbox::default(), self.now);
                self.engine(n).handle_control(ControlEvent::SessionLost, now, &mut out);
                self.emit(n, &mut out);
            }
        }
    }

    /// A message of control to one node.
    pub(crate) fn tell(&mut self, n: usize, message: MapResponse) {
        let mut out = Outbox::default();
        let now = self.now;
        self.engine(n).handle_control(ControlEvent::Map(Box::new(message)), now, &mut out);
        self.emit(n, &mut out);
    }

    /// The host's NAT forgets and gives new ports from now on.
    pub(crate) fn reset_nat(&mut self, n: usize) {
        self.net.reset(n);
    }

    fn push(&mut self, after: Duration, what: What) {
        self.seq += 1;
        self.queue.push(Reverse(Pending { at: self.now + after, seq: self.seq, what }));
    }

    pub(crate) fn engine(&mut self, n: usize) -> &mut Engine {
        self.nodes[n].engine.as_mut().expect("booted")
    }

    pub(crate) fn path(&self, from: usize, to: usize) -> PathView {
        let key = self.nodes[to].key.public();
        let engine = self.nodes[from].engine.as_ref().expect("booted");
        engine.peers(self.now).into_iter().find(|p| p.key == key).map_or(PathView::Idle, |p| p.path)
    }

    pub(crate) fn knows(&self, node: usize, other: usize) -> bool {
        let key = self.nodes[other].key.public();
        self.nodes[node].engine.as_ref().is_some_and(|e| e.peers(self.now).iter().any(|p| p.key == key))
    }

    pub(crate) fn direct(&self, from: usize, to: usize) -> bool {
        matches!(self.path(from, to), PathView::Direct(..))
    }

    /// A UDP packet of the pod, with a sequence number.
    pub(crate) fn send(&mut self, from: usize, to: usize, seq: u64) {
        let packet = udp_packet(self.nodes[from].tailnet, self.nodes[to].tailnet, 5000, 5000, seq);
        self.send_raw(from, &packet);
    }

    pub(crate) fn send_raw(&mut self, from: usize, packet: &[u8]) {
        if let Some(queues) = self.frozen.get_mut(&from) {
            return queues.keep_packet(packet);
        }
        let mut batch = Batch::new();
        assert!(batch.push((), packet));
        let mut out = Outbox::default();
        let now = self.now;
        if let Some(engine) = self.nodes[from].engine.as_mut() {
            engine.handle_tun(&mut batch, now, &mut out);
            self.emit(from, &mut out);
        }
    }

    /// A ping by the engine itself; its end is among the node's events.
    pub(crate) fn ping(&mut self, from: usize, to: IpAddr, kind: PingKind) -> PingId {
        let mut out = Outbox::default();
        let now = self.now;
        let id = self.engine(from).ping(to, kind, now, &mut out);
        self.emit(from, &mut out);
        id
    }

    /// Runs until `until`, or for ever early when nothing is left.
    pub(crate) fn run(&mut self, until: Instant) {
        loop {
            let packet = self.queue.peek().map(|Reverse(p)| p.at);
            let timer = self
                .nodes
                .iter()
                .enumerate()
                .filter(|(n, _)| !self.frozen.contains_key(n))
                .filter_map(|(n, node)| Some((node.engine.as_ref()?.poll_timeout()?, n)))
                .min();
            let next = [packet, timer.map(|t| t.0)].into_iter().flatten().min();
            let Some(next) = next.filter(|next| *next <= until) else { break };
            self.now = self.now.max(next);
            if packet == Some(next) {
                let Some(Reverse(pending)) = self.queue.pop() else { break };
                self.deliver(pending.what);
            } else if let Some((_, n)) = timer {
                let mut out = Outbox::default();
                let now = self.now;
                self.nodes[n].wakeups += 1;
                self.engine(n).handle_timeout(now, &mut out);
                self.emit(n, &mut out);
                let again = self.engine(n).poll_timeout();
                assert!(again.is_none_or(|at| at > now), "node {n} is due again at once");
            }
        }
        self.now = until;
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        self.run(self.now + time);
    }

    /// Sends what an engine wants sent and does what it asks for.
    fn emit(&mut self, n: usize, out: &mut Outbox) {
        let udp: Vec<_> = out.udp.iter().map(|(to, d)| (*to, d.to_vec())).collect();
        let derp: Vec<_> = out.derp.iter().map(|(to, d)| (*to, d.to_vec())).collect();
        let tun: Vec<_> = out.tun.iter().map(|(_, d)| d.to_vec()).collect();
        out.clear();
        for packet in tun {
            self.take_packet(n, &packet);
        }
        for (to, datagram) in udp {
            self.udp(n, to, datagram);
        }
        for (to, packet) in derp {
            self.derp(n, to, packet);
        }
        while let Some(event) = self.engine(n).poll_event() {
            self.event(n, event);
        }
    }

    fn take_packet(&mut self, n: usize, packet: &[u8]) {
        if packet[0] >> 4 == 6 {
            let now = self.now;
            return self.nodes[n].received.push((usize::from(packet[23]) - 1, u64::from(packet[47]), now));
        }
        let octet = usize::from(packet[15]);
        let seq = packet.get(28..36).map_or(0, |b| u64::from_be_bytes(b.try_into().expect("8")));
        let now = self.now;
        self.nodes[n].received.push((octet - 1, seq, now));
    }

    fn udp(&mut self, n: usize, to: SocketAddr, datagram: Vec<u8>) {
        if datagram.first() == Some(&4) && datagram.len() > 32 {
            self.udp_data += 1;
        }
        if self.udp_blocked.contains(&n) {
            return;
        }
        let (end, from) = if to.is_ipv6() {
            let Some(from) = self.nodes[n].v6.filter(|_| !self.v6_blocked) else { return };
            let Some(target) = self.nodes.iter().position(|node| node.v6 == Some(to)) else { return };
            (End::Host(target), from)
        } else {
            let Some(sent) = self.net.send(n, to, self.now) else { return };
            sent
        };
        if self.rng.chance(self.loss) {
            return;
        }
        let jitter = Duration::from_micros(
            self.rng.below(u64::try_from(self.jitter.as_micros()).expect("short").max(1)),
        );
        match end {
            End::Host(target) if !self.blocked_pairs.contains(&(n, target)) => {
                self.push(self.latency + jitter, What::Udp { to: target, from, datagram });
            }
            End::Host(_) => {}
            End::Internet => {
                if let (IpAddr::V4(ip), Ok(tx)) = (to.ip(), stun::parse_request(&datagram))
                    && let [198, 51, 100, region] = ip.octets()
                    && !self.stun_down.contains(&RegionId(region.into()))
                {
                    let answer = stun::response(&tx, from);
                    let delay = self.distance(RegionId(region.into())) * 2 + ms(2);
                    self.push(delay, What::Stun { to: from, from: to, datagram: answer });
                }
            }
        }
    }

    fn event(&mut self, n: usize, event: Event) {
        let life = self.nodes[n].life;
        match &event {
            Event::DerpConnect { region } => {
                self.nodes[n].wanted.insert(*region);
                self.push(self.derp_connect, What::DerpUp { node: n, life, region: *region });
            }
            Event::DerpClose { region } => {
                self.nodes[n].wanted.remove(region);
                self.nodes[n].connected.remove(region);
                self.nodes[n].silent.remove(region);
            }
            Event::DerpPing { region } => self.derp_ping(n, *region),
            Event::DerpReconnect { region } => {
                self.nodes[n].connected.remove(region);
                self.nodes[n].silent.remove(region);
                self.push(self.derp_connect, What::DerpUp { node: n, life, region: *region });
            }
            Event::HttpsLatency { region } => {
                let took = self.distance(*region) * 2 + ms(3);
                let latency = (!self.derp_down.contains(region)).then_some(took);
                let after = latency.unwrap_or(secs(3));
                self.push(after, What::Latency { to: n, life, region: *region, latency });
            }
            Event::HostUpdate if self.nodes[n].joined && !self.control_down => {
                let update = self.engine(n).host_update();
                let mut record = self.nodes[n].record.clone();
                record.disco_key = update.disco;
                record.endpoints = update.endpoints.iter().map(|e| e.0).collect();
                record.home_derp = update.net_info.preferred_derp;
                self.push(self.control_latency, What::HostUpdate { from: n, record: Box::new(record) });
            }
            Event::Resolve { host } => {
                self.push(ms(5), What::Resolved { to: n, life, host: host.clone() });
            }
            Event::SnapshotDirty => {
                let now = self.now;
                let bytes = self.engine(n).snapshot(now);
                self.nodes[n].snapshot = Some(bytes);
            }
            Event::HostUpdate
            | Event::SelfChanged
            | Event::RoutesChanged
            | Event::DerpPreferred { .. }
            | Event::ControlAnswer(_)
            | Event::Pong(_)
            | Event::KeyExpired => {}
            Event::ShieldChanged => {
                let dropped = self.shields.remove(&n).map_or(0, |(_, dropped)| dropped);
                if let Some(shield) = self.engine(n).shield().cloned() {
                    self.shields.insert(n, (shield, dropped));
                }
            }
            Event::CountShielded => {
                let dropped = self.shields.get_mut(&n).map_or(0, |(_, dropped)| std::mem::take(dropped));
                let now = self.now;
                self.engine(n).handle_shielded(dropped, now);
            }
        }
        self.nodes[n].events.push(event);
    }

    fn deliver(&mut self, what: What) {
        let Some(what) = self.unless_frozen(what) else { return };
        let now = self.now;
        let mut out = Outbox::default();
        match what {
            What::Udp { to, from, datagram, .. } => {
                if self.udp_blocked.contains(&to) {
                    return;
                }
                let dice =
                    f64::from(u32::try_from(self.rng.next() >> 32).expect("32 bits")) / f64::from(u32::MAX);
                if let Some((shield, dropped)) = self.shields.get_mut(&to)
                    && !shield.passes(from, &datagram, dice)
                {
                    *dropped += 1;
                    return;
                }
                let mut batch = Batch::new();
                assert!(batch.push(from, &datagram));
                // A dead process's socket keeps what arrives; here it is lost, which is worse.
                if let Some(engine) = self.nodes[to].engine.as_mut() {
                    engine.handle_udp(&mut batch, now, &mut out);
                    self.emit(to, &mut out);
                }
            }
            What::Stun { to, from, datagram } => {
                if let Some(End::Host(host)) = self.net.receive(from, to, now) {
                    self.deliver(What::Udp { to: host, from, datagram });
                }
            }
            What::Derp { to, life, region, source, mut packet } => {
                if self.nodes[to].life == life && self.carries(to, region) {
                    self.tell_derp(to, region, DerpEvent::Packet { source, payload: &mut packet });
                }
            }
            What::DerpUp { node, life, region } => self.derp_up(node, life, region),
            What::DerpHeard { to, life, region } => {
                if self.nodes[to].life == life && self.carries(to, region) {
                    self.tell_derp(to, region, DerpEvent::Heard);
                }
            }
            What::StockTimeout { node, life, region, silent } => {
                if self.nodes[node].life == life && self.nodes[node].silent.get(&region) == Some(&silent) {
                    self.nodes[node].silent.remove(&region);
                    self.nodes[node].connected.remove(&region);
                    self.tell_derp(node, region, DerpEvent::Disconnected);
                    self.push(self.derp_connect, What::DerpUp { node, life, region });
                }
            }
            What::Latency { to, life, region, latency } => {
                if self.nodes[to].life == life {
                    self.engine(to).handle_https_latency(region, latency, now);
                    self.emit(to, &mut out);
                }
            }
            What::PeerGone { to, life, region, peer } => {
                if self.nodes[to].life == life {
                    self.tell_derp(to, region, DerpEvent::PeerGone { peer });
                }
            }
            What::HostUpdate { from, record } => {
                if self.control_down {
                    return;
                }
                self.nodes[from].record = *record;
                for to in 0..self.nodes.len() {
                    if to != from && self.nodes[to].joined && self.nodes[to].engine.is_some() {
                        let message = MapResponse {
                            peers_changed: vec![self.nodes[from].record.clone()],
                            ..Default::default()
                        };
                        let life = self.nodes[to].life;
                        let what = What::Control { to, life, message: Box::new(message), first: false };
                        self.push(self.news_latency, what);
                    }
                }
            }
            What::Control { to, life, message, first } => {
                if self.control_down || self.nodes[to].life != life || self.nodes[to].engine.is_none() {
                    return;
                }
                let message = if first { Box::new(self.full_map(to)) } else { message };
                let was_joined = std::mem::replace(&mut self.nodes[to].joined, true);
                if first {
                    self.engine(to).handle_control(ControlEvent::SessionStarted, now, &mut out);
                }
                self.engine(to).handle_control(ControlEvent::Map(message), now, &mut out);
                self.emit(to, &mut out);
                if first && !was_joined {
                    // Others learn of the newcomer.
                    let record = Box::new(self.nodes[to].record.clone());
                    self.push(ms(0), What::HostUpdate { from: to, record });
                }
            }
            What::Resolved { to, life, host } => {
                if self.nodes[to].life == life {
                    let octet: u8 = host[4..host.find('.').expect("a name")].parse().expect("a number");
                    let addr = IpAddr::from([198, 51, 100, octet]);
                    self.engine(to).handle_resolved(&host, &[addr], now, &mut out);
                    self.emit(to, &mut out);
                }
            }
        }
    }

    fn full_map(&self, n: usize) -> MapResponse {
        let peers = self.nodes.iter().enumerate().filter(|(i, node)| *i != n && node.joined);
        MapResponse {
            node: Some(self.nodes[n].record.clone()),
            peers: peers.map(|(_, node)| node.record.clone()).collect(),
            derp_map: Some(self.derp_map()),
            packet_filter: Some(self.rules.clone()),
            ..MapResponse::default()
        }
    }

    pub(crate) fn set_rules(&mut self, n: usize, rules: Vec<Rule>) {
        self.tell(n, MapResponse { packet_filter: Some(rules), ..MapResponse::default() });
    }

    pub(crate) fn drops(&self, n: usize) -> Vec<(&'static str, u64)> {
        let engine = self.nodes[n].engine.as_ref().expect("booted");
        engine.counters().drops().filter(|(_, n)| *n > 0).map(|(r, n)| (r.name(), n)).collect()
    }

    /// Numbers of `from` that `to` has received.
    pub(crate) fn got(&self, from: usize, to: usize) -> BTreeSet<u64> {
        self.nodes[to].received.iter().filter(|(src, ..)| *src == from).map(|(_, seq, _)| *seq).collect()
    }

    /// One packet each way every `gap` for `time`, numbered on; returns the numbers sent.
    pub(crate) fn chat(
        &mut self,
        a: usize,
        b: usize,
        gap: Duration,
        time: Duration,
        next: &mut u64,
    ) -> std::ops::Range<u64> {
        let first = *next;
        let end = self.now + time;
        while self.now < end {
            self.send(a, b, *next);
            self.send(b, a, *next);
            *next += 1;
            self.run_for(gap);
        }
        first..*next
    }
}
