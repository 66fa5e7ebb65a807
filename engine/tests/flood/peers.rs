//! Floods by who has seen a peer's packets, and by a peer.

use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use podtether_net::testing::{block_on, in_namespaces};

use crate::common::Pod;
use crate::traffic::{Flood, Sums, alone, has_dropped, strangers, stream, tailnet};

const IP_HEADER: usize = 20;
const HEADERS: usize = IP_HEADER + 8;

/// Copies of WireGuard data on its way to `port`, with their IP and UDP headers.
fn overheard(port: u16, count: usize) -> Vec<Vec<u8>> {
    let everything =
        socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll);
    let mut everything = std::fs::File::from(everything.unwrap());
    let (mut buffer, mut found) = (vec![0; 1 << 16], Vec::new());
    let deadline = Instant::now() + Duration::from_secs(20);
    while found.len() < count {
        assert!(Instant::now() < deadline, "{} packets", found.len());
        let length = everything.read(&mut buffer).unwrap();
        let packet = &buffer[..length];
        if packet.len() > HEADERS + 32
            && packet[0] == 0x45
            && packet[9] == 17
            && packet[22..24] == port.to_be_bytes()
            && packet[HEADERS..HEADERS + 4] == [4, 0, 0, 0]
        {
            found.extend(datagrams(packet));
        }
    }
    found.truncate(count);
    found
}

/// The datagrams of a packet as a capture sees it: before the kernel cut the train that was sent. The next one
/// begins with the same type and receiver and the next counter.
fn datagrams(packet: &[u8]) -> Vec<Vec<u8>> {
    let (headers, mut rest) = packet.split_at(HEADERS);
    let mut cut = Vec::new();
    while !rest.is_empty() {
        let counter = u64::from_le_bytes(rest[8..16].try_into().unwrap());
        let next = [&rest[..8], &(counter + 1).to_le_bytes()].concat();
        let length = rest[16..].windows(16).position(|w| w == next).map_or(rest.len(), |at| at + 16);
        let mut copy = [headers, &rest[..length]].concat();
        // The kernel fills in the packet's length; the checksum was left to a device, and none is as good.
        copy[24..26].copy_from_slice(&u16::try_from(8 + length).unwrap().to_be_bytes());
        copy[26..28].fill(0);
        assert!(length < 2048, "{length} bytes");
        cut.push(copy);
        rest = &rest[length..];
    }
    cut
}

/// A socket that sends what is given to it as IP packets.
fn forger() -> Vec<OwnedFd> {
    vec![socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).unwrap()]
}

#[test]
fn replays_and_garbage_for_a_session_leave_peers_their_traffic() {
    let _turn = alone();
    in_namespaces("peers::replays_and_garbage_for_a_session_leave_peers_their_traffic", |dir| {
        block_on(async {
            let (_devnet, join) = tailnet().await;
            let (mut a, mut b) = (Pod::make(dir, "a").await, Pod::make(dir, "b").await);
            let address = SocketAddr::new(a.join(&join).await[0], 5001);
            b.join(&join).await;
            let bytes = stream(&b, &a, address).await;
            let (port, ip) = (a.port(), join.addresses[0]);
            let heard = tokio::task::spawn_blocking(move || overheard(port, 200)).await.unwrap();
            let broken: Vec<Vec<u8>> = heard
                .iter()
                .map(|packet| {
                    let mut packet = packet.clone();
                    *packet.last_mut().unwrap() ^= 1;
                    // A counter that is still to come.
                    packet[HEADERS + 12] = 0x55;
                    packet
                })
                .collect();
            let bare =
                |packets: &[Vec<u8>]| packets.iter().map(|p| p[HEADERS..].to_vec()).collect::<Vec<_>>();
            let sink = UdpSocket::bind("10.9.0.1:0").unwrap();
            let nobody = sink.local_addr().unwrap();
            let at = |elsewhere: bool| vec![if elsewhere { nobody } else { SocketAddr::new(ip, port) }];
            let from_elsewhere = |packets: Vec<Vec<u8>>| {
                move |elsewhere: bool| Flood::start(strangers(), packets.clone(), at(elsewhere))
            };
            // In the peer's name: who can do that is on the way, and the peer is not made to pay for it.
            let forged = |packets: Vec<Vec<u8>>| {
                move |elsewhere: bool| {
                    let mut packets = packets.clone();
                    if elsewhere {
                        packets
                            .iter_mut()
                            .for_each(|p| p[22..24].copy_from_slice(&nobody.port().to_be_bytes()));
                    }
                    Flood::start(forger(), packets, vec![SocketAddr::new(ip, 0)])
                }
            };
            Sums::measure("replays", &a, &bytes, from_elsewhere(bare(&heard))).await;
            Sums::measure("garbage for a session", &a, &bytes, from_elsewhere(bare(&broken))).await;
            Sums::measure("replays in the peer's name", &a, &bytes, forged(heard.clone())).await;
            // Each costs the attempt to open it: a look at its tag is the only way to tell.
            let what = "garbage for a session in the peer's name";
            let (_, metrics) = Sums::measure(what, &a, &bytes, forged(broken)).await;
            has_dropped(&metrics, &["duplicate", "bad_crypto", "flood_shield"]);
        });
    });
}

