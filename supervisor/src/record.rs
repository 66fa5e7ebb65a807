//! Records on disk: what has to outlive every process.
//!
//! One JSON file per attachment and one per identity, `{"version":1,"checksum":"…","body":{…}}`,
//! written atomically (temporary file, fsync, rename, fsync of the directory), 0600 in a 0700
//! directory. A file that is torn, was altered or comes from a newer build is renamed aside and
//! reported; the others load. The state directory is locked for as long as a [`Store`] lives.

mod file;

use std::fs::File;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use podtether_proto::engine::PodRef;
use podtether_proto::node::{AttachmentId, Choice, Routing, Timeline};
use podtether_proto::secret::SecretKey;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use file::{decode, fnv64, random_id};

/// A record could not be written, or the state directory not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct StoreError {
    /// What was tried, with the path.
    pub what: String,
    /// Why it failed.
    pub source: std::io::Error,
}

/// One attachment: an interface of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Name of its record, its namespace mount and its run directory.
    pub id: String,
    /// Whose.
    pub attachment: AttachmentId,
    /// `CNI_NETNS` at ADD.
    pub netns: String,
    /// The pod's namespace by inode, so that a path reused by another pod is noticed.
    pub netns_inode: u64,
    /// Which pod.
    pub pod: PodRef,
    /// Key of a `[tailnet.NAME]` table.
    pub tailnet: String,
    /// Record of its identity.
    pub identity: String,
    /// Number of its uid and of its temporary interface names.
    pub slot: u32,
    /// Bound UDP port of the underlay, 0 before there is one.
    pub udp4_port: u16,
    /// As `udp4_port`, for IPv6.
    pub udp6_port: u16,
    /// Uid the engine runs under, `None` where ids are not mapped.
    pub uid: Option<u32>,
    /// Addresses that ts0 was given; empty before ADD was answered.
    pub addresses: Vec<IpNet>,
    /// Hardware address of ts0, empty before the link exists.
    pub mac: String,
    /// Name servers whose answers are intercepted; empty for none.
    #[serde(default)]
    pub name_servers: Vec<IpAddr>,
    /// Which routes of other nodes the pod uses.
    #[serde(default)]
    pub routing: Routing,
    /// What the primary CNI's result led to by more than a default route.
    #[serde(default)]
    pub primary: Vec<IpNet>,
    /// The pod starts before it has joined: its ADD may be answered while there are no addresses.
    #[serde(default)]
    pub unhurried: bool,
    /// What was decided about the pod.
    #[serde(default)]
    pub choice: Choice,
    /// What became of it when.
    #[serde(default)]
    pub timeline: Timeline,
    /// Id of the CNI ADD that made it, for logs; empty in records of earlier builds.
    #[serde(default)]
    pub join: String,
}

/// One identity: a device in a tailnet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Name of its record.
    pub id: String,
    /// Whose.
    pub key: IdentityKey,
    /// Which pod, for people.
    pub pod: PodRef,
    /// Requested host name.
    pub hostname: String,
    /// Noise static key.
    pub machine_key: SecretKey,
    /// WireGuard static key.
    pub node_key: SecretKey,
    /// Public half of the node key before a rotation that control has not confirmed.
    pub old_node_key: Option<[u8; 32]>,
    /// Whether control has taken the node key.
    pub registered: bool,
    /// Node addresses, for deleting the device when no engine can log out.
    pub addresses: Vec<IpAddr>,
    /// Stable node id, empty when unknown.
    pub stable_id: String,
    /// Seconds since the epoch until which it is kept without an attachment; `None` while there is one.
    pub keep_until_unix_s: Option<u64>,
    /// The device has to leave the tailnet; only the deed is missing.
    pub leaving: bool,
    /// Where a person is to log the node key in, empty when nobody has to.
    #[serde(default)]
    pub login_url: String,
    /// ACL tags that it asks for; `None`, from an earlier version, for its tailnet's.
    #[serde(default)]
    pub tags: Option<Vec<String>>,
    /// Whether the server may forget it; `None`, from an earlier version, for what its tailnet has.
    #[serde(default)]
    pub ephemeral: Option<bool>,
    /// Host names to ask for where another device has the requested one, the best first.
    #[serde(default)]
    pub other_names: Vec<String>,
    /// The name that it asked for first, where another device of the tailnet has it; else empty.
    #[serde(default)]
    pub name_taken: String,
}

/// An identity belongs to one interface of one pod in one tailnet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct IdentityKey {
    /// Key of a `[tailnet.NAME]` table.
    pub tailnet: String,
    /// Pod UID.
    pub pod_uid: String,
    /// Interface in the pod.
    pub ifname: String,
}

/// What a store knows how to keep.
pub trait Record: Serialize + DeserializeOwned {
    /// Directory below the state directory.
    const DIR: &'static str;
    /// Name of the file, without its ending.
    fn id(&self) -> &str;
}

impl Record for Attachment {
    const DIR: &'static str = "attachments";
    fn id(&self) -> &str {
        &self.id
    }
}

impl Record for Identity {
    const DIR: &'static str = "identities";
    fn id(&self) -> &str {
        &self.id
    }
}

/// A file that did not load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Aside {
    /// Where it is kept now.
    pub path: PathBuf,
    /// One sentence.
    pub reason: String,
    /// What is wrong with it, in a word; `None` when an earlier supervisor put it aside.
    pub found: Option<&'static str>,
}

/// The state directory, locked.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    _lock: File,
}

impl Store {
    /// Opens and locks `root`, making it where it does not exist.
    ///
    /// # Errors
    /// Another supervisor holds it, or the file system refuses.
    pub fn open(root: &Path) -> Result<Store, StoreError> {
        for dir in [root.to_owned(), root.join(Attachment::DIR), root.join(Identity::DIR)] {
            private_dir(&dir)?;
        }
        Ok(Store { root: root.to_owned(), _lock: lock(root, "state")? })
    }

    /// Writes a record; when this returns, it survives a power cut.
    ///
    /// # Errors
    /// The file system refuses; the record's previous content stays.
    pub fn save<R: Record>(&self, record: &R) -> Result<(), StoreError> {
        file::write(&self.root.join(R::DIR), record.id(), record)
    }

    /// Removes a record; one that is not there is fine.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn remove<R: Record>(&self, id: &str) -> Result<(), StoreError> {
        file::remove(&self.root.join(R::DIR), id)
    }

    /// Every record that loads, and the files that do not, which were renamed aside.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn load<R: Record>(&self) -> Result<(Vec<R>, Vec<Aside>), StoreError> {
        file::load_all(&self.root.join(R::DIR))
    }
}

/// Takes `dir`, the `what` directory of the configuration, for this process alone: as long as the file is
/// open.
///
/// # Errors
/// Another supervisor holds it, or the file system refuses.
pub fn lock(dir: &Path, what: &str) -> Result<File, StoreError> {
    file::lock(dir, what)
}

/// Makes `dir` with mode 0700, or gives an existing one that mode.
///
/// # Errors
/// The file system refuses.
pub fn private_dir(dir: &Path) -> Result<(), StoreError> {
    let wrap = |what: &str, source| StoreError { what: format!("{what} {}", dir.display()), source };
    std::fs::create_dir_all(dir).map_err(|e| wrap("cannot make", e))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
        .map_err(|e| wrap("cannot set the mode of", e))
}

#[cfg(test)]
#[path = "record/tests.rs"]
mod tests;
