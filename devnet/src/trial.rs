//! `podtether-devnet chaos`: the command around [`podtether_devnet::chaos`].

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use podtether_devnet::chaos::{self, Cgroups, Counts, Options};
use podtether_net::isolate;

use crate::demo::{inside, orphans, outer};

/// Beyond the time for events: everything starts, comes to rest and leaves.
const AROUND: Duration = Duration::from_secs(600);

/// What the user may choose.
#[derive(Debug, Args)]
pub(crate) struct Chaos {
    /// Replays the schedule of this seed; any without it.
    #[arg(long)]
    seed: Option<u64>,
    /// Ends after this long at the latest.
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
    /// Pods on the node that is hurt.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=200))]
    pods: u16,
    /// Kills of one engine. With any count given, the run ends when all events have happened.
    #[arg(long)]
    kills: Option<usize>,
    /// Engines that are stopped and do not answer.
    #[arg(long)]
    stops: Option<usize>,
    /// Engines whose cgroup is filled with memory. Needs root.
    #[arg(long)]
    bombs: Option<usize>,
    /// Engines that are replaced on request.
    #[arg(long)]
    handovers: Option<usize>,
    /// Kills of the supervisor.
    #[arg(long)]
    supervisor_kills: Option<usize>,
    /// Kills of the supervisor and all engines at once.
    #[arg(long)]
    everything: Option<usize>,
    /// Times each that control, the relay, both, and the uplink are away.
    #[arg(long)]
    outages: Option<usize>,
    /// Cgroup of the engines, which the process outside removes.
    #[arg(long, hide = true, default_value = "")]
    cgroup_root: String,
}

impl Chaos {
    fn options(&self, seed: u64) -> Options {
        let Self { kills, stops, bombs, handovers, supervisor_kills, everything, outages, .. } = *self;
        let given = [kills, stops, bombs, handovers, supervisor_kills, everything, outages]
            .iter()
            .any(Option::is_some);
        let or = |count: Option<usize>, round: usize| count.unwrap_or(if given { 0 } else { round });
        Options {
            seed,
            pods: self.pods.into(),
            counts: Counts {
                kills: or(kills, Counts::ROUND.kills),
                stops: or(stops, Counts::ROUND.stops),
                bombs: or(bombs, Counts::ROUND.bombs),
                handovers: or(handovers, Counts::ROUND.handovers),
                supervisor_kills: or(supervisor_kills, Counts::ROUND.supervisor_kills),
                everything: or(everything, Counts::ROUND.everything),
                outages: or(outages, Counts::ROUND.outages),
            },
            repeats: !given,
            limit: self.limit(),
            cgroup_root: self.cgroup_root.clone(),
        }
    }

    fn limit(&self) -> Duration {
        Duration::try_from_secs_f64(self.minutes * 60.0).unwrap_or(Duration::ZERO)
    }

    /// As words for the process inside.
    fn arguments(&self, seed: u64, cgroup_root: &str) -> Vec<String> {
        let Self {
            minutes, pods, kills, stops, bombs, handovers, supervisor_kills, everything, outages, ..
        } = self;
        let mut words = vec![
            "chaos".to_owned(),
            format!("--seed={seed}"),
            format!("--minutes={minutes}"),
            format!("--pods={pods}"),
            format!("--cgroup-root={cgroup_root}"),
        ];
        let counts = [
            ("kills", kills),
            ("stops", stops),
            ("bombs", bombs),
            ("handovers", handovers),
            ("supervisor-kills", supervisor_kills),
            ("everything", everything),
            ("outages", outages),
        ];
        words.extend(counts.iter().filter_map(|(name, n)| n.map(|n| format!("--{name}={n}"))));
        words
    }
}

/// Runs chaos; its exit code is 0 when nothing was lost that may not be and every bar was met.
pub(crate) fn run(chaos: &Chaos) -> ExitCode {
    let result = if isolate::is_isolated() { here(chaos) } else { outside(chaos) };
    result.unwrap_or_else(|error| {
        say(&format!("FAILED: {error:#}"));
        ExitCode::FAILURE
    })
}

fn outside(chaos: &Chaos) -> Result<ExitCode> {
    let seed = match chaos.seed {
        Some(seed) => seed,
        None => {
            let mut bytes = [0; 4];
            getrandom::fill(&mut bytes).context("make a seed")?;
            u32::from_ne_bytes(bytes).into()
        }
    };
    let cgroups = Cgroups::named(format!("podtether-chaos-{}", std::process::id()));
    let code = outer::run(&chaos.arguments(seed, cgroups.name()));
    cgroups.remove()?;
    code
}

fn here(chaos: &Chaos) -> Result<ExitCode> {
    // Interrupts from the terminal go to the process outside, not to supervisors and engines.
    nix::unistd::setsid().context("start a session")?;
    let _lifeline = inside::lifeline(|| (), chaos.limit() + AROUND)?;
    orphans::reap_engines()?;
    inside::require_tun()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let dir = runtime.block_on(isolate::settle())?;
    drop(runtime);
    let program = std::env::current_exe().context("own path")?;
    let options = chaos.options(chaos.seed.unwrap_or(0));
    let report = chaos::run(&dir, &program, &options, &mut |line| say(line))?;
    say(&format!("\n{}", report.table()));
    for breach in &report.breaches {
        say(&format!("BREACH {breach}"));
    }
    say(if report.passed() { "all bars met, nothing lost that may not be" } else { "NOT as it should be" });
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[expect(clippy::print_stdout, reason = "a command line tool prints its answers")]
fn say(text: &str) {
    println!("{text}");
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        chaos: Chaos,
    }

    #[test]
    fn the_process_inside_is_told_the_same() {
        for words in [vec![], vec!["--kills=7", "--minutes=0.5", "--pods=9", "--outages=1", "--bombs=2"]] {
            let outside = Line::parse_from(["x"].into_iter().chain(words)).chaos;
            let mut told = outside.arguments(5, "x");
            assert_eq!(told.remove(0), "chaos");
            let inside = Line::parse_from(std::iter::once("x".to_owned()).chain(told)).chaos;
            let told = Options { cgroup_root: "x".into(), ..outside.options(5) };
            assert_eq!(format!("{:?}", inside.options(5)), format!("{told:?}"));
            assert_eq!(inside.seed, Some(5));
        }
    }
}
