//! Frames of the wire: control's Noise stream, relays, disco, STUN.

use std::net::SocketAddr;

use crypto_box::SalsaBox;
use crypto_box::aead::AeadInPlace as _;
use podtether_core::derp::{self as derp_wire, Frame};
use podtether_core::disco::{SharedKey, sender};
use podtether_core::key::{DiscoPrivate, MachinePrivate, NodePrivate};
use podtether_core::noise::{ClientHandshake, EarlyPayload, FrameReader, ServerHandshake};
use podtether_core::stun as stun_wire;

/// A server's bytes: frames in pieces, an answer to our initiation, the early payload.
pub fn noise(data: &[u8]) {
    let mut reader = FrameReader::new();
    for chunk in data.chunks(7) {
        reader.feed(chunk);
        while let Ok(Some(frame)) = reader.next_frame() {
            assert!(frame.len() >= 3 && frame.len() <= 4096);
        }
    }
    let server = MachinePrivate::from_bytes([3; 32]);
    let client = MachinePrivate::from_bytes([4; 32]);
    if let Ok((handshake, _)) = ClientHandshake::start(&client, &server.public(), 115) {
        assert!(handshake.finish(data).is_err(), "nobody can guess an answer");
    }
    let _ = ServerHandshake::read(&server, data);
    let mut early = EarlyPayload::new();
    for chunk in data.chunks(5) {
        match early.feed(chunk) {
            Ok(None) => {}
            Ok(Some(_)) | Err(_) => break,
        }
    }
}

/// A relay's bytes: the frame stream, and each frame's own content.
pub fn derp(data: &[u8]) {
    let ours = NodePrivate::from_bytes([5; 32]);
    let server = NodePrivate::from_bytes([6; 32]);
    let mut reader = derp_wire::FrameReader::new();
    for chunk in data.chunks(11) {
        reader.push(chunk);
        loop {
            match reader.next_frame() {
                Ok(Some(Frame::ServerInfo(body))) => {
                    let _ = derp_wire::open_server_info(&ours, &server.public(), body);
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    if let Some((kind, body)) = data.split_first()
        && let Ok(frame) = Frame::parse(*kind, body)
    {
        let mut again = Vec::new();
        frame.encode(&mut again);
        assert!(again.len() <= body.len() + 64, "a frame does not grow by being read");
    }
}

/// A datagram that looks like disco, and the same bytes as what a peer has sealed.
pub fn disco(data: &[u8]) {
    let ours = DiscoPrivate::from_bytes([7; 32]);
    let theirs = DiscoPrivate::from_bytes([8; 32]);
    let _ = sender(data);
    let shared = SharedKey::new(&ours, &theirs.public());
    let mut raw = data.to_vec();
    let _ = shared.open(&mut raw);

    let sealer = SalsaBox::new(
        &crypto_box::PublicKey::from(*ours.public().as_bytes()),
        &crypto_box::SecretKey::from(*theirs.expose()),
    );
    let nonce = [9; 24];
    let mut body = data.to_vec();
    if let Ok(tag) = sealer.encrypt_in_place_detached(&nonce.into(), b"", &mut body) {
        let mut packet = b"TS\xf0\x9f\x92\xac".to_vec();
        packet.extend_from_slice(theirs.public().as_bytes());
        packet.extend_from_slice(&nonce);
        packet.extend_from_slice(&tag);
        packet.extend_from_slice(&body);
        if let Ok(message) = shared.open(&mut packet) {
            let mut sealed = Vec::new();
            shared.seal(&theirs.public(), nonce, &message, &mut sealed);
            assert!(sealed.is_empty() || sender(&sealed).is_some());
        }
    }
}

/// A STUN server's answer, and a client's question.
pub fn stun(data: &[u8]) {
    if let Ok((tx, observed)) = stun_wire::parse_response(data) {
        assert!(stun_wire::is_stun(data));
        let again = stun_wire::response(&tx, observed);
        assert_eq!(
            stun_wire::parse_response(&again),
            Ok((tx, SocketAddr::new(observed.ip(), observed.port())))
        );
    }
    let _ = stun_wire::parse_request(data);
}
