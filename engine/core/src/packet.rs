//! Reads the headers of one IP packet as far as the filter and the peer lookup need them.
//!
//! A packet that could smuggle a transport header past the filter is an error, not a guess: a first
//! fragment too short for its transport header, a later fragment that starts where such a header could
//! still lie, and every IPv6 extension header but Fragment. What parses has its ports in view, or is a
//! later fragment, which no receiver can use without the first one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IP protocol numbers that have rules of their own.
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMPV4: u8 = 1;
    /// Transmission Control Protocol.
    pub const TCP: u8 = 6;
    /// User Datagram Protocol.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// Tailnet nodes' own messages about rejected flows.
    pub const TSMP: u8 = 99;
    /// Stream Control Transmission Protocol.
    pub const SCTP: u8 = 132;
}

/// TCP flag bits.
pub mod tcp_flag {
    /// Synchronize.
    pub const SYN: u8 = 0x02;
    /// Acknowledgement is valid.
    pub const ACK: u8 = 0x10;
}

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const IPV6_FRAGMENT_HEADER: usize = 8;
const IPV6_FRAGMENT: u8 = 44;
const ICMP_HEADER: usize = 8;
const ICMP_RESERVED: u8 = 255;
const HOP_BY_HOP: u8 = 0;
const RESERVED: u8 = 255;
/// The largest IPv4 header plus a TCP header, in the 8-byte blocks fragment offsets count: a later
/// fragment that starts below could overwrite a transport header that was already checked.
const MIN_LATER_OFFSET: u16 = (60 + 20) / 8;

/// What the filter and the routing of one packet need to know about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parsed {
    /// Source address.
    pub src: IpAddr,
    /// Destination address, of the same family as `src`.
    pub dst: IpAddr,
    /// Transport protocol; see [`protocol`].
    pub protocol: u8,
    /// Source port of TCP, UDP and SCTP, else 0.
    pub src_port: u16,
    /// Destination port of TCP, UDP and SCTP, else 0.
    pub dst_port: u16,
    /// TCP flags, 0 for anything else; see [`tcp_flag`].
    pub tcp_flags: u8,
    /// ICMP type, 0 for anything else, 255 (reserved) for ICMP that is shorter than its own header.
    pub icmp_type: u8,
    /// ICMP code, 0 for anything else.
    pub icmp_code: u8,
    /// Whether the transport header is here.
    pub fragment: Fragment,
    /// Where the transport header (or the later fragment's data) starts.
    pub transport: usize,
    /// Length of the packet as its header says; bytes after it are padding.
    pub length: usize,
}

/// A packet's place in a fragmented datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    /// Not fragmented.
    Whole,
    /// Offset 0 with more to come; holds the whole transport header.
    First,
    /// No transport header: ports, flags and types are 0.
    Later,
}

/// Why a packet cannot be judged, and so must be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Neither version 4 nor 6.
    #[error("not an IP packet")]
    NotIp,
    /// A length field contradicts the bytes at hand.
    #[error("packet is shorter than its headers say")]
    Truncated,
    /// The transport header is not complete, or a fragment could overwrite it.
    #[error("fragment hides its transport header")]
    Fragment,
    /// An IPv6 extension header other than one Fragment header.
    #[error("IPv6 extension header")]
    ExtensionHeader,
    /// Protocol 0 in IPv4, or 255.
    #[error("reserved protocol number")]
    Protocol,
}

impl Parsed {
    /// Reads the headers of `packet`, which may have padding after the IP packet.
    ///
    /// # Errors
    /// When the packet must be dropped unseen; see [`ParseError`].
    pub fn parse(packet: &[u8]) -> Result<Self, ParseError> {
        match packet.first().map(|b| b >> 4) {
            Some(4) => Self::parse_v4(packet),
            Some(6) => Self::parse_v6(packet),
            _ => Err(ParseError::NotIp),
        }
    }

    /// True for a TCP segment that opens a connection.
    #[must_use]
    pub fn is_tcp_syn(&self) -> bool {
        self.protocol == protocol::TCP && self.tcp_flags & (tcp_flag::SYN | tcp_flag::ACK) == tcp_flag::SYN
    }

    /// True for ICMP of the packet's own family.
    #[must_use]
    pub fn is_icmp(&self) -> bool {
        self.protocol == if self.src.is_ipv4() { protocol::ICMPV4 } else { protocol::ICMPV6 }
    }

