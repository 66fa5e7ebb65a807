//! Packets in bulk: one reused buffer and a list of (meta, range), so that a warm batch allocates nothing.

use std::net::SocketAddr;
use std::ops::Range;

use crate::key::NodePublic;
pub use crate::tailcfg::RegionId;

/// Most packets a batch takes.
pub const MAX_ITEMS: usize = 1024;
/// Most bytes a batch takes: room for several full receive calls, far below a pod's memory limit.
pub const MAX_BYTES: usize = 4 << 20;
/// What a batch takes at first. Allocated as zeroes and not yet touched, it is address space until packets
/// come to lie in it; a size that allocators get from the kernel and give back to it.
const FIRST_BYTES: usize = 256 << 10;

/// A bounded list of packets, each with its `M` (where it came from or goes to).
#[derive(Debug)]
pub struct Batch<M> {
    buf: Vec<u8>,
    items: Vec<(M, Range<usize>)>,
}

impl<M> Default for Batch<M> {
    fn default() -> Self {
        Self { buf: Vec::new(), items: Vec::new() }
    }
}

impl<M> Batch<M> {
    /// An empty batch; memory is taken as packets come.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a copy of `packet`; false when the batch is full.
    pub fn push(&mut self, meta: M, packet: &[u8]) -> bool {
        self.push_with(meta, packet.len(), |out| {
            out.copy_from_slice(packet);
            Some(packet.len())
        })
    }

    /// Appends a packet that `write` makes in a buffer of `max_len` bytes (of unspecified content) and
    /// whose length it returns. `None`, or a full batch, appends nothing and gives false.
    pub fn push_with(
        &mut self,
        meta: M,
        max_len: usize,
        write: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> bool {
        self.fill(max_len, |out| Some((meta, write(out)?)))
    }

    /// As [`Batch::push_with`], where `write` finds out the meta as well.
    pub fn fill(&mut self, max_len: usize, write: impl FnOnce(&mut [u8]) -> Option<(M, usize)>) -> bool {
        let start = self.bytes();
        let Some(end) = start.checked_add(max_len).filter(|end| *end <= MAX_BYTES) else { return false };
        if self.items.len() >= MAX_ITEMS {
            return false;
        }
        // Bytes past the last item stay initialised between uses: growing is the only time that is paid.
        if self.buf.is_empty() {
            self.buf = vec![0; end.max(FIRST_BYTES)];
        } else if self.buf.len() < end {
            self.buf.resize(end, 0);
        }
        match write(&mut self.buf[start..end]) {
            Some((meta, len)) if len <= max_len => {
                self.items.push((meta, start..start + len));
                true
            }
            _ => false,
        }
    }

    /// Bytes of all packets together.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.items.last().map_or(0, |(_, range)| range.end)
    }

    /// Packets in order, in runs that one call can send: see [`Run`]. Those that `joins` denies go alone.
    pub fn runs(&self, joins: impl Fn(&[u8]) -> bool) -> impl Iterator<Item = Run<'_, M>>
    where
        M: PartialEq,
    {
        let mut items = self.items.iter().peekable();
        std::iter::from_fn(move || {
            let (meta, first) = items.next()?;
            let size = first.len();
            let mut run = Run { meta, bytes: &[], size, packets: 1 };
            let mut end = first.end;
            let mut last = size;
            let joined = joins(&self.buf[first.clone()]);
            while let Some((_, next)) = items.next_if(|(other, next)| {
                joined
                    && run.packets < Run::<M>::MAX_PACKETS
                    && last == size
                    && (1..=size).contains(&next.len())
                    && next.end - first.start <= Run::<M>::MAX_BYTES
                    && other == meta
                    && joins(&self.buf[next.clone()])
            }) {
                last = next.len();
                end = next.end;
                run.packets += 1;
            }
            run.bytes = &self.buf[first.start..end];
            Some(run)
        })
    }

