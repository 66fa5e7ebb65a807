//! A region's relay: DERP over TLS.
//!
//! Each connection has one task. Its queues are bounded and lose their oldest packet first, disco apart
//! from the rest, so a slow client costs only itself. When a node key connects twice the newest
//! connection receives; the older ones are only read.

use std::collections::{HashMap, HashSet, VecDeque};
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use http::{Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use podtether_core::derp::{
    DerpError, Frame, FrameReader, GoneReason, MAX_PACKET_BYTES, PROTOCOL_VERSION, ServerInfo,
    open_client_info, server_info,
};
use podtether_core::key::{NodePrivate, NodePublic};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::distance::Distance;
use crate::http_server::{empty, text};
use crate::listen::Gate;
use crate::random;
use crate::shared::Shared;
use crate::sync::lock;

/// Packets waiting for one client, disco and others each, as stock relays have it.
const QUEUE_PACKETS: usize = 32;
/// "Peer gone" notes waiting for one client.
const QUEUE_NOTES: usize = 64;
/// Senders remembered per client, to tell it when they are gone.
const MAX_SEEN: usize = 4096;
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(60);
/// "Not here" notes per client: this many at once, then one a second.
const NOTE_BURST: f64 = 3.0;
const DISCO_MAGIC: &[u8; 6] = b"TS\xf0\x9f\x92\xac";

/// How a region behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As it should.
    Up,
    /// Connecting is refused and STUN is silent.
    Down,
    /// Connections hold, but nothing passes, and STUN is silent.
    Blackhole,
}

/// What a relay did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelayStats {
    /// Connected node keys.
    pub clients: usize,
    /// Connections that were greeted since the start.
    pub greeted: u64,
    /// STUN requests answered.
    pub stun_answers: u64,
    /// Packets passed on.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets thrown away: receiver unknown, queue full, or region blocked.
    pub dropped: u64,
}

