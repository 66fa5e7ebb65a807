//! A running devnet and what its holder can do with it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use podtether_core::key::{DiscoPublic, MachinePrivate, NodePrivate, NodePublic};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::acl::Policy;
use crate::api;
use crate::ca::Authority;
use crate::config::{DevnetConfig, RegionConfig};
use crate::control::state::{AuthKeyOptions, Node, NodeId};
use crate::control::{map, register, wire};
use crate::derp::{self, Mode, Relay, RelayStats};
use crate::fault::{Fault, Target};
use crate::http_server;
use crate::listen::{self, Gate};
use crate::random;
use crate::shared::Shared;
use crate::stun;

/// Why a devnet did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address that cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
    /// A certificate could not be made.
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The TLS settings do not fit together.
    #[error("tls: {0}")]
    Tls(#[from] rustls::Error),
    /// A setting makes no sense.
    #[error("{0}")]
    Config(String),
    /// A thread or its preparation failed.
    #[error("thread: {0}")]
    Thread(io::Error),
    /// No randomness for keys.
    #[error(transparent)]
    Random(#[from] podtether_core::key::RandomError),
}

/// A running devnet. Clones are handles on the same one, usable from any thread; it stops when the last
/// is dropped.
#[derive(Clone)]
pub struct Devnet {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    root_pem: String,
    http: Vec<SocketAddr>,
    https: Vec<SocketAddr>,
    gate: watch::Sender<Gate>,
    relays: Vec<Arc<Relay>>,
    stop: CancellationToken,
    _stop_on_drop: DropGuard,
    stopped: watch::Receiver<bool>,
}

/// A node as the control server sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeInfo {
    /// Numeric id.
    pub id: u64,
    /// The id that never changes hands.
    pub stable_id: String,
    /// First DNS label.
    pub name: String,
    /// Tailnet addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Tags.
    pub tags: Vec<String>,
    /// WireGuard key.
    pub node_key: NodePublic,
    /// Path discovery key; zero when it never sent one.
    pub disco_key: DiscoPublic,
    /// Announced endpoints.
    pub endpoints: Vec<SocketAddr>,
    /// Home region, 0 for none.
    pub home_derp: u32,
    /// Has, or recently had, a map stream.
    pub online: bool,
    /// Has a map stream now.
    pub streaming: bool,
    /// Its key is past its expiry.
    pub expired: bool,
    /// Forgotten when away.
    pub ephemeral: bool,
    /// Map sessions are numbered in order of their start.
    pub session: u64,
}

impl From<&Node> for NodeInfo {
    fn from(node: &Node) -> Self {
        Self {
            id: node.id,
            stable_id: node.stable_id.clone(),
            name: node.name.clone(),
            addresses: node.addresses.clone(),
            tags: node.tags.clone(),
            node_key: node.node_key,
            disco_key: node.disco_key,
            endpoints: node.endpoints.clone(),
            home_derp: node.home_derp,
            online: node.online,
            streaming: node.streaming,
            expired: node.expired,
            ephemeral: node.ephemeral,
            session: node.session,
        }
    }
}

/// A made auth key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthKeyInfo {
    /// What the API calls it.
    pub id: String,
    /// What a client presents.
    pub secret: String,
    /// A node was registered with it.
    pub used: bool,
    /// It was revoked.
    pub revoked: bool,
}

