//! How a pod came to be what it is: when, and by which rules.

use podtether_proto::node::{CniError, Explained, PodSelector, Setting, Source, code};
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
            choice: pod.record.choice.clone(),
            further: self.further(pod),
            last_exit: exit.unwrap_or_default(),
            join: pod.record.join.clone(),
        }
    }

    fn further(&self, pod: &Pod) -> Vec<Setting> {
        let record = &pod.record;
        let mut settings = Vec::new();
        let mut put = |name: &str, value: String, source: Source, rule: String| {
            settings.push(Setting { name: name.to_owned(), value, source, rule });
        };
        let chosen = |name: &str| record.choice.settings.iter().find(|setting| setting.name == name);
        let routes = record.routing.accept_routes.to_string();
        let exit_node = record.routing.exit_node.clone().unwrap_or_default();
        for (name, value) in [("accept-routes", routes), ("exit-node", exit_node)] {
            if chosen(name).is_some_and(|setting| setting.value != value) {
                put(name, value, Source::Pod, "changed since by `podtether routing`".to_owned());
            }
        }
        let tailnet = &record.tailnet;
        let Some(config) = self.context.config.tailnets.get(tailnet) else { return settings };
        put(
            "control-url",
            config.control_url.clone(),
            Source::Cluster,
            format!("tailnet.{tailnet}.control_url"),
        );
        let servers: Vec<String> = record.name_servers.iter().map(ToString::to_string).collect();
        let (dns, rule) = match servers.is_empty() {
            true => ("off".to_owned(), format!("tailnet.{tailnet}.dns, or the pod's annotation")),
            false => (
                format!("intercept {}", servers.join(" ")),
                format!(
                    "tailnet.{tailnet}.dns, or the pod's annotation; servers of the runtime or dns_servers"
                ),
            ),
        };
        put("dns", dns, Source::Cluster, rule);
        settings
    }
}
