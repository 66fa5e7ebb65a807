//! From the text of the rules to tables that one packet can be looked up in.
//!
//! A table holds, in rule order, one entry for each destination of each rule. Rules come with their source
//! sets, which they share (policies name few groups), so that putting a table together reads no source, and
//! memory grows with the text of the rules and not with the product of rules and sources. A lookup compares
//! ports first, which sit together in memory and decide most entries, then the destination, and only then
//! searches the sources.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::rule::Part;
use crate::packet::protocol;

/// Entries over all tables; a rule set beyond that is cut, which opens nothing.
const MAX_ENTRIES: usize = 1 << 18;
const DEFAULT_PROTOCOLS: [u8; 4] = [protocol::TCP, protocol::UDP, protocol::ICMPV4, protocol::ICMPV6];

/// An address of one family as a number.
pub(super) trait Address: Copy + Ord + std::hash::Hash {
    const MAX: Self;
    const ZERO: Self;
    fn successor(self) -> Option<Self>;
    fn predecessor(self) -> Option<Self>;
    fn of(ip: IpAddr) -> Option<Self>;
}

impl Address for u32 {
    const MAX: Self = Self::MAX;
    const ZERO: Self = 0;
    fn successor(self) -> Option<Self> {
        self.checked_add(1)
    }
    fn predecessor(self) -> Option<Self> {
        self.checked_sub(1)
    }
    fn of(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(ip) => Some(ip.into()),
            IpAddr::V6(_) => None,
        }
    }
}

impl Address for u128 {
    const MAX: Self = Self::MAX;
    const ZERO: Self = 0;
    fn successor(self) -> Option<Self> {
        self.checked_add(1)
    }
    fn predecessor(self) -> Option<Self> {
        self.checked_sub(1)
    }
    fn of(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(_) => None,
            IpAddr::V6(ip) => Some(ip.into()),
        }
    }
}

pub(super) type Span<A> = (A, A);

/// Sorted, disjoint, inclusive ranges.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Spans<A>(Box<[Span<A>]>);

impl<A: Address> Spans<A> {
    pub(super) fn new(mut spans: Vec<Span<A>>) -> Self {
        spans.sort_unstable();
        let mut merged: Vec<Span<A>> = Vec::with_capacity(spans.len());
        for (first, last) in spans {
            match merged.last_mut() {
                Some(before) if before.1.successor().is_none_or(|next| first <= next) => {
                    before.1 = before.1.max(last);
                }
                _ => merged.push((first, last)),
            }
        }
        Self(merged.into_boxed_slice())
    }

    pub(super) fn contains(&self, address: A) -> bool {
        let after = self.0.partition_point(|span| span.0 <= address);
        after.checked_sub(1).is_some_and(|at| address <= self.0[at].1)
    }

    pub(super) fn overlaps(&self, (first, last): Span<A>) -> bool {
        let after = self.0.partition_point(|span| span.0 <= last);
        after.checked_sub(1).is_some_and(|at| first <= self.0[at].1)
    }

    /// Whether both have an address in common.
    pub(super) fn meets(&self, other: &Self) -> bool {
        let (few, many) = if self.0.len() < other.0.len() { (self, other) } else { (other, self) };
        few.0.iter().any(|span| many.overlaps(*span))
    }

    /// Everything but these spans.
    fn complement(&self) -> Vec<Span<A>> {
        let mut free = Vec::new();
        let mut next = Some(A::ZERO);
        for (first, last) in &self.0 {
            if let (Some(from), Some(to)) = (next, first.predecessor())
                && from <= to
            {
                free.push((from, to));
            }
            next = last.successor();
        }
        if let Some(from) = next {
            free.push((from, A::MAX));
        }
        free
    }
}

/// Who a rule lets in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Sources<A> {
    pub(super) spans: Spans<A>,
    pub(super) caps: Box<[Box<str>]>,
}

impl<A> Sources<A> {
    /// About how many bytes they take.
    pub(super) fn footprint(&self) -> usize {
        let caps: usize = self.caps.iter().map(|cap| std::mem::size_of_val(cap) + cap.len()).sum();
        std::mem::size_of::<Self>() + std::mem::size_of_val(&*self.spans.0) + caps
    }
}

