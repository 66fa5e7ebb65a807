//! The whole tailnet, in memory: nodes, keys, policy, and who may see whom.
//!
//! Every node carries the revision of its last change. `topology` is the revision of the last change
//! that can alter who sees whom or any filter: a node came, went, or changed its name, tags or
//! addresses, or the policy changed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use podtether_core::key::{DiscoPublic, MachinePublic, NodePublic};
use serde_json::Value;

use super::kinds::Kinds;
use super::shares::Shares;
use super::wire::{self, Hostinfo};
use crate::acl::{Policy, Subject};
use crate::config::{DevnetConfig, Families};
use crate::random;

pub(crate) type NodeId = u64;

/// A registered device.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) stable_id: String,
    /// First DNS label, unique.
    pub(crate) name: String,
    pub(crate) hostname: String,
    pub(crate) machine_key: MachinePublic,
    pub(crate) node_key: NodePublic,
    pub(crate) disco_key: DiscoPublic,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) tags: Vec<String>,
    pub(crate) ephemeral: bool,
    /// An administrator has approved it, or nobody has to.
    pub(crate) authorized: bool,
    /// Who owns it while it has no tags.
    pub(crate) user: u64,
    pub(crate) created: Timestamp,
    /// Id of the auth key that it came with.
    pub(crate) joined_by: Option<String>,
    pub(crate) expiry: Option<Timestamp>,
    pub(crate) expired: bool,
    pub(crate) endpoints: Vec<SocketAddr>,
    pub(crate) home_derp: u32,
    pub(crate) hostinfo: Hostinfo,
    pub(crate) version: u32,
    pub(crate) online: bool,
    pub(crate) last_seen: Timestamp,
    /// The map session that owns this node; an older one ends when it sees a newer number.
    pub(crate) session: u64,
    pub(crate) streaming: bool,
    pub(crate) offline_since: Instant,
    /// Approved routes, advertised or not.
    pub(crate) approved: BTreeSet<IpNet>,
    /// Routes it carries without having advertised them.
    pub(crate) granted: Vec<IpNet>,
    /// Routes that are its own now: exit routes and those it is primary for.
    pub(crate) routes: Vec<IpNet>,
    pub(crate) primary: Vec<IpNet>,
    /// Ping requests its stream has to deliver.
    pub(crate) pings: VecDeque<wire::PingRequest>,
    /// Bytes for its stream that need not be a message's.
    pub(crate) raw: VecDeque<Vec<u8>>,
    /// Fields of map messages that somebody wants it told.
    pub(crate) extras: VecDeque<serde_json::Map<String, Value>>,
    pub(crate) revision: u64,
}

impl Node {
    pub(crate) fn subject(&self) -> Subject<'_> {
        Subject { name: &self.name, tags: &self.tags, addresses: &self.addresses, routes: &self.routes }
    }

    pub(crate) fn owner(&self) -> u64 {
        if self.tags.is_empty() { self.user } else { wire::TAGGED_DEVICES }
    }
}

/// A pre-authentication key.
#[derive(Clone, Debug)]
pub(crate) struct AuthKey {
    pub(crate) id: String,
    pub(crate) secret: String,
    pub(crate) description: String,
    pub(crate) reusable: bool,
    pub(crate) ephemeral: bool,
    pub(crate) preauthorized: bool,
    pub(crate) tags: Vec<String>,
    /// Who made it, or owns its nodes when it has no tags.
    pub(crate) user: Option<u64>,
    pub(crate) created: Timestamp,
    pub(crate) expires: Timestamp,
    pub(crate) used: bool,
    pub(crate) revoked: Option<Timestamp>,
}

/// Somebody who can own nodes.
#[derive(Clone, Debug)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) display_name: String,
    pub(crate) created: Timestamp,
    /// Of the tailnet that the user belongs to; `None` for the first.
    pub(crate) domain: Option<String>,
}

/// Why an auth key is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyProblem {
    Unknown,
    Revoked,
    Expired,
    Used,
}

impl AuthKey {
    pub(crate) fn check(&self, now: Timestamp) -> Result<(), KeyProblem> {
        if self.revoked.is_some() {
            return Err(KeyProblem::Revoked);
        }
        if self.expires < now {
            return Err(KeyProblem::Expired);
        }
        if self.used && !self.reusable {
            return Err(KeyProblem::Used);
        }
        Ok(())
    }
}

