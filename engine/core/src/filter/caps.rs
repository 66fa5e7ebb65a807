//! What the rules say besides packets: capabilities of peers, and whether some peers are let in at all.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::compile::{Address, Span, Spans};
use super::rule::{Part, Rule};

/// Application capabilities of a peer towards this node, each with the arguments of all its grants.
pub type PeerCaps = BTreeMap<String, Vec<Value>>;

/// What `rules` grant the peer at `src` for this node's address `dst`: the union over the grants.
#[must_use]
pub fn peer_caps<'a>(rules: impl IntoIterator<Item = &'a Rule>, src: IpAddr, dst: IpAddr) -> PeerCaps {
    let mut caps = PeerCaps::new();
    if src.is_ipv4() != dst.is_ipv4() {
        return caps;
    }
    for rule in rules {
        let rule = rule.kept();
        let grants = || rule.grants.iter().filter(|grant| grant.dsts.iter().any(|net| net.contains(&dst)));
        if grants().next().is_none() || !(holds(&rule.v4, src) || holds(&rule.v6, src)) {
            continue;
        }
        for grant in grants() {
            for name in grant.caps.iter().filter(|name| !name.is_empty()) {
                caps.entry(name.clone()).or_default();
            }
            for (name, arguments) in grant.cap_map.iter().filter(|(name, _)| !name.is_empty()) {
                let all = caps.entry(name.clone()).or_default();
                all.extend(arguments.iter().flatten().cloned());
            }
        }
    }
    caps
}

fn holds<A: Address>(part: &Part<A>, ip: IpAddr) -> bool {
    A::of(ip).is_some_and(|ip| part.sources.spans.contains(ip))
}

/// Whether any of `rules` that opens something has an address of `nets` among its sources.
#[must_use]
pub fn admits_any<'a>(rules: impl IntoIterator<Item = &'a Rule>, nets: &[IpNet]) -> bool {
    if nets.is_empty() {
        return false;
    }
    let (v4, v6) = (spans::<u32>(nets), spans::<u128>(nets));
    rules.into_iter().map(Rule::kept).any(|rule| {
        let opens = !rule.v4.destinations.is_empty() || !rule.v6.destinations.is_empty();
        opens && (rule.v4.sources.spans.meets(&v4) || rule.v6.sources.spans.meets(&v6))
    })
}

fn spans<A: Address>(nets: &[IpNet]) -> Spans<A> {
    let span = |net: &IpNet| -> Option<Span<A>> { Some((A::of(net.network())?, A::of(net.broadcast())?)) };
    Spans::new(nets.iter().filter_map(span).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Vec<Rule> {
        let json = r#"[
          {"SrcIPs": ["100.64.0.0/30", "cap:all"], "CapGrant": [
            {"Dsts": ["100.64.0.9/32"], "Caps": ["plain", ""], "CapMap": {"app": [{"a": 1}]}},
            {"Dsts": ["100.64.0.8/32"], "CapMap": {"elsewhere": null}}]},
          {"SrcIPs": ["*"], "CapGrant": [{"Dsts": ["0.0.0.0/0", "::/0"], "CapMap": {"app": [2], "bare": null}}]},
          {"SrcIPs": ["100.64.0.2-100.64.0.3"], "DstPorts": [{"IP": "*", "Ports": {"First": 1, "Last": 1}}]}
        ]"#;
        serde_json::from_str(json).unwrap()
    }

    fn caps(src: &str, dst: &str) -> String {
        serde_json::to_string(&peer_caps(&rules(), src.parse().unwrap(), dst.parse().unwrap())).unwrap()
    }

    #[test]
    fn grants_add_up() {
        assert_eq!(caps("100.64.0.1", "100.64.0.9"), r#"{"app":[{"a":1},2],"bare":[],"plain":[]}"#);
        assert_eq!(caps("100.64.0.1", "100.64.0.8"), r#"{"app":[2],"bare":[],"elsewhere":[]}"#);
        assert_eq!(caps("100.64.0.7", "100.64.0.9"), r#"{"app":[2],"bare":[]}"#);
        assert_eq!(caps("fd7a::7", "fd7a::9"), r#"{"app":[2],"bare":[]}"#);
        assert_eq!(caps("fd7a::7", "100.64.0.9"), "{}");
    }

    #[test]
    fn only_a_rule_that_opens_something_admits() {
        let nets = |text: &str| vec![text.parse::<IpNet>().unwrap()];
        let rules = rules();
        assert!(!admits_any(&rules, &nets("100.64.0.1/32")));
        assert!(admits_any(&rules, &nets("100.64.0.3/32")));
        assert!(admits_any(&rules, &nets("100.64.0.0/24")));
        assert!(!admits_any(&rules, &nets("fd7a::3/128")));
        assert!(!admits_any(&rules, &[]));
        let mut all = rules[2].decoded();
        all.src_ips = vec!["*".into()];
        let all = Rule::from(all);
        assert!(admits_any([&all], &nets("fd7a::3/128")));
        assert!(!admits_any([&all], &[]));
    }
}
