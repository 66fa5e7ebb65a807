//! Calls to an admin API: authorized, within its limits, tried again while the reason to fail is a
//! passing one.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use podtether_core::retry_after;
use podtether_core::tailcfg::UnixTime;
use podtether_proto::secret::SecretString;
use reqwest::header::{AUTHORIZATION, DATE, RETRY_AFTER};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::Value;

use super::CredentialError;
use super::http::{Http, body, say};
use super::limiter::{Limiter, wall_clock};
use super::token::{Token, Tokens};
use crate::config::SecretSource;
use crate::metrics::spans;
use crate::restart::jittered;

/// First pause after a failed call; doubles to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(8);
/// A clock that is further off is told of with whatever fails.
const CLOCK_OFF: Duration = Duration::from_secs(60);
/// Longest part of a server's answer that goes into a sentence.
const MAX_QUOTE: usize = 200;

/// What a call proves its right with.
#[derive(Debug)]
pub(super) enum Proof {
    /// A token that an OAuth client gets.
    OAuth(Tokens),
    /// A key that is a token itself, read for each call.
    ApiKey(SecretSource),
}

/// One question.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call<'a> {
    /// What it is for, in a sentence after "cannot".
    pub(super) what: &'a str,
    pub(super) method: &'a Method,
    /// Below the API's URL, from its slash on.
    pub(super) path: &'a str,
    pub(super) body: Option<&'a Value>,
}

impl<'a> Call<'a> {
    pub(super) fn get(what: &'a str, path: &'a str) -> Self {
        Call { what, method: &Method::GET, path, body: None }
    }

    pub(super) fn delete(what: &'a str, path: &'a str) -> Self {
        Call { what, method: &Method::DELETE, path, body: None }
    }

    pub(super) fn post(what: &'a str, path: &'a str, body: &'a Value) -> Self {
        Call { what, method: &Method::POST, path, body: Some(body) }
    }
}

/// What the API said.
#[derive(Debug)]
pub(super) enum Answer {
    Body(Vec<u8>),
    /// There is no such thing, or no such API; the text is the server's.
    NotFound(String),
}

impl Answer {
    /// The body of a thing that has to be there.
    pub(super) fn found(self, what: &str) -> Result<Vec<u8>, CredentialError> {
        match self {
            Answer::Body(body) => Ok(body),
            Answer::NotFound(text) => {
                Err(CredentialError::Refused(format!("cannot {what}: the API does not know it{text}")))
            }
        }
    }
}

pub(super) enum Failure {
    NotFound(String),
    Unauthorized(String),
    Refused(String),
    Passing { text: String, after: Option<Duration> },
}

/// One API. Clones share the token and the rate limit.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    wire: Arc<Wire>,
    proof: Proof,
}

/// An address and the manners it is asked with.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) http: Http,
    /// Without a slash at its end.
    pub(super) url: String,
    limiter: Limiter,
    /// By how many milliseconds the API's clock is ahead of this node's, as its last answer had it.
    ahead_ms: AtomicI64,
}

impl Wire {
    pub(super) fn new(http: Http, url: String) -> Arc<Wire> {
        Arc::new(Wire { http, url, limiter: Limiter::default(), ahead_ms: AtomicI64::new(0) })
    }
}

impl Wire {
    /// Now, by the API's clock: what it compares a time with that it is told.
    fn now(&self) -> UnixTime {
        let ahead = self.ahead_ms.load(Ordering::Relaxed);
        UnixTime::from_millis(wall_clock().as_millis().saturating_add(ahead))
    }

    /// Notes the time of an answer.
    fn heard(&self, date: Option<&str>) {
        if let Some(there) = date.and_then(retry_after::http_date) {
            let ahead = there.as_millis().saturating_sub(wall_clock().as_millis());
            self.ahead_ms.store(ahead, Ordering::Relaxed);
        }
    }

    /// What a refusal may be due to.
    fn clock(&self) -> String {
        let ahead = self.ahead_ms.load(Ordering::Relaxed);
        let off = Duration::from_millis(ahead.unsigned_abs());
        if off < CLOCK_OFF {
            return String::new();
        }
        let side = if ahead > 0 { "behind" } else { "ahead of" };
        format!("; this node's clock is {} s {side} the API's: set it and let NTP keep it", off.as_secs())
    }
}

impl Caller {
    pub(super) fn new(wire: Arc<Wire>, proof: Proof) -> Caller {
        Caller { inner: Arc::new(Inner { wire, proof }) }
    }

