//! What is asked of the API server: at the end, whether the DaemonSet that this runs in is being deleted, and
//! once pods can join, that a taint of the node goes.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::credentials::http::{body, client, say};

/// The kubelet waits a few seconds for our end.
const ANSWER_WITHIN: Duration = Duration::from_millis(2500);
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(32);

/// The API server and who asks it.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// Without a slash at its end.
    pub url: String,
    /// Of the service account: `token` and `ca.crt`.
    pub account: PathBuf,
}

/// A DaemonSet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonSet {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// An answer: its status and what it holds.
type Answer = (u16, Value);

impl Cluster {
    async fn call(&self, method: Method, path: &str, patch: Option<&Value>) -> Result<Answer, String> {
        let read = |name: &str| std::fs::read_to_string(self.account.join(name));
        let client = client(&read("ca.crt").unwrap_or_default())?;
        let mut request = client.request(method, format!("{}{path}", self.url)).timeout(ANSWER_WITHIN);
        if let Ok(token) = read("token") {
            request = request.bearer_auth(token.trim());
        }
        if let Some(patch) = patch {
            request = request.header("content-type", "application/json-patch+json").body(patch.to_string());
        }
        let response = request.send().await.map_err(|e| say(&e.without_url()))?;
        let status = response.status().as_u16();
        let bytes = body(response).await?;
        Ok((status, serde_json::from_slice(&bytes).unwrap_or_default()))
    }

    async fn daemon_set(&self, set: &DaemonSet) -> Result<Answer, String> {
        let path = format!("/apis/apps/v1/namespaces/{}/daemonsets/{}", set.namespace, set.name);
        self.call(Method::GET, &path, None).await
    }

