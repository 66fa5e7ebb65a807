//! What is known of a peer and seldom looked at, packed into one block of memory.
//!
//! A tailnet has ten thousand peers, and of most of them nothing but the key and the address is ever
//! used. A `String` or `Vec` for each fact would take several times what the facts themselves do.
//! Everything is bounded; what is over a bound is left out and counted.
//!
//! | part | form |
//! |---|---|
//! | addresses | count u8, then each: kind u8, prefix length u8, 4 or 16 bytes |
//! | name, stable id | length u8, UTF-8 |
//! | masquerade addresses | which u8, then 4 and 16 bytes |
//! | allowed prefixes | count u16 LE or `SAME`, then as addresses |
//! | endpoints | count u8, then each: kind u8, 4 or 16 bytes, port u16 LE |

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use crate::tailcfg::Node;

/// Longest name: a DNS name with its final dot.
const MAX_NAME: usize = 254;
const MAX_STABLE_ID: usize = 64;
const MAX_ADDRESSES: usize = 16;
/// An app connector may have a route for each address of a service.
const MAX_ALLOWED: usize = 4096;
const MAX_ENDPOINTS: usize = 32;

/// Kind of an address: IPv6.
const V6: u8 = 1;
/// Kind of an address: among the allowed prefixes, so that packets from and to it are the peer's.
const GRANTED: u8 = 2;
/// Kind of an allowed prefix: control calls the peer primary for it.
const PRIMARY: u8 = 4;
/// In place of a count: the allowed prefixes are the addresses.
const SAME: u16 = u16::MAX;
const MASQ_V4: u8 = 1;
const MASQ_V6: u8 = 2;

/// The packed facts of one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts(Box<[u8]>);

impl Facts {
    /// Packs what `node` says; and how much of it was over a bound.
    pub(crate) fn pack(node: &Node) -> (Self, u32) {
        let mut out = Vec::with_capacity(192);
        let mut cut = 0;
        let addresses = bounded(&node.addresses, MAX_ADDRESSES, &mut cut);
        put_count(&mut out, addresses.len());
        for net in addresses {
            let granted = node.allowed_ips.iter().any(|allowed| allowed.contains(net));
            put_net(&mut out, net, if granted { GRANTED } else { 0 });
        }
        put_text(&mut out, &node.name, MAX_NAME, &mut cut);
        put_text(&mut out, &node.stable_id, MAX_STABLE_ID, &mut cut);
        out.push(u8::from(node.masq_v4.is_some()) * MASQ_V4 + u8::from(node.masq_v6.is_some()) * MASQ_V6);
        out.extend(node.masq_v4.map(|ip| ip.octets()).into_iter().flatten());
        out.extend(node.masq_v6.map(|ip| ip.octets()).into_iter().flatten());
        if node.allowed_ips == addresses {
            out.extend(SAME.to_le_bytes());
        } else {
            let allowed = bounded(&node.allowed_ips, MAX_ALLOWED, &mut cut);
            out.extend(u16::try_from(allowed.len()).unwrap_or_default().to_le_bytes());
            let primary: HashSet<&IpNet> = node.primary_routes.iter().collect();
            for net in allowed {
                put_net(&mut out, net, if primary.contains(net) { PRIMARY } else { 0 });
            }
        }
        put_endpoints(&mut out, &node.endpoints, &mut cut);
        (Self(out.into()), cut)
    }

    /// The same with other endpoints.
    pub(crate) fn with_endpoints(&self, endpoints: &[SocketAddr]) -> (Self, u32) {
        let mut cut = 0;
        let keep = self.0.len() - self.at_endpoints().0.len();
        let mut out = self.0[..keep].to_vec();
        put_endpoints(&mut out, endpoints, &mut cut);
        (Self(out.into()), cut)
    }

