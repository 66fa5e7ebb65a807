//! An engine process in a tailnet of ten thousand peers, and a thousand deltas a second.
//!
//! A minute of them with `PODTETHER_LONG=1`, else a few seconds.

#![allow(clippy::unwrap_used)]

mod common;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use common::{Join, Pod, Probed, echo, patient, probe, underlay_addresses};
use podtether_devnet::{AuthKeyOptions, Crowd, Devnet, DevnetConfig};
use podtether_net::testing::{block_on, in_namespaces};

const PEERS: u32 = 10_000;
const RATE: u32 = 1000;
/// Pings are this far apart.
const PING: Duration = Duration::from_millis(20);

fn minute() -> Duration {
    let long = std::env::var_os("PODTETHER_LONG").is_some_and(|value| value == "1");
    Duration::from_secs(if long { 60 } else { 6 })
}

/// What an engine process has used.
#[derive(Clone, Copy, Debug)]
struct Usage {
    rss_anon_kib: i64,
    cpu: Duration,
    written: u64,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RssAnon {} KiB, CPU {:.2} s", self.rss_anon_kib, self.cpu.as_secs_f64())
    }
}

fn usage(pod: &Pod) -> Usage {
    let pid = pod.engine.as_ref().unwrap().child.id();
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    let field = |text: &str, name: &str| -> u64 {
        let value = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        value.split_whitespace().next().unwrap().parse().unwrap()
    };
    let stat = read("stat");
    // Fields 14 and 15 of proc(5), counted from behind the name, in ticks of a hundredth of a second.
    let ticks = stat.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    Usage {
        rss_anon_kib: i64::try_from(field(&read("status"), "RssAnon:")).unwrap(),
        cpu: Duration::from_millis(10 * ticks),
        written: field(&read("io"), "wchar:"),
    }
}

/// The most memory the engine has while `work` runs.
async fn at_most<T>(pod: &Pod, work: impl Future<Output = T>) -> (T, i64) {
    let (done, most) = most_each(pod, Duration::MAX, work).await;
    (done, most.into_iter().max().unwrap())
}

/// The most memory the engine has, in KiB, in each part of the time that `work` runs.
async fn most_each<T>(pod: &Pod, part: Duration, work: impl Future<Output = T>) -> (T, Vec<i64>) {
    let mut most = vec![usage(pod).rss_anon_kib];
    let mut began = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    tokio::pin!(work);
    loop {
        let done = tokio::select! {
            done = &mut work => Some(done),
            _ = ticks.tick() => None,
        };
        if began.elapsed() >= part {
            began += part;
            most.push(0);
        }
        let last = most.last_mut().unwrap();
        *last = usage(pod).rss_anon_kib.max(*last);
        if let Some(done) = done {
            return (done, most);
        }
    }
}

async fn metrics(pod: &Pod) -> podtether_proto::engine::EngineMetrics {
    pod.client().metrics(patient()).await.unwrap()
}

/// Waits until the engine has this many peers.
async fn peers(pod: &Pod, wanted: impl Fn(u64) -> bool) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let peers = metrics(pod).await.peers;
        if wanted(peers) {
            return peers;
        }
        assert!(Instant::now() < deadline, "{} has {peers} peers", pod.name);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn pings(from: &Pod, source: IpAddr, to: SocketAddr, time: Duration) -> Probed {
    let count = u32::try_from(time.as_millis() / PING.as_millis()).unwrap();
    let probed = probe(from, source, to, count, PING).await;
    assert!(probed.answered * 100 >= probed.sent * 99, "{probed:?}");
    probed
}

