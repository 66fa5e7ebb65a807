//! `kubectl ts`: what `podtether` tells of one node, of all nodes of a cluster.
//!
//! It opens no port of its own: it finds the DaemonSet's pods by their label, runs `podtether … -o json` in all of them
//! at once with `kubectl exec`, through the API server, and puts the answers together. Whoever may not `create`
//! `pods/exec` in the DaemonSet's namespace may not use it.

mod across;
mod kubectl;
mod merged;
#[cfg(test)]
mod tests;

use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};
use futures_util::future::join_all;

use super::status::{self, CLEAR, NodeStatus};
use super::{
    Exit, Output, Screen, bugreport, cleanup, output, output_arg, shell, text_of, to_json, top, why,
};

pub use kubectl::Kubectl;
pub use merged::{Silent, Whole};

/// What is said where there is no pod of the DaemonSet.
const NO_REMOTES: &str = "no pod of podtether's DaemonSet was found: is it installed, and in another namespace \
                          (--podtether-namespace, --selector)?";
/// How long a node may take for its report, which tries what its network lets out.
const REPORT_WITHIN: Duration = Duration::from_secs(60);
/// Between two looks of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(2);

/// A pod of the DaemonSet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// The node it runs on.
    pub node: String,
    /// Its own name.
    pub pod: String,
    /// Why it cannot be asked; empty when it can.
    pub not_ready: String,
}

/// What a program in a pod came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ran {
    /// Its output.
    pub stdout: Vec<u8>,
    /// Its complaint.
    pub stderr: String,
    /// Its exit code.
    pub code: u8,
}

/// A cluster, as far as it is needed here.
pub trait Cluster {
    /// The DaemonSet's pods.
    ///
    /// # Errors
    /// A sentence.
    fn remotes(&self) -> impl Future<Output = Result<Vec<Remote>, String>> + Send;
    /// Runs `podtether` with these arguments in a pod of the DaemonSet.
    ///
    /// # Errors
    /// A sentence: it could not be run, or nobody knows how it ended.
    fn run(&self, pod: &Remote, arguments: &[String]) -> impl Future<Output = Result<Ran, String>> + Send;
    /// The node a pod runs on.
    ///
    /// # Errors
    /// A sentence.
    fn node_of(&self, namespace: &str, pod: &str) -> impl Future<Output = Result<String, String>> + Send;
    /// The namespace of the context.
    fn namespace(&self) -> &str;
}

/// The command line of `kubectl ts`.
#[must_use]
pub fn command() -> Command {
    let global = |id: &'static str, help: &'static str| Arg::new(id).long(id).global(true).help(help);
    let passed = |name: &'static str, about: &'static str| {
        Command::new(name).about(about).disable_help_flag(true).arg(
            Arg::new("arguments")
                .value_name("ARGUMENTS")
                .num_args(0..)
                .trailing_var_arg(true)
                .allow_hyphen_values(true)
                .help("as of `podtether`, POD as NAMESPACE/POD"),
        )
    };
    Command::new("kubectl-ts")
        .bin_name("kubectl ts")
        .about("Shows and mends what podtether does for the pods of a cluster")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .arg(global("context", "the kubeconfig's context").value_name("NAME"))
        .arg(global("kubeconfig", "the kubeconfig").value_name("FILE"))
        .arg(
            global("podtether-namespace", "the DaemonSet's namespace")
                .value_name("NAMESPACE")
                .default_value("podtether"),
        )
        .arg(
            global("selector", "label of the DaemonSet's pods")
                .value_name("LABEL")
                .default_value("app=podtether"),
        )
        .arg(
            global("timeout", "how long a node may take")
                .value_name("SECONDS")
                .default_value("10")
                .value_parser(clap::value_parser!(u16).range(1..)),
        )
        .subcommand(
            Command::new("status")
                .about("List the pods of all nodes: state, addresses, paths, and what is wrong")
                .args(status::args()),
        )
        .subcommand(
            Command::new("check")
                .about("Check every node; each failure with its fix")
                .arg(
                    Arg::new("quiet")
                        .short('q')
                        .long("quiet")
                        .action(ArgAction::SetTrue)
                        .help("failures alone"),
                )
                .arg(output_arg(false)),
        )
        .subcommand(passed(
            "explain",
            "Tell how a pod came to be what it is, and which rule gave each setting",
        ))
        .subcommand(passed("ping", "Ping a peer of a pod's tailnet from the pod's engine"))
        .subcommand(
            Command::new("why")
                .about("Tell which rule of the packet filter lets a new connection in, or that none does")
                .long_about(
                    "Tell which rule of the packet filter lets a new connection in, or that none does. Each end that \
                     is a pod of the cluster is asked on its own node.",
                )
                .args(why::args("NAMESPACE/POD, a peer's name, or an address")),
        )
        .subcommand(
            Command::new("top")
                .about("Show which pods' links use how much, on all nodes: traffic, processor, memory, drops")
                .args(status::namespace_args())
                .args(top::args()),
        )
        .subcommand(
            Command::new("cleanup")
                .about("Delete the devices of pods that are no more; one node does it for all")
                .args(cleanup::args()),
        )
        .subcommand(
            Command::new("bugreport")
                .about("Gather the reports of all nodes into one text file, without keys and secrets")
                .arg(bugreport::file_arg(
                    "where it goes, - for the standard output [default: podtether-cluster-TIME.txt]",
                )),
        )
        .subcommand(passed("netcheck", "Show what the network looks like from a pod's engine"))
        .subcommand(passed("logs", "Show what was logged of a pod lately"))
        .subcommand(passed("log-level", "Show or change how much is logged of a pod, for a while"))
        .subcommand(passed("restart", "Give a pod a new engine: no packet is lost"))
        .subcommand(passed("routing", "Show or change which routes of other nodes a pod uses"))
        .subcommand(shell::completion_command())
        .subcommand(shell::man_command())
}

