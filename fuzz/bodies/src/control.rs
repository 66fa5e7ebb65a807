//! What a control server says.

use podtether_core::map_frame::MapFrames;
use podtether_core::netmap::NetMap;
use podtether_core::register::{bounded, decide};
use podtether_core::tailcfg::{EarlyNoise, MapResponse, RegisterResponse, ServerKeys, UnixTime};

/// A map stream: the bytes as the stream itself, and in pieces as message bodies, applied in order.
pub fn map(data: &[u8]) {
    let mut frames = MapFrames::new();
    for chunk in data.chunks(13) {
        frames.push(chunk);
        while let Ok(Some(message)) = frames.next_message() {
            let _ = serde_json::from_slice::<MapResponse>(message);
        }
    }
    let mut netmap = NetMap::new();
    let wall = UnixTime::from_secs(1_800_000_000);
    for piece in super::pieces(data) {
        let Ok(message) = serde_json::from_slice::<MapResponse>(piece) else { continue };
        if let Ok(change) = netmap.apply(message, wall) {
            assert!(change.changed.windows(2).all(|w| w[0] < w[1]), "each changed peer once, in order");
            assert!(change.changed.iter().all(|id| netmap.peer(*id).is_some()));
        }
        assert!(netmap.health().count() <= 64);
    }
}

/// An answer to a registration, a server's keys, the early payload's content.
pub fn register(data: &[u8]) {
    if let Ok(response) = serde_json::from_slice::<RegisterResponse>(data) {
        let _ = decide(&response);
    }
    let _ = serde_json::from_slice::<ServerKeys>(data);
    let _ = serde_json::from_slice::<EarlyNoise>(data);
    let text = bounded(&String::from_utf8_lossy(data));
    assert!(text.chars().count() <= 301 && !text.contains('\n'));
}
