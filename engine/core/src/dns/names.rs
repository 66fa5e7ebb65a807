//! The tailnet's own names: those of the nodes (own and peers') and the further records of the DNS
//! configuration.
//!
//! The zone under the node's own suffix, the routes without resolvers and the tailnet's reverse zones are
//! answered with authority: a name that is not there does not exist. A route with resolvers below such a zone
//! takes its names out of it; of several routes the longest counts.
//!
//! Lookups are by hash and so are updates: a change of one node costs the same in a tailnet of any size.
//! Of two nodes with one name the one told about last is answered, and when it goes the other is.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinEncodable, BinEncoder};

use super::reverse::Reverse;
use super::upstream::{SERVICE_V4, SERVICE_V6, Upstreams};
use super::wire::MAX_UDP_ANSWER;
use crate::tailcfg::{DnsConfig, Node, NodeId};

/// Seconds an answer may be kept: a renamed node is found again soon.
const TTL_S: u32 = 5;
/// Seconds the absence of a name may be kept.
const NEGATIVE_TTL_S: u32 = 10;
/// The node capability under which peers' IPv6 addresses are told beside their IPv4 ones.
pub(super) const CAP_PEER_AAAA: &str = "magicdns-aaaa";
/// What stock nodes call their resolver.
const SERVICE_NAME: &str = "magicdns.localhost-tailscale-daemon";
const SERVICE: [IpAddr; 2] = [IpAddr::V4(SERVICE_V4), IpAddr::V6(SERVICE_V6)];

/// Search domains that are used.
const MAX_SEARCH: usize = 16;

/// Names and addresses of the tailnet.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    hosts: HashMap<NodeId, Host>,
    names: Index<Arc<str>>,
    addresses: Index<IpAddr>,
    records: HashMap<Box<str>, Vec<IpAddr>>,
    /// Every name that has a further record somewhere below it.
    above_records: HashSet<Box<str>>,
    /// Canonical suffixes: local zones, and those that have resolvers of their own.
    suffixes: HashMap<Box<str>, Suffix>,
    above_suffixes: HashSet<Box<str>>,
    /// Domains in which a name of one label is looked for, in their order.
    search: Vec<Box<str>>,
    /// MagicDNS is on: what is not there does not exist.
    authoritative: bool,
    families: Families,
}

#[derive(Debug, Clone)]
struct Host {
    name: Arc<str>,
    addresses: Box<[IpAddr]>,
}

/// Who is answered about names under a suffix.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Suffix {
    Local,
    Via(Upstreams),
}

/// Which node answers to a key, where several may claim it.
#[derive(Debug, Clone)]
struct Index<K> {
    holders: HashMap<K, NodeId>,
    /// Who else claims it, the next in line last.
    others: HashMap<K, Vec<NodeId>>,
}

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self { holders: HashMap::new(), others: HashMap::new() }
    }
}

impl<K: Hash + Eq + Clone> Index<K> {
    fn claim(&mut self, key: K, node: NodeId) {
        if let Some(former) = self.holders.insert(key.clone(), node)
            && former != node
        {
            self.others.entry(key).or_default().push(former);
        }
    }

    fn give_up(&mut self, key: &K, node: NodeId) {
        let others = self.others.get_mut(key);
        if self.holders.get(key) == Some(&node) {
            match others.and_then(Vec::pop) {
                Some(next) => self.holders.insert(key.clone(), next),
                None => self.holders.remove(key),
            };
        } else if let Some(others) = others {
            others.retain(|other| *other != node);
        }
        if self.others.get(key).is_some_and(Vec::is_empty) {
            self.others.remove(key);
        }
    }

    fn clear(&mut self) {
        self.holders.clear();
        self.others.clear();
    }
}

/// Which addresses of a node are told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Families {
    /// IPv6 only for nodes without IPv4: not every peer can be reached by it.
    #[default]
    PreferV4,
    /// All that there are.
    Both,
    /// This node has no IPv4 address itself.
    OnlyV6,
}

impl Families {
    fn tells(self, ip: IpAddr, node: &[IpAddr]) -> bool {
        match self {
            Self::Both => true,
            Self::OnlyV6 => ip.is_ipv6(),
            Self::PreferV4 => ip.is_ipv4() || !node.iter().any(IpAddr::is_ipv4),
        }
    }
}

