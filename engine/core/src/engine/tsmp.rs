//! TSMP: what nodes tell each other inside the tunnel (IP protocol 99). It never reaches the pod; only
//! pings are answered.

use std::net::IpAddr;

use crate::packet::{Parsed, protocol};

const PING: u8 = b'p';
const PONG: u8 = b'o';
/// Type, the ping's eight bytes, and a peerapi port, of which there is none.
const PONG_LEN: usize = 1 + 8 + 2;

/// A pong, ready to be encrypted.
pub(super) struct Answer {
    buf: [u8; 40 + PONG_LEN],
    len: usize,
}

impl Answer {
    pub(super) fn packet(&self) -> &[u8] {
        &self.buf[..self.len]
    }
}

/// The answer to a TSMP packet that is a ping.
pub(super) fn answer(packet: &[u8], parsed: &Parsed) -> Option<Answer> {
    let payload = packet.get(parsed.transport..parsed.length)?;
    let (PING, ping) = payload.split_first().map(|(kind, rest)| (*kind, rest))? else { return None };
    let mut pong = [0; PONG_LEN];
    pong[0] = PONG;
    pong[1..9].copy_from_slice(ping.get(..8)?);
    let mut answer = Answer { buf: [0; 40 + PONG_LEN], len: 0 };
    let header = match (parsed.dst, parsed.src) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let buf = &mut answer.buf[..20];
            buf[0] = 0x45;
            buf[3] = 20 + 11;
            buf[8] = 64;
            buf[9] = protocol::TSMP;
            buf[12..16].copy_from_slice(&from.octets());
            buf[16..20].copy_from_slice(&to.octets());
            let sum = checksum(buf);
            buf[10..12].copy_from_slice(&sum.to_be_bytes());
            20
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let buf = &mut answer.buf[..40];
            buf[0] = 0x60;
            buf[5] = 11;
            buf[6] = protocol::TSMP;
            buf[7] = 64;
            buf[8..24].copy_from_slice(&from.octets());
            buf[24..40].copy_from_slice(&to.octets());
            40
        }
        _ => return None,
    };
    answer.len = header + PONG_LEN;
    answer.buf[header..answer.len].copy_from_slice(&pong);
    Some(answer)
}

fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header.chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ping_is_answered_and_nothing_else() {
        let mut v4 = vec![0x45, 0, 0, 29, 0, 0, 0, 0, 64, 99, 0, 0, 100, 64, 0, 1, 100, 64, 0, 2];
        v4.extend_from_slice(b"p12345678");
        let parsed = Parsed::parse(&v4).expect("parses");
        let pong = answer(&v4, &parsed).expect("an answer");
        let back = Parsed::parse(pong.packet()).expect("parses");
        assert_eq!((back.src, back.dst, back.length), (parsed.dst, parsed.src, 31));
        assert_eq!(&pong.packet()[20..], b"o12345678\0\0");
        assert_eq!(checksum(&pong.packet()[..20]), 0, "a right checksum sums to zero");
        v4[20] = b'!';
        assert!(answer(&v4, &Parsed::parse(&v4).expect("parses")).is_none());

        let mut v6 = vec![0x60, 0, 0, 0, 0, 9, 99, 64];
        v6.extend_from_slice(&[1; 16]);
        v6.extend_from_slice(&[2; 16]);
        v6.extend_from_slice(b"pabcdefgh");
        let parsed = Parsed::parse(&v6).expect("parses");
        let pong = answer(&v6, &parsed).expect("an answer");
        assert_eq!(Parsed::parse(pong.packet()).expect("parses").dst, parsed.src);
        assert_eq!(&pong.packet()[40..], b"oabcdefgh\0\0");
    }
}
