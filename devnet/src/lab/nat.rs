//! Gateways that translate addresses, made with nftables: what stands between most nodes and the internet.
//!
//! ```text
//!   router ── eth0  gateway  lan1 ── eth0  a host, 192.168.G.2
//!                            lan2 ── eth0  a host, 192.168.G.6 (or another gateway)
//! ```

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use ipnet::{IpNet, Ipv4Net};
use podtether_net::netlink::{Netlink, VethEnd};
use podtether_net::{Netns, sysctl};

use super::{Lab, MTU, Node, block_on, default_route, index_of, make_namespace};

/// What a gateway does with UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nat {
    /// One port for all destinations, answers from where was sent to.
    PortRestricted,
    /// One port for all destinations, open to every port of an address that was sent to from it within the
    /// last minute.
    AddressRestricted,
    /// A random port for each destination.
    Symmetric,
    /// One port for all destinations, open to everybody: all UDP is forwarded to the first host.
    FullCone,
    /// UDP goes nowhere; TCP does.
    NoUdp,
}

/// Whose the mapped ports are, and to whom was sent from each. The chain follows the translation, so that it
/// sees the mapped port; in a flow that began outside, the host is the one that replies.
const ADDRESS_RESTRICTED: &str = "
    set contacted { type ipv4_addr . inet_service; size 65535; flags dynamic, timeout; timeout 60s; }
    map mapped { type inet_service : ipv4_addr . inet_service; size 65535; flags dynamic, timeout; timeout 60s; }
    chain note {
        ct direction original update @mapped { udp sport : ct original ip saddr . ct original proto-src }
        ct direction reply update @mapped { udp sport : ct reply ip saddr . ct reply proto-src }
        update @contacted { ip daddr . udp sport }
    }
    chain left { type filter hook postrouting priority srcnat + 10; oifname \"eth0\" meta l4proto udp jump note; }";

/// A gateway's namespace.
pub struct Gateway {
    /// The namespace.
    pub netns: Netns,
    nat: Nat,
    number: u8,
    hosts: u8,
    outside: Ipv4Addr,
}

/// A host behind a gateway.
pub struct Inside {
    /// The namespace.
    pub netns: Netns,
    /// Its one address.
    pub address: Ipv4Addr,
}

impl Lab {
    /// Adds a gateway behind the router.
    ///
    /// # Errors
    /// As the kernel says, or when there is no `nft`.
    pub fn add_gateway(&mut self, name: &str, nat: Nat) -> Result<Gateway> {
        let node = self.add_node(name)?;
        let outside = Ipv4Addr::new(10, self.nodes, 0, 2);
        self.gateway(node.netns.clone(), nat, outside)
    }

    /// Adds a gateway behind another one.
    ///
    /// # Errors
    /// As [`Lab::add_gateway`].
    pub fn add_gateway_behind(&mut self, name: &str, outer: &mut Gateway, nat: Nat) -> Result<Gateway> {
        let Inside { netns, address } = self.add_host_behind(name, outer)?;
        self.gateway(netns, nat, address)
    }

    fn gateway(&mut self, netns: Netns, nat: Nat, outside: Ipv4Addr) -> Result<Gateway> {
        self.gateways += 1;
        netns.run_blocking(|| sysctl::write("net/ipv4/ip_forward", "1"))??;
        let gateway = Gateway { netns, nat, number: self.gateways, hosts: 0, outside };
        gateway.nft(&gateway.rules())?;
        gateway.set_udp(nat != Nat::NoUdp)?;
        Ok(gateway)
    }

    /// Adds a host with an IPv4 address behind a gateway. Hosts of one gateway reach each other.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_host_behind(&mut self, name: &str, gateway: &mut Gateway) -> Result<Inside> {
        let (near, host) = gateway.leg(gateway.hosts);
        gateway.hosts += 1;
        let netns = make_namespace(&self.dir.join("netns").join(name))?;
        let port = format!("lan{}", gateway.hosts);
        block_on(async {
            let outer = Netlink::open(&gateway.netns).await?;
            let inner = Netlink::open(&netns).await?;
            let far = VethEnd { namespace: Some(&netns), name: "eth0", mac: None, mtu: MTU };
            outer.add_veth(VethEnd { namespace: None, name: &port, mac: None, mtu: MTU }, far).await?;
            let (outside, inside) = (index_of(&outer, &port).await?, index_of(&inner, "eth0").await?);
            outer.add_address(outside, near).await?;
            inner.add_address(inside, host).await?;
            outer.set_up(outside).await?;
            inner.set_up(inside).await?;
            outer.wait_running(&port).await?;
            inner.wait_running("eth0").await?;
            inner.add_route(default_route(near.addr(), inside)).await.map_err(anyhow::Error::from)
        })
        .with_context(|| format!("connect {name} to its gateway"))?;
        let IpAddr::V4(address) = host.addr() else { bail!("hosts behind gateways have IPv4") };
        Ok(Inside { netns, address })
    }

    /// Adds a node with an IPv4 address behind a gateway.
    ///
    /// # Errors
    /// As [`Lab::add_node`].
    pub fn add_node_behind(&mut self, name: &str, gateway: &mut Gateway) -> Result<Node> {
        let Inside { netns, .. } = self.add_host_behind(name, gateway)?;
        self.nodes += 1;
        Node::new(name, self.nodes, netns, &self.dir, &self.programs)
    }
}

