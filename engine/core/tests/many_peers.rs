//! What a large tailnet costs: memory for each peer, and nothing else that grows with their number.

mod counting;
mod tailnet;

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use counting::{ALLOCATIONS, BYTES};
use podtether_core::batch::{Batch, Outbox};
use podtether_core::engine::{Config, ControlEvent, Decision, Engine, Event, Question};
use podtether_core::key::{DiscoPrivate, DiscoPublic, NodePrivate, NodePublic};
use podtether_core::map_stream::{MapStream, Piece, encode};
use podtether_core::snapshot::{MAX_BYTES, Snapshot};
use podtether_core::tailcfg::{MapResponse, UnixTime};
use serde_json::json;
use tailnet::{DELTAS, apply, engine, peer};

const SIZES: [u32; 3] = [100, 1_000, 10_000];

#[test]
fn a_further_peer_costs_less_than_a_kilobyte() {
    let now = Instant::now();
    let small = BYTES.get();
    let few = engine(10, now);
    let before = BYTES.get();
    let many = engine(10_010, now);
    let peers = BYTES.get() - before - (before - small);
    let each = peers / 10_000;
    // The buffer of a snapshot under way lives beside it.
    let mut piece = Vec::new();
    let mut writer = many.begin_snapshot(now, &mut piece);
    let mut most = piece.capacity();
    let mut bytes = 0;
    loop {
        let more = many.continue_snapshot(&mut writer, &mut piece);
        most = most.max(piece.capacity());
        bytes += piece.len();
        piece.clear();
        if !more {
            break;
        }
    }
    println!("{each} bytes a peer in memory, {} in a snapshot, {most} for its buffer", bytes / 10_000);
    assert!(each + i64::try_from(most).expect("small") / 10_000 <= 1024, "{each} bytes a peer");
    assert!(most < 256 << 10);
    drop((few, many));
}

#[test]
fn a_delta_costs_the_same_in_a_tailnet_of_any_size() {
    let now = Instant::now();
    let mut curves: Vec<Vec<(u64, Duration)>> = vec![Vec::new(); DELTAS.len()];
    for peers in SIZES {
        let mut engine = engine(peers, now);
        for ((_, delta), curve) in DELTAS.iter().zip(&mut curves) {
            let (mut allocations, mut fastest) = (0, Duration::MAX);
            for turn in 1..=200 {
                let message = delta(turn);
                let (before, began) = (ALLOCATIONS.get(), Instant::now());
                apply(&mut engine, message, now);
                fastest = fastest.min(began.elapsed());
                allocations += ALLOCATIONS.get() - before;
            }
            curve.push((allocations, fastest));
        }
    }
    println!("{:20} {:>24} {:>24} {:>24}", "", "100 peers", "1,000", "10,000");
    for ((name, _), curve) in DELTAS.iter().zip(&curves) {
        let cell = |(allocations, fastest): &(u64, Duration)| {
            format!("{:>7.1} allocations {fastest:>8.1?}", *allocations as f64 / 200.0)
        };
        println!("{name:20} {}", curve.iter().map(cell).collect::<Vec<_>>().join(" "));
    }
    for ((name, _), curve) in DELTAS.iter().zip(&curves) {
        // Tables of different sizes grow at different times.
        let growth = curve[2].0.abs_diff(curve[0].0);
        assert!(growth <= 10, "{name}: {curve:?}");
        // Whatever looks at each peer is a hundred times slower with a hundred times the peers. The
        // fastest of many runs says little about the machine's other work.
        let slower = curve[2].1.as_secs_f64() / curve[0].1.max(Duration::from_nanos(200)).as_secs_f64();
        assert!(slower < 25.0, "{name} is {slower:.1} times slower: {curve:?}");
    }
}