/// What there is to say about a name.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Found {
    /// It has these records.
    Records(Vec<RData>),
    /// It exists, with nothing of the type asked for; the zone is whose SOA goes along.
    NoData(Option<String>),
    /// It does not exist, says this zone.
    NoName(String),
    /// Others know.
    Via(Upstreams),
    /// Not of the tailnet.
    NotOurs,
}

impl Names {
    /// Sets zones, routes, further records and which addresses are told. The node itself is told about with
    /// [`Self::upsert`] like any other. True when routes changed.
    pub(super) fn configure(
        &mut self,
        self_node: &Node,
        dns: &DnsConfig,
        mut upstreams: impl FnMut(&str, &[crate::tailcfg::Resolver]) -> Upstreams,
    ) -> bool {
        let has = |v4: bool| self_node.addresses.iter().any(|net| net.addr().is_ipv4() == v4);
        self.families = if has(false) && !has(true) {
            Families::OnlyV6
        } else if self_node.cap_map.contains_key(CAP_PEER_AAAA) {
            Families::Both
        } else {
            Families::PreferV4
        };

        self.authoritative = dns.proxied;
        let mut suffixes = HashMap::new();
        // Without MagicDNS the names are known, but nothing is said about those that are not.
        if let Some((_, suffix)) = self_node.name.split_once('.').filter(|_| dns.proxied)
            && let Some(suffix) = canonical(suffix)
        {
            suffixes.insert(suffix, Suffix::Local);
        }
        for (suffix, via) in &dns.routes {
            let Some(name) = canonical(suffix) else { continue };
            let how = if via.is_empty() { Suffix::Local } else { Suffix::Via(upstreams(suffix, via)) };
            suffixes.insert(name, how);
        }
        self.above_suffixes = suffixes.keys().flat_map(|suffix| above(suffix)).map(Box::from).collect();
        let changed = self.suffixes != suffixes;
        self.suffixes = suffixes;

        self.search = dns.domains.iter().filter_map(|domain| canonical(domain)).take(MAX_SEARCH).collect();
        self.records.clear();
        for record in &dns.extra_records {
            let value = match (record.r#type.as_str(), record.value.parse()) {
                ("" | "A", Ok(ip @ IpAddr::V4(_))) | ("" | "AAAA", Ok(ip @ IpAddr::V6(_))) => ip,
                _ => continue,
            };
            if let Some(name) = canonical(&record.name) {
                self.records.entry(name).or_default().push(value);
            }
        }
        self.records.insert(SERVICE_NAME.into(), SERVICE.into());
        self.above_records = self.records.keys().flat_map(|name| above(name)).map(Box::from).collect();
        changed
    }

    /// Adds a node, or takes its new name and addresses.
    pub(super) fn upsert(&mut self, node: &Node) {
        let name = canonical(&node.name);
        if let (Some(host), Some(name)) = (self.hosts.get(&node.id), &name)
            && *host.name == **name
            && host.addresses.iter().copied().eq(node.addresses.iter().map(ipnet::IpNet::addr))
        {
            return;
        }
        self.remove(node.id);
        let Some(name) = name else { return };
        let name: Arc<str> = name.into();
        let addresses: Box<[IpAddr]> = node.addresses.iter().map(ipnet::IpNet::addr).collect();
        for ip in &addresses {
            self.addresses.claim(*ip, node.id);
        }
        self.names.claim(Arc::clone(&name), node.id);
        self.hosts.insert(node.id, Host { name, addresses });
    }

    /// Forgets a node.
    pub(super) fn remove(&mut self, id: NodeId) {
        let Some(host) = self.hosts.remove(&id) else { return };
        self.names.give_up(&host.name, id);
        for ip in &host.addresses {
            self.addresses.give_up(ip, id);
        }
    }

    /// Forgets every node; zones and further records stay.
    pub(super) fn clear_nodes(&mut self) {
        self.hosts.clear();
        self.names.clear();
        self.addresses.clear();
    }

    /// How many nodes have a name.
    pub(super) fn len(&self) -> usize {
        self.hosts.len()
    }

    /// What the first search domain with such a name knows of a name of one label; nothing where none has it,
    /// or only others would know.
    pub(super) fn search(&self, label: &str, kind: RecordType) -> Option<Found> {
        if label.is_empty() || label.contains('.') {
            return None;
        }
        self.search
            .iter()
            .map(|domain| self.find(&format!("{label}.{domain}"), kind))
            .find(|found| matches!(found, Found::Records(_) | Found::NoData(_)))
    }

