//! What must hold between nodes, whatever the network does. A failing seed is named in the message;
//! `SIM_SEEDS=10000` plays that many random schedules.

mod changes;
mod hangs;
mod regions;
mod schedules;
#[path = "../sim/mod.rs"]
mod sim;

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use podtether_core::batch::RegionId;
use podtether_core::engine::{Event, PathView};
use podtether_core::tailcfg::{FilterRule, MapResponse, NetPortRange, Node, PortRange};
use sim::{Nat, Rng, World, ms, secs, udp_packet, v6_packet};

fn seeds(count: u64) -> Range<u64> {
    0..count
}

fn world(seed: u64, nats: &[Nat]) -> World {
    let mut world = World::new(seed);
    for nat in nats {
        let n = world.add(*nat);
        world.boot(n, false);
    }
    world.run_for(secs(5));
    world
}

fn lost(world: &World, from: usize, to: usize, sent: &Range<u64>) -> BTreeSet<u64> {
    let got = world.got(from, to);
    sent.clone().filter(|seq| !got.contains(seq)).collect()
}

#[track_caller]
fn assert_all_arrived(world: &World, sent: &Range<u64>, what: &str) {
    for (from, to) in [(0, 1), (1, 0)] {
        let lost = lost(world, from, to, sent);
        assert!(
            lost.is_empty(),
            "{what}: {from} to {to} lost {lost:?} of {sent:?}; drops {:?} and {:?}",
            world.drops(from),
            world.drops(to)
        );
    }
}

#[test]
fn two_nodes_talk_at_once_and_find_the_direct_path() {
    let mut world = world(1, &[Nat::None, Nat::None]);
    let mut next = 0;
    let sent = world.chat(0, 1, ms(20), secs(2), &mut next);
    world.run_for(secs(1));
    assert!(world.direct(0, 1) && world.direct(1, 0), "{:?} {:?}", world.path(0, 1), world.path(1, 0));
    assert_all_arrived(&world, &sent, "from the first packet on");
    let relayed = world.derp_data;
    world.chat(0, 1, ms(20), secs(5), &mut next);
    assert_eq!(world.derp_data, relayed, "a trusted path is used alone");
}

#[test]
fn nodes_behind_nats_meet_through_call_me_maybe_or_stay_on_the_relay() {
    for (a, b, direct) in [
        (Nat::None, Nat::PortRestricted, true),
        (Nat::PortRestricted, Nat::None, true),
        (Nat::PortRestricted, Nat::PortRestricted, true),
        (Nat::None, Nat::Symmetric, true),
        (Nat::PortRestricted, Nat::Symmetric, false),
        (Nat::Symmetric, Nat::Symmetric, false),
    ] {
        for seed in seeds(20) {
            let mut world = world(seed, &[a, b]);
            let mut next = 0;
            let sent = world.chat(0, 1, ms(20), secs(12), &mut next);
            world.run_for(secs(1));
            let what = format!("seed {seed}, {a:?} and {b:?}");
            assert_all_arrived(&world, &sent, &what);
            let paths = (world.path(0, 1), world.path(1, 0));
            assert_eq!((world.direct(0, 1), world.direct(1, 0)), (direct, direct), "{what}: {paths:?}");
        }
    }
}

#[test]
fn a_path_that_breaks_silently_is_replaced_by_the_relay_and_comes_back() {
    let mut worst = Duration::ZERO;
    for seed in seeds(60) {
        let mut world = world(seed, &[Nat::None, Nat::PortRestricted]);
        let mut next = 0;
        let warm_up = 4000 + Rng(seed).below(4000);
        world.chat(0, 1, ms(20), ms(warm_up), &mut next);
        assert!(world.direct(0, 1) && world.direct(1, 0), "seed {seed}");

        world.udp_blocked.insert(1);
        let cut = next;
        let sent = world.chat(0, 1, ms(20), secs(10), &mut next);
        world.run_for(secs(1));
        for (from, to) in [(0, 1), (1, 0)] {
            let lost = lost(&world, from, to, &(cut..sent.end));
            let gap = ms(20) * u32::try_from(lost.len()).expect("few");
            assert!(gap <= secs(3), "seed {seed}: {from} to {to} was out for {gap:?}");
            assert!(
                lost.iter().next_back().is_none_or(|last| *last < cut + 250),
                "seed {seed}: lost late {lost:?}"
            );
            worst = worst.max(gap);
        }
        assert!(matches!(world.path(0, 1), PathView::Relay(_)), "seed {seed}: {:?}", world.path(0, 1));

        world.udp_blocked.clear();
        let sent = world.chat(0, 1, ms(20), secs(12), &mut next);
        world.run_for(secs(1));
        assert_all_arrived(&world, &sent, &format!("seed {seed}, back"));
        assert!(world.direct(0, 1) && world.direct(1, 0), "seed {seed}: not direct again");
    }
    println!("worst outage with a broken path: {worst:?}");
}

