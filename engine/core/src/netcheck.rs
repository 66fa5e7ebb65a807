//! What the internet looks like from here: our addresses as STUN servers see them, how far the DERP
//! regions are, and which of them is home.
//!
//! A round asks one or two nodes of each region (full: all regions; quick: home and the three nearest)
//! over both families, repeats what got no answer, and ends when every region answered or after
//! [`ROUND_MAX`]. Full rounds come every five minutes; quick ones keep the NAT mapping alive while packets
//! flow. Nothing is sent in between.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::batch::RegionId;
use crate::random::Random;
use crate::tailcfg::{DerpMap, DerpNode};

const FULL_EVERY: Duration = Duration::from_secs(300);
const QUICK_MIN_MS: u64 = 20_000;
const QUICK_SPREAD_MS: u64 = 6_000;
/// Traffic within this time keeps quick rounds going.
const ACTIVE: Duration = Duration::from_secs(45);
const ROUND_MAX: Duration = Duration::from_secs(3);
const REPEATS: [Duration; 3] =
    [Duration::from_millis(150), Duration::from_millis(500), Duration::from_millis(1500)];
/// With no home yet, one is taken so soon after the first answer, or after the start without any.
const FIRST_HOME_AFTER_ANSWER: Duration = Duration::from_millis(50);
const FIRST_HOME_BLIND: Duration = Duration::from_millis(600);
const NEAREST: usize = 3;
/// Regions measured by HTTPS in a round.
const MAX_MEASURED: usize = 16;
const NODES_PER_REGION: usize = 2;
const MAX_REGIONS: usize = 256;
const MAX_PROBES: usize = 1024;
/// A switch of home must gain so much, and at least a third.
const HOME_GAIN: Duration = Duration::from_millis(10);
/// Traffic on the home relay within this time shows that it lives although STUN does not answer.
const HOME_HEARD: Duration = Duration::from_secs(120);

/// A STUN transaction id.
pub(crate) type TxId = [u8; 12];

/// A request to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StunRequest {
    pub(crate) to: SocketAddr,
    pub(crate) txid: TxId,
}

/// What a call may use.
pub(crate) struct Context<'a> {
    pub(crate) now: Instant,
    pub(crate) random: &'a mut Random,
    pub(crate) requests: &'a mut Vec<StunRequest>,
    pub(crate) resolve: &'a mut Vec<String>,
    pub(crate) v4: bool,
    pub(crate) v6: bool,
}

#[derive(Debug, Clone)]
enum Target {
    Addr(IpAddr),
    Host(String),
}

#[derive(Debug, Clone)]
struct StunNode {
    targets: Vec<Target>,
    port: u16,
}

#[derive(Debug, Clone)]
struct Region {
    nodes: Vec<StunNode>,
    home_allowed: bool,
    measured: bool,
    score: f64,
    latency: Option<Duration>,
    latency_v6: Option<Duration>,
    /// Of an HTTPS request; measured when UDP does not get through.
    latency_https: Option<Duration>,
}

#[derive(Debug, Clone)]
struct Probe {
    txid: TxId,
    region: RegionId,
    to: SocketAddr,
    sent: Instant,
}

#[derive(Debug)]
struct Round {
    full: bool,
    started: Instant,
    first_answer: Option<Instant>,
    regions: Vec<RegionId>,
    probes: Vec<Probe>,
    /// Best answer of this round, by region.
    answers: BTreeMap<RegionId, Duration>,
    mapped_v4: Vec<SocketAddr>,
    repeats: usize,
    /// A first home was asked for before the end.
    home_asked: bool,
}

impl Round {
    fn first_home_at(&self) -> Instant {
        self.first_answer.map_or(self.started + FIRST_HOME_BLIND, |at| at + FIRST_HOME_AFTER_ANSWER)
    }
}

/// What a round, or an answer in it, changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    /// Our mapped addresses.
    pub(crate) endpoints: bool,
    /// Home should be chosen again.
    pub(crate) home: bool,
}

