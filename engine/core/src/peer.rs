//! The peers of the netmap, and what exists only for those that have traffic.
//!
//! An idle peer costs a table entry and its keys in the look-up maps. [`Active`] (tunnel, path, shared
//! disco key) is made by the first packet in either direction and goes when nothing moved for 540 s.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use crate::batch::RegionId;
use crate::budget::Bucket;
use crate::disco;
use crate::key::{DiscoPublic, NodePublic};
use crate::path::PathAgent;
use crate::routes::{Offer, RouteTable};
use crate::tailcfg::{Node, NodeId};
use crate::wg::Tunnel;

/// Position of a peer in its table; valid until the peer leaves the netmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Slot(pub(crate) u32);

impl Slot {
    fn at(self) -> usize {
        self.0 as usize
    }
}

/// What a peer with traffic has.
pub(crate) struct Active {
    pub(crate) tunnel: Tunnel,
    pub(crate) path: PathAgent,
    /// The tunnel's receiver index, 24 bits.
    pub(crate) index: u32,
    /// `None` for a peer without disco.
    pub(crate) shared: Option<disco::SharedKey>,
    /// When the engine's timer list wakes this peer.
    pub(crate) scheduled: Option<Instant>,
    /// When the peer's key expires.
    pub(crate) expires: Option<Instant>,
    pub(crate) last_tx: Option<Instant>,
    pub(crate) last_rx: Option<Instant>,
    pub(crate) tx_bytes: u64,
    pub(crate) rx_bytes: u64,
    /// Disco pings of the peer that are answered, and CallMeMaybes that are heeded.
    pub(crate) pings: Bucket,
    pub(crate) calls: Bucket,
}

/// This node's addresses as one peer knows them; see [`crate::nat`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Masks {
    pub(crate) v4: Option<Ipv4Addr>,
    pub(crate) v6: Option<Ipv6Addr>,
}

/// A peer of the netmap.
pub(crate) struct Peer {
    pub(crate) id: NodeId,
    pub(crate) key: NodePublic,
    pub(crate) disco: DiscoPublic,
    pub(crate) home: RegionId,
    pub(crate) wireguard_only: bool,
    pub(crate) jailed: bool,
    /// Its key has expired: it exists, but nothing is exchanged with it.
    pub(crate) expired: bool,
    pub(crate) endpoints: Box<[SocketAddr]>,
    /// When this life first heard of it: about then it heard of us.
    pub(crate) since: Instant,
    /// The addresses under which this peer knows us, where they are not ours.
    pub(crate) masks: Option<Box<Masks>>,
    online: bool,
    /// Its own addresses, as far as control lets it have them.
    hosts: Box<[IpAddr]>,
    offer: Option<Box<Offer>>,
    pub(crate) active: Option<Box<Active>>,
}

impl Peer {
    fn from_node(node: &Node, routes: &RouteTable, expired: bool, since: Instant) -> Self {
        Self {
            id: node.id,
            key: node.key,
            disco: node.disco_key,
            home: node.home_derp,
            wireguard_only: node.is_wireguard_only,
            jailed: node.is_jailed,
            expired,
            endpoints: node.endpoints.clone().into_boxed_slice(),
            since,
            masks: (node.masq_v4.is_some() || node.masq_v6.is_some())
                .then(|| Box::new(Masks { v4: node.masq_v4, v6: node.masq_v6 })),
            online: node.online == Some(true),
            hosts: hosts(node),
            offer: routes.offer(node),
            active: None,
        }
    }
}

fn hosts(node: &Node) -> Box<[IpAddr]> {
    let allowed = node.addresses.iter().filter(|net| {
        net.prefix_len() == net.max_prefix_len() && node.allowed_ips.iter().any(|a| a.contains(*net))
    });
    allowed.map(ipnet::IpNet::addr).collect()
}

/// What an update means for a peer's running state.
pub(crate) struct Upserted {
    pub(crate) slot: Slot,
    /// Running state that ended because the peer has another key or none that is valid.
    pub(crate) dropped: Option<Box<Active>>,
    /// It may be reachable where or how it was not before.
    pub(crate) moved: bool,
}

/// All peers, with the look-ups that the data path needs. Changing one peer costs that peer.
#[derive(Default)]
pub(crate) struct PeerTable {
    slots: Vec<Option<Peer>>,
    free: Vec<Slot>,
    by_id: HashMap<NodeId, Slot>,
    by_key: HashMap<NodePublic, Slot>,
    by_disco: HashMap<DiscoPublic, Slot>,
    by_host: HashMap<IpAddr, Slot>,
    routes: RouteTable,
}

