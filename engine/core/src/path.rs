//! How packets reach one peer.
//!
//! A peer has candidates (endpoints from the netmap, from CallMeMaybe, or seen as the source of a disco
//! ping). While packets flow they are pinged; the best one that answers is used as long as its last pong
//! is younger than [`TRUST`]. The relay is used when there is no best address, and together with it while
//! it is not trusted.
//!
//! Trust is lost early: when packets go out and nothing is heard on the best address for 50 ms,
//! it is pinged, and when that stays unanswered the path is in doubt: packets go both
//! ways ([`PathAgent::route`]) until a pong ends the doubt. So a path that breaks silently costs about
//! 150 ms of traffic. A peer that pings us may have become suspicious itself, because only the way from us
//! to it is broken, which we cannot notice: its ping makes us ask too.
//!
//! The agent does nothing by itself: it is told of sends, pings and pongs, leaves what it wants in
//! [`Context::actions`] and says when to wake it. 45 s after the last send it wants nothing any more.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::batch::RegionId;
use crate::random::Random;

/// How long a pong vouches for a path.
pub(crate) const TRUST: Duration = Duration::from_millis(6500);
const HEARTBEAT: Duration = Duration::from_secs(3);
const SESSION_ACTIVE: Duration = Duration::from_secs(45);
const PING_SPACING: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
const UPGRADE_EVERY: Duration = Duration::from_secs(60);
const GOOD_ENOUGH: Duration = Duration::from_millis(5);
/// Candidates are looked for at most so often while there is no trusted path.
const SEARCH_EVERY: Duration = Duration::from_secs(1);
/// So long after the news of a peer's new home packets go there, if that is connected.
const NEW_HOME: Duration = Duration::from_secs(10);
/// Packets go out and nothing was heard on the best address for so long: it is asked before its heartbeat.
const SILENCE: Duration = Duration::from_millis(50);
/// Pings because of silence are so far apart at least: what a flow in one direction costs.
const PROBE_EVERY: Duration = Duration::from_millis(300);
/// How long a probe may stay unanswered: five quarters of a round trip and [`PATIENCE_SLACK`].
const PATIENCE_MIN: Duration = Duration::from_millis(50);
const PATIENCE_SLACK: Duration = Duration::from_millis(20);
const PATIENCE_MAX: Duration = Duration::from_secs(2);
/// The same for a heartbeat while packets come in: a lost pong then says little.
const HEARTBEAT_PATIENCE: Duration = Duration::from_millis(500);
/// A pong that took longer was held up by a peer that stood still: it vouches for the path, and says nothing of
/// its latency.
const HELD_UP: Duration = Duration::from_secs(2);
/// The longest pause between pings while the best address is in doubt.
const DOUBT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// An address that has not answered for so long after its trust ended is no longer sent to.
const FORGET_AFTER: Duration = Duration::from_secs(15);
const CALL_SPACING: Duration = Duration::from_secs(5);
/// Latencies below this are the same: scheduling noise decides between them.
const LATENCY_FLOOR: Duration = Duration::from_millis(1);
const MAX_CANDIDATES: usize = 32;
const MAX_PINGS: usize = 64;

/// A disco transaction id.
pub(crate) type TxId = [u8; 12];

/// When a path that falls silent is doubted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Patience {
    /// As soon as a ping that should have been answered was not.
    #[default]
    Short,
    /// When the last pong is 6.5 s old, and handshakes go again after 5 s: the timers of stock nodes, so
    /// that a simulation can have some.
    Stock,
}

/// What the agent wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Send a disco ping.
    Ping { to: SocketAddr, txid: TxId },
    /// Tell the peer our endpoints through its relay.
    CallMeMaybe,
}

/// What a call may use.
pub(crate) struct Context<'a> {
    pub(crate) now: Instant,
    pub(crate) random: &'a mut Random,
    pub(crate) actions: &'a mut Vec<Action>,
    /// Whether there is a socket of the family.
    pub(crate) v4: bool,
    pub(crate) v6: bool,
}

