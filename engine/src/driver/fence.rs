//! The TCP ports this process may connect to, and when it has to be started again for more.
//!
//! Control, proxy, name servers and the usual ports are known from the start; the relays' come with the map. So
//! the list comes into force with the snapshot's map, or with the first one from control, before any relay is
//! connected to. Landlock only ever takes away: for a port that a later map brings the engine ends with
//! [`NewPorts`](podtether_proto::exit::EngineExit::NewPorts), and its successor has that map in its snapshot.

use std::collections::BTreeSet;
use std::io;

use podtether_proto::sandbox::{Step, StepReport, StepState};

use crate::confine::landlock;
use crate::status::Board;

/// HTTP, HTTPS and DNS: control's usual ones, relays' usual one, name servers'.
const USUAL: [u16; 3] = [53, 80, 443];
/// Ports that are listed in a report.
const MAX_TOLD: usize = 16;

/// Which TCP ports may be connected to.
#[derive(Debug)]
pub(super) enum Fence {
    /// The kernel cannot hold it: any.
    NotOffered,
    /// Any, until the relays are known. These are known already.
    Open(BTreeSet<u16>),
    /// These, for as long as the process lives.
    Shut(BTreeSet<u16>),
}

impl Fence {
    /// `own`: ports of control and of the proxy.
    pub(super) fn new(board: &Board, own: impl IntoIterator<Item = u16>) -> Self {
        let sandbox = board.read().sandbox;
        let pending = sandbox.iter().any(|s| s.step == Step::Ports.name() && s.state == StepState::Pending);
        if pending { Self::Open(own.into_iter().chain(USUAL).collect()) } else { Self::NotOffered }
    }

    /// Whether nothing was shut yet that could be.
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Self::Open(_))
    }

    /// Leaves these ports and the own ones; no others any more.
    pub(super) fn shut(&mut self, named: impl IntoIterator<Item = u16>, board: &Board) -> io::Result<()> {
        let Self::Open(own) = self else { return Ok(()) };
        let mut ports = std::mem::take(own);
        ports.extend(named);
        let list: Vec<u16> = ports.iter().copied().collect();
        landlock::connect_only(&list)?;
        let shown: Vec<String> = list.iter().take(MAX_TOLD).map(u16::to_string).collect();
        let held = StepReport {
            step: Step::Ports.name().to_owned(),
            state: StepState::Held,
            why: format!("TCP to {}", shown.join(", ")),
        };
        board.update(|status| {
            for step in status.sandbox.iter_mut().filter(|step| step.step == held.step) {
                step.clone_from(&held);
            }
        });
        *self = Self::Shut(ports);
        Ok(())
    }

    /// Whether a connection to this port can succeed.
    pub(super) fn allows(&self, port: u16) -> bool {
        match self {
            Self::NotOffered | Self::Open(_) => true,
            Self::Shut(ports) => ports.contains(&port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_kernel_can_hold_is_waited_for() {
        let report = |state| vec![StepReport { step: "ports".into(), state, why: String::new() }];
        let none = Fence::new(&Board::new(report(StepState::NotOffered)), [8080]);
        assert!(!none.is_open() && none.allows(22));
        let open = Fence::new(&Board::new(report(StepState::Pending)), [8080]);
        assert!(open.is_open() && open.allows(22));
        let shut = Fence::Shut(USUAL.into_iter().chain([8080]).collect());
        assert_eq!([22, 53, 80, 443, 8080].map(|port| shut.allows(port)), [false, true, true, true, true]);
    }
}
