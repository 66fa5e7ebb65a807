//! A map message's part about peers, put into force.
//!
//! A message may come in pieces: nodes of its two lists as they are decoded, and last the rest of it.
//! Whatever the pieces, the outcome is that of the protocol's order: `Peers` replaces all and silences the
//! deltas beside it, else come removals, whole nodes, presence and patches. Each message has a number;
//! peers bear the number of the last one that listed them, so that those to remove are known without a
//! list of those to stay.

use std::time::Instant;

use super::{Active, Facts, Peer, PeerTable, Slot, Upserted};
use crate::key::DiscoPublic;
use crate::tailcfg::{MapResponse, Node, NodeId, PeerChange, UnixTime};
use crate::wg::Timestamp;

/// Places looked at in one go for peers that a new map does not have: well under a millisecond.
const SWEEP_SLICE: usize = 256;

/// The list of a map message that a node is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerList {
    /// `Peers`: who is not in it is gone.
    All,
    /// `PeersChanged`.
    Changed,
}

/// A message of which some pieces have come.
#[derive(Debug, Default)]
pub(super) struct Message {
    all: bool,
    changed: bool,
}

/// Takes out peers that no message since this number has listed.
#[derive(Debug)]
pub(super) struct Sweep {
    at: usize,
    mark: u64,
}

/// What a piece of a message changed.
#[derive(Default)]
pub(crate) struct PeerChanges {
    /// Who is new or changed.
    pub(crate) changed: Vec<Slot>,
    /// Who is gone, and the running state each had.
    pub(crate) removed: Vec<(NodeId, Slot, Option<Box<Active>>)>,
    /// Peers with a new name or address.
    pub(crate) renamed: Vec<Slot>,
    /// Running state that ended.
    pub(crate) dropped: Vec<(Slot, Box<Active>)>,
    /// Peers that may be reachable where or how they were not before.
    pub(crate) moved: Vec<Slot>,
    /// Elements that made no sense or were too much.
    pub(crate) ignored: u64,
    /// News of peers that are not there.
    pub(crate) unknown: u64,
}

impl PeerChanges {
    fn note(&mut self, upserted: Option<Upserted>) {
        let Some(upserted) = upserted else {
            self.ignored += 1;
            return;
        };
        let slot = upserted.slot;
        self.changed.extend(upserted.changed.then_some(slot));
        self.dropped.extend(upserted.dropped.map(|active| (slot, active)));
        self.moved.extend(upserted.moved.then_some(slot));
        self.renamed.extend(upserted.renamed.then_some(slot));
    }
}

impl PeerTable {
    /// A message that was cut off in the middle: what it said of its nodes stays, but it takes nobody away.
    pub(crate) fn forget_message(&mut self) {
        self.message = None;
    }

    /// Nodes of a message whose rest is still to come. `wall` is the server's time.
    pub(crate) fn take(
        &mut self,
        list: PeerList,
        nodes: &[Node],
        wall: UnixTime,
        now: Instant,
        changes: &mut PeerChanges,
    ) {
        let mark = &mut self.mark;
        let message = self.message.get_or_insert_with(|| {
            *mark += 1;
            Message::default()
        });
        match list {
            PeerList::All => {
                if message.changed && !message.all {
                    // Those deltas are silenced now; this lets the sweep find them.
                    *mark += 1;
                }
                message.all = true;
            }
            PeerList::Changed if message.all => return,
            PeerList::Changed => message.changed = true,
        }
        for node in nodes {
            let upserted = self.upsert_counting(node, wall, now, &mut changes.ignored);
            changes.note(upserted);
        }
    }

    /// The rest of a message; `first` for the first one of a session.
    pub(crate) fn finish(
        &mut self,
        message: &MapResponse,
        first: bool,
        wall: UnixTime,
        now: Instant,
        changes: &mut PeerChanges,
    ) {
        if !message.peers.is_empty() {
            self.take(PeerList::All, &message.peers, wall, now, changes);
        }
        self.take(PeerList::Changed, &message.peers_changed, wall, now, changes);
        let all = self.message.take().is_some_and(|message| message.all);
        // A first message without peers means that there are none, where in a later one it means
        // that none has changed.
        if all || first {
            self.sweep = Some(Sweep { at: 0, mark: self.mark });
            self.sweep(changes);
        }
        if all {
            return;
        }
        for id in &message.peers_removed {
            // Removed and named again in the same message: it is there.
            let gone = self.known(*id).filter(|slot| self.get(*slot).is_some_and(|p| p.mark != self.mark));
            if let Some(slot) = gone {
                self.remove_noting(slot, changes);
            }
        }
        // Nothing of what carries packets depends on when a peer was last seen.
        changes.unknown += count(message.peer_seen_change.keys().filter(|id| self.known(**id).is_none()));
        for (id, online) in &message.online_change {
            let patch = PeerChange { node_id: *id, online: Some(*online), ..PeerChange::default() };
            self.patch(&patch, wall, now, changes);
        }
        for patch in &message.peers_changed_patch {
            self.patch(patch, wall, now, changes);
        }
    }

