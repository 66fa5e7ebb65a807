//! What a batch of 64 packets of garbage costs, of each kind, beside a batch of good ones (`data_path`).
//! Where there is a budget (initiations, disco of idle peers), this is the cost once it is used up.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use divan::Bencher;
use divan::counter::ItemsCount;
use podtether_core::batch::{Batch, Outbox};
use podtether_core::disco::{Message, SharedKey};
use podtether_core::engine::{Config, ControlEvent, Engine};
use podtether_core::key::{DiscoPrivate, NodePrivate};
use podtether_core::tailcfg::{MapResponse, Node, NodeId, UnixTime};

const PACKETS: usize = 64;

fn main() {
    divan::main();
}

fn node(n: u8) -> Node {
    let address = format!("100.64.0.{n}/32").parse().expect("a net");
    Node {
        id: NodeId(u64::from(n)),
        key: NodePrivate::from_bytes([n; 32]).public(),
        disco_key: DiscoPrivate::from_bytes([n + 100; 32]).public(),
        addresses: vec![address],
        allowed_ips: vec![address],
        endpoints: vec![SocketAddr::from(([192, 0, 2, n], 1000))],
        ..Node::default()
    }
}

fn engine(now: Instant) -> Engine {
    let config = Config {
        node_key: NodePrivate::from_bytes([1; 32]),
        disco_key: DiscoPrivate::from_bytes([101; 32]),
        mtu: 1280,
        random_seed: [1; 32],
        standby: None,
        wall: UnixTime::from_secs(1_800_000_000),
        snapshot: None,
    };
    let mut engine = Engine::new(config, now);
    let map =
        MapResponse { node: Some(node(1)), peers: (2..90).map(node).collect(), ..MapResponse::default() };
    engine.handle_control(ControlEvent::Map(Box::new(map)), now, &mut Outbox::default());
    engine
}

fn ping(from: u8, broken: bool) -> Vec<u8> {
    let ours = DiscoPrivate::from_bytes([from + 100; 32]);
    let key = SharedKey::new(&ours, &DiscoPrivate::from_bytes([101; 32]).public());
    let message = Message::Ping { tx: [1; 12], node_key: Some(NodePrivate::from_bytes([from; 32]).public()) };
    let mut packet = Vec::new();
    key.seal(&ours.public(), [2; 24], &message, &mut packet);
    if broken && let Some(last) = packet.last_mut() {
        *last ^= 1;
    }
    packet
}

fn initiation() -> Vec<u8> {
    let to = PublicKey::from(*NodePrivate::from_bytes([1; 32]).public().as_bytes());
    let mut tunn = Tunn::new(StaticSecret::from([0x77; 32]), to, None, None, 7, None);
    let mut buffer = [0; 256];
    let TunnResult::WriteToNetwork(message) = tunn.format_handshake_initiation(&mut buffer, false) else {
        panic!("no initiation");
    };
    message.to_vec()
}

fn typed(kind: u8, len: usize) -> Vec<u8> {
    let mut packet = vec![0xa5; len];
    packet[..4].copy_from_slice(&[kind, 0, 0, 0]);
    packet
}

fn udp(bencher: Bencher<'_, '_>, packets: &[Vec<u8>]) {
    let now = Instant::now();
    let mut engine = engine(now);
    let mut batch = Batch::new();
    let mut out = Outbox::default();
    bencher.counter(ItemsCount::new(PACKETS)).bench_local(|| {
        // Some are opened in place, so each batch is a fresh copy.
        batch.clear();
        out.clear();
        for (packet, port) in packets.iter().cycle().take(PACKETS).zip(2000..) {
            batch.push(SocketAddr::from(([198, 51, 100, 1], port)), packet);
        }
        engine.handle_udp(&mut batch, now, &mut out);
    });
}

#[divan::bench]
fn noise(bencher: Bencher<'_, '_>) {
    udp(bencher, &[vec![0x5a; 1200]]);
}

#[divan::bench]
fn unknown_session(bencher: Bencher<'_, '_>) {
    udp(bencher, &[typed(4, 1200)]);
}

#[divan::bench]
fn unknown_response(bencher: Bencher<'_, '_>) {
    udp(bencher, &[typed(2, 92)]);
}

#[divan::bench]
fn initiation_not_for_us(bencher: Bencher<'_, '_>) {
    udp(bencher, &[typed(1, 148)]);
}

#[divan::bench]
fn initiation_of_a_stranger(bencher: Bencher<'_, '_>) {
    udp(bencher, &[initiation()]);
}

#[divan::bench]
fn disco_of_a_stranger(bencher: Bencher<'_, '_>) {
    udp(bencher, &[ping(120, false)]);
}

#[divan::bench]
fn disco_broken_of_idle_peers(bencher: Bencher<'_, '_>) {
    udp(bencher, &(2..90).map(|n| ping(n, true)).collect::<Vec<_>>());
}

#[divan::bench]
fn disco_pings_without_end(bencher: Bencher<'_, '_>) {
    udp(bencher, &[ping(2, false)]);
}

fn ip(src: Ipv4Addr, dst: Ipv4Addr) -> Vec<u8> {
    let mut p = vec![0; 100];
    p[0] = 0x45;
    p[3] = 100;
    p[9] = 17;
    p[12..16].copy_from_slice(&src.octets());
    p[16..20].copy_from_slice(&dst.octets());
    p
}

fn tun(bencher: Bencher<'_, '_>, packet: &[u8]) {
    let now = Instant::now();
    let mut engine = engine(now);
    let mut batch = Batch::new();
    for _ in 0..PACKETS {
        batch.push((), packet);
    }
    let mut out = Outbox::default();
    bencher.counter(ItemsCount::new(PACKETS)).bench_local(|| {
        out.clear();
        engine.handle_tun(&mut batch, now, &mut out);
    });
}

#[divan::bench]
fn pod_to_nobody(bencher: Bencher<'_, '_>) {
    tun(bencher, &ip(Ipv4Addr::new(100, 64, 0, 1), Ipv4Addr::new(100, 99, 9, 9)));
}

#[divan::bench]
fn pod_with_anothers_address(bencher: Bencher<'_, '_>) {
    tun(bencher, &ip(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(100, 64, 0, 2)));
}

#[divan::bench]
fn pod_to_a_peer_without_a_session(bencher: Bencher<'_, '_>) {
    tun(bencher, &ip(Ipv4Addr::new(100, 64, 0, 1), Ipv4Addr::new(100, 64, 0, 2)));
}

#[divan::bench]
fn pod_noise(bencher: Bencher<'_, '_>) {
    tun(bencher, &[0x5a; 1000]);
}
