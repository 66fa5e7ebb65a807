//! What a packet costs before it is a packet of the pod's: headers, flows, rules, and a name.

use std::net::IpAddr;

use divan::{Bencher, black_box};
use ipnet::IpNet;
use podtether_core::dns::{Asked, Client, Dns};
use podtether_core::filter::{Filter, FilterState};
use podtether_core::packet::Parsed;
use podtether_core::tailcfg::{DnsConfig, FilterRule, NetPortRange, Node, NodeId, PortRange};

fn main() {
    divan::main();
}

/// A UDP packet of a peer to `port` of this node.
fn packet(port: u16) -> Vec<u8> {
    let mut p = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 100, 64, 9, 9, 100, 64, 0, 1, 0, 9];
    p.extend(port.to_be_bytes());
    p.extend([0, 8, 0, 0]);
    p
}

/// Each rule lets 200 sources reach one port; the packet's source is in every one.
fn filter(rules: u16) -> FilterState {
    let sources: Vec<String> = (0..200).map(|n| format!("100.64.9.{n}")).collect();
    let rule = |n| FilterRule {
        src_ips: sources.clone(),
        dst_ports: vec![NetPortRange { ip: "100.64.0.1".into(), ports: PortRange { first: n, last: n } }],
        ..FilterRule::default()
    };
    let rules: Vec<FilterRule> = (1..=rules).map(rule).collect();
    let own: Vec<IpNet> = "100.64.0.1/32".parse().into_iter().collect();
    FilterState::new(Filter::compile(Some(&rules), &own))
}

#[divan::bench]
fn parse(bencher: Bencher<'_, '_>) {
    let packet = packet(80);
    bencher.bench_local(|| Parsed::parse(black_box(&packet)));
}

#[divan::bench]
fn known_flow(bencher: Bencher<'_, '_>) {
    let mut state = filter(500);
    let Ok(inbound) = Parsed::parse(&packet(1)) else { return };
    let outbound =
        Parsed { src: inbound.dst, dst: inbound.src, src_port: 1, dst_port: inbound.src_port, ..inbound };
    state.note_out(&outbound);
    bencher.bench_local(|| state.check_in(black_box(&inbound), |_| false));
}

#[divan::bench(args = [10, 500, 5000])]
fn last_rule(bencher: Bencher<'_, '_>, rules: u16) {
    let mut state = filter(rules);
    let Ok(inbound) = Parsed::parse(&packet(rules)) else { return };
    bencher.bench_local(|| state.check_in(black_box(&inbound), |_| false));
}

#[divan::bench(args = [10, 10_000])]
fn magic_name(bencher: Bencher<'_, '_>, nodes: u32) {
    let mut dns = Dns::new([0; 32]);
    let node = |n: u32| Node {
        id: NodeId(n.into()),
        name: format!("node-{n}.tail.example."),
        addresses: vec![IpAddr::V4((0x6440_0000 + n).into()).into()],
        ..Node::default()
    };
    dns.configure(&node(0), &DnsConfig::default());
    (0..nodes).for_each(|n| dns.upsert(&node(n)));
    let mut query = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["node-7", "tail", "example"] {
        query.extend(u8::try_from(label.len()));
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let client = Client { listener: 0, from: ([100, 64, 0, 0], 4000).into(), stream: None };
    let now = std::time::Instant::now();
    bencher.bench_local(|| {
        dns.handle_query(Asked { client, meant_for: None }, black_box(&query), now);
        dns.poll_action()
    });
}
