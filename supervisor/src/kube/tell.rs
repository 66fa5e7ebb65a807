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
    events: HashMap<Event, Instant>,
    joined: bool,
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
            known.events.retain(|_, at| now.saturating_duration_since(*at) < REPEAT_AFTER);
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
        self.event(&seen, event).await;
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
            if self.event(&seen, event).await && joined {
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
    async fn event(&mut self, seen: &Seen, event: Event) -> bool {
        let known = self.known.entry(seen.uid.clone()).or_default();
        let now = Instant::now();
        if known.events.get(&event).is_some_and(|at| now.saturating_duration_since(*at) < REPEAT_AFTER) {
            return true;
        }
        if !self.may("events") {
            return false;
        }
        let object = object(seen, &event, &self.cluster.inner.node).to_string().into_bytes();
        let request = of(seen, "events").create(&PostParams::default(), object);
        let result = self.cluster.api().tell("create events", request).await;
        let done = self.done("events", seen, result).await;
        if done {
            self.known.entry(seen.uid.clone()).or_default().events.insert(event, now);
        }
        done
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

fn object(seen: &Seen, event: &Event, node: &str) -> Value {
    let at = rfc3339(unix_now());
    // A name may be as long as a pod's.
    let prefix: String = seen.name.chars().take(200).collect();
    json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"generateName": format!("{prefix}."), "namespace": seen.namespace},
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
mod tests {
    use super::*;
    use crate::table::LastExit;

    fn pod(state: &'static str) -> PodReport {
        PodReport {
            tailnet: "default".into(),
            pod: "web-0".into(),
            state,
            hostname: "web".into(),
            name: "web.tail.example".into(),
            addresses: vec!["100.64.0.1".parse().unwrap(), "fd7a::1".parse().unwrap()],
            ..PodReport::default()
        }
    }

    #[test]
    fn what_is_worth_an_event() {
        let exit = LastExit { kind: "crash", reason: "it fell".into(), seconds_ago: 1 };
        let looping = PodReport { restarts: 3, last_exit: Some(exit), ..pod("backoff") };
        let numbered = PodReport { name: "web-1.tail.example".into(), ..pod("running") };
        let renamed = PodReport { name: "shop-1.tail.example".into(), ..pod("running") };
        let moved = PodReport {
            hostname: "web-x2x4z".into(),
            name: "web-x2x4z.tail.example".into(),
            name_taken: "web".into(),
            ..pod("running")
        };
        let noted = PodReport { notes: vec!["odd".into()], ..pod("running") };
        let login = PodReport { login_url: "https://login.example/a/1".into(), ..pod("needs-login") };
        type Case = (PodReport, bool, &'static [(&'static str, &'static str)]);
        let table: [Case; 12] = [
            (pod("running"), false, &[("Joined", "default as web.tail.example with 100.64.0.1, fd7a::1")]),
            (pod("running"), true, &[]),
            (PodReport { addresses: vec![], ..pod("running") }, false, &[]),
            (login, false, &[("WaitingForLogin", "open https://login.example/a/1")]),
            (pod("needs-approval"), false, &[("WaitingForApproval", "has to approve the device")]),
            (PodReport { restarts: 2, ..pod("backoff") }, true, &[]),
            (looping, true, &[("EngineCrashLoop", "last crash: it fell")]),
            (numbered, true, &[("HostNameTaken", "another device called web, so this one is web-1")]),
            (moved, true, &[("HostNameTaken", "another device called web, so this one is web-x2x4z")]),
            (renamed, true, &[]),
            (noted, true, &[("Annotation", "odd")]),
            (pod("joining"), false, &[]),
        ];
        for (pod, had_joined, wanted) in table {
            let said = events(&pod, had_joined);
            assert_eq!(said.len(), wanted.len(), "{said:?}");
            for (event, (reason, part)) in said.iter().zip(wanted) {
                assert!(event.reason == *reason && event.message.contains(part), "{event:?}");
                let is_plain = *reason == "Joined" || event.message.contains("web-x2x4z");
                assert_eq!(event.warning, !is_plain, "{event:?}");
            }
        }
    }

    #[test]
    fn what_a_pod_is_annotated_with() {
        let with =
            annotations(&PodReport { key_expiry_unix_s: Some(1_800_000_000), ..pod("running") }).unwrap();
        assert_eq!(with[ADDRESSES], "100.64.0.1,fd7a::1");
        assert_eq!(
            (with[NAME].as_str(), with[KEY_EXPIRY].as_str()),
            ("web.tail.example", "2027-01-15T08:00:00Z")
        );
        assert_eq!(annotations(&pod("running")).unwrap()[KEY_EXPIRY], "never");
        for state in ["joining", "restarting", "leaving"] {
            assert!(annotations(&pod(state)).is_none(), "{state}");
        }
        assert!(annotations(&PodReport { addresses: vec![], ..pod("joining") }).is_none());
    }

    #[test]
    fn failures_are_told_whole_and_bounded() {
        let error = |code| CniError { code, msg: "m\u{7}".repeat(900), details: "d".into() };
        for (code, reason) in [
            (code::BAD_CONFIG, "AnnotationRefused"),
            (code::REFUSED, "JoinRefused"),
            (code::NEEDS_ACTION, "WaitingForPerson"),
            (code::TRY_AGAIN, "JoinFailed"),
        ] {
            let event = failed(&error(code));
            assert_eq!(event.reason, reason);
            let seen = Seen {
                uid: "u".into(),
                namespace: "ns".into(),
                name: "n".repeat(253),
                annotations: Default::default(),
                owner: None,
                hash: None,
                mirror: false,
                ending: false,
                gate: false,
            };
            let object = object(&seen, &event, "node-1");
            let message = object["message"].as_str().unwrap();
            assert!(message.len() <= 1024 && !message.contains(char::is_control));
            assert!(object["metadata"]["generateName"].as_str().unwrap().len() < 253);
        }
    }
}