    /// Packets in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&M, &[u8])> {
        self.items.iter().map(|(meta, range)| (meta, &self.buf[range.clone()]))
    }

    /// Packets in order, writable.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&M, &mut [u8])> {
        let Self { buf, items } = self;
        let mut rest = Rest { bytes: buf, at: 0 };
        items.iter().map(move |(meta, range)| (meta, rest.take(range)))
    }

    /// Packet number `index`.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        self.items.get(index).map(|(_, range)| &self.buf[range.clone()])
    }

    /// Packet number `index`, writable.
    pub fn get_mut(&mut self, index: usize) -> Option<&mut [u8]> {
        self.items.get(index).map(|(_, range)| &mut self.buf[range.clone()])
    }

    /// The packet appended last.
    #[must_use]
    pub fn last(&self) -> Option<&[u8]> {
        self.items.last().map(|(_, range)| &self.buf[range.clone()])
    }

    /// Forgets the packets and keeps the memory.
    pub fn clear(&mut self) {
        self.items.clear();
    }

    /// Gives the memory of an empty batch back.
    pub fn release(&mut self) {
        if self.items.is_empty() {
            *self = Self::default();
        }
    }

    /// Whether there is no packet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Number of packets.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len()
    }
}

impl<'a, M: Copy> IntoIterator for &'a mut Batch<M> {
    type Item = (M, &'a mut [u8]);
    type IntoIter = IterMut<'a, M>;

    fn into_iter(self) -> Self::IntoIter {
        IterMut { items: self.items.iter(), rest: Rest { bytes: &mut self.buf, at: 0 } }
    }
}

/// See [`Batch::iter_mut`]; the metas are copies.
#[derive(Debug)]
pub struct IterMut<'a, M> {
    items: std::slice::Iter<'a, (M, Range<usize>)>,
    rest: Rest<'a>,
}

impl<'a, M: Copy> Iterator for IterMut<'a, M> {
    type Item = (M, &'a mut [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (meta, range) = self.items.next()?;
        Some((*meta, self.rest.take(range)))
    }
}

/// The part of a buffer whose packets were not given out yet.
#[derive(Debug)]
struct Rest<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl<'a> Rest<'a> {
    fn take(&mut self, range: &Range<usize>) -> &'a mut [u8] {
        let (_, tail) = std::mem::take(&mut self.bytes).split_at_mut(range.start - self.at);
        let (packet, tail) = tail.split_at_mut(range.len());
        self.at = range.end;
        self.bytes = tail;
        packet
    }
}

/// Consecutive packets of one destination and one length, of which the last may be shorter, as they lie
/// behind each other: what UDP segmentation offload sends by one call.
#[derive(Debug, PartialEq, Eq)]
pub struct Run<'a, M> {
    /// Where they go.
    pub meta: &'a M,
    /// All of them.
    pub bytes: &'a [u8],
    /// Length of each but the last.
    pub size: usize,
    /// How many.
    pub packets: usize,
}

impl<M> Run<'_, M> {
    /// Most packets: `UDP_MAX_SEGMENTS` of kernels before 6.9.
    pub const MAX_PACKETS: usize = 64;
    /// Most bytes, well below what a datagram's length field can say.
    pub const MAX_BYTES: usize = 65_000;
}

/// Where a packet goes through a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DerpDestination {
    /// Region whose server takes it.
    pub region: RegionId,
    /// Who gets it.
    pub peer: NodePublic,
}

/// Where a message came from that another process of the same node may know, or where that is to send it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// From the underlay.
    Udp(SocketAddr),
    /// From a relay, which vouches for the sender.
    Relay(DerpDestination),
    /// From the pod: it waited for a handshake.
    Pod,
    /// For a relay: the other process is connected and this one is not yet.
    ToRelay(DerpDestination),
}

/// Everything one `handle_*` call wants sent. The shell sends it all, then clears it.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Datagrams for the underlay, with their destinations.
    pub udp: Batch<SocketAddr>,
    /// IP packets for the pod.
    pub tun: Batch<()>,
    /// Packets for relays.
    pub derp: Batch<DerpDestination>,
    /// For the other process of this node, while a handover is under way.
    pub passed: Batch<Origin>,
}

impl Outbox {
    /// Forgets the packets and keeps the memory.
    pub fn clear(&mut self) {
        self.udp.clear();
        self.tun.clear();
        self.derp.clear();
        self.passed.clear();
    }

