//! A node in namespaces of its own: a devnet, a supervisor process, and pods made as a runtime would.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use podtether_devnet::{Devnet, DevnetConfig, OauthConfig};
use podtether_net::Netns;
use podtether_proto::engine::PodRef;
use podtether_proto::node::{AddRequest, Attached, AttachmentId, CniError, NodeClient};
use podtether_proto::transport;
use serde_json::Value;

pub const TIMEOUT: Duration = Duration::from_secs(20);

pub fn devnet(change: impl FnOnce(&mut DevnetConfig)) -> Devnet {
    let mut config = DevnetConfig {
        oauth: OauthConfig { tags: vec!["tag:k8s-pod".into()], ..OauthConfig::default() },
        ..DevnetConfig::default()
    };
    change(&mut config);
    Devnet::spawn_thread(config, || Ok(())).unwrap()
}

pub struct Rig {
    pub dir: PathBuf,
    pub config: String,
    /// Where its log goes; this process's stderr by default.
    pub stderr: Option<PathBuf>,
    /// Beside this process's own.
    pub environment: Vec<(&'static str, String)>,
    supervisor: Option<Child>,
}

impl Rig {
    /// A supervisor whose default tailnet is `devnet`, with an OAuth client.
    pub fn oauth(dir: &Path, devnet: &Devnet) -> Rig {
        let (id, secret) = devnet.oauth_client();
        std::fs::write(dir.join("id"), id).unwrap();
        std::fs::write(dir.join("secret"), secret).unwrap();
        Rig::new(dir, &Rig::table("default", dir, devnet))
    }

    pub fn table(name: &str, dir: &Path, devnet: &Devnet) -> String {
        std::fs::write(dir.join(format!("{name}-ca.pem")), devnet.ca_pem()).unwrap();
        format!(
            "[tailnet.{name}]\ncontrol_url = {:?}\ntags = [\"tag:k8s-pod\"]\nca_file = \"{dir}/{name}-ca.pem\"\n\
             [tailnet.{name}.credentials]\nkind = \"oauth\"\napi_url = {:?}\n\
             client_id_file = \"{dir}/id\"\nclient_secret_file = \"{dir}/secret\"\n",
            devnet.http_url(),
            devnet.http_url(),
            dir = dir.display(),
        )
    }

    pub fn new(dir: &Path, tailnets: &str) -> Rig {
        let config = format!(
            "{tailnets}\n[node]\nstate_dir = \"{dir}/state\"\nrun_dir = \"{dir}/run\"\n\
             http_listen = \"127.0.0.1:9465\"\ncgroup_root = \"\"\n",
            dir = dir.display()
        );
        let rig =
            Rig { dir: dir.to_owned(), config, stderr: None, environment: Vec::new(), supervisor: None };
        std::fs::create_dir_all(rig.dir.join("netns")).unwrap();
        podtether_net::netns::prepare_dir(&rig.dir.join("netns")).unwrap();
        rig
    }

    pub fn start(&mut self) {
        let path = self.dir.join("supervisor.toml");
        std::fs::write(&path, &self.config).unwrap();
        let mut command = self.command(&path);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if let Some(log) = &self.stderr {
            command.stderr(std::fs::File::create(log).unwrap());
        }
        let child = command.spawn().unwrap();
        self.supervisor = Some(child);
    }

