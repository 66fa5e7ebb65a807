//! The admin API with an OAuth client: a token, single-use keys, devices.

use std::time::{Duration, Instant};

use super::caller::{Caller, Proof, Wire};
use super::http::Http;
use super::token::{Client, Tokens};
use super::{CredentialError, Device, Key, Listed, Wish, v2};

/// One tailnet's API. Clones share the token and the rate limit.
#[derive(Debug, Clone)]
pub struct Api {
    caller: Caller,
    ttl: Duration,
}

impl Api {
    pub(super) fn new(http: Http, api_url: String, client: Client, ttl: Duration) -> Api {
        let proof = Proof::OAuth(Tokens::new(client));
        Api { caller: Caller::new(Wire::new(http, api_url), proof), ttl }
    }

    pub(super) async fn mint(&self, wish: Wish<'_>, deadline: Instant) -> Result<Key, CredentialError> {
        v2::mint(&self.caller, wish, self.ttl, deadline).await?.ok_or_else(|| {
            CredentialError::Refused("cannot mint an auth key: api_url is no admin API (404)".into())
        })
    }

    pub(super) async fn delete_key(&self, id: &str, deadline: Instant) -> Result<(), CredentialError> {
        v2::delete_key(&self.caller, id, deadline).await
    }

    pub(super) async fn devices(&self, deadline: Instant) -> Result<Vec<Listed>, CredentialError> {
        v2::devices(&self.caller, deadline).await?.ok_or_else(|| {
            CredentialError::Refused("cannot list devices: api_url is no admin API (404)".into())
        })
    }

    pub(super) async fn delete_device(
        &self,
        device: &Device,
        deadline: Instant,
    ) -> Result<(), CredentialError> {
        if v2::delete_device(&self.caller, device, deadline).await? {
            return Ok(());
        }
        Err(CredentialError::Refused(
            "cannot find the device to delete: api_url is no admin API (404)".into(),
        ))
    }
}

#[cfg(test)]
mod tests;
