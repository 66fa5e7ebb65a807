//! What people and metrics see of a pod.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use podtether_proto::engine::{HealthMessage, PeerStatus};
use podtether_proto::sandbox::StepReport;
use serde::Serialize;

use super::{Listing, Table};
use crate::record::IdentityKey;

/// How a pod's last engine ended in the supervisor's life.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LastExit {
    /// One word, as the metric `podtether_engine_exits_total` has it.
    pub kind: &'static str,
    /// One sentence.
    pub reason: String,
    /// Seconds since then.
    pub seconds_ago: u64,
}

/// One attachment.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodReport {
    /// Kubernetes pod UID.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Pod name.
    pub pod: String,
    /// Tailnet addresses.
    pub addresses: Vec<IpAddr>,
    /// Fully qualified name in the tailnet.
    pub name: String,
    /// ACL tags.
    pub tags: Vec<String>,
    /// `joining`, `running`, `needs-login`, `needs-approval`, `restarting`, `backoff`, `stopped`, `leaving`.
    pub state: &'static str,
    /// Why it is not running, or what failed last.
    pub reason: String,
    /// Pid of the engine, absent while there is none.
    pub engine_pid: Option<u32>,
    /// How often the engine has run since it began, where the kernel counts that. Asking does not wake it.
    pub engine_runs: Option<u64>,
    /// Processor time that the engine has used, microseconds.
    pub engine_cpu_us: Option<u64>,
    /// Milliseconds since the epoch of its ADD, 0 when unknown.
    pub added_unix_ms: u64,
    /// Engine restarts since the supervisor started.
    pub restarts: u64,
    /// The same by how the engine before had ended, as `podtether_engine_exits_total` has it.
    pub restarts_by: BTreeMap<&'static str, u64>,
    /// From the death of the engine before to the first answer of this one, microseconds.
    pub last_recovery_us: Option<u64>,
    /// How the engine before ended, absent while none has.
    pub last_exit: Option<LastExit>,
    /// Planned handovers since the supervisor started.
    pub handovers: u64,
    /// Key of the tailnet.
    pub tailnet: String,
    /// CNI network, container and interface.
    pub network: String,
    /// See `network`.
    pub container_id: String,
    /// See `network`.
    pub ifname: String,
    /// Index of the interface in the pod, 0 before there is one.
    pub ifindex: u32,
    /// Its hardware address.
    pub mac: String,
    /// UDP port of the underlay over IPv4.
    pub udp_port: u16,
    /// UDP port of the underlay over IPv6.
    pub udp6_port: u16,
    /// What limits the engine, of `cgroup`, `memory`, `pids`, `cpu` and `mounts`.
    pub limits: Vec<&'static str>,
    /// Uid of the engine; absent where engines run under the supervisor's own.
    pub engine_uid: Option<u32>,
    /// Whether it uses the networks of subnet routers.
    pub accept_routes: bool,
    /// The exit node it should use, absent for none.
    pub exit_node: Option<String>,
    /// Whether the map stream is up.
    pub control_connected: bool,
    /// Home DERP region, 0 for none.
    pub home_derp: u32,
    /// When its node key expires, seconds since the epoch; absent when it does not, or nobody knows.
    pub key_expiry_unix_s: Option<i64>,
    /// The device name that it asked for.
    pub hostname: String,
    /// Id of the CNI ADD that made it, for logs; empty when unknown.
    pub join: String,
    /// The name that another device of the tailnet has, where it asked for that first; else empty.
    pub name_taken: String,
    /// What is odd in its annotations.
    pub notes: Vec<String>,
    /// Where a person is to log the device in, empty when nobody has to.
    pub login_url: String,
    /// What control, the engine and the supervisor find wrong.
    pub health: Vec<HealthMessage>,
    /// What its engine has given up, step by step, and why not where it could not.
    pub sandbox: Vec<StepReport>,
    /// Paths to the peers; filled in by who asks the engines.
    pub peers: Vec<PeerStatus>,
}

