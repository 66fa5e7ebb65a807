//! A pod as a container runtime sees it, and the runtime's side of CNI.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use ipnet::IpNet;
use podtether_net::netlink::{Mac, Netlink, mac_text};
use podtether_net::{Netns, netns};
use serde_json::{Value, json};

use super::{Node, block_on};

/// The name under which a runtime's list has our plugin.
const NETWORK: &str = "lab";

/// See the module.
#[derive(Debug)]
pub struct Pod {
    /// Pod name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes pod UID.
    pub uid: String,
    /// Id of its sandbox.
    pub container_id: String,
    /// Its network namespace.
    pub netns: Netns,
    /// Where that is pinned: `CNI_NETNS`.
    pub netns_path: PathBuf,
    /// What the primary CNI answered.
    pub primary_result: Value,
    /// Name of its port on the node's bridge.
    host_port: String,
    /// What ADD answered.
    result: Option<Value>,
    addresses: Vec<IpAddr>,
}

/// One call of the plugin: what a runtime decides.
#[derive(Debug, Clone)]
pub struct CniCall {
    /// `CNI_COMMAND`.
    pub verb: String,
    /// `cniVersion`.
    pub version: String,
    /// Key of a `[tailnet.NAME]` table.
    pub tailnet: String,
    /// `timeoutSeconds`.
    pub timeout_s: u32,
    /// Pod annotations, passed as the runtime capability.
    pub annotations: Vec<(String, String)>,
    /// The pod's name servers, passed as the runtime capability.
    pub name_servers: Vec<IpAddr>,
}

impl CniCall {
    /// A call as containerd makes it.
    #[must_use]
    pub fn new(verb: &str) -> Self {
        Self {
            verb: verb.to_owned(),
            version: "1.0.0".into(),
            tailnet: "default".into(),
            timeout_s: 30,
            annotations: Vec::new(),
            name_servers: Vec::new(),
        }
    }
}

/// What the plugin answered.
#[derive(Debug, Clone)]
pub struct CniOutcome {
    /// Exit code 0.
    pub success: bool,
    /// Its stdout as JSON, `null` when it was empty.
    pub answer: Value,
    /// Its stderr.
    pub stderr: String,
    /// From fork to exit.
    pub took: Duration,
}

impl CniOutcome {
    /// The answer of a call that had to succeed.
    ///
    /// # Errors
    /// With the plugin's own words when it did not.
    pub fn ok(self) -> Result<Value> {
        if self.success { Ok(self.answer) } else { bail!("CNI: {} {}", self.answer, self.stderr) }
    }

    /// The error code of a call that had to fail.
    #[must_use]
    pub fn code(&self) -> Option<u64> {
        if self.success { None } else { self.answer["code"].as_u64() }
    }
}

