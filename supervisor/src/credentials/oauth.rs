//! The admin API with an OAuth client: a token, single-use keys, devices.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use podtether_proto::secret::SecretString;
use reqwest::header::{AUTHORIZATION, RETRY_AFTER};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::http::{body, say};
use super::limiter::Limiter;
use super::{CredentialError, Device, Key};
use crate::config::SecretSource;
use crate::restart::jittered;

/// A token is renewed this long before it expires.
const RENEW_BEFORE: Duration = Duration::from_secs(60);
/// First pause after a failed call; doubles to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(8);
/// Longest part of a server's answer that goes into a sentence.
const MAX_QUOTE: usize = 200;

/// What the API is reached with.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    pub(super) api_url: String,
    pub(super) client_id: SecretSource,
    pub(super) client_secret: SecretSource,
    pub(super) ttl: Duration,
    pub(super) tags: Vec<String>,
    pub(super) ephemeral: bool,
}

type TokenFuture = Shared<BoxFuture<'static, Result<Token, CredentialError>>>;

#[derive(Clone)]
struct Token {
    secret: SecretString,
    renew_at: Instant,
}

/// One tailnet's API. Clones share the token and the rate limit.
#[derive(Clone)]
pub struct Api {
    inner: Arc<Inner>,
}

struct Inner {
    http: reqwest::Client,
    settings: Settings,
    limiter: Limiter,
    /// The token, or the one call that is getting it: everybody waits for the same.
    token: Mutex<Option<TokenFuture>>,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("settings", &self.inner.settings).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    access_token: SecretString,
    #[serde(default)]
    expires_in: u64,
}

#[derive(Deserialize)]
struct KeyAnswer {
    id: String,
    key: SecretString,
}

#[derive(Deserialize)]
struct DevicesAnswer {
    #[serde(default)]
    devices: Vec<DeviceAnswer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DeviceAnswer {
    #[serde(default)]
    id: String,
    #[serde(default)]
    node_id: String,
    #[serde(default)]
    node_key: String,
}

impl Api {
    pub(super) fn new(http: reqwest::Client, settings: Settings) -> Api {
        let inner = Inner { http, settings, limiter: Limiter::default(), token: Mutex::new(None) };
        Api { inner: Arc::new(inner) }
    }

    pub(super) async fn mint(&self, hostname: &str, deadline: Instant) -> Result<Key, CredentialError> {
        let s = &self.inner.settings;
        let description: String = format!("podtether {hostname}").chars().take(50).collect();
        let request = json!({
            "capabilities": {"devices": {"create": {
                "reusable": false,
                "ephemeral": s.ephemeral,
                "preauthorized": true,
                "tags": s.tags,
            }}},
            "expirySeconds": s.ttl.as_secs(),
            "description": description,
        });
        let what = "mint an auth key";
        let answer =
            self.get(what, &Method::POST, "/api/v2/tailnet/-/keys", Some(&request), deadline).await?;
        let key: KeyAnswer = parse(what, &answer)?;
        Ok(Key { secret: key.key, id: Some(key.id), ttl: s.ttl })
    }

    pub(super) async fn delete_key(&self, id: &str, deadline: Instant) -> Result<(), CredentialError> {
        let path = format!("/api/v2/tailnet/-/keys/{}", segment(id)?);
        self.delete("delete the unused auth key", &path, deadline).await.map(drop)
    }

    pub(super) async fn delete_device(
        &self,
        device: &Device,
        deadline: Instant,
    ) -> Result<(), CredentialError> {
        // The API takes the stable id, so most deletions need no list.
        if !device.stable_id.is_empty() {
            let path = format!("/api/v2/device/{}", segment(&device.stable_id)?);
            if self.delete("delete the device", &path, deadline).await? {
                return Ok(());
            }
        }
        let what = "find the device to delete";
        let path = "/api/v2/tailnet/-/devices?fields=all";
        let answer = self.get(what, &Method::GET, path, None, deadline).await?;
        let list: DevicesAnswer = parse(what, &answer)?;
        let ours = list.devices.into_iter().find(|d| {
            d.node_key == device.node_key || (!device.stable_id.is_empty() && d.node_id == device.stable_id)
        });
        let Some(ours) = ours else { return Ok(()) };
        let path =
            format!("/api/v2/device/{}", segment(if ours.id.is_empty() { &ours.node_id } else { &ours.id })?);
        self.delete("delete the device", &path, deadline).await.map(drop)
    }

