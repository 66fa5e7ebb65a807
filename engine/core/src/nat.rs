//! Another address for this node in one peer's eyes.
//!
//! A peer may know this node by an address that is not its own (`SelfNodeV4MasqAddrForThisPeer`): packets
//! to that peer get it as their source, packets from it for that address get ours as their destination.
//! Checksums follow by difference (RFC 1624), so a wrong one stays wrong. ICMP errors carry the packet they
//! are about: its address is changed with the outer one, or nobody could tell what the error is for.

use std::net::IpAddr;

use crate::packet::{Fragment, Parsed, protocol};

/// Which address of a packet changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

const DCCP: u8 = 33;
const UDP_LITE: u8 = 136;
const IPV6_FRAGMENT: u8 = 44;
/// Before the packet that an ICMP error carries.
const ICMP_HEADER: usize = 8;

/// What a checksum has to learn of, as the ones' complement sum of new words and complements of old ones.
#[derive(Debug, Clone, Copy, Default)]
struct Change(u64);

impl Change {
    /// `old` became `new`; both of the same even length, at an even place of what is summed.
    fn note(&mut self, old: &[u8], new: &[u8]) {
        let word = |pair: &[u8]| u64::from(u16::from_be_bytes([pair[0], pair[1]]));
        self.0 += old.chunks_exact(2).map(|pair| 0xffff - word(pair)).sum::<u64>();
        self.0 += new.chunks_exact(2).map(word).sum::<u64>();
    }

    fn applied(self, checksum: [u8; 2]) -> [u8; 2] {
        let mut sum = u64::from(!u16::from_be_bytes(checksum)) + self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (!u16::try_from(sum).unwrap_or_default()).to_be_bytes()
    }

    /// Brings the checksum at `at` up to date. Gives what it was and is, unless it lies beyond the end.
    fn apply(self, packet: &mut [u8], at: usize, is_udp: bool) -> Option<([u8; 2], [u8; 2])> {
        let field: &mut [u8; 2] = packet.get_mut(at..at + 2)?.try_into().ok()?;
        let old = *field;
        if is_udp && old == [0, 0] {
            // None was made.
            return None;
        }
        *field = self.applied(old);
        if is_udp && *field == [0, 0] {
            *field = [0xff, 0xff];
        }
        Some((old, *field))
    }
}

/// Where in a transport header the checksum is that covers the IP addresses, and whether zero means none.
fn covered(protocol: u8, v6: bool) -> Option<(usize, bool)> {
    match protocol {
        protocol::TCP => Some((16, false)),
        protocol::UDP => Some((6, true)),
        DCCP | UDP_LITE => Some((6, false)),
        protocol::ICMPV6 if v6 => Some((2, false)),
        _ => None,
    }
}

/// The place of an address in an IP header.
fn place(v6: bool, side: Side) -> std::ops::Range<usize> {
    match (v6, side) {
        (false, Side::Source) => 12..16,
        (false, Side::Destination) => 16..20,
        (true, Side::Source) => 8..24,
        (true, Side::Destination) => 24..40,
    }
}

/// Puts `new` in the place of one address of `packet`, which `parsed` describes and which is of the same
/// family.
pub(crate) fn rewrite(packet: &mut [u8], parsed: &mut Parsed, side: Side, new: IpAddr) {
    let old = if side == Side::Source { parsed.src } else { parsed.dst };
    let (Some(packet), true) = (packet.get_mut(..parsed.length), old.is_ipv4() == new.is_ipv4()) else {
        return;
    };
    let v6 = old.is_ipv6();
    let (mut old_octets, mut new_octets) = ([0; 16], [0; 16]);
    let (old_octets, new_octets) = (octets(old, &mut old_octets), octets(new, &mut new_octets));
    let mut change = Change::default();
    change.note(old_octets, new_octets);
    packet[place(v6, side)].copy_from_slice(new_octets);
    if !v6 {
        change.apply(packet, 10, false);
    }
    match side {
        Side::Source => parsed.src = new,
        Side::Destination => parsed.dst = new,
    }
    if parsed.fragment == Fragment::Later {
        return;
    }
    if parsed.is_icmp_error() {
        let carried = packet.get_mut(parsed.transport + ICMP_HEADER..).unwrap_or_default();
        // What went out with this node's address comes back as the source of the packet carried.
        let inner = if side == Side::Source { Side::Destination } else { Side::Source };
        let mut outer = if v6 { change } else { Change::default() };
        rewrite_carried(carried, v6, inner, old_octets, new_octets, &mut outer);
        outer.apply(packet, parsed.transport + 2, false);
    } else if let Some((at, is_udp)) = covered(parsed.protocol, v6) {
        change.apply(packet, parsed.transport + at, is_udp);
    }
}

/// The same for the beginning of a packet that an ICMP error carries; `outer` learns what changed.
fn rewrite_carried(packet: &mut [u8], v6: bool, side: Side, old: &[u8], new: &[u8], outer: &mut Change) {
    let header = if v6 { 40 } else { 20 };
    if packet.len() < header || packet[0] >> 4 != if v6 { 6 } else { 4 } || packet[place(v6, side)] != *old {
        return;
    }
    packet[place(v6, side)].copy_from_slice(new);
    let mut change = Change::default();
    change.note(old, new);
    outer.note(old, new);
    let mut note = |was: Option<([u8; 2], [u8; 2])>| {
        if let Some((old, new)) = was {
            outer.note(&old, &new);
        }
    };
    let (protocol, transport) = if v6 {
        match packet[6] {
            IPV6_FRAGMENT => match packet.get(40..44) {
                Some(fragment) if fragment[2] == 0 && fragment[3] & 0xf8 == 0 => (fragment[0], 48),
                _ => return,
            },
            protocol => (protocol, 40),
        }
    } else {
        note(change.apply(packet, 10, false));
        if u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff != 0 {
            return;
        }
        (packet[9], usize::from(packet[0] & 0x0f) * 4)
    };
    if transport >= header
        && let Some((at, is_udp)) = covered(protocol, v6)
    {
        note(change.apply(packet, transport + at, is_udp));
    }
}

fn octets(ip: IpAddr, buf: &mut [u8; 16]) -> &[u8] {
    match ip {
        IpAddr::V4(ip) => {
            buf[..4].copy_from_slice(&ip.octets());
            &buf[..4]
        }
        IpAddr::V6(ip) => {
            *buf = ip.octets();
            buf
        }
    }
}

#[cfg(test)]
mod tests;
