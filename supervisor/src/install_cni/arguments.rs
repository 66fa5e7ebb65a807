//! The commands' arguments.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::conf::{Entry, OURS};
use super::{Cluster, DaemonSet, Mode, Options};

/// Name of the command that installs.
pub const INSTALL: &str = "install-cni";
/// Name of the command that takes out.
pub const UNINSTALL: &str = "uninstall-cni";

const CONF_DIR: &str = "/etc/cni/net.d";
const BIN_DIR: &str = "/opt/cni/bin";
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

fn dirs(command: Command) -> Command {
    command
        .arg(
            Arg::new("cni-conf-dir")
                .long("cni-conf-dir")
                .value_name("DIR")
                .value_parser(value_parser!(PathBuf))
                .default_value(CONF_DIR)
                .help("where the runtime reads network configurations"),
        )
        .arg(
            Arg::new("cni-bin-dir")
                .long("cni-bin-dir")
                .value_name("DIR")
                .value_parser(value_parser!(PathBuf))
                .action(ArgAction::Append)
                .default_value(BIN_DIR)
                .help("where it looks for plugins; several may be named, and those that exist count"),
        )
}

/// Both.
#[must_use]
pub fn commands() -> [Command; 2] {
    let install = dirs(Command::new(INSTALL))
        .about("Chains podtether-cni into the node's network configuration, behind the primary CNI")
        .arg(
            Arg::new("plugin")
                .long("plugin")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("podtether-cni, to be copied to the plugins [default: beside this program]"),
        )
        .arg(
            Arg::new("socket")
                .long("socket")
                .value_name("FILE")
                .default_value("/run/podtether/supervisor.sock")
                .help("where the plugin finds the supervisor"),
        )
        .arg(
            Arg::new("tailnet")
                .long("tailnet")
                .value_name("NAME")
                .default_value("default")
                .help("the [tailnet.NAME] that pods join unless told otherwise"),
        )
        .arg(
            Arg::new("timeout-seconds")
                .long("timeout-seconds")
                .value_name("SECONDS")
                .value_parser(value_parser!(u64).range(1..=600))
                .default_value("60")
                .help("how long a pod may take to join"),
        )
        .arg(
            Arg::new("failure-policy")
                .long("failure-policy")
                .value_parser(["closed", "open"])
                .default_value("closed")
                .help("open: a pod that cannot join starts without a tailnet"),
        )
        .arg(
            Arg::new("wait")
                .long("wait")
                .value_name("SECONDS")
                .value_parser(value_parser!(u64).range(0..=86400))
                .default_value("300")
                .help("how long to wait for the primary CNI's configuration"),
        )
        .arg(
            Arg::new("watch")
                .long("watch")
                .action(ArgAction::SetTrue)
                .help("stay, and put the entry back when another writer drops it"),
        )
        .arg(
            Arg::new("check")
                .long("check")
                .action(ArgAction::SetTrue)
                .conflicts_with("watch")
                .help("change nothing; succeed when all is installed"),
        );
    let install = install
        .arg(
            Arg::new("daemonset")
                .long("daemonset")
                .value_name("NAMESPACE/NAME")
                .value_parser(daemon_set)
                .requires("watch")
                .help("told to end while this is being deleted: uninstall-cni"),
        )
        .arg(
            Arg::new("remove-taint")
                .long("remove-taint")
                .value_name("KEY")
                .requires_all(["watch", "node"])
                .help("remove this taint of the node when pods can join there"),
        )
        .arg(
            Arg::new("node")
                .long("node")
                .value_name("NAME")
                .env("PODTETHER_NODE_NAME")
                .help("the node's name in Kubernetes"),
        )
        .arg(
            Arg::new("api-server")
                .long("api-server")
                .value_name("URL")
                .env("PODTETHER_NODE_API_SERVER")
                .help("Kubernetes' API server [default: what its variables name]"),
        );
    let uninstall = dirs(Command::new(UNINSTALL)).about("Takes podtether-cni out of it and off the node");
    [install, uninstall]
}

fn daemon_set(text: &str) -> Result<DaemonSet, String> {
    let is_name = |name: &str| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'))
    };
    match text.split_once('/') {
        Some((namespace, name)) if is_name(namespace) && is_name(name) => {
            Ok(DaemonSet { namespace: namespace.to_owned(), name: name.to_owned() })
        }
        _ => Err("write NAMESPACE/NAME".to_owned()),
    }
}

/// Where a pod's variables say that the API server is.
fn from_variables() -> Option<String> {
    let host = std::env::var("KUBERNETES_SERVICE_HOST").ok()?;
    let port = std::env::var("KUBERNETES_SERVICE_PORT").ok()?;
    Some(if host.contains(':') {
        format!("https://[{host}]:{port}")
    } else {
        format!("https://{host}:{port}")
    })
}

/// What a parsed command line says.
#[must_use]
pub fn options(matches: &ArgMatches) -> Options {
    let given = |id: &str| matches.try_get_one::<String>(id).ok().flatten().cloned();
    let text = |id: &str| given(id).unwrap_or_default();
    let number = |id: &str| matches.try_get_one::<u64>(id).ok().flatten().copied().unwrap_or_default();
    let flag = |id: &str| matches.try_get_one::<bool>(id).ok().flatten().copied().unwrap_or_default();
    let path = |id: &str| matches.try_get_one::<PathBuf>(id).ok().flatten().cloned();
    let beside = || {
        let own = std::env::current_exe().unwrap_or_default();
        own.with_file_name(OURS)
    };
    Options {
        conf_dir: path("cni-conf-dir").unwrap_or_else(|| CONF_DIR.into()),
        bin_dirs: matches.get_many("cni-bin-dir").into_iter().flatten().cloned().collect(),
        plugin: path("plugin").unwrap_or_else(beside),
        entry: Entry {
            socket: text("socket"),
            tailnet: text("tailnet"),
            timeout_seconds: number("timeout-seconds"),
            failure_policy: text("failure-policy"),
        },
        mode: if flag("watch") {
            Mode::Watch
        } else if flag("check") {
            Mode::Check
        } else {
            Mode::Once(Duration::from_secs(number("wait")))
        },
        cluster: given("api-server")
            .or_else(from_variables)
            .map(|url| Cluster { url: url.trim_end_matches('/').to_owned(), account: ACCOUNT.into() }),
        daemon_set: matches.try_get_one::<DaemonSet>("daemonset").ok().flatten().cloned(),
        taint: given("node").zip(given("remove-taint")),
    }
}
