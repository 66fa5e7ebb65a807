//! WireGuard: one [`Tunnel`] per active peer, and the [`Identity`] they share.
//!
//! Snow makes the handshakes ([`handshake`]), the transport is our own ([`session`]) so that the cipher can be the
//! fastest one the processor has; boringtun tells whose initiations those are that come, and makes and checks cookies
//! ([`identity`]). Everything runs on the `now` that is passed in.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::rate_limiter::RateLimiter;
use snow::HandshakeState;
use x25519_dalek::PublicKey;

use crate::budget::{Bucket, Rate};
use clock::Clock;
use handshake::{COOKIE_REPLY_LEN, Handshaker, Keys, RESPONSE_LEN};
pub(crate) use identity::{Identity, Proof};
use session::{Refused, Session};

/// When an initiation was made, in its sender's words (TAI64N): grows with time.
pub(crate) type Timestamp = [u8; 12];

/// Age at which a session's initiator makes the next one.
pub(crate) const REKEY_AFTER: Duration = Duration::from_secs(120);
/// Age from which a session neither encrypts nor decrypts.
pub(crate) const REJECT_AFTER: Duration = Duration::from_secs(180);
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses before the first retries of an attempt; [`REKEY_TIMEOUT`] before each further one. A first
/// initiation is often lost because there is no path yet, and 5 s of silence then are for nothing.
const FIRST_RETRIES: [Duration; 3] =
    [Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2)];
/// The pause while a peer may not have been told of us yet, which nothing else would tell us of.
const EAGER_RETRY: Duration = Duration::from_millis(200);
/// The least time between two initiations: well above the 20 ms within which peers ignore the second.
const MIN_SPACING: Duration = Duration::from_millis(100);
/// A response that took longer was held up by a peer that stood still, and says nothing of the path.
const HELD_UP: Duration = Duration::from_secs(2);
/// News of paths that hasten one attempt; a peer that answers everything but WireGuard gains no more.
const MAX_HASTENED: u8 = 16;
const REKEY_ATTEMPT: Duration = Duration::from_secs(90);
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Idle time after which a peer's tunnel is taken down.
pub(crate) const IDLE_AFTER: Duration = Duration::from_secs(540);
/// Retries are spread by up to a fifteenth of their pause.
const JITTER_SHARE: u64 = 15;

/// Bytes a data message adds to its packet.
pub(crate) const OVERHEAD: usize = 32;
/// Length of a handshake initiation.
pub(crate) const INITIATION_LEN: usize = 148;
const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const COOKIE_REPLY: u8 = 3;
const DATA: u8 = 4;
const SLOTS: usize = 8;
/// A peer that begins handshakes faster than this is not answered, as with other WireGuards.
const CONSUME_SPACING: Duration = Duration::from_millis(20);
/// Responses that one attempt's index is tried with: each costs two Curve25519 operations.
const RESPONSES: Rate = Rate::per_second(20, 10);

/// Packets that wait for a handshake, per peer.
pub(crate) const MAX_WAITING: usize = 64;

/// What a WireGuard datagram is, from its header alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Initiation,
    /// Response, cookie reply or data, with the receiver index.
    Indexed(u32),
    Malformed,
}

/// Classifies a datagram without touching a key.
pub(crate) fn classify(datagram: &[u8]) -> Kind {
    let Some(([kind, 0, 0, 0], rest)) = datagram.split_first_chunk() else { return Kind::Malformed };
    let at = match (*kind, datagram.len()) {
        (INITIATION, INITIATION_LEN) => return Kind::Initiation,
        (RESPONSE, RESPONSE_LEN) => 4,
        (COOKIE_REPLY, COOKIE_REPLY_LEN) | (DATA, OVERHEAD..) => 0,
        _ => return Kind::Malformed,
    };
    read_u32(rest, at).map_or(Kind::Malformed, Kind::Indexed)
}

