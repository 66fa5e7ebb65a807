//! Nodes, what they say about themselves, and patches to them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lenient::{list, map, opt_list, opt_map, or_default, soft};
use super::{NodeId, RegionId, UnixTime, time};
use crate::key::{DiscoPublic, MachinePublic, NodePublic};

/// Capabilities by name, each with its JSON arguments.
pub type CapMap = BTreeMap<String, Vec<Value>>;

fn is_false(value: &bool) -> bool {
    !*value
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

fn is_zero_u32(value: &u32) -> bool {
    *value == 0
}

fn no_region(value: &RegionId) -> bool {
    !value.is_some()
}

/// One node of the tailnet, condensed to what is used here.
///
/// Older forms are already brought up to date: `allowed_ips` is never "same as addresses", and the
/// home region is a number.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", try_from = "WireNode")]
pub struct Node {
    /// The node's number.
    #[serde(rename = "ID")]
    pub id: NodeId,
    /// The node's name for good, across control servers' databases.
    #[serde(rename = "StableID")]
    pub stable_id: String,
    /// Fully qualified MagicDNS name with a trailing dot.
    pub name: String,
    /// Number of the owning user.
    pub user: u64,
    /// WireGuard key.
    pub key: NodePublic,
    /// When the key stops being valid; none for never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_expiry: Option<UnixTime>,
    /// Machine key; the server tells it only for the node itself, if at all.
    #[serde(skip_serializing_if = "MachinePublic::is_zero")]
    pub machine: MachinePublic,
    /// Disco key; zero means that the node cannot be reached by disco or DERP.
    #[serde(skip_serializing_if = "DiscoPublic::is_zero")]
    pub disco_key: DiscoPublic,
    /// Own tailnet addresses.
    pub addresses: Vec<IpNet>,
    /// What may be sent to and come from this node: its addresses and its approved routes.
    #[serde(rename = "AllowedIPs")]
    pub allowed_ips: Vec<IpNet>,
    /// Where its UDP socket may be reached.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<SocketAddr>,
    /// Home DERP region.
    #[serde(rename = "HomeDERP", skip_serializing_if = "no_region")]
    pub home_derp: RegionId,
    /// What the node says about itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostinfo: Option<Box<Hostinfo>>,
    /// When the server first saw the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<UnixTime>,
    /// Capability version. Headscale reports the viewer's own here.
    #[serde(skip_serializing_if = "is_zero_u32")]
    pub cap: u32,
    /// ACL tags.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Approved routes for which this node is the one in use.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub primary_routes: Vec<IpNet>,
    /// When it was last connected; none while it is, or when unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<UnixTime>,
    /// Whether it is connected to the control server; none when unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub online: Option<bool>,
    /// False until an administrator approves the device, where the tailnet asks for that.
    #[serde(skip_serializing_if = "is_false")]
    pub machine_authorized: bool,
    /// Node capabilities; the superseded list form is merged in.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub cap_map: CapMap,
    /// Tailnet lock: somebody has signed the node key. Whether the signature is good is not checked.
    #[serde(rename = "KeySignature", skip_serializing_if = "is_false")]
    pub signed: bool,
    /// Not covered by a tailnet lock signature: its addresses only, and jailed.
    #[serde(rename = "UnsignedPeerAPIOnly", skip_serializing_if = "is_false")]
    pub unsigned_peer_api_only: bool,
    /// The server says that the key has expired.
    #[serde(skip_serializing_if = "is_false")]
    pub expired: bool,
    /// The address under which this peer knows us, instead of our IPv4 address.
    #[serde(rename = "SelfNodeV4MasqAddrForThisPeer", skip_serializing_if = "Option::is_none")]
    pub masq_v4: Option<Ipv4Addr>,
    /// The address under which this peer knows us, instead of our IPv6 address.
    #[serde(rename = "SelfNodeV6MasqAddrForThisPeer", skip_serializing_if = "Option::is_none")]
    pub masq_v6: Option<Ipv6Addr>,
    /// A plain WireGuard peer: UDP endpoints only, no disco and no DERP.
    #[serde(rename = "IsWireGuardOnly", skip_serializing_if = "is_false")]
    pub is_wireguard_only: bool,
    /// May answer us but not open anything to us.
    #[serde(skip_serializing_if = "is_false")]
    pub is_jailed: bool,
}

impl Node {
    /// True when the key has run out, by the server's word or by `now` on the server's clock.
    #[must_use]
    pub fn is_expired(&self, now: UnixTime) -> bool {
        self.expired || self.key_expiry.is_some_and(|expiry| expiry <= now)
    }

    /// Gives back what a node held for hours need not keep: unused hostinfo and spare capacity.
    pub fn condense(&mut self) {
        if let Some(host) = &mut self.hostinfo {
            **host = Hostinfo {
                os: std::mem::take(&mut host.os),
                hostname: std::mem::take(&mut host.hostname),
                services: std::mem::take(&mut host.services),
                ..Hostinfo::default()
            };
            host.services.shrink_to_fit();
        }
        self.name.shrink_to_fit();
        self.addresses.shrink_to_fit();
        self.allowed_ips.shrink_to_fit();
        self.endpoints.shrink_to_fit();
        self.tags.shrink_to_fit();
        self.primary_routes.shrink_to_fit();
    }
}

/// A node as servers send it. What identifies or restricts a peer must parse, or the peer is skipped;
/// the rest may be odd.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WireNode {
    #[serde(rename = "ID")]
    id: NodeId,
    #[serde(rename = "StableID", default, deserialize_with = "soft")]
    stable_id: String,
    #[serde(default, deserialize_with = "soft")]
    name: String,
    #[serde(default, deserialize_with = "soft")]
    user: u64,
    key: NodePublic,
    #[serde(default, with = "time::optional")]
    key_expiry: Option<UnixTime>,
    #[serde(default, deserialize_with = "soft")]
    machine: MachinePublic,
    #[serde(default, deserialize_with = "soft")]
    disco_key: DiscoPublic,
    #[serde(default, deserialize_with = "list")]
    addresses: Vec<IpNet>,
    #[serde(rename = "AllowedIPs", default, deserialize_with = "opt_list")]
    allowed_ips: Option<Vec<IpNet>>,
    #[serde(default, deserialize_with = "list")]
    endpoints: Vec<SocketAddr>,
    #[serde(rename = "DERP", default, deserialize_with = "soft")]
    legacy_derp: String,
    #[serde(rename = "HomeDERP", default, deserialize_with = "soft")]
    home_derp: RegionId,
    #[serde(default, deserialize_with = "soft")]
    hostinfo: Option<Box<Hostinfo>>,
    #[serde(default, deserialize_with = "soft")]
    created: Option<UnixTime>,
    #[serde(default, deserialize_with = "soft")]
    cap: u32,
    #[serde(default, deserialize_with = "list")]
    tags: Vec<String>,
    #[serde(default, deserialize_with = "list")]
    primary_routes: Vec<IpNet>,
    #[serde(default, deserialize_with = "soft")]
    last_seen: Option<UnixTime>,
    #[serde(default, deserialize_with = "soft")]
    online: Option<bool>,
    #[serde(default, deserialize_with = "or_default")]
    machine_authorized: bool,
    #[serde(default, deserialize_with = "list")]
    capabilities: Vec<String>,
    #[serde(default, deserialize_with = "cap_map")]
    cap_map: CapMap,
    #[serde(rename = "KeySignature", default, deserialize_with = "soft")]
    signature: Value,
    #[serde(rename = "UnsignedPeerAPIOnly", default, deserialize_with = "or_default")]
    unsigned_peer_api_only: bool,
    #[serde(default, deserialize_with = "or_default")]
    expired: bool,
    #[serde(rename = "SelfNodeV4MasqAddrForThisPeer", default, deserialize_with = "or_default")]
    masq_v4: Option<Ipv4Addr>,
    #[serde(rename = "SelfNodeV6MasqAddrForThisPeer", default, deserialize_with = "or_default")]
    masq_v6: Option<Ipv6Addr>,
    #[serde(rename = "IsWireGuardOnly", default, deserialize_with = "or_default")]
    is_wireguard_only: bool,
    #[serde(default, deserialize_with = "or_default")]
    is_jailed: bool,
}

