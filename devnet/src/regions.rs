//! The handle's part about DERP regions: where they are, what they do, what they say.

use std::sync::Arc;
use std::time::Duration;

use podtether_core::derp::{Frame, GoneReason, HEADER_LEN};
use podtether_core::key::NodePublic;

use crate::Devnet;
use crate::derp::{Mode, Relay, RelayStats};

/// Frame type of [`RelayNotice::PeerPresent`], which only relays among themselves send for a purpose.
const PEER_PRESENT: u8 = 0x09;

/// What a relay tells a client beside packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayNotice {
    /// A problem, or that it is over when empty.
    Health(String),
    /// It will end; clients should wait for the first before they come back, and try for the second.
    Restarting(Duration, Duration),
    /// A peer that sent by this relay is not connected any more.
    PeerGone(NodePublic),
    /// A peer is connected.
    PeerPresent(NodePublic),
}

impl RelayNotice {
    fn encode(&self) -> Vec<u8> {
        let ms = |time: &Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        let mut out = Vec::new();
        match self {
            Self::Health(problem) => Frame::Health(problem.as_bytes()).encode(&mut out),
            Self::Restarting(after, tries) => Frame::Restarting(ms(after), ms(tries)).encode(&mut out),
            Self::PeerGone(peer) => Frame::PeerGone(*peer, GoneReason::Disconnected).encode(&mut out),
            Self::PeerPresent(peer) => {
                Frame::Other(PEER_PRESENT).encode(&mut out);
                out.extend_from_slice(peer.as_bytes());
                let length = u32::try_from(out.len() - HEADER_LEN).unwrap_or(u32::MAX);
                out[1..HEADER_LEN].copy_from_slice(&length.to_be_bytes());
            }
        }
        out
    }
}

impl Devnet {
    fn relay(&self, region: u32) -> Option<&Arc<Relay>> {
        self.inner.relays.iter().find(|relay| relay.id == region)
    }

    /// Makes a region work, refuse, or swallow everything; false when there is no such region.
    pub fn set_region(&self, region: u32, mode: Mode) -> bool {
        self.relay(region).map(|relay| relay.set_mode(mode)).is_some()
    }

    /// Moves a region so far away, also for the connections there are; false when there is no such region.
    pub fn set_region_distance(&self, region: u32, distance: Duration) -> bool {
        self.relay(region).map(|relay| relay.distance.set(distance)).is_some()
    }

    /// Cuts every connection of a region's relay; false when there is no such region.
    pub fn restart_region(&self, region: u32) -> bool {
        self.relay(region).map(|relay| relay.restart()).is_some()
    }

    /// Lets a relay say something to the node with this key; false when it is not connected there.
    pub fn say_on_relay(&self, region: u32, key: &NodePublic, notice: &RelayNotice) -> bool {
        self.relay(region).is_some_and(|relay| relay.say(key, &notice.encode()))
    }

    /// What a region's relay did so far.
    #[must_use]
    pub fn region_stats(&self, region: u32) -> Option<RelayStats> {
        self.relay(region).map(|relay| relay.stats())
    }

    /// Whether the node with this key is connected to a region's relay.
    #[must_use]
    pub fn is_on_relay(&self, region: u32, key: &NodePublic) -> bool {
        self.relay(region).is_some_and(|relay| relay.has_client(key))
    }
}
