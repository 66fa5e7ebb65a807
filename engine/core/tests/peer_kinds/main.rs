//! Peers that are not plain members of the tailnet: known to each other by other addresses, jailed, expired,
//! without disco, speaking nothing but WireGuard, not vouched for, or shared in from elsewhere.

mod pair;
mod plain;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use pair::*;
use podtether_core::dns::{Action, Asked, Client};
use podtether_core::engine::{Decision, DropReason};
use podtether_core::filter::Rule;
use podtether_core::key::DiscoPublic;
use podtether_core::tailcfg::{
    DnsConfig, FilterRule, MapResponse, NetPortRange, NodeId, PeerChange, PortRange, UnixTime,
};

/// Node 1 is `MASK` to node 2, and does not know itself by that.
fn masked() -> Pair {
    let mut to_one = node(2);
    to_one.masq_v4 = Some(MASK);
    let mut to_two = node(1);
    to_two.addresses = vec![IpAddr::V4(MASK).into()];
    to_two.allowed_ips = to_two.addresses.clone();
    Pair::new([map(node(1), to_one), map(node(2), to_two)])
}

#[test]
fn a_masqueraded_node_keeps_its_own_address_in_its_own_eyes() {
    let mut pair = masked();
    let (ours, peer) = (tailnet(1), tailnet(2));
    pair.send(0, &udp(ours, 4000, peer, 53));
    assert_eq!(pair.take(1), [udp(MASK, 4000, peer, 53)]);
    pair.send(1, &udp(peer, 53, MASK, 4000));
    assert_eq!(pair.take(0), [udp(peer, 53, ours, 4000)]);
    pair.send(0, &tcp(ours, peer, 80, SYN));
    assert_eq!(pair.take(1), [tcp(MASK, peer, 80, SYN)]);
    // The peer's word that a packet did not arrive names the packet as this node sent it.
    let error =
        |dst, carried: Vec<u8>| packet(peer, dst, 1, &[&[3, 3, 0, 0, 0, 0, 0, 0][..], &carried].concat());
    pair.send(1, &error(MASK, udp(MASK, 4000, peer, 53)));
    assert_eq!(pair.take(0), [error(ours, udp(ours, 4000, peer, 53))]);
    assert_eq!(pair.drops(0, DropReason::Filter), 0);
}

#[test]
fn the_filter_sees_a_masqueraded_node_by_its_own_address() {
    let mut pair = masked();
    let (ours, peer) = (tailnet(1), tailnet(2));
    let only = |ip: &str| {
        let to = NetPortRange { ip: ip.into(), ports: PortRange { first: 22, last: 22 } };
        vec![FilterRule { src_ips: vec!["*".into()], dst_ports: vec![to], ..FilterRule::default() }.into()]
    };
    pair.tell(0, MapResponse { packet_filter: Some(only("100.64.0.1")), ..MapResponse::default() });
    pair.send(1, &tcp(peer, MASK, 22, SYN));
    assert_eq!(pair.take(0), [tcp(peer, ours, 22, SYN)]);
    assert_eq!(pair.why(0, peer, MASK, 22).decision, Decision::Accept);
    pair.tell(0, MapResponse { packet_filter: Some(only("100.99.0.1")), ..MapResponse::default() });
    pair.send(1, &tcp(peer, MASK, 22, SYN));
    assert_eq!(pair.take(0), Vec::<Vec<u8>>::new());
    assert_eq!(pair.drops(0, DropReason::Filter), 1);
    // The refusal comes from the address that the peer knows, or it would not believe it.
    assert_eq!(pair.engines[1].counters().rejects_received, 1);
    assert_eq!(pair.drops(1, DropReason::PeerSource), 0);
    let why = pair.why(1, peer, MASK, 22);
    assert_eq!((why.decision, why.reason), (Decision::RefusedByPeer, "acl"));
}

