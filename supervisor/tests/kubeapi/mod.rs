//! A stand-in for the API server: pods, namespaces and events over HTTP/1.1, with watches as real ones stream
//! them, and the faults that real ones have.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, patch, post};
use axum::{Json, Router};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::sync::watch;

/// What is wrong with it.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// Before every answer.
    pub delay: Duration,
    /// Connections are closed and none is served.
    pub down: bool,
    /// Verb and resource (`list pods`, `patch pods/status`) that RBAC does not give.
    pub forbidden: BTreeSet<String>,
    /// Watches send what is no JSON before each event.
    pub garbage: bool,
    /// Watches end before they say anything.
    pub mute: bool,
    /// Whatever is asked for has to come with this token.
    pub token: Option<String>,
    /// So many patches are told that somebody else was faster.
    pub conflicts: u32,
}

#[derive(Default)]
struct Inner {
    /// `pods` or `namespaces`, then namespace and name.
    objects: BTreeMap<(String, String, String), Value>,
    version: u64,
    /// What changed: version, resource, event.
    log: Vec<(u64, String, Value)>,
    /// Everything up to here is forgotten.
    forgotten: u64,
    faults: Faults,
    /// Objects of a page of a list, whatever is asked for.
    page: Option<usize>,
    requests: Vec<String>,
    events: Vec<Value>,
    patches: Vec<(String, Value)>,
    uids: u64,
}

#[derive(Clone)]
struct Shared {
    inner: Arc<Mutex<Inner>>,
    /// Tells of each change.
    news: watch::Sender<u64>,
}

/// The server, on a thread of its own until the process ends.
#[derive(Clone)]
pub struct KubeApi {
    shared: Shared,
    pub url: String,
}

impl KubeApi {
    pub fn start() -> KubeApi {
        let shared = Shared { inner: Arc::default(), news: watch::Sender::new(0) };
        let served = shared.clone();
        let (told, address) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                told.send(listener.local_addr().unwrap()).unwrap();
                serve(listener, served).await;
            });
        });
        let api = KubeApi { shared, url: format!("http://{}", address.recv().unwrap()) };
        api.namespace("default", &[]);
        api.namespace("kube-system", &[]);
        api
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.shared.inner.lock().unwrap()
    }

    fn put(&self, resource: &str, namespace: &str, name: &str, object: Value) {
        self.shared.change(|inner| {
            inner.put(resource, namespace, name, object);
        });
    }

    /// Makes or changes a namespace.
    pub fn namespace(&self, name: &str, annotations: &[(&str, &str)]) {
        let annotations: HashMap<&str, &str> = annotations.iter().copied().collect();
        let object =
            json!({"metadata": {"name": name, "uid": format!("ns-{name}"), "annotations": annotations}});
        self.put("namespaces", "", name, object);
    }

    pub fn delete_namespace(&self, name: &str) {
        self.shared.change(|inner| inner.remove("namespaces", "", name));
    }

    /// Makes a pod of the node `node-1`.
    pub fn pod(&self, namespace: &str, name: &str, uid: &str, annotations: &[(&str, &str)]) {
        let annotations: HashMap<&str, &str> = annotations.iter().copied().collect();
        let object = json!({
            "metadata": {"name": name, "namespace": namespace, "uid": uid, "annotations": annotations},
            "spec": {"nodeName": "node-1", "containers": []},
            "status": {"phase": "Pending"},
        });
        self.put("pods", namespace, name, object);
    }

    /// Merges into a pod.
    pub fn change_pod(&self, namespace: &str, name: &str, change: Value) {
        let mut object = self.get_pod(namespace, name).unwrap();
        merge(&mut object, change);
        self.put("pods", namespace, name, object);
    }

    pub fn get_pod(&self, namespace: &str, name: &str) -> Option<Value> {
        self.inner().objects.get(&("pods".into(), namespace.into(), name.into())).cloned()
    }

    /// The pod is no more.
    pub fn delete_pod(&self, namespace: &str, name: &str) {
        self.shared.change(|inner| inner.remove("pods", namespace, name));
    }

    /// Forgets all that changed up to now and ends the watches: who goes on from there is told 410.
    pub fn forget(&self) {
        self.shared.change(|inner| {
            inner.version += 10;
            inner.forgotten = inner.version;
            inner.log.clear();
        });
    }

    pub fn fault(&self, change: impl FnOnce(&mut Faults)) {
        self.shared.change(|inner| change(&mut inner.faults));
    }

    /// Pages of lists hold no more than so many objects.
    pub fn page(&self, objects: usize) {
        self.inner().page = Some(objects);
    }

    /// Events that were made.
    pub fn events(&self) -> Vec<Value> {
        self.inner().events.clone()
    }

    /// As time makes it.
    pub fn forget_events(&self) {
        self.shared.change(|inner| inner.events.clear());
    }

    /// Of one pod: type, reason, message.
    pub fn events_of(&self, pod: &str) -> Vec<(String, String, String)> {
        let text = |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
        let of = |event: &&Value| event["involvedObject"]["name"] == pod || event["regarding"]["name"] == pod;
        let inner = self.inner();
        let events = inner.events.iter().filter(of);
        events.map(|e| (text(e, "type"), text(e, "reason"), text(e, "message"))).collect()
    }

    /// Path and body of every patch.
    pub fn patches(&self) -> Vec<(String, Value)> {
        self.inner().patches.clone()
    }

    /// Verb and resource of every call.
    pub fn requests(&self) -> Vec<String> {
        self.inner().requests.clone()
    }

    /// Waits until `wanted` holds of it.
    pub async fn until<T>(&self, what: &str, wanted: impl Fn(&KubeApi) -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = wanted(self) {
                return found;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "not: {what}; {:?}", self.requests());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// A server that nobody believes: its certificate is for the years `years`. Its URL, and the root that it has its
/// certificate from.
pub fn out_of_time(years: std::ops::Range<i32>) -> (String, String) {
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let issued = podtether_devnet::ca::issue_for(vec!["127.0.0.1".into()], years).unwrap();
    let certificate = CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
    let config = tokio_rustls::rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let (told, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            told.send(listener.local_addr().unwrap()).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let _ = acceptor.accept(stream).await;
            }
        });
    });
    (format!("https://{}", address.recv().unwrap()), issued.root)
}

