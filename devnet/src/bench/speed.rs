//! Rates, and what they cost the processes that carry them.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::figure::Figure;
use super::iperf::{Flow, Iperf, Load};
use super::search::Search;
use super::usage;
use super::world::{Lane, Side, World};
use crate::probe::datagrams::{self, Arrived, Stream};

/// Of UDP: what may be lost.
const LOSS: f64 = 0.001;
const STEPS: usize = 7;

/// What to send and what it is called.
#[derive(Debug, Clone)]
pub(super) struct Course {
    /// Of the figure.
    pub(super) name: String,
    pub(super) what: String,
    pub(super) lanes: Vec<Lane>,
    pub(super) v6: bool,
    pub(super) rounds: usize,
    pub(super) time: Duration,
}

/// One run along one lane.
#[derive(Debug, Clone, Copy)]
struct Sample {
    flow: Flow,
    /// Processor seconds of the sender's and the receiver's carrier.
    cpu: Option<[f64; 2]>,
}

fn sample(world: &World, iperf: &Iperf, course: &Course, lane: Lane, load: Load) -> Result<Sample> {
    let [from, to] = world.ends(lane)?;
    let target = world.target(lane, course.v6)?;
    let carriers = world.carriers(lane)?;
    let read = || carriers.map(|pids| pids.map(usage::cpu));
    let before = read();
    let flow = iperf.run(from, to, target, load, course.time)?;
    let cpu = match (before, read()) {
        (Some([a, b]), Some([c, d])) => {
            ensure!(world.carriers(lane)? == carriers, "a process on the way was replaced");
            Some([(c? - a?).as_secs_f64(), (d? - b?).as_secs_f64()])
        }
        _ => None,
    };
    Ok(Sample { flow, cpu })
}

/// Datagrams by our own sockets: iperf3's receiver may not have a buffer that outlasts another process's turn on
/// the processor, so that two busy cores lose more than a thousandth of 16,000 a second without any tunnel.
fn datagrams_sent(
    world: &World,
    course: &Course,
    lane: Lane,
    bytes: u16,
    bits_per_second: Option<f64>,
) -> Result<Flow> {
    let [from, to] = world.ends(lane)?;
    let stream = Stream { target: world.target(lane, course.v6)?, bytes, bits_per_second, time: course.time };
    Ok(arrived_of(bytes, datagrams::stream(from, to, stream)?))
}

/// Of datagrams with so many bytes of payload.
fn arrived_of(bytes: u16, arrived: Arrived) -> Flow {
    let Arrived { sent, received, time } = arrived;
    let count = |datagrams: u64| f64::from(u32::try_from(datagrams).unwrap_or(u32::MAX));
    let (sent, received, seconds) = (count(sent), count(received), time.as_secs_f64().max(1e-3));
    let bytes = f64::from(bytes);
    Flow {
        bits_per_second: received * bytes * 8.0 / seconds,
        offered_bits_per_second: sent * bytes * 8.0 / seconds,
        bytes: received * bytes,
        loss: if sent > 0.0 { (1.0 - received / sent).max(0.0) } else { 1.0 },
        retransmits: 0.0,
    }
}

/// Adds a sample.
pub(super) fn put(figure: &mut Figure, side: Side, value: f64) {
    match side {
        Side::Ours => figure.ours.push(value),
        Side::Bare => figure.bare.push(value),
        Side::Stock => figure.stock.push(value),
    }
}

