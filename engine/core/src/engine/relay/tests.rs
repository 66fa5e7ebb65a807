use super::*;

const A: RegionId = RegionId(1);
const B: RegionId = RegionId(2);

fn to(region: RegionId) -> DerpDestination {
    DerpDestination { region, peer: NodePublic::from_bytes([1; 32]) }
}

#[test]
fn packets_wait_for_the_connection_and_idle_regions_are_left() {
    let (mut relays, mut events, mut out) = (Relays::default(), VecDeque::new(), Outbox::default());
    let now = Instant::now();
    relays.set_known([A, B].into(), &mut events);
    relays.set_home(A, now, &mut events);
    assert_eq!(events, [Event::DerpConnect { region: A }, Event::DerpPreferred { region: A }]);
    events.clear();
    for n in 0..MAX_WAITING + 1 {
        assert_eq!(relays.send(to(B), &n.to_le_bytes(), now, &mut out, &mut events), n < MAX_WAITING);
    }
    assert_eq!(events, [Event::DerpConnect { region: B }], "once");
    assert!(out.is_empty());
    relays.handle_connected(B, now, &mut out, &mut events);
    let first: Vec<_> = out.derp.iter().map(|(_, p)| p.to_vec()).take(1).collect();
    assert_eq!(
        (out.derp.len(), first),
        (MAX_WAITING, vec![1usize.to_le_bytes().to_vec()]),
        "the oldest went"
    );
    assert!(relays.send(to(B), b"now", now, &mut out, &mut events));
    assert_eq!(out.derp.last(), Some(&b"now"[..]));
    assert!(!relays.send(to(RegionId(9)), b"", now, &mut out, &mut events), "no such region");

    relays.handle_connected(A, now, &mut out, &mut events);
    events.clear();
    let idle = now + IDLE;
    relays.handle_heard(A, idle);
    relays.handle_heard(B, idle);
    assert_eq!(relays.deadline(), Some(idle));
    relays.handle_timeout(idle, &mut events);
    assert_eq!(events, [Event::DerpClose { region: B }]);
    assert_eq!(relays.deadline(), Some(idle + PING_AFTER_IDLE), "home is never left, but pinged");
}

#[test]
fn an_idle_home_is_left_to_the_servers_keepalives_and_still_given_up_within_two_minutes() {
    let (mut relays, mut events, mut out) = (Relays::new(999), VecDeque::new(), Outbox::default());
    let start = Instant::now();
    relays.set_known([A].into(), &mut events);
    relays.set_home(A, start, &mut events);
    relays.handle_connected(A, start, &mut out, &mut events);
    events.clear();
    // An hour of nothing but keepalives, 65 s apart, once the connection is no longer new.
    let mut now = start + IN_USE;
    let (mut wakes, mut heard) = (0, now);
    relays.handle_heard(A, now);
    while now < start + Duration::from_secs(3600) {
        let keepalive = heard + Duration::from_secs(65);
        now = relays.deadline().expect("a ping").min(keepalive);
        if now == keepalive {
            heard = now;
            relays.handle_heard(A, now);
        }
        relays.handle_timeout(now, &mut events);
        wakes += 1;
    }
    assert!(events.is_empty() && wakes <= 56, "{wakes}: {events:?}");
    // It dies without a word.
    let silent = heard;
    while events.back() != Some(&Event::DerpReconnect { region: A }) {
        now = relays.deadline().expect("a ping");
        relays.handle_timeout(now, &mut events);
    }
    assert!(now - silent <= Duration::from_secs(120), "{:?}", now - silent);

    // With a packet to a peer, ten seconds count again, also for one that was silent for long already.
    relays.handle_connected(A, now, &mut out, &mut events);
    let later = now + Duration::from_secs(66);
    relays.handle_heard(A, later - Duration::from_secs(6));
    events.clear();
    assert!(relays.deadline().expect("a ping") > later + Duration::from_secs(50));
    relays.send(to(A), b"x", later, &mut out, &mut events);
    assert_eq!(events.pop_front(), Some(Event::DerpPing { region: A }));
    relays.handle_timeout(later + PING_TIMEOUT, &mut events);
    assert_eq!(events.pop_front(), Some(Event::DerpReconnect { region: A }));
}