/// Measures and remembers.
#[derive(Debug, Default)]
pub(crate) struct Netcheck {
    /// How transaction ids begin.
    mark: [u8; 4],
    regions: BTreeMap<RegionId, Region>,
    resolved: HashMap<String, Vec<IpAddr>>,
    asked: Vec<String>,
    round: Option<Round>,
    next_full: Option<Instant>,
    next_quick: Option<Instant>,
    last_traffic: Option<Instant>,
    last_round: Option<Instant>,
    mapped_v4: Option<SocketAddr>,
    mapped_v6: Option<SocketAddr>,
    varies: Option<bool>,
    /// Regions to be measured by HTTPS.
    to_measure: Vec<RegionId>,
    /// How many of those asked for have not been reported.
    measuring: usize,
}

impl Netcheck {
    /// Nothing known yet; the transaction ids of its requests will begin with `mark`.
    pub(crate) fn new(mark: [u8; 4]) -> Self {
        Self { mark, ..Self::default() }
    }

    /// Takes over a DERP map; a full round follows when the regions changed.
    pub(crate) fn set_map(&mut self, map: &DerpMap, now: Instant) {
        let mut regions = BTreeMap::new();
        for (id, region) in map.iter().take(MAX_REGIONS) {
            let old = self.regions.get(&id);
            regions.insert(
                id,
                Region {
                    nodes: region.nodes.iter().filter_map(stun_node).take(NODES_PER_REGION).collect(),
                    home_allowed: !region.avoid && !region.no_measure_no_home && has_derp(&region.nodes),
                    measured: !region.no_measure_no_home,
                    score: map.region_score(id),
                    latency: old.and_then(|r| r.latency),
                    latency_v6: old.and_then(|r| r.latency_v6),
                    latency_https: old.and_then(|r| r.latency_https),
                },
            );
        }
        self.regions = regions;
        let hosts: Vec<String> = self.hosts().cloned().collect();
        self.resolved.retain(|host, _| hosts.contains(host));
        self.asked.retain(|host| hosts.contains(host));
        self.round = None;
        self.next_full = Some(now);
    }

    fn hosts(&self) -> impl Iterator<Item = &String> {
        self.regions.values().flat_map(|r| &r.nodes).flat_map(|n| &n.targets).filter_map(
            |target| match target {
                Target::Host(host) => Some(host),
                Target::Addr(_) => None,
            },
        )
    }

    /// Whether any region is known.
    pub(crate) fn has_regions(&self) -> bool {
        !self.regions.is_empty()
    }

    /// Whether there is one possible home, so that measuring can wait.
    pub(crate) fn only_choice(&self) -> bool {
        self.regions.values().filter(|r| r.home_allowed).count() == 1
    }

    /// Measures anew soon: our addresses changed.
    pub(crate) fn restart(&mut self, now: Instant) {
        self.round = None;
        self.mapped_v4 = None;
        self.mapped_v6 = None;
        self.varies = None;
        if self.has_regions() {
            self.next_full = Some(now);
        }
    }

    /// Packets flow: the mapping is worth keeping.
    pub(crate) fn note_traffic(&mut self, now: Instant) {
        self.last_traffic = Some(now);
        if self.next_quick.is_none() && self.has_regions() {
            let due = self.last_round.map_or(now, |at| at + Duration::from_millis(QUICK_MIN_MS));
            self.next_quick = Some(due.max(now));
        }
    }

    /// Host names and their addresses, for a snapshot.
    pub(crate) fn resolved(&self) -> impl Iterator<Item = (&String, &Vec<IpAddr>)> {
        self.resolved.iter()
    }

    /// What an earlier life resolved.
    pub(crate) fn restore_resolved(&mut self, resolved: Vec<(String, Vec<IpAddr>)>) {
        self.resolved = resolved.into_iter().take(MAX_REGIONS).collect();
    }

    /// A host name's addresses.
    pub(crate) fn set_resolved(&mut self, host: &str, addresses: &[IpAddr], ctx: &mut Context<'_>) {
        let Some(at) = self.asked.iter().position(|asked| asked == host) else { return };
        self.asked.swap_remove(at);
        if addresses.is_empty() {
            // What was known stays; the next full round asks again.
            return;
        }
        self.resolved.insert(host.to_owned(), addresses.iter().copied().take(8).collect());
        if self.round.is_some() {
            self.send_probes(ctx);
        }
    }

