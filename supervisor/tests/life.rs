//! The life of a pod on real kernel objects, with the real engine and a devnet.

mod rig;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use podtether_net::testing::{block_on, in_namespaces};
use rig::*;

#[test]
fn join_talk_survive_leave() {
    in_namespaces("join_talk_survive_leave", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let (a, b) = (rig.netns("a").await, rig.netns("b").await);
            let start = Instant::now();
            let (first, twice, second) = tokio::join!(rig.add("a"), rig.add("a"), rig.add("b"));
            let (first, second) = (first.unwrap(), second.unwrap());
            assert_eq!(twice.unwrap(), first, "at the same time, too");
            println!("two ADDs took {:?}", start.elapsed());
            assert_eq!((first.ifname.as_str(), first.mtu, first.addresses.len()), ("ts0", 1280, 2));
            assert!(first.addresses[0].addr().is_ipv4());
            assert_eq!(rig.add("a").await.unwrap(), first, "the same container gets the same answer");
            let pod = rig.pod("a");
            assert_eq!(pod["state"], "running", "{pod}");
            assert_eq!(pod["tags"][0], "tag:k8s-pod");
            assert_eq!(pod["name"], "k8s-default-a.tailnet.test");

            let status = format!("/proc/{}/status", pod["enginePid"]);
            let status = std::fs::read_to_string(status).unwrap();
            let line = |name: &str| status.lines().find(|l| l.starts_with(name)).unwrap().to_owned();
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(line(set).split_whitespace().nth(1), Some("0000000000000000"), "{set}");
            }
            assert_eq!(line("NoNewPrivs:").split_whitespace().nth(1), Some("1"));
            if let Some(uid) = pod["engineUid"].as_u64() {
                assert_eq!(line("Uid:").split_whitespace().nth(1), Some(uid.to_string().as_str()));
            }

            for to in [v4(&second), v6(&second)] {
                tcp_echo(&b, &a, SocketAddr::new(to, 8000));
            }
            echo(&b, 7);
            let to = SocketAddr::new(v4(&second), 7);
            reachable(&a, to);

            // The engine dies under traffic.
            let before = rig.pod("a");
            let pinger = Pinger::start(&a, to, Duration::from_millis(5));
            tokio::time::sleep(Duration::from_millis(1500)).await;
            let mut pid = before["enginePid"].as_u64().unwrap();
            // The last as if by a forbidden system call.
            for how in [libc::SIGKILL; 4].into_iter().chain([libc::SIGSYS]) {
                signal(u32::try_from(pid).unwrap(), how);
                let old = pid;
                let pod = rig
                    .until("a", "running again", |p| {
                        p["state"] == "running" && p["enginePid"].as_u64().is_some_and(|n| n != old)
                    })
                    .await;
                pid = pod["enginePid"].as_u64().unwrap();
                for same in ["ifindex", "udpPort", "addresses", "mac"] {
                    assert_eq!(pod[same], before[same], "{same}");
                }
                tokio::time::sleep(Duration::from_millis(1500)).await;
            }
            let back = pinger.finish();
            let mut gaps: Vec<usize> = back
                .split(|b| b.is_some_and(|d| d < Duration::from_millis(20)))
                .map(<[_]>::len)
                .filter(|n| *n > 0)
                .collect();
            gaps.sort_unstable();
            let lost = back.iter().filter(|b| b.is_none()).count();
            println!("{} sent, {lost} lost, gaps in 5 ms steps {gaps:?}", back.len());
            assert_eq!(rig.pod("a")["restarts"], 5);
            let metrics = http("/metrics");
            assert!(metrics.contains("podtether_pod_engine_restarts_total{namespace=\"default\",pod=\"a\""));
            assert!(metrics.contains("podtether_engine_exits_total{kind=\"forbidden_call\"} 1"), "{metrics}");
            assert!(metrics.contains("podtether_engine_exits_total{kind=\"crash\"} 4"), "{metrics}");
            for step in ["capabilities", "no_new_privs", "no_files", "calls", "limits"] {
                let held = rig.pod("a")["sandbox"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .any(|report| report["step"] == step && report["state"] == "held");
                assert!(held, "{step}: {}", rig.pod("a")["sandbox"]);
                let labels =
                    format!("{{namespace=\"default\",pod=\"a\",step=\"{step}\",tailnet=\"default\"}} 1");
                assert!(metrics.contains(&format!("podtether_pod_sandbox_step{labels}")), "{metrics}");
            }

            let (one, two) = tokio::join!(rig.del("a"), rig.del("b"));
            one.unwrap();
            two.unwrap();
            rig.del("a").await.unwrap();
            assert!(devnet.wait_for(TIMEOUT, |nodes| nodes.is_empty()).await, "{:?}", devnet.nodes());
            rig.until_clean(TIMEOUT).await;
            assert!(!http("/metrics").contains("pod=\"a\""));
        });
        rig.terminate();
        assert_eq!(devnet.complaints(), [""; 0]);
    });
}
