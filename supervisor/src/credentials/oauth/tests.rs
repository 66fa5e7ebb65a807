use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::config::SecretSource;
use crate::credentials::Roots;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, post};
use axum::{Form, Json};
use podtether_proto::secret::SecretString;
use reqwest::StatusCode;
use reqwest::header::{AUTHORIZATION, RETRY_AFTER};
use serde_json::{Value, json};
use std::collections::HashMap;

/// What the API should do, and what it saw.
#[derive(Default)]
struct Script {
    tokens: usize,
    keys: Vec<Value>,
    /// Answers that come before the good ones: status and Retry-After.
    faults: Vec<(u16, Option<&'static str>)>,
    revoked: Option<String>,
    deleted: Vec<String>,
    times: Vec<Instant>,
}

type Shared = Arc<Mutex<Script>>;

fn fault(script: &Shared) -> Option<Response> {
    let mut script = script.lock().unwrap();
    script.times.push(Instant::now());
    if script.faults.is_empty() {
        return None;
    }
    let (status, after) = script.faults.remove(0);
    let mut response = (StatusCode::from_u16(status).unwrap(), r#"{"message":"as told"}"#).into_response();
    if let Some(after) = after {
        response.headers_mut().insert(RETRY_AFTER, after.parse().unwrap());
    }
    Some(response)
}

fn authorized(script: &Shared, headers: &HeaderMap) -> Option<Response> {
    let revoked = script.lock().unwrap().revoked.clone();
    let token = headers[AUTHORIZATION].to_str().unwrap().strip_prefix("Bearer ").unwrap().to_owned();
    (revoked == Some(token)).then(|| StatusCode::UNAUTHORIZED.into_response())
}

async fn token(State(script): State<Shared>, Form(form): Form<HashMap<String, String>>) -> Response {
    if form["client_secret"] != "right" || form["grant_type"] != "client_credentials" {
        return (StatusCode::UNAUTHORIZED, r#"{"message":"API token invalid"}"#).into_response();
    }
    let mut script = script.lock().unwrap();
    script.tokens += 1;
    let token = format!("t{}", script.tokens);
    Json(json!({"access_token": token, "expires_in": 3600, "token_type": "Bearer"})).into_response()
}

async fn keys(State(script): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    if let Some(response) = authorized(&script, &headers).or_else(|| fault(&script)) {
        return response;
    }
    let mut script = script.lock().unwrap();
    script.keys.push(body);
    let n = script.keys.len();
    Json(json!({"id": format!("k{n}"), "key": format!("tskey-auth-k{n}"), "created": "", "expires": ""}))
        .into_response()
}

async fn devices() -> Json<Value> {
    Json(json!({"devices": [
        {"id": "1", "nodeId": "nA", "nodeKey": "nodekey:aa", "hostname": "x", "addresses": null},
        {"id": "2", "nodeId": "nB", "nodeKey": "nodekey:bb"},
    ]}))
}

async fn gone(State(script): State<Shared>, Path(id): Path<String>) -> StatusCode {
    let known = ["1", "2", "k1"].contains(&id.as_str());
    script.lock().unwrap().deleted.push(id);
    if known { StatusCode::OK } else { StatusCode::NOT_FOUND }
}

async fn api(secret: &str) -> (Api, Shared) {
    let script = Shared::default();
    let routes = Router::new()
        .route("/api/v2/oauth/token", post(token))
        .route("/api/v2/tailnet/-/keys", post(keys))
        .route("/api/v2/tailnet/-/keys/{id}", delete(gone))
        .route("/api/v2/tailnet/-/devices", axum::routing::get(devices))
        .route("/api/v2/device/{id}", delete(gone))
        .with_state(Arc::clone(&script));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let api_url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (at(api_url, secret), script)
}

fn at(api_url: String, secret: &str) -> Api {
    let value = |text: &str| SecretSource::Value(SecretString::new(text.to_owned()));
    let client = Client { id: value("id"), secret: value(secret) };
    let http = Http::new(Arc::new(Roots::new(None).unwrap())).unwrap();
    Api::new(http, api_url, client, Duration::from_secs(300))
}

impl Api {
    async fn mint_for(&self, hostname: &str, deadline: Instant) -> Result<Key, CredentialError> {
        self.mint(Wish { hostname, tags: &["tag:k8s".into()], ephemeral: true }, deadline).await
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

#[tokio::test]
async fn keys_are_single_use_tagged_and_share_one_token() {
    let (api, script) = api("right").await;
    let minted = futures_util::future::join_all((0..20).map(|n| {
        let api = api.clone();
        async move { api.mint_for(&format!("pod-{n}"), soon()).await.unwrap() }
    }))
    .await;
    let script = script.lock().unwrap();
    assert_eq!(script.tokens, 1, "the token is got once for all who wait");
    assert_eq!((minted.len(), script.keys.len()), (20, 20));
    let create = &script.keys[0]["capabilities"]["devices"]["create"];
    assert_eq!(create["reusable"], false);
    assert_eq!(create["ephemeral"], true);
    assert_eq!(create["preauthorized"], true);
    assert_eq!(create["tags"], json!(["tag:k8s"]));
    assert_eq!(script.keys[0]["expirySeconds"], 300);
    assert!(!format!("{:?}", minted[0]).contains("tskey"));
}

#[tokio::test]
async fn a_wrong_secret_is_refused_at_once_and_named() {
    let (api, _) = api("wrong").await;
    let start = Instant::now();
    let Err(CredentialError::Refused(text)) = api.mint_for("p", soon()).await else { panic!() };
    assert!(text.contains("OAuth client id and secret") && text.contains("API token invalid"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn retry_after_is_obeyed_and_server_errors_are_tried_again() {
    let (api, script) = api("right").await;
    script.lock().unwrap().faults = vec![(429, Some("1")), (500, None)];
    api.mint_for("p", soon()).await.unwrap();
    let script = script.lock().unwrap();
    assert_eq!(script.times.len(), 3);
    assert!(script.times[1] - script.times[0] >= Duration::from_secs(1));
}

#[tokio::test]
async fn a_pause_longer_than_the_deadline_fails_at_once_for_everyone() {
    let (api, script) = api("right").await;
    script.lock().unwrap().faults = vec![(429, Some("60"))];
    let start = Instant::now();
    let deadline = start + Duration::from_secs(5);
    let Err(CredentialError::Temporary(text)) = api.mint_for("p", deadline).await else { panic!() };
    assert!(text.contains("rate limited"), "{text}");
    let Err(CredentialError::Temporary(text)) = api.mint_for("q", deadline).await else { panic!() };
    assert!(text.contains("asked to wait"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(4));
    assert_eq!(script.lock().unwrap().times.len(), 1, "nobody asks while the pause lasts");
}

#[tokio::test]
async fn a_revoked_token_is_renewed_once() {
    let (api, script) = api("right").await;
    api.mint_for("p", soon()).await.unwrap();
    script.lock().unwrap().revoked = Some("t1".into());
    api.mint_for("p", soon()).await.unwrap();
    assert_eq!(script.lock().unwrap().tokens, 2);
}

#[tokio::test]
async fn refused_tags_are_told_as_they_are() {
    let (api, script) = api("right").await;
    script.lock().unwrap().faults = vec![(400, None)];
    let Err(CredentialError::Refused(text)) = api.mint_for("p", soon()).await else { panic!() };
    assert_eq!(text, "cannot mint an auth key: the API answered 400 Bad Request: as told");
}

#[tokio::test]
async fn devices_are_found_by_key_or_id_and_absent_ones_are_fine() {
    let (api, script) = api("right").await;
    let device = |key: &str, id: &str| Device {
        node_key: key.into(),
        machine_key: "mkey:none".into(),
        stable_id: id.into(),
    };
    api.delete_device(&device("nodekey:bb", ""), soon()).await.unwrap();
    api.delete_device(&device("nodekey:none", "nA"), soon()).await.unwrap();
    api.delete_device(&device("nodekey:none", "k1"), soon()).await.unwrap();
    api.delete_device(&device("nodekey:none", ""), soon()).await.unwrap();
    api.delete_key("k1", soon()).await.unwrap();
    api.delete_key("used-and-gone", soon()).await.unwrap();
    assert_eq!(script.lock().unwrap().deleted, ["2", "nA", "1", "k1", "k1", "used-and-gone"]);
    assert!(api.delete_key("../x", soon()).await.is_err(), "an id never becomes a path");
}

#[tokio::test]
async fn nobody_there_is_a_passing_fault_inside_the_deadline() {
    let start = Instant::now();
    let api = at("http://127.0.0.1:9".into(), "right");
    let error = api.mint_for("p", start + Duration::from_millis(600)).await.unwrap_err();
    assert!(matches!(error, CredentialError::Temporary(_)), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2));
}
