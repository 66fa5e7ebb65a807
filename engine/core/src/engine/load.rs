//! What this node does for others in a second, at most.
//!
//! A Curve25519 operation takes some 40 µs, a handshake seven of them, one that is forged in a peer's name four; a
//! stranger can ask for one with every datagram. The figures below bound that work to a ninth of a core, and the shares
//! by origin let peers through while one sender asks for too much.

use super::*;
use crate::budget::{Bucket, Origin, Rate, Shares};
use crate::wg::{Proof, claims_proof};

/// Initiations worked on before the sender has shown that it is at its address.
const UNPROVEN: Rate = Rate::per_second(200, 200);
/// Of these, from one address and port, or one node behind a relay.
const UNPROVEN_EACH: Rate = Rate::per_second(20, 20);
/// Initiations worked on whose senders have shown it.
const PROVEN: Rate = Rate::per_second(200, 100);
/// Of these, from one address.
const PROVEN_EACH: Rate = Rate::per_second(50, 50);
/// Proofs that are looked at, right or wrong.
const PROOFS: Rate = Rate::per_second(2000, 500);
/// Cookies sent, 64 bytes for 148.
const COOKIES: Rate = Rate::per_second(2000, 1000);
const COOKIES_EACH: Rate = Rate::per_second(50, 50);
/// Responses tried, over all peers.
const RESPONSES: Rate = Rate::per_second(400, 400);
/// Disco keys worked out for senders without traffic; apart for UDP and for relays, which vouch for nodes.
const DISCO_KEYS: Rate = Rate::per_second(100, 100);
/// Disco keys kept for senders without traffic.
const KEPT_KEYS: usize = 32;
/// Peers that the pod begins to talk to. Each costs a handshake.
const CALLS_BY_POD: Rate = Rate::per_second(128, 256);
/// Peers with running state at a time.
pub(super) const MAX_ACTIVE: usize = 4096;
/// Handshakes begun because a message came for a session that is gone, for one sender and for all.
const NUDGES_EACH: Rate = Rate { every: Duration::from_millis(100), burst: 1 };
const NUDGES: Rate = Rate::per_second(20, 20);

/// What an authentic peer may ask of us by disco. A peer has some thirty addresses to ping from.
pub(crate) const PINGS_ANSWERED: Rate = Rate::per_second(64, 128);
/// Each may cause as many pings as a peer has addresses.
pub(crate) const CALLS_HEARD: Rate = Rate::per_second(1, 8);

/// What is left of all that.
pub(super) struct Load {
    unproven: Bucket,
    proven: Bucket,
    proofs: Bucket,
    cookies: Bucket,
    responses: Bucket,
    disco_udp: Bucket,
    disco_derp: Bucket,
    pod: Bucket,
    nudges: Bucket,
    unproven_each: Shares,
    proven_each: Shares,
    cookies_each: Shares,
    nudges_each: Shares,
    keys: VecDeque<(DiscoPublic, disco::SharedKey)>,
}

/// Whether an initiation may be worked on.
pub(super) enum Admission {
    Yes,
    /// Send the first so many bytes of the reply back instead.
    Cookie(usize),
    No(DropReason),
}

impl Load {
    pub(super) fn new(random: &mut Random) -> Self {
        Self {
            unproven: Bucket::default(),
            proven: Bucket::default(),
            proofs: Bucket::default(),
            cookies: Bucket::default(),
            responses: Bucket::default(),
            disco_udp: Bucket::default(),
            disco_derp: Bucket::default(),
            pod: Bucket::default(),
            nudges: Bucket::default(),
            unproven_each: Shares::new(random),
            proven_each: Shares::new(random),
            cookies_each: Shares::new(random),
            nudges_each: Shares::new(random),
            keys: VecDeque::new(),
        }
    }

