//! Devices whose pods are no more and whose node did not say so: its disk went, or the node did.
//!
//! What may go is a pure decision, made of what only a device of ours can be altogether: it runs our engine (or
//! joined with a key such as only a supervisor mints, where an API does not tell what a device runs), has
//! tags that pods of this cluster are given and no other, is called as this cluster's pods are, is none of this
//! node's, has the name of no living pod, and has been away for long. Whatever cannot be told stays.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use podtether_core::tailcfg::UnixTime;
use podtether_proto::node::{Cleanup, Ghost};

use crate::choose::PREFIX;
use crate::config::{Config, Tailnet};
use crate::context::Context;
use crate::credentials::{Device, Listed};
use crate::hostname::{self, Whose};
use crate::kube::Cluster;
use crate::restart::jittered;
use crate::table::Handle;

/// A device that was away for less may come back.
const AWAY_FOR: Duration = Duration::from_secs(3600);
/// Devices that one run deletes.
const MAX_DELETED: usize = 100;
/// How long the API may take for one of its answers.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// From the start to the first run, before jitter.
const FIRST_AFTER: Duration = Duration::from_secs(120);
/// Between two runs, before jitter.
const EVERY: Duration = Duration::from_secs(3600);
/// In the version of whoever runs our engine.
const OUR_ENGINE: &str = "podtether";

/// What devices of one tailnet are compared with.
#[derive(Debug)]
struct Known<'a> {
    config: &'a Config,
    tailnet: &'a Tailnet,
    /// What names of this cluster's pods begin with.
    prefix: &'a str,
    /// This node's devices.
    own: &'a [Device],
    /// Names that living pods may have.
    living: &'a HashSet<String>,
    now: UnixTime,
}

