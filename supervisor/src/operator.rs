//! Sub-commands for the person who runs a node, asked of the running supervisor through its socket.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};
use podtether_proto::engine::{HealthMessage, PING_MAX, PathStatus, PingKind, Pong};
use podtether_proto::node::{
    Cleanup, CniError, NodeClient, PodRouting, PodSelector, PodSummary, Renewal, Renewed, Routing,
};
use podtether_proto::{PROTO_VERSION, transport};
use serde::Serialize;
use tarpc::client::{self, RpcError};

use crate::engine::within;

const DEFAULT_SOCKET: &str = "/run/podtether/supervisor.sock";
/// A call that only reads.
const READ_WITHIN: Duration = Duration::from_secs(5);
/// New routes are in force and on disk by then, or a step of it failed.
const CHANGE_WITHIN: Duration = Duration::from_secs(30);
/// How long a clean-up may take: a hundred devices, one after another.
const CLEANUP_WITHIN: Duration = Duration::from_secs(300);
/// More pings than this are a job for another tool.
const MAX_PINGS: u16 = 1000;

/// The sub-commands.
#[must_use]
pub fn commands() -> Vec<Command> {
    let socket = Arg::new("socket")
        .long("socket")
        .value_name("PATH")
        .env("PODTETHER_SOCKET")
        .default_value(DEFAULT_SOCKET)
        .value_parser(clap::value_parser!(PathBuf))
        .help("the running supervisor's socket, supervisor.sock in node.run_dir");
    let json = Arg::new("json").long("json").action(ArgAction::SetTrue).help("JSON for programs");
    let pod = Arg::new("pod").value_name("[NAMESPACE/]POD").required(true).help("a pod of this node");
    let command = |name: &'static str, about: &'static str| {
        Command::new(name).about(about).args([socket.clone(), json.clone()])
    };
    vec![
        command("pods", "List the pods of this node"),
        command("cleanup", "Delete the devices of pods that are no more, of this node or another").arg(
            Arg::new("dry-run").long("dry-run").action(ArgAction::SetTrue).help("only say which"),
        ),
        command("routing", "Show or change which routes of other nodes a pod uses, while it runs")
            .arg(pod.clone())
            .arg(
                Arg::new("accept-routes")
                    .long("accept-routes")
                    .value_name("BOOL")
                    .value_parser(clap::value_parser!(bool))
                    .help("use the networks of subnet routers"),
            )
            .arg(
                Arg::new("exit-node").long("exit-node").value_name("NODE").help(
                    "name, address or stable id of the node that carries everything else; \"\" for none",
                ),
            ),
        command("restart", "Replace engines by new processes, one after another, as after an upgrade")
            .arg(Arg::new("engine").long("engine").action(ArgAction::SetTrue).required(true).help(
                "what is restarted; the supervisor itself is restarted like any service, and costs no packet",
            ))
            .arg(pod.clone().required(false).required_unless_present("all").help("one pod of this node"))
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
            ),
        command("ping", "Ping a peer of a pod's tailnet from the pod's engine")
            .arg(pod)
            .arg(Arg::new("peer").value_name("PEER").required(true).help("its name, address or stable id"))
            .arg(
                Arg::new("kind")
                    .long("kind")
                    .default_value("disco")
                    .value_parser(["disco", "tsmp", "icmp"])
                    .help("disco: the path; tsmp: the other node; icmp: the host or pod behind it"),
            )
            .arg(
                Arg::new("count")
                    .long("count")
                    .short('c')
                    .default_value("1")
                    .value_parser(clap::value_parser!(u16).range(1..=i64::from(MAX_PINGS)))
                    .help("how many, one after another"),
            ),
    ]
}

