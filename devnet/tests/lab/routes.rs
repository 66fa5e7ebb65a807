//! Subnet routes and exit nodes on real kernel objects, switched while the pod runs.
//!
//! Podtether routes for nobody, so the router here is a pod that a test has made one: devnet lets it carry
//! the networks, and its namespaces forward.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use podtether_devnet::DevnetConfig;
use podtether_devnet::lab::{CniCall, Lab, Node, Pod, Tailnet};
use podtether_devnet::probe::tcp::{self, Serve, TcpServer};
use podtether_net::netlink::{Netlink, Route, VethEnd};
use podtether_net::netns::Netns;
use podtether_net::sysctl;
use podtether_net::testing::block_on;
use podtether_proto::node::{CniError, NodeClient, PodRouting, PodSelector, Routing};
use podtether_proto::transport;

use crate::{PATIENCE, Rig, engine_pid, lab_test, wait_for, wait_reachable};

/// A host in the router's network.
pub(crate) const LAN_HOST: &str = "192.168.5.9";
pub(crate) const LAN_HOST_V6: &str = "fd05::9";
/// An address that exists twice: behind the exit node, and behind the node's own uplink.
pub(crate) const INTERNET: &str = "198.51.100.7";
pub(crate) const INTERNET_V6: &str = "2001:db8::7";
/// Served behind the exit node only, and behind the uplink only.
pub(crate) const BY_EXIT: u16 = 1001;
pub(crate) const BY_UPLINK: u16 = 1002;
/// As long as nobody answers.
const SILENCE: Duration = Duration::from_millis(700);

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(crate) fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

pub(crate) fn routing(accept_routes: bool, exit_node: Option<&str>) -> Routing {
    Routing { accept_routes, exit_node: exit_node.map(str::to_owned) }
}

/// Asks a node's supervisor, as a tool would.
pub(crate) fn set_routing(node: &Node, pod: &str, wanted: Routing) -> Result<PodRouting, CniError> {
    block_on(async {
        let transport = transport::connect(node.socket()).await.unwrap();
        let client = NodeClient::new(tarpc::client::Config::default(), transport).spawn();
        let mut context = tarpc::context::current();
        context.deadline = Instant::now() + PATIENCE;
        let selector = PodSelector::Pod { namespace: "default".into(), name: pod.to_owned() };
        let set = client.set_routing(context, selector.clone(), wanted).await.unwrap();
        if let Ok(set) = &set {
            assert_eq!(client.routing(context, selector).await.unwrap().unwrap().routing, set.routing);
        }
        set
    })
}

fn reaches(pod: &Pod, target: SocketAddr) -> bool {
    tcp::connect(&pod.netns, target, SILENCE).unwrap().is_some()
}

/// The same when it may take a moment, as after a failover.
pub(crate) fn wait_for_tcp(pod: &Pod, target: SocketAddr) {
    wait_for(&format!("{} to reach {target}", pod.name), || reaches(pod, target).then_some(()));
}

/// Everything in a pod's namespace that routing could have changed, a line each, sorted.
pub(crate) fn in_pod(pod: &Pod) -> Vec<String> {
    block_on(async {
        let netlink = Netlink::open(&pod.netns).await.unwrap();
        let mut lines = netlink.rules().await.unwrap();
        for link in netlink.links().await.unwrap() {
            lines.push(format!("link {} {}", link.index, link.name));
        }
        lines.extend(netlink.addresses().await.unwrap().iter().map(|a| format!("{a:?}")));
        lines.extend(netlink.routes().await.unwrap().iter().map(|r| format!("{r:?}")));
        lines.extend(netlink.neighbours().await.unwrap().iter().map(|n| format!("{n:?}")));
        lines.extend(netlink.table_routes(1000..100_000).await.unwrap().iter().map(|r| format!("{r:?}")));
        lines.sort();
        lines
    })
}

async fn add_route(netlink: &Netlink, link: &str, dst: &str, gateway: IpAddr) {
    let link = netlink.link(link).await.unwrap().unwrap().index;
    let route = Route { dst: net(dst), gateway: Some(gateway), link, onlink: true };
    netlink.add_route(route).await.unwrap();
}

