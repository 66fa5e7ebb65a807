//! Writes the seed corpus: `cargo run -p podtether-fuzz-bodies --example seeds -- fuzz/corpus`.
//!
//! Seeds are what well-behaved peers send, so that a fuzzer starts behind the first checks.

use std::fs;
use std::path::Path;

use podtether_core::derp::{Frame, ServerInfo, client_greeting, server_info};
use podtether_core::key::{DiscoPrivate, MachinePrivate, NodePrivate};
use podtether_core::noise::ClientHandshake;
use podtether_core::offload::{Gso, VnetHeader};
use podtether_core::stun;
use serde_json::{Value, json};

fn main() -> std::io::Result<()> {
    let root = std::env::args().nth(1).unwrap_or_else(|| "fuzz/corpus".into());
    let mut seeds: Vec<(&str, &str, Vec<u8>)> = Vec::new();
    control(&mut seeds);
    wire(&mut seeds);
    packets(&mut seeds);
    offload(&mut seeds);
    node(&mut seeds);
    for (target, name, bytes) in seeds {
        let dir = Path::new(&root).join(target);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(name), bytes)?;
    }
    Ok(())
}

type Seeds = Vec<(&'static str, &'static str, Vec<u8>)>;

/// Pieces as the targets cut them.
fn joined(pieces: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    for piece in pieces {
        out.extend_from_slice(&u16::try_from(piece.len()).expect("short").to_le_bytes());
        out.extend_from_slice(piece);
    }
    out
}

