use podtether_core::offload::segment::MAX_SEGMENTS;
use podtether_core::offload::{Gso, SegmentError, Segments, VnetHeader};
use proptest::prelude::*;

use crate::naive::{ACK, CWR, FIN, PSH, Spec, any_spec, plain};

/// All segments, each taken before the next one overwrites its end.
pub(crate) fn cut(header: &VnetHeader, packet: &[u8]) -> Result<Vec<Vec<u8>>, SegmentError> {
    let mut packet = packet.to_vec();
    let mut segments = Segments::new(header, &mut packet)?;
    let (count, longest) = (segments.remaining(), segments.longest());
    let mut all = Vec::new();
    while let Some(segment) = segments.next() {
        all.push(segment.to_vec());
        assert_eq!(segments.remaining(), count - all.len());
    }
    assert!(segments.next().is_none());
    assert_eq!(all.len(), count);
    assert_eq!(all.iter().map(Vec::len).max(), Some(longest));
    Ok(all)
}

fn refused(change: impl FnOnce(&mut VnetHeader, &mut Vec<u8>)) -> SegmentError {
    let (mut header, mut packet) = plain(false, true, 3000).unfinished(1000);
    change(&mut header, &mut packet);
    cut(&header, &packet).unwrap_err()
}

#[test]
fn what_makes_no_sense_is_refused_with_its_reason() {
    assert_eq!(refused(|h, _| h.gso_size = 0), SegmentError::Size);
    assert_eq!(refused(|h, _| h.gso_size = 2), SegmentError::TooMany);
    assert_eq!(refused(|h, _| h.gso = Gso::Udp), SegmentError::Kind);
    assert_eq!(refused(|h, _| h.gso = Gso::TcpV6), SegmentError::Kind);
    assert_eq!(refused(|h, _| h.csum_start = 24), SegmentError::Checksum);
    assert_eq!(refused(|h, _| h.csum_offset = 6), SegmentError::Checksum);
    assert_eq!(refused(|h, _| (h.csum_start, h.csum_offset) = (u16::MAX, u16::MAX)), SegmentError::Checksum);
    assert_eq!(refused(|_, p| p.truncate(2000)), SegmentError::Length);
    assert_eq!(refused(|_, p| p.push(0)), SegmentError::Length);
    assert_eq!(refused(|_, p| p.clear()), SegmentError::NotIp);
    assert_eq!(refused(|_, p| p.truncate(1)), SegmentError::Length);
    assert_eq!(refused(|_, p| p[0] = 0x50), SegmentError::NotIp);
    assert_eq!(refused(|_, p| p[0] = 0x44), SegmentError::Length);
    assert_eq!(refused(|_, p| p[6] = 0x20), SegmentError::Fragment);
    assert_eq!(refused(|_, p| p[7] = 1), SegmentError::Fragment);
    assert_eq!(refused(|_, p| p[9] = 1), SegmentError::Protocol);
    assert_eq!(refused(|_, p| p[20 + 12] = 0x40), SegmentError::Length);
    let (header, mut packet) = plain(true, true, 3000).unfinished(1000);
    packet[6] = 0;
    assert_eq!(cut(&header, &packet), Err(SegmentError::Protocol), "extension headers");
    let (header, mut packet) = plain(true, false, 3000).unfinished(1000);
    packet[45] ^= 1;
    assert_eq!(cut(&header, &packet), Err(SegmentError::Length), "UDP's own length");
    let (header, packet) = plain(false, false, MAX_SEGMENTS).unfinished(1);
    assert_eq!(cut(&header, &packet).unwrap().len(), MAX_SEGMENTS);

    // One that goes whole: the place of its checksum is all that can be wrong.
    let (mut header, packet) = plain(false, true, 10).unfinished(0);
    for (start, offset) in [(0, u16::MAX), (u16::MAX, 0), (u16::MAX, u16::MAX), (20, 41), (62, 0)] {
        (header.csum_start, header.csum_offset) = (start, offset);
        assert_eq!(cut(&header, &packet), Err(SegmentError::Checksum), "{start} {offset}");
    }
    assert_eq!(packet.len(), 62);
    for bytes in [&b""[..], b"x", &packet] {
        assert_eq!(cut(&VnetHeader::PLAIN, bytes).unwrap(), [bytes], "untouched");
    }
}

