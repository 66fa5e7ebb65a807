//! From the underlay and the relays to the pod.

use super::load::Admission;
use super::shield::Fate;
use super::*;
use crate::filter::{self, Verdict};
use crate::nat::{self, Side};
use crate::packet::{Fragment, ParseError, Parsed, protocol};
use crate::stun;
use crate::wg::{Kind, Opened, classify};

/// Holds any handshake message.
const HANDSHAKE_BUF: usize = 256;

/// What came out of a data message.
enum Inner {
    /// The batch for the pod is full.
    NotTaken,
    Rejected(DropReason),
    Keepalive,
    Delivered(usize),
    Denied(DropReason),
    /// A connection that is not let in; the peer may be told.
    Refused(DropReason, tsmp::Answer),
    Tsmp(tsmp::Message),
}

impl Engine {
    /// Datagrams from the underlay, with their sources.
    pub fn handle_udp<'a>(
        &mut self,
        datagrams: impl IntoIterator<Item = (SocketAddr, &'a mut [u8])>,
        now: Instant,
        out: &mut Outbox,
    ) {
        for (from, datagram) in datagrams {
            let from = SocketAddr::new(from.ip().to_canonical(), from.port());
            let (class, dropped) = (self.watch.class(from, datagram), self.counters.dropped);
            let denied = self.watch.denied;
            if datagram.first_chunk() == Some(&[4, 0, 0, 0]) {
                self.handle_wireguard(Via::Udp(from), datagram, now, out);
            } else if stun::is_stun(datagram) {
                self.handle_stun(datagram, now, out);
            } else if let Some(sender) = disco::sender(datagram) {
                self.handle_disco(Via::Udp(from), &sender, datagram, now, out);
            } else {
                self.handle_wireguard(Via::Udp(from), datagram, now, out);
            }
            let fate = match self.counters.dropped > dropped {
                false => Fate::Taken,
                true if self.watch.denied > denied => Fate::Denied,
                true => Fate::Refused,
            };
            if self.watch.note(class, fate, now) {
                self.raise_shield(now);
            }
        }
    }

    /// News of a DERP connection.
    pub fn handle_derp(&mut self, region: RegionId, event: DerpEvent<'_>, now: Instant, out: &mut Outbox) {
        match event {
            DerpEvent::Connected => {
                if self.relays.handle_connected(region, now, out, &mut self.events) {
                    self.home_changed(now);
                }
                self.relay_came_up(region, now, out);
            }
            DerpEvent::Disconnected => self.relays.handle_disconnected(region, now),
            DerpEvent::Heard => self.relays.handle_heard(region, now),
            DerpEvent::Health { problem } => {
                self.relays.handle_heard(region, now);
                self.relays.handle_health(region, problem);
            }
            DerpEvent::PeerGone { peer } => {
                self.relays.handle_heard(region, now);
                if let Some(slot) = self.peers.by_key(&peer)
                    && let Some(peer) = self.peers.get_mut(slot)
                    && let Some(active) = peer.active.as_deref_mut()
                {
                    if active.path.heard == Some(region) {
                        active.path.heard = None;
                    }
                    if peer.home == region {
                        active.path.at_home_until = None;
                    }
                }
            }
            DerpEvent::Packet { source, payload } => {
                self.relays.handle_heard(region, now);
                self.relays.note_use(now);
                let via = Via::Derp(region, source);
                match disco::sender(payload) {
                    Some(sender) => self.handle_disco(via, &sender, payload, now, out),
                    None => self.handle_wireguard(via, payload, now, out),
                }
            }
        }
    }

    pub(super) fn handle_wireguard(&mut self, via: Via, datagram: &mut [u8], now: Instant, out: &mut Outbox) {
        let result = match classify(datagram) {
            Kind::Malformed => Err(DropReason::UnknownDatagram),
            Kind::Initiation => self.handle_initiation(via, datagram, now, out),
            Kind::Indexed(index) => match self.by_index.get(&(index >> 8)).copied() {
                None if self.pass(via, datagram, now, out) => Ok(()),
                Some(slot) if datagram[0] == 4 => self.handle_data(slot, via, datagram, now, out),
                Some(slot) => self.handle_answer(slot, via, datagram, now, out),
                None => {
                    self.nudge(via, now, out);
                    Err(DropReason::UnknownSession)
                }
            },
        };
        if let Err(reason) = result {
            self.counters.drop(reason, 1);
        }
    }

