//! What is known of this node's pods and of namespaces: bounded, and no more of each than is used. Pure.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use podtether_proto::engine::PodRef;
use serde::{Deserialize, Serialize};

use super::object::{NamespaceObject, PodObject};
use crate::choose::{Annotations, PREFIX};

/// Condition that a pod's readiness may wait for.
pub(super) const GATE: &str = "podtether.dev/ready";
/// A static pod has another UID in the API than its runtime is told: that is here.
const CONFIG_HASH: &str = "kubernetes.io/config.hash";
/// On the API's picture of a static pod.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Pods of a node.
const MAX_PODS: usize = 8192;
/// Namespaces.
const MAX_NAMESPACES: usize = 65_536;
/// Pods that were seen to end.
const MAX_ENDED: usize = 8192;
/// Annotations of ours on one object.
const MAX_ANNOTATIONS: usize = 32;
/// Bytes of one value: more is no value of any annotation.
const MAX_VALUE: usize = 2048;
/// A pod that the API does not have, although its list is known: a pod's ADD may come before the news of it.
const ABSENT_FOR: Duration = Duration::from_secs(30);

/// Between two lines of the log about one thing that fails.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// What is known of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// In the API.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Those that we read.
    pub annotations: Annotations,
    /// Kind of its controller.
    pub owner: Option<String>,
    /// Its UID to its runtime, of a static pod.
    pub hash: Option<String>,
    /// The API's picture of a static pod: it comes and goes as the API likes, the pod does not.
    pub mirror: bool,
    /// It was deleted, or has finished.
    pub ending: bool,
    /// Its readiness waits for us.
    pub gate: bool,
}

/// Whether a pod lives, as far as the API knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is there, and nobody has deleted it.
    Lives,
    /// It is being deleted, has finished or is gone.
    Ended,
    /// Nobody can say.
    Unknown,
}

/// How one thing that is asked of the API goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// `pods`, `namespaces`, `events`, `patches`.
    pub what: &'static str,
    /// Whether what is known is up to date.
    pub current: bool,
    /// Whether there is a list of them at all.
    pub known: bool,
    /// Calls that failed since the start.
    pub failures: u64,
    /// What is wrong and what to do, empty when nothing is.
    pub sentence: String,
}