/// TCP at full speed: the rate, and processor seconds a gigabit at both ends.
pub(super) fn tcp(
    world: &World,
    iperf: &Iperf,
    course: &Course,
    streams: u8,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Figure>> {
    let Course { name, what, .. } = course;
    let mut rate = Figure::new(name, what, "Gbit/s");
    let mut sender = Figure::new(format!("{name}.cpu.sender"), format!("{what}, sender"), "CPU-s/Gbit");
    let mut receiver = Figure::new(format!("{name}.cpu.receiver"), format!("{what}, receiver"), "CPU-s/Gbit");
    for round in 1..=course.rounds {
        let mut line = format!("{what}, {round} of {}:", course.rounds);
        for lane in &course.lanes {
            let Sample { flow, cpu } = sample(world, iperf, course, *lane, Load::Tcp { streams })?;
            put(&mut rate, lane.side, flow.bits_per_second / 1e9);
            line += &format!(" {:?} {:.2} Gbit/s", lane.side, flow.bits_per_second / 1e9);
            if let Some([s, r]) = cpu {
                put(&mut sender, lane.side, s / flow.gigabits());
                put(&mut receiver, lane.side, r / flow.gigabits());
                line += &format!(
                    " ({:.3} / {:.3} CPU-s/Gbit, {} sent again)",
                    s / flow.gigabits(),
                    r / flow.gigabits(),
                    flow.retransmits
                );
            }
        }
        say(&line);
    }
    Ok(vec![rate, sender, receiver])
}

/// Datagrams of `bytes`: the highest rate that arrives but for a thousandth, and what is lost of iperf3's most.
pub(super) fn udp(
    world: &World,
    iperf: &Iperf,
    course: &Course,
    bytes: u16,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Figure>> {
    let Course { name, what, .. } = course;
    let mut rate = Figure::new(name, what, "Gbit/s");
    let mut packets =
        Figure::new(format!("{name}.packets"), format!("{what}, packets a second"), "kpacket/s");
    let mut loss =
        Figure::new(format!("{name}.loss"), format!("{what}, lost of as many as iperf3 can make"), "%");
    for round in 1..=course.rounds {
        let mut line = format!("{what}, {round} of {}:", course.rounds);
        for lane in &course.lanes {
            let all = Load::Udp { bytes, bits_per_second: None };
            let flood = sample(world, iperf, course, *lane, all)?.flow;
            let most = datagrams_sent(world, course, *lane, bytes, None)?;
            let best = highest(most, |bits_per_second| {
                datagrams_sent(world, course, *lane, bytes, Some(bits_per_second))
            })?;
            put(&mut rate, lane.side, best / 1e9);
            put(&mut packets, lane.side, best / 8.0 / f64::from(bytes) / 1e3);
            put(&mut loss, lane.side, flood.loss * 100.0);
            line += &format!(
                " {:?} {:.3} Gbit/s ({:.1} % of {:.3} lost, of iperf3's {:.3} {:.1} %)",
                lane.side,
                best / 1e9,
                most.loss * 100.0,
                most.offered_bits_per_second / 1e9,
                flood.offered_bits_per_second / 1e9,
                flood.loss * 100.0,
            );
        }
        say(&line);
    }
    Ok(vec![rate, packets, loss])
}

/// Bits a second that arrive when as many are offered as arrive but for [`LOSS`], at most; `most` is what
/// became of offering all that can be made.
fn highest(most: Flow, mut offer: impl FnMut(f64) -> Result<Flow>) -> Result<f64> {
    if most.loss <= LOSS {
        return Ok(most.bits_per_second);
    }
    // A rate just above what arrived of too many is rarely carried, so the search begins there.
    let mut search = Search::below((most.bits_per_second * 1.5).min(most.offered_bits_per_second), STEPS);
    let mut best: f64 = 0.0;
    while let Some(rate) = search.rate() {
        let mut flow = offer(rate)?;
        if flow.loss > LOSS {
            // Once more: a moment in which the machine did something else is no limit.
            flow = offer(rate)?;
        }
        let arrived = flow.loss <= LOSS;
        if arrived {
            best = best.max(flow.bits_per_second);
        }
        search.tried(arrived);
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_rate_is_what_arrives_at_the_limit() {
        let at = |offered: f64, limit: f64| Flow {
            offered_bits_per_second: offered,
            bits_per_second: offered.min(limit),
            loss: (1.0 - limit / offered).max(0.0),
            ..Flow::default()
        };
        for limit in [1e6, 3e8, 9.9e8, 1e9] {
            let best = highest(at(1e9, limit), |rate| Ok(at(rate, limit))).unwrap();
            assert!(best <= limit * 1.001 && best >= limit * 0.98, "{best} for {limit}");
        }
        let mut hiccups = 0;
        let best = highest(at(1e9, 5e8), |rate| {
            hiccups += 1;
            Ok(if hiccups % 2 == 1 { Flow { loss: 0.5, ..at(rate, 5e8) } } else { at(rate, 5e8) })
        });
        assert!(best.unwrap() >= 4.8e8, "a moment's loss is no limit");
        assert_eq!(highest(at(1e9, 0.1), |rate| Ok(at(rate, 0.0))).unwrap(), 0.0);
    }
}
