//! Floods, in virtual time: what garbage costs is bounded, and those who are not flooding get through.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use podtether_core::batch::{Batch, Outbox, RegionId};
use podtether_core::disco::{Message, SharedKey};
use podtether_core::engine::{Config, ControlEvent, DerpEvent, DropReason, Engine};
use podtether_core::key::{DiscoPrivate, NodePrivate};
use podtether_core::tailcfg::{
    DerpMap, DerpNode, DerpRegion, FilterRule, MapResponse, NetPortRange, Node, NodeId, PortRange, UnixTime,
};

const REGION: RegionId = RegionId(1);
/// Datagrams of a second of flood, and how many come between two looks at the clock.
const PER_SECOND: u32 = 100_000;
const AT_ONCE: u32 = 50;
/// Initiations that are worked on in the first second of a flood: twice the burst and twice the rate that
/// `engine::load` says. Then the rates alone.
const FIRST_SECOND: u64 = 700;
const EACH_SECOND: u64 = 400;

fn node_key(n: u16) -> NodePrivate {
    let mut bytes = [n.to_be_bytes()[1]; 32];
    bytes[7] = n.to_be_bytes()[0];
    NodePrivate::from_bytes(bytes)
}

fn disco_key(n: u16) -> DiscoPrivate {
    let mut bytes = [n.to_be_bytes()[1]; 32];
    bytes[7] = n.to_be_bytes()[0];
    bytes[9] = 0xd1;
    DiscoPrivate::from_bytes(bytes)
}

fn ip(n: u16) -> Ipv4Addr {
    let [high, low] = n.to_be_bytes();
    Ipv4Addr::new(100, 64, high, low)
}

fn endpoint(n: u16) -> SocketAddr {
    let [high, low] = n.to_be_bytes();
    SocketAddr::from(([10, 7, high, low], 1000))
}

