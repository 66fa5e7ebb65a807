//! Memory that an engine's cgroup does not have, and the cgroups that takes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::unistd::geteuid;

/// More than an engine may have.
const MIB: usize = 512;
/// `oom_score_adj` of the engine: it counts as if it had all that the cgroup may have, and what it has on top, so that
/// it goes before its neighbour, which has less. A new engine does not.
const ENGINE_GOES: u16 = 1000;
/// Processes that were killed leave their cgroups within this.
const LEFT_WITHIN: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// A process that takes what is left of an engine's memory and more; ends when dropped.
pub(super) struct Hog(Child);

impl Hog {
    /// In the cgroup of `engine`.
    pub(super) fn beside(engine: i32) -> Result<Self> {
        let cgroup = memory_cgroup(engine)?;
        fs::write(format!("/proc/{engine}/oom_score_adj"), ENGINE_GOES.to_string())
            .context("make the engine the kernel's first choice")?;
        let script = format!(
            "echo 0 > /proc/self/oom_score_adj; echo 0 > \"$1/cgroup.procs\" && \
             exec dd if=/dev/zero of=/dev/null bs={MIB}M count=1"
        );
        let child = Command::new("/bin/sh")
            .args(["-c", &script, "sh"])
            .arg(&cgroup)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start a process that takes memory")?;
        Ok(Self(child))
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The directory of the cgroup that limits the memory of `pid`.
fn memory_cgroup(pid: i32) -> Result<PathBuf> {
    let of = fs::read_to_string(format!("/proc/{pid}/cgroup")).context("which cgroups an engine is in")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("the mount table")?;
    let found = candidates(&of, &mounts)
        .into_iter()
        .find(|dir| dir.join("memory.limit_in_bytes").exists() || dir.join("memory.max").exists());
    match found {
        Some(dir) => Ok(dir),
        None => bail!("no memory cgroup of process {pid} is mounted here"),
    }
}

/// Where the cgroups of a process that may limit memory are seen, given its `/proc/PID/cgroup`: of cgroup v1
/// by the controller, and of v2.
fn candidates(of: &str, mountinfo: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in of.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let v2 = controllers.is_empty();
        if !v2 && !controllers.split(',').any(|name| name == "memory") {
            continue;
        }
        for (kind, options, root, point) in mounts(mountinfo) {
            let same = if v2 { kind == "cgroup2" } else { options.split(',').any(|o| o == "memory") };
            if let Some(below) = path.strip_prefix(root.trim_end_matches('/')).filter(|_| same) {
                found.push(Path::new(point).join(below.trim_start_matches('/')));
            }
        }
    }
    found
}

/// Kind, options, root and mount point of every cgroup file system.
fn mounts(mountinfo: &str) -> impl Iterator<Item = (&str, &str, &str, &str)> {
    mountinfo.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let (kind, _, options) = (right.next()?, right.next()?, right.next()?);
        matches!(kind, "cgroup" | "cgroup2").then_some((kind, options, root, point))
    })
}

/// A cgroup of the machine for the engines of one run: namespaces do not take it with them.
#[derive(Debug)]
pub struct Cgroups(String);

impl Cgroups {
    /// `name` for root, who alone may make cgroups; none for anybody else.
    #[must_use]
    pub fn named(name: String) -> Self {
        Self(if geteuid().is_root() { name } else { String::new() })
    }

    /// For `node.cgroup_root`; empty for none.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Removes it from every hierarchy, with all below.
    ///
    /// # Errors
    /// When processes in it do not end.
    pub fn remove(&self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").context("the mount table")?;
        let until = Instant::now() + LEFT_WITHIN;
        for (.., point) in mounts(&mountinfo) {
            let dir = Path::new(point).join(&self.0);
            while let Err(error) = remove_below(&dir) {
                anyhow::ensure!(
                    Instant::now() < until,
                    "cannot remove the cgroup {}: {error}",
                    dir.display()
                );
                std::thread::sleep(POLL);
            }
        }
        Ok(())
    }
}

/// A cgroup's files go with it.
fn remove_below(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_below(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
        30 22 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755\n\
        31 30 0:27 / /sys/fs/cgroup/memory rw,relatime shared:10 - cgroup cgroup rw,memory\n\
        32 30 0:28 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
        33 30 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_cgroup_that_limits_memory_is_found_on_v1_and_v2() {
        let of = "5:memory:/podtether/x\n3:cpu,cpuacct:/podtether/y\n0::/podtether\n";
        assert_eq!(
            candidates(of, V1),
            ["/sys/fs/cgroup/memory/podtether/x", "/sys/fs/cgroup/unified/podtether"].map(PathBuf::from)
        );
        let v2 = "31 30 0:27 /pods /sys/fs/cgroup rw,relatime shared:10 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(candidates("0::/pods/podtether/x\n", v2), [PathBuf::from("/sys/fs/cgroup/podtether/x")]);
        assert!(candidates("0::/other\n", v2).is_empty(), "not seen from here");
    }
}
