//! What is asked on an open session: register, the map stream, updates, logout.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::RecvStream;
use h2::client::SendRequest;
use http::{Method, Request, Response, StatusCode};
use podtether_core::backoff::Backoff;
use podtether_core::engine::HostUpdate;
use podtether_core::map_stream::Piece;
use podtether_core::tailcfg::{
    CAPABILITY_VERSION, Debug, MapRequest, MapResponse, RegisterRequest, RegisterResponse, UnixTime,
};
use podtether_proto::exit::EngineExit;
use serde::Serialize;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::answer::Answers;
use super::{Client, Event, Failure, Gone, Identity, Steps, random_u64, unit};
use crate::dial::ControlUrl;
use crate::reason::Ending;
use crate::refused::Refused;

const UPDATE_TIMEOUT: Duration = Duration::from_secs(30);
/// Endpoints mostly change several at a time.
const UPDATE_SETTLE: Duration = Duration::from_millis(50);
/// Answers other than the map stream.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Any time in the past gives the key up; this one is what stock nodes send.
const LONG_AGO: UnixTime = UnixTime::from_secs(123);

/// An open HTTP/2 session. Clones share it; it closes with the last one.
#[derive(Clone)]
pub(super) struct Session {
    url: ControlUrl,
    requests: SendRequest<Bytes>,
    _connection: Arc<JoinSet<()>>,
}

impl Session {
    pub(super) fn new(url: ControlUrl, requests: SendRequest<Bytes>, connection: JoinSet<()>) -> Self {
        Self { url, requests, _connection: Arc::new(connection) }
    }

    pub(super) fn url(&self) -> &ControlUrl {
        &self.url
    }

    fn lost(&self, doing: &str, error: &h2::Error) -> Failure {
        // The connection as a whole is counted where it ends.
        if error.is_reset() && error.is_library() {
            Refused::ControlHttp2.count();
        }
        Failure::Unreachable(format!("{} broke off while {doing}: {error}", self.url))
    }

    /// One request on the session; `path` starts with a slash.
    pub(super) async fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<RecvStream>, h2::Error> {
        let request = Request::builder()
            .method(method)
            .uri(format!("https://{}{path}", self.url.authority()))
            .header("content-type", "application/json")
            .body(())
            .map_err(|_| h2::Error::from(h2::Reason::INTERNAL_ERROR))?;
        let mut requests = self.requests.clone().ready().await?;
        let (response, mut send) = requests.send_request(request, body.is_empty())?;
        if !body.is_empty() {
            send.send_data(body, true)?;
        }
        response.await
    }

    async fn post(&self, path: &str, message: &impl Serialize) -> Result<Response<RecvStream>, Failure> {
        let body = serde_json::to_vec(message).map_err(|e| Failure::refused(e.to_string()))?;
        self.request(Method::POST, path, body.into()).await.map_err(|e| self.lost("asking", &e))
    }

    fn refusal(&self, doing: &str, response: &Response<RecvStream>) -> Failure {
        let retry_after = response.headers().get("retry-after").and_then(|v| v.to_str().ok());
        let status = response.status().as_u16();
        Failure::status(format!("{} answered HTTP {status} to {doing}", self.url), status, retry_after)
    }

    pub(super) async fn register(&self, request: &RegisterRequest) -> Result<RegisterResponse, Failure> {
        let response = self.post("/machine/register", request).await?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal("the registration", &response));
        }
        let body = read_all(response.into_body()).await.map_err(|e| self.lost("registering", &e))?;
        // Headscale answers the logout of an ephemeral node with `null`.
        let answer: Option<RegisterResponse> = serde_json::from_slice(&body).map_err(|e| {
            Refused::ControlRegister.count();
            Failure::refused(format!("{} answered the registration with bad JSON: {e}", self.url))
        })?;
        Ok(answer.unwrap_or_default())
    }

    /// Gives the node key up: the device leaves the tailnet.
    pub(super) async fn logout(&self, identity: &Identity, host: &HostUpdate) -> Result<(), String> {
        let request = RegisterRequest { expiry: Some(LONG_AGO), ..register_request(identity, host) };
        match self.register(&request).await {
            Ok(answer) if answer.error.is_empty() => Ok(()),
            Ok(answer) => Err(format!("{} refused the logout: {}", self.url, answer.error)),
            Err(Failure::Unreachable(reason) | Failure::Refused { reason, .. }) => Err(reason),
            Err(Failure::Fatal(ending)) => Err(ending.reason),
        }
    }
}

