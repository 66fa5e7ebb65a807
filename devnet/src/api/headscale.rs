//! Headscale's first admin API: pre-auth keys, nodes, users. Ids are numbers written as texts, errors are
//! RFC 9457 documents, and a field nobody knows is refused.

use axum::body::Body;
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{bearer, unescape};
use crate::control::state::{AuthKey, AuthKeyOptions, Node, State};
use crate::control::wire;
use crate::fault::{Refusal, Target};
use crate::http_server::{self, add_retry_after, body, parameter};
use crate::shared::Shared;

/// Go's first moment, which Headscale writes for a key without an expiration.
const GO_ZERO: &str = "0001-01-01T00:00:00Z";

struct Problem {
    status: StatusCode,
    detail: String,
    errors: Vec<Value>,
    refusal: Option<Refusal>,
}

impl Problem {
    fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), errors: Vec::new(), refusal: None }
    }

    fn because(mut self, message: impl Into<String>) -> Self {
        self.errors.push(json!({"message": message.into()}));
        self
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let status = refusal.status;
        let detail = status.canonical_reason().unwrap_or("fault").to_lowercase();
        Self { refusal: Some(refusal), ..Self::new(status, detail) }
    }
}

type Answer = Result<Value, Problem>;

fn bad(detail: &str) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, detail)
}

fn missing(detail: &str) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, detail)
}

/// Answers one request below `/api/v1/`.
pub(crate) async fn handle(shared: &Shared, request: Request<Incoming>) -> Response<Body> {
    match call(shared, request).await {
        Ok(Some(value)) => http_server::json(StatusCode::OK, &value),
        Ok(None) => http_server::text(StatusCode::NOT_FOUND, "404 page not found"),
        Err(problem) => {
            let mut value = json!({
                "title": problem.status.canonical_reason(),
                "status": problem.status.as_u16(),
                "detail": problem.detail,
            });
            if !problem.errors.is_empty() {
                value["errors"] = problem.errors.into();
            }
            let mut response = http_server::json(problem.status, &value);
            if let Some(refusal) = &problem.refusal {
                add_retry_after(response.headers_mut(), refusal);
            }
            response
        }
    }
}

/// `None` when there is no such path.
async fn call(shared: &Shared, request: Request<Incoming>) -> Result<Option<Value>, Problem> {
    shared.faults.pass(Target::Api).await?;
    let path = request.uri().path().trim_start_matches("/api/v1/").to_owned();
    let query = request.uri().query().map(str::to_owned);
    let method = request.method().clone();
    let has_key = bearer(request.headers()).is_some_and(|token| shared.tokens.is_api_key(&token));
    let sent = body(request).await.map_err(|r| Problem::new(r.status(), "body too large"))?;
    let parts: Vec<&str> = path.split('/').collect();
    let answer = match (&method, parts.as_slice()) {
        (&Method::GET | &Method::POST, ["user" | "preauthkey" | "node"])
        | (&Method::POST, ["preauthkey", "expire"] | ["node", _, "expire" | "tags"] | ["user", _, "rename", _])
        | (&Method::GET | &Method::DELETE, ["node", _])
            if !has_key =>
        {
            Err(Problem::new(StatusCode::UNAUTHORIZED, "Unauthorized"))
        }
        (&Method::GET, ["user"]) => list_users(shared, query.as_deref()),
        (&Method::POST, ["user"]) => create_user(shared, &sent),
        (&Method::POST, ["user", id, "rename", name]) => rename_user(shared, id, name),
        (&Method::POST, ["preauthkey"]) => create_key(shared, &sent),
        (&Method::POST, ["preauthkey", "expire"]) => expire_key(shared, &sent),
        (&Method::GET, ["preauthkey"]) => Ok(shared.with_state(|state| {
            let mut keys: Vec<&AuthKey> = state.keys.values().collect();
            keys.sort_by_key(|key| key.id.parse::<u64>().unwrap_or(u64::MAX));
            json!({"preAuthKeys": keys.iter().map(|key| key_json(state, key, false)).collect::<Vec<_>>()})
        })),
        (&Method::GET, ["node"]) => Ok(shared.with_state(|state| {
            json!({"nodes": state.nodes.values().map(|node| node_json(state, node)).collect::<Vec<_>>()})
        })),
        (&Method::GET, ["node", id]) => {
            let id = node_id(id)?;
            shared
                .with_state(|state| state.nodes.get(&id).map(|node| json!({"node": node_json(state, node)})))
                .ok_or_else(|| missing("node not found"))
        }
        (&Method::DELETE, ["node", id]) => {
            let id = node_id(id)?;
            let removed = shared.with_state(|state| state.remove_node(id));
            if removed { Ok(json!({})) } else { Err(missing("node not found")) }
        }
        (&Method::POST, ["node", id, "expire"]) => expire_node(shared, node_id(id)?, &sent),
        (&Method::POST, ["node", id, "tags"]) => set_tags(shared, node_id(id)?, &sent),
        _ => return Ok(None),
    };
    answer.map(Some)
}

