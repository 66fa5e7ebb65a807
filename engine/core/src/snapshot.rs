//! What an engine leaves for its next life: enough to carry packets before control answers.
//!
//! The form is versioned and checksummed. A torn, foreign or newer one is an error, and the engine starts
//! without it: a snapshot saves time, it is never needed.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::key::{DiscoPrivate, NodePublic};
use crate::tailcfg::{MapResponse, RegionId, UnixTime};

const MAGIC: [u8; 4] = *b"PTSN";
const VERSION: u16 = 1;
const HEADER: usize = 4 + 2 + 8;
/// Largest snapshot taken: some ten thousand peers.
pub const MAX_BYTES: usize = 64 << 20;

/// Why bytes are no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Not the format at all, or cut short, or longer than [`MAX_BYTES`].
    #[error("not a snapshot")]
    Format,
    /// Written by another build.
    #[error("a snapshot of version {0}")]
    Version(u16),
    /// Damaged.
    #[error("the checksum does not match")]
    Checksum,
    /// The content does not parse.
    #[error("the content does not parse")]
    Content(#[source] serde_json::Error),
}

/// A peer that had traffic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ActivePeer {
    pub(crate) key: NodePublic,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) region: RegionId,
    pub(crate) last_active: UnixTime,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub(crate) disco: DiscoPrivate,
    pub(crate) body: Body,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Body {
    pub(crate) wall: UnixTime,
    pub(crate) home: RegionId,
    pub(crate) active: Vec<ActivePeer>,
    pub(crate) resolved: Vec<(String, Vec<IpAddr>)>,
    /// The netmap as the one message that makes it.
    pub(crate) netmap: Option<Box<MapResponse>>,
}

impl Snapshot {
    /// What an engine that never had a netmap leaves behind.
    #[must_use]
    pub fn empty(disco: DiscoPrivate) -> Self {
        Self { disco, body: Body::default() }
    }

    /// The stored form. It holds the disco private key: keep it where only the engine reads.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER];
        out.extend_from_slice(self.disco.expose());
        // Keys of maps are numbers or strings and nothing else can fail to serialize.
        let body = serde_json::to_vec(&self.body).unwrap_or_default();
        out.extend_from_slice(&body);
        let sum = checksum(&out[HEADER..]);
        out[..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[6..HEADER].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// When it is anything but what [`Snapshot::to_bytes`] of this build wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SnapshotError> {
        if bytes.len() > MAX_BYTES || bytes.len() < HEADER + 32 || bytes[..4] != MAGIC {
            return Err(SnapshotError::Format);
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != VERSION {
            return Err(SnapshotError::Version(version));
        }
        let (header, content) = bytes.split_at(HEADER);
        if header[6..] != checksum(content).to_le_bytes() {
            return Err(SnapshotError::Checksum);
        }
        let (disco, body) = content.split_at(32);
        let disco: [u8; 32] = disco.try_into().map_err(|_| SnapshotError::Format)?;
        let body = serde_json::from_slice(body).map_err(SnapshotError::Content)?;
        Ok(Self { disco: DiscoPrivate::from_bytes(disco), body })
    }
}

/// FNV-1a: against torn writes, not against anybody.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        Snapshot {
            disco: DiscoPrivate::from_bytes([5; 32]),
            body: Body { home: RegionId(7), ..Body::default() },
        }
    }

    #[test]
    fn comes_back_as_it_was_and_any_damage_is_noticed() {
        let bytes = snapshot().to_bytes();
        let back = Snapshot::from_bytes(&bytes).expect("reads");
        assert_eq!(back.body, snapshot().body);
        assert!(back.disco == snapshot().disco);
        for at in 0..bytes.len() {
            let mut torn = bytes.clone();
            torn[at] ^= 1;
            assert!(Snapshot::from_bytes(&torn).is_err(), "byte {at} flipped");
            assert!(Snapshot::from_bytes(&bytes[..at]).is_err(), "cut at {at}");
        }
        assert!(!format!("{:?}", snapshot()).contains("5, 5, 5"));
    }

    proptest::proptest! {
        #[test]
        fn fuzz_snapshot(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = Snapshot::from_bytes(&bytes);
        }
    }
}
