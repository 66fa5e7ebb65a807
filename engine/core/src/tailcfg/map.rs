//! The map session's request and messages.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use base64::Engine as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::lenient::{
    Elements, counting, field_list, field_map, field_opt_list, field_opt_map, list, or_default, soft,
};
use super::{DerpMap, DnsConfig, Hostinfo, Node, NodeId, PeerChange, UnixTime, UserProfile};
use crate::filter::Rule;
use crate::key::{DiscoPublic, NodePublic};

fn is_false(value: &bool) -> bool {
    !*value
}

/// Starts a map session (`stream`), or reports a change (`omit_peers` without `stream`).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct MapRequest {
    /// Capability version.
    pub version: u16,
    /// `zstd`, or empty for plain JSON.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub compress: String,
    /// Send keepalives.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_false")]
    pub keep_alive: bool,
    /// Who asks.
    pub node_key: NodePublic,
    /// Its disco key. Headscale stores a zero one too, which cuts the node off from its peers.
    pub disco_key: DiscoPublic,
    /// Keep the answer open for deltas.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_false")]
    pub stream: bool,
    /// What the node says about itself.
    pub hostinfo: Option<Hostinfo>,
    /// Where its UDP socket may be reached.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<SocketAddr>,
    /// The endpoints' types, in the same order.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub endpoint_types: Vec<EndpointType>,
    /// No peers are wanted in the answer.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_false")]
    pub omit_peers: bool,
    /// Superseded by `omit_peers`.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_false")]
    pub read_only: bool,
}

impl MapRequest {
    /// The request that opens a map session. It carries everything, for servers that store what the
    /// streaming request says.
    #[must_use]
    pub fn streaming(
        node_key: NodePublic,
        disco_key: DiscoPublic,
        hostinfo: Hostinfo,
        endpoints: &[(SocketAddr, EndpointType)],
    ) -> Self {
        Self {
            version: super::CAPABILITY_VERSION,
            keep_alive: true,
            node_key,
            disco_key,
            stream: true,
            hostinfo: Some(hostinfo),
            endpoints: endpoints.iter().map(|e| e.0).collect(),
            endpoint_types: endpoints.iter().map(|e| e.1).collect(),
            ..Self::default()
        }
    }

    /// The request that reports a change while a session is open. Only the answer's status matters.
    #[must_use]
    pub fn lite(
        node_key: NodePublic,
        disco_key: DiscoPublic,
        hostinfo: Hostinfo,
        endpoints: &[(SocketAddr, EndpointType)],
    ) -> Self {
        Self {
            stream: false,
            keep_alive: false,
            omit_peers: true,
            ..Self::streaming(node_key, disco_key, hostinfo, endpoints)
        }
    }
}

/// How a node learned of one of its endpoints. A number on the wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EndpointType {
    /// Not said, or a type this build does not know.
    #[default]
    Unknown,
    /// An address of an interface.
    Local,
    /// What a STUN server saw.
    Stun,
    /// Mapped by the router on request.
    Portmapped,
    /// What a STUN server saw, with the local port.
    Stun4LocalPort,
    /// Configured.
    Explicit,
}

impl EndpointType {
    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Unknown => 0,
            Self::Local => 1,
            Self::Stun => 2,
            Self::Portmapped => 3,
            Self::Stun4LocalPort => 4,
            Self::Explicit => 5,
        }
    }

    /// The type with this number.
    #[must_use]
    pub const fn from_number(number: u64) -> Self {
        match number {
            1 => Self::Local,
            2 => Self::Stun,
            3 => Self::Portmapped,
            4 => Self::Stun4LocalPort,
            5 => Self::Explicit,
            _ => Self::Unknown,
        }
    }
}

impl Serialize for EndpointType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(self.number())
    }
}

impl<'de> Deserialize<'de> for EndpointType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u64::deserialize(deserializer).map(Self::from_number)
    }
}

