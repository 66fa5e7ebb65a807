mod forward;

use std::net::IpAddr;

use hickory_proto::op::{Edns, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData};
use proptest::prelude::*;

use super::names::CAP_PEER_AAAA;
use super::wire::HEADER;
use super::*;
use crate::tailcfg::{DnsRecord, Resolver};

#[test]
fn nodes_are_found_by_name_in_any_case() {
    let mut magic = tailnet();
    for name in ["web.tail1.ts.net.", "WEB.Tail1.TS.net.", "web.tail1.ts.net"] {
        let reply = ask(&mut magic, name, RecordType::A);
        assert_eq!(code(&reply), ResponseCode::NoError, "{name}");
        assert!(reply.metadata.authoritative);
        assert_eq!(addresses(&reply), ["100.64.0.2"]);
        assert_eq!(reply.answers[0].ttl, 5);
        assert_eq!(reply.answers[0].name, reply.queries[0].name);
    }
    let asked = ask(&mut magic, "wEb.tail1.ts.net.", RecordType::A);
    assert_eq!(asked.queries[0].name.to_ascii(), "wEb.tail1.ts.net.", "the question comes back as it was");
    assert_eq!(addresses(&ask(&mut magic, "me.tail1.ts.net.", RecordType::A)), ["100.64.0.1"]);
    assert_eq!(addresses(&ask(&mut magic, "shared.tail2.ts.net.", RecordType::A)), ["100.64.0.9"]);
}

