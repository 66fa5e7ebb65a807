//! A list, and from there what changes; begun anew when the server has forgotten where that was (410).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::{ObjectList, Request};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;

use super::api::{Failure, WATCH_SECONDS, WATCH_WITHIN, failure, refused};
use super::object::{Meta, NamespaceObject, Odd, PodObject};
use super::store::Seen;
use super::{Cluster, pause};

/// Whole objects of one page of a list; of what has metadata alone there are [`METADATA_PAGE`].
const PAGE: u32 = 100;
const METADATA_PAGE: u32 = 500;
/// What a list may come to.
const MAX_OBJECTS: usize = 70_000;
/// What changed is on disk after this.
const SAVE_AFTER: Duration = Duration::from_secs(1);

/// What a watch tells.
enum Change<T> {
    All(Vec<T>),
    Is(T),
    Gone(T),
}

trait Object: DeserializeOwned + Default + Clone + Send + 'static {
    fn meta(&self) -> &Meta;
}

impl Object for PodObject {
    fn meta(&self) -> &Meta {
        &self.metadata
    }
}

impl Object for NamespaceObject {
    fn meta(&self) -> &Meta {
        &self.metadata
    }
}

/// What is listed and watched.
struct Wanted {
    /// For sentences: `pods`, `namespaces`.
    what: &'static str,
    path: &'static str,
    /// Of `spec.nodeName`.
    node: Option<String>,
    /// Names, annotations and owners, and nothing else.
    metadata_only: bool,
}

impl Wanted {
    fn page(&self, next: Option<&str>) -> Result<http::Request<Vec<u8>>, kube::core::request::Error> {
        let limit = if self.metadata_only { METADATA_PAGE } else { PAGE };
        let mut params = ListParams::default().limit(limit);
        params.field_selector = self.selector();
        params.continue_token = next.map(str::to_owned);
        let request = Request::new(self.path);
        if self.metadata_only { request.list_metadata(&params) } else { request.list(&params) }
    }

    fn changes(&self, version: &str) -> Result<http::Request<Vec<u8>>, kube::core::request::Error> {
        let mut params = WatchParams::default().timeout(WATCH_SECONDS);
        params.field_selector = self.selector();
        let request = Request::new(self.path);
        if self.metadata_only {
            request.watch_metadata(&params, version)
        } else {
            request.watch(&params, version)
        }
    }

    fn selector(&self) -> Option<String> {
        self.node.as_ref().map(|node| format!("spec.nodeName={node}"))
    }
}

/// This node's pods, for ever.
pub(super) async fn pods(cluster: Cluster) {
    let node = Some(cluster.inner.node.clone());
    let wanted = Wanted { what: "pods", path: "/api/v1/pods", node, metadata_only: false };
    follow::<PodObject>(&cluster, &wanted, |change| {
        cluster.news(|store| match change {
            Change::All(all) => store.pods_are(all.into_iter().filter_map(Seen::of).collect()),
            Change::Is(object) => {
                if let Some(seen) = Seen::of(object) {
                    store.see(seen);
                }
            }
            Change::Gone(object) => store.gone(&object.metadata.uid),
        });
    })
    .await;
}

/// All namespaces, for ever; `file` holds them for the next supervisor.
pub(super) async fn namespaces(cluster: Cluster, file: PathBuf) {
    let dirty = Arc::new(Notify::new());
    tokio::spawn(save(cluster.clone(), file, Arc::clone(&dirty)));
    let wanted = Wanted { what: "namespaces", path: "/api/v1/namespaces", node: None, metadata_only: true };
    follow::<NamespaceObject>(&cluster, &wanted, |change| {
        let mut changed = true;
        cluster.news(|store| match change {
            Change::All(all) => store.namespaces_are(all),
            Change::Is(object) => changed = store.see_namespace(object),
            Change::Gone(object) => changed = store.namespace_gone(&object.metadata.name),
        });
        if changed {
            dirty.notify_one();
        }
    })
    .await;
}

async fn save(cluster: Cluster, file: PathBuf, dirty: Arc<Notify>) {
    loop {
        dirty.notified().await;
        tokio::time::sleep(SAVE_AFTER).await;
        let bytes = cluster.with(|store| store.remembered());
        let file = file.clone();
        let written = tokio::task::spawn_blocking(move || {
            let new = file.with_extension("new");
            std::fs::write(&new, bytes)?;
            std::fs::rename(&new, &file)
        });
        // It is a help for a bad day, and told of on no other.
        if let Ok(Err(error)) = written.await {
            tracing::debug!(%error, "what namespaces say is not saved");
        }
    }
}

/// How a watch ended.
enum Ended {
    /// As watches do.
    Quietly,
    /// A list has to come first.
    Forgotten,
    Failed(Failure),
}

impl Ended {
    fn of(failure: Failure) -> Ended {
        if failure == Failure::Gone { Ended::Forgotten } else { Ended::Failed(failure) }
    }
}

