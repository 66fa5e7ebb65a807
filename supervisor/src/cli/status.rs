//! `status`: every pod of the node in a line, and what is wrong with it below.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Arg, ArgAction, ArgMatches, Command};
use podtether_proto::node::{NodeClient, PodSummary};
use serde::{Deserialize, Serialize};

use super::text::{Cell, Look, Paint, Table, age, bytes, fixed, flexible, paragraph, printable};
use super::{Exit, Output, Screen, call, output, output_arg, to_json};

/// Between two looks of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(2);
/// Clears a terminal and goes to its upper left corner.
pub(crate) const CLEAR: &str = "\x1b[2J\x1b[H";

/// What `status -o json` prints: `kubectl ts` reads it too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// The node's name: `PODTETHER_NODE_NAME` in a DaemonSet, else the host's.
    pub node: String,
    /// Version of the program that printed it.
    pub version: String,
    /// When it looked, milliseconds since the epoch.
    pub unix_ms: u64,
    /// Its pods.
    pub pods: Vec<PodSummary>,
}

pub(super) fn command() -> Command {
    Command::new("status")
        .about("List the pods: state, addresses, paths, traffic, and what is wrong")
        .args(args())
}

/// The arguments, of `kubectl ts status` too.
pub(crate) fn args() -> impl Iterator<Item = Arg> {
    let watch =
        Arg::new("watch").short('w').long("watch").action(ArgAction::SetTrue).help("look again every 2 s");
    namespace_args().into_iter().chain([watch, output_arg(true)])
}

/// `-n` and `-A`.
pub(crate) fn namespace_args() -> [Arg; 2] {
    [
        Arg::new("namespace")
            .short('n')
            .long("namespace")
            .value_name("NAMESPACE")
            .help("pods of this namespace alone"),
        Arg::new("all-namespaces")
            .short('A')
            .long("all-namespaces")
            .action(ArgAction::SetTrue)
            .conflicts_with("namespace")
            .help("pods of all namespaces"),
    ]
}

