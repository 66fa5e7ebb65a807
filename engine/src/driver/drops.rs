//! Packets that the shell had to drop, by reason.

/// Why the shell dropped a packet; the core counts its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Drop {
    TunDown,
    TunFull,
    TunWrite,
    TunReadOffload,
    TunReadNoMemory,
    UdpFull,
    UdpError,
    UdpNoSocket,
    UdpTruncated,
    UdpUnread,
    DerpQueueFull,
    DerpNotConnected,
    DnsReply,
    NotPassed,
}

/// One counter per [`Drop`].
#[derive(Debug, Default)]
pub(crate) struct Drops([u64; Drop::NAMES.len()]);

impl Drop {
    const NAMES: [(Self, &'static str); 14] = [
        (Self::TunDown, "tun_link_down"),
        (Self::TunFull, "tun_queue_full"),
        (Self::TunWrite, "tun_write_error"),
        (Self::TunReadOffload, "tun_read_offload"),
        (Self::TunReadNoMemory, "tun_read_no_memory"),
        (Self::UdpFull, "udp_socket_full"),
        (Self::UdpError, "udp_send_error"),
        (Self::UdpNoSocket, "udp_no_socket"),
        (Self::UdpTruncated, "udp_truncated"),
        (Self::UdpUnread, "udp_unread"),
        (Self::DerpQueueFull, "derp_queue_full"),
        (Self::DerpNotConnected, "derp_not_connected"),
        (Self::DnsReply, "dns_reply_error"),
        (Self::NotPassed, "handover_not_passed"),
    ];
}

impl Drops {
    pub(crate) fn count(&mut self, why: Drop) {
        self.add(why, 1);
    }

    pub(crate) fn add(&mut self, why: Drop, packets: u64) {
        if let Some(counter) = self.0.get_mut(why as usize) {
            *counter += packets;
        }
    }

    /// Reasons that occurred.
    pub(crate) fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Drop::NAMES.iter().map(|(why, name)| (*name, self.0[*why as usize])).filter(|(_, n)| *n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_documented() {
        let document = include_str!("../../../docs/metrics.md");
        for (_, name) in Drop::NAMES {
            assert!(document.contains(&format!("\n| `{name}` | ")), "{name} is not in docs/metrics.md");
        }
    }

    #[test]
    fn every_reason_has_its_own_counter() {
        let mut drops = Drops::default();
        for (index, (why, _)) in Drop::NAMES.iter().enumerate() {
            assert_eq!(*why as usize, index);
            drops.count(*why);
        }
        drops.add(Drop::UdpFull, 2);
        let named: Vec<_> = drops.named().collect();
        assert_eq!(named.len(), Drop::NAMES.len());
        assert!(named.contains(&("udp_socket_full", 3)));
    }
}
