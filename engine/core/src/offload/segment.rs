//! One packet as the kernel hands it to a network card, cut into packets as they go on the wire.

use super::checksum::Sum;
use super::headers::{Headers, MAX_HEADERS, Transport, long, word};
use super::vnet::{Gso, VnetHeader};

/// Most segments of one packet. TCP makes 862 of 64 KiB at Linux's smallest segment size (88 bytes with
/// options); what would make more comes from somebody who wants work done.
pub const MAX_SEGMENTS: usize = 1024;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;
/// Where TCP's flags lie in its header.
const FLAGS: usize = 13;
/// A UDP checksum of zero means that there is none (RFC 768), so the other zero is sent.
const OTHER_ZERO: u16 = 0xffff;

/// Why a packet and its header do not make sense together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// Neither IPv4 nor IPv6.
    #[error("not an IP packet")]
    NotIp,
    /// A length field contradicts the bytes at hand.
    #[error("lengths in the packet contradict each other")]
    Length,
    /// A fragment of IPv4, which cannot be cut again.
    #[error("a fragment is to be cut")]
    Fragment,
    /// IPv6 extension headers, and what is neither TCP nor UDP.
    #[error("a packet is to be cut whose headers do not end in TCP or UDP")]
    Protocol,
    /// The header names another kind than the packet is.
    #[error("the packet is of another kind than its header says")]
    Kind,
    /// The checksum lies outside the packet, or not where this kind of packet has it.
    #[error("the packet's checksum is not where its header says")]
    Checksum,
    /// Pieces without payload.
    #[error("a packet is to be cut into pieces of no bytes")]
    Size,
    /// More than [`MAX_SEGMENTS`], or more than 64 KiB.
    #[error("a packet is to be cut into too many pieces")]
    TooMany,
}

/// The packets that one packet comes to, in order.
///
/// They lie in the buffer of the packet itself: each one's headers are written over the end of the one
/// before, which must have been used by then.
#[derive(Debug)]
pub struct Segments<'a> {
    packet: &'a mut [u8],
    /// `None` for a packet that goes as it is.
    cut: Option<Cut>,
    /// Payload of each segment but the last.
    size: usize,
    /// How many have been given.
    given: usize,
    count: usize,
}

/// What is the same in all segments.
#[derive(Debug)]
struct Cut {
    headers: Headers,
    /// The packet's headers, checksums zero.
    template: [u8; MAX_HEADERS],
    id: u16,
    sequence: u32,
    flags: u8,
}

impl<'a> Segments<'a> {
    /// Reads the headers of `packet`, which are believed where `header` contradicts them.
    ///
    /// # Errors
    /// [`SegmentError`] when the packet must be dropped.
    pub fn new(header: &VnetHeader, packet: &'a mut [u8]) -> Result<Self, SegmentError> {
        let kind = match header.gso {
            Gso::None => {
                if header.needs_csum {
                    complete(packet, header.csum_start.into(), header.csum_offset.into())?;
                }
                let size = packet.len();
                return Ok(Self { packet, cut: None, size, given: 0, count: 1 });
            }
            Gso::TcpV4 => (Some(false), Transport::Tcp),
            Gso::TcpV6 => (Some(true), Transport::Tcp),
            Gso::Udp => (None, Transport::Udp),
        };
        let headers = Headers::read(packet)?;
        if headers.kind != kind.1 || kind.0.is_some_and(|v6| v6 != headers.v6) {
            return Err(SegmentError::Kind);
        }
        let field = usize::from(header.csum_start) + usize::from(header.csum_offset);
        if header.needs_csum
            && (usize::from(header.csum_start) != headers.transport || field != headers.checksum_at())
        {
            return Err(SegmentError::Checksum);
        }
        let size = usize::from(header.gso_size);
        if size == 0 {
            return Err(SegmentError::Size);
        }
        let count = (packet.len() - headers.payload).div_ceil(size).max(1);
        if count > MAX_SEGMENTS {
            return Err(SegmentError::TooMany);
        }
        let mut template = [0; MAX_HEADERS];
        template[..headers.payload].copy_from_slice(&packet[..headers.payload]);
        let id = if headers.v6 { 0 } else { word(&template, 4) };
        let (sequence, flags) = match headers.kind {
            Transport::Tcp => (long(&template, headers.transport + 4), template[headers.transport + FLAGS]),
            Transport::Udp => (0, 0),
        };
        if !headers.v6 {
            template[10..12].fill(0);
        }
        template[headers.checksum_at()..][..2].fill(0);
        let cut = Cut { headers, template, id, sequence, flags };
        Ok(Self { packet, cut: Some(cut), size, given: 0, count })
    }

