//! What peers may send this node, as the packet filter of the netmap says.
//!
//! Inbound packets are judged after decryption; outbound ones pass and leave a trace, so that answers
//! come in without a rule. What a rule is needed for:
//!
//! | packet | passes |
//! |---|---|
//! | TCP | by a rule for its port when it opens a connection; any other segment |
//! | UDP, SCTP | as the reverse of a flow that this node sent on (the last 512), or by a rule for its port |
//! | ICMP echo reply and errors | always |
//! | other ICMP | by any rule from its source to its destination |
//! | TSMP | always; it ends in this program |
//! | anything else | by a rule that lists the protocol with ports 0–65535 |
//! | later fragments | always: without the first one nobody can use them |
//!
//! In every case the destination must be an own address or route, and neither multicast nor link-local.
//! Without rules, or with no filter yet, only answers pass: a node that nobody may reach still reaches
//! others. The same holds for a jailed peer, whatever the rules say.
//!
//! New rules keep the flows, as stock does: an answer to what this node asked still comes in. TCP has no
//! table: segments of a connection that the new rules would not let open go on passing.
//!
//! Where stock is narrower than the text of a rule, so is this: `cap:` sources count neither for protocols
//! without ports nor for capability grants. Where stock is wider (ICMP from a `cap:` source to any own
//! address, later fragments to any address at all, 169.254.169.254) this is not.

mod caps;
mod compile;
mod flows;
mod rule;
mod tally;

use std::net::IpAddr;

use ipnet::IpNet;

use self::compile::{Address, Family};
use self::flows::{Flows, Tuple};
use crate::packet::{Fragment, Parsed, protocol};
use crate::tailcfg::FilterRule;

pub use caps::{PeerCaps, admits_any, peer_caps};
pub use rule::{Rule, RuleBook};
use tally::Tally;
pub use tally::{MAX_NAMED_RULES, RuleName};

/// What all rules of a filter may take in memory, by [`Rule::footprint`]; more are left out.
pub const MAX_FILTER_BYTES: usize = 16 << 20;
/// Most named parts of a filter.
pub const MAX_CHUNKS: usize = 1024;

/// Compiled rules.
#[derive(Debug, Clone)]
pub struct Filter {
    v4: Family<u32>,
    v6: Family<u128>,
    names: tally::Names,
}

/// A filter in force, the flows that it lets answers back in for, and what it has let pass.
#[derive(Debug, Clone)]
pub struct FilterState {
    filter: Filter,
    flows: Flows,
    tally: Tally,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes to the pod.
    Accept(Pass),
    /// It goes nowhere.
    Drop(DropReason),
}

/// Why a packet passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// The first rule that lets it, as its index in the rules compiled.
    Rule(u32),
    /// It answers a flow this node opened.
    Flow,
    /// A TCP segment that opens nothing.
    TcpSegment,
    /// An ICMP echo reply or error.
    IcmpAnswer,
    /// A later fragment.
    Fragment,
    /// TSMP.
    Tsmp,
}

impl Pass {
    /// For people and counters.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rule(_) => "rule",
            Self::Flow => "flow",
            Self::TcpSegment => "tcp_segment",
            Self::IcmpAnswer => "icmp_answer",
            Self::Fragment => "fragment",
            Self::Tsmp => "tsmp",
        }
    }
}

/// Why a packet does not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropReason {
    /// To a multicast address.
    Multicast,
    /// To a link-local address.
    LinkLocal,
    /// To an address that is neither own nor routed here.
    NotOwn,
    /// No rule lets it.
    NoRule,
    /// It opens something, from a peer that may only answer.
    Jailed,
}

impl DropReason {
    /// For counters.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Multicast => "multicast",
            Self::LinkLocal => "link_local",
            Self::NotOwn => "not_own_address",
            Self::NoRule => "no_rule",
            Self::Jailed => "jailed",
        }
    }
}

impl Verdict {
    /// True when the packet goes to the pod.
    #[must_use]
    pub fn is_accept(self) -> bool {
        matches!(self, Self::Accept(_))
    }
}

impl Filter {
    /// Compiles `rules` as the chunk `base`; see [`Filter::of_chunks`].
    #[must_use]
    pub fn compile(rules: Option<&[FilterRule]>, own: &[IpNet]) -> Self {
        Self::of_chunks([("base", rules.unwrap_or_default())], own)
    }

