//! The control protocol's JSON, as much of it as an engine or a control server here uses.
//!
//! Parsing is lenient where that is safe: unknown fields are ignored, null stands for an empty list,
//! false or zero, an odd element of a list is skipped, an odd peer is skipped. It is strict where
//! leniency would widen access: a filter rule with a part that does not parse is dropped as a whole.

mod derp_map;
mod lenient;
mod map;
mod node;
mod policy;
mod register;
mod time;

pub use derp_map::{DerpHomeParams, DerpMap, DerpNode, DerpRegion};
pub(crate) use lenient::{counting, list, or_default};
pub use map::{
    ControlDialPlan, ControlIpCandidate, Debug, DisplayMessage, EndpointType, MapRequest, MapResponse,
    PingRequest, PingResponse, TkaInfo,
};
pub use node::{CapMap, HostParams, Hostinfo, NetInfo, Node, PeerChange, Service, User, UserProfile};
pub use policy::{CapGrant, DnsConfig, DnsRecord, FilterRule, NetPortRange, PortRange, Resolver};
pub use register::{EarlyNoise, Login, RegisterAuth, RegisterRequest, RegisterResponse, ServerKeys};
pub use time::UnixTime;

use serde::{Deserialize, Serialize};

/// The capability version this node claims. It promises what is implemented and no more: from 118 on
/// a server may want to know whether state is encrypted, from 120 on count on peer relays.
pub const CAPABILITY_VERSION: u16 = 117;

/// A node's number in its tailnet; the server's, never reused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub u64);

/// A DERP region's number; 0 means none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RegionId(pub u32);

impl RegionId {
    /// False for 0, which stands for "no region".
    #[must_use]
    pub const fn is_some(self) -> bool {
        self.0 != 0
    }
}

macro_rules! number {
    ($name:ident, $inner:ty) => {
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = std::num::ParseIntError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse::<$inner>().map(Self)
            }
        }
    };
}
number!(NodeId, u64);
number!(RegionId, u32);

#[cfg(test)]
mod tests;
