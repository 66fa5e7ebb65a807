//! `log-level`: how much is logged of a pod, changed while it runs.

use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use podtether_proto::log::{LogFor, LogLevel};
use podtether_proto::node::{LogWish, NodeClient, PodLog};

use super::call::{READ_WITHIN, answered, selector};
use super::text::age;
use super::{Exit, Screen, of_pod, show, text_of};
use crate::engine::within;
use crate::log::levels::LONGEST;

/// The word for no level of its own.
const DEFAULT: &str = "default";

pub(super) fn command() -> Command {
    let levels = LogLevel::ALL.map(LogLevel::name).into_iter().chain([DEFAULT]).collect::<Vec<_>>();
    let longest = i64::try_from(LONGEST.as_secs() / 60).unwrap_or(1);
    of_pod(
        "log-level",
        "Show or change how much is logged of a pod, by the supervisor and by its engine, for a while",
    )
    .arg(
        Arg::new("level")
            .value_name("LEVEL")
            .value_parser(levels)
            .help("of this pod's lines from now on; without it, what is in force is shown"),
    )
    .arg(
        Arg::new("minutes")
            .long("minutes")
            .value_name("MINUTES")
            .default_value("10")
            .value_parser(clap::value_parser!(u16).range(1..=longest))
            .help("for so long; then the default is in force again"),
    )
}

pub(super) async fn run(
    client: &NodeClient,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let pod = text_of(matches, "pod");
    let ms = u64::from(matches.get_one::<u16>("minutes").copied().unwrap_or(10)) * 60_000;
    let wish = match matches.get_one::<String>("level").map(String::as_str) {
        None => LogWish::Tell,
        Some(name) => match LogLevel::ALL.into_iter().find(|level| level.name() == name) {
            Some(level) => LogWish::For(LogFor { level, ms }),
            None => LogWish::Default,
        },
    };
    let now = answered(client.log_level(within(READ_WITHIN), selector(&pod), wish).await)?;
    show(&now, matches, screen, |now| text(&pod, now))
}

fn text(pod: &str, now: &PodLog) -> String {
    match now.raised {
        Some(LogFor { level, ms }) => {
            format!("{pod}: {}, for {}\n", level.name(), age(Duration::from_secs(ms.div_ceil(1000))))
        }
        None => format!("{pod}: the default\n"),
    }
}
