//! Which of the node's addresses peers may reach, and when that changes.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use rtnetlink::constants::{
    RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE, RTMGRP_LINK,
};

use crate::error::Result;
use crate::link::tailnet_ranges;
use crate::netlink::events::Events;
use crate::netlink::{Address, Link, Netlink, Route};
use crate::netns::Netns;

/// More addresses than this help no peer.
const MAX_ADDRESSES: usize = 16;
/// Changes come in bursts: an interface that comes up is several events, a pod that starts is some more.
const SETTLE: Duration = Duration::from_millis(100);
/// Looking takes at most one part in so many of the time, however many interfaces a node has.
const LOOK_SHARE: u32 = 10;
/// But a change is seen within this.
const MAX_SETTLE: Duration = Duration::from_secs(1);

/// Watches a namespace for changes of its reachable addresses.
#[derive(Debug)]
pub struct Monitor {
    netlink: Netlink,
    events: Events,
    known: Vec<IpAddr>,
    settle: Duration,
}

impl Monitor {
    /// Starts watching `ns`.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn open(ns: &Netns) -> Result<Self> {
        let groups =
            RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE;
        let events = Events::open(ns, groups).await?;
        let netlink = Netlink::open(ns).await?;
        let known = addresses(&netlink).await?;
        Ok(Self { netlink, events, known, settle: SETTLE })
    }

    /// The addresses as last seen, in a stable order.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.known
    }

    /// Waits until the addresses differ from those seen last, and returns them. Can be dropped and called
    /// again.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn changed(&mut self) -> Result<&[IpAddr]> {
        loop {
            self.events.wait().await?;
            tokio::time::sleep(self.settle).await;
            self.events.forget();
            let begun = Instant::now();
            let now = addresses(&self.netlink).await?;
            self.settle = settle(begun.elapsed());
            if now != self.known {
                self.known = now;
                return Ok(&self.known);
            }
        }
    }
}

/// How long to wait for a burst's end when the last look took `took`.
fn settle(took: Duration) -> Duration {
    (took * (LOOK_SHARE - 1)).clamp(SETTLE, MAX_SETTLE)
}

/// The node's reachable addresses now.
///
/// # Errors
/// As the kernel says.
pub async fn addresses(netlink: &Netlink) -> Result<Vec<IpAddr>> {
    let links = netlink.links().await?;
    let routes = netlink.routes().await?;
    Ok(choose(&links, &netlink.addresses().await?, &routes))
}

/// Kinds of links that carry other networks over the node's own: a peer that reached the node through one
/// would do so inside the cluster's network, a VPN or another tailnet, or (dummies) not at all. kube-proxy's
/// and the local DNS cache's service addresses lie on dummies.
const OVERLAYS: [&str; 13] = [
    "tun",
    "wireguard",
    "vxlan",
    "geneve",
    "gre",
    "gretap",
    "ip6gre",
    "ipip",
    "sit",
    "ip6tnl",
    "dummy",
    "ifb",
    "openvswitch",
];

/// Whether the link leads to other machines by itself, whatever its name.
fn may_be_uplink(link: &Link, has_default: bool) -> bool {
    let kind = link.kind.as_deref().unwrap_or_default();
    if OVERLAYS.contains(&kind) {
        return false;
    }
    // A bridge or a veth with the default route is the uplink of a hypervisor, or of a node that is a
    // container. Without it a bridge is the one between pods, a port of a bridge has no address to reach,
    // and a veth pair with both ends here joins two parts of a CNI.
    let inner = kind == "bridge" || link.master.is_some() || kind == "veth" && !link.peer_elsewhere;
    has_default || !inner
}