    fn handle_initiation(
        &mut self,
        via: Via,
        datagram: &[u8],
        now: Instant,
        out: &mut Outbox,
    ) -> Result<(), DropReason> {
        let mut buf = [0; HANDSHAKE_BUF];
        match self.load.admit(&self.identity, via, datagram, now, &mut buf) {
            Admission::Yes => {}
            Admission::No(reason) => return Err(reason),
            Admission::Cookie(len) => {
                match via {
                    Via::Udp(from) => {
                        out.udp.push(from, &buf[..len]);
                    }
                    Via::Derp(region, peer) => {
                        let to = crate::batch::DerpDestination { region, peer };
                        self.relays.send(to, &buf[..len], now, out, &mut self.events);
                    }
                }
                return Err(DropReason::UnderLoad);
            }
        }
        let key = self.identity.initiator(datagram).ok_or(DropReason::BadCrypto)?;
        let key = NodePublic::from_bytes(key);
        if matches!(via, Via::Derp(_, source) if source != key) {
            return Err(DropReason::BadCrypto);
        }
        let slot = self.peers.by_key(&key).ok_or(DropReason::UnknownPeer)?;
        let was_active = self.active(slot).is_some();
        if !self.activate(slot, now) {
            return Err(DropReason::UnknownPeer);
        }
        let active = self.active(slot).ok_or(DropReason::UnknownPeer)?;
        let opened = active.tunnel.open(datagram, &mut buf, now);
        let Opened::Response(len) = opened else {
            if !was_active {
                // Somebody else used the peer's name.
                self.deactivate(slot);
            }
            let duplicate = opened == Opened::Duplicate;
            return Err(if duplicate { DropReason::Duplicate } else { DropReason::BadCrypto });
        };
        let timestamp = active.tunnel.newest_timestamp();
        let newest = self.peers.get_mut(slot).map(|peer| &mut peer.newest_initiation);
        match newest {
            Some(newest) if *newest < timestamp => *newest = timestamp,
            // A tunnel knows what it has seen itself; this is from before its time.
            Some(_) | None if !was_active => {
                self.deactivate(slot);
                return Err(DropReason::Duplicate);
            }
            Some(_) | None => {}
        }
        let answers = via.socket();
        self.note_via(slot, via, now, out);
        self.note_handshake(slot, now);
        self.transmit(slot, &buf[..len], false, answers, now, out);
        Ok(())
    }

    /// A handshake response or a cookie reply.
    fn handle_answer(
        &mut self,
        slot: Slot,
        via: Via,
        datagram: &[u8],
        now: Instant,
        out: &mut Outbox,
    ) -> Result<(), DropReason> {
        let mut buf = [0; HANDSHAKE_BUF];
        if crate::wg::is_response(datagram)
            && let Admission::No(reason) = self.load.admit_response(&self.identity, datagram, now)
        {
            return Err(reason);
        }
        let standby = self.handover.is_standby();
        let active = self.active(slot).ok_or(DropReason::UnknownSession)?;
        match active.tunnel.open(datagram, &mut buf, now) {
            Opened::Established(len) => {
                // A peer uses the session from its first message on: that one says that this process is the node.
                if standby {
                    active.last_from = via.socket();
                    self.note_handshake(slot, now);
                    return Ok(());
                }
                let confirms = active.tunnel.waiting() == 0;
                self.note_via(slot, via, now, out);
                self.note_handshake(slot, now);
                if confirms {
                    self.transmit(slot, &buf[..len], false, None, now, out);
                }
                self.flush(slot, now, out);
                self.schedule(slot);
                Ok(())
            }
            Opened::Cookie => Ok(()),
            Opened::Duplicate => Err(DropReason::Duplicate),
            Opened::TooMany => Err(DropReason::UnderLoad),
            Opened::Packet(_)
            | Opened::Keepalive
            | Opened::Unreadable
            | Opened::Response(_)
            | Opened::Rejected => Err(DropReason::BadCrypto),
        }
    }