/// Runs `kubectl ts` with these arguments.
///
/// # Errors
/// A sentence for stderr; the exit code is then [`Exit::Failed`].
pub async fn run(matches: &ArgMatches, screen: &mut Screen<'_>) -> Result<Exit, String> {
    let Some((name, of)) = matches.subcommand() else { return Ok(Exit::Usage) };
    match name {
        "completion" => return Ok(shell::completion(command().bin_name("kubectl-ts"), of, screen)),
        "man" => return shell::man(command().bin_name("kubectl-ts"), of, screen),
        _ => {}
    }
    let mut cluster = Kubectl::new(of).await?;
    let least = match name {
        "cleanup" => cleanup::WITHIN,
        "bugreport" => REPORT_WITHIN,
        _ => Duration::ZERO,
    };
    cluster.timeout = cluster.timeout.max(least);
    match name {
        "why" => across::why(&cluster, of, screen).await,
        "top" => across::top(&cluster, of, screen).await,
        "cleanup" => across::cleanup(&cluster, of, screen).await,
        "bugreport" => across::bugreport(&cluster, of, screen).await,
        "status" => show_status(&cluster, of, screen).await,
        "check" => check(&cluster, of, screen).await,
        _ => pass_on(&cluster, name, of, screen).await,
    }
}

/// `status` of every node.
///
/// # Errors
/// No node could be found at all.
pub async fn look(cluster: &impl Cluster) -> Result<Whole, String> {
    let remotes = cluster.remotes().await?;
    if remotes.is_empty() {
        return Err(NO_REMOTES.to_owned());
    }
    let arguments = ["status", "-o", "json"].map(str::to_owned);
    let answers = join_all(remotes.iter().map(|remote| ask(cluster, remote, &arguments))).await;
    let mut whole = Whole::default();
    for (remote, answer) in remotes.into_iter().zip(answers) {
        let read = answer.and_then(|ran| {
            let status = serde_json::from_slice::<NodeStatus>(&ran.stdout);
            status
                .map_err(|e| format!("its answer makes no sense ({e}): is podtether there of another build?"))
        });
        match read {
            Ok(status) => whole.nodes.push(NodeStatus { node: remote.node, ..status }),
            Err(why) => whole.silent.push(Silent { node: remote.node, why }),
        }
    }
    whole.nodes.sort_by(|a, b| a.node.cmp(&b.node));
    whole.silent.sort_by(|a, b| a.node.cmp(&b.node));
    Ok(whole)
}

async fn ask(cluster: &impl Cluster, remote: &Remote, arguments: &[String]) -> Result<Ran, String> {
    if !remote.not_ready.is_empty() {
        return Err(format!("its pod {} is not ready: {}", remote.pod, remote.not_ready));
    }
    let ran = cluster.run(remote, arguments).await?;
    if ran.code == 0 {
        return Ok(ran);
    }
    let said = ran.stderr.trim();
    let said = if said.is_empty() { "it said nothing" } else { said };
    Err(format!("podtether ended with {}: {said}", ran.code))
}

