//! `POST /machine/map`: the stream of netmaps, and the lite updates.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use h2::SendStream;
use h2::server::SendResponse;
use http::{Response, StatusCode};
use jiff::Timestamp;
use podtether_core::key::MachinePublic;
use tokio::time::timeout;

use super::noise_server::{Reply, respond};
use super::state::{NodeId, State, text};
use super::view::{Update, View};
use super::wire::{self, MapRequest, MapResponse};
use super::{crowd, routes};
use crate::shared::Shared;
use crate::sync::lock;

/// Why a map stream ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("client went away: {0}")]
    Gone(#[from] h2::Error),
    #[error("client did not read for too long")]
    Slow,
    #[error("netmap does not encode: {0}")]
    Encode(String),
}

/// Answers one map request of the machine that `machine_key` proved to be.
pub(crate) async fn handle(
    shared: &Arc<Shared>,
    machine_key: MachinePublic,
    body: &[u8],
    mut answer: SendResponse<Bytes>,
) -> Result<(), StreamError> {
    let request: MapRequest = match serde_json::from_slice(body) {
        Ok(request) => request,
        Err(error) => {
            shared.complain(format!("map request does not parse: {error}"));
            let reply = Reply::text(StatusCode::INTERNAL_SERVER_ERROR, "internal server error");
            return Ok(respond(&mut answer, reply)?);
        }
    };
    if request.version < wire::MIN_VERSION {
        return Ok(respond(&mut answer, Reply::unsupported_version(request.version))?);
    }
    let node = match shared.with_state(|state| admit(state, &request, machine_key)) {
        Ok(node) => node,
        Err(reason) => {
            let reply = Reply::text(StatusCode::NOT_FOUND, reason);
            return Ok(respond(&mut answer, reply)?);
        }
    };
    if let Err(reason) = examine(shared, &request) {
        shared.complain(reason.into());
        return Ok(respond(&mut answer, Reply::text(StatusCode::BAD_REQUEST, reason))?);
    }
    shared.with_state(|state| apply(state, node, &request));
    if !request.stream {
        return Ok(respond(&mut answer, Reply::empty())?);
    }
    let session = Session::begin(shared, node);
    let stream = answer.send_response(Response::new(()), false)?;
    session.run(stream, &request).await
}

fn admit(state: &State, request: &MapRequest, machine_key: MachinePublic) -> Result<NodeId, &'static str> {
    match state.node_by_key(&request.node_key) {
        None => Err("node not found"),
        Some(node) if node.machine_key != machine_key => {
            Err("node key in request does not match the one associated with this machine key")
        }
        Some(node) => Ok(node.id),
    }
}

/// Refuses what makes no sense, and notes what real servers let pass to the client's harm.
fn examine(shared: &Shared, request: &MapRequest) -> Result<(), &'static str> {
    let endpoints = request.endpoints.as_deref().unwrap_or_default();
    let types = request.endpoint_types.as_deref().unwrap_or_default();
    if !types.is_empty() && types.len() != endpoints.len() {
        return Err("EndpointTypes does not match Endpoints");
    }
    if types.iter().any(|&kind| kind > 5) {
        return Err("unknown EndpointType");
    }
    if endpoints.iter().any(|address| address.port() == 0 || address.ip().is_unspecified()) {
        return Err("an endpoint nobody can send to");
    }
    if !request.compress.is_empty() && request.compress != "zstd" {
        return Err("unknown compression");
    }
    if request.disco_key.is_none_or(|key| key.is_zero()) {
        shared.complain("map request with a zero DiscoKey: peers will not reach this node".into());
    }
    match &request.hostinfo {
        None => shared.complain("map request without Hostinfo".into()),
        Some(hostinfo) => {
            for odd in routes::advertised(hostinfo).1 {
                shared.complain(format!("{odd} in Hostinfo.RoutableIPs is no masked prefix"));
            }
            for field in ["OS", "IPNVersion", "Hostname"] {
                if text(hostinfo, field).is_empty() {
                    shared.complain(format!("map request without Hostinfo.{field}"));
                }
            }
        }
    }
    if request.stream && !request.keep_alive {
        shared.complain("map stream without KeepAlive".into());
    }
    if !request.stream && !request.omit_peers {
        shared.complain("lite update without OmitPeers".into());
    }
    Ok(())
}

