//! The control protocol's JSON, written from its field names and apart from the engine's types, so
//! that the two do not share a mistake.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use jiff::Timestamp;
use podtether_core::key::{ChallengePublic, DiscoPublic, MachinePublic, NodePublic};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::acl::FilterRule;

/// Oldest client version Headscale serves.
pub(crate) const MIN_VERSION: u32 = 113;
/// The pseudo user that owns every tagged node.
pub(crate) const TAGGED_DEVICES: u64 = 2_147_455_555;
/// The first user of a devnet.
pub(crate) const USER: u64 = 1;

pub(crate) type Hostinfo = Map<String, Value>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct RegisterRequest {
    #[serde(default)]
    pub(crate) version: u32,
    pub(crate) node_key: NodePublic,
    #[serde(default)]
    pub(crate) old_node_key: Option<NodePublic>,
    #[serde(default)]
    pub(crate) auth: Option<RegisterAuth>,
    #[serde(default)]
    expiry: Option<String>,
    #[serde(default)]
    pub(crate) followup: String,
    #[serde(default)]
    pub(crate) hostinfo: Option<Hostinfo>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct RegisterAuth {
    #[serde(default)]
    pub(crate) auth_key: String,
}

impl RegisterRequest {
    /// The requested expiry; Go's zero time is none.
    pub(crate) fn expiry(&self) -> Result<Option<Timestamp>, jiff::Error> {
        match self.expiry.as_deref() {
            None | Some("" | "0001-01-01T00:00:00Z") => Ok(None),
            Some(text) => text.parse().map(Some),
        }
    }
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct RegisterResponse {
    pub(crate) user: User,
    pub(crate) login: Login,
    pub(crate) node_key_expired: bool,
    pub(crate) machine_authorized: bool,
    #[serde(rename = "AuthURL")]
    pub(crate) auth_url: String,
    pub(crate) node_key_signature: Option<String>,
    pub(crate) error: String,
}

#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct User {
    #[serde(rename = "ID")]
    pub(crate) id: u64,
    #[serde(rename = "DisplayName")]
    pub(crate) display_name: String,
}

#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Login {
    #[serde(rename = "ID")]
    pub(crate) id: u64,
    pub(crate) provider: &'static str,
    pub(crate) login_name: String,
    pub(crate) display_name: String,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct UserProfile {
    #[serde(rename = "ID")]
    pub(crate) id: u64,
    pub(crate) login_name: String,
    pub(crate) display_name: String,
}

/// The user every devnet begins with. The ampersand checks that clients undo Go's JSON escapes.
pub(crate) fn first_user() -> super::state::User {
    super::state::User {
        name: "dev@tailnet.test".into(),
        display_name: "Dev & Net".into(),
        created: Timestamp::UNIX_EPOCH,
        domain: None,
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct MapRequest {
    #[serde(default)]
    pub(crate) version: u32,
    #[serde(default)]
    pub(crate) compress: String,
    #[serde(default)]
    pub(crate) keep_alive: bool,
    pub(crate) node_key: NodePublic,
    #[serde(default)]
    pub(crate) disco_key: Option<DiscoPublic>,
    #[serde(default)]
    pub(crate) stream: bool,
    #[serde(default)]
    pub(crate) omit_peers: bool,
    #[serde(default)]
    pub(crate) hostinfo: Option<Hostinfo>,
    #[serde(default)]
    pub(crate) endpoints: Option<Vec<SocketAddr>>,
    #[serde(default)]
    pub(crate) endpoint_types: Option<Vec<u8>>,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct MapResponse {
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) keep_alive: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ping_request: Option<PingRequest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) node: Option<Node>,
    #[serde(rename = "DERPMap", skip_serializing_if = "Option::is_none")]
    pub(crate) derp_map: Option<DerpMap>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) peers: Vec<Node>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) peers_changed: Vec<Node>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) peers_removed: Vec<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) peers_changed_patch: Vec<PeerChange>,
    #[serde(rename = "DNSConfig", skip_serializing_if = "Option::is_none")]
    pub(crate) dns_config: Option<DnsConfig>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) domain: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) collect_services: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) packet_filters: Option<BTreeMap<&'static str, Option<Vec<FilterRule>>>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) user_profiles: Vec<UserProfile>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) control_time: Option<Timestamp3339>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) debug: Option<Debug>,
    /// Whatever else a test wants said.
    #[serde(flatten)]
    pub(crate) extra: Map<String, Value>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Debug {
    pub(crate) disable_log_tail: bool,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct PingRequest {
    #[serde(rename = "URL")]
    pub(crate) url: String,
    #[serde(rename = "URLIsNoise", skip_serializing_if = "std::ops::Not::not")]
    pub(crate) url_is_noise: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) types: String,
    #[serde(rename = "IP", skip_serializing_if = "Option::is_none")]
    pub(crate) ip: Option<std::net::IpAddr>,
    /// Base64.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) payload: String,
}

