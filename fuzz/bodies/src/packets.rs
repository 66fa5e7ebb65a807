//! What reaches a running engine: the pod's packets and queries, a peer's packets inside the tunnel,
//! datagrams and relay packets from anybody.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use podtether_core::batch::{Batch, Outbox, RegionId};
use podtether_core::dns::{Action, Asked, Capacity, Client};
use podtether_core::engine::{Config, ControlEvent, DerpEvent, Engine};
use podtether_core::key::{DiscoPrivate, NodePrivate};
use podtether_core::packet::Parsed;
use podtether_core::snapshot::Snapshot;
use podtether_core::tailcfg::{
    DnsConfig, FilterRule, MapResponse, NetPortRange, Node, NodeId, PortRange, Resolver, UnixTime,
};

const PEER: u8 = 2;
/// Whatever the core is given, it may not ask for its timer without end.
const MAX_TURNS: usize = 64;

fn keys(n: u8) -> (NodePrivate, DiscoPrivate) {
    (NodePrivate::from_bytes([n; 32]), DiscoPrivate::from_bytes([n + 10; 32]))
}

fn endpoint(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 1000))
}

fn node(n: u8) -> Node {
    let (key, disco) = keys(n);
    let addresses = [format!("100.64.0.{n}/32"), format!("fd7a:115c:a1e0::{n}/128")];
    let nets: Vec<_> = addresses.iter().filter_map(|a| a.parse().ok()).collect();
    Node {
        id: NodeId(u64::from(n)),
        name: format!("n{n}.test."),
        key: key.public(),
        disco_key: disco.public(),
        addresses: nets.clone(),
        allowed_ips: nets,
        endpoints: vec![endpoint(n)],
        home_derp: RegionId(1),
        ..Node::default()
    }
}

fn config(snapshot: Option<Snapshot>) -> Config {
    let (node_key, disco_key) = keys(1);
    Config {
        node_key,
        disco_key,
        mtu: 1280,
        random_seed: [1; 32],
        standby: None,
        wall: UnixTime::from_secs(1_800_000_000),
        snapshot,
    }
}

/// An engine that knows nobody.
pub(crate) fn fresh(now: Instant) -> Engine {
    Engine::new(config(None), now)
}

/// An engine that knows one peer and lets in what goes to ports 1 to 1000 and every ping.
fn running(now: Instant, out: &mut Outbox) -> Engine {
    let mut engine = Engine::new(config(None), now);
    engine.handle_underlay(&[endpoint(1).ip()], Some(1000), None, now, out);
    engine.handle_control(ControlEvent::SessionStarted, now, out);
    let ports = PortRange { first: 1, last: 1000 };
    let rule = FilterRule {
        src_ips: vec!["100.64.0.0/24".into(), "fd7a:115c:a1e0::/64".into()],
        dst_ports: vec![NetPortRange { ip: "*".into(), ports }],
        ..FilterRule::default()
    };
    let resolver = Resolver { addr: "192.0.2.54".into(), ..Resolver::default() };
    let map = MapResponse {
        node: Some(node(1)),
        peers: vec![node(PEER)],
        packet_filter: Some(vec![rule.into()]),
        dns_config: Some(DnsConfig {
            proxied: true,
            domains: vec!["test".into()],
            routes: [("corp".to_owned(), vec![resolver])].into(),
            ..DnsConfig::default()
        }),
        ..MapResponse::default()
    };
    engine.handle_control(ControlEvent::Map(Box::new(map)), now, out);
    engine
}

pub(crate) fn drain(engine: &mut Engine, now: &mut Instant, out: &mut Outbox) {
    for packet in out.tun.iter().map(|(_, packet)| packet) {
        let parsed = Parsed::parse(packet);
        assert!(parsed.is_ok_and(|p| p.length <= packet.len()), "the pod gets whole IP packets alone");
    }
    while engine.poll_event().is_some() {}
    let mut turns = 0;
    while let Some(at) = engine.poll_timeout().filter(|at| *at <= *now) {
        turns += 1;
        assert!(turns <= MAX_TURNS, "the timer of {at:?} is due for ever");
        engine.handle_timeout(*now, out);
    }
    out.clear();
    *now += Duration::from_millis(50);
}

/// Packets from the pod.
pub fn tun(data: &[u8]) {
    let (mut now, mut out) = (Instant::now(), Outbox::default());
    let mut engine = running(now, &mut out);
    for piece in super::pieces(data) {
        let mut batch = Batch::new();
        batch.push((), piece);
        engine.handle_tun(&mut batch, now, &mut out);
        drain(&mut engine, &mut now, &mut out);
    }
}

