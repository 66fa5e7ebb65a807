//! `podtether-devnet demo`: the main job on one machine, on real kernel objects and real sockets.
//!
//! A devnet, two simulated nodes with a router between them, a supervisor on each, four pods joined by
//! calling `podtether-cni` as a runtime does. Everything runs in namespaces of its own, whose init is a
//! child of the process the user started ([`outer`]): whatever ends that, ends and removes all of it.
//!
//! | part | module |
//! |---|---|
//! | outside: interrupts, leftovers | [`outer`] |
//! | inside: the order of events | [`inside`] |
//! | what everything runs on | [`world`] |
//! | pods join and reach each other | [`reach`] |
//! | an engine is killed, UDP is blocked, pods leave | [`trouble`] |
//! | what the user sees | [`display`] |

mod display;
pub(crate) mod inside;
pub(crate) mod orphans;
pub(crate) mod outer;
mod reach;
mod trouble;
mod world;

use std::process::ExitCode;

use clap::Args;
use podtether_net::isolate;

/// What the user may choose.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Leave everything running at the end, and print what to try, until interrupted.
    #[arg(long)]
    keep: bool,
}

/// Runs the demo; its exit code is 0 when everything was shown.
#[expect(clippy::print_stdout, reason = "a command line tool prints its answers")]
pub(crate) fn run(demo: &Demo) -> ExitCode {
    let result = if isolate::is_isolated() {
        inside::run(demo.keep)
    } else {
        let keep = demo.keep.then_some("--keep");
        outer::run(&["demo"].into_iter().chain(keep).map(str::to_owned).collect::<Vec<_>>())
    };
    result.unwrap_or_else(|error| {
        println!("the demo cannot start: {error}");
        ExitCode::FAILURE
    })
}
