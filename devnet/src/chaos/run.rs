//! Does what the schedule says and writes down what is seen.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::checker::{End, Observed, PairSeen, Report, Seen, judge, may_lose, percentiles};
use super::churn::{Away, Churn};
use super::hog::Hog;
use super::schedule::{Counts, Event, Schedule};
use super::talk::Talk;
use super::traffic::Traffic;
use super::world::{CHURN, World, pids};
use crate::Mode;
use crate::lab::Programs;

/// Between pings to the pod that is hurt.
const VICTIM_EVERY: Duration = Duration::from_millis(5);
/// The same while its engine is replaced: what that costs is a few of them.
const HANDOVER_EVERY: Duration = Duration::from_millis(1);
/// Between other pings, for as many pairs as may go so fast.
const BYSTANDER_EVERY: Duration = Duration::from_millis(20);
const BYSTANDERS_FAST: usize = 12;
/// Between pings of all further pairs.
const SLOW_EVERY: Duration = Duration::from_millis(500);
/// For each pod when all are hurt at once: pings a second that the machine has to carry, all together.
const PINGS_PER_SECOND: u32 = 1000;
/// Replies in a row that show traffic as before.
const REPLIES: usize = 10;
const EVENT_LIMIT: Duration = Duration::from_secs(30);
/// What is under way arrives within this.
const SETTLE: Duration = Duration::from_secs(2);
/// An engine that lived as long has been healthy: it is started again at once.
const HEALTHY_AFTER: Duration = Duration::from_millis(1300);
const CHURN_PAUSE: Duration = Duration::from_secs(2);
const TALK_PORT: u16 = 7000;
/// A connection in one of TCP's pauses speaks again within this.
const TALK_AGAIN: Duration = Duration::from_secs(130);
const REGION: u32 = 1;
const POLL: Duration = Duration::from_millis(5);

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Of the schedule.
    pub seed: u64,
    /// Home pods, 1 to 200.
    pub pods: usize,
    /// How many events of each kind.
    pub counts: Counts,
    /// Goes on with another such deck when this one is used up.
    pub repeats: bool,
    /// Ends early after this long.
    pub limit: Duration,
    /// `node.cgroup_root` of home; the caller removes it. Empty for none, and then there are no memory bombs.
    pub cgroup_root: String,
}

