//! What it costs to be the network card of a TUN: checksums, a packet of 64 KiB cut, 45 packets put together.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use podtether_core::batch::Batch;
use podtether_core::offload::checksum::Sum;
use podtether_core::offload::{Coalescer, Gso, Segments, VnetHeader};

/// Payload of a full TCP segment with timestamps, over IPv4 and a link of 1280 bytes.
const SIZE: u16 = 1228;
const HEADERS: usize = 20 + 32;

fn main() {
    divan::main();
}

/// A TCP packet of `pieces` full segments, as the kernel hands it over.
fn whole(pieces: u16) -> (VnetHeader, Vec<u8>) {
    let mut packet = vec![7; HEADERS + usize::from(SIZE) * usize::from(pieces)];
    let length = u16::try_from(packet.len()).expect("64 KiB at most");
    packet[..20].copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 100, 64, 0, 1, 100, 64, 0, 2]);
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet[32..34].copy_from_slice(&[0x80, 0x10]);
    packet[40..44].copy_from_slice(&[1, 1, 8, 10]);
    let header = VnetHeader {
        needs_csum: true,
        gso: Gso::TcpV4,
        header_len: 52,
        gso_size: SIZE,
        csum_start: 20,
        csum_offset: 16,
        ..VnetHeader::PLAIN
    };
    (header, packet)
}

fn segments(pieces: u16) -> Batch<()> {
    let (header, mut packet) = whole(pieces);
    let mut batch = Batch::new();
    let mut segments = Segments::new(&header, &mut packet).expect("a sound packet");
    while let Some(segment) = segments.next() {
        batch.push((), segment);
    }
    batch
}

#[divan::bench(args = [20, 1228, 65_000])]
fn checksum(bencher: Bencher<'_, '_>, length: usize) {
    let bytes = vec![0x5a; length];
    bencher.counter(BytesCount::new(length)).bench_local(|| Sum::ZERO.bytes(black_box(&bytes)).checksum());
}

#[divan::bench(args = [1, 10, 53])]
fn segment(bencher: Bencher<'_, '_>, pieces: u16) {
    let (header, whole) = whole(pieces);
    let mut packet = whole.clone();
    bencher.counter(BytesCount::new(whole.len())).bench_local(|| {
        // The headers alone: what segments before left in the payload is as good as any.
        packet[..HEADERS].copy_from_slice(&whole[..HEADERS]);
        let mut segments = Segments::new(&header, &mut packet).expect("a sound packet");
        while let Some(segment) = segments.next() {
            black_box(segment);
        }
    });
}

/// One flow, and as many as there are packets.
#[divan::bench(args = [true, false])]
fn coalesce(bencher: Bencher<'_, '_>, one_flow: bool) {
    const PACKETS: u16 = 45;
    let mut batch = segments(PACKETS);
    if !one_flow {
        for (n, (_, packet)) in (0u16..).zip(batch.iter_mut()) {
            packet[20..22].copy_from_slice(&n.to_be_bytes());
        }
    }
    let first = batch.get(0).expect("a packet").to_vec();
    let mut coalescer = Coalescer::new();
    bencher
        .counter(BytesCount::new(usize::from(PACKETS) * (HEADERS + usize::from(SIZE))))
        .counter(ItemsCount::new(PACKETS))
        .bench_local(|| {
            // The first packet's headers are those of the whole since the round before.
            batch.get_mut(0).expect("a packet").copy_from_slice(&first);
            coalescer.group(&mut batch, true);
            for write in coalescer.writes(&batch) {
                black_box(write.header);
                for piece in write.pieces {
                    black_box(piece);
                }
            }
        });
}
