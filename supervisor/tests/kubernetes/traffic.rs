//! Traffic between pods: one answer, and a TCP connection that is always in use.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use podtether_net::Netns;

use crate::rig::TIMEOUT;

/// Asks until the first answer comes.
pub(crate) fn answers(from: &Netns, to: SocketAddr, within: Duration) {
    let socket =
        from.run_blocking(|| UdpSocket::bind((IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)).unwrap()).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let begun = Instant::now();
    loop {
        let _ = socket.send(b"x");
        if socket.recv(&mut [0; 8]).is_ok() {
            return;
        }
        assert!(begun.elapsed() < within, "{to} does not answer");
    }
}

/// Sends back what comes to a port, for as long as it lives. Its socket holds the pod's namespace.
pub(crate) struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Echo {
    pub(crate) fn start(space: &Netns, port: u16) -> Self {
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let socket = space.run_blocking(move || UdpSocket::bind((any, port)).unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((n, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&buffer[..n], from);
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// A TCP connection on which a number goes there and back every few milliseconds.
pub(crate) struct Stream {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<(u64, Duration)>,
}

impl Stream {
    pub(crate) fn start(from: &Netns, server: &Netns, to: SocketAddr, pace: Duration) -> Self {
        let listener = server.run_blocking(move || TcpListener::bind(to).unwrap()).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut number = [0; 8];
            while stream.read_exact(&mut number).is_ok() {
                stream.write_all(&number).unwrap();
            }
        });
        let mut stream =
            from.run_blocking(move || TcpStream::connect_timeout(&to, TIMEOUT).unwrap()).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut sent, mut slowest) = (0_u64, Duration::ZERO);
            while !stopped.load(Ordering::Relaxed) {
                let begun = Instant::now();
                stream.write_all(&sent.to_be_bytes()).unwrap();
                let mut back = [0; 8];
                stream.read_exact(&mut back).unwrap();
                assert_eq!(u64::from_be_bytes(back), sent);
                sent += 1;
                slowest = slowest.max(begun.elapsed());
                std::thread::sleep(pace);
            }
            (sent, slowest)
        });
        Self { stop, thread }
    }

    /// How many numbers came back, and how long the slowest took.
    pub(crate) fn finish(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}
