//! A schedule of random faults for a few nodes that talk all the time, and the watch over how long any of
//! them hears nothing from another although there is a way.

use super::*;

/// Each node sends to each other so often while it talks.
const GAP: Duration = Duration::from_millis(250);
/// A path may be stuck for so long.
pub(crate) const STUCK: Duration = Duration::from_secs(15);
/// The same where only a stock node can notice that its connection to a relay is dead.
pub(crate) const STUCK_STOCK: Duration = Duration::from_secs(125 + 15);

/// What one run showed.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Outcome {
    /// The longest silence in one direction while there was a way.
    pub(crate) stuck: Duration,
    /// Packets that arrived.
    pub(crate) arrived: u64,
    /// Pairs that ended on a direct path, and those that did not.
    pub(crate) direct: u64,
    pub(crate) relayed: u64,
}

/// From one node to another.
struct Watch {
    from: usize,
    to: usize,
    /// Since when there has been a way and nothing was heard.
    since: Option<Instant>,
    seen: usize,
}

pub(crate) struct Run {
    pub(crate) world: World,
    seed: u64,
    watches: Vec<Watch>,
    /// Engines that start again then, with their snapshot or without.
    boots: Vec<(Instant, usize, bool)>,
    /// Faults that end then.
    ends: Vec<(Instant, Fault)>,
    talking: bool,
    next: u64,
    outcome: Outcome,
    log: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Silence(usize),
    Region(RegionId, bool),
    AllRegions,
    Udp(usize),
    OneWay(usize, usize),
    NatReset(usize),
    Roam(usize, Nat),
    Restart(usize, bool),
    RestartBoth,
    Control,
    Weather,
    Detour(RegionId),
    Quiet,
}

impl Run {
    /// A world of the seed's making, with its nodes up and acquainted.
    pub(crate) fn new(seed: u64) -> Self {
        let mut world = World::new(seed);
        world.rng.0 ^= 0x0fau64 << 32;
        let regions = 1 + u32::try_from(world.rng.below(3)).expect("small");
        world.derp_regions = (1..=regions).collect();
        world.latency = ms(1 + world.rng.below(60));
        world.jitter = ms(world.rng.below(10));
        let kinds: Vec<Nat> = (0..3).map(|_| random_nat(&mut world.rng)).collect();
        match world.rng.below(5) {
            // Each behind a box of its own, or public.
            0..=2 => {
                let count = 2 + usize::from(world.rng.chance(200));
                for nat in kinds.into_iter().take(count) {
                    world.add(nat);
                }
            }
            // Both behind one box.
            3 => {
                let shared = world.net.add_box(kinds[0], None);
                world.net.set_box(shared, seed.is_multiple_of(2), secs(30 + world.rng.below(200)));
                world.add_behind(shared);
                world.add_behind(shared);
            }
            // One of them behind two.
            _ => {
                let outer = world.net.add_box(kinds[0], None);
                let inner = world.net.add_box(kinds[1], Some(outer));
                world.net.set_box(outer, seed.is_multiple_of(2), secs(30 + world.rng.below(200)));
                world.add_behind(inner);
                if world.rng.chance(500) {
                    world.add_behind(outer);
                } else {
                    world.add(kinds[2]);
                }
            }
        }
        let count = world.nodes.len();
        if world.rng.chance(250) {
            world.nodes[count - 1].stock = true;
        }
        if world.rng.chance(100) {
            world.udp_blocked.insert(0);
        }
        for n in 0..count {
            world.boot(n, false);
        }
        world.run_for(secs(5));
        let mut watches = Vec::new();
        for from in 0..count {
            for to in (0..count).filter(|to| *to != from) {
                watches.push(Watch { from, to, since: None, seen: 0 });
            }
        }
        Self {
            world,
            seed,
            watches,
            boots: Vec::new(),
            ends: Vec::new(),
            talking: true,
            next: 0,
            outcome: Outcome::default(),
            log: Vec::new(),
        }
    }