#[test]
fn nodes_that_never_had_udp_talk_through_the_relay_of_a_stable_home() {
    let mut world = World::new(5);
    world.derp_regions = vec![1, 2, 3, 4];
    for n in 0..2 {
        world.add(Nat::None);
        world.udp_blocked.insert(n);
        world.boot(n, false);
    }
    world.run_for(secs(6));
    let homes: Vec<RegionId> = (0..2).map(|n| world.engine(n).status().home_derp).collect();
    assert!(homes.iter().all(|h| h.0 != 0));
    let mut next = 0;
    let sent = world.chat(0, 1, ms(50), secs(20), &mut next);
    world.run_for(secs(1));
    assert_all_arrived(&world, &sent, "relay only");
    world.run_for(secs(1000));
    assert_eq!(homes, (0..2).map(|n| world.engine(n).status().home_derp).collect::<Vec<_>>());
    assert_eq!(world.engine(0).host_update().net_info.working_udp, Some(false));
}

#[test]
fn the_nearest_region_becomes_home_and_peers_in_other_regions_are_reached() {
    let mut world = World::new(6);
    world.derp_regions = vec![1, 3, 2];
    world.add(Nat::Symmetric);
    world.boot(0, false);
    world.run_for(secs(5));
    assert_eq!(world.engine(0).status().home_derp, RegionId(1), "region n is 14n ms away");
    world.derp_regions = vec![2, 3];
    world.add(Nat::Symmetric);
    world.boot(1, false);
    world.run_for(secs(5));
    assert_eq!(world.engine(1).status().home_derp, RegionId(2), "found by name");
    let mut next = 0;
    let sent = world.chat(0, 1, ms(50), secs(5), &mut next);
    world.run_for(secs(1));
    // Node 0's map lacks nothing: region 2 is in it.
    assert_all_arrived(&world, &sent, "across regions");
    let closes = |w: &World| {
        w.nodes.iter().flat_map(|n| &n.events).filter(|e| matches!(e, Event::DerpClose { .. })).count()
    };
    assert_eq!(closes(&world), 0);
    world.run_for(secs(180));
    assert!(closes(&world) > 0, "the other's home is left when it is not used");
}

#[test]
fn a_peer_that_is_told_late_of_a_newcomer_hears_from_it_at_once() {
    let mut worst = Duration::ZERO;
    for seed in 0..45 {
        let nats = [Nat::None, Nat::PortRestricted, Nat::Symmetric];
        let nat = |n: u64| nats[usize::try_from(n % 3).expect("small")];
        let mut world = World::new(seed);
        let old = world.add(nat(seed));
        world.boot(old, false);
        world.run_for(secs(20));
        let new = world.add(nat(seed / 3));
        world.news_latency = ms(50 + Rng(seed).below(3000));
        world.boot(new, false);
        while !world.knows(new, old) {
            world.run_for(ms(5));
        }
        // The pod speaks once, as soon as it can.
        world.send(new, old, 0);
        while !world.knows(old, new) {
            world.run_for(ms(5));
        }
        let told = world.now;
        world.run_for(secs(1));
        let got = world.nodes[old].received.first().map(|(.., at)| *at);
        let took = got.unwrap_or_else(|| panic!("seed {seed}: lost")) - told;
        // The next try, and two round trips by relay.
        assert!(took <= ms(300), "seed {seed}: {took:?} after it was told");
        worst = worst.max(took);
    }
    println!("worst time from the news of a newcomer to its first packet: {worst:?}");
}

