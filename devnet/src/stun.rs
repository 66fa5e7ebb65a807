//! The STUN server of a region. Like the real ones it ignores whatever does not come from a tailnet
//! client, so that it cannot be made to answer forged floods.

use std::sync::Arc;

use podtether_core::stun;
use tokio::net::UdpSocket;

use crate::derp::{Mode, Relay};

/// Largest request looked at; the clients' have 40 bytes.
const MAX_REQUEST: usize = 1280;

/// Answers for ever.
pub(crate) async fn serve(socket: UdpSocket, relay: Arc<Relay>) {
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
                if let Err(error) = socket.send_to(&stun::response(&transaction, from), from).await {
                    tracing::debug!(%error, "STUN answer failed");
                }
            }
            Err(error) => tracing::debug!(%error, %from, "ignored"),
        }
    }
}