impl Inner {
    fn put(&mut self, resource: &str, namespace: &str, name: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let key = (resource.to_owned(), namespace.to_owned(), name.to_owned());
        let kind = if self.objects.contains_key(&key) { "MODIFIED" } else { "ADDED" };
        self.log.push((self.version, resource.to_owned(), json!({"type": kind, "object": object})));
        self.objects.insert(key, object.clone());
        object
    }

    fn remove(&mut self, resource: &str, namespace: &str, name: &str) {
        let key = (resource.to_owned(), namespace.to_owned(), name.to_owned());
        if let Some(mut object) = self.objects.remove(&key) {
            self.version += 1;
            object["metadata"]["resourceVersion"] = self.version.to_string().into();
            let event = json!({"type": "DELETED", "object": object});
            self.log.push((self.version, resource.to_owned(), event));
        }
    }
}

/// What is left of an object for who asks for its metadata alone.
fn metadata_of(object: &Value) -> Value {
    json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": object["metadata"]})
}

/// RFC 7386.
fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                if value.is_null() {
                    into.remove(&key);
                } else {
                    let slot = into.entry(key).or_insert(Value::Null);
                    if value.is_object() && !slot.is_object() {
                        *slot = json!({});
                    }
                    merge(slot, value);
                }
            }
        }
        (into, from) => *into = from,
    }
}

impl Shared {
    fn change<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.inner.lock().unwrap();
        let done = work(&mut inner);
        drop(inner);
        self.news.send_modify(|n| *n += 1);
        done
    }

    /// Waits as long as answers take, and refuses what RBAC does.
    async fn pass(&self, verb: &str, resource: &str, headers: &HeaderMap) -> Result<(), Response> {
        let faults = {
            let mut inner = self.inner.lock().unwrap();
            inner.requests.push(format!("{verb} {resource}"));
            inner.faults.clone()
        };
        tokio::time::sleep(faults.delay).await;
        let shown = headers.get("authorization").and_then(|v| v.to_str().ok()).unwrap_or_default();
        if faults.token.is_some_and(|token| shown != format!("Bearer {token}")) {
            return Err(status(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized"));
        }
        if faults.forbidden.contains(&format!("{verb} {resource}")) {
            let message = format!(
                "{resource} is forbidden: User \"system:serviceaccount:podtether:podtether\" cannot {verb} resource \"{resource}\""
            );
            return Err(status(StatusCode::FORBIDDEN, "Forbidden", &message));
        }
        Ok(())
    }
}

fn status(code: StatusCode, reason: &str, message: &str) -> Response {
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(),
                      "reason": reason, "message": message});
    (code, Json(body)).into_response()
}

