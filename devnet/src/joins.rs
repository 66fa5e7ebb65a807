//! `podtether-devnet joins`: the command around [`podtether_devnet::bench::joins`].

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use podtether_devnet::bench::joins::{self, Options};
use podtether_net::isolate;

use crate::demo::{inside, orphans, outer};

/// The last resort against a hang.
const LONGEST: Duration = Duration::from_secs(900);

/// What the user may choose.
#[derive(Debug, Args)]
pub(crate) struct Joins {
    /// Pods that join and leave one after another.
    #[arg(long, default_value_t = 20)]
    alone: usize,
    /// Numbers of pods that join at once.
    #[arg(long, value_delimiter = ',', default_value = "10,50,100,250")]
    at_once: Vec<usize>,
}

/// Measures; its exit code is 0 when every bar is met.
pub(crate) fn run(joins: &Joins) -> ExitCode {
    let result = if isolate::is_isolated() { here(joins) } else { outside(joins) };
    result.unwrap_or_else(|error| {
        say(&format!("FAILED: {error:#}"));
        ExitCode::FAILURE
    })
}

fn outside(joins: &Joins) -> Result<ExitCode> {
    let at_once: Vec<String> = joins.at_once.iter().map(usize::to_string).collect();
    let words =
        ["joins".to_owned(), format!("--alone={}", joins.alone), "--at-once".to_owned(), at_once.join(",")];
    outer::run(&words)
}

fn here(joins: &Joins) -> Result<ExitCode> {
    // Interrupts from the terminal go to the process outside, not to supervisors and engines.
    nix::unistd::setsid().context("start a session")?;
    let _lifeline = inside::lifeline(|| (), LONGEST)?;
    orphans::reap_engines()?;
    inside::require_tun()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let dir = runtime.block_on(isolate::settle())?;
    drop(runtime);
    let program = std::env::current_exe().context("own path")?;
    let options = Options { alone: joins.alone, at_once: joins.at_once.clone() };
    let report = joins::run(&dir, &program, &options, &mut |line| say(line))?;
    say(&format!("\n{}", report.table()));
    let mut met = true;
    for figure in report.figures() {
        let within = figure.value <= figure.bar;
        met &= within;
        let word = if within { "ok" } else { "MISSED" };
        say(&format!("{:<48} {:>9.1}  bar {:>7.0}  {word}", figure.what, figure.value, figure.bar));
    }
    Ok(if met { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[expect(clippy::print_stdout, reason = "a command line tool prints its answers")]
fn say(text: &str) {
    println!("{text}");
}
