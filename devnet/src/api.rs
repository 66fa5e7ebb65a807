//! The admin API, with the hosted service's paths and JSON: OAuth token, auth keys, devices. Headscale's
//! second API is the same with an API key and sentences of its own; its first is in [`headscale`].

pub(crate) mod headscale;

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use axum::body::Body;
use base64::Engine as _;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::control::state::{AuthKey, AuthKeyOptions, Node, State, text};
use crate::fault::{Refusal, Target};
use crate::http_server::{self, add_retry_after, body, parameter};
use crate::random;
use crate::shared::Shared;
use crate::sync::lock;

const NO_PAGE: &str = "page not found";
const MAX_TOKENS: usize = 1024;
const MAX_DESCRIPTION: usize = 50;
const DEFAULT_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);

/// Access tokens in use.
#[derive(Default)]
pub(crate) struct Tokens {
    valid_until: Mutex<HashMap<String, Instant>>,
    /// Headscale's API key, empty when there is none.
    api_key: Mutex<String>,
}

impl Tokens {
    pub(crate) fn new(api_key: String) -> Self {
        Self { valid_until: Mutex::default(), api_key: Mutex::new(api_key) }
    }

    pub(crate) fn api_key(&self) -> String {
        lock(&self.api_key).clone()
    }

    pub(crate) fn set_api_key(&self, key: &str) {
        key.clone_into(&mut lock(&self.api_key));
    }

    fn is_api_key(&self, token: &str) -> bool {
        let key = lock(&self.api_key);
        !key.is_empty() && *key == token
    }

    fn mint(&self, lifetime: Duration) -> String {
        let token = format!("tskey-api-{}", random::token(32));
        let now = Instant::now();
        let mut tokens = lock(&self.valid_until);
        tokens.retain(|_, until| *until > now);
        if tokens.len() >= MAX_TOKENS
            && let Some(oldest) =
                tokens.iter().min_by_key(|(_, until)| **until).map(|(token, _)| token.clone())
        {
            tokens.remove(&oldest);
        }
        tokens.insert(token.clone(), now + lifetime);
        token
    }

    fn is_valid(&self, token: &str) -> bool {
        lock(&self.valid_until).get(token).is_some_and(|until| *until > Instant::now())
    }

    /// Those that are valid, or were a moment ago.
    pub(crate) fn all(&self) -> Vec<String> {
        lock(&self.valid_until).keys().cloned().collect()
    }

    /// Makes every token invalid.
    pub(crate) fn revoke_all(&self) {
        lock(&self.valid_until).clear();
    }
}

/// An error in the API's shape.
struct ApiError {
    status: StatusCode,
    message: String,
    /// As Headscale adds them.
    causes: Vec<String>,
    refusal: Option<Refusal>,
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), causes: Vec::new(), refusal: None }
    }

    fn because(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let status = refusal.status;
        let message = status.canonical_reason().unwrap_or("fault").to_lowercase();
        Self { refusal: Some(refusal), ..Self::new(status, message) }
    }
}

type Answer = Result<Value, ApiError>;

/// Answers one request below `/api/v2/`.
pub(crate) async fn handle(shared: &Shared, request: Request<Incoming>) -> Response<Body> {
    let is_headscale = shared.config.headscale.is_some();
    if shared.config.headscale.as_ref().is_some_and(|api| !api.v2) {
        return http_server::text(StatusCode::NOT_FOUND, "404 page not found");
    }
    if request.uri().path() == "/api/v2/oauth/token" {
        return token(shared, request).await;
    }
    match call(shared, request).await {
        Ok(value) => http_server::json(StatusCode::OK, &value),
        Err(error) if is_headscale && error.message == NO_PAGE => {
            http_server::text(StatusCode::NOT_FOUND, "404 page not found")
        }
        Err(error) => {
            let mut value = json!({"message": error.message, "status": error.status.as_u16()});
            if !error.causes.is_empty() {
                value["data"] = json!([{"errors": error.causes}]);
            }
            let mut response = http_server::json(error.status, &value);
            if let Some(refusal) = &error.refusal {
                add_retry_after(response.headers_mut(), refusal);
            }
            response
        }
    }
}

