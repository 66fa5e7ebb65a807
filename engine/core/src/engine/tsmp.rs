//! TSMP: what nodes tell each other inside the tunnel (IP protocol 99). It never reaches the pod, and none
//! of the pod's leaves.
//!
//! | message | from a peer | to a peer |
//! |---|---|---|
//! | `p` ping | answered | – |
//! | `o` pong | – | the ping's eight bytes and a peerapi port, of which there is none: 0 |
//! | `!` rejected | remembered for [`Engine::why`], as stock only notes it | for a SYN that the filter drops |
//! | `a` disco key | taken over for that peer | never: peers expect it of nodes that claim version 144 |

use std::net::IpAddr;

use super::*;
use crate::packet::{Parsed, protocol};
use crate::peer::PeerChanges;

const PING: u8 = b'p';
const PONG: u8 = b'o';
const REJECT: u8 = b'!';
const ADVERT: u8 = b'a';
const PONG_LEN: usize = 1 + 8 + 2;
const REJECT_LEN: usize = 1 + 1 + 1 + 2 + 2;
const MAYBE_BROKEN: u8 = 1;
/// Refusals told in a second, all peers together: a flood of SYNs must not become one of answers.
const MAX_REJECTS_PER_S: u32 = 200;
/// Refusals remembered.
const MAX_REMEMBERED: usize = 32;

/// A message of our own, ready to be encrypted.
pub(super) struct Answer {
    buf: [u8; 40 + PONG_LEN],
    len: usize,
}

impl Answer {
    pub(super) fn packet(&self) -> &[u8] {
        &self.buf[..self.len]
    }

    fn new(from: IpAddr, to: IpAddr, payload: &[u8]) -> Option<Self> {
        let mut answer = Answer { buf: [0; 40 + PONG_LEN], len: 0 };
        let length = u8::try_from(payload.len()).ok()?;
        let header = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let buf = &mut answer.buf[..20];
                buf[0] = 0x45;
                buf[3] = 20 + length;
                buf[8] = 64;
                buf[9] = protocol::TSMP;
                buf[12..16].copy_from_slice(&from.octets());
                buf[16..20].copy_from_slice(&to.octets());
                let sum = checksum(buf);
                buf[10..12].copy_from_slice(&sum.to_be_bytes());
                20
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let buf = &mut answer.buf[..40];
                buf[0] = 0x60;
                buf[5] = length;
                buf[6] = protocol::TSMP;
                buf[7] = 64;
                buf[8..24].copy_from_slice(&from.octets());
                buf[24..40].copy_from_slice(&to.octets());
                40
            }
            _ => return None,
        };
        answer.len = header + payload.len();
        answer.buf.get_mut(header..answer.len)?.copy_from_slice(payload);
        Some(answer)
    }
}

/// What a peer said.
pub(super) enum Message {
    Answer(Answer),
    Rejected(Rejected),
    Disco(DiscoPublic),
    Nothing,
}

/// A connection of the pod that a peer does not take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rejected {
    pub(super) protocol: u8,
    /// The pod's end.
    pub(super) from: SocketAddr,
    /// The peer's.
    pub(super) to: SocketAddr,
    /// The wire's letter.
    pub(super) reason: u8,
    /// The peer is not sure: the connection may come about all the same.
    pub(super) perhaps: bool,
}

impl Rejected {
    /// The reason in a word.
    pub(super) fn reason(&self) -> &'static str {
        match self.reason {
            b'A' => "acl",
            b'S' => "shields_up",
            b'F' => "ip_forwarding_off",
            b'W' => "host_firewall",
            _ => "unknown_reason",
        }
    }
}

