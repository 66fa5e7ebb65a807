//! Segmentation and coalescing against the kernel's own, and what its stack makes of them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "the library's own tests use the rest")]
#[path = "../../engine/core/tests/offload/naive.rs"]
mod naive;

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use naive::{Spec, any_spec, plain};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::uio::writev;
use podtether_core::batch::Batch;
use podtether_core::offload::{Coalescer, Gso, Segments, VNET_HEADER_LEN, VnetHeader};
use podtether_net::netlink::Netlink;
use podtether_net::testing::{block_on, in_namespaces};
use podtether_net::{Netns, sysctl, tun};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;

/// `TUN_F_*` of `linux/if_tun.h`: CSUM, TSO4, TSO6, TSO_ECN, USO4, USO6.
const EVERYTHING: i32 = 0x01 | 0x02 | 0x04 | 0x08 | 0x20 | 0x40;
const LONG: Duration = Duration::from_secs(20);
/// Longest packet with its header.
const LARGEST: usize = VNET_HEADER_LEN + 65_535;

async fn device(ns: &Netns, name: &str, addresses: &[&str], offloads: i32) -> OwnedFd {
    let fd = tun::open(ns, name).await.unwrap();
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    unsafe { tun::tun_set_offload(fd.as_raw_fd(), offloads) }.unwrap();
    let netlink = Netlink::open(ns).await.unwrap();
    let index = netlink.link(name).await.unwrap().unwrap().index;
    netlink.set_up(index).await.unwrap();
    for address in addresses {
        netlink.add_address(index, address.parse().unwrap()).await.unwrap();
    }
    fd
}

/// Next packet of the device with its header, into `buffer`.
fn read<'a>(tun: BorrowedFd<'_>, buffer: &'a mut [u8]) -> Option<(VnetHeader, &'a mut [u8])> {
    let length = match nix::unistd::read(tun, buffer) {
        Ok(length) => length,
        Err(Errno::EAGAIN) => return None,
        Err(e) => panic!("read a TUN: {e}"),
    };
    let (header, packet) = buffer[..length].split_first_chunk_mut().unwrap();
    Some((VnetHeader::read(header).unwrap(), packet))
}

fn write(tun: BorrowedFd<'_>, header: &VnetHeader, pieces: &[&[u8]]) {
    let head = header.to_bytes();
    let all: Vec<_> = [&head[..]].iter().chain(pieces).map(|piece| IoSlice::new(piece)).collect();
    let written = writev(tun, &all).unwrap_or_else(|e| panic!("write {header:?}: {e}"));
    assert_eq!(written, all.iter().map(|piece| piece.len()).sum::<usize>());
}

fn cut(header: &VnetHeader, packet: &mut [u8]) -> Vec<Vec<u8>> {
    let mut segments = Segments::new(header, packet).unwrap();
    let mut all = Vec::new();
    while let Some(segment) = segments.next() {
        all.push(segment.to_vec());
    }
    all
}

/// A namespace that forwards from one device, which is written to, to another, which takes no offloads, so that
/// the kernel cuts and completes what passes.
struct Forwarder {
    from: OwnedFd,
    to: OwnedFd,
    _ns: Netns,
}

impl Forwarder {
    fn new() -> Self {
        block_on(async {
            let ns = Netns::create().await.unwrap();
            ns.run(|| {
                for family in ["ipv4", "ipv6"] {
                    assert!(sysctl::write(&format!("net/{family}/conf/all/forwarding"), "1").unwrap());
                }
            })
            .await
            .unwrap();
            let from = device(&ns, "from", &["10.1.0.254/24", "fd01::fe/64"], EVERYTHING).await;
            let to = device(&ns, "to", &["10.2.0.254/24", "fd02::fe/64"], 0).await;
            Self { from, to, _ns: ns }
        })
    }

    /// What comes out for one packet that goes in, until there are `count`.
    fn forwarded(&self, count: usize) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; LARGEST];
        let mut all = Vec::new();
        let end = Instant::now() + LONG;
        while all.len() < count {
            if let Some((header, packet)) = read(self.to.as_fd(), &mut buffer) {
                // The kernel has things of its own to say to an IPv6 link.
                if packet[0] >> 4 == 4 || packet[24] == 0xfd {
                    assert_eq!((header.gso, header.needs_csum), (Gso::None, false));
                    all.push(packet.to_vec());
                }
                continue;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} of {count} packets came", all.len());
            let mut fds = [PollFd::new(self.to.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::try_from(left).unwrap()).unwrap();
        }
        all
    }
}

/// Of any content, as far as a router passes it on.
fn passable(runner: &mut TestRunner, most: usize) -> Spec {
    let mut spec = any_spec(most).new_tree(runner).unwrap().current();
    spec.ip_options.clear();
    spec.ttl = 64;
    spec
}

