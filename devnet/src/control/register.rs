//! `POST /machine/register`, with Headscale's order of decisions: logout first, then restart of a
//! known node, then a waiting login, then an auth key, then a new interactive login.

use jiff::{SignedDuration, Timestamp};
use podtether_core::key::MachinePublic;
use serde_json::Value;

use super::state::{AuthKey, KeyProblem, NewNode, Node, NodeId, PendingLogin, State, text};
use super::wire::{self, Hostinfo, RegisterRequest, RegisterResponse};
use crate::config::{DevnetConfig, Dialect};
use crate::shared::Shared;

/// A refusal: the text of `Error` in an otherwise successful answer.
type Refused = String;

enum Step {
    Answer(RegisterResponse),
    /// Ask again when the login with this id was decided.
    Wait(String),
}

/// Answers one request of the machine that `machine_key` proved to be.
pub(crate) async fn handle(shared: &Shared, machine_key: MachinePublic, body: &[u8]) -> RegisterResponse {
    let request: RegisterRequest = match serde_json::from_slice(body) {
        Ok(request) => request,
        Err(error) => {
            shared.complain(format!("register request does not parse: {error}"));
            return refusal(error.to_string());
        }
    };
    examine(shared, &request);
    if let Some(error) = shared.registration_error() {
        return refusal(error);
    }
    let mut changed = shared.changed.subscribe();
    loop {
        changed.mark_unchanged();
        let now = Timestamp::now();
        match shared.with_state(|state| decide(shared, state, &request, machine_key, now)) {
            Ok(Step::Answer(response)) => {
                let (key, expired) = (request.node_key, response.node_key_expired);
                tracing::info!(%key, expired, auth_url = response.auth_url, "register answered");
                return response;
            }
            Ok(Step::Wait(login)) => {
                let pending =
                    |state: &mut State| state.pending.get(&login).is_some_and(|entry| !entry.approved);
                while shared.with_state(pending) {
                    if changed.changed().await.is_err() {
                        return refusal("registration timed out".into());
                    }
                }
            }
            Err(reason) => {
                tracing::info!(key = %request.node_key, reason, "register refused");
                return refusal(reason);
            }
        }
    }
}

/// Notes what a real server would let pass although it is wrong.
fn examine(shared: &Shared, request: &RegisterRequest) {
    let Some(hostinfo) = &request.hostinfo else {
        shared.complain("register request without Hostinfo".into());
        return;
    };
    for field in ["OS", "IPNVersion", "Hostname"] {
        if text(hostinfo, field).is_empty() {
            shared.complain(format!("register request without Hostinfo.{field}"));
        }
    }
}

fn decide(
    shared: &Shared,
    state: &mut State,
    request: &RegisterRequest,
    machine_key: MachinePublic,
    now: Timestamp,
) -> Result<Step, Refused> {
    if request.node_key.is_zero() {
        return Err("node key is zero".into());
    }
    let expiry = request.expiry().map_err(|error| error.to_string())?;
    let key = request.auth.as_ref().map(|auth| auth.auth_key.as_str()).filter(|key| !key.is_empty());
    let old = request.old_node_key.filter(|key| !key.is_zero());
    if old.and_then(|key| state.node_by_key(&key)).is_some_and(|node| node.machine_key != machine_key) {
        shared.complain("OldNodeKey is another machine's".into());
    }
    let known = state.node_by_key(&request.node_key).map(|node| (node.id, node.machine_key));
    if let Some((id, owner)) = known {
        let logging_out = expiry.is_some_and(|at| at < now);
        if (logging_out || request.auth.is_none()) && owner != machine_key {
            return Err("node exists with a different machine key".into());
        }
        if logging_out || (request.auth.is_none() && (expiry.is_some() || is_expired(state, id))) {
            return logout(state, id, expiry, now).map(Step::Answer);
        }
        if request.auth.is_none() {
            return Ok(Step::Answer(success(state, id)));
        }
    }
    if !request.followup.is_empty() {
        return follow_up(shared, state, request, machine_key);
    }
    let Some(key) = key else {
        return Ok(Step::Answer(new_login(shared, state, request, machine_key)));
    };
    let id = with_key(&shared.config, state, request, machine_key, key, expiry, now)?;
    Ok(Step::Answer(success(state, id)))
}

fn is_expired(state: &State, id: NodeId) -> bool {
    state.nodes.get(&id).is_some_and(|node| node.expired)
}

