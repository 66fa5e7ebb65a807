//! Disco, STUN, and what control is told about where we are.

use super::load::{CALLS_HEARD, PINGS_ANSWERED};
use super::*;
use crate::batch::DerpDestination;
use crate::disco::Message;
use crate::key::DiscoPublic;
use crate::netcheck::{self, Changed};
use crate::stun;
use crate::tailcfg::NetInfo;
use std::net::Ipv4Addr;

/// Changes are gathered for so long, and reports kept so far apart.
const REPORT_AFTER: Duration = Duration::from_millis(50);
const REPORT_EVERY: Duration = Duration::from_secs(1);
const MAX_ENDPOINTS: usize = 32;

/// What was reported, without latencies, which never stay the same.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Reported {
    endpoints: Vec<(SocketAddr, EndpointType)>,
    home: RegionId,
    varies: Option<bool>,
    udp: bool,
}

impl Engine {
    pub(super) fn handle_disco(
        &mut self,
        via: Via,
        sender: &DiscoPublic,
        packet: &mut [u8],
        now: Instant,
        out: &mut Outbox,
    ) {
        let opened = self.open_disco(via, sender, packet, now);
        let (slot, message) = match opened.and_then(|(slot, message)| self.heed(slot, message, now)) {
            Ok(opened) => opened,
            Err(reason) => return self.counters.drop(reason, 1),
        };
        if let (Via::Derp(region, _), Some(active)) = (via, self.active(slot)) {
            active.path.heard = Some(region);
        }
        match (message, via) {
            (Message::Ping { tx, .. }, Via::Udp(from)) => {
                self.send_disco(slot, via, &Message::Pong { tx, observed: from }, now, out);
                self.with_path(slot, now, out, |path, ctx| path.handle_ping(from, ctx));
                self.hasten(slot, now, out);
            }
            (Message::Ping { tx, .. }, Via::Derp(region, _)) => {
                // The address that stands for a relay in this protocol.
                let port = u16::try_from(region.0).unwrap_or_default();
                let observed = SocketAddr::from((Ipv4Addr::new(127, 3, 3, 40), port));
                self.send_disco(slot, via, &Message::Pong { tx, observed }, now, out);
                self.hasten(slot, now, out);
            }
            (Message::Pong { tx, .. }, via) if self.pong(&tx, via, now) => {}
            (Message::Pong { tx, .. }, Via::Udp(_)) => self.handle_pong(slot, &tx, now, out),
            (Message::CallMeMaybe { endpoints }, Via::Derp(..)) => {
                self.with_path(slot, now, out, |path, ctx| path.handle_call(&endpoints, ctx));
                self.hasten(slot, now, out);
            }
            (Message::Pong { .. }, Via::Derp(..)) | (Message::CallMeMaybe { .. }, Via::Udp(_)) => {}
            (Message::Other(_), _) => {}
        }
        self.schedule(slot);
    }

    fn open_disco(
        &mut self,
        via: Via,
        sender: &DiscoPublic,
        packet: &mut [u8],
        now: Instant,
    ) -> Result<(Slot, Message), DropReason> {
        let slot = match via {
            // The relay vouches for the node key, which tells apart nodes that share a disco key.
            Via::Derp(_, source) => {
                self.peers.by_key(&source).filter(|s| self.peers.get(*s).is_some_and(|p| p.disco == *sender))
            }
            Via::Udp(_) => self.peers.by_disco(sender),
        };
        let slot = slot.ok_or(DropReason::UnknownDisco)?;
        let message = match self.active(slot).and_then(|a| a.shared.as_ref()) {
            Some(shared) => shared.open(packet).map_err(|_| DropReason::BadDisco)?,
            None => {
                let shared = self.load.disco_key(&self.disco_key, sender, via, now);
                let message = shared.ok_or(DropReason::UnderLoad)?.open(packet);
                let message = message.map_err(|_| DropReason::BadDisco)?;
                if !self.activate(slot, now) {
                    return Err(DropReason::UnknownDisco);
                }
                message
            }
        };
        if let Message::Ping { node_key: Some(key), .. } = &message {
            let named = self.peers.by_key(key).ok_or(DropReason::UnknownDisco)?;
            if named != slot {
                let same = self.peers.get(named).is_some_and(|p| p.disco == *sender);
                let known = same && self.activate(named, now);
                return known.then_some((named, message)).ok_or(DropReason::UnknownDisco);
            }
        }
        Ok((slot, message))
    }

