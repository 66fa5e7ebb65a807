//! Listeners that can be shut and opened again, and whose connections can be cut.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

/// Most connections one listener serves at a time.
const MAX_CONNECTIONS: usize = 8192;

/// What a listener does now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gate {
    /// Closed: nobody listens, so connecting is refused.
    pub(crate) open: bool,
    /// Every new number cuts the connections there are.
    pub(crate) cut: u64,
}

impl Gate {
    pub(crate) const OPEN: Self = Self { open: true, cut: 0 };

    /// Says whether that changes anything: a change cuts the connections.
    pub(crate) fn set_open(&mut self, open: bool) -> bool {
        std::mem::replace(&mut self.open, open) != open
    }
}

/// Accepts for ever. `serve` runs once per connection until its token is cancelled, and must give that
/// token to whatever outlives it; all connections end with the returned future.
pub(crate) async fn accept<F>(
    listener: TcpListener,
    mut gate: watch::Receiver<Gate>,
    serve: impl Fn(TcpStream, CancellationToken) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let Ok(address) = listener.local_addr() else { return };
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut bound = Some(listener);
    loop {
        if gate.borrow_and_update().open && bound.is_none() {
            bound = Some(rebind(address).await);
        } else if !gate.borrow().open {
            bound = None;
        }
        let token = CancellationToken::new();
        let _cut_on_change = token.clone().drop_guard();
        loop {
            tokio::select! {
                changed = gate.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
                accepted = next(bound.as_ref(), &permits) => {
                    let (stream, permit) = accepted;
                    if let Err(error) = stream.set_nodelay(true) {
                        tracing::debug!(%error, "connection gone before it was served");
                        continue;
                    }
                    let work = serve(stream, token.clone());
                    let token = token.clone();
                    tokio::spawn(async move {
                        token.run_until_cancelled_owned(work).await;
                        drop(permit);
                    });
                }
            }
        }
    }
}

async fn next(
    listener: Option<&TcpListener>,
    permits: &Arc<Semaphore>,
) -> (TcpStream, tokio::sync::OwnedSemaphorePermit) {
    let (Some(listener), Ok(permit)) = (listener, permits.clone().acquire_owned().await) else {
        return std::future::pending().await;
    };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, permit),
            Err(error) => {
                // Out of descriptors, mostly: others must get the chance to close some.
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn rebind(address: SocketAddr) -> TcpListener {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => {
                // Somebody else has the port meanwhile, and its end announces itself to nobody.
                tracing::warn!(%error, %address, "cannot listen again yet");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}
