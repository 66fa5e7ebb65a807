//! Which nodes find a direct path through which gateways, with the kernel's own NAT.

#![allow(clippy::unwrap_used)]
#![allow(clippy::print_stdout, reason = "the harness shows what a failed test printed")]

mod common;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{ENGINE, Join, PATIENCE, Pod, echo, patient, probe};
use podtether_devnet::lab::{Gateway, Inside, Lab, Nat, Programs};
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig};
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::engine::PathStatus;

/// So long a pair has to find a direct path, and after it a relayed one counts as found.
const SEARCH: Duration = Duration::from_secs(12);

struct World {
    lab: Lab,
    devnet: Devnet,
    key: String,
}

/// A pod that joined, and its first address.
struct Member {
    pod: Pod,
    address: IpAddr,
    _echo: tokio::task::JoinSet<()>,
}

impl World {
    fn new(dir: &Path) -> Self {
        let programs = Programs {
            supervisor: PathBuf::new(),
            engine: ENGINE.into(),
            tool: PathBuf::new(),
            cni: PathBuf::new(),
        };
        let mut lab = Lab::new(dir, programs).unwrap();
        let (devnet, _) = lab.start_devnet(DevnetConfig::default()).unwrap();
        let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() });
        Self { lab, devnet, key: key.secret }
    }

    fn public(&mut self, name: &str) -> Inside {
        let node = self.lab.add_node(name).unwrap();
        let number = self.lab.nodes();
        Inside { netns: node.netns.clone(), address: [10, number, 0, 2].into() }
    }

    fn behind(&mut self, name: &str, nat: Nat) -> Inside {
        let mut gateway = self.lab.add_gateway(&format!("{name}-gw"), nat).unwrap();
        self.lab.add_host_behind(&format!("{name}-host"), &mut gateway).unwrap()
    }

    async fn member(&self, dir: &Path, name: &str, host: &Inside) -> Member {
        let mut pod = Pod::make_on(dir, name, Some(&host.netns)).await;
        let join = Join {
            control_url: self.devnet.https_url(),
            ca_pem: self.devnet.ca_pem().to_owned(),
            auth_key: Some(self.key.clone()),
            addresses: vec![host.address.into()],
        };
        let address = pod.join(&join).await[0];
        let echo = echo(&pod, SocketAddr::new(address, 7)).await;
        Member { pod, address, _echo: echo }
    }
}

impl Member {
    async fn path_to(&self, other: &Self) -> PathStatus {
        let peers = self.pod.client().peers(patient()).await.unwrap();
        peers.into_iter().find(|p| p.addresses.contains(&other.address)).unwrap().path
    }

    /// Talks until the path is direct, or long enough; the path then.
    async fn talk(&self, other: &Self) -> PathStatus {
        let until = Instant::now() + SEARCH;
        let mut first = true;
        loop {
            let to = SocketAddr::new(other.address, 7);
            let probed = probe(&self.pod, self.address, to, 50, Duration::from_millis(10)).await;
            let (from, name) = (&self.pod.name, &other.pod.name);
            // The first may come before control has told the other of us.
            assert!(first || probed.answered >= 49, "{from} to {name}: {probed:?}");
            first = false;
            let path = self.path_to(other).await;
            if matches!(path, PathStatus::Direct { .. }) || Instant::now() > until {
                return path;
            }
        }
    }
}

/// The address of a direct path.
fn direct(path: &PathStatus) -> Option<SocketAddr> {
    match path {
        PathStatus::Direct { endpoint, .. } => Some(*endpoint),
        PathStatus::Relay { .. } | PathStatus::Idle => None,
    }
}

/// What a gateway does with the UDP of a host behind it.
#[derive(Debug, PartialEq, Eq)]
struct Translation {
    /// The host has the same outside port for two destinations.
    one_port: bool,
    /// Who is heard at that port: another port of an address that was sent to from it.
    other_port: bool,
    /// An address that was sent to from another port of the host only.
    other_address: bool,
}

