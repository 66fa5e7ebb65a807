//! The supervisor's own log: one line per event, as JSON or for people (`docs/logs.md`).
//!
//! What an engine says of itself arrives as JSON already ([`crate::output`]); its fields stand in a line
//! as they are, under `engine`, and not as text inside text.

pub mod levels;
pub mod scope;

use std::fmt;
use std::io::IsTerminal as _;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime as Timestamp};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;

use crate::cli::text::{Look, Paint, printable, utc};
use crate::recent::Keep;
use levels::Levels;
use scope::{Remember, WHOSE, Whose};

/// The field that holds a JSON object; only events with [`ENGINE_TARGET`] have it.
pub const ENGINE_FIELD: &str = "engine";
/// Target of what engines say.
pub const ENGINE_TARGET: &str = "engine";

/// How lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A JSON object each, for machines.
    Json,
    /// For people.
    Human,
}

impl Form {
    /// By its name; what a terminal or no terminal makes likely where there is none.
    #[must_use]
    pub fn of(name: Option<&str>, terminal: bool) -> Form {
        match name {
            Some("json") => Form::Json,
            Some("human") => Form::Human,
            _ if terminal => Form::Human,
            _ => Form::Json,
        }
    }
}

/// Begins to write the log to stderr. `form` names a [`Form`], `PODTETHER_LOG` says how much.
pub fn init(form: Option<&str>) {
    let stderr = std::io::stderr();
    let terminal = stderr.is_terminal();
    let filter = std::env::var("PODTETHER_LOG").ok();
    let registry =
        tracing_subscriber::registry().with(Levels::parse(filter.as_deref())).with(Remember).with(Keep);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match Form::of(form, terminal) {
        Form::Json => registry.with(lines.event_format(JsonLines)).init(),
        Form::Human => {
            let look = Look::of(terminal.then_some(0), std::env::var_os("NO_COLOR").as_deref());
            registry.with(lines.event_format(HumanLines(look))).init();
        }
    }
}

/// Formats events as JSON lines: timestamp, level, message, and whose it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut timestamp = String::new();
        Timestamp.format_time(&mut Writer::new(&mut timestamp))?;
        let said = Said::of(event, scope::innermost(context.event_scope()).as_ref());
        let level = event.metadata().level().as_str();
        write!(writer, "{{\"timestamp\":{},\"level\":\"{level}\"", text(&timestamp))?;
        write!(writer, ",\"message\":{}", text(&said.message))?;
        for (name, value) in said.whose.fields() {
            write!(writer, ",\"{name}\":{}", text(value))?;
        }
        for (name, value) in &said.fields {
            write!(writer, ",{}:{value}", text(name))?;
        }
        if !said.engine.is_empty() {
            write!(writer, ",\"{ENGINE_FIELD}\":{}", Value::Object(said.engine))?;
        }
        writeln!(writer, ",\"target\":{}}}", text(event.metadata().target()))
    }
}

fn text(value: &str) -> Value {
    Value::String(value.to_owned())
}

/// Formats events as [`human`] lines.
#[derive(Debug, Clone, Copy)]
pub struct HumanLines(Look);

impl<S, N> FormatEvent<S, N> for HumanLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let said = Said::of(event, scope::innermost(context.event_scope()).as_ref());
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        let (namespace, pod) = said.whose.pod();
        let mut whose = vec![from(event).to_owned()];
        if !pod.is_empty() {
            whose.push(if namespace.is_empty() { pod.to_owned() } else { format!("{namespace}/{pod}") });
        }
        if !said.whose.join().is_empty() {
            whose.push(said.whose.join().to_owned());
        }
        let fields: Map<String, Value> = said
            .fields
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .chain(said.engine)
            .collect();
        let level = event.metadata().level().as_str();
        writer.write_str(&human(unix_ms, level, &whose.join(" "), &said.message, &fields, self.0))
    }
}

/// Which program said it.
pub(crate) fn from(event: &Event<'_>) -> &'static str {
    if event.metadata().target() == ENGINE_TARGET { "engine" } else { "supervisor" }
}

/// A line for a person: when, how grave, whose, what. It is as long as it is, and has no control characters.
#[must_use]
pub fn human(
    unix_ms: u64,
    level: &str,
    whose: &str,
    message: &str,
    fields: &Map<String, Value>,
    look: Look,
) -> String {
    let paint = match level {
        "ERROR" => Paint::Bad,
        "WARN" => Paint::Warn,
        _ => Paint::Plain,
    };
    let level = look.paint(paint, &format!("{:5}", printable(level)));
    let at = format!("{}.{:03}", utc(unix_ms / 1000), unix_ms % 1000);
    let (whose, message) = (printable(whose), printable(message));
    format!("{at} {level} {whose:10} {message}{}\n", self::fields(fields))
}

/// ` name=value` of each, without control characters.
#[must_use]
pub(crate) fn fields(fields: &Map<String, Value>) -> String {
    use fmt::Write as _;
    let mut text = String::new();
    for (name, value) in fields {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        // Writing to a String cannot fail.
        let _ = write!(text, " {}={}", printable(name), printable(&value));
    }
    text
}

/// What an event says.
#[derive(Debug, Default)]
pub(crate) struct Said {
    pub(crate) message: String,
    pub(crate) whose: Whose,
    /// In the order in which they were given.
    pub(crate) fields: Vec<(&'static str, Value)>,
    /// What an engine said besides.
    pub(crate) engine: Map<String, Value>,
}

impl Said {
    /// By an event in a span that is `span`'s.
    pub(crate) fn of(event: &Event<'_>, span: Option<&Whose>) -> Said {
        let nested = event.metadata().target() == ENGINE_TARGET;
        let mut fields = Fields { said: Said::default(), own: Default::default(), nested };
        event.record(&mut fields);
        Said { whose: Whose::or(fields.own, span), ..fields.said }
    }
}

struct Fields {
    said: Said,
    /// What the event itself says of whose it is.
    own: [Option<String>; 4],
    nested: bool,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        self.said.fields.push((field.name(), value));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let value = format!("{value:?}");
        if field.name() == "message" {
            self.said.message = value;
        } else {
            self.put(field, Value::String(value));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.said.message),
            ENGINE_FIELD if self.nested => {
                if let Ok(Value::Object(object)) = serde_json::from_str(value) {
                    self.said.engine = object;
                }
            }
            name => match WHOSE.iter().position(|whose| *whose == name) {
                Some(at) => self.own[at] = Some(value.to_owned()),
                None => self.put(field, text(value)),
            },
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}

#[cfg(test)]
mod tests;