/// A peer's WireGuard, at a socket of its own.
struct Hostile {
    tunn: Tunn,
    socket: UdpSocket,
}

impl Hostile {
    fn new(key: [u8; 32], to: &Pod, at: SocketAddr) -> Self {
        let public = PublicKey::from(&StaticSecret::from(to.node_key));
        let mut tunn = Tunn::new(StaticSecret::from(key), public, None, None, 9, None);
        let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let (mut out, mut buffer) = ([0; 2048], [0; 2048]);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < deadline, "no session");
            if let TunnResult::WriteToNetwork(message) = tunn.format_handshake_initiation(&mut out, true) {
                socket.send_to(message, at).unwrap();
            }
            while let Ok(length) = socket.recv(&mut buffer) {
                if buffer[0] == 2
                    && let TunnResult::WriteToNetwork(keepalive) =
                        tunn.decapsulate(None, &buffer[..length], &mut out)
                {
                    socket.send_to(keepalive, at).unwrap();
                    return Self { tunn, socket };
                }
            }
        }
    }

    /// Enough for a phase, each with a counter of its own.
    fn sealed(&mut self, inner: &[u8]) -> Vec<Vec<u8>> {
        let mut out = [0; 2048];
        (0..60_000)
            .map(|_| {
                let sealed = self.tunn.encapsulate(inner, &mut out);
                let TunnResult::WriteToNetwork(message) = sealed else { panic!("{sealed:?}") };
                message.to_vec()
            })
            .collect()
    }
}

fn packet(src: Ipv4Addr, dst: Ipv4Addr) -> Vec<u8> {
    let mut p = vec![0; 100];
    p[0] = 0x45;
    p[3] = 100;
    p[8] = 64;
    p[9] = 17;
    p[12..16].copy_from_slice(&src.octets());
    p[16..20].copy_from_slice(&dst.octets());
    p[20..24].copy_from_slice(&[0, 80, 0, 9]);
    p
}

#[test]
fn a_peers_refused_packets_leave_other_peers_their_traffic() {
    let _turn = alone();
    in_namespaces("peers::a_peers_refused_packets_leave_other_peers_their_traffic", |dir| {
        block_on(async {
            let (devnet, join) = tailnet().await;
            let (mut a, mut b) = (Pod::make(dir, "a").await, Pod::make(dir, "b").await);
            let mut hostile = Pod::make(dir, "hostile").await;
            let address = SocketAddr::new(a.join(&join).await[0], 5001);
            b.join(&join).await;
            let own = hostile.join(&join).await;
            hostile.kill();
            let policy = r#"{"rules": [{"src": ["*"], "dst": ["*"], "ports": ["5001"], "proto": ["tcp"]}]}"#;
            devnet.set_policy(Some(policy.parse().unwrap()));
            let bytes = stream(&b, &a, address).await;
            let at = SocketAddr::new(join.addresses[0], a.port());
            let (key, IpAddr::V4(to)) = (hostile.node_key, address.ip()) else { panic!("{address}") };
            let v4 = own.iter().find_map(|ip| if let IpAddr::V4(v4) = ip { Some(*v4) } else { None });
            let mut peer = Hostile::new(key, &a, at);
            let sink = UdpSocket::bind("10.9.0.1:0").unwrap();
            let nobody = sink.local_addr().unwrap();
            for (what, inner, reason) in [
                ("a peer's packets that no rule lets in", packet(v4.unwrap(), to), "filter"),
                ("a peer's packets in another's name", packet([100, 99, 9, 9].into(), to), "peer_source"),
                ("a peer's garbage inside", vec![0xff; 100], "malformed"),
            ] {
                let flood = |elsewhere: bool| {
                    let packets = if elsewhere { vec![vec![4; 132]] } else { peer.sealed(&inner) };
                    let to = if elsewhere { nobody } else { at };
                    Flood::start(vec![peer.socket.try_clone().unwrap()], packets, vec![to])
                };
                let (_, metrics) = Sums::measure(what, &a, &bytes, flood).await;
                has_dropped(&metrics, &[reason, "flood_shield"]);
            }
        });
    });
}
