//! Packets made from what they are to say, with checksums as RFC 1071 has them.

use podtether_core::offload::{Gso, VnetHeader};
use proptest::prelude::*;

pub(crate) const ACK: u8 = 0x10;
pub(crate) const PSH: u8 = 0x08;
pub(crate) const FIN: u8 = 0x01;
pub(crate) const CWR: u8 = 0x80;

/// Everything that one packet says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) v6: bool,
    /// `None` for UDP.
    pub(crate) tcp: Option<Tcp>,
    /// Last byte of the source address.
    pub(crate) source: u8,
    pub(crate) ports: [u16; 2],
    pub(crate) class: u8,
    pub(crate) flow_label: u16,
    pub(crate) ttl: u8,
    pub(crate) id: u16,
    /// IPv4's flags and offset.
    pub(crate) fragment: u16,
    pub(crate) ip_options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tcp {
    pub(crate) sequence: u32,
    pub(crate) ack: u32,
    /// The low four bits of byte 12.
    pub(crate) reserved: u8,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) urgent: u16,
    pub(crate) options: Vec<u8>,
}

pub(crate) fn timestamps(value: u32) -> Vec<u8> {
    [&[1, 1, 8, 10][..], &value.to_be_bytes(), &7u32.to_be_bytes()].concat()
}

/// A plain data segment, or datagram.
pub(crate) fn plain(v6: bool, tcp: bool, payload: usize) -> Spec {
    let tcp = tcp.then(|| Tcp {
        sequence: 0xffff_f000,
        ack: 77,
        reserved: 0,
        flags: ACK,
        window: 501,
        urgent: 0,
        options: timestamps(1000),
    });
    Spec {
        v6,
        tcp,
        source: 1,
        ports: [4000, 5201],
        class: 0,
        flow_label: 0,
        ttl: 64,
        id: 0xfffe,
        fragment: 0,
        ip_options: Vec::new(),
        payload: (0..payload).map(|n| u8::try_from(n % 251).unwrap()).collect(),
    }
}

fn sum(start: u32, bytes: &[u8]) -> u32 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

fn short(n: usize) -> u16 {
    u16::try_from(n).unwrap()
}

impl Spec {
    /// From 10.1.0.x to 10.2.0.2, or from fd01::x to fd02::2.
    pub(crate) fn addresses(&self) -> Vec<u8> {
        if self.v6 {
            let mut both = [0; 32];
            (both[0], both[1], both[15]) = (0xfd, 1, self.source);
            (both[16], both[17], both[31]) = (0xfd, 2, 2);
            both.to_vec()
        } else {
            vec![10, 1, 0, self.source, 10, 2, 0, 2]
        }
    }

    fn transport_header(&self) -> Vec<u8> {
        let [from, to] = self.ports.map(u16::to_be_bytes);
        match &self.tcp {
            None => [from, to, short(8 + self.payload.len()).to_be_bytes(), [0, 0]].concat(),
            Some(tcp) => {
                let words = u8::try_from(5 + tcp.options.len() / 4).unwrap();
                [
                    &from[..],
                    &to,
                    &tcp.sequence.to_be_bytes(),
                    &tcp.ack.to_be_bytes(),
                    &[words << 4 | tcp.reserved, tcp.flags],
                    &tcp.window.to_be_bytes(),
                    &[0, 0],
                    &tcp.urgent.to_be_bytes(),
                    &tcp.options,
                ]
                .concat()
            }
        }
    }

    fn protocol(&self) -> u8 {
        if self.tcp.is_some() { 6 } else { 17 }
    }

    fn pseudo(&self, length: usize) -> u32 {
        sum(sum(u32::from(self.protocol()), &self.addresses()), &short(length).to_be_bytes())
    }

    fn checksum_at(&self) -> usize {
        if self.tcp.is_some() { 16 } else { 6 }
    }

    pub(crate) fn ip_header(&self) -> usize {
        if self.v6 { 40 } else { 20 + self.ip_options.len() }
    }

    pub(crate) fn headers(&self) -> usize {
        self.ip_header() + self.transport_header().len()
    }