    /// Takes bytes that [`Self::as_bytes`] once gave; `None` for any other.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        for _ in 0..reader.u8()? {
            reader.net()?;
        }
        reader.text()?;
        reader.text()?;
        reader.masq()?;
        let allowed = reader.u16()?;
        for _ in 0..if allowed == SAME { 0 } else { allowed } {
            reader.net()?;
        }
        for _ in 0..reader.u8()? {
            reader.endpoint()?;
        }
        reader.0.is_empty().then(|| Self(bytes.into()))
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Own addresses.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.at_addresses().map(|(net, _)| net)
    }

    /// Those of the addresses that control allows the peer to use.
    pub(crate) fn granted(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.at_addresses().filter_map(|(net, kind)| (kind & GRANTED != 0).then_some(net))
    }

    /// What may be sent to the peer and come from it: addresses and routes; and for which of them control
    /// calls it primary.
    pub(crate) fn allowed_ips(&self) -> impl Iterator<Item = (IpNet, bool)> + '_ {
        let mut reader = self.at_allowed();
        let count = reader.u16().unwrap_or_default();
        let same = count == SAME;
        let listed = (0..if same { 0 } else { count }).map_while(move |_| {
            let (net, kind) = reader.net()?;
            Some((net, kind & PRIMARY != 0))
        });
        self.addresses().filter(move |_| same).map(|net| (net, false)).chain(listed)
    }

    /// Whether anything but the addresses is allowed, or not all of them.
    pub(crate) fn has_own_allowed(&self) -> bool {
        self.at_allowed().u16() != Some(SAME)
    }

    /// Fully qualified name, as control writes it.
    pub(crate) fn name(&self) -> &str {
        self.after_addresses().text().unwrap_or_default()
    }

    /// What to call the peer: its name without the dot at the end. Nodes of a user with whom this node is
    /// shared have none, so they are called by their first address.
    pub(crate) fn called(&self) -> String {
        match self.name().trim_end_matches('.') {
            "" => self.addresses().next().map(|net| net.addr().to_string()).unwrap_or_default(),
            name => name.to_owned(),
        }
    }

    /// The node's name for good.
    pub(crate) fn stable_id(&self) -> &str {
        let mut reader = self.after_addresses();
        let _ = reader.text();
        reader.text().unwrap_or_default()
    }

    /// The addresses under which the peer knows us.
    pub(crate) fn masquerade(&self) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        self.after_texts().masq().unwrap_or_default()
    }

    /// Where the peer's UDP socket may be reached.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        let mut reader = self.at_endpoints();
        let count = reader.u8().unwrap_or_default();
        (0..count).map_while(move |_| reader.endpoint())
    }

    fn at_addresses(&self) -> impl Iterator<Item = (IpNet, u8)> + '_ {
        let mut reader = Reader(&self.0);
        let count = reader.u8().unwrap_or_default();
        (0..count).map_while(move |_| reader.net())
    }

    fn after_addresses(&self) -> Reader<'_> {
        let mut reader = Reader(&self.0);
        for _ in 0..reader.u8().unwrap_or_default() {
            let _ = reader.skip_net();
        }
        reader
    }

    fn after_texts(&self) -> Reader<'_> {
        let mut reader = self.after_addresses();
        let _ = reader.skip_text();
        let _ = reader.skip_text();
        reader
    }

    fn at_allowed(&self) -> Reader<'_> {
        let mut reader = self.after_texts();
        let _ = reader.masq();
        reader
    }

    fn at_endpoints(&self) -> Reader<'_> {
        let mut reader = self.at_allowed();
        let count = reader.u16().unwrap_or_default();
        for _ in 0..if count == SAME { 0 } else { count } {
            let _ = reader.skip_net();
        }
        reader
    }
}

fn bounded<'a, T>(list: &'a [T], most: usize, cut: &mut u32) -> &'a [T] {
    let kept = &list[..list.len().min(most)];
    *cut += u32::try_from(list.len() - kept.len()).unwrap_or(u32::MAX);
    kept
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    out.push(u8::try_from(count).unwrap_or(u8::MAX));
}

/// Text over the bound is left out as a whole: half a name is somebody else's.
fn put_text(out: &mut Vec<u8>, text: &str, most: usize, cut: &mut u32) {
    let kept = if text.len() > most { "" } else { text };
    *cut += u32::from(kept.len() != text.len());
    put_count(out, kept.len());
    out.extend_from_slice(kept.as_bytes());
}

fn put_ip(out: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => out.extend(ip.octets()),
        IpAddr::V6(ip) => out.extend(ip.octets()),
    }
}

fn put_net(out: &mut Vec<u8>, net: &IpNet, flags: u8) {
    out.extend([flags | (u8::from(net.addr().is_ipv6()) * V6), net.prefix_len()]);
    put_ip(out, net.addr());
}