impl Gateway {
    /// The gateway's and the host's address on the link of host `n`.
    fn leg(&self, n: u8) -> (IpNet, IpNet) {
        let net = |last| Ipv4Net::new_assert(Ipv4Addr::new(192, 168, self.number, last), 30).into();
        (net(4 * n + 1), net(4 * n + 2))
    }

    /// The address of host `n`, from 0.
    #[must_use]
    pub fn inside(&self, n: u8) -> IpAddr {
        self.leg(n).1.addr()
    }

    fn rules(&self) -> String {
        let masquerade = match self.nat {
            Nat::PortRestricted | Nat::AddressRestricted | Nat::FullCone | Nat::NoUdp => "masquerade",
            Nat::Symmetric => "masquerade fully-random",
        };
        let (_, first) = self.leg(0);
        let (noted, open) = match self.nat {
            Nat::AddressRestricted => (
                ADDRESS_RESTRICTED,
                "iifname \"eth0\" ip saddr . udp dport @contacted dnat ip to udp dport map @mapped"
                    .to_owned(),
            ),
            Nat::FullCone => ("", format!("iifname \"eth0\" meta l4proto udp dnat to {}", first.addr())),
            Nat::PortRestricted | Nat::Symmetric | Nat::NoUdp => ("", String::new()),
        };
        // What is not forwarded is dropped before conntrack remembers it, as real gateways do: else a peer
        // that knocks first takes the port away from the host that would answer.
        format!(
            "table ip lab {{
                {noted}
                chain blocked {{ }}
                chain after {{ type nat hook postrouting priority srcnat; oifname \"eth0\" {masquerade}; }}
                chain before {{ type nat hook prerouting priority dstnat; {open}; }}
                chain local {{ type filter hook input priority filter; iifname != \"lo\" meta l4proto udp drop; }}
                chain through {{ type filter hook forward priority filter; jump blocked; }}
            }}"
        )
        .replace("; ; }", "; }")
    }

    /// Lets UDP through, or not.
    ///
    /// # Errors
    /// As `nft` says.
    pub fn set_udp(&self, on: bool) -> Result<()> {
        self.nft("flush chain ip lab blocked")?;
        if on { Ok(()) } else { self.nft("add rule ip lab blocked meta l4proto udp drop") }
    }

    /// Keeps its hosts apart, as guest networks do.
    ///
    /// # Errors
    /// As `nft` says.
    pub fn isolate_hosts(&self) -> Result<()> {
        self.nft(
            "add rule ip lab through iifname \"lan*\" oifname \"lan*\" ct status dnat accept
             add rule ip lab through iifname \"lan*\" oifname \"lan*\" drop",
        )
    }

    /// Forwards a UDP port of the outside to a host, also for the other hosts (hairpin).
    ///
    /// # Errors
    /// As `nft` says.
    pub fn forward_port(&self, port: u16, to: &Inside) -> Result<()> {
        let (outside, host) = (self.outside, to.address);
        self.nft(&format!(
            "add rule ip lab before ip daddr {outside} udp dport {port} dnat to {host}
             add rule ip lab after iifname \"lan*\" oifname \"lan*\" ip saddr {host} udp sport {port} snat to {outside}"
        ))
    }

    fn nft(&self, script: &str) -> Result<()> {
        nft(&self.netns, script)
    }
}

/// Runs an `nft` script in a namespace.
pub(super) fn nft(netns: &Netns, script: &str) -> Result<()> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child =
        netns.run_blocking(|| command.spawn())?.context("run nft; the package nftables has it")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("nft: {}\n{script}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