#[test]
fn a_snapshot_of_ten_thousand_peers_comes_back() {
    let now = Instant::now();
    let bytes = engine(10_000, now).snapshot(now);
    let config = Config {
        node_key: NodePrivate::from_bytes([1; 32]),
        disco_key: DiscoPrivate::from_bytes([2; 32]),
        mtu: 1280,
        random_seed: [3; 32],
        standby: None,
        wall: UnixTime::from_secs(1_800_000_000),
        snapshot: Some(Snapshot::from_bytes(&bytes).expect("our own")),
    };
    let began = Instant::now();
    let back = Engine::new(config, now);
    println!("{} bytes, restored in {:?}", bytes.len(), began.elapsed());
    let peers = back.peers(now);
    assert_eq!(peers.len(), 10_000);
    let last = peers.iter().find(|p| p.id.0 == 10_999).expect("the last one");
    assert_eq!(last.name, "production-web-frontend-9999.tail1234.ts.net");
    assert_eq!((last.key, last.addresses.len()), (peer(9999).key, 2));
}

#[test]
fn a_snapshot_of_too_many_peers_is_cut() {
    let now = Instant::now();
    let bytes = engine(40_000, now).snapshot(now);
    assert!(bytes.len() <= MAX_BYTES && bytes.len() > MAX_BYTES - 1024, "{} bytes", bytes.len());
    assert!(Snapshot::from_bytes(&bytes).is_ok());
}

#[test]
fn a_greedy_map_is_cut_and_counted() {
    let now = Instant::now();
    let mut engine = engine(10, now);
    let before = BYTES.get();
    for n in 0..200u32 {
        let mut node = peer(n + 100);
        node.name = "x".repeat(100_000);
        node.endpoints = vec![node.endpoints[0]; 10_000];
        node.cap_map = (0..2000).map(|cap| (format!("{n}-{cap}-{}", "c".repeat(300)), Vec::new())).collect();
        apply(&mut engine, MapResponse { peers_changed: vec![node], ..MapResponse::default() }, now);
    }
    let each = (BYTES.get() - before) / 200;
    println!("{each} bytes for each greedy peer");
    assert!(each < 2048, "{each}");
    assert_eq!(engine.counters().map_ignored, 200 * (1 + 9968 + 2000));
}

/// What some bytes of the map stream cost.
#[derive(Debug, Default)]
struct Cost {
    all: Duration,
    /// The longest that a packet has to wait.
    turn: Duration,
    /// Rules that were decoded.
    decoded: u64,
    allocations: u64,
}

/// Takes a message as it arrives, in as many turns as packets can have theirs in between.
fn feed(engine: &mut Engine, stream: &mut MapStream, message: &str, now: Instant) -> Cost {
    let mut framed = Vec::with_capacity(message.len() + 4);
    encode(message.as_bytes(), &mut framed).expect("no larger than a message may be");
    let (allocations, decoded) = (ALLOCATIONS.get(), stream.rules_decoded());
    let mut cost = Cost::default();
    let mut note = |began: Instant| {
        cost.all += began.elapsed();
        cost.turn = cost.turn.max(began.elapsed());
    };
    for part in framed.chunks(16 << 10) {
        let mut began = Instant::now();
        stream.push(part);
        while let Some(piece) = stream.next_piece().expect("whole") {
            match piece {
                Piece::Pause => {}
                Piece::Rest(message, 0) => {
                    engine.handle_control(ControlEvent::Map(message), now, &mut Outbox::default());
                }
                odd @ (Piece::Peers(..) | Piece::Rest(..) | Piece::Bad(_)) => panic!("{odd:?}"),
            }
            note(began);
            began = Instant::now();
        }
        note(began);
    }
    while engine.poll_timeout().is_some_and(|at| at <= now) {
        let began = Instant::now();
        engine.handle_timeout(now, &mut Outbox::default());
        note(began);
    }
    while engine.poll_event().is_some() {}
    cost.decoded = stream.rules_decoded() - decoded;
    cost.allocations = ALLOCATIONS.get() - allocations;
    cost
}

