use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

fn key(n: u8) -> String {
    format!("nodekey:{}", hex::encode([n; 32]))
}

/// A message with every field in use, in the servers' spelling.
fn full_message() -> Value {
    json!({
        "Node": {
            "ID": 7, "StableID": "n7CNTRL", "Name": "pod.tail.example.", "User": 3,
            "Key": key(7), "KeyExpiry": "2026-02-01T00:00:00Z", "Machine": format!("mkey:{}", "01".repeat(32)),
            "DiscoKey": format!("discokey:{}", "02".repeat(32)),
            "Addresses": ["100.64.0.7/32", "fd7a:115c:a1e0::7/128"],
            "AllowedIPs": ["100.64.0.7/32", "fd7a:115c:a1e0::7/128"],
            "Endpoints": ["192.0.2.7:41641", "[2001:db8::7]:41641"],
            "HomeDERP": 900, "Created": "2024-01-01T00:00:00.5Z", "Cap": 115,
            "Hostinfo": {"OS": "linux", "Hostname": "pod", "Services": [{"Proto": "peerapi4", "Port": 1}],
                "NetInfo": {"PreferredDERP": 900, "WorkingUDP": true, "DERPLatency": {"900-v4": 0.01}}},
            "Tags": ["tag:k8s-pod"], "MachineAuthorized": true, "Capabilities": ["https://tailscale.com/cap/ssh"],
            "CapMap": {"magicdns-aaaa": null, "https://tailscale.com/cap/file-sharing": [{"a": 1}]},
        },
        "DERPMap": {
            "HomeParams": {"RegionScore": {"900": 0.5}},
            "Regions": {"900": {"RegionID": 900, "RegionCode": "dev", "RegionName": "Dev", "Nodes": [
                {"Name": "900a", "RegionID": 900, "HostName": "derp.example", "IPv4": "192.0.2.1", "IPv6": "none",
                 "DERPPort": 8443, "STUNPort": -1, "InsecureForTests": false}]}, "901": null},
            "omitDefaultRegions": true,
        },
        "Peers": [{
            "ID": 8, "StableID": "n8", "Name": "other.tail.example.", "Key": key(8),
            "Addresses": ["100.64.0.8/32"], "DERP": "127.3.3.40:900", "Online": true,
            "LastSeen": "2024-01-01T00:00:00Z", "SelfNodeV4MasqAddrForThisPeer": "100.64.9.9",
            "IsJailed": false, "IsWireGuardOnly": false, "Expired": false, "UnsignedPeerAPIOnly": false,
            "PrimaryRoutes": ["10.0.0.0/8"],
        }],
        "PeersChanged": [], "PeersRemoved": [9],
        "PeersChangedPatch": [{"NodeID": 8, "DERPRegion": 900, "Endpoints": ["192.0.2.8:1"], "Online": true}],
        "PeerSeenChange": {"8": true}, "OnlineChange": {"8": false},
        "DNSConfig": {
            "Resolvers": [{"Addr": "https://dns.example/q", "BootstrapResolution": ["192.0.2.53"], "UseWithExitNode": true}],
            "Routes": {"corp.example.": [{"Addr": "10.0.0.53"}], "tail.example.": null},
            "Domains": ["tail.example"], "Proxied": true,
            "ExtraRecords": [{"Name": "x.tail.example", "Type": "A", "Value": "100.64.0.9"}],
        },
        "Domain": "example.com", "CollectServices": false,
        "PacketFilter": [{"SrcIPs": ["*"], "DstPorts": [{"IP": "*", "Ports": {"First": 0, "Last": 65535}}]}],
        "PacketFilters": {"base": [{"SrcIPs": ["100.64.0.8"], "IPProto": [6],
            "DstPorts": [{"IP": "100.64.0.7", "Bits": null, "Ports": {"First": 80, "Last": 80}}],
            "CapGrant": [{"Dsts": ["100.64.0.7/32"], "Caps": ["c"], "CapMap": {"d": [1]}}]}], "old": null},
        "UserProfiles": [{"ID": 3, "LoginName": "a@example.com", "DisplayName": "A"}],
        "Health": ["sick"], "DisplayMessages": {"m": {"Title": "t", "Text": "x", "Severity": "high"}, "*": null},
        "ControlTime": "2025-06-01T00:00:00Z",
        "PingRequest": {"URL": "https://c/ping?a=1\u{26}b=2", "URLIsNoise": true, "Types": "c2n", "IP": "100.64.0.8", "Payload": "R0VU"},
        "Debug": {"SleepSeconds": 2.5, "DisableLogTail": true, "Exit": 1},
        "ControlDialPlan": {"Candidates": [{"IP": "192.0.2.2", "DialStartDelaySec": 0.5, "Priority": 1}]},
        "SSHPolicy": {"rules": []}, "TKAInfo": {"Head": "x"}, "Unknown": [1, {"a": 2}],
    })
}

