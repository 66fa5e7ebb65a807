//! From the pod to peers.

use super::*;
use crate::batch::DerpDestination;
use crate::nat::{self, Side};
use crate::offload::{Segments, VnetHeader};
use crate::packet::Parsed;
use crate::path::{Context, Route};
use crate::wg::{INITIATION_LEN, OVERHEAD};

/// What became of a packet that should be encrypted.
enum Sent {
    Yes { rekey: bool },
    NoSession,
    Dropped(DropReason),
}

impl Engine {
    /// Packets from the pod, with what the kernel says of each ([`VnetHeader`]; `()`: plain ones). How many
    /// packets for the wire they are.
    pub fn handle_tun<H: Copy + Into<VnetHeader>>(
        &mut self,
        packets: &mut Batch<H>,
        now: Instant,
        out: &mut Outbox,
    ) -> u64 {
        let mut count = 0;
        for (header, packet) in packets {
            let mut packets = 1;
            let cut = Segments::new(&header.into(), packet);
            let result = match cut {
                Ok(segments) => {
                    packets = segments.remaining();
                    self.route_packets(segments, now, out)
                }
                Err(_) => Err(DropReason::Malformed),
            };
            if let Err(reason) = result {
                self.counters.drop(reason, packets);
            }
            count += u64::try_from(packets).unwrap_or(0);
        }
        count
    }

    /// One packet that waited for a handshake in another process.
    pub(super) fn route_packet(
        &mut self,
        packet: &mut [u8],
        now: Instant,
        out: &mut Outbox,
    ) -> Result<(), DropReason> {
        let segments = Segments::new(&VnetHeader::PLAIN, packet).map_err(|_| DropReason::Malformed)?;
        self.route_packets(segments, now, out)
    }

    /// Packets of one flow, which goes where its first one goes.
    fn route_packets(
        &mut self,
        mut segments: Segments<'_>,
        now: Instant,
        out: &mut Outbox,
    ) -> Result<(), DropReason> {
        if segments.longest() > self.mtu {
            return Err(DropReason::TooBig);
        }
        let Some(packet) = segments.next() else { return Ok(()) };
        let parsed = Parsed::parse(packet).map_err(super::inbound::unreadable)?;
        if !self.own.contains(&parsed.src) && !self.own_routes.iter().any(|net| net.contains(&parsed.src)) {
            return Err(DropReason::SourceNotOurs);
        }
        if is_service(parsed.dst) {
            return Err(DropReason::ServiceAddress);
        }
        // Nodes speak TSMP, pods do not.
        if parsed.protocol == crate::packet::protocol::TSMP {
            return Err(DropReason::Tsmp);
        }
        let slot = self.peers.by_ip(parsed.dst).ok_or_else(|| self.why_no_peer())?;
        if self.active(slot).is_none() && !self.load.admit_peer(self.by_index.len(), now) {
            return Err(DropReason::TooManyPeers);
        }
        if !self.activate(slot, now) {
            return Err(self.obstacle(slot, now).unwrap_or(DropReason::NoPeer));
        }
        self.filter.note_out(&parsed);
        let mask = self.mask(slot, parsed.src);
        let mut next = Some(packet);
        while let Some(packet) = next {
            if let Some(mask) = mask
                && let Ok(mut parsed) = Parsed::parse(packet)
            {
                nat::rewrite(packet, &mut parsed, Side::Source, mask);
            }
            if let Err(reason) = self.send_data(slot, packet, now, out) {
                // Its own loss; those behind it may find room.
                self.counters.drop(reason, 1);
            }
            next = segments.next();
        }
        Ok(())
    }

    /// What the peer at `slot` knows our address `own` as, if that is another.
    pub(super) fn mask(&self, slot: Slot, own: IpAddr) -> Option<IpAddr> {
        let masks = self.peers.get(slot)?.masks.as_deref()?;
        if !self.native.contains(&Some(own)) {
            return None;
        }
        if own.is_ipv4() { masks.v4.map(IpAddr::V4) } else { masks.v6.map(IpAddr::V6) }
    }

    /// Our address that `seen`, as the peer at `slot` writes it, stands for, if it stands for one.
    pub(super) fn unmasked(&self, slot: Slot, seen: IpAddr) -> Option<IpAddr> {
        let masks = self.peers.get(slot)?.masks.as_deref()?;
        let [v4, v6] = self.native;
        match seen {
            IpAddr::V4(seen) => v4.filter(|_| masks.v4 == Some(seen)),
            IpAddr::V6(seen) => v6.filter(|_| masks.v6 == Some(seen)),
        }
    }

