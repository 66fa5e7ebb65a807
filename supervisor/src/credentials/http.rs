//! The HTTP client of the admin APIs: rustls with ring, the public roots and a tailnet's own.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use podtether_proto::clock;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::limiter::wall_clock;
use super::roots::Roots;

/// Largest answer that is read: a list of a large tailnet's devices.
const MAX_BODY: usize = 32 << 20;

/// Public roots and those of `extra_pem`.
pub(super) fn root_store(extra_pem: &str) -> Result<RootCertStore, String> {
    let mut store = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let mut found = extra_pem.is_empty();
    for certificate in CertificateDer::pem_slice_iter(extra_pem.as_bytes()) {
        let certificate = certificate.map_err(|e| format!("holds a broken certificate: {e}"))?;
        store.add(certificate).map_err(|e| format!("holds an unusable certificate: {e}"))?;
        found = true;
    }
    if !found {
        return Err("holds no certificate (PEM)".into());
    }
    Ok(store)
}

/// A client that is made anew when the roots change.
#[derive(Debug)]
pub(crate) struct Http {
    roots: Arc<Roots>,
    made: Mutex<(u64, reqwest::Client)>,
}

impl Http {
    pub(crate) fn new(roots: Arc<Roots>) -> Result<Http, String> {
        let (version, pem) = roots.now();
        let made = Mutex::new((version, client(&pem)?));
        Ok(Http { roots, made })
    }

    /// The client for the roots as they are now.
    pub(crate) fn now(&self) -> reqwest::Client {
        let (version, pem) = self.roots.now();
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.0 != version {
            match client(&pem) {
                Ok(client) => *made = (version, client),
                Err(e) => tracing::error!("{e}"),
            }
        }
        made.1.clone()
    }
}

/// A client that trusts the public roots and those in `pem`.
pub(crate) fn client(pem: &str) -> Result<reqwest::Client, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(root_store(pem)?)
        .with_no_client_auth();
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .connect_timeout(Duration::from_secs(5))
        .timeout(Duration::from_secs(20))
        .pool_idle_timeout(Duration::from_secs(30))
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("podtether/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|e| format!("cannot make an HTTP client: {e}"))
}

/// The whole body, bounded.
pub(crate) async fn body(mut response: reqwest::Response) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| say(&e))? {
        if body.len() + chunk.len() > MAX_BODY {
            return Err("the answer is too long".into());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// An error and its causes in one line, without the URL's query.
pub(crate) fn say(e: &reqwest::Error) -> String {
    let mut text = e.to_string();
    let mut cause = std::error::Error::source(e);
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    clock::blamed(text, wall_clock())
}
