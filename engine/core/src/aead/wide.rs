//! ChaCha20-Poly1305 in registers of 512 bits, for processors with AVX-512 and its 52-bit multiplication (IFMA):
//! Intel since Ice Lake, AMD since Zen 4.
//!
//! What is here is ChaCha20 (RFC 8439, section 2.3). A register holds one row of the state of four blocks, and up to
//! [`GROUPS`] such groups are worked on side by side, so that a packet of the tunnel's MTU is one pass. Only the lengths of
//! messages decide about branches and addresses.

use core::arch::x86_64::*;

use super::TAG;

mod poly;

/// Bytes of a ChaCha20 block.
const BLOCK: usize = 64;
/// Bytes of a group of four blocks.
const GROUP: usize = 4 * BLOCK;
/// Most groups worked on at a time: with their constants they fill the processor's 32 registers.
const GROUPS: usize = 6;

/// Whether the processor can do what this module asks of it.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512ifma")
}

/// A key, on a processor that [`is_available`] has been asked about.
pub(super) struct Key([u32; 8]);

impl Key {
    /// `None` where the processor cannot do it.
    pub(super) fn new(key: &[u8; 32]) -> Option<Self> {
        let (words, _) = key.as_chunks::<4>();
        let mut own = [0; 8];
        for (word, bytes) in own.iter_mut().zip(words) {
            *word = u32::from_le_bytes(*bytes);
        }
        is_available().then_some(Self(own))
    }

    /// Encrypts `packet` into `out`, which is as long; the tag.
    pub(super) fn seal(&self, counter: u64, packet: &[u8], out: &mut [u8]) -> [u8; TAG] {
        // SAFETY: a key exists only where the processor has these instructions.
        unsafe { seal(&self.0, counter, packet, out) }
    }

