//! `podtether-devnet bench`: the command around [`podtether_devnet::bench`].

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use podtether_devnet::bench::{self, Options};
use podtether_net::isolate;

use crate::demo::{inside, orphans, outer};

/// Far more than all of it takes: the last resort against a hang.
const LONGEST: Duration = Duration::from_secs(3 * 3600);

/// What the user may choose.
#[derive(Debug, Clone, Args)]
pub(crate) struct Bench {
    /// Measure only what has a name that begins so; may be given more than once.
    #[arg(long, num_args = 1..)]
    only: Vec<String>,
    /// Samples of each figure that has a bar; half as many of the others.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// How long each rate is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=600))]
    seconds: u16,
    /// How many pods join at once, each time on a node that had none; may be given more than once.
    #[arg(long, num_args = 1.., default_values_t = [10, 50, 100, 250], value_parser = clap::value_parser!(u16).range(1..=250))]
    pods: Vec<u16>,
    /// How long idle engines are watched.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=3600))]
    idle_seconds: u16,
    /// How many engines are killed.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    kills: u16,
    /// Congestion control of TCP in all that is measured; the system's own otherwise.
    #[arg(long)]
    congestion: Option<String>,
    /// Leave tailscaled out although it is on PATH.
    #[arg(long)]
    no_tailscaled: bool,
    /// Exit with 1 when a bar is missed.
    #[arg(long)]
    check: bool,
    /// Where the figures are written to; `bench.json` in the target directory otherwise.
    #[arg(long)]
    json: Option<PathBuf>,
}

impl Bench {
    fn options(&self) -> Options {
        Options {
            only: self.only.clone(),
            rounds: self.rounds.into(),
            time: Duration::from_secs(self.seconds.into()),
            stock: !self.no_tailscaled,
            congestion: self.congestion.clone(),
            joins: self.pods.iter().copied().map(usize::from).collect(),
            idle: Duration::from_secs(self.idle_seconds.into()),
            kills: self.kills.into(),
        }
    }

    /// As words for the process inside.
    fn arguments(&self) -> Vec<String> {
        let Self { only, rounds, seconds, pods, idle_seconds, kills, congestion, no_tailscaled, check, json } =
            self;
        let mut words =
            vec!["bench".to_owned(), format!("--rounds={rounds}"), format!("--seconds={seconds}")];
        words.extend(only.iter().map(|name| format!("--only={name}")));
        words.extend(pods.iter().map(|count| format!("--pods={count}")));
        words.extend([format!("--idle-seconds={idle_seconds}"), format!("--kills={kills}")]);
        words.extend(congestion.iter().map(|name| format!("--congestion={name}")));
        words.extend(no_tailscaled.then(|| "--no-tailscaled".to_owned()));
        words.extend(check.then(|| "--check".to_owned()));
        words.extend(json.as_ref().map(|path| format!("--json={}", path.display())));
        words
    }
}

/// Runs the bench; its exit code is 1 when it could not be run, or a bar was missed that was to be checked.
pub(crate) fn run(bench: &Bench) -> ExitCode {
    let result = if isolate::is_isolated() {
        here(bench)
    } else {
        outer::run_by(isolate::spawn_keeping_root, &bench.arguments())
    };
    result.unwrap_or_else(|error| {
        say(&format!("FAILED: {error:#}"));
        ExitCode::FAILURE
    })
}

fn here(bench: &Bench) -> Result<ExitCode> {
    // Interrupts from the terminal go to the process outside, not to supervisors and engines.
    nix::unistd::setsid().context("start a session")?;
    let _lifeline = inside::lifeline(|| (), LONGEST)?;
    orphans::reap_engines()?;
    inside::require_tun()?;
    let program = std::env::current_exe().context("own path")?;
    let json = match &bench.json {
        Some(path) => path.clone(),
        None => program.ancestors().nth(2).context("no target directory")?.join("bench.json"),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let dir = runtime.block_on(isolate::settle())?;
    drop(runtime);
    let report = bench::run(&dir, &program, &bench.options(), &mut |line| say(line))?;
    report.write(&json)?;
    say(&format!("\n{}\nwritten to {}", report.table(), json.display()));
    Ok(if bench.check && !report.passed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
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
        bench: Bench,
    }

    #[test]
    fn the_process_inside_is_told_the_same() {
        for words in [
            vec![],
            vec!["--only", "tcp", "udp", "--rounds=2", "--seconds=1", "--check", "--json=/x/y"],
            vec![
                "--only=ping",
                "--no-tailscaled",
                "--pods",
                "7",
                "9",
                "--idle-seconds=300",
                "--kills=3",
                "--congestion=cubic",
            ],
        ] {
            let outside = Line::parse_from(["x"].into_iter().chain(words)).bench;
            let mut told = outside.arguments();
            assert_eq!(told.remove(0), "bench");
            let inside = Line::parse_from(std::iter::once("x".to_owned()).chain(told)).bench;
            assert_eq!(format!("{inside:?}"), format!("{outside:?}"));
        }
    }
}
