//! What a restart carries over.

use super::*;
use crate::snapshot::{ActivePeer, Body, Snapshot};
use crate::tailcfg::MapResponse;

/// Peers with a handshake younger than this had a session when the snapshot was made.
const RECENT: Duration = Duration::from_secs(180);
/// Peers greeted after a restart.
const MAX_GREETED: usize = 1024;

impl Engine {
    /// What the next life needs.
    #[must_use]
    pub fn snapshot(&self, now: Instant) -> Snapshot {
        let wall = self.wall(now);
        let active = self.peers.iter().filter_map(|(_, peer)| {
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
                peers: self.netmap.peers().cloned().collect(),
                derp_map: Some(self.netmap.derp_map().clone()),
                dns_config: self.netmap.dns().cloned(),
                packet_filters: self.netmap.packet_filter().map(|chunks| {
                    chunks.iter().map(|(name, rules)| (name.clone(), Some(rules.clone()))).collect()
                }),
                domain: self.netmap.domain().to_owned(),
                control_time: Some(self.netmap.control_time(wall)),
                control_dial_plan: Some(self.netmap.dial_plan().clone()),
                ..MapResponse::default()
            })
        });
        let resolved = self.netcheck.resolved().map(|(host, addrs)| (host.clone(), addrs.clone())).collect();
        let body = Body { wall, home: self.relays.home(), active, resolved, netmap };
        Snapshot { disco: self.disco_key.clone(), body }
    }

    pub(super) fn restore(&mut self, body: Body, now: Instant) {
        self.netcheck.restore_resolved(body.resolved);
        if let Some(netmap) = body.netmap
            && let Ok(change) = self.netmap.apply(*netmap, body.wall)
        {
            self.restored_home(body.home, now);
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
