//! One process of a node replaces another: nothing that was sent is lost, and each packet arrives once.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use podtether_core::batch::{Batch, Origin, Outbox, RegionId};
use podtether_core::engine::{Config, ControlEvent, DerpEvent, Engine};
use podtether_core::filter::Rule;
use podtether_core::key::{DiscoPrivate, NodePrivate, NodePublic};
use podtether_core::snapshot::Snapshot;
use podtether_core::tailcfg::{
    DerpMap, DerpRegion, FilterRule, MapResponse, NetPortRange, Node, NodeId, PeerChange, PortRange, UnixTime,
};

const WALL: UnixTime = UnixTime::from_secs(1_800_000_000);

fn node(n: u8, key: &NodePrivate, disco: &DiscoPrivate) -> Node {
    let address = format!("100.64.0.{n}/32").parse().expect("a net");
    Node {
        id: NodeId(u64::from(n)),
        name: format!("n{n}.test."),
        key: key.public(),
        disco_key: disco.public(),
        addresses: vec![address],
        allowed_ips: vec![address],
        endpoints: vec![endpoint(n)],
        home_derp: RegionId(0),
        ..Node::default()
    }
}

fn endpoint(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 1000))
}

/// Node 1 lets in nothing but answers, node 2 everything.
fn pair(now: Instant) -> [Engine; 2] {
    let keys = [1, 2].map(|n| (NodePrivate::from_bytes([n; 32]), DiscoPrivate::from_bytes([n + 10; 32])));
    [1u8, 2].map(|n| {
        let (key, disco) = keys[usize::from(n - 1)].clone();
        let (peer_key, peer_disco) = &keys[usize::from(2 - n)];
        let config = Config {
            node_key: key.clone(),
            disco_key: disco.clone(),
            mtu: 1280,
            random_seed: [n; 32],
            standby: None,
            wall: WALL,
            snapshot: None,
        };
        let mut engine = Engine::new(config, now);
        let mut out = Outbox::default();
        engine.handle_underlay(&[endpoint(n).ip()], Some(1000), None, now, &mut out);
        engine.handle_control(ControlEvent::SessionStarted, now, &mut out);
        let to = NetPortRange { ip: "*".into(), ports: PortRange::ANY };
        let all = FilterRule { src_ips: vec!["*".into()], dst_ports: vec![to], ..FilterRule::default() };
        let rules: Vec<Rule> = if n == 1 { Vec::new() } else { vec![all.into()] };
        let map = MapResponse {
            node: Some(node(n, &key, &disco)),
            peers: vec![node(3 - n, peer_key, peer_disco)],
            packet_filter: Some(rules),
            ..MapResponse::default()
        };
        engine.handle_control(ControlEvent::Map(Box::new(map)), now, &mut out);
        engine
    })
}

fn packet(src: u8, dst: u8, number: u8) -> Vec<u8> {
    let mut p = vec![0; 100];
    p[0] = 0x45;
    p[3] = 100;
    p[8] = 64;
    p[9] = 17;
    p[12..16].copy_from_slice(&Ipv4Addr::new(100, 64, 0, src).octets());
    p[16..20].copy_from_slice(&Ipv4Addr::new(100, 64, 0, dst).octets());
    p[20..24].copy_from_slice(&[0, 80, 0, 80]);
    p[99] = number;
    p
}

fn send(from: &mut Engine, src: u8, number: u8, now: Instant) -> Outbox {
    let (mut batch, mut out) = (Batch::new(), Outbox::default());
    batch.push((), &packet(src, 3 - src, number));
    from.handle_tun(&mut batch, now, &mut out);
    out
}

/// What came out for the pod, by the packets' numbers.
fn numbers(out: &Outbox) -> Vec<u8> {
    out.tun.iter().map(|(_, p)| p[99]).collect()
}

fn udp(to: &mut Engine, from: u8, sent: &Outbox, now: Instant) -> Outbox {
    let (mut batch, mut out) = (Batch::new(), Outbox::default());
    for (dst, datagram) in sent.udp.iter() {
        assert_eq!(dst.ip(), IpAddr::from([192, 0, 2, 3 - from]));
        batch.push(endpoint(from), datagram);
    }
    to.handle_udp(&mut batch, now, &mut out);
    out
}

