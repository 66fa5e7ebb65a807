//! Initiations that bear a known peer's static key and are not its own, or not new. The key in an initiation
//! is no secret: whoever knows our public key can seal any into one. Only the timestamp proves the sender.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use podtether_core::batch::{Batch, Outbox};
use podtether_core::engine::{Config, ControlEvent, Engine, PathView};
use podtether_core::key::{DiscoPrivate, NodePrivate};
use podtether_core::tailcfg::{MapResponse, Node, NodeId, UnixTime};

const INITIATION_LEN: usize = 148;
/// Where the encrypted timestamp begins, and where the first MAC does.
const TIMESTAMP: usize = 88;
const MAC1: usize = 116;

fn from(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 1000))
}

fn node(n: u8) -> Node {
    let address = IpAddr::V4(Ipv4Addr::new(100, 64, 0, n)).into();
    Node {
        id: NodeId(u64::from(n)),
        name: format!("n{n}.test."),
        key: NodePrivate::from_bytes([n; 32]).public(),
        disco_key: DiscoPrivate::from_bytes([n + 100; 32]).public(),
        addresses: vec![address],
        allowed_ips: vec![address],
        endpoints: vec![from(n)],
        ..Node::default()
    }
}

/// Node 1, which knows node 2.
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
    let mut out = Outbox::default();
    engine.handle_underlay(&[from(1).ip()], Some(1000), None, now, &mut out);
    engine.handle_control(ControlEvent::SessionStarted, now, &mut out);
    let map = MapResponse { node: Some(node(1)), peers: vec![node(2)], ..MapResponse::default() };
    engine.handle_control(ControlEvent::Map(Box::new(map)), now, &mut out);
    while engine.poll_event().is_some() {}
    engine
}

/// Node 2's WireGuard.
fn peer() -> Tunn {
    let engine = PublicKey::from(*NodePrivate::from_bytes([1; 32]).public().as_bytes());
    Tunn::new(StaticSecret::from([2; 32]), engine, None, None, 7, None)
}

fn initiation(peer: &mut Tunn) -> Vec<u8> {
    let mut buf = [0; 256];
    let TunnResult::WriteToNetwork(made) = peer.format_handshake_initiation(&mut buf, true) else {
        panic!("no initiation")
    };
    assert_eq!(made.len(), INITIATION_LEN);
    made.to_vec()
}

/// The MAC that shows that its sender knows whom it writes to.
fn stamp(message: &mut [u8]) {
    let engine = NodePrivate::from_bytes([1; 32]).public();
    let key = Blake2s256::new().chain_update(b"mac1----").chain_update(engine.as_bytes()).finalize();
    let mut mac = Blake2sMac::<U16>::new_from_slice(&key).expect("a key");
    Update::update(&mut mac, &message[..MAC1]);
    message[MAC1..MAC1 + 16].copy_from_slice(&mac.finalize_fixed());
}

/// What the engine sends after this datagram.
fn hear(
    engine: &mut Engine,
    sender: SocketAddr,
    datagram: &[u8],
    now: Instant,
) -> Vec<(SocketAddr, Vec<u8>)> {
    let (mut batch, mut out) = (Batch::new(), Outbox::default());
    assert!(batch.push(sender, datagram));
    engine.handle_udp(&mut batch, now, &mut out);
    assert!(out.tun.is_empty() && out.derp.is_empty());
    out.udp.iter().map(|(to, d)| (*to, d.to_vec())).collect()
}

/// All that a peer's state shows from outside.
#[derive(Debug, PartialEq)]
struct Traces {
    wakes_at: Option<Instant>,
    snapshot: Vec<u8>,
    peers: Vec<(PathView, Option<Duration>)>,
    handshakes: u64,
}

fn traces(engine: &mut Engine, now: Instant) -> Traces {
    Traces {
        wakes_at: engine.poll_timeout(),
        snapshot: engine.snapshot(now),
        peers: engine.peers(now).into_iter().map(|p| (p.path, p.handshake_age)).collect(),
        handshakes: engine.counters().handshakes,
    }
}

fn drops(engine: &Engine, name: &str) -> u64 {
    engine.counters().drops().find(|(reason, _)| reason.name() == name).map_or(0, |(_, n)| n)
}

