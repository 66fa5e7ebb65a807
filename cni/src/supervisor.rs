//! The other end of the socket, and what to make of its absence.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use podtether_proto::node::{NodeClient, Version};
use podtether_proto::{PROTO_VERSION, transport};
use tarpc::client::{self, RpcError};
use tarpc::context::{self, Context};
use tokio::time::{sleep, timeout_at};

/// How often a full accept queue is tried again.
const BUSY_RETRY: Duration = Duration::from_millis(10);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unanswered {
    /// The socket is not there, or nobody accepts on it.
    #[error("nobody serves it: {0}")]
    Nobody(io::Error),
    /// Connected, without an answer in time.
    #[error("no answer in time")]
    Late,
    /// The connection ended before the answer.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// It speaks another version of the internal service.
    #[error("it speaks version {}.{} and this plugin {}.{}", .0.major, .0.minor, PROTO_VERSION.major, PROTO_VERSION.minor)]
    Foreign(Version),
}

/// A supervisor that answered and speaks our version.
#[derive(Debug, Clone)]
pub(crate) struct Supervisor {
    pub(crate) client: NodeClient,
    deadline: Instant,
}

impl Supervisor {
    /// Connects and asks who is there. Every call, this one included, ends by `deadline`.
    pub(crate) async fn reach(socket: &Path, deadline: Instant) -> Result<Self, Unanswered> {
        let connected = timeout_at(deadline.into(), async {
            loop {
                match transport::connect(socket).await {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(BUSY_RETRY).await,
                    other => return other,
                }
            }
        });
        let transport = connected.await.map_err(|_| Unanswered::Late)?.map_err(Unanswered::Nobody)?;
        let client = NodeClient::new(client::Config::default(), transport).spawn();
        let supervisor = Self { client, deadline };
        let version = supervisor.wait(supervisor.client.status(supervisor.context())).await?;
        if PROTO_VERSION.accepts(version) { Ok(supervisor) } else { Err(Unanswered::Foreign(version)) }
    }

    /// For one call.
    pub(crate) fn context(&self) -> Context {
        let mut context = context::current();
        context.deadline = self.deadline;
        context
    }

    /// Milliseconds that the supervisor may take, less what the answer needs to come back.
    pub(crate) fn budget_ms(&self) -> u64 {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let margin = (left / 10).min(Duration::from_secs(1));
        u64::try_from((left - margin).as_millis()).unwrap_or(u64::MAX)
    }

    /// Waits for a call's answer until the deadline.
    pub(crate) async fn wait<T>(
        &self,
        call: impl Future<Output = Result<T, RpcError>>,
    ) -> Result<T, Unanswered> {
        match timeout_at(self.deadline.into(), call).await {
            Err(_) | Ok(Err(RpcError::DeadlineExceeded)) => Err(Unanswered::Late),
            Ok(Err(error)) => Err(Unanswered::Broken(error.to_string())),
            Ok(Ok(answer)) => Ok(answer),
        }
    }
}
