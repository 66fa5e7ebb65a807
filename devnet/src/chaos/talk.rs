//! TCP connections that live as long as the run, with every byte checked.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use podtether_net::Netns;

use crate::probe::ProbeError;
use crate::probe::tcp::{Serve, TcpServer, dial};
use crate::sync::lock;

const BLOCK: usize = 1000;
/// TCP's own doubling pauses after a long silence stay far below.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);
const CONNECT_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// One connection to an echo server: blocks of a pattern go there and come back.
pub(super) struct Talk {
    name: String,
    rounds: Arc<AtomicU64>,
    broken: Arc<Mutex<Option<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _server: TcpServer,
}

impl Talk {
    /// Serves at `at` in `there`, connects from `here`, and says something every `pace`.
    pub(super) fn start(
        name: String,
        here: &Netns,
        there: &Netns,
        at: SocketAddr,
        pace: Duration,
    ) -> Result<Self, ProbeError> {
        let server = TcpServer::start(there, at, Serve::Echo)?;
        let Some(stream) = dial(here, at, CONNECT_WITHIN)? else {
            return Err(ProbeError::Answer(format!("{at} did not accept within {CONNECT_WITHIN:?}")));
        };
        stream.set_read_timeout(Some(LOOK_EVERY)).map_err(ProbeError::socket("set a read timeout"))?;
        let (rounds, broken) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(None)));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (rounds, broken, stop) = (Arc::clone(&rounds), Arc::clone(&broken), Arc::clone(&stop));
            std::thread::spawn(move || {
                if let Err(error) = converse(stream, pace, &rounds, &stop) {
                    *lock(&broken) = Some(error.to_string());
                }
            })
        };
        Ok(Self { name, rounds, broken, stop, thread: Some(thread), _server: server })
    }

    /// Why it is over, if it is; once.
    pub(super) fn broke(&self) -> Option<String> {
        lock(&self.broken).take().map(|why| format!("{}: {why}", self.name))
    }

    /// Whose it is.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Blocks that went there and back.
    pub(super) fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn converse(mut stream: TcpStream, pace: Duration, rounds: &AtomicU64, stop: &AtomicBool) -> io::Result<()> {
    let mut position: u64 = 0;
    let mut back = [0; BLOCK];
    while !stop.load(Ordering::Relaxed) {
        // 251 is prime, so no two blocks in a row are alike.
        let block: [u8; BLOCK] = std::array::from_fn(|i| {
            u8::try_from((position + u64::try_from(i).unwrap_or(0)) % 251).unwrap_or(0)
        });
        position += 1000;
        stream.write_all(&block)?;
        let (mut filled, asked) = (0, Instant::now());
        while filled < BLOCK {
            match stream.read(&mut back[filled..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => filled += read,
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    if stop.load(Ordering::Relaxed) {
                        return Ok(());
                    }
                    if asked.elapsed() > ANSWER_WITHIN {
                        return Err(e);
                    }
                }
                Err(e) => return Err(e),
            }
        }
        if back != block {
            return Err(io::Error::other("other bytes came back"));
        }
        rounds.fetch_add(1, Ordering::Relaxed);
        std::thread::park_timeout(pace);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn it_goes_on_and_says_when_it_is_cut() {
        let ns = Netns::current().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let talk = Talk::start("a".into(), &ns, &ns, free, Duration::from_millis(1)).unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while talk.rounds() < 5 {
            assert!(Instant::now() < until && talk.broke().is_none());
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(talk);

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut other, _) = listener.accept().unwrap();
        let server = std::thread::spawn(move || {
            let mut block = [0; BLOCK];
            other.read_exact(&mut block).unwrap();
            block[17] ^= 1;
            other.write_all(&block).unwrap();
            other
        });
        let error =
            converse(stream, Duration::ZERO, &AtomicU64::new(0), &AtomicBool::new(false)).unwrap_err();
        assert_eq!(error.to_string(), "other bytes came back");
        drop(server.join().unwrap());
    }
}