#[test]
fn a_forged_initiation_in_a_peers_name_leaves_nothing_behind() {
    let now = Instant::now();
    let mut engine = engine(now);
    let before = traces(&mut engine, now);
    let genuine = initiation(&mut peer());
    // The MAC is right and the key inside is the peer's; the proof is not.
    for at in [TIMESTAMP, TIMESTAMP + 11, MAC1 - 1] {
        let mut forged = genuine.clone();
        forged[at] ^= 1;
        stamp(&mut forged);
        assert_eq!(hear(&mut engine, from(66), &forged, now), []);
        assert!(engine.poll_event().is_none());
        assert_eq!(traces(&mut engine, now), before, "byte {at}");
    }
    assert_eq!(drops(&engine, "bad_crypto"), 3);
    // The check is one of forgery: with the right proof it is taken.
    let mut same = genuine.clone();
    stamp(&mut same);
    assert_eq!(same, genuine);
    let answers = hear(&mut engine, from(2), &genuine, now);
    assert!(answers.iter().any(|(to, d)| *to == from(2) && d[0] == 2), "{answers:?}");
    assert_ne!(traces(&mut engine, now), before);
}

#[test]
fn a_forged_initiation_does_not_harm_a_session() {
    let mut now = Instant::now();
    let (mut engine, mut peer) = (engine(now), peer());
    let first = initiation(&mut peer);
    let answers = hear(&mut engine, from(2), &first, now);
    let mut buf = [0; 256];
    let response = answers.iter().find(|(_, d)| d[0] == 2).expect("a response");
    let TunnResult::WriteToNetwork(confirmed) = peer.decapsulate(None, &response.1, &mut buf) else {
        panic!("no confirmation")
    };
    let confirmed = confirmed.to_vec();
    hear(&mut engine, from(2), &confirmed, now);
    while engine.poll_event().is_some() {}
    now += Duration::from_secs(1);
    let before = traces(&mut engine, now);
    let mut forged = first.clone();
    forged[TIMESTAMP] ^= 1;
    stamp(&mut forged);
    for (message, reason) in [(&forged, "bad_crypto"), (&first, "duplicate")] {
        assert_eq!(hear(&mut engine, from(66), message, now), [], "{reason}");
        assert_eq!(traces(&mut engine, now), before, "{reason}");
        assert_eq!(drops(&engine, reason), 1);
        now += Duration::from_millis(50);
        assert_eq!(engine.peers(now).len(), 1);
        now -= Duration::from_millis(50);
    }
}

#[test]
fn a_replayed_initiation_is_refused_also_when_its_session_is_long_gone() {
    let mut now = Instant::now();
    let (mut engine, mut peer) = (engine(now), peer());
    let old = initiation(&mut peer);
    assert!(!hear(&mut engine, from(2), &old, now).is_empty());
    // Nothing moves, and what was kept for the peer goes.
    let until = now + Duration::from_secs(700);
    while let Some(at) = engine.poll_timeout().filter(|at| *at < until) {
        now = at;
        engine.handle_timeout(now, &mut Outbox::default());
        while engine.poll_event().is_some() {}
    }
    assert_eq!(engine.peers(now)[0].path, PathView::Idle);
    let before = traces(&mut engine, now);
    assert_eq!(hear(&mut engine, from(66), &old, now), [], "a stranger gets no answer to what was answered");
    assert_eq!(traces(&mut engine, now), before);
    assert_eq!(drops(&engine, "duplicate"), 1);
    // News of the peer do not make it new, nor does its own next one suffer.
    let mut renamed = node(2);
    renamed.name = "other.test.".into();
    let map = MapResponse { peers_changed: vec![renamed], ..MapResponse::default() };
    engine.handle_control(ControlEvent::Map(Box::new(map)), now, &mut Outbox::default());
    while engine.poll_event().is_some() {}
    let before = traces(&mut engine, now);
    assert_eq!(hear(&mut engine, from(66), &old, now), []);
    assert_eq!(traces(&mut engine, now), before);
    std::thread::sleep(Duration::from_millis(20));
    let new = initiation(&mut peer);
    assert!(
        hear(&mut engine, from(2), &new, now).iter().any(|(_, d)| d[0] == 2),
        "its own next one is taken"
    );
}