impl Context<'_> {
    fn reaches(&self, addr: SocketAddr) -> bool {
        if addr.is_ipv4() { self.v4 } else { self.v6 }
    }
}

/// Where to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) udp: Option<SocketAddr>,
    pub(crate) derp: bool,
}

#[derive(Debug, Clone)]
struct Candidate {
    addr: SocketAddr,
    netmap: bool,
    called: bool,
    last_got_ping: Option<Instant>,
    last_ping: Option<Instant>,
    /// When it was last pinged because of a ping of its own.
    last_return: Option<Instant>,
}

impl Candidate {
    fn stale(&self, now: Instant) -> bool {
        !self.netmap
            && !self.called
            && self.last_got_ping.is_none_or(|at| now.duration_since(at) > SESSION_ACTIVE)
    }
}

#[derive(Debug, Clone, Copy)]
struct Best {
    addr: SocketAddr,
    latency: Duration,
    trusted_until: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Ping {
    txid: TxId,
    to: SocketAddr,
    at: Instant,
}

/// An unanswered question to the best address.
#[derive(Debug, Clone, Copy)]
struct Probe {
    at: Instant,
    misses: u8,
    /// Nobody has reason to doubt the path: the answer may be late or lost once while packets come in.
    heartbeat: bool,
}

/// Path choice for one peer.
#[derive(Debug)]
pub(crate) struct PathAgent {
    /// Plain WireGuard: no disco, no relay.
    wireguard_only: bool,
    patience: Patience,
    candidates: Vec<Candidate>,
    best: Option<Best>,
    pings: Vec<Ping>,
    probe: Option<Probe>,
    doubt: bool,
    heartbeat_at: Option<Instant>,
    last_send: Option<Instant>,
    /// First send since something was heard on the best address.
    silent_since: Option<Instant>,
    /// Last ping for another reason than the heartbeat.
    last_probe: Option<Instant>,
    last_full_ping: Option<Instant>,
    last_call: Option<Instant>,
    /// Relay region the peer was last heard on.
    pub(crate) heard: Option<RegionId>,
    /// Until when it is reached at its home, wherever it was heard: control has just told that it moved there.
    pub(crate) at_home_until: Option<Instant>,
}

impl PathAgent {
    pub(crate) fn new(wireguard_only: bool, patience: Patience) -> Self {
        Self {
            wireguard_only,
            patience,
            candidates: Vec::new(),
            best: None,
            pings: Vec::new(),
            probe: None,
            doubt: false,
            heartbeat_at: None,
            last_send: None,
            silent_since: None,
            last_probe: None,
            last_full_ping: None,
            last_call: None,
            heard: None,
            at_home_until: None,
        }
    }

    /// The peer has another home. Each side of a relayed conversation answers where it hears the other, so
    /// one of them has to begin.
    pub(crate) fn note_new_home(&mut self, now: Instant) {
        self.at_home_until = Some(now + NEW_HOME);
    }

    /// The peer's endpoints, as control has them now.
    pub(crate) fn set_endpoints(&mut self, endpoints: &[SocketAddr]) {
        for candidate in &mut self.candidates {
            candidate.netmap = false;
        }
        for addr in endpoints.iter().copied().filter(|a| usable(*a)).take(MAX_CANDIDATES) {
            if let Some(candidate) = self.candidate(addr) {
                candidate.netmap = true;
            }
        }
        self.candidates.retain(|c| c.netmap || c.called || c.last_got_ping.is_some());
    }

    fn candidate(&mut self, addr: SocketAddr) -> Option<&mut Candidate> {
        if let Some(at) = self.candidates.iter().position(|c| c.addr == addr) {
            return self.candidates.get_mut(at);
        }
        if self.candidates.len() >= MAX_CANDIDATES {
            // Whoever only pinged, longest ago, makes room.
            let at = (0..self.candidates.len())
                .filter(|i| {
                    !self.candidates[*i].netmap && self.best.map(|b| b.addr) != Some(self.candidates[*i].addr)
                })
                .min_by_key(|i| (self.candidates[*i].called, self.candidates[*i].last_got_ping))?;
            self.candidates.swap_remove(at);
        }
        self.candidates.push(Candidate {
            addr,
            netmap: false,
            called: false,
            last_got_ping: None,
            last_ping: None,
            last_return: None,
        });
        self.candidates.last_mut()
    }

