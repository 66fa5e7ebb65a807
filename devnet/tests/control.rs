//! Registration and netmaps, seen by a client.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use http::{Method, StatusCode};
use podtether_core::key::NodePrivate;
use podtether_devnet::{AuthKeyOptions, Dialect};
use serde_json::{Value, json};
use support::{Control, Machine, PATIENCE, devnet, http, names, soon};

fn tagged() -> AuthKeyOptions {
    AuthKeyOptions { tags: vec!["tag:k8s-pod".into()], ..AuthKeyOptions::default() }
}

#[tokio::test]
async fn the_first_message_is_whole() {
    let devnet = devnet(|_| {}).await;
    let (_a, mut stream) = Machine::new("a").join(&devnet, tagged()).await;
    let first = stream.next().await.unwrap();
    let node = &first["Node"];
    assert_eq!(node["Name"], "a.tailnet.test.");
    assert_eq!(node["Addresses"], json!(["100.64.0.1/32", "fd7a:115c:a1e0::1/128"]));
    assert_eq!(node["AllowedIPs"], node["Addresses"]);
    assert_eq!(node["Tags"], json!(["tag:k8s-pod"]));
    assert_eq!(node["MachineAuthorized"], true);
    assert_eq!(node["Online"], true);
    assert_eq!(node["HomeDERP"], 1);
    assert_eq!(node["User"], 2_147_455_555_u32);
    assert_eq!(first.get("Peers"), None, "an empty list is left out");
    let region = &first["DERPMap"]["Regions"]["1"];
    assert_eq!(region["Nodes"][0]["HostName"], "derp1.tailnet.test");
    assert_eq!(region["Nodes"][0]["IPv4"], "127.0.0.1");
    assert_eq!(region["Nodes"][0]["IPv6"], "none");
    let dns = &first["DNSConfig"];
    assert_eq!((&dns["Domains"], &dns["Proxied"]), (&json!(["tailnet.test"]), &json!(true)));
    for zone in ["tailnet.test", "64.100.in-addr.arpa", "127.100.in-addr.arpa"] {
        assert_eq!(dns["Routes"][zone], json!([]), "{zone}");
    }
    assert_eq!(
        first["PacketFilters"],
        json!({"base": [{"SrcIPs": ["*"], "DstPorts": [{"IP": "*", "Ports": {"First": 0, "Last": 65535}}]}]})
    );
    assert_eq!(first["Domain"], "tailnet.test");
    assert!(first["UserProfiles"].as_array().unwrap().iter().any(|user| user["ID"] == node["User"]));
    assert!(first["ControlTime"].as_str().unwrap().ends_with('Z'));
    assert_eq!(devnet.complaints(), Vec::<String>::new());
}

#[tokio::test]
async fn peers_come_change_and_go_as_deltas() {
    let devnet = devnet(|_| {}).await;
    let (_a, mut stream) = Machine::new("a").join(&devnet, tagged()).await;
    stream.next().await.unwrap();
    let b = Machine::new("b");
    let (mut control, b_stream) = b.join(&devnet, AuthKeyOptions::default()).await;
    let id = stream
        .find(|message| {
            let peer = message["PeersChanged"].get(0)?;
            assert_eq!(peer["Name"], "b.tailnet.test.");
            assert_eq!(message["UserProfiles"].as_array().unwrap().len(), 2);
            peer["ID"].as_u64()
        })
        .await;
    let update = control.update(&b.lite_update("192.0.2.9:7")).await;
    assert_eq!((update.status, update.body.len()), (StatusCode::OK, 0));
    let patch = |message: &Value, field: &str| {
        let patches = message["PeersChangedPatch"].as_array().cloned().unwrap_or_default();
        patches.into_iter().filter(|patch| patch["NodeID"] == id).find_map(|patch| patch.get(field).cloned())
    };
    let endpoints = stream
        .find(|message| patch(message, "Endpoints").filter(|endpoints| endpoints[0] == "192.0.2.9:7"))
        .await;
    assert_eq!(endpoints, json!(["192.0.2.9:7"]));
    let mut request = b.lite_update("192.0.2.9:7");
    request["Hostinfo"]["NetInfo"]["PreferredDERP"] = json!(2);
    control.update(&request).await;
    assert_eq!(stream.find(|message| patch(message, "DERPRegion")).await, 2);
    request["Hostinfo"]["OSVersion"] = json!("new");
    control.update(&request).await;
    let whole = stream.find(|message| message["PeersChanged"].get(0).cloned()).await;
    assert_eq!(whole["Hostinfo"]["OSVersion"], "new");
    assert_eq!(whole["HomeDERP"], 2, "a Hostinfo without NetInfo change keeps the home");
    drop(b_stream);
    drop(control);
    assert_eq!(stream.find(|message| patch(message, "Online")).await, false);
    assert!(devnet.delete_node(id));
    assert_eq!(stream.find(|message| message.get("PeersRemoved").cloned()).await, json!([id]));
}

