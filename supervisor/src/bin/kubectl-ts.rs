//! `kubectl ts`: the plugin. Everything is in [`podtether_supervisor::cli::cluster`].

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use podtether_supervisor::cli::text::{Look, terminal_width};
use podtether_supervisor::cli::{Exit, Screen, cluster};

fn main() -> ExitCode {
    let matches = cluster::command().get_matches();
    let mut out = std::io::stdout();
    let terminal = out.is_terminal();
    let columns = terminal.then(|| terminal_width(&out).unwrap_or_default());
    let look = Look::of(columns, std::env::var_os("NO_COLOR").as_deref());
    let mut screen = Screen { out: &mut out, terminal, look };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = match runtime {
        Ok(runtime) => runtime.block_on(cluster::run(&matches, &mut screen)),
        Err(e) => Err(format!("cannot start: {e}")),
    };
    done.unwrap_or_else(|sentence| {
        let _ = writeln!(std::io::stderr(), "kubectl ts: {sentence}");
        Exit::Failed
    })
    .into()
}
