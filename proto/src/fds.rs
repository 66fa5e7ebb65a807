//! Descriptors an engine is born with, in the way of systemd's socket activation: they start at
//! [`FIRST_FD`] and [`ENV`] names them in order, separated by `:`. An absent one is simply not named
//! (no IPv6 on the node, no DNS socket).

/// Environment variable with the names, for example `rpc:tun:udp4:udp6:dns4:dns6:snapshot:reason`.
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
/// UDP socket bound to 100.100.100.100:53 inside the link namespace.
pub const DNS4: &str = "dns4";
/// UDP socket bound to [fd7a:115c:a1e0::53]:53 inside the link namespace.
pub const DNS6: &str = "dns6";
/// Regular file (tmpfs, 0600) for the warm snapshot, opened read-write; its format is the engine's.
pub const SNAPSHOT: &str = "snapshot";
/// Regular file for [`crate::exit::ExitReason`], opened write-only, truncated before each start.
pub const REASON: &str = "reason";
