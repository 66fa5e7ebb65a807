//! Where the headers of a TCP or UDP packet lie.

use super::checksum::{self, Sum};
use super::segment::SegmentError;
use crate::packet::protocol;

pub(super) const IPV6_HEADER: usize = 40;
pub(super) const TCP_CHECKSUM: usize = 16;
pub(super) const UDP_CHECKSUM: usize = 6;
/// Longest IPv4 header and longest TCP header.
pub(super) const MAX_HEADERS: usize = 60 + 60;
const MIN_IPV4_HEADER: usize = 20;
const MIN_TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
/// Of the two bytes with IPv4's flags and offset: more fragments, and the offset.
const FRAGMENT: u16 = 0x3fff;

/// Kinds of packets that can be cut and put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Tcp,
    Udp,
}

/// A whole packet whose lengths agree with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Headers {
    pub(super) v6: bool,
    pub(super) kind: Transport,
    /// Where the transport header starts.
    pub(super) transport: usize,
    /// Where the payload starts.
    pub(super) payload: usize,
}

pub(super) fn word(bytes: &[u8], at: usize) -> u16 {
    match bytes.get(at..).and_then(|b| b.first_chunk()) {
        Some(b) => u16::from_be_bytes(*b),
        None => 0,
    }
}

pub(super) fn long(bytes: &[u8], at: usize) -> u32 {
    match bytes.get(at..).and_then(|b| b.first_chunk()) {
        Some(b) => u32::from_be_bytes(*b),
        None => 0,
    }
}

impl Headers {
    /// Reads a packet of at most 64 KiB.
    #[inline]
    pub(super) fn read(packet: &[u8]) -> Result<Self, SegmentError> {
        let (v6, transport, length, protocol) = match packet.first().map(|b| b >> 4) {
            Some(4) => {
                let Some(ip) = packet.first_chunk::<MIN_IPV4_HEADER>() else {
                    return Err(SegmentError::Length);
                };
                if u16::from_be_bytes([ip[6], ip[7]]) & FRAGMENT != 0 {
                    return Err(SegmentError::Fragment);
                }
                let header = usize::from(ip[0] & 15) * 4;
                if header < MIN_IPV4_HEADER {
                    return Err(SegmentError::Length);
                }
                (false, header, usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip[9])
            }
            Some(6) => {
                let Some(ip) = packet.first_chunk::<IPV6_HEADER>() else { return Err(SegmentError::Length) };
                let length = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
                (true, IPV6_HEADER, IPV6_HEADER + length, ip[6])
            }
            _ => return Err(SegmentError::NotIp),
        };
        if length != packet.len() {
            return Err(SegmentError::Length);
        }
        let Some(rest) = packet.get(transport..) else { return Err(SegmentError::Length) };
        let (kind, header) = match protocol {
            protocol::TCP => {
                let Some(tcp) = rest.first_chunk::<MIN_TCP_HEADER>() else {
                    return Err(SegmentError::Length);
                };
                (Transport::Tcp, usize::from(tcp[12] >> 4) * 4)
            }
            protocol::UDP => {
                let Some(udp) = rest.first_chunk::<UDP_HEADER>() else { return Err(SegmentError::Length) };
                if usize::from(u16::from_be_bytes([udp[4], udp[5]])) != rest.len() {
                    return Err(SegmentError::Length);
                }
                (Transport::Udp, UDP_HEADER)
            }
            _ => return Err(SegmentError::Protocol),
        };
        if (kind == Transport::Tcp && header < MIN_TCP_HEADER) || header > rest.len() {
            return Err(SegmentError::Length);
        }
        Ok(Self { v6, kind, transport, payload: transport + header })
    }

    /// Where source and destination address lie.
    pub(super) fn addresses(self) -> std::ops::Range<usize> {
        if self.v6 { 8..40 } else { 12..20 }
    }

    /// Where the transport checksum lies.
    pub(super) fn checksum_at(self) -> usize {
        self.transport
            + match self.kind {
                Transport::Tcp => TCP_CHECKSUM,
                Transport::Udp => UDP_CHECKSUM,
            }
    }

    /// The sum of the pseudo header for a packet of `length` bytes.
    #[inline]
    pub(super) fn pseudo(self, packet: &[u8], length: usize) -> Sum {
        let protocol = match self.kind {
            Transport::Tcp => protocol::TCP,
            Transport::Udp => protocol::UDP,
        };
        let length = u16::try_from(length - self.transport).unwrap_or(u16::MAX);
        checksum::pseudo(packet.get(self.addresses()).unwrap_or_default(), protocol, length)
    }

    /// Whether the transport checksum of the packet these headers were read from is right.
    #[inline]
    pub(super) fn verify(self, packet: &[u8]) -> bool {
        let rest = packet.get(self.transport..).unwrap_or_default();
        self.pseudo(packet, packet.len()).bytes(rest).holds()
    }
}