/// Why a client's connection ended.
#[derive(Debug, thiserror::Error)]
enum ClientError {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Frame(#[from] DerpError),
    #[error("client {0} rejected: not a node of this tailnet")]
    Unknown(NodePublic),
    #[error("expected a client's greeting")]
    NoGreeting,
    #[error("greeting or write took too long")]
    Slow,
    #[error("packet of {0} bytes is too long")]
    TooLong(usize),
    #[error("insufficient permissions")]
    Permission,
}

/// One region's relay.
pub(crate) struct Relay {
    pub(crate) id: u32,
    pub(crate) distance: Arc<Distance>,
    key: NodePrivate,
    shared: Arc<Shared>,
    /// Per node key, oldest connection first.
    clients: Mutex<HashMap<NodePublic, Vec<Arc<Client>>>>,
    mode: Mutex<Mode>,
    pub(crate) gate: watch::Sender<Gate>,
    greeted: AtomicU64,
    pub(crate) stun_answers: AtomicU64,
    packets: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

struct Client {
    key: NodePublic,
    queue: Mutex<Queue>,
    ready: Notify,
}

#[derive(Default)]
struct Queue {
    packets: VecDeque<(NodePublic, Vec<u8>)>,
    disco: VecDeque<(NodePublic, Vec<u8>)>,
    gone: VecDeque<(NodePublic, GoneReason)>,
    /// Whole frames that somebody wants it told.
    said: VecDeque<Vec<u8>>,
    /// Only the latest matters: who pings faster than it reads needs no more.
    pong: Option<[u8; 8]>,
    seen: HashSet<NodePublic>,
}

impl Relay {
    pub(crate) fn new(id: u32, distance: Duration, shared: Arc<Shared>, key: NodePrivate) -> Self {
        Self {
            id,
            distance: Arc::new(Distance::new(distance)),
            key,
            shared,
            clients: Mutex::default(),
            mode: Mutex::new(Mode::Up),
            gate: watch::Sender::new(Gate::OPEN),
            greeted: AtomicU64::new(0),
            stun_answers: AtomicU64::new(0),
            packets: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    pub(crate) fn mode(&self) -> Mode {
        *lock(&self.mode)
    }

    pub(crate) fn set_mode(&self, mode: Mode) {
        *lock(&self.mode) = mode;
        self.gate.send_if_modified(|gate| gate.set_open(mode != Mode::Down));
    }

    /// Cuts every connection.
    pub(crate) fn restart(&self) {
        self.gate.send_modify(|gate| gate.cut += 1);
    }

    pub(crate) fn stats(&self) -> RelayStats {
        RelayStats {
            clients: lock(&self.clients).len(),
            greeted: self.greeted.load(Ordering::Relaxed),
            stun_answers: self.stun_answers.load(Ordering::Relaxed),
            packets: self.packets.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
        }
    }

    /// Whether a node is connected here.
    pub(crate) fn has_client(&self, key: &NodePublic) -> bool {
        lock(&self.clients).contains_key(key)
    }

    /// Sends every connection of `key` a frame; false without any, or with too many that wait.
    pub(crate) fn say(&self, key: &NodePublic, frame: &[u8]) -> bool {
        let clients = lock(&self.clients);
        let Some(connections) = clients.get(key) else { return false };
        connections.iter().fold(true, |said, client| {
            let mut queue = lock(&client.queue);
            let room = queue.said.len() < QUEUE_NOTES;
            if room {
                queue.said.push_back(frame.to_vec());
                client.ready.notify_one();
            }
            said && room
        })
    }

    fn drop_packet(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    fn register(&self, client: &Arc<Client>) {
        lock(&self.clients).entry(client.key).or_default().push(client.clone());
    }

    fn unregister(&self, client: &Arc<Client>) {
        let mut clients = lock(&self.clients);
        let Some(connections) = clients.get_mut(&client.key) else { return };
        connections.retain(|other| !Arc::ptr_eq(other, client));
        if !connections.is_empty() {
            return;
        }
        clients.remove(&client.key);
        for other in clients.values().flatten() {
            let mut queue = lock(&other.queue);
            if queue.seen.remove(&client.key) {
                queue.note_gone(client.key, GoneReason::Disconnected);
                other.ready.notify_one();
            }
        }
    }

    /// Queues a packet; false when nobody with that key is connected.
    fn forward(&self, source: NodePublic, destination: &NodePublic, packet: &[u8]) -> bool {
        let target = lock(&self.clients).get(destination).and_then(|connections| connections.last().cloned());
        let Some(target) = target else {
            self.drop_packet();
            return false;
        };
        if self.mode() == Mode::Blackhole {
            self.drop_packet();
            return true;
        }
        let mut queue = lock(&target.queue);
        if queue.seen.len() < MAX_SEEN {
            queue.seen.insert(source);
        }
        let lane = if is_disco(packet) { &mut queue.disco } else { &mut queue.packets };
        if lane.len() >= QUEUE_PACKETS {
            lane.pop_front();
            self.drop_packet();
        }
        lane.push_back((source, packet.to_vec()));
        drop(queue);
        target.ready.notify_one();
        self.packets.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(u64::try_from(packet.len()).unwrap_or(u64::MAX), Ordering::Relaxed);
        true
    }
}

impl Queue {
    fn note_gone(&mut self, key: NodePublic, reason: GoneReason) {
        if self.gone.len() < QUEUE_NOTES {
            self.gone.push_back((key, reason));
        }
    }

    /// Encodes everything that waits.
    fn drain(&mut self, out: &mut Vec<u8>) {
        for (key, reason) in self.gone.drain(..) {
            Frame::PeerGone(key, reason).encode(out);
        }
        for frame in self.said.drain(..) {
            out.extend_from_slice(&frame);
        }
        if let Some(data) = self.pong.take() {
            Frame::Pong(data).encode(out);
        }
        for (source, packet) in self.disco.drain(..).chain(self.packets.drain(..)) {
            Frame::RecvPacket(source, &packet).encode(out);
        }
    }
}

fn is_disco(packet: &[u8]) -> bool {
    packet.len() >= DISCO_MAGIC.len() + 32 + 24 && packet.starts_with(DISCO_MAGIC)
}

/// Serves one connection: probes, and the upgrade to DERP.
pub(crate) async fn serve<S>(relay: Arc<Relay>, io: S, token: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(move |request| {
        let response = route(&relay, &token, request);
        async move { Ok::<_, Infallible>(response) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(GREETING_TIMEOUT)
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "DERP connection ended");
    }
}

fn route(relay: &Arc<Relay>, token: &CancellationToken, mut request: Request<Incoming>) -> Response<Body> {
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/derp/probe" | "/derp/latency-check") => empty(StatusCode::OK),
        (&Method::GET, "/generate_204") => empty(StatusCode::NO_CONTENT),
        (&Method::GET, "/derp") => {
            let wanted = request.headers().get(header::UPGRADE);
            if !wanted.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"derp")) {
                return text(StatusCode::UPGRADE_REQUIRED, "DERP requires connection upgrade");
            }
            let upgraded = hyper::upgrade::on(&mut request);
            let own = relay.clone();
            tokio::spawn(token.clone().run_until_cancelled_owned(async move {
                match upgraded.await {
                    Ok(io) => {
                        if let Err(error) = own.relay(TokioIo::new(io)).await {
                            tracing::debug!(%error, region = own.id, "DERP client gone");
                        }
                    }
                    Err(error) => tracing::debug!(%error, "upgrade failed"),
                }
            }));
            upgrade_response(relay)
        }
        _ => text(StatusCode::NOT_FOUND, "404 page not found"),
    }
}

fn upgrade_response(relay: &Relay) -> Response<Body> {
    let mut response = empty(StatusCode::SWITCHING_PROTOCOLS);
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, header::HeaderValue::from_static("DERP"));
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("Upgrade"));
    headers.insert("derp-version", PROTOCOL_VERSION.into());
    if let Ok(key) = hex::encode(relay.key.public().as_bytes()).parse() {
        headers.insert("derp-public-key", key);
    }
    response
}

/// Unregisters its client however the connection ends.
struct Registration<'a> {
    relay: &'a Relay,
    client: Arc<Client>,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        self.relay.unregister(&self.client);
    }
}

