//! Rules that are kept and filters that are put together in portions decide as a whole compile does.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::map_stream::{MapStream, Piece, encode};
use crate::netmap::NetMap;
use crate::packet::build::{ip, ports};
use crate::packet::tcp_flag::SYN;
use crate::tailcfg::UnixTime;

const SOURCES: [&str; 7] =
    ["100.64.0.1", "100.64.0.0/30", "100.64.0.2-100.64.0.5", "fd7a::1", "fd7a::/126", "*", "cap:web"];
const DESTINATIONS: [&str; 5] = ["100.64.0.9", "100.64.0.8/30", "fd7a::9", "*", "10.0.0.0/8"];
const CHUNKS: [&str; 4] = ["base", "b", "quo\"te", "*"];

/// The same few over and over, so that most are known already.
fn rule_json(seed: u16) -> Value {
    let pick = |at: u32, n: usize| usize::from(seed.rotate_right(at)) % n;
    let port = 80 + pick(3, 3);
    let mut rule = json!({
        "SrcIPs": [SOURCES[pick(0, 7)], SOURCES[pick(2, 7)]],
        "DstPorts": [{"IP": DESTINATIONS[pick(4, 5)], "Ports": {"First": port, "Last": port + pick(6, 2)}}],
    });
    match pick(7, 5) {
        0 => rule["IPProto"] = json!([6]),
        1 => rule["IPProto"] = json!([17, 1]),
        2 => rule["SrcIPs"] = json!(["nonsense", "100.64.0.3"]),
        _ => {}
    }
    rule
}

/// A message as JSON, and what it does to chunks that nobody keeps.
fn message(
    updates: &[(usize, Option<Vec<u16>>)],
    first: bool,
    model: &mut BTreeMap<String, Vec<Value>>,
) -> Value {
    let mut message = json!({});
    if first {
        message["Node"] = json!({"ID": 1, "Key": format!("nodekey:{:064x}", 1),
            "Addresses": ["100.64.0.9/32", "fd7a::9/128"]});
        model.clear();
    }
    let updates: BTreeMap<&str, Option<Vec<Value>>> = updates
        .iter()
        .map(|(at, rules)| {
            // Only null has a meaning for all chunks.
            let rules = rules.as_ref().filter(|_| CHUNKS[*at] != "*");
            (CHUNKS[*at], rules.map(|rules| rules.iter().map(|seed| rule_json(*seed)).collect()))
        })
        .collect();
    if updates.contains_key("*") {
        model.clear();
    }
    for (name, rules) in &updates {
        match rules {
            Some(rules) => drop(model.insert((*name).to_owned(), rules.clone())),
            None => drop(model.remove(*name)),
        }
    }
    message["PacketFilters"] = json!(updates);
    message
}

fn verdicts(filter: &Filter) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for (sources, dst) in [
        (["100.64.0.1", "100.64.0.3", "100.64.0.5", "100.64.0.77"], "100.64.0.9"),
        (["fd7a::1", "fd7a::3", "fd7a::5", "fd7a::77"], "fd7a::9"),
    ] {
        for (src, port, protocol) in
            sources.iter().flat_map(|src| (79..85).flat_map(move |port| [6, 17].map(|p| (src, port, p))))
        {
            let packet = ip(src, dst, protocol, &ports(9, port, SYN));
            let packet = Parsed::parse(&packet).unwrap();
            verdicts.push(filter.judge(&packet, |_| false, Some(|cap: &str| cap == "web" && port == 80)));
        }
    }
    verdicts
}

proptest! {
    /// Through the decoder, the netmap and the tables.
    #[test]
    fn any_changes_come_to_what_a_whole_compile_comes_to(
        messages in proptest::collection::vec(
            (
                proptest::collection::vec(
                    (0..CHUNKS.len(), proptest::option::of(proptest::collection::vec(0_u16..40, 0..4))),
                    0..4,
                ),
                proptest::bool::weighted(0.2),
            ),
            1..12,
        ),
        cut in 1_usize..200,
        portion in 1_usize..9,
    ) {
        let own = ["100.64.0.9/32".parse().unwrap(), "fd7a::9/128".parse().unwrap()];
        let (mut stream, mut netmap) = (MapStream::new(), NetMap::new());
        let (mut in_force, mut model) = (FilterState::default(), BTreeMap::new());
        for (n, (updates, anew)) in messages.into_iter().enumerate() {
            if anew {
                stream.restart();
                netmap.begin_session();
            }
            let text = message(&updates, anew || n == 0, &mut model).to_string();
            let mut framed = Vec::new();
            encode(text.as_bytes(), &mut framed).unwrap();
            for part in framed.chunks(cut) {
                stream.push(part);
                while let Some(piece) = stream.next_piece().unwrap() {
                    let Piece::Rest(mut rest, 0) = piece else { panic!("{piece:?} of {text}") };
                    let change = netmap.apply(&mut rest, UnixTime::default()).unwrap();
                    if change.filter_changed {
                        let chunks = netmap.packet_filter().into_iter().flatten();
                        let chunks = chunks.map(|(name, rules)| (name.as_str(), rules.as_slice()));
                        let mut build = FilterBuild::begin(chunks, &own);
                        while !build.go_on(portion) {}
                        in_force.set_filter(build.finish());
                    }
                }
            }
            let chunks: Vec<(&String, Vec<FilterRule>)> = model
                .iter()
                .map(|(name, rules)| (name, serde_json::from_value(json!(rules)).unwrap()))
                .collect();
            let whole = Filter::of_chunks(
                chunks.iter().map(|(name, rules)| (name.as_str(), rules.as_slice())),
                &own,
            );
            if n > 0 || !model.is_empty() {
                prop_assert_eq!(verdicts(in_force.filter()), verdicts(&whole), "{}", text);
                prop_assert_eq!(in_force.filter().rules(), whole.rules());
                prop_assert_eq!(in_force.filter().skipped(), whole.skipped());
            }
        }
    }
}

#[test]
fn what_is_there_is_not_decoded_again_and_what_is_gone_is_forgotten() {
    let mut book = RuleBook::default();
    let json = rule_json(3).to_string();
    let one = book.rule(json.as_bytes()).unwrap();
    assert!(book.rule(json.as_bytes()).unwrap().is(&one));
    assert_eq!(book.decoded(), 1);
    // Another rule with the same sources shares them.
    let mut other = rule_json(3);
    other["DstPorts"][0]["Ports"]["Last"] = json!(999);
    let other = book.rule(other.to_string().as_bytes()).unwrap();
    assert!(std::sync::Arc::ptr_eq(&one.kept().v4.sources, &other.kept().v4.sources));
    drop((one, other));
    book.sweep();
    assert_eq!(format!("{book:?}"), "RuleBook { rules: 0, .. }");
    book.rule(json.as_bytes()).unwrap();
    assert_eq!(book.decoded(), 3);
}

#[test]
fn a_rule_is_as_large_as_it_says() {
    let sources: Vec<String> = (0..1000).map(|n| format!("100.64.{}.{}", n / 100, n % 100 * 2)).collect();
    let json = json!({"SrcIPs": sources}).to_string();
    let rule = RuleBook::default().rule(json.as_bytes()).unwrap();
    let known = json.len() + 1000 * 8;
    assert!((known..known + 1000).contains(&rule.footprint()), "{} for {known}", rule.footprint());
}
