//! A container's end, and what survives it.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use podtether_net::testing::block_on;
use serde_json::Value;

use crate::rig::*;
use crate::runtime::{Container, Runtime, Settings, cgroups_named, on_a_node};

pub(crate) fn pid(pod: &Value) -> u32 {
    u32::try_from(pod["enginePid"].as_u64().unwrap()).unwrap()
}

pub(crate) fn settled(pod: &Value) -> bool {
    pod["state"] == "running" && pod["controlConnected"] == true && pod["ifindex"] != 0
}

/// Settled, and put where its limits are.
pub(crate) fn limited(pod: &Value) -> bool {
    settled(pod) && pod["limits"] == serde_json::json!(["cgroup", "memory", "pids", "cpu", "mounts"])
}

pub(crate) fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Nothing of a container's file system is open or mounted in the engine.
fn holds_nothing(pid: u32, root: &Path) {
    let of = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let mounts = of("mountinfo");
    assert!(mounts.lines().count() == 1 && mounts.contains(" / / ro,"), "{mounts}");
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert_eq!(program, Path::new("/memfd:podtether-engine (deleted)"));
    assert!(of("cmdline").starts_with("podtether-engine"));
    assert_eq!(of("comm"), "podtether-engin\n");
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        assert!(!target.starts_with(root) && !target.starts_with("/dev/null"), "{target:?}");
    }
    // A development build maps the C library of its image.
    let mapped: Vec<String> = of("maps")
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5).map(str::to_owned))
        .filter(|file| file.starts_with('/') && !file.starts_with("/memfd:") && !file.contains(".so"))
        .collect();
    assert!(mapped.is_empty(), "{mapped:?}");
}

#[test]
fn a_containers_end_is_no_engines() {
    on_a_node("outlive::a_containers_end_is_no_engines", |dir, names| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        names.configure(&mut rig);
        let runtime = Runtime::start(dir);
        runtime.import_image();
        let cgroup = format!("/{}/1", names.containers);
        let first = Container::start(&runtime, "first", dir, &cgroup, Settings::ALL);
        block_on(async {
            rig.client().await;
            let (a, b) = (rig.netns("a").await, rig.netns("b").await);
            let (joined, other) = tokio::join!(rig.add("a"), rig.add("b"));
            let (joined, other) = (joined.unwrap(), other.unwrap());
            echo(&b, 7);
            let to = SocketAddr::new(v4(&other), 7);
            reachable(&a, to);
            let before = rig.until("a", "settled", limited).await;
            let also = rig.until("b", "settled", limited).await;
            let text = http("/metrics");
            for limit in ["cgroup", "memory", "pids", "cpu", "mounts"] {
                let line = format!(
                    "podtether_pod_engine_limits{{limit=\"{limit}\",namespace=\"default\",pod=\"a\",tailnet=\"default\"}} 1"
                );
                assert!(text.contains(&line), "{line}\n{text}");
            }
            for pod in [&before, &also] {
                holds_nothing(pid(pod), &runtime.root());
                let is_in = fs::read_to_string(format!("/proc/{}/cgroup", pid(pod))).unwrap();
                assert!(!is_in.contains(&names.containers), "{is_in}");
            }

            let pinger = Pinger::start(&a, to, Duration::from_millis(5));
            tokio::time::sleep(Duration::from_millis(300)).await;
            let supervisor = first.pid();
            first.kill_and_delete();
            assert!(!lives(supervisor), "the supervisor is gone");
            assert!(lives(pid(&before)) && lives(pid(&also)), "the engines are not");
            tokio::time::sleep(Duration::from_millis(300)).await;

            let start = Instant::now();
            let cgroup = format!("/{}/2", names.containers);
            let second = Container::start(&runtime, "second", dir, &cgroup, Settings::ALL);
            rig.client().await;
            let after = rig.until("a", "taken up", settled).await;
            println!("taken up {:?} after the second container was asked for", start.elapsed());
            for same in
                ["enginePid", "ifindex", "udpPort", "udp6Port", "addresses", "mac", "restarts", "limits"]
            {
                assert_eq!(after[same], before[same], "{same}");
            }
            assert_eq!(rig.add("a").await.unwrap(), joined, "the same answer");
            let back = pinger.finish();
            let lost = back.iter().filter(|b| b.is_none()).count();
            println!("{} sent, {lost} lost, the slowest took {:?}", back.len(), back.iter().flatten().max());
            assert_eq!(lost, 0, "{} sent", back.len());

            // The second one can do all that the first one could.
            signal(pid(&after), libc::SIGKILL);
            rig.until("a", "restarted", |p| settled(p) && p["enginePid"] != after["enginePid"]).await;
            reachable(&a, to);
            rig.del("a").await.unwrap();
            rig.del("b").await.unwrap();
            rig.until_clean(TIMEOUT).await;
            for dir in cgroups_named(&names.engines) {
                let left: Vec<_> = fs::read_dir(&dir)
                    .unwrap()
                    .flatten()
                    .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
                    .map(|e| e.path())
                    .collect();
                assert!(left.is_empty(), "{left:?}");
            }
            second.kill_and_delete();
        });
    });
}

