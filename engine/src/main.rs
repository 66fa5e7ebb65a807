//! One pod's tailnet node: a sandboxed process that moves bytes between the descriptors its supervisor
//! gave it and `podtether-core`.
//!
//! It opens nothing but sockets to the control server, DERP servers and name servers. Everything
//! else comes through the descriptors that `PODTETHER_FDS` names and the RPC on one of them.

mod confine;
mod control;
mod derp;
mod dial;
mod driver;
mod fds;
mod http1;
mod intake;
mod log;
mod names;
mod proxy;
mod reason;
mod refused;
mod resolve;
mod rpc;
mod snapshot_file;
mod status;
mod tls;

use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::time::Duration;

use podtether_proto::exit::EngineExit;
use podtether_proto::fds as descriptor;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use confine::Ids;
use fds::Descriptors;
use reason::{Ending, ReasonFile};

/// So that the answer to the call that ends the engine leaves before the process does.
const LAST_ANSWER: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "--version") {
        let told = writeln!(std::io::stdout(), "podtether-engine {}", env!("CARGO_PKG_VERSION"));
        return if told.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let supervisor_uid = nix::unistd::getuid().as_raw();
    let named = std::env::var(descriptor::ENV).ok();
    // SAFETY: first thing in the process; nothing has opened a descriptor yet.
    let descriptors = unsafe { Descriptors::take(named.as_deref()) };
    log::init();
    // Executed from memory, it would be called by the number of a descriptor. A name changes nothing else.
    let _ = nix::sys::prctl::set_name(c"podtether-engine");
    std::panic::set_hook(Box::new(|panic| {
        // A task that is gone would leave a half-dead engine; a crash is handled.
        tracing::error!(%panic, "panic");
        std::process::abort();
    }));
    let mut descriptors = match descriptors {
        Ok(descriptors) => descriptors,
        Err(error) => {
            return ReasonFile::new(None).finish(&Ending::new(EngineExit::BadConfig, error.to_string()));
        }
    };
    let reason = ReasonFile::new(descriptors.reason.take());
    let nowhere = descriptors.nowhere.take();
    let ending = match confine::confine(ids(), nowhere, || rpc::listen(&descriptors.rpc)) {
        Ok(report) => run(descriptors, supervisor_uid, report).unwrap_or_else(|error| {
            Ending::new(EngineExit::BadConfig, format!("the engine cannot start: {error:#}"))
        }),
        Err(error) => Ending::new(EngineExit::Sandbox, format!("the engine cannot confine itself: {error}")),
    };
    reason.finish(&ending)
}

/// Ids that the supervisor found mapped, and how strict it is.
fn ids() -> Ids {
    let id = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let require_all = std::env::var_os("PODTETHER_REQUIRE_SANDBOX").is_some();
    Ids { uid: id("PODTETHER_UID"), gid: id("PODTETHER_GID"), require_all }
}

fn run(descriptors: Descriptors, supervisor_uid: u32, confined: confine::Report) -> anyhow::Result<Ending> {
    let Descriptors { rpc, tun, udp4, udp6, names, snapshot, heir, partner, reason: _, nowhere: _ } =
        descriptors;
    let listener = UnixListener::from(rpc);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ending = runtime.block_on(async {
        let board = status::Board::new(confined.0);
        let (calls, commands) = mpsc::channel(rpc::COMMAND_QUEUE);
        let server = tokio::spawn(rpc::serve(listener, supervisor_uid, board.clone(), calls.clone()));
        let mut terminate = signal(SignalKind::terminate())?;
        let stopper = tokio::spawn(async move {
            while terminate.recv().await.is_some() {
                let (answer, _) = tokio::sync::oneshot::channel();
                // A driver that is gone needs no telling.
                let _ = calls.send(rpc::Command::Stop(answer)).await;
            }
        });
        let link = driver::Link { tun, udp4, udp6, names, snapshot, heir, partner, supervisor_uid };
        let ending = driver::run(link, board, commands).await;
        if ending.exit == EngineExit::Stopped {
            tokio::time::sleep(LAST_ANSWER).await;
        }
        server.abort();
        stopper.abort();
        anyhow::Ok(ending)
    })?;
    Ok(ending)
}