/// A filter of forty named chunks, under policies that name thousands of peers by their addresses: hundreds
/// of peers a group, and a tenth of all in some rules. Only what differs from before is decoded.
#[test]
fn what_a_filter_change_costs() {
    let now = Instant::now();
    for peers in SIZES {
        let mut engine = engine(peers, now);
        let mut stream = MapStream::new();
        let addresses = |from: u32, count: u32| -> Vec<String> {
            let own = |n: u32| {
                let [_, _, high, low] = (n % peers).to_be_bytes();
                [format!("100.65.{high}.{low}"), format!("fd7a:115c:a1e0::{:x}", n % peers)]
            };
            // Every other, so that they do not melt into ranges.
            (from..from + count).flat_map(|n| own(n * 2)).collect()
        };
        let rules = |chunk: u32| {
            json!([
                {"SrcIPs": addresses(chunk * 37, peers / 20), "DstPorts": [
                    {"IP": "100.64.0.1/32", "Ports": {"First": 8000 + chunk, "Last": 8000 + chunk}},
                    {"IP": "fd7a:115c:a1e0::1/128", "Ports": {"First": 8000 + chunk, "Last": 8000 + chunk}}]},
                {"SrcIPs": addresses(0, peers / 10), "IPProto": [6], "DstPorts": [
                    {"IP": "*", "Ports": {"First": 443, "Last": 443}}]}])
        };
        let whole = |turn: u32| {
            let of = |n| if n == 7 { rules(n + 41 * turn) } else { rules(n) };
            let chunks: serde_json::Map<_, _> = (0..40).map(|n| (format!("group-{n}"), of(n))).collect();
            json!({"PacketFilters": chunks}).to_string()
        };
        let before = BYTES.get();
        let text = whole(0);
        let length = i64::try_from(text.len()).expect("some megabytes");
        let first = feed(&mut engine, &mut stream, &text, now);
        let again = feed(&mut engine, &mut stream, &text, now);
        drop(text);
        let kept = BYTES.get() - before;
        let changed = feed(&mut engine, &mut stream, &whole(1), now);
        let one = json!({"PacketFilters": {"group-7": rules(7 + 82)}}).to_string();
        let alone = feed(&mut engine, &mut stream, &one, now);
        println!(
            "{peers} peers, 80 rules of {length} bytes of JSON, {kept} in memory ({} a rule)",
            kept / 80
        );
        for (what, cost) in [
            ("new", &first),
            ("again", &again),
            ("again, one chunk changed", &changed),
            ("one chunk", &alone),
        ] {
            println!("  {what}: {cost:?}");
        }
        assert_eq!(engine.gauges(now).filter_rules, 81);
        // All chunks have one rule in common.
        assert_eq!([&first, &again, &changed, &alone].map(|cost| cost.decoded), [41, 0, 1, 1]);
        // The stream's buffers, and the message with its chunks.
        assert!(again.allocations < 400, "{again:?}");
        assert!(kept < 3 * length + (64 << 10), "{kept} for {length}");
    }
}