async fn call(shared: &Shared, request: Request<Incoming>) -> Answer {
    shared.faults.pass(Target::Api).await?;
    let is_headscale = shared.config.headscale.is_some();
    let token = bearer(request.headers()).unwrap_or_default();
    let is_admin = shared.tokens.is_api_key(&token);
    if !is_admin && !shared.tokens.is_valid(&token) {
        let text = if is_headscale { "unauthorized" } else { "API token invalid" };
        return Err(ApiError::new(StatusCode::UNAUTHORIZED, text));
    }
    let path = request.uri().path().trim_start_matches("/api/v2/").to_owned();
    let parts: Vec<&str> = path.split('/').collect();
    let method = request.method().clone();
    let not_found = |what: &str| ApiError::new(StatusCode::NOT_FOUND, format!("{what} not found"));
    match (&method, parts.as_slice()) {
        (_, ["tailnet", tailnet, ..]) if *tailnet != "-" => Err(not_found("tailnet")),
        (&Method::POST, ["tailnet", _, "keys"]) => {
            let body =
                body(request).await.map_err(|response| ApiError::new(response.status(), "body too large"))?;
            create_key(shared, &body, is_admin)
        }
        (&Method::GET, ["tailnet", _, "keys"]) => Ok(shared.with_state(
            |state| json!({"keys": state.keys.values().map(|key| key_json(key, false)).collect::<Vec<_>>()}),
        )),
        (&Method::GET, ["tailnet", _, "keys", id]) => shared
            .with_state(|state| state.keys.get(*id).map(|key| key_json(key, false)))
            .ok_or_else(|| not_found("key")),
        (&Method::DELETE, ["tailnet", _, "keys", id]) => {
            let revoked = shared.with_state(|state| revoke_key(state, id));
            match (revoked, is_headscale) {
                (true, _) => Ok(json!({})),
                (false, false) => Err(not_found("key")),
                (false, true) if id.parse::<u64>().is_err() => Err(not_found("auth key")),
                (false, true) => Err(ApiError::new(StatusCode::NOT_FOUND, "revoking auth key")
                    .because("auth-key not found: record not found")),
            }
        }
        (&Method::GET, ["tailnet", _, "devices"]) => {
            let all = parameter(request.uri().query(), "fields") == Some("all");
            let domain = shared.config.base_domain.as_str();
            Ok(shared.with_state(|state| {
                let devices: Vec<_> =
                    state.nodes.values().map(|node| device_json(state, node, domain, all)).collect();
                json!({ "devices": devices })
            }))
        }
        (&Method::GET, ["device", id]) => {
            let all = parameter(request.uri().query(), "fields") == Some("all");
            shared
                .with_state(|state| {
                    find(state, id).map(|node| device_json(state, node, &shared.config.base_domain, all))
                })
                .ok_or_else(|| not_found("device"))
        }
        (&Method::GET, ["device", id, "routes"]) => {
            shared.with_state(|state| find(state, id).map(routes_json)).ok_or_else(|| not_found("device"))
        }
        (&Method::POST, ["device", id, "routes"]) => {
            #[derive(Deserialize)]
            struct Approve {
                routes: Vec<ipnet::IpNet>,
            }
            let id = (*id).to_owned();
            let body =
                body(request).await.map_err(|response| ApiError::new(response.status(), "body too large"))?;
            let order: Approve = serde_json::from_slice(&body)
                .map_err(|error| ApiError::new(StatusCode::BAD_REQUEST, error.to_string()))?;
            shared
                .with_state(|state| {
                    let node = find(state, &id)?.id;
                    state.approve_routes(node, &order.routes);
                    state.nodes.get(&node).map(routes_json)
                })
                .ok_or_else(|| not_found("device"))
        }
        (&Method::DELETE, ["device", id]) => {
            let removed = shared.with_state(|state| {
                let node = find(state, id).map(|node| node.id);
                node.is_some_and(|node| state.remove_node(node))
            });
            if removed { Ok(json!({})) } else { Err(not_found("device")) }
        }
        _ => Err(ApiError::new(StatusCode::NOT_FOUND, NO_PAGE)),
    }
}

