use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;
use crate::testing::{block_on, in_namespaces};

/// A pod namespace with a loopback, as a runtime hands it over.
async fn pod(dir: &Path, name: &str) -> LinkSpec {
    let netns_dir = dir.join("netns");
    netns::prepare_dir(&netns_dir).unwrap();
    let pod_netns = netns_dir.join(format!("pod-{name}"));
    let ns = Netns::ensure_pinned(&pod_netns).await.unwrap();
    let netlink = Netlink::open(&ns).await.unwrap();
    netlink.set_up(netlink.link("lo").await.unwrap().unwrap().index).await.unwrap();
    LinkSpec { id: format!("link-{name}"), netns_dir, pod_netns, ifname: "ts0".into(), mtu: 1280 }
}

fn config() -> PodConfig {
    PodConfig {
        addresses: vec!["100.64.0.1/32".parse().unwrap(), "fd7a:115c:a1e0::1/128".parse().unwrap()],
        routes: tailnet_routes(&[]),
        ..PodConfig::default()
    }
}

/// Next packet of the TUN within the time, without its virtio header.
fn read_tun(tun: &OwnedFd, wait: Duration) -> Option<Vec<u8>> {
    let mut fds = [PollFd::new(tun.as_fd(), PollFlags::POLLIN)];
    let wait = PollTimeout::try_from(wait).unwrap();
    if poll(&mut fds, wait).unwrap() == 0 {
        return None;
    }
    let mut buffer = [0; 2048];
    let length = nix::unistd::read(tun, &mut buffer).unwrap();
    Some(buffer[tun::VNET_HEADER_BYTES..length].to_vec())
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// A UDP packet behind an empty virtio header.
fn udp_packet(src: &str, dst: &str, payload: &[u8]) -> Vec<u8> {
    let (src, dst) = (src.parse::<SocketAddr>().unwrap(), dst.parse::<SocketAddr>().unwrap());
    let length = u16::try_from(8 + payload.len()).unwrap();
    let mut udp = [src.port().to_be_bytes(), dst.port().to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
    udp.extend(payload);
    let mut packet = vec![0; tun::VNET_HEADER_BYTES];
    match (src.ip(), dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
            ip[2..4].copy_from_slice(&(20 + length).to_be_bytes());
            ip.extend([src.octets(), dst.octets()].concat());
            let sum = checksum(&ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            packet.extend(ip);
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let addresses = [src.octets(), dst.octets()].concat();
            let pseudo = [&addresses[..], &[0, 0], &length.to_be_bytes(), &[0, 0, 0, 17], &udp].concat();
            udp[6..8].copy_from_slice(&checksum(&pseudo).to_be_bytes());
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([17, 64]);
            packet.extend(addresses);
        }
        _ => panic!("two families"),
    }
    packet.extend(udp);
    packet
}

#[test]
fn packets_go_through_and_nothing_else_does() {
    in_namespaces("link::tests::packets_go_through_and_nothing_else_does", |dir| {
        block_on(async {
            let spec = pod(dir, "a").await;
            let mut link = ensure_link(&spec).await.unwrap();
            let tun = link.open_tun().await.unwrap();
            let made = configure_pod(&spec, &link, &config()).await.unwrap();
            assert_eq!(made.ipv6, Ipv6::Available);
            assert_eq!(made.addresses, config().addresses);
            check(&spec, &config()).await.unwrap();

            let any = |a: &str| a.parse::<SocketAddr>().unwrap();
            let v4 = sockets::udp_in(&link.pod, any("0.0.0.0:4000")).await.unwrap();
            let v6 = sockets::udp_in(&link.pod, any("[::]:4000")).await.unwrap();
            v4.send_to(b"out", "100.64.0.2:9").unwrap();
            let packet = read_tun(&tun, Duration::from_secs(5)).unwrap();
            let (src, dst) = (Ipv4Addr::new(100, 64, 0, 1), Ipv4Addr::new(100, 64, 0, 2));
            assert_eq!(
                (packet[0] >> 4, &packet[12..16], &packet[16..20]),
                (4, &src.octets()[..], &dst.octets()[..])
            );
            assert_eq!(&packet[28..], b"out");

            v6.send_to(b"out6", "[fd7a:115c:a1e0::2]:9").unwrap();
            let packet = read_tun(&tun, Duration::from_secs(5)).unwrap();
            let src = "fd7a:115c:a1e0::1".parse::<Ipv6Addr>().unwrap();
            assert_eq!((packet[0] >> 4, &packet[8..24]), (6, &src.octets()[..]));
            assert_eq!(&packet[48..], b"out6");

            let mut buffer = [0; 16];
            for (socket, src, dst) in [
                (&v4, "100.64.0.2:9", "100.64.0.1:4000"),
                (&v6, "[fd7a:115c:a1e0::2]:9", "[fd7a:115c:a1e0::1]:4000"),
            ] {
                nix::unistd::write(&tun, &udp_packet(src, dst, b"in")).unwrap();
                socket.set_nonblocking(false).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let (length, from) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], from), (&b"in"[..], any(src)));
            }

            // DNS answers come from the link's namespace.
            let dns = link.open_dns().await.unwrap();
            for (client, sockets, address) in
                [(&v4, &dns[0], "100.100.100.100:53"), (&v6, &dns[1], "[fd7a:115c:a1e0::53]:53")]
            {
                let at = any(address);
                let _connected =
                    link.pod.run(move || std::net::TcpStream::connect(at)).await.unwrap().unwrap();
                assert!(sockets.tcp.accept().is_ok());
                let server = &sockets.udp;
                client.send_to(b"q", address).unwrap();
                server.set_nonblocking(false).unwrap();
                server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let (length, from) = server.recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], b"q");
                server.send_to(b"a", from).unwrap();
                let (length, from) = client.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], from), (&b"a"[..], any(address)));
            }

            // Group reports and router solicitations come within a second or two of a device going up.
            let until = Instant::now() + Duration::from_millis(2500);
            while let Some(left) = until.checked_duration_since(Instant::now()) {
                if let Some(packet) = read_tun(&tun, left) {
                    panic!("unasked packet: {packet:02x?}");
                }
            }
        });
    });
}

