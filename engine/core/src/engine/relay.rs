//! Which DERP regions are connected, and what waits until one is.
//!
//! Every connection is pinged when nothing came in for a while: a connection that died without a word would
//! otherwise be found after two minutes, and until then nobody could reach us through it.
//!
//! Home changes to a region only when that is connected, so that a region whose relay is dead is never
//! home because its STUN server is near. When home itself is down for some seconds, the nearest others are
//! connected, and the first of them that is becomes home.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::batch::{DerpDestination, Origin, Outbox, RegionId};
use crate::engine::api::Event;
use crate::key::NodePublic;

/// A region other than home is left when nothing was sent there for so long.
const IDLE: Duration = Duration::from_secs(60);
/// Packets that wait for one region's connection.
const MAX_WAITING: usize = 64;
/// The same for all regions together.
const MAX_WAITING_ALL: usize = 256;
/// Regions in use at a time, besides home.
const MAX_REGIONS: usize = 64;
/// Regions kept connected only because a peer with a direct path lives there.
const MAX_WARM: usize = 8;
/// A connection is pinged when it was silent for so long (and up to [`JITTER_MAX_MS`] more), and is dead when
/// it stays silent for [`PING_TIMEOUT`].
const PING_AFTER: Duration = Duration::from_secs(5);
/// The same when nothing was sent to or heard from any peer for [`IN_USE`]: longer than the 60 to 65 s between
/// a server's keepalives, so that an idle engine sleeps from one to the next, and short enough that whoever
/// wants to reach us through a relay that died without a word waits a minute or so, not the two minutes of
/// a stock node.
const PING_AFTER_IDLE: Duration = Duration::from_secs(67);
const IN_USE: Duration = Duration::from_secs(60);
const PING_TIMEOUT: Duration = Duration::from_secs(3);
const JITTER_MAX_MS: u64 = 1000;
/// The same while packets are sent there.
const PING_AFTER_IN_USE: Duration = Duration::from_secs(2);
/// What is left of [`PING_TIMEOUT`] when the connection has lost its address.
const MOVED_TIMEOUT: Duration = Duration::from_secs(1);
/// Home may be away for so long (and the jitter) before another is looked for.
const HOME_PATIENCE: Duration = Duration::from_secs(3);
/// Pause between two looks.
const STANDBY_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
struct Relay {
    connected: bool,
    last_sent: Option<Instant>,
    last_heard: Option<Instant>,
    pinged: Option<Instant>,
    /// Since when it has not been connected although it should be.
    down_since: Option<Instant>,
    waiting: VecDeque<(NodePublic, Vec<u8>)>,
    health: String,
}

/// The regions in use.
#[derive(Debug, Default)]
pub(crate) struct Relays {
    home: RegionId,
    /// Nearer than home; becomes home when it is connected.
    candidate: RegionId,
    /// What may take the place of a home that is down.
    standbys: BTreeSet<RegionId>,
    next_standby: Option<Instant>,
    /// Spreads what the engines of a node do after the same event.
    jitter: Duration,
    known: BTreeSet<RegionId>,
    /// When peers were last sent something or heard from, by any way, or a relay was connected.
    used: Option<Instant>,
    regions: BTreeMap<RegionId, Relay>,
    /// Another process of this node sends for this one where that is not connected.
    lent: bool,
}

impl Relays {
    /// `random` spreads pings and searches for another home.
    pub(crate) fn new(random: u64) -> Self {
        Self { jitter: Duration::from_millis(random % JITTER_MAX_MS), ..Self::default() }
    }

    pub(crate) fn home(&self) -> RegionId {
        self.home
    }

    pub(crate) fn connected(&self) -> usize {
        self.regions.values().filter(|r| r.connected).count()
    }

    pub(crate) fn is_connected(&self, region: RegionId) -> bool {
        self.regions.get(&region).is_some_and(|r| r.connected)
    }