/// Whether a datagram says that it is a handshake response.
pub(crate) fn is_response(datagram: &[u8]) -> bool {
    datagram.first() == Some(&RESPONSE)
}

/// Whether an initiation has something in the place of a cookie's proof.
pub(crate) fn claims_proof(initiation: &[u8]) -> bool {
    initiation.get(INITIATION_LEN - 16..).is_some_and(|mac2| mac2.iter().any(|byte| *byte != 0))
}

/// Whether a datagram looks like an initiation.
pub(crate) fn is_initiation(datagram: &[u8]) -> bool {
    datagram.len() == INITIATION_LEN && datagram.first() == Some(&INITIATION)
}

struct Attempt {
    started: Instant,
    sent: Instant,
    retry_at: Instant,
    /// Retries since a path last came up.
    tries: usize,
    hastened: u8,
    message: [u8; INITIATION_LEN],
    /// Of `message`: what its answer is read in.
    state: Box<HandshakeState>,
    /// Receiver indices of the initiations before this one, newest first, and when they were sent.
    earlier: [Option<(u32, Instant)>; 4],
}

impl Attempt {
    fn index(&self) -> u32 {
        read_u32(&self.message, 4).unwrap_or_default()
    }
}

/// What [`Tunnel::open`] made of a datagram.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// An IP packet of this length is in the output.
    Packet(usize),
    Keepalive,
    /// Authentic, and what is inside no IP packet.
    Unreadable,
    /// A handshake response of this length is in the output, to be sent back.
    Response(usize),
    /// Our handshake is complete; a keepalive of this length is in the output and confirms it to the
    /// peer unless data does.
    Established(usize),
    /// A cookie was taken; the next attempt carries it.
    Cookie,
    /// Authentic or not, it came before: what goes by two ways arrives twice.
    Duplicate,
    /// More responses to one attempt than are worth the work.
    TooMany,
    Rejected,
}

/// What a tunnel wants at its deadline.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Nothing,
    /// Send a handshake initiation.
    Initiate,
    /// Send an empty data message.
    Keepalive,
    /// The peer does not answer; what waited was dropped (so many packets).
    GaveUp(usize),
    /// Nothing has moved for [`IDLE_AFTER`].
    Idle,
}

/// Result of [`Tunnel::seal`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sealed {
    pub(crate) len: usize,
    /// The session is old enough for its initiator to make another.
    pub(crate) rekey: bool,
}

/// One peer's WireGuard state.
pub(crate) struct Tunnel {
    handshaker: Handshaker,
    /// Checks the first MAC of what comes.
    macs: Arc<RateLimiter>,
    clock: Clock,
    /// Receiver index of the session or handshake begun last: the tunnel's own 24 bits, then a number.
    index: u32,
    sessions: [Option<Box<Session>>; SLOTS],
    current: u32,
    epoch: u64,
    attempt: Option<Attempt>,
    last_initiation: Option<Instant>,
    /// Until when retries are [`EAGER_RETRY`] apart.
    eager_until: Instant,
    waiting: VecDeque<Vec<u8>>,
    keepalive_at: Option<Instant>,
    /// Data went out and nothing came back since: when to suspect the session.
    silence_at: Option<Instant>,
    last_used: Instant,
    established: Option<Instant>,
    /// Of the peer's initiations that were answered.
    newest_timestamp: Timestamp,
    /// When an initiation of the peer was last answered.
    last_consumed: Option<Instant>,
    responses: Bucket,
    jitter: u64,
    patient: bool,
}

