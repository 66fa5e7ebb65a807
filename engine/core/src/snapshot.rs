//! What an engine leaves for its next life: enough to carry packets before control answers.
//!
//! The form is versioned and checksummed. A torn, foreign or newer one is an error, and the engine starts
//! without it: a snapshot saves time, it is never needed.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::filter::{Rule, RuleBook};
use crate::key::{DiscoPrivate, NodePublic};
use crate::peer::{Peer, Slot};
use crate::tailcfg::{MapResponse, RegionId, UnixTime};

const MAGIC: [u8; 4] = *b"PTSN";
const VERSION: u16 = 3;
/// Magic, version, disco private key, length of the body.
const HEADER: usize = 4 + 2 + 32 + 4;
const TRAILER: usize = 8;
/// A packet filter with more JSON than this is not kept: then only answers come in until control speaks.
pub(crate) const MAX_RULE_BYTES: usize = MAX_BYTES / 2;
/// Largest snapshot: some thirty thousand peers. Of more, those without traffic are left out.
pub const MAX_BYTES: usize = (8 << 20) - 4096;

/// Bytes of rules written in one go, or one rule.
const RULES_PORTION: usize = 64 << 10;

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
#[derive(Clone)]
pub struct Snapshot {
    pub(crate) disco: DiscoPrivate,
    pub(crate) body: Body,
    /// All rules of the packet filter, one chunk's after the other's.
    pub(crate) rules: Vec<Rule>,
    /// One after the other, as `Peer::store` writes them.
    pub(crate) peers: Vec<u8>,
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot").field("body", &self.body).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Body {
    pub(crate) wall: UnixTime,
    /// What initiations are stamped with at `wall`.
    #[serde(default)]
    pub(crate) stamped: UnixTime,
    pub(crate) home: RegionId,
    pub(crate) active: Vec<ActivePeer>,
    pub(crate) resolved: Vec<(String, Vec<IpAddr>)>,
    /// The netmap without its peers and rules, as the one message that makes it.
    pub(crate) netmap: Option<Box<MapResponse>>,
    /// The chunks of the packet filter, and how many of the rules that follow are in each.
    pub(crate) chunks: Option<Vec<(String, u32)>>,
}

impl Snapshot {
    /// What an engine that never had a netmap leaves behind.
    #[must_use]
    pub fn empty(disco: DiscoPrivate) -> Self {
        Self { disco, body: Body::default(), rules: Vec::new(), peers: Vec::new() }
    }

    /// The stored form. It holds the disco private key: keep it where only the engine reads.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let rules = self.rules.clone();
        let mut writer = SnapshotWriter::begin(&self.disco, &self.body, rules, Vec::new(), &mut out);
        while writer.add_rules(&mut out) {}
        writer.note(&self.peers);
        out.extend_from_slice(&self.peers);
        writer.end(&mut out);
        out
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// When it is anything but what an engine of this build wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SnapshotError> {
        if bytes.len() > MAX_BYTES || bytes.len() < HEADER + TRAILER || bytes[..4] != MAGIC {
            return Err(SnapshotError::Format);
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != VERSION {
            return Err(SnapshotError::Version(version));
        }
        let (content, sum) = bytes.split_at(bytes.len() - TRAILER);
        if sum != Checksum::default().of(content).to_le_bytes() {
            return Err(SnapshotError::Checksum);
        }
        let (header, content) = content.split_at(HEADER);
        let (disco, length) = header[6..].split_first_chunk::<32>().ok_or(SnapshotError::Format)?;
        let length = u32::from_le_bytes(length.try_into().map_err(|_| SnapshotError::Format)?);
        let length = usize::try_from(length).map_err(|_| SnapshotError::Format)?;
        let (body, peers) = content.split_at_checked(length).ok_or(SnapshotError::Format)?;
        let body: Body = serde_json::from_slice(body).map_err(SnapshotError::Content)?;
        let (mut rules, mut rest, mut book) = (Vec::new(), peers, RuleBook::default());
        for _ in 0..body.chunks.iter().flatten().map(|(_, rules)| u64::from(*rules)).sum() {
            let (length, after) = rest.split_first_chunk::<4>().ok_or(SnapshotError::Format)?;
            let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| SnapshotError::Format)?;
            let (rule, after) = after.split_at_checked(length).ok_or(SnapshotError::Format)?;
            rules.push(book.rule(rule).map_err(SnapshotError::Content)?);
            rest = after;
        }
        Ok(Self { disco: DiscoPrivate::from_bytes(*disco), body, rules, peers: rest.to_vec() })
    }
}

