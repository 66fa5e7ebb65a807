//! The connection between two processes of one node while one replaces the other.
//!
//! It keeps messages apart (`SOCK_SEQPACKET`). A message is its kind, then: for [`PASSED`] any number of
//! `kind of origin, origin, length u16, message`, all numbers little-endian; for [`GONE`] the flows that the
//! filter knows, as the core writes them.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use podtether_core::batch::{Batch, DerpDestination, Origin, RegionId};
use podtether_core::key::NodePublic;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::tun::pollable;

/// Bytes of a message, well below what a socket takes at once.
const MAX_MESSAGE: usize = 48 << 10;
/// How long a full socket is waited for.
const FULL_WAIT: Duration = Duration::from_millis(20);

const PASSED: u8 = 1;
const LET_GO: u8 = 2;
const GONE: u8 = 3;
const RELAY_UP: u8 = 4;

const FROM_V4: u8 = 4;
const FROM_V6: u8 = 6;
const FROM_RELAY: u8 = 7;
const FROM_POD: u8 = 8;
const TO_RELAY: u8 = 9;

/// What the other process said.
#[derive(Debug)]
pub(super) enum Message {
    /// What it read and does not know; it is in the batch.
    Passed,
    /// It wants to be the node.
    LetGo,
    /// It reads nothing any more. The flows its filter knows.
    Gone(Vec<u8>),
    /// It is connected to this region.
    RelayUp(RegionId),
    /// It has ended, or makes no sense.
    Ended,
}

