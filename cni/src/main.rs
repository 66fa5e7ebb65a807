//! The CNI plugin `podtether-cni`: environment and stdin in, one JSON object out. Whatever touches the
//! pod is asked of the node's supervisor; this program needs no privilege but to open its socket.
//!
//! `run` is the whole of it; `env`, `config` and `result` read and write what the specification
//! describes, `supervisor` is the other end of the socket.

mod config;
mod env;
mod result;
mod run;
mod supervisor;

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let lookup = |name: &str| std::env::var(name).ok();
    let mut stdin = std::io::stdin().lock();
    let outcome = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run::run(&lookup, &mut stdin)),
        Err(error) => run::Outcome::failed_to_start(&error),
    };
    // With the streams gone nobody is left to tell; the exit code still says it.
    let _ = std::io::stdout().write_all(outcome.stdout.as_bytes());
    let _ = std::io::stderr().write_all(outcome.stderr.as_bytes());
    if outcome.success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
