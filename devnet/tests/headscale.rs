//! The same questions to the devnet and to a stock Headscale get the same answers.
//!
//! Runs when `headscale` is on PATH, in namespaces of its own.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says when it skips"
)]

mod support;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use http::Method;
use podtether_core::key::NodePrivate;
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig, HeadscaleApi};
use podtether_net::testing::{block_on, in_namespaces};
use serde_json::{Value, json};
use support::{Control, Machine, http};

const ADDRESS: &str = "127.0.0.1:8480";

#[test]
fn the_same_questions_get_the_same_answers() {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let Some(program) =
        std::env::split_paths(&path).map(|dir| dir.join("headscale")).find(|path| path.is_file())
    else {
        println!("SKIPPED: headscale is not on PATH");
        return;
    };
    in_namespaces("the_same_questions_get_the_same_answers", |dir| {
        block_on(Box::pin(async {
            let headscale = Headscale::start(&program, dir).await;
            let theirs = Box::pin(interview(ADDRESS.parse().unwrap(), &headscale.keys())).await;
            drop(headscale);
            let api = HeadscaleApi { api_key: String::new(), v2: true };
            let devnet = Devnet::start(DevnetConfig {
                base_domain: "ts.example".into(),
                headscale: Some(api),
                ..DevnetConfig::default()
            });
            let devnet = devnet.await.unwrap();
            let ours = Box::pin(interview(devnet.http_addresses()[0], &devnet_keys(&devnet))).await;
            for (theirs, ours) in theirs.iter().zip(&ours) {
                println!("{:40} {}", theirs.0, theirs.1);
                if theirs != ours {
                    println!("{:>40} {}", "DEVNET", ours.1);
                }
            }
            assert!(theirs == ours, "the devnet answers differently");
        }));
    });
}

/// Auth keys of each kind.
struct Keys {
    user: String,
    tagged: String,
    single: String,
    expired: String,
    ephemeral: String,
    /// For the admin API.
    admin: String,
}

fn devnet_keys(devnet: &Devnet) -> Keys {
    let make = |reusable, ephemeral, tagged: bool, seconds| {
        let tags = if tagged { vec!["tag:k8s-pod".into()] } else { Vec::new() };
        let lifetime = Duration::from_secs(seconds);
        let options = AuthKeyOptions { reusable, ephemeral, tags, lifetime, ..AuthKeyOptions::default() };
        devnet.create_auth_key(options).secret
    };
    Keys {
        user: make(true, false, false, 600),
        tagged: make(true, false, true, 600),
        single: make(false, false, false, 600),
        expired: make(true, false, false, 0),
        ephemeral: make(true, true, true, 600),
        admin: devnet.api_key(),
    }
}

struct Headscale {
    program: PathBuf,
    config: PathBuf,
    server: std::process::Child,
}

