//! Cgroups of the engines: outside the supervisor's own, so that an end of its container does not end them,
//! and with limits of their own.
//!
//! An engine is put there right after it is born, not before: the kernel makes whoever joins wait for a grace period of
//! its own (10 ms, and several times that on a busy machine), and a pod's packets would wait with it.
//!
//! An engine is in `NAME/ID` where a controller limits it and in `NAME` elsewhere, `NAME` being
//! `node.cgroup_root`. Where that is follows from `/proc/self/cgroup` and `/proc/self/mountinfo`
//! ([`places`]); on cgroup v1 every hierarchy is left, because runtimes kill by any of them.

mod places;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

pub use places::{Hierarchy, Unusable, places};

/// Tasks of one engine: it has one thread.
const MAX_TASKS: u32 = 16;
/// CPU time of one engine per [`CPU_PERIOD_US`]: more than its one thread can use.
const CPU_QUOTA_US: u32 = 120_000;
const CPU_PERIOD_US: u32 = 100_000;
/// Weight of all engines together against the node's other cgroups, of which kubelet gives its pods 1024 a CPU. A node
/// whose pods want all of its CPUs would leave their links the share of one of them.
const CPU_SHARES: u32 = 10 * 1024;
/// The same for cgroup v2, where 100 stands for 1024.
const CPU_WEIGHT: u32 = 1000;
/// The first cgroup namespace of a boot, `PROC_CGROUP_INIT_INO` of the kernel.
const FIRST_NAMESPACE: &str = "cgroup:[4026531835]";

/// What is known to hold for an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hold {
    /// It is in no cgroup of the supervisor's.
    OwnCgroup,
    /// Its memory is limited.
    Memory,
    /// The number of its tasks is limited.
    Tasks,
    /// Its CPU time is limited.
    Cpu,
    /// It is in a mount namespace of its own.
    OwnMounts,
}

impl Hold {
    /// All of them.
    pub const ALL: [Hold; 5] = [Hold::OwnCgroup, Hold::Memory, Hold::Tasks, Hold::Cpu, Hold::OwnMounts];

    /// For status and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Hold::OwnCgroup => "cgroup",
            Hold::Memory => "memory",
            Hold::Tasks => "pids",
            Hold::Cpu => "cpu",
            Hold::OwnMounts => "mounts",
        }
    }
}

/// Where engines go in one hierarchy.
#[derive(Debug)]
struct Place {
    hierarchy: Hierarchy,
    /// `NAME` there.
    dir: PathBuf,
    limits: Vec<Hold>,
}

impl Place {
    fn of(&self, id: &str) -> PathBuf {
        if self.limits.is_empty() && !self.hierarchy.v2 { self.dir.clone() } else { self.dir.join(id) }
    }
}

/// The cgroups of this node's engines.
#[derive(Debug, Default)]
pub struct Cgroups {
    places: Vec<Place>,
    max_bytes: u64,
    problems: Vec<String>,
}

impl Cgroups {
    /// Finds out what there is and tries it. `name` empty makes none.
    #[must_use]
    pub fn prepare(name: &str, max_bytes: u64) -> Self {
        let mut cgroups = Self { max_bytes, ..Self::default() };
        if name.is_empty() {
            cgroups.problems.push("node.cgroup_root is empty".into());
            return cgroups;
        }
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let first = fs::read_link("/proc/self/ns/cgroup").is_ok_and(|ns| ns.as_os_str() == FIRST_NAMESPACE);
        let (found, unusable) = places(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"), first);
        cgroups.problems.extend(unusable.iter().map(ToString::to_string));
        for hierarchy in found {
            let dir = hierarchy.mount.join(name);
            match Place::make(hierarchy, dir) {
                Ok(place) => cgroups.places.push(place),
                Err(why) => cgroups.problems.push(why),
            }
        }
        cgroups
    }

    /// Why engines are not outside all cgroups of the supervisor's, and which limits they lack; empty when
    /// nothing is wrong.
    #[must_use]
    pub fn lacking(&self) -> String {
        let mut lacking = self.problems.clone();
        for limit in [Hold::Memory, Hold::Tasks, Hold::Cpu] {
            if !self.places.iter().any(|p| p.limits.contains(&limit)) {
                lacking.push(format!("no {} controller", limit.name()));
            }
        }
        lacking.join("; ")
    }

    /// Makes the cgroups of the engine `id` and opens what [`put`] needs.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn open(&self, id: &str) -> io::Result<Vec<OwnedFd>> {
        let open = |place: &Place| {
            let dir = place.of(id);
            if dir != place.dir {
                make_dir(&dir)?;
                for limit in &place.limits {
                    place.set(*limit, &dir, self.max_bytes)?;
                }
            }
            File::options().write(true).open(dir.join("cgroup.procs")).map(OwnedFd::from)
        };
        self.places.iter().map(open).collect()
    }