/// An instant as Go writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timestamp3339(pub(crate) Timestamp);

impl Serialize for Timestamp3339 {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Node {
    #[serde(rename = "ID")]
    pub(crate) id: u64,
    #[serde(rename = "StableID")]
    pub(crate) stable_id: String,
    pub(crate) name: String,
    pub(crate) user: u64,
    /// Who shared it with the viewer, when that is not the user.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) sharer: u64,
    pub(crate) key: NodePublic,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key_expiry: Option<Timestamp3339>,
    pub(crate) machine: MachinePublic,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) disco_key: Option<DiscoPublic>,
    pub(crate) addresses: Vec<String>,
    #[serde(rename = "AllowedIPs")]
    pub(crate) allowed_ips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) primary_routes: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) endpoints: Vec<SocketAddr>,
    #[serde(rename = "HomeDERP", skip_serializing_if = "is_zero")]
    pub(crate) home_derp: u32,
    pub(crate) hostinfo: Hostinfo,
    pub(crate) created: Timestamp3339,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) cap: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tags: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_seen: Option<Timestamp3339>,
    pub(crate) online: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) machine_authorized: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) cap_map: BTreeMap<&'static str, Vec<Value>>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) expired: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_jailed: bool,
    #[serde(rename = "IsWireGuardOnly", skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_wireguard_only: bool,
    #[serde(rename = "SelfNodeV4MasqAddrForThisPeer", skip_serializing_if = "Option::is_none")]
    pub(crate) self_v4_masq: Option<std::net::IpAddr>,
    #[serde(rename = "SelfNodeV6MasqAddrForThisPeer", skip_serializing_if = "Option::is_none")]
    pub(crate) self_v6_masq: Option<std::net::IpAddr>,
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct PeerChange {
    #[serde(rename = "NodeID")]
    pub(crate) node_id: u64,
    #[serde(rename = "DERPRegion", skip_serializing_if = "Option::is_none")]
    pub(crate) derp_region: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) endpoints: Vec<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<NodePublic>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) disco_key: Option<DiscoPublic>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) online: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_seen: Option<Timestamp3339>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key_expiry: Option<Timestamp3339>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct DnsConfig {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) resolvers: Vec<Value>,
    pub(crate) routes: BTreeMap<String, Vec<Value>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) extra_records: Vec<Value>,
    pub(crate) domains: Vec<String>,
    pub(crate) proxied: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct DerpMap {
    pub(crate) regions: BTreeMap<u32, DerpRegion>,
    #[serde(rename = "omitDefaultRegions")]
    pub(crate) omit_default_regions: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct DerpRegion {
    #[serde(rename = "RegionID")]
    pub(crate) region_id: u32,
    pub(crate) region_code: String,
    pub(crate) region_name: String,
    pub(crate) nodes: Vec<DerpNode>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct DerpNode {
    pub(crate) name: String,
    #[serde(rename = "RegionID")]
    pub(crate) region_id: u32,
    pub(crate) host_name: String,
    #[serde(rename = "IPv4")]
    pub(crate) ipv4: String,
    #[serde(rename = "IPv6")]
    pub(crate) ipv6: String,
    #[serde(rename = "STUNPort")]
    pub(crate) stun_port: u16,
    #[serde(rename = "DERPPort")]
    pub(crate) derp_port: u16,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EarlyNoise {
    pub(crate) node_key_challenge: ChallengePublic,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServerKeys {
    pub(crate) legacy_public_key: MachinePublic,
    pub(crate) public_key: MachinePublic,
}
