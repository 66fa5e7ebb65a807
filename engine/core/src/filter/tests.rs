//! One test per sentence of the rules, then a comparison with a reading of the rules that knows no tables.

use proptest::prelude::*;

use super::*;
use crate::packet::build::{fragment4, fragment6, ip, ports};
use crate::packet::tcp_flag::{ACK, SYN};
use crate::tailcfg::{NetPortRange, PortRange};

const ME4: &str = "100.64.0.2";
const ME6: &str = "fd7a:115c:a1e0::2";
const PEER4: &str = "100.64.0.1";
const PEER6: &str = "fd7a:115c:a1e0::1";

#[test]
fn a_rule_names_sources_destinations_and_ports() {
    for source in [PEER4, "100.64.0.0/24", "100.64.0.0-100.64.0.1", "*"] {
        let mut state = with(&[rule(&[source], &[(ME4, 80, 90)])]);
        assert_eq!(syn(&mut state, PEER4, ME4, 80), Verdict::Accept(Pass::Rule(0)), "{source}");
        assert_eq!(syn(&mut state, PEER4, ME4, 90), Verdict::Accept(Pass::Rule(0)));
        for port in [79, 91] {
            assert_eq!(syn(&mut state, PEER4, ME4, port), Verdict::Drop(DropReason::NoRule));
        }
        let stranger = syn(&mut state, "100.65.0.1", ME4, 80);
        assert_eq!(stranger.is_accept(), source == "*", "{source}");
        assert!(!syn(&mut state, PEER6, ME6, 80).is_accept(), "the destination is IPv4 alone");
    }
    let mut state = with(&[rule(&["*"], &[("*", 443, 443)])]);
    assert!(syn(&mut state, PEER6, ME6, 443).is_accept());
    assert!(syn(&mut state, PEER4, ME4, 443).is_accept());
}

#[test]
fn the_first_rule_that_matches_is_named() {
    let mut state = with(&[
        rule(&[PEER4], &[(ME4, 22, 22)]),
        rule(&["*"], &[(ME4, 22, 22)]),
        rule(&[PEER4], &[(ME4, 0, 65535)]),
    ]);
    assert_eq!(syn(&mut state, PEER4, ME4, 22), Verdict::Accept(Pass::Rule(0)));
    assert_eq!(syn(&mut state, "100.64.0.7", ME4, 22), Verdict::Accept(Pass::Rule(1)));
    assert_eq!(syn(&mut state, PEER4, ME4, 23), Verdict::Accept(Pass::Rule(2)));
}

#[test]
fn parts_that_do_not_parse_open_nothing_and_spoil_nothing() {
    let filter = Filter::compile(
        Some(&[
            rule(&["nonsense", PEER4], &[("10.0.0.1/8", 1, 1), (ME4, 80, 80), ("cap:x", 0, 65535)]),
            rule(&[], &[("*", 0, 65535)]),
            rule(&["*"], &[]),
            rule(&["*"], &[(ME4, 9, 5)]),
        ]),
        &own(),
    );
    assert_eq!(filter.skipped(), 3);
    let mut state = FilterState::new(filter);
    assert!(syn(&mut state, PEER4, ME4, 80).is_accept());
    assert!(!syn(&mut state, "100.64.0.7", ME4, 80).is_accept());
    for port in [1, 5, 7, 9, 81] {
        assert!(!syn(&mut state, PEER4, ME4, port).is_accept(), "{port}");
    }
}

#[test]
fn a_capability_of_the_peer_is_a_source() {
    let mut state = with(&[rule(&["cap:web"], &[(ME4, 80, 80)])]);
    let packet = Parsed::parse(&ip(PEER4, ME4, 6, &ports(9, 80, SYN))).unwrap();
    assert!(state.check_in(&packet, |cap| cap == "web").is_accept());
    assert!(!state.check_in(&packet, |cap| cap == "mail").is_accept());
    assert!(!state.check_in(&packet, |_| false).is_accept());
}

