//! The API server, by the kubectl that this is a plugin of: it knows every way to log in, and how to run a program in a
//! pod.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use clap::ArgMatches;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;

use super::super::text_of;
use super::{Cluster, Ran, Remote};

/// Most that is read of a program's output.
const MAX_OUTPUT: u64 = 64 << 20;
const MAX_COMPLAINT: u64 = 64 << 10;
/// The DaemonSet's container.
const CONTAINER: &str = "supervisor";
/// How kubectl tells, on stderr, that the program in the pod ended with another code than 0.
const ENDED_WITH: &str = "command terminated with exit code ";

/// A cluster behind its API server.
#[derive(Debug, Clone)]
pub struct Kubectl {
    pub(super) program: PathBuf,
    /// Which cluster, before everything else.
    pub(super) common: Vec<String>,
    pub(super) daemonset_namespace: String,
    pub(super) selector: String,
    pub(super) namespace: String,
    pub(super) timeout: Duration,
}

impl Kubectl {
    /// As the command line has it; kubectl is the one on `PATH`, or in `KUBECTL`.
    ///
    /// # Errors
    /// There is no kubectl.
    pub(super) async fn new(matches: &ArgMatches) -> Result<Kubectl, String> {
        let mut common = Vec::new();
        for option in ["context", "kubeconfig"] {
            let value = text_of(matches, option);
            if !value.is_empty() {
                common.push(format!("--{option}={value}"));
            }
        }
        let timeout = matches.get_one::<u16>("timeout").copied().unwrap_or(10);
        let mut kubectl = Kubectl {
            program: std::env::var_os("KUBECTL").map_or_else(|| "kubectl".into(), PathBuf::from),
            common,
            daemonset_namespace: text_of(matches, "podtether-namespace"),
            selector: text_of(matches, "selector"),
            namespace: "default".to_owned(),
            timeout: Duration::from_secs(timeout.into()),
        };
        let asked = kubectl.asked(&["config", "view", "--minify", "-o", "jsonpath={..namespace}"]).await?;
        let named = asked.split_whitespace().next().unwrap_or_default();
        if !named.is_empty() {
            kubectl.namespace = named.to_owned();
        }
        Ok(kubectl)
    }

    /// What a kubectl command prints.
    async fn asked(&self, arguments: &[&str]) -> Result<String, String> {
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let ran = self.kubectl(&arguments).await?;
        match ran.code {
            0 => String::from_utf8(ran.stdout).map_err(|e| e.to_string()),
            _ => Err(complaint(&ran.stderr)),
        }
    }

    async fn kubectl(&self, arguments: &[String]) -> Result<Ran, String> {
        let what = || format!("kubectl {}", arguments.first().map(String::as_str).unwrap_or_default());
        let mut command = Command::new(&self.program);
        command.args(&self.common).args(arguments).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            command.spawn().map_err(|e| format!("{} cannot be run: {e}", self.program.display()))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let run = async {
            let (stdout, stderr) = tokio::join!(read(stdout, MAX_OUTPUT), read(stderr, MAX_COMPLAINT));
            let status = child.wait().await.map_err(|e| format!("{}: {e}", what()))?;
            let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX);
            Ok(Ran { stdout, stderr: String::from_utf8_lossy(&stderr).into_owned(), code })
        };
        let late = || format!("{}: no answer within {} s", what(), self.timeout.as_secs());
        tokio::time::timeout(self.timeout, run).await.unwrap_or_else(|_| Err(late()))
    }
}

async fn read(stream: Option<impl AsyncRead + Unpin>, most: u64) -> Vec<u8> {
    let mut text = Vec::new();
    if let Some(stream) = stream {
        // What came before it broke is all there is; the exit code tells that it broke.
        let _ = stream.take(most).read_to_end(&mut text).await;
    }
    text
}

