//! Engines outlive their supervisor, and the next one takes them up, or ends what it cannot believe.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use podtether_net::testing::{block_on, in_namespaces};
use rig::*;
use serde_json::Value;

fn pid(pod: &Value) -> u32 {
    u32::try_from(pod["enginePid"].as_u64().unwrap()).unwrap()
}

fn settled(pod: &Value) -> bool {
    pod["state"] == "running" && pod["controlConnected"] == true && pod["ifindex"] != 0
}

fn traces(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir.join("run/engines")).unwrap();
    entries.map(|entry| entry.unwrap().path().join("process")).collect()
}

fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Nobody reaps orphans here, so a dead one is a zombie.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

#[test]
fn a_supervisors_death_costs_no_packet_and_no_engine() {
    in_namespaces("a_supervisors_death_costs_no_packet_and_no_engine", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let (a, b) = (rig.netns("a").await, rig.netns("b").await);
            let (first, second) = tokio::join!(rig.add("a"), rig.add("b"));
            let (first, second) = (first.unwrap(), second.unwrap());
            echo(&b, 7);
            let to = SocketAddr::new(v4(&second), 7);
            reachable(&a, to);
            let before = rig.until("a", "settled", settled).await;
            let pinger = Pinger::start(&a, to, Duration::from_millis(5));
            for round in 0..6 {
                tokio::time::sleep(Duration::from_millis(200)).await;
                if round % 3 == 2 {
                    rig.terminate()
                } else {
                    rig.kill()
                }
                assert!(lives(pid(&before)), "the engine is still there");
                tokio::time::sleep(Duration::from_millis(200)).await;
                let start = Instant::now();
                rig.start();
                rig.client().await;
                let after = rig.until("a", "taken up", settled).await;
                println!("taken up {:?} after the start", start.elapsed());
                for same in ["enginePid", "ifindex", "udpPort", "udp6Port", "addresses", "mac", "restarts"] {
                    assert_eq!(after[same], before[same], "{same}");
                }
            }
            let back = pinger.finish();
            let lost = back.iter().filter(|b| b.is_none()).count();
            let slowest = back.iter().flatten().max().unwrap();
            println!("{} sent, {lost} lost, the slowest took {slowest:?}", back.len());
            assert_eq!(lost, 0, "{} sent", back.len());
            assert_eq!(devnet.nodes().len(), 2);
            assert_eq!(rig.add("a").await.unwrap(), first, "the same answer");
            assert!(http("/metrics").contains("podtether_engine_adoptions_total{found=\"taken_up\"} 2"));

            // What was taken up can do all that an engine of its own can: die, hang, leave.
            signal(pid(&before), libc::SIGKILL);
            let other = |p: &Value| settled(p) && p["enginePid"] != before["enginePid"];
            let reborn = rig.until("a", "restarted", other).await;
            for same in ["ifindex", "udpPort", "udp6Port", "addresses", "mac"] {
                assert_eq!(reborn[same], before[same], "{same}");
            }
            reachable(&a, to);
            rig.kill();
            rig.start();
            rig.client().await;
            let again = rig.until("a", "taken up", settled).await;
            assert_eq!(again["enginePid"], reborn["enginePid"]);
            signal(pid(&again), libc::SIGSTOP);
            let replaced =
                rig.until("a", "replaced", |p| settled(p) && p["enginePid"] != again["enginePid"]).await;
            assert!(http("/metrics").contains("podtether_engine_exits_total{kind=\"silent\"} 1"));
            assert_eq!(replaced["lastExit"]["kind"], "silent");
            let reason = replaced["lastExit"]["reason"].as_str().unwrap();
            assert!(reason.contains("it was stopped"), "{reason}");
            reachable(&a, to);
            rig.kill();
            rig.start();
            rig.client().await;
            rig.del("a").await.unwrap();
            rig.del("b").await.unwrap();
            assert!(devnet.wait_for(TIMEOUT, <[_]>::is_empty).await, "logged out: {:?}", devnet.nodes());
            rig.until_clean(TIMEOUT).await;
        });
    });
}

