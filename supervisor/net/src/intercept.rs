//! Takes over what a pod asks its name servers, for as long as somebody lives to answer.
//!
//! A table in the pod's namespace turns packets to port 53 of a name server into packets to a listener on
//! loopback, and the listener's answers into the name server's. Two properties carry it:
//!
//! * The table belongs to a netlink socket (`NFT_TABLE_F_OWNER`, Linux 5.12): the kernel removes it with the
//!   socket's last descriptor. The engine holds that one, so however it ends, the pod asks its name servers
//!   directly from the next packet on, and nobody has to be alive to see to it.
//! * Addresses are rewritten without connection tracking, ahead of it. A `redirect` would leave entries
//!   behind that lead old flows to a listener that is gone, and would switch tracking on for all of a pod's
//!   traffic. Being ahead of the pod's own rules also leaves those in force for what is forwarded.
//!
//! What the engine forwards carries [`MARK`], which the rules let pass.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use crate::error::{Error, Result, Step};
use crate::netns::Netns;
use crate::nfnetlink::{self, Attributes, Batch, Make};

/// Mark of the engine's own questions to a name server.
pub const MARK: u32 = 0x7074_6e73;
/// Most name servers a pod may have; a resolv.conf takes three.
pub const MAX_SERVERS: usize = 4;
const PORT: u16 = 53;
/// Connections that wait to be taken.
const BACKLOG: i32 = 16;
/// The kernel removes a table with its owner's last descriptor, which a process that is being started may hold
/// until its exec. Tables that go that way are announced to nobody, so this is one that has to be tried again.
const FORMER_OWNER_GONE: Duration = Duration::from_millis(500);

const TABLE_OWNED: u32 = 2;
const HOOK_OUTPUT: u32 = 3;
/// Ahead of connection tracking.
const PRIORITY_RAW: i32 = -300;
const REGISTER: u32 = 1;
const UDP: u8 = 17;
const TCP: u8 = 6;
const V4: u8 = 2;
const V6: u8 = 10;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;

/// The sockets that stand in for one name server, on loopback in the pod's namespace.
#[derive(Debug)]
pub struct StandIn {
    /// The name server meant by whoever asks here.
    pub server: IpAddr,
    /// Bound, non-blocking.
    pub udp: UdpSocket,
    /// Listening, non-blocking.
    pub tcp: TcpListener,
}

/// The table's owner, before and after it has the table.
#[derive(Debug)]
pub struct Owner(OwnedFd);

impl Owner {
    /// A socket of `pod` that owns nothing yet.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn open(pod: &Netns) -> Result<Self> {
        pod.run_blocking(nfnetlink::open)?.map(Self)
    }

    /// The descriptor whose end is the table's end.
    #[must_use]
    pub fn descriptor(&self) -> &OwnedFd {
        &self.0
    }

    /// Makes the table called `name`: from here on the pod's questions to the servers go to the stand-ins.
    /// Blocks for as long as a former owner's table is being removed.
    ///
    /// # Errors
    /// When the kernel has no nf_tables or none with owners.
    pub fn arm(&self, name: &str, stand_ins: &[(IpAddr, SocketAddr, SocketAddr)]) -> Result<()> {
        let mut pause = Duration::from_millis(1);
        loop {
            match table(name, stand_ins).commit(&self.0, "make the table that intercepts a pod's DNS") {
                Err(e)
                    if matches!(e.errno(), Some(libc::EPERM | libc::EEXIST | libc::EBUSY))
                        && pause < FORMER_OWNER_GONE =>
                {
                    std::thread::sleep(pause);
                    pause *= 2;
                }
                done => return done,
            }
        }
    }
}

/// Stand-ins for `servers`, in their order, inside `pod`.
///
/// # Errors
/// [`Error::Invalid`] for too many servers; otherwise as the kernel says.
pub fn stand_ins(pod: &Netns, servers: &[IpAddr]) -> Result<Vec<StandIn>> {
    if servers.len() > MAX_SERVERS {
        return Err(Error::Invalid {
            what: "name servers",
            reason: format!("{} are more than {MAX_SERVERS}", servers.len()),
        });
    }
    pod.run_blocking(|| servers.iter().map(|server| stand_in(*server)).collect::<Result<_>>())?
}

fn stand_in(server: IpAddr) -> Result<StandIn> {
    let loopback: IpAddr =
        if server.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    let any_port = SocketAddr::new(loopback, 0);
    let step = || format!("open the stand-in for name server {server}");
    let open = |kind: Type, protocol| -> Result<Socket> {
        let kind = kind.nonblocking().cloexec();
        let socket = Socket::new(Domain::for_address(any_port), kind, Some(protocol)).step(step)?;
        if server.is_ipv4() {
            // Where `route_localnet` is on, a loopback address alone would keep nobody out. IPv6 has no such
            // switch, and a socket of lo could not answer there.
            socket.bind_device(Some(b"lo")).step(step)?;
        }
        socket.bind(&any_port.into()).step(step)?;
        Ok(socket)
    };
    let udp = open(Type::DGRAM, Protocol::UDP)?;
    let tcp = open(Type::STREAM, Protocol::TCP)?;
    tcp.listen(BACKLOG).step(step)?;
    Ok(StandIn { server, udp: udp.into(), tcp: tcp.into() })
}

