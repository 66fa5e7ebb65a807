//! The internet checksum (RFC 1071), in lanes wide enough that carries are counted, not chased: 32-bit words
//! into 64-bit sums, which compilers turn into vector instructions on any target.

/// Bytes of one step, and sums kept side by side in it.
const STEP: usize = 64;
const LANES: usize = 8;

/// A one's-complement sum on its way. Byte order does not matter to it (RFC 1071, 2 (B)), so words are added
/// as the machine loads them and the result is turned round at the end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Of nothing.
    pub const ZERO: Self = Self(0);

    /// With `bytes` added, which start at an even place of what is summed; an odd last byte is taken as if a
    /// zero followed.
    #[must_use]
    #[inline]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        let (steps, mut rest) = bytes.as_chunks::<STEP>();
        let mut lanes = [0u64; LANES];
        for step in steps {
            #[expect(clippy::needless_range_loop, reason = "see `half`")]
            for lane in 0..LANES {
                lanes[lane] += half(step, lane) + half(step, lane + LANES);
            }
        }
        // No lane can overflow below 16 GiB.
        let mut sum = self.0 + lanes.iter().sum::<u64>();
        // Headers are as short as this, so it is no loop.
        sum += take::<32>(&mut rest) + take::<16>(&mut rest) + take::<8>(&mut rest) + take::<4>(&mut rest);
        let last = match *rest {
            [a] => [a, 0, 0, 0],
            [a, b] => [a, b, 0, 0],
            [a, b, c] => [a, b, c, 0],
            _ => [0; 4],
        };
        Self(sum + u64::from(u32::from_ne_bytes(last)))
    }

    /// With a number of the header added.
    #[must_use]
    #[inline]
    pub fn word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word.to_be()))
    }

    /// Folded to 16 bits and not complemented: what the kernel wants to find in the checksum field of a packet
    /// whose checksum somebody else completes.
    #[must_use]
    #[inline]
    pub fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        // The loop's bound says that it fits.
        u16::from_be(u16::try_from(sum).unwrap_or(0xffff))
    }

    /// The checksum: what makes the sum of everything 0xffff.
    #[must_use]
    #[inline]
    pub fn checksum(self) -> u16 {
        !self.fold()
    }

    /// Whether this is the sum of something with its right checksum in it.
    #[must_use]
    #[inline]
    pub fn holds(self) -> bool {
        self.fold() == 0xffff
    }
}

/// The sum of the first `N` bytes, which are taken off; of none when there are fewer.
#[inline(always)]
fn take<const N: usize>(bytes: &mut &[u8]) -> u64 {
    let Some((first, rest)) = bytes.split_first_chunk::<N>() else { return 0 };
    *bytes = rest;
    let mut sum = 0;
    for word in 0..N / 4 {
        sum += half(first, word);
    }
    sum
}

/// Word number `index` of 32 bits. By index and not by an iterator: those become vector instructions only where
/// the compiler sees through all their layers, which it does not in every kind of build.
#[inline(always)]
fn half<const N: usize>(bytes: &[u8; N], index: usize) -> u64 {
    let at = index * 4;
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]).into()
}

/// The pseudo header of RFC 9293, 3.1 and RFC 8200, 8.1. `addresses` are source and destination as they lie
/// in the IP header, `length` is of the transport header and what follows it.
#[must_use]
#[inline]
pub fn pseudo(addresses: &[u8], protocol: u8, length: u16) -> Sum {
    Sum::ZERO.bytes(addresses).word(u16::from(protocol)).word(length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As RFC 1071, 4.1 has it.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap()
    }

    #[test]
    fn the_example_of_the_rfc() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::ZERO.bytes(&bytes).fold(), 0xddf2);
        assert_eq!(Sum::ZERO.bytes(&bytes).checksum(), !0xddf2);
        assert_eq!(Sum::ZERO.fold(), 0);
        assert!(!Sum::ZERO.holds());
        assert!(Sum::ZERO.bytes(&bytes).word(!0xddf2).holds());
        assert_eq!(Sum::ZERO.bytes(&[0xff; 65_535]).fold(), naive(&[0xff; 65_535]));
    }

    proptest! {
        #[test]
        fn any_bytes_sum_as_the_naive_way_and_in_any_even_pieces(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
            cut in 0..200usize,
        ) {
            prop_assert_eq!(Sum::ZERO.bytes(&bytes).fold(), naive(&bytes));
            let (a, b) = bytes.split_at((cut * 2).min(bytes.len() & !1));
            prop_assert_eq!(Sum::ZERO.bytes(a).bytes(b).fold(), naive(&bytes));
        }
    }
}