    /// Begins with an address that worked in an earlier life: used at once, together with the relay.
    pub(crate) fn restore(&mut self, addr: SocketAddr, now: Instant) {
        if let Some(candidate) = self.candidate(addr) {
            candidate.last_got_ping = Some(now);
            self.best = Some(Best { addr, latency: GOOD_ENOUGH, trusted_until: now });
        }
    }

    /// An answer that nobody else could give has just come from there, to what was sent there.
    pub(crate) fn prove(&mut self, from: SocketAddr, now: Instant) {
        if let Some(best) = self.best.as_mut().filter(|best| best.addr == from) {
            best.trusted_until = now + TRUST;
        }
    }

    /// Forgets what was learnt about the peer's last life, which its new disco key ends.
    pub(crate) fn restart(&mut self, now: Instant) {
        self.pings.clear();
        self.probe = None;
        self.doubt = true;
        if let Some(best) = &mut self.best {
            best.trusted_until = now;
        }
        for candidate in &mut self.candidates {
            candidate.last_ping = None;
        }
    }

    /// We have other addresses now: the paths are to be found again, beginning at once if they are used.
    pub(crate) fn move_away(&mut self, ctx: &mut Context<'_>) {
        self.restart(ctx.now);
        self.last_call = None;
        if self.active(ctx.now) && !self.wireguard_only {
            self.ping_all(true, ctx);
        }
    }

    /// A plain WireGuard peer did not answer: its next address gets the next try, which is all that can be
    /// done without disco.
    pub(crate) fn try_another(&mut self) {
        if self.wireguard_only && !self.candidates.is_empty() {
            self.best = None;
            self.candidates.rotate_left(1);
        }
    }

    /// Where a packet goes now.
    pub(crate) fn route(&self, now: Instant) -> Route {
        if self.wireguard_only {
            let udp = self.best.map(|b| b.addr).or_else(|| self.candidates.first().map(|c| c.addr));
            return Route { udp, derp: false };
        }
        match self.best {
            Some(best) => Route { udp: Some(best.addr), derp: self.doubt || now >= best.trusted_until },
            None => Route { udp: None, derp: true },
        }
    }

    /// The best address and its latency while it is trusted.
    pub(crate) fn trusted(&self, now: Instant) -> Option<(SocketAddr, Duration)> {
        self.best.filter(|b| !self.doubt && now < b.trusted_until).map(|b| (b.addr, b.latency))
    }

    /// Where the peer may be, each with how long ago it was asked.
    pub(crate) fn candidates(&self, now: Instant) -> impl Iterator<Item = (SocketAddr, Option<Duration>)> {
        let age = move |at: Instant| now.saturating_duration_since(at);
        self.candidates.iter().map(move |c| (c.addr, c.last_ping.map(age)))
    }

    /// The best address, trusted or not.
    pub(crate) fn best(&self) -> Option<SocketAddr> {
        self.best.map(|b| b.addr)
    }

    /// Whether packets were sent in the last 45 s.
    pub(crate) fn active(&self, now: Instant) -> bool {
        self.last_send.is_some_and(|at| now.duration_since(at) < SESSION_ACTIVE)
    }

    /// A WireGuard packet goes out by [`PathAgent::route`].
    pub(crate) fn note_send(&mut self, ctx: &mut Context<'_>) {
        self.last_send = Some(ctx.now);
        if self.wireguard_only {
            return;
        }
        if self.heartbeat_at.is_none() {
            self.heartbeat_at = Some(ctx.now + HEARTBEAT);
        }
        if self.trusted(ctx.now).is_none() {
            if self.last_full_ping.is_none_or(|at| ctx.now.duration_since(at) >= SEARCH_EVERY) {
                self.ping_all(true, ctx);
            }
            return;
        }
        match self.silent_since {
            None => self.silent_since = Some(ctx.now),
            Some(since) if ctx.now.duration_since(since) >= SILENCE => {
                self.suspect(ctx);
            }
            Some(_) => {}
        }
    }

