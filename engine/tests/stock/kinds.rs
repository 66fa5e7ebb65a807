//! Odd peers, and nodes that change their keys, with a pod and a stock node in one tailnet.

use std::collections::BTreeMap;
use std::time::Instant;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use podtether_core::key::{NodePrivate, NodePublic};
use podtether_proto::engine::{Decision, Flow};
use tokio::task::JoinSet;

use super::*;

const TICK: Duration = Duration::from_millis(20);

/// A devnet, a pod and a stock node that know each other.
pub(super) struct World<'a> {
    pub(super) devnet: Devnet,
    join: Join,
    pub(super) pod: Pod,
    pub(super) ours: IpAddr,
    pub(super) node: Node<'a>,
    pub(super) theirs: IpAddr,
    pub(super) pod_id: u64,
    pub(super) stock_id: u64,
    _echo: JoinSet<()>,
}

impl<'a> World<'a> {
    pub(super) async fn new(stock: &'a Stock) -> Self {
        let ip = make_underlay().await;
        let devnet = start_devnet(&stock.dir, ip, DnsSettings::default()).await;
        let echo = serve_echo().await;
        let mut pod = Pod::make(&stock.dir, "pod").await;
        let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() });
        let join = Join {
            control_url: devnet.https_url(),
            ca_pem: devnet.ca_pem().to_owned(),
            auth_key: Some(key.secret),
            addresses: vec![ip],
        };
        let ours = pod.join(&join).await[0];
        let node = stock.join("stock", &devnet, &[]).await;
        let theirs = node.address().await;
        let id = |name: &str| devnet.node(name).unwrap().id;
        let (pod_id, stock_id) = (id("pod"), id("stock"));
        let world = World { devnet, join, pod, ours, node, theirs, pod_id, stock_id, _echo: echo };
        until("they know each other", async || world.reaches(theirs).await).await;
        world
    }

    /// Whether the pod has an answer from a peer's echo.
    pub(super) async fn reaches(&self, to: IpAddr) -> bool {
        probe(&self.pod, self.ours, SocketAddr::new(to, ECHO_PORT), 1, TICK).await.answered == 1
    }

    /// Whether pings of the pod's and of the stock node's own come back, when control asks for them.
    async fn both(&self, kind: &str, to: IpAddr) -> (bool, bool) {
        let ask = async |id| {
            let said = self.devnet.ping_peer(id, kind, to, Duration::from_secs(2)).await;
            said.is_ok_and(|said| {
                let said: serde_json::Value = serde_json::from_slice(&said).unwrap();
                said["Err"].as_str().is_none_or(str::is_empty)
            })
        };
        tokio::join!(ask(self.pod_id), ask(self.stock_id))
    }

    async fn until_both(&self, what: &str, to: IpAddr, wanted: bool) {
        until(what, async || self.both("ICMP", to).await == (wanted, wanted)).await;
    }
}

