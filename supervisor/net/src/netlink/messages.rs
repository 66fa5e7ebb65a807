//! Between the kernel's messages and this crate's types.
#![expect(clippy::wildcard_enum_match_arm, reason = "the kernel's lists are open")]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};

use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, IpProtocol};

use super::{Address, Blackhole, Link, Mac, Neighbour, Route, VethEnd};

pub(super) fn io_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

pub(super) fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

pub(super) fn end_attributes(end: &VethEnd<'_>) -> Vec<LinkAttribute> {
    let mut attributes = vec![LinkAttribute::Mtu(end.mtu)];
    if let Some(mac) = end.mac {
        attributes.push(LinkAttribute::Address(mac.to_vec()));
    }
    if let Some(ns) = end.namespace {
        attributes.push(LinkAttribute::NetNsFd(ns.as_fd().as_raw_fd()));
    }
    attributes
}

pub(super) fn link_of(message: LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        up: flags.contains(LinkFlags::Up),
        running: flags.contains(LinkFlags::Running),
        multicast: flags.contains(LinkFlags::Multicast),
        mtu: 0,
        mac: None,
        alias: None,
        kind: None,
        peer: None,
        peer_elsewhere: false,
        master: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Address(mac) => link.mac = mac.try_into().ok(),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            LinkAttribute::Link(index) => link.peer = Some(index),
            LinkAttribute::LinkNetNsId(_) => link.peer_elsewhere = true,
            LinkAttribute::Controller(index) => link.master = Some(index),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

pub(super) fn address_of(message: &AddressMessage) -> Option<Address> {
    let mut local = None;
    let mut address = None;
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(a) => local = Some(*a),
            AddressAttribute::Address(a) => address = Some(*a),
            AddressAttribute::Flags(f) => flags = *f,
            _ => {}
        }
    }
    let net = IpNet::new(local.or(address)?, message.header.prefix_len).ok()?;
    let v6 = matches!(net, IpNet::V6(_));
    // The same bit means "secondary" for IPv4, which is as stable as any.
    let temporary = v6 && flags.contains(AddressFlags::Secondary);
    Some(Address {
        link: message.header.index,
        net,
        global: message.header.scope == AddressScope::Universe,
        stable: !temporary && !flags.contains(AddressFlags::Deprecated),
    })
}

pub(super) fn route_message(route: Route) -> RouteMessage {
    let address = |ip: IpAddr| match ip {
        IpAddr::V4(a) => RouteAddress::Inet(a),
        IpAddr::V6(a) => RouteAddress::Inet6(a),
    };
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.dst.addr());
    message.header.destination_prefix_length = route.dst.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.header.scope = match (route.gateway, route.dst) {
        (None, IpNet::V4(_)) => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    if route.onlink {
        message.header.flags |= RouteFlags::Onlink;
    }
    if route.dst.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(address(route.dst.network())));
    }
    if let Some(gateway) = route.gateway {
        message.attributes.push(RouteAttribute::Gateway(address(gateway)));
    }
    message.attributes.push(RouteAttribute::Oif(route.link));
    message
}

/// One route per link it leads over; `None` for what [`super::Netlink::routes`] leaves out.
pub(super) fn route_of(message: &RouteMessage) -> Option<impl Iterator<Item = Route> + use<>> {
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(a) => Some(IpAddr::V4(*a)),
        RouteAddress::Inet6(a) => Some(IpAddr::V6(*a)),
        _ => None,
    };
    let header = &message.header;
    let main = header.table == RouteHeader::RT_TABLE_MAIN
        || message
            .attributes
            .iter()
            .any(|a| matches!(a, RouteAttribute::Table(t) if *t == u32::from(RouteHeader::RT_TABLE_MAIN)));
    if !main || header.kind != RouteType::Unicast || header.protocol == RouteProtocol::Kernel {
        return None;
    }
    let mut dst = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let (mut gateway, mut links) = (None, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(a) => dst = ip(a)?,
            RouteAttribute::Gateway(a) => gateway = ip(a),
            RouteAttribute::Oif(index) => links.push(*index),
            RouteAttribute::MultiPath(hops) => links.extend(hops.iter().map(|h| h.interface_index)),
            _ => {}
        }
    }
    let dst = IpNet::new(dst, header.destination_prefix_length).ok()?;
    let onlink = header.flags.contains(RouteFlags::Onlink);
    Some(links.into_iter().map(move |link| Route { dst, gateway, link, onlink }))
}

/// The address that a route makes local.
pub(super) fn local_address_of(message: &RouteMessage) -> Option<IpAddr> {
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(a)) => Some(IpAddr::V4(*a)),
        RouteAttribute::Destination(RouteAddress::Inet6(a)) => Some(IpAddr::V6(*a)),
        _ => None,
    });
    destination.filter(|_| message.header.kind == RouteType::Local)
}

pub(super) fn neighbour_of(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => address = Some(IpAddr::V4(*a)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => address = Some(IpAddr::V6(*a)),
            NeighbourAttribute::LinkLayerAddress(m) => mac = Mac::try_from(m.as_slice()).ok(),
            _ => {}
        }
    }
    Some(Neighbour { link: message.header.ifindex, address: address?, mac: mac? })
}

pub(super) fn rule_message(rule: Blackhole) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.src.addr());
    message.header.src_len = rule.src.prefix_len();
    message.header.dst_len = rule.dst.prefix_len();
    message.header.action = RuleAction::Blackhole;
    message.attributes.push(RuleAttribute::Priority(rule.priority));
    message.attributes.push(RuleAttribute::Source(rule.src.network()));
    message.attributes.push(RuleAttribute::Destination(rule.dst.network()));
    if rule.udp_only {
        message.attributes.push(RuleAttribute::IpProtocol(IpProtocol::Udp));
    }
    message
}
