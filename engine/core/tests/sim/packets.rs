//! What pods send.

use std::net::Ipv4Addr;

pub(crate) fn udp_packet(src: Ipv4Addr, dst: Ipv4Addr, sport: u16, dport: u16, seq: u64) -> Vec<u8> {
    let mut p = vec![0x45, 0, 0, 36, 0, 0, 0, 0, 64, 17, 0, 0];
    p.extend_from_slice(&src.octets());
    p.extend_from_slice(&dst.octets());
    p.extend_from_slice(&sport.to_be_bytes());
    p.extend_from_slice(&dport.to_be_bytes());
    p.extend_from_slice(&[0, 16, 0, 0]);
    p.extend_from_slice(&seq.to_be_bytes());
    p
}

/// An ICMPv6 echo reply with a number in its last byte.
pub(crate) fn v6_packet(src: usize, dst: usize, seq: u8) -> Vec<u8> {
    let address = |n: usize| {
        std::net::Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, u16::try_from(n + 1).expect("few"))
    };
    let mut p = vec![0x60, 0, 0, 0, 0, 8, 58, 64];
    p.extend_from_slice(&address(src).octets());
    p.extend_from_slice(&address(dst).octets());
    p.extend_from_slice(&[129, 0, 0, 0, 0, 0, 0, seq]);
    p
}
