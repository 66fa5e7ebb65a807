//! Peers as they rest in a snapshot.
//!
//! Each: number u64, key 32, disco key 32, home u32, flags u8, key expiry i64 (when flagged), capabilities
//! (count u16, each length u8 and bytes), length u32 and the packed facts. Integers are little-endian.

use std::time::Instant;

use super::{Facts, Peer, PeerTable, Slot};
use crate::batch::RegionId;
use crate::key::{DiscoPublic, NodePublic};
use crate::tailcfg::{NodeId, UnixTime};
use crate::wg::Timestamp;

const WIREGUARD_ONLY: u8 = 1;
const JAILED: u8 = 2;
const EXPIRED: u8 = 4;
const EXPIRES: u8 = 8;
const ONLINE: u8 = 16;
const OFFLINE: u8 = 32;
const UNSIGNED: u8 = 64;

impl Peer {
    /// Appends the stored form.
    pub(crate) fn store(&self, out: &mut Vec<u8>) {
        out.extend(self.id.0.to_le_bytes());
        out.extend(self.key.as_bytes());
        out.extend(self.disco.as_bytes());
        out.extend(self.home.0.to_le_bytes());
        let flag = |is: bool, flag: u8| u8::from(is) * flag;
        out.push(
            flag(self.wireguard_only, WIREGUARD_ONLY)
                | flag(self.jailed, JAILED)
                | flag(self.expired, EXPIRED)
                | flag(self.unsigned, UNSIGNED)
                | flag(self.key_expiry.is_some(), EXPIRES)
                | flag(self.online == Some(true), ONLINE)
                | flag(self.online == Some(false), OFFLINE),
        );
        out.extend(self.key_expiry.map(|at| at.as_millis().to_le_bytes()).into_iter().flatten());
        let caps = self.caps.iter();
        out.extend(u16::try_from(caps.len()).unwrap_or_default().to_le_bytes());
        for cap in caps {
            out.push(u8::try_from(cap.len()).unwrap_or_default());
            out.extend_from_slice(cap.as_bytes());
        }
        let facts = self.facts.as_bytes();
        out.extend(u32::try_from(facts.len()).unwrap_or_default().to_le_bytes());
        out.extend_from_slice(facts);
    }
}

impl PeerTable {
    /// Puts the peer in that `bytes` begin with, and takes it off them. `None` when there is none.
    pub(crate) fn restore(&mut self, bytes: &mut &[u8], now: Instant) -> Option<Slot> {
        let id = NodeId(u64::from_le_bytes(take(bytes)?));
        let key = NodePublic::from_bytes(take(bytes)?);
        let disco = DiscoPublic::from_bytes(take(bytes)?);
        let home = RegionId(u32::from_le_bytes(take(bytes)?));
        let [flags] = take(bytes)?;
        let key_expiry = if flags & EXPIRES == 0 {
            None
        } else {
            Some(UnixTime::from_millis(i64::from_le_bytes(take(bytes)?)))
        };
        let mut caps = Vec::new();
        for _ in 0..u16::from_le_bytes(take(bytes)?) {
            let [length] = take(bytes)?;
            caps.push(Box::from(std::str::from_utf8(split(bytes, length.into())?).ok()?));
        }
        if !caps.is_sorted() {
            return None;
        }
        let length = usize::try_from(u32::from_le_bytes(take(bytes)?)).ok()?;
        let facts = Facts::from_bytes(split(bytes, length)?)?;
        let online = match flags & (ONLINE | OFFLINE) {
            ONLINE => Some(true),
            OFFLINE => Some(false),
            _ => None,
        };
        let peer = Peer {
            id,
            key,
            disco,
            home,
            wireguard_only: flags & WIREGUARD_ONLY != 0,
            jailed: flags & JAILED != 0,
            unsigned: flags & UNSIGNED != 0,
            expired: flags & EXPIRED != 0,
            online,
            key_expiry,
            caps: self.caps.share(caps).unwrap_or_default(),
            facts,
            since: now,
            newest_initiation: Timestamp::default(),
            mark: 0,
            masks: None,
            offer: None,
            active: None,
        };
        self.put(peer, UnixTime::default(), now).map(|upserted| upserted.slot)
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

fn split<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(head)
}
