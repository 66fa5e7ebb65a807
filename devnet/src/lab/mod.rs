//! A network lab: nodes behind a router, pods behind nodes, all as network namespaces of one process.
//!
//! ```text
//!            router  10.255.0.K, fd10:ffff::K   the devnets (control, DERP, STUN), forwarding
//!           /      \
//!   10.1.0.2        10.2.0.2     nodes, fd10:N::2; a supervisor each
//!     cni0            cni0       bridge of the stand-in primary CNI
//!    /    \          /    \
//!  eth0  eth0      eth0  eth0    pods, 10.244.N.P and fd44:N::P
//! ```
//!
//! Runs as root of a process of its own ([`podtether_net::isolate`]): then whatever the lab leaves goes with
//! the process. Calls block; each uses a short-lived runtime of its own.

mod headscale;
mod nat;
mod node;
mod pod;
mod programs;
mod snapshot;
mod stock;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use podtether_net::netlink::{Blackhole, Netlink, Route, VethEnd};
use podtether_net::{Netns, netns, sysctl};

pub use self::headscale::{EMBEDDED_REGION, Headscale, HeadscaleConfig};
use self::nat::nft;
pub use self::nat::{Gateway, Inside, Nat};
pub use self::node::{Node, Tailnet};
pub use self::pod::{CniCall, CniOutcome, Pod};
pub use self::programs::Programs;
pub use self::snapshot::{HostState, host_state};
pub use self::stock::{Stock, StockPrograms};
use crate::{Devnet, DevnetConfig, RegionConfig};

/// Before the rules for local addresses and the main table.
const BLACKHOLE_PRIORITY: u32 = 100;
const MTU: u32 = 1500;

/// See the module.
pub struct Lab {
    dir: PathBuf,
    programs: Programs,
    router: Netns,
    devnets: u8,
    nodes: u8,
    gateways: u8,
    /// See [`Lab::connect_pods`].
    pods_connected: bool,
}

impl Lab {
    /// An empty lab whose files live below `dir`.
    ///
    /// # Errors
    /// Without the privilege to make namespaces.
    pub fn new(dir: &Path, programs: Programs) -> Result<Self> {
        netns::prepare_dir(&dir.join("netns"))?;
        let router = make_namespace(&dir.join("netns/router"))?;
        router.run_blocking(|| {
            sysctl::write("net/ipv4/ip_forward", "1").and(sysctl::write("net/ipv6/conf/all/forwarding", "1"))
        })??;
        Ok(Self {
            dir: dir.to_owned(),
            programs,
            router,
            devnets: 0,
            nodes: 0,
            gateways: 0,
            pods_connected: false,
        })
    }

    /// Where the lab's files live.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The router's namespace.
    #[must_use]
    pub fn router(&self) -> &Netns {
        &self.router
    }

    /// Starts a devnet at the router: control, admin API, and the regions that `config` names, each with
    /// addresses of its own (10.255.R.K and fd10:ffff:R::K, R counted from 0) in both families. Its root
    /// certificate lies in `dir/devnet-K.pem`.
    ///
    /// # Errors
    /// As [`Devnet::start`].
    pub fn start_devnet(&mut self, config: DevnetConfig) -> Result<(Devnet, PathBuf)> {
        let addresses = self.server_addresses()?;
        let k = self.devnets;
        let regions: Vec<RegionConfig> = (0..=u8::MAX)
            .zip(&config.regions)
            .map(|(r, region)| RegionConfig {
                addresses: region_addresses(r, k).to_vec(),
                derp_port: 8443,
                stun_port: 3478,
                ..region.clone()
            })
            .collect();
        let more = regions.iter().flat_map(|region| region.addresses.clone());
        add_local(&self.router, &more.filter(|a| !addresses.contains(a)).collect::<Vec<_>>())?;
        let config = DevnetConfig {
            http_listen: vec![SocketAddr::new(addresses[0], 80)],
            https_listen: vec![SocketAddr::new(addresses[0], 443)],
            regions,
            ..config
        };
        let router = self.router.clone();
        let devnet = Devnet::spawn_thread(config, move || router.enter().map_err(std::io::Error::other))
            .context("start the devnet")?;
        let ca = self.dir.join(format!("devnet-{k}.pem"));
        fs::write(&ca, devnet.ca_pem())?;
        Ok((devnet, ca))
    }