#[test]
fn what_an_engine_writes_while_nobody_reads_is_read_by_the_next() {
    in_namespaces("what_an_engine_writes_while_nobody_reads_is_read_by_the_next", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            rig.netns("a").await;
            rig.add("a").await.unwrap();
            let before = rig.until("a", "settled", settled).await;
            rig.kill();
            // It loses its session and says so.
            devnet.set_refusing(true);
            devnet.drop_connections();
            tokio::time::sleep(Duration::from_millis(1500)).await;
            devnet.set_refusing(false);
            assert!(devnet.wait_for(TIMEOUT, |nodes| nodes.iter().all(|n| n.streaming)).await);
            rig.stderr = Some(dir.join("log"));
            rig.start();
            rig.client().await;
            let after = rig.until("a", "taken up", settled).await;
            assert_eq!(after["enginePid"], before["enginePid"]);
            let start = Instant::now();
            loop {
                let log = std::fs::read_to_string(dir.join("log")).unwrap();
                if log.lines().any(|line| line.contains("map session open") && line.contains("\"pod\":\"a\""))
                {
                    break;
                }
                assert!(start.elapsed() < TIMEOUT, "{log}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    });
}

#[test]
fn a_pod_is_known_to_the_next_supervisor_from_the_answer_on() {
    in_namespaces("a_pod_is_known_to_the_next_supervisor_from_the_answer_on", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        block_on(async {
            for round in 0..10 {
                rig.start();
                let name = format!("p{round}");
                rig.netns(&name).await;
                let answer = rig.add(&name).await.unwrap();
                rig.kill();
                rig.start();
                assert_eq!(rig.add(&name).await.unwrap(), answer, "round {round}");
                rig.until(&name, "settled", settled).await;
                rig.del(&name).await.unwrap();
                rig.kill();
            }
        });
    });
}

#[test]
fn what_does_not_agree_is_ended_and_started_anew() {
    in_namespaces("what_does_not_agree_is_ended_and_started_anew", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let names = ["a", "b", "c", "d"];
            for name in names {
                rig.netns(name).await;
                rig.add(name).await.unwrap();
                rig.until(name, "settled", settled).await;
            }
            let of = |name: &str| rig.pod(name);
            let before: Vec<Value> = names.iter().map(|name| of(name)).collect();
            let bystander = std::process::Command::new("sleep").arg("600").spawn().unwrap();
            rig.kill();
            // a: another process has its pid by now.
            let trace_of = |pid: u32| {
                traces(dir)
                    .into_iter()
                    .find(|path| {
                        let text = std::fs::read_to_string(path).unwrap();
                        text.lines().nth(2).unwrap().starts_with(&format!("{pid} "))
                    })
                    .unwrap()
            };
            let (a, b, c) = (trace_of(pid(&before[0])), trace_of(pid(&before[1])), trace_of(pid(&before[2])));
            signal(pid(&before[0]), libc::SIGKILL);
            let text = std::fs::read_to_string(&a).unwrap();
            let line = text.lines().nth(2).unwrap();
            let stolen = line.replacen(&pid(&before[0]).to_string(), &bystander.id().to_string(), 1);
            std::fs::write(&a, text.replace(line, &stolen)).unwrap();
            // b: it does not answer.
            signal(pid(&before[1]), libc::SIGSTOP);
            // c: its descriptors are not what they should be.
            let text = std::fs::read_to_string(&c).unwrap();
            let names_line = text.lines().nth(1).unwrap();
            let swapped = names_line.replace("udp4", "x").replace("udp6", "udp4").replace('x', "udp6");
            assert_ne!(names_line, swapped);
            std::fs::write(&c, text.replace(names_line, &swapped)).unwrap();
            assert!(b.exists());

            rig.stderr = Some(dir.join("log"));
            rig.start();
            rig.client().await;
            for (name, before) in names.iter().zip(&before) {
                let after = rig.until(name, "settled", settled).await;
                if *name == "d" {
                    assert_eq!(after["enginePid"], before["enginePid"], "nothing was wrong with it");
                } else {
                    assert_ne!(after["enginePid"], before["enginePid"], "{name}");
                    assert!(!lives(pid(before)), "{name}: the old one is gone");
                }
                for same in ["ifindex", "udpPort", "udp6Port", "addresses", "mac"] {
                    assert_eq!(after[same], before[same], "{name}: {same}");
                }
            }
            // b and c; what was a's had ended, so nobody killed it.
            let metrics = http("/metrics");
            assert!(metrics.contains("podtether_engine_exits_total{kind=\"unbelieved\"} 2"), "{metrics}");
            assert!(metrics.contains("podtether_engine_adoptions_total{found=\"killed\"} 2"), "{metrics}");
            assert!(metrics.contains("podtether_engine_adoptions_total{found=\"none\"} 1"), "{metrics}");
            assert_eq!(rig.pod("b")["lastExit"]["kind"], "unbelieved");
            assert_eq!(rig.pod("d")["lastExit"], Value::Null);
            let log = std::fs::read_to_string(dir.join("log")).unwrap();
            let told = log.lines().filter(|l| l.contains("WARN") && l.contains("\"kind\":\"unbelieved\""));
            assert_eq!(told.count(), 2, "{log}");
            assert!(lives(bystander.id()), "whoever has the pid of an engine that died is left alone");
            let mut bystander = bystander;
            bystander.kill().unwrap();
            bystander.wait().unwrap();

            // An engine whose record is gone is ended, and its link goes.
            let d = rig.pod("d");
            rig.kill();
            for entry in std::fs::read_dir(dir.join("state/attachments")).unwrap() {
                let path = entry.unwrap().path();
                if std::fs::read_to_string(&path).unwrap().contains("\"name\":\"d\"") {
                    std::fs::remove_file(path).unwrap();
                }
            }
            rig.start();
            rig.client().await;
            rig.until("a", "settled", settled).await;
            assert!(!lives(pid(&d)));
            assert!(http("/metrics").contains("podtether_engine_exits_total{kind=\"no_record\"} 1"));
            assert_eq!(rig.pod("d"), Value::Null);
            assert_eq!(traces(dir).len(), 3);
        });
    });
}

