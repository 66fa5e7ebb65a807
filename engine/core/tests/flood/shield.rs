//! Floods with the shield up: this file plays the shell and the kernel.

use std::net::SocketAddr;
use std::time::Duration;

use podtether_core::batch::{Batch, Outbox};
use podtether_core::disco::{Message, SharedKey};
use podtether_core::engine::{Class, DropReason, Event, Shield};

use crate::pair::*;

/// The kernel of node 1.
struct Kernel {
    filter: Option<Shield>,
    dropped: u64,
    random: u64,
    raised: u32,
}

impl Kernel {
    fn new() -> Self {
        Self { filter: None, dropped: 0, random: 0x9e37_79b9_7f4a_7c15, raised: 0 }
    }

    fn takes(&mut self, from: SocketAddr, datagram: &[u8]) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let dice = f64::from(u32::try_from(self.random >> 32).expect("32 bits")) / f64::from(u32::MAX);
        let passes = self.filter.as_ref().is_none_or(|shield| shield.passes(from, datagram, dice));
        self.dropped += u64::from(!passes);
        passes
    }

    /// What the shell of node 1 does when its core has something due.
    fn serve(&mut self, pair: &mut Pair) {
        let mut out = Outbox::default();
        pair.nodes[0].handle_timeout(pair.now, &mut out);
        pair.settle(0, &mut out);
        while let Some(event) = pair.nodes[0].poll_event() {
            if event == Event::CountShielded {
                pair.nodes[0].handle_shielded(std::mem::take(&mut self.dropped), pair.now);
            } else if event == Event::ShieldChanged {
                self.raised += u32::from(self.filter.is_none());
                self.filter = pair.nodes[0].shield().cloned();
            }
        }
    }

    /// As [`Pair::flood`]; also how many datagrams got through.
    fn flood(
        &mut self,
        pair: &mut Pair,
        seconds: u32,
        mut garbage: impl FnMut(u32) -> (SocketAddr, Vec<u8>),
    ) -> (u32, u64) {
        let (mut arrived, mut passed, turns) = (0, 0, seconds * PER_SECOND / AT_ONCE);
        let mut batch = Batch::new();
        for turn in 0..turns {
            batch.clear();
            for n in turn * AT_ONCE..(turn + 1) * AT_ONCE {
                let (from, datagram) = garbage(n);
                if self.takes(from, &datagram) {
                    assert!(batch.push(from, &datagram));
                }
            }
            passed += u64::try_from(batch.len()).expect("small");
            let mut out = Outbox::default();
            pair.nodes[0].handle_udp(&mut batch, pair.now, &mut out);
            pair.settle(0, &mut out);
            pair.now += Duration::from_secs(1) * AT_ONCE / PER_SECOND;
            self.serve(pair);
            pair.tick();
            if turn % (PER_SECOND / AT_ONCE / 10) == 0 {
                arrived += u32::from(pair.send());
            }
        }
        (arrived, passed)
    }

    /// `seconds` without a flood.
    fn rest(&mut self, pair: &mut Pair, seconds: u32) {
        for _ in 0..seconds * 20 {
            pair.now += Duration::from_millis(50);
            self.serve(pair);
            pair.tick();
        }
    }
}

fn all_drops(pair: &Pair) -> u64 {
    pair.nodes[0].counters().drops().map(|(_, n)| n).sum()
}

fn noise(n: u32) -> Vec<u8> {
    let mut datagram: Vec<u8> = (0..60_u32).map(|i| n.wrapping_mul(i + 77).to_be_bytes()[1]).collect();
    match n % 3 {
        0 => datagram[..4].copy_from_slice(&[4, 0, 0, 0]),
        1 => datagram[..8].copy_from_slice(&[1, 1, 0, 40, 0x21, 0x12, 0xa4, 0x42]),
        _ => {}
    }
    datagram
}

/// A pair whose nodes ping each other, so that each is known by its address.
fn acquainted(peers: u16) -> Pair {
    let mut pair = Pair::new(peers);
    for _ in 0..40 {
        pair.now += Duration::from_millis(50);
        pair.tick();
        pair.send();
    }
    assert!(pair.send(), "a session");
    pair
}

#[test]
fn noise_stays_outside_is_counted_and_the_shield_goes_with_the_flood() {
    let mut pair = acquainted(10);
    let mut kernel = Kernel::new();
    let before = all_drops(&pair);
    let (arrived, passed) = kernel.flood(&mut pair, 3, |n| (source(n), noise(n)));
    assert!(arrived >= 29, "{arrived} of 30 packets of the peer");
    // Before it is up, one in 256 of what claims to be of a session, and nothing else.
    assert!((1000..4000).contains(&passed), "{passed}");
    assert!(kernel.filter.is_some());
    kernel.rest(&mut pair, 4);
    assert!(kernel.filter.is_some(), "it may be a pause");
    kernel.rest(&mut pair, 3);
    assert!(kernel.filter.is_none() && kernel.raised == 1);
    assert!(pair.nodes[0].shield().is_none());
    assert_eq!(all_drops(&pair) - before, u64::from(3 * PER_SECOND), "each is counted");
    assert!(drops(&pair.nodes[0], DropReason::Shielded) > u64::from(3 * PER_SECOND) * 9 / 10);
    // In peace nothing is hidden.
    let seen = drops(&pair.nodes[0], DropReason::UnknownDatagram);
    let mut batch = Batch::new();
    for n in 0..30 {
        batch.push(source(n), &[9; 100]);
    }
    pair.nodes[0].handle_udp(&mut batch, pair.now, &mut Outbox::default());
    assert_eq!(drops(&pair.nodes[0], DropReason::UnknownDatagram) - seen, 30);
}