#[test]
fn a_handshake_lost_at_a_restart_or_for_want_of_a_relay_is_not_waited_for() {
    for seed in 0..20 {
        let mut world = world(seed, &[Nat::None, Nat::PortRestricted]);
        let mut next = 0;
        let warm_up = 3000 + Rng(seed).below(9000);
        world.chat(0, 1, ms(5), ms(warm_up), &mut next);
        world.kill(0);
        world.control_down = true;
        world.loss = 1000;
        world.boot(0, true);
        // Before its relay is connected, which would have carried a copy.
        world.chat(0, 1, ms(5), ms(50), &mut next);
        world.loss = 0;
        let cleared = world.now;
        world.chat(0, 1, ms(5), secs(1), &mut next);
        for node in [0, 1] {
            let back = world.nodes[node].received.iter().find(|(.., at)| *at > cleared + ms(20));
            let took = back.map(|(.., at)| *at - cleared);
            assert!(took.is_some_and(|t| t <= ms(250)), "seed {seed}: node {node} is back after {took:?}");
        }

        // Long known to each other, with nothing between them but a relay that is away.
        let mut world = World::new(seed);
        for n in 0..2 {
            world.add(Nat::None);
            world.udp_blocked.insert(n);
            world.boot(n, false);
        }
        world.run_for(secs(60));
        world.take_derp_down();
        world.send(0, 1, 7);
        world.run_for(ms(Rng(seed).below(30_000)));
        world.bring_derp_up();
        let up = world.now + world.derp_connect;
        world.run_for(secs(1));
        let took = world.nodes[1].received.first().map(|(.., at)| *at - up);
        // The peer may be connected a moment later, so that it takes the first retry.
        assert!(took.is_some_and(|t| t <= ms(700)), "seed {seed}: {took:?} after the relay was there");
    }
}

#[test]
fn an_engine_killed_under_traffic_is_back_in_milliseconds() {
    let mut worst = Duration::ZERO;
    for seed in seeds(100) {
        let nats =
            [[Nat::None, Nat::None], [Nat::PortRestricted, Nat::None], [Nat::Symmetric, Nat::Symmetric]];
        let nats = nats[usize::try_from(seed % 3).expect("small")];
        let mut world = world(seed, &nats);
        let mut next = 0;
        let warm_up = 3000 + Rng(seed).below(9000);
        world.chat(0, 1, ms(5), ms(warm_up), &mut next);
        world.kill(0);
        // No control for a while: the snapshot has to do.
        world.control_down = true;
        let before = next;
        world.chat(0, 1, ms(5), ms(25), &mut next);
        world.boot(0, true);
        let up = world.now;
        let sent = world.chat(0, 1, ms(5), secs(3), &mut next);
        world.run_for(secs(1));
        let relayed = !world.direct(0, 1);
        let first_back = |node: usize| {
            let from = 1 - node;
            world.nodes[node]
                .received
                .iter()
                .find(|(src, _, at)| *src == from && *at > up)
                .map(|(.., at)| *at - up)
        };
        for node in [0, 1] {
            let gap = first_back(node).unwrap_or_else(|| panic!("seed {seed}: node {node} hears nothing"));
            // Direct: init, response, keepalive and data are two round trips of 20 ms. By relay, the
            // connection (60 ms) comes first.
            let bar = if relayed { ms(200) } else { ms(50) };
            assert!(gap <= bar, "seed {seed} {nats:?}: node {node} silent for {gap:?}");
            if !relayed {
                worst = worst.max(gap);
            }
        }
        let settled = sent.start + 50..sent.end;
        assert_all_arrived(&world, &settled, &format!("seed {seed}, after the restart"));
        assert!(before < sent.start);
        let alive = world.engine(0).status();
        assert!(alive.running && !alive.control_connected);
    }
    println!("worst silence after a restart on a 10 ms path: {worst:?}");
}

#[test]
fn a_restart_without_a_snapshot_recovers_with_a_new_disco_key() {
    for seed in seeds(40) {
        let mut world = world(seed, &[Nat::PortRestricted, Nat::PortRestricted]);
        let mut next = 0;
        world.chat(0, 1, ms(20), secs(6), &mut next);
        world.kill(0);
        world.run_for(ms(300));
        world.boot(0, false);
        world.run_for(secs(1));
        let sent = world.chat(0, 1, ms(20), secs(15), &mut next);
        world.run_for(secs(1));
        let late = sent.start + 50..sent.end;
        assert_all_arrived(&world, &late, &format!("seed {seed}"));
        assert!(world.direct(0, 1) && world.direct(1, 0), "seed {seed}: {:?}", world.path(0, 1));
    }
}

