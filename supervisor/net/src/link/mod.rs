//! A pod's link, from `ts0` in the pod through a namespace of its own to the TUN an engine reads.
//!
//! ```text
//! pod namespace    ts0   the tailnet addresses; tailnet ranges via 169.254.1.1 and fe80::1, onlink
//!                   |    veth
//! link namespace   pod0  permanent neighbours for the pod's addresses; forwarding on
//!                  lo    100.100.100.100 and fd7a:115c:a1e0::53, for the engine's own services
//!                  tun0  persistent; default routes
//! ```
//!
//! Both ends of the veth know each other's hardware address as a permanent neighbour, and neither side
//! has link-local addresses or multicast: nothing but the pod's own packets ever reaches the TUN.
//!
//! Every function states what should be and can be repeated; making, re-adopting and repairing a link are
//! the same call.

mod apply;
mod look;
mod plan;
mod routes;
#[cfg(test)]
mod tests;
mod wanted;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use ipnet::IpNet;

use self::apply::{observe, settle};
pub use self::look::{Device, Fault, Seen, look};
use self::plan::Wanted;
pub use self::routes::{subtract, tailnet_ranges, tailnet_routes};
use self::wanted::{Others, configured};
use crate::error::{Error, Result};
use crate::netlink::{self, Mac, Netlink, VethEnd};
use crate::netns::{self, Netns};
use crate::sockets;
use crate::sysctl;
use crate::tun;

/// The TUN's name in every link namespace.
pub const TUN_NAME: &str = "tun0";
/// The veth's name on the link's side.
pub const LINK_SIDE_NAME: &str = "pod0";
/// Next hop of the pod's IPv4 routes; exists only as a permanent neighbour.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// Next hop of the pod's IPv6 routes; exists only as a permanent neighbour.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// MagicDNS.
pub const SERVICE_V4: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 100);
/// MagicDNS.
pub const SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53);

/// Which link: enough to find, make, check and remove it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkSpec {
    /// Names the link on this node: a file name of up to 200 letters, digits, `-`, `_`, `.`.
    pub id: String,
    /// Where namespaces are pinned; [`netns::prepare_dir`] made it.
    pub netns_dir: PathBuf,
    /// The pod's namespace.
    pub pod_netns: PathBuf,
    /// Interface in the pod.
    pub ifname: String,
    /// MTU of the whole link.
    pub mtu: u32,
}

/// What the pod should have on its interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodConfig {
    /// Addresses (/32 and /128).
    pub addresses: Vec<IpNet>,
    /// Destinations routed into the link, see [`tailnet_routes`].
    pub routes: Vec<IpNet>,
    /// Further destinations; one that the pod's other interfaces lead to by more than a default route is
    /// left to them.
    pub accepted: Vec<IpNet>,
    /// Everything else goes into the link too, with these exceptions.
    pub exit: Option<Exit>,
}

/// What stays outside while everything else goes through an exit node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exit {
    /// Destinations that go as the pod's main table has them, by its default routes too.
    pub bypass: Vec<IpNet>,
}

/// A link that is there.
#[derive(Debug)]
pub struct Link {
    /// The link's namespace.
    pub namespace: Netns,
    /// The pod's.
    pub pod: Netns,
    /// Index of the pod's interface.
    pub ifindex: u32,
    /// Its hardware address.
    pub mac: Mac,
    /// What the pod's side offers for IPv6.
    pub ipv6: Ipv6,
    /// The TUN's descriptor, when this call had to make the device.
    tun: Option<OwnedFd>,
}

/// MagicDNS at one address.
#[derive(Debug)]
pub struct DnsSockets {
    /// Bound.
    pub udp: UdpSocket,
    /// Listening.
    pub tcp: TcpListener,
}

/// Whether IPv6 works on a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv6 {
    /// It does.
    Available,
    /// The kernel has none.
    NotInKernel,
    /// `disable_ipv6` is set in the pod's namespace; what the pod's owner switched off stays off.
    DisabledInPod,
}