    /// Whether an authentic peer still may ask for what it asks for.
    fn heed(&mut self, slot: Slot, message: Message, now: Instant) -> Result<(Slot, Message), DropReason> {
        let Some(active) = self.active(slot) else { return Err(DropReason::UnknownDisco) };
        let heeded = match &message {
            Message::Ping { .. } => active.pings.take(PINGS_ANSWERED, now),
            Message::CallMeMaybe { .. } => active.calls.take(CALLS_HEARD, now),
            Message::Pong { .. } | Message::Other(_) => true,
        };
        heeded.then_some((slot, message)).ok_or(DropReason::DiscoFlood)
    }

    fn handle_pong(&mut self, slot: Slot, tx: &disco::TxId, now: Instant, out: &mut Outbox) {
        let Some(active) = self.active(slot) else { return };
        if !active.path.handle_pong(tx, now) {
            return;
        }
        let (best, message) = (active.path.best(), active.tunnel.current_initiation().copied());
        tracing::debug!(peer = self.short_key(slot), path = ?best, "direct path");
        // A handshake under way need not wait for its next try to use the new path.
        if let (Some(best), Some(message)) = (best, message)
            && !self.hasten(slot, now, out)
        {
            out.udp.push(best, &message);
        }
        self.snapshot_dirty(now);
    }

