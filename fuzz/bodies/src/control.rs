//! What a control server says.

use std::time::Instant;

use podtether_core::batch::Outbox;
use podtether_core::engine::{ControlEvent, PeerList};
use podtether_core::map_stream::{MapStream, Piece};
use podtether_core::register::{bounded, decide};
use podtether_core::snapshot::Snapshot;
use podtether_core::tailcfg::{EarlyNoise, MapResponse, RegisterResponse, ServerKeys};

/// A map stream: the bytes as the stream itself, and in pieces as message bodies, applied in order.
pub fn map(data: &[u8]) {
    let (mut now, mut out) = (Instant::now(), Outbox::default());
    let mut engine = crate::packets::fresh(now);
    let (mut lists, mut applied) = ([PeerList::All, PeerList::Changed].into_iter().cycle(), 0);
    let mut stream = MapStream::new();
    for chunk in data.chunks(13) {
        stream.push(chunk);
        while let Ok(Some(piece)) = stream.next_piece() {
            let event = match piece {
                Piece::Peers(list, nodes) => ControlEvent::Peers { list, nodes },
                Piece::Rest(message, _) => ControlEvent::Map(message),
                Piece::Pause => continue,
                Piece::Bad(_) => ControlEvent::PeersUnfinished,
            };
            engine.handle_control(event, now, &mut out);
            applied += 1;
        }
    }
    for piece in super::pieces(data) {
        let event = if let Ok(message) = serde_json::from_slice::<MapResponse>(piece) {
            ControlEvent::Map(Box::new(message))
        } else if let (Ok(nodes), Some(list)) = (serde_json::from_slice(piece), lists.next()) {
            ControlEvent::Peers { list, nodes }
        } else {
            continue;
        };
        engine.handle_control(event, now, &mut out);
        applied += 1;
    }
    if applied > 0 {
        crate::packets::drain(&mut engine, &mut now, &mut out);
        let mut ids: Vec<_> = engine.peers(now).into_iter().map(|peer| peer.id).collect();
        assert_eq!(ids.len(), engine.gauges(now).peers);
        ids.sort_unstable();
        assert!(ids.windows(2).all(|w| w[0] < w[1]), "each peer once");
        assert!(engine.status().health.len() <= 70);
        let again = Snapshot::from_bytes(&engine.snapshot(now)).expect("our own snapshot");
        crate::packets::survives_start(again);
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
