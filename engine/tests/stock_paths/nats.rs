//! A pod and a stock node, each behind a gateway that translates.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use podtether_devnet::lab::{Gateway, Lab, Nat, Node, Programs};
use podtether_devnet::{AuthKeyOptions, DevnetConfig};
use podtether_net::testing::block_on;
use podtether_proto::engine::PathStatus;

use super::common::{ENGINE, Join, Pod, echo, patient, probe};
use super::{ECHO_PORT, PATIENCE, Stock, TICK, direct, stock_echo};

/// So long a pair that cannot meet has to try.
const SEARCH: Duration = Duration::from_secs(12);
const KINDS: [(&str, Nat); 4] = [
    ("symmetric", Nat::Symmetric),
    ("ported", Nat::PortRestricted),
    ("restricted", Nat::AddressRestricted),
    ("cone", Nat::FullCone),
];

/// Whether two hosts behind such gateways can meet: whoever has a port for each destination is heard only where
/// the port does not matter.
fn can_meet(one: Nat, other: Nat) -> bool {
    let hears_any_port = |nat| matches!(nat, Nat::AddressRestricted | Nat::FullCone);
    match (one == Nat::Symmetric, other == Nat::Symmetric) {
        (true, true) => false,
        (true, false) => hears_any_port(other),
        (false, true) => hears_any_port(one),
        (false, false) => true,
    }
}

fn behind(lab: &mut Lab, side: &str, name: &str, nat: Nat) -> (Gateway, Node) {
    let mut gateway = lab.add_gateway(&format!("{side}-{name}-gw"), nat).unwrap();
    let node = lab.add_node_behind(&format!("{side}-{name}"), &mut gateway).unwrap();
    (gateway, node)
}

async fn path(pod: &Pod, to: IpAddr) -> PathStatus {
    let peers = pod.client().peers(patient()).await.unwrap();
    peers.into_iter().find(|peer| peer.addresses.contains(&to)).map_or(PathStatus::Idle, |peer| peer.path)
}

pub(super) fn scenario(dir: &Path, daemon: &Path, client: &Path) {
    let programs = Programs {
        supervisor: PathBuf::new(),
        engine: ENGINE.into(),
        tool: PathBuf::new(),
        cni: PathBuf::new(),
    };
    let mut lab = Lab::new(dir, programs).unwrap();
    let (devnet, _) = lab.start_devnet(DevnetConfig::default()).unwrap();
    let theirs = KINDS.map(|(name, nat)| (name, nat, behind(&mut lab, "theirs", name, nat)));
    let ours = KINDS.map(|(name, nat)| (name, nat, behind(&mut lab, "ours", name, nat)));
    let stocks = theirs.map(|(name, nat, (gateway, node))| {
        let mut stock = Stock::new(dir.join(format!("stock-{name}")), &devnet, daemon, client);
        stock.start(&node);
        let address = stock.up(&devnet, name);
        (name, nat, stock, address, gateway, node)
    });
    let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() }).secret;
    block_on(async {
        let mut echoes = Vec::new();
        for (.., node) in &stocks {
            echoes.push(stock_echo(node).await);
        }
        for (name, nat, (gateway, node)) in &ours {
            let mut pod = Pod::make_on(dir, &format!("pod-{name}"), Some(&node.netns)).await;
            let join = Join {
                control_url: devnet.https_url(),
                ca_pem: devnet.ca_pem().to_owned(),
                auth_key: Some(key.clone()),
                addresses: vec![gateway.inside(0)],
            };
            let own = pod.join(&join).await[0];
            echoes.push(echo(&pod, SocketAddr::new(own, 7)).await);
            for (other, their_nat, stock, address, ..) in &stocks {
                let to = SocketAddr::new(*address, ECHO_PORT);
                let begun = Instant::now();
                while probe(&pod, own, to, 1, TICK).await.answered == 0 {
                    assert!(begun.elapsed() < PATIENCE, "{name} and stock {other} do not talk");
                }
                let expected = can_meet(*nat, *their_nat);
                let patience = if expected { PATIENCE } else { SEARCH };
                let begun = Instant::now();
                let found = loop {
                    let probed = probe(&pod, own, to, 10, TICK).await;
                    assert!(probed.answered >= 9, "{name} and stock {other}: {probed:?}");
                    let found = path(&pod, *address).await;
                    if direct(&found) || begun.elapsed() > patience {
                        break found;
                    }
                };
                let took = begun.elapsed();
                let pong = stock.ping(own);
                println!("pod {name} and stock {other}: {found:?} after {took:?}; {}", pong.trim());
                assert_eq!(direct(&found), expected, "{name} and stock {other}: {found:?}");
                assert_eq!(pong.contains("via DERP"), !expected, "{name} and stock {other}: {pong}");
            }
        }
        assert_eq!(devnet.complaints(), [""; 0]);
    });
}
