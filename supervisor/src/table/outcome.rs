//! What the end of a step changes.

use std::time::Instant;

use podtether_proto::node::{AttachmentId, CniError, code};

use super::Table;
use super::attach::{error, pod_name};
use super::identities::Identity;
use super::pod::Pod;
use super::steps::Outcome;
use crate::credentials::CredentialError;
use crate::plan::{Link, Step, Wanted};

/// Attempts at looking at the link of an adopted engine before both are made anew.
const LOOKS_AT_A_LINK: u32 = 3;

impl Table {
    pub(super) fn outcome(&mut self, id: &AttachmentId, step: Step, outcome: Outcome) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        let Some(identity) = self.identities.get_mut(&pod.identity) else { return };
        pod.retry_at = None;
        match outcome {
            Outcome::Adopted(found) => self.adopted(id, found),
            Outcome::Saved(Ok((attachment, record))) => {
                pod.saved = attachment;
                identity.saved = identity.saved.max(record);
                pod.failures = 0;
                pod.reached("saved");
            }
            Outcome::Saved(Err(e)) => {
                let what = format!("{}: {e}", pod_name(&pod.record.pod));
                self.failed(id, error(code::IO, what, "free space or repair the state directory"));
            }
            Outcome::Built(Ok(fds)) => {
                pod.failures = 0;
                pod.reached("link");
                pod.taken = None;
                pod.link = Link::Up;
                pod.underlay = fds.underlay.clone();
                note_link(pod, &fds);
                pod.fds = Some(fds);
            }
            Outcome::Built(Err(e)) => {
                let gone = matches!(e, podtether_net::Error::NamespaceGone { .. });
                // Whatever was made before it failed has to be found again.
                pod.link = Link::Broken;
                // An engine that works is not ended because its link could not be looked at once.
                // Nor ever because this process is not shown any pod's namespace.
                let hidden = matches!(e, podtether_net::Error::NamespacesHidden { .. });
                let again = pod.taken.is_some() && (hidden || pod.failures < LOOKS_AT_A_LINK);
                if again && !gone && !matches!(e, podtether_net::Error::Broken { .. }) {
                    pod.link = Link::Unknown;
                } else {
                    pod.taken = None;
                }
                let established = !pod.record.addresses.is_empty();
                if gone && established {
                    self.netns_vanished(id);
                } else {
                    let failure = link_error(pod, &e);
                    self.failed(id, failure);
                }
            }
            Outcome::Minted(Ok(key)) => {
                self.counters.mints.with_label_values(&["minted"]).inc();
                pod.failures = 0;
                pod.reached("key");
                pod.key = Some((key, Instant::now()));
            }
            Outcome::Minted(Err(e)) => {
                let result = if matches!(e, CredentialError::Refused(_)) { "refused" } else { "failed" };
                self.counters.mints.with_label_values(&[result]).inc();
                let failure = credential_error(pod, &e);
                self.failed(id, failure);
            }
            Outcome::RoutingTold(told, Ok(status)) => {
                pod.failures = 0;
                if let Some(engine) = &mut pod.engine {
                    engine.told = Some(told);
                }
                self.status(id, *status);
            }
            // Whoever does not answer is killed, and learns it when it starts again.
            Outcome::RoutingTold(_, Err(e)) => {
                pod.reason = format!("the engine did not take its routing: {e}");
                self.step_failed(id);
            }
            Outcome::Configured(wanted, Ok(made)) => {
                pod.failures = 0;
                pod.reached("configured");
                if pod.record.addresses != made.addresses {
                    pod.record.addresses.clone_from(&made.addresses);
                    pod.changed();
                }
                pod.configured = Some(made);
                pod.configured_for = Some(wanted);
            }
            Outcome::Configured(_, Err(e)) => {
                if matches!(
                    e,
                    podtether_net::Error::Broken { .. } | podtether_net::Error::NamespaceGone { .. }
                ) {
                    pod.link = Link::Broken;
                }
                let failure = link_error(pod, &e);
                self.failed(id, failure);
            }
            Outcome::LoggedOut(Ok(())) => {
                pod.logout_tried = true;
                pod.key = None;
                // A node that is logging out looks like one whose key has run out.
                pod.awaits_person = false;
                // Servers keep a device that is not ephemeral, logged out and expired.
                let kept = !self.context.forgets_who_logs_out(&identity.record);
                if !kept {
                    pod.key_given = false;
                    left(identity);
                }
                pod.notes.push("the device logged out".into());
            }
            Outcome::LoggedOut(Err(e)) => {
                pod.logout_tried = true;
                pod.reason = format!("the engine could not log out: {e}");
                tracing::info!(pod = pod.record.pod.name, "{}", pod.reason);
            }
            // A name that cannot be used was never used.
            Outcome::LinkRemoved(Ok(()) | Err(podtether_net::Error::Invalid { .. })) => {
                pod.failures = 0;
                pod.link = Link::Absent;
                pod.underlay = super::pod::Underlay::default();
            }
            Outcome::LinkRemoved(Err(e)) => {
                let what = format!("{}: cannot remove the link: {e}", pod_name(&pod.record.pod));
                self.cleanup_failed(id, what);
            }
            Outcome::DeviceDeleted(Ok(())) => {
                pod.key_given = false;
                pod.awaits_person = false;
                pod.device_spent = false;
                left(identity);
            }
            Outcome::DeviceDeleted(Err(e)) if pod.wanted == Wanted::Attached => {
                let failure = credential_error(pod, &e);
                self.failed(id, failure);
            }
            Outcome::DeviceDeleted(Err(e)) => {
                pod.delete_failed = true;
                pod.notes.push(format!("the device could not be deleted yet: {e}"));
                tracing::warn!(pod = pod.record.pod.name, "the device could not be deleted: {e}");
            }
            Outcome::KeyDeleted(result) => key_deleted(pod, result),
            Outcome::Forgotten(Ok(())) => self.forgotten(id),
            Outcome::Forgotten(Err(e)) => self.cleanup_failed(id, e),
            Outcome::Lost(e) => {
                tracing::error!(?step, "a step failed inside: {e}");
                pod.reason = format!("step {step:?} failed inside");
                self.step_failed(id);
            }
        }
    }

    /// A step on the way up failed: an ADD that waits fails at once unless time may help; a pod that was
    /// up tries again.
    fn failed(&mut self, id: &AttachmentId, failure: CniError) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        pod.reason = format!("{failure}");
        if pod.wanted == Wanted::Attached && pod.join.is_some() && pod.record.addresses.is_empty() {
            self.fail_add(id, failure);
            return;
        }
        tracing::warn!(
            namespace = pod.record.pod.namespace,
            pod = pod.record.pod.name,
            "{failure}; trying again"
        );
        for router in pod.routers.drain(..) {
            let _ = router.send(Err(failure.clone()));
        }
        self.step_failed(id);
    }

    /// A step on the way down failed: who waits learns it now, the table goes on trying.
    fn cleanup_failed(&mut self, id: &AttachmentId, what: String) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        tracing::warn!(namespace = pod.record.pod.namespace, pod = pod.record.pod.name, "{what}");
        pod.reason.clone_from(&what);
        for (_, _, adder, _) in pod.next.drain(..) {
            let failure = error(code::TRY_AGAIN, what.clone(), "the container is still being removed");
            let _ = adder.send(Err(failure));
        }
        for leaver in pod.leavers.drain(..) {
            let failure = error(code::CLEANUP, what.clone(), "the supervisor goes on trying");
            let _ = leaver.send(Err(failure));
        }
        self.step_failed(id);
    }
}