/// How a key is to be made.
#[derive(Clone, Debug)]
pub struct AuthKeyOptions {
    /// Registers any number of nodes.
    pub reusable: bool,
    /// Its nodes are forgotten when they log out or stay away.
    pub ephemeral: bool,
    /// Its nodes need no approval.
    pub preauthorized: bool,
    /// Its nodes' tags.
    pub tags: Vec<String>,
    /// How long it is valid.
    pub lifetime: Duration,
    /// Free text.
    pub description: String,
    /// Who owns its nodes when it has no tags; none for the devnet's first user.
    pub user: Option<u64>,
}

impl Default for AuthKeyOptions {
    fn default() -> Self {
        Self {
            reusable: false,
            ephemeral: false,
            preauthorized: true,
            tags: Vec::new(),
            lifetime: Duration::from_secs(3600),
            description: String::new(),
            user: None,
        }
    }
}

/// An interactive login that waits for somebody to approve it.
#[derive(Clone, Debug)]
pub(crate) struct PendingLogin {
    pub(crate) machine_key: MachinePublic,
    pub(crate) node_key: NodePublic,
    pub(crate) hostinfo: Hostinfo,
    pub(crate) approved: bool,
}

const MAX_PENDING: usize = 256;

pub(crate) struct State {
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    by_node_key: HashMap<NodePublic, NodeId>,
    by_machine_key: HashMap<MachinePublic, NodeId>,
    pub(crate) keys: BTreeMap<String, AuthKey>,
    pub(crate) pending: BTreeMap<String, PendingLogin>,
    pub(crate) users: BTreeMap<u64, User>,
    /// Revision of the last change of a user.
    pub(crate) users_revision: u64,
    pub(crate) policy: Option<Policy>,
    /// New nodes have to be approved.
    pub(crate) device_approval: bool,
    /// Who carries a prefix that is no exit route.
    pub(crate) primaries: BTreeMap<IpNet, NodeId>,
    pub(crate) kinds: Kinds,
    pub(crate) shares: Shares,
    /// Sessions of nodes that were removed without a word to them.
    pub(crate) unaware: HashSet<u64>,
    pub(crate) derp_map: wire::DerpMap,
    pub(crate) derp_revision: u64,
    pub(crate) topology: u64,
    pub(crate) revision: u64,
    next_id: NodeId,
    next_session: u64,
    next_v4: Ipv4Addr,
    next_v6: Ipv6Addr,
    next_key: u64,
    families: Families,
    /// As Headscale gives them: nodes and keys are numbered.
    numeric_ids: bool,
    max_nodes: usize,
}

/// What a new node starts with.
pub(crate) struct NewNode {
    pub(crate) machine_key: MachinePublic,
    pub(crate) node_key: NodePublic,
    pub(crate) hostinfo: Hostinfo,
    pub(crate) tags: Vec<String>,
    pub(crate) ephemeral: bool,
    /// Whatever the tailnet asks of others.
    pub(crate) preauthorized: bool,
    pub(crate) user: u64,
    pub(crate) expiry: Option<Timestamp>,
    pub(crate) version: u32,
}

/// The tailnet cannot take another node.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    #[error("node key already in use by another machine")]
    NodeKeyInUse,
    #[error("allocating IPs: failed to find available IP")]
    Full,
}

impl State {
    pub(crate) fn new(config: &DevnetConfig) -> Self {
        Self {
            nodes: BTreeMap::new(),
            by_node_key: HashMap::new(),
            by_machine_key: HashMap::new(),
            keys: BTreeMap::new(),
            pending: BTreeMap::new(),
            users: BTreeMap::from([(wire::USER, wire::first_user())]),
            users_revision: 1,
            policy: config.policy.clone(),
            device_approval: false,
            primaries: BTreeMap::new(),
            kinds: Kinds::default(),
            shares: Shares::default(),
            unaware: HashSet::new(),
            derp_map: wire::DerpMap::default(),
            derp_revision: 1,
            topology: 1,
            revision: 1,
            next_id: 1,
            next_session: 1,
            next_v4: config.ipv4_start,
            next_v6: config.ipv6_start,
            next_key: 1,
            families: config.families,
            numeric_ids: config.headscale.is_some(),
            max_nodes: config.max_nodes,
        }
    }

