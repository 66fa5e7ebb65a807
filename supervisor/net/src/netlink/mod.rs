//! The only user of rtnetlink: one socket per namespace, one dump at a time.
//!
//! Adding what is there and deleting what is not both succeed, so that callers can state what they want.

pub(crate) mod events;
mod messages;
mod policy;

use std::io;
use std::net::IpAddr;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt};
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteMessage;
use rtnetlink::constants::{RTMGRP_IPV6_ROUTE, RTMGRP_LINK};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, TokioSocket};
use rtnetlink::{Handle, IpVersion, LinkMessageBuilder, LinkUnspec};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

pub use self::policy::{Family, MAIN_TABLE, Rule, TableRoute};

use self::events::Changes;
use self::messages::{
    address_of, end_attributes, family, io_error, link_of, local_address_of, neighbour_of, route_message,
    route_of, rule_message,
};
use crate::error::{Result, Step};
use crate::netns::Netns;

/// The longest wait for the kernel to set to work what was made.
const WAIT_AT_MOST: Duration = Duration::from_secs(2);

/// A hardware address.
pub type Mac = [u8; 6];

/// Netlink requests to one namespace. Needs a running tokio runtime.
#[derive(Debug)]
pub struct Netlink {
    handle: Handle,
    ns: Netns,
    /// The kernel runs one dump per socket and refuses a second with EBUSY.
    dumps: Mutex<()>,
    connection: JoinHandle<()>,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Index in its namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Administratively up.
    pub up: bool,
    /// Up, with a carrier, and its queue set to work: what is sent now is not dropped.
    pub running: bool,
    /// Whether it takes part in multicast.
    pub multicast: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// Hardware address, where the kind has one.
    pub mac: Option<Mac>,
    /// Alias.
    pub alias: Option<String>,
    /// `veth`, `tun`, `bridge` …; `None` for hardware.
    pub kind: Option<String>,
    /// Index of the other end (veth) or of the lower device, see [`Link::peer_elsewhere`].
    pub peer: Option<u32>,
    /// Whether the other end lies in another namespace.
    pub peer_elsewhere: bool,
    /// Index of the bridge or bond it belongs to.
    pub master: Option<u32>,
}

/// An address on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// Interface.
    pub link: u32,
    /// Address with its prefix length.
    pub net: IpNet,
    /// Global scope: neither link-local nor of the host alone.
    pub global: bool,
    /// Stable: not one of the temporary ones that privacy extensions rotate, not deprecated.
    pub stable: bool,
}

/// A unicast route of the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Next hop; `None` for everything on the link itself.
    pub gateway: Option<IpAddr>,
    /// Interface.
    pub link: u32,
    /// Trust that the gateway is on the link although no address says so.
    pub onlink: bool,
}

/// A permanent neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    /// Interface.
    pub link: u32,
    /// Its network address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: Mac,
}

/// A routing rule that drops what it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Blackhole {
    /// Smaller is asked first.
    pub priority: u32,
    /// From.
    pub src: IpNet,
    /// To.
    pub dst: IpNet,
    /// Only UDP.
    pub udp_only: bool,
}

