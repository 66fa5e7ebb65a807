//! Stock `tailscaled` as subnet router and exit node of our pods. Runs when it is on PATH.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use podtether_devnet::lab::{Node, Tailnet};
use podtether_devnet::{AuthKeyOptions, DevnetConfig};
use podtether_net::netlink::Netlink;
use podtether_net::testing::block_on;
use podtether_proto::node::Routing;

use crate::routes::{
    BY_EXIT, BY_UPLINK, CLUSTER, INTERNET, INTERNET_V6, LAN_HOST, LAN_HOST_V6, World, at, in_pod, leads,
    make_uplink_world, net, routing, serve, set_routing, wait_for_tcp,
};
use crate::{Rig, lab_test, wait_for};

pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// A stock daemon in a node's namespace, with userspace networking: neither routes nor resolver change.
struct Daemon {
    child: Child,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn environment(command: &mut Command, rig: &Rig, host: &Node) {
    command
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", host.dir())
        .env("SSL_CERT_FILE", &rig.ca)
        .env("TS_LOGS_DIR", host.dir())
        .env("TS_NO_LOGS_NO_SUPPORT", "true")
        .env("TS_DISABLE_PORTMAPPER", "1")
        .env("TS_PANIC_IF_HIT_MAIN_CONTROL", "1")
        .stdin(Stdio::null());
}

fn start(rig: &Rig, host: &Node, daemon: &std::path::Path) -> Daemon {
    let log = std::fs::File::create(host.dir().join("tailscaled.log")).unwrap();
    let mut command = host.command(daemon);
    environment(&mut command, rig, host);
    let child = command
        .args(["--tun=userspace-networking", "--port=0", "--no-logs-no-support"])
        .arg(format!("--statedir={}", host.dir().display()))
        .arg(format!("--socket={}", host.dir().join("sock").display()))
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let daemon = Daemon { child };
    wait_for("the stock daemon to listen", || host.dir().join("sock").exists().then_some(()));
    daemon
}

#[test]
fn a_pod_uses_a_stock_router_and_exit_node() {
    let (Some(daemon), Some(client)) = (on_path("tailscaled"), on_path("tailscale")) else {
        println!("SKIPPED: tailscaled and tailscale are not on PATH");
        return;
    };
    lab_test("stock::a_pod_uses_a_stock_router_and_exit_node", |dir| {
        let mut rig = Rig::start(dir, 0, DevnetConfig::default());
        let mut node = rig.lab.add_node("node0").unwrap();
        node.configure(&[Tailnet::oauth("default", &rig.devnet, &rig.ca)], CLUSTER).unwrap();
        node.start_supervisor().unwrap();
        rig.nodes.push(node);
        let host = rig.lab.add_node("stockhost").unwrap();
        block_on(async {
            let netlink = Netlink::open(&host.netns).await.unwrap();
            let lo = netlink.link("lo").await.unwrap().unwrap().index;
            for address in [LAN_HOST, LAN_HOST_V6, INTERNET, INTERNET_V6] {
                let address: std::net::IpAddr = address.parse().unwrap();
                netlink.add_address(lo, address.into()).await.unwrap();
            }
            netlink.wait_local(&[INTERNET_V6.parse().unwrap()]).await.unwrap();
        });
        let stock = start(&rig, &host, &daemon);
        let key = rig.devnet.create_auth_key(AuthKeyOptions::default());
        let mut up = host.command(&client);
        environment(&mut up, &rig, &host);
        let up = up
            .arg(format!("--socket={}", host.dir().join("sock").display()))
            .args(["up", "--timeout=30s", "--hostname=stock", "--accept-dns=false", "--advertise-exit-node"])
            .arg("--advertise-routes=192.168.5.0/24,fd05::/64")
            .arg(format!("--login-server={}", rig.devnet.https_url()))
            .arg(format!("--auth-key={}", key.secret))
            .output()
            .unwrap();
        assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
        let id = rig.devnet.node("stock").unwrap().id;

        make_uplink_world(&rig);
        let pods = rig.join(&[(0, "client")]);
        let (pod, node) = (&pods[0], &rig.nodes[0]);
        let before = in_pod(pod);
        let _servers: Vec<_> = [
            (&host.netns, at(LAN_HOST, 80)),
            (&host.netns, at(LAN_HOST_V6, 80)),
            (&host.netns, at(INTERNET, BY_EXIT)),
            (&host.netns, at(INTERNET_V6, BY_EXIT)),
            (rig.lab.router(), at(INTERNET, BY_UPLINK)),
            (rig.lab.router(), at(INTERNET_V6, BY_UPLINK)),
        ]
        .map(|(ns, address)| serve(ns, address))
        .into();
        assert_eq!(leads(pod, INTERNET), World::Uplink);

        set_routing(node, "client", routing(true, Some("stock"))).unwrap();
        wait_for("an exit node that is not approved to be reported", || {
            let health = node.pod_report("client").unwrap()["health"].to_string();
            health.contains("not an approved one").then_some(())
        });
        assert_eq!(leads(pod, INTERNET), World::Nowhere);
        assert!(rig.devnet.approve_routes(id, &["192.168.5.0/24", "fd05::/64", "::/0"].map(net)));
        for target in [at(LAN_HOST, 80), at(LAN_HOST_V6, 80), at(INTERNET, BY_EXIT), at(INTERNET_V6, BY_EXIT)]
        {
            wait_for_tcp(pod, target);
        }
        assert_eq!((leads(pod, INTERNET), leads(pod, INTERNET_V6)), (World::Exit, World::Exit));
        pod.check(node).unwrap();
        drop(stock);
        wait_for("the exit node to be gone", || (leads(pod, INTERNET) == World::Nowhere).then_some(()));
        let stock = start(&rig, &host, &daemon);
        wait_for_tcp(pod, at(INTERNET, BY_EXIT));
        set_routing(node, "client", Routing::default()).unwrap();
        assert_eq!(in_pod(pod), before);
        assert_eq!(leads(pod, INTERNET), World::Uplink);
        drop(stock);
    });
}