    /// Somebody has reason to doubt the best address: it is asked, unless it just was. True when it is
    /// asked for this.
    fn suspect(&mut self, ctx: &mut Context<'_>) -> bool {
        if self.patience == Patience::Stock || self.doubt {
            return false;
        }
        // Two peers that ask each other because they were asked would never stop on a slow path.
        let pause = self.best.map_or(PROBE_EVERY, |b| PROBE_EVERY.max(b.latency * 2));
        if self.last_probe.is_some_and(|at| ctx.now.duration_since(at) < pause) {
            return false;
        }
        match &mut self.probe {
            Some(probe) if !probe.heartbeat => return false,
            Some(probe) if ctx.now.duration_since(probe.at) < pause => {
                // The heartbeat under way is question enough.
                probe.heartbeat = false;
                return true;
            }
            Some(_) | None => {}
        }
        self.last_probe = Some(ctx.now);
        self.probe = Some(Probe { at: ctx.now, misses: 0, heartbeat: false });
        self.ping_best(ctx);
        true
    }

    /// The peer sent a packet by relay although we think that the direct path works: it does not, so that
    /// packets go both ways before we know better.
    pub(crate) fn note_relayed(&mut self, ctx: &mut Context<'_>) {
        if self.active(ctx.now) && self.trusted(ctx.now).is_some() && self.suspect(ctx) {
            self.doubt = true;
        }
    }

    /// An authentic WireGuard packet came in from this address.
    pub(crate) fn note_received(&mut self, from: SocketAddr, now: Instant) {
        if self.best.is_some_and(|b| b.addr == from) {
            self.silent_since = None;
        } else if self.wireguard_only {
            self.best = Some(Best { addr: from, latency: GOOD_ENOUGH, trusted_until: now });
        }
    }

    /// The peer pinged us from `from`; the caller answers.
    pub(crate) fn handle_ping(&mut self, from: SocketAddr, ctx: &mut Context<'_>) {
        if !usable(from) {
            return;
        }
        let now = ctx.now;
        let Some(candidate) = self.candidate(from) else { return };
        candidate.last_got_ping = Some(now);
        // The peer has just opened its side towards us: what we sent a moment ago may have met a closed door,
        // and a ping now is likeliest to come through.
        let recent = candidate.last_return.is_some_and(|at| now.duration_since(at) < SEARCH_EVERY);
        if !self.active(now) {
            return;
        }
        if self.trusted(now).is_none() {
            if !recent {
                if let Some(candidate) = self.candidate(from) {
                    candidate.last_return = Some(now);
                }
                self.ping(from, ctx);
            }
        } else if self.best().is_some_and(|best| best == from) {
            self.suspect(ctx);
        }
    }

    /// The peer says where it can be reached and that it has opened those paths.
    pub(crate) fn handle_call(&mut self, endpoints: &[SocketAddr], ctx: &mut Context<'_>) {
        for candidate in &mut self.candidates {
            candidate.called = false;
        }
        for addr in endpoints.iter().copied().filter(|a| usable(*a)).take(MAX_CANDIDATES) {
            if let Some(candidate) = self.candidate(addr) {
                candidate.called = true;
                // A ping sent before the call may have met a closed door.
                if candidate
                    .last_ping
                    .is_some_and(|at| ctx.now.duration_since(at) > Duration::from_millis(50))
                {
                    candidate.last_ping = None;
                }
            }
        }
        self.candidates.retain(|c| !c.stale(ctx.now));
        if self.patience == Patience::Short && self.trusted(ctx.now).is_some() {
            // Who calls has lost the path we trust, or never had it: both ways until it answers.
            self.doubt = true;
            self.probe = Some(Probe { at: ctx.now, misses: 0, heartbeat: false });
            self.ping_best(ctx);
        } else {
            self.ping_all(false, ctx);
        }
    }

