//! Engines: started, listened to, started again.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use podtether_proto::engine::{EngineStatus, NodeState, ProxySettings, StartRequest};
use podtether_proto::fds;
use podtether_proto::node::{AttachmentId, code};
use tokio::sync::mpsc;
use tracing::Instrument as _;

use super::attach::{error, pod_name};
use super::identities::Identity;
use super::pod::{Fds, LastExit, Pod, Running, Taken, Underlay};
use super::{Message, Table, random};
use crate::adopt::{Adopted, NotAdopted};
use crate::cgroup;
use crate::context::{self, Context, MTU};
use crate::credentials::Credential;
use crate::detach::Image;
use crate::dns::{Interception, Sockets};
use crate::engine::{self, ANSWER_WITHIN, Event, Home, Place, Reports, within};
use crate::guard::{Processor, Queue};
use crate::log::levels;
use crate::output;
use crate::plan::{Link, Wanted};
use crate::record::Attachment;
use crate::restart::{self, Cause, Ended, Next};
use crate::spawn::{self, Birth};

/// No version of extra roots: whatever is in force is told.
const UNKNOWN_ROOTS: u64 = u64::MAX;
/// Keys refused in one ADD before it fails: the first may have expired on its way.
const REJECTIONS_IN_ADD: u32 = 2;

impl Table {
    /// Spawns the engine of a pod. Nothing here waits for a disk: run_dir is a tmpfs.
    pub(super) fn start_engine(&mut self, id: &AttachmentId) -> bool {
        self.refresh_routing(id);
        self.renew_uid(id);
        let Some(pod) = self.pods.get_mut(id) else { return false };
        let Some(identity) = self.identities.get_mut(&pod.identity) else { return false };
        let told = Some(pod.engine_routing.clone());
        let roots = self.context.roots.get(&pod.record.tailnet).map(|roots| roots.now());
        let (roots, pem) = roots.unwrap_or_default();
        let mut request = start_request(&self.context, pod, identity, &self.underlay, pem.to_string());
        let born = match &pod.fds {
            Some(fds) => spawn_engine(&self.context, &pod.record, fds, Place::First, false),
            None => Err(std::io::Error::other("the link is not there")),
        };
        match born {
            Ok(Born { process, child, home, names, cgroups }) => {
                request.name_servers = names.servers();
                self.epochs += 1;
                let (epoch, of) = (self.epochs, id.clone());
                let wrap = Box::new(move |event| Message::Engine(of.clone(), epoch, event));
                let reports = Reports { to: self.to_self.clone(), wrap };
                let process = Arc::new(process);
                limit(self.to_self.clone(), id, epoch, &process, cgroups);
                pod.key_given |= request.auth_key.is_some();
                identity.holder = Some(id.clone());
                pod.hold_until = None;
                pod.engine = Some(Running {
                    epoch,
                    process: Arc::clone(&process),
                    place: Place::First,
                    told,
                    roots,
                    client: None,
                    status: None,
                    asked: false,
                    replaces_since: pod.died_at.take(),
                    dns_problem: names.problem(),
                    interception: names.interception(&pod.record),
                    holds: Vec::new(),
                    memory_kills: self.context.cgroups.memory_kills(&pod.record.id),
                    processor: Processor::default(),
                    queue: Queue::default(),
                    killed_for: None,
                });
                tokio::spawn(engine::attend(process, child, home, request, reports).in_current_span());
                true
            }
            Err(e) => {
                pod.reason = format!("the engine could not be started: {e}");
                tracing::error!(pod = pod.record.pod.name, "{}", pod.reason);
                let kind = restart::kind(&Ended::NotSpawned, false);
                self.counters.engine_exits.with_label_values(&[kind]).inc();
                pod.last_exit = Some(LastExit { kind, reason: pod.reason.clone(), at: Instant::now() });
                let (_, delay) = restart::decide(&Ended::NotSpawned, false, None, &mut pod.history, random());
                let at = Instant::now() + delay;
                pod.hold_until = Some(at);
                self.wake(id, at);
                false
            }
        }
    }

