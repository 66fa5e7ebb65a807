//! The control connection's Noise session, without I/O: handshake, records, and the server's early words.
//!
//! A client sends its initiation inside an HTTP upgrade request, and everything after the server's
//! `101` is frames: one handshake response or error, then records in both directions. [`FrameReader`]
//! cuts the byte stream into frames, [`Transport`] seals and opens records, and [`EarlyPayload`] takes
//! the server's JSON off the front of the decrypted stream, leaving HTTP/2.
//!
//! Any record that does not open ends the session: there is no way to resynchronise.

use snow::{Builder, HandshakeState, StatelessTransportState};

use crate::key::{MachinePrivate, MachinePublic};
use crate::tailcfg::EarlyNoise;

const PATTERN: &str = "Noise_IK_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &str = "Tailscale Control Protocol v";

const TYPE_INITIATION: u8 = 1;
const TYPE_RESPONSE: u8 = 2;
const TYPE_ERROR: u8 = 3;
const TYPE_RECORD: u8 = 4;

const TAG_LEN: usize = 16;
const HEADER_LEN: usize = 3;

/// Length of a client's first message.
pub const INITIATION_LEN: usize = 101;
/// Length of a server's answer to it.
pub const RESPONSE_LEN: usize = 51;
/// Longest frame with its header.
pub const MAX_FRAME_LEN: usize = 4096;
/// Most plaintext in one record.
pub const MAX_PLAINTEXT_LEN: usize = MAX_FRAME_LEN - HEADER_LEN - TAG_LEN;
/// Longest early payload that is accepted; today's is about a hundred bytes.
pub const MAX_EARLY_PAYLOAD_LEN: usize = 1 << 20;
/// Longest part of a server's error text that is kept.
const MAX_ERROR_TEXT: usize = 512;

/// Why a Noise session cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoiseError {
    /// A frame of the wrong type or length.
    #[error("malformed control frame: {0}")]
    Malformed(&'static str),
    /// The server refused, in its words, which nothing authenticates.
    #[error("the control server refused the session: {0}")]
    Refused(String),
    /// Authentication failed.
    #[error("control session cryptography failed")]
    Crypto,
    /// The session failed before, or its counters are used up.
    #[error("the control session is over")]
    Closed,
    /// The early payload is too long or not JSON.
    #[error("malformed early payload")]
    EarlyPayload,
}

impl From<snow::Error> for NoiseError {
    fn from(_: snow::Error) -> Self {
        Self::Crypto
    }
}

fn builder<'a>(prologue: &'a [u8], private: &'a MachinePrivate) -> Result<Builder<'a>, NoiseError> {
    let params = PATTERN.parse().map_err(|_| NoiseError::Crypto)?;
    Ok(Builder::new(params).prologue(prologue)?.local_private_key(private.expose())?)
}

fn prologue(version: u16) -> String {
    format!("{PROLOGUE}{version}")
}

/// A client that has sent its initiation.
pub struct ClientHandshake {
    state: HandshakeState,
}

impl ClientHandshake {
    /// Begins a session with the server that owns `server`, claiming capability version `version`.
    ///
    /// # Errors
    /// When the keys are unusable or the system has no random bytes.
    pub fn start(
        machine: &MachinePrivate,
        server: &MachinePublic,
        version: u16,
    ) -> Result<(Self, [u8; INITIATION_LEN]), NoiseError> {
        let prologue = prologue(version);
        let mut state =
            builder(prologue.as_bytes(), machine)?.remote_public_key(server.as_bytes())?.build_initiator()?;
        let mut frame = [0; INITIATION_LEN];
        frame[..2].copy_from_slice(&version.to_be_bytes());
        frame[2] = TYPE_INITIATION;
        frame[3..5].copy_from_slice(&96u16.to_be_bytes());
        let written = state.write_message(&[], &mut frame[5..])?;
        debug_assert_eq!(written, INITIATION_LEN - 5, "the pattern fixes the length");
        Ok((Self { state }, frame))
    }