fn passed(to: &mut Engine, sent: &Outbox, now: Instant) -> Outbox {
    let (mut batch, mut out) = (Batch::new(), Outbox::default());
    for (origin, message) in sent.passed.iter() {
        batch.push(*origin, message);
    }
    to.handle_passed(&mut batch, now, &mut out);
    out
}

/// Until neither has anything for the other.
fn settle(engines: &mut [Engine; 2], mut turn: usize, mut out: Outbox, now: Instant) {
    while !out.udp.is_empty() {
        let from = if turn == 0 { 1 } else { 2 };
        turn = 1 - turn;
        out = udp(&mut engines[turn], from, &out, now);
    }
}

struct Scene {
    old: Engine,
    peer: Engine,
    new: Engine,
    now: Instant,
}

/// A standby that has its session, unknown to the peer.
fn standing_by() -> Scene {
    let mut now = Instant::now();
    let mut engines = pair(now);
    for number in 0..4 {
        let out = send(&mut engines[0], 1, number, now);
        settle(&mut engines, 0, out, now);
        now += Duration::from_millis(100);
    }
    let [mut old, mut peer] = engines;
    let snapshot = old.snapshot(now);
    old.begin_passing();
    let mark = old.index_mark();
    // The same seed as the other process: what is random has to differ by itself.
    let config = Config {
        node_key: NodePrivate::from_bytes([1; 32]),
        disco_key: DiscoPrivate::from_bytes([11; 32]),
        mtu: 1280,
        random_seed: [1; 32],
        standby: Some(mark),
        wall: WALL,
        snapshot: Some(Snapshot::from_bytes(&snapshot).expect("our own")),
    };
    let mut new = Engine::new(config, now);
    new.begin_passing();
    assert_ne!(new.index_mark(), mark);
    assert_eq!(new.unready(now), 1);
    let mut out = Outbox::default();
    assert!(new.poll_timeout().is_some_and(|at| at <= now));
    new.handle_timeout(now, &mut out);
    assert_eq!((out.udp.len(), out.derp.len()), (1, 0), "one handshake and nothing else");
    let response = udp(&mut peer, 1, &out, now);
    let handed = udp(&mut old, 2, &response, now);
    assert!(handed.passed.len() == 1 && handed.udp.is_empty() && handed.tun.is_empty());
    let silent = passed(&mut new, &handed, now);
    assert!(silent.is_empty(), "the peer does not learn of the session");
    assert_eq!(new.unready(now), 0);
    Scene { old, peer, new, now }
}

#[test]
fn packets_under_way_at_a_takeover_arrive_whoever_reads_them() {
    let Scene { mut old, mut peer, mut new, mut now } = standing_by();
    // Until the takeover everything goes by the old process.
    let out = send(&mut peer, 2, 10, now);
    assert_eq!(numbers(&udp(&mut old, 2, &out, now)), [10]);
    let out = send(&mut old, 1, 11, now);
    assert_eq!(numbers(&udp(&mut peer, 1, &out, now)), [11]);
    let under_way = send(&mut peer, 2, 12, now);

    let mut let_go = Outbox::default();
    let flows = old.let_go(&mut let_go);
    assert!(let_go.is_empty());
    let mut confirm = Outbox::default();
    new.take_over(&flows, now, &mut confirm);
    let also_under_way = send(&mut peer, 2, 13, now);
    for (out, number) in [(under_way, 12), (also_under_way, 13)] {
        let back = udp(&mut new, 2, &out, now);
        assert!(back.tun.is_empty() && back.passed.len() == 1);
        let mut twice = passed(&mut old, &back, now);
        assert_eq!(numbers(&twice), [number]);
        twice.clear();
    }
    udp(&mut peer, 1, &confirm, now);
    // In the new sessions, and as an answer to what the old process sent.
    let out = send(&mut peer, 2, 14, now);
    let got = udp(&mut new, 2, &out, now);
    assert_eq!((numbers(&got), got.passed.len()), (vec![14], 0));
    now += Duration::from_millis(1);
    let out = send(&mut new, 1, 15, now);
    assert_eq!(out.derp.len(), 0, "the path is proven");
    assert_eq!(numbers(&udp(&mut peer, 1, &out, now)), [15]);
}