    /// Removes the cgroups of `id`, whose engine is gone.
    ///
    /// # Errors
    /// Something still is in one.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        for place in &self.places {
            let dir = place.of(id);
            if dir != place.dir {
                remove_dir(&dir)?;
            }
        }
        Ok(())
    }

    /// Removes cgroups of engines that are not `known`, and tells of those that cannot be removed.
    pub fn remove_unknown(&self, known: &HashSet<&str>) -> Vec<io::Error> {
        let mut failed = Vec::new();
        for place in &self.places {
            for entry in fs::read_dir(&place.dir).into_iter().flatten().flatten() {
                let known = entry.file_name().to_str().is_some_and(|name| known.contains(name));
                if !known && entry.file_type().is_ok_and(|t| t.is_dir()) {
                    failed.extend(remove_dir(&entry.path()).err());
                }
            }
        }
        failed
    }

    /// How often the kernel has killed in the memory cgroup of `id`.
    #[must_use]
    pub fn memory_kills(&self, id: &str) -> u64 {
        let place = self.places.iter().find(|p| p.limits.contains(&Hold::Memory));
        let Some(place) = place else { return 0 };
        let file = if place.hierarchy.v2 { "memory.events" } else { "memory.oom_control" };
        fs::read_to_string(place.of(id).join(file)).map_or(0, |text| kills(&text))
    }

    /// The limit of one engine's memory.
    #[must_use]
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// Whether an engine of which this holds is where [`Cgroups::open`] leads.
    #[must_use]
    pub fn placed(&self, holds: &[Hold]) -> bool {
        let limits = self.places.iter().flat_map(|place| &place.limits);
        (self.places.is_empty() || !self.problems.is_empty() || holds.contains(&Hold::OwnCgroup))
            && limits.into_iter().all(|limit| holds.contains(limit))
    }

    /// What holds for the engine `id`, a living process.
    #[must_use]
    pub fn holds(&self, id: &str, pid: u32) -> Vec<Hold> {
        let is_in = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let mut holds = self.limits_of(id, &is_in);
        let mounts = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let theirs = mounts(&pid.to_string());
        if theirs.is_some() && theirs != mounts("self") {
            holds.push(Hold::OwnMounts);
        }
        holds
    }

    /// Which limits follow from where a process is, given its `/proc/PID/cgroup`.
    fn limits_of(&self, id: &str, is_in: &str) -> Vec<Hold> {
        let now = places::memberships(is_in);
        let mut holds = Vec::new();
        let mut all = self.problems.is_empty() && !self.places.is_empty();
        for place in &self.places {
            let dir = place.of(id);
            let wanted = place.hierarchy.path_of(&dir);
            if now.iter().any(|(names, path)| *names == place.hierarchy.names && *path == wanted) {
                holds.extend(&place.limits);
            } else {
                all = false;
            }
        }
        holds.sort_unstable();
        if all {
            holds.insert(0, Hold::OwnCgroup);
        }
        holds
    }
}

impl Place {
    /// Makes `NAME`, hands controllers down to it, and tries whether a process may go there.
    fn make(hierarchy: Hierarchy, dir: PathBuf) -> Result<Self, String> {
        let at = |e: io::Error| format!("{} cannot be used: {e}", dir.display());
        make_dir(&dir).map_err(at)?;
        let mut limits = Vec::new();
        if hierarchy.v2 {
            for (name, limit) in [("memory", Hold::Memory), ("pids", Hold::Tasks), ("cpu", Hold::Cpu)] {
                let enable = |dir: &Path| fs::write(dir.join("cgroup.subtree_control"), format!("+{name}"));
                let above = dir.parent().unwrap_or(&dir);
                if enable(above).and_then(|()| enable(&dir)).is_ok() {
                    limits.push(limit);
                }
            }
        } else {
            for name in &hierarchy.names {
                match name.as_str() {
                    "memory" => limits.push(Hold::Memory),
                    "pids" => limits.push(Hold::Tasks),
                    // Not every kernel has bandwidth control.
                    "cpu" if dir.join("cpu.cfs_quota_us").exists() => limits.push(Hold::Cpu),
                    // Empty until somebody says which, and nobody can be in it before.
                    "cpuset" => inherit(&dir, &["cpuset.cpus", "cpuset.mems"]).map_err(at)?,
                    _ => {}
                }
            }
        }
        let place = Self { hierarchy, dir: dir.clone(), limits };
        place.weigh();
        let trial = place.of("trial");
        let tried = make_dir(&trial).and_then(|()| try_join(&trial));
        if trial != dir {
            remove_dir(&trial).map_err(at)?;
        }
        tried.map_err(at)?;
        Ok(place)
    }

