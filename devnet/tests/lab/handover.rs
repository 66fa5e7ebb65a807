//! A planned restart, seen by peers on other nodes: ours, a stock one when there is one, and by relay alone.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use podtether_devnet::lab::{Node, Stock, StockPrograms};
use podtether_devnet::probe::ping::Pinging;
use podtether_devnet::probe::tcp::{Serve, TcpServer, Transfer};
use podtether_devnet::{AuthKeyOptions, DevnetConfig};
use podtether_net::Netns;

use crate::operator::json;
use crate::stock::on_path;
use crate::{PATIENCE, Rig, engine_pid, lab_test, wait_for, wait_reachable};

const ROUNDS: usize = 12;
const INTERVAL: Duration = Duration::from_millis(2);
/// A relay keeps 32 packets for who does not read just now, and throws away what is older.
const BY_RELAY: Duration = Duration::from_millis(10);

fn median(mut all: Vec<Duration>) -> Duration {
    all.sort_unstable();
    all[all.len() / 2]
}

/// Whether packets of the pod to the peer go straight.
fn is_direct(node: &Node, pod: &str, peer: &str) -> bool {
    let report = node.pod_report(pod).unwrap();
    let peers = report["peers"].as_array().cloned().unwrap_or_default();
    let named = |p: &&serde_json::Value| p["name"].as_str().is_some_and(|n| n.starts_with(peer));
    peers.iter().find(named).is_some_and(|p| p["path"].to_string().contains("irect"))
}

/// Longest time without an answer while `act` goes on, for each of `pings`, and the longest in as much peace, which
/// shows how long this machine may let anybody wait.
fn gaps(pings: &[Pinging], act: impl FnOnce()) -> Vec<(Duration, Duration)> {
    let from: Vec<Duration> = pings.iter().map(Pinging::elapsed).collect();
    act();
    assert!(pings.iter().all(|p| p.wait_for_replies(20, PATIENCE)));
    let to: Vec<Duration> = pings.iter().map(Pinging::elapsed).collect();
    let busy: Vec<Duration> = pings
        .iter()
        .zip(from.iter().zip(&to))
        .map(|(p, (from, to))| p.report().longest_gap(*from, *to))
        .collect();
    std::thread::sleep(to[0] - from[0]);
    let idle = pings.iter().zip(&to).map(|(p, to)| p.report().longest_gap(*to, p.elapsed()));
    busy.into_iter().zip(idle).collect()
}