impl Relay {
    async fn relay<S: AsyncRead + AsyncWrite + Unpin>(&self, io: S) -> Result<(), ClientError> {
        let (mut input, mut output) = tokio::io::split(io);
        let mut frames = FrameReader::new();
        let greeting = self.greet(&mut input, &mut output, &mut frames);
        let key = timeout(GREETING_TIMEOUT, greeting).await.map_err(|_| ClientError::Slow)??;
        let client = Arc::new(Client { key, queue: Mutex::default(), ready: Notify::new() });
        let registration = Registration { relay: self, client };
        self.register(&registration.client);
        self.greeted.fetch_add(1, Ordering::Relaxed);
        // Only now may the client believe that it is reachable here.
        let mut info = Vec::new();
        let mut nonce = [0; 24];
        nonce.copy_from_slice(&random::bytes(24));
        let said = ServerInfo { version: PROTOCOL_VERSION, ..ServerInfo::default() };
        server_info(&self.key, &key, nonce, &said, &mut info)?;
        output.write_all(&info).await?;
        output.flush().await?;
        tokio::select! {
            ended = self.read(&registration.client, &mut input, &mut frames) => ended,
            ended = self.write(&registration.client, &mut output) => ended,
        }
    }

    async fn greet<R, W>(
        &self,
        input: &mut R,
        output: &mut W,
        frames: &mut FrameReader,
    ) -> Result<NodePublic, ClientError>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut hello = Vec::new();
        Frame::ServerKey(self.key.public()).encode(&mut hello);
        output.write_all(&hello).await?;
        output.flush().await?;
        let mut chunk = [0; 4096];
        loop {
            match frames.next_frame()? {
                Some(Frame::ClientInfo(key, body)) => {
                    let info = open_client_info(&self.key, &key, body)?;
                    if info.version < PROTOCOL_VERSION {
                        self.shared.complain(format!("DERP client claims version {}", info.version));
                    }
                    let known = self.shared.with_state(|state| state.node_by_key(&key).is_some());
                    if !known && !self.shared.config.open_relays {
                        return Err(ClientError::Unknown(key));
                    }
                    return Ok(key);
                }
                Some(_) => return Err(ClientError::NoGreeting),
                None => {}
            }
            let count = input.read(&mut chunk).await?;
            if count == 0 {
                return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
            }
            frames.push(&chunk[..count]);
        }
    }

    async fn read<R: AsyncRead + Unpin>(
        &self,
        client: &Arc<Client>,
        input: &mut R,
        frames: &mut FrameReader,
    ) -> Result<(), ClientError> {
        let mut chunk = vec![0; 64 << 10];
        let mut allowance = Allowance::new();
        loop {
            while let Some(frame) = frames.next_frame()? {
                self.handle(client, frame, &mut allowance)?;
            }
            let count = input.read(&mut chunk).await?;
            if count == 0 {
                return Ok(());
            }
            frames.push(&chunk[..count]);
        }
    }

    fn handle(
        &self,
        client: &Arc<Client>,
        frame: Frame<'_>,
        allowance: &mut Allowance,
    ) -> Result<(), ClientError> {
        match frame {
            Frame::SendPacket(_, packet) if packet.len() > MAX_PACKET_BYTES => {
                return Err(ClientError::TooLong(packet.len()));
            }
            Frame::SendPacket(destination, packet) => {
                if !self.forward(client.key, &destination, packet) && is_disco(packet) && allowance.take() {
                    lock(&client.queue).note_gone(destination, GoneReason::NotHere);
                    client.ready.notify_one();
                }
            }
            Frame::Ping(data) if self.mode() == Mode::Up => {
                lock(&client.queue).pong = Some(data);
                client.ready.notify_one();
            }
            // Forward, watch and close need a mesh key.
            Frame::Other(0x0a | 0x10 | 0x11) => return Err(ClientError::Permission),
            Frame::Ping(_)
            | Frame::NotePreferred(_)
            | Frame::ServerKey(_)
            | Frame::ClientInfo(..)
            | Frame::ServerInfo(_)
            | Frame::RecvPacket(..)
            | Frame::KeepAlive
            | Frame::PeerGone(..)
            | Frame::Pong(_)
            | Frame::Health(_)
            | Frame::Restarting(..)
            | Frame::Other(_) => {}
        }
        Ok(())
    }

    async fn write<W: AsyncWrite + Unpin>(&self, client: &Client, output: &mut W) -> Result<(), ClientError> {
        let mut keep_alive = tokio::time::interval(KEEP_ALIVE);
        keep_alive.reset();
        let mut pending = Vec::new();
        loop {
            tokio::select! {
                () = client.ready.notified() => lock(&client.queue).drain(&mut pending),
                _ = keep_alive.tick() => {
                    if self.mode() == Mode::Up {
                        Frame::KeepAlive.encode(&mut pending);
                    }
                }
            }
            let writing = async {
                output.write_all(&pending).await?;
                output.flush().await
            };
            timeout(self.shared.config.write_timeout, writing).await.map_err(|_| ClientError::Slow)??;
            pending.clear();
        }
    }
}