impl Devnet {
    /// Starts a devnet on the current tokio runtime.
    ///
    /// # Errors
    /// When an address cannot be bound or the settings make no sense.
    pub async fn start(config: DevnetConfig) -> Result<Self, StartError> {
        let mut config = config;
        check(&config)?;
        for secret in [&mut config.oauth.client_id, &mut config.oauth.client_secret] {
            if secret.is_empty() {
                *secret = random::token(16);
            }
        }
        let authority = Authority::new(certificate_names(&config))?;
        let http = bind(&config.http_listen).await?;
        let https = bind(&config.https_listen).await?;
        let shared = Arc::new(Shared::new(config, MachinePrivate::generate()?));
        let stop = CancellationToken::new();
        let (gate, open) = watch::channel(Gate::OPEN);
        let mut tasks = tokio::task::JoinSet::new();
        let mut http_addresses = Vec::new();
        for (listener, address) in http {
            http_addresses.push(address);
            let shared = shared.clone();
            tasks.spawn(listen::accept(listener, open.clone(), move |stream, token| {
                http_server::serve(shared.clone(), stream, token)
            }));
        }
        let mut https_addresses = Vec::new();
        for (listener, address) in https {
            https_addresses.push(address);
            let (shared, acceptor) = (shared.clone(), authority.acceptor.clone());
            tasks.spawn(listen::accept(listener, open.clone(), move |stream, token| {
                let (shared, acceptor) = (shared.clone(), acceptor.clone());
                async move {
                    match acceptor.accept(stream).await {
                        Ok(stream) => http_server::serve(shared, stream, token).await,
                        Err(error) => tracing::debug!(%error, "TLS handshake failed"),
                    }
                }
            }));
        }
        shared.set_server_url(match (http_addresses.first(), https_addresses.first()) {
            (Some(address), _) => format!("http://{address}"),
            (None, Some(address)) => format!("https://{address}"),
            (None, None) => String::new(),
        });
        let mut relays = Vec::new();
        let mut regions = std::collections::BTreeMap::new();
        for region in &shared.config.regions {
            let relay = Arc::new(Relay::new(region.id, shared.clone(), NodePrivate::generate()?));
            let ports = start_region(region, &relay, &authority, &mut tasks).await?;
            regions.insert(region.id, region_json(region, ports, &shared.config.base_domain));
            relays.push(relay);
        }
        let map = wire::DerpMap { regions, omit_default_regions: true };
        shared.with_state(|state| state.set_derp_map(map));
        tasks.spawn(pass_time(shared.clone()));
        let (finished, stopped) = watch::channel(false);
        let stopping = stop.clone();
        tokio::spawn(async move {
            stopping.cancelled().await;
            tasks.shutdown().await;
            finished.send_replace(true);
        });
        Ok(Self {
            inner: Arc::new(Inner {
                shared,
                root_pem: authority.root_pem,
                http: http_addresses,
                https: https_addresses,
                gate,
                relays,
                _stop_on_drop: stop.clone().drop_guard(),
                stop,
                stopped,
            }),
        })
    }

    /// Starts a devnet on a thread of its own, which runs `enter` before anything else: there it can
    /// step into the network namespace whose addresses the configuration names.
    ///
    /// # Errors
    /// As [`Devnet::start`], and when `enter` fails.
    pub fn spawn_thread(
        config: DevnetConfig,
        enter: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<Self, StartError> {
        let (started, result) = std::sync::mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("devnet".into())
            .spawn(move || {
                let runtime = enter()
                    .and_then(|()| tokio::runtime::Builder::new_current_thread().enable_all().build())
                    .map_err(StartError::Thread);
                let runtime = match runtime {
                    Ok(runtime) => runtime,
                    Err(error) => {
                        let _ = started.send(Err(error));
                        return;
                    }
                };
                runtime.block_on(async move {
                    let devnet = Self::start(config).await;
                    let stopped = devnet.as_ref().ok().map(|devnet| devnet.inner.stopped.clone());
                    let _ = started.send(devnet);
                    if let Some(mut stopped) = stopped {
                        let _ = stopped.wait_for(|stopped| *stopped).await;
                    }
                });
            })
            .map_err(StartError::Thread)?;
        result.recv().map_err(|error| StartError::Thread(io::Error::other(error)))?
    }

    /// Stops everything and waits until all sockets are closed.
    pub async fn stop(&self) {
        self.inner.stop.cancel();
        let _ = self.inner.stopped.clone().wait_for(|stopped| *stopped).await;
    }

    fn shared(&self) -> &Shared {
        &self.inner.shared
    }

    /// Where the plain control server and admin API listen.
    #[must_use]
    pub fn http_addresses(&self) -> &[SocketAddr] {
        &self.inner.http
    }

    /// Where the TLS ones listen.
    #[must_use]
    pub fn https_addresses(&self) -> &[SocketAddr] {
        &self.inner.https
    }

    /// URL of the first plain listener, empty without one.
    #[must_use]
    pub fn http_url(&self) -> String {
        self.inner.http.first().map(|address| format!("http://{address}")).unwrap_or_default()
    }

    /// URL of the first TLS listener, empty without one.
    #[must_use]
    pub fn https_url(&self) -> String {
        self.inner.https.first().map(|address| format!("https://{address}")).unwrap_or_default()
    }

    /// The root certificate that TLS listeners and relays are trusted by.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.inner.root_pem
    }