    /// Whether another process of this node sends what goes to regions that are not connected here.
    pub(crate) fn set_lent(&mut self, lent: bool) {
        self.lent = lent;
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
        self.candidate = RegionId::default();
        self.standbys.clear();
        self.next_standby = None;
        if region.is_some() {
            self.connect(region, now, events);
            events.push_back(Event::DerpPreferred { region });
        }
    }

    /// Wants `region` as home: at once without one, else as soon as it is connected. True when it is home.
    pub(crate) fn prefer(&mut self, region: RegionId, now: Instant, events: &mut VecDeque<Event>) -> bool {
        self.candidate = RegionId::default();
        if !self.home.is_some() || self.is_connected(region) {
            self.set_home(region, now, events);
        } else if region != self.home
            && let Some(relay) = self.connect(region, now, events)
        {
            relay.last_sent = Some(now);
            self.candidate = region;
        }
        self.home == region
    }

    /// Connects `regions`, of which the first to be connected becomes home, because home is down. True
    /// when one is home now.
    pub(crate) fn stand_by(
        &mut self,
        regions: &[RegionId],
        now: Instant,
        events: &mut VecDeque<Event>,
    ) -> bool {
        for region in regions {
            if let Some(relay) = self.connect(*region, now, events) {
                relay.last_sent = Some(now);
                if relay.connected {
                    self.set_home(*region, now, events);
                    return true;
                }
            }
        }
        self.standbys = regions.iter().copied().collect();
        self.next_standby = Some(now + STANDBY_EVERY);
        false
    }

    /// Whether another home should be looked for.
    pub(crate) fn wants_standby(&self, now: Instant) -> bool {
        self.standby_at().is_some_and(|at| at <= now)
    }

    fn standby_at(&self) -> Option<Instant> {
        let down = self.regions.get(&self.home)?.down_since? + HOME_PATIENCE + self.jitter;
        Some(self.next_standby.map_or(down, |next| next.max(down)))
    }

    /// Packets of peers go or come: relays matter from one moment to the next.
    pub(crate) fn note_use(&mut self, now: Instant) {
        self.used = Some(now);
    }

    /// Keeps a region connected that may be needed from one moment to the next.
    pub(crate) fn keep_warm(&mut self, region: RegionId, now: Instant, events: &mut VecDeque<Event>) {
        if region == self.home || !self.regions.contains_key(&region) && self.regions.len() > MAX_WARM {
            return;
        }
        if let Some(relay) = self.connect(region, now, events) {
            relay.last_sent = Some(now);
        }
    }

    fn connect(
        &mut self,
        region: RegionId,
        now: Instant,
        events: &mut VecDeque<Event>,
    ) -> Option<&mut Relay> {
        if !self.regions.contains_key(&region) {
            if self.regions.len() > MAX_REGIONS || !self.known.contains(&region) {
                return None;
            }
            events.push_back(Event::DerpConnect { region });
        }
        Some(self.regions.entry(region).or_insert(Relay { down_since: Some(now), ..Relay::default() }))
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
        let lent = self.lent;
        let waiting: usize = if self.is_connected(to.region) {
            0
        } else {
            self.regions.values().map(|relay| relay.waiting.len()).sum()
        };
        self.used = Some(now);
        let Some(relay) = self.connect(to.region, now, events) else { return false };
        relay.last_sent = Some(now);
        if relay.connected {
            let silent = relay.last_heard.is_none_or(|at| now.duration_since(at) > PING_AFTER_IN_USE);
            if silent && relay.pinged.is_none() {
                relay.pinged = Some(now);
                events.push_back(Event::DerpPing { region: to.region });
            }
            return out.derp.push(to, packet);
        }
        if lent && out.passed.push(Origin::ToRelay(to), packet) {
            return true;
        }
        if crate::wg::is_initiation(packet) {
            // The newest is sent when the relay is connected; several at once would be taken for a flood.
            return true;
        }
        let full = relay.waiting.len() >= MAX_WAITING || waiting >= MAX_WAITING_ALL;
        if full && relay.waiting.pop_front().is_none() {
            return false;
        }
        relay.waiting.push_back((to.peer, packet.to_vec()));
        !full
    }

