//! CNI ADD: from the request to its answer.

use std::time::{Duration, Instant};

use podtether_proto::engine::{NodeState, PodRef};
use podtether_proto::node::{AddRequest, Attached, AttachmentId, CniError, Timeline, code};

use super::identities::Identity;
use super::naming::Naming;
use super::pod::{Adder, Join, Pod, Waiting};
use super::{MAX_PODS, Table};
use crate::choose::Choice;
use crate::plan::{Step, Wanted};
use crate::record::{self, IdentityKey, random_id};
use crate::routing;

/// Part of the runtime's patience that is kept for rolling back.
const ROLLBACK_SHARE: u32 = 4;
const MIN_ROLLBACK: Duration = Duration::from_millis(1500);
const MAX_ROLLBACK: Duration = Duration::from_secs(10);
/// Before the runtime's own deadline, so that the answer still arrives.
const REPLY_EARLY: Duration = Duration::from_millis(250);
/// Longest name that is taken from a runtime.
const MAX_NAME: usize = 253;

/// What to do about a name that only the runtime can have wrong.
const BY_RUNTIME: &str = "the container runtime passes it: see its log";

/// An error of ours.
pub(super) fn error(code: u32, msg: impl Into<String>, details: impl Into<String>) -> CniError {
    CniError { code, msg: msg.into(), details: details.into() }
}

pub(super) fn pod_name(pod: &PodRef) -> String {
    format!("pod {}/{}", pod.namespace, pod.name)
}

impl Table {
    pub(super) fn add(&mut self, request: AddRequest, choice: Choice, reply: Adder) {
        if let Some(pod) = self.pods.get_mut(&request.attachment) {
            match pod.wanted {
                Wanted::Attached if differs(&pod.record, &request) => {
                    let _ = reply.send(Err(taken(&pod.record)));
                }
                Wanted::Attached => {
                    tracing::debug!(parent: &pod.span, call = request.join, "ADD of what is there already");
                    pod.adders.push(reply);
                    if pod.join.is_none() {
                        let join = join(&request, Instant::now());
                        pod.join = Some(join);
                        self.wake_join(&request.attachment, join);
                    }
                    self.advance(&request.attachment);
                }
                Wanted::Gone { .. } => {
                    let id = request.attachment.clone();
                    pod.next.push((request, choice, reply, Instant::now()));
                    // Somebody waits for what is left to be removed: whatever failed is tried at once.
                    pod.retry_at = None;
                    self.advance(&id);
                }
            }
            return;
        }
        match self.new_pod(&request, choice) {
            Ok(mut pod) => {
                tracing::debug!(parent: &pod.span, tailnet = request.tailnet, timeout_ms = request.timeout_ms, "ADD");
                let join = join(&request, Instant::now());
                pod.adders.push(reply);
                pod.join = Some(join);
                self.take_over_identity(&pod);
                self.pods.insert(request.attachment.clone(), pod);
                self.wake_join(&request.attachment, join);
                self.advance(&request.attachment);
            }
            Err(e) => {
                let _ = reply.send(Err(e));
            }
        }
    }

    /// The container is gone: whoever asked for it again meanwhile gets it anew.
    pub(super) fn add_again(&mut self, next: Vec<Waiting>) {
        for (mut request, choice, reply, asked) in next {
            let waited = u64::try_from(asked.elapsed().as_millis()).unwrap_or(u64::MAX);
            request.timeout_ms = request.timeout_ms.saturating_sub(waited);
            if !reply.is_closed() {
                self.add(request, choice, reply);
            }
        }
    }

    fn wake_join(&mut self, id: &AttachmentId, join: Join) {
        let later = Duration::from_millis(2);
        self.wake(id, join.deadline + later);
        self.wake(id, join.reply_by + later);
    }