pub(super) async fn run(
    client: &NodeClient,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let namespace = matches.get_one::<String>("namespace").map(String::as_str);
    loop {
        let mut status = look(client).await?;
        status.pods.retain(|pod| namespace.is_none_or(|wanted| pod.namespace == wanted));
        let text = match output(matches) {
            Output::Json => to_json(&status)?,
            Output::Wide => wide(&status, screen.look),
            Output::Text => table(&status, screen.look),
        };
        if !matches.get_flag("watch") {
            screen.print(&text);
            return Ok(Exit::Done);
        }
        screen.print(&if screen.terminal { format!("{CLEAR}{text}") } else { format!("{text}\n") });
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

/// Asks for everything.
pub(super) async fn look(client: &NodeClient) -> Result<NodeStatus, String> {
    let pods = call::pods(client, true).await?;
    Ok(NodeStatus {
        node: node_name(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        unix_ms: now_ms(),
        pods,
    })
}

/// What Kubernetes calls this node.
pub(crate) fn node_name() -> String {
    let named = std::env::var("PODTETHER_NODE_NAME").ok().filter(|name| !name.is_empty());
    named.or_else(|| nix::unistd::gethostname().ok()?.into_string().ok()).unwrap_or_default()
}

pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Where a pod stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    Joined,
    Pending,
    Failed,
    Leaving,
}

pub(crate) fn standing(pod: &PodSummary) -> Standing {
    match pod.state.as_str() {
        "running" => Standing::Joined,
        "backoff" | "stopped" => Standing::Failed,
        "leaving" => Standing::Leaving,
        _ => Standing::Pending,
    }
}

/// The state's cell.
pub(crate) fn state(pod: &PodSummary) -> Cell {
    let paint = match standing(pod) {
        Standing::Joined if pod.control_connected => Paint::Good,
        Standing::Joined | Standing::Pending | Standing::Leaving => Paint::Warn,
        Standing::Failed => Paint::Bad,
    };
    Cell::painted(&pod.state, paint)
}

/// How packets reach the peers, in a word or two.
pub(crate) fn path(pod: &PodSummary) -> String {
    match pod.live.as_ref().map(|live| (live.peers_direct, live.peers_relay)) {
        None => "-".to_owned(),
        Some((0, 0)) => "idle".to_owned(),
        Some((direct, 0)) => format!("direct {direct}"),
        Some((0, relay)) => format!("relay {relay}"),
        Some((direct, relay)) => format!("mixed {direct}/{relay}"),
    }
}

/// How long ago the last handshake was.
pub(crate) fn handshake(pod: &PodSummary, now_ms: u64) -> String {
    let at = pod.live.as_ref().map_or(0, |live| live.last_handshake_unix_s);
    if at == 0 { "-".to_owned() } else { since(now_ms, at.saturating_mul(1000)) }
}

pub(crate) fn since(now_ms: u64, at_ms: u64) -> String {
    if at_ms == 0 { "-".to_owned() } else { age(Duration::from_millis(now_ms.saturating_sub(at_ms))) }
}

/// The address that is shown where there is room for one.
pub(crate) fn address(pod: &PodSummary) -> String {
    let v4 = pod.addresses.iter().find(|ip| ip.is_ipv4());
    v4.or_else(|| pod.addresses.first()).map_or_else(|| "-".to_owned(), ToString::to_string)
}

/// Why it is not as it should be, and what is wrong otherwise.
pub(crate) fn notes(pod: &PodSummary) -> Vec<String> {
    let reason = Some(&pod.reason).filter(|reason| !reason.is_empty() && standing(pod) != Standing::Joined);
    let mut notes: Vec<String> = reason.cloned().into_iter().collect();
    if standing(pod) == Standing::Joined && !pod.control_connected && pod.health.is_empty() {
        notes.push("no session with the control server; the paths it has stay".to_owned());
    }
    notes.extend(pod.health.iter().map(call::problem));
    notes
}

/// `12 pods: 10 joined, 1 pending, 1 failed`
pub(crate) fn totals<'a>(pods: impl Iterator<Item = &'a PodSummary>) -> String {
    let mut counts = [0_usize; 4];
    for pod in pods {
        counts[match standing(pod) {
            Standing::Joined => 0,
            Standing::Pending => 1,
            Standing::Failed => 2,
            Standing::Leaving => 3,
        }] += 1;
    }
    let [joined, pending, failed, leaving] = counts;
    let all = joined + pending + failed + leaving;
    let leaving = if leaving > 0 { format!(", {leaving} leaving") } else { String::new() };
    let pods = if all == 1 { "pod" } else { "pods" };
    format!("{all} {pods}: {joined} joined, {pending} pending, {failed} failed{leaving}")
}

fn table(status: &NodeStatus, look: Look) -> String {
    let mut table = Table::new(vec![
        flexible("POD", 16),
        fixed("ADDRESS"),
        fixed("STATE"),
        fixed("PATH"),
        fixed("HANDSHAKE"),
        fixed("RX/TX"),
        fixed("MEM"),
        fixed("RESTARTS"),
        fixed("AGE"),
    ]);
    for pod in &status.pods {
        let traffic =
            pod.live.as_ref().map(|live| format!("{}/{}", bytes(live.rx_bytes), bytes(live.tx_bytes)));
        table.row(vec![
            format!("{}/{}", pod.namespace, pod.pod).into(),
            address(pod).into(),
            state(pod),
            path(pod).into(),
            handshake(pod, status.unix_ms).into(),
            traffic.unwrap_or_else(|| "-".to_owned()).into(),
            pod.memory_bytes.map_or_else(|| "-".to_owned(), bytes).into(),
            pod.restarts.to_string().into(),
            since(status.unix_ms, pod.added_unix_ms).into(),
        ]);
        for note in notes(pod) {
            table.note(Cell::painted(&note, Paint::Warn));
        }
    }
    let rows = if status.pods.is_empty() { String::new() } else { table.render(look) };
    format!("{rows}{}\n", totals(status.pods.iter()))
}

fn wide(status: &NodeStatus, look: Look) -> String {
    let mut text = String::new();
    for pod in &status.pods {
        block(&mut text, pod, &status.node, status.unix_ms, look);
    }
    let _ = writeln!(text, "{}", totals(status.pods.iter()));
    text
}

/// All that is known of a pod.
pub(crate) fn block(text: &mut String, pod: &PodSummary, node: &str, now_ms: u64, look: Look) {
    let name = printable(&format!("{}/{}", pod.namespace, pod.pod));
    let head = look.paint(Paint::Head, &name);
    let painted = match standing(pod) {
        Standing::Joined => Paint::Good,
        Standing::Pending | Standing::Leaving => Paint::Warn,
        Standing::Failed => Paint::Bad,
    };
    let _ = writeln!(text, "{head}  {}", look.paint(painted, &printable(&pod.state)));
    let mut line = |what: &str, value: String| {
        if !value.is_empty() {
            text.push_str(&paragraph(&format!("  {what:<10}"), &value));
        }
    };
    let or_none = |value: String| if value.is_empty() { "none".to_owned() } else { value };
    line("node", node.to_owned());
    line("name", pod.name.clone());
    let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
    line("addresses", addresses.join(" "));
    line("tags", or_none(pod.tags.join(" ")));
    if let Some(live) = &pod.live {
        let shaken = handshake(pod, now_ms);
        let shaken = if shaken == "-" {
            "no handshake yet".to_owned()
        } else {
            format!("last handshake {shaken} ago")
        };
        line("paths", format!("{} of {} peers; {shaken}", path(pod), live.peers));
        line(
            "traffic",
            format!(
                "{} in, {} out, {} packets dropped",
                bytes(live.rx_bytes),
                bytes(live.tx_bytes),
                live.drops
            ),
        );
    }
    let session = if pod.control_connected { "up" } else { "down" };
    let home = if pod.home_derp == 0 { "none".to_owned() } else { format!("region {}", pod.home_derp) };
    line("control", format!("tailnet {}, session {session}, home relay {home}", pod.tailnet));
    let memory = pod.memory_bytes.map_or_else(|| "unknown".to_owned(), bytes);
    let pid = pod.engine_pid.map_or_else(|| "none".to_owned(), |pid| pid.to_string());
    line(
        "engine",
        format!("process {pid}, memory {memory}, restarts {}, handovers {}", pod.restarts, pod.handovers),
    );
    line("limits", or_none(pod.limits.join(" ")));
    let missed: Vec<&str> =
        pod.sandbox.iter().filter(|step| step.is_missed()).map(|s| s.step.as_str()).collect();
    line(
        "sandbox",
        if missed.is_empty() { "whole".to_owned() } else { format!("without {}", missed.join(" ")) },
    );
    let routes = if pod.accept_routes { "accepted" } else { "not accepted" };
    line("routing", format!("routes {routes}, exit node {}", pod.exit_node.as_deref().unwrap_or("none")));
    line("age", since(now_ms, pod.added_unix_ms));
    for note in notes(pod) {
        line("problem", note);
    }
    text.push('\n');
}

#[cfg(test)]
#[path = "status/tests.rs"]
pub(crate) mod tests;