#[tokio::test]
async fn a_silent_stream_is_kept_alive_and_compressed_when_asked() {
    let devnet = devnet(|config| config.keep_alive = Duration::from_millis(50)).await;
    let machine = Machine::new("a");
    let (mut control, _) = machine.join(&devnet, tagged()).await;
    let mut request = machine.map_request();
    request["Compress"] = json!("zstd");
    let mut stream = control.map(&request).await.unwrap();
    assert_eq!(stream.next().await.unwrap()["Node"]["ID"], 1);
    assert_eq!(stream.next().await.unwrap(), json!({"KeepAlive": true}));
    assert_eq!(stream.next().await.unwrap(), json!({"KeepAlive": true}));
}

#[tokio::test]
async fn a_newer_stream_ends_the_older() {
    let devnet = devnet(|_| {}).await;
    let machine = Machine::new("a");
    let (mut control, mut old) = machine.join(&devnet, tagged()).await;
    old.next().await.unwrap();
    let mut new = control.map(&machine.map_request()).await.unwrap();
    assert!(new.next().await.is_some());
    assert!(old.news().await.is_none());
}

#[tokio::test]
async fn keys_are_refused_in_the_servers_words() {
    for (dialect, unknown, used) in [
        (Dialect::Headscale, "invalid pre auth key", "authkey already used"),
        (Dialect::Saas, "invalid key: unable to validate API key", "invalid key: API key K not valid"),
    ] {
        let devnet = devnet(|config| config.dialect = dialect).await;
        let machine = Machine::new("a");
        let mut control = machine.connect(&devnet).await;
        let error =
            control.register(&machine.register_request(Some("tskey-auth-nope"))).await["Error"].clone();
        assert_eq!(error, unknown);
        let key = devnet.create_auth_key(AuthKeyOptions::default());
        machine.join(&devnet, AuthKeyOptions::default()).await;
        let (first, second) = (Machine::new("b"), Machine::new("c"));
        let answer = first.connect(&devnet).await.register(&first.register_request(Some(&key.secret))).await;
        assert_eq!(answer["Error"], "");
        let answer =
            second.connect(&devnet).await.register(&second.register_request(Some(&key.secret))).await;
        assert_eq!(answer["Error"].as_str().unwrap().replace(&key.id, "K"), used);
        if dialect == Dialect::Headscale {
            let expired = devnet.create_auth_key(AuthKeyOptions { lifetime: Duration::ZERO, ..tagged() });
            let revoked = devnet.create_auth_key(tagged());
            assert!(devnet.revoke_auth_key(&revoked.id));
            for (key, text) in [(expired, "authkey expired"), (revoked, "authkey revoked")] {
                let request = second.register_request(Some(&key.secret));
                assert_eq!(second.connect(&devnet).await.register(&request).await["Error"], text);
            }
        }
        assert_eq!(devnet.nodes().len(), 2);
    }
}