    fn new_pod(&mut self, request: &AddRequest, choice: Choice) -> Result<Pod, CniError> {
        check_names(request)?;
        let Some(tailnet) = self.context.config.tailnets.get(&request.tailnet) else {
            let known: Vec<&str> = self.context.config.tailnets.keys().map(String::as_str).collect();
            return Err(error(
                code::BAD_CONFIG,
                format!("no tailnet is called {:?}", request.tailnet),
                format!("the supervisor's configuration has: {}", known.join(", ")),
            ));
        };
        if self.pods.len() >= MAX_PODS {
            return Err(error(code::TRY_AGAIN, "this node has too many pods", "remove some"));
        }
        let name_servers = crate::dns::intercepted(tailnet, request)?;
        let wrong =
            |e| error(code::BAD_CONFIG, format!("{}: {e}", pod_name(&request.pod)), "nothing was made");
        let Choice { routing, names, mut told, .. } = choice;
        routing::check(&routing, &self.context.config.node.cluster_cidrs, &request.primary).map_err(wrong)?;
        let key = IdentityKey {
            tailnet: request.tailnet.clone(),
            pod_uid: request.pod.uid.clone(),
            ifname: request.attachment.ifname.clone(),
        };
        if !self.identities.contains_key(&key) {
            let mut identity = Identity::new(key.clone(), request.pod.clone())
                .map_err(|e| error(code::IO, "no random bytes for new keys", e))?;
            identity.record.hostname = self.free_name(&key, &request.pod, &names, &mut told);
            identity.record.other_names = names.after(&identity.record.hostname);
            identity.record.tags = Some(choice.tags);
            identity.record.ephemeral = Some(choice.ephemeral);
            self.identities.insert(key.clone(), identity);
        }
        let mut identity_id = String::new();
        let mut had_device = false;
        if let Some(identity) = self.identities.get_mut(&key) {
            identity_id.clone_from(&identity.record.id);
            had_device = identity.record.registered && !identity.record.leaving;
            identity.frozen = false;
            if identity.record.keep_until_unix_s.take().is_some() || identity.record.leaving {
                identity.record.leaving = false;
                identity.changed();
            }
        }
        let slot = self.free_slot();
        let record = record::Attachment {
            id: random_id(),
            attachment: request.attachment.clone(),
            netns: request.netns.clone(),
            netns_inode: 0,
            pod: request.pod.clone(),
            tailnet: request.tailnet.clone(),
            identity: identity_id,
            slot,
            udp4_port: 0,
            udp6_port: 0,
            uid: self.context.uid(slot),
            addresses: Vec::new(),
            mac: String::new(),
            name_servers,
            routing,
            primary: request.primary.clone(),
            unhurried: !choice.required,
            choice: told,
            timeline: Timeline::default(),
            join: request.join.clone(),
        };
        let mut pod = Pod { had_device, ..Pod::new(record, key, false) };
        if had_device {
            pod.naming = Naming::Settled;
        }
        pod.record.timeline = pod.clock.begin(Instant::now());
        Ok(pod)
    }

    fn free_slot(&self) -> u32 {
        let taken: std::collections::HashSet<u32> = self.pods.values().map(|p| p.record.slot).collect();
        // After a change of node.uid_base other slots may have the uid that this one would get.
        let uids: std::collections::HashSet<u32> = self.pods.values().filter_map(|p| p.record.uid).collect();
        let is_free = |slot: u32| {
            !taken.contains(&slot) && self.context.uid(slot).is_none_or(|uid| !uids.contains(&uid))
        };
        (0..).find(|slot| is_free(*slot)).unwrap_or(0)
    }

    /// A new sandbox of the same pod gets the identity; the older attachment goes, the device stays.
    fn take_over_identity(&mut self, newer: &Pod) {
        let older: Vec<AttachmentId> = self
            .pods
            .iter()
            .filter(|(_, p)| p.identity == newer.identity)
            .map(|(id, _)| id.clone())
            .collect();
        for id in older {
            if let Some(pod) = self.pods.get_mut(&id) {
                tracing::info!(
                    namespace = pod.record.pod.namespace,
                    pod = pod.record.pod.name,
                    container = id.container_id,
                    "a newer sandbox of the pod takes its identity over"
                );
                pod.wanted = Wanted::Gone { logout: false };
                let msg = format!("{}: a newer sandbox of it has joined", pod_name(&pod.record.pod));
                let gone = error(code::TRY_AGAIN, msg, "the older one is not needed any more");
                pod.failure.get_or_insert(gone);
            }
            self.advance(&id);
        }
    }

    /// Ends an ADD whose time is over.
    pub(super) fn check_join(&mut self, id: &AttachmentId, now: Instant) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        let Some(join) = pod.join else { return };
        if pod.failure.is_none() && pod.wanted == Wanted::Attached && now >= join.deadline {
            let failure = why_late(pod);
            self.fail_add(id, failure);
        }
        let Some(pod) = self.pods.get_mut(id) else { return };
        if now >= join.reply_by && !pod.adders.is_empty() {
            let mut failure = pod.failure.clone().unwrap_or_else(|| why_late(pod));
            pod.notes.push("the rest of the clean-up goes on".into());
            if pod.key.as_ref().is_some_and(|(key, _)| key.id.is_some()) {
                pod.notes.push("the minted auth key is deleted, or left to expire".into());
            }
            failure.details = with_notes(&failure.details, &pod.notes);
            reply_all(pod, &Err(failure));
        }
    }

    /// The ADD cannot succeed: roll back, then say so. A pod that worked before keeps what it has.
    pub(super) fn fail_add(&mut self, id: &AttachmentId, failure: CniError) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        self.counters.adds_failed.inc();
        tracing::warn!(
            namespace = pod.record.pod.namespace,
            pod = pod.record.pod.name,
            code = failure.code,
            "ADD fails: {} {}",
            failure.msg,
            failure.details
        );
        if !pod.record.addresses.is_empty() {
            pod.join = None;
            reply_all(pod, &Err(failure));
            return;
        }
        pod.failure = Some(failure);
        // What a person has been asked to do must still be worth doing when the ADD is tried again.
        pod.wanted = Wanted::Gone { logout: !pod.had_device && !pod.awaits_person };
        pod.retry_at = None;
    }

    /// The link is up and configured, and the disk knows: everybody who waits gets the same answer.
    pub(super) fn answer_adders(&mut self, id: &AttachmentId) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        let Some(join) = pod.join.take() else { return };
        let Some(attached) = pod.attached() else { return };
        pod.reached("answered");
        if !pod.adders.is_empty() && pod.adders.iter().all(Adder::is_closed) {
            // The runtime has given up, so it will never learn of this interface.
            let msg = format!("{}: who asked for it has gone", pod_name(&pod.record.pod));
            let gone = error(code::TRY_AGAIN, msg, "");
            pod.adders.clear();
            self.fail_add_even_if_up(id, gone);
            return;
        }
        let took = join.started.elapsed();
        self.counters.adds.inc();
        tracing::info!(
            namespace = pod.record.pod.namespace,
            pod = pod.record.pod.name,
            tailnet = pod.record.tailnet,
            addresses = ?attached.addresses,
            ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            "pod joined"
        );
        reply_all(pod, &Ok(attached));
    }

    fn fail_add_even_if_up(&mut self, id: &AttachmentId, failure: CniError) {
        if let Some(pod) = self.pods.get_mut(id) {
            pod.record.addresses.clear();
        }
        self.fail_add(id, failure);
    }
}

