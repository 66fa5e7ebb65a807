//! What one map session has been told, and the message that brings it up to date.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::json;

use super::state::{Node, NodeId, State};
use super::wire::{self, MapResponse, PeerChange, Timestamp3339};
use crate::acl::FilterRule;
use crate::config::DnsSettings;

/// Of one session: whom it serves and what was sent.
pub(crate) struct View {
    node: NodeId,
    session: u64,
    version: u32,
    base_domain: String,
    dns: DnsSettings,
    sent: Option<Sent>,
}

struct Sent {
    topology: u64,
    derp_revision: u64,
    users_revision: u64,
    own: wire::Node,
    own_revision: u64,
    filter: Vec<FilterRule>,
    peers: BTreeMap<NodeId, (u64, wire::Node)>,
}

/// What a session has to do next.
pub(crate) enum Update {
    Send(Box<MapResponse>),
    Nothing,
    /// The node is gone, or another session serves it.
    End,
}

impl View {
    pub(crate) fn new(
        node: NodeId,
        session: u64,
        version: u32,
        base_domain: String,
        dns: DnsSettings,
    ) -> Self {
        Self { node, session, version, base_domain, dns, sent: None }
    }

    /// Compares and remembers: what is returned counts as sent.
    pub(crate) fn update(&mut self, state: &State, now: Timestamp) -> Update {
        let Some(own) = state.nodes.get(&self.node).filter(|node| node.session == self.session) else {
            return if state.unaware.contains(&self.session) { Update::Nothing } else { Update::End };
        };
        let Some(mut sent) = self.sent.take() else {
            return self.first(state, own, now);
        };
        let mut message = MapResponse::default();
        let mut news = false;
        if own.revision != sent.own_revision {
            sent.own_revision = own.revision;
            let node = self.render_self(state, own);
            if node != sent.own {
                sent.own = node.clone();
                message.node = Some(node);
                news = true;
            }
        }
        if state.derp_revision != sent.derp_revision {
            sent.derp_revision = state.derp_revision;
            message.derp_map = Some(state.derp_map.clone());
            news = true;
        }
        if state.users_revision != sent.users_revision {
            sent.users_revision = state.users_revision;
            message.user_profiles = state.profiles_for(own);
            news = true;
        }
        if state.topology != sent.topology {
            sent.topology = state.topology;
            let filter = state.filter_for(own);
            if filter != sent.filter {
                sent.filter.clone_from(&filter);
                message.packet_filters = Some(chunk(filter));
                news = true;
            }
            sent.peers.retain(|&id, _| {
                let keep = state.nodes.get(&id).is_some_and(|peer| state.sees(own, peer));
                if !keep {
                    message.peers_removed.push(id);
                }
                keep
            });
            for peer in state.nodes.values() {
                if peer.id != own.id && !sent.peers.contains_key(&peer.id) && state.sees(own, peer) {
                    let node = self.render_peer(state, own, peer);
                    sent.peers.insert(peer.id, (peer.revision, node.clone()));
                    message.peers_changed.push(node);
                }
            }
        }
        for (&id, (revision, old)) in &mut sent.peers {
            let Some(peer) = state.nodes.get(&id).filter(|peer| peer.revision != *revision) else { continue };
            *revision = peer.revision;
            let new = self.render_peer(state, own, peer);
            match difference(old, &new) {
                Difference::None => {}
                Difference::Patch(patch) => message.peers_changed_patch.push(*patch),
                Difference::Whole => message.peers_changed.push(new.clone()),
            }
            *old = new;
        }
        news |= !message.peers_changed.is_empty()
            || !message.peers_changed_patch.is_empty()
            || !message.peers_removed.is_empty();
        if !message.peers_changed.is_empty() {
            // Clients forget the profile of an owner whose last node left.
            message.user_profiles = state.profiles_for(own);
        }
        self.sent = Some(sent);
        if !news {
            return Update::Nothing;
        }
        message.control_time = Some(Timestamp3339(now));
        Update::Send(Box::new(message))
    }

    fn first(&mut self, state: &State, own: &Node, now: Timestamp) -> Update {
        let filter = state.filter_for(own);
        let own_node = self.render_self(state, own);
        let peers: BTreeMap<_, _> = state
            .nodes
            .values()
            .filter(|peer| peer.id != own.id && state.sees(own, peer))
            .map(|peer| (peer.id, (peer.revision, self.render_peer(state, own, peer))))
            .collect();
        let domain = self.domain(state, own);
        let message = MapResponse {
            node: Some(own_node.clone()),
            derp_map: Some(state.derp_map.clone()),
            peers: peers.values().map(|(_, node)| node.clone()).collect(),
            dns_config: Some(dns_config(&domain, &self.dns)),
            domain,
            collect_services: Some(false),
            packet_filters: Some(chunk(filter.clone())),
            user_profiles: state.profiles_for(own),
            control_time: Some(Timestamp3339(now)),
            debug: Some(wire::Debug { disable_log_tail: true }),
            ..MapResponse::default()
        };
        self.sent = Some(Sent {
            topology: state.topology,
            derp_revision: state.derp_revision,
            users_revision: state.users_revision,
            own: own_node,
            own_revision: own.revision,
            filter,
            peers,
        });
        Update::Send(Box::new(message))
    }

