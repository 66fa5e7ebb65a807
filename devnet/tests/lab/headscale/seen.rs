//! What others see of a pod, and what an administrator of Headscale changes about nodes.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use podtether_devnet::DevnetConfig;
use podtether_devnet::lab::{CniCall, EMBEDDED_REGION, HeadscaleConfig, Pod, Tailnet};
use podtether_devnet::probe::dns;
use podtether_net::netlink::Netlink;
use podtether_net::testing::block_on;
use serde_json::json;

use super::{World, derp_yaml, headscale_test, open_policy, wait_ping};
use crate::{PATIENCE, wait_for, wait_for_within};

const MAGIC: &str = "100.100.100.100:53";

/// The A record of `name` in the pod's MagicDNS.
fn known(pod: &podtether_devnet::lab::Pod, name: &str) -> Vec<std::net::IpAddr> {
    let magic: SocketAddr = MAGIC.parse().unwrap();
    dns::lookup(&pod.netns, magic, name, false, PATIENCE).map_or_else(|_| Vec::new(), |a| a.addresses)
}

#[test]
fn nodes_are_seen_renamed_tagged_expired_and_deleted() {
    let name = "headscale::seen::nodes_are_seen_renamed_tagged_expired_and_deleted";
    let mut policy = open_policy();
    policy["tagOwners"] = json!({"tag:k8s-pod": [], "tag:other": []});
    // Of the nodes here only one is a user's and gets an expiry of its own.
    let config = HeadscaleConfig { extra: "node: {expiry: 1h}\n".into(), ..HeadscaleConfig::default() };
    headscale_test(
        name,
        |_| config,
        &policy,
        |mut world| {
            let user = world.server.user("person").unwrap();
            let (url, ca) = (world.server.url(), world.server.ca_file.clone());
            let key = world.server.api_key().unwrap();
            world.tailnets.push(Tailnet::other_headscale("owned", &url, &ca, &key).of_user("person"));
            let node = world.add_node("");
            let stock = world.join_stock("stock", &["-u", &user], &[]);
            let (pod, owned) = (world.join(node, "pod"), world.join_in(node, "owned", "owned"));
            let stock_ip = world.stocks[stock].addresses().unwrap()[0];
            wait_ping(&pod.netns, stock_ip, "the stock node");

            // As `tailscale status` shows a pod.
            let seen = wait_for("the pod to be online", || {
                world.stocks[stock].peer("pod").ok().filter(|p| p["Online"] == true)
            });
            assert_eq!((&seen["HostName"], &seen["OS"]), (&json!("pod"), &json!("linux")), "{seen}");
            assert_eq!(seen["DNSName"], "pod.ts.example.");
            assert_eq!(seen["Tags"], json!(["tag:k8s-pod"]), "{seen}");
            let ips: Vec<String> = pod.addresses().iter().map(ToString::to_string).collect();
            assert_eq!(seen["TailscaleIPs"], json!(ips), "{seen}");
            assert!(!seen["CurAddr"].as_str().unwrap().is_empty() || seen["Relay"] == "embedded", "{seen}");
            let whois = world.stocks[stock].say(&["whois", "--json", &ips[0]]).unwrap();
            let whois: serde_json::Value = serde_json::from_str(&whois).unwrap();
            let host = &whois["Node"]["Hostinfo"];
            assert!(host["Hostname"] == "pod" && host["OS"] == "linux", "{whois}");
            let line = world.stocks[stock].say(&["status"]).unwrap();
            println!("{line}");

            // Tagged nodes never expire; a user's does when Headscale's settings say.
            let expiry = |name: &str| world.server.node(name).unwrap()["expiry"].clone();
            println!("expiry: pod {}, owned {}", expiry("pod"), expiry("owned"));
            assert!(expiry("owned").is_string() || expiry("owned").is_object(), "{}", expiry("owned"));

            // Renamed: peers know the new name, the old one is gone, nothing is restarted.
            let restarts = |name: &str| world.nodes[node].pod_report(name).unwrap()["restarts"].clone();
            let rename = |from: &str, to: &str| {
                let id = world.server.node_id(from).unwrap();
                world.server.run(&["nodes", "rename", to, "-i", &id]).unwrap();
            };
            rename("stock", "desk");
            rename("pod", "web");
            wait_for("the stock node's new name", || {
                (known(&pod, "desk.ts.example") == [stock_ip] && known(&pod, "stock.ts.example").is_empty())
                    .then_some(())
            });
            wait_for("the pod's own new name", || {
                (known(&pod, "web.ts.example") == [pod.v4().unwrap()]).then_some(())
            });
            wait_for("the report's new name", || {
                (world.nodes[node].pod_report("pod").ok()?["name"] == "web.ts.example").then_some(())
            });
            wait_for("the pod's new name at the stock node", || world.stocks[stock].peer("web").ok());
            assert_eq!(restarts("pod"), 0);
            pod.check(&world.nodes[node]).unwrap();

            // Other tags.
            let id = world.server.node_id("web").unwrap();
            world.server.run(&["nodes", "tag", "-i", &id, "-t", "tag:other"]).unwrap();
            wait_for("the report's new tags", || {
                (world.nodes[node].pod_report("pod").ok()?["tags"] == json!(["tag:other"])).then_some(())
            });

            // A user goes with all their nodes.
            for name in ["desk", "owned"] {
                let id = world.server.node_id(name).unwrap();
                world.server.run(&["nodes", "delete", "-i", &id]).unwrap();
            }
            wait_for("the deleted stock node to be forgotten", || {
                known(&pod, "desk.ts.example").is_empty().then_some(())
            });
            world.server.run(&["users", "destroy", "-i", &user]).unwrap();
            let start = Instant::now();
            // The owned pod cannot come back without its owner, and says why.
            let reason = wait_for_within(Duration::from_secs(150), "the owned pod to say why", || {
                let report = world.nodes[node].pod_report("owned").ok()?;
                let reason = report["reason"].as_str()?.to_owned();
                (report["state"] != "running" && reason.contains("person")).then_some(reason)
            });
            println!("{:?} after its user was deleted: {reason}", start.elapsed());
            owned.del(&world.nodes[node]).unwrap();
            assert_eq!(restarts("pod"), 0);
        },
    );
}