/// Makes a pod, alone on its node, a router into a network of its own. Its namespace is returned.
fn make_router(rig: &Rig, node: &Node, pod: &Pod, dir: &Path) -> Netns {
    let id = rig.devnet.node(&pod.name).unwrap().id;
    let routes = ["192.168.5.0/24", "fd05::/64", "0.0.0.0/0", "::/0"].map(net).to_vec();
    assert!(rig.devnet.grant_routes(id, routes));
    let forward = || {
        sysctl::write("net/ipv4/ip_forward", "1").unwrap();
        sysctl::write("net/ipv6/conf/all/forwarding", "1").unwrap();
    };
    pod.netns.run_blocking(forward).unwrap();
    let pins: Vec<_> = std::fs::read_dir(node.run_dir().join("netns")).unwrap().flatten().collect();
    assert_eq!(pins.len(), 1, "the router is alone on its node");
    let link = Netns::open(&pins[0].path()).unwrap();
    block_on(async {
        let lan = Netns::ensure_pinned(&dir.join("netns/lan")).await.unwrap();
        let (in_lan, in_pod) = (Netlink::open(&lan).await.unwrap(), Netlink::open(&pod.netns).await.unwrap());
        let in_link = Netlink::open(&link).await.unwrap();
        let near = VethEnd { namespace: None, name: "lan0", mac: None, mtu: 1500 };
        let far = VethEnd { namespace: Some(&lan), name: "eth0", mac: None, mtu: 1500 };
        in_pod.add_veth(near, far).await.unwrap();
        let index = async |netlink: &Netlink, name: &str| netlink.link(name).await.unwrap().unwrap().index;
        let (lan0, eth0) = (index(&in_pod, "lan0").await, index(&in_lan, "eth0").await);
        for address in ["192.168.5.1/24", "fd05::1/64"] {
            in_pod.add_address(lan0, net(address)).await.unwrap();
        }
        for address in ["192.168.5.9/24", "fd05::9/64", "198.51.100.7/32", "2001:db8::7/128"] {
            in_lan.add_address(eth0, net(address)).await.unwrap();
        }
        in_lan.set_up(index(&in_lan, "lo").await).await.unwrap();
        in_lan.set_up(eth0).await.unwrap();
        in_pod.set_up(lan0).await.unwrap();
        in_pod.wait_running("lan0").await.unwrap();
        in_lan.wait_local(&[LAN_HOST_V6.parse().unwrap()]).await.unwrap();
        for (dst, gateway) in [("0.0.0.0/0", "192.168.5.1"), ("::/0", "fd05::1")] {
            add_route(&in_lan, "eth0", dst, gateway.parse().unwrap()).await;
        }
        for (dst, gateway) in [("198.51.100.7/32", LAN_HOST), ("2001:db8::7/128", LAN_HOST_V6)] {
            add_route(&in_pod, "lan0", dst, gateway.parse().unwrap()).await;
        }
        let (v4, v6) = (pod.v4().unwrap(), pod.v6().unwrap());
        for (dst, gateway) in
            [("192.168.5.0/24", v4), ("198.51.100.7/32", v4), ("fd05::/64", v6), ("2001:db8::7/128", v6)]
        {
            add_route(&in_link, "pod0", dst, gateway).await;
        }
        lan
    })
}

/// Gives the world behind the nodes' uplink the same Internet address, and a way back to the pods.
pub(crate) fn make_uplink_world(rig: &Rig) {
    make_uplink(&rig.lab);
}

pub(crate) fn make_uplink(lab: &Lab) {
    block_on(async {
        let router = Netlink::open(lab.router()).await.unwrap();
        let lo = router.link("lo").await.unwrap().unwrap().index;
        for address in ["198.51.100.7/32", "2001:db8::7/128"] {
            router.add_address(lo, net(address)).await.unwrap();
        }
        router.wait_local(&[INTERNET_V6.parse().unwrap()]).await.unwrap();
        add_route(&router, "node1", "10.244.1.0/24", IpAddr::V4(Ipv4Addr::new(10, 1, 0, 2))).await;
        add_route(&router, "node1", "fd44:1::/64", "fd10:1::2".parse().unwrap()).await;
    });
}

