//! The supervisor's own log: one JSON object per line.
//!
//! What an engine says of itself arrives as JSON already ([`crate::output`]); its fields stand in a line
//! as they are, under `engine`, and not as text inside text.

use std::fmt;

use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The field that holds a JSON object; only events with [`ENGINE_TARGET`] have it.
pub const ENGINE_FIELD: &str = "engine";
/// Target of what engines say.
pub const ENGINE_TARGET: &str = "engine";

/// Formats events as JSON lines: timestamp, level and message first.
#[derive(Debug, Clone, Copy, Default)]
pub struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut timestamp = String::new();
        SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
        let target = event.metadata().target();
        let mut fields = Fields { nested: target == ENGINE_TARGET, ..Fields::default() };
        event.record(&mut fields);
        let level = event.metadata().level().as_str();
        write!(writer, "{{\"timestamp\":{},\"level\":\"{level}\"", text(&timestamp))?;
        write!(writer, ",\"message\":{}{}", text(&fields.message), fields.rest)?;
        writeln!(writer, ",\"target\":{}}}", text(target))
    }
}

fn text(value: &str) -> Value {
    Value::String(value.to_owned())
}

#[derive(Default)]
struct Fields {
    nested: bool,
    message: String,
    /// Each with a comma before it.
    rest: String,
}

impl Fields {
    fn put(&mut self, field: &Field, value: &Value) {
        use fmt::Write;
        // Writing to a String cannot fail.
        let _ = write!(self.rest, ",{}:{value}", text(field.name()));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let value = format!("{value:?}");
        if field.name() == "message" {
            self.message = value;
        } else {
            self.put(field, &Value::String(value));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            ENGINE_FIELD if self.nested => {
                if let Ok(object @ Value::Object(_)) = serde_json::from_str(value) {
                    self.put(field, &object);
                }
            }
            _ => self.put(field, &text(value)),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, &value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, &value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, &value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, &value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_json_and_an_engines_fields_are_nested() {
        let kept = Kept::default();
        let writer = kept.clone();
        let subscriber =
            tracing_subscriber::fmt().event_format(JsonLines).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(pid = 7_u32, up = true, addresses = ?["a"], "said \"{}\"\n", "so");
            tracing::warn!(target: "engine", pod = "web", engine = r#"{"region":9,"why":"gone"}"#, "lost");
            tracing::warn!(target: "engine", engine = "", "plain");
            tracing::info!(engine = "{}", "our own field of that name");
        });
        let bytes = kept.0.lock().unwrap().clone();
        let lines: Vec<Value> = String::from_utf8(bytes)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[0]["message"], "said \"so\"\n");
        assert_eq!((&lines[0]["pid"], &lines[0]["up"]), (&Value::from(7), &Value::from(true)));
        assert_eq!((&lines[0]["level"], &lines[0]["addresses"]), (&"INFO".into(), &"[\"a\"]".into()));
        assert_eq!(lines[1]["engine"]["region"], 9);
        assert_eq!((&lines[1]["target"], &lines[1]["pod"]), (&"engine".into(), &"web".into()));
        assert_eq!(lines[2].get("engine"), None);
        assert_eq!(lines[3]["engine"], "{}");
    }
}