/// Runs in the namespaces of this process, which are its own; files go below `dir`, programs are found
/// beside `beside`. `say` gets lines for a person.
///
/// # Errors
/// When it cannot be run to its end: what the events themselves cost is in the report.
pub fn run(dir: &Path, beside: &Path, options: &Options, say: &mut dyn FnMut(&str)) -> Result<Report> {
    let started = Instant::now();
    let Options { seed, pods, mut counts, repeats, limit, ref cgroup_root } = *options;
    say(&format!("seed {seed}, {pods} pods, {limit:?} at most"));
    let world = World::start(dir, Programs::find(beside)?, pods, cgroup_root)?;
    if let Some(why) = world.lacks_memory_limits()? {
        anyhow::ensure!(repeats || counts.bombs == 0, "no memory bombs: {why}");
        say(&format!("memory bombs: left out, {why}"));
        counts.bombs = 0;
    }
    let away = Arc::new(Away::default());
    let pairs = world.pairs()?;
    let mut lanes: Vec<_> = pairs.iter().map(|pair| (pair.from.clone(), pair.to)).collect();
    // Beside them, what this machine does to pings that podtether has no part in.
    let bare = lanes.len();
    lanes.push(world.bare()?);
    let traffic = Traffic::start(&lanes, BYSTANDER_EVERY)?;
    let all: Vec<usize> = (0..pairs.len()).collect();
    let first = Instant::now();
    anyhow::ensure!(
        traffic.wait_answered(&all, first, 3, EVENT_LIMIT),
        "not every pair talks at the start:\n{}",
        world.log()
    );
    let talks = talk(&world)?;
    let churn = Churn::start(world.home.caller(), CHURN, Arc::clone(&away), CHURN_PAUSE);
    say(&format!("{} pairs talk after {:.1} s", pairs.len(), started.elapsed().as_secs_f32()));

    let ends = pairs.iter().map(|pair| pair.ends).collect();
    let mut shell =
        Shell { world, traffic, ends, away, engines: Vec::new(), born: Vec::new(), since: Instant::now() };
    shell.engines = pids(&shell.world.settled()?);
    shell.born = vec![Instant::now(); pods];
    for lane in &all {
        shell.traffic.set_interval(*lane, shell.pace(*lane));
    }
    shell.traffic.set_interval(bare, VICTIM_EVERY);
    let mut bare_gaps = Vec::new();
    let mut seen = Seen::default();
    let begun = Instant::now();
    let mut worst_delay = Duration::ZERO;
    let mut told = Instant::now();
    let mut schedule = Schedule::new(seed, pods, counts, repeats);
    while begun.elapsed() < limit {
        let Some(event) = schedule.next() else { break };
        let event_from = shell.since;
        let mut observed = match shell.happen(event) {
            Ok(observed) => observed,
            Err(error) => {
                say(&shell.world.log());
                return Err(error.context(format!("event {}, {event:?}", seen.events.len() + 1)));
            }
        };
        observed.broken = talks.iter().filter_map(Talk::broke).collect();
        let number = seen.events.len() + 1;
        for breach in super::checker::breaches(number, &observed, pods) {
            say(&breach);
        }
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            say(&format!("{number} events after {} s", begun.elapsed().as_secs()));
        }
        seen.events.push(observed);
        bare_gaps.push(shell.traffic.gap(bare, event_from, shell.since));
        worst_delay = worst_delay.max(shell.traffic.forget_before(shell.since));
    }
    let rest = if repeats { 0 } else { schedule.count() };
    say(&format!("{} events in {} s, {rest} not reached", seen.events.len(), begun.elapsed().as_secs(),));
    let [p50, p99, max] = percentiles(bare_gaps).unwrap_or_default().map(|gap| gap.as_millis());
    say(&format!(
        "the machine itself: longest gap of 5 ms pings over a bare veth, an event: p50 {p50} ms, p99 {p99} ms, \
         max {max} ms; the pinging thread came {} ms late at worst",
        worst_delay.as_millis()
    ));

    seen.churn = churn.finish()?;
    say(&format!("{CHURN}: {} joins, {} tries excused", seen.churn.joins.len(), seen.churn.excused.len()));
    seen.stuck = stuck(&talks);
    drop(talks);
    let Shell { mut world, traffic, .. } = shell;
    drop(traffic);
    seen.left_over = world.leave()?;
    seen.left_over.extend(world.devnet.complaints().into_iter().map(|text| format!("complaint: {text}")));
    Ok(judge(&seen, pods))
}

/// A connection from a peer to every home pod.
fn talk(world: &World) -> Result<Vec<Talk>> {
    let pods = u32::try_from(world.pods.len())?;
    let pace = Duration::from_millis(100).max(Duration::from_millis(5) * pods);
    let mut talks = Vec::new();
    for (n, pod) in world.pods.iter().enumerate() {
        let peer = &world.peers[n % world.peers.len()];
        let name = format!("{} to {}", peer.name, pod.name);
        let talk = Talk::start(name, &peer.netns, &pod.netns, pod.at(TALK_PORT)?, pace)?;
        talks.push(talk);
    }
    Ok(talks)
}

/// Connections that do not go on.
fn stuck(talks: &[Talk]) -> Vec<String> {
    let before: Vec<u64> = talks.iter().map(Talk::rounds).collect();
    let until = Instant::now() + TALK_AGAIN;
    loop {
        let silent = || talks.iter().zip(&before).filter(|(talk, before)| talk.rounds() <= **before);
        if silent().next().is_none() || Instant::now() > until {
            return silent()
                .map(|(talk, _)| talk.broke().unwrap_or_else(|| talk.name().to_owned()))
                .collect();
        }
        std::thread::sleep(POLL);
    }
}

