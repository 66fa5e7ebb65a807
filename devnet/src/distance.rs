//! Makes a region far away: what clients send to it arrives late.

use std::io;
use std::sync::Mutex;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::sync::lock;

/// The farthest a region can be.
const MAX: Duration = Duration::from_secs(10);
/// Chunks of a connection that are under way at a time, and their bytes.
const CHUNKS: usize = 256;
const CHUNK_BYTES: usize = 16 << 10;

/// A distance that can change.
#[derive(Debug)]
pub(crate) struct Distance(Mutex<Duration>);

impl Distance {
    pub(crate) fn new(distance: Duration) -> Self {
        Self(Mutex::new(distance.min(MAX)))
    }

    pub(crate) fn set(&self, distance: Duration) {
        *lock(&self.0) = distance.min(MAX);
    }

    /// When what comes in now has arrived.
    pub(crate) fn arrival(&self) -> Instant {
        Instant::now() + *lock(&self.0)
    }
}

/// The connection as somebody so far away would see it: all that it brings comes later, in order. What is
/// written leaves at once, so that a round trip takes `distance` longer.
pub(crate) fn far(
    stream: TcpStream,
    distance: std::sync::Arc<Distance>,
) -> impl AsyncRead + AsyncWrite + Unpin + Send + 'static {
    let (input, output) = stream.into_split();
    let (near, far) = tokio::io::duplex(CHUNK_BYTES);
    tokio::spawn(async move {
        // Whoever serves the connection has dropped it, or the client has; either way it is over.
        let _ = carry(input, near, &distance).await;
    });
    tokio::io::join(far, output)
}

async fn carry(
    mut input: impl AsyncRead + Unpin,
    near: impl AsyncRead + AsyncWrite + Unpin,
    distance: &Distance,
) -> io::Result<()> {
    let (mut closed, mut near) = tokio::io::split(near);
    let (sender, mut under_way) = mpsc::channel::<(Instant, Vec<u8>)>(CHUNKS);
    let reading = async {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let count = input.read(&mut chunk).await?;
            if count == 0 || sender.send((distance.arrival(), chunk[..count].to_vec())).await.is_err() {
                drop(sender);
                return Ok::<_, io::Error>(());
            }
        }
    };
    let writing = async {
        while let Some((at, bytes)) = under_way.recv().await {
            sleep_until(at).await;
            near.write_all(&bytes).await?;
        }
        near.shutdown().await
    };
    let both = async { tokio::try_join!(reading, writing).map(drop) };
    // Nothing is ever written to the other end: it ends when that is dropped.
    let mut nothing = [0];
    tokio::select! {
        result = both => result,
        _ = closed.read(&mut nothing) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_round_trip_takes_the_distance_longer_and_ends_arrive() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (served, _) = listener.accept().await.unwrap();
        let distance = Arc::new(Distance::new(Duration::from_millis(80)));
        let mut served = far(served, distance.clone());
        let echo = tokio::spawn(async move {
            let mut buffer = [0; 64];
            let mut all = 0;
            loop {
                match served.read(&mut buffer).await.unwrap() {
                    0 => return all,
                    count => served.write_all(&buffer[..count]).await.unwrap(),
                }
                all += 1;
            }
        });
        let mut back = [0; 3];
        let mut asked = 0;
        for wait in [80, 300, 0].map(Duration::from_millis) {
            distance.set(wait);
            // A machine that is busy elsewhere may hold any one answer up.
            let mut soonest = Duration::MAX;
            while soonest > wait + Duration::from_millis(200) && asked < 100 {
                let began = Instant::now();
                client.write_all(b"abc").await.unwrap();
                client.read_exact(&mut back).await.unwrap();
                soonest = soonest.min(began.elapsed());
                assert!(soonest >= wait, "{wait:?} took {soonest:?}");
                assert_eq!(&back, b"abc");
                asked += 1;
            }
        }
        assert!(asked < 100, "no answer came in its time");
        drop(client);
        assert_eq!(echo.await.unwrap(), asked);
    }

    #[tokio::test]
    async fn a_dropped_end_closes_the_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (served, _) = listener.accept().await.unwrap();
        drop(far(served, Arc::new(Distance::new(Duration::ZERO))));
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }
}