    /// Our address as STUN servers see it, by family.
    pub(crate) fn mapped(&self) -> [Option<SocketAddr>; 2] {
        [self.mapped_v4, self.mapped_v6]
    }

    /// Whether the NAT gives a new port for each destination.
    pub(crate) fn mapping_varies(&self) -> Option<bool> {
        self.varies
    }

    /// Whether any STUN server answered in the last round.
    pub(crate) fn udp_works(&self) -> bool {
        self.mapped_v4.is_some() || self.mapped_v6.is_some()
    }

    /// When the last round of measurements began.
    pub(crate) fn last_round(&self) -> Option<Instant> {
        self.last_round
    }

    /// Last measured latencies: region, IPv4, IPv6.
    pub(crate) fn latencies(&self) -> impl Iterator<Item = (RegionId, Option<Duration>, Option<Duration>)> {
        self.regions.iter().map(|(id, r)| (*id, r.latency.or(r.latency_https), r.latency_v6))
    }

    /// Regions whose latency is to be measured by HTTPS.
    pub(crate) fn take_to_measure(&mut self) -> impl Iterator<Item = RegionId> {
        self.measuring += self.to_measure.len();
        self.to_measure.drain(..)
    }

    /// A region answered an HTTPS request, or did not. True when that was the last one asked.
    pub(crate) fn handle_https(&mut self, region: RegionId, latency: Option<Duration>) -> bool {
        if let Some(region) = self.regions.get_mut(&region) {
            region.latency_https = latency;
        }
        self.measuring = self.measuring.saturating_sub(1);
        self.measuring == 0
    }