/// What a field may hold.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Flag,
    Texts,
}

/// An object with no other fields than these, each of its kind.
fn fields(sent: &[u8], known: &[(&str, Kind)]) -> Result<Map<String, Value>, Problem> {
    let value: Value = serde_json::from_slice(sent).map_err(|_| no_json(sent))?;
    let problem = |message: &str, at: &str, value: &Value| {
        let mut problem = Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "validation failed");
        problem.errors.push(json!({"message": message, "location": at, "value": value}));
        problem
    };
    let Value::Object(object) = value else { return Err(problem("expected object", "body", &value)) };
    for (name, value) in &object {
        let at = format!("body.{name}");
        let Some((_, kind)) = known.iter().find(|(known, _)| known == name) else {
            return Err(problem("unexpected property", &at, &Value::Object(object.clone())));
        };
        let (fits, wanted) = match kind {
            Kind::Text => (value.is_string(), "expected string"),
            Kind::Flag => (value.is_boolean(), "expected boolean"),
            Kind::Texts => (
                value.is_null() || value.as_array().is_some_and(|a| a.iter().all(Value::is_string)),
                "expected array",
            ),
        };
        if !fits {
            return Err(problem(wanted, &at, value));
        }
    }
    Ok(object)
}

/// As Headscale's JSON reader complains of a body that does not begin as JSON does.
fn no_json(sent: &[u8]) -> Problem {
    let text = String::from_utf8_lossy(sent);
    let first = text.trim_start().chars().next();
    let message = match first {
        Some(first) => format!("invalid character '{first}' looking for beginning of value"),
        None => "unexpected end of JSON input".to_owned(),
    };
    let mut problem = bad("validation failed");
    problem.errors.push(json!({"message": message, "location": "body", "value": text}));
    problem
}

fn text<'a>(object: &'a Map<String, Value>, name: &str) -> &'a str {
    object.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn texts(object: &Map<String, Value>, name: &str) -> Vec<String> {
    let list = object.get(name).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn time(object: &Map<String, Value>, name: &str) -> Result<Option<Timestamp>, Problem> {
    match text(object, name) {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|e| bad("validation failed").because(format!("{e}"))),
    }
}

fn number(text: &str, what: &str) -> Result<u64, Problem> {
    text.parse()
        .map_err(|_| bad(what).because(format!("strconv.ParseUint: parsing {text:?}: invalid syntax")))
}

fn node_id(text: &str) -> Result<u64, Problem> {
    let why = "type mismatch, parameter: node_id, error: strconv.ParseUint: parsing";
    text.parse().map_err(|_| bad(&format!("{why} {text:?}: invalid syntax")))
}