/// After one router.
fn passed(spec: &Spec) -> Spec {
    Spec { ttl: spec.ttl - 1, ..spec.clone() }
}

#[test]
fn segments_are_those_that_the_kernel_makes() {
    in_namespaces("segments_are_those_that_the_kernel_makes", |_| {
        let forwarder = Forwarder::new();
        let mut runner = TestRunner::deterministic();
        let mut pieces = 0;
        for _ in 0..300 {
            let spec = passable(&mut runner, 12_000);
            let size = (300u16..1300).new_tree(&mut runner).unwrap().current();
            for size in [0, size] {
                if size == 0 && spec.payload.len() > 1300 {
                    continue;
                }
                let (header, packet) = spec.unfinished(size);
                write(forwarder.from.as_fd(), &header, &[&packet]);
                let (header, mut packet) = passed(&spec).unfinished(size);
                let ours = cut(&header, &mut packet);
                let theirs = forwarder.forwarded(ours.len());
                assert_eq!(ours, theirs, "{spec:?} by {size}");
                pieces += ours.len();
            }
        }
        assert!(pieces > 1000, "{pieces} packets compared");
    });
}

#[test]
fn the_kernel_takes_apart_what_was_put_together() {
    in_namespaces("the_kernel_takes_apart_what_was_put_together", |_| {
        let forwarder = Forwarder::new();
        let mut coalescer = Coalescer::new();
        for (v6, tcp) in [(false, false), (false, true), (true, false), (true, true)] {
            for (length, size, writes) in
                [(1228, 1228, 1), (5000, 1228, 1), (65_000, 1228, 1), (2000, 1000, 1), (640, 10, 1)]
            {
                let pieces = plain(v6, tcp, length).pieces(size);
                let mut batch = Batch::new();
                for piece in &pieces {
                    assert!(batch.push((), &piece.packet()));
                }
                coalescer.group(&mut batch, true);
                assert_eq!(coalescer.writes(&batch).len(), writes, "v6 {v6} tcp {tcp} {length} by {size}");
                for one in coalescer.writes(&batch) {
                    write(forwarder.from.as_fd(), &one.header, &one.pieces.collect::<Vec<_>>());
                }
                let came: Vec<_> = pieces.iter().map(|piece| passed(piece).packet()).collect();
                assert_eq!(forwarder.forwarded(pieces.len()), came, "v6 {v6} tcp {tcp} {length} by {size}");
            }
        }
    });
}

/// How many packets crossed as larger ones than the wire takes.
#[derive(Default)]
struct Seen {
    cut: AtomicUsize,
    coalesced: AtomicUsize,
}

/// Carries packets from one device to the other until nobody holds the other end of `stop`: cut, and put
/// together again where `coalescing`.
fn carry(from: &OwnedFd, to: &OwnedFd, stop: &UnixStream, coalescing: bool, seen: &Seen) {
    let mut buffer = vec![0; LARGEST];
    let mut batch = Batch::new();
    let mut coalescer = Coalescer::new();
    loop {
        let mut fds = [from.as_fd(), stop.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut fds, PollTimeout::NONE).unwrap();
        if fds[1].any() == Some(true) {
            return;
        }
        batch.clear();
        while batch.len() < 200
            && let Some((header, packet)) = read(from.as_fd(), &mut buffer)
        {
            let mut segments = Segments::new(&header, packet).unwrap();
            assert!(segments.longest() <= 1500);
            seen.cut.fetch_add(usize::from(segments.remaining() > 1), Ordering::Relaxed);
            while let Some(segment) = segments.next() {
                assert!(batch.push((), segment));
            }
        }
        if !coalescing {
            for (_, packet) in batch.iter() {
                write(to.as_fd(), &VnetHeader::PLAIN, &[packet]);
            }
            continue;
        }
        coalescer.group(&mut batch, true);
        for one in coalescer.writes(&batch) {
            seen.coalesced.fetch_add(usize::from(one.pieces.len() > 1), Ordering::Relaxed);
            write(to.as_fd(), &one.header, &one.pieces.collect::<Vec<_>>());
        }
    }
}

/// A counter of `/proc/net/snmp` or `snmp6` in a namespace.
fn counter(ns: &Netns, name: &'static str) -> u64 {
    ns.run_blocking(|| {
        let all = fs::read_to_string("/proc/thread-self/net/snmp6").unwrap();
        if let Some(line) = all.lines().find(|line| line.split_whitespace().next() == Some(name)) {
            return line.split_whitespace().nth(1).unwrap().parse().unwrap();
        }
        let (protocol, name) = name.split_once('.').unwrap();
        let all = fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
        let [names, values] =
            all.lines().filter(|line| line.starts_with(&format!("{protocol}: "))).collect::<Vec<_>>()[..]
        else {
            panic!("two lines for {protocol}: {all}")
        };
        let at = names.split(' ').position(|n| n == name).unwrap();
        values.split(' ').nth(at).unwrap().parse().unwrap()
    })
    .unwrap()
}

