//! `cleanup`: devices of pods that are no more leave the tailnets.

use std::fmt::Write as _;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};
use podtether_proto::node::{Cleanup, NodeClient};

use super::call::answered;
use super::text::{paragraph, printable};
use super::{Exit, Screen, json_arg, show};
use crate::engine::within;

/// How long a clean-up may take: a hundred devices, one after another.
pub(super) const WITHIN: Duration = Duration::from_secs(300);

pub(super) fn command() -> Command {
    Command::new("cleanup")
        .about("Delete the devices of pods that are no more, of this node or another")
        .args(args())
}

/// The arguments, of `kubectl ts cleanup` too.
pub(super) fn args() -> [Arg; 2] {
    [Arg::new("dry-run").long("dry-run").action(ArgAction::SetTrue).help("only say which"), json_arg()]
}

pub(super) async fn run(
    client: &NodeClient,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let dry_run = matches.get_flag("dry-run");
    let done = answered(client.cleanup(within(WITHIN), dry_run).await)?;
    show(&done, matches, screen, |done| text(done, dry_run))
}

fn text(done: &Cleanup, dry_run: bool) -> String {
    let mut text = String::new();
    for ghost in &done.ghosts {
        let what = match (ghost.deleted, dry_run) {
            (true, _) => "deleted",
            (false, true) => "would be deleted",
            (false, false) => "could not be deleted",
        };
        let _ = writeln!(text, "{} (tailnet {}): {what}", printable(&ghost.name), ghost.tailnet);
    }
    for note in &done.notes {
        text.push_str(&paragraph("", note));
    }
    if done.ghosts.is_empty() {
        text.push_str("no device of a pod that is no more was found\n");
    }
    text
}
