//! Carrying packets allocates nothing once buffers are warm, one by one and as the super-packets of the kernel.

mod counting;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use counting::ALLOCATIONS;
use podtether_core::batch::{Batch, Outbox, RegionId};
use podtether_core::engine::{Config, ControlEvent, Engine, PathView};
use podtether_core::filter::Rule;
use podtether_core::key::{DiscoPrivate, NodePrivate};
use podtether_core::offload::{Gso, VnetHeader, checksum};
use podtether_core::tailcfg::{FilterRule, MapResponse, NetPortRange, Node, NodeId, PortRange, UnixTime};

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

fn allow_all() -> Vec<Rule> {
    let to = NetPortRange { ip: "*".into(), ports: PortRange::ANY };
    vec![FilterRule { src_ips: vec!["*".into()], dst_ports: vec![to], ..FilterRule::default() }.into()]
}

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
            wall: UnixTime::from_secs(1_800_000_000),
            snapshot: None,
        };
        let mut engine = Engine::new(config, now);
        let mut out = Outbox::default();
        engine.handle_underlay(&[endpoint(n).ip()], Some(1000), None, now, &mut out);
        engine.handle_control(ControlEvent::SessionStarted, now, &mut out);
        let map = MapResponse {
            node: Some(node(n, &key, &disco)),
            peers: vec![node(3 - n, peer_key, peer_disco)],
            packet_filter: Some(allow_all()),
            ..MapResponse::default()
        };
        engine.handle_control(ControlEvent::Map(Box::new(map)), now, &mut out);
        engine
    })
}

fn packet(src: u8, dst: u8) -> Vec<u8> {
    let len = 1280u16;
    let mut p = vec![0; usize::from(len)];
    p[0] = 0x45;
    p[2..4].copy_from_slice(&len.to_be_bytes());
    p[8] = 64;
    p[9] = 17;
    p[12..16].copy_from_slice(&Ipv4Addr::new(100, 64, 0, src).octets());
    p[16..20].copy_from_slice(&Ipv4Addr::new(100, 64, 0, dst).octets());
    p[20..24].copy_from_slice(&[0, 80, 0, 80]);
    p
}

/// Hands over what both want sent until nobody wants anything.
fn settle(engines: &mut [Engine; 2], from: usize, mut out: Outbox, now: Instant) {
    let (mut turn, mut idle) = (from, 0);
    while idle < 2 {
        let mut batch = Batch::new();
        for (to, datagram) in out.udp.iter() {
            assert_eq!(to.ip(), IpAddr::from([192, 0, 2, u8::try_from(2 - turn).expect("small")]));
            batch.push(endpoint(u8::try_from(turn + 1).expect("small")), datagram);
        }
        out.clear();
        turn = 1 - turn;
        idle = if batch.is_empty() { idle + 1 } else { 0 };
        engines[turn].handle_udp(&mut batch, now, &mut out);
    }
}

#[test]
fn a_warm_data_path_allocates_nothing() {
    let mut now = Instant::now();
    let mut engines = pair(now);
    let mut to_send = Batch::new();
    let bytes = packet(1, 2);
    for _ in 0..64 {
        assert!(to_send.push((), &bytes));
    }
    for _ in 0..3 {
        let mut out = Outbox::default();
        engines[0].handle_tun(&mut to_send, now, &mut out);
        settle(&mut engines, 0, out, now);
        now += Duration::from_millis(10);
    }
    let path = engines[0].peers(now)[0].path;
    assert_eq!(path, PathView::Direct(endpoint(2), Duration::ZERO));

    let (mut sent, mut received) = (Outbox::default(), Outbox::default());
    let mut wire = Batch::new();
    let mut delivered = 0;
    let mut after_warm_up = 0;
    for round in 0..200 {
        if round == 20 {
            after_warm_up = ALLOCATIONS.get();
        }
        sent.clear();
        received.clear();
        wire.clear();
        engines[0].handle_tun(&mut to_send, now, &mut sent);
        for (_, datagram) in sent.udp.iter() {
            assert!(wire.push(endpoint(1), datagram));
        }
        engines[1].handle_udp(&mut wire, now, &mut received);
        delivered += received.tun.len();
        now += Duration::from_millis(1);
    }
    let allocations = ALLOCATIONS.get() - after_warm_up;
    assert_eq!(delivered, 200 * 64);
    assert_eq!(allocations, 0, "for {} packets", 180 * 64);
}

