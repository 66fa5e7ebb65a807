//! One pair of transport keys: what encrypts, what decrypts, and which counters were seen.

use std::time::Instant;

use super::handshake::Keys;
use super::window::Window;
use super::{DATA, KEEPALIVE, OVERHEAD, REJECT_AFTER, REKEY_AFTER, REKEY_TIMEOUT};

/// Type, receiver index, counter.
const HEADER: usize = 16;
/// Counters from here on are never used (section 6.1 of the paper: 2^64 - 2^13 - 1).
const LAST_COUNTER: u64 = u64::MAX - (1 << 13);

/// Why a data message was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Its counter was seen, or is too old to tell.
    Replayed,
    /// Nobody with the key made it.
    Forged,
}

/// A session between two handshakes.
pub(super) struct Session {
    /// Our receiver index.
    pub(super) index: u32,
    /// When it neither encrypts nor decrypts any more.
    pub(super) rejects_at: Instant,
    /// When we are to replace it while it carries data, if we began its handshake.
    pub(super) rekey_at: Option<Instant>,
    /// When received data is a reason for that too: there is just time for a handshake.
    pub(super) late_rekey_at: Option<Instant>,
    /// Grows with each session of the tunnel.
    pub(super) epoch: u64,
    keys: Keys,
    counter: u64,
    window: Window,
}

impl Session {
    pub(super) fn new(index: u32, initiator: bool, epoch: u64, keys: Keys, now: Instant) -> Self {
        let (counter, window) = (0, Window::default());
        let due = |age| initiator.then(|| now + age);
        let (rekey_at, late_rekey_at) = (due(REKEY_AFTER), due(REJECT_AFTER - KEEPALIVE - REKEY_TIMEOUT));
        Self { index, rejects_at: now + REJECT_AFTER, rekey_at, late_rekey_at, epoch, keys, counter, window }
    }

    /// Encrypts `packet` into `out`, which is [`OVERHEAD`] bytes longer at least; the length of the message.
    /// `None` when the session is used up.
    pub(super) fn seal(&mut self, packet: &[u8], out: &mut [u8]) -> Option<usize> {
        let length = packet.len() + OVERHEAD;
        let (header, sealed) = out.get_mut(..length)?.split_first_chunk_mut::<HEADER>()?;
        let counter = self.counter;
        if counter > LAST_COUNTER {
            return None;
        }
        self.counter += 1;
        header[..4].copy_from_slice(&[DATA, 0, 0, 0]);
        header[4..8].copy_from_slice(&self.keys.peer_index.to_le_bytes());
        header[8..].copy_from_slice(&counter.to_le_bytes());
        self.keys.sending.seal(counter, packet, sealed).then_some(length)
    }

    /// Decrypts a data message into `out`; the length of what was in it.
    pub(super) fn open(&mut self, message: &[u8], out: &mut [u8]) -> Result<usize, Refused> {
        let (header, sealed) = message.split_first_chunk::<HEADER>().ok_or(Refused::Forged)?;
        let [.., a, b, c, d, e, f, g, h] = *header;
        let counter = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        if counter > LAST_COUNTER || !self.window.may_be_new(counter) {
            return Err(Refused::Replayed);
        }
        let length = sealed.len().checked_sub(OVERHEAD - HEADER).ok_or(Refused::Forged)?;
        let out = out.get_mut(..length).ok_or(Refused::Forged)?;
        if !self.keys.receiving.open(counter, sealed, out) {
            return Err(Refused::Forged);
        }
        self.window.note(counter);
        Ok(length)
    }
}
