//! Frames in a byte stream.

use super::{HEADER_LEN, MAX_FRAME_LEN, NoiseError, TYPE_RECORD, TYPE_RESPONSE};

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