/// A token bucket for "not here" notes.
struct Allowance {
    tokens: f64,
    at: Instant,
}

impl Allowance {
    fn new() -> Self {
        Self { tokens: NOTE_BURST, at: Instant::now() }
    }

    fn take(&mut self) -> bool {
        let now = Instant::now();
        self.tokens = (self.tokens + (now - self.at).as_secs_f64()).min(NOTE_BURST);
        self.at = now;
        let granted = self.tokens >= 1.0;
        if granted {
            self.tokens -= 1.0;
        }
        granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DevnetConfig;
    use podtether_core::key::MachinePrivate;

    fn disco(number: u8) -> Vec<u8> {
        [DISCO_MAGIC.as_slice(), &[number; 60]].concat()
    }

    #[test]
    fn a_full_queue_loses_its_oldest_and_spares_disco() {
        let shared = Shared::new(DevnetConfig::default(), MachinePrivate::generate().unwrap());
        let relay = Relay::new(1, Duration::ZERO, Arc::new(shared), NodePrivate::generate().unwrap());
        let [source, key] = [1, 2].map(|byte| NodePublic::from_bytes([byte; 32]));
        let client = Arc::new(Client { key, queue: Mutex::default(), ready: Notify::new() });
        relay.register(&client);
        assert!(relay.forward(source, &key, &disco(7)));
        for number in 0..100 {
            assert!(relay.forward(source, &key, &[number]));
        }
        assert_eq!(
            relay.stats(),
            RelayStats { clients: 1, packets: 101, bytes: 166, dropped: 68, ..RelayStats::default() }
        );
        let mut reader = FrameReader::new();
        let mut bytes = Vec::new();
        lock(&client.queue).drain(&mut bytes);
        reader.push(&bytes);
        let mut packets = Vec::new();
        while let Some(Frame::RecvPacket(from, packet)) = reader.next_frame().unwrap() {
            assert_eq!(from, source);
            packets.push(packet.to_vec());
        }
        assert_eq!(packets[0], disco(7));
        assert_eq!(packets[1..], (68..100).map(|number| vec![number]).collect::<Vec<_>>());
    }

    #[test]
    fn notes_are_rationed() {
        let mut allowance = Allowance::new();
        assert_eq!([(); 5].map(|()| allowance.take()), [true, true, true, false, false]);
    }
}
