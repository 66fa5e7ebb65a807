//! The engine and a stock `tailscaled`: two of ours could agree on a mistake.
//!
//! Runs when `tailscaled` and `tailscale` are on PATH, in namespaces of its own with userspace
//! networking, so that neither the host's resolver nor its routes are touched.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says when it skips"
)]

mod common;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use common::{Join, PATIENCE, Pod, echo, patient, probe};
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig, RegionConfig};
use podtether_net::netlink::{Netlink, VethEnd};
use podtether_net::netns::Netns;
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::engine::PathStatus;
use tokio::net::UdpSocket;
use tokio::process::{Child, Command};

const ADDRESS: &str = "192.168.77.1";
const ECHO_PORT: u16 = 9000;

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

#[test]
fn a_pod_and_stock_nodes_reach_each_other() {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    in_namespaces("a_pod_and_stock_nodes_reach_each_other", |dir| {
        block_on(Box::pin(scenario(&Stock { daemon, client, dir: dir.to_owned() })));
    });
}

struct Stock {
    daemon: PathBuf,
    client: PathBuf,
    dir: PathBuf,
}

struct Node<'a> {
    stock: &'a Stock,
    dir: PathBuf,
    _daemon: Child,
}

impl Stock {
    async fn join(&self, name: &str, devnet: &Devnet, environment: &[(&str, &str)]) -> Node<'_> {
        let dir = self.dir.join(name);
        std::fs::create_dir(&dir).unwrap();
        let log = std::fs::File::create(dir.join("log")).unwrap();
        let daemon = Command::new(&self.daemon)
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
        let node = Node { stock: self, dir, _daemon: daemon };
        until("the daemon listens", async || node.dir.join("sock").exists()).await;
        let server = format!("--login-server={}", devnet.http_url());
        let key = devnet.create_auth_key(AuthKeyOptions::default()).secret;
        let (key, name) = (format!("--auth-key={key}"), format!("--hostname={name}"));
        let (joined, text) = node.run(&["up", &server, &key, &name, "--timeout=20s"]).await;
        assert!(joined, "{text}\n{}", node.log());
        node
    }
}

impl Node<'_> {
    async fn run(&self, arguments: &[&str]) -> (bool, String) {
        let output = Command::new(&self.stock.client)
            .arg(format!("--socket={}", self.dir.join("sock").display()))
            .args(arguments)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(PATIENCE, output).await.unwrap().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    async fn ping(&self, kind: &[&str], peer: IpAddr) -> String {
        let peer = peer.to_string();
        let arguments = [&["ping", "-c", "5", "--timeout", "2s"], kind, &[&peer]].concat();
        self.run(&arguments).await.1
    }

    async fn address(&self) -> IpAddr {
        let (_, text) = self.run(&["ip", "-4"]).await;
        text.trim().parse().unwrap_or_else(|_| panic!("{text}"))
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
async fn make_underlay() -> IpAddr {
    let netlink = Netlink::open(&Netns::current().unwrap()).await.unwrap();
    let end = |name| VethEnd { namespace: None, name, mac: None, mtu: 1500 };
    netlink.add_veth(end("up0"), end("up1")).await.unwrap();
    for name in ["up0", "up1"] {
        let link = netlink.link(name).await.unwrap().unwrap();
        netlink.set_up(link.index).await.unwrap();
    }
    let link = netlink.link("up0").await.unwrap().unwrap();
    netlink.add_address(link.index, format!("{ADDRESS}/24").parse().unwrap()).await.unwrap();
    ADDRESS.parse().unwrap()
}

async fn start_devnet(dir: &Path, ip: IpAddr) -> Devnet {
    let config = DevnetConfig {
        http_listen: vec![SocketAddr::new(ip, 0)],
        https_listen: vec![SocketAddr::new(ip, 0)],
        regions: vec![RegionConfig::new(1, vec![ip])],
        ..DevnetConfig::default()
    };
    let devnet = Devnet::start(config).await.unwrap();
    std::fs::write(dir.join("ca.pem"), devnet.ca_pem()).unwrap();
    devnet
}

/// Datagrams to a stock node in userspace mode end on the host's loopback.
async fn serve_echo() -> tokio::task::JoinSet<()> {
    let socket = UdpSocket::bind(("127.0.0.1", ECHO_PORT)).await.unwrap();
    let mut task = tokio::task::JoinSet::new();
    task.spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], from).await;
        }
    });
    task
}

/// How the pod reaches its peer of this name.
async fn path(pod: &Pod, name: &str) -> PathStatus {
    let peers = pod.client().peers(patient()).await.unwrap();
    peers.into_iter().find(|peer| peer.name.starts_with(name)).unwrap().path
}

async fn scenario(stock: &Stock) {
    let ip = make_underlay().await;
    let devnet = start_devnet(&stock.dir, ip).await;
    let _echo = serve_echo().await;
    let mut pod = Pod::make(&stock.dir, "pod").await;
    let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() }).secret;
    let join = Join {
        control_url: devnet.https_url(),
        ca_pem: devnet.ca_pem().to_owned(),
        auth_key: Some(key),
        addresses: vec![ip],
    };
    let pod_address = pod.join(&join).await[0];
    let stock_node = stock.join("stock", &devnet, &[]).await;
    let relayed = stock.join("relayed", &devnet, &[("TS_DEBUG_NEVER_DIRECT_UDP", "1")]).await;

    // What the pod begins, from the first packet on.
    let services = [(&stock_node, "stock"), (&relayed, "relayed")];
    for (node, name) in services {
        let to = SocketAddr::new(node.address().await, ECHO_PORT);
        until("control has told", async || {
            probe(&pod, pod_address, to, 1, Duration::from_millis(1)).await.answered == 1
        })
        .await;
        let probed = probe(&pod, pod_address, to, 200, Duration::from_millis(5)).await;
        assert_eq!(probed.answered, 200, "{name}: {probed:?}\n{}", node.log());
    }
    until("the path is direct", async || matches!(path(&pod, "stock").await, PathStatus::Direct { .. }))
        .await;
    assert_eq!(path(&pod, "relayed").await, PathStatus::Relay { region: 1 });

    // What stock begins: its own kinds of ping.
    for (node, via) in [(&stock_node, "via 192.168.77.1:"), (&relayed, "via DERP(r1)")] {
        let pong = node.ping(&[], pod_address).await;
        assert!(pong.contains(via), "{pong}");
        for kind in ["--tsmp", "--icmp"] {
            let pong = node.ping(&[kind], pod_address).await;
            assert!(pong.contains("pong from"), "{kind}: {pong}\n{}", node.log());
        }
    }

    // The engine is killed and comes back: stock takes its new handshake at once.
    let _pod_echo = echo(&pod, SocketAddr::new(pod_address, 7)).await;
    for (node, name) in services {
        let to = SocketAddr::new(node.address().await, ECHO_PORT);
        pod.kill();
        let probed = probe(&pod, pod_address, to, 40, Duration::from_millis(5)).await;
        assert_eq!(probed.answered, 0, "nobody carries packets now");
        pod.start(&join).await;
        let probed = probe(&pod, pod_address, to, 400, Duration::from_millis(5)).await;
        println!("{name}: {probed:?} after a restart");
        assert!(probed.answered >= 360, "{name}: {probed:?}");
    }
    assert_eq!(devnet.complaints(), Vec::<String>::new());
}
