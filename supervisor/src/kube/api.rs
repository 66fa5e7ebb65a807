//! The API server by the kube crate: who we are, where it is, and what a call that came to nothing means.
//!
//! A client is made anew from its files after a call that failed for want of a better token or a working
//! connection, so what is rotated meanwhile is found at the next try, and not a minute later.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use kube::Client;
use kube::api::WatchEvent;
use kube::client::ClientBuilder;
use kube::config::{Config, Kubeconfig};
use kube::core::Status;
use kube::core::request::Error as RequestError;
use podtether_proto::clock;
use serde::de::{DeserializeOwned, IgnoredAny};
use tower::util::MapResponseLayer;

use super::bounded::Bounded;
use crate::config::Node;
use crate::credentials::wall_clock;
use crate::metrics::spans;

/// How long a connection may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long one answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// A watch ends by itself at the server before that.
pub(super) const WATCH_SECONDS: u32 = 290;
/// A watch that says nothing for so long has lost its connection.
pub(super) const WATCH_WITHIN: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 30);
/// A client is made anew no more often.
const RENEW_EVERY: Duration = Duration::from_secs(1);
/// Characters of what the server says.
const MAX_QUOTE: usize = 200;

/// Why a call came to nothing. The sentences hold no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// 401 or 403.
    #[error("{0}")]
    Forbidden(String),
    /// 410: what was asked for is too old to be known.
    #[error("the API server has forgotten where the watch was")]
    Gone,
    /// 404.
    #[error("there is no such thing")]
    NotFound,
    /// 409: somebody else was faster, or it is not what it was thought to be.
    #[error("{0}")]
    Conflict(String),
    /// 422: it is never taken as it is.
    #[error("{0}")]
    Invalid(String),
    /// Away, slow, or anything else that may pass.
    #[error("{0}")]
    Passing(String),
}

/// Where the API server is and who asks it.
#[derive(Debug, Clone)]
enum Access {
    /// `node.kubeconfig`
    Kubeconfig(PathBuf),
    /// `node.api_server` and `node.service_account_dir`.
    Account { url: String, dir: PathBuf },
}

impl Access {
    fn config(&self) -> Result<Config, String> {
        let mut config = match self {
            Access::Kubeconfig(path) => {
                let at = |e: String| format!("node.kubeconfig: {}: {e}", path.display());
                let read = Kubeconfig::read_from(path).map_err(|e| at(chain(&e)))?;
                let own_proxy =
                    read.clusters.iter().flat_map(|named| &named.cluster).any(|c| c.proxy_url.is_some());
                let mut config = Config::try_from(read).map_err(|e| at(chain(&e)))?;
                // The environment's is the way to the tailnet's servers.
                config.proxy_url = config.proxy_url.filter(|_| own_proxy);
                config
            }
            Access::Account { url, dir } => {
                let url = url.parse().map_err(|e| format!("node.api_server: {e}"))?;
                let file = |name: &str| Some(dir.join(name)).filter(|path| path.exists());
                let mut config = Config::new(url);
                config.root_cert_file = file("ca.crt");
                let token = file("token").map(|path| path.to_string_lossy().into_owned());
                config.auth_info.token_file = token;
                config
            }
        };
        config.connect_timeout = Some(CONNECT_WITHIN);
        // Whoever calls tries again at a pace of his own, and says why.
        config.default_retry = false;
        Ok(config)
    }

    fn client(&self) -> Result<Client, String> {
        let whose = match self {
            Access::Kubeconfig(path) => format!("node.kubeconfig: {}", path.display()),
            Access::Account { dir, .. } => format!("node.service_account_dir: {}", dir.display()),
        };
        let builder =
            ClientBuilder::try_from(self.config()?).map_err(|e| format!("{whose}: {}", chain(&e)))?;
        let bounded = MapResponseLayer::new(|response: http::Response<_>| response.map(Bounded::new));
        Ok(builder.with_layer(&bounded).build())
    }
}

/// The API server.
pub struct Api {
    access: Access,
    made: Mutex<(Instant, Client)>,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").field("access", &self.access).finish_non_exhaustive()
    }
}

impl Api {
    /// As `node.kubeconfig`, or `node.api_server` and `node.service_account_dir`, have it. Has to be called in a
    /// runtime.
    ///
    /// # Errors
    /// One sentence.
    pub fn new(node: &Node) -> Result<Api, String> {
        let access = match (&node.kubeconfig, &node.api_server) {
            (Some(path), _) => Access::Kubeconfig(path.clone()),
            (None, Some(url)) => Access::Account { url: url.clone(), dir: node.service_account_dir.clone() },
            (None, None) => {
                return Err(
                    "node.name is set and neither node.api_server nor node.kubeconfig is, nor are the \
                            variables KUBERNETES_SERVICE_HOST and _PORT"
                        .into(),
                );
            }
        };
        let made = Mutex::new((Instant::now(), access.client()?));
        Ok(Api { access, made })
    }

