//! The same with the real `headscale`, when it is on PATH: https with a private CA, its own policy engine,
//! its own database. A devnet lends it a relay.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use podtether_devnet::Devnet;
use podtether_devnet::ca::issue;
use podtether_net::testing::{block_on, in_namespaces};
use serde_json::Value;

use crate::admin::{Admin, PATIENCE};
use crate::life::{Pair, TAGS, after_a_wipe, leave, one_family, one_name_on_two_nodes, touched_by_admin};
use crate::rig::*;

const ADDRESS: &str = "127.0.0.1:8443";

/// Which kind of server to start.
struct Kind {
    https: bool,
    prefixes: &'static str,
}

const DUAL: Kind = Kind { https: true, prefixes: "v4: 100.64.0.0/10, v6: 'fd7a:115c:a1e0::/48'" };

struct Headscale {
    program: PathBuf,
    dir: PathBuf,
    server: Option<Child>,
    admin: Admin,
    _relay: Devnet,
}

impl Drop for Headscale {
    fn drop(&mut self) {
        self.stop();
    }
}

/// `None` when there is no headscale.
fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join("headscale")).find(|path| path.is_file());
    if found.is_none() {
        println!("SKIPPED: headscale is not on PATH");
    }
    found
}

impl Headscale {
    async fn start(program: &Path, dir: &Path, kind: &Kind) -> Headscale {
        let dir = dir.join("headscale");
        std::fs::create_dir_all(&dir).unwrap();
        let relay = devnet(|config| config.open_relays = true);
        let region = &relay.regions()[0];
        let derp = format!(
            "regions:\n  1:\n    regionid: 1\n    regioncode: r1\n    regionname: Region 1\n    nodes:\n      - \
             {{name: 1a, regionid: 1, hostname: {}, ipv4: 127.0.0.1, ipv6: none, stunport: {}, derpport: {}}}\n",
            region.host_name(relay.base_domain()),
            region.stun_port,
            region.derp_port,
        );
        std::fs::write(dir.join("derp.yaml"), derp).unwrap();
        let issued = issue(vec!["127.0.0.1".into()]).unwrap();
        std::fs::write(dir.join("cert.pem"), &issued.certificate).unwrap();
        std::fs::write(dir.join("key.pem"), &issued.key).unwrap();
        let d = dir.display();
        let (url, tls) = if kind.https {
            (
                format!("https://{ADDRESS}"),
                format!("tls_cert_path: {d}/cert.pem\ntls_key_path: {d}/key.pem\n"),
            )
        } else {
            (format!("http://{ADDRESS}"), String::new())
        };
        let text = format!(
            "server_url: {url}
listen_addr: {ADDRESS}
{tls}metrics_listen_addr: ''
noise: {{private_key_path: {d}/noise.key}}
prefixes: {{{}, allocation: sequential}}
derp: {{server: {{enabled: false}}, urls: [], paths: [{d}/derp.yaml], auto_update_enabled: false}}
disable_check_updates: true
database: {{type: sqlite, sqlite: {{path: {d}/db.sqlite}}}}
dns: {{magic_dns: true, base_domain: ts.example, override_local_dns: false, nameservers: {{global: []}}}}
policy: {{mode: file, path: {d}/policy.json}}
unix_socket: {d}/headscale.sock
unix_socket_permission: '0700'
logtail: {{enabled: false}}
log: {{level: warn}}
",
            kind.prefixes
        );
        std::fs::write(dir.join("config.yaml"), text).unwrap();
        let admin = Admin { url, key: String::new(), ca: format!("{}{}", relay.ca_pem(), issued.root) };
        let mut headscale =
            Headscale { program: program.to_owned(), dir, server: None, admin, _relay: relay };
        headscale.policy("[{\"action\": \"accept\", \"src\": [\"*\"], \"dst\": [\"*:*\"]}]");
        headscale.serve().await;
        headscale.new_key();
        headscale
    }

