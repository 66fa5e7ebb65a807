//! A pod's engine is replaced by another that is ready before the first one lets go.
//!
//! [`hand_over`] owns the successor until it is the node: whatever goes wrong, it is dead before the table hears
//! of that, and the engine before goes on, or is dead as well and started anew. The table owns what comes after: the
//! engine before, which ends by itself soon.

use std::sync::Arc;
use std::time::{Duration, Instant};

use podtether_proto::calls::{self, KnownEngine};
use podtether_proto::engine::{EngineStatus, Hello, StartRequest};
use podtether_proto::node::{AttachmentId, code};
use podtether_proto::{PROTO_VERSION, transport};
use tokio::sync::oneshot;
use tracing::Instrument as _;

use super::attach::{error, pod_name};
use super::pod::{Fds, Running};
use super::process::{Born, spawn_engine, start_request};
use super::renew::{Renewal, Renewer};
use super::{Message, Table};
use crate::cgroup;
use crate::context::Context;
use crate::dns::Sockets;
use crate::engine::{self, ANSWER_WITHIN, Home, Place, Reports, within};
use crate::guard::{Processor, Queue};
use crate::output;
use crate::plan::Wanted;
use crate::record::Attachment;
use crate::restart::{self, Cause};
use crate::spawn::Process;

/// A snapshot of a large tailnet takes a moment; a hung engine is found out by its heartbeat.
const PREPARED_WITHIN: Duration = Duration::from_secs(3);
/// The successor's first answer.
const STARTED_WITHIN: Duration = Duration::from_secs(5);
/// Peers that do not answer by then are taken for gone; they are met again like any.
const READY_WITHIN: Duration = Duration::from_secs(1);
/// The engine before lets go between two packets.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(2);
/// An engine that let go ends by itself after three seconds.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
/// So that an end is known that has just broken a connection.
const END_SHOWS_WITHIN: Duration = Duration::from_millis(200);

/// A handover under way.
#[derive(Debug)]
pub(super) struct Handover {
    begun: Instant,
    online: bool,
    reply: Renewer,
    /// Dropping it gives the handover up.
    _cancel: oneshot::Sender<()>,
}

/// What it takes.
struct Order {
    context: Arc<Context>,
    record: Attachment,
    fds: Arc<Fds>,
    place: Place,
    old: KnownEngine,
    old_process: Arc<Process>,
    /// Which has let go of an earlier handover and may live.
    predecessor: Option<Arc<Process>>,
    request: Box<StartRequest>,
}

/// The engine that is the node now.
#[derive(Debug)]
pub(super) struct Successor {
    process: Arc<Process>,
    client: KnownEngine,
    hello: Hello,
    home: Home,
    names: Sockets,
    status: EngineStatus,
    since: Instant,
    gap_us: u64,
    request: Box<StartRequest>,
}

/// Why a handover was given up: a word for metrics and a sentence's end.
#[derive(Debug)]
pub(super) struct GivenUp {
    outcome: &'static str,
    why: String,
}

fn given_up(outcome: &'static str, why: impl Into<String>) -> GivenUp {
    GivenUp { outcome, why: why.into() }
}

impl Table {
    /// Begins a handover; the answer comes when the successor is as far as the engine before was.
    pub(super) fn begin_handover(&mut self, id: &AttachmentId, reply: Renewer) {
        let Some(pod) = self.pods.get(id) else { return };
        let Some(identity) = self.identities.get(&pod.identity) else { return };
        let refuse = |reply: Renewer, why: &str| {
            let what = format!("{}: {why}", pod_name(&pod.record.pod));
            let _ =
                reply.send(Err(error(code::TRY_AGAIN, what, "try again, or replace it at once with --kill")));
        };
        if pod.handover.is_some() {
            return refuse(reply, "another engine is taking over already");
        }
        let engine = pod.engine.as_ref();
        let (Some(engine), Some(fds)) = (engine, pod.fds.clone()) else {
            return refuse(reply, "its link is not known yet");
        };
        let Some(old) = engine.client.clone() else {
            return refuse(reply, "its engine has not answered yet");
        };
        let roots = self.context.roots.get(&pod.record.tailnet).map(|roots| roots.now());
        let (roots, pem) = roots.unwrap_or_default();
        let mut request = start_request(&self.context, pod, identity, &self.underlay, pem.to_string());
        // It is registered.
        request.auth_key = None;
        let order = Order {
            context: Arc::clone(&self.context),
            record: pod.record.clone(),
            fds,
            place: engine.place.other(),
            old,
            old_process: Arc::clone(&engine.process),
            predecessor: pod.predecessor.clone(),
            request,
        };
        let online = engine.status.as_ref().is_some_and(|status| status.control_connected);
        let (cancel, cancelled) = oneshot::channel();
        let (to, of) = (self.to_self.clone(), id.clone());
        let task = tokio::spawn(hand_over(order, cancelled).in_current_span());
        tokio::spawn(async move {
            let done = task.await.unwrap_or_else(|e| Err(given_up("lost", format!("it failed inside: {e}"))));
            let _ = to.send(Message::HandedOver(of, roots, done.map(Box::new))).await;
        });
        if let Some(pod) = self.pods.get_mut(id) {
            pod.handover = Some(Handover { begun: Instant::now(), online, reply, _cancel: cancel });
        }
    }

