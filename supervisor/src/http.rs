//! `/metrics`, `/healthz`, `/readyz` and, on the loopback listener alone, a page and `/v1/pods`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::future::join_all;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::engine::within;
use crate::kube::Cluster;
use crate::metrics::{Counters, scrape};
use crate::page;
use crate::shared::Shared;
use crate::table::{Handle, PodReport};

/// Callers at a time; more wait in the listener.
const MAX_CONNECTIONS: usize = 64;
/// How long a caller may take to send a request's head, also its next one.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// Largest head, bytes.
const MAX_HEAD: usize = 16 << 10;
/// A caller is asked to come again after this, so that one that reads nothing holds no place.
const LIFETIME: Duration = Duration::from_secs(120);
/// And has so long to read its last answer.
const LAST_ANSWER: Duration = Duration::from_secs(10);
/// After an accept error (descriptors exhausted), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long an engine may take to list its peers.
const PEERS_WITHIN: Duration = Duration::from_secs(1);

/// What the handlers need.
#[derive(Debug, Clone)]
pub struct Web {
    /// The table.
    pub table: Handle,
    /// The supervisor's counters.
    pub counters: Counters,
    /// True from the moment that CNI calls are served.
    pub ready: Arc<AtomicBool>,
    /// What is made once for all who ask at a time.
    pub answers: Arc<Answers>,
    /// The API server, where one is asked.
    pub cluster: Option<Cluster>,
}

/// The answers that cost a listing of the table, and the engines a call each.
#[derive(Debug, Default)]
pub struct Answers {
    metrics: Shared<Result<Bytes, String>>,
    pods: Shared<Bytes>,
    /// Without what the engines have to be asked for.
    known: Shared<Bytes>,
    /// What the page shows.
    live: Shared<Bytes>,
}

/// Metrics and health, for `metrics_listen`.
pub fn metrics_routes(web: Web) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        // Alive means that this answers; a pod's trouble is no reason to restart the supervisor.
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .with_state(web)
}

/// Everything, for `http_listen`, to who calls it as somebody on the node does: see [`page::refusal`].
pub fn all_routes(web: Web) -> Router {
    Router::new()
        .route("/", get(async || page::page()))
        .route("/v1/live", get(live))
        .route("/v1/pods", get(pods))
        .route("/v1/kubernetes", get(kubernetes))
        .with_state(web.clone())
        .merge(metrics_routes(web))
        .layer(middleware::from_fn(from_here))
}

async fn from_here(request: Request, next: Next) -> Response {
    match page::refusal(request.headers()) {
        Some(refusal) => refusal,
        None => next.run(request).await,
    }
}

/// Serves `routes`. Whoever is slow, silent or many costs its own connection and no more.
pub async fn serve(listener: TcpListener, routes: Router) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(MAX_HEAD);
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept on an HTTP listener failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(routes.clone());
        let connection = http.serve_connection(TokioIo::new(stream), service);
        tokio::spawn(async move {
            let mut connection = std::pin::pin!(connection);
            // What a caller does wrong is its own to read.
            if tokio::time::timeout(LIFETIME, connection.as_mut()).await.is_err() {
                connection.as_mut().graceful_shutdown();
                let _ = tokio::time::timeout(LAST_ANSWER, connection).await;
            }
            drop(place);
        });
    }
}

async fn metrics(State(web): State<Web>) -> Response {
    let made = async {
        let listing = web.table.list().await;
        scrape(&web.counters, listing).await.map(Bytes::from).map_err(|e| e.to_string())
    };
    match &*web.answers.metrics.get(made).await {
        Ok(text) => {
            let kind = "text/plain; version=0.0.4; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text.clone()).into_response()
        }
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")).into_response(),
    }
}

async fn readyz(State(web): State<Web>) -> Response {
    if web.ready.load(Ordering::Relaxed) {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response()
    }
}

/// `?peers=false` leaves out what the engines have to be asked for.
#[derive(Debug, Deserialize)]
struct PodsQuery {
    peers: Option<bool>,
}

async fn pods(State(web): State<Web>, Query(query): Query<PodsQuery>) -> Response {
    let text = |pods: &[PodReport]| Bytes::from(serde_json::to_vec(pods).unwrap_or_default());
    let answers = &web.answers;
    let answer = if query.peers == Some(false) {
        answers.known.get(async { text(&web.table.list().await.pods) }).await
    } else {
        answers.pods.get(async { text(&with_peers(&web.table).await) }).await
    };
    ([(header::CONTENT_TYPE, "application/json")], (*answer).clone()).into_response()
}

async fn live(State(web): State<Web>) -> Response {
    let answer = web.answers.live.get(async { Bytes::from(page::live(&web.table).await) }).await;
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (headers, (*answer).clone()).into_response()
}

async fn kubernetes(State(web): State<Web>) -> Response {
    axum::Json(web.cluster.map(|cluster| cluster.health()).unwrap_or_default()).into_response()
}

async fn with_peers(table: &Handle) -> Vec<PodReport> {
    let listing = table.list().await;
    let peers = join_all(listing.clients.into_iter().map(|client| async move {
        match client {
            Some(client) => client.peers(within(PEERS_WITHIN)).await.unwrap_or_default(),
            None => Vec::new(),
        }
    }))
    .await;
    let mut pods = listing.pods;
    for (pod, peers) in pods.iter_mut().zip(peers) {
        pod.peers = peers;
    }
    pods
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use tower::ServiceExt as _;

    use super::*;
    use crate::table::Unanswered;

    #[tokio::test]
    async fn a_page_from_elsewhere_reads_nothing_of_the_node() {
        let (table, _questions) = Unanswered::new();
        let web = Web {
            table,
            counters: Counters::new().unwrap(),
            ready: Arc::new(AtomicBool::new(true)),
            answers: Arc::default(),
            cluster: None,
        };
        let asked = async |routes: Router, path: &str, host: &str, origin: Option<&str>| {
            let mut request = Request::get(path).header(header::HOST, host);
            if let Some(origin) = origin {
                request = request.header(header::ORIGIN, origin);
            }
            routes.oneshot(request.body(Body::empty()).unwrap()).await.unwrap().status()
        };
        for path in
            ["/", "/v1/live", "/v1/pods", "/v1/pods?peers=false", "/v1/kubernetes", "/metrics", "/readyz"]
        {
            for (host, origin) in [
                ("evil.example:9465", None),
                ("localhost.evil.example", None),
                ("localhost:9465", Some("http://evil.example")),
                ("localhost:9465", Some("null")),
            ] {
                let status = asked(all_routes(web.clone()), path, host, origin).await;
                assert_eq!(status, StatusCode::FORBIDDEN, "{path} {host} {origin:?}");
            }
        }
        for (path, origin) in
            [("/", None), ("/v1/kubernetes", Some("http://localhost:9465")), ("/readyz", None)]
        {
            let status = asked(all_routes(web.clone()), path, "localhost:9465", origin).await;
            assert_eq!(status, StatusCode::OK, "{path}");
        }
        // Prometheus calls the node by any name, and reads figures alone.
        assert_eq!(asked(metrics_routes(web), "/readyz", "node-1.example:9466", None).await, StatusCode::OK);
    }
}
