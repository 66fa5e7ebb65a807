//! The `Engine` service on the inherited socket. It holds no logic: each call becomes a [`Command`] to
//! the driver, or reads the [`Board`].

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdListener;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use podtether_proto::engine::{
    Engine, EngineMetrics, EngineStatus, Flow, Hello, NetReport, PeerStatus, PingKind, Pong, Routing,
    StartRequest, TakenOver, Underlay, Verdict, WATCH_MARGIN, WATCH_MAX, Way,
};
use podtether_proto::log::LogFor;
use podtether_proto::{PROTO_VERSION, transport};
use tarpc::context::Context;
use tarpc::server::{BaseChannel, Channel as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::log;
use crate::refused::Refused;
use crate::status::Board;

/// Pending calls; more wait in the socket.
pub(crate) const COMMAND_QUEUE: usize = 16;
/// After an accept error (descriptors exhausted), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A call that the driver answers.
#[derive(Debug)]
pub(crate) enum Command {
    /// Answered by the loop's next turn.
    Turn(oneshot::Sender<()>),
    Start(Box<StartRequest>, oneshot::Sender<Result<(), String>>),
    SetUnderlay(Underlay),
    SetRouting(Routing, oneshot::Sender<EngineStatus>),
    Metrics(oneshot::Sender<EngineMetrics>),
    Peers(oneshot::Sender<Vec<PeerStatus>>),
    Way(String, oneshot::Sender<Result<Way, String>>),
    Netcheck(oneshot::Sender<NetReport>),
    Why(Flow, oneshot::Sender<Result<Verdict, String>>),
    SetRoots(String, oneshot::Sender<Result<(), String>>),
    Rename(String, oneshot::Sender<Result<(), String>>),
    Ping(String, PingKind, oneshot::Sender<Result<Pong, String>>),
    PeerCaps(IpAddr, oneshot::Sender<Vec<(String, Vec<String>)>>),
    Logout(oneshot::Sender<Result<(), String>>),
    PrepareHandover(oneshot::Sender<Result<u8, String>>),
    Ready(Duration, oneshot::Sender<u64>),
    TakeOver {
        alone: bool,
        answer: oneshot::Sender<Result<TakenOver, String>>,
    },
    Stop(oneshot::Sender<()>),
}

/// Listens on the socket that the supervisor bound. Called after the uid change, so that the
/// supervisor's SO_PEERCRED names this process.
pub(crate) fn listen(rpc: &OwnedFd) -> std::io::Result<()> {
    nix::sys::socket::listen(rpc, nix::sys::socket::Backlog::new(8)?)?;
    Ok(())
}

/// Serves one supervisor at a time; a newer connection replaces an older one.
pub(crate) async fn serve(
    listener: StdListener,
    supervisor_uid: u32,
    board: Board,
    commands: mpsc::Sender<Command>,
) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let service = Service { board, commands };
    let mut current = JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept on the engine's socket failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 || peer.uid() == supervisor_uid => {}
            other => {
                tracing::warn!(?other, "refused a caller that is not the supervisor");
                continue;
            }
        }
        current.abort_all();
        while current.join_next().await.is_some() {}
        current.spawn(connection(stream, service.clone()));
    }
}

async fn connection(stream: UnixStream, service: Service) {
    let requests = BaseChannel::with_defaults(transport::served(stream)).requests();
    let mut running = JoinSet::new();
    tokio::pin!(requests);
    loop {
        tokio::select! {
            request = requests.next() => match request {
                Some(Ok(request)) => { running.spawn(request.execute(service.clone().serve())); }
                Some(Err(error)) => {
                    if transport::is_malformed(&error) {
                        Refused::RpcFrame.count();
                    }
                    break;
                }
                None => break,
            },
            Some(_) = running.join_next() => {}
        }
    }
}

#[derive(Debug, Clone)]
struct Service {
    board: Board,
    commands: mpsc::Sender<Command>,
}

impl Service {
    /// Asks the driver; `None` when it is ending.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).await.ok()?;
        answered.await.ok()
    }
}

const ENDING: &str = "the engine is ending";

impl Engine for Service {
    async fn hello(self, _: Context) -> Hello {
        // An engine that is ending is not one that hangs.
        self.ask(Command::Turn).await.unwrap_or_default();
        Hello {
            version: PROTO_VERSION,
            build: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            pod_uid: self.board.pod_uid(),
            role: self.board.role(),
        }
    }

    async fn start(self, _: Context, request: Box<StartRequest>) -> Result<(), String> {
        log::begin(&request.join, request.log);
        self.ask(|answer| Command::Start(request, answer)).await.unwrap_or_else(|| Err(ENDING.to_owned()))
    }

    async fn watch(self, call: Context, after: u64) -> EngineStatus {
        let left = call.deadline.saturating_duration_since(Instant::now());
        self.board.wait(after, left.saturating_sub(WATCH_MARGIN).min(WATCH_MAX)).await
    }

    async fn set_underlay(self, _: Context, underlay: Underlay) {
        // An ending engine has no use for it.
        let _ = self.commands.send(Command::SetUnderlay(underlay)).await;
    }

    async fn set_routing(self, _: Context, routing: Routing) -> EngineStatus {
        let asked = self.ask(|answer| Command::SetRouting(routing, answer)).await;
        asked.unwrap_or_else(|| self.board.read())
    }