impl Tunnel {
    /// `index` is this tunnel's receiver index, 24 bits; `jitter` any random number.
    pub(crate) fn new(identity: &Identity, peer: [u8; 32], index: u32, jitter: u64, now: Instant) -> Self {
        Self {
            handshaker: Handshaker::new(identity.secret.clone(), PublicKey::from(peer)),
            macs: Arc::clone(&identity.unlimited),
            clock: identity.clock,
            index: index << 8,
            sessions: [const { None }; SLOTS],
            current: 0,
            epoch: 0,
            attempt: None,
            last_initiation: None,
            eager_until: now,
            waiting: VecDeque::new(),
            keepalive_at: None,
            silence_at: None,
            last_used: now,
            established: None,
            newest_timestamp: Timestamp::default(),
            last_consumed: None,
            responses: Bucket::default(),
            jitter: jitter | 1,
            patient: false,
        }
    }

    fn slot(index: u32) -> usize {
        (index & 7) as usize
    }

    fn session(&self, index: u32) -> Option<&Session> {
        self.sessions[Self::slot(index)].as_deref().filter(|session| session.index == index)
    }

    fn live(&self, index: u32, now: Instant) -> Option<&Session> {
        self.session(index).filter(|session| is_live(session, now))
    }

    fn live_mut(&mut self, index: u32, now: Instant) -> Option<&mut Session> {
        let session = self.sessions[Self::slot(index)].as_deref_mut();
        session.filter(|session| session.index == index && is_live(session, now))
    }

    /// An index for a new handshake: none of the last ones, and not in the place of the session that encrypts nor of
    /// the one that our own handshake would give.
    fn next_index(&mut self) -> u32 {
        let current = self.session(self.current).map(|session| session.index);
        let taken = [current, self.attempt.as_ref().map(Attempt::index)].map(|index| index.map(Self::slot));
        loop {
            self.index = (self.index & !0xff) | (self.index.wrapping_add(1) & 0xff);
            if !taken.contains(&Some(Self::slot(self.index))) {
                return self.index;
            }
        }
    }

    /// Initiations of the peer that are not newer than this one are replays.
    pub(crate) fn remember(&mut self, timestamp: Timestamp) {
        self.newest_timestamp = self.newest_timestamp.max(timestamp);
    }

    fn forget_expired(&mut self, now: Instant) {
        for slot in &mut self.sessions {
            slot.take_if(|session| !is_live(session, now));
        }
    }

    /// Whether a packet can be encrypted now.
    pub(crate) fn ready(&self, now: Instant) -> bool {
        self.live(self.current, now).is_some()
    }

    /// Whether a handshake of ours is under way.
    pub(crate) fn attempting(&self) -> bool {
        self.attempt.is_some()
    }

    /// Since when a handshake of ours is under way.
    pub(crate) fn attempted(&self, now: Instant) -> Option<Duration> {
        self.attempt.as_ref().map(|a| now.saturating_duration_since(a.started))
    }

    /// The initiation under way, for a second path: its receiver ignores the copy that comes later.
    pub(crate) fn current_initiation(&self) -> Option<&[u8; INITIATION_LEN]> {
        self.attempt.as_ref().map(|a| &a.message)
    }

    /// When the newest session was made.
    pub(crate) fn established(&self) -> Option<Instant> {
        self.established
    }

