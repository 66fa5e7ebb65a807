//! Headscale with an API key: its second API, which has Tailscale's shape, when it answers and can do what
//! is wanted, else its first.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use podtether_core::tailcfg::UnixTime;
use podtether_proto::secret::SecretString;
use serde::Deserialize;
use serde_json::json;

use super::caller::{Answer, Call, Caller, Proof, Wire, parse, segment};
use super::http::Http;
use super::{CredentialError, Device, Key, Listed, Wish, v2};
use crate::config::SecretSource;

/// Between the time that a key is wanted for and the server's own notion of when it was made.
const MINTED_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// What was learned from the server.
#[derive(Debug, Default)]
struct Known {
    version: Option<Version>,
    /// Number of the configured user. A user that is renamed keeps it.
    user: Option<String>,
}

/// One tailnet's API. Clones share what was learned.
#[derive(Debug, Clone)]
pub struct Api {
    caller: Caller,
    ttl: Duration,
    /// Name or number.
    user: Option<String>,
    known: Arc<Mutex<Known>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeyAnswer {
    pre_auth_key: PreAuthKey,
}

#[derive(Deserialize)]
struct PreAuthKey {
    id: String,
    key: SecretString,
}

#[derive(Deserialize)]
struct UsersAnswer {
    #[serde(default)]
    users: Vec<User>,
}

#[derive(Deserialize)]
struct User {
    id: String,
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
struct NodeAnswer {
    node: Node,
}

#[derive(Deserialize)]
struct NodesAnswer {
    #[serde(default)]
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    id: String,
    #[serde(default)]
    machine_key: String,
    #[serde(default)]
    node_key: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    given_name: String,
    #[serde(default)]
    online: bool,
    #[serde(default)]
    last_seen: Option<String>,
    #[serde(default)]
    tags: Option<Vec<String>>,
    /// What `tags` was called before 0.28, in two parts.
    #[serde(default)]
    forced_tags: Option<Vec<String>>,
    #[serde(default)]
    valid_tags: Option<Vec<String>>,
    #[serde(default)]
    pre_auth_key: Option<UsedKey>,
}

/// The key that a node joined with.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct UsedKey {
    #[serde(default)]
    reusable: bool,
    #[serde(default)]
    acl_tags: Option<Vec<String>>,
    #[serde(default)]
    created_at: Option<String>,
    #[serde(default)]
    expiration: Option<String>,
}

impl UsedKey {
    /// Whether it is such a key as is minted here: for one device, with its tags, and living as long.
    fn is_minted(&self, tags: &[String], ttl: Duration) -> bool {
        let time = |text: &Option<String>| text.as_ref()?.parse::<UnixTime>().ok();
        let (Some(from), Some(to)) = (time(&self.created_at), time(&self.expiration)) else { return false };
        let lived = to.saturating_since(from);
        let as_long = lived.abs_diff(ttl) <= MINTED_WITHIN;
        !self.reusable && as_long && same(self.acl_tags.as_deref().unwrap_or_default(), tags)
    }
}

/// Whether two lists hold the same texts.
fn same(a: &[String], b: &[String]) -> bool {
    !a.is_empty() && a.iter().all(|one| b.contains(one)) && b.iter().all(|one| a.contains(one))
}

impl Node {
    fn listed(self, ttl: Duration) -> Listed {
        let mut tags = self.tags.unwrap_or_default();
        tags.extend(self.forced_tags.into_iter().flatten());
        tags.extend(self.valid_tags.into_iter().flatten());
        tags.sort();
        tags.dedup();
        Listed {
            is_minted: self.pre_auth_key.is_some_and(|key| key.is_minted(&tags, ttl)),
            name: self.given_name,
            hostname: self.name,
            tags,
            version: String::new(),
            machine_key: self.machine_key,
            node_key: self.node_key,
            stable_id: self.id.clone(),
            id: self.id,
            online: self.online,
            last_seen: self.last_seen.and_then(|text| text.parse().ok()),
        }
    }

    fn is(&self, device: &Device) -> bool {
        self.machine_key == device.machine_key || self.node_key == device.node_key
    }
}

impl Api {
    pub(super) fn new(
        http: Http,
        api_url: String,
        api_key: SecretSource,
        user: Option<String>,
        ttl: Duration,
    ) -> Api {
        let caller = Caller::new(Wire::new(http, api_url), Proof::ApiKey(api_key));
        Api { caller, ttl, user, known: Arc::default() }
    }

    pub(super) async fn mint(&self, wish: Wish<'_>, deadline: Instant) -> Result<Key, CredentialError> {
        // The second API gives a key without tags to the owner of the API key, not to the configured user.
        if !wish.tags.is_empty() && self.version() != Some(Version::V1) {
            if let Some(key) = v2::mint(&self.caller, wish, self.ttl, deadline).await? {
                self.learn(|known| known.version = Some(Version::V2));
                return Ok(key);
            }
            self.learn(|known| known.version = Some(Version::V1));
        }
        self.mint_v1(wish, deadline).await
    }