#[test]
fn direct_peers_lose_nothing_at_a_planned_restart() {
    lab_test("handover::direct_peers_lose_nothing_at_a_planned_restart", |dir| {
        let mut rig = Rig::start(dir, 2, DevnetConfig::default());
        let pods = rig.join(&[(0, "near"), (1, "far")]);
        let [near, far] = &pods[..] else { panic!("two pods") };
        let stock = match (on_path("tailscaled"), on_path("tailscale")) {
            (Some(daemon), Some(client)) => {
                let node = rig.lab.add_node("stockhost").unwrap();
                let stock = Stock::start(node, &StockPrograms { daemon, client }, &rig.ca, &[]).unwrap();
                let key = rig.devnet.create_auth_key(AuthKeyOptions::default());
                stock.up(&rig.devnet.https_url(), &key.secret, &["--accept-dns=false"]).unwrap();
                Some(stock)
            }
            _ => {
                println!("SKIPPED: the stock peer, because tailscaled and tailscale are not on PATH");
                None
            }
        };
        let mut peers: Vec<(&str, &Netns, IpAddr)> = vec![("far", &far.netns, far.v4().unwrap())];
        if let Some(stock) = &stock {
            peers.push(("stockhost", &stock.node.netns, stock.addresses().unwrap()[0]));
        }
        let own = near.v4().unwrap();
        for (name, ns, address) in &peers {
            wait_reachable(near, *address);
            let back = Pinging::start(ns, own, Duration::from_millis(20), None).unwrap();
            assert!(back.wait_for_replies(1, PATIENCE), "{name} does not reach the pod");
            wait_for("a direct path", || is_direct(&rig.nodes[0], "near", name).then_some(()));
        }
        // Each end finds its own way, and what is on its way by a relay is not what this is about.
        wait_for("a direct path back", || is_direct(&rig.nodes[1], "far", "near").then_some(()));
        let ways: Vec<String> =
            peers.iter().flat_map(|(name, ..)| [format!("to {name}"), format!("from {name}")]).collect();
        let pings: Vec<Pinging> = peers
            .iter()
            .flat_map(|(_, ns, address)| [(&near.netns, *address), (*ns, own)])
            .map(|(ns, target)| Pinging::start(ns, target, INTERVAL, None).unwrap())
            .collect();
        assert!(pings.iter().all(|p| p.wait_for_replies(50, PATIENCE)));
        let before = rig.nodes[0].pod_report("near").unwrap();
        let mut per_way = vec![(Vec::new(), Vec::new()); ways.len()];
        let mut unread = Vec::new();
        for _ in 0..ROUNDS {
            let pid = engine_pid(&rig.nodes[0], "near");
            let round = gaps(&pings, || {
                let restarted = json(&rig.nodes[0], &["restart", "near"]);
                unread.push(Duration::from_micros(restarted[0]["gapUs"].as_u64().unwrap()));
            });
            assert_ne!(engine_pid(&rig.nodes[0], "near"), pid);
            for ((busy, idle), (busies, idles)) in round.into_iter().zip(&mut per_way) {
                busies.push(busy);
                idles.push(idle);
            }
        }
        for (way, (busy, idle)) in ways.iter().zip(per_way) {
            let worst = busy.iter().max().copied().unwrap();
            println!(
                "{way}: longest without an answer in a handover, median {:?}, worst {worst:?}; in peace {:?}",
                median(busy),
                median(idle)
            );
        }
        println!("neither engine read for {:?} (median of {ROUNDS})", median(unread));
        for (way, run) in ways.iter().zip(pings) {
            let report = run.stop(PATIENCE).unwrap();
            assert_eq!(report.lost(), 0, "{way}: of {} pings", report.sent);
        }
        let pings: Vec<Pinging> = peers
            .iter()
            .map(|(_, _, address)| Pinging::start(&near.netns, *address, INTERVAL, None).unwrap())
            .collect();
        let crash = gaps(&pings, || {
            json(&rig.nodes[0], &["restart", "near", "--kill"]);
        });
        println!("the same with --kill: {:?}", crash.iter().map(|(busy, _)| *busy).collect::<Vec<_>>());
        drop(pings);
        let after = rig.nodes[0].pod_report("near").unwrap();
        assert_eq!(after["handovers"].as_u64(), Some(ROUNDS as u64));
        for same in ["ifindex", "addresses", "udpPort", "udp6Port", "mac", "name"] {
            assert_eq!(after[same], before[same], "{same}");
        }

        // A transfer at full speed, both ways round.
        const BYTES: u64 = 64 << 20;
        for (_, ns, address) in &peers {
            let (out, back) = (SocketAddr::new(*address, 9000), SocketAddr::new(own, 9001));
            let _sinks = [(*ns, out), (&near.netns, back)]
                .map(|(ns, at)| TcpServer::start(ns, at, Serve::Sink).unwrap());
            let transfers = [(&near.netns, out), (*ns, back)]
                .map(|(ns, at)| Transfer::start(ns, at, BYTES, Duration::ZERO).unwrap());
            for part in 1..4 {
                wait_for("part of the transfer", || (transfers[0].sent() >= BYTES / 4 * part).then_some(()));
                json(&rig.nodes[0], &["restart", "near"]);
            }
            for transfer in transfers {
                let report = transfer.finish().unwrap();
                assert_eq!(report.bytes, BYTES);
                println!("{BYTES} bytes in {:?}", report.took);
            }
        }
    });
}

#[test]
fn a_peer_by_relay_alone_does_not_wait_for_a_dial() {
    lab_test("handover::a_peer_by_relay_alone_does_not_wait_for_a_dial", |dir| {
        let mut rig = Rig::start(dir, 2, DevnetConfig::default());
        rig.lab.block_udp().unwrap();
        let pods = rig.join(&[(0, "near"), (1, "far")]);
        let [near, far] = &pods[..] else { panic!("two pods") };
        wait_reachable(near, far.v4().unwrap());
        wait_reachable(far, near.v4().unwrap());
        let pings = [(near, far), (far, near)]
            .map(|(from, to)| Pinging::start(&from.netns, to.v4().unwrap(), BY_RELAY, None).unwrap());
        assert!(pings.iter().all(|p| p.wait_for_replies(50, PATIENCE)));
        let mut both = [Vec::new(), Vec::new()];
        let mut peace = Vec::new();
        for _ in 0..ROUNDS {
            let round = gaps(&pings, || {
                json(&rig.nodes[0], &["restart", "near"]);
            });
            for ((busy, idle), all) in round.into_iter().zip(&mut both) {
                all.push(busy);
                peace.push(idle);
            }
        }
        let ([to, from], peace) = (both.map(median), median(peace));
        println!(
            "by relay, longest without an answer: to the peer {to:?}, from it {from:?}, in peace {peace:?} (medians)"
        );
        // Both at once: who goes on alone while the other waits for what is lost is not in a handover.
        let reports = std::thread::scope(|scope| {
            let ends = pings.map(|run| scope.spawn(|| run.stop(Duration::from_secs(2)).unwrap()));
            ends.map(|end| end.join().unwrap())
        });
        for report in reports {
            println!("{} sent, {} lost", report.sent, report.lost());
            // What a relay had for the old connection when that was closed.
            assert!(report.lost() * 100 < report.sent, "a hundredth at most");
        }
        let pings = [Pinging::start(&near.netns, far.v4().unwrap(), BY_RELAY, None).unwrap()];
        let crash = gaps(&pings, || {
            json(&rig.nodes[0], &["restart", "near", "--kill"]);
        });
        println!("the same with --kill: {:?}", crash[0].0);
    });
}
