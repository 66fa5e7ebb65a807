//! `podtether-supervisor`: one per node.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use podtether_supervisor::config::{self, Config, ConfigError};
use podtether_supervisor::daemon;
use podtether_supervisor::install_cni;
use podtether_supervisor::log;
use podtether_supervisor::lookup;
use podtether_supervisor::memory;

/// Exit code for a configuration that cannot be used.
const BAD_CONFIG: u8 = 78;
/// Threads for work on disks.
const DISK_THREADS: usize = 8;
/// For as long as a supervisor lives.
const DISK_THREADS_STAY: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

fn main() -> ExitCode {
    lookup::without_modules();
    let matches = config::arguments().subcommands(install_cni::commands()).get_matches();
    log::init(matches.get_one::<String>("log-format").map(String::as_str));
    match matches.subcommand() {
        Some((install_cni::INSTALL, own)) => return install_cni::install(&install_cni::options(own)),
        Some((install_cni::UNINSTALL, own)) => return install_cni::uninstall(&install_cni::options(own)),
        _ => {}
    }
    let config = match load(&matches) {
        Ok(config) => config,
        Err(e) => {
            tracing::error!("bad configuration: {e}");
            return ExitCode::from(BAD_CONFIG);
        }
    };
    if matches.get_flag("check-config") {
        let _ = writeln!(std::io::stdout(), "{config}");
        let wrong = config.unusable_files();
        for e in &wrong {
            tracing::error!("bad configuration: {e}");
        }
        return if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(BAD_CONFIG) };
    }
    memory::one_arena();
    // One thread: engines are its children, and their parent-death signal is tied to the thread that
    // made them.
    let mut builder = tokio::runtime::Builder::new_current_thread();
    // Threads for the disk stay: on a node whose pids are used up there are no new ones to be had.
    let builder =
        builder.enable_all().max_blocking_threads(DISK_THREADS).thread_keep_alive(DISK_THREADS_STAY);
    let runtime = match builder.build() {
        Ok(runtime) => runtime,
        Err(e) => {
            tracing::error!("cannot start: {e}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(daemon::run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("cannot run: {}", sentence(&e));
            ExitCode::FAILURE
        }
    }
}

fn load(matches: &clap::ArgMatches) -> Result<Config, ConfigError> {
    Config::load(&config::inputs_from(matches)?)
}

/// An error and its causes, each told once: many errors tell their cause themselves.
fn sentence(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match &told[..] {
        "" => cause,
        text if text.contains(&cause) => told,
        text => format!("{text}: {cause}"),
    })
}
