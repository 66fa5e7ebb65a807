//! `routing`: which routes of other nodes a pod uses, and changing that while it runs.

use std::fmt::Write as _;

use clap::{Arg, ArgMatches, Command};
use podtether_proto::node::{NodeClient, PodRouting, PodSelector, Routing};

use super::call::{CHANGE_WITHIN, READ_WITHIN, answered, problem, selector};
use super::{Exit, Screen, of_pod, show, text_of};
use crate::engine::within;

pub(super) fn command() -> Command {
    of_pod("routing", "Show or change which routes of other nodes a pod uses, while it runs")
        .arg(
            Arg::new("accept-routes")
                .long("accept-routes")
                .value_name("BOOL")
                .value_parser(clap::value_parser!(bool))
                .help("use the networks of subnet routers"),
        )
        .arg(
            Arg::new("exit-node")
                .long("exit-node")
                .value_name("NODE")
                .help("name, address or stable id of the node that carries everything else; \"\" for none"),
        )
}

pub(super) async fn run(
    client: &NodeClient,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let pod = text_of(matches, "pod");
    let routing = change(
        client,
        selector(&pod),
        matches.get_one::<bool>("accept-routes").copied(),
        matches.get_one::<String>("exit-node").cloned(),
    )
    .await?;
    show(&routing, matches, screen, |routing| text(&pod, routing))
}

async fn change(
    client: &NodeClient,
    pod: PodSelector,
    accept_routes: Option<bool>,
    exit_node: Option<String>,
) -> Result<PodRouting, String> {
    let now = answered(client.routing(within(READ_WITHIN), pod.clone()).await)?;
    if accept_routes.is_none() && exit_node.is_none() {
        return Ok(now);
    }
    let wanted = Routing {
        accept_routes: accept_routes.unwrap_or(now.routing.accept_routes),
        exit_node: match exit_node {
            Some(node) => Some(node).filter(|node| !node.is_empty()),
            None => now.routing.exit_node,
        },
    };
    answered(client.set_routing(within(CHANGE_WITHIN), pod, wanted).await)
}

fn text(pod: &str, routing: &PodRouting) -> String {
    let mut text = String::new();
    let uses = if routing.routing.accept_routes { "used" } else { "not used" };
    let _ = writeln!(text, "{pod}: routes of subnet routers are {uses}");
    let _ = match (&routing.routing.exit_node, &routing.exit_node_id) {
        (None, _) => writeln!(text, "exit node: none"),
        (Some(node), Some(id)) => writeln!(text, "exit node: {node} ({id})"),
        (Some(node), None) => {
            writeln!(text, "exit node: {node}, which no peer is now: what it should carry is dropped")
        }
    };
    for route in &routing.routes {
        let _ = writeln!(text, "  {}", route.dst);
    }
    for found in &routing.health {
        let _ = writeln!(text, "{}", problem(found));
    }
    text
}
