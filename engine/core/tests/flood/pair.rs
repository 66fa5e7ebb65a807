//! Two nodes and the network between them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use podtether_core::batch::{Batch, Outbox, RegionId};
use podtether_core::engine::{Config, ControlEvent, DerpEvent, DropReason, Engine};
use podtether_core::key::{DiscoPrivate, NodePrivate};
use podtether_core::tailcfg::{
    DerpMap, DerpNode, DerpRegion, FilterRule, MapResponse, NetPortRange, Node, NodeId, PortRange, UnixTime,
};

pub(crate) const REGION: RegionId = RegionId(1);
/// Datagrams of a second of flood, and how many come between two looks at the clock.
pub(crate) const PER_SECOND: u32 = 100_000;
pub(crate) const AT_ONCE: u32 = 50;
pub(crate) fn node_key(n: u16) -> NodePrivate {
    let mut bytes = [n.to_be_bytes()[1]; 32];
    bytes[7] = n.to_be_bytes()[0];
    NodePrivate::from_bytes(bytes)
}

pub(crate) fn disco_key(n: u16) -> DiscoPrivate {
    let mut bytes = [n.to_be_bytes()[1]; 32];
    bytes[7] = n.to_be_bytes()[0];
    bytes[9] = 0xd1;
    DiscoPrivate::from_bytes(bytes)
}

pub(crate) fn ip(n: u16) -> Ipv4Addr {
    let [high, low] = n.to_be_bytes();
    Ipv4Addr::new(100, 64, high, low)
}

pub(crate) fn endpoint(n: u16) -> SocketAddr {
    let [high, low] = n.to_be_bytes();
    SocketAddr::from(([10, 7, high, low], 1000))
}

pub(crate) fn node(n: u16) -> Node {
    let address = format!("{}/32", ip(n)).parse().expect("a net");
    Node {
        id: NodeId(u64::from(n)),
        name: format!("n{n}.test."),
        key: node_key(n).public(),
        disco_key: disco_key(n).public(),
        addresses: vec![address],
        allowed_ips: vec![address],
        endpoints: vec![endpoint(n)],
        home_derp: REGION,
        ..Node::default()
    }
}

pub(crate) fn engine(n: u16, peers: impl Iterator<Item = u16>, now: Instant) -> Engine {
    let config = Config {
        node_key: node_key(n),
        disco_key: disco_key(n),
        mtu: 1280,
        random_seed: [n.to_be_bytes()[1]; 32],
        standby: None,
        wall: UnixTime::from_secs(1_800_000_000),
        snapshot: None,
    };
    let mut engine = Engine::new(config, now);
    let mut out = Outbox::default();
    engine.handle_underlay(&[endpoint(n).ip()], Some(1000), None, now, &mut out);
    engine.handle_control(ControlEvent::SessionStarted, now, &mut out);
    let server = DerpNode { region_id: REGION, host_name: "relay.test".into(), ..DerpNode::default() };
    let region = DerpRegion { region_id: REGION, nodes: vec![server], ..DerpRegion::default() };
    let all = NetPortRange { ip: "*".into(), ports: PortRange::ANY };
    let map = MapResponse {
        node: Some(node(n)),
        peers: peers.map(node).collect(),
        derp_map: Some(DerpMap { regions: Some(BTreeMap::from([(REGION, region)])), ..DerpMap::default() }),
        packet_filter: Some(vec![
            FilterRule { src_ips: vec!["*".into()], dst_ports: vec![all], ..FilterRule::default() }.into(),
        ]),
        ..MapResponse::default()
    };
    engine.handle_control(ControlEvent::Map(Box::new(map)), now, &mut out);
    engine.handle_derp(REGION, DerpEvent::Connected, now, &mut out);
    engine
}

pub(crate) fn packet(src: u16, dst: u16) -> Vec<u8> {
    let mut p = vec![0; 100];
    p[0] = 0x45;
    p[3] = 100;
    p[8] = 64;
    p[9] = 17;
    p[12..16].copy_from_slice(&ip(src).octets());
    p[16..20].copy_from_slice(&ip(dst).octets());
    p[20..24].copy_from_slice(&[0, 80, 0, 80]);
    p
}

