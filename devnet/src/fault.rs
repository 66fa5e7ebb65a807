//! The switchboard: what the outside world does wrong, on request.
//!
//! A [`Fault`] sits on a [`Target`] until it is cleared or has been used `times` times. Faults that
//! concern connections rather than requests (refusing, cutting streams, regions) are methods of
//! [`crate::Devnet`].

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use serde::Deserialize;

use crate::sync::lock;

/// Where a fault applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// `GET /key`.
    Key,
    /// `POST /ts2021`, before the Noise handshake.
    Upgrade,
    /// `POST /machine/register`.
    Register,
    /// `POST /machine/map`, both kinds.
    Map,
    /// `POST /api/v2/oauth/token`.
    OauthToken,
    /// Every other admin API call.
    Api,
}

/// What happens instead of, or before, the normal answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fault {
    /// Wait this long before anything else.
    pub delay_ms: u64,
    /// Never answer, with the connection held open.
    pub hang: bool,
    /// Answer with this status instead.
    pub status: Option<u16>,
    /// `Retry-After` of that answer.
    pub retry_after: Option<String>,
    /// Clear the fault after this many requests.
    pub times: Option<u32>,
}

impl Fault {
    /// Answer with `status`.
    #[must_use]
    pub fn status(status: u16) -> Self {
        Self { status: Some(status), ..Self::default() }
    }

    /// Answer 429 and ask to come back after `seconds`.
    #[must_use]
    pub fn rate_limit(seconds: u32) -> Self {
        Self { status: Some(429), retry_after: Some(seconds.to_string()), ..Self::default() }
    }

    /// Answer late.
    #[must_use]
    pub fn delay(delay: Duration) -> Self {
        Self { delay_ms: u64::try_from(delay.as_millis()).unwrap_or(u64::MAX), ..Self::default() }
    }

    /// Hold the socket and say nothing.
    #[must_use]
    pub fn hang() -> Self {
        Self { hang: true, ..Self::default() }
    }

    /// The same fault for the next `times` requests only.
    #[must_use]
    pub fn times(mut self, times: u32) -> Self {
        self.times = Some(times);
        self
    }
}

/// A status and a `Retry-After` to answer with.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub(crate) status: http::StatusCode,
    pub(crate) retry_after: Option<String>,
}

#[derive(Default)]
pub(crate) struct Switchboard {
    faults: Mutex<HashMap<Target, Fault>>,
    calls: Mutex<HashMap<Target, u64>>,
}

impl Switchboard {
    pub(crate) fn set(&self, target: Target, fault: Fault) {
        lock(&self.faults).insert(target, fault);
    }

    pub(crate) fn clear(&self, target: Target) {
        lock(&self.faults).remove(&target);
    }

    pub(crate) fn clear_all(&self) {
        lock(&self.faults).clear();
    }

    /// Requests that came to `target`, whatever they were answered.
    pub(crate) fn calls(&self, target: Target) -> u64 {
        lock(&self.calls).get(&target).copied().unwrap_or_default()
    }

    fn take(&self, target: Target) -> Option<Fault> {
        let mut faults = lock(&self.faults);
        let fault = faults.get_mut(&target)?;
        let copy = fault.clone();
        match &mut fault.times {
            Some(0 | 1) => {
                faults.remove(&target);
            }
            Some(times) => *times -= 1,
            None => {}
        }
        Some(copy)
    }

    /// Acts out the fault on `target`, if any; an error is to be answered as such.
    pub(crate) async fn pass(&self, target: Target) -> Result<(), Refusal> {
        *lock(&self.calls).entry(target).or_default() += 1;
        let Some(fault) = self.take(target) else { return Ok(()) };
        tokio::time::sleep(Duration::from_millis(fault.delay_ms)).await;
        if fault.hang {
            std::future::pending::<()>().await;
        }
        match fault.status.and_then(|status| http::StatusCode::from_u16(status).ok()) {
            Some(status) => Err(Refusal { status, retry_after: fault.retry_after }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_fault_wears_off_after_its_count() {
        let board = Switchboard::default();
        board.set(Target::Register, Fault::rate_limit(3).times(2));
        for _ in 0..2 {
            let refusal = board.pass(Target::Register).await.unwrap_err();
            assert_eq!(refusal.status, http::StatusCode::TOO_MANY_REQUESTS);
            assert_eq!(refusal.retry_after.as_deref(), Some("3"));
        }
        assert!(board.pass(Target::Register).await.is_ok());
        assert!(board.pass(Target::Map).await.is_ok());
        assert_eq!([Target::Register, Target::Map, Target::Key].map(|target| board.calls(target)), [3, 1, 0]);
    }
}
