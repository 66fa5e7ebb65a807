//! The peers of the netmap, and what exists only for those that have traffic.
//!
//! This is the one place where anything is known of a peer. An idle peer costs a table entry, a block of
//! packed [`Facts`], and eight bytes in each look-up table. [`Active`] (tunnel, path, shared disco key) is
//! made by the first packet in either direction and goes when nothing moved for 540 s.

mod apply;
mod caps;
mod facts;
mod index;
mod stored;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use crate::batch::RegionId;
use crate::budget::Bucket;
use crate::disco;
use crate::key::{DiscoPublic, NodePublic};
use crate::path::PathAgent;
use crate::routes::{Offer, RouteTable};
use crate::tailcfg::{Node, NodeId, UnixTime};
use crate::wg::{Timestamp, Tunnel};

pub(crate) use apply::PeerChanges;
pub use apply::PeerList;
use apply::{Message, Sweep};
use caps::CapSets;
pub(crate) use caps::Caps;
pub(crate) use facts::Facts;
use index::Index;

/// Most peers kept; what a server sends beyond them is dropped and counted.
pub(crate) const MAX_PEERS: usize = 100_000;
/// Most bytes of facts kept, all peers together.
const MAX_FACT_BYTES: usize = 64 << 20;

/// Position of a peer in its table; valid until the peer leaves the netmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Slot(pub(crate) u32);

impl Slot {
    fn at(self) -> usize {
        self.0 as usize
    }

    fn number(at: usize) -> Self {
        Self(u32::try_from(at).unwrap_or(u32::MAX))
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
    /// Where an authentic WireGuard message last came from by UDP.
    pub(crate) last_from: Option<SocketAddr>,
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
    /// No tailnet lock signature covers it.
    pub(crate) unsigned: bool,
    /// Control says that its key has expired.
    expired: bool,
    pub(crate) online: Option<bool>,
    pub(crate) key_expiry: Option<UnixTime>,
    /// Capabilities that rules may ask for.
    pub(crate) caps: Caps,
    /// Name, addresses, endpoints and the like.
    pub(crate) facts: Facts,
    /// When this life first heard of it: about then it heard of us.
    pub(crate) since: Instant,
    /// The addresses under which this peer knows us, where they are not ours.
    pub(crate) masks: Option<Box<Masks>>,
    /// Of the newest initiation that was taken; an older one is a replay, also when its session is long gone.
    pub(crate) newest_initiation: Timestamp,
    /// The last map message that listed it.
    mark: u64,
    /// What it carries for others, as far as that is used.
    offer: Option<Box<Offer>>,
    pub(crate) active: Option<Box<Active>>,
}

impl Peer {
    /// True when nothing is exchanged with it, by the server's word or by `now` on the server's clock.
    pub(crate) fn is_expired(&self, now: UnixTime) -> bool {
        self.expired || self.key_expiry.is_some_and(|expiry| expiry <= now)
    }

    /// Whether control would tell the same about both.
    fn says_the_same(&self, other: &Self) -> bool {
        let keys = |p: &Self| (p.id, p.key, p.disco, p.home, p.key_expiry);
        let flags = |p: &Self| (p.wireguard_only, p.jailed, p.unsigned, p.expired, p.online);
        keys(self) == keys(other)
            && flags(self) == flags(other)
            && self.facts == other.facts
            && self.caps == other.caps
    }

    /// Whether a packet from or to this address is the peer's own.
    fn has_host(&self, ip: IpAddr) -> bool {
        self.hosts().any(|host| host == ip)
    }

    fn is_at(&self, at: SocketAddr) -> bool {
        self.facts.endpoints().any(|endpoint| endpoint == at)
    }

    /// Its own addresses, as far as control lets it have them.
    fn hosts(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.facts.granted().filter(|net| net.prefix_len() == net.max_prefix_len()).map(|net| net.addr())
    }

