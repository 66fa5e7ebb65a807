use super::*;

struct Bench {
    agent: PathAgent,
    random: Random,
    actions: Vec<Action>,
    now: Instant,
}

fn addr(last: u8) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, last], 1000))
}

impl Bench {
    fn new(endpoints: &[SocketAddr]) -> Self {
        let mut agent = PathAgent::new(false, Patience::Short);
        agent.set_endpoints(endpoints);
        Self { agent, random: Random::new([3; 32]), actions: Vec::new(), now: Instant::now() }
    }

    fn call<R>(&mut self, call: impl FnOnce(&mut PathAgent, &mut Context<'_>) -> R) -> R {
        let mut ctx = Context {
            now: self.now,
            random: &mut self.random,
            actions: &mut self.actions,
            v4: true,
            v6: true,
        };
        call(&mut self.agent, &mut ctx)
    }

    fn send(&mut self) -> Vec<Action> {
        self.call(PathAgent::note_send);
        std::mem::take(&mut self.actions)
    }

    fn advance(&mut self) -> Vec<Action> {
        self.now = self.now.max(self.agent.deadline().expect("something is due"));
        self.call(PathAgent::handle_timeout);
        std::mem::take(&mut self.actions)
    }

    fn pong(&mut self, actions: &[Action], from: SocketAddr, after: Duration) -> bool {
        let txid = actions.iter().find_map(|a| match a {
            Action::Ping { to, txid } if *to == from => Some(*txid),
            Action::Ping { .. } | Action::CallMeMaybe => None,
        });
        self.now += after;
        self.agent.handle_pong(&txid.expect("pinged"), self.now)
    }

    fn trusting(endpoints: &[SocketAddr]) -> Self {
        let mut bench = Self::new(endpoints);
        let actions = bench.send();
        assert!(bench.pong(&actions, endpoints[0], Duration::from_millis(2)));
        bench
    }
}

fn pinged(actions: &[Action]) -> Vec<SocketAddr> {
    actions
        .iter()
        .filter_map(|a| match a {
            Action::Ping { to, .. } => Some(*to),
            Action::CallMeMaybe => None,
        })
        .collect()
}

#[test]
fn the_first_send_pings_everything_and_calls_and_goes_by_relay() {
    let mut bench = Bench::new(&[addr(1), addr(2), SocketAddr::from(([100, 64, 0, 9], 1)), addr(3)]);
    assert_eq!(bench.agent.deadline(), None, "nothing before the first send");
    let actions = bench.send();
    assert_eq!(pinged(&actions), [addr(1), addr(2), addr(3)], "a tailnet address is no candidate");
    assert_eq!(actions.last(), Some(&Action::CallMeMaybe));
    assert_eq!(bench.agent.route(bench.now), Route { udp: None, derp: true });
    bench.now += Duration::from_millis(1);
    assert_eq!(bench.send(), [], "once");
    assert!(bench.pong(&actions, addr(2), Duration::from_millis(5)));
    assert_eq!(bench.agent.route(bench.now), Route { udp: Some(addr(2)), derp: false });
    assert!(!bench.agent.handle_pong(&[9; 12], bench.now), "an id that was never sent");
}

#[test]
fn a_path_is_trusted_as_long_as_its_heartbeat_is_answered() {
    let mut bench = Bench::trusting(&[addr(1)]);
    for _ in 0..20 {
        bench.now += Duration::from_secs(1);
        bench.send();
        bench.agent.note_received(addr(1), bench.now);
        let due = bench.agent.deadline().expect("a heartbeat");
        if due <= bench.now + Duration::from_secs(1) {
            let actions = bench.advance();
            assert_eq!(pinged(&actions), [addr(1)]);
            bench.pong(&actions, addr(1), Duration::from_millis(2));
        }
        assert!(bench.agent.trusted(bench.now).is_some());
    }
    // 45 s after the last send there is quiet.
    let last = bench.now;
    while bench.agent.deadline().is_some() {
        let actions = bench.advance();
        if !actions.is_empty() {
            bench.pong(&actions, addr(1), Duration::from_millis(2));
        }
    }
    assert!((42..50).contains(&(bench.now - last).as_secs()));
    assert_eq!(bench.agent.route(bench.now + TRUST), Route { udp: Some(addr(1)), derp: true });
}

/// Sends every 20 ms and says what is heard until packets go both ways; how long that took, how many pings.
fn until_doubt(bench: &mut Bench, heard: bool) -> (Duration, usize) {
    let start = bench.now;
    let mut pings = 0;
    while !bench.agent.route(bench.now).derp {
        let until = bench.now + Duration::from_millis(20);
        while bench.agent.deadline().is_some_and(|at| at <= until) {
            pings += pinged(&bench.advance()).len();
        }
        bench.now = until;
        pings += pinged(&bench.send()).len();
        if heard {
            bench.agent.note_received(addr(1), bench.now);
        }
    }
    (bench.now - start, pings)
}

#[test]
fn silence_ends_trust_within_150_ms_and_a_pong_ends_the_doubt() {
    let mut bench = Bench::trusting(&[addr(1)]);
    let (took, pings) = until_doubt(&mut bench, false);
    assert!(took <= Duration::from_millis(160), "{took:?}");
    assert_eq!(bench.agent.route(bench.now), Route { udp: Some(addr(1)), derp: true });
    assert!((2..4).contains(&pings), "{pings}");
    // Questions go on, ever less often.
    let mut count = 0;
    let until = bench.now + Duration::from_secs(3);
    while bench.agent.deadline().is_some_and(|at| at <= until) {
        count += pinged(&bench.advance()).len();
    }
    assert!((5..10).contains(&count), "{count}");
    // Packets that come in prove nothing about our own.
    bench.agent.note_received(addr(1), bench.now);
    assert!(bench.agent.route(bench.now).derp);
    let actions = bench.advance();
    bench.pong(&actions, addr(1), Duration::from_millis(2));
    assert_eq!(bench.agent.route(bench.now), Route { udp: Some(addr(1)), derp: false });

    // Much later a dead address is given up altogether.
    until_doubt(&mut bench, false);
    bench.now += TRUST + FORGET_AFTER;
    bench.send();
    bench.advance();
    assert_eq!(bench.agent.route(bench.now), Route { udp: None, derp: true });
    assert!(bench.agent.active(bench.now));
}

#[test]
fn a_ping_of_the_peer_makes_us_ask_when_only_our_own_packets_are_lost() {
    let mut bench = Bench::trusting(&[addr(1)]);
    bench.now += Duration::from_millis(500);
    bench.call(|agent, ctx| agent.handle_ping(addr(1), ctx));
    assert_eq!(pinged(&std::mem::take(&mut bench.actions)), [addr(1)]);
    bench.now += Duration::from_millis(10);
    bench.call(|agent, ctx| agent.handle_ping(addr(1), ctx));
    assert_eq!(bench.actions, [], "asked already");
    let (took, _) = until_doubt(&mut bench, true);
    assert!(took <= Duration::from_millis(80), "{took:?}");
    // The same when its packets come by relay.
    let mut bench = Bench::trusting(&[addr(1)]);
    bench.call(PathAgent::note_relayed);
    assert_eq!(pinged(&std::mem::take(&mut bench.actions)), [addr(1)]);
    assert!(bench.agent.route(bench.now).derp, "both ways before anything is known");
}

#[test]
fn a_flow_in_one_direction_costs_three_pings_a_second_and_one_with_answers_none() {
    for (answered, most) in [(false, 40), (true, 4)] {
        let mut bench = Bench::trusting(&[addr(1)]);
        let mut pings = 0;
        for _ in 0..10_000 {
            bench.now += Duration::from_millis(1);
            let mut actions = bench.send();
            if bench.agent.deadline().is_some_and(|at| at <= bench.now) {
                bench.call(PathAgent::handle_timeout);
                actions.append(&mut bench.actions);
            }
            pings += pinged(&actions).len();
            if !actions.is_empty() {
                bench.pong(&actions, addr(1), Duration::ZERO);
            }
            if answered {
                bench.agent.note_received(addr(1), bench.now);
            }
            assert!(!bench.agent.route(bench.now).derp);
        }
        assert!(pings <= most, "{pings} pings in 10 s");
    }
}

#[test]
fn a_lost_heartbeat_is_repeated_before_it_counts_while_packets_come_in() {
    let mut bench = Bench::trusting(&[addr(1)]);
    let start = bench.now;
    let (took, _) = until_doubt(&mut bench, true);
    let heartbeat = HEARTBEAT + HEARTBEAT_PATIENCE;
    assert!(took >= heartbeat && took <= heartbeat + Duration::from_millis(200), "{took:?}");
    assert!(bench.now > start);

    // A stock peer waits until its last pong is too old.
    let mut bench = Bench::new(&[addr(1)]);
    bench.agent = PathAgent::new(false, Patience::Stock);
    bench.agent.set_endpoints(&[addr(1)]);
    let actions = bench.send();
    bench.pong(&actions, addr(1), Duration::from_millis(2));
    let (took, _) = until_doubt(&mut bench, false);
    assert!(took >= TRUST && took <= TRUST + Duration::from_millis(20), "{took:?}");
}

#[test]
fn a_call_pings_what_it_names_and_puts_trust_in_doubt() {
    let mut bench = Bench::new(&[addr(1)]);
    bench.send();
    bench.now += Duration::from_secs(1);
    bench.call(|agent, ctx| agent.handle_call(&[addr(1), addr(7)], ctx));
    assert_eq!(pinged(&std::mem::take(&mut bench.actions)), [addr(1), addr(7)], "the first one again");
    bench.now += Duration::from_millis(10);
    bench.call(|agent, ctx| agent.handle_call(&[addr(8)], ctx));
    assert_eq!(pinged(&std::mem::take(&mut bench.actions)), [addr(8)]);
    assert!(!bench.agent.candidates.iter().any(|c| c.addr == addr(7)), "a new call replaces the last");

    let mut bench = Bench::trusting(&[addr(1)]);
    bench.call(|agent, ctx| agent.handle_call(&[addr(2)], ctx));
    assert!(bench.agent.route(bench.now).derp);
    let actions = std::mem::take(&mut bench.actions);
    bench.pong(&actions, addr(1), Duration::from_millis(2));
    assert!(!bench.agent.route(bench.now).derp);
}

#[test]
fn whoever_pings_becomes_a_candidate_for_a_while() {
    let mut bench = Bench::new(&[]);
    bench.call(|agent, ctx| agent.handle_ping(addr(5), ctx));
    assert_eq!(bench.actions, [], "an idle peer is answered, not sought");
    bench.send();
    bench.now += Duration::from_secs(1);
    bench.call(|agent, ctx| agent.handle_ping(addr(6), ctx));
    assert_eq!(pinged(&std::mem::take(&mut bench.actions)), [addr(6)], "at once: its door is open now");
    for n in 0..=u8::MAX {
        bench.call(|agent, ctx| agent.handle_ping(addr(n), ctx));
    }
    assert_eq!(bench.agent.candidates.len(), MAX_CANDIDATES);
    for _ in 0..16 {
        bench.send();
        bench.advance();
    }
    assert!(bench.agent.candidates.is_empty(), "gone after 45 s");
}

#[test]
fn a_ping_says_that_the_peers_door_is_open_and_ours_is_sent_again() {
    let mut bench = Bench::new(&[addr(1)]);
    assert_eq!(pinged(&bench.send()), [addr(1)], "its gateway drops this one");
    bench.now += Duration::from_millis(15);
    bench.call(|agent, ctx| agent.handle_ping(addr(1), ctx));
    let again = std::mem::take(&mut bench.actions);
    assert_eq!(pinged(&again), [addr(1)]);
    bench.call(|agent, ctx| agent.handle_ping(addr(1), ctx));
    assert_eq!(bench.actions, [], "once a second, or two of us would go on for ever");
    assert!(bench.pong(&again, addr(1), Duration::from_millis(2)));
    assert!(!bench.agent.route(bench.now).derp);
}

#[test]
fn a_pong_that_was_held_up_vouches_for_the_path_and_leaves_its_latency() {
    let mut bench = Bench::trusting(&[addr(1)]);
    let (_, before) = bench.agent.trusted(bench.now).expect("trusted");
    let actions = bench.advance();
    assert_eq!(pinged(&actions), [addr(1)], "a heartbeat");
    bench.pong(&actions, addr(1), Duration::from_millis(4900));
    assert_eq!(bench.agent.trusted(bench.now), Some((addr(1), before)));
}

#[test]
fn the_better_address_wins_and_small_differences_do_not_count() {
    let best = |text: &str, us| Best {
        addr: text.parse().expect("an address"),
        latency: Duration::from_micros(us),
        trusted_until: Instant::now(),
    };
    for (challenger, present, wins) in [
        (("203.0.113.1:1", 10_000), ("203.0.113.2:1", 20_000), true),
        (("203.0.113.1:1", 10_000), ("203.0.113.2:1", 10_050), false),
        (("203.0.113.1:1", 10_000), ("203.0.113.2:1", 10_000), false),
        (("203.0.113.1:1", 100), ("203.0.113.2:1", 900), false),
        (("10.0.0.1:1", 10_000), ("203.0.113.2:1", 10_000), true),
        (("10.0.0.1:1", 15_000), ("203.0.113.2:1", 10_000), false),
        (("[2001:db8::1]:1", 10_000), ("203.0.113.2:1", 10_000), true),
        (("203.0.113.2:1", 10_000), ("[2001:db8::1]:1", 10_000), false),
        (("127.0.0.1:1", 500), ("10.0.0.1:1", 500), true),
        (("10.0.0.1:1", 500), ("127.0.0.1:1", 500), false),
    ] {
        let result = better(&best(challenger.0, challenger.1), &best(present.0, present.1));
        assert_eq!(result, wins, "{challenger:?} against {present:?}");
    }
}

#[test]
fn a_plain_wireguard_peer_has_neither_disco_nor_relay() {
    let mut bench = Bench::new(&[addr(1)]);
    bench.agent = PathAgent::new(true, Patience::Short);
    bench.agent.set_endpoints(&[addr(1)]);
    assert_eq!(bench.send(), []);
    assert_eq!(bench.agent.route(bench.now), Route { udp: Some(addr(1)), derp: false });
    bench.agent.note_received(addr(2), bench.now);
    assert_eq!(
        bench.agent.route(bench.now),
        Route { udp: Some(addr(2)), derp: false },
        "it roams as WireGuard does"
    );
    assert_eq!(bench.agent.deadline(), None);
}

#[test]
fn what_worked_before_a_restart_is_used_at_once_with_the_relay() {
    let mut bench = Bench::new(&[addr(1)]);
    bench.agent.restore(addr(4), bench.now);
    assert_eq!(bench.agent.route(bench.now), Route { udp: Some(addr(4)), derp: true });
    let actions = bench.send();
    assert_eq!(pinged(&actions), [addr(1), addr(4)]);
    bench.pong(&actions, addr(4), Duration::from_millis(1));
    assert_eq!(bench.agent.route(bench.now), Route { udp: Some(addr(4)), derp: false });
}
