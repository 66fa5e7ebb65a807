//! The underlay sockets: datagrams in batches, one system call per batch each way.

use std::io::IoSliceMut;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrLike as _, SockaddrStorage, recvmmsg};
use podtether_core::batch::Batch;
use podtether_core::engine::Shield;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::drops::{Drop, Drops};
use super::shield;
use super::tun::pollable;

/// Datagrams per system call.
const BATCH: usize = 64;
/// Longest datagram: WireGuard over the tunnel's MTU is about 1360 bytes, disco less.
const SLOT: usize = 2048;
/// How long a full socket is waited for.
const FULL_WAIT: std::time::Duration = std::time::Duration::from_millis(5);

/// The socket of one address family.
#[derive(Debug)]
pub(crate) struct Udp {
    fd: AsyncFd<OwnedFd>,
    port: u16,
    headers: MultiHeaders<SockaddrStorage>,
    slots: Vec<u8>,
    v4: bool,
    shielded: bool,
    /// The kernel's count of drops at the last look.
    seen: u32,
}

impl Udp {
    pub(crate) fn new(fd: OwnedFd) -> std::io::Result<Self> {
        let address: SockaddrStorage = nix::sys::socket::getsockname(fd.as_raw_fd())?;
        let port = socket_addr(&address).map_or(0, |a| a.port());
        if port == 0 {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "the UDP socket is not bound"));
        }
        let v4 = address.as_sockaddr_in().is_some();
        let seen = shield::drops(fd.as_fd()).unwrap_or_default();
        let fd = pollable(fd, Interest::READABLE.add(Interest::WRITABLE))?;
        let headers = MultiHeaders::preallocate(BATCH, None);
        Ok(Self { fd, port, headers, slots: vec![0; BATCH * SLOT], v4, shielded: false, seen })
    }

    /// This process reads it from now on. The socket outlives engines; a filter of the one before has its marks.
    pub(crate) fn begin(&mut self) -> nix::Result<()> {
        shield::detach(self.fd.get_ref().as_fd())?;
        self.lost();
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

    /// Waits until there may be datagrams.
    pub(crate) async fn ready(&self) -> std::io::Result<()> {
        self.fd.readable().await?.retain_ready();
        Ok(())
    }

    /// Adds what has arrived to `batch`, with the sources; how many were too long to be ours.
    pub(crate) fn receive(&mut self, batch: &mut Batch<SocketAddr>) -> u64 {
        let Self { fd, headers, slots, .. } = self;
        let mut received = [(0_usize, None, false); BATCH];
        let result = fd.try_io(Interest::READABLE, |fd| {
            let mut chunks = slots.chunks_exact_mut(SLOT);
            let mut pieces: [[IoSliceMut<'_>; 1]; BATCH] =
                std::array::from_fn(|_| [IoSliceMut::new(chunks.next().unwrap_or_default())]);
            let messages = recvmmsg(fd.as_raw_fd(), headers, &mut pieces, MsgFlags::MSG_DONTWAIT, None)?;
            let mut count = 0;
            for (message, entry) in messages.zip(&mut received) {
                let truncated = message.flags.contains(MsgFlags::MSG_TRUNC);
                *entry = (message.bytes, message.address.as_ref().and_then(socket_addr), truncated);
                count += 1;
            }
            Ok(count)
        });
        // Other than "nothing there" it is EINTR or an ICMP error that an earlier datagram caused: the
        // next call goes on.
        let count = result.unwrap_or(0);
        let mut unusable = 0;
        for ((length, source, truncated), slot) in
            received.into_iter().take(count).zip(slots.chunks_exact(SLOT))
        {
            match (source, slot.get(..length)) {
                (Some(source), Some(datagram)) if !truncated => {
                    batch.push(source, datagram);
                }
                _ => unusable += 1,
            }
        }
        unusable
    }

    /// Sends the datagrams of `batch` that are of this socket's family. A full socket is waited for
    /// once per call; what it still does not take is dropped and counted.
    pub(crate) async fn send(&self, batch: &Batch<SocketAddr>, v4: bool, drops: &mut Drops) {
        let mut queue = batch.iter().filter_map(|(to, data)| Some((family(*to, v4)?, data)));
        let mut may_wait = true;
        loop {
            let mut chunk = Chunk::default();
            chunk.fill(&mut queue);
            if chunk.length == 0 {
                return;
            }
            let mut from = 0;
            while from < chunk.length {
                match chunk.send(self.fd.as_raw_fd(), from) {
                    Ok(sent) => from += sent.max(1),
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) if may_wait => {
                        may_wait = false;
                        let again = |_: &OwnedFd| chunk.send(self.fd.as_raw_fd(), from).map_err(Into::into);
                        let wait = self.fd.async_io(Interest::WRITABLE, again);
                        // Any failure shows again in the next round, where it is counted.
                        if let Ok(Ok(sent)) = tokio::time::timeout(FULL_WAIT, wait).await {
                            from += sent;
                        }
                    }
                    Err(Errno::EAGAIN | Errno::ENOBUFS) => {
                        let rest = chunk.length - from + queue.by_ref().count();
                        drops.add(Drop::UdpFull, u64::try_from(rest).unwrap_or(u64::MAX));
                        return;
                    }
                    Err(_) => {
                        // Unreachable, forbidden, too long: this datagram's fault, not the others'.
                        drops.count(Drop::UdpError);
                        from += 1;
                    }
                }
            }
        }
    }
}

/// Up to [`BATCH`] datagrams in the form that sendmmsg takes.
struct Chunk<'a> {
    addresses: [Option<SockaddrStorage>; BATCH],
    data: [&'a [u8]; BATCH],
    length: usize,
}

impl Default for Chunk<'_> {
    fn default() -> Self {
        Self { addresses: [None; BATCH], data: [&[]; BATCH], length: 0 }
    }
}