async fn read_all(mut body: RecvStream) -> Result<Vec<u8>, h2::Error> {
    let mut all = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        if all.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err(h2::Reason::ENHANCE_YOUR_CALM.into());
        }
        all.extend_from_slice(&chunk);
    }
    Ok(all)
}

pub(super) fn register_request(identity: &Identity, host: &HostUpdate) -> RegisterRequest {
    RegisterRequest {
        version: CAPABILITY_VERSION,
        node_key: identity.node_key,
        old_node_key: identity.old_node_key,
        hostinfo: Some(identity.hostinfo(host)),
        ephemeral: identity.ephemeral,
        ..RegisterRequest::default()
    }
}

impl Client {
    /// Opens the map stream and follows it to its end.
    pub(super) async fn stream(
        &mut self,
        session: Session,
        established: &mut bool,
        mut steps: Steps,
    ) -> Result<Result<Infallible, Failure>, Gone> {
        let host = self.host.borrow_and_update().clone();
        let hostinfo = self.identity.hostinfo(&host);
        let request = MapRequest::streaming(self.identity.node_key, host.disco, hostinfo, &host.endpoints);
        let opened = tokio::time::timeout(self.timing.watchdog, session.post("/machine/map", &request)).await;
        let response = match opened {
            Ok(Ok(response)) => response,
            Ok(Err(failure)) => return Ok(Err(failure)),
            Err(_) => return Ok(Err(self.silent())),
        };
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(Err(unknown())),
            _ => return Ok(Err(session.refusal("the map request", &response))),
        }
        *established = true;
        steps.done("map answer");
        self.tell(Event::SessionStarted).await?;
        tracing::info!(control = %self.identity.url, "map session open");
        let mut updates = JoinSet::new();
        let (gone, forgotten) = oneshot::channel();
        let host = self.host.clone();
        updates.spawn(keep_updated(
            session.clone(),
            self.identity.clone(),
            host,
            self.timing.still_known,
            gone,
        ));
        self.follow(session, response.into_body(), steps, forgotten).await
    }

    async fn follow(
        &mut self,
        session: Session,
        mut body: RecvStream,
        steps: Steps,
        mut forgotten: oneshot::Receiver<()>,
    ) -> Result<Result<Infallible, Failure>, Gone> {
        let mut first = Some(steps);
        self.map.restart();
        let mut answers = Answers::new(session.clone(), self.dialer.clone());
        // What the server wants to wait for, and the message that waits.
        let mut pause: Option<(Instant, Box<MapResponse>)> = None;
        let mut heard = Instant::now();
        loop {
            if pause.is_none() {
                match self.map.next_piece() {
                    Ok(None) => {}
                    Ok(Some(Piece::Peers(list, nodes))) => {
                        self.tell(Event::Peers(list, nodes)).await?;
                        // Thousands may follow, and packets wait.
                        tokio::task::yield_now().await;
                        continue;
                    }
                    Ok(Some(Piece::Pause)) => {
                        tokio::task::yield_now().await;
                        continue;
                    }
                    Ok(Some(Piece::Bad(bad))) => {
                        Refused::MapMessage.count();
                        if first.is_some() {
                            // Without the first there is nothing that others could change.
                            let reason = format!("{} sent a bad map message: {bad}", self.identity.url);
                            return Ok(Err(Failure::refused(reason)));
                        }
                        self.tell(Event::PeersUnfinished).await?;
                        continue;
                    }
                    Ok(Some(Piece::Rest(message, skipped))) => {
                        Refused::MapField.add(skipped);
                        if let Some(mut steps) = first.take() {
                            steps.done("first map");
                            self.useful_since = Some(Instant::now());
                        }
                        if let Some(plan) = &message.control_dial_plan {
                            self.way.plan = plan.clone();
                        }
                        let asked = message.debug.as_ref().filter(|_| !message.keep_alive);
                        let asked = asked.map(Debug::pause).unwrap_or_default();
                        if asked.is_zero() {
                            self.tell(Event::Map(message)).await?;
                        } else {
                            tracing::info!(seconds = asked.as_secs_f64(), "control asks for a pause");
                            pause = Some((Instant::now() + asked, message));
                        }
                        continue;
                    }
                    Err(error) => {
                        Refused::MapFrame.count();
                        let reason = format!("{} sent a bad map frame: {error}", self.identity.url);
                        return Ok(Err(Failure::refused(reason)));
                    }
                }
            }
            let wake = pause.as_ref().map_or(heard + self.timing.watchdog, |(until, _)| *until);
            let chunk = tokio::select! {
                chunk = body.data(), if pause.is_none() => chunk,
                () = tokio::time::sleep_until(wake.into()) => {
                    let Some((_, message)) = pause.take() else { return Ok(Err(self.silent())) };
                    self.tell(Event::Map(message)).await?;
                    // Nobody listened meanwhile, so the silence does not count.
                    heard = Instant::now();
                    continue;
                }
                Ok(()) = &mut forgotten => return Ok(Err(unknown())),
                answer = self.answers.recv() => {
                    answers.send(answer.ok_or(Gone)?);
                    continue;
                }
                answer = self.logouts.recv() => {
                    let host = self.host.borrow().clone();
                    let outcome = session.logout(&self.identity, &host).await;
                    let _ = answer.ok_or(Gone)?.send(outcome);
                    continue;
                }
            };
            let chunk = match chunk {
                Some(Ok(chunk)) => chunk,
                Some(Err(error)) => return Ok(Err(session.lost("following the map", &error))),
                None => {
                    let reason = format!("{} closed the map stream", self.identity.url);
                    return Ok(Err(Failure::Unreachable(reason)));
                }
            };
            heard = Instant::now();
            if let Err(error) = body.flow_control().release_capacity(chunk.len()) {
                return Ok(Err(session.lost("following the map", &error)));
            }
            self.map.push(&chunk);
        }
    }

    fn silent(&self) -> Failure {
        Failure::Unreachable(format!(
            "{} was silent for {} s",
            self.identity.url,
            self.timing.watchdog.as_secs()
        ))
    }
}

