//! Gives up what this process does not need, in one straight function that reads in the order it
//! happens. Runs before any thread exists and before a byte from the network is read.
//!
//! A step that the environment cannot offer is skipped and reported ([`Report`]); a step that should
//! work and fails stops the engine. `docs/sandbox.md` has the table. In a file of this name because
//! `tests/sandbox.rs` takes the module in by its path, to confine itself and then try.

pub(crate) mod landlock;
pub(crate) mod seccomp;

use std::io;
use std::os::fd::OwnedFd;

use caps::{CapSet, Capability};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use podtether_proto::sandbox::{Step, StepReport, StepState};

/// Descriptors: those it is born with, control, the relays of a large map being measured at once, and the
/// connections of the pod's questions.
const MAX_DESCRIPTORS: u64 = 512;
/// The snapshot: two slots of 8 MiB.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// What a main thread gets by default; more comes from an odd environment.
const MAX_STACK_BYTES: u64 = 8 << 20;
/// Anonymous memory where no cgroup limits it: ten times what an engine with ten thousand peers and a full
/// map on its way holds.
const MAX_DATA_BYTES: u64 = 512 << 20;

/// What this process is told about itself by its environment.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ids {
    /// Ids to change to; present when the supervisor found them mapped.
    pub(crate) uid: Option<u32>,
    /// See `uid`.
    pub(crate) gid: Option<u32>,
    /// A step that the environment does not offer stops the engine.
    pub(crate) require_all: bool,
}

/// How each step went, in their order.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Report(pub(crate) Vec<StepReport>);

impl Report {
    fn held(&mut self, step: Step) {
        self.put(step, StepState::Held, String::new());
    }

    fn not_offered(&mut self, step: Step, why: impl Into<String>) {
        self.put(step, StepState::NotOffered, why.into());
    }

    fn put(&mut self, step: Step, state: StepState, why: String) {
        self.0.push(StepReport { step: step.name().to_owned(), state, why });
    }
}

/// A step that failed, by name.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfineError {
    #[error("{step}: {error}")]
    Step { step: &'static str, error: String },
    #[error(
        "node.require_sandbox is set and this node does not offer the step {}: {}",
        .0.step, .0.why
    )]
    Required(StepReport),
}

fn step<T, E: std::fmt::Display>(step: &'static str, result: Result<T, E>) -> Result<T, ConfineError> {
    result.map_err(|error| ConfineError::Step { step, error: error.to_string() })
}

/// The whole of it. `nowhere` is an empty mount namespace; `last` is done under the new uid, and before the list
/// of calls forbids it.
pub(crate) fn confine(
    ids: Ids,
    nowhere: Option<OwnedFd>,
    last: impl FnOnce() -> io::Result<()>,
) -> Result<Report, ConfineError> {
    let mut report = Report::default();
    // What leaked through exec was closed when the descriptors were taken, before this.
    report.held(Step::Descriptors);
    // Needs capabilities that the next steps drop.
    if let Some(nowhere) = nowhere {
        step("enter the empty mount namespace", setns(&nowhere, CloneFlags::CLONE_NEWNS))?;
        report.held(Step::MountNamespace);
    } else {
        let why = "the supervisor's is kept: it could not make an empty one";
        report.not_offered(Step::MountNamespace, why);
    }
    give_up(ids, &mut report)?;
    shut_out(&mut report)?;
    step("listen", last())?;
    match seccomp::load() {
        Ok(()) => report.held(Step::Calls),
        Err(error) if is_absent(&error) => {
            report.not_offered(Step::Calls, format!("this kernel offers no seccomp filters ({error})"));
        }
        Err(error) => return step("seccomp", Err(error)),
    }
    refuse_missing(ids.require_all, &report)?;
    Ok(report)
}

