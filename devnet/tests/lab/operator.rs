//! What a person who runs a node asks its supervisor with the program's sub-commands.

use std::fs;
use std::path::Path;
use std::process::Command;

use podtether_devnet::DevnetConfig;
use podtether_devnet::lab::{Node, Programs};
use serde_json::Value;

use crate::{Rig, lab_test, wait_for, wait_reachable};

/// Whether it succeeded, and what it said where.
fn operate(node: &Node, arguments: &[&str]) -> (bool, String, String) {
    let program = Programs::find(Path::new(env!("CARGO_BIN_EXE_podtether-devnet"))).unwrap().tool;
    let output = Command::new(program).args(arguments).arg("--socket").arg(node.socket()).output().unwrap();
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    println!("$ podtether {}\n{out}{err}", arguments.join(" "));
    (output.status.success(), out, err)
}

pub(crate) fn json(node: &Node, arguments: &[&str]) -> Value {
    let (success, out, err) = operate(node, &[arguments, &["-o", "json"]].concat());
    assert!(success && err.is_empty(), "{err}");
    serde_json::from_str(&out).unwrap()
}

#[test]
fn a_person_lists_pods_changes_their_routing_and_pings_their_peers() {
    lab_test("operator::a_person_lists_pods_changes_their_routing_and_pings_their_peers", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        assert_eq!(json(&rig.nodes[0], &["status"])["pods"], serde_json::json!([]));
        let pods = rig.join(&[(0, "one"), (0, "two")]);
        let node = &rig.nodes[0];
        wait_reachable(&pods[0], pods[1].v4().unwrap());
        let two = format!("two.{}", rig.devnet.base_domain());

        let listed = json(node, &["status"])["pods"].clone();
        let names: Vec<&str> =
            listed.as_array().unwrap().iter().map(|p| p["pod"].as_str().unwrap()).collect();
        assert_eq!(names, ["one", "two"]);
        assert!(listed[1]["state"] == "running" && listed[1]["name"] == two.as_str(), "{listed}");
        let (success, table, _) = operate(node, &["status"]);
        let line = table.lines().find(|line| line.starts_with("default/two ")).unwrap();
        assert!(
            success && line.contains("running") && line.contains(&pods[1].v4().unwrap().to_string()),
            "{table}"
        );
        assert!(table.ends_with("2 pods: 2 joined, 0 pending, 0 failed\n"), "{table}");

        for (peer, kind) in [("two", "disco"), (&two, "tsmp"), (&pods[1].v4().unwrap().to_string(), "icmp")] {
            let pongs = json(node, &["ping", "one", peer, "--kind", kind, "-c", "2"])["pongs"].clone();
            assert_eq!(pongs.as_array().unwrap().len(), 2);
            assert!(pongs[0]["kind"] == kind && pongs[0]["name"] == two.as_str(), "{pongs}");
            assert!(pongs[1]["latencyUs"].as_u64().unwrap() < 5_000_000, "{pongs}");
        }
        let (success, pong, _) = operate(node, &["ping", "default/one", "two"]);
        assert!(success && pong.starts_with(&format!("pong from {two} (100.64.0.")), "{pong}");

        let routing = json(node, &["routing", "one"]);
        assert_eq!(routing["routing"], serde_json::json!({"acceptRoutes": false, "exitNode": null}));
        let changed = json(node, &["routing", "one", "--accept-routes", "true"]);
        assert_eq!(changed["routing"], serde_json::json!({"acceptRoutes": true, "exitNode": null}));
        let changed = json(node, &["routing", "one", "--exit-node", "nobody"]);
        assert_eq!(changed["routing"], serde_json::json!({"acceptRoutes": true, "exitNode": "nobody"}));
        let (success, text, _) = operate(node, &["routing", "one"]);
        assert!(success && text.contains("nobody, which no peer is now"), "{text}");
        let changed = json(node, &["routing", "one", "--exit-node", "", "--accept-routes=false"]);
        assert_eq!(changed["routing"], routing["routing"]);
        assert_eq!(json(node, &["routing", "two"])["routing"], routing["routing"], "nobody else's changed");

        for (arguments, says) in [
            (&["ping", "three", "two"][..], "no pod default/three has joined here"),
            (&["ping", "one", "nobody"], "pod default/one: ping nobody: no peer of the tailnet"),
            (&["ping", "one", &pods[0].v4().unwrap().to_string()], "own address"),
            (&["routing", "other/one"], "no pod other/one has joined here"),
            (&["routing", "one", "--exit-node", "a b"], "pod default/one"),
        ] {
            let (success, out, err) = operate(node, arguments);
            assert!(!success && out.is_empty() && err.starts_with("podtether: "), "{arguments:?}");
            assert!(err.contains(says), "{arguments:?}: {err}");
        }
        // New engines, one after another, while packets flow; the pod is the one it was.
        let before: Vec<Value> = ["one", "two"].map(|pod| rig.nodes[0].pod_report(pod).unwrap()).into();
        let restarted = json(&rig.nodes[0], &["restart", "one"]);
        assert!(restarted[0]["pod"] == "one" && restarted[0]["pid"] != before[0]["enginePid"], "{restarted}");
        let (success, text, err) = operate(&rig.nodes[0], &["restart", "--all", "--pause", "0"]);
        assert!(
            success && text.lines().count() == 2 && text.contains("default/two: new engine"),
            "{text}{err}"
        );
        for before in &before {
            let after = rig.nodes[0].pod_report(before["pod"].as_str().unwrap()).unwrap();
            assert_ne!(after["enginePid"], before["enginePid"]);
            for same in ["addresses", "ifindex", "mac", "udpPort", "name"] {
                assert_eq!(after[same], before[same], "{same}");
            }
        }
        wait_reachable(&pods[0], pods[1].v4().unwrap());
        let (success, _, err) = operate(&rig.nodes[0], &["restart", "three"]);
        assert!(!success && err.contains("no pod default/three has joined here"), "{err}");
        let (success, _, _) = operate(&rig.nodes[0], &["restart"]);
        assert!(!success, "which one?");

        rig.nodes[0].kill_supervisor().unwrap();
        let (success, _, err) = operate(&rig.nodes[0], &["status"]);
        assert!(!success && err.contains("no supervisor answers at") && err.contains("--socket"), "{err}");
    });
}

