//! The pod table: the one task that knows every pod and decides for all of them.
//!
//! Facts come in as [`Message`]s: calls, the outcome of a step, an engine's events, time. After each
//! one the pod it concerns is looked at again ([`crate::plan`]), and the first missing step is begun as
//! a task of its own. The table itself never waits, so no pod waits for another, and since nothing else
//! touches its state there is no lock.

mod asked;
mod attach;
mod check;
mod choice;
mod explain;
mod guard;
mod handover;
mod identities;
mod leave;
mod logs;
mod naming;
mod outcome;
mod pod;
mod process;
mod recover;
mod renew;
mod report;
mod routing;
mod steps;
mod timeline;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use podtether_proto::calls::KnownEngine;
use podtether_proto::engine::{EngineMetrics, PING_MAX, PingKind, Pong, Underlay};
use podtether_proto::node::{
    self, AddRequest, Attached, AttachmentId, CheckRequest, CniError, GcRequest, PodRouting, PodSelector,
    Renewal, Renewed, Routing, code,
};
use tokio::sync::{mpsc, oneshot};
use tracing::{Instrument as _, Span};

use crate::choose::Choice;
use crate::context::Context;
use crate::credentials::{Credential, Device};
use crate::distrust;
use crate::engine::Event;
use crate::memory;
use crate::metrics::Counters;
use crate::plan::{Step, Wanted, plan};
use crate::record::Aside;
use crate::restart::{Cause, jittered};
use attach::pod_name;
use identities::{Identities, Identity};
use pod::Pod;
pub use report::{LastExit, PodReport};
use steps::Outcome;

/// Messages that wait for the table.
const QUEUE: usize = 1024;
/// Pods on a node, far above what a kubelet runs.
const MAX_PODS: usize = 4096;
/// First pause after a failed step; doubles to [`MAX_STEP_PAUSE`].
const STEP_PAUSE: Duration = Duration::from_millis(250);
const MAX_STEP_PAUSE: Duration = Duration::from_secs(30);
/// How long an engine may take to log out.
const LOGOUT_WITHIN: Duration = Duration::from_secs(4);
/// The same when control is known to be away.
const LOGOUT_WITHIN_OFFLINE: Duration = Duration::from_secs(1);
/// How long the API may take to delete something.
const DELETE_WITHIN: Duration = Duration::from_secs(4);
/// A step that gives up with an ADD says why this much before.
const SAY_WHY: Duration = Duration::from_millis(100);
/// How long a pod that is up may wait for a key.
const MINT_WITHIN: Duration = Duration::from_secs(60);

/// What an engine may take for a ping beside its answer's time.
const PING_MARGIN: Duration = Duration::from_secs(2);
/// Characters of an engine's reason.
const MAX_REASON: usize = 500;

/// A fact, or a question.
enum Message {
    Add(Box<AddRequest>, Box<Choice>, pod::Adder),
    Del(AttachmentId, pod::Leaver),
    Check(Box<CheckRequest>, pod::Leaver),
    Gc(GcRequest, pod::Leaver),
    SetRouting(PodSelector, Routing, routing::Router),
    Routing(PodSelector, routing::Router),
    Renew(PodSelector, Renewal, renew::Renewer),
    HandedOver(AttachmentId, u64, Result<Box<handover::Successor>, handover::GivenUp>),
    PredecessorEnded(AttachmentId, u32),
    NotRenamed(AttachmentId, u64, String),
    Choice(PodSelector, oneshot::Sender<Result<node::Choice, CniError>>),
    Devices(oneshot::Sender<Vec<Device>>),
    Cleanup(bool, oneshot::Sender<Result<node::Cleanup, CniError>>),
    Client(PodSelector, oneshot::Sender<Result<(String, KnownEngine), CniError>>),
    Explain(PodSelector, explain::Asker),
    Logged(PodSelector, logs::Asker),
    List(oneshot::Sender<Listing>),
    Step(AttachmentId, Step, Outcome),
    Engine(AttachmentId, u64, Event),
    NotIntercepted(AttachmentId, u64, String),
    Worked(AttachmentId, u64, guard::Doubts, Box<EngineMetrics>),
    Limited(AttachmentId, u64, Result<(), String>),
    Reaped(crate::record::IdentityKey, Result<(), String>),
    Underlay(Underlay),
    Stop(oneshot::Sender<()>),
}