#[test]
fn without_a_protocol_list_a_rule_is_for_tcp_udp_and_icmp() {
    let mut state = with(&[rule(&["*"], &[("*", 0, 65535)])]);
    for protocol in [protocol::TCP, protocol::UDP] {
        let p = ip(PEER4, ME4, protocol, &ports(1, 2, SYN));
        assert!(judged(&mut state, &p).is_accept());
    }
    assert!(judged(&mut state, &ip(PEER4, ME4, 1, &[8, 0, 0, 0, 0, 0, 0, 0])).is_accept());
    assert!(judged(&mut state, &ip(PEER6, ME6, 58, &[128, 0, 0, 0, 0, 0, 0, 0])).is_accept());
    for other in [protocol::SCTP, 47, 50] {
        assert!(!judged(&mut state, &ip(PEER4, ME4, other, &[0; 20])).is_accept(), "{other}");
    }
}

#[test]
fn a_protocol_list_is_exact() {
    let mut udp = rule(&["*"], &[("*", 53, 53)]);
    udp.ip_proto = vec![17, 132, 17, -1, 300];
    let mut state = with(&[udp]);
    assert!(judged(&mut state, &ip(PEER4, ME4, 17, &ports(1, 53, 0))).is_accept());
    assert!(judged(&mut state, &ip(PEER4, ME4, 132, &ports(1, 53, 0))).is_accept());
    assert!(!syn(&mut state, PEER4, ME4, 53).is_accept());
}

#[test]
fn other_protocols_need_all_ports() {
    for (ports, passes) in [((0, 65535), true), ((1, 65535), false), ((0, 65534), false), ((0, 0), false)] {
        let mut gre = rule(&[PEER4], &[(ME4, ports.0, ports.1)]);
        gre.ip_proto = vec![47];
        let mut state = with(&[gre]);
        let verdict = judged(&mut state, &ip(PEER4, ME4, 47, &[0; 8]));
        assert_eq!(verdict.is_accept(), passes, "{ports:?}");
        assert!(!judged(&mut state, &ip(PEER4, ME4, 46, &[0; 8])).is_accept());
    }
}

#[test]
fn only_a_syn_without_ack_needs_a_rule() {
    let mut state = with(&[]);
    for flags in [ACK, SYN | ACK, 0x04, 0x01, 0x18, 0] {
        let verdict = judged(&mut state, &ip(PEER4, ME4, 6, &ports(80, 40000, flags)));
        assert_eq!(verdict, Verdict::Accept(Pass::TcpSegment), "{flags:#x}");
    }
    for flags in [SYN, SYN | 0x01, SYN | 0xc0] {
        let verdict = judged(&mut state, &ip(PEER4, ME4, 6, &ports(80, 40000, flags)));
        assert_eq!(verdict, Verdict::Drop(DropReason::NoRule), "{flags:#x}");
    }
}

#[test]
fn answers_to_udp_and_sctp_flows_pass() {
    for (me, peer) in [(ME4, PEER4), (ME6, PEER6)] {
        for protocol in [protocol::UDP, protocol::SCTP] {
            let mut state = with(&[]);
            let answer = ip(peer, me, protocol, &ports(53, 4000, 0));
            assert_eq!(judged(&mut state, &answer), Verdict::Drop(DropReason::NoRule));
            sent(&mut state, &ip(me, peer, protocol, &ports(4000, 53, 0)));
            assert_eq!(judged(&mut state, &answer), Verdict::Accept(Pass::Flow));
            for other in [ports(53, 4001, 0), ports(54, 4000, 0)] {
                assert!(!judged(&mut state, &ip(peer, me, protocol, &other)).is_accept());
            }
            let swapped = if protocol == protocol::UDP { protocol::SCTP } else { protocol::UDP };
            assert!(!judged(&mut state, &ip(peer, me, swapped, &ports(53, 4000, 0))).is_accept());
        }
    }
    // Neither TCP nor the ports a later fragment does not have leave a flow.
    let mut state = with(&[]);
    sent(&mut state, &ip(ME4, PEER4, 6, &ports(0, 0, SYN)));
    sent(&mut state, &fragment4(ip(ME4, PEER4, 17, &ports(0, 0, 0)), 100, false));
    assert!(!judged(&mut state, &ip(PEER4, ME4, 17, &ports(0, 0, 0))).is_accept());
}

