//! DERP frames: one type byte, a u32 big-endian length, a body. Also both ends of the greeting, and an
//! incremental reader that bounds what a peer can make us hold.

use crypto_box::SalsaBox;
use crypto_box::aead::AeadInPlace;
use serde::{Deserialize, Serialize};

use crate::key::{NodePrivate, NodePublic};

/// Bytes before a frame's body.
pub const HEADER_LEN: usize = 5;
/// Largest relayed packet, bytes.
pub const MAX_PACKET_BYTES: usize = 64 << 10;
/// Largest frame body taken, bytes.
pub const MAX_FRAME_BYTES: usize = 1 << 20;
/// Version in both greetings.
pub const PROTOCOL_VERSION: u32 = 2;
/// First bytes of the server's greeting.
pub const MAGIC: [u8; 8] = *b"DERP\xf0\x9f\x94\x91";
const KEY_LEN: usize = 32;
const NONCE_LEN: usize = 24;
const TAG_LEN: usize = 16;
const KEEP_BYTES: usize = 16 << 10;

/// Why a connection cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DerpError {
    /// A frame over [`MAX_FRAME_BYTES`].
    #[error("DERP frame of {0} bytes is over the limit")]
    TooLarge(usize),
    /// A known type with a body too short for it.
    #[error("malformed DERP frame of type {0:#04x}")]
    Malformed(u8),
    /// The first frame is not a server's greeting.
    #[error("not a DERP server's greeting")]
    Greeting,
    /// A greeting's box does not open, or holds no JSON.
    #[error("DERP greeting does not open")]
    Sealed,
}

/// Why the server says that a peer is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GoneReason {
    /// It was connected and no longer is.
    Disconnected,
    /// It is not connected to this server.
    NotHere,
    /// A reason this build does not know.
    Other(u8),
}

