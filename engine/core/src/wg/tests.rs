use std::net::IpAddr;

use super::*;
use crate::tailcfg::UnixTime;

fn packet() -> Vec<u8> {
    let mut p = vec![0; 60];
    p[0] = 0x45;
    p[3] = 60;
    p
}

fn identity(secret: u8) -> Identity {
    Identity::new([secret; 32], UnixTime::from_secs(1_800_000_000), Instant::now())
}

struct Pair {
    a: Tunnel,
    b: Tunnel,
    now: Instant,
}

fn pair() -> Pair {
    let (a, b) = (identity(7), identity(9));
    let now = Instant::now();
    Pair {
        a: Tunnel::new(&a, b.public.to_bytes(), 0x0012_3456, 1, now),
        b: Tunnel::new(&b, a.public.to_bytes(), 0x0065_4321, 2, now),
        now,
    }
}

fn handshake(from: &mut Tunnel, to: &mut Tunnel, now: Instant) {
    let init = from.initiate(now).expect("allowed");
    let mut out = [0; 256];
    let Opened::Response(len) = to.open(&init, &mut out, now) else { panic!("no response") };
    let response = out[..len].to_vec();
    let Opened::Established(len) = from.open(&response, &mut out, now) else { panic!("not established") };
    let keepalive = out[..len].to_vec();
    assert_eq!(to.open(&keepalive, &mut [0; 256], now), Opened::Keepalive);
}

fn send(from: &mut Tunnel, to: &mut Tunnel, now: Instant) -> Opened {
    let mut out = [0; 256];
    let sealed = from.seal(&packet(), &mut out, now).expect("a session");
    to.open(&out[..sealed.len], &mut [0; 256], now)
}

#[test]
fn a_session_carries_packets_until_it_is_180_seconds_old() {
    let Pair { mut a, mut b, now } = pair();
    assert!(a.seal(&packet(), &mut [0; 256], now).is_none());
    handshake(&mut a, &mut b, now);
    assert_eq!(send(&mut a, &mut b, now), Opened::Packet(60));
    assert_eq!(send(&mut b, &mut a, now), Opened::Packet(60));
    let old = now + Duration::from_secs(121);
    let rekey = |t: &mut Tunnel| t.seal(&packet(), &mut [0; 256], old).map(|s| s.rekey);
    assert_eq!(rekey(&mut a), Some(true), "the initiator makes the next session");
    assert_eq!(rekey(&mut b), Some(false), "the responder does not");
    let mut late = [0; 256];
    let sealed = b.seal(&packet(), &mut late, now + REJECT_AFTER - Duration::from_millis(1)).expect("still");
    assert_eq!(a.open(&late[..sealed.len], &mut [0; 256], now + REJECT_AFTER), Opened::Rejected);
    assert!(a.seal(&packet(), &mut [0; 256], now + REJECT_AFTER).is_none());
    assert!(!b.ready(now + REJECT_AFTER));
}

#[test]
fn a_packet_of_an_older_session_is_taken_but_does_not_bring_the_session_back() {
    let Pair { mut a, mut b, mut now } = pair();
    handshake(&mut a, &mut b, now);
    let mut old = [0; 256];
    let sealed = b.seal(&packet(), &mut old, now).expect("a session");
    now += Duration::from_secs(120);
    handshake(&mut a, &mut b, now);
    let newest = a.current;
    assert_eq!(a.open(&old[..sealed.len], &mut [0; 256], now), Opened::Packet(60));
    assert_eq!(a.current, newest);
    assert_eq!(send(&mut a, &mut b, now), Opened::Packet(60));
    assert_eq!(b.current & 7, 2, "the second session");
}

#[test]
fn many_sessions_begun_by_either_side_follow_each_other() {
    let Pair { mut a, mut b, mut now } = pair();
    for round in 0..600 {
        if round % 3 == 0 {
            handshake(&mut b, &mut a, now);
        } else {
            handshake(&mut a, &mut b, now);
        }
        assert_eq!(send(&mut a, &mut b, now), Opened::Packet(60), "round {round}");
        assert_eq!(send(&mut b, &mut a, now), Opened::Packet(60), "round {round}");
        now += Duration::from_secs(6);
    }
}

#[test]
fn both_sides_at_once_end_with_a_session_each_way() {
    let Pair { mut a, mut b, now } = pair();
    let (ia, ib) = (a.initiate(now).expect("a"), b.initiate(now).expect("b"));
    let mut out = [0; 256];
    let Opened::Response(len) = b.open(&ia, &mut out, now) else { panic!() };
    let rb = out[..len].to_vec();
    let Opened::Response(len) = a.open(&ib, &mut out, now) else { panic!() };
    let ra = out[..len].to_vec();
    assert!(matches!(a.open(&rb, &mut out, now), Opened::Established(_)));
    assert!(matches!(b.open(&ra, &mut out, now), Opened::Established(_)));
    for _ in 0..3 {
        assert_eq!(send(&mut a, &mut b, now), Opened::Packet(60));
        assert_eq!(send(&mut b, &mut a, now), Opened::Packet(60));
    }
}

