//! What the bench runs on: two nodes with pods, two with a stock daemon, one devnet.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use podtether_net::Netns;
use podtether_proto::engine::{PathStatus, PeerStatus};

use super::iperf::on_path;
use crate::lab::{Lab, Node, Pod, Programs, Stock, StockPrograms, Tailnet};
use crate::probe::ping;
use crate::{AuthKeyOptions, Devnet, DevnetConfig};

const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

/// Two pods on the first node and one on the second.
const PODS: [(usize, &str); 3] = [(0, "one"), (0, "two"), (1, "three")];
const NODES: [&str; 2] = ["alpha", "beta"];
const STOCK: [&str; 2] = ["stock-a", "stock-b"];

/// See the module.
pub(super) struct World {
    pub(super) lab: Lab,
    pub(super) devnet: Devnet,
    pub(super) ca: PathBuf,
    pub(super) nodes: Vec<Node>,
    pub(super) pods: Vec<Pod>,
    /// None where the programs are not on PATH.
    pub(super) stock: Vec<Stock>,
}

/// Whose way it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Ours,
    Bare,
    Stock,
}

/// A way to measure, by the indices of its ends: pods, or stock nodes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lane {
    pub(super) side: Side,
    pub(super) from: usize,
    pub(super) to: usize,
}

impl Lane {
    /// The other direction.
    pub(super) fn back(self) -> Self {
        Self { from: self.to, to: self.from, ..self }
    }
}

/// How packets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Direct,
    Relay,
}

impl World {
    /// Starts everything and waits until all that will be measured goes straight.
    pub(super) fn start(dir: &Path, programs: Programs, with_stock: bool) -> Result<Self> {
        let mut lab = Lab::new(dir, programs)?;
        let (devnet, ca) = lab.start_devnet(DevnetConfig::default())?;
        let mut nodes = Vec::new();
        for name in NODES {
            nodes.push(start_node(&mut lab, &devnet, &ca, name)?);
        }
        let mut stock = Vec::new();
        if let Some(programs) = stock_programs().filter(|_| with_stock) {
            for name in STOCK {
                let daemon = Stock::start(lab.add_node(name)?, &programs, &ca, &[])?;
                let key = devnet.create_auth_key(AuthKeyOptions::default());
                daemon.up(&devnet.https_url(), &key.secret, &["--accept-dns=false"])?;
                stock.push(daemon);
            }
        }
        lab.connect_pods(&nodes)?;
        let mut pods = Vec::new();
        for (n, name) in PODS {
            let node: &mut Node = &mut nodes[n];
            let mut pod = node.create_pod(name)?;
            pod.add(node)?;
            pods.push(pod);
        }
        let world = Self { lab, devnet, ca, nodes, pods, stock };
        world.wait(Way::Direct)?;
        Ok(world)
    }

    /// Between nodes: ours, tailscaled's, the bare network.
    pub(super) fn across(&self) -> Vec<Lane> {
        let (from, to) = (0, 2);
        let stock = (!self.stock.is_empty()).then_some(Lane { side: Side::Stock, from: 0, to: 1 });
        let bare = Lane { side: Side::Bare, from, to };
        [Some(Lane { side: Side::Ours, from, to }), stock, Some(bare)].into_iter().flatten().collect()
    }

    /// Between two pods of one node. There is nothing of tailscaled's to compare with.
    pub(super) fn on_one_node(&self) -> Vec<Lane> {
        let (from, to) = (0, 1);
        [Side::Ours, Side::Bare].map(|side| Lane { side, from, to }).into()
    }

    fn netns(&self, side: Side, end: usize) -> Result<&Netns> {
        match side {
            Side::Ours | Side::Bare => self.pods.get(end).map(|pod| &pod.netns),
            Side::Stock => self.stock.get(end).map(|stock| &stock.node.netns),
        }
        .context("no such end")
    }

    /// The namespaces at both ends of a lane.
    pub(super) fn ends(&self, lane: Lane) -> Result<[&Netns; 2]> {
        Ok([self.netns(lane.side, lane.from)?, self.netns(lane.side, lane.to)?])
    }

    /// Where a lane leads.
    pub(super) fn target(&self, lane: Lane, v6: bool) -> Result<IpAddr> {
        let all = match lane.side {
            Side::Ours => self.pods.get(lane.to).context("no such pod")?.addresses().to_vec(),
            Side::Bare => primary_addresses(self.pods.get(lane.to).context("no such pod")?)?,
            Side::Stock => self.stock.get(lane.to).context("no such node")?.addresses()?,
        };
        all.into_iter().find(|ip| ip.is_ipv6() == v6).context("no address of that family")
    }

