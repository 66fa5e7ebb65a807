//! What the plugin tells its runtime's log: a line per event on stderr, in the fields of `docs/logs.md`.
//!
//! A call that fails says why on stdout, as the specification has it; by default only what a successful
//! call has to say of itself is told here. `PODTETHER_LOG=debug` in the runtime's environment tells each step.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use podtether_proto::log::{LogLevel, utc};
use serde_json::{Map, Value};

use crate::env::Lookup;

const TARGET: &str = "podtether_cni";

/// Lines of one call, until the process ends and prints them.
#[derive(Debug)]
pub(crate) struct Log {
    most: LogLevel,
    human: bool,
    whose: Vec<(&'static str, String)>,
    lines: String,
}

impl Log {
    /// As the environment has it.
    pub(crate) fn new(lookup: Lookup<'_>) -> Self {
        Self {
            most: lookup("PODTETHER_LOG").map_or(LogLevel::Warn, |filter| most(&filter)),
            human: lookup("PODTETHER_LOG_FORMAT").is_some_and(|form| form == "human"),
            whose: Vec::new(),
            lines: String::new(),
        }
    }

    /// Every later line says this.
    pub(crate) fn name(&mut self, field: &'static str, value: &str) {
        self.whose.push((field, value.to_owned()));
    }

    /// Adds a line, where that much is told.
    pub(crate) fn say(&mut self, level: LogLevel, message: &str, fields: &[(&str, Value)]) {
        if level > self.most {
            return;
        }
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (at, ms) = (utc(since_epoch.as_secs()), since_epoch.subsec_millis());
        let level = level.name().to_uppercase();
        // Writing to a String cannot fail.
        if self.human {
            let whose: Vec<&str> = self.whose.iter().map(|(_, value)| value.as_str()).collect();
            let _ = write!(self.lines, "{at}.{ms:03} {level:5} podtether-cni {} {message}", whose.join(" "));
            for (name, value) in fields {
                let _ = write!(self.lines, " {name}={value}");
            }
            self.lines.push('\n');
            return;
        }
        let mut line = Map::new();
        let mut put = |name: &str, value: Value| line.insert(name.to_owned(), value);
        put("timestamp", format!("{}.{ms:03}Z", at.replace(' ', "T")).into());
        put("level", level.into());
        put("message", message.into());
        put("target", TARGET.into());
        for (name, value) in &self.whose {
            put(name, value.as_str().into());
        }
        for (name, value) in fields {
            put(name, value.clone());
        }
        let _ = writeln!(self.lines, "{}", Value::Object(line));
    }

    pub(crate) fn into_lines(self) -> String {
        self.lines
    }
}

/// How much `filter` lets through of us: `level` or `target=level`, with commas between.
fn most(filter: &str) -> LogLevel {
    let mut most = None;
    for part in filter.split(',').map(str::trim) {
        let (target, level) = part.split_once('=').unwrap_or(("", part));
        let level = LogLevel::ALL.into_iter().find(|known| known.name() == level.to_lowercase());
        if target == TARGET || target.is_empty() && most.is_none() {
            most = level.or(most);
        }
    }
    most.unwrap_or(LogLevel::Warn)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(filter: &'static str, form: &'static str) -> Log {
        let mut log = Log::new(&move |name| match name {
            "PODTETHER_LOG" => Some(filter.to_owned()),
            "PODTETHER_LOG_FORMAT" => Some(form.to_owned()),
            _ => None,
        });
        log.name("pod", "web");
        log.name("join", "4c1f");
        log.say(LogLevel::Debug, "a \"b\"\n", &[("code", 7.into())]);
        log
    }

    #[test]
    fn a_line_is_json_or_for_people_and_says_whose_it_is() {
        let json: Value = serde_json::from_str(&log("debug", "").into_lines()).unwrap();
        assert_eq!((&json["message"], &json["code"]), (&"a \"b\"\n".into(), &7.into()));
        assert_eq!(
            (&json["pod"], &json["join"], &json["level"]),
            (&"web".into(), &"4c1f".into(), &"DEBUG".into())
        );
        assert!(log("debug", "human").into_lines().contains(" DEBUG podtether-cni web 4c1f a \"b\""));
    }

    #[test]
    fn the_filter_is_that_of_the_other_programs() {
        for (filter, told) in [
            ("debug", true),
            ("info", false),
            ("info,podtether_cni=trace", true),
            ("trace,podtether_cni=error", false),
            ("podtether_engine=trace", false),
            ("nonsense", false),
        ] {
            assert_eq!(!log(filter, "").into_lines().is_empty(), told, "{filter}");
        }
    }
}
