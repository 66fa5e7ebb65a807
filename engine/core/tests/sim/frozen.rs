//! Processes that stand still for a while, and what waits for them meanwhile.

use super::*;

/// A TUN device's queue.
const PACKETS: usize = 500;
/// What fits into a UDP socket's buffer, more or less.
const DATAGRAMS: usize = 4096;
/// What a driver reads at a time.
const AT_A_TIME: usize = 64;

#[derive(Default)]
pub(super) struct Queues {
    datagrams: Vec<(SocketAddr, Vec<u8>)>,
    packets: Vec<Vec<u8>>,
}

impl Queues {
    pub(super) fn keep_packet(&mut self, packet: &[u8]) {
        if self.packets.len() < PACKETS {
            self.packets.push(packet.to_vec());
        }
    }
}

impl World {
    /// `kill -STOP`: nothing is read, nothing is sent.
    pub(crate) fn freeze(&mut self, n: usize) {
        self.frozen.insert(n, Queues::default());
    }

    /// Kills a process that stands still. Its successor has the snapshot and finds what waited in the sockets, all
    /// of it before its own first timer when `queue_first`, else after it.
    pub(crate) fn replace_frozen(&mut self, n: usize, queue_first: bool) {
        let queues = self.frozen.remove(&n).expect("frozen");
        self.kill(n);
        self.boot(n, true);
        let now = self.now;
        if !queue_first {
            let mut out = Outbox::default();
            self.engine(n).handle_timeout(now, &mut out);
            self.emit(n, &mut out);
        }
        for some in queues.datagrams.chunks(AT_A_TIME) {
            let (mut batch, mut out) = (Batch::new(), Outbox::default());
            for (from, datagram) in some {
                assert!(batch.push(*from, datagram));
            }
            self.engine(n).handle_udp(&mut batch, now, &mut out);
            self.emit(n, &mut out);
        }
        for packet in queues.packets {
            self.send_raw(n, &packet);
        }
    }

    /// What a process that stands still does not get now: datagrams wait for it, the rest dies with it.
    pub(super) fn unless_frozen(&mut self, what: What) -> Option<What> {
        let to = match &what {
            What::Udp { to, .. }
            | What::Derp { to, .. }
            | What::DerpHeard { to, .. }
            | What::Latency { to, .. }
            | What::PeerGone { to, .. }
            | What::Control { to, .. }
            | What::Resolved { to, .. } => *to,
            What::DerpUp { node, .. } | What::StockTimeout { node, .. } => *node,
            // To an address, or from a node to control.
            What::Stun { .. } | What::HostUpdate { .. } => return Some(what),
        };
        let Some(queues) = self.frozen.get_mut(&to) else { return Some(what) };
        if let What::Udp { from, datagram, .. } = what
            && queues.datagrams.len() < DATAGRAMS
        {
            queues.datagrams.push((from, datagram));
        }
        None
    }
}