#[test]
fn ten_thousand_peers_and_a_thousand_deltas_a_second() {
    in_namespaces("ten_thousand_peers_and_a_thousand_deltas_a_second", |dir| {
        block_on(async {
            let addresses = underlay_addresses(&["10.9.0.1/32"]).await;
            let devnet = Devnet::start(DevnetConfig::default()).await.unwrap();
            let options = AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() };
            let join = Join {
                control_url: devnet.https_url(),
                ca_pem: devnet.ca_pem().to_owned(),
                auth_key: Some(devnet.create_auth_key(options).secret),
                addresses,
            };
            // A small engine to compare with, and to talk to; the crowd is there for those that join later.
            let mut b = Pod::make(dir, "b").await;
            let b_ip = b.join(&join).await[0];
            let to = SocketAddr::new(b_ip, 7);
            let _echo = echo(&b, to).await;
            let mut c = Pod::make(dir, "c").await;
            let c_ip = c.join(&join).await[0];
            let settled = pings(&c, c_ip, to, Duration::from_secs(2)).await;
            let small = usage(&c);
            println!("an engine with 1 peer: {small}; longest gap of pings {:?}", settled.gap);
            c.client().stop(patient()).await.unwrap();
            c.ended().await;

            devnet.set_crowd(Crowd { peers: PEERS, deltas_per_second: 0 });
            let mut a = Pod::make(dir, "a").await;
            let began = Instant::now();
            a.start(&join).await;
            let joining = async {
                let a_ip = a.configure().await[0];
                let usable = began.elapsed();
                (a_ip, usable, peers(&a, |peers| peers >= u64::from(PEERS)).await)
            };
            let ((a_ip, usable, count), most) = Box::pin(at_most(&a, joining)).await;
            let whole = began.elapsed();
            let joined = usage(&a);
            println!(
                "joined {count} peers: running after {usable:?}, all peers after {whole:?}; {joined}, \
                 at most {most} KiB"
            );
            let idle = pings(&a, a_ip, to, Duration::from_secs(2)).await;
            // The last of the first snapshots.
            tokio::time::sleep(Duration::from_secs(4)).await;
            let before = usage(&a);
            let each = (before.rss_anon_kib - small.rss_anon_kib) * 1024 / i64::from(PEERS);
            println!("at rest: {before}, {each} bytes a peer more than the small engine; gap {:?}", idle.gap);

            // A control session that begins anew brings the whole map, and traffic goes on.
            let sessions = devnet.node("a").unwrap().session;
            // One peer more, of which nothing but that map can tell.
            let again = async {
                devnet.set_refusing(true);
                devnet.drop_connections();
                devnet.set_crowd(Crowd { peers: PEERS + 1, deltas_per_second: 0 });
                devnet.set_refusing(false);
                let anew = |nodes: &[podtether_devnet::NodeInfo]| {
                    nodes.iter().any(|node| node.name == "a" && node.session > sessions && node.streaming)
                };
                assert!(devnet.wait_for(Duration::from_secs(60), anew).await);
                peers(&a, |peers| peers == count + 1).await
            };
            let ((during, count), most_again) = Box::pin(at_most(&a, async {
                tokio::join!(pings(&a, a_ip, to, Duration::from_secs(6)), again)
            }))
            .await;
            let renewed = usage(&a);
            println!(
                "a new session: {renewed}, at most {most_again} KiB, CPU {:?}; gap {:?}, lost {}",
                renewed.cpu - before.cpu,
                during.gap,
                during.sent - during.answered
            );

            let time = minute();
            let began = usage(&a);
            devnet.set_crowd(Crowd { peers: PEERS + 1, deltas_per_second: RATE });
            let made = devnet.deltas_made();
            let (churned, most_churn) = most_each(&a, time / 6, pings(&a, a_ip, to, time)).await;
            devnet.set_crowd(Crowd { peers: PEERS + 1, deltas_per_second: 0 });
            let ended = usage(&a);
            // What was on its way.
            peers(&a, |peers| peers == count).await;
            tokio::time::sleep(Duration::from_secs(4)).await;
            let after = usage(&a);
            let deltas = devnet.deltas_made() - made;
            let metrics = metrics(&a).await;
            println!(
                "{deltas} deltas in {time:?}: {after}, at most {most_churn:?} KiB in each sixth of it, CPU {:?} for them; gap {:?}, \
                 lost {}; {} bytes written; drops {:?}",
                ended.cpu - began.cpu,
                churned.gap,
                churned.sent - churned.answered,
                ended.written - began.written,
                metrics.drops,
            );
            assert_eq!(devnet.complaints(), Vec::<String>::new());
            let most_churn = most_churn.into_iter().max().unwrap();
            let snapshot = file_bytes(&a);

            // Killed: its snapshot has everybody, and control is not there.
            devnet.set_refusing(true);
            devnet.drop_connections();
            let again = Join { auth_key: None, ..join.clone() };
            let (back, _echo_back) = (SocketAddr::new(a_ip, 7), echo(&a, SocketAddr::new(a_ip, 7)).await);
            a.kill();
            let started = Instant::now();
            let (recovered, ()) = tokio::join!(probe(&b, b_ip, back, 200, Duration::from_millis(5)), async {
                a.start(&again).await;
            });
            println!(
                "killed with a snapshot file of {snapshot} bytes: gap {:?} (in {:?})",
                recovered.gap,
                started.elapsed()
            );
            assert_eq!(peers(&a, |peers| peers > 0).await, count);

            let deltas_wanted = u64::from(RATE) * time.as_secs();
            assert!(deltas >= deltas_wanted * 9 / 10, "only {deltas} deltas were made");
            assert!(each <= 1024, "{each} bytes for a peer");
            assert!(most - small.rss_anon_kib <= 14 << 10, "{most} KiB while joining");
            assert!(most_churn - small.rss_anon_kib <= 16 << 10, "{most_churn} KiB under deltas");
            assert!(after.rss_anon_kib - before.rss_anon_kib <= 2 << 10, "{before:?} became {after:?}");
            for probed in [idle, during, churned] {
                assert!(probed.gap <= Duration::from_millis(500), "{probed:?}");
            }
            // At most one snapshot of 3 MB in three seconds, and packets.
            let writes = 8_000_000 + 2_000_000 * time.as_secs();
            assert!(ended.written - began.written <= writes, "{} bytes", ended.written - began.written);
            assert!(recovered.gap <= Duration::from_secs(2), "{recovered:?}");
        });
    });
}

fn file_bytes(pod: &Pod) -> u64 {
    pod.snapshot_file().metadata().unwrap().len()
}
