//! Pods that join one node: one after another, and all at once in growing numbers.
//!
//! Every number of pods gets a tailnet and a node of its own, so that nothing is warm for the larger that the
//! smaller did. A plugin process is started for each pod at the same moment, as a runtime does after a drain.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::chaos::checker::percentiles;
use crate::lab::{Lab, Node, Pod, Programs, Tailnet};
use crate::{Devnet, DevnetConfig};

/// ADD of one pod alone: half of all take no longer.
pub const ALONE: Duration = Duration::from_millis(150);
/// ADD of [`AT_ONCE_PODS`] pods at once: the last is answered.
pub const AT_ONCE: Duration = Duration::from_secs(5);
/// See [`AT_ONCE`].
pub const AT_ONCE_PODS: usize = 100;
/// One scrape of `/metrics`, with any number of pods measured.
pub const SCRAPE: Duration = Duration::from_millis(200);
/// A supervisor's resident memory without pods.
pub const SUPERVISOR_KIB: u64 = 20 << 10;
/// And for each pod.
pub const SUPERVISOR_KIB_PER_POD: u64 = 50;

/// Pods on one node of the lab.
pub const MAX_PODS: usize = 250;
/// Scrapes of which the median counts.
const SCRAPES: usize = 3;
/// Between two of them, as no Prometheus asks in less: the supervisor holds up who asks in a loop.
const BETWEEN_SCRAPES: Duration = Duration::from_millis(2500);
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// What a burst leaves in a supervisor's heap is given back by then.
const REST: Duration = Duration::from_secs(5);

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Pods that join and leave one after another.
    pub alone: usize,
    /// Numbers of pods that join at once, each up to [`MAX_PODS`].
    pub at_once: Vec<usize>,
}

/// What was seen.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// ADDs of pods alone, in order.
    pub alone: Vec<Duration>,
    /// DELs of the same.
    pub alone_left: Vec<Duration>,
    /// One per number of pods at once.
    pub rows: Vec<Row>,
}

/// Pods that joined at once.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// How many.
    pub pods: usize,
    /// p50, p99 and longest time from the plugin's start to its end.
    pub add: [Duration; 3],
    /// From the first plugin's start to the last one's end.
    pub all: Duration,
    /// Processor time of the supervisor for it.
    pub supervisor_cpu: Duration,
    /// The same of all engines together, until each has a control session and a relay.
    pub engines_cpu: Duration,
    /// The supervisor's resident memory before the first pod and with all, KiB.
    pub supervisor_kib: [u64; 2],
    /// The most it was, KiB.
    pub supervisor_peak_kib: u64,
    /// Of the resident memory with all pods, the anonymous part, KiB.
    pub supervisor_anon_kib: u64,
    /// One scrape of `/metrics` with all pods, median.
    pub scrape: Duration,
    /// Its size, bytes.
    pub scrape_bytes: usize,
    /// From the first DEL's start to the last one's end, all at once.
    pub left: Duration,
}

/// One figure and whether it is good enough.
#[derive(Debug, Clone)]
pub struct Figure {
    /// What, with its unit.
    pub what: String,
    /// Measured.
    pub value: f64,
    /// Allowed at most.
    pub bar: f64,
}

impl Report {
    /// The figures that have a bar.
    #[must_use]
    pub fn figures(&self) -> Vec<Figure> {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let mut figures = Vec::new();
        if let Some([p50, ..]) = percentiles(self.alone.clone()) {
            let what = "CNI ADD of one pod alone, p50, ms".to_owned();
            figures.push(Figure { what, value: ms(p50), bar: ms(ALONE) });
        }
        for row in &self.rows {
            let pods = row.pods;
            if pods == AT_ONCE_PODS {
                let what = format!("CNI ADD of {pods} pods at once, all done, ms");
                figures.push(Figure { what, value: ms(row.all), bar: ms(AT_ONCE) });
            }
            let what = format!("/metrics with {pods} pods, ms");
            figures.push(Figure { what, value: ms(row.scrape), bar: ms(SCRAPE) });
            let what = format!("supervisor with {pods} pods, resident KiB");
            let allowed = SUPERVISOR_KIB + SUPERVISOR_KIB_PER_POD * u64::try_from(pods).unwrap_or(u64::MAX);
            figures.push(Figure { what, value: kib(row.supervisor_kib[1]), bar: kib(allowed) });
        }
        figures
    }

