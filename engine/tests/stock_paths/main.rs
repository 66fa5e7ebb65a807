//! How packets reach a stock `tailscaled`, and what a change of the way costs, on nodes of a lab.
//!
//! Runs when `tailscaled` and `tailscale` are on PATH, with userspace networking in namespaces of its own.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says what it measured"
)]

#[path = "../common/mod.rs"]
mod common;
mod nats;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{ENGINE, Join, Pod, echo, patient, probe};
use podtether_devnet::lab::{Lab, Node, Programs};
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig};
use podtether_net::sockets;
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::engine::{PathStatus, Underlay};

const ECHO_PORT: u16 = 9000;
const PATIENCE: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_millis(20);

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

#[test]
fn paths_to_a_stock_node_change_as_between_our_own() {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    in_namespaces("paths_to_a_stock_node_change_as_between_our_own", |dir| scenario(dir, &daemon, &client));
}

#[test]
fn a_pod_and_a_stock_node_meet_through_gateways() {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    in_namespaces("a_pod_and_a_stock_node_meet_through_gateways", |dir| {
        nats::scenario(dir, &daemon, &client)
    });
}

/// A stock node on a node of the lab.
struct Stock<'a> {
    dir: PathBuf,
    daemon: &'a Path,
    client: &'a Path,
    running: Option<Child>,
}

impl<'a> Stock<'a> {
    fn new(dir: PathBuf, devnet: &Devnet, daemon: &'a Path, client: &'a Path) -> Self {
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("ca.pem"), devnet.ca_pem()).unwrap();
        Self { dir, daemon, client, running: None }
    }

    fn start(&mut self, node: &Node) {
        let log = std::fs::File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let child = node
            .command(self.daemon)
            .args(["--tun=userspace-networking", "--port=0", "--no-logs-no-support"])
            .arg(format!("--statedir={}", self.dir.display()))
            .arg(format!("--socket={}", self.dir.join("sock").display()))
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", &self.dir)
            .env("SSL_CERT_FILE", self.dir.join("ca.pem"))
            .env("TS_LOGS_DIR", &self.dir)
            .env("TS_NO_LOGS_NO_SUPPORT", "true")
            .env("TS_DISABLE_PORTMAPPER", "1")
            .env("TS_PANIC_IF_HIT_MAIN_CONTROL", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.running = Some(child);
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.running.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = Command::new(self.client)
            .arg(format!("--socket={}", self.dir.join("sock").display()))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    fn ping(&self, peer: IpAddr) -> String {
        self.run(&["ping", "-c", "3", "--until-direct=false", "--timeout", "2s", &peer.to_string()])
    }

    fn up(&self, devnet: &Devnet, name: &str) -> IpAddr {
        let until = Instant::now() + PATIENCE;
        while !self.dir.join("sock").exists() {
            assert!(Instant::now() < until, "the daemon does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() });
        let said = self.run(&[
            "up",
            &format!("--login-server={}", devnet.http_url()),
            &format!("--auth-key={}", key.secret),
            &format!("--hostname={name}"),
            "--timeout=40s",
        ]);
        let address = self.run(&["ip", "-4"]);
        address.trim().parse().unwrap_or_else(|_| panic!("{said}\n{address}"))
    }
}

impl Drop for Stock<'_> {
    fn drop(&mut self) {
        self.stop();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            println!("--- stock\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
    }
}

async fn path(pod: &Pod) -> PathStatus {
    pod.client().peers(patient()).await.unwrap().into_iter().next().map_or(PathStatus::Idle, |p| p.path)
}

/// Talks until the path is as wanted.
async fn until(pod: &Pod, from: IpAddr, to: SocketAddr, what: &str, wanted: impl Fn(&PathStatus) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let path = path(pod).await;
        if wanted(&path) {
            return;
        }
        assert!(Instant::now() < deadline, "not in time: {what}; {path:?}");
        probe(pod, from, to, 20, TICK).await;
    }
}

/// Asks until a second's worth of questions is answered.
async fn answers(pod: &Pod, from: IpAddr, to: SocketAddr, what: &str) {
    let deadline = Instant::now() + PATIENCE;
    while probe(pod, from, to, 50, TICK).await.answered < 50 {
        assert!(Instant::now() < deadline, "no answers {what}: {:?}", path(pod).await);
    }
}

/// Datagrams to a node in userspace mode end on its namespace's loopback.
async fn stock_echo(node: &Node) -> tokio::task::JoinSet<()> {
    let socket = sockets::udp_in(&node.netns, ([127, 0, 0, 1], ECHO_PORT).into()).await.unwrap();
    let socket = tokio::net::UdpSocket::from_std(socket).unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], from).await;
        }
    });
    tasks
}

fn direct(path: &PathStatus) -> bool {
    matches!(path, PathStatus::Direct { .. })
}