fn table(name: &str, stand_ins: &[(IpAddr, SocketAddr, SocketAddr)]) -> Batch {
    const CHAIN: &str = "output";
    let mut batch = Batch::new();
    batch.make(Make::Table, &Attributes::default().text(1, name).number(2, TABLE_OWNED));
    let hook = Attributes::default().number(1, HOOK_OUTPUT).bytes(2, &PRIORITY_RAW.to_be_bytes());
    // `route`: a packet with another destination is routed again.
    let chain = Attributes::default().text(1, name).text(3, CHAIN).nested(4, hook).text(7, "route");
    batch.make(Make::Chain, &chain);
    for (server, udp, tcp) in stand_ins {
        for (protocol, listener) in [(UDP, *udp), (TCP, *tcp)] {
            let real = SocketAddr::new(*server, PORT);
            for rule in [question(protocol, real, listener), answer(protocol, real, listener)] {
                let rule = Attributes::default().text(1, name).text(2, CHAIN).nested(4, rule.0);
                batch.make(Make::Rule, &rule);
            }
        }
    }
    batch
}

fn question(protocol: u8, server: SocketAddr, listener: SocketAddr) -> Rule {
    Rule::default().meta(3).compare(1, &MARK.to_ne_bytes()).flow(protocol, server, Side::Destination).rewrite(
        protocol,
        listener,
        Side::Destination,
    )
}

fn answer(protocol: u8, server: SocketAddr, listener: SocketAddr) -> Rule {
    Rule::default().flow(protocol, listener, Side::Source).rewrite(protocol, server, Side::Source)
}

#[derive(Debug, Clone, Copy)]
enum Side {
    Source,
    Destination,
}

impl Side {
    /// Offset in the network header.
    fn address(self, ip: IpAddr) -> u32 {
        match (self, ip) {
            (Self::Source, IpAddr::V4(_)) => 12,
            (Self::Destination, IpAddr::V4(_)) => 16,
            (Self::Source, IpAddr::V6(_)) => 8,
            (Self::Destination, IpAddr::V6(_)) => 24,
        }
    }

    /// Offset in the transport header.
    fn port(self) -> u32 {
        match self {
            Self::Source => 0,
            Self::Destination => 2,
        }
    }
}

/// A rule's expressions, in the order they are evaluated.
#[derive(Debug, Default)]
struct Rule(Attributes);

impl Rule {
    fn expression(self, name: &str, data: Attributes) -> Self {
        Self(self.0.nested(1, Attributes::default().text(1, name).nested(2, data)))
    }

    /// Goes on when the packet is of this protocol and has this address and port.
    fn flow(self, protocol: u8, at: SocketAddr, side: Side) -> Self {
        let octets = octets(at.ip());
        let length = if at.is_ipv4() { 4 } else { 16 };
        self.meta(15)
            .compare(0, &[if at.is_ipv4() { V4 } else { V6 }])
            .load(NETWORK_HEADER, side.address(at.ip()), length)
            .compare(0, &octets)
            .meta(16)
            .compare(0, &[protocol])
            .load(TRANSPORT_HEADER, side.port(), 2)
            .compare(0, &at.port().to_be_bytes())
    }

    fn rewrite(self, protocol: u8, to: SocketAddr, side: Side) -> Self {
        // IPv6 has no header checksum; both pseudo headers hold the address.
        let header = if to.is_ipv4() { (1, 10) } else { (0, 0) };
        let checksum = if protocol == UDP { 6 } else { 16 };
        self.expression("notrack", Attributes::default())
            .store(NETWORK_HEADER, side.address(to.ip()), &octets(to.ip()), header, 1)
            .store(TRANSPORT_HEADER, side.port(), &to.port().to_be_bytes(), (1, checksum), 0)
    }

    fn meta(self, key: u32) -> Self {
        self.expression("meta", Attributes::default().number(1, REGISTER).number(2, key))
    }

    /// `operation`: 0 for equal, 1 for different.
    fn compare(self, operation: u32, value: &[u8]) -> Self {
        let data = Attributes::default().bytes(1, value);
        self.expression("cmp", Attributes::default().number(1, REGISTER).number(2, operation).nested(3, data))
    }

    fn load(self, base: u32, offset: u32, length: u32) -> Self {
        let load = Attributes::default().number(1, REGISTER).number(2, base);
        self.expression("payload", load.number(3, offset).number(4, length))
    }

    fn store(self, base: u32, offset: u32, value: &[u8], checksum: (u32, u32), pseudo: u32) -> Self {
        let data = Attributes::default().bytes(1, value);
        let length = u32::try_from(value.len()).unwrap_or(0);
        let store = Attributes::default().number(2, base).number(3, offset).number(4, length);
        let store = store.number(5, REGISTER).number(6, checksum.0).number(7, checksum.1);
        self.expression("immediate", Attributes::default().number(1, REGISTER).nested(2, data))
            .expression("payload", store.number(8, pseudo))
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests;
