//! Stock `tailscaled` against the devnet: the two must not share a mistake of ours.
//!
//! Runs when `tailscaled` and `tailscale` are on PATH, in namespaces of its own with userspace
//! networking, so that neither the host's resolver nor its routes are touched.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says when it skips"
)]

mod commands;
mod membership;
mod people;
mod routes;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use podtether_devnet::{AuthKeyInfo, Devnet, DevnetConfig, RegionConfig};
use podtether_net::netlink::{Netlink, VethEnd};
use podtether_net::netns::Netns;
use podtether_net::testing::{block_on, in_namespaces};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};

const ADDRESS: &str = "192.168.77.1";
const PATIENCE: Duration = Duration::from_secs(30);

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// Runs `body` in namespaces of its own, or says that it skips.
fn stock_test(name: &str, body: impl AsyncFnOnce(&Stock)) {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    in_namespaces(name, |dir| {
        let stock = Stock { daemon, client, dir: dir.to_owned() };
        block_on(Box::pin(async { body(&stock).await }));
    });
}

struct Stock {
    daemon: PathBuf,
    client: PathBuf,
    dir: PathBuf,
}

/// A running stock node.
struct Node<'a> {
    stock: &'a Stock,
    ns: Netns,
    dir: PathBuf,
    _daemon: Child,
}

fn command_in(ns: &Netns, program: &Path) -> Command {
    let ns = ns.clone();
    let mut command = Command::new(program);
    // SAFETY: entering a namespace is one system call on a descriptor that is open before the fork.
    unsafe {
        command.pre_exec(move || ns.enter().map_err(std::io::Error::other));
    }
    command
}

impl Stock {
    async fn start(&self, name: &str, environment: &[(&str, &str)]) -> Node<'_> {
        self.start_in(&Netns::current().unwrap(), name, environment).await
    }

    /// The same in another network namespace.
    async fn start_in(&self, ns: &Netns, name: &str, environment: &[(&str, &str)]) -> Node<'_> {
        let dir = self.dir.join(name);
        std::fs::create_dir(&dir).unwrap();
        let log = std::fs::File::create(dir.join("log")).unwrap();
        let daemon = command_in(ns, &self.daemon)
            .args(["--tun=userspace-networking", "--port=0", "--no-logs-no-support"])
            .arg(format!("--statedir={}", dir.display()))
            .arg(format!("--socket={}", dir.join("sock").display()))
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", &dir)
            .env("SSL_CERT_FILE", self.dir.join("ca.pem"))
            .env("TS_LOGS_DIR", &dir)
            .env("TS_NO_LOGS_NO_SUPPORT", "true")
            .env("TS_DISABLE_PORTMAPPER", "1")
            .env("TS_PANIC_IF_HIT_MAIN_CONTROL", "1")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let node = Node { stock: self, ns: ns.clone(), dir, _daemon: daemon };
        until("the daemon listens", async || node.dir.join("sock").exists()).await;
        node
    }
}

impl Node<'_> {
    /// What a command prints, both streams, and whether it succeeded.
    async fn run(&self, arguments: &[&str]) -> (bool, String) {
        // In the daemon's namespace: what is not the tailnet's the client dials itself.
        let mut child = command_in(&self.ns, &self.stock.client)
            .arg(format!("--socket={}", self.dir.join("sock").display()))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        // `tailscale nc` ends with its input.
        let _input = child.stdin.take();
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    /// The same for a command that has to succeed.
    async fn ok(&self, arguments: &[&str]) -> String {
        let (succeeded, text) = self.run(arguments).await;
        assert!(succeeded, "{arguments:?}: {text}\n{}", self.log());
        text
    }

    /// What `status` knows of a peer, by its first label.
    async fn peer(&self, name: &str) -> Value {
        let status = self.status().await;
        let peers = status["Peer"].as_object().cloned().unwrap_or_default();
        let named =
            |peer: &Value| peer["DNSName"].as_str().is_some_and(|n| n.starts_with(&format!("{name}.")));
        peers.into_values().find(named).unwrap_or(Value::Null)
    }

    async fn up(&self, server: &str, name: &str, key: &AuthKeyInfo, more: &[&str]) -> (bool, String) {
        let server = format!("--login-server={server}");
        let (key, name) = (format!("--auth-key={}", key.secret), format!("--hostname={name}"));
        let mut arguments = vec!["up", &server, &key, &name, "--timeout=20s"];
        arguments.extend(more);
        self.run(&arguments).await
    }

    async fn status(&self) -> Value {
        let (_, text) = self.run(&["status", "--json"]).await;
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    async fn peers(&self) -> Vec<String> {
        let status = self.status().await;
        let peers = status["Peer"].as_object().cloned().unwrap_or_default();
        let mut names: Vec<_> =
            peers.values().map(|peer| peer["DNSName"].as_str().unwrap_or_default().to_owned()).collect();
        names.sort();
        names
    }

    async fn ping(&self, peer: &str) -> String {
        self.run(&["ping", "-c", "10", "--timeout", "1s", peer]).await.1
    }

    /// What a TCP connection to a peer's port reads.
    async fn fetch(&self, peer: &str, port: u16) -> Option<String> {
        let port = port.to_string();
        let arguments = ["nc", peer, &port];
        let (_, text) = tokio::time::timeout(Duration::from_secs(3), self.run(&arguments)).await.ok()?;
        text.starts_with("port ").then_some(text)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

async fn until(what: &str, mut reached: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !reached().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.is_ok(), "not in time: {what}");
}

/// A stock client stays paused without an interface that is up and has an address.
async fn make_underlay() {
    let netlink = Netlink::open(&Netns::current().unwrap()).await.unwrap();
    let end = |name| VethEnd { namespace: None, name, mac: None, mtu: 1500 };
    netlink.add_veth(end("up0"), end("up1")).await.unwrap();
    for name in ["up0", "up1"] {
        let link = netlink.link(name).await.unwrap().unwrap();
        netlink.set_up(link.index).await.unwrap();
    }
    let link = netlink.link("up0").await.unwrap().unwrap();
    netlink.add_address(link.index, format!("{ADDRESS}/24").parse().unwrap()).await.unwrap();
}

/// Says its port to whoever connects: peers' connections to a stock node end on the host's loopback, those
/// through it at the address itself.
async fn serve_banner(port: u16) {
    let listener = TcpListener::bind(("0.0.0.0", port)).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(format!("port {port}").as_bytes()).await;
        }
    });
}

async fn start_devnet(dir: &Path) -> Devnet {
    let ip: IpAddr = ADDRESS.parse().unwrap();
    let config = DevnetConfig {
        http_listen: vec![SocketAddr::new(ip, 0)],
        https_listen: vec![SocketAddr::new(ip, 0)],
        regions: vec![RegionConfig::new(1, vec![ip])],
        keep_alive: Duration::from_secs(2),
        offline_delay: Duration::from_secs(1),
        ..DevnetConfig::default()
    };
    let devnet = Devnet::start(config).await.unwrap();
    std::fs::write(dir.join("ca.pem"), devnet.ca_pem()).unwrap();
    devnet
}