    fn wrap(&self, transport: &[u8]) -> Vec<u8> {
        let mut ip = if self.v6 {
            let [a, b] = self.flow_label.to_be_bytes();
            let length = short(transport.len()).to_be_bytes();
            vec![
                0x60 | self.class >> 4,
                self.class << 4,
                a,
                b,
                length[0],
                length[1],
                self.protocol(),
                self.ttl,
            ]
        } else {
            let words = u8::try_from(5 + self.ip_options.len() / 4).unwrap();
            let mut ip = vec![0x40 | words, self.class];
            ip.extend(short(self.ip_header() + transport.len()).to_be_bytes());
            ip.extend([self.id, self.fragment].map(u16::to_be_bytes).concat());
            ip.extend([self.ttl, self.protocol(), 0, 0]);
            ip
        };
        ip.extend(self.addresses());
        if !self.v6 {
            ip.extend(&self.ip_options);
            let checksum = !short(sum(0, &ip) as usize);
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        [&ip, transport].concat()
    }

    /// The packet as it goes on the wire.
    pub(crate) fn packet(&self) -> Vec<u8> {
        let mut transport = [self.transport_header(), self.payload.clone()].concat();
        let checksum = !short(sum(self.pseudo(transport.len()), &transport) as usize);
        let checksum = if checksum == 0 && self.tcp.is_none() { 0xffff } else { checksum };
        let at = self.checksum_at();
        transport[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        self.wrap(&transport)
    }

    /// The packet as the kernel leaves it to a card, to be cut into pieces of `size` payload; one that goes
    /// whole for 0.
    pub(crate) fn unfinished(&self, size: u16) -> (VnetHeader, Vec<u8>) {
        let mut transport = [self.transport_header(), self.payload.clone()].concat();
        let partial = short(self.pseudo(transport.len()) as usize);
        let at = self.checksum_at();
        transport[at..at + 2].copy_from_slice(&partial.to_be_bytes());
        let gso = match (size, &self.tcp, self.v6) {
            (0, ..) => Gso::None,
            (_, None, _) => Gso::Udp,
            (_, Some(_), false) => Gso::TcpV4,
            (_, Some(_), true) => Gso::TcpV6,
        };
        let header = VnetHeader {
            needs_csum: true,
            data_valid: false,
            gso,
            ecn: false,
            header_len: short(self.headers()),
            gso_size: size,
            csum_start: short(self.ip_header()),
            csum_offset: short(at),
        };
        (header, self.wrap(&transport))
    }

    /// The packets that pieces of `size` payload make, each from the start.
    pub(crate) fn pieces(&self, size: usize) -> Vec<Self> {
        let count = self.payload.len().div_ceil(size).max(1);
        (0..count)
            .map(|n| {
                let mut piece = self.clone();
                let end = ((n + 1) * size).min(self.payload.len());
                piece.payload = self.payload[n * size..end].to_vec();
                if !self.v6 {
                    piece.id = self.id.wrapping_add(short(n));
                }
                if let Some(tcp) = &mut piece.tcp {
                    tcp.sequence = tcp.sequence.wrapping_add(u32::try_from(n * size).unwrap());
                    if n + 1 < count {
                        tcp.flags &= !(FIN | PSH);
                    }
                    if n > 0 {
                        tcp.flags &= !CWR;
                    }
                }
                piece
            })
            .collect()
    }
}

/// Four-byte units of header options.
fn options(most: usize) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<[u8; 4]>(), 0..=most).prop_map(|words| words.concat())
}

fn tcp() -> impl Strategy<Value = Tcp> {
    (any::<u32>(), any::<u32>(), 0..16u8, any::<u8>(), any::<[u16; 2]>(), options(10)).prop_map(
        |(sequence, ack, reserved, flags, [window, urgent], options)| Tcp {
            sequence,
            ack,
            reserved,
            flags,
            window,
            urgent,
            options,
        },
    )
}

/// Any packet of up to `most` bytes of payload.
pub(crate) fn any_spec(most: usize) -> impl Strategy<Value = Spec> {
    let ip =
        (any::<bool>(), any::<u8>(), any::<u16>(), any::<u8>(), any::<u16>(), any::<bool>(), options(10));
    (ip, proptest::option::of(tcp()), any::<[u16; 2]>(), proptest::collection::vec(any::<u8>(), 0..=most))
        .prop_map(|((v6, class, flow_label, ttl, id, df, options), tcp, ports, payload)| Spec {
            v6,
            tcp,
            source: 1,
            ports,
            class,
            flow_label,
            ttl,
            id,
            fragment: if df { 0x4000 } else { 0 },
            ip_options: if v6 { Vec::new() } else { options },
            payload,
        })
}
