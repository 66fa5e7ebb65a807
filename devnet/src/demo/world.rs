//! What the demo runs on: devnet, nodes with supervisors, pods.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use podtether_devnet::lab::{HostState, Lab, Node, Pod, Programs, Tailnet, host_state};
use podtether_devnet::{Devnet, DevnetConfig};
use podtether_proto::engine::{PathStatus, PeerStatus};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The access rules, as an operator would write them.
const ACL: &str = r#"
[[rules]]
src = ["tag:k8s-pod"]
dst = ["tag:k8s-pod"]
proto = ["icmp"]

[[rules]]
src = ["tag:k8s-pod"]
dst = ["tag:k8s-pod"]
ports = ["8080-8089"]
proto = ["tcp"]
"#;
/// In the rules above.
pub(super) const ALLOWED_PORT: u16 = 8080;
/// In the rules above, for transfers.
pub(super) const TRANSFER_PORT: u16 = 8081;
/// Not in them.
pub(super) const DENIED_PORT: u16 = 9090;

/// Nodes and the pods on each.
const NODES: [(&str, [&str; 2]); 2] = [("node-a", ["web-1", "db-1"]), ("node-b", ["web-2", "db-2"])];
const POLL: Duration = Duration::from_millis(20);

/// Everything there is.
pub(super) struct World {
    pub(super) lab: Lab,
    pub(super) devnet: Devnet,
    pub(super) sites: Vec<Site>,
    /// [`World::state`] when the pods were there and had not joined yet.
    pub(super) before: Vec<(String, HostState)>,
}

/// A node with its pods.
pub(super) struct Site {
    pub(super) node: Node,
    pub(super) pods: Vec<Pod>,
}

impl Site {
    fn places(&self) -> impl Iterator<Item = Place<'_>> {
        self.pods.iter().map(|pod| Place { node: &self.node, pod })
    }
}

/// A pod and the node it is on.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) node: &'a Node,
    pub(super) pod: &'a Pod,
}

impl World {
    /// Starts everything but the pods.
    ///
    /// # Errors
    /// Naming the part that did not start.
    pub(super) fn start(dir: &Path) -> Result<Self> {
        let programs = Programs::find(&std::env::current_exe().context("own path")?)?;
        let mut lab = Lab::new(dir, programs)?;
        let acl = dir.join("acl.toml");
        std::fs::write(&acl, ACL).context("write the access rules")?;
        let policy = std::fs::read_to_string(&acl)?.parse().context("access rules")?;
        let (devnet, ca) =
            lab.start_devnet(DevnetConfig { policy: Some(policy), ..DevnetConfig::default() })?;
        let mut sites = Vec::new();
        for (name, _) in NODES {
            let mut node = lab.add_node(name)?;
            node.configure(&[Tailnet::oauth("default", &devnet, &ca)], "")?;
            node.start_supervisor()?;
            sites.push(Site { node, pods: Vec::new() });
        }
        Ok(Self { lab, devnet, sites, before: Vec::new() })
    }

    /// Makes the pods as the runtime and the primary CNI do.
    ///
    /// # Errors
    /// As the kernel says.
    pub(super) fn create_pods(&mut self) -> Result<()> {
        for (site, (_, pods)) in self.sites.iter_mut().zip(NODES) {
            for name in pods {
                let pod = site.node.create_pod(name)?;
                site.pods.push(pod);
            }
        }
        self.before = self.state()?;
        Ok(())
    }

    /// Everything that joining could change, on the nodes and in the pods.
    ///
    /// # Errors
    /// As the kernel says.
    pub(super) fn state(&self) -> Result<Vec<(String, HostState)>> {
        let mut all = Vec::new();
        for Site { node, pods } in &self.sites {
            all.push((node.name.clone(), node.host_state()?));
            for pod in pods {
                all.push((pod.name.clone(), host_state(&pod.netns, &[])?));
            }
        }
        Ok(all)
    }

