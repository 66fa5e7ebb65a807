//! The handle's part about peers that are not plain members of the tailnet. What a policy says about them is
//! by their own addresses.

use std::net::{IpAddr, SocketAddr};

use jiff::Timestamp;
use podtether_core::key::{MachinePublic, NodePublic};

use crate::control::kinds::Kinds;
use crate::control::shares::Share;
use crate::control::state::{NewNode, NodeId};
use crate::control::wire::{self, Hostinfo};
use crate::{Devnet, NodeInfo, random};

impl Devnet {
    /// Changes what is seen of some nodes; false when one of them is not there.
    fn change_kinds(&self, nodes: &[NodeId], change: impl FnOnce(&mut Kinds)) -> bool {
        self.inner.shared.with_state(|state| {
            let there = nodes.iter().all(|id| state.nodes.contains_key(id));
            if there {
                change(&mut state.kinds);
                nodes.iter().for_each(|id| state.touch(*id));
                // Rules name a node as its peer knows it.
                state.touch_topology();
            }
            there
        })
    }

    /// Lets `viewer` know a node by another address, which is told to the node; false when there is no such
    /// node.
    pub fn masquerade(&self, node: NodeId, viewer: NodeId, mask: IpAddr) -> bool {
        self.change_kinds(&[node, viewer], |kinds| kinds.mask(node, viewer, mask))
    }

    /// Lets `viewer` know a node by its own addresses again; false when there is no such node.
    pub fn unmask(&self, node: NodeId, viewer: NodeId) -> bool {
        self.change_kinds(&[node, viewer], |kinds| kinds.unmask(node, viewer))
    }

    /// Lets a node treat a peer as jailed, or not; false when there is no such node.
    pub fn set_jailed(&self, node: NodeId, peer: NodeId, jailed: bool) -> bool {
        self.change_kinds(&[node, peer], |kinds| kinds.set_jailed(node, peer, jailed))
    }

    /// Adds a tailnet with a MagicDNS suffix of its own, and gives the number of a first user in it; or adds
    /// another user to it. Its nodes are those of its users' keys. It has the devnet's relays, policy (which
    /// is about its own nodes alone) and range of addresses; tailnets know of each other's nodes only by
    /// shares.
    pub fn add_tailnet_user(&self, domain: &str, name: &str, display_name: &str) -> u64 {
        let (name, display_name) = (name.to_owned(), display_name.to_owned());
        let domain = (domain != self.base_domain()).then(|| domain.to_owned());
        self.inner.shared.with_state(|state| state.add_user(name, display_name, domain, Timestamp::now()))
    }

    /// Shares a node with a user of another tailnet, as its tailnet's user `by`: that user's nodes that have no
    /// tags may begin conversations with it, and it with them only out of quarantine. A share that is there is
    /// changed. False when the node or one of the users is not there, or is in the wrong tailnet.
    pub fn share_node(&self, node: NodeId, with: u64, by: u64, quarantined: bool) -> bool {
        self.inner.shared.with_state(|state| state.share(node, with, Share { by, quarantined }))
    }

    /// Ends a share; false when there is none.
    pub fn unshare_node(&self, node: NodeId, with: u64) -> bool {
        self.inner.shared.with_state(|state| state.unshare(node, with))
    }

    /// Tells nobody a node's disco key, or tells it again; false when there is no such node.
    pub fn hide_disco_key(&self, node: NodeId, hidden: bool) -> bool {
        self.change_kinds(&[node], |kinds| kinds.hide_disco(node, hidden))
    }

    /// Tells a node nothing but that the server is alive, or all that it missed; false when there is no such
    /// node.
    pub fn set_muted(&self, node: NodeId, muted: bool) -> bool {
        self.change_kinds(&[node], |kinds| kinds.set_muted(node, muted))
    }

    /// Lets a node's key be valid for ever.
    pub fn renew_node(&self, id: NodeId) {
        self.inner.shared.with_state(|state| state.set_expiry(id, None, Timestamp::now()));
    }

    /// Adds a node that is WireGuard and nothing else, with this key at these endpoints. `None` when the
    /// tailnet is full or has the key.
    #[must_use]
    pub fn add_wireguard_node(
        &self,
        name: &str,
        node_key: NodePublic,
        endpoints: Vec<SocketAddr>,
    ) -> Option<NodeInfo> {
        let mut hostinfo = Hostinfo::new();
        hostinfo.insert("Hostname".into(), name.into());
        let mut machine_key = [0; 32];
        machine_key.copy_from_slice(&random::bytes(32));
        let new = NewNode {
            machine_key: MachinePublic::from_bytes(machine_key),
            node_key,
            hostinfo,
            tags: Vec::new(),
            ephemeral: false,
            preauthorized: true,
            user: wire::USER,
            expiry: None,
            version: wire::MIN_VERSION,
        };
        self.inner.shared.with_state(|state| {
            let id = state.add_node(new, Timestamp::now()).ok()?;
            state.kinds.set_wireguard_only(id);
            state.nodes.get_mut(&id)?.endpoints = endpoints;
            state.touch(id);
            state.nodes.get(&id).map(NodeInfo::from)
        })
    }
}