    /// The curve, for people.
    #[must_use]
    pub fn table(&self) -> String {
        let ms = |time: Duration| format!("{:.0} ms", time.as_secs_f64() * 1000.0);
        let mut text = String::new();
        for (what, times) in [("ADD", &self.alone), ("DEL", &self.alone_left)] {
            if let Some([p50, p99, max]) = percentiles(times.clone()) {
                let count = times.len();
                let _ = writeln!(
                    text,
                    "{what} of one pod alone, {count} of them: p50 {}, p99 {}, at most {}",
                    ms(p50),
                    ms(p99),
                    ms(max)
                );
            }
        }
        let _ = writeln!(
            text,
            "{:>4} {:>9} {:>9} {:>9} {:>9} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "pods",
            "ADD p50",
            "ADD p99",
            "all done",
            "a pod",
            "CPU sup",
            "CPU eng",
            "RSS 0",
            "RSS all",
            "peak",
            "/metrics",
            "bytes",
            "all DEL"
        );
        for row in &self.rows {
            let each = u32::try_from(row.pods).map_or(Duration::ZERO, |pods| row.all / pods.max(1));
            let mib = |kib: u64| format!("{}.{} MiB", kib >> 10, ((kib & 1023) * 10) >> 10);
            let _ = writeln!(
                text,
                "{:>4} {:>9} {:>9} {:>9} {:>9} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
                row.pods,
                ms(row.add[0]),
                ms(row.add[1]),
                ms(row.all),
                format!("{:.1} ms", each.as_secs_f64() * 1000.0),
                ms(row.supervisor_cpu),
                ms(row.engines_cpu),
                mib(row.supervisor_kib[0]),
                mib(row.supervisor_kib[1]),
                mib(row.supervisor_peak_kib),
                format!("{:.1} ms", row.scrape.as_secs_f64() * 1000.0),
                row.scrape_bytes,
                ms(row.left),
            );
        }
        text
    }
}

fn kib(kib: u64) -> f64 {
    f64::from(u32::try_from(kib).unwrap_or(u32::MAX))
}

/// Measures in the namespaces of this process, which are its own; files go below `dir`, programs are found beside
/// `beside`. `say` gets lines for a person.
///
/// # Errors
/// A pod that does not join or leave, or a node that cannot be made.
pub fn run(dir: &Path, beside: &Path, options: &Options, say: &mut dyn FnMut(&str)) -> Result<Report> {
    let programs = Programs::find(beside)?;
    let mut report = Report::default();
    if options.alone > 0 {
        let mut place = Place::start(&dir.join("alone"), &programs)?;
        (report.alone, report.alone_left) = place.one_after_another(options.alone)?;
        say(&format!("{} pods joined one after another", options.alone));
    }
    for pods in &options.at_once {
        ensure!((1..=MAX_PODS).contains(pods), "{pods} pods do not fit on one node of the lab");
        let mut place = Place::start(&dir.join(format!("{pods}-at-once")), &programs)?;
        let row = place.at_once(*pods).with_context(|| place.node.log_end(20))?;
        say(&format!("{pods} pods joined at once: {:.0} ms", row.all.as_secs_f64() * 1000.0));
        report.rows.push(row);
    }
    Ok(report)
}

/// A node that has had one pod, and its tailnet.
struct Place {
    node: Node,
    _devnet: Devnet,
    _lab: Lab,
}