struct Shell {
    world: World,
    traffic: Traffic,
    ends: Vec<[End; 2]>,
    away: Arc<Away>,
    /// Pids by home pod.
    engines: Vec<i32>,
    /// No later than when each engine was healthy last.
    born: Vec<Instant>,
    /// Up to where pings are judged.
    since: Instant,
}

/// What an event's own part finds out.
#[derive(Default)]
struct Outcome {
    figure: Option<Duration>,
    killed_after: Option<Duration>,
    looked_at: Option<Duration>,
}

impl Shell {
    /// The pace of a pair that nobody hurts.
    fn pace(&self, lane: usize) -> Duration {
        // The last pairs are those among bystanders.
        let fast = lane < BYSTANDERS_FAST || lane >= self.world.pods.len();
        if fast { BYSTANDER_EVERY } else { SLOW_EVERY }
    }

    fn happen(&mut self, event: Event) -> Result<Observed> {
        let from = self.since;
        let outcome = match event {
            Event::EngineKill { victim } => self.kill_engine(victim),
            Event::EngineStop { victim } => self.stop_engine(victim),
            Event::MemoryBomb { victim } => self.bomb(victim),
            Event::Handover { victim } => self.hand_over(victim),
            Event::SupervisorKill { down } => self.kill_supervisor(down),
            Event::KillEverything { down } => self.kill_everything(down),
            Event::ControlAway { away } => self.outage(away, true, false),
            Event::DerpAway { away } => self.outage(away, false, true),
            Event::DevnetAway { away } => self.outage(away, true, true),
            Event::LinkDown { away } => self.link_down(away),
        }?;
        let (mut missing, mut changed, mut replaced) = (Vec::new(), Vec::new(), BTreeSet::new());
        match self.settled_after(event) {
            Ok(reports) => {
                let now = pids(&reports);
                replaced = (0..now.len()).filter(|n| now.get(*n) != self.engines.get(*n)).collect();
                for n in &replaced {
                    self.born[*n] = Instant::now();
                }
                self.engines = now;
                changed = self.world.changes(&reports);
                changed.extend(self.world.changes_inside(replaced.iter().copied())?);
            }
            Err(error) => missing.push(format!("{error:#}")),
        }
        let to = Instant::now();
        let lanes = 0..self.ends.len();
        let spared: Vec<usize> = lanes.clone().filter(|lane| !may_lose(&event, self.ends[*lane])).collect();
        self.traffic.settle(&spared, from, to, SETTLE);
        let pairs = lanes.map(|lane| {
            let (sent, lost) = self.traffic.counts(lane, from, to);
            PairSeen { ends: self.ends[lane], sent, lost }
        });
        let pairs = pairs.collect();
        self.since = to;
        let Outcome { figure, killed_after, looked_at } = outcome;
        Ok(Observed {
            event,
            pairs,
            figure,
            killed_after,
            looked_at,
            replaced,
            changed,
            missing,
            broken: Vec::new(),
        })
    }

    /// Entries of all pods once they run again, those that should be new as new processes.
    fn settled_after(&self, event: Event) -> Result<Vec<Value>> {
        let until = Instant::now() + EVENT_LIMIT;
        loop {
            let reports = self.world.settled()?;
            let old = |victim: usize| pids(&reports).get(victim) == self.engines.get(victim);
            let waits = match event {
                Event::EngineKill { victim }
                | Event::EngineStop { victim }
                | Event::MemoryBomb { victim }
                | Event::Handover { victim } => old(victim),
                Event::SupervisorKill { .. }
                | Event::KillEverything { .. }
                | Event::ControlAway { .. }
                | Event::DerpAway { .. }
                | Event::DevnetAway { .. }
                | Event::LinkDown { .. } => false,
            };
            if !waits || Instant::now() > until {
                return Ok(reports);
            }
            std::thread::sleep(POLL);
        }
    }

