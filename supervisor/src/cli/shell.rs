//! `completion` and `man`: what shells and manuals know of the programs, made from their command lines.

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Command};
use clap_complete::Shell;

use super::{Exit, Screen};

pub(super) fn completion_command() -> Command {
    Command::new("completion")
        .about("Print what a shell needs to complete this program's commands")
        .long_about(
            "Print what a shell needs to complete this program's commands. For bash: `podtether completion bash > \
             /etc/bash_completion.d/podtether`.",
        )
        .arg(
            Arg::new("shell")
                .value_name("SHELL")
                .required(true)
                .value_parser(clap::value_parser!(Shell))
                .help("which shell"),
        )
}

pub(super) fn man_command() -> Command {
    Command::new("man").about("Write the manual pages, one for each command").arg(
        Arg::new("directory")
            .value_name("DIRECTORY")
            .default_value(".")
            .value_parser(clap::value_parser!(PathBuf))
            .help("where they go, for example /usr/local/share/man/man1"),
    )
}

/// Prints the completions of `whole`.
pub(super) fn completion(mut whole: Command, matches: &ArgMatches, screen: &mut Screen<'_>) -> Exit {
    let Some(shell) = matches.get_one::<Shell>("shell").copied() else { return Exit::Usage };
    let name = whole.get_name().to_owned();
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut whole, name, &mut text);
    screen.print(&String::from_utf8_lossy(&text));
    Exit::Done
}

/// Writes the manual pages of `whole`.
pub(super) fn man(whole: Command, matches: &ArgMatches, screen: &mut Screen<'_>) -> Result<Exit, String> {
    let directory = matches.get_one::<PathBuf>("directory").cloned().unwrap_or_default();
    std::fs::create_dir_all(&directory).map_err(|e| format!("cannot make {}: {e}", directory.display()))?;
    clap_mangen::generate_to(whole.disable_help_subcommand(true), &directory)
        .map_err(|e| format!("cannot write manual pages to {}: {e}", directory.display()))?;
    screen.print(&format!("manual pages written to {}\n", directory.display()));
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{command, text::Look};

    #[test]
    fn every_command_is_completed_and_has_a_page() {
        let names: Vec<String> = command().get_subcommands().map(|c| c.get_name().to_owned()).collect();
        assert!(names.contains(&"explain".to_owned()));
        let mut out = Vec::new();
        let mut screen = Screen { out: &mut out, terminal: false, look: Look::PLAIN };
        for shell in ["bash", "zsh", "fish"] {
            let matches = completion_command().get_matches_from(["completion", shell]);
            assert_eq!(completion(command(), &matches, &mut screen), Exit::Done);
        }
        let dir = tempfile::tempdir().unwrap();
        let pages = dir.path().join("man1");
        let matches = man_command().get_matches_from(["man", pages.to_str().unwrap()]);
        assert_eq!(man(command(), &matches, &mut screen), Ok(Exit::Done));
        let text = String::from_utf8(out).unwrap();
        for name in names {
            assert!(text.matches(&name).count() >= 3, "{name}");
            let page = std::fs::read_to_string(pages.join(format!("podtether-{name}.1"))).unwrap();
            assert!(page.contains(".SH SYNOPSIS"), "{page}");
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }
}