fn text(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

fn key(prefix: &str, n: u8) -> String {
    format!("{prefix}:{}", format!("{n:02x}").repeat(32))
}

fn peer(n: u8) -> Value {
    json!({
        "ID": n, "StableID": format!("n{n}"), "Name": format!("n{n}.test."), "User": 1,
        "Key": key("nodekey", n), "KeyExpiry": "2030-01-02T03:04:05.678Z",
        "Machine": key("mkey", n), "DiscoKey": key("discokey", n),
        "Addresses": [format!("100.64.0.{n}/32"), format!("fd7a:115c:a1e0::{n}/128")],
        "AllowedIPs": [format!("100.64.0.{n}/32"), "10.1.0.0/16", "0.0.0.0/0"],
        "Endpoints": ["192.0.2.1:41641", "[2001:db8::1]:41641"], "DERP": "127.3.3.40:1", "HomeDERP": 1,
        "Hostinfo": {"OS": "linux", "Hostname": "a\u{e9}<&>\"", "Services": [{"Proto": "peerapi4", "Port": 1}]},
        "Created": "2024-01-01T00:00:00Z", "Cap": 113, "CapMap": {"magicdns-aaaa": null, "x": [{"a": 1}]},
        "Online": true, "Tags": ["tag:a"], "PrimaryRoutes": ["10.1.0.0/16"], "IsJailed": n == 4,
        "IsWireGuardOnly": n == 5, "SelfNodeV4MasqAddrForThisPeer": "100.99.0.1", "MachineAuthorized": true,
    })
}

fn control(seeds: &mut Seeds) {
    let full = json!({
        "Node": peer(1), "Peers": [peer(2), peer(3), peer(4), peer(5)], "Domain": "test",
        "DERPMap": {"Regions": {"1": {"RegionID": 1, "RegionCode": "a", "Nodes": [
            {"Name": "1a", "RegionID": 1, "HostName": "a.test", "IPv4": "192.0.2.9", "IPv6": "none",
             "STUNPort": 3478, "DERPPort": 443, "CertName": "sha256-raw:00"}]}, "2": null}},
        "DNSConfig": {"Resolvers": [{"Addr": "192.0.2.53"}], "Routes": {"corp.test.": [{"Addr": "192.0.2.54"}], "x.": []},
            "Domains": ["test"], "Proxied": true, "ExtraRecords": [{"Name": "e.test", "Type": "A", "Value": "100.64.0.9"}]},
        "PacketFilters": {"base": [
            {"SrcIPs": ["100.64.0.0-100.64.0.9", "*", "cap:x"], "DstPorts": [{"IP": "*", "Ports": {"First": 1, "Last": 65535}}],
             "IPProto": [6, 17]},
            {"SrcIPs": ["*"], "CapGrant": [{"Dsts": ["100.64.0.1/32"], "CapMap": {"c": null}}]}], "*": null},
        "UserProfiles": [{"ID": 1, "LoginName": "u", "DisplayName": "&<>\"\u{e9}"}],
        "Health": ["h"], "DisplayMessages": {"m": {"Title": "t", "Text": "x", "Severity": "high"}},
        "ControlTime": "2026-01-01T00:00:00Z", "Debug": {"SleepSeconds": 1.5},
        "ControlDialPlan": {"Candidates": [{"IP": "192.0.2.3", "DialStartDelaySec": 0.5, "Priority": 1}]},
        "PingRequest": {"URL": "http://c/p", "Types": "disco", "IP": "100.64.0.2", "Log": true},
    });
    let delta = json!({
        "PeersChanged": [peer(6)], "PeersRemoved": [3], "PeerSeenChange": {"2": true}, "OnlineChange": {"2": false},
        "PeersChangedPatch": [{"NodeID": 2, "DERPRegion": 2, "Endpoints": ["192.0.2.7:7"], "Online": true,
            "Key": key("nodekey", 9), "DiscoKey": key("discokey", 9), "KeyExpiry": "0001-01-01T00:00:00Z", "Cap": 120}],
        "PacketFilter": [{"SrcIPs": ["*"], "DstPorts": [{"IP": "100.64.0.1", "Ports": {"First": 22, "Last": 22}}]}],
        "DisplayMessages": {"*": null},
    });
    let keep = json!({"KeepAlive": true, "ControlTime": "2026-01-01T00:00:00Z"});
    seeds.push(("map", "full", joined(&[text(&full)])));
    seeds.push(("map", "deltas", joined(&[text(&full), text(&delta), text(&keep)])));
    let body = text(&keep);
    let mut framed = u32::try_from(body.len()).expect("short").to_le_bytes().to_vec();
    framed.extend_from_slice(&body);
    seeds.push(("map", "framed", framed));
    let user = json!({"ID": 1, "DisplayName": "u"});
    let answers = [
        ("registered", json!({"User": user, "Login": {"ID": 1}, "MachineAuthorized": true})),
        ("login", json!({"AuthURL": "https://c/register/x"})),
        ("refused", json!({"Error": "invalid key: \u{7}expired"})),
        ("expired", json!({"NodeKeyExpired": true, "NodeKeySignature": "AAAA"})),
        ("keys", json!({"legacyPublicKey": key("mkey", 1), "publicKey": key("mkey", 2)})),
        ("early", json!({"nodeKeyChallenge": key("chalpub", 1)})),
    ];
    for (name, answer) in answers {
        seeds.push(("register", name, text(&answer)));
    }
}

fn wire(seeds: &mut Seeds) {
    let (server, client) = (MachinePrivate::from_bytes([3; 32]), MachinePrivate::from_bytes([4; 32]));
    if let Ok((_, initiation)) = ClientHandshake::start(&client, &server.public(), 115) {
        seeds.push(("noise", "initiation", initiation.to_vec()));
    }
    let mut response = vec![2, 0, 48];
    response.resize(51, 7);
    seeds.push(("noise", "response", response));
    let record = [&[4, 0, 20][..], &[1; 20], &[3, 0, 4], b"oops"].concat();
    seeds.push(("noise", "record_and_error", record));
    let early = b"\xff\xff\xffTS\0\0\0\x02{}PRI * HTTP/2.0".to_vec();
    seeds.push(("noise", "early", early));

    let (ours, relay) = (NodePrivate::from_bytes([5; 32]), NodePrivate::from_bytes([6; 32]));
    let mut greeting = Vec::new();
    Frame::ServerKey(relay.public()).encode(&mut greeting);
    let _ = server_info(&relay, &ours.public(), [1; 24], &ServerInfo::default(), &mut greeting);
    seeds.push(("derp", "greeting", greeting));
    let mut hello = Vec::new();
    let _ = client_greeting(&ours, &relay.public(), [2; 24], &mut hello);
    seeds.push(("derp", "client", hello));
    let mut frames = Vec::new();
    for raw in [
        &b"\x06\0\0\0\0"[..],
        b"\x12\0\0\0\x08ABCDEFGH",
        b"\x15\0\0\0\x08\0\0\0\x01\0\0\0\x02",
        b"\x14\0\0\0\x04oops",
    ] {
        frames.extend_from_slice(raw);
    }
    frames.extend_from_slice(&[5, 0, 0, 0, 40]);
    frames.extend_from_slice(&[9; 40]);
    frames.extend_from_slice(&[8, 0, 0, 0, 33]);
    frames.extend_from_slice(&[9; 33]);
    seeds.push(("derp", "frames", frames));

    let ping = [&[1, 0][..], &[7; 12], NodePrivate::from_bytes([2; 32]).public().as_bytes()].concat();
    let pong = [&[2, 0][..], &[7; 12], &[0; 10], &[0xff, 0xff, 192, 0, 2, 1, 4, 1]].concat();
    let call = [&[3, 0][..], &[0; 10], &[0xff, 0xff, 192, 0, 2, 1, 4, 1], &[0x20; 18]].concat();
    let via = [&[7, 0][..], &[1; 32 + 64 + 8 + 4 + 16], &[2; 18]].concat();
    for (name, body) in [("ping", ping), ("pong", pong), ("call_me_maybe", call), ("via", via)] {
        seeds.push(("disco", name, body));
    }
    seeds.push(("stun", "request", stun::request(&[5; 12]).to_vec()));
    seeds.push(("stun", "v4", stun::response(&[5; 12], ([192, 0, 2, 1], 7).into())));
    seeds.push(("stun", "v6", stun::response(&[5; 12], ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1], 7).into())));
}