    /// Decides about an initiation before any costly step; `reply` takes a cookie.
    pub(super) fn admit(
        &mut self,
        identity: &Identity,
        via: Via,
        datagram: &[u8],
        now: Instant,
        reply: &mut [u8],
    ) -> Admission {
        let claims = claims_proof(datagram);
        let other = if claims {
            self.proven.has(PROVEN, now) && self.proofs.has(PROOFS, now)
        } else {
            self.cookies.has(COOKIES, now)
        };
        if !other && !self.unproven.has(UNPROVEN, now) {
            return Admission::No(DropReason::UnderLoad);
        }
        if !identity.is_addressed(datagram) {
            return Admission::No(DropReason::BadCrypto);
        }
        let origin = via.origin();
        if self.unproven_each.take(origin, UNPROVEN_EACH, now) && self.unproven.take(UNPROVEN, now) {
            return Admission::Yes;
        }
        // Proving it wrong costs as much as making a cookie, so both are paid for beforehand.
        let worth_it = if claims {
            self.proofs.take(PROOFS, now)
        } else {
            self.cookies_each.take(origin, COOKIES_EACH, now) && self.cookies.take(COOKIES, now)
        };
        if !worth_it {
            return Admission::No(DropReason::UnderLoad);
        }
        let host = via.host();
        match identity.proof(via.address(), datagram, reply) {
            Proof::Proven
                if self.proven_each.take(host, PROVEN_EACH, now) && self.proven.take(PROVEN, now) =>
            {
                Admission::Yes
            }
            Proof::Cookie(len)
                if !claims
                    || self.cookies_each.take(origin, COOKIES_EACH, now)
                        && self.cookies.take(COOKIES, now) =>
            {
                Admission::Cookie(len)
            }
            Proof::Proven | Proof::Cookie(_) | Proof::Malformed => Admission::No(DropReason::UnderLoad),
        }
    }

    /// Whether a handshake response may be worked on.
    pub(super) fn admit_response(&mut self, identity: &Identity, datagram: &[u8], now: Instant) -> Admission {
        if !identity.is_addressed(datagram) {
            Admission::No(DropReason::BadCrypto)
        } else if self.responses.take(RESPONSES, now) {
            Admission::Yes
        } else {
            Admission::No(DropReason::UnderLoad)
        }
    }

    /// Whether the pod may begin to talk to another peer.
    pub(super) fn admit_peer(&mut self, active: usize, now: Instant) -> bool {
        active < MAX_ACTIVE && self.pod.take(CALLS_BY_POD, now)
    }

    /// Whether a message for a lost session may begin a handshake.
    pub(super) fn admit_nudge(&mut self, via: Via, now: Instant) -> bool {
        self.nudges_each.take(via.origin(), NUDGES_EACH, now) && self.nudges.take(NUDGES, now)
    }

    /// The shared key with a sender that has no running state.
    pub(super) fn disco_key(
        &mut self,
        ours: &DiscoPrivate,
        sender: &DiscoPublic,
        via: Via,
        now: Instant,
    ) -> Option<&disco::SharedKey> {
        if !self.keys.iter().any(|(kept, _)| kept == sender) {
            let budget = match via {
                Via::Udp(_) => &mut self.disco_udp,
                Via::Derp(..) => &mut self.disco_derp,
            };
            if !budget.take(DISCO_KEYS, now) {
                return None;
            }
            if self.keys.len() >= KEPT_KEYS {
                self.keys.pop_front();
            }
            self.keys.push_back((*sender, disco::SharedKey::new(ours, sender)));
        }
        self.keys.iter().find(|(kept, _)| kept == sender).map(|(_, key)| key)
    }
}

impl Via {
    /// What a cookie is bound to: the address, or a stand-in for a sender that the relay vouches for.
    fn address(self) -> IpAddr {
        match self {
            Self::Udp(from) => from.ip(),
            Self::Derp(_, source) => {
                let mut octets = [0; 16];
                octets.copy_from_slice(&source.as_bytes()[..16]);
                IpAddr::V6(std::net::Ipv6Addr::from(octets))
            }
        }
    }

    fn origin(self) -> Origin {
        match self {
            Self::Udp(from) => Origin::socket(from),
            Self::Derp(_, source) => Origin::node(&source),
        }
    }

    fn host(self) -> Origin {
        match self {
            Self::Udp(from) => Origin::host(from),
            Self::Derp(_, source) => Origin::node(&source),
        }
    }
}
