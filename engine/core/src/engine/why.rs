//! What would become of a packet, and which rule says so.

use super::*;
use crate::filter::{self, PeerCaps, RuleName};
use crate::packet::{Fragment, Parsed, protocol, tcp_flag};

/// The packet asked about. One that opens something: for TCP a SYN, for ICMP an echo request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Source port, 0 where there is none.
    pub src_port: u16,
    /// Destination port, 0 where there is none.
    pub dst_port: u16,
}

/// Which way the packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From a peer to the pod.
    In,
    /// From the pod to a peer.
    Out,
}

/// What becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It passes here.
    Accept,
    /// It is dropped here.
    Drop,
    /// It passes here, but the peer told that it refuses such a packet.
    RefusedByPeer,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Why {
    /// Which way the packet goes.
    pub direction: Direction,
    /// What becomes of it.
    pub decision: Decision,
    /// The rule that decided, if one did.
    pub rule: Option<RuleName>,
    /// Why, from a bounded set of words: those of [`DropReason`], or what let it pass.
    pub reason: &'static str,
    /// The peer at the other end.
    pub peer: Option<String>,
}

impl Engine {
    /// What would become of such a packet now, by which rule. Nothing is changed or counted by asking.
    #[must_use]
    pub fn why(&self, question: Question, now: Instant) -> Why {
        let Question { src, dst, .. } = question;
        let direction = if self.own.contains(&src) { Direction::Out } else { Direction::In };
        let mut why = Why { direction, decision: Decision::Drop, rule: None, reason: "", peer: None };
        let slot = self.peers.by_ip(if direction == Direction::Out { dst } else { src });
        let peer = slot.and_then(|slot| self.peers.get(slot));
        why.peer = peer.map(|peer| peer.facts.called());
        let refused = |reason: DropReason| reason.name();
        why.reason = match (direction, slot) {
            _ if src.is_ipv4() != dst.is_ipv4() => refused(DropReason::Malformed),
            (Direction::Out, _) if question.protocol == protocol::TSMP => refused(DropReason::Tsmp),
            (Direction::Out, _) if outbound::is_service(dst) => refused(DropReason::ServiceAddress),
            (Direction::Out, None) => refused(self.why_no_peer()),
            (Direction::In, None) => refused(DropReason::PeerSource),
            (_, Some(slot)) => match self.obstacle(slot, now) {
                Some(reason) => refused(reason),
                None if direction == Direction::Out => {
                    let to = SocketAddr::new(dst, question.dst_port);
                    match self.rejections.find(question.protocol, src, to) {
                        Some((_, rejected)) if !rejected.perhaps => {
                            why.decision = Decision::RefusedByPeer;
                            rejected.reason()
                        }
                        _ => {
                            why.decision = Decision::Accept;
                            "to_peer"
                        }
                    }
                }
                None => self.why_in(slot, question, &mut why),
            },
        };
        why
    }

    fn why_in(&self, slot: Slot, question: Question, why: &mut Why) -> &'static str {
        let Question { src, dst, protocol, src_port, dst_port } = question;
        let dst = self.unmasked(slot, dst).unwrap_or(dst);
        let has_ports = matches!(protocol, protocol::TCP | protocol::UDP | protocol::SCTP);
        let packet = Parsed {
            src,
            dst,
            protocol,
            src_port: if has_ports { src_port } else { 0 },
            dst_port: if has_ports { dst_port } else { 0 },
            tcp_flags: if protocol == protocol::TCP { tcp_flag::SYN } else { 0 },
            icmp_type: match protocol {
                protocol::ICMPV4 => 8,
                protocol::ICMPV6 => 128,
                _ => 0,
            },
            icmp_code: 0,
            fragment: Fragment::Whole,
            transport: 0,
            length: 0,
        };
        let Some(peer) = self.peers.get(slot) else { return DropReason::PeerSource.name() };
        match self.filter.ask(&packet, peer.jailed, |cap| peer.caps.has(cap)) {
            filter::Verdict::Accept(pass) => {
                why.decision = Decision::Accept;
                if let filter::Pass::Rule(rule) = pass {
                    why.rule = self.filter.filter().rule_name(rule);
                }
                pass.name()
            }
            filter::Verdict::Drop(filter::DropReason::NoRule) if self.filter_discarded => "filter_discarded",
            filter::Verdict::Drop(reason) => inbound::dropped(reason).name(),
        }
    }

    /// The application capabilities that the tailnet's policy gives the peer at `src` towards this node.
    #[must_use]
    pub fn peer_caps(&self, src: IpAddr) -> PeerCaps {
        let slot = self.peers.by_ip(src);
        let peer = slot.and_then(|slot| self.peers.get(slot));
        let own = self.native.iter().flatten().find(|ip| ip.is_ipv4() == src.is_ipv4());
        match (peer, own) {
            (Some(peer), Some(own)) if !peer.unsigned && !self.filter_discarded => {
                filter::peer_caps(self.netmap.rules(), src, *own)
            }
            _ => PeerCaps::new(),
        }
    }

    /// Rules of the packet filter and other reasons by which packets passed, with their counts.
    #[must_use]
    pub fn filter_passed(&self) -> Vec<(String, u64)> {
        self.filter.passed()
    }

    /// Packets that no rule lets in, by what they are: a rule that lets them in would name that protocol.
    #[must_use]
    pub fn filter_unruled(&self) -> [(&'static str, u64); 4] {
        self.filter.unruled()
    }
}