/// A node without a number or a key is no node.
#[derive(Debug, thiserror::Error)]
#[error("a node without ID or Key")]
struct Nameless;

impl TryFrom<WireNode> for Node {
    type Error = Nameless;

    fn try_from(wire: WireNode) -> Result<Self, Nameless> {
        if wire.key.is_zero() || wire.id.0 == 0 {
            return Err(Nameless);
        }
        let home_derp = if wire.home_derp.is_some() {
            wire.home_derp
        } else {
            wire.legacy_derp.strip_prefix("127.3.3.40:").and_then(|n| n.parse().ok()).unwrap_or_default()
        };
        let allowed_ips = match wire.allowed_ips {
            Some(allowed) if !wire.unsigned_peer_api_only => allowed,
            _ => wire.addresses.clone(),
        };
        let mut cap_map = wire.cap_map;
        for capability in wire.capabilities {
            cap_map.entry(capability).or_default();
        }
        Ok(Self {
            id: wire.id,
            stable_id: wire.stable_id,
            name: wire.name,
            user: wire.user,
            key: wire.key,
            key_expiry: wire.key_expiry,
            machine: wire.machine,
            disco_key: wire.disco_key,
            addresses: wire.addresses,
            allowed_ips,
            endpoints: wire.endpoints,
            home_derp,
            hostinfo: wire.hostinfo,
            created: wire.created,
            cap: wire.cap,
            tags: wire.tags,
            primary_routes: wire.primary_routes,
            last_seen: wire.last_seen,
            online: wire.online,
            machine_authorized: wire.machine_authorized,
            cap_map,
            // A snapshot has it as a boolean.
            signed: wire.signature.as_str().is_some_and(|text| !text.is_empty())
                || wire.signature.as_bool().unwrap_or_default(),
            unsigned_peer_api_only: wire.unsigned_peer_api_only,
            expired: wire.expired,
            masq_v4: wire.masq_v4,
            masq_v6: wire.masq_v6,
            is_wireguard_only: wire.is_wireguard_only,
            // Access rules are the server's word, which a tailnet lock does not trust for such a node.
            is_jailed: wire.is_jailed || wire.unsigned_peer_api_only,
        })
    }
}