    /// Forgets nodes, keys and logins, and counts from the start again, as a server whose database was
    /// removed. Users, policy and relays stay.
    pub(crate) fn wipe(&mut self, config: &DevnetConfig) {
        let empty = State {
            policy: self.policy.take(),
            device_approval: self.device_approval,
            derp_map: std::mem::take(&mut self.derp_map),
            derp_revision: self.derp_revision,
            users: std::mem::take(&mut self.users),
            users_revision: self.users_revision,
            revision: self.revision,
            // A session of before must not take a new node of the same number for its own.
            next_session: self.next_session,
            ..State::new(config)
        };
        *self = empty;
        self.touch_topology();
    }

    /// Login and display name of an owner.
    pub(crate) fn owner_names(&self, id: u64) -> (String, String) {
        if id == wire::TAGGED_DEVICES {
            return ("tagged-devices".into(), "Tagged Devices".into());
        }
        self.users.get(&id).map(|user| (user.name.clone(), user.display_name.clone())).unwrap_or_default()
    }

    /// Adds a user of the tailnet with this domain, the first if none, and gives its number.
    pub(crate) fn add_user(
        &mut self,
        name: String,
        display_name: String,
        domain: Option<String>,
        now: Timestamp,
    ) -> u64 {
        let id = self.users.keys().next_back().map_or(wire::USER, |last| last + 1);
        self.users.insert(id, User { name, display_name, created: now, domain });
        self.touch_users();
        id
    }

    /// Gives a user other names; false when there is none of this number.
    pub(crate) fn rename_user(&mut self, id: u64, name: String, display_name: Option<String>) -> bool {
        let Some(user) = self.users.get_mut(&id) else { return false };
        user.name = name;
        if let Some(display_name) = display_name {
            user.display_name = display_name;
        }
        self.touch_users();
        true
    }

    fn touch_users(&mut self) {
        self.revision += 1;
        self.users_revision = self.revision;
    }