/// One end of a veth pair.
#[derive(Debug, Clone, Copy)]
pub struct VethEnd<'a> {
    /// Where this end goes; `None` for the namespace of the socket.
    pub namespace: Option<&'a Netns>,
    /// Name there.
    pub name: &'a str,
    /// Hardware address; `None` for a random one.
    pub mac: Option<Mac>,
    /// MTU in bytes.
    pub mtu: u32,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Netlink {
    /// A socket that speaks to `ns`, wherever the caller is.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub async fn open(ns: &Netns) -> Result<Self> {
        let socket = ns.run(open_socket).await?.step(|| "open a netlink socket".into())?;
        // SAFETY: the descriptor was just released by its only owner.
        let socket = unsafe { TokioSocket::from_raw_fd(socket.into_raw_fd()) };
        let (connection, handle, _unsolicited) = rtnetlink::from_socket::<TokioSocket>(socket);
        Ok(Self { handle, ns: ns.clone(), dumps: Mutex::new(()), connection: tokio::spawn(connection) })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn links(&self) -> Result<Vec<Link>> {
        let found = self.dump("list links", self.handle.link().get().execute()).await?;
        Ok(found.into_iter().map(link_of).collect())
    }

    /// One interface by name.
    ///
    /// # Errors
    /// As the kernel says; a missing one is `None`.
    pub async fn link(&self, name: &str) -> Result<Option<Link>> {
        let request = self.handle.link().get().match_name(name.to_owned()).execute();
        let _turn = self.dumps.lock().await;
        let mut request = std::pin::pin!(request);
        match request.next().await {
            None => Ok(None),
            Some(Ok(message)) => Ok(Some(link_of(message))),
            Some(Err(e)) => match io_error(e) {
                e if matches!(e.raw_os_error(), Some(libc::ENODEV)) => Ok(None),
                e => Err(e).step(|| format!("look for link {name}")),
            },
        }
    }

    /// Makes a veth pair, each end where it belongs from the start. `EEXIST` stays an error: an end that
    /// is there already says nothing about the other.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn add_veth(&self, near: VethEnd<'_>, far: VethEnd<'_>) -> Result<()> {
        let mut message =
            LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::Veth).name(near.name).build();
        message.attributes.extend(end_attributes(&near));
        let mut peer = LinkMessage::default();
        peer.attributes.push(LinkAttribute::IfName(far.name.to_owned()));
        peer.attributes.extend(end_attributes(&far));
        message.attributes.retain(|a| !matches!(a, LinkAttribute::LinkInfo(_)));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        let step = || format!("make veth pair {} and {}", near.name, far.name);
        self.handle.link().add(message).execute().await.map_err(io_error).step(step)
    }

    /// Makes a bridge.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn add_bridge(&self, name: &str) -> Result<()> {
        let message =
            LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::Bridge).name(name).build();
        tolerate(self.handle.link().add(message).execute().await, libc::EEXIST, || {
            format!("make bridge {name}")
        })
    }

    /// Puts `link` into the bridge `master`.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn set_master(&self, link: u32, master: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(link).controller(master).build();
        self.set(message, || format!("put link {link} into bridge {master}")).await
    }

    /// Sets an interface up.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn set_up(&self, link: u32) -> Result<()> {
        self.set(LinkUnspec::new_with_index(link).up().build(), || format!("set link {link} up")).await
    }

    /// Waits until an interface that is up also carries packets: the kernel sets its queue to work a
    /// moment after the other end has come up, and drops what is sent before.
    ///
    /// # Errors
    /// As the kernel says, and after two seconds.
    pub async fn wait_running(&self, name: &str) -> Result<()> {
        let mut changes = Changes::new(&self.ns, RTMGRP_LINK, WAIT_AT_MOST);
        while !self.link(name).await?.is_some_and(|l| l.running) {
            changes.next(|| format!("wait for a carrier on {name}")).await?;
        }
        Ok(())
    }

    /// Sets an interface down.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn set_down(&self, link: u32) -> Result<()> {
        self.set(LinkUnspec::new_with_index(link).down().build(), || format!("set link {link} down")).await
    }

    /// Sets the MTU.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn set_mtu(&self, link: u32, mtu: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(link).mtu(mtu).build();
        self.set(message, || format!("set the MTU of link {link} to {mtu}")).await
    }

    /// Sets the hardware address.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn set_mac(&self, link: u32, mac: Mac) -> Result<()> {
        let message = LinkUnspec::new_with_index(link).address(mac.to_vec()).build();
        self.set(message, || format!("set the hardware address of link {link}")).await
    }

    /// Sets the alias, a note of up to 255 bytes that stays with the interface.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn set_alias(&self, link: u32, alias: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(link).alias(alias).build();
        self.set(message, || format!("set the alias of link {link}")).await
    }

    /// Takes an interface out of multicast, so that the kernel sends no group reports through it.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn set_multicast(&self, link: u32, on: bool) -> Result<()> {
        let message = LinkUnspec::new_with_index(link).multicast(on).build();
        self.set(message, || format!("set multicast of link {link}")).await
    }

    /// Deletes an interface by name.
    ///
    /// # Errors
    /// As the kernel says; a missing one is fine.
    pub async fn delete_link(&self, name: &str) -> Result<()> {
        let Some(link) = self.link(name).await? else { return Ok(()) };
        tolerate(self.handle.link().del(link.index).execute().await, libc::ENODEV, || {
            format!("delete link {name}")
        })
    }

    /// All addresses.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn addresses(&self) -> Result<Vec<Address>> {
        let found = self.dump("list addresses", self.handle.address().get().execute()).await?;
        Ok(found.iter().filter_map(address_of).collect())
    }

    /// Adds an address, usable at once (no duplicate address detection).
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn add_address(&self, link: u32, net: IpNet) -> Result<()> {
        let mut request = self.handle.address().add(link, net.addr(), net.prefix_len());
        let message = request.message_mut();
        if matches!(net, IpNet::V6(_)) {
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        tolerate(request.execute().await, libc::EEXIST, || format!("add address {net} to link {link}"))
    }

    /// Waits until packets to these addresses are taken in: an IPv6 address is listed at once, its local
    /// route comes from a work queue.
    ///
    /// # Errors
    /// As the kernel says, and after two seconds.
    pub async fn wait_local(&self, addresses: &[IpAddr]) -> Result<()> {
        let mut changes = Changes::new(&self.ns, RTMGRP_IPV6_ROUTE, WAIT_AT_MOST);
        loop {
            let mut wanted = RouteMessage::default();
            wanted.header.address_family = AddressFamily::Inet6;
            let found = self.dump("list routes", self.handle.route().get(wanted).execute()).await?;
            let local: Vec<IpAddr> = found.iter().filter_map(local_address_of).collect();
            if addresses.iter().all(|a| a.is_ipv4() || local.contains(a)) {
                return Ok(());
            }
            changes.next(|| format!("wait for {addresses:?} to work")).await?;
        }
    }

    /// Deletes an address.
    ///
    /// # Errors
    /// As the kernel says; a missing one is fine.
    pub async fn delete_address(&self, link: u32, net: IpNet) -> Result<()> {
        let mut message = AddressMessage::default();
        message.header.index = link;
        message.header.prefix_len = net.prefix_len();
        message.header.family = family(net.addr());
        message.attributes.push(AddressAttribute::Local(net.addr()));
        tolerate(self.handle.address().del(message).execute().await, libc::EADDRNOTAVAIL, || {
            format!("delete address {net} from link {link}")
        })
    }

    /// Unicast routes of the main table, both families, without those the kernel made for its addresses.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn routes(&self) -> Result<Vec<Route>> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut wanted = RouteMessage::default();
            wanted.header.address_family = family;
            let found = self.dump("list routes", self.handle.route().get(wanted).execute()).await?;
            all.extend(found.iter().filter_map(route_of).flatten());
        }
        Ok(all)
    }

    /// Adds a route.
    ///
    /// # Errors
    /// As the kernel says; `EEXIST` when that destination is routed otherwise.
    pub async fn add_route(&self, route: Route) -> Result<()> {
        match self.handle.route().add(route_message(route)).execute().await.map_err(io_error) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) && self.routes().await?.contains(&route) => {
                Ok(())
            }
            added => added.step(|| format!("add route {} on link {}", route.dst, route.link)),
        }
    }

    /// Deletes a route.
    ///
    /// # Errors
    /// As the kernel says; a missing one is fine.
    pub async fn delete_route(&self, route: Route) -> Result<()> {
        let request = self.handle.route().del(route_message(route));
        tolerate(request.execute().await, libc::ESRCH, || {
            format!("delete route {} on link {}", route.dst, route.link)
        })
    }

    /// Permanent neighbours.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn neighbours(&self) -> Result<Vec<Neighbour>> {
        let found = self.dump("list neighbours", self.handle.neighbours().get().execute()).await?;
        Ok(found.iter().filter_map(neighbour_of).collect())
    }

    /// Adds a permanent neighbour, or gives an existing one this hardware address.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn set_neighbour(&self, neighbour: Neighbour) -> Result<()> {
        let request = self
            .handle
            .neighbours()
            .add(neighbour.link, neighbour.address)
            .link_layer_address(&neighbour.mac)
            .state(NeighbourState::Permanent)
            .replace();
        request
            .execute()
            .await
            .map_err(io_error)
            .step(|| format!("add neighbour {} on link {}", neighbour.address, neighbour.link))
    }

    /// Deletes a neighbour.
    ///
    /// # Errors
    /// As the kernel says; a missing one is fine.
    pub async fn delete_neighbour(&self, link: u32, address: IpAddr) -> Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = link;
        message.attributes.push(NeighbourAttribute::Destination(match address {
            IpAddr::V4(a) => NeighbourAddress::Inet(a),
            IpAddr::V6(a) => NeighbourAddress::Inet6(a),
        }));
        tolerate(self.handle.neighbours().del(message).execute().await, libc::ENOENT, || {
            format!("delete neighbour {address} from link {link}")
        })
    }

    /// Adds a rule that drops what it matches.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn add_blackhole(&self, rule: Blackhole) -> Result<()> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = rule_message(rule);
        tolerate(request.execute().await, libc::EEXIST, || {
            format!("add a blackhole rule {} to {}", rule.src, rule.dst)
        })
    }

    /// Deletes such a rule.
    ///
    /// # Errors
    /// As the kernel says; a missing one is fine.
    pub async fn delete_blackhole(&self, rule: Blackhole) -> Result<()> {
        let request = self.handle.rule().del(rule_message(rule));
        tolerate(request.execute().await, libc::ENOENT, || {
            format!("delete the blackhole rule {} to {}", rule.src, rule.dst)
        })
    }

    /// Every rule of both families, as text that differs when the rules do.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn rules(&self) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            let found = self.dump("list rules", self.handle.rule().get(version).execute()).await?;
            all.extend(found.iter().map(|r| format!("{:?} {:?}", r.header, r.attributes)));
        }
        Ok(all)
    }

    pub(crate) async fn set(&self, message: LinkMessage, step: impl FnOnce() -> String) -> Result<()> {
        self.handle.link().set(message).execute().await.map_err(io_error).step(step)
    }

    async fn dump<T>(
        &self,
        step: &str,
        stream: impl Stream<Item = std::result::Result<T, rtnetlink::Error>>,
    ) -> Result<Vec<T>> {
        let _turn = self.dumps.lock().await;
        stream.try_collect().await.map_err(io_error).step(|| step.to_owned())
    }
}

/// Runs on the thread inside the namespace; registering with the runtime happens afterwards.
fn open_socket() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.set_non_blocking(true)?;
    Ok(socket)
}

fn tolerate(
    result: std::result::Result<(), rtnetlink::Error>,
    errno: i32,
    step: impl FnOnce() -> String,
) -> Result<()> {
    match result.map_err(io_error) {
        Err(e) if e.raw_os_error() == Some(errno) => Ok(()),
        other => other.step(step),
    }
}

/// A hardware address as people write it.
#[must_use]
pub fn mac_text(mac: Mac) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}
