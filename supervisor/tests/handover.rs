//! A planned restart: the new engine is ready before the old one lets go, and no packet is lost.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use podtether_net::Netns;
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::node::{CniError, PodSelector, Renewal, Renewed};
use podtether_supervisor::restart::HEALTHY_AFTER;
use rig::*;
use serde_json::Value;

fn pid(pod: &Value) -> u32 {
    u32::try_from(pod["enginePid"].as_u64().unwrap()).unwrap()
}

fn settled(pod: &Value) -> bool {
    pod["state"] == "running" && pod["controlConnected"] == true && pod["ifindex"] != 0
}

type Renewing = tokio::task::JoinHandle<Result<Result<Renewed, CniError>, tarpc::client::RpcError>>;

async fn begin(rig: &Rig, pod: &str, how: Renewal) -> Renewing {
    let pod = PodSelector::Pod { namespace: "default".into(), name: pod.into() };
    let client = rig.client().await;
    tokio::spawn(async move { client.renew(within(Duration::from_secs(30)), pod, how).await })
}

async fn renew(rig: &Rig, pod: &str, how: Renewal) -> Result<Renewed, CniError> {
    begin(rig, pod, how).await.await.unwrap().unwrap()
}

/// Engines of this test's node that live, and no zombies.
fn engines() -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let read = |name: &str| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let ours = std::fs::read_link(entry.path().join("ns/net")).ok()
            == std::fs::read_link("/proc/self/ns/net").ok();
        let stat = read("stat");
        let dead = stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'));
        if ours && !dead && read("comm").trim() == "podtether-engin" {
            found.push(pid);
        }
    }
    found
}

async fn one_engine_each(pods: usize) {
    let start = Instant::now();
    while engines().len() != pods {
        assert!(start.elapsed() < TIMEOUT, "{:?} of {pods}", engines());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A stream that never rests: how long its reader once waited, and how much came.
struct Stream {
    stop: Arc<AtomicBool>,
    reader: JoinHandle<(Duration, u64)>,
}

impl Stream {
    fn start(server: &Netns, client: &Netns, to: SocketAddr) -> Self {
        let listener = server.run_blocking(move || TcpListener::bind(to).unwrap()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let reader = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            let mut buffer = vec![0; 64 << 10];
            let (mut slowest, mut bytes) = (Duration::ZERO, 0);
            loop {
                let since = Instant::now();
                let n = stream.read(&mut buffer).unwrap();
                if n == 0 {
                    return (slowest, bytes);
                }
                slowest = slowest.max(since.elapsed());
                bytes += u64::try_from(n).unwrap();
            }
        });
        let stopped = Arc::clone(&stop);
        let mut stream =
            client.run_blocking(move || TcpStream::connect_timeout(&to, TIMEOUT).unwrap()).unwrap();
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                stream.write_all(&[7; 1000]).unwrap();
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        Self { stop, reader }
    }

    fn finish(self) -> (Duration, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.reader.join().unwrap()
    }
}

fn median(mut all: Vec<Duration>) -> Duration {
    all.sort_unstable();
    all[all.len() / 2]
}

/// What a round cost: lost and the slowest answer, of what was sent while it went on.
fn cost(pinger: Pinger) -> (usize, Duration, usize) {
    let back = pinger.finish();
    let lost = back.iter().filter(|b| b.is_none()).count();
    (lost, back.iter().flatten().max().copied().unwrap_or(TIMEOUT), back.len())
}

#[test]
fn a_planned_restart_loses_no_packet() {
    in_namespaces("a_planned_restart_loses_no_packet", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let (a, b) = (rig.netns("a").await, rig.netns("b").await);
            let (first, second) = tokio::join!(rig.add("a"), rig.add("b"));
            let (first, second) = (first.unwrap(), second.unwrap());
            echo(&a, 7);
            echo(&b, 7);
            let (to_a, to_b) = (SocketAddr::new(v4(&first), 7), SocketAddr::new(v4(&second), 7));
            reachable(&a, to_b);
            reachable(&b, to_a);
            let before = rig.until("a", "settled", settled).await;
            let stream = Stream::start(&b, &a, SocketAddr::new(v4(&second), 99));
            let direct = |pod: &Value| pod["peers"].to_string().contains("irect");
            let start = Instant::now();
            loop {
                let pods: Value = serde_json::from_str(&http("/v1/pods?peers=true")).unwrap();
                if pods.as_array().unwrap().iter().all(direct) {
                    break;
                }
                assert!(start.elapsed() < TIMEOUT, "{pods}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let (mut slowest, mut quiet, mut gaps, mut took) = (vec![], vec![], vec![], vec![]);
            let mut last = pid(&before);
            for round in 0..12 {
                let pinger = Pinger::start(&a, to_b, Duration::from_millis(2));
                tokio::time::sleep(Duration::from_millis(300)).await;
                let (lost, idle, _) = cost(pinger);
                assert_eq!(lost, 0);
                quiet.push(idle);
                let pingers = [
                    Pinger::start(&a, to_b, Duration::from_millis(2)),
                    Pinger::start(&b, to_a, Duration::from_millis(2)),
                ];
                let done = renew(&rig, "a", Renewal::Handover).await.unwrap();
                assert_ne!(done.pid, last);
                last = done.pid;
                gaps.push(Duration::from_micros(done.gap_us.unwrap()));
                took.push(Duration::from_millis(done.took_ms));
                // Until the engine before has ended.
                one_engine_each(2).await;
                for (way, pinger) in ["out", "in"].into_iter().zip(pingers) {
                    let (lost, worst, sent) = cost(pinger);
                    println!("round {round} {way}: {sent} sent, {lost} lost, the slowest took {worst:?}");
                    assert_eq!(lost, 0, "of {sent}");
                    slowest.push(worst);
                }
            }
            let after = rig.until("a", "settled", settled).await;
            assert_eq!(pid(&after), last);
            for same in ["ifindex", "udpPort", "udp6Port", "addresses", "mac", "restarts"] {
                assert_eq!(after[same], before[same], "{same}");
            }
            assert_eq!(after["handovers"], 12);
            let (longest, bytes) = stream.finish();
            assert!(bytes > 100_000);
            let mut crashes = Vec::new();
            for _ in 0..3 {
                let pinger = Pinger::start(&a, to_b, Duration::from_millis(2));
                let done = renew(&rig, "a", Renewal::Kill).await.unwrap();
                assert_eq!((done.how, done.gap_us), (Renewal::Kill, None));
                tokio::time::sleep(Duration::from_millis(500)).await;
                crashes.push(cost(pinger).1);
            }
            let (of_handovers, of_kills) = (median(slowest), median(crashes));
            println!(
                "slowest answer, median: {of_handovers:?} by handover, {of_kills:?} by --kill, {:?} in peace; nobody \
                 read for {:?}; done after {:?}; the stream once waited {longest:?}",
                median(quiet),
                median(gaps),
                median(took)
            );
            assert!(of_handovers < of_kills, "a handover costs less than a restart");
            let metrics = http("/metrics");
            assert!(metrics.contains("podtether_handovers_total{outcome=\"done\"} 12"), "{metrics}");
            rig.del("a").await.unwrap();
            rig.del("b").await.unwrap();
            rig.until_clean(TIMEOUT).await;
            assert!(engines().is_empty(), "{:?}", engines());
        });
    });
}

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Party {
    Predecessor,
    Successor,
    Supervisor,
    SupervisorAndPredecessor,
    SupervisorAndSuccessor,
    Everybody,
}

