//! Random identifiers.

/// `length` random letters and digits.
pub(crate) fn token(length: usize) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789xy";
    bytes(length).iter().map(|byte| char::from(ALPHABET[usize::from(byte % 64)])).collect()
}

/// `length` random bytes as hex digits.
pub(crate) fn hex(length: usize) -> String {
    hex::encode(bytes(length))
}

/// `length` random bytes.
pub(crate) fn bytes(length: usize) -> Vec<u8> {
    let mut buffer = vec![0; length];
    // The kernel's generator fails only before its first seeding, long before a devnet can run.
    getrandom::fill(&mut buffer).unwrap_or_else(|error| panic!("no randomness: {error}"));
    buffer
}
