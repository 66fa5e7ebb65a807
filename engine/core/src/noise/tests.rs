use super::*;
use crate::key::ChallengePublic;
use crate::tailcfg::EarlyNoise;
use proptest::prelude::*;

fn pair() -> (Transport, Transport) {
    let (client, server) = (MachinePrivate::generate().unwrap(), MachinePrivate::generate().unwrap());
    let (handshake, initiation) = ClientHandshake::start(&client, &server.public(), 115).unwrap();
    assert_eq!(initiation[..5], [0, 115, 1, 0, 96]);
    let accepted = ServerHandshake::read(&server, &initiation).unwrap();
    assert_eq!((accepted.client(), accepted.version()), (client.public(), 115));
    let (server, response) = accepted.respond().unwrap();
    assert_eq!(response[..3], [2, 0, 48]);
    (handshake.finish(&response).unwrap(), server)
}

#[test]
fn both_directions_carry_records_of_every_length() {
    fn carry(from: &mut Transport, to: &mut Transport, len: usize) {
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        from.seal(&vec![7; len], &mut wire).unwrap();
        assert_eq!(wire.len(), len + 19);
        to.open(&wire, &mut plain).unwrap();
        assert_eq!(plain, vec![7; len]);
    }
    let (mut client, mut server) = pair();
    for len in [0, 1, 1000, MAX_PLAINTEXT_LEN] {
        carry(&mut client, &mut server, len);
        carry(&mut server, &mut client, len / 2);
    }
    assert!(client.seal(&[0; MAX_PLAINTEXT_LEN + 1], &mut Vec::new()).is_err());
}

#[test]
fn the_counter_is_big_endian_and_ends() {
    let (mut client, mut server) = pair();
    // 2^56 in big-endian is 1 in little-endian: a session that counted the other way would collide.
    client.sent = 1 << 56;
    server.received = 1 << 56;
    let (mut wire, mut plain) = (Vec::new(), Vec::new());
    client.seal(b"x", &mut wire).unwrap();
    let raw = client.state.write_message(1, b"x", &mut [0; 17]).unwrap();
    assert_eq!(raw, 17);
    let mut expected = [0; 17];
    client.state.write_message(1, b"x", &mut expected).unwrap();
    assert_eq!(wire[3..], expected);
    server.open(&wire, &mut plain).unwrap();
    client.sent = u64::MAX;
    assert_eq!(client.seal(b"x", &mut wire), Err(NoiseError::Closed));
}

#[test]
fn a_bad_record_ends_the_session() {
    for break_it in [
        (|wire: &mut Vec<u8>| wire[10] ^= 1) as fn(&mut Vec<u8>),
        |wire| wire[0] = 2,
        |wire| wire.truncate(10),
        |wire| *wire = vec![4, 0, 3, 1, 2, 3],
        |wire| *wire = error_frame("go away"),
    ] {
        let (mut client, mut server) = pair();
        let (mut good, mut bad, mut plain) = (Vec::new(), Vec::new(), Vec::new());
        client.seal(b"hello", &mut good).unwrap();
        bad.clone_from(&good);
        break_it(&mut bad);
        assert!(server.open(&bad, &mut plain).is_err());
        assert!(plain.is_empty());
        assert_eq!(server.open(&good, &mut plain), Err(NoiseError::Closed));
    }
}

#[test]
fn records_do_not_open_twice_or_out_of_order() {
    let (mut client, mut server) = pair();
    let (mut first, mut second) = (Vec::new(), Vec::new());
    client.seal(b"1", &mut first).unwrap();
    client.seal(b"2", &mut second).unwrap();
    assert!(server.open(&second, &mut Vec::new()).is_err());
    let (mut client, mut server) = pair();
    first.clear();
    client.seal(b"1", &mut first).unwrap();
    server.open(&first, &mut Vec::new()).unwrap();
    assert!(server.open(&first, &mut Vec::new()).is_err());
}

#[test]
fn a_refused_handshake_says_why() {
    let server = MachinePrivate::generate().unwrap();
    let start =
        || ClientHandshake::start(&MachinePrivate::generate().unwrap(), &server.public(), 115).unwrap().0;
    assert_eq!(
        start().finish(&error_frame("bad\nversion")).err(),
        Some(NoiseError::Refused("badversion".into()))
    );
    for bad in [&[][..], &[2, 0, 1, 0], &[4, 0, 0], &[2, 0, 48], &[3, 0]] {
        assert!(matches!(start().finish(bad).err(), Some(NoiseError::Malformed(_))), "{bad:?}");
    }
    let mut response = [0; RESPONSE_LEN];
    response[..3].copy_from_slice(&[2, 0, 48]);
    assert_eq!(start().finish(&response).err(), Some(NoiseError::Crypto));
}