#[test]
fn both_sides_at_once_do_not_drive_each_other_from_session_to_session() {
    let Pair { mut a, mut b, mut now } = pair();
    let mut out = [0; 256];
    for _ in 0..3 {
        let (ia, ib) = (a.initiate(now).expect("a"), b.initiate(now).expect("b"));
        let Opened::Response(len) = b.open(&ia, &mut out, now) else { panic!() };
        let rb = out[..len].to_vec();
        let Opened::Response(len) = a.open(&ib, &mut out, now) else { panic!() };
        let ra = out[..len].to_vec();
        // Data of the session before is under way when the answers come.
        if a.ready(now) {
            assert_eq!(send(&mut a, &mut b, now), Opened::Packet(60));
            assert_eq!(send(&mut b, &mut a, now), Opened::Packet(60));
        }
        assert!(matches!(a.open(&rb, &mut out, now), Opened::Established(_)));
        assert!(matches!(b.open(&ra, &mut out, now), Opened::Established(_)));
        let current = (a.current, b.current);
        for _ in 0..3 {
            assert_eq!(send(&mut a, &mut b, now), Opened::Packet(60));
            assert_eq!(send(&mut b, &mut a, now), Opened::Packet(60));
        }
        assert_eq!((a.current, b.current), current);
        now += REKEY_AFTER;
    }
}

#[test]
fn initiations_whose_answers_are_lost_leave_the_session_in_use() {
    let Pair { mut a, mut b, mut now } = pair();
    handshake(&mut a, &mut b, now);
    assert_eq!(send(&mut b, &mut a, now), Opened::Packet(60));
    for _ in 0..40 {
        now += Duration::from_secs(1);
        let init = a.make_initiation(now).expect("spaced");
        assert!(matches!(b.open(&init, &mut [0; 256], now), Opened::Response(_)));
        assert_eq!(send(&mut b, &mut a, now), Opened::Packet(60));
        assert_eq!(send(&mut a, &mut b, now), Opened::Packet(60));
    }
}

#[test]
fn a_slow_answer_takes_no_newer_sessions_place() {
    let Pair { mut a, mut b, mut now } = pair();
    let mut out = [0; 256];
    let slow = a.initiate(now).expect("first");
    let Opened::Response(len) = b.open(&slow, &mut out, now) else { panic!("no response") };
    let slow = out[..len].to_vec();
    let mut newest = Vec::new();
    for _ in 0..10 {
        now += Duration::from_millis(200);
        let init = b.make_initiation(now).expect("spaced");
        let Opened::Response(len) = a.open(&init, &mut out, now) else { panic!("no response") };
        newest = out[..len].to_vec();
    }
    assert!(matches!(a.open(&slow, &mut out, now), Opened::Established(_)));
    assert!(matches!(b.open(&newest, &mut out, now), Opened::Established(_)));
    assert_eq!(send(&mut b, &mut a, now), Opened::Packet(60), "the newest answer's session is there");
    assert_eq!(send(&mut a, &mut b, now), Opened::Packet(60));
}

#[test]
fn expired_keys_are_forgotten_while_nobody_answers_and_old_initiations_stay_old() {
    let Pair { mut a, mut b, now } = pair();
    let old = a.initiate(now).expect("first");
    let mut out = [0; 256];
    assert!(matches!(b.open(&old, &mut out, now), Opened::Response(_)));
    let later = now + REJECT_AFTER;
    assert!(b.initiate(later).is_some() && b.sessions.iter().all(Option::is_none));
    let mut again = Tunnel::new(&identity(9), identity(7).public.to_bytes(), 6, 4, later);
    again.remember(b.newest_timestamp());
    assert_eq!(again.open(&old, &mut out, later), Opened::Duplicate);
}

#[test]
fn a_clock_that_was_set_back_makes_no_old_timestamps() {
    let now = Instant::now();
    let b = identity(9);
    let mut theirs = Tunnel::new(&b, identity(7).public.to_bytes(), 6, 4, now);
    let mut consumed = |wall, at| {
        let a = Identity::new([7; 32], wall, now);
        let init = Tunnel::new(&a, b.public.to_bytes(), 5, 3, at).initiate(at).expect("first");
        theirs.open(&init, &mut [0; 256], at)
    };
    let wall = UnixTime::from_secs(1_800_000_000);
    assert!(matches!(consumed(wall, now), Opened::Response(_)));
    let later = now + Duration::from_secs(1);
    assert_eq!(consumed(wall.offset_millis(-1001), later), Opened::Duplicate);
    assert!(matches!(consumed(wall, later), Opened::Response(_)));
}