/// The pod's home and how many regions it hears of, from its report.
fn home(world: &World, pod: &str) -> Option<u64> {
    world.nodes[0].pod_report(pod).ok()?["homeDerp"].as_u64()
}

#[test]
fn relays_come_and_go_with_headscales_map() {
    let name = "headscale::seen::relays_come_and_go_with_headscales_map";
    let relay = std::cell::OnceCell::new();
    let config = |lab: &mut podtether_devnet::lab::Lab| {
        let made = lab.start_devnet(DevnetConfig { open_relays: true, ..DevnetConfig::default() });
        let devnet = made.unwrap().0;
        let roots = devnet.ca_pem().to_owned();
        assert!(relay.set(devnet).is_ok());
        HeadscaleConfig { roots, ..HeadscaleConfig::default() }
    };
    headscale_test(name, config, &open_policy(), |mut world| {
        let relay = relay.get().unwrap();
        let node = world.add_node("");
        let other = world.add_node("");
        let (pod, far) = (world.join(node, "pod"), world.join(other, "far"));
        let stock = world.join_stock("stock", &["--tags", "tag:k8s-pod"], &[]);
        let stock_ip = world.stocks[stock].addresses().unwrap()[0];
        for target in [stock_ip, far.v4().unwrap()] {
            wait_ping(&pod.netns, target, "before");
        }
        assert_eq!(home(&world, "pod"), Some(u64::from(EMBEDDED_REGION)));

        // Another region beside Headscale's own; then that one alone.
        for (derp, embedded, wanted) in [(true, true, None), (true, false, Some(7)), (false, true, Some(999))]
        {
            let config = world.server.config();
            config.derp = if derp { derp_yaml(relay, 7) } else { String::new() };
            config.without_embedded = !embedded;
            world.server.stop();
            world.server.start().unwrap();
            let start = Instant::now();
            wait_for("the home region", || {
                let at = home(&world, "pod")?;
                wanted.is_none_or(|wanted| at == wanted).then_some(())
            });
            println!("home {:?} {:?} after the start", home(&world, "pod"), start.elapsed());
            world.lab.block_udp().unwrap();
            for target in [stock_ip, far.v4().unwrap()] {
                wait_ping(&pod.netns, target, "by relay");
            }
            world.lab.unblock_udp().unwrap();
        }
        // The sandbox allows the ports of relays that were known: the other relay's costs a restart, once.
        assert_eq!(world.nodes[node].pod_report("pod").unwrap()["restarts"], 1);
        let more = CniCall::new("ADD");
        let mut third = world.nodes[node].create_pod("third").unwrap();
        third.add_with(&world.nodes[node], &more).unwrap();
    });
}

/// The addresses on ts0 of the pod's namespace.
fn on_ts0(pod: &Pod) -> Vec<IpAddr> {
    block_on(async {
        let netlink = Netlink::open(&pod.netns).await.unwrap();
        let ts0 = netlink.link("ts0").await.unwrap().unwrap().index;
        let all = netlink.addresses().await.unwrap();
        let mut found: Vec<IpAddr> = all.iter().filter(|a| a.link == ts0).map(|a| a.net.addr()).collect();
        found.sort();
        found
    })
}

/// A tailnet gets a second family while its nodes are in it, and loses it again.
#[test]
fn addresses_that_headscale_gives_later_reach_the_pod() {
    let name = "headscale::seen::addresses_that_headscale_gives_later_reach_the_pod";
    let config = HeadscaleConfig { v4_alone: true, ..HeadscaleConfig::default() };
    headscale_test(
        name,
        |_| config,
        &open_policy(),
        |mut world| {
            let node = world.add_node("");
            let stock = world.join_stock("stock", &["--tags", "tag:k8s-pod"], &[]);
            let pod = world.join(node, "pod");
            let v4 = pod.v4().unwrap();
            assert_eq!(on_ts0(&pod), [v4]);
            wait_ping(&world.stocks[stock].node.netns, v4, "the pod");

            for both in [true, false] {
                world.server.stop();
                world.server.config().v4_alone = !both;
                world.server.start().unwrap();
                world.server.run(&["nodes", "backfillips"]).unwrap();
                let start = Instant::now();
                let now = wait_for_within(Duration::from_secs(90), "the pod's other addresses", || {
                    let now = on_ts0(&pod);
                    (now.len() == if both { 2 } else { 1 }).then_some(now)
                });
                println!("{now:?} {:?} after Headscale gave them", start.elapsed());
                assert!(now.contains(&v4), "{now:?}");
                for address in now {
                    wait_ping(&world.stocks[stock].node.netns, address, "the pod");
                }
            }
        },
    );
}
