use std::collections::BTreeMap;

use podtether_core::batch::Batch;
use podtether_core::offload::coalesce::MAX_PIECES;
use podtether_core::offload::{Coalescer, Gso, VnetHeader};
use proptest::prelude::*;

use crate::naive::{CWR, FIN, PSH, Spec, plain, timestamps};
use crate::segment::cut;

/// Header, how many packets went in, and the whole of each write.
type Writes = Vec<(VnetHeader, usize, Vec<u8>)>;

fn writes(packets: &[Vec<u8>], udp: bool) -> Writes {
    let mut coalescer = Coalescer::new();
    let mut batch = Batch::new();
    // The second time, it has memory of the first.
    for packets in [&packets[..packets.len() / 2], packets] {
        batch.clear();
        for packet in packets {
            assert!(batch.push((), packet));
        }
        coalescer.group(&mut batch, udp);
    }
    let writes = coalescer.writes(&batch);
    writes.map(|w| (w.header, w.pieces.len(), w.pieces.collect::<Vec<_>>().concat())).collect()
}

fn counts(packets: &[Spec]) -> Vec<usize> {
    let packets: Vec<_> = packets.iter().map(Spec::packet).collect();
    writes(&packets, true).iter().map(|(_, count, _)| *count).collect()
}

fn kinds() -> impl Iterator<Item = (bool, bool)> {
    [(false, false), (false, true), (true, false), (true, true)].into_iter()
}

#[test]
fn a_stream_goes_in_one_write_of_the_kernels_own_shape() {
    for (v6, tcp) in kinds() {
        let mut spec = plain(v6, tcp, 5000);
        if let Some(tcp) = &mut spec.tcp {
            tcp.flags |= PSH;
        }
        let packets: Vec<_> = spec.pieces(1200).iter().map(Spec::packet).collect();
        let [(header, 5, bytes)] = &writes(&packets, true)[..] else { panic!("one write of all") };
        assert_eq!((*header, bytes.clone()), spec.unfinished(1200));
    }
}

#[test]
fn a_write_is_bounded_in_pieces_and_bytes() {
    for (v6, tcp) in kinds() {
        let spec = plain(v6, tcp, 60_000);
        let lengths = |size| counts(&spec.pieces(size));
        assert_eq!(lengths(100)[..2], [MAX_PIECES, MAX_PIECES]);
        let big: Vec<_> = (0..3)
            .flat_map(|n| {
                let mut spec = plain(v6, tcp, 28_000);
                spec.id = spec.id.wrapping_add(n * 2);
                if let Some(tcp) = &mut spec.tcp {
                    tcp.sequence = tcp.sequence.wrapping_add(u32::from(n) * 28_000);
                }
                spec.pieces(14_000)
            })
            .collect();
        assert_eq!(counts(&big), [4, 2]);
    }
}

