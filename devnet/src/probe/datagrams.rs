//! A stream of datagrams at a given rate, and how much of it arrives.
//!
//! The receiver's buffer is [`BUFFER`] where the process may have it: what is measured is the way there, not whether the
//! receiver had its turn on the processor every few milliseconds.

use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg, setsockopt, sockopt};
use podtether_net::Netns;

use super::ProbeError;

/// Bytes that wait for the receiver, at most.
const BUFFER: usize = 8 << 20;
/// Datagrams per system call.
const BATCH: usize = 32;
/// What is due is sent so often.
const TICK: Duration = Duration::from_millis(1);
/// Nothing more is under way when nothing has come for so long.
const SETTLED: Duration = Duration::from_millis(250);
/// Shortest and longest payload.
const BYTES: std::ops::RangeInclusive<usize> = 16..=1400;
/// Room for a datagram and to see that it is longer.
const SLOT: usize = 2048;

/// What to send.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stream {
    /// Where to; the receiver has this address.
    pub target: IpAddr,
    /// Payload of each datagram.
    pub bytes: u16,
    /// Payload bits a second; `None` for as many as can be made.
    pub bits_per_second: Option<f64>,
    /// For so long.
    pub time: Duration,
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Datagrams that the sender's socket took.
    pub sent: u64,
    /// Of those, how many the receiver got.
    pub received: u64,
    /// How long was sent.
    pub time: Duration,
}

/// Sends from `from` to `to`.
///
/// # Errors
/// When a namespace or a socket cannot be had, or the payload is not 16 to 1400 bytes.
pub fn stream(from: &Netns, to: &Netns, stream: Stream) -> Result<Arrived, ProbeError> {
    let Stream { target, bytes, bits_per_second, time } = stream;
    let bytes = usize::from(bytes);
    if !BYTES.contains(&bytes) {
        return Err(ProbeError::Answer(format!("a payload of {bytes} bytes: 16 to 1400 are possible")));
    }
    let receiver = to
        .run_blocking(move || UdpSocket::bind(SocketAddr::new(target, 0)))?
        .map_err(ProbeError::socket("bind the receiver"))?;
    if setsockopt(&receiver, sockopt::RcvBufForce, &BUFFER).is_err() {
        let _ = setsockopt(&receiver, sockopt::RcvBuf, &BUFFER);
    }
    receiver.set_read_timeout(Some(SETTLED)).map_err(ProbeError::socket("set a read timeout"))?;
    let address = receiver.local_addr().map_err(ProbeError::socket("bind the receiver"))?;
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let sender = from
        .run_blocking(move || UdpSocket::bind(SocketAddr::new(any, 0)))?
        .map_err(ProbeError::socket("bind the sender"))?;
    sender.connect(address).map_err(ProbeError::socket("route to the receiver"))?;

    // What another run left under way does not carry this.
    let run = u64::from(address.port()) << 32 | u64::from(std::process::id());
    let ended = Arc::new(AtomicBool::new(false));
    let counter = {
        let ended = Arc::clone(&ended);
        std::thread::spawn(move || count(&receiver, bytes, run, &ended))
    };
    let started = Instant::now();
    let sent = send(&sender, bytes, run, bits_per_second, time);
    let time = started.elapsed();
    ended.store(true, Ordering::Relaxed);
    let received = counter.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    Ok(Arrived { sent: sent?, received, time })
}

/// Sends what is due; how many datagrams the socket took.
fn send(
    socket: &UdpSocket,
    bytes: usize,
    run: u64,
    bits_per_second: Option<f64>,
    time: Duration,
) -> Result<u64, ProbeError> {
    let mut payload = vec![0; bytes];
    payload[..8].copy_from_slice(&run.to_be_bytes());
    let slices = [[IoSlice::new(&payload)]; BATCH];
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BATCH, None);
    let per_second = bits_per_second.map(|bits| bits / 8.0 / f64::from(u32::try_from(bytes).unwrap_or(1)));
    let started = Instant::now();
    let mut sent = 0_u64;
    loop {
        let elapsed = started.elapsed();
        if elapsed >= time {
            return Ok(sent);
        }
        let due = per_second.map_or(u64::MAX, |rate| whole(rate * elapsed.as_secs_f64()));
        if due <= sent {
            std::thread::sleep(TICK);
            continue;
        }
        let now = usize::try_from(due - sent).unwrap_or(BATCH).min(BATCH);
        match sendmmsg(socket.as_raw_fd(), &mut headers, &slices[..now], [None; BATCH], [], MsgFlags::empty())
        {
            Ok(results) => sent += u64::try_from(results.count()).unwrap_or(0),
            // No room on the way out, or an ICMP answer to one before: those datagrams were not taken.
            Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR | Errno::ECONNREFUSED) => {}
            Err(error) => return Err(ProbeError::socket("send")(error.into())),
        }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, far below 2^53")]
fn whole(datagrams: f64) -> u64 {
    datagrams as u64
}

/// Counts this run's datagrams until it has ended and nothing comes any more.
fn count(socket: &UdpSocket, bytes: usize, run: u64, ended: &AtomicBool) -> Result<u64, ProbeError> {
    let mut memory = vec![0; BATCH * SLOT];
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BATCH, None);
    let mut received = 0;
    loop {
        let over = ended.load(Ordering::Relaxed);
        let lengths: Vec<usize> = {
            let mut slots: Vec<[IoSliceMut<'_>; 1]> =
                memory.chunks_mut(SLOT).map(|slot| [IoSliceMut::new(slot)]).collect();
            match recvmmsg(socket.as_raw_fd(), &mut headers, slots.iter_mut(), MsgFlags::MSG_WAITFORONE, None)
            {
                Ok(results) => results.map(|message| message.bytes).collect(),
                Err(Errno::EAGAIN) if over => return Ok(received),
                Err(Errno::EAGAIN | Errno::EINTR) => continue,
                Err(error) => return Err(ProbeError::socket("receive")(error.into())),
            }
        };
        let ours = |(slot, length): (&[u8], usize)| length == bytes && slot.starts_with(&run.to_be_bytes());
        let count = memory.chunks(SLOT).zip(lengths).filter(|pair| ours(*pair)).count();
        received += u64::try_from(count).unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_at_a_rate_arrives_and_is_counted() {
        let ns = Netns::current().unwrap();
        let target = IpAddr::from([127, 0, 0, 1]);
        let time = Duration::from_millis(200);
        let plan = Stream { target, bytes: 1200, bits_per_second: Some(9.6e6), time };
        let Arrived { sent, received, .. } = stream(&ns, &ns, plan).unwrap();
        // A thousand a second, if the machine lets us.
        assert!((1..=200).contains(&sent), "{sent}");
        assert_eq!(received, sent, "loopback loses none of so few");
        let refused = stream(&ns, &ns, Stream { bytes: 15, ..plan }).unwrap_err();
        assert!(refused.to_string().contains("16 to 1400"), "{refused}");
        let most = stream(&ns, &ns, Stream { bits_per_second: None, bytes: 16, ..plan }).unwrap();
        assert!(most.sent > sent && most.received > 0 && most.received <= most.sent, "{most:?}");
    }
}