#[test]
fn an_engine_caught_before_it_was_told_who_it_is_does_not_stay() {
    in_namespaces("an_engine_caught_before_it_was_told_who_it_is_does_not_stay", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        block_on(async {
            rig.start();
            rig.netns("a").await;
            rig.add("a").await.unwrap();
            let mut restarts = 0;
            for round in 0..12_u64 {
                let pod = rig.until("a", "settled", settled).await;
                signal(pid(&pod), libc::SIGKILL);
                // Somewhere between the fork, the exec, the confinement and the start request.
                tokio::time::sleep(Duration::from_micros(round * 700)).await;
                rig.kill();
                rig.start();
                rig.client().await;
                restarts += 1;
            }
            let pod = rig.until("a", "settled", settled).await;
            let engines: Vec<u32> = std::fs::read_dir("/proc")
                .unwrap()
                .filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok())
                .filter(|pid| {
                    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                    comm.starts_with("podtether-engin") && lives(*pid)
                })
                .collect();
            assert_eq!(engines, [pid(&pod)], "one engine after {restarts} rounds");
        });
    });
}

#[test]
fn engines_keep_their_uids_when_the_configured_range_changes() {
    in_namespaces("engines_keep_their_uids_when_the_configured_range_changes", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        let config = rig.config.clone();
        rig.config = format!("{config}uid_base = 200000\n");
        rig.start();
        block_on(async {
            for name in ["a", "b"] {
                rig.netns(name).await;
                rig.add(name).await.unwrap();
            }
            let before = [rig.until("a", "settled", settled).await, rig.until("b", "settled", settled).await];
            rig.kill();
            // One on: the next uid of the one is the uid of the other.
            rig.config = format!("{config}uid_base = 200001\n");
            rig.stderr = Some(dir.join("log"));
            rig.start();
            rig.client().await;
            for (name, before) in ["a", "b"].iter().zip(&before) {
                let after = rig.until(name, "taken up", settled).await;
                for same in ["enginePid", "engineUid", "restarts"] {
                    assert_eq!(after[same], before[same], "{name}: {same}");
                }
            }
            // Without ids to give away there is nothing to change.
            let own = before[0]["engineUid"].is_u64();
            let log = std::fs::read_to_string(dir.join("log")).unwrap();
            let told = log.lines().find(|line| line.contains("node.uid_base gives now"));
            assert_eq!(
                told.is_some_and(|line| line.contains("WARN") && line.contains("\"pods\":2")),
                own,
                "{log}"
            );

            let uid = |pod: &Value| pod["engineUid"].as_u64();
            for _ in 0..2 {
                for name in ["a", "b"] {
                    let old = rig.until(name, "settled", settled).await;
                    signal(pid(&old), libc::SIGKILL);
                    let other = |p: &Value| settled(p) && p["enginePid"] != old["enginePid"];
                    rig.until(name, "restarted", other).await;
                    assert!(!own || uid(&rig.pod("a")) != uid(&rig.pod("b")), "two engines have one uid");
                }
            }
            if own {
                let uids = ["a", "b"].map(|name| uid(&rig.pod(name)).unwrap());
                assert_eq!(uids.iter().min(), Some(&200_001), "{uids:?}");
                assert_eq!(uids.iter().max(), Some(&200_002), "{uids:?}");
                let proc = std::fs::read_to_string(format!("/proc/{}/status", pid(&rig.pod("a")))).unwrap();
                assert!(proc.contains(&format!("Uid:\t{}", uids[0])), "{proc}");
            }
            // The new uids are the record's.
            let before = rig.until("a", "settled", settled).await;
            rig.kill();
            rig.start();
            rig.client().await;
            let after = rig.until("a", "taken up", settled).await;
            assert_eq!((&after["enginePid"], uid(&after)), (&before["enginePid"], uid(&before)));
        });
    });
}