    pub(super) fn send_disco(
        &mut self,
        slot: Slot,
        via: Via,
        message: &Message,
        now: Instant,
        out: &mut Outbox,
    ) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let (key, disco) = (peer.key, peer.disco);
        let Some(active) = peer.active.as_deref_mut() else { return };
        if disco.is_zero() {
            return;
        }
        let shared = active.shared.get_or_insert_with(|| disco::SharedKey::new(&self.disco_key, &disco));
        self.scratch.clear();
        shared.seal(&self.disco_public, self.random.bytes(), message, &mut self.scratch);
        match via {
            Via::Udp(to) => {
                out.udp.push(to, &self.scratch);
            }
            Via::Derp(region, _) => {
                let to = DerpDestination { region, peer: key };
                self.relays.send(to, &self.scratch, now, out, &mut self.events);
            }
        }
    }

    /// Does what a path asked for.
    pub(super) fn act(&mut self, slot: Slot, now: Instant, out: &mut Outbox) {
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            match action {
                Action::Ping { to, txid } => {
                    let message = Message::Ping { tx: txid, node_key: Some(self.node_key.public()) };
                    self.send_disco(slot, Via::Udp(to), &message, now, out);
                }
                Action::CallMeMaybe => self.call_me_maybe(slot, now, out),
            }
        }
        self.actions = actions;
    }

    fn call_me_maybe(&mut self, slot: Slot, now: Instant, out: &mut Outbox) {
        if self.endpoints.is_empty() {
            return;
        }
        let endpoints = self.endpoints.iter().map(|(addr, _)| *addr).collect();
        let Some(peer) = self.peers.get(slot) else { return };
        let region = if self.relays.knows(peer.home) { peer.home } else { self.relays.home() };
        if region.is_some() {
            let via = Via::Derp(region, peer.key);
            self.send_disco(slot, via, &Message::CallMeMaybe { endpoints }, now, out);
        }
    }

    /// The underlay's addresses and the ports that the UDP sockets are bound to; `None` without a socket
    /// of the family.
    pub fn handle_underlay(
        &mut self,
        addresses: &[IpAddr],
        port_v4: Option<u16>,
        port_v6: Option<u16>,
        now: Instant,
        out: &mut Outbox,
    ) {
        let mut addresses = addresses.to_vec();
        addresses.sort_unstable();
        addresses.dedup();
        addresses.truncate(MAX_ENDPOINTS);
        let new = Underlay { known: true, addresses, port_v4, port_v6 };
        if new != self.underlay {
            let first = !self.underlay.known;
            self.underlay = new;
            if !first {
                self.netcheck.restart(now);
            }
            self.refresh_endpoints(now, out);
            if !first {
                self.relays.handle_moved(now, &mut self.events);
                self.restart_paths(now, out);
            }
        }
        self.greet_peers(now, out);
    }

    /// What was known about paths began at an address we no longer have.
    fn restart_paths(&mut self, now: Instant, out: &mut Outbox) {
        let slots: Vec<Slot> = self.by_index.values().copied().collect();
        for slot in slots {
            self.with_path(slot, now, out, |path, ctx| path.move_away(ctx));
            self.schedule(slot);
        }
    }

    /// Answer to [`Event::Resolve`]; none when the name has no address or nobody knows.
    pub fn handle_resolved(&mut self, host: &str, addresses: &[IpAddr], now: Instant, out: &mut Outbox) {
        self.with_netcheck(now, out, |netcheck, ctx| {
            netcheck.set_resolved(host, addresses, ctx);
            Changed::default()
        });
    }

    pub(super) fn handle_stun(&mut self, datagram: &[u8], now: Instant, out: &mut Outbox) {
        let Ok((txid, mapped)) = stun::parse_response(datagram) else {
            self.counters.drop(DropReason::UnknownDatagram, 1);
            return;
        };
        let changed = self.netcheck.handle_response(&txid, mapped, now);
        self.apply_netcheck(changed, now, out);
    }

    pub(super) fn netcheck_timeout(&mut self, now: Instant, out: &mut Outbox) {
        let home = self.relays.home();
        self.with_netcheck(now, out, |netcheck, ctx| netcheck.handle_timeout(home, ctx));
    }

    fn with_netcheck(
        &mut self,
        now: Instant,
        out: &mut Outbox,
        call: impl FnOnce(&mut Netcheck, &mut netcheck::Context<'_>) -> Changed,
    ) {
        let mut ctx = netcheck::Context {
            now,
            random: &mut self.random,
            requests: &mut self.stun_requests,
            resolve: &mut self.to_resolve,
            v4: self.underlay.v4(),
            v6: self.underlay.v6(),
        };
        let changed = call(&mut self.netcheck, &mut ctx);
        for request in self.stun_requests.drain(..) {
            out.udp.push(request.to, &stun::request(&request.txid));
        }
        self.events.extend(self.to_resolve.drain(..).map(|host| Event::Resolve { host }));
        let measure = self.netcheck.take_to_measure().map(|region| Event::HttpsLatency { region });
        self.events.extend(measure);
        self.apply_netcheck(changed, now, out);
    }

    fn apply_netcheck(&mut self, changed: Changed, now: Instant, out: &mut Outbox) {
        if changed.endpoints {
            self.refresh_endpoints(now, out);
        }
        if changed.home {
            self.choose_home(now);
        }
        if changed != Changed::default() {
            self.report_soon(now);
        }
    }

    pub(super) fn choose_home(&mut self, now: Instant) {
        let current = self.relays.home();
        let home = self.netcheck.choose_home(current, self.relays.last_heard(current), self.home_salt(), now);
        if self.relays.prefer(home, now, &mut self.events) && home != current {
            self.home_changed(now);
        }
    }

    fn home_salt(&self) -> u64 {
        self.node_key.public().as_bytes().first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
    }

    pub(super) fn home_changed(&mut self, now: Instant) {
        self.report_soon(now);
        self.snapshot_dirty(now);
    }

    /// Home is down: the nearest others take its place.
    pub(super) fn look_for_home(&mut self, now: Instant) {
        let others = self.netcheck.nearest(self.relays.home(), self.home_salt());
        if self.relays.stand_by(&others, now, &mut self.events) {
            self.home_changed(now);
        }
    }

    /// Answer to [`Event::HttpsLatency`]; `None` when the region's servers did not answer.
    pub fn handle_https_latency(&mut self, region: RegionId, latency: Option<Duration>, now: Instant) {
        if self.netcheck.handle_https(region, latency) {
            self.choose_home(now);
            self.report_soon(now);
        }
    }

    fn refresh_endpoints(&mut self, now: Instant, out: &mut Outbox) {
        let mut endpoints: Vec<(SocketAddr, EndpointType)> = Vec::new();
        let mut add = |addr: SocketAddr, kind| {
            if crate::path::usable(addr) && !endpoints.iter().any(|(e, _)| *e == addr) {
                endpoints.push((addr, kind));
            }
        };
        let [mapped_v4, mapped_v6] = self.netcheck.mapped();
        for mapped in [mapped_v4, mapped_v6].into_iter().flatten() {
            add(mapped, EndpointType::Stun);
        }
        if let (Some(true), Some(mapped), Some(port)) =
            (self.netcheck.mapping_varies(), mapped_v4, self.underlay.port_v4)
        {
            // A NAT like that may still forward our own port if somebody told it to.
            add(SocketAddr::new(mapped.ip(), port), EndpointType::Stun4LocalPort);
        }
        for ip in &self.underlay.addresses {
            let port = if ip.is_ipv4() { self.underlay.port_v4 } else { self.underlay.port_v6 };
            if let Some(port) = port {
                add(SocketAddr::new(*ip, port), EndpointType::Local);
            }
        }
        endpoints.truncate(MAX_ENDPOINTS);
        if endpoints == self.endpoints {
            return;
        }
        self.endpoints = endpoints;
        self.report_soon(now);
        let called: Vec<Slot> = self
            .by_index
            .values()
            .copied()
            .filter(|slot| {
                let active = self.peers.get(*slot).and_then(|p| p.active.as_ref());
                active.is_some_and(|a| a.path.called_recently(now))
            })
            .collect();
        for slot in called {
            self.call_me_maybe(slot, now, out);
        }
    }

    pub(super) fn report_soon(&mut self, now: Instant) {
        if self.report_at.is_none() {
            let spaced = self.last_report.map_or(now, |at| at + REPORT_EVERY);
            self.report_at = Some(spaced.max(now + REPORT_AFTER));
        }
    }

    pub(super) fn report(&mut self, now: Instant) {
        self.report_at = None;
        let report = Reported {
            endpoints: self.endpoints.clone(),
            home: self.relays.home(),
            varies: self.netcheck.mapping_varies(),
            udp: self.netcheck.udp_works(),
        };
        if self.reported.as_ref() != Some(&report) {
            self.reported = Some(report);
            self.last_report = Some(now);
            self.events.push_back(Event::HostUpdate);
        }
    }

    /// What control must know about this node's reachability.
    #[must_use]
    pub fn host_update(&self) -> HostUpdate {
        let [_, mapped_v6] = self.netcheck.mapped();
        let mut net_info = NetInfo {
            mapping_varies_by_dest_ip: self.netcheck.mapping_varies(),
            working_ipv6: Some(mapped_v6.is_some()),
            os_has_ipv6: Some(self.underlay.port_v6.is_some()),
            working_udp: Some(self.netcheck.udp_works()),
            preferred_derp: self.relays.home(),
            ..NetInfo::default()
        };
        for (region, v4, v6) in self.netcheck.latencies() {
            for (latency, family) in [(v4, "v4"), (v6, "v6")] {
                if let Some(latency) = latency {
                    net_info.derp_latency.insert(format!("{region}-{family}"), latency.as_secs_f64());
                }
            }
        }
        HostUpdate {
            endpoints: self.endpoints.clone(),
            net_info,
            disco: self.disco_public,
            exit_node_id: self.exit_node_id().unwrap_or_default(),
        }
    }
}