#[test]
fn a_peer_that_does_not_answer_is_retried_soon_then_every_five_seconds_for_ninety() {
    let Pair { mut a, now, .. } = pair();
    assert_eq!((0..MAX_WAITING + 6).map(|_| a.wait(&packet(), now)).sum::<usize>(), 6);
    assert!(a.initiate(now).is_some());
    assert!(a.initiate(now + Duration::from_millis(499)).is_none(), "not yet");
    let mut times = vec![0];
    let (gave_up, at) = loop {
        let at = a.deadline();
        match a.handle_timeout(at) {
            Due::Initiate => {
                assert!(a.initiate(at).is_some(), "due and allowed");
                times.push((at - now).as_millis());
            }
            other @ (Due::Nothing | Due::Keepalive | Due::GaveUp(_) | Due::Idle) => break (other, at),
        }
    };
    assert_eq!(gave_up, Due::GaveUp(MAX_WAITING));
    let pauses: Vec<u128> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (n, pause) in pauses.iter().enumerate() {
        let least = [500, 1000, 2000].get(n).copied().unwrap_or(5000);
        assert!((least..=least + least / 15).contains(pause), "pause {n} of {pauses:?}");
    }
    assert!((90..96).contains(&(at - now).as_secs()));
    assert_eq!(a.handle_timeout(a.deadline()), Due::Idle);
}

#[test]
fn a_peer_that_may_learn_of_us_any_moment_is_asked_five_times_a_second() {
    let Pair { mut a, now, .. } = pair();
    a.be_eager(now + Duration::from_secs(3));
    assert!(a.initiate(now).is_some());
    let mut sent = 0;
    while a.deadline() < now + Duration::from_secs(3) {
        let at = a.deadline();
        assert_eq!(a.handle_timeout(at), Due::Initiate);
        assert!(a.initiate(at).is_some());
        sent += 1;
    }
    assert!((13..=15).contains(&sent), "{sent}");
    let last = a.deadline();
    assert!(a.initiate(last).is_some());
    assert!(a.deadline() - last >= Duration::from_millis(500), "patient from then on");
}

#[test]
fn a_new_path_hastens_an_attempt_but_not_without_end() {
    let Pair { mut a, mut b, now } = pair();
    assert!(a.hasten(now).is_none(), "nothing to hasten");
    let first = a.initiate(now).expect("first");
    assert!(a.hasten(now + Duration::from_millis(30)).is_none(), "too soon after the first");
    assert_eq!(a.deadline(), now + MIN_SPACING, "but as soon as it may");
    let at = now + MIN_SPACING;
    assert_eq!(a.handle_timeout(at), Due::Initiate);
    let second = a.initiate(at).expect("second");
    assert_ne!(first, second);
    let mut out = [0; 256];
    let later = at + Duration::from_secs(1);
    let third = a.hasten(later).expect("at once");
    let Opened::Response(len) = b.open(&third, &mut out, later) else { panic!("no response") };
    let response = out[..len].to_vec();
    assert!(matches!(a.open(&response, &mut [0; 256], later), Opened::Established(_)));
    assert!(a.hasten(later + MIN_SPACING).is_none(), "answered");

    let mut now = later + Duration::from_secs(10);
    assert!(a.initiate(now).is_some());
    let hastened = (0..100).filter(|_| {
        now += MIN_SPACING;
        a.hasten(now).is_some()
    });
    assert_eq!(hastened.count(), usize::from(MAX_HASTENED));
}

#[test]
fn only_the_newest_initiations_response_counts_and_a_slow_path_gets_the_time_it_needs() {
    let Pair { mut a, mut b, now } = pair();
    let round_trip = Duration::from_millis(450);
    a.be_eager(now + Duration::from_secs(60));
    // What is under way: initiations to `b`, responses to `a`, with their times of arrival.
    let mut responses = VecDeque::new();
    let mut answer = |init: [u8; INITIATION_LEN], at: Instant| {
        let mut out = [0; 256];
        let Opened::Response(len) = b.open(&init, &mut out, at) else { panic!("no response") };
        (out[..len].to_vec(), at + round_trip)
    };
    responses.push_back(answer(a.initiate(now).expect("first"), now));
    let (mut ignored, mut sent) = (0, 1);
    let established = loop {
        let arrival = responses.front().map(|(_, at)| *at);
        if let Some(at) = arrival.filter(|at| *at <= a.deadline()) {
            let (response, _) = responses.pop_front().expect("there is one");
            match a.open(&response, &mut [0; 256], at) {
                Opened::Established(_) => break at,
                Opened::Duplicate => ignored += 1,
                other @ (Opened::Packet(_)
                | Opened::Keepalive
                | Opened::Response(_)
                | Opened::Cookie
                | Opened::TooMany
                | Opened::Unreadable
                | Opened::Rejected) => panic!("{other:?}"),
            }
            continue;
        }
        let at = a.deadline();
        assert_eq!(a.handle_timeout(at), Due::Initiate);
        responses.push_back(answer(a.initiate(at).expect("due"), at));
        sent += 1;
    };
    assert!(responses.is_empty(), "nothing newer is under way that would end this session");
    assert_eq!((ignored, sent), (2, 3));
    assert!(established - now < round_trip * 2, "{:?}", established - now);
    assert_eq!(send(&mut a, &mut b, established), Opened::Packet(60));
}