pub(crate) const CLUSTER: &str = "cluster_cidrs = [\"10.244.0.0/16\", \"fd44::/16\", \"10.0.0.0/14\"]";

/// A client and a pod beside it on one node, a router on another, with the networks behind it.
fn world(dir: &Path) -> (Rig, Vec<Pod>, Netns) {
    let mut rig = Rig::start(dir, 0, DevnetConfig::default());
    for n in 0..2 {
        let mut node = rig.lab.add_node(&format!("node{n}")).unwrap();
        node.configure(&[Tailnet::oauth("default", &rig.devnet, &rig.ca)], CLUSTER).unwrap();
        node.start_supervisor().unwrap();
        rig.nodes.push(node);
    }
    let pods = rig.join(&[(0, "client"), (0, "beside"), (1, "router")]);
    wait_reachable(&pods[0], pods[2].v4().unwrap());
    wait_reachable(&pods[0], pods[2].v6().unwrap());
    let lan = make_router(&rig, &rig.nodes[1], &pods[2], dir);
    make_uplink_world(&rig);
    (rig, pods, lan)
}

pub(crate) fn serve(ns: &Netns, address: SocketAddr) -> TcpServer {
    TcpServer::start(ns, address, Serve::Echo).unwrap()
}

#[test]
fn a_pod_uses_a_subnet_router_while_it_is_told_to() {
    lab_test("routes::a_pod_uses_a_subnet_router_while_it_is_told_to", |dir| {
        let (rig, pods, lan) = world(dir);
        let (node, client) = (&rig.nodes[0], &pods[0]);
        let (v4, v6) = (at(LAN_HOST, 80), at(LAN_HOST_V6, 80));
        let _servers = [serve(&lan, v4), serve(&lan, v6)];
        let before = in_pod(client);
        assert!(!reaches(client, v4), "off by default");

        // What others offer may take a moment to arrive; what is known is on the interface when the call returns.
        wait_for("the routes to be known and made", || {
            let set = set_routing(node, "client", routing(true, None)).unwrap();
            let made: Vec<IpNet> = set.routes.iter().map(|r| r.dst).collect();
            (made.contains(&net("192.168.5.0/24")) && made.contains(&net("fd05::/64"))).then_some(())
        });
        for target in [v4, v6] {
            wait_for_tcp(client, target);
        }
        assert!(!reaches(&pods[1], v4), "one pod's wish is not another's");
        assert!(!reaches(client, at(INTERNET, BY_EXIT)), "an exit node's /0 is no accepted route");
        client.check(node).unwrap();
        let report = node.pod_report("client").unwrap();
        assert_eq!(report["acceptRoutes"], true, "{report}");

        // The router loses a network: the route goes by itself, and comes back.
        let id = rig.devnet.node("router").unwrap().id;
        assert!(rig.devnet.grant_routes(id, vec![net("fd05::/64")]));
        let routes =
            || block_on(async { Netlink::open(&client.netns).await.unwrap().routes().await.unwrap() });
        let has = |dst: &str| routes().iter().any(|r| r.dst == net(dst));
        wait_for("the route to go", || (!has("192.168.5.0/24")).then_some(()));
        assert!(has("fd05::/64"));
        client.check(node).unwrap();
        assert!(rig.devnet.grant_routes(id, ["192.168.5.0/24", "fd05::/64"].map(net).to_vec()));
        wait_for("the route to come back", || has("192.168.5.0/24").then_some(()));
        wait_for_tcp(client, v4);

        let off = set_routing(node, "client", Routing::default()).unwrap();
        assert_eq!(off.routes.len(), 2, "{:?}", off.routes);
        assert_eq!(in_pod(client), before);
        assert!(!reaches(client, v4));

        let error = set_routing(node, "client", routing(false, Some("no such name"))).unwrap_err();
        assert!(error.msg.contains("client") && error.msg.contains("is no node"), "{error}");
        let error = set_routing(node, "nobody", Routing::default()).unwrap_err();
        assert!(error.msg.contains("default/nobody"), "{error}");
    });
}