/// Reads a TSMP packet. `known_as` is this node's address as the peer wrote it.
pub(super) fn read(packet: &[u8], parsed: &Parsed, known_as: IpAddr) -> Message {
    let Some((kind, rest)) = packet.get(parsed.transport..parsed.length).and_then(<[u8]>::split_first) else {
        return Message::Nothing;
    };
    let read = match *kind {
        PING => rest.first_chunk::<8>().and_then(|ping| {
            let mut pong = [0; PONG_LEN];
            pong[0] = PONG;
            pong[1..9].copy_from_slice(ping);
            Answer::new(known_as, parsed.src, &pong).map(Message::Answer)
        }),
        REJECT => rest.first_chunk::<6>().map(|[protocol, reason, a, b, c, d]| {
            Message::Rejected(Rejected {
                protocol: *protocol,
                from: SocketAddr::new(parsed.dst, u16::from_be_bytes([*a, *b])),
                to: SocketAddr::new(parsed.src, u16::from_be_bytes([*c, *d])),
                reason: *reason,
                perhaps: rest.get(6).is_some_and(|flags| flags & MAYBE_BROKEN != 0),
            })
        }),
        ADVERT => rest.first_chunk::<32>().map(|key| Message::Disco(DiscoPublic::from_bytes(*key))),
        _ => None,
    };
    read.unwrap_or(Message::Nothing)
}

/// Tells the sender of the SYN that `parsed` describes that it is not let in.
pub(super) fn reject(parsed: &Parsed, known_as: IpAddr, jailed: bool) -> Option<Answer> {
    let mut payload = [0; REJECT_LEN];
    payload[..3].copy_from_slice(&[REJECT, parsed.protocol, if jailed { b'S' } else { b'A' }]);
    payload[3..5].copy_from_slice(&parsed.src_port.to_be_bytes());
    payload[5..7].copy_from_slice(&parsed.dst_port.to_be_bytes());
    Answer::new(known_as, parsed.src, &payload)
}

/// What peers refused of late, and how much we told them of the same.
#[derive(Debug, Default)]
pub(super) struct Rejections {
    received: VecDeque<(Instant, Rejected)>,
    window: Option<Instant>,
    in_window: u32,
}

impl Rejections {
    /// Whether one more may be sent.
    pub(super) fn may_send(&mut self, now: Instant) -> bool {
        if self.window.is_none_or(|start| now.duration_since(start) >= Duration::from_secs(1)) {
            self.window = Some(now);
            self.in_window = 0;
        }
        self.in_window += 1;
        self.in_window <= MAX_REJECTS_PER_S
    }

    pub(super) fn note(&mut self, rejected: Rejected, now: Instant) {
        self.received
            .retain(|(_, r)| (r.protocol, r.from, r.to) != (rejected.protocol, rejected.from, rejected.to));
        if self.received.len() >= MAX_REMEMBERED {
            self.received.pop_front();
        }
        self.received.push_back((now, rejected));
    }

    /// The latest refusal of such a packet; any port of ours stands for another.
    pub(super) fn find(&self, protocol: u8, from: IpAddr, to: SocketAddr) -> Option<(Instant, Rejected)> {
        let same = |r: &Rejected| r.protocol == protocol && r.from.ip() == from && r.to == to;
        self.received.iter().rev().find(|(_, r)| same(r)).copied()
    }
}

impl Engine {
    /// A peer tells its disco key, which it made anew when it restarted. It is taken over as if control had
    /// told it, for this peer alone; a key that is another's, or ours, is nobody's to give away.
    pub(super) fn handle_disco_advert(
        &mut self,
        slot: Slot,
        key: DiscoPublic,
        now: Instant,
        out: &mut Outbox,
    ) {
        let Some(peer) = self.peers.get(slot) else { return };
        let taken = self.peers.by_disco(&key).is_some_and(|other| other != slot);
        if key.is_zero() || key == self.disco_public || taken || peer.wireguard_only || peer.disco.is_zero() {
            self.counters.drop(DropReason::BadDisco, 1);
            return;
        }
        let wall = self.netmap.control_time(self.wall(now));
        let mut changes = PeerChanges::default();
        self.peers.set_disco(slot, key, wall, now, &mut changes);
        if changes.changed.is_empty() {
            return;
        }
        tracing::debug!(peer = self.short_key(slot), "the peer told its new disco key");
        self.counters.disco_adverts += 1;
        self.apply_peers(changes, now, out);
    }
}

fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header.chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::build::{ip, ports};
    use crate::packet::tcp_flag::SYN;

    const PEER: [&str; 2] = ["100.64.0.1", "fd7a:115c:a1e0::1"];
    const OURS: [&str; 2] = ["100.64.0.2", "fd7a:115c:a1e0::2"];

    fn message(v: usize, payload: &[u8]) -> Message {
        let packet = ip(PEER[v], OURS[v], protocol::TSMP, payload);
        let parsed = Parsed::parse(&packet).expect("parses");
        read(&packet, &parsed, parsed.dst)
    }

    #[test]
    fn a_ping_is_answered() {
        for v in 0..2 {
            let Message::Answer(pong) = message(v, b"p12345678") else { panic!("an answer") };
            let back = Parsed::parse(pong.packet()).expect("parses");
            assert_eq!(
                (back.src.to_string(), back.dst.to_string()),
                (OURS[v].to_owned(), PEER[v].to_owned())
            );
            assert_eq!(&pong.packet()[back.transport..back.length], b"o12345678\0\0");
            if v == 0 {
                assert_eq!(checksum(&pong.packet()[..20]), 0, "a right checksum sums to zero");
            }
        }
    }

    #[test]
    fn what_a_refused_syn_gets_is_what_its_sender_understands() {
        for v in 0..2 {
            for (jailed, reason) in [(false, "acl"), (true, "shields_up")] {
                let syn = ip(PEER[v], OURS[v], 6, &ports(40000, 22, SYN));
                let syn = Parsed::parse(&syn).expect("parses");
                let told = reject(&syn, syn.dst, jailed).expect("an answer");
                let parsed = Parsed::parse(told.packet()).expect("parses");
                assert_eq!(&told.packet()[parsed.transport..][..2], &[b'!', 6]);
                let Message::Rejected(rejected) = read(told.packet(), &parsed, parsed.dst) else {
                    panic!("a rejection")
                };
                assert_eq!(
                    (rejected.from, rejected.to),
                    (SocketAddr::new(syn.src, 40000), SocketAddr::new(syn.dst, 22))
                );
                assert_eq!((rejected.reason(), rejected.perhaps), (reason, false));
            }
        }
        let Message::Rejected(doubtful) = message(0, b"!\x06W\0\x01\0\x02\x01") else {
            panic!("a rejection")
        };
        assert_eq!((doubtful.reason(), doubtful.perhaps), ("host_firewall", true));
    }

    #[test]
    fn what_is_short_or_unknown_is_nothing() {
        for payload in
            [&b"p123456"[..], b"a0123456789abcdef0123456789abcde", b"o12345678", b"zzzzzzz", b"!\x06A\0\0\0"]
        {
            let packet = ip(PEER[0], OURS[0], protocol::TSMP, payload);
            let Ok(parsed) = Parsed::parse(&packet) else { continue };
            assert!(matches!(read(&packet, &parsed, parsed.dst), Message::Nothing), "{payload:?}");
        }
        let advert = [b"a".as_slice(), &[7; 40]].concat();
        assert!(
            matches!(message(1, &advert), Message::Disco(key) if key == DiscoPublic::from_bytes([7; 32]))
        );
    }

    #[test]
    fn few_refusals_are_remembered_and_few_are_told() {
        let start = Instant::now();
        let mut rejections = Rejections::default();
        assert_eq!((0..1000).filter(|_| rejections.may_send(start)).count(), 200);
        assert!(rejections.may_send(start + Duration::from_secs(1)));
        let to = |port| SocketAddr::new(PEER[0].parse().expect("ip"), port);
        let from = SocketAddr::new(OURS[0].parse().expect("ip"), 9);
        for port in 0..100 {
            let rejected = Rejected { protocol: 6, from, to: to(port), reason: b'A', perhaps: false };
            rejections.note(rejected, start);
            rejections.note(rejected, start);
        }
        assert_eq!(rejections.received.len(), MAX_REMEMBERED);
        assert!(rejections.find(6, from.ip(), to(99)).is_some());
        assert!(rejections.find(6, from.ip(), to(5)).is_none());
        assert!(rejections.find(17, from.ip(), to(99)).is_none());
    }
}
