//! The identities of this node's pods: devices in tailnets, apart from the attachments that use them.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use podtether_core::key::{MachinePrivate, NodePrivate};
use podtether_proto::engine::PodRef;
use podtether_proto::node::AttachmentId;
use podtether_proto::secret::SecretKey;

use crate::credentials::Device;
use crate::record::{self, IdentityKey, random_id};

/// One identity in memory.
#[derive(Debug)]
pub(super) struct Identity {
    pub(super) record: record::Identity,
    pub(super) version: u64,
    pub(super) saved: u64,
    /// INVARIANT: one engine at a time has these keys; two would fight for the device's sessions.
    pub(super) holder: Option<AttachmentId>,
    /// Attachments of it whose engine, left by an earlier supervisor, nobody has looked for yet.
    pub(super) unseen: u32,
    /// Some attachment's record is damaged, so nobody can say whether this one is unused.
    pub(super) frozen: bool,
    /// The reaper's.
    pub(super) reaping: bool,
    pub(super) reap_after: Option<Instant>,
    /// When the time is over that the record names, and that time.
    pub(super) kept: Option<(u64, Instant)>,
    pub(super) reap_failures: u32,
}

pub(super) type Identities = HashMap<IdentityKey, Identity>;

impl Identity {
    pub(super) fn loaded(record: record::Identity) -> Identity {
        Identity {
            record,
            version: 1,
            saved: 1,
            holder: None,
            unseen: 0,
            frozen: false,
            reaping: false,
            reap_after: None,
            kept: None,
            reap_failures: 0,
        }
    }

    /// A new device-to-be.
    pub(super) fn new(key: IdentityKey, pod: PodRef) -> Result<Identity, String> {
        let random = |e: podtether_core::key::RandomError| e.to_string();
        let machine = MachinePrivate::generate().map_err(random)?;
        let node = NodePrivate::generate().map_err(random)?;
        let record = record::Identity {
            id: random_id(),
            key,
            pod,
            hostname: String::new(),
            machine_key: SecretKey::new(*machine.expose()),
            node_key: SecretKey::new(*node.expose()),
            old_node_key: None,
            registered: false,
            addresses: Vec::new(),
            stable_id: String::new(),
            keep_until_unix_s: None,
            leaving: false,
            login_url: String::new(),
            tags: None,
            ephemeral: None,
            other_names: Vec::new(),
            name_taken: String::new(),
        };
        Ok(Identity { saved: 0, ..Identity::loaded(record) })
    }

    /// A new node key. It names the one before it, unless control does not know that any more. It is on disk
    /// before control hears of it.
    pub(super) fn rotate(&mut self) -> Result<(), String> {
        let node = NodePrivate::generate().map_err(|e| e.to_string())?;
        let old = NodePrivate::from_bytes(*self.record.node_key.expose()).public();
        self.record.old_node_key = self.record.registered.then(|| *old.as_bytes());
        self.record.node_key = SecretKey::new(*node.expose());
        // It was for the key before.
        self.record.login_url.clear();
        self.changed();
        self.saved = 0;
        Ok(())
    }

    /// New keys altogether: control cannot tell that it is the same device.
    pub(super) fn become_another(&mut self) -> Result<(), String> {
        let machine = MachinePrivate::generate().map_err(|e| e.to_string())?;
        self.record.machine_key = SecretKey::new(*machine.expose());
        self.record.registered = false;
        self.rotate()
    }

    pub(super) fn device(&self) -> Device {
        Device {
            node_key: NodePrivate::from_bytes(*self.record.node_key.expose()).public().to_string(),
            machine_key: MachinePrivate::from_bytes(*self.record.machine_key.expose()).public().to_string(),
            stable_id: self.record.stable_id.clone(),
        }
    }

    /// Whether it stays without an attachment for now. The record's time is looked at once: a clock that is set
    /// neither ends nor prolongs what this supervisor has begun to wait for.
    pub(super) fn is_kept(&mut self, now: Instant, unix_now: u64, longest: Duration) -> bool {
        let Some(until) = self.record.keep_until_unix_s else {
            self.kept = None;
            return true;
        };
        let fresh = || (until, now + remaining(until, unix_now, longest));
        let kept = self.kept.filter(|(of, _)| *of == until).unwrap_or_else(fresh);
        self.kept = Some(kept);
        now < kept.1
    }

    pub(super) fn changed(&mut self) {
        self.version += 1;
    }
}

/// How long until `until`, which nobody sets further away than `longest`: a clock that was ahead when it was
/// set does not keep a device for years.
fn remaining(until: u64, unix_now: u64, longest: Duration) -> Duration {
    Duration::from_secs(until.saturating_sub(unix_now)).min(longest)
}

/// Seconds since the epoch.
pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const YEAR: u64 = 365 * 24 * 3600;
    const LONGEST: Duration = Duration::from_secs(600);

    fn identity(keep_until: Option<u64>) -> Identity {
        let key = IdentityKey { tailnet: "t".into(), pod_uid: "u".into(), ifname: "ts0".into() };
        let pod = PodRef { uid: "u".into(), namespace: "ns".into(), name: "p".into() };
        let mut identity = Identity::new(key, pod).unwrap();
        identity.record.keep_until_unix_s = keep_until;
        identity
    }

    #[test]
    fn a_clock_that_jumps_neither_ends_nor_prolongs_the_wait() {
        let (start, wall) = (Instant::now(), 1_800_000_000);
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        for jump in [0, YEAR.cast_signed(), -YEAR.cast_signed()] {
            let mut identity = identity(Some(wall + 300));
            assert!(identity.is_kept(start, wall, LONGEST));
            let jumped = wall.saturating_add_signed(jump);
            assert!(identity.is_kept(at(299), jumped + 299, LONGEST), "{jump}");
            assert!(!identity.is_kept(at(300), jumped + 300, LONGEST), "{jump}");
            // A later wish counts from the clock as it is by then.
            identity.record.keep_until_unix_s = Some(jumped + 400 + 60);
            assert!(identity.is_kept(at(400), jumped + 400, LONGEST), "{jump}");
            assert!(identity.is_kept(at(459), jumped, LONGEST), "{jump}");
            assert!(!identity.is_kept(at(460), jumped, LONGEST), "{jump}");
            identity.record.keep_until_unix_s = None;
            assert!(identity.is_kept(at(10_000), jumped, LONGEST), "in use");
        }
        // Set by a supervisor whose clock was a year ahead.
        let mut identity = identity(Some(wall + YEAR));
        assert!(identity.is_kept(at(0), wall, LONGEST));
        assert!(!identity.is_kept(at(600), wall, LONGEST));
    }

    #[test]
    fn remaining_times() {
        for (until, now, left) in
            [(10, 0, 10), (10, 10, 0), (10, 20, 0), (u64::MAX, 0, 600), (0, u64::MAX, 0)]
        {
            assert_eq!(remaining(until, now, LONGEST), Duration::from_secs(left), "{until} {now}");
        }
    }
}
