//! When strangers flood the UDP sockets, and what the kernel may then drop without asking.
//!
//! A datagram that reaches this process costs a copy, a share of a wake-up and its place in the socket's
//! queue, whatever it is worth. While refused datagrams pile up, the shell puts a filter made of a
//! [`Shield`] on the sockets; when they no longer come, it takes it away, so that in peace each one is
//! looked at and counted by its reason.
//!
//! Messages of sessions are let through that name one in use, which its peer alone was told, and come from
//! where a known peer is. The rest is told apart into kinds, some by random bits of ours that only those
//! know who got a message from us, and of each kind a share is let through that follows from how many of
//! it turned out to be worth nothing, so that the process sees about [`WORTH_A_LOOK`] a second of each. A
//! peer whose authentic packets are refused falls back among the others; what anybody on the way could
//! have forged or repeated is not held against it.

use super::*;

/// Refused datagrams are counted over so long.
const WINDOW: Duration = Duration::from_millis(250);
/// A window with so many is a flood: 4000 a second.
const FLOOD: u64 = 1000;
/// A window with no more is not.
const CALM: u64 = 250;
/// So long after the last window of a flood the shield comes down.
const STAYS_UP: Duration = Duration::from_secs(5);
/// Refused datagrams of each class that may get through in a second.
const WORTH_A_LOOK: f64 = 1000.0;
/// No share is smaller.
const LEAST_SHARE: f64 = 1.0 / 4096.0;
/// A share grows by no more in a window.
const GROWTH: f64 = 4.0;
/// A share that differs by less is as good as the new one.
const NOTABLY: f64 = 1.25;
/// A peer of whose authentic packets so many are refused in a window, and most of them, is a flooder too.
const ABUSE: u64 = 500;
const ABUSE_RATIO: u64 = 3;
/// For so long.
const DISTRUST: Duration = Duration::from_secs(10);
/// What waited in the sockets while no process read them is for sessions that are gone, and comes all at once.
const FROM_BEFORE: Duration = Duration::from_millis(500);
/// Known addresses and disco keys that the filter looks for; those used last come first.
const MAX_KNOWN: usize = 64;

/// What a datagram is, as far as a look at a few of its bytes tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Class {
    /// A handshake initiation.
    Initiation,
    /// One with something in the place of a cookie's proof.
    ProvenInitiation,
    /// A WireGuard message whose receiver index has [`Shield::mark`].
    Session,
    /// One whose receiver index is among [`Shield::sessions`], from one of [`Shield::sources`].
    KnownSession,
    /// An initiation or disco from one of [`Shield::sources`].
    Neighbour,
    /// Disco from a key that is not among [`Shield::disco_keys`].
    Disco,
    /// Disco that names one of them.
    KnownDisco,
    /// A STUN response whose transaction begins with [`Shield::stun_mark`].
    Stun,
    /// Anything else.
    Junk,
}

impl Class {
    /// Number of classes.
    pub const COUNT: usize = 9;

    /// Whether the share of it follows what it is worth.
    fn is_sampled(self) -> bool {
        !matches!(self, Self::KnownSession | Self::Junk)
    }
}

/// What the kernel shall let through; everything else it drops.
#[derive(Debug, Clone, PartialEq)]
pub struct Shield {
    /// Last byte of the receiver index in messages for this node.
    pub mark: u8,
    /// First bytes of the transaction ids of this node's STUN requests.
    pub stun_mark: [u8; 4],
    /// Where known peers send from.
    pub sources: Vec<SocketAddr>,
    /// Receiver indices of known peers, without the last byte.
    pub sessions: Vec<u32>,
    /// First bytes of disco keys of peers in use.
    pub disco_keys: Vec<[u8; 4]>,
    /// Which part of each [`Class`] is let through, from 0 to 1.
    pub shares: [f64; Class::COUNT],
}

impl Shield {
    /// Tells a datagram's class.
    #[must_use]
    pub fn class(&self, from: SocketAddr, datagram: &[u8]) -> Class {
        let marks = Marks { index: self.mark, stun: self.stun_mark };
        let class = marks.class(datagram);
        let known = || self.sources.contains(&from);
        let first = matches!(class, Class::Initiation | Class::ProvenInitiation | Class::Disco);
        if class == Class::Session && self.sessions.contains(&session(datagram)) && known() {
            Class::KnownSession
        } else if first && known() {
            Class::Neighbour
        } else if class == Class::Disco && self.knows(datagram) {
            Class::KnownDisco
        } else {
            class
        }
    }