    /// A pong came in by UDP. True when it gave a new best address.
    pub(crate) fn handle_pong(&mut self, txid: &TxId, now: Instant) -> bool {
        let Some(at) = self.pings.iter().position(|p| p.txid == *txid) else { return false };
        let ping = self.pings.swap_remove(at);
        let latency = now.duration_since(ping.at);
        if !self.candidates.iter().any(|c| c.addr == ping.to) {
            return false;
        }
        let pong = Best { addr: ping.to, latency, trusted_until: now + TRUST };
        let (replace, new) = match &self.best {
            None => (true, true),
            Some(best) if best.addr == ping.to => (true, false),
            Some(best) => {
                let other = self.doubt || now >= best.trusted_until || better(&pong, best);
                (other, other)
            }
        };
        if replace {
            let before = self.best.filter(|best| best.addr == pong.addr).map(|best| best.latency);
            let latency = match before {
                Some(before) if latency > HELD_UP => before,
                Some(before) => (before * 3 + latency) / 4,
                None => latency,
            };
            self.best = Some(Best { latency, ..pong });
            self.probe = None;
            self.doubt = false;
            self.silent_since = None;
        }
        new
    }

    /// When [`PathAgent::handle_timeout`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let probe = self.probe.map(|p| p.at + self.patience(p));
        [self.heartbeat_at, probe].into_iter().flatten().min()
    }

    pub(crate) fn handle_timeout(&mut self, ctx: &mut Context<'_>) {
        let now = ctx.now;
        self.pings.retain(|p| now.duration_since(p.at) < PING_TIMEOUT);
        if !self.active(now) {
            self.heartbeat_at = None;
            self.probe = None;
            self.candidates.retain(|c| !c.stale(now));
            return;
        }
        if let Some(probe) = self.probe.filter(|p| p.at + self.patience(*p) <= now) {
            self.missed(probe, ctx);
        }
        if self.best.is_some_and(|b| now >= b.trusted_until + FORGET_AFTER) {
            self.best = None;
            self.probe = None;
            self.doubt = false;
        }
        if self.heartbeat_at.is_some_and(|at| at <= now) {
            self.heartbeat_at = Some(now + HEARTBEAT);
            self.candidates.retain(|c| !c.stale(now));
            if self.probe.is_none() {
                self.probe = Some(Probe { at: now, misses: 0, heartbeat: true });
                self.ping_best(ctx);
            }
            if self.wants_full_ping(now) {
                self.ping_all(true, ctx);
            }
        }
    }

    fn wants_full_ping(&self, now: Instant) -> bool {
        let Some(since) = self.last_full_ping.map(|at| now.duration_since(at)) else { return true };
        match self.trusted(now) {
            None => true,
            Some((_, latency)) => latency > GOOD_ENOUGH && since >= UPGRADE_EVERY,
        }
    }

    /// How long a question may stay open.
    fn patience(&self, probe: Probe) -> Duration {
        let round_trip = self.best.map_or(PATIENCE_MIN, |b| b.latency);
        let patience = (round_trip * 5 / 4 + PATIENCE_SLACK).clamp(PATIENCE_MIN, PATIENCE_MAX);
        if self.patience == Patience::Stock {
            return HEARTBEAT;
        }
        if self.doubt {
            return (patience * (1 << probe.misses.min(5))).min(DOUBT_PAUSE_MAX.max(patience));
        }
        // Packets come in, or none went out that could be answered.
        let quiet = self.silent_since.is_none_or(|since| since + SILENCE > probe.at + patience);
        if probe.heartbeat && quiet { (patience * 2).max(HEARTBEAT_PATIENCE) } else { patience }
    }

