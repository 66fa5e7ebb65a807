//! A new engine for a pod on request: after an upgrade, or when a person wants one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use podtether_proto::node::{AttachmentId, CniError, PodSelector, Renewal as How, Renewed, code};
use tokio::sync::oneshot;

use super::Table;
use super::attach::{error, pod_name};
use crate::engine::within;
use crate::plan::Wanted;
use crate::restart::Cause;

/// How long an engine may take to write its snapshot and end.
const ENDS_WITHIN: Duration = Duration::from_secs(1);

/// Who waits for an engine newer than the one of `epoch`.
#[derive(Debug)]
pub(super) struct Renewal {
    pub(super) epoch: u64,
    pub(super) begun: Instant,
    /// Whether the engine before it had its session with control: only then is the new one waited for until
    /// it has.
    pub(super) online: bool,
    pub(super) reply: Renewer,
    /// Of a handover that is done.
    pub(super) gap_us: Option<u64>,
}

pub(super) type Renewer = oneshot::Sender<Result<Renewed, CniError>>;

impl Table {
    /// Replaces the pod's engine; the answer comes when its successor is as far as it was.
    pub(super) fn renew(&mut self, selector: &PodSelector, how: How, reply: Renewer) {
        let id = match self.select(selector) {
            Ok(id) => id,
            Err(e) => {
                let _ = reply.send(Err(e));
                return;
            }
        };
        let Some(pod) = self.pods.get_mut(&id) else { return };
        let name = pod_name(&pod.record.pod);
        let refused =
            |what: &str, details: String| error(code::TRY_AGAIN, format!("{name}: {what}"), details);
        if pod.wanted != Wanted::Attached {
            let _ = reply.send(Err(refused("it is leaving", String::new())));
            return;
        }
        let Some(engine) = pod.engine.as_ref().filter(|engine| engine.addresses().is_some()) else {
            let _ = reply.send(Err(refused("its engine does not run", pod.reason.clone())));
            return;
        };
        if how == How::Handover {
            return self.begin_handover(&id, reply);
        }
        let online = engine.status.as_ref().is_some_and(|status| status.control_connected);
        pod.renewals.push(Renewal {
            epoch: engine.epoch,
            begun: Instant::now(),
            online,
            reply,
            gap_us: None,
        });
        tracing::info!(
            namespace = pod.record.pod.namespace,
            pod = pod.record.pod.name,
            pid = engine.process.pid(),
            "a new engine was asked for"
        );
        let (process, client) = (Arc::clone(&engine.process), engine.client.clone());
        tokio::spawn(async move {
            if let Some(client) = client {
                let _ = client.stop(within(ENDS_WITHIN)).await;
            }
            if tokio::time::timeout(ENDS_WITHIN, process.ended()).await.is_err() {
                process.kill(Cause::Replaced);
            }
        });
    }

    /// Answers who asked for an engine that is there now.
    pub(super) fn answer_renewals(&mut self, id: &AttachmentId) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        if pod.renewals.is_empty() {
            return;
        }
        let Some(engine) = pod.engine.as_ref().filter(|engine| engine.addresses().is_some()) else { return };
        let online = engine.status.as_ref().is_some_and(|status| status.control_connected);
        let (epoch, pid) = (engine.epoch, engine.process.pid());
        let (done, waiting) = pod
            .renewals
            .drain(..)
            .partition(|renewal: &Renewal| renewal.epoch < epoch && (online || !renewal.online));
        pod.renewals = waiting;
        for Renewal { begun, reply, gap_us, .. } in done {
            let how = if gap_us.is_some() { How::Handover } else { How::Kill };
            let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            let _ = reply.send(Ok(Renewed { pid, took_ms, how, gap_us }));
        }
    }
}
