//! An engine's output, line by line, into this process's structured log.
//!
//! Engines write JSON lines. Whatever else they write (a panic, a linker's complaint) is passed on as
//! text. Lines are bounded, control characters do not reach the log, and a line that is not ours cannot
//! pretend to be another pod's: namespace and pod come from the supervisor.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use podtether_proto::engine::PodRef;
use serde_json::Value;
use tokio::net::unix::pipe;
use tokio::process::Child;
use tokio_process_stream::{Item, ProcessChunkStream};
use tokio_util::io::ReaderStream;
use tracing::Level;

use crate::distrust::Pace;
use crate::log::scope::WHOSE;
use crate::spawn::Process;

/// Longest line that is kept; the rest of it is dropped.
const MAX_LINE: usize = 4096;
/// Lines of one engine: a burst, when it starts or panics, and ten a second.
const LINE_EVERY: Duration = Duration::from_millis(100);
const LINE_BURST: u32 = 2000;
/// Lines that are missing are told of so often.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// Reads the output of `child` to its end and reaps it.
pub async fn relay(child: Child, pod: PodRef, process: Arc<Process>) {
    let pid = process.pid();
    let mut stream = ProcessChunkStream::from(child);
    let mut reader = Reader::new(pod, pid);
    while let Some(item) = stream.next().await {
        match item {
            Item::Stdout(chunk) => reader.push(OUT, &chunk),
            Item::Stderr(chunk) => reader.push(ERR, &chunk),
            Item::Done(Ok(status)) => process.reaped(status),
            Item::Done(Err(error)) => tracing::warn!(pid, %error, "an engine could not be reaped"),
        }
    }
    reader.finish();
}

/// Reads the output of an engine that is not this process's child, to its end.
pub async fn relay_adopted(output: [pipe::Receiver; 2], pod: PodRef, pid: u32) {
    let [out, err] = output.map(ReaderStream::new);
    let (out, err) = (out.map(|chunk| (OUT, chunk)), err.map(|chunk| (ERR, chunk)));
    let mut both = futures_util::stream::select(out, err);
    let mut reader = Reader::new(pod, pid);
    while let Some((from, chunk)) = both.next().await {
        match chunk {
            Ok(chunk) => reader.push(from, &chunk),
            Err(error) => tracing::warn!(pid, %error, "an engine's output cannot be read"),
        }
    }
    reader.finish();
}

const OUT: usize = 0;
const ERR: usize = 1;

/// What one engine writes, on its way into the log.
struct Reader {
    pod: PodRef,
    pid: u32,
    lines: [Lines; 2],
    quota: Quota,
}

impl Reader {
    fn new(pod: PodRef, pid: u32) -> Self {
        Self { pod, pid, lines: Default::default(), quota: Quota::new() }
    }

    fn push(&mut self, from: usize, chunk: &[u8]) {
        let Self { pod, pid, lines, quota } = self;
        let now = Instant::now();
        if let Some(missing) = quota.due(now) {
            let (namespace, name) = (&pod.namespace, &pod.name);
            tracing::warn!(
                namespace,
                pod = name,
                pid,
                missing,
                "the engine writes too much; lines are missing"
            );
        }
        lines[from].push(chunk, |line| quota.pass(now, || log(line, pod, *pid)));
    }

    fn finish(mut self) {
        for lines in &mut self.lines {
            lines.finish(|line| log(line, &self.pod, self.pid));
        }
    }
}

/// How many lines of one engine go into the log.
#[derive(Debug)]
struct Quota {
    pace: Pace,
    missing: u64,
    told: Option<Instant>,
}

impl Quota {
    fn new() -> Self {
        Self { pace: Pace::new(LINE_EVERY, LINE_BURST), missing: 0, told: None }
    }

    fn pass(&mut self, now: Instant, line: impl FnOnce()) {
        if self.pace.take(now) {
            line();
        } else {
            self.missing += 1;
        }
    }

    /// Lines that were left out since this was last told, at most once a minute.
    fn due(&mut self, now: Instant) -> Option<u64> {
        let due = self.missing > 0 && self.told.is_none_or(|at| now.duration_since(at) >= TOLD_EVERY);
        due.then(|| {
            self.told = Some(now);
            std::mem::take(&mut self.missing)
        })
    }
}

/// Cuts a byte stream into bounded lines.
#[derive(Debug, Default)]
struct Lines {
    line: Vec<u8>,
}

impl Lines {
    fn push(&mut self, chunk: &[u8], mut each: impl FnMut(&[u8])) {
        for (n, part) in chunk.split(|b| *b == b'\n').enumerate() {
            if n > 0 {
                each(&self.line);
                self.line.clear();
            }
            let room = MAX_LINE - self.line.len();
            self.line.extend_from_slice(&part[..part.len().min(room)]);
        }
    }

