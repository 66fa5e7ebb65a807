//! Peers that are not plain members of the tailnet: known to each other by other addresses, jailed, expired,
//! without disco, speaking nothing but WireGuard, not vouched for, or shared in from elsewhere.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use podtether_core::batch::{Batch, Outbox};
use podtether_core::dns::{Action, Asked, Client};
use podtether_core::engine::{Config, ControlEvent, Decision, DropReason, Engine, Question};
use podtether_core::key::{DiscoPrivate, DiscoPublic, NodePrivate};
use podtether_core::tailcfg::{
    DnsConfig, FilterRule, MapResponse, NetPortRange, Node, NodeId, PeerChange, PortRange, UnixTime,
};

const WALL: i64 = 1_800_000_000;

fn endpoint(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 1000))
}

fn tailnet(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 64, 0, n)
}

/// As node 1 is known to node 2 where it is masqueraded.
const MASK: Ipv4Addr = Ipv4Addr::new(100, 99, 0, 1);

fn node(n: u8) -> Node {
    let address = IpAddr::V4(tailnet(n)).into();
    Node {
        id: NodeId(u64::from(n)),
        name: format!("n{n}.test."),
        key: NodePrivate::from_bytes([n; 32]).public(),
        disco_key: DiscoPrivate::from_bytes([n + 100; 32]).public(),
        addresses: vec![address],
        allowed_ips: vec![address],
        endpoints: vec![endpoint(n)],
        ..Node::default()
    }
}

fn allow(from: &str) -> Vec<FilterRule> {
    let to = NetPortRange { ip: "*".into(), ports: PortRange::ANY };
    vec![FilterRule { src_ips: vec![from.into()], dst_ports: vec![to], ..FilterRule::default() }]
}

fn map(own: Node, peer: Node) -> MapResponse {
    MapResponse {
        node: Some(own),
        peers: vec![peer],
        packet_filter: Some(allow("*")),
        ..MapResponse::default()
    }
}

fn engine(n: u8, map: MapResponse, now: Instant) -> Engine {
    let config = Config {
        node_key: NodePrivate::from_bytes([n; 32]),
        disco_key: DiscoPrivate::from_bytes([n + 100; 32]),
        mtu: 1280,
        random_seed: [n; 32],
        wall: UnixTime::from_secs(WALL),
        snapshot: None,
    };
    let mut engine = Engine::new(config, now);
    let mut out = Outbox::default();
    engine.handle_underlay(&[endpoint(n).ip()], Some(1000), None, now, &mut out);
    engine.handle_control(ControlEvent::SessionStarted, now, &mut out);
    engine.handle_control(ControlEvent::Map(Box::new(map)), now, &mut out);
    engine
}

