//! What a restart carries over.

use std::collections::BTreeMap;

use super::*;
use crate::filter::Rule;
use crate::snapshot::{ActivePeer, Body, MAX_RULE_BYTES, Snapshot, SnapshotWriter};
use crate::tailcfg::MapResponse;

/// Peers with a handshake younger than this had a session when the snapshot was made.
const RECENT: Duration = Duration::from_secs(180);
/// Peers greeted after a restart.
const MAX_GREETED: usize = 1024;
/// Places of the peer table written in one go: about a tenth of a millisecond.
const SNAPSHOT_PORTION: usize = 256;

/// By how much a life may have outlived its last snapshot, which follows every handshake within seconds.
const UNRECORDED: Duration = Duration::from_hours(1);

/// What the first initiation is stamped with, given the wall clock, and the wall clock and the stamps of an earlier life's
/// snapshot: peers ignore what is not newer than those, so a clock that was set back since must not be followed. What the
/// stamps were ahead then they stay ahead.
pub(super) fn stamped(wall: UnixTime, earlier: Option<(UnixTime, UnixTime)>) -> UnixTime {
    match earlier {
        None => wall,
        Some((then, stamps)) if wall < then => stamps.max(then).saturating_add(UNRECORDED),
        Some((then, stamps)) => stamps.saturating_add(wall.saturating_since(then)).max(wall),
    }
}

impl Engine {
    /// What the next life needs: all of it at once. It holds the disco private key.
    #[must_use]
    pub fn snapshot(&self, now: Instant) -> Vec<u8> {
        let mut out = Vec::new();
        let mut writer = self.begin_snapshot(now, &mut out);
        while self.continue_snapshot(&mut writer, &mut out) {}
        out
    }

    /// Begins to write what the next life needs; go on with [`Engine::continue_snapshot`]. It holds the
    /// disco private key: keep it where only the engine reads.
    #[must_use]
    pub fn begin_snapshot(&self, now: Instant, out: &mut Vec<u8>) -> SnapshotWriter {
        let wall = self.wall(now);
        let mut first: Vec<Slot> = self.by_index.values().copied().collect();
        first.sort_unstable();
        let active = first.iter().filter_map(|slot| {
            let peer = self.peers.get(*slot)?;
            let active = peer.active.as_ref()?;
            let since = now.saturating_duration_since(active.tunnel.established()?);
            let last_active = wall.offset_millis(-i64::try_from(since.as_millis()).unwrap_or(i64::MAX));
            Some(ActivePeer {
                key: peer.key,
                endpoint: active.path.best(),
                region: active.path.heard.unwrap_or(peer.home),
                last_active,
            })
        });
        let mut active: Vec<ActivePeer> = active.collect();
        active.sort_by_key(|peer| std::cmp::Reverse(peer.last_active));
        active.truncate(MAX_GREETED);
        let netmap = self.netmap.self_node().map(|node| {
            Box::new(MapResponse {
                node: Some(node.clone()),
                derp_map: Some(self.netmap.derp_map().clone()),
                dns_config: self.netmap.dns().cloned(),
                domain: self.netmap.domain().to_owned(),
                control_time: Some(self.netmap.control_time(wall)),
                control_dial_plan: Some(self.netmap.dial_plan().clone()),
                ..MapResponse::default()
            })
        });
        let resolved = self.netcheck.resolved().map(|(host, addrs)| (host.clone(), addrs.clone())).collect();
        let size: usize = self.netmap.rules().map(|rule| 4 + rule.json().len()).sum();
        let filter = self.netmap.packet_filter().filter(|_| size <= MAX_RULE_BYTES);
        let rules = filter.into_iter().flat_map(BTreeMap::values).flatten().cloned().collect();
        let chunks = filter.map(|chunks| {
            let count = |rules: &Vec<Rule>| u32::try_from(rules.len()).unwrap_or_default();
            chunks.iter().map(|(name, rules)| (name.clone(), count(rules))).collect()
        });
        let stamped = self.stamped_at_start.saturating_add(now.saturating_duration_since(self.started));
        let body = Body { wall, stamped, home: self.relays.home(), active, resolved, netmap, chunks };
        SnapshotWriter::begin(&self.disco_key, &body, rules, first, out)
    }