/// Of which namespace the pods are shown; `None` for all.
fn namespace_of(cluster: &impl Cluster, matches: &ArgMatches) -> Option<String> {
    if matches.get_flag("all-namespaces") {
        return None;
    }
    let named = text_of(matches, "namespace");
    Some(if named.is_empty() { cluster.namespace().to_owned() } else { named })
}

async fn show_status(
    cluster: &impl Cluster,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let namespace = namespace_of(cluster, matches);
    loop {
        let mut whole = look(cluster).await?;
        whole.keep(namespace.as_deref());
        let text = match output(matches) {
            Output::Json => to_json(&whole)?,
            Output::Wide => whole.wide(screen.look),
            Output::Text => whole.table(namespace.as_deref(), screen.look),
        };
        if !matches.get_flag("watch") {
            screen.print(&text);
            return Ok(whole.exit());
        }
        screen.print(&if screen.terminal { format!("{CLEAR}{text}") } else { format!("{text}\n") });
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

/// `check` of every node.
async fn check(
    cluster: &impl Cluster,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let remotes = cluster.remotes().await?;
    let arguments = ["check", "-o", "json"].map(str::to_owned);
    let run = async |remote: &Remote| {
        if !remote.not_ready.is_empty() {
            return Err(format!("its pod {} is not ready: {}", remote.pod, remote.not_ready));
        }
        let ran = cluster.run(remote, &arguments).await?;
        serde_json::from_slice::<Vec<super::check::Check>>(&ran.stdout).map_err(|e| match ran.stderr.trim() {
            "" => format!("its answer makes no sense: {e}"),
            said => said.to_owned(),
        })
    };
    let answers = join_all(remotes.iter().map(run)).await;
    let mut nodes: Vec<_> = remotes.into_iter().map(|remote| remote.node).zip(answers).collect();
    nodes.sort_by(|a, b| a.0.cmp(&b.0));
    if output(matches) == Output::Json {
        let map: std::collections::BTreeMap<_, _> =
            nodes.iter().map(|(node, answer)| (node, answer.as_ref().ok())).collect();
        screen.print(&to_json(&map)?);
    } else {
        screen.print(&merged::checks(&nodes, matches.get_flag("quiet"), screen.look));
    }
    Ok(merged::exit_of_checks(&nodes))
}

/// Runs the command where the pod is that it names.
async fn pass_on(
    cluster: &impl Cluster,
    name: &str,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let given: Vec<String> = matches.get_many::<String>("arguments").into_iter().flatten().cloned().collect();
    let Some(at) = given.iter().position(|argument| !argument.starts_with('-')) else {
        return Err(format!("name a pod: kubectl ts {name} [NAMESPACE/]POD …"));
    };
    let (namespace, pod) = match given[at].split_once('/') {
        Some((namespace, pod)) => (namespace.to_owned(), pod.to_owned()),
        None => (cluster.namespace().to_owned(), given[at].clone()),
    };
    let node = cluster.node_of(&namespace, &pod).await?;
    let remotes = cluster.remotes().await?;
    let remote = remotes.iter().find(|remote| remote.node == node);
    let remote =
        remote.ok_or_else(|| format!("pod {namespace}/{pod} runs on {node}, where no podtether runs"))?;
    if !remote.not_ready.is_empty() {
        return Err(format!("on {node}, pod {} is not ready: {}", remote.pod, remote.not_ready));
    }
    let mut arguments = vec![name.to_owned()];
    arguments.extend(given);
    arguments[at + 1] = format!("{namespace}/{pod}");
    let ran = cluster.run(remote, &arguments).await.map_err(|e| format!("on {node}: {e}"))?;
    screen.print(&String::from_utf8_lossy(&ran.stdout));
    match ran.code {
        0 => Ok(Exit::Done),
        code if code == Exit::No as u8 => Ok(Exit::No),
        code => {
            let said = ran.stderr.trim().trim_start_matches("podtether: ");
            Err(if said.is_empty() {
                format!("on {node}: podtether ended with {code}")
            } else {
                format!("on {node}: {said}")
            })
        }
    }
}
