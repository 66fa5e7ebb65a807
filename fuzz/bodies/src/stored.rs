//! What lies on disk.

use podtether_core::key::DiscoPrivate;
use podtether_core::snapshot::Snapshot;
use podtether_supervisor::record::{Attachment, Identity, decode, fnv64};

/// A record: the bytes as a file, and as the body of one whose checksum fits.
pub fn record(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let sealed =
        format!("{{\"version\":1,\"checksum\":\"{:016x}\",\"body\":{text}}}\n", fnv64(text.as_bytes()));
    for text in [text.as_ref(), &sealed] {
        let _ = decode::<Attachment>(text);
        let _ = decode::<Identity>(text);
    }
}

/// An engine's snapshot: the bytes as a file, and as the content of one whose header fits.
pub fn snapshot(data: &[u8]) {
    let _ = Snapshot::from_bytes(data);
    let mut file = Snapshot::empty(DiscoPrivate::from_bytes([1; 32])).to_bytes();
    let content = [&[1; 32], data].concat();
    file.truncate(6);
    file.extend_from_slice(&fnv64(&content).to_le_bytes());
    file.extend_from_slice(&content);
    if let Ok(snapshot) = Snapshot::from_bytes(&file) {
        crate::packets::survives_start(snapshot);
    }
}