    /// Adds a node behind the router.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_node(&mut self, name: &str) -> Result<Node> {
        self.nodes += 1;
        let n = self.nodes;
        let ns = make_namespace(&self.dir.join("netns").join(name))?;
        ns.run_blocking(|| {
            sysctl::write("net/ipv4/ip_forward", "1").and(sysctl::write("net/ipv6/conf/all/forwarding", "1"))
        })??;
        let port = format!("node{n}");
        block_on(async {
            let router = Netlink::open(&self.router).await?;
            let node = Netlink::open(&ns).await?;
            let uplink = VethEnd { namespace: Some(&ns), name: "eth0", mac: None, mtu: MTU };
            let near = VethEnd { namespace: None, name: &port, mac: None, mtu: MTU };
            router.add_veth(near, uplink).await?;
            let (outside, inside) = (index_of(&router, &port).await?, index_of(&node, "eth0").await?);
            for (gateway, address) in uplink_addresses(n) {
                router.add_address(outside, gateway).await?;
                node.add_address(inside, address).await?;
            }
            router.set_up(outside).await?;
            node.set_up(inside).await?;
            router.wait_running(&port).await?;
            node.wait_running("eth0").await?;
            for (gateway, _) in uplink_addresses(n) {
                node.add_route(default_route(gateway.addr(), inside)).await?;
            }
            let news = uplink_addresses(n).map(|(gateway, address)| (gateway.addr(), address.addr()));
            router.wait_local(&news.map(|(gateway, _)| gateway)).await?;
            node.wait_local(&news.map(|(_, address)| address)).await.map_err(anyhow::Error::from)
        })
        .with_context(|| format!("connect {name} to the router"))?;
        Node::new(name, n, ns, &self.dir, &self.programs)
    }

    /// Lets pods of these nodes reach each other by the addresses of their primary network.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn connect_pods(&mut self, nodes: &[Node]) -> Result<()> {
        block_on(async {
            let router = Netlink::open(&self.router).await?;
            for node in nodes {
                let n = node.number();
                let link = index_of(&router, &format!("node{n}")).await?;
                for (dst, (_, uplink)) in node::pod_networks(n).into_iter().zip(uplink_addresses(n)) {
                    let route = Route { dst, gateway: Some(uplink.addr()), link, onlink: false };
                    router.add_route(route).await?;
                }
                // The kernel asks for a neighbour on somebody else's behalf from a link-local address.
                let node = Netlink::open(&node.netns).await?;
                let own = Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1), 64);
                node.add_address(index_of(&node, "cni0").await?, own.into()).await?;
            }
            anyhow::Ok(())
        })?;
        self.pods_connected = true;
        Ok(())
    }

    /// How many nodes there are: the number of the newest.
    #[must_use]
    pub fn nodes(&self) -> u8 {
        self.nodes
    }

    /// Gives node `n` other addresses, as if it had moved to another network: 10.N.1.2 and fd10:N:1::2.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn move_node(&self, n: u8, node: &Netns) -> Result<()> {
        let port = format!("node{n}");
        block_on(async {
            let router = Netlink::open(&self.router).await?;
            let node = Netlink::open(node).await?;
            let (outside, inside) = (index_of(&router, &port).await?, index_of(&node, "eth0").await?);
            for ((old_gateway, old), (gateway, new)) in
                uplink_addresses(n).into_iter().zip(moved_addresses(n))
            {
                node.delete_route(default_route(old_gateway.addr(), inside)).await?;
                node.delete_address(inside, old).await?;
                router.delete_address(outside, old_gateway).await?;
                router.add_address(outside, gateway).await?;
                node.add_address(inside, new).await?;
                router.wait_local(&[gateway.addr()]).await?;
                node.wait_local(&[new.addr()]).await?;
                node.add_route(default_route(gateway.addr(), inside)).await?;
            }
            Ok(())
        })
    }

    /// Takes the carrier from the uplink of node `n`, or gives it back; addresses and routes stay.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn set_uplink(&self, n: u8, up: bool) -> Result<()> {
        let port = format!("node{n}");
        let key = format!("net/ipv6/conf/{port}/keep_addr_on_down");
        self.router.run_blocking(move || sysctl::write(&key, "1"))??;
        block_on(async {
            let router = Netlink::open(&self.router).await?;
            let link = index_of(&router, &port).await?;
            if up {
                router.set_up(link).await?;
                router.wait_running(&port).await.map_err(anyhow::Error::from)
            } else {
                router.set_down(link).await.map_err(anyhow::Error::from)
            }
        })
    }

    /// Drops all UDP between nodes, in both directions and families. TCP between them, and everything to
    /// the devnets (DERP, STUN, control), goes on.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn block_udp(&self) -> Result<()> {
        self.add_rules(self.udp_rules())
    }

    /// [`Lab::block_udp`] for one family alone.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn block_udp_of(&self, v6: bool) -> Result<()> {
        let rules = self.udp_rules().into_iter().filter(|rule| matches!(rule.dst, IpNet::V6(_)) == v6);
        self.add_rules(rules.collect())
    }

    fn add_rules(&self, rules: Vec<Blackhole>) -> Result<()> {
        block_on(async {
            let netlink = Netlink::open(&self.router).await?;
            for rule in rules {
                netlink.add_blackhole(rule).await?;
            }
            Ok(())
        })
    }

    /// Lets the router swallow whatever is sent to these addresses, or comes from them, without a word to
    /// anybody, or ends that with an empty list.
    ///
    /// # Errors
    /// As `nft` says.
    pub fn silence(&self, addresses: &[IpAddr]) -> Result<()> {
        let list = |v4: bool| {
            let texts: Vec<String> =
                addresses.iter().filter(|a| a.is_ipv4() == v4).map(ToString::to_string).collect();
            (!texts.is_empty()).then(|| texts.join(", "))
        };
        let rules = |hook: &str, side: &str| {
            let v4 = list(true).map(|list| format!("ip {side} {{ {list} }} drop;"));
            let v6 = list(false).map(|list| format!("ip6 {side} {{ {list} }} drop;"));
            let rules = [v4, v6].into_iter().flatten().collect::<String>();
            format!("chain {hook} {{ type filter hook {hook} priority filter; {rules} }}\n")
        };
        let chains = [rules("input", "daddr"), rules("output", "saddr"), rules("forward", "daddr")].concat();
        nft(
            &self.router,
            &format!("table inet silence\ndelete table inet silence\ntable inet silence {{ {chains} }}"),
        )
    }

    /// Undoes [`Lab::block_udp`].
    ///
    /// # Errors
    /// As the kernel says.
    pub fn unblock_udp(&self) -> Result<()> {
        let rules = self.udp_rules();
        block_on(async {
            let netlink = Netlink::open(&self.router).await?;
            for rule in rules {
                netlink.delete_blackhole(rule).await?;
            }
            Ok(())
        })
    }

    fn udp_rules(&self) -> Vec<Blackhole> {
        let nets = |n| {
            let uplink = uplink_addresses(n).map(|(_, address)| address.trunc());
            let pods = node::pod_networks(n).into_iter().filter(|_| self.pods_connected);
            uplink.into_iter().chain(pods)
        };
        let mut rules = Vec::new();
        for (a, b) in (1..=self.nodes).flat_map(|a| (1..=self.nodes).map(move |b| (a, b))) {
            if a != b {
                let pairs = nets(a).flat_map(|src| nets(b).map(move |dst| (src, dst)));
                let pairs = pairs.filter(|(src, dst)| src.addr().is_ipv4() == dst.addr().is_ipv4());
                rules.extend(pairs.map(|(src, dst)| Blackhole {
                    priority: BLACKHOLE_PRIORITY,
                    src,
                    dst,
                    udp_only: true,
                }));
            }
        }
        rules
    }
}

