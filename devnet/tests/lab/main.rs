//! The whole of podtether on real kernel objects: the real programs, called as a container runtime calls
//! them, on nodes and pods that are namespaces of the test's own process.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "the harness shows what a failed test printed")]

mod browser;
mod chaos;
mod cni;
mod handover;
mod headscale;
mod kills;
#[path = "../../../supervisor/tests/kubeapi/mod.rs"]
mod kubeapi;
mod leave;
mod logs;
mod metrics;
mod names;
mod operator;
mod page;
mod pairs;
mod paths;
mod routes;
mod rules;
mod shown;
mod stock;
mod tailnets;
mod tool;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use podtether_devnet::lab::{Lab, Node, Pod, Programs, Tailnet};
use podtether_devnet::probe::ping::Pinging;
use podtether_devnet::{Devnet, DevnetConfig};
use podtether_net::testing::in_namespaces;

/// Long enough for a loaded machine, short enough to notice a hang.
const PATIENCE: Duration = Duration::from_secs(30);

/// Between two pings.
const TICK: Duration = Duration::from_millis(20);

/// A devnet, and nodes with a supervisor each.
struct Rig {
    lab: Lab,
    devnet: Devnet,
    ca: PathBuf,
    nodes: Vec<Node>,
}

impl Rig {
    fn start(dir: &Path, nodes: usize, config: DevnetConfig) -> Self {
        let programs = Programs::find(Path::new(env!("CARGO_BIN_EXE_podtether-devnet"))).unwrap();
        let mut lab = Lab::new(dir, programs).unwrap();
        let (devnet, ca) = lab.start_devnet(config).unwrap();
        let mut rig = Self { lab, devnet, ca, nodes: Vec::new() };
        for n in 0..nodes {
            let mut node = rig.lab.add_node(&format!("node{n}")).unwrap();
            node.configure(&[Tailnet::oauth("default", &rig.devnet, &rig.ca)], "").unwrap();
            node.start_supervisor().unwrap();
            rig.nodes.push(node);
        }
        rig
    }

    /// Pods that have joined; those of a name in `plan` on the node of that index.
    fn join(&mut self, plan: &[(usize, &str)]) -> Vec<Pod> {
        let mut pods: Vec<Pod> =
            plan.iter().map(|(node, name)| self.nodes[*node].create_pod(name).unwrap()).collect();
        for (pod, (node, _)) in pods.iter_mut().zip(plan) {
            pod.add(&self.nodes[*node]).unwrap();
        }
        pods
    }
}

/// What the supervisors said is the first thing to look at after a failure.
impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in &self.nodes {
                println!("--- supervisor of {}\n{}", node.name, node.log_end(60));
            }
        }
    }
}

fn lab_test(name: &str, body: impl FnOnce(&Path)) {
    in_namespaces(name, body);
}

/// Waits until `from` reaches `target`; how long it took.
fn wait_reachable(from: &Pod, target: IpAddr) -> Duration {
    let started = Instant::now();
    let pinging = Pinging::start(&from.netns, target, Duration::from_millis(20), None).unwrap();
    assert!(pinging.wait_for_replies(1, PATIENCE), "{} does not reach {target}", from.name);
    started.elapsed()
}

/// Waits until `found` returns something.
fn wait_for<T>(what: &str, found: impl FnMut() -> Option<T>) -> T {
    wait_for_within(PATIENCE, what, found)
}

fn wait_for_within<T>(limit: Duration, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + limit;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < until, "waited {limit:?} for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn engine_pid(node: &Node, pod: &str) -> Option<i32> {
    let report = node.pod_report(pod).ok()?;
    i32::try_from(report["enginePid"].as_i64()?).ok()
}
