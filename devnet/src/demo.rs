//! `podtether-devnet demo`: the main job on one machine, on real kernel objects and real sockets.
//!
//! A devnet, two simulated nodes with a router between them, a supervisor on each, four pods joined by
//! calling `podtether-cni` as a runtime does. Everything runs in namespaces of its own, whose init is a
//! child of the process the user started: whatever ends that, ends and removes all of it.

use clap::Args;

/// What the user may choose.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Leave everything running at the end, and print what to try, until interrupted.
    #[arg(long)]
    keep: bool,
}

/// Runs the demo.
///
/// # Errors
/// Names what failed.
pub(crate) fn run(demo: &Demo) -> anyhow::Result<()> {
    anyhow::bail!("the demo is not complete yet (keep: {})", demo.keep)
}
