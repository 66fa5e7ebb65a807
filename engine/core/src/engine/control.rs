//! What control says, put into force.

use super::*;
use crate::filter::Filter;
use crate::netmap::NetMapChange;

impl Engine {
    /// News of the control session.
    pub fn handle_control(&mut self, event: ControlEvent, now: Instant, out: &mut Outbox) {
        match event {
            ControlEvent::SessionStarted => {
                self.control_connected = true;
                self.netmap.begin_session();
            }
            ControlEvent::SessionLost => self.control_connected = false,
            ControlEvent::Map(message) => {
                let wall = self.wall(now);
                let clock = self.netmap.control_time(wall);
                match self.netmap.apply(*message, wall) {
                    Ok(mut change) => {
                        self.control_heard = true;
                        if let Some(request) = change.ping_request.take() {
                            self.answer_control(&request, now, out);
                        }
                        for slot in self.apply(change, now) {
                            self.hasten(slot, now, out);
                        }
                    }
                    Err(error) => tracing::warn!(%error, "map message ignored"),
                }
                if self.netmap.control_time(wall) != clock {
                    let slots: Vec<Slot> = self.by_index.values().copied().collect();
                    slots.into_iter().for_each(|slot| self.watch_expiry(slot, now));
                }
            }
        }
    }

    /// The peers that may now be reachable where they were not.
    pub(super) fn apply(&mut self, change: NetMapChange, now: Instant) -> Vec<Slot> {
        let mut moved = Vec::new();
        let mut unsigned_changed = false;
        let wall = self.netmap.control_time(self.wall(now));
        for node in &change.removed {
            if let Some(slot) = self.peers.slot(node.id) {
                self.deactivate(slot);
                self.peers.remove(node.id);
            }
            self.dns.remove(node.id);
            unsigned_changed |= self.unsigned.remove(&node.id);
        }
        for id in &change.changed {
            let Some(node) = self.netmap.peer(*id) else { continue };
            self.dns.upsert(node);
            let expired = node.is_expired(wall);
            unsigned_changed |= if node.unsigned_peer_api_only {
                self.unsigned.insert(*id);
                true
            } else {
                self.unsigned.remove(id)
            };
            let update = self.peers.upsert(node, expired, now);
            if let Some(active) = update.dropped {
                self.forget(update.slot, &active);
            }
            if update.moved {
                moved.push(update.slot);
            }
            self.watch_expiry(update.slot, now);
        }
        self.follow_routes(&change);
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
        if change.self_changed || change.filter_changed || unsigned_changed {
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
            || change.dial_plan_changed
            || !change.changed.is_empty()
            || !change.removed.is_empty();
        if worth_keeping {
            self.snapshot_dirty(now);
        }
        moved
    }

    /// Puts the rules in force; all or none of them. A peer that no tailnet lock signature covers may not
    /// be let in by the word of the control server alone, so rules that would are not believed at all.
    fn apply_filter(&mut self) {
        let mut own = self.netmap.self_node().map(|n| n.addresses.clone()).unwrap_or_default();
        own.extend_from_slice(&self.own_routes);
        let unsigned = self.unsigned.iter().filter_map(|id| self.netmap.peer(*id));
        let nets: Vec<ipnet::IpNet> = unsigned.flat_map(|node| node.allowed_ips.iter().copied()).collect();
        let discard = crate::filter::admits_any(self.netmap.rules(), &nets);
        if discard && !self.filter_discarded {
            tracing::warn!("the packet filter lets in peers that tailnet lock does not vouch for: not used");
        }
        self.filter_discarded = discard;
        let chunks = self.netmap.packet_filter().filter(|_| !discard).into_iter().flatten();
        let chunks = chunks.map(|(name, rules)| (name.as_str(), rules.as_slice()));
        self.filter.set_filter(Filter::of_chunks(chunks, &own));
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