#[test]
fn whoever_dies_in_the_middle_one_engine_is_in_charge_in_the_end() {
    in_namespaces("whoever_dies_in_the_middle_one_engine_is_in_charge_in_the_end", |dir| {
        use Party::*;
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let (a, b) = (rig.netns("a").await, rig.netns("b").await);
            let (first, second) = tokio::join!(rig.add("a"), rig.add("b"));
            first.unwrap();
            let to_b = SocketAddr::new(v4(&second.unwrap()), 7);
            echo(&b, 7);
            reachable(&a, to_b);
            let mut kept = 0;
            let mut rounds = 0;
            for who in [
                Predecessor,
                Successor,
                Supervisor,
                SupervisorAndPredecessor,
                SupervisorAndSuccessor,
                Everybody,
            ] {
                for after_ms in [0, 1, 2, 4, 8, 12, 30, 300] {
                    let before = rig.until("a", "settled", settled).await;
                    // One that dies younger is started again with a back-off, which is not what is looked at here.
                    tokio::time::sleep(HEALTHY_AFTER + Duration::from_millis(100)).await;
                    let bystanders = engines();
                    let call = begin(&rig, "a", Renewal::Handover).await;
                    let begun = Instant::now();
                    // The successor's death needs one.
                    let successor = loop {
                        let new = engines().into_iter().find(|pid| !bystanders.contains(pid));
                        if new.is_some()
                            || begun.elapsed() > Duration::from_millis(after_ms) && who == Predecessor
                        {
                            break new;
                        }
                        assert!(begun.elapsed() < TIMEOUT, "no successor");
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    };
                    tokio::time::sleep(Duration::from_millis(after_ms)).await;
                    if matches!(
                        who,
                        Supervisor | SupervisorAndPredecessor | SupervisorAndSuccessor | Everybody
                    ) {
                        rig.kill();
                    }
                    // One that ended by itself in time is as dead.
                    let end = |pid: u32| {
                        // SAFETY: sends a signal to a process of this test.
                        unsafe { libc::kill(i32::try_from(pid).unwrap(), libc::SIGKILL) }
                    };
                    if matches!(who, Predecessor | SupervisorAndPredecessor | Everybody) {
                        end(pid(&before));
                    }
                    if let Some(successor) = successor
                        && matches!(who, Successor | SupervisorAndSuccessor | Everybody)
                    {
                        end(successor);
                    }
                    if matches!(who, Predecessor | Successor) {
                        // Done or given up, and said so.
                        let _ = call.await.unwrap().unwrap();
                    } else {
                        rig.start();
                        rig.client().await;
                        drop(call);
                    }
                    let start = Instant::now();
                    let after = loop {
                        let after = rig.until("a", "settled", settled).await;
                        let living = engines();
                        if living.len() == 2 && living.contains(&pid(&after)) {
                            break after;
                        }
                        assert!(start.elapsed() < TIMEOUT, "{who:?} after {after_ms} ms: {living:?} {after}");
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    };
                    for same in ["ifindex", "udpPort", "udp6Port", "addresses", "mac"] {
                        assert_eq!(after[same], before[same], "{who:?} after {after_ms} ms: {same}");
                    }
                    reachable(&a, to_b);
                    rounds += 1;
                    kept += usize::from(after["enginePid"] == before["enginePid"]);
                }
            }
            println!("{rounds} handovers cut short, the engine before went on after {kept}");
            rig.del("a").await.unwrap();
            rig.del("b").await.unwrap();
            rig.until_clean(TIMEOUT).await;
            assert!(engines().is_empty(), "{:?}", engines());
        });
    });
}

