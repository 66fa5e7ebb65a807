//! What the cluster is told of its pods: annotations, events, a condition. What there is to tell is a pure function
//! of a pod as the table shows it; a task of its own tells it, one call after another and not many a second, and
//! nobody waits for it. Annotations and condition are told as they are by then, however often they changed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use kube::api::{Patch, PatchParams, PostParams};
use kube::core::Request;
use podtether_proto::engine::PodRef;
use podtether_proto::node::{CniError, code};
use serde_json::{Value, json};

use super::api::Failure;
use super::store::{GATE, Seen};
use super::{Cluster, rfc3339};
use crate::distrust;
use crate::hostname::numbered;
use crate::table::{Handle, PodReport};

/// How often the pods are looked at when nobody asks for it.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Between two calls.
const PACE: Duration = Duration::from_millis(100);
/// The same event of the same pod again.
const REPEAT_AFTER: Duration = Duration::from_secs(600);
/// So long after it was last told, the same event counts up the object that is there, as Kubernetes' own recorders
/// do; the API server keeps events about as long.
const SERIES_FOR: Duration = Duration::from_secs(3600);
/// Different events of one pod that are remembered.
const MAX_EVENTS: usize = 32;
/// After a call that RBAC refuses, before the next of its kind.
const FORBIDDEN_PAUSE: Duration = Duration::from_secs(60);
/// Restarts after which back-off is worth an event.
const LOOP_AFTER: u64 = 3;
/// Kubernetes takes 1024 bytes of an event's message.
const MAX_MESSAGE: usize = 1000;
/// How often what was changed by somebody else meanwhile is tried again.
const MAX_CONFLICTS: u32 = 5;
/// Pods of which it is remembered what was told.
const MAX_KNOWN: usize = 8192;

pub(super) const ADDRESSES: &str = "podtether.dev/addresses";
const NAME: &str = "podtether.dev/name";
const KEY_EXPIRY: &str = "podtether.dev/key-expiry";

/// Something that happened to a pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Event {
    pub(super) warning: bool,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

fn warning(reason: &'static str, message: impl Into<String>) -> Event {
    Event { warning: true, reason, message: message.into() }
}

/// `podtether.dev/ready`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) status: bool,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// An ADD that failed.
#[derive(Debug, Clone)]
pub(super) struct FailedAdd {
    pub(super) pod: PodRef,
    pub(super) error: CniError,
}

/// Annotations of a pod that runs. Not before, though its addresses may be known: whoever finds them there takes
/// the pod for one of which it was told that it joined.
fn annotations(pod: &PodReport) -> Option<BTreeMap<&'static str, String>> {
    if pod.addresses.is_empty() || pod.name.is_empty() || pod.state != "running" {
        return None;
    }
    let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
    let expiry = pod.key_expiry_unix_s.map_or_else(|| "never".to_owned(), rfc3339);
    Some(BTreeMap::from([
        (ADDRESSES, addresses.join(",")),
        (NAME, distrust::label(&pod.name)),
        (KEY_EXPIRY, expiry),
    ]))
}

fn condition(pod: &PodReport) -> Condition {
    let reason = match pod.state {
        "running" => "Joined",
        "needs-login" => "WaitingForLogin",
        "needs-approval" => "WaitingForApproval",
        "restarting" => "EngineRestarting",
        "backoff" => "EngineCrashLoop",
        "stopped" => "EngineStopped",
        "leaving" => "Leaving",
        _ => "Joining",
    };
    let message = name_taken(pod).map_or_else(|| pod.reason.clone(), |event| event.message);
    Condition { status: pod.state == "running", reason, message: bounded(&message) }
}

