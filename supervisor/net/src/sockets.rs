//! Sockets for engines: they may use them, but could not have made them where they are.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::error::{Error, Result, Step};
use crate::intercept::MARK;
use crate::netns::Netns;

/// Socket buffers, bytes. Smaller ones cause most of a tunnel's retransmits.
const BUFFER_BYTES: usize = 4 << 20;
/// DNS connections that wait to be taken.
const DNS_BACKLOG: i32 = 16;

/// Address family of an underlay socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6 only.
    V6,
}

/// Which port an underlay socket should get.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PortChoice {
    /// Tried first: the recorded port of an earlier run, so that NAT mappings stay.
    pub preferred: Option<u16>,
    /// Where to look otherwise; `None` lets the kernel choose.
    pub range: Option<RangeInclusive<u16>>,
}

/// A bound, non-blocking underlay socket in the caller's namespace; `None` when this node has no such
/// family at all.
///
/// # Errors
/// [`Error::NoFreePort`] when the range is used up.
pub fn underlay(family: Family, port: &PortChoice) -> Result<Option<UdpSocket>> {
    let any: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut candidates: Vec<u16> = port.preferred.into_iter().collect();
    match &port.range {
        None => candidates.push(0),
        Some(range) => {
            // A start that differs per socket keeps a full range from being scanned from its beginning.
            let ports: Vec<u16> = range.clone().collect();
            let start = usize::try_from(std::process::id()).unwrap_or(0).wrapping_mul(31)
                + port.preferred.map_or(0, usize::from);
            candidates.extend((0..ports.len()).map(|i| ports[(start + i) % ports.len()]));
        }
    }
    for candidate in candidates {
        match udp(SocketAddr::new(any, candidate)) {
            Ok(socket) => return Ok(Some(socket)),
            Err(e) if matches!(e.errno(), Some(libc::EADDRINUSE | libc::EACCES)) => {}
            Err(e)
                if family == Family::V6
                    && matches!(e.errno(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) =>
            {
                return Ok(None);
            }
            Err(e) => return Err(e),
        }
    }
    let (first, last) = port.range.as_ref().map_or((0, 0), |r| (*r.start(), *r.end()));
    Err(Error::NoFreePort { first, last })
}

/// A bound, non-blocking UDP socket inside `ns`.
///
/// # Errors
/// When the address is not there or the port is taken.
pub async fn udp_in(ns: &Netns, address: SocketAddr) -> Result<UdpSocket> {
    ns.run(move || udp(address)).await?
}

/// A listening, non-blocking TCP socket inside `ns`.
///
/// # Errors
/// When the address is not there or the port is taken.
pub async fn tcp_in(ns: &Netns, address: SocketAddr) -> Result<TcpListener> {
    ns.run(move || {
        let step = || format!("listen on TCP {address}");
        let kind = Type::STREAM.nonblocking().cloexec();
        let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP)).step(step)?;
        if address.is_ipv6() {
            socket.set_only_v6(true).step(step)?;
        }
        // Connections of an engine before may linger.
        socket.set_reuse_address(true).step(step)?;
        socket.bind(&address.into()).step(step)?;
        socket.listen(DNS_BACKLOG).step(step)?;
        Ok(socket.into())
    })
    .await?
}

/// Unbound sockets for asking name servers, each for one question at a time: connected to a server it hears
/// that server alone, and disconnected it forgets its port, so that every question leaves from another.
#[derive(Debug, Default)]
pub struct Askers {
    /// UDP over IPv4.
    pub udp4: Vec<OwnedFd>,
    /// UDP over IPv6. Not the same ones: Linux loses what comes back over IPv6 to a socket that was connected
    /// to an IPv4 address before.
    pub udp6: Vec<OwnedFd>,
    /// TCP over IPv4.
    pub tcp4: Vec<OwnedFd>,
    /// TCP over IPv6.
    pub tcp6: Vec<OwnedFd>,
}

/// How many of each family an engine is given.
pub const ASKERS_UDP: usize = 12;
/// See [`ASKERS_UDP`].
pub const ASKERS_TCP: usize = 4;