    /// Appends a portion; false when that was the last. What is appended stands behind what was before,
    /// so `out` may be written away and cleared in between.
    pub fn continue_snapshot(&self, writer: &mut SnapshotWriter, out: &mut Vec<u8>) -> bool {
        if writer.add_rules(out) {
            return true;
        }
        for _ in 0..SNAPSHOT_PORTION {
            let slot = match writer.first.get(writer.written_first) {
                Some(slot) => {
                    writer.written_first += 1;
                    *slot
                }
                None => {
                    let Some(slot) = self.peers.place(writer.next) else {
                        writer.end(out);
                        return false;
                    };
                    writer.next += 1;
                    if writer.first.binary_search(&slot).is_ok() {
                        continue;
                    }
                    slot
                }
            };
            if let Some(peer) = self.peers.get(slot)
                && !writer.add(peer, out)
            {
                writer.end(out);
                return false;
            }
        }
        true
    }

    pub(super) fn restore(&mut self, snapshot: Snapshot, now: Instant) {
        let Snapshot { body, rules, peers, .. } = snapshot;
        self.netcheck.restore_resolved(body.resolved);
        let mut rules = rules.into_iter();
        let mut take =
            |count: u32| rules.by_ref().take(usize::try_from(count).unwrap_or(usize::MAX)).collect();
        let chunks = body
            .chunks
            .map(|chunks| chunks.into_iter().map(|(name, count)| (name, Some(take(count)))).collect());
        let netmap = body.netmap.map(|netmap| MapResponse { packet_filters: chunks, ..*netmap });
        if let Some(mut netmap) = netmap
            && let Ok(change) = self.netmap.apply(&mut netmap, body.wall)
        {
            self.restored_home(body.home, now);
            let mut rest = peers.as_slice();
            while let Some(slot) = self.peers.restore(&mut rest, now) {
                if let Some(peer) = self.peers.get(slot) {
                    self.dns.upsert(&peer.to_node());
                    if peer.unsigned {
                        self.unsigned.insert(peer.id);
                    }
                }
            }
            self.find_exit();
            self.apply(change, now);
        }
        for peer in body.active.into_iter().take(MAX_GREETED) {
            let age = self.wall_at_start.saturating_since(peer.last_active);
            let Some(slot) = self.peers.by_key(&peer.key).filter(|_| age <= RECENT) else { continue };
            if !self.activate(slot, now) {
                continue;
            }
            if let (Some(endpoint), Some(active)) = (peer.endpoint, self.active(slot)) {
                active.path.restore(endpoint, now);
            }
            self.greet.push(slot);
        }
    }

    fn restored_home(&mut self, home: RegionId, now: Instant) {
        let known = self.netmap.derp_map().iter().map(|(region, _)| region).collect();
        self.relays.set_known(known, &mut self.events);
        if self.relays.knows(home) {
            self.relays.set_home(home, now, &mut self.events);
        }
    }

    /// Handshakes with the peers that an earlier life had sessions with: they still send to those.
    pub(super) fn greet_peers(&mut self, now: Instant, out: &mut Outbox) {
        for slot in std::mem::take(&mut self.greet) {
            if self.active(slot).is_some_and(|a| !a.tunnel.ready(now)) {
                self.initiate(slot, false, now, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_follow_the_clock_and_are_ahead_of_it_once_it_was_set_back() {
        let hour = 3_600_000;
        let wall = UnixTime::from_secs(1_800_000_000);
        assert_eq!(stamped(wall, None), wall);
        assert_eq!(stamped(wall, Some((wall, wall))), wall);
        let earlier = wall.offset_millis(-5);
        assert_eq!(stamped(wall, Some((earlier, earlier))), wall);
        assert_eq!(stamped(wall, Some((earlier, UnixTime::default()))), wall, "a snapshot without stamps");
        // Set back once; the lives after that keep the lead as it is.
        let later = wall.offset_millis(5000);
        let mut stamps = stamped(wall, Some((later, later)));
        assert_eq!(stamps, later.offset_millis(hour));
        for life in 1..20_i64 {
            let (then, now) = (wall.offset_millis((life - 1) * 7000), wall.offset_millis(life * 7000));
            stamps = stamped(now, Some((then, stamps)));
            assert_eq!(stamps.millis_from(now), hour + 5000, "life {life}");
        }
    }
}
