//! The engine and a stock `tailscaled`: two of ours could agree on a mistake.
//!
//! Runs when `tailscaled` and `tailscale` are on PATH, in namespaces of its own with userspace
//! networking, so that neither the host's resolver nor its routes are touched.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says when it skips"
)]

#[path = "../common/mod.rs"]
mod common;
mod forgotten;
mod kinds;
mod shared;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use common::{Join, PATIENCE, Pod, echo, patient, probe};
use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RecordType};
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig, DnsSettings, RegionConfig};
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

#[test]
fn names_are_answered_as_stock_answers_them() {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    in_namespaces("names_are_answered_as_stock_answers_them", |dir| {
        block_on(Box::pin(names(&Stock { daemon, client, dir: dir.to_owned() })));
    });
}

#[test]
fn a_pod_treats_kinds_of_peers_as_stock_does() {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    in_namespaces("a_pod_treats_kinds_of_peers_as_stock_does", |dir| {
        block_on(Box::pin(kinds::masked_and_jailed(&Stock { daemon, client, dir: dir.to_owned() })));
    });
}

#[test]
fn odd_peers_are_as_reachable_from_a_pod_as_from_stock() {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    in_namespaces("odd_peers_are_as_reachable_from_a_pod_as_from_stock", |dir| {
        block_on(Box::pin(kinds::alike(&Stock { daemon, client, dir: dir.to_owned() })));
    });
}

#[test]
fn a_stock_nodes_own_word_about_its_disco_key_is_taken() {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    in_namespaces("a_stock_nodes_own_word_about_its_disco_key_is_taken", |dir| {
        block_on(Box::pin(kinds::advert(&Stock { daemon, client, dir: dir.to_owned() })));
    });
}

#[test]
fn a_stock_node_follows_a_pods_new_key() {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    in_namespaces("a_stock_node_follows_a_pods_new_key", |dir| {
        block_on(Box::pin(kinds::rotated(&Stock { daemon, client, dir: dir.to_owned() })));
    });
}

#[test]
fn shared_nodes_are_to_a_pod_what_they_are_to_stock() {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    in_namespaces("shared_nodes_are_to_a_pod_what_they_are_to_stock", |dir| {
        block_on(Box::pin(shared::shared(&Stock { daemon, client, dir: dir.to_owned() })));
    });
}

#[test]
fn who_was_forgotten_is_answered_again() {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    in_namespaces("who_was_forgotten_is_answered_again", |dir| {
        block_on(Box::pin(forgotten::forgotten(&Stock { daemon, client, dir: dir.to_owned() })));
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
    daemon: Child,
}

impl Stock {
    async fn join(&self, name: &str, devnet: &Devnet, environment: &[(&str, &str)]) -> Node<'_> {
        self.join_with(name, devnet, environment, AuthKeyOptions::default()).await
    }

    async fn join_with(
        &self,
        name: &str,
        devnet: &Devnet,
        environment: &[(&str, &str)],
        key: AuthKeyOptions,
    ) -> Node<'_> {
        let dir = self.dir.join(name);
        std::fs::create_dir(&dir).unwrap();
        let node = Node { stock: self, daemon: self.spawn(&dir, environment), dir };
        node.listens().await;
        let server = format!("--login-server={}", devnet.http_url());
        let key = devnet.create_auth_key(key).secret;
        let (key, name) = (format!("--auth-key={key}"), format!("--hostname={name}"));
        let (joined, text) = node.run(&["up", &server, &key, &name, "--timeout=20s"]).await;
        assert!(joined, "{text}\n{}", node.log());
        node
    }

    /// A daemon with its state in `dir`.
    fn spawn(&self, dir: &Path, environment: &[(&str, &str)]) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
        Command::new(&self.daemon)
            .args(["--tun=userspace-networking", "--port=0", "--no-logs-no-support"])
            .arg(format!("--statedir={}", dir.display()))
            .arg(format!("--socket={}", dir.join("sock").display()))
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", dir)
            .env("SSL_CERT_FILE", self.dir.join("ca.pem"))
            .env("TS_LOGS_DIR", dir)
            .env("TS_NO_LOGS_NO_SUPPORT", "true")
            .env("TS_DISABLE_PORTMAPPER", "1")
            .env("TS_PANIC_IF_HIT_MAIN_CONTROL", "1")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }
}

