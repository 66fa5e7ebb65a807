//! How devices get into a tailnet, and out of it when no engine can log out.

mod caller;
mod headscale;
pub(crate) mod http;
mod limiter;
mod oauth;
mod roots;
mod token;
mod v2;

use std::sync::Arc;
use std::time::{Duration, Instant};

use podtether_core::tailcfg::UnixTime;
use podtether_proto::secret::SecretString;

use crate::config::{self, SecretSource};

pub(crate) use http::{client, say};
pub(crate) use limiter::wall_clock;
pub use roots::Roots;

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

/// How a key is to be.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// For people who read the API's list of keys.
    pub hostname: &'a str,
    /// ACL tags of the device.
    pub tags: &'a [String],
    /// Whether the server may forget the device.
    pub ephemeral: bool,
}

/// What a tailnet's device is known by.
#[derive(Debug, Clone)]
pub struct Device {
    /// `nodekey:…`
    pub node_key: String,
    /// `mkey:…`; it outlives a rotation of the node key.
    pub machine_key: String,
    /// Stable id, empty when unknown.
    pub stable_id: String,
}

/// A device as the tailnet's API lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The API's number of it.
    pub id: String,
    /// Fully qualified name.
    pub name: String,
    /// What it asked to be called.
    pub hostname: String,
    /// ACL tags.
    pub tags: Vec<String>,
    /// Of its client; empty where the API does not say.
    pub version: String,
    /// Whether it joined with a key for itself alone, such as are minted here, as far as the API says.
    pub is_minted: bool,
    /// `mkey:…`
    pub machine_key: String,
    /// `nodekey:…`
    pub node_key: String,
    /// Stable id.
    pub stable_id: String,
    /// Whether the API says that it is connected.
    pub online: bool,
    /// When it was seen last; `None` where the API does not say, as of one that is connected.
    pub last_seen: Option<UnixTime>,
}

impl Listed {
    /// What it is deleted by.
    #[must_use]
    pub fn device(&self) -> Device {
        Device {
            node_key: self.node_key.clone(),
            machine_key: self.machine_key.clone(),
            stable_id: self.stable_id.clone(),
        }
    }
}

impl Device {
    /// Headscale numbers its nodes, and begins again with an empty database.
    fn has_numeric_id(&self) -> bool {
        (1..=20).contains(&self.stable_id.len()) && self.stable_id.bytes().all(|b| b.is_ascii_digit())
    }
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
    /// Mints through Headscale's API.
    Headscale(headscale::Api),
}

impl Credential {
    /// Prepares the credential of `tailnet`, whose extra roots are `roots`.
    ///
    /// # Errors
    /// The roots cannot be used.
    pub fn new(tailnet: &config::Tailnet, roots: &Arc<Roots>) -> Result<Credential, String> {
        let http = || http::Http::new(Arc::clone(roots));
        match &tailnet.credentials {
            config::Credentials::AuthKey { key } => Ok(Credential::AuthKey(key.clone())),
            config::Credentials::Interactive => Ok(Credential::Person),
            config::Credentials::OAuth { api_url, client_id, client_secret, auth_key_ttl } => {
                let client = token::Client { id: client_id.clone(), secret: client_secret.clone() };
                Ok(Credential::OAuth(oauth::Api::new(http()?, api_url.clone(), client, *auth_key_ttl)))
            }
            config::Credentials::Headscale { api_url, api_key, user, auth_key_ttl } => {
                let (url, key, ttl) = (api_url.clone(), api_key.clone(), *auth_key_ttl);
                Ok(Credential::Headscale(headscale::Api::new(http()?, url, key, user.clone(), ttl)))
            }
        }
    }

    /// A key for one device, before `deadline`.
    ///
    /// # Errors
    /// [`CredentialError`].
    pub async fn mint(&self, wish: Wish<'_>, deadline: Instant) -> Result<Key, CredentialError> {
        match self {
            Credential::OAuth(api) => api.mint(wish, deadline).await,
            Credential::Headscale(api) => api.mint(wish, deadline).await,
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
            Credential::Headscale(api) => api.delete_key(id, deadline).await,
            Credential::AuthKey(_) | Credential::Person => Ok(()),
        }
    }

    /// Every device of the tailnet.
    ///
    /// # Errors
    /// [`CredentialError`]; always for a kind that has no API.
    pub async fn devices(&self, deadline: Instant) -> Result<Vec<Listed>, CredentialError> {
        match self {
            Credential::OAuth(api) => api.devices(deadline).await,
            Credential::Headscale(api) => api.devices(deadline).await,
            Credential::AuthKey(_) | Credential::Person => {
                Err(CredentialError::Refused("an auth key, or a person's login, cannot list devices".into()))
            }
        }
    }

    /// Deletes a device. One that is gone already is fine.
    ///
    /// # Errors
    /// [`CredentialError`]; always for a kind that has no API.
    pub async fn delete_device(&self, device: &Device, deadline: Instant) -> Result<(), CredentialError> {
        match self {
            Credential::OAuth(api) => api.delete_device(device, deadline).await,
            Credential::Headscale(api) => api.delete_device(device, deadline).await,
            Credential::AuthKey(_) | Credential::Person => Err(CredentialError::Refused(
                "an auth key, or a person's login, cannot delete devices: remove it in the admin console, or let it expire".into(),
            )),
        }
    }

    /// True when [`Credential::delete_device`] can work at all.
    #[must_use]
    pub fn deletes_devices(&self) -> bool {
        match self {
            Credential::OAuth(_) | Credential::Headscale(_) => true,
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

/// What is wrong with the files that the configuration of a tailnet names, as they are now: each with the
/// name of its key. Secrets are read late, so a file may also come later.
#[must_use]
pub fn unusable_files(tailnet: &config::Tailnet) -> Vec<(&'static str, String)> {
    let mut wrong = Vec::new();
    if let Some(Err(e)) = tailnet.ca_file.as_deref().map(roots::read) {
        wrong.push(("ca_file", e));
    }
    for (key, source) in tailnet.credentials.secrets() {
        wrong.extend(source.read().err().map(|e| (key, e)));
    }
    wrong
}