#[test]
fn a_little_garbage_raises_no_shield() {
    let mut pair = acquainted(10);
    let mut kernel = Kernel::new();
    let quiet = |n: u32| if n.is_multiple_of(50) { noise(n / 50) } else { Vec::new() };
    let mut sent = 0;
    for n in 0..40_000 {
        let datagram = quiet(n);
        if !datagram.is_empty() {
            let mut batch = Batch::new();
            batch.push(source(n), &datagram);
            pair.nodes[0].handle_udp(&mut batch, pair.now, &mut Outbox::default());
            sent += 1;
        }
        pair.now += Duration::from_micros(10);
        kernel.serve(&mut pair);
    }
    // 2000 a second.
    assert!(sent == 800 && kernel.raised == 0 && pair.nodes[0].shield().is_none());
}

#[test]
fn each_kind_of_first_message_is_sampled_by_itself() {
    let mut pair = acquainted(10);
    let mut kernel = Kernel::new();
    let message = initiation([0x77; 32]);
    let (arrived, passed) = kernel.flood(&mut pair, 4, |n| (source(n), message.clone()));
    assert!(arrived >= 39, "{arrived} of 40 packets of the peer");
    assert!((2000..8000).contains(&passed), "{passed} in 4 s");
    let shares = kernel.filter.as_ref().expect("up").shares;
    assert!(shares[Class::Initiation as usize] < 0.03, "{shares:?}");
    for other in [Class::ProvenInitiation, Class::Session, Class::Disco, Class::KnownDisco, Class::Stun] {
        assert!(shares[other as usize] >= 1.0, "{other:?}: {shares:?}");
    }
    // A claim of proof costs nothing, and gains no more.
    let mut proven = message.clone();
    proven[132..].fill(9);
    let (arrived, passed) = kernel.flood(&mut pair, 4, |n| (source(n), proven.clone()));
    assert!(arrived >= 39 && (2000..8000).contains(&passed), "{arrived} {passed}");
    let shares = kernel.filter.as_ref().expect("up").shares;
    assert!(shares[Class::Initiation as usize] >= 1.0, "it has stopped: {shares:?}");
}

#[test]
fn a_known_peers_disco_passes_a_flood_of_disco() {
    let mut pair = acquainted(500);
    let mut kernel = Kernel::new();
    let ping = |n: u16, tx| {
        let mut packet = Vec::new();
        let key = SharedKey::new(&disco_key(n), &disco_key(1).public());
        let message = Message::Ping { tx: [tx; 12], node_key: Some(node_key(n).public()) };
        key.seal(&disco_key(n).public(), [tx; 24], &message, &mut packet);
        packet
    };
    let forged: Vec<Vec<u8>> = (3..400)
        .map(|n| {
            let mut packet = ping(n, 1);
            *packet.last_mut().expect("not empty") ^= 1;
            packet
        })
        .collect();
    let which = |n: u32| forged[usize::try_from(n).expect("small") % forged.len()].clone();
    let (arrived, passed) = kernel.flood(&mut pair, 3, |n| (source(n), which(n)));
    assert!(arrived >= 29 && passed < 7000, "{arrived} {passed}");
    // From an address where it was never seen.
    assert!(kernel.takes(source(5), &ping(2, 9)));
    // One that nobody here has talked to yet needs some tries, or its relay.
    let strangers = (0..2000).filter(|_| kernel.takes(source(6), &ping(450, 9))).count();
    assert!((1..200).contains(&strangers), "{strangers}");
}

#[test]
fn who_knows_the_mark_or_a_known_address_does_not_get_much_further() {
    let mut pair = acquainted(10);
    let mut kernel = Kernel::new();
    kernel.flood(&mut pair, 1, |n| (source(n), noise(n)));
    let mark = kernel.filter.as_ref().expect("up").mark;
    let marked = |n: u32| {
        let mut datagram = vec![0x33; 80];
        datagram[..4].copy_from_slice(&[4, 0, 0, 0]);
        datagram[4..8].copy_from_slice(&n.to_be_bytes());
        datagram[7] = mark;
        datagram
    };
    let (arrived, passed) = kernel.flood(&mut pair, 4, |n| (source(n), marked(n)));
    assert!(arrived >= 38, "{arrived} of 40 packets of the peer, whose address is known");
    assert!(passed < 30_000, "{passed} of 400000");

    // From the peer's own address it is all the same: the session's number is the peer's alone.
    let (arrived, passed) = kernel.flood(&mut pair, 4, |n| (endpoint(2), marked(n)));
    assert!(arrived >= 38 && passed < 30_000, "{arrived} {passed}");
    // Initiations in its name leave its sessions alone.
    let message = initiation([0x77; 32]);
    let (arrived, passed) = kernel.flood(&mut pair, 4, |_| (endpoint(2), message.clone()));
    assert!(arrived >= 38 && passed < 30_000, "{arrived} {passed}");
}
