//! Which rule decided: names that last, and bounded counts.

use std::collections::HashMap;

use super::{DropReason, Pass, Rule, Verdict, protocol};

/// Most rules counted one by one in [`super::FilterState::passed`]; the rest share one count.
pub const MAX_NAMED_RULES: usize = 64;
/// Chunk names are control's text; so much of one is shown.
const MAX_CHUNK_NAME: usize = 48;

/// A rule as people find it: the chunk of the packet filter and the place in it, from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleName {
    /// The chunk, cut to 48 characters without control characters; `base` for a filter without chunks.
    pub chunk: String,
    /// The place of the rule in its chunk.
    pub index: u32,
}

impl std::fmt::Display for RuleName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.chunk, self.index)
    }
}

/// The names of all rules of a filter, and what tells whether a rule is the same as before.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    /// Each with the number of its first rule.
    chunks: Vec<(Box<str>, u32)>,
    prints: Vec<u64>,
}

impl Names {
    pub(super) fn push(&mut self, chunk: &str, rules: &[Rule]) {
        let name: String = chunk.chars().filter(|c| !c.is_control()).take(MAX_CHUNK_NAME).collect();
        let first = u32::try_from(self.prints.len()).unwrap_or(u32::MAX);
        self.chunks.push((name.into(), first));
        self.prints.extend(rules.iter().map(|rule| rule.kept().print));
    }

    pub(super) fn len(&self) -> usize {
        self.prints.len()
    }

    pub(super) fn name(&self, rule: u32) -> Option<RuleName> {
        if usize::try_from(rule).ok()? >= self.prints.len() {
            return None;
        }
        let after = self.chunks.partition_point(|(_, first)| *first <= rule);
        let (chunk, first) = self.chunks.get(after.checked_sub(1)?)?;
        Some(RuleName { chunk: chunk.to_string(), index: rule - first })
    }

    /// Where the rules of each chunk are; of two chunks that are shown alike, the first.
    fn places(&self) -> HashMap<&str, std::ops::Range<u32>> {
        let mut places = HashMap::new();
        let mut end = u32::try_from(self.prints.len()).unwrap_or(u32::MAX);
        for (name, first) in self.chunks.iter().rev() {
            places.insert(&**name, *first..end);
            end = *first;
        }
        places
    }
}

/// Packets that passed since the start.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    rules: Vec<u64>,
    flow: u64,
    tcp_segment: u64,
    icmp_answer: u64,
    fragment: u64,
    /// What no rule let in: TCP, UDP, ICMP, anything else.
    unruled: [u64; 4],
}

impl Tally {
    pub(super) fn new(rules: usize) -> Self {
        Self { rules: vec![0; rules], ..Self::default() }
    }

    /// `protocol` is the packet's.
    pub(super) fn count(&mut self, verdict: Verdict, protocol: u8) {
        let pass = match verdict {
            Verdict::Accept(pass) => pass,
            Verdict::Drop(DropReason::NoRule) => {
                let [tcp, udp, icmp, other] = &mut self.unruled;
                let counter = match protocol {
                    protocol::TCP => tcp,
                    protocol::UDP => udp,
                    protocol::ICMPV4 | protocol::ICMPV6 => icmp,
                    _ => other,
                };
                *counter += 1;
                return;
            }
            Verdict::Drop(_) => return,
        };
        let counter = match pass {
            Pass::Rule(rule) => match usize::try_from(rule).ok().and_then(|at| self.rules.get_mut(at)) {
                Some(counter) => counter,
                None => return,
            },
            Pass::Flow => &mut self.flow,
            Pass::TcpSegment => &mut self.tcp_segment,
            Pass::IcmpAnswer => &mut self.icmp_answer,
            Pass::Fragment => &mut self.fragment,
            Pass::Tsmp => return,
        };
        *counter += 1;
    }

    /// Takes the counts over to the rules of `new` that have the name and content of one of `old`.
    pub(super) fn carry(&mut self, old: &Names, new: &Names) {
        let counts = std::mem::replace(&mut self.rules, vec![0; new.len()]);
        let places = new.places();
        for (rule, count) in (0..).zip(counts).filter(|(_, count)| *count > 0) {
            let Some(name) = old.name(rule) else { continue };
            let Some(place) = places.get(&*name.chunk).cloned() else { continue };
            let place = place.start.saturating_add(name.index)..place.end;
            let at = place.start as usize;
            if !place.is_empty()
                && old.prints.get(rule as usize) == new.prints.get(at)
                && let Some(counter) = self.rules.get_mut(at)
            {
                *counter = count;
            }
        }
    }

