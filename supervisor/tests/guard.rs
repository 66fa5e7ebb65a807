//! Engines that answer and do not work, and links that break under engines that do.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it saw"
)]

mod rig;
mod standin;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use podtether_net::Netns;
use podtether_net::link::{LINK_SIDE_NAME, TUN_NAME};
use podtether_net::netlink::Netlink;
use podtether_net::testing::{block_on, in_namespaces, move_link};
use podtether_proto::PROTO_VERSION;
use podtether_proto::log::LogLevel;
use podtether_proto::node::{LogWish, PodSelector};
use rig::*;
use serde_json::Value;

fn running(pod: &Value) -> bool {
    pod["state"] == "running"
}

fn settled(pod: &Value) -> bool {
    running(pod) && pod["controlConnected"] == true && pod["ifindex"] != 0
}

/// Waits until the metrics have this line.
async fn counted(line: &str, within: Duration) {
    let start = Instant::now();
    loop {
        let text = http("/metrics");
        if text.contains(line) {
            println!("{line} after {:?}", start.elapsed());
            return;
        }
        assert!(start.elapsed() < within, "no {line} in {text}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The link namespace of a pod.
fn link_of(rig: &Rig, pod: &str) -> Netns {
    let records = std::fs::read_dir(rig.dir.join("state/attachments")).unwrap();
    let named = format!("\"name\":\"{pod}\"");
    let record = records
        .map(|entry| entry.unwrap().path())
        .find(|path| std::fs::read_to_string(path).unwrap().contains(&named))
        .unwrap();
    Netns::open(&rig.dir.join("run/netns").join(record.file_stem().unwrap())).unwrap()
}

#[test]
fn links_that_break_under_an_engine_are_made_whole() {
    in_namespaces("links_that_break_under_an_engine_are_made_whole", |dir| {
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
            let bystander = rig.until("b", "settled", settled).await;
            let link = link_of(&rig, "a");
            let in_link = Netlink::open(&link).await.unwrap();
            let in_pod = Netlink::open(&a).await.unwrap();
            let elsewhere = rig.netns("elsewhere").await;
            for (fault, kept) in [
                ("tun_down", true),
                ("tun_mtu", true),
                ("veth_down", true),
                ("ts0_down", true),
                ("veth_gone", true),
                ("tun_moved", false),
                ("tun_deleted", false),
            ] {
                let before = rig.until("a", "settled", settled).await;
                let begun = Instant::now();
                let index = async |name| in_link.link(name).await.unwrap().unwrap().index;
                let counter = match fault {
                    "tun_down" => {
                        in_link.set_down(index(TUN_NAME).await).await.unwrap();
                        "podtether_link_repairs_total{fault=\"tun_down\"} 1"
                    }
                    "tun_mtu" => {
                        in_link.set_mtu(index(TUN_NAME).await, 1400).await.unwrap();
                        "podtether_link_repairs_total{fault=\"tun_mtu\"} 1"
                    }
                    "veth_down" => {
                        in_link.set_down(index(LINK_SIDE_NAME).await).await.unwrap();
                        "podtether_link_repairs_total{fault=\"veth_down\"} 1"
                    }
                    "ts0_down" => {
                        let ts0 = in_pod.link("ts0").await.unwrap().unwrap().index;
                        in_pod.set_down(ts0).await.unwrap();
                        "podtether_link_repairs_total{fault=\"veth_down\"} 2"
                    }
                    "veth_gone" => {
                        in_pod.delete_link("ts0").await.unwrap();
                        "podtether_link_repairs_total{fault=\"veth_gone\"} 1"
                    }
                    "tun_moved" => {
                        move_link(&in_link, index(TUN_NAME).await, &elsewhere).await.unwrap();
                        "podtether_engine_exits_total{kind=\"link_remade\"} 1"
                    }
                    _ => {
                        in_link.delete_link(TUN_NAME).await.unwrap();
                        "podtether_engine_exits_total{kind=\"link_lost\"} 1"
                    }
                };
                counted(counter, TIMEOUT).await;
                let after = rig.until("a", "settled", settled).await;
                reachable(&a, to);
                println!("{fault}: reachable again {:?} after", begun.elapsed());
                assert_eq!(after["enginePid"] == before["enginePid"], kept, "{fault}");
                assert_eq!(after["addresses"], before["addresses"], "{fault}");
                assert_eq!(after["udpPort"], before["udpPort"], "{fault}");
                if !kept {
                    let kind = counter.split('"').nth(1).unwrap();
                    assert_eq!(after["lastExit"]["kind"], kind, "{after}");
                }
            }
            assert_eq!(rig.add("a").await.unwrap(), first, "the same answer");
            let after = rig.until("b", "settled", settled).await;
            assert_eq!(after["enginePid"], bystander["enginePid"], "nobody else noticed");
            rig.del("a").await.unwrap();
            rig.del("b").await.unwrap();
            rig.until_clean(TIMEOUT).await;
        });
    });
}

/// A supervisor whose engines are stand-ins; what they are told to do is in their pods' names.
fn with_standins(dir: &std::path::Path, devnet: &podtether_devnet::Devnet) -> Rig {
    let mut rig = Rig::oauth(dir, devnet);
    let this = std::env::current_exe().unwrap();
    rig.config.push_str(&format!("engine_path = {:?}\n", this.display().to_string()));
    rig
}

#[test]
fn an_engine_that_spins_is_replaced_and_one_that_works_is_left_alone() {
    in_namespaces("an_engine_that_spins_is_replaced_and_one_that_works_is_left_alone", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = with_standins(dir, &devnet);
        rig.stderr = Some(dir.join("log"));
        rig.start();
        block_on(async {
            let begun = Instant::now();
            for name in ["spin", "busy", "calm"] {
                rig.netns(name).await;
                rig.add(name).await.unwrap_or_else(|e| panic!("{name}: {e}"));
            }
            let before = [rig.pod("busy"), rig.pod("calm")];
            // Three windows of ten seconds after the first hot one, and what a busy machine adds.
            counted("podtether_engine_exits_total{kind=\"runaway\"} 1", Duration::from_secs(180)).await;
            assert!(begun.elapsed() > Duration::from_secs(30), "not before it was sure");
            let pod = rig.until("spin", "replaced", running).await;
            assert_eq!(pod["lastExit"]["kind"], "runaway", "{pod}");
            println!("{}", pod["lastExit"]["reason"]);
            for (name, before) in ["busy", "calm"].iter().zip(&before) {
                assert_eq!(rig.pod(name)["enginePid"], before["enginePid"], "{name}");
                assert_eq!(rig.pod(name)["lastExit"], Value::Null, "{name}");
            }
            let log = std::fs::read_to_string(dir.join("log")).unwrap();
            let told = log.lines().find(|line| line.contains("\"kind\":\"runaway\"")).unwrap();
            assert!(told.contains("WARN") && told.contains("its work explains"), "{told}");
        });
    });
}