/// Takes over what the client says of itself, in a stream's request as in a lite update.
fn apply(state: &mut State, id: NodeId, request: &MapRequest) {
    // Headscale stores whatever comes: a zero disco key, or a Hostinfo that lacks everything.
    state.set_hostinfo(id, request.hostinfo.clone().unwrap_or_default());
    let disco_key = request.disco_key.unwrap_or_default();
    let Some(node) = state.nodes.get_mut(&id) else { return };
    let mut changed = node.version != request.version || node.disco_key != disco_key;
    node.version = request.version;
    node.disco_key = disco_key;
    if let Some(endpoints) = &request.endpoints
        && *endpoints != node.endpoints
    {
        node.endpoints.clone_from(endpoints);
        changed = true;
    }
    if changed {
        state.touch(id);
    }
}

/// A node's map stream. Its end, however it comes, starts the clock that makes the node offline.
struct Session {
    shared: Arc<Shared>,
    node: NodeId,
    number: u64,
}

impl Drop for Session {
    fn drop(&mut self) {
        tracing::info!(node = self.node, session = self.number, "map stream ends");
        self.shared.with_state(|state| state.end_session(self.node, self.number, Timestamp::now()));
    }
}

impl Session {
    fn begin(shared: &Arc<Shared>, node: NodeId) -> Self {
        let number = shared.with_state(|state| state.begin_session(node));
        tracing::info!(node, session = number, "map stream begins");
        Self { shared: shared.clone(), node, number }
    }

    async fn run(self, mut stream: SendStream<Bytes>, request: &MapRequest) -> Result<(), StreamError> {
        let shared = &*self.shared;
        let compress = request.compress == "zstd";
        let base_domain = shared.config.base_domain.clone();
        let mut view =
            View::new(self.node, self.number, request.version, base_domain, shared.config.dns.clone());
        let mut changed = shared.changed.subscribe();
        let mut stalled = shared.stalled.subscribe();
        let mut deltas = shared.deltas.subscribe();
        let mut keep_alive = tokio::time::interval(shared.config.keep_alive);
        let mut first = true;
        let ahead = lock(&shared.first_message).clone();
        if let Some(ahead) = ahead {
            self.send(&mut stream, ahead, compress).await?;
        }
        loop {
            if stalled.wait_for(|stalled| !stalled).await.is_err() {
                return Ok(());
            }
            changed.mark_unchanged();
            let raw = |state: &mut State| state.nodes.get_mut(&self.node)?.raw.pop_front();
            if !first && let Some(raw) = shared.with_state(raw) {
                self.send(&mut stream, raw, compress).await?;
                continue;
            }
            match shared.with_state(|state| self.next(state, &mut view)) {
                Update::Send(mut message) => {
                    if std::mem::take(&mut first) {
                        let count = shared.crowd.borrow().peers;
                        message.peers.extend(crowd::peers(&shared.config, count));
                    }
                    self.write(&mut stream, &message, compress).await?;
                    keep_alive.reset();
                    continue;
                }
                Update::Nothing => {}
                Update::End => return Ok(stream.send_data(Bytes::new(), true)?),
            }
            tokio::select! {
                _ = changed.changed() => {}
                _ = stalled.changed() => {}
                delta = deltas.recv() => {
                    // Those it missed would be missed for ever.
                    let delta = delta.map_err(|_| StreamError::Slow)?;
                    self.send(&mut stream, delta.as_bytes().to_vec(), compress).await?;
                    keep_alive.reset();
                }
                _ = keep_alive.tick() => {
                    let message = MapResponse { keep_alive: true, ..MapResponse::default() };
                    self.write(&mut stream, &message, compress).await?;
                }
                reset = poll_fn(|context| stream.poll_reset(context)) => {
                    tracing::debug!(node = self.node, ?reset, "map stream reset by the client");
                    return Ok(());
                }
            }
        }
    }

