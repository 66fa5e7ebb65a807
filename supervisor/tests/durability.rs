//! A supervisor that is killed between any two of its steps: what the next one finds is a whole pod, or
//! becomes none.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it saw"
)]

mod rig;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use podtether_devnet::Devnet;
use podtether_net::testing::{block_on, in_namespaces};
use rig::*;
use serde_json::Value;

/// Where in an ADD or a DEL the supervisor is killed: so often, spread over as long as it takes and more.
fn cuts() -> u32 {
    std::env::var("PODTETHER_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(24)
}

/// Engines and plugins that live, besides those that `rig` knows of.
fn engines() -> Vec<u32> {
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let dead = stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'));
            !dead && stat.contains("(podtether-engin")
        })
        .collect()
}

async fn nothing_left(rig: &Rig, devnet: &Devnet, at: &str) {
    rig.until_clean(TIMEOUT).await;
    assert!(devnet.wait_for(TIMEOUT, <[_]>::is_empty).await, "{at}: {:?}", devnet.nodes());
    assert_eq!(engines(), [0; 0], "{at}");
    let left: Vec<_> = devnet.auth_keys().into_iter().filter(|key| !key.used && !key.revoked).collect();
    println!("{at}: {} keys left to expire", left.len());
}

#[test]
fn an_add_that_is_cut_off_anywhere_can_be_made_again_or_taken_back() {
    in_namespaces("an_add_that_is_cut_off_anywhere_can_be_made_again_or_taken_back", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            rig.netns("a").await;
            let start = Instant::now();
            rig.add("a").await.unwrap();
            let whole = start.elapsed();
            rig.del("a").await.unwrap();
            nothing_left(&rig, &devnet, "at first").await;
            for cut in 0..cuts() {
                let after = whole * 5 / 4 * cut / cuts();
                let at = format!("cut {cut}, {after:?} of {whole:?}");
                let client = rig.client().await;
                let request = rig.request("a");
                let asked = tokio::spawn(async move { client.add(within(TIMEOUT), request).await });
                tokio::time::sleep(after).await;
                rig.kill();
                let answered = matches!(asked.await.unwrap(), Ok(Ok(_)));
                rig.start();
                rig.client().await;
                // What a runtime does after an ADD that failed: DEL, and often another ADD.
                if cut % 2 == 0 {
                    rig.add("a").await.unwrap_or_else(|e| panic!("{at}, answered {answered}: {e}"));
                    let pod = rig.until("a", "running", |p| p["state"] == "running").await;
                    assert_eq!(
                        engines(),
                        [u32::try_from(pod["enginePid"].as_u64().unwrap()).unwrap()],
                        "{at}"
                    );
                }
                rig.del("a").await.unwrap_or_else(|e| panic!("{at}, answered {answered}: {e}"));
                nothing_left(&rig, &devnet, &at).await;
            }
        });
    });
}

#[test]
fn a_del_that_is_cut_off_anywhere_is_finished_by_the_next_supervisor() {
    in_namespaces("a_del_that_is_cut_off_anywhere_is_finished_by_the_next_supervisor", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            rig.netns("a").await;
            rig.add("a").await.unwrap();
            let start = Instant::now();
            rig.del("a").await.unwrap();
            let whole = start.elapsed();
            for cut in 0..cuts() {
                let after = whole * 5 / 4 * cut / cuts();
                let at = format!("cut {cut}, {after:?} of {whole:?}");
                rig.add("a").await.unwrap_or_else(|e| panic!("{at}: {e}"));
                let client = rig.client().await;
                let asked = tokio::spawn(async move { client.del(within(TIMEOUT), attachment("a")).await });
                tokio::time::sleep(after).await;
                rig.kill();
                let _ = asked.await.unwrap();
                rig.start();
                // Runtimes repeat a DEL that was not answered.
                rig.del("a").await.unwrap_or_else(|e| panic!("{at}: {e}"));
                nothing_left(&rig, &devnet, &at).await;
            }
        });
    });
}

#[test]
fn without_descriptors_or_with_a_read_only_disk_pods_that_run_go_on() {
    in_namespaces("without_descriptors_or_with_a_read_only_disk_pods_that_run_go_on", |dir| {
        use nix::mount::{MsFlags, mount};
        use nix::sys::resource::{Resource, rlim_t};
        let devnet = devnet(|_| {});
        let state = dir.join("state");
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let (a, b) = (rig.netns("a").await, rig.netns("b").await);
            rig.netns("c").await;
            let (_, second) = (rig.add("a").await.unwrap(), rig.add("b").await.unwrap());
            echo(&b, 7);
            let to = SocketAddr::new(v4(&second), 7);
            reachable(&a, to);
            let pinger = Pinger::start(&a, to, Duration::from_millis(10));

            // No descriptor is left for anything new.
            let limit = |soft: rlim_t| {
                let pid = i32::try_from(rig.pid()).unwrap();
                let new = libc::rlimit { rlim_cur: soft, rlim_max: 4096 };
                // SAFETY: reads one rlimit, which outlives the call.
                let result = unsafe {
                    libc::prlimit(
                        pid,
                        Resource::RLIMIT_NOFILE as libc::__rlimit_resource_t,
                        &raw const new,
                        std::ptr::null_mut(),
                    )
                };
                assert_eq!(result, 0);
            };
            // While a call is under way, so that it has its connection.
            let open = std::fs::read_dir(format!("/proc/{}/fd", rig.pid())).unwrap().count();
            let client = rig.client().await;
            limit(rlim_t::try_from(open + 2).unwrap());
            let mut request = rig.request("c");
            request.timeout_ms = 4000;
            let error = client.add(within(TIMEOUT), request.clone()).await.unwrap().unwrap_err();
            println!("without descriptors: {error}");
            assert!(error.to_string().contains("default/c"), "{error}");
            limit(4096);
            rig.add("c").await.unwrap();
            rig.del("c").await.unwrap();

            // Nothing can be written.
            let records = ["attachments", "identities"].map(|name| state.join(name));
            let read_only = |on: bool| {
                for dir in &records {
                    if !on {
                        nix::mount::umount(dir).unwrap();
                        continue;
                    }
                    for more in [MsFlags::empty(), MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY] {
                        mount(Some(dir), dir, None::<&str>, MsFlags::MS_BIND | more, None::<&str>).unwrap();
                    }
                }
            };
            read_only(true);
            let start = Instant::now();
            let error = rig.add("c").await.unwrap_err();
            assert!(start.elapsed() < TIMEOUT / 2, "nothing was made, so nothing has to be taken back");
            println!("with a read-only disk: {error}");
            assert!(
                error.to_string().contains("Read-only") && error.to_string().contains("default/c"),
                "{error}"
            );
            // An engine that dies needs no disk.
            let before = rig.pod("a");
            signal(u32::try_from(before["enginePid"].as_u64().unwrap()).unwrap(), libc::SIGKILL);
            rig.until("a", "restarted", |p| p["state"] == "running" && p["enginePid"] != before["enginePid"])
                .await;
            // Nor does one that is taken up by a supervisor whose disk is still read-only.
            reachable(&a, to);
            let back = pinger.finish();
            let lost = back.iter().filter(|b| b.is_none()).count();
            println!("{} sent, {lost} lost", back.len());
            assert!(lost <= 30, "{lost} of {}", back.len());
            read_only(false);
            rig.add("c").await.unwrap();
            for name in ["a", "b", "c"] {
                rig.del(name).await.unwrap();
            }
            assert!(devnet.wait_for(TIMEOUT, <[_]>::is_empty).await);
            assert_eq!(rig.pod("a"), Value::Null);
        });
    });
}