const HEADERS: usize = 40;

/// A TCP super-packet that the kernel leaves to be cut into segments of `size` bytes each.
fn super_packet(payload: usize, size: u16) -> (VnetHeader, Vec<u8>) {
    let mut p = packet(1, 2)[..20].to_vec();
    p[9] = 6;
    p.extend([0, 80, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    p.extend((0..payload).map(|n| u8::try_from(n % 251).expect("small")));
    let length = u16::try_from(p.len()).expect("64 KiB at most");
    p[2..4].copy_from_slice(&length.to_be_bytes());
    let partial = checksum::pseudo(&p[12..20], 6, length - 20).fold();
    p[36..38].copy_from_slice(&partial.to_be_bytes());
    let header = VnetHeader {
        needs_csum: true,
        gso: Gso::TcpV4,
        header_len: 40,
        gso_size: size,
        csum_start: 20,
        csum_offset: 16,
        ..VnetHeader::PLAIN
    };
    (header, p)
}

#[test]
fn super_packets_go_out_cut_and_allocate_nothing() {
    let mut now = Instant::now();
    let mut engines = pair(now);
    // The handshake.
    let mut first = Batch::new();
    assert!(first.push((), &packet(1, 2)));
    for _ in 0..3 {
        let mut out = Outbox::default();
        assert_eq!(engines[0].handle_tun(&mut first, now, &mut out), 1);
        settle(&mut engines, 0, out, now);
        now += Duration::from_millis(10);
    }
    let (payload, size) = (60_000, 1240);
    let (header, whole) = super_packet(payload, size);
    let segments = payload.div_ceil(usize::from(size));
    let mut from_tun = Batch::new();
    let (mut sent, mut received) = (Outbox::default(), Outbox::default());
    let mut wire = Batch::new();
    let mut after_warm_up = 0;
    for round in 0..50 {
        if round == 5 {
            after_warm_up = ALLOCATIONS.get();
        }
        sent.clear();
        received.clear();
        wire.clear();
        from_tun.clear();
        assert!(from_tun.push(header, &whole));
        assert_eq!(engines[0].handle_tun(&mut from_tun, now, &mut sent), segments as u64);
        // One call sends them all.
        assert_eq!(sent.udp.runs(|_| true).map(|run| run.packets).sum::<usize>(), segments);
        assert!(sent.udp.runs(|_| true).count() <= 2);
        for (_, datagram) in sent.udp.iter() {
            assert!(wire.push(endpoint(1), datagram));
        }
        engines[1].handle_udp(&mut wire, now, &mut received);
        assert_eq!(received.tun.len(), segments);
        let mut at = HEADERS;
        for (_, packet) in received.tun.iter() {
            assert!(packet.len() <= 1280);
            let length = u16::try_from(packet.len() - 20).expect("small");
            assert!(checksum::pseudo(&packet[12..20], 6, length).bytes(&packet[20..]).holds());
            assert_eq!(packet[HEADERS..], whole[at..at + packet.len() - HEADERS]);
            at += packet.len() - HEADERS;
        }
        assert_eq!(at, whole.len());
        now += Duration::from_millis(1);
    }
    assert_eq!(ALLOCATIONS.get() - after_warm_up, 0, "for {} super-packets", 45);
}

#[test]
fn super_packets_that_nobody_can_send_are_counted_as_what_they_would_have_been() {
    let now = Instant::now();
    let mut engine = pair(now).into_iter().next().expect("two");
    let mut batch = Batch::new();
    // Segments longer than the TUN's MTU.
    let (header, whole) = super_packet(5000, 1250);
    assert!(batch.push(header, &whole));
    // Segments of no bytes.
    assert!(batch.push(VnetHeader { gso_size: 0, ..header }, &whole));
    let mut out = Outbox::default();
    assert_eq!(engine.handle_tun(&mut batch, now, &mut out), 4 + 1);
    assert!(out.udp.is_empty());
    let drops: Vec<_> =
        engine.counters().drops().filter(|(_, n)| *n > 0).map(|(r, n)| (r.name(), n)).collect();
    assert_eq!(drops, [("malformed", 1), ("too_big", 4)]);
}