/// Until the last of its portions is done, the filter before it decides about packets.
#[test]
fn a_large_filter_comes_into_force_as_a_whole() {
    let now = Instant::now();
    let mut engine = engine(10, now);
    let rules = |from: u16| {
        let rule = |port: u16| {
            json!({"SrcIPs": ["100.65.0.1"], "DstPorts": [
                {"IP": "*", "Ports": {"First": port, "Last": port}}]})
        };
        let rules: Vec<_> = (from..from + 3000).map(rule).collect();
        let message = json!({"PacketFilters": {"*": null, "large": rules}}).to_string();
        MapResponse::from_json(message.as_bytes()).expect("a message").0
    };
    let open = |engine: &Engine, dst_port| {
        let (src, dst) = (IpAddr::from([100, 65, 0, 1]), IpAddr::from([100, 64, 0, 1]));
        let question = Question { src, dst, protocol: 6, src_port: 1, dst_port };
        engine.why(question, now).decision == Decision::Accept
    };
    assert!(open(&engine, 80), "everything is open");
    apply(&mut engine, rules(1000), now);
    // More news comes before that is in force.
    apply(&mut engine, rules(5000), now);
    let mut seen = Vec::new();
    let mut portions = 0;
    while engine.poll_timeout().is_some_and(|at| at <= now) {
        let ports = [80, 1000, 3999, 5000, 7999].map(|port| open(&engine, port));
        if seen.last() != Some(&ports) {
            seen.push(ports);
        }
        engine.handle_timeout(now, &mut Outbox::default());
        portions += 1;
    }
    seen.push([80, 1000, 3999, 5000, 7999].map(|port| open(&engine, port)));
    let (before, first) = ([true; 5], [false, true, true, false, false]);
    assert_eq!(seen, [before, first, [false, false, false, true, true]]);
    assert!(portions > 6, "{portions}");
    // What shuts everything needs no portions.
    apply(&mut engine, rules(1000), now);
    let none = json!({"PacketFilters": {"*": null}}).to_string();
    apply(&mut engine, MapResponse::from_json(none.as_bytes()).expect("a message").0, now);
    assert!(!open(&engine, 5000) && engine.gauges(now).filter_rules == 0);
}

/// Traffic of ten peers beside ten thousand idle ones takes the path of a small tailnet's.
#[test]
fn packets_and_timers_look_only_at_active_peers() {
    let start = Instant::now();
    let mut fastest = Vec::new();
    for peers in [20, 10_000] {
        let mut engine = engine(peers, start);
        let mut now = start;
        let mut out = Outbox::default();
        let mut packets = Batch::new();
        for n in 0..10u8 {
            let mut packet = [0; 60];
            packet[0] = 0x45;
            packet[3] = 60;
            packet[9] = 17;
            packet[12..16].copy_from_slice(&Ipv4Addr::new(100, 64, 0, 1).octets());
            packet[16..20].copy_from_slice(&Ipv4Addr::new(100, 65, 0, n).octets());
            assert!(packets.push((), &packet));
        }
        let mut best = Duration::MAX;
        let mut allocations = 0;
        for round in 0..300u32 {
            if round == 100 {
                allocations = ALLOCATIONS.get();
            }
            now += Duration::from_millis(1);
            out.clear();
            let began = Instant::now();
            engine.handle_tun(&mut packets, now, &mut out);
            if engine.poll_timeout().is_some_and(|at| at <= now) {
                engine.handle_timeout(now, &mut out);
            }
            while engine.poll_event().is_some() {}
            best = best.min(began.elapsed());
        }
        fastest.push((best, ALLOCATIONS.get() - allocations));
        let active =
            engine.peers(now).iter().filter(|p| p.addresses[0] < IpAddr::from([100, 65, 0, 10])).count();
        assert_eq!(active, 10);
    }
    println!("ten packets and the timers: {fastest:?}");
    let slower = fastest[1].0.as_secs_f64() / fastest[0].0.as_secs_f64();
    assert!(slower < 10.0, "{slower:.1} times slower: {fastest:?}");
    assert!(fastest[1].1.abs_diff(fastest[0].1) < 50, "{fastest:?}");
}