    /// Whether the kernel lets a datagram through; `dice` is a random number from 0 to 1.
    #[must_use]
    pub fn passes(&self, from: SocketAddr, datagram: &[u8], dice: f64) -> bool {
        dice < self.shares[self.class(from, datagram) as usize]
    }

    fn knows(&self, disco: &[u8]) -> bool {
        disco.get(6..10).is_some_and(|key| self.disco_keys.iter().any(|known| known == key))
    }
}

/// Random bits of ours, which are in what others send us in answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marks {
    pub(super) index: u8,
    pub(super) stun: [u8; 4],
}

impl Marks {
    pub(super) fn new(random: &mut Random) -> Self {
        let [index, stun @ ..] = random.bytes::<5>();
        Self { index, stun }
    }

    fn class(self, datagram: &[u8]) -> Class {
        let Some((&kind, rest)) = datagram.split_first_chunk::<4>() else { return Class::Junk };
        match (u32::from_be_bytes(kind), datagram.len()) {
            (0x0100_0000, 148) if datagram[132..136] == [0; 4] => Class::Initiation,
            (0x0100_0000, 148) => Class::ProvenInitiation,
            (0x0200_0000, 92) | (0x0300_0000, 64) | (0x0400_0000, 32..)
                if receiver(datagram)[3] == self.index =>
            {
                Class::Session
            }
            (0x5453_f09f, 78..) if rest[..2] == [0x92, 0xac] => Class::Disco,
            (0x0101_0000..=0x0101_ffff, 20..)
                if rest[..4] == crate::stun::MAGIC_COOKIE && rest[4..8] == self.stun =>
            {
                Class::Stun
            }
            _ => Class::Junk,
        }
    }
}

/// The receiver index of a datagram that has one: a handshake response names its sender first.
fn receiver(datagram: &[u8]) -> [u8; 4] {
    let at = if datagram.first() == Some(&2) { 8 } else { 4 };
    datagram.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or_default()
}

/// The receiver index without the last byte, in which the peer's sessions differ.
fn session(datagram: &[u8]) -> u32 {
    u32::from_le_bytes(receiver(datagram)) >> 8
}

/// What became of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Taken,
    /// Authentic, and what was in it refused.
    Denied,
    Refused,
}

/// What came of a known peer's sessions in this window.
#[derive(Debug, Clone, Copy)]
struct Tally {
    session: u32,
    peer: Slot,
    taken: u64,
    denied: u64,
}

/// A shield that is up.
struct Up {
    shield: Shield,
    /// By session.
    tallies: Vec<Tally>,
    distrusted: Vec<(Slot, Instant)>,
    /// Dropped by the kernel in this window.
    shielded: u64,
    flooded_at: Instant,
    /// When the shell is asked to count again.
    count_at: Instant,
    /// The window ends early: a kind has begun to be a flood.
    hurry: bool,
}

/// Counts what is refused, and decides when that is a flood.
pub(super) struct Watch {
    pub(super) marks: Marks,
    /// From when on what is refused may be a flood.
    counts_from: Instant,
    began: Option<Instant>,
    refused: [u64; Class::COUNT],
    /// Authentic packets whose content was refused, ever.
    pub(super) denied: u64,
    up: Option<Up>,
    /// The shell cannot install a filter.
    unable: bool,
}

impl Watch {
    pub(super) fn new(random: &mut Random, now: Instant) -> Self {
        let (marks, counts_from) = (Marks::new(random), now + FROM_BEFORE);
        let refused = [0; Class::COUNT];
        Self { marks, counts_from, began: None, refused, denied: 0, up: None, unable: false }
    }

    /// What a datagram that is about to be worked on is.
    pub(super) fn class(&self, from: SocketAddr, datagram: &[u8]) -> (Class, u32) {
        let class = match &self.up {
            Some(up) => up.shield.class(from, datagram),
            None => self.marks.class(datagram),
        };
        (class, session(datagram))
    }