fn sum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum: u64 =
        bytes.chunks(2).map(|w| u64::from(w[0]) << 8 | u64::from(w.get(1).copied().unwrap_or(0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

/// A whole IPv4 packet with right checksums.
fn packet(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut body = body.to_vec();
    let length = u16::try_from(body.len()).expect("short").to_be_bytes();
    let pseudo = [&src.octets()[..], &dst.octets(), &[0, protocol], &length].concat();
    let (at, pseudo) = match protocol {
        6 => (Some(16), &pseudo[..]),
        17 => (Some(6), &pseudo[..]),
        1 => (Some(2), &[][..]),
        _ => (None, &[][..]),
    };
    if let Some(at) = at {
        let checksum = sum(&[pseudo, &body]);
        body[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    }
    let total = u16::try_from(20 + body.len()).expect("short").to_be_bytes();
    let mut p =
        [&[0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, protocol, 0, 0][..], &src.octets(), &dst.octets()]
            .concat();
    let checksum = sum(&[&p]);
    p[10..12].copy_from_slice(&checksum.to_be_bytes());
    p.extend(body);
    p
}

fn udp(src: Ipv4Addr, src_port: u16, dst: Ipv4Addr, dst_port: u16) -> Vec<u8> {
    let ports = [src_port.to_be_bytes(), dst_port.to_be_bytes(), 13u16.to_be_bytes(), [0, 0]].concat();
    packet(src, dst, 17, &[&ports[..], b"hello"].concat())
}

fn tcp(src: Ipv4Addr, dst: Ipv4Addr, dst_port: u16, flags: u8) -> Vec<u8> {
    let mut body = [&40000u16.to_be_bytes()[..], &dst_port.to_be_bytes(), &[0; 16]].concat();
    (body[12], body[13]) = (0x50, flags);
    packet(src, dst, 6, &body)
}

/// Two nodes and the wire between them.
struct Pair {
    now: Instant,
    engines: [Engine; 2],
    /// What each pod got.
    got: [Vec<Vec<u8>>; 2],
}

impl Pair {
    fn new(maps: [MapResponse; 2]) -> Self {
        let now = Instant::now();
        let [a, b] = maps;
        Self { now, engines: [engine(1, a, now), engine(2, b, now)], got: [Vec::new(), Vec::new()] }
    }

    /// The pod of `from` (0 or 1) sends; everything that follows within a second happens.
    fn send(&mut self, from: usize, packet: &[u8]) {
        let mut batch = Batch::new();
        batch.push((), packet);
        let mut out = Outbox::default();
        self.engines[from].handle_tun(&mut batch, self.now, &mut out);
        self.carry(from, out);
        self.wait(Duration::from_secs(1));
    }

    fn carry(&mut self, from: usize, out: Outbox) {
        let mut queue = std::collections::VecDeque::from([(from, out)]);
        while let Some((from, out)) = queue.pop_front() {
            self.got[from].extend(out.tun.iter().map(|((), packet)| packet.to_vec()));
            let mut batch = Batch::new();
            for (to, datagram) in out.udp.iter() {
                if *to == endpoint(u8::try_from(2 - from).expect("small")) {
                    batch.push(endpoint(u8::try_from(from + 1).expect("small")), datagram);
                }
            }
            if !batch.is_empty() {
                let mut next = Outbox::default();
                self.engines[1 - from].handle_udp(&mut batch, self.now, &mut next);
                queue.push_back((1 - from, next));
            }
        }
    }

    fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now = (self.now + Duration::from_millis(100)).min(end);
            for n in 0..2 {
                if self.engines[n].poll_timeout().is_some_and(|at| at <= self.now) {
                    let mut out = Outbox::default();
                    self.engines[n].handle_timeout(self.now, &mut out);
                    self.carry(n, out);
                }
            }
        }
    }

    fn tell(&mut self, n: usize, map: MapResponse) {
        let mut out = Outbox::default();
        self.engines[n].handle_control(ControlEvent::Map(Box::new(map)), self.now, &mut out);
        self.carry(n, out);
    }

    fn drops(&self, n: usize, reason: DropReason) -> u64 {
        self.engines[n].counters().drops().find(|(r, _)| *r == reason).map_or(0, |(_, count)| count)
    }

    fn why(&self, n: usize, src: Ipv4Addr, dst: Ipv4Addr, dst_port: u16) -> podtether_core::engine::Why {
        let question = Question { src: src.into(), dst: dst.into(), protocol: 6, src_port: 40000, dst_port };
        self.engines[n].why(question, self.now)
    }

    fn take(&mut self, n: usize) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.got[n])
    }
}

const SYN: u8 = 2;

/// Node 1 is `MASK` to node 2, and does not know itself by that.
fn masked() -> Pair {
    let mut to_one = node(2);
    to_one.masq_v4 = Some(MASK);
    let mut to_two = node(1);
    to_two.addresses = vec![IpAddr::V4(MASK).into()];
    to_two.allowed_ips = to_two.addresses.clone();
    Pair::new([map(node(1), to_one), map(node(2), to_two)])
}

