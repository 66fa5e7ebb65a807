//! One end of a tunnel forgets the other and learns of it again; the other has noticed nothing.
//!
//! Then the other's packets belong to a session that is lost. A pod answers the first of them with a handshake.
//! Stock drops them without a word, so whoever asks it waits until WireGuard itself has doubts, 15 s after the
//! first packet without an answer: a pod as well as another stock node.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use podtether_devnet::AuthKeyOptions;

use super::kinds::World;
use super::{Node, Stock, patient, until};

const PROMPT: Duration = Duration::from_secs(6);
/// What WireGuard waits, a handshake that is tried again, and a busy machine.
const IN_DOUBT: Duration = Duration::from_secs(30);

/// Whether the stock node has an answer from an address.
async fn pinged(node: &Node<'_>, from: IpAddr) -> bool {
    let ping = ["ping", "-c", "1", "--timeout", "1s", "--icmp", &from.to_string()];
    node.run(&ping).await.1.contains("pong from")
}

async fn sees(node: &Node<'_>, peer: IpAddr) -> bool {
    node.run(&["status", "--json"]).await.1.contains(&format!("\"{peer}\""))
}

/// How long until an answer comes.
async fn waited(mut asked: impl AsyncFnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !asked().await {
        assert!(begun.elapsed() < IN_DOUBT, "no answer came");
    }
    begun.elapsed()
}

pub(super) async fn forgotten(stock: &Stock) {
    let world = World::new(stock).await;
    let World { devnet, pod, ours, node, theirs, pod_id, stock_id, .. } = &world;
    let other = stock.join_with("other", devnet, &[], AuthKeyOptions::default()).await;
    let other_id = devnet.node("other").unwrap().id;
    let nobody = || Some("[[rules]]\nsrc = ['tag:none']\ndst = ['tag:none']".parse().unwrap());
    let pod_sees = async |peer: IpAddr| {
        let peers = pod.client().peers(patient()).await.unwrap();
        peers.iter().any(|seen| seen.addresses.contains(&peer))
    };

    for by_stock in [true, false] {
        until("all talk", async || {
            world.reaches(*theirs).await && pinged(node, *ours).await && pinged(&other, *theirs).await
        })
        .await;
        let unaware = if by_stock { [*pod_id, other_id] } else { [*stock_id, other_id] };
        assert!(unaware.iter().all(|id| devnet.set_muted(*id, true)));
        let knows = async || if by_stock { sees(node, *ours).await } else { pod_sees(*theirs).await };
        devnet.set_policy(nobody());
        until("forgotten", async || !knows().await).await;
        devnet.set_policy(None);
        until("known again", async || knows().await).await;
        assert!(unaware.iter().all(|id| devnet.set_muted(*id, false)));
        if by_stock {
            let (pod, stock) = tokio::join!(
                waited(async || world.reaches(*theirs).await),
                waited(async || pinged(&other, *theirs).await)
            );
            println!("stock forgot: the pod waited {pod:?}, another stock node {stock:?}");
        } else {
            let stock = waited(async || pinged(node, *ours).await).await;
            println!("the pod forgot: stock waited {stock:?}");
            assert!(stock < PROMPT);
        }
    }
}
