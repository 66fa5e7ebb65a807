//! What the supervisor itself takes, by the names that every Prometheus client uses.

use std::fs;

/// Value of each, where `/proc` tells it.
pub(super) fn own() -> Vec<(&'static str, String)> {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let boot = fs::read_to_string("/proc/stat").unwrap_or_default();
    let mut told = Vec::new();
    if let Some((cpu, start)) = times(&stat, &boot) {
        told.push(("process_cpu_seconds_total", cpu));
        told.push(("process_start_time_seconds", start));
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // One of them is the directory's own.
        told.push(("process_open_fds", open.count().saturating_sub(1).to_string()));
    }
    if let Some(bytes) = resident(&stat) {
        told.push(("process_resident_memory_bytes", bytes.to_string()));
    }
    told.sort_unstable();
    told
}

/// The fields of `/proc/PID/stat` from the third on: the second is a name in parentheses.
fn fields(stat: &str) -> impl Iterator<Item = u64> {
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    // A state is a letter, and some numbers are negative.
    rest.split_ascii_whitespace().map(|field| field.parse().unwrap_or_default())
}

/// Processor time, and the moment of the start since the epoch, in seconds.
fn times(stat: &str, boot: &str) -> Option<(String, String)> {
    let ticks = ticks_per_second()?;
    let at = |field: usize| fields(stat).nth(field - 3);
    let (user, system, start) = (at(14)?, at(15)?, at(22)?);
    let booted: u64 = boot.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    let seconds = |ticks_since: u64, from: u64| {
        let whole = ticks_since / ticks;
        let hundredths = (ticks_since % ticks) * 100 / ticks;
        format!("{}.{hundredths:02}", from.saturating_add(whole))
    };
    Some((seconds(user.checked_add(system)?, 0), seconds(start, booted)))
}

fn resident(stat: &str) -> Option<u64> {
    fields(stat).nth(24 - 3)?.checked_mul(u64::try_from(page_size()).ok()?)
}

fn ticks_per_second() -> Option<u64> {
    // SAFETY: asks for a number.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks).ok().filter(|ticks| *ticks > 0)
}

fn page_size() -> i64 {
    // SAFETY: asks for a number.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_parentheses_moves_no_field() {
        let mut stat = "7 (a) b) c) S 1 7 7 0 -1 4194560 9 0 0 0".to_owned();
        for field in 14..=24 {
            stat += &format!(" {}", field * 100);
        }
        let ticks = ticks_per_second().unwrap();
        let (cpu, start) = times(&stat, "cpu 1\nbtime 1000\n").unwrap();
        assert!(cpu.starts_with(&format!("{}.", 2900 / ticks)), "{cpu}");
        assert!(start.starts_with(&format!("{}.", 1000 + 2200 / ticks)), "{start}");
        assert_eq!(resident(&stat), Some(2400 * u64::try_from(page_size()).unwrap()));
        assert_eq!(times("", ""), None);
    }

    #[test]
    fn this_process_has_memory_descriptors_and_a_start() {
        let told = own();
        let value = |name: &str| -> f64 {
            told.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("{name}")).1.parse().unwrap()
        };
        assert!(value("process_resident_memory_bytes") > 1e5 && value("process_open_fds") >= 3.0);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - value("process_start_time_seconds");
        assert!((-2.0..86_400.0).contains(&age), "{age}");
        assert!(value("process_cpu_seconds_total") >= 0.0);
    }
}