impl Message {
    /// The attachment that it is about, where that is known from the start.
    fn about(&self) -> Option<&AttachmentId> {
        match self {
            Self::Del(id, _)
            | Self::Step(id, ..)
            | Self::Engine(id, ..)
            | Self::NotIntercepted(id, ..)
            | Self::Worked(id, ..)
            | Self::Limited(id, ..)
            | Self::HandedOver(id, ..)
            | Self::PredecessorEnded(id, _)
            | Self::NotRenamed(id, ..) => Some(id),
            Self::Check(request, _) => Some(&request.attachment),
            Self::Add(..)
            | Self::Gc(..)
            | Self::SetRouting(..)
            | Self::Routing(..)
            | Self::Renew(..)
            | Self::Choice(..)
            | Self::Devices(_)
            | Self::Cleanup(..)
            | Self::Client(..)
            | Self::Explain(..)
            | Self::Logged(..)
            | Self::List(_)
            | Self::Reaped(..)
            | Self::Underlay(_)
            | Self::Stop(_) => None,
        }
    }
}

/// All pods now, with the engines to ask for more.
#[derive(Debug, Default)]
pub struct Listing {
    /// One per attachment.
    pub pods: Vec<PodReport>,
    /// Calls to the engines, in the same order.
    pub clients: Vec<Option<KnownEngine>>,
    /// Record files that did not load.
    pub asides: Vec<Aside>,
}

/// Asks the table.
#[derive(Debug, Clone)]
pub struct Handle {
    to: mpsc::Sender<Message>,
}

fn ending() -> CniError {
    CniError {
        code: code::TRY_AGAIN,
        msg: "the supervisor is stopping".into(),
        details: "try again when it is back".into(),
    }
}

fn left() -> CniError {
    CniError {
        code: code::TRY_AGAIN,
        msg: "the pod left before that was done, or the supervisor is stopping".into(),
        details: "see the supervisor's log".into(),
    }
}

/// Questions to a table that answers none, for tests of who asks.
#[cfg(test)]
pub(crate) struct Unanswered(mpsc::Receiver<Message>);