/// One frame; borrowed parts point into the reader's buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// 01, server → client: magic and the server's key.
    ServerKey(NodePublic),
    /// 02, client → server: key, nonce and box.
    ClientInfo(NodePublic, &'a [u8]),
    /// 03, server → client: nonce and box.
    ServerInfo(&'a [u8]),
    /// 04, client → server: destination and packet.
    SendPacket(NodePublic, &'a [u8]),
    /// 05, server → client: source and packet.
    RecvPacket(NodePublic, &'a [u8]),
    /// 06, server → client.
    KeepAlive,
    /// 07, client → server: whether this is the client's home.
    NotePreferred(bool),
    /// 08, server → client.
    PeerGone(NodePublic, GoneReason),
    /// 12, both ways; answered by a pong with the same bytes.
    Ping([u8; 8]),
    /// 13, both ways.
    Pong([u8; 8]),
    /// 14, server → client: a problem, or "" when it is over. Text as it came.
    Health(&'a [u8]),
    /// 15, server → client: reconnect after the first, try for the second; milliseconds.
    Restarting(u32, u32),
    /// Any other type; ignored.
    Other(u8),
}

impl<'a> Frame<'a> {
    /// Reads a frame's body.
    ///
    /// # Errors
    /// [`DerpError::Malformed`] when the body is too short for its type.
    pub fn parse(kind: u8, body: &'a [u8]) -> Result<Self, DerpError> {
        let short = DerpError::Malformed(kind);
        Ok(match kind {
            0x01 => {
                let rest = body.strip_prefix(&MAGIC).ok_or(DerpError::Greeting)?;
                Self::ServerKey(split_key(rest).ok_or(short)?.0)
            }
            0x02 => {
                let (key, rest) = split_key(body).ok_or(short)?;
                Self::ClientInfo(key, rest)
            }
            0x03 => Self::ServerInfo(body),
            0x04 => {
                let (key, packet) = split_key(body).ok_or(short)?;
                Self::SendPacket(key, packet)
            }
            0x05 => {
                let (key, packet) = split_key(body).ok_or(short)?;
                Self::RecvPacket(key, packet)
            }
            0x06 => Self::KeepAlive,
            0x07 => Self::NotePreferred(*body.first().ok_or(short)? != 0),
            0x08 => {
                let (key, rest) = split_key(body).ok_or(short)?;
                Self::PeerGone(
                    key,
                    match rest.first() {
                        None | Some(0) => GoneReason::Disconnected,
                        Some(1) => GoneReason::NotHere,
                        Some(other) => GoneReason::Other(*other),
                    },
                )
            }
            0x12 => Self::Ping(*body.first_chunk().ok_or(short)?),
            0x13 => Self::Pong(*body.first_chunk().ok_or(short)?),
            0x14 => Self::Health(body),
            0x15 => {
                let (reconnect, rest) = body.split_first_chunk::<4>().ok_or(short)?;
                let tries = rest.first_chunk::<4>().ok_or(short)?;
                Self::Restarting(u32::from_be_bytes(*reconnect), u32::from_be_bytes(*tries))
            }
            other => Self::Other(other),
        })
    }

    /// Appends the whole frame, header included. [`Frame::Other`] is written with an empty body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[self.kind(), 0, 0, 0, 0]);
        match self {
            Self::ServerKey(key) => {
                out.extend_from_slice(&MAGIC);
                out.extend_from_slice(key.as_bytes());
            }
            Self::ClientInfo(key, rest) | Self::SendPacket(key, rest) | Self::RecvPacket(key, rest) => {
                out.extend_from_slice(key.as_bytes());
                out.extend_from_slice(rest);
            }
            Self::ServerInfo(body) | Self::Health(body) => out.extend_from_slice(body),
            Self::KeepAlive | Self::Other(_) => {}
            Self::NotePreferred(home) => out.push(u8::from(*home)),
            Self::PeerGone(key, reason) => {
                out.extend_from_slice(key.as_bytes());
                out.push(match reason {
                    GoneReason::Disconnected => 0,
                    GoneReason::NotHere => 1,
                    GoneReason::Other(other) => *other,
                });
            }
            Self::Ping(data) | Self::Pong(data) => out.extend_from_slice(data),
            Self::Restarting(reconnect, tries) => {
                out.extend_from_slice(&reconnect.to_be_bytes());
                out.extend_from_slice(&tries.to_be_bytes());
            }
        }
        let len = u32::try_from(out.len() - start - HEADER_LEN).unwrap_or(u32::MAX);
        out[start + 1..start + HEADER_LEN].copy_from_slice(&len.to_be_bytes());
    }

    fn kind(&self) -> u8 {
        match self {
            Self::ServerKey(_) => 0x01,
            Self::ClientInfo(..) => 0x02,
            Self::ServerInfo(_) => 0x03,
            Self::SendPacket(..) => 0x04,
            Self::RecvPacket(..) => 0x05,
            Self::KeepAlive => 0x06,
            Self::NotePreferred(_) => 0x07,
            Self::PeerGone(..) => 0x08,
            Self::Ping(_) => 0x12,
            Self::Pong(_) => 0x13,
            Self::Health(_) => 0x14,
            Self::Restarting(..) => 0x15,
            Self::Other(kind) => *kind,
        }
    }
}

fn split_key(body: &[u8]) -> Option<(NodePublic, &[u8])> {
    let (key, rest) = body.split_first_chunk::<KEY_LEN>()?;
    Some((NodePublic::from_bytes(*key), rest))
}

/// Incremental reader: `push` what arrived, then take frames with `next_frame` until there is none.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: Vec<u8>,
    start: usize,
    /// Bytes of a frame over the limit that are still to be passed over.
    skip: usize,
}

impl FrameReader {
    /// An empty reader.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.buffer.shrink_to(KEEP_BYTES);
            self.start = 0;
        } else if self.start >= KEEP_BYTES {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
        self.pass_over();
    }

    fn pass_over(&mut self) {
        let passed = self.skip.min(self.buffer.len() - self.start);
        self.start += passed;
        self.skip -= passed;
    }

    /// The next whole frame, if it has arrived.
    ///
    /// # Errors
    /// When a frame is over the limit or malformed. The reader then stands behind it and can go on.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, DerpError> {
        let rest = &self.buffer[self.start..];
        let Some((header, body)) = rest.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let [kind, len @ ..] = *header;
        let len = usize::try_from(u32::from_be_bytes(len)).unwrap_or(usize::MAX);
        if len > MAX_FRAME_BYTES {
            self.start += HEADER_LEN;
            self.skip = len;
            self.pass_over();
            return Err(DerpError::TooLarge(len));
        }
        if body.len() < len {
            return Ok(None);
        }
        let from = self.start + HEADER_LEN;
        self.start = from + len;
        Frame::parse(kind, &self.buffer[from..self.start]).map(Some)
    }
}

