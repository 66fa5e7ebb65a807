//! What must hold between nodes, whatever the network does.

mod sim;

use sim::{Nat, World, ms, secs};

fn two(seed: u64, a: Nat, b: Nat) -> World {
    let mut world = World::new(seed);
    world.add(a);
    world.add(b);
    world.boot(0, false);
    world.boot(1, false);
    world.run_for(secs(3));
    world
}

#[test]
fn two_nodes_talk_and_find_the_direct_path() {
    let mut world = two(1, Nat::None, Nat::None);
    let mut next = 0;
    let sent = world.chat(0, 1, ms(20), secs(2), &mut next);
    world.run_for(secs(1));
    assert!(world.direct(0, 1) && world.direct(1, 0), "{:?} {:?}", world.path(0, 1), world.path(1, 0));
    for (from, to) in [(0, 1), (1, 0)] {
        let got = world.got(from, to);
        assert!(
            sent.clone().all(|seq| got.contains(&seq)),
            "{from} to {to}: {} of {sent:?}: {:?} {:?}",
            got.len(),
            world.drops(0),
            world.drops(1)
        );
    }
}
