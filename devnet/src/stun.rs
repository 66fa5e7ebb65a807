//! The STUN server of a region. Like the real ones it ignores whatever does not come from a tailnet
//! client, so that it cannot be made to answer forged floods.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use podtether_core::stun;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::derp::{Mode, Relay};

/// Largest request looked at; the clients' have 40 bytes.
const MAX_REQUEST: usize = 1280;

/// Requests on their way to a region that is far; what is more is lost.
const UNDER_WAY: usize = 1024;

/// Answers for ever.
pub(crate) async fn serve(socket: UdpSocket, relay: Arc<Relay>) {
    let (requests, mut under_way) = mpsc::channel::<Request>(UNDER_WAY);
    let answering = async {
        while let Some((at, transaction, from)) = under_way.recv().await {
            sleep_until(at).await;
            match socket.send_to(&stun::response(&transaction, from), from).await {
                Ok(_) => {
                    relay.stun_answers.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => tracing::debug!(%error, "STUN answer failed"),
            }
        }
    };
    tokio::join!(answering, hear(&socket, &relay, requests));
}

type Request = (Instant, [u8; 12], SocketAddr);

async fn hear(socket: &UdpSocket, relay: &Relay, requests: mpsc::Sender<Request>) {
    let mut datagram = [0; MAX_REQUEST];
    loop {
        let (length, from) = match socket.recv_from(&mut datagram).await {
            Ok(received) => received,
            // An ICMP error of an earlier answer, reported on this call.
            Err(error) => {
                tracing::debug!(%error, "STUN receive failed");
                continue;
            }
        };
        if relay.mode() != Mode::Up {
            continue;
        }
        match stun::parse_request(&datagram[..length]) {
            Ok(transaction) => {
                let _ = requests.try_send((relay.distance.arrival(), transaction, from));
            }
            Err(error) => tracing::debug!(%error, %from, "ignored"),
        }
    }
}