#[test]
fn a_handover_that_hangs_is_given_up_and_a_pod_that_leaves_ends_it() {
    in_namespaces("a_handover_that_hangs_is_given_up_and_a_pod_that_leaves_ends_it", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let (a, b) = (rig.netns("a").await, rig.netns("b").await);
            let (first, second) = tokio::join!(rig.add("a"), rig.add("b"));
            first.unwrap();
            let to_b = SocketAddr::new(v4(&second.unwrap()), 7);
            echo(&b, 7);
            reachable(&a, to_b);
            let before = rig.until("a", "settled", settled).await;
            let successor = async |bystanders: &[u32]| {
                let start = Instant::now();
                loop {
                    if let Some(new) = engines().into_iter().find(|pid| !bystanders.contains(pid)) {
                        return new;
                    }
                    assert!(start.elapsed() < TIMEOUT, "no successor");
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };

            // The successor hangs: nobody notices.
            let pinger = Pinger::start(&a, to_b, Duration::from_millis(5));
            let bystanders = engines();
            let call = begin(&rig, "a", Renewal::Handover).await;
            signal(successor(&bystanders).await, libc::SIGSTOP);
            let refused = call.await.unwrap().unwrap().unwrap_err();
            println!("{refused}");
            assert!(
                refused.msg.contains("the one before goes on") && refused.details.contains("--kill"),
                "{refused}"
            );
            one_engine_each(2).await;
            let (lost, slowest, sent) = cost(pinger);
            println!("a hanging successor: {sent} sent, {lost} lost, the slowest took {slowest:?}");
            assert_eq!(lost, 0);
            let after = rig.until("a", "settled", settled).await;
            assert_eq!((&after["enginePid"], &after["handovers"]), (&before["enginePid"], &Value::from(0)));
            assert!(http("/metrics").contains("podtether_handovers_total{outcome=\"start\"} 1"));

            // The engine before hangs: that is a crash like any.
            signal(pid(&after), libc::SIGSTOP);
            let refused = renew(&rig, "a", Renewal::Handover).await.unwrap_err();
            println!("{refused}");
            rig.until("a", "replaced", |p| settled(p) && p["enginePid"] != after["enginePid"]).await;
            one_engine_each(2).await;
            reachable(&a, to_b);

            // Two at once: the second is refused, while the first has not come to its end.
            let bystanders = engines();
            let first = begin(&rig, "a", Renewal::Handover).await;
            let new = successor(&bystanders).await;
            signal(new, libc::SIGSTOP);
            let refused = renew(&rig, "a", Renewal::Handover).await.unwrap_err();
            println!("{refused}");
            signal(new, libc::SIGCONT);
            first.await.unwrap().unwrap().unwrap();
            let again = renew(&rig, "a", Renewal::Handover).await.unwrap();
            println!("again, while the one before lingers: {again:?}");

            // The pod leaves in the middle.
            one_engine_each(2).await;
            let bystanders = engines();
            let call = begin(&rig, "a", Renewal::Handover).await;
            successor(&bystanders).await;
            rig.del("a").await.unwrap();
            let left = call.await.unwrap();
            println!("{left:?}");
            one_engine_each(1).await;
            rig.del("b").await.unwrap();
            rig.until_clean(TIMEOUT).await;
            assert!(engines().is_empty(), "{:?}", engines());
            assert!(devnet.wait_for(TIMEOUT, <[_]>::is_empty).await, "logged out: {:?}", devnet.nodes());
        });
    });
}