async fn serve(listener: tokio::net::TcpListener, shared: Shared) {
    let routes = Router::new()
        .route("/api/v1/pods", get(pods))
        .route("/api/v1/namespaces", get(namespaces))
        .route("/api/v1/namespaces/{namespace}/pods/{name}", any(pod))
        .route("/api/v1/namespaces/{namespace}/pods/{name}/status", any(pod))
        .route("/api/v1/namespaces/{namespace}/events", post(event))
        .route("/api/v1/namespaces/{namespace}/events/{name}", patch(count_event))
        .fallback(async |uri: Uri| status(StatusCode::NOT_FOUND, "NotFound", &uri.to_string()))
        .with_state(shared.clone());
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let mut news = shared.news.subscribe();
        let is_down = |shared: &Shared| shared.inner.lock().unwrap().faults.down;
        if is_down(&shared) {
            continue;
        }
        let (service, shared) = (TowerToHyperService::new(routes.clone()), shared.clone());
        tokio::spawn(async move {
            let connection =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            let down = async { while !is_down(&shared) && news.changed().await.is_ok() {} };
            tokio::select! {
                _ = connection => {}
                () = down => {}
            }
        });
    }
}

async fn pods(
    State(shared): State<Shared>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Response {
    let selector = query.get("fieldSelector").cloned().unwrap_or_default();
    let node = selector.strip_prefix("spec.nodeName=").map(str::to_owned);
    list_or_watch(shared, "pods", query, headers, move |object| {
        node.as_ref().is_none_or(|node| object["spec"]["nodeName"] == *node)
    })
    .await
}

async fn namespaces(
    State(shared): State<Shared>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Response {
    list_or_watch(shared, "namespaces", query, headers, |_| true).await
}

async fn list_or_watch(
    shared: Shared,
    resource: &'static str,
    query: HashMap<String, String>,
    headers: HeaderMap,
    matches: impl Fn(&Value) -> bool + Send + Sync + 'static,
) -> Response {
    let watches = query.get("watch").is_some_and(|w| w == "1" || w == "true");
    if let Err(refused) = shared.pass(if watches { "watch" } else { "list" }, resource, &headers).await {
        return refused;
    }
    let accept = headers.get("accept").and_then(|v| v.to_str().ok()).unwrap_or_default();
    let form = if accept.contains("as=PartialObjectMetadata") { metadata_of } else { Value::clone };
    if watches {
        let from = query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
        return watch_from(shared, resource, from, matches, form);
    }
    let limit: usize = query.get("limit").and_then(|l| l.parse().ok()).unwrap_or(usize::MAX);
    let skip: usize = query.get("continue").and_then(|c| c.strip_prefix("at/")?.parse().ok()).unwrap_or(0);
    let inner = shared.inner.lock().unwrap();
    // Small pages, whatever is asked for, so that there are several.
    let limit = limit.min(inner.page.unwrap_or(3));
    let of = inner.objects.iter().filter(|((r, ..), object)| r == resource && matches(object));
    let all: Vec<Value> = of.map(|(_, object)| form(object)).collect();
    let mut metadata = json!({"resourceVersion": inner.version.to_string()});
    if all.len() > skip + limit {
        metadata["continue"] = format!("at/{}", skip + limit).into();
    }
    let items: Vec<Value> = all.into_iter().skip(skip).take(limit).collect();
    Json(json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items})).into_response()
}

fn watch_from(
    shared: Shared,
    resource: &'static str,
    from: u64,
    matches: impl Fn(&Value) -> bool + Send + Sync + 'static,
    form: fn(&Value) -> Value,
) -> Response {
    if shared.inner.lock().unwrap().faults.mute {
        return Response::new(Body::empty());
    }
    if from < shared.inner.lock().unwrap().forgotten {
        return status(StatusCode::GONE, "Expired", "too old resource version");
    }
    let news = shared.news.subscribe();
    let state = (shared, news, from, Arc::new(matches));
    let stream = futures_util::stream::unfold(Some(state), move |state| async move {
        let (shared, mut news, mut at, matches) = state?;
        loop {
            let mut text = String::new();
            {
                let inner = shared.inner.lock().unwrap();
                if at < inner.forgotten {
                    let gone = json!({"type": "ERROR", "object": {"kind": "Status", "code": 410,
                                      "reason": "Expired", "message": "too old resource version"}});
                    return Some((Ok::<_, Infallible>(Bytes::from(format!("{gone}\n"))), None));
                }
                let from = at;
                for (version, of, event) in inner.log.iter().filter(|(version, ..)| *version > from) {
                    at = *version;
                    if of == resource && matches(&event["object"]) {
                        if inner.faults.garbage {
                            text.push_str("{\"type\": nonsense\n");
                        }
                        let told = json!({"type": event["type"], "object": form(&event["object"])});
                        text.push_str(&format!("{told}\n"));
                    }
                }
            }
            if !text.is_empty() {
                return Some((Ok(Bytes::from(text)), Some((shared, news, at, matches))));
            }
            news.changed().await.ok()?;
        }
    });
    Response::new(Body::from_stream(stream))
}