#[derive(Debug, Clone)]
struct Entry<A> {
    dst: Span<A>,
    sources: u32,
    rule: u32,
}

/// One protocol's entries, in rule order.
#[derive(Debug, Clone)]
struct Table<A> {
    ports: Vec<(u16, u16)>,
    entries: Vec<Entry<A>>,
}

/// One address family's part of a filter.
#[derive(Debug, Clone)]
pub(super) struct Family<A> {
    own: Spans<A>,
    sources: Vec<Arc<Sources<A>>>,
    /// Where each is in `sources`, by its address in memory.
    known: HashMap<usize, u32>,
    /// With ports; sorted by protocol.
    tables: Vec<(u8, Table<A>)>,
    /// Every rule's destinations whatever its protocols and ports.
    any: Table<A>,
    entries: usize,
    skipped: usize,
}

impl<A: Address> Family<A> {
    /// No rules, for packets to `own`.
    pub(super) fn new(own: &[IpNet]) -> Self {
        Self {
            own: own_spans(own),
            sources: Vec::new(),
            known: HashMap::new(),
            tables: Vec::new(),
            any: Table::new(),
            entries: 0,
            skipped: 0,
        }
    }

    /// Adds the rule with this number, which is higher than any before; `odd` are sources and destinations
    /// of it that did not parse. How many entries it came to.
    pub(super) fn add(&mut self, index: u32, part: &Part<A>, listed: &[u8], odd: (usize, usize)) -> usize {
        self.skipped += odd.1;
        let before = self.entries;
        let mut sources = None;
        for (dst, ports) in &part.destinations {
            if !self.own.overlaps(*dst) {
                // It can never match.
                continue;
            }
            let sources = *sources.get_or_insert_with(|| {
                self.skipped += odd.0;
                // There are at most as many as rules.
                let fresh = u32::try_from(self.sources.len()).unwrap_or(u32::MAX);
                *self.known.entry(Arc::as_ptr(&part.sources).addr()).or_insert_with(|| {
                    self.sources.push(Arc::clone(&part.sources));
                    fresh
                })
            });
            let entry = Entry { dst: *dst, sources, rule: index };
            self.entries += 1 + listed.len();
            if self.entries > MAX_ENTRIES {
                self.skipped += 1;
                continue;
            }
            self.any.push((0, u16::MAX), entry.clone());
            for &protocol in listed {
                self.table_mut(protocol).push(*ports, entry.clone());
            }
        }
        self.entries - before
    }

    /// No more rules will come.
    pub(super) fn end(&mut self) {
        self.known = HashMap::new();
        self.sources.shrink_to_fit();
        self.any.shrink();
        self.tables.iter_mut().for_each(|(_, table)| table.shrink());
    }

    /// How many pieces of text were left out.
    pub(super) fn skipped(&self) -> usize {
        self.skipped
    }

    pub(super) fn is_own(&self, dst: A) -> bool {
        self.own.contains(dst)
    }

    /// The first rule that lists `protocol` and lets `src` reach `port` at `dst`.
    pub(super) fn with_port(
        &self,
        protocol: u8,
        src: A,
        dst: A,
        port: u16,
        has_cap: impl Fn(&str) -> bool,
    ) -> Option<u32> {
        let table = self.table(protocol)?;
        table.find(|ports| ports.0 <= port && port <= ports.1, dst, |set| self.admits(set, src, &has_cap))
    }

    /// The first rule that lists `protocol` with all ports and lets `src` reach `dst`.
    pub(super) fn all_ports(&self, protocol: u8, src: A, dst: A) -> Option<u32> {
        let table = self.table(protocol)?;
        table.find(|ports| ports == (0, u16::MAX), dst, |set| self.admits(set, src, &|_: &str| false))
    }

    /// The first rule of any protocol and port that lets `src` reach `dst`.
    pub(super) fn any_port(&self, src: A, dst: A, has_cap: impl Fn(&str) -> bool) -> Option<u32> {
        self.any.find(|_| true, dst, |set| self.admits(set, src, &has_cap))
    }

    fn admits(&self, sources: u32, src: A, has_cap: &impl Fn(&str) -> bool) -> bool {
        let set = usize::try_from(sources).ok().and_then(|at| self.sources.get(at));
        set.is_some_and(|set| set.spans.contains(src) || set.caps.iter().any(|cap| has_cap(cap)))
    }

