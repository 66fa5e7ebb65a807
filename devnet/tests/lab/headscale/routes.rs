//! Networks behind stock routers, approved as Headscale's administrators do.

use podtether_devnet::lab::{HeadscaleConfig, Pod};
use podtether_devnet::probe::tcp::TcpServer;
use podtether_net::netlink::Netlink;
use podtether_net::testing::block_on;
use podtether_proto::node::Routing;
use serde_json::json;

use super::{World, headscale_test, open_policy};
use crate::routes::{
    BY_EXIT, BY_UPLINK, CLUSTER, INTERNET, INTERNET_V6, LAN_HOST, LAN_HOST_V6, World as Leads, at, in_pod,
    leads, make_uplink, net, routing, serve, set_routing, wait_for_tcp,
};
use crate::wait_for;

const BOTH: &str = "192.168.5.0/24,fd05::/64";

/// Gives a stock node the networks behind it, and what answers in them.
fn behind(world: &World, stock: usize) -> Vec<TcpServer> {
    let ns = &world.stocks[stock].node.netns;
    block_on(async {
        let netlink = Netlink::open(ns).await.unwrap();
        let lo = netlink.link("lo").await.unwrap().unwrap().index;
        for address in [LAN_HOST, LAN_HOST_V6, INTERNET, INTERNET_V6] {
            let address: std::net::IpAddr = address.parse().unwrap();
            netlink.add_address(lo, address.into()).await.unwrap();
        }
        netlink.wait_local(&[INTERNET_V6.parse().unwrap()]).await.unwrap();
    });
    [at(LAN_HOST, 80), at(LAN_HOST_V6, 80), at(INTERNET, BY_EXIT), at(INTERNET_V6, BY_EXIT)]
        .map(|address| serve(ns, address))
        .into()
}

/// Whether ts0 of the pod leads to the router's network.
fn routed(pod: &Pod) -> bool {
    block_on(async {
        let netlink = Netlink::open(&pod.netns).await.unwrap();
        netlink.routes().await.unwrap().iter().any(|r| r.dst == net("192.168.5.0/24"))
    })
}

#[test]
fn a_pod_uses_stock_routers_and_an_exit_node() {
    let name = "headscale::routes::a_pod_uses_stock_routers_and_an_exit_node";
    let mut policy = open_policy();
    policy["tagOwners"] = json!({"tag:k8s-pod": [], "tag:router": [], "tag:auto": []});
    policy["autoApprovers"] =
        json!({"routes": {"192.168.5.0/24": ["tag:auto"], "fd05::/64": ["tag:auto"]}, "exitNode": []});
    headscale_test(
        name,
        |_| HeadscaleConfig::default(),
        &policy,
        |mut world| {
            let node = world.add_node(CLUSTER);
            make_uplink(&world.lab);
            let advertise = format!("--advertise-routes={BOTH}");
            let up = [advertise.as_str(), "--advertise-exit-node"];
            let first = world.join_stock("first", &["--tags", "tag:router"], &up);
            let mut servers = behind(&world, first);
            servers.extend([INTERNET, INTERNET_V6].map(|ip| serve(world.lab.router(), at(ip, BY_UPLINK))));
            let pod = world.join(node, "client");
            let beside = world.join(node, "beside");
            let before = in_pod(&pod);
            assert_eq!(leads(&pod, INTERNET), Leads::Uplink);

            // Advertised, not approved.
            set_routing(&world.nodes[node], "client", routing(true, Some("first"))).unwrap();
            wait_for("an exit node that is not approved to be reported", || {
                let health = world.nodes[node].pod_report("client").unwrap()["health"].to_string();
                health.contains("not an approved one").then_some(())
            });
            assert!(!routed(&pod));
            assert_eq!(leads(&pod, INTERNET), Leads::Nowhere);

            // The administrator approves all of it.
            let approve = |name: &str, routes: &str| {
                let id = world.server.node_id(name).unwrap();
                world.server.run(&["nodes", "approve-routes", "-i", &id, "-r", routes]).unwrap();
            };
            approve("first", &format!("{BOTH},0.0.0.0/0,::/0"));
            for target in
                [at(LAN_HOST, 80), at(LAN_HOST_V6, 80), at(INTERNET, BY_EXIT), at(INTERNET_V6, BY_EXIT)]
            {
                wait_for_tcp(&pod, target);
            }
            assert_eq!((leads(&pod, INTERNET), leads(&pod, INTERNET_V6)), (Leads::Exit, Leads::Exit));
            assert!(!routed(&beside) && leads(&beside, INTERNET) == Leads::Uplink, "another pod's wish");
            pod.check(&world.nodes[node]).unwrap();

            // A second router, approved by its tag; then the first goes.
            let second = world.join_stock("second", &["--tags", "tag:auto"], &[&advertise]);
            servers.extend(behind(&world, second));
            wait_for("the second router to be approved", || {
                let node = world.server.node("second").ok()?;
                node["approvedRoutes"].as_array().filter(|r| r.len() == 2).map(|_| ())
            });
            let start = std::time::Instant::now();
            world.stocks[first].stop();
            wait_for_tcp(&pod, at(LAN_HOST, 80));
            wait_for("the second router to be the primary", || {
                let node = world.server.node("second").ok()?;
                node["subnetRoutes"].as_array().filter(|r| r.len() == 2).map(|_| ())
            });
            wait_for_tcp(&pod, at(LAN_HOST, 80));
            wait_for_tcp(&pod, at(LAN_HOST_V6, 80));
            println!("HA: the second router carries {:?} after the first was killed", start.elapsed());
            assert_eq!(leads(&pod, INTERNET), Leads::Nowhere, "the exit node is gone: nothing leaks");
            world.stocks[first].restart().unwrap();
            wait_for_tcp(&pod, at(INTERNET, BY_EXIT));

            // Approval is taken back, and the pod wants nothing any more.
            let id = world.server.node_id("second").unwrap();
            world.server.run(&["nodes", "delete", "-i", &id]).unwrap();
            let id = world.server.node_id("first").unwrap();
            world.server.run(&["nodes", "approve-routes", "-i", &id, "-r", ""]).unwrap();
            wait_for("the routes to go", || (!routed(&pod)).then_some(()));
            set_routing(&world.nodes[node], "client", Routing::default()).unwrap();
            assert_eq!(in_pod(&pod), before);
            assert_eq!(leads(&pod, INTERNET), Leads::Uplink);
        },
    );
}