#[test]
fn a_jailed_peer_answers_and_opens_nothing() {
    let mut jailed = node(2);
    jailed.is_jailed = true;
    let mut pair = Pair::new([map(node(1), jailed), map(node(2), node(1))]);
    let (ours, peer) = (tailnet(1), tailnet(2));
    // Both know a way by now.
    pair.send(0, &udp(ours, 1, peer, 1));
    pair.send(1, &tcp(peer, ours, 22, SYN));
    pair.send(1, &udp(peer, 53, ours, 4000));
    assert!(pair.take(0).is_empty());
    assert_eq!(pair.drops(0, DropReason::Jailed), 2);
    assert_eq!(
        (pair.why(0, peer, ours, 22).decision, pair.why(0, peer, ours, 22).reason),
        (Decision::Drop, "jailed")
    );
    let why = pair.why(1, peer, ours, 22);
    assert_eq!((why.decision, why.reason), (Decision::RefusedByPeer, "shields_up"));
    pair.send(0, &udp(ours, 4000, peer, 53));
    pair.send(1, &udp(peer, 53, ours, 4000));
    assert_eq!(pair.take(0).len(), 1, "an answer");
    // Let out, it is as any other.
    pair.tell(0, MapResponse { peers_changed: vec![node(2)], ..MapResponse::default() });
    pair.send(1, &tcp(peer, ours, 22, SYN));
    assert_eq!(pair.take(0).len(), 1);
    let why = pair.why(0, peer, ours, 22);
    assert_eq!(
        (why.rule.map(|rule| rule.to_string()), why.peer),
        (Some("base/0".into()), Some("n2.test".into()))
    );
}

#[test]
fn a_peer_ends_when_its_key_expires_and_lives_again_when_that_is_put_off() {
    let mut pair = Pair::new([map(node(1), node(2)), map(node(2), node(1))]);
    let (ours, peer) = (tailnet(1), tailnet(2));
    pair.send(0, &udp(ours, 1, peer, 2));
    assert_eq!(pair.take(1).len(), 1);
    let at = |seconds| UnixTime::from_secs(WALL + seconds);
    let expiry = |at| {
        let change = PeerChange { node_id: NodeId(2), key_expiry: Some(at), ..PeerChange::default() };
        MapResponse { peers_changed_patch: vec![change], ..MapResponse::default() }
    };
    pair.tell(0, expiry(at(30)));
    pair.wait(Duration::from_secs(10));
    pair.send(0, &udp(ours, 1, peer, 2));
    assert_eq!(pair.take(1).len(), 1, "not yet");
    pair.wait(Duration::from_secs(25));
    pair.send(0, &udp(ours, 1, peer, 2));
    pair.send(1, &udp(peer, 1, ours, 2));
    assert!(pair.take(0).is_empty() && pair.take(1).is_empty(), "expired while it was in use");
    assert_eq!(pair.drops(0, DropReason::PeerExpired), 1);
    assert_eq!(pair.why(0, ours, peer, 2).reason, "peer_expired");
    pair.tell(0, expiry(at(3600)));
    pair.send(0, &udp(ours, 1, peer, 2));
    assert_eq!(pair.take(1).last(), Some(&udp(ours, 1, peer, 2)));
    // The server's clock counts: it is an hour and a half later there.
    let clock = MapResponse { keep_alive: true, control_time: Some(at(5400)), ..MapResponse::default() };
    pair.tell(0, clock);
    pair.wait(Duration::from_secs(1));
    pair.take(1);
    pair.send(0, &udp(ours, 1, peer, 2));
    assert!(pair.take(1).is_empty());
    assert_eq!(pair.drops(0, DropReason::PeerExpired), 2);
}

#[test]
fn without_a_disco_key_there_is_no_way_to_a_peer() {
    let mut mute = node(2);
    mute.disco_key = DiscoPublic::default();
    let mut pair = Pair::new([map(node(1), mute), map(node(2), node(1))]);
    pair.send(0, &udp(tailnet(1), 1, tailnet(2), 2));
    assert!(pair.take(1).is_empty());
    assert_eq!(pair.drops(0, DropReason::NoPath), 1);
    pair.tell(0, MapResponse { peers_changed: vec![node(2)], ..MapResponse::default() });
    pair.send(0, &udp(tailnet(1), 1, tailnet(2), 2));
    assert_eq!(pair.take(1).len(), 1, "it has one by now");
}