fn parse(value: &Value) -> serde_json::Result<MapResponse> {
    serde_json::from_str(&value.to_string())
}

#[test]
fn a_full_message_is_read() {
    let message = parse(&full_message()).unwrap();
    let node = message.node.unwrap();
    assert_eq!(
        (node.id, node.name.as_str(), node.home_derp),
        (NodeId(7), "pod.tail.example.", RegionId(900))
    );
    assert_eq!(node.addresses.len(), 2);
    assert_eq!(node.endpoints[1].port(), 41641);
    assert!(
        node.cap_map.contains_key("magicdns-aaaa")
            && node.cap_map.contains_key("https://tailscale.com/cap/ssh")
    );
    assert_eq!(node.cap_map["https://tailscale.com/cap/file-sharing"], [json!({"a": 1})]);
    assert_eq!(node.hostinfo.unwrap().net_info.unwrap().derp_latency["900-v4"], 0.01);

    let peer = &message.peers[0];
    assert_eq!(peer.allowed_ips, peer.addresses, "none means the addresses");
    assert_eq!(peer.home_derp, RegionId(900), "from the older form");
    assert_eq!(peer.masq_v4.unwrap().to_string(), "100.64.9.9");

    let derp = message.derp_map.unwrap();
    assert_eq!(derp.iter().map(|(id, _)| id.0).collect::<Vec<_>>(), [900], "the null region is gone");
    let server = &derp.region(RegionId(900)).unwrap().nodes[0];
    assert_eq!((server.relay_port(), server.stun_port(), server.ipv6.as_str()), (Some(8443), None, "none"));
    assert_eq!((derp.region_score(RegionId(900)), derp.region_score(RegionId(1))), (0.5, 1.0));

    let dns = message.dns_config.unwrap();
    assert!(dns.proxied && dns.routes["tail.example."].is_empty());
    assert_eq!(dns.routes["corp.example."][0].addr, "10.0.0.53");

    let filters = message.packet_filters.unwrap();
    assert_eq!(filters["old"], None);
    let rule = filters["base"].as_ref().unwrap()[0].decoded();
    assert_eq!(
        (rule.ip_proto.as_slice(), rule.dst_ports[0].ports),
        ([6].as_slice(), PortRange { first: 80, last: 80 })
    );
    assert_eq!(message.ping_request.unwrap().url, "https://c/ping?a=1&b=2");
    assert!(!message.online_change[&NodeId(8)]);
    assert_eq!(message.display_messages.unwrap()["*"], None);
    assert_eq!(message.control_time.unwrap().as_millis(), 1_748_736_000_000);
}

#[test]
fn gos_escapes_are_read() {
    let text = r#"{"PingRequest":{"URL":"https://c/?a=1\u0026b=\u003c"},"Domain":"\u00e9"}"#;
    let message: MapResponse = serde_json::from_str(text).unwrap();
    assert_eq!(
        (message.ping_request.unwrap().url.as_str(), message.domain.as_str()),
        ("https://c/?a=1&b=<", "é")
    );
}

#[test]
fn what_is_written_is_read_again() {
    let mut message = parse(&full_message()).unwrap();
    message.peers_changed = message.peers.clone();
    let again: MapResponse = serde_json::from_slice(&serde_json::to_vec(&message).unwrap()).unwrap();
    assert_eq!(again, message);
}

