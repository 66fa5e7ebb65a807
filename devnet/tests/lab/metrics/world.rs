//! The lab whose metrics are looked at: three nodes, pods that talk, and everything that can go wrong with them.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podtether_devnet::acl::Policy;
use podtether_devnet::fault::{Fault, Target};
use podtether_devnet::lab::{CniCall, Lab, Node, Pod, Programs, Tailnet};
use podtether_devnet::probe::ping::Pinging;
use podtether_devnet::probe::tcp::{self, Serve, TcpServer};
use podtether_devnet::probe::udp::{self, UdpEcho};
use podtether_devnet::{DevnetConfig, Mode};
use podtether_net::netlink::Netlink;
use podtether_net::testing::block_on;

use crate::kubeapi::KubeApi;
use crate::{PATIENCE, Rig, engine_pid, wait_for, wait_for_within, wait_reachable};

/// What takes an engine some retries, with back-off, on a loaded machine.
pub(super) const LONG: Duration = Duration::from_secs(90);
const SHORT: Duration = Duration::from_millis(300);
const TICK: Duration = Duration::from_millis(50);
const DAY: Duration = Duration::from_secs(86_400);
const METRICS_PORT: u16 = 9466;

const POLICY: &str = r#"
    [[rules]]
    src = ["*"]
    dst = ["*"]
    proto = ["icmp"]
    [[rules]]
    src = ["tag:k8s-pod"]
    dst = ["tag:k8s-pod"]
    ports = ["8080"]
    proto = ["tcp"]
"#;

/// See the module.
pub(super) struct World {
    pub(super) rig: Rig,
    pods: Vec<Pod>,
    api: KubeApi,
    traffic: Vec<Pinging>,
    servers: Vec<TcpServer>,
}

/// Names of pods on node 0, 1 and 2. `quiet` never sends, `away` is not there any more when `lonely` calls it.
const PODS: [(usize, &str); 7] =
    [(0, "web"), (0, "db"), (0, "leaves"), (1, "far"), (1, "quiet"), (1, "lonely"), (2, "away")];

impl World {
    pub(super) fn make(dir: &Path) -> Self {
        let policy: Policy = POLICY.parse().unwrap();
        let config = DevnetConfig {
            policy: Some(policy),
            node_key_lifetime: Some(30 * DAY),
            ..DevnetConfig::default()
        };
        let programs = Programs::find(Path::new(env!("CARGO_BIN_EXE_podtether-devnet"))).unwrap();
        let mut lab = Lab::new(dir, programs).unwrap();
        let (devnet, ca) = lab.start_devnet(config).unwrap();
        let mut rig = Rig { lab, devnet, ca, nodes: Vec::new() };
        let mut api = None;
        for n in 0..3 {
            let node = rig.lab.add_node(&format!("node-{}", ["a", "b", "c"][n])).unwrap();
            let mut extra = format!("metrics_listen = \"{}\"\n", metrics_address(n));
            match n {
                0 => {
                    let made = node.netns.run_blocking(KubeApi::start).unwrap();
                    extra += &format!(
                        "name = \"node-1\"\napi_server = {:?}\nservice_account_dir = \"{}/account\"\n",
                        made.url,
                        dir.display()
                    );
                    api = Some(made);
                }
                _ => {
                    extra += &format!(
                        "[tailnet.people]\ncontrol_url = {:?}\nca_file = {:?}\nhostname_template = \"{{pod}}\"\n\
                         [tailnet.people.credentials]\nkind = \"interactive\"\n",
                        rig.devnet.https_url(),
                        rig.ca
                    );
                }
            }
            node.configure(&[Tailnet::oauth("default", &rig.devnet, &rig.ca)], &extra).unwrap();
            rig.nodes.push(node);
        }
        for node in &mut rig.nodes {
            node.start_supervisor().unwrap();
        }
        let api = api.unwrap();
        Self { rig, pods: Vec::new(), api, traffic: Vec::new(), servers: Vec::new() }
    }

