//! `kubectl ts`: the plugin. Everything is in [`podtether_supervisor::cli::cluster`].

use std::process::ExitCode;

use podtether_supervisor::cli::{self, cluster};

fn main() -> ExitCode {
    let matches = cluster::command().get_matches();
    cli::program("kubectl ts", async |screen| cluster::run(&matches, screen).await)
}
