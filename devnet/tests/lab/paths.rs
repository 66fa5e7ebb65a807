//! Direct where UDP goes through, by relay where it does not.

use std::time::Duration;

use podtether_devnet::DevnetConfig;
use podtether_devnet::lab::{Node, Pod};
use podtether_devnet::probe::ping::Pinging;

use crate::{PATIENCE, Rig, lab_test, wait_for, wait_reachable};

/// `direct`, `relay` or `idle`, of the path from `pod` to its peer `name`.
fn path(node: &Node, pod: &Pod, name: &str) -> Option<String> {
    let report = node.pod_report(&pod.name).ok()?;
    let peers = report["peers"].as_array()?;
    let peer = peers.iter().find(|p| p["name"].as_str().is_some_and(|n| n.starts_with(name)))?;
    let text = peer["path"].to_string().to_lowercase();
    ["direct", "relay", "idle"].into_iter().find(|kind| text.contains(kind)).map(str::to_owned)
}

#[test]
fn blocked_udp_means_relay_and_unblocked_means_direct_again() {
    lab_test("paths::blocked_udp_means_relay_and_unblocked_means_direct_again", |dir| {
        let mut rig = Rig::start(dir, 2, DevnetConfig::default());
        let pods = rig.join(&[(0, "one"), (1, "two")]);
        let [one, two] = &pods[..] else { panic!("two pods") };
        wait_reachable(one, two.v4().unwrap());
        let pings = Pinging::start(&one.netns, two.v4().unwrap(), Duration::from_millis(20), None).unwrap();
        let is = |kind: &'static str| {
            wait_for(kind, || path(&rig.nodes[0], one, "two").filter(|found| found == kind));
        };
        is("direct");
        rig.lab.block_udp().unwrap();
        is("relay");
        assert!(pings.wait_for_replies(20, PATIENCE));
        rig.lab.unblock_udp().unwrap();
        is("direct");
        assert!(pings.wait_for_replies(20, PATIENCE));
    });
}