    /// Id and secret of the admin API's OAuth client.
    #[must_use]
    pub fn oauth_client(&self) -> (&str, &str) {
        let oauth = &self.shared().config.oauth;
        (&oauth.client_id, &oauth.client_secret)
    }

    /// MagicDNS suffix.
    #[must_use]
    pub fn base_domain(&self) -> &str {
        &self.shared().config.base_domain
    }

    /// Makes an auth key.
    #[must_use]
    pub fn create_auth_key(&self, options: AuthKeyOptions) -> AuthKeyInfo {
        let key = self.shared().with_state(|state| state.create_key(options, Timestamp::now()));
        AuthKeyInfo { id: key.id, secret: key.secret, used: false, revoked: false }
    }

    /// All auth keys, made here or through the API.
    #[must_use]
    pub fn auth_keys(&self) -> Vec<AuthKeyInfo> {
        self.shared().with_state(|state| {
            let info = |key: &crate::control::state::AuthKey| AuthKeyInfo {
                id: key.id.clone(),
                secret: key.secret.clone(),
                used: key.used,
                revoked: key.revoked.is_some(),
            };
            state.keys.values().map(info).collect()
        })
    }

    /// Revokes an auth key; false when it is not there or was revoked before.
    pub fn revoke_auth_key(&self, id: &str) -> bool {
        self.shared().with_state(|state| api::revoke_key(state, id))
    }

    /// Makes every admin API token invalid.
    pub fn revoke_tokens(&self) {
        self.shared().tokens.revoke_all();
    }

    /// Replaces the access rules; nodes get their new filters at once.
    pub fn set_policy(&self, policy: Option<Policy>) {
        self.shared().with_state(|state| {
            state.policy = policy;
            state.touch_topology();
        });
    }