async fn follow<T: Object>(cluster: &Cluster, wanted: &Wanted, apply: impl Fn(Change<T>)) {
    let what = wanted.what;
    let mut version: Option<String> = None;
    let mut failures = 0;
    loop {
        let ended = match &mut version {
            None => match list::<T>(cluster, wanted).await {
                Ok((all, at)) => {
                    let count = all.len();
                    apply(Change::All(all));
                    if cluster.works(what) {
                        tracing::info!(count, "the API server's {what} are known");
                    }
                    version = Some(at);
                    failures = 0;
                    continue;
                }
                Err(Failure::Gone) => {
                    Ended::Failed(Failure::Passing(format!("cannot list {what}: too slow")))
                }
                Err(failure) => Ended::Failed(failure),
            },
            Some(at) => watch::<T>(cluster, wanted, at, &apply, &mut failures).await,
        };
        let failure = match ended {
            Ended::Quietly => continue,
            Ended::Forgotten => {
                tracing::debug!("the API server has forgotten where the watch of {what} was");
                version = None;
                // Not at once for ever, should it forget each time.
                failures += 1;
                tokio::time::sleep(pause(failures - 1, random())).await;
                continue;
            }
            Ended::Failed(failure) => failure,
        };
        cluster.fails(what, &failure);
        failures += 1;
        tokio::time::sleep(pause(failures - 1, random())).await;
    }
}

async fn list<T: Object>(cluster: &Cluster, wanted: &Wanted) -> Result<(Vec<T>, String), Failure> {
    let what = format!("list {}", wanted.what);
    let mut all = Vec::new();
    let mut next: Option<String> = None;
    loop {
        let page = cluster.api().ask::<ObjectList<Odd<T>>>(&what, wanted.page(next.as_deref())).await?;
        all.extend(page.items.into_iter().map(|item| item.0));
        all.truncate(MAX_OBJECTS);
        next = page.metadata.continue_.filter(|next| !next.is_empty());
        if next.is_none() || all.len() >= MAX_OBJECTS {
            return Ok((all, page.metadata.resource_version.unwrap_or_default()));
        }
    }
}

/// The kube crate's watcher is not used: it does not tell that a watch is there again after the server was away,
/// asks again at once when a watch ends without a word, and never lists anew when its start is answered with 410.
async fn watch<T: Object>(
    cluster: &Cluster,
    wanted: &Wanted,
    version: &mut String,
    apply: &impl Fn(Change<T>),
    failures: &mut u32,
) -> Ended {
    let what = format!("watch {}", wanted.what);
    let mut events = match cluster.api().watch::<Odd<T>>(&what, wanted.changes(version)).await {
        Ok(events) => events,
        Err(failure) => return Ended::of(failure),
    };
    cluster.works(wanted.what);
    let mut heard = false;
    loop {
        let event = match tokio::time::timeout(WATCH_WITHIN, events.next()).await {
            Ok(Some(Ok(event))) => event,
            // A line that is no event costs no other.
            Ok(Some(Err(kube::Error::SerdeError(_)))) => continue,
            Ok(Some(Err(error))) => {
                return Ended::of(failure(&what, &error));
            }
            // One that ends before it has said anything is not asked again at once.
            Ok(None) | Err(_) if !heard => {
                *failures += 1;
                tokio::time::sleep(pause(*failures - 1, random())).await;
                return Ended::Quietly;
            }
            Ok(None) | Err(_) => return Ended::Quietly,
        };
        heard = true;
        *failures = 0;
        let (at, change) = match event {
            WatchEvent::Added(Odd(object)) | WatchEvent::Modified(Odd(object)) => {
                (object.meta().resource_version.clone(), Some(Change::Is(object)))
            }
            WatchEvent::Deleted(Odd(object)) => {
                (object.meta().resource_version.clone(), Some(Change::Gone(object)))
            }
            WatchEvent::Bookmark(bookmark) => (bookmark.metadata.resource_version, None),
            WatchEvent::Error(status) => {
                return Ended::of(refused(&what, &status));
            }
        };
        if !at.is_empty() {
            *version = at;
        }
        if let Some(change) = change {
            apply(change);
        }
    }
}

impl Cluster {
    /// Every pod of the cluster, as it is now.
    ///
    /// # Errors
    /// [`Failure`]; also where there are too many to be sure of all.
    pub async fn all_pods(&self) -> Result<Vec<Seen>, Failure> {
        let wanted = Wanted { what: "pods", path: "/api/v1/pods", node: None, metadata_only: true };
        let (all, _) = list::<PodObject>(self, &wanted).await?;
        if all.len() >= MAX_OBJECTS {
            return Err(Failure::Passing(format!("there are more than {MAX_OBJECTS} pods")));
        }
        Ok(all.into_iter().filter_map(Seen::of).collect())
    }

    /// True when that is news.
    fn works(&self, what: &'static str) -> bool {
        self.with(|store| {
            let was = store.health().iter().any(|health| health.what == what && health.current);
            store.works(what);
            !was
        })
    }

    /// Told once a minute.
    pub(super) fn fails(&self, what: &'static str, failure: &Failure) {
        let sentence = failure.to_string();
        if self.with(|store| store.fails(what, sentence.clone(), Instant::now())) {
            tracing::warn!("{sentence}; what is known of {what} stays in use");
        }
    }
}

fn random() -> u64 {
    getrandom::u64().unwrap_or_default()
}
