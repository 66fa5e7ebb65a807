//! ChaCha20-Poly1305 (RFC 8439) as WireGuard's data messages use it: a counter for a nonce, no additional data.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

/// Bytes that sealing adds.
pub(crate) const TAG: usize = 16;

/// One key. It is not printed, and made for one direction of one session.
pub(crate) struct Key(Box<LessSafeKey>);

impl Key {
    #[expect(clippy::expect_used, reason = "ring refuses keys of another length than the type's 32 bytes alone")]
    pub(crate) fn new(key: &[u8; 32]) -> Self {
        Self(Box::new(LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).expect("32 bytes"))))
    }

    /// Encrypts `packet` into `out`, [`TAG`] bytes longer. False when the lengths do not fit.
    pub(crate) fn seal(&self, counter: u64, packet: &[u8], out: &mut [u8]) -> bool {
        let Some((body, tag)) = out.split_at_mut_checked(packet.len()) else { return false };
        body.copy_from_slice(packet);
        let sealed = self.0.seal_in_place_separate_tag(nonce(counter), Aad::empty(), body);
        match sealed {
            Ok(made) if tag.len() == TAG => {
                tag.copy_from_slice(made.as_ref());
                true
            }
            _ => false,
        }
    }

    /// Decrypts `sealed` into `out`, [`TAG`] bytes shorter. False, with nothing of use in `out`, when it is not authentic.
    pub(crate) fn open(&self, counter: u64, sealed: &[u8], out: &mut [u8]) -> bool {
        let Some((body, tag)) = sealed.split_last_chunk::<TAG>() else { return false };
        if body.len() != out.len() {
            return false;
        }
        out.copy_from_slice(body);
        self.0.open_in_place_separate_tag(nonce(counter), Aad::empty(), (*tag).into(), out, 0..).is_ok()
    }
}

/// Four bytes of zeroes, then the counter (section 5.4.6 of WireGuard's paper).
fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}
