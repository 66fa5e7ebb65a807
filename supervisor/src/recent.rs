//! What was logged of each pod lately, so that a person can ask for it where the log is far away.
//!
//! A layer beside the one that writes the log keeps every line that names a namespace and a pod: the
//! supervisor's own and those of the pod's engines. Both are bounded already ([`crate::output`]); here is
//! room for [`MAX_LINES`] lines a pod, and when the whole is full, the pod whose last line is the oldest goes.

use std::collections::{HashMap, VecDeque};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use podtether_proto::node::LogLine;
use serde_json::{Map, Value};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

use crate::log::{self, Said, scope};

/// Lines of one pod.
const MAX_LINES: usize = 200;
/// Bytes of one line; the rest is cut off.
const MAX_LINE: usize = 2048;
/// Bytes of all pods.
const MAX_BYTES: usize = 8 << 20;
/// Bytes of lines in one answer.
const PAGE_BYTES: usize = 256 << 10;

static RECENT: LazyLock<Recent> = LazyLock::new(Recent::default);

/// This process's.
pub fn recent() -> &'static Recent {
    &RECENT
}

/// A line, and of which pod it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The line.
    pub line: LogLine,
}

/// The last lines of every pod.
#[derive(Debug, Default)]
pub struct Recent(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    pods: HashMap<(String, String), VecDeque<LogLine>>,
    bytes: usize,
    seq: u64,
}

fn size(line: &LogLine) -> usize {
    line.message.len() + line.fields.len() + line.from.len() + line.join.len() + size_of::<LogLine>()
}

impl Recent {
    /// Lines of a pod after number `after`, oldest first, as many as fit into an answer.
    #[must_use]
    pub fn after(&self, namespace: &str, pod: &str, after: u64) -> Vec<LogLine> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lines) = kept.pods.get(&(namespace.to_owned(), pod.to_owned())) else { return Vec::new() };
        let mut bytes = 0;
        let newer = lines.iter().filter(|line| line.seq > after);
        newer
            .take_while(|line| {
                bytes += size(line);
                bytes <= PAGE_BYTES
            })
            .cloned()
            .collect()
    }

    /// The last lines of all pods, at most so many, the latest first; nothing finer than `INFO`.
    #[must_use]
    pub fn latest(&self, most: usize) -> Vec<Told> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let coarse = |line: &&LogLine| matches!(line.level.as_str(), "INFO" | "WARN" | "ERROR");
        let mut all: Vec<(&(String, String), &LogLine)> = Vec::new();
        for (whose, lines) in &kept.pods {
            all.extend(lines.iter().rev().filter(coarse).take(most).map(|line| (whose, line)));
        }
        all.sort_by_key(|(_, line)| std::cmp::Reverse(line.seq));
        all.truncate(most);
        let told = |((namespace, pod), line): (&(String, String), &LogLine)| Told {
            namespace: namespace.clone(),
            pod: pod.clone(),
            line: line.clone(),
        };
        all.into_iter().map(told).collect()
    }

    fn push(&self, namespace: String, pod: String, mut line: LogLine) {
        for text in [&mut line.message, &mut line.fields] {
            if text.len() > MAX_LINE {
                text.truncate(text.floor_char_boundary(MAX_LINE));
            }
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.seq += 1;
        line.seq = kept.seq;
        kept.bytes += size(&line);
        let lines = kept.pods.entry((namespace, pod)).or_default();
        lines.push_back(line);
        let gone = if lines.len() > MAX_LINES { lines.pop_front() } else { None };
        kept.bytes -= gone.as_ref().map_or(0, size);
        while kept.bytes > MAX_BYTES {
            let oldest = kept.pods.iter().min_by_key(|(_, lines)| lines.back().map_or(0, |line| line.seq));
            let Some(oldest) = oldest.map(|(pod, _)| pod.clone()) else { return };
            let gone = kept.pods.remove(&oldest).unwrap_or_default();
            kept.bytes -= gone.iter().map(size).sum::<usize>();
        }
    }
}

