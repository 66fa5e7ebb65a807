//! Random faults, seed by seed.

use std::time::Duration;

use crate::sim;

/// How many random schedules are played.
fn schedules() -> u64 {
    std::env::var("SIM_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(200)
}

/// `SIM_FIRST=4711 SIM_SEEDS=1` plays one schedule again.
#[test]
fn no_path_is_stuck_while_there_is_a_way() {
    let first: u64 = std::env::var("SIM_FIRST").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let started = std::time::Instant::now();
    let next = std::sync::atomic::AtomicU64::new(first);
    let end = first + schedules();
    let worst = std::sync::Mutex::new((Duration::ZERO, 0));
    let failures = std::sync::Mutex::new(Vec::new());
    let totals = std::sync::Mutex::new(sim::faults::Outcome::default());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if seed >= end || failures.lock().expect("sound").len() >= 5 {
                        return;
                    }
                    let played = std::panic::catch_unwind(|| sim::faults::Run::new(seed).play(8));
                    let Ok(outcome) = played else {
                        failures.lock().expect("sound").push(seed);
                        continue;
                    };
                    let mut worst = worst.lock().expect("sound");
                    *worst = (*worst).max((outcome.stuck, seed));
                    drop(worst);
                    let mut totals = totals.lock().expect("sound");
                    totals.arrived += outcome.arrived;
                    totals.direct += outcome.direct;
                    totals.relayed += outcome.relayed;
                }
            });
        }
    });
    let (worst, seed) = *worst.lock().expect("sound");
    let totals = totals.lock().expect("sound");
    println!(
        "{} schedules from SIM_FIRST={first} in {:?}: longest silence {worst:?} (seed {seed}), {totals:?}",
        end - first,
        started.elapsed()
    );
    let failures = failures.lock().expect("sound");
    assert!(failures.is_empty(), "stuck, or worse, with seeds {failures:?} (SIM_FIRST={first})");
}