fn put_endpoints(out: &mut Vec<u8>, endpoints: &[SocketAddr], cut: &mut u32) {
    let endpoints = bounded(endpoints, MAX_ENDPOINTS, cut);
    put_count(out, endpoints.len());
    for endpoint in endpoints {
        out.push(u8::from(endpoint.is_ipv6()) * V6);
        put_ip(out, endpoint.ip());
        out.extend(endpoint.port().to_le_bytes());
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u8(&mut self) -> Option<u8> {
        Some(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn ip(&mut self, kind: u8) -> Option<IpAddr> {
        if kind & V6 == 0 {
            self.array::<4>().map(IpAddr::from)
        } else {
            self.array::<16>().map(IpAddr::from)
        }
    }

    /// An address and its kind.
    fn net(&mut self) -> Option<(IpNet, u8)> {
        let [kind, prefix] = self.array()?;
        let ip = self.ip(kind)?;
        Some((IpNet::new(ip, prefix).ok()?, kind))
    }

    fn skip_net(&mut self) -> Option<()> {
        let [kind, _] = self.array()?;
        self.bytes(if kind & V6 == 0 { 4 } else { 16 }).map(drop)
    }

    fn text(&mut self) -> Option<&'a str> {
        let length = self.u8()?;
        std::str::from_utf8(self.bytes(length.into())?).ok()
    }

    fn skip_text(&mut self) -> Option<()> {
        let length = self.u8()?;
        self.bytes(length.into()).map(drop)
    }

    fn masq(&mut self) -> Option<(Option<Ipv4Addr>, Option<Ipv6Addr>)> {
        let which = self.u8()?;
        let v4 = if which & MASQ_V4 == 0 { None } else { Some(self.array::<4>()?.into()) };
        let v6 = if which & MASQ_V6 == 0 { None } else { Some(self.array::<16>()?.into()) };
        Some((v4, v6))
    }

    fn endpoint(&mut self) -> Option<SocketAddr> {
        let kind = self.u8()?;
        Some(SocketAddr::new(self.ip(kind)?, self.u16()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().expect("a net")
    }

    fn node() -> Node {
        Node {
            name: "n.tail.example.".into(),
            stable_id: "nABC".into(),
            addresses: vec![net("100.64.0.1/32"), net("fd7a::1/128")],
            allowed_ips: vec![net("100.64.0.1/32"), net("10.0.0.0/8"), net("::/0")],
            primary_routes: vec![net("10.0.0.0/8")],
            endpoints: vec!["192.0.2.1:5".parse().expect("it"), "[2001:db8::1]:6".parse().expect("it")],
            masq_v6: Some("fd7a::9".parse().expect("an address")),
            ..Node::default()
        }
    }

    #[test]
    fn what_is_packed_is_read() {
        let (facts, cut) = Facts::pack(&node());
        assert_eq!(cut, 0);
        assert_eq!((facts.name(), facts.stable_id()), ("n.tail.example.", "nABC"));
        assert_eq!(facts.addresses().collect::<Vec<_>>(), node().addresses);
        let allowed: Vec<_> = facts.allowed_ips().collect();
        assert_eq!(allowed.iter().map(|(net, _)| *net).collect::<Vec<_>>(), node().allowed_ips);
        assert_eq!(allowed.iter().map(|(_, primary)| *primary).collect::<Vec<_>>(), [false, true, false]);
        assert_eq!(facts.endpoints().collect::<Vec<_>>(), node().endpoints);
        assert_eq!(facts.masquerade(), (None, node().masq_v6));
        let mut same = node();
        same.allowed_ips.clone_from(&same.addresses);
        let (facts, _) = Facts::pack(&same);
        assert!(!facts.has_own_allowed() && facts.allowed_ips().map(|(net, _)| net).eq(facts.addresses()));
        let (moved, _) = facts.with_endpoints(&same.endpoints[1..]);
        assert_eq!(moved.endpoints().collect::<Vec<_>>(), same.endpoints[1..]);
        assert_eq!((moved.name(), moved.granted().count()), ("n.tail.example.", 2));
        assert_eq!(Facts::from_bytes(moved.as_bytes()), Some(moved));
    }

    #[test]
    fn only_addresses_among_the_allowed_are_granted() {
        let mut node = node();
        node.allowed_ips = vec![net("100.64.0.1/32")];
        assert_eq!(Facts::pack(&node).0.granted().collect::<Vec<_>>(), [net("100.64.0.1/32")]);
    }

    #[test]
    fn a_greedy_peer_is_cut_and_counted() {
        let node = Node {
            name: "x".repeat(70_000),
            stable_id: "y".repeat(65),
            addresses: vec![net("100.64.0.1/32"); 20],
            allowed_ips: vec![net("10.0.0.0/8"); 70_000],
            endpoints: vec!["192.0.2.1:5".parse().expect("it"); 1000],
            ..Node::default()
        };
        let (facts, cut) = Facts::pack(&node);
        assert_eq!(cut, 1 + 1 + 4 + (70_000 - 4096) + (1000 - 32));
        assert_eq!((facts.name(), facts.addresses().count()), ("", MAX_ADDRESSES));
        assert_eq!((facts.allowed_ips().count(), facts.endpoints().count()), (MAX_ALLOWED, MAX_ENDPOINTS));
        assert!(facts.as_bytes().len() < 32 << 10, "{} bytes", facts.as_bytes().len());
    }

    proptest::proptest! {
        #[test]
        fn fuzz_facts_of_any_bytes(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..120)) {
            if let Some(facts) = Facts::from_bytes(&bytes) {
                let read = facts.allowed_ips().count() + facts.endpoints().count() + facts.name().len();
                proptest::prop_assert!(read <= 1 + 2 * bytes.len());
            }
        }
    }
}