/// What a client says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClientInfo {
    /// [`PROTOCOL_VERSION`].
    pub version: u32,
    /// Answers pings.
    #[serde(rename = "canAckPings", alias = "CanAckPings")]
    pub can_ack_pings: bool,
}

/// What a server says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServerInfo {
    /// [`PROTOCOL_VERSION`].
    pub version: u32,
    /// Rate limit, 0 for none.
    #[serde(rename = "TokenBucketBytesPerSecond", skip_serializing_if = "is_zero")]
    pub bytes_per_second: u64,
    /// Burst, bytes.
    #[serde(rename = "TokenBucketBytesBurst", skip_serializing_if = "is_zero")]
    pub burst_bytes: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// Appends the client's greeting: the answer to [`Frame::ServerKey`].
///
/// # Errors
/// [`DerpError::Sealed`] when the box cannot be made; it always can.
pub fn client_greeting(
    ours: &NodePrivate,
    server: &NodePublic,
    nonce: [u8; NONCE_LEN],
    out: &mut Vec<u8>,
) -> Result<(), DerpError> {
    let info = ClientInfo { version: PROTOCOL_VERSION, can_ack_pings: true };
    let boxed = seal_json(ours, server, nonce, &info)?;
    Frame::ClientInfo(ours.public(), &boxed).encode(out);
    Ok(())
}

/// Opens the body of a client's greeting, on the server.
///
/// # Errors
/// [`DerpError::Sealed`] when the client does not hold the key it names.
pub fn open_client_info(
    server: &NodePrivate,
    client: &NodePublic,
    body: &[u8],
) -> Result<ClientInfo, DerpError> {
    open_json(server, client, body)
}

/// Appends the server's answer to the client's greeting.
///
/// # Errors
/// [`DerpError::Sealed`] when the box cannot be made; it always can.
pub fn server_info(
    server: &NodePrivate,
    client: &NodePublic,
    nonce: [u8; NONCE_LEN],
    info: &ServerInfo,
    out: &mut Vec<u8>,
) -> Result<(), DerpError> {
    let boxed = seal_json(server, client, nonce, info)?;
    Frame::ServerInfo(&boxed).encode(out);
    Ok(())
}

/// Opens the body of [`Frame::ServerInfo`], on the client.
///
/// # Errors
/// [`DerpError::Sealed`] when the server does not hold the key it greeted with.
pub fn open_server_info(
    ours: &NodePrivate,
    server: &NodePublic,
    body: &[u8],
) -> Result<ServerInfo, DerpError> {
    open_json(ours, server, body)
}

fn nacl_box(ours: &NodePrivate, theirs: &NodePublic) -> SalsaBox {
    SalsaBox::new(
        &crypto_box::PublicKey::from(*theirs.as_bytes()),
        &crypto_box::SecretKey::from(*ours.expose()),
    )
}

fn seal_json(
    ours: &NodePrivate,
    theirs: &NodePublic,
    nonce: [u8; NONCE_LEN],
    value: &impl Serialize,
) -> Result<Vec<u8>, DerpError> {
    let mut json = serde_json::to_vec(value).map_err(|_| DerpError::Sealed)?;
    let tag = nacl_box(ours, theirs)
        .encrypt_in_place_detached(&nonce.into(), b"", &mut json)
        .map_err(|_| DerpError::Sealed)?;
    Ok([nonce.as_slice(), &tag, &json].concat())
}

