//! What control asks of a node, and how the node judges its own life.
#![allow(clippy::wildcard_enum_match_arm, reason = "a test looks for one event among all")]

mod sim;

use std::net::IpAddr;

use podtether_core::batch::RegionId;
use podtether_core::engine::{Event, PathView, PingError, PingKind, PingResult};
use podtether_core::tailcfg::{MapResponse, PingRequest, PingResponse, TkaInfo};
use sim::{Nat, World, ms, secs};

fn world() -> World {
    let mut world = World::new(7);
    for nat in [Nat::None, Nat::None] {
        let n = world.add(nat);
        world.boot(n, false);
    }
    world.run_for(secs(5));
    world
}

fn results(world: &World) -> Vec<PingResult> {
    let pong = |event: &Event| if let Event::Pong(result) = event { Some((**result).clone()) } else { None };
    world.nodes[0].events.iter().filter_map(pong).collect()
}

#[test]
fn pings_by_disco_and_tsmp_are_answered_by_every_path() {
    let mut world = world();
    let peer = IpAddr::V4(world.nodes[1].tailnet);
    let received = |world: &World| (world.nodes[0].received.len(), world.nodes[1].received.len());
    let before = received(&world);
    // No path is known: by the relay. Then one is.
    for relayed in [true, false] {
        world.nodes[0].events.clear();
        let ids = [PingKind::Disco, PingKind::Tsmp].map(|kind| (world.ping(0, peer, kind), kind));
        world.run_for(secs(1));
        let results = results(&world);
        assert_eq!(results.len(), 2, "{results:?}");
        for (id, kind) in ids {
            let result = results.iter().find(|r| r.id == id).unwrap();
            let reply = result.outcome.unwrap();
            assert_eq!((result.kind, result.ip, result.peer_ip), (kind, peer, Some(peer)));
            assert!(
                !result.peer.is_empty() && reply.latency > ms(1) && reply.latency < secs(1),
                "{result:?}"
            );
            if kind == PingKind::Disco {
                assert_eq!(matches!(reply.path, PathView::Relay(RegionId(_))), relayed, "{reply:?}");
                assert_eq!(matches!(reply.path, PathView::Direct(..)), !relayed, "{reply:?}");
            }
        }
    }
    assert!(world.direct(0, 1), "who pings gets a direct path");
    assert_eq!(received(&world), before, "nothing of it reaches a pod");
}

#[test]
fn a_ping_without_an_answer_ends_after_five_seconds_and_others_at_once() {
    let mut world = world();
    let peer = IpAddr::V4(world.nodes[1].tailnet);
    let own = IpAddr::V4(world.nodes[0].tailnet);
    let silent = world.ping(0, peer, PingKind::Icmp);
    world.ping(0, own, PingKind::Disco);
    world.ping(0, "100.100.1.1".parse().unwrap(), PingKind::Tsmp);
    let many: Vec<_> = (0..20).map(|_| world.ping(0, peer, PingKind::Icmp)).collect();
    world.run_for(secs(1));
    let errors: Vec<_> = results(&world).iter().map(|r| r.outcome.unwrap_err()).collect();
    assert_eq!(errors[..2], [PingError::OwnAddress, PingError::NoPeer]);
    assert_eq!(errors[2..], [PingError::TooMany; 5]);
    world.run_for(ms(4100));
    let all = results(&world);
    assert_eq!(all.len(), 3 + many.len());
    let first = all.iter().find(|r| r.id == silent).unwrap();
    assert_eq!(first.outcome, Err(PingError::NoAnswer), "nobody is behind the other node");
}

fn answers(world: &World) -> Vec<(String, bool, Option<String>)> {
    let answer = |event: &Event| match event {
        Event::ControlAnswer(a) => {
            let body = a.body.as_ref().map(|body| String::from_utf8_lossy(body).into_owned());
            Some((a.url.clone(), a.over_session, body))
        }
        _ => None,
    };
    world.nodes[0].events.iter().filter_map(answer).collect()
}

