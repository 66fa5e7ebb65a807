//! What this node offers for the engines' sandbox, found out before the first engine is started.

use std::io;

use podtether_proto::sandbox::{Step, StepReport, StepState};

use crate::context::Context;

const LANDLOCK_VERSION: u32 = 1 << 0;
/// Landlock ABI of Linux 6.7, with TCP ports.
const ABI_TCP: u32 = 4;
/// Landlock ABI of Linux 6.12, with scopes.
const ABI_SCOPE: u32 = 6;

/// Steps that no engine of this supervisor can take, each with its reason.
#[must_use]
pub fn not_offered(context: &Context) -> Vec<StepReport> {
    use caps::{CapSet, Capability};
    missing(&Node {
        own_uids: context.own_uids,
        uid_base: context.config.node.uid_base,
        setpcap: caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).unwrap_or(false),
        landlock: landlock().map_err(|e| e.to_string()),
        seccomp: seccomp().map_err(|e| e.to_string()),
    })
}

/// What was found of a node.
#[derive(Debug, Clone)]
struct Node {
    own_uids: bool,
    uid_base: u32,
    setpcap: bool,
    landlock: Result<u32, String>,
    seccomp: Result<(), String>,
}

fn missing(node: &Node) -> Vec<StepReport> {
    let mut missing = Vec::new();
    let mut lacks = |step: Step, why: String| {
        missing.push(StepReport { step: step.name().to_owned(), state: StepState::NotOffered, why });
    };
    if !node.setpcap {
        lacks(Step::BoundingSet, "CAP_SETPCAP is missing".into());
    }
    if !node.own_uids {
        let why = format!(
            "this process cannot give engines uids of their own from node.uid_base = {} on: they are not \
             mapped here, or CAP_SETUID and CAP_SETGID are missing",
            node.uid_base
        );
        lacks(Step::Uid, why);
    }
    let abi = node.landlock.as_ref().copied().unwrap_or(0);
    let why = |kernel: &str| match &node.landlock {
        Ok(_) => format!("Linux {kernel} is needed for it"),
        Err(e) => format!("there is no Landlock ({e}): Linux 5.13 is needed, and landlock among its LSMs"),
    };
    for (step, from, kernel) in [
        (Step::NoFiles, 1, "5.13"),
        (Step::NoListening, ABI_TCP, "6.7"),
        (Step::Scope, ABI_SCOPE, "6.12"),
        (Step::Ports, ABI_TCP, "6.7"),
    ] {
        if abi < from {
            lacks(step, why(kernel));
        }
    }
    if let Err(e) = &node.seccomp {
        lacks(Step::Calls, format!("there are no seccomp filters ({e})"));
    }
    missing
}

fn landlock() -> io::Result<u32> {
    let nothing: *const u8 = std::ptr::null();
    // SAFETY: with this flag the kernel reads no attribute and answers with a number.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0_usize, LANDLOCK_VERSION) };
    u32::try_from(version).map_err(|_| io::Error::last_os_error())
}

fn seccomp() -> io::Result<()> {
    let action: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: reads one u32 that outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0_u32, &raw const action) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_and_what_they_lack() {
        let full = Node { own_uids: true, uid_base: 1, setpcap: true, landlock: Ok(6), seccomp: Ok(()) };
        let lacking = |node: &Node| -> String {
            missing(node).iter().map(|s| s.step.clone()).collect::<Vec<_>>().join(" ")
        };
        let none = || Err("Function not implemented".to_owned());
        let table = [
            (full.clone(), ""),
            (Node { landlock: Ok(4), ..full.clone() }, "scope"),
            (Node { landlock: Ok(3), ..full.clone() }, "no_listening scope ports"),
            (Node { landlock: none(), ..full.clone() }, "no_files no_listening scope ports"),
            (Node { own_uids: false, setpcap: false, ..full.clone() }, "bounding_set uid"),
            (Node { seccomp: Err("no".into()), ..full }, "calls"),
        ];
        for (node, expected) in table {
            assert_eq!(lacking(&node), expected, "{node:?}");
            assert!(missing(&node).iter().all(|s| !s.why.is_empty()));
        }
    }
}
