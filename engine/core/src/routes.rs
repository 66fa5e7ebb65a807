//! Which peer carries which destination beyond the peers' own addresses: subnet routers and the exit node.
//!
//! A peer's routes are the `AllowedIPs` that control grants it beyond its addresses. They count only
//! where the pod accepts routes; `/0` never counts as a route but makes a peer eligible as exit node,
//! and only the chosen one carries what no route covers. Where several routers hold one prefix, the one
//! that control calls primary wins, then one that is online, then the lowest number: a netmap change
//! moves the prefix at once.
//!
//! Exclusions beat every route and the exit node, in both directions.

mod prefixes;

use std::collections::HashSet;
use std::net::IpAddr;

use ipnet::IpNet;

use self::prefixes::PrefixMap;
use crate::peer::{Facts, Slot};
use crate::tailcfg::{Node, NodeId};

/// Most prefixes in use; what peers offer beyond them is not used and reported in the node's health.
pub const MAX_ROUTES: usize = 8192;

/// What a pod uses of the routes that peers offer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Routing {
    /// Use the subnet routes of peers.
    pub accept_routes: bool,
    /// The peer that carries everything no route covers: its stable id, one of its addresses, or its
    /// name, whole or the first label. While it cannot be used, that traffic is dropped.
    pub exit_node: Option<String>,
    /// Ranges that neither a route nor the exit node covers: the cluster's own.
    pub exclude: Vec<IpNet>,
}

/// Never reached through another node: this host, the link, multicast, reserved.
const NEVER: [&str; 7] =
    ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/127", "fe80::/10", "ff00::/8"];

/// What a peer offers to carry beyond its addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Offer {
    /// Prefixes, and whether control calls the peer primary for each.
    routes: Box<[(IpNet, bool)]>,
    online: bool,
    /// It may be the exit node for IPv4, for IPv6.
    exit: [bool; 2],
}

/// One of the peers that hold a prefix; the smallest carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    secondary: bool,
    offline: bool,
    id: NodeId,
    slot: Slot,
}

#[derive(Debug)]
enum Entry {
    Excluded,
    /// Best first, never empty.
    Peers(Vec<Candidate>),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct RouteTable {
    accept: bool,
    exclude: Vec<IpNet>,
    table: PrefixMap<Entry>,
    exit: Option<NodeId>,
    exit_slots: [Option<Slot>; 2],
    /// Prefixes came or went since [`RouteTable::take_changed`].
    changed: bool,
    full: bool,
}

impl Default for RouteTable {
    fn default() -> Self {
        let mut table = Self {
            accept: false,
            exclude: Vec::new(),
            table: PrefixMap::default(),
            exit: None,
            exit_slots: [None; 2],
            changed: false,
            full: false,
        };
        table.configure(false, &[]);
        table
    }
}

impl RouteTable {
    /// Forgets every route; the peers' offers have to be made and linked again.
    pub(crate) fn configure(&mut self, accept: bool, exclude: &[IpNet]) {
        self.accept = accept;
        self.exclude =
            NEVER.iter().filter_map(|net| net.parse().ok()).chain(exclude.iter().map(IpNet::trunc)).collect();
        self.table.clear();
        for net in &self.exclude {
            self.table.insert(net, Entry::Excluded);
        }
        self.exit_slots = [None; 2];
        self.changed = true;
        self.full = false;
    }

    /// What `node` offers, as far as this table takes it.
    pub(crate) fn offer(&self, node: &Node) -> Option<Box<Offer>> {
        let exit = [IpNet::V4(ipnet::Ipv4Net::default()), IpNet::V6(ipnet::Ipv6Net::default())]
            .map(|net| node.allowed_ips.contains(&net));
        let mut routes = Vec::new();
        if self.accept && node.allowed_ips.iter().any(|net| self.takes(node, net)) {
            let primary: HashSet<&IpNet> = node.primary_routes.iter().collect();
            let taken = node.allowed_ips.iter().filter(|net| self.takes(node, net));
            routes = taken.map(|net| (net.trunc(), primary.contains(net))).collect();
            routes.sort_unstable();
            routes.dedup_by_key(|(net, _)| *net);
        }
        if routes.is_empty() && exit == [false; 2] {
            return None;
        }
        Some(Box::new(Offer { routes: routes.into(), online: node.online != Some(false), exit }))
    }