/// Runs the sub-command of these arguments, if there is one: what to print, or what went wrong.
///
/// # Errors
/// A sentence.
pub async fn run(name: &str, matches: &ArgMatches) -> Result<String, String> {
    let socket = matches.get_one::<PathBuf>("socket").cloned().unwrap_or_default();
    let client = connect(&socket).await?;
    let json = matches.get_flag("json");
    let text = |id: &str| matches.get_one::<String>(id).cloned().unwrap_or_default();
    match name {
        "pods" => {
            let pods = pods(&client).await?;
            if json { to_json(&pods) } else { Ok(table(&pods)) }
        }
        "cleanup" => {
            let dry_run = matches.get_flag("dry-run");
            let done = client.cleanup(within(CLEANUP_WITHIN), dry_run).await;
            let done = done.map_err(|e| broken(&e))?.map_err(|e| refused(&e))?;
            if json { to_json(&done) } else { Ok(cleanup_text(&done, dry_run)) }
        }
        "routing" => {
            let routing = routing(
                &client,
                selector(&text("pod")),
                matches.get_one::<bool>("accept-routes").copied(),
                matches.get_one::<String>("exit-node").cloned(),
            )
            .await?;
            if json { to_json(&routing) } else { Ok(routing_text(&text("pod"), &routing)) }
        }
        "ping" => {
            let kind = match text("kind").as_str() {
                "tsmp" => PingKind::Tsmp,
                "icmp" => PingKind::Icmp,
                _ => PingKind::Disco,
            };
            let mut pongs = Vec::new();
            for _ in 0..matches.get_one::<u16>("count").copied().unwrap_or(1) {
                let call = client.ping(within(PING_MAX * 2), selector(&text("pod")), text("peer"), kind);
                pongs.push(call.await.map_err(|e| broken(&e))?.map_err(|e| refused(&e))?);
            }
            if json { to_json(&pongs) } else { Ok(pongs.iter().map(pong_text).collect()) }
        }
        "restart" => {
            let pause = Duration::from_secs(matches.get_one::<u16>("pause").copied().unwrap_or(1).into());
            let names = if matches.get_flag("all") {
                let pods = pods(&client).await?;
                let runs = |pod: &PodSummary| pod.state == "running";
                pods.iter()
                    .filter(|pod| runs(pod))
                    .map(|pod| format!("{}/{}", pod.namespace, pod.pod))
                    .collect()
            } else {
                vec![text("pod")]
            };
            let how = if matches.get_flag("kill") { Renewal::Kill } else { Renewal::Handover };
            let restarted = restart(&client, names, how, pause).await?;
            if json { to_json(&restarted) } else { Ok(restarted.iter().map(restarted_text).collect()) }
        }
        other => Err(format!("there is no command {other}")),
    }
}

async fn connect(socket: &Path) -> Result<NodeClient, String> {
    let transport = transport::connect(socket).await.map_err(|e| {
        format!(
            "no supervisor answers at {}: {e}; is podtether-supervisor running, and is node.run_dir another \
             (--socket)?",
            socket.display()
        )
    })?;
    let client = NodeClient::new(client::Config::default(), transport).spawn();
    let version = client.status(within(READ_WITHIN)).await.map_err(|e| broken(&e))?;
    if !PROTO_VERSION.accepts(version) {
        return Err(format!(
            "the supervisor speaks version {}.{} and this program {}.{}: use the program of its build",
            version.major, version.minor, PROTO_VERSION.major, PROTO_VERSION.minor
        ));
    }
    Ok(client)
}

fn broken(error: &RpcError) -> String {
    match error {
        RpcError::DeadlineExceeded => "the supervisor did not answer in time; see its log".to_owned(),
        RpcError::Shutdown | RpcError::Send(_) | RpcError::Channel(_) | RpcError::Server(_) => {
            format!("the supervisor ended the connection ({error}); see its log")
        }
    }
}

/// A refusal, for a person: without the number that is for runtimes.
fn refused(error: &CniError) -> String {
    match error.details.as_str() {
        "" => error.msg.clone(),
        details => format!("{}: {details}", error.msg),
    }
}

fn problem_text(problem: &HealthMessage) -> String {
    match problem.text.as_str() {
        "" => problem.title.clone(),
        text => format!("{}: {text}", problem.title),
    }
}

/// `namespace/name`, or a name in the namespace `default`.
fn selector(text: &str) -> PodSelector {
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    PodSelector::Pod { namespace: namespace.to_owned(), name: name.to_owned() }
}

async fn pods(client: &NodeClient) -> Result<Vec<PodSummary>, String> {
    let mut pods = Vec::new();
    loop {
        let skip = u32::try_from(pods.len()).unwrap_or(u32::MAX);
        let page = client.pods(within(READ_WITHIN), skip).await.map_err(|e| broken(&e))?;
        if page.is_empty() {
            return Ok(pods);
        }
        pods.extend(page);
    }
}

