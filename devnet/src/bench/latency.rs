//! Round trips, alone and beside a stream that takes all there is.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::figure::{Figure, percentile};
use super::iperf::{Iperf, Load};
use super::speed::put;
use super::world::{Lane, World};
use crate::probe::ping::{PingReport, Pinging};

/// Between pings.
const EVERY: Duration = Duration::from_millis(5);
/// A reply that takes longer is lost.
const REPLY_WITHIN: Duration = Duration::from_secs(1);
/// The stream has found its rate by then.
const RAMP: Duration = Duration::from_millis(500);

/// Pings for `time`, in each of `rounds`.
pub(super) fn idle(
    world: &World,
    rounds: usize,
    time: Duration,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Figure>> {
    measure("ping.idle", "ping, nothing else", world, rounds, say, |lane| pings(world, lane, time))
}

/// The same beside a TCP stream along the same lane.
pub(super) fn loaded(
    world: &World,
    iperf: &Iperf,
    rounds: usize,
    time: Duration,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Figure>> {
    measure("ping.load", "ping beside 1 TCP stream", world, rounds, say, |lane| {
        let ([from, to], target) = (world.ends(lane)?, world.target(lane, false)?);
        std::thread::scope(|scope| {
            let stream =
                scope.spawn(|| iperf.run(from, to, target, Load::Tcp { streams: 1 }, time + 2 * RAMP));
            std::thread::sleep(RAMP);
            let report = pings(world, lane, time);
            stream.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            report
        })
    })
}

fn pings(world: &World, lane: Lane, time: Duration) -> Result<PingReport> {
    let ([from, _], target) = (world.ends(lane)?, world.target(lane, false)?);
    let count = u64::try_from(time.as_millis() / EVERY.as_millis())?;
    Ok(Pinging::start(from, target, EVERY, Some(count))?.finish(REPLY_WITHIN)?)
}

fn measure(
    name: &str,
    what: &str,
    world: &World,
    rounds: usize,
    say: &mut dyn FnMut(&str),
    mut one: impl FnMut(Lane) -> Result<PingReport>,
) -> Result<Vec<Figure>> {
    let mut p50 = Figure::new(format!("{name}.p50"), format!("{what}, p50"), "ms");
    let mut p99 = Figure::new(format!("{name}.p99"), format!("{what}, p99"), "ms");
    let mut lost = Figure::new(format!("{name}.lost"), format!("{what}, lost"), "%");
    for round in 1..=rounds {
        let mut line = format!("{what}, {round} of {rounds}:");
        for lane in world.across() {
            let report = one(lane)?;
            let rtts: Vec<f64> = report.rtts.iter().map(|rtt| rtt.as_secs_f64() * 1e3).collect();
            let Some((middle, high)) = percentile(&rtts, 50).zip(percentile(&rtts, 99)) else {
                anyhow::bail!("{what}: no ping of {:?} was answered", lane.side);
            };
            ensure!(report.sent > 0, "no ping was sent");
            put(&mut p50, lane.side, middle);
            put(&mut p99, lane.side, high);
            let unanswered = u32::try_from(report.lost())?;
            put(&mut lost, lane.side, f64::from(unanswered) * 100.0 / f64::from(u32::try_from(report.sent)?));
            line += &format!(" {:?} {middle:.3} / {high:.3} ms ({unanswered} lost)", lane.side);
        }
        say(&line);
    }
    Ok(vec![p50, p99, lost])
}
