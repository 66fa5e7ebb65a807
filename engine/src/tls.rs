//! TLS as a client: the built-in roots plus the operator's, and DERP's two ways of trusting a
//! certificate otherwise.

use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
};

/// How to trust a server's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Trust {
    /// A chain to a root, for the name that is dialled.
    Roots,
    /// A chain to a root, for this name instead of the one that is sent as SNI.
    Name(String),
    /// Exactly the certificate with this SHA-256; such a certificate is usually self-signed.
    Pin([u8; 32]),
    /// Any certificate: for tests, when the DERP map says so.
    Nothing,
}

/// Makes client configurations; roots are parsed once. Clones share them, also when they are replaced.
#[derive(Debug, Clone)]
pub(crate) struct Tls {
    provider: Arc<CryptoProvider>,
    trusted: Arc<RwLock<Trusted>>,
}

#[derive(Debug, Clone)]
struct Trusted {
    roots: Arc<RootCertStore>,
    usual: Arc<ClientConfig>,
}

/// Why `extra_roots_pem` cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the extra CA roots are not PEM certificates: {0}")]
pub(crate) struct BadRoots(String);

impl Tls {
    pub(crate) fn new(extra_roots_pem: &str) -> Result<Self, BadRoots> {
        let provider = Arc::new(ring::default_provider());
        let trusted = Trusted::new(&provider, extra_roots_pem)?;
        Ok(Self { provider, trusted: Arc::new(RwLock::new(trusted)) })
    }

    /// Trusts these beside the built-in roots from the next connection on.
    ///
    /// # Errors
    /// They do not parse; the former ones stay in force.
    pub(crate) fn replace_roots(&self, extra_roots_pem: &str) -> Result<(), BadRoots> {
        let trusted = Trusted::new(&self.provider, extra_roots_pem)?;
        *self.trusted.write().unwrap_or_else(PoisonError::into_inner) = trusted;
        Ok(())
    }

    fn trusted(&self) -> Trusted {
        self.trusted.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The configuration for one server.
    pub(crate) fn client(&self, trust: &Trust) -> Result<Arc<ClientConfig>, Error> {
        let trusted = self.trusted();
        let special = match trust {
            Trust::Roots => return Ok(trusted.usual),
            Trust::Name(name) => {
                let inner = WebPkiServerVerifier::builder_with_provider(trusted.roots, self.provider.clone())
                    .build()
                    .map_err(|e| Error::General(e.to_string()))?;
                let name = ServerName::try_from(name.clone())
                    .map_err(|_| Error::General(format!("{name:?} is not a host name")))?;
                Rule::Name { name, inner }
            }
            Trust::Pin(hash) => Rule::Pin(*hash),
            Trust::Nothing => Rule::Nothing,
        };
        config(&self.provider, Arc::new(Special { rule: special, provider: self.provider.clone() }))
    }
}

impl Trusted {
    fn new(provider: &Arc<CryptoProvider>, extra_roots_pem: &str) -> Result<Self, BadRoots> {
        let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        let built_in = roots.len();
        for certificate in CertificateDer::pem_slice_iter(extra_roots_pem.as_bytes()) {
            let certificate = certificate.map_err(|e| BadRoots(format!("{e:?}")))?;
            roots.add(certificate).map_err(|e| BadRoots(e.to_string()))?;
        }
        if roots.len() == built_in && !extra_roots_pem.trim().is_empty() {
            return Err(BadRoots("no certificate in the text".into()));
        }
        let roots = Arc::new(roots);
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| BadRoots(e.to_string()))?;
        let usual = config(provider, verifier).map_err(|e| BadRoots(e.to_string()))?;
        Ok(Self { roots, usual })
    }
}

fn config(
    provider: &Arc<CryptoProvider>,
    verifier: Arc<dyn ServerCertVerifier>,
) -> Result<Arc<ClientConfig>, Error> {
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[derive(Debug)]
enum Rule {
    Name { name: ServerName<'static>, inner: Arc<WebPkiServerVerifier> },
    Pin([u8; 32]),
    Nothing,
}

/// Replaces the trust in a certificate, never the proof that the server holds its key.
#[derive(Debug)]
struct Special {
    rule: Rule,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Special {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _dialled: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match &self.rule {
            Rule::Name { name, inner } => {
                inner.verify_server_cert(end_entity, intermediates, name, ocsp_response, now)
            }
            Rule::Pin(hash) if sha256(end_entity.as_ref()) == *hash => Ok(ServerCertVerified::assertion()),
            Rule::Pin(_) => Err(CertificateError::Other(OtherError(Arc::new(PinMismatch))).into()),
            Rule::Nothing => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the certificate is not the one that the DERP map pins")]
struct PinMismatch;

/// The provider's own hash; saves a dependency.
fn sha256(data: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    if let Some(suite) = ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256.tls13() {
        let hash = suite.common.hash_provider.hash(data);
        if hash.as_ref().len() == out.len() {
            out.copy_from_slice(hash.as_ref());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_is_sha256() {
        let abc = hex_of(&sha256(b"abc"));
        assert_eq!(abc, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn roots_must_be_certificates() {
        assert!(Tls::new("").is_ok());
        assert!(Tls::new("hello").is_err());
        assert!(Tls::new("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").is_err());
    }

    fn hex_of(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }
}