    /// What MagicDNS and the routes have to know.
    pub(crate) fn to_node(&self) -> Node {
        let allowed = || self.facts.allowed_ips();
        Node {
            id: self.id,
            stable_id: self.facts.stable_id().to_owned(),
            name: self.facts.name().to_owned(),
            addresses: self.facts.addresses().collect(),
            allowed_ips: allowed().map(|(net, _)| net).collect(),
            primary_routes: allowed().filter(|(_, primary)| *primary).map(|(net, _)| net).collect(),
            online: self.online,
            ..Node::default()
        }
    }

    fn offer(&self, routes: &RouteTable) -> Option<Box<Offer>> {
        if self.facts.has_own_allowed() { routes.offer(&self.to_node()) } else { None }
    }
}

fn masks(facts: &Facts) -> Option<Box<Masks>> {
    let (v4, v6) = facts.masquerade();
    (v4.is_some() || v6.is_some()).then(|| Box::new(Masks { v4, v6 }))
}

/// What an update means for a peer's running state.
pub(crate) struct Upserted {
    pub(crate) slot: Slot,
    /// Running state that ended because the peer has another key or none that is valid.
    pub(crate) dropped: Option<Box<Active>>,
    /// It may be reachable where or how it was not before.
    pub(crate) moved: bool,
    /// Anything about it is new.
    pub(crate) changed: bool,
    /// Its name or an address is.
    pub(crate) renamed: bool,
}

/// Most addresses remembered that two peers have.
const MAX_SHADOWED: usize = 1024;

/// All peers, with the look-ups that the data path needs. Changing one peer costs that peer.
#[derive(Default)]
pub(crate) struct PeerTable {
    slots: Vec<Option<Peer>>,
    free: Vec<Slot>,
    by_id: Index,
    by_key: Index,
    by_disco: Index,
    by_host: Index,
    /// Of several with the same endpoint, as behind like routers, one.
    by_endpoint: Index,
    /// Peers whose address a later one has as well, until that goes. A sane server names none.
    shadowed: Vec<(IpAddr, Slot)>,
    routes: RouteTable,
    caps: CapSets,
    count: usize,
    fact_bytes: usize,
    /// Number of the newest map message.
    mark: u64,
    message: Option<Message>,
    sweep: Option<Sweep>,
}

impl PeerTable {
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&Peer> {
        self.slots.get(slot.at())?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, slot: Slot) -> Option<&mut Peer> {
        self.slots.get_mut(slot.at())?.as_mut()
    }

    pub(crate) fn by_key(&self, key: &NodePublic) -> Option<Slot> {
        self.by_key.get(key, |slot| self.get(slot).is_some_and(|peer| peer.key == *key))
    }

    pub(crate) fn by_disco(&self, key: &DiscoPublic) -> Option<Slot> {
        self.by_disco.get(key, |slot| self.get(slot).is_some_and(|peer| peer.disco == *key))
    }

    /// Whose address this is, or who carries it.
    pub(crate) fn by_ip(&self, ip: IpAddr) -> Option<Slot> {
        match self.by_host.get(&ip, |slot| self.get(slot).is_some_and(|peer| peer.has_host(ip))) {
            Some(slot) => Some(slot),
            None => self.routes.find(ip),
        }
    }

    /// A peer that may be reached there, by what control says.
    pub(crate) fn by_endpoint(&self, at: SocketAddr) -> Option<Slot> {
        self.by_endpoint.get(&at, |slot| self.get(slot).is_some_and(|peer| peer.is_at(at)))
    }

    pub(crate) fn routes_ref(&self) -> &RouteTable {
        &self.routes
    }

    pub(crate) fn routes(&mut self) -> &mut RouteTable {
        &mut self.routes
    }

    /// Takes up the routes of every peer anew, as `accept` and `exclude` want it.
    pub(crate) fn configure_routes(&mut self, accept: bool, exclude: &[ipnet::IpNet]) {
        self.routes.configure(accept, exclude);
        for (slot, peer) in (0..).map(Slot).zip(&mut self.slots) {
            let Some(peer) = peer else { continue };
            peer.offer = peer.offer(&self.routes);
            if let Some(offer) = &peer.offer {
                self.routes.link(slot, peer.id, offer);
            }
        }
    }

