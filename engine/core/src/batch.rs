//! Packets in bulk: one reused buffer and a list of (meta, range), so that a warm batch allocates nothing.

use std::net::SocketAddr;
use std::ops::Range;

use crate::key::NodePublic;
pub use crate::tailcfg::RegionId;

/// Most packets a batch takes.
pub const MAX_ITEMS: usize = 1024;
/// Most bytes a batch takes: room for several full receive calls, far below a pod's memory limit.
pub const MAX_BYTES: usize = 4 << 20;

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
        let start = self.items.last().map_or(0, |(_, r)| r.end);
        let Some(end) = start.checked_add(max_len).filter(|end| *end <= MAX_BYTES) else { return false };
        if self.items.len() >= MAX_ITEMS {
            return false;
        }
        // Bytes past the last item stay initialised between uses: growing is the only time that is paid.
        if self.buf.len() < end {
            self.buf.resize(end, 0);
        }
        match write(&mut self.buf[start..end]) {
            Some(len) if len <= max_len => {
                self.items.push((meta, start..start + len));
                true
            }
            _ => false,
        }
    }

    /// Packets in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&M, &[u8])> {
        self.items.iter().map(|(meta, range)| (meta, &self.buf[range.clone()]))
    }

    /// Packets in order, writable.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&M, &mut [u8])> {
        let mut rest = self.buf.as_mut_slice();
        let mut at = 0;
        self.items.iter().map(move |(meta, range)| {
            let (_, tail) = std::mem::take(&mut rest).split_at_mut(range.start - at);
            let (packet, tail) = tail.split_at_mut(range.len());
            at = range.end;
            rest = tail;
            (meta, packet)
        })
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

    /// Gives memory above `bytes` back; for after a burst.
    pub fn shrink_to(&mut self, bytes: usize) {
        let used = self.items.last().map_or(0, |(_, r)| r.end);
        self.buf.truncate(bytes.max(used));
        self.buf.shrink_to(bytes);
        self.items.shrink_to(bytes / 1280);
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
        batch.clear();
        batch.shrink_to(2048);
        assert!(batch.push((), b"still works"));
    }
}
