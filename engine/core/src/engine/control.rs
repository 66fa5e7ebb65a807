//! What control says, put into force.

use super::*;
use crate::filter::{Filter, FilterBuild};
use crate::netmap::NetMapChange;
use crate::peer::PeerChanges;

/// Entries of the filter's tables made in one go: about a tenth of a millisecond.
const FILTER_PORTION: usize = 4096;

impl Engine {
    /// News of the control session.
    pub fn handle_control(&mut self, event: ControlEvent, now: Instant, out: &mut Outbox) {
        match event {
            ControlEvent::SessionStarted => {
                self.control_connected = true;
                self.netmap.begin_session();
                self.peers.forget_message();
            }
            ControlEvent::SessionLost => self.control_connected = false,
            ControlEvent::PeersUnfinished => self.peers.forget_message(),
            ControlEvent::Peers { list, nodes } => {
                let wall = self.netmap.control_time(self.wall(now));
                let mut peers = PeerChanges::default();
                self.peers.take(list, &nodes, wall, now, &mut peers);
                self.apply_peers(peers, now, out);
            }
            ControlEvent::Map(mut message) => {
                let wall = self.wall(now);
                let clock = self.netmap.control_time(wall);
                match self.netmap.apply(&mut message, wall) {
                    Ok(mut change) => {
                        self.control_heard = true;
                        if let Some(request) = change.ping_request.take() {
                            self.answer_control(&request, now, out);
                        }
                        let mut peers = PeerChanges::default();
                        if change.keep_alive {
                            self.peers.forget_message();
                        } else {
                            let wall = self.netmap.control_time(wall);
                            self.peers.finish(&message, change.session, wall, now, &mut peers);
                        }
                        self.apply_peers(peers, now, out);
                        self.apply(change, now);
                    }
                    Err(error) => {
                        self.peers.forget_message();
                        tracing::warn!(%error, "map message ignored");
                    }
                }
                if self.netmap.control_time(wall) != clock {
                    let slots: Vec<Slot> = self.by_index.values().copied().collect();
                    slots.into_iter().for_each(|slot| self.watch_expiry(slot, now));
                }
            }
        }
    }

    /// More of what a full map leaves to be done, in portions that packets can wait for.
    pub(super) fn sweep_peers(&mut self, now: Instant, out: &mut Outbox) {
        if !self.peers.is_sweeping() {
            return;
        }
        let mut peers = PeerChanges::default();
        self.peers.sweep(&mut peers);
        self.apply_peers(peers, now, out);
    }

    pub(super) fn apply_peers(&mut self, changes: PeerChanges, now: Instant, out: &mut Outbox) {
        self.counters.map_ignored += changes.ignored;
        self.counters.map_unknown += changes.unknown;
        self.follow_routes(&changes);
        if changes.changed.is_empty() && changes.removed.is_empty() {
            return;
        }
        let mut unsigned_changed = false;
        for (id, slot, active) in changes.removed {
            if let Some(active) = active {
                self.forget(slot, &active);
            }
            self.dns.remove(id);
            unsigned_changed |= self.unsigned.remove(&id);
        }
        for slot in changes.renamed {
            if let Some(peer) = self.peers.get(slot) {
                self.dns.upsert(&peer.to_node());
            }
        }
        for (slot, active) in changes.dropped {
            self.forget(slot, &active);
        }
        for slot in changes.changed {
            let Some(peer) = self.peers.get(slot) else { continue };
            let id = peer.id;
            unsigned_changed |= if peer.unsigned {
                self.unsigned.insert(id);
                true
            } else {
                self.unsigned.remove(&id)
            };
            self.watch_expiry(slot, now);
        }
        if unsigned_changed {
            // Before any packet of theirs.
            self.apply_filter();
        }
        // The peers that may now be reachable where they were not.
        for slot in changes.moved {
            // The shared key went with the old disco key, and a process that has a new one has no sessions:
            // without traffic of its own it would tell us nothing until we miss its answers for 15 s.
            let restarted = self
                .active(slot)
                .is_some_and(|a| a.shared.is_none() && a.tunnel.ready(now) && a.path.active(now));
            if !restarted || !self.initiate(slot, false, now, out) {
                self.hasten(slot, now, out);
            }
        }
        self.snapshot_dirty(now);
    }

