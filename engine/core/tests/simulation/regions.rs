//! Which of several regions is home, and how peers keep up with it.

use podtether_core::batch::RegionId;
use podtether_core::engine::PathView;

use crate::assert_all_arrived;
use crate::sim::{Nat, World, ms, secs};

fn homes(world: &mut World) -> Vec<u32> {
    (0..world.nodes.len()).map(|n| world.engine(n).status().home_derp.0).collect()
}

/// Two nodes that only relays connect, with these regions.
fn relayed(seed: u64, regions: &[u32]) -> World {
    let mut world = World::new(seed);
    world.derp_regions = regions.to_vec();
    for n in 0..2 {
        world.add(Nat::Symmetric);
        world.boot(n, false);
    }
    world.run_for(secs(5));
    world
}

#[test]
fn a_conversation_moves_to_the_new_homes_without_loss() {
    for seed in 0..8 {
        let mut world = relayed(seed, &[1, 3]);
        assert_eq!(homes(&mut world), [1, 1], "seed {seed}");
        let mut next = 0;
        world.chat(0, 1, ms(20), secs(5), &mut next);
        for (detour, home) in [(200, 3), (0, 1)] {
            world.detours.insert(RegionId(1), ms(detour));
            // A quick round comes after 26 s at most.
            let sent = world.chat(0, 1, ms(20), secs(40), &mut next);
            world.run_for(secs(1));
            assert_all_arrived(&world, &sent, &format!("seed {seed}, on the way to {home}"));
            assert_eq!(homes(&mut world), [home; 2], "seed {seed}");
            let paths = [world.path(0, 1), world.path(1, 0)];
            assert_eq!(paths, [PathView::Relay(RegionId(home)); 2], "seed {seed}: still by the old home");
        }
    }
}

#[test]
fn a_new_home_that_the_peer_is_not_at_is_left_again() {
    let mut world = relayed(3, &[1, 3]);
    let mut next = 0;
    world.chat(0, 1, ms(20), secs(5), &mut next);
    // Node 0 is connected there, and control errs.
    let mut record = world.nodes[1].record.clone();
    record.home_derp = RegionId(3);
    let told = podtether_core::tailcfg::MapResponse { peers_changed: vec![record], ..Default::default() };
    world.tell(0, told);
    world.chat(0, 1, ms(20), secs(2), &mut next);
    let sent = world.chat(0, 1, ms(20), secs(5), &mut next);
    world.run_for(secs(1));
    assert_all_arrived(&world, &sent, "by the relay where it is heard");
}

#[test]
fn without_udp_https_tells_which_region_is_home() {
    for seed in 0..4 {
        let mut world = World::new(seed);
        world.derp_regions = vec![1, 2, 3, 4];
        // Region n is 14n + 3 ms away and two detours more: 217, 31, 145, 159.
        for (region, detour) in [(1, 100), (3, 50), (4, 50)] {
            world.detours.insert(RegionId(region), ms(detour));
        }
        for n in 0..2 {
            world.add(Nat::None);
            world.udp_blocked.insert(n);
            world.boot(n, false);
        }
        world.run_for(secs(6));
        assert_eq!(homes(&mut world), [2, 2], "seed {seed}: whatever was taken blindly");
        assert_eq!(world.engine(0).host_update().net_info.working_udp, Some(false));
        // 71 and 69: too little to move, also in the next full round.
        world.detours.insert(RegionId(2), ms(20));
        world.detours.insert(RegionId(3), ms(12));
        world.run_for(secs(310));
        assert_eq!(homes(&mut world), [2, 2], "seed {seed}: not for 2 ms");
        world.detours.insert(RegionId(2), ms(60));
        world.run_for(secs(310));
        assert_eq!(homes(&mut world), [3, 3], "seed {seed}");
        let mut next = 0;
        let sent = world.chat(0, 1, ms(50), secs(10), &mut next);
        world.run_for(secs(1));
        assert_all_arrived(&world, &sent, &format!("seed {seed}"));
        // UDP that comes back is measured instead.
        world.udp_blocked.clear();
        world.detours.insert(RegionId(3), ms(100));
        world.detours.remove(&RegionId(4));
        world.run_for(secs(310));
        assert_eq!(homes(&mut world), [4, 4], "seed {seed}");
        assert_eq!(world.engine(0).host_update().net_info.working_udp, Some(true));
    }
}

#[test]
fn a_region_that_dies_costs_seconds_and_is_home_again_when_it_returns() {
    for (seed, silent) in [(1, false), (2, true), (3, false), (4, true)] {
        let mut world = relayed(seed, &[1, 3]);
        let mut next = 0;
        world.chat(0, 1, ms(20), secs(3), &mut next);
        world.stun_down.insert(RegionId(1));
        if silent {
            world.silence_derp(0);
            world.silence_derp(1);
            world.derp_down.insert(RegionId(1));
        } else {
            world.take_region_down(RegionId(1));
        }
        let first = next;
        world.chat(0, 1, ms(20), secs(40), &mut next);
        world.run_for(secs(1));
        for to in 0..2 {
            let lost = crate::lost(&world, 1 - to, to, &(first..next));
            let gap = ms(20) * u32::try_from(lost.len()).expect("few");
            println!("seed {seed}, silent {silent}: to {to} out for {gap:?}");
            assert!(gap <= secs(15), "seed {seed}, silent {silent}: to {to} out for {gap:?}");
        }
        assert_eq!(homes(&mut world), [3, 3], "seed {seed}");
        world.stun_down.clear();
        world.bring_region_up(RegionId(1));
        let sent = world.chat(0, 1, ms(20), secs(60), &mut next);
        world.run_for(secs(1));
        assert_all_arrived(&world, &sent, &format!("seed {seed}, while it returns"));
        assert_eq!(homes(&mut world), [1, 1], "seed {seed}");
    }
}
