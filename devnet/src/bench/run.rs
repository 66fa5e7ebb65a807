//! The order of things.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::figure::{Figure, percentile};
use super::iperf::Iperf;
use super::report::Report;
use super::speed::{self, Course};
use super::world::{Lane, Side, Way, World, stock_programs};
use super::{idle, joins, latency, life, memory};
use crate::lab::Programs;

/// What can be asked for, in the order it is measured. Each is named by the beginning of its figures' names.
pub const PARTS: &[&str] = &[
    "memory", "tcp1", "tcp8", "udp1200", "udp64", "node", "relay", "ping", "recovery", "start", "joins",
    "idle",
];

/// Pods that join one after another.
const ALONE: usize = 20;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Beginnings of names of [`PARTS`]; all when empty.
    pub only: Vec<String>,
    /// Samples of each figure that has a bar; the others get half as many.
    pub rounds: usize,
    /// How long each rate is measured.
    pub time: Duration,
    /// Whether tailscaled is measured where it is found.
    pub stock: bool,
    /// Congestion control of TCP; the system's own when absent.
    pub congestion: Option<String>,
    /// How many pods join at once, each on a node that had none.
    pub joins: Vec<usize>,
    /// How long idle engines are watched.
    pub idle: Duration,
    /// Engines that are killed.
    pub kills: usize,
}

impl Options {
    /// Whether `part` was asked for.
    #[must_use]
    pub fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|word| part.starts_with(word.as_str()))
    }

    /// For figures without a bar.
    fn fewer_rounds(&self) -> usize {
        self.rounds.div_ceil(2)
    }
}

/// Runs in the namespaces of this process, which are its own; files go below `dir`, programs are found
/// beside `beside`. `say` gets lines for a person.
///
/// # Errors
/// When something cannot be measured that was asked for.
pub fn run(dir: &Path, beside: &Path, options: &Options, say: &mut dyn FnMut(&str)) -> Result<Report> {
    for word in &options.only {
        ensure!(
            PARTS.iter().any(|part| part.starts_with(word.as_str())),
            "nothing to measure is called {word}; there are {}",
            PARTS.join(", ")
        );
    }
    let mut report = Report { machine: machine(options), ..Report::default() };
    let left_out: Vec<&str> = PARTS.iter().copied().filter(|part| !options.wants(part)).collect();
    if !left_out.is_empty() {
        report.skipped.push(format!("{}: not asked for", left_out.join(", ")));
    }
    if !options.stock {
        report.skipped.push("tailscaled: not wanted".into());
    } else if stock_programs().is_none() {
        report.skipped.push("tailscaled: it and tailscale have to be on PATH to be measured".into());
    }
    let iperf = Iperf::find(options.congestion.clone())?;
    let mut world = World::start(dir, Programs::find(beside)?, options.stock)?;
    let measured = measure(&mut world, &iperf, beside, options, &mut report, say);
    if measured.is_err() {
        say(&world.logs());
    }
    measured?;
    let complaints = world.devnet.complaints();
    ensure!(
        complaints.is_empty(),
        "the devnet saw what real servers let pass although it is wrong: {complaints:?}"
    );
    report.machine.push(format!("load at the end {}", load()));
    Ok(report)
}

fn measure(
    world: &mut World,
    iperf: &Iperf,
    beside: &Path,
    options: &Options,
    report: &mut Report,
    say: &mut dyn FnMut(&str),
) -> Result<()> {
    let time = options.time;
    if options.wants("memory") {
        report.figures.extend(memory::engines(world, iperf, time, say)?);
        report.figures.extend(memory::per_peer(world, say)?);
    }
    rates(world, iperf, options, report, say)?;
    if options.wants("ping") {
        report.figures.extend(latency::idle(world, options.rounds, time, say)?);
        report.figures.extend(latency::loaded(world, iperf, options.rounds, time, say)?);
    }
    if options.wants("recovery") || options.wants("start") {
        let figures = life::kills(world, options.kills, say)?;
        report.figures.extend(figures.into_iter().filter(|_| options.wants("recovery")));
        report.figures.extend(life::starts(world)?.into_iter().filter(|_| options.wants("start")));
    }
    if options.wants("joins") {
        let joins = joins::Options { alone: ALONE, at_once: options.joins.clone() };
        let seen = joins::run(&world.lab.dir().join("joins"), beside, &joins, say)?;
        report.figures.extend(joined(&seen));
    }
    if options.wants("idle") {
        report.figures.extend(idle::watch(world, options.idle, say)?);
    }
    Ok(())
}