    pub(super) fn apply(&mut self, change: NetMapChange, now: Instant) {
        self.counters.map_ignored += change.ignored;
        if change.self_changed {
            self.apply_self();
        }
        if (change.self_changed || change.dns_changed)
            && let Some(node) = self.netmap.self_node()
        {
            let none = crate::tailcfg::DnsConfig::default();
            self.dns.configure(node, self.netmap.dns().unwrap_or(&none));
            self.dns.upsert(node);
        }
        if change.self_changed || change.filter_changed {
            self.apply_filter();
        }
        if change.derp_changed {
            self.netcheck.set_map(self.netmap.derp_map(), now);
            let known = self.netmap.derp_map().iter().map(|(region, _)| region).collect();
            self.relays.set_known(known, &mut self.events);
            if self.netcheck.only_choice() || self.relays.home().is_some() {
                // Nothing to measure before the one home there can be is taken, or to leave one that went.
                self.choose_home(now);
            }
        }
        let worth_keeping = change.session
            || change.self_changed
            || change.dns_changed
            || change.derp_changed
            || change.filter_changed
            || change.dial_plan_changed;
        if worth_keeping {
            self.snapshot_dirty(now);
        }
    }

    /// Puts the rules in force; all or none of them. A peer that no tailnet lock signature covers may not
    /// be let in by the word of the control server alone, so rules that would are not believed at all.
    fn apply_filter(&mut self) {
        let mut own = self.netmap.self_node().map(|n| n.addresses.clone()).unwrap_or_default();
        own.extend_from_slice(&self.own_routes);
        let unsigned = self.unsigned.iter().filter_map(|id| self.peers.get(self.peers.slot(*id)?));
        let allowed = unsigned.flat_map(|peer| peer.facts.allowed_ips());
        let nets: Vec<ipnet::IpNet> = allowed.map(|(net, _)| net).collect();
        let discard = crate::filter::admits_any(self.netmap.rules(), &nets);
        if discard && !self.filter_discarded {
            tracing::warn!("the packet filter lets in peers that tailnet lock does not vouch for: not used");
        }
        self.filter_discarded = discard;
        if discard {
            self.filter_build = None;
            self.filter_again = false;
            self.filter.set_filter(Filter::compile(None, &own));
            return;
        }
        let chunks = self.netmap.packet_filter().into_iter().flatten();
        let chunks = chunks.map(|(name, rules)| (name.as_str(), rules.as_slice()));
        let mut build = FilterBuild::begin(chunks, &own);
        if build.go_on(FILTER_PORTION) {
            self.filter_build = None;
            self.filter_again = false;
            self.filter.set_filter(build.finish());
        } else if self.filter_build.is_some() {
            // Changes that come faster than they can be followed must not keep all of them out of force.
            self.filter_again = true;
        } else {
            self.filter_build = Some(build);
        }
    }

    /// Puts more of a filter together, in portions that packets can wait for. The one before it is in force
    /// until it is whole.
    pub(super) fn continue_filter(&mut self) {
        let Some(mut build) = self.filter_build.take() else { return };
        if !build.go_on(FILTER_PORTION) {
            self.filter_build = Some(build);
            return;
        }
        self.filter.set_filter(build.finish());
        if std::mem::take(&mut self.filter_again) {
            self.apply_filter();
        }
    }

    fn own_addresses(&self) -> impl Iterator<Item = std::net::IpAddr> {
        self.netmap.self_node().into_iter().flat_map(|node| node.addresses.iter().map(ipnet::IpNet::addr))
    }

    fn apply_self(&mut self) {
        let Some(node) = self.netmap.self_node() else { return };
        self.running = true;
        self.own = node.addresses.iter().map(ipnet::IpNet::addr).collect();
        let beyond = node.allowed_ips.iter().filter(|net| !node.addresses.contains(net));
        self.own_routes = beyond.copied().collect();
        let first = |v4| self.own_addresses().find(|ip| ip.is_ipv4() == v4);
        self.native = [first(true), first(false)];
        self.key_expired = false;
        self.events.push_back(Event::SelfChanged);
    }
}