#[cfg(test)]
impl Unanswered {
    pub(crate) fn new() -> (Handle, Self) {
        let (to, questions) = mpsc::channel(QUEUE);
        (Handle { to }, Self(questions))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Handle {
    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.to.send(message(answer)).await.ok()?;
        answered.await.ok()
    }

    /// CNI ADD of a pod that joins as `choice` has it.
    ///
    /// # Errors
    /// As the runtime prints it.
    pub async fn add(&self, request: Box<AddRequest>, choice: Box<Choice>) -> Result<Attached, CniError> {
        self.ask(|to| Message::Add(request, choice, to)).await.unwrap_or_else(|| Err(ending()))
    }

    /// What was decided about a pod that joined.
    ///
    /// # Errors
    /// No such pod.
    pub async fn choice(&self, pod: PodSelector) -> Result<node::Choice, CniError> {
        self.ask(|to| Message::Choice(pod, to)).await.unwrap_or_else(|| Err(ending()))
    }

    /// CNI DEL.
    ///
    /// # Errors
    /// Something is there and cannot be removed.
    pub async fn del(&self, id: AttachmentId) -> Result<(), CniError> {
        self.ask(|to| Message::Del(id, to)).await.unwrap_or_else(|| Err(ending()))
    }

    /// CNI CHECK.
    ///
    /// # Errors
    /// The first thing that is not as it should be.
    pub async fn check(&self, request: CheckRequest) -> Result<(), CniError> {
        self.ask(|to| Message::Check(Box::new(request), to)).await.unwrap_or_else(|| Err(ending()))
    }

    /// CNI GC.
    ///
    /// # Errors
    /// What could not be removed.
    pub async fn gc(&self, request: GcRequest) -> Result<(), CniError> {
        self.ask(|to| Message::Gc(request, to)).await.unwrap_or_else(|| Err(ending()))
    }

    /// Changes which routes of other nodes a pod uses; the answer comes when that is in force.
    ///
    /// # Errors
    /// No such pod, a wish that cannot be fulfilled, or a step that failed.
    pub async fn set_routing(&self, pod: PodSelector, routing: Routing) -> Result<PodRouting, CniError> {
        self.ask(|to| Message::SetRouting(pod, routing, to)).await.unwrap_or_else(|| Err(left()))
    }

    /// Which routes of other nodes a pod uses.
    ///
    /// # Errors
    /// No such pod.
    pub async fn routing(&self, pod: PodSelector) -> Result<PodRouting, CniError> {
        self.ask(|to| Message::Routing(pod, to)).await.unwrap_or_else(|| Err(left()))
    }

    /// Replaces a pod's engine by a new process; the answer comes when that is as far as the one before was.
    ///
    /// # Errors
    /// No such pod, or none that runs; the pod left meanwhile.
    pub async fn renew(&self, pod: PodSelector, how: Renewal) -> Result<Renewed, CniError> {
        self.ask(|to| Message::Renew(pod, how, to)).await.unwrap_or_else(|| Err(left()))
    }

    /// Pings a peer of a pod.
    ///
    /// # Errors
    /// No such pod, no engine, no such peer, or no answer.
    pub async fn ping(&self, pod: PodSelector, peer: String, kind: PingKind) -> Result<Pong, CniError> {
        let asked = self.ask(|to| Message::Client(pod, to)).await;
        let (name, client) = asked.unwrap_or_else(|| Err(ending()))?;
        let failed = |why: String| CniError {
            code: code::TRY_AGAIN,
            msg: format!("{name}: ping {}: {why}", distrust::label(&peer)),
            details: String::new(),
        };
        match client.ping(crate::engine::within(PING_MAX + PING_MARGIN), peer.clone(), kind).await {
            Ok(Ok(mut pong)) => {
                pong.name = distrust::label(&pong.name);
                Ok(pong)
            }
            Ok(Err(mut why)) => {
                distrust::tame(&mut why, MAX_REASON);
                Err(failed(why))
            }
            Err(e) => Err(asked::silent(&name, &e)),
        }
    }

    /// Finds devices whose pods are no more, and deletes them unless `dry_run`.
    ///
    /// # Errors
    /// No API server is asked here.
    pub async fn cleanup(&self, dry_run: bool) -> Result<node::Cleanup, CniError> {
        self.ask(|to| Message::Cleanup(dry_run, to)).await.unwrap_or_else(|| Err(ending()))
    }

    /// The devices of this node's pods.
    pub async fn devices(&self) -> Vec<Device> {
        self.ask(Message::Devices).await.unwrap_or_default()
    }

    /// All pods.
    pub async fn list(&self) -> Listing {
        self.ask(Message::List).await.unwrap_or_default()
    }

    /// The node's addresses or resolvers changed.
    pub async fn set_underlay(&self, underlay: Underlay) {
        let _ = self.to.send(Message::Underlay(underlay)).await;
    }

    /// Ends the table. Engines, links and records stay, for the next supervisor.
    pub async fn stop(&self) {
        self.ask(Message::Stop).await.unwrap_or_default();
    }
}

struct Table {
    context: Arc<Context>,
    counters: Counters,
    to_self: mpsc::Sender<Message>,
    pods: HashMap<AttachmentId, Pod>,
    identities: Identities,
    asides: Vec<Aside>,
    underlay: Underlay,
    epochs: u64,
    /// When which pod is looked at again.
    wakes: BTreeMap<(Instant, u64), AttachmentId>,
    rounds: guard::Rounds,
    /// Steps of any pod that have ended.
    done: u64,
    rest: memory::Rest,
}

/// Loads the records, starts the table and takes up every pod again.
///
/// # Errors
/// The state directory cannot be read.
pub async fn start(context: Arc<Context>, underlay: Underlay, counters: Counters) -> Result<Handle, String> {
    let (to, messages) = mpsc::channel(QUEUE);
    let mut table = Table {
        context,
        counters,
        to_self: to.clone(),
        pods: HashMap::new(),
        identities: HashMap::new(),
        asides: Vec::new(),
        underlay,
        epochs: 0,
        wakes: BTreeMap::new(),
        rounds: guard::Rounds::default(),
        done: 0,
        rest: memory::Rest::default(),
    };
    table.recover().await?;
    tokio::spawn(table.run(messages));
    Ok(Handle { to })
}

impl Table {
    async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let next = self.wakes.first_key_value().map(|((at, _), _)| *at);
            let message = tokio::select! {
                // However many messages come.
                biased;
                _ = tick.tick() => {
                    self.reap();
                    self.guard();
                    if self.rest.look(self.done, Instant::now()) {
                        memory::give_back();
                    }
                    continue;
                }
                () = until(next) => {
                    self.wake_due(Instant::now());
                    continue;
                }
                message = messages.recv() => message,
            };
            match message {
                None => return,
                Some(Message::Stop(done)) => {
                    let _ = done.send(());
                    return;
                }
                Some(message) => self.handle(message),
            }
        }
    }

    fn handle(&mut self, message: Message) {
        let span = message.about().and_then(|id| self.pods.get(id)).map(|pod| pod.span.clone());
        let _in = span.as_ref().map(Span::enter);
        match message {
            Message::Add(request, choice, reply) => self.add(*request, *choice, reply),
            Message::Choice(pod, reply) => {
                let _ = reply.send(self.choice(&pod));
            }
            Message::Del(id, reply) => self.del(&id, Some(reply)),
            Message::Check(request, reply) => self.check(*request, reply),
            Message::Gc(request, reply) => self.gc(&request, reply),
            Message::SetRouting(pod, routing, reply) => self.set_routing(&pod, routing, reply),
            Message::Routing(pod, reply) => self.routing(&pod, reply),
            Message::Renew(pod, how, reply) => self.renew(&pod, how, reply),
            Message::HandedOver(id, roots, outcome) => {
                self.handed_over(&id, roots, outcome);
                self.advance(&id);
            }
            Message::PredecessorEnded(id, pid) => {
                self.predecessor_ended(&id, pid);
                self.advance(&id);
            }
            Message::NotRenamed(id, epoch, why) => {
                self.not_renamed(&id, epoch, why);
                self.advance(&id);
            }
            Message::Cleanup(dry_run, reply) => self.cleanup(dry_run, reply),
            Message::Devices(reply) => {
                let _ = reply.send(self.identities.values().map(Identity::device).collect());
            }
            Message::Client(pod, reply) => {
                let _ = reply.send(self.client(&pod));
            }
            Message::Explain(pod, reply) => self.explain(&pod, reply),
            Message::Logged(pod, reply) => {
                let _ = reply.send(self.logged(&pod));
            }
            Message::List(reply) => {
                let _ = reply.send(self.listing());
            }
            Message::Step(id, step, outcome) => {
                self.done += 1;
                if let Some(pod) = self.pods.get_mut(&id) {
                    pod.busy = None;
                    self.outcome(&id, step, outcome);
                    self.advance(&id);
                }
            }
            Message::Engine(id, epoch, event) => {
                self.engine_event(&id, epoch, event);
                self.advance(&id);
            }
            Message::Limited(id, epoch, result) => self.limited(&id, epoch, result),
            Message::NotIntercepted(id, epoch, why) => {
                let engine = self.pods.get_mut(&id).and_then(|pod| pod.engine.as_mut());
                if let Some(engine) = engine.filter(|engine| engine.epoch == epoch) {
                    engine.dns_problem = Some(why);
                }
            }
            Message::Worked(id, epoch, doubts, done) => self.worked(&id, epoch, doubts, &done),
            Message::Reaped(key, result) => self.reaped(&key, result),
            Message::Underlay(underlay) => self.underlay_changed(underlay),
            Message::Stop(_) => {}
        }
    }

    /// Looks at a pod again and begins what it needs next.
    fn advance(&mut self, id: &AttachmentId) {
        // Every pass either begins a task, runs an immediate step, or ends.
        for _ in 0..16 {
            let now = Instant::now();
            self.check_join(id, now);
            let Some(pod) = self.pods.get_mut(id) else { return };
            let span = pod.span.clone();
            let _in = span.enter();
            if pod.busy.is_some() {
                return;
            }
            if pod.retry_at.is_some_and(|at| at > now) {
                return;
            }
            let Some(identity) = self.identities.get_mut(&pod.identity) else { return };
            let person = self.context.credentials.get(&pod.record.tailnet).is_some_and(Credential::is_person);
            let mut observed = pod.observe(identity, person, now);
            observed.identity_free &= !self.name_is_held(id);
            let Some(pod) = self.pods.get(id) else { return };
            if pod.wanted == Wanted::Attached
                && observed.configured
                && observed.engine == crate::plan::Engine::Running
                // Not before: a supervisor that finds no addresses takes the ADD for unanswered and undoes it.
                && observed.records == crate::plan::Records::Saved
                && !pod.naming.is_open(now)
            {
                self.answer_adders(id);
                let Some(pod) = self.pods.get(id) else { return };
                if pod.wanted != Wanted::Attached {
                    continue;
                }
            }
            if self.pods.get(id).is_some_and(|pod| pod.may_start_early(&observed)) {
                self.answer_adders(id);
            }
            let Some(pod) = self.pods.get(id) else { return };
            let Some(step) = plan(pod.wanted, &observed).first().copied() else {
                self.answer_routers(id);
                self.answer_renewals(id);
                return;
            };
            if !self.begin(id, step) {
                return;
            }
        }
    }

    /// Begins a step. True when it is done already and the pod should be looked at again.
    fn begin(&mut self, id: &AttachmentId, step: Step) -> bool {
        let context = Arc::clone(&self.context);
        let Some(pod) = self.pods.get_mut(id) else { return false };
        let Some(identity) = self.identities.get_mut(&pod.identity) else { return false };
        tracing::debug!(?step, "step");
        self.counters.steps.with_label_values(&[step.name()]).inc();
        let now = Instant::now();
        let tailnet = pod.record.tailnet.clone();
        match step {
            Step::Adopt => {
                let record = pod.record.clone();
                self.run_step(id, step, steps::adopt(context, record));
            }
            Step::Save => {
                let attachment = (pod.saved < pod.version).then(|| (pod.record.clone(), pod.version));
                let stale = identity.saved < identity.version;
                let record = stale.then(|| (identity.record.clone(), identity.version));
                let had = (pod.saved, identity.saved);
                self.run_step(id, step, steps::save(context, attachment, record, had));
            }
            Step::BuildLink => {
                pod.fds = None;
                pod.configured = None;
                let (record, underlay) = (pod.record.clone(), pod.underlay.clone());
                let taken = match pod.taken.as_ref().map(pod::Taken::duplicate).transpose() {
                    Ok(taken) => taken,
                    Err(e) => {
                        pod.reason = format!("the engine's descriptors cannot be kept: {e}");
                        return self.step_failed(id);
                    }
                };
                self.run_step(id, step, steps::build(context, record, underlay, taken));
            }
            Step::RotateKey => {
                if let Err(e) = identity.rotate() {
                    pod.reason = e;
                    return self.step_failed(id);
                }
                pod.rotate = false;
                return true;
            }
            Step::MintKey => {
                let deadline = pod.join.map_or(now + MINT_WITHIN, |j| j.deadline - SAY_WHY);
                let device = identity.record.clone();
                self.run_step(id, step, steps::mint(context, device, deadline));
            }
            Step::StartEngine => return self.start_engine(id),
            Step::TellRouting => {
                let Some(client) = pod.engine.as_ref().and_then(|e| e.client.clone()) else { return false };
                let routing = pod.engine_routing.clone();
                self.run_step(id, step, steps::tell_routing(client, routing));
            }
            Step::Configure => {
                let (Some(fds), Some(config)) = (pod.fds.clone(), pod.target.clone()) else { return false };
                let spec = context.link_spec(&pod.record);
                self.run_step(id, step, steps::configure(spec, fds, config));
            }
            Step::Logout => {
                let engine = pod.engine.as_ref();
                let client = engine.and_then(|e| e.client.clone());
                let online =
                    engine.and_then(|e| e.status.as_ref()).is_some_and(|status| status.control_connected);
                // An engine that does not reach control is not worth waiting for where the API can do it.
                let api = context.deletes_devices(&tailnet);
                let process = engine.map(|e| Arc::clone(&e.process));
                let (Some(client), Some(process)) = (client.filter(|_| online || !api), process) else {
                    pod.logout_tried = true;
                    return true;
                };
                let patience = if online { LOGOUT_WITHIN } else { LOGOUT_WITHIN_OFFLINE };
                if let Some(engine) = &mut pod.engine {
                    engine.asked = true;
                }
                self.run_step(id, step, steps::logout(client, process, patience));
            }
            Step::EndOthers => {
                self.end_others(id);
                return false;
            }
            Step::StopEngine => {
                let cause = if pod.wanted == Wanted::Attached { Cause::LinkRemade } else { Cause::Removed };
                if let Some(engine) = &mut pod.engine {
                    engine.asked = true;
                    engine.process.kill(cause);
                }
                // Its end arrives as an event.
                return false;
            }
            Step::RemoveLink => {
                pod.fds = None;
                pod.configured = None;
                let spec = context.link_spec(&pod.record);
                self.run_step(id, step, steps::remove_link(context, spec));
            }
            Step::DeleteDevice if pod.wanted == Wanted::Attached && !context.deletes_devices(&tailnet) => {
                if let Err(e) = identity.become_another() {
                    pod.reason = e;
                    return self.step_failed(id);
                }
                tracing::warn!(
                    namespace = pod.record.pod.namespace,
                    pod = pod.record.pod.name,
                    "the expired device cannot be renewed or deleted: it stays, and the pod joins as another"
                );
                pod.device_spent = false;
                return true;
            }
            Step::DeleteDevice => {
                let device = identity.device();
                let until = now + DELETE_WITHIN;
                self.run_step(id, step, steps::delete_device(context, tailnet, device, until));
            }
            Step::DeleteKey => {
                let key = pod.key.as_ref().and_then(|(key, _)| key.id.clone());
                let until = now + DELETE_WITHIN;
                self.run_step(id, step, steps::delete_key(context, tailnet, key, until));
            }
            Step::Forget => {
                let fate = self.identity_fate(id);
                let Some(pod) = self.pods.get(id) else { return false };
                let record = pod.record.id.clone();
                self.run_step(id, step, steps::forget(context, record, fate));
            }
        }
        false
    }

    fn run_step(
        &mut self,
        id: &AttachmentId,
        step: Step,
        work: impl Future<Output = Outcome> + Send + 'static,
    ) {
        if let Some(pod) = self.pods.get_mut(id) {
            pod.busy = Some(step);
        }
        let (to, id) = (self.to_self.clone(), id.clone());
        let begun = Instant::now();
        let task = tokio::spawn(work.in_current_span());
        let told = async move {
            let outcome = task.await.unwrap_or_else(|e| Outcome::Lost(e.to_string()));
            let us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
            tracing::debug!(?step, us, "step done");
            let _ = to.send(Message::Step(id, step, outcome)).await;
        };
        tokio::spawn(told.in_current_span());
    }

    /// Looks at the pod again at `at`.
    fn wake(&mut self, id: &AttachmentId, at: Instant) {
        self.epochs += 1;
        self.wakes.insert((at, self.epochs), id.clone());
    }

    /// Looks at the pods whose time has come.
    fn wake_due(&mut self, now: Instant) {
        while let Some(first) = self.wakes.first_entry().filter(|first| first.key().0 <= now) {
            let id = first.remove();
            self.advance(&id);
        }
    }

    /// A step did not work: the pod is looked at again after a pause. Never true, for `begin`.
    fn step_failed(&mut self, id: &AttachmentId) -> bool {
        let Some(pod) = self.pods.get_mut(id) else { return false };
        let doubled = STEP_PAUSE.saturating_mul(1 << pod.failures.min(8));
        pod.failures = pod.failures.saturating_add(1);
        let at = Instant::now() + jittered(doubled.min(MAX_STEP_PAUSE), random());
        pod.retry_at = Some(at);
        self.wake(id, at + Duration::from_millis(1));
        false
    }

    /// Gives every engine whose tailnet has other extra roots than it knows the new ones.
    fn tell_roots(&mut self) {
        for pod in self.pods.values_mut() {
            let Some(roots) = self.context.roots.get(&pod.record.tailnet) else { continue };
            let Some(engine) = &mut pod.engine else { continue };
            let Some(client) = engine.client.clone() else { continue };
            let (version, pem) = roots.now();
            if engine.roots == version {
                continue;
            }
            engine.roots = version;
            let name = pod_name(&pod.record.pod);
            tokio::spawn(async move {
                let told = client.set_roots(crate::engine::within(LOGOUT_WITHIN), pem.to_string()).await;
                if let Ok(Err(e)) = told {
                    tracing::error!("{name}: its engine does not take the new ca_file: {e}");
                }
            });
        }
    }

    fn underlay_changed(&mut self, underlay: Underlay) {
        self.tell_roots();
        if self.underlay == underlay {
            return;
        }
        tracing::info!(addresses = ?underlay.addresses, resolvers = ?underlay.name_servers, "underlay changed");
        let moved = self.underlay.addresses != underlay.addresses;
        self.underlay = underlay;
        let ids: Vec<AttachmentId> = self.pods.keys().filter(|_| moved).cloned().collect();
        for id in ids {
            self.refresh_routing(&id);
            self.advance(&id);
        }
        for pod in self.pods.values() {
            if let Some(client) = pod.engine.as_ref().and_then(|e| e.client.clone()) {
                let underlay = self.underlay.clone();
                tokio::spawn(async move {
                    let _ = client.set_underlay(crate::engine::within(LOGOUT_WITHIN), underlay).await;
                });
            }
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn random() -> u64 {
    getrandom::u64().unwrap_or_default()
}