#[tokio::test]
async fn tags_come_from_the_key_alone() {
    let devnet = devnet(|_| {}).await;
    let key = devnet.create_auth_key(tagged());
    let machine = Machine::new("a");
    let mut request = machine.register_request(Some(&key.secret));
    request["Hostinfo"]["RequestTags"] = json!(["tag:k8s-pod", "tag:b"]);
    let answer = machine.connect(&devnet).await.register(&request).await;
    assert_eq!(
        answer["Error"],
        "handling register with auth key: creating new node: \
         requested tags [tag:k8s-pod tag:b] are invalid or not permitted"
    );
    assert_eq!(devnet.nodes(), []);
    let answer = machine.connect(&devnet).await.register(&machine.register_request(Some(&key.secret))).await;
    assert_eq!(answer["Error"], "", "the refusal did not use the key up");
}

#[tokio::test]
async fn a_known_node_needs_no_key_and_its_rotation_does() {
    let devnet = devnet(|_| {}).await;
    let mut machine = Machine::new("a");
    let (mut control, mut stream) = machine.join(&devnet, tagged()).await;
    let addresses = devnet.node("a").unwrap().addresses;
    let answer = control.register(&machine.register_request(None)).await;
    assert_eq!((&answer["Error"], &answer["AuthURL"]), (&json!(""), &json!("")));

    let stranger = Machine { node: NodePrivate::from_bytes(*machine.node.expose()), ..Machine::new("x") };
    let mut other = stranger.connect(&devnet).await;
    let answer = other.register(&stranger.register_request(None)).await;
    assert_eq!(answer["Error"], "node exists with a different machine key");
    let (status, text) = other.map(&stranger.map_request()).await.err().unwrap();
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert_eq!(text, "node key in request does not match the one associated with this machine key");
    let key = devnet.create_auth_key(tagged());
    let answer = other.register(&stranger.register_request(Some(&key.secret))).await;
    assert_eq!(
        answer["Error"],
        "handling register with auth key: creating new node: node key already in use by another machine"
    );

    let old = machine.node.public();
    machine.node = NodePrivate::generate().unwrap();
    let mut request = machine.register_request(None);
    request["OldNodeKey"] = json!(old);
    let answer = control.register(&request).await;
    assert!(answer["AuthURL"].as_str().unwrap().contains("/register/"), "{answer}");
    request["Auth"] = json!({"AuthKey": devnet.create_auth_key(tagged()).secret});
    assert_eq!(control.register(&request).await["Error"], "");
    let node = devnet.node("a").unwrap();
    assert_eq!((node.addresses, node.node_key), (addresses, machine.node.public()));
    let renewed =
        stream.find(|message| message["Node"].get("Key").cloned().filter(|key| *key != json!(old))).await;
    assert_eq!(renewed, json!(machine.node.public()));
    assert_eq!(devnet.nodes().len(), 1);
}

