//! The cluster as its users see it: manifests, pods, and what the supervisor says of them.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use podtether_devnet::Devnet;
use podtether_net::Netns;
use serde_json::{Value, json};

use crate::node::{Node, PATIENCE, RUN_DIR, STATE_DIR, kubectl, named, tail};
use crate::rig::devnet;
use crate::runtime::{IMAGE, Names, PAUSE, Runtime, cgroups_named};
use crate::traffic::{Echo, answers};

const NAMESPACE: &str = include_str!("../../../deploy/kustomize/base/namespace.yaml");
const BASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kustomize/base");
/// A user's own directory for kustomize.
pub(crate) const OVERLAY: &str = "/var/lib/node/overlay";
/// Where our entry is looked for.
pub(crate) const CONFLIST: &str = "10-net.conflist";
const API_SERVER: &str = "https://127.0.0.1:6443";
/// Identities are kept this long between DEL of an old sandbox and ADD of the new one.
pub(crate) const GRACE: Duration = Duration::from_secs(20);

/// A node with a running DaemonSet, and the tailnet that its pods join.
pub(crate) struct Cluster<'a> {
    pub(crate) node: Node<'a>,
    pub(crate) devnet: Devnet,
    names: &'a Names,
}

/// The base with this configuration.
fn rendered(config: &str) -> String {
    let dir = Path::new(OVERLAY);
    fs::create_dir_all(dir).unwrap();
    let up = "../".repeat(dir.components().count() - 1);
    let list = format!(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: podtether\n\
         resources: [{up}{}]\nconfigMapGenerator:\n\
         - {{name: podtether-config, behavior: replace, files: [supervisor.toml]}}\n",
        BASE.trim_start_matches('/')
    );
    fs::write(dir.join("kustomization.yaml"), list).unwrap();
    fs::write(dir.join("supervisor.toml"), config).unwrap();
    let (manifest, done) = kubectl(&["kustomize", OVERLAY], None);
    assert!(done, "{manifest}");
    manifest
}

/// A pod as the supervisor lists it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Pod {
    pub(crate) uid: String,
    pub(crate) name: String,
    pub(crate) container: String,
    pub(crate) address: IpAddr,
    pub(crate) engine: u32,
    pub(crate) listed: Value,
}

