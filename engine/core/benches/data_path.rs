//! What a batch of 64 full packets costs: encryption, and decryption with the filter.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use divan::Bencher;
use divan::counter::BytesCount;
use podtether_core::batch::{Batch, Outbox};
use podtether_core::engine::{Config, ControlEvent, Engine};
use podtether_core::filter::Rule;
use podtether_core::key::{DiscoPrivate, NodePrivate};
use podtether_core::tailcfg::{FilterRule, MapResponse, NetPortRange, Node, NodeId, PortRange, UnixTime};

const PACKETS: usize = 64;
const LEN: u16 = 1280;

fn main() {
    divan::main();
}

fn endpoint(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 1000))
}

fn rules(count: u8) -> Vec<Rule> {
    let rule = |port| FilterRule {
        src_ips: vec!["100.64.0.0/10".into()],
        dst_ports: vec![NetPortRange { ip: "*".into(), ports: PortRange { first: port, last: port } }],
        ..FilterRule::default()
    };
    (0..count).map(|n| rule(1000 + u16::from(n))).chain([rule(80)]).map(Rule::from).collect()
}

fn node(n: u8, key: &NodePrivate, disco: &DiscoPrivate) -> Node {
    let address = format!("100.64.0.{n}/32").parse().expect("a net");
    Node {
        id: NodeId(u64::from(n)),
        key: key.public(),
        disco_key: disco.public(),
        addresses: vec![address],
        allowed_ips: vec![address],
        endpoints: vec![endpoint(n)],
        ..Node::default()
    }
}

fn packet() -> Vec<u8> {
    let mut p = vec![0; usize::from(LEN)];
    p[0] = 0x45;
    p[2..4].copy_from_slice(&LEN.to_be_bytes());
    p[8] = 64;
    p[9] = 17;
    p[12..16].copy_from_slice(&Ipv4Addr::new(100, 64, 0, 1).octets());
    p[16..20].copy_from_slice(&Ipv4Addr::new(100, 64, 0, 2).octets());
    p[20..24].copy_from_slice(&[0, 80, 0, 80]);
    p
}

struct Pair {
    engines: [Engine; 2],
    packets: Batch<()>,
    out: Outbox,
    wire: Batch<SocketAddr>,
    now: Instant,
}

impl Pair {
    fn new() -> Self {
        let now = Instant::now();
        let keys = [1, 2].map(|n| (NodePrivate::from_bytes([n; 32]), DiscoPrivate::from_bytes([n + 10; 32])));
        let engines = [1u8, 2].map(|n| {
            let (key, disco) = keys[usize::from(n - 1)].clone();
            let (peer_key, peer_disco) = &keys[usize::from(2 - n)];
            let config = Config {
                node_key: key.clone(),
                disco_key: disco.clone(),
                mtu: LEN,
                random_seed: [n; 32],
                standby: None,
                wall: UnixTime::from_secs(1_800_000_000),
                snapshot: None,
            };
            let mut engine = Engine::new(config, now);
            let mut out = Outbox::default();
            engine.handle_underlay(&[endpoint(n).ip()], Some(1000), None, now, &mut out);
            let map = MapResponse {
                node: Some(node(n, &key, &disco)),
                peers: vec![node(3 - n, peer_key, peer_disco)],
                packet_filter: Some(rules(20)),
                ..MapResponse::default()
            };
            engine.handle_control(ControlEvent::Map(Box::new(map)), now, &mut out);
            engine
        });
        let mut packets = Batch::new();
        for _ in 0..PACKETS {
            packets.push((), &packet());
        }
        let mut pair = Self { engines, packets, out: Outbox::default(), wire: Batch::new(), now };
        // Disco, then the handshake, then data.
        for _ in 0..3 {
            pair.now += Duration::from_millis(10);
            pair.seal();
            for turn in [1, 0, 1, 0, 1, 0] {
                pair.carry(turn);
            }
        }
        pair.seal();
        assert_eq!(pair.wire_len(), PACKETS);
        pair.carry(1);
        assert_eq!(pair.out.tun.len(), PACKETS);
        pair
    }

    fn seal(&mut self) {
        self.out.clear();
        self.engines[0].handle_tun(&mut self.packets, self.now, &mut self.out);
    }

    fn wire_len(&self) -> usize {
        self.out.udp.len()
    }

    fn carry(&mut self, to: usize) {
        self.wire.clear();
        let from = endpoint(if to == 1 { 1 } else { 2 });
        for (_, datagram) in self.out.udp.iter() {
            self.wire.push(from, datagram);
        }
        self.out.clear();
        self.engines[to].handle_udp(&mut self.wire, self.now, &mut self.out);
    }
}

fn bytes() -> BytesCount {
    BytesCount::new(PACKETS * usize::from(LEN))
}

#[divan::bench]
fn seal(bencher: Bencher<'_, '_>) {
    let mut pair = Pair::new();
    bencher.counter(bytes()).bench_local(|| pair.seal());
}

#[divan::bench]
fn seal_and_open(bencher: Bencher<'_, '_>) {
    let mut pair = Pair::new();
    bencher.counter(bytes()).bench_local(|| {
        pair.seal();
        pair.carry(1);
    });
}
