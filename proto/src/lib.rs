//! What crosses a podtether process border: two tarpc services, the numbered exit codes of an
//! engine, and the descriptors an engine is born with.
//!
//! * [`engine`]: served by an engine on the socket its supervisor made for it. The supervisor calls,
//!   the engine reports through the [`engine::Engine::watch`] long poll, so an engine never needs to
//!   reach its supervisor and any later supervisor can take its place.
//! * [`calls`]: which minor of the version has which call of an engine.
//! * [`node`]: served by the supervisor on `run_dir/supervisor.sock` for the CNI plugin and the tools.
//! * [`log`]: what lines of a log have in common.
//! * [`transport`]: how both are carried (length-delimited JSON over a Unix socket, bounded).

pub mod calls;
pub mod clock;
pub mod engine;
pub mod exit;
pub mod fds;
pub mod log;
pub mod node;
pub mod sandbox;
pub mod secret;
pub mod transport;

/// Version of both services, in [`engine::Hello`] and [`node::Version`]. Each side accepts its own
/// minor and the ones next to it; a different major never talks.
///
/// A new minor may
///
/// * add a field, with `#[serde(default)]`: who does not know it passes it over, and who misses it takes the
///   default, which has to mean what was so before;
/// * add a call: an engine is asked only what the minor of its `hello` has ([`calls`]), because a call that it does
///   not know ends the connection.
///
/// Everything else is a new major: a field that goes, changes its type, its unit or its meaning, and also a
/// further variant of an enum in an answer, which the other side could not read.
pub const PROTO_VERSION: Version = Version { major: 4, minor: 1 };

/// A protocol version; see [`PROTO_VERSION`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Version {
    /// Incompatible changes.
    pub major: u16,
    /// Compatible changes; one older minor is accepted.
    pub minor: u16,
}

impl Version {
    /// True when a peer that says `other` can be talked to by this build.
    #[must_use]
    pub fn accepts(self, other: Version) -> bool {
        self.major == other.major && self.minor.abs_diff(other.minor) <= 1
    }
}

#[cfg(test)]
mod tests {
    use super::Version;

    #[test]
    fn one_minor_apart_is_accepted_two_are_not() {
        let v = |major, minor| Version { major, minor };
        assert!(v(1, 3).accepts(v(1, 2)));
        assert!(v(1, 2).accepts(v(1, 3)));
        assert!(!v(1, 4).accepts(v(1, 2)));
        assert!(!v(2, 0).accepts(v(1, 0)));
    }
}
