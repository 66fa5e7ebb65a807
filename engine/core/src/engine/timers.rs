//! What is due when. Each active peer has one entry; it may fire early, never late.

use super::*;
use crate::wg::Due;

/// The least time between two snapshots, and how long changes are gathered.
const SNAPSHOT_EVERY: Duration = Duration::from_secs(2);
const SNAPSHOT_AFTER: Duration = Duration::from_millis(200);
/// A snapshot costs a microsecond or two for each peer in the netmap; this keeps it below one part in a
/// hundred.
const SNAPSHOT_PER_PEER: Duration = Duration::from_micros(200);
/// One peer's timer never fires more often: a slip in its logic must not stop the others.
const MIN_PAUSE: Duration = Duration::from_millis(10);

impl Engine {
    /// When to call [`Engine::handle_timeout`] next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.handover.is_standby() {
            let greet = (!self.greet.is_empty()).then_some(self.started);
            return greet.into_iter().chain(self.timers.first().map(|(at, _)| *at)).min();
        }
        let unfinished = self.peers.is_sweeping() || self.filter_build.is_some();
        let at_once = (!self.greet.is_empty() || unfinished).then_some(self.started);
        [
            at_once,
            self.timers.first().map(|(at, _)| *at),
            self.relays.deadline(),
            self.netcheck.deadline(self.relays.home().is_some()),
            self.report_at,
            self.snapshot_at,
            self.key_expiry(),
            self.pings.deadline(),
            self.dns.poll_timeout(),
            self.shield_deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// The time of [`Engine::poll_timeout`] has come. Calling early does no harm.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut Outbox) {
        self.greet_peers(now, out);
        if self.handover.is_standby() {
            return self.standby_timeout(now, out);
        }
        self.sweep_peers(now, out);
        self.continue_filter();
        while let Some((at, slot)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.timers.remove(&(at, slot));
            if let Some(active) = self.active(slot) {
                active.scheduled = None;
            }
            self.peer_timeout(slot, now, out);
            self.schedule_from(slot, Some(now + MIN_PAUSE));
        }
        if self.relays.deadline().is_some_and(|at| at <= now) {
            self.relays.handle_timeout(now, &mut self.events);
            if self.relays.wants_standby(now) {
                self.look_for_home(now);
            }
        }
        if self.netcheck.deadline(self.relays.home().is_some()).is_some_and(|at| at <= now) {
            self.netcheck_timeout(now, out);
        }
        if self.report_at.is_some_and(|at| at <= now) {
            self.report(now);
        }
        if self.snapshot_at.is_some_and(|at| at <= now) {
            self.snapshot_at = None;
            self.last_snapshot = Some(now);
            self.events.push_back(Event::SnapshotDirty);
        }
        self.pings_timeout(now);
        self.shield_timeout(now);
        if self.dns.poll_timeout().is_some_and(|at| at <= now) {
            self.dns.handle_timeout(now);
        }
        if self.key_expiry().is_some_and(|at| at <= now) {
            self.key_expired = true;
            self.events.push_back(Event::KeyExpired);
        }
    }

    pub(super) fn active(&mut self, slot: Slot) -> Option<&mut Active> {
        self.peers.get_mut(slot)?.active.as_deref_mut()
    }

    fn peer_timeout(&mut self, slot: Slot, now: Instant, out: &mut Outbox) {
        if self.active(slot).is_some_and(|active| active.expires.is_some_and(|at| at <= now)) {
            if self.obstacle(slot, now) == Some(DropReason::PeerExpired) {
                self.deactivate(slot);
                self.snapshot_dirty(now);
                return;
            }
            self.watch_expiry(slot, now);
        }
        self.with_path(slot, now, out, |path, ctx| path.handle_timeout(ctx));
        if let Some(peer) = self.peers.get(slot)
            && peer.active.as_ref().is_some_and(|a| a.path.active(now))
        {
            self.relays.note_use(now);
            // Where packets go the moment the direct path is in doubt.
            self.relays.keep_warm(peer.home, now, &mut self.events);
        }
        loop {
            let Some(active) = self.active(slot) else { return };
            match active.tunnel.handle_timeout(now) {
                Due::Nothing => return,
                Due::Initiate => {
                    if !self.initiate(slot, true, now, out) {
                        return;
                    }
                }
                Due::Keepalive => self.send_keepalive(slot, now, out),
                Due::GaveUp(dropped) => {
                    self.waiting -= dropped.min(self.waiting);
                    self.counters.drop(DropReason::HandshakeTimeout, dropped);
                }
                Due::Idle => {
                    self.deactivate(slot);
                    self.snapshot_dirty(now);
                    return;
                }
            }
        }
    }

    /// Sees to it that a peer's entry is early enough.
    pub(super) fn schedule(&mut self, slot: Slot) {
        self.schedule_from(slot, None);
    }

    pub(super) fn schedule_from(&mut self, slot: Slot, earliest: Option<Instant>) {
        let Some(active) = self.peers.get_mut(slot).and_then(|p| p.active.as_deref_mut()) else { return };
        let tunnel = active.tunnel.deadline();
        let due = [active.path.deadline(), active.expires].into_iter().flatten().fold(tunnel, Instant::min);
        let due = earliest.map_or(due, |earliest| due.max(earliest));
        match active.scheduled {
            Some(at) if at <= due => return,
            Some(at) => {
                self.timers.remove(&(at, slot));
            }
            None => {}
        }
        active.scheduled = Some(due);
        self.timers.insert((due, slot));
    }

    pub(super) fn snapshot_dirty(&mut self, now: Instant) {
        if self.snapshot_at.is_none() {
            let peers = u32::try_from(self.peers.len()).unwrap_or(u32::MAX);
            let pause = SNAPSHOT_EVERY + SNAPSHOT_PER_PEER.saturating_mul(peers);
            let spaced = self.last_snapshot.map_or(now, |at| at + pause);
            self.snapshot_at = Some(spaced.max(now + SNAPSHOT_AFTER));
        }
    }

    /// When the node's own key expires, if that was not reported yet. Not before control has spoken: a
    /// wrong clock must not end a node that control would take.
    fn key_expiry(&self) -> Option<Instant> {
        if self.key_expired || !self.control_heard {
            return None;
        }
        let node = self.netmap.self_node()?;
        if node.expired {
            return Some(self.started);
        }
        let start = self.netmap.control_time(self.wall_at_start);
        // Beyond what an Instant can hold it does not expire in this life.
        self.started.checked_add(node.key_expiry?.saturating_since(start))
    }
}