#[test]
fn making_it_again_changes_nothing_and_repairs_what_differs() {
    in_namespaces("link::tests::making_it_again_changes_nothing_and_repairs_what_differs", |dir| {
        block_on(async {
            let spec = pod(dir, "a").await;
            let mut first = ensure_link(&spec).await.unwrap();
            let tun = first.open_tun().await.unwrap();
            configure_pod(&spec, &first, &config()).await.unwrap();
            assert!(matches!(first.open_tun().await, Err(Error::TunBusy { .. })));

            let mut second = ensure_link(&spec).await.unwrap();
            assert_eq!((second.ifindex, second.mac), (first.ifindex, first.mac));
            assert_eq!(second.namespace, first.namespace);
            check(&spec, &config()).await.unwrap();
            drop(tun);
            second.open_tun().await.unwrap();

            let in_pod = Netlink::open(&second.pod).await.unwrap();
            let in_link = Netlink::open(&second.namespace).await.unwrap();
            let broken = |text: &'static str| {
                let spec = spec.clone();
                async move {
                    match check(&spec, &config()).await {
                        Err(Error::Broken { what }) => assert_eq!(what, text),
                        other => panic!("{other:?} instead of: {text}"),
                    }
                }
            };
            in_pod.delete_address(second.ifindex, config().addresses[0]).await.unwrap();
            broken("ts0 has no address 100.64.0.1/32").await;
            configure_pod(&spec, &second, &config()).await.unwrap();
            check(&spec, &config()).await.unwrap();

            in_pod.delete_neighbour(second.ifindex, GATEWAY_V6.into()).await.unwrap();
            let mac = netlink::mac_text(spec.link_side_mac());
            assert!(
                matches!(check(&spec, &config()).await, Err(Error::Broken { what }) if what.contains(&mac))
            );
            configure_pod(&spec, &second, &config()).await.unwrap();

            // The pod's owner may tune and add; making the link again sets it right all the same.
            second.pod.run(|| sysctl::write("net/ipv4/conf/ts0/rp_filter", "1")).await.unwrap().unwrap();
            in_pod.add_address(second.ifindex, "192.0.2.1/32".parse().unwrap()).await.unwrap();
            check(&spec, &config()).await.unwrap();
            ensure_link(&spec).await.unwrap();
            let filter = second.pod.run(|| sysctl::read("net/ipv4/conf/ts0/rp_filter")).await.unwrap();
            assert_eq!(filter.unwrap().as_deref(), Some("2"));
            second.namespace.run(|| sysctl::write("net/ipv4/ip_forward", "0")).await.unwrap().unwrap();
            broken("net/ipv4/ip_forward is not 1").await;
            ensure_link(&spec).await.unwrap();

            let pod0 = in_link.link(LINK_SIDE_NAME).await.unwrap().unwrap();
            in_link.set_down(pod0.index).await.unwrap();
            broken("pod0 is down").await;
            configure_pod(&spec, &second, &config()).await.unwrap();
            check(&spec, &config()).await.unwrap();

            in_pod.delete_link("ts0").await.unwrap();
            broken("ts0 is missing").await;
            let third = ensure_link(&spec).await.unwrap();
            assert_eq!(third.mac, first.mac, "the pod's neighbour table stays right");
            configure_pod(&spec, &third, &config()).await.unwrap();
            check(&spec, &config()).await.unwrap();
        });
    });
}

