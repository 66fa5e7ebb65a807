//! What every step may use and nobody changes: configuration, store, credentials, ids.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use podtether_net::link::{LinkSpec, tailnet_routes};
use podtether_proto::engine::PodRef;
use tokio::sync::Semaphore;

use crate::cgroup::Cgroups;
use crate::config::Config;
use crate::credentials::{Credential, Roots};
use crate::detach::{Image, Nowhere};
use crate::kube::{Cluster, Fate};
use crate::record::{Attachment, Identity, Store};

/// MTU of every link.
pub const MTU: u16 = 1280;

/// Shared by the table and its steps.
#[derive(Debug)]
pub struct Context {
    /// As loaded.
    pub config: Config,
    /// The locked state directory.
    pub store: Store,
    /// By tailnet.
    pub credentials: BTreeMap<String, Credential>,
    /// Extra roots by tailnet.
    pub roots: BTreeMap<String, Arc<Roots>>,
    /// What the API server tells, where one is asked.
    pub cluster: Option<Cluster>,
    /// The engine's binary.
    pub engine: PathBuf,
    /// The same in memory, where the kernel allows that.
    pub image: Option<Image>,
    /// Where engines go, where the kernel allows that.
    pub nowhere: Option<Nowhere>,
    /// What limits engines, outside the supervisor's own cgroup.
    pub cgroups: Cgroups,
    /// What engines cannot be given here, a sentence each.
    pub shortcomings: Vec<String>,
    /// Whether engines get uids of their own.
    pub own_uids: bool,
    /// Links that are made or removed at a time: the kernel does them one after another anyway, and
    /// the first pods of many should not wait for the last.
    pub link_places: Semaphore,
}

const LINKS_AT_ONCE: usize = 6;

impl Context {
    /// Prepares everything that can be wrong before the first pod.
    ///
    /// # Errors
    /// One sentence.
    pub fn new(config: Config, store: Store, cluster: Option<Cluster>) -> Result<Context, String> {
        let mut credentials = BTreeMap::new();
        let mut roots = BTreeMap::new();
        for (name, tailnet) in &config.tailnets {
            let at = |e: String| format!("tailnet.{name}: {e}");
            let extra = Roots::new(tailnet.ca_file.as_deref());
            let extra = Arc::new(extra.map_err(|e| format!("tailnet.{name}.ca_file: {e}"))?);
            credentials.insert(name.clone(), Credential::new(tailnet, &extra).map_err(at)?);
            roots.insert(name.clone(), extra);
        }
        let engine = config.engine_path();
        if !engine.is_file() {
            return Err(format!("node.engine_path: {} is not there", engine.display()));
        }
        let own_uids = own_uids(config.node.uid_base);
        let link_places = Semaphore::new(LINKS_AT_ONCE);
        let mut shortcomings = Vec::new();
        let mut had = |what: &str, got: Result<(), String>| {
            shortcomings.extend(got.err().map(|why| format!("{what}: {why}")));
        };
        let image = Image::load(&engine).map_err(|e| e.to_string());
        had(
            "engines run from their file, which keeps its file system",
            image.as_ref().map(drop).map_err(Clone::clone),
        );
        let nowhere = Nowhere::make(&config.node.run_dir);
        had(
            "engines stay in the supervisor's mount namespace",
            nowhere.as_ref().map(drop).map_err(Clone::clone),
        );
        let cgroups = Cgroups::prepare(&config.node.cgroup_root, config.node.engine_memory_bytes);
        let lacking = cgroups.lacking();
        had("engines lack cgroups of their own", if lacking.is_empty() { Ok(()) } else { Err(lacking) });
        let (image, nowhere) = (image.ok(), nowhere.ok());
        Ok(Context {
            config,
            store,
            credentials,
            roots,
            cluster,
            engine,
            image,
            nowhere,
            cgroups,
            shortcomings,
            own_uids,
            link_places,
        })
    }

    /// Where namespaces are pinned.
    #[must_use]
    pub fn netns_dir(&self) -> PathBuf {
        self.config.node.run_dir.join("netns")
    }

    /// The link of an attachment.
    #[must_use]
    pub fn link_spec(&self, record: &Attachment) -> LinkSpec {
        LinkSpec {
            id: record.id.clone(),
            netns_dir: self.netns_dir(),
            pod_netns: PathBuf::from(&record.netns),
            ifname: record.attachment.ifname.clone(),
            mtu: MTU.into(),
        }
    }

