//! ChaCha20-Poly1305 (RFC 8439) as WireGuard's data messages use it: a counter for a nonce, no additional data.
//!
//! With ring's a third of a busy engine's time would be spent here. On processors with AVX-512 it is our own, which is faster
//! (`cargo bench -p podtether-core --bench aead` compares them); on others it is ring's.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

#[cfg(target_arch = "x86_64")]
mod wide;

/// Bytes that sealing adds.
pub const TAG: usize = 16;

/// One key, of one direction of one session.
pub struct Key(Cipher);

enum Cipher {
    #[cfg(target_arch = "x86_64")]
    Wide(wide::Key),
    Ring(Box<LessSafeKey>),
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(redacted)")
    }
}

impl Key {
    /// With the fastest cipher that this processor has.
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(key) = wide::Key::new(key) {
            return Self(Cipher::Wide(key));
        }
        Self(Cipher::Ring(ring_key(key)))
    }

    /// Encrypts `packet` into `out`, which is [`TAG`] bytes longer. False when it is not.
    #[must_use]
    pub fn seal(&self, counter: u64, packet: &[u8], out: &mut [u8]) -> bool {
        let Some((body, tag)) = out.split_last_chunk_mut::<TAG>() else { return false };
        if body.len() != packet.len() {
            return false;
        }
        match &self.0 {
            #[cfg(target_arch = "x86_64")]
            Cipher::Wide(key) => *tag = key.seal(counter, packet, body),
            Cipher::Ring(key) => {
                body.copy_from_slice(packet);
                let Ok(made) = key.seal_in_place_separate_tag(nonce(counter), Aad::empty(), body) else {
                    return false;
                };
                tag.copy_from_slice(made.as_ref());
            }
        }
        true
    }

    /// Decrypts `sealed` into `out`, which is [`TAG`] bytes shorter. False when it is not, or when `sealed` is not authentic;
    /// then nothing of use is in `out`.
    #[must_use]
    pub fn open(&self, counter: u64, sealed: &[u8], out: &mut [u8]) -> bool {
        let Some((body, tag)) = sealed.split_last_chunk::<TAG>() else { return false };
        if body.len() != out.len() {
            return false;
        }
        match &self.0 {
            #[cfg(target_arch = "x86_64")]
            Cipher::Wide(key) => key.open(counter, body, tag, out),
            Cipher::Ring(key) => {
                out.copy_from_slice(body);
                let nonce = nonce(counter);
                key.open_in_place_separate_tag(nonce, Aad::empty(), (*tag).into(), out, 0..).is_ok()
            }
        }
    }
}

#[expect(clippy::expect_used, reason = "only keys of another length are refused")]
fn ring_key(key: &[u8; 32]) -> Box<LessSafeKey> {
    Box::new(LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).expect("32 bytes")))
}

/// Four bytes of zeroes, then the counter (section 5.4.6 of WireGuard's paper).
fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests;
