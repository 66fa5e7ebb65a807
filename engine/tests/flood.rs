//! Real floods: garbage at an engine's UDP port, and out of a pod into its engine. The engine answers its
//! supervisor, other traffic flows, memory and log stay small.
//!
//! What a flood costs beside the machine's time for sending it: each round measures the traffic in peace,
//! with the same flood at a socket that nobody reads, and with the flood at the engine. The test's bounds
//! are wide, since the flooder, both engines and the traffic share the machine; `FLOOD_ROUNDS=10` and
//! `--nocapture` print figures worth comparing.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{IoSlice, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use common::{Join, Pod, patient, underlay_addresses};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg};
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig};
use podtether_net::testing::{block_on, in_namespaces};

const PER_SECOND: u32 = 100_000;
const AT_ONCE: u32 = 50;
const PHASE: Duration = Duration::from_millis(500);
/// A hundred pods share a node: one may not take much more than this.
const MAX_RSS_KIB: u64 = 24 * 1024;

/// One measurement at a time.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rounds() -> u32 {
    std::env::var("FLOOD_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

async fn tailnet() -> (Devnet, Join) {
    let addresses = underlay_addresses(&["10.9.0.1/32", "fd09::1/128"]).await;
    let devnet = Devnet::start(DevnetConfig::default()).await.unwrap();
    let options = AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() };
    let join = Join {
        control_url: devnet.https_url(),
        ca_pem: devnet.ca_pem().to_owned(),
        auth_key: Some(devnet.create_auth_key(options).secret),
        addresses,
    };
    (devnet, join)
}

/// Bytes of a TCP stream between two pods, counted where they arrive. Ends with the engines.
async fn stream(from: &Pod, to: &Pod, address: SocketAddr) -> Arc<AtomicU64> {
    let listener = to.link.pod.run(move || TcpListener::bind(address).unwrap()).await.unwrap();
    let sender = from.link.pod.run(move || TcpStream::connect(address).unwrap());
    let accepted = tokio::task::spawn_blocking(move || listener.accept().unwrap());
    let (sender, accepted) = tokio::join!(sender, accepted);
    let (mut sender, (mut receiver, _)) = (sender.unwrap(), accepted.unwrap());
    let count = Arc::new(AtomicU64::new(0));
    let counted = count.clone();
    std::thread::spawn(move || while sender.write_all(&[7; 1 << 16]).is_ok() {});
    std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(length @ 1..) = receiver.read(&mut buffer) {
            counted.fetch_add(u64::try_from(length).unwrap(), Ordering::Relaxed);
        }
    });
    count
}

/// Sends `packets` in turn to `to`, [`PER_SECOND`] of them, until told to stop.
struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    task: Option<std::thread::JoinHandle<()>>,
}

impl Flood {
    fn start(sockets: Vec<UdpSocket>, packets: Vec<Vec<u8>>, to: Vec<SocketAddr>) -> Self {
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), sent.clone());
        let task = std::thread::spawn(move || {
            let began = Instant::now();
            let mut next = 0_u32;
            let mut headers = MultiHeaders::preallocate(usize::try_from(AT_ONCE).unwrap(), None);
            while !stopped.load(Ordering::Relaxed) {
                let due = u32::try_from(began.elapsed().as_micros()).unwrap() / (1_000_000 / PER_SECOND);
                if next >= due {
                    std::thread::sleep(Duration::from_micros(200));
                    continue;
                }
                // What the machine was too slow for is not made up for.
                next = next.max(due.saturating_sub(PER_SECOND / 100));
                let all = (next..(next + AT_ONCE).min(due)).map(|n| usize::try_from(n).unwrap());
                let socket = &sockets[usize::try_from(next / AT_ONCE).unwrap() % sockets.len()];
                let pieces: Vec<_> =
                    all.clone().map(|n| [IoSlice::new(&packets[n % packets.len()])]).collect();
                let addresses: Vec<_> = all.map(|n| Some(SockaddrStorage::from(to[n % to.len()]))).collect();
                let none = MsgFlags::empty();
                // A datagram that cannot be sent ends the call, and is passed over.
                if let Ok(taken) = sendmmsg(socket.as_raw_fd(), &mut headers, &pieces, &addresses, [], none) {
                    counted.fetch_add(u64::try_from(taken.count()).unwrap(), Ordering::Relaxed);
                }
                next = (next + AT_ONCE).min(due);
            }
        });
        Self { stop, sent, task: Some(task) }
    }

    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.take().unwrap().join().unwrap();
        self.sent.load(Ordering::Relaxed)
    }
}

