//! What a change of paths may cost.

use std::ops::Range;

use podtether_core::batch::RegionId;

use crate::sim::{Nat, Rng, World, ms, secs};
use crate::{lost, seeds};

/// A path dies under a ping every 20 ms, and comes back.
fn change_paths(seed: u64, nats: [Nat; 2], cut: &[(usize, usize)], latency: u64) {
    let mut world = World::new(seed);
    world.latency = ms(latency);
    world.jitter = ms(1);
    // Two homes: the relay of the peer's must be warm.
    world.derp_regions = vec![1, 2];
    for nat in nats {
        let n = world.add(nat);
        world.detours.insert(RegionId(1), ms(u64::try_from(n).expect("few") * 100));
        world.boot(n, false);
        world.run_for(secs(5));
    }
    let homes = [0, 1].map(|n| world.engine(n).status().home_derp);
    assert_eq!(homes, [RegionId(1), RegionId(2)]);
    let mut next = 0;
    let what = format!("seed {seed}, {nats:?}, {cut:?} cut, {latency} ms");
    world.chat(0, 1, ms(20), ms(4000 + Rng(seed).below(4000)), &mut next);
    assert!(world.direct(0, 1) && world.direct(1, 0), "{what}");
    let check = |world: &World, sent: &Range<u64>, step: &str| {
        for (from, to) in [(0, 1), (1, 0)] {
            let lost = lost(world, from, to, sent).len();
            assert!(lost <= 10, "{what}: {step}: {from} to {to} lost {lost} of 1000");
        }
    };
    world.blocked_pairs.extend(cut);
    let sent = world.chat(0, 1, ms(20), secs(20), &mut next);
    world.run_for(secs(1));
    check(&world, &sent, "downgrade");
    world.blocked_pairs.clear();
    let sent = world.chat(0, 1, ms(20), secs(20), &mut next);
    world.run_for(secs(1));
    check(&world, &sent, "upgrade");
    assert!(world.direct(0, 1) && world.direct(1, 0), "{what}: direct again");
}

#[test]
fn path_changes_lose_at_most_one_ping_in_a_hundred() {
    for seed in seeds(8) {
        for cut in [&[(0, 1), (1, 0)][..], &[(0, 1)], &[(1, 0)]] {
            for (nats, latency) in [
                ([Nat::None, Nat::None], 2),
                ([Nat::PortRestricted, Nat::None], 10),
                ([Nat::PortRestricted, Nat::PortRestricted], 20),
            ] {
                change_paths(seed, nats, cut, latency);
            }
        }
    }
}

#[test]
fn a_silent_relay_connection_is_found_by_pings_within_ten_seconds() {
    for seed in seeds(20) {
        let mut world = World::new(seed);
        for n in 0..2 {
            world.add(Nat::None);
            world.udp_blocked.insert(n);
            world.boot(n, false);
        }
        world.run_for(secs(10));
        let mut next = 0;
        world.chat(0, 1, ms(50), secs(2), &mut next);
        // The receiver sends nothing: only its pings can tell.
        world.run_for(ms(Rng(seed).below(30_000)));
        world.silence_derp(1);
        let cut = world.now;
        let mut seq = next;
        while !world.got(0, 1).contains(&seq) {
            assert!(world.now - cut < secs(10), "seed {seed}");
            seq += 1;
            world.send(0, 1, seq);
            world.run_for(ms(100));
        }
    }
}

/// A stock node that restarts has a new disco key and no sessions, and does not say so to who sends to it.
#[test]
fn a_new_disco_key_brings_a_new_session_before_answers_are_missed() {
    for seed in seeds(10) {
        let mut world = World::new(seed);
        for nat in [Nat::PortRestricted, Nat::None] {
            world.add(nat);
        }
        world.nodes[1].stock = true;
        world.boot(0, false);
        world.boot(1, false);
        world.run_for(secs(5));
        let mut next = 0;
        world.chat(0, 1, ms(50), secs(6), &mut next);
        world.kill(1);
        world.run_for(ms(300));
        world.boot(1, false);
        let back = world.now;
        while !world.got(0, 1).contains(&next) {
            assert!(world.now - back < secs(2), "seed {seed}: {:?}", world.now - back);
            next += 1;
            world.send(0, 1, next);
            world.run_for(ms(50));
        }
    }
}