impl Table {
    pub(super) fn listing(&self) -> Listing {
        let now = Instant::now();
        let mut listing = Listing { asides: self.asides.clone(), ..Listing::default() };
        let mut pods: Vec<_> = self.pods.values().collect();
        pods.sort_by(|a, b| {
            let key = |p: &super::pod::Pod| {
                (p.record.pod.namespace.clone(), p.record.pod.name.clone(), p.record.id.clone())
            };
            key(a).cmp(&key(b))
        });
        for pod in pods {
            let status = pod.engine.as_ref().and_then(|e| e.status.as_ref());
            let node = status.and_then(|s| s.node.as_ref());
            let used = pod.engine.as_ref().and_then(|e| e.process.used().ok());
            let known = self.known_addresses(&pod.identity);
            let identity = self.identities.get(&pod.identity).map(|identity| &identity.record);
            listing.pods.push(PodReport {
                uid: pod.record.pod.uid.clone(),
                namespace: pod.record.pod.namespace.clone(),
                pod: pod.record.pod.name.clone(),
                addresses: node.map_or(known, |n| n.addresses.iter().map(ipnet::IpNet::addr).collect()),
                name: node.map(|n| n.name.clone()).unwrap_or_default(),
                tags: node.map(|n| n.tags.clone()).unwrap_or_default(),
                state: pod.state(now),
                reason: pod.reason.clone(),
                engine_pid: pod.engine.as_ref().map(|e| e.process.pid()),
                engine_runs: used.map(|used| used.times).filter(|times| *times > 0),
                engine_cpu_us: used.map(|used| u64::try_from(used.ran.as_micros()).unwrap_or(u64::MAX)),
                added_unix_ms: pod.record.timeline.added_unix_ms,
                restarts: pod.restarts,
                restarts_by: pod.restarts_by.clone(),
                last_recovery_us: pod.last_recovery.map(|t| u64::try_from(t.as_micros()).unwrap_or(u64::MAX)),
                last_exit: pod.last_exit.as_ref().map(|exit| LastExit {
                    kind: exit.kind,
                    reason: exit.reason.clone(),
                    seconds_ago: now.saturating_duration_since(exit.at).as_secs(),
                }),
                handovers: pod.handovers,
                tailnet: pod.record.tailnet.clone(),
                network: pod.record.attachment.network.clone(),
                container_id: pod.record.attachment.container_id.clone(),
                ifname: pod.record.attachment.ifname.clone(),
                ifindex: pod.fds.as_ref().map_or(0, |f| f.link.ifindex),
                mac: pod.record.mac.clone(),
                udp_port: pod.record.udp4_port,
                udp6_port: pod.record.udp6_port,
                limits: pod.engine.iter().flat_map(|e| &e.holds).map(|hold| hold.name()).collect(),
                engine_uid: pod.record.uid,
                accept_routes: pod.record.routing.accept_routes,
                exit_node: pod.record.routing.exit_node.clone(),
                control_connected: status.is_some_and(|s| s.control_connected),
                home_derp: status.map_or(0, |s| s.home_derp),
                key_expiry_unix_s: node.and_then(|n| n.key_expiry_unix_s),
                hostname: identity.map(|record| record.hostname.clone()).unwrap_or_default(),
                name_taken: identity.map(|record| record.name_taken.clone()).unwrap_or_default(),
                join: pod.record.join.clone(),
                notes: pod.record.choice.notes.clone(),
                login_url: pod.engine.as_ref().and_then(|e| e.login_url()).unwrap_or_default().to_owned(),
                health: pod.health(),
                sandbox: status.map(|s| s.sandbox.clone()).unwrap_or_default(),
                peers: Vec::new(),
            });
            listing.clients.push(pod.engine.as_ref().and_then(|e| e.client.clone()));
        }
        listing
    }

    fn known_addresses(&self, key: &IdentityKey) -> Vec<IpAddr> {
        self.identities.get(key).map(|i| i.record.addresses.clone()).unwrap_or_default()
    }
}
