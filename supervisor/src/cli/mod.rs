//! `podtether`: what a person who runs a node asks its supervisor, and `kubectl ts`: the same of all nodes.
//!
//! Every command gathers facts with calls and makes text of them with pure functions. [`Exit`] has the
//! programs' exit codes, `docs/cli.md` what each command shows.

pub mod bugreport;
mod call;
mod check;
mod cleanup;
pub mod cluster;
mod explain;
mod log_level;
mod logs;
mod netcheck;
mod ping;
mod restart;
mod routing;
mod shell;
pub mod status;
pub mod text;
mod top;
mod why;

use std::io::{IsTerminal as _, Write};
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde::Serialize;

use text::Look;

const DEFAULT_SOCKET: &str = "/run/podtether/supervisor.sock";

/// How the programs end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Not done; why stands on stderr.
    Failed = 1,
    /// The command line makes no sense (clap's own code).
    Usage = 2,
    /// Some nodes did not answer; what the others said is shown.
    Partly = 3,
    /// The question was answered, and the answer is no: a check failed, a packet is dropped.
    No = 4,
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Where output goes.
pub struct Screen<'a> {
    /// Text and JSON.
    pub out: &'a mut dyn Write,
    /// Whether a person watches it come.
    pub terminal: bool,
    /// How it looks.
    pub look: Look,
}

impl Screen<'_> {
    /// Prints. Who has closed the other end has seen enough.
    pub(crate) fn print(&mut self, text: &str) {
        let _ = self.out.write_all(text.as_bytes());
        let _ = self.out.flush();
    }
}

/// The rest of a program's `main`: a screen for `run`, and its sentence on stderr where it has one.
pub fn program(
    name: &str,
    run: impl AsyncFnOnce(&mut Screen<'_>) -> Result<Exit, String>,
) -> std::process::ExitCode {
    let mut out = std::io::stdout();
    let terminal = out.is_terminal();
    let columns = terminal.then(|| text::terminal_width(&out).unwrap_or_default());
    let look = Look::of(columns, std::env::var_os("NO_COLOR").as_deref());
    let mut screen = Screen { out: &mut out, terminal, look };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = match runtime {
        Ok(runtime) => runtime.block_on(run(&mut screen)),
        Err(e) => Err(format!("cannot start: {e}")),
    };
    let exit = done.unwrap_or_else(|sentence| {
        let _ = writeln!(std::io::stderr(), "{name}: {sentence}");
        Exit::Failed
    });
    exit.into()
}

/// How output is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    Text,
    Wide,
    Json,
}

/// `-o`.
pub(crate) fn output_arg(wide: bool) -> Arg {
    let values = if wide { vec!["wide", "json"] } else { vec!["json"] };
    Arg::new("output").short('o').long("output").value_name("FORMAT").value_parser(values).help(if wide {
        "wide: all that is known of each; json: for programs"
    } else {
        "json: for programs"
    })
}

pub(crate) fn output(matches: &ArgMatches) -> Output {
    match matches.get_one::<String>("output").map(String::as_str) {
        Some("wide") => Output::Wide,
        Some("json") => Output::Json,
        _ => Output::Text,
    }
}

pub(crate) fn to_json(value: &impl Serialize) -> Result<String, String> {
    serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(|e| e.to_string())
}

/// `-o`, of commands that print text or JSON.
fn json_arg() -> Arg {
    output_arg(false)
}

/// Prints as JSON, or as `text` has it.
fn show<T: Serialize>(
    value: &T,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
    text: impl FnOnce(&T) -> String,
) -> Result<Exit, String> {
    screen.print(&match output(matches) {
        Output::Json => to_json(value)?,
        Output::Text | Output::Wide => text(value),
    });
    Ok(Exit::Done)
}

/// A command about one pod, that prints text or JSON.
fn of_pod(name: &'static str, about: &'static str) -> Command {
    Command::new(name).about(about).arg(pod_arg()).arg(json_arg())
}

fn pod_arg() -> Arg {
    Arg::new("pod").value_name("[NAMESPACE/]POD").required(true).help("a pod of this node")
}

fn text_of(matches: &ArgMatches, id: &str) -> String {
    matches.get_one::<String>(id).cloned().unwrap_or_default()
}

/// The command line of `podtether`.
#[must_use]
pub fn command() -> Command {
    Command::new("podtether")
        .about("Shows and mends what podtether does for the pods of this node")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .arg(
            Arg::new("socket")
                .long("socket")
                .global(true)
                .value_name("PATH")
                .env("PODTETHER_SOCKET")
                .default_value(DEFAULT_SOCKET)
                .value_parser(clap::value_parser!(PathBuf))
                .action(ArgAction::Set)
                .help("the running supervisor's socket, supervisor.sock in node.run_dir"),
        )
        .subcommands([
            status::command(),
            explain::command(),
            ping::command(),
            why::command(),
            netcheck::command(),
            routing::command(),
            restart::command(),
            cleanup::command(),
            top::command(),
            logs::command(),
            log_level::command(),
            check::command(),
            bugreport::command(),
            shell::completion_command(),
            shell::man_command(),
        ])
}

/// Runs `podtether` with these arguments.
///
/// # Errors
/// A sentence for stderr; the exit code is then [`Exit::Failed`].
pub async fn run(matches: &ArgMatches, screen: &mut Screen<'_>) -> Result<Exit, String> {
    let Some((name, matches)) = matches.subcommand() else { return Ok(Exit::Usage) };
    let socket = matches.get_one::<PathBuf>("socket").cloned().unwrap_or_default();
    match name {
        "check" => return check::run(&socket, matches, screen).await,
        "bugreport" => return bugreport::run(&socket, matches, screen).await,
        "completion" => return Ok(shell::completion(command(), matches, screen)),
        "man" => return shell::man(command(), matches, screen),
        _ => {}
    }
    let client = call::connect(&socket).await?;
    match name {
        "status" => status::run(&client, matches, screen).await,
        "explain" => explain::run(&client, matches, screen).await,
        "why" => why::run(&client, matches, screen).await,
        "netcheck" => netcheck::run(&client, matches, screen).await,
        "cleanup" => cleanup::run(&client, matches, screen).await,
        "top" => top::run(&client, matches, screen).await,
        "logs" => logs::run(&client, matches, screen).await,
        "log-level" => log_level::run(&client, matches, screen).await,
        "ping" => ping::run(&client, matches, screen).await,
        "routing" => routing::run(&client, matches, screen).await,
        "restart" => restart::run(&client, matches, screen).await,
        other => Err(format!("there is no command {other}")),
    }
}
