//! Against checksums computed anew: whatever is changed, the result is the packet that had the other
//! address from the start.

use proptest::prelude::*;

use super::*;
use crate::packet::build::{fragment4, fragment6, ip};

const OURS: [&str; 2] = ["100.64.0.2", "fd7a:115c:a1e0::2"];
const PEER: [&str; 2] = ["100.64.0.1", "fd7a:115c:a1e0::1"];
const MASQ: [&str; 2] = ["100.99.255.1", "fd7a:115c:a1e0::ffff:1"];

fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

fn address(text: &str) -> Vec<u8> {
    match text.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// A transport part with its right checksum for these addresses.
fn transport(src: &str, dst: &str, protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut part = body.to_vec();
    let at = match protocol {
        6 => 16,
        17 => 6,
        1 | 58 => 2,
        _ => return part,
    };
    part[at..at + 2].copy_from_slice(&[0, 0]);
    let length = u16::try_from(part.len()).unwrap().to_be_bytes();
    let pseudo = if protocol == 1 {
        Vec::new()
    } else {
        [&address(src)[..], &address(dst), &length, &[0, protocol]].concat()
    };
    let mut checksum = sum(&[&pseudo, &part]);
    if protocol == 17 && checksum == 0 {
        checksum = 0xffff;
    }
    part[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    part
}

fn with_header_checksum(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        packet[10..12].copy_from_slice(&[0, 0]);
        let checksum = sum(&[&packet[..20]]);
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    packet
}

fn whole(src: &str, dst: &str, protocol: u8, body: &[u8]) -> Vec<u8> {
    with_header_checksum(ip(src, dst, protocol, &transport(src, dst, protocol, body)))
}

/// An ICMP error about `carried`.
fn error(src: &str, dst: &str, carried: &[u8]) -> Vec<u8> {
    let (protocol, kind) = if carried[0] >> 4 == 4 { (1, 3) } else { (58, 1) };
    let body = [&[kind, 1, 0, 0, 0, 0, 0, 0][..], carried].concat();
    whole(src, dst, protocol, &body)
}

fn rewritten(packet: &[u8], side: Side, new: &str) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let mut parsed = Parsed::parse(&packet).unwrap();
    rewrite(&mut packet, &mut parsed, side, new.parse().unwrap());
    assert_eq!(parsed, Parsed::parse(&packet).unwrap());
    packet
}

proptest! {
    #[test]
    fn fuzz_a_rewritten_packet_is_the_one_made_with_that_address(
        v6 in 0usize..2,
        kind in 0usize..4,
        mut body in proptest::collection::vec(any::<u8>(), 20..80),
        cut in 0usize..40,
    ) {
        let protocol = [6, 17, if v6 == 1 { 58 } else { 1 }, 132][kind];
        if kind == 2 {
            body[0] = if v6 == 1 { 128 } else { 8 };
        }
        let (ours, peer, masq) = (OURS[v6], PEER[v6], MASQ[v6]);
        let out = whole(ours, peer, protocol, &body);
        prop_assert_eq!(rewritten(&out, Side::Source, masq), whole(masq, peer, protocol, &body));
        let back = whole(peer, masq, protocol, &body);
        prop_assert_eq!(rewritten(&back, Side::Destination, ours), whole(peer, ours, protocol, &body));

        // The peer's error about what it got from the address it knows, and ours about what it sent there;
        // the carried packet may be cut off anywhere behind its IP header, but half a checksum is not changed.
        let cut = cut & !1;
        let ip_header = if v6 == 1 { 40 } else { 20 };
        let cut = |packet: Vec<u8>| { let n = (ip_header + cut).min(packet.len()); packet[..n].to_vec() };
        let (sent, seen) = (cut(whole(ours, peer, protocol, &body)), cut(whole(masq, peer, protocol, &body)));
        prop_assert_eq!(rewritten(&error(peer, masq, &seen), Side::Destination, ours), error(peer, ours, &sent));
        let (sent, seen) = (cut(whole(peer, ours, protocol, &body)), cut(whole(peer, masq, protocol, &body)));
        prop_assert_eq!(rewritten(&error(ours, peer, &sent), Side::Source, masq), error(masq, peer, &seen));
    }

    #[test]
    fn fuzz_any_error_keeps_its_checksum(body in proptest::collection::vec(any::<u8>(), 0..100), v6 in 0usize..2) {
        // Whatever it carries, the outer checksum is right afterwards.
        let packet = error(PEER[v6], MASQ[v6], &[&[if v6 == 1 { 0x60 } else { 0x45 }][..], &body].concat());
        let after = rewritten(&packet, Side::Destination, OURS[v6]);
        let start = if v6 == 1 { 40 } else { 20 };
        let mut again = after.clone();
        let remade = transport(PEER[v6], OURS[v6], if v6 == 1 { 58 } else { 1 }, &after[start..]);
        again[start..].copy_from_slice(&remade);
        // Ones' complement has two zeros.
        let same = |a: &[u8], b: &[u8]| a == b || (a[start + 2..start + 4] == [0xff, 0xff] && b[start + 2..start + 4] == [0, 0]);
        prop_assert!(same(&after, &again), "{after:02x?} {again:02x?}");
    }
}

#[test]
fn fragments_of_one_datagram_fit_together_again() {
    let body: Vec<u8> = (0..=255).cycle().take(200).collect();
    for v6 in 0..2 {
        let (ours, peer, masq) = (OURS[v6], PEER[v6], MASQ[v6]);
        let (from, to) = (transport(ours, peer, 17, &body), transport(masq, peer, 17, &body));
        for (part, offset, more) in [(0..96, 0, true), (96..200, 12, false)] {
            let piece = |src: &str, datagram: &[u8]| {
                if v6 == 1 {
                    ip(src, peer, 44, &fragment6(17, offset, more, &datagram[part.clone()]))
                } else {
                    with_header_checksum(fragment4(ip(src, peer, 17, &datagram[part.clone()]), offset, more))
                }
            };
            assert_eq!(rewritten(&piece(ours, &from), Side::Source, masq), piece(masq, &to));
        }
    }
}

#[test]
fn udp_without_checksum_stays_without() {
    let mut packet = with_header_checksum(ip(OURS[0], PEER[0], 17, &[0, 9, 0, 9, 0, 8, 0, 0]));
    packet = rewritten(&packet, Side::Source, MASQ[0]);
    assert_eq!(packet[26..28], [0, 0]);
    assert_eq!(packet, with_header_checksum(ip(MASQ[0], PEER[0], 17, &[0, 9, 0, 9, 0, 8, 0, 0])));
}

#[test]
fn the_other_family_changes_nothing() {
    let packet = whole(OURS[0], PEER[0], 6, &[0; 20]);
    assert_eq!(rewritten(&packet, Side::Source, MASQ[1]), packet);
}
