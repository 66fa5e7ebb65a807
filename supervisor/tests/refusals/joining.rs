//! ADD and DEL that are repeated, late, or meet something in their way.

use std::fs;

use podtether_devnet::lab::CniCall;
use podtether_net::netlink::{Netlink, VethEnd};
use podtether_net::testing::{block_on, in_namespaces};
use podtether_net::{Netns, netns};
use serde_json::{Value, json};

use crate::place::{PATIENCE, Place, in_pod, newest, refusal, ts0_addresses};

/// Everything of a namespace's links.
fn links(ns: &Netns) -> String {
    block_on(async {
        let netlink = Netlink::open(ns).await.unwrap();
        let (links, routes) = (netlink.links().await.unwrap(), netlink.routes().await.unwrap());
        format!("{links:?} {:?} {routes:?}", netlink.addresses().await.unwrap())
    })
}

#[test]
fn an_interface_of_our_name_that_is_not_ours_stays() {
    in_namespaces("joining::an_interface_of_our_name_that_is_not_ours_stays", |dir| {
        let mut place = Place::new(dir);
        let mut pod = place.pod("p");
        in_pod(&pod, async |netlink| {
            let end = |name| VethEnd { namespace: None, name, mac: None, mtu: 1500 };
            netlink.add_veth(end("ts0"), end("other")).await.unwrap();
        });
        let before = place.state(&pod);
        let says = ["pod default/p", "ts0", "not ours", "another interface name"];
        place.refused("ADD onto another's ts0", &pod, &CniCall::new("ADD"), 100, &says);
        place.unchanged("ADD onto another's ts0", &pod, &before);
        place.succeeds("DEL of what never joined", &pod, &CniCall::new("DEL"));
        place.unchanged("DEL beside another's ts0", &pod, &before);
        assert_eq!(place.devnet.auth_keys(), [], "no key is minted for a pod that cannot have its link");

        in_pod(&pod, async |netlink| netlink.delete_link("ts0").await.unwrap());
        place.add(&mut pod);
        place.del(&pod);
        place.no_devices();
        place.finish();
    });
}

#[test]
fn a_network_namespace_that_vanished() {
    in_namespaces("joining::a_network_namespace_that_vanished", |dir| {
        let mut place = Place::new(dir);
        let mut stays = place.pod("stays");
        place.add(&mut stays);
        let before = place.state(&stays);

        // Before ADD: the pin is gone, or only its file is left.
        let gone = place.pod("early");
        let (environment, stdin) = (gone.environment("ADD"), gone.stdin(&place.node, &CniCall::new("ADD")));
        let path = gone.netns_path.clone();
        gone.destroy(&place.node).unwrap();
        let says = ["pod default/early", path.to_str().unwrap(), "gone", "nothing was made"];
        let outcome = place.raw(&environment, stdin.to_string().as_bytes());
        refusal("ADD into a namespace that is gone", &outcome, 3, &says);
        fs::write(&path, "").unwrap();
        let outcome = place.raw(&environment, stdin.to_string().as_bytes());
        refusal("ADD into a file", &outcome, 3, &says);
        fs::remove_file(&path).unwrap();
        place.unchanged("ADD into nothing", &stays, &before);
        assert_eq!(place.devnet.auth_keys().len(), 1, "nothing was minted");

        // Between ADD and DEL; the path may be another pod's by then.
        for reused in [false, true] {
            let mut pod = place.pod("late");
            place.add(&mut pod);
            let (environment, stdin) = (pod.environment("DEL"), pod.stdin(&place.node, &CniCall::new("DEL")));
            let path = pod.netns_path.clone();
            pod.destroy(&place.node).unwrap();
            let other = reused.then(|| {
                let ns = block_on(Netns::ensure_pinned(&path)).unwrap();
                let links = links(&ns);
                (ns, links)
            });
            for call in ["DEL", "DEL again"] {
                let outcome = place.raw(&environment, stdin.to_string().as_bytes());
                assert!(outcome.success, "{call}: {}", outcome.answer);
            }
            if let Some((ns, before)) = other {
                assert_eq!(links(&ns), before, "another pod's namespace");
                netns::unpin(&path).unwrap();
            }
            place.unchanged("DEL without its namespace", &stays, &before);
        }
        // A runtime may not even say which namespace it was.
        let mut pod = place.pod("unsaid");
        place.add(&mut pod);
        let stdin = pod.stdin(&place.node, &CniCall::new("DEL")).to_string();
        let mut environment = pod.environment("DEL");
        environment.retain(|(name, _)| *name != "CNI_NETNS");
        let outcome = place.raw(&environment, stdin.as_bytes());
        assert!(outcome.success, "{}", outcome.answer);
        assert!(ts0_addresses(&pod).is_empty());
        pod.destroy(&place.node).unwrap();
        place.unchanged("DEL without CNI_NETNS", &stays, &before);

        place.del(&stays);
        place.no_devices();
        place.finish();
    });
}