/// Starts what answers in both worlds, on IPv4 and IPv6.
fn serve_both(rig: &Rig, lan: &Netns) -> Vec<TcpServer> {
    let worlds = [(lan, BY_EXIT), (rig.lab.router(), BY_UPLINK)];
    worlds.iter().flat_map(|(ns, port)| [INTERNET, INTERNET_V6].map(|ip| serve(ns, at(ip, *port)))).collect()
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum World {
    Exit,
    Uplink,
    Nowhere,
}

pub(crate) fn leads(pod: &Pod, ip: &str) -> World {
    match (reaches(pod, at(ip, BY_EXIT)), reaches(pod, at(ip, BY_UPLINK))) {
        (true, false) => World::Exit,
        (false, true) => World::Uplink,
        (false, false) => World::Nowhere,
        (true, true) => panic!("{ip} is in two places at once"),
    }
}

#[test]
fn an_exit_node_takes_everything_but_the_clusters_own() {
    lab_test("routes::an_exit_node_takes_everything_but_the_clusters_own", |dir| {
        let (mut rig, pods, lan) = world(dir);
        let _servers = serve_both(&rig, &lan);
        let [client, beside, _router] = &pods[..] else { panic!("three pods") };
        let before = in_pod(client);
        for ip in [INTERNET, INTERNET_V6] {
            assert_eq!(leads(client, ip), World::Uplink, "{ip} before");
        }

        let set = set_routing(&rig.nodes[0], "client", routing(false, Some("router"))).unwrap();
        let defaults = set.routes.iter().filter(|r| r.dst.prefix_len() == 0);
        assert!(defaults.clone().all(|r| r.table.is_some()) && defaults.count() == 2, "{:?}", set.routes);
        for ip in [INTERNET, INTERNET_V6] {
            wait_for_tcp(client, at(ip, BY_EXIT));
            assert_eq!(leads(client, ip), World::Exit, "{ip}");
            assert_eq!(leads(beside, ip), World::Uplink, "{ip} for another pod");
        }
        let router_id = rig.devnet.node("router").unwrap().stable_id;
        let client_id = rig.devnet.node("client").unwrap().id;
        wait_for("control to hear of it", || {
            (rig.devnet.hostinfo(client_id, "ExitNodeID")? == router_id.as_str()).then_some(())
        });
        client.check(&rig.nodes[0]).unwrap();

        // The cluster stays where it was, both ways; also for somebody outside the configured ranges who
        // comes in by eth0, as a kubelet's probe may.
        let (own4, own6) = (at("10.244.1.2", 8080), at("fd44:1::2", 8080));
        let _probed = [serve(&client.netns, own4), serve(&client.netns, own6)];
        let cluster = [at("10.244.1.3", 8081), at("fd44:1::3", 8081)];
        let _beside = cluster.map(|address| serve(&beside.netns, address));
        let _on_node = serve(&rig.nodes[0].netns, at("10.1.0.2", 8082));
        let cluster_works = |rig: &Rig| {
            let outside = rig.lab.router().clone();
            for (who, ns) in
                [("the node", &rig.nodes[0].netns), ("a pod", &beside.netns), ("outside", &outside)]
            {
                for own in [own4, own6] {
                    let answered = tcp::connect(ns, own, PATIENCE).unwrap();
                    assert!(answered.is_some(), "{who} reaches {own}");
                }
            }
            for target in cluster.into_iter().chain([at("10.1.0.2", 8082)]) {
                assert!(tcp::connect(&client.netns, target, PATIENCE).unwrap().is_some(), "{target}");
            }
        };
        cluster_works(&rig);

        // Nothing of it is lost with the engine, nor with the supervisor.
        let pid = engine_pid(&rig.nodes[0], "client").unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
        wait_for("a new engine", || engine_pid(&rig.nodes[0], "client").filter(|new| *new != pid));
        wait_for_tcp(client, at(INTERNET, BY_EXIT));
        rig.nodes[0].kill_supervisor().unwrap();
        assert_ne!(leads(client, INTERNET), World::Uplink, "no supervisor, no leak");
        rig.nodes[0].start_supervisor().unwrap();
        wait_for_tcp(client, at(INTERNET, BY_EXIT));
        wait_for("CHECK to pass", || client.check(&rig.nodes[0]).ok());

        // The exit node dies: nothing leaks, the cluster goes on.
        rig.nodes[1].kill_everything().unwrap();
        wait_for("the exit node to be gone", || (leads(client, INTERNET) == World::Nowhere).then_some(()));
        assert_eq!(leads(client, INTERNET_V6), World::Nowhere);
        cluster_works(&rig);
        let router_node = rig.devnet.node("router").unwrap().id;
        assert!(rig.devnet.delete_node(router_node));
        wait_for("the pod's health to say so", || {
            let health = rig.nodes[0].pod_report("client").unwrap()["health"].to_string();
            health.contains("exit node router is not among").then_some(())
        });
        assert_eq!(leads(client, INTERNET), World::Nowhere);

        // Switched off, everything is as it was.
        set_routing(&rig.nodes[0], "client", Routing::default()).unwrap();
        assert_eq!(in_pod(client), before);
        for ip in [INTERNET, INTERNET_V6] {
            assert_eq!(leads(client, ip), World::Uplink, "{ip} afterwards");
        }
    });
}

#[test]
fn annotations_choose_and_leaving_restores() {
    lab_test("routes::annotations_choose_and_leaving_restores", |dir| {
        let (mut rig, _pods, lan) = world(dir);
        let _servers = serve_both(&rig, &lan);
        let node = &mut rig.nodes[0];
        let mut pod = node.create_pod("annotated").unwrap();
        let bare = in_pod(&pod);
        let annotated = |exit: &str| CniCall {
            version: "1.1.0".into(),
            annotations: vec![
                ("tailscale.com/accept-routes".into(), "true".into()),
                ("tailscale.com/exit-node".into(), exit.into()),
            ],
            ..CniCall::new("ADD")
        };
        let outcome = pod.cni(node, &annotated("not a node")).unwrap();
        assert_eq!(outcome.code(), Some(7), "{}", outcome.answer);
        assert!(outcome.answer.to_string().contains("tailscale.com/exit-node"), "{}", outcome.answer);
        assert_eq!(in_pod(&pod), bare);

        pod.add_with(node, &annotated("router")).unwrap();
        let routes = pod.result().unwrap()["routes"].as_array().unwrap().clone();
        let made = |dst: &str| routes.iter().any(|r| r["dst"] == dst && r["gw"].is_string());
        assert!(made("192.168.5.0/24") && made("fd05::/64"), "{routes:?}");
        let exit = routes.iter().find(|r| r["dst"] == "0.0.0.0/0" && r["gw"] == "169.254.1.1").unwrap();
        assert!(exit["table"].as_u64().is_some_and(|t| t >= 20_000), "{exit}");
        wait_for_tcp(&pod, at(INTERNET, BY_EXIT));
        let check = CniCall { version: "1.1.0".into(), ..CniCall::new("CHECK") };
        pod.cni(node, &check).unwrap().ok().unwrap();
        // Somebody took a route away.
        block_on(async {
            let netlink = Netlink::open(&pod.netns).await.unwrap();
            let all = netlink.routes().await.unwrap();
            let route = all.into_iter().find(|r| r.dst == net("192.168.5.0/24")).unwrap();
            netlink.delete_route(route).await.unwrap();
        });
        let outcome = pod.cni(node, &check).unwrap();
        assert!(outcome.answer.to_string().contains("192.168.5.0/24"), "{}", outcome.answer);
        pod.del(node).unwrap();
        assert_eq!(in_pod(&pod), bare, "nothing is left behind");
        assert_eq!(leads(&pod, INTERNET), World::Uplink);
    });
}