    /// Without it engines are slower on a busy node, and no less confined.
    fn weigh(&self) {
        let (file, value) =
            if self.hierarchy.v2 { ("cpu.weight", CPU_WEIGHT) } else { ("cpu.shares", CPU_SHARES) };
        let file = self.dir.join(file);
        if file.exists()
            && let Err(e) = fs::write(&file, value.to_string())
        {
            tracing::warn!("engines have no more of a busy node's CPUs than others: {}: {e}", file.display());
        }
    }

    fn set(&self, limit: Hold, dir: &Path, max_bytes: u64) -> io::Result<()> {
        let put = |file: &str, value: &str| {
            fs::write(dir.join(file), value)
                .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", dir.join(file).display())))
        };
        match (limit, self.hierarchy.v2) {
            (Hold::Memory, true) => {
                put("memory.max", &max_bytes.to_string())?;
                // Keys do not go to a disk. Not every kernel has swap.
                let _ = put("memory.swap.max", "0");
                put("memory.oom.group", "1")
            }
            (Hold::Memory, false) => {
                let _ = put("memory.swappiness", "0");
                put("memory.limit_in_bytes", &max_bytes.to_string())
            }
            (Hold::Tasks, _) => put("pids.max", &MAX_TASKS.to_string()),
            (Hold::Cpu, true) => put("cpu.max", &format!("{CPU_QUOTA_US} {CPU_PERIOD_US}")),
            (Hold::Cpu, false) => {
                put("cpu.cfs_period_us", &CPU_PERIOD_US.to_string())?;
                put("cpu.cfs_quota_us", &CPU_QUOTA_US.to_string())
            }
            (Hold::OwnCgroup | Hold::OwnMounts, _) => Ok(()),
        }
    }
}

fn make_dir(dir: &Path) -> io::Result<()> {
    match fs::create_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn remove_dir(dir: &Path) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(io::Error::new(e.kind(), format!("cannot remove the cgroup {}: {e}", dir.display())))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Copies settings that are empty from the cgroup above, for every cgroup on the way down that lacks them.
fn inherit(dir: &Path, files: &[&str]) -> io::Result<()> {
    let Some(above) = dir.parent() else { return Ok(()) };
    for file in files {
        if fs::read_to_string(dir.join(file))?.trim().is_empty() {
            if fs::read_to_string(above.join(file))?.trim().is_empty() {
                inherit(above, &[file])?;
            }
            fs::write(dir.join(file), fs::read_to_string(above.join(file))?.trim())?;
        }
    }
    Ok(())
}

/// Sends a child there that does nothing else.
fn try_join(dir: &Path) -> io::Result<()> {
    let procs = File::options().write(true).open(dir.join("cgroup.procs"))?;
    // SAFETY: the child makes two system calls on memory of its own and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let code = match join(&procs) {
            Ok(()) => 0,
            Err(e) => e.raw_os_error().unwrap_or(libc::EIO) & 0xff,
        };
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(code) };
    }
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call; the child is this function's own.
        if unsafe { libc::waitpid(child, &raw mut status, 0) } == child {
            break;
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
    match libc::WEXITSTATUS(status) {
        0 if libc::WIFEXITED(status) => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

/// Moves the process `pid` there. Takes a grace period of the kernel.
///
/// # Errors
/// As the kernel says; a process that is gone is nobody's fault.
pub fn put(pid: u32, procs: &[OwnedFd]) -> io::Result<()> {
    let pid = pid.to_string();
    for procs in procs {
        match nix::unistd::write(procs, pid.as_bytes()) {
            Ok(_) | Err(nix::Error::ESRCH) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Moves the calling process there. For a child after fork: it allocates nothing.
///
/// # Errors
/// As the kernel says.
fn join(procs: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: writes one byte of a constant.
    let written = unsafe { libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1) };
    if written == 1 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `oom_kill` of `memory.events` or `memory.oom_control`.
fn kills(text: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    value.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests;