/// Puts lines into [`recent`].
#[derive(Debug, Clone, Copy)]
pub struct Keep;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Keep {
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let said = Said::of(event, scope::innermost(context.event_scope(event)).as_ref());
        let (namespace, pod) = said.whose.pod();
        if namespace.is_empty() || pod.is_empty() {
            return;
        }
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let own = said.fields.into_iter().map(|(name, value)| (name.to_owned(), value));
        let fields: Map<String, Value> = own.chain(said.engine).collect();
        let line = LogLine {
            seq: 0,
            unix_ms: u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX),
            level: event.metadata().level().as_str().to_owned(),
            from: log::from(event).to_owned(),
            message: said.message,
            fields: if fields.is_empty() { String::new() } else { Value::Object(fields).to_string() },
            join: said.whose.join().to_owned(),
        };
        recent().push(namespace.to_owned(), pod.to_owned(), line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podtether_proto::engine::PodRef;
    use tracing_subscriber::prelude::*;

    #[test]
    fn lines_that_name_a_pod_are_kept_and_found_by_it() {
        let registry = tracing_subscriber::registry().with(scope::Remember).with(Keep);
        tracing::subscriber::with_default(registry, || {
            tracing::info!(namespace = "shop", pod = "recent-1", pid = 7_u32, "engine started");
            tracing::warn!(target: "engine", namespace = "shop", pod = "recent-1", engine = r#"{"region":9}"#, "lost");
            tracing::info!(pod = "recent-1", "nobody knows whose");
            let pod = PodRef { uid: String::new(), namespace: "shop".into(), name: "recent-1".into() };
            scope::of(&pod, "c", "4c1f").in_scope(|| tracing::info!("in its span"));
        });
        let lines = recent().after("shop", "recent-1", 0);
        let told: Vec<_> =
            lines.iter().map(|l| (l.from.as_str(), l.level.as_str(), l.message.as_str())).collect();
        assert_eq!(
            told,
            [
                ("supervisor", "INFO", "engine started"),
                ("engine", "WARN", "lost"),
                ("supervisor", "INFO", "in its span")
            ]
        );
        assert_eq!(lines.iter().map(|l| l.join.as_str()).collect::<Vec<_>>(), ["", "", "4c1f"]);
        assert_eq!((lines[0].fields.as_str(), lines[1].fields.as_str()), (r#"{"pid":7}"#, r#"{"region":9}"#));
        assert_eq!(recent().after("shop", "recent-1", lines[0].seq), lines[1..]);
        assert_eq!(recent().after("other", "recent-1", 0), []);
    }

    #[test]
    fn a_pod_has_so_many_lines_and_all_together_so_many_bytes() {
        let recent = Recent::default();
        let line = |message: &str| LogLine {
            seq: 0,
            unix_ms: 0,
            level: "INFO".into(),
            from: "engine".into(),
            message: message.to_owned(),
            fields: String::new(),
            join: String::new(),
        };
        for n in 0..MAX_LINES + 10 {
            recent.push("a".into(), "b".into(), line(&n.to_string()));
        }
        let kept = recent.after("a", "b", 0);
        assert_eq!((kept.len(), kept[0].message.as_str()), (MAX_LINES, "10"));
        recent.push("c".into(), "d".into(), line("last"));
        recent.push("c".into(), "d".into(), LogLine { level: "DEBUG".into(), ..line("fine") });
        let latest = recent.latest(3);
        assert_eq!(
            latest.iter().map(|told| (told.pod.as_str(), told.line.message.as_str())).collect::<Vec<_>>(),
            [("d", "last"), ("b", "209"), ("b", "208")]
        );
        let long = "ü".repeat(MAX_LINE);
        for pod in 0..40 {
            for _ in 0..MAX_LINES {
                recent.push("a".into(), pod.to_string(), line(&long));
            }
        }
        assert!(recent.0.lock().unwrap().bytes <= MAX_BYTES);
        assert_eq!(recent.after("a", "b", 0), [], "the pod that was silent longest made room");
        let last = recent.after("a", "39", 0);
        assert!(!last.is_empty() && last[0].message.len() <= MAX_LINE);
        assert!(last.iter().map(size).sum::<usize>() <= PAGE_BYTES);
    }
}