    /// Now, by the API's clock as far as that is known.
    pub(super) fn now(&self) -> UnixTime {
        self.inner.wire.now()
    }

    /// One call, tried again until `deadline` while the reason to fail is a passing one.
    pub(super) async fn call(&self, call: Call<'_>, deadline: Instant) -> Result<Answer, CredentialError> {
        let Call { what, method, path, body } = call;
        let wire = &self.inner.wire;
        let mut pause = FIRST_PAUSE;
        let mut refused_once = false;
        loop {
            let proof = self.proof(deadline).await?;
            let attempt = async {
                let mut builder = wire.http.now().request(method.clone(), format!("{}{path}", wire.url));
                builder = builder.header(AUTHORIZATION, bearer(proof.secret())?);
                if let Some(body) = body {
                    builder = builder.json(body);
                }
                wire.send(what, builder, deadline).await
            };
            match attempt.await {
                Ok(body) => return Ok(Answer::Body(body)),
                Err(Failure::NotFound(text)) => return Ok(Answer::NotFound(text)),
                Err(Failure::Unauthorized(text)) => {
                    if refused_once || !self.another_proof(&proof) {
                        return Err(CredentialError::Refused(self.refused(what, &text)));
                    }
                    refused_once = true;
                }
                Err(Failure::Refused(text)) => return Err(CredentialError::Refused(text)),
                Err(Failure::Passing { text, after }) => wait(text, after, &mut pause, deadline).await?,
            }
        }
    }

    /// True when it was there.
    pub(super) async fn delete(
        &self,
        what: &str,
        path: &str,
        deadline: Instant,
    ) -> Result<bool, CredentialError> {
        let answer = self.call(Call::delete(what, path), deadline).await?;
        Ok(matches!(answer, Answer::Body(_)))
    }

    async fn proof(&self, deadline: Instant) -> Result<Shown, CredentialError> {
        match &self.inner.proof {
            Proof::OAuth(tokens) => Ok(Shown::Token(tokens.token(&self.inner.wire, deadline).await?)),
            Proof::ApiKey(source) => source.read().map(Shown::Key).map_err(CredentialError::Refused),
        }
    }

    /// Whether there is something else to show after `shown` was refused: a token may have been revoked
    /// before its time, a key's file may have been rotated meanwhile.
    fn another_proof(&self, shown: &Shown) -> bool {
        match (&self.inner.proof, shown) {
            (Proof::OAuth(tokens), Shown::Token(token)) => {
                tokens.forget(token);
                true
            }
            (Proof::ApiKey(source), Shown::Key(key)) => source.read().is_ok_and(|now| now != *key),
            (Proof::OAuth(_) | Proof::ApiKey(_), _) => false,
        }
    }

    fn refused(&self, what: &str, text: &str) -> String {
        match &self.inner.proof {
            Proof::OAuth(_) => format!("cannot {what}: the API refuses the OAuth client's token ({text})"),
            Proof::ApiKey(source) => format!(
                "cannot {what}: the API refuses the key in {source:?} ({text}): make another with `headscale \
                 apikeys create`"
            ),
        }
    }
}

/// What was shown with one attempt.
enum Shown {
    Token(Token),
    Key(SecretString),
}

impl Shown {
    fn secret(&self) -> &SecretString {
        match self {
            Shown::Token(token) => &token.secret,
            Shown::Key(key) => key,
        }
    }
}

