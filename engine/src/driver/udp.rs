//! The underlay sockets: datagrams in batches, one system call per batch each way, and those of one peer
//! as one message where the kernel cuts and joins them.

use std::io::IoSliceMut;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::task::{Context, Poll};

use nix::errno::Errno;
use nix::sys::socket::{SockaddrStorage, setsockopt, sockopt};
use podtether_core::batch::{Batch, Run};
use podtether_core::engine::Shield;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::drops::{Drop, Drops};
use super::mmsg::{self, Message, Received, Receiver, SENDS};
use super::shield;
use super::tun::pollable;

/// Messages per system call, each of which may be a train of datagrams: together no more than a batch for the pod
/// takes ([`MAX_ITEMS`](podtether_core::batch::MAX_ITEMS)).
const SLOTS: usize = podtether_core::batch::MAX_ITEMS / Run::<SocketAddr>::MAX_PACKETS;
/// Longest message: datagrams of one peer that the kernel joined.
const SLOT: usize = 64 << 10;
/// Bytes that one call should bring at most, so that they are still in the processor's cache when they
/// are handed on.
const BYTES: usize = 128 << 10;
/// Longest datagram: WireGuard over the tunnel's MTU is about 1360 bytes, disco less.
const LONGEST: usize = 2048;
/// How long a full socket is waited for.
const FULL_WAIT: std::time::Duration = std::time::Duration::from_millis(5);

/// The socket of one address family.
#[derive(Debug)]
pub(crate) struct Udp {
    fd: AsyncFd<OwnedFd>,
    port: u16,
    receiver: Receiver,
    /// [`SLOTS`] times [`SLOT`] bytes, of which those are memory that datagrams came to lie in; empty while
    /// there is no traffic.
    slots: Vec<u8>,
    received: Vec<(usize, Received)>,
    /// Messages that the next call asks for.
    ask: usize,
    /// Whether the kernel cuts trains of datagrams on this socket.
    cuts: bool,
    /// For what is sent at once.
    room: Vec<Message<'static>>,
    v4: bool,
    shielded: bool,
    /// The kernel's count of drops at the last look.
    seen: u32,
}

