//! Many pods at once, and many deaths in a row. Sizes come from the environment for a longer run.

mod rig;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use podtether_net::testing::{block_on, in_namespaces};
use rig::*;

fn size(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[test]
fn many_pods_join_die_and_leave_at_once() {
    in_namespaces("many_pods_join_die_and_leave_at_once", |dir| {
        let pods = size("PODTETHER_PODS", 16);
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let names: Vec<String> = (0..pods).map(|n| format!("p{n}")).collect();
            for name in &names {
                rig.netns(name).await;
            }
            rig.client().await;
            let start = Instant::now();
            let each = futures_util::future::join_all(names.iter().map(async |name| {
                let attached = rig.add(name).await.unwrap();
                (start.elapsed(), v4(&attached))
            }))
            .await;
            let addresses: std::collections::HashSet<_> = each.iter().map(|(_, a)| *a).collect();
            assert_eq!(addresses.len(), pods);
            println!("{pods} ADDs at once: {:?}", start.elapsed());
            let mut alone = Vec::new();
            rig.netns("alone").await;
            for _ in 0..5 {
                let start = Instant::now();
                rig.add("alone").await.unwrap();
                alone.push(start.elapsed());
                rig.del("alone").await.unwrap();
            }
            println!("one ADD after another: {alone:?}");

            let engines = |rig: &Rig| -> Vec<u32> {
                let pid =
                    |name: &String| u32::try_from(rig.pod(name)["enginePid"].as_u64().unwrap()).unwrap();
                names.iter().map(pid).collect()
            };
            let before = engines(&rig);
            rig.kill();
            let start = Instant::now();
            rig.start();
            rig.client().await;
            let taken_up = format!("podtether_engine_adoptions_total{{found=\"taken_up\"}} {pods}");
            while !http("/metrics").contains(&taken_up) {
                assert!(start.elapsed() < TIMEOUT, "{}", http("/metrics"));
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            println!("supervisor killed: {pods} engines taken up after {:?}", start.elapsed());
            for name in &names {
                rig.until(name, "running", |p| p["state"] == "running" && p["ifindex"] != 0).await;
            }
            println!("supervisor killed: all links looked at after {:?}", start.elapsed());
            assert_eq!(engines(&rig), before, "nobody was started anew");

            rig.kill();
            for pid in before {
                signal(pid, libc::SIGKILL);
            }
            let start = Instant::now();
            rig.start();
            rig.client().await;
            for name in &names {
                rig.until(name, "running", |p| p["state"] == "running" && p["controlConnected"] == true)
                    .await;
            }
            println!("everything killed: {pods} pods run again after {:?}", start.elapsed());

            let start = Instant::now();
            let ends = futures_util::future::join_all(names.iter().map(|name| rig.del(name))).await;
            assert!(ends.iter().all(Result::is_ok), "{ends:?}");
            println!("{pods} DELs at once: {:?}", start.elapsed());
            assert!(devnet.wait_for(TIMEOUT, <[_]>::is_empty).await);
            rig.until_clean(TIMEOUT).await;
        });
        rig.terminate();
    });
}

#[test]
fn engine_kills_in_a_row_cost_milliseconds() {
    in_namespaces("engine_kills_in_a_row_cost_milliseconds", |dir| {
        let kills = size("PODTETHER_KILLS", 8);
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let (a, b, c) = (rig.netns("a").await, rig.netns("b").await, rig.netns("c").await);
            let (one, two, three) = tokio::join!(rig.add("a"), rig.add("b"), rig.add("c"));
            let (_, two, three) = (one.unwrap(), two.unwrap(), three.unwrap());
            echo(&b, 7);
            echo(&c, 7);
            reachable(&a, SocketAddr::new(v4(&two), 7));
            reachable(&b, SocketAddr::new(v4(&three), 7));
            let before = rig.pod("a");
            let pace = Duration::from_millis(5);
            let hit = Pinger::start(&a, SocketAddr::new(v4(&two), 7), pace);
            let other = Pinger::start(&b, SocketAddr::new(v4(&three), 7), pace);
            for _ in 0..kills {
                tokio::time::sleep(Duration::from_millis(1100)).await;
                let old = rig.pod("a")["enginePid"].as_u64().unwrap();
                signal(u32::try_from(old).unwrap(), libc::SIGKILL);
                rig.until("a", "running again", |p| {
                    p["state"] == "running" && p["enginePid"].as_u64().is_some_and(|pid| pid != old)
                })
                .await;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
            let (hit, other) = (hit.finish(), other.finish());
            // A gap: the longest time that a datagram sent after a kill took, or until one came back.
            let mut gaps = Vec::new();
            let mut worst = Duration::ZERO;
            for back in &hit {
                let took = back.unwrap_or(Duration::MAX);
                if took > Duration::from_millis(15) {
                    worst = if back.is_some() { worst.max(took) } else { worst + pace };
                } else if !worst.is_zero() {
                    gaps.push(worst);
                    worst = Duration::ZERO;
                }
            }
            gaps.sort_unstable();
            let lost = hit.iter().filter(|b| b.is_none()).count();
            let elsewhere = other.iter().filter(|b| b.is_none()).count();
            println!(
                "{kills} kills, {} sent: {lost} lost here, {elsewhere} lost elsewhere; gaps {gaps:?}",
                hit.len()
            );
            assert_eq!(elsewhere, 0, "the other pods lose nothing");
            let after = rig.pod("a");
            for same in ["ifindex", "udpPort", "addresses", "mac"] {
                assert_eq!(after[same], before[same], "{same}");
            }
            if !gaps.is_empty() {
                let median = gaps[gaps.len() / 2];
                assert!(median < Duration::from_millis(150), "{median:?}");
            }
        });
    });
}
