//! Whether a new device got the name that it asked for. Of two that ask for one, wherever they are, the server gives
//! it to one, and numbers the other: only its answer settles that, without a race. Who was numbered asks for a name
//! that tells its pod apart, before the runtime hears that the pod has joined.

use std::time::{Duration, Instant};

use podtether_proto::engine::NodeState;
use podtether_proto::node::{AttachmentId, Choice, Source};

use super::asked::silent;
use super::attach::pod_name;
use super::{MAX_REASON, Message, Table};
use crate::choose::Key;
use crate::distrust::tame;
use crate::engine::{ANSWER_WITHIN, within};
use crate::hostname::numbered;
use crate::plan::Wanted;

/// For a server that takes the other name and does not say so.
const RENAMED_WITHIN: Duration = Duration::from_secs(5);

/// How far that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Naming {
    /// The server has not said yet what the device is called.
    Unknown,
    /// Another name was asked for, and is waited for until then.
    Asked(Instant),
    /// The engine of this epoch cannot ask for another name.
    Kept(u64),
    /// An earlier supervisor, or an engine before this one, may have left it without the name that it should have.
    Loaded,
    /// That name was asked for again; until then the server may still say the one of before. Nobody waits.
    Again(Instant),
    /// It has a name.
    Settled,
}

impl Naming {
    /// Whether the pod's ADD waits for its name.
    pub(super) fn is_open(self, now: Instant) -> bool {
        matches!(self, Naming::Asked(until) if now < until)
    }
}

/// What comes of the name that the server gave.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// It may still change.
    Wait,
    /// It is the device's.
    Settle,
    /// The server is asked for the recorded name once more.
    AskAgain,
    /// Somebody else has the name that was asked for: it is asked for another one.
    AskOther,
}

/// A device that asked for `asked_for`, instead of `taken` where that is not empty, is called `label`.
fn next(naming: Naming, asked_for: &str, taken: &str, label: &str, now: Instant) -> Next {
    let is_waiting = match naming {
        Naming::Settled | Naming::Kept(_) => return Next::Wait,
        // Any other difference is an administrator's wish.
        Naming::Loaded if !taken.is_empty() && label != asked_for && numbered(taken, label) => {
            return Next::AskAgain;
        }
        Naming::Loaded => return Next::Settle,
        Naming::Asked(until) | Naming::Again(until) => now < until,
        Naming::Unknown => false,
    };
    if numbered(asked_for, label) {
        Next::AskOther
    } else if label == asked_for || !is_waiting {
        Next::Settle
    } else {
        Next::Wait
    }
}

impl Table {
    /// Looks at what the server calls the pod's device.
    pub(super) fn settle_name(&mut self, id: &AttachmentId) {
        let now = Instant::now();
        let Some(pod) = self.pods.get_mut(id) else { return };
        if pod.naming == Naming::Settled || pod.wanted != Wanted::Attached {
            return;
        }
        let Some(identity) = self.identities.get_mut(&pod.identity) else { return };
        let Some(engine) = pod.engine.as_ref() else { return };
        let status = engine.status.as_ref().filter(|s| s.control_connected && s.state == NodeState::Running);
        let Some(node) = status.and_then(|status| status.node.as_ref()) else { return };
        if matches!(pod.naming, Naming::Kept(of) if of != engine.epoch) {
            pod.naming = Naming::Loaded;
        }
        let label = node.name.split('.').next().unwrap_or_default();
        let record = &mut identity.record;
        match next(pod.naming, &record.hostname, &record.name_taken, label, now) {
            Next::Wait => {}
            Next::Settle => {
                pod.naming = Naming::Settled;
                if !record.name_taken.is_empty()
                    && tell(&mut pod.record.choice, &record.name_taken, &pod.record.tailnet, label, None)
                {
                    pod.changed();
                }
            }
            Next::AskAgain => {
                pod.naming = Naming::Again(now + RENAMED_WITHIN);
                let name = record.hostname.clone();
                self.rename(id, name);
            }
            Next::AskOther => {
                let asked_for = record.hostname.clone();
                if record.name_taken.is_empty() {
                    record.name_taken.clone_from(&asked_for);
                }
                if record.other_names.is_empty() {
                    pod.naming = Naming::Settled;
                    identity.changed();
                    return;
                }
                let other = record.other_names.remove(0);
                record.hostname.clone_from(&other);
                let told = &mut pod.record.choice;
                if let Some(setting) = told.settings.iter_mut().find(|s| s.name == Key::Hostname.name()) {
                    setting.rule.push_str(&format!("; another device of the tailnet is called {asked_for}"));
                }
                tell(told, &record.name_taken, &pod.record.tailnet, &other, None);
                identity.changed();
                pod.changed();
                let (namespace, name) = (&pod.record.pod.namespace, &pod.record.pod.name);
                tracing::info!(
                    namespace,
                    pod = name,
                    "{asked_for} is taken in the tailnet: it asks for {other}"
                );
                let until = now + RENAMED_WITHIN;
                pod.naming = Naming::Asked(until);
                self.rename(id, other);
                self.wake(id, until);
            }
        }
    }

    fn rename(&self, id: &AttachmentId, hostname: String) {
        let Some(pod) = self.pods.get(id) else { return };
        let Some(engine) = pod.engine.as_ref() else { return };
        let (Some(client), epoch) = (engine.client.clone(), engine.epoch) else { return };
        let (pod, to, of) = (pod_name(&pod.record.pod), self.to_self.clone(), id.clone());
        tokio::spawn(async move {
            let asked = client.rename(within(ANSWER_WITHIN), hostname).await;
            if let Ok(Err(why)) | Err(why) = asked.map_err(|e| silent(&pod, &e).msg) {
                let _ = to.send(Message::NotRenamed(of, epoch, why)).await;
            }
        });
    }