impl Place {
    fn start(dir: &Path, programs: &Programs) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let mut lab = Lab::new(dir, programs.clone())?;
        let (devnet, ca) = lab.start_devnet(DevnetConfig::default())?;
        let mut node = lab.add_node("home")?;
        node.configure(&[Tailnet::oauth("default", &devnet, &ca)], "")?;
        node.start_supervisor()?;
        Ok(Self { node, _devnet: devnet, _lab: lab })
    }

    fn one_after_another(&mut self, count: usize) -> Result<(Vec<Duration>, Vec<Duration>)> {
        let (mut joined, mut left) = (Vec::new(), Vec::new());
        for n in 0..count {
            let mut pod = self.node.create_pod(&format!("alone-{n}"))?;
            joined.push(pod.add(&self.node)?);
            left.push(pod.del(&self.node)?);
            self.node.destroy_last(pod)?;
        }
        Ok((joined, left))
    }

    fn at_once(&mut self, count: usize) -> Result<Row> {
        let mut pods: Vec<Pod> =
            (0..count).map(|n| self.node.create_pod(&format!("pod-{n}"))).collect::<Result<_>>()?;
        let supervisor = self.node.supervisor_pid().context("no supervisor")?;
        let before = Memory::of(supervisor)?;
        let cpu = cpu(supervisor)?;
        let node = &self.node;
        let started = Instant::now();
        let joined = each(&mut pods, |pod| pod.add(node))?;
        let all = started.elapsed();
        let engines = self.settled(count)?;
        let supervisor_cpu = self::cpu(supervisor)?.saturating_sub(cpu);
        let engines_cpu = engines.iter().map(|pid| self::cpu(*pid)).sum::<Result<_>>()?;
        let (mut scrapes, mut scrape_bytes) = (Vec::new(), 0);
        for _ in 0..SCRAPES {
            std::thread::sleep(BETWEEN_SCRAPES);
            let started = Instant::now();
            scrape_bytes = self.node.http_get("/metrics")?.len();
            scrapes.push(started.elapsed());
        }
        std::thread::sleep(REST);
        let after = Memory::of(supervisor)?;
        let started = Instant::now();
        each(&mut pods, |pod| pod.del(node))?;
        let left = started.elapsed();
        Ok(Row {
            pods: count,
            add: percentiles(joined).context("nobody joined")?,
            all,
            supervisor_cpu,
            engines_cpu,
            supervisor_kib: [before.resident_kib, after.resident_kib],
            supervisor_peak_kib: after.peak_kib,
            supervisor_anon_kib: after.anonymous_kib,
            scrape: percentiles(scrapes).context("no scrape")?[0],
            scrape_bytes,
            left,
        })
    }

    /// Waits until every engine has what it connects to; their pids.
    fn settled(&self, count: usize) -> Result<Vec<u32>> {
        let until = Instant::now() + PATIENCE;
        loop {
            let pods = self.node.pods_alone()?;
            let done = |pod: &&Value| pod["controlConnected"] == true && pod["homeDerp"] != 0;
            let ready: Vec<u32> = pods
                .iter()
                .filter(done)
                .filter_map(|pod| u32::try_from(pod["enginePid"].as_u64()?).ok())
                .collect();
            if ready.len() >= count {
                return Ok(ready);
            }
            ensure!(Instant::now() < until, "only {} of {count} engines are connected", ready.len());
            std::thread::sleep(POLL);
        }
    }
}

/// Does it to every pod at the same moment; how long each took.
fn each(pods: &mut [Pod], work: impl Fn(&mut Pod) -> Result<Duration> + Sync) -> Result<Vec<Duration>> {
    let work = &work;
    let start = std::sync::Barrier::new(pods.len());
    let start = &start;
    std::thread::scope(|scope| {
        let threads: Vec<_> = pods
            .iter_mut()
            .map(|pod| {
                scope.spawn(move || {
                    start.wait();
                    work(pod)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// A process's resident memory, by proc_pid_status(5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Memory {
    resident_kib: u64,
    anonymous_kib: u64,
    peak_kib: u64,
}

impl Memory {
    fn of(pid: u32) -> Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
        Self::parse(&text).with_context(|| format!("/proc/{pid}/status lacks a field"))
    }

    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim().strip_suffix(" kB")?.parse().ok()
        };
        let (resident_kib, anonymous_kib) = (field("VmRSS")?, field("RssAnon")?);
        Some(Self { resident_kib, anonymous_kib, peak_kib: field("VmHWM")? })
    }
}

/// Processor time that a process's threads have used, of those that live.
fn cpu(pid: u32) -> Result<Duration> {
    let dir = format!("/proc/{pid}/task");
    let threads = fs::read_dir(&dir).with_context(|| format!("read {dir}"))?;
    let used = threads.flatten().filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse().ok()
    });
    Ok(used.map(Duration::from_nanos).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_by_the_fields_names() {
        let status = "Name:\tx\nVmPeak:\t  9 kB\nVmHWM:\t   30 kB\nVmRSS:\t   20 kB\nRssAnon:\t 10 kB\n";
        let memory = Memory { resident_kib: 20, anonymous_kib: 10, peak_kib: 30 };
        assert_eq!(Memory::parse(status), Some(memory));
        assert_eq!(Memory::parse("VmRSS:\t20 kB\n"), None);
        assert!(Memory::of(std::process::id()).unwrap().resident_kib > 0);
    }

    #[test]
    fn figures_have_their_bars() {
        let second = Duration::from_secs(1);
        let row = Row {
            pods: 100,
            add: [second; 3],
            all: second * 6,
            supervisor_cpu: second,
            engines_cpu: second,
            supervisor_kib: [10 << 10, 24 << 10],
            supervisor_peak_kib: 30 << 10,
            supervisor_anon_kib: 1,
            scrape: Duration::from_millis(150),
            scrape_bytes: 5,
            left: second,
        };
        let report = Report { alone: vec![Duration::from_millis(100)], alone_left: vec![], rows: vec![row] };
        let met: Vec<bool> = report.figures().iter().map(|figure| figure.value <= figure.bar).collect();
        assert_eq!(met, [true, false, true, true]);
        assert!(report.table().contains("6000 ms"), "{}", report.table());
    }
}