    /// Gives a node tags; it belongs to nobody then.
    pub(crate) fn set_tags(&mut self, id: NodeId, tags: Vec<String>) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.tags = tags;
            node.expiry = None;
            node.expired = false;
            self.touch(id);
            self.touch_topology();
        }
    }

    pub(crate) fn node_by_key(&self, key: &NodePublic) -> Option<&Node> {
        self.nodes.get(self.by_node_key.get(key)?)
    }

    pub(crate) fn node_by_machine(&self, key: &MachinePublic) -> Option<&Node> {
        self.nodes.get(self.by_machine_key.get(key)?)
    }

    pub(crate) fn touch(&mut self, id: NodeId) {
        self.revision += 1;
        if let Some(node) = self.nodes.get_mut(&id) {
            node.revision = self.revision;
        }
    }

    pub(crate) fn touch_topology(&mut self) {
        self.revision += 1;
        self.topology = self.revision;
    }

    pub(crate) fn set_derp_map(&mut self, map: wire::DerpMap) {
        self.revision += 1;
        self.derp_revision = self.revision;
        self.derp_map = map;
    }

    pub(crate) fn add_node(&mut self, new: NewNode, now: Timestamp) -> Result<NodeId, NodeError> {
        if self.by_node_key.contains_key(&new.node_key) {
            return Err(NodeError::NodeKeyInUse);
        }
        if self.nodes.len() >= self.max_nodes {
            return Err(NodeError::Full);
        }
        let mut addresses = Vec::new();
        if self.families != Families::V6 {
            addresses.push(IpAddr::V4(self.allocate_v4()?));
        }
        if self.families != Families::V4 {
            addresses.push(IpAddr::V6(self.allocate_v6()?));
        }
        let id = self.next_id;
        self.next_id += 1;
        let hostname = text(&new.hostinfo, "Hostname").to_owned();
        let name = self.free_name(&sanitize(&hostname), id, new.user);
        self.by_node_key.insert(new.node_key, id);
        self.by_machine_key.insert(new.machine_key, id);
        self.nodes.insert(
            id,
            Node {
                id,
                stable_id: if self.numeric_ids {
                    id.to_string()
                } else {
                    format!("n{}CNTRL", random::token(11))
                },
                name,
                hostname,
                machine_key: new.machine_key,
                node_key: new.node_key,
                disco_key: DiscoPublic::default(),
                addresses,
                tags: new.tags,
                ephemeral: new.ephemeral,
                authorized: new.preauthorized || !self.device_approval,
                user: new.user,
                created: now,
                joined_by: None,
                expiry: new.expiry,
                expired: false,
                endpoints: Vec::new(),
                home_derp: home_derp(&new.hostinfo),
                hostinfo: new.hostinfo,
                version: new.version,
                online: false,
                last_seen: now,
                session: 0,
                streaming: false,
                offline_since: Instant::now(),
                approved: BTreeSet::new(),
                granted: Vec::new(),
                routes: Vec::new(),
                primary: Vec::new(),
                pings: VecDeque::new(),
                raw: VecDeque::new(),
                extras: VecDeque::new(),
                revision: 0,
            },
        );
        self.touch(id);
        self.touch_topology();
        self.settle_routes();
        Ok(id)
    }

    pub(crate) fn remove_node(&mut self, id: NodeId) -> bool {
        let Some(node) = self.nodes.remove(&id) else { return false };
        self.by_node_key.remove(&node.node_key);
        self.by_machine_key.remove(&node.machine_key);
        self.touch_topology();
        self.settle_routes();
        true
    }

    /// Gives a node another key.
    pub(crate) fn rotate_key(&mut self, id: NodeId, key: NodePublic) -> Result<(), NodeError> {
        match self.by_node_key.get(&key) {
            Some(&holder) if holder != id => return Err(NodeError::NodeKeyInUse),
            Some(_) => return Ok(()),
            None => {}
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            self.by_node_key.remove(&node.node_key);
            node.node_key = key;
            self.by_node_key.insert(key, id);
            self.touch(id);
        }
        Ok(())
    }

    pub(crate) fn set_expiry(&mut self, id: NodeId, expiry: Option<Timestamp>, now: Timestamp) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.expiry = expiry;
            node.expired = expiry.is_some_and(|at| at <= now);
            self.touch(id);
        }
    }

    /// Lets a node that waits for approval take part, or takes that from it; false when there is none.
    pub(crate) fn set_authorized(&mut self, id: NodeId, authorized: bool) -> bool {
        let Some(node) = self.nodes.get_mut(&id) else { return false };
        node.authorized = authorized;
        self.touch(id);
        self.touch_topology();
        true
    }

    /// Takes over what a client says about its host. An absent `NetInfo` keeps the last one.
    pub(crate) fn set_hostinfo(&mut self, id: NodeId, mut hostinfo: Hostinfo) {
        let Some(node) = self.nodes.get(&id) else { return };
        if hostinfo.get("NetInfo").is_none_or(Value::is_null)
            && let Some(kept) = node.hostinfo.get("NetInfo")
        {
            hostinfo.insert("NetInfo".into(), kept.clone());
        }
        if node.hostinfo == hostinfo {
            return;
        }
        let home = home_derp(&hostinfo);
        let hostname = text(&hostinfo, "Hostname").to_owned();
        let renamed = (!hostname.is_empty() && hostname != node.hostname)
            .then(|| self.free_name(&sanitize(&hostname), id, node.user));
        if let Some(node) = self.nodes.get_mut(&id) {
            if home != 0 {
                node.home_derp = home;
            }
            node.hostinfo = hostinfo;
            if let Some(name) = renamed {
                node.hostname = hostname;
                node.name = name;
                self.touch_topology();
            }
            self.touch(id);
            self.settle_routes();
        }
    }

    /// A new map session takes the node over; its number is returned.
    pub(crate) fn begin_session(&mut self, id: NodeId) -> u64 {
        let session = self.next_session;
        self.next_session += 1;
        // Wakes the session that has to give way.
        self.revision += 1;
        if let Some(node) = self.nodes.get_mut(&id) {
            node.session = session;
            node.streaming = true;
            if !node.online {
                node.online = true;
                self.touch(id);
                self.settle_routes();
            }
        }
        session
    }

    pub(crate) fn end_session(&mut self, id: NodeId, session: u64, now: Timestamp) {
        if let Some(node) = self.nodes.get_mut(&id)
            && node.session == session
        {
            node.streaming = false;
            node.offline_since = Instant::now();
            node.last_seen = now;
        }
    }

    /// Lets time pass: keys expire, silent nodes go offline, ephemeral ones are forgotten.
    pub(crate) fn tick(&mut self, config: &DevnetConfig, now: Timestamp) -> bool {
        let before = self.revision;
        let mut forgotten = Vec::new();
        let mut changed = Vec::new();
        for node in self.nodes.values_mut() {
            let expired = node.expiry.is_some_and(|at| at <= now);
            let away = if node.streaming { Duration::ZERO } else { node.offline_since.elapsed() };
            let online = node.streaming || (node.online && away < config.offline_delay);
            if expired != node.expired || online != node.online {
                node.expired = expired;
                node.online = online;
                changed.push(node.id);
            }
            if node.ephemeral && away >= config.ephemeral_timeout {
                forgotten.push(node.id);
            }
        }
        if !changed.is_empty() {
            self.settle_routes();
        }
        for id in changed {
            self.touch(id);
        }
        for id in forgotten {
            self.remove_node(id);
        }
        self.revision != before
    }

    pub(crate) fn create_key(&mut self, options: AuthKeyOptions, now: Timestamp) -> AuthKey {
        let number = self.next_key;
        self.next_key += 1;
        let (id, secret) = if self.numeric_ids {
            (number.to_string(), format!("hskey-auth-{}-{}", random::hex(6), random::hex(32)))
        } else {
            let id = format!("k{}CNTRL", random::token(10));
            let secret = format!("tskey-auth-{id}-{}", random::token(32));
            (id, secret)
        };
        let lifetime = SignedDuration::try_from(options.lifetime).unwrap_or(SignedDuration::MAX);
        let key = AuthKey {
            secret,
            id: id.clone(),
            description: options.description,
            reusable: options.reusable,
            ephemeral: options.ephemeral,
            preauthorized: options.preauthorized,
            tags: options.tags,
            user: options.user,
            created: now,
            expires: now.saturating_add(lifetime).unwrap_or(Timestamp::MAX),
            used: false,
            revoked: None,
        };
        self.keys.insert(id, key.clone());
        key
    }

    pub(crate) fn key_by_secret(&mut self, secret: &str) -> Option<&mut AuthKey> {
        self.keys.values_mut().find(|key| key.secret == secret)
    }

    /// Notes an interactive login; the oldest is forgotten when there are too many.
    pub(crate) fn add_pending(&mut self, login: PendingLogin) -> String {
        while self.pending.len() >= MAX_PENDING {
            self.pending.pop_first();
        }
        // Ordered by time, so that the first is the oldest.
        let id = format!("{:016x}{}", self.revision, random::token(8));
        self.revision += 1;
        self.pending.insert(id.clone(), login);
        id
    }

    fn allocate_v4(&mut self) -> Result<Ipv4Addr, NodeError> {
        loop {
            let address = self.next_v4;
            let [a, b, c, d] = address.octets();
            if a != 100 || !(64..128).contains(&b) {
                return Err(NodeError::Full);
            }
            self.next_v4 = Ipv4Addr::from(u32::from(address) + 1);
            // ChromeOS's own range and the service address are never a node's.
            let reserved = (b == 115 && matches!(c, 92 | 93)) || address.octets() == [100, 100, 100, 100];
            if !reserved && !matches!(d, 0 | 255) && !self.is_taken(IpAddr::V4(address)) {
                return Ok(address);
            }
        }
    }

    fn allocate_v6(&mut self) -> Result<Ipv6Addr, NodeError> {
        loop {
            let address = self.next_v6;
            if address.segments()[..3] != [0xfd7a, 0x115c, 0xa1e0] {
                return Err(NodeError::Full);
            }
            self.next_v6 = Ipv6Addr::from(u128::from(address) + 1);
            // fd7a:115c:a1e0::53 is the service address.
            let service = address.segments()[3..] == [0, 0, 0, 0, 0x53];
            if !service && !self.is_taken(IpAddr::V6(address)) {
                return Ok(address);
            }
        }
    }

    fn is_taken(&self, address: IpAddr) -> bool {
        self.nodes.values().any(|node| node.addresses.contains(&address))
    }

    /// A name that no other node of the user's tailnet has.
    fn free_name(&self, wanted: &str, own: NodeId, user: u64) -> String {
        let domain = |user: u64| self.users.get(&user).and_then(|user| user.domain.as_deref());
        let taken = |name: &str| {
            let mut others = self.nodes.values().filter(|node| node.id != own && node.name == name);
            others.any(|node| domain(node.user) == domain(user))
        };
        if !taken(wanted) {
            return wanted.to_owned();
        }
        (1..)
            .map(|number: u32| {
                let suffix = format!("-{number}");
                format!("{}{suffix}", &wanted[..wanted.len().min(63 - suffix.len())])
            })
            .find(|name| !taken(name))
            .unwrap_or_default()
    }
}

