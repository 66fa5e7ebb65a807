//! What chaos runs on: a devnet, home with its pods, away with their peers.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use podtether_net::Netns;
use podtether_net::netlink::Netlink;
use serde_json::Value;

use super::checker::End;
use crate::lab::{HostState, Lab, Node, Pod, Programs, Tailnet, host_state};
use crate::{Devnet, DevnetConfig};

/// What of a pod's entry in `/v1/pods` outlives engines and supervisors.
const LASTING: [&str; 6] = ["addresses", "ifindex", "mac", "udpPort", "udp6Port", "name"];
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
/// Engines are put into their cgroups after their start.
const LIMITED_WITHIN: Duration = Duration::from_secs(3);
/// Number of home among the lab's nodes.
const HOME: u8 = 1;
const PEERS: usize = 4;
const BYSTANDERS: usize = 4;
/// Pods that come and go.
pub(super) const CHURN: &str = "churn";

/// See the module.
pub(super) struct World {
    pub(super) lab: Lab,
    pub(super) devnet: Devnet,
    pub(super) home: Node,
    pub(super) away: Node,
    /// Home's.
    pub(super) pods: Vec<Pod>,
    /// Away's.
    pub(super) peers: Vec<Pod>,
    /// What has to stay, by home pod.
    lasting: Vec<Value>,
    before: Vec<(String, HostState)>,
}

/// A pair to ping along.
#[derive(Clone)]
pub(super) struct Pair {
    pub(super) ends: [End; 2],
    pub(super) from: Netns,
    pub(super) to: IpAddr,
}

impl World {
    /// Starts everything, with `pods` pods that have joined.
    pub(super) fn start(dir: &Path, programs: Programs, pods: usize, cgroup_root: &str) -> Result<Self> {
        let mut lab = Lab::new(dir, programs)?;
        let (devnet, ca) = lab.start_devnet(DevnetConfig::default())?;
        let mut node = |name, cgroup_root| -> Result<Node> {
            let mut node = lab.add_node(name)?;
            node.set_cgroup_root(cgroup_root);
            node.configure(&[Tailnet::oauth("default", &devnet, &ca)], "")?;
            node.start_supervisor()?;
            Ok(node)
        };
        let (mut home, mut away) = (node("home", cgroup_root)?, node("away", "")?);
        let make = |node: &mut Node, name: &str, count: usize| -> Result<Vec<Pod>> {
            (0..count).map(|n| node.create_pod(&format!("{name}-{n}"))).collect()
        };
        let (pods, peers) = (make(&mut home, "pod", pods)?, make(&mut away, "peer", PEERS.min(pods))?);
        let (lasting, before) = (Vec::new(), Vec::new());
        let mut world = Self { lab, devnet, home, away, pods, peers, lasting, before };
        // The first pod makes directories that stay.
        if let Some(pod) = world.pods.first_mut() {
            pod.add(&world.home)?;
            pod.del(&world.home)?;
        }
        if let Some(peer) = world.peers.first_mut() {
            peer.add(&world.away)?;
            peer.del(&world.away)?;
        }
        world.before = world.state()?;
        join(&world.home, &mut world.pods)?;
        join(&world.away, &mut world.peers)?;
        let reports = world.settled()?;
        world.lasting = reports.iter().map(what_lasts).collect();
        Ok(world)
    }