/// One message of a map session: a keepalive, a full map, or a change.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct MapResponse {
    /// Nothing changed.
    #[serde(deserialize_with = "soft", skip_serializing_if = "is_false")]
    pub keep_alive: bool,
    /// The server wants to know whether this node is alive.
    #[serde(deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub ping_request: Option<PingRequest>,
    /// A page to show to a person; ignored here.
    #[serde(rename = "PopBrowserURL", deserialize_with = "soft", skip_serializing_if = "String::is_empty")]
    pub pop_browser_url: String,
    /// The node itself.
    #[serde(deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub node: Option<Node>,
    /// Relay map, in full or in part.
    #[serde(rename = "DERPMap", deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub derp_map: Option<DerpMap>,
    /// All peers; empty means unchanged.
    #[serde(deserialize_with = "field_list", skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<Node>,
    /// Peers that are new or changed.
    #[serde(deserialize_with = "field_list", skip_serializing_if = "Vec::is_empty")]
    pub peers_changed: Vec<Node>,
    /// Peers that are gone.
    #[serde(deserialize_with = "field_list", skip_serializing_if = "Vec::is_empty")]
    pub peers_removed: Vec<NodeId>,
    /// Small changes to peers.
    #[serde(deserialize_with = "field_list", skip_serializing_if = "Vec::is_empty")]
    pub peers_changed_patch: Vec<PeerChange>,
    /// Peers seen just now (true), or of which it is not known when (false).
    #[serde(deserialize_with = "field_map", skip_serializing_if = "BTreeMap::is_empty")]
    pub peer_seen_change: BTreeMap<NodeId, bool>,
    /// Peers that came or went.
    #[serde(deserialize_with = "field_map", skip_serializing_if = "BTreeMap::is_empty")]
    pub online_change: BTreeMap<NodeId, bool>,
    /// Name resolution.
    #[serde(rename = "DNSConfig", deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub dns_config: Option<DnsConfig>,
    /// The tailnet's name.
    #[serde(deserialize_with = "soft", skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Whether listening services may be reported.
    #[serde(deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub collect_services: Option<bool>,
    /// The whole packet filter, in its older form.
    #[serde(deserialize_with = "field_opt_list", skip_serializing_if = "Option::is_none")]
    pub packet_filter: Option<Vec<Rule>>,
    /// Named parts of the packet filter; none for a name deletes it, for `*` all before.
    #[serde(deserialize_with = "filters", skip_serializing_if = "Option::is_none")]
    pub packet_filters: Option<BTreeMap<String, Option<Vec<Rule>>>>,
    /// Users, added to those known.
    #[serde(deserialize_with = "field_list", skip_serializing_if = "Vec::is_empty")]
    pub user_profiles: Vec<UserProfile>,
    /// Problems the server sees with this node, all of them.
    #[serde(deserialize_with = "field_opt_list", skip_serializing_if = "Option::is_none")]
    pub health: Option<Vec<String>>,
    /// Problems by name; none for a name clears it, for `*` all before.
    #[serde(deserialize_with = "field_opt_map", skip_serializing_if = "Option::is_none")]
    pub display_messages: Option<BTreeMap<String, Option<DisplayMessage>>>,
    /// The server's clock.
    #[serde(deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub control_time: Option<UnixTime>,
    /// Requests for odd behaviour.
    #[serde(deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub debug: Option<Debug>,
    /// Where else the server can be reached.
    #[serde(deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub control_dial_plan: Option<ControlDialPlan>,
    /// Tailnet lock; none means unchanged.
    #[serde(rename = "TKAInfo", deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub tka_info: Option<TkaInfo>,
}

/// The state of a tailnet's lock, as control has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TkaInfo {
    /// Hash of the lock's last change; empty without a lock.
    #[serde(deserialize_with = "soft", skip_serializing_if = "String::is_empty")]
    pub head: String,
    /// Control says that the lock is to be given up.
    #[serde(deserialize_with = "soft", skip_serializing_if = "is_false")]
    pub disabled: bool,
}

impl MapResponse {
    /// Reads one message, and how many of its fields, elements and entries were passed over because they
    /// were not what they should be.
    ///
    /// # Errors
    /// When it is not a JSON object at all.
    pub fn from_json(message: &[u8]) -> Result<(Self, u64), serde_json::Error> {
        if message.trim_ascii_start().first() == Some(&b'[') {
            // serde would take it for the fields in their order.
            return Err(serde::de::Error::custom("an array instead of an object"));
        }
        let (decoded, skipped) = counting(|| serde_json::from_slice(message));
        Ok((decoded?, skipped))
    }
}

type FilterChunks = BTreeMap<String, Option<Vec<Rule>>>;

