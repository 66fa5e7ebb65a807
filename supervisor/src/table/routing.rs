//! Routes of other nodes: asked for, told to the engine, put onto the pod's interface.

use podtether_net::link::PodConfig;
use podtether_proto::calls::KnownEngine;
use podtether_proto::node::{AttachedRoute, AttachmentId, CniError, PodRouting, PodSelector, Routing, code};
use tokio::sync::oneshot;

use super::Table;
use super::attach::{error, pod_name};
use super::pod::{Pod, Running};
use crate::plan::Wanted;
use crate::routing::{self, Cluster};

pub(super) type Router = oneshot::Sender<Result<PodRouting, CniError>>;

impl Table {
    pub(super) fn select(&self, selector: &PodSelector) -> Result<AttachmentId, CniError> {
        let found = match selector {
            PodSelector::Attachment(id) => self.pods.contains_key(id).then(|| id.clone()),
            PodSelector::Pod { namespace, name } => {
                let named =
                    |pod: &&Pod| pod.record.pod.namespace == *namespace && pod.record.pod.name == *name;
                // An older sandbox of the pod may be on its way out.
                let mut pods: Vec<&Pod> = self.pods.values().filter(named).collect();
                pods.sort_by_key(|pod| (pod.wanted != Wanted::Attached, pod.record.attachment.clone()));
                pods.first().map(|pod| pod.record.attachment.clone())
            }
        };
        found.ok_or_else(|| {
            let what = match selector {
                PodSelector::Attachment(id) => {
                    format!("container {} has no {} of ours", id.container_id, id.ifname)
                }
                PodSelector::Pod { namespace, name } => format!("no pod {namespace}/{name} has joined here"),
            };
            error(code::UNKNOWN_CONTAINER, what, "ask the supervisor of the node that it runs on")
        })
    }

    /// The engine of a pod, and what to call the pod.
    pub(super) fn client(&self, selector: &PodSelector) -> Result<(String, KnownEngine), CniError> {
        let id = self.select(selector)?;
        let pod = self.pods.get(&id).ok_or_else(|| error(code::UNKNOWN_CONTAINER, "no such pod", ""))?;
        let name = pod_name(&pod.record.pod);
        let client = pod.engine.as_ref().and_then(|engine| engine.client.clone());
        let client = client.ok_or_else(|| {
            error(code::TRY_AGAIN, format!("{name}: its engine is not running"), pod.reason.clone())
        })?;
        Ok((name, client))
    }

    pub(super) fn set_routing(&mut self, selector: &PodSelector, wanted: Routing, reply: Router) {
        match self.accept_routing(selector, wanted) {
            Ok(id) => {
                self.refresh_routing(&id);
                if let Some(pod) = self.pods.get_mut(&id) {
                    pod.routers.push(reply);
                }
                self.advance(&id);
            }
            Err(e) => {
                let _ = reply.send(Err(e));
            }
        }
    }

    /// Takes a wish that can be fulfilled into the pod's record.
    fn accept_routing(&mut self, selector: &PodSelector, wanted: Routing) -> Result<AttachmentId, CniError> {
        let id = self.select(selector)?;
        let Some(pod) = self.pods.get_mut(&id) else { return Ok(id) };
        let name = pod_name(&pod.record.pod);
        if pod.wanted != Wanted::Attached {
            return Err(error(code::TRY_AGAIN, format!("{name} is leaving"), ""));
        }
        let bad = |e: String| error(code::BAD_CONFIG, format!("{name}: {e}"), "nothing was changed");
        let exit_node = routing::exit_node(wanted.exit_node.as_deref().unwrap_or_default()).map_err(bad)?;
        let wanted = Routing { exit_node, ..wanted };
        routing::check(&wanted, &self.context.config.node.cluster_cidrs, &pod.record.primary).map_err(bad)?;
        if pod.record.routing != wanted {
            tracing::info!(
                namespace = pod.record.pod.namespace,
                pod = pod.record.pod.name,
                accept_routes = wanted.accept_routes,
                exit_node = wanted.exit_node,
                "routing changed"
            );
            pod.record.routing = wanted;
            pod.changed();
        }
        Ok(id)
    }

    pub(super) fn routing(&self, selector: &PodSelector, reply: Router) {
        let answer = self.select(selector).and_then(|id| {
            let pod = self.pods.get(&id).ok_or_else(|| error(code::UNKNOWN_CONTAINER, "no such pod", ""))?;
            Ok(pod_routing(pod))
        });
        let _ = reply.send(answer);
    }

    /// What the pod's engine should use and its interface should carry, as far as that is known now.
    pub(super) fn refresh_routing(&mut self, id: &AttachmentId) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        let node = &self.context.config.node;
        let configured = [node.cluster_cidrs.as_slice(), node.exclude_cidrs.as_slice()].concat();
        // Without its own name servers a pod is cut off as well.
        let near = [self.underlay.addresses.as_slice(), pod.record.name_servers.as_slice()].concat();
        let cluster = Cluster { configured: &configured, primary: &pod.record.primary, near: &near };
        pod.engine_routing = routing::for_engine(&pod.record.routing, &cluster);
        let addresses = match pod.engine.as_ref().and_then(Running::addresses) {
            Some(addresses) => addresses.to_vec(),
            None if pod.target.is_some() => pod.record.addresses.clone(),
            None => return,
        };
        let tailnet = self.context.routes(&addresses);
        let target = routing::pod_config(addresses, tailnet, &pod.record.routing, &pod.accepted, &cluster);
        pod.target = Some(target);
    }

    /// Everything asked for is in force.
    pub(super) fn answer_routers(&mut self, id: &AttachmentId) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        if pod.routers.is_empty() || pod.saved < pod.version {
            return;
        }
        let answer = pod_routing(pod);
        for router in pod.routers.drain(..) {
            let _ = router.send(Ok(answer.clone()));
        }
    }
}

fn pod_routing(pod: &Pod) -> PodRouting {
    let status = pod.engine.as_ref().and_then(|e| e.status.as_ref());
    PodRouting {
        attachment: pod.record.attachment.clone(),
        routing: pod.record.routing.clone(),
        routes: routes(pod),
        exit_node_id: status.and_then(|s| s.exit_node_id.clone()),
        health: pod.health(),
    }
}

/// The routes through a pod's interface as they were made.
pub(super) fn routes(pod: &Pod) -> Vec<AttachedRoute> {
    let Some(made) = &pod.configured else { return Vec::new() };
    let main = made.routes.iter().map(|(dst, gw)| AttachedRoute { dst: *dst, gw: Some(*gw), table: None });
    let exit = made.exit.iter().flat_map(|exit| {
        exit.routes.iter().map(|(dst, gw)| AttachedRoute {
            dst: *dst,
            gw: Some(*gw),
            table: Some(exit.table),
        })
    });
    main.chain(exit).collect()
}

impl Pod {
    /// What CHECK compares the interface with.
    pub(super) fn checked_config(&self, tailnet: Vec<ipnet::IpNet>) -> PodConfig {
        self.configured_for.clone().unwrap_or_else(|| PodConfig {
            addresses: self.record.addresses.clone(),
            routes: tailnet,
            ..PodConfig::default()
        })
    }
}