/// Ids, capabilities and limits.
pub(crate) fn give_up(ids: Ids, report: &mut Report) -> Result<(), ConfineError> {
    // Capabilities that a later execve could give back go first: dropping them needs CAP_SETPCAP,
    // which goes with the uid.
    step("clear ambient capabilities", caps::clear(None, CapSet::Ambient))?;
    if step("read capabilities", caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP))? {
        step("clear the bounding set", clear_bounding_set())?;
        report.held(Step::BoundingSet);
    } else {
        report.not_offered(Step::BoundingSet, "CAP_SETPCAP is missing, as for an ordinary user");
    }

    if let Some(gid) = ids.gid.map(Gid::from_raw) {
        step("setgroups", setgroups(&[]))?;
        step("setresgid", setresgid(gid, gid, gid))?;
    }
    if let Some(uid) = ids.uid.map(Uid::from_raw) {
        step("setresuid", setresuid(uid, uid, uid))?;
        report.held(Step::Uid);
    } else {
        report.not_offered(Step::Uid, "the supervisor's uid is kept: no other ids are mapped here");
    }

    for set in [CapSet::Effective, CapSet::Inheritable, CapSet::Permitted] {
        step("clear capabilities", caps::clear(None, set))?;
    }
    report.held(Step::Capabilities);
    step("no_new_privs", prctl::set_no_new_privs())?;
    report.held(Step::NoNewPrivs);
    // Keys must reach neither a core file nor another process of the same uid.
    step("set_dumpable", prctl::set_dumpable(false))?;
    report.held(Step::NotDumpable);
    // The pod's link must not end with the supervisor, whoever started this process.
    step("pdeathsig", prctl::set_pdeathsig(None))?;
    report.held(Step::OutlivesParent);

    limit(Resource::RLIMIT_CORE, "RLIMIT_CORE", 0)?;
    limit(Resource::RLIMIT_NOFILE, "RLIMIT_NOFILE", MAX_DESCRIPTORS)?;
    limit(Resource::RLIMIT_FSIZE, "RLIMIT_FSIZE", MAX_FILE_BYTES)?;
    limit(Resource::RLIMIT_MEMLOCK, "RLIMIT_MEMLOCK", 0)?;
    limit(Resource::RLIMIT_STACK, "RLIMIT_STACK", MAX_STACK_BYTES)?;
    limit(Resource::RLIMIT_DATA, "RLIMIT_DATA", MAX_DATA_BYTES)?;
    if ids.uid.is_some() {
        // Counted by uid, so only where nobody else has it.
        limit(Resource::RLIMIT_NPROC, "RLIMIT_NPROC", 1)?;
    }
    report.held(Step::Limits);
    Ok(())
}

/// No files, no TCP port of its own, nobody outside by name or signal: Landlock, as far as the kernel has it.
pub(crate) fn shut_out(report: &mut Report) -> Result<(), ConfineError> {
    const NO_TCP: &str = "Landlock rules for TCP need Linux 6.7";
    let abi = match landlock::abi() {
        Ok(abi) => abi,
        Err(error) if is_absent(&error) => {
            let why = format!(
                "this kernel offers no Landlock ({error}): it needs Linux 5.13, and landlock among its LSMs"
            );
            for step in [Step::NoFiles, Step::NoListening, Step::Scope, Step::Ports] {
                report.not_offered(step, why.clone());
            }
            return Ok(());
        }
        Err(error) => return step("Landlock", Err(error)),
    };
    step("Landlock", landlock::deny(abi))?;
    report.held(Step::NoFiles);
    if abi >= landlock::ABI_TCP {
        report.held(Step::NoListening);
        report.put(Step::Ports, StepState::Pending, "until the relays' ports are known".to_owned());
    } else {
        report.not_offered(Step::NoListening, NO_TCP);
        report.not_offered(Step::Ports, NO_TCP);
    }
    if abi >= landlock::ABI_SCOPE {
        report.held(Step::Scope);
    } else {
        report.not_offered(Step::Scope, "Landlock scopes need Linux 6.12; the list of calls covers it");
    }
    Ok(())
}

fn refuse_missing(require_all: bool, report: &Report) -> Result<(), ConfineError> {
    let missing = report.0.iter().find(|step| step.is_missed());
    match missing {
        Some(step) if require_all => Err(ConfineError::Required(step.clone())),
        _ => Ok(()),
    }
}

/// Lowers both limits to `most`, or leaves them where they are lower.
fn limit(resource: Resource, name: &'static str, most: u64) -> Result<(), ConfineError> {
    let (_, hard) = step(name, getrlimit(resource))?;
    let most = hard.min(most);
    step(name, setrlimit(resource, most, most))
}

/// Whether a call failed because the kernel lacks it, had it switched off at boot, or a container's own filter
/// keeps it away.
fn is_absent(error: &io::Error) -> bool {
    let absent = [Errno::ENOSYS, Errno::EOPNOTSUPP, Errno::EPERM];
    absent.iter().any(|errno| error.raw_os_error() == Some(*errno as i32))
}

/// Every capability the running kernel knows, including those this build has no name for.
fn clear_bounding_set() -> io::Result<()> {
    for number in 0..64 {
        // SAFETY: asks about a number; EINVAL means that the kernel knows no such capability.
        if unsafe { libc::prctl(libc::PR_CAPBSET_READ, number, 0, 0, 0) } < 0 {
            break;
        }
        // SAFETY: takes a number and nothing else.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_required_and_missing_is_named() {
        let mut report = Report::default();
        report.held(Step::NoNewPrivs);
        report.not_offered(Step::Scope, "old");
        report.put(Step::Ports, StepState::Pending, String::new());
        assert!(refuse_missing(true, &report).is_ok(), "what another step covers, or comes later");
        report.not_offered(Step::NoFiles, "this kernel offers no Landlock");
        assert!(refuse_missing(false, &report).is_ok());
        let error = refuse_missing(true, &report).unwrap_err().to_string();
        assert!(error.contains("no_files") && error.contains("no Landlock"), "{error}");
    }
}