    /// Some faults one after another, then a sane network again.
    pub(crate) fn play(mut self, faults: u64) -> Outcome {
        let settle = secs(3 + self.world.rng.below(8));
        self.talk(settle);
        for _ in 0..faults {
            let fault = self.draw();
            self.begin(fault);
            let time = ms(2000 + self.world.rng.below(18_000));
            self.talk(time);
        }
        for (_, fault) in std::mem::take(&mut self.ends) {
            self.end(fault);
        }
        self.world.udp_blocked.clear();
        self.world.loss = 0;
        self.talk(secs(25));
        for watch in &self.watches {
            match self.world.direct(watch.from, watch.to) {
                true => self.outcome.direct += 1,
                false => self.outcome.relayed += 1,
            }
        }
        self.outcome
    }

    fn draw(&mut self) -> Fault {
        let rng = &mut self.world.rng;
        let count = u64::try_from(self.world.nodes.len()).expect("few");
        let mut node = || usize::try_from(rng.below(count)).expect("few");
        let (a, b) = (node(), node());
        let other = if a == b { (a + 1) % self.world.nodes.len() } else { b };
        let regions = u64::try_from(self.world.derp_regions.len()).expect("few");
        let region = RegionId(1 + u32::try_from(rng.below(regions)).expect("few"));
        match rng.below(14) {
            0 => Fault::Silence(a),
            1 | 2 => Fault::Region(region, rng.chance(500)),
            3 => Fault::AllRegions,
            4 | 5 => Fault::Udp(a),
            6 => Fault::OneWay(a, other),
            7 => Fault::NatReset(a),
            8 => Fault::Roam(a, random_nat(rng)),
            9 => Fault::Restart(a, rng.chance(800)),
            10 => Fault::RestartBoth,
            11 => Fault::Control,
            12 => [Fault::Weather, Fault::Detour(region)][usize::from(rng.chance(300))],
            _ => Fault::Quiet,
        }
    }

    fn begin(&mut self, fault: Fault) {
        self.log.push(format!("{:?} {fault:?}", self.world.now - self.world.start));
        let now = self.world.now;
        let lasts = ms(500 + self.world.rng.below(40_000));
        let mut until = Some(now + lasts);
        match fault {
            Fault::Silence(n) => {
                self.world.silence_derp(n);
                until = None;
            }
            Fault::Region(region, stun) => {
                self.world.take_region_down(region);
                if stun {
                    self.world.stun_down.insert(region);
                }
            }
            Fault::AllRegions => self.world.take_derp_down(),
            Fault::Udp(n) => {
                self.world.udp_blocked.insert(n);
            }
            Fault::OneWay(a, b) => {
                self.world.blocked_pairs.insert((a, b));
            }
            Fault::NatReset(n) => {
                self.world.reset_nat(n);
                until = None;
            }
            Fault::Roam(n, nat) => {
                self.world.roam_to(n, nat);
                until = None;
            }
            Fault::Restart(n, snapshot) => {
                self.restart(n, snapshot);
                until = None;
            }
            Fault::RestartBoth => {
                for n in 0..self.world.nodes.len() {
                    let snapshot = self.world.rng.chance(800);
                    self.restart(n, snapshot);
                }
                until = None;
            }
            Fault::Control => self.world.set_control(false),
            Fault::Weather => {
                self.world.loss = self.world.rng.below(250);
                self.world.latency = ms(1 + self.world.rng.below(150));
                self.world.jitter = ms(self.world.rng.below(30));
            }
            Fault::Detour(region) => {
                let detour = ms(self.world.rng.below(200));
                self.world.detours.insert(region, detour);
            }
            Fault::Quiet => self.talking = false,
        }
        if let Some(until) = until {
            self.ends.push((until, fault));
        }
    }

    fn restart(&mut self, n: usize, snapshot: bool) {
        if self.world.nodes[n].engine.is_some() {
            self.world.kill(n);
            let back = self.world.now + ms(self.world.rng.below(3000));
            self.boots.push((back, n, snapshot));
        }
    }

