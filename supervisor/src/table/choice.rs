//! What the table adds to a choice: a device name that nobody else has.

use podtether_proto::engine::PodRef;
use podtether_proto::node::{self, AttachmentId, CniError, PodSelector, Source, code};

use super::Table;
use super::attach::error;
use crate::choose::Key;
use crate::hostname::Names;
use crate::record::IdentityKey;

/// No two pods of one name live at a time.
fn is_earlier(one: &PodRef, pod: &PodRef) -> bool {
    one.namespace == pod.namespace && one.name == pod.name && one.uid != pod.uid
}

impl Table {
    /// The first of `names` that no other pod here has, told where it is not the one asked for. A pod of the same
    /// namespace and name is an earlier one of this pod's own, as no two live at a time: its device is on its way
    /// out, so its name is free.
    pub(super) fn free_name(
        &mut self,
        key: &IdentityKey,
        pod: &PodRef,
        names: &Names,
        told: &mut node::Choice,
    ) -> String {
        let others = || {
            let same = |(k, _): &(&IdentityKey, _)| k.tailnet == key.tailnet && *k != key;
            self.identities.iter().filter(same).map(|(_, identity)| &identity.record)
        };
        let holder = |name: &str| others().find(|r| r.hostname == name && !is_earlier(&r.pod, pod));
        let picked = names.pick(|name| holder(name).is_some()).to_owned();
        if let Some(holder) = holder(&names.wanted)
            && picked != names.wanted
            && let Some(setting) = told.settings.iter_mut().find(|s| s.name == Key::Hostname.name())
        {
            let whose = format!("{}/{}", holder.pod.namespace, holder.pod.name);
            setting.rule.push_str(&format!("; {} is the device of pod {whose}", names.wanted));
            if matches!(setting.source, Source::Pod | Source::Namespace) {
                told.notes.push(format!(
                    "host name {} is taken by pod {whose}, so the device is called {picked}: give each pod a name \
                     of its own, with {{pod}} in the annotation, or leave it out",
                    names.wanted
                ));
            }
            setting.value.clone_from(&picked);
        }
        for (_, identity) in self.identities.iter_mut().filter(|(k, _)| k.tailnet == key.tailnet && *k != key)
        {
            let unused = !self.pods.values().any(|p| p.identity == identity.record.key);
            if unused && is_earlier(&identity.record.pod, pod) && !identity.record.leaving {
                identity.record.leaving = true;
                identity.changed();
            }
        }
        self.reap();
        picked
    }

    /// Whether an earlier pod of the same name is just leaving the tailnet: whoever joins before it has left is
    /// given the name with a number behind it.
    pub(super) fn name_is_held(&self, id: &AttachmentId) -> bool {
        let Some(pod) = self.pods.get(id) else { return false };
        self.identities.iter().any(|(key, identity)| {
            *key != pod.identity
                && key.tailnet == pod.identity.tailnet
                && identity.record.leaving
                // One that does not go at once is not waited for.
                && identity.reap_failures == 0
                && is_earlier(&identity.record.pod, &pod.record.pod)
        })
    }

    /// An earlier pod's device has left, or does not go.
    pub(super) fn name_is_free(&mut self, earlier: &PodRef) {
        let heirs = self.pods.iter().filter(|(_, pod)| is_earlier(earlier, &pod.record.pod));
        let heirs: Vec<AttachmentId> = heirs.map(|(id, _)| id.clone()).collect();
        for id in heirs {
            self.advance(&id);
        }
    }

    /// What was decided about a pod that is here.
    pub(super) fn choice(&self, selector: &PodSelector) -> Result<node::Choice, CniError> {
        let id = self.select(selector)?;
        let pod = self.pods.get(&id).ok_or_else(|| error(code::UNKNOWN_CONTAINER, "no such pod", ""))?;
        Ok(pod.record.choice.clone())
    }
}
