//! Policy routing: rules, and the routes of tables beside the main one.
#![expect(clippy::wildcard_enum_match_arm, reason = "the kernel's lists are open")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::IpVersion;

use super::messages::{family, route_message};
use super::{Netlink, Route, tolerate};
use crate::error::Result;

/// The main table.
pub const MAIN_TABLE: u32 = RouteHeader::RT_TABLE_MAIN as u32;
/// Behind every other route of its table.
const LAST_METRIC: u32 = 1_000_000;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// That of a prefix.
    #[must_use]
    pub fn of(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }

    fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }
}

/// A rule that sends what it matches to a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// Smaller is asked first.
    pub priority: u32,
    /// Which packets.
    pub family: Family,
    /// From; `None` for all.
    pub src: Option<IpNet>,
    /// To; `None` for all.
    pub dst: Option<IpNet>,
    /// Which table.
    pub table: u32,
    /// Routes of at most this prefix length do not count; `None`: all count.
    pub suppress_prefix_len: Option<u32>,
}

/// A route of a table beside the main one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableRoute {
    /// Which table.
    pub table: u32,
    /// Destination.
    pub dst: IpNet,
    /// Interface and next hop, trusted to be on the link; `None`: unreachable, behind every other route.
    pub hop: Option<(u32, IpAddr)>,
}

impl Netlink {
    /// Rules of both families that look a table up, with a priority in `priorities`.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn policy_rules(&self, priorities: std::ops::Range<u32>) -> Result<Vec<Rule>> {
        let mut all = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            let found = self.dump("list rules", self.handle.rule().get(version).execute()).await?;
            all.extend(found.iter().filter_map(rule_of).filter(|rule| priorities.contains(&rule.priority)));
        }
        Ok(all)
    }

    /// Adds a rule.
    ///
    /// # Errors
    /// As the kernel says; one that is there is fine.
    pub async fn add_policy_rule(&self, rule: Rule) -> Result<()> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = message_of_rule(rule);
        tolerate(request.execute().await, libc::EEXIST, || format!("add rule {}", rule.priority))
    }

    /// Deletes a rule.
    ///
    /// # Errors
    /// As the kernel says; a missing one is fine.
    pub async fn delete_policy_rule(&self, rule: Rule) -> Result<()> {
        let request = self.handle.rule().del(message_of_rule(rule));
        tolerate(request.execute().await, libc::ENOENT, || format!("delete rule {}", rule.priority))
    }

    /// The routes of some tables.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn table_routes(&self, tables: std::ops::Range<u32>) -> Result<Vec<TableRoute>> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut wanted = RouteMessage::default();
            wanted.header.address_family = family;
            let found = self.dump("list routes", self.handle.route().get(wanted).execute()).await?;
            all.extend(found.iter().filter_map(table_route_of).filter(|route| tables.contains(&route.table)));
        }
        Ok(all)
    }

    /// Adds a route to a table.
    ///
    /// # Errors
    /// As the kernel says; one that is there is fine.
    pub async fn add_table_route(&self, route: TableRoute) -> Result<()> {
        let request = self.handle.route().add(message_of_table_route(route));
        tolerate(request.execute().await, libc::EEXIST, || {
            format!("add route {} to table {}", route.dst, route.table)
        })
    }

    /// Deletes a route of a table.
    ///
    /// # Errors
    /// As the kernel says; a missing one is fine.
    pub async fn delete_table_route(&self, route: TableRoute) -> Result<()> {
        let request = self.handle.route().del(message_of_table_route(route));
        tolerate(request.execute().await, libc::ESRCH, || {
            format!("delete route {} of table {}", route.dst, route.table)
        })
    }
}

fn message_of_rule(rule: Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.family.unspecified());
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(rule.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes.push(RuleAttribute::Priority(rule.priority));
    message.attributes.push(RuleAttribute::Table(rule.table));
    if let Some(src) = rule.src {
        message.header.src_len = src.prefix_len();
        message.attributes.push(RuleAttribute::Source(src.network()));
    }
    if let Some(dst) = rule.dst {
        message.header.dst_len = dst.prefix_len();
        message.attributes.push(RuleAttribute::Destination(dst.network()));
    }
    message.attributes.extend(rule.suppress_prefix_len.map(RuleAttribute::SuppressPrefixLen));
    message
}

fn rule_of(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    let family = match header.family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        _ => return None,
    };
    if header.action != RuleAction::ToTable {
        return None;
    }
    let mut rule = Rule {
        priority: 0,
        family,
        src: None,
        dst: None,
        table: header.table.into(),
        suppress_prefix_len: None,
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Source(ip) => rule.src = IpNet::new(*ip, header.src_len).ok(),
            RuleAttribute::Destination(ip) => rule.dst = IpNet::new(*ip, header.dst_len).ok(),
            // The kernel writes -1 for none.
            RuleAttribute::SuppressPrefixLen(length) => {
                rule.suppress_prefix_len = Some(*length).filter(|length| *length != u32::MAX);
            }
            _ => {}
        }
    }
    Some(rule)
}

fn message_of_table_route(route: TableRoute) -> RouteMessage {
    let (link, gateway) = route.hop.unzip();
    let mut message =
        route_message(Route { dst: route.dst, gateway, link: link.unwrap_or(0), onlink: gateway.is_some() });
    message.header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes.push(RouteAttribute::Table(route.table));
    if route.hop.is_none() {
        message.header.kind = RouteType::Unreachable;
        message.header.scope = netlink_packet_route::route::RouteScope::Universe;
        message.attributes.retain(|a| !matches!(a, RouteAttribute::Oif(_)));
        message.attributes.push(RouteAttribute::Priority(LAST_METRIC));
    }
    message
}

fn table_route_of(message: &RouteMessage) -> Option<TableRoute> {
    let header = &message.header;
    let mut dst = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    if header.protocol == RouteProtocol::Kernel {
        return None;
    }
    let (mut table, mut gateway, mut link) = (u32::from(header.table), None, None);
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(a) => Some(IpAddr::V4(*a)),
        RouteAddress::Inet6(a) => Some(IpAddr::V6(*a)),
        _ => None,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(a) => dst = ip(a)?,
            RouteAttribute::Gateway(a) => gateway = ip(a),
            RouteAttribute::Oif(index) => link = Some(*index),
            _ => {}
        }
    }
    let hop = match header.kind {
        RouteType::Unicast => Some((link?, gateway?)),
        RouteType::Unreachable => None,
        _ => return None,
    };
    Some(TableRoute { table, dst: IpNet::new(dst, header.destination_prefix_length).ok()?, hop })
}
