//! What `podtether` tells of a node whose pods run, and what it says when it cannot.

use std::fs;
use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use podtether_devnet::DevnetConfig;
use podtether_devnet::acl::Policy;
use podtether_devnet::lab::{Node, Programs};
use serde_json::Value;

use crate::{Rig, lab_test, wait_for, wait_reachable};

pub(crate) const POLICY: &str = r#"
    [[rules]]
    src = ["tag:k8s-pod"]
    dst = ["*"]
    proto = ["icmp"]
    [[rules]]
    src = ["tag:k8s-pod"]
    dst = ["tag:k8s-pod"]
    ports = ["8080"]
    proto = ["tcp"]
"#;

/// How a program ends when the question was answered, and the answer is no.
const NO: i32 = 4;

/// Exit code and output of `podtether`, started inside the node.
fn tool(node: &Node, arguments: &[&str]) -> (i32, String, String) {
    let program = Programs::find(Path::new(env!("CARGO_BIN_EXE_podtether-devnet"))).unwrap().tool;
    let mut command = node.command(&program);
    let output = command.args(arguments).arg("--socket").arg(node.socket()).output().unwrap();
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    println!("$ podtether {}\n{out}{err}", arguments.join(" "));
    for line in
        out.lines().filter(|_| !arguments.contains(&"json") && !["logs", "bugreport"].contains(&arguments[0]))
    {
        assert!(line.chars().count() <= 100, "{line}");
    }
    (output.status.code().unwrap(), out, err)
}

fn json(node: &Node, arguments: &[&str]) -> Value {
    let (code, out, err) = tool(node, &[arguments, &["-o", "json"]].concat());
    assert!((code == 0 || code == NO) && err.is_empty(), "{code} {err}");
    serde_json::from_str(&out).unwrap()
}

#[test]
fn a_person_learns_how_a_pod_came_about_what_its_packets_meet_and_what_the_network_is_like() {
    lab_test(
        "tool::a_person_learns_how_a_pod_came_about_what_its_packets_meet_and_what_the_network_is_like",
        |dir| {
            let policy: Policy = POLICY.parse().unwrap();
            let config = DevnetConfig { policy: Some(policy), ..DevnetConfig::default() };
            let mut rig = Rig::start(dir, 2, config);
            let mut pods = rig.join(&[(0, "web-1"), (0, "db-1"), (1, "far-1")]);
            wait_reachable(&pods[0], pods[1].v4().unwrap());
            wait_reachable(&pods[0], pods[2].v4().unwrap());
            let node = &rig.nodes[0];

            // From ADD to the first handshake, in the order of what needs what.
            let explained = wait_for("the first handshake to be told", || {
                let explained = json(node, &["explain", "web-1"]);
                explained["timeline"].to_string().contains("handshake").then_some(explained)
            });
            let milestones = explained["timeline"]["milestones"].as_array().unwrap();
            let after = |what: &str| {
                let found = milestones.iter().find(|m| m["what"] == what);
                found.unwrap_or_else(|| panic!("{what}: {explained}"))["afterUs"].as_u64().unwrap()
            };
            let chain = ["link", "engine", "registered", "netmap", "configured", "answered"];
            assert!(chain.windows(2).all(|two| after(two[0]) <= after(two[1])), "{explained}");
            assert!(after("key") <= after("registered") && after("saved") <= after("link"), "{explained}");
            assert!(after("handshake") >= after("netmap"), "{explained}");
            let (code, text, _) = tool(node, &["explain", "web-1"]);
            assert!(
                code == 0 && text.contains("auth key minted") && text.contains("tailnet.default.tags"),
                "{text}"
            );

            // Both ends on this node, one end, a name, an address; what passes, and what does not.
            let far = pods[2].v4().unwrap().to_string();
            for (source, target, expected, says) in [
                ("web-1", "db-1:8080/tcp", 0, "enters default/db-1: yes, rule "),
                ("web-1", "db-1:9090", NO, "enters default/db-1: dropped, no rule"),
                ("db-1", "default/web-1/icmp", 0, "enters default/web-1: yes, rule "),
                ("web-1", "far-1:8080", 0, "leaves default/web-1: yes, it goes to the peer"),
                (&far, "web-1:8080", 0, "enters default/web-1: yes, rule "),
                ("far-1", "web-1:53/udp", NO, "enters default/web-1: dropped, no rule"),
            ] {
                let (code, text, err) = tool(node, &["why", source, target]);
                assert_eq!(code, expected, "{source} {target}: {text}{err}");
                assert!(text.contains(says), "{source} {target}: {text}");
            }
            let verdict = json(node, &["why", "web-1", "db-1:9090"]);
            assert_eq!(
                (&verdict["enters"]["decision"], &verdict["leaves"]["decision"]),
                (&"Drop".into(), &"Accept".into())
            );

            let report = wait_for("a STUN server's answer", || {
                let report = json(node, &["netcheck"]);
                (report["udp"] == true).then_some(report)
            });
            assert!(
                (report["mappedV4"].is_string() || report["mappedV6"].is_string()) && report["homeDerp"] != 0,
                "{report}"
            );
            let (code, text, _) = tool(node, &["netcheck", "db-1"]);
            assert!(code == 0 && text.contains("UDP       works") && text.contains("home"), "{text}");

            let way = wait_for("a direct path", || {
                let pinged = json(node, &["ping", "web-1", "far-1"]);
                (pinged["whyNotDirect"] == "").then_some(pinged)
            });
            assert!(way["way"]["path"]["Direct"]["endpoint"].is_string(), "{way}");

            let (code, text, _) = tool(node, &["status", "-o", "wide"]);
            assert!(
                code == 0 && text.contains("tags      tag:k8s-pod") && text.contains("last handshake"),
                "{text}"
            );
            let status = json(node, &["status", "-n", "elsewhere"]);
            assert_eq!(status["pods"], serde_json::json!([]));
            let live = &json(node, &["status"])["pods"][0];
            assert!(live["memoryBytes"].as_u64().unwrap() > 0 && live["live"]["peers"] == 2, "{live}");
            assert!(live["addedUnixMs"].as_u64().unwrap() > 0, "{live}");
            let (code, text, _) = tool(node, &["top", "--delay", "1"]);
            assert!(
                code == 0 && text.contains("default/web-1") && text.contains("2 pods: 2 joined"),
                "{text}"
            );

            let (code, text, _) = tool(node, &["logs", "web-1"]);
            assert!(code == 0 && text.contains("pod joined") && text.contains(" engine "), "{text}");
            let (_, tail, _) = tool(node, &["logs", "web-1", "--tail", "1", "-o", "json"]);
            let line: Value = serde_json::from_str(&tail).unwrap();
            assert!(line["message"].is_string() && tail.lines().count() == 1, "{tail}");
            // What was said of a pod outlives it: why did it go?
            let gone = pods.remove(1);
            gone.del(&rig.nodes[0]).unwrap();
            let (code, text, _) = tool(&rig.nodes[0], &["logs", "db-1"]);
            assert!(code == 0 && text.contains("pod joined"), "{text}");
        },
    );
}

