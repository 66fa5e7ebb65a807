//! Two nodes that know only each other, the wire between them, and packets for it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use podtether_core::batch::{Batch, Outbox};
use podtether_core::engine::{Config, ControlEvent, DropReason, Engine, Question};
use podtether_core::filter::Rule;
use podtether_core::key::{DiscoPrivate, NodePrivate};
use podtether_core::tailcfg::{FilterRule, MapResponse, NetPortRange, Node, NodeId, PortRange, UnixTime};

pub(crate) const SYN: u8 = 2;
pub(crate) const WALL: i64 = 1_800_000_000;

pub(crate) fn endpoint(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 1000))
}

pub(crate) fn tailnet(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 64, 0, n)
}

/// As node 1 is known to node 2 where it is masqueraded.
pub(crate) const MASK: Ipv4Addr = Ipv4Addr::new(100, 99, 0, 1);

pub(crate) fn node(n: u8) -> Node {
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

pub(crate) fn allow(from: &str) -> Vec<Rule> {
    let to = NetPortRange { ip: "*".into(), ports: PortRange::ANY };
    vec![FilterRule { src_ips: vec![from.into()], dst_ports: vec![to], ..FilterRule::default() }.into()]
}

pub(crate) fn map(own: Node, peer: Node) -> MapResponse {
    MapResponse {
        node: Some(own),
        peers: vec![peer],
        packet_filter: Some(allow("*")),
        ..MapResponse::default()
    }
}

pub(crate) fn engine(n: u8, map: MapResponse, now: Instant) -> Engine {
    let config = Config {
        node_key: NodePrivate::from_bytes([n; 32]),
        disco_key: DiscoPrivate::from_bytes([n + 100; 32]),
        mtu: 1280,
        random_seed: [n; 32],
        standby: None,
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

pub(crate) fn sum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum: u64 =
        bytes.chunks(2).map(|w| u64::from(w[0]) << 8 | u64::from(w.get(1).copied().unwrap_or(0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

/// A whole IPv4 packet with right checksums.
pub(crate) fn packet(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, body: &[u8]) -> Vec<u8> {
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

pub(crate) fn udp(src: Ipv4Addr, src_port: u16, dst: Ipv4Addr, dst_port: u16) -> Vec<u8> {
    let ports = [src_port.to_be_bytes(), dst_port.to_be_bytes(), 13u16.to_be_bytes(), [0, 0]].concat();
    packet(src, dst, 17, &[&ports[..], b"hello"].concat())
}

pub(crate) fn tcp(src: Ipv4Addr, dst: Ipv4Addr, dst_port: u16, flags: u8) -> Vec<u8> {
    let mut body = [&40000u16.to_be_bytes()[..], &dst_port.to_be_bytes(), &[0; 16]].concat();
    (body[12], body[13]) = (0x50, flags);
    packet(src, dst, 6, &body)
}

/// Two nodes and the wire between them.
pub(crate) struct Pair {
    pub(crate) now: Instant,
    pub(crate) engines: [Engine; 2],
    /// What each pod got.
    pub(crate) got: [Vec<Vec<u8>>; 2],
}

impl Pair {
    pub(crate) fn new(maps: [MapResponse; 2]) -> Self {
        let now = Instant::now();
        let [a, b] = maps;
        Self { now, engines: [engine(1, a, now), engine(2, b, now)], got: [Vec::new(), Vec::new()] }
    }

    /// The pod of `from` (0 or 1) sends; everything that follows within a second happens.
    pub(crate) fn send(&mut self, from: usize, packet: &[u8]) {
        let mut batch = Batch::new();
        batch.push((), packet);
        let mut out = Outbox::default();
        self.engines[from].handle_tun(&mut batch, self.now, &mut out);
        self.carry(from, out);
        self.wait(Duration::from_secs(1));
    }

    pub(crate) fn carry(&mut self, from: usize, out: Outbox) {
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

    pub(crate) fn wait(&mut self, time: Duration) {
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

    pub(crate) fn tell(&mut self, n: usize, map: MapResponse) {
        let mut out = Outbox::default();
        self.engines[n].handle_control(ControlEvent::Map(Box::new(map)), self.now, &mut out);
        self.carry(n, out);
    }

    pub(crate) fn drops(&self, n: usize, reason: DropReason) -> u64 {
        self.engines[n].counters().drops().find(|(r, _)| *r == reason).map_or(0, |(_, count)| count)
    }

    pub(crate) fn why(
        &self,
        n: usize,
        src: Ipv4Addr,
        dst: Ipv4Addr,
        dst_port: u16,
    ) -> podtether_core::engine::Why {
        let question = Question { src: src.into(), dst: dst.into(), protocol: 6, src_port: 40000, dst_port };
        self.engines[n].why(question, self.now)
    }

    pub(crate) fn take(&mut self, n: usize) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.got[n])
    }
}
