//! What an engine costs that has nothing to do.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod common;

use std::time::Duration;

use common::{Join, PATIENCE, Pod, underlay_addresses};
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig};
use podtether_net::testing::{block_on, in_namespaces};

/// How long is counted.
const COUNTED: Duration = Duration::from_secs(30);
/// A connection counts as in use for a minute after it was made.
const SETTLED: Duration = Duration::from_secs(65);

/// Times that any thread of the process gave the processor away.
fn wakes(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let of = |status: String| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.unwrap().trim().parse().unwrap()
    };
    tasks.map(|task| of(std::fs::read_to_string(task.path().join("status")).unwrap())).sum()
}

#[test]
fn an_idle_engine_sleeps() {
    in_namespaces("an_idle_engine_sleeps", |dir| {
        block_on(async {
            let addresses = underlay_addresses(&["10.9.0.1/32"]).await;
            let devnet = Devnet::start(DevnetConfig::default()).await.unwrap();
            for n in 0..10 {
                assert!(!devnet.add_node(&format!("peer{n}")).is_empty());
            }
            let key = AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() };
            let join = Join {
                control_url: devnet.https_url(),
                ca_pem: devnet.ca_pem().to_owned(),
                auth_key: Some(devnet.create_auth_key(key).secret),
                addresses,
            };
            let mut pod = Pod::make(dir, "idle").await;
            pod.join(&join).await;
            let status = pod.wait(|s| s.home_derp != 0).await;
            assert!(status.control_connected, "within {PATIENCE:?}");
            let pid = pod.engine.as_ref().unwrap().child.id();
            let count = async |after: Duration| {
                tokio::time::sleep(after).await;
                let before = wakes(pid);
                tokio::time::sleep(COUNTED).await;
                wakes(pid) - before
            };
            let (used, idle) = (count(Duration::from_secs(5)).await, count(SETTLED - COUNTED).await);
            println!(
                "wake-ups in {COUNTED:?} with 10 idle peers: {used} soon after the start, {idle} when idle"
            );
            // Keepalives, control's and the relay's, and whatever else falls into that half of a minute.
            assert!(idle <= 15, "{idle} wake-ups in {COUNTED:?}");
        });
    });
}