#[test]
fn a_change_of_addresses_and_routes_is_followed() {
    in_namespaces("link::tests::a_change_of_addresses_and_routes_is_followed", |dir| {
        block_on(async {
            let spec = pod(dir, "a").await;
            let link = ensure_link(&spec).await.unwrap();
            configure_pod(&spec, &link, &config()).await.unwrap();
            let moved = PodConfig {
                addresses: vec!["100.64.7.7/32".parse().unwrap()],
                routes: tailnet_routes(&["100.96.0.0/11".parse().unwrap()]),
                ..PodConfig::default()
            };
            configure_pod(&spec, &link, &moved).await.unwrap();
            check(&spec, &moved).await.unwrap();
            assert!(check(&spec, &config()).await.is_err());
            let in_pod = Netlink::open(&link.pod).await.unwrap();
            let left: Vec<IpNet> = in_pod
                .addresses()
                .await
                .unwrap()
                .into_iter()
                .filter(|a| a.link == link.ifindex)
                .map(|a| a.net)
                .collect();
            assert_eq!(left, moved.addresses);
        });
    });
}

#[test]
fn what_is_not_ours_is_left_alone() {
    in_namespaces("link::tests::what_is_not_ours_is_left_alone", |dir| {
        block_on(async {
            let spec = pod(dir, "a").await;
            let ns = Netns::open(&spec.pod_netns).unwrap();
            let in_pod = Netlink::open(&ns).await.unwrap();
            in_pod.add_bridge("ts0").await.unwrap();
            assert!(
                matches!(ensure_link(&spec).await, Err(Error::InterfaceExists { name }) if name == "ts0")
            );
            assert!(matches!(check(&spec, &config()).await, Err(Error::InterfaceExists { .. })));
            assert!(!spec.pin().exists(), "nothing half-made");
            remove(&spec).await.unwrap();
            assert!(in_pod.link("ts0").await.unwrap().is_some());
            in_pod.delete_link("ts0").await.unwrap();

            // The link of another container in the same namespace is not ours either.
            let other = LinkSpec { id: "other".into(), ..spec.clone() };
            ensure_link(&other).await.unwrap();
            assert!(matches!(ensure_link(&spec).await, Err(Error::InterfaceExists { .. })));
            remove(&spec).await.unwrap();
            check(&other, &PodConfig::default()).await.unwrap();
            remove(&other).await.unwrap();
            assert!(in_pod.link("ts0").await.unwrap().is_none());

            let host = LinkSpec { pod_netns: "/proc/self/ns/net".into(), ..spec.clone() };
            assert!(matches!(ensure_link(&host).await, Err(Error::HostNamespace { .. })));
            let gone = LinkSpec { pod_netns: dir.join("gone"), ..spec.clone() };
            assert!(matches!(ensure_link(&gone).await, Err(Error::NamespaceGone { .. })));
            remove(&gone).await.unwrap();
            let hidden = LinkSpec { pod_netns: dir.join("none/gone"), ..spec.clone() };
            assert!(matches!(ensure_link(&hidden).await, Err(Error::NamespacesHidden { .. })));
            remove(&hidden).await.unwrap();
            let ended = LinkSpec { pod_netns: "/proc/4194305/ns/net".into(), ..spec.clone() };
            assert!(matches!(ensure_link(&ended).await, Err(Error::NamespaceGone { .. })));
            for id in ["", ".", "..", "a/b", "a b", &"x".repeat(201)] {
                let bad = LinkSpec { id: id.into(), ..spec.clone() };
                assert!(matches!(ensure_link(&bad).await, Err(Error::Invalid { .. })), "{id}");
            }
        });
    });
}