    /// True for the answer to a ping.
    #[must_use]
    pub fn is_echo_reply(&self) -> bool {
        self.has_icmp_header()
            && self.icmp_code == 0
            && self.icmp_type == if self.src.is_ipv4() { 0 } else { 129 }
    }

    /// True for ICMP's word that another packet did not arrive: unreachable, too big, time exceeded,
    /// parameter problem.
    #[must_use]
    pub fn is_icmp_error(&self) -> bool {
        self.has_icmp_header()
            && if self.src.is_ipv4() {
                matches!(self.icmp_type, 3 | 11 | 12)
            } else {
                matches!(self.icmp_type, 1..=4)
            }
    }

    fn has_icmp_header(&self) -> bool {
        self.is_icmp() && self.fragment != Fragment::Later
    }

    fn parse_v4(packet: &[u8]) -> Result<Self, ParseError> {
        let header: &[u8; IPV4_HEADER] = packet.first_chunk().ok_or(ParseError::Truncated)?;
        let transport = usize::from(header[0] & 0x0f) * 4;
        let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if transport < IPV4_HEADER || length < transport || packet.len() < length {
            return Err(ParseError::Truncated);
        }
        let fragment = u16::from_be_bytes([header[6], header[7]]);
        let parsed = Self {
            src: Ipv4Addr::new(header[12], header[13], header[14], header[15]).into(),
            dst: Ipv4Addr::new(header[16], header[17], header[18], header[19]).into(),
            protocol: header[9],
            src_port: 0,
            dst_port: 0,
            tcp_flags: 0,
            icmp_type: 0,
            icmp_code: 0,
            fragment: fragment_place(fragment & 0x1fff, fragment & 0x2000 != 0)?,
            transport,
            length,
        };
        if matches!(parsed.protocol, HOP_BY_HOP | RESERVED) {
            return Err(ParseError::Protocol);
        }
        parsed.with_transport(&packet[transport..length])
    }

    fn parse_v6(packet: &[u8]) -> Result<Self, ParseError> {
        let header: &[u8; IPV6_HEADER] = packet.first_chunk().ok_or(ParseError::Truncated)?;
        let length = IPV6_HEADER + usize::from(u16::from_be_bytes([header[4], header[5]]));
        if packet.len() < length {
            return Err(ParseError::Truncated);
        }
        let mut src = [0; 16];
        src.copy_from_slice(&header[8..24]);
        let mut dst = [0; 16];
        dst.copy_from_slice(&header[24..40]);
        let mut parsed = Self {
            src: Ipv6Addr::from(src).into(),
            dst: Ipv6Addr::from(dst).into(),
            protocol: header[6],
            src_port: 0,
            dst_port: 0,
            tcp_flags: 0,
            icmp_type: 0,
            icmp_code: 0,
            fragment: Fragment::Whole,
            transport: IPV6_HEADER,
            length,
        };
        if parsed.protocol == IPV6_FRAGMENT {
            let extension: &[u8; IPV6_FRAGMENT_HEADER] =
                packet[IPV6_HEADER..length].first_chunk().ok_or(ParseError::Fragment)?;
            let fragment = u16::from_be_bytes([extension[2], extension[3]]);
            parsed.protocol = extension[0];
            parsed.fragment = fragment_place(fragment >> 3, fragment & 1 != 0)?;
            parsed.transport += IPV6_FRAGMENT_HEADER;
        }
        // A later fragment repeats the first header of the fragmentable part, so the chain rule holds
        // for it as well.
        match parsed.protocol {
            // Hop-by-hop, routing, fragment (again), AH, destination options, mobility, HIP, shim6.
            HOP_BY_HOP | 43 | IPV6_FRAGMENT | 51 | 60 | 135 | 139 | 140 => {
                return Err(ParseError::ExtensionHeader);
            }
            RESERVED => return Err(ParseError::Protocol),
            _ => {}
        }
        parsed.with_transport(&packet[parsed.transport..length])
    }

