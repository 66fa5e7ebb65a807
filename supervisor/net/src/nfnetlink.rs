//! As much of nfnetlink as one table with one chain needs: messages, nested attributes, a batch and the
//! kernel's answer to it. Layout: `linux/netfilter/nfnetlink.h` and `nf_tables.h`.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::error::{Result, Step};

const SUBSYSTEM_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const ERROR: u16 = 2;
/// `NFPROTO_INET`: IPv4 and IPv6 in one table.
const FAMILY_INET: u8 = 1;
const NESTED: u16 = 0x8000;
/// Length, type, flags, sequence, port; then family, version, resource.
const HEADER: usize = 16 + 4;
/// The kernel answers within its own system call; this only bounds a surprise.
const ANSWER_WITHIN_MS: libc::c_int = 2000;

/// What is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Make {
    Table,
    Chain,
    Rule,
}

impl Make {
    fn kind(self) -> u16 {
        let number = match self {
            Self::Table => 0,
            Self::Chain => 3,
            Self::Rule => 6,
        };
        SUBSYSTEM_NFTABLES << 8 | number
    }
}

/// Attributes in the order they were added.
#[derive(Debug, Default)]
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    pub(crate) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        // Everything built here is far below the 64 KiB that the field holds.
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(crate) fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(crate) fn text(self, kind: u16, value: &str) -> Self {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat())
    }

    pub(crate) fn nested(self, kind: u16, inner: Self) -> Self {
        self.bytes(kind | NESTED, &inner.0)
    }
}

/// Messages that take effect all at once or not at all.
#[derive(Debug)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    messages: u32,
}

impl Batch {
    pub(crate) fn new() -> Self {
        let mut batch = Self { bytes: Vec::new(), messages: 0 };
        batch.message(BATCH_BEGIN, REQUEST, 0, SUBSYSTEM_NFTABLES, &[]);
        batch
    }

    pub(crate) fn make(&mut self, what: Make, attributes: &Attributes) {
        self.messages += 1;
        let order = if what == Make::Rule { APPEND } else { 0 };
        self.message(what.kind(), REQUEST | ACK | CREATE | order, FAMILY_INET, 0, &attributes.0);
    }

    fn message(&mut self, kind: u16, flags: u16, family: u8, resource: u16, payload: &[u8]) {
        let length = u32::try_from(HEADER + payload.len()).unwrap_or(u32::MAX);
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(self.messages.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        self.bytes.extend(payload);
    }

    /// Sends the batch and waits until every message of it is acknowledged.
    pub(crate) fn commit(mut self, socket: &OwnedFd, what: &str) -> Result<()> {
        let expected = self.messages;
        self.message(BATCH_END, REQUEST, 0, SUBSYSTEM_NFTABLES, &[]);
        self.exchange(socket, expected).step(|| what.to_owned())
    }

    fn exchange(&self, socket: &OwnedFd, expected: u32) -> io::Result<()> {
        let mut answer = [0_u8; 8192];
        // The rest of what an earlier batch was answered.
        while receive(socket, &mut answer).is_ok() {}
        // SAFETY: the buffer outlives the call and has the length given.
        let sent = unsafe { libc::send(socket.as_raw_fd(), self.bytes.as_ptr().cast(), self.bytes.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut acknowledged = 0;
        while acknowledged < expected {
            let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd that outlives the call.
            match unsafe { libc::poll(&raw mut poll, 1, ANSWER_WITHIN_MS) } {
                0 => return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)),
                1.. => {}
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() == io::ErrorKind::Interrupted {
                        continue;
                    }
                    return Err(error);
                }
            }
            let read = receive(socket, &mut answer)?;
            acknowledged += acknowledgements(answer.get(..read).unwrap_or_default())?;
        }
        Ok(())
    }
}

fn receive(socket: &OwnedFd, answer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: writes at most the buffer's length into it.
    let read = unsafe {
        libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), libc::MSG_DONTWAIT)
    };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// How many messages `answer` acknowledges; an error when it refuses one.
fn acknowledgements(mut answer: &[u8]) -> io::Result<u32> {
    let cut = || io::Error::other("the kernel's answer is cut off");
    let mut count = 0;
    while !answer.is_empty() {
        let header = answer.first_chunk::<16>().ok_or_else(cut)?;
        let [l0, l1, l2, l3, k0, k1, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).map_err(|_| cut())?;
        let message = answer.get(16..length).ok_or_else(cut)?;
        if u16::from_ne_bytes([k0, k1]) == ERROR {
            match i32::from_ne_bytes(*message.first_chunk::<4>().ok_or_else(cut)?) {
                0 => count += 1,
                code => return Err(io::Error::from_raw_os_error(code.saturating_neg())),
            }
        }
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(count)
}

/// An nfnetlink socket of the calling thread's namespace.
pub(crate) fn open() -> Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: takes integers, returns a descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_NETFILTER) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).step(|| "open an nfnetlink socket".into());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).unwrap_or(0);
    // A refusal repeats the message it is about, and a batch's refusals would not fit the socket's buffer.
    // SAFETY: one integer of this length that outlives the call.
    let set = unsafe {
        libc::setsockopt(fd, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, (&raw const on).cast(), length)
    };
    if set < 0 {
        return Err(io::Error::last_os_error()).step(|| "shorten an nfnetlink socket's answers".into());
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_nested() {
        let inner = Attributes::default().number(1, 7);
        let bytes = Attributes::default().text(1, "ab").nested(2, inner).0;
        let text = [&7_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), b"ab\0\0"].concat();
        let number = [&8_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), &[0, 0, 0, 7]].concat();
        let nested = [&12_u16.to_ne_bytes()[..], &0x8002_u16.to_ne_bytes(), &number].concat();
        assert_eq!(bytes, [text, nested].concat());
    }

    #[test]
    fn answers_are_counted_and_refusals_are_errors() {
        let message = |code: i32| {
            let mut m = vec![];
            m.extend(36_u32.to_ne_bytes());
            m.extend(ERROR.to_ne_bytes());
            m.resize(16, 0);
            m.extend(code.to_ne_bytes());
            m.resize(36, 0);
            m
        };
        assert_eq!(acknowledgements(&[message(0), message(0)].concat()).unwrap(), 2);
        let refused = acknowledgements(&[message(0), message(-libc::EPERM)].concat()).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        for cut in 1..36 {
            assert!(acknowledgements(&message(0)[..cut]).is_err(), "{cut}");
        }
    }
}
