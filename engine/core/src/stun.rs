//! STUN binding (RFC 5389), as DERP servers speak it: a request carries SOFTWARE `tailnode` and ends in
//! FINGERPRINT, and a server stays silent to any other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const HEADER_LEN: usize = 20;
/// The fixed field of every message.
pub(crate) const MAGIC_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
const BINDING_REQUEST: [u8; 2] = [0x00, 0x01];
const BINDING_SUCCESS: [u8; 2] = [0x01, 0x01];
const SOFTWARE: &[u8; 8] = b"tailnode";
const ATTR_MAPPED_ADDRESS: u16 = 0x0001;
const ATTR_XOR_MAPPED_ADDRESS: u16 = 0x0020;
const ATTR_XOR_MAPPED_ADDRESS_OLD: u16 = 0x8020;
const ATTR_SOFTWARE: u16 = 0x8022;
const ATTR_FINGERPRINT: u16 = 0x8028;
const FINGERPRINT_LEN: usize = 8;
const FINGERPRINT_XOR: u32 = 0x5354_554e;

/// Length of a request, bytes.
pub const REQUEST_LEN: usize = HEADER_LEN + 4 + SOFTWARE.len() + FINGERPRINT_LEN;

/// Transaction id: random, chosen by the client.
pub type TxId = [u8; 12];

/// Why bytes are not the STUN message that was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StunError {
    /// No STUN header.
    #[error("not a STUN message")]
    NotStun,
    /// Another class or method.
    #[error("not the expected STUN message type")]
    WrongType,
    /// An attribute runs past the end, or the address is missing.
    #[error("malformed STUN attributes")]
    Malformed,
    /// SOFTWARE is missing or another's.
    #[error("STUN request came from unknown software")]
    WrongSoftware,
    /// FINGERPRINT is missing, not last, or wrong.
    #[error("STUN fingerprint is missing or wrong")]
    WrongFingerprint,
}

/// True when a datagram has the header of a STUN binding message. The second byte tells it from WireGuard,
/// where it is zero and the cookie's place is taken by an index that may have any value.
#[must_use]
pub fn is_stun(datagram: &[u8]) -> bool {
    datagram.len() >= HEADER_LEN
        && datagram[0] & 0xc0 == 0
        && datagram[1] == 1
        && datagram[4..8] == MAGIC_COOKIE
}

/// A binding request.
#[must_use]
pub fn request(tx: &TxId) -> [u8; REQUEST_LEN] {
    let mut out = [0; REQUEST_LEN];
    out[0..2].copy_from_slice(&BINDING_REQUEST);
    put_u16(&mut out[2..4], 4 + 8 + 8);
    out[4..8].copy_from_slice(&MAGIC_COOKIE);
    out[8..20].copy_from_slice(tx);
    put_u16(&mut out[20..22], ATTR_SOFTWARE);
    put_u16(&mut out[22..24], 8);
    out[24..32].copy_from_slice(SOFTWARE);
    let fingerprint = crc32(&out[..32]) ^ FINGERPRINT_XOR;
    put_u16(&mut out[32..34], ATTR_FINGERPRINT);
    put_u16(&mut out[34..36], 4);
    out[36..40].copy_from_slice(&fingerprint.to_be_bytes());
    out
}

/// Checks a binding request as the real servers do.
///
/// # Errors
/// When it is not STUN, not a request, or not from a node's software.
pub fn parse_request(datagram: &[u8]) -> Result<TxId, StunError> {
    let tx = tx_id(datagram)?;
    if datagram[0..2] != BINDING_REQUEST {
        return Err(StunError::WrongType);
    }
    let mut software = false;
    let mut last = 0;
    let mut fingerprint = None;
    for attribute in Attributes(&datagram[HEADER_LEN..]) {
        let (kind, value) = attribute?;
        last = kind;
        match kind {
            ATTR_SOFTWARE => software = value == SOFTWARE,
            ATTR_FINGERPRINT => {
                fingerprint = value.try_into().ok().map(u32::from_be_bytes);
            }
            _ => {}
        }
    }
    if !software {
        return Err(StunError::WrongSoftware);
    }
    let expected = crc32(&datagram[..datagram.len().saturating_sub(FINGERPRINT_LEN)]) ^ FINGERPRINT_XOR;
    if last != ATTR_FINGERPRINT || fingerprint != Some(expected) {
        return Err(StunError::WrongFingerprint);
    }
    Ok(tx)
}

