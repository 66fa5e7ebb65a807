//! A certificate authority for a devnet or a test: one root and one server certificate.

use std::ops::Range;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::TlsAcceptor;

use crate::StartError;

/// A server certificate, its key and its root, all PEM: for another server that a test starts.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The root, for clients' trust stores.
    pub root: String,
    /// The server's certificate.
    pub certificate: String,
    /// The server's private key.
    pub key: String,
}

/// Makes a root and a server certificate for `names`, DNS names and textual addresses alike.
///
/// # Errors
/// When a name does not fit a certificate.
pub fn issue(names: Vec<String>) -> Result<Issued, StartError> {
    issue_for(names, 1975..4096)
}

/// As [`issue`], a certificate for the years `years`.
///
/// # Errors
/// When a name does not fit a certificate.
pub fn issue_for(names: Vec<String>, years: Range<i32>) -> Result<Issued, StartError> {
    let (root, certificate, key) = make(names, years)?;
    Ok(Issued { root: root.pem(), certificate: certificate.pem(), key: key.serialize_pem() })
}

/// A root certificate and the TLS acceptor that serves under it.
pub(crate) struct Authority {
    /// The root, for clients' trust stores.
    pub(crate) root_pem: String,
    /// Serves a certificate for all names given at start. No ALPN: both users speak HTTP/1.1.
    pub(crate) acceptor: TlsAcceptor,
}

impl Authority {
    /// Makes a root and a certificate valid for `names`, DNS names and textual addresses alike.
    ///
    /// # Errors
    /// When a name does not fit a certificate.
    pub(crate) fn new(names: Vec<String>) -> Result<Self, StartError> {
        let (root_certificate, leaf_certificate, leaf_key) = make(names, 1975..4096)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(
                vec![leaf_certificate.der().clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(leaf_key.serialize_der())),
            )?;
        Ok(Self { root_pem: root_certificate.pem(), acceptor: TlsAcceptor::from(Arc::new(config)) })
    }
}

fn make(names: Vec<String>, years: Range<i32>) -> Result<(Certificate, Certificate, KeyPair), StartError> {
    let root_key = KeyPair::generate()?;
    let mut root = CertificateParams::new(Vec::new())?;
    root.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    root.distinguished_name.push(DnType::CommonName, "podtether devnet root");
    let root_certificate = root.self_signed(&root_key)?;

    let leaf_key = KeyPair::generate()?;
    let mut leaf = CertificateParams::new(names)?;
    leaf.distinguished_name.push(DnType::CommonName, "podtether devnet");
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    leaf.not_before = rcgen::date_time_ymd(years.start, 1, 1);
    leaf.not_after = rcgen::date_time_ymd(years.end, 1, 1);
    leaf.use_authority_key_identifier_extension = true;
    let leaf_certificate = leaf.signed_by(&leaf_key, &Issuer::from_params(&root, &root_key))?;
    Ok((root_certificate, leaf_certificate, leaf_key))
}