/// How often the threads of a process went to sleep.
fn sleeps(pid: u64) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let of = |status: String| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.unwrap().trim().parse().unwrap()
    };
    tasks.map(|task| of(std::fs::read_to_string(task.path().join("status")).unwrap())).sum()
}

/// Stops the node's one engine, and waits until it is killed for its silence.
async fn is_killed_once_stopped(pid: u64) {
    signal(u32::try_from(pid).unwrap(), libc::SIGSTOP);
    let begun = Instant::now();
    counted("podtether_engine_exits_total{kind=\"silent\"} 1", TIMEOUT).await;
    println!("killed after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(9), "5.5 s, and what a busy machine adds");
}

#[test]
fn an_engine_that_has_not_run_is_left_asleep_and_one_that_hangs_is_killed() {
    in_namespaces("an_engine_that_has_not_run_is_left_asleep_and_one_that_hangs_is_killed", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = with_standins(dir, &devnet);
        rig.start();
        block_on(async {
            rig.netns("calm").await;
            rig.add("calm").await.unwrap();
            let before = rig.until("calm", "running", running).await;
            let pid = before["enginePid"].as_u64().unwrap();
            // The beat that follows the last of the start's calls.
            tokio::time::sleep(Duration::from_secs(3)).await;
            let slept = sleeps(pid);
            tokio::time::sleep(Duration::from_secs(10)).await;
            let slept = sleeps(pid) - slept;
            println!("asleep again {slept} times in 10 s");
            // One slow beat may fall into them.
            assert!(slept <= 4, "{slept}");
            // Stopped, it runs for as long as that takes, and is asked.
            is_killed_once_stopped(pid).await;
        });
    });
}