    /// What is known about a name in lower case, without a dot at its end.
    pub(super) fn find(&self, name: &str, kind: RecordType) -> Found {
        let zone = self.zone_of(name);
        let local = |zone: Option<(&str, &Suffix)>| match zone {
            Some((zone, Suffix::Local)) => Some(zone.to_owned()),
            Some((_, Suffix::Via(_))) | None => None,
        };
        if let Some(data) = self.forward(name, kind) {
            return if data.is_empty() { Found::NoData(local(zone)) } else { Found::Records(data) };
        }
        if let Some(ip) =
            via(name).filter(|_| matches!(kind, RecordType::A | RecordType::AAAA | RecordType::ANY))
        {
            return if kind == RecordType::A {
                Found::NoData(None)
            } else {
                Found::Records(vec![RData::AAAA(AAAA(ip))])
            };
        }
        if name == "onion" || name.ends_with(".onion") {
            // RFC 7686: such a name must not reach a name server.
            return Found::NoName("onion".into());
        }
        let reverse = Reverse::parse(name);
        if let Some(reverse) = &reverse {
            let holder = reverse.address.and_then(|ip| self.addresses.holders.get(&ip));
            let host = holder.and_then(|id| self.hosts.get(id)).map(|host| &*host.name);
            let service = reverse.address.filter(|ip| SERVICE.contains(ip)).map(|_| SERVICE_NAME);
            if let Some(name) = host.or(service).and_then(wire_name) {
                return if matches!(kind, RecordType::PTR | RecordType::ANY) {
                    Found::Records(vec![RData::PTR(PTR(name))])
                } else {
                    Found::NoData(reverse.zone.map(str::to_owned))
                };
            }
        }
        match (zone, reverse) {
            (Some((_, Suffix::Via(upstreams))), _) => Found::Via(upstreams.clone()),
            (Some((zone, Suffix::Local)), _) => {
                // Nodes' names are one label below a zone: only records and other zones lie deeper.
                let exists =
                    zone == name || self.above_records.contains(name) || self.above_suffixes.contains(name);
                if exists { Found::NoData(Some(zone.into())) } else { Found::NoName(zone.into()) }
            }
            (None, Some(reverse)) => match reverse.zone.filter(|_| self.authoritative) {
                // A name above addresses exists, or a resolver would not look below it.
                Some(zone) if reverse.address.is_none() && !reverse.odd => Found::NoData(Some(zone.into())),
                Some(zone) => Found::NoName(zone.into()),
                None => Found::NotOurs,
            },
            (None, None) => Found::NotOurs,
        }
    }

    /// The longest suffix of `name` that there is a rule for.
    fn zone_of(&self, name: &str) -> Option<(&str, &Suffix)> {
        std::iter::once(name)
            .chain(above(name))
            .find_map(|suffix| self.suffixes.get_key_value(suffix))
            .map(|(zone, how)| (&**zone, how))
    }

    /// The records of a forward name, `None` when there is no such name.
    fn forward(&self, name: &str, kind: RecordType) -> Option<Vec<RData>> {
        let host = self.names.holders.get(name).and_then(|id| self.hosts.get(id));
        let records = self.records.get(name);
        if host.is_none() && records.is_none() {
            return None;
        }
        let node: &[IpAddr] = host.map_or(&[], |host| &host.addresses);
        let told = node.iter().filter(|ip| self.families.tells(**ip, node));
        let mut data: Vec<RData> = Vec::new();
        for ip in told.chain(records.into_iter().flatten()) {
            let rdata = match ip {
                IpAddr::V4(ip) if matches!(kind, RecordType::A | RecordType::ANY) => RData::A(A(*ip)),
                IpAddr::V6(ip) if matches!(kind, RecordType::AAAA | RecordType::ANY) => {
                    RData::AAAA(AAAA(*ip))
                }
                IpAddr::V4(_) | IpAddr::V6(_) => continue,
            };
            if !data.contains(&rdata) {
                data.push(rdata);
            }
        }
        Some(data)
    }
}

