//! Persistent TUN devices.
//!
//! A TUN here has one queue. While any duplicate of its descriptor lives, the device cannot be attached
//! to again ([`Error::TunBusy`]); when the last one closes, the persistent device stays with its index,
//! addresses and routes, and [`open`] attaches to it with the same flags.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::error::{Error, Result, Step};
use crate::netns::Netns;

/// Size of the header in front of every packet (`struct virtio_net_hdr`).
pub const VNET_HEADER_BYTES: usize = 10;

nix::ioctl_write_ptr_bad!(
    /// Attaches to a device, making it when it is not there.
    tun_set_iff,
    libc::TUNSETIFF,
    libc::ifreq
);
nix::ioctl_read_bad!(
    /// Name and flags of the attached device.
    tun_get_iff,
    libc::TUNGETIFF,
    libc::ifreq
);
nix::ioctl_write_int_bad!(
    /// Keeps the device when its last descriptor closes.
    tun_set_persist,
    libc::TUNSETPERSIST
);
nix::ioctl_write_ptr_bad!(
    /// Size of the header in front of each packet.
    tun_set_vnet_header_size,
    libc::TUNSETVNETHDRSZ,
    libc::c_int
);
nix::ioctl_write_int_bad!(
    /// Which offloads the reader can take.
    tun_set_offload,
    libc::TUNSETOFFLOAD
);

/// Opens the persistent TUN `name` inside `ns`, making it when it is not there. The descriptor is
/// non-blocking and works from any namespace.
///
/// # Errors
/// [`Error::TunBusy`] while another descriptor of it lives.
pub async fn open(ns: &Netns, name: &str) -> Result<OwnedFd> {
    check_name(name)?;
    let name = name.to_owned();
    ns.run(move || attach(&name)).await?
}

/// Name of the device behind a TUN descriptor; an error when it is something else, or the device is gone.
///
/// # Errors
/// As the ioctl: `EBADFD` for a descriptor without a device.
pub fn name_of(tun: &impl AsRawFd) -> Result<String> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF fills the ifreq, which lives on this stack frame and has the size it expects.
    unsafe { tun_get_iff(tun.as_raw_fd(), &raw mut request) }.step(|| "ask a TUN for its name".into())?;
    let bytes: Vec<u8> =
        request.ifr_name.iter().map(|c| c.to_ne_bytes()[0]).take_while(|b| *b != 0).collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn attach(name: &str) -> Result<OwnedFd> {
    let file: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .step(|| "open /dev/net/tun".into())?;
    let mut request = empty_request();
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = libc::c_char::from_ne_bytes([byte]);
    }
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags)
        .map_err(|_| Error::Invalid { what: "TUN flags", reason: "do not fit an ifreq".into() })?;
    let fd = file.as_raw_fd();
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    match unsafe { tun_set_iff(fd, &raw const request) } {
        Ok(_) => {}
        Err(nix::Error::EBUSY) => return Err(Error::TunBusy { name: name.to_owned() }),
        Err(e) => return Err(io::Error::from(e)).step(|| format!("attach to TUN {name}")),
    }
    let size = libc::c_int::try_from(VNET_HEADER_BYTES)
        .map_err(|_| Error::Invalid { what: "header size", reason: "too large".into() })?;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
    unsafe { tun_set_vnet_header_size(fd, &raw const size) }
        .step(|| format!("set the header size of TUN {name}"))?;
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    unsafe { tun_set_offload(fd, 0) }.step(|| format!("set the offloads of TUN {name}"))?;
    // SAFETY: TUNSETPERSIST takes its argument by value.
    unsafe { tun_set_persist(fd, 1) }.step(|| format!("make TUN {name} persistent"))?;
    Ok(file.into())
}

fn empty_request() -> libc::ifreq {
    // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
    unsafe { std::mem::zeroed() }
}

/// Interface names come from configuration.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let bad =
        |reason: &str| Err(Error::Invalid { what: "interface name", reason: format!("{name:?} {reason}") });
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return bad("is empty or longer than 15 bytes");
    }
    if matches!(name, "." | ".." | "all" | "default" | "lo") {
        return bad("is reserved");
    }
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
        return bad("has a character outside a-z A-Z 0-9 - _ .");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Netlink;
    use crate::testing::{block_on, in_namespaces};

    #[test]
    fn the_device_outlives_its_descriptor_and_is_attached_again() {
        in_namespaces("tun::tests::the_device_outlives_its_descriptor_and_is_attached_again", |_| {
            block_on(async {
                let ns = Netns::create().await.unwrap();
                let tun = open(&ns, "tun0").await.unwrap();
                assert_eq!(name_of(&tun).unwrap(), "tun0");
                let netlink = Netlink::open(&ns).await.unwrap();
                let index = netlink.link("tun0").await.unwrap().unwrap().index;
                assert!(matches!(open(&ns, "tun0").await, Err(Error::TunBusy { name }) if name == "tun0"));
                let duplicate = tun.try_clone().unwrap();
                drop(tun);
                assert!(matches!(open(&ns, "tun0").await, Err(Error::TunBusy { .. })));
                drop(duplicate);
                let again = open(&ns, "tun0").await.unwrap();
                assert_eq!(netlink.link("tun0").await.unwrap().unwrap().index, index);
                netlink.delete_link("tun0").await.unwrap();
                assert!(name_of(&again).is_err(), "a descriptor without a device says so");
                let here = Netlink::open(&Netns::current().unwrap()).await.unwrap();
                assert!(here.link("tun0").await.unwrap().is_none(), "nothing in the caller's namespace");
            });
        });
    }

    #[test]
    fn names_are_checked() {
        for good in ["ts0", "tun0", "a-b_c.d", "123456789012345"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "1234567890123456", "a/b", "..", "all", "default", "lo", "a b", "tun%d", "ä"] {
            assert!(matches!(check_name(bad), Err(Error::Invalid { .. })), "{bad}");
        }
    }
}