#[test]
fn both_ends_restarted_at_once_find_each_other() {
    for seed in seeds(40) {
        let mut world = world(seed, &[Nat::None, Nat::PortRestricted]);
        let mut next = 0;
        world.chat(0, 1, ms(10), secs(6), &mut next);
        world.kill(0);
        world.kill(1);
        world.control_down = true;
        world.boot(1, true);
        world.run_for(ms(Rng(seed).below(40)));
        world.boot(0, true);
        let sent = world.chat(0, 1, ms(10), secs(3), &mut next);
        world.run_for(secs(1));
        let late = sent.start + 30..sent.end;
        assert_all_arrived(&world, &late, &format!("seed {seed}"));
    }
}

#[test]
fn without_relays_a_direct_path_lives_on() {
    for seed in seeds(20) {
        let mut world = world(seed, &[Nat::None, Nat::None]);
        let mut next = 0;
        world.chat(0, 1, ms(20), secs(3), &mut next);
        world.take_derp_down();
        let sent = world.chat(0, 1, ms(20), secs(200), &mut next);
        world.run_for(secs(1));
        assert_all_arrived(&world, &sent, &format!("seed {seed}, across a rekey"));
        world.bring_derp_up();
        world.udp_blocked.insert(0);
        let start = next;
        world.chat(0, 1, ms(20), secs(10), &mut next);
        world.run_for(secs(1));
        assert!(lost(&world, 0, 1, &(start + 150..next)).is_empty(), "seed {seed}: relay is back");
    }
}

#[test]
fn sessions_are_renewed_without_loss_on_lossless_links_and_go_on_on_lossy_ones() {
    for (seed, loss) in [(1, 0), (2, 0), (3, 50), (4, 100), (5, 200)] {
        let mut world = world(seed, &[Nat::None, Nat::None]);
        world.jitter = ms(8);
        world.loss = loss;
        let mut next = 0;
        let sent = world.chat(0, 1, ms(25), secs(700), &mut next);
        world.loss = 0;
        world.run_for(secs(1));
        for (from, to) in [(0, 1), (1, 0)] {
            let lost = lost(&world, from, to, &sent);
            let bar = sent.clone().count() * usize::try_from(loss).expect("small") * 15 / 10_000;
            assert!(
                lost.len() <= bar,
                "seed {seed}: {} of {} lost at {loss} per mille",
                lost.len(),
                sent.end
            );
        }
        assert!(world.engine(0).counters().handshakes + world.engine(1).counters().handshakes >= 10);
    }
}

#[test]
fn duplicates_never_reach_the_pod() {
    let mut world = world(3, &[Nat::None, Nat::None]);
    let mut next = 0;
    // While the path is in doubt packets go both ways.
    for _ in 0..5 {
        world.chat(0, 1, ms(10), secs(5), &mut next);
        world.loss = 900;
        world.chat(0, 1, ms(10), secs(4), &mut next);
        world.loss = 0;
    }
    for node in &world.nodes {
        let unique: BTreeSet<_> = node.received.iter().map(|(src, seq, _)| (*src, *seq)).collect();
        assert_eq!(unique.len(), node.received.len());
    }
}

#[test]
fn idle_nodes_are_silent() {
    let mut world = world(1, &[Nat::None, Nat::PortRestricted]);
    let mut next = 0;
    world.chat(0, 1, ms(100), secs(5), &mut next);
    world.run_for(secs(700));
    let before: Vec<u64> = world.nodes.iter().map(|n| n.wakeups).collect();
    world.run_for(secs(3600));
    for (n, before) in before.iter().enumerate() {
        let wakeups = world.nodes[n].wakeups - before;
        println!("node {n}: {wakeups} wake-ups in an idle hour");
        // A full netcheck every five minutes takes a few; pings to the relay are not needed while it is heard.
        assert!(wakeups <= 150, "node {n}: {wakeups} wake-ups in an idle hour");
        assert_eq!(world.path(n, 1 - n), PathView::Idle);
        let now = world.now;
        assert!(world.engine(n).peers(now)[0].handshake_age.is_none(), "taken down after 540 s");
    }
    let sent = world.chat(0, 1, ms(20), secs(2), &mut next);
    world.run_for(secs(1));
    assert_all_arrived(&world, &sent, "woken up");
}

