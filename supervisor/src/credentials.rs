//! How devices get into a tailnet, and out of it when no engine can log out.

mod http;
mod limiter;
mod oauth;

use std::path::Path;
use std::time::{Duration, Instant};

use podtether_proto::secret::SecretString;

use crate::config::{self, SecretSource};

/// Why there is no key, or a deletion did not happen. The sentence holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CredentialError {
    /// Worth trying again later.
    #[error("{0}")]
    Temporary(String),
    /// Refused: somebody has to change a credential or a tag.
    #[error("{0}")]
    Refused(String),
}

/// A key for one device.
#[derive(Debug, Clone)]
pub struct Key {
    /// The key.
    pub secret: SecretString,
    /// Its id at the API when it was minted for this device; a reusable key from a file has none.
    pub id: Option<String>,
    /// When it expires by itself.
    pub ttl: Duration,
}

/// What a tailnet's device is known by.
#[derive(Debug, Clone)]
pub struct Device {
    /// `nodekey:…`
    pub node_key: String,
    /// Stable id, empty when unknown.
    pub stable_id: String,
}

/// The credential of one tailnet.
#[derive(Debug, Clone)]
pub enum Credential {
    /// Mints through the admin API.
    OAuth(oauth::Api),
    /// A reusable key.
    AuthKey(SecretSource),
    /// A person opens a URL for each device.
    Person,
}

impl Credential {
    /// Prepares the credential of `tailnet`.
    ///
    /// # Errors
    /// `ca_file` cannot be used.
    pub fn new(tailnet: &config::Tailnet) -> Result<Credential, String> {
        match &tailnet.credentials {
            config::Credentials::AuthKey { key } => Ok(Credential::AuthKey(key.clone())),
            config::Credentials::Interactive => Ok(Credential::Person),
            config::Credentials::OAuth { api_url, client_id, client_secret, auth_key_ttl } => {
                let client = http::client(tailnet.ca_file.as_deref())?;
                Ok(Credential::OAuth(oauth::Api::new(
                    client,
                    oauth::Settings {
                        api_url: api_url.clone(),
                        client_id: client_id.clone(),
                        client_secret: client_secret.clone(),
                        ttl: *auth_key_ttl,
                        tags: tailnet.tags.clone(),
                        ephemeral: tailnet.ephemeral,
                    },
                )))
            }
        }
    }

    /// A key for one device called `hostname`, before `deadline`.
    ///
    /// # Errors
    /// [`CredentialError`].
    pub async fn mint(&self, hostname: &str, deadline: Instant) -> Result<Key, CredentialError> {
        match self {
            Credential::OAuth(api) => api.mint(hostname, deadline).await,
            Credential::AuthKey(source) => {
                let secret = source.read().map_err(CredentialError::Refused)?;
                Ok(Key { secret, id: None, ttl: Duration::MAX })
            }
            Credential::Person => {
                Err(CredentialError::Refused("without credentials there are no auth keys".into()))
            }
        }
    }

    /// Deletes a minted key that nobody used. One that is gone already is fine.
    ///
    /// # Errors
    /// [`CredentialError`]; the key then expires by itself.
    pub async fn delete_key(&self, id: &str, deadline: Instant) -> Result<(), CredentialError> {
        match self {
            Credential::OAuth(api) => api.delete_key(id, deadline).await,
            Credential::AuthKey(_) | Credential::Person => Ok(()),
        }
    }

    /// Deletes a device. One that is gone already is fine.
    ///
    /// # Errors
    /// [`CredentialError`]; always for a kind that has no API.
    pub async fn delete_device(&self, device: &Device, deadline: Instant) -> Result<(), CredentialError> {
        match self {
            Credential::OAuth(api) => api.delete_device(device, deadline).await,
            Credential::AuthKey(_) | Credential::Person => Err(CredentialError::Refused(
                "an auth key, or a person's login, cannot delete devices: remove it in the admin console, or let it expire".into(),
            )),
        }
    }

    /// True when [`Credential::delete_device`] can work at all.
    #[must_use]
    pub fn deletes_devices(&self) -> bool {
        match self {
            Credential::OAuth(_) => true,
            Credential::AuthKey(_) | Credential::Person => false,
        }
    }

    /// True when devices get in by a person's login rather than by a key.
    #[must_use]
    pub fn is_person(&self) -> bool {
        matches!(self, Credential::Person)
    }

    /// Tags for the register request, where the key does not carry them: minted keys do, and servers
    /// refuse both together; a reusable key was given its tags when it was made.
    #[must_use]
    pub fn request_tags(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Text of a tailnet's extra roots, empty when there are none.
///
/// # Errors
/// One sentence that names the file.
pub fn extra_roots(ca_file: Option<&Path>) -> Result<String, String> {
    let Some(path) = ca_file else { return Ok(String::new()) };
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    http::roots(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(text)
}
