//! Gives up what this process does not need, in one straight function that reads in the order it
//! happens. Runs before any thread exists and before a byte from the network is read.
//!
//! A step that the environment cannot offer is skipped and reported ([`Report`]); a step that should
//! work and fails stops the engine.

use std::os::fd::OwnedFd;

use caps::{CapSet, Capability};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

/// Ids to change to; present when the supervisor found them mapped.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ids {
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

/// What could not be given up because the environment does not offer it.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// The supervisor's mount namespace is kept: it could not make an empty one.
    pub(crate) mounts_kept: bool,
    /// The bounding set stays: this process never had CAP_SETPCAP (an ordinary user's).
    pub(crate) bounding_set_kept: bool,
    /// The supervisor's uid is kept: no other id is mapped.
    pub(crate) uid_kept: bool,
}

/// A step that failed, by name.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfineError {
    #[error("{step}: {error}")]
    Step { step: &'static str, error: String },
}

fn step<T, E: std::fmt::Display>(step: &'static str, result: Result<T, E>) -> Result<T, ConfineError> {
    result.map_err(|error| ConfineError::Step { step, error: error.to_string() })
}

/// The whole of it. `nowhere` is an empty mount namespace.
pub(crate) fn confine(ids: Ids, nowhere: Option<OwnedFd>) -> Result<Report, ConfineError> {
    let mut report = Report::default();

    // Needs capabilities that the next steps drop.
    if let Some(nowhere) = nowhere {
        step("enter the empty mount namespace", setns(&nowhere, CloneFlags::CLONE_NEWNS))?;
    } else {
        report.mounts_kept = true;
    }

    // Capabilities that a later execve could give back go first: dropping them needs CAP_SETPCAP,
    // which goes with the uid.
    step("clear ambient capabilities", caps::clear(None, CapSet::Ambient))?;
    if step("read capabilities", caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP))? {
        step("clear the bounding set", clear_bounding_set())?;
    } else {
        report.bounding_set_kept = true;
    }

    if let Some(gid) = ids.gid.map(Gid::from_raw) {
        step("setgroups", setgroups(&[]))?;
        step("setresgid", setresgid(gid, gid, gid))?;
    }
    if let Some(uid) = ids.uid.map(Uid::from_raw) {
        step("setresuid", setresuid(uid, uid, uid))?;
    } else {
        report.uid_kept = true;
    }

    for set in [CapSet::Effective, CapSet::Inheritable, CapSet::Permitted] {
        step("clear capabilities", caps::clear(None, set))?;
    }
    step("no_new_privs", prctl::set_no_new_privs())?;
    // Keys must reach neither a core file nor another process of the same uid.
    step("set_dumpable", prctl::set_dumpable(false))?;
    step("RLIMIT_CORE", setrlimit(Resource::RLIMIT_CORE, 0, 0))?;
    // The pod's link must not end with the supervisor, whoever started this process.
    step("pdeathsig", prctl::set_pdeathsig(None))?;
    Ok(report)
}

/// Every capability the running kernel knows, including those this build has no name for.
fn clear_bounding_set() -> std::io::Result<()> {
    for number in 0..64 {
        // SAFETY: asks about a number; EINVAL means that the kernel knows no such capability.
        if unsafe { libc::prctl(libc::PR_CAPBSET_READ, number, 0, 0, 0) } < 0 {
            break;
        }
        // SAFETY: takes a number and nothing else.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}