#[test]
fn a_handshake_for_another_server_or_version_fails() {
    let (ours, other) = (MachinePrivate::generate().unwrap(), MachinePrivate::generate().unwrap());
    let (_, mut initiation) = ClientHandshake::start(&ours, &other.public(), 115).unwrap();
    assert!(ServerHandshake::read(&ours, &initiation).is_err());
    assert!(ServerHandshake::read(&other, &initiation).is_ok());
    initiation[1] = 116;
    assert!(ServerHandshake::read(&other, &initiation).is_err());
}

#[test]
fn the_reader_cuts_frames_however_they_arrive() {
    let (mut client, _) = pair();
    let mut wire = Vec::new();
    let mut expected = Vec::new();
    for len in [5usize, 0, 300] {
        let start = wire.len();
        client.seal(&vec![1; len], &mut wire).unwrap();
        expected.push(wire[start..].to_vec());
    }
    for step in [1, 2, 7, wire.len()] {
        let (mut reader, mut frames) = (FrameReader::new(), Vec::new());
        for piece in wire.chunks(step) {
            reader.feed(piece);
            while let Some(frame) = reader.next_frame().unwrap() {
                frames.push(frame.to_vec());
            }
        }
        assert_eq!(frames, expected);
        assert!(reader.is_empty());
    }
    for bad in [[1, 0, 0], [5, 0, 0], [4, 0x0f, 0xfe]] {
        let mut reader = FrameReader::new();
        reader.feed(&bad);
        assert!(reader.next_frame().is_err(), "{bad:?}");
    }
}

#[test]
fn early_words_may_straddle_or_be_absent() {
    let early = EarlyNoise { node_key_challenge: ChallengePublic::from_bytes([3; 32]) };
    let mut stream = EarlyPayload::encode(&early);
    stream.extend(b"\0\0\x12\x04");
    for step in [1, 8, 9, 10, stream.len()] {
        let (mut parser, mut done) = (EarlyPayload::new(), None);
        let mut rest = Vec::new();
        for piece in stream.chunks(step) {
            if done.is_some() {
                rest.extend_from_slice(piece);
            } else if let Some(d) = parser.feed(piece).unwrap() {
                rest.extend_from_slice(&d.rest);
                done = Some(d.early);
            }
        }
        assert_eq!(done, Some(Some(early.clone())));
        assert_eq!(rest, b"\0\0\x12\x04");
    }
    let absent = EarlyPayload::new().feed(b"\0\0").unwrap().unwrap();
    assert_eq!(absent, EarlyDone { early: None, rest: b"\0\0".to_vec() });
    let half = EarlyPayload::new().feed(b"\xff\xff\xffT").unwrap();
    assert_eq!(half, None);
    let absent = EarlyPayload::new().feed(b"\xff\xffX").unwrap().unwrap();
    assert_eq!(absent.rest, b"\xff\xffX");
    assert!(EarlyPayload::new().feed(b"\xff\xff\xffTS\xff\0\0\0").is_err());
    assert!(EarlyPayload::new().feed(b"\xff\xff\xffTS\0\0\0\x01x").is_err());
}

proptest! {
    #[test]
    fn fuzz_noise_frames(bytes in proptest::collection::vec(any::<u8>(), 0..300), step in 1usize..40) {
        let mut reader = FrameReader::new();
        'stream: for piece in bytes.chunks(step) {
            reader.feed(piece);
            loop {
                match reader.next_frame() {
                    Ok(Some(frame)) => { let _ = parse_frame(frame); }
                    Ok(None) => break,
                    Err(_) => break 'stream,
                }
            }
        }
    }

    #[test]
    fn fuzz_noise_handshake(mut bytes in proptest::collection::vec(any::<u8>(), 0..120), shape in any::<bool>()) {
        let server = MachinePrivate::from_bytes([9; 32]);
        if shape {
            bytes.resize(INITIATION_LEN, 0);
            bytes[2..5].copy_from_slice(&[1, 0, 96]);
        }
        prop_assert!(ServerHandshake::read(&server, &bytes).is_err());
    }

    #[test]
    fn fuzz_early_payload(bytes in proptest::collection::vec(any::<u8>(), 0..64), magic in any::<bool>(), step in 1usize..10) {
        let mut parser = EarlyPayload::new();
        let mut stream = if magic { b"\xff\xff\xffTS\0\0\0".to_vec() } else { Vec::new() };
        stream.extend(bytes);
        for piece in stream.chunks(step) {
            if !matches!(parser.feed(piece), Ok(None)) { break; }
        }
    }
}