impl Node<'_> {
    async fn listens(&self) {
        until("the daemon listens", async || self.dir.join("sock").exists()).await;
    }

    /// Ended without a word, and begun again with what it had saved.
    async fn restart(&mut self) {
        self.daemon.kill().await.unwrap();
        let _ = std::fs::remove_file(self.dir.join("sock"));
        self.daemon = self.stock.spawn(&self.dir, &[]);
        self.listens().await;
    }

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

async fn start_devnet(dir: &Path, ip: IpAddr, dns: DnsSettings) -> Devnet {
    let config = DevnetConfig {
        http_listen: vec![SocketAddr::new(ip, 0)],
        https_listen: vec![SocketAddr::new(ip, 0)],
        regions: vec![RegionConfig::new(1, vec![ip])],
        dns,
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
    let devnet = start_devnet(&stock.dir, ip, DnsSettings::default()).await;
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

/// What the engine says where it differs from stock.
type Ours = Option<(u16, &'static [&'static str])>;

/// A response code, and what the records say, sorted.
type Said = (u16, Vec<String>);

/// What a stock node's own resolver says.
async fn stock_says(node: &Node<'_>, name: &str, kind: RecordType) -> Said {
    let kind = if kind == RecordType::ANY { "ALL".to_owned() } else { kind.to_string() };
    let (_, text) = node.run(&["dns", "query", "--json", name, &kind]).await;
    let said: serde_json::Value =
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name} {kind}: {e}: {text}"));
    let codes = ["RCodeSuccess", "RCodeFormatError", "RCodeServerFailure", "RCodeNameError"];
    let codes = [&codes[..], &["RCodeNotImplemented", "RCodeRefused"]].concat();
    let code = codes.iter().position(|code| said["ResponseCode"] == *code);
    let answers = said["Answers"].as_array().into_iter().flatten();
    let mut bodies: Vec<String> =
        answers.map(|a| a["Body"].as_str().unwrap_or_default().to_owned()).collect();
    bodies.sort();
    (u16::try_from(code.unwrap_or_else(|| panic!("{said}"))).unwrap(), bodies)
}

/// What the engine says.
async fn engine_says(pod: &Pod, from: IpAddr, name: &str, kind: RecordType) -> Said {
    let socket = pod.udp((from, 0).into()).await;
    let mut query = Message::new(77, MessageType::Query, OpCode::Query);
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    socket.send_to(&query.to_vec().unwrap(), "100.100.100.100:53").await.unwrap();
    let mut buffer = [0; 1500];
    let answer = tokio::time::timeout(PATIENCE, socket.recv(&mut buffer)).await.unwrap().unwrap();
    let answer = Message::from_vec(&buffer[..answer]).unwrap();
    let mut bodies: Vec<String> = answer.answers.iter().map(|record| record.data.to_string()).collect();
    bodies.sort();
    (answer.metadata.response_code.into(), bodies)
}