    /// Takes out some more of the peers that the last full map did not have.
    pub(crate) fn sweep(&mut self, changes: &mut PeerChanges) {
        let Some(Sweep { at, mark }) = self.sweep.take() else { return };
        let end = (at + SWEEP_SLICE).min(self.slots.len());
        for at in at..end {
            if self.slots[at].as_ref().is_some_and(|peer| peer.mark < mark) {
                self.remove_noting(Slot::number(at), changes);
            }
        }
        if end < self.slots.len() {
            self.sweep = Some(Sweep { at: end, mark });
        } else {
            self.trim();
        }
    }

    /// Whether [`Self::sweep`] has more to do.
    pub(crate) fn is_sweeping(&self) -> bool {
        self.sweep.is_some()
    }

    /// Adds a peer or brings it up to date, outside of any message.
    #[cfg(test)]
    pub(crate) fn upsert(&mut self, node: &Node, wall: UnixTime, now: Instant) -> Upserted {
        self.upsert_counting(node, wall, now, &mut 0).expect("there is room")
    }

    fn upsert_counting(
        &mut self,
        node: &Node,
        wall: UnixTime,
        now: Instant,
        cut: &mut u64,
    ) -> Option<Upserted> {
        let (facts, facts_cut) = Facts::pack(node);
        let (caps, caps_cut) = self.caps.of(&node.cap_map);
        *cut += u64::from(facts_cut) + u64::from(caps_cut);
        let peer = Peer {
            id: node.id,
            key: node.key,
            disco: node.disco_key,
            home: node.home_derp,
            wireguard_only: node.is_wireguard_only,
            jailed: node.is_jailed,
            unsigned: node.unsigned_peer_api_only,
            expired: node.expired,
            online: node.online,
            key_expiry: node.key_expiry,
            caps,
            facts,
            since: now,
            newest_initiation: Timestamp::default(),
            mark: self.mark,
            masks: None,
            offer: None,
            active: None,
        };
        self.put(peer, wall, now)
    }

    fn patch(&mut self, patch: &PeerChange, wall: UnixTime, now: Instant, changes: &mut PeerChanges) {
        let caps = patch.cap_map.as_ref().map(|caps| self.caps.of(caps));
        let Some(old) = self.known(patch.node_id).and_then(|slot| self.get(slot)) else {
            changes.unknown += 1;
            return;
        };
        let (facts, cut) = match &patch.endpoints {
            Some(endpoints) => old.facts.with_endpoints(endpoints),
            None => (old.facts.clone(), 0),
        };
        changes.ignored += u64::from(cut) + caps.as_ref().map_or(0, |(_, cut)| u64::from(*cut));
        let new = Peer {
            id: old.id,
            key: patch.key.filter(|key| !key.is_zero()).unwrap_or(old.key),
            disco: patch.disco_key.filter(|key| !key.is_zero()).unwrap_or(old.disco),
            home: if patch.derp_region.is_some() { patch.derp_region } else { old.home },
            wireguard_only: old.wireguard_only,
            jailed: old.jailed,
            unsigned: old.unsigned,
            expired: old.expired,
            online: patch.online.or(old.online),
            // Go's zero time says "never".
            key_expiry: match patch.key_expiry {
                Some(expiry) => (expiry.as_millis() > 0).then_some(expiry),
                None => old.key_expiry,
            },
            caps: caps.map_or_else(|| old.caps.clone(), |(caps, _)| caps),
            facts,
            since: old.since,
            newest_initiation: Timestamp::default(),
            mark: old.mark,
            masks: None,
            offer: None,
            active: None,
        };
        let upserted = self.put(new, wall, now);
        changes.note(upserted);
    }

    /// Takes over the disco key that a peer itself has told.
    pub(crate) fn set_disco(
        &mut self,
        slot: Slot,
        disco: DiscoPublic,
        wall: UnixTime,
        now: Instant,
        changes: &mut PeerChanges,
    ) {
        let Some(peer) = self.get(slot) else { return };
        let patch = PeerChange { node_id: peer.id, disco_key: Some(disco), ..PeerChange::default() };
        self.patch(&patch, wall, now, changes);
    }

    /// The peer with this number, unless it only waits to be swept out.
    pub(super) fn known(&self, id: NodeId) -> Option<Slot> {
        let slot = self.slot(id)?;
        let stale = |sweep: &Sweep| self.get(slot).is_none_or(|peer| peer.mark < sweep.mark);
        (!self.sweep.as_ref().is_some_and(stale)).then_some(slot)
    }

    fn remove_noting(&mut self, slot: Slot, changes: &mut PeerChanges) {
        if let Some(peer) = self.vacate(slot) {
            changes.removed.push((peer.id, slot, peer.active));
        }
    }
}

fn count(items: impl Iterator) -> u64 {
    u64::try_from(items.count()).unwrap_or(u64::MAX)
}
