//! One process of this node replaces another, and no packet is lost.
//!
//! The successor stands by: it shakes hands with the peers that have sessions, and withholds the message by which
//! a peer would notice that a session is there (WireGuard's responder sends in a session only when the
//! initiator has). Until it takes over, the other one alone reads sockets, relays and the pod's packets, and
//! passes on what names a receiver index that is not its own. From the takeover on it is the other way round:
//! what peers had sent before they heard of the new sessions goes back to the process that knows the old ones,
//! for as long as that lives. The two have no index in common ([`Config::standby`](super::Config::standby)).
//!
//! A successor dials relays only when it is the node: a relay has one connection of a node that packets go to.
//! Until it is connected itself, the process before lends it its connections: handshakes of a standby with peers
//! by relay alone go that way, and so does everything for them from the takeover until the dial is done.

use super::*;
use crate::batch::{DerpDestination, Origin};

/// After a takeover peers use the new sessions within a round trip; one that does not has begun another with the
/// process before, in between, and is shown one more.
const SETTLED_AFTER: Duration = Duration::from_millis(300);

/// What this process is to the other one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It is the node.
    InCharge,
    /// It is the node, and another one stands by.
    Succeeded,
    /// The other one is the node still.
    Standby,
    /// The other one is the node; this one opens what was sent to its sessions.
    LetGo,
}

/// See the module.
#[derive(Debug)]
pub(super) struct State {
    stage: Stage,
    /// Somebody takes what is passed.
    passing: bool,
    took_over: Option<Instant>,
}

impl State {
    pub(super) fn new(standby: bool) -> Self {
        let stage = if standby { Stage::Standby } else { Stage::InCharge };
        Self { stage, passing: false, took_over: None }
    }

    pub(super) fn is_standby(&self) -> bool {
        self.stage == Stage::Standby
    }

    /// Whether sessions are not replaced: a peer would forget the one that the successor has made.
    pub(super) fn keeps_sessions(&self) -> bool {
        matches!(self.stage, Stage::Succeeded | Stage::LetGo)
    }
}

impl Engine {
    /// What the receiver indices of this process have in common.
    #[must_use]
    pub fn index_mark(&self) -> u8 {
        self.watch.marks.index
    }

    /// Another process stands by from now on and takes what is in [`Outbox::passed`], until
    /// [`Engine::end_passing`].
    pub fn begin_passing(&mut self) {
        self.handover.passing = true;
        if self.handover.stage == Stage::InCharge {
            self.handover.stage = Stage::Succeeded;
        }
        self.relays.set_lent(self.handover.stage == Stage::Standby);
    }

    /// The other process is gone.
    pub fn end_passing(&mut self) {
        self.handover.passing = false;
        self.relays.set_lent(false);
        if self.handover.stage == Stage::Succeeded {
            self.handover.stage = Stage::InCharge;
        }
    }

    /// The other process is the node from now on: what waited for handshakes is passed to it, and the flows
    /// that the filter knows are the result, for [`Engine::take_over`]. What this one would send after that
    /// is to be thrown away.
    pub fn let_go(&mut self, out: &mut Outbox) -> Vec<u8> {
        self.handover.stage = Stage::LetGo;
        let slots: Vec<Slot> = self.by_index.values().copied().collect();
        for slot in slots {
            while let Some(packet) = self.active(slot).and_then(|active| active.tunnel.next_waiting()) {
                self.waiting = self.waiting.saturating_sub(1);
                if !out.passed.push(Origin::Pod, &packet) {
                    self.counters.drop(DropReason::HandshakeQueueFull, 1);
                }
            }
        }
        self.filter.flows()
    }

    /// This process is the node from now on: its sessions are in use, and it looks after paths and relays.
    /// `flows` is what [`Engine::let_go`] gave.
    pub fn take_over(&mut self, flows: &[u8], now: Instant, out: &mut Outbox) {
        self.handover.stage = Stage::InCharge;
        self.handover.took_over = Some(now);
        self.filter.add_flows(flows);
        let slots: Vec<Slot> = self.by_index.values().copied().collect();
        for slot in slots {
            let Some(active) = self.active(slot) else { continue };
            if let Some(from) = active.last_from {
                active.path.prove(from, now);
            }
            if active.tunnel.ready(now) {
                self.send_keepalive(slot, now, out);
            } else {
                self.hasten(slot, now, out);
            }
            self.schedule(slot);
        }
    }

    /// Peers that a standby greets and has no session with yet.
    #[must_use]
    pub fn unready(&self, now: Instant) -> usize {
        let active = |slot: &Slot| self.peers.get(*slot)?.active.as_deref();
        let active = self.by_index.values().filter_map(active);
        active.filter(|active| !active.tunnel.ready(now)).count()
    }

    /// The relay by which the other process's packet for `to` goes out ([`Origin::ToRelay`]): that, or where this
    /// one reaches the peer.
    #[must_use]
    pub fn lent_relay(&self, to: DerpDestination, now: Instant) -> DerpDestination {
        if self.relays.is_connected(to.region) {
            return to;
        }
        let peer = self.peers.by_key(&to.peer).and_then(|slot| self.peers.get(slot));
        let ours = peer.and_then(|peer| {
            super::outbound::relay_for(peer.active.as_deref()?, peer.home, peer.key, &self.relays, now)
        });
        ours.unwrap_or(to)
    }

    /// What the other process passed. It is not passed back.
    pub fn handle_passed(&mut self, messages: &mut Batch<Origin>, now: Instant, out: &mut Outbox) {
        let passing = std::mem::take(&mut self.handover.passing);
        for (origin, message) in messages.iter_mut() {
            match *origin {
                Origin::Udp(from) => self.handle_wireguard(Via::Udp(from), message, now, out),
                Origin::Relay(DerpDestination { region, peer }) => {
                    self.handle_wireguard(Via::Derp(region, peer), message, now, out);
                }
                Origin::Pod => {
                    if let Err(reason) = self.route_packet(message, now, out) {
                        self.counters.drop(reason, 1);
                    }
                }
                // The shell's, which has the connection.
                Origin::ToRelay(_) => {}
            }
        }
        self.handover.passing = passing;
    }

    /// Whether a message for a session that is not this process's is the other one's.
    pub(super) fn pass(&mut self, via: Via, datagram: &[u8], now: Instant, out: &mut Outbox) -> bool {
        if !self.handover.passing {
            return false;
        }
        let origin = match via {
            Via::Udp(from) => Origin::Udp(from),
            Via::Derp(region, peer) => Origin::Relay(DerpDestination { region, peer }),
        };
        if self.handover.took_over.is_some_and(|at| now.duration_since(at) >= SETTLED_AFTER) {
            self.show_session(via, now, out);
        }
        out.passed.push(origin, datagram)
    }

    /// A peer goes on using a session of the process before.
    fn show_session(&mut self, via: Via, now: Instant, out: &mut Outbox) {
        if !self.load.admit_nudge(via, now) {
            return;
        }
        if let Some(slot) = self.slot_of(via) {
            self.initiate(slot, false, now, out);
        }
    }

    /// The timers of a standby: handshakes alone.
    pub(super) fn standby_timeout(&mut self, now: Instant, out: &mut Outbox) {
        while let Some((at, slot)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.timers.remove(&(at, slot));
            let Some(active) = self.active(slot) else { continue };
            active.scheduled = None;
            if active.tunnel.attempting() {
                self.initiate(slot, true, now, out);
            }
            self.schedule_from(slot, Some(now + STANDBY_PAUSE));
        }
    }
}

/// Between two looks at what a standby does about one peer.
const STANDBY_PAUSE: Duration = Duration::from_millis(100);