    /// Home's pods each have a lane of their number.
    fn victim_ready(&self, victim: usize) -> Result<()> {
        self.traffic.set_interval(victim, VICTIM_EVERY);
        std::thread::sleep(HEALTHY_AFTER.saturating_sub(self.born[victim].elapsed()));
        let now = Instant::now();
        let talks = self.traffic.wait_answered(&[victim], now, REPLIES, EVENT_LIMIT);
        anyhow::ensure!(talks, "pod-{victim} does not answer before it is hurt");
        Ok(())
    }

    /// The victim's longest silence since `hurt`, once it talks as before after `died`.
    fn silence(&self, victim: usize, hurt: Instant, died: Instant) -> Option<Duration> {
        let answered = self.traffic.wait_answered(&[victim], died, REPLIES, EVENT_LIMIT);
        let gap = self.traffic.gap(victim, hurt, Instant::now());
        // Its other pairs shake hands for themselves: what they lose is this event's too.
        let own = |ends: &[End; 2]| ends.contains(&End::Home(victim));
        let lanes: Vec<usize> = (0..self.ends.len()).filter(|lane| own(&self.ends[*lane])).collect();
        let answered = self.traffic.wait_answered(&lanes, Instant::now(), 2, EVENT_LIMIT) && answered;
        self.traffic.set_interval(victim, self.pace(victim));
        answered.then_some(gap)
    }

    fn kill_engine(&self, victim: usize) -> Result<Outcome> {
        self.victim_ready(victim)?;
        let hurt = Instant::now();
        signal(self.engines[victim], Signal::SIGKILL)?;
        Ok(Outcome { figure: self.silence(victim, hurt, hurt), ..Outcome::default() })
    }

    fn stop_engine(&self, victim: usize) -> Result<Outcome> {
        self.victim_ready(victim)?;
        let hurt = Instant::now();
        signal(self.engines[victim], Signal::SIGSTOP)?;
        let dead = wait(EVENT_LIMIT, || Ok(!lives(self.engines[victim])))?;
        let died = Instant::now();
        Ok(Outcome {
            figure: self.silence(victim, died, died),
            killed_after: dead.then(|| died - hurt),
            looked_at: None,
        })
    }

    fn bomb(&self, victim: usize) -> Result<Outcome> {
        self.victim_ready(victim)?;
        let hurt = Instant::now();
        let hog = Hog::beside(self.engines[victim])?;
        let dead = wait(EVENT_LIMIT, || Ok(!lives(self.engines[victim])))?;
        let died = Instant::now();
        drop(hog);
        let figure = if dead { self.silence(victim, hurt, died) } else { None };
        Ok(Outcome { figure, ..Outcome::default() })
    }

    fn hand_over(&self, victim: usize) -> Result<Outcome> {
        self.victim_ready(victim)?;
        self.traffic.set_interval(victim, HANDOVER_EVERY);
        let settled = self.traffic.wait_answered(&[victim], Instant::now(), REPLIES, EVENT_LIMIT);
        anyhow::ensure!(settled, "pod-{victim} does not answer before its engine is replaced");
        let begun = Instant::now();
        self.world.home.operate(&["restart", &self.world.pods[victim].name])?;
        Ok(Outcome { figure: self.silence(victim, begun, Instant::now()), ..Outcome::default() })
    }

    fn kill_supervisor(&mut self, down: Duration) -> Result<Outcome> {
        self.away.begin();
        self.world.home.kill_supervisor()?;
        std::thread::sleep(down);
        let started = Instant::now();
        self.world.home.start_supervisor()?;
        let all = wait(EVENT_LIMIT, || Ok(self.world.taken_up(&self.engines)))?;
        let took = started.elapsed();
        let looked_at = wait(EVENT_LIMIT, || Ok(self.world.all_run()))?.then(|| started.elapsed());
        self.away.end();
        Ok(Outcome { figure: all.then_some(took), looked_at, ..Outcome::default() })
    }

