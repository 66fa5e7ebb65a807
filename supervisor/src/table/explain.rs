//! How a pod came to be what it is: when, and by which rules.

use podtether_proto::node::{CniError, Explained, PodSelector, Setting, code};
use tokio::sync::oneshot;

use super::Table;
use super::attach::error;
use super::pod::Pod;

pub(super) type Asker = oneshot::Sender<Result<Explained, CniError>>;

impl Table {
    pub(super) fn explain(&self, selector: &PodSelector, reply: Asker) {
        let found = self.select(selector).and_then(|id| {
            let pod = self.pods.get(&id);
            pod.ok_or_else(|| error(code::UNKNOWN_CONTAINER, "no such pod", ""))
        });
        let _ = reply.send(found.map(|pod| self.explained(pod)));
    }

    fn explained(&self, pod: &Pod) -> Explained {
        let exit = pod.last_exit.as_ref();
        let exit = exit.map(|e| format!("{} s ago: {} ({})", e.at.elapsed().as_secs(), e.reason, e.kind));
        Explained {
            timeline: pod.record.timeline.clone(),
            settings: self.settings(pod),
            last_exit: exit.unwrap_or_default(),
        }
    }

    fn settings(&self, pod: &Pod) -> Vec<Setting> {
        let record = &pod.record;
        let mut settings = Vec::new();
        let mut put = |name: &str, value: String, source: String| {
            settings.push(Setting { name: name.to_owned(), value, source });
        };
        let tailnet = &record.tailnet;
        put("tailnet", tailnet.clone(), "the network configuration (conflist)".to_owned());
        if let Some(identity) = self.identities.get(&pod.identity) {
            let source = format!("tailnet.{tailnet}.hostname_template");
            put("hostname", identity.record.hostname.clone(), source);
        }
        let Some(config) = self.context.config.tailnets.get(tailnet) else { return settings };
        let of = |key: &str| format!("tailnet.{tailnet}.{key}");
        let list = |items: &[String]| if items.is_empty() { "none".to_owned() } else { items.join(" ") };
        put("control-url", config.control_url.clone(), of("control_url"));
        put("tags", list(&config.tags), of("tags"));
        put("ephemeral", config.ephemeral.to_string(), of("ephemeral"));
        let chosen = |same: bool, key: &str| {
            if same { of(key) } else { "the pod's annotation, or `podtether routing`".to_owned() }
        };
        put(
            "accept-routes",
            record.routing.accept_routes.to_string(),
            chosen(record.routing.accept_routes == config.routing.accept_routes, "accept_routes"),
        );
        put(
            "exit-node",
            record.routing.exit_node.clone().unwrap_or_else(|| "none".to_owned()),
            chosen(record.routing.exit_node == config.routing.exit_node, "exit_node"),
        );
        let servers: Vec<String> = record.name_servers.iter().map(ToString::to_string).collect();
        let (dns, source) = if servers.is_empty() {
            ("off".to_owned(), format!("{} or the pod's annotation", of("dns")))
        } else {
            (
                format!("intercept {}", servers.join(" ")),
                format!("{} or annotation; servers of the runtime", of("dns")),
            )
        };
        put("dns", dns, source);
        settings
    }
}