    /// The next one, with its checksums. It overwrites the end of the one before.
    #[expect(clippy::should_implement_trait, reason = "it lends, which an iterator cannot")]
    pub fn next(&mut self) -> Option<&mut [u8]> {
        if self.given == self.count {
            return None;
        }
        let index = self.given;
        self.given += 1;
        let start = index * self.size;
        let Some(cut) = &self.cut else { return Some(&mut *self.packet) };
        let end = (start + cut.headers.payload + self.size).min(self.packet.len());
        let segment = self.packet.get_mut(start..end)?;
        cut.write(segment, index, start, self.given == self.count);
        Some(segment)
    }

    /// How many are still to come.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.count - self.given
    }

    /// Length of the longest one, in bytes.
    #[must_use]
    pub fn longest(&self) -> usize {
        let headers = self.cut.as_ref().map_or(0, |cut| cut.headers.payload);
        (headers + self.size).min(self.packet.len())
    }
}

impl Cut {
    /// Writes the headers of segment number `index`, whose payload is there already and starts `offset`
    /// bytes into the whole.
    #[inline]
    fn write(&self, segment: &mut [u8], index: usize, offset: usize, last: bool) {
        let Headers { v6, kind, transport, payload } = self.headers;
        let length = segment.len();
        segment[..payload].copy_from_slice(&self.template[..payload]);
        // All of these fit, as the whole has at most 65,535 bytes and MAX_SEGMENTS pieces.
        let short = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        if v6 {
            segment[4..6].copy_from_slice(&short(length - transport).to_be_bytes());
        } else {
            segment[2..4].copy_from_slice(&short(length).to_be_bytes());
            segment[4..6].copy_from_slice(&self.id.wrapping_add(short(index)).to_be_bytes());
            let checksum = Sum::ZERO.bytes(&segment[..transport]).checksum();
            segment[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        match kind {
            Transport::Tcp => {
                let sequence = self.sequence.wrapping_add(u32::try_from(offset).unwrap_or(u32::MAX));
                segment[transport + 4..transport + 8].copy_from_slice(&sequence.to_be_bytes());
                let only_last = if last { 0 } else { FIN | PSH };
                let only_first = if index == 0 { 0 } else { CWR };
                segment[transport + FLAGS] = self.flags & !only_last & !only_first;
            }
            Transport::Udp => {
                segment[transport + 4..transport + 6]
                    .copy_from_slice(&short(length - transport).to_be_bytes());
            }
        }
        let sum = self.headers.pseudo(segment, length).bytes(&segment[transport..]).checksum();
        let sum = if sum == 0 && kind == Transport::Udp { OTHER_ZERO } else { sum };
        segment[self.headers.checksum_at()..][..2].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Completes the checksum of one packet: its field holds the sum of the pseudo header, the rest is added.
fn complete(packet: &mut [u8], start: usize, offset: usize) -> Result<(), SegmentError> {
    let covered = packet.get_mut(start..).ok_or(SegmentError::Checksum)?;
    if covered.len() < offset + 2 {
        return Err(SegmentError::Checksum);
    }
    let sum = Sum::ZERO.bytes(covered).checksum();
    let sum = if sum == 0 { OTHER_ZERO } else { sum };
    covered[offset..offset + 2].copy_from_slice(&sum.to_be_bytes());
    Ok(())
}