fn node(n: u16) -> Node {
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

fn engine(n: u16, peers: impl Iterator<Item = u16>, now: Instant) -> Engine {
    let config = Config {
        node_key: node_key(n),
        disco_key: disco_key(n),
        mtu: 1280,
        random_seed: [n.to_be_bytes()[1]; 32],
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
        packet_filter: Some(vec![FilterRule {
            src_ips: vec!["*".into()],
            dst_ports: vec![all],
            ..FilterRule::default()
        }]),
        ..MapResponse::default()
    };
    engine.handle_control(ControlEvent::Map(Box::new(map)), now, &mut out);
    engine.handle_derp(REGION, DerpEvent::Connected, now, &mut out);
    engine
}

fn packet(src: u16, dst: u16) -> Vec<u8> {
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

fn drops(engine: &Engine, wanted: DropReason) -> u64 {
    engine.counters().drops().find(|(reason, _)| *reason == wanted).map_or(0, |(_, n)| n)
}

/// A flooded node 1, and node 2, which wants to talk with it by UDP.
struct Pair {
    nodes: [Engine; 2],
    now: Instant,
    /// What the flooded node sent that was not for its peer.
    strays: u64,
    derp: u64,
}

impl Pair {
    fn new(peers: u16) -> Self {
        let now = Instant::now();
        let nodes = [engine(1, 2..2 + peers, now), engine(2, std::iter::once(1), now)];
        Self { nodes, now, strays: 0, derp: 0 }
    }

    /// Carries what node `from` wants sent, and what comes of it, until there is nothing.
    fn settle(&mut self, from: usize, out: &mut Outbox) {
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
    fn send(&mut self) -> bool {
        let before = self.nodes[0].counters().rx_packets;
        let mut out = Outbox::default();
        let mut batch = Batch::new();
        batch.push((), &packet(2, 1));
        self.nodes[1].handle_tun(&mut batch, self.now, &mut out);
        self.settle(1, &mut out);
        self.nodes[0].counters().rx_packets > before
    }

    fn tick(&mut self) {
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
    fn flood(&mut self, mut garbage: impl FnMut(u32, &mut Batch<SocketAddr>)) -> u32 {
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
fn initiation(secret: [u8; 32]) -> Vec<u8> {
    let to = PublicKey::from(*node_key(1).public().as_bytes());
    let mut tunn = Tunn::new(StaticSecret::from(secret), to, None, None, 77, None);
    let mut out = [0; 256];
    let TunnResult::WriteToNetwork(message) = tunn.format_handshake_initiation(&mut out, false) else {
        panic!("no initiation");
    };
    message.to_vec()
}

fn source(n: u32) -> SocketAddr {
    let [a, b, c, d] = n.wrapping_mul(0x9e37_79b1).to_be_bytes();
    SocketAddr::from(([172, a, b, c], 1024 + u16::from(d)))
}

#[test]
fn a_strangers_initiations_from_one_address_cost_twenty_handshakes_a_second() {
    let mut pair = Pair::new(1);
    let message = initiation([0x77; 32]);
    let arrived = pair.flood(|_, batch| assert!(batch.push(source(1), &message)));
    // Twenty at once and twenty in the second; with cookies not taken there is no more.
    let worked_on = drops(&pair.nodes[0], DropReason::UnknownPeer);
    assert!((20..=40).contains(&worked_on), "{worked_on}");
    assert!(pair.strays <= 101, "{} cookies", pair.strays);
    assert!(arrived >= 9, "{arrived} of 10 packets of the peer");
}

#[test]
fn initiations_with_false_sources_cost_a_bounded_number_of_handshakes_and_the_peer_proves_its_address() {
    let mut pair = Pair::new(1);
    let message = initiation([0x77; 32]);
    let mut worked_on = 0;
    let mut arrived = Vec::new();
    for limit in [FIRST_SECOND, EACH_SECOND, EACH_SECOND] {
        arrived.push(pair.flood(|n, batch| assert!(batch.push(source(n), &message))));
        let now = drops(&pair.nodes[0], DropReason::UnknownPeer);
        assert!(now - worked_on <= limit, "{} in a second", now - worked_on);
        worked_on = now;
    }
    assert!(pair.strays <= 7_000, "{} cookies", pair.strays);
    assert_eq!(arrived[2], 10, "the peer has its session: {arrived:?}");
}

#[test]
fn broken_disco_costs_few_keys_and_pings_of_others_are_answered() {
    let mut pair = Pair::new(9000);
    let ping = |n: u16, tx| {
        let mut packet = Vec::new();
        let key = SharedKey::new(&disco_key(n), &disco_key(1).public());
        let message = Message::Ping { tx: [tx; 12], node_key: Some(node_key(n).public()) };
        key.seal(&disco_key(n).public(), [tx; 24], &message, &mut packet);
        packet
    };
    let mut forged: Vec<Vec<u8>> = (3..9000).map(|n| ping(n, 1)).collect();
    for packet in &mut forged {
        *packet.last_mut().expect("not empty") ^= 1;
    }
    let arrived = pair.flood(|n, batch| {
        let which = usize::try_from(n).expect("small") % forged.len();
        assert!(batch.push(source(n), &forged[which]));
    });
    let opened = drops(&pair.nodes[0], DropReason::BadDisco);
    // At most 201 keys are worked out; 32 are kept, by which one packet in 281 can be tried as well.
    assert!((100..=600).contains(&opened), "{opened} boxes tried");
    assert_eq!(opened + drops(&pair.nodes[0], DropReason::UnderLoad), u64::from(PER_SECOND));
    assert!(arrived >= 9, "{arrived} of 10 packets of the peer");
    assert_eq!(pair.nodes[0].gauges(pair.now).peers, 9000);

    // A relay vouches for who sends, so what others do by UDP is not held against a peer there.
    let mut out = Outbox::default();
    let event = DerpEvent::Packet { source: node_key(500).public(), payload: &mut ping(500, 2) };
    pair.nodes[0].handle_derp(REGION, event, pair.now, &mut out);
    assert_eq!(out.derp.len(), 1, "the pong");
}

#[test]
fn a_peer_that_pings_without_end_gets_some_answers() {
    let mut pair = Pair::new(2);
    let key = SharedKey::new(&disco_key(3), &disco_key(1).public());
    let message = Message::Ping { tx: [1; 12], node_key: Some(node_key(3).public()) };
    let mut packet = Vec::new();
    key.seal(&disco_key(3).public(), [1; 24], &message, &mut packet);
    let arrived = pair.flood(|n, batch| assert!(batch.push(source(n), &packet)));
    assert!((64..=193).contains(&pair.strays), "{} answers", pair.strays);
    assert!(drops(&pair.nodes[0], DropReason::DiscoFlood) > u64::from(PER_SECOND) * 9 / 10);
    assert!(arrived >= 9, "{arrived} of 10 packets of the peer");
}

#[test]
fn a_peer_cannot_have_us_ping_others_without_end() {
    let mut pair = Pair::new(2);
    let key = SharedKey::new(&disco_key(3), &disco_key(1).public());
    // It has traffic, or its calls would be nothing to us.
    let mut batch = Batch::new();
    batch.push((), &packet(1, 3));
    pair.nodes[0].handle_tun(&mut batch, pair.now, &mut Outbox::default());
    let mut pings = 0;
    for n in 0..10_000 {
        let endpoints = (0..64).map(|m| source(n * 64 + m)).collect();
        let mut payload = Vec::new();
        key.seal(&disco_key(3).public(), [2; 24], &Message::CallMeMaybe { endpoints }, &mut payload);
        let mut out = Outbox::default();
        let event = DerpEvent::Packet { source: node_key(3).public(), payload: &mut payload };
        pair.nodes[0].handle_derp(REGION, event, pair.now, &mut out);
        pings += out.udp.len();
        pair.now += Duration::from_micros(100);
    }
    assert!((32..=9 * 33).contains(&pings), "{pings} pings in a second");
}

#[test]
fn messages_for_lost_sessions_cause_few_handshakes() {
    let mut pair = Pair::new(1000);
    let mut data = [0; 60];
    data[0] = 4;
    data[4..8].copy_from_slice(&[9; 4]);
    let before = pair.strays;
    let arrived = pair.flood(|n, batch| {
        let from = endpoint(3 + u16::try_from(n % 900).expect("small"));
        assert!(batch.push(from, &data));
    });
    // Twenty at once and twenty in the second, each at most an initiation and a ping.
    assert!(pair.strays - before <= 200, "{} datagrams", pair.strays - before);
    assert!(arrived >= 9, "{arrived} of 10 packets of the peer");
    assert!(drops(&pair.nodes[0], DropReason::UnknownSession) >= u64::from(PER_SECOND));
}

#[test]
fn a_pod_that_calls_everybody_begins_with_few_and_keeps_those_it_has() {
    let mut pair = Pair::new(10_000);
    assert!(pair.send());
    let handshakes = |pair: &Pair| drops(&pair.nodes[0], DropReason::TooManyPeers);
    let mut delivered = 0;
    for turn in 0..100_u16 {
        let mut batch = Batch::new();
        for n in 0..100 {
            batch.push((), &packet(1, 3 + (turn * 100 + n) % 9_999));
        }
        batch.push((), &packet(1, 2));
        let mut out = Outbox::default();
        let before = pair.nodes[1].counters().rx_packets;
        pair.nodes[0].handle_tun(&mut batch, pair.now, &mut out);
        pair.settle(0, &mut out);
        delivered += pair.nodes[1].counters().rx_packets - before;
        pair.now += Duration::from_millis(10);
        pair.tick();
    }
    let begun = 10_000 - handshakes(&pair);
    assert!((256..=385).contains(&begun), "{begun} peers begun with");
    assert!(delivered >= 95, "{delivered} of 100 packets to the peer it knows");
}
