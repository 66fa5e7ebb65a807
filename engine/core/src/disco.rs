//! disco: how two nodes find a path. A packet is the magic, the sender's disco key, a nonce and a NaCl box
//! around one message. Only the messages a node without relay support needs are spoken; others parse to
//! [`Message::Other`] and are ignored.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crypto_box::SalsaBox;
use crypto_box::aead::AeadInPlace;

use crate::key::{DiscoPrivate, DiscoPublic, NodePublic};

/// First bytes of every disco packet.
pub const MAGIC: [u8; 6] = [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac];
const KEY_LEN: usize = 32;
const NONCE_LEN: usize = 24;
const TAG_LEN: usize = 16;
const HEADER_LEN: usize = MAGIC.len() + KEY_LEN + NONCE_LEN;
/// The largest disco packet taken, bytes; a padded ping for path MTU probing is the largest one.
pub const MAX_LEN: usize = 9000;
const MAX_ENDPOINTS: usize = 64;
const ENDPOINT_LEN: usize = 18;
const VERSION: u8 = 0;

/// Identifies a ping and its pong.
pub type TxId = [u8; 12];

/// Why a packet is not a message for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DiscoError {
    /// No magic, or too short or long.
    #[error("not a disco packet")]
    NotDisco,
    /// The box does not open: another sender, another receiver, or damage.
    #[error("disco box does not open")]
    Sealed,
    /// The plaintext is too short for its type.
    #[error("malformed disco message")]
    Malformed,
}

/// A disco message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Asks for a pong on the same path.
    Ping {
        /// Chosen by the sender.
        tx: TxId,
        /// Who pings; `None` from very old peers.
        node_key: Option<NodePublic>,
    },
    /// Answers a ping.
    Pong {
        /// From the ping.
        tx: TxId,
        /// Where the ping came from, as its receiver saw it.
        observed: SocketAddr,
    },
    /// Sent through DERP: "ping me at these".
    CallMeMaybe {
        /// The sender's endpoints, at most 64.
        endpoints: Vec<SocketAddr>,
    },
    /// Another type; ignored.
    Other(u8),
}

/// The shared key of one pair of disco keys. Making one costs a Curve25519 operation; keep it per peer.
pub struct SharedKey(SalsaBox);

impl std::fmt::Debug for SharedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SharedKey(redacted)")
    }
}

impl SharedKey {
    /// Between our private key and a peer's public one.
    #[must_use]
    pub fn new(ours: &DiscoPrivate, theirs: &DiscoPublic) -> Self {
        let public = crypto_box::PublicKey::from(*theirs.as_bytes());
        let private = crypto_box::SecretKey::from(*ours.expose());
        Self(SalsaBox::new(&public, &private))
    }

    /// Writes a whole packet from `sender` (our public key) to `out`. `nonce` has to be fresh and random.
    pub fn seal(&self, sender: &DiscoPublic, nonce: [u8; NONCE_LEN], message: &Message, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(sender.as_bytes());
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&[0; TAG_LEN]);
        let body = out.len();
        encode(message, out);
        match self.0.encrypt_in_place_detached(&nonce.into(), b"", &mut out[body..]) {
            Ok(tag) => out[body - TAG_LEN..body].copy_from_slice(&tag),
            Err(_) => out.truncate(start),
        }
    }

    /// Opens a packet whose sender is the peer of this key, in place.
    ///
    /// # Errors
    /// When the box does not open, or holds a message too short for its type.
    pub fn open(&self, packet: &mut [u8]) -> Result<Message, DiscoError> {
        if sender(packet).is_none() {
            return Err(DiscoError::NotDisco);
        }
        let mut nonce = [0; NONCE_LEN];
        nonce.copy_from_slice(&packet[HEADER_LEN - NONCE_LEN..HEADER_LEN]);
        let mut tag = [0; TAG_LEN];
        tag.copy_from_slice(&packet[HEADER_LEN..HEADER_LEN + TAG_LEN]);
        let body = &mut packet[HEADER_LEN + TAG_LEN..];
        self.0
            .decrypt_in_place_detached(&nonce.into(), b"", body, &tag.into())
            .map_err(|_| DiscoError::Sealed)?;
        decode(body)
    }
}

