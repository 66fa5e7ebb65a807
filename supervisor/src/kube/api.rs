//! Calls to the API server: the service account's token with each, read anew because it is rotated.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE};
use reqwest::{Method, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::object::{Event, Status};
use crate::config::{Node, SecretSource};
use crate::credentials::Roots;
use crate::credentials::http::{Http, body, say};
use crate::metrics::spans;

/// How long one answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// A watch ends by itself at the server before that.
pub(super) const WATCH_SECONDS: u64 = 290;
const WATCH_WITHIN: Duration = Duration::from_secs(WATCH_SECONDS + 30);
/// Longest line of a watch: one object.
const MAX_LINE: usize = 4 << 20;
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
    /// 409 or 422: it is not what it was thought to be.
    #[error("{0}")]
    Conflict(String),
    /// Away, slow, or anything else that may pass.
    #[error("{0}")]
    Passing(String),
}

/// The API server.
#[derive(Debug)]
pub struct Api {
    http: Http,
    /// Without a slash at its end.
    url: String,
    token: Option<SecretSource>,
}

impl Api {
    /// As `node.api_server` and `node.service_account_dir` have it.
    ///
    /// # Errors
    /// One sentence.
    pub fn new(node: &Node) -> Result<Api, String> {
        let url = node.api_server.clone().ok_or(
            "node.name is set and node.api_server is not, nor are the variables KUBERNETES_SERVICE_HOST and _PORT",
        )?;
        let dir = &node.service_account_dir;
        let file = |name: &str| -> Option<PathBuf> { Some(dir.join(name)).filter(|path| path.exists()) };
        let roots =
            Roots::new(file("ca.crt").as_deref()).map_err(|e| format!("node.service_account_dir: {e}"))?;
        let token = file("token").map(SecretSource::File);
        Ok(Api { http: Http::new(Arc::new(roots))?, url, token })
    }

    fn request(&self, method: Method, path: &str) -> Result<reqwest::RequestBuilder, Failure> {
        self.request_as(method, path, "application/json")
    }

    fn request_as(
        &self,
        method: Method,
        path: &str,
        accept: &'static str,
    ) -> Result<reqwest::RequestBuilder, Failure> {
        let mut request =
            self.http.now().request(method, format!("{}{path}", self.url)).header(ACCEPT, accept);
        if let Some(token) = &self.token {
            let token = token.read().map_err(|e| Failure::Forbidden(format!("the service account: {e}")))?;
            let value = reqwest::header::HeaderValue::from_str(&format!("Bearer {}", token.expose()));
            let mut value = value
                .map_err(|_| Failure::Forbidden("the service account's token is no header value".into()))?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        Ok(request)
    }

    /// A GET's answer.
    ///
    /// # Errors
    /// [`Failure`].
    pub async fn get<T: DeserializeOwned>(&self, what: &str, path: &str) -> Result<T, Failure> {
        self.get_as(what, path, "application/json").await
    }

    /// As [`Api::get`], of another form.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) async fn get_as<T: DeserializeOwned>(
        &self,
        what: &str,
        path: &str,
        accept: &'static str,
    ) -> Result<T, Failure> {
        let request = self.request_as(Method::GET, path, accept)?;
        let response = self.send(what, request.timeout(ANSWER_WITHIN)).await?;
        let bytes = body(response).await.map_err(|e| Failure::Passing(format!("cannot {what}: {e}")))?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Failure::Passing(format!("cannot {what}: the answer is not understood: {e}")))
    }

    /// Makes something.
    ///
    /// # Errors
    /// [`Failure`].
    pub async fn post(&self, what: &str, path: &str, object: &Value) -> Result<(), Failure> {
        let request = self.request(Method::POST, path)?.json(object);
        self.send(what, request.timeout(ANSWER_WITHIN)).await.map(drop)
    }

    /// Changes a part of something; `kind` is the patch's content type.
    ///
    /// # Errors
    /// [`Failure`].
    pub async fn patch(&self, what: &str, path: &str, kind: &str, patch: &Value) -> Result<(), Failure> {
        let request = self.request(Method::PATCH, path)?.header(CONTENT_TYPE, kind).body(patch.to_string());
        self.send(what, request.timeout(ANSWER_WITHIN)).await.map(drop)
    }

    /// The beginning of a watch.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) async fn watch(&self, what: &str, path: &str) -> Result<Lines, Failure> {
        let response = self.send(what, self.request(Method::GET, path)?.timeout(WATCH_WITHIN)).await?;
        Ok(Lines { response, buffer: Vec::new() })
    }

    async fn send(&self, what: &str, request: reqwest::RequestBuilder) -> Result<reqwest::Response, Failure> {
        let begun = Instant::now();
        let sent = request.send().await;
        let result = sent.as_ref().map_or("failed", |got| spans::of_status(got.status().as_u16()));
        spans::api_called(spans::Api::Kubernetes, result, begun);
        let response =
            sent.map_err(|e| Failure::Passing(format!("cannot {what}: {}", say(&e.without_url()))))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let bytes = body(response).await.unwrap_or_default();
        let said: Status = serde_json::from_slice(&bytes).unwrap_or_default();
        Err(failure(what, status, &said.message))
    }
}