/// Of region number `r` of devnet `k`; the first region's are the control server's too.
fn region_addresses(r: u8, k: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd10, 0xffff, r.into(), 0, 0, 0, 0, k.into());
    [Ipv4Addr::new(10, 255, r, k).into(), v6.into()]
}

/// The router's and the node's address on the link of node `n`, IPv4 and IPv6.
fn uplink_addresses(n: u8) -> [(IpNet, IpNet); 2] {
    let v4 = |host| IpNet::from(Ipv4Net::new_assert(Ipv4Addr::new(10, n, 0, host), 24));
    let v6 =
        |host| IpNet::from(Ipv6Net::new_assert(Ipv6Addr::new(0xfd10, n.into(), 0, 0, 0, 0, 0, host), 64));
    [(v4(1), v4(2)), (v6(1), v6(2))]
}

/// The same after [`Lab::move_node`].
fn moved_addresses(n: u8) -> [(IpNet, IpNet); 2] {
    let v4 = |host| IpNet::from(Ipv4Net::new_assert(Ipv4Addr::new(10, n, 1, host), 24));
    let v6 =
        |host| IpNet::from(Ipv6Net::new_assert(Ipv6Addr::new(0xfd10, n.into(), 1, 0, 0, 0, 0, host), 64));
    [(v4(1), v4(2)), (v6(1), v6(2))]
}

/// Gives the loopback of `ns` addresses and waits until they are in use.
fn add_local(ns: &Netns, addresses: &[IpAddr]) -> Result<()> {
    block_on(async {
        let netlink = Netlink::open(ns).await?;
        let lo = index_of(&netlink, "lo").await?;
        for address in addresses {
            netlink.add_address(lo, (*address).into()).await?;
        }
        netlink.wait_local(addresses).await.map_err(anyhow::Error::from)
    })
}

fn default_route(gateway: IpAddr, link: u32) -> Route {
    let dst: IpNet = match gateway {
        IpAddr::V4(_) => Ipv4Net::default().into(),
        IpAddr::V6(_) => Ipv6Net::default().into(),
    };
    Route { dst, gateway: Some(gateway), link, onlink: false }
}