/// A binding success response that tells `observed` to the client.
#[must_use]
pub fn response(tx: &TxId, observed: SocketAddr) -> Vec<u8> {
    let (family, octets) = match observed.ip().to_canonical() {
        IpAddr::V4(ip) => (1, ip.octets().to_vec()),
        IpAddr::V6(ip) => (2, ip.octets().to_vec()),
    };
    let value_len = if family == 1 { 8 } else { 20 };
    let mut out = Vec::with_capacity(HEADER_LEN + 4 + usize::from(value_len));
    out.extend_from_slice(&BINDING_SUCCESS);
    out.extend_from_slice(&(value_len + 4_u16).to_be_bytes());
    out.extend_from_slice(&MAGIC_COOKIE);
    out.extend_from_slice(tx);
    out.extend_from_slice(&ATTR_XOR_MAPPED_ADDRESS.to_be_bytes());
    out.extend_from_slice(&value_len.to_be_bytes());
    out.extend_from_slice(&[0, family]);
    out.extend_from_slice(&(observed.port() ^ 0x2112).to_be_bytes());
    out.extend(octets.iter().zip(mask(tx)).map(|(octet, mask)| octet ^ mask));
    out
}

/// Reads the transaction and the observed address from a binding success response.
///
/// # Errors
/// When it is not STUN, not a success response, or names no address.
pub fn parse_response(datagram: &[u8]) -> Result<(TxId, SocketAddr), StunError> {
    let tx = tx_id(datagram)?;
    if datagram[0..2] != BINDING_SUCCESS {
        return Err(StunError::WrongType);
    }
    let len = usize::from(u16::from_be_bytes([datagram[2], datagram[3]]));
    let body = datagram.get(HEADER_LEN..HEADER_LEN + len).ok_or(StunError::Malformed)?;
    let mut fallback = None;
    let mut found = None;
    for attribute in Attributes(body) {
        let (kind, value) = attribute?;
        match kind {
            ATTR_XOR_MAPPED_ADDRESS | ATTR_XOR_MAPPED_ADDRESS_OLD => {
                found = Some(address(value, &mask(&tx), 0x2112)?);
            }
            ATTR_MAPPED_ADDRESS => fallback = Some(address(value, &[0; 16], 0)?),
            _ => {}
        }
    }
    found.or(fallback).map(|address| (tx, address)).ok_or(StunError::Malformed)
}

fn tx_id(datagram: &[u8]) -> Result<TxId, StunError> {
    if !is_stun(datagram) {
        return Err(StunError::NotStun);
    }
    datagram[8..20].try_into().map_err(|_| StunError::NotStun)
}

fn mask(tx: &TxId) -> [u8; 16] {
    let mut mask = [0; 16];
    mask[..4].copy_from_slice(&MAGIC_COOKIE);
    mask[4..].copy_from_slice(tx);
    mask
}

fn address(value: &[u8], mask: &[u8; 16], port_mask: u16) -> Result<SocketAddr, StunError> {
    let [_, family, port @ ..] = value else { return Err(StunError::Malformed) };
    let len = match family {
        1 => 4,
        2 => 16,
        _ => return Err(StunError::Malformed),
    };
    let (Some(port), Some(octets)) = (port.first_chunk::<2>(), value.get(4..4 + len)) else {
        return Err(StunError::Malformed);
    };
    let port = u16::from_be_bytes(*port) ^ port_mask;
    let mut plain = [0; 16];
    for (out, (octet, mask)) in plain.iter_mut().zip(octets.iter().zip(mask)) {
        *out = octet ^ mask;
    }
    let ip = if len == 4 {
        IpAddr::V4(Ipv4Addr::new(plain[0], plain[1], plain[2], plain[3]))
    } else {
        IpAddr::V6(Ipv6Addr::from(plain)).to_canonical()
    };
    Ok(SocketAddr::new(ip, port))
}

struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), StunError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let rest = std::mem::take(&mut self.0);
        let Some((header, rest)) = rest.split_first_chunk::<4>() else {
            return Some(Err(StunError::Malformed));
        };
        let kind = u16::from_be_bytes([header[0], header[1]]);
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let padded = len.next_multiple_of(4);
        if padded > rest.len() {
            return Some(Err(StunError::Malformed));
        }
        self.0 = &rest[padded..];
        Some(Ok((kind, &rest[..len])))
    }
}

fn put_u16(out: &mut [u8], value: u16) {
    out.copy_from_slice(&value.to_be_bytes());
}

/// CRC-32 (IEEE 802.3), bit by bit: 32 bytes a message do not earn a table.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn crc_matches_the_standard_check_value() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn request_is_pinned_and_accepted() {
        let tx = *b"abcdefghijkl";
        let bytes = request(&tx);
        assert_eq!(
            hex::encode(&bytes[..36]),
            "000100142112a4426162636465666768696a6b6c802200087461696c6e6f646580280004"
        );
        assert_eq!(parse_request(&bytes), Ok(tx));
    }

    #[test]
    fn request_from_others_is_refused() {
        let good = request(&[1; 12]);
        let mut other = good;
        other[24] ^= 1;
        assert_eq!(parse_request(&other), Err(StunError::WrongSoftware));
        let mut bad = good;
        bad[39] ^= 1;
        assert_eq!(parse_request(&bad), Err(StunError::WrongFingerprint));
        assert_eq!(parse_request(&good[..32]), Err(StunError::WrongFingerprint));
        let mut bare = good;
        bare[0] = 1;
        assert_eq!(parse_request(&bare), Err(StunError::WrongType));
    }

    #[test]
    fn response_round_trips_in_both_families() {
        for text in ["192.0.2.7:41641", "[2001:db8::1]:1"] {
            let observed: SocketAddr = text.parse().unwrap();
            let bytes = response(&[9; 12], observed);
            assert!(is_stun(&bytes));
            assert_eq!(parse_response(&bytes), Ok(([9; 12], observed)));
        }
    }

    #[test]
    fn rfc5769_sample_responses_are_read() {
        // Sections 2.2 and 2.3; the integrity attribute is nobody's business here.
        let v4 = "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643\
                  000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96";
        let v6 = "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113a9fa\
                  a5d3f179bc25f4b5bed2b9d900080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c";
        for (text, expected) in
            [(v4, "192.0.2.1:32853"), (v6, "[2001:db8:1234:5678:11:2233:4455:6677]:32853")]
        {
            let bytes = hex::decode(text).unwrap();
            let (_, observed) = parse_response(&bytes).unwrap();
            assert_eq!(observed, expected.parse().unwrap());
            let (body, fingerprint) = bytes.split_at(bytes.len() - 4);
            let crc = crc32(&body[..body.len() - 4]) ^ FINGERPRINT_XOR;
            assert_eq!(fingerprint, crc.to_be_bytes());
        }
    }

    #[test]
    fn wireguard_is_never_taken_for_stun() {
        for kind in 1..=4 {
            // A receiver index that happens to be the cookie.
            let mut packet = [0; 40];
            packet[0] = kind;
            packet[4..8].copy_from_slice(&MAGIC_COOKIE);
            assert!(!is_stun(&packet));
        }
        assert!(is_stun(&request(&[0; 12])));
        assert!(!is_stun(&request(&[0; 12])[..19]));
    }

    #[test]
    fn plain_mapped_address_is_the_fallback() {
        let mut bytes = response(&[0; 12], "1.2.3.4:5".parse().unwrap());
        bytes[20..22].copy_from_slice(&ATTR_MAPPED_ADDRESS.to_be_bytes());
        bytes[26..28].copy_from_slice(&7_u16.to_be_bytes());
        bytes[28..32].copy_from_slice(&[1, 2, 3, 4]);
        assert_eq!(parse_response(&bytes), Ok(([0; 12], "1.2.3.4:7".parse().unwrap())));
    }

    proptest! {
        #[test]
        fn fuzz_parsers_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..120), stun: bool) {
            if stun && bytes.len() >= 8 {
                bytes[0] &= 1;
                bytes[1] = 1;
                bytes[4..8].copy_from_slice(&MAGIC_COOKIE);
            }
            let _ = parse_request(&bytes);
            let _ = parse_response(&bytes);
        }
    }
}