#[test]
fn a_header_length_that_lies_changes_nothing() {
    let spec = plain(false, true, 3000);
    let (mut header, packet) = spec.unfinished(1000);
    let right = cut(&header, &packet).unwrap();
    for length in [0, 20, 53, 1000, u16::MAX] {
        header.header_len = length;
        assert_eq!(cut(&header, &packet).unwrap(), right);
    }
    header.needs_csum = false;
    (header.csum_start, header.csum_offset) = (9999, 9999);
    assert_eq!(cut(&header, &packet).unwrap(), right, "without NEEDS_CSUM its place says nothing");
}

#[test]
fn flags_are_where_they_belong() {
    let mut spec = plain(true, true, 2500);
    spec.tcp.as_mut().unwrap().flags = ACK | PSH | FIN | CWR;
    let (header, packet) = spec.unfinished(1000);
    let flags: Vec<_> = cut(&header, &packet).unwrap().iter().map(|p| p[40 + 13]).collect();
    assert_eq!(flags, [ACK | CWR, ACK, ACK | PSH | FIN]);
}

#[test]
fn a_udp_checksum_of_zero_is_sent_as_the_other_zero() {
    for v6 in [false, true] {
        let mut spec = plain(v6, false, 300);
        let at = spec.headers() - 2;
        spec.payload[100..102].fill(0);
        let checksum = spec.pieces(100)[1].packet()[at..at + 2].to_vec();
        spec.payload[100..102].copy_from_slice(&checksum);
        let (header, packet) = spec.unfinished(100);
        let middle = &cut(&header, &packet).unwrap()[1];
        assert_eq!(middle[at..at + 2], [0xff, 0xff]);
        assert_eq!(middle, &spec.pieces(100)[1].packet());
        let (header, packet) = spec.pieces(100)[1].unfinished(0);
        assert_eq!(&cut(&header, &packet).unwrap()[0], middle);
    }
}

fn both_ways(spec: &Spec, size: u16) {
    let (header, packet) = spec.unfinished(size);
    let expected: Vec<_> = spec.pieces(size.into()).iter().map(Spec::packet).collect();
    assert_eq!(cut(&header, &packet).unwrap(), expected, "{spec:?} by {size}");
}

#[test]
fn sixty_four_kilobytes_of_each_kind() {
    for (v6, tcp) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut spec = plain(v6, tcp, 0);
        let room = if v6 { 65_535 } else { 65_535 - spec.headers() };
        spec.payload = plain(v6, tcp, room - if v6 { spec.headers() - 40 } else { 0 }).payload;
        both_ways(&spec, 1228);
        both_ways(&spec, 65_000);
        both_ways(&spec, u16::MAX);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn segments_are_what_the_naive_way_makes(spec in any_spec(6000), size in 6..2000u16) {
        both_ways(&spec, size);
    }

    #[test]
    fn one_packet_is_completed(spec in any_spec(1500)) {
        let (header, packet) = spec.unfinished(0);
        let completed = cut(&header, &packet).unwrap().remove(0);
        let mut expected = spec.packet();
        // Any checksum of zero goes as the other zero, as the kernel does it: both hold.
        let at = usize::from(header.csum_start + header.csum_offset);
        if expected[at..at + 2] == [0, 0] {
            expected[at..at + 2].fill(0xff);
        }
        prop_assert_eq!(completed, expected);
    }

    #[test]
    fn any_header_before_any_bytes_is_survived(
        header in any::<[u8; 10]>(), kind in 0..5usize, bytes in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut header = header;
        header[0] &= 3;
        header[1] = [0, 1, 4, 5, 0x81][kind];
        let _ = cut(&VnetHeader::read(&header).unwrap(), &bytes);
    }

    #[test]
    fn a_spoilt_packet_is_survived(
        spec in any_spec(2000), size in 1..1500u16,
        spoilt in proptest::collection::vec((0..140usize, any::<u8>()), 0..4), length in 0..2200usize,
    ) {
        let (header, mut packet) = spec.unfinished(size);
        let mut fields = header.to_bytes();
        for (at, value) in spoilt {
            match at.checked_sub(8) {
                None => fields[at + 2] = value,
                Some(at) if at < packet.len() => packet[at] = value,
                Some(_) => packet.truncate(length),
            }
        }
        let _ = cut(&VnetHeader::read(&fields).unwrap(), &packet);
    }
}
