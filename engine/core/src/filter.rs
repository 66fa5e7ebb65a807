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
//! others.

mod compile;
mod flows;

use std::net::IpAddr;

use ipnet::IpNet;

use self::compile::{Address, Family};
use self::flows::{Flows, Tuple};
use crate::packet::{Fragment, Parsed, protocol};
use crate::tailcfg::FilterRule;

/// Compiled rules.
#[derive(Debug, Clone)]
pub struct Filter {
    v4: Family<u32>,
    v6: Family<u128>,
}

/// A filter in force and the flows that it lets answers back in for.
#[derive(Debug, Clone)]
pub struct FilterState {
    filter: Filter,
    flows: Flows,
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
    /// Compiles `rules` for packets to `own`: the node's addresses and the routes it advertises.
    /// No rules (`None`: control has sent none) let only answers in.
    ///
    /// A part of a rule that does not parse opens nothing and leaves the rest in force.
    #[must_use]
    pub fn compile(rules: Option<&[FilterRule]>, own: &[IpNet]) -> Self {
        let rules = rules.unwrap_or_default();
        Self { v4: Family::compile(rules, own), v6: Family::compile(rules, own) }
    }

    /// How many parts of rules were left out because they did not parse or were too many.
    #[must_use]
    pub fn skipped(&self) -> usize {
        self.v4.skipped().max(self.v6.skipped())
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
        Self { filter, flows: Flows::new() }
    }

    /// Puts `filter` in force; flows stay.
    pub fn set_filter(&mut self, filter: Filter) {
        self.filter = filter;
    }

    /// The filter in force.
    #[must_use]
    pub fn filter(&self) -> &Filter {
        &self.filter
    }

    /// Judges a decrypted packet from a peer whose node capabilities `has_cap` knows.
    pub fn check_in(&mut self, packet: &Parsed, has_cap: impl Fn(&str) -> bool) -> Verdict {
        match (packet.src, packet.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                if dst.is_multicast() {
                    return Verdict::Drop(DropReason::Multicast);
                }
                if dst.is_link_local() {
                    return Verdict::Drop(DropReason::LinkLocal);
                }
                judge(&self.filter.v4, &mut self.flows, packet, src.into(), dst.into(), has_cap)
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                if dst.is_multicast() {
                    return Verdict::Drop(DropReason::Multicast);
                }
                if dst.is_unicast_link_local() {
                    return Verdict::Drop(DropReason::LinkLocal);
                }
                judge(&self.filter.v6, &mut self.flows, packet, src.into(), dst.into(), has_cap)
            }
            _ => Verdict::Drop(DropReason::NotOwn),
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

fn judge<A: Address>(
    rules: &Family<A>,
    flows: &mut Flows,
    packet: &Parsed,
    src: A,
    dst: A,
    has_cap: impl Fn(&str) -> bool,
) -> Verdict {
    if !rules.is_own(dst) {
        return Verdict::Drop(DropReason::NotOwn);
    }
    if packet.fragment == Fragment::Later {
        return Verdict::Accept(Pass::Fragment);
    }
    let rule = match packet.protocol {
        protocol::TCP if !packet.is_tcp_syn() => return Verdict::Accept(Pass::TcpSegment),
        protocol::UDP | protocol::SCTP if flows.hit(&Tuple::of(packet)) => {
            return Verdict::Accept(Pass::Flow);
        }
        protocol::TCP | protocol::UDP | protocol::SCTP => {
            rules.with_port(packet.protocol, src, dst, packet.dst_port, has_cap)
        }
        protocol::TSMP => return Verdict::Accept(Pass::Tsmp),
        _ if packet.is_echo_reply() || packet.is_icmp_error() => return Verdict::Accept(Pass::IcmpAnswer),
        _ if packet.is_icmp() => rules.any_port(src, dst, has_cap),
        other => rules.all_ports(other, src, dst, has_cap),
    };
    rule.map_or(Verdict::Drop(DropReason::NoRule), |rule| Verdict::Accept(Pass::Rule(rule)))
}

#[cfg(test)]
mod tests;
