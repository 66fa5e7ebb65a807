//! Floods, in virtual time: what garbage costs is bounded, and those who are not flooding get through.

mod pair;
mod shield;

use std::time::Duration;

use pair::*;
use podtether_core::batch::{Batch, Outbox};
use podtether_core::disco::{Message, SharedKey};
use podtether_core::engine::{DerpEvent, DropReason};

/// Initiations that are worked on in the first second of a flood: twice the burst and twice the rate that
/// `engine::load` says. Then the rates alone.
const FIRST_SECOND: u64 = 700;
const EACH_SECOND: u64 = 400;

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

#[test]
fn garbage_by_relay_is_counted_and_costs_few_handshakes() {
    let mut pair = Pair::new(20);
    assert!(pair.send());
    let before: u64 = pair.nodes[0].counters().drops().map(|(_, n)| n).sum();
    let stranger = initiation([0x77; 32]);
    let key = SharedKey::new(&disco_key(900), &disco_key(1).public());
    let mut disco = Vec::new();
    let ping = Message::Ping { tx: [1; 12], node_key: None };
    key.seal(&disco_key(900).public(), [1; 24], &ping, &mut disco);
    let (mut answers, mut arrived) = (0, 0);
    for n in 0..PER_SECOND {
        let mut payload = match n % 4 {
            0 => stranger.clone(),
            1 => disco.clone(),
            2 => vec![0x5a; 300],
            _ => [&[4, 0, 0, 0], &n.to_le_bytes()[..], &[7; 60]].concat(),
        };
        // From a node that the netmap does not have, and from one that it has.
        let source = node_key(if n / 4 % 2 == 0 { 900 } else { 3 }).public();
        let mut out = Outbox::default();
        let event = DerpEvent::Packet { source, payload: &mut payload };
        pair.nodes[0].handle_derp(REGION, event, pair.now, &mut out);
        answers += out.derp.len() + out.udp.len();
        pair.now += Duration::from_secs(1) / PER_SECOND;
        if n % (PER_SECOND / 10) == 0 {
            pair.tick();
            arrived += u32::from(pair.send());
        }
    }
    assert!(arrived >= 9, "{arrived} of 10 packets of the peer");
    let after: u64 = pair.nodes[0].counters().drops().map(|(_, n)| n).sum();
    assert_eq!(after - before, u64::from(PER_SECOND), "each is counted");
    assert!(drops(&pair.nodes[0], DropReason::BadCrypto) <= 80, "twenty at once and twenty in the second");
    assert!(answers < 400, "{answers} datagrams, cookies among them");
}