#[test]
fn an_engine_that_hangs_right_after_it_answered_is_killed() {
    in_namespaces("an_engine_that_hangs_right_after_it_answered_is_killed", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            rig.netns("calm").await;
            rig.add("calm").await.unwrap();
            let before = rig.until("calm", "running", running).await;
            let pid = before["enginePid"].as_u64().unwrap();
            let runs = || std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
            let begun = Instant::now();
            loop {
                assert!(begun.elapsed() < TIMEOUT, "no heartbeat is seen");
                // A question makes it run, so that the next beat asks it. That it is asked shows in its runs.
                http("/metrics");
                tokio::time::sleep(Duration::from_millis(100)).await;
                let (still, since) = (runs(), Instant::now());
                while runs() == still && since.elapsed() < Duration::from_millis(1200) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                if runs() != still {
                    break;
                }
            }
            // It has answered, and the supervisor has not yet seen it back asleep.
            tokio::time::sleep(Duration::from_millis(10)).await;
            is_killed_once_stopped(pid).await;
        });
    });
}

#[test]
fn an_engine_that_does_not_read_its_tun_is_replaced() {
    in_namespaces("an_engine_that_does_not_read_its_tun_is_replaced", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = with_standins(dir, &devnet);
        rig.start();
        block_on(async {
            let a = rig.netns("deaf").await;
            rig.add("deaf").await.unwrap();
            let before = rig.until("deaf", "running", running).await;
            tokio::time::sleep(Duration::from_secs(8)).await;
            assert_eq!(rig.pod("deaf")["enginePid"], before["enginePid"], "nothing waits, nothing is wrong");
            let socket = a.run_blocking(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap()).unwrap();
            socket.send_to(b"x", "100.64.0.77:9").unwrap();
            counted("podtether_engine_exits_total{kind=\"unread\"} 1", Duration::from_secs(60)).await;
            let pod =
                rig.until("deaf", "replaced", |p| running(p) && p["enginePid"] != before["enginePid"]).await;
            assert_eq!(pod["lastExit"]["kind"], "unread", "{pod}");
        });
    });
}

#[test]
fn engines_of_the_minor_next_to_this_one_are_started_and_taken_up() {
    in_namespaces("engines_of_the_minor_next_to_this_one_are_started_and_taken_up", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = with_standins(dir, &devnet);
        rig.environment.push(("PODTETHER_LOG", format!("info,{}", standin::ANOTHER_MINOR)));
        rig.start();
        block_on(async {
            rig.netns("a").await;
            rig.add("a").await.unwrap();
            let before = rig.until("a", "running", running).await;
            assert_eq!(before["name"], "another.tailnet.test");
            for round in 1..=2 {
                rig.kill();
                rig.start();
                rig.client().await;
                let after = rig.until("a", "taken up", settled).await;
                assert_eq!(after["enginePid"], before["enginePid"], "round {round}");
                assert_eq!(after["health"][0]["title"], "t");
                let metrics = http("/metrics");
                assert!(
                    metrics.contains("podtether_engine_adoptions_total{found=\"taken_up\"} 1"),
                    "{metrics}"
                );
                let sent = metrics
                    .lines()
                    .find(|line| line.starts_with("podtether_pod_packets_total{direction=\"transmit\""));
                assert!(sent.is_some_and(|line| line.ends_with(" 4711")), "{metrics}");
            }
            // Its heartbeat goes on.
            tokio::time::sleep(Duration::from_secs(7)).await;
            assert_eq!(rig.pod("a")["enginePid"], before["enginePid"]);
            assert_eq!(rig.pod("a")["lastExit"], Value::Null);
        });
    });
}