    /// True when that made the region home.
    pub(crate) fn handle_connected(
        &mut self,
        region: RegionId,
        now: Instant,
        out: &mut Outbox,
        events: &mut VecDeque<Event>,
    ) -> bool {
        let Some(relay) = self.regions.get_mut(&region) else { return false };
        self.used = Some(now);
        relay.connected = true;
        relay.last_heard = Some(now);
        relay.pinged = None;
        relay.down_since = None;
        for (peer, packet) in std::mem::take(&mut relay.waiting) {
            out.derp.push(DerpDestination { region, peer }, &packet);
        }
        if region == self.home {
            self.standbys.clear();
            self.next_standby = None;
        }
        let takes_over = region == self.candidate || self.standbys.contains(&region);
        if takes_over {
            self.set_home(region, now, events);
        }
        takes_over
    }

    pub(crate) fn handle_disconnected(&mut self, region: RegionId, now: Instant) {
        if let Some(relay) = self.regions.get_mut(&region) {
            relay.connected = false;
            relay.pinged = None;
            relay.down_since.get_or_insert(now);
        }
    }

    pub(crate) fn handle_heard(&mut self, region: RegionId, now: Instant) {
        if let Some(relay) = self.regions.get_mut(&region) {
            relay.last_heard = Some(now);
            relay.pinged = None;
        }
    }

    /// We have other addresses now: the connections may have lost theirs.
    pub(crate) fn handle_moved(&mut self, now: Instant, events: &mut VecDeque<Event>) {
        for (region, relay) in self.regions.iter_mut().filter(|(_, relay)| relay.connected) {
            relay.pinged = Some(now.checked_sub(PING_TIMEOUT - MOVED_TIMEOUT).unwrap_or(now));
            events.push_back(Event::DerpPing { region: *region });
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
        if !self.known.contains(&self.candidate) {
            self.candidate = RegionId::default();
        }
        self.standbys.retain(|region| self.known.contains(region));
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        let idle = |(region, relay): (&RegionId, &Relay)| {
            (*region != self.home).then(|| relay.last_sent.map(|at| at + IDLE)).flatten()
        };
        let silent = |relay: &Relay| self.check_at(relay);
        let pings = self.regions.values().filter_map(silent);
        self.regions.iter().filter_map(idle).chain(pings).chain(self.standby_at()).min()
    }

    /// When a connection is to be pinged, or given up.
    fn check_at(&self, relay: &Relay) -> Option<Instant> {
        match relay.pinged {
            Some(at) => Some(at + PING_TIMEOUT),
            None => {
                let heard = relay.last_heard.filter(|_| relay.connected)?;
                let (soon, idle) = (heard + PING_AFTER, heard + PING_AFTER_IDLE);
                // In use until then, the silence is looked into at once; after that, an idle one's time counts.
                let in_use = self.used.is_some_and(|at| soon <= at + IN_USE);
                Some(if in_use { soon } else { idle } + self.jitter)
            }
        }
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
        let due: Vec<RegionId> = self
            .regions
            .iter()
            .filter(|(_, relay)| self.check_at(relay).is_some_and(|at| at <= now))
            .map(|(region, _)| *region)
            .collect();
        for region in due {
            let Some(relay) = self.regions.get_mut(&region) else { continue };
            if relay.pinged.is_none() {
                relay.pinged = Some(now);
                events.push_back(Event::DerpPing { region });
            } else {
                events.push_back(Event::DerpReconnect { region });
                self.handle_disconnected(region, now);
            }
        }
    }
}

#[cfg(test)]
mod tests;
