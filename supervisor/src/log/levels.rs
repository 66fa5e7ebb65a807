//! What is logged: by the filter that the process was started with, and of single pods for a while otherwise.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use podtether_proto::log::{LogFor, LogLevel};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

use super::ENGINE_TARGET;
use super::scope::{self, Whose};

/// tarpc warns of every connection that an engine's death breaks; the table reports the death itself. kube_client
/// tells of every failed call, at times with the whole answer; who made the call does so once a minute.
const QUIET: &str = "tarpc=error,kube_client=off";
const DEFAULT: &str = "info";
/// The longest that a pod has a level of its own.
pub const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// How the targets of our own lines begin.
const OURS: &str = "podtether";

static PODS: LazyLock<Pods> = LazyLock::new(Pods::default);

/// Levels of single pods, in this process.
pub fn pods() -> &'static Pods {
    &PODS
}

/// See the module.
#[derive(Debug, Default)]
pub struct Pods {
    levels: Mutex<HashMap<(String, String), (LogLevel, Instant)>>,
    /// How many there are, so that nobody waits for the lock where there are none.
    count: AtomicUsize,
}

impl Pods {
    /// Gives a pod a level of its own for a while, at most [`LONGEST`], or takes it back.
    pub fn set(&self, namespace: &str, pod: &str, wish: Option<LogFor>, now: Instant) {
        let mut levels = self.levels.lock().unwrap_or_else(PoisonError::into_inner);
        levels.retain(|_, (_, until)| now < *until);
        let key = (namespace.to_owned(), pod.to_owned());
        match wish {
            Some(wish) => levels.insert(key, (wish.level, now + Duration::from_millis(wish.ms).min(LONGEST))),
            None => levels.remove(&key),
        };
        self.count.store(levels.len(), Ordering::Relaxed);
    }

    /// The level of a pod's own, and for how long still.
    pub fn get(&self, namespace: &str, pod: &str, now: Instant) -> Option<LogFor> {
        if self.count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let levels = self.levels.lock().unwrap_or_else(PoisonError::into_inner);
        let (level, until) = levels.get(&(namespace.to_owned(), pod.to_owned()))?;
        let left = until.checked_duration_since(now).filter(|left| !left.is_zero())?;
        Some(LogFor { level: *level, ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1) })
    }
}

/// The filter, as a layer.
#[derive(Debug)]
pub struct Levels(Targets);

impl Levels {
    /// As `PODTETHER_LOG` has it: `level` or `target=level`, with commas between. What is neither is the default.
    #[must_use]
    pub fn parse(text: Option<&str>) -> Levels {
        let parse = |asked: &str| format!("{QUIET},{asked}").parse::<Targets>().ok();
        Levels(text.and_then(parse).or_else(|| parse(DEFAULT)).unwrap_or_default())
    }

    /// Whether lines of this target are about pods and may have another level for one.
    fn is_of_pods(metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && (metadata.target() == ENGINE_TARGET || metadata.target().starts_with(OURS))
    }
}

fn level(level: LogLevel) -> Level {
    match level {
        LogLevel::Error => Level::ERROR,
        LogLevel::Warn => Level::WARN,
        LogLevel::Info => Level::INFO,
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Trace => Level::TRACE,
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Levels {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if Self::is_of_pods(metadata) {
            Interest::sometimes()
        } else if scope::is_ours(metadata) || self.0.would_enable(metadata.target(), metadata.level()) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>, context: Context<'_, S>) -> bool {
        if scope::is_ours(metadata) {
            return true;
        }
        if Self::is_of_pods(metadata) && pods().count.load(Ordering::Relaxed) > 0 {
            let whose = context.lookup_current().and_then(|span| scope::innermost(Some(span.scope())));
            let own = whose.as_ref().map(Whose::pod).and_then(|(n, p)| pods().get(n, p, Instant::now()));
            if let Some(own) = own {
                return *metadata.level() <= level(own.level);
            }
        }
        self.0.would_enable(metadata.target(), metadata.level())
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::TRACE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_level_is_its_own_and_ends_by_itself() {
        let pods = Pods::default();
        let now = Instant::now();
        let debug = LogFor { level: LogLevel::Debug, ms: 60_000 };
        assert_eq!(pods.get("a", "b", now), None);
        pods.set("a", "b", Some(debug), now);
        assert_eq!(pods.get("a", "b", now), Some(debug));
        assert_eq!(pods.get("a", "c", now), None);
        assert_eq!(pods.get("a", "b", now + Duration::from_secs(59)), Some(LogFor { ms: 1000, ..debug }));
        assert_eq!(pods.get("a", "b", now + Duration::from_secs(60)), None);
        pods.set("a", "c", Some(LogFor { ms: u64::MAX, ..debug }), now + Duration::from_secs(61));
        assert_eq!(pods.count.load(Ordering::Relaxed), 1, "what is over is forgotten");
        assert_eq!(pods.get("a", "c", now + Duration::from_secs(61) + LONGEST), None);
        pods.set("a", "c", None, now);
        assert_eq!((pods.get("a", "c", now), pods.count.load(Ordering::Relaxed)), (None, 0));
    }

    #[test]
    fn a_filter_that_makes_no_sense_is_the_default() {
        for text in [None, Some("loud=very"), Some("a=b=c")] {
            let levels = Levels::parse(text);
            assert!(levels.0.would_enable("podtether_supervisor::table", &Level::INFO), "{text:?}");
            assert!(!levels.0.would_enable("podtether_supervisor::table", &Level::DEBUG), "{text:?}");
            assert!(!levels.0.would_enable("tarpc::client", &Level::WARN), "{text:?}");
        }
        assert!(
            Levels::parse(Some("warn,podtether_supervisor=trace"))
                .0
                .would_enable("podtether_supervisor::table", &Level::TRACE)
        );
    }
}