    /// Encrypts and sends, or keeps the packet until a handshake is done.
    pub(super) fn send_data(
        &mut self,
        slot: Slot,
        packet: &[u8],
        now: Instant,
        out: &mut Outbox,
    ) -> Result<(), DropReason> {
        let rekey = match self.seal(slot, packet, now, out) {
            Sent::Yes { rekey } => rekey,
            Sent::Dropped(reason) => return Err(reason),
            Sent::NoSession => {
                let full = self.waiting >= MAX_WAITING;
                let Some(active) = self.active(slot) else { return Err(DropReason::NoPeer) };
                if full {
                    return Err(DropReason::HandshakeQueueFull);
                }
                let dropped = active.tunnel.wait(packet, now);
                let attempting = active.tunnel.attempting();
                self.waiting += 1;
                self.waiting -= dropped;
                self.counters.drop(DropReason::HandshakeQueueFull, dropped);
                if attempting {
                    self.note_sent(slot, now, out);
                } else {
                    self.initiate(slot, false, now, out);
                }
                self.schedule(slot);
                return Ok(());
            }
        };
        let len = u64::try_from(packet.len()).unwrap_or_default();
        self.counters.tx_packets += 1;
        self.counters.tx_bytes += len;
        if let Some(active) = self.active(slot) {
            active.last_tx = Some(now);
            active.tx_bytes += len;
        }
        self.note_sent(slot, now, out);
        if rekey {
            self.initiate(slot, false, now, out);
        }
        self.schedule(slot);
        Ok(())
    }

    fn seal(&mut self, slot: Slot, packet: &[u8], now: Instant, out: &mut Outbox) -> Sent {
        let Some(peer) = self.peers.get_mut(slot) else { return Sent::NoSession };
        let (home, key) = (peer.home, peer.key);
        let Some(active) = peer.active.as_deref_mut() else { return Sent::NoSession };
        if !active.tunnel.ready(now) {
            return Sent::NoSession;
        }
        let route = active.path.route(now);
        let to = relay_for(active, home, key, &self.relays, now);
        let need = (packet.len() + OVERHEAD).max(INITIATION_LEN);
        let mut sealed = None;
        if let Some(addr) = route.udp {
            let tunnel = &mut active.tunnel;
            let pushed = out.udp.push_with(addr, need, |buf| {
                sealed = tunnel.seal(packet, buf, now);
                sealed.as_ref().map(|s| s.len)
            });
            match (&sealed, pushed) {
                (Some(sealed), true) => {
                    let rekey = sealed.rekey;
                    self.counters.udp_sent += 1;
                    if let (true, Some(to), Some(copy)) = (route.derp, to, out.udp.last()) {
                        // A copy for safety: its loss is no loss.
                        self.scratch.clear();
                        self.scratch.extend_from_slice(copy);
                        if self.relays.send(to, &self.scratch, now, out, &mut self.events) {
                            self.counters.derp_sent += 1;
                        }
                    }
                    return Sent::Yes { rekey };
                }
                (None, false) if active.tunnel.ready(now) => return Sent::Dropped(DropReason::QueueFull),
                _ => return Sent::NoSession,
            }
        }
        let Some(to) = to.filter(|_| route.derp) else { return Sent::Dropped(DropReason::NoPath) };
        self.scratch.resize(need, 0);
        let Some(sealed) = active.tunnel.seal(packet, &mut self.scratch, now) else { return Sent::NoSession };
        if !self.relays.send(to, &self.scratch[..sealed.len], now, out, &mut self.events) {
            return Sent::Dropped(DropReason::QueueFull);
        }
        self.counters.derp_sent += 1;
        Sent::Yes { rekey: sealed.rekey }
    }

    /// Begins or repeats a handshake. False when it is too early for that.
    pub(super) fn initiate(&mut self, slot: Slot, again: bool, now: Instant, out: &mut Outbox) -> bool {
        let Some(active) = self.active(slot) else { return false };
        let again = again && active.tunnel.attempting();
        let replaces = active.tunnel.ready(now);
        if replaces && self.handover.keeps_sessions() {
            return false;
        }
        let Some(active) = self.active(slot) else { return false };
        if again {
            active.path.try_another();
        }
        let Some(message) = active.tunnel.initiate(now) else { return false };
        if again {
            tracing::debug!(peer = self.short_key(slot), "handshake tried again");
        }
        // What was not answered by one way is tried by both.
        self.transmit(slot, &message, again, None, now, out);
        self.schedule(slot);
        true
    }

    /// Tries a handshake that is not answered again, because there may be a path now that was not there
    /// before. False when there is none, or it is too early: the try then comes as soon as it may.
    pub(super) fn hasten(&mut self, slot: Slot, now: Instant, out: &mut Outbox) -> bool {
        let keeps = self.handover.keeps_sessions();
        let wanted = |a: &&mut Active| a.tunnel.attempting() && !(keeps && a.tunnel.ready(now));
        let Some(active) = self.active(slot).filter(wanted) else { return false };
        let message = active.tunnel.hasten(now);
        if let Some(message) = &message {
            self.transmit(slot, message, true, None, now, out);
        }
        self.schedule(slot);
        message.is_some()
    }