#[test]
fn a_supervisor_that_sees_no_namespaces_ends_nothing() {
    in_namespaces("a_supervisor_that_sees_no_namespaces_ends_nothing", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        let shown = dir.join("shown");
        let show = || std::os::unix::fs::symlink(dir.join("netns"), &shown).unwrap();
        show();
        rig.start();
        block_on(async {
            let (a, b) = (rig.netns("a").await, rig.netns("b").await);
            let mut addresses = Vec::new();
            for name in ["a", "b"] {
                let mut request = rig.request(name);
                request.netns = shown.join(name).display().to_string();
                let client = rig.client().await;
                addresses.push(v4(&client.add(within(TIMEOUT), request).await.unwrap().unwrap()));
            }
            echo(&b, 7);
            let to = SocketAddr::new(addresses[1], 7);
            reachable(&a, to);
            let before = rig.until("a", "settled", settled).await;
            let pinger = Pinger::start(&a, to, Duration::from_millis(5));

            // As in a container that the node's directory is not mounted into.
            rig.kill();
            std::fs::remove_file(&shown).unwrap();
            let log = dir.join("log");
            rig.stderr = Some(log.clone());
            rig.start();
            rig.client().await;
            let start = Instant::now();
            let told = || std::fs::read_to_string(&log).unwrap().matches("pod default/a: ").count();
            while told() < 6 {
                assert!(start.elapsed() < TIMEOUT, "{}", std::fs::read_to_string(&log).unwrap());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let blind = rig.pod("a");
            assert_eq!(blind["enginePid"], before["enginePid"]);
            let reason = blind["reason"].as_str().unwrap();
            assert!(reason.contains("no pod's network namespace can be seen"), "{reason}");

            show();
            let after = rig.until("a", "taken up", settled).await;
            for same in ["enginePid", "ifindex", "udpPort", "addresses", "mac"] {
                assert_eq!(after[same], before[same], "{same}");
            }
            let back = pinger.finish();
            let lost = back.iter().filter(|b| b.is_none()).count();
            assert_eq!(lost, 0, "{} sent", back.len());
            rig.del("a").await.unwrap();
            rig.del("b").await.unwrap();
            rig.until_clean(TIMEOUT).await;
        });
    });
}