#[test]
fn a_silent_connection_is_pinged_and_given_up_within_ten_seconds() {
    let (mut relays, mut events, mut out) = (Relays::new(999), VecDeque::new(), Outbox::default());
    let start = Instant::now();
    relays.set_known([A].into(), &mut events);
    relays.set_home(A, start, &mut events);
    relays.handle_connected(A, start, &mut out, &mut events);
    events.clear();
    let mut now = start;
    for _ in 0..3 {
        now = relays.deadline().expect("a ping");
        relays.handle_timeout(now, &mut events);
        assert_eq!(events.pop_front(), Some(Event::DerpPing { region: A }));
        now += Duration::from_secs(1);
        relays.handle_heard(A, now);
    }
    let silent = now;
    while events.back() != Some(&Event::DerpReconnect { region: A }) {
        now = relays.deadline().expect("more pings");
        relays.handle_timeout(now, &mut events);
    }
    assert!(now - silent <= Duration::from_secs(10), "{:?}", now - silent);
    assert!(!relays.is_connected(A));
}

#[test]
fn home_moves_only_to_a_region_that_is_connected_and_away_from_one_that_is_not() {
    let (mut relays, mut events, mut out) = (Relays::new(0), VecDeque::new(), Outbox::default());
    let now = Instant::now();
    let c = RegionId(3);
    relays.set_known([A, B, c].into(), &mut events);
    assert!(relays.prefer(A, now, &mut events), "the first home is taken at once");
    relays.handle_connected(A, now, &mut out, &mut events);
    // A nearer one whose relay is dead never becomes home.
    assert!(!relays.prefer(B, now, &mut events));
    relays.handle_disconnected(B, now);
    assert_eq!(relays.home(), A);
    assert!(relays.handle_connected(B, now, &mut out, &mut events));
    assert_eq!(relays.home(), B);
    // Home dies, and one that would do is connected later.
    relays.handle_disconnected(B, now);
    assert!(!relays.wants_standby(now));
    let later = now + HOME_PATIENCE;
    assert!(relays.wants_standby(later));
    assert!(!relays.stand_by(&[c], later, &mut events));
    assert!(!relays.wants_standby(later + Duration::from_secs(1)));
    assert!(relays.wants_standby(later + STANDBY_EVERY));
    assert!(relays.handle_connected(c, later, &mut out, &mut events));
    assert_eq!(relays.home(), c);
    // One that is connected already takes over at once.
    relays.handle_disconnected(c, later);
    assert!(relays.stand_by(&[A], later + HOME_PATIENCE, &mut events));
    assert_eq!(relays.home(), A);
}

#[test]
fn a_new_home_leaves_the_old_one_in_a_while_and_a_vanished_one_at_once() {
    let (mut relays, mut events) = (Relays::default(), VecDeque::new());
    let now = Instant::now();
    relays.set_known([A, B].into(), &mut events);
    relays.set_home(A, now, &mut events);
    relays.set_home(B, now, &mut events);
    relays.handle_connected(B, now + IDLE, &mut Outbox::default(), &mut events);
    assert_eq!(relays.deadline(), Some(now + IDLE));
    relays.set_known([A].into(), &mut events);
    assert_eq!(events.back(), Some(&Event::DerpClose { region: B }));
    assert!(!relays.home().is_some());
}

#[test]
fn what_waits_is_bounded_over_all_regions() {
    let (mut relays, mut events, mut out) = (Relays::default(), VecDeque::new(), Outbox::default());
    let now = Instant::now();
    relays.set_known((1..=60).map(RegionId).collect(), &mut events);
    for n in 0..20_000 {
        relays.send(to(RegionId(1 + n % 60)), &[0; 1300], now, &mut out, &mut events);
    }
    let waiting: usize = relays.regions.values().map(|relay| relay.waiting.len()).sum();
    assert!((MAX_WAITING_ALL - 60..=MAX_WAITING_ALL).contains(&waiting), "{waiting}");
}
