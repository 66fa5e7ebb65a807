//! Stock subnet routers and exit nodes under the devnet, and stock nodes that use them.

use podtether_devnet::{AuthKeyOptions, Devnet};
use podtether_net::netlink::Netlink;
use podtether_net::netns::Netns;
use serde_json::json;

use crate::{Node, PATIENCE, Stock, make_underlay, serve_banner, start_devnet, stock_test, until};

const LAN: &str = "192.168.5.0/24";
const LAN_HOST: &str = "192.168.5.9";
const INTERNET: &str = "198.51.100.7";

/// Addresses that only a router's host has; all nodes here share it, but reach it through the tailnet alone.
async fn add_networks() {
    let netlink = Netlink::open(&Netns::current().unwrap()).await.unwrap();
    let link = netlink.link("up1").await.unwrap().unwrap().index;
    for address in [format!("{LAN_HOST}/24"), format!("{INTERNET}/32")] {
        netlink.add_address(link, address.parse().unwrap()).await.unwrap();
    }
}

async fn join<'a>(stock: &'a Stock, devnet: &Devnet, name: &str, more: &[&str]) -> Node<'a> {
    let node = stock.start(name, &[]).await;
    let key =
        devnet.create_auth_key(AuthKeyOptions { tags: vec![format!("tag:{name}")], ..Default::default() });
    let (joined, text) = node.up(&devnet.http_url(), name, &key, more).await;
    assert!(joined, "{text}\n{}", node.log());
    node
}

fn nets(texts: &[&str]) -> Vec<ipnet::IpNet> {
    texts.iter().map(|t| t.parse().unwrap()).collect()
}

#[test]
fn a_stock_router_and_exit_node_serve_stock_clients() {
    stock_test("routes::a_stock_router_and_exit_node_serve_stock_clients", scenario);
}

async fn scenario(stock: &Stock) {
    make_underlay().await;
    add_networks().await;
    serve_banner(8000).await;
    let devnet = start_devnet(&stock.dir).await;
    let offers = format!("--advertise-routes={LAN}");
    let router = join(stock, &devnet, "router", &[&offers, "--advertise-exit-node"]).await;
    let client = join(stock, &devnet, "client", &["--accept-routes"]).await;
    until("the client sees the router", async || client.peer("router").await["Online"] == true).await;

    // Advertised is not approved.
    let id = devnet.node("router").unwrap().id;
    let offered = devnet.hostinfo(id, "RoutableIPs").unwrap();
    assert_eq!(offered.as_array().unwrap().len(), 3, "{offered}");
    assert_eq!(client.peer("router").await["ExitNodeOption"], false);
    assert!(!client.ok(&["exit-node", "list"]).await.contains("router.tailnet.test"));
    assert_eq!(client.fetch(LAN_HOST, 8000).await, None);

    // The network.
    assert!(devnet.approve_routes(id, &nets(&[LAN])));
    until("the route arrives", async || client.peer("router").await["PrimaryRoutes"] == json!([LAN])).await;
    until("the LAN answers", async || client.fetch(LAN_HOST, 8000).await.is_some()).await;
    client.ok(&["set", "--accept-routes=false"]).await;
    assert_eq!(client.fetch(LAN_HOST, 8000).await, None);

    // The exit node.
    assert!(devnet.approve_routes(id, &nets(&[LAN, "0.0.0.0/0"])));
    until("it is an option", async || client.peer("router").await["ExitNodeOption"] == true).await;
    let list = client.ok(&["exit-node", "list"]).await;
    assert!(list.contains("router.tailnet.test"), "{list}");
    assert_eq!(client.fetch(INTERNET, 8000).await, None, "not chosen yet");
    client.ok(&["set", "--exit-node=router"]).await;
    until("the Internet answers", async || client.fetch(INTERNET, 8000).await.is_some()).await;
    assert_eq!(client.peer("router").await["ExitNode"], true);
    client.ok(&["set", "--exit-node="]).await;
    assert_eq!(client.fetch(INTERNET, 8000).await, None);

    // A second router, approved by the policy; it takes over when the first one goes.
    let policy = "[[rules]]\nsrc=['*']\ndst=['*']\n[autoApprovers.routes]\n'192.168.0.0/16'=['tag:second', 'tag:router']";
    devnet.set_policy(Some(policy.parse().unwrap()));
    let _second = join(stock, &devnet, "second", &[&offers]).await;
    client.ok(&["set", "--accept-routes=true"]).await;
    let carries =
        |name: &str| devnet.node(name).is_some_and(|node| node.routes.contains(&LAN.parse().unwrap()));
    assert!(carries("router") && !carries("second"), "one primary");
    drop(router);
    let moved = devnet.wait_for(PATIENCE, |nodes| {
        nodes.iter().any(|node| node.name == "second" && node.routes == nets(&[LAN]))
    });
    assert!(moved.await, "the second is primary");
    until("and the client knows", async || client.peer("second").await["PrimaryRoutes"] == json!([LAN]))
        .await;
    until("the LAN answers again", async || client.fetch(LAN_HOST, 8000).await.is_some()).await;
    assert_eq!(devnet.complaints(), Vec::<String>::new());
}