    /// Returns when the API server has shown the DaemonSet: from then on it is known what a refusal means.
    pub(super) async fn knows(&self, set: &DaemonSet) {
        let mut pause = FIRST_PAUSE;
        loop {
            let why = match self.daemon_set(set).await {
                Ok((200, _)) => return,
                Ok((status, _)) => format!("the API server answered {status}"),
                Err(e) => e,
            };
            if pause == LONGEST_PAUSE {
                tracing::warn!(
                    "cannot get DaemonSet {}/{}: {why}; until that is mended, podtether-cni stays chained when podtether \
                     is uninstalled: apply the Role that it comes with",
                    set.namespace,
                    set.name
                );
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Whether the DaemonSet is going or gone; `known` when the API server has shown it before.
    pub(super) async fn uninstalls(&self, set: &DaemonSet, known: bool) -> bool {
        // By the verb that the supervisor has anyway.
        let path = format!("/api/v1/namespaces?fieldSelector=metadata.name%3D{}", set.namespace);
        let (itself, namespace) = tokio::join!(self.daemon_set(set), self.call(Method::GET, &path, None));
        let namespace = namespace.ok().map(|(status, list)| (status, list["items"][0].clone()));
        is_going(known, itself.as_ref().ok()) || is_going(known, namespace.as_ref())
    }

    /// Removes taints of this key from the node, however long that takes.
    pub(super) async fn remove_taint(&self, node: &str, key: &str) {
        let path = format!("/api/v1/nodes/{node}");
        let mut pause = FIRST_PAUSE;
        loop {
            let why = match self.call(Method::GET, &path, None).await {
                Ok((200, found)) => {
                    let Some(patch) = without_taint(&found, key) else { return };
                    match self.call(Method::PATCH, &path, Some(&patch)).await {
                        Ok((200, _)) => {
                            tracing::info!(node, taint = key, "pods can join: the taint is removed");
                            return;
                        }
                        Ok((status, said)) => told(status, &said),
                        Err(e) => e,
                    }
                }
                Ok((status, said)) => told(status, &said),
                Err(e) => e,
            };
            tracing::warn!(node, taint = key, "cannot remove the taint yet: {why}");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

fn told(status: u16, said: &Value) -> String {
    let message = said["message"].as_str().unwrap_or_default();
    let message: String = message.chars().filter(|c| !c.is_control()).take(200).collect();
    format!("the API server answered {status}: {message}")
}

/// What an answer says of the DaemonSet, or of its namespace, whose end takes pods before DaemonSets. An API server that
/// does not answer says nothing: the node may be about to restart. One that refuses what it
/// granted before has lost our account or its role, as it does when all of it is deleted at once.
fn is_going(known: bool, answer: Option<&Answer>) -> bool {
    match answer {
        Some((200, set)) => !set["metadata"]["deletionTimestamp"].is_null(),
        Some((401 | 403 | 404, _)) => known,
        Some(_) | None => false,
    }
}

/// The patch that leaves the node's other taints; `None` when it has none of this key. Who changed them since is
/// not overwritten.
fn without_taint(node: &Value, key: &str) -> Option<Value> {
    let taints = node["spec"]["taints"].as_array()?;
    let left: Vec<&Value> = taints.iter().filter(|taint| taint["key"] != key).collect();
    if left.len() == taints.len() {
        return None;
    }
    Some(json!([
        {"op": "test", "path": "/spec/taints", "value": taints},
        {"op": "replace", "path": "/spec/taints", "value": left},
    ]))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::extract::State;
    use axum::http::{HeaderMap, Method, StatusCode, Uri};

    use super::*;

    #[test]
    fn only_a_word_of_the_api_server_uninstalls() {
        let set = |going: bool| {
            let metadata =
                if going { json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}) } else { json!({}) };
            json!({"metadata": metadata})
        };
        let table = [
            (true, Some((200, set(false))), false),
            (true, Some((200, set(true))), true),
            (false, Some((200, set(true))), true),
            (true, Some((404, Value::Null)), true),
            (true, Some((401, Value::Null)), true),
            (true, Some((403, Value::Null)), true),
            (false, Some((403, Value::Null)), false),
            (false, Some((404, Value::Null)), false),
            (true, Some((500, Value::Null)), false),
            (true, Some((429, Value::Null)), false),
            (true, None, false),
            // A namespace that is in no list.
            (true, Some((200, Value::Null)), false),
        ];
        for (known, answer, going) in table {
            assert_eq!(is_going(known, answer.as_ref()), going, "{known} {answer:?}");
        }
    }

    #[test]
    fn other_taints_stay() {
        let [a, b, ours] = ["a", "b", "ours"].map(|key| json!({"key": key, "effect": "NoSchedule"}));
        let node = json!({"spec": {"taints": [a, ours, b]}});
        let patch = without_taint(&node, "ours").unwrap();
        assert_eq!(patch[0]["value"], json!([a, ours, b]));
        assert_eq!(patch[1]["value"], json!([a, b]));
        assert_eq!(without_taint(&node, "other"), None);
        assert_eq!(without_taint(&json!({"spec": {}}), "ours"), None);
    }

    #[tokio::test]
    async fn a_namespace_that_ends_takes_pods_before_daemon_sets() {
        for (going, uninstalls) in [(Value::Null, false), (json!("2026-01-01T00:00:00Z"), true)] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let answer = async move |uri: Uri| {
                let set = json!({"metadata": {"name": "p"}});
                let list = json!({"items": [{"metadata": {"deletionTimestamp": going}}]});
                let of_namespace = uri == "/api/v1/namespaces?fieldSelector=metadata.name%3Dp";
                (if of_namespace { list } else { set }).to_string()
            };
            let routes = axum::Router::new().fallback(answer);
            let served = tokio::spawn(async move { axum::serve(listener, routes).await });
            let cluster = Cluster { url, account: "/nowhere".into() };
            let set = DaemonSet { namespace: "p".into(), name: "p".into() };
            assert_eq!(cluster.uninstalls(&set, true).await, uninstalls);
            served.abort();
        }
    }

    type Seen = Arc<Mutex<Vec<(String, Value)>>>;

    /// Shows one node; the first patch loses a race.
    async fn answer(
        State(seen): State<Seen>,
        method: Method,
        uri: Uri,
        headers: HeaderMap,
        body: String,
    ) -> (StatusCode, String) {
        assert_eq!(headers["authorization"], "Bearer secret");
        let mut seen = seen.lock().unwrap();
        seen.push((format!("{method} {uri}"), serde_json::from_str(&body).unwrap_or_default()));
        if method == Method::GET {
            let taints = json!([{"key": "ours"}, {"key": "a"}]);
            return (StatusCode::OK, json!({"spec": {"taints": taints}}).to_string());
        }
        assert_eq!(headers["content-type"], "application/json-patch+json");
        let patches = seen.iter().filter(|(call, _)| call.starts_with("PATCH")).count();
        let status = if patches == 1 { StatusCode::UNPROCESSABLE_ENTITY } else { StatusCode::OK };
        (status, "{}".to_owned())
    }

    #[tokio::test]
    async fn a_taint_goes_once_and_a_lost_race_is_run_again() {
        let account = tempfile::tempdir().unwrap();
        std::fs::write(account.path().join("token"), "secret\n").unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Seen::default();
        let routes = axum::Router::new().fallback(answer).with_state(Arc::clone(&seen));
        let served = tokio::spawn(async move { axum::serve(listener, routes).await });
        let cluster = Cluster { url, account: account.path().into() };
        tokio::time::timeout(Duration::from_secs(60), cluster.remove_taint("n1", "ours")).await.unwrap();
        let calls: Vec<String> = seen.lock().unwrap().iter().map(|(call, _)| call.clone()).collect();
        let [get, patch] = ["GET /api/v1/nodes/n1", "PATCH /api/v1/nodes/n1"];
        assert_eq!(calls, [get, patch, get, patch]);
        assert_eq!(seen.lock().unwrap()[3].1[1]["value"], json!([{"key": "a"}]));
        served.abort();
    }
}
