//! A process that stands still, is killed for it, and whose successor reads what waited meanwhile.

use super::*;

/// One ping to a pod every 5 ms, answered by it.
struct Pings {
    next: u64,
    answered: usize,
    replies: usize,
}

impl Pings {
    /// From node 1 to node 0; the longest time without a reply from `since` on.
    fn run(&mut self, world: &mut World, time: Duration, every: Duration) -> Duration {
        let end = world.now + time;
        let (mut last, mut worst) = (world.now, Duration::ZERO);
        while world.now < end {
            world.send(1, 0, self.next);
            self.next += 1;
            world.run_for(every);
            let asked: Vec<u64> = world.nodes[0].received[self.answered..].iter().map(|r| r.1).collect();
            self.answered += asked.len();
            for seq in asked {
                world.send(0, 1, seq);
            }
            if world.nodes[1].received.len() > self.replies {
                self.replies = world.nodes[1].received.len();
                last = world.now;
            }
            worst = worst.max(world.now - last);
        }
        worst
    }
}

#[test]
fn who_follows_an_engine_that_hung_is_back_in_milliseconds() {
    let mut worst = Duration::ZERO;
    for seed in seeds(30) {
        let nats =
            [[Nat::None, Nat::None], [Nat::None, Nat::PortRestricted], [Nat::Symmetric, Nat::Symmetric]];
        let mut world = world(seed, &nats[usize::try_from(seed % 3).expect("small")]);
        let mut pings = Pings { next: 0, answered: 0, replies: 0 };
        // Two thirds hang while their sessions are due to be renewed.
        let mut rng = Rng(seed);
        let warm_up = if rng.chance(333) { 3000 + rng.below(9000) } else { 114_000 + rng.below(8000) };
        pings.run(&mut world, ms(warm_up), ms(500));
        world.freeze(0);
        let hang = 5000 + rng.below(400);
        pings.run(&mut world, ms(hang), ms(5));
        let relayed = !world.direct(1, 0);
        world.replace_frozen(0, rng.chance(500));
        let gap = pings.run(&mut world, secs(7), ms(5));
        // A connection to the relay and a handshake through it, or a handshake alone.
        let bar = if relayed { ms(250) } else { ms(100) };
        assert!(
            gap <= bar,
            "seed {seed}, {warm_up} ms after the start and {hang} ms long: silent for {gap:?}"
        );
        assert!(world.shields.is_empty(), "seed {seed}: what waited was taken for a flood");
        worst = worst.max(gap);
    }
    println!("worst silence after a process that hung was replaced: {worst:?}");
}
