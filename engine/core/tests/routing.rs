//! Subnet routes and exit nodes between real engines on a simulated network.

mod sim;

use std::net::Ipv4Addr;

use podtether_core::engine::Event;
use podtether_core::routes::Routing;
use podtether_core::tailcfg::{MapResponse, Node};

use sim::{Nat, World, secs, udp_packet};

const LAN: Ipv4Addr = Ipv4Addr::new(192, 168, 5, 9);
const INTERNET: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

/// A pod and some routers that hold the given networks.
fn world(routers: &[&[&str]]) -> World {
    let mut world = World::new(7);
    let pod = world.add(Nat::None);
    for routes in routers {
        let n = world.add(Nat::None);
        world.nodes[n]
            .record
            .allowed_ips
            .extend(routes.iter().map(|r| r.parse::<ipnet::IpNet>().expect("a net")));
    }
    for n in 0..world.nodes.len() {
        world.boot(n, false);
    }
    world.run_for(secs(5));
    assert!((1..world.nodes.len()).all(|n| world.knows(pod, n)));
    world
}

/// What the pod's engine finds wrong.
fn complaints(world: &mut World) -> String {
    let titles: Vec<String> = world.engine(0).status().health.into_iter().map(|m| m.title).collect();
    titles.join("; ")
}

fn routing(accept_routes: bool, exit_node: Option<&str>) -> Routing {
    Routing {
        accept_routes,
        exit_node: exit_node.map(str::to_owned),
        exclude: vec!["10.96.0.0/12".parse().expect("a net")],
    }
}

/// Whether a packet of the pod to `dst` reaches `router`'s TUN and the answer comes back; `port` is new.
fn reaches(world: &mut World, router: usize, dst: Ipv4Addr, port: u16) -> bool {
    let pod = world.nodes[0].tailnet;
    let seq = u64::from(port);
    world.send_raw(0, &udp_packet(pod, dst, port, 80, seq));
    world.run_for(secs(2));
    if !world.got(0, router).contains(&seq) {
        return false;
    }
    world.send_raw(router, &udp_packet(dst, pod, 80, port, seq));
    world.run_for(secs(2));
    assert!(got(world, dst, seq), "the answer is let in");
    true
}

/// Whether the pod has received this from an address outside the tailnet.
fn got(world: &World, src: Ipv4Addr, seq: u64) -> bool {
    world.got(usize::from(src.octets()[3]) - 1, 0).contains(&seq)
}

#[test]
fn a_subnet_router_carries_what_the_pod_accepts_and_nothing_else() {
    let mut world = world(&[&["192.168.5.0/24", "0.0.0.0/0", "::/0"]]);
    assert!(!reaches(&mut world, 1, LAN, 1000), "off by default");
    assert_eq!(world.drops(0), [("no_peer", 1)]);
    world.engine(0).set_routing(routing(true, None));
    let view = world.engine(0).routes();
    assert_eq!((view.accepted, view.exit_node), (vec!["192.168.5.0/24".parse().expect("a net")], None));
    assert!(reaches(&mut world, 1, LAN, 1001));
    assert!(!reaches(&mut world, 1, INTERNET, 1002), "/0 is not accepted by that");

    // What did not come from the LAN is not let in, answer or not.
    let forged = udp_packet(INTERNET, world.nodes[0].tailnet, 80, 1001, 3);
    world.send_raw(1, &forged);
    world.run_for(secs(2));
    assert!(!got(&world, INTERNET, 3));
    assert!(world.drops(0).contains(&("peer_source", 1)), "{:?}", world.drops(0));

    world.engine(0).set_routing(routing(false, None));
    assert!(!reaches(&mut world, 1, LAN, 1004), "switched off");
    assert!(world.engine(0).routes().accepted.is_empty());
}

#[test]
fn an_exit_node_carries_the_rest_and_a_missing_one_holds_it_back() {
    let mut world = world(&[&["0.0.0.0/0"], &["0.0.0.0/0"]]);
    world.engine(0).set_routing(routing(false, Some("nobody")));
    assert!(!reaches(&mut world, 1, INTERNET, 1000));
    assert_eq!(world.drops(0), [("no_exit_node", 1)]);
    let health = complaints(&mut world);
    assert!(health.contains("exit node nobody is not among"), "{health}");
    assert_eq!(world.engine(0).host_update().exit_node_id, "");

    world.engine(0).set_routing(routing(false, Some("n2")));
    assert_eq!(world.engine(0).host_update().exit_node_id, "n2", "control is told");
    let told = std::iter::from_fn(|| world.engine(0).poll_event()).any(|e| e == Event::HostUpdate);
    assert!(told);
    assert!(reaches(&mut world, 2, INTERNET, 1001));
    assert!(!reaches(&mut world, 1, INTERNET, 1002), "one exit node, not all");
    assert!(!reaches(&mut world, 2, Ipv4Addr::new(10, 96, 0, 10), 1003), "the cluster's own");
    let health = complaints(&mut world);
    assert!(health.contains("exit node n2 carries no IPv6"), "{health}");

    // It is deleted, then comes back.
    let record = world.nodes[2].record.clone();
    world.tell(0, MapResponse { peers_removed: vec![record.id], ..MapResponse::default() });
    assert!(!world.knows(0, 2));
    assert!(!reaches(&mut world, 2, INTERNET, 1004));
    assert_eq!(world.engine(0).routes().exit_node, None);
    let offline = Node { online: Some(false), ..record.clone() };
    world.tell(0, MapResponse { peers_changed: vec![offline], ..MapResponse::default() });
    let health = complaints(&mut world);
    assert!(health.contains("exit node n2 is offline"), "{health}");
    assert!(reaches(&mut world, 2, INTERNET, 1005), "what control thinks does not stop packets");

    world.engine(0).set_routing(Routing::default());
    assert!(!reaches(&mut world, 2, INTERNET, 1006));
    assert_eq!(world.engine(0).host_update().exit_node_id, "");
    assert_eq!(complaints(&mut world), "");
}

#[test]
fn a_route_moves_to_another_router_with_the_netmap() {
    let mut world = world(&[&["192.168.5.0/24"], &[]]);
    world.engine(0).set_routing(routing(true, None));
    assert!(reaches(&mut world, 1, LAN, 1000));
    let mut one = world.nodes[1].record.clone();
    let mut two = world.nodes[2].record.clone();
    let route = one.allowed_ips.pop().expect("the route");
    two.allowed_ips.push(route);
    two.primary_routes = vec![route];
    let own = world.nodes[2].record.clone();
    world.run_for(secs(1));
    world.nodes[0].events.clear();
    world.tell(
        2,
        MapResponse {
            node: Some(Node { allowed_ips: two.allowed_ips.clone(), ..own }),
            ..MapResponse::default()
        },
    );
    world.tell(0, MapResponse { peers_changed: vec![one, two], ..MapResponse::default() });
    assert!(!world.nodes[0].events.contains(&Event::RoutesChanged), "the pod's own routes stay as they are");
    assert!(!reaches(&mut world, 1, LAN, 1001));
    assert!(reaches(&mut world, 2, LAN, 1002));
}
