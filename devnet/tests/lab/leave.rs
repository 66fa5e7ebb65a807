//! What a pod leaves behind: nothing.

use podtether_devnet::DevnetConfig;
use podtether_devnet::lab::CniCall;
use podtether_net::netns;

use crate::{Rig, lab_test, wait_for, wait_reachable};

#[test]
fn del_leaves_the_node_as_it_was_and_the_device_is_gone() {
    lab_test("leave::del_leaves_the_node_as_it_was_and_the_device_is_gone", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        // The first pod makes directories that stay; what is compared is a node at work.
        let resident = rig.join(&[(0, "resident")]).remove(0);
        let before = rig.nodes[0].host_state().unwrap();
        let mut pod = rig.nodes[0].create_pod("guest").unwrap();
        let with_sandbox = rig.nodes[0].host_state().unwrap();
        pod.add(&rig.nodes[0]).unwrap();
        wait_reachable(&pod, resident.v4().unwrap());
        assert!(rig.devnet.node("guest").is_some());

        let during = with_sandbox.diff(&rig.nodes[0].host_state().unwrap());
        let kind = |line: &String| line.split_once(": ").map(|(kind, _)| kind.to_owned());
        let mut kinds: Vec<String> = during.iter().filter_map(kind).collect();
        kinds.dedup();
        // An engine, its pin and its files; no interface, route, rule or nft object on the node.
        assert_eq!(kinds, ["+ file", "+ mount", "+ process"], "{during:#?}");

        pod.del(&rig.nodes[0]).unwrap();
        assert_eq!(with_sandbox.diff(&rig.nodes[0].host_state().unwrap()), [""; 0]);
        wait_for("the device to be gone", || rig.devnet.node("guest").is_none().then_some(()));
        pod.del(&rig.nodes[0]).unwrap();
        pod.destroy(&rig.nodes[0]).unwrap();
        assert_eq!(before.diff(&rig.nodes[0].host_state().unwrap()), [""; 0]);
        resident.check(&rig.nodes[0]).unwrap();
    });
}

#[test]
fn del_succeeds_when_the_sandbox_went_first() {
    lab_test("leave::del_succeeds_when_the_sandbox_went_first", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        let pod = rig.join(&[(0, "gone")]).remove(0);
        netns::unpin(&pod.netns_path).unwrap();
        pod.del(&rig.nodes[0]).unwrap();
        assert!(rig.nodes[0].pods().unwrap().is_empty());
        wait_for("the device to be gone", || rig.devnet.node("gone").is_none().then_some(()));
        let mut late = CniCall::new("DEL");
        late.version = "0.4.0".into();
        pod.cni(&rig.nodes[0], &late).unwrap().ok().unwrap();
    });
}