async fn routing(
    client: &NodeClient,
    pod: PodSelector,
    accept_routes: Option<bool>,
    exit_node: Option<String>,
) -> Result<PodRouting, String> {
    let now = client.routing(within(READ_WITHIN), pod.clone()).await;
    let now = now.map_err(|e| broken(&e))?.map_err(|e| refused(&e))?;
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
    let changed = client.set_routing(within(CHANGE_WITHIN), pod, wanted).await;
    changed.map_err(|e| broken(&e))?.map_err(|e| refused(&e))
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
        let renewed = client.renew(within(CHANGE_WITHIN), selector(&pod), how).await;
        let renewed = renewed.map_err(|e| broken(&e)).and_then(|answer| answer.map_err(|e| refused(&e)));
        match renewed {
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

fn restarted_text(Restarted { pod, renewed }: &Restarted) -> String {
    let gap = match renewed.gap_us {
        Some(us) => format!(", handed over in {}.{:03} ms", us / 1000, us % 1000),
        None => String::new(),
    };
    format!("{pod}: new engine {} after {} ms{gap}\n", renewed.pid, renewed.took_ms)
}

fn cleanup_text(done: &Cleanup, dry_run: bool) -> String {
    let mut text = String::new();
    for ghost in &done.ghosts {
        let what = match (ghost.deleted, dry_run) {
            (true, _) => "deleted",
            (false, true) => "would be deleted",
            (false, false) => "could not be deleted",
        };
        let _ = writeln!(text, "{} (tailnet {}): {what}", ghost.name, ghost.tailnet);
    }
    for note in &done.notes {
        let _ = writeln!(text, "{note}");
    }
    if done.ghosts.is_empty() {
        text.push_str("no device of a pod that is no more was found\n");
    }
    text
}

fn to_json(value: &impl Serialize) -> Result<String, String> {
    serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(|e| e.to_string())
}

fn table(pods: &[PodSummary]) -> String {
    let row = |pod: &PodSummary| {
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        [
            format!("{}/{}", pod.namespace, pod.pod),
            pod.state.clone(),
            if addresses.is_empty() { "-".to_owned() } else { addresses.join(",") },
            if pod.name.is_empty() { "-".to_owned() } else { pod.name.clone() },
            pod.restarts.to_string(),
            if pod.limits.is_empty() { "-".to_owned() } else { pod.limits.join(",") },
        ]
    };
    let mut rows = vec![["POD", "STATE", "ADDRESSES", "NAME", "RESTARTS", "LIMITS"].map(str::to_owned)];
    rows.extend(pods.iter().map(row));
    let mut widths = [0; 6];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, w)| format!("{cell:w$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
        let Some(pod) = number.checked_sub(1).and_then(|n| pods.get(n)) else { continue };
        if !pod.reason.is_empty() {
            let _ = writeln!(text, "  {}", pod.reason);
        }
        for problem in &pod.health {
            let _ = writeln!(text, "  {}", problem_text(problem));
        }
    }
    text
}

fn routing_text(pod: &str, routing: &PodRouting) -> String {
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
    for problem in &routing.health {
        let _ = writeln!(text, "{}", problem_text(problem));
    }
    text
}

fn pong_text(pong: &Pong) -> String {
    let way = match pong.path {
        PathStatus::Idle => String::new(),
        PathStatus::Relay { region } => format!(" by relay region {region}"),
        PathStatus::Direct { endpoint, .. } => format!(" straight at {endpoint}"),
    };
    let (ms, us) = (pong.latency_us / 1000, pong.latency_us % 1000);
    format!("pong from {} ({}){way} in {ms}.{us:03} ms\n", pong.name, pong.address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_named_with_or_without_their_namespace() {
        let named =
            |namespace: &str, name: &str| PodSelector::Pod { namespace: namespace.into(), name: name.into() };
        assert_eq!(selector("web-0"), named("default", "web-0"));
        assert_eq!(selector("shop/web-0"), named("shop", "web-0"));
    }

    #[test]
    fn a_pong_reads_as_a_sentence() {
        let pong = Pong {
            name: "b.example".into(),
            address: "100.64.0.2".parse().unwrap(),
            kind: PingKind::Disco,
            latency_us: 12_034,
            path: PathStatus::Relay { region: 7 },
        };
        assert_eq!(pong_text(&pong), "pong from b.example (100.64.0.2) by relay region 7 in 12.034 ms\n");
    }
}
