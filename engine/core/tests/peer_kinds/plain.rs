//! Peers that speak WireGuard and nothing else.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use podtether_core::batch::{Batch, Outbox};
use podtether_core::engine::{ControlEvent, DropReason, Engine};
use podtether_core::key::{DiscoPrivate, DiscoPublic, NodePrivate};
use podtether_core::tailcfg::{MapResponse, Node};

use crate::pair::*;

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
