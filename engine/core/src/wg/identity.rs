//! The node's own static key, and the checks of an initiation that cost no Curve25519 operation.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use x25519_dalek::{PublicKey, StaticSecret};

use super::clock::Clock;
use crate::tailcfg::UnixTime;

/// What a handshake message says about its sender's address.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Whoever sent it gets what we send there.
    Proven,
    /// Nothing yet: the first so many bytes of the reply are a cookie, which the sender can prove it with.
    Cookie(usize),
    /// It is no handshake message for us.
    Malformed,
}

/// The node's own static key and what its tunnels share.
pub(crate) struct Identity {
    pub(super) secret: StaticSecret,
    pub(super) public: PublicKey,
    pub(super) unlimited: Arc<RateLimiter>,
    pub(super) clock: Clock,
    strict: RateLimiter,
}

impl Identity {
    /// `wall` is the wall clock at `now`, or later where an earlier life of this node saw it so: peers ignore
    /// initiations that are not newer than those they know.
    pub(crate) fn new(secret: [u8; 32], wall: UnixTime, now: Instant) -> Self {
        let secret = StaticSecret::from(secret);
        let public = PublicKey::from(&secret);
        Self {
            unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
            strict: RateLimiter::new(&public, 0),
            clock: Clock::new(wall, now),
            secret,
            public,
        }
    }

    /// Whether a handshake message was made by somebody who knows our public key.
    pub(crate) fn is_addressed(&self, datagram: &[u8]) -> bool {
        self.unlimited.verify_packet(None, datagram, &mut []).is_ok()
    }

    /// Whether the sender has shown that it is at `from`; `reply` takes a cookie if not.
    pub(crate) fn proof(&self, from: IpAddr, datagram: &[u8], reply: &mut [u8]) -> Proof {
        match self.strict.verify_packet(Some(from), datagram, reply) {
            Ok(_) => Proof::Proven,
            Err(TunnResult::WriteToNetwork(cookie)) => Proof::Cookie(cookie.len()),
            Err(_) => Proof::Malformed,
        }
    }

    /// The static key inside an initiation, which is not yet proof that its owner sent it. Costs a
    /// Curve25519 operation.
    pub(crate) fn initiator(&self, datagram: &[u8]) -> Option<[u8; 32]> {
        match Tunn::parse_incoming_packet(datagram) {
            Ok(Packet::HandshakeInit(init)) => {
                Some(parse_handshake_anon(&self.secret, &self.public, &init).ok()?.peer_static_public)
            }
            _ => None,
        }
    }
}