impl<'a> Chunk<'a> {
    fn fill(&mut self, queue: &mut impl Iterator<Item = (SocketAddr, &'a [u8])>) {
        for ((to, data), (address, slot)) in
            queue.take(BATCH).zip(self.addresses.iter_mut().zip(&mut self.data))
        {
            *address = Some(SockaddrStorage::from(to));
            *slot = data;
            self.length += 1;
        }
    }

    /// Sends from number `from` on; how many the kernel took.
    fn send(&self, fd: std::os::fd::RawFd, from: usize) -> nix::Result<usize> {
        let mut pieces: [libc::iovec; BATCH] =
            self.data.map(|d| libc::iovec { iov_base: d.as_ptr().cast_mut().cast(), iov_len: d.len() });
        // SAFETY: all zero is a valid mmsghdr: null pointers with zero lengths.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
        let count = self.length.saturating_sub(from);
        for (((header, piece), address), _) in headers
            .iter_mut()
            .zip(pieces.iter_mut().skip(from))
            .zip(self.addresses.iter().skip(from))
            .zip(0..count)
        {
            header.msg_hdr.msg_iov = piece;
            header.msg_hdr.msg_iovlen = 1;
            if let Some(address) = address {
                header.msg_hdr.msg_name = address.as_ptr().cast_mut().cast();
                header.msg_hdr.msg_namelen = address.len();
            }
        }
        let count = libc::c_uint::try_from(count).map_err(|_| Errno::EINVAL)?;
        // SAFETY: `count` headers are filled; what they point to (addresses, pieces, data) outlives the
        // call, and sendmmsg only reads it.
        let sent = unsafe { libc::sendmmsg(fd, headers.as_mut_ptr(), count, libc::MSG_DONTWAIT) };
        Errno::result(sent).map(|sent| usize::try_from(sent).unwrap_or(0))
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

fn socket_addr(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(four) = address.as_sockaddr_in() {
        return Some(SocketAddr::V4(SocketAddrV4::new(four.ip(), four.port())));
    }
    let six = address.as_sockaddr_in6()?;
    let ip: Ipv6Addr = six.ip();
    // A link-local source is only reachable with its scope.
    Some(SocketAddr::V6(SocketAddrV6::new(ip, six.port(), 0, six.scope_id())))
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
mod tests {
    use super::*;

    fn bound(address: &str) -> (Udp, SocketAddr) {
        let socket = std::net::UdpSocket::bind(address).unwrap();
        let local = socket.local_addr().unwrap();
        (Udp::new(socket.into()).unwrap(), local)
    }

    #[tokio::test]
    async fn batches_arrive_whole_with_their_source() {
        for loopback in ["127.0.0.1:0", "[::1]:0"] {
            let (sender, from) = bound(loopback);
            let (mut receiver, to) = bound(loopback);
            let mut out = Batch::new();
            for n in 0..150_u8 {
                assert!(out.push(to, &vec![n; usize::from(n) + 1]));
            }
            // Another family's datagram, and one that is too long for the receiver.
            let other: SocketAddr = if to.is_ipv4() { "[::1]:9" } else { "127.0.0.1:9" }.parse().unwrap();
            assert!(out.push(other, b"other"));
            assert!(out.push(to, &[0; SLOT + 1]));
            let mut drops = Drops::default();
            sender.send(&out, to.is_ipv4(), &mut drops).await;
            assert_eq!(drops.named().count(), 0);
            let mut got = Batch::new();
            let mut unusable = 0;
            while unusable == 0 {
                receiver.ready().await.unwrap();
                unusable += receiver.receive(&mut got);
            }
            assert_eq!(unusable, 1);
            let got: Vec<_> = got.iter().map(|(m, d)| (*m, d.to_vec())).collect();
            let sent: Vec<_> = (0..150_u8).map(|n| (from, vec![n; usize::from(n) + 1])).collect();
            assert_eq!(got, sent);
            assert_eq!(without_socket(&out, false, true), if to.is_ipv4() { 151 } else { 1 });
        }
    }

    #[tokio::test]
    async fn one_bad_destination_does_not_cost_the_others() {
        let (sender, _) = bound("127.0.0.1:0");
        let (mut receiver, to) = bound("127.0.0.1:0");
        let mut out = Batch::new();
        // Port 0 is refused by the kernel.
        for to in [to, "127.0.0.1:0".parse().unwrap(), to] {
            assert!(out.push(to, b"x"));
        }
        let mut drops = Drops::default();
        sender.send(&out, true, &mut drops).await;
        assert_eq!(drops.named().collect::<Vec<_>>(), [("udp_send_error", 1)]);
        let mut got = Batch::new();
        while got.len() < 2 {
            receiver.ready().await.unwrap();
            assert_eq!(receiver.receive(&mut got), 0);
        }
    }
}