#[test]
fn the_filter_decides_what_a_pod_gets_and_answers_pass() {
    let mut world = world(1, &[Nat::None, Nat::None]);
    let only = |port| {
        let ports = PortRange { first: port, last: port };
        vec![
            FilterRule {
                src_ips: vec!["100.64.0.1".into()],
                dst_ports: vec![NetPortRange { ip: "*".into(), ports }],
                ..FilterRule::default()
            }
            .into(),
        ]
    };
    world.set_rules(1, only(80));
    world.set_rules(0, Vec::new());
    let (a, b) = (world.nodes[0].tailnet, world.nodes[1].tailnet);
    world.send_raw(0, &udp_packet(a, b, 9, 80, 1));
    world.send_raw(0, &udp_packet(a, b, 9, 81, 2));
    world.run_for(secs(1));
    assert_eq!(world.got(0, 1), BTreeSet::from([1]));
    world.send_raw(1, &udp_packet(b, a, 80, 9, 3));
    world.send_raw(1, &udp_packet(b, a, 80, 10, 4));
    world.run_for(secs(1));
    assert_eq!(world.got(1, 0), BTreeSet::from([3]), "only the answer");
    let drops: Vec<_> = world.drops(1).into_iter().filter(|(reason, _)| *reason != "duplicate").collect();
    assert_eq!(drops, [("filter", 1)]);
    // What the pod may not send.
    world.send_raw(0, &udp_packet(b, a, 1, 1, 5));
    world.send_raw(0, &udp_packet(a, [100, 100, 100, 100].into(), 1, 53, 6));
    world.send_raw(0, &udp_packet(a, [100, 64, 9, 9].into(), 1, 53, 7));
    world.send_raw(0, b"junk");
    let drops = world.drops(0);
    for reason in ["source_not_ours", "service_address", "no_peer", "malformed"] {
        assert!(drops.contains(&(reason, 1)), "{reason} in {drops:?}");
    }
}

#[test]
fn ipv6_is_carried_and_preferred_and_left_when_it_breaks() {
    let mut world = World::new(9);
    for n in 0..2u16 {
        let at = world.add(Nat::PortRestricted);
        world.nodes[at].v6 = Some((std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n), 41641).into());
        world.boot(at, false);
    }
    world.run_for(secs(5));
    for seq in 0..100 {
        world.send_raw(0, &v6_packet(0, 1, seq));
        world.run_for(ms(30));
    }
    world.run_for(secs(1));
    assert_eq!(world.got(0, 1).len(), 100);
    assert!(
        matches!(world.path(0, 1), PathView::Direct(addr, _) if addr.is_ipv6()),
        "{:?}",
        world.path(0, 1)
    );
    world.v6_blocked = true;
    let mut next = 0;
    world.chat(0, 1, ms(30), secs(15), &mut next);
    assert!(
        matches!(world.path(0, 1), PathView::Direct(addr, _) if addr.is_ipv4()),
        "{:?}",
        world.path(0, 1)
    );
    world.nodes[1].received.clear();
    let sent = world.chat(0, 1, ms(30), secs(1), &mut next);
    world.run_for(secs(1));
    assert_eq!(lost(&world, 0, 1, &sent), BTreeSet::new());
}

#[test]
fn a_node_that_moves_to_another_network_is_direct_again_within_seconds() {
    for seed in seeds(30) {
        let mut world = world(seed, &[Nat::None, Nat::PortRestricted]);
        let mut next = 0;
        world.chat(0, 1, ms(20), secs(6), &mut next);
        let mover = usize::from(seed % 2 == 0);
        world.roam(mover);
        let sent = world.chat(0, 1, ms(20), secs(8), &mut next);
        world.run_for(secs(1));
        for (from, to) in [(0, 1), (1, 0)] {
            let lost = lost(&world, from, to, &sent).len();
            assert!(lost <= 25, "seed {seed}: {from} to {to} lost {lost} packets, 20 ms each");
        }
        assert!(world.direct(0, 1) && world.direct(1, 0), "seed {seed}: {:?}", world.path(0, 1));
    }
}