#[test]
fn a_check_finds_what_is_wrong_and_a_report_of_a_fault_tells_no_secret() {
    lab_test("tool::a_check_finds_what_is_wrong_and_a_report_of_a_fault_tells_no_secret", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        let pods = rig.join(&[(0, "one"), (0, "two")]);
        wait_reachable(&pods[0], pods[1].v4().unwrap());
        let node = &rig.nodes[0];
        let (cni, bin) = (dir.join("net.d"), dir.join("bin"));
        fs::create_dir_all(&cni).unwrap();
        fs::create_dir_all(&bin).unwrap();
        let config = node.state_dir().with_file_name("supervisor.toml");
        let places = [
            "--config",
            config.to_str().unwrap(),
            "--cni-conf-dir",
            cni.to_str().unwrap(),
            "--cni-bin-dir",
            bin.to_str().unwrap(),
        ];
        let check = |more: &[&str]| {
            let found = json(node, &[&["check"], &places[..], more].concat());
            let failed = found.as_array().unwrap().iter().filter(|check| check["grade"] == "fail");
            failed.map(|check| format!("{}: {}", check["what"], check["fix"])).collect::<Vec<_>>()
        };
        wait_for("a STUN server's answer", || (json(node, &["netcheck"])["udp"] == true).then_some(()));

        let failed = check(&[]);
        assert!(failed.len() == 2 && failed[0].contains("no network configuration"), "{failed:?}");
        assert!(failed[1].contains("podtether-cni is missing"), "{failed:?}");
        let conflist = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge","ipam":{"subnet":"100.64.9.0/24"}},
            {"type":"podtether-cni","capabilities":{"io.kubernetes.cri.pod-annotations":true}}]}"#;
        fs::write(cni.join("10-n.conflist"), conflist).unwrap();
        fs::copy("/proc/self/exe", bin.join("podtether-cni")).unwrap();
        let failed = check(&[]);
        assert!(
            failed.len() == 1 && failed[0].contains("add \\\"100.64.9.0/24\\\" to node.exclude_cidrs"),
            "{failed:?}"
        );
        fs::write(cni.join("10-n.conflist"), conflist.replace("100.64.9", "10.9.9")).unwrap();
        assert_eq!(check(&[]), [""; 0]);
        assert_eq!(check(&["--pre"]), [""; 0]);
        let (code, text, _) = tool(node, &[&["check"], &places[..]].concat());
        assert!(code == 0 && text.contains("√ a key for tag:k8s-pod was minted, and deleted"), "{text}");
        assert!(text.contains("√ the clock agrees with control's") && text.contains("0 failed"), "{text}");
        // A tag that the credential does not own.
        let failed = check(&["--set", "tailnet.default.tags=tag:stranger"]);
        assert!(failed.len() == 1 && failed[0].contains("tagOwners"), "{failed:?}");
        let failed = check(&["--set", "node.no_such_key=1"]);
        assert!(failed.len() == 1 && failed[0].contains("no_such_key"), "{failed:?}");

        let report = dir.join("report.txt");
        let file = ["bugreport", "--file", report.to_str().unwrap()];
        let (code, out, err) = tool(node, &[&file, &places[..]].concat());
        assert!(code == 0 && out.contains("read it before"), "{out}{err}");
        let text = fs::read_to_string(&report).unwrap();
        for part in [
            "==== configuration",
            "==== check",
            "==== pod default/one",
            "pod joined",
            "podtether-cni",
            "==== network",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        // Nothing that the disk keeps from others, and nothing of the credential, is in it.
        let (id, secret) = rig.devnet.oauth_client();
        let mut secrets = vec![id.to_owned(), secret.to_owned()];
        for entry in fs::read_dir(node.state_dir().join("identities")).unwrap() {
            let record: Value =
                serde_json::from_str(&fs::read_to_string(entry.unwrap().path()).unwrap()).unwrap();
            for key in ["machine_key", "node_key"] {
                let bytes = record["body"][key].as_array().unwrap();
                let bytes: Vec<u8> =
                    bytes.iter().map(|b| u8::try_from(b.as_u64().unwrap()).unwrap()).collect();
                secrets.extend([hex::encode(&bytes), BASE64_STANDARD.encode(&bytes), format!("{bytes:?}")]);
            }
        }
        assert_eq!(secrets.len(), 2 + 2 * 2 * 3);
        for secret in &secrets {
            assert!(!text.contains(secret.as_str()), "{secret} is in the report");
        }
        assert!(!text.contains("tskey-auth-"), "a minted key is in the report");
        let (code, _, err) = tool(node, &[&file, &places[..]].concat());
        assert!(code == 1 && err.contains("cannot write"), "a report overwrites nothing: {err}");
    });
}