pub(super) async fn masked_and_jailed(stock: &Stock) {
    let world = World::new(stock).await;
    let World { devnet, pod, ours, node, theirs, pod_id, stock_id, .. } = &world;
    let (ours, theirs, pod_id, stock_id) = (*ours, *theirs, *pod_id, *stock_id);
    let reaches = async |to: IpAddr| world.reaches(to).await;
    let pings = async |kind: &str, to: IpAddr| node.ping(&[kind], to).await.contains("pong from");

    // The pod is somebody else in stock's eyes, then stock in the pod's.
    let mask: IpAddr = "100.99.0.1".parse().unwrap();
    assert!(devnet.masquerade(pod_id, stock_id, mask));
    until("the masked pod reaches stock", async || reaches(theirs).await).await;
    for kind in ["--icmp", "--tsmp"] {
        until("stock reaches the mask", async || pings(kind, mask).await).await;
    }
    assert!(devnet.unmask(pod_id, stock_id) && devnet.masquerade(stock_id, pod_id, mask));
    until("the pod reaches masked stock", async || reaches(mask).await).await;
    for kind in ["--icmp", "--tsmp"] {
        assert!(pings(kind, ours).await, "{kind}: {}", node.log());
    }
    assert!(devnet.unmask(stock_id, pod_id));

    // Jailed: it answers, and opens nothing.
    assert!(devnet.set_jailed(pod_id, stock_id, true));
    until("the jail is in force", async || !pings("--icmp", ours).await).await;
    assert!(reaches(theirs).await && pings("--tsmp", ours).await);
    assert!(devnet.set_jailed(pod_id, stock_id, false) && devnet.set_jailed(stock_id, pod_id, true));
    until("the other jail is in force", async || !reaches(theirs).await).await;
    until("out of ours", async || pings("--icmp", ours).await).await;

    // Refused connections are told of, each way.
    let nothing = || serde_json::json!({ "PacketFilters": { "*": null } });
    assert!(devnet.tell(pod_id, nothing()));
    assert!(devnet.set_jailed(stock_id, pod_id, false));
    let metrics = async || pod.client().metrics(patient()).await.unwrap();
    until("stock is told that it is refused", async || {
        let knock = ["nc", &ours.to_string(), "22"];
        let _ = tokio::time::timeout(Duration::from_secs(1), node.run(&knock)).await;
        metrics().await.rejects_sent > 0
    })
    .await;
    assert_eq!(metrics().await.filter_rules, 0);
    let flow = Flow { src: theirs, dst: ours, protocol: 6, src_port: 9, dst_port: 22 };
    let verdict = pod.client().why(patient(), flow).await.unwrap().unwrap();
    assert_eq!((verdict.decision, verdict.reason.as_str()), (Decision::Drop, "filter"));
    assert_eq!(verdict.peer.as_deref(), Some("stock.tailnet.test"));
    assert!(devnet.tell(stock_id, nothing()));
    until("the pod is told that it is refused", async || {
        let to = SocketAddr::new(theirs, 22);
        let second = Duration::from_secs(1);
        let _ = pod.link.pod.run(move || std::net::TcpStream::connect_timeout(&to, second)).await;
        metrics().await.rejects_received > 0
    })
    .await;
    let flow = Flow { src: ours, dst: theirs, ..flow };
    let verdict = pod.client().why(patient(), flow).await.unwrap().unwrap();
    assert_eq!((verdict.decision, verdict.reason.as_str()), (Decision::RefusedByPeer, "acl"));
}

/// A node that is WireGuard and nothing else: answers pings and echoes UDP of these peers.
async fn plain(at: IpAddr, peers: &[NodePublic]) -> (NodePublic, SocketAddr, JoinSet<()>) {
    let secret = NodePrivate::generate().unwrap();
    let own = secret.public();
    let statics = StaticSecret::from(*secret.expose());
    let mut tunnels: BTreeMap<u32, ([u8; 32], Tunn)> = (1..)
        .zip(peers)
        .map(|(index, peer)| {
            let theirs = PublicKey::from(*peer.as_bytes());
            (index, (*peer.as_bytes(), Tunn::new(statics.clone(), theirs, None, None, index, None)))
        })
        .collect();
    let socket = UdpSocket::bind((at, 0)).await.unwrap();
    let endpoint = socket.local_addr().unwrap();
    let mut task = JoinSet::new();
    task.spawn(async move {
        let (mut datagram, mut out) = ([0; 2048], [0; 2048]);
        while let Ok((length, from)) = socket.recv_from(&mut datagram).await {
            let index = match Tunn::parse_incoming_packet(&datagram[..length]) {
                Ok(Packet::HandshakeInit(init)) => {
                    let public = PublicKey::from(&statics);
                    let Ok(half) = parse_handshake_anon(&statics, &public, &init) else { continue };
                    tunnels.iter().find(|(_, (key, _))| *key == half.peer_static_public).map(|(i, _)| *i)
                }
                Ok(Packet::HandshakeResponse(p)) => Some(p.receiver_idx >> 8),
                Ok(Packet::PacketData(p)) => Some(p.receiver_idx >> 8),
                Ok(Packet::PacketCookieReply(_)) | Err(_) => None,
            };
            let Some((_, tunnel)) = index.and_then(|index| tunnels.get_mut(&index)) else { continue };
            let mut input = &datagram[..length];
            let answer = loop {
                match tunnel.decapsulate(None, input, &mut out) {
                    TunnResult::WriteToNetwork(answer) => {
                        socket.send_to(answer, from).await.unwrap();
                        input = &[];
                    }
                    TunnResult::WriteToTunnelV4(packet, _) => break answer(packet),
                    TunnResult::Done | TunnResult::Err(_) | TunnResult::WriteToTunnelV6(..) => break None,
                }
            };
            if let Some(answer) = answer
                && let TunnResult::WriteToNetwork(sealed) = tunnel.encapsulate(&answer, &mut out)
            {
                socket.send_to(sealed, from).await.unwrap();
            }
        }
    });
    (own, endpoint, task)
}

