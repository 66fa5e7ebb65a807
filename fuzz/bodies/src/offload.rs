//! What a TUN hands over and takes: packets to be cut, and packets to be put together.

use podtether_core::batch::Batch;
use podtether_core::offload::{Coalescer, Gso, Segments, VNET_HEADER_LEN, VnetHeader};

/// Each piece is a packet behind a header; one whose header makes no sense goes on without it. All that come
/// of them are put together and cut again, and are what they were.
pub fn offload(data: &[u8]) {
    let mut batch = Batch::new();
    for piece in super::pieces(data) {
        let Some((header, packet)) = piece.split_first_chunk::<VNET_HEADER_LEN>() else { continue };
        let mut packet = packet.to_vec();
        let before = packet.len();
        let cut = VnetHeader::read(header).map(|header| {
            assert_eq!(VnetHeader::read(&header.to_bytes()), Ok(header));
            cut(&header, &mut packet, |segment| {
                assert!(segment.len() <= before, "no segment is longer than the whole");
                batch.push((), segment);
            })
        });
        if cut != Ok(true) {
            batch.push((), &packet);
        }
    }
    for udp in [false, true] {
        let mut batch = copy(&batch);
        let mut came: Vec<_> = batch.iter().map(|(_, packet)| comparable(packet)).collect();
        let mut coalescer = Coalescer::new();
        coalescer.group(&mut batch, udp);
        let mut again = Vec::new();
        for write in coalescer.writes(&batch) {
            let count = write.pieces.len();
            let mut whole = write.pieces.collect::<Vec<_>>().concat();
            if count == 1 {
                assert_eq!(write.header, VnetHeader::PLAIN);
                again.push(comparable(&whole));
                continue;
            }
            assert!(whole.len() <= 65_535 && write.header.needs_csum);
            assert!(udp || write.header.gso != Gso::Udp);
            let sound = cut(&write.header, &mut whole, |segment| again.push(comparable(segment)));
            assert!(sound, "what was put together can be cut");
        }
        came.sort_unstable();
        again.sort_unstable();
        assert_eq!(came, again);
    }
}

fn cut(header: &VnetHeader, packet: &mut [u8], mut each: impl FnMut(&[u8])) -> bool {
    let Ok(mut segments) = Segments::new(header, packet) else { return false };
    let longest = segments.longest();
    while let Some(segment) = segments.next() {
        assert!(segment.len() <= longest);
        each(segment);
    }
    assert_eq!(segments.remaining(), 0);
    true
}

fn copy(batch: &Batch<()>) -> Batch<()> {
    let mut other = Batch::new();
    for (_, packet) in batch.iter() {
        other.push((), packet);
    }
    other
}

/// Without the identification of a packet that may not be fragmented, which means nothing (RFC 6864), and the
/// checksum over it.
fn comparable(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet.len() >= 20 && packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}
