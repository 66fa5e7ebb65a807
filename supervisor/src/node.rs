//! The `Node` service on `run_dir/supervisor.sock`, for the CNI plugin and the tools.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt;
use podtether_proto::node::{
    AddRequest, Attached, AttachmentId, CheckRequest, CniError, GcRequest, Node, PodRouting, PodSelector,
    Routing, Version,
};
use podtether_proto::{PROTO_VERSION, transport};
use tarpc::context::Context;
use tarpc::server::{BaseChannel, Channel};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::table::Handle;

/// Callers at a time; more wait in the socket.
const MAX_CONNECTIONS: usize = 512;
/// After an accept error (descriptors exhausted), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The bound socket; its path goes when it is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Binds `run_dir/supervisor.sock`, 0600. The directory's lock is held, so a socket that is there
/// already was left behind.
///
/// # Errors
/// The file system refuses.
pub fn bind(run_dir: &Path) -> std::io::Result<Socket> {
    let path = run_dir.join("supervisor.sock");
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        Ok(()) | Err(_) => {}
    }
    // The directory is 0700, so nobody connects before the mode is set.
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(Socket { listener, path })
}

/// Serves until dropped.
pub async fn serve(socket: &Socket, table: Handle) {
    let places = std::sync::Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // SAFETY: reads an id of this process.
    let own = unsafe { libc::geteuid() };
    loop {
        let Ok(place) = std::sync::Arc::clone(&places).acquire_owned().await else { return };
        let stream = match socket.listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept on the supervisor's socket failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 || peer.uid() == own => {}
            other => {
                tracing::warn!(?other, "refused a caller on the supervisor's socket");
                continue;
            }
        }
        let service = Service { table: table.clone() };
        tokio::spawn(async move {
            connection(stream, service).await;
            drop(place);
        });
    }
}

async fn connection(stream: UnixStream, service: Service) {
    let requests = BaseChannel::with_defaults(transport::served(stream)).execute(service.serve());
    // A caller that goes away takes its calls with it.
    let mut running = JoinSet::new();
    tokio::pin!(requests);
    loop {
        tokio::select! {
            request = requests.next() => match request {
                Some(request) => { running.spawn(request); }
                None => return,
            },
            Some(_) = running.join_next() => {}
        }
    }
}

#[derive(Debug, Clone)]
struct Service {
    table: Handle,
}

impl Node for Service {
    async fn add(self, _: Context, request: AddRequest) -> Result<Attached, CniError> {
        self.table.add(request).await
    }

    async fn del(self, _: Context, request: AttachmentId) -> Result<(), CniError> {
        self.table.del(request).await
    }

    async fn check(self, _: Context, request: CheckRequest) -> Result<(), CniError> {
        self.table.check(request).await
    }

    async fn gc(self, _: Context, request: GcRequest) -> Result<(), CniError> {
        self.table.gc(request).await
    }

    async fn set_routing(
        self,
        _: Context,
        pod: PodSelector,
        routing: Routing,
    ) -> Result<PodRouting, CniError> {
        self.table.set_routing(pod, routing).await
    }

    async fn routing(self, _: Context, pod: PodSelector) -> Result<PodRouting, CniError> {
        self.table.routing(pod).await
    }

    async fn status(self, _: Context) -> Version {
        PROTO_VERSION
    }
}