fn ipv4(protocol: u8, from: u8, to: u8, payload: &[u8]) -> Vec<u8> {
    let mut p = vec![0; 20];
    p[0] = 0x45;
    p[2..4].copy_from_slice(&u16::try_from(20 + payload.len()).expect("short").to_be_bytes());
    p[8] = 64;
    p[9] = protocol;
    p[12..16].copy_from_slice(&[100, 64, 0, from]);
    p[16..20].copy_from_slice(&[100, 64, 0, to]);
    p.extend_from_slice(payload);
    p
}

fn ipv6(next: u8, from: u8, to: u8, payload: &[u8]) -> Vec<u8> {
    let mut p = vec![0; 40];
    p[0] = 0x60;
    p[4..6].copy_from_slice(&u16::try_from(payload.len()).expect("short").to_be_bytes());
    p[6] = next;
    p[7] = 64;
    for (at, host) in [(8, from), (24, to)] {
        p[at..at + 6].copy_from_slice(&[0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0]);
        p[at + 15] = host;
    }
    p.extend_from_slice(payload);
    p
}

fn packets(seeds: &mut Seeds) {
    let tcp = [0, 80, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 1, 0, 0, 0, 0, 0];
    let udp = [0, 80, 0, 80, 0, 12, 0, 0, 1, 2, 3, 4];
    let echo = [8, 0, 0, 0, 0, 1, 0, 1];
    let fragment = [17, 0, 0, 1, 0, 0, 0, 7, 0, 80, 0, 80, 0, 12, 0, 0, 1, 2, 3, 4];
    for (target, from, to) in [("tun", 1, 2), ("peer", 2, 1)] {
        let list = [
            ipv4(6, from, to, &tcp),
            ipv4(17, from, to, &udp),
            ipv4(1, from, to, &echo),
            ipv6(58, from, to, &[128, 0, 0, 0, 0, 1, 0, 1]),
            ipv6(44, from, to, &fragment),
            ipv6(6, from, to, &tcp),
            ipv4(99, from, to, &[b'p', 1, 2, 3, 4, 5, 6, 7, 8]),
            ipv4(99, from, to, &[&[b'a'][..], &[7; 32]].concat()),
            ipv4(132, from, to, &[0, 80, 0, 80, 0, 0, 0, 0]),
        ];
        seeds.push((target, "one_of_each", joined(&list)));
        seeds.push((target, "tcp", joined(&list[..1])));
    }
    let sender = DiscoPrivate::from_bytes([12; 32]).public();
    let disco = [&[4][..], b"TS\xf0\x9f\x92\xac", sender.as_bytes(), &[0; 60]];
    let initiation = [&[4, 1, 0, 0, 0][..], &[7; 144]].concat();
    let data = [&[5, 4, 0, 0, 0][..], &[7; 44]].concat();
    let answer = [&[4][..], &stun::response(&[5; 12], ([192, 0, 2, 1], 7).into())].concat();
    seeds.push(("underlay", "one_of_each", joined(&[disco.concat(), initiation, data, answer])));

    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 2, b'n', b'2', 4];
    query.extend_from_slice(b"test\0\0\x01\0\x01");
    query.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    seeds.push(("dns", "a_with_edns", query));
    let mut reverse = vec![0, 8, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["2", "0", "64", "100", "in-addr", "arpa"] {
        reverse.push(u8::try_from(label.len()).expect("short"));
        reverse.extend_from_slice(label.as_bytes());
    }
    reverse.extend_from_slice(&[0, 0, 12, 0, 1]);
    seeds.push(("dns", "ptr", reverse));
}