    /// Reads ports, flags and types where the transport header is here.
    fn with_transport(mut self, header: &[u8]) -> Result<Self, ParseError> {
        if self.fragment == Fragment::Later {
            return Ok(self);
        }
        let needed = match self.protocol {
            protocol::TCP => 20,
            protocol::UDP => 8,
            protocol::SCTP => 12,
            protocol::ICMPV4 | protocol::ICMPV6 => 4,
            // Nothing this small is ever fragmented by an honest sender.
            protocol::TSMP if self.fragment == Fragment::Whole => 7,
            protocol::TSMP => return Err(ParseError::Fragment),
            _ => return Ok(self),
        };
        if header.len() < needed {
            return Err(match self.fragment {
                Fragment::Whole => ParseError::Truncated,
                Fragment::First | Fragment::Later => ParseError::Fragment,
            });
        }
        match self.protocol {
            protocol::TCP | protocol::UDP | protocol::SCTP => {
                self.src_port = u16::from_be_bytes([header[0], header[1]]);
                self.dst_port = u16::from_be_bytes([header[2], header[3]]);
                if self.protocol == protocol::TCP {
                    self.tcp_flags = header[13];
                }
            }
            protocol::ICMPV4 | protocol::ICMPV6 => {
                self.icmp_type = if header.len() < ICMP_HEADER { ICMP_RESERVED } else { header[0] };
                self.icmp_code = header[1];
            }
            _ => {}
        }
        Ok(self)
    }
}

fn fragment_place(offset: u16, more: bool) -> Result<Fragment, ParseError> {
    match (offset, more) {
        (0, false) => Ok(Fragment::Whole),
        (0, true) => Ok(Fragment::First),
        (1..MIN_LATER_OFFSET, _) => Err(ParseError::Fragment),
        _ => Ok(Fragment::Later),
    }
}

#[cfg(test)]
pub(crate) mod build {
    //! Packets for tests.

    use std::net::IpAddr;