/// The address that a name like `192-168-1-2-via-7` stands for: an IPv4 address behind the subnet router of a
/// site, in `fd7a:115c:a1e0:b1a::/64`.
fn via(name: &str) -> Option<Ipv6Addr> {
    let (label, domain) = name.split_once('.').unwrap_or((name, ""));
    if !(domain.is_empty() || is_within(domain, "ts.net") || is_within(domain, "tailscale.net")) {
        return None;
    }
    let (address, site) = label.split_once("-via-")?;
    let address: Ipv4Addr = address.replace('-', ".").parse().ok()?;
    let site: u32 = match site.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok()?,
        None => site.parse().ok()?,
    };
    let [high, low] = [site >> 16, site & 0xffff].map(|half| u16::try_from(half).unwrap_or(0));
    let [a, b, c, d] = address.octets();
    let (first, last) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    Some(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0xb1a, high, low, first, last))
}

/// True when `name` is `zone` or lies under it.
pub(super) fn is_within(name: &str, zone: &str) -> bool {
    name.strip_suffix(zone).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// A name from the netmap in the form of the index: lower case, no dot at the end. `None` for what is
/// no host name.
fn canonical(name: &str) -> Option<Box<str>> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let valid =
        name.len() <= 253 && name.split('.').all(|l| (1..=63).contains(&l.len()) && l.bytes().all(plain));
    valid.then(|| name.to_ascii_lowercase().into())
}

pub(super) fn plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

/// The suffixes of a name that are shorter by whole labels, longest first.
fn above(name: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(name.split_once('.'), |(_, rest)| rest.split_once('.')).map(|(_, rest)| rest)
}

/// A name of the index as it travels.
fn wire_name(name: &str) -> Option<Name> {
    let mut wire = Name::from_labels(name.split('.').map(str::as_bytes)).ok()?;
    wire.set_fqdn(true);
    Some(wire)
}

/// A zone's SOA, which tells how long an absence may be kept; its other fields serve nobody here.
fn soa(zone: &str) -> Option<Record> {
    let name = wire_name(zone)?;
    let data = SOA::new(name.clone(), name.clone(), 1, 10, 10, 10, NEGATIVE_TTL_S);
    Some(Record::from_rdata(name, NEGATIVE_TTL_S, RData::SOA(data)))
}

/// Writes the reply that says `found` about `query`'s question into `reply`; a UDP reply says no more than the
/// asker can take. False when it cannot be written.
pub(super) fn write_reply(
    query: &Message,
    question: &Query,
    found: Found,
    stream: bool,
    reply: &mut Vec<u8>,
) -> bool {
    let mut response = Message::response(query.metadata.id, query.metadata.op_code);
    response.metadata.recursion_desired = query.metadata.recursion_desired;
    response.metadata.recursion_available = query.metadata.recursion_desired;
    response.add_query(question.clone());
    let mut limit = 512;
    if let Some(edns) = &query.edns {
        limit = edns.max_payload().clamp(512, MAX_UDP_ANSWER);
        let mut own = Edns::new();
        own.set_max_payload(MAX_UDP_ANSWER).set_dnssec_ok(edns.flags().dnssec_ok);
        response.set_edns(own);
    }
    if query.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        response.metadata.response_code = ResponseCode::BADVERS;
    } else {
        fill(question, found, &mut response);
    }
    let limit = if stream { usize::from(u16::MAX) } else { usize::from(limit) };
    if encode(&response, reply) && reply.len() <= limit {
        return true;
    }
    reply.clear();
    encode(&response.truncate(), reply)
}

fn fill(question: &Query, found: Found, response: &mut Message) {
    response.metadata.authoritative = true;
    match found {
        Found::Records(data) => {
            let record = |data| Record::from_rdata(question.name.clone(), TTL_S, data);
            response.add_answers(data.into_iter().map(record));
        }
        Found::NoData(zone) => response.authorities.extend(zone.as_deref().and_then(soa)),
        Found::NoName(zone) => {
            response.metadata.response_code = ResponseCode::NXDomain;
            response.authorities.extend(soa(&zone));
        }
        Found::NotOurs | Found::Via(_) => {
            response.metadata.authoritative = false;
            response.metadata.response_code = ResponseCode::Refused;
        }
    }
}

fn encode(message: &Message, reply: &mut Vec<u8>) -> bool {
    message.emit(&mut BinEncoder::new(reply)).is_ok()
}