/// Datagrams from anybody; a piece whose first byte is odd comes through the relay from the peer.
pub fn underlay(data: &[u8]) {
    let (mut now, mut out) = (Instant::now(), Outbox::default());
    let mut engine = running(now, &mut out);
    engine.handle_derp(RegionId(1), DerpEvent::Connected, now, &mut out);
    for piece in super::pieces(data) {
        let Some((first, rest)) = piece.split_first() else { continue };
        let mut payload = rest.to_vec();
        if first & 1 == 1 {
            let source = keys(PEER).0.public();
            engine.handle_derp(
                RegionId(1),
                DerpEvent::Packet { source, payload: &mut payload },
                now,
                &mut out,
            );
        } else {
            let mut batch = Batch::new();
            batch.push(endpoint(first >> 1), rest);
            engine.handle_udp(&mut batch, now, &mut out);
        }
        drain(&mut engine, &mut now, &mut out);
    }
}

/// Packets that a peer in the netmap, with a tunnel to us, has sealed.
pub fn peer(data: &[u8]) {
    let (mut now, mut out) = (Instant::now(), Outbox::default());
    let mut engine = running(now, &mut out);
    let ours = PublicKey::from(*keys(1).0.public().as_bytes());
    let secret = StaticSecret::from(*keys(PEER).0.expose());
    let mut hostile = Tunn::new(secret, ours, None, None, 1, None);
    let mut buffer = vec![0; 70_000];
    let TunnResult::WriteToNetwork(initiation) = hostile.format_handshake_initiation(&mut buffer, false)
    else {
        return;
    };
    let mut batch = Batch::new();
    batch.push(endpoint(PEER), initiation);
    out.clear();
    engine.handle_udp(&mut batch, now, &mut out);
    let answer = out.udp.iter().map(|(_, d)| d.to_vec()).find(|d| d.first() == Some(&2));
    let Some(answer) = answer else { panic!("a known peer's initiation is answered") };
    let confirmed = hostile.decapsulate(None, &answer, &mut buffer);
    assert!(matches!(confirmed, TunnResult::WriteToNetwork(_)), "the handshake completes");
    for piece in super::pieces(data) {
        let TunnResult::WriteToNetwork(sealed) = hostile.encapsulate(piece, &mut buffer) else { continue };
        let mut batch = Batch::new();
        batch.push(endpoint(PEER), sealed);
        engine.handle_udp(&mut batch, now, &mut out);
        drain(&mut engine, &mut now, &mut out);
    }
}

/// A query of the pod, to the node itself and to a name server it stands in for, and the same bytes as that
/// server's answer.
pub fn dns(data: &[u8]) {
    const QUESTION: &[u8] = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x01a\x04corp\0\0\x01\0\x01";
    let (mut now, mut out) = (Instant::now(), Outbox::default());
    let mut engine = running(now, &mut out);
    engine.set_dns_capacity(Capacity { udp4: 2, udp6: 2, tcp4: 2, tcp6: 2 });
    let client = Client { listener: 0, from: SocketAddr::from(([100, 64, 0, 1], 4000)), stream: None };
    let server = SocketAddr::from(([192, 0, 2, 53], 53));
    for (meant_for, query) in
        [(None, data), (Some(server), data), (None, QUESTION), (Some(server), QUESTION), (None, QUESTION)]
    {
        engine.handle_dns(Asked { client, meant_for }, query, now);
        while let Some(action) = engine.poll_dns() {
            match action {
                Action::Reply { message, .. } => {
                    assert_eq!(message.get(..2), query.get(..2), "an answer has its question's number");
                    assert!(meant_for.is_some() || message[2] & 0x80 != 0, "an answer says that it is one");
                }
                Action::Ask { ask, message, .. } => {
                    let right =
                        message.get(..2).into_iter().chain(data.get(2..)).collect::<Vec<_>>().concat();
                    engine.handle_dns_answer(ask, Ok(data), now);
                    engine.handle_dns_answer(ask, Ok(&right), now);
                }
                Action::Stop { .. } => {}
            }
        }
        drain(&mut engine, &mut now, &mut out);
    }
}

/// A snapshot of any content either is refused or starts an engine that runs.
pub(crate) fn survives_start(snapshot: Snapshot) {
    let (mut now, mut out) = (Instant::now(), Outbox::default());
    let mut engine = Engine::new(config(Some(snapshot)), now);
    let _ = (engine.status(), engine.peers(now));
    drain(&mut engine, &mut now, &mut out);
}