    /// All nodes, by id.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeInfo> {
        self.shared().with_state(|state| state.nodes.values().map(NodeInfo::from).collect())
    }

    /// The node with this first DNS label.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<NodeInfo> {
        self.nodes().into_iter().find(|node| node.name == name)
    }

    /// Waits until the nodes are as wanted; false when that took longer than `patience`.
    pub async fn wait_for(&self, patience: Duration, wanted: impl Fn(&[NodeInfo]) -> bool) -> bool {
        let mut changed = self.shared().changed.subscribe();
        let reached = async {
            loop {
                changed.mark_unchanged();
                if wanted(&self.nodes()) {
                    return true;
                }
                if changed.changed().await.is_err() {
                    return false;
                }
            }
        };
        tokio::time::timeout(patience, reached).await.unwrap_or(false)
    }

    /// Lets an interactive login in, given the URL the client was told.
    ///
    /// # Errors
    /// When no such login waits.
    pub fn approve_login(&self, url: &str) -> Result<(), String> {
        let id = url.rsplit('/').next().unwrap_or_default();
        let shared = self.shared();
        shared.with_state(|state| register::approve(&shared.config, state, id, Timestamp::now()))
    }

    /// Lets a node's key expire now.
    pub fn expire_node(&self, id: NodeId) {
        let now = Timestamp::now();
        self.shared().with_state(|state| state.set_expiry(id, Some(now), now));
    }

    /// Removes a node: its stream ends, and it is unknown from then on.
    pub fn delete_node(&self, id: NodeId) -> bool {
        self.shared().with_state(|state| state.remove_node(id))
    }

    /// Sends a ping request on the node's map stream and waits for its answer. `types` is empty for the
    /// plain liveness check, or `c2n` with an HTTP/1 request as `payload`.
    ///
    /// # Errors
    /// When the node does not answer in time.
    pub async fn ping(
        &self,
        id: NodeId,
        types: &str,
        payload: &[u8],
        patience: Duration,
    ) -> Result<Vec<u8>, &'static str> {
        let shared = self.shared();
        let (sender, answer) = oneshot::channel();
        let ping = random::token(16);
        let url = if types.is_empty() {
            format!("{}/machine/ping-response?id={ping}", shared.server_url())
        } else {
            format!("https://unused/machine/c2n-response?id={ping}")
        };
        shared.expect_ping(ping.clone(), sender);
        if !shared.with_state(|state| map::queue_ping(state, id, url, types, payload)) {
            shared.forget_ping(&ping);
            return Err("no such node, or too many pings");
        }
        let answer = tokio::time::timeout(patience, answer).await;
        shared.forget_ping(&ping);
        answer.map_err(|_| "no answer in time")?.map_err(|_| "devnet stopped")
    }

    /// What clients did that real servers let pass although it is wrong.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        self.shared().complaints()
    }

    /// Puts a fault on a kind of request.
    pub fn set_fault(&self, target: Target, fault: Fault) {
        self.shared().faults.set(target, fault);
    }

    /// Takes a fault away.
    pub fn clear_fault(&self, target: Target) {
        self.shared().faults.clear(target);
    }

    /// Cuts every connection to the control server and admin API, without refusing new ones.
    pub fn drop_connections(&self) {
        self.inner.gate.send_modify(|gate| gate.cut += 1);
    }

    /// Closes the listeners and their connections, so that connecting is refused, or opens them again.
    pub fn set_refusing(&self, refusing: bool) {
        self.inner.gate.send_modify(|gate| gate.open = !refusing);
    }

    /// Holds map streams open and sends nothing on them, not even keepalives.
    pub fn set_stalled(&self, stalled: bool) {
        self.shared().stalled.send_replace(stalled);
    }

    fn relay(&self, region: u32) -> Option<&Arc<Relay>> {
        self.inner.relays.iter().find(|relay| relay.id == region)
    }

    /// Makes a region work, refuse, or swallow everything; false when there is no such region.
    pub fn set_region(&self, region: u32, mode: Mode) -> bool {
        self.relay(region).map(|relay| relay.set_mode(mode)).is_some()
    }

    /// Cuts every connection of a region's relay; false when there is no such region.
    pub fn restart_region(&self, region: u32) -> bool {
        self.relay(region).map(|relay| relay.restart()).is_some()
    }

    /// What a region's relay did so far.
    #[must_use]
    pub fn region_stats(&self, region: u32) -> Option<RelayStats> {
        self.relay(region).map(|relay| relay.stats())
    }

    /// Whether the node with this key is connected to a region's relay.
    #[must_use]
    pub fn is_on_relay(&self, region: u32, key: &NodePublic) -> bool {
        self.relay(region).is_some_and(|relay| relay.has_client(key))
    }

    /// Ends every fault.
    pub fn clear_faults(&self) {
        for relay in &self.inner.relays {
            relay.set_mode(Mode::Up);
        }
        self.shared().faults.clear_all();
        self.set_stalled(false);
        self.set_refusing(false);
    }
}

fn check(config: &DevnetConfig) -> Result<(), StartError> {
    let domain = &config.base_domain;
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if !domain.split('.').all(label) || domain.len() > 180 {
        return Err(StartError::Config(format!("base domain {domain:?} is not a domain name")));
    }
    if config.keep_alive.is_zero() {
        return Err(StartError::Config("keep-alive interval is zero".into()));
    }
    let mut ids = std::collections::BTreeSet::new();
    for region in &config.regions {
        if region.id == 0 || !ids.insert(region.id) {
            return Err(StartError::Config(format!("region id {} is zero or used twice", region.id)));
        }
        let families: std::collections::BTreeSet<bool> =
            region.addresses.iter().map(IpAddr::is_ipv4).collect();
        if region.addresses.is_empty() || families.len() != region.addresses.len() {
            let id = region.id;
            return Err(StartError::Config(format!("region {id} needs one address per family at most")));
        }
    }
    Ok(())
}

