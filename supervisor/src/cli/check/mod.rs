//! `check`: whether this node can do what podtether needs, and does it. Each failure says how to mend it.

mod conflist;
mod node;
mod ranges;
mod running;
mod tailnet;

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde::{Deserialize, Serialize};

use super::text::{Look, Paint, WIDTH, printable, wrap};
use super::{Exit, Output, Screen, output, output_arg, to_json};
use crate::config::{self, Config, DEFAULT_PATH};

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Grade {
    Ok,
    /// It works, but not as well as it could, or not for everybody.
    Warn,
    Fail,
    /// It could not be tried.
    Skip,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Check {
    pub(super) group: String,
    pub(super) grade: Grade,
    /// What was found.
    pub(super) what: String,
    /// What to do, in a sentence; empty when nothing.
    pub(super) fix: String,
}

/// What one check found, before it is known in which group it stands.
pub(super) struct Found(pub(super) Grade, pub(super) String, pub(super) String);

impl Found {
    pub(super) fn ok(what: impl Into<String>) -> Found {
        Found(Grade::Ok, what.into(), String::new())
    }

    pub(super) fn warn(what: impl Into<String>, fix: impl Into<String>) -> Found {
        Found(Grade::Warn, what.into(), fix.into())
    }

    pub(super) fn fail(what: impl Into<String>, fix: impl Into<String>) -> Found {
        Found(Grade::Fail, what.into(), fix.into())
    }

    pub(super) fn skip(what: impl Into<String>, fix: impl Into<String>) -> Found {
        Found(Grade::Skip, what.into(), fix.into())
    }
}

pub(super) fn command() -> Command {
    with_places(
        Command::new("check")
            .about(
                "Check that this node has what podtether needs and that it works; each failure with its fix",
            )
            .arg(Arg::new("pre").long("pre").action(ArgAction::SetTrue).help(
                "before the installation: the node, the configuration and the tailnet, not what is running",
            ))
            .arg(output_arg(false)),
    )
}

/// The arguments that say where things are, for [`run`].
pub(super) fn with_places(command: Command) -> Command {
    let path = |id: &'static str, default: &'static str, help: &'static str| {
        Arg::new(id)
            .long(id)
            .value_name("PATH")
            .default_value(default)
            .value_parser(clap::value_parser!(PathBuf))
            .help(help)
    };
    command
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .env("PODTETHER_CONFIG")
                .help(format!("the supervisor's configuration [default: {DEFAULT_PATH}]")),
        )
        .arg(
            Arg::new("set")
                .long("set")
                .value_name("KEY=VALUE")
                .action(ArgAction::Append)
                .help("any key of it by its full name"),
        )
        .arg(path("cni-conf-dir", "/etc/cni/net.d", "where the runtime's network configurations are"))
        .arg(path("cni-bin-dir", "/opt/cni/bin", "where the runtime's CNI plugins are"))
        .arg(
            Arg::new("stun")
                .long("stun")
                .value_name("HOST:PORT")
                .help("a STUN server to try UDP with, where no engine has measured yet"),
        )
}

pub(super) async fn run(
    socket: &std::path::Path,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    // `bugreport` has neither.
    let flag = |id: &str| matches.try_get_one::<bool>(id).ok().flatten().copied().unwrap_or(false);
    let pre = flag("pre");
    let path = |id: &str| matches.get_one::<PathBuf>(id).cloned().unwrap_or_default();
    let json = matches.try_contains_id("output").unwrap_or(false) && output(matches) == Output::Json;
    let mut checks = Checks { screen, checks: Vec::new(), json };
    checks.group("node", node::all());
    let loaded = config::inputs_from(matches).and_then(|inputs| Config::load(&inputs));
    let config = loaded.as_ref().ok();
    checks.group("ranges", ranges::all(config, &path("cni-conf-dir")));
    checks.group("cni", conflist::all(&path("cni-conf-dir"), &path("cni-bin-dir"), pre));
    checks.group(
        "configuration",
        match &loaded {
            Ok(config) => configuration(config),
            Err(e) => vec![Found::fail(
                e.to_string(),
                "correct that key; `podtether-supervisor --check-config` tries it",
            )],
        },
    );
    if let Some(config) = config {
        for (name, of) in &config.tailnets {
            let found = tailnet::all(name, of).await;
            checks.group(&format!("tailnet {name}"), found);
        }
    }
    let stun = matches.get_one::<String>("stun").map(String::as_str);
    if pre {
        checks.group("udp", vec![tailnet::udp(stun).await]);
    } else {
        let (udp, found) = running::all(socket).await;
        checks.group(
            "udp",
            vec![match (udp, stun) {
                (Some(measured), None) => measured,
                _ => tailnet::udp(stun).await,
            }],
        );
        checks.group("supervisor", found);
    }
    checks.finish()
}

