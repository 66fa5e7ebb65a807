//! Engines that have nothing to do.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::figure::Figure;
use super::memory;
use super::usage;
use super::world::{World, start_node};
use crate::lab::{Node, Pod};

/// Engines that idle together.
const IDLE: usize = 110;
/// Joins and leaves at a time.
const AT_ONCE: usize = 16;
/// When their memory is looked at.
const MEMORY_AT: usize = 100;
/// A connection counts as in use for a minute after it was made.
const SETTLED: Duration = Duration::from_secs(65);

/// Engines that nobody sends anything: memory, processor time, wake-ups, over `time`.
pub(super) fn watch(world: &mut World, time: Duration, say: &mut dyn FnMut(&str)) -> Result<Vec<Figure>> {
    let mut crowd = Crowded::start(world, "idle")?;
    crowd.join(MEMORY_AT)?;
    say(&format!("idle: {MEMORY_AT} engines, {SETTLED:?} of rest"));
    std::thread::sleep(SETTLED);
    let mut figures = memory::of_many(&crowd.engines()?)?;
    crowd.join(IDLE - MEMORY_AT)?;
    say(&format!("idle: {IDLE} engines, {SETTLED:?} of rest, then {time:?} that are counted"));
    std::thread::sleep(SETTLED);
    let pids = crowd.engines()?;
    let began = Instant::now();
    let each = |of: fn(u32) -> Result<(Duration, u64)>| -> Result<Vec<(Duration, u64)>> {
        pids.iter().map(|pid| of(*pid)).collect()
    };
    let read: fn(u32) -> Result<(Duration, u64)> = |pid| Ok((usage::cpu(pid)?, usage::wakes(pid)?));
    let before = each(read)?;
    let supervisor = usage::cpu(crowd.supervisor()?)?;
    std::thread::sleep(time);
    let after = each(read)?;
    let supervisor = usage::cpu(crowd.supervisor()?)?.saturating_sub(supervisor);
    let seconds = began.elapsed().as_secs_f64();
    let cpu: f64 = after.iter().zip(&before).map(|(a, b)| a.0.saturating_sub(b.0).as_secs_f64()).sum();
    let wakes = after.iter().zip(&before).map(|(a, b)| u32::try_from(a.1 - b.1).map(f64::from));
    let wakes = wakes.map(|wakes| Ok(wakes? / seconds)).collect::<Result<Vec<f64>>>()?;
    crowd.leave()?;
    let what = format!("CPU of {IDLE} idle engines together, of one core");
    figures.push(Figure::of("idle.cpu", what, "%", cpu / seconds * 100.0));
    let what = "CPU of their supervisor, of one core";
    figures.push(Figure::of("idle.supervisor", what, "%", supervisor.as_secs_f64() / seconds * 100.0));
    let what = "wake-ups of an idle engine";
    figures.push(Figure { ours: wakes, ..Figure::new("idle.wakes", what, "1/s") });
    Ok(figures)
}

/// A node of its own, and its pods.
struct Crowded {
    node: Node,
    pods: Vec<Pod>,
}

impl Crowded {
    fn start(world: &mut World, name: &str) -> Result<Self> {
        let World { lab, devnet, ca, .. } = world;
        Ok(Self { node: start_node(lab, devnet, ca, name)?, pods: Vec::new() })
    }

    fn supervisor(&self) -> Result<u32> {
        self.node.supervisor_pid().context("the supervisor does not run")
    }

    fn engines(&self) -> Result<Vec<u32>> {
        let reports = self.node.pods_alone()?;
        let pids = reports.iter().map(|pod| {
            let pid = pod["enginePid"].as_u64().context("a pod without an engine")?;
            Ok(u32::try_from(pid)?)
        });
        pids.collect()
    }

    /// ADD of `count` more, some at a time.
    fn join(&mut self, count: usize) -> Result<()> {
        let from = self.pods.len();
        for n in from..from + count {
            let name = format!("{}-{n}", self.node.name);
            self.pods.push(self.node.create_pod(&name)?);
        }
        let node = self.node.caller();
        for some in self.pods.get_mut(from..).unwrap_or_default().chunks_mut(AT_ONCE) {
            let results: Vec<Result<Duration>> = std::thread::scope(|scope| {
                let threads: Vec<_> = some.iter_mut().map(|pod| scope.spawn(|| pod.add(&node))).collect();
                threads
                    .into_iter()
                    .map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
                    .collect()
            });
            results.into_iter().collect::<Result<Vec<_>>>()?;
        }
        Ok(())
    }

    /// DEL of all, some at a time, and the end of the supervisor.
    fn leave(mut self) -> Result<()> {
        let node = self.node.caller();
        for some in self.pods.chunks(AT_ONCE) {
            let results: Vec<Result<Duration>> = std::thread::scope(|scope| {
                let threads: Vec<_> = some.iter().map(|pod| scope.spawn(|| pod.del(&node))).collect();
                threads
                    .into_iter()
                    .map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
                    .collect()
            });
            results.into_iter().collect::<Result<Vec<_>>>()?;
        }
        self.node.stop_supervisor()?;
        for pod in self.pods.drain(..) {
            pod.destroy(&self.node)?;
        }
        Ok(())
    }
}