    fn handle_data(
        &mut self,
        slot: Slot,
        via: Via,
        datagram: &[u8],
        now: Instant,
        out: &mut Outbox,
    ) -> Result<(), DropReason> {
        // Taken out for a moment so that the filter can look at the other peers.
        let Some(mut active) = self.peers.get_mut(slot).and_then(|p| p.active.take()) else {
            return Err(DropReason::UnknownSession);
        };
        let was_ready = active.tunnel.ready(now);
        let mut inner = Inner::NotTaken;
        out.tun.push_with((), datagram.len(), |buf| {
            inner = match active.tunnel.open(datagram, buf, now) {
                Opened::Packet(len) => self.judge(slot, buf.get_mut(..len)?),
                Opened::Keepalive => Inner::Keepalive,
                Opened::Unreadable => Inner::Denied(DropReason::Malformed),
                Opened::Duplicate => Inner::Rejected(DropReason::Duplicate),
                Opened::Response(_)
                | Opened::Established(_)
                | Opened::Cookie
                | Opened::TooMany
                | Opened::Rejected => Inner::Rejected(DropReason::BadCrypto),
            };
            match inner {
                Inner::Delivered(len) => Some(len),
                Inner::NotTaken
                | Inner::Rejected(_)
                | Inner::Keepalive
                | Inner::Denied(_)
                | Inner::Refused(..)
                | Inner::Tsmp(_) => None,
            }
        });
        let now_ready = active.tunnel.ready(now);
        let rekey = active.tunnel.must_rekey(now);
        if let Inner::Delivered(len) = inner {
            let len = u64::try_from(len).unwrap_or_default();
            self.counters.rx_packets += 1;
            self.counters.rx_bytes += len;
            active.rx_bytes += len;
            active.last_rx = Some(now);
        }
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.active = Some(active);
        }
        if matches!(inner, Inner::NotTaken) {
            return Err(DropReason::QueueFull);
        }
        if let Inner::Rejected(reason) = inner {
            return Err(reason);
        }
        self.watch.denied += u64::from(matches!(inner, Inner::Denied(_) | Inner::Refused(..)));
        self.note_via(slot, via, now, out);
        self.pong_inside(now);
        if now_ready && !was_ready {
            self.flush(slot, now, out);
        }
        if rekey {
            self.initiate(slot, false, now, out);
        }
        self.schedule(slot);
        match inner {
            Inner::Denied(reason) => Err(reason),
            Inner::Refused(reason, answer) => {
                let plain = self.peers.get(slot).is_none_or(|peer| peer.wireguard_only);
                if !plain && self.rejections.may_send(now) {
                    match self.send_data(slot, answer.packet(), now, out) {
                        Ok(()) => self.counters.rejects_sent += 1,
                        Err(unsent) => self.counters.drop(unsent, 1),
                    }
                }
                Err(reason)
            }
            Inner::Tsmp(message) => match message {
                tsmp::Message::Answer(answer) => self.send_data(slot, answer.packet(), now, out),
                tsmp::Message::Rejected(rejected) => {
                    self.counters.rejects_received += 1;
                    tracing::debug!(peer = self.short_key(slot), ?rejected, "a peer refuses a connection");
                    self.rejections.note(rejected, now);
                    Ok(())
                }
                tsmp::Message::Disco(key) => {
                    self.handle_disco_advert(slot, key, now, out);
                    Ok(())
                }
                tsmp::Message::Nothing => Ok(()),
            },
            Inner::Delivered(_) | Inner::Keepalive | Inner::NotTaken | Inner::Rejected(_) => Ok(()),
        }
    }

    /// Decides about a decrypted packet, and puts our own address in the place of the one the peer knows.
    fn judge(&mut self, slot: Slot, packet: &mut [u8]) -> Inner {
        let mut parsed = match Parsed::parse(packet) {
            Ok(parsed) => parsed,
            Err(error) => return Inner::Denied(unreadable(error)),
        };
        if self.peers.by_ip(parsed.src) != Some(slot) {
            return Inner::Denied(DropReason::PeerSource);
        }
        let known_as = parsed.dst;
        if let Some(own) = self.unmasked(slot, known_as) {
            nat::rewrite(packet, &mut parsed, Side::Destination, own);
        }
        if self.own.contains(&parsed.dst) && self.pings.hear(slot, packet, &parsed) {
            return Inner::Tsmp(tsmp::Message::Nothing);
        }
        if parsed.protocol == protocol::TSMP {
            if parsed.fragment != Fragment::Whole || !self.own.contains(&parsed.dst) {
                return Inner::Tsmp(tsmp::Message::Nothing);
            }
            return Inner::Tsmp(tsmp::read(packet, &parsed, known_as));
        }
        let Some(peer) = self.peers.get(slot) else { return Inner::Denied(DropReason::PeerSource) };
        let jailed = peer.jailed;
        let verdict = if jailed {
            self.filter.check_in_jailed(&parsed)
        } else {
            self.filter.check_in(&parsed, |cap| peer.caps.has(cap))
        };
        match verdict {
            Verdict::Accept(_) => Inner::Delivered(parsed.length),
            Verdict::Drop(reason @ (filter::DropReason::NoRule | filter::DropReason::Jailed))
                if parsed.is_tcp_syn() =>
            {
                match tsmp::reject(&parsed, known_as, jailed) {
                    Some(answer) => Inner::Refused(dropped(reason), answer),
                    None => Inner::Denied(dropped(reason)),
                }
            }
            Verdict::Drop(reason) => Inner::Denied(dropped(reason)),
        }
    }

    /// A peer's authentic WireGuard message came this way.
    fn note_via(&mut self, slot: Slot, via: Via, now: Instant, out: &mut Outbox) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let key = peer.key;
        let Some(active) = peer.active.as_deref_mut() else { return };
        match via {
            Via::Udp(from) => {
                active.last_from = Some(from);
                active.path.note_received(from, now);
            }
            Via::Derp(region, source) if source == key => {
                active.path.heard = Some(region);
                self.with_path(slot, now, out, PathAgent::note_relayed);
            }
            Via::Derp(..) => {}
        }
    }

    fn note_handshake(&mut self, slot: Slot, now: Instant) {
        tracing::debug!(peer = self.short_key(slot), "handshake done");
        self.counters.handshakes += 1;
        self.counters.last_handshake = Some(self.wall(now));
        self.snapshot_dirty(now);
    }

    /// As the log names a peer.
    pub(super) fn short_key(&self, slot: Slot) -> Option<String> {
        self.peers.get(slot).map(|peer| peer.key.short())
    }

    /// The peer that a message seems to come from.
    pub(super) fn slot_of(&self, via: Via) -> Option<Slot> {
        match via {
            Via::Derp(_, source) => self.peers.by_key(&source),
            Via::Udp(from) => {
                let best = |slot| self.peers.get(slot)?.active.as_ref()?.path.best();
                let mut active = self.by_index.values().copied();
                active.find(|slot| best(*slot) == Some(from)).or_else(|| self.peers.by_endpoint(from))
            }
        }
    }

    /// A message for a session that is not ours any more: its sender will find out in 15 s by itself, or
    /// at once from a handshake.
    fn nudge(&mut self, via: Via, now: Instant, out: &mut Outbox) {
        if self.patience == Patience::Stock {
            return;
        }
        if !self.load.admit_nudge(via, now) {
            return;
        }
        let Some(slot) = self.slot_of(via).filter(|slot| self.activate(*slot, now)) else { return };
        if let Via::Derp(region, _) = via
            && let Some(active) = self.active(slot)
        {
            active.path.heard = Some(region);
        }
        if self.active(slot).is_some_and(|a| !a.tunnel.ready(now)) && !self.hasten(slot, now, out) {
            self.initiate(slot, false, now, out);
        }
    }
}

/// The counter of what the filter dropped.
pub(super) fn dropped(reason: filter::DropReason) -> DropReason {
    match reason {
        filter::DropReason::Multicast => DropReason::Multicast,
        filter::DropReason::LinkLocal => DropReason::LinkLocal,
        filter::DropReason::NotOwn => DropReason::NotForUs,
        filter::DropReason::NoRule => DropReason::Filter,
        filter::DropReason::Jailed => DropReason::Jailed,
    }
}

/// The counter of what cannot be judged.
pub(super) fn unreadable(error: ParseError) -> DropReason {
    match error {
        ParseError::Fragment => DropReason::Fragment,
        ParseError::ExtensionHeader => DropReason::ExtensionHeader,
        ParseError::NotIp | ParseError::Truncated | ParseError::Protocol => DropReason::Malformed,
    }
}
