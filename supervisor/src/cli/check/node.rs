//! The machine: kernel, TUN, rights.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

use super::Found;

/// The oldest kernel that podtether is made for.
const KERNEL: (u32, u32) = (5, 10);
/// From here on nf_tables tables can belong to a socket: intercepting names needs that.
const KERNEL_DNS: (u32, u32) = (5, 12);
/// Character device 10, 200 (Documentation/admin-guide/devices.txt).
const TUN: (u64, u64) = (10, 200);

pub(super) fn all() -> Vec<Found> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let meta = std::fs::metadata("/dev/net/tun");
    let device = meta.map(|m| (m.file_type().is_char_device(), m.rdev()));
    let opened = std::fs::File::options().read(true).write(true).open("/dev/net/tun").map(drop);
    // SAFETY: reads an id of this process.
    let root = unsafe { libc::geteuid() } == 0;
    vec![kernel(release.trim()), tun(device, opened), rights(root)]
}

fn kernel(release: &str) -> Found {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => {
            return Found::warn(
                format!("the kernel calls itself {release:?}"),
                "podtether needs Linux 5.10 or newer",
            );
        }
    };
    if version < KERNEL {
        return Found::fail(
            format!("Linux {release} is too old"),
            "podtether needs Linux 5.10 or newer: upgrade the node",
        );
    }
    if version < KERNEL_DNS {
        return Found::warn(
            format!("Linux {release}: names cannot be intercepted"),
            "dns = \"intercept\" needs Linux 5.12 or newer; everything else works",
        );
    }
    Found::ok(format!("Linux {release}"))
}

fn tun(device: std::io::Result<(bool, u64)>, opened: std::io::Result<()>) -> Found {
    let load = "load the module (modprobe tun) and, in a container, mount /dev/net/tun";
    match device {
        Err(e) => Found::fail(format!("/dev/net/tun: {e}"), load),
        Ok((character, number)) if !character || (libc_major(number), libc_minor(number)) != TUN => {
            Found::fail("/dev/net/tun is not the TUN device", load)
        }
        Ok(_) => match opened {
            Ok(()) => Found::ok("/dev/net/tun opens"),
            Err(e) => Found::fail(
                format!("/dev/net/tun does not open: {e}"),
                "run it as root; in a container allow device 10:200",
            ),
        },
    }
}

fn libc_major(number: u64) -> u64 {
    u64::from(libc::major(number))
}

fn libc_minor(number: u64) -> u64 {
    u64::from(libc::minor(number))
}

fn rights(root: bool) -> Found {
    if root {
        Found::ok("run as root")
    } else {
        Found::warn("not run as root: what follows may look worse than it is", "run it with sudo")
    }
}

#[cfg(test)]
mod tests {
    use super::super::Grade;
    use super::*;

    #[test]
    fn kernels() {
        let table = [
            ("6.12.0-generic", Grade::Ok),
            ("5.12.0", Grade::Ok),
            ("5.10.0-28-amd64", Grade::Warn),
            ("5.9.16", Grade::Fail),
            ("4.19", Grade::Fail),
            ("", Grade::Warn),
            ("plan 9", Grade::Warn),
        ];
        for (release, grade) in table {
            assert_eq!(kernel(release).0, grade, "{release}");
        }
    }

    #[test]
    fn tuns() {
        let error = |kind: std::io::ErrorKind| std::io::Error::from(kind);
        let number = libc::makedev(10, 200);
        assert_eq!(tun(Ok((true, number)), Ok(())).0, Grade::Ok);
        assert_eq!(tun(Ok((true, number)), Err(error(std::io::ErrorKind::PermissionDenied))).0, Grade::Fail);
        assert_eq!(tun(Ok((true, libc::makedev(1, 3))), Ok(())).0, Grade::Fail);
        assert_eq!(tun(Ok((false, 0)), Ok(())).0, Grade::Fail);
        let missing = tun(Err(error(std::io::ErrorKind::NotFound)), Ok(()));
        assert!(missing.0 == Grade::Fail && missing.2.contains("modprobe tun"));
    }
}
