use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use podtether_proto::engine::PodRef;
use podtether_proto::log::{LogFor, LogLevel};

use super::*;

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

impl Kept {
    fn lines(&self) -> Vec<String> {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
    }

    fn json(&self) -> Vec<Value> {
        self.lines().iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// What `body` logs, by this filter and in this form.
fn logged(filter: &str, form: Form, body: impl FnOnce()) -> Kept {
    let kept = Kept::default();
    let writer = kept.clone();
    let registry = tracing_subscriber::registry().with(Levels::parse(Some(filter))).with(Remember);
    let lines = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
    match form {
        Form::Json => tracing::subscriber::with_default(registry.with(lines.event_format(JsonLines)), body),
        Form::Human => {
            let lines = lines.event_format(HumanLines(Look::PLAIN));
            tracing::subscriber::with_default(registry.with(lines), body);
        }
    }
    kept
}

fn pod(name: &str) -> PodRef {
    PodRef { uid: "u".into(), namespace: "shop".into(), name: name.into() }
}

#[test]
fn lines_are_json_and_an_engines_fields_are_nested() {
    let kept = logged("info", Form::Json, || {
        tracing::info!(pid = 7_u32, up = true, addresses = ?["a"], "said \"{}\"\n", "so");
        tracing::warn!(target: "engine", pod = "web", engine = r#"{"region":9,"why":"gone"}"#, "lost");
        tracing::warn!(target: "engine", engine = "", "plain");
        tracing::info!(engine = "{}", "our own field of that name");
    });
    let lines = kept.json();
    assert_eq!(lines.len(), 4);
    assert_eq!(lines[0]["message"], "said \"so\"\n");
    assert_eq!((&lines[0]["pid"], &lines[0]["up"]), (&Value::from(7), &Value::from(true)));
    assert_eq!((&lines[0]["level"], &lines[0]["addresses"]), (&"INFO".into(), &"[\"a\"]".into()));
    assert_eq!(lines[1]["engine"]["region"], 9);
    assert_eq!((&lines[1]["target"], &lines[1]["pod"]), (&"engine".into(), &"web".into()));
    assert_eq!(lines[2].get("engine"), None);
    assert_eq!(lines[3]["engine"], "{}");
}

#[test]
fn a_line_in_a_pods_span_says_whose_it_is_and_one_of_another_pod_does_not_borrow() {
    let body = || {
        let span = scope::of(&pod("web"), "c1", "4c1f");
        let other = scope::of(&pod("db"), "c2", "77aa");
        let _in = span.enter();
        tracing::info!(pid = 1, "plain");
        tracing::info!(namespace = "shop", pod = "db", "named");
        other.in_scope(|| tracing::info!("inner"));
        tracing::info_span!("elsewhere").in_scope(|| tracing::info!("deep"));
    };
    let lines = logged("info", Form::Json, body).json();
    let whose = |line: &Value| WHOSE.map(|name| line[name].as_str().unwrap_or("-").to_owned()).join(" ");
    assert_eq!(
        lines.iter().map(whose).collect::<Vec<_>>(),
        ["shop web c1 4c1f", "shop db - -", "shop db c2 77aa", "shop web c1 4c1f"]
    );
    let lines = logged("info", Form::Human, body).lines();
    assert!(lines[0].ends_with(" INFO  supervisor shop/web 4c1f plain pid=1"), "{lines:?}");
    assert!(lines[1].ends_with(" INFO  supervisor shop/db named"), "{lines:?}");
    // A filter that lets errors alone through still knows whose they are.
    let strict = logged("error", Form::Json, || {
        scope::of(&pod("web"), "c1", "4c1f").in_scope(|| tracing::error!("grave"));
    });
    assert_eq!(whose(&strict.json()[0]), "shop web c1 4c1f");
}

#[test]
fn one_pods_level_is_changed_and_nobody_elses() {
    let kept = logged("info", Form::Json, || {
        let now = Instant::now();
        let set = |name: &str, level| {
            levels::pods().set("shop", name, Some(LogFor { level, ms: 3_600_000 }), now);
        };
        set("raised", LogLevel::Debug);
        set("lowered", LogLevel::Error);
        for name in ["raised", "lowered", "other"] {
            scope::of(&pod(name), "c", "j").in_scope(|| {
                tracing::warn!(name, "w");
                tracing::debug!(name, "d");
                tracing::event!(target: "engine", tracing::Level::DEBUG, name, "e");
                tracing::trace!(name, "t");
                tracing::debug!(target: "hyper", name, "h");
            });
        }
        tracing::debug!("nobody's");
        for name in ["raised", "lowered"] {
            levels::pods().set("shop", name, None, now);
        }
        scope::of(&pod("raised"), "c", "j").in_scope(|| tracing::debug!(name = "raised", "again"));
    });
    let said: Vec<_> = kept
        .json()
        .iter()
        .map(|l| format!("{} {}", l["name"].as_str().unwrap(), l["message"].as_str().unwrap()))
        .collect();
    assert_eq!(said, ["raised w", "raised d", "raised e", "other w"]);
}

#[test]
fn a_person_reads_lines_and_a_machine_json() {
    assert_eq!(Form::of(None, true), Form::Human);
    assert_eq!(Form::of(None, false), Form::Json);
    assert_eq!(Form::of(Some("human"), false), Form::Human);
    assert_eq!(Form::of(Some("json"), true), Form::Json);
    let lines = logged("info", Form::Human, || {
        tracing::warn!(target: "engine", namespace = "shop", pod = "web", engine = r#"{"region":9}"#, "derp \x1b[31mlost\nx");
    });
    assert_eq!(lines.lines().len(), 1);
    assert!(
        lines.lines()[0].ends_with(" WARN  engine shop/web derp  [31mlost x region=9"),
        "{:?}",
        lines.lines()
    );
}