/// What is worth an event; `had_joined` when the cluster knows that it did.
fn events(pod: &PodReport, had_joined: bool) -> Vec<Event> {
    let mut events = Vec::new();
    let tailnet = &pod.tailnet;
    match pod.state {
        "running" if !had_joined && annotations(pod).is_some() => {
            let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
            let (name, addresses) = (distrust::label(&pod.name), addresses.join(", "));
            let message = format!("joined tailnet {tailnet} as {name} with {addresses}");
            events.push(Event { warning: false, reason: "Joined", message });
        }
        "needs-login" => events.push(warning(
            "WaitingForLogin",
            format!("tailnet {tailnet} wants somebody to log this device in: open {}", pod.login_url),
        )),
        "needs-approval" => events.push(warning(
            "WaitingForApproval",
            format!(
                "an administrator of tailnet {tailnet} has to approve the device: it is in the admin console"
            ),
        )),
        "backoff" if pod.restarts >= LOOP_AFTER => {
            let exit = pod.last_exit.as_ref();
            let why =
                exit.map_or_else(|| pod.reason.clone(), |exit| format!("{}: {}", exit.kind, exit.reason));
            events.push(warning("EngineCrashLoop", format!("its engine ends again and again, last {why}")));
        }
        "stopped" => events.push(warning("EngineStopped", pod.reason.clone())),
        _ => {}
    }
    events.extend(name_taken(pod));
    let notes = pod.notes.iter().filter(|_| pod.state == "running");
    events.extend(notes.map(|note| warning("Annotation", note.clone())));
    events
}

/// What is told of a name that another device has.
fn name_taken(pod: &PodReport) -> Option<Event> {
    if pod.state != "running" || pod.hostname.is_empty() {
        return None;
    }
    let (tailnet, label) = (&pod.tailnet, pod.name.split('.').next().unwrap_or_default());
    let taken = if pod.name_taken.is_empty() { &pod.hostname } else { &pod.name_taken };
    let is_numbered = numbered(&pod.hostname, label) || numbered(taken, label);
    if !is_numbered && (pod.name_taken.is_empty() || label == taken) {
        return None;
    }
    let message = format!(
        "tailnet {tailnet} has another device called {taken}, so this one is {}: remove that, or give this pod another \
         name (annotation tailscale.com/hostname)",
        distrust::label(label)
    );
    // Several pods of one workload are no mistake, and the rest of its name tells each apart.
    Some(Event { warning: is_numbered || !pod.notes.is_empty(), reason: "HostNameTaken", message })
}

fn failed(error: &CniError) -> Event {
    let reason = match error.code {
        code::BAD_CONFIG => "AnnotationRefused",
        code::REFUSED => "JoinRefused",
        code::NEEDS_ACTION => "WaitingForPerson",
        _ => "JoinFailed",
    };
    let details = if error.details.is_empty() { String::new() } else { format!(": {}", error.details) };
    warning(reason, format!("{}{details}", error.msg))
}

fn bounded(text: &str) -> String {
    let mut text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.truncate(text.floor_char_boundary(MAX_MESSAGE));
    text
}

/// What a pod was told.
#[derive(Debug, Default)]
struct Known {
    annotations: Option<BTreeMap<&'static str, String>>,
    condition: Option<(bool, &'static str)>,
    conflicts: u32,
    events: HashMap<Event, Told>,
    joined: bool,
}

/// The object that an event was told by.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    /// Its name.
    name: String,
    /// How often it was told.
    count: u32,
    /// When it was told last.
    at: Instant,
}

/// What to do about an event.
#[derive(Debug, PartialEq, Eq)]
enum Telling {
    /// Nothing: it was told a moment ago.
    Known,
    /// It is a new object.
    Anew,
    /// The object of this name is told to have happened so often.
    Again(String, u32),
}

fn telling(told: Option<&Told>, now: Instant) -> Telling {
    let Some(told) = told else { return Telling::Anew };
    match now.saturating_duration_since(told.at) {
        age if age < REPEAT_AFTER => Telling::Known,
        age if age < SERIES_FOR => Telling::Again(told.name.clone(), told.count.saturating_add(1)),
        _ => Telling::Anew,
    }
}

impl Known {
    /// Remembers that an event was told; what was told longest ago makes room.
    fn told(&mut self, event: Event, told: Told) {
        self.events.insert(event, told);
        while self.events.len() > MAX_EVENTS {
            let oldest = self.events.iter().min_by_key(|(_, told)| told.at).map(|(event, _)| event.clone());
            let Some(oldest) = oldest else { return };
            self.events.remove(&oldest);
        }
    }
}

/// Tells the cluster, for ever.
pub(super) async fn run(cluster: Cluster, table: Handle) {
    let mut teller = Teller { cluster, known: HashMap::new(), not_before: HashMap::new() };
    loop {
        let nudged = teller.cluster.inner.nudge.notified();
        let _ = tokio::time::timeout(LOOK_EVERY, nudged).await;
        let failures = teller.cluster.take_failed_adds();
        let pods = table.list().await.pods;
        for failure in failures {
            teller.failed_add(&failure).await;
        }
        teller.forget_but(&pods);
        for pod in &pods {
            teller.tell(pod).await;
        }
    }
}

