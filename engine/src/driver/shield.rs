//! The core's [`Shield`] as a socket filter (classic BPF), which the kernel asks about each datagram before
//! it is queued. One's own socket may be given one without privilege.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use libc::{
    BPF_ABS, BPF_ADD, BPF_ALU, BPF_AND, BPF_B, BPF_H, BPF_IMM, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP,
    BPF_K, BPF_LD, BPF_LDX, BPF_LEN, BPF_MEM, BPF_MISC, BPF_MUL, BPF_RET, BPF_ST, BPF_TAX, BPF_W, BPF_X,
    sock_filter,
};
use nix::errno::Errno;
use podtether_core::engine::{Class, Shield};

/// What a filter sees of a datagram begins with the UDP header.
const UDP_HEADER: u32 = 8;
/// Added to an offset that counts from the IP header (`SKF_NET_OFF`).
const NETWORK: u32 = 0xfff0_0000;
/// Loads a random number (`SKF_AD_OFF + SKF_AD_RANDOM`).
const RANDOM: u32 = 0xffff_f000 + 56;
const SOURCE_V4: [u32; 1] = [NETWORK + 12];
const SOURCE_V6: [u32; 4] = [NETWORK + 8, NETWORK + 12, NETWORK + 16, NETWORK + 20];
const SOURCE_PORT: u32 = 0;
/// Where a filter keeps the share of the datagram's class, and the share if a known peer sends from there.
const SHARE: u32 = 0;
const SHARE_KNOWN: u32 = 1;
/// "Keep all of it".
const WHOLE: u32 = u32::MAX;
/// Any odd number: sources only have to be told apart.
const FACTOR: u32 = 0x9e37_79b1;
/// Where SO_MEMINFO has the count of drops.
const MEMINFO_DROPS: usize = 8;

/// A program in the making. All jumps go forward.
#[derive(Default)]
struct Program {
    steps: Vec<sock_filter>,
    /// Jumps to what comes after a list.
    to_tail: Vec<usize>,
}

impl Program {
    fn push(&mut self, code: u32, k: u32) {
        self.jump(code, k, 0, 0);
    }

    fn jump(&mut self, code: u32, k: u32, jt: u8, jf: u8) {
        self.steps.push(sock_filter { code: u16::try_from(code).unwrap_or_default(), jt, jf, k });
    }

    fn load(&mut self, size: u32, offset: u32) {
        self.push(BPF_LD | size | BPF_ABS, offset);
    }

    fn load_length(&mut self) {
        self.push(BPF_LD | BPF_W | BPF_LEN, 0);
    }

    fn ret(&mut self, keep: u32) {
        self.push(BPF_RET | BPF_K, keep);
    }

    /// Does `then` if what is loaded compares so with `k`, and goes on behind it if not.
    fn when(&mut self, comparison: u32, k: u32, then: impl FnOnce(&mut Self)) {
        // Conditional jumps reach 255 steps, the other kind everywhere.
        self.jump(BPF_JMP | comparison | BPF_K, k, 1, 0);
        let over = self.steps.len();
        self.push(BPF_JMP | BPF_JA, 0);
        then(self);
        self.land(over);
    }

    fn drop_unless(&mut self, comparison: u32, k: u32) {
        self.jump(BPF_JMP | comparison | BPF_K, k, 1, 0);
        self.ret(0);
    }

    /// Has the jump at `from` lead to the next step.
    fn land(&mut self, from: usize) {
        let distance = self.steps.len().saturating_sub(from + 1);
        if let Some(step) = self.steps.get_mut(from) {
            step.k = u32::try_from(distance).unwrap_or_default();
        }
    }

    fn set(&mut self, place: u32, share: f64) {
        self.push(BPF_LD | BPF_IMM, of_whole(share));
        self.push(BPF_ST, place);
    }

    fn set_both(&mut self, share: f64) {
        self.set(SHARE, share);
        self.push(BPF_ST, SHARE_KNOWN);
    }

    fn go_to_tail(&mut self) {
        self.to_tail.push(self.steps.len());
        self.push(BPF_JMP | BPF_JA, 0);
    }