pub(crate) fn drops(engine: &Engine, wanted: DropReason) -> u64 {
    engine.counters().drops().find(|(reason, _)| *reason == wanted).map_or(0, |(_, n)| n)
}

/// A flooded node 1, and node 2, which wants to talk with it by UDP.
pub(crate) struct Pair {
    pub(crate) nodes: [Engine; 2],
    pub(crate) now: Instant,
    /// What the flooded node sent that was not for its peer.
    pub(crate) strays: u64,
    pub(crate) derp: u64,
}

impl Pair {
    pub(crate) fn new(peers: u16) -> Self {
        let now = Instant::now();
        let nodes = [engine(1, 2..2 + peers, now), engine(2, std::iter::once(1), now)];
        Self { nodes, now, strays: 0, derp: 0 }
    }

    /// Carries what node `from` wants sent, and what comes of it, until there is nothing.
    pub(crate) fn settle(&mut self, from: usize, out: &mut Outbox) {
        let mut turn = from;
        for _ in 0..40 {
            let mut batch = Batch::new();
            let us = u16::try_from(turn + 1).expect("small");
            let them = 3 - us;
            for (to, datagram) in out.udp.iter() {
                if *to == endpoint(them) {
                    batch.push(endpoint(us), datagram);
                } else if turn == 0 {
                    self.strays += 1;
                }
            }
            if turn == 0 {
                self.derp += u64::try_from(out.derp.len()).expect("small");
            }
            out.clear();
            turn = 1 - turn;
            if batch.is_empty() && turn != from {
                return;
            }
            self.nodes[turn].handle_udp(&mut batch, self.now, out);
        }
    }

    /// One packet from node 2's pod; whether node 1's pod gets it.
    pub(crate) fn send(&mut self) -> bool {
        let before = self.nodes[0].counters().rx_packets;
        let mut out = Outbox::default();
        let mut batch = Batch::new();
        batch.push((), &packet(2, 1));
        self.nodes[1].handle_tun(&mut batch, self.now, &mut out);
        self.settle(1, &mut out);
        self.nodes[0].counters().rx_packets > before
    }

    pub(crate) fn tick(&mut self) {
        for turn in 0..2 {
            if self.nodes[turn].poll_timeout().is_some_and(|at| at <= self.now) {
                let mut out = Outbox::default();
                self.nodes[turn].handle_timeout(self.now, &mut out);
                self.settle(turn, &mut out);
            }
            while self.nodes[turn].poll_event().is_some() {}
        }
    }

    /// A second of `PER_SECOND` datagrams at node 1, in which node 2 tries every 100 ms to get a packet
    /// through; how many did.
    pub(crate) fn flood(&mut self, mut garbage: impl FnMut(u32, &mut Batch<SocketAddr>)) -> u32 {
        let (mut arrived, turns) = (0, PER_SECOND / AT_ONCE);
        let mut batch = Batch::new();
        for turn in 0..turns {
            batch.clear();
            for n in 0..AT_ONCE {
                garbage(turn * AT_ONCE + n, &mut batch);
            }
            let mut out = Outbox::default();
            self.nodes[0].handle_udp(&mut batch, self.now, &mut out);
            self.settle(0, &mut out);
            self.now += Duration::from_secs(1) / turns;
            self.tick();
            if turn % (turns / 10) == 0 {
                arrived += u32::from(self.send());
            }
        }
        arrived
    }
}

/// A handshake initiation to node 1 from whoever holds `secret`.
pub(crate) fn initiation(secret: [u8; 32]) -> Vec<u8> {
    let to = PublicKey::from(*node_key(1).public().as_bytes());
    let mut tunn = Tunn::new(StaticSecret::from(secret), to, None, None, 77, None);
    let mut out = [0; 256];
    let TunnResult::WriteToNetwork(message) = tunn.format_handshake_initiation(&mut out, false) else {
        panic!("no initiation");
    };
    message.to_vec()
}

pub(crate) fn source(n: u32) -> SocketAddr {
    let [a, b, c, d] = n.wrapping_mul(0x9e37_79b1).to_be_bytes();
    SocketAddr::from(([172, a, b, c], 1024 + u16::from(d)))
}