    /// Regions that could be home instead of `home`, nearest first, the unmeasured in an order that differs
    /// between nodes.
    pub(crate) fn nearest(&self, home: RegionId, salt: u64) -> Vec<RegionId> {
        let mut others: Vec<RegionId> =
            self.regions.iter().filter(|(id, r)| r.home_allowed && **id != home).map(|(id, _)| *id).collect();
        others.sort_by_cached_key(|id| {
            let spread = (u64::from(id.0) ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (self.weighed(*id).unwrap_or(Duration::MAX), spread)
        });
        others.truncate(NEAREST);
        others
    }

    fn weighed(&self, id: RegionId) -> Option<Duration> {
        let score = self.regions.get(&id)?.score;
        Some(self.best_latency(id)?.mul_f64(score.clamp(0.01, 100.0)))
    }

    /// When [`Netcheck::handle_timeout`] has something to do.
    pub(crate) fn deadline(&self, has_home: bool) -> Option<Instant> {
        let Some(round) = &self.round else {
            return [self.next_full, self.next_quick].into_iter().flatten().min();
        };
        let repeat = REPEATS.get(round.repeats).map(|after| round.started + *after);
        let first_home = (!has_home && !round.home_asked).then(|| round.first_home_at());
        [repeat, first_home, Some(round.started + ROUND_MAX)].into_iter().flatten().min()
    }

    pub(crate) fn handle_timeout(&mut self, home: RegionId, ctx: &mut Context<'_>) -> Changed {
        let now = ctx.now;
        let has_home = home.is_some();
        let mut changed = Changed::default();
        if let Some(round) = &mut self.round {
            if now < round.started + ROUND_MAX {
                let home = !has_home && !round.home_asked && now >= round.first_home_at();
                round.home_asked |= home;
                if REPEATS.get(round.repeats).is_some_and(|after| now >= round.started + *after) {
                    round.repeats += 1;
                    self.send_probes(ctx);
                }
                return Changed { endpoints: false, home };
            }
            changed = self.finish();
        }
        if self.next_full.is_some_and(|at| at <= now) {
            self.start(true, home, ctx);
        } else if self.next_quick.is_some_and(|at| at <= now) {
            if self.last_traffic.is_some_and(|at| now.duration_since(at) < ACTIVE) {
                self.start(false, home, ctx);
            } else {
                self.next_quick = None;
            }
        }
        changed
    }

    fn start(&mut self, full: bool, home: RegionId, ctx: &mut Context<'_>) {
        let now = ctx.now;
        let measured = |(id, r): (&RegionId, &Region)| (r.measured && !r.nodes.is_empty()).then_some(*id);
        let mut regions: Vec<RegionId> = self.regions.iter().filter_map(measured).collect();
        if !full {
            regions.sort_by_key(|id| (*id != home, self.best_latency(*id).unwrap_or(Duration::MAX)));
            regions.truncate(NEAREST + 1);
        }
        if full {
            self.next_full = Some(now + FULL_EVERY);
            self.measuring = 0;
            // Names are asked for anew, also those whose answer never came; what is known serves meanwhile.
            let known: BTreeSet<String> =
                self.hosts().filter(|host| self.resolved.contains_key(*host)).cloned().collect();
            self.asked = known.into_iter().collect();
            ctx.resolve.extend_from_slice(&self.asked);
        }
        let spread = Duration::from_millis(QUICK_MIN_MS + ctx.random.next_u64() % QUICK_SPREAD_MS);
        let active = self.last_traffic.is_some_and(|at| now.duration_since(at) < ACTIVE);
        self.next_quick = active.then_some(now + spread);
        self.last_round = Some(now);
        self.round = Some(Round {
            full,
            started: now,
            first_answer: None,
            regions,
            probes: Vec::new(),
            answers: BTreeMap::new(),
            mapped_v4: Vec::new(),
            repeats: 0,
            home_asked: false,
        });
        self.send_probes(ctx);
    }

    /// Asks every region of the round that has not answered yet.
    fn send_probes(&mut self, ctx: &mut Context<'_>) {
        let Some(round) = &mut self.round else { return };
        for id in &round.regions {
            let Some(region) = self.regions.get(id) else { continue };
            if round.answers.contains_key(id) {
                continue;
            }
            for node in &region.nodes {
                let mut addrs: Vec<IpAddr> = Vec::new();
                for target in &node.targets {
                    match target {
                        Target::Addr(addr) => addrs.push(*addr),
                        Target::Host(host) => match self.resolved.get(host) {
                            Some(found) => addrs.extend(found),
                            None if !self.asked.contains(host) => {
                                self.asked.push(host.clone());
                                ctx.resolve.push(host.clone());
                            }
                            None => {}
                        },
                    }
                }
                let first = |v6: bool| addrs.iter().copied().find(|a| a.is_ipv6() == v6);
                for addr in [first(false).filter(|_| ctx.v4), first(true).filter(|_| ctx.v6)] {
                    let Some(addr) = addr.filter(|_| round.probes.len() < MAX_PROBES) else { continue };
                    let mut txid = ctx.random.bytes();
                    txid[..4].copy_from_slice(&self.mark);
                    let request = StunRequest { to: SocketAddr::new(addr, node.port), txid };
                    round.probes.push(Probe {
                        txid: request.txid,
                        region: *id,
                        to: request.to,
                        sent: ctx.now,
                    });
                    ctx.requests.push(request);
                }
            }
        }
    }

    /// A STUN server answered; only a transaction of the round under way counts.
    pub(crate) fn handle_response(&mut self, txid: &TxId, mapped: SocketAddr, now: Instant) -> Changed {
        let Some(round) = &mut self.round else { return Changed::default() };
        let Some(at) = round.probes.iter().position(|p| p.txid == *txid) else { return Changed::default() };
        let probe = round.probes.swap_remove(at);
        let latency = now.duration_since(probe.sent);
        round.first_answer.get_or_insert(now);
        let answer = round.answers.entry(probe.region).or_insert(latency);
        *answer = latency.min(*answer);
        if let Some(region) = self.regions.get_mut(&probe.region) {
            let slot = if probe.to.is_ipv4() { &mut region.latency } else { &mut region.latency_v6 };
            *slot = Some(latency);
        }
        let slot = if mapped.is_ipv4() { &mut self.mapped_v4 } else { &mut self.mapped_v6 };
        let mut changed = Changed::default();
        if mapped.is_ipv4() {
            if round.mapped_v4.is_empty() && *slot != Some(mapped) {
                *slot = Some(mapped);
                changed.endpoints = true;
            }
            round.mapped_v4.push(mapped);
            if round.mapped_v4.len() > 1 {
                let varies = Some(round.mapped_v4.iter().any(|m| *m != round.mapped_v4[0]));
                changed.endpoints |= self.varies != varies;
                self.varies = varies;
            }
        } else if *slot != Some(mapped) {
            *slot = Some(mapped);
            changed.endpoints = true;
        }
        // The other node or family of a region may still answer; the round does not wait for it.
        if round.answers.len() >= round.regions.len() {
            let grace = round.probes.is_empty() || round.regions.len() == 1;
            if grace {
                let end = self.finish();
                changed.endpoints |= end.endpoints;
                changed.home |= end.home;
            }
        }
        changed
    }

    fn finish(&mut self) -> Changed {
        let Some(round) = self.round.take() else { return Changed::default() };
        let mut changed = Changed { endpoints: false, home: true };
        for id in &round.regions {
            if round.full
                && !round.answers.contains_key(id)
                && let Some(region) = self.regions.get_mut(id)
            {
                region.latency = None;
                region.latency_v6 = None;
            }
            if !round.answers.is_empty()
                && let Some(region) = self.regions.get_mut(id)
            {
                region.latency_https = None;
            }
        }
        if round.full && round.answers.is_empty() && self.to_measure.is_empty() && self.measuring == 0 {
            self.to_measure.extend(round.regions.iter().take(MAX_MEASURED));
        }
        if round.answers.is_empty() && !round.regions.is_empty() && self.udp_works() {
            self.mapped_v4 = None;
            self.mapped_v6 = None;
            changed.endpoints = true;
        }
        changed
    }

    fn best_latency(&self, id: RegionId) -> Option<Duration> {
        let region = self.regions.get(&id)?;
        [region.latency, region.latency_v6].into_iter().flatten().min().or(region.latency_https)
    }

    /// The home region, given the present one. `salt` picks one for good where nothing can be measured.
    pub(crate) fn choose_home(
        &self,
        current: RegionId,
        heard: Option<Instant>,
        salt: u64,
        now: Instant,
    ) -> RegionId {
        let allowed: Vec<RegionId> =
            self.regions.iter().filter(|(_, r)| r.home_allowed).map(|(id, _)| *id).collect();
        let nearest = allowed.iter().filter_map(|id| Some((self.weighed(*id)?, *id))).min();
        let current_allowed = allowed.contains(&current);
        match nearest {
            None if current_allowed => current,
            None => {
                let count = u64::try_from(allowed.len()).unwrap_or(1).max(1);
                let at = usize::try_from(salt % count).unwrap_or(0);
                allowed.get(at).copied().unwrap_or_default()
            }
            Some((_, id)) if !current_allowed => id,
            Some((latency, id)) => match self.weighed(current) {
                Some(old) if old < latency + HOME_GAIN || latency * 3 > old * 2 => current,
                None if heard.is_some_and(|at| now.duration_since(at) < HOME_HEARD) => current,
                Some(_) | None => id,
            },
        }
    }
}

fn has_derp(nodes: &[DerpNode]) -> bool {
    nodes.iter().any(|n| !n.stun_only)
}

fn stun_node(node: &DerpNode) -> Option<StunNode> {
    let port = node.stun_port()?;
    // An address "none" switches a family off; an empty one is looked up.
    let fixed: Vec<IpAddr> = [&node.ipv4, &node.ipv6].iter().filter_map(|text| text.parse().ok()).collect();
    let look_up = node.ipv4.is_empty() && node.ipv6.is_empty() || fixed.is_empty();
    let mut targets: Vec<Target> = fixed.into_iter().map(Target::Addr).collect();
    if look_up {
        targets.push(match node.host_name.parse() {
            Ok(addr) => Target::Addr(addr),
            Err(_) => Target::Host(node.host_name.clone()),
        });
    }
    Some(StunNode { targets, port })
}

#[cfg(test)]
mod tests;
