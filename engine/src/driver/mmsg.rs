//! `recvmmsg` and `sendmmsg` with UDP's segmentation and receive offloads. nix has the calls, but keeps the
//! lengths of control messages from one `recvmmsg` to the next, which loses them after the first datagram
//! without one.

use std::io::IoSliceMut;
use std::mem::size_of;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{SockaddrLike as _, SockaddrStorage};

/// Messages of one `sendmmsg`.
pub(super) const SENDS: usize = 32;

/// Room for one control message with an int, aligned as the kernel's header is.
type Control = [u64; 4];
const CONTROL_HEADER: usize = size_of::<libc::cmsghdr>();

/// Received in one slot: one datagram, or several of one sender behind each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Received {
    /// Its sender.
    pub(super) from: SocketAddr,
    /// Bytes of all.
    pub(super) length: usize,
    /// Length of each but the last, which may be shorter.
    pub(super) segment: usize,
    /// Longer than its slot; what is there is of no use.
    pub(super) truncated: bool,
}

/// What the kernel writes to beside the data.
#[derive(Debug, Clone, Copy)]
struct Slot {
    name: libc::sockaddr_storage,
    control: Control,
}

/// Receives into slots.
pub(super) struct Receiver {
    slots: Box<[Slot]>,
    headers: Box<[libc::mmsghdr]>,
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("slots", &self.slots.len()).finish()
    }
}

// SAFETY: between calls the pointers in `headers` are never followed.
unsafe impl Send for Receiver {}

impl Receiver {
    pub(super) fn new(slots: usize) -> Self {
        // SAFETY: all zero is a valid sockaddr_storage.
        let name: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        // SAFETY: all zero is a valid mmsghdr: null pointers with zero lengths.
        let header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        Self {
            slots: vec![Slot { name, control: [0; 4] }; slots].into(),
            headers: vec![header; slots].into(),
        }
    }

    /// Receives what is there into `pieces`, one slot each, without waiting.
    pub(super) fn receive(
        &mut self,
        fd: BorrowedFd<'_>,
        pieces: &mut [IoSliceMut<'_>],
    ) -> nix::Result<impl Iterator<Item = Option<Received>>> {
        let mut count: libc::c_uint = 0;
        for ((header, slot), piece) in self.headers.iter_mut().zip(&mut self.slots).zip(pieces) {
            let header = &mut header.msg_hdr;
            header.msg_name = (&raw mut slot.name).cast();
            header.msg_namelen = socklen(size_of::<libc::sockaddr_storage>());
            // An IoSliceMut has the layout of an iovec.
            header.msg_iov = std::ptr::from_mut(piece).cast();
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut slot.control).cast();
            header.msg_controllen = size_of::<Control>();
            header.msg_flags = 0;
            count += 1;
        }
        let (headers, flags) = (self.headers.as_mut_ptr(), libc::MSG_DONTWAIT);
        // SAFETY: `count` headers were filled; what they point to is borrowed mutably until the call is over.
        let received = unsafe { libc::recvmmsg(fd.as_raw_fd(), headers, count, flags, std::ptr::null_mut()) };
        let received = usize::try_from(Errno::result(received)?).unwrap_or(0);
        Ok(self.headers.iter().zip(&self.slots).take(received).map(|(header, slot)| {
            let length = usize::try_from(header.msg_len).unwrap_or(usize::MAX);
            let control = header.msg_hdr.msg_controllen;
            Some(Received {
                from: address(&slot.name)?,
                length,
                segment: gro_segment(&slot.control, control).filter(|size| *size > 0).unwrap_or(length),
                truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            })
        }))
    }
}

/// The segment size that the kernel told in the first `length` bytes of `control`.
fn gro_segment(control: &Control, length: usize) -> Option<usize> {
    let [first, second, third, _] = control.map(u64::to_ne_bytes);
    // cmsghdr: length (8), level (4), type (4); then the int.
    let said = usize::from_ne_bytes(first);
    let level = i32::from_ne_bytes([second[0], second[1], second[2], second[3]]);
    let kind = i32::from_ne_bytes([second[4], second[5], second[6], second[7]]);
    let value = i32::from_ne_bytes([third[0], third[1], third[2], third[3]]);
    let whole = CONTROL_HEADER + size_of::<i32>();
    if length < whole || said < whole || level != libc::SOL_UDP || kind != libc::UDP_GRO {
        return None;
    }
    usize::try_from(value).ok()
}