fn configuration(config: &Config) -> Vec<Found> {
    let names: Vec<&str> = config.tailnets.keys().map(String::as_str).collect();
    let mut found = vec![Found::ok(format!("it loads; tailnets: {}", names.join(", ")))];
    for wrong in config.unusable_files() {
        found.push(Found::fail(wrong.to_string(), "put the file there, readable by root alone (0600)"));
    }
    let engine = config.engine_path();
    found.push(if engine.is_file() {
        Found::ok(format!("engine {}", engine.display()))
    } else {
        Found::fail(
            format!("no engine at {}", engine.display()),
            "put podtether-engine beside podtether-supervisor, or name it in node.engine_path",
        )
    });
    found
}

/// What was found so far; text is shown as it comes.
struct Checks<'a, 'b> {
    screen: &'a mut Screen<'b>,
    checks: Vec<Check>,
    json: bool,
}

impl Checks<'_, '_> {
    fn group(&mut self, group: &str, found: Vec<Found>) {
        let checks: Vec<Check> = found
            .into_iter()
            .map(|Found(grade, what, fix)| Check { group: group.to_owned(), grade, what, fix })
            .collect();
        if !self.json {
            let first = if self.checks.is_empty() { "" } else { "\n" };
            let text = text(group, &checks, self.screen.look);
            self.screen.print(&format!("{first}{text}"));
        }
        self.checks.extend(checks);
    }

    fn finish(self) -> Result<Exit, String> {
        let count = |grade| self.checks.iter().filter(|check| check.grade == grade).count();
        let failed = count(Grade::Fail);
        if self.json {
            self.screen.print(&to_json(&self.checks)?);
        } else {
            let line = format!(
                "\n{} ok, {} to look at, {failed} failed, {} not tried\n",
                count(Grade::Ok),
                count(Grade::Warn),
                count(Grade::Skip)
            );
            self.screen.print(&line);
        }
        Ok(if failed == 0 { Exit::Done } else { Exit::No })
    }
}

pub(super) fn text(group: &str, checks: &[Check], look: Look) -> String {
    let mut text = format!("{}\n", look.paint(Paint::Head, &printable(group)));
    for check in checks {
        let (mark, paint) = match check.grade {
            Grade::Ok => ("√", Paint::Good),
            Grade::Warn => ("‼", Paint::Warn),
            Grade::Fail => ("×", Paint::Bad),
            Grade::Skip => ("-", Paint::Plain),
        };
        for (at, part) in wrap(&check.what, WIDTH - 2).iter().enumerate() {
            let _ = match at {
                0 => writeln!(text, "{} {part}", look.paint(paint, mark)),
                _ => writeln!(text, "  {part}"),
            };
        }
        for part in wrap(&check.fix, WIDTH - 4) {
            let _ = writeln!(text, "    {part}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_has_its_fix_below() {
        let check = |grade, what: &str, fix: &str| Check {
            group: "node".into(),
            grade,
            what: what.into(),
            fix: fix.into(),
        };
        let checks = [
            check(Grade::Ok, "Linux 6.12.0", ""),
            check(Grade::Fail, "/dev/net/tun is missing", "load the module: modprobe tun"),
            check(Grade::Skip, &"word ".repeat(40), "more words"),
        ];
        let text = text("node", &checks, Look::PLAIN);
        assert!(
            text.starts_with(
                "node\n√ Linux 6.12.0\n× /dev/net/tun is missing\n    load the module: modprobe tun\n- word"
            ),
            "{text}"
        );
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
    }

    #[test]
    fn one_failure_makes_the_exit_code() {
        for (grade, exit) in [
            (Grade::Ok, Exit::Done),
            (Grade::Warn, Exit::Done),
            (Grade::Skip, Exit::Done),
            (Grade::Fail, Exit::No),
        ] {
            let mut out = Vec::new();
            let mut screen = Screen { out: &mut out, terminal: false, look: Look::PLAIN };
            let mut checks = Checks { screen: &mut screen, checks: Vec::new(), json: false };
            checks.group("a", vec![Found::ok("x"), Found(grade, "y".into(), "z".into())]);
            assert_eq!(checks.finish(), Ok(exit));
            assert!(String::from_utf8(out).unwrap().ends_with(" not tried\n"));
        }
    }
}
