//! How packets go under Headscale, between two pods and between a pod and a stock node.

use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podtether_devnet::DevnetConfig;
use podtether_devnet::lab::{HeadscaleConfig, Lab, Pod};
use podtether_devnet::probe::ping::Pinging;
use podtether_net::Netns;
use serde_json::Value;

use super::{World, derp_yaml, headscale_test, open_policy, wait_ping};
use crate::{PATIENCE, TICK, engine_pid, wait_for};

/// Who is pinged: a pod on another node, and a stock node.
const TARGETS: [&str; 2] = ["two", "stock"];

/// The world's DERP map has a second region beside Headscale's own.
fn two_regions(lab: &mut Lab) -> (HeadscaleConfig, podtether_devnet::Devnet) {
    let (relay, _) = lab.start_devnet(DevnetConfig { open_relays: true, ..DevnetConfig::default() }).unwrap();
    let derp = derp_yaml(&relay, 7);
    let roots = relay.ca_pem().to_owned();
    (HeadscaleConfig { derp, roots, ..HeadscaleConfig::default() }, relay)
}

/// The path of pod `one` to the peer called `name`, as its supervisor reports it.
fn path(world: &World, name: &str) -> Option<Value> {
    let report = world.nodes[0].pod_report("one").ok()?;
    let peers = report["peers"].as_array()?;
    let prefix = format!("{name}.");
    let peer = peers.iter().find(|p| p["name"].as_str().is_some_and(|n| n.starts_with(&prefix)))?;
    Some(peer["path"].clone())
}

/// Waits until the path to `name` holds every one of these texts.
fn wait_path(world: &World, name: &str, wanted: &[&str]) {
    wait_for(&format!("the path to {name} to hold {wanted:?}"), || {
        let text = path(world, name)?.to_string().to_lowercase();
        wanted.iter().all(|w| text.contains(w)).then_some(())
    });
}

/// The largest packets that the tunnel takes, there and back.
fn full_size(from: (&Netns, IpAddr), to: (&Netns, IpAddr)) {
    let bind = |(ns, ip): (&Netns, IpAddr)| {
        let socket = ns.run_blocking(move || UdpSocket::bind((ip, 0))).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        socket
    };
    let (sender, receiver) = (bind(from), bind(to));
    let target = receiver.local_addr().unwrap();
    // IP and UDP headers.
    let payload = if target.is_ipv4() { 1280 - 28 } else { 1280 - 48 };
    let bytes: Vec<u8> = (0..payload).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let mut got = [0; 2048];
    let arrived = wait_for("a full packet there and back", || {
        sender.send_to(&bytes, target).ok()?;
        let (length, source) = receiver.recv_from(&mut got).ok()?;
        receiver.send_to(&got[..length], source).ok()?;
        sender.recv(&mut got).ok()
    });
    assert_eq!(&got[..arrived], &bytes[..]);
}

struct Ends {
    one: Pod,
    /// Namespace and addresses of [`TARGETS`].
    targets: Vec<(Netns, Vec<IpAddr>)>,
}

fn ends(world: &mut World) -> Ends {
    let here = world.add_node("");
    let there = world.add_node("");
    let stock = world.join_stock("stock", &["--tags", "tag:k8s-pod"], &[]);
    let (one, two) = (world.join(here, "one"), world.join(there, "two"));
    let stock = &world.stocks[stock];
    let targets = vec![
        (two.netns.clone(), two.addresses().to_vec()),
        (stock.node.netns.clone(), stock.addresses().unwrap()),
    ];
    for ((ns, addresses), name) in targets.iter().zip(TARGETS) {
        wait_ping(&one.netns, addresses[0], name);
        wait_ping(ns, one.addresses()[0], "one");
    }
    Ends { one, targets }
}

impl Ends {
    fn pinging(&self, count: Option<u64>) -> Vec<Pinging> {
        let start = |(_, addresses): &(Netns, Vec<IpAddr>)| {
            Pinging::start(&self.one.netns, addresses[0], TICK, count).unwrap()
        };
        self.targets.iter().map(start).collect()
    }

    fn full_size(&self) {
        for (ns, addresses) in &self.targets {
            for (ours, theirs) in self.one.addresses().iter().zip(addresses) {
                full_size((&self.one.netns, *ours), (ns, *theirs));
                full_size((ns, *theirs), (&self.one.netns, *ours));
            }
        }
    }
}