fn unknown() -> Failure {
    let reason = "the control server does not know this node any more";
    Failure::Fatal(Ending::new(EngineExit::NodeUnknown, reason))
}

/// Reports endpoints and NetInfo: at once, because the streaming request does not count as a report
/// everywhere, on every change, and every `still_known` or so. Headscale keeps the stream of a node that was
/// deleted open and silent but for keepalives; only the answer to a report tells, through `gone`.
async fn keep_updated(
    session: Session,
    identity: Arc<Identity>,
    mut host: watch::Receiver<HostUpdate>,
    still_known: Duration,
    gone: oneshot::Sender<()>,
) {
    let mut backoff = Backoff::default();
    loop {
        tokio::time::sleep(UPDATE_SETTLE).await;
        let now = host.borrow_and_update().clone();
        let request = MapRequest::lite(identity.node_key, now.disco, identity.hostinfo(&now), &now.endpoints);
        let sent = tokio::time::timeout(UPDATE_TIMEOUT, session.post("/machine/map", &request)).await;
        let failure = match sent {
            Ok(Ok(response)) if response.status() == StatusCode::OK => None,
            Ok(Ok(response)) if response.status() == StatusCode::NOT_FOUND => {
                let _ = gone.send(());
                return;
            }
            Ok(Ok(response)) => Some(session.refusal("an update", &response)),
            Ok(Err(failure)) => Some(failure),
            Err(_) => Some(Failure::Unreachable("no answer".to_owned())),
        };
        match failure {
            None => {
                backoff.reset();
                let again = still_known.mul_f64(0.75 + 0.5 * unit(random_u64()));
                if let Ok(Err(_)) = tokio::time::timeout(again, host.changed()).await {
                    return;
                }
            }
            Some(failure) => {
                tracing::debug!(?failure, "endpoint update failed");
                tokio::time::sleep(backoff.next(random_u64())).await;
            }
        }
    }
}
