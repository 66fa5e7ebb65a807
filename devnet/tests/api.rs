//! The admin API and the faults that hit it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use podtether_devnet::fault::{Fault, Target};
use podtether_devnet::{AuthKeyOptions, Devnet};
use serde_json::{Value, json};
use support::{Machine, Response, devnet, http};

const KEYS: &str = "/api/v2/tailnet/-/keys";
const DEVICES: &str = "/api/v2/tailnet/-/devices?fields=all";

async fn call(devnet: &Devnet, token: &str, method: &str, path: &str, body: &Value) -> Response {
    let authorization = format!("Bearer {token}");
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let headers = [("Authorization", authorization.as_str()), ("Content-Type", "application/json")];
    http(devnet.http_addresses()[0], method, path, &headers, &body).await.unwrap()
}

async fn token_answer(devnet: &Devnet, form: &str) -> Response {
    let kind = [("Content-Type", "application/x-www-form-urlencoded")];
    http(devnet.http_addresses()[0], "POST", "/api/v2/oauth/token", &kind, form).await.unwrap()
}

async fn token(devnet: &Devnet) -> String {
    let (id, secret) = devnet.oauth_client();
    let form = format!("client_id={id}&client_secret={secret}&grant_type=client_credentials");
    let answer = token_answer(devnet, &form).await.json();
    assert_eq!(answer["token_type"], "Bearer");
    assert_eq!(answer["expires_in"], 3600);
    answer["access_token"].as_str().unwrap().to_owned()
}

fn order(tags: &[&str]) -> Value {
    json!({
        "capabilities": {"devices": {"create": {
            "reusable": false, "ephemeral": true, "preauthorized": true, "tags": tags,
        }}},
        "expirySeconds": 300, "description": "a pod",
    })
}

#[tokio::test]
async fn a_minted_key_registers_one_device_which_can_be_deleted() {
    let devnet = devnet(|_| {}).await;
    let token = token(&devnet).await;
    let made = call(&devnet, &token, "POST", KEYS, &order(&["tag:k8s-pod"])).await;
    assert_eq!(made.status, 200);
    let key = made.json();
    assert!(key["key"].as_str().unwrap().starts_with("tskey-auth-"));
    assert_eq!(key["expirySeconds"], 300);
    assert_eq!(key["capabilities"]["devices"]["create"]["ephemeral"], true);

    let machine = Machine::new("pod");
    let mut control = machine.connect(&devnet).await;
    let answer = control.register(&machine.register_request(key["key"].as_str())).await;
    assert_eq!(answer["Error"], "");
    let mut stream = control.map(&machine.map_request()).await.unwrap();
    stream.next().await.unwrap();

    let devices = call(&devnet, &token, "GET", DEVICES, &Value::Null).await.json();
    let device = &devices["devices"][0];
    assert_eq!(device["name"], "pod.tailnet.test");
    assert_eq!(device["addresses"], json!(["100.64.0.1", "fd7a:115c:a1e0::1"]));
    assert_eq!(device["tags"], json!(["tag:k8s-pod"]));
    assert_eq!(device["nodeKey"], json!(machine.node.public()));
    assert_eq!(device["isEphemeral"], true);

    let path = format!("/api/v2/device/{}", device["nodeId"].as_str().unwrap());
    assert_eq!(call(&devnet, &token, "GET", &path, &Value::Null).await.json()["id"], "1");
    let deleted = call(&devnet, &token, "DELETE", &path, &Value::Null).await;
    assert_eq!((deleted.status.as_u16(), deleted.json()), (200, json!({})));
    assert!(stream.news().await.is_none(), "its stream ends");
    assert_eq!(control.map(&machine.map_request()).await.err().unwrap().0, 404);
    assert_eq!(call(&devnet, &token, "DELETE", &path, &Value::Null).await.status, 404);
}

#[tokio::test]
async fn a_deleted_key_is_revoked() {
    let devnet = devnet(|_| {}).await;
    let token = token(&devnet).await;
    let key = call(&devnet, &token, "POST", KEYS, &order(&["tag:k8s-pod"])).await.json();
    let path = format!("{KEYS}/{}", key["id"].as_str().unwrap());
    assert_eq!(call(&devnet, &token, "DELETE", &path, &Value::Null).await.status, 200);
    let stored = call(&devnet, &token, "GET", &path, &Value::Null).await.json();
    assert_eq!((&stored["invalid"], stored.get("key")), (&json!(true), None));
    assert_eq!(call(&devnet, &token, "DELETE", &path, &Value::Null).await.status, 404);
    let machine = Machine::new("a");
    let request = machine.register_request(key["key"].as_str());
    assert_eq!(machine.connect(&devnet).await.register(&request).await["Error"], "authkey revoked");
}

