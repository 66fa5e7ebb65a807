//! An engine that is killed costs its own pod a moment and the others nothing.

use std::net::SocketAddr;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podtether_devnet::DevnetConfig;
use podtether_devnet::probe::ping::Pinging;
use podtether_devnet::probe::tcp::{Serve, TcpServer, Transfer};

use crate::{PATIENCE, Rig, engine_pid, lab_test, wait_for, wait_reachable};

const KILLS: usize = 50;
const INTERVAL: Duration = Duration::from_millis(5);
/// Replies in one and a half seconds.
const HEALTHY: u64 = 300;
/// The last part of them.
const PEACE: Duration = Duration::from_millis(500);

#[test]
fn fifty_kills_in_a_row() {
    lab_test("kills::fifty_kills_in_a_row", |dir| {
        let mut rig = Rig::start(dir, 2, DevnetConfig::default());
        let pods = rig.join(&[(0, "victim"), (0, "beside"), (1, "far"), (1, "other")]);
        let [victim, beside, far, other] = &pods[..] else { panic!("four pods") };
        let (home, target) = (&rig.nodes[0], victim.v4().unwrap());
        wait_reachable(far, target);
        wait_reachable(beside, other.v4().unwrap());
        wait_reachable(other, beside.v6().unwrap());

        let identity = |report: &serde_json::Value| {
            ["ifindex", "addresses", "udpPort", "udp6Port", "mac"].map(|key| report[key].clone())
        };
        let before = home.pod_report("victim").unwrap();
        assert!(before["udpPort"].as_u64().is_some_and(|p| p > 0), "{before}");
        let neighbours = [
            Pinging::start(&beside.netns, other.v4().unwrap(), INTERVAL, None).unwrap(),
            Pinging::start(&other.netns, beside.v6().unwrap(), INTERVAL, None).unwrap(),
        ];
        let pings = Pinging::start(&far.netns, target, INTERVAL, None).unwrap();
        assert!(pings.wait_for_replies(20, PATIENCE));

        let (mut gaps, mut peace) = (Vec::new(), Vec::new());
        let mut pid = engine_pid(home, "victim").unwrap();
        for round in 0..KILLS {
            let from = pings.elapsed();
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
            pid = wait_for("a new engine", || engine_pid(home, "victim").filter(|new| *new != pid));
            // More than the second of health after which a death is not counted against the engine.
            assert!(pings.wait_for_replies(HEALTHY, PATIENCE), "nothing after kill {round}");
            let now = pings.elapsed();
            gaps.push(pings.report().longest_gap(from, now));
            peace.push(pings.report().longest_gap(now - PEACE, now).saturating_sub(2 * INTERVAL));
        }
        gaps.sort_unstable();
        peace.sort_unstable();
        let (p50, p99, wait) = (gaps[KILLS / 2], gaps[KILLS - 1], peace[KILLS / 2]);
        println!(
            "gap after kill -9: p50 {p50:?}, worst {p99:?}, {gaps:?}; p50 in peace {wait:?} longer than it should be"
        );
        assert!(p50 <= Duration::from_millis(150), "p50 {p50:?}, in peace {wait:?}");

        for run in neighbours {
            let report = run.stop(PATIENCE).unwrap();
            assert_eq!(report.lost(), 0, "of {} pings between other pods", report.sent);
        }
        let after = home.pod_report("victim").unwrap();
        assert_eq!(identity(&after), identity(&before));
        assert_eq!(after["restarts"].as_u64(), Some(50));
        victim.check(home).unwrap();
    });
}

#[test]
fn a_transfer_survives_the_death_of_both_engines() {
    lab_test("kills::a_transfer_survives_the_death_of_both_engines", |dir| {
        const BYTES: u64 = 16 << 20;
        let mut rig = Rig::start(dir, 2, DevnetConfig::default());
        let pods = rig.join(&[(0, "client"), (1, "server")]);
        let [client, server] = &pods[..] else { panic!("two pods") };
        let at: SocketAddr = server.at(9000).unwrap();
        let _sink = TcpServer::start(&server.netns, at, Serve::Sink).unwrap();
        let transfer = Transfer::start(&client.netns, at, BYTES, Duration::from_millis(2)).unwrap();
        for (node, pod, after) in [(1, "server", BYTES / 4), (0, "client", BYTES / 2)] {
            let node = &rig.nodes[node];
            wait_for("part of the transfer", || (transfer.sent() >= after).then_some(()));
            kill(Pid::from_raw(engine_pid(node, pod).unwrap()), Signal::SIGKILL).unwrap();
        }
        let report = transfer.finish().unwrap();
        assert_eq!(report.bytes, BYTES);
        println!("{BYTES} bytes in {:?}", report.took);
    });
}

#[test]
fn a_killed_supervisor_comes_back_to_the_same_pods() {
    lab_test("kills::a_killed_supervisor_comes_back_to_the_same_pods", |dir| {
        let mut rig = Rig::start(dir, 2, DevnetConfig::default());
        let pods = rig.join(&[(0, "near"), (1, "far")]);
        let [near, far] = &pods[..] else { panic!("two pods") };
        wait_reachable(far, near.v4().unwrap());
        let before = rig.nodes[0].pod_report("near").unwrap();
        let pings = Pinging::start(&far.netns, near.v4().unwrap(), INTERVAL, None).unwrap();
        assert!(pings.wait_for_replies(20, PATIENCE));
        rig.nodes[0].kill_supervisor().unwrap();
        assert!(pings.wait_for_replies(20, PATIENCE), "nobody watches, and it works");
        rig.nodes[0].start_supervisor().unwrap();
        let after = wait_for("the pod to be taken up", || {
            let report = rig.nodes[0].pod_report("near").ok()?;
            (report["state"] == "running" && report["ifindex"] != 0).then_some(report)
        });
        assert!(pings.wait_for_replies(20, PATIENCE));
        let report = pings.stop(PATIENCE).unwrap();
        assert_eq!(report.lost(), 0, "of {} pings", report.sent);
        for key in ["enginePid", "ifindex", "addresses", "udpPort", "udp6Port", "mac", "name"] {
            assert_eq!(after[key], before[key], "{key}");
        }
        wait_for("CHECK to pass", || near.check(&rig.nodes[0]).ok());
        assert_eq!(rig.devnet.nodes().len(), 2, "no second identity");
    });
}
