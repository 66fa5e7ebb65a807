//! A supervisor that answers by a script and remembers what it was asked. It runs on a thread of its own
//! behind a real socket, for the plugin's function and its binary alike.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use futures_util::StreamExt;
use podtether_proto::engine::{Flow, NetReport, PeerStatus, PingKind, Pong, Verdict, Way};
use podtether_proto::node::{
    AddRequest, Attached, AttachedRoute, AttachmentId, CheckRequest, Choice, Cleanup, CniError, Explained,
    GcRequest, LogLine, LogWish, Node, PodLog, PodRouting, PodSelector, PodSummary, Renewal, Renewed,
    Routing, Version, code,
};
use podtether_proto::{PROTO_VERSION, transport};
use serde_json::{Value, json};
use tarpc::context::Context;
use tarpc::server::{BaseChannel, Channel};
use tokio::net::UnixListener;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;

/// Namespace path of the tests' pod; nothing opens it.
pub(crate) const NETNS: &str = "/var/run/netns/cni-1";

/// What the supervisor was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Asked {
    Add(AddRequest),
    Del(AttachmentId),
    Check(CheckRequest),
    Gc(GcRequest),
}

/// How the supervisor takes its calls.
#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub(crate) version: Version,
    pub(crate) add: Result<Attached, CniError>,
    pub(crate) others: Result<(), CniError>,
    /// Never answers `status`.
    pub(crate) silent: bool,
    /// Never answers anything else.
    pub(crate) stuck: bool,
    /// Closes the connection in place of an answer to anything but `status`.
    pub(crate) breaks: bool,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            version: PROTO_VERSION,
            add: Ok(attached()),
            others: Ok(()),
            silent: false,
            stuck: false,
            breaks: false,
        }
    }
}

/// The running supervisor; it ends when dropped.
pub(crate) struct Fake {
    pub(crate) socket: PathBuf,
    asked: Arc<Mutex<Vec<Asked>>>,
    misread: Arc<Mutex<Vec<CniError>>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Fake {
    pub(crate) fn start(script: Script) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("supervisor.sock");
        let asked = Arc::default();
        let (stop, stopped) = oneshot::channel();
        let misread = Arc::default();
        let service = Service {
            script,
            asked: Arc::clone(&asked),
            misread: Arc::clone(&misread),
            hang_up: Arc::default(),
        };
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = UnixListener::from_std(listener).unwrap();
                tokio::select! {
                    () = service.accept(listener) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { socket, asked, misread, stop: Some(stop), thread: Some(thread), _dir: dir }
    }

    /// Codes of what the plugin could not use.
    pub(crate) fn misread(&self) -> Vec<u32> {
        self.misread.lock().unwrap().iter().map(|error| error.code).collect()
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Clone)]
struct Service {
    script: Script,
    asked: Arc<Mutex<Vec<Asked>>>,
    misread: Arc<Mutex<Vec<CniError>>>,
    hang_up: Arc<Notify>,
}

impl Service {
    async fn accept(self, listener: UnixListener) {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = self.clone();
            connections.spawn(async move {
                let hang_up = Arc::clone(&service.hang_up);
                let mut requests =
                    Box::pin(BaseChannel::with_defaults(transport::served(stream)).execute(service.serve()));
                let mut running = JoinSet::new();
                loop {
                    tokio::select! {
                        () = hang_up.notified() => return,
                        request = requests.next() => match request {
                            Some(request) => { running.spawn(request); }
                            None => return,
                        },
                    }
                }
            });
        }
    }

    async fn note(&self, asked: Asked) {
        self.asked.lock().unwrap().push(asked);
        if self.script.breaks {
            self.hang_up.notify_one();
        }
        if self.script.stuck || self.script.breaks {
            std::future::pending().await
        }
    }
}

impl Node for Service {
    async fn add(self, _: Context, request: AddRequest) -> Result<Attached, CniError> {
        self.note(Asked::Add(request)).await;
        self.script.add
    }

    async fn del(self, _: Context, request: AttachmentId) -> Result<(), CniError> {
        self.note(Asked::Del(request)).await;
        self.script.others
    }

    async fn check(self, _: Context, request: CheckRequest) -> Result<(), CniError> {
        self.note(Asked::Check(request)).await;
        self.script.others
    }

    async fn gc(self, _: Context, request: GcRequest) -> Result<(), CniError> {
        self.note(Asked::Gc(request)).await;
        self.script.others
    }

    async fn set_routing(self, _: Context, pod: PodSelector, _: Routing) -> Result<PodRouting, CniError> {
        self.routing(tarpc::context::current(), pod).await
    }

    async fn choice(self, _: Context, _: PodSelector) -> Result<Choice, CniError> {
        unreachable!("the plugin does not ask")
    }

    async fn cleanup(self, _: Context, _: bool) -> Result<Cleanup, CniError> {
        unreachable!("the plugin does not ask")
    }

    async fn routing(self, _: Context, pod: PodSelector) -> Result<PodRouting, CniError> {
        let msg = format!("the plugin asks nothing about routes: {pod:?}");
        Err(CniError { code: code::IO, msg, details: String::new() })
    }

    async fn pods(self, _: Context, _: u32, _: bool) -> Vec<PodSummary> {
        Vec::new()
    }

    async fn log_level(self, _: Context, _: PodSelector, _: LogWish) -> Result<PodLog, CniError> {
        Err(no_pods())
    }

