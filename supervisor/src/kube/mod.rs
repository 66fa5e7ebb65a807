//! The API server, as far as a node's supervisor needs it: what is known of this node's pods and of namespaces,
//! kept up by watches. Without it pods join by the configuration and by annotations that come with the CNI call.
//!
//! Nothing here is waited for by the table: it asks what is known now. What an API server that is away, slow or
//! unwilling costs is said in [`Health`], and facts that were known stay known.

mod api;
mod bounded;
mod collect;
mod object;
mod store;
mod tell;
mod watch;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use podtether_proto::engine::PodRef;
use podtether_proto::node::{Attached, CniError};
use tokio::sync::Notify;

pub use api::{Api, Failure, own_namespace};
pub use object::{NamespaceObject, PodObject};
pub use store::{Fate, Health, Seen, Store};

use crate::choose::Annotations;
use crate::config::Node;
use crate::table::Handle;

/// ADDs that failed and were not told yet.
const MAX_FAILED_ADDS: usize = 256;

/// Cloneable access to what is known.
#[derive(Debug, Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Mutex<Store>,
    /// Something became known.
    news: Notify,
    api: Api,
    node: String,
    descriptions: Vec<prometheus::core::Desc>,
    /// Somebody has something to tell the cluster.
    nudge: Notify,
    failed_adds: Mutex<VecDeque<tell::FailedAdd>>,
}

impl Cluster {
    /// Starts to watch; `None` without `node.name`. What namespaces said when the last supervisor ended is read
    /// from `state_dir`.
    ///
    /// # Errors
    /// The service account or its roots cannot be used.
    pub fn start(node: &Node) -> Result<Option<Cluster>, String> {
        let Some(name) = node.name.clone() else { return Ok(None) };
        let api = Api::new(node)?;
        let mut store = Store::default();
        let file = node.state_dir.join("namespaces.json");
        store.recall(std::fs::read(&file).ok().as_deref());
        let inner = Inner {
            store: Mutex::new(store),
            news: Notify::new(),
            api,
            node: name,
            descriptions: collect::descriptions(),
            nudge: Notify::new(),
            failed_adds: Mutex::default(),
        };
        let cluster = Cluster { inner: Arc::new(inner) };
        tokio::spawn(watch::pods(cluster.clone()));
        tokio::spawn(watch::namespaces(cluster.clone(), file));
        Ok(Some(cluster))
    }

    /// Works on what is known; never across a wait.
    fn with<T>(&self, work: impl FnOnce(&mut Store) -> T) -> T {
        work(&mut self.inner.store.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The API.
    #[must_use]
    pub fn api(&self) -> &Api {
        &self.inner.api
    }

    /// Waits until `of` finds something, until `deadline` at most.
    async fn wait<T>(&self, deadline: Instant, of: impl Fn(&Store) -> Option<T>) -> Option<T> {
        loop {
            let news = self.inner.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            if let Some(found) = self.with(|store| of(store)) {
                return Some(found);
            }
            if tokio::time::timeout_at(deadline.into(), news).await.is_err() {
                return None;
            }
        }
    }

    /// What is known of a pod, if that comes before `deadline`.
    pub async fn pod(&self, pod: &PodRef, deadline: Instant) -> Option<Seen> {
        self.wait(deadline, |store| store.pod(pod).cloned()).await
    }

    /// The annotations of a namespace, if they are known before `deadline`.
    pub async fn namespace(&self, name: &str, deadline: Instant) -> Option<Annotations> {
        self.wait(deadline, |store| store.namespace(name).cloned()).await
    }

    /// Kind of the pod's controller, if that is known.
    #[must_use]
    pub fn owner(&self, pod: &PodRef) -> Option<String> {
        self.with(|store| store.pod(pod).and_then(|seen| seen.owner.clone()))
    }

    /// Whether a pod lives.
    #[must_use]
    pub fn fate(&self, pod: &PodRef) -> Fate {
        self.with(|store| store.fate(pod, Instant::now()))
    }

    /// How the watches are.
    #[must_use]
    pub fn health(&self) -> Vec<Health> {
        self.with(|store| store.health())
    }

    /// Why nothing is known, in a sentence.
    #[must_use]
    pub fn complaint(&self) -> String {
        let told = self.health().into_iter().find(|health| !health.sentence.is_empty());
        told.map_or_else(|| "the API server has not told it yet".to_owned(), |health| health.sentence)
    }

    /// Tells the cluster of `table`'s pods from now on.
    pub fn tell_of(&self, table: Handle) {
        tokio::spawn(tell::run(self.clone(), table));
    }

    /// An ADD was answered: who tells the cluster looks at once.
    pub fn answered(&self, pod: &PodRef, answer: &Result<Attached, CniError>) {
        if let Err(error) = answer {
            let mut failed = self.inner.failed_adds.lock().unwrap_or_else(PoisonError::into_inner);
            // What a pod's last try came to is what counts.
            failed.retain(|other| other.pod.uid != pod.uid);
            if failed.len() < MAX_FAILED_ADDS {
                failed.push_back(tell::FailedAdd { pod: pod.clone(), error: error.clone() });
            }
        }
        self.inner.nudge.notify_one();
    }

    fn take_failed_adds(&self) -> Vec<tell::FailedAdd> {
        let mut failed = self.inner.failed_adds.lock().unwrap_or_else(PoisonError::into_inner);
        failed.drain(..).collect()
    }

    fn news(&self, change: impl FnOnce(&mut Store)) {
        self.with(change);
        self.inner.news.notify_waiters();
    }
}

/// A time as Kubernetes writes it.
fn rfc3339(unix_s: i64) -> String {
    podtether_core::tailcfg::UnixTime::from_secs(unix_s).to_string()
}

/// How long to wait before the next try after so many that failed.
fn pause(failures: u32, random: u64) -> Duration {
    const FIRST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(30);
    crate::restart::jittered(FIRST.saturating_mul(1 << failures.min(8)).min(LONGEST), random)
}