/// Addresses of the interfaces that have a default route: those are the node's own way out, and a CNI's
/// bridges and tunnels have none. On a node without one, every address that is not a CNI's.
fn choose(links: &[Link], addresses: &[Address], routes: &[Route]) -> Vec<IpAddr> {
    let has_default = |link: &Link| routes.iter().any(|r| r.dst.prefix_len() == 0 && r.link == link.index);
    let uplinks: BTreeSet<u32> =
        links.iter().filter(|l| has_default(l) && may_be_uplink(l, true)).map(|l| l.index).collect();
    let usable = |address: &&Address| {
        let Some(link) = links.iter().find(|l| l.index == address.link) else { return false };
        let on_uplink =
            if uplinks.is_empty() { may_be_uplink(link, false) } else { uplinks.contains(&link.index) };
        let ip = address.net.addr();
        // Of another tailnet node on this machine.
        let tailnet = tailnet_ranges().iter().any(|range| range.contains(&ip));
        link.up && on_uplink && address.global && address.stable && !ip.is_loopback() && !tailnet
    };
    let found: BTreeSet<IpAddr> = addresses.iter().filter(usable).map(|a| a.net.addr()).collect();
    found.into_iter().take(MAX_ADDRESSES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::VethEnd;
    use crate::testing::{block_on, in_namespaces};

    #[test]
    fn looking_takes_a_tenth_of_the_time_at_most() {
        for (took_ms, settle_ms) in [(0, 100), (11, 100), (50, 450), (500, 1000), (60_000, 1000)] {
            assert_eq!(
                settle(Duration::from_millis(took_ms)),
                Duration::from_millis(settle_ms),
                "{took_ms} ms"
            );
        }
    }

    fn link(index: u32, kind: Option<&str>, master: Option<u32>) -> Link {
        Link {
            index,
            name: format!("l{index}"),
            up: true,
            running: true,
            multicast: true,
            mtu: 1500,
            mac: None,
            alias: None,
            kind: kind.map(Into::into),
            peer: None,
            peer_elsewhere: false,
            master,
        }
    }

    fn address(link: u32, net: &str) -> Address {
        Address { link, net: net.parse().unwrap(), global: true, stable: true }
    }

    fn texts(addresses: &[IpAddr]) -> Vec<String> {
        addresses.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn uplinks_are_the_interfaces_with_a_default_route() {
        let links = [
            link(1, None, None),
            link(2, None, None),
            link(3, Some("bridge"), None),
            link(4, Some("tun"), None),
        ];
        let addresses = [
            address(1, "10.0.0.5/24"),
            address(1, "2001:db8::5/64"),
            Address { stable: false, ..address(1, "2001:db8::abcd/64") },
            Address { global: false, ..address(1, "fe80::1/64") },
            address(1, "100.101.102.103/32"),
            address(2, "192.168.7.1/24"),
            address(3, "10.244.0.1/24"),
            address(4, "100.64.0.9/32"),
            address(9, "1.2.3.4/32"),
        ];
        let default = Route { dst: "0.0.0.0/0".parse().unwrap(), gateway: None, link: 1, onlink: false };
        let other = Route { dst: "10.9.0.0/16".parse().unwrap(), ..default };
        let chosen = choose(&links, &addresses, &[default, Route { link: 2, ..other }]);
        assert_eq!(texts(&chosen), ["10.0.0.5", "2001:db8::5"]);
        let without = choose(&links, &addresses, &[]);
        assert_eq!(texts(&without), ["10.0.0.5", "192.168.7.1", "2001:db8::5"]);
    }

    #[test]
    fn no_address_of_a_cni_a_vpn_or_a_service_is_offered() {
        let veth = |index, peer_elsewhere| Link { peer_elsewhere, ..link(index, Some("veth"), None) };
        let links = [
            link(1, None, None),                                              // eth0
            link(2, Some("bridge"), None),                                    // cni0, docker0
            link(3, Some("vxlan"), None),                                     // flannel.1, vxlan.calico
            link(4, Some("ipip"), None),                                      // tunl0
            link(5, Some("dummy"), None),                                     // kube-ipvs0, nodelocaldns
            link(6, Some("tun"), None),                                       // tailscale0
            link(7, Some("wireguard"), None),                                 // wireguard.cali, cilium_wg0
            veth(8, false),                                                   // cilium_host
            link(9, Some("geneve"), None),                                    // genev_sys
            link(10, Some("openvswitch"), None),                              // ovn-k8s-mp0, antrea-gw0
            Link { peer_elsewhere: true, ..link(11, Some("veth"), Some(2)) }, // a pod's
        ];
        let addresses: Vec<Address> =
            links.iter().map(|l| address(l.index, &format!("10.0.{}.5/24", l.index))).collect();
        let default = |link| Route { dst: "0.0.0.0/0".parse().unwrap(), gateway: None, link, onlink: false };
        assert_eq!(texts(&choose(&links, &addresses, &[default(1)])), ["10.0.1.5"]);
        assert_eq!(texts(&choose(&links, &addresses, &[])), ["10.0.1.5"]);
        // A VPN that takes the default route is not the way to be reached.
        assert_eq!(texts(&choose(&links, &addresses, &[default(1), default(6)])), ["10.0.1.5"]);
        assert_eq!(texts(&choose(&links, &addresses, &[default(7)])), ["10.0.1.5"]);
        // A node in a container, and a hypervisor's bridge.
        let node = [veth(1, true), link(2, Some("bridge"), None)];
        assert_eq!(texts(&choose(&node, &addresses, &[default(1)])), ["10.0.1.5"]);
        assert_eq!(texts(&choose(&node, &addresses, &[])), ["10.0.1.5"]);
        assert_eq!(texts(&choose(&node, &addresses, &[default(2)])), ["10.0.2.5"]);
    }

    #[test]
    fn links_of_the_kernel_are_told_apart_by_kind() {
        in_namespaces("underlay::tests::links_of_the_kernel_are_told_apart_by_kind", |_| {
            block_on(async {
                let netlink = Netlink::open(&Netns::current().unwrap()).await.unwrap();
                let inner = Netns::create().await.unwrap();
                let end = |name| VethEnd { namespace: None, name, mac: None, mtu: 1500 };
                let away = VethEnd { namespace: Some(&inner), ..end("far") };
                // Names say nothing: the uplink is called as a CNI's bridge is.
                netlink.add_veth(end("cni0"), away).await.unwrap();
                netlink.add_veth(end("eth7"), end("eth8")).await.unwrap();
                netlink.add_bridge("eth0").await.unwrap();
                for (name, net) in [("cni0", "10.1.0.1/24"), ("eth7", "10.2.0.1/24"), ("eth0", "10.3.0.1/24")]
                {
                    let index = netlink.link(name).await.unwrap().unwrap().index;
                    netlink.set_up(index).await.unwrap();
                    netlink.add_address(index, net.parse().unwrap()).await.unwrap();
                }
                let offered = addresses(&netlink).await.unwrap();
                assert_eq!(texts(&offered), ["10.1.0.1"]);
            });
        });
    }

    #[test]
    fn a_change_is_reported_once_and_only_when_it_matters() {
        in_namespaces("underlay::tests::a_change_is_reported_once_and_only_when_it_matters", |_| {
            block_on(async {
                let here = Netns::current().unwrap();
                let netlink = Netlink::open(&here).await.unwrap();
                let end = |name| VethEnd { namespace: None, name, mac: None, mtu: 1500 };
                netlink.add_veth(end("up0"), end("up1")).await.unwrap();
                let index = netlink.link("up0").await.unwrap().unwrap().index;
                let other = netlink.link("up1").await.unwrap().unwrap().index;
                netlink.set_up(index).await.unwrap();
                netlink.set_up(other).await.unwrap();
                netlink.add_address(index, "10.1.0.1/24".parse().unwrap()).await.unwrap();
                let gateway = Some("10.1.0.254".parse().unwrap());
                let dst = "0.0.0.0/0".parse().unwrap();
                netlink.add_route(Route { dst, gateway, link: index, onlink: false }).await.unwrap();

                let mut monitor = Monitor::open(&here).await.unwrap();
                assert_eq!(texts(monitor.addresses()), ["10.1.0.1"]);
                // Not on an uplink: no news.
                netlink.add_address(other, "10.2.0.1/24".parse().unwrap()).await.unwrap();
                let quiet = tokio::time::timeout(Duration::from_millis(400), monitor.changed()).await;
                assert!(quiet.is_err());
                netlink.add_address(index, "10.1.0.2/24".parse().unwrap()).await.unwrap();
                let news = tokio::time::timeout(Duration::from_secs(5), monitor.changed()).await;
                assert_eq!(texts(news.unwrap().unwrap()), ["10.1.0.1", "10.1.0.2"]);
            });
        });
    }
}