fn filters<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<FilterChunks>, D::Error> {
    let chunks: Option<BTreeMap<String, Option<Elements<Rule>>>> = field_opt_map(deserializer)?;
    Ok(chunks.map(|chunks| chunks.into_iter().map(|(name, rules)| (name, rules.map(|r| r.0))).collect()))
}

/// A problem to show to a person.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DisplayMessage {
    /// One line.
    #[serde(deserialize_with = "soft")]
    pub title: String,
    /// More.
    #[serde(deserialize_with = "soft")]
    pub text: String,
    /// `high`, `medium` or `low`.
    #[serde(deserialize_with = "soft")]
    pub severity: String,
    /// The problem keeps traffic from flowing.
    #[serde(deserialize_with = "soft", skip_serializing_if = "is_false")]
    pub impacts_connectivity: bool,
}

/// Asks for a sign of life; answered by fetching or posting to `url`, once for each URL.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PingRequest {
    /// Where the answer goes.
    #[serde(rename = "URL", deserialize_with = "or_default")]
    pub url: String,
    /// The answer goes through the control session rather than over plain HTTPS.
    #[serde(rename = "URLIsNoise", deserialize_with = "or_default", skip_serializing_if = "is_false")]
    pub url_is_noise: bool,
    /// Log the request.
    #[serde(deserialize_with = "soft", skip_serializing_if = "is_false")]
    pub log: bool,
    /// Empty: HEAD the URL; `c2n`: `payload` is an HTTP request; else a comma-separated list of pings.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub types: String,
    /// Whom to ping.
    #[serde(rename = "IP", deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// Base64 text.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub payload: String,
}

impl PingRequest {
    /// The decoded payload; empty when it is no base64 text.
    #[must_use]
    pub fn payload(&self) -> Vec<u8> {
        base64::engine::general_purpose::STANDARD.decode(&self.payload).unwrap_or_default()
    }
}

/// The result of one ping that the server asked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PingResponse {
    /// `disco`, `TSMP`, ….
    pub r#type: String,
    /// Whom.
    #[serde(rename = "IP", skip_serializing_if = "String::is_empty")]
    pub ip: String,
    /// The node that handles the address.
    #[serde(rename = "NodeIP", skip_serializing_if = "String::is_empty")]
    pub node_ip: String,
    /// Its name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node_name: String,
    /// Why it failed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub err: String,
    /// Round trip.
    pub latency_seconds: f64,
    /// The UDP address that answered.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub endpoint: String,
    /// The region that carried the answer.
    #[serde(rename = "DERPRegionID")]
    pub derp_region_id: super::RegionId,
    /// Its short code.
    #[serde(rename = "DERPRegionCode", skip_serializing_if = "String::is_empty")]
    pub derp_region_code: String,
}

/// Requests for odd behaviour.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Debug {
    /// Pause before the next message is handled; at most five minutes are honoured.
    #[serde(deserialize_with = "soft")]
    pub sleep_seconds: f64,
    /// Nothing is logged to a log server here anyway.
    #[serde(deserialize_with = "soft", skip_serializing_if = "is_false")]
    pub disable_log_tail: bool,
    /// Exit with this code.
    #[serde(deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub exit: Option<i32>,
}

/// Longest pause a server may ask for.
const MAX_PAUSE: Duration = Duration::from_secs(300);

impl Debug {
    /// How long the server wants to wait before anything else happens in the session; bounded. The request
    /// to exit is not for a pod's engine and never honoured.
    #[must_use]
    pub fn pause(&self) -> Duration {
        Duration::try_from_secs_f64(self.sleep_seconds).unwrap_or_default().min(MAX_PAUSE)
    }
}

/// Ways to reach the server, for when DNS fails.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ControlDialPlan {
    /// Raced by priority.
    #[serde(deserialize_with = "list")]
    pub candidates: Vec<ControlIpCandidate>,
}

/// One way to reach the server.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ControlIpCandidate {
    /// Its address.
    #[serde(rename = "IP", deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// A proxy's name.
    #[serde(rename = "ACEHost", deserialize_with = "soft", skip_serializing_if = "String::is_empty")]
    pub ace_host: String,
    /// Wait before the attempt.
    #[serde(deserialize_with = "soft")]
    pub dial_start_delay_sec: f64,
    /// Give up after.
    #[serde(deserialize_with = "soft")]
    pub dial_timeout_sec: f64,
    /// Highest first.
    #[serde(deserialize_with = "soft")]
    pub priority: i32,
}