#[test]
fn control_takes_peers_keys_and_relays_away() {
    let mut world = world(4, &[Nat::None, Nat::None, Nat::None]);
    let mut next = 0;
    world.chat(0, 1, ms(20), secs(2), &mut next);
    // A peer removed gets nothing more across, at once.
    let id = world.nodes[1].record.id;
    world.tell(0, MapResponse { peers_removed: vec![id], ..MapResponse::default() });
    let sent = world.chat(0, 1, ms(20), secs(1), &mut next);
    world.run_for(secs(1));
    assert_eq!(lost(&world, 1, 0, &sent).len(), sent.clone().count());
    // It comes back.
    let record = world.nodes[1].record.clone();
    world.tell(0, MapResponse { peers_changed: vec![record.clone()], ..MapResponse::default() });
    world.run_for(secs(16));
    let sent = world.chat(0, 1, ms(20), secs(3), &mut next);
    world.run_for(secs(1));
    assert_eq!(lost(&world, 0, 1, &(sent.start + 50..sent.end)), BTreeSet::new());
    // An expired peer is as good as gone.
    let expired = Node { expired: true, ..record };
    world.tell(0, MapResponse { peers_changed: vec![expired], ..MapResponse::default() });
    let sent = world.chat(0, 1, ms(20), secs(1), &mut next);
    world.run_for(secs(1));
    assert_eq!(lost(&world, 1, 0, &sent).len(), sent.count());
    // Another home is found when the region goes.
    let mut map = MapResponse::default();
    world.derp_regions = vec![3];
    map.derp_map = Some(world.derp_map());
    world.tell(0, map);
    world.run_for(secs(5));
    assert_eq!(world.engine(0).status().home_derp, RegionId(3));
    let closed = world.nodes[0].events.contains(&Event::DerpClose { region: RegionId(1) });
    assert!(closed, "{:?}", world.nodes[0].events);
    // The node's own key runs out.
    let mut own = world.nodes[0].record.clone();
    own.key_expiry = Some(world.wall().saturating_add(secs(60)));
    world.tell(0, MapResponse { node: Some(own), ..MapResponse::default() });
    world.run_for(secs(59));
    assert!(!world.nodes[0].events.contains(&Event::KeyExpired));
    world.run_for(secs(2));
    assert_eq!(world.nodes[0].events.iter().filter(|e| **e == Event::KeyExpired).count(), 1);
}

#[test]
fn a_tailnet_lives_through_a_random_hour() {
    for seed in seeds(12) {
        let mut rng = Rng(seed ^ 0x5eed);
        let mut world = World::new(seed);
        world.derp_regions = vec![1, 2, 3];
        let count = 5;
        for _ in 0..count {
            let nat = [Nat::None, Nat::PortRestricted, Nat::Symmetric]
                [usize::try_from(rng.below(3)).expect("small")];
            let n = world.add(nat);
            world.boot(n, false);
        }
        world.run_for(secs(5));
        let mut next = 0;
        for _ in 0..40 {
            match rng.below(9) {
                0 => {
                    let n = usize::try_from(rng.below(count)).expect("small");
                    world.kill(n);
                    world.run_for(ms(rng.below(200)));
                    world.boot(n, rng.chance(800));
                }
                1 => {
                    let n = usize::try_from(rng.below(count)).expect("small");
                    world.udp_blocked.insert(n);
                }
                2 => world.udp_blocked.clear(),
                3 => world.loss = rng.below(150),
                4 => world.jitter = ms(rng.below(30)),
                5 => {
                    let n = usize::try_from(rng.below(count)).expect("small");
                    world.reset_nat(n);
                }
                6 => world.run_for(secs(rng.below(400))),
                7 => {
                    world.take_derp_down();
                    world.run_for(secs(rng.below(20)));
                    world.bring_derp_up();
                }
                _ => {}
            }
            let a = usize::try_from(rng.below(count)).expect("small");
            let b = (a + 1 + usize::try_from(rng.below(count - 1)).expect("small"))
                % usize::try_from(count).expect("small");
            let time = secs(rng.below(30));
            world.chat(a, b, ms(50), time, &mut next);
        }
        // Whatever happened: on a sane network every pair talks again, soon.
        world.udp_blocked.clear();
        world.loss = 0;
        world.run_for(secs(20));
        let count = usize::try_from(count).expect("small");
        for a in 0..count {
            for b in a + 1..count {
                let start = next;
                world.chat(a, b, ms(50), secs(8), &mut next);
                world.run_for(secs(1));
                let late = start + 100..next;
                for (from, to) in [(a, b), (b, a)] {
                    let lost = lost(&world, from, to, &late);
                    assert!(
                        lost.is_empty(),
                        "seed {seed}: {from} to {to} lost {} of {late:?}: {:?} {:?} {:?}",
                        lost.len(),
                        world.drops(from),
                        world.drops(to),
                        world.path(from, to)
                    );
                }
            }
        }
    }
}
