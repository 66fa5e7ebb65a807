//! The way out: CNI DEL and GC, pods that vanished, and identities that nobody uses.

use std::time::{Duration, Instant};

use podtether_proto::node::{AttachmentId, Cleanup, CniError, GcRequest, code};

use super::attach::{error, pod_name, reply_all, with_notes};
use super::identities::unix_now;
use super::pod::Leaver;
use super::steps::IdentityFate;
use super::{DELETE_WITHIN, Handle, Message, Table, random};
use crate::kube::Fate;
use crate::plan::Wanted;
use crate::record::{Identity, IdentityKey};
use crate::restart::jittered;

/// An identity whose pod was found gone, with nobody having said that it left: a node that rebooted
/// makes its pods anew, and they want their addresses back.
const AFTER_VANISHING: Duration = Duration::from_secs(600);
/// An identity whose ADD failed because a person has not acted yet.
const FOR_A_PERSON: Duration = Duration::from_secs(3600);
/// First pause after the API would not delete a device; doubles to [`MAX_REAP_PAUSE`].
const REAP_PAUSE: Duration = Duration::from_secs(2);
const MAX_REAP_PAUSE: Duration = Duration::from_secs(300);

impl Table {
    pub(super) fn del(&mut self, id: &AttachmentId, reply: Option<Leaver>) {
        let Some(pod) = self.pods.get_mut(id) else {
            // Without state there is nothing to remove, and nothing to complain about.
            if let Some(reply) = reply {
                let _ = reply.send(Ok(()));
            }
            return;
        };
        pod.leavers.extend(reply);
        for (_, _, adder, _) in pod.next.drain(..) {
            let _ = adder.send(Err(error(code::TRY_AGAIN, "the container was deleted before it joined", "")));
        }
        pod.retry_at = None;
        let others = self
            .pods
            .iter()
            .any(|(other, p)| other != id && self.pods.get(id).is_some_and(|own| p.identity == own.identity));
        let logout = !others
            && match self.pods.get(id).map(|pod| self.context.fate(&pod.record.pod)) {
                Some(Fate::Ended) => true,
                Some(Fate::Lives) => false,
                Some(Fate::Unknown) | None => self.context.config.node.identity_grace.is_zero(),
            };
        if let Some(pod) = self.pods.get_mut(id)
            && pod.wanted == Wanted::Attached
        {
            pod.wanted = Wanted::Gone { logout };
            let msg = format!("{}: it was deleted while it joined", pod_name(&pod.record.pod));
            let gone = error(code::TRY_AGAIN, msg, "");
            pod.failure.get_or_insert(gone);
        }
        self.advance(id);
    }

    pub(super) fn gc(&mut self, request: &GcRequest, reply: Leaver) {
        let stale: Vec<AttachmentId> = self
            .pods
            .keys()
            .filter(|id| id.network == request.network)
            // The runtime knows the interface by another name than ours, so the container decides.
            .filter(|id| !request.valid.iter().any(|(container, _)| *container == id.container_id))
            .cloned()
            .collect();
        let mut ends = Vec::new();
        for id in stale {
            tracing::info!(container = id.container_id, network = id.network, "GC: not valid any more");
            let (to, end) = tokio::sync::oneshot::channel();
            ends.push((id.container_id.clone(), end));
            self.del(&id, Some(to));
        }
        tokio::spawn(async move {
            let mut failed = Vec::new();
            for (container, end) in ends {
                if let Ok(Err(e)) = end.await {
                    failed.push(format!("{container}: {e}"));
                }
            }
            let result = if failed.is_empty() {
                Ok(())
            } else {
                Err(error(code::CLEANUP, "GC could not remove everything", failed.join("; ")))
            };
            let _ = reply.send(result);
        });
    }

    /// Begins to look for devices whose pods are no more.
    pub(super) fn cleanup(
        &self,
        dry_run: bool,
        reply: tokio::sync::oneshot::Sender<Result<Cleanup, CniError>>,
    ) {
        let Some(cluster) = self.context.cluster.clone() else {
            let what = "without the API server nobody knows which pods there are";
            let _ = reply.send(Err(error(
                code::BAD_CONFIG,
                what,
                "set node.name, as deploy/kustomize/base does",
            )));
            return;
        };
        let (context, table) = (std::sync::Arc::clone(&self.context), Handle { to: self.to_self.clone() });
        tokio::spawn(async move {
            let _ = reply.send(Ok(crate::ghosts::clean(&context, &cluster, &table, dry_run).await));
        });
    }