/// A namespace pinned at `path`, with a loopback that is up, as every node and pod has.
fn make_namespace(path: &Path) -> Result<Netns> {
    block_on(async {
        let ns = Netns::ensure_pinned(path).await?;
        let netlink = Netlink::open(&ns).await?;
        let lo = index_of(&netlink, "lo").await?;
        netlink.set_up(lo).await?;
        Ok(ns)
    })
}

async fn index_of(netlink: &Netlink, name: &str) -> Result<u32> {
    match netlink.link(name).await? {
        Some(link) => Ok(link.index),
        None => bail!("no interface {name}"),
    }
}

fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("tokio runtime")?
        .block_on(future)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use podtether_net::testing::in_namespaces;

    use super::*;
    use crate::probe::{ping, tcp, udp};

    fn programs() -> Programs {
        let none = || PathBuf::from("/nonexistent");
        Programs { supervisor: none(), engine: none(), tool: none(), cni: none() }
    }

    #[test]
    fn nodes_reach_each_other_and_the_devnet_and_udp_can_be_blocked() {
        in_namespaces("lab::tests::nodes_reach_each_other_and_the_devnet_and_udp_can_be_blocked", |dir| {
            let mut lab = Lab::new(dir, programs()).unwrap();
            let (devnet, ca) = lab.start_devnet(DevnetConfig::default()).unwrap();
            let (one, two) = (lab.add_node("one").unwrap(), lab.add_node("two").unwrap());
            assert!(fs::read_to_string(ca).unwrap().contains("BEGIN CERTIFICATE"));
            let limit = Duration::from_secs(5);
            let control = devnet.https_addresses()[0];
            assert_eq!(control, "10.255.0.1:443".parse().unwrap());
            assert!(tcp::connect(&one.netns, control, limit).unwrap().is_some());
            assert!(
                tcp::connect(&two.netns, "[fd10:ffff::1]:8443".parse().unwrap(), limit).unwrap().is_some()
            );
            for target in ["10.2.0.2", "fd10:2::2"] {
                let report =
                    ping::ping(&one.netns, target.parse().unwrap(), 3, Duration::from_millis(5), limit)
                        .unwrap();
                assert_eq!(report.lost(), 0, "{target}");
            }

            let echo = udp::UdpEcho::start(&two.netns, "[::]:7".parse().unwrap()).unwrap();
            let asked = |ns: &Netns, target: &str, limit| {
                udp::ask(ns, target.parse().unwrap(), b"x", limit).unwrap().is_some()
            };
            assert!(asked(&one.netns, "10.2.0.2:7", limit) && asked(&one.netns, "[fd10:2::2]:7", limit));
            lab.block_udp().unwrap();
            lab.block_udp().unwrap();
            let short = Duration::from_millis(100);
            assert!(!asked(&one.netns, "10.2.0.2:7", short) && !asked(&one.netns, "[fd10:2::2]:7", short));
            let _server = tcp::TcpServer::start(&two.netns, "10.2.0.2:70".parse().unwrap(), tcp::Serve::Echo);
            assert!(tcp::connect(&one.netns, "10.2.0.2:70".parse().unwrap(), limit).unwrap().is_some());
            lab.unblock_udp().unwrap();
            lab.unblock_udp().unwrap();
            assert!(asked(&one.netns, "10.2.0.2:7", limit) && asked(&one.netns, "[fd10:2::2]:7", limit));
            drop(echo);
        });
    }

    #[test]
    fn pods_reach_each_other_through_the_primary_network_and_leave_no_trace() {
        in_namespaces(
            "lab::tests::pods_reach_each_other_through_the_primary_network_and_leave_no_trace",
            |dir| {
                let mut lab = Lab::new(dir, programs()).unwrap();
                let mut node = lab.add_node("one").unwrap();
                let before = node.host_state().unwrap();
                assert!(before.diff(&before).is_empty());
                let (a, b) = (node.create_pod("a").unwrap(), node.create_pod("b").unwrap());
                for target in ["10.244.1.3", "fd44:1::3"] {
                    let limit = Duration::from_secs(5);
                    let target = target.parse().unwrap();
                    let report = ping::ping(&a.netns, target, 3, Duration::from_millis(5), limit).unwrap();
                    assert_eq!(report.lost(), 0, "{target}");
                }
                let during = before.diff(&node.host_state().unwrap());
                assert!(
                    during.iter().any(|l| l.starts_with("+ link: ") && l.contains("veth1")),
                    "{during:?}"
                );
                assert!(during.iter().any(|l| l.starts_with("+ mount: ")), "{during:?}");
                a.destroy(&node).unwrap();
                b.destroy(&node).unwrap();
                assert_eq!(before.diff(&node.host_state().unwrap()), [""; 0]);
            },
        );
    }
}