    fn finish(&mut self, mut each: impl FnMut(&[u8])) {
        if !self.line.is_empty() {
            each(&self.line);
            self.line.clear();
        }
    }
}

/// A line, understood as far as it goes.
#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    level: Level,
    message: String,
    fields: String,
}

fn parse(line: &[u8]) -> Option<Parsed> {
    let text = String::from_utf8_lossy(line);
    let text = text.trim();
    if text.is_empty() {
        return None;
    }
    let Ok(Value::Object(mut object)) = serde_json::from_str(text) else {
        return Some(Parsed { level: Level::WARN, message: printable(text), fields: String::new() });
    };
    let level = match object.remove("level").as_ref().and_then(Value::as_str) {
        Some("ERROR") => Level::ERROR,
        Some("WARN") => Level::WARN,
        Some("DEBUG") => Level::DEBUG,
        Some("TRACE") => Level::TRACE,
        Some(_) | None => Level::INFO,
    };
    object.remove("timestamp");
    let mut fields = match object.remove("fields") {
        Some(Value::Object(inner)) => inner,
        _ => object,
    };
    let message = match fields.remove("message") {
        Some(Value::String(message)) => printable(&message),
        _ => String::new(),
    };
    // What the supervisor adds itself, the engine does not get to say.
    for own in WHOSE.into_iter().chain(["uid"]) {
        fields.remove(own);
    }
    let fields =
        if fields.is_empty() { String::new() } else { printable(&Value::Object(fields).to_string()) };
    Some(Parsed { level, message, fields })
}

fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn log(line: &[u8], pod: &PodRef, pid: u32) {
    let Some(Parsed { level, message, fields }) = parse(line) else { return };
    macro_rules! event {
        ($level:expr) => {
            tracing::event!(
                target: "engine", $level, namespace = pod.namespace, pod = pod.name, pid, engine = fields, "{message}"
            )
        };
    }
    match level {
        Level::ERROR => event!(Level::ERROR),
        Level::WARN => event!(Level::WARN),
        Level::INFO => event!(Level::INFO),
        Level::DEBUG => event!(Level::DEBUG),
        Level::TRACE => event!(Level::TRACE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(chunks: &[&[u8]]) -> Vec<String> {
        let mut all = Vec::new();
        let mut lines = Lines::default();
        let mut keep = |l: &[u8]| all.push(String::from_utf8_lossy(l).into_owned());
        for chunk in chunks {
            lines.push(chunk, &mut keep);
        }
        lines.finish(&mut keep);
        all
    }

    #[test]
    fn lines_survive_any_cut_and_are_bounded() {
        assert_eq!(lines(&[b"a\nb", b"c\n", b"\nd"]), ["a", "bc", "", "d"]);
        let long = vec![b'x'; MAX_LINE * 3];
        let got = lines(&[&long, &long, b"\nnext\n"]);
        assert_eq!((got[0].len(), got[1].as_str()), (MAX_LINE, "next"));
    }

    #[test]
    fn json_and_text() {
        let json = br#"{"timestamp":"t","level":"WARN","fields":{"message":"derp lost","region":9,"pod":"forged"},"target":"x"}"#;
        assert_eq!(
            parse(json),
            Some(Parsed {
                level: Level::WARN,
                message: "derp lost".into(),
                fields: r#"{"region":9}"#.into()
            })
        );
        let text = parse(b"thread 'main' panicked\x1b[31m").unwrap();
        assert_eq!((text.level, text.message.as_str()), (Level::WARN, "thread 'main' panicked [31m"));
        assert_eq!(parse(b"  "), None);
    }

    #[test]
    fn an_engine_that_writes_without_end_gets_a_burst_and_ten_lines_a_second() {
        let start = Instant::now();
        let (mut quota, mut written, mut told) = (Quota::new(), 0_u64, Vec::new());
        for second in 0..120 {
            for n in 0..1000 {
                let now = start + Duration::from_secs(second) + Duration::from_millis(n);
                told.extend(quota.due(now));
                quota.pass(now, || written += 1);
            }
        }
        assert!((3_100..=3_210).contains(&written), "{written}");
        assert!(told.len() <= 3 && told.iter().sum::<u64>() > 50_000, "{told:?}");
    }

    proptest! {
        #[test]
        fn fuzz_any_output_is_harmless(line in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some(parsed) = parse(&line) {
                prop_assert!(!parsed.message.chars().any(char::is_control));
                prop_assert!(!parsed.fields.chars().any(char::is_control));
            }
        }
    }
}
