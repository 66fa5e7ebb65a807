//! Real floods: garbage at an engine's UDP port, from strangers and from a peer, and out of a pod into its
//! engine. The engine answers its supervisor, other traffic flows, memory and log stay small.
//!
//! What a flood costs beside the machine's time for sending it: each round measures the traffic in peace,
//! with the same flood at a socket that nobody reads, and with the flood at the engine. `FLOOD_ROUNDS=10`
//! and `--nocapture` print figures worth comparing.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and prints figures")]

#[path = "../common/mod.rs"]
mod common;
mod peers;
mod traffic;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use common::{Join, Pod};
use podtether_net::testing::{block_on, in_namespaces};
use traffic::{Flood, Sums, alone, has_dropped, strangers, stream, tailnet};

/// Some of everything that a stranger can send who knows the engine's public key.
fn garbage(pod: &Pod, join: &Join) -> Vec<Vec<u8>> {
    let key = pod.request(join).node_key;
    let public = PublicKey::from(&StaticSecret::from(*key.expose()));
    let mut stranger = Tunn::new(StaticSecret::from([0x77; 32]), public, None, None, 7, None);
    let mut buffer = [0; 256];
    let TunnResult::WriteToNetwork(initiation) = stranger.format_handshake_initiation(&mut buffer, false)
    else {
        panic!("no initiation");
    };
    let mut all = Vec::new();
    for n in 0..64_u8 {
        let mut packet = vec![0; 200];
        getrandom::fill(&mut packet).unwrap();
        match n % 6 {
            0 => {}
            1 => packet[..4].copy_from_slice(&[4, 0, 0, 0]),
            2 => packet = initiation.to_vec(),
            3 => packet[..6].copy_from_slice(&[0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac]),
            4 => packet[..8].copy_from_slice(&[1, 1, 0, 180, 0x21, 0x12, 0xa4, 0x42]),
            _ => {
                packet.truncate(92);
                packet[..4].copy_from_slice(&[2, 0, 0, 0]);
            }
        }
        all.push(packet);
    }
    all
}

#[test]
fn strangers_garbage_leaves_peers_their_traffic() {
    let _turn = alone();
    in_namespaces("strangers_garbage_leaves_peers_their_traffic", |dir| {
        block_on(async {
            let (_devnet, join) = tailnet().await;
            let (mut a, mut b) = (Pod::make(dir, "a").await, Pod::make(dir, "b").await);
            let address = SocketAddr::new(a.join(&join).await[0], 5001);
            b.join(&join).await;
            let bytes = stream(&b, &a, address).await;
            let sink = UdpSocket::bind("10.9.0.1:0").unwrap();
            let here = SocketAddr::new(join.addresses[0], a.port());
            let packets = garbage(&a, &join);
            let flood = |elsewhere: bool| {
                let to = if elsewhere { sink.local_addr().unwrap() } else { here };
                Flood::start(strangers(), packets.clone(), vec![to])
            };
            let (sums, metrics) = Sums::measure("a stranger", &a, &bytes, flood).await;
            let dropped: u64 = metrics.drops.iter().map(|(_, n)| n).sum();
            assert!(dropped > sums.sent / 2, "{metrics:?} of {}", sums.sent);
            let reasons =
                ["unknown_datagram", "unknown_session", "under_load", "unknown_disco", "flood_shield"];
            has_dropped(&metrics, &reasons);

            // Somebody new comes while it lasts.
            let flood = flood(false);
            let began = Instant::now();
            let mut c = Pod::make(dir, "c").await;
            c.join(&join).await;
            let joined = began.elapsed();
            let other = SocketAddr::new(address.ip(), 5002);
            let bytes = tokio::time::timeout(Duration::from_secs(30), stream(&c, &a, other)).await.unwrap();
            let connected = began.elapsed();
            while bytes.load(std::sync::atomic::Ordering::Relaxed) < 1 << 20 {
                assert!(began.elapsed() < Duration::from_secs(60), "{bytes:?} bytes");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            println!(
                "a new peer in the flood: joined after {joined:?}, connected after {connected:?}, a MiB \
                 after {:?}",
                began.elapsed()
            );
            flood.end();
        });
    });
}

#[test]
fn a_pods_garbage_leaves_other_pods_their_traffic() {
    let _turn = alone();
    in_namespaces("a_pods_garbage_leaves_other_pods_their_traffic", |dir| {
        block_on(async {
            let (_devnet, join) = tailnet().await;
            let (mut a, mut b) = (Pod::make(dir, "a").await, Pod::make(dir, "b").await);
            let mut hostile = Pod::make(dir, "hostile").await;
            let address = SocketAddr::new(a.join(&join).await[0], 5001);
            b.join(&join).await;
            let own = hostile.join(&join).await;
            let bytes = stream(&b, &a, address).await;
            // Nobody's addresses, a peer that drops it, the name server, another's name.
            let v4 = own.iter().copied().find(IpAddr::is_ipv4).unwrap();
            let mut targets: Vec<SocketAddr> =
                (1..=60).map(|n| SocketAddr::from(([100, 99, n, n], 9))).collect();
            targets.push(SocketAddr::new(address.ip(), 9));
            targets.push("100.100.100.100:53".parse().unwrap());
            let mut packets = vec![vec![0; 100]; 5];
            packets[1] = vec![0xff; 1200];
            let inside = || {
                let bind = move || (0..8).map(|_| UdpSocket::bind((v4, 0)).unwrap()).collect::<Vec<_>>();
                hostile.link.pod.run_blocking(bind).unwrap()
            };
            let sink = inside().remove(0);
            let flood = |elsewhere: bool| {
                let to = if elsewhere { vec![sink.local_addr().unwrap()] } else { targets.clone() };
                Flood::start(inside(), packets.clone(), to)
            };
            let (_, metrics) = Sums::measure("a pod", &hostile, &bytes, flood).await;
            has_dropped(&metrics, &["no_peer"]);
        });
    });
}
