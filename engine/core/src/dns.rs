//! MagicDNS: answers for the tailnet's own names, from what the netmap says.
//!
//! The names are those of the nodes (own and peers') and the further records of the DNS configuration.
//! The zone under the node's own suffix, the routes without resolvers and the tailnet's reverse zones are
//! answered with authority: a name that is not there does not exist. Any other name is refused, so that a
//! stub resolver asks the next server.
//!
//! Lookups are by hash and so are updates: a change of one node costs the same in a tailnet of any size.
//! Two nodes of one name cannot both be right; the one told about last is answered.

mod reverse;

use std::collections::HashMap;
use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinEncodable, BinEncoder};

use self::reverse::Reverse;
use crate::tailcfg::{DnsConfig, Node, NodeId};

/// Seconds an answer may be kept: a renamed node is found again soon.
const TTL_S: u32 = 5;
/// Seconds the absence of a name may be kept.
const NEGATIVE_TTL_S: u32 = 10;
/// The largest UDP answer that needs no fragment on any path, RFC 9715.
const MAX_UDP_ANSWER: u16 = 1232;
const HEADER: usize = 12;
/// The node capability under which peers' IPv6 addresses are told beside their IPv4 ones.
const CAP_PEER_AAAA: &str = "magicdns-aaaa";

/// What becomes of a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsAction {
    /// The reply is to be sent.
    Reply,
    /// Not a query; answering could start a loop.
    Ignore,
}

/// Names and addresses of the tailnet.
#[derive(Debug, Clone, Default)]
pub struct Magic {
    hosts: HashMap<NodeId, Host>,
    names: HashMap<Box<str>, NodeId>,
    addresses: HashMap<IpAddr, NodeId>,
    records: HashMap<Box<str>, Vec<IpAddr>>,
    /// Canonical names of the forward zones, longest first.
    zones: Vec<Box<str>>,
    families: Families,
}

#[derive(Debug, Clone)]
struct Host {
    name: Box<str>,
    addresses: Box<[IpAddr]>,
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

/// How a query about our names ends.
enum Found {
    Records(Vec<RData>),
    /// The name exists, with nothing of the type asked for; the zone is whose SOA goes along.
    NoData(Option<String>),
    NoName(String),
    NotOurs,
}

impl Magic {
    /// No names: every query is refused.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets zones, further records and which addresses are told. The node itself is told about with
    /// [`Self::upsert`] like any other.
    pub fn configure(&mut self, self_node: &Node, dns: &DnsConfig) {
        let has = |v4: bool| self_node.addresses.iter().any(|net| net.addr().is_ipv4() == v4);
        self.families = if has(false) && !has(true) {
            Families::OnlyV6
        } else if self_node.cap_map.contains_key(CAP_PEER_AAAA) {
            Families::Both
        } else {
            Families::PreferV4
        };

        let suffix = self_node.name.split_once('.').map(|(_, suffix)| suffix);
        let local = dns.routes.iter().filter(|(_, via)| via.is_empty()).map(|(zone, _)| zone.as_str());
        self.zones = suffix.into_iter().chain(local).filter_map(canonical).collect();
        self.zones.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        self.zones.dedup();

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
    }

    /// Adds a node, or takes its new name and addresses.
    pub fn upsert(&mut self, node: &Node) {
        self.remove(node.id);
        let Some(name) = canonical(&node.name) else { return };
        let addresses: Box<[IpAddr]> = node.addresses.iter().map(ipnet::IpNet::addr).collect();
        for ip in &addresses {
            self.addresses.insert(*ip, node.id);
        }
        self.names.insert(name.clone(), node.id);
        self.hosts.insert(node.id, Host { name, addresses });
    }

    /// Forgets a node.
    pub fn remove(&mut self, id: NodeId) {
        let Some(host) = self.hosts.remove(&id) else { return };
        // Another node may have taken over the name or an address by now.
        if self.names.get(&host.name) == Some(&id) {
            self.names.remove(&host.name);
        }
        for ip in &host.addresses {
            if self.addresses.get(ip) == Some(&id) {
                self.addresses.remove(ip);
            }
        }
    }

    /// Forgets every node; zones and further records stay.
    pub fn clear_nodes(&mut self) {
        self.hosts.clear();
        self.names.clear();
        self.addresses.clear();
    }

    /// How many nodes have a name.
    #[must_use]
    pub fn len(&self) -> usize {
        self.hosts.len()
    }

