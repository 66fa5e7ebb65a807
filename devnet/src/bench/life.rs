//! Engines that are killed: how long until the next one is ready, and until its pod is reached again.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::figure::{Figure, percentile};
use super::world::{Side, World};
use crate::probe::ping::Pinging;

const EVERY: Duration = Duration::from_millis(5);
/// Replies in one and a half seconds: more than the second after which a death is not counted against an engine.
const HEALTHY: u64 = 300;
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);

/// `kills` of the first pod's engine, pinged from the other node all the time.
pub(super) fn kills(world: &World, kills: usize, say: &mut dyn FnMut(&str)) -> Result<Vec<Figure>> {
    let victim = 0;
    let lane = world.across().into_iter().find(|lane| lane.side == Side::Ours).context("no lane")?.back();
    let ([from, _], target) = (world.ends(lane)?, world.target(lane, false)?);
    let pings = Pinging::start(from, target, EVERY, None)?;
    ensure!(pings.wait_for_replies(HEALTHY, PATIENCE), "nothing answers before the first kill");
    let mut gaps = Vec::new();
    let mut pid = world.engine(victim)?;
    for round in 1..=kills {
        let begun = pings.elapsed();
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
        let until = Instant::now() + PATIENCE;
        pid = loop {
            match world.engine(victim) {
                Ok(new) if new != pid => break new,
                _ => ensure!(Instant::now() < until, "no new engine after kill {round}"),
            }
            std::thread::sleep(POLL);
        };
        ensure!(pings.wait_for_replies(HEALTHY, PATIENCE), "nothing answers after kill {round}");
        gaps.push(pings.report().longest_gap(begun, pings.elapsed()).as_secs_f64() * 1e3);
    }
    drop(pings);
    let [p50, p99] = [50, 99].map(|percent| percentile(&gaps, percent).unwrap_or_default());
    say(&format!("recovery: {kills} kills, {p50:.0} ms, {p99:.0} ms"));
    let what = format!("gap of 5 ms pings after kill -9, {kills} kills, p50");
    let gaps = Figure { ours: gaps, ..Figure::new("recovery.p50", what, "ms") };
    Ok(vec![gaps, Figure::of("recovery.p99", "the same, p99", "ms", p99)])
}

/// From the exec of an engine to its first answer, before which it gives up its privileges, of all engines that the
/// nodes have started so far.
pub(super) fn starts(world: &World) -> Result<Vec<Figure>> {
    let mut times = Vec::new();
    for node in &world.nodes {
        let log = fs::read_to_string(node.log()).context("read a supervisor's log")?;
        times.extend(ready_ms(&log));
    }
    ensure!(!times.is_empty(), "no supervisor has told how long an engine took to start");
    let high = percentile(&times, 99).unwrap_or_default();
    let what = format!("engine exec to ready, {} starts, p50", times.len());
    let p50 = Figure { ours: times, ..Figure::new("start.ready", what, "ms") };
    Ok(vec![p50, Figure::of("start.ready.p99", "the same, p99", "ms", high)])
}

/// Of a supervisor's log: the times that engines took until they were ready.
fn ready_ms(log: &str) -> Vec<f64> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter_map(|line| Some(line["ready_us"].as_f64()? / 1e3)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_times_are_found_in_the_log() {
        let log = "{\"message\":\"engine started\",\"ready_us\":7500}\nno json\n{\"message\":\"other\"}\n\
                   {\"message\":\"engine restarted\",\"us\":9,\"ready_us\":12000}\n";
        assert_eq!(ready_ms(log), [7.5, 12.0]);
    }
}
