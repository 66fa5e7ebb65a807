//! The inner server: Noise handshake, early payload, then HTTP/2 on the encrypted stream.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Method, Request, Response, StatusCode, header};
use podtether_core::key::{ChallengePublic, MachinePublic};
use podtether_core::noise::{ServerHandshake, error_frame};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::task::JoinSet;

use super::noise_stream::NoiseStream;
use super::{map, register, wire};
use crate::fault::{Refusal, Target};
use crate::http_server::parameter;
use crate::random;
use crate::shared::Shared;

/// Largest request body, as Headscale has it.
const BODY_LIMIT: usize = 1 << 20;
const MAX_STREAMS: u32 = 64;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes no HTTP/2 connection begins with: they announce the early payload.
const EARLY_MAGIC: &[u8; 5] = b"\xff\xff\xffTS";

/// Why a Noise connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoiseError {
    #[error("handshake: {0}")]
    Handshake(#[from] podtether_core::noise::NoiseError),
    #[error("unsupported client version: {0}")]
    Version(u32),
    #[error("connection: {0}")]
    Io(#[from] std::io::Error),
    #[error("http2: {0}")]
    Http(#[from] h2::Error),
    #[error("handshake took too long")]
    Timeout,
}

/// Serves one upgraded connection until it ends.
pub(crate) async fn serve<S>(shared: &Arc<Shared>, io: S, initiation: &[u8]) -> Result<(), NoiseError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = open(shared, io, initiation);
    let (machine_key, mut connection) =
        tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(|_| NoiseError::Timeout)??;
    // Dropped with the connection, and the map streams with it.
    let mut requests = JoinSet::new();
    loop {
        tokio::select! {
            request = connection.accept() => {
                let Some(request) = request else { return Ok(()) };
                let (request, answer) = request?;
                requests.spawn(handle(shared.clone(), machine_key, request, answer));
            }
            Some(_) = requests.join_next() => {}
        }
    }
}

async fn open<S>(
    shared: &Shared,
    mut io: S,
    initiation: &[u8],
) -> Result<(MachinePublic, h2::server::Connection<NoiseStream<S>, Bytes>), NoiseError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = match ServerHandshake::read(&shared.noise_key, initiation) {
        Ok(handshake) => handshake,
        Err(error) => {
            io.write_all(&error_frame("noise handshake failed")).await?;
            return Err(error.into());
        }
    };
    let (machine_key, version) = (handshake.client(), u32::from(handshake.version()));
    let (transport, response) = handshake.respond()?;
    io.write_all(&response).await?;
    if version < wire::MIN_VERSION {
        return Err(NoiseError::Version(version));
    }
    let mut stream = NoiseStream::new(io, transport);
    stream.write_all(&early_payload()).await?;
    stream.flush().await?;
    let connection = h2::server::Builder::new().max_concurrent_streams(MAX_STREAMS).handshake(stream).await?;
    Ok((machine_key, connection))
}

fn early_payload() -> Vec<u8> {
    let mut challenge = [0; 32];
    challenge.copy_from_slice(&random::bytes(32));
    let early = wire::EarlyNoise { node_key_challenge: ChallengePublic::from_bytes(challenge) };
    let json = serde_json::to_vec(&early).unwrap_or_default();
    let length = u32::try_from(json.len()).unwrap_or_default();
    [EARLY_MAGIC.as_slice(), &length.to_be_bytes(), &json].concat()
}

async fn handle(
    shared: Arc<Shared>,
    machine_key: MachinePublic,
    request: Request<RecvStream>,
    answer: SendResponse<Bytes>,
) {
    let path = request.uri().path().to_owned();
    if let Err(error) = dispatch(&shared, machine_key, request, answer).await {
        tracing::debug!(%error, path, "request ended early");
    }
}

