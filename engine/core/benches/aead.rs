//! One data message, sealed and opened, by the cipher in use and by ring's, which is what processors without AVX-512 get.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use podtether_core::aead::{Key, TAG};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

/// A keepalive, an acknowledgement, a full packet of the tunnel.
const LENGTHS: [usize; 3] = [0, 64, 1280];

fn main() {
    divan::main();
}

fn ring() -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).expect("32 bytes"))
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[divan::bench(args = LENGTHS)]
fn seal(bencher: Bencher<'_, '_>, length: usize) {
    let (key, packet, mut out, mut counter) = (Key::new(&[7; 32]), vec![1; length], vec![0; length + TAG], 0);
    bencher.counter(BytesCount::new(length)).bench_local(|| {
        counter += 1;
        assert!(key.seal(counter, black_box(&packet), black_box(&mut out)));
    });
}

#[divan::bench(args = LENGTHS)]
fn seal_by_ring(bencher: Bencher<'_, '_>, length: usize) {
    let (key, packet, mut out, mut counter) = (ring(), vec![1; length], vec![0; length + TAG], 0);
    bencher.counter(BytesCount::new(length)).bench_local(|| {
        counter += 1;
        let (body, tag) = out.split_at_mut(length);
        body.copy_from_slice(black_box(&packet));
        let made = key.seal_in_place_separate_tag(nonce(counter), Aad::empty(), body).expect("short enough");
        tag.copy_from_slice(made.as_ref());
    });
}

#[divan::bench(args = LENGTHS)]
fn open(bencher: Bencher<'_, '_>, length: usize) {
    let (key, mut sealed, mut out) = (Key::new(&[7; 32]), vec![0; length + TAG], vec![0; length]);
    assert!(key.seal(1, &vec![1; length], &mut sealed));
    bencher.counter(BytesCount::new(length)).bench_local(|| {
        assert!(key.open(1, black_box(&sealed), black_box(&mut out)));
    });
}

#[divan::bench(args = LENGTHS)]
fn open_by_ring(bencher: Bencher<'_, '_>, length: usize) {
    let (key, mut sealed) = (ring(), vec![0; length + TAG]);
    assert!(Key::new(&[7; 32]).seal(1, &vec![1; length], &mut sealed));
    let mut out = vec![0; length + TAG];
    bencher.counter(BytesCount::new(length)).bench_local(|| {
        out.copy_from_slice(black_box(&sealed));
        assert!(key.open_in_place(nonce(1), Aad::empty(), black_box(&mut out)).is_ok());
    });
}