    /// Gives the memory of what is empty back.
    pub fn release(&mut self) {
        self.udp.release();
        self.tun.release();
        self.derp.release();
        self.passed.release();
    }

    /// Whether nothing is to be sent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.udp.is_empty() && self.tun.is_empty() && self.derp.is_empty() && self.passed.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_come_back_in_order_and_unfinished_ones_leave_no_trace() {
        let mut batch = Batch::new();
        assert!(batch.push(1, b"one"));
        assert!(!batch.push_with(2, 100, |_| None));
        assert!(!batch.push_with(2, 3, |_| Some(4)));
        assert!(batch.push_with(3, 100, |out| {
            out[..5].copy_from_slice(b"three");
            Some(5)
        }));
        assert!(batch.push(4, b""));
        let all: Vec<_> = batch.iter().map(|(m, p)| (*m, p.to_vec())).collect();
        assert_eq!(all, [(1, b"one".to_vec()), (3, b"three".to_vec()), (4, vec![])]);
        for (_, packet) in batch.iter_mut() {
            packet.make_ascii_uppercase();
        }
        assert_eq!(batch.iter().map(|(_, p)| p).collect::<Vec<_>>(), [&b"ONE"[..], b"THREE", b""]);
        batch.clear();
        assert!(batch.is_empty());
    }

    #[test]
    fn a_batch_is_bounded_in_items_and_bytes() {
        let mut batch = Batch::new();
        let taken = (0..2 * MAX_ITEMS).take_while(|_| batch.push((), b"x")).count();
        assert_eq!((taken, batch.len()), (MAX_ITEMS, MAX_ITEMS));
        batch.clear();
        let big = vec![0; 60_000];
        while batch.push((), &big) {}
        assert!(batch.iter().map(|(_, p)| p.len()).sum::<usize>() <= MAX_BYTES);
        assert!(!batch.push_with((), usize::MAX, |_| Some(0)));
        batch.release();
        assert!(!batch.is_empty(), "nothing is lost");
        batch.clear();
        batch.release();
        assert!(batch.push((), b"still works"));
    }

    #[test]
    fn runs_are_what_segmentation_offload_can_send() {
        let runs = |packets: &[(u8, usize)]| {
            let mut batch = Batch::new();
            for (n, (to, len)) in packets.iter().enumerate() {
                assert!(batch.push(*to, &vec![u8::try_from(n % 251).unwrap(); *len]));
            }
            let mut seen = Vec::new();
            for run in batch.runs(|_| true) {
                seen.push((*run.meta, run.size, run.packets));
                assert!(run.bytes.len() <= run.size * run.packets);
                assert!(run.bytes.len() > run.size * (run.packets - 1) || run.packets == 1);
            }
            let bytes: Vec<u8> = batch.runs(|_| true).flat_map(|run| run.bytes.to_vec()).collect();
            assert_eq!(bytes, batch.iter().flat_map(|(_, p)| p.to_vec()).collect::<Vec<_>>());
            seen
        };
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[(1, 100)]), [(1, 100, 1)]);
        // A shorter one closes its run, a longer one or another destination begins another.
        assert_eq!(runs(&[(1, 100), (1, 100), (1, 60), (1, 60)]), [(1, 100, 3), (1, 60, 1)]);
        assert_eq!(runs(&[(1, 60), (1, 100), (2, 100)]), [(1, 60, 1), (1, 100, 1), (2, 100, 1)]);
        // Nothing in a segment is no datagram.
        assert_eq!(runs(&[(1, 9), (1, 0), (1, 0)]), [(1, 9, 1), (1, 0, 1), (1, 0, 1)]);
        assert_eq!(runs(&[(1, 10); 130]), [(1, 10, 64), (1, 10, 64), (1, 10, 2)]);
        assert_eq!(runs(&[(1, 1312); 53]), [(1, 1312, 49), (1, 1312, 4)]);

        let mut batch = Batch::new();
        for first in [4, 4, 1, 4, 1, 1] {
            assert!(batch.push((), &[first; 9]));
        }
        let alone: Vec<_> = batch.runs(|packet| packet[0] == 4).map(|run| run.packets).collect();
        assert_eq!(alone, [2, 1, 1, 1, 1]);
    }
}
