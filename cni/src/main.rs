//! The program around the library of the same name: process environment, stdin, stdout and exit code.

use std::io::Write;
use std::process::ExitCode;

use podtether_cni::{Outcome, run};

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "--version") {
        let told = writeln!(std::io::stdout(), "podtether-cni {}", env!("CARGO_PKG_VERSION"));
        return if told.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let lookup = |name: &str| std::env::var(name).ok();
    let mut stdin = std::io::stdin().lock();
    let outcome = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run(&lookup, &mut stdin)),
        Err(error) => Outcome::failed_to_start(&error),
    };
    // With the streams gone nobody is left to tell; the exit code still says it.
    let _ = std::io::stdout().write_all(outcome.stdout.as_bytes());
    let _ = std::io::stderr().write_all(outcome.stderr.as_bytes());
    if outcome.success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