fn socket(at: &Inside) -> UdpSocket {
    let socket = at.netns.run_blocking(|| UdpSocket::bind((at.address, 0))).unwrap().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Sends, and gives where it came from.
fn arrives(from: &UdpSocket, at: &UdpSocket) -> SocketAddr {
    from.send_to(b"out", at.local_addr().unwrap()).unwrap();
    let mut datagram = [0; 16];
    let (length, source) = at.recv_from(&mut datagram).unwrap();
    assert_eq!(&datagram[..length], b"out");
    source
}

fn translation(host: &Inside, near: &Inside, far: &Inside) -> Translation {
    let (inside, beside) = (socket(host), socket(host));
    let (peer, peer_port, third, stranger) = (socket(near), socket(near), socket(near), socket(far));
    let outside = arrives(&inside, &peer);
    let one_port = arrives(&inside, &third) == outside;
    arrives(&beside, &stranger);
    peer_port.send_to(b"port", outside).unwrap();
    stranger.send_to(b"address", outside).unwrap();
    peer.send_to(b"end", outside).unwrap();
    let (mut datagram, mut heard) = ([0; 16], BTreeMap::new());
    while let Ok((length, from)) = inside.recv_from(&mut datagram) {
        if &datagram[..length] == b"end" {
            // Another processor may still carry what was sent before.
            inside.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        }
        heard.insert(datagram[..length].to_vec(), from);
    }
    assert_eq!(heard.get(&b"end"[..]), Some(&peer.local_addr().unwrap()), "{heard:?}");
    // Whoever is heard is answered, from the port that was knocked at.
    for (knock, knocker) in [(&b"port"[..], &peer_port), (b"address", &stranger)] {
        if let Some(from) = heard.get(knock) {
            assert_eq!(*from, knocker.local_addr().unwrap());
            assert_eq!(arrives(&inside, knocker), outside);
        }
    }
    let is_heard = |knock: &[u8]| heard.contains_key(knock);
    Translation { one_port, other_port: is_heard(b"port"), other_address: is_heard(b"address") }
}

#[test]
fn gateways_translate_as_their_kinds_say() {
    in_namespaces("gateways_translate_as_their_kinds_say", |dir| {
        let mut world = World::new(dir);
        let (near, far) = (world.public("near"), world.public("far"));
        for (name, nat, [one_port, other_port, other_address]) in [
            ("symmetric", Nat::Symmetric, [false, false, false]),
            ("ported", Nat::PortRestricted, [true, false, false]),
            ("restricted", Nat::AddressRestricted, [true, true, false]),
            ("cone", Nat::FullCone, [true, true, true]),
        ] {
            let host = world.behind(name, nat);
            // Twice, as a port that is in use must not be in the way of the next.
            for _ in 0..2 {
                let expected = Translation { one_port, other_port, other_address };
                assert_eq!(translation(&host, &near, &far), expected, "{name}");
            }
        }
    });
}

#[test]
fn pairs_meet_through_nats_where_that_is_possible() {
    in_namespaces("pairs_meet_through_nats_where_that_is_possible", |dir| {
        let mut world = World::new(dir);
        let mut hosts = vec![("public", world.public("public-host"))];
        for (name, nat) in [
            ("ported", Nat::PortRestricted),
            ("ported2", Nat::PortRestricted),
            ("symmetric", Nat::Symmetric),
            ("symmetric2", Nat::Symmetric),
            ("restricted", Nat::AddressRestricted),
            ("restricted2", Nat::AddressRestricted),
            ("cone", Nat::FullCone),
            ("noudp", Nat::NoUdp),
        ] {
            hosts.push((name, world.behind(name, nat)));
        }
        let mut outer = world.lab.add_gateway("outer", Nat::PortRestricted).unwrap();
        let mut inner = world.lab.add_gateway_behind("inner", &mut outer, Nat::PortRestricted).unwrap();
        hosts.push(("double", world.lab.add_host_behind("double-host", &mut inner).unwrap()));
        block_on(async {
            let mut members = Vec::new();
            for (name, host) in &hosts {
                members.push(world.member(dir, name, host).await);
            }
            let member = |name: &str| members.iter().find(|m| m.pod.name == name).unwrap();
            for (a, b, expected) in [
                ("public", "ported", true),
                ("ported", "ported2", true),
                ("public", "symmetric", true),
                ("cone", "symmetric", true),
                ("ported", "double", true),
                ("public", "double", true),
                ("public", "restricted", true),
                ("restricted", "ported", true),
                ("restricted", "restricted2", true),
                ("restricted", "cone", true),
                ("restricted", "double", true),
                // Unlike a port-restricted one: it lets in what comes from another port than it has sent to.
                ("restricted", "symmetric", true),
                ("symmetric2", "restricted2", true),
                ("restricted", "noudp", false),
                ("ported", "symmetric", false),
                ("symmetric", "symmetric2", false),
                ("noudp", "public", false),
            ] {
                let path = member(a).talk(member(b)).await;
                println!("{a} to {b}: {path:?}");
                assert_eq!(direct(&path).is_some(), expected, "{a} to {b}: {path:?}");
            }
            assert_eq!(world.devnet.complaints(), Vec::<String>::new());
        });
    });
}

#[test]
fn hosts_behind_one_gateway_meet_inside_or_by_hairpin() {
    in_namespaces("hosts_behind_one_gateway_meet_inside_or_by_hairpin", |dir| {
        let mut world = World::new(dir);
        let mut shared = world.lab.add_gateway("shared", Nat::PortRestricted).unwrap();
        let a = world.lab.add_host_behind("a", &mut shared).unwrap();
        let b = world.lab.add_host_behind("b", &mut shared).unwrap();
        block_on(async {
            let (one, two) = (world.member(dir, "one", &a).await, world.member(dir, "two", &b).await);
            let path = one.talk(&two).await;
            let address = direct(&path).unwrap_or_else(|| panic!("{path:?}"));
            assert_eq!(address.ip(), IpAddr::from(b.address), "by the inside address");

            // Kept apart they have only the relay.
            nft(&shared, Gateway::isolate_hosts);
            let until = Instant::now() + PATIENCE;
            while direct(&one.path_to(&two).await).is_some() {
                assert!(Instant::now() < until, "still direct");
                let to = SocketAddr::new(two.address, 7);
                probe(&one.pod, one.address, to, 50, Duration::from_millis(10)).await;
            }
            let path = one.talk(&two).await;
            assert_eq!(path, PathStatus::Relay { region: 1 });

            // A gateway that sends them back by its outside address is a way again.
            nft(&shared, |gateway| {
                gateway.forward_port(one.pod.port(), &a).and(gateway.forward_port(two.pod.port(), &b))
            });
            let path = one.talk(&two).await;
            let address = direct(&path).unwrap_or_else(|| panic!("{path:?}"));
            assert_ne!(address.ip(), IpAddr::from(b.address), "by the outside address");
        });
    });
}

/// Calls of the lab block.
fn nft<E: std::fmt::Debug + Send>(gateway: &Gateway, call: impl FnOnce(&Gateway) -> Result<(), E> + Send) {
    std::thread::scope(|s| s.spawn(|| call(gateway)).join()).unwrap().unwrap();
}

#[test]
fn udp_that_is_blocked_and_comes_back_is_found_and_home_stays() {
    in_namespaces("udp_that_is_blocked_and_comes_back_is_found_and_home_stays", |dir| {
        let mut world = World::new(dir);
        let mut gateway = world.lab.add_gateway("gateway", Nat::PortRestricted).unwrap();
        let a = world.lab.add_host_behind("a", &mut gateway).unwrap();
        let b = world.public("b");
        nft(&gateway, |gateway| gateway.set_udp(false));
        block_on(async {
            let (one, two) = (world.member(dir, "one", &a).await, world.member(dir, "two", &b).await);
            assert_eq!(one.talk(&two).await, PathStatus::Relay { region: 1 });
            nft(&gateway, |gateway| gateway.set_udp(true));
            let until = Instant::now() + Duration::from_secs(40);
            while direct(&one.talk(&two).await).is_none() {
                assert!(Instant::now() < until, "no direct path came about");
            }
        });
    });
}
