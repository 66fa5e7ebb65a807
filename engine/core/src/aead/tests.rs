use proptest::prelude::*;

use super::*;

fn ring(key: &[u8; 32]) -> Key {
    Key(Cipher::Ring(ring_key(key)))
}

/// Seals and opens with both, on every processor with whatever is fastest there.
fn agrees(key: [u8; 32], counter: u64, packet: &[u8]) {
    let (ours, rings) = (Key::new(&key), ring(&key));
    let (mut sealed, mut expected) = (vec![1; packet.len() + TAG], vec![2; packet.len() + TAG]);
    assert!(ours.seal(counter, packet, &mut sealed) && rings.seal(counter, packet, &mut expected));
    assert!(sealed == expected, "{} bytes, counter {counter}, key {key:?}", packet.len());
    for opener in [&ours, &rings] {
        let mut opened = vec![3; packet.len()];
        assert!(opener.open(counter, &sealed, &mut opened) && opened == packet, "{} bytes", packet.len());
    }
}

#[test]
fn every_length_is_sealed_as_by_ring() {
    for length in 0..3300_usize {
        let packet: Vec<u8> = (0..length).map(|n| u8::try_from((n * 7 + length) % 256).unwrap()).collect();
        agrees([7; 32], u64::try_from(length).unwrap() << 40, &packet);
    }
    agrees([9; 32], u64::MAX, &vec![0xa5; 65_535]);
}

#[test]
fn numbers_next_to_the_modulus_are_reduced() {
    // Long carries come of blocks of ones; many keys give many factors.
    for seed in 0..400_u32 {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&seed.to_le_bytes());
        for fill in [0, 0xff] {
            for length in [0, 1, 15, 16, 17, 111, 112, 113, 127, 128, 129, 255, 256, 1280] {
                agrees(key, seed.into(), &vec![fill; length]);
            }
        }
    }
}

#[test]
fn the_key_stream_is_that_of_rfc_8439_appendix_a_5() {
    let key = hex::decode("1c9240a5eb55d38af333888604f6b5f0473917c1402b80099dca5cbc207075c0").unwrap();
    let expected = hex::decode("64a0861575861af460f062c79be643bd5e805cfd345cf389f108670ac76c8cb2").unwrap();
    let text = b"Internet-Drafts are draft documents valid";
    let mut sealed = vec![0; text.len() + TAG];
    let counter = u64::from_le_bytes([1, 2, 3, 4, 5, 6, 7, 8]);
    assert!(Key::new(&key.try_into().unwrap()).seal(counter, text, &mut sealed));
    assert_eq!(sealed[..32], expected);
}

#[test]
fn whatever_is_changed_is_noticed() {
    let (key, packet) = (Key::new(&[5; 32]), vec![0x42; 1280]);
    let mut sealed = vec![0; packet.len() + TAG];
    assert!(key.seal(77, &packet, &mut sealed));
    let mut out = vec![0; packet.len()];
    for at in 0..sealed.len() {
        sealed[at] ^= 1 << (at % 8);
        assert!(!key.open(77, &sealed, &mut out), "byte {at}");
        sealed[at] ^= 1 << (at % 8);
    }
    assert!(!key.open(78, &sealed, &mut out), "another counter");
    assert!(!Key::new(&[6; 32]).open(77, &sealed, &mut out), "another key");
    assert!(!key.open(77, &sealed[1..], &mut out) && !key.open(77, &sealed, &mut out[1..]), "other lengths");
    assert!(!key.open(77, &[0; 15], &mut []) && !key.seal(0, &packet, &mut [0; 15]));
    assert!(key.open(77, &sealed, &mut out) && out == packet);
}

proptest! {
    #[test]
    fn any_key_counter_and_packet_is_sealed_as_by_ring(
        key: [u8; 32],
        counter: u64,
        packet in proptest::collection::vec(any::<u8>(), 0..1600),
    ) {
        agrees(key, counter, &packet);
    }
}
