use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const WALL: UnixTime = UnixTime::from_secs(1_800_000_000);

fn message(value: Value) -> MapResponse {
    serde_json::from_value(value).unwrap()
}

fn node(id: u64) -> Value {
    json!({"ID": id, "StableID": format!("n{id}"), "Name": format!("n{id}.ts.example."),
        "Key": format!("nodekey:{id:064x}"), "Addresses": [format!("100.64.0.{id}/32")],
        "AllowedIPs": [format!("100.64.0.{id}/32")], "HomeDERP": 1})
}

fn session(peers: Value) -> NetMap {
    let mut map = NetMap::new();
    let first = json!({"Node": node(1), "Peers": peers, "PacketFilters": {"base": [{"SrcIPs": ["*"]}]}});
    assert!(map.apply(message(first), WALL).unwrap().session);
    map
}

fn ids(map: &NetMap) -> Vec<u64> {
    map.peers().map(|peer| peer.id.0).collect()
}

fn sources(map: &NetMap) -> Option<Vec<String>> {
    map.packet_filter().map(|_| map.rules().flat_map(|rule| rule.src_ips.clone()).collect())
}

#[test]
fn the_first_message_must_contain_this_node() {
    let mut map = NetMap::new();
    assert_eq!(map.apply(message(json!({"Peers": [node(2)]})), WALL), Err(ApplyError::FirstWithoutNode));
    assert_eq!(ids(&map), [] as [u64; 0]);
    assert!(map.apply(message(json!({"KeepAlive": true})), WALL).is_ok());
    assert!(map.apply(message(json!({"Node": node(1)})), WALL).unwrap().self_changed);
}

#[test]
fn an_outage_keeps_the_map_and_a_new_session_replaces_it() {
    let mut map = session(json!([node(2), node(3)]));
    map.begin_session();
    assert_eq!(ids(&map), [2, 3]);
    let change = map.apply(message(json!({"Node": node(1), "Peers": [node(3), node(4)]})), WALL).unwrap();
    assert_eq!(ids(&map), [3, 4]);
    assert_eq!(change.changed, [NodeId(4)]);
    assert_eq!(change.removed.iter().map(|n| n.id.0).collect::<Vec<_>>(), [2]);
    assert_eq!(map.packet_filter(), None, "the new session brought no filter: drop everything");
}

#[test]
fn a_first_message_without_peers_means_none() {
    let mut map = session(json!([node(2)]));
    map.begin_session();
    let change = map.apply(message(json!({"Node": node(1)})), WALL).unwrap();
    assert_eq!((ids(&map).len(), change.removed.len()), (0, 1));
}

#[test]
fn a_first_message_is_judged_by_the_same_rules() {
    let mut map = session(json!([node(2)]));
    map.begin_session();
    let both =
        json!({"Node": node(1), "Peers": [node(2), node(3)], "PeersRemoved": [3], "PeersChanged": [node(4)]});
    map.apply(message(both), WALL).unwrap();
    assert_eq!(ids(&map), [2, 3], "Peers silences the deltas beside it");
    map.begin_session();
    map.apply(message(json!({"Node": node(1), "PeersChanged": [node(4)]})), WALL).unwrap();
    assert_eq!(ids(&map), [4], "what was not mentioned is gone");
}

#[test]
fn the_way_to_the_server_stays_until_replaced() {
    let mut map = session(json!([]));
    let plan = json!({"ControlDialPlan": {"Candidates": [{"IP": "192.0.2.1", "DialTimeoutSec": 3}]}});
    assert!(map.apply(message(plan.clone()), WALL).unwrap().dial_plan_changed);
    assert!(!map.apply(message(plan), WALL).unwrap().dial_plan_changed);
    assert!(!map.apply(message(json!({})), WALL).unwrap().dial_plan_changed);
    assert_eq!(map.dial_plan().candidates.len(), 1);
    // Also in a keepalive.
    let none = json!({"KeepAlive": true, "ControlDialPlan": {"Candidates": null}});
    assert!(map.apply(message(none), WALL).unwrap().dial_plan_changed);
    assert!(map.dial_plan().candidates.is_empty());
}

#[test]
fn a_lock_is_known_from_its_head_until_it_is_disabled() {
    let mut map = session(json!([]));
    for (value, locked) in [
        (json!({}), false),
        (json!({"TKAInfo": {"Head": "abc"}}), true),
        (json!({"TKAInfo": null}), true),
        (json!({"TKAInfo": {"Disabled": true}}), false),
        (json!({"TKAInfo": {"Head": "abc"}}), true),
        (json!({"TKAInfo": {"Head": "abc", "Disabled": true}}), false),
    ] {
        map.apply(message(value.clone()), WALL).unwrap();
        assert_eq!(map.is_locked(), locked, "{value}");
    }
}