/// The sender's key when a datagram looks like disco; `None` otherwise.
#[must_use]
pub fn sender(datagram: &[u8]) -> Option<DiscoPublic> {
    if datagram.len() < HEADER_LEN + TAG_LEN || datagram.len() > MAX_LEN || !datagram.starts_with(&MAGIC) {
        return None;
    }
    datagram[MAGIC.len()..].first_chunk::<KEY_LEN>().copied().map(DiscoPublic::from_bytes)
}

fn encode(message: &Message, out: &mut Vec<u8>) {
    match message {
        Message::Ping { tx, node_key } => {
            out.extend_from_slice(&[1, VERSION]);
            out.extend_from_slice(tx);
            if let Some(key) = node_key {
                out.extend_from_slice(key.as_bytes());
            }
        }
        Message::Pong { tx, observed } => {
            out.extend_from_slice(&[2, VERSION]);
            out.extend_from_slice(tx);
            encode_endpoint(*observed, out);
        }
        Message::CallMeMaybe { endpoints } => {
            out.extend_from_slice(&[3, VERSION]);
            for endpoint in endpoints.iter().take(MAX_ENDPOINTS) {
                encode_endpoint(*endpoint, out);
            }
        }
        Message::Other(kind) => out.extend_from_slice(&[*kind, VERSION]),
    }
}

fn decode(plain: &[u8]) -> Result<Message, DiscoError> {
    let [kind, _version, body @ ..] = plain else { return Err(DiscoError::Malformed) };
    Ok(match kind {
        1 => {
            let (tx, rest) = body.split_first_chunk::<12>().ok_or(DiscoError::Malformed)?;
            let node_key = rest.first_chunk::<KEY_LEN>().copied().map(NodePublic::from_bytes);
            Message::Ping { tx: *tx, node_key }
        }
        2 => {
            let (tx, rest) = body.split_first_chunk::<12>().ok_or(DiscoError::Malformed)?;
            let observed = rest.first_chunk::<ENDPOINT_LEN>().ok_or(DiscoError::Malformed)?;
            Message::Pong { tx: *tx, observed: decode_endpoint(observed) }
        }
        3 => {
            let (endpoints, _) = body.as_chunks::<ENDPOINT_LEN>();
            Message::CallMeMaybe {
                endpoints: endpoints.iter().take(MAX_ENDPOINTS).map(decode_endpoint).collect(),
            }
        }
        other => Message::Other(*other),
    })
}

fn encode_endpoint(endpoint: SocketAddr, out: &mut Vec<u8>) {
    let ip = match endpoint.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    out.extend_from_slice(&ip.octets());
    out.extend_from_slice(&endpoint.port().to_be_bytes());
}