/// What happens to a pod's engine when the container ends that ran the supervisor with these settings.
fn without(name: &str, settings: Settings, limits: &[&str]) {
    on_a_node(name, |dir, names| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        names.configure(&mut rig);
        let runtime = Runtime::start(dir);
        runtime.import_image();
        let cgroup = format!("/{}/1", names.containers);
        let first = Container::start(&runtime, "first", dir, &cgroup, settings);
        block_on(async {
            rig.client().await;
            let _a = rig.netns("a").await;
            rig.add("a").await.unwrap();
            let as_told = |pod: &Value| settled(pod) && pod["limits"] == serde_json::json!(limits);
            let before = rig.until("a", "limited as it should be", as_told).await;
            first.kill_and_delete();
            // By the pid that it has here: in another PID namespace it has none that we know.
            let left = engines();
            assert!(left.is_empty(), "{left:?}");

            // With the next one it has to start anew, on the same link.
            let cgroup = format!("/{}/2", names.containers);
            let second = Container::start(&runtime, "second", dir, &cgroup, Settings::ALL);
            rig.client().await;
            let after = rig.until("a", "running again", settled).await;
            for same in ["ifindex", "udpPort", "addresses", "mac"] {
                assert_eq!(after[same], before[same], "{same}");
            }
            rig.del("a").await.unwrap();
            rig.until_clean(TIMEOUT).await;
            second.kill_and_delete();
        });
    });
}

pub(crate) fn engines() -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
    let is_engine = |pid: &u32| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        comm.starts_with("podtether-engin") && lives(*pid)
    };
    pids.filter(is_engine).collect()
}

#[test]
fn without_the_nodes_cgroups_engines_end_with_the_container() {
    let settings = Settings { cgroups: false, ..Settings::ALL };
    let name = "outlive::without_the_nodes_cgroups_engines_end_with_the_container";
    without(name, settings, &["mounts"]);
}

#[test]
fn without_the_nodes_pids_engines_end_with_the_container() {
    let settings = Settings { host_pid: false, ..Settings::ALL };
    let name = "outlive::without_the_nodes_pids_engines_end_with_the_container";
    without(name, settings, &["cgroup", "memory", "pids", "cpu", "mounts"]);
}

#[test]
fn without_propagation_the_next_container_makes_links_anew() {
    let name = "outlive::without_propagation_the_next_container_makes_links_anew";
    on_a_node(name, |dir, names| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        names.configure(&mut rig);
        let runtime = Runtime::start(dir);
        runtime.import_image();
        let settings = Settings { bidirectional: false, ..Settings::ALL };
        let cgroup = format!("/{}/1", names.containers);
        let first = Container::start(&runtime, "first", dir, &cgroup, settings);
        block_on(async {
            rig.client().await;
            let (a, b) = (rig.netns("a").await, rig.netns("b").await);
            rig.add("a").await.unwrap();
            let other = rig.add("b").await.unwrap();
            echo(&b, 7);
            let to = SocketAddr::new(v4(&other), 7);
            reachable(&a, to);
            let before = rig.until("a", "settled", settled).await;
            let pinger = Pinger::start(&a, to, Duration::from_millis(5));
            first.kill_and_delete();
            assert!(lives(pid(&before)), "the engine is not the container's");
            tokio::time::sleep(Duration::from_millis(500)).await;
            let cgroup = format!("/{}/2", names.containers);
            let second = Container::start(&runtime, "second", dir, &cgroup, settings);
            rig.client().await;
            let after = rig.until("a", "running again", settled).await;
            assert_ne!(after["enginePid"], before["enginePid"]);
            assert_ne!(after["ifindex"], before["ifindex"], "nobody finds the link any more");
            for same in ["udpPort", "addresses", "mac", "limits"] {
                assert_eq!(after[same], before[same], "{same}");
            }
            reachable(&a, to);
            let back = pinger.finish();
            let lost = back.iter().filter(|b| b.is_none()).count();
            println!("{} sent, {lost} lost", back.len());
            rig.del("a").await.unwrap();
            rig.del("b").await.unwrap();
            rig.until_clean(TIMEOUT).await;
            second.kill_and_delete();
        });
    });
}