/// Some of everything that a stranger can send who knows the engine's public key.
fn garbage(pod: &Pod, join: &Join) -> Vec<Vec<u8>> {
    let key = pod.request(join).node_key;
    let public = PublicKey::from(&StaticSecret::from(*key.expose()));
    let mut stranger = Tunn::new(StaticSecret::from([0x77; 32]), public, None, None, 7, None);
    let mut buffer = [0; 256];
    let TunnResult::WriteToNetwork(initiation) = stranger.format_handshake_initiation(&mut buffer, false)
    else {
        panic!("no initiation");
    };
    let mut all = Vec::new();
    for n in 0..64_u8 {
        let mut packet = vec![0; 200];
        getrandom::fill(&mut packet).unwrap();
        match n % 6 {
            0 => {}
            1 => packet[..4].copy_from_slice(&[4, 0, 0, 0]),
            2 => packet = initiation.to_vec(),
            3 => packet[..6].copy_from_slice(&[0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac]),
            4 => packet[..8].copy_from_slice(&[1, 1, 0, 180, 0x21, 0x12, 0xa4, 0x42]),
            _ => {
                packet.truncate(92);
                packet[..4].copy_from_slice(&[2, 0, 0, 0]);
            }
        }
        all.push(packet);
    }
    all
}

struct Process {
    rss_kib: u64,
    cpu: Duration,
}

fn process(pod: &Pod) -> Process {
    let pid = pod.engine.as_ref().unwrap().child.id();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let rss = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let ticks: u64 = stat.split(' ').skip(13).take(2).map(|text| text.parse::<u64>().unwrap()).sum();
    Process {
        rss_kib: rss.trim().trim_end_matches(" kB").parse().unwrap(),
        cpu: Duration::from_millis(ticks * 10),
    }
}

