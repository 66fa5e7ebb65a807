//! One node of a lab with its devnet, and what every refusal is held to.

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use podtether_devnet::lab::{CniCall, CniOutcome, HostState, Lab, Node, Pod, Programs, Tailnet, host_state};
use podtether_devnet::{Devnet, DevnetConfig};
use podtether_net::netlink::Netlink;
use podtether_net::testing::block_on;
use serde_json::Value;

/// How long something that has to come may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);

pub(crate) struct Place {
    pub(crate) lab: Lab,
    pub(crate) node: Node,
    pub(crate) devnet: Devnet,
    pub(crate) ca: PathBuf,
    /// Everything that was printed.
    said: Mutex<String>,
    /// What must not be in it.
    secrets: Mutex<Vec<String>>,
}

pub(crate) fn programs() -> Programs {
    Programs::find(Path::new(env!("CARGO_BIN_EXE_podtether-supervisor"))).unwrap()
}

impl Place {
    /// A node that is configured for nothing yet.
    pub(crate) fn bare(dir: &Path, config: DevnetConfig) -> Place {
        let mut lab = Lab::new(dir, programs()).unwrap();
        let (devnet, ca) = lab.start_devnet(config).unwrap();
        let node = lab.add_node("node").unwrap();
        let place = Place { lab, node, devnet, ca, said: Mutex::default(), secrets: Mutex::default() };
        place.secret(place.devnet.oauth_client().1);
        place
    }

    /// A node whose supervisor joins pods with keys minted through the devnet's API.
    pub(crate) fn new(dir: &Path) -> Place {
        let mut place = Place::bare(dir, DevnetConfig::default());
        place.node.configure(&[Tailnet::oauth("default", &place.devnet, &place.ca)], "").unwrap();
        place.node.start_supervisor().unwrap();
        place
    }

    pub(crate) fn pod(&mut self, name: &str) -> Pod {
        let pod = self.node.create_pod(name).unwrap();
        // The bridge follows its first port a moment later, and would count as a change.
        block_on(async {
            let netlink = Netlink::open(&self.node.netns).await.unwrap();
            netlink.wait_running("cni0").await.unwrap();
        });
        pod
    }

    pub(crate) fn secret(&self, secret: &str) {
        self.secrets.lock().unwrap().push(secret.to_owned());
    }

    pub(crate) fn heard(&self, text: &str) {
        let mut said = self.said.lock().unwrap();
        said.push_str(text);
        said.push('\n');
    }

    /// Everything a refused call could have changed: the node, and the pod.
    pub(crate) fn state(&self, pod: &Pod) -> (HostState, HostState) {
        (self.node.host_state().unwrap(), host_state(&pod.netns, &[]).unwrap())
    }

    #[track_caller]
    pub(crate) fn unchanged(&self, what: &str, pod: &Pod, before: &(HostState, HostState)) {
        assert_eq!(self.changes(pod, before), [""; 0], "{what} left something behind");
    }

    /// What differs from `before` on the node and in the pod.
    pub(crate) fn changes(&self, pod: &Pod, before: &(HostState, HostState)) -> Vec<String> {
        let after = self.state(pod);
        let mut diff = before.0.diff(&after.0);
        diff.extend(before.1.diff(&after.1));
        diff.sort();
        diff.dedup();
        diff
    }

    /// As [`Place::unchanged`], for what goes on in the background for a moment.
    pub(crate) fn soon_unchanged(&self, what: &str, pod: &Pod, before: &(HostState, HostState)) {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if self.changes(pod, before).is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.unchanged(what, pod, before);
    }

    /// Runs the plugin as this runtime would.
    pub(crate) fn call(&self, pod: &Pod, call: &CniCall) -> CniOutcome {
        self.raw(&pod.environment(&call.verb), pod.stdin(&self.node, call).to_string().as_bytes())
    }

