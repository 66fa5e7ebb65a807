//! TCP: who answers, and transfers that check every byte.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use podtether_net::Netns;
use socket2::{Domain, Socket, Type};

use super::ProbeError;

const CHUNK: usize = 64 << 10;

/// What a server does with each connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serve {
    /// Sends back what it gets.
    Echo,
    /// Checks the pattern of [`Transfer`] and answers how many bytes were right.
    Sink,
}

/// A TCP server in a namespace; ends when dropped.
pub struct TcpServer {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl TcpServer {
    /// Listens on `address` inside `ns`.
    ///
    /// # Errors
    /// When the namespace or the address cannot be had.
    pub fn start(ns: &Netns, address: SocketAddr, serve: Serve) -> Result<Self, ProbeError> {
        let listener =
            ns.run_blocking(move || TcpListener::bind(address))?.map_err(ProbeError::socket("listen"))?;
        let address = listener.local_addr().map_err(ProbeError::socket("listen"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || accept_loop(&listener, serve, &stop))
        };
        Ok(Self { address, stop, thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept_loop(listener: &TcpListener, serve: Serve, stop: &Arc<AtomicBool>) {
    let mut connections: Vec<JoinHandle<()>> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        if !readable(listener, Duration::from_millis(50)) {
            continue;
        }
        let Ok((stream, _)) = listener.accept() else { continue };
        connections.retain(|c| !c.is_finished());
        let stop = Arc::clone(stop);
        connections.push(std::thread::spawn(move || {
            let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
            let _ = match serve {
                Serve::Echo => echo(stream, &stop),
                Serve::Sink => sink(stream, &stop),
            };
        }));
    }
    for connection in connections {
        let _ = connection.join();
    }
}

fn readable(listener: &TcpListener, wait: Duration) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO);
    poll(&mut fds, timeout).is_ok_and(|n| n > 0)
}

fn read_some(stream: &mut TcpStream, buffer: &mut [u8], stop: &AtomicBool) -> io::Result<usize> {
    loop {
        match stream.read(buffer) {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                if stop.load(Ordering::Relaxed) {
                    return Ok(0);
                }
            }
            other => return other,
        }
    }
}

fn echo(mut stream: TcpStream, stop: &AtomicBool) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match read_some(&mut stream, &mut buffer, stop)? {
            0 => return Ok(()),
            read => stream.write_all(&buffer[..read])?,
        }
    }
}

fn sink(mut stream: TcpStream, stop: &AtomicBool) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut right: u64 = 0;
    let mut position: u64 = 0;
    loop {
        let read = read_some(&mut stream, &mut buffer, stop)?;
        if read == 0 {
            return stream.write_all(&right.to_be_bytes());
        }
        for byte in &buffer[..read] {
            right += u64::from(*byte == pattern(position));
            position += 1;
        }
    }
}

fn pattern(position: u64) -> u8 {
    // 251 is prime, so the pattern never lines up with segment sizes.
    u8::try_from(position % 251).unwrap_or(0)
}

/// Connects from `ns` within `limit`; the time it took, or `None` when nobody answered.
///
/// # Errors
/// When the namespace or a socket cannot be had.
pub fn connect(ns: &Netns, target: SocketAddr, limit: Duration) -> Result<Option<Duration>, ProbeError> {
    let started = Instant::now();
    Ok(dial(ns, target, limit)?.map(|_| started.elapsed()))
}

/// A connection from `ns`, or `None` when nobody accepted within `limit`.
pub(crate) fn dial(ns: &Netns, target: SocketAddr, limit: Duration) -> Result<Option<TcpStream>, ProbeError> {
    let socket = ns
        .run_blocking(move || Socket::new(Domain::for_address(target), Type::STREAM, None))?
        .map_err(ProbeError::socket("open a TCP socket"))?;
    match socket.connect_timeout(&target.into(), limit) {
        Ok(()) => Ok(Some(socket.into())),
        Err(_) => Ok(None),
    }
}

