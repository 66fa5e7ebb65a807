//! The CNI plugin `podtether-cni`: environment and stdin in, one JSON object out. Whatever touches the
//! pod is asked of the node's supervisor; this program needs no privilege but to open its socket.
//!
//! `run` is the whole of it; `env`, `config` and `result` read and write what the specification
//! describes, `supervisor` is the other end of the socket.

mod config;
mod env;
mod log;
mod result;
mod run;
mod supervisor;

use podtether_proto::node::CniError;

pub use run::{Outcome, run};

/// Reads what a call with this environment and this stdin would read, and asks nobody.
///
/// # Errors
/// What the call would print before it looked for the supervisor.
pub fn rehearse(
    lookup: &dyn Fn(&str) -> Option<String>,
    stdin: &mut dyn std::io::Read,
) -> Result<(), CniError> {
    run::rehearse(lookup, stdin)
}