#[test]
fn nulls_stand_for_nothing() {
    let Value::Object(full) = full_message() else { panic!("an object") };
    let nulls: Value = full.keys().map(|name| (name.clone(), Value::Null)).collect();
    assert_eq!(parse(&nulls).unwrap(), MapResponse::default());
    for list in [&mut json!({"Node": full["Node"]})["Node"], &mut json!({"Node": full["Peers"][0]})["Node"]] {
        let Value::Object(node) = list.clone() else { panic!("an object") };
        for name in node.keys().filter(|name| !matches!(name.as_str(), "ID" | "Key")) {
            let mut node = node.clone();
            node[name] = Value::Null;
            assert_eq!(parse(&json!({"Peers": [node]})).unwrap().peers.len(), 1, "{name}");
        }
    }
}

#[test]
fn odd_elements_are_skipped_and_the_rest_kept() {
    let odd = json!({
        "Peers": [{"ID": 1}, {"ID": "x", "Key": key(1)}, 7, {"ID": 2, "Key": key(2),
            "Addresses": ["100.64.0.2/32", "nonsense", 5], "Endpoints": ["1.2.3.4:5", "[fe80::1%eth0]:1", ""],
            "Tags": ["a", null], "DiscoKey": "discokey:short", "Hostinfo": "odd", "CapMap": {"a": 5, "b": null}}],
        "PeersRemoved": [1, "2", -3], "OnlineChange": {"1": true, "x": true, "2": null},
        "PeersChangedPatch": [{"NodeID": 1, "Online": "odd"}, {"Online": true}],
        "DERPMap": {"Regions": {"1": {"RegionID": 1, "Nodes": [{"Name": 4, "HostName": "h"}, 5]}, "x": {}}},
    });
    let message = parse(&odd).unwrap();
    assert_eq!(message.peers.len(), 1);
    let peer = &message.peers[0];
    assert_eq!(
        (peer.addresses.len(), peer.endpoints.len(), peer.tags.as_slice()),
        (1, 1, ["a".to_owned()].as_slice())
    );
    assert!(peer.disco_key.is_zero() && peer.hostinfo.is_none());
    assert_eq!(peer.cap_map.keys().collect::<Vec<_>>(), ["b"]);
    assert_eq!(message.peers_removed, [NodeId(1)]);
    assert_eq!(message.online_change.len(), 1);
    assert_eq!(message.peers_changed_patch.len(), 1);
    assert_eq!(message.derp_map.unwrap().region(RegionId(1)).unwrap().nodes.len(), 1);
}

#[test]
fn a_rule_that_does_not_parse_never_widens_access() {
    let rule = |extra: Value| {
        let mut rule =
            json!({"SrcIPs": ["100.64.0.1"], "DstPorts": [{"IP": "*", "Ports": {"First": 1, "Last": 2}}]});
        rule.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let rules = parse(&json!({"PacketFilter": [rule]})).unwrap().packet_filter.unwrap();
        rules.iter().map(crate::filter::Rule::decoded).collect::<Vec<_>>()
    };
    assert_eq!(rule(json!({})).len(), 1);
    assert_eq!(rule(json!({"IPProto": null}))[0].ip_proto, [] as [i32; 0]);
    for dropped in
        [json!({"IPProto": ["tcp"]}), json!({"IPProto": 6}), json!({"SrcIPs": [1]}), json!({"SrcIPs": "*"})]
    {
        assert_eq!(rule(dropped.clone()).len(), 0, "{dropped}");
    }
    for narrowed in [
        json!({"DstPorts": [{"IP": "*"}]}),
        json!({"DstPorts": [{"IP": "*", "Ports": {"First": 1}}]}),
        json!({"DstPorts": [{"IP": "*", "Ports": {"First": 1, "Last": 70000}}]}),
        json!({"DstPorts": null}),
    ] {
        assert!(rule(narrowed.clone())[0].dst_ports.is_empty(), "{narrowed}");
    }
    let both = parse(&json!({"PacketFilter": null, "PacketFilters": {"base": null}})).unwrap();
    assert_eq!((both.packet_filter, both.packet_filters.unwrap()["base"].clone()), (None, None));
    assert_eq!(parse(&json!({"PacketFilter": []})).unwrap().packet_filter, Some(vec![]));
}

