//! What a person in a pod would try, done with our own sockets: ping, TCP, UDP, DNS.
//!
//! Every probe runs in a given network namespace on threads of its own, needs no binary on the machine, and
//! ends by itself or when its handle is dropped.

pub mod datagrams;
pub mod dns;
pub mod ping;
pub mod tcp;
pub mod udp;

/// Why a probe could not run (not: why it found nothing).
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] podtether_net::Error),
    /// A socket call failed.
    #[error("{what}: {source}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The other side answered something else.
    #[error("{0}")]
    Answer(String),
}

impl ProbeError {
    /// For `map_err` of a socket call.
    pub(crate) fn socket(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Socket { what, source }
    }
}
