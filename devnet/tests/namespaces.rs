//! Devnets on threads of their own, in network namespaces of their own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig, RegionConfig, StartError};
use podtether_net::netlink::Netlink;
use podtether_net::netns::Netns;
use podtether_net::testing::{block_on, in_namespaces};
use support::Machine;

fn config() -> DevnetConfig {
    let at = |port| vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)];
    let region =
        RegionConfig { derp_port: 8444, stun_port: 3478, ..RegionConfig::new(1, vec![at(0)[0].ip()]) };
    DevnetConfig {
        http_listen: at(8480),
        https_listen: at(8443),
        regions: vec![region],
        ..Default::default()
    }
}

#[test]
fn two_devnets_use_the_same_addresses_in_two_namespaces() {
    in_namespaces("two_devnets_use_the_same_addresses_in_two_namespaces", |_| {
        let mut devnets = Vec::new();
        for _ in 0..2 {
            let ns = block_on(async {
                let ns = Netns::create().await.unwrap();
                let netlink = Netlink::open(&ns).await.unwrap();
                let lo = netlink.link("lo").await.unwrap().unwrap();
                netlink.set_up(lo.index).await.unwrap();
                ns
            });
            let inside = ns.clone();
            let enter = move || inside.enter().map_err(io::Error::other);
            devnets.push((Devnet::spawn_thread(config(), enter).unwrap(), ns));
        }
        for (devnet, ns) in &devnets {
            let own = devnet.clone();
            ns.run_blocking(move || {
                block_on(Box::pin(async {
                    Machine::new("pod").join(&own, AuthKeyOptions::default()).await;
                }));
            })
            .unwrap();
            let node = devnet.node("pod").unwrap();
            assert_eq!(node.addresses[0], IpAddr::V4(Ipv4Addr::new(100, 64, 0, 1)));
        }
        let again = Devnet::spawn_thread(config(), {
            let ns = devnets[0].1.clone();
            move || ns.enter().map_err(io::Error::other)
        });
        assert!(matches!(again, Err(StartError::Listen { .. })), "its addresses are taken");
        for (devnet, _) in &devnets {
            block_on(devnet.stop());
        }
    });
}

#[test]
fn a_thread_that_cannot_enter_says_so() {
    let refused = Devnet::spawn_thread(config(), || Err(io::ErrorKind::PermissionDenied.into()));
    assert!(matches!(refused, Err(StartError::Thread(_))));
}
