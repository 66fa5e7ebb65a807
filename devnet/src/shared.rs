//! What every part of a running devnet holds on to.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use jiff::SignedDuration;
use podtether_core::key::MachinePrivate;
use tokio::sync::{broadcast, oneshot, watch};

use crate::api::Tokens;
use crate::config::DevnetConfig;
use crate::control::crowd::Crowd;
use crate::control::state::State;
use crate::fault::Switchboard;
use crate::listen::Gate;
use crate::sync::lock;

const MAX_COMPLAINTS: usize = 1000;
/// Deltas about the crowd that a session may be behind.
const DELTA_QUEUE: usize = 16_384;

pub(crate) struct Shared {
    pub(crate) config: DevnetConfig,
    pub(crate) noise_key: MachinePrivate,
    pub(crate) tokens: Tokens,
    pub(crate) faults: Switchboard,
    /// Bumped when anything a map session may have to tell has changed.
    pub(crate) changed: watch::Sender<u64>,
    /// What the control server's listeners do.
    pub(crate) gate: watch::Sender<Gate>,
    /// While true, map streams stay open and silent.
    pub(crate) stalled: watch::Sender<bool>,
    /// Who is in netmaps alone.
    pub(crate) crowd: watch::Sender<Crowd>,
    /// The JSON of map messages about them.
    pub(crate) deltas: broadcast::Sender<Arc<str>>,
    /// How many of those there were.
    pub(crate) deltas_made: AtomicU64,
    /// What every session is sent ahead of its first message.
    pub(crate) first_message: Mutex<Option<Vec<u8>>>,
    /// Waiting answers to ping requests, by their id.
    pings: Mutex<HashMap<String, oneshot::Sender<Vec<u8>>>>,
    server_url: OnceLock<String>,
    state: Mutex<State>,
    complaints: Mutex<VecDeque<String>>,
    registration_error: Mutex<Option<String>>,
    clock_offset_ms: AtomicI64,
}

impl Shared {
    pub(crate) fn new(config: DevnetConfig, noise_key: MachinePrivate) -> Self {
        let api_key = config.headscale.as_ref().map(|api| api.api_key.clone()).unwrap_or_default();
        Self {
            state: Mutex::new(State::new(&config)),
            crowd: watch::Sender::new(config.crowd),
            config,
            noise_key,
            tokens: Tokens::new(api_key),
            faults: Switchboard::default(),
            changed: watch::Sender::new(1),
            gate: watch::Sender::new(Gate::OPEN),
            stalled: watch::Sender::new(false),
            deltas: broadcast::Sender::new(DELTA_QUEUE),
            deltas_made: AtomicU64::new(0),
            first_message: Mutex::default(),
            pings: Mutex::default(),
            server_url: OnceLock::new(),
            complaints: Mutex::default(),
            registration_error: Mutex::default(),
            clock_offset_ms: AtomicI64::new(0),
        }
    }

    /// Runs `work` on the state and wakes the map sessions if it changed anything.
    pub(crate) fn with_state<R>(&self, work: impl FnOnce(&mut State) -> R) -> R {
        let (result, revision) = {
            let mut state = lock(&self.state);
            let result = work(&mut state);
            (result, state.revision)
        };
        self.changed.send_if_modified(|seen| {
            let newer = revision > *seen;
            *seen = revision.max(*seen);
            newer
        });
        result
    }

    /// Known once the listeners are bound.
    pub(crate) fn set_server_url(&self, url: String) {
        let _ = self.server_url.set(url);
    }

    pub(crate) fn server_url(&self) -> &str {
        self.server_url.get().map_or("", String::as_str)
    }

    pub(crate) fn expect_ping(&self, id: String, answer: oneshot::Sender<Vec<u8>>) {
        lock(&self.pings).insert(id, answer);
    }

    pub(crate) fn forget_ping(&self, id: &str) {
        lock(&self.pings).remove(id);
    }

    /// Hands a node's answer to whoever waits for it.
    pub(crate) fn complete_ping(&self, id: &str, answer: &[u8]) -> bool {
        lock(&self.pings).remove(id).is_some_and(|waiting| waiting.send(answer.to_vec()).is_ok())
    }

    /// What every registration is refused with.
    pub(crate) fn registration_error(&self) -> Option<String> {
        lock(&self.registration_error).clone()
    }

    pub(crate) fn set_registration_error(&self, error: Option<String>) {
        *lock(&self.registration_error) = error;
    }

    /// How far ahead of the real time the server claims to be.
    pub(crate) fn clock_offset(&self) -> SignedDuration {
        SignedDuration::from_millis(self.clock_offset_ms.load(Ordering::Relaxed))
    }

    pub(crate) fn set_clock_offset(&self, offset: SignedDuration) {
        let millis = i64::try_from(offset.as_millis()).unwrap_or(0);
        self.clock_offset_ms.store(millis, Ordering::Relaxed);
    }

    /// Records something a client did that a real server lets pass although it is wrong.
    pub(crate) fn complain(&self, what: String) {
        tracing::warn!(what, "client is wrong");
        let mut complaints = lock(&self.complaints);
        if complaints.len() >= MAX_COMPLAINTS {
            complaints.pop_front();
        }
        complaints.push_back(what);
    }

    pub(crate) fn complaints(&self) -> Vec<String> {
        lock(&self.complaints).iter().cloned().collect()
    }
}