    async fn metrics(self, _: Context) -> EngineMetrics {
        self.ask(Command::Metrics).await.unwrap_or_default()
    }

    async fn peers(self, _: Context) -> Vec<PeerStatus> {
        self.ask(Command::Peers).await.unwrap_or_default()
    }

    async fn way(self, _: Context, peer: String) -> Result<Way, String> {
        self.ask(|answer| Command::Way(peer, answer)).await.unwrap_or_else(|| Err(ENDING.to_owned()))
    }

    async fn netcheck(self, _: Context) -> NetReport {
        self.ask(Command::Netcheck).await.unwrap_or_default()
    }

    async fn why(self, _: Context, packet: Flow) -> Result<Verdict, String> {
        self.ask(|answer| Command::Why(packet, answer)).await.unwrap_or_else(|| Err(ENDING.to_owned()))
    }

    async fn set_roots(self, _: Context, extra_roots_pem: String) -> Result<(), String> {
        let asked = self.ask(|answer| Command::SetRoots(extra_roots_pem, answer)).await;
        asked.unwrap_or_else(|| Err(ENDING.to_owned()))
    }

    async fn set_log(self, _: Context, wish: Option<LogFor>) {
        log::set(wish);
    }

    async fn rename(self, _: Context, hostname: String) -> Result<(), String> {
        let asked = self.ask(|answer| Command::Rename(hostname, answer)).await;
        asked.unwrap_or_else(|| Err(ENDING.to_owned()))
    }

    async fn ping(self, _: Context, peer: String, kind: PingKind) -> Result<Pong, String> {
        let asked = self.ask(|answer| Command::Ping(peer, kind, answer)).await;
        asked.unwrap_or_else(|| Err(ENDING.to_owned()))
    }

    async fn peer_caps(self, _: Context, peer: IpAddr) -> Vec<(String, Vec<String>)> {
        self.ask(|answer| Command::PeerCaps(peer, answer)).await.unwrap_or_default()
    }

    async fn logout(self, _: Context) -> Result<(), String> {
        self.ask(Command::Logout).await.unwrap_or_else(|| Err(ENDING.to_owned()))
    }

    async fn prepare_handover(self, _: Context) -> Result<u8, String> {
        self.ask(Command::PrepareHandover).await.unwrap_or_else(|| Err(ENDING.to_owned()))
    }

    async fn ready(self, _: Context, within_ms: u64) -> u64 {
        let within = Duration::from_millis(within_ms).min(WATCH_MAX);
        self.ask(|answer| Command::Ready(within, answer)).await.unwrap_or_default()
    }

    async fn take_over(self, _: Context, alone: bool) -> Result<TakenOver, String> {
        let asked = self.ask(|answer| Command::TakeOver { alone, answer }).await;
        asked.unwrap_or_else(|| Err(ENDING.to_owned()))
    }

    async fn stop(self, _: Context) {
        self.ask(Command::Stop).await.unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podtether_proto::engine::EngineClient;
    use tarpc::{client, context};

    #[tokio::test]
    async fn a_newer_supervisor_replaces_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("engine.sock");
        let listener = StdListener::bind(&path).unwrap();
        let (commands, mut calls) = mpsc::channel(COMMAND_QUEUE);
        let uid = nix::unistd::getuid().as_raw();
        let board = Board::new(Vec::new());
        board.set_pod_uid("pod-1");
        let server = tokio::spawn(serve(listener, uid, board, commands));
        let driver = tokio::spawn(async move {
            while let Some(call) = calls.recv().await {
                if let Command::Start(_, answer) = call {
                    answer.send(Err("no".into())).unwrap();
                }
            }
        });
        let connect = async || {
            let transport = transport::connect(&path).await.unwrap();
            EngineClient::new(client::Config::default(), transport).spawn()
        };
        let first = connect().await;
        let hello = first.hello(context::current()).await.unwrap();
        assert_eq!((hello.pid, hello.pod_uid.as_str()), (std::process::id(), "pod-1"));
        let pending = tokio::spawn(async move { first.watch(context::current(), 99).await });
        let second = connect().await;
        assert_eq!(second.watch(context::current(), 0).await.unwrap().seq, 1);
        assert!(pending.await.unwrap().is_err(), "the older connection was closed");
        server.abort();
        driver.abort();
    }

    #[tokio::test]
    async fn a_heartbeat_is_answered_by_the_loop_alone() {
        let (commands, mut calls) = mpsc::channel(COMMAND_QUEUE);
        let service = Service { board: Board::new(Vec::new()), commands };
        let beat = tokio::spawn(service.clone().hello(context::current()));
        let waits = calls.recv().await.unwrap();
        assert_eq!(service.clone().watch(context::current(), 0).await.seq, 1, "the socket answers");
        assert!(!beat.is_finished(), "the loop stands still");
        if let Command::Turn(answer) = waits {
            answer.send(()).unwrap();
        }
        assert_eq!(beat.await.unwrap().pid, std::process::id());
        let turning = tokio::spawn(async move {
            while let Some(call) = calls.recv().await {
                let Command::Turn(answer) = call else { continue };
                answer.send(()).unwrap();
            }
        });
        assert_eq!(service.clone().hello(context::current()).await.pid, std::process::id());
        turning.abort();
        let _ = turning.await;
        // An engine on its way out is not one that hangs.
        assert_eq!(service.hello(context::current()).await.pid, std::process::id());
    }
}
