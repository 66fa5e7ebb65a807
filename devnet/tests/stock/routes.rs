//! Stock subnet routers and exit nodes under the devnet, and stock nodes that use them.

use std::path::Path;

use podtether_devnet::{AuthKeyOptions, Devnet};
use podtether_net::netlink::{Netlink, VethEnd};
use podtether_net::netns::{self, Netns};
use serde_json::json;

use crate::{ADDRESS, Node, PATIENCE, Stock, serve_banner, start_devnet, stock_test, until};

const LAN: &str = "192.168.5.0/24";
const LAN_HOST: &str = "192.168.5.9";
const INTERNET: &str = "198.51.100.7";

/// The routers' host, with networks of its own, and the client's, which does not reach those.
async fn make_hosts(dir: &Path) -> Netns {
    netns::prepare_dir(&dir.join("netns")).unwrap();
    let client = Netns::ensure_pinned(&dir.join("netns/client")).await.unwrap();
    let (here, there) = (Netns::current().unwrap(), client.clone());
    let (here, there) = (Netlink::open(&here).await.unwrap(), Netlink::open(&there).await.unwrap());
    let near = VethEnd { namespace: None, name: "up0", mac: None, mtu: 1500 };
    here.add_veth(near, VethEnd { namespace: Some(&client), name: "up1", mac: None, mtu: 1500 })
        .await
        .unwrap();
    let addresses = [
        (&here, "up0", format!("{ADDRESS}/24")),
        (&there, "up1", "192.168.77.2/24".to_owned()),
        (&here, "lo", format!("{LAN_HOST}/32")),
        (&here, "lo", format!("{INTERNET}/32")),
    ];
    for (netlink, link, address) in addresses {
        let link = netlink.link(link).await.unwrap().unwrap().index;
        netlink.add_address(link, address.parse().unwrap()).await.unwrap();
        netlink.set_up(link).await.unwrap();
    }
    here.wait_running("up0").await.unwrap();
    client
}

async fn join<'a>(stock: &'a Stock, ns: &Netns, devnet: &Devnet, name: &str, more: &[&str]) -> Node<'a> {
    let node = stock.start_in(ns, name, &[]).await;
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
    let away = make_hosts(&stock.dir).await;
    let here = Netns::current().unwrap();
    serve_banner(8000).await;
    let devnet = start_devnet(&stock.dir).await;
    let offers = format!("--advertise-routes={LAN}");
    let router = join(stock, &here, &devnet, "router", &[&offers, "--advertise-exit-node"]).await;
    let client = join(stock, &away, &devnet, "client", &["--accept-routes"]).await;
    until("the client sees the router", async || client.peer("router").await["Online"] == true).await;

    // Advertised is not approved.
    let id = devnet.node("router").unwrap().id;
    let offered = devnet.hostinfo(id, "RoutableIPs").unwrap();
    assert_eq!(offered.as_array().unwrap().len(), 3, "{offered}");
    assert_eq!(client.peer("router").await["ExitNodeOption"], false);
    let (listed, text) = client.run(&["exit-node", "list"]).await;
    assert!(!listed && text.contains("no exit nodes found"), "{text}");
    assert_eq!(client.fetch(LAN_HOST, 8000).await, None);

    // The network.
    assert!(devnet.approve_routes(id, &nets(&[LAN])));
    until("the route arrives", async || client.peer("router").await["PrimaryRoutes"] == json!([LAN])).await;
    until("the LAN answers", async || client.fetch(LAN_HOST, 8000).await.is_some()).await;
    client.ok(&["set", "--accept-routes=false"]).await;
    until("the LAN is gone", async || client.fetch(LAN_HOST, 8000).await.is_none()).await;

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
    until("the Internet is gone", async || client.fetch(INTERNET, 8000).await.is_none()).await;

    // A second router, approved by the policy; it takes over when the first one goes.
    let policy = "[[rules]]\nsrc=['*']\ndst=['*']\n[autoApprovers.routes]\n'192.168.0.0/16'=['tag:second', 'tag:router']";
    devnet.set_policy(Some(policy.parse().unwrap()));
    let _second = join(stock, &here, &devnet, "second", &[&offers]).await;
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