#[test]
fn control_is_answered_once_for_each_url() {
    let mut world = world();
    let peer = IpAddr::V4(world.nodes[1].tailnet);
    let mut ask = |url: &str, noise, types: &str, ip, payload: &str| {
        let request = PingRequest {
            url: url.into(),
            url_is_noise: noise,
            types: types.into(),
            ip,
            payload: payload.into(),
            ..PingRequest::default()
        };
        for _ in 0..2 {
            let message = MapResponse {
                keep_alive: true,
                ping_request: Some(request.clone()),
                ..MapResponse::default()
            };
            world.tell(0, message);
        }
        world.run_for(secs(6));
        let got = answers(&world);
        world.nodes[0].events.clear();
        got
    };
    assert_eq!(ask("", false, "", None, ""), []);
    assert_eq!(ask("http://c/1", false, "", None, ""), [("http://c/1".into(), false, None)]);
    assert_eq!(ask("http://c/2", true, "", None, ""), [("http://c/2".into(), true, None)]);
    // POST /echo HTTP/1.0, two bytes: never outside the session, whatever is asked for.
    let echo = "UE9TVCAvZWNobyBIVFRQLzEuMA0KQ29udGVudC1MZW5ndGg6IDINCg0KaGk=";
    let got = ask("http://c/3", false, "c2n", None, echo);
    assert_eq!((got.len(), got[0].1), (1, true));
    assert!(got[0].2.as_ref().unwrap().ends_with("\r\n\r\nhi"), "{got:?}");
    let got = ask("http://c/4", false, "c2n", None, "no base64!");
    assert!(got[0].2.as_ref().unwrap().starts_with("HTTP/1.1 400"), "{got:?}");
    assert_eq!(ask("http://c/5", true, "disco", None, ""), [], "no address to ping");
    assert_eq!(ask("http://c/6", true, "teleport", Some(peer), ""), []);
    let got = ask("http://c/7", true, "disco,TSMP,ICMP,peerapi", Some(peer), "");
    let mut read: Vec<PingResponse> =
        got.iter().map(|a| serde_json::from_str(a.2.as_ref().unwrap()).unwrap()).collect();
    read.sort_by(|a, b| a.r#type.cmp(&b.r#type));
    let kinds: Vec<_> =
        read.iter().map(|r| (r.r#type.as_str(), r.err.is_empty(), r.latency_seconds > 0.0)).collect();
    let expected =
        [("ICMP", false, false), ("TSMP", true, true), ("disco", true, true), ("peerapi", false, false)];
    assert_eq!(kinds, expected, "{read:?}");
}

#[test]
fn a_wrong_clock_is_told_and_does_not_end_the_node() {
    let mut world = world();
    let hours = |h: i64| world.wall().offset_millis(h * 3_600_000);
    let (ahead, expiry) = (hours(5), hours(2));
    // Two hours to live by our clock, which is five hours behind.
    let mut node = world.nodes[0].record.clone();
    node.key_expiry = Some(expiry);
    world.tell(0, MapResponse { node: Some(node.clone()), ..MapResponse::default() });
    world.run_for(secs(1));
    assert!(!world.nodes[0].events.contains(&Event::KeyExpired));
    world.tell(0, MapResponse { keep_alive: true, control_time: Some(ahead), ..MapResponse::default() });
    world.run_for(secs(1));
    assert!(world.nodes[0].events.contains(&Event::KeyExpired), "control's clock counts");
    let health = world.engine(0).status().health;
    assert!(health.iter().any(|h| h.title.contains("clock is 5 h 0 min behind the")), "{health:?}");

    // The other way round: ahead by our clock, so that the key looks expired and is not.
    let (wall, behind) = (world.wall(), world.wall().offset_millis(-5 * 3_600_000));
    node.key_expiry = Some(wall.offset_millis(-3_600_000));
    world.nodes[0].events.clear();
    world.tell(0, MapResponse { node: Some(node), control_time: Some(behind), ..MapResponse::default() });
    world.run_for(secs(1));
    assert!(!world.nodes[0].events.contains(&Event::KeyExpired));
    let health = world.engine(0).status().health;
    assert!(health.iter().any(|h| h.title.contains("ahead of")), "{health:?}");
    // Nor after a restart, before control has spoken.
    world.run_for(secs(3));
    world.kill(0);
    world.boot(0, true);
    world.run_for(ms(1));
    assert!(!world.nodes[0].events.contains(&Event::KeyExpired));
    world.tell(0, MapResponse { keep_alive: true, control_time: Some(wall), ..MapResponse::default() });
    world.run_for(secs(1));
    let health = world.engine(0).status().health;
    assert!(!health.iter().any(|h| h.title.contains("clock")), "{health:?}");
}

#[test]
fn a_lock_without_our_signature_is_told() {
    let mut world = world();
    let locked = |world: &mut World| {
        let health = world.engine(0).status().health;
        health.iter().any(|h| h.title.contains("tailnet lock") && h.text.contains("nodekey:"))
    };
    assert!(!locked(&mut world));
    let lock = Some(TkaInfo { head: "abc".into(), disabled: false });
    world.tell(0, MapResponse { tka_info: lock, ..MapResponse::default() });
    world.run_for(secs(1));
    assert!(locked(&mut world));
    let mut node = world.nodes[0].record.clone();
    node.signed = true;
    world.tell(0, MapResponse { node: Some(node), ..MapResponse::default() });
    world.run_for(secs(1));
    assert!(!locked(&mut world));
}

#[test]
fn a_node_without_traffic_is_told_from_one_whose_peer_does_not_answer() {
    let mut world = world();
    let gauges = |world: &mut World| {
        let now = world.now;
        world.engine(0).gauges(now)
    };
    let idle = gauges(&mut world);
    assert_eq!((idle.peers, idle.peers_direct, idle.peers_relay, idle.peers_unanswered), (1, 0, 0, 0));
    assert!(idle.home_connected && idle.rtt.is_none(), "{idle:?}");
    assert!(idle.home_latency.is_some_and(|latency| latency > ms(1) && latency < secs(1)), "{idle:?}");

    for seq in 0..20 {
        world.send(0, 1, seq);
        world.run_for(ms(200));
    }
    let busy = gauges(&mut world);
    assert_eq!((busy.peers_direct, busy.peers_unanswered), (1, 0));
    let [least, sum, most] = busy.rtt.unwrap();
    assert!(least == sum && sum == most && most > ms(1) && most < secs(1), "{busy:?}");

    // WireGuard suspects the session after 15 s of silence, and an unanswered handshake counts 5 s later.
    world.kill(1);
    for seq in 20..50 {
        world.send(0, 1, seq);
        world.run_for(secs(1));
    }
    let silent = gauges(&mut world);
    assert_eq!((silent.peers_direct, silent.peers_relay, silent.peers_unanswered), (0, 0, 1));
    assert!(silent.home_connected && silent.rtt.is_none(), "the node itself is connected: {silent:?}");
}
