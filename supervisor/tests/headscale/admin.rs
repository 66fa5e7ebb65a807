//! Headscale's first admin API as an administrator uses it; the same for the devnet and the real one.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::Method;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};

use crate::rig::Rig;

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A server and the right to command it.
#[derive(Clone)]
pub(crate) struct Admin {
    pub(crate) url: String,
    pub(crate) key: String,
    pub(crate) ca: String,
}

impl Admin {
    /// A supervisor that joins pods with the API key; `more` is of the credentials table.
    pub(crate) fn rig(&self, dir: &Path, tags: &str, more: &str) -> Rig {
        std::fs::write(dir.join("ca.pem"), &self.ca).unwrap();
        std::fs::write(dir.join("api-key"), &self.key).unwrap();
        let dir_text = dir.display();
        let table = format!(
            "[tailnet.default]\ncontrol_url = {:?}\ntags = [{tags}]\nca_file = \"{dir_text}/ca.pem\"\n\
             [tailnet.default.credentials]\nkind = \"headscale\"\napi_key_file = \"{dir_text}/api-key\"\n{more}\n",
            self.url
        );
        Rig::new(dir, &table)
    }

    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Value {
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(self.ca.as_bytes()) {
            roots.add(certificate.unwrap()).unwrap();
        }
        let tls =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
        let client = reqwest::Client::builder().tls_backend_preconfigured(tls).build().unwrap();
        let mut request = client.request(method, format!("{}{path}", self.url)).bearer_auth(&self.key);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.unwrap();
        let (status, text) = (answer.status(), answer.text().await.unwrap());
        assert!(status.is_success(), "{path}: {status} {text}");
        serde_json::from_str(&text).unwrap()
    }

    pub(crate) async fn nodes(&self) -> Vec<Value> {
        self.ask(Method::GET, "/api/v1/node", None).await["nodes"].as_array().unwrap().clone()
    }

    /// The node of the rig's pod `pod`, null when there is none.
    pub(crate) async fn node(&self, pod: &str) -> Value {
        let name = format!("k8s-default-{pod}");
        self.nodes().await.into_iter().find(|n| n["name"] == name.as_str()).unwrap_or_default()
    }

    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let start = Instant::now();
        loop {
            let nodes = self.nodes().await;
            if wanted(&nodes) {
                return nodes;
            }
            assert!(start.elapsed() < PATIENCE, "not {what}: {nodes:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(crate) async fn expire(&self, pod: &str) {
        let id = self.node(pod).await["id"].as_str().unwrap().to_owned();
        self.ask(Method::POST, &format!("/api/v1/node/{id}/expire"), Some(json!({}))).await;
    }

    pub(crate) async fn delete(&self, pod: &str) {
        let id = self.node(pod).await["id"].as_str().unwrap().to_owned();
        self.ask(Method::DELETE, &format!("/api/v1/node/{id}"), None).await;
    }

    pub(crate) async fn add_user(&self, name: &str, display_name: &str) -> String {
        let body = json!({"name": name, "displayName": display_name});
        let answer = self.ask(Method::POST, "/api/v1/user", Some(body)).await;
        answer["user"]["id"].as_str().unwrap().to_owned()
    }

    /// `name` as it stands in a URL.
    pub(crate) async fn rename_user(&self, id: &str, name: &str) {
        self.ask(Method::POST, &format!("/api/v1/user/{id}/rename/{name}"), None).await;
    }

    /// Keys that could still let a node in.
    pub(crate) async fn live_keys(&self) -> usize {
        let answer = self.ask(Method::GET, "/api/v1/preauthkey", None).await;
        let now = podtether_core::tailcfg::UnixTime::from_secs(
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap()
                .as_secs()
                .try_into()
                .unwrap(),
        );
        let live = |key: &&Value| {
            let until: podtether_core::tailcfg::UnixTime =
                key["expiration"].as_str().unwrap().parse().unwrap();
            key["used"] == false && until > now.saturating_add(Duration::from_secs(5))
        };
        answer["preAuthKeys"].as_array().unwrap().iter().filter(live).count()
    }
}