/// The answer to an echo request, or to a datagram.
fn answer(packet: &[u8]) -> Option<Vec<u8>> {
    let mut back = packet.to_vec();
    let transport = usize::from(packet[0] & 15) * 4;
    back[12..16].copy_from_slice(&packet[16..20]);
    back[16..20].copy_from_slice(&packet[12..16]);
    match packet[9] {
        1 if packet[transport] == 8 => {
            back[transport] = 0;
            // The type is 8 less, so the checksum 0x0800 more.
            let sum = u32::from(u16::from_be_bytes([back[transport + 2], back[transport + 3]])) + 0x0800;
            let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
            back[transport + 2..transport + 4].copy_from_slice(&folded.to_be_bytes());
        }
        17 => {
            let ports = &packet[transport..transport + 4];
            back[transport..transport + 2].copy_from_slice(&ports[2..]);
            back[transport + 2..transport + 4].copy_from_slice(&ports[..2]);
        }
        _ => return None,
    }
    Some(back)
}

/// Both are told the same of a peer; both reach it or neither does.
pub(super) async fn alike(stock: &Stock) {
    let mut world = World::new(stock).await;
    let devnet = world.devnet.clone();
    let keys = ["pod", "stock"].map(|name| devnet.node(name).unwrap().node_key);

    let (key, endpoint, serving) = plain(world.join.addresses[0], &keys).await;
    let wireguard = devnet.add_wireguard_node("plain", key, vec![endpoint]).unwrap();
    let address = wireguard.addresses[0];
    world.until_both("a WireGuard-only peer is reached", address, true).await;
    assert!(world.reaches(address).await, "UDP too");
    let (disco, tsmp) = (world.both("disco", address).await, world.both("TSMP", address).await);
    println!("WireGuard-only, pod and stock: disco {disco:?}, TSMP {tsmp:?}");
    assert_eq!((disco, tsmp), ((false, false), (false, false)), "it speaks neither");
    assert!(devnet.delete_node(wireguard.id));
    world.until_both("a WireGuard-only peer that is removed is not reached", address, false).await;
    drop(serving);

    let mut third = Pod::make(&stock.dir, "third").await;
    let address = third.join(&world.join).await[0];
    let id = devnet.node("third").unwrap().id;
    let _echoes = echo(&third, SocketAddr::new(address, ECHO_PORT)).await;
    let _ours = echo(&world.pod, SocketAddr::new(world.ours, ECHO_PORT)).await;
    let gets_in = async |to: IpAddr| {
        probe(&third, address, SocketAddr::new(to, ECHO_PORT), 1, TICK).await.answered == 1
    };
    world.until_both("a plain member is reached", address, true).await;
    until("and reaches them", async || gets_in(world.ours).await && gets_in(world.theirs).await).await;
    // It does not know that its key has expired, and goes on.
    assert!(devnet.set_muted(id, true));
    devnet.expire_node(id);
    world.until_both("an expired peer is not reached", address, false).await;
    assert_eq!((gets_in(world.ours).await, gets_in(world.theirs).await), (false, false), "nor gets in");
    devnet.renew_node(id);
    assert!(devnet.set_muted(id, false));
    world.until_both("a peer whose key is valid again is reached", address, true).await;
    until("and gets in", async || gets_in(world.ours).await && gets_in(world.theirs).await).await;

    // Stock goes on with the tunnel it has to a peer that loses its disco key, and makes none to one that has
    // none from the start.
    assert!(devnet.hide_disco_key(id, true));
    world.node.restart().await;
    world.until_both("a peer without a disco key is not reached", address, false).await;
    assert!(devnet.hide_disco_key(id, false));
    world.until_both("a peer with a disco key again is reached", address, true).await;
    assert_eq!(devnet.complaints(), [""; 0]);
}