fn logout(
    state: &mut State,
    id: NodeId,
    expiry: Option<Timestamp>,
    now: Timestamp,
) -> Result<RegisterResponse, Refused> {
    let expired = RegisterResponse { node_key_expired: true, ..RegisterResponse::default() };
    if is_expired(state, id) {
        return Ok(expired);
    }
    if expiry.is_some_and(|at| at > now) {
        return Err("extending key is not allowed".into());
    }
    if state.nodes.get(&id).is_some_and(|node| node.ephemeral) {
        state.remove_node(id);
        return Ok(expired);
    }
    state.set_expiry(id, Some(now), now);
    Ok(success(state, id))
}

fn follow_up(
    shared: &Shared,
    state: &mut State,
    request: &RegisterRequest,
    machine_key: MachinePublic,
) -> Result<Step, Refused> {
    let id = request.followup.rsplit_once("/register/").ok_or("invalid registration ID")?.1;
    match state.pending.get(id) {
        Some(login) if login.machine_key != machine_key || login.node_key != request.node_key => {
            Err("invalid registration ID".into())
        }
        Some(login) if !login.approved => Ok(Step::Wait(id.to_owned())),
        Some(_) => {
            state.pending.remove(id);
            match state.node_by_key(&request.node_key) {
                Some(node) if node.machine_key == machine_key => Ok(Step::Answer(success(state, node.id))),
                _ => Ok(Step::Answer(new_login(shared, state, request, machine_key))),
            }
        }
        None => Ok(Step::Answer(new_login(shared, state, request, machine_key))),
    }
}

fn new_login(
    shared: &Shared,
    state: &mut State,
    request: &RegisterRequest,
    machine_key: MachinePublic,
) -> RegisterResponse {
    let id = state.add_pending(PendingLogin {
        machine_key,
        node_key: request.node_key,
        hostinfo: request.hostinfo.clone().unwrap_or_default(),
        approved: false,
    });
    RegisterResponse {
        auth_url: format!("{}/register/{id}", shared.server_url()),
        ..RegisterResponse::default()
    }
}

/// Lets the waiting login `id` in as a node of the devnet's user.
pub(crate) fn approve(
    config: &DevnetConfig,
    state: &mut State,
    id: &str,
    now: Timestamp,
) -> Result<(), Refused> {
    let login = state.pending.get_mut(id).ok_or("no such login")?;
    login.approved = true;
    let (machine_key, node_key, hostinfo) = (login.machine_key, login.node_key, login.hostinfo.clone());
    let expiry = default_expiry(config, now);
    if let Some(existing) = state.node_by_machine(&machine_key).map(|node| node.id) {
        state.rotate_key(existing, node_key).map_err(|error| error.to_string())?;
        state.set_expiry(existing, expiry, now);
        return Ok(());
    }
    let node = NewNode {
        machine_key,
        node_key,
        hostinfo,
        tags: Vec::new(),
        ephemeral: false,
        preauthorized: false,
        user: wire::USER,
        expiry,
        version: 0,
    };
    state.add_node(node, now).map(|_| ()).map_err(|error| error.to_string())
}

fn with_key(
    config: &DevnetConfig,
    state: &mut State,
    request: &RegisterRequest,
    machine_key: MachinePublic,
    secret: &str,
    expiry: Option<Timestamp>,
    now: Timestamp,
) -> Result<NodeId, Refused> {
    let key = state.key_by_secret(secret).cloned();
    let key = key.ok_or_else(|| key_problem(config.dialect, KeyProblem::Unknown, ""))?;
    let existing = state.node_by_machine(&machine_key).cloned();
    // The key was only needed to join: a machine that comes back with its node key unchanged does not
    // need it again. A new node key, an expired node, or a change of owner does.
    let returning = existing.as_ref().is_some_and(|node| {
        node.node_key == request.node_key && !node.expired && (key.tags.is_empty() || !node.tags.is_empty())
    });
    if !returning {
        key.check(now).map_err(|problem| key_problem(config.dialect, problem, &key.id))?;
    }
    let hostinfo = request.hostinfo.clone().unwrap_or_default();
    let id = match existing {
        Some(node) => rejoin(config, state, &node, &key, request, hostinfo, expiry, now)?,
        None => {
            check_request_tags(config.dialect, &hostinfo, &key)?;
            let tagged = !key.tags.is_empty();
            let new = NewNode {
                machine_key,
                node_key: request.node_key,
                hostinfo,
                tags: key.tags.clone(),
                ephemeral: key.ephemeral,
                preauthorized: key.preauthorized,
                user: key.user.unwrap_or(wire::USER),
                expiry: if tagged { None } else { expiry.or_else(|| default_expiry(config, now)) },
                version: request.version,
            };
            let added = state.add_node(new, now);
            let id = added.map_err(|error| in_auth("creating new node: ", &error.to_string()))?;
            if let Some(node) = state.nodes.get_mut(&id) {
                node.joined_by = Some(key.id.clone());
            }
            id
        }
    };
    if let Some(stored) = state.key_by_secret(secret) {
        stored.used = true;
    }
    Ok(id)
}

