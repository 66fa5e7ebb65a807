//! Whose routes and which exit node the pod uses.

use super::*;
use crate::peer::PeerChanges;
use crate::routes::{ExitChoice, MAX_ROUTES};
use crate::tailcfg::NodeId;

/// What was asked for and what came of it.
#[derive(Debug, Default)]
pub(super) struct State {
    wanted: Routing,
    exit: Option<ExitChoice>,
    /// The peer that is meant, while it is in the netmap.
    exit_id: Option<NodeId>,
    accepted: Vec<ipnet::IpNet>,
    told: Option<String>,
    version: u64,
}

impl Engine {
    /// Changes what the pod uses of the routes that peers offer, from the next packet on.
    pub fn set_routing(&mut self, routing: Routing) {
        if self.routing.wanted == routing {
            return;
        }
        self.routing.exit =
            routing.exit_node.as_deref().map(ExitChoice::new).filter(|choice| !choice.text().is_empty());
        self.peers.configure_routes(routing.accept_routes, &routing.exclude);
        self.routing.wanted = routing;
        self.find_exit();
        self.tell_routes();
    }

    /// The first address of the peer that is meant by a name, an address or a stable id.
    #[must_use]
    pub fn find_peer(&self, wanted: &str) -> Option<std::net::IpAddr> {
        let choice = ExitChoice::new(wanted);
        let mut meant = self.peers.iter().filter(|(_, peer)| choice.means(&peer.facts));
        meant.find_map(|(_, peer)| peer.facts.addresses().map(|net| net.addr()).next())
    }

    /// Which destinations beyond the tailnet's own ranges belong into this node's TUN.
    #[must_use]
    pub fn routes(&self) -> RoutesView {
        RoutesView { accepted: self.routing.accepted.clone(), exit_node: self.exit_node_id() }
    }

    /// Grows when [`Engine::routes`] would tell something else.
    #[must_use]
    pub fn routes_version(&self) -> u64 {
        self.routing.version
    }

    pub(super) fn exit_node_id(&self) -> Option<String> {
        Some(self.exit_peer()?.facts.stable_id().to_owned())
    }

    fn exit_peer(&self) -> Option<&crate::peer::Peer> {
        self.peers.get(self.peers.slot(self.routing.exit_id?)?)
    }

    /// Peers came, went or changed, and the table has them.
    pub(super) fn follow_routes(&mut self, changes: &PeerChanges) {
        if let Some(choice) = &self.routing.exit {
            // Only who loses the role makes it necessary to look at everybody.
            let mut lost = changes.removed.iter().any(|(id, ..)| Some(*id) == self.routing.exit_id);
            let mut found = self.routing.exit_id;
            for peer in changes.changed.iter().filter_map(|slot| self.peers.get(*slot)) {
                let means = choice.means(&peer.facts);
                lost |= !means && self.routing.exit_id == Some(peer.id);
                if means && found.is_none_or(|id| peer.id < id) {
                    found = Some(peer.id);
                }
            }
            if lost {
                self.find_exit();
            } else if found != self.routing.exit_id {
                self.routing.exit_id = found;
                self.peers.set_exit(found);
            }
        }
        self.tell_routes();
    }

    pub(super) fn find_exit(&mut self) {
        let meant = |choice: &ExitChoice| {
            let peers = self.peers.iter().map(|(_, peer)| peer);
            peers.filter(|peer| choice.means(&peer.facts)).map(|peer| peer.id).min()
        };
        let found = self.routing.exit.as_ref().and_then(meant);
        self.routing.exit_id = found;
        self.peers.set_exit(found);
    }

    fn tell_routes(&mut self) {
        let mut changed = false;
        if self.peers.routes().take_changed() {
            let accepted = self.peers.routes().accepted();
            changed = accepted != self.routing.accepted;
            self.routing.accepted = accepted;
        }
        let exit = self.exit_node_id();
        if exit != self.routing.told {
            self.routing.told = exit;
            self.events.push_back(Event::HostUpdate);
            changed = true;
        }
        if changed {
            self.routing.version += 1;
            self.events.push_back(Event::RoutesChanged);
        }
    }

    /// Why nobody carries a packet.
    pub(super) fn why_no_peer(&self) -> DropReason {
        if self.routing.exit.is_some() { DropReason::NoExitNode } else { DropReason::NoPeer }
    }

    /// What is wrong with the routes in use, in sentences.
    pub(super) fn routing_health(&self) -> Vec<String> {
        let mut health = Vec::new();
        if self.peers.routes_ref().is_full() {
            health.push(format!("peers offer more than {MAX_ROUTES} subnet routes: the rest is not used"));
        }
        let Some(choice) = self.routing.exit.as_ref().filter(|_| self.running) else { return health };
        let name = choice.text();
        let Some(peer) = self.exit_peer() else {
            health.push(format!("exit node {name} is not among this node's peers: its traffic is dropped"));
            return health;
        };
        match self.peers.routes_ref().exit_carries() {
            [false, false] => health.push(format!(
                "{name} is no exit node, or not an approved one: the traffic for it is dropped"
            )),
            [true, false] => health.push(format!("exit node {name} carries no IPv6")),
            [false, true] => health.push(format!("exit node {name} carries no IPv4")),
            [true, true] => {}
        }
        if peer.online == Some(false) {
            health.push(format!("exit node {name} is offline"));
        }
        health
    }
}