/// The device is no more.
fn left(identity: &mut Identity) {
    identity.record.registered = false;
    identity.record.leaving = false;
    identity.record.addresses.clear();
    identity.record.stable_id.clear();
    identity.changed();
}

fn key_deleted(pod: &mut Pod, result: Result<(), CredentialError>) {
    let Some((key, _)) = pod.key.take() else { return };
    if key.id.is_none() {
        return;
    }
    let note = match result {
        Ok(()) => "the minted auth key was deleted".to_owned(),
        Err(e) => format!("the minted auth key is left to expire in {:?} ({e})", key.ttl),
    };
    tracing::info!(pod = pod.record.pod.name, "{note}");
    pod.notes.push(note);
}

fn note_link(pod: &mut Pod, fds: &super::pod::Fds) {
    let port = |s: &Option<std::sync::Arc<std::net::UdpSocket>>| {
        s.as_ref().and_then(|s| s.local_addr().ok()).map_or(0, |a| a.port())
    };
    let mac: Vec<String> = fds.link.mac.iter().map(|b| format!("{b:02x}")).collect();
    let mac = mac.join(":");
    let (udp4, udp6) = (port(&fds.underlay.udp4), port(&fds.underlay.udp6));
    let inode = fds.link.pod.id().inode;
    let now = (pod.record.udp4_port, pod.record.udp6_port, pod.record.netns_inode, &pod.record.mac);
    if now != (udp4, udp6, inode, &mac) {
        pod.record.udp4_port = udp4;
        pod.record.udp6_port = udp6;
        pod.record.netns_inode = inode;
        pod.record.mac = mac;
        pod.changed();
    }
}

fn link_error(pod: &Pod, e: &podtether_net::Error) -> CniError {
    use podtether_net::Error;
    let name = pod_name(&pod.record.pod);
    match e {
        Error::NamespaceGone { .. } => {
            error(code::UNKNOWN_CONTAINER, format!("{name}: {e}"), "the container has gone; nothing was made")
        }
        Error::InterfaceExists { .. } => error(
            code::INTERFACE_EXISTS,
            format!("{name}: {e}"),
            "choose another interface name in the network configuration",
        ),
        Error::HostNamespace { .. } => error(
            code::BAD_ENV,
            format!("{name}: {e}"),
            "pods on the host network cannot join: exclude them from this network",
        ),
        Error::Invalid { .. } => {
            error(code::BAD_ENV, format!("{name}: {e}"), "correct the network configuration")
        }
        Error::NamespacesHidden { .. } => {
            error(code::LINK, format!("{name}: {e}"), "docs/daemonset.md has what to mount; nothing was made")
        }
        Error::TunBusy { .. } | Error::NoFreePort { .. } | Error::Broken { .. } | Error::Kernel { .. } => {
            error(code::LINK, format!("{name}: {e}"), "see the supervisor's log")
        }
    }
}

fn credential_error(pod: &Pod, e: &CredentialError) -> CniError {
    let name = pod_name(&pod.record.pod);
    match e {
        CredentialError::Temporary(text) => {
            error(code::TRY_AGAIN, format!("{name}: {text}"), "no auth key was minted; try again later")
        }
        CredentialError::Refused(text) => {
            let tailnet = &pod.record.tailnet;
            error(code::REFUSED, format!("{name}: {text}"), format!("check tailnet.{tailnet}.credentials"))
        }
    }
}
