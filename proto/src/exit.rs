//! Exit codes of an engine. The restart policy reads these, never log text.

use serde::{Deserialize, Serialize};

/// Why an engine ended by its own choice. Anything else (signal, panic, unknown code) is a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum EngineExit {
    /// Asked to stop, or logged out as asked.
    Stopped = 0,
    /// The start request cannot work (bad URL, bad key, missing descriptor). Restarting does not help.
    BadConfig = 64,
    /// Control refused the auth key, or wants one. Mint a key and start again.
    KeyRejected = 65,
    /// The node key has expired. Make a new node key, keep the old one as `old_node`, mint, start again.
    NodeKeyExpired = 66,
    /// Control does not know this node any more (HTTP 404). Mint a key and register anew.
    NodeUnknown = 67,
    /// A confinement step that should work failed. Back off.
    Sandbox = 70,
    /// A kernel object is gone (the TUN's namespace, a socket). Rebuild the link, then start again.
    LinkLost = 71,
    /// Nobody gave this engine an identity: its supervisor died while starting it.
    Orphaned = 72,
    /// A relay listens on a TCP port that this process may not connect to. Start again: the snapshot has the map.
    NewPorts = 73,
}

impl EngineExit {
    /// Every variant, for tables.
    pub const ALL: [Self; 9] = [
        Self::Stopped,
        Self::BadConfig,
        Self::KeyRejected,
        Self::NodeKeyExpired,
        Self::NodeUnknown,
        Self::Sandbox,
        Self::LinkLost,
        Self::Orphaned,
        Self::NewPorts,
    ];

    /// The process exit code.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The variant of a process exit code; `None` means crash.
    #[must_use]
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|e| i32::from(e.code()) == code)
    }
}

/// What an engine writes (as JSON, once) to [`crate::fds::REASON`] before it exits by choice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReason {
    /// The same code the process exits with.
    pub exit: EngineExit,
    /// One sentence for a person; holds no secret.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::EngineExit;

    #[test]
    fn codes_round_trip_and_panics_are_crashes() {
        for e in EngineExit::ALL {
            assert_eq!(EngineExit::from_code(i32::from(e.code())), Some(e));
        }
        assert_eq!(EngineExit::from_code(101), None);
        assert_eq!(EngineExit::from_code(137), None);
    }
}
