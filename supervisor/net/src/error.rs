use std::io;
use std::path::PathBuf;

/// What a caller can act on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path does not lead to a network namespace: never did, or the namespace is gone.
    #[error("{} is not a network namespace, or is gone", path.display())]
    NamespaceGone {
        /// As given.
        path: PathBuf,
    },
    /// The directory of pods' namespaces is not there: a container without the node's sees none of them, and knows
    /// nothing of any.
    #[error(
        "{} is not there, so no pod's network namespace can be seen; \
         a supervisor in a container needs the node's directory, with mountPropagation HostToContainer",
        dir.display()
    )]
    NamespacesHidden {
        /// The directory.
        dir: PathBuf,
    },
    /// The pod's namespace is the node's own: a link there would change the node.
    #[error("{} is the node's own network namespace", path.display())]
    HostNamespace {
        /// As given.
        path: PathBuf,
    },
    /// The name is taken by an interface that this link did not make.
    #[error("an interface named {name} exists already and is not ours")]
    InterfaceExists {
        /// Interface name.
        name: String,
    },
    /// Somebody still holds the TUN's only queue.
    #[error("TUN {name} is held by a live process")]
    TunBusy {
        /// Interface name.
        name: String,
    },
    /// No port of the range was free.
    #[error("no free UDP port in {first}..={last}")]
    NoFreePort {
        /// Lower end.
        first: u16,
        /// Upper end.
        last: u16,
    },
    /// Something of a link is not as it should be.
    #[error("{what}")]
    Broken {
        /// The first difference, as a sentence.
        what: String,
    },
    /// Input that cannot be used.
    #[error("{what}: {reason}")]
    Invalid {
        /// Which input.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The kernel refused a step.
    #[error("{step}: {source}")]
    Kernel {
        /// What was tried, with its object.
        step: String,
        /// Why not.
        source: io::Error,
    },
}

/// Shorthand.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The errno of a refused step.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Kernel { source, .. } => source.raw_os_error(),
            Self::NamespaceGone { .. }
            | Self::NamespacesHidden { .. }
            | Self::HostNamespace { .. }
            | Self::InterfaceExists { .. }
            | Self::TunBusy { .. }
            | Self::NoFreePort { .. }
            | Self::Broken { .. }
            | Self::Invalid { .. } => None,
        }
    }
}

/// Names the step that failed.
pub(crate) trait Step<T> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Step<T> for std::result::Result<T, E> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::Kernel { step: what(), source: e.into() })
    }
}