#[test]
fn what_waits_for_a_handshake_goes_on_waiting_in_the_successor() {
    let Scene { mut old, mut peer, mut new, now } = standing_by();
    // So long that its session is gone, and the peer's too.
    let later = now + Duration::from_secs(200);
    let out = send(&mut old, 1, 20, later);
    assert!(out.tun.is_empty(), "it waits");
    let mut let_go = Outbox::default();
    let flows = old.let_go(&mut let_go);
    let origins: Vec<Origin> = let_go.passed.iter().map(|(origin, _)| *origin).collect();
    assert_eq!(origins, [Origin::Pod]);
    let mut out = Outbox::default();
    new.take_over(&flows, later, &mut out);
    let mut waits = passed(&mut new, &let_go, later);
    std::thread::sleep(Duration::from_millis(2));
    let mut at = later;
    let mut arrived = Vec::new();
    for _ in 0..40 {
        let got = udp(&mut peer, 1, &waits, at);
        arrived.extend(numbers(&got));
        waits = udp(&mut new, 2, &got, at);
        if waits.udp.is_empty() {
            at += Duration::from_millis(100);
            new.handle_timeout(at, &mut waits);
        }
    }
    assert_eq!(arrived, [20]);
}

#[test]
fn a_peer_that_began_another_session_in_between_is_shown_a_new_one() {
    let Scene { mut old, mut peer, mut new, mut now } = standing_by();
    // The old process does not replace the session that its successor has with the peer.
    now += Duration::from_secs(125);
    let out = send(&mut old, 1, 30, now);
    assert_eq!(out.udp.iter().filter(|(_, d)| d[0] == 1).count(), 0);
    let mut nothing = Outbox::default();
    let flows = old.let_go(&mut nothing);
    let mut lost = Outbox::default();
    new.take_over(&flows, now, &mut lost);
    now += Duration::from_millis(400);
    let out = send(&mut peer, 2, 31, now);
    std::thread::sleep(Duration::from_millis(2));
    let got = udp(&mut new, 2, &out, now);
    assert_eq!(numbers(&passed(&mut old, &got, now)), [31]);
    let again: Vec<u8> = got.udp.iter().map(|(_, d)| d[0]).filter(|kind| *kind == 1).collect();
    assert_eq!(again, [1], "an initiation");
    old.end_passing();
    new.end_passing();
}

const REGION: RegionId = RegionId(1);

/// Hands the packets for relays to `to`, as the region's server would.
fn relay(to: &mut Engine, from: NodePublic, sent: &Outbox, now: Instant) -> Outbox {
    let mut out = Outbox::default();
    for (_, packet) in sent.derp.iter() {
        let mut packet = packet.to_vec();
        let event = DerpEvent::Packet { source: from, payload: &mut packet };
        to.handle_derp(REGION, event, now, &mut out);
    }
    out
}

/// What one process sends for the other, as its shell does it.
fn lend(lender: &Engine, passed: &Outbox, now: Instant) -> Outbox {
    let mut out = Outbox::default();
    for (origin, packet) in passed.passed.iter() {
        let Origin::ToRelay(to) = origin else { panic!("{origin:?}") };
        out.derp.push(lender.lent_relay(*to, now), packet);
    }
    out
}

