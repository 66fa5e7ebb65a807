//! Descriptors an engine is born with, in the way of systemd's socket activation: they start at
//! [`FIRST_FD`] and [`ENV`] names them in order, separated by `:`. An absent one is simply not named
//! (no IPv6 on the node, no DNS socket).

/// Environment variable with the names, for example `rpc:tun:udp4:udp6:dns:dns:dns-tcp:dns-tcp:snapshot:reason`.
pub const ENV: &str = "PODTETHER_FDS";
/// Number of the first named descriptor.
pub const FIRST_FD: i32 = 3;

/// Unix stream socket, bound by the supervisor; the engine calls `listen` on it after dropping its
/// uid, so that `SO_PEERCRED` names the engine.
pub const RPC: &str = "rpc";
/// TUN queue (`IFF_TUN | IFF_NO_PI | IFF_VNET_HDR`, 10-byte virtio header), non-blocking.
pub const TUN: &str = "tun";
/// UDP/IPv4 socket of the underlay, bound, non-blocking.
pub const UDP4: &str = "udp4";
/// UDP/IPv6 socket of the underlay (`IPV6_V6ONLY`), bound, non-blocking.
pub const UDP6: &str = "udp6";
/// UDP sockets bound to port 53 of the service addresses inside the link namespace. This name and the others
/// for names are given once per descriptor.
pub const DNS: &str = "dns";
/// TCP sockets that listen there, in the same order.
pub const DNS_TCP: &str = "dns-tcp";
/// UDP sockets on the pod's loopback that stand in for its name servers, in the order of
/// [`crate::engine::StartRequest::name_servers`].
pub const STAND_IN: &str = "stand-in";
/// TCP sockets that listen there, in the same order.
pub const STAND_IN_TCP: &str = "stand-in-tcp";
/// Unbound UDP/IPv4 sockets of the pod's namespace for asking name servers.
pub const ASK_UDP4: &str = "ask-udp4";
/// As [`ASK_UDP4`], IPv6.
pub const ASK_UDP6: &str = "ask-udp6";
/// As [`ASK_UDP4`], TCP.
pub const ASK_TCP4: &str = "ask-tcp4";
/// As [`ASK_TCP4`], IPv6.
pub const ASK_TCP6: &str = "ask-tcp6";
/// The socket that the rules leading the pod's questions to the stand-ins live and die with. Nothing to use,
/// only to hold.
pub const DNS_OWNER: &str = "dns-owner";
/// Regular file (tmpfs, 0600) for the warm snapshot, opened read-write; its format is the engine's.
pub const SNAPSHOT: &str = "snapshot";
/// Unix seqpacket socket that listens, for the connection with the engine that will replace this one. Who
/// connects is the supervisor; it passes its end on.
pub const HEIR: &str = "heir";
/// Such a connection, to the engine that this one replaces; only a standby has it.
pub const PARTNER: &str = "partner";
/// An empty mount namespace, which the engine enters before anything else.
pub const NOWHERE: &str = "nowhere";
/// Regular file for [`crate::exit::ExitReason`], opened write-only, truncated before each start.
pub const REASON: &str = "reason";