    fn kill_everything(&mut self, down: Duration) -> Result<Outcome> {
        let pods = self.world.pods.len();
        let lanes: Vec<usize> = (0..pods).collect();
        let pace = (Duration::from_secs(1) / PINGS_PER_SECOND) * u32::try_from(pods)?;
        for lane in &lanes {
            self.traffic.set_interval(*lane, pace.max(VICTIM_EVERY));
        }
        self.away.begin();
        self.world.home.kill_everything()?;
        std::thread::sleep(down);
        let started = Instant::now();
        self.world.home.start_supervisor()?;
        let all = self.traffic.wait_arrivals(&lanes, started, EVENT_LIMIT);
        let last = lanes.iter().filter_map(|lane| self.traffic.first_arrival(*lane, started)).max();
        let figure = all.then_some(last).flatten().map(|last| last - started);
        let _ = self.traffic.wait_answered(&lanes, Instant::now(), 2, EVENT_LIMIT);
        let _ = self.world.settled();
        self.away.end();
        for lane in &lanes {
            self.traffic.set_interval(*lane, self.pace(*lane));
        }
        // Pairs among home's pods need both ends.
        let others: Vec<usize> = (0..self.ends.len()).collect();
        let _ = self.traffic.wait_answered(&others, Instant::now(), 2, EVENT_LIMIT);
        Ok(Outcome { figure, ..Outcome::default() })
    }

    /// Control, relays or both refuse for a while.
    fn outage(&self, away: Duration, control: bool, derp: bool) -> Result<Outcome> {
        let devnet = &self.world.devnet;
        let set = |up: bool| {
            if control {
                devnet.set_refusing(!up);
            }
            if derp {
                devnet.set_region(REGION, if up { Mode::Up } else { Mode::Down });
            }
        };
        if control {
            self.away.begin();
        }
        set(false);
        std::thread::sleep(away);
        set(true);
        let back = Instant::now();
        let own: BTreeSet<&str> =
            self.world.pods.iter().chain(&self.world.peers).map(|pod| pod.name.as_str()).collect();
        let all = wait(EVENT_LIMIT, || {
            let nodes = devnet.nodes();
            let known = nodes.iter().filter(|node| own.contains(node.name.as_str()));
            let there = known.filter(|node| {
                (!control || node.streaming) && (!derp || devnet.is_on_relay(REGION, &node.node_key))
            });
            Ok(there.count() == own.len())
        })?;
        let took = back.elapsed();
        if control {
            self.away.end();
        }
        Ok(Outcome { figure: all.then_some(took), ..Outcome::default() })
    }

    fn link_down(&self, away: Duration) -> Result<Outcome> {
        let across: Vec<usize> = (0..self.world.pods.len()).collect();
        self.away.begin();
        self.world.set_uplink(false)?;
        std::thread::sleep(away);
        self.world.set_uplink(true)?;
        let up = Instant::now();
        let all = self.traffic.wait_arrivals(&across, up, EVENT_LIMIT);
        let last = across.iter().filter_map(|lane| self.traffic.first_arrival(*lane, up)).max();
        let figure = all.then_some(last).flatten().map(|last| last - up);
        let _ = self.traffic.wait_answered(&across, Instant::now(), 2, EVENT_LIMIT);
        self.away.end();
        Ok(Outcome { figure, ..Outcome::default() })
    }
}

fn signal(pid: i32, signal: Signal) -> Result<()> {
    anyhow::ensure!(pid > 1, "no engine to hurt");
    kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to engine {pid}"))
}

/// Whether the process is there and not a zombie.
fn lives(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn wait(limit: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
    let until = Instant::now() + limit;
    while !done()? {
        if Instant::now() > until {
            return Ok(false);
        }
        std::thread::sleep(POLL);
    }
    Ok(true)
}