fn open_json<T: for<'de> Deserialize<'de>>(
    ours: &NodePrivate,
    theirs: &NodePublic,
    body: &[u8],
) -> Result<T, DerpError> {
    let (nonce, rest) = body.split_first_chunk::<NONCE_LEN>().ok_or(DerpError::Sealed)?;
    let (tag, sealed) = rest.split_first_chunk::<TAG_LEN>().ok_or(DerpError::Sealed)?;
    let mut json = sealed.to_vec();
    nacl_box(ours, theirs)
        .decrypt_in_place_detached(&(*nonce).into(), b"", &mut json, &(*tag).into())
        .map_err(|_| DerpError::Sealed)?;
    serde_json::from_slice(&json).map_err(|_| DerpError::Sealed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wire(frame: &Frame<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        frame.encode(&mut out);
        out
    }

    #[test]
    fn frames_are_pinned() {
        let key = NodePublic::from_bytes([0xaa; 32]);
        let aa = "aa".repeat(32);
        for (frame, expected) in [
            (Frame::ServerKey(key), format!("010000002844455250f09f9491{aa}")),
            (Frame::SendPacket(key, b"hi"), format!("0400000022{aa}6869")),
            (Frame::RecvPacket(key, b"hi"), format!("0500000022{aa}6869")),
            (Frame::KeepAlive, "0600000000".into()),
            (Frame::NotePreferred(true), "070000000101".into()),
            (Frame::PeerGone(key, GoneReason::NotHere), format!("0800000021{aa}01")),
            (Frame::Ping([1; 8]), "12000000080101010101010101".into()),
            (Frame::Pong([2; 8]), "13000000080202020202020202".into()),
            (Frame::Restarting(1, 258), "15000000080000000100000102".into()),
        ] {
            let bytes = wire(&frame);
            assert_eq!(hex::encode(&bytes), expected);
            let mut reader = FrameReader::new();
            reader.push(&bytes);
            assert_eq!(reader.next_frame(), Ok(Some(frame)));
        }
    }

    #[test]
    fn greetings_open_for_the_named_pair_only() {
        let client = NodePrivate::from_bytes([1; 32]);
        let server = NodePrivate::from_bytes([2; 32]);
        let mut out = Vec::new();
        client_greeting(&client, &server.public(), [3; 24], &mut out).unwrap();
        let Ok(Frame::ClientInfo(key, body)) = Frame::parse(out[0], &out[HEADER_LEN..]) else {
            panic!("type")
        };
        assert_eq!(key, client.public());
        let info = open_client_info(&server, &key, body).unwrap();
        assert_eq!(info, ClientInfo { version: 2, can_ack_pings: true });
        let other = NodePrivate::from_bytes([4; 32]);
        assert_eq!(open_client_info(&other, &key, body), Err(DerpError::Sealed));

        let mut out = Vec::new();
        server_info(&server, &key, [5; 24], &ServerInfo { version: 2, ..Default::default() }, &mut out)
            .unwrap();
        let opened = open_server_info(&client, &server.public(), &out[HEADER_LEN..]).unwrap();
        assert_eq!(opened.version, 2);
    }

    #[test]
    fn a_box_of_another_implementation_opens() {
        let (a, b) = (NodePrivate::from_bytes([1; 32]), NodePrivate::from_bytes([2; 32]));
        let boxed = "7ed8a8fbb2ef5cbc88b59acdd6a0a9fd08ab48d2a9fa7a94cdb16aa96c600be10c17530fa95b43b0d9dc0c5babaf4033";
        let body = hex::decode(format!("{}{boxed}", "05".repeat(24))).unwrap();
        let info = open_client_info(&b, &a.public(), &body).unwrap();
        assert_eq!(info, ClientInfo { version: 2, can_ack_pings: true });
    }

    #[test]
    fn stock_spelling_of_the_client_info_is_read() {
        let info: ClientInfo =
            serde_json::from_str(r#"{"version":2,"CanAckPings":true,"IsProber":false}"#).unwrap();
        assert!(info.can_ack_pings);
    }

    #[test]
    fn oversized_and_short_frames_are_errors() {
        let mut reader = FrameReader::new();
        reader.push(&[4, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(reader.next_frame(), Err(DerpError::TooLarge(0xffff_ffff)));
        let mut reader = FrameReader::new();
        reader.push(&[5, 0, 0, 0, 1, 9]);
        assert_eq!(reader.next_frame(), Err(DerpError::Malformed(5)));
        let mut reader = FrameReader::new();
        reader.push(&[0x77, 0, 0, 0, 1, 9]);
        assert_eq!(reader.next_frame(), Ok(Some(Frame::Other(0x77))));
        assert_eq!(reader.next_frame(), Ok(None));
    }

    fn any_frame() -> impl Strategy<Value = (u8, Vec<u8>)> {
        let kind = prop_oneof![1u8..=8, 0x0au8..=0x15, any::<u8>()];
        (kind, proptest::collection::vec(any::<u8>(), 0..90))
    }

    #[test]
    fn a_frame_over_the_limit_is_passed_over_and_never_held() {
        let len = MAX_FRAME_BYTES + 1;
        let mut wire = vec![0x05];
        wire.extend_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
        wire.resize(HEADER_LEN + len, 0xee);
        // Too short for its type.
        wire.extend_from_slice(&[0x08, 0, 0, 0, 1, 0]);
        Frame::Ping([7; 8]).encode(&mut wire);
        for cut in [1000, 4096, wire.len()] {
            let mut reader = FrameReader::new();
            let mut got = Vec::new();
            for part in wire.chunks(cut) {
                reader.push(part);
                loop {
                    match reader.next_frame() {
                        Ok(Some(frame)) => got.push(format!("{frame:?}")),
                        Ok(None) => break,
                        Err(error) => got.push(error.to_string()),
                    }
                }
                assert!(reader.buffer.len() <= cut.max(HEADER_LEN + cut), "{}", reader.buffer.len());
            }
            let expected = [
                DerpError::TooLarge(len).to_string(),
                DerpError::Malformed(8).to_string(),
                "Ping([7, 7, 7, 7, 7, 7, 7, 7])".into(),
            ];
            assert_eq!(got, expected, "in pieces of {cut}");
        }
    }

    proptest! {
        #[test]
        fn frames_survive_any_fragmentation(frames in proptest::collection::vec(any_frame(), 0..6), step in 1usize..200) {
            let mut stream = Vec::new();
            let mut expected = Vec::new();
            for (kind, body) in &frames {
                if let Ok(frame) = Frame::parse(*kind, body) {
                    let written = wire(&frame);
                    expected.push(written.clone());
                    stream.extend(written);
                }
            }
            let (mut reader, mut seen) = (FrameReader::new(), Vec::new());
            for piece in stream.chunks(step) {
                reader.push(piece);
                while let Some(frame) = reader.next_frame().unwrap() {
                    seen.push(wire(&frame));
                }
            }
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn fuzz_greetings_never_panic(body in proptest::collection::vec(any::<u8>(), 0..100)) {
            let (a, b) = (NodePrivate::from_bytes([1; 32]), NodePrivate::from_bytes([2; 32]));
            prop_assert!(open_client_info(&b, &a.public(), &body).is_err());
            prop_assert!(open_server_info(&a, &b.public(), &body).is_err());
        }

        #[test]
        fn fuzz_reader_never_panics(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 0..8)) {
            let mut reader = FrameReader::new();
            for part in &parts {
                reader.push(part);
                while let Ok(Some(_)) = reader.next_frame() {}
            }
        }
    }
}
