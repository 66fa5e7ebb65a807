//! Engines on the real kernel, against a devnet: each test in namespaces of its own.

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use common::{Join, PATIENCE, Pod, echo, patient, probe, underlay_addresses};
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig};
use podtether_net::testing::{block_on, in_namespaces};

fn reusable(devnet: &Devnet) -> Option<String> {
    Some(devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() }).secret)
}

#[test]
fn an_engine_registers_over_http_and_over_https() {
    in_namespaces("an_engine_registers_over_http_and_over_https", |dir| {
        block_on(async {
            let addresses = underlay_addresses(&["10.9.0.1/32"]).await;
            let devnet = Devnet::start(DevnetConfig::default()).await.unwrap();
            for (name, control_url, ca_pem) in [
                ("plain", devnet.http_url(), String::new()),
                ("secure", devnet.https_url(), devnet.ca_pem().to_owned()),
            ] {
                let mut pod = Pod::make(dir, name).await;
                let join =
                    Join { control_url, ca_pem, auth_key: reusable(&devnet), addresses: addresses.clone() };
                pod.start(&join).await;
                assert!(
                    devnet
                        .wait_for(PATIENCE, |nodes| nodes
                            .iter()
                            .any(|n| n.name.starts_with(name) && n.streaming))
                        .await
                );
                pod.client().stop(patient()).await.unwrap();
                let (status, reason) = pod.ended().await;
                assert_eq!(status.code(), Some(0), "{reason:?}");
            }
            assert_eq!(devnet.complaints(), Vec::<String>::new());
        });
    });
}

#[test]
fn two_pods_reach_each_other_over_both_families() {
    in_namespaces("two_pods_reach_each_other_over_both_families", |dir| {
        block_on(async {
            let addresses = underlay_addresses(&["10.9.0.1/32", "fd09::1/128"]).await;
            let devnet = Devnet::start(DevnetConfig::default()).await.unwrap();
            let join = Join {
                control_url: devnet.https_url(),
                ca_pem: devnet.ca_pem().to_owned(),
                auth_key: reusable(&devnet),
                addresses,
            };
            let (mut a, mut b) = (Pod::make(dir, "a").await, Pod::make(dir, "b").await);
            let a_addresses = a.join(&join).await;
            let b_addresses = b.join(&join).await;
            assert_eq!((a_addresses.len(), b_addresses.len()), (2, 2));
            for (from, to) in a_addresses.iter().zip(&b_addresses) {
                let to = SocketAddr::new(*to, 7);
                let _echo = echo(&b, to).await;
                let probed = probe(&a, *from, to, 100, Duration::from_millis(2)).await;
                assert_eq!((probed.sent, probed.answered), (100, 100), "{from} to {to}");
            }
            assert_eq!(devnet.complaints(), Vec::<String>::new());
        });
    });
}
