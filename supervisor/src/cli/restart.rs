//! `restart`: new engine processes, one pod after another.

use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};
use podtether_proto::node::{NodeClient, Renewal, Renewed};
use serde::Serialize;

use super::call::{self, CHANGE_WITHIN, answered, selector};
use super::{Exit, Screen, json_arg, pod_arg, show, text_of};
use crate::engine::within;

pub(super) fn command() -> Command {
    Command::new("restart")
        .about("Replace engines by new processes, one after another, as after an upgrade: no packet is lost")
        .arg(pod_arg().required(false).required_unless_present("all"))
        .arg(
            Arg::new("all")
                .long("all")
                .action(ArgAction::SetTrue)
                .conflicts_with("pod")
                .help("every pod that runs; stops at the first that does not come back"),
        )
        .arg(Arg::new("kill").long("kill").action(ArgAction::SetTrue).help(
            "end the old process first, as a crash would; else the new one is ready before the old one lets go",
        ))
        .arg(
            Arg::new("pause")
                .long("pause")
                .value_name("SECONDS")
                .default_value("1")
                .value_parser(clap::value_parser!(u16))
                .help("between one engine and the next"),
        )
        .arg(json_arg())
}

pub(super) async fn run(
    client: &NodeClient,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let pause = Duration::from_secs(matches.get_one::<u16>("pause").copied().unwrap_or(1).into());
    let names = if matches.get_flag("all") {
        let pods = call::pods(client, false).await?;
        let running = pods.iter().filter(|pod| pod.state == "running");
        running.map(|pod| format!("{}/{}", pod.namespace, pod.pod)).collect()
    } else {
        vec![text_of(matches, "pod")]
    };
    let how = if matches.get_flag("kill") { Renewal::Kill } else { Renewal::Handover };
    let restarted = restart(client, names, how, pause).await?;
    show(&restarted, matches, screen, |restarted| restarted.iter().map(text).collect())
}

/// One pod with a new engine.
#[derive(Debug, Serialize)]
struct Restarted {
    pod: String,
    #[serde(flatten)]
    renewed: Renewed,
}

/// One after another; the first that fails is the last, so that a bad build costs one pod.
async fn restart(
    client: &NodeClient,
    pods: Vec<String>,
    how: Renewal,
    pause: Duration,
) -> Result<Vec<Restarted>, String> {
    let all = pods.len();
    let mut done: Vec<Restarted> = Vec::new();
    for pod in pods {
        if !done.is_empty() {
            tokio::time::sleep(pause).await;
        }
        match answered(client.renew(within(CHANGE_WITHIN), selector(&pod), how).await) {
            Ok(renewed) => done.push(Restarted { pod, renewed }),
            Err(why) if all == 1 => return Err(why),
            Err(why) => {
                return Err(format!(
                    "{} of {all} engines restarted, then stopped at {pod}: {why}",
                    done.len()
                ));
            }
        }
    }
    Ok(done)
}

fn text(Restarted { pod, renewed }: &Restarted) -> String {
    let gap = match renewed.gap_us {
        Some(us) => format!(", handed over in {}.{:03} ms", us / 1000, us % 1000),
        None => String::new(),
    };
    format!("{pod}: new engine {} after {} ms{gap}\n", renewed.pid, renewed.took_ms)
}
