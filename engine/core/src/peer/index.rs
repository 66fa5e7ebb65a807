//! Look-up tables that hold no copy of what they find peers by.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hash};

use hashbrown::HashTable;

use super::Slot;

/// From some fact of a peer to the peer. An entry is eight bytes; the fact itself is in the peer.
#[derive(Default)]
pub(super) struct Index {
    /// With the key's hash, so that growing looks at no peer.
    entries: HashTable<(u32, Slot)>,
    hasher: RandomState,
}

impl Index {
    /// The peer at `key`, which `is` tells from others with the same hash.
    pub(super) fn get(&self, key: &impl Hash, is: impl Fn(Slot) -> bool) -> Option<Slot> {
        let hash = self.hash(key);
        self.entries.find(spread(hash), |(other, slot)| *other == hash && is(*slot)).map(|(_, slot)| *slot)
    }

    /// Puts `slot` at `key`, in place of whoever was there.
    pub(super) fn set(&mut self, key: &impl Hash, slot: Slot, is: impl Fn(Slot) -> bool) {
        let hash = self.hash(key);
        match self.entries.find_mut(spread(hash), |(other, at)| *other == hash && is(*at)) {
            Some((_, at)) => *at = slot,
            None => {
                self.entries.insert_unique(spread(hash), (hash, slot), |(hash, _)| spread(*hash));
            }
        }
    }

    /// Takes `slot` from `key`, unless another peer is there.
    pub(super) fn unset(&mut self, key: &impl Hash, slot: Slot) {
        let hash = self.hash(key);
        if let Ok(entry) = self.entries.find_entry(spread(hash), |entry| *entry == (hash, slot)) {
            entry.remove();
        }
    }

    /// Gives memory back after many peers left.
    pub(super) fn shrink(&mut self) {
        let entries = self.entries.len();
        if self.entries.capacity() / 4 > entries {
            self.entries.shrink_to(entries, |(hash, _)| spread(*hash));
        }
    }

    fn hash(&self, key: &impl Hash) -> u32 {
        let [a, b, c, d, ..] = self.hasher.hash_one(key).to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }
}

/// The table takes its place from the low bits and its tag from the high ones.
fn spread(hash: u32) -> u64 {
    u64::from(hash).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