    /// Why engines of home cannot be driven out of memory alone.
    pub(super) fn lacks_memory_limits(&self) -> Result<Option<String>> {
        let until = Instant::now() + LIMITED_WITHIN;
        loop {
            let reports = self.settled()?;
            let limits = |report: &Value| report["limits"].as_array().cloned().unwrap_or_default();
            let lacking = reports.iter().find(|r| !limits(r).iter().any(|limit| limit == "memory"));
            let Some(lacking) = lacking else { return Ok(None) };
            if Instant::now() > until {
                return Ok(Some(format!("{} has no memory limit of its own", lacking["pod"])));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Every home pod with a peer that pings it, IPv4 and IPv6 in turn; then some among home and among away.
    pub(super) fn pairs(&self) -> Result<Vec<Pair>> {
        let mut pairs = Vec::new();
        let place = |end: End| match end {
            End::Home(n) => &self.pods[n],
            End::Away(n) => &self.peers[n],
        };
        let mut add = |from: End, to: End| -> Result<()> {
            let number = pairs.len();
            let target = place(to);
            let to_address = if number % 2 == 0 { target.v4()? } else { target.v6()? };
            pairs.push(Pair { ends: [from, to], from: place(from).netns.clone(), to: to_address });
            Ok(())
        };
        for n in 0..self.pods.len() {
            add(End::Away(n % self.peers.len()), End::Home(n))?;
        }
        if self.pods.len() > 1 {
            for n in 0..self.pods.len().min(BYSTANDERS) {
                add(End::Home(n), End::Home((n + 1) % self.pods.len()))?;
            }
        }
        if self.peers.len() > 1 {
            add(End::Away(0), End::Away(1))?;
        }
        Ok(pairs)
    }

    /// Two pods of home, or the one with itself, through the primary network: bare veths and a bridge.
    pub(super) fn bare(&self) -> Result<(Netns, IpAddr)> {
        let (from, to) = (self.pods.first(), self.pods.get(1).or(self.pods.first()));
        let (from, to) = from.zip(to).context("no pods")?;
        let address = to.primary_result["ips"][0]["address"].as_str().unwrap_or_default();
        let address: ipnet::IpNet = address.parse().context("address of the primary network")?;
        Ok((from.netns.clone(), address.addr()))
    }

    /// Home's entries in `/v1/pods`, in the order of the pods, once all run; else which do not.
    pub(super) fn settled(&self) -> Result<Vec<Value>> {
        let until = Instant::now() + PATIENCE;
        loop {
            let (ready, missing) = self.ready()?;
            if missing.is_empty() {
                return Ok(ready);
            }
            if Instant::now() > until {
                bail!("{}", missing.join("; "));
            }
            std::thread::sleep(POLL);
        }
    }

    fn ready(&self) -> Result<(Vec<Value>, Vec<String>)> {
        let reports = self.home.pods_alone()?;
        let mut by_name: BTreeMap<String, Value> = reports
            .into_iter()
            .filter_map(|report| Some((report["pod"].as_str()?.to_owned(), report)))
            .collect();
        let (mut ready, mut missing) = (Vec::new(), Vec::new());
        for pod in &self.pods {
            match by_name.remove(&pod.name) {
                Some(r) if r["state"] == "running" && r["ifindex"] != 0 && r["enginePid"].is_u64() => {
                    ready.push(r);
                }
                Some(r) => missing.push(format!("{} is {} ({})", pod.name, r["state"], r["reason"])),
                None => missing.push(format!("{} is not in /v1/pods", pod.name)),
            }
        }
        Ok((ready, missing))
    }

    /// What is not as it was, by what the supervisor reports and the devnet knows.
    pub(super) fn changes(&self, reports: &[Value]) -> Vec<String> {
        let mut found = Vec::new();
        for ((pod, report), before) in self.pods.iter().zip(reports).zip(&self.lasting) {
            let now = what_lasts(report);
            if now != *before {
                found.push(format!("{} was {before} and is {now}", pod.name));
            }
        }
        let nodes = self.devnet.nodes();
        for pod in self.pods.iter().chain(&self.peers) {
            let same: Vec<_> = nodes.iter().filter(|n| n.name == pod.name).collect();
            let addresses: Vec<Vec<IpAddr>> = same.iter().map(|n| n.addresses.clone()).collect();
            if addresses != [pod.addresses().to_vec()] {
                found.push(format!("the tailnet has {} at {addresses:?}", pod.name));
            }
        }
        // Those of pods that come and go may be there or not.
        let expected = self.pods.len() + self.peers.len();
        let lasting = nodes.iter().filter(|node| !node.name.starts_with(CHURN)).count();
        if lasting > expected {
            found.push(format!("{lasting} devices in the tailnet, not {expected}"));
        }
        found
    }

    /// The interface as the pods themselves see it.
    pub(super) fn changes_inside(&self, pods: impl IntoIterator<Item = usize>) -> Result<Vec<String>> {
        let mut found = Vec::new();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        for n in pods {
            let (Some(pod), Some(before)) = (self.pods.get(n), self.lasting.get(n)) else { continue };
            let link = runtime.block_on(async { Netlink::open(&pod.netns).await?.link("ts0").await })?;
            let index = link.map(|link| u64::from(link.index));
            if index != before["ifindex"].as_u64() {
                found.push(format!("ts0 of {} is {index:?}, and was {}", pod.name, before["ifindex"]));
            }
        }
        Ok(found)
    }

    /// Whether the supervisor has every home pod's engine, the same as before.
    pub(super) fn taken_up(&self, engines: &[i32]) -> bool {
        let Ok(reports) = self.home.pods_alone() else { return false };
        let report = |pod: &Pod| reports.iter().find(|r| r["pod"] == pod.name.as_str()).cloned();
        pids(&self.pods.iter().filter_map(report).collect::<Vec<_>>()) == engines
    }

    /// Whether every home pod runs, its link looked at.
    pub(super) fn all_run(&self) -> bool {
        self.ready().is_ok_and(|(_, missing)| missing.is_empty())
    }

    /// Home's carrier.
    pub(super) fn set_uplink(&self, up: bool) -> Result<()> {
        self.lab.set_uplink(HOME, up)
    }

    /// Lets every pod leave; what is left then.
    pub(super) fn leave(&mut self) -> Result<Vec<String>> {
        leave(&self.home, &self.pods)?;
        leave(&self.away, &self.peers)?;
        let until = Instant::now() + PATIENCE;
        loop {
            let mut left: Vec<String> =
                self.devnet.nodes().iter().map(|n| format!("{} in the tailnet", n.name)).collect();
            for ((name, now), (_, before)) in self.state()?.iter().zip(&self.before) {
                // Supervisors were killed and started: the pid differs.
                let changed = before.diff(now).into_iter().filter(|line| !is_supervisor(line));
                // Processes and mounts are everybody's.
                let new: Vec<String> =
                    changed.filter(|line| !left.iter().any(|l| l.ends_with(line))).collect();
                left.extend(new.iter().map(|line| format!("{name}: {line}")));
            }
            if left.is_empty() || Instant::now() > until {
                return Ok(left);
            }
            std::thread::sleep(POLL * 10);
        }
    }

    fn state(&self) -> Result<Vec<(String, HostState)>> {
        let mut all =
            vec![("home".to_owned(), self.home.host_state()?), ("away".to_owned(), self.away.host_state()?)];
        for pod in self.pods.iter().chain(&self.peers) {
            all.push((pod.name.clone(), host_state(&pod.netns, &[])?));
        }
        Ok(all)
    }

    /// The end of home's log.
    pub(super) fn log(&self) -> String {
        self.home.log_end(40)
    }
}

/// Of engines.
pub(super) fn pids(reports: &[Value]) -> Vec<i32> {
    reports.iter().map(|r| r["enginePid"].as_i64().and_then(|p| i32::try_from(p).ok()).unwrap_or(0)).collect()
}

fn is_supervisor(line: &str) -> bool {
    line.contains(" process: ") && line.ends_with("podtether-super")
}

fn what_lasts(report: &Value) -> Value {
    LASTING
        .iter()
        .map(|key| ((*key).to_owned(), report[*key].clone()))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// ADD of all, some at a time.
fn join(node: &Node, pods: &mut [Pod]) -> Result<()> {
    const AT_ONCE: usize = 8;
    for some in pods.chunks_mut(AT_ONCE) {
        let results: Vec<Result<Duration>> = std::thread::scope(|scope| {
            let threads: Vec<_> = some.iter_mut().map(|pod| scope.spawn(|| pod.add(node))).collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        ensure!(results.len() == some.len(), "an ADD panicked");
        results.into_iter().collect::<Result<Vec<_>>>()?;
    }
    Ok(())
}

fn leave(node: &Node, pods: &[Pod]) -> Result<()> {
    pods.iter().try_for_each(|pod| pod.del(node).map(drop))
}