fn address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the kernel wrote a sockaddr_in, which is smaller than the storage and as aligned.
            let four = unsafe { &*std::ptr::from_ref(name).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from_bits(u32::from_be(four.sin_addr.s_addr));
            Some(SocketAddr::V4(SocketAddrV4::new(ip, u16::from_be(four.sin_port))))
        }
        libc::AF_INET6 => {
            // SAFETY: the kernel wrote a sockaddr_in6, which is smaller than the storage and as aligned.
            let six = unsafe { &*std::ptr::from_ref(name).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(six.sin6_addr.s6_addr);
            // A link-local source is only reachable with its scope.
            let port = u16::from_be(six.sin6_port);
            Some(SocketAddr::V6(SocketAddrV6::new(ip, port, 0, six.sin6_scope_id)))
        }
        _ => None,
    }
}

/// One datagram to send, or several of one length behind each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message<'a> {
    /// Where to.
    pub(super) to: SockaddrStorage,
    /// All of it.
    pub(super) bytes: &'a [u8],
    /// Length of each datagram but the last, when there are several.
    pub(super) segment: Option<u16>,
}

/// Sends up to [`SENDS`] messages without waiting; how many the kernel took.
pub(super) fn send(fd: BorrowedFd<'_>, messages: &[Message<'_>]) -> nix::Result<usize> {
    // Arrays for many are memory that has to be fetched first, which one message after an idle spell feels.
    if messages.len() == 1 { send_up_to::<1>(fd, messages) } else { send_up_to::<SENDS>(fd, messages) }
}

fn send_up_to<const N: usize>(fd: BorrowedFd<'_>, messages: &[Message<'_>]) -> nix::Result<usize> {
    // SAFETY: all zero is a valid mmsghdr: null pointers with zero lengths.
    let mut headers: [libc::mmsghdr; N] = unsafe { std::mem::zeroed() };
    let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; N];
    let mut controls: [Control; N] = [[0; 4]; N];
    let mut count: libc::c_uint = 0;
    for (((header, piece), control), message) in
        headers.iter_mut().zip(&mut pieces).zip(&mut controls).zip(messages)
    {
        *piece =
            libc::iovec { iov_base: message.bytes.as_ptr().cast_mut().cast(), iov_len: message.bytes.len() };
        let header = &mut header.msg_hdr;
        header.msg_iov = piece;
        header.msg_iovlen = 1;
        header.msg_name = message.to.as_ptr().cast_mut().cast();
        header.msg_namelen = message.to.len();
        if let Some(segment) = message.segment {
            *control = segment_control(segment);
            header.msg_control = control.as_mut_ptr().cast();
            // One header, one value, padded.
            header.msg_controllen = CONTROL_HEADER + size_of::<u64>();
        }
        count += 1;
    }
    let flags = libc::MSG_DONTWAIT;
    // SAFETY: `count` headers are filled; what they point to (addresses, pieces, controls, data) outlives the
    // call, and sendmmsg only reads it.
    let sent = unsafe { libc::sendmmsg(fd.as_raw_fd(), headers.as_mut_ptr(), count, flags) };
    Errno::result(sent).map(|sent| usize::try_from(sent).unwrap_or(0))
}

/// The control message that says how long each datagram is.
fn segment_control(segment: u16) -> Control {
    let mut ids = [0; 8];
    ids[..4].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
    ids[4..].copy_from_slice(&libc::UDP_SEGMENT.to_ne_bytes());
    let mut value = [0; 8];
    value[..2].copy_from_slice(&segment.to_ne_bytes());
    let length = (CONTROL_HEADER + size_of::<u16>()).to_ne_bytes();
    [u64::from_ne_bytes(length), u64::from_ne_bytes(ids), u64::from_ne_bytes(value), 0]
}

fn socklen(bytes: usize) -> libc::socklen_t {
    libc::socklen_t::try_from(bytes).unwrap_or(libc::socklen_t::MAX)
}
