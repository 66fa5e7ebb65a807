//! Handshakes with one peer: Noise IKpsk2 by snow between WireGuard's own header and its two MACs
//! (<https://www.wireguard.com/papers/wireguard.pdf>, section 5.4). Tailnets use no preshared key, which is a
//! key of zeroes.

use std::ops::Range;
use std::time::{Duration, Instant};

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput as _, KeyInit as _, Update as _};
use blake2::{Blake2s256, Blake2sMac, Digest};
use chacha20poly1305::XChaCha20Poly1305;
use chacha20poly1305::aead::{Aead as _, Payload};
use snow::HandshakeState;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroize as _;

use super::{INITIATION, INITIATION_LEN, RESPONSE, Timestamp, read_u32};
use crate::aead;

const NOISE: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
const MAC1: &[u8] = b"mac1----";
const COOKIE: &[u8] = b"cookie--";
/// The Noise message of an initiation, after type and sender index.
const INITIATION_NOISE: Range<usize> = 8..116;
/// The Noise message of a response, after type, sender and receiver index.
const RESPONSE_NOISE: Range<usize> = 12..60;
/// Length of a handshake response.
pub(super) const RESPONSE_LEN: usize = 92;
/// Length of a cookie reply.
pub(super) const COOKIE_REPLY_LEN: usize = 64;
const MACS: usize = 32;
/// The sender of a cookie changes its secret after so long.
const COOKIE_AGE: Duration = Duration::from_secs(120);

/// What a session works with.
pub(super) struct Keys {
    /// Names the session to the peer.
    pub(super) peer_index: u32,
    pub(super) sending: aead::Key,
    pub(super) receiving: aead::Key,
}

/// An initiation of the peer, authentic and not answered.
pub(super) struct Received {
    state: HandshakeState,
    peer_index: u32,
    pub(super) timestamp: Timestamp,
}

struct Cookie {
    value: [u8; 16],
    since: Instant,
}

/// Both parties' static keys, and what the peer said about our handshake messages.
pub(super) struct Handshaker {
    secret: StaticSecret,
    peer: PublicKey,
    mac1_key: [u8; 32],
    cookie: Option<Cookie>,
    /// Index and first MAC of the message sent last, which a cookie reply names.
    sent: Option<(u32, [u8; 16])>,
}

impl Handshaker {
    pub(super) fn new(secret: StaticSecret, peer: PublicKey) -> Self {
        Self { secret, peer, mac1_key: hash(MAC1, peer.as_bytes()), cookie: None, sent: None }
    }