#[test]
fn rules_that_let_in_whom_nobody_vouches_for_are_all_discarded() {
    let mut unsigned = node(3);
    unsigned.unsigned_peer_api_only = true;
    let mut pair = Pair::new([map(node(1), node(2)), map(node(2), node(1))]);
    let (ours, peer) = (tailnet(1), tailnet(2));
    let knocks = |pair: &mut Pair| {
        pair.send(1, &tcp(peer, ours, 22, SYN));
        pair.take(0).len()
    };
    assert_eq!(knocks(&mut pair), 1);
    pair.tell(0, MapResponse { peers_changed: vec![unsigned.clone()], ..MapResponse::default() });
    assert_eq!(knocks(&mut pair), 0, "* lets node 3 in as well");
    assert_eq!(pair.why(0, peer, ours, 22).reason, "filter_discarded");
    assert!(format!("{:?}", pair.engines[0].status().health).contains("tailnet lock"));
    let narrow = MapResponse { packet_filter: Some(allow("100.64.0.2")), ..MapResponse::default() };
    pair.tell(0, narrow);
    assert_eq!(knocks(&mut pair), 1, "this rule does not");
    pair.tell(0, MapResponse { packet_filter: Some(allow("*")), ..MapResponse::default() });
    assert_eq!(knocks(&mut pair), 0);
    pair.tell(0, MapResponse { peers_removed: vec![NodeId(3)], ..MapResponse::default() });
    assert_eq!(knocks(&mut pair), 1);
}

#[test]
fn a_shared_in_peer_has_its_name_its_rules_and_its_capabilities() {
    let mut shared = node(2);
    shared.name = "db.other-tailnet.ts.net.".into();
    let mut rules = allow("cap:shared");
    rules.extend(
        serde_json::from_str::<Vec<Rule>>(
            r#"[{"SrcIPs":["100.64.0.2"],"CapGrant":[{"Dsts":["100.64.0.1/32"],"CapMap":{"example.com/app":[{"r":1}]}}]}]"#,
        )
        .expect("rules"),
    );
    let first = MapResponse {
        packet_filter: Some(rules),
        dns_config: Some(DnsConfig { proxied: true, ..DnsConfig::default() }),
        ..map(node(1), shared.clone())
    };
    let mut pair = Pair::new([first, map(node(2), node(1))]);
    let (ours, peer) = (tailnet(1), tailnet(2));
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["db", "other-tailnet", "ts", "net"] {
        query.extend(u8::try_from(label.len()));
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let client = Client { listener: 0, from: SocketAddr::new(ours.into(), 4000), stream: None };
    pair.engines[0].handle_dns(Asked { client, meant_for: None }, &query, pair.now);
    match pair.engines[0].poll_dns() {
        Some(Action::Reply { message, .. }) => assert!(message.ends_with(&peer.octets()), "{message:?}"),
        other => panic!("{other:?}"),
    }
    pair.send(1, &tcp(peer, ours, 22, SYN));
    assert!(pair.take(0).is_empty(), "it does not have the capability");
    shared.cap_map.insert("shared".into(), Vec::new());
    pair.tell(0, MapResponse { peers_changed: vec![shared], ..MapResponse::default() });
    pair.send(1, &tcp(peer, ours, 22, SYN));
    assert_eq!(pair.take(0).len(), 1, "it does now");
    let caps = pair.engines[0].peer_caps(peer.into());
    assert_eq!(serde_json::to_string(&caps).expect("JSON"), r#"{"example.com/app":[{"r":1}]}"#);
}

#[test]
fn a_peer_without_a_name_is_called_by_its_address() {
    let mut sharee = node(2);
    sharee.name = String::new();
    let mut pair = Pair::new([map(node(1), sharee), map(node(2), node(1))]);
    let (ours, peer) = (tailnet(1), tailnet(2));
    pair.send(1, &tcp(peer, ours, 22, SYN));
    assert_eq!(pair.take(0).len(), 1);
    assert_eq!(pair.why(0, peer, ours, 22).peer.as_deref(), Some("100.64.0.2"));
    let names: Vec<String> = pair.engines[0].peers(pair.now).into_iter().map(|peer| peer.name).collect();
    assert_eq!(names, ["100.64.0.2"]);
}

#[test]
fn the_addresses_of_two_peers_are_the_ones_of_who_is_left() {
    let mut pair = Pair::new([map(node(1), node(2)), map(node(2), node(1))]);
    let mut other = node(3);
    other.addresses = node(2).addresses;
    other.allowed_ips = node(2).allowed_ips;
    pair.tell(0, MapResponse { peers_changed: vec![other], ..MapResponse::default() });
    pair.tell(0, MapResponse { peers_removed: vec![NodeId(3)], ..MapResponse::default() });
    pair.send(0, &udp(tailnet(1), 1, tailnet(2), 2));
    assert_eq!(pair.take(1).len(), 1);
}
