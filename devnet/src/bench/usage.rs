//! What a process has used, from `/proc`.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// Processor time of all threads there are, in the kernel and outside: what is done for the process in
/// interrupts while it runs included.
///
/// # Errors
/// When there is no such process.
pub fn cpu(pid: u32) -> Result<Duration> {
    let each = threads(pid, "schedstat")?;
    Ok(each.iter().filter_map(|text| running_ns(text)).map(Duration::from_nanos).sum())
}

/// Times that any of its threads gave the processor away by itself.
///
/// # Errors
/// When there is no such process.
pub fn wakes(pid: u32) -> Result<u64> {
    let each = threads(pid, "status")?;
    Ok(each.iter().filter_map(|text| field(text, "voluntary_ctxt_switches:")).sum())
}

/// Anonymous memory in KiB.
///
/// # Errors
/// When there is no such process.
pub fn rss_anon_kib(pid: u32) -> Result<u64> {
    let status = read(pid, "status")?;
    field(&status, "RssAnon:").with_context(|| format!("process {pid} has no RssAnon"))
}

/// Memory in KiB, of shared pages this process's share.
///
/// # Errors
/// When there is no such process, or it may not be looked at.
pub fn pss_kib(pid: u32) -> Result<u64> {
    let rollup = read(pid, "smaps_rollup")?;
    field(&rollup, "Pss:").with_context(|| format!("process {pid} has no Pss"))
}

fn read(pid: u32, file: &str) -> Result<String> {
    let path = PathBuf::from(format!("/proc/{pid}/{file}"));
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// A file of each thread; one that ends meanwhile is left out.
fn threads(pid: u32, file: &str) -> Result<Vec<String>> {
    let dir = format!("/proc/{pid}/task");
    let tasks = fs::read_dir(&dir).with_context(|| format!("read {dir}"))?;
    Ok(tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join(file)).ok()).collect())
}

/// Of `/proc/PID/task/TID/schedstat`.
fn running_ns(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().next()?.parse().ok()
}

/// The number behind `name` in a file of such lines.
fn field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_read() {
        let status = "Name:\tx\nRssAnon:\t    1234 kB\nvoluntary_ctxt_switches:\t17\n";
        assert_eq!(field(status, "RssAnon:"), Some(1234));
        assert_eq!(field(status, "voluntary_ctxt_switches:"), Some(17));
        assert_eq!(field(status, "Pss:"), None);
        assert_eq!(running_ns("123456 7 8\n"), Some(123_456));
        assert_eq!(running_ns(""), None);
    }

    #[test]
    fn this_process_uses_something() {
        let own = std::process::id();
        let before = cpu(own).unwrap();
        let mut sum = 0_u64;
        while cpu(own).unwrap() == before {
            sum = sum.wrapping_add(wakes(own).unwrap());
        }
        assert!(rss_anon_kib(own).unwrap() > 0 && pss_kib(own).unwrap() > 0, "{sum}");
        assert!(cpu(0).is_err());
    }
}