fn decode_endpoint(bytes: &[u8; ENDPOINT_LEN]) -> SocketAddr {
    let mut ip = [0; 16];
    ip.copy_from_slice(&bytes[..16]);
    SocketAddr::new(Ipv6Addr::from(ip).to_canonical(), u16::from_be_bytes([bytes[16], bytes[17]]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair() -> (DiscoPrivate, DiscoPrivate) {
        (DiscoPrivate::from_bytes([1; 32]), DiscoPrivate::from_bytes([2; 32]))
    }

    fn plain(message: &Message) -> String {
        let mut out = Vec::new();
        encode(message, &mut out);
        hex::encode(out)
    }

    #[test]
    fn plaintexts_are_pinned() {
        let tx = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        assert_eq!(plain(&Message::Ping { tx, node_key: None }), "01000102030405060708090a0b0c");
        assert_eq!(
            plain(&Message::Pong { tx, observed: "2.3.4.5:1234".parse().unwrap() }),
            "02000102030405060708090a0b0c00000000000000000000ffff0203040504d2"
        );
        assert_eq!(
            plain(&Message::CallMeMaybe { endpoints: vec!["[2001::3456]:789".parse().unwrap()] }),
            "0300200100000000000000000000000034560315"
        );
    }

    #[test]
    fn a_sealed_packet_is_pinned() {
        // The box was made by another implementation of NaCl's crypto_box.
        let (a, b) = pair();
        let sender = "a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209";
        let boxed = "16cdad829baef9ec30cf8d18ef20e86c72893fb5d88d16fda49b59914b4e";
        let expected = format!("5453f09f92ac{sender}{}{boxed}", "05".repeat(24));
        let message = Message::Ping { tx: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], node_key: None };
        let mut packet = Vec::new();
        SharedKey::new(&a, &b.public()).seal(&a.public(), [5; 24], &message, &mut packet);
        assert_eq!(hex::encode(&packet), expected);
        assert_eq!(SharedKey::new(&b, &a.public()).open(&mut packet), Ok(message));
    }

    #[test]
    fn sealed_for_one_peer_opens_there_only() {
        let (a, b) = pair();
        let message = Message::Ping { tx: [7; 12], node_key: Some(NodePublic::from_bytes([3; 32])) };
        let mut packet = Vec::new();
        SharedKey::new(&a, &b.public()).seal(&a.public(), [5; 24], &message, &mut packet);
        assert_eq!(sender(&packet), Some(a.public()));
        let stranger = SharedKey::new(&DiscoPrivate::from_bytes([9; 32]), &a.public());
        assert_eq!(stranger.open(&mut packet.clone()), Err(DiscoError::Sealed));
        let mut damaged = packet.clone();
        *damaged.last_mut().unwrap() ^= 1;
        let shared = SharedKey::new(&b, &a.public());
        assert_eq!(shared.open(&mut damaged), Err(DiscoError::Sealed));
        assert_eq!(shared.open(&mut packet), Ok(message));
    }

    #[test]
    fn trailing_bytes_and_unknown_types_are_ignored() {
        let mut padded = vec![1, 0];
        padded.extend_from_slice(&[4; 12 + 32 + 100]);
        let Ok(Message::Ping { tx, node_key }) = decode(&padded) else { panic!("not a ping") };
        assert_eq!((tx, node_key), ([4; 12], Some(NodePublic::from_bytes([4; 32]))));
        assert_eq!(decode(&[9, 0, 1, 2]), Ok(Message::Other(9)));
        assert_eq!(decode(&[2, 0, 1]), Err(DiscoError::Malformed));
    }

    fn any_message() -> impl Strategy<Value = Message> {
        let endpoint = (any::<std::net::IpAddr>(), any::<u16>())
            .prop_map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port));
        prop_oneof![
            (any::<TxId>(), proptest::option::of(any::<[u8; 32]>()))
                .prop_map(|(tx, key)| Message::Ping { tx, node_key: key.map(NodePublic::from_bytes) }),
            (any::<TxId>(), endpoint.clone()).prop_map(|(tx, observed)| Message::Pong { tx, observed }),
            proptest::collection::vec(endpoint, 0..MAX_ENDPOINTS)
                .prop_map(|endpoints| Message::CallMeMaybe { endpoints }),
            (4u8..).prop_map(Message::Other),
        ]
    }

    proptest! {
        #[test]
        fn messages_round_trip(message in any_message(), nonce in any::<[u8; 24]>()) {
            let (a, b) = pair();
            let mut packet = Vec::new();
            SharedKey::new(&a, &b.public()).seal(&a.public(), nonce, &message, &mut packet);
            prop_assert_eq!(SharedKey::new(&b, &a.public()).open(&mut packet), Ok(message));
        }

        #[test]
        fn fuzz_open_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (a, b) = pair();
            for (to, from) in bytes.iter_mut().zip(MAGIC) {
                *to = from;
            }
            prop_assert!(SharedKey::new(&a, &b.public()).open(&mut bytes).is_err());
        }

        #[test]
        fn fuzz_decode_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
            let _ = sender(&bytes);
        }
    }
}
