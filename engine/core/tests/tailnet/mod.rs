//! A tailnet of any number of peers, seen from one engine.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;

use podtether_core::batch::{Outbox, RegionId};
use podtether_core::engine::{Config, ControlEvent, Engine};
use podtether_core::key::{DiscoPrivate, DiscoPublic, NodePrivate, NodePublic};
use podtether_core::tailcfg::{
    DnsConfig, DnsRecord, FilterRule, MapResponse, NetPortRange, Node, NodeId, PeerChange, PortRange,
    UnixTime, UserProfile,
};
use serde_json::json;

/// The peer with this number, as a server describes one: two addresses, five endpoints, capabilities.
pub fn peer(n: u32) -> Node {
    let [_, _, high, low] = n.to_be_bytes();
    let mut key = [7; 32];
    key[..4].copy_from_slice(&n.to_be_bytes());
    let (key, disco) = (NodePublic::from_bytes(key), DiscoPublic::from_bytes(key));
    let own = json!([format!("100.65.{high}.{low}/32"), format!("fd7a:115c:a1e0::{n:x}/128")]);
    serde_json::from_value(json!({
        "ID": n + 1000,
        "StableID": format!("n{n}CNTRL"),
        "Name": format!("production-web-frontend-{n}.tail1234.ts.net."),
        "User": 4321, "Key": key, "DiscoKey": disco,
        "KeyExpiry": "2030-01-01T00:00:00Z", "Created": "2024-01-01T00:00:00Z",
        "Addresses": own, "AllowedIPs": own,
        "Endpoints": ["192.0.2.9:41641", "10.1.2.3:41641", "172.17.0.1:41641", "[2001:db8::1]:41641",
            "[2001:db8::2]:41641"],
        "HomeDERP": 1, "Cap": 115, "Online": true, "MachineAuthorized": true, "Tags": ["tag:web", "tag:prod"],
        "CapMap": {"https://tailscale.com/cap/is-admin": null, "funnel": [1]},
        "Hostinfo": {"OS": "linux", "Hostname": format!("production-web-frontend-{n}"),
            "Services": [{"Proto": "peerapi4", "Port": 1}, {"Proto": "peerapi6", "Port": 2}]},
    }))
    .unwrap()
}

/// An engine in a tailnet of so many peers.
pub fn engine(peers: u32, now: Instant) -> Engine {
    let config = Config {
        node_key: NodePrivate::from_bytes([1; 32]),
        disco_key: DiscoPrivate::from_bytes([2; 32]),
        mtu: 1280,
        random_seed: [3; 32],
        standby: None,
        wall: UnixTime::from_secs(1_800_000_000),
        snapshot: None,
    };
    let mut engine = Engine::new(config, now);
    let own: ipnet::IpNet = "100.64.0.1/32".parse().unwrap();
    let to = NetPortRange { ip: "*".into(), ports: PortRange::ANY };
    let rule = FilterRule { src_ips: vec!["*".into()], dst_ports: vec![to], ..FilterRule::default() };
    let first = MapResponse {
        node: Some(Node {
            id: NodeId(1),
            key: NodePrivate::from_bytes([1; 32]).public(),
            name: "me.tail1234.ts.net.".into(),
            addresses: vec![own],
            allowed_ips: vec![own],
            ..Node::default()
        }),
        packet_filters: Some(BTreeMap::from([("base".to_owned(), Some(vec![rule.into()]))])),
        ..MapResponse::default()
    };
    apply(&mut engine, first, now);
    for from in (0..peers).step_by(64) {
        let nodes = (from..peers.min(from + 64)).map(peer).collect();
        apply(&mut engine, MapResponse { peers_changed: nodes, ..MapResponse::default() }, now);
    }
    assert_eq!(engine.gauges(now).peers, usize::try_from(peers).unwrap());
    engine
}

pub fn apply(engine: &mut Engine, message: MapResponse, now: Instant) {
    engine.handle_control(ControlEvent::Map(Box::new(message)), now, &mut Outbox::default());
    while engine.poll_event().is_some() {}
}

/// Makes the message of a turn.
pub type Delta = fn(u32) -> MapResponse;

/// The kinds of deltas that servers send; `turn` makes each differ from the one before.
pub const DELTAS: &[(&str, Delta)] = &[
    ("PeersChanged", |turn| {
        let mut node = peer(turn % 50);
        node.home_derp = RegionId(turn);
        MapResponse { peers_changed: vec![node], ..MapResponse::default() }
    }),
    ("PeersChangedPatch", |turn| {
        let port = u16::try_from(turn % 60_000).unwrap() + 1;
        let endpoints = vec![SocketAddr::from(([192, 0, 2, 1], port)); 5];
        let patch = PeerChange { endpoints: Some(endpoints), ..change(turn) };
        MapResponse { peers_changed_patch: vec![patch], ..MapResponse::default() }
    }),
    ("OnlineChange", |turn| {
        let online = (turn / 50).is_multiple_of(2);
        MapResponse { online_change: [(change(turn).node_id, online)].into(), ..MapResponse::default() }
    }),
    ("PeersRemoved+add", |turn| {
        let (gone, there) = (change(turn / 2).node_id, peer(turn / 2 % 50));
        match turn % 2 {
            0 => MapResponse { peers_removed: vec![gone], ..MapResponse::default() },
            _ => MapResponse { peers_changed: vec![there], ..MapResponse::default() },
        }
    }),
    ("UserProfiles", |turn| {
        let profile =
            UserProfile { id: turn.into(), login_name: "a@example.com".into(), ..UserProfile::default() };
        MapResponse { user_profiles: vec![profile], ..MapResponse::default() }
    }),
    ("PacketFilters", |turn| {
        let to = NetPortRange { ip: "*".into(), ports: PortRange { first: 80, last: 80 } };
        let from = format!("100.64.1.{}", turn % 250);
        let rule = FilterRule { src_ips: vec![from], dst_ports: vec![to], ..FilterRule::default() };
        let chunk = BTreeMap::from([("a".to_owned(), Some(vec![rule.into()]))]);
        MapResponse { packet_filters: Some(chunk), ..MapResponse::default() }
    }),
    ("DNS ExtraRecords", |turn| {
        let value = format!("100.64.1.{}", turn % 250);
        let record = DnsRecord { name: "x.tail1234.ts.net".into(), value, ..DnsRecord::default() };
        let dns = DnsConfig { proxied: true, extra_records: vec![record], ..DnsConfig::default() };
        MapResponse { dns_config: Some(dns), ..MapResponse::default() }
    }),
];

fn change(turn: u32) -> PeerChange {
    PeerChange { node_id: NodeId(u64::from(turn % 50) + 1000), ..PeerChange::default() }
}