/// A stock node that was restarted has a new disco key and sends it inside the tunnel after a handshake.
pub(super) async fn advert(stock: &Stock) {
    let mut world = World::new(stock).await;
    let adverts =
        async |world: &World<'_>| world.pod.client().metrics(patient()).await.unwrap().disco_adverts;
    let direct = async |world: &World<'_>| {
        world.reaches(world.theirs).await;
        matches!(path(&world.pod, "stock").await, PathStatus::Direct { .. })
    };
    until("the path is direct", async || direct(&world).await).await;
    assert_eq!(adverts(&world).await, 0, "what control has told already counts for nothing");
    let old = world.devnet.node("stock").unwrap().disco_key;
    assert!(world.devnet.set_muted(world.pod_id, true));
    world.node.restart().await;
    let changed = world
        .devnet
        .wait_for(PATIENCE, |nodes| {
            nodes.iter().any(|n| n.name == "stock" && n.disco_key != old && n.streaming)
        })
        .await;
    assert!(changed, "stock has its old disco key: {}", world.node.log());
    let restarted = Instant::now();
    let ours = world.ours.to_string();
    until("the pod has the key from stock itself", async || {
        world.node.run(&["ping", "-c", "1", "--timeout", "1s", "--icmp", &ours]).await;
        adverts(&world).await > 0
    })
    .await;
    println!("taken after {:?}", restarted.elapsed());
    // Control tells the pod nothing, so that only the advertised key can make a path.
    until("the path is direct by the new key", async || direct(&world).await).await;
    println!("direct after {:?}, {} advert(s)", restarted.elapsed(), adverts(&world).await);
    assert!(world.devnet.set_muted(world.pod_id, false));
    until("they still talk", async || world.reaches(world.theirs).await).await;
    assert_eq!(world.devnet.complaints(), [""; 0]);
}

/// The pod registers a new node key in the place of its old one.
pub(super) async fn rotated(stock: &Stock) {
    let mut world = World::new(stock).await;
    let before = world.devnet.node("pod").unwrap();
    for _ in 0..3 {
        world.pod.rotate_node_key();
        world.pod.kill();
        world.pod.start(&world.join).await;
        let to = SocketAddr::new(world.theirs, ECHO_PORT);
        let probed = probe(&world.pod, world.ours, to, 200, TICK).await;
        println!(
            "after the new key {} of 200 at 20 ms unanswered, {:?} at most",
            200 - probed.answered,
            probed.gap
        );
        assert!(probed.lost.iter().all(|(_, last)| *last < 150), "{probed:?}");
        let after = world.devnet.node("pod").unwrap();
        assert_eq!((after.id, &after.addresses), (before.id, &before.addresses), "the same node");
        assert_ne!(after.node_key, before.node_key);
        for kind in ["--icmp", "--tsmp"] {
            let pong = world.node.ping(&[kind], world.ours).await;
            assert!(pong.contains("pong from"), "{kind}: {pong}\n{}", world.node.log());
        }
        let probed = probe(&world.pod, world.ours, SocketAddr::new(world.theirs, ECHO_PORT), 100, TICK).await;
        assert_eq!(probed.answered, 100, "{probed:?}");
    }
    assert_eq!(world.devnet.nodes().len(), 2);
    assert_eq!(world.devnet.complaints(), [""; 0]);
}
