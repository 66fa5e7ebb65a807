use serde_json::{Value, json};

use super::*;

const WALL: UnixTime = UnixTime::from_secs(1_800_000_000);

fn message(value: Value) -> MapResponse {
    serde_json::from_value(value).unwrap()
}

fn apply(map: &mut NetMap, value: Value) -> NetMapChange {
    map.apply(&mut message(value), WALL).unwrap()
}

fn node(id: u64) -> Value {
    json!({"ID": id, "StableID": format!("n{id}"), "Name": format!("n{id}.ts.example."),
        "Key": format!("nodekey:{id:064x}"), "Addresses": [format!("100.64.0.{id}/32")],
        "AllowedIPs": [format!("100.64.0.{id}/32")], "HomeDERP": 1})
}

fn session() -> NetMap {
    let mut map = NetMap::new();
    let first = json!({"Node": node(1), "PacketFilters": {"base": [{"SrcIPs": ["*"]}]}});
    assert!(map.apply(&mut message(first), WALL).unwrap().session);
    map
}

fn sources(map: &NetMap) -> Option<Vec<String>> {
    map.packet_filter().map(|_| map.rules().flat_map(|rule| rule.decoded().src_ips).collect())
}

#[test]
fn the_first_message_must_contain_this_node() {
    let mut map = NetMap::new();
    assert_eq!(map.apply(&mut message(json!({"Domain": "d"})), WALL), Err(ApplyError::FirstWithoutNode));
    assert!(map.self_node().is_none() && map.domain().is_empty());
    assert!(apply(&mut map, json!({"KeepAlive": true})).keep_alive);
    assert!(apply(&mut map, json!({"Node": node(1)})).self_changed);
}

#[test]
fn an_outage_keeps_the_map_and_a_new_session_replaces_it() {
    let mut map = session();
    map.begin_session();
    assert!(map.packet_filter().is_some());
    let change = apply(&mut map, json!({"Node": node(1)}));
    assert!(change.session && change.filter_changed && !change.self_changed);
    assert_eq!(map.packet_filter(), None, "the new session brought no filter: drop everything");
}

#[test]
fn keepalives_carry_only_a_few_things() {
    let mut map = session();
    let value = json!({"KeepAlive": true, "PingRequest": {"URL": "u"}, "Domain": "d", "Health": ["sick"]});
    let change = apply(&mut map, value);
    assert!(change.keep_alive && !change.health_changed);
    assert_eq!((change.ping_request.unwrap().url.as_str(), map.domain()), ("u", ""));
}

#[test]
fn the_way_to_the_server_stays_until_replaced() {
    let mut map = session();
    let plan = json!({"ControlDialPlan": {"Candidates": [{"IP": "192.0.2.1", "DialTimeoutSec": 3}]}});
    assert!(map.apply(&mut message(plan.clone()), WALL).unwrap().dial_plan_changed);
    assert!(!map.apply(&mut message(plan), WALL).unwrap().dial_plan_changed);
    assert!(!map.apply(&mut message(json!({})), WALL).unwrap().dial_plan_changed);
    assert_eq!(map.dial_plan().candidates.len(), 1);
    // Also in a keepalive.
    let none = json!({"KeepAlive": true, "ControlDialPlan": {"Candidates": null}});
    assert!(map.apply(&mut message(none), WALL).unwrap().dial_plan_changed);
    assert!(map.dial_plan().candidates.is_empty());
}

#[test]
fn a_lock_is_known_from_its_head_until_it_is_disabled() {
    let mut map = session();
    for (value, locked) in [
        (json!({}), false),
        (json!({"TKAInfo": {"Head": "abc"}}), true),
        (json!({"TKAInfo": null}), true),
        (json!({"TKAInfo": {"Disabled": true}}), false),
        (json!({"TKAInfo": {"Head": "abc"}}), true),
        (json!({"TKAInfo": {"Head": "abc", "Disabled": true}}), false),
    ] {
        map.apply(&mut message(value.clone()), WALL).unwrap();
        assert_eq!(map.is_locked(), locked, "{value}");
    }
}

#[test]
fn filter_chunks() {
    let mut map = session();
    let rule = |source: &str| json!([{"SrcIPs": [source]}]);
    assert_eq!(sources(&map), Some(vec!["*".into()]));
    let mut step = |value: Value| {
        map.apply(&mut message(value), WALL).unwrap();
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
fn the_servers_clock_counts_from_a_minute_on() {
    let mut map = session();
    let at = |ms: i64| MapResponse {
        control_time: Some(WALL.offset_millis(ms)),
        keep_alive: true,
        ..Default::default()
    };
    map.apply(&mut at(59_000), WALL).unwrap();
    assert_eq!(map.control_time(WALL), WALL);
    map.apply(&mut at(-7_200_000), WALL).unwrap();
    assert_eq!(map.control_time(WALL), WALL.offset_millis(-7_200_000));
}

#[test]
fn derp_map_parts_merge() {
    let mut map = session();
    let regions = json!({"DERPMap": {"Regions": {"1": {"RegionID": 1}, "2": null}, "HomeParams": {"RegionScore": {"1": 0.5}}}});
    assert!(map.apply(&mut message(regions), WALL).unwrap().derp_changed);
    assert_eq!(map.derp_map().iter().count(), 1);
    let keep = json!({"DERPMap": {"Regions": null, "HomeParams": {}}});
    assert!(!map.apply(&mut message(keep), WALL).unwrap().derp_changed);
    assert!(
        map.apply(&mut message(json!({"DERPMap": {"Regions": {"7": {"RegionID": 7}}}})), WALL)
            .unwrap()
            .derp_changed
    );
    assert_eq!(map.derp_map().iter().map(|r| r.0.0).collect::<Vec<_>>(), [7]);
}

#[test]
fn health_and_messages() {
    let mut map = session();
    let mut step = |value: Value| {
        map.apply(&mut message(value), WALL).unwrap();
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
    let mut map = session();
    let change =
        map.apply(&mut message(json!({"Domain": "d", "DNSConfig": {"Proxied": true}})), WALL).unwrap();
    assert!(change.dns_changed);
    map.apply(&mut message(json!({"Domain": "", "DNSConfig": null})), WALL).unwrap();
    assert_eq!((map.domain(), map.dns().unwrap().proxied), ("d", true));
}