/// Pods that joined, as figures.
fn joined(seen: &joins::Report) -> Vec<Figure> {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let alone: Vec<f64> = seen.alone.iter().copied().map(ms).collect();
    let p99 = percentile(&alone, 99).unwrap_or_default();
    let mut figures = vec![
        Figure { ours: alone, ..Figure::new("joins.alone.p50", "CNI ADD alone, p50", "ms") },
        Figure::of("joins.alone.p99", "CNI ADD alone, p99", "ms", p99),
    ];
    for row in &seen.rows {
        let pods = u32::try_from(row.pods).unwrap_or(u32::MAX).max(1);
        let mib = f64::from(u32::try_from(row.supervisor_kib[1]).unwrap_or(u32::MAX)) / 1024.0;
        for (part, words, unit, value) in [
            ("all", "all done", "s", row.all.as_secs_f64()),
            ("p50", "p50", "ms", ms(row.add[0])),
            ("p99", "p99", "ms", ms(row.add[1])),
            ("supervisor", "then the supervisor's RSS", "MiB", mib),
            ("cpu", "the supervisor's CPU for each", "ms", ms(row.supervisor_cpu / pods)),
            ("engine_cpu", "each engine's CPU", "ms", ms(row.engines_cpu / pods)),
            ("metrics", "then /metrics", "ms", ms(row.scrape)),
            ("left", "all DELs at once", "s", row.left.as_secs_f64()),
        ] {
            let (name, what) = (format!("joins.{pods}.{part}"), format!("{pods} CNI ADDs at once, {words}"));
            figures.push(Figure::of(name, what, unit, value));
        }
    }
    figures
}

/// What is sent as fast as it goes.
fn rates(
    world: &World,
    iperf: &Iperf,
    options: &Options,
    report: &mut Report,
    say: &mut dyn FnMut(&str),
) -> Result<()> {
    let across = world.across();
    for (part, what, streams) in [("tcp1", "TCP, 1 stream", 1), ("tcp8", "TCP, 8 streams", 8)] {
        if options.wants(part) {
            for course in courses(part, what, &across, options, options.time) {
                report.figures.extend(speed::tcp(world, iperf, &course, streams, say)?);
            }
        }
    }
    // A search takes a dozen runs.
    let short = (options.time / 3).max(Duration::from_secs(1));
    for (part, what, bytes) in [("udp1200", "UDP, 1200 bytes", 1200), ("udp64", "UDP, 64 bytes", 64)] {
        if options.wants(part) {
            for course in courses(part, what, &across, options, short) {
                report.figures.extend(speed::udp(world, iperf, &course, bytes, say)?);
            }
        }
    }
    if options.wants("node") {
        let lanes = world.on_one_node();
        for course in courses("node", "TCP, 1 stream, one node", &lanes, options, options.time) {
            report.figures.extend(speed::tcp(world, iperf, &course, 1, say)?);
        }
    }
    if options.wants("relay") {
        let lanes: Vec<Lane> = across.into_iter().filter(|lane| lane.side != Side::Bare).collect();
        world.lab.block_udp()?;
        world.wait(Way::Relay)?;
        for course in courses("relay", "TCP, 1 stream, by relay", &lanes, options, options.time) {
            report.figures.extend(speed::tcp(world, iperf, &course, 1, say)?);
        }
        world.wait(Way::Relay)?;
        world.lab.unblock_udp()?;
        world.wait(Way::Direct)?;
    }
    Ok(())
}

/// IPv4 and IPv6, there and back; the first has the bars.
fn courses(part: &str, what: &str, lanes: &[Lane], options: &Options, time: Duration) -> Vec<Course> {
    let mut all = Vec::new();
    for (name, words, v6, back) in [
        ("v4", "IPv4", false, false),
        ("v4.back", "IPv4 back", false, true),
        ("v6", "IPv6", true, false),
        ("v6.back", "IPv6 back", true, true),
    ] {
        let lanes = lanes.iter().map(|lane| if back { lane.back() } else { *lane }).collect();
        let rounds = if all.is_empty() { options.rounds } else { options.fewer_rounds() };
        let (name, what) = (format!("{part}.{name}"), format!("{what}, {words}"));
        all.push(Course { name, what, lanes, v6, rounds, time });
    }
    all
}

/// What the figures were measured on.
fn machine(options: &Options) -> Vec<String> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("an unnamed processor", |(_, name)| name);
    let count = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let system = || read("/proc/sys/net/ipv4/tcp_congestion_control");
    let congestion = options.congestion.clone().unwrap_or_else(system);
    vec![format!(
        "{count} × {model}, Linux {}, TCP {}; both ends, iperf3 and the relay on them; load before {}",
        kernel.trim(),
        congestion.trim(),
        load()
    )]
}

/// Processes that wanted a processor, over 1, 5 and 15 minutes.
fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_asked_for_by_the_beginning_of_their_names() {
        let options = |only: &[&str]| Options {
            only: only.iter().map(ToString::to_string).collect(),
            rounds: 5,
            time: Duration::from_secs(1),
            stock: true,
            congestion: None,
            joins: Vec::new(),
            idle: Duration::ZERO,
            kills: 0,
        };
        for (only, part, wanted) in [
            (&[][..], "tcp1", true),
            (&["tcp"], "tcp1", true),
            (&["tcp8"], "tcp1", false),
            (&["udp", "tcp1"], "tcp1", true),
        ] {
            assert_eq!(options(only).wants(part), wanted, "{only:?}");
        }
        assert_eq!(options(&[]).fewer_rounds(), 3);
    }
}