async fn pod(
    State(shared): State<Shared>,
    Path((namespace, name)): Path<(String, String)>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let resource = if uri.path().ends_with("/status") { "pods/status" } else { "pods" };
    let verb = method.as_str().to_lowercase();
    if let Err(refused) = shared.pass(&verb, resource, &headers).await {
        return refused;
    }
    let key = ("pods".to_owned(), namespace.clone(), name.clone());
    let found = shared.inner.lock().unwrap().objects.get(&key).cloned();
    let Some(mut object) = found else {
        return status(StatusCode::NOT_FOUND, "NotFound", &format!("pods \"{name}\" not found"));
    };
    if method == Method::GET {
        return Json(object).into_response();
    }
    let kind = headers.get("content-type").and_then(|v| v.to_str().ok()).unwrap_or_default();
    let Ok(mut patch) = serde_json::from_slice::<Value>(&body) else {
        return status(StatusCode::BAD_REQUEST, "BadRequest", "no JSON");
    };
    {
        let mut inner = shared.inner.lock().unwrap();
        inner.patches.push((uri.path().to_owned(), patch.clone()));
        if inner.faults.conflicts > 0 {
            inner.faults.conflicts -= 1;
            let said =
                format!("Operation cannot be fulfilled on pods \"{name}\": the object has been modified");
            return status(StatusCode::CONFLICT, "Conflict", &said);
        }
    }
    let uid = patch["metadata"].get("uid").cloned();
    if uid.is_some_and(|uid| uid != object["metadata"]["uid"]) {
        return status(StatusCode::CONFLICT, "Conflict", "the UID in the precondition does not match");
    }
    match (kind, resource) {
        ("application/merge-patch+json", "pods") => {
            if patch.get("status").is_some() || patch.get("spec").is_some() {
                return status(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", "not for this");
            }
            merge(&mut object, patch);
        }
        ("application/strategic-merge-patch+json", "pods/status") => {
            // Conditions are merged by their type.
            let conditions = patch["status"]["conditions"].take();
            let mut had = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
            for condition in conditions.as_array().into_iter().flatten() {
                had.retain(|other| other["type"] != condition["type"]);
                had.push(condition.clone());
            }
            object["status"]["conditions"] = had.into();
        }
        _ => return status(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaType", kind),
    }
    let made = shared.change(|inner| inner.put("pods", &namespace, &name, object));
    Json(made).into_response()
}

async fn event(
    State(shared): State<Shared>,
    Path(namespace): Path<String>,
    headers: HeaderMap,
    Json(event): Json<Value>,
) -> Response {
    if let Err(refused) = shared.pass("create", "events", &headers).await {
        return refused;
    }
    let known = |part: &Value| part.as_str().is_some_and(|text| !text.is_empty());
    let about = &event["involvedObject"];
    let whole = known(&event["reason"]) && known(&event["message"]) && known(&event["type"]);
    if !whole || about["namespace"] != namespace || event["metadata"]["namespace"] != namespace {
        return status(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", "an event lacks a field");
    }
    let name = &event["metadata"]["name"];
    if !known(name) || shared.inner.lock().unwrap().events.iter().any(|e| e["metadata"]["name"] == *name) {
        return status(StatusCode::CONFLICT, "AlreadyExists", "an event needs a name of its own");
    }
    shared.change(|inner| inner.events.push(event.clone()));
    (StatusCode::CREATED, Json(event)).into_response()
}

async fn count_event(
    State(shared): State<Shared>,
    Path((namespace, name)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if let Err(refused) = shared.pass("patch", "events", &headers).await {
        return refused;
    }
    if headers.get("content-type").is_none_or(|kind| kind != "application/merge-patch+json") {
        return status(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaType", "");
    }
    let Ok(change) = serde_json::from_slice::<Value>(&body) else {
        return status(StatusCode::BAD_REQUEST, "BadRequest", "no JSON");
    };
    shared.change(|inner| {
        let mut there = inner.events.iter_mut();
        let found = there.find(|e| e["metadata"]["name"] == name && e["metadata"]["namespace"] == namespace);
        let Some(found) = found else {
            return status(StatusCode::NOT_FOUND, "NotFound", &format!("events \"{name}\" not found"));
        };
        merge(found, change);
        Json(found.clone()).into_response()
    })
}