    /// A message with a receiver index at this offset: one without our mark is for no session of ours.
    fn session(&mut self, shield: &Shield, receiver: u32) {
        self.load(BPF_B, UDP_HEADER + receiver + 3);
        self.drop_unless(BPF_JEQ, u32::from(shield.mark));
        self.set_both(share(shield, Class::Session));
        // The index is little-endian, what is loaded big-endian: its last byte comes first.
        self.load(BPF_W, UDP_HEADER + receiver);
        self.push(BPF_ALU | BPF_AND | BPF_K, 0x00ff_ffff);
        for session in &shield.sessions {
            self.when(BPF_JEQ, (session << 8).swap_bytes(), |p| {
                p.set(SHARE_KNOWN, share(shield, Class::KnownSession));
                p.go_to_tail();
            });
        }
        self.go_to_tail();
    }
}

fn share(shield: &Shield, class: Class) -> f64 {
    shield.shares.get(class as usize).copied().unwrap_or_default()
}

/// Of so many random numbers, how many let a datagram through.
fn of_whole(share: f64) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is meant to")]
    let part = (share * f64::from(u32::MAX)) as u32;
    part
}

/// What the filter works out from a datagram's source.
fn fingerprint(source: SocketAddr) -> u32 {
    let words = match source.ip() {
        IpAddr::V4(ip) => vec![u32::from(ip)],
        IpAddr::V6(ip) => {
            ip.octets().chunks_exact(4).map(|b| b.iter().fold(0, |w, b| w << 8 | u32::from(*b))).collect()
        }
    };
    let address = words.into_iter().fold(0_u32, |sum, word| sum.wrapping_add(word).wrapping_mul(FACTOR));
    address.wrapping_add(u32::from(source.port()))
}

/// The filter for the socket of one family. The order of tests is that of `Shield::class`.
pub(super) fn program(shield: &Shield, v4: bool) -> Vec<sock_filter> {
    let mut p = Program::default();
    p.load_length();
    p.drop_unless(BPF_JGE, UDP_HEADER + 20);
    p.load(BPF_W, UDP_HEADER);
    // A handshake response names its sender before its receiver.
    for (kind, comparison, length, receiver) in
        [(0x0400_0000, BPF_JGE, 32, 4), (0x0200_0000, BPF_JEQ, 92, 8), (0x0300_0000, BPF_JEQ, 64, 4)]
    {
        p.when(BPF_JEQ, kind, |p| {
            p.load_length();
            p.drop_unless(comparison, UDP_HEADER + length);
            p.session(shield, receiver);
        });
    }
    p.when(BPF_JEQ, 0x0100_0000, |p| {
        p.load_length();
        p.drop_unless(BPF_JEQ, UDP_HEADER + 148);
        p.set(SHARE_KNOWN, share(shield, Class::Neighbour));
        p.set(SHARE, share(shield, Class::ProvenInitiation));
        p.load(BPF_W, UDP_HEADER + 132);
        p.when(BPF_JEQ, 0, |p| p.set(SHARE, share(shield, Class::Initiation)));
        p.go_to_tail();
    });
    p.when(BPF_JEQ, 0x5453_f09f, |p| {
        p.load_length();
        p.drop_unless(BPF_JGE, UDP_HEADER + 78);
        p.load(BPF_H, UDP_HEADER + 4);
        p.drop_unless(BPF_JEQ, 0x92ac);
        p.set(SHARE_KNOWN, share(shield, Class::Neighbour));
        p.set(SHARE, share(shield, Class::Disco));
        p.load(BPF_W, UDP_HEADER + 6);
        for key in &shield.disco_keys {
            p.when(BPF_JEQ, u32::from_be_bytes(*key), |p| {
                p.set(SHARE, share(shield, Class::KnownDisco));
                p.go_to_tail();
            });
        }
        p.go_to_tail();
    });
    // STUN.
    p.load(BPF_H, UDP_HEADER);
    p.drop_unless(BPF_JEQ, 0x0101);
    p.load(BPF_W, UDP_HEADER + 4);
    p.drop_unless(BPF_JEQ, 0x2112_a442);
    p.load(BPF_W, UDP_HEADER + 8);
    p.drop_unless(BPF_JEQ, u32::from_be_bytes(shield.stun_mark));
    p.set_both(share(shield, Class::Stun));

    for from in std::mem::take(&mut p.to_tail) {
        p.land(from);
    }
    let sources: Vec<u32> =
        shield.sources.iter().filter(|s| s.is_ipv4() == v4).map(|s| fingerprint(*s)).collect();
    if !sources.is_empty() {
        let words: &[u32] = if v4 { &SOURCE_V4 } else { &SOURCE_V6 };
        for (n, word) in words.iter().enumerate() {
            p.load(BPF_W, *word);
            if n > 0 {
                p.push(BPF_ALU | BPF_ADD | BPF_X, 0);
            }
            p.push(BPF_ALU | BPF_MUL | BPF_K, FACTOR);
            p.push(BPF_MISC | BPF_TAX, 0);
        }
        p.load(BPF_H, SOURCE_PORT);
        p.push(BPF_ALU | BPF_ADD | BPF_X, 0);
        for source in sources {
            p.when(BPF_JEQ, source, Program::go_to_tail);
        }
    }
    p.push(BPF_LDX | BPF_MEM, SHARE);
    p.jump(BPF_JMP | BPF_JA, 1, 0, 0);
    for from in std::mem::take(&mut p.to_tail) {
        p.land(from);
    }
    p.push(BPF_LDX | BPF_MEM, SHARE_KNOWN);
    p.load(BPF_W, RANDOM);
    p.jump(BPF_JMP | BPF_JGT | BPF_X, 0, 0, 1);
    p.ret(0);
    p.ret(WHOLE);
    p.steps
}