struct Teller {
    cluster: Cluster,
    /// By UID in the API.
    known: HashMap<String, Known>,
    not_before: HashMap<&'static str, Instant>,
}

impl Teller {
    fn forget_but(&mut self, pods: &[PodReport]) {
        let there: HashSet<&str> = pods.iter().map(|pod| pod.uid.as_str()).collect();
        let now = Instant::now();
        self.known.retain(|uid, known| {
            known.events.retain(|_, told| now.saturating_duration_since(told.at) < SERIES_FOR);
            there.contains(uid.as_str()) || !known.events.is_empty()
        });
        if self.known.len() > MAX_KNOWN {
            self.known.clear();
        }
    }

    async fn failed_add(&mut self, failure: &FailedAdd) {
        let Some(seen) = self.cluster.with(|store| store.pod(&failure.pod).cloned()) else { return };
        let event = failed(&failure.error);
        let (reason, message) = (event.reason, bounded(&event.message));
        self.event(&seen, event, Instant::now()).await;
        // What an annotation asks for and cannot have is nothing that passes.
        if seen.gate || failure.error.code == code::BAD_CONFIG {
            self.condition(&seen, Condition { status: false, reason, message }).await;
        }
    }

    async fn tell(&mut self, pod: &PodReport) {
        let asked = PodRef { uid: pod.uid.clone(), namespace: pod.namespace.clone(), name: pod.pod.clone() };
        let Some(seen) = self.cluster.with(|store| store.pod(&asked).cloned()) else { return };
        if seen.ending {
            return;
        }
        let known = self.known.entry(seen.uid.clone()).or_default();
        let had_joined = known.joined || seen.annotations.contains_key(ADDRESSES);
        let has_condition = known.condition.is_some_and(|(status, _)| !status);
        if let Some(wanted) = annotations(pod)
            && known.annotations.as_ref() != Some(&wanted)
        {
            let there = wanted.iter().all(|(key, value)| seen.annotations.get(*key) == Some(value));
            if there || self.annotate(&seen, &wanted).await {
                let known = self.known.entry(seen.uid.clone()).or_default();
                known.annotations = Some(wanted);
            }
        }
        if seen.gate || has_condition {
            self.condition(&seen, condition(pod)).await;
        }
        for event in events(pod, had_joined) {
            let joined = event.reason == "Joined";
            if self.event(&seen, event, Instant::now()).await && joined {
                self.known.entry(seen.uid.clone()).or_default().joined = true;
            }
        }
    }

    /// Whether calls of a kind may be made now.
    fn may(&self, what: &'static str) -> bool {
        self.not_before.get(what).is_none_or(|at| Instant::now() >= *at)
    }

    /// True when it is told, or nobody is there to be told.
    async fn done(&mut self, what: &'static str, seen: &Seen, result: Result<(), Failure>) -> bool {
        tokio::time::sleep(PACE).await;
        match result {
            Ok(()) => {
                self.cluster.with(|store| store.works(what));
                self.known.entry(seen.uid.clone()).or_default().conflicts = 0;
                true
            }
            // It has gone meanwhile.
            Err(Failure::NotFound | Failure::Invalid(_) | Failure::Gone) => true,
            // Somebody changed it at the same time, or it is another pod of that name, whose own time will come: the
            // watch tells which.
            Err(Failure::Conflict(_)) => {
                let known = self.known.entry(seen.uid.clone()).or_default();
                known.conflicts += 1;
                known.conflicts > MAX_CONFLICTS
            }
            Err(failure) => {
                self.cluster.fails(what, &failure);
                let pause =
                    if matches!(failure, Failure::Forbidden(_)) { FORBIDDEN_PAUSE } else { LOOK_EVERY };
                self.not_before.insert(what, Instant::now() + pause);
                false
            }
        }
    }