    fn client(&self) -> Client {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// Reads the files again.
    fn renew(&self) {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.0.elapsed() < RENEW_EVERY {
            return;
        }
        match self.access.client() {
            Ok(client) => *made = (Instant::now(), client),
            Err(e) => tracing::debug!("{e}; the client as it was stays in use"),
        }
    }

    fn failed(&self, what: &str, error: &kube::Error) -> Failure {
        let answered = if let kube::Error::Api(status) = error { status.code != 401 } else { false };
        if !answered {
            self.renew();
        }
        failure(what, error)
    }

    /// Asks for something, or changes it: `what` is verb and resource.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        what: &str,
        request: Result<http::Request<Vec<u8>>, RequestError>,
    ) -> Result<T, Failure> {
        let request = request.map_err(|e| Failure::Invalid(format!("cannot {what}: {}", chain(&e))))?;
        self.answered(what, self.client().request(request)).await
    }

    /// As [`Api::ask`], where the answer is of no interest.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) async fn tell(
        &self,
        what: &str,
        request: Result<http::Request<Vec<u8>>, RequestError>,
    ) -> Result<(), Failure> {
        self.ask::<IgnoredAny>(what, request).await.map(drop)
    }

    /// The beginning of a watch.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) async fn watch<T: Clone + DeserializeOwned + Send + 'static>(
        &self,
        what: &str,
        request: Result<http::Request<Vec<u8>>, RequestError>,
    ) -> Result<BoxStream<'static, kube::Result<WatchEvent<T>>>, Failure> {
        let request = request.map_err(|e| Failure::Invalid(format!("cannot {what}: {}", chain(&e))))?;
        let events = self.answered(what, self.client().request_events(request)).await?;
        Ok(events.boxed())
    }

    /// What a call comes to, in time, and how long that took.
    async fn answered<T>(
        &self,
        what: &str,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, Failure> {
        let begun = Instant::now();
        let answer = tokio::time::timeout(ANSWER_WITHIN, call).await;
        let result = match &answer {
            Ok(Ok(_)) => spans::of_status(200),
            Ok(Err(kube::Error::Api(status))) => spans::of_status(status.code),
            Ok(Err(_)) | Err(_) => "failed",
        };
        spans::api_called(spans::Api::Kubernetes, result, begun);
        match answer {
            Ok(answer) => answer.map_err(|e| self.failed(what, &e)),
            Err(_) => Err(Failure::Passing(format!(
                "cannot {what}: no answer from the API server within {ANSWER_WITHIN:?}"
            ))),
        }
    }
}

/// What an error means for the call `what`.
pub(super) fn failure(what: &str, error: &kube::Error) -> Failure {
    if let kube::Error::Api(status) = error {
        return refused(what, status);
    }
    let why = if matches!(error, kube::Error::SerdeError(_) | kube::Error::FromUtf8(_)) {
        // The parser's message may quote what it read.
        "the answer is not understood".into()
    } else if let kube::Error::Service(error) = error {
        chain(&**error)
    } else {
        chain(error)
    };
    Failure::Passing(format!("cannot {what}: {why}"))
}

/// What the API server's refusal means.
pub(super) fn refused(what: &str, status: &Status) -> Failure {
    let said = printable(&status.message);
    match status.code {
        410 => Failure::Gone,
        404 => Failure::NotFound,
        409 => Failure::Conflict(format!("cannot {what}: {said}")),
        422 => Failure::Invalid(format!("cannot {what}: {said}")),
        403 => Failure::Forbidden(format!(
            "the API server does not let this supervisor {what} ({said}): apply the ClusterRole that podtether comes \
             with"
        )),
        401 => Failure::Forbidden(format!(
            "the API server does not know this supervisor's service account ({said}): is its token mounted?"
        )),
        code => Failure::Passing(format!("cannot {what}: the API server answered {code}: {said}")),
    }
}

fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_QUOTE).collect()
}

/// An error and its causes in one line, each told once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let told = inner.to_string();
        if !text.contains(&told) {
            text = format!("{text}: {told}");
        }
        cause = inner.source();
    }
    clock::blamed(printable(&text), wall_clock())
}

/// The namespace that this process runs in, where a service account's directory says so.
#[must_use]
pub fn own_namespace(dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(dir.join("namespace")).ok()?;
    let name = text.trim();
    ((1..=63).contains(&name.len())).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(code: u16, message: &str) -> Failure {
        failure("watch pods", &kube::Error::Api(Status::failure(message, "").with_code(code).boxed()))
    }

    #[test]
    fn refusals_say_what_is_missing() {
        let forbidden = told(403, "pods is forbidden: \u{7}User").to_string();
        assert!(
            forbidden.contains("watch pods")
                && forbidden.contains("ClusterRole")
                && !forbidden.contains('\u{7}'),
            "{forbidden}"
        );
        assert_eq!((told(410, ""), told(404, "")), (Failure::Gone, Failure::NotFound));
        assert!(matches!(told(409, "x"), Failure::Conflict(_)));
        assert!(matches!(told(422, "x"), Failure::Invalid(_)));
        assert!(matches!(told(500, "x"), Failure::Passing(_)));
        assert!(told(401, "").to_string().contains("token"));
        assert!(told(500, &"x".repeat(5000)).to_string().len() < 400);
    }
}
