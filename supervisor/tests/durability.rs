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

/// Uses up every pid of this test's own pid namespace but those that live, until it is dropped.
struct FullPidSpace {
    threads: Vec<std::thread::JoinHandle<()>>,
    end: Option<std::sync::mpsc::Sender<()>>,
    before: String,
}

const PID_MAX: &str = "/proc/sys/kernel/pid_max";

impl FullPidSpace {
    /// `None` where a pid namespace has no limit of its own, before Linux 6.14: there the file is the machine's, and
    /// the machine's root may write it in here, too.
    fn make() -> Option<Self> {
        let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
        if (numbers.next()?, numbers.next()?) < (6, 14) {
            return None;
        }
        let before = std::fs::read_to_string(PID_MAX).unwrap();
        let pids = std::fs::read_dir("/proc").unwrap();
        let highest: u32 =
            pids.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok()).max().unwrap();
        // The kernel takes none below 301.
        std::fs::write(PID_MAX, (highest + 64).max(400).to_string()).ok()?;
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let ended = std::sync::Arc::new(std::sync::Mutex::new(ended));
        let mut threads = Vec::new();
        loop {
            let ended = std::sync::Arc::clone(&ended);
            let body = move || {
                let _ = ended.lock().unwrap().recv();
            };
            match std::thread::Builder::new().stack_size(64 << 10).spawn(body) {
                Ok(thread) => threads.push(thread),
                Err(e) => {
                    assert_eq!(e.raw_os_error(), Some(libc::EAGAIN), "{e}");
                    break;
                }
            }
        }
        println!("{} threads use the pids up", threads.len());
        Some(Self { threads, end: Some(end), before })
    }
}

impl Drop for FullPidSpace {
    fn drop(&mut self) {
        self.end.take();
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        std::fs::write(PID_MAX, &self.before).unwrap();
    }
}

#[test]
fn without_pids_pods_that_run_go_on_and_others_start_when_there_is_room() {
    in_namespaces("without_pids_pods_that_run_go_on_and_others_start_when_there_is_room", |dir| {
        let devnet = devnet(|_| {});
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
            let Some(full) = FullPidSpace::make() else {
                println!("SKIPPED: this kernel has one pid_max for all pid namespaces");
                return;
            };
            let mut request = rig.request("c");
            request.timeout_ms = 3000;
            let client = rig.client().await;
            let error = client.add(within(TIMEOUT), request).await.unwrap().unwrap_err();
            println!("without pids: {error}");
            let text = error.to_string();
            assert!(text.contains("default/c") && text.contains("temporarily unavailable"), "{text}");
            let back = pinger.finish();
            let lost = back.iter().filter(|b| b.is_none()).count();
            println!("{} sent, {lost} lost", back.len());
            assert_eq!(lost, 0, "of {}", back.len());

            // An engine that dies leaves one pid free, if anybody reaps it.
            let before = rig.pod("a");
            let died = u32::try_from(before["enginePid"].as_u64().unwrap()).unwrap();
            signal(died, libc::SIGKILL);
            let gone = |p: &Value| p["enginePid"] != before["enginePid"];
            rig.until("a", "noticed", gone).await;
            drop(full);
            let other = |p: &Value| p["state"] == "running" && p["enginePid"] != before["enginePid"];
            rig.until("a", "running again", other).await;
            reachable(&a, to);
            rig.add("c").await.unwrap();
            for name in ["a", "b", "c"] {
                rig.del(name).await.unwrap();
            }
            nothing_left(&rig, &devnet, "at the end").await;
        });
    });
}

#[test]
fn files_that_are_cut_or_altered_cost_their_own_pod_at_most_a_restart() {
    in_namespaces("files_that_are_cut_or_altered_cost_their_own_pod_at_most_a_restart", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let (a, b) = (rig.netns("a").await, rig.netns("b").await);
            rig.add("b").await.unwrap();
            let bystander = rig.until("b", "running", |p| p["state"] == "running").await;
            let first = rig.add("a").await.unwrap();
            echo(&a, 7);
            let to = SocketAddr::new(v4(&first), 7);
            let record = std::fs::read_dir(dir.join("state/attachments"))
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .find(|path| std::fs::read_to_string(path).unwrap().contains("\"name\":\"a\""))
                .unwrap();
            let home = dir.join("run/engines").join(record.file_stem().unwrap());
            let seed: u64 =
                std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(20_261_121);
            println!("SEED={seed}");
            let mut random = seed;
            let mut next = move |below: usize| {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                usize::try_from(random >> 33).unwrap() % below.max(1)
            };
            for (name, may_restart) in
                [("process", true), ("intercepting", false), ("snapshot", false), ("reason", false)]
            {
                for harm in ["empty", "cut", "flipped", "flipped", "digit", "noise", "missing"] {
                    let before = rig
                        .until("a", "running", |p| p["state"] == "running" && p["controlConnected"] == true)
                        .await;
                    rig.kill();
                    let path = home.join(name);
                    let mut bytes = std::fs::read(&path).unwrap_or_default();
                    match harm {
                        "empty" => bytes.clear(),
                        "cut" => bytes.truncate(next(bytes.len())),
                        "flipped" => {
                            let (at, bit) = (next(bytes.len()), next(8));
                            if let Some(byte) = bytes.get_mut(at) {
                                *byte ^= 1 << bit;
                            }
                        }
                        // The start time, in a trace: as if the pid were another process's by now.
                        "digit" => {
                            let at = String::from_utf8_lossy(&bytes)
                                .match_indices(' ')
                                .nth(20)
                                .map(|(at, _)| at + 1);
                            if let Some(byte) = at.and_then(|at| bytes.get_mut(at)) {
                                *byte = if *byte == b'1' { b'2' } else { b'1' };
                            }
                        }
                        _ => bytes = (0..5000).map(|_| u8::try_from(next(256)).unwrap()).collect(),
                    }
                    if harm == "missing" {
                        let _ = std::fs::remove_file(&path);
                    } else {
                        // In place, as a torn write would: engines hold some of these open.
                        std::fs::write(&path, &bytes).unwrap();
                    }
                    rig.start();
                    rig.client().await;
                    let after =
                        rig.until("a", "running", |p| p["state"] == "running" && p["ifindex"] != 0).await;
                    let what = format!("{name} {harm}: {}", after["lastExit"]);
                    println!("{what}");
                    assert!(may_restart || after["enginePid"] == before["enginePid"], "{what}");
                    assert_eq!(after["addresses"], before["addresses"], "{what}");
                    let other =
                        rig.until("b", "running", |p| p["state"] == "running" && p["ifindex"] != 0).await;
                    assert_eq!(other["enginePid"], bystander["enginePid"], "{what}");
                    let engines = engines();
                    assert_eq!(engines.len(), 2, "{what}: {engines:?}");
                }
                // The next engine has to live with what it finds.
                let before = rig.until("a", "running", |p| p["controlConnected"] == true).await;
                signal(u32::try_from(before["enginePid"].as_u64().unwrap()).unwrap(), libc::SIGKILL);
                rig.until("a", "running", |p| {
                    p["state"] == "running" && p["enginePid"] != before["enginePid"]
                })
                .await;
            }
            reachable(&b, to);
            rig.del("a").await.unwrap();
            rig.del("b").await.unwrap();
            nothing_left(&rig, &devnet, "at the end").await;
        });
    });
}