impl Drop for Headscale {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Headscale {
    async fn start(program: &Path, dir: &Path) -> Self {
        let config = dir.join("config.yaml");
        let dir = dir.display();
        let derp = "regions:\n  1:\n    regionid: 1\n    regioncode: r1\n    regionname: Region 1\n    nodes:\n      - \
                    {name: 1a, regionid: 1, hostname: derp1.ts.example, ipv4: 127.0.0.1, ipv6: none}\n";
        std::fs::write(format!("{dir}/derp.yaml"), derp).unwrap();
        let text = format!(
            "server_url: http://{ADDRESS}
listen_addr: {ADDRESS}
metrics_listen_addr: ''
noise: {{private_key_path: {dir}/noise.key}}
prefixes: {{v4: 100.64.0.0/10, v6: 'fd7a:115c:a1e0::/48', allocation: sequential}}
derp: {{server: {{enabled: false}}, urls: [], paths: [{dir}/derp.yaml], auto_update_enabled: false}}
disable_check_updates: true
database: {{type: sqlite, sqlite: {{path: {dir}/db.sqlite}}}}
dns: {{magic_dns: true, base_domain: ts.example, override_local_dns: false, nameservers: {{global: []}}}}
policy: {{mode: file, path: ''}}
unix_socket: {dir}/headscale.sock
unix_socket_permission: '0700'
logtail: {{enabled: false}}
log: {{level: warn}}
"
        );
        std::fs::write(&config, text).unwrap();
        let log = std::fs::File::create(format!("{dir}/headscale.log")).unwrap();
        let server = Command::new(program)
            .arg("-c")
            .arg(&config)
            .arg("serve")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let headscale = Self { program: program.to_owned(), config, server };
        for _ in 0..200 {
            if http(ADDRESS.parse().unwrap(), "GET", "/health", &[], "").await.is_some() {
                return headscale;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{}", std::fs::read_to_string(format!("{dir}/headscale.log")).unwrap());
    }

    fn run(&self, arguments: &[&str]) -> Value {
        let mut command = Command::new(&self.program);
        let output =
            command.arg("-c").arg(&self.config).args(arguments).args(["-o", "json"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn keys(&self) -> Keys {
        let user = self.run(&["users", "create", "ref"])["id"].to_string();
        let user = user.trim_matches('"');
        let make = |more: &[&str]| {
            let arguments = [&["preauthkeys", "create"], more].concat();
            self.run(&arguments)["key"].as_str().unwrap().to_owned()
        };
        Keys {
            user: make(&["-u", user, "--reusable", "-e", "1h"]),
            tagged: make(&["--tags", "tag:k8s-pod", "--reusable", "-e", "1h"]),
            single: make(&["-u", user, "-e", "1h"]),
            expired: make(&["-u", user, "--reusable", "-e", "1ms"]),
            ephemeral: make(&["--tags", "tag:k8s-pod", "--reusable", "--ephemeral", "-e", "1h"]),
            admin: self.run(&["apikeys", "create"]).as_str().unwrap().to_owned(),
        }
    }
}

type Answers = Vec<(&'static str, String)>;

/// A register answer without what differs by design: ids, names and the random part of URLs.
fn gist(answer: &Value) -> String {
    let url = answer["AuthURL"].as_str().unwrap();
    let kind = if url.contains("/register/") { "login" } else { url };
    let owner = answer["Login"]["LoginName"].as_str().unwrap().contains("tagged-devices");
    format!(
        "error={:?} url={kind:?} expired={} authorized={} tagged={owner}",
        answer["Error"].as_str().unwrap(),
        answer["NodeKeyExpired"],
        answer["MachineAuthorized"],
    )
}

async fn map_gist(control: &mut Control, request: &Value) -> String {
    match control.map(request).await {
        Ok(_) => "200".into(),
        Err((status, text)) => format!("{status} {text}"),
    }
}

/// What a message holds, except what one of the two leaves out because it has nothing to say.
fn fields(value: &Value) -> String {
    const OPTIONAL: [&str; 4] = ["CollectServices", "Debug", "DERPPort", "STUNPort"];
    let fields = value.as_object().map(|object| object.keys().map(String::as_str).collect::<BTreeSet<_>>());
    fields
        .unwrap_or_default()
        .into_iter()
        .filter(|field| !OPTIONAL.contains(field))
        .collect::<Vec<_>>()
        .join(" ")
}

async fn interview(address: SocketAddr, keys: &Keys) -> Answers {
    let mut answers = Answers::new();
    outside(address, &mut answers).await;
    Box::pin(joining(address, keys, &mut answers)).await;
    Box::pin(netmaps(address, keys, &mut answers)).await;
    Box::pin(leaving(address, keys, &mut answers)).await;
    administration(address, &keys.admin, &mut answers).await;
    answers
}

/// What is asked, the request, and its headers.
type Question<'a> = (&'static str, &'a str, &'a str, &'a [(&'a str, &'a str)]);

async fn outside(address: SocketAddr, answers: &mut Answers) {
    let handshake = [("Upgrade", "tailscale-control-protocol")];
    let garbage = [handshake[0], ("X-Tailscale-Handshake", "*")];
    let questions: [Question<'_>; 8] = [
        ("key without version", "GET", "/key", &[]),
        ("key with nonsense", "GET", "/key?v=x", &[]),
        ("key for an old client", "GET", "/key?v=30", &[]),
        ("upgrade without header", "POST", "/ts2021", &[]),
        ("upgrade to something else", "POST", "/ts2021", &[("Upgrade", "other")]),
        ("upgrade without handshake", "POST", "/ts2021", &handshake),
        ("upgrade with garbage", "POST", "/ts2021", &garbage),
        ("ping response of nobody", "HEAD", "/machine/ping-response?id=x", &[]),
    ];
    for (question, method, path, headers) in questions {
        let answer = http(address, method, path, headers, "").await.unwrap();
        // Headscale appends a second error of its own to a refused upgrade.
        let text = answer.text();
        answers.push((
            question,
            format!("{} {}", answer.status.as_u16(), text.lines().next().unwrap_or_default()),
        ));
    }
    let too_old = Control::connect(address, &Machine::new("old").machine, 112).await;
    answers.push(("noise of an old client", format!("works: {}", too_old.is_ok())));
}

async fn joining(address: SocketAddr, keys: &Keys, answers: &mut Answers) {
    let mut ask = async |question, machine: &Machine, request: Value| {
        let mut control = Control::connect(address, &machine.machine, 113).await.unwrap();
        let answer = control.register(&request).await;
        answers.push((question, gist(&answer)));
    };
    let a = Machine::new("a");
    ask("unknown key", &a, a.register_request(Some("nonsense"))).await;
    ask("expired key", &a, a.register_request(Some(&keys.expired))).await;
    let mut request = a.register_request(Some(&keys.tagged));
    request["Hostinfo"]["RequestTags"] = json!(["tag:k8s-pod", "tag:x"]);
    ask("tags requested with a key", &a, request).await;
    ask("single-use key", &a, a.register_request(Some(&keys.single))).await;
    ask("single-use key again, same node", &a, a.register_request(Some(&keys.single))).await;
    let b = Machine::new("b");
    ask("single-use key again, other node", &b, b.register_request(Some(&keys.single))).await;
    ask("tagged key", &b, b.register_request(Some(&keys.tagged))).await;
    ask("known node without key", &b, b.register_request(None)).await;
    let thief = Machine { node: NodePrivate::from_bytes(*b.node.expose()), ..Machine::new("thief") };
    ask("another's node key without key", &thief, thief.register_request(None)).await;
    ask("another's node key with key", &thief, thief.register_request(Some(&keys.tagged))).await;
    let mut request = b.register_request(None);
    request["Expiry"] = json!("2999-01-01T00:00:00Z");
    ask("longer life", &b, request).await;
    ask("no key, unknown node", &thief, Machine::new("x").register_request(None)).await;
    let mut request = Machine::new("y").register_request(None);
    request["Followup"] = json!(format!("http://{address}/register/hskey-authreq-aaaaaaaaaaaaaaaaaaaaaaaa"));
    ask("followup of nothing", &thief, request).await;
    let turned = Machine { machine: b.machine.clone(), ..Machine::new("b") };
    let mut request = turned.register_request(None);
    request["OldNodeKey"] = json!(b.node.public());
    ask("rotation without key", &turned, request.clone()).await;
    request["Auth"] = json!({"AuthKey": keys.single});
    ask("rotation with a used key", &turned, request.clone()).await;
    request["Auth"] = json!({"AuthKey": keys.tagged});
    ask("rotation with a key", &turned, request).await;
    ask("the key before the rotation", &b, b.register_request(None)).await;
}

async fn netmaps(address: SocketAddr, keys: &Keys, answers: &mut Answers) {
    let machine = Machine::new("map");
    let mut control = Control::connect(address, &machine.machine, 113).await.unwrap();
    control.register(&machine.register_request(Some(&keys.tagged))).await;
    let stranger = Machine { node: NodePrivate::from_bytes(*machine.node.expose()), ..Machine::new("x") };
    let mut other = Control::connect(address, &stranger.machine, 113).await.unwrap();
    let gist = map_gist(&mut other, &stranger.map_request()).await;
    answers.push(("map with another machine key", gist));
    answers.push(("map of an unknown node", map_gist(&mut other, &Machine::new("z").map_request()).await));
    for (question, change) in [
        ("map of an old client", json!({"Version": 112})),
        ("map with nonsense endpoints", json!({"Endpoints": ["x"]})),
        ("map with a nonsense key", json!({"NodeKey": "nodekey:00"})),
    ] {
        let mut request = machine.map_request();
        request.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        answers.push((question, map_gist(&mut control, &request).await));
    }
    let old = json!({"Version": 112, "NodeKey": machine.node.public()}).to_string();
    for (question, method, path, body) in [
        ("GET register", Method::GET, "/machine/register", ""),
        ("register of an old client", Method::POST, "/machine/register", old.as_str()),
        ("set-dns", Method::POST, "/machine/set-dns", "{}"),
        ("unknown path", Method::POST, "/machine/nothing", "{}"),
    ] {
        let answer = control.request(method, path, body.as_bytes()).await;
        answers.push((question, format!("{} {}", answer.status.as_u16(), answer.text().trim())));
    }
    let mut update = machine.lite_update("192.0.2.1:5");
    let answer = control.update(&update).await;
    answers.push(("lite update", format!("{} {:?}", answer.status.as_u16(), answer.text())));
    update["OmitPeers"] = json!(false);
    let answer = control.update(&update).await;
    answers.push(("no stream, with peers", format!("{} {:?}", answer.status.as_u16(), answer.text())));

    let mut stream = control.map(&machine.map_request()).await.unwrap();
    let first = stream.find(|message| message.get("Node").map(|_| message.clone())).await;
    answers.push(("filter without a policy", first["PacketFilters"].to_string()));
    let mut dns = first["DNSConfig"].clone();
    // The hosted service names the suffix as a route, Headscale does not; clients take both.
    dns["Routes"].as_object_mut().unwrap().remove("ts.example");
    answers.push(("DNS", dns.to_string()));
    for (part, value) in [
        ("fields of a first message", &first),
        ("fields of the own node", &first["Node"]),
        ("fields of a peer", &first["Peers"][0]),
        ("fields of a profile", &first["UserProfiles"][0]),
        ("fields of a relay", &first["DERPMap"]["Regions"]["1"]["Nodes"][0]),
    ] {
        answers.push((part, fields(value)));
    }
    let own = &first["Node"];
    answers.push(("own name and tags", format!("{} {} {}", own["Name"], own["Tags"], own["HomeDERP"])));
    answers.push(("authorized and online", format!("{} {}", own["MachineAuthorized"], own["Online"])));
    let mut zero = machine.lite_update("192.0.2.1:5");
    zero["DiscoKey"] = json!("discokey:0000000000000000000000000000000000000000000000000000000000000000");
    answers.push(("update with a zero disco key", control.update(&zero).await.status.to_string()));
    let watcher = Machine::new("watcher");
    let mut control = Control::connect(address, &watcher.machine, 113).await.unwrap();
    control.register(&watcher.register_request(Some(&keys.tagged))).await;
    let mut stream = control.map(&watcher.map_request()).await.unwrap();
    let peers = stream.find(|message| message.get("Peers").cloned()).await;
    let seen =
        peers.as_array().unwrap().iter().find(|peer| peer["Name"] == "map.ts.example.").unwrap().clone();
    let key = seen["DiscoKey"].as_str().unwrap_or_default().trim_start_matches("discokey:").trim_matches('0');
    answers.push(("its disco key as a peer sees it", key.to_owned()));
}

async fn leaving(address: SocketAddr, keys: &Keys, answers: &mut Answers) {
    let logout = |machine: &Machine| {
        let mut request = machine.register_request(Some("whatever"));
        request["Expiry"] = json!("1970-01-01T00:02:03Z");
        request
    };
    for (name, key) in [("user", &keys.user), ("ephemeral", &keys.ephemeral)] {
        let machine = Machine::new(name);
        let mut control = Control::connect(address, &machine.machine, 113).await.unwrap();
        control.register(&machine.register_request(Some(key))).await;
        let stranger = Machine { node: NodePrivate::from_bytes(*machine.node.expose()), ..Machine::new("x") };
        let mut other = Control::connect(address, &stranger.machine, 113).await.unwrap();
        answers.push(("logout by another machine", gist(&other.register(&logout(&stranger)).await)));
        answers.push(("logout", gist(&control.register(&logout(&machine)).await)));
        answers.push(("logout again", gist(&control.register(&logout(&machine)).await)));
        answers.push(("return without key", gist(&control.register(&machine.register_request(None)).await)));
        answers.push(("map after logout", map_gist(&mut control, &machine.map_request()).await));
        let answer = control.register(&machine.register_request(Some(key))).await;
        answers.push(("return with key", gist(&answer)));
        answers.push(("map after return", map_gist(&mut control, &machine.map_request()).await));
    }
}

/// Both admin APIs: status and words of what is refused, status and fields of what is not.
async fn administration(address: SocketAddr, key: &str, answers: &mut Answers) {
    const KEY: &str = "/api/v1/preauthkey";
    const KEYS: &str = "/api/v2/tailnet/-/keys";
    let questions: [(&str, &str, &str, &str); 38] = [
        ("all users", "GET", "/api/v1/user", ""),
        ("a user by name", "GET", "/api/v1/user?name=nobody", ""),
        ("a user by number", "GET", "/api/v1/user?id=99", ""),
        ("a user by nonsense", "GET", "/api/v1/user?id=x", ""),
        ("a user that is there", "POST", "/api/v1/user", r#"{"name":"again"}"#),
        ("a user that is there, again", "POST", "/api/v1/user", r#"{"name":"again"}"#),
        ("another name for nobody", "POST", "/api/v1/user/99/rename/else", ""),
        ("another name", "POST", "/api/v1/user/2/rename/%C3%A9lse", ""),
        ("a key", "POST", KEY, r#"{"user":"1","expiration":"2099-01-01T00:00:00Z","aclTags":[]}"#),
        ("a key with tags", "POST", KEY, r#"{"user":"1","aclTags":["tag:x"]}"#),
        ("a key for nobody", "POST", KEY, r#"{"user":"99"}"#),
        ("a key for a number that is none", "POST", KEY, r#"{"user":1}"#),
        ("a key for a name", "POST", KEY, r#"{"user":"ref"}"#),
        ("a key of nobody without tags", "POST", KEY, "{}"),
        ("a key with a tag that is none", "POST", KEY, r#"{"aclTags":["web"]}"#),
        ("a key with a loud tag", "POST", KEY, r#"{"aclTags":["tag:Web"]}"#),
        ("a key with more", "POST", KEY, r#"{"nonsense":1}"#),
        ("no JSON", "POST", KEY, "x"),
        ("the end of a key", "POST", "/api/v1/preauthkey/expire", r#"{"id":"1"}"#),
        ("the end of a key, again", "POST", "/api/v1/preauthkey/expire", r#"{"id":"1"}"#),
        ("the end of no key", "POST", "/api/v1/preauthkey/expire", r#"{"id":"99"}"#),
        ("all keys", "GET", KEY, ""),
        ("all nodes", "GET", "/api/v1/node", ""),
        ("no node", "GET", "/api/v1/node/99", ""),
        ("a node that is no number", "GET", "/api/v1/node/x", ""),
        ("the end of no node", "DELETE", "/api/v1/node/99", ""),
        ("the expiry of no node", "POST", "/api/v1/node/99/expire", "{}"),
        ("tags of no node", "POST", "/api/v1/node/99/tags", r#"{"tags":["tag:x"]}"#),
        ("no tags", "POST", "/api/v1/node/99/tags", r#"{"tags":[]}"#),
        ("no such page", "GET", "/api/v1/nothing", ""),
        ("no such page of the second", "GET", "/api/v2/nothing", ""),
        ("another tailnet", "GET", "/api/v2/tailnet/other/devices", ""),
        (
            "a key of the second",
            "POST",
            KEYS,
            r#"{"capabilities":{"devices":{"create":{"reusable":false,"ephemeral":false,"preauthorized":true,"tags":["tag:x"]}}},"expirySeconds":300,"description":"pod"}"#,
        ),
        (
            "a tag that is none",
            "POST",
            KEYS,
            r#"{"capabilities":{"devices":{"create":{"reusable":false,"ephemeral":false,"preauthorized":true,"tags":["x"]}}},"expirySeconds":300}"#,
        ),
        (
            "no tags in the second",
            "POST",
            KEYS,
            r#"{"capabilities":{"devices":{"create":{"reusable":false,"ephemeral":false,"preauthorized":true,"tags":null}}},"expirySeconds":300}"#,
        ),
        ("the end of no key in the second", "DELETE", "/api/v2/tailnet/-/keys/99", ""),
        ("the end of a key that is no number", "DELETE", "/api/v2/tailnet/-/keys/abc", ""),
        ("no device", "DELETE", "/api/v2/device/99", ""),
    ];
    let authorization = format!("Bearer {key}");
    let ask = async |question, method, path, body, authorization: &str| {
        let headers = [("Authorization", authorization), ("Content-Type", "application/json")];
        let answer = http(address, method, path, &headers, body).await.unwrap();
        let value = answer.json();
        let text = if value.is_null() {
            answer.text()
        } else if !answer.status.is_success() {
            value.to_string()
        } else {
            // What it is about is one level down, or the first of a list.
            let inner = value.as_object().and_then(|o| o.values().next()).cloned().unwrap_or_default();
            let first = inner.get(0).cloned().unwrap_or(inner);
            format!("{}: {}", fields(&value), fields(&first))
        };
        (question, format!("{} {}", answer.status.as_u16(), text.trim()))
    };
    for (question, method, path, body) in questions {
        answers.push(ask(question, method, path, body, &authorization).await);
    }
    for path in ["/api/v1/node", "/api/v2/tailnet/-/devices", "/api/v1/nothing"] {
        answers.push(ask("a wrong key", "GET", path, "", "Bearer hskey-api-wrong").await);
    }
}
