//! The `Node` service on `run_dir/supervisor.sock`, for the CNI plugin and the tools.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use podtether_proto::engine::{Flow, NetReport, PeerStatus, PingKind, Pong, Verdict, Way};
use podtether_proto::log::is_join;
use podtether_proto::node::{
    AddRequest, Attached, AttachmentId, CheckRequest, Choice, Cleanup, CniError, Explained, GcRequest,
    LogLine, LogWish, Node, PodLog, PodRouting, PodSelector, PodSummary, Renewal, Renewed, Routing, Version,
};
use podtether_proto::{PROTO_VERSION, transport};
use tarpc::context::Context;
use tarpc::server::{BaseChannel, Channel};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::Instrument as _;

use crate::choose::{Chooser, Decision};
use crate::distrust;
use crate::log::scope;
use crate::metrics::spans::cni_answered;
use crate::recent::recent;
use crate::record::random_id;
use crate::refused::{Reason, Refused};
use crate::table::Handle;

/// Characters of a plugin's complaint that are told.
const MAX_MESSAGE: usize = 500;

/// Callers at a time; more wait in the socket.
const MAX_CONNECTIONS: usize = 512;
/// Calls of one caller that run at a time; more are refused. The plugin makes one.
const MAX_CALLS: usize = 32;
/// A caller that does not send a whole call at once gives its place to another.
const FIRST_CALL: Duration = Duration::from_secs(5);
/// So does one that has nothing running and makes no further call.
const NEXT_CALL: Duration = Duration::from_secs(120);
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
pub async fn serve(socket: &Socket, table: Handle, chooser: Chooser, refused: Refused) {
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
            Ok(peer) => {
                let (uid, pid) = (peer.uid(), peer.pid().unwrap_or_default());
                let what =
                    format!("uid {uid} (process {pid}) called on the supervisor's socket, which is root's");
                refused.count(Reason::RpcPeer, &what);
                continue;
            }
            Err(error) => {
                refused
                    .count(Reason::RpcPeer, &format!("a caller of whom the kernel does not tell: {error}"));
                continue;
            }
        }
        let service = Service { table: table.clone(), chooser: chooser.clone(), refused: refused.clone() };
        tokio::spawn(async move {
            connection(stream, service, [FIRST_CALL, NEXT_CALL]).await;
            drop(place);
        });
    }
}

async fn connection(stream: UnixStream, service: Service, [first, next]: [Duration; 2]) {
    let refused = service.refused.clone();
    let requests =
        BaseChannel::with_defaults(transport::served(stream)).max_concurrent_requests(MAX_CALLS).requests();
    // A caller that goes away takes its calls with it.
    let mut running = JoinSet::new();
    tokio::pin!(requests);
    let mut idle = first;
    loop {
        let until = tokio::time::Instant::now() + idle;
        tokio::select! {
            () = tokio::time::sleep_until(until), if running.is_empty() => return,
            request = requests.next() => match request {
                Some(Ok(request)) => {
                    idle = next;
                    running.spawn(request.execute(service.clone().serve()));
                }
                Some(Err(error)) => {
                    if transport::is_malformed(&error) {
                        let what = "a caller on the supervisor's socket sent what is no call: is it of another build?";
                        refused.count(Reason::RpcFrame, what);
                    }
                    return;
                }
                None => return,
            },
            Some(_) = running.join_next() => {}
        }
    }
}

#[derive(Debug, Clone)]
struct Service {
    table: Handle,
    chooser: Chooser,
    refused: Refused,
}

impl Service {
    /// Counts a call that is wrong in itself.
    fn told<T>(&self, answer: Result<T, CniError>) -> Result<T, CniError> {
        if let Err(error) = &answer
            && let Some(why) = Reason::of_cni(error.code)
        {
            self.refused.count(why, &error.to_string());
        }
        answer
    }
}

fn number(skip: u32) -> usize {
    usize::try_from(skip).unwrap_or(usize::MAX)
}

impl Node for Service {
    async fn add(self, _: Context, mut request: AddRequest) -> Result<Attached, CniError> {
        if !is_join(&request.join) {
            request.join = random_id();
        }
        let begun = Instant::now();
        let span = scope::of(&request.pod, &request.attachment.container_id, &request.join);
        let answered = async {
            let pod = request.pod.clone();
            let answer = match self.chooser.decide(request).await {
                Decision::Nothing => Ok(Attached::default()),
                Decision::Join(request, choice) => self.table.add(request, choice).await,
                Decision::Refused(error) => Err(error),
            };
            self.chooser.answered(&pod, &answer);
            cni_answered("ADD", &answer, begun);
            self.told(answer)
        };
        answered.instrument(span).await
    }

    async fn del(self, _: Context, request: AttachmentId) -> Result<(), CniError> {
        let begun = Instant::now();
        let answer = self.table.del(request).await;
        cni_answered("DEL", &answer, begun);
        answer
    }

    async fn check(self, _: Context, request: CheckRequest) -> Result<(), CniError> {
        let begun = Instant::now();
        let answer = self.table.check(request).await;
        cni_answered("CHECK", &answer, begun);
        self.told(answer)
    }

    async fn gc(self, _: Context, request: GcRequest) -> Result<(), CniError> {
        let begun = Instant::now();
        let answer = self.table.gc(request).await;
        cni_answered("GC", &answer, begun);
        self.told(answer)
    }

    async fn set_routing(
        self,
        _: Context,
        pod: PodSelector,
        routing: Routing,
    ) -> Result<PodRouting, CniError> {
        let answer = self.table.set_routing(pod, routing).await;
        self.told(answer)
    }

