use super::*;
use crate::tailcfg::{DerpHomeParams, DerpRegion};

fn map(regions: &[(u32, DerpRegion)]) -> DerpMap {
    let regions = regions.iter().map(|(id, region)| {
        let node =
            DerpNode { ipv4: format!("192.0.2.{id}"), host_name: format!("d{id}"), ..DerpNode::default() };
        (RegionId(*id), DerpRegion { nodes: vec![node], ..region.clone() })
    });
    DerpMap { regions: Some(regions.collect()), ..DerpMap::default() }
}

fn plain(ids: &[u32]) -> DerpMap {
    map(&ids.iter().map(|id| (*id, DerpRegion::default())).collect::<Vec<_>>())
}

struct Bench {
    netcheck: Netcheck,
    random: Random,
    requests: Vec<StunRequest>,
    resolve: Vec<String>,
    now: Instant,
}

impl Bench {
    fn new(map: &DerpMap) -> Self {
        let now = Instant::now();
        let mut netcheck = Netcheck::default();
        netcheck.set_map(map, now);
        Self { netcheck, random: Random::new([1; 32]), requests: Vec::new(), resolve: Vec::new(), now }
    }

    fn timeout(&mut self, home: u32) -> Changed {
        let mut ctx = Context {
            now: self.now,
            random: &mut self.random,
            requests: &mut self.requests,
            resolve: &mut self.resolve,
            v4: true,
            v6: false,
        };
        self.netcheck.handle_timeout(RegionId(home), &mut ctx)
    }

    fn advance(&mut self, home: u32) -> Changed {
        let due = self.netcheck.deadline(home != 0).expect("something is due");
        assert!(due >= self.now);
        self.now = due;
        self.timeout(home)
    }

    /// Answers the newest request to each region after so many milliseconds.
    fn answer(&mut self, latencies: &[(u32, u64)], mapped: SocketAddr) -> Changed {
        let mut all = Changed::default();
        let start = self.now;
        for (id, latency) in latencies {
            let to = SocketAddr::from(([192, 0, 2, u8::try_from(*id).expect("small")], 3478));
            let request = self.requests.iter().rfind(|r| r.to == to).expect("asked");
            let changed =
                self.netcheck.handle_response(&request.txid, mapped, start + Duration::from_millis(*latency));
            all.endpoints |= changed.endpoints;
            all.home |= changed.home;
        }
        self.now = start + Duration::from_millis(latencies.iter().map(|l| l.1).max().unwrap_or(0));
        all
    }
}

fn mapped() -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 7], 4000))
}

#[test]
fn a_full_round_measures_every_region_and_then_there_is_quiet() {
    let mut bench = Bench::new(&plain(&[1, 2, 3]));
    bench.timeout(0);
    assert_eq!(bench.requests.len(), 3);
    let changed = bench.answer(&[(2, 10), (1, 20), (3, 30)], mapped());
    assert_eq!(changed, Changed { endpoints: true, home: true });
    assert_eq!(bench.netcheck.choose_home(RegionId(0), None, 0, bench.now), RegionId(2));
    assert_eq!(bench.netcheck.mapped(), [Some(mapped()), None]);
    assert_eq!(bench.netcheck.mapping_varies(), Some(false));
    let start = bench.now;
    bench.requests.clear();
    bench.advance(2);
    assert_eq!(bench.now, start + FULL_EVERY - Duration::from_millis(30));
    assert_eq!(bench.requests.len(), 3, "the next full round");
}

#[test]
fn traffic_brings_quick_rounds_to_home_and_the_nearest() {
    let mut bench = Bench::new(&plain(&[1, 2, 3, 4, 5, 6]));
    bench.timeout(0);
    bench.answer(&[(1, 60), (2, 50), (3, 40), (4, 30), (5, 20), (6, 10)], mapped());
    bench.requests.clear();
    bench.netcheck.note_traffic(bench.now);
    bench.advance(1);
    let mut asked: Vec<u8> = bench
        .requests
        .iter()
        .map(|r| match r.to.ip() {
            IpAddr::V4(ip) => ip.octets()[3],
            IpAddr::V6(_) => 0,
        })
        .collect();
    asked.sort_unstable();
    assert_eq!(asked, [1, 4, 5, 6]);
    let moved = SocketAddr::from(([203, 0, 113, 8], 1));
    assert!(bench.answer(&[(1, 60), (4, 30), (5, 20), (6, 10)], moved).endpoints);
    assert_eq!(bench.netcheck.mapped()[0], Some(moved));
}