    async fn ping(self, _: Context, _: PodSelector, _: String, _: PingKind) -> Result<Pong, CniError> {
        Err(no_pods())
    }

    async fn explain(self, _: Context, _: PodSelector) -> Result<Explained, CniError> {
        Err(no_pods())
    }

    async fn peers(self, _: Context, _: PodSelector, _: u32) -> Result<Vec<PeerStatus>, CniError> {
        Err(no_pods())
    }

    async fn way(self, _: Context, _: PodSelector, _: String) -> Result<Way, CniError> {
        Err(no_pods())
    }

    async fn why(self, _: Context, _: PodSelector, _: Flow) -> Result<Verdict, CniError> {
        Err(no_pods())
    }

    async fn netcheck(self, _: Context, _: PodSelector) -> Result<NetReport, CniError> {
        Err(no_pods())
    }

    async fn logs(self, _: Context, _: PodSelector, _: u64) -> Vec<LogLine> {
        Vec::new()
    }

    async fn renew(self, _: Context, _: PodSelector, _: Renewal) -> Result<Renewed, CniError> {
        Err(no_pods())
    }

    async fn misread(self, _: Context, error: CniError) {
        self.misread.lock().unwrap().push(error);
    }

    async fn status(self, _: Context) -> Version {
        if self.script.silent {
            std::future::pending().await
        }
        self.script.version
    }
}

fn no_pods() -> CniError {
    CniError { code: code::UNKNOWN_CONTAINER, msg: "no pods here".into(), details: String::new() }
}

/// What a pod gets.
pub(crate) fn attached() -> Attached {
    Attached {
        ifname: "ts0".into(),
        mac: "02:00:00:00:00:01".into(),
        mtu: 1280,
        addresses: vec!["100.64.0.1/32".parse().unwrap(), "fd7a:115c:a1e0::1/128".parse().unwrap()],
        routes: vec![AttachedRoute {
            dst: "100.64.0.0/10".parse().unwrap(),
            gw: Some("169.254.1.1".parse().unwrap()),
            table: None,
        }],
    }
}

/// Which attachment the tests' pod is.
pub(crate) fn attachment() -> AttachmentId {
    AttachmentId { network: "pods".into(), container_id: "0cff".into(), ifname: "ts0".into() }
}

/// The environment containerd gives.
pub(crate) fn environment(verb: &str) -> Vec<(&'static str, String)> {
    let args = "K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=0cff;K8S_POD_UID=u-1;IgnoreUnknown=1;\
                K8S_POD_NAMESPACE=shop";
    let mut variables = vec![("CNI_COMMAND", verb.to_owned())];
    if matches!(verb, "ADD" | "DEL" | "CHECK") {
        variables.extend([
            ("CNI_CONTAINERID", "0cff".to_owned()),
            ("CNI_NETNS", NETNS.to_owned()),
            ("CNI_IFNAME", "eth0".to_owned()),
            ("CNI_ARGS", args.to_owned()),
            ("CNI_PATH", "/opt/cni/bin".to_owned()),
        ]);
    }
    variables
}

/// What the primary plugin made.
pub(crate) fn primary(version: &str) -> Value {
    let mut ip = json!({"address": "10.244.0.2/24", "gateway": "10.244.0.1", "interface": 1});
    if version <= "0.4.0" {
        ip["version"] = "4".into();
    }
    json!({
        "cniVersion": version, "dns": {},
        "interfaces": [{"name": "cni0", "mac": "82:68:5d:db:fd:b0"},
                       {"name": "eth0", "mac": "46:10:34:89:39:48", "sandbox": NETNS}],
        "ips": [ip],
        "routes": [{"dst": "0.0.0.0/0"}],
    })
}

/// What ADD makes of [`primary`] and [`attached`].
pub(crate) fn joined(version: &str) -> Value {
    let mut result = primary(version);
    let mut link = json!({"name": "ts0", "mac": "02:00:00:00:00:01", "sandbox": NETNS});
    if version == "1.1.0" {
        link["mtu"] = 1280.into();
    }
    let ip = |address: &str, family: &str| {
        let mut ip = json!({"address": address, "interface": 2});
        if version <= "0.4.0" {
            ip["version"] = family.into();
        }
        ip
    };
    let push = |list: &mut Value, item| list.as_array_mut().unwrap().push(item);
    push(&mut result["interfaces"], link);
    push(&mut result["ips"], ip("100.64.0.1/32", "4"));
    push(&mut result["ips"], ip("fd7a:115c:a1e0::1/128", "6"));
    push(&mut result["routes"], json!({"dst": "100.64.0.0/10", "gw": "169.254.1.1"}));
    result
}

/// A network configuration as the runtime derives it for `verb`.
pub(crate) fn config(verb: &str, version: &str, socket: &std::path::Path) -> Value {
    let mut config = json!({
        "cniVersion": version, "name": "pods", "type": "podtether-cni", "socket": socket,
        "capabilities": {"io.kubernetes.cri.pod-annotations": true},
    });
    match verb {
        "ADD" => {
            config["prevResult"] = primary(version);
            config["runtimeConfig"] =
                json!({"io.kubernetes.cri.pod-annotations": {"tailscale.com/tags": "tag:web"}});
        }
        "DEL" | "CHECK" => config["prevResult"] = joined(version),
        "GC" => {
            config["cni.dev/valid-attachments"] = json!([{"containerID": "0cff", "ifname": "eth0"}]);
        }
        _ => {}
    }
    config
}
