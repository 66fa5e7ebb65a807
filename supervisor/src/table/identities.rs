//! The identities of this node's pods: devices in tailnets, apart from the attachments that use them.

use std::collections::HashMap;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

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
            reap_failures: 0,
        }
    }

    /// A new device-to-be.
    pub(super) fn new(key: IdentityKey, pod: PodRef, hostname: String) -> Result<Identity, String> {
        let random = |e: podtether_core::key::RandomError| e.to_string();
        let machine = MachinePrivate::generate().map_err(random)?;
        let node = NodePrivate::generate().map_err(random)?;
        let record = record::Identity {
            id: random_id(),
            key,
            pod,
            hostname,
            machine_key: SecretKey::new(*machine.expose()),
            node_key: SecretKey::new(*node.expose()),
            old_node_key: None,
            registered: false,
            addresses: Vec::new(),
            stable_id: String::new(),
            keep_until_unix_s: None,
            leaving: false,
            login_url: String::new(),
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

    pub(super) fn changed(&mut self) {
        self.version += 1;
    }
}

/// Seconds since the epoch.
pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
