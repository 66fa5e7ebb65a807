//! The tailnet as control describes it: one full message when a session starts, then deltas.
//!
//! A delta costs what it names, never the number of peers. A new session replaces everything, but only
//! when its first message has arrived: until then the last session's map stays in force, so that a
//! control outage does not touch traffic.

use std::collections::BTreeMap;

use crate::health::{HealthMessage, Severity};
use crate::key::DiscoPublic;
use crate::tailcfg::{
    ControlDialPlan, DerpMap, DisplayMessage, DnsConfig, FilterRule, MapResponse, Node, NodeId, PeerChange,
    PingRequest, UnixTime,
};

/// Most peers kept; what a server sends beyond them is dropped and counted in [`NetMapChange::ignored`].
pub const MAX_PEERS: usize = 100_000;
/// Most named parts of the packet filter, and what all of them may take.
const MAX_CHUNKS: usize = 1024;
const MAX_FILTER_BYTES: usize = 16 << 20;
/// Most health texts and display messages kept.
const MAX_MESSAGES: usize = 32;
/// Below this, a difference to the server's clock is noise.
const CLOCK_TOLERANCE_MS: i64 = 60_000;

/// A message that cannot be taken; the session has to start anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// Without this node itself nothing else of a first message has a meaning.
    #[error("the first message of a map session does not contain this node")]
    FirstWithoutNode,
}

/// What one message changed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NetMapChange {
    /// First message of a session: every part is new.
    pub session: bool,
    /// This node: addresses, name, tags, expiry.
    pub self_changed: bool,
    /// MagicDNS configuration.
    pub dns_changed: bool,
    /// Relay map.
    pub derp_changed: bool,
    /// Packet filter.
    pub filter_changed: bool,
    /// Health texts or display messages.
    pub health_changed: bool,
    /// Peers added or changed, each once, in order of their number.
    pub changed: Vec<NodeId>,
    /// Peers that are gone, as they were last known.
    pub removed: Vec<Node>,
    /// A check the server wants answered.
    pub ping_request: Option<PingRequest>,
    /// Where to find the server next time.
    pub dial_plan_changed: bool,
    /// Elements that made no sense: patches of unknown peers, peers over the bound.
    pub ignored: u32,
}

/// The map. One owner; see the module's header.
#[derive(Debug, Default)]
pub struct NetMap {
    awaiting_first: bool,
    self_node: Option<Node>,
    peers: BTreeMap<NodeId, Node>,
    derp_map: DerpMap,
    dns: Option<DnsConfig>,
    domain: String,
    /// `None` until a session brought a filter: then everything inbound is dropped.
    chunks: Option<BTreeMap<String, Vec<FilterRule>>>,
    health: Vec<String>,
    messages: BTreeMap<String, DisplayMessage>,
    clock_offset_ms: i64,
    dial_plan: ControlDialPlan,
    /// A tailnet lock is in force.
    locked: bool,
}

impl NetMap {
    /// An empty map that waits for a session's first message.
    #[must_use]
    pub fn new() -> Self {
        Self { awaiting_first: true, ..Self::default() }
    }

    /// A map taken from a snapshot: in force until the first message of a session replaces it.
    #[must_use]
    pub fn restored(
        self_node: Node,
        peers: Vec<Node>,
        derp_map: DerpMap,
        dns: Option<DnsConfig>,
        filter: Option<Vec<FilterRule>>,
    ) -> Self {
        Self {
            awaiting_first: true,
            self_node: Some(self_node),
            peers: peers.into_iter().take(MAX_PEERS).map(|peer| (peer.id, peer)).collect(),
            derp_map,
            dns,
            chunks: filter.map(|rules| BTreeMap::from([(String::from("base"), rules)])),
            ..Self::default()
        }
    }

    /// A new stream begins; what is known stays until its first message.
    pub fn begin_session(&mut self) {
        self.awaiting_first = true;
    }

    /// This node, once known.
    #[must_use]
    pub fn self_node(&self) -> Option<&Node> {
        self.self_node.as_ref()
    }

    /// All peers, in order of their number.
    pub fn peers(&self) -> impl ExactSizeIterator<Item = &Node> {
        self.peers.values()
    }

    /// The peer with this number.
    #[must_use]
    pub fn peer(&self, id: NodeId) -> Option<&Node> {
        self.peers.get(&id)
    }

    /// Relay map.
    #[must_use]
    pub fn derp_map(&self) -> &DerpMap {
        &self.derp_map
    }

    /// MagicDNS configuration.
    #[must_use]
    pub fn dns(&self) -> Option<&DnsConfig> {
        self.dns.as_ref()
    }

    /// The tailnet's name.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The rules by the name of their chunk. `None` while there is no filter: drop everything.
    #[must_use]
    pub fn packet_filter(&self) -> Option<&BTreeMap<String, Vec<FilterRule>>> {
        self.chunks.as_ref()
    }

    /// All rules, chunks in order of their name.
    pub fn rules(&self) -> impl Iterator<Item = &FilterRule> {
        self.chunks.iter().flat_map(BTreeMap::values).flatten()
    }