    /// Compiles named chunks of rules, in this order, for packets to `own`: the node's addresses and the
    /// routes it advertises. No rules (control has sent none) let only answers in.
    ///
    /// A part of a rule that does not parse opens nothing and leaves the rest in force.
    #[must_use]
    pub fn of_chunks<'a>(
        chunks: impl IntoIterator<Item = (&'a str, &'a [FilterRule])>,
        own: &[IpNet],
    ) -> Self {
        let mut book = RuleBook::default();
        let chunks: Vec<(&str, Vec<Rule>)> = chunks
            .into_iter()
            .map(|(name, chunk)| (name, chunk.iter().map(|rule| book.rule_of(rule)).collect()))
            .collect();
        let mut build = FilterBuild::begin(chunks.iter().map(|(name, rules)| (*name, rules.as_slice())), own);
        while !build.go_on(usize::MAX) {}
        build.filter
    }

    /// What the rule with this number in a [`Pass::Rule`] is called.
    #[must_use]
    pub fn rule_name(&self, rule: u32) -> Option<RuleName> {
        self.names.name(rule)
    }

    /// How many rules there are, those that can never match included.
    #[must_use]
    pub fn rules(&self) -> usize {
        self.names.len()
    }

    /// How many parts of rules were left out because they did not parse or were too many.
    #[must_use]
    pub fn skipped(&self) -> usize {
        self.v4.skipped().max(self.v6.skipped())
    }
}

/// A filter that is being put together, a portion at a time.
#[derive(Debug)]
pub struct FilterBuild {
    filter: Filter,
    rules: Vec<Rule>,
    next: usize,
}

impl FilterBuild {
    /// As [`Filter::of_chunks`], of rules that are decoded; goes on with [`FilterBuild::go_on`].
    #[must_use]
    pub fn begin<'a>(chunks: impl IntoIterator<Item = (&'a str, &'a [Rule])>, own: &[IpNet]) -> Self {
        let (mut rules, mut names) = (Vec::new(), tally::Names::default());
        for (name, chunk) in chunks {
            names.push(name, chunk);
            rules.extend_from_slice(chunk);
        }
        Self { filter: Filter { v4: Family::new(own), v6: Family::new(own), names }, rules, next: 0 }
    }

    /// Does some more: one rule, and others until about `portion` entries of tables were made. True when
    /// the filter is whole.
    pub fn go_on(&mut self, portion: usize) -> bool {
        let Filter { v4, v6, .. } = &mut self.filter;
        let mut done = 0;
        while let Some(rule) = self.rules.get(self.next) {
            if done >= portion {
                return false;
            }
            // `MAX_FILTER_BYTES` is some tens of thousands of them.
            let index = u32::try_from(self.next).unwrap_or(u32::MAX);
            self.next += 1;
            let rule = rule.kept();
            let made = v4.add(index, &rule.v4, &rule.protocols, rule.odd)
                + v6.add(index, &rule.v6, &rule.protocols, rule.odd);
            done += 1 + made;
        }
        v4.end();
        v6.end();
        true
    }

    /// The filter, once it is whole.
    #[must_use]
    pub fn finish(self) -> Filter {
        self.filter
    }
}

impl Default for FilterState {
    fn default() -> Self {
        Self::new(Filter::compile(None, &[]))
    }
}

impl FilterState {
    /// Puts `filter` in force with no flows.
    #[must_use]
    pub fn new(filter: Filter) -> Self {
        let tally = Tally::new(filter.names.len());
        Self { filter, flows: Flows::new(), tally }
    }

    /// Puts `filter` in force; flows stay, and so do the counts of rules that are the same as before.
    pub fn set_filter(&mut self, filter: Filter) {
        self.tally.carry(&self.filter.names, &filter.names);
        self.filter = filter;
    }

    /// The filter in force.
    #[must_use]
    pub fn filter(&self) -> &Filter {
        &self.filter
    }

    /// Judges a decrypted packet from a peer whose node capabilities `has_cap` knows, and counts it.
    pub fn check_in(&mut self, packet: &Parsed, has_cap: impl Fn(&str) -> bool) -> Verdict {
        let flows = &mut self.flows;
        let verdict = self.filter.judge(packet, |flow| flows.hit(flow), Some(has_cap));
        self.tally.count(verdict, packet.protocol);
        verdict
    }

