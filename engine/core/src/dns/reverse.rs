//! Names under `in-addr.arpa` and `ip6.arpa`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const V4: &str = "in-addr.arpa";
const V6: &str = "ip6.arpa";
/// `fd7a:115c:a1e0::/48`, the tailnet's unique local addresses.
const ULA_ZONE: &str = "0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa";

/// What a reverse name stands for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reverse<'a> {
    /// The address, when the name is one in full.
    pub(super) address: Option<IpAddr>,
    /// The zone of ours that it lies in.
    pub(super) zone: Option<&'a str>,
    /// Holds labels that no address has.
    pub(super) odd: bool,
}

impl<'a> Reverse<'a> {
    /// Reads a name in lower case without a dot at the end; `None` for a name that is not a reverse one.
    pub(super) fn parse(name: &'a str) -> Option<Self> {
        if let Some(labels) = below(name, V4) {
            let octets: Option<Vec<u8>> = labels.split('.').rev().map(octet).collect();
            let address = octets.as_deref().and_then(|o| <[u8; 4]>::try_from(o).ok()).map(Ipv4Addr::from);
            let odd = octets.is_none_or(|octets| octets.len() > 4);
            return Some(Self { address: address.map(IpAddr::V4), zone: v4_zone(name), odd });
        }
        let labels = below(name, V6)?;
        let nibbles: Option<Vec<u8>> = labels.split('.').rev().map(nibble).collect();
        let address = nibbles.as_deref().filter(|n| n.len() == 32).map(|nibbles| {
            Ipv6Addr::from(nibbles.iter().fold(0u128, |address, nibble| address << 4 | u128::from(*nibble)))
        });
        let zone = super::names::is_within(name, ULA_ZONE).then_some(ULA_ZONE);
        let odd = nibbles.is_none_or(|nibbles| nibbles.len() > 32);
        Some(Self { address: address.map(IpAddr::V6), zone, odd })
    }
}

fn below<'a>(name: &'a str, zone: &str) -> Option<&'a str> {
    name.strip_suffix(zone)?.strip_suffix('.')
}

/// Each of `64.100` to `127.100` is a zone: 100.64.0.0/10 has no reverse name of its own.
fn v4_zone(name: &str) -> Option<&str> {
    let labels = below(below(name, V4)?, "100")?;
    let label = labels.rsplit('.').next()?;
    (64..=127).contains(&octet(label)?).then(|| &name[labels.len() - label.len()..])
}

fn octet(label: &str) -> Option<u8> {
    let plain = label.len() == 1 || !label.starts_with(['0', '+']);
    label.parse().ok().filter(|_| plain)
}

fn nibble(label: &str) -> Option<u8> {
    (label.len() == 1).then(|| u8::from_str_radix(label, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_zones() {
        let v6 = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa";
        let table = [
            ("4.3.64.100.in-addr.arpa", Some("100.64.3.4"), Some("64.100.in-addr.arpa"), false),
            ("4.3.127.100.in-addr.arpa", Some("100.127.3.4"), Some("127.100.in-addr.arpa"), false),
            ("4.3.128.100.in-addr.arpa", Some("100.128.3.4"), None, false),
            ("4.3.64.101.in-addr.arpa", Some("101.64.3.4"), None, false),
            ("64.100.in-addr.arpa", None, Some("64.100.in-addr.arpa"), false),
            ("3.64.100.in-addr.arpa", None, Some("64.100.in-addr.arpa"), false),
            ("100.in-addr.arpa", None, None, false),
            ("5.4.3.64.100.in-addr.arpa", None, Some("64.100.in-addr.arpa"), true),
            ("x.3.64.100.in-addr.arpa", None, Some("64.100.in-addr.arpa"), true),
            ("04.3.64.100.in-addr.arpa", None, Some("64.100.in-addr.arpa"), true),
            ("256.3.64.100.in-addr.arpa", None, Some("64.100.in-addr.arpa"), true),
            (v6, Some("fd7a:115c:a1e0::1"), Some(ULA_ZONE), false),
            (&v6[2..], None, Some(ULA_ZONE), false),
            ("8.b.d.0.1.0.0.2.ip6.arpa", None, None, false),
            ("10.8.b.d.0.1.0.0.2.ip6.arpa", None, None, true),
        ];
        for (name, address, zone, odd) in table {
            let address = address.map(|a| a.parse().unwrap());
            assert_eq!(Reverse::parse(name), Some(Reverse { address, zone, odd }), "{name}");
        }
        for name in ["in-addr.arpa", "example.com", "xin-addr.arpa", "", "ip6.arpa"] {
            assert_eq!(Reverse::parse(name), None, "{name}");
        }
    }
}