    async fn mint_v1(&self, wish: Wish<'_>, deadline: Instant) -> Result<Key, CredentialError> {
        let what = "mint an auth key";
        let mut request = json!({
            "reusable": false,
            "ephemeral": wish.ephemeral,
            // Without one the key would have expired already.
            "expiration": self.caller.now().saturating_add(self.ttl),
            "aclTags": wish.tags,
        });
        if let Some(user) = self.user_number(deadline).await? {
            request["user"] = user.into();
        }
        let call = Call::post(what, "/api/v1/preauthkey", &request);
        match self.caller.call(call, deadline).await? {
            Answer::Body(body) => {
                let KeyAnswer { pre_auth_key } = parse(what, &body)?;
                Ok(Key { secret: pre_auth_key.key, id: Some(pre_auth_key.id), ttl: self.ttl })
            }
            Answer::NotFound(text) => {
                // Whoever it was is no user any more.
                self.learn(|known| known.user = None);
                Err(CredentialError::Refused(format!(
                    "cannot {what}: api_url is no Headscale, or it has no such user{text}"
                )))
            }
        }
    }

    /// The configured user's number as text, as the API wants it.
    async fn user_number(&self, deadline: Instant) -> Result<Option<String>, CredentialError> {
        let Some(user) = &self.user else { return Ok(None) };
        // No Headscale user's name begins with a digit.
        if user.bytes().all(|b| b.is_ascii_digit()) {
            return Ok(Some(user.clone()));
        }
        if let Some(number) = self.learn(|known| known.user.clone()) {
            return Ok(Some(number));
        }
        let what = "look the user up";
        let mut path = reqwest::Url::parse("http://api/api/v1/user")
            .map_err(|e| CredentialError::Refused(format!("cannot {what}: {e}")))?;
        path.query_pairs_mut().append_pair("name", user);
        let path = format!("{}?{}", path.path(), path.query().unwrap_or_default());
        let body = self.caller.call(Call::get(what, &path), deadline).await?.found(what)?;
        let list: UsersAnswer = parse(what, &body)?;
        let Some(found) = list.users.into_iter().find(|u| u.name == *user) else {
            return Err(CredentialError::Refused(format!(
                "cannot mint an auth key: Headscale has no user {user:?}: make it with `headscale users \
                 create`, or correct `user`"
            )));
        };
        self.learn(|known| known.user = Some(found.id.clone()));
        Ok(Some(found.id))
    }

    pub(super) async fn delete_key(&self, id: &str, deadline: Instant) -> Result<(), CredentialError> {
        if self.version() == Some(Version::V2) {
            return v2::delete_key(&self.caller, id, deadline).await;
        }
        let request = json!({ "id": id });
        let call = Call::post("expire the unused auth key", "/api/v1/preauthkey/expire", &request);
        self.caller.call(call, deadline).await.map(drop)
    }

    pub(super) async fn devices(&self, deadline: Instant) -> Result<Vec<Listed>, CredentialError> {
        if let Some(devices) = v2::devices(&self.caller, deadline).await? {
            return Ok(devices);
        }
        let what = "list the nodes";
        let body = self.caller.call(Call::get(what, "/api/v1/node"), deadline).await?.found(what)?;
        let list: NodesAnswer = parse(what, &body)?;
        Ok(list.nodes.into_iter().map(|node| node.listed(self.ttl)).collect())
    }

    pub(super) async fn delete_device(
        &self,
        device: &Device,
        deadline: Instant,
    ) -> Result<(), CredentialError> {
        if self.version() != Some(Version::V1) {
            if v2::delete_device(&self.caller, device, deadline).await? {
                return Ok(());
            }
            self.learn(|known| known.version = Some(Version::V1));
        }
        self.delete_node_v1(device, deadline).await
    }

    async fn delete_node_v1(&self, device: &Device, deadline: Instant) -> Result<(), CredentialError> {
        const DELETE: &str = "delete the node";
        let what = "find the node to delete";
        if device.has_numeric_id() {
            let path = format!("/api/v1/node/{}", device.stable_id);
            if let Answer::Body(body) = self.caller.call(Call::get(what, &path), deadline).await?
                && parse::<NodeAnswer>(what, &body)?.node.is(device)
            {
                return self.caller.delete(DELETE, &path, deadline).await.map(drop);
            }
        }
        let body = self.caller.call(Call::get(what, "/api/v1/node"), deadline).await?.found(what)?;
        let list: NodesAnswer = parse(what, &body)?;
        for node in list.nodes.iter().filter(|n| n.is(device)) {
            let path = format!("/api/v1/node/{}", segment(&node.id)?);
            self.caller.delete(DELETE, &path, deadline).await?;
        }
        Ok(())
    }

    fn version(&self) -> Option<Version> {
        self.learn(|known| known.version)
    }

    fn learn<T>(&self, work: impl FnOnce(&mut Known) -> T) -> T {
        work(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests;
