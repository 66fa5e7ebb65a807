//! The control connection's Noise session, without I/O: handshake, records, and the server's early words.
//!
//! A client sends its initiation inside an HTTP upgrade request, and everything after the server's
//! `101` is frames: one handshake response or error, then records in both directions. [`FrameReader`]
//! cuts the byte stream into frames, [`Transport`] seals and opens records, and [`EarlyPayload`] takes
//! the server's JSON off the front of the decrypted stream, leaving HTTP/2.
//!
//! Any record that does not open ends the session: there is no way to resynchronise.

mod early;
mod frames;

use snow::{Builder, HandshakeState, StatelessTransportState};

pub use self::early::{EarlyDone, EarlyPayload};
pub use self::frames::{FrameReader, RecordReader};
use crate::key::{MachinePrivate, MachinePublic};

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

#[cfg(test)]
mod tests;