#[test]
fn a_masqueraded_node_keeps_its_own_address_in_its_own_eyes() {
    let mut pair = masked();
    let (ours, peer) = (tailnet(1), tailnet(2));
    pair.send(0, &udp(ours, 4000, peer, 53));
    assert_eq!(pair.take(1), [udp(MASK, 4000, peer, 53)]);
    pair.send(1, &udp(peer, 53, MASK, 4000));
    assert_eq!(pair.take(0), [udp(peer, 53, ours, 4000)]);
    pair.send(0, &tcp(ours, peer, 80, SYN));
    assert_eq!(pair.take(1), [tcp(MASK, peer, 80, SYN)]);
    // The peer's word that a packet did not arrive names the packet as this node sent it.
    let error =
        |dst, carried: Vec<u8>| packet(peer, dst, 1, &[&[3, 3, 0, 0, 0, 0, 0, 0][..], &carried].concat());
    pair.send(1, &error(MASK, udp(MASK, 4000, peer, 53)));
    assert_eq!(pair.take(0), [error(ours, udp(ours, 4000, peer, 53))]);
    assert_eq!(pair.drops(0, DropReason::Filter), 0);
}

#[test]
fn the_filter_sees_a_masqueraded_node_by_its_own_address() {
    let mut pair = masked();
    let (ours, peer) = (tailnet(1), tailnet(2));
    let only = |ip: &str| {
        let to = NetPortRange { ip: ip.into(), ports: PortRange { first: 22, last: 22 } };
        vec![FilterRule { src_ips: vec!["*".into()], dst_ports: vec![to], ..FilterRule::default() }]
    };
    pair.tell(0, MapResponse { packet_filter: Some(only("100.64.0.1")), ..MapResponse::default() });
    pair.send(1, &tcp(peer, MASK, 22, SYN));
    assert_eq!(pair.take(0), [tcp(peer, ours, 22, SYN)]);
    assert_eq!(pair.why(0, peer, MASK, 22).decision, Decision::Accept);
    pair.tell(0, MapResponse { packet_filter: Some(only("100.99.0.1")), ..MapResponse::default() });
    pair.send(1, &tcp(peer, MASK, 22, SYN));
    assert_eq!(pair.take(0), Vec::<Vec<u8>>::new());
    assert_eq!(pair.drops(0, DropReason::Filter), 1);
    // The refusal comes from the address that the peer knows, or it would not believe it.
    assert_eq!(pair.engines[1].counters().rejects_received, 1);
    assert_eq!(pair.drops(1, DropReason::PeerSource), 0);
    let why = pair.why(1, peer, MASK, 22);
    assert_eq!((why.decision, why.reason), (Decision::RefusedByPeer, "acl"));
}

#[test]
fn a_jailed_peer_answers_and_opens_nothing() {
    let mut jailed = node(2);
    jailed.is_jailed = true;
    let mut pair = Pair::new([map(node(1), jailed), map(node(2), node(1))]);
    let (ours, peer) = (tailnet(1), tailnet(2));
    // Both know a way by now.
    pair.send(0, &udp(ours, 1, peer, 1));
    pair.send(1, &tcp(peer, ours, 22, SYN));
    pair.send(1, &udp(peer, 53, ours, 4000));
    assert!(pair.take(0).is_empty());
    assert_eq!(pair.drops(0, DropReason::Jailed), 2);
    assert_eq!(
        (pair.why(0, peer, ours, 22).decision, pair.why(0, peer, ours, 22).reason),
        (Decision::Drop, "jailed")
    );
    let why = pair.why(1, peer, ours, 22);
    assert_eq!((why.decision, why.reason), (Decision::RefusedByPeer, "shields_up"));
    pair.send(0, &udp(ours, 4000, peer, 53));
    pair.send(1, &udp(peer, 53, ours, 4000));
    assert_eq!(pair.take(0).len(), 1, "an answer");
    // Let out, it is as any other.
    pair.tell(0, MapResponse { peers_changed: vec![node(2)], ..MapResponse::default() });
    pair.send(1, &tcp(peer, ours, 22, SYN));
    assert_eq!(pair.take(0).len(), 1);
    let why = pair.why(0, peer, ours, 22);
    assert_eq!(
        (why.rule.map(|rule| rule.to_string()), why.peer),
        (Some("base/0".into()), Some("n2.test".into()))
    );
}