/// Null arguments are none.
fn cap_map<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<CapMap, D::Error> {
    let entries: BTreeMap<String, Option<Vec<Value>>> = map(deserializer)?;
    Ok(entries.into_iter().map(|(name, arguments)| (name, arguments.unwrap_or_default())).collect())
}

fn opt_cap_map<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<CapMap>, D::Error> {
    let entries: Option<BTreeMap<String, Option<Vec<Value>>>> = opt_map(deserializer)?;
    Ok(entries.map(|entries| entries.into_iter().map(|(n, a)| (n, a.unwrap_or_default())).collect()))
}

/// A small change to one peer: what is none or zero stays as it was.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PeerChange {
    /// Which peer. Unknown ones are ignored.
    #[serde(rename = "NodeID")]
    pub node_id: NodeId,
    /// New home region.
    #[serde(rename = "DERPRegion", default, deserialize_with = "soft", skip_serializing_if = "no_region")]
    pub derp_region: RegionId,
    /// New capability version.
    #[serde(default, deserialize_with = "soft", skip_serializing_if = "is_zero_u32")]
    pub cap: u32,
    /// New capabilities.
    #[serde(default, deserialize_with = "opt_cap_map", skip_serializing_if = "Option::is_none")]
    pub cap_map: Option<CapMap>,
    /// New endpoints.
    #[serde(default, deserialize_with = "opt_list", skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<Vec<SocketAddr>>,
    /// New node key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<NodePublic>,
    /// New disco key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disco_key: Option<DiscoPublic>,
    /// Connected or not.
    #[serde(default, deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub online: Option<bool>,
    /// New last-seen time.
    #[serde(default, deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<UnixTime>,
    /// New key expiry. Go's zero time is kept as such: it says "never" where none says "unchanged".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_expiry: Option<UnixTime>,
}

/// What this node tells about itself, besides what it was asked to claim.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HostParams {
    /// The name to ask for.
    pub hostname: String,
    /// Version text of this program.
    pub version: String,
    /// Routes offered.
    pub routable_ips: Vec<IpNet>,
    /// Tags asked for. Headscale refuses them together with an auth key.
    pub request_tags: Vec<String>,
    /// Services offered.
    pub services: Vec<Service>,
    /// Network conditions, once known.
    pub net_info: Option<NetInfo>,
    /// Stable id of the exit node in use, empty for none.
    pub exit_node_id: String,
}