    fn domain(&self, state: &State, node: &Node) -> String {
        state.domain_of(node).unwrap_or_else(|| self.base_domain.clone())
    }

    fn render_self(&self, state: &State, node: &Node) -> wire::Node {
        let mut rendered = self.render(state, node);
        rendered.cap = self.version;
        rendered.cap_map = BTreeMap::from([
            ("default-auto-update", vec![json!(false)]),
            ("https://tailscale.com/cap/file-sharing", Vec::new()),
        ]);
        rendered
    }

    fn render_peer(&self, state: &State, own: &Node, node: &Node) -> wire::Node {
        let mut rendered = self.render(state, node);
        state.kinds.dress(self.node, &mut rendered);
        state.dress_shared(own, node, &mut rendered);
        // A peer's network details are its own business; its home and endpoints have fields.
        rendered.hostinfo.remove("NetInfo");
        rendered
    }

    fn render(&self, state: &State, node: &Node) -> wire::Node {
        let addresses: Vec<String> = node
            .addresses
            .iter()
            .map(|address| format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 }))
            .collect();
        wire::Node {
            id: node.id,
            stable_id: node.stable_id.clone(),
            name: format!("{}.{}.", node.name, self.domain(state, node)),
            user: node.owner(),
            sharer: 0,
            key: node.node_key,
            key_expiry: node.expiry.map(Timestamp3339),
            machine: node.machine_key,
            disco_key: (!node.disco_key.is_zero()).then_some(node.disco_key),
            allowed_ips: addresses
                .iter()
                .cloned()
                .chain(node.routes.iter().map(ToString::to_string))
                .collect(),
            primary_routes: node.primary.iter().map(ToString::to_string).collect(),
            addresses,
            endpoints: node.endpoints.clone(),
            home_derp: node.home_derp,
            hostinfo: node.hostinfo.clone(),
            created: Timestamp3339(node.created),
            cap: node.version,
            tags: node.tags.clone(),
            last_seen: (!node.online).then_some(Timestamp3339(node.last_seen)),
            online: node.online,
            machine_authorized: node.authorized && !node.expired,
            cap_map: BTreeMap::new(),
            expired: node.expired,
            is_jailed: false,
            is_wireguard_only: false,
            self_v4_masq: None,
            self_v6_masq: None,
        }
    }
}

/// Names below the suffix and the reverse zones of the tailnet's ranges are answered by the node itself.
fn dns_config(base_domain: &str, dns: &DnsSettings) -> wire::DnsConfig {
    let resolvers = |list: &[String]| list.iter().map(|addr| json!({ "Addr": addr })).collect::<Vec<_>>();
    let reverse_v4 = (64..128).map(|octet| format!("{octet}.100.in-addr.arpa"));
    let reverse_v6 = "0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa".to_owned();
    let zones = reverse_v4.chain([reverse_v6, base_domain.to_owned()]);
    wire::DnsConfig {
        resolvers: resolvers(&dns.resolvers),
        routes: zones
            .map(|zone| (zone, Vec::new()))
            .chain(dns.routes.iter().map(|(suffix, list)| (suffix.clone(), resolvers(list))))
            .collect(),
        extra_records: dns
            .extra_records
            .iter()
            .map(|(name, ip)| json!({ "Name": name, "Value": ip.to_string() }))
            .collect(),
        domains: vec![base_domain.to_owned()],
        proxied: true,
    }
}

/// An empty filter is null on the wire, as Headscale writes it.
fn chunk(filter: Vec<FilterRule>) -> BTreeMap<&'static str, Option<Vec<FilterRule>>> {
    BTreeMap::from([("base", (!filter.is_empty()).then_some(filter))])
}

enum Difference {
    None,
    Patch(Box<PeerChange>),
    Whole,
}

fn difference(old: &wire::Node, new: &wire::Node) -> Difference {
    if old == new {
        return Difference::None;
    }
    let patched = wire::Node {
        key: new.key,
        disco_key: new.disco_key,
        endpoints: new.endpoints.clone(),
        home_derp: new.home_derp,
        online: new.online,
        last_seen: new.last_seen,
        key_expiry: new.key_expiry,
        ..old.clone()
    };
    // Absent and zero mean "unchanged" in a patch, so a value that vanishes needs the whole node.
    // Going online makes LastSeen vanish without meaning.
    let vanishes = (new.endpoints.is_empty() && !old.endpoints.is_empty())
        || (new.disco_key.is_none() && old.disco_key.is_some())
        || (new.home_derp == 0 && old.home_derp != 0)
        || (new.key_expiry.is_none() && old.key_expiry.is_some());
    if patched != *new || vanishes {
        return Difference::Whole;
    }
    Difference::Patch(Box::new(PeerChange {
        node_id: new.id,
        derp_region: (old.home_derp != new.home_derp).then_some(new.home_derp),
        endpoints: if old.endpoints == new.endpoints { Vec::new() } else { new.endpoints.clone() },
        key: (old.key != new.key).then_some(new.key),
        disco_key: if old.disco_key == new.disco_key { None } else { new.disco_key },
        online: (old.online != new.online).then_some(new.online),
        last_seen: if old.last_seen == new.last_seen { None } else { new.last_seen },
        key_expiry: if old.key_expiry == new.key_expiry { None } else { new.key_expiry },
    }))
}