impl Udp {
    pub(crate) fn new(fd: OwnedFd) -> std::io::Result<Self> {
        let address: SockaddrStorage = nix::sys::socket::getsockname(fd.as_raw_fd())?;
        let v4 = address.as_sockaddr_in();
        let port = v4.map(|a| a.port()).or_else(|| address.as_sockaddr_in6().map(|a| a.port()));
        let Some(port) = port.filter(|port| *port != 0) else {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "the UDP socket is not bound"));
        };
        let v4 = v4.is_some();
        let seen = shield::drops(fd.as_fd()).unwrap_or_default();
        // Not WRITABLE: every datagram that leaves the machine would wake us.
        let fd = pollable(fd, Interest::READABLE)?;
        Ok(Self {
            fd,
            port,
            receiver: Receiver::new(SLOTS),
            slots: Vec::new(),
            received: Vec::with_capacity(SLOTS),
            ask: SLOTS,
            cuts: true,
            room: Vec::new(),
            v4,
            shielded: false,
            seen,
        })
    }

    /// This process reads it from now on. The socket outlives engines; a filter of the one before has its marks.
    pub(crate) fn begin(&mut self) -> nix::Result<()> {
        shield::detach(self.fd.get_ref().as_fd())?;
        self.lost();
        // Without it every datagram comes alone.
        if let Err(error) = setsockopt(self.fd.get_ref(), sockopt::UdpGroSegment, &true) {
            tracing::warn!(%error, "the kernel joins no datagrams: throughput will be lower");
        }
        Ok(())
    }

    /// Has the kernel drop what `shield` says; `None`: nothing.
    pub(crate) fn set_shield(&mut self, shield: Option<&Shield>) -> nix::Result<()> {
        let socket = self.fd.get_ref().as_fd();
        match shield {
            Some(shield) => shield::attach(socket, &mut shield::program(shield, self.v4))?,
            None => shield::detach(socket)?,
        }
        self.shielded = shield.is_some();
        Ok(())
    }

    /// Whether the socket has a filter.
    pub(crate) fn is_shielded(&self) -> bool {
        self.shielded
    }

    /// Datagrams that the kernel dropped at this socket since the last call.
    pub(crate) fn lost(&mut self) -> u64 {
        let Some(drops) = shield::drops(self.fd.get_ref().as_fd()) else { return 0 };
        u64::from(drops.wrapping_sub(std::mem::replace(&mut self.seen, drops)))
    }

    /// Port that peers see on this machine.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Gives back the memory that a burst took.
    pub(crate) fn release(&mut self) {
        if self.received.is_empty() {
            self.slots = Vec::new();
        }
    }

    /// Whether there may be datagrams.
    pub(crate) fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.fd.poll_read_ready(cx).map_ok(|mut ready| ready.retain_ready())
    }

    /// Takes what has arrived, for [`Udp::datagrams`]; how many were too long to be ours.
    pub(crate) fn receive(&mut self) -> u64 {
        let Self { fd, receiver, slots, received, ask, .. } = self;
        received.clear();
        if slots.is_empty() {
            // Zeroes that nobody has touched are address space, not memory.
            *slots = vec![0; SLOTS * SLOT];
        }
        let mut bytes = 0;
        let mut unusable = 0;
        let mut messages = 0;
        let _ = fd.try_io(Interest::READABLE, |fd| {
            let mut chunks = slots.chunks_exact_mut(SLOT);
            let mut pieces: [IoSliceMut<'_>; SLOTS] =
                std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
            let pieces = pieces.get_mut(..*ask).unwrap_or_default();
            let asked = pieces.len();
            for (slot, message) in receiver.receive(fd.as_fd(), pieces)?.enumerate() {
                messages += 1;
                match message {
                    Some(message) if !message.truncated && message.segment <= LONGEST => {
                        bytes += message.length;
                        received.push((slot, message));
                    }
                    _ => unusable += 1,
                }
            }
            // The kernel had no more: the next one that comes wakes us.
            if messages < asked { Err(std::io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        // Other than "no more there" it is EINTR or an ICMP error that an earlier datagram caused: the next call goes
        // on.
        if messages > 0 {
            // As many again, and as many once more for what a burst grows to.
            let fit = (BYTES * messages).checked_div(bytes).unwrap_or(SLOTS);
            *ask = fit.min(2 * messages).clamp(2, SLOTS);
        }
        unusable
    }

    /// What [`Udp::receive`] took, with the sources.
    pub(crate) fn datagrams(&mut self) -> impl Iterator<Item = (SocketAddr, &mut [u8])> {
        let mut slots = self.slots.chunks_exact_mut(SLOT);
        let mut passed = 0;
        self.received.drain(..).flat_map(move |(slot, message)| {
            let chunk = slots.nth(slot - passed).unwrap_or_default();
            passed = slot + 1;
            let bytes = chunk.get_mut(..message.length).unwrap_or_default();
            // An empty datagram is none.
            bytes.chunks_mut(message.segment.max(1)).map(move |datagram| (message.from, datagram))
        })
    }

    /// Sends the datagrams of `batch` that are of this socket's family. A full socket is waited for
    /// once per call; what it still does not take is dropped and counted.
    pub(crate) async fn send(&mut self, batch: &Batch<SocketAddr>, drops: &mut Drops) {
        let mut queue = messages(batch, self.v4, self.cuts).peekable();
        let mut may_wait = true;
        while queue.peek().is_some() {
            let mut chunk = Chunk::new(std::mem::take(&mut self.room), &mut queue);
            while !chunk.is_empty() {
                match mmsg::send(self.fd.get_ref().as_fd(), chunk.left()) {
                    Ok(sent) => chunk.sent(sent.max(1)),
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) if may_wait => {
                        may_wait = false;
                        // If there is none yet after the wait, the next round finds out.
                        let _ = tokio::time::timeout(FULL_WAIT, writable(self.fd.get_ref())).await;
                    }
                    Err(Errno::EAGAIN | Errno::ENOBUFS) => {
                        let rest: u64 =
                            chunk.left().iter().copied().chain(queue).map(|m| datagrams_of(&m)).sum();
                        return drops.add(Drop::UdpFull, rest);
                    }
                    // EIO: the device computes no checksums. EINVAL: the datagrams are longer than this path takes
                    // at once.
                    Err(error @ (Errno::EIO | Errno::EINVAL | Errno::EMSGSIZE)) if chunk.first_is_train() => {
                        self.cuts &= error != Errno::EIO;
                        self.send_alone(chunk.first(), drops);
                        chunk.sent(1);
                    }
                    Err(_) => {
                        // Unreachable, forbidden, too long: this message's fault, not the others'.
                        drops.add(Drop::UdpError, chunk.first().map_or(0, |message| datagrams_of(&message)));
                        chunk.sent(1);
                    }
                }
            }
            self.room = chunk.room();
        }
    }

    /// Sends the datagrams of a train that the kernel does not cut here one by one.
    fn send_alone(&self, train: Option<Message<'_>>, drops: &mut Drops) {
        let Some(Message { to, bytes, segment: Some(segment) }) = train else { return };
        for bytes in bytes.chunks(usize::from(segment).max(1)) {
            match mmsg::send(self.fd.get_ref().as_fd(), &[Message { to, bytes, segment: None }]) {
                Ok(_) => {}
                Err(Errno::EAGAIN | Errno::ENOBUFS) => drops.count(Drop::UdpFull),
                Err(_) => drops.count(Drop::UdpError),
            }
        }
    }
}

/// Waits until there is room to send.
async fn writable(socket: &OwnedFd) -> std::io::Result<()> {
    let watched = pollable(socket.try_clone()?, Interest::WRITABLE)?;
    watched.writable().await.map(|_| ())
}

fn datagrams_of(message: &Message<'_>) -> u64 {
    let datagrams =
        message.segment.map_or(1, |segment| message.bytes.len().div_ceil(usize::from(segment).max(1)));
    u64::try_from(datagrams).unwrap_or(u64::MAX)
}

/// Whether a datagram is a WireGuard data message. Others go alone: a receiver under flood tells handshakes and
/// disco by their length before it cuts what its kernel joined.
fn is_data(datagram: &[u8]) -> bool {
    datagram.first() == Some(&4)
}

/// The batch's datagrams of one family as messages, trains of them where the kernel cuts those.
fn messages(batch: &Batch<SocketAddr>, v4: bool, cuts: bool) -> impl Iterator<Item = Message<'_>> {
    let ours =
        batch.runs(is_data).filter_map(move |run| Some((SockaddrStorage::from(family(*run.meta, v4)?), run)));
    ours.flat_map(move |(to, Run { bytes, size, packets, .. })| {
        let segment = u16::try_from(size).ok().filter(|_| cuts && packets > 1);
        let length = if segment.is_some() { bytes.len() } else { size };
        bytes.chunks(length.max(1)).map(move |bytes| Message { to, bytes, segment })
    })
}

/// Up to [`SENDS`] messages, and how far they are sent.
struct Chunk<'a> {
    messages: Vec<Message<'a>>,
    from: usize,
}

impl<'a> Chunk<'a> {
    /// `room` is the memory of the one before.
    fn new(room: Vec<Message<'static>>, queue: &mut impl Iterator<Item = Message<'a>>) -> Self {
        let mut messages: Vec<Message<'a>> = room;
        messages.extend(queue.take(SENDS));
        Self { messages, from: 0 }
    }

    /// For the next one.
    fn room(self) -> Vec<Message<'static>> {
        let mut messages = self.messages;
        messages.clear();
        // Collected in place: the memory stays, of which nothing borrows any more.
        messages.into_iter().map_while(|_| None).collect()
    }

    fn left(&self) -> &[Message<'a>] {
        self.messages.get(self.from..).unwrap_or_default()
    }

    fn is_empty(&self) -> bool {
        self.left().is_empty()
    }

    fn first(&self) -> Option<Message<'a>> {
        self.left().first().copied()
    }

    fn first_is_train(&self) -> bool {
        self.first().is_some_and(|message| message.segment.is_some())
    }

    fn sent(&mut self, messages: usize) {
        self.from += messages;
    }
}

/// `to` when it belongs to the family; an IPv4-mapped address counts as IPv4.
fn family(to: SocketAddr, v4: bool) -> Option<SocketAddr> {
    let to = match to {
        SocketAddr::V6(six) => match six.ip().to_ipv4_mapped() {
            Some(four) => SocketAddr::from((four, six.port())),
            None => to,
        },
        SocketAddr::V4(_) => to,
    };
    (to.is_ipv4() == v4).then_some(to)
}

/// Datagrams of `batch` that no socket of their family can take.
pub(crate) fn without_socket(batch: &Batch<SocketAddr>, has_v4: bool, has_v6: bool) -> u64 {
    let lost = batch.iter().filter(|(to, _)| match family(**to, true) {
        Some(_) => !has_v4,
        None => !has_v6,
    });
    u64::try_from(lost.count()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