/// As after an upgrade of the supervisor: the engine is of the minor before.
#[test]
fn an_engine_of_the_minor_before_is_asked_nothing_that_it_does_not_know() {
    in_namespaces("an_engine_of_the_minor_before_is_asked_nothing_that_it_does_not_know", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = with_standins(dir, &devnet);
        rig.config = rig.config.replace("tags = ", "hostname_template = \"taken\"\ntags = ");
        rig.environment.push(("PODTETHER_LOG", format!("info,{}", standin::ANOTHER_MINOR)));
        rig.start();
        let podtether = |arguments: &[&str]| {
            let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_podtether"));
            let socket = dir.join("run/supervisor.sock");
            let output = command.args(arguments).arg("--socket").arg(socket).output().unwrap();
            (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
        };
        let earlier = format!("version {}.{} and has no ", PROTO_VERSION.major, standin::minor());
        let refused = |arguments: &[&str], call: &str| {
            let (code, said) = podtether(arguments);
            assert_eq!(code, Some(1), "{said}");
            let what = format!("{earlier}{call}, which came with ");
            for part in
                ["pod default/a: its engine is of an earlier build", &what, "`podtether restart default/a`"]
            {
                assert!(said.contains(part), "no {part:?}: {said}");
            }
        };
        block_on(async {
            let selector = || PodSelector::Pod { namespace: "default".into(), name: "a".into() };
            // Of the host name: its value, and the notes about it.
            let told = async |rig: &Rig| {
                let client = rig.client().await;
                let choice = client.choice(within(TIMEOUT), selector()).await.unwrap().unwrap();
                let setting = choice.settings.into_iter().find(|setting| setting.name == "hostname");
                (setting.unwrap().value, choice.notes)
            };
            rig.netns("a").await;
            rig.add("a").await.unwrap();
            let before = rig.until("a", "running", running).await;
            assert_eq!(before["name"], "taken-1.tailnet.test");
            // Whatever its ADD is answered before: the name that it cannot ask for is told of.
            let start = Instant::now();
            while told(&rig).await.0 != "taken-1" {
                assert!(start.elapsed() < TIMEOUT, "{:?}", told(&rig).await);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let (_, notes) = told(&rig).await;
            assert_eq!(notes.len(), 1, "{notes:?}");
            for part in [
                "host name taken is taken",
                "is called taken-1 until `podtether restart default/a`",
                &earlier,
            ] {
                assert!(notes[0].contains(part), "no {part:?}: {notes:?}");
            }

            for round in 0..2 {
                refused(&["log-level", "a", "debug"], "set_log");
                refused(&["netcheck", "a"], "netcheck");
                refused(&["ping", "a", "b", "-c", "1"], "way");
                let log = rig.client().await.log_level(within(TIMEOUT), selector(), LogWish::Tell).await;
                let raised = log.unwrap().unwrap().raised;
                assert_eq!(raised.map(|log| log.level), Some(LogLevel::Debug), "the supervisor's own lines");
                let now = rig.until("a", "settled", settled).await;
                assert_eq!((&now["enginePid"], &now["lastExit"]), (&before["enginePid"], &Value::Null));
                if round == 0 {
                    // What is started from now on is of this build.
                    rig.kill();
                    rig.environment.clear();
                    rig.start();
                    rig.client().await;
                    rig.until("a", "taken up", settled).await;
                }
            }
            let start = Instant::now();
            while told(&rig).await.1.is_empty() {
                assert!(start.elapsed() < TIMEOUT, "the next supervisor tells of the name as well");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }

            let (code, said) = podtether(&["restart", "a", "--kill"]);
            assert_eq!(code, Some(0), "{said}");
            let now = rig.until("a", "settled", settled).await;
            assert_ne!(now["enginePid"], before["enginePid"]);
            let name = now["name"].as_str().unwrap().split('.').next().unwrap();
            assert_eq!(name, "taken-a", "the name that its engine was started with");
            let start = Instant::now();
            while told(&rig).await != (name.to_owned(), Vec::new()) {
                assert!(start.elapsed() < TIMEOUT, "{:?}", told(&rig).await);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let (code, said) = podtether(&["log-level", "a", "trace"]);
            assert_eq!(code, Some(0), "{said}");
        });
    });
}
