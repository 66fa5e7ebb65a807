//! The outer HTTP/1.1 server: `/key`, the upgrade to Noise, the admin API, and what else the real
//! servers answer without it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use base64::Engine as _;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::api;
use crate::control::crowd::Crowd;
use crate::control::wire::ServerKeys;
use crate::control::{noise_server, register};
use crate::fault::{Fault, Refusal, Target};
use crate::shared::Shared;

/// Clients older than this know no Noise.
const NOISE_VERSION: u32 = 39;
const UPGRADE: &str = "tailscale-control-protocol";
const HANDSHAKE: &str = "x-tailscale-handshake";
const BODY_LIMIT: usize = 64 << 10;

/// Serves one connection until it ends or was upgraded.
pub(crate) async fn serve<S>(shared: Arc<Shared>, io: S, token: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(move |request| {
        let (shared, token) = (shared.clone(), token.clone());
        async move { Ok::<_, Infallible>(route(shared, token, request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(75))
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "http connection ended");
    }
}

async fn route(shared: Arc<Shared>, token: CancellationToken, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let result = match (request.method(), path.as_str()) {
        (&Method::GET, "/key") => key(&shared, request.uri().query()).await,
        (_, "/ts2021") => upgrade(shared, token, request).await,
        (&Method::HEAD, "/machine/ping-response") => Ok(ping_response(&shared, request.uri().query())),
        (&Method::GET, "/health") => Ok(json(StatusCode::OK, &serde_json::json!({"status": "pass"}))),
        (&Method::GET, "/generate_204") => Ok(empty(StatusCode::NO_CONTENT)),
        (&Method::POST, "/verify") => verify(&shared, request).await,
        (&Method::POST, "/debug/fault") => debug_fault(&shared, request).await,
        (method, path) if path.starts_with("/register/") => Ok(login(&shared, method, path)),
        (_, path) if path.starts_with("/api/v2/") => {
            return api::handle(&shared, request).await;
        }
        (_, path) if path.starts_with("/api/v1/") && shared.config.headscale.is_some() => {
            return api::headscale::handle(&shared, request).await;
        }
        _ => Ok(text(StatusCode::NOT_FOUND, "404 page not found")),
    };
    result.unwrap_or_else(|refusal| refused(&refusal))
}

async fn key(shared: &Shared, query: Option<&str>) -> Result<Response<Body>, Refusal> {
    shared.faults.pass(Target::Key).await?;
    let Some(version) = parameter(query, "v").filter(|version| !version.is_empty()) else {
        return Ok(text(StatusCode::BAD_REQUEST, "capability version must be set"));
    };
    let Ok(version) = version.parse::<u32>() else {
        return Ok(text(StatusCode::BAD_REQUEST, "invalid capability version"));
    };
    if version < NOISE_VERSION {
        return Ok(empty(StatusCode::OK));
    }
    let keys = ServerKeys {
        legacy_public_key: podtether_core::key::MachinePublic::default(),
        public_key: shared.noise_key.public(),
    };
    Ok(json(StatusCode::OK, &keys))
}

async fn upgrade(
    shared: Arc<Shared>,
    token: CancellationToken,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    shared.faults.pass(Target::Upgrade).await?;
    let header = |headers: &HeaderMap, name| {
        headers.get(name).and_then(|value| value.to_str().ok().map(str::to_owned))
    };
    let Some(next) = header(request.headers(), "upgrade") else {
        return Ok(text(StatusCode::INTERNAL_SERVER_ERROR, "Internal error"));
    };
    if !next.eq_ignore_ascii_case(UPGRADE) {
        return Ok(text(StatusCode::BAD_REQUEST, "unknown next protocol"));
    }
    if request.method() != Method::POST {
        return Ok(text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed"));
    }
    let Some(handshake) = header(request.headers(), HANDSHAKE) else {
        return Ok(text(StatusCode::BAD_REQUEST, "missing Tailscale handshake header"));
    };
    let Ok(initiation) = base64::engine::general_purpose::STANDARD.decode(handshake) else {
        return Ok(text(StatusCode::BAD_REQUEST, "invalid tailscale handshake header"));
    };
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(token.run_until_cancelled_owned(async move {
        match upgraded.await {
            Ok(io) => {
                if let Err(error) = noise_server::serve(&shared, TokioIo::new(io), &initiation).await {
                    tracing::debug!(%error, "noise connection ended");
                }
            }
            Err(error) => tracing::debug!(%error, "upgrade failed"),
        }
    }));
    let mut response = empty(StatusCode::SWITCHING_PROTOCOLS);
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, header::HeaderValue::from_static(UPGRADE));
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("upgrade"));
    Ok(response)
}

/// The page behind a login's URL: a person's button, or a test's POST, completes the login.
fn login(shared: &Shared, method: &Method, path: &str) -> Response<Body> {
    let id = path.trim_start_matches("/register/");
    let waits = shared.with_state(|state| state.pending.get(id).is_some_and(|login| !login.approved));
    match *method {
        Method::GET if waits => with_type(
            StatusCode::OK,
            "text/html; charset=utf-8",
            "<!doctype html><title>devnet</title><form method=post><button>Let the device in</button></form>\n".into(),
        ),
        Method::POST if waits => {
            let now = jiff::Timestamp::now();
            match shared.with_state(|state| register::approve(&shared.config, state, id, now)) {
                Ok(()) => text(StatusCode::OK, "The device is in."),
                Err(reason) => text(StatusCode::CONFLICT, &reason),
            }
        }
        Method::GET | Method::POST => text(StatusCode::NOT_FOUND, "no such login, or it is done"),
        _ => empty(StatusCode::METHOD_NOT_ALLOWED),
    }
}

fn ping_response(shared: &Shared, query: Option<&str>) -> Response<Body> {
    match parameter(query, "id") {
        None => text(StatusCode::BAD_REQUEST, "missing ping ID"),
        Some(id) if shared.complete_ping(id, &[]) => empty(StatusCode::OK),
        Some(_) => text(StatusCode::NOT_FOUND, "unknown or expired ping"),
    }
}

/// Lets a stock relay ask whether a client belongs to the tailnet.
async fn verify(shared: &Shared, request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Admission {
        node_public: podtether_core::key::NodePublic,
    }
    let admission = match body(request).await {
        Ok(body) => serde_json::from_slice::<Admission>(&body).ok(),
        Err(response) => return Ok(response),
    };
    Ok(match admission {
        None => text(StatusCode::BAD_REQUEST, "Bad Request: invalid JSON"),
        Some(admission) => {
            let allow = shared.with_state(|state| state.node_by_key(&admission.node_public).is_some());
            json(StatusCode::OK, &serde_json::json!({ "Allow": allow }))
        }
    })
}

/// `{"target": "register", "fault": {"status": 429, "retry_after": "3"}}` sets a fault, and without
/// `fault` clears it. `{"stall": true}` silences the map streams, `{"expire": 3}` lets a node's key
/// expire, `{"crowd": {"peers": 10000, "deltas_per_second": 1000}}` makes the tailnet look large,
/// `{"cut": true}` cuts every connection, this one too.
async fn debug_fault(shared: &Shared, request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Order {
        target: Option<Target>,
        fault: Option<Fault>,
        stall: Option<bool>,
        expire: Option<u64>,
        crowd: Option<Crowd>,
        #[serde(default)]
        cut: bool,
    }
    let order = match body(request).await {
        Ok(body) => serde_json::from_slice::<Order>(&body),
        Err(response) => return Ok(response),
    };
    Ok(match order {
        Err(error) => text(StatusCode::BAD_REQUEST, &error.to_string()),
        Ok(order) => {
            match (order.target, order.fault) {
                (Some(target), Some(fault)) => shared.faults.set(target, fault),
                (Some(target), None) => shared.faults.clear(target),
                (None, _) => {}
            }
            if let Some(stall) = order.stall {
                shared.stalled.send_replace(stall);
            }
            if let Some(crowd) = order.crowd {
                shared.crowd.send_replace(crowd);
            }
            if let Some(node) = order.expire {
                let now = jiff::Timestamp::now();
                shared.with_state(|state| state.set_expiry(node, Some(now), now));
            }
            if order.cut {
                shared.gate.send_modify(|gate| gate.cut += 1);
            }
            empty(StatusCode::OK)
        }
    })
}

/// A request's body, bounded; the error is to be answered.
pub(crate) async fn body(request: Request<Incoming>) -> Result<bytes::Bytes, Response<Body>> {
    axum::body::to_bytes(Body::new(request.into_body()), BODY_LIMIT)
        .await
        .map_err(|_| text(StatusCode::PAYLOAD_TOO_LARGE, "request body too large"))
}

/// The value of one query parameter; devnet's own have no escapes.
pub(crate) fn parameter<'a>(query: Option<&'a str>, name: &str) -> Option<&'a str> {
    query?
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

pub(crate) fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

pub(crate) fn text(status: StatusCode, message: &str) -> Response<Body> {
    // Go's http.Error ends its text with a newline, and clients show it.
    with_type(status, "text/plain; charset=utf-8", format!("{message}\n").into())
}

pub(crate) fn json(status: StatusCode, value: &impl serde::Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(body) => with_type(status, "application/json", body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn with_type(status: StatusCode, kind: &'static str, body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

fn refused(refusal: &Refusal) -> Response<Body> {
    let mut response = text(refusal.status, refusal.status.canonical_reason().unwrap_or("fault"));
    add_retry_after(response.headers_mut(), refusal);
    response
}

/// Adds the header that a 429 asks with.
pub(crate) fn add_retry_after(headers: &mut HeaderMap, refusal: &Refusal) {
    if let Some(value) = refusal.retry_after.as_deref().and_then(|text| text.parse().ok()) {
        headers.insert(header::RETRY_AFTER, value);
    }
}