#[test]
fn a_peer_ends_when_its_key_expires_and_lives_again_when_that_is_put_off() {
    let mut pair = Pair::new([map(node(1), node(2)), map(node(2), node(1))]);
    let (ours, peer) = (tailnet(1), tailnet(2));
    pair.send(0, &udp(ours, 1, peer, 2));
    assert_eq!(pair.take(1).len(), 1);
    let at = |seconds| UnixTime::from_secs(WALL + seconds);
    let expiry = |at| {
        let change = PeerChange { node_id: NodeId(2), key_expiry: Some(at), ..PeerChange::default() };
        MapResponse { peers_changed_patch: vec![change], ..MapResponse::default() }
    };
    pair.tell(0, expiry(at(30)));
    pair.wait(Duration::from_secs(10));
    pair.send(0, &udp(ours, 1, peer, 2));
    assert_eq!(pair.take(1).len(), 1, "not yet");
    pair.wait(Duration::from_secs(25));
    pair.send(0, &udp(ours, 1, peer, 2));
    pair.send(1, &udp(peer, 1, ours, 2));
    assert!(pair.take(0).is_empty() && pair.take(1).is_empty(), "expired while it was in use");
    assert_eq!(pair.drops(0, DropReason::PeerExpired), 1);
    assert_eq!(pair.why(0, ours, peer, 2).reason, "peer_expired");
    pair.tell(0, expiry(at(3600)));
    pair.send(0, &udp(ours, 1, peer, 2));
    assert_eq!(pair.take(1).last(), Some(&udp(ours, 1, peer, 2)));
    // The server's clock counts: it is an hour and a half later there.
    let clock = MapResponse { keep_alive: true, control_time: Some(at(5400)), ..MapResponse::default() };
    pair.tell(0, clock);
    pair.wait(Duration::from_secs(1));
    pair.take(1);
    pair.send(0, &udp(ours, 1, peer, 2));
    assert!(pair.take(1).is_empty());
    assert_eq!(pair.drops(0, DropReason::PeerExpired), 2);
}

#[test]
fn without_a_disco_key_there_is_no_way_to_a_peer() {
    let mut mute = node(2);
    mute.disco_key = DiscoPublic::default();
    let mut pair = Pair::new([map(node(1), mute), map(node(2), node(1))]);
    pair.send(0, &udp(tailnet(1), 1, tailnet(2), 2));
    assert!(pair.take(1).is_empty());
    assert_eq!(pair.drops(0, DropReason::NoPath), 1);
    pair.tell(0, MapResponse { peers_changed: vec![node(2)], ..MapResponse::default() });
    pair.send(0, &udp(tailnet(1), 1, tailnet(2), 2));
    assert_eq!(pair.take(1).len(), 1, "it has one by now");
}

#[test]
fn rules_that_let_in_whom_nobody_vouches_for_are_all_discarded() {
    let mut unsigned = node(3);
    unsigned.unsigned_peer_api_only = true;
    let mut pair = Pair::new([map(node(1), node(2)), map(node(2), node(1))]);
    let (ours, peer) = (tailnet(1), tailnet(2));
    let knocks = |pair: &mut Pair| {
        pair.send(1, &tcp(peer, ours, 22, SYN));
        pair.take(0).len()
    };
    assert_eq!(knocks(&mut pair), 1);
    pair.tell(0, MapResponse { peers_changed: vec![unsigned.clone()], ..MapResponse::default() });
    assert_eq!(knocks(&mut pair), 0, "* lets node 3 in as well");
    assert_eq!(pair.why(0, peer, ours, 22).reason, "filter_discarded");
    assert!(format!("{:?}", pair.engines[0].status().health).contains("tailnet lock"));
    let narrow = MapResponse { packet_filter: Some(allow("100.64.0.2")), ..MapResponse::default() };
    pair.tell(0, narrow);
    assert_eq!(knocks(&mut pair), 1, "this rule does not");
    pair.tell(0, MapResponse { packet_filter: Some(allow("*")), ..MapResponse::default() });
    assert_eq!(knocks(&mut pair), 0);
    pair.tell(0, MapResponse { peers_removed: vec![NodeId(3)], ..MapResponse::default() });
    assert_eq!(knocks(&mut pair), 1);
}