/// Where the writing of a snapshot is. Peers are written in portions, and what changes in between is
/// written as it is by then: each peer is whole, and no two depend on each other.
#[derive(Debug)]
pub struct SnapshotWriter {
    /// Rules of the packet filter; they are written before all peers.
    rules: Vec<Rule>,
    written_rules: usize,
    /// Peers with traffic, sorted; they are written first.
    pub(crate) first: Vec<Slot>,
    pub(crate) written_first: usize,
    pub(crate) next: usize,
    written: usize,
    sum: Checksum,
}

impl SnapshotWriter {
    pub(crate) fn begin(
        disco: &DiscoPrivate,
        body: &Body,
        rules: Vec<Rule>,
        first: Vec<Slot>,
        out: &mut Vec<u8>,
    ) -> Self {
        let from = out.len();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(disco.expose());
        // Keys of maps are numbers or strings and nothing else can fail to serialize.
        let body = serde_json::to_vec(body).unwrap_or_default();
        out.extend_from_slice(&u32::try_from(body.len()).unwrap_or_default().to_le_bytes());
        out.extend_from_slice(&body);
        let mut this = Self {
            rules,
            written_rules: 0,
            first,
            written_first: 0,
            next: 0,
            written: 0,
            sum: Checksum::default(),
        };
        this.note(&out[from..]);
        this
    }

    /// Appends a portion of the rules; false when there was none left.
    pub(crate) fn add_rules(&mut self, out: &mut Vec<u8>) -> bool {
        let from = out.len();
        while let Some(rule) = self.rules.get(self.written_rules)
            && out.len() - from < RULES_PORTION
        {
            // Rules are bounded together far below the four gigabytes.
            let length = u32::try_from(rule.json().len()).unwrap_or_default();
            out.extend_from_slice(&length.to_le_bytes());
            out.extend_from_slice(rule.json());
            self.written_rules += 1;
        }
        self.note(&out[from..]);
        out.len() > from
    }

    /// Appends one peer; false when there is no room for it.
    pub(crate) fn add(&mut self, peer: &Peer, out: &mut Vec<u8>) -> bool {
        let from = out.len();
        peer.store(out);
        if self.written + out.len() - from + TRAILER > MAX_BYTES {
            out.truncate(from);
            return false;
        }
        self.note(&out[from..]);
        true
    }

    pub(crate) fn end(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.sum.0.to_le_bytes());
    }

    fn note(&mut self, bytes: &[u8]) {
        self.sum.of(bytes);
        self.written += bytes.len();
    }
}

/// FNV-1a: against torn writes, not against anybody.
#[derive(Debug)]
struct Checksum(u64);

impl Default for Checksum {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Checksum {
    /// Takes in more bytes; the sum so far.
    fn of(&mut self, bytes: &[u8]) -> u64 {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_as_it_was_and_any_damage_is_noticed() {
        let disco = DiscoPrivate::from_bytes([5; 32]);
        let mut bytes = Vec::new();
        let body = Body {
            chunks: Some(vec![("a".into(), 1), ("b".into(), 0), ("c".into(), 2)]),
            home: RegionId(7),
            ..Body::default()
        };
        let rules: Vec<Rule> = [&br#"{"SrcIPs":["*"]}"#[..], b"{ }", br#"{"IPProto":[6]}"#]
            .map(|json| RuleBook::default().rule(json).unwrap())
            .into();
        let mut writer = SnapshotWriter::begin(&disco, &body, rules.clone(), Vec::new(), &mut bytes);
        while writer.add_rules(&mut bytes) {}
        writer.end(&mut bytes);
        let back = Snapshot::from_bytes(&bytes).expect("reads");
        assert_eq!(back.rules, rules);
        assert_eq!(back.to_bytes(), bytes);
        assert_eq!((&back.body, back.peers.len()), (&body, 0));
        assert!(back.disco == disco);
        for at in 0..bytes.len() {
            let mut torn = bytes.clone();
            torn[at] ^= 1;
            assert!(Snapshot::from_bytes(&torn).is_err(), "byte {at} flipped");
            assert!(Snapshot::from_bytes(&bytes[..at]).is_err(), "cut at {at}");
        }
        assert!(!format!("{back:?}").contains("5, 5, 5"));
    }

    proptest::proptest! {
        #[test]
        fn fuzz_snapshot(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = Snapshot::from_bytes(&bytes);
        }
    }
}