    /// What became of a datagram. True when a shield has to go up.
    pub(super) fn note(&mut self, (class, session): (Class, u32), fate: Fate, now: Instant) -> bool {
        let refused = fate != Fate::Taken;
        if let Some(up) = &mut self.up {
            if class == Class::KnownSession
                && let Ok(at) = up.tallies.binary_search_by_key(&session, |tally| tally.session)
                && let Some(tally) = up.tallies.get_mut(at)
            {
                tally.taken += u64::from(fate == Fate::Taken);
                tally.denied += u64::from(fate == Fate::Denied);
                up.hurry |= tally.denied == FLOOD;
            }
            if refused {
                let count = &mut self.refused[class as usize];
                *count += 1;
                up.hurry |= class.is_sampled() && *count == FLOOD;
            }
            if up.hurry {
                up.count_at = up.count_at.min(now);
            }
            return false;
        }
        if !refused || self.unable || now < self.counts_from {
            return false;
        }
        let began = *self.began.get_or_insert(now);
        if now.saturating_duration_since(began) >= WINDOW {
            self.began = Some(now);
            self.refused = [0; Class::COUNT];
        }
        self.refused[class as usize] += 1;
        self.refused.iter().sum::<u64>() >= FLOOD
    }

    fn deadline(&self) -> Option<Instant> {
        self.up.as_ref().map(|up| up.count_at)
    }
}

/// The share of a class that is let through next, by how many of it were refused in `elapsed` with the
/// share before.
fn next_share(share: f64, refused: u64, elapsed: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts of a window")]
    let rate = refused as f64 / elapsed.as_secs_f64().max(0.001);
    let wanted = if rate > 0.0 { share * WORTH_A_LOOK / rate } else { f64::INFINITY };
    wanted.min(share * GROWTH).clamp(LEAST_SHARE, 1.0)
}

/// Gives their shares to the classes that are not sampled.
fn fix(shares: &mut [f64; Class::COUNT]) {
    shares[Class::KnownSession as usize] = 1.0;
    shares[Class::Junk as usize] = 0.0;
}

/// Whether a filter with the old shares would do for the new ones.
fn alike(old: &[f64; Class::COUNT], new: &[f64; Class::COUNT]) -> bool {
    let near = |a: f64, b: f64| a <= b * NOTABLY && b <= a * NOTABLY;
    old.iter().zip(new).all(|(a, b)| near(*a, *b) && (*b < 1.0 || *a >= 1.0))
}

impl Engine {
    /// The filter that belongs on the UDP sockets; none in peace.
    #[must_use]
    pub fn shield(&self) -> Option<&Shield> {
        self.watch.up.as_ref().map(|up| &up.shield)
    }

    /// The shell could not put a filter on the sockets, and is not to be asked again.
    pub fn forgo_shield(&mut self) {
        self.watch.unable = true;
        self.watch.up = None;
    }

    /// So many datagrams were dropped by the kernel since the last call, while a shield was up: the
    /// answer to [`Event::CountShielded`].
    pub fn handle_shielded(&mut self, count: u64, now: Instant) {
        self.counters.drop(DropReason::Shielded, usize::try_from(count).unwrap_or(usize::MAX));
        let Some(mut up) = self.watch.up.take() else { return };
        up.shielded += count;
        let elapsed = self.watch.began.map_or(WINDOW, |began| now.saturating_duration_since(began));
        if elapsed < WINDOW && !up.hurry {
            self.watch.up = Some(up);
            return;
        }
        let refused = std::mem::take(&mut self.watch.refused);
        let total = refused.iter().sum::<u64>() + up.shielded;
        self.watch.began = Some(now);
        if total > scaled(CALM, elapsed) {
            up.flooded_at = now;
        } else if now.saturating_duration_since(up.flooded_at) >= STAYS_UP {
            self.watch.began = None;
            self.events.push_back(Event::ShieldChanged);
            return;
        }
        up.shielded = 0;
        up.hurry = false;
        up.distrusted.retain(|(_, until)| *until > now);
        for tally in &up.tallies {
            if tally.denied >= scaled(ABUSE, elapsed)
                && tally.denied / ABUSE_RATIO >= tally.taken
                && up.distrusted.len() < MAX_KNOWN
            {
                up.distrusted.push((tally.peer, now + DISTRUST));
            }
        }
        let mut shares = up.shield.shares;
        for (share, refused) in shares.iter_mut().zip(refused) {
            *share = next_share(*share, refused, elapsed);
        }
        fix(&mut shares);
        if alike(&up.shield.shares, &shares) {
            shares = up.shield.shares;
        }
        let (shield, tallies) = self.make_shield(shares, &up.distrusted);
        if shield != up.shield {
            self.events.push_back(Event::ShieldChanged);
        }
        self.watch.up = Some(Up { shield, tallies, ..up });
    }