    fn end(&mut self, fault: Fault) {
        match fault {
            Fault::Region(region, _) => {
                self.world.stun_down.remove(&region);
                self.world.bring_region_up(region);
            }
            Fault::AllRegions => self.world.bring_derp_up(),
            Fault::Udp(n) => {
                self.world.udp_blocked.remove(&n);
            }
            Fault::OneWay(a, b) => {
                self.world.blocked_pairs.remove(&(a, b));
            }
            Fault::Control => self.world.set_control(true),
            Fault::Weather => self.world.loss = 0,
            Fault::Detour(region) => {
                self.world.detours.remove(&region);
            }
            Fault::Quiet => self.talking = true,
            Fault::Silence(_)
            | Fault::NatReset(_)
            | Fault::Roam(..)
            | Fault::Restart(..)
            | Fault::RestartBoth => {}
        }
    }

    fn talk(&mut self, time: Duration) {
        let until = self.world.now + time;
        while self.world.now < until {
            let now = self.world.now;
            let (due, later): (Vec<_>, Vec<_>) = self.boots.drain(..).partition(|(at, ..)| *at <= now);
            self.boots = later;
            for (_, n, snapshot) in due {
                self.world.boot(n, snapshot);
            }
            let (due, later): (Vec<_>, Vec<_>) = self.ends.drain(..).partition(|(at, _)| *at <= now);
            self.ends = later;
            for (_, fault) in due {
                self.end(fault);
            }
            if self.talking {
                for at in 0..self.watches.len() {
                    let (from, to) = (self.watches[at].from, self.watches[at].to);
                    self.world.send(from, to, self.next);
                }
                self.next += 1;
            }
            self.world.run_for(GAP);
            self.watch();
        }
    }

    /// Whether there is a way from one node to another that does not need control's help or a lucky NAT: a
    /// relay where the receiver is known to be.
    fn way(&self, from: usize, to: usize) -> bool {
        let nodes = &self.world.nodes;
        let running = |n: usize| nodes[n].engine.as_ref().is_some_and(|e| e.status().running);
        let up = |region: RegionId| region.is_some() && !self.world.derp_down.contains(&region);
        let relay = if self.world.control_down {
            // Nobody is told of a new home.
            up(nodes[from].record.home_derp) && up(nodes[to].record.home_derp)
        } else {
            self.world.derp_regions.iter().any(|region| up(RegionId(*region)))
        };
        running(from) && running(to) && relay && self.world.knows(from, to) && self.world.knows(to, from)
    }

    fn watch(&mut self) {
        let now = self.world.now;
        let mut watches = std::mem::take(&mut self.watches);
        for watch in &mut watches {
            let received = &self.world.nodes[watch.to].received;
            let heard = received[watch.seen.min(received.len())..].iter().any(|(src, ..)| *src == watch.from);
            watch.seen = received.len();
            if heard {
                self.outcome.arrived += 1;
            }
            if heard || !self.talking || !self.way(watch.from, watch.to) {
                watch.since = None;
                continue;
            }
            let since = *watch.since.get_or_insert(now);
            let stuck = now - since;
            self.outcome.stuck = self.outcome.stuck.max(stuck);
            let stock = [watch.from, watch.to].iter().any(|n| self.world.nodes[*n].stock);
            let bar = if stock { STUCK_STOCK } else { STUCK };
            assert!(stuck <= bar, "{}", self.story(watch.from, watch.to, stuck));
        }
        self.watches = watches;
    }

    fn story(&self, from: usize, to: usize, stuck: Duration) -> String {
        let world = &self.world;
        let node = |n: usize| {
            format!(
                "node {n}: {:?} at {:?}, wants {:?}, connected {:?}, silent {:?}, home {:?}, path {:?}, stock {}",
                world.net.nat(n),
                world.net.place(n),
                world.nodes[n].wanted,
                world.nodes[n].connected,
                world.nodes[n].silent.keys().collect::<Vec<_>>(),
                world.nodes[n].engine.as_ref().map(|e| e.status().home_derp),
                world.path(n, if n == from { to } else { from }),
                world.nodes[n].stock,
            )
        };
        format!(
            "seed {}: {from} to {to} stuck for {stuck:?} at {:?}\n{}\n{}\ndown {:?}, control down {}\nfaults:\n  {}",
            self.seed,
            world.now - world.start,
            node(from),
            node(to),
            world.derp_down,
            world.control_down,
            self.log.join("\n  "),
        )
    }
}

fn random_nat(rng: &mut Rng) -> Nat {
    Nat::ALL[usize::try_from(rng.below(5)).expect("small")]
}
