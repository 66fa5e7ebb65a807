//! Which DERP regions are connected, and what waits until one is.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::batch::{DerpDestination, Outbox, RegionId};
use crate::engine::api::Event;
use crate::key::NodePublic;

/// A region other than home is left when nothing was sent there for so long.
const IDLE: Duration = Duration::from_secs(60);
/// Packets that wait for one region's connection.
const MAX_WAITING: usize = 64;
/// Regions in use at a time, besides home.
const MAX_REGIONS: usize = 64;

#[derive(Debug, Default)]
struct Relay {
    connected: bool,
    last_sent: Option<Instant>,
    last_heard: Option<Instant>,
    waiting: VecDeque<(NodePublic, Vec<u8>)>,
    health: String,
}

/// The regions in use.
#[derive(Debug, Default)]
pub(crate) struct Relays {
    home: RegionId,
    known: BTreeSet<RegionId>,
    regions: BTreeMap<RegionId, Relay>,
}

impl Relays {
    pub(crate) fn home(&self) -> RegionId {
        self.home
    }

    pub(crate) fn connected(&self) -> usize {
        self.regions.values().filter(|r| r.connected).count()
    }

    pub(crate) fn is_connected(&self, region: RegionId) -> bool {
        self.regions.get(&region).is_some_and(|r| r.connected)
    }

    /// Whether the DERP map has the region.
    pub(crate) fn knows(&self, region: RegionId) -> bool {
        self.known.contains(&region)
    }

    /// What the home relay complains about.
    pub(crate) fn health(&self) -> Option<&str> {
        self.regions.get(&self.home).map(|r| r.health.as_str()).filter(|h| !h.is_empty())
    }

    /// When anything was last heard on a region's connection.
    pub(crate) fn last_heard(&self, region: RegionId) -> Option<Instant> {
        self.regions.get(&region)?.last_heard
    }

    /// Makes `region` home and connects there.
    pub(crate) fn set_home(&mut self, region: RegionId, now: Instant, events: &mut VecDeque<Event>) {
        if self.home == region {
            return;
        }
        if let Some(old) = self.regions.get_mut(&self.home) {
            // The old home stays for a while: peers learn of the new one by and by.
            old.last_sent = Some(now);
        }
        self.home = region;
        if region.is_some() {
            self.connect(region, events);
            events.push_back(Event::DerpPreferred { region });
        }
    }

    fn connect(&mut self, region: RegionId, events: &mut VecDeque<Event>) -> Option<&mut Relay> {
        if !self.regions.contains_key(&region) {
            if self.regions.len() > MAX_REGIONS || !self.known.contains(&region) {
                return None;
            }
            events.push_back(Event::DerpConnect { region });
        }
        Some(self.regions.entry(region).or_default())
    }

    /// Sends through a region, now or when it is connected. False when the packet, or an older one that
    /// waited, had to go.
    pub(crate) fn send(
        &mut self,
        to: DerpDestination,
        packet: &[u8],
        now: Instant,
        out: &mut Outbox,
        events: &mut VecDeque<Event>,
    ) -> bool {
        let Some(relay) = self.connect(to.region, events) else { return false };
        relay.last_sent = Some(now);
        if relay.connected {
            return out.derp.push(to, packet);
        }
        if crate::wg::is_initiation(packet) {
            // The newest is sent when the relay is connected; several at once would be taken for a flood.
            return true;
        }
        let full = relay.waiting.len() >= MAX_WAITING && relay.waiting.pop_front().is_some();
        relay.waiting.push_back((to.peer, packet.to_vec()));
        !full
    }

    pub(crate) fn handle_connected(&mut self, region: RegionId, now: Instant, out: &mut Outbox) {
        let Some(relay) = self.regions.get_mut(&region) else { return };
        relay.connected = true;
        relay.last_heard = Some(now);
        for (peer, packet) in std::mem::take(&mut relay.waiting) {
            out.derp.push(DerpDestination { region, peer }, &packet);
        }
    }

