use podtether_core::batch::Batch;
use podtether_core::offload::{Coalescer, Segments, VnetHeader};

use crate::counting::ALLOCATIONS;
use crate::naive::{Spec, plain};

#[test]
fn cutting_and_putting_together_allocates_nothing_when_warm() {
    let (header, whole) = plain(false, true, 60_000).unfinished(1228);
    let mut buffer = whole.clone();
    let odd: Vec<_> = plain(true, false, 2000).pieces(300).iter().map(Spec::packet).collect();
    let mut coalescer = Coalescer::new();
    let mut batch = Batch::new();
    let (mut after_warm_up, mut super_packets) = (0, 0);
    for round in 0..100 {
        if round == 10 {
            after_warm_up = ALLOCATIONS.get();
        }
        buffer.copy_from_slice(&whole);
        batch.clear();
        let mut segments = Segments::new(&header, &mut buffer).expect("a sound packet");
        while let Some(segment) = segments.next() {
            assert!(batch.push((), segment));
        }
        for packet in &odd {
            assert!(batch.push((), packet));
        }
        coalescer.group(&mut batch, round % 2 == 0);
        for write in coalescer.writes(&batch) {
            super_packets += usize::from(write.header != VnetHeader::PLAIN);
            assert!(write.pieces.map(<[u8]>::len).sum::<usize>() <= 65_535);
        }
    }
    let allocations = ALLOCATIONS.get() - after_warm_up;
    assert_eq!(super_packets, 100 + 50);
    assert_eq!(allocations, 0);
}