    pub(super) fn unruled(&self) -> [(&'static str, u64); 4] {
        let [tcp, udp, icmp, other] = self.unruled;
        [("tcp", tcp), ("udp", udp), ("icmp", icmp), ("other", other)]
    }

    pub(super) fn passed(&self, names: &Names) -> Vec<(String, u64)> {
        let mut passed: Vec<(String, u64)> = [
            ("flow", self.flow),
            ("tcp_segment", self.tcp_segment),
            ("icmp_answer", self.icmp_answer),
            ("fragment", self.fragment),
        ]
        .map(|(name, count)| (name.to_owned(), count))
        .into();
        // By place, not by count: a series must not change its meaning between two scrapes.
        for (rule, count) in (0..).zip(&self.rules).take(MAX_NAMED_RULES) {
            if let Some(name) = names.name(rule).filter(|_| *count > 0) {
                passed.push((format!("rule {name}"), *count));
            }
        }
        passed.push(("other rules".to_owned(), self.rules.iter().skip(MAX_NAMED_RULES).sum()));
        passed.retain(|(_, count)| *count > 0);
        passed
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Filter, FilterState};
    use super::*;
    use crate::packet::Parsed;
    use crate::packet::build::{ip, ports};
    use crate::packet::tcp_flag::SYN;
    use crate::tailcfg::{FilterRule, NetPortRange, PortRange};

    fn rule(port: u16) -> FilterRule {
        let to = NetPortRange { ip: "*".into(), ports: PortRange { first: port, last: port } };
        FilterRule { src_ips: vec!["*".into()], dst_ports: vec![to], ..FilterRule::default() }
    }

    fn knock(state: &mut FilterState, port: u16) -> Verdict {
        let packet = ip("100.64.0.1", "100.64.0.2", 6, &ports(9, port, SYN));
        state.check_in(&Parsed::parse(&packet).unwrap(), |_| false)
    }

    fn own() -> Vec<ipnet::IpNet> {
        vec!["100.64.0.2/32".parse().unwrap()]
    }

    #[test]
    fn rules_are_named_by_chunk_and_place() {
        let (a, b) = ([rule(1), rule(2)], [rule(3)]);
        let filter = Filter::of_chunks([("a", &a[..]), ("", &[]), ("b\n", &b[..])], &own());
        let name = |n| filter.rule_name(n).map(|name| name.to_string());
        let names: Vec<Option<String>> = (0..4).map(name).collect();
        let expected = [Some("a/0"), Some("a/1"), Some("b/0"), None];
        assert_eq!(names, expected.map(|name| name.map(str::to_owned)));
        assert_eq!(filter.rules(), 3);
    }

    #[test]
    fn counts_stay_with_the_rule_they_belong_to() {
        let (a, b) = ([rule(1), rule(2)], [rule(3)]);
        let mut state = FilterState::new(Filter::of_chunks([("a", &a[..]), ("b", &b[..])], &own()));
        for (port, times) in [(1, 1), (2, 2), (3, 3), (4, 4)] {
            for _ in 0..times {
                knock(&mut state, port);
            }
        }
        let passed = |state: &FilterState| {
            state.passed().into_iter().map(|(name, n)| format!("{name}={n}")).collect::<Vec<_>>()
        };
        assert_eq!(passed(&state), ["rule a/0=1", "rule a/1=2", "rule b/0=3"]);
        // A chunk more before them, and one rule that is another now.
        let (first, a) = ([rule(9)], [rule(1), rule(7)]);
        let chunks = [("0", &first[..]), ("a", &a[..]), ("b", &b[..])];
        state.set_filter(Filter::of_chunks(chunks, &own()));
        assert_eq!(passed(&state), ["rule a/0=1", "rule b/0=3"]);
        state.set_filter(Filter::of_chunks([], &own()));
        assert!(passed(&state).is_empty());
    }

    #[test]
    fn what_no_rule_lets_in_is_counted_by_protocol() {
        let mut state = FilterState::new(Filter::of_chunks([], &own()));
        for (protocol, times) in [(6, 4), (17, 3), (1, 2), (47, 1)] {
            let payload = if protocol == 1 { vec![8, 0, 0, 0, 0, 1, 0, 1] } else { ports(9, 7, SYN) };
            let packet = ip("100.64.0.1", "100.64.0.2", protocol, &payload);
            for _ in 0..times {
                assert!(!state.check_in(&Parsed::parse(&packet).unwrap(), |_| false).is_accept());
            }
        }
        assert_eq!(state.unruled(), [("tcp", 4), ("udp", 3), ("icmp", 2), ("other", 1)]);
        state.set_filter(Filter::of_chunks([("a", &[rule(1)][..])], &own()));
        assert!(knock(&mut state, 1).is_accept() && !knock(&mut state, 2).is_accept());
        assert_eq!(state.unruled()[0], ("tcp", 5), "what passes is not counted");
    }

    #[test]
    fn a_thousand_rules_make_no_thousand_series() {
        let rules: Vec<FilterRule> = (1..=1000).map(rule).collect();
        let mut state = FilterState::new(Filter::compile(Some(&rules), &own()));
        for port in 1..=1000 {
            assert!(knock(&mut state, port).is_accept());
        }
        let passed = state.passed();
        assert_eq!(passed.len(), MAX_NAMED_RULES + 1);
        assert_eq!(passed.last(), Some(&("other rules".to_owned(), 936)));
    }
}