    /// A relay is connected: what could not reach peers through it is sent now.
    pub(super) fn relay_came_up(&mut self, region: RegionId, now: Instant, out: &mut Outbox) {
        let slots: Vec<Slot> = self.by_index.values().copied().collect();
        for slot in slots {
            let Some(peer) = self.peers.get(slot) else { continue };
            let Some(active) = peer.active.as_deref() else { continue };
            let Some(to) = relay_for(active, peer.home, peer.key, &self.relays, now) else { continue };
            let Some(message) = active.tunnel.current_initiation().copied() else { continue };
            if to.region == region && !self.hasten(slot, now, out) {
                self.relays.send(to, &message, now, out, &mut self.events);
                self.counters.derp_sent += 1;
            }
        }
    }

    pub(super) fn send_keepalive(&mut self, slot: Slot, now: Instant, out: &mut Outbox) {
        match self.seal(slot, &[], now, out) {
            Sent::Yes { .. } => self.note_sent(slot, now, out),
            Sent::NoSession | Sent::Dropped(_) => {}
        }
    }

    /// Sends what waited for a session.
    pub(super) fn flush(&mut self, slot: Slot, now: Instant, out: &mut Outbox) {
        while let Some(active) = self.active(slot).filter(|a| a.tunnel.ready(now)) {
            let Some(packet) = active.tunnel.next_waiting() else { return };
            self.waiting = self.waiting.saturating_sub(1);
            if let Err(reason) = self.send_data(slot, &packet, now, out) {
                self.counters.drop(reason, 1);
            }
        }
    }

    /// Sends a finished WireGuard message the way packets go, by both ways if so wished, and straight
    /// back to where the message came from that it answers.
    pub(super) fn transmit(
        &mut self,
        slot: Slot,
        message: &[u8],
        both: bool,
        answers: Option<SocketAddr>,
        now: Instant,
        out: &mut Outbox,
    ) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let (home, key) = (peer.home, peer.key);
        let both = both && !peer.wireguard_only;
        let Some(active) = peer.active.as_deref_mut() else { return };
        let Route { udp, derp } = active.path.route(now);
        let to = relay_for(active, home, key, &self.relays, now).filter(|_| derp || both);
        // The relays are the other process's.
        let to = to.filter(|_| udp.is_none() || !self.handover.is_standby());
        let mut sent = false;
        for addr in [udp, answers.filter(|a| Some(*a) != udp)].into_iter().flatten() {
            sent |= out.udp.push(addr, message);
            self.counters.udp_sent += 1;
        }
        if let Some(to) = to {
            sent |= self.relays.send(to, message, now, out, &mut self.events);
            self.counters.derp_sent += 1;
        }
        if !sent {
            self.counters.drop(DropReason::NoPath, 1);
        }
        self.note_sent(slot, now, out);
        self.schedule(slot);
    }

    fn note_sent(&mut self, slot: Slot, now: Instant, out: &mut Outbox) {
        if self.handover.is_standby() {
            return;
        }
        self.netcheck.note_traffic(now);
        self.with_path(slot, now, out, PathAgent::note_send);
    }

    /// Lets `call` work on a peer's path and does what the path wants.
    pub(super) fn with_path(
        &mut self,
        slot: Slot,
        now: Instant,
        out: &mut Outbox,
        call: impl FnOnce(&mut PathAgent, &mut Context<'_>),
    ) {
        let Some(active) = self.peers.get_mut(slot).and_then(|p| p.active.as_deref_mut()) else { return };
        let mut ctx = Context {
            now,
            random: &mut self.random,
            actions: &mut self.actions,
            v4: self.underlay.v4(),
            v6: self.underlay.v6(),
        };
        call(&mut active.path, &mut ctx);
        if !self.actions.is_empty() {
            self.act(slot, now, out);
        }
    }
}

/// The relay a peer is reached through: where it was last heard as long as that is connected, else its
/// home, else ours; a new home before all.
pub(super) fn relay_for(
    active: &Active,
    home: RegionId,
    peer: NodePublic,
    relays: &Relays,
    now: Instant,
) -> Option<DerpDestination> {
    let moved = active.path.at_home_until.is_some_and(|until| now < until) && relays.is_connected(home);
    let heard = active.path.heard.filter(|region| !moved && relays.is_connected(*region));
    let region = heard.or(Some(home)).filter(|r| relays.knows(*r)).unwrap_or(relays.home());
    region.is_some().then_some(DerpDestination { region, peer })
}

pub(super) fn is_service(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets() == [100, 100, 100, 100],
        IpAddr::V6(ip) => ip.segments() == [0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53],
    }
}