    /// Decrypts `sealed` into `out`, which is as long, if `tag` is its tag.
    pub(super) fn open(&self, counter: u64, sealed: &[u8], tag: &[u8; TAG], out: &mut [u8]) -> bool {
        // SAFETY: a key exists only where the processor has these instructions.
        unsafe { open(&self.0, counter, sealed, tag, out) }
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.0);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
fn seal(key: &[u32; 8], nonce: u64, packet: &[u8], out: &mut [u8]) -> [u8; TAG] {
    let mut stream = Stream::new();
    stream.begin(key, nonce, packet.len());
    let one_time = poly::OneTime::new(&stream.one_time_key);
    stream.apply(key, nonce, packet, out);
    one_time.tag(out)
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
fn open(key: &[u32; 8], nonce: u64, sealed: &[u8], tag: &[u8; TAG], out: &mut [u8]) -> bool {
    let mut stream = Stream::new();
    stream.begin(key, nonce, sealed.len());
    let differing = poly::OneTime::new(&stream.one_time_key)
        .tag(sealed)
        .iter()
        .zip(tag)
        .fold(0, |all, (a, b)| all | (a ^ b));
    // Looked at once, whole, so that it tells nobody how much of a guess was right.
    if core::hint::black_box(differing) != 0 {
        return false;
    }
    stream.apply(key, nonce, sealed, out);
    true
}

/// The key stream of one message, as much of it as one pass makes.
struct Stream {
    /// The first block's first half (RFC 8439, section 2.6).
    one_time_key: [u8; 32],
    bytes: [u8; GROUPS * GROUP],
    /// Of `bytes`: what is made and not used.
    from: usize,
    until: usize,
    /// Number of the block that the next pass begins with.
    next: u32,
}

impl Stream {
    #[inline]
    fn new() -> Self {
        Self { one_time_key: [0; 32], bytes: [0; GROUPS * GROUP], from: 0, until: 0, next: 0 }
    }

    /// Makes the first block and, of those after it, what `length` bytes need, as far as one pass goes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
    fn begin(&mut self, key: &[u32; 8], nonce: u64, length: usize) {
        match (length + BLOCK).div_ceil(GROUP) {
            ..=1 => self.pass::<1>(key, nonce),
            2 => self.pass::<2>(key, nonce),
            3..=4 => self.pass::<4>(key, nonce),
            _ => self.pass::<GROUPS>(key, nonce),
        }
        self.one_time_key.copy_from_slice(&self.bytes[..32]);
        self.from = BLOCK;
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
    fn pass<const N: usize>(&mut self, key: &[u32; 8], nonce: u64) {
        let (groups, _) = self.bytes.as_chunks_mut::<GROUP>();
        if let Some(groups) = groups.first_chunk_mut::<N>() {
            blocks(key, nonce, self.next, groups);
        }
        (self.from, self.until) = (0, N * GROUP);
        self.next = self.next.wrapping_add(const { 4 * u32_of(N) });
    }

    /// `to` = `from` xor the key stream; both are equally long.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
    fn apply(&mut self, key: &[u32; 8], nonce: u64, mut from: &[u8], mut to: &mut [u8]) {
        loop {
            let stream = &self.bytes[self.from..self.until];
            let length = stream.len().min(from.len()).min(to.len());
            let (from_now, from_later) = from.split_at(length);
            let (to_now, to_later) = to.split_at_mut(length);
            xor(from_now, stream, to_now);
            if from_later.is_empty() {
                return;
            }
            (from, to) = (from_later, to_later);
            self.pass::<GROUPS>(key, nonce);
        }
    }
}

const fn u32_of(groups: usize) -> u32 {
    let mut count = 0;
    let mut n = 0;
    while n < groups {
        (n, count) = (n + 1, count + 1);
    }
    count
}

/// Block number `first` and those after it.
#[inline]
#[target_feature(enable = "avx512f")]
fn blocks<const N: usize>(key: &[u32; 8], nonce: u64, first: u32, out: &mut [[u8; GROUP]; N]) {
    let [k0, k1, k2, k3, k4, k5, k6, k7] = *key;
    let [n0, n1, n2, n3, n4, n5, n6, n7] = nonce.to_le_bytes();
    let (low, high) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes([n4, n5, n6, n7]));
    // "expand 32-byte k"
    let constants = row(0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574);
    let (key_low, key_high) = (row(k0, k1, k2, k3), row(k4, k5, k6, k7));
    let numbers = _mm512_setr_epi32(0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0);
    let mut start = [_mm512_add_epi32(row(first, 0, low, high), numbers); N];
    for n in 1..N {
        start[n] = _mm512_add_epi32(start[n - 1], row(4, 0, 0, 0));
    }
    let (mut a, mut b, mut c, mut d) = ([constants; N], [key_low; N], [key_high; N], start);
    for _ in 0..10 {
        quarter(&mut a, &mut b, &mut c, &mut d);
        // Columns become diagonals, and back.
        for n in 0..N {
            b[n] = _mm512_shuffle_epi32::<0b00_11_10_01>(b[n]);
            c[n] = _mm512_shuffle_epi32::<0b01_00_11_10>(c[n]);
            d[n] = _mm512_shuffle_epi32::<0b10_01_00_11>(d[n]);
        }
        quarter(&mut a, &mut b, &mut c, &mut d);
        for n in 0..N {
            b[n] = _mm512_shuffle_epi32::<0b10_01_00_11>(b[n]);
            c[n] = _mm512_shuffle_epi32::<0b01_00_11_10>(c[n]);
            d[n] = _mm512_shuffle_epi32::<0b00_11_10_01>(d[n]);
        }
    }
    for n in 0..N {
        let a = _mm512_add_epi32(a[n], constants);
        let b = _mm512_add_epi32(b[n], key_low);
        let c = _mm512_add_epi32(c[n], key_high);
        let d = _mm512_add_epi32(d[n], start[n]);
        // From one row of four blocks each to four rows of one block each.
        let ab_early = _mm512_shuffle_i32x4::<0b01_00_01_00>(a, b);
        let cd_early = _mm512_shuffle_i32x4::<0b01_00_01_00>(c, d);
        let ab_late = _mm512_shuffle_i32x4::<0b11_10_11_10>(a, b);
        let cd_late = _mm512_shuffle_i32x4::<0b11_10_11_10>(c, d);
        let (out, _) = out[n].as_chunks_mut::<BLOCK>();
        store(&mut out[0], _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_early, cd_early));
        store(&mut out[1], _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_early, cd_early));
        store(&mut out[2], _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_late, cd_late));
        store(&mut out[3], _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_late, cd_late));
    }
}

