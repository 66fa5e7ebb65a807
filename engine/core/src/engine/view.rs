//! What others are shown.

use std::collections::BTreeSet;

use super::api::UNANSWERED_AFTER;
use super::*;
use crate::health::{HealthMessage, Severity};
use crate::peer::Peer;
use crate::tailcfg::ControlDialPlan;

impl Engine {
    /// The node as its netmap has it.
    #[must_use]
    pub fn status(&self) -> Status {
        let node = self.netmap.self_node().map(|node| SelfView {
            name: node.name.trim_end_matches('.').to_owned(),
            addresses: node.addresses.clone(),
            tags: node.tags.clone(),
            stable_id: node.stable_id.clone(),
            key_expiry: node.key_expiry,
            machine_authorized: node.machine_authorized,
        });
        let relay = self.relays.health().map(|text| HealthMessage::new(Severity::Medium, text));
        let filter = self.filter_discarded.then(|| {
            let text = "the packet filter lets in peers that tailnet lock does not vouch for and is not used: \
                        sign those peers, or take them out of the policy";
            HealthMessage::new(Severity::High, text)
        });
        Status {
            running: self.running,
            control_connected: self.control_connected,
            node,
            home_derp: self.relays.home(),
            health: self
                .netmap
                .health()
                .chain(relay)
                .chain(filter)
                .chain(
                    self.routing_health().into_iter().map(|text| HealthMessage::new(Severity::Medium, text)),
                )
                .chain(self.dns.problems().map(|text| HealthMessage::new(Severity::Low, text)))
                .chain(self.clock_health())
                .chain(self.lock_health())
                .collect(),
        }
    }

    fn clock_health(&self) -> Option<HealthMessage> {
        let offset = self.netmap.clock_offset_ms();
        let side = if offset > 0 { "behind" } else { "ahead of" };
        let minutes = (offset.unsigned_abs() + 30_000) / 60_000;
        (offset != 0).then(|| {
            HealthMessage::new(
                Severity::Medium,
                format!(
                    "this node's clock is {} h {} min {side} the control server's",
                    minutes / 60,
                    minutes % 60
                ),
            )
            .with_text("set it (NTP): certificates and handshakes after a restart depend on it")
        })
    }

    fn lock_health(&self) -> Option<HealthMessage> {
        let node = self.netmap.self_node().filter(|node| self.netmap.is_locked() && !node.signed)?;
        let message =
            HealthMessage::new(Severity::High, "tailnet lock is on and this node's key is not signed");
        let text =
            format!("peers that enforce the lock do not talk to it: run `tailscale lock sign {}`", node.key);
        Some(HealthMessage { impacts_connectivity: true, ..message.with_text(text) })
    }

    /// Where else the control server can be reached, as it last said.
    #[must_use]
    pub fn dial_plan(&self) -> &ControlDialPlan {
        self.netmap.dial_plan()
    }

    /// One entry per peer.
    #[must_use]
    pub fn peers(&self, now: Instant) -> Vec<PeerView> {
        self.peers.iter().map(|(_, peer)| self.peer_view(peer, now)).collect()
    }

    fn peer_view(&self, peer: &Peer, now: Instant) -> PeerView {
        let active = peer.active.as_deref();
        let age = |at: Option<Instant>| at.map(|at| now.saturating_duration_since(at));
        PeerView {
            id: peer.id,
            key: peer.key,
            name: peer.facts.called(),
            addresses: peer.facts.addresses().map(|net| net.addr()).collect(),
            path: active.map_or(PathView::Idle, |a| self.path_view(a, peer.home, now)),
            handshake_age: age(active.and_then(|a| a.tunnel.established())),
            last_tx_age: age(active.and_then(|a| a.last_tx)),
            last_rx_age: age(active.and_then(|a| a.last_rx)),
            tx_bytes: active.map_or(0, |a| a.tx_bytes),
            rx_bytes: active.map_or(0, |a| a.rx_bytes),
        }
    }