async fn names(stock: &Stock) {
    use RecordType as T;
    const AS_STOCK: Ours = None;
    let ip = make_underlay().await;
    let dns = DnsSettings {
        routes: vec![("local.test".into(), vec![])],
        extra_records: vec![
            ("db.tailnet.test".into(), "100.64.0.77".parse().unwrap()),
            ("outside.example".into(), "2001:db8::7".parse().unwrap()),
        ],
        ..DnsSettings::default()
    };
    let devnet = start_devnet(&stock.dir, ip, dns).await;
    let mut pod = Pod::make(&stock.dir, "pod").await;
    let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() }).secret;
    let join = Join {
        control_url: devnet.https_url(),
        ca_pem: devnet.ca_pem().to_owned(),
        auth_key: Some(key),
        addresses: vec![ip],
    };
    let from = pod.join(&join).await[0];
    let node = stock.join("stock", &devnet, &[]).await;
    let stock_address = node.address().await.to_string();
    until("everybody knows everybody", async || {
        engine_says(&pod, from, "stock.tailnet.test.", T::A).await.1 == [stock_address.clone()]
            && !stock_says(&node, "pod.tailnet.test.", T::A).await.1.is_empty()
    })
    .await;
    let reverse = |ip: &str| {
        let octets: Vec<&str> = ip.split('.').rev().collect();
        format!("{}.in-addr.arpa.", octets.join("."))
    };
    let (of_stock, of_pod) = (reverse(&stock_address), reverse(&from.to_string()));
    let ula = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa.";
    let table: &[(&str, T, Ours)] = &[
        ("stock.tailnet.test.", T::A, AS_STOCK),
        ("pod.tailnet.test.", T::A, AS_STOCK),
        ("PoD.TailNet.test.", T::A, AS_STOCK),
        ("pod.tailnet.test.", T::AAAA, AS_STOCK),
        ("pod.tailnet.test.", T::MX, AS_STOCK),
        ("pod.tailnet.test.", T::TXT, AS_STOCK),
        ("pod.tailnet.test.", T::SRV, AS_STOCK),
        ("pod.tailnet.test.", T::ANY, AS_STOCK),
        ("gone.tailnet.test.", T::A, AS_STOCK),
        ("gone.tailnet.test.", T::AAAA, AS_STOCK),
        ("a.pod.tailnet.test.", T::A, AS_STOCK),
        ("db.tailnet.test.", T::A, AS_STOCK),
        ("db.tailnet.test.", T::AAAA, AS_STOCK),
        ("outside.example.", T::AAAA, AS_STOCK),
        ("outside.example.", T::A, AS_STOCK),
        ("gone.local.test.", T::A, AS_STOCK),
        (&of_stock, T::PTR, AS_STOCK),
        (&of_pod, T::PTR, AS_STOCK),
        ("9.9.99.100.in-addr.arpa.", T::PTR, AS_STOCK),
        (ula, T::PTR, AS_STOCK),
        ("some.onion.", T::A, AS_STOCK),
        ("magicdns.localhost-tailscale-daemon.", T::A, AS_STOCK),
        ("magicdns.localhost-tailscale-daemon.", T::AAAA, AS_STOCK),
        ("100.100.100.100.in-addr.arpa.", T::PTR, AS_STOCK),
        ("10-1-2-3-via-7.", T::AAAA, AS_STOCK),
        ("10-1-2-3-via-7.", T::A, AS_STOCK),
        // The zone itself, which stock says does not exist: a resolver that believed it would look up nothing
        // below it (RFC 8020).
        ("tailnet.test.", T::A, Some((0, &[]))),
        ("local.test.", T::A, Some((0, &[]))),
        // Stock does not implement these; no such record is no data.
        ("pod.tailnet.test.", T::NS, Some((0, &[]))),
        ("pod.tailnet.test.", T::SOA, Some((0, &[]))),
        // Nobody to ask: stock fails, we refuse, so that a stub resolver asks its next server.
        ("example.org.", T::A, Some((5, &[]))),
    ];
    let mut differences = vec![];
    for (name, kind, ours) in table {
        let (stock, engine) =
            (stock_says(&node, name, *kind).await, engine_says(&pod, from, name, *kind).await);
        println!("{name} {kind}: stock {stock:?}, engine {engine:?}");
        let expected = match ours {
            None => stock,
            Some((code, bodies)) => (*code, bodies.iter().map(|b| (*b).to_owned()).collect()),
        };
        if engine != expected {
            differences.push(format!("{name} {kind}: {engine:?}, not {expected:?}"));
        }
    }
    assert_eq!(differences, [""; 0]);
}
