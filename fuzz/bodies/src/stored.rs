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

/// An engine's snapshot: the bytes as a file, and as the content of one whose frame fits: the body up to a
/// line's end, then the peers.
pub fn snapshot(data: &[u8]) {
    let _ = Snapshot::from_bytes(data);
    let mut file = Snapshot::empty(DiscoPrivate::from_bytes([1; 32])).to_bytes();
    let body = data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len());
    // Magic, version and disco key stay.
    file.truncate(6 + 32);
    file.extend_from_slice(&u32::try_from(body).unwrap_or_default().to_le_bytes());
    file.extend_from_slice(&data[..body]);
    file.extend_from_slice(data.get(body + 1..).unwrap_or_default());
    file.extend_from_slice(&fnv64(&file).to_le_bytes());
    if let Ok(snapshot) = Snapshot::from_bytes(&file) {
        crate::packets::survives_start(snapshot);
    }
}
