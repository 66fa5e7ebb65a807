//! The engine and a stock Headscale, where a person or an administrator acts: devnet and engine could agree
//! on a mistake.
//!
//! Runs when `headscale` is on PATH, in namespaces of its own.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says when it skips"
)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Join, PATIENCE, Pod, underlay_addresses};
use podtether_core::key::NodePrivate;
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::engine::{NodeState, StartRequest};
use podtether_proto::exit::EngineExit;
use podtether_proto::secret::{SecretKey, SecretString};
use serde_json::Value;

const ADDRESS: &str = "10.9.0.1:8480";

#[test]
fn a_person_logs_in_and_an_administrator_expires() {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut programs = std::env::split_paths(&path).map(|dir| dir.join("headscale"));
    let Some(program) = programs.find(|path| path.is_file()) else {
        println!("SKIPPED: headscale is not on PATH");
        return;
    };
    in_namespaces("a_person_logs_in_and_an_administrator_expires", |dir| {
        block_on(Box::pin(scenario(&program, dir)));
    });
}

struct Headscale {
    program: PathBuf,
    config: PathBuf,
    server: Child,
}

impl Drop for Headscale {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Headscale {
    async fn start(program: &Path, dir: &Path) -> Self {
        let config = dir.join("headscale.yaml");
        let dir = dir.display();
        let derp = "regions:\n  1:\n    regionid: 1\n    regioncode: r1\n    regionname: Region 1\n    nodes:\n      - \
                    {name: 1a, regionid: 1, hostname: derp1.ts.example, ipv4: 10.9.0.1, ipv6: none}\n";
        std::fs::write(format!("{dir}/derp.yaml"), derp).unwrap();
        let text = format!(
            "server_url: http://{ADDRESS}
listen_addr: {ADDRESS}
metrics_listen_addr: ''
noise: {{private_key_path: {dir}/noise.key}}
prefixes: {{v4: 100.64.0.0/10, v6: 'fd7a:115c:a1e0::/48', allocation: sequential}}
derp: {{server: {{enabled: false}}, urls: [], paths: [{dir}/derp.yaml], auto_update_enabled: false}}
disable_check_updates: true
database: {{type: sqlite, sqlite: {{path: {dir}/db.sqlite}}}}
dns: {{magic_dns: true, base_domain: ts.example, override_local_dns: false, nameservers: {{global: []}}}}
policy: {{mode: file, path: ''}}
unix_socket: {dir}/headscale.sock
unix_socket_permission: '0700'
logtail: {{enabled: false}}
log: {{level: warn}}
"
        );
        std::fs::write(&config, text).unwrap();
        let log = std::fs::File::create(format!("{dir}/headscale.log")).unwrap();
        let server = Command::new(program)
            .arg("-c")
            .arg(&config)
            .arg("serve")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let headscale = Self { program: program.to_owned(), config, server };
        for _ in 0..600 {
            if tokio::net::TcpStream::connect(ADDRESS).await.is_ok() {
                return headscale;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{}", std::fs::read_to_string(format!("{dir}/headscale.log")).unwrap());
    }

    fn run(&self, arguments: &[&str]) -> Value {
        let mut command = Command::new(&self.program);
        let output =
            command.arg("-c").arg(&self.config).args(arguments).args(["-o", "json"]).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
    }

    /// What a person does who opens the URL.
    fn login(&self, url: &str) {
        let id = url.rsplit('/').next().unwrap();
        self.run(&["auth", "register", "--auth-id", id, "--user", "ref"]);
    }

    /// The number of the only node.
    fn node(&self) -> String {
        let nodes = self.run(&["nodes", "list"]);
        assert_eq!(nodes.as_array().map(Vec::len), Some(1), "{nodes}");
        nodes[0]["id"].to_string().trim_matches('"').to_owned()
    }
}

async fn start(pod: &mut Pod, request: StartRequest) {
    let client = pod.spawn().await;
    client.start(common::patient(), Box::new(request)).await.unwrap().unwrap();
}

async fn login_url(pod: &Pod) -> String {
    let status = pod.wait(|status| matches!(status.state, NodeState::NeedsLogin { .. })).await;
    let NodeState::NeedsLogin { url } = status.state else { unreachable!("waited for it") };
    url
}

/// The node's addresses, once it runs.
async fn running(pod: &Pod) -> Vec<ipnet::IpNet> {
    let running = |status: &podtether_proto::engine::EngineStatus| {
        status.state == NodeState::Running && status.control_connected && status.node.is_some()
    };
    pod.wait(running).await.node.unwrap().addresses
}

async fn scenario(program: &Path, dir: &Path) {
    let addresses = underlay_addresses(&["10.9.0.1/32"]).await;
    let headscale = Headscale::start(program, dir).await;
    let user = headscale.run(&["users", "create", "ref"])["id"].to_string();
    let user = user.trim_matches('"').to_owned();
    let join =
        Join { control_url: format!("http://{ADDRESS}"), ca_pem: String::new(), auth_key: None, addresses };
    let mut pod = Pod::make(dir, "pod").await;
    let interactive = |pod: &Pod, login_url: Option<String>| StartRequest {
        interactive: true,
        login_url,
        ..pod.request(&join)
    };

    // The URL outlives the engine that was given it.
    let request = interactive(&pod, None);
    start(&mut pod, request).await;
    let url = login_url(&pod).await;
    println!("{url}");
    pod.kill();
    let request = interactive(&pod, Some(url.clone()));
    start(&mut pod, request).await;
    assert_eq!(login_url(&pod).await, url);
    headscale.login(&url);
    let first = running(&pod).await;
    assert_eq!(first.len(), 2);

    // An administrator lets the key expire while the node runs.
    headscale.run(&["nodes", "expire", "--identifier", &headscale.node(), "--force"]);
    let (status, reason) = pod.ended().await;
    assert_eq!(status.code(), Some(EngineExit::NodeKeyExpired.code().into()), "{reason:?}");

    // A new node key that names the old one, with an auth key, and with a login.
    let key = headscale.run(&["preauthkeys", "create", "-u", &user, "--reusable", "-e", "1h"]);
    let key = key["key"].as_str().unwrap().to_owned();
    for auth_key in [Some(key), None] {
        let old = NodePrivate::from_bytes(pod.node_key).public();
        getrandom::fill(&mut pod.node_key).unwrap();
        let with_key = auth_key.is_some();
        let request = StartRequest {
            node_key: SecretKey::new(pod.node_key),
            old_node_key: Some(*old.as_bytes()),
            auth_key: auth_key.map(SecretString::new),
            interactive: !with_key,
            ..pod.request(&join)
        };
        start(&mut pod, request).await;
        if !with_key {
            let url = login_url(&pod).await;
            headscale.login(&url);
        }
        assert_eq!(running(&pod).await, first, "the same node with the same addresses, key: {with_key}");
        headscale.run(&["nodes", "expire", "--identifier", &headscale.node(), "--force"]);
        let (status, reason) = tokio::time::timeout(PATIENCE, pod.ended()).await.unwrap();
        assert_eq!(status.code(), Some(EngineExit::NodeKeyExpired.code().into()), "{reason:?}");
    }

    // Expired at registration.
    let request = interactive(&pod, None);
    start(&mut pod, request).await;
    let (status, reason) = pod.ended().await;
    assert_eq!(status.code(), Some(EngineExit::NodeKeyExpired.code().into()), "{reason:?}");
    assert!(reason.unwrap().reason.contains("expired"));
}
