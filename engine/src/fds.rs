//! The descriptors this process was born with, taken once and owned from then on.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use podtether_proto::fds;

/// What `PODTETHER_FDS` named. Only the RPC socket is needed to say anything at all; what is missing
/// of the rest is decided when the start request arrives.
#[derive(Debug)]
pub(crate) struct Descriptors {
    pub(crate) rpc: OwnedFd,
    pub(crate) tun: Option<OwnedFd>,
    pub(crate) udp4: Option<OwnedFd>,
    pub(crate) udp6: Option<OwnedFd>,
    pub(crate) dns4: Option<OwnedFd>,
    pub(crate) dns6: Option<OwnedFd>,
    pub(crate) snapshot: Option<OwnedFd>,
    pub(crate) reason: Option<OwnedFd>,
}

/// Why the descriptors cannot be taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum FdsError {
    #[error("{env} is not set: podtether-engine is started by podtether-supervisor, not by hand", env = fds::ENV)]
    NotSet,
    #[error("{env} names the unknown descriptor {0:?}", env = fds::ENV)]
    Unknown(String),
    #[error("{env} names {0:?} twice", env = fds::ENV)]
    Twice(String),
    #[error("{env} does not name {0:?}", env = fds::ENV)]
    Missing(&'static str),
    #[error("{env} names {0:?}, but descriptor {1} is not open", env = fds::ENV)]
    NotOpen(&'static str, RawFd),
    #[error("cannot close what leaked into this process: {0}")]
    Close(String),
}

impl Descriptors {
    /// Takes ownership of what the environment names and closes whatever else came through exec.
    ///
    /// # Safety
    /// To be called once per process, before anything else opens a descriptor: each number is
    /// assumed to belong to nobody else.
    pub(crate) unsafe fn take(names: Option<&str>) -> Result<Self, FdsError> {
        let names = names.ok_or(FdsError::NotSet)?;
        let order = parse(names)?;
        let mut slots: [Option<OwnedFd>; NAMES.len()] = Default::default();
        let mut end = fds::FIRST_FD;
        for (number, slot) in (fds::FIRST_FD..).zip(&order) {
            // SAFETY: fcntl(F_GETFD) only looks at the number.
            if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
                return Err(FdsError::NotOpen(NAMES[*slot], number));
            }
            // SAFETY: open (just checked) and, by this function's contract, nobody else's.
            slots[*slot] = Some(unsafe { OwnedFd::from_raw_fd(number) });
            end = number + 1;
        }
        let [rpc, tun, udp4, udp6, dns4, dns6, snapshot, reason] = slots;
        let rpc = rpc.ok_or(FdsError::Missing(fds::RPC))?;
        close_from(end).map_err(|e| FdsError::Close(e.to_string()))?;
        let all = Self { rpc, tun, udp4, udp6, dns4, dns6, snapshot, reason };
        all.close_on_exec();
        Ok(all)
    }

    fn close_on_exec(&self) {
        let optional =
            [&self.tun, &self.udp4, &self.udp6, &self.dns4, &self.dns6, &self.snapshot, &self.reason];
        for fd in optional.into_iter().flatten().chain([&self.rpc]) {
            // SAFETY: sets a flag on a descriptor that we own.
            unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
}

fn close_from(first: RawFd) -> std::io::Result<()> {
    let first = libc::c_uint::try_from(first).map_err(std::io::Error::other)?;
    // SAFETY: the range starts above every descriptor that this process owns.
    match unsafe { libc::close_range(first, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

const NAMES: [&str; 8] =
    [fds::RPC, fds::TUN, fds::UDP4, fds::UDP6, fds::DNS4, fds::DNS6, fds::SNAPSHOT, fds::REASON];

/// Indices into `NAMES`, in the order of the descriptors.
fn parse(names: &str) -> Result<Vec<usize>, FdsError> {
    let mut order = Vec::new();
    for name in names.split(':').filter(|n| !n.is_empty()) {
        let index =
            NAMES.iter().position(|n| *n == name).ok_or_else(|| FdsError::Unknown(name.to_owned()))?;
        if order.contains(&index) {
            return Err(FdsError::Twice(name.to_owned()));
        }
        order.push(index);
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_give_positions() {
        assert_eq!(parse("rpc:tun:udp6"), Ok(vec![0, 1, 3]));
        assert_eq!(parse(""), Ok(vec![]));
        assert_eq!(parse("rpc:disk"), Err(FdsError::Unknown("disk".into())));
        assert_eq!(parse("rpc:rpc"), Err(FdsError::Twice("rpc".into())));
    }
}
