//! The descriptors this process was born with, taken once and owned from then on.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use podtether_proto::fds;

/// What `PODTETHER_FDS` named. Only the RPC socket is needed to say anything at all; what is missing
/// of the rest is decided when the start request arrives.
#[derive(Debug)]
pub(crate) struct Descriptors {
    pub(crate) rpc: OwnedFd,
    pub(crate) tun: Option<OwnedFd>,
    pub(crate) udp4: Option<OwnedFd>,
    pub(crate) udp6: Option<OwnedFd>,
    pub(crate) names: Names,
    pub(crate) snapshot: Option<OwnedFd>,
    pub(crate) reason: Option<OwnedFd>,
    /// Listens for the engine that will replace this one.
    pub(crate) heir: Option<OwnedFd>,
    /// Leads to the engine that this one replaces.
    pub(crate) partner: Option<OwnedFd>,
    /// An empty mount namespace.
    pub(crate) nowhere: Option<OwnedFd>,
}

/// What questions for names come in by and go out by.
#[derive(Debug, Default)]
pub(crate) struct Names {
    pub(crate) dns: Vec<OwnedFd>,
    pub(crate) dns_tcp: Vec<OwnedFd>,
    pub(crate) stand_in: Vec<OwnedFd>,
    pub(crate) stand_in_tcp: Vec<OwnedFd>,
    pub(crate) ask_udp4: Vec<OwnedFd>,
    pub(crate) ask_udp6: Vec<OwnedFd>,
    pub(crate) ask_tcp4: Vec<OwnedFd>,
    pub(crate) ask_tcp6: Vec<OwnedFd>,
    /// Held to the end of the process, for the rules that end with it.
    pub(crate) owner: Vec<OwnedFd>,
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
        let mut slots: [Vec<OwnedFd>; NAMES.len()] = Default::default();
        let mut end = fds::FIRST_FD;
        for (number, slot) in (fds::FIRST_FD..).zip(&order) {
            // SAFETY: fcntl(F_GETFD) only looks at the number.
            if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
                return Err(FdsError::NotOpen(NAMES[*slot], number));
            }
            // SAFETY: sets a flag on a descriptor that is ours by this function's contract.
            unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
            // SAFETY: open (just checked) and, by this function's contract, nobody else's.
            slots[*slot].push(unsafe { OwnedFd::from_raw_fd(number) });
            end = number + 1;
        }
        close_from(end).map_err(|e| FdsError::Close(e.to_string()))?;
        let [
            mut rpc,
            mut tun,
            mut udp4,
            mut udp6,
            mut snapshot,
            mut reason,
            mut nowhere,
            mut heir,
            mut partner,
            dns,
            dns_tcp,
            stand_in,
            stand_in_tcp,
            ask_udp4,
            ask_udp6,
            ask_tcp4,
            ask_tcp6,
            owner,
        ] = slots;
        let names =
            Names { dns, dns_tcp, stand_in, stand_in_tcp, ask_udp4, ask_udp6, ask_tcp4, ask_tcp6, owner };
        Ok(Self {
            rpc: rpc.pop().ok_or(FdsError::Missing(fds::RPC))?,
            tun: tun.pop(),
            udp4: udp4.pop(),
            udp6: udp6.pop(),
            names,
            snapshot: snapshot.pop(),
            reason: reason.pop(),
            nowhere: nowhere.pop(),
            heir: heir.pop(),
            partner: partner.pop(),
        })
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

/// Those that there is at most one of, then those that there may be more of.
const NAMES: [&str; 18] = [
    fds::RPC,
    fds::TUN,
    fds::UDP4,
    fds::UDP6,
    fds::SNAPSHOT,
    fds::REASON,
    fds::NOWHERE,
    fds::HEIR,
    fds::PARTNER,
    fds::DNS,
    fds::DNS_TCP,
    fds::STAND_IN,
    fds::STAND_IN_TCP,
    fds::ASK_UDP4,
    fds::ASK_UDP6,
    fds::ASK_TCP4,
    fds::ASK_TCP6,
    fds::DNS_OWNER,
];
const SINGLE: usize = 9;

/// Indices into `NAMES`, in the order of the descriptors.
fn parse(names: &str) -> Result<Vec<usize>, FdsError> {
    let mut order = Vec::new();
    for name in names.split(':').filter(|n| !n.is_empty()) {
        let index =
            NAMES.iter().position(|n| *n == name).ok_or_else(|| FdsError::Unknown(name.to_owned()))?;
        if index < SINGLE && order.contains(&index) {
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
        assert_eq!(parse("dns:dns:rpc"), Ok(vec![9, 9, 0]));
        assert_eq!(parse("rpc:rpc"), Err(FdsError::Twice("rpc".into())));
    }
}
