//! Longest prefix match.
//!
//! A look-up asks one hash table once per prefix length in use, longest first: its cost follows the
//! number of different lengths (a handful in practice, 33 or 129 at worst), never that of prefixes.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;

use ipnet::IpNet;

/// Values by prefix, both families.
#[derive(Debug)]
pub(crate) struct PrefixMap<T> {
    v4: Family<u32, T>,
    v6: Family<u128, T>,
}

#[derive(Debug)]
struct Family<A, T> {
    values: HashMap<(A, u8), T>,
    /// Lengths in use with the number of prefixes of each, longest first.
    lengths: Vec<(u8, usize)>,
}

impl<T> Default for PrefixMap<T> {
    fn default() -> Self {
        Self { v4: Family::default(), v6: Family::default() }
    }
}

impl<A, T> Default for Family<A, T> {
    fn default() -> Self {
        Self { values: HashMap::new(), lengths: Vec::new() }
    }
}

fn bits_v4(net: &ipnet::Ipv4Net) -> (u32, u8) {
    (u32::from(net.network()), net.prefix_len())
}

fn bits_v6(net: &ipnet::Ipv6Net) -> (u128, u8) {
    (u128::from(net.network()), net.prefix_len())
}

impl<T> PrefixMap<T> {
    pub(crate) fn len(&self) -> usize {
        self.v4.values.len() + self.v6.values.len()
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn get_mut(&mut self, net: &IpNet) -> Option<&mut T> {
        match net {
            IpNet::V4(net) => self.v4.values.get_mut(&bits_v4(net)),
            IpNet::V6(net) => self.v6.values.get_mut(&bits_v6(net)),
        }
    }

    pub(crate) fn insert(&mut self, net: &IpNet, value: T) {
        match net {
            IpNet::V4(net) => self.v4.insert(bits_v4(net), value),
            IpNet::V6(net) => self.v6.insert(bits_v6(net), value),
        }
    }

    pub(crate) fn remove(&mut self, net: &IpNet) {
        match net {
            IpNet::V4(net) => self.v4.remove(&bits_v4(net)),
            IpNet::V6(net) => self.v6.remove(&bits_v6(net)),
        }
    }

    /// The value of the longest prefix that holds `ip`.
    pub(crate) fn longest(&self, ip: IpAddr) -> Option<&T> {
        match ip {
            IpAddr::V4(ip) => {
                let bits = u32::from(ip);
                self.v4.longest(|length| bits & mask(u32::MAX, 32 - length, u32::checked_shl))
            }
            IpAddr::V6(ip) => {
                let bits = u128::from(ip);
                self.v6.longest(|length| bits & mask(u128::MAX, 128 - length, u128::checked_shl))
            }
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (IpNet, &T)> {
        let v4 = self.v4.values.iter().filter_map(|((bits, length), value)| {
            Some((IpNet::V4(ipnet::Ipv4Net::new((*bits).into(), *length).ok()?), value))
        });
        let v6 = self.v6.values.iter().filter_map(|((bits, length), value)| {
            Some((IpNet::V6(ipnet::Ipv6Net::new((*bits).into(), *length).ok()?), value))
        });
        v4.chain(v6)
    }
}

/// `ones` without its lowest `zeros` bits; nothing is left where those are all.
fn mask<A: Default>(ones: A, zeros: u8, shl: impl Fn(A, u32) -> Option<A>) -> A {
    shl(ones, zeros.into()).unwrap_or_default()
}

impl<A: Hash + Eq, T> Family<A, T> {
    fn insert(&mut self, key: (A, u8), value: T) {
        let length = key.1;
        if self.values.insert(key, value).is_some() {
            return;
        }
        match self.lengths.binary_search_by(|(have, _)| length.cmp(have)) {
            Ok(at) => self.lengths[at].1 += 1,
            Err(at) => self.lengths.insert(at, (length, 1)),
        }
    }

    fn remove(&mut self, key: &(A, u8)) {
        if self.values.remove(key).is_none() {
            return;
        }
        if let Ok(at) = self.lengths.binary_search_by(|(have, _)| key.1.cmp(have)) {
            self.lengths[at].1 -= 1;
            if self.lengths[at].1 == 0 {
                self.lengths.remove(at);
            }
        }
    }

    fn longest(&self, masked: impl Fn(u8) -> A) -> Option<&T> {
        self.lengths.iter().find_map(|(length, _)| self.values.get(&(masked(*length), *length)))
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn net(v6: bool, bits: u8, length: u8) -> IpNet {
        let ip = if v6 {
            IpAddr::V6(Ipv6Addr::from(u128::from(bits) << 120))
        } else {
            IpAddr::V4(Ipv4Addr::from(u32::from(bits) << 24))
        };
        IpNet::new(ip, length).unwrap().trunc()
    }

    proptest! {
        /// Against looking at every prefix.
        #[test]
        fn same_as_the_obvious_search(
            steps in proptest::collection::vec((any::<bool>(), any::<u8>(), 0_u8..10, any::<bool>()), 0..80),
            asked in proptest::collection::vec((any::<bool>(), any::<u8>()), 20),
        ) {
            let mut map = PrefixMap::default();
            let mut model: Vec<(IpNet, usize)> = Vec::new();
            for (number, (v6, bits, length, add)) in steps.into_iter().enumerate() {
                let net = net(v6, bits, length);
                model.retain(|(have, _)| *have != net);
                if add {
                    model.push((net, number));
                    map.insert(&net, number);
                } else {
                    map.remove(&net);
                }
                prop_assert_eq!(map.get_mut(&net).is_some(), add);
            }
            prop_assert_eq!(map.len(), model.len());
            for (v6, bits) in asked {
                let ip = net(v6, bits, if v6 { 128 } else { 32 }).addr();
                let best = model.iter().filter(|(net, _)| net.contains(&ip)).max_by_key(|(net, _)| net.prefix_len());
                prop_assert_eq!(map.longest(ip), best.map(|(_, number)| number));
            }
            let mut listed: Vec<(IpNet, usize)> = map.iter().map(|(net, number)| (net, *number)).collect();
            listed.sort_unstable();
            model.sort_unstable();
            prop_assert_eq!(listed, model);
        }
    }

    #[test]
    fn a_look_up_asks_once_per_length_in_use_however_many_prefixes_there_are() {
        let mut map = PrefixMap::default();
        for n in 0..8192_u32 {
            let length = if n % 2 == 0 { 24 } else { 26 };
            let net = ipnet::Ipv4Net::new((0x0a00_0000 + (n << 8)).into(), length).unwrap();
            map.insert(&net.into(), n);
        }
        assert_eq!(map.v4.lengths, [(26, 4096), (24, 4096)]);
        assert_eq!(map.longest("10.0.2.9".parse().unwrap()), Some(&2));
        assert_eq!(map.longest("10.0.3.9".parse().unwrap()), Some(&3));
        assert_eq!(map.longest("10.0.3.200".parse().unwrap()), None);
        for n in 0..8192_u32 {
            let length = if n % 2 == 0 { 24 } else { 26 };
            map.remove(&ipnet::Ipv4Net::new((0x0a00_0000 + (n << 8)).into(), length).unwrap().into());
        }
        assert_eq!((map.len(), map.v4.lengths.len()), (0, 0));
    }
}