impl<'a> Cluster<'a> {
    /// Brings it up as a user does: namespace, Secret, and an overlay of the base with another configuration.
    pub(crate) fn start(names: &'a Names) -> Self {
        let begun = Instant::now();
        let devnet = devnet(|_| {});
        let node = Node::start(names);
        let cluster = Self { node, devnet, names };
        println!("control plane up after {:?}", begun.elapsed());
        let (id, secret) = cluster.devnet.oauth_client();
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "podtether", "namespace": "podtether"},
            "stringData": {"id": id, "secret": secret, "ca.pem": cluster.devnet.ca_pem()},
        });
        cluster.apply(NAMESPACE);
        cluster.apply(&secret.to_string());
        let config = format!(
            "[tailnet.default]\ncontrol_url = {url:?}\ntags = [\"tag:k8s-pod\"]\nca_file = \"/etc/podtether/ca.pem\"\n\
             [tailnet.default.credentials]\nkind = \"oauth\"\napi_url = {url:?}\n\
             client_id_file = \"/etc/podtether/id\"\nclient_secret_file = \"/etc/podtether/secret\"\n\
             [node]\ncgroup_root = {root:?}\nidentity_grace = \"{}s\"\napi_server = \"{API_SERVER}\"\n",
            GRACE.as_secs(),
            url = cluster.devnet.http_url(),
            root = names.engines,
        );
        let runtime = cluster.node.runtime();
        let manifest = rendered(&config).replace("podtether:0.1.0", IMAGE);
        let manifest = manifest.replace("/etc/cni/net.d", runtime.conf_dir().to_str().unwrap());
        let manifest = manifest.replace("/opt/cni/bin", runtime.plugin_dir().to_str().unwrap());
        // Nobody leads services' addresses anywhere here.
        let daemonset = "- --daemonset=podtether/podtether";
        let manifest =
            manifest.replace(daemonset, &format!("{daemonset}\n        - --api-server={API_SERVER}"));
        cluster.apply(&manifest);
        cluster.serving();
        cluster.until("podtether is chained", || cluster.conflist()?.contains("podtether-cni").then_some(()));
        println!("supervisor up after {:?}", begun.elapsed());
        cluster
    }

    /// The runtime's network configuration, if it can be read.
    pub(crate) fn conflist(&self) -> Option<String> {
        fs::read_to_string(self.node.runtime().conf_dir().join(CONFLIST)).ok()
    }

    /// Repeated until it is taken: service accounts of a namespace come some time after it.
    pub(crate) fn apply(&self, manifest: &str) {
        let begun = Instant::now();
        loop {
            match kubectl(&["apply", "-f", "-"], Some(manifest)) {
                (_, true) => return,
                (text, false) => assert!(begun.elapsed() < PATIENCE, "{text}"),
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    pub(crate) fn must(&self, arguments: &str) -> String {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let (text, done) = kubectl(&arguments, None);
        assert!(done, "kubectl {arguments:?}: {text}\n{}", self.about());
        text
    }

    /// Waits until a supervisor answers, one that is not in `not`: its pid.
    pub(crate) fn serving_but(&self, not: &[u32]) -> u32 {
        self.until("a supervisor serves", || {
            pods()?;
            let pids = named("podtether-supervisor");
            (pids.len() == 1 && !not.contains(&pids[0])).then(|| pids[0])
        })
    }

    pub(crate) fn serving(&self) -> u32 {
        self.serving_but(&[])
    }

    /// Waits for something that the supervisor shows.
    pub(crate) fn until<T>(&self, what: &str, wanted: impl Fn() -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = wanted() {
                return found;
            }
            assert!(begun.elapsed() < PATIENCE, "not: {what}; {:?}\n{}", pods(), self.about());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What there is to read when something did not come.
    fn about(&self) -> String {
        let look = |arguments: &[&str]| kubectl(arguments, None).0;
        format!(
            "{}\n{}\n{}\n{}",
            look(&["get", "pods", "-A", "-o", "wide"]),
            look(&["-n", "podtether", "logs", "ds/podtether", "--tail=60"]),
            look(&["get", "events", "-A", "--sort-by=.lastTimestamp"]),
            tail("kubelet"),
        )
    }

    /// Deployment `name` with `replicas`.
    pub(crate) fn deploy(&self, name: &str, replicas: u32) {
        let manifest = json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": name}},
                "strategy": {"rollingUpdate": {"maxSurge": "50%", "maxUnavailable": "50%"}},
                "template": {"metadata": {"labels": {"app": name}}, "spec": {
                    "automountServiceAccountToken": false,
                    "terminationGracePeriodSeconds": 0,
                    "dnsPolicy": "Default",
                    "containers": [{"name": "main", "image": PAUSE}],
                }},
            },
        });
        self.apply(&manifest.to_string());
    }

    /// Waits until the supervisor lists so many pods, and all of them run.
    pub(crate) fn settled(&self, count: usize) -> Vec<Pod> {
        self.until(&format!("{count} pods run"), || self.running(count))
    }

    /// The pods, if there are so many and all of them run.
    pub(crate) fn running(&self, count: usize) -> Option<Vec<Pod>> {
        let all = pods()?;
        let pods: Vec<Pod> = all.iter().filter_map(Pod::running).collect();
        (all.len() == count && pods.len() == count).then_some(pods)
    }

    /// The namespace of a pod's network.
    pub(crate) fn netns(&self, pod: &Pod) -> Netns {
        let pid = self.sandbox(&pod.container);
        Netns::open(Path::new(&format!("/proc/{pid}/ns/net"))).unwrap()
    }

    /// The pid of a sandbox. A runtime makes its process after its network.
    pub(crate) fn sandbox(&self, id: &str) -> u32 {
        self.until("the sandbox has a process", || {
            let text = self.node.runtime().must(&["--namespace", "k8s.io", "task", "ls"]);
            text.lines().find(|line| line.starts_with(id))?.split_whitespace().nth(1)?.parse().ok()
        })
    }

    /// Each answers on port 7 while what this returns lives.
    #[must_use]
    pub(crate) fn listen(&self, pods: &[Pod]) -> Vec<Echo> {
        pods.iter().map(|pod| Echo::start(&self.netns(pod), 7)).collect()
    }

    /// Waits until each, made to answer for as long as that takes, has reached every other once.
    pub(crate) fn all_talk(&self, pods: &[Pod]) {
        let _answering = self.listen(pods);
        self.all_reach(pods);
    }

    /// Waits until each has reached every other once.
    pub(crate) fn all_reach(&self, pods: &[Pod]) {
        for from in pods {
            let space = self.netns(from);
            for to in pods.iter().filter(|to| to.name != from.name) {
                answers(&space, SocketAddr::new(to.address, 7), PATIENCE);
            }
        }
    }

    /// Nothing is left of any pod but identities, in the time they are kept.
    pub(crate) fn nothing_left(&self) {
        let left = || {
            let mut left = Vec::new();
            for dir in [
                format!("{RUN_DIR}/netns"),
                format!("{RUN_DIR}/engines"),
                format!("{STATE_DIR}/attachments"),
                format!("{STATE_DIR}/identities"),
                "/run/netns".into(),
            ] {
                left.extend(entries(Path::new(&dir)).into_iter().map(|name| format!("{dir}/{name}")));
            }
            left.extend(named("podtether-engine").iter().map(|pid| format!("engine {pid}")));
            left.extend(self.devnet.nodes().iter().map(|node| format!("device {}", node.name)));
            let leases = entries(&self.node.runtime().leases());
            left.extend(leases.into_iter().filter(|name| name.starts_with("10.")));
            let links = fs::read_to_string("/proc/self/net/dev").unwrap();
            let names = links.lines().skip(2).filter_map(|l| l.trim().split(':').next());
            left.extend(names.filter(|l| !["lo", "cni0", "node0"].contains(l)).map(str::to_owned));
            for dir in cgroups_named(&self.names.engines) {
                left.extend(entries(&dir).into_iter().filter(|name| dir.join(name).is_dir()));
            }
            left
        };
        let begun = Instant::now();
        while !left().is_empty() {
            assert!(begun.elapsed() < PATIENCE, "left: {:?}\n{}", left(), self.about());
            std::thread::sleep(Duration::from_millis(50));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let pins: Vec<&str> =
            mounts.lines().filter(|l| l.contains("/run/netns/") || l.contains("/podtether/netns/")).collect();
        assert!(pins.is_empty(), "{pins:?}");
    }
}

pub(crate) fn entries(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

impl Pod {
    fn running(listed: &Value) -> Option<Pod> {
        let text = |name: &str| listed[name].as_str().unwrap_or_default().to_owned();
        let up = listed["state"] == "running" && listed["controlConnected"] == true && listed["ifindex"] != 0;
        Some(Pod {
            uid: text("uid"),
            name: text("pod"),
            container: text("containerId"),
            address: listed["addresses"].get(0).filter(|_| up)?.as_str()?.parse().ok()?,
            engine: u32::try_from(listed["enginePid"].as_u64()?).ok()?,
            listed: listed.clone(),
        })
    }
}

/// What the supervisor lists, if there is one.
pub(crate) fn pods() -> Option<Vec<Value>> {
    let mut stream = TcpStream::connect("127.0.0.1:9465").ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    stream.write_all(b"GET /v1/pods?peers=false HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    head.contains(" 200 ").then(|| serde_json::from_str(body).unwrap())
}

/// What a pod keeps for as long as it lives, whatever sandbox it is in.
#[derive(Debug, PartialEq)]
pub(crate) struct Owned {
    uid: String,
    address: IpAddr,
    stable_id: String,
    node_key: String,
    name: String,
}

/// As the supervisor and the control server see it.
pub(crate) fn identity(devnet: &Devnet, pod: &Pod) -> Owned {
    let node = devnet.nodes().into_iter().find(|node| node.addresses.contains(&pod.address)).unwrap();
    Owned {
        uid: pod.uid.clone(),
        address: pod.address,
        stable_id: node.stable_id,
        node_key: node.node_key.to_string(),
        name: node.name,
    }
}

/// Ends the process of a container in the runtime's namespace of Kubernetes.
pub(crate) fn kill_task(runtime: &Runtime, id: &str) {
    runtime.must(&["--namespace", "k8s.io", "task", "kill", "--signal", "SIGKILL", id]);
}
