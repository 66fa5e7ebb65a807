//! A list, and from there what changes; begun anew when the server has forgotten where that was (410).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use tokio::sync::Notify;

use super::api::{Failure, WATCH_SECONDS};
use super::object::{List, Meta, NamespaceObject, PodObject, Status};
use super::store::Seen;
use super::{Cluster, pause};

/// Objects of one page of a list.
const PAGE: usize = 500;
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

trait Object: DeserializeOwned {
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

/// This node's pods, for ever.
pub(super) async fn pods(cluster: Cluster) {
    let path = format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{}", cluster.inner.node);
    follow::<PodObject>(&cluster, "pods", &path, |change| {
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
    follow::<NamespaceObject>(&cluster, "namespaces", "/api/v1/namespaces?", |change| {
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

async fn follow<T: Object>(cluster: &Cluster, what: &'static str, path: &str, apply: impl Fn(Change<T>)) {
    let mut version: Option<String> = None;
    let mut failures = 0;
    loop {
        let ended = match &mut version {
            None => match list::<T>(cluster, what, path, "application/json").await {
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
            Some(at) => watch::<T>(cluster, what, path, at, &apply, &mut failures).await,
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

async fn list<T: Object>(
    cluster: &Cluster,
    what: &'static str,
    path: &str,
    accept: &'static str,
) -> Result<(Vec<T>, String), Failure> {
    let mut all = Vec::new();
    let mut next: Option<String> = None;
    loop {
        let mut page = format!("{path}&limit={PAGE}");
        if let Some(next) = &next {
            page.push_str("&continue=");
            page.extend(next.bytes().map(|b| {
                if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02X}") }
            }));
        }
        let list: List = cluster.api().get_as(&format!("list {what}"), &page, accept).await?;
        // One that is odd costs no other.
        all.extend(
            list.items.into_iter().flatten().filter_map(|item| serde_json::from_value::<T>(item).ok()),
        );
        all.truncate(MAX_OBJECTS);
        next = list.metadata.next.filter(|next| !next.is_empty());
        if next.is_none() || all.len() >= MAX_OBJECTS {
            return Ok((all, list.metadata.resource_version));
        }
    }
}

async fn watch<T: Object>(
    cluster: &Cluster,
    what: &'static str,
    path: &str,
    version: &mut String,
    apply: &impl Fn(Change<T>),
    failures: &mut u32,
) -> Ended {
    let path = format!(
        "{path}&watch=1&allowWatchBookmarks=true&timeoutSeconds={WATCH_SECONDS}&resourceVersion={version}"
    );
    let mut lines = match cluster.api().watch(&format!("watch {what}"), &path).await {
        Ok(lines) => lines,
        Err(Failure::Gone) => return Ended::Forgotten,
        Err(failure) => return Ended::Failed(failure),
    };
    cluster.works(what);
    let (mut odd, mut heard) = (0, false);
    loop {
        let event = match lines.next(&mut odd).await {
            Ok(Some(event)) => event,
            // One that ends before it has said anything is not asked again at once.
            Ok(None) if heard => return Ended::Quietly,
            Ok(None) => {
                *failures += 1;
                tokio::time::sleep(pause(*failures - 1, random())).await;
                return Ended::Quietly;
            }
            Err(failure) => return Ended::Failed(failure),
        };
        heard = true;
        *failures = 0;
        if event.kind == "ERROR" {
            let status: Status = serde_json::from_value(event.object).unwrap_or_default();
            return match status.code {
                410 => Ended::Forgotten,
                code => Ended::Failed(Failure::Passing(format!("the watch of {what} ended: {code}"))),
            };
        }
        let Ok(object) = serde_json::from_value::<T>(event.object) else { continue };
        if !object.meta().resource_version.is_empty() {
            version.clone_from(&object.meta().resource_version);
        }
        match event.kind.as_str() {
            "ADDED" | "MODIFIED" => apply(Change::Is(object)),
            "DELETED" => apply(Change::Gone(object)),
            _ => {}
        }
    }
}

/// Names, annotations and owners, and nothing else.
const METADATA: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json";

impl Cluster {
    /// Every pod of the cluster, as it is now.
    ///
    /// # Errors
    /// [`Failure`]; also where there are too many to be sure of all.
    pub async fn all_pods(&self) -> Result<Vec<Seen>, Failure> {
        let (all, _) = list::<PodObject>(self, "pods", "/api/v1/pods?", METADATA).await?;
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