/// A host as it describes itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Hostinfo {
    /// Version of the client program.
    #[serde(rename = "IPNVersion", deserialize_with = "soft")]
    pub ipn_version: String,
    /// Operating system.
    #[serde(rename = "OS", deserialize_with = "soft")]
    pub os: String,
    /// Operating system version.
    #[serde(rename = "OSVersion", deserialize_with = "soft", skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    /// Host name.
    #[serde(deserialize_with = "soft")]
    pub hostname: String,
    /// Refuses everything inbound.
    #[serde(deserialize_with = "soft", skip_serializing_if = "is_false")]
    pub shields_up: bool,
    /// Routes offered.
    #[serde(rename = "RoutableIPs", deserialize_with = "list")]
    pub routable_ips: Vec<IpNet>,
    /// Tags asked for.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub request_tags: Vec<String>,
    /// Services offered.
    #[serde(deserialize_with = "list")]
    pub services: Vec<Service>,
    /// Network conditions.
    #[serde(deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub net_info: Option<NetInfo>,
    /// Stock's log identifier; none here.
    #[serde(rename = "BackendLogID", deserialize_with = "soft", skip_serializing_if = "String::is_empty")]
    pub backend_log_id: String,
    /// The chosen exit node's stable ID.
    #[serde(rename = "ExitNodeID", deserialize_with = "soft", skip_serializing_if = "String::is_empty")]
    pub exit_node_id: String,
}

impl Hostinfo {
    /// The one place where this node's own hostinfo is made: Headscale stores it whole, so a field
    /// left out of any message would be lost there.
    #[must_use]
    pub fn outgoing(params: &HostParams) -> Self {
        Self {
            ipn_version: params.version.clone(),
            os: "linux".to_owned(),
            hostname: params.hostname.clone(),
            routable_ips: params.routable_ips.clone(),
            request_tags: params.request_tags.clone(),
            services: params.services.clone(),
            net_info: params.net_info.clone(),
            exit_node_id: params.exit_node_id.clone(),
            ..Self::default()
        }
    }
}

/// A service a host offers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Service {
    /// `tcp`, `udp`, `peerapi4`, `peerapi6`, ….
    #[serde(deserialize_with = "or_default")]
    pub proto: String,
    /// Port, or a version number for some protocols.
    #[serde(deserialize_with = "or_default")]
    pub port: u16,
    /// Free text.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub description: String,
}

/// Network conditions as a node measured them; none means unknown.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NetInfo {
    /// The NAT maps differently for each destination.
    #[serde(
        rename = "MappingVariesByDestIP",
        deserialize_with = "soft",
        skip_serializing_if = "Option::is_none"
    )]
    pub mapping_varies_by_dest_ip: Option<bool>,
    /// IPv6 reaches the Internet.
    #[serde(rename = "WorkingIPv6", deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub working_ipv6: Option<bool>,
    /// The system has IPv6 at all.
    #[serde(rename = "OSHasIPv6", deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub os_has_ipv6: Option<bool>,
    /// UDP reaches the Internet.
    #[serde(rename = "WorkingUDP", deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub working_udp: Option<bool>,
    /// Home region.
    #[serde(rename = "PreferredDERP", deserialize_with = "soft", skip_serializing_if = "no_region")]
    pub preferred_derp: RegionId,
    /// Latency in seconds by region number and family, such as `1-v4`.
    #[serde(rename = "DERPLatency", deserialize_with = "map", skip_serializing_if = "BTreeMap::is_empty")]
    pub derp_latency: BTreeMap<String, f64>,
}

impl Eq for NetInfo {}

/// Whose node it is, for display.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct UserProfile {
    /// The user's number.
    #[serde(rename = "ID", deserialize_with = "soft")]
    pub id: u64,
    /// Such as `alice@example.com`.
    #[serde(deserialize_with = "soft")]
    pub login_name: String,
    /// Such as `Alice`.
    #[serde(deserialize_with = "soft")]
    pub display_name: String,
}

/// A user in a registration answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct User {
    /// The user's number.
    #[serde(rename = "ID", deserialize_with = "soft", skip_serializing_if = "is_zero")]
    pub id: u64,
    /// Such as `Alice`.
    #[serde(deserialize_with = "soft")]
    pub display_name: String,
}