    pub(crate) fn handle_disconnected(&mut self, region: RegionId) {
        if let Some(relay) = self.regions.get_mut(&region) {
            relay.connected = false;
        }
    }

    pub(crate) fn handle_heard(&mut self, region: RegionId, now: Instant) {
        if let Some(relay) = self.regions.get_mut(&region) {
            relay.last_heard = Some(now);
        }
    }

    pub(crate) fn handle_health(&mut self, region: RegionId, problem: &str) {
        if let Some(relay) = self.regions.get_mut(&region) {
            relay.health = problem.chars().take(200).collect();
        }
    }

    /// Takes over which regions there are and leaves those that there are no more.
    pub(crate) fn set_known(&mut self, known: BTreeSet<RegionId>, events: &mut VecDeque<Event>) {
        self.known = known;
        self.regions.retain(|region, _| {
            let keep = self.known.contains(region);
            if !keep {
                events.push_back(Event::DerpClose { region: *region });
            }
            keep
        });
        if !self.known.contains(&self.home) {
            self.home = RegionId::default();
        }
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        let idle = |(region, relay): (&RegionId, &Relay)| {
            (*region != self.home).then(|| relay.last_sent.map(|at| at + IDLE)).flatten()
        };
        self.regions.iter().filter_map(idle).min()
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant, events: &mut VecDeque<Event>) {
        let home = self.home;
        self.regions.retain(|region, relay| {
            let keep = *region == home || relay.last_sent.is_some_and(|at| at + IDLE > now);
            if !keep {
                events.push_back(Event::DerpClose { region: *region });
            }
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: RegionId = RegionId(1);
    const B: RegionId = RegionId(2);

    fn to(region: RegionId) -> DerpDestination {
        DerpDestination { region, peer: NodePublic::from_bytes([1; 32]) }
    }

    #[test]
    fn packets_wait_for_the_connection_and_idle_regions_are_left() {
        let (mut relays, mut events, mut out) = (Relays::default(), VecDeque::new(), Outbox::default());
        let now = Instant::now();
        relays.set_known([A, B].into(), &mut events);
        relays.set_home(A, now, &mut events);
        assert_eq!(events, [Event::DerpConnect { region: A }, Event::DerpPreferred { region: A }]);
        events.clear();
        for n in 0..MAX_WAITING + 1 {
            assert_eq!(relays.send(to(B), &n.to_le_bytes(), now, &mut out, &mut events), n < MAX_WAITING);
        }
        assert_eq!(events, [Event::DerpConnect { region: B }], "once");
        assert!(out.is_empty());
        relays.handle_connected(B, now, &mut out);
        let first: Vec<_> = out.derp.iter().map(|(_, p)| p.to_vec()).take(1).collect();
        assert_eq!(
            (out.derp.len(), first),
            (MAX_WAITING, vec![1usize.to_le_bytes().to_vec()]),
            "the oldest went"
        );
        assert!(relays.send(to(B), b"now", now, &mut out, &mut events));
        assert_eq!(out.derp.last(), Some(&b"now"[..]));
        assert!(!relays.send(to(RegionId(9)), b"", now, &mut out, &mut events), "no such region");

        events.clear();
        let idle = relays.deadline().expect("B is idle some time");
        assert_eq!(idle, now + IDLE);
        relays.handle_timeout(idle, &mut events);
        assert_eq!(events, [Event::DerpClose { region: B }]);
        assert_eq!(relays.deadline(), None, "home is never idle");
    }

    #[test]
    fn a_new_home_leaves_the_old_one_in_a_while_and_a_vanished_one_at_once() {
        let (mut relays, mut events) = (Relays::default(), VecDeque::new());
        let now = Instant::now();
        relays.set_known([A, B].into(), &mut events);
        relays.set_home(A, now, &mut events);
        relays.set_home(B, now, &mut events);
        assert_eq!(relays.deadline(), Some(now + IDLE));
        relays.set_known([A].into(), &mut events);
        assert_eq!(events.back(), Some(&Event::DerpClose { region: B }));
        assert!(!relays.home().is_some());
    }
}