#[test]
fn a_peer_by_relay_alone_is_reached_through_the_process_before_until_the_dial_is_done() {
    let mut now = Instant::now();
    let keys = [1, 2].map(|n| NodePrivate::from_bytes([n; 32]).public());
    let map = MapResponse {
        derp_map: Some(DerpMap {
            regions: Some([(REGION, DerpRegion { region_id: REGION, ..DerpRegion::default() })].into()),
            ..DerpMap::default()
        }),
        ..MapResponse::default()
    };
    let mut engines = pair(now);
    for engine in &mut engines {
        let mut out = Outbox::default();
        engine.handle_control(ControlEvent::Map(Box::new(map.clone())), now, &mut out);
        // Nobody has an address that others could send to.
        engine.handle_underlay(&[], None, None, now, &mut out);
        let homes = [1, 2].map(|n| PeerChange {
            node_id: NodeId(n),
            derp_region: REGION,
            endpoints: Some(Vec::new()),
            ..PeerChange::default()
        });
        let homes = MapResponse { peers_changed_patch: homes.into(), ..MapResponse::default() };
        engine.handle_control(ControlEvent::Map(Box::new(homes)), now, &mut out);
    }
    let [mut old, mut peer] = engines;
    // The first packet makes both dial.
    send(&mut old, 1, 0, now);
    let mut out = Outbox::default();
    old.handle_derp(REGION, DerpEvent::Connected, now, &mut out);
    send(&mut peer, 2, 0, now);
    peer.handle_derp(REGION, DerpEvent::Connected, now, &mut Outbox::default());
    for round in 0..20 {
        std::thread::sleep(Duration::from_millis(2));
        now += Duration::from_millis(100);
        old.handle_timeout(now, &mut out);
        let back = relay(&mut peer, keys[0], &out, now);
        out = relay(&mut old, keys[1], &back, now);
        let done = relay(&mut peer, keys[0], &out, now);
        out = Outbox::default();
        if !done.tun.is_empty() {
            break;
        }
        assert!(round < 19, "no session by relay");
    }

    // A peer answers no second handshake at once.
    now += Duration::from_millis(100);
    let snapshot = old.snapshot(now);
    old.begin_passing();
    let config = Config {
        node_key: NodePrivate::from_bytes([1; 32]),
        disco_key: DiscoPrivate::from_bytes([11; 32]),
        mtu: 1280,
        random_seed: [1; 32],
        standby: Some(old.index_mark()),
        wall: WALL,
        snapshot: Some(Snapshot::from_bytes(&snapshot).expect("our own")),
    };
    std::thread::sleep(Duration::from_millis(2));
    let mut new = Engine::new(config, now);
    new.begin_passing();
    assert_eq!(new.unready(now), 1);
    let mut out = Outbox::default();
    new.handle_timeout(now, &mut out);
    assert_eq!(
        (out.udp.len(), out.derp.len(), out.passed.len()),
        (0, 0, 1),
        "a handshake to be lent a relay"
    );
    let response = relay(&mut peer, keys[0], &lend(&old, &out, now), now);
    let handed = relay(&mut old, keys[1], &response, now);
    assert_eq!(handed.passed.len(), 1, "of {} packets", response.derp.len());
    assert!(passed(&mut new, &handed, now).is_empty(), "the peer does not learn of the session");
    assert_eq!(new.unready(now), 0);

    let flows = old.let_go(&mut Outbox::default());
    let under_way = send(&mut peer, 2, 41, now);
    let mut out = Outbox::default();
    new.take_over(&flows, now, &mut out);
    relay(&mut peer, keys[0], &lend(&old, &out, now), now);
    assert_eq!(numbers(&relay(&mut old, keys[1], &under_way, now)), [41], "in the session before");
    let out = send(&mut new, 1, 42, now);
    assert_eq!(numbers(&relay(&mut peer, keys[0], &lend(&old, &out, now), now)), [42]);
    let back = send(&mut peer, 2, 43, now);
    let handed = relay(&mut old, keys[1], &back, now);
    assert_eq!(numbers(&passed(&mut new, &handed, now)), [43], "in the new session, by the old connection");

    new.handle_derp(REGION, DerpEvent::Connected, now, &mut Outbox::default());
    let out = send(&mut new, 1, 44, now);
    assert!(out.passed.is_empty());
    assert_eq!(numbers(&relay(&mut peer, keys[0], &out, now)), [44], "by its own");
    new.end_passing();
    new.handle_derp(REGION, DerpEvent::Disconnected, now, &mut Outbox::default());
    let out = send(&mut new, 1, 45, now);
    assert!(out.passed.is_empty() && out.derp.is_empty(), "it waits");
}
