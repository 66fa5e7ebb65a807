//! Pings of many pairs from one thread, so that watching a hundred pods costs little of the machine.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use podtether_net::Netns;
use socket2::{Domain, Protocol, Socket, Type};

use crate::probe::ProbeError;
use crate::probe::ping::{echo_reply, echo_request};
use crate::sync::lock;

/// Requests that are remembered: no sequence number is in use twice.
const REMEMBERED: usize = 60_000;
/// The thread looks this often whether it is to end, or another pace is wanted.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Pings of every pair until dropped.
pub(super) struct Traffic {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
}

struct State {
    lanes: Vec<Lane>,
    worst_delay: Duration,
}

struct Lane {
    target: IpAddr,
    id: u16,
    interval: Duration,
    due: Instant,
    /// Number of the oldest remembered request.
    first: u64,
    sent: VecDeque<Sample>,
    /// When replies came.
    arrivals: VecDeque<Instant>,
}

#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    answered: bool,
}

impl Lane {
    /// The remembered request with these 16 bits.
    fn answered(&mut self, sequence: u16, now: Instant) {
        let low = u16::try_from(self.first & 0xffff).unwrap_or(0);
        let index = usize::from(sequence.wrapping_sub(low));
        if let Some(sample) = self.sent.get_mut(index)
            && !sample.answered
        {
            sample.answered = true;
            self.arrivals.push_back(now);
        }
    }

    fn forget_before(&mut self, then: Instant) {
        while self.sent.len() > REMEMBERED || self.sent.front().is_some_and(|s| s.at < then) {
            self.sent.pop_front();
            self.first += 1;
        }
        while self.arrivals.front().is_some_and(|at| *at < then) {
            self.arrivals.pop_front();
        }
    }

    fn counts(&self, from: Instant, to: Instant) -> (u64, u64) {
        let within = self.sent.iter().filter(|s| s.at >= from && s.at < to);
        within.fold((0, 0), |(sent, lost), s| (sent + 1, lost + u64::from(!s.answered)))
    }
}