#[tokio::test]
async fn logging_out_expires_a_node_and_forgets_an_ephemeral_one() {
    let devnet = devnet(|_| {}).await;
    let (lasting, fleeting) = (Machine::new("lasting"), Machine::new("fleeting"));
    let (mut control, mut stream) = lasting.join(&devnet, AuthKeyOptions::default()).await;
    let (mut other, _) = fleeting.join(&devnet, AuthKeyOptions { ephemeral: true, ..tagged() }).await;
    let logout = |machine: &Machine| {
        let mut request = machine.register_request(Some("stale key"));
        request["Expiry"] = json!("1970-01-01T00:02:03Z");
        request
    };
    assert_eq!(other.register(&logout(&fleeting)).await["NodeKeyExpired"], true);
    assert_eq!(devnet.node("fleeting"), None);
    assert_eq!(
        other.map(&fleeting.map_request()).await.err().unwrap(),
        (StatusCode::NOT_FOUND, "node not found".into())
    );

    assert_eq!(control.register(&logout(&lasting)).await["NodeKeyExpired"], true);
    assert!(devnet.node("lasting").unwrap().expired);
    let expired = stream.find(|message| message["Node"].get("Expired").cloned()).await;
    assert_eq!(expired, true);
    assert_eq!(control.register(&lasting.register_request(None)).await["NodeKeyExpired"], true);
    let address = devnet.node("lasting").unwrap().addresses[0];
    let key = devnet.create_auth_key(AuthKeyOptions::default());
    assert_eq!(control.register(&lasting.register_request(Some(&key.secret))).await["NodeKeyExpired"], false);
    let node = devnet.node("lasting").unwrap();
    assert_eq!((node.expired, node.addresses[0]), (false, address));

    let mut request = lasting.register_request(None);
    request["Expiry"] = json!("2999-01-01T00:00:00Z");
    assert_eq!(control.register(&request).await["Error"], "extending key is not allowed");

    // Headscale leaves the expiry of a node with tags alone.
    let spent = Machine::new("spent");
    let (mut control, _stream) = spent.join(&devnet, tagged()).await;
    assert_eq!(control.register(&logout(&spent)).await["NodeKeyExpired"], true);
    let key = devnet.create_auth_key(tagged());
    assert_eq!(control.register(&spent.register_request(Some(&key.secret))).await["NodeKeyExpired"], true);
}

#[tokio::test]
async fn an_ephemeral_node_that_stays_away_is_forgotten() {
    let devnet = devnet(|_| {}).await;
    let joined = Machine::new("a").join(&devnet, AuthKeyOptions { ephemeral: true, ..tagged() }).await;
    let (_watcher, mut stream) = Machine::new("b").join(&devnet, tagged()).await;
    assert_eq!(names(&stream.next().await.unwrap()["Peers"]), ["a"]);
    drop(joined);
    stream.find(|message| message.get("PeersRemoved").cloned()).await;
    assert!(devnet.node("a").is_none());
}

#[tokio::test]
async fn an_expiry_of_the_servers_is_told_to_the_peers() {
    let devnet = devnet(|config| config.node_key_lifetime = Some(Duration::from_millis(700))).await;
    let (_a, mut own) = Machine::new("a").join(&devnet, AuthKeyOptions::default()).await;
    let (_b, mut peer) = Machine::new("b").join(&devnet, tagged()).await;
    own.find(|message| (message["Node"]["Expired"] == true).then_some(())).await;
    peer.find(|message| (message["PeersChanged"][0]["Expired"] == true).then_some(())).await;
    assert!(!devnet.node("b").unwrap().expired, "a tagged node's key lasts");
}

#[tokio::test]
async fn an_interactive_login_waits_for_its_approval() {
    let devnet = devnet(|_| {}).await;
    let machine = Machine::new("a");
    let mut control = machine.connect(&devnet).await;
    let url = control.register(&machine.register_request(None)).await["AuthURL"].as_str().unwrap().to_owned();
    let mut request = machine.register_request(None);
    request["Followup"] = json!(url);
    let mut waiting = machine.connect(&devnet).await;
    let approve = async {
        tokio::task::yield_now().await;
        devnet.approve_login(&url).unwrap();
    };
    let (answer, ()) = soon(async { tokio::join!(waiting.register(&request), approve) }).await;
    assert_eq!((&answer["Error"], &answer["AuthURL"]), (&json!(""), &json!("")));
    assert!(control.map(&machine.map_request()).await.is_ok());
    request["Followup"] = json!("http://x/register/unknown");
    let other = Machine::new("b");
    let mut request = other.register_request(None);
    request["Followup"] = json!("http://x/register/unknown");
    let fresh = other.connect(&devnet).await.register(&request).await;
    assert!(fresh["AuthURL"].as_str().unwrap().contains("/register/"));
}

