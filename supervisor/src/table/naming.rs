//! Whether a new device got the name that it asked for. Of two that ask for one, wherever they are, the server gives
//! it to one, and numbers the other: only its answer settles that, without a race. Who was numbered asks for a name
//! that tells its pod apart, before the runtime hears that the pod has joined.

use std::time::{Duration, Instant};

use podtether_proto::engine::NodeState;
use podtether_proto::node::{AttachmentId, Source};

use super::Table;
use crate::choose::Key;
use crate::engine::{ANSWER_WITHIN, within};
use crate::hostname::numbered;
use crate::plan::Wanted;

/// For a server that takes the other name and does not say so.
const RENAMED_WITHIN: Duration = Duration::from_secs(5);

/// How far that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Naming {
    /// The server has not said yet what the device is called.
    Unknown,
    /// Another name was asked for, and is waited for until then.
    Asked(Instant),
    /// It has a name.
    Settled,
}

impl Naming {
    /// Whether the pod's ADD waits for its name.
    pub(super) fn is_open(self, now: Instant) -> bool {
        matches!(self, Naming::Asked(until) if now < until)
    }
}

impl Table {
    /// Looks at what the server calls the pod's device.
    pub(super) fn settle_name(&mut self, id: &AttachmentId) {
        let now = Instant::now();
        let Some(pod) = self.pods.get_mut(id) else { return };
        if pod.naming == Naming::Settled || pod.wanted != Wanted::Attached {
            return;
        }
        let Some(identity) = self.identities.get_mut(&pod.identity) else { return };
        let engine = pod.engine.as_ref();
        let status = engine.and_then(|engine| engine.status.as_ref());
        let Some(status) = status.filter(|s| s.control_connected && s.state == NodeState::Running) else {
            return;
        };
        let Some(node) = &status.node else { return };
        let label = node.name.split('.').next().unwrap_or_default();
        let record = &mut identity.record;
        let asked_for = record.hostname.clone();
        let waits = pod.naming.is_open(now);
        if !numbered(&asked_for, label) {
            // While it waits, it is still called as before.
            if label == asked_for || !waits {
                pod.naming = Naming::Settled;
            }
            return;
        }
        if record.name_taken.is_empty() {
            record.name_taken.clone_from(&asked_for);
        }
        if record.other_names.is_empty() {
            pod.naming = Naming::Settled;
            identity.changed();
            return;
        }
        let next = record.other_names.remove(0);
        record.hostname.clone_from(&next);
        identity.changed();
        let taken = &identity.record.name_taken;
        let told = &mut pod.record.choice;
        if let Some(setting) = told.settings.iter_mut().find(|s| s.name == Key::Hostname.name()) {
            setting.rule.push_str(&format!("; another device of the tailnet is called {asked_for}"));
            setting.value.clone_from(&next);
            if matches!(setting.source, Source::Pod | Source::Namespace) {
                told.notes.push(format!(
                    "host name {taken} is taken by another device of tailnet {}, so this one is called {next}: give \
                     the pod a name of its own, with {{pod}} in the annotation, or leave it out",
                    pod.record.tailnet
                ));
            }
        }
        pod.changed();
        let (namespace, name) = (&pod.record.pod.namespace, &pod.record.pod.name);
        tracing::info!(namespace, pod = name, "{asked_for} is taken in the tailnet: it asks for {next}");
        let until = now + RENAMED_WITHIN;
        pod.naming = Naming::Asked(until);
        if let Some(client) = pod.engine.as_ref().and_then(|engine| engine.client.clone()) {
            tokio::spawn(async move {
                let asked = client.rename(within(ANSWER_WITHIN), next).await;
                if let Ok(Err(e)) | Err(e) = asked.map_err(|e| e.to_string()) {
                    tracing::debug!("the engine does not ask for another name: {e}");
                }
            });
        }
        self.wake(id, until);
    }
}