/// A name and what it does to the second of two packets (`false`) or to both.
type Change = (&'static str, bool, fn(&mut Spec));

#[test]
fn what_differs_stays_apart() {
    let of_ip: &[Change] = &[
        ("another source", false, |s| s.source = 9),
        ("another port", false, |s| s.ports[0] = 1),
        ("another port there", false, |s| s.ports[1] = 1),
        ("other class", false, |s| s.class = 4),
        ("congestion met", false, |s| s.class = 3),
        ("other TTL", false, |s| s.ttl = 63),
        ("longer than the first", false, |s| s.payload.push(0)),
        ("nothing in it", false, |s| s.payload.clear()),
        ("nothing in both", true, |s| s.payload.clear()),
    ];
    let of_v4: &[Change] = &[
        ("a gap in the identification", false, |s| s.id = s.id.wrapping_add(1)),
        ("the same identification", false, |s| s.id = s.id.wrapping_sub(1)),
        ("may not be fragmented", false, |s| s.fragment = 0x4000),
        ("a reserved bit", true, |s| s.fragment = 0x8000),
        ("a first fragment", true, |s| s.fragment = 0x2000),
        ("a later fragment", true, |s| s.fragment = 100),
        ("options", true, |s| s.ip_options = vec![1; 4]),
    ];
    let of_v6: &[Change] = &[("another flow label", false, |s| s.flow_label = 1)];
    let of_tcp: &[Change] = &[
        ("a gap", false, |s| s.tcp.as_mut().unwrap().sequence += 1),
        ("the same again", false, |s| s.tcp.as_mut().unwrap().sequence -= 100),
        ("other acknowledgement", false, |s| s.tcp.as_mut().unwrap().ack += 1),
        ("other window", false, |s| s.tcp.as_mut().unwrap().window += 1),
        ("other urgent pointer", false, |s| s.tcp.as_mut().unwrap().urgent += 1),
        ("other time", false, |s| s.tcp.as_mut().unwrap().options = timestamps(1001)),
        ("fewer options", false, |s| s.tcp.as_mut().unwrap().options.truncate(8)),
        ("no acknowledgement", true, |s| s.tcp.as_mut().unwrap().flags = 0),
        ("only PSH", true, |s| s.tcp.as_mut().unwrap().flags = PSH),
        ("PSH on both", true, |s| s.tcp.as_mut().unwrap().flags |= PSH),
        ("FIN", false, |s| s.tcp.as_mut().unwrap().flags |= FIN),
        ("SYN", true, |s| s.tcp.as_mut().unwrap().flags |= 2),
        ("RST", true, |s| s.tcp.as_mut().unwrap().flags |= 4),
        ("URG", true, |s| s.tcp.as_mut().unwrap().flags |= 0x20),
        ("ECE", true, |s| s.tcp.as_mut().unwrap().flags |= 0x40),
        ("CWR", true, |s| s.tcp.as_mut().unwrap().flags |= CWR),
        ("a reserved bit of TCP", true, |s| s.tcp.as_mut().unwrap().reserved = 1),
    ];
    for (v6, tcp) in kinds() {
        let pair = plain(v6, tcp, 200).pieces(100);
        assert_eq!(counts(&pair), [2], "v6 {v6} tcp {tcp}");
        let own = [if v6 { of_v6 } else { of_v4 }, if tcp { of_tcp } else { &[] }];
        for (name, both, change) in of_ip.iter().chain(own.into_iter().flatten()) {
            let mut pair = pair.clone();
            pair.iter_mut().skip(usize::from(!both)).for_each(change);
            assert_eq!(counts(&pair), [1, 1], "v6 {v6} tcp {tcp}: {name}");
            // They are as they came.
            let packets: Vec<_> = pair.iter().map(Spec::packet).collect();
            for (write, packet) in writes(&packets, true).iter().zip(&packets) {
                assert_eq!((&write.0, &write.2), (&VnetHeader::PLAIN, packet), "{name}");
            }
        }
    }
}

#[test]
fn without_the_kernels_help_datagrams_go_one_by_one() {
    let packets: Vec<_> = plain(false, false, 300).pieces(100).iter().map(Spec::packet).collect();
    assert_eq!(writes(&packets, true).len(), 1);
    let single = writes(&packets, false);
    assert_eq!(single.iter().map(|w| (w.0, &w.2)).collect::<Vec<_>>(), {
        packets.iter().map(|p| (VnetHeader::PLAIN, p)).collect::<Vec<_>>()
    });
    let packets: Vec<_> = plain(false, true, 300).pieces(100).iter().map(Spec::packet).collect();
    assert_eq!(writes(&packets, false).len(), 1, "TCP does");
}

#[test]
fn packets_that_may_not_be_fragmented_need_no_identification() {
    let mut pair = plain(false, true, 200).pieces(100);
    for packet in &mut pair {
        packet.fragment = 0x4000;
        packet.id = 0;
    }
    assert_eq!(counts(&pair), [2]);
}

#[test]
fn a_group_ends_with_a_short_packet_and_with_a_push() {
    for (v6, tcp) in kinds() {
        // 100, 100, 50, then the rest of the stream.
        let mut spec = plain(v6, tcp, 650);
        let mut pieces = spec.pieces(50);
        pieces = vec![
            Spec { payload: spec.payload[..100].to_vec(), ..pieces[0].clone() },
            Spec { payload: spec.payload[100..200].to_vec(), id: pieces[1].id, ..pieces[2].clone() },
            Spec { payload: spec.payload[200..250].to_vec(), id: pieces[2].id, ..pieces[4].clone() },
            Spec { payload: spec.payload[250..300].to_vec(), id: pieces[3].id, ..pieces[5].clone() },
            Spec { payload: spec.payload[300..350].to_vec(), id: pieces[4].id, ..pieces[6].clone() },
        ];
        assert_eq!(counts(&pieces), [3, 2], "v6 {v6} tcp {tcp}");
        if let Some(tcp) = &mut spec.tcp {
            tcp.flags |= PSH;
            let pushed: Vec<_> = [spec.clone(), spec.clone()].iter().flat_map(|s| s.pieces(100)).collect();
            assert_eq!(counts(&pushed), [7, 7]);
            let mut all = spec.pieces(50);
            all[3].tcp.as_mut().unwrap().flags |= PSH;
            assert_eq!(counts(&all), [4, 9]);
        }
    }
}

#[test]
fn a_wrong_checksum_goes_alone_and_untouched() {
    for (v6, tcp) in kinds() {
        let pieces = plain(v6, tcp, 500).pieces(100);
        let (ip, whole) = (pieces[0].ip_header(), pieces[0].headers() + 100);
        let spots = [whole - 1, ip + if tcp { 17 } else { 7 }, whole / 2 + 20];
        let spots = spots.into_iter().chain((!v6).then_some(11));
        for spot in spots {
            for (wrong, expected) in
                [(0, &[1, 4][..]), (1, &[1, 1, 3]), (2, &[2, 1, 2]), (3, &[3, 1, 1]), (4, &[4, 1])]
            {
                let mut packets: Vec<_> = pieces.iter().map(Spec::packet).collect();
                packets[wrong][spot] ^= 0x10;
                let writes = writes(&packets, true);
                let counts: Vec<_> = writes.iter().map(|(_, count, _)| *count).collect();
                assert_eq!(counts, expected, "v6 {v6} tcp {tcp} byte {spot} of packet {wrong}");
                let alone = writes.iter().find(|(_, _, bytes)| *bytes == packets[wrong]);
                assert!(alone.is_some_and(|(header, ..)| *header == VnetHeader::PLAIN));
            }
        }
    }
}

#[test]
fn datagrams_without_a_checksum_go_alone() {
    let mut packets: Vec<_> = plain(false, false, 300).pieces(100).iter().map(Spec::packet).collect();
    for packet in &mut packets {
        packet[26..28].fill(0);
    }
    assert_eq!(writes(&packets, true).len(), 3);
}

#[test]
fn a_packet_that_goes_alone_is_not_overtaken_within_its_flow() {
    let stream = plain(false, true, 400).pieces(100);
    let mut ack = stream[2].clone();
    ack.payload.clear();
    ack.tcp.as_mut().unwrap().ack += 1;
    let mut other = plain(true, true, 200).pieces(100);
    let mut datagram = plain(false, false, 10);
    let mut packets = vec![stream[0].clone(), other.remove(0), stream[1].clone(), ack.clone()];
    packets.extend([stream[2].clone(), other.remove(0), stream[3].clone(), datagram.clone()]);
    assert_eq!(counts(&packets), [2, 2, 1, 2, 1]);
    // A fragment could be of any flow, so it parts them all.
    datagram.fragment = 0x2000;
    packets[3] = datagram;
    assert_eq!(counts(&packets), [2, 1, 1, 2, 1, 1]);
    // A ping is of none.
    let mut ping = ack.packet();
    ping[9] = 1;
    let packets: Vec<_> = [stream[0].packet(), ping, stream[1].packet()].into();
    assert_eq!(writes(&packets, true).len(), 2);
}

#[test]
fn many_flows_at_once_are_told_apart() {
    let packets: Vec<_> = (0..8)
        .flat_map(|n| (0..30).map(move |flow| (n, flow)))
        .map(|(n, flow)| {
            let mut spec = plain(flow % 2 == 0, true, 800);
            spec.ports[0] = 30_000 + flow;
            spec.pieces(100)[n].clone()
        })
        .collect();
    let counts = counts(&packets);
    assert_eq!(counts.iter().sum::<usize>(), 240);
    // Two flows that fall on one place end each other's groups, so not all 30 go whole.
    assert!(counts.iter().filter(|count| **count == 8).count() >= 10, "{counts:?}");
}

/// The next packet of one of several flows, and what is odd about it.
#[derive(Debug, Clone)]
struct Turn {
    flow: u8,
    oddity: u8,
    bytes: usize,
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let bytes = prop_oneof![6 => Just(100usize), 1 => 0..200usize];
    // A run of one flow, then perhaps another.
    let turn = (0..8u8, prop_oneof![8 => Just(0u8), 3 => any::<u8>()], bytes, 1..6usize);
    proptest::collection::vec(turn, 1..40).prop_map(|runs| {
        let each = |(flow, oddity, bytes, times)| {
            let first = Turn { flow, oddity, bytes };
            let rest = Turn { oddity: 0, ..first.clone() };
            [first].into_iter().chain(std::iter::repeat_n(rest, times))
        };
        runs.into_iter().flat_map(each).collect()
    })
}

/// Packets of eight flows, in order; each has its own content, by which they can be told apart.
fn traffic(turns: &[Turn]) -> Vec<Vec<u8>> {
    let mut flows: Vec<Spec> = (0..8u8)
        .map(|n| {
            let mut spec = plain(n & 1 != 0, n & 2 != 0, 0);
            spec.ports[0] = 1000 + u16::from(n / 4);
            spec.fragment = if n & 4 != 0 { 0x4000 } else { 0 };
            spec
        })
        .collect();
    let mut packets = Vec::new();
    for (serial, turn) in turns.iter().enumerate() {
        let flow = &mut flows[usize::from(turn.flow)];
        let mut spec = flow.clone();
        spec.payload = serial.to_be_bytes().repeat(26)[..turn.bytes].to_vec();
        flow.id = flow.id.wrapping_add(1);
        if let Some(tcp) = &mut flow.tcp {
            tcp.sequence = tcp.sequence.wrapping_add(u32::try_from(turn.bytes).unwrap());
        }
        let mut spoil = None;
        match turn.oddity {
            1 => spec.ttl = 1,
            2 => spec.class = 3,
            3 => spec.id = 5,
            4 => spec.fragment |= 0x2000,
            5 => spec.flow_label = 5,
            6 => spec.ip_options = if spec.v6 { Vec::new() } else { vec![1; 4] },
            7 => spoil = Some(10),
            8 => spoil = Some(spec.ip_header() + 4),
            9 => spoil = Some(spec.ip_header() + 17),
            10 => spoil = Some(spec.headers() + turn.bytes / 2),
            11 => spoil = Some(6),
            _ => {
                if let Some(tcp) = &mut spec.tcp {
                    match turn.oddity {
                        20..60 => tcp.flags |= PSH,
                        60..80 => tcp.flags = turn.oddity,
                        80..100 => flow.tcp.as_mut().unwrap().options = timestamps(turn.oddity.into()),
                        100..110 => tcp.window += 1,
                        110..120 => flow.tcp.as_mut().unwrap().ack += 1,
                        120..130 => tcp.sequence = tcp.sequence.wrapping_add(1),
                        130..140 => tcp.urgent = 1,
                        140..150 => tcp.reserved = 1,
                        _ => {}
                    }
                }
            }
        }
        let mut packet = spec.packet();
        if let Some(byte) = spoil.and_then(|at| packet.get_mut(at)) {
            *byte ^= 1;
        }
        packets.push(packet);
    }
    packets
}

/// Addresses, protocol and ports: those of a fragment are its first four bytes, which is as good here.
fn flow(packet: &[u8]) -> Option<Vec<u8>> {
    let (protocol, addresses, transport) = match packet.first()? >> 4 {
        4 => (*packet.get(9)?, packet.get(12..20)?, usize::from(packet[0] & 15) * 4),
        _ => (*packet.get(6)?, packet.get(8..40)?, 40),
    };
    Some([addresses, &[protocol], packet.get(transport..transport + 4)?].concat())
}

/// As it was, as far as a packet's identification means anything (RFC 6864: not where it may not be fragmented).
fn without_id(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet.len() >= 20 && packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

fn by_flow(packets: &[Vec<u8>]) -> BTreeMap<Option<Vec<u8>>, Vec<Vec<u8>>> {
    let mut flows = BTreeMap::<_, Vec<_>>::new();
    for packet in packets {
        flows.entry(flow(packet)).or_default().push(without_id(packet));
    }
    flows
}

/// Whatever comes, the writes hold exactly it.
fn check(packets: &[Vec<u8>], udp: bool) -> Writes {
    let writes = writes(packets, udp);
    let mut again = Vec::new();
    for (header, count, bytes) in &writes {
        assert!(bytes.len() <= 65_535 && (1..=MAX_PIECES).contains(count));
        let segments = if *count == 1 { vec![bytes.clone()] } else { cut(header, bytes).unwrap() };
        assert_eq!(segments.len(), *count);
        assert!((header.gso == Gso::None) == (*count == 1) && (udp || header.gso != Gso::Udp));
        again.extend(segments);
    }
    assert_eq!(again.len(), packets.len());
    assert_eq!(by_flow(&again), by_flow(packets));
    writes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn cut_again_the_writes_are_what_came(turns in turns(), udp in any::<bool>()) {
        check(&traffic(&turns), udp);
    }

    #[test]
    fn any_bytes_are_survived_and_handed_on(
        packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..100), 0..20),
    ) {
        let writes = check(&packets, true);
        prop_assert_eq!(writes.into_iter().map(|w| w.2).collect::<Vec<_>>(), packets);
    }

    #[test]
    fn spoilt_packets_are_survived_and_handed_on(
        turns in turns(), spoilt in proptest::collection::vec((any::<u16>(), 0..60usize, any::<u8>()), 1..20),
    ) {
        let mut packets = traffic(&turns);
        let count = packets.len();
        for (which, at, value) in spoilt {
            if let Some(byte) = packets[usize::from(which) % count].get_mut(at) {
                *byte = value;
            }
        }
        check(&packets, true);
    }
}