    /// Takes over the disco key that a peer itself has told. False when it is the one known, or the peer
    /// is not.
    pub fn set_disco(&mut self, id: NodeId, disco: DiscoPublic) -> bool {
        match self.peers.get_mut(&id) {
            Some(peer) if peer.disco_key != disco => {
                peer.disco_key = disco;
                true
            }
            Some(_) | None => false,
        }
    }

    /// Health texts and display messages, for people.
    pub fn health(&self) -> impl Iterator<Item = HealthMessage> {
        let texts = self.health.iter().map(|text| HealthMessage::new(Severity::Medium, text));
        texts.chain(self.messages.values().map(HealthMessage::from))
    }

    /// Where else the server can be reached.
    #[must_use]
    pub fn dial_plan(&self) -> &ControlDialPlan {
        &self.dial_plan
    }

    /// Milliseconds that this machine's clock is behind the server's, negative when it is ahead; 0 when
    /// they agree to a minute.
    #[must_use]
    pub fn clock_offset_ms(&self) -> i64 {
        self.clock_offset_ms
    }

    /// Whether a tailnet lock is in force, so that peers take signed nodes only.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.locked
    }

    /// The server's time, given ours.
    #[must_use]
    pub fn control_time(&self, wall: UnixTime) -> UnixTime {
        wall.offset_millis(self.clock_offset_ms)
    }

    /// Takes one message; `wall` is this machine's time when it arrived.
    ///
    /// # Errors
    /// [`ApplyError`] when the session cannot go on; nothing was changed then.
    pub fn apply(&mut self, mut message: MapResponse, wall: UnixTime) -> Result<NetMapChange, ApplyError> {
        let mut change =
            NetMapChange { ping_request: message.ping_request.take(), ..NetMapChange::default() };
        if let Some(plan) = message.control_dial_plan.take() {
            change.dial_plan_changed = plan != self.dial_plan;
            self.dial_plan = plan;
        }
        if let Some(time) = message.control_time {
            let offset = time.millis_from(wall);
            self.clock_offset_ms = if offset.abs() > CLOCK_TOLERANCE_MS { offset } else { 0 };
        }
        if message.keep_alive {
            return Ok(change);
        }
        if self.awaiting_first {
            if message.node.is_none() {
                return Err(ApplyError::FirstWithoutNode);
            }
            self.start(&mut change);
        }
        self.apply_self(&mut message, &mut change);
        self.apply_peers(&mut message, &mut change);
        self.apply_filter(&mut message, &mut change);
        self.apply_health(&mut message, &mut change);
        if let Some(lock) = &message.tka_info {
            let locked = !lock.disabled && !lock.head.is_empty();
            change.health_changed |= locked != self.locked;
            self.locked = locked;
        }
        Ok(change)
    }

    fn start(&mut self, change: &mut NetMapChange) {
        self.awaiting_first = false;
        change.session = true;
        change.dns_changed = true;
        change.filter_changed = true;
        change.health_changed = true;
        self.dns = None;
        self.domain.clear();
        self.chunks = None;
        self.health.clear();
        self.messages.clear();
        self.locked = false;
    }

    fn apply_self(&mut self, message: &mut MapResponse, change: &mut NetMapChange) {
        if let Some(node) = message.node.take() {
            change.self_changed = self.self_node.as_ref() != Some(&node);
            self.self_node = Some(node);
        }
        if let Some(update) = message.derp_map.take() {
            let before = self.derp_map.clone();
            self.derp_map.merge(update);
            change.derp_changed = before != self.derp_map;
        }
        if let Some(dns) = message.dns_config.take() {
            change.dns_changed |= self.dns.as_ref() != Some(&dns);
            self.dns = Some(dns);
        }
        if !message.domain.is_empty() {
            self.domain = std::mem::take(&mut message.domain);
        }
    }

    fn apply_peers(&mut self, message: &mut MapResponse, change: &mut NetMapChange) {
        // A first message without peers means that there are none, where in a later one it means
        // that none has changed.
        let full = !message.peers.is_empty();
        if full || change.session {
            self.replace_peers(std::mem::take(&mut message.peers), change);
        }
        if full {
            return;
        }
        for id in std::mem::take(&mut message.peers_removed) {
            if let Some(node) = self.peers.remove(&id) {
                change.removed.push(node);
            }
        }
        for node in std::mem::take(&mut message.peers_changed) {
            self.upsert(node, change);
        }
        for (id, seen) in std::mem::take(&mut message.peer_seen_change) {
            // Only the times of presence change here; nothing of what carries packets does.
            match self.peers.get_mut(&id) {
                Some(peer) if !seen => peer.last_seen = None,
                Some(_) => {}
                None => change.ignored += 1,
            }
        }
        for (id, online) in std::mem::take(&mut message.online_change) {
            match self.peers.get_mut(&id) {
                Some(peer) => {
                    if peer.online != Some(online) {
                        peer.online = Some(online);
                        change.changed.push(id);
                    }
                }
                None => change.ignored += 1,
            }
        }
        for patch in std::mem::take(&mut message.peers_changed_patch) {
            self.patch(patch, change);
        }
        change.changed.sort_unstable();
        change.changed.dedup();
        // Removed and named again in the same message: it is there.
        let peers = &self.peers;
        change.changed.retain(|id| peers.contains_key(id));
        change.removed.retain(|node| !peers.contains_key(&node.id));
    }

    fn replace_peers(&mut self, peers: Vec<Node>, change: &mut NetMapChange) {
        let mut old = std::mem::take(&mut self.peers);
        for mut node in peers {
            node.condense();
            if self.peers.len() == MAX_PEERS {
                change.ignored += 1;
                continue;
            }
            let id = node.id;
            if old.remove(&id).as_ref() != Some(&node) {
                change.changed.push(id);
            }
            self.peers.insert(id, node);
        }
        change.changed.sort_unstable();
        change.changed.dedup();
        change.removed.extend(old.into_values());
    }

    fn upsert(&mut self, mut node: Node, change: &mut NetMapChange) {
        node.condense();
        let known = self.peers.get(&node.id);
        if known.is_none() && self.peers.len() >= MAX_PEERS {
            change.ignored += 1;
            return;
        }
        if known != Some(&node) {
            change.changed.push(node.id);
            self.peers.insert(node.id, node);
        }
    }

    fn patch(&mut self, patch: PeerChange, change: &mut NetMapChange) {
        let Some(peer) = self.peers.get_mut(&patch.node_id) else {
            change.ignored += 1;
            return;
        };
        if patch.derp_region.is_some() {
            peer.home_derp = patch.derp_region;
        }
        if patch.cap != 0 {
            peer.cap = patch.cap;
        }
        if let Some(cap_map) = patch.cap_map {
            peer.cap_map = cap_map;
        }
        if let Some(endpoints) = patch.endpoints {
            peer.endpoints = endpoints;
        }
        if let Some(key) = patch.key.filter(|key| !key.is_zero()) {
            peer.key = key;
        }
        if let Some(disco) = patch.disco_key.filter(|key| !key.is_zero()) {
            peer.disco_key = disco;
        }
        if let Some(online) = patch.online {
            peer.online = Some(online);
        }
        if let Some(seen) = patch.last_seen {
            peer.last_seen = Some(seen);
        }
        if let Some(expiry) = patch.key_expiry {
            // Go's zero time says "never".
            peer.key_expiry = (expiry.as_millis() > 0).then_some(expiry);
        }
        change.changed.push(patch.node_id);
    }

    fn apply_filter(&mut self, message: &mut MapResponse, change: &mut NetMapChange) {
        if let Some(rules) = message.packet_filter.take() {
            self.set_chunk(String::from("base"), rules, change);
        }
        if let Some(updates) = message.packet_filters.take() {
            let chunks = self.chunks.get_or_insert_default();
            if matches!(updates.get("*"), Some(None)) {
                chunks.clear();
            }
            for (name, rules) in updates {
                match rules {
                    Some(rules) => self.set_chunk(name, rules, change),
                    None => {
                        self.chunks.get_or_insert_default().remove(&name);
                    }
                }
            }
            change.filter_changed = true;
        }
    }

    /// Rules over the bounds are left out, which opens nothing.
    fn set_chunk(&mut self, name: String, mut rules: Vec<FilterRule>, change: &mut NetMapChange) {
        change.filter_changed = true;
        let chunks = self.chunks.get_or_insert_default();
        chunks.remove(&name);
        let mut left = MAX_FILTER_BYTES
            .saturating_sub(chunks.values().flatten().map(FilterRule::footprint).sum())
            .saturating_sub(name.len());
        let fit = rules.iter().take_while(|rule| {
            let rest = left.checked_sub(rule.footprint());
            left = rest.unwrap_or(left);
            rest.is_some()
        });
        let fit = fit.count();
        if chunks.len() >= MAX_CHUNKS || fit < rules.len() {
            change.ignored =
                change.ignored.saturating_add(u32::try_from(rules.len() - fit).unwrap_or(1).max(1));
            rules.truncate(fit);
        }
        if chunks.len() < MAX_CHUNKS {
            rules.shrink_to_fit();
            chunks.insert(name, rules);
        }
    }

    fn apply_health(&mut self, message: &mut MapResponse, change: &mut NetMapChange) {
        if let Some(mut health) = message.health.take() {
            health.truncate(MAX_MESSAGES);
            change.health_changed |= health != self.health;
            self.health = health;
        }
        if let Some(updates) = message.display_messages.take() {
            if matches!(updates.get("*"), Some(None)) {
                self.messages.clear();
            }
            for (id, text) in updates {
                match text {
                    Some(text) if self.messages.len() < MAX_MESSAGES || self.messages.contains_key(&id) => {
                        self.messages.insert(id, text);
                    }
                    Some(_) => change.ignored += 1,
                    None => {
                        self.messages.remove(&id);
                    }
                }
            }
            change.health_changed = true;
        }
    }
}

#[cfg(test)]
mod tests;
