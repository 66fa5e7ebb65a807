//! A look at a living link that costs a few system calls: is what carries its packets still there?
//!
//! It asks on descriptors that are open anyway, so that a node with a hundred links can do it every few
//! seconds. What it finds is repaired by [`super::ensure_link`], which looks at everything.

use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::{LINK_SIDE_NAME, Link, TUN_NAME};
use crate::error::{Result, Step};
use crate::netns::Netns;
use crate::tun;

nix::ioctl_readwrite_bad!(
    /// Flags of an interface.
    get_flags,
    libc::SIOCGIFFLAGS,
    libc::ifreq
);
nix::ioctl_readwrite_bad!(
    /// MTU of an interface.
    get_mtu,
    libc::SIOCGIFMTU,
    libc::ifreq
);

/// What keeps a link's packets from going through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The TUN was deleted, renamed, moved away or replaced.
    TunGone,
    /// The TUN was set down.
    TunDown,
    /// The TUN's MTU is another one.
    TunMtu,
    /// The veth pair is gone.
    VethGone,
    /// One end of the veth pair was set down.
    VethDown,
    /// The MTU of the veth's link side is another one.
    VethMtu,
}

impl Fault {
    /// For metrics and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::TunGone => "tun_gone",
            Self::TunDown => "tun_down",
            Self::TunMtu => "tun_mtu",
            Self::VethGone => "veth_gone",
            Self::VethDown => "veth_down",
            Self::VethMtu => "veth_mtu",
        }
    }
}

/// An interface as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Set up.
    pub up: bool,
    /// Up at both ends.
    pub running: bool,
    /// Bytes.
    pub mtu: u32,
}

/// What a look shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The descriptor leads to a TUN of the right name in the link's namespace.
    pub attached: bool,
    /// The interface of the TUN's name there.
    pub tun: Option<Device>,
    /// The veth's link side.
    pub veth: Option<Device>,
}

impl Seen {
    /// The first thing that is wrong, for a link of this MTU.
    #[must_use]
    pub fn fault(&self, mtu: u32) -> Option<Fault> {
        match (self.attached, self.tun, self.veth) {
            (false, _, _) | (_, None, _) => Some(Fault::TunGone),
            (_, Some(tun), _) if !tun.up => Some(Fault::TunDown),
            (_, Some(tun), _) if tun.mtu != mtu => Some(Fault::TunMtu),
            (_, _, None) => Some(Fault::VethGone),
            (_, _, Some(veth)) if !veth.up || !veth.running => Some(Fault::VethDown),
            (_, _, Some(veth)) if veth.mtu != mtu => Some(Fault::VethMtu),
            _ => None,
        }
    }
}

/// Looks at `link` by a socket of its namespace and the TUN's descriptor.
///
/// # Errors
/// As the kernel says, other than that something is gone.
pub fn look(link: &Link, socket: &impl AsRawFd, tun: &impl AsRawFd) -> Result<Seen> {
    let attached = tun::name_of(tun).is_ok_and(|name| name == TUN_NAME)
        && Netns::of_tun(tun).is_ok_and(|ns| ns == link.namespace);
    let device = |name: &str| device(socket, name).step(|| format!("look at {name}"));
    Ok(Seen { attached, tun: device(TUN_NAME)?, veth: device(LINK_SIDE_NAME)? })
}

fn device(socket: &impl AsRawFd, name: &str) -> io::Result<Option<Device>> {
    // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = libc::c_char::from_ne_bytes([byte]);
    }
    // SAFETY: SIOCGIFFLAGS reads and writes one ifreq, which outlives the call.
    match unsafe { get_flags(socket.as_raw_fd(), &raw mut request) } {
        Ok(_) => {}
        Err(Errno::ENODEV) => return Ok(None),
        Err(e) => return Err(e.into()),
    }
    // SAFETY: the call that succeeded set this member.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    // SAFETY: SIOCGIFMTU reads and writes one ifreq, which outlives the call.
    match unsafe { get_mtu(socket.as_raw_fd(), &raw mut request) } {
        Ok(_) => {}
        Err(Errno::ENODEV) => return Ok(None),
        Err(e) => return Err(e.into()),
    }
    // SAFETY: as above.
    let mtu = u32::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(0);
    let has = |flag: libc::c_int| flags & flag != 0;
    Ok(Some(Device { up: has(libc::IFF_UP), running: has(libc::IFF_RUNNING), mtu }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults() {
        let good = Device { up: true, running: true, mtu: 1280 };
        let whole = Seen { attached: true, tun: Some(good), veth: Some(good) };
        let down = Some(Device { up: false, running: false, mtu: 1280 });
        let other_mtu = Some(Device { mtu: 1500, ..good });
        for (seen, fault) in [
            (whole, None),
            // A TUN says that it runs only while somebody reads it.
            (Seen { tun: Some(Device { running: false, ..good }), ..whole }, None),
            (Seen { attached: false, ..whole }, Some(Fault::TunGone)),
            (Seen { tun: None, ..whole }, Some(Fault::TunGone)),
            (Seen { tun: None, veth: None, attached: false }, Some(Fault::TunGone)),
            (Seen { tun: down, ..whole }, Some(Fault::TunDown)),
            (Seen { tun: other_mtu, ..whole }, Some(Fault::TunMtu)),
            (Seen { veth: None, ..whole }, Some(Fault::VethGone)),
            (Seen { veth: down, ..whole }, Some(Fault::VethDown)),
            (Seen { veth: Some(Device { running: false, ..good }), ..whole }, Some(Fault::VethDown)),
            (Seen { veth: other_mtu, ..whole }, Some(Fault::VethMtu)),
        ] {
            assert_eq!(seen.fault(1280), fault, "{seen:?}");
        }
    }
}