/// As long as the tunnel's MTU lets them be, there and back.
async fn full_size(pod: &Pod, from: IpAddr, to: SocketAddr) {
    let socket = pod.udp((from, 0).into()).await;
    let sent = vec![7; 1280 - 28];
    let mut buffer = [0; 2048];
    for n in 0..20 {
        socket.send_to(&sent, to).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(5), socket.recv_from(&mut buffer)).await;
        let (length, _) = answer.unwrap_or_else(|_| panic!("full-size packet {n} is lost")).unwrap();
        assert_eq!(length, sent.len());
    }
}

fn scenario(dir: &Path, daemon: &Path, client: &Path) {
    let programs = Programs {
        supervisor: PathBuf::new(),
        engine: ENGINE.into(),
        tool: PathBuf::new(),
        cni: PathBuf::new(),
    };
    let mut lab = Lab::new(dir, programs).unwrap();
    let (devnet, _) = lab.start_devnet(DevnetConfig::default()).unwrap();
    let nodes = ["ours", "theirs"].map(|name| lab.add_node(name).unwrap());
    let mut stock = Stock::new(dir.join("stock"), &devnet, daemon, client);
    stock.start(&nodes[1]);
    let stock_address = stock.up(&devnet, "stock");
    let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() }).secret;
    let mut join = Join {
        control_url: devnet.https_url(),
        ca_pem: devnet.ca_pem().to_owned(),
        auth_key: Some(key),
        addresses: vec![[10, 1, 0, 2].into()],
    };
    let blocking = |call: &(dyn Fn() + Sync)| std::thread::scope(|s| s.spawn(call).join()).unwrap();
    block_on(async {
        let _theirs = stock_echo(&nodes[1]).await;
        let mut pod = Pod::make_on(dir, "pod", Some(&nodes[0].netns)).await;
        let own = pod.join(&join).await[0];
        let _echo = echo(&pod, SocketAddr::new(own, 7)).await;
        let to = SocketAddr::new(stock_address, ECHO_PORT);

        until(&pod, own, to, "direct at first", direct).await;
        full_size(&pod, own, to).await;
        println!("first: {:?}; {}", path(&pod).await, stock.ping(own).trim());

        // The direct path dies: we notice at once, stock when its last pong is 6.5 s old.
        let cut = async {
            tokio::time::sleep(Duration::from_secs(4)).await;
            blocking(&|| lab.block_udp().unwrap());
        };
        let (probed, ()) = tokio::join!(probe(&pod, own, to, 1000, TICK), cut);
        println!(
            "downgrade with a stock peer: {} of 1000 lost, {:?} at most",
            1000 - probed.answered,
            probed.gap
        );
        assert!(probed.gap < Duration::from_secs(8), "{probed:?}");
        until(&pod, own, to, "by relay", |path| matches!(path, PathStatus::Relay { .. })).await;
        full_size(&pod, own, to).await;
        let pong = stock.ping(own);
        assert!(pong.contains("via DERP"), "{pong}");

        // It comes back.
        let restore = async {
            tokio::time::sleep(Duration::from_secs(4)).await;
            blocking(&|| lab.unblock_udp().unwrap());
        };
        let (probed, ()) = tokio::join!(probe(&pod, own, to, 1000, TICK), restore);
        println!("upgrade with a stock peer: {} of 1000 lost", 1000 - probed.answered);
        assert!(probed.answered >= 990, "{probed:?}");
        until(&pod, own, to, "direct again", direct).await;
        let pong = stock.ping(own);
        assert!(pong.contains("via 10.1.0.2:") || pong.contains("via [fd10:1::2]:"), "{pong}");

        full_size(&pod, own, to).await;

        // Our node moves to another network.
        blocking(&|| lab.move_node(1, &nodes[0].netns).unwrap());
        let moved = Instant::now();
        join.addresses = vec![[10, 1, 1, 2].into(), "fd10:1:1::2".parse().unwrap()];
        let underlay = Underlay { addresses: join.addresses.clone(), ..Underlay::default() };
        pod.client().set_underlay(patient(), underlay).await.unwrap();
        // Stock goes on sending to the old address until its last pong is 6.5 s old.
        answers(&pod, own, to, "after a move").await;
        println!("answers come {:?} after a move", moved.elapsed());
        until(&pod, own, to, "direct after a move", direct).await;

        // Both are restarted; stock has another disco key then.
        stock.stop();
        pod.kill();
        stock.start(&nodes[1]);
        pod.start(&join).await;
        let restarted = Instant::now();
        answers(&pod, own, to, "after restarts").await;
        println!("answers come {:?} after both restarted", restarted.elapsed());
        until(&pod, own, to, "direct after restarts", direct).await;
        // Stock alone: only its new disco key tells.
        stock.stop();
        stock.start(&nodes[1]);
        let restarted = Instant::now();
        answers(&pod, own, to, "after a restart of stock").await;
        println!("answers come {:?} after a restart of stock", restarted.elapsed());
        until(&pod, own, to, "direct with a new disco key", direct).await;
        assert_eq!(devnet.complaints(), Vec::<String>::new());
    });
}
