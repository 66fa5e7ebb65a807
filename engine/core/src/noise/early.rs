//! What a server says before HTTP/2 begins.

use super::{MAX_EARLY_PAYLOAD_LEN, NoiseError};
use crate::tailcfg::EarlyNoise;

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