    /// Everything known of the way to the peer that has this address.
    #[must_use]
    pub fn way(&self, ip: IpAddr, now: Instant) -> Option<WayView> {
        let slot = self.peers.by_ip(ip)?;
        let peer = self.peers.get(slot)?;
        let view = |(address, asked_age)| EndpointView {
            address,
            asked_age,
            reachable: if address.is_ipv4() { self.underlay.v4() } else { self.underlay.v6() },
        };
        let endpoints = match peer.active.as_deref() {
            Some(active) => active.path.candidates(now).map(view).collect(),
            None => peer.facts.endpoints().map(|address| view((address, None))).collect(),
        };
        Some(WayView {
            peer: self.peer_view(peer, now),
            home: peer.home,
            online: peer.online,
            endpoints,
            obstacle: self.obstacle(slot, now),
        })
    }

    /// What the network looks like from here, as last measured.
    #[must_use]
    pub fn net_view(&self, now: Instant) -> NetView {
        let mut regions: Vec<RegionView> = self
            .netcheck
            .latencies()
            .map(|(id, v4, v6)| {
                let region = self.netmap.derp_map().region(id);
                RegionView {
                    id,
                    code: region.map(|r| r.region_code.clone()).unwrap_or_default(),
                    name: region.map(|r| r.region_name.clone()).unwrap_or_default(),
                    latency: [v4, v6].into_iter().flatten().min(),
                    connected: self.relays.is_connected(id),
                }
            })
            .collect();
        regions.sort_by_key(|region| (region.latency.unwrap_or(Duration::MAX), region.id));
        NetView {
            udp: self.netcheck.udp_works(),
            mapped: self.netcheck.mapped(),
            mapping_varies: self.netcheck.mapping_varies(),
            endpoints: self.endpoints.iter().map(|(address, _)| *address).collect(),
            home: self.relays.home(),
            regions,
            age: self.netcheck.last_round().map(|at| now.saturating_duration_since(at)),
        }
    }

    pub(super) fn path_view(&self, active: &Active, home: RegionId, now: Instant) -> PathView {
        if let Some((addr, rtt)) = active.path.trusted(now) {
            return PathView::Direct(addr, rtt);
        }
        if !active.path.active(now) {
            return PathView::Idle;
        }
        let to = outbound::relay_for(active, home, self.node_key.public(), &self.relays, now);
        to.map_or(PathView::Idle, |to| PathView::Relay(to.region))
    }

    /// Counters since the start.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Gauges of now.
    #[must_use]
    pub fn gauges(&self, now: Instant) -> Gauges {
        let mut gauges = Gauges {
            peers: self.peers.len(),
            derp_connected: self.relays.connected(),
            home_connected: self.relays.is_connected(self.relays.home()),
            home_latency: self.home_latency(),
            filter_rules: self.filter.filter().rules(),
            filter_skipped: self.filter.filter().skipped(),
            ..Gauges::default()
        };
        for slot in self.by_index.values() {
            let Some(peer) = self.peers.get(*slot) else { continue };
            let Some(active) = peer.active.as_deref() else { continue };
            if active.tunnel.attempted(now).is_some_and(|since| since >= UNANSWERED_AFTER) {
                gauges.peers_unanswered += 1;
                continue;
            }
            match self.path_view(active, peer.home, now) {
                PathView::Direct(_, rtt) => {
                    gauges.peers_direct += 1;
                    let [least, sum, most] = gauges.rtt.unwrap_or([rtt, Duration::ZERO, rtt]);
                    gauges.rtt = Some([least.min(rtt), sum + rtt, most.max(rtt)]);
                }
                PathView::Relay(_) => gauges.peers_relay += 1,
                PathView::Idle => {}
            }
        }
        gauges
    }

    fn home_latency(&self) -> Option<Duration> {
        let home = self.relays.home();
        let (_, v4, v6) = self.netcheck.latencies().find(|(region, ..)| *region == home)?;
        [v4, v6].into_iter().flatten().min()
    }

    /// TCP ports of the servers that the netmap names: relays and name servers. Empty without a relay map.
    #[must_use]
    pub fn tcp_ports(&self) -> BTreeSet<u16> {
        let relays = self.netmap.derp_map().iter().flat_map(|(_, region)| &region.nodes);
        let mut ports: BTreeSet<u16> =
            relays.filter(|node| !node.stun_only).filter_map(|node| node.relay_port()).collect();
        if !ports.is_empty() {
            ports.extend(self.netmap.dns().into_iter().flat_map(crate::dns::server_ports));
        }
        ports
    }

    /// How to reach a region.
    #[must_use]
    pub fn derp_node(&self, region: RegionId) -> Option<&DerpRegion> {
        self.netmap.derp_map().region(region)
    }
}
