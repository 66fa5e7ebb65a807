//! Looks at what answers and may not work all the same: links and their queues, and the processor.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use podtether_net::link::{self, Fault};
use podtether_proto::engine::EngineMetrics;
use podtether_proto::node::AttachmentId;
use tarpc::client::RpcError;

use super::pod::{Fds, Pod, Taken};
use super::{Message, Table};
use crate::context::MTU;
use crate::engine::{ANSWER_WITHIN, within};
use crate::guard::{CPU_EVERY, LOOK_EVERY, Work};
use crate::plan::{Link, Wanted};
use crate::restart::Cause;

/// Why an engine is asked what it has done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Doubts {
    processor: bool,
    queue: bool,
}

/// When things are looked at.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    looked: Option<Instant>,
    read: Option<Instant>,
}

fn due(last: &mut Option<Instant>, every: std::time::Duration, now: Instant) -> bool {
    let is_due = last.is_none_or(|at| now.saturating_duration_since(at) >= every);
    if is_due {
        *last = Some(now);
    }
    is_due
}

impl Table {
    /// Once a second.
    pub(super) fn guard(&mut self) {
        let now = Instant::now();
        if !due(&mut self.rounds.looked, LOOK_EVERY, now) {
            return;
        }
        let read_processors = due(&mut self.rounds.read, CPU_EVERY, now);
        let mut faults = Vec::new();
        for (id, pod) in &mut self.pods {
            if pod.wanted != Wanted::Attached || pod.busy.is_some() || pod.link != Link::Up {
                continue;
            }
            if let Some(fault) = pod.fds.as_ref().and_then(|fds| fault(fds)) {
                if pod.repairs.take(now) {
                    faults.push((id.clone(), fault));
                }
                continue;
            }
            let fds = pod.fds.clone();
            let Some(engine) = &mut pod.engine else { continue };
            let Some(client) = engine.client.clone() else { continue };
            let queue = engine.queue.look(fds.is_some_and(|fds| packets_wait(&fds)));
            let used = read_processors.then(|| engine.process.used().ok()).flatten();
            let processor = used.is_some_and(|used| engine.processor.look(now, used));
            if queue || processor {
                let (id, epoch, to) = (id.clone(), engine.epoch, self.to_self.clone());
                let process = Arc::clone(&engine.process);
                tokio::spawn(async move {
                    match client.metrics(within(ANSWER_WITHIN)).await {
                        Ok(metrics) => {
                            let doubts = Doubts { processor, queue };
                            let _ = to.send(Message::Worked(id, epoch, doubts, Box::new(metrics))).await;
                        }
                        // Its heartbeat rests while it does not run.
                        Err(RpcError::DeadlineExceeded) => process.kill(Cause::Silent),
                        // It is ending.
                        Err(_) => {}
                    }
                });
            }
        }
        for (id, fault) in faults {
            self.repair(&id, fault);
        }
    }

    /// Has the link looked at and made whole, with the engine on it where that is possible.
    fn repair(&mut self, id: &AttachmentId, fault: Fault) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        let fault = fault.name();
        let kept = pod.fds.as_ref().map(|fds| {
            let dns = fds
                .dns
                .iter()
                .map(|s| Ok(link::DnsSockets { udp: s.udp.try_clone()?, tcp: s.tcp.try_clone()? }));
            Ok::<_, std::io::Error>(Taken {
                tun: fds.tun.try_clone()?,
                dns: dns.collect::<Result<_, std::io::Error>>()?,
            })
        });
        match kept.transpose() {
            Ok(kept) => pod.taken = kept,
            Err(e) => {
                tracing::warn!(pod = pod.record.pod.name, fault, "the link cannot be repaired yet: {e}");
                return;
            }
        }
        tracing::warn!(
            namespace = pod.record.pod.namespace,
            pod = pod.record.pod.name,
            fault,
            "the link does not carry packets: repairing it"
        );
        pod.reason = format!("the link did not carry packets ({fault}) and was repaired");
        pod.link = Link::Unknown;
        self.counters.link_repairs.with_label_values(&[fault]).inc();
        self.advance(id);
    }

    /// An engine's answer to a doubt.
    pub(super) fn worked(&mut self, id: &AttachmentId, epoch: u64, doubts: Doubts, done: &EngineMetrics) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        let Some(engine) = pod.engine.as_mut().filter(|engine| engine.epoch == epoch) else { return };
        let work = Work { inputs: done.inputs, handshakes: done.handshakes };
        let runaway = doubts.processor.then(|| engine.processor.judge(work)).flatten();
        if let Some(runaway) = runaway {
            let what = format!(
                "the engine used {:.1} s of a processor in {:.0} s, of which its work explains {:.1} s, and was killed",
                runaway.ran.as_secs_f64(),
                runaway.over.as_secs_f64(),
                runaway.explained.as_secs_f64()
            );
            kill(pod, Cause::Runaway, what);
        } else if doubts.queue && engine.queue.judge(done.tun_packets) {
            kill(
                pod,
                Cause::Unread,
                "the engine left its pod's packets in the TUN's queue and was killed".into(),
            );
        }
    }
}

fn kill(pod: &mut Pod, cause: Cause, why: String) {
    if let Some(engine) = &mut pod.engine {
        engine.killed_for = Some(why);
        engine.process.kill(cause);
    }
}

fn fault(fds: &Fds) -> Option<Fault> {
    let socket = &fds.dns.first()?.udp;
    // What cannot be asked is no fault.
    link::look(&fds.link, socket, &fds.tun).ok()?.fault(MTU.into())
}

/// Whether packets wait in the TUN's queue.
fn packets_wait(fds: &Fds) -> bool {
    let mut polled = [PollFd::new(fds.tun.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        && polled[0].revents().is_some_and(|events| events == PollFlags::POLLIN)
}
