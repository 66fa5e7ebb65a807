//! What an engine gives up before it reads from the network, step by step, and how each step went.

use serde::{Deserialize, Serialize};

/// A step, in the order they are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// No descriptor but those it is given (`close_range`).
    Descriptors,
    /// An empty mount namespace, made by the supervisor (`setns`).
    MountNamespace,
    /// An empty bounding and ambient set of capabilities.
    BoundingSet,
    /// A uid and gid of its own, no groups.
    Uid,
    /// No effective, permitted, inheritable capabilities.
    Capabilities,
    /// `no_new_privs`
    NoNewPrivs,
    /// No core file, no tracer of the same uid.
    NotDumpable,
    /// No signal at its parent's death.
    OutlivesParent,
    /// Resource limits (`setrlimit`).
    Limits,
    /// No file system (Landlock).
    NoFiles,
    /// No TCP port bound (Landlock, Linux 6.7).
    NoListening,
    /// No signal and no abstract socket of others (Landlock, Linux 6.12).
    Scope,
    /// TCP to the ports of control, proxy and relays alone (Landlock, Linux 6.7).
    Ports,
    /// The system calls on the list and no others (seccomp).
    Calls,
}

impl Step {
    /// Every step.
    pub const ALL: [Self; 14] = [
        Self::Descriptors,
        Self::MountNamespace,
        Self::BoundingSet,
        Self::Uid,
        Self::Capabilities,
        Self::NoNewPrivs,
        Self::NotDumpable,
        Self::OutlivesParent,
        Self::Limits,
        Self::NoFiles,
        Self::NoListening,
        Self::Scope,
        Self::Ports,
        Self::Calls,
    ];

    /// The word for it in reports and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptors",
            Self::BoundingSet => "bounding_set",
            Self::Uid => "uid",
            Self::Capabilities => "capabilities",
            Self::NoNewPrivs => "no_new_privs",
            Self::NotDumpable => "not_dumpable",
            Self::OutlivesParent => "outlives_parent",
            Self::Limits => "limits",
            Self::NoFiles => "no_files",
            Self::NoListening => "no_listening",
            Self::Scope => "scope",
            Self::Ports => "ports",
            Self::Calls => "calls",
            Self::MountNamespace => "mount_namespace",
        }
    }
}

/// How a step went. One that should have worked and failed ends the engine, so nobody reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepState {
    /// In force.
    Held,
    /// Comes into force later; the text says when.
    Pending,
    /// Kernel or surroundings do not have it; the text says what they lack.
    NotOffered,
}

/// One step as it is reported. The name is text, so that an older supervisor can read of a newer step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepReport {
    /// [`Step::name`]
    pub step: String,
    /// How it went.
    pub state: StepState,
    /// Why it is not in force, empty when it is.
    pub why: String,
}

impl StepReport {
    /// Whether something lacks that `node.require_sandbox` asks for: all but the scopes, which the list of
    /// system calls covers.
    #[must_use]
    pub fn is_missed(&self) -> bool {
        self.state == StepState::NotOffered && self.step != Step::Scope.name()
    }
}

#[cfg(test)]
mod tests {
    use super::Step;

    #[test]
    fn every_step_has_a_name_of_its_own() {
        let mut names = Step::ALL.map(Step::name).to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Step::ALL.len());
    }
}