    /// True without any node.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    /// Answers one UDP query into `reply`, whose former content is lost.
    pub fn answer(&self, query: &[u8], reply: &mut Vec<u8>) -> DnsAction {
        reply.clear();
        let Some(header) = query.first_chunk::<HEADER>() else { return DnsAction::Ignore };
        if header[2] & 0x80 != 0 {
            return DnsAction::Ignore;
        }
        let op_code = OpCode::from_u8(header[2] >> 3 & 0x0f);
        if op_code != OpCode::Query {
            return fail(header, ResponseCode::NotImp, reply);
        }
        // Counted before the message is read: what the other counts cost is bounded by the bytes there are.
        if header[4..6] != [0, 1] {
            return fail(header, ResponseCode::FormErr, reply);
        }
        let Ok(message) = Message::from_bytes(query) else {
            return fail(header, ResponseCode::FormErr, reply);
        };
        let Some(question) = message.queries.first() else {
            return fail(header, ResponseCode::FormErr, reply);
        };

        let mut response = Message::response(message.metadata.id, op_code);
        response.metadata.recursion_desired = message.metadata.recursion_desired;
        response.metadata.recursion_available = message.metadata.recursion_desired;
        response.add_query(question.clone());
        let mut limit = 512;
        if let Some(edns) = &message.edns {
            limit = edns.max_payload().clamp(512, MAX_UDP_ANSWER);
            let mut own = Edns::new();
            own.set_max_payload(MAX_UDP_ANSWER).set_dnssec_ok(edns.flags().dnssec_ok);
            response.set_edns(own);
        }
        if message.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            response.metadata.response_code = ResponseCode::BADVERS;
        } else {
            self.resolve(question, &mut response);
        }
        if !encode(&response, reply) || reply.len() > usize::from(limit) {
            reply.clear();
            if !encode(&response.truncate(), reply) {
                reply.clear();
                return fail(header, ResponseCode::ServFail, reply);
            }
        }
        DnsAction::Reply
    }

    fn resolve(&self, question: &Query, response: &mut Message) {
        let name = text(&question.name);
        let found = if question.query_class == DNSClass::IN {
            self.find(&name, question.query_type)
        } else {
            Found::NotOurs
        };
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
            Found::NotOurs => {
                response.metadata.authoritative = false;
                response.metadata.response_code = ResponseCode::Refused;
            }
        }
    }

    fn find(&self, name: &str, kind: RecordType) -> Found {
        if let Some(data) = self.forward(name, kind) {
            let zone = self.zone_of(name).map(str::to_owned);
            return if data.is_empty() { Found::NoData(zone) } else { Found::Records(data) };
        }
        if let Some(zone) = self.zone_of(name) {
            return if self.has_below(name) {
                Found::NoData(Some(zone.into()))
            } else {
                Found::NoName(zone.into())
            };
        }
        let Some(reverse) = Reverse::parse(name) else { return Found::NotOurs };
        let host = reverse.address.and_then(|ip| self.addresses.get(&ip)).and_then(|id| self.hosts.get(id));
        match (host, reverse.zone) {
            (Some(host), zone) => match wire(&host.name) {
                Some(name) if matches!(kind, RecordType::PTR | RecordType::ANY) => {
                    Found::Records(vec![RData::PTR(PTR(name))])
                }
                _ => Found::NoData(zone.map(str::to_owned)),
            },
            // A name above addresses exists, or a resolver would not look below it.
            (None, Some(zone)) if reverse.address.is_none() && !reverse.odd => {
                Found::NoData(Some(zone.into()))
            }
            (None, Some(zone)) => Found::NoName(zone.into()),
            (None, None) => Found::NotOurs,
        }
    }

    /// The records of a forward name, `None` when there is no such name.
    fn forward(&self, name: &str, kind: RecordType) -> Option<Vec<RData>> {
        let host = self.names.get(name).and_then(|id| self.hosts.get(id));
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

    fn zone_of(&self, name: &str) -> Option<&str> {
        self.zones.iter().map(AsRef::as_ref).find(|zone| is_within(name, zone))
    }

    /// True for a zone's own name and for a name that only has names below it. Nodes' names are one
    /// label below a zone, so only the further records can put anything between.
    fn has_below(&self, name: &str) -> bool {
        self.zones.iter().any(|zone| is_within(zone, name))
            || self.records.keys().any(|record| is_within(record, name))
    }
}

/// True when `name` is `zone` or lies under it.
fn is_within(name: &str, zone: &str) -> bool {
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

fn plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

/// A queried name in the form of the index, where a byte no indexed name has becomes `?`.
fn text(name: &Name) -> String {
    let mut text = String::with_capacity(name.len());
    for label in name.iter() {
        if !text.is_empty() {
            text.push('.');
        }
        text.extend(label.iter().map(|b| if plain(*b) { char::from(b.to_ascii_lowercase()) } else { '?' }));
    }
    text
}

/// A name of the index as it travels.
fn wire(name: &str) -> Option<Name> {
    let mut wire = Name::from_labels(name.split('.').map(str::as_bytes)).ok()?;
    wire.set_fqdn(true);
    Some(wire)
}

/// A zone's SOA, which tells how long an absence may be kept; its other fields serve nobody here.
fn soa(zone: &str) -> Option<Record> {
    let name = wire(zone)?;
    let data = SOA::new(name.clone(), name.clone(), 1, 10, 10, 10, NEGATIVE_TTL_S);
    Some(Record::from_rdata(name, NEGATIVE_TTL_S, RData::SOA(data)))
}

fn encode(message: &Message, reply: &mut Vec<u8>) -> bool {
    message.emit(&mut BinEncoder::new(reply)).is_ok()
}

/// A reply without a question, for a query whose question cannot be trusted to parse.
fn fail(query: &[u8; HEADER], code: ResponseCode, reply: &mut Vec<u8>) -> DnsAction {
    const QR: u8 = 0x80;
    const OPCODE_AND_RD: u8 = 0x79;
    reply.clear();
    reply.extend([query[0], query[1], QR | query[2] & OPCODE_AND_RD, code.low()]);
    reply.resize(HEADER, 0);
    DnsAction::Reply
}

#[cfg(test)]
mod tests;
