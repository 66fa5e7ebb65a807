//! What a node may receive, and how it resolves names.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lenient::{Elements, list, map, or_default, soft};

/// Who may reach what. Fields that narrow a rule must parse, or the rule is dropped.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct FilterRule {
    /// Sources: address, CIDR, `a-b`, `*` or `cap:<node capability>`.
    #[serde(rename = "SrcIPs", deserialize_with = "or_default")]
    pub src_ips: Vec<String>,
    /// Destinations and their ports.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub dst_ports: Vec<NetPortRange>,
    /// IP protocols; empty means TCP, UDP and both ICMPs.
    #[serde(rename = "IPProto", deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub ip_proto: Vec<i32>,
    /// Application capabilities given to the sources.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub cap_grant: Vec<CapGrant>,
}

/// Destination addresses and ports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NetPortRange {
    /// Address, CIDR, `a-b` or `*`.
    #[serde(rename = "IP")]
    pub ip: String,
    /// Ports.
    pub ports: PortRange,
}

/// Ports from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PortRange {
    /// Lowest port.
    pub first: u16,
    /// Highest port.
    pub last: u16,
}

impl PortRange {
    /// Every port.
    pub const ANY: Self = Self { first: 0, last: u16::MAX };
}

/// Application capabilities for some destinations.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct CapGrant {
    /// Destinations.
    #[serde(deserialize_with = "list")]
    pub dsts: Vec<IpNet>,
    /// Capabilities without arguments.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub caps: Vec<String>,
    /// Capabilities with arguments.
    #[serde(deserialize_with = "map", skip_serializing_if = "BTreeMap::is_empty")]
    pub cap_map: BTreeMap<String, Option<Vec<Value>>>,
}

impl CapGrant {
    /// About how many bytes it takes in memory.
    pub(crate) fn footprint(&self) -> usize {
        const VALUE: usize = std::mem::size_of::<Value>();
        fn value(v: &Value) -> usize {
            VALUE
                + match v {
                    Value::String(text) => text.capacity(),
                    Value::Array(all) => all.iter().map(value).sum(),
                    Value::Object(all) => {
                        all.iter().map(|(name, v)| name.capacity() + 2 * VALUE + value(v)).sum()
                    }
                    Value::Null | Value::Bool(_) | Value::Number(_) => 0,
                }
        }
        let caps: usize = self.caps.iter().map(|name| VALUE + name.capacity()).sum();
        let map = self.cap_map.iter().map(|(name, arguments)| {
            name.capacity() + 2 * VALUE + arguments.iter().flatten().map(value).sum::<usize>()
        });
        std::mem::size_of::<Self>()
            + self.dsts.len() * std::mem::size_of::<IpNet>()
            + caps
            + map.sum::<usize>()
    }
}

/// Name resolution as the tailnet wants it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DnsConfig {
    /// Resolvers for everything; empty leaves the system's.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub resolvers: Vec<Resolver>,
    /// Resolvers by suffix; none for a suffix means that it is answered locally.
    #[serde(deserialize_with = "routes", skip_serializing_if = "BTreeMap::is_empty")]
    pub routes: BTreeMap<String, Vec<Resolver>>,
    /// Resolvers for when the system has none of its own.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub fallback_resolvers: Vec<Resolver>,
    /// Search domains.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<String>,
    /// MagicDNS is on.
    #[serde(deserialize_with = "soft", skip_serializing_if = "is_false")]
    pub proxied: bool,
    /// Domains the server will help to get a certificate for.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub cert_domains: Vec<String>,
    /// Further names to answer.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub extra_records: Vec<DnsRecord>,
}

fn is_false(value: &bool) -> bool {
    !*value
}

fn routes<'de, D>(deserializer: D) -> Result<BTreeMap<String, Vec<Resolver>>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let routes: BTreeMap<String, Option<Elements<Resolver>>> = map(deserializer)?;
    Ok(routes.into_iter().map(|(k, v)| (k, v.map(|e| e.0).unwrap_or_default())).collect())
}

/// A DNS server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Resolver {
    /// An address, with or without port, or a DNS-over-HTTPS URL.
    #[serde(deserialize_with = "or_default")]
    pub addr: String,
    /// Addresses of the host in a URL.
    #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
    pub bootstrap_resolution: Vec<std::net::IpAddr>,
    /// Stays in use while an exit node is.
    #[serde(deserialize_with = "soft", skip_serializing_if = "is_false")]
    pub use_with_exit_node: bool,
}

/// A name the server adds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DnsRecord {
    /// Fully qualified name.
    #[serde(deserialize_with = "or_default")]
    pub name: String,
    /// `A`, `AAAA`, or empty for whichever fits the value.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub r#type: String,
    /// The address.
    #[serde(deserialize_with = "or_default")]
    pub value: String,
}