impl Wire {
    /// Sends once, within the limits.
    pub(super) async fn send(
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
            let told = |name| response.headers().get(name).and_then(|v| v.to_str().ok());
            self.heard(told(DATE));
            let header = told(RETRY_AFTER).map(str::to_owned);
            Ok::<_, String>((status, header, body(response).await?))
        };
        let exchange = tokio::time::timeout(left, exchange).await;
        let result = exchange.as_ref().ok().and_then(|got| got.as_ref().ok());
        let result = result.map_or("failed", |(status, ..)| spans::of_status(status.as_u16()));
        spans::api_called(spans::Api::Tailnet, result, now);
        let (status, retry_after, body) = match exchange {
            Ok(Ok(answer)) => answer,
            Ok(Err(text)) => return Err(passing(format!("cannot {what}: {text}"))),
            Err(_) => return Err(passing(format!("cannot {what}: no answer in time"))),
        };
        if status.is_success() {
            return Ok(body);
        }
        let text = quote(&body) + &self.clock();
        match status {
            StatusCode::NOT_FOUND => Err(Failure::NotFound(text)),
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

/// Waits before another try: as long as the server asked, or `pause`, which then doubles. Fails when that
/// would pass the deadline.
pub(super) async fn wait(
    text: String,
    after: Option<Duration>,
    pause: &mut Duration,
    deadline: Instant,
) -> Result<(), CredentialError> {
    let wait = after.unwrap_or_else(|| jittered(*pause, random()));
    *pause = (*pause * 2).min(MAX_PAUSE);
    if Instant::now() + wait >= deadline {
        return Err(CredentialError::Temporary(text));
    }
    tokio::time::sleep(wait).await;
    Ok(())
}

/// The first pause of a series.
pub(super) const fn first_pause() -> Duration {
    FIRST_PAUSE
}

pub(super) fn parse<T: for<'de> Deserialize<'de>>(what: &str, body: &[u8]) -> Result<T, CredentialError> {
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

/// What an error answer says, short and printable, with a colon before it. Tailscale writes `message`,
/// Headscale's first API `detail` (RFC 9457), and both may add a list of causes.
fn quote(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let message = serde_json::from_str::<Value>(&text)
        .ok()
        .and_then(|v| {
            let main = ["message", "detail", "error"].into_iter().find_map(|name| v.get(name)?.as_str())?;
            let cause = v.pointer("/errors/0/message").or_else(|| v.pointer("/data/0/errors/0"));
            Some(match cause.and_then(Value::as_str) {
                Some(cause) => format!("{main}: {cause}"),
                None => main.to_owned(),
            })
        })
        .unwrap_or_else(|| text.into_owned());
    let short: String =
        message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_QUOTE).collect();
    if short.trim().is_empty() { String::new() } else { format!(": {}", short.trim()) }
}

/// Ids come from the API and go into a path.
pub(super) fn segment(id: &str) -> Result<&str, CredentialError> {
    let fits = (1..=128).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    if fits { Ok(id) } else { Err(CredentialError::Refused("the API gave an id that is no id".into())) }
}

fn random() -> u64 {
    getrandom::u64().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::super::roots::Roots;
    use super::*;

    /// Answers one call after another, `ahead_s` ahead of this machine's clock.
    fn server(ahead_s: i64) -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
                let at = date(wall_clock().as_millis() / 1000 + ahead_s);
                let answer = format!(
                    "HTTP/1.1 403 Forbidden\r\nDate: {at}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}"
                );
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        url
    }

    /// As `Date` has it.
    fn date(unix_s: i64) -> String {
        let text = UnixTime::from_secs(unix_s).to_string();
        let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
        let month = months[text[5..7].parse::<usize>().unwrap() - 1];
        format!("Mon, {} {month} {} {} GMT", &text[8..10], &text[..4], &text[11..19])
    }

    #[tokio::test]
    async fn a_refusal_names_a_clock_that_the_api_disagrees_with() {
        for (ahead_s, says) in
            [(7200, "s behind the API's"), (-7200, "s ahead of the API's"), (0, ""), (30, "")]
        {
            let http = Http::new(Arc::new(Roots::new(None).unwrap())).unwrap();
            let key = SecretSource::Value(SecretString::new("k".to_owned()));
            let caller = Caller::new(Wire::new(http, server(ahead_s)), Proof::ApiKey(key));
            let deadline = Instant::now() + Duration::from_secs(20);
            let answer = caller.call(Call::get("mint an auth key", "/x"), deadline).await;
            let Err(CredentialError::Refused(text)) = answer else { panic!("{answer:?}") };
            assert!(text.contains(says) && text.contains("clock") != says.is_empty(), "{ahead_s}: {text}");
            let off = caller.now().as_millis() - wall_clock().as_millis() - ahead_s * 1000;
            assert!((-3000..=3000).contains(&off), "what is told in times is told in the API's: {off}");
        }
    }

    #[test]
    fn errors_of_every_api_are_told() {
        for (body, said) in [
            (r#"{"message":"as told"}"#, ": as told"),
            (
                r#"{"title":"Not Found","status":404,"detail":"creating key","errors":[{"message":"no user"}]}"#,
                ": creating key: no user",
            ),
            (r#"{"message":"creating","data":[{"errors":["bad tag"]}],"status":400}"#, ": creating: bad tag"),
            (r#"{"error":"invalid_client"}"#, ": invalid_client"),
            ("404 page not found\n", ": 404 page not found"),
            ("", ""),
            ("\n", ""),
        ] {
            assert_eq!(quote(body.as_bytes()), said);
        }
        assert_eq!(quote("x".repeat(1000).as_bytes()).len(), 202);
    }
}