    /// What Prometheus scrapes.
    pub(super) fn targets(&self) -> Vec<(String, String)> {
        (0..).zip(&self.rig.nodes).map(|(n, node)| (node.name.clone(), metrics_address(n))).collect()
    }

    /// The pod that has left.
    pub(super) fn gone(&self) -> &'static str {
        "leaves"
    }

    fn pod(&self, name: &str) -> &Pod {
        self.pods.iter().find(|pod| pod.name == name).unwrap()
    }

    fn address(&self, name: &str) -> IpAddr {
        self.pod(name).v4().unwrap()
    }

    fn make_pod(&mut self, node: usize, name: &str) -> Pod {
        let pod = self.rig.nodes[node].create_pod(name).unwrap();
        if node == 0 {
            self.api.pod(&pod.namespace, name, &pod.uid, &[]);
        }
        pod
    }

    /// Pods join, one after another, and talk; some leave, some are refused.
    pub(super) fn live(&mut self) {
        for (node, name) in PODS {
            let mut pod = self.make_pod(node, name);
            match name {
                "db" => {
                    // What is counted from here on stays; the next supervisor takes the engine of `web` up.
                    self.rig.nodes[node].kill_supervisor().unwrap();
                    self.rig.nodes[node].start_supervisor().unwrap();
                    self.refused(&mut pod, node);
                }
                // Nobody is there yet: nothing goes.
                "far" => {
                    let call = CniCall { version: "1.1.0".into(), ..CniCall::new("GC") };
                    pod.cni(&self.rig.nodes[node], &call).unwrap().ok().unwrap();
                }
                _ => {}
            }
            pod.add(&self.rig.nodes[node]).unwrap();
            self.pods.push(pod);
        }
        self.person();
        let (web, db, far) = (self.address("web"), self.address("db"), self.address("far"));
        for (from, to) in [("far", web), ("web", far), ("web", db), ("leaves", db)] {
            wait_reachable(self.pod(from), to);
        }
        for (from, to) in [("far", web), ("web", far), ("db", far)] {
            let pinging = Pinging::start(&self.pod(from).netns, to, TICK, None).unwrap();
            self.traffic.push(pinging);
        }
        for port in [8080, 9090] {
            let web = self.pod("web");
            let server = TcpServer::start(&web.netns, web.at(port).unwrap(), Serve::Echo).unwrap();
            self.servers.push(server);
        }
        tcp::echo_once(&self.pod("far").netns, self.pod("web").at(8080).unwrap(), b"hello", PATIENCE)
            .unwrap();
        self.denied();
    }

    /// What the packet filter of `web` lets in for nobody.
    fn denied(&self) {
        let (far, web) = (self.pod("far"), self.pod("web"));
        assert!(tcp::connect(&far.netns, web.at(9090).unwrap(), SHORT).unwrap().is_none());
        let _echo = UdpEcho::start(&web.netns, web.at(8081).unwrap()).unwrap();
        assert!(udp::ask(&far.netns, web.at(8081).unwrap(), b"x", SHORT).unwrap().is_none());
    }

    /// Calls that come to nothing: a tailnet that is none, a CNI version that is none, a key that is not given.
    fn refused(&self, pod: &mut Pod, node: usize) {
        let node = &self.rig.nodes[node];
        let other = CniCall { tailnet: "nowhere".into(), ..CniCall::new("ADD") };
        assert!(pod.add_with(node, &other).is_err());
        let newer = CniCall { version: "9.9.9".into(), ..CniCall::new("ADD") };
        assert!(pod.add_with(node, &newer).is_err());
        self.rig.devnet.set_fault(Target::Api, Fault::status(403));
        assert!(pod.add(node).is_err());
        self.rig.devnet.clear_fault(Target::Api);
    }

    /// A device that a person lets in, and whose key then runs out.
    fn person(&mut self) {
        let mut pod = self.make_pod(1, "person");
        let node = &self.rig.nodes[1];
        let call = CniCall { tailnet: "people".into(), ..CniCall::new("ADD") };
        let asked = pod.cni(node, &call).unwrap();
        let said = asked.answer["details"].as_str().unwrap_or_default().to_owned();
        let url =
            said.split([' ', ';']).find(|word| word.starts_with("http")).unwrap_or_else(|| panic!("{said}"));
        self.rig.devnet.approve_login(url).unwrap();
        pod.add_with(node, &call).unwrap();
        self.pods.push(pod);
    }

    /// Engines die, links are altered, an engine is replaced, a pod leaves, a node goes.
    pub(super) fn suffer(&mut self) {
        let home = &self.rig.nodes[0];
        for signal in [Signal::SIGKILL, Signal::SIGSYS, Signal::SIGKILL] {
            let old = engine_pid(home, "web").unwrap();
            let healthy = self.traffic[0].wait_for_replies(30, LONG);
            assert!(
                healthy,
                "web answers for more than the second after which a death counts as one of a healthy engine"
            );
            kill(Pid::from_raw(old), signal).unwrap();
            wait_for("a new engine", || engine_pid(home, "web").filter(|new| *new != old));
        }
        assert!(self.traffic[0].wait_for_replies(30, LONG));
        home.operate(&["restart", "default/db"]).unwrap();
        // Somebody sets the pod's interface down.
        let repairs = || scraped(home, "podtether_link_repairs_total");
        block_on(async {
            let netlink = Netlink::open(&self.pod("db").netns).await.unwrap();
            let ts0 = netlink.link("ts0").await.unwrap().unwrap();
            netlink.set_down(ts0.index).await.unwrap();
        });
        wait_for("the link to be repaired", || (repairs() > 0.0).then_some(()));
        for _ in 0..2 {
            wait_for("CHECK to pass", || self.pod("web").check(home).ok());
        }
        // What the API server does not let the supervisor do.
        self.api.fault(|faults| {
            faults.forbidden.insert("patch pods".into());
            faults.forbidden.insert("create events".into());
        });
        let leaves = self.pods.iter().position(|pod| pod.name == "leaves").unwrap();
        for _ in 0..2 {
            self.pods[leaves].del(home).unwrap();
        }
        self.pods.remove(leaves);
        self.api.delete_pod("default", "leaves");
        let mut late = self.make_pod(0, "late");
        late.add(&self.rig.nodes[0]).unwrap();
        self.pods.push(late);
        let home = &self.rig.nodes[0];
        wait_for("the API server's refusal to be counted", || {
            (scraped(home, "podtether_kubernetes_failures_total") > 0.0).then_some(())
        });
        // The person's key runs out.
        let person = self.rig.devnet.node("person").unwrap();
        self.rig.devnet.expire_node(person.id);
        let beside = &self.rig.nodes[1];
        wait_for_within(LONG, "a login to be asked for", || {
            (beside.pod_report("person").ok()?["state"] == "needs-login").then_some(())
        });
        // A node goes, and somebody calls its pod.
        self.rig.nodes[2].kill_everything().unwrap();
        let away = self.address("away");
        let calling = Pinging::start(&self.pod("lonely").netns, away, TICK, None).unwrap();
        self.traffic.push(calling);
        self.denied();
    }

    /// Control and relays are away, or back.
    pub(super) fn cut_off(&self, away: bool) {
        let devnet = &self.rig.devnet;
        devnet.set_refusing(away);
        for region in devnet.regions() {
            assert!(devnet.set_region(region.id, if away { Mode::Down } else { Mode::Up }));
            if away {
                devnet.restart_region(region.id);
            }
        }
        if away {
            devnet.drop_connections();
        }
    }
}

/// The sum of a metric's series of a node.
fn scraped(node: &Node, name: &str) -> f64 {
    let text = node.http_get("/metrics").unwrap();
    let own =
        text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    own.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Where node number `n`, from 0, shows its metrics to Prometheus.
fn metrics_address(n: usize) -> String {
    format!("10.{}.0.2:{METRICS_PORT}", n + 1)
}
