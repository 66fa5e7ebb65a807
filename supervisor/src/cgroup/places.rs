//! Which directories of cgroup file systems lie outside the cgroups of this process: decided from text alone.

use std::fmt;
use std::path::{Path, PathBuf};

/// One hierarchy, seen from outside the supervisor's own cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Cgroup v2.
    pub v2: bool,
    /// Controllers of cgroup v1, and names of hierarchies without (`name=systemd`), sorted. Empty for v2.
    pub names: Vec<String>,
    /// Where it is mounted.
    pub mount: PathBuf,
    /// The cgroup that is seen there, as `/proc/PID/cgroup` would name it.
    pub root: String,
}

impl Hierarchy {
    /// What `/proc/PID/cgroup` says of a process in `dir`, which is below the mount.
    #[must_use]
    pub fn path_of(&self, dir: &Path) -> String {
        let below = dir.strip_prefix(&self.mount).unwrap_or(dir).to_string_lossy();
        format!("{}/{below}", self.root.trim_end_matches('/'))
    }
}

/// A hierarchy that engines cannot leave the supervisor's cgroup in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unusable {
    /// As in [`Hierarchy`].
    pub names: Vec<String>,
    /// What is seen of it.
    pub seen: Seen,
}

/// What is seen of a hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// It is not mounted here.
    Nothing,
    /// It may not be written.
    ReadOnly,
    /// No more than the supervisor's own cgroup.
    OwnPart,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.names.is_empty() { "v2".to_owned() } else { self.names.join(",") };
        match self.seen {
            Seen::Nothing => write!(f, "cgroup {name} is not mounted here"),
            Seen::ReadOnly => write!(f, "cgroup {name} is mounted read-only"),
            Seen::OwnPart => write!(f, "of cgroup {name} only the supervisor's own part is mounted"),
        }
    }
}

/// What a process is in: names of the hierarchy and path, of `/proc/PID/cgroup`.
#[must_use]
pub(super) fn memberships(text: &str) -> Vec<(Vec<String>, String)> {
    let line = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (_, names, path) = (fields.next()?, fields.next()?, fields.next()?);
        Some((sorted(names.split(',')), path.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

fn sorted<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut names: Vec<String> = names.filter(|n| !n.is_empty()).map(str::to_owned).collect();
    names.sort_unstable();
    names
}

struct Mount {
    v2: bool,
    options: Vec<String>,
    root: String,
    point: PathBuf,
    writable: bool,
}

/// A line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)), if it is of a cgroup file system.
fn mount(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let (root, point, options) = (left.next()?, left.next()?, left.next()?);
    let mut right = right.split(' ');
    let (kind, _, of_all) = (right.next()?, right.next()?, right.next()?);
    let v2 = match kind {
        "cgroup2" => true,
        "cgroup" => false,
        _ => return None,
    };
    let has = |options: &str, wanted: &str| options.split(',').any(|o| o == wanted);
    Some(Mount {
        v2,
        options: sorted(of_all.split(',')),
        root: unescape(root),
        point: PathBuf::from(unescape(point)),
        writable: has(options, "rw") && has(of_all, "rw"),
    })
}

/// Spaces, tabs, newlines and backslashes stand as three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut whole = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                whole.push(char::from(byte));
                whole.push_str(&part[3..]);
            }
            None => {
                whole.push('\\');
                whole.push_str(part);
            }
        }
    }
    whole
}

/// Whether a mount of `root` shows more than the cgroup `own`.
///
/// In a cgroup namespace of its own a process is in `/` and what lies above is `/..`.
fn shows_more(root: &str, own: &str, first_namespace: bool) -> bool {
    let mut parts = root.split('/').filter(|part| !part.is_empty()).peekable();
    if parts.peek() == Some(&"..") {
        return parts.all(|part| part == "..");
    }
    let within = own.strip_prefix(root.trim_end_matches('/')).unwrap_or("x");
    // There is nothing above the root of all.
    (first_namespace && root == "/") || (within.starts_with('/') && within.len() > 1)
}

/// For every hierarchy of `/proc/self/cgroup` the mount that shows most of it. `first_namespace` says that
/// this process is in the cgroup namespace that the machine booted with.
#[must_use]
pub fn places(own: &str, mountinfo: &str, first_namespace: bool) -> (Vec<Hierarchy>, Vec<Unusable>) {
    let mounts: Vec<Mount> = mountinfo.lines().filter_map(mount).collect();
    let (mut found, mut unusable) = (Vec::new(), Vec::new());
    for (names, path) in memberships(own) {
        let v2 = names.is_empty();
        let same = |m: &&Mount| m.v2 == v2 && names.iter().all(|name| m.options.contains(name));
        let seen: Vec<&Mount> = mounts.iter().filter(same).collect();
        let more: Vec<&Mount> =
            seen.iter().copied().filter(|m| shows_more(&m.root, &path, first_namespace)).collect();
        let best =
            more.iter().filter(|m| m.writable).min_by_key(|m| (m.root.len(), m.point.as_os_str().len()));
        match best {
            Some(best) => {
                let (mount, root) = (best.point.clone(), best.root.clone());
                found.push(Hierarchy { v2, names, mount, root });
            }
            None => {
                let seen = match (seen.is_empty(), more.is_empty()) {
                    (true, _) => Seen::Nothing,
                    (false, true) => Seen::OwnPart,
                    (false, false) => Seen::ReadOnly,
                };
                unusable.push(Unusable { names, seen });
            }
        }
    }
    (found, unusable)
}
