//! What others may make this node do in a second: token buckets in the time that is passed in.
//!
//! A bucket is one instant, so that every peer can have some. Where a sender cannot be told from another
//! before a costly step, buckets are shared by a keyed hash of where it sends from: one sender exhausts
//! its own share, and only somebody with many addresses exhausts everybody's.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::key::NodePublic;
use crate::random::Random;

/// So often in the long run, and so many at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    pub(crate) every: Duration,
    pub(crate) burst: u32,
}

impl Rate {
    pub(crate) const fn per_second(count: u32, burst: u32) -> Self {
        Self { every: Duration::from_nanos(1_000_000_000 / count as u64), burst }
    }
}

/// What is left of one budget. Full at first.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Bucket {
    /// When it is full again.
    full_at: Option<Instant>,
}

impl Bucket {
    /// Whether there is a token.
    pub(crate) fn has(&self, rate: Rate, now: Instant) -> bool {
        let full_at = self.full_at.map_or(now, |at| at.max(now)) + rate.every;
        full_at.duration_since(now) <= rate.every * rate.burst
    }

    /// Takes one token if there is one.
    pub(crate) fn take(&mut self, rate: Rate, now: Instant) -> bool {
        let allowed = self.has(rate, now);
        if allowed {
            self.full_at = Some(self.full_at.map_or(now, |at| at.max(now)) + rate.every);
        }
        allowed
    }
}

const SHARES: usize = 256;

/// Buckets by origin. No memory until the first use.
#[derive(Debug)]
pub(crate) struct Shares {
    keys: [u64; 2],
    buckets: Vec<Bucket>,
}

impl Shares {
    pub(crate) fn new(random: &mut Random) -> Self {
        Self { keys: [random.next_u64(), random.next_u64() | 1], buckets: Vec::new() }
    }

    /// Takes a token of the share that `origin` has with others.
    pub(crate) fn take(&mut self, origin: Origin, rate: Rate, now: Instant) -> bool {
        let share = self.share(origin);
        if self.buckets.is_empty() {
            self.buckets = vec![Bucket::default(); SHARES];
        }
        self.buckets.get_mut(share).is_some_and(|bucket| bucket.take(rate, now))
    }

    fn share(&self, Origin(words): Origin) -> usize {
        let [start, factor] = self.keys;
        let hash = words.into_iter().fold(start, |hash, word| {
            let mixed = (hash ^ word).wrapping_mul(factor);
            mixed ^ mixed >> 29
        });
        let [top, ..] = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        usize::from(top)
    }
}

/// Where something came from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin([u64; 3]);

impl Origin {
    /// A source address with its port; the last 64 bits of an IPv6 address cost nothing to choose.
    pub(crate) fn socket(addr: SocketAddr) -> Self {
        let Self([ip, ..]) = Self::host(addr);
        Self([ip, u64::from(addr.port()), 1])
    }

    /// A source address whatever the port.
    pub(crate) fn host(addr: SocketAddr) -> Self {
        let ip = match addr.ip().to_canonical() {
            std::net::IpAddr::V4(ip) => u64::from(u32::from(ip)),
            std::net::IpAddr::V6(ip) => {
                let [a, b, c, d, e, f, g, h, ..] = ip.octets();
                u64::from_be_bytes([a, b, c, d, e, f, g, h])
            }
        };
        Self([ip, 0, 2])
    }

    /// A node that a relay vouches for.
    pub(crate) fn node(key: &NodePublic) -> Self {
        let word = |bytes: &[u8]| bytes.iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let bytes = key.as_bytes();
        Self([word(&bytes[..8]), word(&bytes[8..16]), 3])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate::per_second(10, 5);

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let (mut bucket, start) = (Bucket::default(), Instant::now());
        let taken = |bucket: &mut Bucket, at| (0..100).filter(|_| bucket.take(RATE, at)).count();
        assert_eq!(taken(&mut bucket, start), 5);
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(99)), 0);
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(200)), 2);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(60)), 5, "no more than the burst");
        assert_eq!(taken(&mut bucket, start), 0, "nor when time stands still");
    }

    #[test]
    fn one_origin_does_not_use_up_the_share_of_most_others() {
        let mut shares = Shares::new(&mut Random::new([3; 32]));
        let now = Instant::now();
        let at = |n: u8, port| Origin::socket(SocketAddr::from(([192, 0, 2, n], port)));
        while shares.take(at(1, 1), RATE, now) {}
        let free = (2..=250).filter(|n| shares.take(at(*n, 1), RATE, now)).count();
        assert!(free >= 240, "{free} of 249 others");
        let ports = (2..1000).filter(|port| shares.take(at(1, *port), RATE, now)).count();
        assert!(ports > 500, "{ports} of the same address");

        let mut shares = Shares::new(&mut Random::new([4; 32]));
        let v6 = |text: &str| Origin::host(text.parse().expect("an address"));
        while shares.take(v6("[2001:db8::1]:1"), RATE, now) {}
        assert!(!shares.take(v6("[2001:db8::2]:9"), RATE, now), "one network");
        let others = (1..64).filter(|n| shares.take(v6(&format!("[2001:db8:0:{n:x}::1]:1")), RATE, now));
        assert!(others.count() > 55, "other networks");
    }
}
