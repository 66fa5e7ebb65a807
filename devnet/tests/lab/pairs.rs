//! Everybody reaches everybody.

use std::time::Duration;

use podtether_devnet::DevnetConfig;
use podtether_devnet::probe::dns;
use podtether_devnet::probe::ping::Pinging;

use crate::{PATIENCE, Rig, lab_test, wait_for};

#[test]
fn a_hundred_pings_each_way_between_every_pair_in_both_families() {
    lab_test("pairs::a_hundred_pings_each_way_between_every_pair_in_both_families", |dir| {
        let mut rig = Rig::start(dir, 2, DevnetConfig::default());
        let pods = rig.join(&[(0, "a1"), (0, "a2"), (1, "b1"), (1, "b2")]);
        for (place, pod) in pods.iter().enumerate() {
            // Control tells the others of a new node in its own time.
            wait_for("everybody to know everybody", || {
                let report = rig.nodes[place / 2].pod_report(&pod.name).ok()?;
                (report["peers"].as_array()?.len() == pods.len() - 1).then_some(())
            });
        }
        // From the first packet on: those that wait for a handshake are late, not lost.
        let mut runs = Vec::new();
        for from in &pods {
            for to in pods.iter().filter(|to| to.name != from.name) {
                for target in to.addresses() {
                    let interval = Duration::from_millis(20);
                    let run = Pinging::start(&from.netns, *target, interval, Some(100)).unwrap();
                    runs.push((format!("{} to {target}", from.name), run));
                }
            }
        }
        assert_eq!(runs.len(), 24);
        for (what, run) in runs {
            let report = run.finish(PATIENCE).unwrap();
            assert_eq!((report.sent, report.lost()), (100, 0), "{what}: {:?}", report.unanswered);
        }

        let server = "100.100.100.100:53".parse().unwrap();
        let server6 = "[fd7a:115c:a1e0::53]:53".parse().unwrap();
        for from in &pods {
            for to in &pods {
                let name = format!("{}.{}", to.name, rig.devnet.base_domain());
                for server in [server, server6] {
                    let answer = dns::lookup(&from.netns, server, &name, false, PATIENCE).unwrap();
                    assert_eq!(answer.addresses, [to.v4().unwrap()], "{name} asked by {}", from.name);
                }
            }
        }
        assert_eq!(rig.devnet.complaints(), [""; 0]);
    });
}