async fn dispatch(
    shared: &Arc<Shared>,
    machine_key: MachinePublic,
    request: Request<RecvStream>,
    mut answer: SendResponse<Bytes>,
) -> Result<(), map::StreamError> {
    let (head, body) = request.into_parts();
    let reply: Reply = match (&head.method, head.uri.path()) {
        (&Method::POST, "/machine/register") => match shared.faults.pass(Target::Register).await {
            Err(refusal) => refusal.into(),
            Ok(()) => match collect(body).await {
                Err(reply) => reply,
                Ok(body) => register(shared, machine_key, &body).await,
            },
        },
        (&Method::POST, "/machine/map") => match shared.faults.pass(Target::Map).await {
            Err(refusal) => refusal.into(),
            Ok(()) => match collect(body).await {
                Err(reply) => reply,
                Ok(body) => return map::handle(shared, machine_key, &body, answer).await,
            },
        },
        (&Method::HEAD, "/machine/ping-response") | (&Method::POST, "/machine/c2n-response") => {
            let id = parameter(head.uri.query(), "id").unwrap_or_default();
            match collect(body).await {
                Err(reply) => reply,
                Ok(body) if shared.complete_ping(id, &body) => Reply::empty(),
                Ok(_) => Reply::text(StatusCode::NOT_FOUND, "unknown or expired ping"),
            }
        }
        // Known to clients, and not served by Headscale either.
        (
            _,
            "/machine/whoami"
            | "/machine/set-dns"
            | "/machine/set-device-attr"
            | "/machine/audit-log"
            | "/machine/id-token"
            | "/machine/feature/query"
            | "/machine/update-health"
            | "/machine/c2n",
        ) => Reply::text(StatusCode::NOT_IMPLEMENTED, "Not implemented yet"),
        (_, "/machine/register" | "/machine/map") => {
            Reply { status: StatusCode::METHOD_NOT_ALLOWED, ..Reply::empty() }
        }
        _ => Reply::text(StatusCode::NOT_FOUND, "404 page not found"),
    };
    let reply = if head.method == Method::HEAD { Reply { body: Bytes::new(), ..reply } } else { reply };
    Ok(respond(&mut answer, reply)?)
}

async fn register(shared: &Shared, machine_key: MachinePublic, body: &[u8]) -> Reply {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Versioned {
        #[serde(default)]
        version: u32,
    }
    let version = serde_json::from_slice::<Versioned>(body).map_or(0, |request| request.version);
    if version < wire::MIN_VERSION {
        return Reply::unsupported_version(version);
    }
    let response = register::handle(shared, machine_key, body).await;
    match serde_json::to_vec(&response) {
        Ok(json) => Reply {
            status: StatusCode::OK,
            kind: "application/json; charset=utf-8",
            body: json.into(),
            retry_after: None,
        },
        Err(error) => Reply::text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

async fn collect(mut body: RecvStream) -> Result<Vec<u8>, Reply> {
    let broken = |error: h2::Error| Reply::text(StatusCode::BAD_REQUEST, &error.to_string());
    let mut collected = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.map_err(broken)?;
        if collected.len() + data.len() > BODY_LIMIT {
            return Err(Reply::text(StatusCode::INTERNAL_SERVER_ERROR, "internal server error"));
        }
        collected.extend_from_slice(&data);
        body.flow_control().release_capacity(data.len()).map_err(broken)?;
    }
    Ok(collected)
}

/// A whole answer to a request that is no stream.
pub(crate) struct Reply {
    status: StatusCode,
    kind: &'static str,
    body: Bytes,
    retry_after: Option<String>,
}

impl Reply {
    pub(crate) fn empty() -> Self {
        Self { status: StatusCode::OK, kind: "", body: Bytes::new(), retry_after: None }
    }

    pub(crate) fn text(status: StatusCode, message: &str) -> Self {
        let body = format!("{message}\n").into();
        Self { status, kind: "text/plain; charset=utf-8", body, retry_after: None }
    }

    pub(crate) fn unsupported_version(version: u32) -> Self {
        Self::text(StatusCode::BAD_REQUEST, &format!("unsupported client version:  ({version})"))
    }
}

impl From<Refusal> for Reply {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.status.canonical_reason().unwrap_or("fault");
        Self { retry_after: refusal.retry_after, ..Self::text(refusal.status, message) }
    }
}

/// Sends a whole answer. Small ones fit any window; h2 holds the rest until the client reads.
pub(crate) fn respond(answer: &mut SendResponse<Bytes>, reply: Reply) -> Result<(), h2::Error> {
    let mut response = Response::new(());
    *response.status_mut() = reply.status;
    if !reply.kind.is_empty() {
        response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(reply.kind));
    }
    if let Some(value) = reply.retry_after.and_then(|text| text.parse().ok()) {
        response.headers_mut().insert(header::RETRY_AFTER, value);
    }
    if reply.body.is_empty() {
        answer.send_response(response, true)?;
        return Ok(());
    }
    answer.send_response(response, false)?.send_data(reply.body, true)
}