#[test]
fn a_shared_in_peer_has_its_name_its_rules_and_its_capabilities() {
    let mut shared = node(2);
    shared.name = "db.other-tailnet.ts.net.".into();
    let mut rules = allow("cap:shared");
    rules.extend(
        serde_json::from_str::<Vec<FilterRule>>(
            r#"[{"SrcIPs":["100.64.0.2"],"CapGrant":[{"Dsts":["100.64.0.1/32"],"CapMap":{"example.com/app":[{"r":1}]}}]}]"#,
        )
        .expect("rules"),
    );
    let first = MapResponse {
        packet_filter: Some(rules),
        dns_config: Some(DnsConfig { proxied: true, ..DnsConfig::default() }),
        ..map(node(1), shared.clone())
    };
    let mut pair = Pair::new([first, map(node(2), node(1))]);
    let (ours, peer) = (tailnet(1), tailnet(2));
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["db", "other-tailnet", "ts", "net"] {
        query.extend(u8::try_from(label.len()));
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let client = Client { listener: 0, from: SocketAddr::new(ours.into(), 4000), stream: None };
    pair.engines[0].handle_dns(Asked { client, meant_for: None }, &query, pair.now);
    match pair.engines[0].poll_dns() {
        Some(Action::Reply { message, .. }) => assert!(message.ends_with(&peer.octets()), "{message:?}"),
        other => panic!("{other:?}"),
    }
    pair.send(1, &tcp(peer, ours, 22, SYN));
    assert!(pair.take(0).is_empty(), "it does not have the capability");
    shared.cap_map.insert("shared".into(), Vec::new());
    pair.tell(0, MapResponse { peers_changed: vec![shared], ..MapResponse::default() });
    pair.send(1, &tcp(peer, ours, 22, SYN));
    assert_eq!(pair.take(0).len(), 1, "it does now");
    let caps = pair.engines[0].peer_caps(peer.into());
    assert_eq!(serde_json::to_string(&caps).expect("JSON"), r#"{"example.com/app":[{"r":1}]}"#);
}

/// A peer that is WireGuard and nothing else.
struct Plain {
    tunn: Tunn,
    /// Decrypted.
    got: Vec<Vec<u8>>,
}

impl Plain {
    fn new() -> Self {
        let secret = StaticSecret::from([2; 32]);
        let engine = PublicKey::from(*NodePrivate::from_bytes([1; 32]).public().as_bytes());
        Self { tunn: Tunn::new(secret, engine, None, None, 7, None), got: Vec::new() }
    }

    /// Takes a datagram; what it answers.
    fn hear(&mut self, datagram: &[u8]) -> Vec<Vec<u8>> {
        let mut answers = Vec::new();
        let mut buf = [0; 2048];
        let mut input = datagram;
        loop {
            match self.tunn.decapsulate(None, input, &mut buf) {
                TunnResult::WriteToNetwork(answer) => answers.push(answer.to_vec()),
                TunnResult::WriteToTunnelV4(packet, _) => {
                    self.got.push(packet.to_vec());
                    return answers;
                }
                TunnResult::Done | TunnResult::Err(_) | TunnResult::WriteToTunnelV6(..) => return answers,
            }
            input = &[];
        }
    }

    fn seal(&mut self, packet: &[u8]) -> Vec<Vec<u8>> {
        let mut buf = [0; 2048];
        let TunnResult::WriteToNetwork(datagram) = self.tunn.encapsulate(packet, &mut buf) else {
            panic!("nothing to send")
        };
        vec![datagram.to_vec()]
    }
}

/// Engine and plain peer talk until neither has anything to say. What the pod got.
fn settle(
    engine: &mut Engine,
    plain: &mut Plain,
    from: SocketAddr,
    mut to_engine: Vec<Vec<u8>>,
    first: Outbox,
    now: Instant,
) -> Vec<Vec<u8>> {
    let (mut out, mut pod) = (first, Vec::new());
    loop {
        pod.extend(out.tun.iter().map(|((), packet)| packet.to_vec()));
        for (to, datagram) in out.udp.iter() {
            assert_ne!(&datagram[..2], b"TS", "no disco for a peer without it");
            if *to == from {
                to_engine.extend(plain.hear(datagram));
            }
        }
        out = Outbox::default();
        if to_engine.is_empty() {
            return pod;
        }
        let mut batch = Batch::new();
        for datagram in to_engine.drain(..) {
            batch.push(from, &datagram);
        }
        engine.handle_udp(&mut batch, now, &mut out);
    }
}

fn plain_node() -> Node {
    let mut peer = node(2);
    peer.is_wireguard_only = true;
    peer.disco_key = DiscoPublic::default();
    peer
}

#[test]
fn a_peer_that_only_speaks_wireguard_is_reached_at_its_endpoints() {
    let now = Instant::now();
    let mut peer = plain_node();
    // As exit providers are: known to us by one address, knowing us by another.
    peer.masq_v4 = Some(MASK);
    let mut engine = engine(1, map(node(1), peer), now);
    let mut plain = Plain::new();
    let mut batch = Batch::new();
    batch.push((), &udp(tailnet(1), 4000, tailnet(2), 53));
    let mut out = Outbox::default();
    engine.handle_tun(&mut batch, now, &mut out);
    settle(&mut engine, &mut plain, endpoint(2), Vec::new(), out, now);
    assert_eq!(plain.got, [udp(MASK, 4000, tailnet(2), 53)]);
    let answer = plain.seal(&udp(tailnet(2), 53, MASK, 4000));
    let pod = settle(&mut engine, &mut plain, endpoint(2), answer, Outbox::default(), now);
    assert_eq!(pod, [udp(tailnet(2), 53, tailnet(1), 4000)]);
    // It is told nothing in a language it does not speak.
    engine.handle_control(
        ControlEvent::Map(Box::new(MapResponse {
            packet_filter: Some(Vec::new()),
            ..MapResponse::default()
        })),
        now,
        &mut Outbox::default(),
    );
    let knock = plain.seal(&tcp(tailnet(2), MASK, 22, SYN));
    plain.got.clear();
    assert!(settle(&mut engine, &mut plain, endpoint(2), knock, Outbox::default(), now).is_empty());
    assert!(plain.got.is_empty() && engine.counters().rejects_sent == 0);
    // It comes from another address: answers go there.
    let moved = plain.seal(&udp(tailnet(2), 53, MASK, 4000));
    settle(&mut engine, &mut plain, endpoint(9), moved, Outbox::default(), now);
    let mut batch = Batch::new();
    batch.push((), &udp(tailnet(1), 4000, tailnet(2), 53));
    let mut out = Outbox::default();
    engine.handle_tun(&mut batch, now, &mut out);
    assert_eq!(out.udp.iter().map(|(to, _)| *to).collect::<Vec<_>>(), [endpoint(9)]);
}

#[test]
fn a_plain_peer_that_does_not_answer_is_tried_at_its_other_addresses() {
    let mut now = Instant::now();
    let mut peer = plain_node();
    peer.endpoints = vec!["[2001:db8::2]:1000".parse().expect("an address"), endpoint(3), endpoint(2)];
    let mut engine = engine(1, map(node(1), peer), now);
    let mut plain = Plain::new();
    let mut batch = Batch::new();
    batch.push((), &udp(tailnet(1), 4000, tailnet(2), 53));
    let mut out = Outbox::default();
    engine.handle_tun(&mut batch, now, &mut out);
    for _ in 0..100 {
        settle(&mut engine, &mut plain, endpoint(2), Vec::new(), out, now);
        now += Duration::from_millis(100);
        out = Outbox::default();
        engine.handle_timeout(now, &mut out);
    }
    assert_eq!(plain.got, [udp(tailnet(1), 4000, tailnet(2), 53)]);
}

#[test]
fn tsmp_is_for_the_node_and_never_for_the_pod() {
    let now = Instant::now();
    // The peer is an ordinary one whose disco and relay are silent.
    let third = node(3);
    let first = MapResponse { peers: vec![node(2), third.clone()], ..map(node(1), node(2)) };
    let mut engine = engine(1, first, now);
    let mut plain = Plain::new();
    let hello = {
        let mut buf = [0; 2048];
        let TunnResult::WriteToNetwork(datagram) = plain.tunn.format_handshake_initiation(&mut buf, false)
        else {
            panic!("no initiation")
        };
        vec![datagram.to_vec()]
    };
    let mut out = Outbox::default();
    let mut tell =
        |engine: &mut Engine, plain: &mut Plain, datagrams: Vec<Vec<u8>>| -> (Vec<Vec<u8>>, usize) {
            let mut batch = Batch::new();
            datagrams.iter().for_each(|d| assert!(batch.push(endpoint(2), d)));
            out.clear();
            engine.handle_udp(&mut batch, now, &mut out);
            let heard: Vec<Vec<u8>> =
                out.udp.iter().filter(|(_, d)| d[0] <= 4).map(|(_, d)| d.to_vec()).collect();
            (heard.iter().flat_map(|d| plain.hear(d)).collect(), out.tun.len())
        };
    let (answers, _) = tell(&mut engine, &mut plain, hello);
    tell(&mut engine, &mut plain, answers);
    let mut say = |payload: &[u8], engine: &mut Engine| {
        let datagram = plain.seal(&packet(tailnet(2), tailnet(1), 99, payload));
        let (_, to_pod) = tell(engine, &mut plain, datagram);
        assert_eq!(to_pod, 0);
    };
    let bad = |engine: &Engine| {
        engine.counters().drops().find(|(r, _)| *r == DropReason::BadDisco).map_or(0, |(_, n)| n)
    };
    let advert = |key: [u8; 32]| [b"a".as_slice(), &key].concat();
    let fresh = *DiscoPrivate::from_bytes([77; 32]).public().as_bytes();
    say(&advert(fresh), &mut engine);
    say(&advert(fresh), &mut engine);
    assert_eq!((engine.counters().disco_adverts, bad(&engine)), (1, 0));
    // Nobody's, ours, and another's.
    let ours = *DiscoPrivate::from_bytes([101; 32]).public().as_bytes();
    for key in [[0; 32], ours, *third.disco_key.as_bytes()] {
        say(&advert(key), &mut engine);
    }
    assert_eq!((engine.counters().disco_adverts, bad(&engine)), (1, 3));
    say(b"p12345678", &mut engine);
    say(b"o12345678\0\0", &mut engine);
    say(b"z-------", &mut engine);
    // And none of the pod's own leaves.
    let mut batch = Batch::new();
    batch.push((), &packet(tailnet(1), tailnet(2), 99, b"p12345678"));
    let mut out = Outbox::default();
    engine.handle_tun(&mut batch, now, &mut out);
    assert!(out.udp.is_empty());
}

#[test]
fn the_addresses_of_two_peers_are_the_ones_of_who_is_left() {
    let mut pair = Pair::new([map(node(1), node(2)), map(node(2), node(1))]);
    let mut other = node(3);
    other.addresses = node(2).addresses;
    other.allowed_ips = node(2).allowed_ips;
    pair.tell(0, MapResponse { peers_changed: vec![other], ..MapResponse::default() });
    pair.tell(0, MapResponse { peers_removed: vec![NodeId(3)], ..MapResponse::default() });
    pair.send(0, &udp(tailnet(1), 1, tailnet(2), 2));
    assert_eq!(pair.take(1).len(), 1);
}