/// `tailscale ping` of every kind to the pod, until one answer holds `via`.
fn stock_pings(world: &World, pod: IpAddr, via: &[&str]) {
    let pod = pod.to_string();
    let said = wait_for(&format!("a pong via {via:?}"), || {
        let said = world.stocks[0]
            .say(&["ping", "-c", "2", "--until-direct=false", "--timeout", "2s", &pod])
            .unwrap();
        via.iter().any(|via| said.contains(via)).then_some(said)
    });
    println!("tailscale ping: {}", said.trim().lines().last().unwrap_or_default());
    for kind in ["--tsmp", "--icmp"] {
        let said = world.stocks[0].say(&["ping", kind, "-c", "1", "--timeout", "5s", &pod]).unwrap();
        assert!(said.contains("pong from"), "{kind}: {said}");
    }
}

#[test]
fn paths_change_under_headscale() {
    let name = "headscale::paths::paths_change_under_headscale";
    let relay = std::cell::OnceCell::new();
    let config = |lab: &mut Lab| {
        let (config, devnet) = two_regions(lab);
        assert!(relay.set(devnet).is_ok());
        config
    };
    headscale_test(name, config, &open_policy(), |mut world| {
        let ends = ends(&mut world);
        let own = ends.one.v4().unwrap();

        // One family at a time.
        for (v6_blocked, wanted) in [(true, ["direct", "10."]), (false, ["direct", "fd10:"])] {
            world.lab.block_udp_of(v6_blocked).unwrap();
            let pings = ends.pinging(None);
            for name in TARGETS {
                wait_path(&world, name, &wanted);
            }
            ends.full_size();
            stock_pings(&world, own, &[if v6_blocked { "via 10.1.0.2:" } else { "via [fd10:1::2]:" }]);
            drop(pings);
            world.lab.unblock_udp().unwrap();
            println!("direct {}", wanted[1]);
        }

        for (step, after) in [("downgrade", "relay"), ("upgrade", "direct")] {
            let pings = ends.pinging(Some(1000));
            assert!(pings[0].wait_for_replies(200, PATIENCE));
            match step {
                "downgrade" => world.lab.block_udp().unwrap(),
                _ => world.lab.unblock_udp().unwrap(),
            }
            for name in TARGETS {
                wait_path(&world, name, &[after]);
            }
            for (run, name) in pings.into_iter().zip(TARGETS) {
                let report = run.finish(Duration::from_secs(2)).unwrap();
                println!("{step} to {name}: {} of {} lost", report.lost(), report.sent);
                // A stock node trusts its old path until its last pong is 6.5 s old.
                let most = if name == "stock" && step == "downgrade" { 400 } else { 20 };
                assert!(report.lost() <= most, "{step} to {name}: {} lost", report.lost());
            }
            if after == "relay" {
                ends.full_size();
                stock_pings(&world, own, &["via DERP("]);
            }
        }

        // The pod's node gets other addresses.
        let pings = ends.pinging(None);
        let at = pings[0].elapsed();
        world.lab.move_node(1, &world.nodes[0].netns).unwrap();
        stock_pings(&world, own, &["via 10.1.1.2:", "via [fd10:1:1::2]:"]);
        for (run, name) in pings.into_iter().zip(TARGETS) {
            assert!(run.wait_for_replies(20, PATIENCE), "{name} after the move");
            let end = run.elapsed();
            let gap = run.stop(Duration::from_secs(1)).unwrap().longest_gap(at, end);
            println!("moved: {gap:?} without a reply of {name}");
            assert!(gap < Duration::from_secs(10), "{name}: {gap:?}");
        }

        // Both ends are restarted.
        let start = Instant::now();
        for (node, pod) in [(0, "one"), (1, "two")] {
            let pid = engine_pid(&world.nodes[node], pod).unwrap();
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        world.stocks[0].restart().unwrap();
        for ((_, addresses), name) in ends.targets.iter().zip(TARGETS) {
            wait_ping(&ends.one.netns, addresses[0], name);
            println!("restarted: {name} answers after {:?}", start.elapsed());
        }
        for name in TARGETS {
            wait_path(&world, name, &["direct"]);
        }
    });
}