    /// Runs the plugin with any environment and any bytes.
    pub(crate) fn raw(&self, environment: &[(&'static str, String)], stdin: &[u8]) -> CniOutcome {
        let started = Instant::now();
        let mut child = self
            .node
            .command(&programs().cni)
            .env_clear()
            .envs(environment.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It may have answered without reading.
        let _ = child.stdin.take().unwrap().write_all(stdin);
        let output = child.wait_with_output().unwrap();
        let took = started.elapsed();
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        self.heard(&format!("{stdout}{stderr}"));
        let answer = if stdout.is_empty() { Value::Null } else { serde_json::from_str(&stdout).unwrap() };
        CniOutcome { success: output.status.success(), answer, stderr, took }
    }

    /// A call that has to fail with this code and say these things.
    #[track_caller]
    pub(crate) fn refused(
        &self,
        what: &str,
        pod: &Pod,
        call: &CniCall,
        code: u64,
        says: &[&str],
    ) -> CniOutcome {
        let outcome = self.call(pod, call);
        refusal(what, &outcome, code, says);
        outcome
    }

    #[track_caller]
    pub(crate) fn add(&self, pod: &mut Pod) -> Value {
        pod.add(&self.node).unwrap_or_else(|e| panic!("{e:#}\n{}", self.node.log_end(30)));
        self.note_keys();
        pod.result().unwrap().clone()
    }

    #[track_caller]
    pub(crate) fn succeeds(&self, what: &str, pod: &Pod, call: &CniCall) -> Value {
        let outcome = self.call(pod, call);
        assert!(outcome.success, "{what}: {} {}\n{}", outcome.answer, outcome.stderr, self.node.log_end(30));
        outcome.answer
    }

    /// The pod leaves, and with it its device.
    #[track_caller]
    pub(crate) fn del(&self, pod: &Pod) {
        self.note_keys();
        self.succeeds("DEL", pod, &CniCall::new("DEL"));
    }

    pub(crate) fn wait(&self, what: &str, wanted: impl Fn() -> bool) {
        let start = Instant::now();
        while !wanted() {
            assert!(start.elapsed() < PATIENCE, "not {what}\n{}", self.node.log_end(30));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[track_caller]
    pub(crate) fn no_devices(&self) {
        let gone = block_on(self.devnet.wait_for(PATIENCE, <[_]>::is_empty));
        assert!(gone, "{:?}\n{}", self.devnet.nodes(), self.node.log_end(30));
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.node.log()).unwrap_or_default()
    }

    /// Remembers the private keys that are on disk now, in the ways they could be printed.
    pub(crate) fn note_keys(&self) {
        for entry in fs::read_dir(self.node.state_dir().join("identities")).unwrap().flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let Ok(record) = serde_json::from_str::<Value>(&text) else { continue };
            for name in ["machine_key", "node_key"] {
                let Some(list) = record["body"][name].as_array() else {
                    panic!("{name} is no list of bytes")
                };
                let decimal: Vec<String> = list.iter().map(ToString::to_string).collect();
                let bytes = list.iter().map(|n| format!("{:02x}", n.as_u64().unwrap()));
                self.secret(&bytes.collect::<String>());
                self.secret(&decimal.join(","));
                self.secret(&decimal.join(", "));
            }
        }
    }

    /// No secret in what the plugin printed, what the supervisor and its engines logged, or what they serve.
    pub(crate) fn secrets_kept(&self) {
        for key in self.devnet.auth_keys() {
            self.secret(&key.secret);
        }
        let mut texts = vec![("the plugin", self.said.lock().unwrap().clone()), ("the log", self.log())];
        for path in ["/v1/pods", "/metrics"] {
            texts.extend(self.node.http_get(path).ok().map(|text| (path, text)));
        }
        for (place, text) in texts {
            for secret in self.secrets.lock().unwrap().iter().filter(|s| !s.is_empty()) {
                assert!(!text.contains(secret.as_str()), "{place} shows the secret {secret}");
            }
            for word in ["privkey:", "tskey-", "hskey-", "Bearer "] {
                let shown = text.find(word).map(|at| &text[at..text.len().min(at + 60)]);
                assert_eq!(shown, None, "{place} shows something like a secret");
            }
            stray_keys(place, &text);
        }
    }

    /// Ends the test: the supervisor stops cleanly and nothing was shown.
    pub(crate) fn finish(mut self) {
        self.secrets_kept();
        let status = self.node.stop_supervisor().unwrap().unwrap();
        assert!(status.success(), "{status}\n{}", self.node.log_end(30));
        self.secrets_kept();
        assert_eq!(self.devnet.complaints(), [""; 0]);
    }
}

/// 64 hex digits without a public key's prefix are a private key, or look like one.
fn stray_keys(place: &str, text: &str) {
    let mut run = 0;
    for (at, c) in text.char_indices().chain([(text.len(), ' ')]) {
        if c.is_ascii_hexdigit() {
            run += 1;
            continue;
        }
        if run == 64 {
            let before = &text[..at - 64];
            let public = ["nodekey:", "mkey:", "discokey:", "chalpub:"].iter().any(|p| before.ends_with(p));
            assert!(public, "{place} shows 32 bytes: …{}", &text[at.saturating_sub(140)..at]);
        }
        run = 0;
    }
}

/// Code, shape and words of a refusal.
#[track_caller]
pub(crate) fn refusal(what: &str, outcome: &CniOutcome, code: u64, says: &[&str]) {
    let answer = &outcome.answer;
    println!(
        "{what}: {} {} | {} ({:.1?})",
        answer["code"],
        answer["msg"].as_str().unwrap_or_default(),
        answer["details"].as_str().unwrap_or_default(),
        outcome.took
    );
    assert!(!outcome.success, "{what} succeeded: {answer}");
    assert_eq!(answer["code"], code, "{what}: {answer}");
    assert!(answer["cniVersion"].is_string(), "{what}: {answer}");
    let text = format!("{} {}", answer["msg"].as_str().unwrap(), answer["details"].as_str().unwrap());
    for words in says {
        assert!(text.contains(words), "{what} does not say {words:?}: {text}");
    }
    assert!(text.len() < 700 && !text.contains('\n'), "{what} is no sentence: {text}");
    assert!(!answer["details"].as_str().unwrap().is_empty(), "{what} does not say what to do: {text}");
}

/// A call with a short patience.
pub(crate) fn brief(verb: &str, timeout_s: u32) -> CniCall {
    CniCall { timeout_s, ..CniCall::new(verb) }
}

/// A call of the version that has every verb.
pub(crate) fn newest(verb: &str) -> CniCall {
    CniCall { version: "1.1.0".into(), ..CniCall::new(verb) }
}

/// Works on the links of the pod's namespace.
pub(crate) fn in_pod<T>(pod: &Pod, work: impl AsyncFnOnce(Netlink) -> T) -> T {
    block_on(async { work(Netlink::open(&pod.netns).await.unwrap()).await })
}

/// Addresses of `ts0` as the kernel has them.
pub(crate) fn ts0_addresses(pod: &Pod) -> Vec<IpAddr> {
    in_pod(pod, async |netlink| {
        let Some(link) = netlink.link("ts0").await.unwrap() else { return Vec::new() };
        let all = netlink.addresses().await.unwrap();
        let mut found: Vec<IpAddr> =
            all.iter().filter(|a| a.link == link.index).map(|a| a.net.addr()).collect();
        found.sort();
        found
    })
}