#[test]
fn roots_that_were_rotated_reach_running_engines() {
    lab_test("operator::roots_that_were_rotated_reach_running_engines", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        let pods = rig.join(&[(0, "one"), (0, "two")]);
        let pids = |node: &Node| -> Vec<Value> {
            node.pods().unwrap().iter().map(|pod| pod["enginePid"].clone()).collect()
        };
        let before = pids(&rig.nodes[0]);
        // Broken first, which changes nothing; then one more beside the old one.
        let old = fs::read_to_string(&rig.ca).unwrap();
        let replace = |text: &str| {
            let new = dir.join("new.pem");
            fs::write(&new, text).unwrap();
            fs::rename(&new, &rig.ca).unwrap();
        };
        let told = || fs::read_to_string(rig.nodes[0].log()).unwrap().matches("other extra roots").count();
        replace("nothing");
        wait_for("a complaint", || {
            let log = fs::read_to_string(rig.nodes[0].log()).unwrap();
            log.contains("the roots it held before stay in use").then_some(())
        });
        assert_eq!(told(), 0);
        replace(&format!("{old}{}", podtether_devnet::ca::issue(vec!["x".into()]).unwrap().root));
        wait_for("both engines to know the new roots", || (told() == 2).then_some(()));
        assert_eq!(pids(&rig.nodes[0]), before, "none was started again");
        // They are good for the next connections.
        rig.devnet.drop_connections();
        wait_for("control to be back", || {
            let pods = rig.nodes[0].pods().unwrap();
            pods.iter().all(|pod| pod["controlConnected"] == true && pod["homeDerp"] != 0).then_some(())
        });
        wait_reachable(&pods[0], pods[1].v4().unwrap());
    });
}
