//! Packets of one flow put together, so that the kernel takes them in one call and its stack walks once.
//!
//! What is put together can be cut again into exactly what came ([`super::Segments`]); the rules are those of
//! the kernel's own GRO (`net/ipv4/tcp_offload.c`, `udp_offload.c`, `af_inet.c`), a little stricter.
//! Checksums are verified first, because the kernel believes the one of a packet that was put together.

use std::iter::FusedIterator;

use super::checksum::Sum;
use super::headers::{Headers, TCP_CHECKSUM, Transport, UDP_CHECKSUM, long, word};
use super::segment::SegmentError;
use super::vnet::{Gso, VnetHeader};
use crate::batch::Batch;

/// Most packets that are put together, and so most pieces of a [`Write`]: `UDP_MAX_SEGMENTS` of kernels
/// before 6.9. 53 full packets of a tailnet come to 64 KiB.
pub const MAX_PIECES: usize = 64;

/// Most bytes of an IP packet.
const MAX_LENGTH: usize = 65_535;
/// Flows that are being put together at a time. A flow that falls on the place of another ends that one's
/// group, which costs a system call.
const PLACES: usize = 64;
/// No packet, no group.
const NONE: u16 = u16::MAX;
const IPV4_HEADER: usize = 20;
const DONT_FRAGMENT: u8 = 0x40;
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
/// Where TCP's flags lie in its header.
const FLAGS: usize = 13;

/// Groups the packets of a batch. What it needs is kept for the next batch: a warm one allocates nothing.
#[derive(Debug)]
pub struct Coalescer {
    groups: Vec<Group>,
    /// For each packet, the one that follows it in its group.
    next: Vec<u16>,
    /// The group that still takes packets, by [`place`].
    open: [u16; PLACES],
}

/// Packets that go together.
#[derive(Debug, Clone, Copy)]
struct Group {
    first: u16,
    last: u16,
    count: u16,
    /// Payload of each packet but the last.
    size: u16,
    /// Bytes of the whole.
    length: u16,
    /// Bytes of each packet's headers.
    headers: u8,
    /// Where the transport header starts.
    transport: u8,
    v6: bool,
    kind: Transport,
    /// Whether the first packet's checksum was found right.
    verified: bool,
    /// Whether the last packet had PSH.
    push: bool,
    /// Sequence number and IPv4 identification of the packet that can follow.
    sequence: u32,
    id: u16,
}

/// What one packet is to the others.
enum Class {
    /// No packet of a flow.
    Apart,
    /// It may belong to any flow: a fragment, or headers that are not understood here.
    Unclear,
    /// Of a flow, and it must go alone.
    Alone(Headers),
    /// Of a flow.
    Fit(Headers),
}

/// One write to the TUN.
#[derive(Debug, Clone)]
pub struct Write<'a> {
    /// What goes ahead of the packet.
    pub header: VnetHeader,
    /// What the packet consists of, at most [`MAX_PIECES`].
    pub pieces: Pieces<'a>,
}

/// The first packet of a group whole, then the payloads of the others.
#[derive(Debug, Clone)]
pub struct Pieces<'a> {
    packets: &'a Batch<()>,
    next: &'a [u16],
    at: u16,
    /// Bytes of headers to leave out of the next one.
    skip: usize,
    headers: usize,
    left: usize,
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.left = self.left.checked_sub(1)?;
        let at = usize::from(self.at);
        let piece = self.packets.get(at)?.get(self.skip..)?;
        self.at = self.next.get(at).copied().unwrap_or(NONE);
        self.skip = self.headers;
        Some(piece)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Pieces<'_> {}
impl FusedIterator for Pieces<'_> {}

impl Default for Coalescer {
    fn default() -> Self {
        Self::new()
    }
}

impl Coalescer {
    /// One without memory; it takes some as packets come, about 30 bytes for each of a batch.
    #[must_use]
    pub fn new() -> Self {
        Self { groups: Vec::new(), next: Vec::new(), open: [NONE; PLACES] }
    }

