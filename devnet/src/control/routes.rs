//! Subnet routes and exit nodes: what nodes advertise, what was approved, and who carries which prefix.
//!
//! As Headscale has it: a route counts when it is both advertised and approved. Exit routes belong to
//! every node that has them, as a pair; of the nodes that have any other prefix, one that is online is
//! primary and alone gets it into its `AllowedIPs`. A primary stays primary while it is online.

use std::collections::BTreeMap;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::Value;

use super::state::{Node, NodeId, State};
use super::wire::Hostinfo;

/// Both default routes, which make an exit node.
pub(crate) fn exit_routes() -> [IpNet; 2] {
    [Ipv4Net::default().into(), Ipv6Net::default().into()]
}

pub(crate) fn is_exit(net: &IpNet) -> bool {
    net.prefix_len() == 0
}

/// What a host advertises, and what of it is no prefix.
pub(crate) fn advertised(hostinfo: &Hostinfo) -> (Vec<IpNet>, Vec<String>) {
    let (mut nets, mut odd) = (Vec::new(), Vec::new());
    for value in hostinfo.get("RoutableIPs").and_then(Value::as_array).into_iter().flatten() {
        match value.as_str().and_then(|text| text.parse::<IpNet>().ok()) {
            Some(net) if net == net.trunc() => nets.push(net),
            _ => odd.push(value.to_string()),
        }
    }
    nets.sort_unstable();
    nets.dedup();
    (nets, odd)
}

impl Node {
    /// What counts: advertised and approved, or granted.
    pub(crate) fn enabled(&self) -> Vec<IpNet> {
        let (mut nets, _) = advertised(&self.hostinfo);
        nets.retain(|net| self.approved.contains(net));
        nets.extend(&self.granted);
        nets.sort_unstable();
        nets.dedup();
        nets
    }
}

impl State {
    /// Approves exactly these routes of a node; one default route stands for both. False without such a
    /// node.
    pub(crate) fn approve_routes(&mut self, id: NodeId, routes: &[IpNet]) -> bool {
        let Some(node) = self.nodes.get_mut(&id) else { return false };
        node.approved = routes.iter().map(IpNet::trunc).collect();
        if routes.iter().any(is_exit) {
            node.approved.extend(exit_routes());
        }
        self.settle_routes();
        true
    }

    /// Lets a node carry routes that it does not advertise.
    pub(crate) fn grant_routes(&mut self, id: NodeId, routes: Vec<IpNet>) -> bool {
        let Some(node) = self.nodes.get_mut(&id) else { return false };
        node.granted = routes;
        self.settle_routes();
        true
    }