#[test]
fn the_newest_512_flows_are_remembered() {
    let mut state = with(&[]);
    for port in 1..=513 {
        sent(&mut state, &ip(ME4, PEER4, 17, &ports(port, 53, 0)));
    }
    let mut answer = |port| judged(&mut state, &ip(PEER4, ME4, 17, &ports(53, port, 0))).is_accept();
    assert!(!answer(1) && answer(2) && answer(513));
}

#[test]
fn new_rules_keep_flows() {
    let mut state = with(&[rule(&["*"], &[("*", 0, 65535)])]);
    sent(&mut state, &ip(ME4, PEER4, 17, &ports(4000, 53, 0)));
    state.set_filter(Filter::compile(Some(&[]), &own()));
    assert_eq!(judged(&mut state, &ip(PEER4, ME4, 17, &ports(53, 4000, 0))), Verdict::Accept(Pass::Flow));
    assert!(!syn(&mut state, PEER4, ME4, 80).is_accept());
}

#[test]
fn icmp_answers_pass_and_other_icmp_needs_any_rule() {
    let answers = [(PEER4, ME4, 1, &[0, 3, 11, 12][..]), (PEER6, ME6, 58, &[129, 1, 2, 3, 4])];
    for (peer, me, protocol, kinds) in answers {
        for kind in kinds {
            let p = ip(peer, me, protocol, &[*kind, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(judged(&mut with(&[]), &p), Verdict::Accept(Pass::IcmpAnswer), "{kind}");
        }
    }
    let ping = ip(PEER4, ME4, 1, &[8, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(judged(&mut with(&[]), &ping), Verdict::Drop(DropReason::NoRule));
    let mut one_udp_port = rule(&[PEER4], &[(ME4, 53, 53)]);
    one_udp_port.ip_proto = vec![17];
    let mut state = with(&[one_udp_port]);
    assert_eq!(judged(&mut state, &ping), Verdict::Accept(Pass::Rule(0)));
    assert!(!judged(&mut state, &ip("100.64.0.7", ME4, 1, &[8, 0, 0, 0, 0, 0, 0, 0])).is_accept());
    // ICMP of the wrong family is just another protocol.
    assert!(!judged(&mut state, &ip(PEER4, ME4, 58, &[129, 0, 0, 0])).is_accept());
}

#[test]
fn tsmp_passes() {
    assert_eq!(
        judged(&mut with(&[]), &ip(PEER4, ME4, protocol::TSMP, b"!\0\0\0\0\0\0")),
        Verdict::Accept(Pass::Tsmp)
    );
}

#[test]
fn fragments_are_judged_by_the_first_one() {
    let mut state = with(&[rule(&["*"], &[("*", 80, 80)])]);
    let tcp = |port| ip(PEER4, ME4, 6, &ports(9, port, SYN));
    assert_eq!(judged(&mut state, &fragment4(tcp(80), 0, true)), Verdict::Accept(Pass::Rule(0)));
    assert_eq!(judged(&mut state, &fragment4(tcp(81), 0, true)), Verdict::Drop(DropReason::NoRule));
    assert_eq!(judged(&mut state, &fragment4(tcp(81), 100, true)), Verdict::Accept(Pass::Fragment));
    let later6 = ip(PEER6, ME6, 44, &fragment6(6, 100, false, &[0; 8]));
    assert_eq!(judged(&mut state, &later6), Verdict::Accept(Pass::Fragment));
    let elsewhere = fragment4(ip(PEER4, "100.64.0.3", 6, &[0; 20]), 100, true);
    assert_eq!(judged(&mut state, &elsewhere), Verdict::Drop(DropReason::NotOwn));
}

#[test]
fn the_destination_must_be_ours() {
    let rules = [rule(&["*"], &[("*", 0, 65535)])];
    let mut nets = own();
    nets.push("192.168.7.0/24".parse().unwrap());
    let mut state = FilterState::new(Filter::compile(Some(&rules), &nets));
    let table = [
        (ME4, None),
        ("192.168.7.200", None),
        ("192.168.8.1", Some(DropReason::NotOwn)),
        ("100.100.100.100", Some(DropReason::NotOwn)),
        ("224.0.0.1", Some(DropReason::Multicast)),
        ("239.255.255.255", Some(DropReason::Multicast)),
        ("169.254.169.254", Some(DropReason::LinkLocal)),
        ("255.255.255.255", Some(DropReason::NotOwn)),
    ];
    for (dst, reason) in table {
        for flags in [SYN, ACK] {
            let verdict = judged(&mut state, &ip(PEER4, dst, 6, &ports(1, 2, flags)));
            match reason {
                None => assert!(verdict.is_accept(), "{dst}"),
                Some(reason) => assert_eq!(verdict, Verdict::Drop(reason), "{dst}"),
            }
        }
    }
    let v6 = [
        ("fd7a:115c:a1e0::3", DropReason::NotOwn),
        ("ff02::1", DropReason::Multicast),
        ("fe80::1", DropReason::LinkLocal),
    ];
    for (dst, reason) in v6 {
        let p = ip(PEER6, dst, 58, &[129, 0, 0, 0]);
        assert_eq!(judged(&mut state, &p), Verdict::Drop(reason), "{dst}");
    }
}

#[test]
fn no_filter_lets_only_answers_in() {
    let mut state = FilterState::new(Filter::compile(None, &own()));
    assert!(!syn(&mut state, PEER4, ME4, 80).is_accept());
    assert!(!judged(&mut state, &ip(PEER4, ME4, 17, &ports(1, 2, 0))).is_accept());
    assert!(!judged(&mut state, &ip(PEER4, ME4, 1, &[8, 0, 0, 0])).is_accept());
    sent(&mut state, &ip(ME4, PEER4, 17, &ports(4000, 53, 0)));
    assert!(judged(&mut state, &ip(PEER4, ME4, 17, &ports(53, 4000, 0))).is_accept());
    // Before the first netmap nothing is ours, so nothing passes at all.
    let mut unborn = FilterState::default();
    assert!(!judged(&mut unborn, &ip(PEER4, ME4, 6, &ports(1, 2, ACK))).is_accept());
}

/// The rules read naively: every rule, source and destination of one packet in turn.
fn reference(rules: &[FilterRule], packet: &Parsed) -> Option<u32> {
    let within = |text: &str, ip: IpAddr| match text {
        "*" => true,
        _ if text.contains('/') => text.parse::<IpNet>().unwrap().contains(&ip),
        _ if text.contains('-') => {
            let (a, b) = text.split_once('-').unwrap();
            let (a, b): (IpAddr, IpAddr) = (a.parse().unwrap(), b.parse().unwrap());
            a.is_ipv4() == ip.is_ipv4() && a <= ip && ip <= b
        }
        _ => text.parse::<IpAddr>().unwrap() == ip,
    };
    let found = rules.iter().position(|rule| {
        let listed = match &rule.ip_proto[..] {
            [] => [1, 6, 17, 58].contains(&packet.protocol),
            list => list.iter().any(|p| u8::try_from(*p) == Ok(packet.protocol)),
        };
        let has_ports = matches!(packet.protocol, 6 | 17 | 132);
        rule.src_ips.iter().any(|s| within(s, packet.src))
            && rule.dst_ports.iter().any(|d| {
                within(&d.ip, packet.dst)
                    && if packet.is_icmp() {
                        true
                    } else if has_ports {
                        listed && (d.ports.first..=d.ports.last).contains(&packet.dst_port)
                    } else {
                        listed && (d.ports.first, d.ports.last) == (0, 65535)
                    }
            })
    });
    found.map(|at| u32::try_from(at).unwrap())
}

fn some_set() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("*".to_owned()),
        (0u8..8).prop_map(|n| format!("100.64.0.{n}")),
        (0u8..8).prop_map(|n| format!("fd7a:115c:a1e0::{n}")),
        Just("100.64.0.0/30".to_owned()),
        Just("100.64.0.4/31".to_owned()),
        Just("fd7a:115c:a1e0::/126".to_owned()),
        (0u8..4, 0u8..4).prop_map(|(a, n)| format!("100.64.0.{a}-100.64.0.{}", a + n)),
    ]
}

fn some_rule() -> impl Strategy<Value = FilterRule> {
    let ports = prop_oneof![Just((0u16, 65535u16)), (0u16..6, 0u16..6)];
    let sources = proptest::collection::vec(some_set(), 0..4);
    let destinations = proptest::collection::vec((some_set(), ports), 0..4);
    let protocols =
        prop_oneof![Just(vec![]), proptest::collection::vec(prop_oneof![Just(6), Just(17), Just(47)], 1..3)];
    (sources, destinations, protocols).prop_map(|(src, dst, protocols)| {
        let src: Vec<&str> = src.iter().map(String::as_str).collect();
        let dst: Vec<_> = dst.iter().map(|(ip, ports)| (ip.as_str(), ports.0, ports.1)).collect();
        FilterRule { ip_proto: protocols, ..rule(&src, &dst) }
    })
}

proptest! {
    #[test]
    fn fuzz_tables_decide_as_the_rules_read(
        rules in proptest::collection::vec(some_rule(), 0..12),
        packets in proptest::collection::vec(
            (any::<bool>(), 0u8..9, prop_oneof![Just(6u8), Just(17), Just(47), Just(1), Just(58), Just(132)], 0u16..7),
            1..20),
    ) {
        let mut state = with(&rules);
        for (v6, source, protocol, port) in packets {
            let mut payload = ports(9, port, SYN);
            if matches!(protocol, 1 | 58) {
                payload[0] = if v6 { 128 } else { 8 };
            }
            let bytes = if v6 {
                ip(&format!("fd7a:115c:a1e0::{source}"), ME6, protocol, &payload)
            } else {
                ip(&format!("100.64.0.{source}"), ME4, protocol, &payload)
            };
            let packet = Parsed::parse(&bytes).unwrap();
            let expected = match reference(&rules, &packet) {
                Some(rule) => Verdict::Accept(Pass::Rule(rule)),
                None => Verdict::Drop(DropReason::NoRule),
            };
            prop_assert_eq!(state.check_in(&packet, |_| false), expected, "{:?}", packet);
        }
    }

    #[test]
    fn fuzz_any_bytes_get_a_verdict(packets in proptest::collection::vec(
        proptest::collection::vec(any::<u8>(), 0..80), 0..20)) {
        let mut state = with(&[rule(&["*"], &[("*", 0, 65535)])]);
        for mut bytes in packets {
            if let Some(first) = bytes.first_mut() {
                *first = if *first & 0x80 == 0 { 0x45 } else { 0x60 };
            }
            if let Ok(packet) = Parsed::parse(&bytes) {
                state.note_out(&packet);
                let _ = state.check_in(&packet, |_| true);
            }
        }
    }
}

fn own() -> Vec<IpNet> {
    [format!("{ME4}/32"), format!("{ME6}/128")].iter().map(|n| n.parse().unwrap()).collect()
}

fn rule(sources: &[&str], destinations: &[(&str, u16, u16)]) -> FilterRule {
    FilterRule {
        src_ips: sources.iter().map(|&s| s.into()).collect(),
        dst_ports: destinations
            .iter()
            .map(|&(ip, first, last)| NetPortRange { ip: ip.into(), ports: PortRange { first, last } })
            .collect(),
        ..FilterRule::default()
    }
}

fn with(rules: &[FilterRule]) -> FilterState {
    FilterState::new(Filter::compile(Some(rules), &own()))
}

fn judged(state: &mut FilterState, packet: &[u8]) -> Verdict {
    state.check_in(&Parsed::parse(packet).unwrap(), |_| false)
}

fn sent(state: &mut FilterState, packet: &[u8]) {
    state.note_out(&Parsed::parse(packet).unwrap());
}

fn syn(state: &mut FilterState, src: &str, dst: &str, port: u16) -> Verdict {
    judged(state, &ip(src, dst, protocol::TCP, &ports(40000, port, SYN)))
}