    fn takes(&self, node: &Node, net: &IpNet) -> bool {
        net.prefix_len() > 0
            && !node.addresses.contains(net)
            && !self.exclude.iter().any(|excluded| excluded.contains(net))
    }

    /// Takes up what the peer offers.
    pub(crate) fn link(&mut self, slot: Slot, id: NodeId, offer: &Offer) {
        for (net, primary) in &offer.routes {
            let room = self.table.len() < MAX_ROUTES + self.exclude.len();
            let candidate = Candidate { secondary: !primary, offline: !offer.online, id, slot };
            match self.table.get_mut(net) {
                Some(Entry::Excluded) => {}
                Some(Entry::Peers(peers)) => {
                    let at = peers.partition_point(|other| *other < candidate);
                    peers.insert(at, candidate);
                }
                None if !room => self.full = true,
                None => {
                    self.table.insert(net, Entry::Peers(vec![candidate]));
                    self.changed = true;
                }
            }
        }
        if self.exit == Some(id) {
            self.exit_slots = offer.exit.map(|offers| offers.then_some(slot));
        }
    }

    /// Takes out what [`RouteTable::link`] took up.
    pub(crate) fn unlink(&mut self, slot: Slot, id: NodeId, offer: &Offer) {
        for (net, _) in &offer.routes {
            let Some(Entry::Peers(peers)) = self.table.get_mut(net) else { continue };
            peers.retain(|candidate| candidate.slot != slot);
            if peers.is_empty() {
                self.table.remove(net);
                self.changed = true;
            }
        }
        if self.exit == Some(id) {
            self.exit_slots = [None; 2];
        }
    }

    /// Makes the peer `id`, whose offer and slot are given, the exit node.
    pub(crate) fn set_exit(&mut self, id: Option<NodeId>, of: Option<(Slot, &Offer)>) {
        self.exit = id;
        self.exit_slots =
            of.map_or([None; 2], |(slot, offer)| offer.exit.map(|offers| offers.then_some(slot)));
    }

    /// Families that the exit node carries: IPv4, IPv6.
    pub(crate) fn exit_carries(&self) -> [bool; 2] {
        self.exit_slots.map(|slot| slot.is_some())
    }

    /// Who carries `ip`, which is no peer's own address.
    pub(crate) fn find(&self, ip: IpAddr) -> Option<Slot> {
        match self.table.longest(ip) {
            Some(Entry::Peers(peers)) => peers.first().map(|candidate| candidate.slot),
            Some(Entry::Excluded) => None,
            None => {
                let slot = match ip {
                    IpAddr::V4(_) => self.exit_slots[0],
                    IpAddr::V6(_) => self.exit_slots[1],
                };
                // The tailnet's ranges belong to its nodes alone.
                slot.filter(|_| !is_tailnet(ip))
            }
        }
    }

    /// Whether prefixes came or went since this was last asked.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Every prefix that some peer carries, sorted.
    pub(crate) fn accepted(&self) -> Vec<IpNet> {
        let carried = self.table.iter().filter(|(_, entry)| matches!(entry, Entry::Peers(_)));
        let mut nets: Vec<IpNet> = carried.map(|(net, _)| net).collect();
        nets.sort_unstable();
        nets
    }

    /// Whether peers offer more than [`MAX_ROUTES`] prefixes.
    pub(crate) fn is_full(&self) -> bool {
        self.full
    }
}

/// Whether an address lies in the tailnet's own ranges.
fn is_tailnet(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64,
        IpAddr::V6(ip) => ip.segments()[..3] == [0xfd7a, 0x115c, 0xa1e0],
    }
}

/// An exit node as somebody named it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExitChoice {
    text: String,
    ip: Option<IpAddr>,
}

impl ExitChoice {
    pub(crate) fn new(text: &str) -> Self {
        let text = text.trim().trim_end_matches('.').to_owned();
        Self { ip: text.parse().ok(), text }
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Whether the peer with these facts is meant.
    pub(crate) fn means(&self, peer: &Facts) -> bool {
        if let Some(ip) = self.ip {
            return peer.addresses().any(|net| net.addr() == ip);
        }
        let name = peer.name().trim_end_matches('.');
        let label = name.split('.').next().unwrap_or_default();
        peer.stable_id() == self.text
            || [name, label].iter().any(|name| !name.is_empty() && name.eq_ignore_ascii_case(&self.text))
    }
}

#[cfg(test)]
mod tests;