    /// True when it was there.
    async fn delete(&self, what: &str, path: &str, deadline: Instant) -> Result<bool, CredentialError> {
        Ok(self.call(what, &Method::DELETE, path, None, deadline).await?.is_some())
    }

    /// What has to be there.
    async fn get(
        &self,
        what: &str,
        method: &Method,
        path: &str,
        request: Option<&Value>,
        deadline: Instant,
    ) -> Result<Vec<u8>, CredentialError> {
        self.call(what, method, path, request, deadline)
            .await?
            .ok_or_else(|| CredentialError::Refused(format!("cannot {what}: the API does not know it")))
    }

    /// `None` when the API knows no such thing. One call, tried again until `deadline` while the reason to fail is a passing one.
    async fn call(
        &self,
        what: &str,
        method: &Method,
        path: &str,
        request: Option<&Value>,
        deadline: Instant,
    ) -> Result<Option<Vec<u8>>, CredentialError> {
        let mut pause = FIRST_PAUSE;
        let mut token_refused = false;
        loop {
            let token = self.token(deadline).await?;
            let attempt = async {
                let url = format!("{}{path}", self.inner.settings.api_url);
                let mut builder = self.inner.http.request(method.clone(), url);
                builder = builder.header(AUTHORIZATION, bearer(&token.secret)?);
                if let Some(request) = request {
                    builder = builder.json(request);
                }
                self.inner.send(what, builder, deadline).await
            };
            match attempt.await {
                Ok(body) => return Ok(Some(body)),
                Err(Failure::NotFound) => return Ok(None),
                // The token may have been revoked before its time: a new one gets one chance.
                Err(Failure::Unauthorized(_)) if !token_refused => {
                    token_refused = true;
                    self.forget(&token);
                }
                Err(Failure::Unauthorized(text)) => {
                    return Err(CredentialError::Refused(format!(
                        "cannot {what}: the API refuses the OAuth client's token ({text})"
                    )));
                }
                Err(Failure::Refused(text)) => return Err(CredentialError::Refused(text)),
                Err(Failure::Passing { text, after }) => {
                    let wait = after.unwrap_or_else(|| jittered(pause, random()));
                    pause = (pause * 2).min(MAX_PAUSE);
                    wait_or_give_up(wait, deadline, text).await?;
                }
            }
        }
    }

    /// A token that is good for a while. No lock is held while it is fetched.
    async fn token(&self, deadline: Instant) -> Result<Token, CredentialError> {
        let future = {
            let mut slot = self.inner.token.lock().unwrap_or_else(PoisonError::into_inner);
            let usable = slot.as_ref().filter(|future| match future.peek() {
                None => true,
                Some(Ok(token)) => token.renew_at > Instant::now(),
                Some(Err(_)) => false,
            });
            if let Some(future) = usable {
                future.clone()
            } else {
                let inner = Arc::clone(&self.inner);
                let future = async move { inner.fetch_token(deadline).await }.boxed().shared();
                *slot = Some(future.clone());
                future
            }
        };
        future.await
    }

    fn forget(&self, token: &Token) {
        let mut slot = self.inner.token.lock().unwrap_or_else(PoisonError::into_inner);
        let same = matches!(
            slot.as_ref().and_then(Shared::peek),
            Some(Ok(held)) if held.secret == token.secret
        );
        if same {
            *slot = None;
        }
    }
}

enum Failure {
    NotFound,
    Unauthorized(String),
    Refused(String),
    Passing { text: String, after: Option<Duration> },
}

impl Inner {
    async fn fetch_token(&self, deadline: Instant) -> Result<Token, CredentialError> {
        let what = "get an OAuth token";
        let mut pause = FIRST_PAUSE;
        loop {
            let read = |s: &SecretSource| s.read().map_err(CredentialError::Refused);
            let (id, secret) = (read(&self.settings.client_id)?, read(&self.settings.client_secret)?);
            let form = BTreeMap::from([
                ("client_id", id.expose()),
                ("client_secret", secret.expose()),
                ("grant_type", "client_credentials"),
            ]);
            let url = format!("{}/api/v2/oauth/token", self.settings.api_url);
            let builder = self.http.post(url).form(&form);
            match self.send(what, builder, deadline).await {
                Ok(body) => {
                    let answer: TokenAnswer = parse(what, &body)?;
                    let life = Duration::from_secs(answer.expires_in.clamp(1, 86_400));
                    let renew_at = Instant::now() + life.saturating_sub(RENEW_BEFORE).max(life / 2);
                    return Ok(Token { secret: answer.access_token, renew_at });
                }
                Err(Failure::Unauthorized(text) | Failure::Refused(text)) => {
                    return Err(CredentialError::Refused(format!(
                        "cannot {what}: check the OAuth client id and secret ({text})"
                    )));
                }
                Err(Failure::NotFound) => {
                    return Err(CredentialError::Refused(format!(
                        "cannot {what}: {} is no admin API (404)",
                        self.settings.api_url
                    )));
                }
                Err(Failure::Passing { text, after }) => {
                    let wait = after.unwrap_or_else(|| jittered(pause, random()));
                    pause = (pause * 2).min(MAX_PAUSE);
                    wait_or_give_up(wait, deadline, text).await?;
                }
            }
        }
    }