    /// A flood has begun.
    pub(super) fn raise_shield(&mut self, now: Instant) {
        let elapsed = self.watch.began.map_or(WINDOW, |began| now.saturating_duration_since(began));
        let refused = std::mem::take(&mut self.watch.refused);
        let mut shares = refused.map(|count| next_share(1.0, count, elapsed));
        fix(&mut shares);
        let (shield, tallies) = self.make_shield(shares, &[]);
        self.watch.began = Some(now);
        self.watch.up = Some(Up {
            shield,
            tallies,
            distrusted: Vec::new(),
            shielded: 0,
            flooded_at: now,
            count_at: now + WINDOW,
            hurry: false,
        });
        self.events.push_back(Event::ShieldChanged);
    }

    pub(super) fn shield_deadline(&self) -> Option<Instant> {
        self.watch.deadline()
    }

    pub(super) fn shield_timeout(&mut self, now: Instant) {
        if let Some(up) = self.watch.up.as_mut().filter(|up| up.count_at <= now) {
            up.count_at = now + WINDOW;
            self.events.push_back(Event::CountShielded);
        }
    }

    fn make_shield(
        &self,
        shares: [f64; Class::COUNT],
        distrusted: &[(Slot, Instant)],
    ) -> (Shield, Vec<Tally>) {
        let mut known: Vec<Slot> = self.by_index.values().copied().collect();
        let used = |slot: &Slot| self.peers.get(*slot).and_then(|peer| peer.active.as_ref()?.last_rx);
        known.sort_by_key(|slot| (std::cmp::Reverse(used(slot)), *slot));
        let (mut sources, mut disco_keys, mut tallies) = (Vec::new(), Vec::new(), Vec::new());
        for slot in known.into_iter().take(MAX_KNOWN) {
            let Some(peer) = self.peers.get(slot) else { continue };
            let Some(active) = peer.active.as_ref() else { continue };
            if let Some(key) = peer.disco.as_bytes().first_chunk().filter(|_| !peer.disco.is_zero()) {
                disco_keys.push(*key);
            }
            let plain = peer.facts.endpoints().filter(|_| peer.wireguard_only);
            sources.extend(active.path.best().into_iter().chain(active.last_from).chain(plain));
            if distrusted.iter().all(|(bad, _)| *bad != slot) {
                tallies.push(Tally { session: active.index, peer: slot, taken: 0, denied: 0 });
            }
        }
        sources.truncate(MAX_KNOWN);
        sources.sort_unstable();
        sources.dedup();
        disco_keys.sort_unstable();
        disco_keys.dedup();
        tallies.sort_unstable_by_key(|tally| tally.session);
        let shield = Shield {
            mark: self.watch.marks.index,
            stun_mark: self.watch.marks.stun,
            sources,
            sessions: tallies.iter().map(|tally| tally.session).collect(),
            disco_keys,
            shares,
        };
        (shield, tallies)
    }
}

/// A count for a window, for one that took longer.
fn scaled(count: u64, elapsed: Duration) -> u64 {
    let windows = elapsed.as_millis() / WINDOW.as_millis();
    count.saturating_mul(u64::try_from(windows).unwrap_or(u64::MAX).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wg::{Opened, Tunnel};

    #[test]
    fn what_peers_answer_and_send_is_told_by_our_index_and_not_by_theirs() {
        let now = Instant::now();
        let (a, b) = ([7, 9])
            .map(|secret| Identity::new([secret; 32], UnixTime::from_secs(1_800_000_000), now))
            .into();
        let key = |of: u8| *crate::key::NodePrivate::from_bytes([of; 32]).public().as_bytes();
        let mut ours = Tunnel::new(&a, key(9), 0x9b_1234, 1, now);
        let mut theirs = Tunnel::new(&b, key(7), 0x22_5678, 2, now);
        let mut out = [0; 256];
        let initiation = ours.initiate(now).expect("allowed");
        let Opened::Response(length) = theirs.open(&initiation, &mut out, now) else { panic!("no response") };
        let response = out[..length].to_vec();
        let Opened::Established(length) = ours.open(&response, &mut out, now) else { panic!("no session") };
        let theirs = theirs.open(&out[..length], &mut [0; 256], now);
        assert_eq!(theirs, Opened::Keepalive);
        let class = |index, datagram: &[u8]| Marks { index, stun: [0; 4] }.class(datagram);
        for (datagram, index) in [(&response[..], 0x9b), (&out[..length], 0x22)] {
            assert_eq!(class(index, datagram), Class::Session, "{index:x}");
            assert_eq!(class(index ^ 0x9b ^ 0x22, datagram), Class::Junk, "{index:x}");
        }
        assert_eq!((session(&response), session(&out[..length])), (0x9b_1234, 0x22_5678));
    }
}