#[test]
fn later_empty_peers_mean_unchanged() {
    let mut map = session(json!([node(2)]));
    for value in [json!({"Peers": []}), json!({"Peers": null}), json!({})] {
        let change = map.apply(message(value), WALL).unwrap();
        assert_eq!((ids(&map), change.changed.len()), (vec![2], 0));
    }
}

#[test]
fn peers_replace_and_silence_the_deltas_beside_them() {
    let mut map = session(json!([node(2), node(3)]));
    let both = json!({"Peers": [node(5)], "PeersRemoved": [5], "PeersChanged": [node(6)]});
    map.apply(message(both), WALL).unwrap();
    assert_eq!(ids(&map), [5]);
}

#[test]
fn deltas_apply_in_the_protocols_order() {
    let mut map = session(json!([node(2), node(3)]));
    let change = map
        .apply(
            message(json!({
                "PeersChangedPatch": [{"NodeID": 2, "DERPRegion": 9}, {"NodeID": 77, "DERPRegion": 9}],
                "OnlineChange": {"2": true, "88": true},
                "PeersChanged": [node(2), node(4)],
                "PeersRemoved": [2, 3, 99],
            })),
            WALL,
        )
        .unwrap();
    assert_eq!(ids(&map), [2, 4], "removed first, then added again");
    let peer = map.peer(NodeId(2)).unwrap();
    assert_eq!((peer.home_derp.0, peer.online), (9, Some(true)), "patched last");
    assert_eq!(change.changed, [NodeId(2), NodeId(4)]);
    assert_eq!(change.removed.iter().map(|n| n.id.0).collect::<Vec<_>>(), [3], "2 is not gone");
    assert_eq!(change.ignored, 2, "two unknown peers named");
}

#[test]
fn patches_change_what_they_name() {
    let mut map = session(json!([node(2)]));
    let patch = |value: Value| message(json!({"PeersChangedPatch": [value]}));
    let key = format!("nodekey:{:064x}", 0xabc);
    let disco = format!("discokey:{:064x}", 0xdef);
    map.apply(
        patch(json!({"NodeID": 2, "Key": key, "DiscoKey": disco, "Endpoints": ["192.0.2.1:7"], "Cap": 120,
            "KeyExpiry": "2030-01-01T00:00:00Z", "Online": false})),
        WALL,
    )
    .unwrap();
    let peer = map.peer(NodeId(2)).unwrap();
    assert_eq!((peer.key.to_string(), peer.disco_key.to_string()), (key, disco));
    assert_eq!((peer.endpoints.len(), peer.cap, peer.online), (1, 120, Some(false)));
    assert!(peer.key_expiry.is_some());
    assert_eq!(peer.home_derp.0, 1, "not named, not changed");
    map.apply(patch(json!({"NodeID": 2, "Endpoints": [], "KeyExpiry": "0001-01-01T00:00:00Z"})), WALL)
        .unwrap();
    let peer = map.peer(NodeId(2)).unwrap();
    assert_eq!((peer.endpoints.len(), peer.key_expiry), (0, None));
}

#[test]
fn an_unchanged_peer_is_not_reported() {
    let mut map = session(json!([node(2)]));
    let change = map.apply(message(json!({"PeersChanged": [node(2)]})), WALL).unwrap();
    assert!(change.changed.is_empty());
}

#[test]
fn filter_chunks() {
    let mut map = session(json!([]));
    let rule = |source: &str| json!([{"SrcIPs": [source]}]);
    assert_eq!(sources(&map), Some(vec!["*".into()]));
    let mut step = |value: Value| {
        map.apply(message(value), WALL).unwrap();
        sources(&map)
    };
    assert_eq!(step(json!({"PacketFilter": rule("1")})), Some(vec!["1".into()]), "base is replaced");
    assert_eq!(step(json!({"PacketFilters": {"a": rule("0"), "z": rule("9")}})).unwrap(), ["0", "1", "9"]);
    assert_eq!(step(json!({"PacketFilters": {"a": null}})).unwrap(), ["1", "9"]);
    assert_eq!(step(json!({"PacketFilter": null})).unwrap(), ["1", "9"], "null changes nothing");
    assert_eq!(step(json!({"PacketFilters": {"*": null, "b": rule("5")}})).unwrap(), ["5"]);
    assert_eq!(step(json!({"PacketFilters": {"b": null}})).unwrap(), [] as [&str; 0], "empty drops, too");
}

#[test]
fn keepalives_carry_only_a_few_things() {
    let mut map = session(json!([node(2)]));
    let change = map
        .apply(message(json!({"KeepAlive": true, "PingRequest": {"URL": "u"}, "PeersRemoved": [2]})), WALL)
        .unwrap();
    assert_eq!(change.ping_request.unwrap().url, "u");
    assert_eq!(ids(&map), [2]);
}