    /// Ends the handshake with the server's first frame.
    ///
    /// # Errors
    /// When the frame is an error or not this server's answer.
    pub fn finish(mut self, frame: &[u8]) -> Result<Transport, NoiseError> {
        match parse_frame(frame)? {
            (TYPE_RESPONSE, body) if frame.len() == RESPONSE_LEN => {
                self.state.read_message(body, &mut [])?;
                Transport::new(self.state)
            }
            (TYPE_RESPONSE, _) => Err(NoiseError::Malformed("handshake response length")),
            (TYPE_ERROR, text) => Err(refused(text)),
            _ => Err(NoiseError::Malformed("no handshake response")),
        }
    }
}

/// A server that has read an initiation.
pub struct ServerHandshake {
    state: HandshakeState,
    client: MachinePublic,
    version: u16,
}

impl ServerHandshake {
    /// Reads a client's initiation.
    ///
    /// # Errors
    /// When it is malformed or meant for another server.
    pub fn read(server: &MachinePrivate, initiation: &[u8]) -> Result<Self, NoiseError> {
        let [v1, v2, TYPE_INITIATION, 0, 96, body @ ..] = initiation else {
            return Err(NoiseError::Malformed("no handshake initiation"));
        };
        if initiation.len() != INITIATION_LEN {
            return Err(NoiseError::Malformed("handshake initiation length"));
        }
        let version = u16::from_be_bytes([*v1, *v2]);
        let prologue = prologue(version);
        let mut state = builder(prologue.as_bytes(), server)?.build_responder()?;
        state.read_message(body, &mut [])?;
        let client = state.get_remote_static().and_then(|key| key.try_into().ok());
        let client = MachinePublic::from_bytes(client.ok_or(NoiseError::Crypto)?);
        Ok(Self { state, client, version })
    }

    /// Who connects; proved once the first record opens.
    #[must_use]
    pub fn client(&self) -> MachinePublic {
        self.client
    }

    /// The capability version the client claims.
    #[must_use]
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Accepts: the frame to send, and the session.
    ///
    /// # Errors
    /// When the system has no random bytes.
    pub fn respond(mut self) -> Result<(Transport, [u8; RESPONSE_LEN]), NoiseError> {
        let mut frame = [0; RESPONSE_LEN];
        frame[0] = TYPE_RESPONSE;
        frame[1..3].copy_from_slice(&48u16.to_be_bytes());
        self.state.write_message(&[], &mut frame[HEADER_LEN..])?;
        Ok((Transport::new(self.state)?, frame))
    }
}