fn failure(what: &str, status: StatusCode, message: &str) -> Failure {
    let said: String =
        message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_QUOTE).collect();
    match status {
        StatusCode::GONE => Failure::Gone,
        StatusCode::NOT_FOUND => Failure::NotFound,
        StatusCode::CONFLICT | StatusCode::UNPROCESSABLE_ENTITY => {
            Failure::Conflict(format!("cannot {what}: {status}: {said}"))
        }
        StatusCode::FORBIDDEN => Failure::Forbidden(format!(
            "the API server does not let this supervisor {what} ({said}): apply the ClusterRole of \
             deploy/daemonset.yaml"
        )),
        StatusCode::UNAUTHORIZED => Failure::Forbidden(format!(
            "the API server does not know this supervisor's service account ({said}): is its token mounted?"
        )),
        _ => Failure::Passing(format!("cannot {what}: the API server answered {status}: {said}")),
    }
}

/// A watch's answer, line by line.
#[derive(Debug)]
pub(super) struct Lines {
    response: reqwest::Response,
    buffer: Vec<u8>,
}

impl Lines {
    /// The next event; `None` at the end. A line that is none is skipped and told by `odd`.
    pub(super) async fn next(&mut self, odd: &mut u64) -> Result<Option<Event>, Failure> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.buffer[searched..].iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=searched + end).collect();
                searched = 0;
                match serde_json::from_slice(&line) {
                    Ok(event) => return Ok(Some(event)),
                    Err(_) if line.trim_ascii().is_empty() => {}
                    Err(_) => *odd += 1,
                }
                continue;
            }
            searched = self.buffer.len();
            if searched > MAX_LINE {
                return Err(Failure::Passing("the API server sent a line without an end".into()));
            }
            match self.response.chunk().await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk),
                Ok(None) => return Ok(None),
                Err(e) => {
                    return Err(Failure::Passing(format!("the watch broke off: {}", say(&e.without_url()))));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_is_missing() {
        let told = failure("watch pods", StatusCode::FORBIDDEN, "pods is forbidden: \u{7}User").to_string();
        assert!(
            told.contains("watch pods") && told.contains("ClusterRole") && !told.contains('\u{7}'),
            "{told}"
        );
        assert_eq!(failure("x", StatusCode::GONE, ""), Failure::Gone);
        assert!(matches!(failure("x", StatusCode::INTERNAL_SERVER_ERROR, ""), Failure::Passing(_)));
        assert!(failure("x", StatusCode::UNAUTHORIZED, "").to_string().contains("token"));
    }
}