#[test]
fn add_and_del_repeated_and_late() {
    in_namespaces("joining::add_and_del_repeated_and_late", |dir| {
        let mut place = Place::new(dir);
        let mut pod = place.pod("p");
        let before = place.state(&pod);
        let call = CniCall::new("ADD");

        // Five at once, and one after: the same interface and the same answer.
        let answers: Vec<Value> = std::thread::scope(|scope| {
            let (place, pod, call) = (&place, &pod, &call);
            let calls: Vec<_> =
                (0..5).map(|n| scope.spawn(move || place.succeeds(&format!("ADD {n}"), pod, call))).collect();
            calls.into_iter().map(|call| call.join().unwrap()).collect()
        });
        let first = place.add(&mut pod);
        assert_eq!(first["interfaces"][1]["name"], "ts0");
        for answer in &answers {
            assert_eq!(*answer, first);
        }
        assert_eq!(place.devnet.auth_keys().len(), 1);
        assert_eq!(place.devnet.nodes().len(), 1);
        assert_eq!(place.node.pods().unwrap().len(), 1);
        assert_eq!(ts0_addresses(&pod), pod.addresses());
        let joined = place.state(&pod);

        // Another ts0 for the same container: chained twice, another pod, tailnet or namespace.
        let mut twice = pod.stdin(&place.node, &call);
        twice["prevResult"] = first.clone();
        let outcome = place.raw(&pod.environment("ADD"), twice.to_string().as_bytes());
        refusal("ADD after our own ADD in the chain", &outcome, 100, &["ts0", "once only"]);
        let other = place.pod("q");
        let mut environment = pod.environment("ADD");
        for (name, value) in &mut environment {
            if *name == "CNI_NETNS" {
                *value = other.netns_path.display().to_string();
            }
        }
        let outcome = place.raw(&environment, pod.stdin(&place.node, &call).to_string().as_bytes());
        refusal(
            "ADD of one container into two namespaces",
            &outcome,
            100,
            &["pod default/p", "has ts0 already", "DEL"],
        );
        assert!(ts0_addresses(&other).is_empty());
        other.destroy(&place.node).unwrap();
        place.unchanged("ADD that was refused", &pod, &joined);

        // A new sandbox of the same pod takes the device over; the old one's DEL comes late.
        let mut second = place.pod("p2");
        (second.name, second.uid) = (pod.name.clone(), pod.uid.clone());
        place.add(&mut second);
        assert_eq!(second.addresses(), pod.addresses(), "the same pod keeps its addresses");
        let after_takeover = place.state(&second);
        place.succeeds("late DEL", &pod, &CniCall::new("DEL"));
        place.succeeds("late DEL again", &pod, &CniCall::new("DEL"));
        place.unchanged("late DEL", &second, &after_takeover);
        assert_eq!(place.node.pod_report("p").unwrap()["state"], "running");
        assert_eq!(place.devnet.nodes().len(), 1);
        place.succeeds("CHECK after a late DEL", &second, &CniCall::new("CHECK"));

        // Nothing is known of this container, and nothing of the pod that left.
        let mut stranger = pod.environment("DEL");
        stranger.retain(|(name, _)| *name != "CNI_CONTAINERID");
        stranger.push(("CNI_CONTAINERID", "nobody".into()));
        let outcome =
            place.raw(&stranger, pod.stdin(&place.node, &CniCall::new("DEL")).to_string().as_bytes());
        assert!(outcome.success, "{}", outcome.answer);
        for n in 0..2 {
            place.note_keys();
            place.succeeds(&format!("DEL {n}"), &second, &CniCall::new("DEL"));
        }
        place.no_devices();
        second.destroy(&place.node).unwrap();
        place.soon_unchanged("everything", &pod, &before);
        let says = ["sandbox-node-p", "ADD again"];
        place.refused("CHECK of a pod that left", &pod, &CniCall::new("CHECK"), 103, &says);
        place.finish();
    });
}

#[test]
fn gc_removes_what_its_network_does_not_list() {
    in_namespaces("joining::gc_removes_what_its_network_does_not_list", |dir| {
        let mut place = Place::new(dir);
        let mut gone = place.pod("gone");
        let before = place.state(&gone);
        place.add(&mut gone);
        let mut kept = place.pod("kept");
        place.add(&mut kept);
        let gc = |network: &str, valid: Value| {
            let mut config = kept.stdin(&place.node, &newest("GC"));
            config["name"] = network.into();
            config["cni.dev/valid-attachments"] = valid;
            let outcome = place.raw(&[("CNI_COMMAND", "GC".into())], config.to_string().as_bytes());
            assert!(outcome.success, "{}", outcome.answer);
        };
        let names = || -> Vec<String> {
            let pods = place.node.pods().unwrap();
            pods.iter().map(|p| p["pod"].as_str().unwrap().to_owned()).collect()
        };
        gc("another-network", json!([]));
        assert_eq!(names(), ["gone", "kept"]);
        place.note_keys();
        gc("lab", json!([{"containerID": kept.container_id, "ifname": "eth0"}]));
        assert_eq!(names(), ["kept"]);
        assert_eq!(ts0_addresses(&gone).len(), 0);
        assert_eq!(ts0_addresses(&kept), kept.addresses());
        assert!(block_on(place.devnet.wait_for(PATIENCE, |nodes| nodes.len() == 1)));
        place.succeeds("CHECK of what stayed", &kept, &CniCall::new("CHECK"));
        gc("lab", json!([]));
        place.no_devices();
        kept.destroy(&place.node).unwrap();
        place.soon_unchanged("GC", &gone, &before);
        place.finish();
    });
}