    pub fn command(&self, config: &Path) -> Command {
        let built = || env!("CARGO_BIN_EXE_podtether-supervisor").into();
        let mut command = Command::new(std::env::var_os("PODTETHER_TEST_SUPERVISOR").unwrap_or_else(built));
        command.arg("--config").arg(config).stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    pub fn pid(&self) -> u32 {
        self.supervisor.as_ref().unwrap().id()
    }

    pub fn kill(&mut self) {
        let mut child = self.supervisor.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn terminate(&mut self) {
        let mut child = self.supervisor.take().unwrap();
        signal(child.id(), libc::SIGTERM);
        assert!(child.wait().unwrap().success());
    }

    pub async fn client(&self) -> NodeClient {
        let path = self.dir.join("run/supervisor.sock");
        let start = Instant::now();
        loop {
            match transport::connect(&path).await {
                Ok(transport) => return NodeClient::new(tarpc::client::Config::default(), transport).spawn(),
                Err(e) => assert!(start.elapsed() < TIMEOUT, "no supervisor: {e}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// A pod's namespace, pinned as a runtime pins it.
    pub async fn netns(&self, name: &str) -> Netns {
        let ns = Netns::ensure_pinned(&self.netns_path(name)).await.unwrap();
        let netlink = podtether_net::netlink::Netlink::open(&ns).await.unwrap();
        let lo = netlink.link("lo").await.unwrap().unwrap();
        netlink.set_up(lo.index).await.unwrap();
        ns
    }

    pub fn netns_path(&self, name: &str) -> PathBuf {
        self.dir.join("netns").join(name)
    }

    pub fn request(&self, name: &str) -> AddRequest {
        AddRequest {
            join: String::new(),
            attachment: attachment(name),
            netns: self.netns_path(name).display().to_string(),
            pod: PodRef { uid: format!("uid-{name}"), namespace: "default".into(), name: name.into() },
            tailnet: "default".into(),
            timeout_ms: 20_000,
            name_servers: Vec::new(),
            primary: Vec::new(),
            annotations: Default::default(),
        }
    }

    pub async fn add(&self, name: &str) -> Result<Attached, CniError> {
        let client = self.client().await;
        client.add(within(Duration::from_secs(30)), self.request(name)).await.unwrap()
    }

    pub async fn del(&self, name: &str) -> Result<(), CniError> {
        let client = self.client().await;
        client.del(within(Duration::from_secs(30)), attachment(name)).await.unwrap()
    }

    /// One pod of `/v1/pods`.
    pub fn pod(&self, name: &str) -> Value {
        let pods: Value = serde_json::from_str(&http("/v1/pods?peers=false")).unwrap();
        let found = pods.as_array().unwrap().iter().find(|p| p["pod"] == name);
        found.cloned().unwrap_or(Value::Null)
    }

    /// Waits until `/v1/pods` shows what is wanted.
    pub async fn until(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let pod = self.pod(name);
            if wanted(&pod) {
                return pod;
            }
            assert!(start.elapsed() < TIMEOUT, "{name}: not {what}: {pod}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until nothing is left: an identity's record goes after its device, which DEL need not wait for.
    pub async fn until_clean(&self, within: Duration) {
        let start = std::time::Instant::now();
        while !self.leftovers().is_empty() {
            assert!(start.elapsed() < within, "{:?}", self.leftovers());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        for dir in ["run/netns", "run/engines", "state/attachments", "state/identities"] {
            for entry in std::fs::read_dir(self.dir.join(dir)).unwrap().flatten() {
                found.push(entry.path().display().to_string());
            }
        }
        found
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(mut child) = self.supervisor.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub fn attachment(name: &str) -> AttachmentId {
    AttachmentId { network: "net".into(), container_id: format!("c-{name}"), ifname: "ts0".into() }
}

pub fn within(time: Duration) -> tarpc::context::Context {
    let mut context = tarpc::context::current();
    context.deadline = Instant::now() + time;
    context
}

pub fn signal(pid: u32, signal: i32) {
    // SAFETY: sends a signal to a process that a test of this file started.
    assert_eq!(unsafe { libc::kill(i32::try_from(pid).unwrap(), signal) }, 0);
}

/// GET from the supervisor's own listener.
pub fn http(path: &str) -> String {
    let mut stream = TcpStream::connect("127.0.0.1:9465").unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
    if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return body.split("\r\n").skip(1).step_by(2).collect();
    }
    body.to_owned()
}

pub fn v4(attached: &Attached) -> IpAddr {
    attached.addresses.iter().map(|a| a.addr()).find(IpAddr::is_ipv4).unwrap()
}

pub fn v6(attached: &Attached) -> IpAddr {
    attached.addresses.iter().map(|a| a.addr()).find(IpAddr::is_ipv6).unwrap()
}

/// Echoes UDP on `port` of every address of the namespace until the socket's thread ends with the test.
pub fn echo(ns: &Netns, port: u16) {
    for any in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)] {
        let socket = ns
            .run_blocking(move || {
                let kind = socket2::Type::DGRAM.cloexec();
                let address = SocketAddr::new(any, port);
                let s = socket2::Socket::new(socket2::Domain::for_address(address), kind, None).unwrap();
                if any.is_ipv6() {
                    s.set_only_v6(true).unwrap();
                }
                s.bind(&address.into()).unwrap();
                UdpSocket::from(s)
            })
            .unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((n, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..n], from);
            }
        });
    }
}

/// What takes longer is lost; where nothing is, nobody waits.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// Sends numbered datagrams every `pace` and tells which came back, with their round trips.
pub struct Pinger {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: std::thread::JoinHandle<Vec<Option<Duration>>>,
    pub start: Instant,
    pub pace: Duration,
}

impl Pinger {
    pub fn start(ns: &Netns, to: SocketAddr, pace: Duration) -> Pinger {
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
        let socket = ns.run_blocking(move || UdpSocket::bind((any, 0)).unwrap()).unwrap();
        socket.connect(to).unwrap();
        socket.set_nonblocking(true).unwrap();
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = std::sync::Arc::clone(&stop);
        let start = Instant::now();
        let thread = std::thread::spawn(move || {
            let mut sent: Vec<Instant> = Vec::new();
            let mut back: Vec<Option<Duration>> = Vec::new();
            let mut end = None;
            loop {
                let now = Instant::now();
                if end.is_none() && stopped.load(std::sync::atomic::Ordering::Relaxed) {
                    end = Some(now + LAST_ANSWERS);
                }
                if end.is_some_and(|at| now >= at || back.iter().all(Option::is_some)) {
                    return back;
                }
                if end.is_none() && now >= start + pace * u32::try_from(sent.len()).unwrap() {
                    let n = u32::try_from(sent.len()).unwrap();
                    sent.push(now);
                    back.push(None);
                    let _ = socket.send(&n.to_be_bytes());
                }
                let mut buffer = [0; 4];
                while socket.recv(&mut buffer).is_ok() {
                    let n = usize::try_from(u32::from_be_bytes(buffer)).unwrap();
                    back[n].get_or_insert(sent[n].elapsed());
                }
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        Pinger { stop, thread, start, pace }
    }

    pub fn finish(self) -> Vec<Option<Duration>> {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Waits until one datagram to `to` comes back.
pub fn reachable(ns: &Netns, to: SocketAddr) {
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = ns.run_blocking(move || UdpSocket::bind((any, 0)).unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let (start, mut tries) = (Instant::now(), 0);
    loop {
        // A refusal is an answer of the network's, not of `to`.
        let _ = socket.send_to(b"there?", to);
        tries += 1;
        if socket.recv(&mut [0; 8]).is_ok() {
            return;
        }
        assert!(start.elapsed() < TIMEOUT, "{to} never answered ({tries} tries)");
    }
}

/// A TCP byte each way.
pub fn tcp_echo(server: &Netns, client: &Netns, to: SocketAddr) {
    let listener = server.run_blocking(move || TcpListener::bind(to).unwrap()).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        stream.write_all(&byte).unwrap();
    });
    let mut stream = client.run_blocking(move || TcpStream::connect_timeout(&to, TIMEOUT).unwrap()).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.write_all(b"x").unwrap();
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    thread.join().unwrap();
}