#[test]
fn a_response_that_was_held_up_puts_no_try_off() {
    let Pair { mut a, mut b, now } = pair();
    let first = a.initiate(now).expect("first");
    let mut at = now;
    for _ in 0..3 {
        at = a.deadline();
        assert!(a.initiate(at).is_some());
    }
    a.be_eager(at + Duration::from_secs(9));
    at += Duration::from_millis(300);
    assert!(a.hasten(at).is_some());
    let due = a.deadline();
    let mut out = [0; 256];
    let Opened::Response(len) = b.open(&first, &mut out, at) else { panic!("no response") };
    let response = out[..len].to_vec();
    assert_eq!(a.open(&response, &mut [0; 256], at), Opened::Duplicate);
    assert_eq!(a.deadline(), due, "a peer that stood still answers sooner from then on");
}

#[test]
fn received_data_is_acknowledged_after_ten_seconds_and_silence_is_noticed_after_fifteen() {
    let Pair { mut a, mut b, now } = pair();
    handshake(&mut a, &mut b, now);
    assert_eq!(send(&mut a, &mut b, now), Opened::Packet(60));
    assert_eq!(b.deadline(), now + KEEPALIVE);
    assert_eq!(b.handle_timeout(b.deadline()), Due::Keepalive);
    let silence = a.deadline() - now;
    assert!(silence >= Duration::from_secs(15) && silence < Duration::from_millis(15_400));
    assert_eq!(a.handle_timeout(a.deadline()), Due::Initiate);
}

#[test]
fn a_replayed_initiation_is_rejected_and_a_flood_has_to_prove_its_address() {
    let [identity, peer] = [9, 7].map(identity);
    let now = Instant::now();
    let mut a = Tunnel::new(&peer, identity.public.to_bytes(), 5, 3, now);
    let mut b = Tunnel::new(&identity, peer.public.to_bytes(), 6, 4, now);
    let init = a.initiate(now).expect("first");
    assert_eq!(identity.initiator(&init), Some(peer.public.to_bytes()));
    assert!(matches!(b.open(&init, &mut [0; 256], now), Opened::Response(_)));
    assert_eq!(b.open(&init, &mut [0; 256], now), Opened::Duplicate);

    let from = IpAddr::from([192, 0, 2, 1]);
    let mut reply = [0; 256];
    assert!(identity.is_addressed(&init) && !peer.is_addressed(&init));
    let Proof::Cookie(len) = identity.proof(from, &init, &mut reply) else { panic!("no cookie") };
    assert_eq!(a.open(&reply[..len], &mut [0; 256], now), Opened::Cookie);
    let proven = a.initiate(now + REKEY_TIMEOUT).expect("second");
    assert_eq!(identity.proof(from, &proven, &mut reply), Proof::Proven);
    let elsewhere = identity.proof(IpAddr::from([192, 0, 2, 2]), &proven, &mut reply);
    assert!(matches!(elsewhere, Proof::Cookie(_)));
    let mut bad = proven;
    bad[20] ^= 1;
    assert_eq!(identity.proof(from, &bad, &mut reply), Proof::Malformed);
}

#[test]
fn handshakes_of_one_peer_are_spaced_and_responses_to_one_attempt_are_few() {
    let Pair { mut a, mut b, now } = pair();
    handshake(&mut a, &mut b, now);
    let soon = now + MIN_SPACING;
    let again = a.make_initiation(soon).expect("another");
    assert_eq!(b.open(&again, &mut [0; 256], now + Duration::from_millis(19)), Opened::Duplicate);
    let mut out = [0; 256];
    let Opened::Response(len) = b.open(&again, &mut out, soon) else { panic!("no response") };
    let mut forged = out[..len].to_vec();
    forged[40] ^= 1;
    let tried = (0..100).filter(|_| a.open(&forged, &mut [0; 256], soon) != Opened::TooMany).count();
    assert_eq!(tried, RESPONSES.burst as usize);
    let later = soon + Duration::from_secs(1);
    assert!(matches!(a.open(&out[..len], &mut [0; 256], later), Opened::Established(_)));
}
