//! The warm snapshot's file: two slots, written in turn, so that an engine killed in the middle of a
//! write leaves the other one whole.
//!
//! A slot is `magic, sequence u64, node key 32, length u32, checksum u64, payload`, integers LE. The payload
//! is written in pieces as the core gives them, and the header last. The reader takes the whole slot with the greatest sequence that was written under the same node key. The
//! checksum finds torn writes; the file itself is private (0600, tmpfs), so nobody forges it.

use std::fs::File;
use std::io::{self, Seek as _};
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
    payload: Payload,
}

/// What was written of the slot under way.
#[derive(Debug, Clone, Copy)]
struct Payload {
    length: usize,
    sum: u64,
}

impl Payload {
    const NONE: Self = Self { length: 0, sum: CHECKSUM_START };
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
            return (Self { file, node, next_sequence: 1, next_slot: 0, payload: Payload::NONE }, None);
        };
        let next_sequence = sequence.saturating_add(1);
        let this = Self { file, node, next_sequence, next_slot: 1 - slot, payload: Payload::NONE };
        (this, (owner == node).then_some(data))
    }

    /// Another process may have written since this one opened it: what is written next is newer.
    pub(crate) fn catch_up(&mut self) {
        let newest = (0..2).filter_map(|slot| Some((read_header(&self.file, slot)?.sequence, slot))).max();
        if let Some((sequence, slot)) = newest {
            (self.next_sequence, self.next_slot) = (sequence.saturating_add(1), 1 - slot);
        }
    }

    /// Begins anew over the older slot, which is void from the first piece on.
    pub(crate) fn begin(&mut self) {
        self.payload = Payload::NONE;
    }

    /// Writes the next piece.
    pub(crate) fn append(&mut self, piece: &[u8]) -> io::Result<()> {
        let Payload { length, sum } = self.payload;
        if length + piece.len() > MAX_PAYLOAD {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the snapshot is too large to keep"));
        }
        if length == 0 {
            // The payload is not the header's any more.
            self.file.write_all_at(&[0; MAGIC.len()], self.next_slot * SLOT_BYTES)?;
        }
        let at = u64::try_from(HEADER + length).map_err(io::Error::other)?;
        self.file.write_all_at(piece, self.next_slot * SLOT_BYTES + at)?;
        self.payload = Payload { length: length + piece.len(), sum: checksum(sum, piece) };
        Ok(())
    }

    /// Makes what was appended the newest snapshot.
    pub(crate) fn commit(&mut self) -> io::Result<()> {
        let Payload { length, sum } = std::mem::replace(&mut self.payload, Payload::NONE);
        let mut header = Vec::with_capacity(HEADER);
        header.extend_from_slice(&MAGIC);
        header.extend_from_slice(&self.next_sequence.to_le_bytes());
        header.extend_from_slice(&self.node);
        header.extend_from_slice(&u32::try_from(length).map_err(io::Error::other)?.to_le_bytes());
        let sum = checksum(sum, &header);
        header.extend_from_slice(&sum.to_le_bytes());
        self.file.write_all_at(&header, self.next_slot * SLOT_BYTES)?;
        self.next_slot = 1 - self.next_slot;
        self.next_sequence = self.next_sequence.saturating_add(1);
        Ok(())
    }
}

/// What stands before a payload.
struct Header {
    bytes: [u8; HEADER],
    sequence: u64,
    node: [u8; 32],
    length: usize,
}

fn read_header(file: &File, slot: u64) -> Option<Header> {
    let base = slot * SLOT_BYTES;
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, base).ok()?;
    let (summed, _) = header.split_at(HEADER - 8);
    let sequence = u64::from_le_bytes(summed.get(8..16)?.try_into().ok()?);
    let node: [u8; 32] = summed.get(16..48)?.try_into().ok()?;
    let length = usize::try_from(u32::from_le_bytes(summed.get(48..52)?.try_into().ok()?)).ok()?;
    if summed.get(..8)? != MAGIC || length > MAX_PAYLOAD {
        return None;
    }
    Some(Header { bytes: header, sequence, node, length })
}

fn read_slot(file: &File, slot: u64) -> Option<(u64, [u8; 32], Zeroizing<Vec<u8>>)> {
    let base = slot * SLOT_BYTES;
    let Header { bytes, sequence, node, length } = read_header(file, slot)?;
    let (summed, sum) = bytes.split_at(HEADER - 8);
    // A torn header must not make us reserve memory for bytes that are not there.
    let mut end = file;
    let written = end.seek(io::SeekFrom::End(0)).ok()?.saturating_sub(base);
    if u64::try_from(HEADER + length).ok()? > written {
        return None;
    }
    let mut payload = Zeroizing::new(vec![0; length]);
    file.read_exact_at(&mut payload, base + u64::try_from(HEADER).ok()?).ok()?;
    let sum = u64::from_le_bytes(sum.try_into().ok()?);
    (checksum(checksum(CHECKSUM_START, &payload), summed) == sum).then_some((sequence, node, payload))
}

/// FNV-1a, 64 bits, of the payload and then the header before the sum.
const CHECKSUM_START: u64 = 0xcbf2_9ce4_8422_2325;

fn checksum(start: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl SnapshotFile {
        fn write(&mut self, payload: &[u8]) -> io::Result<()> {
            self.begin();
            for piece in payload.chunks(3) {
                self.append(piece)?;
            }
            self.commit()
        }
    }

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
    fn a_write_that_was_cut_off_leaves_the_one_before() {
        let file = tempfile::tempfile().unwrap();
        let (mut first, _) = open(&file, 1);
        first.write(b"one").unwrap();
        first.write(b"two").unwrap();
        first.begin();
        first.append(b"thr").unwrap();
        let (mut second, data) = open(&file, 1);
        assert_eq!(data.as_deref(), Some(&b"two"[..]));
        second.write(b"four").unwrap();
        assert_eq!(open(&file, 1).1.as_deref(), Some(&b"four"[..]));
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
        snapshot.begin();
        assert!(snapshot.append(&vec![0; MAX_PAYLOAD + 1]).is_err());
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
