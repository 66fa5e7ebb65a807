//! The handle on a running devnet: what its holder can see and do.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use podtether_core::key::{DiscoPublic, MachinePublic, NodePublic};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::acl::Policy;
use crate::api;
use crate::config::RegionConfig;
use crate::control::crowd::Crowd;
use crate::control::state::{AuthKey, AuthKeyOptions, NewNode, Node, NodeId};
use crate::control::wire::{self, Hostinfo};
use crate::control::{map, register};
use crate::derp::{Mode, Relay};
use crate::fault::{Fault, Target};
use crate::random;
use crate::shared::Shared;
use crate::sync::lock;

/// A running devnet. Clones are handles on the same one, usable from any thread; it stops when the last
/// is dropped.
#[derive(Clone)]
pub struct Devnet {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) root_pem: String,
    pub(crate) http: Vec<SocketAddr>,
    pub(crate) https: Vec<SocketAddr>,
    pub(crate) relays: Vec<Arc<Relay>>,
    pub(crate) regions: Vec<RegionConfig>,
    pub(crate) stop: CancellationToken,
    #[expect(dead_code, reason = "held for its drop")]
    pub(crate) stop_on_drop: DropGuard,
    pub(crate) stopped: watch::Receiver<bool>,
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
    /// Routes that others send to it: exit routes, and those it is primary for.
    pub routes: Vec<IpNet>,
    /// Has, or recently had, a map stream.
    pub online: bool,
    /// Has a map stream now.
    pub streaming: bool,
    /// Its key is past its expiry.
    pub expired: bool,
    /// Approved, or in no need of it.
    pub authorized: bool,
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
            routes: node.routes.clone(),
            online: node.online,
            streaming: node.streaming,
            expired: node.expired,
            authorized: node.authorized,
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
    /// Its time is over.
    pub expired: bool,
    /// Who made it, or owns its nodes when it has no tags.
    pub user: Option<u64>,
}

impl From<&AuthKey> for AuthKeyInfo {
    fn from(key: &AuthKey) -> Self {
        Self {
            id: key.id.clone(),
            secret: key.secret.clone(),
            used: key.used,
            revoked: key.revoked.is_some(),
            expired: key.expires <= Timestamp::now(),
            user: key.user,
        }
    }
}

impl Devnet {
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

    /// The DERP regions, with the ports they got.
    #[must_use]
    pub fn regions(&self) -> Vec<RegionConfig> {
        self.inner.regions.clone()
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
        AuthKeyInfo::from(&key)
    }

    /// All auth keys, made here or through the API.
    #[must_use]
    pub fn auth_keys(&self) -> Vec<AuthKeyInfo> {
        self.shared().with_state(|state| state.keys.values().map(AuthKeyInfo::from).collect())
    }

    /// Access tokens that the admin API gave away lately.
    #[must_use]
    pub fn api_tokens(&self) -> Vec<String> {
        self.shared().tokens.all()
    }

    /// Revokes an auth key; false when it is not there or was revoked before.
    pub fn revoke_auth_key(&self, id: &str) -> bool {
        self.shared().with_state(|state| api::revoke_key(state, id))
    }

    /// The admin API's key, empty unless it is Headscale's.
    #[must_use]
    pub fn api_key(&self) -> String {
        self.shared().tokens.api_key()
    }

    /// Gives the admin API another key; the one before it is refused from then on.
    pub fn set_api_key(&self, key: &str) {
        self.shared().tokens.set_api_key(key);
    }

    /// Adds a user and gives its number.
    pub fn add_user(&self, name: &str, display_name: &str) -> u64 {
        let (name, display_name) = (name.to_owned(), display_name.to_owned());
        self.shared().with_state(|state| state.add_user(name, display_name, None, Timestamp::now()))
    }

    /// Gives a user other names; false when there is none of this number.
    pub fn rename_user(&self, id: u64, name: &str, display_name: &str) -> bool {
        let (name, display_name) = (name.to_owned(), Some(display_name.to_owned()));
        self.shared().with_state(|state| state.rename_user(id, name, display_name))
    }