#[test]
fn what_is_not_answered_is_repeated_and_given_up_after_three_seconds() {
    let mut bench = Bench::new(&plain(&[1, 2]));
    bench.timeout(0);
    let start = bench.now;
    let mut home_wanted = None;
    loop {
        let changed = bench.advance(0);
        if changed.home && home_wanted.is_none() {
            home_wanted = Some(bench.now - start);
        }
        if bench.now - start >= ROUND_MAX {
            break;
        }
        assert!(bench.requests.len() <= 8);
    }
    assert_eq!(bench.requests.len(), 8, "once and three times again");
    assert!(home_wanted.is_some_and(|after| after <= FIRST_HOME_BLIND));
    assert!(!bench.netcheck.udp_works());
    // Blind, the choice is stable, and different nodes choose differently.
    let choice = |salt| bench.netcheck.choose_home(RegionId(0), None, salt, bench.now);
    assert_eq!([choice(0), choice(1), choice(2)], [RegionId(1), RegionId(2), RegionId(1)]);
    assert_eq!(bench.netcheck.choose_home(RegionId(2), None, 0, bench.now), RegionId(2), "no reason to move");
}

#[test]
fn home_changes_for_a_clear_gain_only() {
    // Present home's latency (none: no answer), another's, whether home was heard by DERP, does it move?
    for (old, new, heard, moves) in [
        (Some(100), 95, false, false),
        (Some(100), 70, false, false),
        (Some(100), 60, false, true),
        (Some(14), 8, false, false),
        (Some(18), 7, false, true),
        (None, 50, true, false),
        (None, 50, false, true),
    ] {
        let mut bench = Bench::new(&plain(&[1, 2]));
        bench.timeout(1);
        let mut answers = vec![(2, new)];
        answers.extend(old.map(|old| (1, old)));
        bench.answer(&answers, mapped());
        let heard = heard.then_some(bench.now);
        let home = bench.netcheck.choose_home(RegionId(1), heard, 0, bench.now);
        assert_eq!(home == RegionId(2), moves, "{old:?} to {new}, heard {heard:?}");
    }
}

#[test]
fn regions_to_avoid_are_no_home_and_scores_count() {
    let avoid = DerpRegion { avoid: true, ..DerpRegion::default() };
    let unmeasured = DerpRegion { no_measure_no_home: true, ..DerpRegion::default() };
    let mut map = map(&[(1, avoid), (2, unmeasured), (3, DerpRegion::default()), (4, DerpRegion::default())]);
    map.home_params = Some(DerpHomeParams { region_score: Some([(RegionId(3), 10.0)].into()) });
    let mut bench = Bench::new(&map);
    bench.timeout(0);
    assert_eq!(bench.requests.len(), 3, "region 2 is not measured");
    bench.answer(&[(1, 1), (3, 10), (4, 50)], mapped());
    assert_eq!(bench.netcheck.choose_home(RegionId(0), None, 0, bench.now), RegionId(4));
    assert_eq!(bench.netcheck.choose_home(RegionId(1), None, 0, bench.now), RegionId(4));
    assert!(!bench.netcheck.only_choice());
}

#[test]
fn a_nat_with_a_port_for_each_destination_is_noticed() {
    let mut bench = Bench::new(&plain(&[1, 2]));
    bench.timeout(1);
    bench.answer(&[(1, 5)], mapped());
    assert_eq!(bench.netcheck.mapping_varies(), None);
    bench.answer(&[(2, 5)], SocketAddr::from(([203, 0, 113, 7], 4001)));
    assert_eq!(bench.netcheck.mapping_varies(), Some(true));
    assert_eq!(bench.netcheck.mapped()[0], Some(mapped()), "the first one stands");
}

#[test]
fn names_are_resolved_once_per_full_round() {
    let node = DerpNode { host_name: "derp.test".into(), stun_port: 99, ..DerpNode::default() };
    let region =
        DerpRegion { nodes: vec![node.clone(), DerpNode { stun_port: -1, ..node }], ..DerpRegion::default() };
    let map = DerpMap { regions: Some([(RegionId(1), region)].into()), ..DerpMap::default() };
    let mut bench = Bench::new(&map);
    bench.timeout(0);
    assert_eq!(
        (bench.resolve.drain(..).collect::<Vec<_>>(), bench.requests.len()),
        (vec!["derp.test".into()], 0)
    );
    let found = [IpAddr::from([192, 0, 2, 1])];
    let mut requests = Vec::new();
    let mut ctx = Context {
        now: bench.now,
        random: &mut bench.random,
        requests: &mut requests,
        resolve: &mut bench.resolve,
        v4: true,
        v6: true,
    };
    bench.netcheck.set_resolved("other.test", &found, &mut ctx);
    assert!(ctx.requests.is_empty());
    bench.netcheck.set_resolved("derp.test", &found, &mut ctx);
    let to = SocketAddr::new(found[0], 99);
    assert_eq!(requests.iter().map(|r| r.to).collect::<Vec<_>>(), [to]);
    bench.netcheck.handle_response(&requests[0].txid, mapped(), bench.now);
    bench.advance(1);
    assert_eq!(bench.resolve, ["derp.test"], "asked again");
    assert_eq!(bench.requests.len(), 1, "without waiting for the answer");
}