    fn table(&self, protocol: u8) -> Option<&Table<A>> {
        let at = self.tables.binary_search_by_key(&protocol, |(p, _)| *p).ok()?;
        Some(&self.tables[at].1)
    }

    fn table_mut(&mut self, protocol: u8) -> &mut Table<A> {
        let at = match self.tables.binary_search_by_key(&protocol, |(p, _)| *p) {
            Ok(at) => at,
            Err(at) => {
                self.tables.insert(at, (protocol, Table::new()));
                at
            }
        };
        &mut self.tables[at].1
    }
}

impl<A: Address> Table<A> {
    fn new() -> Self {
        Self { ports: Vec::new(), entries: Vec::new() }
    }

    fn push(&mut self, ports: (u16, u16), entry: Entry<A>) {
        self.ports.push(ports);
        self.entries.push(entry);
    }

    fn shrink(&mut self) {
        self.ports.shrink_to_fit();
        self.entries.shrink_to_fit();
    }

    fn find(
        &self,
        port_matches: impl Fn((u16, u16)) -> bool,
        dst: A,
        admits: impl Fn(u32) -> bool,
    ) -> Option<u32> {
        // Rules by the hundred mostly repeat few source sets: one search each is enough.
        let mut refused = None;
        for (at, ports) in self.ports.iter().enumerate() {
            if !port_matches(*ports) {
                continue;
            }
            let entry = &self.entries[at];
            if entry.dst.0 <= dst && dst <= entry.dst.1 && refused != Some(entry.sources) {
                if admits(entry.sources) {
                    return Some(entry.rule);
                }
                refused = Some(entry.sources);
            }
        }
        None
    }
}

/// The protocols that a rule with these numbers is for, sorted.
pub(super) fn protocols(numbers: &[i32]) -> Vec<u8> {
    if numbers.is_empty() {
        return DEFAULT_PROTOCOLS.to_vec();
    }
    let mut listed: Vec<u8> = numbers.iter().filter_map(|p| u8::try_from(*p).ok()).collect();
    listed.sort_unstable();
    listed.dedup();
    listed
}

/// The own addresses and routes, where a default route stands for the public internet alone: a peer
/// must not reach the networks around an exit node through it.
fn own_spans<A: Address>(own: &[IpNet]) -> Spans<A> {
    const NOT_PUBLIC: [&str; 10] = [
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "169.254.0.0/16",
        "224.0.0.0/4",
        "fe80::/10",
        "ff00::/8",
        "fc00::/7",
        "::1/128",
    ];
    let mut spans = Vec::new();
    for net in own {
        if net.prefix_len() == 0 && A::of(net.addr()).is_some() {
            let withheld = NOT_PUBLIC.iter().filter_map(|text| parse_set(text)?.span()).collect();
            spans.extend(Spans::new(withheld).complement());
        } else {
            spans.extend(span_of(net.network(), net.broadcast()));
        }
    }
    Spans::new(spans)
}

fn span_of<A: Address>(first: IpAddr, last: IpAddr) -> Option<Span<A>> {
    Some((A::of(first)?, A::of(last)?)).filter(|(first, last)| first <= last)
}

/// One element of `SrcIPs`, or the `IP` of one of `DstPorts`.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Set<'a> {
    Any,
    Range(IpAddr, IpAddr),
    Cap(&'a str),
}

impl Set<'_> {
    pub(super) fn span<A: Address>(&self) -> Option<Span<A>> {
        match self {
            Self::Any => Some((A::ZERO, A::MAX)),
            Self::Range(first, last) => span_of(*first, *last),
            Self::Cap(_) => None,
        }
    }
}