/// Sends `text` to an echo server and waits for it to come back; the round trip.
///
/// # Errors
/// When it does not connect or something else comes back.
pub fn echo_once(
    ns: &Netns,
    target: SocketAddr,
    text: &[u8],
    limit: Duration,
) -> Result<Duration, ProbeError> {
    let Some(mut stream) = dial(ns, target, limit)? else {
        return Err(ProbeError::Answer(format!("{target} did not accept within {limit:?}")));
    };
    stream.set_read_timeout(Some(limit)).map_err(ProbeError::socket("set a read timeout"))?;
    let started = Instant::now();
    stream.write_all(text).map_err(ProbeError::socket("send"))?;
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).map_err(ProbeError::socket("wait for the echo"))?;
    if back == text { Ok(started.elapsed()) } else { Err(ProbeError::Answer("the echo differs".into())) }
}

/// A long transfer to a [`Serve::Sink`] server, in the background.
pub struct Transfer {
    sent: Arc<AtomicU64>,
    thread: JoinHandle<Result<TransferReport, ProbeError>>,
}

/// How a transfer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferReport {
    /// Bytes that arrived and were right.
    pub bytes: u64,
    /// From the first byte to the server's answer.
    pub took: Duration,
}

impl Transfer {
    /// Starts sending `bytes` of the pattern. With `pace`, each 64 KiB chunk waits that long first.
    ///
    /// # Errors
    /// When nobody accepts within ten seconds.
    pub fn start(ns: &Netns, target: SocketAddr, bytes: u64, pace: Duration) -> Result<Self, ProbeError> {
        let Some(stream) = dial(ns, target, Duration::from_secs(10))? else {
            return Err(ProbeError::Answer(format!("{target} did not accept within 10 s")));
        };
        let sent = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&sent);
        let thread = std::thread::spawn(move || send_pattern(stream, bytes, pace, &counter));
        Ok(Self { sent, thread })
    }

    /// Bytes the kernel has taken so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When the connection broke, or stalled for 30 s.
    pub fn finish(self) -> Result<TransferReport, ProbeError> {
        self.thread.join().map_err(|_| ProbeError::Answer("the transfer's thread panicked".into()))?
    }
}

fn send_pattern(
    mut stream: TcpStream,
    bytes: u64,
    pace: Duration,
    counter: &AtomicU64,
) -> Result<TransferReport, ProbeError> {
    let stall = Some(Duration::from_secs(30));
    stream.set_write_timeout(stall).map_err(ProbeError::socket("set a write timeout"))?;
    stream.set_read_timeout(stall).map_err(ProbeError::socket("set a read timeout"))?;
    let started = Instant::now();
    let mut position = 0;
    let mut chunk = Vec::with_capacity(CHUNK);
    while position < bytes {
        if !pace.is_zero() {
            std::thread::park_timeout(pace);
        }
        let size = u64::try_from(CHUNK).unwrap_or(0).min(bytes - position);
        chunk.clear();
        chunk.extend((position..position + size).map(pattern));
        stream.write_all(&chunk).map_err(ProbeError::socket("send"))?;
        position += size;
        counter.store(position, Ordering::Relaxed);
    }
    stream.shutdown(std::net::Shutdown::Write).map_err(ProbeError::socket("finish sending"))?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).map_err(ProbeError::socket("wait for the count"))?;
    Ok(TransferReport { bytes: u64::from_be_bytes(answer), took: started.elapsed() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn echo_transfer_and_silence_in_this_namespace() {
        let ns = Netns::current().unwrap();
        let local: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let echo = TcpServer::start(&ns, local, Serve::Echo).unwrap();
        echo_once(&ns, echo.address(), b"hello", Duration::from_secs(5)).unwrap();
        let sink = TcpServer::start(&ns, local, Serve::Sink).unwrap();
        let transfer = Transfer::start(&ns, sink.address(), 1_000_003, Duration::ZERO).unwrap();
        assert_eq!(transfer.finish().unwrap().bytes, 1_000_003);
        let closed = {
            let listener = TcpListener::bind(local).unwrap();
            listener.local_addr().unwrap()
        };
        assert_eq!(connect(&ns, closed, Duration::from_secs(1)).unwrap(), None);
    }
}