    /// An IP packet with `payload` as its transport part, of the family of `src`.
    pub(crate) fn ip(src: &str, dst: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
        match (src.parse().unwrap(), dst.parse().unwrap()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut p = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
                p.extend(src.octets());
                p.extend(dst.octets());
                p.extend(payload);
                let length = u16::try_from(p.len()).unwrap().to_be_bytes();
                p[2..4].copy_from_slice(&length);
                p
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let mut p = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
                p[4..6].copy_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
                p.extend(src.octets());
                p.extend(dst.octets());
                p.extend(payload);
                p
            }
            _ => panic!("mixed families"),
        }
    }

    /// A transport header with ports, long enough for TCP.
    pub(crate) fn ports(src: u16, dst: u16, tcp_flags: u8) -> Vec<u8> {
        let mut h = vec![0; 20];
        h[0..2].copy_from_slice(&src.to_be_bytes());
        h[2..4].copy_from_slice(&dst.to_be_bytes());
        h[12] = 0x50;
        h[13] = tcp_flags;
        h
    }

    /// Sets the fragment field of an IPv4 packet; `offset` in 8-byte blocks.
    pub(crate) fn fragment4(mut packet: Vec<u8>, offset: u16, more: bool) -> Vec<u8> {
        packet[6..8].copy_from_slice(&(offset | if more { 0x2000 } else { 0 }).to_be_bytes());
        packet
    }

    /// An IPv6 Fragment header before `payload`; `offset` in 8-byte blocks.
    pub(crate) fn fragment6(protocol: u8, offset: u16, more: bool, payload: &[u8]) -> Vec<u8> {
        let mut h = vec![protocol, 0, 0, 0, 0, 0, 0, 7];
        h[2..4].copy_from_slice(&(offset << 3 | u16::from(more)).to_be_bytes());
        h.extend(payload);
        h
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::build::{fragment4, fragment6, ip, ports};
    use super::*;

    const A4: &str = "100.64.0.1";
    const B4: &str = "100.64.0.2";
    const A6: &str = "fd7a:115c:a1e0::1";
    const B6: &str = "fd7a:115c:a1e0::2";

    #[test]
    fn ports_flags_and_types_are_read_in_both_families() {
        for (a, b, header) in [(A4, B4, 20), (A6, B6, 40)] {
            for p in [protocol::TCP, protocol::UDP, protocol::SCTP] {
                let parsed = Parsed::parse(&ip(a, b, p, &ports(1000, 443, tcp_flag::SYN))).unwrap();
                assert_eq!((parsed.src.to_string(), parsed.dst.to_string()), (a.into(), b.into()));
                assert_eq!((parsed.protocol, parsed.src_port, parsed.dst_port), (p, 1000, 443));
                assert_eq!(parsed.is_tcp_syn(), p == protocol::TCP);
                assert_eq!((parsed.transport, parsed.length), (header, header + 20));
                assert_eq!(parsed.fragment, Fragment::Whole);
            }
        }
        let syn_ack = ports(443, 1000, tcp_flag::SYN | tcp_flag::ACK);
        assert!(!Parsed::parse(&ip(A4, B4, protocol::TCP, &syn_ack)).unwrap().is_tcp_syn());
    }

    #[test]
    fn icmp_kinds() {
        // (source, destination, protocol, type, is echo reply, is error)
        let table = [
            (A4, B4, 1, 0, true, false),
            (A4, B4, 1, 8, false, false),
            (A4, B4, 1, 3, false, true),
            (A4, B4, 1, 11, false, true),
            (A4, B4, 1, 12, false, true),
            (A4, B4, 1, 5, false, false),
            (A4, B4, 58, 129, false, false),
            (A6, B6, 58, 129, true, false),
            (A6, B6, 58, 128, false, false),
            (A6, B6, 58, 1, false, true),
            (A6, B6, 58, 2, false, true),
            (A6, B6, 58, 3, false, true),
            (A6, B6, 58, 4, false, true),
            (A6, B6, 58, 135, false, false),
            (A6, B6, 1, 0, false, false),
            (A6, B6, 1, 3, false, false),
        ];
        for (a, b, proto, kind, reply, error) in table {
            let parsed = Parsed::parse(&ip(a, b, proto, &[kind, 0, 0, 0, 0, 0, 0, 0])).unwrap();
            assert_eq!(
                (parsed.is_echo_reply(), parsed.is_icmp_error()),
                (reply, error),
                "{a} {proto} {kind}"
            );
        }
        let later = fragment4(ip(A4, B4, 1, &[0; 8]), 100, false);
        assert!(!Parsed::parse(&later).unwrap().is_echo_reply(), "a later fragment has no ICMP header");
    }

    #[test]
    fn padding_is_not_part_of_the_packet() {
        let mut p = ip(A4, B4, protocol::UDP, &ports(1, 2, 0)[..8]);
        p.extend([0; 12]);
        assert_eq!(Parsed::parse(&p).unwrap().length, 28);
        // The bytes of a transport header must come from inside the packet.
        let mut short = ip(A4, B4, protocol::TCP, &[0; 10]);
        short.extend([0; 12]);
        assert_eq!(Parsed::parse(&short), Err(ParseError::Truncated));
    }

    #[test]
    fn every_cut_of_a_packet_is_refused() {
        for p in [ip(A4, B4, 6, &ports(1, 2, 0)), ip(A6, B6, 6, &ports(1, 2, 0))] {
            for cut in 1..p.len() {
                assert_eq!(Parsed::parse(&p[..cut]), Err(ParseError::Truncated), "cut at {cut}");
            }
        }
        assert_eq!(Parsed::parse(&[]), Err(ParseError::NotIp));
        assert_eq!(Parsed::parse(&[0x50; 60]), Err(ParseError::NotIp));
    }

    #[test]
    fn header_lengths_that_lie_are_refused() {
        let mut p = ip(A4, B4, 17, &[0; 8]);
        p[0] = 0x44;
        assert_eq!(Parsed::parse(&p), Err(ParseError::Truncated), "header below 20 bytes");
        p[0] = 0x4f;
        assert_eq!(Parsed::parse(&p), Err(ParseError::Truncated), "header beyond the packet");
        let mut options = ip(A4, B4, 17, &[1, 1, 1, 1, 0, 5, 0, 6, 0, 8, 0, 0]);
        options[0] = 0x46;
        assert_eq!(Parsed::parse(&options).unwrap().dst_port, 6, "options are stepped over");
    }

    #[test]
    fn fragments_of_ipv4() {
        let tcp = ip(A4, B4, protocol::TCP, &ports(7, 8, tcp_flag::SYN));
        let first = Parsed::parse(&fragment4(tcp.clone(), 0, true)).unwrap();
        assert_eq!((first.fragment, first.dst_port), (Fragment::First, 8));
        for offset in 1..10 {
            for more in [false, true] {
                let p = fragment4(tcp.clone(), offset, more);
                assert_eq!(Parsed::parse(&p), Err(ParseError::Fragment), "offset {offset}");
            }
        }
        for offset in [10, 100, 0x1fff] {
            let later = Parsed::parse(&fragment4(tcp.clone(), offset, false)).unwrap();
            assert_eq!((later.fragment, later.dst_port, later.tcp_flags), (Fragment::Later, 0, 0));
        }
        for (proto, needed) in [(6, 20), (17, 8), (132, 12), (1, 4)] {
            let p = fragment4(ip(A4, B4, proto, &vec![0; needed - 1]), 0, true);
            assert_eq!(Parsed::parse(&p), Err(ParseError::Fragment), "protocol {proto}");
            let p = fragment4(ip(A4, B4, proto, &vec![0; needed]), 0, true);
            assert!(Parsed::parse(&p).is_ok(), "protocol {proto}");
        }
        let tsmp = ip(A4, B4, protocol::TSMP, &[0; 16]);
        assert!(Parsed::parse(&tsmp).is_ok());
        assert_eq!(Parsed::parse(&fragment4(tsmp, 0, true)), Err(ParseError::Fragment));
        // Don't-fragment is not a fragment.
        let mut df = tcp;
        df[6] = 0x40;
        assert_eq!(Parsed::parse(&df).unwrap().fragment, Fragment::Whole);
    }

    #[test]
    fn fragments_of_ipv6() {
        let v6 = |offset, more, payload: &[u8]| ip(A6, B6, 44, &fragment6(6, offset, more, payload));
        let tcp = ports(7, 8, tcp_flag::SYN);
        let first = Parsed::parse(&v6(0, true, &tcp)).unwrap();
        assert_eq!((first.fragment, first.protocol, first.dst_port), (Fragment::First, 6, 8));
        assert_eq!(first.transport, 48);
        assert_eq!(Parsed::parse(&v6(0, false, &tcp)).unwrap().fragment, Fragment::Whole, "atomic");
        assert_eq!(Parsed::parse(&v6(0, true, &tcp[..19])), Err(ParseError::Fragment));
        assert_eq!(Parsed::parse(&v6(9, true, &tcp)), Err(ParseError::Fragment));
        let later = Parsed::parse(&v6(10, true, &tcp)).unwrap();
        assert_eq!((later.fragment, later.dst_port), (Fragment::Later, 0));
        assert_eq!(Parsed::parse(&ip(A6, B6, 44, &[6; 7])), Err(ParseError::Fragment));
    }

    #[test]
    fn other_extension_headers_and_reserved_numbers_are_refused() {
        for next in [0, 43, 51, 60, 135, 139, 140] {
            assert_eq!(Parsed::parse(&ip(A6, B6, next, &[0; 40])), Err(ParseError::ExtensionHeader));
            let behind = fragment6(next, 0, true, &[0; 40]);
            assert_eq!(Parsed::parse(&ip(A6, B6, 44, &behind)), Err(ParseError::ExtensionHeader));
        }
        let twice = fragment6(44, 0, true, &fragment6(6, 0, true, &[0; 40]));
        assert_eq!(Parsed::parse(&ip(A6, B6, 44, &twice)), Err(ParseError::ExtensionHeader));
        for number in [0, 255] {
            assert_eq!(Parsed::parse(&ip(A4, B4, number, &[0; 40])), Err(ParseError::Protocol));
        }
        assert_eq!(Parsed::parse(&ip(A6, B6, 255, &[0; 40])), Err(ParseError::Protocol));
        assert_eq!(Parsed::parse(&ip(A6, B6, 50, &[0; 40])).unwrap().protocol, 50, "ESP is a protocol");
    }

    proptest! {
        #[test]
        fn fuzz_parse_stays_inside_the_packet(mut bytes in proptest::collection::vec(any::<u8>(), 0..120),
                                              version in prop_oneof![Just(4u8), Just(6), any::<u8>()],
                                              fits in any::<bool>()) {
            if let Some(first) = bytes.first_mut() {
                *first = version << 4 | 5;
            }
            if fits && bytes.len() >= 40 {
                let total = u16::try_from(bytes.len()).unwrap();
                bytes[2..4].copy_from_slice(&total.to_be_bytes());
                if version == 6 {
                    bytes[4..6].copy_from_slice(&(total - 40).to_be_bytes());
                }
            }
            if let Ok(p) = Parsed::parse(&bytes) {
                prop_assert!(p.length <= bytes.len());
                prop_assert!(p.transport <= p.length);
                prop_assert_eq!(p.src.is_ipv4(), p.dst.is_ipv4());
                prop_assert_eq!(Parsed::parse(&bytes[..p.length]), Ok(p), "padding does not matter");
                if p.fragment == Fragment::Later {
                    prop_assert_eq!((p.src_port, p.dst_port, p.tcp_flags, p.icmp_type), (0, 0, 0, 0));
                }
            }
        }
    }
}