    /// The uid that the next engine runs under, noted in the record.
    fn renew_uid(&mut self, id: &AttachmentId) {
        let Some(pod) = self.pods.get(id) else { return };
        let others = self.pods.iter().filter(|(other, _)| *other != id);
        let taken: HashSet<u32> = others.filter_map(|(_, other)| other.record.uid).collect();
        let own = self.context.uid(pod.record.slot);
        let uid = context::next_uid(pod.record.uid, own, |uid| taken.contains(&uid));
        if let Some(pod) = self.pods.get_mut(id).filter(|pod| pod.record.uid != uid) {
            pod.record.uid = uid;
            pod.changed();
        }
    }

    /// An engine was killed before this supervisor had it as its own.
    fn killed_unseen(&mut self, id: &AttachmentId, cause: Cause, reason: String) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        let kind = cause.name();
        let (namespace, name) = (&pod.record.pod.namespace, &pod.record.pod.name);
        tracing::warn!(namespace, pod = name, kind, "no engine taken up: {reason}");
        self.counters.engine_exits.with_label_values(&[kind]).inc();
        pod.restarts_after(kind);
        pod.last_exit = Some(LastExit { kind, reason, at: Instant::now() });
    }

    /// What was found of an engine that an earlier supervisor left.
    pub(super) fn adopted(&mut self, id: &AttachmentId, found: Result<Box<Adopted>, NotAdopted>) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        let Some(identity) = self.identities.get_mut(&pod.identity) else { return };
        pod.unseen = false;
        identity.unseen = identity.unseen.saturating_sub(1);
        let (namespace, name) = (&pod.record.pod.namespace, &pod.record.pod.name);
        let kind = match found {
            // Its keys are lost: it could not be started again, nor its device be known.
            Ok(adopted) if pod.stopped.is_some() => {
                adopted.process.kill(Cause::NoIdentity);
                let reason = format!("process {} was killed: its identity is lost", adopted.process.pid());
                self.killed_unseen(id, Cause::NoIdentity, reason);
                "no_identity"
            }
            Ok(adopted) => {
                let Adopted { process, client, hello, uid, since, descriptors, output, place } = *adopted;
                tracing::info!(
                    namespace,
                    pod = name,
                    pid = process.pid(),
                    build = hello.build,
                    "engine taken up"
                );
                self.epochs += 1;
                let (epoch, of) = (self.epochs, id.clone());
                let wrap = Box::new(move |event| Message::Engine(of.clone(), epoch, event));
                let reports = Reports { to: self.to_self.clone(), wrap };
                match Home::make(&self.context.config.node.run_dir, &pod.record.id) {
                    Ok(home) => {
                        let (process, client) = (Arc::clone(&process), client.clone());
                        let home = home.at(place);
                        tokio::spawn(
                            engine::attend_adopted(process, client, home, since, reports).in_current_span(),
                        );
                    }
                    Err(e) => {
                        process.kill(Cause::Unbelieved);
                        let reason = format!("its directory cannot be used: {e}");
                        self.killed_unseen(id, Cause::Unbelieved, reason);
                        return;
                    }
                }
                tokio::spawn(
                    output::relay_adopted(output, pod.record.pod.clone(), process.pid()).in_current_span(),
                );
                let told = client.clone();
                let underlay = self.underlay.clone();
                // It may have changed while nobody watched.
                tokio::spawn(async move { told.set_underlay(within(ANSWER_WITHIN), underlay).await });
                identity.holder = Some(id.clone());
                pod.underlay =
                    Underlay { udp4: descriptors.udp4.map(Arc::new), udp6: descriptors.udp6.map(Arc::new) };
                pod.taken = Some(Taken { tun: descriptors.tun, dns: descriptors.dns });
                if pod.record.uid.is_some_and(|recorded| recorded != uid) {
                    pod.record.uid = Some(uid);
                    pod.changed();
                }
                let cgroups = &self.context.cgroups;
                let holds = cgroups.holds(&pod.record.id, process.pid());
                // Its supervisor may have ended before it was put there.
                if !cgroups.placed(&holds)
                    && let Ok(procs) = cgroups.open(&pod.record.id)
                {
                    limit(self.to_self.clone(), id, epoch, &process, procs);
                }
                pod.engine = Some(Running {
                    holds,
                    memory_kills: self.context.cgroups.memory_kills(&pod.record.id),
                    processor: Processor::default(),
                    queue: Queue::default(),
                    killed_for: None,
                    epoch,
                    process,
                    place,
                    told: None,
                    roots: UNKNOWN_ROOTS,
                    client: Some(client),
                    status: None,
                    asked: false,
                    replaces_since: None,
                    dns_problem: None,
                    interception: None,
                });
                "taken_up"
            }
            Err(NotAdopted::None(why)) => {
                tracing::info!(namespace, pod = name, "no engine to take up: {why}");
                "none"
            }
            Err(NotAdopted::Killed(why)) => {
                self.killed_unseen(id, Cause::Unbelieved, why);
                "killed"
            }
        };
        self.counters.adoptions.with_label_values(&[kind]).inc();
        self.tell_roots();
        self.refresh_routing(id);
        let identity = self.pods.get(id).map(|pod| pod.identity.clone());
        let waiting: Vec<AttachmentId> = self
            .pods
            .iter()
            .filter(|(other, p)| *other != id && Some(&p.identity) == identity.as_ref())
            .map(|(other, _)| other.clone())
            .collect();
        for other in waiting {
            self.advance(&other);
        }
    }

    pub(super) fn engine_event(&mut self, id: &AttachmentId, epoch: u64, event: Event) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        let Some(running) = pod.engine.as_mut().filter(|e| e.epoch == epoch) else { return };
        match event {
            Event::Started { hello, client, ready } => {
                self.counters.engine_ready_seconds.observe(ready.as_secs_f64());
                let (namespace, name) = (&pod.record.pod.namespace, &pod.record.pod.name);
                let pid = running.process.pid();
                running.client = Some(client);
                running.holds = self.context.cgroups.holds(&pod.record.id, pid);
                let interception = running.interception.take();
                let micros = |took: std::time::Duration| u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
                let ready_us = micros(ready);
                if let Some(since) = running.replaces_since {
                    let took = since.elapsed();
                    self.counters.recovery_seconds.observe(took.as_secs_f64());
                    pod.last_recovery = Some(took);
                    let us = micros(took);
                    tracing::info!(namespace, pod = name, pid, us, ready_us, "engine restarted");
                } else {
                    let build = hello.build;
                    tracing::info!(namespace, pod = name, pid, build, ready_us, "engine started");
                }
                pod.reached("engine");
                pod.clock.set_engine(Some(Instant::now()));
                if let Some(interception) = interception {
                    self.intercept(id, epoch, pid, interception);
                }
            }
            Event::Status(status) => {
                self.counters.reports.inc();
                self.status(id, *status);
            }
            Event::Ended { ended, answered, reason } => self.ended(id, &ended, answered, reason),
        }
    }

    /// Whether an engine could be put into its cgroups.
    pub(super) fn limited(&mut self, id: &AttachmentId, epoch: u64, result: Result<(), String>) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        let Some(running) = pod.engine.as_mut().filter(|e| e.epoch == epoch) else { return };
        let pid = running.process.pid();
        if let Err(why) = result {
            let killed = self.context.config.node.require_sandbox;
            let (namespace, name) = (&pod.record.pod.namespace, &pod.record.pod.name);
            tracing::warn!(namespace, pod = name, pid, killed, "the engine has no limits: {why}");
            if killed {
                running.process.kill(Cause::Unlimited);
            }
        }
        running.holds = self.context.cgroups.holds(&pod.record.id, pid);
    }

    /// Leads the pod's questions for names to the engine that answers by now.
    pub(super) fn intercept(&self, id: &AttachmentId, epoch: u64, pid: u32, interception: Interception) {
        let Some(pod) = self.pods.get(id) else { return };
        let (record, to, of) = (pod.record.clone(), self.to_self.clone(), id.clone());
        let home = Home::make(&self.context.config.node.run_dir, &record.id);
        tokio::spawn(async move {
            match interception.begin(record).await {
                Some(why) => {
                    let _ = to.send(Message::NotIntercepted(of, epoch, why)).await;
                }
                // Without the note the next supervisor starts another engine: it costs less than
                // a pod whose names nobody answers.
                None => drop(home.and_then(|home| home.note_intercepting(pid))),
            }
        });
    }

    pub(super) fn status(&mut self, id: &AttachmentId, status: EngineStatus) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        // The answer to a call may have overtaken an older report.
        let had = pod.engine.as_ref().and_then(|e| e.status.as_ref());
        if had.is_some_and(|had| had.seq > status.seq) {
            return;
        }
        // Said before the engine logged out, and held up on its way: the device is not registered any more.
        if pod.logout_tried {
            return;
        }
        pod.engine_reached(status.milestones);
        let Some(identity) = self.identities.get_mut(&pod.identity) else { return };
        if let NodeState::Connecting { reason } = &status.state {
            pod.reason.clone_from(reason);
        }
        let in_force = status.state == NodeState::Running && status.node.is_some();
        if in_force && status.control_connected {
            confirmed(pod, identity);
        }
        if status.state == NodeState::NeedsApproval && !identity.record.registered {
            identity.record.registered = true;
            identity.changed();
        }
        if let Some(node) = status.node.as_ref().filter(|_| in_force) {
            let addresses: Vec<_> = node.addresses.iter().map(ipnet::IpNet::addr).collect();
            let record = &mut identity.record;
            if record.addresses != addresses || record.stable_id != node.stable_id {
                record.addresses = addresses;
                record.stable_id.clone_from(&node.stable_id);
                identity.changed();
            }
        }
        let approval = status.state == NodeState::NeedsApproval;
        let mut login = None;
        if in_force {
            pod.accepted.clone_from(&status.accepted_routes);
        }
        if let Some(engine) = &mut pod.engine {
            engine.status = Some(status);
            login = engine.login_url().map(str::to_owned);
        }
        pod.awaits_person = approval || login.is_some();
        if approval {
            pod.reason = "the tailnet wants an administrator to approve the device".into();
        }
        if let Some(url) = login {
            if identity.record.login_url != url {
                identity.record.login_url.clone_from(&url);
                identity.changed();
                let (namespace, name) = (&pod.record.pod.namespace, &pod.record.pod.name);
                tracing::warn!(namespace, pod = name, url, "somebody has to log the device in");
            }
            pod.reason = format!("the tailnet wants somebody to log in: {url}");
            if pod.join.is_some() && pod.wanted == Wanted::Attached {
                let failure = error(
                    code::NEEDS_ACTION,
                    format!("{}: the tailnet wants somebody to log in", pod_name(&pod.record.pod)),
                    format!("open {url}; the pod joins when it is tried again after that"),
                );
                self.fail_add(id, failure);
            }
        }
        self.settle_name(id);
        self.refresh_routing(id);
    }

    fn ended(
        &mut self,
        id: &AttachmentId,
        ended: &Ended,
        answered: Option<std::time::Duration>,
        reason: String,
    ) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        let engine = pod.engine.take();
        let asked = engine.as_ref().is_some_and(|e| e.asked);
        let cgroups = &self.context.cgroups;
        let killed = |e: &Running| cgroups.memory_kills(&pod.record.id) > e.memory_kills;
        let memory = *ended == Ended::Crash && engine.as_ref().is_some_and(killed);
        let kind = restart::kind(ended, memory);
        let killed_for = match ended {
            Ended::Killed(_) => engine.as_ref().and_then(|e| e.killed_for.clone()),
            Ended::Exit(_) | Ended::Crash | Ended::ForbiddenCall | Ended::NotSpawned => None,
        };
        let reason = if let Some(why) = killed_for {
            why
        } else if memory {
            let mib = cgroups.max_bytes() >> 20;
            format!("the engine wanted more than its {mib} MiB of memory and was killed")
        } else {
            reason
        };
        self.counters.engine_exits.with_label_values(&[kind]).inc();
        pod.last_exit = Some(LastExit { kind, reason: reason.clone(), at: Instant::now() });
        let (namespace, name) = (&pod.record.pod.namespace, &pod.record.pod.name);
        if restart::is_wish(ended, asked) {
            tracing::info!(namespace, pod = name, kind, ?ended, "engine ended: {reason}");
        } else {
            tracing::warn!(namespace, pod = name, kind, ?ended, "engine ended: {reason}");
        }
        if pod.wanted != Wanted::Attached || (asked && pod.link == Link::Broken) {
            return;
        }
        let now = Instant::now();
        let (next, delay) = restart::decide(ended, asked, answered, &mut pod.history, random());
        let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        tracing::info!(namespace, pod = name, ?next, delay_ms, "what comes after the engine");
        pod.reason.clone_from(&reason);
        pod.restarts_after(kind);
        pod.died_at = Some(now);
        if !delay.is_zero() {
            pod.hold_until = Some(now + delay);
        }
        match next {
            Next::Restart => {}
            Next::NewKey | Next::NewNodeKey => {
                // Control does not know the device: nothing is left there to remove.
                pod.key_given = false;
                if let Some(identity) = self.identities.get_mut(&pod.identity)
                    && (identity.record.registered || !identity.record.login_url.is_empty())
                {
                    identity.record.registered = false;
                    identity.record.login_url.clear();
                    identity.changed();
                }
                pod.need_key = true;
                pod.rotate |= next == Next::NewNodeKey;
                pod.rejections += u32::from(pod.key.take().is_some());
            }
            Next::RotateNodeKey => {
                pod.need_key = true;
                pod.rotate = true;
                // Headscale does not renew a tagged node, whatever key it shows.
                let spent = pod.key.take().is_some();
                pod.device_spent |= spent;
                pod.rejections += u32::from(spent);
            }
            Next::RebuildLink => {
                pod.link = Link::Broken;
                pod.fds = None;
            }
            Next::Stop => pod.stopped = Some(reason.clone()),
        }
        if matches!(next, Next::NewKey | Next::NewNodeKey | Next::RotateNodeKey)
            && let Ok(home) = Home::make(&self.context.config.node.run_dir, &pod.record.id)
        {
            // It speaks of a device that control no longer has.
            home.drop_snapshot();
        }
        if !delay.is_zero() {
            self.wake(id, now + delay);
        }
        self.fail_hopeless_add(id, next, &reason);
    }

    /// An ADD does not wait for its deadline when trying again cannot help.
    fn fail_hopeless_add(&mut self, id: &AttachmentId, next: Next, reason: &str) {
        let Some(pod) = self.pods.get(id) else { return };
        if pod.join.is_none() || !pod.record.addresses.is_empty() {
            return;
        }
        let name = pod_name(&pod.record.pod);
        let reusable =
            matches!(self.context.credentials.get(&pod.record.tailnet), Some(Credential::AuthKey(_)));
        let tailnet = &pod.record.tailnet;
        let failure = match next {
            Next::Stop => error(code::BAD_CONFIG, format!("{name}: {reason}"), "correct the configuration"),
            Next::NewKey | Next::NewNodeKey
                if pod.rejections >= if reusable { 1 } else { REJECTIONS_IN_ADD } =>
            {
                error(
                    code::REFUSED,
                    format!("{name}: {reason}"),
                    format!("check tailnet.{tailnet}.credentials and the tags it may use"),
                )
            }
            Next::NewKey | Next::NewNodeKey | Next::Restart | Next::RotateNodeKey | Next::RebuildLink => {
                return;
            }
        };
        self.fail_add(id, failure);
    }
}