#[test]
fn a_pod_without_ipv6_gets_ipv4_and_is_told() {
    in_namespaces("link::tests::a_pod_without_ipv6_gets_ipv4_and_is_told", |dir| {
        block_on(async {
            let spec = pod(dir, "a").await;
            let ns = Netns::open(&spec.pod_netns).unwrap();
            for key in ["net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/default/disable_ipv6"] {
                assert!(ns.run(move || sysctl::write(key, "1")).await.unwrap().unwrap());
            }
            let link = ensure_link(&spec).await.unwrap();
            let made = configure_pod(&spec, &link, &config()).await.unwrap();
            assert_eq!(made.ipv6, Ipv6::DisabledInPod);
            assert_eq!(made.addresses, config().addresses[..1]);
            assert_eq!(made.routes, [("100.64.0.0/10".parse().unwrap(), IpAddr::V4(GATEWAY_V4))]);
            check(&spec, &config()).await.unwrap();
        });
    });
}

#[test]
fn a_route_that_leads_elsewhere_is_an_error_not_a_success() {
    in_namespaces("link::tests::a_route_that_leads_elsewhere_is_an_error_not_a_success", |dir| {
        block_on(async {
            let spec = pod(dir, "a").await;
            let link = ensure_link(&spec).await.unwrap();
            let in_pod = Netlink::open(&link.pod).await.unwrap();
            in_pod.add_bridge("eth0").await.unwrap();
            let eth0 = in_pod.link("eth0").await.unwrap().unwrap().index;
            in_pod.set_up(eth0).await.unwrap();
            let dst = "100.64.0.0/10".parse().unwrap();
            let elsewhere = netlink::Route { dst, gateway: None, link: eth0, onlink: false };
            in_pod.add_route(elsewhere).await.unwrap();
            in_pod.add_route(elsewhere).await.unwrap();
            let error = configure_pod(&spec, &link, &config()).await.unwrap_err();
            assert_eq!(error.errno(), Some(libc::EEXIST));
            assert!(error.to_string().contains("100.64.0.0/10"), "{error}");
            in_pod.delete_route(elsewhere).await.unwrap();
            configure_pod(&spec, &link, &config()).await.unwrap();
            check(&spec, &config()).await.unwrap();
        });
    });
}

/// An interface of a primary CNI: an address, and everything beyond by its gateway.
async fn add_primary(spec: &LinkSpec) -> u32 {
    let in_pod = Netlink::open(&Netns::open(&spec.pod_netns).unwrap()).await.unwrap();
    in_pod.add_bridge("eth0").await.unwrap();
    let eth0 = in_pod.link("eth0").await.unwrap().unwrap().index;
    for address in ["10.244.1.2/24", "fd44::2/64"] {
        in_pod.add_address(eth0, address.parse().unwrap()).await.unwrap();
    }
    in_pod.set_up(eth0).await.unwrap();
    for (dst, gateway) in [("0.0.0.0/0", "10.244.1.1"), ("::/0", "fd44::1")] {
        let (dst, gateway) = (dst.parse().unwrap(), Some(gateway.parse().unwrap()));
        in_pod.add_route(netlink::Route { dst, gateway, link: eth0, onlink: false }).await.unwrap();
    }
    eth0
}

/// Routes, rules and the link's own table.
async fn routing(spec: &LinkSpec) -> (Vec<netlink::Route>, Vec<String>, Vec<netlink::TableRoute>) {
    let in_pod = Netlink::open(&Netns::open(&spec.pod_netns).unwrap()).await.unwrap();
    let mut routes = in_pod.routes().await.unwrap();
    routes.sort_unstable();
    (routes, in_pod.rules().await.unwrap(), in_pod.table_routes(20_000..30_000).await.unwrap())
}