    /// The processes that carry what goes along a lane: the sender's and the receiver's.
    pub(super) fn carriers(&self, lane: Lane) -> Result<Option<[u32; 2]>> {
        let of = |end: usize| match lane.side {
            Side::Bare => Ok(0),
            Side::Ours => self.engine(end),
            Side::Stock => self.stock.get(end).and_then(Stock::pid).context("tailscaled does not run"),
        };
        if lane.side == Side::Bare {
            return Ok(None);
        }
        Ok(Some([of(lane.from)?, of(lane.to)?]))
    }

    /// The engine of a pod.
    pub(super) fn engine(&self, pod: usize) -> Result<u32> {
        let (node, name) = self.place(pod)?;
        engine_pid(node, name)
    }

    fn place(&self, pod: usize) -> Result<(&Node, &str)> {
        let (node, _) = PODS.get(pod).context("no such pod")?;
        Ok((self.nodes.get(*node).context("no such node")?, &self.pods.get(pod).context("no such pod")?.name))
    }

    /// Waits until both kinds of links go this way, with pings to wake them.
    pub(super) fn wait(&self, way: Way) -> Result<()> {
        for lane in self.across().into_iter().filter(|lane| lane.side != Side::Bare) {
            let until = Instant::now() + PATIENCE;
            loop {
                let ([from, _], target) = (self.ends(lane)?, self.target(lane, false)?);
                let answers = ping::ping(from, target, 3, Duration::from_millis(10), POLL * 4)?;
                let seen = [lane, lane.back()].map(|lane| self.goes(lane));
                if answers.received == 3 && seen.iter().all(|seen| matches!(seen, Ok(seen) if *seen == way)) {
                    break;
                }
                if Instant::now() > until {
                    bail!("{:?} does not go {way:?} within {PATIENCE:?}: {seen:?}", lane.side);
                }
                std::thread::sleep(POLL);
            }
        }
        Ok(())
    }

    /// How packets of a lane go, as its sender sees it.
    pub(super) fn goes(&self, lane: Lane) -> Result<Way> {
        if lane.side == Side::Stock {
            let (from, to) = (self.stock.get(lane.from), self.stock.get(lane.to));
            let (from, to) = from.zip(to).context("no such node")?;
            let peer = from.peer(&to.name)?;
            let direct = peer["CurAddr"].as_str().is_some_and(|at| !at.is_empty());
            return Ok(if direct { Way::Direct } else { Way::Relay });
        }
        let ((node, name), target) = (self.place(lane.from)?, self.target(lane, false)?);
        let report = node.pod_report(name)?;
        let peers: Vec<PeerStatus> = serde_json::from_value(report["peers"].clone())?;
        let peer = peers.iter().find(|peer| peer.addresses.contains(&target));
        match peer.with_context(|| format!("{name} knows no {target}"))?.path {
            PathStatus::Direct { .. } => Ok(Way::Direct),
            PathStatus::Relay { .. } => Ok(Way::Relay),
            PathStatus::Idle => bail!("{name} has not used its path to {target}"),
        }
    }

    /// The end of every log, after a failure.
    pub(super) fn logs(&self) -> String {
        let ours = self.nodes.iter().map(|n| format!("--- {}\n{}\n", n.name, n.log_end(15)));
        let stock = self.stock.iter().map(|s| format!("--- {}\n{}\n", s.name, s.log_end(8)));
        ours.chain(stock).collect()
    }
}

/// A node whose supervisor serves.
pub(super) fn start_node(lab: &mut Lab, devnet: &Devnet, ca: &Path, name: &str) -> Result<Node> {
    let mut node = lab.add_node(name)?;
    node.configure(&[Tailnet::oauth("default", devnet, ca)], "")?;
    node.start_supervisor()?;
    Ok(node)
}

/// The engine of the pod called `name` on `node`.
pub(super) fn engine_pid(node: &Node, name: &str) -> Result<u32> {
    let pods = node.pods_alone()?;
    let report = pods.iter().find(|pod| pod["pod"] == name);
    let pid = report.and_then(|pod| pod["enginePid"].as_u64());
    Ok(u32::try_from(pid.with_context(|| format!("{name} has no engine"))?)?)
}

/// Those that the primary plugin gave the pod.
fn primary_addresses(pod: &Pod) -> Result<Vec<IpAddr>> {
    let ips = pod.primary_result["ips"].as_array().into_iter().flatten();
    ips.map(|ip| {
        let net: ipnet::IpNet = ip["address"].as_str().unwrap_or_default().parse()?;
        Ok(net.addr())
    })
    .collect()
}

/// Both, when they are on PATH.
pub(super) fn stock_programs() -> Option<StockPrograms> {
    let (daemon, client) = on_path("tailscaled").zip(on_path("tailscale"))?;
    Some(StockPrograms { daemon, client })
}
