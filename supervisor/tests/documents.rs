//! What documents say is shown by a test is shown by one.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::{Path, PathBuf};

use podtether_devnet::terminal::{self, document::samples};
use podtether_supervisor::cli;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every Rust file's text below `dir`.
fn sources(dir: &Path, into: &mut String) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|end| end == "rs") {
            into.push_str(&std::fs::read_to_string(&path).unwrap());
        }
    }
}

/// What stands between backticks in the last column of each row of the tables below `heading`.
fn named(document: &str, heading: &str) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(root().join("docs").join(document)).unwrap();
    let from = text.find(heading).unwrap_or_else(|| panic!("{document} has no {heading}"));
    let rows = text[from..].lines().filter(|line| line.starts_with('|'));
    let rows = rows.filter(|line| !line.starts_with("|---")).skip(1);
    rows.map(|row| {
        let last = row.trim_end_matches('|').rsplit('|').next().unwrap();
        last.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    })
    .collect()
}

#[test]
fn tests_that_documents_name_exist() {
    let mut all = String::new();
    for dir in ["supervisor/src", "supervisor/tests", "devnet/tests", "cni/src", "cni/tests"] {
        sources(&root().join(dir), &mut all);
    }
    let mut count = 0;
    for (document, heading) in
        [("refusals.md", "# What bad input from a cluster gets"), ("choosing.md", "## Shown by")]
    {
        for names in named(document, heading) {
            assert!(!names.is_empty(), "{document}: a row names no test");
            for name in names {
                let there = if name.contains('/') {
                    root().join(&name).exists()
                } else {
                    all.contains(&format!("fn {name}("))
                };
                assert!(there, "{document} names {name}, which is not there");
                count += 1;
            }
        }
    }
    assert!(count > 40, "{count} names were found");
}

/// Every command's section of `docs/cli.md` shows it, as text and as a picture of the same, and nothing that is no
/// command is shown. The lab's `shown` compares that with what is printed.
#[test]
fn every_command_is_shown_in_a_text_and_in_a_picture_of_it() {
    let docs = root().join("docs");
    let samples = samples(&std::fs::read_to_string(docs.join("cli.md")).unwrap());
    let mut commands = vec![("refusals".to_owned(), "podtether ".to_owned())];
    for (program, prefix, whole) in
        [("podtether", "", cli::command()), ("kubectl ts", "ts-", cli::cluster::command())]
    {
        commands.extend(whole.get_subcommands().map(|command| {
            let name = command.get_name();
            (format!("{prefix}{name}"), format!("{program} {name}"))
        }));
    }
    assert!(commands.len() > 25, "{commands:?}");
    for (name, command) in &commands {
        let of_it: Vec<_> = samples.iter().filter(|sample| sample.name == *name).collect();
        let [sample] = of_it[..] else { panic!("docs/cli.md has {} samples of {name}", of_it.len()) };
        assert!(sample.text.contains(&format!("$ {command}")), "{name}: {}", sample.text);
        for line in sample.text.lines() {
            assert!(line.chars().count() <= terminal::COLUMNS, "{name}: {line}");
        }
        let picture =
            std::fs::read_to_string(docs.join(&sample.picture)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(terminal::text_of_svg(&picture), sample.text, "the picture of {name} shows its text");
    }
    for sample in &samples {
        assert!(commands.iter().any(|(name, _)| *name == sample.name), "{} is no command", sample.name);
    }
}