/// The frame with which a server refuses a handshake.
#[must_use]
pub fn error_frame(text: &str) -> Vec<u8> {
    let text = &text.as_bytes()[..text.len().min(MAX_FRAME_LEN - HEADER_LEN)];
    let mut frame = vec![TYPE_ERROR];
    frame.extend(u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
    frame.extend(text);
    frame
}

fn refused(text: &[u8]) -> NoiseError {
    let text = String::from_utf8_lossy(&text[..text.len().min(MAX_ERROR_TEXT)]);
    NoiseError::Refused(text.chars().filter(|c| !c.is_control()).collect())
}

/// Type and body of one whole frame.
fn parse_frame(frame: &[u8]) -> Result<(u8, &[u8]), NoiseError> {
    let [kind, l1, l2, body @ ..] = frame else {
        return Err(NoiseError::Malformed("short frame"));
    };
    if usize::from(u16::from_be_bytes([*l1, *l2])) != body.len() || frame.len() > MAX_FRAME_LEN {
        return Err(NoiseError::Malformed("frame length"));
    }
    Ok((*kind, body))
}

/// An established session: one counter and one key for each direction.
pub struct Transport {
    state: StatelessTransportState,
    sent: u64,
    received: u64,
    failed: bool,
}

impl Transport {
    fn new(state: HandshakeState) -> Result<Self, NoiseError> {
        Ok(Self { state: state.into_stateless_transport_mode()?, sent: 0, received: 0, failed: false })
    }

    /// Appends `plaintext` to `out` as one record; an empty one is legal.
    ///
    /// # Errors
    /// When it is longer than [`MAX_PLAINTEXT_LEN`] or the session is over.
    pub fn seal(&mut self, plaintext: &[u8], out: &mut Vec<u8>) -> Result<(), NoiseError> {
        if plaintext.len() > MAX_PLAINTEXT_LEN {
            return Err(NoiseError::Malformed("record too long"));
        }
        let nonce = nonce(self.sent, self.failed)?;
        let body_len = plaintext.len() + TAG_LEN;
        let length = u16::try_from(body_len).map_err(|_| NoiseError::Malformed("record too long"))?;
        let start = out.len();
        out.push(TYPE_RECORD);
        out.extend(length.to_be_bytes());
        let body = out.len();
        out.resize(body + body_len, 0);
        if let Err(error) = self.state.write_message(nonce, plaintext, &mut out[body..]) {
            out.truncate(start);
            self.failed = true;
            return Err(error.into());
        }
        self.sent += 1;
        Ok(())
    }

    /// Appends `plaintext` of any length to `out`, as many records as it takes.
    ///
    /// # Errors
    /// When the session is over.
    pub fn seal_all(&mut self, plaintext: &[u8], out: &mut Vec<u8>) -> Result<(), NoiseError> {
        plaintext.chunks(MAX_PLAINTEXT_LEN).try_for_each(|chunk| self.seal(chunk, out))
    }

    /// Opens one whole record frame and appends its plaintext to `out`.
    ///
    /// # Errors
    /// When the frame is anything else; the session is over then.
    pub fn open(&mut self, frame: &[u8], out: &mut Vec<u8>) -> Result<(), NoiseError> {
        let start = out.len();
        let result = self.open_into(frame, out);
        if result.is_err() {
            out.truncate(start);
            self.failed = true;
        }
        result
    }

    fn open_into(&mut self, frame: &[u8], out: &mut Vec<u8>) -> Result<(), NoiseError> {
        let nonce = nonce(self.received, self.failed)?;
        let body = match parse_frame(frame)? {
            (TYPE_RECORD, body) if body.len() >= TAG_LEN => body,
            (TYPE_RECORD, _) => return Err(NoiseError::Malformed("short record")),
            (TYPE_ERROR, text) => return Err(refused(text)),
            _ => return Err(NoiseError::Malformed("not a record")),
        };
        let start = out.len();
        out.resize(start + body.len() - TAG_LEN, 0);
        self.state.read_message(nonce, body, &mut out[start..])?;
        self.received += 1;
        Ok(())
    }
}

/// Records count big-endian where the Noise library counts little-endian, hence the swap. The last
/// value is never used.
fn nonce(counter: u64, failed: bool) -> Result<u64, NoiseError> {
    if failed || counter == u64::MAX { Err(NoiseError::Closed) } else { Ok(counter.swap_bytes()) }
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport")
            .field("sent", &self.sent)
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}

/// Cuts a byte stream into frames. It holds what it was fed and not yet asked for, so it is bounded by
/// a caller that drains it between feeds: less than one frame then remains.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: Vec<u8>,
    start: usize,
}

/// The reader of an established session's records; they are cut like all frames.
pub type RecordReader = FrameReader;

impl FrameReader {
    /// A reader of an empty stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes from the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame with its header, or none until more is fed.
    ///
    /// # Errors
    /// When the stream holds no frame; nothing after it can be trusted.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, NoiseError> {
        let Some([kind, l1, l2]) = self.buffer[self.start..].first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        if !matches!(*kind, TYPE_RESPONSE..=TYPE_RECORD) {
            return Err(NoiseError::Malformed("frame type"));
        }
        let len = HEADER_LEN + usize::from(u16::from_be_bytes([*l1, *l2]));
        if len > MAX_FRAME_LEN {
            return Err(NoiseError::Malformed("frame length"));
        }
        if self.buffer.len() - self.start < len {
            return Ok(None);
        }
        let frame = self.start..self.start + len;
        self.start = frame.end;
        Ok(Some(&self.buffer[frame]))
    }

    /// True when the stream ended between frames.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.buffer.len()
    }
}