    /// The pod's namespace is gone and nobody said DEL.
    pub(super) fn netns_vanished(&mut self, id: &AttachmentId) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        tracing::info!(
            namespace = pod.record.pod.namespace,
            pod = pod.record.pod.name,
            "the pod's network namespace is gone: cleaning up"
        );
        pod.wanted = Wanted::Gone { logout: false };
        let msg = format!("{}: its network namespace is gone", pod_name(&pod.record.pod));
        let gone = error(code::UNKNOWN_CONTAINER, msg, "");
        pod.failure.get_or_insert(gone);
    }

    /// How long an identity stays whose pod went without a DEL.
    pub(super) fn keep_vanished_until(&self) -> u64 {
        let grace = self.context.config.node.identity_grace.max(AFTER_VANISHING);
        unix_now().saturating_add(grace.as_secs())
    }

    /// What the identity's record becomes when this attachment is forgotten.
    pub(super) fn identity_fate(&mut self, id: &AttachmentId) -> IdentityFate {
        let Some(pod) = self.pods.get(id) else { return IdentityFate::Keep };
        let shared = self.pods.iter().any(|(other, p)| other != id && p.identity == pod.identity);
        let may_be_known = pod.key_given || pod.awaits_person;
        let logout = matches!(pod.wanted, Wanted::Gone { logout: true });
        let keep_until = if pod.awaits_person && pod.failure.is_some() {
            unix_now().saturating_add(FOR_A_PERSON.as_secs())
        } else if pod.leavers.is_empty() {
            self.keep_vanished_until()
        } else {
            unix_now().saturating_add(self.context.config.node.identity_grace.as_secs())
        };
        let Some(identity) = self.identities.get_mut(&pod.identity) else { return IdentityFate::Keep };
        if shared {
            return IdentityFate::Keep;
        }
        if !identity.record.registered && !may_be_known {
            return IdentityFate::Remove(identity.record.id.clone());
        }
        identity.record.keep_until_unix_s = Some(keep_until);
        identity.record.leaving = logout;
        identity.changed();
        identity.saved = identity.version;
        IdentityFate::Save(Box::new(identity.record.clone()))
    }

    /// Everything of the attachment is gone.
    pub(super) fn forgotten(&mut self, id: &AttachmentId) {
        let Some(mut pod) = self.pods.remove(id) else { return };
        tracing::info!(namespace = pod.record.pod.namespace, pod = pod.record.pod.name, "pod left");
        if let Some(mut failure) = pod.failure.take() {
            pod.notes.insert(0, "everything was rolled back".into());
            failure.details = with_notes(&failure.details, &pod.notes);
            reply_all(&mut pod, &Err(failure));
        }
        for leaver in pod.leavers.drain(..) {
            let _ = leaver.send(Ok(()));
        }
        let mut device_gone = false;
        if let Some(identity) = self.identities.get_mut(&pod.identity) {
            if identity.holder.as_ref() == Some(id) {
                identity.holder = None;
            }
            device_gone = !identity.record.registered && !pod.key_given && !pod.awaits_person;
        }
        let waiting: Vec<AttachmentId> =
            self.pods.iter().filter(|(_, p)| p.identity == pod.identity).map(|(id, _)| id.clone()).collect();
        if waiting.is_empty() && device_gone {
            self.identities.remove(&pod.identity);
        }
        for id in waiting {
            self.advance(&id);
        }
        self.add_again(pod.next);
    }

    /// Once a second: identities without an attachment leave when their time is over.
    pub(super) fn reap(&mut self) {
        let now = Instant::now();
        let in_use: std::collections::HashSet<&IdentityKey> =
            self.pods.values().map(|p| &p.identity).collect();
        let longest = self.context.config.node.identity_grace.max(AFTER_VANISHING).max(FOR_A_PERSON);
        let mut due = Vec::new();
        for (key, identity) in &mut self.identities {
            let waits = identity.frozen || identity.reap_after.is_some_and(|at| at > now);
            if in_use.contains(key) || identity.reaping || waits {
                continue;
            }
            let kept = match self.context.fate(&identity.record.pod) {
                Fate::Ended => false,
                // Its next sandbox is on its way.
                Fate::Lives => true,
                Fate::Unknown => identity.is_kept(now, unix_now(), longest),
            };
            if kept && !identity.record.leaving {
                continue;
            }
            identity.reaping = true;
            due.push((key.clone(), identity.device(), identity.record.id.clone()));
        }
        for (key, device, id) in due {
            let (context, to) = (self.context.clone(), self.to_self.clone());
            tokio::spawn(async move {
                let result = reap_one(&context, &key, &device, id).await;
                let _ = to.send(Message::Reaped(key, result)).await;
            });
        }
    }

    pub(super) fn reaped(&mut self, key: &IdentityKey, result: Result<(), String>) {
        let in_use = self.pods.values().any(|p| p.identity == *key);
        let Some(identity) = self.identities.get_mut(key) else { return };
        identity.reaping = false;
        let whose = identity.record.pod.clone();
        match result {
            Ok(()) if in_use => {
                // A new sandbox came while the device was deleted: control will ask for a new key.
                identity.record.leaving = false;
                identity.record.registered = false;
                identity.saved = 0;
                identity.changed();
                let users: Vec<AttachmentId> =
                    self.pods.iter().filter(|(_, p)| p.identity == *key).map(|(id, _)| id.clone()).collect();
                for id in users {
                    self.advance(&id);
                }
            }
            Ok(()) => {
                let pod = &identity.record.pod;
                tracing::info!("{}: the unused identity has left the tailnet", pod_name(pod));
                self.identities.remove(key);
            }
            Err(e) => {
                let doubled = REAP_PAUSE.saturating_mul(1 << identity.reap_failures.min(8));
                identity.reap_failures = identity.reap_failures.saturating_add(1);
                identity.reap_after = Some(Instant::now() + jittered(doubled.min(MAX_REAP_PAUSE), random()));
                tracing::warn!("{}: the device cannot leave yet: {e}", pod_name(&identity.record.pod));
            }
        }
        self.name_is_free(&whose);
    }
}

async fn reap_one(
    context: &std::sync::Arc<crate::context::Context>,
    key: &IdentityKey,
    device: &crate::credentials::Device,
    id: String,
) -> Result<(), String> {
    let credential = context.credentials.get(&key.tailnet);
    match credential {
        Some(credential) if credential.deletes_devices() => {
            let until = Instant::now() + DELETE_WITHIN;
            credential.delete_device(device, until).await.map_err(|e| e.to_string())?;
        }
        Some(_) | None => {
            tracing::warn!(
                tailnet = key.tailnet,
                pod_uid = key.pod_uid,
                "no credential can delete the device: it stays in the tailnet until it expires"
            );
        }
    }
    let context = std::sync::Arc::clone(context);
    tokio::task::spawn_blocking(move || context.store.remove::<Identity>(&id).map_err(|e| e.to_string()))
        .await
        .unwrap_or_else(|e| Err(e.to_string()))
}