    /// Groups `packets`, whole IP packets in order of arrival, UDP only if `udp`: whether the TUN takes
    /// [`Gso::Udp`], which kernels before 6.2 refuse. The first packet's headers of each group become those of
    /// the whole, in place.
    pub fn group(&mut self, packets: &mut Batch<()>, udp: bool) {
        self.groups.clear();
        self.next.clear();
        self.open.fill(NONE);
        for index in 0..packets.len() {
            // A batch is bounded well below.
            let Ok(number) = u16::try_from(index) else { break };
            let Some(packet) = packets.get(index) else { break };
            self.next.push(NONE);
            self.take(packets, number, packet, udp);
        }
        for group in &self.groups {
            if group.count > 1
                && let Some(packet) = packets.get_mut(group.first.into())
            {
                group.finish(packet);
            }
        }
    }

    /// What to write for the batch that was grouped last, in order of the groups' first packets. Packets of one
    /// flow keep their order.
    pub fn writes<'a>(&'a self, packets: &'a Batch<()>) -> impl ExactSizeIterator<Item = Write<'a>> {
        self.groups.iter().map(move |group| Write {
            header: group.header(),
            pieces: Pieces {
                packets,
                next: &self.next,
                at: group.first,
                skip: 0,
                headers: group.headers.into(),
                left: group.count.into(),
            },
        })
    }

    /// Gives memory back; for after a burst.
    pub fn shrink(&mut self) {
        *self = Self::new();
    }

    fn take(&mut self, packets: &Batch<()>, number: u16, packet: &[u8], udp: bool) {
        let (headers, fit) = match classify(packet, udp) {
            Class::Apart => return self.alone(number),
            Class::Unclear => {
                self.open.fill(NONE);
                return self.alone(number);
            }
            Class::Alone(headers) => (headers, false),
            Class::Fit(headers) => (headers, true),
        };
        let place = place(headers, packet);
        if let Some(group) = self.groups.get_mut(usize::from(self.open[place]))
            && let Some(first) = packets.get(group.first.into())
            && group.is_flow(headers, first, packet)
        {
            if fit && group.accepts(headers, first, packet) {
                if !group.verified {
                    group.verified = group.headers().verify(first);
                }
                if group.verified {
                    if headers.verify(packet) {
                        if let Some(link) = self.next.get_mut(usize::from(group.last)) {
                            *link = number;
                        }
                        if !group.append(headers, number, packet) {
                            self.open[place] = NONE;
                        }
                        return;
                    }
                    self.open[place] = NONE;
                    return self.alone(number);
                }
            }
            self.open[place] = NONE;
        }
        if !fit {
            return self.alone(number);
        }
        let group = Group::new(headers, number, packet);
        // One that ends with its first packet leaves another flow its place.
        if !group.push
            && let Ok(index) = u16::try_from(self.groups.len())
        {
            self.open[place] = index;
        }
        self.groups.push(group);
    }

    fn alone(&mut self, number: u16) {
        self.groups.push(Group {
            first: number,
            last: number,
            count: 1,
            size: 0,
            length: 0,
            headers: 0,
            transport: 0,
            v6: false,
            kind: Transport::Udp,
            verified: false,
            push: false,
            sequence: 0,
            id: 0,
        });
    }
}