/// `*`, an address, a CIDR without host bits, `first-last`, or `cap:<name>`.
pub(super) fn parse_set(text: &str) -> Option<Set<'_>> {
    if text == "*" {
        return Some(Set::Any);
    }
    if let Some(cap) = text.strip_prefix("cap:") {
        return Some(Set::Cap(cap));
    }
    if text.contains('/') {
        let net: IpNet = text.parse().ok()?;
        return (net.addr() == net.network()).then(|| Set::Range(net.network(), net.broadcast()));
    }
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (first.parse().ok()?, last.parse().ok()?),
        None => {
            let ip = text.parse().ok()?;
            (ip, ip)
        }
    };
    let ordered = match (first, last) {
        (IpAddr::V4(a), IpAddr::V4(b)) => a <= b,
        (IpAddr::V6(a), IpAddr::V6(b)) => a <= b,
        _ => false,
    };
    ordered.then_some(Set::Range(first, last))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_grammar_of_sets() {
        let range = |a: &str, b: &str| Some(Set::Range(a.parse().unwrap(), b.parse().unwrap()));
        assert_eq!(parse_set("*"), Some(Set::Any));
        assert_eq!(parse_set("100.64.0.1"), range("100.64.0.1", "100.64.0.1"));
        assert_eq!(parse_set("fd7a::1"), range("fd7a::1", "fd7a::1"));
        assert_eq!(parse_set("10.0.0.0/8"), range("10.0.0.0", "10.255.255.255"));
        assert_eq!(parse_set("0.0.0.0/0"), range("0.0.0.0", "255.255.255.255"));
        assert_eq!(parse_set("fd00::/127"), range("fd00::", "fd00::1"));
        assert_eq!(parse_set("1.2.3.4-1.2.3.9"), range("1.2.3.4", "1.2.3.9"));
        assert_eq!(parse_set("2eff::1-2eff::800"), range("2eff::1", "2eff::800"));
        assert_eq!(parse_set("cap:https://x/y-z"), Some(Set::Cap("https://x/y-z")));
        for bad in [
            "",
            "**",
            "host",
            "1.2.3",
            "10.0.0.1/8",
            "10.0.0.0/33",
            "9.0.0.0-8.0.0.0",
            "1.2.3.4-::1",
            "1-2-3",
        ] {
            assert_eq!(parse_set(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_default_route_is_the_public_internet() {
        let own = |nets: &[&str]| -> Vec<IpNet> { nets.iter().map(|n| n.parse().unwrap()).collect() };
        let v4 = |nets: &[&str], ip: &str| {
            own_spans::<u32>(&own(nets)).contains(Address::of(ip.parse().unwrap()).unwrap())
        };
        assert!(v4(&["0.0.0.0/0"], "8.8.8.8"));
        assert!(v4(&["0.0.0.0/0"], "255.255.255.255"));
        for ip in ["10.1.2.3", "172.31.0.1", "192.168.1.1", "100.64.0.9", "169.254.169.254", "239.1.1.1"] {
            assert!(!v4(&["0.0.0.0/0"], ip), "{ip}");
            assert!(v4(&["0.0.0.0/0", &format!("{ip}/32")], ip), "named {ip}");
        }
        let v6 = own_spans::<u128>(&own(&["::/0", "0.0.0.0/0"]));
        let inside = |ip: &str| v6.contains(Address::of(ip.parse().unwrap()).unwrap());
        assert!(inside("2001:db8::1"));
        assert!(!inside("fd7a:115c:a1e0::1") && !inside("fe80::1") && !inside("ff02::1") && !inside("::1"));
    }

    proptest! {
        #[test]
        fn spans_are_the_union_of_their_parts(parts in proptest::collection::vec((0u32..64, 0u32..9), 0..12),
                                              high in any::<bool>()) {
            // At either end of the number line, where the neighbours of a span overflow.
            let base = if high { u32::MAX - 63 } else { 0 };
            let parts: Vec<_> =
                parts.iter().map(|(at, len)| (base + at, (base + at).saturating_add(*len))).collect();
            let spans = Spans::new(parts.clone());
            let free = Spans::new(spans.complement());
            for address in (0..=63).map(|n| base + n) {
                let inside = parts.iter().any(|(a, b)| *a <= address && address <= *b);
                prop_assert_eq!(spans.contains(address), inside);
                prop_assert_eq!(free.contains(address), !inside);
                prop_assert_eq!(spans.overlaps((address, address)), inside);
            }
        }

        #[test]
        fn fuzz_sets_never_panic(text in "[0-9a-f.:/*-]{0,24}|cap:.{0,8}|.{0,20}") {
            if let Some(set) = parse_set(&text) {
                if let Some((first, last)) = set.span::<u32>() { prop_assert!(first <= last); }
                if let Some((first, last)) = set.span::<u128>() { prop_assert!(first <= last); }
            }
        }
    }
}