    /// `pause` and a little more.
    fn jittered(&mut self, pause: Duration) -> Duration {
        // xorshift64: spreads retries, holds no secret.
        self.jitter ^= self.jitter << 13;
        self.jitter ^= self.jitter >> 7;
        self.jitter ^= self.jitter << 17;
        let most = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX) / JITTER_SHARE;
        pause + Duration::from_millis(self.jitter % (most + 1))
    }

    /// Encrypts `packet` into `out`, which is [`OVERHEAD`] bytes longer at least. `None`: no session, see [`Tunnel::wait`].
    pub(crate) fn seal(&mut self, packet: &[u8], out: &mut [u8], now: Instant) -> Option<Sealed> {
        let session = self.live_mut(self.current, now)?;
        let len = session.seal(packet, out)?;
        let rekey = session.rekey_at.is_some_and(|at| at <= now);
        self.keepalive_at = None;
        if !packet.is_empty() {
            self.last_used = now;
            if self.silence_at.is_none() {
                let patience = KEEPALIVE + self.jittered(REKEY_TIMEOUT);
                self.silence_at = Some(now + patience);
            }
        }
        Some(Sealed { len, rekey })
    }

    /// Keeps `packet` until a session exists; gives the number of packets dropped for it.
    pub(crate) fn wait(&mut self, packet: &[u8], now: Instant) -> usize {
        self.last_used = now;
        let dropped = usize::from(self.waiting.len() >= MAX_WAITING && self.waiting.pop_front().is_some());
        self.waiting.push_back(packet.to_vec());
        dropped
    }

    /// A packet that waited, oldest first.
    pub(crate) fn next_waiting(&mut self) -> Option<Vec<u8>> {
        let packet = self.waiting.pop_front();
        if packet.is_some() && self.waiting.is_empty() {
            self.waiting = VecDeque::new();
        }
        packet
    }

    /// Number and bytes of packets that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Retries quickly until then: the peer may be about to learn of us.
    pub(crate) fn be_eager(&mut self, until: Instant) {
        self.eager_until = self.eager_until.max(until);
    }

    /// Retries every [`REKEY_TIMEOUT`] and no sooner, as WireGuard has it.
    pub(crate) fn be_patient(&mut self) {
        self.patient = true;
    }

    /// Makes an initiation unless it is too early for one: begins an attempt, or repeats one that is due.
    pub(crate) fn initiate(&mut self, now: Instant) -> Option<[u8; INITIATION_LEN]> {
        if self.attempt.as_ref().is_some_and(|a| now < a.retry_at) {
            return None;
        }
        self.make_initiation(now)
    }

    /// A path to the peer has come up: makes an initiation for an attempt that is not answered, now or at
    /// its next retry, which then is not far.
    pub(crate) fn hasten(&mut self, now: Instant) -> Option<[u8; INITIATION_LEN]> {
        let attempt = self.attempt.as_mut()?;
        if attempt.hastened >= MAX_HASTENED || self.patient {
            return None;
        }
        attempt.hastened += 1;
        attempt.tries = 0;
        let earliest = attempt.sent + MIN_SPACING;
        attempt.retry_at = attempt.retry_at.min(earliest);
        if now < earliest { None } else { self.make_initiation(now) }
    }

    fn make_initiation(&mut self, now: Instant) -> Option<[u8; INITIATION_LEN]> {
        if self.last_initiation.is_some_and(|last| now.duration_since(last) < MIN_SPACING) {
            return None;
        }
        self.forget_expired(now);
        let mut message = [0; INITIATION_LEN];
        let (index, timestamp) = (self.next_index(), self.clock.timestamp(now));
        let state = self.handshaker.initiate(index, timestamp, now, &mut message)?;
        let tries = self.attempt.as_ref().map_or(0, |a| a.tries);
        let pause = if self.patient {
            REKEY_TIMEOUT
        } else if now < self.eager_until {
            EAGER_RETRY
        } else {
            FIRST_RETRIES.get(tries).copied().unwrap_or(REKEY_TIMEOUT)
        };
        let retry_at = now + self.jittered(pause);
        match &mut self.attempt {
            Some(attempt) => {
                attempt.earlier.rotate_right(1);
                attempt.earlier[0] = Some((attempt.index(), attempt.sent));
                attempt.tries = tries + usize::from(now >= self.eager_until);
                (attempt.sent, attempt.retry_at) = (now, retry_at);
                (attempt.message, attempt.state) = (message, state);
            }
            none => {
                *none = Some(Attempt {
                    started: now,
                    sent: now,
                    retry_at,
                    tries: usize::from(now >= self.eager_until),
                    hastened: 0,
                    message,
                    state,
                    earlier: [None; 4],
                });
            }
        }
        self.last_initiation = Some(now);
        Some(message)
    }

    /// Whether a response answers an initiation that a newer one has replaced. The peer forgets the
    /// session of the older one when the newer one arrives, so what it would carry could be lost; but it
    /// tells how long an answer takes, and that the next one is worth that wait.
    fn superseded(&mut self, index: u32, now: Instant) -> bool {
        let Some(attempt) = &mut self.attempt else { return false };
        let Some((_, sent)) = attempt.earlier.into_iter().flatten().find(|(i, _)| *i == index) else {
            return false;
        };
        let round_trip = now.duration_since(sent);
        if round_trip <= HELD_UP {
            attempt.retry_at = attempt.retry_at.max(attempt.sent + round_trip * 3 / 2 + MIN_SPACING);
        }
        true
    }

    /// Takes a datagram; `out` is as long as the datagram and 148 bytes at least.
    pub(crate) fn open(&mut self, datagram: &[u8], out: &mut [u8], now: Instant) -> Opened {
        match (datagram.first(), classify(datagram)) {
            (Some(&DATA), Kind::Indexed(index)) => self.open_data(index, datagram, out, now),
            (Some(&RESPONSE), Kind::Indexed(index)) => self.take_response(index, datagram, out, now),
            (Some(&COOKIE_REPLY), Kind::Indexed(_)) => {
                if self.handshaker.take_cookie(datagram, now) {
                    Opened::Cookie
                } else {
                    Opened::Rejected
                }
            }
            (_, Kind::Initiation) => self.answer(datagram, out, now),
            (_, Kind::Indexed(_) | Kind::Malformed) => Opened::Rejected,
        }
    }

    fn open_data(&mut self, index: u32, datagram: &[u8], out: &mut [u8], now: Instant) -> Opened {
        let Some(session) = self.live_mut(index, now) else { return Opened::Rejected };
        let length = match session.open(datagram, out) {
            Ok(length) => length,
            Err(Refused::Replayed) => return Opened::Duplicate,
            Err(Refused::Forged) => return Opened::Rejected,
        };
        let opened = match out.get(..length).and_then(ip_length) {
            _ if length == 0 => Opened::Keepalive,
            Some(packet) => Opened::Packet(packet),
            None => Opened::Unreadable,
        };
        self.note_received(index, matches!(opened, Opened::Packet(_)), now);
        opened
    }

    fn answer(&mut self, initiation: &[u8], out: &mut [u8], now: Instant) -> Opened {
        if self.last_consumed.is_some_and(|last| now.duration_since(last) < CONSUME_SPACING) {
            return Opened::Duplicate;
        }
        let Some(out) = out.first_chunk_mut::<RESPONSE_LEN>() else { return Opened::Rejected };
        if !self.is_addressed(initiation) {
            return Opened::Rejected;
        }
        let Some(received) = self.handshaker.receive(initiation) else { return Opened::Rejected };
        if received.timestamp <= self.newest_timestamp {
            return Opened::Duplicate;
        }
        self.newest_timestamp = received.timestamp;
        let index = self.next_index();
        let Some(keys) = self.handshaker.respond(received, index, now, out) else { return Opened::Rejected };
        self.last_consumed = Some(now);
        self.add_session(index, false, keys, now);
        Opened::Response(RESPONSE_LEN)
    }

    fn take_response(&mut self, index: u32, response: &[u8], out: &mut [u8], now: Instant) -> Opened {
        if self.superseded(index, now) {
            return Opened::Duplicate;
        }
        if self.attempt.as_ref().is_none_or(|attempt| attempt.index() != index) {
            // A response to no open initiation is nearly always the second copy of one.
            return Opened::Duplicate;
        }
        if !self.responses.take(RESPONSES, now) {
            return Opened::TooMany;
        }
        if !self.is_addressed(response) {
            return Opened::Rejected;
        }
        let Some(attempt) = self.attempt.as_mut() else { return Opened::Duplicate };
        let Some(keys) = Handshaker::finish(&mut attempt.state, response) else { return Opened::Rejected };
        self.attempt = None;
        self.add_session(index, true, keys, now);
        self.set_current(index);
        let keepalive = self.live_mut(index, now).and_then(|session| session.seal(&[], out));
        keepalive.map_or(Opened::Rejected, Opened::Established)
    }

    /// Whether a handshake message was made by somebody who knows our public key.
    fn is_addressed(&self, message: &[u8]) -> bool {
        self.macs.verify_packet(None, message, &mut []).is_ok()
    }

    /// The newest of the peer's initiations that was answered.
    pub(crate) fn newest_timestamp(&self) -> Timestamp {
        self.newest_timestamp
    }

    fn add_session(&mut self, index: u32, initiator: bool, keys: Keys, now: Instant) {
        self.forget_expired(now);
        self.epoch += 1;
        let session = Session::new(index, initiator, self.epoch, keys, now);
        self.sessions[Self::slot(index)] = Some(Box::new(session));
        self.established = Some(now);
        self.silence_at = None;
        self.last_used = now;
    }

    /// A session encrypts from when it is known that the peer has it, unless a newer one does.
    fn set_current(&mut self, index: u32) {
        let epoch = |index| self.session(index).map(|session| session.epoch);
        if epoch(index) > epoch(self.current) {
            self.current = index;
        }
    }

    fn note_received(&mut self, index: u32, data: bool, now: Instant) {
        if self.current != index {
            self.set_current(index);
            if self.current == index {
                // The peer uses a session that it initiated: our own attempt has lost its purpose.
                self.attempt = None;
            }
        }
        self.silence_at = None;
        if data {
            self.last_used = now;
            if self.keepalive_at.is_none() {
                self.keepalive_at = Some(now + KEEPALIVE);
            }
        }
    }

    /// Whether received data shows a session so old that its initiator must replace it now.
    pub(crate) fn must_rekey(&self, now: Instant) -> bool {
        let due = |session: &Session| session.late_rekey_at.is_some_and(|at| at <= now);
        self.attempt.is_none() && self.live(self.current, now).is_some_and(due)
    }

    /// When [`Tunnel::handle_timeout`] has something to do.
    pub(crate) fn deadline(&self) -> Instant {
        let idle = self.last_used + IDLE_AFTER;
        [self.attempt.as_ref().map(|a| a.retry_at), self.keepalive_at, self.silence_at]
            .into_iter()
            .flatten()
            .fold(idle, Instant::min)
    }

    /// What is due at `now`; call again until it is nothing.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> Due {
        if let Some(attempt) = self.attempt.as_ref().filter(|a| a.retry_at <= now) {
            if now.duration_since(attempt.started) < REKEY_ATTEMPT {
                return Due::Initiate;
            }
            self.attempt = None;
            let dropped = self.waiting.len();
            self.waiting = VecDeque::new();
            return Due::GaveUp(dropped);
        }
        if self.silence_at.is_some_and(|at| at <= now) {
            self.silence_at = None;
            if self.attempt.is_none() {
                return Due::Initiate;
            }
        }
        if self.keepalive_at.is_some_and(|at| at <= now) {
            self.keepalive_at = None;
            if self.ready(now) {
                return Due::Keepalive;
            }
        }
        if self.last_used + IDLE_AFTER <= now {
            return Due::Idle;
        }
        Due::Nothing
    }
}

fn is_live(session: &Session, now: Instant) -> bool {
    now < session.rejects_at
}

/// How long an IP packet says it is, without the padding behind it.
fn ip_length(packet: &[u8]) -> Option<usize> {
    let field = |at: usize| Some(usize::from(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?)));
    let (shortest, length) = match packet.first()? >> 4 {
        4 => (20, field(2)?),
        6 => (40, 40 + field(4)?),
        _ => return None,
    };
    (packet.len() >= shortest && length <= packet.len()).then_some(length)
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

mod clock;
mod handshake;
mod identity;
mod session;
#[cfg(test)]
mod tests;
mod window;
