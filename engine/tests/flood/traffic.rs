//! What the tests measure with: a tailnet, a TCP stream between two pods, floods, and their sums.

use std::io::{IoSlice, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg};
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig};
use podtether_proto::engine::EngineMetrics;

use crate::common::{Join, Pod, patient, underlay_addresses};

const PER_SECOND: u32 = 100_000;
const AT_ONCE: u32 = 50;
const PHASE: Duration = Duration::from_millis(500);
/// A hundred pods share a node: one may not take much more than this.
const MAX_RSS_KIB: u64 = 24 * 1024;

/// One measurement at a time.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rounds() -> u32 {
    std::env::var("FLOOD_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

pub(crate) async fn tailnet() -> (Devnet, Join) {
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
pub(crate) async fn stream(from: &Pod, to: &Pod, address: SocketAddr) -> Arc<AtomicU64> {
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
pub(crate) struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    task: Option<std::thread::JoinHandle<()>>,
}

impl Flood {
    pub(crate) fn start(
        sockets: Vec<impl Into<OwnedFd>>,
        packets: Vec<Vec<u8>>,
        to: Vec<SocketAddr>,
    ) -> Self {
        let sockets: Vec<OwnedFd> = sockets.into_iter().map(Into::into).collect();
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

    pub(crate) fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.take().unwrap().join().unwrap();
        self.sent.load(Ordering::Relaxed)
    }
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
pub(crate) struct Sums {
    peace: u64,
    elsewhere: u64,
    flooded: u64,
    pub(crate) sent: u64,
    cpu_peace: Duration,
    cpu_flooded: Duration,
    rss_kib: u64,
}

impl Sums {
    /// Measures the traffic in peace, under the flood that `make` starts at a socket that nobody reads
    /// (`true`), and under the one at the engine of `pod`; prints and judges.
    pub(crate) async fn measure(
        what: &str,
        pod: &Pod,
        bytes: &AtomicU64,
        mut make: impl FnMut(bool) -> Flood,
    ) -> (Self, EngineMetrics) {
        let mut sums = Self::default();
        phase(pod, bytes).await;
        for _ in 0..rounds() {
            let (peace, cpu) = phase(pod, bytes).await;
            sums.peace += peace;
            sums.cpu_peace += cpu;
            let flood = make(true);
            sums.elsewhere += phase(pod, bytes).await.0;
            flood.end();
            let flood = make(false);
            let (flooded, cpu) = phase(pod, bytes).await;
            sums.flooded += flooded;
            sums.cpu_flooded += cpu;
            sums.sent += flood.end();
            sums.rss_kib = sums.rss_kib.max(process(pod).rss_kib);
        }
        let metrics = pod.client().metrics(patient()).await.unwrap();
        println!("{}; dropped {:?}", sums.text(what), metrics.drops);
        // The bar of a half is for a machine that does nothing else; here the flooder, both engines and the
        // traffic share it, perhaps with others.
        assert!(sums.flooded > sums.elsewhere / 4, "{what}: {sums:?}");
        assert!(sums.rss_kib < MAX_RSS_KIB, "{what}: {sums:?}");
        assert!(metrics.control_connected, "{what}: the control session ended");
        (sums, metrics)
    }

    fn text(&self, what: &str) -> String {
        let seconds = PHASE.as_millis() * u128::from(rounds());
        let mbit = |bytes: u64| u128::from(bytes) * 8 / seconds / 1000;
        let percent = |a: u64, b: u64| a * 100 / b.max(1);
        let per_cpu = |bytes: u64, cpu: Duration| u128::from(bytes) / cpu.as_millis().max(1);
        let (calm, busy) = (per_cpu(self.peace, self.cpu_peace), per_cpu(self.flooded, self.cpu_flooded));
        format!(
            "{what}: {} Mbit/s in peace, {} with a flood elsewhere, {} with it here: {} % raw, {} % of a \
             flood elsewhere; {calm} and {busy} bytes a millisecond of the engine's CPU; {} packets of \
             garbage a second, RssAnon {} KiB",
            mbit(self.peace),
            mbit(self.elsewhere),
            mbit(self.flooded),
            percent(self.flooded, self.peace),
            percent(self.flooded, self.elsewhere),
            u128::from(self.sent) * 1000 / seconds,
            self.rss_kib,
        )
    }
}

/// Some packets of each of these reasons were dropped.
pub(crate) fn has_dropped(metrics: &EngineMetrics, reasons: &[&str]) {
    for reason in reasons {
        let found = metrics.drops.iter().any(|(name, n)| name == reason && *n > 0);
        assert!(found, "{reason}: {metrics:?}");
    }
}

/// Sockets of a stranger.
pub(crate) fn strangers() -> Vec<UdpSocket> {
    (0..8).map(|_| UdpSocket::bind("10.9.0.1:0").unwrap()).collect()
}
