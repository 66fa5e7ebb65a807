//! A real Headscale as control, and stock `tailscaled` beside our pods. Runs when they are on PATH.

mod keys;
mod names;
mod paths;
mod random_policies;
mod routes;
mod seen;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use podtether_devnet::lab::{
    CniCall, Headscale, HeadscaleConfig, Lab, Node, Pod, Programs, Stock, StockPrograms, Tailnet,
};
use podtether_devnet::probe::ping::ping;
use podtether_net::Netns;
use serde_json::{Value, json};

use crate::{TICK, lab_test, wait_for};

/// Headscale, and stock nodes and nodes with a supervisor that it controls.
pub(crate) struct World {
    lab: Lab,
    server: Headscale,
    programs: Stocks,
    /// Every tailnet table that nodes are given.
    tailnets: Vec<Tailnet>,
    nodes: Vec<Node>,
    stocks: Vec<Stock>,
}

struct Stocks {
    headscale: PathBuf,
    stock: StockPrograms,
}

fn find() -> Option<Stocks> {
    let on_path = |name: &str| {
        let found =
            std::env::split_paths(&std::env::var_os("PATH")?).map(|d| d.join(name)).find(|p| p.is_file());
        if found.is_none() {
            println!("SKIPPED: {name} is not on PATH");
        }
        found
    };
    let (headscale, daemon, client) = (on_path("headscale")?, on_path("tailscaled")?, on_path("tailscale")?);
    Some(Stocks { headscale, stock: StockPrograms { daemon, client } })
}

/// Runs `body` in a lab with a Headscale that has `policy`, or says why not.
pub(crate) fn headscale_test(
    name: &str,
    config: impl FnOnce(&mut Lab) -> HeadscaleConfig,
    policy: &Value,
    body: impl FnOnce(World),
) {
    let Some(programs) = find() else { return };
    lab_test(name, |dir| {
        let ours = Programs::find(Path::new(env!("CARGO_BIN_EXE_podtether-devnet"))).unwrap();
        let mut lab = Lab::new(dir, ours).unwrap();
        let config = config(&mut lab);
        let server = lab.start_headscale(&programs.headscale, config, policy).unwrap();
        let table =
            Tailnet::other_headscale("default", &server.url(), &server.ca_file, &server.api_key().unwrap());
        let tailnets = vec![table];
        body(World { lab, server, programs, tailnets, nodes: Vec::new(), stocks: Vec::new() });
    });
}

/// A region of a DERP map in YAML whose relay is that of `relay`.
fn derp_yaml(relay: &podtether_devnet::Devnet, id: u32) -> String {
    let region = &relay.regions()[0];
    let quoted: Vec<String> = region.addresses.iter().map(|ip| format!("'{ip}'")).collect();
    format!(
        "regions:\n  {id}:\n    regionid: {id}\n    regioncode: r{id}\n    regionname: Region {id}\n    \
         nodes:\n      - {{name: {id}a, regionid: {id}, hostname: {}, ipv4: {}, ipv6: {}, stunport: {}, \
         derpport: {}}}\n",
        region.host_name(relay.base_domain()),
        quoted[0],
        quoted[1],
        region.stun_port,
        region.derp_port,
    )
}

/// Everybody may do everything.
pub(crate) fn open_policy() -> Value {
    json!({
        "tagOwners": {"tag:k8s-pod": []},
        "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
    })
}

impl World {
    /// A node with a supervisor; its index.
    fn add_node(&mut self, extra: &str) -> usize {
        let mut node = self.lab.add_node(&format!("node{}", self.nodes.len())).unwrap();
        node.configure(&self.tailnets, extra).unwrap();
        node.start_supervisor().unwrap();
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// A stock node that has not joined; its index.
    fn add_stock(&mut self, name: &str, name_servers: &[IpAddr]) -> usize {
        let node = self.lab.add_node(name).unwrap();
        let stock = Stock::start(node, &self.programs.stock, &self.server.ca_file, name_servers).unwrap();
        self.stocks.push(stock);
        self.stocks.len() - 1
    }

    /// A stock node that has joined with a key made from `key` and with further arguments of `up`.
    fn join_stock(&mut self, name: &str, key: &[&str], up: &[&str]) -> usize {
        let stock = self.add_stock(name, &[]);
        let key = self.server.key(key).unwrap();
        self.stocks[stock].up(&self.server.url(), &key, up).unwrap();
        stock
    }

    /// A pod on the node of that index that has joined the default tailnet.
    fn join(&mut self, node: usize, name: &str) -> Pod {
        self.join_in(node, name, "default")
    }

    fn join_in(&mut self, node: usize, name: &str, tailnet: &str) -> Pod {
        let mut pod = self.nodes[node].create_pod(name).unwrap();
        pod.add_with(&self.nodes[node], &CniCall { tailnet: tailnet.into(), ..CniCall::new("ADD") }).unwrap();
        pod
    }
}

/// What the supervisors said is the first thing to look at after a failure.
impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in &self.nodes {
                println!("--- supervisor of {}\n{}", node.name, node.log_end(40));
            }
            let log = self.server.log();
            let lines: Vec<&str> = log.lines().collect();
            println!("--- headscale\n{}", lines[lines.len().saturating_sub(20)..].join("\n"));
        }
    }
}

/// Waits until a ping from `from` to `target` is answered. A new socket each time: one that is connected
/// before the route is there keeps the source address of another interface.
fn wait_ping(from: &Netns, target: IpAddr, what: &str) {
    wait_for(&format!("{what}: {target} to answer"), || {
        let report = ping(from, target, 3, TICK, Duration::from_millis(500)).ok()?;
        (report.received > 0).then_some(())
    });
}
