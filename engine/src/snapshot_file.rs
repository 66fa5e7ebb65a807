//! The warm snapshot's file: two slots, written in turn, so that an engine killed in the middle of a
//! write leaves the other one whole.
//!
//! A slot is `magic, sequence u64, node key 32, length u32, checksum u64, payload`, integers LE. The reader
//! takes the whole slot with the greatest sequence that was written under the same node key. The
//! checksum finds torn writes; the file itself is private (0600, tmpfs), so nobody forges it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use zeroize::Zeroizing;

const MAGIC: [u8; 8] = *b"ptsnap\x00\x01";
const HEADER: usize = 8 + 8 + 32 + 4 + 8;
const SLOT_BYTES: u64 = 8 << 20;
/// The largest snapshot that is kept.
const MAX_PAYLOAD: usize = (8 << 20) - HEADER;

/// The open file and where the next write goes.
#[derive(Debug)]
pub(crate) struct SnapshotFile {
    file: File,
    node: [u8; 32],
    next_sequence: u64,
    next_slot: u64,
}

impl SnapshotFile {
    /// Reads what an earlier engine of the same node left, if it is whole.
    pub(crate) fn open(fd: OwnedFd, node: [u8; 32]) -> (Self, Option<Zeroizing<Vec<u8>>>) {
        let file = File::from(fd);
        let newest = (0..2)
            .filter_map(|slot| {
                read_slot(&file, slot).map(|(sequence, owner, data)| (sequence, slot, owner, data))
            })
            .max_by_key(|(sequence, ..)| *sequence);
        let Some((sequence, slot, owner, data)) = newest else {
            return (Self { file, node, next_sequence: 1, next_slot: 0 }, None);
        };
        let this = Self { file, node, next_sequence: sequence.saturating_add(1), next_slot: 1 - slot };
        (this, (owner == node).then_some(data))
    }

    /// Writes over the older slot.
    pub(crate) fn write(&mut self, payload: &[u8]) -> io::Result<()> {
        if payload.len() > MAX_PAYLOAD {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the snapshot is too large to keep"));
        }
        let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut slot = Zeroizing::new(Vec::with_capacity(HEADER + payload.len()));
        slot.extend_from_slice(&MAGIC);
        slot.extend_from_slice(&self.next_sequence.to_le_bytes());
        slot.extend_from_slice(&self.node);
        slot.extend_from_slice(&length.to_le_bytes());
        let sum = checksum(&[&slot, payload]);
        slot.extend_from_slice(&sum.to_le_bytes());
        slot.extend_from_slice(payload);
        self.file.write_all_at(&slot, self.next_slot * SLOT_BYTES)?;
        self.next_slot = 1 - self.next_slot;
        self.next_sequence = self.next_sequence.saturating_add(1);
        Ok(())
    }
}

fn read_slot(file: &File, slot: u64) -> Option<(u64, [u8; 32], Zeroizing<Vec<u8>>)> {
    let base = slot * SLOT_BYTES;
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, base).ok()?;
    let (summed, sum) = header.split_at(HEADER - 8);
    let sequence = u64::from_le_bytes(summed.get(8..16)?.try_into().ok()?);
    let node: [u8; 32] = summed.get(16..48)?.try_into().ok()?;
    let length = usize::try_from(u32::from_le_bytes(summed.get(48..52)?.try_into().ok()?)).ok()?;
    if summed.get(..8)? != MAGIC || length > MAX_PAYLOAD {
        return None;
    }
    // A torn header must not make us reserve memory for bytes that are not there.
    let written = file.metadata().ok()?.len().saturating_sub(base);
    if u64::try_from(HEADER + length).ok()? > written {
        return None;
    }
    let mut payload = Zeroizing::new(vec![0; length]);
    file.read_exact_at(&mut payload, base + u64::try_from(HEADER).ok()?).ok()?;
    let sum = u64::from_le_bytes(sum.try_into().ok()?);
    (checksum(&[summed, &payload]) == sum).then_some((sequence, node, payload))
}

/// FNV-1a, 64 bits.
fn checksum(parts: &[&[u8]]) -> u64 {
    parts
        .iter()
        .copied()
        .flatten()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open(file: &File, node: u8) -> (SnapshotFile, Option<Vec<u8>>) {
        let (snapshot, data) = SnapshotFile::open(file.try_clone().unwrap().into(), [node; 32]);
        (snapshot, data.map(|d| d.to_vec()))
    }

    #[test]
    fn the_newest_whole_slot_wins() {
        let file = tempfile::tempfile().unwrap();
        let (mut first, nothing) = open(&file, 1);
        assert_eq!(nothing, None);
        first.write(b"one").unwrap();
        first.write(b"two").unwrap();
        assert_eq!(open(&file, 1).1.as_deref(), Some(&b"two"[..]));
        // The slot of "two" is torn by a kill in the middle of "four".
        first.write(b"three").unwrap();
        first.write(b"four").unwrap();
        file.write_all_at(b"x", SLOT_BYTES + 60).unwrap();
        let (mut second, data) = open(&file, 1);
        assert_eq!(data.as_deref(), Some(&b"three"[..]));
        second.write(b"five").unwrap();
        assert_eq!(open(&file, 1).1.as_deref(), Some(&b"five"[..]));
    }

    #[test]
    fn another_nodes_snapshot_is_not_ours() {
        let file = tempfile::tempfile().unwrap();
        open(&file, 1).0.write(b"one").unwrap();
        let (mut other, data) = open(&file, 2);
        assert_eq!(data, None);
        other.write(b"two").unwrap();
        assert_eq!(open(&file, 2).1.as_deref(), Some(&b"two"[..]));
    }

    #[test]
    fn too_large_is_refused_and_harmless() {
        let file = tempfile::tempfile().unwrap();
        let (mut snapshot, _) = open(&file, 1);
        snapshot.write(b"one").unwrap();
        assert!(snapshot.write(&vec![0; MAX_PAYLOAD + 1]).is_err());
        assert_eq!(open(&file, 1).1.as_deref(), Some(&b"one"[..]));
    }

    #[test]
    fn fuzz_any_file_is_read_without_panic() {
        proptest!(|(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), good in any::<bool>())| {
            if good && bytes.len() >= 8 {
                bytes[..8].copy_from_slice(&MAGIC);
            }
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&bytes, 0).unwrap();
            prop_assert_eq!(open(&file, 1).1, None);
        });
    }
}