#[tokio::test]
async fn a_policy_prunes_peers_and_changes_at_run_time() {
    let devnet = devnet(|config| config.policy = Some("".parse().unwrap())).await;
    let (_a, mut stream) = Machine::new("a").join(&devnet, tagged()).await;
    let (_b, _b_stream) = Machine::new("b").join(&devnet, tagged()).await;
    let first = stream.next().await.unwrap();
    assert_eq!(first["PacketFilters"], json!({"base": null}));
    let policy = "[[rules]]\nsrc = ['b']\ndst = ['a']\nports = ['80']\nproto = ['tcp']";
    devnet.set_policy(Some(policy.parse().unwrap()));
    let change = stream.news().await.unwrap();
    assert_eq!(names(&change["PeersChanged"]), ["b"]);
    assert_eq!(change["PacketFilters"]["base"][0]["SrcIPs"], json!(["100.64.0.2", "fd7a:115c:a1e0::2"]));
    assert_eq!(change["PacketFilters"]["base"][0]["IPProto"], json!([6]));
    devnet.set_policy(Some("".parse().unwrap()));
    let change = stream.news().await.unwrap();
    assert_eq!(change["PeersRemoved"], json!([2]));
    assert_eq!(change["PacketFilters"], json!({"base": null}));
    devnet.set_policy(None);
    assert_eq!(names(&stream.news().await.unwrap()["PeersChanged"]), ["b"]);
}

#[tokio::test]
async fn a_zero_disco_key_is_stored_and_complained_about() {
    let devnet = devnet(|_| {}).await;
    let machine = Machine::new("a");
    let (mut control, _stream) = machine.join(&devnet, tagged()).await;
    assert_eq!(devnet.complaints(), Vec::<String>::new());
    let mut request = machine.lite_update("192.0.2.1:1");
    request["DiscoKey"] = json!("discokey:0000000000000000000000000000000000000000000000000000000000000000");
    assert_eq!(control.update(&request).await.status, StatusCode::OK);
    assert!(devnet.node("a").unwrap().disco_key.is_zero());
    assert!(devnet.complaints()[0].contains("zero DiscoKey"));
}

#[tokio::test]
async fn nonsense_is_refused() {
    let devnet = devnet(|_| {}).await;
    let address = devnet.http_addresses()[0];
    let machine = Machine::new("a");
    let (mut control, _stream) = machine.join(&devnet, tagged()).await;
    for (change, status) in [
        (json!({"Endpoints": ["1.2.3.4:5"], "EndpointTypes": [1, 2]}), 400),
        (json!({"EndpointTypes": [9]}), 400),
        (json!({"Endpoints": ["0.0.0.0:5"]}), 400),
        (json!({"Endpoints": ["nonsense"]}), 500),
        (json!({"Compress": "gzip"}), 400),
        (json!({"Version": 112}), 400),
        (json!({"NodeKey": "nodekey:00"}), 500),
    ] {
        let mut request = machine.map_request();
        request.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let (got, text) = control.map(&request).await.err().unwrap();
        assert_eq!(got.as_u16(), status, "{change}: {text}");
    }
    let old = json!({"Version": 112, "NodeKey": machine.node.public()}).to_string();
    for (method, path, body, status) in [
        (Method::GET, "/machine/register", "", 405),
        (Method::POST, "/machine/register", old.as_str(), 400),
        (Method::POST, "/machine/set-dns", "{}", 501),
        (Method::POST, "/machine/nothing", "{}", 404),
        (Method::HEAD, "/machine/ping-response?id=1", "", 404),
    ] {
        assert_eq!(control.request(method, path, body.as_bytes()).await.status.as_u16(), status, "{path}");
    }
    for (path, status, text) in [
        ("/key", 400, "capability version must be set"),
        ("/key?v=x", 400, "invalid capability version"),
        ("/key?v=30", 200, ""),
        ("/nothing", 404, "404 page not found"),
        ("/ts2021", 500, "Internal error"),
    ] {
        let answer = http(address, "GET", path, &[], "").await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.text().trim()), (status, text), "{path}");
    }
    for (upgrade, handshake, text) in [
        ("websocket", "AAAA", "unknown next protocol"),
        ("tailscale-control-protocol", "", "missing Tailscale handshake header"),
        ("tailscale-control-protocol", "*", "invalid tailscale handshake header"),
    ] {
        let mut headers = vec![("Upgrade", upgrade)];
        if !handshake.is_empty() {
            headers.push(("X-Tailscale-Handshake", handshake));
        }
        let answer = http(address, "POST", "/ts2021", &headers, "").await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.text().trim()), (400, text));
    }
    assert!(Control::connect(address, &machine.machine, 112).await.is_err(), "too old for Headscale");
}