/// Whether `packet` can be put together with others, looking at it alone. Its transport checksum is not
/// verified: that is the dear part, and in vain for one that stays alone.
#[inline]
fn classify(packet: &[u8], udp: bool) -> Class {
    let headers = match Headers::read(packet) {
        Ok(headers) => headers,
        Err(SegmentError::Protocol) if is_apart(packet) => return Class::Apart,
        Err(_) => return Class::Unclear,
    };
    if !headers.v6 && headers.transport != IPV4_HEADER {
        return Class::Unclear;
    }
    let fit = match headers.kind {
        Transport::Tcp => {
            let flags = word(packet, headers.transport + FLAGS - 1) & 0x0fff;
            flags | u16::from(PSH) == u16::from(ACK | PSH)
        }
        Transport::Udp => udp && word(packet, headers.transport + UDP_CHECKSUM) != 0,
    };
    // IPv4's own checksum is written anew for the whole, and with it any fault in one of the parts mended.
    if fit
        && headers.payload < packet.len()
        && (headers.v6 || Sum::ZERO.bytes(&packet[..IPV4_HEADER]).holds() && packet[6] & 0x80 == 0)
    {
        Class::Fit(headers)
    } else {
        Class::Alone(headers)
    }
}

/// Whether a packet of another protocol than TCP and UDP is certainly not one of theirs behind other headers.
fn is_apart(packet: &[u8]) -> bool {
    use crate::packet::protocol::{ICMPV4, ICMPV6, SCTP, TSMP};
    match packet.first().map(|b| b >> 4) {
        Some(4) => packet.get(9).is_some_and(|p| matches!(*p, ICMPV4 | SCTP | TSMP)),
        Some(6) => packet.get(6).is_some_and(|p| matches!(*p, ICMPV6 | SCTP | TSMP)),
        _ => true,
    }
}

/// `N` bytes at `at`.
fn part<const N: usize>(packet: &[u8], at: usize) -> Option<&[u8; N]> {
    packet.get(at..)?.first_chunk()
}

/// Where among [`PLACES`] a flow belongs.
#[inline]
fn place(headers: Headers, packet: &[u8]) -> usize {
    let eight = |at: usize| part(packet, at).map_or(0, |bytes| u64::from_ne_bytes(*bytes));
    let mut mixed = eight(headers.transport - 8) ^ u64::from(long(packet, headers.transport)).rotate_left(27);
    if headers.v6 {
        mixed ^= eight(16).rotate_left(32);
    }
    // Fibonacci hashing: the upper bits depend on all others.
    let hash = mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58;
    usize::try_from(hash).unwrap_or(0) % PLACES
}

impl Group {
    fn new(headers: Headers, number: u16, packet: &[u8]) -> Self {
        // Lengths of a packet that was read fit, and its headers have at most 100 bytes.
        let short = |n: usize| u16::try_from(n).unwrap_or(0);
        let byte = |n: usize| u8::try_from(n).unwrap_or(0);
        let mut group = Self {
            first: number,
            last: number,
            count: 1,
            size: short(packet.len() - headers.payload),
            length: short(packet.len()),
            headers: byte(headers.payload),
            transport: byte(headers.transport),
            v6: headers.v6,
            kind: headers.kind,
            verified: false,
            push: false,
            sequence: 0,
            id: 0,
        };
        group.expect_after(headers, packet);
        group
    }

    fn headers(&self) -> Headers {
        Headers {
            v6: self.v6,
            kind: self.kind,
            transport: self.transport.into(),
            payload: self.headers.into(),
        }
    }

    /// Notes what can follow `packet`.
    fn expect_after(&mut self, headers: Headers, packet: &[u8]) {
        if !headers.v6 {
            self.id = word(packet, 4).wrapping_add(1);
        }
        if headers.kind == Transport::Tcp {
            let payload = u32::try_from(packet.len() - headers.payload).unwrap_or(0);
            self.sequence = long(packet, headers.transport + 4).wrapping_add(payload);
            self.push = packet[headers.transport + FLAGS] & PSH != 0;
        }
    }

    /// Whether `packet` belongs to the flow of the group, whose first packet is `first`.
    #[inline]
    fn is_flow(&self, headers: Headers, first: &[u8], packet: &[u8]) -> bool {
        let at = headers.transport;
        self.v6 == headers.v6
            && self.kind == headers.kind
            && long(first, at) == long(packet, at)
            && if headers.v6 {
                part::<32>(first, 8) == part(packet, 8)
            } else {
                part::<8>(first, 12) == part(packet, 12)
            }
    }