fn list_users(shared: &Shared, query: Option<&str>) -> Answer {
    let wanted = |name| parameter(query, name).filter(|text| !text.is_empty()).and_then(unescape);
    let id = wanted("id").map(|text| number(&text, "invalid id")).transpose()?;
    let name = wanted("name");
    Ok(shared.with_state(|state| {
        let users = state.users.iter();
        let users = users.filter(|(number, user)| {
            id.is_none_or(|id| id == **number) && name.as_ref().is_none_or(|name| *name == user.name)
        });
        json!({"users": users.map(|(id, _)| user_json(state, *id)).collect::<Vec<_>>()})
    }))
}

fn create_user(shared: &Shared, sent: &[u8]) -> Answer {
    let known = ["name", "displayName", "email", "pictureUrl"].map(|name| (name, Kind::Text));
    let object = fields(sent, &known)?;
    let (name, display) = (text(&object, "name").to_owned(), text(&object, "displayName").to_owned());
    shared.with_state(|state| {
        if state.users.values().any(|user| user.name == name) {
            return Err(Problem::new(StatusCode::CONFLICT, "user already exists"));
        }
        let id = state.add_user(name, display, None, Timestamp::now());
        Ok(json!({"user": user_json(state, id)}))
    })
}

fn rename_user(shared: &Shared, id: &str, name: &str) -> Answer {
    let id = number(id, "invalid user id")?;
    let name = unescape(name).ok_or_else(|| bad("invalid name"))?;
    shared.with_state(|state| {
        if state.rename_user(id, name, None) {
            Ok(json!({"user": user_json(state, id)}))
        } else {
            Err(missing("renaming user").because("user not found"))
        }
    })
}

fn create_key(shared: &Shared, sent: &[u8]) -> Answer {
    let known = [
        ("user", Kind::Text),
        ("reusable", Kind::Flag),
        ("ephemeral", Kind::Flag),
        ("expiration", Kind::Text),
        ("aclTags", Kind::Texts),
    ];
    let object = fields(sent, &known)?;
    let expires = time(&object, "expiration")?;
    let user = match text(&object, "user") {
        "" => None,
        text => Some(number(text, "invalid user id")?).filter(|id| *id != 0),
    };
    let tags = texts(&object, "aclTags");
    check_tags(&tags, "invalid tag")?;
    let flag = |name| object.get(name).and_then(Value::as_bool).unwrap_or_default();
    let (reusable, ephemeral) = (flag("reusable"), flag("ephemeral"));
    shared.with_state(|state| {
        if user.is_some_and(|id| !state.users.contains_key(&id)) {
            return Err(missing("creating pre-auth key").because("user not found"));
        }
        if user.is_none() && tags.is_empty() {
            let cause = "auth-key must be either tagged or owned by user";
            return Err(bad("creating pre-auth key").because(cause));
        }
        let options = AuthKeyOptions { reusable, ephemeral, tags, user, ..AuthKeyOptions::default() };
        let mut key = state.create_key(options, Timestamp::now());
        // With none given the key has expired already.
        key.expires = expires.unwrap_or(Timestamp::MIN);
        state.keys.insert(key.id.clone(), key.clone());
        Ok(json!({"preAuthKey": key_json(state, &key, true)}))
    })
}

fn expire_key(shared: &Shared, sent: &[u8]) -> Answer {
    let object = fields(sent, &[("id", Kind::Text)])?;
    let id = number(text(&object, "id"), "invalid pre-auth key id")?.to_string();
    shared.with_state(|state| match state.keys.get_mut(&id) {
        Some(key) => {
            key.expires = key.expires.min(Timestamp::now());
            Ok(json!({}))
        }
        None => Err(missing("expiring pre-auth key").because("auth-key not found: record not found")),
    })
}