    fn next(&self, state: &mut State, view: &mut View) -> Update {
        let current = state.nodes.get(&self.node).is_some_and(|node| node.session == self.number);
        if current && state.kinds.is_muted(self.node) {
            return Update::Nothing;
        }
        let told = Timestamp::now().saturating_add(self.shared.clock_offset()).unwrap_or(Timestamp::MAX);
        let mut update = view.update(state, told);
        if matches!(update, Update::Nothing)
            && let Some(extra) = state.nodes.get_mut(&self.node).and_then(|node| node.extras.pop_front())
        {
            return Update::Send(Box::new(MapResponse { extra, ..MapResponse::default() }));
        }
        let ping = match state.nodes.get_mut(&self.node) {
            Some(node) if !matches!(update, Update::End) => node.pings.pop_front(),
            _ => None,
        };
        if let Some(ping) = ping {
            if !matches!(update, Update::Send(_)) {
                update = Update::Send(Box::default());
            }
            if let Update::Send(message) = &mut update {
                message.ping_request = Some(ping);
            }
        }
        update
    }

    async fn write(
        &self,
        stream: &mut SendStream<Bytes>,
        message: &MapResponse,
        compress: bool,
    ) -> Result<(), StreamError> {
        let json = serde_json::to_vec(message).map_err(|error| StreamError::Encode(error.to_string()))?;
        self.send(stream, json, compress).await
    }

    async fn send(
        &self,
        stream: &mut SendStream<Bytes>,
        mut json: Vec<u8>,
        compress: bool,
    ) -> Result<(), StreamError> {
        if compress {
            json = zstd::bulk::compress(&json, 1).map_err(|error| StreamError::Encode(error.to_string()))?;
        }
        let length = u32::try_from(json.len()).map_err(|error| StreamError::Encode(error.to_string()))?;
        let mut framed = Vec::with_capacity(4 + json.len());
        framed.extend_from_slice(&length.to_le_bytes());
        framed.append(&mut json);
        write_all(stream, framed.into(), self.shared.config.write_timeout).await
    }
}

/// Sends all of `data` as the client's window allows, unless the client reads nothing for `patience`.
async fn write_all(
    stream: &mut SendStream<Bytes>,
    mut data: Bytes,
    patience: Duration,
) -> Result<(), StreamError> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let mut granted = stream.capacity();
        if granted == 0 {
            match timeout(patience, poll_fn(|context| stream.poll_capacity(context))).await {
                Err(_) => {
                    stream.send_reset(h2::Reason::CANCEL);
                    return Err(StreamError::Slow);
                }
                Ok(None) => return Ok(()),
                Ok(Some(capacity)) => granted = capacity?,
            }
        }
        stream.send_data(data.split_to(granted.min(data.len())), false)?;
    }
    Ok(())
}

/// Asks the node on its stream to prove that it answers; `types` and `payload` as in a ping request.
pub(crate) fn queue_ping(
    state: &mut State,
    id: NodeId,
    url: String,
    types: &str,
    ip: Option<std::net::IpAddr>,
    payload: &[u8],
) -> bool {
    const MAX_PINGS: usize = 8;
    let Some(node) = state.nodes.get_mut(&id) else { return false };
    if node.pings.len() >= MAX_PINGS {
        return false;
    }
    node.pings.push_back(wire::PingRequest {
        url,
        url_is_noise: !types.is_empty(),
        types: types.into(),
        ip,
        payload: base64::engine::general_purpose::STANDARD.encode(payload),
    });
    state.revision += 1;
    true
}
