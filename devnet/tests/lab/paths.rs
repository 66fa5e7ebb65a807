//! Direct where UDP goes through, by relay where it does not.

use std::net::{IpAddr, UdpSocket};
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
fn a_node_that_gets_other_addresses_is_followed_within_seconds() {
    lab_test("paths::a_node_that_gets_other_addresses_is_followed_within_seconds", |dir| {
        let mut rig = Rig::start(dir, 2, DevnetConfig::default());
        let pods = rig.join(&[(0, "one"), (1, "two")]);
        let [one, two] = &pods[..] else { panic!("two pods") };
        wait_reachable(one, two.v4().unwrap());
        // Of either family: which is faster is found out anew.
        let direct_to = |addresses: [&str; 2]| {
            let mut last = String::new();
            wait_for(&addresses.join(" or "), || {
                let report = rig.nodes[0].pod_report("one").ok()?;
                let peers = report["peers"].as_array()?;
                let paths = peers.iter().map(|peer| peer["path"].to_string()).collect::<Vec<_>>().join(", ");
                if paths != last {
                    println!("by {paths}");
                    last.clone_from(&paths);
                }
                addresses.iter().any(|address| paths.contains(address)).then_some(())
            });
        };
        wait_for("direct", || path(&rig.nodes[0], one, "two").filter(|found| found == "direct"));
        let pings = Pinging::start(&one.netns, two.v4().unwrap(), Duration::from_millis(20), None).unwrap();
        assert!(pings.wait_for_replies(20, PATIENCE));
        let moved = pings.elapsed();
        rig.lab.move_node(2, &rig.nodes[1].netns).unwrap();
        direct_to(["10.2.1.2:", "fd10:2:1::2]"]);
        assert!(pings.wait_for_replies(20, PATIENCE));
        let end = pings.elapsed();
        let report = pings.stop(Duration::from_secs(1)).unwrap();
        let gap = report.longest_gap(moved, end);
        println!("the node moved: {gap:?} without a reply");
        assert!(gap < Duration::from_secs(8), "{gap:?}");
    });
}

#[test]
fn path_changes_lose_few_pings() {
    lab_test("paths::path_changes_lose_few_pings", |dir| {
        let mut rig = Rig::start(dir, 2, DevnetConfig::default());
        let pods = rig.join(&[(0, "one"), (1, "two")]);
        let [one, two] = &pods[..] else { panic!("two pods") };
        wait_reachable(one, two.v4().unwrap());
        let is = |kind: &'static str| {
            wait_for(kind, || path(&rig.nodes[0], one, "two").filter(|found| found == kind));
        };
        is("direct");
        for (step, after) in [("downgrade", "relay"), ("upgrade", "direct")] {
            // 1,000 pings, and the change after the first fifth.
            let target = two.v4().unwrap();
            let pings = Pinging::start(&one.netns, target, Duration::from_millis(20), Some(1000)).unwrap();
            assert!(pings.wait_for_replies(200, PATIENCE));
            match step {
                "downgrade" => rig.lab.block_udp().unwrap(),
                _ => rig.lab.unblock_udp().unwrap(),
            }
            is(after);
            let report = pings.finish(Duration::from_secs(2)).unwrap();
            println!("{step}: {} of {} lost", report.lost(), report.sent);
            // One in a hundred, and as many again for what a loaded machine adds.
            assert!(report.lost() <= 20, "{step}: {} of {} lost", report.lost(), report.sent);
        }
    });
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

/// The link's MTU is 1280: the largest packets arrive whole.
#[test]
fn full_size_packets_go_both_ways_straight_and_by_relay() {
    lab_test("paths::full_size_packets_go_both_ways_straight_and_by_relay", |dir| {
        let mut rig = Rig::start(dir, 2, DevnetConfig::default());
        let pods = rig.join(&[(0, "one"), (1, "two")]);
        let [one, two] = &pods[..] else { panic!("two pods") };
        wait_reachable(one, two.v4().unwrap());
        let is = |kind: &'static str| {
            wait_for(kind, || path(&rig.nodes[0], one, "two").filter(|found| found == kind));
        };
        let bind = |pod: &Pod, ip: IpAddr| {
            let socket = pod.netns.run_blocking(move || UdpSocket::bind((ip, 0))).unwrap().unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            socket
        };
        for kind in ["direct", "relay"] {
            if kind == "relay" {
                rig.lab.block_udp().unwrap();
            }
            is(kind);
            for (from, to) in [(one, two), (two, one)] {
                for (ours, theirs) in from.addresses().iter().zip(to.addresses()) {
                    // IP and UDP headers.
                    let payload = if ours.is_ipv4() { 1280 - 28 } else { 1280 - 48 };
                    let (sender, receiver) = (bind(from, *ours), bind(to, *theirs));
                    let target = receiver.local_addr().unwrap();
                    let bytes: Vec<u8> = (0..payload).map(|n| u8::try_from(n % 251).unwrap()).collect();
                    let mut got = [0; 2048];
                    let arrived = wait_for("a full packet there and back", || {
                        sender.send_to(&bytes, target).ok()?;
                        let (length, source) = receiver.recv_from(&mut got).ok()?;
                        receiver.send_to(&got[..length], source).ok()?;
                        sender.recv(&mut got).ok()
                    });
                    assert_eq!(
                        (arrived, &got[..arrived]),
                        (payload, &bytes[..]),
                        "{kind} {ours} to {theirs}"
                    );
                }
            }
        }
    });
}