    /// Whether `packet`, of this flow, can follow what is there, checksums apart.
    #[inline]
    fn accepts(&self, headers: Headers, first: &[u8], packet: &[u8]) -> bool {
        let payload = packet.len() - headers.payload;
        if payload > self.size.into()
            || headers.payload != usize::from(self.headers)
            || usize::from(self.count) >= MAX_PIECES
            || usize::from(self.length) + payload > MAX_LENGTH
        {
            return false;
        }
        // Lengths that are known make a comparison of each of these a few instructions, not a call.
        let ip = if headers.v6 {
            // Version, traffic class and flow label; next header and hop limit.
            long(first, 0) == long(packet, 0) && word(first, 6) == word(packet, 6)
        } else {
            // Version and type of service; flags, and what follows up to the checksum.
            word(first, 0) == word(packet, 0)
                && long(first, 6) == long(packet, 6)
                && (packet[6] & DONT_FRAGMENT != 0 || word(packet, 4) == self.id)
        };
        let at = headers.transport;
        ip && match headers.kind {
            Transport::Tcp => {
                // Acknowledgement; window; urgent pointer; options. Of the flags, only PSH can differ, and a group
                // whose last packet had it takes no more.
                long(packet, at + 4) == self.sequence
                    && long(first, at + 8) == long(packet, at + 8)
                    && word(first, at + 14) == word(packet, at + 14)
                    && word(first, at + 18) == word(packet, at + 18)
                    && first.get(at + 20..headers.payload) == packet.get(at + 20..headers.payload)
            }
            Transport::Udp => true,
        }
    }

    /// Takes `packet`; false when it is the last one that can be taken.
    fn append(&mut self, headers: Headers, number: u16, packet: &[u8]) -> bool {
        let payload = u16::try_from(packet.len() - headers.payload).unwrap_or(0);
        self.last = number;
        self.count += 1;
        self.length += payload;
        self.expect_after(headers, packet);
        payload == self.size && !self.push
    }

    /// Makes the headers of the first packet those of the whole.
    fn finish(&self, packet: &mut [u8]) {
        let headers = self.headers();
        let rest = self.length - u16::from(self.transport);
        if self.v6 {
            packet[4..6].copy_from_slice(&rest.to_be_bytes());
        } else {
            packet[2..4].copy_from_slice(&self.length.to_be_bytes());
            packet[10..12].fill(0);
            let checksum = Sum::ZERO.bytes(&packet[..IPV4_HEADER]).checksum();
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        match self.kind {
            Transport::Tcp if self.push => packet[headers.transport + FLAGS] |= PSH,
            Transport::Tcp => {}
            Transport::Udp => {
                packet[headers.transport + 4..headers.transport + 6].copy_from_slice(&rest.to_be_bytes());
            }
        }
        let sum = headers.pseudo(packet, self.length.into()).fold();
        packet[headers.checksum_at()..][..2].copy_from_slice(&sum.to_be_bytes());
    }

    fn header(&self) -> VnetHeader {
        if self.count < 2 {
            return VnetHeader::PLAIN;
        }
        let (gso, offset) = match (self.kind, self.v6) {
            (Transport::Tcp, false) => (Gso::TcpV4, TCP_CHECKSUM),
            (Transport::Tcp, true) => (Gso::TcpV6, TCP_CHECKSUM),
            (Transport::Udp, _) => (Gso::Udp, UDP_CHECKSUM),
        };
        VnetHeader {
            needs_csum: true,
            gso,
            header_len: self.headers.into(),
            gso_size: self.size,
            csum_start: self.transport.into(),
            csum_offset: u16::try_from(offset).unwrap_or(0),
            ..VnetHeader::PLAIN
        }
    }
}