    /// Sends once, within the limits.
    async fn send(
        &self,
        what: &str,
        builder: reqwest::RequestBuilder,
        deadline: Instant,
    ) -> Result<Vec<u8>, Failure> {
        let passing = |text: String| Failure::Passing { text, after: None };
        let Some(_place) = self.limiter.place().await else {
            return Err(passing(format!("cannot {what}: the supervisor is ending")));
        };
        let now = Instant::now();
        if let Some(at) = self.limiter.not_before(now) {
            let text = format!("cannot {what}: the API asked to wait another {:.0?}", at - now);
            return Err(Failure::Passing { text, after: Some(at - now + Duration::from_millis(1)) });
        }
        let left = deadline.saturating_duration_since(now);
        let exchange = async {
            let response = builder.send().await.map_err(|e| say(&e))?;
            let status = response.status();
            let header = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()).map(str::to_owned);
            Ok::<_, String>((status, header, body(response).await?))
        };
        let (status, retry_after, body) = match tokio::time::timeout(left, exchange).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(text)) => return Err(passing(format!("cannot {what}: {text}"))),
            Err(_) => return Err(passing(format!("cannot {what}: no answer in time"))),
        };
        let text = quote(&body);
        match status {
            s if s.is_success() => Ok(body),
            StatusCode::NOT_FOUND => Err(Failure::NotFound),
            StatusCode::UNAUTHORIZED => Err(Failure::Unauthorized(format!("{status}{text}"))),
            StatusCode::TOO_MANY_REQUESTS => {
                let pause = self.limiter.limited(retry_after.as_deref(), Instant::now(), random());
                Err(Failure::Passing {
                    text: format!("cannot {what}: rate limited by the API, wait {pause:.0?}"),
                    after: Some(pause),
                })
            }
            s if s.is_server_error() || s == StatusCode::REQUEST_TIMEOUT => {
                Err(passing(format!("cannot {what}: the API answered {status}{text}")))
            }
            _ => Err(Failure::Refused(format!("cannot {what}: the API answered {status}{text}"))),
        }
    }
}

/// Sleeps, unless that would pass the deadline.
async fn wait_or_give_up(wait: Duration, deadline: Instant, text: String) -> Result<(), CredentialError> {
    if Instant::now() + wait >= deadline {
        return Err(CredentialError::Temporary(text));
    }
    tokio::time::sleep(wait).await;
    Ok(())
}

fn parse<T: for<'de> Deserialize<'de>>(what: &str, body: &[u8]) -> Result<T, CredentialError> {
    // The body holds a secret, so neither it nor the parser's message is quoted.
    serde_json::from_slice(body)
        .map_err(|_| CredentialError::Temporary(format!("cannot {what}: the API's answer is not understood")))
}

fn bearer(token: &SecretString) -> Result<reqwest::header::HeaderValue, Failure> {
    let mut value = reqwest::header::HeaderValue::from_str(&format!("Bearer {}", token.expose()))
        .map_err(|_| Failure::Refused("the API's token is no header value".into()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// What an error answer says, short and printable.
fn quote(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let message = serde_json::from_str::<Value>(&text)
        .ok()
        .and_then(|v| Some(v.get("message").or_else(|| v.get("error"))?.as_str()?.to_owned()))
        .unwrap_or_else(|| text.into_owned());
    let short: String =
        message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_QUOTE).collect();
    if short.trim().is_empty() { String::new() } else { format!(": {}", short.trim()) }
}

/// Ids come from the API and go into a path.
fn segment(id: &str) -> Result<&str, CredentialError> {
    let fits = (1..=128).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    if fits { Ok(id) } else { Err(CredentialError::Refused("the API gave an id that is no id".into())) }
}

fn random() -> u64 {
    getrandom::u64().unwrap_or_default()
}

#[cfg(test)]
#[path = "oauth_tests.rs"]
mod tests;