fn certificate_names(config: &DevnetConfig) -> Vec<String> {
    let mut names = config.tls_names.clone();
    names.push("localhost".into());
    let listeners = config.http_listen.iter().chain(&config.https_listen).map(SocketAddr::ip);
    let regions = config.regions.iter().flat_map(|region| region.addresses.iter().copied());
    names.extend(listeners.chain(regions).map(|address| address.to_string()));
    names.extend(config.regions.iter().map(|region| region.host_name(&config.base_domain)));
    names.sort();
    names.dedup();
    names
}

/// Ports of a region's relay and STUN server.
#[derive(Clone, Copy, Default)]
struct RegionPorts {
    derp: u16,
    stun: u16,
}

/// Listens on all addresses of a region, on the same ports.
async fn start_region(
    region: &RegionConfig,
    relay: &Arc<Relay>,
    authority: &Authority,
    tasks: &mut tokio::task::JoinSet<()>,
) -> Result<RegionPorts, StartError> {
    let mut ports = RegionPorts { derp: region.derp_port, stun: region.stun_port };
    for &ip in &region.addresses {
        let (listener, address) = bind_one(SocketAddr::new(ip, ports.derp)).await?;
        ports.derp = address.port();
        let (own, acceptor) = (relay.clone(), authority.acceptor.clone());
        tasks.spawn(listen::accept(listener, relay.gate.subscribe(), move |stream, token| {
            let (relay, acceptor) = (own.clone(), acceptor.clone());
            async move {
                match acceptor.accept(stream).await {
                    Ok(stream) => derp::serve(relay, stream, token).await,
                    Err(error) => tracing::debug!(%error, "TLS handshake failed"),
                }
            }
        }));
        let address = SocketAddr::new(ip, ports.stun);
        let listen_error = |error| StartError::Listen { address, error };
        let socket = UdpSocket::bind(address).await.map_err(listen_error)?;
        ports.stun = socket.local_addr().map_err(listen_error)?.port();
        tasks.spawn(stun::serve(socket, relay.clone()));
    }
    Ok(ports)
}

fn region_json(region: &RegionConfig, ports: RegionPorts, base_domain: &str) -> wire::DerpRegion {
    let address = |wanted: fn(&IpAddr) -> bool| {
        region.addresses.iter().find(|ip| wanted(ip)).map_or_else(|| "none".into(), ToString::to_string)
    };
    wire::DerpRegion {
        region_id: region.id,
        region_code: region.code.clone(),
        region_name: format!("Region {}", region.id),
        nodes: vec![wire::DerpNode {
            name: format!("{}a", region.id),
            region_id: region.id,
            host_name: region.host_name(base_domain),
            ipv4: address(IpAddr::is_ipv4),
            ipv6: address(IpAddr::is_ipv6),
            stun_port: ports.stun,
            derp_port: ports.derp,
        }],
    }
}

async fn bind_one(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let listen_error = |error| StartError::Listen { address, error };
    let listener = TcpListener::bind(address).await.map_err(listen_error)?;
    let actual = listener.local_addr().map_err(listen_error)?;
    Ok((listener, actual))
}

async fn bind(addresses: &[SocketAddr]) -> Result<Vec<(TcpListener, SocketAddr)>, StartError> {
    let mut bound = Vec::with_capacity(addresses.len());
    for &address in addresses {
        bound.push(bind_one(address).await?);
    }
    Ok(bound)
}

async fn pass_time(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    loop {
        ticks.tick().await;
        shared.with_state(|state| state.tick(&shared.config, Timestamp::now()));
    }
}
