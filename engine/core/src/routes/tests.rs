use super::*;

fn net(text: &str) -> IpNet {
    text.parse().expect("a net")
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn node(id: u64, allowed: &[&str]) -> Node {
    let own = [net(&format!("100.64.0.{id}/32")), net(&format!("fd7a:115c:a1e0::{id}/128"))];
    Node {
        id: NodeId(id),
        stable_id: format!("stable{id}"),
        name: format!("n{id}.tail.ts.net."),
        addresses: own.to_vec(),
        allowed_ips: own.into_iter().chain(allowed.iter().map(|a| net(a))).collect(),
        online: Some(true),
        ..Node::default()
    }
}

fn primary(mut node: Node, routes: &[&str]) -> Node {
    node.primary_routes = routes.iter().map(|r| net(r)).collect();
    node
}

/// A table with these peers, the slot of each being its number.
fn table(accept: bool, exclude: &[&str], exit: Option<u64>, peers: &[Node]) -> RouteTable {
    let mut table = RouteTable::default();
    let exclude: Vec<IpNet> = exclude.iter().map(|e| net(e)).collect();
    table.configure(accept, &exclude);
    table.set_exit(exit.map(NodeId), None);
    for peer in peers {
        if let Some(offer) = table.offer(peer) {
            table.link(slot(peer), peer.id, &offer);
        }
    }
    table
}

fn slot(peer: &Node) -> Slot {
    Slot(u32::try_from(peer.id.0).expect("small"))
}

fn found(table: &RouteTable, address: &str) -> Option<u32> {
    table.find(ip(address)).map(|slot| slot.0)
}

#[test]
fn what_is_accepted_and_what_only_an_exit_node_carries() {
    let peers = [
        node(1, &["10.0.0.0/8", "10.1.0.0/16", "fd7a:115c:a1e0:b1a:0:7:a00::/104"]),
        node(2, &["10.1.2.0/24", "2001:db8::/32", "0.0.0.0/0", "::/0"]),
        node(3, &["0.0.0.0/0"]),
    ];
    type Case = (bool, &'static [&'static str], Option<u64>, &'static [(&'static str, Option<u32>)]);
    let cases: &[Case] = &[
        (false, &[], None, &[("10.1.2.3", None), ("2001:db8::1", None), ("8.8.8.8", None)]),
        (
            true,
            &[],
            None,
            &[
                ("10.2.0.1", Some(1)),
                ("10.1.3.1", Some(1)),
                ("10.1.2.3", Some(2)),
                ("2001:db8::1", Some(2)),
                // 4via6 is a prefix like any other.
                ("fd7a:115c:a1e0:b1a:0:7:a01:203", Some(1)),
                // /0 is no route.
                ("8.8.8.8", None),
            ],
        ),
        (
            false,
            &["10.96.0.0/12"],
            Some(2),
            &[
                ("8.8.8.8", Some(2)),
                ("2606::1", Some(2)),
                ("10.1.2.3", Some(2)),
                ("10.96.0.10", None),
                ("127.0.0.1", None),
                ("169.254.169.254", None),
                ("224.0.0.1", None),
                ("fe80::1", None),
                // Nobody's tailnet address.
                ("100.64.9.9", None),
                ("fd7a:115c:a1e0::99", None),
            ],
        ),
        (false, &[], Some(3), &[("8.8.8.8", Some(3)), ("2606::1", None)]),
        (false, &[], Some(1), &[("8.8.8.8", None)]),
        (
            true,
            // One inside a route, one around a route.
            &["10.244.0.0/16", "10.1.0.0/16"],
            Some(3),
            &[
                ("10.244.1.1", None),
                ("10.1.2.3", None),
                ("10.1.9.9", None),
                ("10.2.0.1", Some(1)),
                ("9.9.9.9", Some(3)),
            ],
        ),
    ];
    for (accept, exclude, exit, asked) in cases {
        let table = table(*accept, exclude, *exit, &peers);
        for (address, who) in *asked {
            assert_eq!(found(&table, address), *who, "{address} with {accept} {exclude:?} {exit:?}");
        }
    }
    let all = table(true, &["10.1.0.0/16"], None, &peers).accepted();
    assert_eq!(all, [net("10.0.0.0/8"), net("2001:db8::/32"), net("fd7a:115c:a1e0:b1a:0:7:a00::/104")]);
    assert!(table(false, &[], Some(2), &peers).accepted().is_empty());
}

#[test]
fn one_of_several_routers_carries_a_prefix_and_another_takes_over() {
    const LAN: &str = "192.168.5.0/24";
    let away = |mut node: Node| {
        node.online = Some(false);
        node
    };
    let one = || node(1, &[LAN]);
    let two = || node(2, &[LAN]);
    let cases: [(&str, Vec<Node>, u32); 6] = [
        ("the lowest number", vec![two(), one()], 1),
        ("the primary", vec![one(), primary(two(), &[LAN])], 2),
        ("online before a lower number", vec![away(one()), two()], 2),
        ("primary although offline", vec![one(), away(primary(two(), &[LAN]))], 2),
        ("primary for another prefix", vec![one(), primary(two(), &["10.0.0.0/8"])], 1),
        ("the only one", vec![away(two())], 2),
    ];
    for (name, peers, who) in cases {
        assert_eq!(found(&table(true, &[], None, &peers), "192.168.5.9"), Some(who), "{name}");
    }

    // The primary goes: the other one carries at once, and the prefix never went.
    let first = primary(one(), &[LAN]);
    let mut both = table(true, &[], None, &[first.clone(), two()]);
    assert!(both.take_changed());
    let offer = both.offer(&first).expect("a route");
    both.unlink(slot(&first), first.id, &offer);
    assert_eq!(found(&both, "192.168.5.9"), Some(2));
    assert!(!both.take_changed());
    let offer = both.offer(&two()).expect("a route");
    both.unlink(slot(&two()), two().id, &offer);
    assert_eq!((found(&both, "192.168.5.9"), both.take_changed()), (None, true));
    assert!(both.accepted().is_empty());
}

#[test]
fn a_peer_that_offers_too_much_is_bounded() {
    let many: Vec<String> =
        (0..9000_u32).map(|n| format!("{}/32", std::net::Ipv4Addr::from(0x0b00_0000 + n))).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let peer = node(1, &many);
    let mut table = table(true, &[], None, &[node(2, &["10.0.0.0/8"]), peer.clone()]);
    assert_eq!((table.accepted().len(), table.is_full()), (MAX_ROUTES, true));
    assert_eq!(found(&table, "10.9.9.9"), Some(2));
    let offer = table.offer(&peer).expect("routes");
    table.unlink(slot(&peer), peer.id, &offer);
    assert_eq!(table.accepted(), [net("10.0.0.0/8")]);
}

#[test]
fn exit_nodes_are_meant_by_id_address_or_name() {
    let peer = node(7, &[]);
    for (text, meant) in [
        ("stable7", true),
        ("100.64.0.7", true),
        ("fd7a:115c:a1e0::7", true),
        ("N7.tail.ts.net.", true),
        ("n7", true),
        ("stable77", false),
        ("100.64.0.8", false),
        ("tail.ts.net", false),
        ("", false),
    ] {
        assert_eq!(ExitChoice::new(text).means(&Facts::pack(&peer).0), meant, "{text}");
    }
    let nameless = Node { name: String::new(), stable_id: "x".into(), ..peer };
    assert!(!ExitChoice::new(".").means(&Facts::pack(&nameless).0));
}
