//! What makes a peer an odd one, in everybody's eyes or in one node's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::state::NodeId;
use super::wire;

/// See the module. Entries of nodes that are gone do no harm: numbers are not given twice.
#[derive(Debug, Default)]
pub(crate) struct Kinds {
    /// Under which other address a node is known to a viewer, one a family.
    masks: BTreeMap<(NodeId, NodeId, bool), IpAddr>,
    /// Whom a node jails: node, peer.
    jails: BTreeSet<(NodeId, NodeId)>,
    wireguard_only: BTreeSet<NodeId>,
    without_disco: BTreeSet<NodeId>,
    muted: BTreeSet<NodeId>,
}

impl Kinds {
    pub(crate) fn mask(&mut self, node: NodeId, viewer: NodeId, mask: IpAddr) {
        self.masks.insert((node, viewer, mask.is_ipv4()), mask);
    }

    pub(crate) fn unmask(&mut self, node: NodeId, viewer: NodeId) {
        self.masks.retain(|(of, to, _), _| (*of, *to) != (node, viewer));
    }

    pub(crate) fn set_jailed(&mut self, node: NodeId, peer: NodeId, jailed: bool) {
        if jailed {
            self.jails.insert((node, peer));
        } else {
            self.jails.remove(&(node, peer));
        }
    }

    pub(crate) fn set_wireguard_only(&mut self, node: NodeId) {
        self.wireguard_only.insert(node);
    }

    pub(crate) fn hide_disco(&mut self, node: NodeId, hidden: bool) {
        if hidden {
            self.without_disco.insert(node);
        } else {
            self.without_disco.remove(&node);
        }
    }

    pub(crate) fn set_muted(&mut self, node: NodeId, muted: bool) {
        if muted {
            self.muted.insert(node);
        } else {
            self.muted.remove(&node);
        }
    }

    pub(crate) fn is_muted(&self, node: NodeId) -> bool {
        self.muted.contains(&node)
    }

    /// The address by which `viewer` knows a node that has `own`.
    pub(crate) fn known_as(&self, node: NodeId, viewer: NodeId, own: IpAddr) -> IpAddr {
        self.masks.get(&(node, viewer, own.is_ipv4())).copied().unwrap_or(own)
    }

    /// Turns a peer into what `viewer` is to see of it.
    pub(crate) fn dress(&self, viewer: NodeId, peer: &mut wire::Node) {
        for v4 in [true, false] {
            let ours = self.masks.get(&(viewer, peer.id, v4)).copied();
            *(if v4 { &mut peer.self_v4_masq } else { &mut peer.self_v6_masq }) = ours;
            let Some(mask) = self.masks.get(&(peer.id, viewer, v4)) else { continue };
            let bits = if v4 { "/32" } else { "/128" };
            let own = |text: &&mut String| text.ends_with(bits) && text.contains(':') != v4;
            let hosts = peer.addresses.iter_mut().chain(&mut peer.allowed_ips);
            hosts.filter(own).for_each(|text| *text = format!("{mask}{bits}"));
        }
        peer.is_jailed = self.jails.contains(&(viewer, peer.id));
        peer.is_wireguard_only = self.wireguard_only.contains(&peer.id);
        if peer.is_wireguard_only || self.without_disco.contains(&peer.id) {
            peer.disco_key = None;
        }
    }
}
