//! What a node at rest costs: how often each engine wakes up, and the processor time of all of them and of the
//! supervisor. `PODTETHER_PODS` and `PODTETHER_SECONDS` make it larger and longer; with `PODTETHER_LONG=1` the first minute,
//! in which relays count as in use, is waited for.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it saw"
)]

mod rig;

use std::time::{Duration, Instant};

use podtether_net::testing::{block_on, in_namespaces};
use rig::*;

fn size(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Nanoseconds on a processor, and how often it went to sleep: all threads together. How often it came to run
/// would count what a busy machine takes it off the processor for.
fn used(pid: u32) -> (u64, u64) {
    let mut sum = (0, 0);
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let read = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let (schedstat, status) = (read("schedstat"), read("status"));
        sum.0 += schedstat.split(' ').next().map_or(0, |ran| ran.parse::<u64>().unwrap());
        let slept = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        sum.1 += slept.map_or(0, |slept| slept.trim().parse::<u64>().unwrap());
    }
    sum
}

#[test]
fn engines_at_rest_sleep() {
    in_namespaces("engines_at_rest_sleep", |dir| {
        let (pods, seconds) = (size("PODTETHER_PODS", 3), size("PODTETHER_SECONDS", 12));
        let long = std::env::var_os("PODTETHER_LONG").is_some_and(|value| value == "1");
        // A relay that counts as in use is pinged every 5 s, and who has run is asked whether it works.
        let (settled, most) = if long { (65, seconds) } else { (8, 2 * seconds) };
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let names: Vec<String> = (0..pods).map(|n| format!("p{n}")).collect();
            for name in &names {
                rig.netns(name).await;
                rig.add(name).await.unwrap();
            }
            let mut engines = Vec::new();
            for name in &names {
                let pod = rig
                    .until(name, "running", |p| p["state"] == "running" && p["controlConnected"] == true)
                    .await;
                engines.push(u32::try_from(pod["enginePid"].as_u64().unwrap()).unwrap());
            }
            // Netchecks, endpoints, snapshots: what follows a join ends.
            tokio::time::sleep(Duration::from_secs(settled)).await;
            let read = || -> (Vec<(u64, u64)>, (u64, u64)) {
                (engines.iter().map(|pid| used(*pid)).collect(), used(rig.pid()))
            };
            let (engines_before, supervisor_before) = read();
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            let (engines_after, supervisor_after) = read();
            let woke: Vec<u64> =
                engines_after.iter().zip(&engines_before).map(|(after, before)| after.1 - before.1).collect();
            let ran: u64 =
                engines_after.iter().zip(&engines_before).map(|(after, before)| after.0 - before.0).sum();
            let percent = |ns: u64| ns as f64 / 1e7 / seconds as f64;
            let ran_supervisor = supervisor_after.0 - supervisor_before.0;
            println!(
                "{pods} engines in {seconds} s: {} wake-ups, most of one {}; {:.3} % of a processor, the supervisor {:.3} % with \
                 {} wake-ups",
                woke.iter().sum::<u64>(),
                woke.iter().max().unwrap(),
                percent(ran),
                percent(ran_supervisor),
                supervisor_after.1 - supervisor_before.1
            );
            assert!(woke.iter().all(|woke| *woke <= most), "{woke:?}");
            let asked = Instant::now();
            let metrics = http("/metrics");
            println!("/metrics: {:?}", asked.elapsed());
            assert!(metrics.contains("podtether_pod_engine_runs_total{"), "{metrics}");
            let ready: Vec<_> =
                metrics.lines().filter(|line| line.starts_with("podtether_engine_ready_seconds")).collect();
            assert_eq!(ready.last(), Some(&&*format!("podtether_engine_ready_seconds_count {pods}")));
            println!("{ready:?}");
        });
        rig.terminate();
    });
}
