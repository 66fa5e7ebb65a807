//! `podtether`: what a person who runs a node asks of podtether. Everything is in [`podtether_supervisor::cli`].

use std::process::ExitCode;

use podtether_supervisor::{cli, lookup};

fn main() -> ExitCode {
    lookup::without_modules();
    let matches = cli::command().get_matches();
    cli::program("podtether", async |screen| cli::run(&matches, screen).await)
}