    pub(super) fn handed_over(
        &mut self,
        id: &AttachmentId,
        roots: u64,
        outcome: Result<Box<Successor>, GivenUp>,
    ) {
        let Some(pod) = self.pods.get_mut(id) else {
            if let Ok(successor) = outcome {
                successor.process.kill(Cause::Removed);
            }
            return;
        };
        let Some(Handover { begun, online, reply, .. }) = pod.handover.take() else { return };
        let (namespace, name) = (&pod.record.pod.namespace, &pod.record.pod.name);
        let successor = match outcome {
            Ok(successor) => *successor,
            Err(GivenUp { outcome, why }) => {
                self.counters.handovers.with_label_values(&[outcome]).inc();
                tracing::warn!(namespace, pod = name, outcome, "a planned handover was given up: {why}");
                let goes_on =
                    if pod.engine.is_some() { "the one before goes on" } else { "it is started anew" };
                let what =
                    format!("{}: its engine was not replaced, {goes_on}: {why}", pod_name(&pod.record.pod));
                let advice = "see the supervisor's log; --kill replaces it at once";
                let _ = reply.send(Err(error(code::TRY_AGAIN, what, advice)));
                return;
            }
        };
        let Successor { process, client, hello, home, names, status, since, gap_us, request } = successor;
        self.counters.handovers.with_label_values(&["done"]).inc();
        self.counters.handover_gap_seconds.observe(Duration::from_micros(gap_us).as_secs_f64());
        let pid = process.pid();
        tracing::info!(
            namespace,
            pod = name,
            pid,
            build = hello.build,
            gap_us,
            "engine replaced by handover"
        );
        self.epochs += 1;
        let epoch = self.epochs;
        let before = pod.engine.take();
        let known = before.as_ref().map_or(0, |engine| engine.epoch);
        let memory_kills = self.context.cgroups.memory_kills(&pod.record.id);
        let holds = self.context.cgroups.holds(&pod.record.id, pid);
        let interception = names.interception_with(&pod.record);
        pod.clock.set_engine(None);
        pod.engine = Some(Running {
            epoch,
            process: Arc::clone(&process),
            place: home.place(),
            told: Some(request.routing),
            roots,
            client: Some(client.clone()),
            status: None,
            asked: false,
            replaces_since: None,
            dns_problem: interception.1,
            interception: None,
            holds,
            memory_kills,
            processor: Processor::default(),
            queue: Queue::default(),
            killed_for: None,
        });
        pod.handovers += 1;
        restart::handed_over(&mut pod.history);
        pod.died_at = None;
        pod.hold_until = None;
        pod.renewals.push(Renewal { epoch: known, begun, online, reply, gap_us: Some(gap_us) });
        if let Some(before) = before.map(|engine| engine.process).filter(|process| !process.has_ended()) {
            pod.predecessor = Some(Arc::clone(&before));
            let (to, of) = (self.to_self.clone(), id.clone());
            tokio::spawn(async move {
                if tokio::time::timeout(ENDS_WITHIN, before.ended()).await.is_err() {
                    before.kill(Cause::Replaced);
                    before.ended().await;
                }
                let _ = to.send(Message::PredecessorEnded(of, before.pid())).await;
            });
        }
        if let Some(interception) = interception.0 {
            self.intercept(id, epoch, pid, interception);
        }
        let of = id.clone();
        let wrap = Box::new(move |event| Message::Engine(of.clone(), epoch, event));
        let reports = Reports { to: self.to_self.clone(), wrap };
        let told = client.clone();
        tokio::spawn(engine::attend_adopted(process, client, home, since, reports).in_current_span());
        let underlay = self.underlay.clone();
        if underlay != request.underlay {
            tokio::spawn(async move { told.set_underlay(within(ANSWER_WITHIN), underlay).await });
        }
        self.tell_roots();
        self.status(id, status);
        self.refresh_routing(id);
    }

    pub(super) fn predecessor_ended(&mut self, id: &AttachmentId, pid: u32) {
        if let Some(pod) = self.pods.get_mut(id)
            && pod.predecessor.as_ref().is_some_and(|process| process.pid() == pid)
        {
            pod.predecessor = None;
        }
    }

