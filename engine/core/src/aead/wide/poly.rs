//! Poly1305 (RFC 8439, section 2.5), eight blocks a step.
//!
//! Numbers modulo 2^130 - 5 are in three limbs of 44, 44 and 42 bits, one number in each of eight lanes. A step multiplies all
//! lanes by r^8 and adds eight blocks; the last one multiplies each lane by a power of its own, so that their sum is the hash.

use core::arch::x86_64::*;

use super::{BLOCK, load, load_part};
use crate::aead::TAG;

const MASK_44: u64 = (1 << 44) - 1;
const MASK_42: u64 = (1 << 42) - 1;
/// Bytes of a step's eight blocks.
const STEP: usize = 8 * 16;
/// The bit above a block's 128, in the limb that begins at 2^88.
const ABOVE: i64 = 1 << 40;

/// What a one-time key gives: the powers of r that eight lanes are multiplied by, and what is added at the end.
pub(super) struct OneTime {
    eight: Factor,
    /// The lanes' powers, in their order: 8 4 7 3 6 2 5 1.
    last: Factor,
    s: [u64; 2],
}

impl OneTime {
    /// Each power waits for the one before: to be made while there is other work to do.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
    pub(super) fn new(key: &[u8; 32]) -> Self {
        let [r_low, r_high, s_low, s_high] = words(key);
        let (r_low, r_high) = (r_low & 0x0fff_fffc_0fff_ffff, r_high & 0x0fff_fffc_0fff_fffc);
        let one = Factor::new(limbs(all(r_low), all(r_high), _mm512_setzero_si512()));
        let two = Factor::new(one.times(one.number));
        let four = Factor::new(two.times(two.number));
        let eight = Factor::new(four.times(four.number));
        let powers = pick(0b0011_0011, one.number, two.number);
        let powers = pick(0b0000_1111, powers, two.times(powers));
        let powers = pick(0b0101_0101, powers, four.times(powers));
        Self { eight, last: Factor::new(powers), s: [s_low, s_high] }
    }

    /// Poly1305 over `data` padded to blocks, and a block with the lengths of no additional data and of `data`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
    pub(super) fn tag(&self, data: &[u8]) -> [u8; TAG] {
        let blocks = data.len().div_ceil(16) + 1;
        let steps = blocks.div_ceil(8);
        // The lanes of the first step that are left over come first: they are zero, which changes nothing.
        let absent = steps * 8 - blocks;
        let mut hash = first_step(data, absent, steps == 1);
        let mut rest = data.get((8 - absent) * 16..).unwrap_or_default();
        let above = _mm512_set1_epi64(ABOVE);
        for _ in 2..steps {
            let Some((chunk, later)) = rest.split_first_chunk::<STEP>() else { break };
            rest = later;
            let (halves, _) = chunk.as_chunks::<BLOCK>();
            hash = plus(self.eight.times(hash), blocks_of(load(&halves[0]), load(&halves[1]), above));
        }
        if steps > 1 {
            hash = plus(self.eight.times(hash), last_step(rest, data.len(), above));
        }
        let Lanes([a, b, c]) = self.last.times(hash);
        let sum = |limb| _mm512_reduce_add_epi64(limb).cast_unsigned();
        let [s_low, s_high] = self.s;
        finish([sum(a), sum(b), sum(c)], s_low, s_high)
    }
}

/// The first eight blocks, of which the first `absent` are not there; with the one of the length when it is also the last step.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn first_step(data: &[u8], absent: usize, is_last: bool) -> Lanes {
    let skip = absent * 16;
    let now = data.get(..STEP - skip).unwrap_or(data);
    let split = now.len().min(BLOCK.saturating_sub(skip));
    let (early, late) = now.split_at(split);
    let early = load_part(early, skip.min(BLOCK));
    let mut late = load_part(late, skip.saturating_sub(BLOCK));
    if is_last {
        late = _mm512_or_si512(late, length_block(data.len()));
    }
    // Lane n has block n / 2, or that of the upper half when n is odd.
    let number = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    let absent = i64::try_from(absent).unwrap_or(8);
    let there = _mm512_cmpge_epi64_mask(number, _mm512_set1_epi64(absent));
    blocks_of(early, late, _mm512_maskz_set1_epi64(there, ABOVE))
}

/// The last eight blocks: what is left, its padding, and the length of all.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn last_step(rest: &[u8], length: usize, above: __m512i) -> Lanes {
    let (early, late) = rest.split_at(rest.len().min(BLOCK));
    let late = _mm512_or_si512(load_part(late, 0), length_block(length));
    blocks_of(load_part(early, 0), late, above)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn length_block(length: usize) -> __m512i {
    _mm512_setr_epi64(0, 0, 0, 0, 0, 0, 0, i64::try_from(length).unwrap_or(i64::MAX))
}

/// A number in each of eight lanes.
#[derive(Clone, Copy)]
struct Lanes([__m512i; 3]);

/// What numbers are multiplied by.
struct Factor {
    number: Lanes,
    /// Its second and third limb times 20: 5 for the modulus, 4 for the two bits that the third limb is short of 44.
    twenty: [__m512i; 2],
}

impl Factor {
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn new(number: Lanes) -> Self {
        let Lanes([_, b, c]) = number;
        let twenty = |x| _mm512_add_epi64(_mm512_slli_epi64::<4>(x), _mm512_slli_epi64::<2>(x));
        Self { number, twenty: [twenty(b), twenty(c)] }
    }

