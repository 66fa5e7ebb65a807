//! Signs of life that control asks for.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use podtether_core::tailcfg::PingRequest;
use tokio::task::JoinSet;

use super::session::Session;
use crate::dial::{ControlUrl, Dialer};
use crate::http1;

const TIMEOUT: Duration = Duration::from_secs(5);
/// Answers under way at a time.
const MAX_RUNNING: usize = 4;
/// URLs remembered, so that a repeated request is answered once.
const REMEMBERED: usize = 16;

/// Answers ping requests of one session; the answers end with it.
pub(super) struct Pings {
    session: Session,
    dialer: Dialer,
    answered: VecDeque<String>,
    running: JoinSet<()>,
}

impl Pings {
    pub(super) fn new(session: Session, dialer: Dialer) -> Self {
        Self { session, dialer, answered: VecDeque::new(), running: JoinSet::new() }
    }

    pub(super) fn answer(&mut self, request: PingRequest) {
        while self.running.try_join_next().is_some() {}
        if request.url.is_empty() || self.answered.contains(&request.url) || self.running.len() >= MAX_RUNNING
        {
            return;
        }
        if self.answered.len() >= REMEMBERED {
            self.answered.pop_front();
        }
        self.answered.push_back(request.url.clone());
        if !request.types.is_empty() {
            // Remote commands and pings on control's behalf: not offered, so not answered.
            tracing::debug!(types = request.types, "ping request of a kind that is not answered");
            return;
        }
        let (session, dialer) = (self.session.clone(), self.dialer.clone());
        self.running.spawn(async move {
            let head = head(session, dialer, &request);
            match tokio::time::timeout(TIMEOUT, head).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "ping answer failed"),
                Err(_) => tracing::debug!("ping answer timed out"),
            }
        });
    }
}

async fn head(session: Session, dialer: Dialer, request: &PingRequest) -> anyhow::Result<()> {
    let uri: http::Uri = request.url.parse()?;
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    if request.url_is_noise {
        session.request(Method::HEAD, path, Bytes::new()).await?;
        return Ok(());
    }
    let base: ControlUrl =
        format!("{}://{}", uri.scheme_str().unwrap_or_default(), uri.authority().map_or("", |a| a.as_str()))
            .parse()?;
    let mut stream = dialer.control(&base).await?;
    let head = format!(
        "HEAD {path} HTTP/1.1\r\nHost: {}\r\nUser-Agent: podtether\r\nConnection: close\r\n\r\n",
        base.authority()
    );
    http1::exchange(&mut stream, &head).await?;
    Ok(())
}