    /// Decides anew who carries what; whoever is concerned hears of it.
    pub(crate) fn settle_routes(&mut self) {
        if let Some(policy) = &self.policy {
            for node in self.nodes.values_mut() {
                let (nets, _) = advertised(&node.hostinfo);
                let new: Vec<IpNet> =
                    nets.into_iter().filter(|net| policy.auto_approves(&node.subject(), net)).collect();
                node.approved.extend(new);
            }
        }
        let mut holders: BTreeMap<IpNet, Vec<NodeId>> = BTreeMap::new();
        for node in self.nodes.values().filter(|node| node.online && !node.expired) {
            for net in node.enabled().into_iter().filter(|net| !is_exit(net)) {
                holders.entry(net).or_default().push(node.id);
            }
        }
        let chosen = holders.into_iter().filter_map(|(net, nodes)| {
            let kept = self.primaries.get(&net).filter(|id| nodes.contains(id));
            Some((net, *kept.or_else(|| nodes.first())?))
        });
        let primaries: BTreeMap<IpNet, NodeId> = chosen.collect();
        let mut changed = Vec::new();
        for node in self.nodes.values_mut() {
            let primary: Vec<IpNet> =
                primaries.iter().filter(|(_, id)| **id == node.id).map(|(net, _)| *net).collect();
            let exit = node.enabled().into_iter().filter(is_exit);
            let routes: Vec<IpNet> = exit.chain(primary.iter().copied()).collect();
            if (&routes, &primary) != (&node.routes, &node.primary) {
                (node.routes, node.primary) = (routes, primary);
                changed.push(node.id);
            }
        }
        self.primaries = primaries;
        if !changed.is_empty() {
            for id in changed {
                self.touch(id);
            }
            self.touch_topology();
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use podtether_core::key::{MachinePublic, NodePublic};
    use serde_json::json;

    use super::super::state::NewNode;
    use super::*;
    use crate::config::DevnetConfig;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn hostinfo(routes: &[&str]) -> Hostinfo {
        let value = json!({"Hostname": "router", "RoutableIPs": routes});
        value.as_object().unwrap().clone()
    }

    fn join(state: &mut State, seed: u8, tag: &str, routes: &[&str]) -> NodeId {
        let new = NewNode {
            machine_key: MachinePublic::from_bytes([seed; 32]),
            node_key: NodePublic::from_bytes([seed; 32]),
            hostinfo: hostinfo(routes),
            tags: vec![tag.to_owned()],
            ephemeral: false,
            preauthorized: true,
            user: super::super::wire::USER,
            expiry: None,
            version: 113,
        };
        let id = state.add_node(new, Timestamp::UNIX_EPOCH).unwrap();
        state.begin_session(id);
        id
    }

    fn leave(state: &mut State, id: NodeId) {
        if let Some(node) = state.nodes.get_mut(&id) {
            node.online = false;
        }
        state.settle_routes();
    }

    #[test]
    fn a_route_needs_both_sides_and_has_one_primary() {
        let mut state = State::new(&DevnetConfig::default());
        let a = join(&mut state, 1, "tag:x", &["192.168.5.0/24", "0.0.0.0/0", "::/0"]);
        let b = join(&mut state, 2, "tag:x", &["192.168.5.0/24"]);
        let routes = |state: &State, id| state.nodes[&id].routes.clone();
        assert!(routes(&state, a).is_empty(), "advertised is not approved");
        let before = state.topology;
        assert!(state.approve_routes(a, &[net("192.168.5.0/24"), net("10.0.0.0/8")]));
        assert!(state.topology > before);
        assert_eq!(routes(&state, a), [net("192.168.5.0/24")]);
        state.approve_routes(b, &[net("192.168.5.0/24")]);
        assert!(routes(&state, b).is_empty(), "one primary");
        state.approve_routes(a, &[net("192.168.5.0/24"), net("::/0")]);
        assert_eq!(routes(&state, a), [net("0.0.0.0/0"), net("::/0"), net("192.168.5.0/24")]);
        assert_eq!(state.nodes[&a].primary, [net("192.168.5.0/24")]);

        leave(&mut state, a);
        assert_eq!(routes(&state, b), [net("192.168.5.0/24")], "the other takes over");
        assert_eq!(routes(&state, a), [net("0.0.0.0/0"), net("::/0")]);
        state.begin_session(a);
        assert_eq!(state.nodes[&b].primary, [net("192.168.5.0/24")], "and keeps it");
        state.set_hostinfo(b, hostinfo(&[]));
        assert_eq!(state.nodes[&a].primary, [net("192.168.5.0/24")]);
        state.remove_node(a);
        assert!(state.primaries.is_empty());
        assert!(state.grant_routes(b, vec![net("10.9.0.0/24")]) && !state.grant_routes(99, vec![]));
        assert_eq!(routes(&state, b), [net("10.9.0.0/24")]);
    }

    #[test]
    fn a_policy_approves_by_itself() {
        let policy =
            "[autoApprovers]\nexitNode = ['tag:exit']\n[autoApprovers.routes]\n'10.0.0.0/8' = ['tag:router']";
        let config = DevnetConfig { policy: Some(policy.parse().unwrap()), ..DevnetConfig::default() };
        let mut state = State::new(&config);
        let a = join(&mut state, 1, "tag:router", &["10.1.0.0/16", "11.0.0.0/8", "0.0.0.0/0"]);
        let b = join(&mut state, 2, "tag:exit", &["10.2.0.0/16", "0.0.0.0/0", "::/0"]);
        assert_eq!(state.nodes[&a].routes, [net("10.1.0.0/16")]);
        assert_eq!(state.nodes[&b].routes, exit_routes());
    }

    #[test]
    fn odd_routes_are_told_apart() {
        let (nets, odd) = advertised(&hostinfo(&["10.0.0.0/8", "10.0.0.1/8", "x", "10.0.0.0/8"]));
        assert_eq!((nets, odd.len()), (vec![net("10.0.0.0/8")], 2));
    }
}