    /// What a pod with these addresses routes into its link. A tailnet may have one family alone; what the
    /// pod sends to the other's range would have no source to come from.
    #[must_use]
    pub fn routes(&self, addresses: &[IpNet]) -> Vec<IpNet> {
        let mut routes = tailnet_routes(&self.config.node.exclude_cidrs);
        let same_family = |a: &IpNet, b: &IpNet| a.addr().is_ipv4() == b.addr().is_ipv4();
        routes.retain(|route| addresses.iter().any(|address| same_family(address, route)));
        routes
    }

    /// True when a device of `tailnet` needs nothing more after its engine has logged out: the server
    /// forgets it, or there is no API that could delete it.
    #[must_use]
    pub fn forgets_who_logs_out(&self, device: &Identity) -> bool {
        self.is_ephemeral(device) || !self.deletes_devices(&device.key.tailnet)
    }

    /// Whether the server may forget the device.
    #[must_use]
    pub fn is_ephemeral(&self, device: &Identity) -> bool {
        let tailnet = || self.config.tailnets.get(&device.key.tailnet).is_some_and(|t| t.ephemeral);
        device.ephemeral.unwrap_or_else(tailnet)
    }

    /// The ACL tags that the device asks for.
    #[must_use]
    pub fn tags(&self, device: &Identity) -> Vec<String> {
        let tailnet = || self.config.tailnets.get(&device.key.tailnet).map(|t| t.tags.clone());
        device.tags.clone().or_else(tailnet).unwrap_or_default()
    }

    /// True when `tailnet` has an API that deletes devices.
    #[must_use]
    pub fn deletes_devices(&self, tailnet: &str) -> bool {
        self.credentials.get(tailnet).is_some_and(Credential::deletes_devices)
    }

    /// Whether a pod lives, as far as anybody knows.
    #[must_use]
    pub fn fate(&self, pod: &PodRef) -> Fate {
        self.cluster.as_ref().map_or(Fate::Unknown, |cluster| cluster.fate(pod))
    }

    /// Uid for the engine in `slot`.
    #[must_use]
    pub fn uid(&self, slot: u32) -> Option<u32> {
        self.own_uids.then(|| self.config.node.uid_base.saturating_add(slot))
    }
}

/// Uid for the next engine of a pod whose record has `recorded` and whose slot gives `own` now. A record owns
/// its uid; another one is taken only when nobody has it.
#[must_use]
pub fn next_uid(recorded: Option<u32>, own: Option<u32>, is_taken: impl Fn(u32) -> bool) -> Option<u32> {
    match (recorded, own) {
        (Some(recorded), Some(own)) if recorded != own && is_taken(own) => Some(recorded),
        (_, own) => own,
    }
}

/// True when this process may change to `base` and to all ids an engine could get after it.
fn own_uids(base: u32) -> bool {
    use caps::{CapSet, Capability};
    let may = |cap| caps::has_cap(None, CapSet::Effective, cap).unwrap_or(false);
    let mapped = |path| std::fs::read_to_string(path).is_ok_and(|map| maps(&map, base, 65_536));
    may(Capability::CAP_SETUID)
        && may(Capability::CAP_SETGID)
        && mapped("/proc/self/uid_map")
        && mapped("/proc/self/gid_map")
}

/// Whether one line of an id map covers `count` ids from `base`.
fn maps(map: &str, base: u32, count: u32) -> bool {
    map.lines().any(|line| {
        let mut fields = line.split_whitespace().map(|f| f.parse::<u64>().unwrap_or(0));
        let (Some(inside), Some(_), Some(length)) = (fields.next(), fields.next(), fields.next()) else {
            return false;
        };
        u64::from(base) >= inside && u64::from(base) + u64::from(count) <= inside + length
    })
}

#[cfg(test)]
mod tests {
    use super::{maps, next_uid};

    #[test]
    fn a_changed_base_gives_no_two_engines_one_uid() {
        let free = |_| false;
        let taken = |_| true;
        assert_eq!(next_uid(Some(200_005), Some(300_005), free), Some(300_005));
        assert_eq!(next_uid(Some(200_005), Some(200_002), taken), Some(200_005), "another pod still has it");
        assert_eq!(next_uid(Some(200_005), Some(200_005), taken), Some(200_005), "its own");
        assert_eq!(next_uid(Some(200_005), None, free), None, "ids are not mapped any more");
        assert_eq!(next_uid(None, Some(200_005), free), Some(200_005), "ids are mapped by now");
    }

    #[test]
    fn id_maps() {
        assert!(maps("         0          0 4294967295\n", 200_000, 65_536));
        assert!(!maps("         0       1000          1\n", 200_000, 65_536));
        assert!(maps("0 1000 1\n1 100000 300000\n", 200_000, 65_536));
        assert!(!maps("0 1000 1\n1 100000 65536\n", 200_000, 65_536));
        assert!(!maps("nonsense\n", 0, 1));
    }
}