/// Sockets for asking name servers as `pod` would: by its routes, its addresses and under its network
/// policies. They carry [`MARK`].
///
/// # Errors
/// As the kernel says.
pub fn askers(pod: &Netns) -> Result<Askers> {
    pod.run_blocking(|| {
        let has_v6 = Socket::new(Domain::IPV6, Type::DGRAM.cloexec(), None).is_ok();
        let open = |domain: Domain, kind: Type, count: usize| -> Result<Vec<OwnedFd>> {
            let count = if domain == Domain::IPV6 && !has_v6 { 0 } else { count };
            (0..count)
                .map(|_| {
                    let step = || "open a socket for asking name servers".into();
                    let socket = Socket::new(domain, kind.nonblocking().cloexec(), None).step(step)?;
                    if domain == Domain::IPV6 {
                        socket.set_only_v6(true).step(step)?;
                    }
                    socket.set_mark(MARK).step(step)?;
                    Ok(socket.into())
                })
                .collect()
        };
        Ok(Askers {
            udp4: open(Domain::IPV4, Type::DGRAM, ASKERS_UDP)?,
            udp6: open(Domain::IPV6, Type::DGRAM, ASKERS_UDP)?,
            tcp4: open(Domain::IPV4, Type::STREAM, ASKERS_TCP)?,
            tcp6: open(Domain::IPV6, Type::STREAM, ASKERS_TCP)?,
        })
    })?
}

fn udp(address: SocketAddr) -> Result<UdpSocket> {
    let step = || format!("open a UDP socket on {address}");
    let kind = Type::DGRAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::UDP)).step(step)?;
    if address.is_ipv6() {
        socket.set_only_v6(true).step(step)?;
    }
    grow_buffers(&socket);
    socket.bind(&address.into()).step(step)?;
    Ok(socket.into())
}

/// As large as this process may: the forced size needs a privilege that a user namespace does not give,
/// the plain one is cut to the node's limit.
fn grow_buffers(socket: &Socket) {
    let receive = setsockopt(socket, sockopt::RcvBufForce, &BUFFER_BYTES);
    let send = setsockopt(socket, sockopt::SndBufForce, &BUFFER_BYTES);
    if receive.is_err() {
        let _ = setsockopt(socket, sockopt::RcvBuf, &BUFFER_BYTES);
    }
    if send.is_err() {
        let _ = setsockopt(socket, sockopt::SndBuf, &BUFFER_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Netlink;
    use crate::testing::{block_on, in_namespaces};

    fn port(socket: &UdpSocket) -> u16 {
        socket.local_addr().unwrap().port()
    }

    #[test]
    fn ports_are_kept_ranges_hold_and_families_do_not_collide() {
        in_namespaces("sockets::tests::ports_are_kept_ranges_hold_and_families_do_not_collide", |_| {
            let first = underlay(Family::V4, &PortChoice::default()).unwrap().unwrap();
            let kept = PortChoice { preferred: Some(port(&first)), range: None };
            let six = underlay(Family::V6, &kept).unwrap().unwrap();
            assert_eq!(port(&six), port(&first), "v6 only: the same port in both families");
            assert_ne!(port(&underlay(Family::V4, &kept).unwrap().unwrap()), port(&first), "taken");
            let wanted = port(&first);
            drop(first);
            assert_eq!(port(&underlay(Family::V4, &kept).unwrap().unwrap()), wanted, "free again");

            let range = PortChoice { preferred: None, range: Some(41000..=41002) };
            let held: Vec<UdpSocket> =
                (0..3).map(|_| underlay(Family::V4, &range).unwrap().unwrap()).collect();
            assert!(held.iter().all(|s| (41000..=41002).contains(&port(s))));
            assert!(matches!(
                underlay(Family::V4, &range),
                Err(Error::NoFreePort { first: 41000, last: 41002 })
            ));
        });
    }

    #[test]
    fn a_socket_stays_in_the_namespace_it_was_made_in() {
        in_namespaces("sockets::tests::a_socket_stays_in_the_namespace_it_was_made_in", |_| {
            block_on(async {
                let ns = Netns::create().await.unwrap();
                let address: SocketAddr = "100.100.100.100:53".parse().unwrap();
                let netlink = Netlink::open(&ns).await.unwrap();
                let lo = netlink.link("lo").await.unwrap().unwrap().index;
                netlink.set_up(lo).await.unwrap();
                assert_eq!(udp_in(&ns, address).await.unwrap_err().errno(), Some(libc::EADDRNOTAVAIL));
                netlink.add_address(lo, "100.100.100.100/32".parse().unwrap()).await.unwrap();
                let server = udp_in(&ns, address).await.unwrap();
                let client = udp_in(&ns, "127.0.0.1:0".parse().unwrap()).await.unwrap();
                client.send_to(b"ping", address).unwrap();
                let mut buffer = [0; 16];
                let (length, _) = server.recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], b"ping");
            });
        });
    }
}