#[tokio::test]
async fn what_is_not_allowed_says_so() {
    let devnet = devnet(|_| {}).await;
    let good = token(&devnet).await;
    let cases = [
        ("wrong", "GET", DEVICES, Value::Null, 401, "API token invalid"),
        (&good, "POST", KEYS, order(&[]), 400, "tailnet-owned auth key must have tags set"),
        (&good, "POST", KEYS, order(&["tag:x"]), 403, "requested tags [tag:x] are invalid or not permitted"),
        (&good, "POST", KEYS, json!({}), 400, "missing field `capabilities`"),
        (&good, "GET", "/api/v2/tailnet/other/devices", Value::Null, 404, "tailnet not found"),
        (&good, "DELETE", "/api/v2/device/77", Value::Null, 404, "device not found"),
        (&good, "PATCH", "/api/v2/device/77", Value::Null, 404, "page not found"),
    ];
    for (token, method, path, body, status, message) in cases {
        let answer = call(&devnet, token, method, path, &body).await;
        let text = answer.json()["message"].as_str().unwrap().to_owned();
        assert!(answer.status == status && text.starts_with(message), "{method} {path}: {status} {text}");
    }
    let (id, _) = devnet.oauth_client();
    for (form, status, error) in [
        (format!("client_id={id}&client_secret=wrong"), 401, "invalid_client"),
        ("client_id=x".into(), 401, "invalid_client"),
        ("client_secret=x&grant_type=password".into(), 400, "unsupported_grant_type"),
    ] {
        let answer = token_answer(&devnet, &form).await;
        assert_eq!((answer.status.as_u16(), answer.json()["error"].as_str().unwrap()), (status, error));
    }
    devnet.revoke_tokens();
    assert_eq!(call(&devnet, &good, "GET", DEVICES, &Value::Null).await.status, 401);
}

#[tokio::test]
async fn requests_fail_as_ordered() {
    let devnet = devnet(|_| {}).await;
    let address = devnet.http_addresses()[0];
    let token = token(&devnet).await;
    devnet.set_fault(Target::Api, Fault::rate_limit(7).times(1));
    let limited = call(&devnet, &token, "POST", KEYS, &order(&["tag:k8s-pod"])).await;
    assert_eq!((limited.status.as_u16(), &limited.headers["retry-after"]), (429, &"7".parse().unwrap()));
    assert_eq!(call(&devnet, &token, "POST", KEYS, &order(&["tag:k8s-pod"])).await.status, 200);

    let order = r#"{"target": "oauth-token", "fault": {"status": 500}}"#;
    assert_eq!(http(address, "POST", "/debug/fault", &[], order).await.unwrap().status, 200);
    assert_eq!(token_answer(&devnet, "client_secret=x").await.status, 500);
    http(address, "POST", "/debug/fault", &[], r#"{"target": "oauth-token"}"#).await.unwrap();
    assert_eq!(token_answer(&devnet, "client_secret=x").await.status, 401);
    assert_eq!(http(address, "POST", "/debug/fault", &[], r#"{"targets": 1}"#).await.unwrap().status, 400);

    let machine = Machine::new("a");
    let mut control = machine.connect(&devnet).await;
    devnet.set_fault(Target::Register, Fault::rate_limit(3).times(1));
    let body = machine.register_request(None).to_string();
    let limited = control.request(http::Method::POST, "/machine/register", body.as_bytes()).await;
    assert_eq!((limited.status.as_u16(), &limited.headers["retry-after"]), (429, &"3".parse().unwrap()));

    devnet.set_fault(Target::Key, Fault::delay(Duration::from_millis(50)));
    let start = std::time::Instant::now();
    http(address, "GET", "/key?v=113", &[], "").await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(50));
    devnet.set_fault(Target::Key, Fault::hang());
    let hung = tokio::time::timeout(Duration::from_millis(100), http(address, "GET", "/key?v=113", &[], ""));
    assert!(hung.await.is_err());
    devnet.clear_faults();
    assert!(http(address, "GET", "/key?v=113", &[], "").await.is_some());
}

#[tokio::test]
async fn connections_are_cut_refused_and_silenced_as_ordered() {
    let devnet = devnet(|config| config.keep_alive = Duration::from_millis(30)).await;
    let address = devnet.http_addresses()[0];
    let machine = Machine::new("a");
    let (mut control, mut stream) = machine.join(&devnet, AuthKeyOptions::default()).await;
    stream.next().await.unwrap();
    devnet.set_stalled(true);
    // One message may be under way.
    let silence = async { while stream.next().await.is_some() {} };
    assert!(
        tokio::time::timeout(Duration::from_millis(300), silence).await.is_err(),
        "the stream stays open"
    );
    assert_eq!(control.update(&machine.lite_update("192.0.2.1:9")).await.status, 200);
    devnet.set_stalled(false);
    assert!(stream.next().await.is_some());

    devnet.drop_connections();
    while stream.next().await.is_some() {}
    let mut control = machine.connect(&devnet).await;
    assert!(control.map(&machine.map_request()).await.is_ok(), "new connections work at once");

    devnet.set_refusing(true);
    assert!(devnet.wait_for(support::PATIENCE, |nodes| !nodes[0].streaming).await);
    while http(address, "GET", "/health", &[], "").await.is_some() {
        tokio::task::yield_now().await;
    }
    let refused = tokio::net::TcpStream::connect(address).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    devnet.set_refusing(false);
    while http(address, "GET", "/health", &[], "").await.is_none() {
        tokio::task::yield_now().await;
    }
    devnet.stop().await;
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}