#[test]
fn an_exit_node_gets_everything_but_the_clusters_own_and_leaves_nothing_behind() {
    const NAME: &str =
        "link::tests::an_exit_node_gets_everything_but_the_clusters_own_and_leaves_nothing_behind";
    in_namespaces(NAME, |dir| {
        block_on(async {
            let spec = pod(dir, "a").await;
            let eth0 = add_primary(&spec).await;
            let bare = routing(&spec).await;
            let mut link = ensure_link(&spec).await.unwrap();
            let tun = link.open_tun().await.unwrap();
            configure_pod(&spec, &link, &config()).await.unwrap();
            let before = routing(&spec).await;
            assert_eq!(before.1, bare.1, "no rules without an exit node");

            let bypass = vec!["10.96.0.0/12".parse().unwrap(), "fd96::/64".parse().unwrap()];
            let exit = PodConfig { exit: Some(Exit { bypass }), ..config() };
            let made = configure_pod(&spec, &link, &exit).await.unwrap();
            let made = made.exit.unwrap();
            assert_eq!((made.table, made.routes.len()), (spec.policy_base(), 2));
            check(&spec, &exit).await.unwrap();
            assert!(check(&spec, &config()).await.is_err());

            // Where a packet goes, and from which address, as the kernel says.
            let way = |to: &str, from: &str| {
                let (to, from) = (to.parse::<SocketAddr>().unwrap(), from.parse::<SocketAddr>().unwrap());
                link.pod.run_blocking(move || {
                    let socket = UdpSocket::bind(from).unwrap();
                    socket.connect(to).map(|()| socket.local_addr().unwrap().ip().to_string())
                })
            };
            let any4 = "0.0.0.0:0";
            for (to, from, source) in [
                ("198.51.100.7:9", any4, "100.64.0.1"),
                ("100.64.0.9:9", any4, "100.64.0.1"),
                ("10.1.2.3:9", any4, "100.64.0.1"),
                ("10.96.0.10:53", any4, "10.244.1.2"),
                ("10.244.1.9:80", any4, "10.244.1.2"),
                ("[2001:db8::7]:9", "[::]:0", "fd7a:115c:a1e0::1"),
                ("[fd96::a]:53", "[::]:0", "fd44::2"),
                ("198.51.100.7:9", "10.244.1.2:0", "10.244.1.2"),
            ] {
                assert_eq!(way(to, from).unwrap().unwrap(), source, "{to} from {from}");
            }
            let socket = sockets::udp_in(&link.pod, "0.0.0.0:0".parse().unwrap()).await.unwrap();
            socket.send_to(b"away", "198.51.100.7:9").unwrap();
            let packet = read_tun(&tun, Duration::from_secs(5)).unwrap();
            assert_eq!((&packet[16..20], &packet[28..]), (&[198, 51, 100, 7][..], &b"away"[..]));
            // An answer to somebody outside the cluster who came in by eth0 does not go into the tunnel.
            let answer = sockets::udp_in(&link.pod, "10.244.1.2:7777".parse().unwrap()).await.unwrap();
            answer.send_to(b"answer", "192.0.2.9:9").unwrap();
            assert_eq!(read_tun(&tun, Duration::from_millis(100)), None);

            // Without its interface nothing leaks out by the default route.
            let in_pod = Netlink::open(&link.pod).await.unwrap();
            in_pod.set_down(link.ifindex).await.unwrap();
            assert!(way("198.51.100.7:9", any4).unwrap().is_err());
            assert_eq!(way("10.96.0.10:53", any4).unwrap().unwrap(), "10.244.1.2");
            in_pod.set_up(link.ifindex).await.unwrap();

            configure_pod(&spec, &link, &config()).await.unwrap();
            assert_eq!(routing(&spec).await, before, "switched off");
            configure_pod(&spec, &link, &exit).await.unwrap();
            remove(&spec).await.unwrap();
            assert_eq!(routing(&spec).await, bare, "removed");

            // The pod's own doing: the interface is gone, the rules are not.
            let link = ensure_link(&spec).await.unwrap();
            configure_pod(&spec, &link, &exit).await.unwrap();
            in_pod.delete_link("ts0").await.unwrap();
            remove(&spec).await.unwrap();
            assert_eq!(routing(&spec).await, bare);
            assert!(in_pod.link("eth0").await.unwrap().is_some_and(|l| l.index == eth0));
        });
    });
}

