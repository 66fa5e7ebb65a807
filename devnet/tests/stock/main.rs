//! Stock `tailscaled` against the devnet: the two must not share a mistake of ours.
//!
//! Runs when `tailscaled` and `tailscale` are on PATH, in namespaces of its own with userspace
//! networking, so that neither the host's resolver nor its routes are touched.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says when it skips"
)]

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use podtether_devnet::{AuthKeyInfo, AuthKeyOptions, Devnet, DevnetConfig, Mode, RegionConfig};
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

#[test]
fn stock_nodes_join_meet_and_leave() {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    in_namespaces("stock_nodes_join_meet_and_leave", |dir| {
        block_on(Box::pin(scenario(&Stock { daemon, client, dir: dir.to_owned() })));
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
    dir: PathBuf,
    _daemon: Child,
}

impl Stock {
    async fn start(&self, name: &str, environment: &[(&str, &str)]) -> Node<'_> {
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
        node
    }
}

impl Node<'_> {
    /// What a command prints, both streams, and whether it succeeded.
    async fn run(&self, arguments: &[&str]) -> (bool, String) {
        let mut child = Command::new(&self.stock.client)
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
        (!text.is_empty()).then_some(text)
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

/// Says its port to whoever connects: peers' connections to a stock node end on the host's loopback.
async fn serve_banner(port: u16) {
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
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
        ..DevnetConfig::default()
    };
    let devnet = Devnet::start(config).await.unwrap();
    std::fs::write(dir.join("ca.pem"), devnet.ca_pem()).unwrap();
    devnet
}

async fn scenario(stock: &Stock) {
    make_underlay().await;
    let devnet = start_devnet(&stock.dir).await;
    let single = || devnet.create_auth_key(AuthKeyOptions::default());
    let tagged = AuthKeyOptions { tags: vec!["tag:k8s-pod".into()], ..AuthKeyOptions::default() };

    // Joining, over plain HTTP and over TLS.
    let one = stock.start("one", &[]).await;
    let first_key = single();
    let (joined, text) = one.up(&devnet.http_url(), "one", &first_key, &[]).await;
    assert!(joined, "{text}\n{}", one.log());
    let two = stock.start("two", &[]).await;
    let (joined, text) = two.up(&devnet.https_url(), "two", &first_key, &[]).await;
    assert!(!joined && two.log().contains("authkey already used"), "{text}");
    drop(two);
    let two = stock.start("two-again", &[]).await;
    let ephemeral = devnet.create_auth_key(AuthKeyOptions { ephemeral: true, ..tagged.clone() });
    let (joined, text) = two.up(&devnet.https_url(), "two", &ephemeral, &[]).await;
    assert!(joined, "{text}\n{}", two.log());
    let status = one.status().await;
    assert_eq!(status["BackendState"], "Running");
    assert_eq!(status["Self"]["TailscaleIPs"], serde_json::json!(["100.64.0.1", "fd7a:115c:a1e0::1"]));
    assert_eq!(status["MagicDNSSuffix"], "tailnet.test");
    until("one sees two", async || one.peers().await == ["two.tailnet.test."]).await;

    // Paths: direct, and over the relay for a node that cannot send UDP to its peers.
    let pong = one.ping("two").await;
    assert!(pong.contains("via 192.168.77.1:"), "{pong}");
    let three = stock.start("three", &[("TS_DEBUG_NEVER_DIRECT_UDP", "1")]).await;
    let key = devnet.create_auth_key(tagged.clone());
    let (joined, text) = three.up(&devnet.http_url(), "three", &key, &[]).await;
    assert!(joined, "{text}");
    let pong = three.ping("two").await;
    assert!(pong.contains("via DERP(r1)") && !pong.contains(ADDRESS), "{pong}");
    assert!(devnet.region_stats(1).unwrap().packets > 0);
    devnet.restart_region(1);
    until("the relay is found again", async || three.ping("two").await.contains("via DERP(r1)")).await;

    // Access rules, and their change.
    for port in [8000, 8001] {
        serve_banner(port).await;
    }
    let allow =
        |port| format!("[[rules]]\nsrc=['one']\ndst=['tag:k8s-pod']\nports=['{port}']\nproto=['tcp']");
    for (open, closed) in [(8000, 8001), (8001, 8000)] {
        devnet.set_policy(Some(allow(open).parse().unwrap()));
        until("the open port answers", async || one.fetch("two", open).await.is_some()).await;
        assert_eq!(one.fetch("two", open).await.unwrap(), format!("port {open}"));
        assert_eq!(one.fetch("two", closed).await, None);
    }
    until("three sees only one", async || three.peers().await == ["one.tailnet.test."]).await;
    devnet.set_policy(None);
    until("three sees two again", async || three.peers().await.len() == 2).await;

    // What the server asks and does.
    let id = |name: &str| devnet.node(name).unwrap().id;
    let echo = devnet.ping(id("one"), "c2n", b"POST /echo HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi", PATIENCE);
    let answer = String::from_utf8(echo.await.unwrap()).unwrap();
    assert!(answer.contains("200 OK") && answer.ends_with("hi"), "{answer}");
    assert!(devnet.ping(id("two"), "", b"", PATIENCE).await.is_ok(), "plain liveness check");
    let session = devnet.node("one").unwrap().session;
    devnet.drop_connections();
    let renewed = devnet
        .wait_for(PATIENCE, |nodes| nodes.iter().all(|node| node.streaming) && nodes[0].session > session);
    assert!(renewed.await, "all reconnect");
    devnet.set_region(1, Mode::Down);
    assert!(one.ping("two").await.contains("via 192.168.77.1:"), "direct paths need no relay");
    devnet.set_region(1, Mode::Up);

    // Leaving: an ephemeral node by logging out, one by deletion, one by expiry.
    assert!(two.run(&["logout"]).await.0);
    assert!(devnet.wait_for(PATIENCE, |nodes| nodes.iter().all(|node| node.name != "two")).await);
    until("one sees three alone", async || one.peers().await == ["three.tailnet.test."]).await;
    assert!(devnet.delete_node(id("three")));
    until("one is alone", async || one.peers().await.is_empty()).await;
    devnet.expire_node(id("one"));
    until("one must log in", async || one.status().await["BackendState"] == "NeedsLogin").await;
    let (joined, text) = one.up(&devnet.http_url(), "one", &single(), &["--force-reauth"]).await;
    assert!(joined, "{text}\n{}", one.log());
    assert_eq!(one.status().await["Self"]["TailscaleIPs"][0], "100.64.0.1", "the address is kept");
    assert_eq!(devnet.complaints(), Vec::<String>::new(), "a stock client does nothing wrong");
}
