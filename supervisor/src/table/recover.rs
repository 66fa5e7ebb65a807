//! Start: every record becomes a pod again, and what no record names goes.

use std::collections::{BTreeMap, HashMap, HashSet};

use podtether_net::netns;
use podtether_proto::node::AttachmentId;

use super::Table;
use super::identities::Identity;
use super::pod::Pod;
use crate::adopt;
use crate::engine::Home;
use crate::plan::{Link, Wanted};
use crate::record::{self, Aside, IdentityKey};
use crate::refused::{Reason, Refused};
use crate::restart::Cause;

/// Files that one line names.
const NAMED: usize = 8;

/// Counts what was put aside, and tells of all that is aside in one line per kind.
fn tell_asides(refused: &Refused, asides: &[Aside]) {
    let mut kinds: BTreeMap<Option<&'static str>, Vec<&Aside>> = BTreeMap::new();
    for aside in asides {
        kinds.entry(aside.found).or_default().push(aside);
    }
    for (kind, asides) in kinds {
        let named = asides.iter().take(NAMED).map(|a| format!("{} ({})", a.path.display(), a.reason));
        let mut files: Vec<String> = named.collect();
        if asides.len() > NAMED {
            files.push(format!("and {} more", asides.len() - NAMED));
        }
        let count = u64::try_from(asides.len()).unwrap_or(u64::MAX);
        let what = format!(
            "records were not loaded and are kept aside, and the devices of pods that no record names stay in \
             the tailnet until somebody removes these files: {}",
            files.join(", ")
        );
        match kind {
            Some(kind) => refused.add(Reason::of_record(kind), count, &what),
            None => tracing::warn!(count, "{what}"),
        }
    }
}

impl Table {
    pub(super) async fn recover(&mut self) -> Result<(), String> {
        let context = self.context.clone();
        let (attachments, identities, asides) = tokio::task::spawn_blocking(move || {
            let (attachments, mut asides) = context.store.load::<record::Attachment>()?;
            let (identities, more) = context.store.load::<record::Identity>()?;
            asides.extend(more);
            Ok::<_, record::StoreError>((attachments, identities, asides))
        })
        .await
        .map_err(|e| e.to_string())?
        .map_err(|e| e.to_string())?;
        tell_asides(&self.counters.refused, &asides);
        let keep_unclaimed = !asides.is_empty();
        self.asides = asides;
        self.remove_leftovers(&attachments).await;

        let mut by_id: HashMap<String, IdentityKey> = HashMap::new();
        for record in identities {
            by_id.insert(record.id.clone(), record.key.clone());
            self.identities.insert(record.key.clone(), Identity::loaded(record));
        }
        for record in attachments {
            self.recover_attachment(record, &by_id);
        }
        let used: HashSet<IdentityKey> = self.pods.values().map(|p| p.identity.clone()).collect();
        let keep_until = self.keep_vanished_until();
        for (key, identity) in &mut self.identities {
            if !used.contains(key) {
                identity.record.keep_until_unix_s.get_or_insert(keep_until);
                // A damaged attachment may be its user.
                identity.frozen = keep_unclaimed;
            }
        }
        let others =
            self.pods.values().filter(|pod| pod.record.uid != self.context.uid(pod.record.slot)).count();
        if others > 0 {
            tracing::warn!(
                pods = others,
                uid_base = self.context.config.node.uid_base,
                "engines run under other uids than node.uid_base gives now: each keeps its own until it is \
                 restarted (podtether restart --engine)"
            );
        }
        let ids: Vec<_> = self.pods.keys().cloned().collect();
        if !ids.is_empty() {
            tracing::info!(pods = ids.len(), "taking up the pods of an earlier supervisor");
        }
        for id in ids {
            self.advance(&id);
        }
        Ok(())
    }

    fn recover_attachment(&mut self, record: record::Attachment, by_id: &HashMap<String, IdentityKey>) {
        let id = record.attachment.clone();
        let finished = !record.addresses.is_empty() || record.unhurried;
        if let Some(key) = by_id.get(&record.identity) {
            let mut pod = Pod::new(record, key.clone(), true);
            if finished {
                pod.link = Link::Unknown;
                pod.reason = "the supervisor was restarted".into();
            } else {
                // Nobody waits for this ADD any more: the runtime saw it fail.
                pod.wanted = Wanted::Gone { logout: true };
                pod.link = Link::Broken;
                pod.key_given = true;
            }
            self.left_behind(id, pod);
            return;
        }
        // Without its keys it cannot run; its link stays until DEL, so that nothing else breaks.
        let key = IdentityKey {
            tailnet: record.tailnet.clone(),
            pod_uid: record.pod.uid.clone(),
            ifname: record.attachment.ifname.clone(),
        };
        if !self.identities.contains_key(&key) {
            match Identity::new(key.clone(), record.pod.clone()) {
                Ok(identity) => self.identities.insert(key.clone(), Identity { saved: 1, ..identity }),
                Err(e) => {
                    tracing::error!("no random bytes: {e}");
                    return;
                }
            };
        }
        let mut pod = Pod::new(record, key, true);
        pod.link = Link::Up;
        pod.stopped = Some("the record of its identity is damaged or missing; delete the pod".into());
        pod.reason.clone_from(pod.stopped.as_ref().unwrap_or(&String::new()));
        self.left_behind(id, pod);
    }

    /// A pod of an earlier supervisor, whose engine may live.
    fn left_behind(&mut self, id: AttachmentId, mut pod: Pod) {
        pod.unseen = true;
        if let Some(identity) = self.identities.get_mut(&pod.identity) {
            identity.unseen += 1;
        }
        self.pods.insert(id, pod);
    }

    /// Engines, namespaces and directories that no record names.
    async fn remove_leftovers(&self, attachments: &[record::Attachment]) {
        let known: HashSet<&str> = attachments.iter().map(|a| a.id.as_str()).collect();
        let unknown = |dir: std::path::PathBuf| -> Vec<std::path::PathBuf> {
            let Ok(entries) = std::fs::read_dir(&dir) else { return Vec::new() };
            entries
                .flatten()
                .filter(|e| e.file_name().to_str().is_none_or(|name| !known.contains(name)))
                .map(|e| e.path())
                .collect()
        };
        let run_dir = &self.context.config.node.run_dir;
        let homes = unknown(run_dir.join("engines"));
        // First: they hold what is removed after.
        let ended = adopt::end_left_behind(&homes).await;
        if !ended.is_empty() {
            let count = u64::try_from(ended.len()).unwrap_or(u64::MAX);
            self.counters.engine_exits.with_label_values(&[Cause::NoRecord.name()]).inc_by(count);
            tracing::warn!(
                count,
                pids = ?ended.iter().take(NAMED).collect::<Vec<_>>(),
                kind = Cause::NoRecord.name(),
                "engines were killed that no record names: their pods are not known here"
            );
        }
        for e in self.context.cgroups.remove_unknown(&known) {
            tracing::warn!("{e}");
        }
        for pin in unknown(self.context.netns_dir()) {
            tracing::info!(pin = %pin.display(), "removing a link namespace without a record");
            if let Err(e) = netns::unpin(&pin) {
                tracing::warn!("{e}");
            }
        }
        for dir in homes {
            if let Some(id) = dir.file_name().and_then(|n| n.to_str())
                && let Err(e) = Home::remove(run_dir, id)
            {
                tracing::warn!("cannot remove {}: {e}", dir.display());
            }
        }
    }
}