    /// As [`FilterState::check_in`], for a peer that may only answer.
    pub fn check_in_jailed(&mut self, packet: &Parsed) -> Verdict {
        let flows = &mut self.flows;
        let verdict = self.filter.judge(packet, |flow| flows.hit(flow), None::<fn(&str) -> bool>);
        self.tally.count(verdict, packet.protocol);
        verdict
    }

    /// What [`FilterState::check_in`] would say, without a trace; `jailed` for a peer that may only answer.
    pub fn ask(&self, packet: &Parsed, jailed: bool, has_cap: impl Fn(&str) -> bool) -> Verdict {
        self.filter.judge(packet, |flow| self.flows.contains(flow), (!jailed).then_some(has_cap))
    }

    /// What has passed, by the rule (`base/0`) or the reason, never more than [`MAX_NAMED_RULES`] rules
    /// one by one.
    #[must_use]
    pub fn passed(&self) -> Vec<(String, u64)> {
        self.tally.passed(&self.filter.names)
    }

    /// What no rule let in, by protocol.
    #[must_use]
    pub fn unruled(&self) -> [(&'static str, u64); 4] {
        self.tally.unruled()
    }

    /// The flows that are remembered, for another process of this node.
    #[must_use]
    pub fn flows(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for flow in self.flows.iter() {
            flow.store(&mut out);
        }
        out
    }

    /// Remembers what [`FilterState::flows`] of another process gave.
    pub fn add_flows(&mut self, stored: &[u8]) {
        for flow in stored.as_chunks().0 {
            self.flows.record(Tuple::load(flow));
        }
    }

    /// Remembers a packet that this node sends, so that its answers pass.
    pub fn note_out(&mut self, packet: &Parsed) {
        if has_flow(packet) && packet.fragment != Fragment::Later {
            self.flows.record(Tuple::of(packet).reversed());
        }
    }
}

fn has_flow(packet: &Parsed) -> bool {
    matches!(packet.protocol, protocol::UDP | protocol::SCTP)
}

impl Filter {
    /// `has_cap` is `None` for a jailed peer.
    fn judge(
        &self,
        packet: &Parsed,
        is_flow: impl FnMut(&Tuple) -> bool,
        has_cap: Option<impl Fn(&str) -> bool>,
    ) -> Verdict {
        match (packet.src, packet.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                if dst.is_multicast() {
                    return Verdict::Drop(DropReason::Multicast);
                }
                if dst.is_link_local() {
                    return Verdict::Drop(DropReason::LinkLocal);
                }
                judge(&self.v4, is_flow, packet, src.into(), dst.into(), has_cap)
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                if dst.is_multicast() {
                    return Verdict::Drop(DropReason::Multicast);
                }
                if dst.is_unicast_link_local() {
                    return Verdict::Drop(DropReason::LinkLocal);
                }
                judge(&self.v6, is_flow, packet, src.into(), dst.into(), has_cap)
            }
            _ => Verdict::Drop(DropReason::NotOwn),
        }
    }
}

fn judge<A: Address>(
    rules: &Family<A>,
    mut is_flow: impl FnMut(&Tuple) -> bool,
    packet: &Parsed,
    src: A,
    dst: A,
    has_cap: Option<impl Fn(&str) -> bool>,
) -> Verdict {
    if !rules.is_own(dst) {
        return Verdict::Drop(DropReason::NotOwn);
    }
    if packet.fragment == Fragment::Later {
        return Verdict::Accept(Pass::Fragment);
    }
    match packet.protocol {
        protocol::TCP if !packet.is_tcp_syn() => return Verdict::Accept(Pass::TcpSegment),
        protocol::UDP | protocol::SCTP if is_flow(&Tuple::of(packet)) => {
            return Verdict::Accept(Pass::Flow);
        }
        protocol::TSMP => return Verdict::Accept(Pass::Tsmp),
        _ if packet.is_echo_reply() || packet.is_icmp_error() => return Verdict::Accept(Pass::IcmpAnswer),
        _ => {}
    }
    let Some(has_cap) = has_cap else { return Verdict::Drop(DropReason::Jailed) };
    let rule = match packet.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => {
            rules.with_port(packet.protocol, src, dst, packet.dst_port, has_cap)
        }
        _ if packet.is_icmp() => rules.any_port(src, dst, has_cap),
        other => rules.all_ports(other, src, dst),
    };
    rule.map_or(Verdict::Drop(DropReason::NoRule), |rule| Verdict::Accept(Pass::Rule(rule)))
}

#[cfg(test)]
mod kept;
#[cfg(test)]
mod tests;
