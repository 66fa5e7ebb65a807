//! Whether a program runs where there is nothing else.

/// Type of the program header that names the dynamic loader.
const PT_INTERP: u32 = 3;

/// Whether a 64-bit little-endian ELF program names a dynamic loader (ELF-64 object file format, 1.5d). Without one the
/// kernel runs it as it is; with one in an image that has none, it says "no such file or directory" of the program.
#[must_use]
pub fn asks_for_a_loader(program: &[u8]) -> bool {
    let number = |at: usize, bytes: usize| {
        let field = program.get(at..at.checked_add(bytes)?)?;
        field.iter().rev().try_fold(0_usize, |value, byte| Some(value.checked_mul(256)? + usize::from(*byte)))
    };
    let headers = || Some((number(32, 8)?, number(54, 2)?, number(56, 2)?));
    let Some((first, size, count)) = headers().filter(|_| program.starts_with(b"\x7fELF\x02\x01")) else {
        return false;
    };
    let kind = |index: usize| number(first.checked_add(index.checked_mul(size)?)?, 4);
    (0..count).any(|index| kind(index).and_then(|kind| u32::try_from(kind).ok()) == Some(PT_INTERP))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use super::*;

    /// A file with program headers of these types behind its own header.
    fn program(kinds: &[u32]) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02\x01".to_vec();
        bytes.resize(64, 0);
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = u8::try_from(kinds.len()).unwrap();
        for kind in kinds {
            bytes.extend(kind.to_le_bytes());
            bytes.resize(bytes.len() + 52, 0);
        }
        bytes
    }

    #[test]
    fn what_names_a_loader_is_found() {
        assert!(asks_for_a_loader(&program(&[6, PT_INTERP, 1])));
        assert!(
            !asks_for_a_loader(&program(&[6, 1, 2])),
            "static, position independent ones have PT_DYNAMIC, too"
        );
        let cut = program(&[6, PT_INTERP]);
        for end in 0..cut.len() {
            let _ = asks_for_a_loader(&cut[..end]);
        }
        for text in [&b""[..], b"#!/bin/sh\n", &[0xff; 200]] {
            assert!(!asks_for_a_loader(text));
        }
        let mut far = program(&[PT_INTERP]);
        far[32..40].fill(0xff);
        assert!(!asks_for_a_loader(&far));
    }
}