#[tokio::test]
async fn a_ping_request_reaches_the_node_and_its_answer_comes_back() {
    let devnet = devnet(|_| {}).await;
    let (mut control, mut stream) = Machine::new("a").join(&devnet, tagged()).await;
    stream.next().await.unwrap();
    let ping = devnet.ping(1, "c2n", b"GET /echo HTTP/1.1\r\n\r\n", PATIENCE);
    let answer = async {
        let request = stream.find(|message| message.get("PingRequest").cloned()).await;
        assert_eq!((&request["Types"], &request["URLIsNoise"]), (&json!("c2n"), &json!(true)));
        let path = request["URL"].as_str().unwrap().trim_start_matches("https://unused").to_owned();
        let status = control.request(Method::POST, &path, b"HTTP/1.1 200 OK\r\n\r\n").await.status;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(control.request(Method::POST, &path, b"").await.status, StatusCode::NOT_FOUND);
    };
    let (answered, ()) = tokio::join!(ping, answer);
    assert_eq!(answered.unwrap(), b"HTTP/1.1 200 OK\r\n\r\n");
    assert!(devnet.ping(99, "", b"", PATIENCE).await.is_err());
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off() {
    let devnet = devnet(|config| config.write_timeout = Duration::from_millis(200)).await;
    let (_a, _unread) = Machine::new("a").join(&devnet, tagged()).await;
    let big = Machine::new("big");
    let key = devnet.create_auth_key(tagged());
    let mut request = big.register_request(Some(&key.secret));
    request["Hostinfo"]["OSVersion"] = json!("x".repeat(200_000));
    assert_eq!(big.connect(&devnet).await.register(&request).await["Error"], "");
    assert!(devnet.wait_for(PATIENCE, |nodes| !nodes[0].streaming).await, "more than its window holds");
}

#[tokio::test]
async fn a_hundred_nodes_join_at_once() {
    const NODES: usize = 100;
    let devnet = devnet(|_| {}).await;
    let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..tagged() });
    let mut joining = tokio::task::JoinSet::new();
    for _ in 0..NODES {
        let (devnet, secret) = (devnet.clone(), key.secret.clone());
        joining.spawn(async move {
            let machine = Machine::new("pod");
            let mut control = machine.connect(&devnet).await;
            assert_eq!(control.register(&machine.register_request(Some(&secret))).await["Error"], "");
            let mut stream = control.map(&machine.map_request()).await.unwrap();
            let mut peers = std::collections::BTreeSet::new();
            while peers.len() < NODES - 1 {
                let message = stream.news().await.unwrap();
                peers.extend(names(&message["Peers"]));
                peers.extend(names(&message["PeersChanged"]));
            }
            (control, stream)
        });
    }
    let kept = joining.join_all().await;
    assert_eq!(kept.len(), NODES);
    let nodes = devnet.nodes();
    let addresses: std::collections::BTreeSet<_> = nodes.iter().flat_map(|node| &node.addresses).collect();
    assert_eq!(addresses.len(), 2 * NODES);
    assert!(nodes.iter().all(|node| node.streaming));
}
