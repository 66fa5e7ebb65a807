//! A program that a supervisor takes for an engine, and that does what no sound engine does.
//!
//! It is the test binary itself: started as an engine it never gets to `main`.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::net::IpAddr;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use podtether_proto::engine::*;
use podtether_proto::{PROTO_VERSION, fds, transport};
use tarpc::context::Context;
use tarpc::server::{BaseChannel, Channel as _};

mod another_minor;

pub(crate) use another_minor::minor;

/// A target that nobody logs to.
pub(crate) const ANOTHER_MINOR: &str = "another_minor=off";

/// Runs before `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = before_main;

extern "C" fn before_main() {
    if let Ok(names) = std::env::var(fds::ENV) {
        engine(&names);
    }
}

#[derive(Clone)]
struct Standin {
    started: mpsc::Sender<StartRequest>,
    pod: Arc<OnceLock<PodRef>>,
    hostname: Arc<OnceLock<String>>,
    inputs: Arc<AtomicU64>,
}

/// What it does follows from its pod's name: `spin`, `busy`, or nothing at all. An engine of another minor it
/// is where [`ANOTHER_MINOR`] stands in its log filter, the one thing that a supervisor passes on.
fn engine(names: &str) -> ! {
    let at = names.split(':').position(|name| name == fds::RPC).unwrap();
    // SAFETY: the supervisor put the listening socket there, and nobody else in this process has it.
    let rpc = unsafe { OwnedFd::from_raw_fd(fds::FIRST_FD + i32::try_from(at).unwrap()) };
    let id = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    if let (Some(uid), Some(gid)) = (id("PODTETHER_UID"), id("PODTETHER_GID")) {
        nix::unistd::setgid(gid.into()).unwrap();
        nix::unistd::setuid(uid.into()).unwrap();
    }
    // The supervisor's socket; from here on its peers are told this process.
    nix::sys::socket::listen(&rpc, nix::sys::socket::Backlog::new(8).unwrap()).unwrap();
    let (started, starts) = mpsc::channel();
    let standin = Standin { started, pod: Arc::default(), hostname: Arc::default(), inputs: Arc::default() };
    let inputs = Arc::clone(&standin.inputs);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let listener = UnixListener::from(rpc);
        if std::env::var("PODTETHER_LOG").is_ok_and(|filter| filter.contains(ANOTHER_MINOR)) {
            runtime.block_on(another_minor::serve(listener));
        } else {
            runtime.block_on(serve(listener, standin));
        }
    });
    let request = starts.recv().unwrap();
    let work = match request.pod.name.as_str() {
        "spin" => 0,
        "busy" => 1,
        _ => loop {
            std::thread::park();
        },
    };
    loop {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_micros(20) {}
        inputs.fetch_add(work, Ordering::Relaxed);
    }
}

async fn serve(listener: UnixListener, standin: Standin) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::UnixListener::from_std(listener).unwrap();
    while let Ok((stream, _)) = listener.accept().await {
        let channel = BaseChannel::with_defaults(transport::served(stream));
        let calls = channel.execute(standin.clone().serve());
        tokio::spawn(calls.for_each(|call| async {
            tokio::spawn(call);
        }));
    }
}

impl Engine for Standin {
    async fn hello(self, _: Context) -> Hello {
        let pod_uid = self.pod.get().map(|pod| pod.uid.clone()).unwrap_or_default();
        Hello {
            version: PROTO_VERSION,
            build: "stand-in".into(),
            pid: std::process::id(),
            pod_uid,
            role: Role::InCharge,
        }
    }

    async fn start(self, _: Context, request: Box<StartRequest>) -> Result<(), String> {
        self.pod.set(request.pod.clone()).unwrap();
        self.hostname.set(request.hostname.clone()).unwrap();
        self.started.send(*request).unwrap();
        Ok(())
    }

    async fn watch(self, _: Context, after: u64) -> EngineStatus {
        if after > 0 {
            tokio::time::sleep(WATCH_MAX).await;
        }
        let node = SelfNode {
            name: format!("{}.example.ts.net", self.hostname.get().unwrap()),
            addresses: vec!["100.64.0.9/32".parse().unwrap()],
            tags: Vec::new(),
            stable_id: "n1".into(),
            key_expiry_unix_s: None,
        };
        EngineStatus {
            milestones: Default::default(),
            seq: 1,
            state: NodeState::Running,
            control_connected: true,
            control_age_ms: Some(0),
            node: Some(node),
            home_derp: 0,
            health: Vec::new(),
            routes_version: 0,
            accepted_routes: Vec::new(),
            exit_node_id: None,
            sandbox: Vec::new(),
        }
    }

    async fn set_underlay(self, _: Context, _: Underlay) {}

    async fn set_routing(self, context: Context, _: Routing) -> EngineStatus {
        self.watch(context, 0).await
    }

    async fn metrics(self, _: Context) -> EngineMetrics {
        EngineMetrics { inputs: self.inputs.load(Ordering::Relaxed), ..EngineMetrics::default() }
    }

    async fn peers(self, _: Context) -> Vec<PeerStatus> {
        Vec::new()
    }

    async fn way(self, _: Context, _: String) -> Result<Way, String> {
        Err("a stand-in".into())
    }

    async fn netcheck(self, _: Context) -> NetReport {
        NetReport::default()
    }

    async fn why(self, _: Context, _: Flow) -> Result<Verdict, String> {
        Err("a stand-in".into())
    }

    async fn set_roots(self, _: Context, _: String) -> Result<(), String> {
        Ok(())
    }

    async fn set_log(self, _: Context, _: Option<podtether_proto::log::LogFor>) {}

    async fn rename(self, _: Context, _: String) -> Result<(), String> {
        Err("a stand-in".into())
    }

    async fn ping(self, _: Context, _: String, _: PingKind) -> Result<Pong, String> {
        Err("a stand-in".into())
    }

    async fn peer_caps(self, _: Context, _: IpAddr) -> Vec<(String, Vec<String>)> {
        Vec::new()
    }

    async fn logout(self, _: Context) -> Result<(), String> {
        Ok(())
    }

    async fn prepare_handover(self, _: Context) -> Result<u8, String> {
        Err("a stand-in hands nothing over".to_owned())
    }

    async fn ready(self, _: Context, _: u64) -> u64 {
        0
    }

    async fn take_over(self, _: Context, _: bool) -> Result<TakenOver, String> {
        Err("a stand-in takes nothing over".to_owned())
    }

    async fn stop(self, _: Context) {
        std::process::exit(0);
    }
}
