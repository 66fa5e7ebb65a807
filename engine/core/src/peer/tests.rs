use std::collections::BTreeMap;

use ipnet::IpNet;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::netmap::NetMap;
use crate::tailcfg::MapResponse;

const WALL: UnixTime = UnixTime::from_secs(1_800_000_000);

fn node(id: u64, key: u8, addresses: &[&str]) -> Node {
    let nets: Vec<IpNet> = addresses.iter().map(|a| a.parse().expect("a net")).collect();
    Node {
        id: NodeId(id),
        key: NodePublic::from_bytes([key; 32]),
        disco_key: DiscoPublic::from_bytes([key; 32]),
        addresses: nets.clone(),
        allowed_ips: nets,
        ..Node::default()
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

#[test]
fn peers_are_found_by_everything_and_gone_when_removed() {
    let mut table = PeerTable::default();
    let now = Instant::now();
    let a = table.upsert(&node(1, 1, &["100.64.0.1/32", "fd7a::1/128"]), WALL, now).slot;
    let b = table.upsert(&node(2, 2, &["100.64.0.2/32", "10.1.2.3/32"]), WALL, now).slot;
    assert_eq!(table.by_ip(ip("fd7a::1")), Some(a));
    assert_eq!(table.by_ip(ip("10.1.2.3")), Some(b));
    assert_eq!(table.by_key(&NodePublic::from_bytes([2; 32])), Some(b));
    assert_eq!(table.by_disco(&DiscoPublic::from_bytes([1; 32])), Some(a));

    // A new key and address take the place of the old ones.
    table.upsert(&node(1, 3, &["100.64.0.3/32"]), WALL, now);
    assert_eq!(table.by_key(&NodePublic::from_bytes([1; 32])), None);
    assert_eq!((table.by_ip(ip("100.64.0.1")), table.by_ip(ip("100.64.0.3"))), (None, Some(a)));

    assert!(table.remove(NodeId(2)).is_some());
    assert!(table.remove(NodeId(2)).is_none());
    assert_eq!((table.by_ip(ip("10.1.2.3")), table.len()), (None, 1));
    let c = table.upsert(&node(9, 9, &["100.64.0.9/32"]), WALL, now).slot;
    assert_eq!(c, b, "the place is used again");
}

#[test]
fn an_address_that_moved_to_another_peer_stays_there() {
    let mut table = PeerTable::default();
    let now = Instant::now();
    table.upsert(&node(1, 1, &["100.64.0.1/32"]), WALL, now);
    let b = table.upsert(&node(2, 2, &["100.64.0.1/32"]), WALL, now).slot;
    table.remove(NodeId(1));
    assert_eq!(table.by_ip(ip("100.64.0.1")), Some(b));
}

#[test]
fn only_addresses_that_control_allows_are_a_peers() {
    let mut table = PeerTable::default();
    let now = Instant::now();
    let mut peer = node(1, 1, &["100.64.0.1/32", "100.64.0.2/32"]);
    peer.allowed_ips = vec!["100.64.0.1/32".parse().expect("a net"), "0.0.0.0/8".parse().expect("a net")];
    let a = table.upsert(&peer, WALL, now).slot;
    assert_eq!(table.by_ip(ip("100.64.0.1")), Some(a));
    assert_eq!(table.by_ip(ip("100.64.0.2")), None);
    assert_eq!(table.by_ip(ip("0.1.1.1")), None);
}

/// Keeps a map and its peers, as an engine does.
struct Map {
    map: NetMap,
    peers: PeerTable,
}

/// What a message changed, by number.
#[derive(Debug, Default)]
struct Change {
    any: bool,
    removed: Vec<u64>,
    ignored: u64,
    unknown: u64,
}

fn message(value: Value) -> MapResponse {
    serde_json::from_value(value).expect("a message")
}

fn wire(id: u64) -> Value {
    json!({"ID": id, "StableID": format!("n{id}"), "Name": format!("n{id}.ts.example."),
        "Key": format!("nodekey:{id:064x}"), "Addresses": [format!("100.64.0.{id}/32")],
        "AllowedIPs": [format!("100.64.0.{id}/32")], "HomeDERP": 1})
}

impl Map {
    fn new() -> Self {
        Self { map: NetMap::new(), peers: PeerTable::default() }
    }

    fn session(peers: Value) -> Self {
        let mut map = Self::new();
        map.apply(json!({"Node": wire(1), "Peers": peers}));
        map
    }

    fn begin_session(&mut self) {
        self.map.begin_session();
        self.peers.forget_message();
    }

    fn apply(&mut self, value: Value) -> Change {
        let mut message = message(value);
        let first = self.map.apply(&mut message, WALL).expect("a good message").session;
        let mut changes = PeerChanges::default();
        self.peers.finish(&message, first, WALL, Instant::now(), &mut changes);
        while self.peers.is_sweeping() {
            self.peers.sweep(&mut changes);
        }
        self.change(changes)
    }

    fn take(&mut self, list: PeerList, nodes: Value) -> Change {
        let nodes: Vec<Node> = serde_json::from_value(nodes).expect("nodes");
        let mut changes = PeerChanges::default();
        self.peers.take(list, &nodes, WALL, Instant::now(), &mut changes);
        self.change(changes)
    }

    fn change(&self, changes: PeerChanges) -> Change {
        self.check();
        let mut removed: Vec<u64> = changes.removed.iter().map(|(id, ..)| id.0).collect();
        removed.sort_unstable();
        let any = !changes.changed.is_empty() || !removed.is_empty();
        Change { any, removed, ignored: changes.ignored, unknown: changes.unknown }
    }

    /// Every look-up finds every peer, and the counts are right.
    fn check(&self) {
        let bytes = self.peers.iter().map(|(slot, peer)| {
            assert_eq!(self.peers.slot(peer.id), Some(slot));
            assert_eq!(self.peers.by_key(&peer.key), Some(slot));
            assert!(peer.hosts().all(|ip| self.peers.by_ip(ip) == Some(slot)));
            for at in peer.facts.endpoints() {
                assert!(
                    self.peers.by_endpoint(at).is_none_or(|slot| self.peers.get(slot).unwrap().is_at(at))
                );
            }
            peer.facts.as_bytes().len()
        });
        assert_eq!(
            (bytes.sum::<usize>(), self.peers.iter().count()),
            (self.peers.fact_bytes, self.peers.len())
        );
    }

    fn ids(&self) -> Vec<u64> {
        let mut ids: Vec<u64> = self.peers.iter().map(|(_, peer)| peer.id.0).collect();
        ids.sort_unstable();
        ids
    }

    fn peer(&self, id: u64) -> &Peer {
        self.peers.slot(NodeId(id)).and_then(|slot| self.peers.get(slot)).expect("a peer")
    }
}

#[test]
fn an_outage_keeps_the_peers_and_a_new_session_replaces_them() {
    let mut map = Map::session(json!([wire(2), wire(3)]));
    map.begin_session();
    assert_eq!(map.ids(), [2, 3]);
    let change = map.apply(json!({"Node": wire(1), "Peers": [wire(3), wire(4)]}));
    assert_eq!((map.ids(), change.removed, change.any), (vec![3, 4], vec![2], true));
    map.begin_session();
    assert!(!map.apply(json!({"Node": wire(1), "Peers": [wire(3), wire(4)]})).any, "nothing is new");
}

#[test]
fn a_first_message_without_peers_means_none() {
    let mut map = Map::session(json!([wire(2)]));
    map.begin_session();
    let change = map.apply(json!({"Node": wire(1)}));
    assert_eq!((map.ids().len(), change.removed), (0, vec![2]));
}

#[test]
fn a_first_message_is_judged_by_the_same_rules() {
    let mut map = Map::session(json!([wire(2)]));
    map.begin_session();
    let both =
        json!({"Node": wire(1), "Peers": [wire(2), wire(3)], "PeersRemoved": [3], "PeersChanged": [wire(4)]});
    map.apply(both);
    assert_eq!(map.ids(), [2, 3], "Peers silences the deltas beside it");
    map.begin_session();
    let change = map.apply(json!({"Node": wire(1), "PeersChanged": [wire(4)], "OnlineChange": {"2": true}}));
    assert_eq!((map.ids(), change.unknown), (vec![4], 1), "what was not mentioned is gone");
}

#[test]
fn later_empty_peers_mean_unchanged() {
    let mut map = Map::session(json!([wire(2)]));
    for value in [json!({"Peers": []}), json!({"Peers": null}), json!({})] {
        assert!(!map.apply(value).any);
        assert_eq!(map.ids(), [2]);
    }
}

#[test]
fn peers_replace_and_silence_the_deltas_beside_them() {
    let mut map = Map::session(json!([wire(2), wire(3)]));
    map.apply(json!({"Peers": [wire(5)], "PeersRemoved": [5], "PeersChanged": [wire(6)]}));
    assert_eq!(map.ids(), [5]);
}

#[test]
fn deltas_apply_in_the_protocols_order() {
    let mut map = Map::session(json!([wire(2), wire(3)]));
    let change = map.apply(json!({
        "PeersChangedPatch": [{"NodeID": 2, "DERPRegion": 9}, {"NodeID": 77, "DERPRegion": 9}],
        "OnlineChange": {"2": true, "88": true},
        "PeersChanged": [wire(2), wire(4)],
        "PeersRemoved": [2, 3, 99],
    }));
    assert_eq!(map.ids(), [2, 4], "removed first, then added again");
    assert_eq!((map.peer(2).home.0, map.peer(2).online), (9, Some(true)), "patched last");
    assert_eq!(change.removed, [3], "2 is not gone");
    assert_eq!((change.ignored, change.unknown), (0, 2), "two unknown peers named");
}

#[test]
fn patches_change_what_they_name() {
    let mut map = Map::session(json!([wire(2)]));
    let key = format!("nodekey:{:064x}", 0xabc);
    let disco = format!("discokey:{:064x}", 0xdef);
    map.apply(json!({"PeersChangedPatch": [{"NodeID": 2, "Key": key, "DiscoKey": disco,
        "Endpoints": ["192.0.2.1:7"], "CapMap": {"c": null}, "KeyExpiry": "2030-01-01T00:00:00Z",
        "Online": false}]}));
    let peer = map.peer(2);
    assert_eq!((peer.key.to_string(), peer.disco.to_string()), (key, disco));
    assert_eq!((peer.facts.endpoints().count(), peer.caps.has("c"), peer.online), (1, true, Some(false)));
    assert!(peer.key_expiry.is_some() && !peer.is_expired(WALL));
    assert_eq!((peer.home.0, peer.facts.name()), (1, "n2.ts.example."), "not named, not changed");
    map.apply(json!({"PeersChangedPatch": [
        {"NodeID": 2, "Endpoints": [], "CapMap": {}, "KeyExpiry": "0001-01-01T00:00:00Z"}]}));
    let peer = map.peer(2);
    assert_eq!((peer.facts.endpoints().count(), peer.caps.has("c"), peer.key_expiry), (0, false, None));
}

#[test]
fn an_unchanged_peer_is_not_reported() {
    let mut map = Map::session(json!([wire(2)]));
    assert!(!map.apply(json!({"PeersChanged": [wire(2)], "OnlineChange": {}})).any);
}

#[test]
fn a_message_that_was_passed_over_in_the_end_removes_nobody_later() {
    let mut map = Map::session(json!([wire(2), wire(3)]));
    map.take(PeerList::All, json!([wire(4)]));
    map.peers.forget_message();
    assert_eq!(map.apply(json!({"OnlineChange": {"2": true}})).removed, [0; 0]);
    assert_eq!(map.ids(), [2, 3, 4]);
    map.apply(json!({"Peers": [wire(3)]}));
    assert_eq!(map.ids(), [3]);
}

#[test]
fn a_message_that_was_cut_off_removes_nobody() {
    let mut map = Map::session(json!([wire(2), wire(3)]));
    map.begin_session();
    map.take(PeerList::All, json!([wire(4)]));
    map.begin_session();
    map.apply(json!({"Node": wire(1), "PeersChanged": [wire(2), wire(3)]}));
    assert_eq!(map.ids(), [2, 3], "and who came with it is gone with the next first message");
}

#[test]
fn what_is_stored_is_restored() {
    let mut map = Map::session(json!([wire(2), {
        "ID": 3, "Key": format!("nodekey:{:064x}", 3), "DiscoKey": format!("discokey:{:064x}", 3),
        "Name": "other.", "Addresses": ["100.64.0.3/32", "fd7a::3/128"], "AllowedIPs": ["100.64.0.3/32"],
        "Endpoints": ["192.0.2.1:7"], "CapMap": {"b": null, "a": [1]}, "KeyExpiry": "2030-01-01T00:00:00Z",
        "Online": false, "IsJailed": true, "IsWireGuardOnly": true, "Expired": true}]));
    let mut bytes = Vec::new();
    map.peers.iter().for_each(|(_, peer)| peer.store(&mut bytes));
    let mut again = Map::new();
    let mut rest = bytes.as_slice();
    while again.peers.restore(&mut rest, Instant::now()).is_some() {}
    assert!(rest.is_empty());
    again.check();
    assert!(again.ids() == [2, 3] && [2, 3].iter().all(|id| map.peer(*id).says_the_same(again.peer(*id))));
    map.apply(json!({"PeersRemoved": [2]}));
    assert_eq!(map.ids(), [3]);
}

#[test]
fn many_peers_come_and_go_without_leaving_memory_behind() {
    let mut map = Map::new();
    let node = |n: u32| {
        let mut key = [1; 32];
        key[..4].copy_from_slice(&n.to_le_bytes());
        let net = IpNet::from(IpAddr::from(std::net::Ipv4Addr::from(0x6440_0000 + n)));
        Node {
            id: NodeId(n.into()),
            key: NodePublic::from_bytes(key),
            addresses: vec![net],
            allowed_ips: vec![net],
            ..Node::default()
        }
    };
    let message = |nodes: Vec<Node>| MapResponse { peers: nodes, ..MapResponse::default() };
    let mut changes = PeerChanges::default();
    map.peers.finish(&message((1..=5000).map(node).collect()), true, WALL, Instant::now(), &mut changes);
    while map.peers.is_sweeping() {
        map.peers.sweep(&mut changes);
    }
    map.check();
    // Only some places are looked at in one go.
    map.peers.finish(&message(vec![node(3)]), true, WALL, Instant::now(), &mut changes);
    assert!(map.peers.len() > 4000 && map.peers.is_sweeping());
    assert_eq!(map.peers.known(NodeId(4999)), None, "it only waits to go");
    while map.peers.is_sweeping() {
        map.peers.sweep(&mut changes);
    }
    assert_eq!((map.ids(), map.peers.slots.capacity() < 100), (vec![3], true));
    map.check();
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
            (any::<(bool, bool, bool)>(), prop::option::weighted(0.2, id_list()), id_list(), id_list(), id_list()),
            1..12)
    ) {
        let (mut map, mut expected) = (Map::new(), BTreeMap::new());
        let mut first = true;
        for ((restart, pieces, all_first), full, removed, changed, online) in steps {
            if restart {
                map.begin_session();
                first = true;
            }
            let full = full.unwrap_or_default();
            let before = map.ids();
            let nodes = |ids: &[u64]| json!(ids.iter().map(|id| wire(*id)).collect::<Vec<_>>());
            let online_change: Value = online.iter().map(|id| (id.to_string(), json!(true))).collect();
            let mut message = json!({"Node": wire(1), "PeersRemoved": removed, "OnlineChange": online_change});
            if pieces {
                let mut lists = [(PeerList::All, &full), (PeerList::Changed, &changed)];
                if !all_first {
                    lists.reverse();
                }
                for (list, ids) in lists {
                    for piece in ids.chunks(2) {
                        map.take(list, nodes(piece));
                    }
                }
            } else {
                message["Peers"] = nodes(&full);
                message["PeersChanged"] = nodes(&changed);
            }
            let change = map.apply(message);
            model(&mut expected, first, &full, &removed, &changed, &online);
            first = false;
            let seen: BTreeMap<u64, bool> =
                map.peers.iter().map(|(_, peer)| (peer.id.0, peer.online == Some(true))).collect();
            prop_assert_eq!(&seen, &expected);
            // Who was only in a silenced list comes and goes within the message.
            let gone: Vec<u64> = change.removed.into_iter().filter(|id| before.contains(id)).collect();
            let vanished: Vec<_> = before.into_iter().filter(|id| !expected.contains_key(id)).collect();
            prop_assert_eq!(gone, vanished);
        }
    }

    #[test]
    fn fuzz_restore_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut peers = PeerTable::default();
        let mut rest = bytes.as_slice();
        while peers.restore(&mut rest, Instant::now()).is_some() {}
    }
}

fn id_list() -> impl Strategy<Value = Vec<u64>> {
    proptest::collection::btree_set(2u64..9, 0..4).prop_map(|ids| ids.into_iter().collect())
}