#[test]
fn the_servers_clock_counts_from_a_minute_on() {
    let mut map = session(json!([]));
    let at = |ms: i64| MapResponse {
        control_time: Some(WALL.offset_millis(ms)),
        keep_alive: true,
        ..Default::default()
    };
    map.apply(at(59_000), WALL).unwrap();
    assert_eq!(map.control_time(WALL), WALL);
    map.apply(at(-7_200_000), WALL).unwrap();
    assert_eq!(map.control_time(WALL), WALL.offset_millis(-7_200_000));
}

#[test]
fn derp_map_parts_merge() {
    let mut map = session(json!([]));
    let regions = json!({"DERPMap": {"Regions": {"1": {"RegionID": 1}, "2": null}, "HomeParams": {"RegionScore": {"1": 0.5}}}});
    assert!(map.apply(message(regions), WALL).unwrap().derp_changed);
    assert_eq!(map.derp_map().iter().count(), 1);
    let keep = json!({"DERPMap": {"Regions": null, "HomeParams": {}}});
    assert!(!map.apply(message(keep), WALL).unwrap().derp_changed);
    assert!(
        map.apply(message(json!({"DERPMap": {"Regions": {"7": {"RegionID": 7}}}})), WALL)
            .unwrap()
            .derp_changed
    );
    assert_eq!(map.derp_map().iter().map(|r| r.0.0).collect::<Vec<_>>(), [7]);
}

#[test]
fn health_and_messages() {
    let mut map = session(json!([]));
    let mut step = |value: Value| {
        map.apply(message(value), WALL).unwrap();
        map.health().map(|m| format!("{}|{}", m.title, m.text)).collect::<Vec<_>>()
    };
    assert_eq!(step(json!({"Health": ["sick"]})), ["sick|"]);
    assert_eq!(step(json!({"Health": null})), ["sick|"]);
    assert_eq!(step(json!({"DisplayMessages": {"a": {"Title": "T", "Text": "text"}}})), ["sick|", "T|text"]);
    assert_eq!(step(json!({"Health": []})), ["T|text"]);
    assert_eq!(step(json!({"DisplayMessages": {"*": null, "b": {"Title": "T"}}})), ["T|"]);
}

#[test]
fn dns_and_domain_stay_until_replaced() {
    let mut map = session(json!([]));
    let change = map.apply(message(json!({"Domain": "d", "DNSConfig": {"Proxied": true}})), WALL).unwrap();
    assert!(change.dns_changed);
    map.apply(message(json!({"Domain": "", "DNSConfig": null})), WALL).unwrap();
    assert_eq!((map.domain(), map.dns().unwrap().proxied), ("d", true));
}

/// The peers as a plain reading of the rules gives them, for comparison.
fn model(
    peers: &mut BTreeMap<u64, bool>,
    first: bool,
    full: &[u64],
    removed: &[u64],
    changed: &[u64],
    online: &[u64],
) {
    if first || !full.is_empty() {
        peers.clear();
        peers.extend(full.iter().map(|id| (*id, false)));
    }
    if full.is_empty() {
        peers.retain(|id, _| !removed.contains(id));
        peers.extend(changed.iter().map(|id| (*id, false)));
        for id in online {
            peers.entry(*id).and_modify(|online| *online = true);
        }
    }
}

proptest! {
    #[test]
    fn fuzz_sequences_of_deltas(
        steps in proptest::collection::vec(
            (any::<bool>(), prop::option::weighted(0.2, id_list()), id_list(), id_list(), id_list()), 1..12)
    ) {
        let (mut map, mut expected) = (NetMap::new(), BTreeMap::new());
        let mut first = true;
        for (restart, full, removed, changed, online) in steps {
            if restart {
                map.begin_session();
                first = true;
            }
            let full = full.unwrap_or_default();
            let before = ids(&map);
            let nodes = |ids: &[u64]| ids.iter().map(|id| node(*id)).collect::<Vec<_>>();
            let online_change: Value = online.iter().map(|id| (id.to_string(), json!(true))).collect();
            let change = map.apply(message(json!({
                "Node": node(1), "Peers": nodes(&full), "PeersRemoved": removed, "PeersChanged": nodes(&changed),
                "OnlineChange": online_change,
            })), WALL).unwrap();
            model(&mut expected, first, &full, &removed, &changed, &online);
            first = false;
            let online = |peer: &Node| (peer.id.0, peer.online == Some(true));
            prop_assert_eq!(map.peers().map(online).collect::<BTreeMap<_, _>>(), expected.clone());
            prop_assert!(change.changed.is_sorted_by(|a, b| a < b), "each once, in order");
            prop_assert!(change.changed.iter().all(|id| map.peer(*id).is_some()));
            let mut gone = change.removed.iter().map(|node| node.id.0).collect::<Vec<_>>();
            gone.sort_unstable();
            let vanished: Vec<_> = before.into_iter().filter(|id| !expected.contains_key(id)).collect();
            prop_assert_eq!(gone, vanished);
        }
    }
}

fn id_list() -> impl Strategy<Value = Vec<u64>> {
    proptest::collection::btree_set(2u64..9, 0..4).prop_map(|ids| ids.into_iter().collect())
}