    /// All pods with their nodes.
    pub(super) fn places(&self) -> Vec<Place<'_>> {
        self.sites.iter().flat_map(Site::places).collect()
    }

    /// A pod by name.
    ///
    /// # Errors
    /// When it is not there.
    pub(super) fn place(&self, name: &str) -> Result<Place<'_>> {
        self.places().into_iter().find(|p| p.pod.name == name).with_context(|| format!("no pod {name}"))
    }

    /// Every pod with every other, both ways.
    pub(super) fn pairs(&self) -> Vec<(Place<'_>, Place<'_>)> {
        let places = self.places();
        let with = |from: Place<'_>| from.pod.uid.clone();
        let all = places.iter().flat_map(|from| places.iter().map(move |to| (*from, *to)));
        all.filter(|(from, to)| with(*from) != with(*to)).collect()
    }

    /// The end of every supervisor's log, engines' lines included, for a person.
    pub(super) fn logs(&self) -> String {
        let mut text = String::new();
        for site in &self.sites {
            text += &format!("-- {} ({})\n", site.node.name, site.node.log().display());
            for line in site.node.log_end(15).lines() {
                text += &format!("   {}\n", readable(line));
            }
        }
        text
    }
}

impl Place<'_> {
    /// Whether the two pods are on one node.
    pub(super) fn is_beside(&self, other: &Place<'_>) -> bool {
        self.node.name == other.node.name
    }

    /// A field of the pod's entry in `/v1/pods`.
    ///
    /// # Errors
    /// When it is missing or of another kind.
    pub(super) fn field<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        let report = self.node.pod_report(&self.pod.name)?;
        serde_json::from_value(report[key].clone())
            .with_context(|| format!("{key} of {} in /v1/pods is {}", self.pod.name, report[key]))
    }

    /// How this pod's engine reaches `peer`.
    ///
    /// # Errors
    /// When it does not know the peer.
    pub(super) fn path_to(&self, peer: &Place<'_>) -> Result<PathStatus> {
        let peers: Vec<PeerStatus> = self.field("peers")?;
        let address = peer.pod.v4()?;
        let found = peers.into_iter().find(|p| p.addresses.contains(&address));
        Ok(found.with_context(|| format!("{} has no peer {address}", self.pod.name))?.path)
    }
}

/// Asks until `check` is content, for what another process knows and tells nobody unasked; its last
/// complaint is the error.
///
/// # Errors
/// After `patience`.
pub(super) fn wait_until(
    patience: Duration,
    mut check: impl FnMut() -> Result<Option<String>>,
) -> Result<Duration> {
    let started = Instant::now();
    loop {
        let complaint = check()?;
        let Some(complaint) = complaint else { return Ok(started.elapsed()) };
        if started.elapsed() > patience {
            bail!("{complaint}, after {patience:?}");
        }
        std::thread::sleep(POLL);
    }
}

/// A JSON log line as a sentence; anything else as it is.
fn readable(line: &str) -> String {
    let Ok(Value::Object(mut fields)) = serde_json::from_str::<Value>(line) else {
        return line.chars().take(300).collect();
    };
    let mut take = |key: &str| match fields.remove(key) {
        Some(Value::String(text)) => text,
        Some(other) => other.to_string(),
        None => String::new(),
    };
    let (level, message) = (take("level"), take("message"));
    take("timestamp");
    take("target");
    // An engine's own fields, as the supervisor passes them on.
    if let Ok(Value::Object(inner)) = serde_json::from_str::<Value>(&take("engine")) {
        fields.extend(inner.into_iter().filter(|(key, _)| key != "target"));
    }
    let rest: Vec<String> = fields.iter().map(|(key, value)| format!("{key}={value}")).collect();
    format!("{level:5} {message} {}", rest.join(" ")).trim_end().chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_access_rules_parse() {
        assert!(ACL.parse::<podtether_devnet::acl::Policy>().is_ok());
    }

    #[test]
    fn log_lines_become_sentences() {
        let line =
            r#"{"timestamp":"x","level":"WARN","message":"engine ended","pod":"web-1","engine":{"code":9}}"#;
        assert_eq!(readable(line), r#"WARN  engine ended code=9 pod="web-1""#);
        assert_eq!(readable("thread panicked"), "thread panicked");
        assert_eq!(readable(&"x".repeat(1000)).len(), 300);
    }
}