/// What kubectl complains of, in a line.
fn complaint(stderr: &str) -> String {
    let line = stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing").trim();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

impl Cluster for Kubectl {
    async fn remotes(&self) -> Result<Vec<Remote>, String> {
        let (namespace, selector) = (&self.daemonset_namespace, &self.selector);
        let listed = self.asked(&["get", "pods", "-n", namespace, "-l", selector, "-o", "json"]).await?;
        let listed: Value = serde_json::from_str(&listed).map_err(|e| format!("kubectl get pods: {e}"))?;
        Ok(listed["items"].as_array().into_iter().flatten().filter_map(remote).collect())
    }

    async fn run(&self, pod: &Remote, arguments: &[String]) -> Result<Ran, String> {
        let exec = ["exec", "-n", &self.daemonset_namespace, &pod.pod, "-c", CONTAINER, "--", "podtether"];
        let mut all: Vec<String> = exec.iter().map(|argument| (*argument).to_owned()).collect();
        all.extend_from_slice(arguments);
        ended(self.kubectl(&all).await?)
    }

    async fn node_of(&self, namespace: &str, pod: &str) -> Result<String, String> {
        let node =
            self.asked(&["get", "pod", "-n", namespace, pod, "-o", "jsonpath={.spec.nodeName}"]).await?;
        let node = node.trim();
        if node.is_empty() {
            Err(format!("pod {namespace}/{pod} is on no node yet"))
        } else {
            Ok(node.to_owned())
        }
    }

    fn namespace(&self) -> &str {
        &self.namespace
    }
}

/// How the program in the pod ended; an error where kubectl itself failed.
fn ended(ran: Ran) -> Result<Ran, String> {
    if ran.code == 0 {
        return Ok(ran);
    }
    let (last, said): (Vec<&str>, Vec<&str>) =
        ran.stderr.lines().partition(|line| line.starts_with(ENDED_WITH));
    let code = last.last().and_then(|line| line.strip_prefix(ENDED_WITH)?.trim().parse().ok());
    match code {
        Some(code) => Ok(Ran { stdout: ran.stdout, stderr: said.join("\n"), code }),
        None => Err(complaint(&ran.stderr)),
    }
}

/// A pod of the DaemonSet that is on a node.
fn remote(pod: &Value) -> Option<Remote> {
    let node = pod["spec"]["nodeName"].as_str()?.to_owned();
    let status = &pod["status"];
    let containers = status["containerStatuses"].as_array();
    let state = containers.into_iter().flatten().find(|c| c["name"] == CONTAINER).map(|c| &c["state"]);
    let not_ready = match state {
        Some(state) if state["running"].is_object() => String::new(),
        Some(state) => {
            let reason = |of: &str| state[of]["reason"].as_str().map(str::to_owned);
            reason("waiting").or_else(|| reason("terminated")).unwrap_or_else(|| "it does not run".to_owned())
        }
        None => status["phase"].as_str().unwrap_or("unknown").to_owned(),
    };
    Some(Remote { node, pod: pod["metadata"]["name"].as_str()?.to_owned(), not_ready })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_program_that_failed_is_told_from_a_kubectl_that_did() {
        let ran = |stderr: &str, code| ended(Ran { stdout: Vec::new(), stderr: stderr.into(), code });
        let failed = ran("podtether: no such pod\ncommand terminated with exit code 4\n", 4).unwrap();
        assert_eq!((failed.code, failed.stderr.as_str()), (4, "podtether: no such pod"));
        assert_eq!(ran("", 0).unwrap().code, 0);
        let forbidden = "E1122 memcache.go: x\nError from server (Forbidden): pods \"a\" is forbidden\n";
        assert_eq!(ran(forbidden, 1), Err("Error from server (Forbidden): pods \"a\" is forbidden".into()));
        assert_eq!(ran("error: You must be logged in\n", 1), Err("You must be logged in".into()));
        assert_eq!(ran("", 1), Err("it said nothing".into()));
    }

    #[test]
    fn pods_are_asked_that_run() {
        let pod = |state: Value| {
            remote(&json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n"}, "status": {"phase": "Running",
                "containerStatuses": [{"name": "other", "state": {"running": {}}}, {"name": "supervisor", "state": state}]}}))
            .unwrap()
            .not_ready
        };
        assert_eq!(pod(json!({"running": {"startedAt": "x"}})), "");
        assert_eq!(pod(json!({"waiting": {"reason": "CrashLoopBackOff"}})), "CrashLoopBackOff");
        assert_eq!(pod(json!({"terminated": {"reason": "OOMKilled"}})), "OOMKilled");
        let pending =
            json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n"}, "status": {"phase": "Pending"}});
        assert_eq!(remote(&pending).unwrap().not_ready, "Pending");
        assert_eq!(remote(&json!({"metadata": {"name": "p"}, "spec": {}})), None, "on no node");
    }
}