/// What [`configure_pod`] made true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configured {
    /// Addresses on the interface, in the order given.
    pub addresses: Vec<IpNet>,
    /// Routes with their next hops.
    pub routes: Vec<(IpNet, IpAddr)>,
    /// The way to the exit node.
    pub exit: Option<ExitMade>,
    /// Why there may be no IPv6 among them.
    pub ipv6: Ipv6,
}

/// Default routes into the link, in a table of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitMade {
    /// The table's number.
    pub table: u32,
    /// Routes with their next hops.
    pub routes: Vec<(IpNet, IpAddr)>,
}

impl LinkSpec {
    /// Where the link's namespace is pinned.
    #[must_use]
    pub fn pin(&self) -> PathBuf {
        self.netns_dir.join(&self.id)
    }

    fn check(&self) -> Result<()> {
        tun::check_name(&self.ifname)?;
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if self.id.is_empty()
            || self.id.len() > 200
            || self.id.starts_with('.')
            || !self.id.bytes().all(plain)
        {
            return Err(Error::Invalid {
                what: "link id",
                reason: format!("{:?} is not a file name", self.id),
            });
        }
        Ok(())
    }

    /// Opens the pod's namespace, which must not be the node's.
    fn open_pod(&self) -> Result<Netns> {
        let pod = Netns::open(&self.pod_netns).map_err(|e| match (e, self.hidden()) {
            (Error::NamespaceGone { .. }, Some(dir)) => Error::NamespacesHidden { dir },
            (e, _) => e,
        })?;
        if pod == Netns::current()? {
            return Err(Error::HostNamespace { path: self.pod_netns.clone() });
        }
        Ok(pod)
    }

    /// The directory that pods' namespaces should be in, if it is not there. In `/proc` directories go with their
    /// processes.
    fn hidden(&self) -> Option<PathBuf> {
        let dir = self.pod_netns.parent()?;
        (!dir.starts_with("/proc") && !dir.exists()).then(|| dir.to_owned())
    }
}

impl Link {
    /// Whether the TUN had to be made: a descriptor of an earlier one leads nowhere.
    #[must_use]
    pub fn made_tun(&self) -> bool {
        self.tun.is_some()
    }

    /// The TUN's descriptor: made by this call of [`ensure_link`], or attached to again.
    ///
    /// # Errors
    /// [`Error::TunBusy`] while an engine or an earlier call's descriptor lives.
    pub async fn open_tun(&mut self) -> Result<OwnedFd> {
        match self.tun.take() {
            Some(tun) => Ok(tun),
            None => tun::open(&self.namespace, TUN_NAME).await,
        }
    }

    /// Sockets on port 53 of the service addresses, for the engine to answer on; IPv4 first.
    ///
    /// # Errors
    /// When somebody has them: an engine of this link still lives.
    pub async fn open_dns(&self) -> Result<Vec<DnsSockets>> {
        let mut services = vec![IpAddr::from(SERVICE_V4)];
        if self.ipv6 != Ipv6::NotInKernel {
            services.push(SERVICE_V6.into());
        }
        let mut sockets = Vec::new();
        for service in services {
            let address = SocketAddr::new(service, 53);
            let udp = sockets::udp_in(&self.namespace, address).await?;
            let tcp = sockets::tcp_in(&self.namespace, address).await?;
            sockets.push(DnsSockets { udp, tcp });
        }
        Ok(sockets)
    }
}