/// This process's end.
#[derive(Debug)]
pub(super) struct Partner {
    fd: AsyncFd<OwnedFd>,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Partner {
    pub(super) fn new(fd: OwnedFd) -> std::io::Result<Self> {
        let fd = pollable(fd, Interest::READABLE.add(Interest::WRITABLE))?;
        Ok(Self { fd, incoming: vec![0; MAX_MESSAGE + 1], outgoing: Vec::new() })
    }

    /// The next message; what was passed is added to `passed`.
    pub(super) async fn message(&mut self, passed: &mut Batch<Origin>) -> Message {
        loop {
            let Ok(mut ready) = self.fd.readable().await else { return Message::Ended };
            match recv(self.fd.get_ref().as_raw_fd(), &mut self.incoming, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => {
                    let message = self.incoming.get(..length).and_then(|bytes| parse(bytes, passed));
                    return message.unwrap_or(Message::Ended);
                }
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(_) => return Message::Ended,
            }
        }
    }

    pub(super) async fn let_go(&self) -> bool {
        self.send(&[LET_GO]).await
    }

    pub(super) async fn gone(&self, flows: &[u8]) -> bool {
        let mut message = vec![GONE];
        // A table that were larger than a message would lose its newest: there is none.
        message.extend_from_slice(flows.get(..flows.len().min(MAX_MESSAGE - 1)).unwrap_or_default());
        self.send(&message).await
    }

    pub(super) async fn relay_up(&self, region: RegionId) -> bool {
        let mut message = vec![RELAY_UP];
        message.extend_from_slice(&region.0.to_le_bytes());
        self.send(&message).await
    }

    /// Passes messages on; how many the other did not take.
    pub(super) async fn pass(&mut self, messages: &Batch<Origin>) -> u64 {
        let mut out = std::mem::take(&mut self.outgoing);
        let (mut lost, mut held) = (0, 0);
        for (origin, message) in messages.iter() {
            if out.len() + ENTRY + message.len() > MAX_MESSAGE {
                lost += if self.send(&out).await { 0 } else { held };
                out.clear();
                held = 0;
            }
            let Ok(length) = u16::try_from(message.len()) else { continue };
            if out.is_empty() {
                out.push(PASSED);
            }
            put(*origin, &mut out);
            out.extend_from_slice(&length.to_le_bytes());
            out.extend_from_slice(message);
            held += 1;
        }
        if held > 0 && !self.send(&out).await {
            lost += held;
        }
        out.clear();
        self.outgoing = out;
        lost
    }

    /// False when it was not taken in time.
    async fn send(&self, message: &[u8]) -> bool {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let sending = self.fd.async_io(Interest::WRITABLE, |fd| Ok(send(fd.as_raw_fd(), message, flags)?));
        matches!(tokio::time::timeout(FULL_WAIT, sending).await, Ok(Ok(_)))
    }
}

/// Most bytes of an entry besides its message.
const ENTRY: usize = 1 + 4 + 32 + 2;

fn put(origin: Origin, out: &mut Vec<u8>) {
    match origin {
        Origin::Udp(from) => {
            match from.ip() {
                IpAddr::V4(ip) => {
                    out.push(FROM_V4);
                    out.extend_from_slice(&ip.octets());
                }
                IpAddr::V6(ip) => {
                    out.push(FROM_V6);
                    out.extend_from_slice(&ip.octets());
                }
            }
            out.extend_from_slice(&from.port().to_le_bytes());
        }
        Origin::Relay(relay) => put_relay(FROM_RELAY, relay, out),
        Origin::Pod => out.push(FROM_POD),
        Origin::ToRelay(relay) => put_relay(TO_RELAY, relay, out),
    }
}

fn put_relay(kind: u8, DerpDestination { region, peer }: DerpDestination, out: &mut Vec<u8>) {
    out.push(kind);
    out.extend_from_slice(&region.0.to_le_bytes());
    out.extend_from_slice(peer.as_bytes());
}

fn parse(bytes: &[u8], passed: &mut Batch<Origin>) -> Option<Message> {
    let (kind, rest) = bytes.split_first()?;
    match *kind {
        PASSED => {
            let mut rest = rest;
            while !rest.is_empty() {
                let origin = origin(&mut rest)?;
                let length = usize::from(u16::from_le_bytes(take(&mut rest)?));
                let (message, after) = rest.split_at_checked(length)?;
                passed.push(origin, message);
                rest = after;
            }
            Some(Message::Passed)
        }
        LET_GO => Some(Message::LetGo),
        GONE => Some(Message::Gone(rest.to_vec())),
        RELAY_UP => Some(Message::RelayUp(RegionId(u32::from_le_bytes(rest.try_into().ok()?)))),
        _ => None,
    }
}

fn origin(rest: &mut &[u8]) -> Option<Origin> {
    let [kind] = take(rest)?;
    Some(match kind {
        FROM_V4 => {
            let ip = IpAddr::from(take::<4>(rest)?);
            Origin::Udp(SocketAddr::new(ip, u16::from_le_bytes(take(rest)?)))
        }
        FROM_V6 => {
            let ip = IpAddr::from(take::<16>(rest)?);
            Origin::Udp(SocketAddr::new(ip, u16::from_le_bytes(take(rest)?)))
        }
        FROM_RELAY => Origin::Relay(relay(rest)?),
        FROM_POD => Origin::Pod,
        TO_RELAY => Origin::ToRelay(relay(rest)?),
        _ => return None,
    })
}

fn relay(rest: &mut &[u8]) -> Option<DerpDestination> {
    let region = RegionId(u32::from_le_bytes(take(rest)?));
    Some(DerpDestination { region, peer: NodePublic::from_bytes(take(rest)?) })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn pair() -> (Partner, Partner) {
        let (a, b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        (Partner::new(a).unwrap(), Partner::new(b).unwrap())
    }

    #[tokio::test]
    async fn what_is_passed_arrives_whole_and_in_order_and_an_end_is_seen() {
        let (mut a, mut b) = pair();
        let relay = DerpDestination { region: RegionId(9), peer: NodePublic::from_bytes([3; 32]) };
        let origins = [
            Origin::Udp("192.0.2.1:70".parse().unwrap()),
            Origin::Udp("[2001:db8::1]:7000".parse().unwrap()),
            Origin::Relay(relay),
            Origin::Pod,
            Origin::ToRelay(relay),
        ];
        let mut sent = Batch::new();
        for n in 0..200_usize {
            assert!(sent.push(origins[n % 5], &vec![u8::try_from(n).unwrap(); 10 * (n % 140)]));
        }
        let receiver = tokio::spawn(async move {
            let mut got = Batch::new();
            while got.len() < 200 {
                assert!(matches!(b.message(&mut got).await, Message::Passed));
            }
            assert!(matches!(b.message(&mut got).await, Message::LetGo));
            let Message::Gone(flows) = b.message(&mut got).await else { panic!("not gone") };
            assert_eq!(flows, [7; 100]);
            assert!(matches!(b.message(&mut got).await, Message::RelayUp(RegionId(9))));
            assert!(matches!(b.message(&mut got).await, Message::Ended));
            got
        });
        assert_eq!(a.pass(&sent).await, 0);
        assert!(a.let_go().await && a.gone(&[7; 100]).await && a.relay_up(RegionId(9)).await);
        drop(a);
        let got = receiver.await.unwrap();
        let all = |batch: &Batch<Origin>| batch.iter().map(|(o, m)| (*o, m.to_vec())).collect::<Vec<_>>();
        assert_eq!(all(&got), all(&sent));
    }

    #[tokio::test]
    async fn who_does_not_read_costs_what_is_passed_and_a_bounded_wait() {
        let (mut a, _b) = pair();
        let mut sent = Batch::new();
        for _ in 0..1000 {
            sent.push(Origin::Pod, &[0; 1300]);
        }
        let lost = a.pass(&sent).await;
        assert!(lost > 0 && lost < 1000, "{lost}");
    }

    #[test]
    fn what_makes_no_sense_is_no_message() {
        let mut batch = Batch::new();
        for bytes in
            [&b""[..], b"\x00", b"\x09", b"\x04", b"\x01\x05", b"\x01\x04\x01\x02", b"\x01\x08\x05\x00abc"]
        {
            assert!(parse(bytes, &mut batch).is_none(), "{bytes:?}");
        }
        assert!(batch.is_empty());
    }
}