/// One of each kind that a TUN has cut, in four pieces each, and one whole.
fn offload(seeds: &mut Seeds) {
    let tcp = [0, 80, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0];
    let udp = [0, 80, 0, 80, 0, 72, 0, 0];
    let with_payload = |header: &[u8]| [header, &[7; 64]].concat();
    let header = VnetHeader { needs_csum: true, gso_size: 16, ..VnetHeader::PLAIN };
    let list = [
        (Gso::TcpV4, 20, 16, ipv4(6, 1, 2, &with_payload(&tcp))),
        (Gso::TcpV6, 40, 16, ipv6(6, 1, 2, &with_payload(&tcp))),
        (Gso::Udp, 20, 6, ipv4(17, 1, 2, &with_payload(&udp))),
        (Gso::Udp, 40, 6, ipv6(17, 1, 2, &with_payload(&udp))),
        (Gso::None, 20, 16, ipv4(6, 1, 2, &with_payload(&tcp))),
    ];
    let list = list.map(|(gso, csum_start, csum_offset, packet)| {
        [&VnetHeader { gso, csum_start, csum_offset, ..header }.to_bytes()[..], &packet].concat()
    });
    seeds.push(("offload", "one_of_each", joined(&list)));
    seeds.push(("offload", "tcp", joined(&list[..1])));
}

fn node(seeds: &mut Seeds) {
    let config = json!({
        "cniVersion": "1.1.0", "name": "k8s", "type": "podtether-cni", "socket": "/run/podtether/supervisor.sock",
        "tailnet": "default", "timeoutSeconds": 60, "failurePolicy": "closed",
        "capabilities": {"io.kubernetes.cri.pod-annotations": true},
        "runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"a/b": "c"}, "dns": {"servers": ["10.96.0.10"]}},
        "cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}],
        "prevResult": {"cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "sandbox": "/var/run/netns/c1"}],
            "ips": [{"address": "10.244.0.2/24", "interface": 0}], "routes": [{"dst": "0.0.0.0/0"}], "dns": {}},
    });
    for (name, verb) in [("add", 0), ("del", 1), ("check", 2), ("gc", 3), ("status", 4), ("version", 5)] {
        seeds.push(("cni", name, [&[verb][..], &text(&config)].concat()));
    }
    let attachment = json!({
        "id": "abc", "attachment": {"network": "k8s", "container_id": "c1", "ifname": "ts0"}, "netns": "/n",
        "netns_inode": 7, "pod": {"uid": "u", "namespace": "a", "name": "b"}, "tailnet": "default", "identity": "def",
        "slot": 1, "udp4_port": 1, "udp6_port": 2, "uid": 200_000, "addresses": ["100.64.0.1/32"], "mac": "00",
    });
    let identity = json!({
        "id": "def", "key": {"tailnet": "default", "pod_uid": "u", "ifname": "ts0"},
        "pod": {"uid": "u", "namespace": "a", "name": "b"}, "hostname": "h", "machine_key": key("privkey", 1),
        "node_key": key("privkey", 2), "old_node_key": null, "registered": true, "addresses": ["100.64.0.1"],
        "stable_id": "1", "keep_until_unix_s": null, "leaving": false,
    });
    seeds.push(("record", "attachment", text(&attachment)));
    seeds.push(("record", "identity", text(&identity)));
    seeds.push((
        "snapshot",
        "empty",
        b"{\"wall\":1,\"home\":1,\"active\":[],\"resolved\":[],\"netmap\":null}".to_vec(),
    ));
    let netmap = json!({"wall": 1_800_000_000_000_u64, "home": 1, "resolved": [["a.test", ["192.0.2.1"]]], "netmap":
        {"Node": peer(1), "Peers": [peer(2)]},
        "active": [{"key": key("nodekey", 2), "endpoint": "192.0.2.1:7", "region": 1, "last_active": 1}]});
    seeds.push(("snapshot", "with_a_netmap", text(&netmap)));
    let trace = json!({"trace_id": vec![0; 16], "span_id": 0, "sampling_decision": "Unsampled"});
    let call = |secs: u64, message: Value| json!({"Request": {"context": {"deadline": {"secs": secs, "nanos": 0}, "trace_context": trace}, "id": 1, "message": message}});
    seeds.push(("rpc", "hello", text(&call(5, json!({"Hello": {}})))));
    seeds.push(("rpc", "watch", text(&call(25, json!({"Watch": {"after": 7}})))));
    seeds.push(("rpc", "node_status", text(&call(5, json!({"Status": {}})))));
    seeds.push(("rpc", "endless_deadline", text(&call(u64::MAX, json!({"Hello": {}})))));
    seeds.push(("rpc", "cancel", text(&json!({"Cancel": {"trace_context": trace, "request_id": 9}}))));
    let answer = |message: Value| json!({"request_id": 1, "message": message});
    let hello =
        json!({"version": {"major": 3, "minor": 0}, "build": "b", "pid": 1, "pod_uid": "u", "later": [1]});
    seeds.push(("rpc", "hello_answer", text(&answer(json!({"Ok": {"Hello": hello}})))));
    seeds.push(("rpc", "refused", text(&answer(json!({"Err": {"kind": 1, "detail": "d"}})))));
}