    /// Makes a peer the exit node, or none.
    pub(crate) fn set_exit(&mut self, id: Option<NodeId>) {
        let slot = id.and_then(|id| self.slot(id));
        let peer = slot.and_then(|slot| Some((slot, self.slots.get(slot.at())?.as_ref()?)));
        let offer = peer.and_then(|(slot, peer)| Some((slot, peer.offer.as_deref()?)));
        self.routes.set_exit(id, offer);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Slot, &Peer)> {
        (0..).map(Slot).zip(&self.slots).filter_map(|(slot, peer)| Some((slot, peer.as_ref()?)))
    }

    /// The place with this number, as long as the table reaches there.
    pub(crate) fn place(&self, at: usize) -> Option<Slot> {
        (at < self.slots.len()).then_some(Slot::number(at))
    }

    pub(crate) fn slot(&self, id: NodeId) -> Option<Slot> {
        self.by_id.get(&id, |slot| self.get(slot).is_some_and(|peer| peer.id == id))
    }

    /// Adds a peer or brings it up to date; `None` when there is no room for it. `wall` is the server's
    /// time.
    fn put(&mut self, mut new: Peer, wall: UnixTime, now: Instant) -> Option<Upserted> {
        let Some(slot) = self.slot(new.id) else { return self.add(new) };
        let mut result = Upserted { slot, dropped: None, moved: false, changed: false, renamed: false };
        let (old, bytes) = self.slots[slot.at()].as_mut().map(|old| {
            let bytes = old.facts.as_bytes().len();
            (old, bytes)
        })?;
        if old.says_the_same(&new) {
            old.mark = new.mark;
            return Some(result);
        }
        if self.fact_bytes - bytes + new.facts.as_bytes().len() > MAX_FACT_BYTES {
            return None;
        }
        let old = self.slots[slot.at()].take()?;
        self.unlink(slot, &old);
        self.fact_bytes -= bytes;
        new.masks = masks(&new.facts);
        new.offer = new.offer(&self.routes);
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
        if old.key == new.key {
            new.newest_initiation = old.newest_initiation;
        }
        let endpoints_moved = !old.facts.endpoints().eq(new.facts.endpoints());
        result.changed = true;
        result.renamed =
            old.facts.name() != new.facts.name() || !old.facts.addresses().eq(new.facts.addresses());
        result.moved = old.disco != new.disco
            || old.home != new.home
            || endpoints_moved
            || (new.online == Some(true) && old.online != Some(true));
        if let Some(mut active) = old.active {
            let mute = new.disco.is_zero() && !new.wireguard_only;
            let other = old.key != new.key || old.wireguard_only != new.wireguard_only;
            if other || mute || new.is_expired(wall) {
                result.dropped = Some(active);
            } else {
                if old.disco != new.disco {
                    active.shared = None;
                    active.path.restart(now);
                }
                if old.home != new.home {
                    active.path.note_new_home(now);
                }
                if endpoints_moved {
                    let endpoints: Vec<SocketAddr> = new.facts.endpoints().collect();
                    active.path.set_endpoints(&endpoints);
                }
                new.active = Some(active);
            }
        }
        self.link(slot, new);
        Some(result)
    }

    fn add(&mut self, mut new: Peer) -> Option<Upserted> {
        if self.count >= MAX_PEERS || self.fact_bytes + new.facts.as_bytes().len() > MAX_FACT_BYTES {
            return None;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            if self.slots.len() == self.slots.capacity() {
                // Doubling would leave up to half of the largest table unused.
                self.slots.reserve_exact(self.slots.len() / 8 + 8);
            }
            self.slots.push(None);
            Slot::number(self.slots.len() - 1)
        });
        self.count += 1;
        new.masks = masks(&new.facts);
        new.offer = new.offer(&self.routes);
        if let Some(offer) = &new.offer {
            self.routes.link(slot, new.id, offer);
        }
        self.link(slot, new);
        Some(Upserted { slot, dropped: None, moved: false, changed: true, renamed: true })
    }