#[test]
fn what_restricts_a_peer_must_parse() {
    for field in ["Expired", "IsJailed", "IsWireGuardOnly", "UnsignedPeerAPIOnly", "KeyExpiry", "AllowedIPs"]
    {
        let peer = json!({"ID": 1, "Key": key(1), (field): "odd"});
        assert!(parse(&json!({"Peers": [peer]})).unwrap().peers.is_empty(), "{field}");
    }
    let unsigned = json!({"ID": 1, "Key": key(1), "Addresses": ["100.64.0.1/32"],
        "AllowedIPs": ["100.64.0.1/32", "0.0.0.0/0"], "UnsignedPeerAPIOnly": true});
    let peers = parse(&json!({"Peers": [unsigned]})).unwrap().peers;
    assert_eq!(peers[0].allowed_ips, peers[0].addresses);
    assert!(peers[0].is_jailed);
    let empty = json!({"ID": 1, "Key": key(1), "Addresses": ["100.64.0.1/32"], "AllowedIPs": []});
    assert!(parse(&json!({"Peers": [empty]})).unwrap().peers[0].allowed_ips.is_empty(), "empty is not none");
}

#[test]
fn expiry_is_judged_on_the_servers_clock() {
    let node = |value: Value| {
        let mut peer = json!({"ID": 1, "Key": key(1)});
        peer.as_object_mut().unwrap().extend(value.as_object().unwrap().clone());
        parse(&json!({"Peers": [peer]})).unwrap().peers[0].clone()
    };
    let noon: UnixTime = "2025-01-01T12:00:00Z".parse().unwrap();
    assert!(!node(json!({})).is_expired(noon));
    assert!(!node(json!({"KeyExpiry": "0001-01-01T00:00:00Z"})).is_expired(noon));
    assert!(!node(json!({"KeyExpiry": "2025-01-01T12:00:01Z"})).is_expired(noon));
    assert!(node(json!({"KeyExpiry": "2025-01-01T12:00:00Z"})).is_expired(noon));
    assert!(node(json!({"Expired": true})).is_expired(noon));
}

#[test]
fn requests_are_written_as_servers_want_them() {
    let host = Hostinfo::outgoing(&HostParams {
        hostname: "pod".into(),
        version: "0.1.0".into(),
        ..Default::default()
    });
    let disco = crate::key::DiscoPublic::from_bytes([2; 32]);
    let node = crate::key::NodePublic::from_bytes([7; 32]);
    let endpoints = [("192.0.2.1:5".parse().unwrap(), EndpointType::Local)];
    let stream = serde_json::to_value(MapRequest::streaming(node, disco, host.clone(), &endpoints)).unwrap();
    assert_eq!(
        stream,
        json!({"Version": 117, "KeepAlive": true, "Stream": true, "NodeKey": key(7),
            "DiscoKey": format!("discokey:{}", "02".repeat(32)),
            "Endpoints": ["192.0.2.1:5"], "EndpointTypes": [1],
            "Hostinfo": {"OS": "linux", "IPNVersion": "0.1.0", "Hostname": "pod", "Services": [], "RoutableIPs": []}})
    );
    let lite = serde_json::to_value(MapRequest::lite(node, disco, host.clone(), &endpoints)).unwrap();
    assert_eq!((&lite["OmitPeers"], lite.get("Stream"), lite.get("KeepAlive")), (&json!(true), None, None));

    let register = RegisterRequest {
        version: CAPABILITY_VERSION,
        node_key: node,
        auth: Some(RegisterAuth { auth_key: "secret".into() }),
        hostinfo: Some(host),
        ..Default::default()
    };
    let json = serde_json::to_value(&register).unwrap();
    assert_eq!(json["Auth"], json!({"AuthKey": "secret"}));
    assert_eq!(json["Expiry"], "0001-01-01T00:00:00Z");
    assert_eq!(json["OldNodeKey"], format!("nodekey:{}", "00".repeat(32)));
    assert!(!format!("{register:?}").contains("secret"));
    let logout = RegisterRequest { expiry: Some(UnixTime::from_secs(123)), ..register };
    assert_eq!(serde_json::to_value(&logout).unwrap()["Expiry"], "1970-01-01T00:02:03Z");
    let again: RegisterRequest = serde_json::from_value(serde_json::to_value(&logout).unwrap()).unwrap();
    assert!(again == logout);
}