const EARLY_MAGIC: [u8; 5] = *b"\xff\xff\xffTS";
const EARLY_HEADER_LEN: usize = 9;

/// Takes the optional early payload off the front of the decrypted stream. It may straddle records,
/// and without its magic the bytes already belong to HTTP/2.
#[derive(Debug, Default)]
pub struct EarlyPayload {
    buffer: Vec<u8>,
}

/// What was at the front of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EarlyDone {
    /// The server's early words, if it sent any.
    pub early: Option<EarlyNoise>,
    /// The first bytes of HTTP/2.
    pub rest: Vec<u8>,
}

impl EarlyPayload {
    /// A parser at the front of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds decrypted bytes. Once it answers, it is done.
    ///
    /// # Errors
    /// When the payload is too long or not JSON.
    pub fn feed(&mut self, plaintext: &[u8]) -> Result<Option<EarlyDone>, NoiseError> {
        self.buffer.extend_from_slice(plaintext);
        let seen = self.buffer.len().min(EARLY_MAGIC.len());
        if self.buffer[..seen] != EARLY_MAGIC[..seen] {
            return Ok(Some(EarlyDone { early: None, rest: std::mem::take(&mut self.buffer) }));
        }
        let Some(header) = self.buffer.first_chunk::<EARLY_HEADER_LEN>() else {
            return Ok(None);
        };
        let [.., l1, l2, l3, l4] = *header;
        let end = usize::try_from(u32::from_be_bytes([l1, l2, l3, l4]))
            .ok()
            .filter(|len| *len <= MAX_EARLY_PAYLOAD_LEN)
            .map(|len| EARLY_HEADER_LEN + len)
            .ok_or(NoiseError::EarlyPayload)?;
        if self.buffer.len() < end {
            return Ok(None);
        }
        let rest = self.buffer.split_off(end);
        let early =
            serde_json::from_slice(&self.buffer[EARLY_HEADER_LEN..]).map_err(|_| NoiseError::EarlyPayload)?;
        self.buffer.clear();
        Ok(Some(EarlyDone { early: Some(early), rest }))
    }

