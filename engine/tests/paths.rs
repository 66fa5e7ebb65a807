//! Direct and relayed paths between engines on two nodes behind a router.

#![allow(clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use common::{ENGINE, Join, PATIENCE, Pod, echo, patient, probe};
use podtether_devnet::lab::{Lab, Programs};
use podtether_devnet::{AuthKeyOptions, DevnetConfig};
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::engine::PathStatus;

#[test]
fn a_relay_carries_what_udp_cannot_and_direct_comes_back() {
    in_namespaces("a_relay_carries_what_udp_cannot_and_direct_comes_back", |dir| {
        let programs = Programs {
            supervisor: PathBuf::new(),
            engine: ENGINE.into(),
            tool: PathBuf::new(),
            cni: PathBuf::new(),
        };
        let mut lab = Lab::new(dir, programs).unwrap();
        let (devnet, _) = lab.start_devnet(DevnetConfig::default()).unwrap();
        let nodes = ["one", "two"].map(|name| lab.add_node(name).unwrap());
        let options = AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() };
        let key = devnet.create_auth_key(options).secret;
        let join = |n: u8| Join {
            control_url: devnet.https_url(),
            ca_pem: devnet.ca_pem().to_owned(),
            auth_key: Some(key.clone()),
            addresses: vec![[10, n, 0, 2].into(), format!("fd10:{n}::2").parse().unwrap()],
        };
        lab.block_udp().unwrap();
        block_on(async {
            let mut a = Pod::make_on(dir, "a", Some(&nodes[0].netns)).await;
            let mut b = Pod::make_on(dir, "b", Some(&nodes[1].netns)).await;
            let from = a.join(&join(1)).await;
            let to = b.join(&join(2)).await;
            let mut echoes = Vec::new();
            for address in &to {
                echoes.push(echo(&b, SocketAddr::new(*address, 7)).await);
            }
            let round = async |a: &Pod, b: &Pod| {
                for (pod, from, to) in [(a, &from, &to)] {
                    for (from, to) in from.iter().zip(to) {
                        let probed =
                            probe(pod, *from, SocketAddr::new(*to, 7), 50, Duration::from_millis(5)).await;
                        assert_eq!(probed.answered, 50, "{} to {}: {from} to {to}", pod.name, b.name);
                    }
                }
            };

            round(&a, &b).await;
            assert_eq!(path(&a).await, PathStatus::Relay { region: 1 });
            assert_eq!(path(&b).await, PathStatus::Relay { region: 1 });

            std::thread::scope(|s| s.spawn(|| lab.unblock_udp()).join()).unwrap().unwrap();
            let deadline = std::time::Instant::now() + PATIENCE;
            while !matches!(path(&a).await, PathStatus::Direct { .. }) {
                assert!(std::time::Instant::now() < deadline, "no direct path came about");
                round(&a, &b).await;
            }
            round(&a, &b).await;

            // A direct path that dies costs a moment, not the connection.
            std::thread::scope(|s| s.spawn(|| lab.block_udp()).join()).unwrap().unwrap();
            let probed = probe(&a, from[0], SocketAddr::new(to[0], 7), 2000, Duration::from_millis(10)).await;
            println!("direct to relay: {probed:?}");
            assert!(probed.gap < Duration::from_secs(10), "{probed:?}");
            round(&a, &b).await;
            assert_eq!(devnet.complaints(), Vec::<String>::new());
        });
    });
}

/// The path to the one peer there is.
async fn path(pod: &Pod) -> PathStatus {
    let peers = pod.client().peers(patient()).await.unwrap();
    assert_eq!(peers.len(), 1);
    peers.into_iter().next().unwrap().path
}