#[expect(clippy::too_many_arguments, reason = "one step of with_key, split for length")]
fn rejoin(
    config: &DevnetConfig,
    state: &mut State,
    node: &Node,
    key: &AuthKey,
    request: &RegisterRequest,
    hostinfo: Hostinfo,
    expiry: Option<Timestamp>,
    now: Timestamp,
) -> Result<NodeId, Refused> {
    state.rotate_key(node.id, request.node_key).map_err(|error| in_auth("", &error.to_string()))?;
    state.set_hostinfo(node.id, hostinfo);
    let converted = node.tags.is_empty() && !key.tags.is_empty();
    let tagged = converted || !node.tags.is_empty();
    if let Some(stored) = state.nodes.get_mut(&node.id) {
        stored.version = request.version;
        stored.ephemeral = key.ephemeral;
        if converted {
            stored.tags.clone_from(&key.tags);
        }
    }
    if converted {
        state.touch_topology();
    }
    let expiry = if tagged {
        // Headscale leaves a tagged node's expiry alone, also one that has passed: such a node cannot come
        // back. The hosted service lets it.
        node.expiry.filter(|at| !converted && (config.dialect == Dialect::Headscale || *at > now))
    } else {
        expiry.or_else(|| default_expiry(config, now))
    };
    state.set_expiry(node.id, expiry, now);
    Ok(node.id)
}

/// With a key, tags come from the key; Headscale refuses a client that asks for any.
fn check_request_tags(dialect: Dialect, hostinfo: &Hostinfo, key: &AuthKey) -> Result<(), Refused> {
    let requested: Vec<&str> = hostinfo
        .get("RequestTags")
        .and_then(Value::as_array)
        .map(|tags| tags.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    if requested.is_empty() {
        return Ok(());
    }
    let sentence = format!("requested tags [{}] are invalid or not permitted", requested.join(" "));
    match dialect {
        Dialect::Headscale => Err(in_auth("creating new node: ", &sentence)),
        Dialect::Saas if requested.iter().all(|tag| key.tags.iter().any(|own| own == tag)) => Ok(()),
        Dialect::Saas => Err(sentence),
    }
}

fn in_auth(step: &str, reason: &str) -> Refused {
    format!("handling register with auth key: {step}{reason}")
}

fn key_problem(dialect: Dialect, problem: KeyProblem, id: &str) -> Refused {
    match (dialect, problem) {
        (Dialect::Headscale, KeyProblem::Unknown) => "invalid pre auth key".into(),
        (Dialect::Headscale, KeyProblem::Revoked) => "authkey revoked".into(),
        (Dialect::Headscale, KeyProblem::Expired) => "authkey expired".into(),
        (Dialect::Headscale, KeyProblem::Used) => "authkey already used".into(),
        (Dialect::Saas, KeyProblem::Unknown) => "invalid key: unable to validate API key".into(),
        (Dialect::Saas, KeyProblem::Revoked | KeyProblem::Expired | KeyProblem::Used) => {
            format!("invalid key: API key {id} not valid")
        }
    }
}

fn default_expiry(config: &DevnetConfig, now: Timestamp) -> Option<Timestamp> {
    let lifetime = SignedDuration::try_from(config.node_key_lifetime?).ok()?;
    now.checked_add(lifetime).ok()
}

fn success(state: &State, id: NodeId) -> RegisterResponse {
    let Some(node) = state.nodes.get(&id) else { return refusal("node not found".into()) };
    let owner = node.owner();
    let (login_name, display_name) = state.owner_names(owner);
    RegisterResponse {
        user: wire::User { id: owner, display_name: display_name.clone() },
        login: wire::Login { id: owner, provider: "", login_name, display_name },
        node_key_expired: node.expired,
        machine_authorized: node.authorized,
        ..RegisterResponse::default()
    }
}

fn refusal(error: String) -> RegisterResponse {
    RegisterResponse { error, ..RegisterResponse::default() }
}
