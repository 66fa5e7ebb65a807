//! Whose routes and which exit node the pod uses.

use super::*;
use crate::netmap::NetMapChange;
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
        self.peers.configure_routes(routing.accept_routes, &routing.exclude, self.netmap.peers());
        self.routing.wanted = routing;
        self.find_exit();
        self.tell_routes();
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
        Some(self.netmap.peer(self.routing.exit_id?)?.stable_id.clone())
    }

    /// Peers came, went or changed, and the table has them.
    pub(super) fn follow_routes(&mut self, change: &NetMapChange) {
        if let Some(choice) = &self.routing.exit {
            let means = |id: &NodeId| self.netmap.peer(*id).is_some_and(|node| choice.means(node));
            let touched = change.changed.iter().any(|id| Some(*id) == self.routing.exit_id || means(id))
                || change.removed.iter().any(|node| Some(node.id) == self.routing.exit_id);
            if touched {
                self.find_exit();
            }
        }
        self.tell_routes();
    }

    fn find_exit(&mut self) {
        let choice = self.routing.exit.as_ref();
        let found =
            choice.and_then(|choice| self.netmap.peers().find(|node| choice.means(node))).map(|node| node.id);
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
        let Some(node) = self.routing.exit_id.and_then(|id| self.netmap.peer(id)) else {
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
        if node.online == Some(false) {
            health.push(format!("exit node {name} is offline"));
        }
        health
    }
}
