//! The flows that this node opened: a bounded LRU without allocation per packet.
//!
//! Entries live in one vector that grows to [`MAX_FLOWS`] and is then reused from the least recently
//! used end. Two sorts of links run through it: the order of use (both ways) and the bucket chains.

use std::net::IpAddr;

use crate::packet::Parsed;

/// Flows remembered; the oldest makes room for a new one. There is no timeout.
pub(super) const MAX_FLOWS: usize = 512;
const BUCKET_BITS: u32 = 10;
const NONE: u16 = u16::MAX;
/// Bytes of a stored flow.
pub(super) const STORED: usize = 1 + 2 + 2 + 16 + 16;

/// A flow as packets from the other side carry it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tuple {
    protocol: u8,
    src_port: u16,
    dst_port: u16,
    src: IpAddr,
    dst: IpAddr,
}

impl Tuple {
    pub(super) fn of(packet: &Parsed) -> Self {
        Self {
            protocol: packet.protocol,
            src_port: packet.src_port,
            dst_port: packet.dst_port,
            src: packet.src,
            dst: packet.dst,
        }
    }

    /// The stored form.
    pub(super) fn store(&self, out: &mut Vec<u8>) {
        let octets = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        out.push(self.protocol);
        out.extend_from_slice(&self.src_port.to_be_bytes());
        out.extend_from_slice(&self.dst_port.to_be_bytes());
        out.extend_from_slice(&octets(self.src));
        out.extend_from_slice(&octets(self.dst));
    }

    /// Reads the stored form.
    pub(super) fn load(bytes: &[u8; STORED]) -> Self {
        let [protocol, a, b, c, d, addresses @ ..] = *bytes;
        let ip = |at: usize| {
            let octets = std::array::from_fn::<u8, 16, _>(|n| addresses[at + n]);
            IpAddr::from(octets).to_canonical()
        };
        let (src_port, dst_port) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        Self { protocol, src_port, dst_port, src: ip(0), dst: ip(16) }
    }

    pub(super) fn reversed(self) -> Self {
        Self { src_port: self.dst_port, dst_port: self.src_port, src: self.dst, dst: self.src, ..self }
    }

    fn bucket(&self) -> usize {
        // Multiplying by an odd constant carries every input bit into the top ones.
        const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
        let fold = |hash: u64, word: u64| (hash.rotate_left(23) ^ word).wrapping_mul(SPREAD);
        let address = |hash, ip| match ip {
            IpAddr::V4(ip) => fold(hash, u64::from(u32::from(ip))),
            IpAddr::V6(ip) => {
                let o = ip.octets();
                let (hi, lo) = o.split_at(8);
                let word = |b: &[u8]| b.iter().fold(0, |w, b| w << 8 | u64::from(*b));
                fold(fold(hash, word(hi)), word(lo))
            }
        };
        let rest = u64::from(self.protocol) << 32 | u64::from(self.src_port) << 16 | u64::from(self.dst_port);
        let [a, b, ..] = fold(address(address(0, self.src), self.dst), rest).to_be_bytes();
        usize::from(u16::from_be_bytes([a, b]) >> (16 - BUCKET_BITS))
    }
}

#[derive(Debug, Clone)]
struct Entry {
    tuple: Tuple,
    newer: u16,
    older: u16,
    chain: u16,
}

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Flows {
    entries: Vec<Entry>,
    buckets: Box<[u16]>,
    newest: u16,
    oldest: u16,
}

impl Flows {
    pub(super) fn new() -> Self {
        Self {
            entries: Vec::new(),
            buckets: vec![NONE; 1 << BUCKET_BITS].into_boxed_slice(),
            newest: NONE,
            oldest: NONE,
        }
    }

    /// Looks `tuple` up and marks it as used.
    pub(super) fn hit(&mut self, tuple: &Tuple) -> bool {
        let Some(at) = self.find(tuple) else { return false };
        self.unlink(at);
        self.push_newest(at);
        true
    }