    /// The engine did not ask for the other name: the device keeps the one that the server numbered, and nobody waits
    /// for another, until an engine starts that asks for it from the beginning.
    pub(super) fn not_renamed(&mut self, id: &AttachmentId, epoch: u64, mut why: String) {
        let Some(pod) = self.pods.get_mut(id) else { return };
        let Some(engine) = pod.engine.as_ref().filter(|engine| engine.epoch == epoch) else { return };
        if !matches!(pod.naming, Naming::Asked(_) | Naming::Again(_)) {
            return;
        }
        let Some(identity) = self.identities.get(&pod.identity) else { return };
        let node = engine.status.as_ref().and_then(|status| status.node.as_ref());
        let label = node.map_or("", |node| node.name.split('.').next().unwrap_or_default()).to_owned();
        tame(&mut why, MAX_REASON);
        let (namespace, name) = (&pod.record.pod.namespace, &pod.record.pod.name);
        tracing::warn!(namespace, pod = name, "it stays {label} until its engine is replaced: {why}");
        let kept = format!(
            " until `podtether restart {namespace}/{name}` brings an engine that asks for {}: {why}",
            identity.record.hostname
        );
        let (taken, tailnet) = (&identity.record.name_taken, &pod.record.tailnet);
        tell(&mut pod.record.choice, taken, tailnet, &label, Some(&kept));
        pod.naming = Naming::Kept(epoch);
        pod.changed();
    }
}

/// Puts into what is told of a pod that its device is `called` so, because another one has the name that was `taken`;
/// `kept` says why it is not called what it should be. Whether that is news.
fn tell(told: &mut Choice, taken: &str, tailnet: &str, called: &str, kept: Option<&str>) -> bool {
    let before = told.clone();
    let begin =
        format!("host name {taken} is taken by another device of tailnet {tailnet}, so this one is called ");
    told.notes.retain(|note| !note.starts_with(&begin));
    let Some(setting) = told.settings.iter_mut().find(|s| s.name == Key::Hostname.name()) else {
        return false;
    };
    called.clone_into(&mut setting.value);
    if let Some(kept) = kept {
        told.notes.push(format!("{begin}{called}{kept}"));
    } else if matches!(setting.source, Source::Pod | Source::Namespace) {
        told.notes.push(format!(
            "{begin}{called}: give the pod a name of its own, with {{pod}} in the annotation, or leave it out"
        ));
    }
    *told != before
}

#[cfg(test)]
mod tests {
    use podtether_proto::node::Setting;

    use super::*;

    #[test]
    fn what_comes_of_a_name() {
        let now = Instant::now();
        let (later, past) = (now + RENAMED_WITHIN, now.checked_sub(RENAMED_WITHIN).unwrap());
        let table = [
            ("it has it", Naming::Unknown, "web", "", "web", Next::Settle),
            ("somebody else has it", Naming::Unknown, "web", "", "web-1", Next::AskOther),
            ("an administrator's wish", Naming::Unknown, "web", "", "shop", Next::Settle),
            ("not yet", Naming::Asked(later), "web-x", "web", "web-1", Next::Wait),
            ("renamed", Naming::Asked(later), "web-x", "web", "web-x", Next::Settle),
            ("taken as well", Naming::Asked(later), "web-x", "web", "web-x-1", Next::AskOther),
            ("the server does not say so", Naming::Asked(past), "web-x", "web", "web-1", Next::Settle),
            ("its engine cannot", Naming::Kept(1), "web-x", "web", "web-1", Next::Wait),
            ("an engine or a supervisor later", Naming::Loaded, "web-x", "web", "web-1", Next::AskAgain),
            ("it was started with it", Naming::Loaded, "web-x", "web", "web-x", Next::Settle),
            ("renamed by hand meanwhile", Naming::Loaded, "web-x", "web", "shop", Next::Settle),
            ("there was nothing to ask for", Naming::Loaded, "web", "", "web-1", Next::Settle),
            ("asked again", Naming::Again(later), "web-x", "web", "web-1", Next::Wait),
            ("asked again in vain", Naming::Again(past), "web-x", "web", "web-1", Next::Settle),
            ("done", Naming::Settled, "web-x", "web", "web-x-1", Next::Wait),
        ];
        for (what, naming, asked_for, taken, label, wanted) in table {
            assert_eq!(next(naming, asked_for, taken, label, now), wanted, "{what}");
        }
    }

    #[test]
    fn what_is_told_of_a_name_is_what_it_is_called_by_then() {
        let setting =
            |source| Setting { name: "hostname".into(), value: "web".into(), source, rule: String::new() };
        for (source, notes) in [(Source::Pod, 1), (Source::Cluster, 0)] {
            let mut told = Choice { settings: vec![setting(source)], ..Choice::default() };
            told.notes.push("another".into());
            tell(&mut told, "web", "t", "web-x2x4z", None);
            assert_eq!((told.settings[0].value.as_str(), told.notes.len()), ("web-x2x4z", 1 + notes));
            tell(&mut told, "web", "t", "web-1", Some(" until then"));
            assert_eq!((told.settings[0].value.as_str(), told.notes.len()), ("web-1", 2));
            assert!(told.notes[1].ends_with("so this one is called web-1 until then"), "{told:?}");
            tell(&mut told, "web", "t", "web-x2x4z", None);
            assert_eq!((told.settings[0].value.as_str(), told.notes.len()), ("web-x2x4z", 1 + notes));
        }
    }
}