/// Makes whatever of the link is missing, repairs what differs, and leaves addresses and routes alone.
///
/// # Errors
/// [`Error::NamespaceGone`], [`Error::NamespacesHidden`] and [`Error::HostNamespace`] for the pod's namespace,
/// [`Error::InterfaceExists`] for an interface of that name that is not this link's.
pub async fn ensure_link(spec: &LinkSpec) -> Result<Link> {
    spec.check()?;
    let pod = spec.open_pod()?;
    let in_pod = Netlink::open(&pod).await?;
    // Asked before anything is made: a pod that cannot have the link leaves no trace.
    ours_in_pod(spec, &in_pod).await?;
    let namespace = Netns::ensure_pinned(&spec.pin()).await?;
    let in_link = Netlink::open(&namespace).await?;
    let v6 = ipv6_in_kernel(&namespace).await?;
    // Defaults first, so that the devices are born with them.
    settle(&namespace, &in_link, &Wanted { devices: vec![], ..spec.link_side(v6, None) }).await?;
    let tun = match in_link.link(TUN_NAME).await? {
        Some(_) => None,
        None => Some(tun::open(&namespace, TUN_NAME).await?),
    };
    ensure_pair(spec, &in_link, &in_pod, &pod).await?;
    settle(&namespace, &in_link, &spec.link_side(v6, None)).await?;
    let ipv6 = ipv6_of(spec, &pod, v6).await?;
    settle(&pod, &in_pod, &spec.pod_side(ipv6 == Ipv6::Available, None, &Others::default())).await?;
    in_link.wait_running(LINK_SIDE_NAME).await?;
    in_pod.wait_running(&spec.ifname).await?;
    let ifindex = in_pod
        .link(&spec.ifname)
        .await?
        .ok_or_else(|| Error::Broken { what: format!("{} is missing", spec.ifname) })?
        .index;
    Ok(Link { namespace, pod, ifindex, mac: spec.pod_mac(), ipv6, tun })
}

/// Gives the pod exactly these addresses and routes on its interface, and the link's side the way back.
///
/// # Errors
/// As the kernel says.
pub async fn configure_pod(spec: &LinkSpec, link: &Link, config: &PodConfig) -> Result<Configured> {
    let v6 = link.ipv6 == Ipv6::Available;
    let in_link = Netlink::open(&link.namespace).await?;
    settle(&link.namespace, &in_link, &spec.link_side(link.ipv6 != Ipv6::NotInKernel, Some(config))).await?;
    let in_pod = Netlink::open(&link.pod).await?;
    let others = others(&in_pod, link.ifindex).await?;
    settle(&link.pod, &in_pod, &spec.pod_side(v6, Some(config), &others)).await?;
    Ok(configured(spec, config, v6, link.ipv6, &others))
}

/// Compares the link with what it should be.
///
/// # Errors
/// [`Error::Broken`] with the first difference; other errors when that cannot be found out.
pub async fn check(spec: &LinkSpec, config: &PodConfig) -> Result<()> {
    spec.check()?;
    let pod = spec.open_pod()?;
    let in_pod = Netlink::open(&pod).await?;
    let Some(ours) = ours_in_pod(spec, &in_pod).await? else {
        return Err(Error::Broken { what: format!("{} is missing", spec.ifname) });
    };
    let others = others(&in_pod, ours.index).await?;
    let namespace = Netns::open(&spec.pin())?;
    let v6 = ipv6_in_kernel(&namespace).await?;
    let ipv6 = ipv6_of(spec, &pod, v6).await?;
    let in_link = Netlink::open(&namespace).await?;
    // In the pod only what carries its packets counts: its owner may tune and add.
    let mut in_pod_wanted =
        Wanted { sysctls: vec![], ..spec.pod_side(ipv6 == Ipv6::Available, Some(config), &others) };
    for device in &mut in_pod_wanted.devices {
        device.alias = None;
        device.exclusive = false;
    }
    let sides = [(&pod, &in_pod, in_pod_wanted), (&namespace, &in_link, spec.link_side(v6, Some(config)))];
    for (ns, netlink, wanted) in sides {
        let observed = observe(ns, netlink, &wanted).await?;
        if let Some(step) = plan::plan(&wanted, &observed).first() {
            return Err(Error::Broken { what: step.to_string() });
        }
    }
    Ok(())
}

/// Takes the link away, however much of it is there. Goes on past failures and reports the first.
///
/// # Errors
/// When something is there and cannot be removed.
pub async fn remove(spec: &LinkSpec) -> Result<()> {
    spec.check()?;
    let results = [remove_pod_side(spec).await, remove_link_side(spec).await, netns::unpin(&spec.pin())];
    results.into_iter().collect()
}

