//! Landlock by its three system calls: no file system, no TCP port to listen on, and later no TCP port to connect
//! to but those on a list. What the running kernel knows is asked first (landlock(7), "ABI versions").

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

/// `struct landlock_ruleset_attr`; a kernel that knows less of it takes zeroes at its end.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct Ruleset {
    handled_files: u64,
    handled_net: u64,
    scoped: u64,
}

/// `struct landlock_net_port_attr`
#[repr(C)]
struct PortRule {
    allowed: u64,
    port: u64,
}

const VERSION: u32 = 1 << 0;
const NET_BIND: u64 = 1 << 0;
const NET_CONNECT: u64 = 1 << 1;
/// Abstract Unix sockets and signals of anybody outside.
const SCOPE_ALL: u64 = 1 << 0 | 1 << 1;
const RULE_NET_PORT: u32 = 2;

/// ABI that the TCP ports came with, in Linux 6.7.
pub(crate) const ABI_TCP: u32 = 4;
/// ABI that the scopes came with, in Linux 6.12.
pub(crate) const ABI_SCOPE: u32 = 6;

/// What the kernel offers, from 1 on.
pub(crate) fn abi() -> io::Result<u32> {
    let nothing: *const Ruleset = std::ptr::null();
    // SAFETY: with this flag the kernel reads no attribute and answers with a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0_usize, VERSION) };
    u32::try_from(version).map_err(|_| io::Error::last_os_error())
}

/// Takes every right to the file system away, that to listen on TCP, and what reaches out by name or signal.
pub(crate) fn deny(abi: u32) -> io::Result<()> {
    restrict(
        Ruleset {
            handled_files: file_rights(abi),
            handled_net: if abi >= ABI_TCP { NET_BIND } else { 0 },
            scoped: if abi >= ABI_SCOPE { SCOPE_ALL } else { 0 },
        },
        &[],
    )
}

/// Leaves `ports` alone to connect to over TCP. Needs [`ABI_TCP`].
pub(crate) fn connect_only(ports: &[u16]) -> io::Result<()> {
    restrict(Ruleset { handled_net: NET_CONNECT, ..Ruleset::default() }, ports)
}

/// Every right of an ABI: thirteen of the first, REFER, TRUNCATE, IOCTL_DEV.
fn file_rights(abi: u32) -> u64 {
    let count = match abi {
        0 | 1 => 13,
        2 => 14,
        3 | 4 => 15,
        5.. => 16,
    };
    (1 << count) - 1
}

fn restrict(ruleset: Ruleset, ports: &[u16]) -> io::Result<()> {
    // SAFETY: the attribute has the size given and outlives the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const ruleset, size_of::<Ruleset>(), 0_u32)
    };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    for port in ports {
        let rule = PortRule { allowed: NET_CONNECT, port: u64::from(*port) };
        // SAFETY: the descriptor is open and the rule outlives the call.
        let added = unsafe {
            libc::syscall(libc::SYS_landlock_add_rule, fd.as_raw_fd(), RULE_NET_PORT, &raw const rule, 0_u32)
        };
        if added != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: takes a descriptor and a number.
    match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, fd.as_raw_fd(), 0_u32) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_are_those_of_the_header() {
        // landlock.h: LANDLOCK_ACCESS_FS_MAKE_SYM is bit 12, REFER 13, TRUNCATE 14, IOCTL_DEV 15.
        assert_eq!([1, 2, 3, 4, 5, 9].map(file_rights), [0x1fff, 0x3fff, 0x7fff, 0x7fff, 0xffff, 0xffff]);
    }
}