/// Puts a program on a socket, in the place of the one that it may have.
pub(super) fn attach(socket: BorrowedFd<'_>, program: &mut [sock_filter]) -> nix::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| Errno::EINVAL)?;
    let filter = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    let size = libc::socklen_t::try_from(size_of::<libc::sock_fprog>()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `filter` has the size given and points to `len` steps; the kernel copies both.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size,
        )
    };
    Errno::result(result).map(drop)
}

/// Takes a socket's filter away, if it has one.
pub(super) fn detach(socket: BorrowedFd<'_>) -> nix::Result<()> {
    let unused: libc::c_int = 0;
    // SAFETY: the option takes no value; the kernel wants the size of an int and reads nothing else.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DETACH_FILTER,
            (&raw const unused).cast(),
            4,
        )
    };
    match Errno::result(result) {
        Ok(_) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Datagrams that the kernel dropped at a socket since it was made, by a filter or because nobody read
/// them in time; wraps around.
pub(super) fn drops(socket: BorrowedFd<'_>) -> Option<u32> {
    let mut values = [0_u32; MEMINFO_DROPS + 1];
    let mut size = libc::socklen_t::try_from(size_of_val(&values)).ok()?;
    // SAFETY: `values` has `size` bytes, and the kernel writes no more.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut size,
        )
    };
    Errno::result(result).ok()?;
    (usize::try_from(size).ok()? >= size_of_val(&values)).then_some(values[MEMINFO_DROPS])
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd as _;
    use std::time::Duration;

    use super::*;

    const MARK: u8 = 0x9b;
    const STUN_MARK: [u8; 4] = [0xf1, 2, 3, 0xf4];
    const SESSION: u32 = (MARK as u32) << 16 | 0x5a5a;
    const DISCO: [u8; 4] = [0xaa, 0xbb, 0, 0xdd];

    fn shield(sources: Vec<SocketAddr>, shares: [f64; Class::COUNT]) -> Shield {
        let disco_keys = (0..63_u8).map(|n| [n, 1, 2, 3]).chain([DISCO]).collect();
        let sessions = vec![1, SESSION, 0x00ff_ffff];
        Shield { mark: MARK, stun_mark: STUN_MARK, sources, sessions, disco_keys, shares }
    }

    /// Something of every kind, whole and with each of its first bytes changed, and too long or short.
    fn datagrams() -> Vec<Vec<u8>> {
        let make = |length: usize, parts: &[(usize, &[u8])]| {
            let mut datagram = vec![0x5a; length];
            for (at, part) in parts {
                datagram[*at..at + part.len()].copy_from_slice(part);
            }
            datagram
        };
        // A response names its sender first, whose mark is its own.
        let mark = |kind| if kind == 2 { 11 } else { 7 };
        let wireguard = |kind, length| make(length, &[(0, &[kind, 0, 0, 0]), (mark(kind), &[MARK])]);
        let disco = |key: [u8; 4]| make(120, &[(0, "TS💬".as_bytes()), (6, &key)]);
        let mut proven = wireguard(1, 148);
        proven[132..].fill(0);
        let good = vec![
            wireguard(4, 32),
            wireguard(4, 1400),
            wireguard(2, 92),
            wireguard(3, 64),
            wireguard(1, 148),
            proven,
            disco(DISCO),
            disco([62, 1, 2, 3]),
            disco([9; 4]),
            make(40, &[(0, &[1, 1, 0, 20, 0x21, 0x12, 0xa4, 0x42]), (8, &STUN_MARK)]),
        ];
        let mut all = good.clone();
        for datagram in good {
            for at in 0..12 {
                let mut changed = datagram.clone();
                changed[at] ^= 1;
                all.push(changed);
            }
            let (short, long) = (datagram[..datagram.len() - 1].to_vec(), [&datagram[..], &[0]].concat());
            all.extend([short, long, datagram[..20].to_vec(), datagram[..3].to_vec()]);
        }
        all.push(Vec::new());
        all
    }

    /// Which of `datagrams` a socket with the filter gets from `sender`.
    fn received(shield: &Shield, sender: &UdpSocket, receiver: &UdpSocket, all: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let to = receiver.local_addr().unwrap();
        attach(receiver.as_fd(), &mut program(shield, to.is_ipv4())).unwrap();
        receiver.set_nonblocking(true).unwrap();
        let mut got = Vec::new();
        let mut buffer = [0; 2048];
        for datagram in all {
            sender.send_to(datagram, to).unwrap();
            while let Ok(length) = receiver.recv(&mut buffer) {
                got.push(buffer[..length].to_vec());
            }
        }
        // Loopback delivers within the call that sends, but that is nobody's promise.
        receiver.set_nonblocking(false).unwrap();
        receiver.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        while let Ok(length) = receiver.recv(&mut buffer) {
            got.push(buffer[..length].to_vec());
        }
        got
    }

    #[test]
    fn the_kernel_decides_as_the_core_says() {
        let classes = [
            Class::Initiation,
            Class::ProvenInitiation,
            Class::Session,
            Class::KnownSession,
            Class::Neighbour,
            Class::Disco,
            Class::KnownDisco,
            Class::Stun,
        ];
        for loopback in ["127.0.0.1:0", "[::1]:0"] {
            let bind = || UdpSocket::bind(loopback).unwrap();
            let (receiver, known, stranger) = (bind(), bind(), bind());
            let all = datagrams();
            let mut sources: Vec<SocketAddr> =
                (1..60).map(|n| SocketAddr::from(([192, 0, 2, 1], n))).collect();
            sources.extend(["[2001:db8::1]:9".parse().unwrap(), known.local_addr().unwrap()]);
            for class in classes {
                for others in [0.0, 1.0] {
                    let mut passed = 0;
                    let mut shares = [others; Class::COUNT];
                    shares[class as usize] = 1.0 - others;
                    shares[Class::Junk as usize] = 0.0;
                    let shield = shield(sources.clone(), shares);
                    for sender in [&known, &stranger] {
                        let from = sender.local_addr().unwrap();
                        let wanted: Vec<_> =
                            all.iter().filter(|d| shield.passes(from, d, 0.5)).cloned().collect();
                        passed += wanted.len();
                        let got = received(&shield, sender, &receiver, &all);
                        assert_eq!(got, wanted, "{class:?} {others} {from}");
                    }
                    assert!(passed > 0 && passed < 2 * all.len(), "{passed} for {class:?}");
                }
            }
        }
    }

    #[test]
    fn a_share_is_let_through_and_the_rest_is_counted_until_the_filter_goes() {
        let bind = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let (receiver, stranger) = (bind(), bind());
        let mut shares = [0.0; Class::COUNT];
        shares[Class::Disco as usize] = 0.25;
        let mut datagram = vec![7; 100];
        datagram[..6].copy_from_slice("TS💬".as_bytes());
        let all = vec![datagram; 4000];
        let before = drops(receiver.as_fd()).unwrap();
        let got = received(&shield(Vec::new(), shares), &stranger, &receiver, &all).len();
        assert!((800..1200).contains(&got), "{got} of 4000");
        let dropped = drops(receiver.as_fd()).unwrap().wrapping_sub(before);
        assert_eq!(usize::try_from(dropped).unwrap() + got, 4000);

        detach(receiver.as_fd()).unwrap();
        detach(receiver.as_fd()).unwrap();
        stranger.send_to(b"anything", receiver.local_addr().unwrap()).unwrap();
        assert_eq!(receiver.recv(&mut [0; 100]).unwrap(), 8);
    }
}
