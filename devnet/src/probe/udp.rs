//! UDP: an echo server, and a question that has to come back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use podtether_net::Netns;

use super::ProbeError;

/// A UDP echo server in a namespace; ends when dropped.
pub struct UdpEcho {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UdpEcho {
    /// Binds `address` inside `ns`.
    ///
    /// # Errors
    /// When the namespace or the address cannot be had.
    pub fn start(ns: &Netns, address: SocketAddr) -> Result<Self, ProbeError> {
        let socket =
            ns.run_blocking(move || UdpSocket::bind(address))?.map_err(ProbeError::socket("bind"))?;
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .map_err(ProbeError::socket("set a read timeout"))?;
        let address = socket.local_addr().map_err(ProbeError::socket("bind"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut buffer = vec![0; 65_536];
                while !stop.load(Ordering::Relaxed) {
                    if let Ok((read, from)) = socket.recv_from(&mut buffer) {
                        let _ = socket.send_to(&buffer[..read], from);
                    }
                }
            })
        };
        Ok(Self { address, stop, thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for UdpEcho {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends `payload` from `ns` and waits for any one answer; the answer and the round trip, or `None` when
/// `limit` has passed.
///
/// # Errors
/// When the namespace or a socket cannot be had.
pub fn ask(
    ns: &Netns,
    target: SocketAddr,
    payload: &[u8],
    limit: Duration,
) -> Result<Option<(Vec<u8>, Duration)>, ProbeError> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = ns
        .run_blocking(move || UdpSocket::bind(SocketAddr::new(any, 0)))?
        .map_err(ProbeError::socket("bind"))?;
    socket.connect(target).map_err(ProbeError::socket("route to the target"))?;
    socket.set_read_timeout(Some(limit)).map_err(ProbeError::socket("set a read timeout"))?;
    let started = Instant::now();
    socket.send(payload).map_err(ProbeError::socket("send"))?;
    let mut buffer = vec![0; 65_536];
    Ok(match socket.recv(&mut buffer) {
        Ok(read) => {
            buffer.truncate(read);
            Some((buffer, started.elapsed()))
        }
        Err(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_comes_back() {
        let ns = Netns::current().unwrap();
        let echo = UdpEcho::start(&ns, "127.0.0.1:0".parse().unwrap()).unwrap();
        let (answer, _) = ask(&ns, echo.address(), b"hello", Duration::from_secs(5)).unwrap().unwrap();
        assert_eq!(answer, b"hello");
    }
}