impl Health {
    fn new(what: &'static str) -> Health {
        Health { what, current: false, known: false, failures: 0, sentence: String::new() }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Store {
    pods: HashMap<String, Seen>,
    /// UIDs in the API of static pods, by what their runtime calls them.
    by_hash: HashMap<String, String>,
    ended: HashSet<String>,
    ended_order: VecDeque<String>,
    /// Since when a pod that was asked for is not in the list.
    absent: HashMap<String, Instant>,
    namespaces: HashMap<String, Annotations>,
    health: BTreeMap<&'static str, Health>,
    /// When the log was told last.
    logged: BTreeMap<&'static str, Instant>,
}

impl Default for Store {
    fn default() -> Self {
        let health = ["events", "namespaces", "patches", "pods"];
        Store {
            pods: HashMap::new(),
            by_hash: HashMap::new(),
            ended: HashSet::new(),
            ended_order: VecDeque::new(),
            absent: HashMap::new(),
            namespaces: HashMap::new(),
            logged: BTreeMap::new(),
            health: health.into_iter().map(|what| (what, Health::new(what))).collect(),
        }
    }
}

/// As it rests on the disk.
#[derive(Serialize, Deserialize)]
struct Recalled {
    namespaces: BTreeMap<String, Annotations>,
}

/// Of all annotations those that we read, bounded.
fn ours(all: Option<BTreeMap<String, String>>) -> Annotations {
    // And those that we write.
    let is_ours = |key: &str| key.starts_with(PREFIX) || key.starts_with("podtether.dev/");
    let ours = all.into_iter().flatten().filter(|(key, _)| is_ours(key) && key.len() <= MAX_VALUE);
    let cut = |mut value: String| {
        // A byte more than any value may have makes it none.
        value.truncate(value.floor_char_boundary(MAX_VALUE));
        value
    };
    ours.take(MAX_ANNOTATIONS).map(|(key, value)| (key, cut(value))).collect()
}

impl Seen {
    /// Of what the API says.
    #[must_use]
    pub fn of(object: PodObject) -> Option<Seen> {
        let meta = object.metadata;
        if meta.uid.is_empty() || meta.name.is_empty() {
            return None;
        }
        let text = |name: &str| meta.annotations.as_ref().and_then(|all| all.get(name)).cloned();
        let mirror = text(MIRROR).is_some();
        let hash = text(CONFIG_HASH).or_else(|| text(MIRROR)).filter(|hash| hash.len() <= 253);
        let finished = matches!(object.status.phase.as_str(), "Succeeded" | "Failed");
        let owner = meta.owner_references.into_iter().flatten().find(|owner| owner.controller == Some(true));
        Some(Seen {
            owner: owner.map(|owner| owner.kind).filter(|kind| kind.len() <= 63),
            hash,
            mirror,
            ending: !mirror && (finished || meta.deletion_timestamp.is_some()),
            gate: object.spec.readiness_gates.iter().flatten().any(|gate| gate.condition_type == GATE),
            annotations: ours(meta.annotations),
            uid: meta.uid,
            namespace: meta.namespace,
            name: meta.name,
        })
    }
}

impl Store {
    /// A pod as it is.
    pub fn see(&mut self, seen: Seen) {
        if self.pods.len() >= MAX_PODS && !self.pods.contains_key(&seen.uid) {
            return;
        }
        if seen.ending {
            self.end(&seen.uid);
        }
        self.absent.remove(&seen.uid);
        if let Some(hash) = &seen.hash {
            self.absent.remove(hash);
            self.by_hash.insert(hash.clone(), seen.uid.clone());
        }
        self.pods.insert(seen.uid.clone(), seen);
    }

    /// The API has it no more.
    pub fn gone(&mut self, uid: &str) {
        let Some(seen) = self.pods.remove(uid) else { return };
        if let Some(hash) = &seen.hash
            && self.by_hash.get(hash).is_some_and(|of| of == uid)
        {
            self.by_hash.remove(hash);
        }
        if !seen.mirror {
            self.end(uid);
        }
    }

    fn end(&mut self, uid: &str) {
        if self.ended.insert(uid.to_owned()) {
            self.ended_order.push_back(uid.to_owned());
        }
        if self.ended_order.len() > MAX_ENDED
            && let Some(oldest) = self.ended_order.pop_front()
        {
            self.ended.remove(&oldest);
        }
    }

    /// All pods of the node: what was known and is not among them is gone.
    pub fn pods_are(&mut self, all: Vec<Seen>) {
        let there: HashSet<&str> = all.iter().map(|seen| seen.uid.as_str()).collect();
        let gone: Vec<String> =
            self.pods.keys().filter(|uid| !there.contains(uid.as_str())).cloned().collect();
        for uid in gone {
            self.gone(&uid);
        }
        for seen in all {
            self.see(seen);
        }
    }

    /// A pod by what its runtime calls it.
    #[must_use]
    pub fn pod(&self, pod: &PodRef) -> Option<&Seen> {
        let uid = self.by_hash.get(&pod.uid).unwrap_or(&pod.uid);
        self.pods.get(uid)
    }

    /// Whether a pod lives, at `now`.
    pub fn fate(&mut self, pod: &PodRef, now: Instant) -> Fate {
        if let Some(seen) = self.pod(pod) {
            return if seen.ending { Fate::Ended } else { Fate::Lives };
        }
        if self.ended.contains(&pod.uid) {
            return Fate::Ended;
        }
        if !self.health.get("pods").is_some_and(|health| health.current) {
            // It may have come and gone meanwhile: what is counted begins anew with the next list.
            self.absent.remove(&pod.uid);
            return Fate::Unknown;
        }
        if self.absent.len() >= MAX_PODS && !self.absent.contains_key(&pod.uid) {
            return Fate::Unknown;
        }
        let since = self.absent.entry(pod.uid.clone()).or_insert(now);
        if now.saturating_duration_since(*since) < ABSENT_FOR {
            return Fate::Unknown;
        }
        self.end(&pod.uid);
        self.absent.remove(&pod.uid);
        Fate::Ended
    }

    /// A namespace as it is.
    pub fn see_namespace(&mut self, object: NamespaceObject) -> bool {
        let name = object.metadata.name;
        let fits = self.namespaces.len() < MAX_NAMESPACES || self.namespaces.contains_key(&name);
        if name.is_empty() || !fits {
            return false;
        }
        let now = ours(object.metadata.annotations);
        self.namespaces.insert(name, now.clone()).is_none_or(|before| before != now)
    }

    /// It is no more.
    pub fn namespace_gone(&mut self, name: &str) -> bool {
        self.namespaces.remove(name).is_some()
    }

    /// All namespaces.
    pub fn namespaces_are(&mut self, all: Vec<NamespaceObject>) {
        self.namespaces.clear();
        for one in all {
            self.see_namespace(one);
        }
    }

    /// What a namespace says, `None` while nobody knows.
    #[must_use]
    pub fn namespace(&self, name: &str) -> Option<&Annotations> {
        self.namespaces.get(name)
    }

    /// For the disk.
    #[must_use]
    pub fn remembered(&self) -> Vec<u8> {
        let namespaces = self.namespaces.iter().map(|(name, all)| (name.clone(), all.clone())).collect();
        serde_json::to_vec(&Recalled { namespaces }).unwrap_or_default()
    }

    /// From the disk, until the API says otherwise. A file that cannot be read is as none.
    pub fn recall(&mut self, bytes: Option<&[u8]>) {
        let recalled = bytes.and_then(|bytes| serde_json::from_slice::<Recalled>(bytes).ok());
        for (name, all) in recalled.into_iter().flat_map(|recalled| recalled.namespaces).take(MAX_NAMESPACES)
        {
            self.namespaces.insert(name, ours(Some(all)));
        }
    }

    /// A list of `what` is known and watched.
    pub fn works(&mut self, what: &'static str) {
        let health = self.health.entry(what).or_insert_with(|| Health::new(what));
        (health.current, health.known) = (true, true);
        health.sentence.clear();
    }

    /// Something asked of the API for `what` failed: true when the log is to be told at `now`.
    pub fn fails(&mut self, what: &'static str, sentence: String, now: Instant) -> bool {
        let health = self.health.entry(what).or_insert_with(|| Health::new(what));
        health.current = false;
        health.failures += 1;
        health.sentence = sentence;
        let lately = |at: &Instant| now.saturating_duration_since(*at) < LOG_EVERY;
        if self.logged.get(what).is_some_and(lately) {
            return false;
        }
        self.logged.insert(what, now);
        true
    }

    /// How everything goes.
    #[must_use]
    pub fn health(&self) -> Vec<Health> {
        self.health.values().cloned().collect()
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
