//! What a change of the netmap costs in tailnets of 100, 1,000 and 10,000 peers: time and allocations.

#[path = "../tests/tailnet/mod.rs"]
mod tailnet;

use std::hint::black_box;
use std::time::Instant;

use divan::{AllocProfiler, Bencher};
use podtether_core::snapshot::Snapshot;
use tailnet::{DELTAS, apply, engine};

#[global_allocator]
static ALLOCATIONS: AllocProfiler = AllocProfiler::system();

const SIZES: [u32; 3] = [100, 1_000, 10_000];

fn main() {
    divan::main();
}

fn kinds() -> impl Iterator<Item = (&'static str, u32)> {
    DELTAS.iter().flat_map(|(name, _)| SIZES.map(|peers| (*name, peers)))
}

#[divan::bench(args = kinds().map(|(name, peers)| format!("{name}, {peers} peers")).collect::<Vec<_>>())]
fn delta(bencher: Bencher<'_, '_>, case: &str) {
    let (name, peers) = kinds().find(|(name, peers)| format!("{name}, {peers} peers") == case).expect("one");
    let make = DELTAS.iter().find(|(other, _)| *other == name).expect("a kind").1;
    let now = Instant::now();
    let mut engine = engine(peers, now);
    let mut turn = 0;
    bencher
        .with_inputs(|| {
            turn += 1;
            make(turn)
        })
        .bench_local_values(|message| apply(&mut engine, message, now));
}

/// All of it; an engine writes it in portions.
#[divan::bench(args = SIZES)]
fn snapshot_write(bencher: Bencher<'_, '_>, peers: u32) {
    let now = Instant::now();
    let engine = engine(peers, now);
    bencher.bench_local(|| engine.snapshot(now));
}

#[divan::bench(args = SIZES)]
fn snapshot_read(bencher: Bencher<'_, '_>, peers: u32) {
    let now = Instant::now();
    let bytes = engine(peers, now).snapshot(now);
    bencher.bench_local(|| black_box(Snapshot::from_bytes(&bytes).expect("our own")));
}
