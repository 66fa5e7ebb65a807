//! ICMP echo with loss and gap figures.

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use podtether_net::Netns;
use socket2::{Domain, Protocol, Socket, Type};

use super::ProbeError;

/// What one run of pings saw. Replies that came late count as received; a stall shows in `gaps`.
#[derive(Debug, Clone, Default)]
pub struct PingReport {
    /// Echo requests that the kernel took.
    pub sent: u64,
    /// Distinct replies.
    pub received: u64,
    /// Requests the kernel refused (no route, queue full).
    pub refused: u64,
    /// Round trips in order of arrival.
    pub rtts: Vec<Duration>,
    /// Arrival times since the start, in order.
    pub arrivals: Vec<Duration>,
    /// Sequence numbers still without a reply at the end, in order.
    pub unanswered: Vec<u16>,
}

impl PingReport {
    /// Requests without a reply.
    #[must_use]
    pub fn lost(&self) -> u64 {
        (self.sent + self.refused).saturating_sub(self.received)
    }

    /// Longest time without a reply, from `from` to `to` since the start.
    #[must_use]
    pub fn longest_gap(&self, from: Duration, to: Duration) -> Duration {
        let mut previous = from;
        let mut longest = Duration::ZERO;
        for arrival in self.arrivals.iter().copied().filter(|t| *t >= from && *t <= to).chain([to]) {
            longest = longest.max(arrival.saturating_sub(previous));
            previous = arrival;
        }
        longest
    }

    /// Middle round trip.
    #[must_use]
    pub fn median_rtt(&self) -> Option<Duration> {
        let mut sorted = self.rtts.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied()
    }
}

/// Sends `count` echo requests from `ns` and waits up to `wait` after the last for replies.
///
/// # Errors
/// When the namespace or the socket cannot be had.
pub fn ping(
    ns: &Netns,
    target: IpAddr,
    count: u64,
    interval: Duration,
    wait: Duration,
) -> Result<PingReport, ProbeError> {
    let run = Pinging::start(ns, target, interval, Some(count))?;
    run.finish(wait)
}

/// Pings in the background.
pub struct Pinging {
    shared: Arc<Shared>,
    started: Instant,
    sender: Option<JoinHandle<()>>,
    receiver: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop_sending: AtomicBool,
    stop_receiving: AtomicBool,
}

#[derive(Default)]
struct State {
    report: PingReport,
    pending: BTreeMap<u16, Instant>,
    sending_done: bool,
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pinging {
    /// Starts; with `count` it stops sending by itself.
    ///
    /// # Errors
    /// When the namespace or the socket cannot be had.
    pub fn start(
        ns: &Netns,
        target: IpAddr,
        interval: Duration,
        count: Option<u64>,
    ) -> Result<Self, ProbeError> {
        let (domain, protocol) = match target {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = ns
            .run_blocking(move || Socket::new(domain, Type::RAW, Some(protocol)))?
            .map_err(ProbeError::socket("open a raw ICMP socket"))?;
        // A connected raw socket takes packets of this one peer only.
        socket
            .connect(&SocketAddr::new(target, 0).into())
            .map_err(ProbeError::socket("route to the target"))?;
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .map_err(ProbeError::socket("set a read timeout"))?;
        let reader = socket.try_clone().map_err(ProbeError::socket("clone the socket"))?;
        let shared = Arc::new(Shared::default());
        let started = Instant::now();
        let id = identifier(&socket);
        let sender = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || send_loop(&shared, &socket, target, id, interval, count))
        };
        let receiver = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || receive_loop(&shared, &reader, target, id, started))
        };
        Ok(Self { shared, started, sender: Some(sender), receiver: Some(receiver) })
    }

    /// Time since the start: the scale of [`PingReport::arrivals`].
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Waits until `more` further replies have arrived, or `limit` has passed; says which.
    #[must_use]
    pub fn wait_for_replies(&self, more: u64, limit: Duration) -> bool {
        let state = self.shared.lock();
        let goal = state.report.received + more;
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, limit, |s| s.report.received < goal)
            .unwrap_or_else(PoisonError::into_inner);
        state.report.received >= goal
    }

    /// What was seen so far.
    #[must_use]
    pub fn report(&self) -> PingReport {
        self.shared.lock().report.clone()
    }

    /// Stops sending (or waits until `count` were sent), waits up to `wait` for what is under way, and reports.
    ///
    /// # Errors
    /// Never today; kept for sockets that may fail late.
    pub fn finish(mut self, wait: Duration) -> Result<PingReport, ProbeError> {
        if let Some(sender) = self.sender.take() {
            let _ = sender.join();
        }
        let state = self.shared.lock();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, wait, |s| !s.pending.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        let mut report = state.report.clone();
        report.unanswered = state.pending.keys().copied().collect();
        drop(state);
        Ok(report)
    }

    /// As [`Pinging::finish`], for pings without a count.
    ///
    /// # Errors
    /// As [`Pinging::finish`].
    pub fn stop(self, wait: Duration) -> Result<PingReport, ProbeError> {
        self.shared.stop_sending.store(true, Ordering::Relaxed);
        self.finish(wait)
    }
}