fn expire_node(shared: &Shared, id: u64, sent: &[u8]) -> Answer {
    let sent: &[u8] = if sent.is_empty() { b"{}" } else { sent };
    let object = fields(sent, &[("expiry", Kind::Text), ("disableExpiry", Kind::Flag)])?;
    let disable = object.get("disableExpiry").and_then(Value::as_bool).unwrap_or_default();
    let asked = time(&object, "expiry")?;
    if disable && asked.is_some() {
        return Err(bad("cannot set both disable_expiry and expiry"));
    }
    let now = Timestamp::now();
    shared.with_state(|state| {
        if !state.nodes.contains_key(&id) {
            let cause = format!("node no longer exists in NodeStore: {id}");
            return Err(missing("expiring node").because(cause));
        }
        state.set_expiry(id, (!disable).then(|| asked.unwrap_or(now)), now);
        Ok(json!({"node": node_json(state, &state.nodes[&id])}))
    })
}

fn set_tags(shared: &Shared, id: u64, sent: &[u8]) -> Answer {
    let object = fields(sent, &[("tags", Kind::Texts)])?;
    let tags = texts(&object, "tags");
    if tags.is_empty() {
        return Err(bad("cannot remove all tags from a node - tagged nodes must have at least one tag"));
    }
    check_tags(&tags, "setting tags")?;
    shared.with_state(|state| {
        if !state.nodes.contains_key(&id) {
            return Err(missing("node not found"));
        }
        state.set_tags(id, tags);
        Ok(json!({"node": node_json(state, &state.nodes[&id])}))
    })
}

fn check_tags(tags: &[String], what: &str) -> Result<(), Problem> {
    for tag in tags {
        let wrong = if !tag.starts_with("tag:") {
            "tag must start with the string 'tag:'"
        } else if tag.to_lowercase() != *tag {
            "tag should be lowercase"
        } else if tag.split_whitespace().count() > 1 {
            "tags must not contain spaces"
        } else {
            continue;
        };
        return Err(bad(what).because(wrong));
    }
    Ok(())
}

fn user_json(state: &State, id: u64) -> Value {
    let (name, display_name) = state.owner_names(id);
    let created = state.users.get(&id).map_or(Timestamp::UNIX_EPOCH, |user| user.created);
    json!({
        "id": id.to_string(),
        "name": name,
        "createdAt": created.to_string(),
        "displayName": display_name,
        "email": "",
        "providerId": "",
        "provider": "",
        "profilePicUrl": "",
    })
}

fn key_json(state: &State, key: &AuthKey, with_secret: bool) -> Value {
    let masked = key.secret.rsplit_once('-').map_or("", |(prefix, _)| prefix);
    let expiration = if key.expires == Timestamp::MIN { GO_ZERO.into() } else { key.expires.to_string() };
    json!({
        "user": key.user.map(|id| user_json(state, id)),
        "id": key.id,
        "key": if with_secret { key.secret.clone() } else { format!("{masked}-***") },
        "reusable": key.reusable,
        "ephemeral": key.ephemeral,
        "used": key.used,
        "expiration": expiration,
        "createdAt": key.created.to_string(),
        "aclTags": key.tags,
    })
}

fn node_json(state: &State, node: &Node) -> Value {
    let owner = node.owner();
    let known = owner == wire::TAGGED_DEVICES || state.users.contains_key(&owner);
    json!({
        "id": node.id.to_string(),
        "machineKey": node.machine_key,
        "nodeKey": node.node_key,
        "discoKey": node.disco_key,
        "ipAddresses": node.addresses,
        "name": node.hostname,
        "user": known.then(|| user_json(state, owner)),
        "lastSeen": node.last_seen.to_string(),
        "expiry": node.expiry.map(|at| at.to_string()),
        "preAuthKey": node.joined_by.as_ref().and_then(|id| state.keys.get(id)).map(|key| key_json(state, key, false)),
        "createdAt": node.created.to_string(),
        "registerMethod": "REGISTER_METHOD_AUTH_KEY",
        "givenName": node.name,
        "online": node.online,
        "approvedRoutes": node.approved,
        "availableRoutes": crate::control::routes::advertised(&node.hostinfo).0,
        "subnetRoutes": node.routes,
        "tags": node.tags,
    })
}