    /// The product, its limbs a few bits too long at most, which [`Factor::times`] takes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn times(&self, by: Lanes) -> Lanes {
        let Lanes([r0, r1, r2]) = self.number;
        let [s1, s2] = self.twenty;
        let Lanes([h0, h1, h2]) = by;
        let zero = _mm512_setzero_si512();
        // Each product's low 52 bits and its high ones. The first limb is known last, so it comes last.
        let low = |x, y, sum| _mm512_madd52lo_epu64(sum, x, y);
        let high = |x, y, sum| _mm512_madd52hi_epu64(sum, x, y);
        let d0 = low(h0, r0, low(h2, s1, low(h1, s2, zero)));
        let d1 = low(h0, r1, low(h2, s2, low(h1, r0, zero)));
        let d2 = low(h0, r2, low(h2, r0, low(h1, r1, zero)));
        let e0 = high(h0, r0, high(h2, s1, high(h1, s2, zero)));
        let e1 = high(h0, r1, high(h2, s2, high(h1, r0, zero)));
        let e2 = high(h0, r2, high(h2, r0, high(h1, r1, zero)));
        // 2^52 of one limb is 2^8 of the next; of the last it is 2^140, which is 5 * 2^10 of the first.
        let d1 = _mm512_add_epi64(d1, _mm512_slli_epi64::<8>(e0));
        let d2 = _mm512_add_epi64(d2, _mm512_slli_epi64::<8>(e1));
        let wrapped = _mm512_add_epi64(_mm512_slli_epi64::<12>(e2), _mm512_slli_epi64::<10>(e2));
        let d0 = _mm512_add_epi64(d0, wrapped);
        let d1 = _mm512_add_epi64(d1, _mm512_srli_epi64::<44>(d0));
        let d2 = _mm512_add_epi64(d2, _mm512_srli_epi64::<44>(d1));
        let carry = _mm512_srli_epi64::<42>(d2);
        let carry = _mm512_add_epi64(carry, _mm512_slli_epi64::<2>(carry));
        let d0 = _mm512_add_epi64(_mm512_and_si512(d0, all(MASK_44)), carry);
        Lanes([d0, _mm512_and_si512(d1, all(MASK_44)), _mm512_and_si512(d2, all(MASK_42))])
    }
}

/// Blocks 0 to 3 and 4 to 7 as numbers, with the bit above each.
#[inline]
#[target_feature(enable = "avx512f")]
fn blocks_of(early: __m512i, late: __m512i, above: __m512i) -> Lanes {
    limbs(_mm512_unpacklo_epi64(early, late), _mm512_unpackhi_epi64(early, late), above)
}

/// Numbers of 128 bits, in halves, and what is above them in the third limb.
#[inline]
#[target_feature(enable = "avx512f")]
fn limbs(low: __m512i, high: __m512i, above: __m512i) -> Lanes {
    let second = _mm512_or_si512(_mm512_srli_epi64::<44>(low), _mm512_slli_epi64::<20>(high));
    Lanes([
        _mm512_and_si512(low, all(MASK_44)),
        _mm512_and_si512(second, all(MASK_44)),
        _mm512_or_si512(_mm512_srli_epi64::<24>(high), above),
    ])
}

#[inline]
#[target_feature(enable = "avx512f")]
fn plus(x: Lanes, y: Lanes) -> Lanes {
    let (Lanes([x0, x1, x2]), Lanes([y0, y1, y2])) = (x, y);
    Lanes([_mm512_add_epi64(x0, y0), _mm512_add_epi64(x1, y1), _mm512_add_epi64(x2, y2)])
}

/// `yes` in the lanes of `mask`, `no` in the others.
#[inline]
#[target_feature(enable = "avx512f")]
fn pick(mask: u8, no: Lanes, yes: Lanes) -> Lanes {
    let (Lanes([n0, n1, n2]), Lanes([y0, y1, y2])) = (no, yes);
    Lanes([
        _mm512_mask_mov_epi64(n0, mask, y0),
        _mm512_mask_mov_epi64(n1, mask, y1),
        _mm512_mask_mov_epi64(n2, mask, y2),
    ])
}

#[inline]
#[target_feature(enable = "avx512f")]
fn all(value: u64) -> __m512i {
    _mm512_set1_epi64(value.cast_signed())
}

fn words(key: &[u8; 32]) -> [u64; 4] {
    let mut words = [0; 4];
    let (chunks, _) = key.as_chunks::<8>();
    for (word, bytes) in words.iter_mut().zip(chunks) {
        *word = u64::from_le_bytes(*bytes);
    }
    words
}

/// The hash modulo 2^130 - 5, given limbs of up to 60 bits, plus the key's second half, modulo 2^128.
fn finish(sums: [u64; 3], s_low: u64, s_high: u64) -> [u8; TAG] {
    let [mut h0, mut h1, mut h2] = sums;
    // Twice: the first round can leave a carry out of the last limb of one more.
    for _ in 0..2 {
        h1 += h0 >> 44;
        h2 += h1 >> 44;
        (h0, h1) = (h0 & MASK_44, h1 & MASK_44);
        h0 += (h2 >> 42) * 5;
        h2 &= MASK_42;
    }
    h1 += h0 >> 44;
    h0 &= MASK_44;
    h2 += h1 >> 44;
    h1 &= MASK_44;
    // Less the modulus, unless that is negative: chosen without a branch.
    let g0 = h0 + 5;
    let g1 = h1 + (g0 >> 44);
    let g2 = (h2 + (g1 >> 44)).wrapping_sub(1 << 42);
    let keep = (g2 >> 63).wrapping_neg();
    let pick = |h: u64, g: u64| (h & keep) | (g & !keep);
    let (h0, h1, h2) = (pick(h0, g0 & MASK_44), pick(h1, g1 & MASK_44), pick(h2, g2 & MASK_42));
    let hash = u128::from(h0) | u128::from(h1) << 44 | u128::from(h2) << 88;
    let key = u128::from(s_low) | u128::from(s_high) << 64;
    hash.wrapping_add(key).to_le_bytes()
}