/// Why a device stays; `None` for one that may go.
fn stays(device: &Listed, known: &Known<'_>) -> Option<&'static str> {
    let name = device.name.split('.').next().unwrap_or_default();
    let is_own = |own: &Device| {
        own.node_key == device.node_key
            || own.machine_key == device.machine_key
            || (!own.stable_id.is_empty() && own.stable_id == device.stable_id)
    };
    let is_ours = device.version.contains(OUR_ENGINE) || (device.version.is_empty() && device.is_minted);
    if !is_ours {
        return Some("it runs another client");
    }
    if device.tags.is_empty() || !device.tags.iter().all(|tag| may_be_given(tag, known)) {
        return Some("its tags are not those of this cluster's pods");
    }
    if !device.hostname.starts_with(known.prefix) {
        return Some("it is not called as this cluster's pods are");
    }
    if known.own.iter().any(is_own) {
        return Some("it is a pod's of this node");
    }
    if known.living.contains(&device.hostname) || known.living.contains(name) {
        return Some("a pod that lives has its name");
    }
    let Some(seen) = device.last_seen.filter(|_| !device.online) else {
        return Some("it is online");
    };
    let away = known.now.as_millis().saturating_sub(seen.as_millis());
    if i128::from(away) < i128::try_from(AWAY_FOR.as_millis()).unwrap_or(i128::MAX) {
        return Some("it was there within the last hour");
    }
    None
}

/// Whether a pod of this cluster may have this tag.
fn may_be_given(tag: &str, known: &Known<'_>) -> bool {
    let granted = known.config.namespaces.values().any(|grant| grant.has_tag_anywhere(tag));
    known.tailnet.tags.iter().any(|own| own == tag)
        || granted
        || (known.tailnet.namespace_tag && tag.starts_with("tag:ns-"))
}

/// What every name of this cluster's pods begins with; `None` where that is nothing of its own.
fn prefix(template: &str, cluster: &str) -> Option<String> {
    if !template.starts_with("{cluster}-") {
        return None;
    }
    let whose = Whose { cluster, namespace: "", pod: "", owner: None };
    Some(format!("{}-", hostname::render("{cluster}", whose)))
}

/// Names that a pod may have in a tailnet.
fn names_of(pod: &crate::kube::Seen, tailnet: &Tailnet, cluster: &str) -> Vec<String> {
    let whose = Whose { cluster, namespace: &pod.namespace, pod: &pod.name, owner: pod.owner.as_deref() };
    let annotated = pod.annotations.get(&format!("{PREFIX}hostname"));
    let templates = [Some(&tailnet.hostname_template), annotated];
    let mut names: Vec<String> =
        templates.into_iter().flatten().flat_map(|template| hostname::names(template, whose).all()).collect();
    let told = pod.annotations.get("podtether.dev/name").and_then(|name| name.split('.').next());
    names.extend(told.map(str::to_owned));
    names
}

/// Looks once, and deletes what may go unless `dry_run`.
pub async fn clean(context: &Context, cluster: &Cluster, table: &Handle, dry_run: bool) -> Cleanup {
    let mut done = Cleanup::default();
    let own = table.devices().await;
    let config = &context.config;
    for (key, tailnet) in &config.tailnets {
        let Some(credential) = context.credentials.get(key).filter(|c| c.deletes_devices()) else {
            done.notes.push(format!("tailnet {key}: its credential can neither list nor delete devices"));
            continue;
        };
        let Some(prefix) = prefix(&tailnet.hostname_template, &config.node.cluster_name) else {
            done.notes.push(format!(
                "tailnet {key}: without {{cluster}}- at the start of hostname_template another cluster's devices \
                 cannot be told from this one's"
            ));
            continue;
        };
        let devices = match credential.devices(Instant::now() + ANSWER_WITHIN).await {
            Ok(devices) => devices,
            Err(e) => {
                done.notes.push(format!("tailnet {key}: {e}"));
                continue;
            }
        };
        let nobody = HashSet::new();
        let known = |living| Known {
            config,
            tailnet,
            prefix: &prefix,
            own: &own,
            living,
            now: crate::credentials::wall_clock(),
        };
        let at_first = known(&nobody);
        if !devices.iter().any(|device| stays(device, &at_first).is_none()) {
            continue;
        }
        // Only now: a large cluster's list costs its API server something.
        let pods = match cluster.all_pods().await {
            Ok(pods) if pods.is_empty() => {
                done.notes
                    .push("the API server lists no pod at all, which cannot be: nothing is removed".into());
                continue;
            }
            Ok(pods) => pods,
            Err(e) => {
                done.notes.push(format!("tailnet {key}: nothing is removed: {e}"));
                continue;
            }
        };
        let living = pods.iter().flat_map(|pod| names_of(pod, tailnet, &config.node.cluster_name)).collect();
        let known = known(&living);
        let ghosts = devices.iter().filter(|device| stays(device, &known).is_none());
        for device in ghosts.take(MAX_DELETED) {
            let mut ghost = Ghost { tailnet: key.clone(), name: device.name.clone(), deleted: false };
            if !dry_run {
                match credential.delete_device(&device.device(), Instant::now() + ANSWER_WITHIN).await {
                    Ok(()) => ghost.deleted = true,
                    Err(e) => done.notes.push(format!("{}: {e}", device.name)),
                }
                tracing::info!(
                    tailnet = key,
                    device = device.name,
                    deleted = ghost.deleted,
                    "no pod has this device"
                );
            }
            done.ghosts.push(ghost);
        }
    }
    done
}

/// Cleans up some time after the start, and hourly, for ever.
pub async fn run(context: std::sync::Arc<Context>, cluster: Cluster, table: Handle) {
    let random = || getrandom::u64().unwrap_or_default();
    let mut pause = jittered(FIRST_AFTER, random());
    loop {
        tokio::time::sleep(pause).await;
        let done = clean(&context, &cluster, &table, false).await;
        for note in done.notes {
            tracing::debug!("clean-up: {note}");
        }
        // Every node does this, and no two at a time.
        pause = jittered(EVERY, random());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Inputs;

    const NOW: i64 = 1_800_000_000;

    fn ghost() -> Listed {
        Listed {
            id: "1".into(),
            name: "k8s-shop-web-0.tail.example".into(),
            hostname: "k8s-shop-web-0".into(),
            tags: vec!["tag:k8s-pod".into()],
            version: "0.1.0-podtether".into(),
            is_minted: false,
            machine_key: "mkey:a".into(),
            node_key: "nodekey:a".into(),
            stable_id: "nA".into(),
            online: false,
            last_seen: Some(UnixTime::from_secs(NOW - 3600)),
        }
    }

    #[test]
    fn only_what_can_be_nothing_else_goes() {
        let file = "[tailnet.default]\ntags = [\"tag:k8s-pod\"]\nnamespace_tag = true\n[tailnet.default.credentials]\n\
                    kind = \"oauth\"\nclient_id_file = \"/a\"\nclient_secret_file = \"/b\"\n[namespace.shop]\n\
                    tags = [\"tag:{namespace}-*\"]";
        let inputs = Inputs { file: Some(file.into()), ..Inputs::default() };
        let config = Config::load(&inputs).unwrap();
        let own =
            Device { node_key: "nodekey:o".into(), machine_key: "mkey:o".into(), stable_id: "nO".into() };
        let living = HashSet::from(["k8s-shop-db-0".to_owned()]);
        let known = Known {
            config: &config,
            tailnet: &config.tailnets["default"],
            prefix: "k8s-",
            own: &[own],
            living: &living,
            now: UnixTime::from_secs(NOW),
        };
        let tags = |tags: &[&str]| tags.iter().map(|tag| (*tag).to_owned()).collect::<Vec<_>>();
        let table = [
            (ghost(), true),
            (Listed { tags: tags(&["tag:k8s-pod", "tag:ns-shop", "tag:shop-a"]), ..ghost() }, true),
            (Listed { version: "1.90.6-t2b1c5f4a6".into(), ..ghost() }, false),
            (Listed { version: String::new(), ..ghost() }, false),
            (Listed { version: String::new(), is_minted: true, ..ghost() }, true),
            (Listed { version: "1.90.6".into(), is_minted: true, ..ghost() }, false),
            (Listed { tags: vec![], ..ghost() }, false),
            (Listed { tags: tags(&["tag:k8s-pod", "tag:admin"]), ..ghost() }, false),
            (Listed { hostname: "prod-shop-web-0".into(), ..ghost() }, false),
            (Listed { hostname: "k8s".into(), ..ghost() }, false),
            (Listed { machine_key: "mkey:o".into(), ..ghost() }, false),
            (Listed { node_key: "nodekey:o".into(), ..ghost() }, false),
            (Listed { stable_id: "nO".into(), ..ghost() }, false),
            (Listed { hostname: "k8s-shop-db-0".into(), ..ghost() }, false),
            (Listed { name: "k8s-shop-db-0.tail.example".into(), ..ghost() }, false),
            (Listed { online: true, ..ghost() }, false),
            (Listed { last_seen: None, ..ghost() }, false),
            (Listed { last_seen: Some(UnixTime::from_secs(NOW - 3599)), ..ghost() }, false),
            (Listed { last_seen: Some(UnixTime::from_secs(NOW + 9999)), ..ghost() }, false),
        ];
        for (device, goes) in table {
            let why = stays(&device, &known);
            assert_eq!(why.is_none(), goes, "{device:?}: {why:?}");
        }
    }

    #[test]
    fn clusters_are_told_apart_by_their_names() {
        assert_eq!(prefix("{cluster}-{namespace}-{pod}", "Prod_1").as_deref(), Some("prod-1-"));
        assert_eq!(prefix("{namespace}-{pod}", "k8s"), None);
        assert_eq!(prefix("{cluster}{pod}", "k8s"), None);
    }
}
