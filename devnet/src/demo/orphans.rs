//! The first process of a PID namespace inherits whatever outlives its parent, engines above all. Nobody else can
//! take the ended ones away, and each keeps a pid of the machine's.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// `comm` of an engine, cut by the kernel. This process starts none itself, so one that it has was inherited.
const ENGINE: &str = "podtether-engin";
/// They do no harm in between.
const EVERY: Duration = Duration::from_secs(1);

/// Reaps ended engines from now on.
///
/// # Errors
/// When there can be no thread.
pub(crate) fn reap_engines() -> Result<()> {
    let reap = || {
        loop {
            for pid in ended_engines() {
                let _: Result<_, Errno> = waitpid(pid, Some(WaitPidFlag::WNOHANG));
            }
            std::thread::sleep(EVERY);
        }
    };
    std::thread::Builder::new().name("orphans".into()).spawn(reap).context("start a thread")?;
    Ok(())
}

fn ended_engines() -> Vec<Pid> {
    let own = std::process::id().to_string();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| is_ended_engine_of(&own, &stat))
    })
    .map(Pid::from_raw)
    .collect()
}

/// Of `/proc/PID/stat` (proc_pid_stat(5)): name, state and parent.
fn is_ended_engine_of(parent: &str, stat: &str) -> bool {
    let Some((before, after)) = stat.rsplit_once(") ") else { return false };
    let name = before.split_once('(').map_or("", |(_, name)| name);
    let mut fields = after.split(' ');
    name == ENGINE && fields.next() == Some("Z") && fields.next() == Some(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ended_engines_of_this_process_are_reaped() {
        for (stat, reaped) in [
            ("77 (podtether-engin) Z 1 77 77 0", true),
            ("77 (podtether-engin) S 1 77 77 0", false),
            ("77 (podtether-engin) Z 12 77 77 0", false),
            ("77 (podtether-super) Z 1 77 77 0", false),
            ("77 (podtether-engin) Z", false),
            ("", false),
        ] {
            assert_eq!(is_ended_engine_of("1", stat), reaped, "{stat}");
        }
    }
}