#[test]
fn condensing_keeps_what_is_used() {
    let mut node = parse(&full_message()).unwrap().node.unwrap();
    let before = node.clone();
    node.condense();
    let host = node.hostinfo.as_ref().unwrap();
    assert_eq!((host.hostname.as_str(), host.services.len(), &host.net_info), ("pod", 1, &None));
    assert_eq!((node.key, &node.endpoints, &node.name), (before.key, &before.endpoints, &before.name));
    assert!(size_of::<Node>() <= 640, "{}", size_of::<Node>());
}

/// Every place in a document, as JSON pointers.
fn places(value: &Value, at: &str, out: &mut Vec<String>) {
    out.push(at.to_owned());
    match value {
        Value::Object(map) => {
            for (name, inner) in map {
                places(inner, &format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")), out);
            }
        }
        Value::Array(list) => {
            for (index, inner) in list.iter().enumerate() {
                places(inner, &format!("{at}/{index}"), out);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn one_odd_value_anywhere_below_the_top_never_ends_the_stream() {
    let full = full_message();
    let mut all = Vec::new();
    places(&full, "", &mut all);
    let odd = [
        json!(null),
        json!(-1),
        json!(7.5),
        json!(1e300),
        json!("odd"),
        json!([[]]),
        json!({"a": 1}),
        json!(true),
    ];
    for place in all.iter().filter(|place| place.matches('/').count() > 1) {
        for value in &odd {
            let mut message = full.clone();
            *message.pointer_mut(place).unwrap() = value.clone();
            assert!(parse(&message).is_ok(), "{place} = {value}: {:?}", parse(&message).err());
        }
    }
}

proptest! {
    #[test]
    fn fuzz_map_response(text in "\\PC{0,200}") {
        let _ = serde_json::from_str::<MapResponse>(&text);
    }

    #[test]
    fn fuzz_map_response_near_valid(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let mut bytes = full_message().to_string().into_bytes();
        let index = at.index(bytes.len());
        bytes[index] = byte;
        let _ = serde_json::from_slice::<MapResponse>(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        let _ = serde_json::from_slice::<MapResponse>(&bytes);
    }
}

#[test]
fn a_field_of_the_wrong_kind_costs_that_field_alone() {
    let good = r#""Domain":"example.test","PeersRemoved":[7],"PeerSeenChange":{"5":true}"#;
    let fields = [
        "KeepAlive",
        "Node",
        "DERPMap",
        "Peers",
        "PeersChanged",
        "PeersChangedPatch",
        "OnlineChange",
        "DNSConfig",
        "PacketFilter",
        "PacketFilters",
        "UserProfiles",
        "Health",
        "DisplayMessages",
        "ControlTime",
        "Debug",
        "PingRequest",
        "CollectServices",
        "ControlDialPlan",
    ];
    for field in fields {
        for odd in ["17", "-1", "1.5", "\"text\"", "[[1]]", "{\"1\":{\"a\":[]}}", "true"] {
            let text = format!("{{{good},\"{field}\":{odd}}}");
            let (message, skipped) = MapResponse::from_json(text.as_bytes()).expect(&text);
            assert_eq!(message.domain, "example.test", "{text}");
            assert_eq!(message.peers_removed, [NodeId(7)], "{text}");
            assert_eq!(message.peer_seen_change.get(&NodeId(5)), Some(&true), "{text}");
            assert!(message.peers.is_empty() && message.packet_filter.is_none_or(|f| f.is_empty()), "{text}");
            assert!(skipped <= 1, "{text}");
        }
        let (_, skipped) =
            MapResponse::from_json(format!("{{{good},\"{field}\":\"odd\"}}").as_bytes()).unwrap();
        assert_eq!(skipped, 1, "{field}");
        let (_, skipped) = MapResponse::from_json(format!("{{{good},\"{field}\":null}}").as_bytes()).unwrap();
        assert_eq!(skipped, 0, "{field}");
    }
    assert!(MapResponse::from_json(b"17").is_err() && MapResponse::from_json(b"{").is_err());
}
