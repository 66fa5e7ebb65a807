//! The header in front of every packet of a TUN with `IFF_VNET_HDR`: `struct virtio_net_hdr` of
//! `linux/virtio_net.h`, in the host's byte order as TUNs have it unless told otherwise.

/// Length of the header: the one without `num_buffers`.
pub const VNET_HEADER_LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// What kind of packets one is to be cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gso {
    /// It is one packet.
    None,
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP over either, one datagram for each piece (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    Udp,
}

/// What the kernel says about a packet, or is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VnetHeader {
    /// The checksum field holds the sum of the pseudo header; the rest is still to be added.
    pub needs_csum: bool,
    /// The checksum has been verified.
    pub data_valid: bool,
    /// How to cut it.
    pub gso: Gso,
    /// TCP: the congestion window was reduced (CWR), which the first piece alone may say.
    pub ecn: bool,
    /// Bytes of all headers together: a hint, which senders get wrong.
    pub header_len: u16,
    /// Payload of each piece but the last, in bytes.
    pub gso_size: u16,
    /// Where the bytes start that the checksum covers.
    pub csum_start: u16,
    /// Where the checksum lies, counted from `csum_start`.
    pub csum_offset: u16,
}

/// A header of a kind that was not asked for, so the packet behind it cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// Flags other than the checksum's.
    #[error("the TUN's header has flags {0:#x}, which nobody asked for")]
    Flags(u8),
    /// UFO, tunnels and whatever comes to be.
    #[error("the TUN's header has GSO type {0:#x}, which nobody asked for")]
    Gso(u8),
}

impl From<()> for VnetHeader {
    fn from((): ()) -> Self {
        Self::PLAIN
    }
}

impl VnetHeader {
    /// One whole packet, about which nothing is said.
    pub const PLAIN: Self = Self {
        needs_csum: false,
        data_valid: false,
        gso: Gso::None,
        ecn: false,
        header_len: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
    };

    /// Reads what the kernel wrote.
    ///
    /// # Errors
    /// [`BadHeader`] for what it does only when asked to.
    pub fn read(bytes: &[u8; VNET_HEADER_LEN]) -> Result<Self, BadHeader> {
        let [flags, gso_type, rest @ ..] = *bytes;
        if flags & !(NEEDS_CSUM | DATA_VALID) != 0 {
            return Err(BadHeader::Flags(flags));
        }
        let gso = match gso_type & !GSO_ECN {
            GSO_NONE => Gso::None,
            GSO_TCPV4 => Gso::TcpV4,
            GSO_TCPV6 => Gso::TcpV6,
            GSO_UDP_L4 => Gso::Udp,
            _ => return Err(BadHeader::Gso(gso_type)),
        };
        let field = |at: usize| u16::from_ne_bytes([rest[at], rest[at + 1]]);
        Ok(Self {
            needs_csum: flags & NEEDS_CSUM != 0,
            data_valid: flags & DATA_VALID != 0,
            gso,
            ecn: gso_type & GSO_ECN != 0,
            header_len: field(0),
            gso_size: field(2),
            csum_start: field(4),
            csum_offset: field(6),
        })
    }

    /// As the kernel reads it.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; VNET_HEADER_LEN] {
        let flags =
            if self.needs_csum { NEEDS_CSUM } else { 0 } | if self.data_valid { DATA_VALID } else { 0 };
        let gso = match self.gso {
            Gso::None => GSO_NONE,
            Gso::TcpV4 => GSO_TCPV4,
            Gso::TcpV6 => GSO_TCPV6,
            Gso::Udp => GSO_UDP_L4,
        };
        let [a, b] = self.header_len.to_ne_bytes();
        let [c, d] = self.gso_size.to_ne_bytes();
        let [e, f] = self.csum_start.to_ne_bytes();
        let [g, h] = self.csum_offset.to_ne_bytes();
        [flags, gso | if self.ecn { GSO_ECN } else { 0 }, a, b, c, d, e, f, g, h]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_as_they_were_and_unasked_kinds_are_refused() {
        for gso in [Gso::None, Gso::TcpV4, Gso::TcpV6, Gso::Udp] {
            for bits in 0..8 {
                let header = VnetHeader {
                    needs_csum: bits & 1 != 0,
                    data_valid: bits & 2 != 0,
                    gso,
                    ecn: bits & 4 != 0,
                    header_len: 0x0102,
                    gso_size: 0x0304,
                    csum_start: 0x0506,
                    csum_offset: 0x0708,
                };
                assert_eq!(VnetHeader::read(&header.to_bytes()), Ok(header));
            }
        }
        assert_eq!(VnetHeader::read(&[0; 10]), Ok(VnetHeader::PLAIN));
        assert_eq!(VnetHeader::read(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Err(BadHeader::Flags(4)));
        for kind in [2, 3, 6, 0x21, 0x45, 0x83] {
            let bytes = [1, kind, 0, 0, 0, 0, 0, 0, 0, 0];
            assert_eq!(VnetHeader::read(&bytes), Err(BadHeader::Gso(kind)));
        }
    }

    #[test]
    fn fields_lie_where_the_kernel_has_them() {
        let mut bytes = [1, 0x81, 0, 0, 0, 0, 0, 0, 0, 0];
        bytes[2..4].copy_from_slice(&66u16.to_ne_bytes());
        bytes[4..6].copy_from_slice(&1228u16.to_ne_bytes());
        bytes[6..8].copy_from_slice(&20u16.to_ne_bytes());
        bytes[8..10].copy_from_slice(&16u16.to_ne_bytes());
        let header = VnetHeader::read(&bytes).unwrap();
        assert!(header.needs_csum && header.ecn && !header.data_valid);
        assert_eq!(header.gso, Gso::TcpV4);
        assert_eq!(
            (header.header_len, header.gso_size, header.csum_start, header.csum_offset),
            (66, 1228, 20, 16)
        );
    }
}