    async fn annotate(&mut self, seen: &Seen, wanted: &BTreeMap<&'static str, String>) -> bool {
        if !self.may("patches") {
            return false;
        }
        let patch = json!({"metadata": {"uid": seen.uid, "annotations": wanted}});
        let request = pods_of(seen).patch(&seen.name, &manager(), &Patch::Merge(&patch));
        let result = self.cluster.api().tell("patch pods", request).await;
        self.done("patches", seen, result).await
    }

    async fn condition(&mut self, seen: &Seen, wanted: Condition) {
        let known = self.known.entry(seen.uid.clone()).or_default();
        let now = Some((wanted.status, wanted.reason));
        if known.condition == now || !self.may("patches") {
            return;
        }
        let patch = json!({
            "metadata": {"uid": seen.uid},
            "status": {"conditions": [{
                "type": GATE,
                "status": if wanted.status { "True" } else { "False" },
                "reason": wanted.reason,
                "message": wanted.message,
                "lastTransitionTime": rfc3339(unix_now()),
            }]},
        });
        // Conditions are merged by their type.
        let patch = Patch::Strategic(&patch);
        let request = pods_of(seen).patch_subresource("status", &seen.name, &manager(), &patch);
        let result = self.cluster.api().tell("patch pods/status", request).await;
        if self.done("patches", seen, result).await {
            self.known.entry(seen.uid.clone()).or_default().condition = now;
        }
    }

    /// True when it is told, now or not long ago.
    async fn event(&mut self, seen: &Seen, event: Event, now: Instant) -> bool {
        let known = self.known.entry(seen.uid.clone()).or_default();
        let telling = telling(known.events.get(&event), now);
        if telling == Telling::Known {
            return true;
        }
        if !self.may("events") {
            return false;
        }
        if let Telling::Again(name, count) = telling
            && self.count_up(seen, &name, count).await
        {
            self.known.entry(seen.uid.clone()).or_default().told(event, Told { name, count, at: now });
            return true;
        }
        let name = event_name(seen, random());
        let object = object(seen, &event, &name, &self.cluster.inner.node).to_string().into_bytes();
        let request = of(seen, "events").create(&PostParams::default(), object);
        let result = self.cluster.api().tell("create events", request).await;
        let done = self.done("events", seen, result).await;
        if done {
            self.known.entry(seen.uid.clone()).or_default().told(event, Told { name, count: 1, at: now });
        }
        done
    }

    /// Whether the object of this name says now that it happened so often. It may be gone, or not ours to change: then
    /// the event is told anew.
    async fn count_up(&self, seen: &Seen, name: &str, count: u32) -> bool {
        let patch = json!({"count": count, "lastTimestamp": rfc3339(unix_now())});
        let request = of(seen, "events").patch(name, &manager(), &Patch::Merge(&patch));
        let result = self.cluster.api().tell("patch events", request).await;
        tokio::time::sleep(PACE).await;
        if let Err(failure) = &result {
            tracing::debug!(namespace = seen.namespace, pod = seen.name, "an event is told anew: {failure}");
        }
        result.is_ok()
    }
}

/// A resource in the pod's namespace.
fn of(seen: &Seen, resource: &str) -> Request {
    Request::new(format!("/api/v1/namespaces/{}/{resource}", seen.namespace))
}

fn pods_of(seen: &Seen) -> Request {
    of(seen, "pods")
}

fn manager() -> PatchParams {
    PatchParams { field_manager: Some("podtether".into()), ..PatchParams::default() }
}

/// A name for the event's object; it may be no longer than a pod's.
fn event_name(seen: &Seen, random: u64) -> String {
    let prefix: String = seen.name.chars().take(200).collect();
    format!("{prefix}.{random:016x}")
}

fn random() -> u64 {
    getrandom::u64().unwrap_or_default()
}

fn object(seen: &Seen, event: &Event, name: &str, node: &str) -> Value {
    let at = rfc3339(unix_now());
    json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"name": name, "namespace": seen.namespace},
        "involvedObject": {
            "apiVersion": "v1", "kind": "Pod", "namespace": seen.namespace, "name": seen.name, "uid": seen.uid,
        },
        "type": if event.warning { "Warning" } else { "Normal" },
        "reason": event.reason,
        "message": bounded(&event.message),
        "source": {"component": "podtether", "host": node},
        "reportingComponent": "podtether.dev/supervisor", "reportingInstance": node,
        "firstTimestamp": at, "lastTimestamp": at, "count": 1,
    })
}

fn unix_now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