impl Traffic {
    /// Pings along each of `pairs`, from a namespace to an address, every `interval`.
    pub(super) fn start(pairs: &[(Netns, IpAddr)], interval: Duration) -> Result<Self, ProbeError> {
        let mut lanes = Vec::new();
        let mut sockets = Vec::new();
        let now = Instant::now();
        for (number, (ns, target)) in (0_u16..).zip(pairs) {
            let (domain, protocol) = match target {
                IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
                IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
            };
            let socket = ns
                .run_blocking(move || Socket::new(domain, Type::RAW, Some(protocol)))?
                .map_err(ProbeError::socket("open a raw ICMP socket"))?;
            socket
                .connect(&SocketAddr::new(*target, 0).into())
                .map_err(ProbeError::socket("route to the target"))?;
            socket.set_nonblocking(true).map_err(ProbeError::socket("make the socket non-blocking"))?;
            sockets.push(socket);
            // Spread over the interval: a hundred requests at one instant would wait for each other.
            let due = now + interval.mul_f64(f64::from(number % 64) / 64.0);
            let (sent, arrivals) = (VecDeque::new(), VecDeque::new());
            lanes.push(Lane { target: *target, id: number, interval, due, first: 0, sent, arrivals });
        }
        let state = Mutex::new(State { lanes, worst_delay: Duration::ZERO });
        let shared = Arc::new(Shared { state, changed: Condvar::new(), stop: AtomicBool::new(false) });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || ping_all(&shared, &sockets))
        };
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Another pace for pair number `lane`, from now on.
    pub(super) fn set_interval(&self, lane: usize, interval: Duration) {
        if let Some(lane) = lock(&self.shared.state).lanes.get_mut(lane) {
            lane.interval = interval;
            lane.due = lane.due.min(Instant::now() + interval);
        }
    }

    /// Waits until each of `lanes` has `replies` replies to requests sent after `since`; false when `limit`
    /// has passed.
    pub(super) fn wait_answered(
        &self,
        lanes: &[usize],
        since: Instant,
        replies: usize,
        limit: Duration,
    ) -> bool {
        self.wait(limit, |state| {
            lanes.iter().filter_map(|lane| state.lanes.get(*lane)).all(|lane| {
                let after = lane.sent.iter().rev().take_while(|s| s.at >= since);
                after.filter(|s| s.answered).count() >= replies
            })
        })
    }

    /// When the first reply came after `since`; `None` when none did.
    pub(super) fn first_arrival(&self, lane: usize, since: Instant) -> Option<Instant> {
        let state = lock(&self.shared.state);
        state.lanes.get(lane)?.arrivals.iter().copied().find(|at| *at >= since)
    }

    /// Waits until each of `lanes` had a reply after `since`; false when `limit` has passed.
    pub(super) fn wait_arrivals(&self, lanes: &[usize], since: Instant, limit: Duration) -> bool {
        self.wait(limit, |state| {
            lanes
                .iter()
                .filter_map(|lane| state.lanes.get(*lane))
                .all(|lane| lane.arrivals.back().is_some_and(|at| *at >= since))
        })
    }

    /// Waits until every request of `lanes` sent from `from` to `to` has its reply, for `limit` at most.
    pub(super) fn settle(&self, lanes: &[usize], from: Instant, to: Instant, limit: Duration) {
        let _ = self.wait(limit, |state| {
            lanes.iter().filter_map(|lane| state.lanes.get(*lane)).all(|lane| lane.counts(from, to).1 == 0)
        });
    }

    fn wait(&self, limit: Duration, done: impl Fn(&State) -> bool) -> bool {
        let until = Instant::now() + limit;
        let mut state = lock(&self.shared.state);
        loop {
            if done(&state) {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Requests, and those without a reply, sent from `from` to `to`.
    pub(super) fn counts(&self, lane: usize, from: Instant, to: Instant) -> (u64, u64) {
        lock(&self.shared.state).lanes.get(lane).map_or((0, 0), |lane| lane.counts(from, to))
    }

    /// The longest time without a reply from `from` to `to`.
    pub(super) fn gap(&self, lane: usize, from: Instant, to: Instant) -> Duration {
        let state = lock(&self.shared.state);
        let arrivals = state.lanes.get(lane).into_iter().flat_map(|lane| lane.arrivals.iter().copied());
        let mut previous = from;
        let mut longest = Duration::ZERO;
        for at in arrivals.filter(|at| *at >= from && *at <= to).chain([to]) {
            longest = longest.max(at.saturating_duration_since(previous));
            previous = at;
        }
        longest
    }

    /// Forgets what was sent before `then`, and tells how late this thread itself came at worst since the
    /// last time: what the machine, not the pods, is to blame for.
    pub(super) fn forget_before(&self, then: Instant) -> Duration {
        let mut state = lock(&self.shared.state);
        for lane in &mut state.lanes {
            lane.forget_before(then);
        }
        std::mem::take(&mut state.worst_delay)
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn ping_all(shared: &Shared, sockets: &[Socket]) {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 2048];
    while !shared.stop.load(Ordering::Relaxed) {
        let next = send_due(shared, sockets);
        let mut fds: Vec<PollFd<'_>> =
            sockets.iter().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)).collect();
        let wait = next.saturating_duration_since(Instant::now()).min(LOOK_EVERY);
        // A millisecond late rather than a busy loop.
        let wait = PollTimeout::try_from(wait + Duration::from_micros(999)).unwrap_or(PollTimeout::ZERO);
        if !poll(&mut fds, wait).is_ok_and(|ready| ready > 0) {
            continue;
        }
        let mut state = lock(&shared.state);
        for (index, socket) in sockets.iter().enumerate() {
            if fds[index].revents().is_none_or(|r| r.is_empty()) {
                continue;
            }
            while let Some(read) = receive(socket, &mut buffer) {
                // SAFETY: `recv` has initialised the first `read` bytes, and u8 has no invalid values.
                let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), read) };
                if let Some(lane) = state.lanes.get_mut(index)
                    && let Some(sequence) = echo_reply(lane.target, lane.id, bytes)
                {
                    lane.answered(sequence, Instant::now());
                }
            }
        }
        drop(state);
        shared.changed.notify_all();
    }
}