/// A text field of a host description, empty when absent.
pub(crate) fn text<'a>(hostinfo: &'a Hostinfo, field: &str) -> &'a str {
    hostinfo.get(field).and_then(Value::as_str).unwrap_or_default()
}

fn home_derp(hostinfo: &Hostinfo) -> u32 {
    let region = hostinfo.get("NetInfo").and_then(|info| info.get("PreferredDERP")).and_then(Value::as_u64);
    region.and_then(|region| u32::try_from(region).ok()).unwrap_or(0)
}

/// The DNS label made of a host name: lower case, letters, digits and inner hyphens, at most 63.
fn sanitize(hostname: &str) -> String {
    let mut label: String = hostname
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(63)
        .collect();
    label = label.trim_matches('-').to_owned();
    if label.is_empty() { "node".into() } else { label }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_node(seed: u8, hostname: &str) -> NewNode {
        let mut hostinfo = Hostinfo::new();
        hostinfo.insert("Hostname".into(), hostname.into());
        NewNode {
            machine_key: MachinePublic::from_bytes([seed; 32]),
            node_key: NodePublic::from_bytes([seed; 32]),
            hostinfo,
            tags: Vec::new(),
            ephemeral: false,
            preauthorized: false,
            user: wire::USER,
            expiry: None,
            version: 113,
        }
    }

    #[test]
    fn addresses_avoid_reserved_ranges_and_are_never_given_twice() {
        let config = DevnetConfig {
            ipv4_start: Ipv4Addr::new(100, 100, 100, 99),
            ipv6_start: "fd7a:115c:a1e0::52".parse().unwrap(),
            ..DevnetConfig::default()
        };
        let mut state = State::new(&config);
        for seed in 1..=3 {
            state.add_node(new_node(seed, "x"), Timestamp::UNIX_EPOCH).unwrap();
        }
        let addresses: Vec<_> = state.nodes.values().map(|node| node.addresses.clone()).collect();
        let text = |index: usize| addresses[index].iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(text(0), ["100.100.100.99", "fd7a:115c:a1e0::52"]);
        assert_eq!(text(1), ["100.100.100.101", "fd7a:115c:a1e0::54"]);
        assert_eq!(text(2), ["100.100.100.102", "fd7a:115c:a1e0::55"]);
    }

    #[test]
    fn names_become_unique_labels() {
        let mut state = State::new(&DevnetConfig::default());
        let long = "a".repeat(70);
        let hostnames = ["Pod_A.local", "pod-a.local", "--", "", &long, &long];
        for (seed, hostname) in (1..).zip(hostnames) {
            state.add_node(new_node(seed, hostname), Timestamp::UNIX_EPOCH).unwrap();
        }
        let names: Vec<_> = state.nodes.values().map(|node| node.name.clone()).collect();
        assert_eq!(names[..4], ["pod-a-local", "pod-a-local-1", "node", "node-1"]);
        assert_eq!(names[4], "a".repeat(63));
        assert_eq!(names[5], format!("{}-1", "a".repeat(61)));
    }

    #[test]
    fn a_node_key_belongs_to_one_machine() {
        let mut state = State::new(&DevnetConfig::default());
        let first = state.add_node(new_node(1, "a"), Timestamp::UNIX_EPOCH).unwrap();
        let second = state.add_node(new_node(2, "b"), Timestamp::UNIX_EPOCH).unwrap();
        let key = NodePublic::from_bytes([2; 32]);
        assert!(matches!(state.rotate_key(first, key), Err(NodeError::NodeKeyInUse)));
        state.remove_node(second);
        state.rotate_key(first, key).unwrap();
        assert_eq!(state.node_by_key(&key).unwrap().id, first);
        assert!(state.node_by_key(&NodePublic::from_bytes([1; 32])).is_none());
    }

    proptest::proptest! {
        #[test]
        fn fuzz_any_hostname_becomes_a_label(hostname: String) {
            let label = sanitize(&hostname);
            proptest::prop_assert!(!label.is_empty() && label.len() <= 63);
            proptest::prop_assert!(!label.starts_with('-') && !label.ends_with('-'));
            proptest::prop_assert!(label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
        }
    }
}