/// Bytes of which no two places look alike.
fn content(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()
    });
    words.flatten().take(length).collect()
}

fn stream(client: &Netns, server: &Netns, address: IpAddr) {
    const BYTES: usize = 24 << 20;
    let listener = server.run_blocking(|| TcpListener::bind((address, 5201)).unwrap()).unwrap();
    let (there, back) = (content(BYTES, 1), content(BYTES, 2));
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut socket, _) = listener.accept().unwrap();
            exchange(&mut socket, &back, &there);
        });
        let mut socket = client.run_blocking(|| TcpStream::connect((address, 5201)).unwrap()).unwrap();
        exchange(&mut socket, &there, &back);
    });
}

/// Both directions at once.
fn exchange(socket: &mut TcpStream, send: &[u8], expect: &[u8]) {
    socket.set_read_timeout(Some(LONG)).unwrap();
    let mut writer = socket.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || writer.write_all(send).unwrap());
        let mut came = vec![0; expect.len()];
        socket.read_exact(&mut came).unwrap();
        assert!(came == expect, "bytes differ");
    });
}

fn datagrams(client: &Netns, server: &Netns, addresses: [IpAddr; 2]) {
    let bind = |ns: &Netns, address| {
        let socket = ns.run_blocking(|| UdpSocket::bind((address, 5201)).unwrap()).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        socket
    };
    let (from, to) = (bind(client, addresses[0]), bind(server, addresses[1]));
    let destination = SocketAddr::new(addresses[1], 5201);
    let mut buffer = [0; 2000];
    for (round, size) in [1200u16, 1, 999, 1452, 300].into_iter().enumerate() {
        let size = if addresses[0].is_ipv4() { size } else { size.min(1400) };
        nix::sys::socket::setsockopt(&from, nix::sys::socket::sockopt::UdpGsoSegment, &i32::from(size))
            .unwrap();
        let whole = content(usize::from(size) * 40 + usize::from(size) / 2, round as u64);
        assert_eq!(from.send_to(&whole, destination).unwrap(), whole.len());
        for piece in whole.chunks(size.into()) {
            let (length, _) = to.recv_from(&mut buffer).unwrap();
            assert!(buffer[..length] == *piece, "datagrams of {size} bytes come as they were sent");
        }
    }
}

fn across(coalescing: bool) {
    let (ends, tuns): (Vec<_>, Vec<_>) = [1, 2]
        .map(|n| {
            block_on(async {
                let ns = Netns::create().await.unwrap();
                let addresses = [format!("10.9.0.{n}/24"), format!("fd09::{n}/64")];
                let tun = device(&ns, "tun0", &addresses.each_ref().map(|a| &a[..]), EVERYTHING).await;
                let addresses = addresses.map(|a| a.split_once('/').unwrap().0.parse::<IpAddr>().unwrap());
                Netlink::open(&ns).await.unwrap().wait_local(&addresses).await.unwrap();
                ((ns, addresses), tun)
            })
        })
        .into_iter()
        .unzip();
    let [(client, near), (server, far)] = &ends[..] else { panic!("two ends") };
    let seen = Seen::default();
    let (held, stop) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| carry(&tuns[0], &tuns[1], &stop, coalescing, &seen));
        scope.spawn(|| carry(&tuns[1], &tuns[0], &stop, coalescing, &seen));
        // Ends the two also when something below panics.
        let held = held;
        for (near, far) in near.iter().zip(far) {
            stream(client, server, *far);
            datagrams(client, server, [*near, *far]);
        }
        drop(held);
    });
    for ns in [client, server] {
        for name in ["Tcp.InCsumErrors", "Udp.InCsumErrors", "Ip.InHdrErrors", "Udp6InCsumErrors"] {
            assert_eq!(counter(ns, name), 0, "{name}");
        }
    }
    let (cut, coalesced) = (seen.cut.into_inner(), seen.coalesced.into_inner());
    assert!(cut > 500, "{cut} packets were cut");
    assert!(
        if coalescing { coalesced > 500 } else { coalesced == 0 },
        "{coalesced} packets were put together"
    );
}

#[test]
fn what_was_cut_arrives_whole() {
    in_namespaces("what_was_cut_arrives_whole", |_| across(false));
}

#[test]
fn what_was_put_together_arrives_whole() {
    in_namespaces("what_was_put_together_arrives_whole", |_| across(true));
}