/// Control has taken the node as it is: the key is spent, the old node key is history.
fn confirmed(pod: &mut Pod, identity: &mut Identity) {
    let record = &mut identity.record;
    if !record.registered || record.old_node_key.is_some() || !record.login_url.is_empty() {
        record.registered = true;
        record.old_node_key = None;
        record.login_url.clear();
        identity.changed();
    }
    pod.key = None;
    pod.need_key = false;
    pod.rejections = 0;
    pod.reason.clear();
    restart::key_worked(&mut pod.history);
}

pub(super) fn start_request(
    context: &Context,
    pod: &Pod,
    identity: &Identity,
    underlay: &podtether_proto::engine::Underlay,
    extra_roots_pem: String,
) -> Box<StartRequest> {
    let record = &identity.record;
    let tailnet = context.config.tailnets.get(&pod.record.tailnet);
    let credential = context.credentials.get(&pod.record.tailnet);
    let url = Some(record.login_url.clone()).filter(|url| !url.is_empty());
    Box::new(StartRequest {
        pod: pod.record.pod.clone(),
        control_url: tailnet.map(|t| t.control_url.clone()).unwrap_or_default(),
        extra_roots_pem,
        hostname: record.hostname.clone(),
        ephemeral: context.is_ephemeral(record),
        request_tags: credential.map(Credential::request_tags).unwrap_or_default(),
        machine_key: record.machine_key.clone(),
        node_key: record.node_key.clone(),
        old_node_key: record.old_node_key,
        auth_key: pod.key.as_ref().map(|(key, _)| key.secret.clone()),
        interactive: credential.is_some_and(Credential::is_person),
        login_url: url,
        proxy: context
            .config
            .node
            .proxy
            .as_ref()
            .map(|proxy| ProxySettings { url: proxy.url.clone(), bypass: proxy.bypass.clone() }),
        mtu: MTU,
        name_servers: Vec::new(),
        underlay: underlay.clone(),
        routing: pod.engine_routing.clone(),
        standby: None,
        join: pod.record.join.clone(),
        log: levels::pods().get(&pod.record.pod.namespace, &pod.record.pod.name, Instant::now()),
    })
}

