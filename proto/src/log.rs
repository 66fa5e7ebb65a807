//! What the lines of a log have in common wherever they come from.

use serde::{Deserialize, Serialize};

/// How much is logged: a level and all that are graver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Something is lost or stands still.
    Error,
    /// Something is wrong and is tried again, or refused.
    Warn,
    /// What becomes of pods and links.
    Info,
    /// Each step on the way.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// From the gravest on.
    pub const ALL: [Self; 5] = [Self::Error, Self::Warn, Self::Info, Self::Debug, Self::Trace];

    /// As it is typed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// A level for a while; then the default is in force again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogFor {
    /// The level.
    pub level: LogLevel,
    /// For how long, milliseconds.
    pub ms: u64,
}

/// Longest id of a join.
const MAX_JOIN: usize = 32;

/// True for what may be the id of a join: the one that the plugin gives a CNI ADD, and that every line about the
/// attachment has from then on, in whichever program.
#[must_use]
pub fn is_join(id: &str) -> bool {
    (1..=MAX_JOIN).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// Seconds since the epoch as `2026-11-22 04:05:06` UTC.
#[must_use]
pub fn utc(unix_s: u64) -> String {
    let (days, s) = (unix_s / 86_400, unix_s % 86_400);
    // Days to a date as in Howard Hinnant's "chrono-compatible low-level date algorithms".
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02}", s / 3600, s % 3600 / 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let dates = [0, 951_782_400, 1_795_314_786].map(utc);
        assert_eq!(dates, ["1970-01-01 00:00:00", "2000-02-29 00:00:00", "2026-11-22 02:33:06"]);
    }

    #[test]
    fn levels_are_written_as_they_are_typed() {
        for level in LogLevel::ALL {
            assert_eq!(serde_json::to_value(level).unwrap(), level.name());
        }
        assert!(LogLevel::ALL.is_sorted());
    }

    #[test]
    fn a_join_is_a_short_word() {
        assert!(is_join("4c1f09d2ab31"));
        for bad in ["", "a b", "a\n", "ä", &"a".repeat(33)] {
            assert!(!is_join(bad), "{bad}");
        }
    }
}