    fn builder(&self) -> Option<snow::Builder<'_>> {
        let builder = snow::Builder::new(NOISE.parse().ok()?).prologue(PROLOGUE).ok()?;
        builder.psk(2, &[0; 32]).ok()?.local_private_key(self.secret.as_bytes()).ok()
    }

    /// Makes an initiation under the receiver index `index`, to be answered in the state that is given back.
    /// `None` when the system has no random numbers.
    pub(super) fn initiate(
        &mut self,
        index: u32,
        timestamp: Timestamp,
        now: Instant,
        out: &mut [u8; INITIATION_LEN],
    ) -> Option<Box<HandshakeState>> {
        let mut state =
            self.builder()?.remote_public_key(self.peer.as_bytes()).ok()?.build_initiator().ok()?;
        out[..4].copy_from_slice(&[INITIATION, 0, 0, 0]);
        out[4..8].copy_from_slice(&index.to_le_bytes());
        state.write_message(&timestamp, &mut out[INITIATION_NOISE]).ok()?;
        self.add_macs(index, now, out);
        Some(Box::new(state))
    }

    /// Checks an initiation: `None` unless the peer made it for us.
    pub(super) fn receive(&self, initiation: &[u8]) -> Option<Received> {
        let mut state = self.builder()?.build_responder().ok()?;
        let mut timestamp = [0; 12];
        let length = state.read_message(initiation.get(INITIATION_NOISE)?, &mut timestamp).ok()?;
        if length != timestamp.len() || state.get_remote_static() != Some(self.peer.as_bytes()) {
            return None;
        }
        Some(Received { state, peer_index: read_u32(initiation, 4)?, timestamp })
    }

    /// Answers an initiation by [`RESPONSE_LEN`] bytes in `out`.
    pub(super) fn respond(
        &mut self,
        received: Received,
        index: u32,
        now: Instant,
        out: &mut [u8; RESPONSE_LEN],
    ) -> Option<Keys> {
        let Received { mut state, peer_index, .. } = received;
        out[..4].copy_from_slice(&[RESPONSE, 0, 0, 0]);
        out[4..8].copy_from_slice(&index.to_le_bytes());
        out[8..12].copy_from_slice(&peer_index.to_le_bytes());
        state.write_message(&[], &mut out[RESPONSE_NOISE]).ok()?;
        self.add_macs(index, now, out);
        let (mut theirs, mut ours) = state.dangerously_get_raw_split();
        let keys = Keys { peer_index, sending: aead::Key::new(&ours), receiving: aead::Key::new(&theirs) };
        theirs.zeroize();
        ours.zeroize();
        Some(keys)
    }

    /// What the response to our initiation gives; a wrong one leaves `state` as it was.
    pub(super) fn finish(state: &mut HandshakeState, response: &[u8]) -> Option<Keys> {
        let peer_index = read_u32(response, 4)?;
        state.read_message(response.get(RESPONSE_NOISE)?, &mut []).ok()?;
        let (mut ours, mut theirs) = state.dangerously_get_raw_split();
        let keys = Keys { peer_index, sending: aead::Key::new(&ours), receiving: aead::Key::new(&theirs) };
        theirs.zeroize();
        ours.zeroize();
        Some(keys)
    }

    /// Takes the cookie of a reply to the message sent last: messages carry it from here on.
    pub(super) fn take_cookie(&mut self, reply: &[u8], now: Instant) -> bool {
        let Some((index, mac1)) = self.sent else { return false };
        if reply.len() != COOKIE_REPLY_LEN || read_u32(reply, 4) != Some(index) {
            return false;
        }
        let (nonce, sealed) = reply[8..].split_at(24);
        let key = hash(COOKIE, self.peer.as_bytes());
        let payload = Payload { msg: sealed, aad: &mac1 };
        let opened = XChaCha20Poly1305::new(&key.into()).decrypt(nonce.into(), payload);
        let Some(value) = opened.ok().and_then(|cookie| cookie.try_into().ok()) else { return false };
        self.cookie = Some(Cookie { value, since: now });
        true
    }

    fn add_macs(&mut self, index: u32, now: Instant, message: &mut [u8]) {
        let (body, macs) = message.split_at_mut(message.len() - MACS);
        let (first, second) = macs.split_at_mut(16);
        let mac1 = mac(&self.mac1_key, &[body]);
        first.copy_from_slice(&mac1);
        self.cookie.take_if(|cookie| now.saturating_duration_since(cookie.since) >= COOKIE_AGE);
        let mac2 = self.cookie.as_ref().map_or([0; 16], |cookie| mac(&cookie.value, &[body, first]));
        second.copy_from_slice(&mac2);
        self.sent = Some((index, mac1));
    }
}

fn hash(label: &[u8], key: &[u8; 32]) -> [u8; 32] {
    Digest::finalize(Blake2s256::new_with_prefix(label).chain_update(key)).into()
}

/// WireGuard's MAC: keyed BLAKE2s with 16 bytes of output.
fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; 16] {
    // Only a key longer than 32 bytes is refused; ours are 16 and 32.
    let Ok(mut mac) = Blake2sMac::<U16>::new_from_slice(key) else { return [0; 16] };
    for part in parts {
        mac.update(part);
    }
    mac.finalize_fixed().into()
}