impl Pod {
    pub(super) fn new(
        node: &Node,
        name: &str,
        netns: Netns,
        netns_path: PathBuf,
        host_port: String,
        addresses: [IpNet; 2],
        mac: Mac,
    ) -> Self {
        let ips = addresses.map(|address| json!({ "address": address.to_string(), "interface": 0 }));
        let primary_result = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{ "name": "eth0", "mac": mac_text(mac), "sandbox": netns_path }],
            "ips": ips,
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            "dns": {},
        });
        let id = format!("{}-{name}", node.name);
        Self {
            name: name.to_owned(),
            namespace: "default".into(),
            uid: format!("uid-{id}"),
            container_id: format!("sandbox-{id}"),
            netns,
            netns_path,
            primary_result,
            host_port,
            result: None,
            addresses: Vec::new(),
        }
    }

    /// The environment a runtime sets for `verb`.
    #[must_use]
    pub fn environment(&self, verb: &str) -> Vec<(&'static str, String)> {
        let Self { name, namespace, uid, container_id, netns_path, .. } = self;
        vec![
            ("CNI_COMMAND", verb.to_owned()),
            ("CNI_CONTAINERID", container_id.clone()),
            ("CNI_NETNS", netns_path.display().to_string()),
            ("CNI_IFNAME", "eth0".into()),
            ("CNI_PATH", "/opt/cni/bin".into()),
            (
                "CNI_ARGS",
                format!(
                    "K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={container_id};K8S_POD_UID={uid};\
                     IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace}"
                ),
            ),
        ]
    }

    /// What a runtime writes to the plugin's stdin: our entry of the list, the previous result, and for
    /// DEL and CHECK the cached result of ADD.
    #[must_use]
    pub fn stdin(&self, node: &Node, call: &CniCall) -> Value {
        let annotations: serde_json::Map<String, Value> =
            call.annotations.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        let mut config = json!({
            "cniVersion": call.version,
            "name": NETWORK,
            "type": "podtether-cni",
            "socket": node.socket(),
            "tailnet": call.tailnet,
            "timeoutSeconds": call.timeout_s,
            "capabilities": { "io.kubernetes.cri.pod-annotations": true, "dns": true },
            "runtimeConfig": {
                "io.kubernetes.cri.pod-annotations": annotations,
                "dns": { "servers": call.name_servers, "searches": [], "options": [] },
            },
        });
        if call.verb == "GC" {
            config["cni.dev/valid-attachments"] = json!([]);
        }
        let previous = match call.verb.as_str() {
            "ADD" => Some(&self.primary_result),
            "DEL" | "CHECK" => Some(self.result.as_ref().unwrap_or(&self.primary_result)),
            _ => None,
        };
        if let Some(previous) = previous {
            let mut previous = previous.clone();
            previous["cniVersion"] = json!(call.version);
            if call.version.starts_with("0.") {
                // Before 1.0.0 every address says its family.
                for ip in previous["ips"].as_array_mut().into_iter().flatten() {
                    let v6 = ip["address"].as_str().is_some_and(|a| a.contains(':'));
                    ip["version"] = json!(if v6 { "6" } else { "4" });
                }
            }
            config["prevResult"] = previous;
        }
        config
    }

    /// Calls the plugin as the runtime on `node` would.
    ///
    /// # Errors
    /// When it cannot be started or writes no JSON; a CNI error is an outcome.
    pub fn cni(&self, node: &Node, call: &CniCall) -> Result<CniOutcome> {
        run_plugin(node, &self.environment(&call.verb), &self.stdin(node, call).to_string())
    }

    /// ADD; remembers the answer.
    ///
    /// # Errors
    /// With the plugin's own words when it fails.
    pub fn add(&mut self, node: &Node) -> Result<Duration> {
        self.add_with(node, &CniCall::new("ADD"))
    }

    /// ADD with other settings.
    ///
    /// # Errors
    /// With the plugin's own words when it fails.
    pub fn add_with(&mut self, node: &Node, call: &CniCall) -> Result<Duration> {
        let outcome = self.cni(node, call)?;
        let took = outcome.took;
        let result = outcome.ok().with_context(|| format!("ADD of {}", self.name))?;
        self.addresses = tailnet_addresses(&result)?;
        self.result = Some(result);
        Ok(took)
    }

    /// DEL; the answer of ADD is kept, as a runtime's cache keeps it for a second DEL.
    ///
    /// # Errors
    /// With the plugin's own words when it fails.
    pub fn del(&self, node: &Node) -> Result<Duration> {
        let outcome = self.cni(node, &CniCall::new("DEL"))?;
        let took = outcome.took;
        outcome.ok().with_context(|| format!("DEL of {}", self.name))?;
        Ok(took)
    }

    /// CHECK.
    ///
    /// # Errors
    /// With the plugin's own words when it fails.
    pub fn check(&self, node: &Node) -> Result<()> {
        self.cni(node, &CniCall::new("CHECK"))?.ok().map(drop)
    }

    /// What ADD answered.
    #[must_use]
    pub fn result(&self) -> Option<&Value> {
        self.result.as_ref()
    }

    /// Its addresses in the tailnet, IPv4 first.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Its IPv4 address in the tailnet.
    ///
    /// # Errors
    /// Before ADD.
    pub fn v4(&self) -> Result<IpAddr> {
        self.address(IpAddr::is_ipv4)
    }

    /// Its IPv6 address in the tailnet.
    ///
    /// # Errors
    /// Before ADD.
    pub fn v6(&self) -> Result<IpAddr> {
        self.address(IpAddr::is_ipv6)
    }

    fn address(&self, wanted: fn(&IpAddr) -> bool) -> Result<IpAddr> {
        let found = self.addresses.iter().copied().find(wanted);
        found.with_context(|| format!("{} has no such address", self.name))
    }

    /// An address and port of this pod for its peers to dial.
    ///
    /// # Errors
    /// Before ADD.
    pub fn at(&self, port: u16) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.v4()?, port))
    }

    /// Takes the sandbox away, as a runtime does after DEL.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn destroy(self, node: &Node) -> Result<()> {
        block_on(async {
            let netlink = Netlink::open(&node.netns).await?;
            netlink.delete_link(&self.host_port).await.map_err(anyhow::Error::from)
        })?;
        Ok(netns::unpin(&self.netns_path)?)
    }
}

/// Runs the plugin with exactly this environment and stdin.
///
/// # Errors
/// When it cannot be started or writes something else than JSON.
pub(super) fn run_plugin(
    node: &Node,
    environment: &[(&'static str, String)],
    stdin: &str,
) -> Result<CniOutcome> {
    let started = Instant::now();
    let program: &Path = node.cni_program();
    let mut child = node
        .command(program)
        .env_clear()
        .envs(environment.iter().map(|(k, v)| (k, v)))
        .envs(node.environment().iter().cloned())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", program.display()))?;
    if let Some(mut input) = child.stdin.take() {
        // The plugin may refuse its environment before it reads anything.
        let _ = input.write_all(stdin.as_bytes());
    }
    let output = child.wait_with_output()?;
    let took = started.elapsed();
    let text = String::from_utf8_lossy(&output.stdout);
    let answer = match text.trim() {
        "" => Value::Null,
        json => serde_json::from_str(json).with_context(|| format!("the plugin's stdout: {json}"))?,
    };
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(CniOutcome { success: output.status.success(), answer, stderr, took })
}

/// The addresses of a result that lie on the interface called `ts0`.
fn tailnet_addresses(result: &Value) -> Result<Vec<IpAddr>> {
    let interfaces = result["interfaces"].as_array().context("the result lists no interfaces")?;
    let index = interfaces.iter().position(|i| i["name"] == "ts0").context("the result has no ts0")?;
    let mut found = Vec::new();
    for ip in result["ips"].as_array().context("the result lists no addresses")? {
        if ip["interface"].as_u64() == u64::try_from(index).ok() {
            let net: IpNet = ip["address"].as_str().unwrap_or_default().parse()?;
            found.push(net.addr());
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_interface_counts() {
        let result = json!({
            "interfaces": [{ "name": "eth0" }, { "name": "ts0" }],
            "ips": [
                { "address": "10.244.1.2/24", "interface": 0 },
                { "address": "fd7a:115c:a1e0::1/128", "interface": 1 },
                { "address": "100.64.0.1/32", "interface": 1 },
                { "address": "192.0.2.1/32" },
            ],
        });
        let texts: Vec<String> =
            tailnet_addresses(&result).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["100.64.0.1", "fd7a:115c:a1e0::1"]);
        assert!(tailnet_addresses(&json!({ "interfaces": [{ "name": "eth0" }], "ips": [] })).is_err());
    }
}