#[test]
fn accepted_routes_leave_the_pods_own_networks_alone() {
    in_namespaces("link::tests::accepted_routes_leave_the_pods_own_networks_alone", |dir| {
        block_on(async {
            let spec = pod(dir, "a").await;
            add_primary(&spec).await;
            let link = ensure_link(&spec).await.unwrap();
            configure_pod(&spec, &link, &config()).await.unwrap();
            let before = routing(&spec).await;
            let net = |text: &str| text.parse::<IpNet>().unwrap();
            let accepted =
                ["10.0.0.0/8", "10.244.1.0/24", "10.244.1.128/25", "192.168.7.0/24", "100.64.7.0/24"];
            let with = PodConfig { accepted: accepted.map(net).to_vec(), ..config() };
            let made = configure_pod(&spec, &link, &with).await.unwrap();
            let new: Vec<IpNet> = made.routes.iter().map(|(dst, _)| *dst).skip(2).collect();
            assert_eq!(new, [net("10.0.0.0/8"), net("192.168.7.0/24")]);
            check(&spec, &with).await.unwrap();
            assert_eq!(routing(&spec).await.0.len(), before.0.len() + 2);
            let in_pod = Netlink::open(&link.pod).await.unwrap();
            let (dst, gateway) = (net("192.168.7.0/24"), Some(GATEWAY_V4.into()));
            let lost = netlink::Route { dst, gateway, link: link.ifindex, onlink: true };
            in_pod.delete_route(lost).await.unwrap();
            let error = check(&spec, &with).await.unwrap_err().to_string();
            assert!(error.contains("ts0 has no route to 192.168.7.0/24"), "{error}");
            configure_pod(&spec, &link, &config()).await.unwrap();
            assert_eq!(routing(&spec).await, before);
        });
    });
}

/// Everything of the node's own namespaces that a link could have changed.
async fn host_state() -> (Vec<netlink::Link>, Vec<netlink::Address>, Vec<netlink::Route>, Vec<String>, String)
{
    let here = Netlink::open(&Netns::current().unwrap()).await.unwrap();
    (
        here.links().await.unwrap(),
        here.addresses().await.unwrap(),
        here.routes().await.unwrap(),
        here.rules().await.unwrap(),
        fs::read_to_string("/proc/self/mountinfo").unwrap(),
    )
}

#[test]
fn after_remove_the_node_is_as_it_was() {
    in_namespaces("link::tests::after_remove_the_node_is_as_it_was", |dir| {
        block_on(async {
            let spec = pod(dir, "a").await;
            let before = host_state().await;
            let pods_before = Netlink::open(&Netns::open(&spec.pod_netns).unwrap()).await.unwrap();
            let links_before = pods_before.links().await.unwrap();

            let mut link = ensure_link(&spec).await.unwrap();
            let tun = link.open_tun().await.unwrap();
            configure_pod(&spec, &link, &config()).await.unwrap();
            let during = host_state().await;
            assert_eq!(
                (&during.0, &during.1, &during.2, &during.3),
                (&before.0, &before.1, &before.2, &before.3)
            );
            assert_ne!(during.4, before.4, "the pin is a mount");

            remove(&spec).await.unwrap();
            assert_eq!(host_state().await, before);
            assert_eq!(pods_before.links().await.unwrap(), links_before);
            assert!(tun::name_of(&tun.as_raw_fd()).is_err(), "a forgotten engine loses its device");
            assert!(!spec.pin().exists());
            remove(&spec).await.unwrap();

            // The pod went first.
            let mut link = ensure_link(&spec).await.unwrap();
            drop((link.open_tun().await.unwrap(), link, pods_before));
            netns::unpin(&spec.pod_netns).unwrap();
            remove(&spec).await.unwrap();
            assert!(!spec.pin().exists());
        });
    });
}

#[test]
fn an_unpinned_link_is_made_anew() {
    in_namespaces("link::tests::an_unpinned_link_is_made_anew", |dir| {
        block_on(async {
            let spec = pod(dir, "a").await;
            let mut link = ensure_link(&spec).await.unwrap();
            let orphan = link.open_tun().await.unwrap();
            netns::unpin(&spec.pin()).unwrap();
            // The orphan's descriptor keeps the old namespace, and with it the old pair.
            let mut again = ensure_link(&spec).await.unwrap();
            assert_ne!(again.namespace, link.namespace);
            again.open_tun().await.unwrap();
            configure_pod(&spec, &again, &config()).await.unwrap();
            check(&spec, &config()).await.unwrap();
            drop(orphan);
        });
    });
}