    /// Takes a peer out.
    #[cfg(test)]
    pub(crate) fn remove(&mut self, id: NodeId) -> Option<Peer> {
        self.vacate(self.slot(id)?)
    }

    fn vacate(&mut self, slot: Slot) -> Option<Peer> {
        let peer = self.slots.get_mut(slot.at())?.take()?;
        self.unlink(slot, &peer);
        if let Some(offer) = &peer.offer {
            self.routes.unlink(slot, peer.id, offer);
        }
        self.fact_bytes -= peer.facts.as_bytes().len();
        self.count -= 1;
        self.free.push(slot);
        Some(peer)
    }

    /// Puts a peer into its place and into the look-up tables.
    fn link(&mut self, slot: Slot, peer: Peer) {
        self.fact_bytes += peer.facts.as_bytes().len();
        // Before the look-ups: they compare with what is there.
        let slots = &mut self.slots;
        slots[slot.at()] = Some(peer);
        let get = |at: Slot| slots.get(at.at()).and_then(Option::as_ref);
        let Some(peer) = get(slot) else { return };
        self.by_id.set(&peer.id, slot, |at| get(at).is_some_and(|other| other.id == peer.id));
        self.by_key.set(&peer.key, slot, |at| get(at).is_some_and(|other| other.key == peer.key));
        if !peer.disco.is_zero() {
            self.by_disco.set(&peer.disco, slot, |at| get(at).is_some_and(|other| other.disco == peer.disco));
        }
        for endpoint in peer.facts.endpoints() {
            let has = |at| get(at).is_some_and(|other| other.is_at(endpoint));
            self.by_endpoint.set(&endpoint, slot, has);
        }
        for ip in peer.hosts() {
            let has = |at| get(at).is_some_and(|other| other.has_host(ip));
            if let Some(other) = self.by_host.get(&ip, has).filter(|other| *other != slot)
                && self.shadowed.len() < MAX_SHADOWED
            {
                self.shadowed.push((ip, other));
            }
            self.by_host.set(&ip, slot, has);
        }
    }

    /// Takes out what `link` made, except where another peer has taken it over since.
    fn unlink(&mut self, slot: Slot, peer: &Peer) {
        self.by_id.unset(&peer.id, slot);
        self.by_key.unset(&peer.key, slot);
        self.by_disco.unset(&peer.disco, slot);
        for ip in peer.hosts() {
            self.by_host.unset(&ip, slot);
        }
        for endpoint in peer.facts.endpoints() {
            self.by_endpoint.unset(&endpoint, slot);
        }
        if !self.shadowed.is_empty() {
            self.give_back(slot, peer);
        }
    }

    /// Addresses that a peer had taken from others are theirs again.
    fn give_back(&mut self, slot: Slot, peer: &Peer) {
        self.shadowed.retain(|(_, other)| *other != slot);
        for ip in peer.hosts() {
            let has =
                |at: Slot| self.slots.get(at.at()).and_then(Option::as_ref).is_some_and(|p| p.has_host(ip));
            let heir = self.shadowed.iter().rposition(|(shadowed, heir)| *shadowed == ip && has(*heir));
            if let Some(at) = heir.filter(|_| self.by_host.get(&ip, has).is_none()) {
                let (ip, heir) = self.shadowed.remove(at);
                self.by_host.set(&ip, heir, |at| at == heir);
            }
        }
    }

    /// Gives memory back after many peers left.
    fn trim(&mut self) {
        while self.slots.pop_if(|last| last.is_none()).is_some() {}
        let end = self.slots.len();
        self.free.retain(|slot| slot.at() < end);
        if self.slots.capacity() / 2 > end {
            self.slots.shrink_to(end + end / 8);
            self.free.shrink_to_fit();
        }
        let indices = [&mut self.by_id, &mut self.by_key, &mut self.by_disco, &mut self.by_host];
        for index in indices.into_iter().chain([&mut self.by_endpoint]) {
            index.shrink();
        }
    }
}

#[cfg(test)]
mod tests;