    async fn routing(self, _: Context, pod: PodSelector) -> Result<PodRouting, CniError> {
        self.table.routing(pod).await
    }

    async fn pods(self, _: Context, skip: u32, live: bool) -> Vec<PodSummary> {
        self.table.pods(number(skip), live).await
    }

    async fn explain(self, _: Context, pod: PodSelector) -> Result<Explained, CniError> {
        self.table.explain(pod).await
    }

    async fn peers(self, _: Context, pod: PodSelector, skip: u32) -> Result<Vec<PeerStatus>, CniError> {
        self.table.peers(pod, number(skip)).await
    }

    async fn way(self, _: Context, pod: PodSelector, peer: String) -> Result<Way, CniError> {
        self.table.way(pod, peer).await
    }

    async fn why(self, _: Context, pod: PodSelector, packet: Flow) -> Result<Verdict, CniError> {
        self.table.why(pod, packet).await
    }

    async fn netcheck(self, _: Context, pod: PodSelector) -> Result<NetReport, CniError> {
        self.table.netcheck(pod).await
    }

    async fn logs(self, _: Context, pod: PodSelector, after: u64) -> Vec<LogLine> {
        match pod {
            PodSelector::Pod { namespace, name } => recent().after(&namespace, &name, after),
            PodSelector::Attachment(id) => {
                let pods = self.table.list().await.pods;
                let found = pods.iter().find(|pod| {
                    pod.container_id == id.container_id
                        && pod.ifname == id.ifname
                        && pod.network == id.network
                });
                found.map(|pod| recent().after(&pod.namespace, &pod.pod, after)).unwrap_or_default()
            }
        }
    }

    async fn log_level(self, _: Context, pod: PodSelector, wish: LogWish) -> Result<PodLog, CniError> {
        self.table.log_level(pod, wish).await
    }

    async fn ping(
        self,
        _: Context,
        pod: PodSelector,
        peer: String,
        kind: PingKind,
    ) -> Result<Pong, CniError> {
        self.table.ping(pod, peer, kind).await
    }

    async fn renew(self, _: Context, pod: PodSelector, how: Renewal) -> Result<Renewed, CniError> {
        self.table.renew(pod, how).await
    }

    async fn choice(self, _: Context, pod: PodSelector) -> Result<Choice, CniError> {
        match self.table.choice(pod.clone()).await {
            Err(error) => self.chooser.remembered(&pod).ok_or(error),
            joined => joined,
        }
    }

    async fn cleanup(self, _: Context, dry_run: bool) -> Result<Cleanup, CniError> {
        self.table.cleanup(dry_run).await
    }

    async fn misread(self, _: Context, error: CniError) {
        let CniError { code, mut msg, details: _ } = error;
        distrust::tame(&mut msg, MAX_MESSAGE);
        if let Some(why) = Reason::of_cni(code) {
            self.refused.count(why, &msg);
        }
    }

    async fn status(self, _: Context) -> Version {
        PROTO_VERSION
    }
}

#[cfg(test)]
mod tests {
    use podtether_proto::node::NodeClient;
    use tarpc::{client, context};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::table::Unanswered;

    fn service() -> (Service, Unanswered) {
        let options = prometheus::Opts::new("refused", "x");
        let refused = Refused::new(prometheus::IntCounterVec::new(options, &["reason"]).unwrap());
        let (table, questions) = Unanswered::new();
        let file = "[tailnet.default.credentials]\nkind = \"interactive\"".to_owned();
        let inputs = crate::config::Inputs { file: Some(file), ..Default::default() };
        let chooser = Chooser::new(crate::config::Config::load(&inputs).unwrap(), None);
        (Service { table, chooser, refused }, questions)
    }

    #[tokio::test]
    async fn a_caller_that_says_nothing_whole_gives_its_place_back() {
        for beginning in [&b""[..], &[0, 0, 1, 0, 7, 7]] {
            let (mut near, far) = UnixStream::pair().unwrap();
            near.write_all(beginning).await.unwrap();
            let idle = Duration::from_millis(50);
            let begun = std::time::Instant::now();
            connection(far, service().0, [idle, Duration::MAX / 4]).await;
            assert!(begun.elapsed() >= idle);
            assert_eq!(near.read(&mut [0]).await.unwrap(), 0, "it was hung up on");
        }
    }

    #[tokio::test]
    async fn a_call_that_runs_is_not_idle_and_a_caller_has_so_many() {
        let (near, far) = UnixStream::pair().unwrap();
        let (service, questions) = service();
        let served = tokio::spawn(connection(far, service, [Duration::from_millis(20); 2]));
        let client = NodeClient::new(client::Config::default(), transport::framed(near)).spawn();
        let calls: Vec<_> = (0..3 * MAX_CALLS)
            .map(|_| {
                let client = client.clone();
                tokio::spawn(async move { client.pods(context::current(), 0, false).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!served.is_finished(), "its calls are running");
        assert_eq!(questions.len(), MAX_CALLS);
        let (refused, running): (Vec<_>, Vec<_>) = calls.into_iter().partition(|call| call.is_finished());
        assert_eq!((refused.len(), running.len()), (2 * MAX_CALLS, MAX_CALLS), "the others are told so");
        for call in refused {
            assert!(matches!(call.await.unwrap(), Err(client::RpcError::Server(_))));
        }
        for call in running {
            call.abort();
        }
        drop(client);
        served.await.unwrap();
    }
}