/// Puts an engine into its cgroups, which makes the caller wait.
pub(super) fn limit(
    to: mpsc::Sender<Message>,
    id: &AttachmentId,
    epoch: u64,
    process: &Arc<spawn::Process>,
    procs: Vec<OwnedFd>,
) {
    let (of, process) = (id.clone(), Arc::clone(process));
    tokio::spawn(async move {
        let put = tokio::task::spawn_blocking(move || {
            if process.has_ended() { Ok(()) } else { cgroup::put(process.pid(), &procs) }
        });
        let result = put.await.map_err(|e| e.to_string()).and_then(|done| done.map_err(|e| e.to_string()));
        let _ = to.send(Message::Limited(of, epoch, result)).await;
    });
}

pub(super) struct Born {
    pub(super) process: spawn::Process,
    pub(super) child: tokio::process::Child,
    pub(super) home: Home,
    pub(super) names: Sockets,
    /// Of the cgroups it is to be put into.
    pub(super) cgroups: Vec<OwnedFd>,
}

/// Starts an engine with the pod's descriptors; a standby with a connection to the engine at the other place.
pub(super) fn spawn_engine(
    context: &Context,
    record: &Attachment,
    kept: &Fds,
    place: Place,
    standby: bool,
) -> std::io::Result<Born> {
    let home = Home::make(&context.config.node.run_dir, &record.id)?.at(place);
    let partner = standby.then(|| home.clone().at(place.other()).announce_heir()).transpose()?;
    let (rpc, heir, snapshot, reason) =
        (home.listen()?, home.await_heir()?, home.snapshot()?, home.reason()?);
    let names = Sockets::open(&kept.link.pod, record);
    let mut named: Vec<(&'static str, BorrowedFd<'_>)> = vec![(fds::RPC, rpc.as_fd())];
    named.extend(kept.named());
    named.extend(names.named());
    named.push((fds::SNAPSHOT, snapshot.as_fd()));
    named.push((fds::REASON, reason.as_fd()));
    named.push((fds::HEIR, heir.as_fd()));
    named.extend(partner.as_ref().map(|partner| (fds::PARTNER, partner.as_fd())));
    named.extend(context.nowhere.as_ref().map(|nowhere| (fds::NOWHERE, nowhere.as_fd())));
    let program = context.image.as_ref().map_or_else(|| context.engine.clone(), Image::program);
    let birth = Birth {
        program: &program,
        fds: &named,
        uid: record.uid,
        require_sandbox: context.config.node.require_sandbox,
        trace: &home.trace(),
    };
    // Opened before: whoever cannot be limited is not started.
    let cgroups = context.cgroups.open(&record.id)?;
    let (process, child) = spawn::spawn(birth)?;
    Ok(Born { process, child, home, names, cgroups })
}