    /// Sees to it that of the pod's engines only the one in charge lives; their ends arrive as messages.
    pub(super) fn end_others(&mut self, id: &AttachmentId) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        if let Some(process) = &pod.predecessor {
            process.kill(Cause::Replaced);
        }
        if let Some(handover) = &mut pod.handover
            && pod.wanted != Wanted::Attached
        {
            let (cancel, _) = oneshot::channel();
            handover._cancel = cancel;
        }
    }
}

/// Brings the successor up to where it is the node.
async fn hand_over(order: Order, cancelled: oneshot::Receiver<()>) -> Result<Successor, GivenUp> {
    let Order { context, record, fds, place, old, old_process, predecessor, mut request } = order;
    if let Some(predecessor) = predecessor {
        // Its files are the successor's.
        predecessor.ended().await;
    }
    let mark = match old.prepare_handover(within(PREPARED_WITHIN)).await {
        Ok(Ok(mark)) => mark,
        Ok(Err(why)) => return Err(given_up("refused", format!("the engine before refuses: {why}"))),
        Err(e) => return Err(given_up("prepare", format!("the engine before does not prepare it: {e}"))),
    };
    request.standby = Some(mark);
    let born = spawn_engine(&context, &record, &fds, place, true);
    let Born { process, child, home, names, cgroups } =
        born.map_err(|e| given_up("spawn", format!("no process: {e}")))?;
    let (process, since) = (Arc::new(process), Instant::now());
    tokio::spawn(output::relay(child, record.pod.clone(), Arc::clone(&process)).in_current_span());
    request.name_servers = names.servers();
    let require_limits = context.config.node.require_sandbox;
    let limited = async {
        let of = Arc::clone(&process);
        let put = tokio::task::spawn_blocking(move || cgroup::put(of.pid(), &cgroups)).await;
        match put.map_err(|e| e.to_string()).and_then(|put| put.map_err(|e| e.to_string())) {
            Err(why) if require_limits => {
                Err(given_up("limits", format!("its successor has no limits: {why}")))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    };
    let brought_up = async {
        limited.await?;
        bring_up(&home, &old_process, request.clone()).await
    };
    let brought_up = tokio::select! {
        biased;
        _ = process.ended() => Err(given_up("successor_ended", "its successor ended")),
        _ = cancelled => Err(given_up("cancelled", "the pod leaves")),
        done = brought_up => done,
    };
    match brought_up {
        Ok((client, hello, status, gap_us)) => {
            Ok(Successor { process, client, hello, home, names, status, since, gap_us, request })
        }
        Err(failure) => {
            process.kill(Cause::Replaced);
            process.ended().await;
            let reason = home.read_reason().map(|told| format!("{}: {}", failure.why, told.reason));
            Err(GivenUp { why: reason.unwrap_or(failure.why), ..failure })
        }
    }
}

type Brought = (KnownEngine, Hello, EngineStatus, u64);

async fn bring_up(home: &Home, old: &Process, request: Box<StartRequest>) -> Result<Brought, GivenUp> {
    let start = |why: String| given_up("start", why);
    let transport = transport::connect(home.socket()).await;
    let transport = transport.map_err(|e| start(format!("cannot connect to its successor: {e}")))?;
    let greeted = calls::greet(transport, within(STARTED_WITHIN)).await;
    let (client, hello) = greeted.map_err(|e| start(format!("its successor does not answer: {e}")))?;
    if !PROTO_VERSION.accepts(hello.version) {
        return Err(start("its successor speaks another version: update both".into()));
    }
    match client.start(within(STARTED_WITHIN), request).await {
        Ok(Ok(())) => {}
        Ok(Err(why)) => return Err(start(format!("its successor does not start: {why}"))),
        Err(e) => return Err(start(format!("its successor does not start: {e}"))),
    }
    let ready_ms = u64::try_from(READY_WITHIN.as_millis()).unwrap_or(u64::MAX);
    let mut alone = tokio::select! {
        biased;
        _ = old.ended() => true,
        unready = client.ready(within(READY_WITHIN + ANSWER_WITHIN), ready_ms) => match unready {
            Ok(_) => false,
            Err(e) => return Err(given_up("ready", format!("its successor does not get ready: {e}"))),
        },
    };
    let gap_us = loop {
        match client.take_over(within(TAKEN_OVER_WITHIN), alone).await {
            Ok(Ok(taken)) => break taken.gap_us,
            Ok(Err(_)) | Err(_)
                if !alone && tokio::time::timeout(END_SHOWS_WITHIN, old.ended()).await.is_ok() =>
            {
                alone = true;
            }
            Ok(Err(why)) => return Err(given_up("take_over", format!("it does not let go: {why}"))),
            Err(e) => return Err(given_up("take_over", format!("it does not let go: {e}"))),
        }
    };
    let status = client.watch(within(ANSWER_WITHIN), 0).await;
    let status = status.map_err(|e| given_up("take_over", format!("its successor does not answer: {e}")))?;
    Ok((client, hello, crate::distrust::status(status), gap_us))
}
