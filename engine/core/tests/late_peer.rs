//! A node mostly appears in the netmap before its relay does.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use podtether_core::batch::{Batch, Outbox, RegionId};
use podtether_core::engine::{Config, ControlEvent, DerpEvent, Engine};
use podtether_core::key::{DiscoPrivate, NodePrivate};
use podtether_core::tailcfg::{DerpMap, DerpNode, DerpRegion, MapResponse, Node, NodeId, UnixTime};

const REGION: RegionId = RegionId(1);
const INITIATION_LEN: usize = 148;

fn node(n: u8, home: RegionId) -> Node {
    let address = format!("100.64.0.{n}/32").parse().expect("a net");
    Node {
        id: NodeId(u64::from(n)),
        name: format!("n{n}.test."),
        key: NodePrivate::from_bytes([n; 32]).public(),
        disco_key: DiscoPrivate::from_bytes([n + 10; 32]).public(),
        addresses: vec![address],
        allowed_ips: vec![address],
        home_derp: home,
        ..Node::default()
    }
}

fn initiations(out: &Outbox) -> usize {
    out.derp.iter().filter(|(_, packet)| packet.len() == INITIATION_LEN && packet[0] == 1).count()
}

#[test]
fn what_was_sent_too_early_goes_again_when_the_peer_can_be_reached() {
    let start = Instant::now();
    let mut out = Outbox::default();
    let config = Config {
        node_key: NodePrivate::from_bytes([1; 32]),
        disco_key: DiscoPrivate::from_bytes([11; 32]),
        mtu: 1280,
        random_seed: [1; 32],
        standby: None,
        wall: UnixTime::from_secs(1_800_000_000),
        snapshot: None,
    };
    let mut engine = Engine::new(config, start);
    let server = DerpNode { region_id: REGION, host_name: "relay.test".into(), ..DerpNode::default() };
    let region = DerpRegion { region_id: REGION, nodes: vec![server], ..DerpRegion::default() };
    let derp_map = DerpMap { regions: Some(BTreeMap::from([(REGION, region)])), ..DerpMap::default() };
    engine.handle_control(ControlEvent::SessionStarted, start, &mut out);
    let map = MapResponse {
        node: Some(node(1, REGION)),
        peers: vec![node(2, RegionId(0))],
        derp_map: Some(derp_map),
        ..MapResponse::default()
    };
    engine.handle_control(ControlEvent::Map(Box::new(map)), start, &mut out);
    engine.handle_derp(REGION, DerpEvent::Connected, start, &mut out);
    out.clear();

    let mut packet = [0; 28];
    packet[0] = 0x45;
    packet[3] = 28;
    packet[8] = 64;
    packet[9] = 17;
    packet[12..16].copy_from_slice(&Ipv4Addr::new(100, 64, 0, 1).octets());
    packet[16..20].copy_from_slice(&Ipv4Addr::new(100, 64, 0, 2).octets());
    packet[25] = 8;
    let mut batch = Batch::new();
    batch.push((), &packet);
    engine.handle_tun(&mut batch, start, &mut out);
    assert_eq!(initiations(&out), 1, "by way of our own relay, where the peer is not yet");
    out.clear();

    let soon = start + Duration::from_millis(100);
    let told = |home| MapResponse { peers_changed: vec![node(2, home)], ..MapResponse::default() };
    engine.handle_control(ControlEvent::Map(Box::new(told(REGION))), soon, &mut out);
    assert_eq!(initiations(&out), 1, "again, and not only after five seconds");
    out.clear();
    engine.handle_control(ControlEvent::Map(Box::new(told(REGION))), soon, &mut out);
    assert_eq!(initiations(&out), 0, "news without a change");
}