    /// The bytes a server sends ahead of HTTP/2.
    #[must_use]
    pub fn encode(early: &EarlyNoise) -> Vec<u8> {
        let json = serde_json::to_vec(early).unwrap_or_default();
        let mut bytes = EARLY_MAGIC.to_vec();
        bytes.extend(u32::try_from(json.len()).unwrap_or(0).to_be_bytes());
        bytes.extend(json);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::ChallengePublic;
    use proptest::prelude::*;

    fn pair() -> (Transport, Transport) {
        let (client, server) = (MachinePrivate::generate().unwrap(), MachinePrivate::generate().unwrap());
        let (handshake, initiation) = ClientHandshake::start(&client, &server.public(), 115).unwrap();
        assert_eq!(initiation[..5], [0, 115, 1, 0, 96]);
        let accepted = ServerHandshake::read(&server, &initiation).unwrap();
        assert_eq!((accepted.client(), accepted.version()), (client.public(), 115));
        let (server, response) = accepted.respond().unwrap();
        assert_eq!(response[..3], [2, 0, 48]);
        (handshake.finish(&response).unwrap(), server)
    }

    #[test]
    fn both_directions_carry_records_of_every_length() {
        fn carry(from: &mut Transport, to: &mut Transport, len: usize) {
            let (mut wire, mut plain) = (Vec::new(), Vec::new());
            from.seal(&vec![7; len], &mut wire).unwrap();
            assert_eq!(wire.len(), len + 19);
            to.open(&wire, &mut plain).unwrap();
            assert_eq!(plain, vec![7; len]);
        }
        let (mut client, mut server) = pair();
        for len in [0, 1, 1000, MAX_PLAINTEXT_LEN] {
            carry(&mut client, &mut server, len);
            carry(&mut server, &mut client, len / 2);
        }
        assert!(client.seal(&[0; MAX_PLAINTEXT_LEN + 1], &mut Vec::new()).is_err());
    }

    #[test]
    fn the_counter_is_big_endian_and_ends() {
        let (mut client, mut server) = pair();
        // 2^56 in big-endian is 1 in little-endian: a session that counted the other way would collide.
        client.sent = 1 << 56;
        server.received = 1 << 56;
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        client.seal(b"x", &mut wire).unwrap();
        let raw = client.state.write_message(1, b"x", &mut [0; 17]).unwrap();
        assert_eq!(raw, 17);
        let mut expected = [0; 17];
        client.state.write_message(1, b"x", &mut expected).unwrap();
        assert_eq!(wire[3..], expected);
        server.open(&wire, &mut plain).unwrap();
        client.sent = u64::MAX;
        assert_eq!(client.seal(b"x", &mut wire), Err(NoiseError::Closed));
    }

    #[test]
    fn a_bad_record_ends_the_session() {
        for break_it in [
            (|wire: &mut Vec<u8>| wire[10] ^= 1) as fn(&mut Vec<u8>),
            |wire| wire[0] = 2,
            |wire| wire.truncate(10),
            |wire| *wire = vec![4, 0, 3, 1, 2, 3],
            |wire| *wire = error_frame("go away"),
        ] {
            let (mut client, mut server) = pair();
            let (mut good, mut bad, mut plain) = (Vec::new(), Vec::new(), Vec::new());
            client.seal(b"hello", &mut good).unwrap();
            bad.clone_from(&good);
            break_it(&mut bad);
            assert!(server.open(&bad, &mut plain).is_err());
            assert!(plain.is_empty());
            assert_eq!(server.open(&good, &mut plain), Err(NoiseError::Closed));
        }
    }

    #[test]
    fn records_do_not_open_twice_or_out_of_order() {
        let (mut client, mut server) = pair();
        let (mut first, mut second) = (Vec::new(), Vec::new());
        client.seal(b"1", &mut first).unwrap();
        client.seal(b"2", &mut second).unwrap();
        assert!(server.open(&second, &mut Vec::new()).is_err());
        let (mut client, mut server) = pair();
        first.clear();
        client.seal(b"1", &mut first).unwrap();
        server.open(&first, &mut Vec::new()).unwrap();
        assert!(server.open(&first, &mut Vec::new()).is_err());
    }

    #[test]
    fn a_refused_handshake_says_why() {
        let server = MachinePrivate::generate().unwrap();
        let start =
            || ClientHandshake::start(&MachinePrivate::generate().unwrap(), &server.public(), 115).unwrap().0;
        assert_eq!(
            start().finish(&error_frame("bad\nversion")).err(),
            Some(NoiseError::Refused("badversion".into()))
        );
        for bad in [&[][..], &[2, 0, 1, 0], &[4, 0, 0], &[2, 0, 48], &[3, 0]] {
            assert!(matches!(start().finish(bad).err(), Some(NoiseError::Malformed(_))), "{bad:?}");
        }
        let mut response = [0; RESPONSE_LEN];
        response[..3].copy_from_slice(&[2, 0, 48]);
        assert_eq!(start().finish(&response).err(), Some(NoiseError::Crypto));
    }

    #[test]
    fn a_handshake_for_another_server_or_version_fails() {
        let (ours, other) = (MachinePrivate::generate().unwrap(), MachinePrivate::generate().unwrap());
        let (_, mut initiation) = ClientHandshake::start(&ours, &other.public(), 115).unwrap();
        assert!(ServerHandshake::read(&ours, &initiation).is_err());
        assert!(ServerHandshake::read(&other, &initiation).is_ok());
        initiation[1] = 116;
        assert!(ServerHandshake::read(&other, &initiation).is_err());
    }

    #[test]
    fn the_reader_cuts_frames_however_they_arrive() {
        let (mut client, _) = pair();
        let mut wire = Vec::new();
        let mut expected = Vec::new();
        for len in [5usize, 0, 300] {
            let start = wire.len();
            client.seal(&vec![1; len], &mut wire).unwrap();
            expected.push(wire[start..].to_vec());
        }
        for step in [1, 2, 7, wire.len()] {
            let (mut reader, mut frames) = (FrameReader::new(), Vec::new());
            for piece in wire.chunks(step) {
                reader.feed(piece);
                while let Some(frame) = reader.next_frame().unwrap() {
                    frames.push(frame.to_vec());
                }
            }
            assert_eq!(frames, expected);
            assert!(reader.is_empty());
        }
        for bad in [[1, 0, 0], [5, 0, 0], [4, 0x0f, 0xfe]] {
            let mut reader = FrameReader::new();
            reader.feed(&bad);
            assert!(reader.next_frame().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn early_words_may_straddle_or_be_absent() {
        let early = EarlyNoise { node_key_challenge: ChallengePublic::from_bytes([3; 32]) };
        let mut stream = EarlyPayload::encode(&early);
        stream.extend(b"\0\0\x12\x04");
        for step in [1, 8, 9, 10, stream.len()] {
            let (mut parser, mut done) = (EarlyPayload::new(), None);
            let mut rest = Vec::new();
            for piece in stream.chunks(step) {
                if done.is_some() {
                    rest.extend_from_slice(piece);
                } else if let Some(d) = parser.feed(piece).unwrap() {
                    rest.extend_from_slice(&d.rest);
                    done = Some(d.early);
                }
            }
            assert_eq!(done, Some(Some(early.clone())));
            assert_eq!(rest, b"\0\0\x12\x04");
        }
        let absent = EarlyPayload::new().feed(b"\0\0").unwrap().unwrap();
        assert_eq!(absent, EarlyDone { early: None, rest: b"\0\0".to_vec() });
        let half = EarlyPayload::new().feed(b"\xff\xff\xffT").unwrap();
        assert_eq!(half, None);
        let absent = EarlyPayload::new().feed(b"\xff\xffX").unwrap().unwrap();
        assert_eq!(absent.rest, b"\xff\xffX");
        assert!(EarlyPayload::new().feed(b"\xff\xff\xffTS\xff\0\0\0").is_err());
        assert!(EarlyPayload::new().feed(b"\xff\xff\xffTS\0\0\0\x01x").is_err());
    }

    proptest! {
        #[test]
        fn fuzz_noise_frames(bytes in proptest::collection::vec(any::<u8>(), 0..300), step in 1usize..40) {
            let mut reader = FrameReader::new();
            'stream: for piece in bytes.chunks(step) {
                reader.feed(piece);
                loop {
                    match reader.next_frame() {
                        Ok(Some(frame)) => { let _ = parse_frame(frame); }
                        Ok(None) => break,
                        Err(_) => break 'stream,
                    }
                }
            }
        }

        #[test]
        fn fuzz_noise_handshake(mut bytes in proptest::collection::vec(any::<u8>(), 0..120), shape in any::<bool>()) {
            let server = MachinePrivate::from_bytes([9; 32]);
            if shape {
                bytes.resize(INITIATION_LEN, 0);
                bytes[2..5].copy_from_slice(&[1, 0, 96]);
            }
            prop_assert!(ServerHandshake::read(&server, &bytes).is_err());
        }

        #[test]
        fn fuzz_early_payload(bytes in proptest::collection::vec(any::<u8>(), 0..64), magic in any::<bool>(), step in 1usize..10) {
            let mut parser = EarlyPayload::new();
            let mut stream = if magic { b"\xff\xff\xffTS\0\0\0".to_vec() } else { Vec::new() };
            stream.extend(bytes);
            for piece in stream.chunks(step) {
                if !matches!(parser.feed(piece), Ok(None)) { break; }
            }
        }
    }
}
