//! The relay map.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::RegionId;
use super::lenient::{list, opt_map, or_default, soft};

fn is_false(value: &bool) -> bool {
    !*value
}

fn is_zero(value: &i32) -> bool {
    *value == 0
}

/// Relay regions. In a message, none for a part means that it has not changed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DerpMap {
    /// How to choose a home.
    #[serde(deserialize_with = "soft", skip_serializing_if = "Option::is_none")]
    pub home_params: Option<DerpHomeParams>,
    /// Regions by number, without those the server sent as null.
    #[serde(deserialize_with = "opt_map")]
    pub regions: Option<BTreeMap<RegionId, DerpRegion>>,
    /// Do not add the built-in regions; there are none here.
    #[serde(rename = "omitDefaultRegions", deserialize_with = "soft", skip_serializing_if = "is_false")]
    pub omit_default_regions: bool,
}

impl DerpMap {
    /// The region with this number.
    #[must_use]
    pub fn region(&self, id: RegionId) -> Option<&DerpRegion> {
        self.regions.as_ref()?.get(&id)
    }

    /// All regions in order of their number.
    pub fn iter(&self) -> impl Iterator<Item = (RegionId, &DerpRegion)> {
        self.regions.iter().flatten().map(|(id, region)| (*id, region))
    }

    /// The factor for a region's latency when a home is chosen; 1 unless the server says otherwise.
    #[must_use]
    pub fn region_score(&self, id: RegionId) -> f64 {
        let scores = self.home_params.as_ref().and_then(|p| p.region_score.as_ref());
        scores.and_then(|s| s.get(&id)).copied().filter(|s| s.is_finite() && *s > 0.0).unwrap_or(1.0)
    }

    /// Takes over what `update` says, keeping what it leaves out.
    pub fn merge(&mut self, update: DerpMap) {
        if let Some(regions) = update.regions {
            self.regions = Some(regions);
            self.omit_default_regions = update.omit_default_regions;
        }
        if let Some(params) = update.home_params {
            let scores = params.region_score.or_else(|| self.home_params.take().and_then(|p| p.region_score));
            self.home_params = Some(DerpHomeParams { region_score: scores });
        }
    }
}

/// How to choose a home region.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DerpHomeParams {
    /// Factors for the regions' latencies.
    #[serde(deserialize_with = "opt_map", skip_serializing_if = "Option::is_none")]
    pub region_score: Option<BTreeMap<RegionId, f64>>,
}

/// Relays near each other; a node is home in one region.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DerpRegion {
    /// The region's number.
    #[serde(rename = "RegionID", deserialize_with = "or_default")]
    pub region_id: RegionId,
    /// Short name.
    #[serde(deserialize_with = "soft")]
    pub region_code: String,
    /// Long name.
    #[serde(deserialize_with = "soft")]
    pub region_name: String,
    /// Never to be chosen as home.
    #[serde(deserialize_with = "soft", skip_serializing_if = "is_false")]
    pub avoid: bool,
    /// Neither to be measured nor to be chosen as home.
    #[serde(deserialize_with = "soft", skip_serializing_if = "is_false")]
    pub no_measure_no_home: bool,
    /// Servers, in the order to try them.
    #[serde(deserialize_with = "list")]
    pub nodes: Vec<DerpNode>,
}

/// One relay server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DerpNode {
    /// Unique name.
    #[serde(deserialize_with = "soft")]
    pub name: String,
    /// The region it belongs to.
    #[serde(rename = "RegionID", deserialize_with = "soft")]
    pub region_id: RegionId,
    /// DNS name, also the name in its certificate.
    #[serde(deserialize_with = "or_default")]
    pub host_name: String,
    /// Another name expected in the certificate, or `sha256-raw:<hex>` to pin one.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub cert_name: String,
    /// IPv4 address; empty: ask DNS; `none`: no IPv4.
    #[serde(rename = "IPv4", deserialize_with = "soft", skip_serializing_if = "String::is_empty")]
    pub ipv4: String,
    /// IPv6 address; empty: ask DNS; `none`: no IPv6.
    #[serde(rename = "IPv6", deserialize_with = "soft", skip_serializing_if = "String::is_empty")]
    pub ipv6: String,
    /// 0 is 3478, negative is none.
    #[serde(rename = "STUNPort", deserialize_with = "soft", skip_serializing_if = "is_zero")]
    pub stun_port: i32,
    /// No relay here.
    #[serde(rename = "STUNOnly", deserialize_with = "soft", skip_serializing_if = "is_false")]
    pub stun_only: bool,
    /// 0 is 443.
    #[serde(rename = "DERPPort", deserialize_with = "soft", skip_serializing_if = "is_zero")]
    pub derp_port: i32,
    /// The server's certificate is not checked.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_false")]
    pub insecure_for_tests: bool,
}

impl DerpNode {
    /// The relay's TCP port.
    #[must_use]
    pub fn relay_port(&self) -> Option<u16> {
        match self.derp_port {
            0 => Some(443),
            port => u16::try_from(port).ok(),
        }
    }

    /// The STUN server's UDP port, if it has one.
    #[must_use]
    pub fn stun_port(&self) -> Option<u16> {
        match self.stun_port {
            0 => Some(3478),
            port => u16::try_from(port).ok(),
        }
    }
}