/// One container has one interface of this name: it cannot be another pod's, tailnet's or namespace's too.
fn differs(made: &record::Attachment, asked: &AddRequest) -> bool {
    made.netns != asked.netns || made.tailnet != asked.tailnet || made.pod.uid != asked.pod.uid
}

fn taken(made: &record::Attachment) -> CniError {
    let record::Attachment { attachment, pod, tailnet, netns, .. } = made;
    let msg = format!(
        "container {} has {} already: {}, tailnet {tailnet}, in {netns}",
        attachment.container_id,
        attachment.ifname,
        pod_name(pod)
    );
    error(code::INTERFACE_EXISTS, msg, "DEL that before ADD joins it otherwise")
}

pub(super) fn reply_all(pod: &mut Pod, answer: &Result<Attached, CniError>) {
    for adder in pod.adders.drain(..) {
        let _ = adder.send(answer.clone());
    }
}

pub(super) fn with_notes(details: &str, notes: &[String]) -> String {
    let mut parts: Vec<&str> = vec![details];
    parts.extend(notes.iter().map(String::as_str));
    parts.retain(|p| !p.is_empty());
    parts.join("; ")
}

fn join(request: &AddRequest, now: Instant) -> Join {
    let patience = Duration::from_millis(request.timeout_ms.clamp(1000, 3_600_000));
    let rollback = (patience / ROLLBACK_SHARE).clamp(MIN_ROLLBACK.min(patience / 2), MAX_ROLLBACK);
    Join { deadline: now + (patience - rollback), reply_by: now + (patience - REPLY_EARLY), started: now }
}

fn check_names(request: &AddRequest) -> Result<(), CniError> {
    let names = [
        ("container id", &request.attachment.container_id),
        ("pod uid", &request.pod.uid),
        ("network name", &request.attachment.network),
    ];
    for (what, name) in names {
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(error(
                code::BAD_ENV,
                format!("the {what} is empty, too long or not printable"),
                BY_RUNTIME,
            ));
        }
    }
    for name in [&request.pod.namespace, &request.pod.name] {
        if name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(error(code::BAD_ENV, "a pod's name is too long or not printable", BY_RUNTIME));
        }
    }
    if !request.netns.starts_with('/') {
        return Err(error(
            code::BAD_ENV,
            format!("CNI_NETNS {:?} is no absolute path", request.netns),
            BY_RUNTIME,
        ));
    }
    Ok(())
}

/// Why a pod has not joined in time, for the one who waited.
fn why_late(pod: &Pod) -> CniError {
    let name = pod_name(&pod.record.pod);
    let status = pod.engine.as_ref().and_then(|e| e.status.as_ref());
    match status.map(|s| &s.state) {
        Some(NodeState::NeedsLogin { url }) => error(
            code::NEEDS_ACTION,
            format!("{name}: the tailnet wants somebody to log in"),
            format!("open {url}; the pod joins when it is tried again after that"),
        ),
        Some(NodeState::NeedsApproval) => error(
            code::NEEDS_ACTION,
            format!("{name}: the tailnet wants an administrator to approve the device"),
            "approve it: the pod joins then, or when it is tried again; or use a pre-approved credential",
        ),
        Some(NodeState::Connecting { reason }) => error(
            code::TRY_AGAIN,
            format!("{name}: no session with the control server in time: {reason}"),
            format!(
                "the runtime tries again; does tailnet.{}.control_url answer from this node?",
                pod.record.tailnet
            ),
        ),
        Some(NodeState::Waiting | NodeState::Running | NodeState::LoggedOut) | None => {
            let reason = match pod.busy {
                Some(Step::MintKey) => "the tailnet's API has not given an auth key",
                _ if pod.reason.is_empty() => "the node is busy",
                _ => &pod.reason,
            };
            error(code::TRY_AGAIN, format!("{name}: not joined in time: {reason}"), "the runtime tries again")
        }
    }
}