/// A thousand deltas a second for a minute, from the bytes of the stream to the snapshots they cause.
#[test]
fn a_minute_of_a_thousand_deltas_a_second_leaves_memory_as_it_was() {
    const PEERS: u32 = 10_000;
    let start = Instant::now();
    let empty = BYTES.get();
    let mut engine = engine(PEERS, start);
    let began_with = BYTES.get() - empty;
    let (mut most, mut spent, mut slowest) = (0, Duration::ZERO, Duration::ZERO);
    let (mut snapshots, mut writer, mut piece) = (0, None, Vec::new());
    let mut stream = MapStream::new();
    let mut now = start;
    for turn in 0..60_000u32 {
        // Every peer in turn, far from the one before.
        let n = turn.wrapping_mul(7919) % PEERS;
        let id = n + 1000;
        let message = match turn % 4 {
            0 => json!({"PeersChangedPatch": [{"NodeID": id, "DERPRegion": turn % 20 + 1,
                "Endpoints": [format!("192.0.2.1:{}", turn % 60_000 + 1), "10.1.2.3:41641"]}]}),
            1 => json!({"OnlineChange": {id.to_string(): turn % 8 == 1}}),
            2 => json!({"PeersRemoved": [id]}),
            _ => {
                // The one that the turn before removed.
                let n = (turn - 1).wrapping_mul(7919) % PEERS;
                json!({"PeersChanged": [node_json(n, turn)]})
            }
        };
        let text = message.to_string().into_bytes();
        let mut framed = Vec::with_capacity(text.len() + 4);
        encode(&text, &mut framed).expect("short");
        drop((text, message));
        now += Duration::from_millis(1);

        let began = Instant::now();
        stream.push(&framed);
        while let Some(piece) = stream.next_piece().expect("whole") {
            let event = match piece {
                Piece::Peers(list, nodes) => ControlEvent::Peers { list, nodes },
                Piece::Rest(message, 0) => ControlEvent::Map(message),
                odd @ (Piece::Pause | Piece::Rest(..) | Piece::Bad(_)) => panic!("{odd:?}"),
            };
            engine.handle_control(event, now, &mut Outbox::default());
        }
        if engine.poll_timeout().is_some_and(|at| at <= now) {
            engine.handle_timeout(now, &mut Outbox::default());
        }
        while let Some(event) = engine.poll_event() {
            if event == Event::SnapshotDirty && writer.is_none() {
                writer = Some(engine.begin_snapshot(now, &mut piece));
                snapshots += 1;
            }
        }
        if let Some(under_way) = writer.as_mut()
            && !engine.continue_snapshot(under_way, &mut piece)
        {
            writer = None;
        }
        let took = began.elapsed();
        spent += took;
        slowest = slowest.max(took);
        piece.clear();
        most = most.max(BYTES.get() - empty);
    }
    let ends_with = BYTES.get() - empty;
    println!(
        "{PEERS} peers, 60,000 deltas: {began_with} bytes before, {ends_with} after, {most} at most; \
         {spent:?} of work in 60 s, the longest {slowest:?}; {snapshots} snapshots"
    );
    assert_eq!(engine.gauges(now).peers, 10_000);
    assert!(snapshots > 0, "restarts would be cold");
    let bound = i64::from(PEERS) * 1024;
    assert!(most <= bound, "{most} bytes at most for {PEERS} peers");
    assert!(ends_with <= began_with + began_with / 10, "{began_with} bytes became {ends_with}");
}

fn node_json(n: u32, turn: u32) -> serde_json::Value {
    let [_, _, high, low] = n.to_be_bytes();
    let mut key = [7; 32];
    key[..4].copy_from_slice(&n.to_be_bytes());
    let own = json!([format!("100.65.{high}.{low}/32"), format!("fd7a:115c:a1e0::{n:x}/128")]);
    json!({
        "ID": n + 1000, "StableID": format!("n{n}CNTRL"), "Name": format!("production-web-frontend-{n}.tail1234.ts.net."),
        "User": 4321, "Key": NodePublic::from_bytes(key), "DiscoKey": DiscoPublic::from_bytes(key),
        "KeyExpiry": "2030-01-01T00:00:00Z", "Created": "2024-01-01T00:00:00Z", "Addresses": own, "AllowedIPs": own,
        "Endpoints": [format!("192.0.2.9:{}", turn % 60_000 + 1), "10.1.2.3:41641", "[2001:db8::1]:41641"],
        "HomeDERP": 1, "Cap": 115, "Online": true, "MachineAuthorized": true, "Tags": ["tag:web", "tag:prod"],
        "CapMap": {"https://tailscale.com/cap/is-admin": null, "funnel": [1]},
        "Hostinfo": {"OS": "linux", "Hostname": format!("production-web-frontend-{n}")},
    })
}