    /// A question to the best address was not answered in time.
    fn missed(&mut self, probe: Probe, ctx: &mut Context<'_>) {
        let misses = probe.misses.saturating_add(1);
        self.probe = Some(Probe { at: ctx.now, misses, heartbeat: false });
        if self.patience == Patience::Short && (!probe.heartbeat || misses > 1) {
            self.doubt = true;
            self.ping_all(true, ctx);
        }
        self.ping_best(ctx);
    }

    fn ping_best(&mut self, ctx: &mut Context<'_>) {
        match self.best {
            Some(best) => self.ping(best.addr, ctx),
            None => self.probe = None,
        }
    }

    fn ping(&mut self, to: SocketAddr, ctx: &mut Context<'_>) {
        if !ctx.reaches(to) {
            return;
        }
        if self.pings.len() >= MAX_PINGS {
            self.pings.swap_remove(0);
        }
        let txid = ctx.random.bytes();
        self.pings.push(Ping { txid, to, at: ctx.now });
        if let Some(candidate) = self.candidates.iter_mut().find(|c| c.addr == to) {
            candidate.last_ping = Some(ctx.now);
        }
        ctx.actions.push(Action::Ping { to, txid });
    }

    /// Pings every candidate that was not pinged in the last five seconds.
    fn ping_all(&mut self, call: bool, ctx: &mut Context<'_>) {
        let now = ctx.now;
        let mut any = false;
        for at in 0..self.candidates.len() {
            let candidate = &self.candidates[at];
            if candidate.last_ping.is_none_or(|last| now.duration_since(last) >= PING_SPACING) {
                let to = candidate.addr;
                self.ping(to, ctx);
                any = true;
            }
        }
        if any {
            self.last_full_ping = Some(now);
        }
        if call && self.last_call.is_none_or(|last| now.duration_since(last) >= CALL_SPACING) {
            self.last_call = Some(now);
            self.last_full_ping = Some(now);
            ctx.actions.push(Action::CallMeMaybe);
        }
    }

    /// Whether a CallMeMaybe was sent so recently that news about our endpoints belong to it.
    pub(crate) fn called_recently(&self, now: Instant) -> bool {
        self.trusted(now).is_none()
            && self.last_call.is_some_and(|at| now.duration_since(at) < Duration::from_secs(3))
    }
}

/// Whether a peer may be sought at this address: the tailnet's own ranges lead back into the tunnel.
pub(crate) fn usable(addr: SocketAddr) -> bool {
    if addr.port() == 0 {
        return false;
    }
    match addr.ip() {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            !(ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() || a == 100 && b & 0xc0 == 64)
        }
        IpAddr::V6(ip) => {
            let tailnet = ip.segments()[..3] == [0xfd7a, 0x115c, 0xa1e0];
            // A link-local address means nothing without its zone, which nobody transmits.
            !(ip.is_unspecified() || ip.is_multicast() || tailnet || ip.is_unicast_link_local())
        }
    }
}

/// Whether `a` should replace `b`: the percentage by which it is faster, plus what its kind is worth.
fn better(a: &Best, b: &Best) -> bool {
    let (la, lb) = (a.latency.max(LATENCY_FLOOR).as_micros(), b.latency.max(LATENCY_FLOOR).as_micros());
    let advantage = |mine: u128, other: u128| if mine < other { 100 - mine * 100 / other } else { 0 };
    let points_a = advantage(la, lb) + kind_points(a.addr.ip());
    let points_b = advantage(lb, la) + kind_points(b.addr.ip());
    points_a > points_b + 1
}

fn kind_points(ip: IpAddr) -> u128 {
    match ip {
        _ if ip.is_loopback() => 50 + u128::from(ip.is_ipv6()) * 10,
        IpAddr::V4(ip) if ip.is_link_local() => 30,
        IpAddr::V4(ip) if ip.is_private() => 20,
        IpAddr::V4(_) => 0,
        IpAddr::V6(ip) if ip.is_unique_local() => 30,
        IpAddr::V6(_) => 10,
    }
}

#[cfg(test)]
mod tests;
