//! Tailnets beside the first one, and nodes of one tailnet that a user of another reaches.
//!
//! As with the hosted service: a shared node keeps its name and addresses, and loses its tags and routes on the
//! way. Of the other tailnet only the user it is shared with sees it, by nodes without tags; it sees those
//! without their names. It may not begin anything with them unless it is let out of quarantine.

use std::collections::BTreeMap;

use super::state::{Node, NodeId, State};
use super::wire;
use crate::acl::{self, FilterRule, NetPortRange, PortRange};

/// What nodes of a user with whom something is shared are called there.
const SHAREE: &str = "device-of-shared-to-user";

/// With whom nodes are shared. Entries of nodes that are gone do no harm: numbers are not given twice.
#[derive(Debug, Default)]
pub(crate) struct Shares(BTreeMap<(NodeId, u64), Share>);

/// One node shared with one user.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Share {
    /// Who shares it.
    pub(crate) by: u64,
    /// It may only answer.
    pub(crate) quarantined: bool,
}

impl State {
    /// Shares a node with a user of another tailnet; false when one of them is not there, or it is the same
    /// tailnet.
    pub(crate) fn share(&mut self, id: NodeId, with: u64, share: Share) -> bool {
        let Some(node) = self.nodes.get(&id) else { return false };
        let elsewhere = |user| self.users.get(&user).is_some_and(|user| user.domain != self.domain_of(node));
        if !elsewhere(with) || !self.users.contains_key(&share.by) || elsewhere(share.by) {
            return false;
        }
        self.shares.0.insert((id, with), share);
        self.touch_share(id, with);
        true
    }

    /// Ends a share; false when there is none.
    pub(crate) fn unshare(&mut self, id: NodeId, with: u64) -> bool {
        let ended = self.shares.0.remove(&(id, with)).is_some();
        if ended {
            self.touch_share(id, with);
        }
        ended
    }

    /// Both sides are seen differently.
    fn touch_share(&mut self, id: NodeId, with: u64) {
        let sharees = self.nodes.values().filter(|node| node.user == with).map(|node| node.id);
        for id in sharees.chain([id]).collect::<Vec<_>>() {
            self.touch(id);
        }
        self.touch_topology();
    }

    /// The domain of a node's tailnet; `None` for the first tailnet.
    pub(crate) fn domain_of(&self, node: &Node) -> Option<String> {
        self.users.get(&node.user)?.domain.clone()
    }

    fn are_neighbours(&self, one: &Node, other: &Node) -> bool {
        let domain = |node: &Node| self.users.get(&node.user).and_then(|user| user.domain.as_deref());
        one.user == other.user || domain(one) == domain(other)
    }

    /// How `node` is shared with the owner of `viewer`.
    fn share_of(&self, node: &Node, viewer: &Node) -> Option<&Share> {
        self.shares.0.get(&(node.id, viewer.user)).filter(|_| viewer.tags.is_empty())
    }

    /// Whether a node's netmap has a peer.
    pub(crate) fn sees(&self, own: &Node, peer: &Node) -> bool {
        // Nodes that wait for approval see nobody and are seen by nobody.
        own.authorized
            && peer.authorized
            && if self.are_neighbours(own, peer) {
                self.policy.as_ref().is_none_or(|policy| policy.connects(&own.subject(), &peer.subject()))
            } else {
                self.share_of(own, peer).or(self.share_of(peer, own)).is_some()
            }
    }

    /// The rules a node has to enforce: those of the policy, by its own tailnet's nodes, and one for whom it is
    /// shared with.
    pub(crate) fn filter_for(&self, node: &Node) -> Vec<FilterRule> {
        let Some(policy) = &self.policy else { return acl::allow_all() };
        let neighbours = self.nodes.values().filter(|peer| self.are_neighbours(node, peer));
        let mut rules = policy.filter_for(&node.subject(), neighbours.map(Node::subject));
        let sharees = self.nodes.values().filter(|peer| {
            !self.shares.0.is_empty()
                && !self.are_neighbours(node, peer)
                && self.share_of(node, peer).is_some()
        });
        let sources = sharees.flat_map(|peer| {
            peer.addresses.iter().map(|own| self.kinds.known_as(peer.id, node.id, *own).to_string())
        });
        let src_ips: Vec<String> = sources.collect();
        if !src_ips.is_empty() {
            let to = |ip: &std::net::IpAddr| NetPortRange { ip: ip.to_string(), ports: PortRange::ALL };
            let dst_ports = node.addresses.iter().map(to).collect();
            rules.push(FilterRule { src_ips, dst_ports, ip_proto: Vec::new() });
        }
        rules
    }

    /// Turns a peer into what a node of another tailnet is to see of it.
    pub(crate) fn dress_shared(&self, viewer: &Node, peer: &Node, rendered: &mut wire::Node) {
        if self.are_neighbours(viewer, peer) {
            return;
        }
        rendered.user = peer.user;
        rendered.tags.clear();
        rendered.primary_routes.clear();
        rendered.allowed_ips.clone_from(&rendered.addresses);
        for field in ["RoutableIPs", "RequestTags"] {
            rendered.hostinfo.remove(field);
        }
        let sharee = self.share_of(viewer, peer).is_some();
        if let Some(share) = self.share_of(peer, viewer) {
            rendered.sharer = if share.by == peer.user { 0 } else { share.by };
            // Whom this node is shared with may begin all the same.
            rendered.is_jailed |= share.quarantined && !sharee;
        } else if sharee {
            rendered.name.clear();
            let os = rendered.hostinfo.remove("OS");
            rendered.hostinfo.clear();
            rendered.hostinfo.extend(os.map(|os| ("OS".into(), os)));
            rendered.hostinfo.insert("Hostname".into(), SHAREE.into());
            rendered.hostinfo.insert("ShareeNode".into(), true.into());
        }
    }

    /// The profiles of everybody in a node's tailnet who can own a node, and of the owners and sharers of what
    /// else it sees.
    pub(crate) fn profiles_for(&self, own: &Node) -> Vec<wire::UserProfile> {
        let domain = self.domain_of(own);
        let neighbours = self.users.iter().filter(|(_, user)| user.domain == domain).map(|(id, _)| *id);
        let strangers = self.nodes.values().filter(|peer| {
            !self.shares.0.is_empty() && !self.are_neighbours(own, peer) && self.sees(own, peer)
        });
        let strangers = strangers.flat_map(|peer| {
            let by = self.share_of(peer, own).map(|share| share.by);
            by.into_iter().chain([peer.user])
        });
        let everybody: std::collections::BTreeSet<u64> =
            neighbours.chain(strangers).chain([wire::TAGGED_DEVICES]).collect();
        let profile = |id| {
            let (login_name, display_name) = self.owner_names(id);
            wire::UserProfile { id, login_name, display_name }
        };
        everybody.into_iter().map(profile).collect()
    }
}