#[test]
fn whatever_goes_wrong_gets_a_sentence_and_an_exit_code() {
    lab_test("tool::whatever_goes_wrong_gets_a_sentence_and_an_exit_code", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        rig.join(&[(0, "one")]);
        let nobody = "no pod default/nobody has joined here";
        let rows: [(&[&str], i32, &str); 14] = [
            (&["explain", "nobody"], 1, nobody),
            (&["ping", "nobody", "one"], 1, nobody),
            (&["ping", "one", "nobody"], 1, "no peer of the tailnet has that name or address"),
            (&["netcheck", "nobody"], 1, nobody),
            (&["logs", "nobody"], 1, nobody),
            (&["restart", "nobody"], 1, nobody),
            (&["routing", "nobody"], 1, nobody),
            (&["why", "nobody", "noone:1"], 1, "neither nobody nor noone is a pod of this node"),
            (&["why", "one", "noone:1"], 1, "noone is neither a pod of this node nor among the 0 peers"),
            (&["why", "one", "noone"], 1, "DST:PORT/PROTO"),
            (&["status", "-o", "yaml"], 2, "invalid value 'yaml'"),
            (&["ping", "one"], 2, "required"),
            (&["nonsense"], 2, "unrecognized subcommand"),
            (&["restart"], 2, "required"),
        ];
        for (arguments, expected, says) in rows {
            let (code, out, err) = tool(&rig.nodes[0], arguments);
            assert!(code == expected && out.is_empty() && err.contains(says), "{arguments:?}: {code} {err}");
        }
        rig.nodes[0].kill_supervisor().unwrap();
        for arguments in [&["status"][..], &["explain", "one"], &["logs", "one"], &["top"]] {
            let (code, out, err) = tool(&rig.nodes[0], arguments);
            assert!(
                code == 1 && out.is_empty() && err.contains("no supervisor answers at"),
                "{arguments:?}: {err}"
            );
        }
        let (code, text, _) = tool(&rig.nodes[0], &["check", "--config", "/nowhere.toml"]);
        assert!(
            code == NO && text.contains("× no supervisor answers at") && text.contains("/nowhere.toml"),
            "{text}"
        );
    });
}

/// Not in namespaces: there a test has but one uid.
#[test]
fn who_may_not_use_the_socket_is_told_so() {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::CommandExt as _;
    const NOBODY: u32 = 65_534;
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let socket = dir.path().join("supervisor.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o000)).unwrap();
    let program = Programs::find(Path::new(env!("CARGO_BIN_EXE_podtether-devnet"))).unwrap().tool;
    let mut command = Command::new(&program);
    // SAFETY: reads an id of this process.
    if unsafe { libc::geteuid() } == 0 {
        // Root may use any socket; and the build's directory may be closed to others.
        let copy = dir.path().join("podtether");
        fs::copy(&program, &copy).unwrap();
        command = Command::new(copy);
        command.uid(NOBODY).gid(NOBODY);
    }
    let output = command.arg("status").arg("--socket").arg(&socket).output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("is root's") && err.contains("try it with sudo"), "{err}");
}