/// The client-credentials grant, with its own error shape.
async fn token(shared: &Shared, request: Request<Incoming>) -> Response<Body> {
    #[derive(Default)]
    struct Form {
        grant: String,
        id: String,
        secret: String,
    }
    let problem = |status, error: &str, description: &str| {
        http_server::json(status, &json!({"error": error, "error_description": description}))
    };
    if request.method() != Method::POST {
        return problem(StatusCode::METHOD_NOT_ALLOWED, "invalid_request", "method not allowed");
    }
    if let Err(refusal) = shared.faults.pass(Target::OauthToken).await {
        let status = refusal.status;
        let message = status.canonical_reason().unwrap_or("fault");
        let mut response = http_server::json(refusal.status, &json!({ "message": message }));
        add_retry_after(response.headers_mut(), &refusal);
        return response;
    }
    let basic = basic(request.headers());
    let body = match body(request).await {
        Ok(body) => body,
        Err(response) => return response,
    };
    let Some(pairs) = form(&body) else {
        return problem(StatusCode::BAD_REQUEST, "invalid_request", "could not parse request body");
    };
    let mut form = Form::default();
    for (name, value) in pairs {
        match name.as_str() {
            "grant_type" => form.grant = value,
            "client_id" => form.id = value,
            "client_secret" => form.secret = value,
            _ => {}
        }
    }
    if form.secret.is_empty()
        && let Some((id, secret)) = basic
    {
        (form.id, form.secret) = (id, secret);
    }
    if !matches!(form.grant.as_str(), "" | "client_credentials") {
        return problem(
            StatusCode::BAD_REQUEST,
            "unsupported_grant_type",
            "only the client_credentials grant is supported",
        );
    }
    if form.secret.is_empty() {
        return problem(StatusCode::UNAUTHORIZED, "invalid_client", "missing client credentials");
    }
    let oauth = &shared.config.oauth;
    if form.secret != oauth.client_secret || !(form.id.is_empty() || form.id == oauth.client_id) {
        return problem(StatusCode::UNAUTHORIZED, "invalid_client", "invalid client credentials");
    }
    let token = shared.tokens.mint(oauth.token_lifetime);
    let mut response = http_server::json(
        StatusCode::OK,
        &json!({
            "access_token": token,
            "token_type": "Bearer",
            "expires_in": oauth.token_lifetime.as_secs(),
            "scope": "auth_keys devices:core",
        }),
    );
    response.headers_mut().insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    response
}

fn create_key(shared: &Shared, body: &[u8], is_admin: bool) -> Answer {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct CreateKey {
        capabilities: Capabilities,
        #[serde(default)]
        expiry_seconds: i64,
        #[serde(default)]
        description: String,
    }
    #[derive(Deserialize)]
    struct Capabilities {
        devices: Devices,
    }
    #[derive(Deserialize)]
    struct Devices {
        create: Create,
    }
    #[derive(Deserialize)]
    struct Create {
        #[serde(default)]
        reusable: bool,
        #[serde(default)]
        ephemeral: bool,
        #[serde(default)]
        preauthorized: bool,
        #[serde(default)]
        tags: Option<Vec<String>>,
    }
    let bad = |message: String| ApiError::new(StatusCode::BAD_REQUEST, message);
    let order: CreateKey = serde_json::from_slice(body).map_err(|error| bad(error.to_string()))?;
    let create = order.capabilities.devices.create;
    let tags = create.tags.unwrap_or_default();
    if is_admin {
        if tags.is_empty() {
            return Err(bad("an auth key without tags must be created with a user-owned API key".into()));
        }
        if let Some(tag) = tags.iter().find(|tag| !tag.starts_with("tag:")) {
            let cause = format!("auth-key tag is invalid: '{tag}' did not begin with 'tag:'");
            return Err(bad("creating auth key".into()).because(cause));
        }
    } else if tags.is_empty() {
        return Err(bad("tailnet-owned auth key must have tags set".into()));
    }
    if let Some(tag) = tags.iter().find(|tag| !is_admin && !shared.config.oauth.tags.contains(tag)) {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            format!("requested tags [{tag}] are invalid or not permitted"),
        ));
    }
    if order.description.chars().count() > MAX_DESCRIPTION {
        return Err(bad("description is too long".into()));
    }
    let lifetime = match u64::try_from(order.expiry_seconds) {
        Ok(0) => DEFAULT_LIFETIME,
        Ok(seconds) if Duration::from_secs(seconds) <= DEFAULT_LIFETIME => Duration::from_secs(seconds),
        _ => return Err(bad("expirySeconds must be between 1 and 7776000".into())),
    };
    let options = AuthKeyOptions {
        reusable: create.reusable,
        ephemeral: create.ephemeral,
        preauthorized: create.preauthorized,
        tags,
        lifetime,
        description: order.description,
        user: None,
    };
    let key = shared.with_state(|state| state.create_key(options, Timestamp::now()));
    Ok(key_json(&key, true))
}

/// Marks a key as revoked; false when there is none or it was revoked before.
pub(crate) fn revoke_key(state: &mut State, id: &str) -> bool {
    match state.keys.get_mut(id) {
        Some(key) if key.revoked.is_none() => {
            key.revoked = Some(Timestamp::now());
            true
        }
        _ => false,
    }
}

/// The API takes a device's numeric id and its stable one.
fn find<'a>(state: &'a State, id: &str) -> Option<&'a Node> {
    state.nodes.values().find(|node| node.stable_id == id || node.id.to_string() == id)
}