    /// All that are remembered, the least recently used first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Tuple> {
        let mut at = self.oldest;
        std::iter::from_fn(move || {
            let entry = self.entries.get(usize::from(at))?;
            at = entry.newer;
            Some(&entry.tuple)
        })
    }

    /// Whether `tuple` is known; it does not count as used.
    pub(super) fn contains(&self, tuple: &Tuple) -> bool {
        self.find(tuple).is_some()
    }

    fn find(&self, tuple: &Tuple) -> Option<u16> {
        let mut at = self.buckets[tuple.bucket()];
        while at != NONE {
            let entry = &self.entries[usize::from(at)];
            if entry.tuple == *tuple {
                return Some(at);
            }
            at = entry.chain;
        }
        None
    }

    /// Remembers `tuple`, in place of the least recently used one when full.
    pub(super) fn record(&mut self, tuple: Tuple) {
        if self.hit(&tuple) {
            return;
        }
        let bucket = tuple.bucket();
        let fresh = Entry { tuple, newer: NONE, older: NONE, chain: self.buckets[bucket] };
        let at = match u16::try_from(self.entries.len()) {
            Ok(at) if self.entries.len() < MAX_FLOWS => {
                self.entries.push(fresh);
                at
            }
            _ => {
                let at = self.oldest;
                self.unlink(at);
                self.unchain(at);
                // Read again: unchaining may have taken the head of this very bucket.
                self.entries[usize::from(at)] = Entry { chain: self.buckets[bucket], ..fresh };
                at
            }
        };
        self.buckets[bucket] = at;
        self.push_newest(at);
    }

    fn unlink(&mut self, at: u16) {
        let Entry { newer, older, .. } = self.entries[usize::from(at)];
        match newer {
            NONE => self.newest = older,
            n => self.entries[usize::from(n)].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            o => self.entries[usize::from(o)].newer = newer,
        }
    }

    fn push_newest(&mut self, at: u16) {
        let previous = std::mem::replace(&mut self.newest, at);
        let entry = &mut self.entries[usize::from(at)];
        entry.newer = NONE;
        entry.older = previous;
        match previous {
            NONE => self.oldest = at,
            p => self.entries[usize::from(p)].newer = at,
        }
    }

    fn unchain(&mut self, at: u16) {
        let Entry { tuple, chain: after, .. } = self.entries[usize::from(at)];
        let bucket = tuple.bucket();
        let mut walk = self.buckets[bucket];
        if walk == at {
            self.buckets[bucket] = after;
            return;
        }
        while walk != NONE {
            let next = self.entries[usize::from(walk)].chain;
            if next == at {
                self.entries[usize::from(walk)].chain = after;
                return;
            }
            walk = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn tuple(n: u16) -> Tuple {
        let (src, dst) = match n % 2 {
            0 => ("100.64.0.1".parse().unwrap(), "100.64.0.2".parse().unwrap()),
            _ => ("fd7a:115c:a1e0::1".parse().unwrap(), "fd7a:115c:a1e0::2".parse().unwrap()),
        };
        Tuple { protocol: 17, src_port: n, dst_port: 53, src, dst }
    }

    #[test]
    fn the_least_recently_used_flow_makes_room() {
        let mut flows = Flows::new();
        for n in 0..512 {
            flows.record(tuple(n));
        }
        assert!(flows.hit(&tuple(0)));
        flows.record(tuple(512));
        assert!(flows.hit(&tuple(0)), "used lately");
        assert!(!flows.hit(&tuple(1)), "the oldest");
        assert!(flows.hit(&tuple(2)));
        assert_eq!(flows.entries.len(), MAX_FLOWS);
    }

    #[test]
    fn tuples_spread_over_the_buckets() {
        let mut used = std::collections::HashSet::new();
        for n in 0..512 {
            used.insert(tuple(n * 2).bucket());
        }
        assert!(used.len() > 300, "{} of 1024 buckets for 512 flows", used.len());
    }

    proptest! {
        /// Against a queue of tuples, newest last.
        #[test]
        fn same_as_a_simple_queue(steps in proptest::collection::vec((any::<bool>(), 0u16..1200), 0..4000)) {
            let mut flows = Flows::new();
            let mut model: VecDeque<u16> = VecDeque::new();
            for (record, n) in steps {
                let known = model.iter().position(|m| *m == n);
                if let Some(at) = known {
                    model.remove(at);
                    model.push_back(n);
                }
                if record {
                    flows.record(tuple(n));
                    if known.is_none() {
                        model.push_back(n);
                        if model.len() > MAX_FLOWS {
                            model.pop_front();
                        }
                    }
                } else {
                    prop_assert_eq!(flows.hit(&tuple(n)), known.is_some());
                }
            }
        }
    }
}