async fn remove_pod_side(spec: &LinkSpec) -> Result<()> {
    let pod = match spec.open_pod() {
        Ok(pod) => pod,
        Err(Error::NamespaceGone { .. } | Error::NamespacesHidden { .. } | Error::HostNamespace { .. }) => {
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    let in_pod = Netlink::open(&pod).await?;
    // Whatever became of the interface: rules outlive it.
    let none = Wanted {
        sysctls: vec![],
        devices: vec![],
        ..spec.pod_side(false, Some(&PodConfig::default()), &Others::default())
    };
    let rules = settle(&pod, &in_pod, &none).await;
    let interface = match ours_in_pod(spec, &in_pod).await {
        Ok(Some(_)) => in_pod.delete_link(&spec.ifname).await,
        // Somebody else's interface stays.
        Ok(None) | Err(Error::InterfaceExists { .. }) => Ok(()),
        Err(e) => Err(e),
    };
    rules.and(interface)
}

async fn others(in_pod: &Netlink, own: u32) -> Result<Others> {
    let (links, addresses) = (in_pod.links().await?, in_pod.addresses().await?);
    Ok(Others::of(own, &links, &addresses, &in_pod.routes().await?))
}

async fn remove_link_side(spec: &LinkSpec) -> Result<()> {
    let namespace = match Netns::open(&spec.pin()) {
        Ok(namespace) => namespace,
        Err(Error::NamespaceGone { .. }) => return Ok(()),
        Err(e) => return Err(e),
    };
    // Deleted by name, because an engine's descriptors may keep the namespace for a while.
    let in_link = Netlink::open(&namespace).await?;
    in_link.delete_link(LINK_SIDE_NAME).await?;
    in_link.delete_link(TUN_NAME).await
}

/// The pod's interface of this name, when it is ours.
async fn ours_in_pod(spec: &LinkSpec, in_pod: &Netlink) -> Result<Option<netlink::Link>> {
    match in_pod.link(&spec.ifname).await? {
        Some(link) if !spec.is_ours(&link) => Err(Error::InterfaceExists { name: spec.ifname.clone() }),
        found => Ok(found),
    }
}

/// Both ends, joined to each other. Half a pair (an end renamed, moved, or of a link namespace that is
/// gone) is made anew.
async fn ensure_pair(spec: &LinkSpec, in_link: &Netlink, in_pod: &Netlink, pod: &Netns) -> Result<()> {
    let far = ours_in_pod(spec, in_pod).await?;
    let near = in_link.link(LINK_SIDE_NAME).await?;
    if let (Some(near), Some(far)) = (&near, &far)
        && near.peer == Some(far.index)
        && far.peer == Some(near.index)
    {
        return Ok(());
    }
    if far.is_some() {
        in_pod.delete_link(&spec.ifname).await?;
    }
    if near.is_some() {
        in_link.delete_link(LINK_SIDE_NAME).await?;
    }
    let near =
        VethEnd { namespace: None, name: LINK_SIDE_NAME, mac: Some(spec.link_side_mac()), mtu: spec.mtu };
    let far = VethEnd { namespace: Some(pod), name: &spec.ifname, mac: Some(spec.pod_mac()), mtu: spec.mtu };
    match in_link.add_veth(near, far).await {
        Err(e) if e.errno() == Some(libc::EEXIST) => {
            Err(Error::InterfaceExists { name: spec.ifname.clone() })
        }
        made => made,
    }
}

async fn ipv6_in_kernel(ns: &Netns) -> Result<bool> {
    Ok(ns.run(|| sysctl::read("net/ipv6/conf/all/disable_ipv6")).await??.is_some())
}

async fn ipv6_of(spec: &LinkSpec, pod: &Netns, in_kernel: bool) -> Result<Ipv6> {
    if !in_kernel {
        return Ok(Ipv6::NotInKernel);
    }
    let key = format!("net/ipv6/conf/{}/disable_ipv6", spec.ifname);
    match pod.run(move || sysctl::read(&key)).await??.as_deref() {
        Some("0") => Ok(Ipv6::Available),
        Some(_) | None => Ok(Ipv6::DisabledInPod),
    }
}