/// Bytes that arrive in a phase, while the engine of `pod` has to answer; the engine's CPU time for it.
async fn phase(pod: &Pod, bytes: &AtomicU64) -> (u64, Duration) {
    let (before, cpu) = (bytes.load(Ordering::Relaxed), process(pod).cpu);
    let ends = Instant::now() + PHASE;
    while Instant::now() < ends {
        let asked = Instant::now();
        pod.client().hello(patient()).await.unwrap();
        assert!(asked.elapsed() < Duration::from_secs(4), "hello took {:?}", asked.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    (bytes.load(Ordering::Relaxed) - before, process(pod).cpu - cpu)
}

#[derive(Debug, Default)]
struct Sums {
    peace: u64,
    elsewhere: u64,
    flooded: u64,
    sent: u64,
    cpu_peace: Duration,
    cpu_flooded: Duration,
}

impl Sums {
    fn text(&self, what: &str, rss_kib: u64) -> String {
        let seconds = PHASE.as_millis() * u128::from(rounds());
        let mbit = |bytes: u64| u128::from(bytes) * 8 / seconds / 1000;
        let percent = |a: u64, b: u64| a * 100 / b.max(1);
        let per_cpu = |bytes: u64, cpu: Duration| u128::from(bytes) / cpu.as_millis().max(1);
        let (calm, busy) = (per_cpu(self.peace, self.cpu_peace), per_cpu(self.flooded, self.cpu_flooded));
        format!(
            "{what}: {} Mbit/s in peace, {} with a flood elsewhere, {} with it here: {} % raw, {} % of a \
             flood elsewhere; {calm} and {busy} bytes a millisecond of the engine's CPU; {} packets of \
             garbage a second, RssAnon {rss_kib} KiB",
            mbit(self.peace),
            mbit(self.elsewhere),
            mbit(self.flooded),
            percent(self.flooded, self.peace),
            percent(self.flooded, self.elsewhere),
            u128::from(self.sent) * 1000 / seconds,
        )
    }
}

fn dropped(metrics: &[(String, u64)]) -> u64 {
    metrics.iter().map(|(_, n)| n).sum()
}

#[test]
fn strangers_garbage_leaves_peers_their_traffic() {
    let _turn = alone();
    in_namespaces("strangers_garbage_leaves_peers_their_traffic", |dir| {
        block_on(async {
            let (_devnet, join) = tailnet().await;
            let (mut a, mut b) = (Pod::make(dir, "a").await, Pod::make(dir, "b").await);
            let address = SocketAddr::new(a.join(&join).await[0], 5001);
            b.join(&join).await;
            let bytes = stream(&b, &a, address).await;
            let sink = UdpSocket::bind("10.9.0.1:0").unwrap();
            let port = a.port();
            let here = SocketAddr::new(join.addresses[0], port);
            let packets = garbage(&a, &join);
            let sockets = || (0..8).map(|_| UdpSocket::bind("10.9.0.1:0").unwrap()).collect::<Vec<_>>();
            let mut sums = Sums::default();
            let mut rss = 0;
            phase(&a, &bytes).await;
            for _ in 0..rounds() {
                let (peace, cpu) = phase(&a, &bytes).await;
                sums.peace += peace;
                sums.cpu_peace += cpu;
                let flood = Flood::start(sockets(), packets.clone(), vec![sink.local_addr().unwrap()]);
                sums.elsewhere += phase(&a, &bytes).await.0;
                flood.end();
                let flood = Flood::start(sockets(), packets.clone(), vec![here]);
                let (flooded, cpu) = phase(&a, &bytes).await;
                sums.flooded += flooded;
                sums.cpu_flooded += cpu;
                sums.sent += flood.end();
                rss = rss.max(process(&a).rss_kib);
            }
            let metrics = a.client().metrics(patient()).await.unwrap();
            println!("{}; dropped {:?}", sums.text("a stranger", rss), metrics.drops);
            assert!(dropped(&metrics.drops) > sums.sent / 20, "{metrics:?} of {}", sums.sent);
            let reasons =
                ["unknown_datagram", "unknown_session", "under_load", "unknown_disco", "flood_shield"];
            for reason in reasons {
                assert!(
                    metrics.drops.iter().any(|(name, n)| name == reason && *n > 0),
                    "{reason}: {metrics:?}"
                );
            }
            assert!(sums.flooded > sums.elsewhere / 2, "{sums:?}");
            assert!(rss < MAX_RSS_KIB, "{rss} KiB");
        });
    });
}

#[test]
fn a_pods_garbage_leaves_other_pods_their_traffic() {
    let _turn = alone();
    in_namespaces("a_pods_garbage_leaves_other_pods_their_traffic", |dir| {
        block_on(async {
            let (_devnet, join) = tailnet().await;
            let (mut a, mut b) = (Pod::make(dir, "a").await, Pod::make(dir, "b").await);
            let mut hostile = Pod::make(dir, "hostile").await;
            let address = SocketAddr::new(a.join(&join).await[0], 5001);
            b.join(&join).await;
            let own = hostile.join(&join).await;
            let bytes = stream(&b, &a, address).await;
            // Nobody's addresses, a peer that drops it, the name server, another's name.
            let v4 = own.iter().copied().find(IpAddr::is_ipv4).unwrap();
            let mut targets: Vec<SocketAddr> =
                (1..=60).map(|n| SocketAddr::from(([100, 99, n, n], 9))).collect();
            targets.push(SocketAddr::new(address.ip(), 9));
            targets.push("100.100.100.100:53".parse().unwrap());
            let mut packets = vec![vec![0; 100]; 5];
            packets[1] = vec![0xff; 1200];
            let sockets = || {
                let bind = move || (0..8).map(|_| UdpSocket::bind((v4, 0)).unwrap()).collect::<Vec<_>>();
                hostile.link.pod.run_blocking(bind).unwrap()
            };
            let sink = hostile.link.pod.run_blocking(move || UdpSocket::bind((v4, 0)).unwrap()).unwrap();
            let mut sums = Sums::default();
            let mut rss = 0;
            phase(&hostile, &bytes).await;
            for _ in 0..rounds() {
                let (peace, cpu) = phase(&hostile, &bytes).await;
                sums.peace += peace;
                sums.cpu_peace += cpu;
                let flood = Flood::start(sockets(), packets.clone(), vec![sink.local_addr().unwrap()]);
                sums.elsewhere += phase(&hostile, &bytes).await.0;
                flood.end();
                let flood = Flood::start(sockets(), packets.clone(), targets.clone());
                let (flooded, cpu) = phase(&hostile, &bytes).await;
                sums.flooded += flooded;
                sums.cpu_flooded += cpu;
                sums.sent += flood.end();
                rss = rss.max(process(&hostile).rss_kib);
            }
            println!("{}", sums.text("a pod", rss));
            let metrics = hostile.client().metrics(patient()).await.unwrap();
            assert!(metrics.drops.iter().any(|(name, n)| name == "no_peer" && *n > 0), "{metrics:?}");
            assert!(sums.flooded > sums.elsewhere / 5, "{sums:?}");
            assert!(rss < MAX_RSS_KIB, "{rss} KiB");
        });
    });
}