/// What is there to read; an error that a router sent back is none of it.
fn receive(socket: &Socket, buffer: &mut [MaybeUninit<u8>]) -> Option<usize> {
    for _ in 0..8 {
        match socket.recv(buffer) {
            Ok(read) => return Some(read),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
            Err(_) => {}
        }
    }
    None
}

/// Sends what is due; when the next is.
fn send_due(shared: &Shared, sockets: &[Socket]) -> Instant {
    let mut state = lock(&shared.state);
    let mut worst = state.worst_delay;
    let mut next = Instant::now() + LOOK_EVERY;
    for (lane, socket) in state.lanes.iter_mut().zip(sockets) {
        let now = Instant::now();
        if lane.due <= now {
            worst = worst.max(now - lane.due);
            let number = lane.first + u64::try_from(lane.sent.len()).unwrap_or(0);
            let packet = echo_request(lane.target, lane.id, u16::try_from(number & 0xffff).unwrap_or(0));
            // One that the kernel refuses has no reply either.
            let _ = socket.send(&packet);
            lane.sent.push_back(Sample { at: now, answered: false });
            if lane.sent.len() > REMEMBERED {
                lane.forget_before(now.checked_sub(Duration::from_secs(1)).unwrap_or(now));
            }
            lane.due = (lane.due + lane.interval).max(now);
        }
        next = next.min(lane.due);
    }
    state.worst_delay = worst;
    next
}

#[cfg(test)]
mod tests {
    use podtether_net::netlink::{Netlink, Route};
    use podtether_net::testing::{block_on, in_namespaces};

    use super::*;

    #[test]
    fn silence_is_counted_and_measured() {
        in_namespaces("chaos::traffic::tests::silence_is_counted_and_measured", |_| {
            let ns = Netns::current().unwrap();
            let ms = Duration::from_millis;
            let started = Instant::now();
            let pairs = [(ns.clone(), "127.0.0.1".parse().unwrap()), (ns, "192.0.2.1".parse().unwrap())];
            // Nobody has the second address, but there is a route to it.
            block_on(async {
                let netlink = Netlink::open(&Netns::current().unwrap()).await.unwrap();
                let link = netlink.link("lo").await.unwrap().unwrap().index;
                let dst = "192.0.2.0/24".parse().unwrap();
                netlink.add_route(Route { dst, gateway: None, link, onlink: false }).await.unwrap();
            });
            let traffic = Traffic::start(&pairs, ms(5)).unwrap();
            assert!(traffic.wait_answered(&[0], started, 20, ms(10_000)));
            assert!(!traffic.wait_arrivals(&[1], started, ms(50)));
            let to = Instant::now();
            traffic.settle(&[0], started, to, ms(5000));
            let (sent, lost) = traffic.counts(0, started, to);
            assert!(sent >= 20 && lost == 0, "{lost} of {sent}");
            let (sent, lost) = traffic.counts(1, started, to);
            assert!(sent > 0 && lost == sent, "{lost} of {sent}");
            assert!(traffic.gap(0, started, to) < to - started);
            assert_eq!(traffic.gap(1, started, to), to - started);
            let _ = traffic.forget_before(to);
            assert_eq!(traffic.counts(1, started, to), (0, 0));
            assert!(traffic.wait_answered(&[0], to, 5, ms(10_000)), "numbers go on after forgetting");
        });
    }
}