impl Drop for Pinging {
    fn drop(&mut self) {
        self.shared.stop_sending.store(true, Ordering::Relaxed);
        self.shared.stop_receiving.store(true, Ordering::Relaxed);
        for thread in [self.sender.take(), self.receiver.take()].into_iter().flatten() {
            let _ = thread.join();
        }
    }
}

/// Tells this run's replies from those of other runs to the same target.
fn identifier(socket: &Socket) -> u16 {
    use std::os::fd::AsRawFd;
    let fd = u32::try_from(socket.as_raw_fd()).unwrap_or(0);
    let mixed = std::process::id().wrapping_mul(31).wrapping_add(fd);
    u16::try_from(mixed & 0xffff).unwrap_or(0)
}

fn send_loop(
    shared: &Shared,
    socket: &Socket,
    target: IpAddr,
    id: u16,
    interval: Duration,
    count: Option<u64>,
) {
    let mut due = Instant::now();
    let mut number: u64 = 0;
    while !shared.stop_sending.load(Ordering::Relaxed) && count.is_none_or(|count| number < count) {
        let sequence = u16::try_from(number & 0xffff).unwrap_or(0);
        let packet = echo_request(target, id, sequence);
        shared.lock().pending.insert(sequence, Instant::now());
        let sent = socket.send(&packet);
        let mut state = shared.lock();
        if sent.is_ok() {
            state.report.sent += 1;
        } else {
            state.report.refused += 1;
            state.pending.remove(&sequence);
        }
        drop(state);
        number += 1;
        due += interval;
        std::thread::park_timeout(due.saturating_duration_since(Instant::now()));
    }
    shared.lock().sending_done = true;
    shared.changed.notify_all();
}

fn receive_loop(shared: &Shared, socket: &Socket, target: IpAddr, id: u16, started: Instant) {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 2048];
    while !shared.stop_receiving.load(Ordering::Relaxed) {
        let read = match socket.recv(&mut buffer) {
            Ok(read) => read,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                continue;
            }
            Err(_) => continue,
        };
        // SAFETY: `recv` has initialised the first `read` bytes, and u8 has no invalid values.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), read) };
        let Some(sequence) = echo_reply(target, id, bytes) else { continue };
        let now = Instant::now();
        let mut state = shared.lock();
        if let Some(sent) = state.pending.remove(&sequence) {
            state.report.received += 1;
            state.report.rtts.push(now - sent);
            state.report.arrivals.push(now - started);
            shared.changed.notify_all();
        }
    }
}

/// The packet; IPv6 leaves the checksum to the kernel.
pub(crate) fn echo_request(target: IpAddr, id: u16, sequence: u16) -> [u8; 64] {
    let mut packet = [0x5a; 64];
    packet[0] = if target.is_ipv4() { 8 } else { 128 };
    packet[1..4].fill(0);
    packet[4..6].copy_from_slice(&id.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    if target.is_ipv4() {
        // ICMPv6's checksum is the kernel's work.
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// The sequence number of a reply to `id`'s requests.
pub(crate) fn echo_reply(target: IpAddr, id: u16, bytes: &[u8]) -> Option<u16> {
    let (kind, icmp) = if target.is_ipv4() {
        let header = usize::from(bytes.first()? & 0x0f) * 4;
        (0, bytes.get(header..)?)
    } else {
        (129, bytes)
    };
    let header: &[u8; 8] = icmp.first_chunk()?;
    let wanted = header[0] == kind && header[4..6] == id.to_be_bytes();
    wanted.then(|| u16::from_be_bytes([header[6], header[7]]))
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.as_chunks::<2>().0.iter().map(|pair| u32::from(u16::from_be_bytes(*pair))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_has_a_checksum_that_adds_up() {
        let packet = echo_request("192.0.2.1".parse().unwrap(), 7, 9);
        assert_eq!(checksum(&packet), 0);
    }

    #[test]
    fn only_own_replies_count() {
        let v6: IpAddr = "2001:db8::1".parse().unwrap();
        let mut packet = echo_request(v6, 7, 9);
        assert_eq!(echo_reply(v6, 7, &packet), None, "a request is not a reply");
        packet[0] = 129;
        assert_eq!(echo_reply(v6, 7, &packet), Some(9));
        assert_eq!(echo_reply(v6, 8, &packet), None);
        assert_eq!(echo_reply(v6, 7, &packet[..5]), None);
    }

    #[test]
    fn gaps_count_the_edges() {
        let ms = Duration::from_millis;
        let report = PingReport { arrivals: vec![ms(10), ms(20), ms(70), ms(80)], ..PingReport::default() };
        assert_eq!(report.longest_gap(ms(0), ms(80)), ms(50));
        assert_eq!(report.longest_gap(ms(75), ms(200)), ms(120));
    }
}