fn key_json(key: &AuthKey, with_secret: bool) -> Value {
    let mut value = json!({
        "id": key.id,
        "keyType": "auth",
        "description": key.description,
        "expirySeconds": key.expires.duration_since(key.created).as_secs(),
        "created": key.created.to_string(),
        "expires": key.expires.to_string(),
        "invalid": key.check(Timestamp::now()).is_err(),
        "capabilities": {"devices": {"create": {
            "reusable": key.reusable,
            "ephemeral": key.ephemeral,
            "preauthorized": key.preauthorized,
            "tags": key.tags,
        }}},
        "tags": key.tags,
    });
    if with_secret {
        value["key"] = json!(key.secret);
    }
    if let Some(revoked) = key.revoked {
        value["revoked"] = json!(revoked.to_string());
    }
    value
}

fn routes_json(node: &Node) -> Value {
    let (advertised, _) = crate::control::routes::advertised(&node.hostinfo);
    json!({"advertisedRoutes": advertised, "enabledRoutes": node.enabled()})
}

fn device_json(state: &State, node: &Node, base_domain: &str, all: bool) -> Value {
    let mut value = json!({
        "addresses": node.addresses,
        "id": node.id.to_string(),
        "nodeId": node.stable_id,
        "user": state.owner_names(node.owner()).0,
        "name": format!("{}.{}", node.name, state.domain_of(node).as_deref().unwrap_or(base_domain)),
        "hostname": node.hostname,
        "clientVersion": text(&node.hostinfo, "IPNVersion"),
        "updateAvailable": false,
        "os": text(&node.hostinfo, "OS"),
        "created": node.created.to_string(),
        "lastSeen": node.last_seen.to_string(),
        "keyExpiryDisabled": node.expiry.is_none(),
        "expires": node.expiry.map_or_else(|| "0001-01-01T00:00:00Z".into(), |at| at.to_string()),
        "authorized": node.authorized,
        "isEphemeral": node.ephemeral,
        "isExternal": false,
        "machineKey": node.machine_key,
        "nodeKey": node.node_key,
        "blocksIncomingConnections": false,
    });
    if !node.tags.is_empty() {
        value["tags"] = json!(node.tags);
    }
    if node.online {
        value["lastSeen"] = json!(Timestamp::now().to_string());
    }
    if all {
        value["enabledRoutes"] = json!([]);
        value["advertisedRoutes"] = json!([]);
        value["clientConnectivity"] = json!({"endpoints": node.endpoints, "derp": "", "latency": {}});
    }
    value
}

/// The token of a bearer header, or the user name of a basic one, as the hosted service takes both.
fn bearer(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    match value.strip_prefix("Bearer ") {
        Some(token) => Some(token.to_owned()),
        None => basic(headers).map(|(user, _)| user),
    }
}

fn basic(headers: &HeaderMap) -> Option<(String, String)> {
    let encoded = headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Basic ")?;
    let decoded = base64::engine::general_purpose::STANDARD.decode(encoded).ok()?;
    let (user, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

/// Decodes `application/x-www-form-urlencoded`.
fn form(body: &[u8]) -> Option<Vec<(String, String)>> {
    let text = std::str::from_utf8(body).ok()?;
    text.split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((unescape(name)?, unescape(value)?))
        })
        .collect()
}

fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        match first {
            b'+' => {
                bytes.push(b' ');
                rest = tail;
            }
            b'%' => {
                let (digits, tail) = tail.split_at_checked(2)?;
                let mut byte = [0];
                hex::decode_to_slice(digits, &mut byte).ok()?;
                bytes.push(byte[0]);
                rest = tail;
            }
            other => {
                bytes.push(*other);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_decode() {
        let pairs = form(b"client_id=a%2Bb&client_secret=x+y&flag").unwrap();
        let expected = [("client_id", "a+b"), ("client_secret", "x y"), ("flag", "")];
        assert_eq!(pairs, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert_eq!(form(b"a=%4"), None);
        assert_eq!(form(b"a=%zz"), None);
        assert_eq!(form(b"a=%ff"), None);
    }

    #[test]
    fn tokens_end() {
        let tokens = Tokens::default();
        let short = tokens.mint(Duration::ZERO);
        let long = tokens.mint(Duration::from_secs(60));
        assert!(!tokens.is_valid(&short));
        assert!(tokens.is_valid(&long));
        tokens.revoke_all();
        assert!(!tokens.is_valid(&long));
    }

    proptest::proptest! {
        #[test]
        fn fuzz_forms_decode_or_are_refused(body: Vec<u8>) {
            let _ = form(&body);
        }

        #[test]
        fn fuzz_what_is_escaped_comes_back(text: String) {
            let escaped: String = text.bytes().map(|byte| format!("%{byte:02x}")).collect();
            proptest::prop_assert_eq!(unescape(&escaped), Some(text));
        }
    }
}