#[test]
fn ipv6_is_told_where_it_can_be_relied_upon() {
    // (self has v4, capability, queried, A answers, AAAA answers)
    let both = ("100.64.0.2", "fd7a:115c:a1e0::2");
    type Told<'a> = &'a [&'a str];
    let table: [(bool, bool, &str, Told<'_>, Told<'_>); 5] = [
        (true, false, "web", &[both.0], &[]),
        (true, true, "web", &[both.0], &[both.1]),
        (false, false, "web", &[], &[both.1]),
        (true, false, "six", &[], &["fd7a:115c:a1e0::6"]),
        (false, true, "six", &[], &["fd7a:115c:a1e0::6"]),
    ];
    for (v4, cap, host, a, aaaa) in table {
        let mut me = node(1, "me.tail1.ts.net.", &["fd7a:115c:a1e0::1"]);
        if v4 {
            me.addresses.push("100.64.0.1/32".parse().unwrap());
        }
        if cap {
            me.cap_map.insert(CAP_PEER_AAAA.into(), Vec::new());
        }
        let mut magic = tailnet();
        magic.configure(&me, &DnsConfig { proxied: true, ..DnsConfig::default() });
        let name = format!("{host}.tail1.ts.net.");
        for (kind, expected) in [(RecordType::A, a), (RecordType::AAAA, aaaa)] {
            let reply = ask(&mut magic, &name, kind);
            assert_eq!(code(&reply), ResponseCode::NoError);
            assert_eq!(addresses(&reply), expected, "{host} {kind} v4 {v4} cap {cap}");
            assert_eq!(reply.authorities.len(), usize::from(expected.is_empty()));
        }
        assert_eq!(addresses(&ask(&mut magic, &name, RecordType::ANY)), [a, aaaa].concat());
    }
}

#[test]
fn what_is_not_there_does_not_exist_in_our_zones() {
    let mut magic = tailnet();
    for name in ["gone.tail1.ts.net.", "a.web.tail1.ts.net.", "x.local.example.", "sp ace.tail1.ts.net."] {
        for kind in [RecordType::A, RecordType::AAAA, RecordType::MX, RecordType::PTR] {
            let reply = ask(&mut magic, name, kind);
            assert_eq!(code(&reply), ResponseCode::NXDomain, "{name}");
            assert!(reply.metadata.authoritative && reply.answers.is_empty());
            let soa = &reply.authorities[0];
            assert_eq!((soa.ttl, soa.record_type()), (10, RecordType::SOA));
            assert!(matches!(&soa.data, RData::SOA(data) if data.minimum == 10));
            assert!(soa.name.zone_of(&reply.queries[0].name));
        }
    }
}

#[test]
fn a_name_without_the_type_asked_for_still_exists() {
    let mut magic = tailnet();
    let table = [
        ("web.tail1.ts.net.", RecordType::MX),
        ("web.tail1.ts.net.", RecordType::Unknown(9824)),
        ("db.tail1.ts.net.", RecordType::AAAA),
        // The zones themselves, and a name that only has names below it.
        ("tail1.ts.net.", RecordType::A),
        ("local.example.", RecordType::SOA),
        ("below.tail1.ts.net.", RecordType::A),
        ("2.0.64.100.in-addr.arpa.", RecordType::A),
        ("64.100.in-addr.arpa.", RecordType::NS),
        ("0.64.100.in-addr.arpa.", RecordType::PTR),
    ];
    for (name, kind) in table {
        let reply = ask(&mut magic, name, kind);
        assert_eq!(code(&reply), ResponseCode::NoError, "{name}");
        assert!(reply.answers.is_empty(), "{name}");
        assert_eq!(reply.authorities[0].ttl, 10, "{name}");
    }
}

#[test]
fn further_records_are_answered_inside_and_outside_the_zones() {
    let mut magic = tailnet();
    assert_eq!(addresses(&ask(&mut magic, "db.tail1.ts.net.", RecordType::A)), ["100.64.0.3", "100.64.0.4"]);
    assert_eq!(addresses(&ask(&mut magic, "intern.example.com.", RecordType::AAAA)), ["2001:db8::1"]);
    assert_eq!(addresses(&ask(&mut magic, "x.below.tail1.ts.net.", RecordType::A)), ["100.64.0.5"]);
    assert_eq!(
        addresses(&ask(&mut magic, "web.tail1.ts.net.", RecordType::ANY)),
        ["100.64.0.2", "fd7a:115c:a1e0::99"],
        "beside a node's own"
    );
    assert_eq!(code(&ask(&mut magic, "other.example.com.", RecordType::A)), ResponseCode::Refused);
    let reply = ask(&mut magic, "intern.example.com.", RecordType::A);
    assert_eq!((code(&reply), reply.authorities.len()), (ResponseCode::NoError, 0), "no zone of ours");
    for odd in ["bad1", "bad2", "bad3"] {
        let reply = ask(&mut magic, &format!("{odd}.tail1.ts.net."), RecordType::A);
        assert_eq!(code(&reply), ResponseCode::NXDomain, "{odd}");
    }
}

#[test]
fn addresses_have_names() {
    let mut magic = tailnet();
    let v6 = "2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa.";
    for name in ["2.0.64.100.in-addr.arpa.", v6, "2.0.64.100.IN-ADDR.arpa."] {
        for kind in [RecordType::PTR, RecordType::ANY] {
            let reply = ask(&mut magic, name, kind);
            assert_eq!(reply.answers[0].data.to_string(), "web.tail1.ts.net.", "{name}");
            assert!(reply.metadata.authoritative);
        }
    }
    for name in ["77.0.64.100.in-addr.arpa.", "x.0.64.100.in-addr.arpa.", &v6.replacen('2', "7", 1)] {
        assert_eq!(code(&ask(&mut magic, name, RecordType::PTR)), ResponseCode::NXDomain, "{name}");
    }
    for name in ["8.8.8.8.in-addr.arpa.", "in-addr.arpa.", "100.in-addr.arpa."] {
        assert_eq!(code(&ask(&mut magic, name, RecordType::PTR)), ResponseCode::Refused, "{name}");
    }
}

#[test]
fn everything_else_is_refused() {
    let mut magic = tailnet();
    for name in
        ["example.com.", ".", "xtail1.ts.net.", "ts.net.", "web.", "kubernetes.default.svc.cluster.local."]
    {
        let reply = ask(&mut magic, name, RecordType::A);
        assert_eq!(code(&reply), ResponseCode::Refused, "{name}");
        assert!(!reply.metadata.authoritative);
        assert_eq!(reply.queries.len(), 1);
    }
    let mut chaos = query("web.tail1.ts.net.", RecordType::A);
    chaos.queries[0].query_class = DNSClass::CH;
    assert_eq!(code(&exchange(&mut magic, &chaos)), ResponseCode::Refused);
    assert_eq!(code(&ask(&mut Dns::new([7; 32]), "web.tail1.ts.net.", RecordType::A)), ResponseCode::Refused);
}

#[test]
fn changes_of_nodes_show_at_once() {
    let mut magic = tailnet();
    let a =
        |magic: &mut Dns, name: &str| addresses(&ask(magic, &format!("{name}.tail1.ts.net."), RecordType::A));
    magic.upsert(&node(2, "www.tail1.ts.net.", &["100.64.0.22"]));
    assert!(a(&mut magic, "web").is_empty(), "only the further AAAA record is left");
    assert_eq!(a(&mut magic, "www"), ["100.64.0.22"]);
    assert_eq!(code(&ask(&mut magic, "2.0.64.100.in-addr.arpa.", RecordType::PTR)), ResponseCode::NXDomain);
    assert_eq!(code(&ask(&mut magic, "22.0.64.100.in-addr.arpa.", RecordType::PTR)), ResponseCode::NoError);

    // A name and an address that move between nodes, in the order that could lose them.
    magic.upsert(&node(3, "www.tail1.ts.net.", &["100.64.0.22"]));
    magic.upsert(&node(2, "old.tail1.ts.net.", &["100.64.0.23"]));
    assert_eq!(a(&mut magic, "www"), ["100.64.0.22"]);
    assert_eq!(a(&mut magic, "old"), ["100.64.0.23"]);
    magic.remove(NodeId(2));
    assert_eq!(code(&ask(&mut magic, "old.tail1.ts.net.", RecordType::A)), ResponseCode::NXDomain);
    assert_eq!(a(&mut magic, "www"), ["100.64.0.22"]);

    magic.upsert(&node(3, "not a name", &["100.64.0.22"]));
    assert_eq!(code(&ask(&mut magic, "www.tail1.ts.net.", RecordType::A)), ResponseCode::NXDomain);
    magic.clear_nodes();
    assert!(magic.is_empty());
    assert_eq!(a(&mut magic, "db").len(), 2, "further records stay");
}

#[test]
fn edns_is_answered_in_kind() {
    let mut magic = tailnet();
    assert!(ask(&mut magic, "web.tail1.ts.net.", RecordType::A).edns.is_none());
    for dnssec_ok in [false, true] {
        let mut asked = query("web.tail1.ts.net.", RecordType::A);
        let mut edns = Edns::new();
        edns.set_max_payload(4096).set_dnssec_ok(dnssec_ok);
        asked.set_edns(edns);
        let reply = exchange(&mut magic, &asked);
        let edns = reply.edns.as_ref().unwrap();
        assert_eq!((edns.max_payload(), edns.version(), edns.flags().dnssec_ok), (1232, 0, dnssec_ok));
        assert_eq!(addresses(&reply), ["100.64.0.2"]);
    }
    let mut asked = query("web.tail1.ts.net.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_version(1);
    asked.set_edns(edns);
    let reply = exchange(&mut magic, &asked);
    assert_eq!(u16::from(code(&reply)), u16::from(ResponseCode::BADVERS));
    assert!(reply.answers.is_empty());
}

#[test]
fn an_answer_too_long_for_the_asker_is_cut_and_says_so() {
    let mut magic = Dns::new([7; 32]);
    let extra_records = (0..60)
        .map(|n| DnsRecord { name: "many.example.".into(), r#type: "A".into(), value: format!("10.0.0.{n}") })
        .collect();
    magic.configure(&Node::default(), &DnsConfig { extra_records, ..DnsConfig::default() });
    let mut asked = query("many.example.", RecordType::A);
    let reply = exchange(&mut magic, &asked);
    assert!(reply.metadata.truncation && reply.answers.is_empty());
    let mut edns = Edns::new();
    edns.set_max_payload(1232);
    asked.set_edns(edns);
    let reply = exchange(&mut magic, &asked);
    assert!(!reply.metadata.truncation);
    assert_eq!(reply.answers.len(), 60);
}

#[test]
fn what_is_no_query_gets_no_answer_or_an_error_and_is_counted() {
    let mut magic = tailnet();
    let good = query("web.tail1.ts.net.", RecordType::A).to_vec().unwrap();
    let count = |magic: &Dns, name: &str| magic.counts().find(|(n, _)| *n == name).unwrap().1;
    for short in 0..HEADER {
        assert_eq!(answer(&mut magic, &good[..short]), None);
    }
    assert_eq!(count(&magic, "dns_short"), 12);
    let mut response = good.clone();
    response[2] |= 0x80;
    assert_eq!(answer(&mut magic, &response), None);
    assert_eq!(count(&magic, "dns_not_a_question"), 1);

    let failed = |magic: &mut Dns, bytes: &[u8]| {
        let reply = answer(magic, bytes).unwrap();
        assert_eq!((reply.len(), &reply[..2], reply[2] & 0x80), (HEADER, &bytes[..2], 0x80));
        reply[3] & 0x0f
    };
    for cut in HEADER..good.len() {
        assert_eq!(failed(&mut magic, &good[..cut]), 1, "cut at {cut}");
    }
    for questions in [[0, 0], [0, 2], [255, 255]] {
        let mut bytes = good.clone();
        bytes[4..6].copy_from_slice(&questions);
        assert_eq!(failed(&mut magic, &bytes), 1, "{questions:?} questions");
    }
    let mut endless = good.clone();
    endless[HEADER..HEADER + 2].copy_from_slice(&[0xc0, 12]);
    assert_eq!(failed(&mut magic, &endless), 1, "a name that points to itself");
    let malformed = u64::try_from(good.len() - HEADER).unwrap() + 4;
    assert_eq!(count(&magic, "dns_malformed"), malformed);
    for op_code in [1, 2, 4, 5, 15] {
        let mut bytes = good.clone();
        bytes[2] = bytes[2] & 0x87 | op_code << 3;
        assert_eq!(failed(&mut magic, &bytes), 4, "opcode {op_code}");
    }
    assert_eq!(count(&magic, "dns_operation"), 5);
}

#[test]
fn of_two_nodes_with_one_name_or_address_the_other_takes_over() {
    let mut magic = tailnet();
    let a = |magic: &mut Dns| addresses(&ask(magic, "twin.tail1.ts.net.", RecordType::A));
    let ptr = |magic: &mut Dns| addresses(&ask(magic, "40.0.64.100.in-addr.arpa.", RecordType::PTR));
    let twin = |id: u64, ip: &str| node(id, "twin.tail1.ts.net.", &[ip, "100.64.0.40"]);
    for (id, ip) in [(21, "100.64.0.21"), (22, "100.64.0.22"), (23, "100.64.0.23")] {
        magic.upsert(&twin(id, ip));
    }
    assert_eq!(a(&mut magic), ["100.64.0.23", "100.64.0.40"], "the one told about last");
    magic.upsert(&twin(21, "100.64.0.21"));
    assert_eq!(a(&mut magic)[0], "100.64.0.23", "no news is no change");
    magic.remove(NodeId(22));
    assert_eq!(a(&mut magic)[0], "100.64.0.23");
    magic.upsert(&node(23, "else.tail1.ts.net.", &["100.64.0.23"]));
    assert_eq!(a(&mut magic)[0], "100.64.0.21");
    assert_eq!(ptr(&mut magic), ["twin.tail1.ts.net."]);
    magic.remove(NodeId(21));
    assert_eq!(code(&ask(&mut magic, "twin.tail1.ts.net.", RecordType::A)), ResponseCode::NXDomain);
    assert!(ptr(&mut magic).is_empty());
    assert_eq!(addresses(&ask(&mut magic, "else.tail1.ts.net.", RecordType::A)), ["100.64.0.23"]);
}

#[test]
fn without_magicdns_nothing_is_said_about_names_that_are_not_there() {
    let mut magic = tailnet();
    let me = node(1, "me.tail1.ts.net.", &["100.64.0.1"]);
    magic.configure(&me, &DnsConfig { proxied: false, ..config() });
    assert_eq!(addresses(&ask(&mut magic, "me.tail1.ts.net.", RecordType::A)), ["100.64.0.1"]);
    for (name, kind) in [("gone.tail1.ts.net.", RecordType::A), ("9.9.64.100.in-addr.arpa.", RecordType::PTR)]
    {
        assert_eq!(code(&ask(&mut magic, name, kind)), ResponseCode::Refused, "{name}");
    }
    assert_eq!(code(&ask(&mut magic, "x.local.example.", RecordType::A)), ResponseCode::NXDomain);
}

#[test]
fn names_of_special_use() {
    let mut magic = tailnet();
    let service = "magicdns.localhost-tailscale-daemon.";
    assert_eq!(addresses(&ask(&mut magic, service, RecordType::A)), ["100.100.100.100"]);
    assert_eq!(addresses(&ask(&mut magic, service, RecordType::AAAA)), ["fd7a:115c:a1e0::53"]);
    let ptr = ask(&mut magic, "100.100.100.100.in-addr.arpa.", RecordType::PTR);
    assert_eq!(addresses(&ptr), [service]);
    for name in ["192-168-1-2-via-7.", "192-168-1-2-via-0x7.tail9.ts.net."] {
        let addresses = addresses(&ask(&mut magic, name, RecordType::AAAA));
        assert_eq!(addresses, ["fd7a:115c:a1e0:b1a:0:7:c0a8:102"], "{name}");
        let a = ask(&mut magic, name, RecordType::A);
        assert_eq!((code(&a), a.answers.len()), (ResponseCode::NoError, 0), "{name}");
    }
    for name in ["192-168-1-2-via-.", "192-168-1-via-7.", "192-168-1-2-via-7.example.com.", "-via-."] {
        assert_eq!(code(&ask(&mut magic, name, RecordType::AAAA)), ResponseCode::Refused, "{name}");
    }
    let onion = ask(&mut magic, "facebookcorewwwi.onion.", RecordType::A);
    assert_eq!(code(&onion), ResponseCode::NXDomain);
    assert_eq!(code(&ask(&mut magic, "xonion.", RecordType::A)), ResponseCode::Refused);
}

proptest! {
    #[test]
    fn fuzz_any_bytes_are_survived(mut bytes in proptest::collection::vec(any::<u8>(), 0..600),
                                   tidy in any::<bool>()) {
        if tidy && bytes.len() >= HEADER {
            bytes[2] &= 0x07;
            bytes[4..6].copy_from_slice(&[0, 1]);
        }
        check_reply(&bytes)?;
    }

    #[test]
    fn fuzz_damaged_queries_are_survived(
        host in "[a-zA-Z0-9_-]{1,12}", at in any::<prop::sample::Index>(), byte in any::<u8>(),
        kind in any::<u16>(), edns in any::<bool>(),
    ) {
        let mut asked = query(&format!("{host}.tail1.ts.net."), RecordType::from(kind));
        if edns {
            asked.set_edns(Edns::new());
        }
        let mut bytes = asked.to_vec().unwrap();
        check_reply(&bytes)?;
        let at = at.index(bytes.len());
        bytes[at] = byte;
        check_reply(&bytes)?;
    }

    #[test]
    fn fuzz_names_from_the_netmap_are_survived(names in proptest::collection::vec(".{0,40}|[a-z.-]{0,300}", 0..8)) {
        let mut magic = tailnet();
        let mut id = 100;
        for name in &names {
            magic.upsert(&node(id, name, &["100.64.7.7"]));
            magic.configure(&node(id, name, &["100.64.7.7"]), &config());
            id += 1;
            let _ = ask(&mut magic, "7.7.64.100.in-addr.arpa.", RecordType::PTR);
        }
        for id in 100..id {
            magic.remove(NodeId(id));
        }
        prop_assert_eq!(magic.len(), tailnet().len());
    }
}

fn check_reply(bytes: &[u8]) -> Result<(), TestCaseError> {
    // Told apart by the address that they come from: passed on where a name server was meant, or answered.
    let mut magic = tailnet();
    magic.set_capacity(Capacity { udp4: 1, udp6: 1, tcp4: 1, tcp6: 1 });
    for meant_for in [None, Some("10.96.0.10:53".parse().unwrap())] {
        magic.handle_query(Asked { client: client(), meant_for }, bytes, Instant::now());
        while let Some(action) = magic.poll_action() {
            match action {
                Action::Reply { to, message: reply } => {
                    prop_assert_eq!(to, client());
                    prop_assert!(reply.len() >= HEADER && reply.len() <= 1232);
                    prop_assert_eq!(&reply[..2], &bytes[..2]);
                    let parsed = Message::from_vec(&reply).expect("a reply is a DNS message");
                    prop_assert_eq!(parsed.metadata.message_type, MessageType::Response);
                    if let (Ok(asked), false) = (Message::from_vec(bytes), parsed.queries.is_empty()) {
                        prop_assert_eq!(asked.queries, parsed.queries);
                    }
                }
                Action::Ask { server, message, .. } => {
                    prop_assert_eq!(
                        Some(server),
                        meant_for,
                        "a route's resolver is asked for its names alone"
                    );
                    prop_assert_eq!(message, bytes);
                }
                Action::Stop { .. } => {}
            }
        }
    }
    Ok(())
}

fn client() -> Client {
    Client { listener: 3, from: "100.64.0.1:4711".parse().unwrap(), stream: None }
}

/// What a query to the service address is answered at once.
fn answer(dns: &mut Dns, query: &[u8]) -> Option<Vec<u8>> {
    dns.handle_query(Asked { client: client(), meant_for: None }, query, Instant::now());
    let action = dns.poll_action();
    assert_eq!(dns.poll_action(), None);
    action.map(|action| {
        let Action::Reply { to, message } = action else { panic!("{action:?}") };
        assert_eq!(to, client());
        message
    })
}

fn node(id: u64, name: &str, addresses: &[&str]) -> Node {
    let addresses = addresses.iter().map(|a| a.parse::<IpAddr>().unwrap().into()).collect();
    Node { id: NodeId(id), name: name.into(), addresses, ..Node::default() }
}

fn config() -> DnsConfig {
    let record = |name: &str, kind: &str, value: &str| DnsRecord {
        name: name.into(),
        r#type: kind.into(),
        value: value.into(),
    };
    DnsConfig {
        extra_records: vec![
            record("db.tail1.ts.net", "", "100.64.0.3"),
            record("DB.tail1.ts.net.", "A", "100.64.0.4"),
            record("intern.example.com", "AAAA", "2001:db8::1"),
            record("x.below.tail1.ts.net", "A", "100.64.0.5"),
            record("web.tail1.ts.net", "AAAA", "fd7a:115c:a1e0::99"),
            record("bad1.tail1.ts.net", "A", "2001:db8::1"),
            record("bad2.tail1.ts.net", "TXT", "100.64.0.3"),
            record("bad3.tail1.ts.net", "A", "not an address"),
        ],
        routes: [
            ("local.example.".to_owned(), Vec::new()),
            ("corp.example.".to_owned(), vec![Resolver { addr: "10.0.0.1".into(), ..Resolver::default() }]),
        ]
        .into(),
        proxied: true,
        ..DnsConfig::default()
    }
}

fn tailnet() -> Dns {
    let mut magic = Dns::new([7; 32]);
    let me = node(1, "me.tail1.ts.net.", &["100.64.0.1", "fd7a:115c:a1e0::1"]);
    magic.configure(&me, &config());
    magic.upsert(&me);
    magic.upsert(&node(2, "Web.tail1.ts.net.", &["100.64.0.2", "fd7a:115c:a1e0::2"]));
    magic.upsert(&node(6, "six.tail1.ts.net.", &["fd7a:115c:a1e0::6"]));
    magic.upsert(&node(9, "shared.tail2.ts.net.", &["100.64.0.9"]));
    magic
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let labels = name.trim_end_matches('.').split('.').filter(|l| !l.is_empty());
    let mut name = Name::from_labels(labels.map(str::as_bytes)).unwrap();
    name.set_fqdn(true);
    message.add_query(Query::query(name, kind));
    message
}

fn exchange(dns: &mut Dns, query: &Message) -> Message {
    let reply = answer(dns, &query.to_vec().unwrap()).unwrap();
    let reply = Message::from_vec(&reply).unwrap();
    assert_eq!((reply.metadata.id, reply.metadata.message_type), (4711, MessageType::Response));
    assert!(reply.metadata.recursion_desired && reply.metadata.recursion_available);
    reply
}

fn ask(magic: &mut Dns, name: &str, kind: RecordType) -> Message {
    exchange(magic, &query(name, kind))
}

fn code(message: &Message) -> ResponseCode {
    message.metadata.response_code
}

fn addresses(message: &Message) -> Vec<String> {
    message.answers.iter().map(|record| record.data.to_string()).collect()
}

#[test]
fn every_count_is_documented() {
    let document = include_str!("../../../../docs/metrics.md");
    for name in Count::NAMES {
        assert!(document.contains(&format!("\n| `{name}` | ")), "{name} is not in docs/metrics.md");
    }
}