/// The quarter round on each column.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarter<const N: usize>(
    a: &mut [__m512i; N],
    b: &mut [__m512i; N],
    c: &mut [__m512i; N],
    d: &mut [__m512i; N],
) {
    for n in 0..N {
        a[n] = _mm512_add_epi32(a[n], b[n]);
        d[n] = _mm512_rol_epi32::<16>(_mm512_xor_si512(d[n], a[n]));
    }
    for n in 0..N {
        c[n] = _mm512_add_epi32(c[n], d[n]);
        b[n] = _mm512_rol_epi32::<12>(_mm512_xor_si512(b[n], c[n]));
    }
    for n in 0..N {
        a[n] = _mm512_add_epi32(a[n], b[n]);
        d[n] = _mm512_rol_epi32::<8>(_mm512_xor_si512(d[n], a[n]));
    }
    for n in 0..N {
        c[n] = _mm512_add_epi32(c[n], d[n]);
        b[n] = _mm512_rol_epi32::<7>(_mm512_xor_si512(b[n], c[n]));
    }
}

/// `to` = `from` xor `stream`, which is as long at least as the others are.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn xor(from: &[u8], stream: &[u8], to: &mut [u8]) {
    let (from_blocks, from_rest) = from.as_chunks::<BLOCK>();
    let (to_blocks, to_rest) = to.as_chunks_mut::<BLOCK>();
    let (stream_blocks, _) = stream.as_chunks::<BLOCK>();
    for ((from, to), stream) in from_blocks.iter().zip(to_blocks).zip(stream_blocks) {
        store(to, _mm512_xor_si512(load(from), load(stream)));
    }
    if let Some(stream) = stream_blocks.get(from_blocks.len()) {
        store_first(to_rest, _mm512_xor_si512(load_part(from_rest, 0), load(stream)));
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn row(a: u32, b: u32, c: u32, d: u32) -> __m512i {
    let row = _mm_setr_epi32(a.cast_signed(), b.cast_signed(), c.cast_signed(), d.cast_signed());
    _mm512_broadcast_i32x4(row)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8; BLOCK]) -> __m512i {
    // SAFETY: 64 readable bytes; the load asks for no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(bytes: &mut [u8; BLOCK], value: __m512i) {
    // SAFETY: 64 writable bytes; the store asks for no alignment.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), value) }
}

/// `bytes`, as many as fit behind `skip` bytes of zeroes, and zeroes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load_part(bytes: &[u8], skip: usize) -> __m512i {
    let mask = first(skip + bytes.len()) & !first(skip);
    let at = bytes.as_ptr().wrapping_sub(skip);
    // SAFETY: the mask admits bytes of `bytes` alone; the others are neither read nor looked at.
    unsafe { _mm512_maskz_loadu_epi8(mask, at.cast()) }
}

/// Stores the first bytes of `value`, as many as there is room for.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn store_first(bytes: &mut [u8], value: __m512i) {
    let mask = first(bytes.len());
    // SAFETY: the mask admits bytes of `bytes` alone.
    unsafe { _mm512_mask_storeu_epi8(bytes.as_mut_ptr().cast(), mask, value) }
}

/// A mask of the first `count` bytes of a register.
#[inline]
fn first(count: usize) -> u64 {
    if count >= BLOCK { u64::MAX } else { (1 << count) - 1 }
}
