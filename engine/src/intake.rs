//! What came in for the engine to work on: what its supervisor holds its use of the processor against.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a stream that count as one input.
const STREAM_BYTES: u64 = 256;

static BYTES: AtomicU64 = AtomicU64::new(0);

/// Counts bytes of the control stream, which another task than the driver decodes.
pub(crate) fn count_bytes(bytes: usize) {
    BYTES.fetch_add(u64::try_from(bytes).unwrap_or(0), Ordering::Relaxed);
}

/// What the driver took in.
#[derive(Debug, Default)]
pub(crate) struct Intake {
    /// Packets read from the TUN.
    pub(crate) tun_packets: u64,
    /// Datagrams, relayed messages, questions, calls and whatever else woke it with something.
    pub(crate) others: u64,
}

impl Intake {
    /// Packets, messages, and every [`STREAM_BYTES`] of control's stream.
    pub(crate) fn inputs(&self) -> u64 {
        self.tun_packets + self.others + BYTES.load(Ordering::Relaxed) / STREAM_BYTES
    }
}