    /// Writes the policy; a server that runs reads it on SIGHUP.
    fn policy(&self, acls: &str) {
        let text = format!("{{\"tagOwners\": {{\"tag:k8s-pod\": []}}, \"acls\": {acls}}}");
        std::fs::write(self.dir.join("policy.json"), text).unwrap();
        if let Some(server) = &self.server {
            signal(server.id(), libc::SIGHUP);
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("-c").arg(self.dir.join("config.yaml")).stdin(Stdio::null());
        command
    }

    async fn serve(&mut self) {
        let log = std::fs::File::options();
        let log = { log }.create(true).append(true).open(self.dir.join("log")).unwrap();
        let server =
            self.command().arg("serve").stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        self.server = Some(server);
        let start = Instant::now();
        loop {
            // The socket is there before the listener.
            let up = tokio::net::TcpStream::connect(ADDRESS).await.is_ok()
                && self
                    .command()
                    .args(["users", "list"])
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .status()
                    .unwrap()
                    .success();
            if up {
                return;
            }
            let log = || std::fs::read_to_string(self.dir.join("log")).unwrap();
            assert!(start.elapsed() < PATIENCE, "{}", log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }

    fn new_key(&mut self) {
        let output = self.command().args(["apikeys", "create", "-o", "json"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.admin.key = serde_json::from_slice(&output.stdout).unwrap();
    }

    fn pid(&self) -> u32 {
        self.server.as_ref().unwrap().id()
    }
}

/// Pings that did not come back within `from..`, in their number and in time.
fn lost(back: &[Option<Duration>]) -> usize {
    back.iter().filter(|b| b.is_none()).count()
}

#[test]
fn pods_live_with_headscale() {
    let Some(program) = find() else { return };
    in_namespaces("real::pods_live_with_headscale", |dir| {
        block_on(Box::pin(async {
            let mut headscale = Headscale::start(&program, dir, &DUAL).await;
            let mut rig = headscale.admin.rig(dir, TAGS, "");
            rig.start();
            rig.netns("c").await;
            rig.add("c").await.unwrap();
            rig.terminate();
            let pair = Pair::join(rig).await;
            pair.rig.del("c").await.unwrap();
            let admin = headscale.admin.clone();
            admin.until("without c", |nodes| nodes.len() == 2).await;
            pair.talk();
            Box::pin(touched_by_admin(&pair, &admin, true)).await;
            Box::pin(policies(&pair, &headscale)).await;
            Box::pin(restarted(&pair, &mut headscale)).await;

            // The database goes, and with it users and API keys: the administrator makes a key again.
            let before = admin.nodes().await;
            headscale.stop();
            for file in ["db.sqlite", "db.sqlite-wal", "db.sqlite-shm"] {
                let _ = std::fs::remove_file(headscale.dir.join(file));
            }
            headscale.serve().await;
            let start = Instant::now();
            headscale.new_key();
            std::fs::write(dir.join("api-key"), &headscale.admin.key).unwrap();
            let admin = headscale.admin.clone();
            Box::pin(after_a_wipe(&pair, &admin, &before, start)).await;
            Box::pin(leave(&pair, &admin)).await;
        }));
    });
}

/// A rule that is taken away and comes back, while both pods run.
async fn policies(pair: &Pair, headscale: &Headscale) {
    let engines = (pair.engine("a"), pair.engine("b"));
    let to = SocketAddr::new(pair.address("b"), 7);
    let answers = async |wanted: bool| {
        let start = Instant::now();
        loop {
            let pinger = Pinger::start(&pair.a, to, Duration::from_millis(20));
            tokio::time::sleep(Duration::from_millis(300)).await;
            let back = pinger.finish();
            if back.iter().any(Option::is_some) == wanted {
                return start.elapsed();
            }
            assert!(
                start.elapsed() < PATIENCE,
                "b {} a",
                if wanted { "never answers" } else { "still answers" }
            );
        }
    };
    headscale.policy("[{\"action\": \"accept\", \"src\": [\"tag:k8s-pod\"], \"dst\": [\"tag:k8s-pod:9\"]}]");
    println!("closed within {:?}", answers(false).await);
    headscale.policy("[{\"action\": \"accept\", \"src\": [\"tag:k8s-pod\"], \"dst\": [\"tag:k8s-pod:7\"]}]");
    println!("open again within {:?}", answers(true).await);
    assert_eq!((pair.engine("a"), pair.engine("b")), engines);
}

/// Traffic does not need control; the session comes back by itself.
async fn restarted(pair: &Pair, headscale: &mut Headscale) {
    let engines = (pair.engine("a"), pair.engine("b"));
    let pinger = Pinger::start(&pair.a, SocketAddr::new(pair.address("b"), 7), Duration::from_millis(20));
    tokio::time::sleep(Duration::from_millis(500)).await;
    headscale.stop();
    pair.rig.until("a", "without control", |p| p["controlConnected"] == false).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let start = Instant::now();
    headscale.serve().await;
    let served = start.elapsed();
    for pod in ["a", "b"] {
        pair.rig.until(pod, "connected", |p| p["controlConnected"] == true).await;
    }
    println!("Headscale serves {served:?} after its start, sessions are back {:?} after it", start.elapsed());
    let back = pinger.finish();
    println!("{} pings while it restarted, {} lost", back.len(), lost(&back));
    assert!(lost(&back) * 100 <= back.len(), "{} of {} lost", lost(&back), back.len());
    assert_eq!((pair.engine("a"), pair.engine("b")), engines, "no engine was needed for it");
}

#[test]
fn headscale_over_http_with_one_family_and_odd_users() {
    let Some(program) = find() else { return };
    in_namespaces("real::headscale_over_http_with_one_family_and_odd_users", |dir| {
        let kinds = [
            ("v4", "v4: 100.64.0.0/10", "100.64.0.0/10"),
            ("v6", "v6: 'fd7a:115c:a1e0::/48'", "fd7a:115c:a1e0::/48"),
        ];
        for (name, prefixes, range) in kinds {
            let dir = dir.join(name);
            std::fs::create_dir(&dir).unwrap();
            block_on(Box::pin(async {
                let headscale = Headscale::start(&program, &dir, &Kind { https: false, prefixes }).await;
                let admin = headscale.admin.clone();
                let id = admin.add_user("ref", "\u{1F980} & <D> \"é").await;
                let pair = Pair::join(admin.rig(&dir, "", "user = \"ref\"")).await;
                one_family(&pair, range).await;
                Box::pin(touched_by_admin(&pair, &admin, false)).await;
                let engines = (pair.engine("a"), pair.engine("b"));
                // Headscale takes letters of any kind in a name, `&<>"` in a display name alone.
                admin.rename_user(&id, "r%C3%A9f").await;
                pair.talk();
                pair.rig.netns("c").await;
                pair.rig.add("c").await.unwrap();
                let node: Value = admin.node("c").await;
                assert_eq!(node["user"]["name"], "réf");
                pair.talk();
                assert_eq!((pair.engine("a"), pair.engine("b")), engines);
                pair.rig.del("c").await.unwrap();
                Box::pin(leave(&pair, &admin)).await;
            }));
        }
    });
}

#[test]
fn one_name_on_two_nodes_of_headscale() {
    let Some(program) = find() else { return };
    in_namespaces("real::one_name_on_two_nodes_of_headscale", |dir| {
        block_on(Box::pin(async {
            let headscale = Headscale::start(&program, dir, &DUAL).await;
            one_name_on_two_nodes(dir, &headscale.admin).await;
        }));
    });
}

/// Takes seven minutes, so it runs only when asked: `PODTETHER_LONG=1`.
#[test]
fn a_headscale_that_is_stopped_with_its_sockets_open() {
    let Some(program) = find() else { return };
    if std::env::var_os("PODTETHER_LONG").is_none() {
        println!("SKIPPED: takes seven minutes; set PODTETHER_LONG=1");
        return;
    }
    in_namespaces("real::a_headscale_that_is_stopped_with_its_sockets_open", |dir| {
        block_on(Box::pin(async {
            let headscale = Headscale::start(&program, dir, &DUAL).await;
            let pair = Pair::join(headscale.admin.rig(dir, TAGS, "")).await;
            pair.talk();
            let engines = (pair.engine("a"), pair.engine("b"));
            let to = SocketAddr::new(pair.address("b"), 7);
            let pinger = Pinger::start(&pair.a, to, Duration::from_millis(20));
            signal(headscale.pid(), libc::SIGSTOP);
            let start = Instant::now();
            let mut noticed = None;
            while start.elapsed() < Duration::from_secs(300) {
                tokio::time::sleep(Duration::from_millis(200)).await;
                if noticed.is_none() && pair.rig.pod("a")["controlConnected"] == false {
                    noticed = Some(start.elapsed());
                    println!("noticed after {noticed:?}");
                }
            }
            signal(headscale.pid(), libc::SIGCONT);
            let start = Instant::now();
            for pod in ["a", "b"] {
                pair.rig.until(pod, "connected", |p| p["controlConnected"] == true).await;
            }
            let took = start.elapsed();
            let back = pinger.finish();
            println!("sessions back {took:?} after SIGCONT; {} pings, {} lost", back.len(), lost(&back));
            // A keepalive comes within 60 s, so silence is known at most 120 s after the stop.
            let noticed = noticed.unwrap();
            assert!((Duration::from_secs(55)..Duration::from_secs(125)).contains(&noticed), "{noticed:?}");
            assert!(took < Duration::from_secs(6), "{took:?}");
            assert!(lost(&back) * 1000 <= back.len(), "{} of {} lost", lost(&back), back.len());
            assert_eq!((pair.engine("a"), pair.engine("b")), engines);
        }));
    });
}