    /// Forgets nodes, keys and logins, as a server whose database was removed; users stay.
    pub fn wipe(&self) {
        let shared = self.shared();
        shared.with_state(|state| state.wipe(&shared.config));
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
            state.settle_routes();
        });
    }

    /// Approves exactly these routes of a node, of which only those count that it advertises; false when
    /// there is no such node. One default route stands for both.
    pub fn approve_routes(&self, id: NodeId, routes: &[IpNet]) -> bool {
        self.shared().with_state(|state| state.approve_routes(id, routes))
    }

    /// Lets a node carry routes that it does not advertise; false when there is no such node.
    pub fn grant_routes(&self, id: NodeId, routes: Vec<IpNet>) -> bool {
        self.shared().with_state(|state| state.grant_routes(id, routes))
    }

    /// A field of what a node last said about its host.
    #[must_use]
    pub fn hostinfo(&self, id: NodeId, field: &str) -> Option<serde_json::Value> {
        self.shared().with_state(|state| state.nodes.get(&id)?.hostinfo.get(field).cloned())
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

    /// Forgets every interactive login that waits: its URL leads nowhere any more.
    pub fn forget_logins(&self) {
        self.shared().with_state(|state| {
            state.pending.clear();
            state.revision += 1;
        });
    }

    /// Whether nodes that join from now on have to be approved, unless their auth key says otherwise.
    pub fn set_device_approval(&self, needed: bool) {
        self.shared().with_state(|state| state.device_approval = needed);
    }

    /// Approves a node, or takes the approval back; false when there is no such node.
    pub fn set_authorized(&self, id: NodeId, authorized: bool) -> bool {
        self.shared().with_state(|state| state.set_authorized(id, authorized))
    }

    /// Refuses every registration with this text, or none.
    pub fn refuse_registrations(&self, error: Option<&str>) {
        self.shared().set_registration_error(error.map(str::to_owned));
    }

    /// Lets the server claim another time than it is, in the messages from now on.
    pub fn set_clock_offset(&self, offset: SignedDuration) {
        self.shared().set_clock_offset(offset);
    }

    /// Sends a map message with these fields to a node that has a stream, or to its next one; false when
    /// there is no such node or `fields` is no object.
    pub fn tell(&self, id: NodeId, fields: serde_json::Value) -> bool {
        const MAX_EXTRAS: usize = 64;
        let serde_json::Value::Object(fields) = fields else { return false };
        self.shared().with_state(|state| {
            let Some(node) = state.nodes.get_mut(&id).filter(|node| node.extras.len() < MAX_EXTRAS) else {
                return false;
            };
            node.extras.push_back(fields);
            state.revision += 1;
            true
        })
    }

    /// Sends these bytes, framed as a map message, to a node that has a stream, or to its next one, before
    /// what [`Self::tell`] sends; false when there is no such node.
    pub fn tell_raw(&self, id: NodeId, bytes: &[u8]) -> bool {
        self.shared().with_state(|state| {
            let Some(node) = state.nodes.get_mut(&id) else { return false };
            node.raw.push_back(bytes.to_vec());
            state.revision += 1;
            true
        })
    }

    /// Sends these bytes, framed as a map message, ahead of every session's first one; or nothing.
    pub fn set_first_message(&self, bytes: Option<&[u8]>) {
        *lock(&self.shared().first_message) = bytes.map(<[u8]>::to_vec);
    }

    /// Changes how many peers are in netmaps alone, for sessions that begin from now on, and how much is
    /// told of them.
    pub fn set_crowd(&self, crowd: Crowd) {
        self.shared().crowd.send_replace(crowd);
    }

    /// Messages about those peers so far, to each session that was open.
    #[must_use]
    pub fn deltas_made(&self) -> u64 {
        self.shared().deltas_made.load(Ordering::Relaxed)
    }

    /// Lets a node's key expire now.
    pub fn expire_node(&self, id: NodeId) {
        let now = Timestamp::now();
        self.shared().with_state(|state| state.set_expiry(id, Some(now), now));
    }

    /// Adds a node that no client runs, and gives its stable id; empty when the tailnet is full.
    #[must_use]
    pub fn add_node(&self, hostname: &str) -> String {
        self.add_node_of(hostname, &[], "", Duration::ZERO)
    }

    /// As [`Devnet::add_node`], with tags and a client's version, last seen `away` ago.
    #[must_use]
    pub fn add_node_of(&self, hostname: &str, tags: &[&str], version: &str, away: Duration) -> String {
        let mut hostinfo = Hostinfo::new();
        hostinfo.insert("Hostname".into(), hostname.into());
        hostinfo.insert("IPNVersion".into(), version.into());
        let seen =
            SignedDuration::try_from(away).ok().and_then(|away| Timestamp::now().checked_sub(away).ok());
        let (machine_key, node_key) = (random::bytes(32), random::bytes(32));
        let key = |bytes: Vec<u8>| <[u8; 32]>::try_from(bytes).unwrap_or_default();
        let new = NewNode {
            machine_key: MachinePublic::from_bytes(key(machine_key)),
            node_key: NodePublic::from_bytes(key(node_key)),
            hostinfo,
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            ephemeral: false,
            preauthorized: true,
            user: wire::USER,
            expiry: None,
            version: wire::MIN_VERSION,
        };
        self.shared().with_state(|state| {
            let id = state.add_node(new, seen.unwrap_or_else(Timestamp::now)).unwrap_or_default();
            state.nodes.get(&id).map(|node| node.stable_id.clone()).unwrap_or_default()
        })
    }

    /// Removes a node: its stream ends, and it is unknown from then on.
    pub fn delete_node(&self, id: NodeId) -> bool {
        self.shared().with_state(|state| state.remove_node(id))
    }

    /// Removes a node as Headscale does: its stream stays open and has keepalives, but no news.
    pub fn delete_node_silently(&self, id: NodeId) -> bool {
        self.shared().with_state(|state| {
            state.unaware.extend(state.nodes.get(&id).map(|node| node.session));
            state.remove_node(id)
        })
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
        self.ask(id, types, None, payload, patience).await
    }

    /// Asks a node to ping a peer and waits for what it says: `types` is one of `disco`, `TSMP`, `ICMP`,
    /// `peerapi`.
    ///
    /// # Errors
    /// When the node does not answer in time.
    pub async fn ping_peer(
        &self,
        id: NodeId,
        types: &str,
        peer: IpAddr,
        patience: Duration,
    ) -> Result<Vec<u8>, &'static str> {
        self.ask(id, types, Some(peer), b"", patience).await
    }

    async fn ask(
        &self,
        id: NodeId,
        types: &str,
        peer: Option<IpAddr>,
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
        if !shared.with_state(|state| map::queue_ping(state, id, url, types, peer, payload)) {
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

    /// Requests that came to `target` until now, whatever they were answered.
    #[must_use]
    pub fn calls(&self, target: Target) -> u64 {
        self.shared().faults.calls(target)
    }

    /// Takes a fault away.
    pub fn clear_fault(&self, target: Target) {
        self.shared().faults.clear(target);
    }

    /// Cuts every connection to the control server and admin API, without refusing new ones.
    pub fn drop_connections(&self) {
        self.shared().gate.send_modify(|gate| gate.cut += 1);
    }

    /// Closes the listeners and their connections, so that connecting is refused, or opens them again.
    pub fn set_refusing(&self, refusing: bool) {
        self.shared().gate.send_if_modified(|gate| gate.set_open(!refusing));
    }

    /// Holds map streams open and sends nothing on them, not even keepalives.
    pub fn set_stalled(&self, stalled: bool) {
        self.shared().stalled.send_replace(stalled);
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
