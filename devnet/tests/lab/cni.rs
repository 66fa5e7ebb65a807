//! The plugin, called by hand with what runtimes send.

use std::time::{Duration, Instant};

use podtether_devnet::DevnetConfig;
use podtether_devnet::lab::CniCall;
use podtether_net::netlink::Netlink;
use podtether_net::testing::block_on;
use serde_json::{Value, json};

use crate::{Rig, lab_test};

fn call(verb: &str, version: &str) -> CniCall {
    CniCall { version: version.into(), ..CniCall::new(verb) }
}

#[test]
fn every_verb_in_every_version_of_the_specification() {
    lab_test("cni::every_verb_in_every_version_of_the_specification", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        let node = &mut rig.nodes[0];
        for (n, version) in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"].into_iter().enumerate() {
            let mut pod = node.create_pod(&format!("pod{n}")).unwrap();
            let answer = pod.cni(node, &call("VERSION", version)).unwrap().ok().unwrap();
            let supported = answer["supportedVersions"].as_array().unwrap();
            assert!(supported.contains(&json!(version)), "{answer}");

            pod.add_with(node, &call("ADD", version)).unwrap();
            let result = pod.result().unwrap().clone();
            assert_eq!(result["cniVersion"], version);
            let interfaces = result["interfaces"].as_array().unwrap();
            assert_eq!(interfaces[0]["name"], "eth0", "the primary plugin's stays first");
            assert_eq!(interfaces[1]["name"], "ts0");
            assert_eq!(interfaces[1]["sandbox"], json!(pod.netns_path));
            let ips = result["ips"].as_array().unwrap();
            assert_eq!(ips.len(), 4);
            assert_eq!(ips[0]["interface"], 0);
            for ip in ips {
                assert_eq!(ip.get("version").is_some(), version <= "0.4.0", "{ip}");
            }

            // The same question, the same answer.
            let again = pod.cni(node, &call("ADD", version)).unwrap().ok().unwrap();
            assert_eq!(again, result);
            if version >= "0.4.0" {
                assert_eq!(pod.cni(node, &call("CHECK", version)).unwrap().ok().unwrap(), Value::Null);
            }
            if version == "1.1.0" {
                assert!(pod.cni(node, &call("STATUS", version)).unwrap().success);
                assert!(pod.cni(node, &call("GC", version)).unwrap().success, "nothing valid: all leave");
                assert_eq!(node.pods().unwrap(), [Value::Null; 0]);
            }
            let deleted = pod.cni(node, &call("DEL", version)).unwrap();
            assert_eq!(deleted.ok().unwrap(), Value::Null);
            assert!(pod.cni(node, &call("CHECK", version)).unwrap().code().is_some());
        }
    });
}

#[test]
fn a_taken_interface_and_a_vanished_namespace_have_their_own_errors() {
    lab_test("cni::a_taken_interface_and_a_vanished_namespace_have_their_own_errors", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        let node = &mut rig.nodes[0];
        let taken = node.create_pod("taken").unwrap();
        block_on(async {
            let netlink = Netlink::open(&taken.netns).await.unwrap();
            netlink.add_bridge("ts0").await.unwrap();
        });
        let before = node.host_state().unwrap();
        let outcome = taken.cni(node, &CniCall::new("ADD")).unwrap();
        assert_eq!(outcome.code(), Some(100), "{}", outcome.answer);

        let mut gone = node.create_pod("gone").unwrap();
        let path = std::mem::replace(&mut gone.netns_path, node.dir().join("no-such-namespace"));
        let outcome = gone.cni(node, &CniCall::new("ADD")).unwrap();
        assert_eq!(outcome.code(), Some(3), "{}", outcome.answer);
        gone.netns_path = path;
        gone.destroy(node).unwrap();
        assert_eq!(before.diff(&node.host_state().unwrap()), [""; 0], "nothing half-made");
        assert_eq!(rig.devnet.nodes().len(), 0);
    });
}

#[test]
fn add_without_control_says_try_again_in_time_and_leaves_nothing() {
    lab_test("cni::add_without_control_says_try_again_in_time_and_leaves_nothing", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        let node = &mut rig.nodes[0];
        let mut pod = node.create_pod("early").unwrap();
        let before = node.host_state().unwrap();
        rig.devnet.set_refusing(true);
        rig.devnet.drop_connections();
        let started = Instant::now();
        let outcome = pod.cni(node, &CniCall { timeout_s: 3, ..CniCall::new("ADD") }).unwrap();
        assert_eq!(outcome.code(), Some(11), "{}", outcome.answer);
        assert!(started.elapsed() <= Duration::from_secs(4), "{:?}", started.elapsed());
        assert_eq!(before.diff(&node.host_state().unwrap()), [""; 0]);
        rig.devnet.set_refusing(false);
        pod.add(node).unwrap();
        pod.check(node).unwrap();
    });
}

#[test]
fn without_a_supervisor_the_plugin_says_so() {
    lab_test("cni::without_a_supervisor_the_plugin_says_so", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        let node = &mut rig.nodes[0];
        let pod = node.create_pod("lonely").unwrap();
        node.stop_supervisor().unwrap();
        let outcome = pod.cni(node, &CniCall { timeout_s: 2, ..CniCall::new("ADD") }).unwrap();
        assert!(outcome.code().is_some());
        let said = outcome.answer.to_string();
        assert!(said.contains("supervisor"), "{said}");
        let status = pod.cni(node, &call("STATUS", "1.1.0")).unwrap();
        assert_eq!(status.code(), Some(50), "{}", status.answer);
        node.start_supervisor().unwrap();
        assert!(pod.cni(node, &call("STATUS", "1.1.0")).unwrap().success);
    });
}