impl PeerTable {
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&Peer> {
        self.slots.get(slot.at())?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, slot: Slot) -> Option<&mut Peer> {
        self.slots.get_mut(slot.at())?.as_mut()
    }

    pub(crate) fn by_key(&self, key: &NodePublic) -> Option<Slot> {
        self.by_key.get(key).copied()
    }

    pub(crate) fn by_disco(&self, key: &DiscoPublic) -> Option<Slot> {
        self.by_disco.get(key).copied()
    }

    /// Whose address this is, or who carries it.
    pub(crate) fn by_ip(&self, ip: IpAddr) -> Option<Slot> {
        match self.by_host.get(&ip) {
            Some(slot) => Some(*slot),
            None => self.routes.find(ip),
        }
    }

    pub(crate) fn routes_ref(&self) -> &RouteTable {
        &self.routes
    }

    pub(crate) fn routes(&mut self) -> &mut RouteTable {
        &mut self.routes
    }

    /// Takes up the routes of every peer anew, as `accept` and `exclude` want it.
    pub(crate) fn configure_routes<'a>(
        &mut self,
        accept: bool,
        exclude: &[ipnet::IpNet],
        nodes: impl Iterator<Item = &'a Node>,
    ) {
        self.routes.configure(accept, exclude);
        for node in nodes {
            let Some(slot) = self.by_id.get(&node.id).copied() else { continue };
            let Some(peer) = self.slots.get_mut(slot.at()).and_then(Option::as_mut) else { continue };
            peer.offer = self.routes.offer(node);
            if let Some(offer) = &peer.offer {
                self.routes.link(slot, peer.id, offer);
            }
        }
    }

    /// Makes a peer the exit node, or none.
    pub(crate) fn set_exit(&mut self, id: Option<NodeId>) {
        let slot = id.and_then(|id| self.by_id.get(&id)).copied();
        let peer = slot.and_then(|slot| Some((slot, self.slots.get(slot.at())?.as_ref()?)));
        let offer = peer.and_then(|(slot, peer)| Some((slot, peer.offer.as_deref()?)));
        self.routes.set_exit(id, offer);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Slot, &Peer)> {
        (0..).map(Slot).zip(&self.slots).filter_map(|(slot, peer)| Some((slot, peer.as_ref()?)))
    }

    pub(crate) fn slot(&self, id: NodeId) -> Option<Slot> {
        self.by_id.get(&id).copied()
    }

    /// Adds a peer or brings it up to date.
    pub(crate) fn upsert(&mut self, node: &Node, expired: bool, now: Instant) -> Upserted {
        let mut new = Peer::from_node(node, &self.routes, expired, now);
        let Some(slot) = self.by_id.get(&node.id).copied() else {
            let slot = self.free.pop().unwrap_or_else(|| {
                self.slots.push(None);
                Slot(u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX))
            });
            self.link(slot, &new);
            if let Some(offer) = &new.offer {
                self.routes.link(slot, new.id, offer);
            }
            self.slots[slot.at()] = Some(new);
            return Upserted { slot, dropped: None, moved: false };
        };
        let mut result = Upserted { slot, dropped: None, moved: false };
        let Some(old) = self.slots[slot.at()].take() else { return result };
        self.unlink(slot, &old);
        if old.offer != new.offer {
            // A router may offer thousands: they are left alone when nothing about them changed.
            if let Some(offer) = &old.offer {
                self.routes.unlink(slot, old.id, offer);
            }
            if let Some(offer) = &new.offer {
                self.routes.link(slot, new.id, offer);
            }
        }
        new.since = old.since;
        result.moved = old.disco != new.disco
            || old.home != new.home
            || old.endpoints != new.endpoints
            || (new.online && !old.online);
        if let Some(mut active) = old.active {
            let mute = new.disco.is_zero() && !new.wireguard_only;
            if old.key != new.key || new.expired || mute || old.wireguard_only != new.wireguard_only {
                result.dropped = Some(active);
            } else {
                if old.disco != new.disco {
                    active.shared = None;
                    active.path.restart(now);
                }
                if old.endpoints != new.endpoints {
                    active.path.set_endpoints(&new.endpoints);
                }
                new.active = Some(active);
            }
        }
        self.link(slot, &new);
        self.slots[slot.at()] = Some(new);
        result
    }

    /// Takes a peer out.
    pub(crate) fn remove(&mut self, id: NodeId) -> Option<Peer> {
        let slot = self.by_id.get(&id).copied()?;
        let peer = self.slots[slot.at()].take()?;
        self.unlink(slot, &peer);
        if let Some(offer) = &peer.offer {
            self.routes.unlink(slot, id, offer);
        }
        self.free.push(slot);
        Some(peer)
    }

    fn link(&mut self, slot: Slot, peer: &Peer) {
        self.by_id.insert(peer.id, slot);
        self.by_key.insert(peer.key, slot);
        if !peer.disco.is_zero() {
            self.by_disco.insert(peer.disco, slot);
        }
        for ip in &peer.hosts {
            self.by_host.insert(*ip, slot);
        }
    }

    /// Takes out what `link` made, except where another peer has taken it over since.
    fn unlink(&mut self, slot: Slot, peer: &Peer) {
        fn take<K: std::hash::Hash + Eq>(map: &mut HashMap<K, Slot>, key: &K, slot: Slot) {
            if map.get(key) == Some(&slot) {
                map.remove(key);
            }
        }
        take(&mut self.by_id, &peer.id, slot);
        take(&mut self.by_key, &peer.key, slot);
        take(&mut self.by_disco, &peer.disco, slot);
        for ip in &peer.hosts {
            take(&mut self.by_host, ip, slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;

    use super::*;

    fn node(id: u64, key: u8, addresses: &[&str]) -> Node {
        let nets: Vec<IpNet> = addresses.iter().map(|a| a.parse().expect("a net")).collect();
        Node {
            id: NodeId(id),
            key: NodePublic::from_bytes([key; 32]),
            disco_key: DiscoPublic::from_bytes([key; 32]),
            addresses: nets.clone(),
            allowed_ips: nets,
            ..Node::default()
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn peers_are_found_by_everything_and_gone_when_removed() {
        let mut table = PeerTable::default();
        let now = Instant::now();
        let a = table.upsert(&node(1, 1, &["100.64.0.1/32", "fd7a::1/128"]), false, now).slot;
        let b = table.upsert(&node(2, 2, &["100.64.0.2/32", "10.1.2.3/32"]), false, now).slot;
        assert_eq!(table.by_ip(ip("fd7a::1")), Some(a));
        assert_eq!(table.by_ip(ip("10.1.2.3")), Some(b));
        assert_eq!(table.by_key(&NodePublic::from_bytes([2; 32])), Some(b));
        assert_eq!(table.by_disco(&DiscoPublic::from_bytes([1; 32])), Some(a));

        // A new key and address take the place of the old ones.
        table.upsert(&node(1, 3, &["100.64.0.3/32"]), false, now);
        assert_eq!(table.by_key(&NodePublic::from_bytes([1; 32])), None);
        assert_eq!((table.by_ip(ip("100.64.0.1")), table.by_ip(ip("100.64.0.3"))), (None, Some(a)));

        assert!(table.remove(NodeId(2)).is_some());
        assert!(table.remove(NodeId(2)).is_none());
        assert_eq!((table.by_ip(ip("10.1.2.3")), table.len()), (None, 1));
        let c = table.upsert(&node(9, 9, &["100.64.0.9/32"]), false, now).slot;
        assert_eq!(c, b, "the place is used again");
    }

    #[test]
    fn an_address_that_moved_to_another_peer_stays_there() {
        let mut table = PeerTable::default();
        let now = Instant::now();
        table.upsert(&node(1, 1, &["100.64.0.1/32"]), false, now);
        let b = table.upsert(&node(2, 2, &["100.64.0.1/32"]), false, now).slot;
        table.remove(NodeId(1));
        assert_eq!(table.by_ip(ip("100.64.0.1")), Some(b));
    }

    #[test]
    fn only_addresses_that_control_allows_are_a_peers() {
        let mut table = PeerTable::default();
        let now = Instant::now();
        let mut peer = node(1, 1, &["100.64.0.1/32", "100.64.0.2/32"]);
        peer.allowed_ips = vec!["100.64.0.1/32".parse().expect("a net"), "0.0.0.0/8".parse().expect("a net")];
        let a = table.upsert(&peer, false, now).slot;
        assert_eq!(table.by_ip(ip("100.64.0.1")), Some(a));
        assert_eq!(table.by_ip(ip("100.64.0.2")), None);
        assert_eq!(table.by_ip(ip("0.1.1.1")), None);
    }
}
