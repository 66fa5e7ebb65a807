//! Access tokens of an OAuth client.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use podtether_proto::secret::SecretString;
use serde::Deserialize;

use super::CredentialError;
use super::caller::{Failure, Wire, first_pause, parse, wait};
use crate::config::SecretSource;

/// A token is renewed this long before it expires.
const RENEW_BEFORE: Duration = Duration::from_secs(60);

/// An OAuth client.
#[derive(Debug, Clone)]
pub(super) struct Client {
    pub(super) id: SecretSource,
    pub(super) secret: SecretSource,
}

type TokenFuture = Shared<BoxFuture<'static, Result<Token, CredentialError>>>;

#[derive(Clone)]
pub(super) struct Token {
    pub(super) secret: SecretString,
    renew_at: Instant,
}

/// The token of one client, for everybody who calls.
pub(super) struct Tokens {
    client: Client,
    /// The token, or the one call that is getting it: everybody waits for the same.
    token: Mutex<Option<TokenFuture>>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("client", &self.client).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    access_token: SecretString,
    #[serde(default)]
    expires_in: u64,
}

impl Tokens {
    pub(super) fn new(client: Client) -> Tokens {
        Tokens { client, token: Mutex::new(None) }
    }

    /// A token that is good for a while. No lock is held while it is fetched.
    pub(super) async fn token(&self, wire: &Arc<Wire>, deadline: Instant) -> Result<Token, CredentialError> {
        let future = {
            let mut slot = self.token.lock().unwrap_or_else(PoisonError::into_inner);
            let usable = slot.as_ref().filter(|future| match future.peek() {
                None => true,
                Some(Ok(token)) => token.renew_at > Instant::now(),
                Some(Err(_)) => false,
            });
            if let Some(future) = usable {
                future.clone()
            } else {
                let (wire, client) = (Arc::clone(wire), self.client.clone());
                let future = async move { fetch(&wire, &client, deadline).await }.boxed().shared();
                *slot = Some(future.clone());
                future
            }
        };
        future.await
    }

    /// The next caller gets another token than this one.
    pub(super) fn forget(&self, token: &Token) {
        let mut slot = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        let same = matches!(
            slot.as_ref().and_then(Shared::peek),
            Some(Ok(held)) if held.secret == token.secret
        );
        if same {
            *slot = None;
        }
    }
}

async fn fetch(wire: &Wire, client: &Client, deadline: Instant) -> Result<Token, CredentialError> {
    let what = "get an OAuth token";
    let mut pause = first_pause();
    loop {
        let read = |s: &SecretSource| s.read().map_err(CredentialError::Refused);
        let (id, secret) = (read(&client.id)?, read(&client.secret)?);
        let form = BTreeMap::from([
            ("client_id", id.expose()),
            ("client_secret", secret.expose()),
            ("grant_type", "client_credentials"),
        ]);
        let builder = wire.http.now().post(format!("{}/api/v2/oauth/token", wire.url)).form(&form);
        match wire.send(what, builder, deadline).await {
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
            Err(Failure::NotFound(_)) => {
                return Err(CredentialError::Refused(format!(
                    "cannot {what}: {} is no admin API (404)",
                    wire.url
                )));
            }
            Err(Failure::Passing { text, after }) => wait(text, after, &mut pause, deadline).await?,
        }
    }
}
