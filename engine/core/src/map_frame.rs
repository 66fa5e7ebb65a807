//! Cuts a map response body into messages: u32 little-endian length, then that many bytes of JSON.

/// Largest message taken, bytes. A netmap of ten thousand peers is a tenth of it.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;
const PREFIX_LEN: usize = 4;
/// What an idle decoder keeps allocated, bytes.
const KEEP_BYTES: usize = 16 << 10;

/// The server announced a message over [`MAX_MESSAGE_BYTES`]; the stream cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("map message of {0} bytes is over the limit")]
pub struct TooLarge(pub usize);

/// Incremental decoder: `push` what arrived, then take messages with `next_message` until there is none.
///
/// INVARIANT: nothing is set aside for a length that was merely announced; memory grows with what arrived.
#[derive(Debug, Default)]
pub struct MapFrames {
    buffer: Vec<u8>,
    start: usize,
}

impl MapFrames {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes of the response body.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.buffer.shrink_to(KEEP_BYTES);
            self.start = 0;
        } else if self.start >= self.buffer.len() / 2 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, if it has arrived.
    ///
    /// # Errors
    /// When a length prefix is over [`MAX_MESSAGE_BYTES`].
    pub fn next_message(&mut self) -> Result<Option<&[u8]>, TooLarge> {
        let rest = &self.buffer[self.start..];
        let Some((prefix, body)) = rest.split_first_chunk::<PREFIX_LEN>() else { return Ok(None) };
        let announced = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
        if announced > MAX_MESSAGE_BYTES {
            return Err(TooLarge(announced));
        }
        if body.len() < announced {
            return Ok(None);
        }
        let from = self.start + PREFIX_LEN;
        self.start = from + announced;
        Ok(Some(&self.buffer[from..self.start]))
    }
}

/// Puts the prefix before `message`: what a server sends.
///
/// # Errors
/// When the message is over [`MAX_MESSAGE_BYTES`].
pub fn encode(message: &[u8], out: &mut Vec<u8>) -> Result<(), TooLarge> {
    let len = u32::try_from(message.len()).map_err(|_| TooLarge(message.len()))?;
    if message.len() > MAX_MESSAGE_BYTES {
        return Err(TooLarge(message.len()));
    }
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(message);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn length_is_little_endian() {
        let mut out = Vec::new();
        encode(b"{}", &mut out).unwrap();
        assert_eq!(out, [2, 0, 0, 0, b'{', b'}']);
    }

    #[test]
    fn a_huge_announcement_is_refused_before_anything_is_set_aside() {
        let mut frames = MapFrames::new();
        frames.push(&u32::MAX.to_le_bytes());
        assert!(frames.next_message().is_err());
        assert!(frames.buffer.capacity() < 64);
    }

    proptest! {
        #[test]
        fn fuzz_any_cut_gives_the_same_messages(
            messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..12),
            cut in 1_usize..97,
        ) {
            let mut wire = Vec::new();
            for message in &messages {
                encode(message, &mut wire).unwrap();
            }
            let mut frames = MapFrames::new();
            let mut got = Vec::new();
            for part in wire.chunks(cut) {
                frames.push(part);
                while let Some(message) = frames.next_message().unwrap() {
                    got.push(message.to_vec());
                }
            }
            prop_assert_eq!(got, messages);
        }
    }
}
