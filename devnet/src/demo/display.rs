//! What the user sees: one moving line while a step runs, one lasting line when it is done, and the table
//! at the end. Where stdout is no terminal there are only the lasting lines.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Columns of the whole table.
const WIDTH: usize = 100;
const WHAT: usize = 42;
const RESULT: usize = 6;
const MEASURED: usize = WIDTH - WHAT - RESULT - 4;

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    what: String,
    passed: bool,
    measured: String,
}

impl Row {
    /// Something that was shown to work.
    pub(super) fn passed(what: impl Into<String>, measured: impl Into<String>) -> Self {
        Self { what: what.into(), passed: true, measured: measured.into() }
    }

    /// Something that was not.
    pub(super) fn failed(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { what: what.into(), passed: false, measured: why.into() }
    }
}

/// The demo's voice.
pub(super) struct Display {
    bar: Option<ProgressBar>,
    rows: Vec<Row>,
}

/// What a step may say while it runs.
pub(super) struct Progress<'a> {
    bar: Option<&'a ProgressBar>,
    title: &'a str,
}

impl Progress<'_> {
    /// Shows what is going on now.
    pub(super) fn say(&self, text: &str) {
        if let Some(bar) = self.bar {
            bar.set_message(format!("{}: {text}", self.title));
        }
    }
}

impl Display {
    /// For the terminal there is, or none.
    pub(super) fn new() -> Self {
        let live = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        Self { bar: live.then(spinner), rows: Vec::new() }
    }

    /// Runs one step; its rows go into the table.
    ///
    /// # Errors
    /// The step's own.
    pub(super) fn step(
        &mut self,
        title: &str,
        work: impl FnOnce(&Progress<'_>) -> anyhow::Result<Vec<Row>>,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        if let Some(bar) = &self.bar {
            bar.set_message(title.to_owned());
            bar.reset_elapsed();
        }
        let result = work(&Progress { bar: self.bar.as_ref(), title });
        let took = duration(started.elapsed());
        match result {
            Ok(rows) => {
                self.line(&format!("  ok      {took:>8}  {title}"));
                self.rows.extend(rows);
                Ok(())
            }
            Err(error) => {
                self.line(&format!("  FAILED  {took:>8}  {title}"));
                self.rows.push(Row::failed(title, "see below"));
                Err(error)
            }
        }
    }

    /// A line that stays.
    #[expect(clippy::print_stdout, reason = "a command line tool prints its answers")]
    pub(super) fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{text}")),
            None => println!("{text}"),
        }
    }

    /// A line of the table that no step made.
    pub(super) fn row(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// For whoever ends the process from another thread: takes the moving line away.
    pub(super) fn clearer(&self) -> impl Fn() + Send + 'static {
        let bar = self.bar.clone();
        move || bar.iter().for_each(ProgressBar::finish_and_clear)
    }

    /// Clears the moving line, and prints the table.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.line("");
        self.line(table(&self.rows).trim_end());
    }
}

fn spinner() -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_style(
        ProgressStyle::with_template("  {spinner}       {elapsed:>8}  {wide_msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    bar.set_draw_target(ProgressDrawTarget::stderr());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// A time as people read it: three digits.
pub(super) fn duration(time: Duration) -> String {
    let micros = time.as_micros();
    match micros {
        0..1_000 => format!("{micros} µs"),
        1_000..10_000 => format!("{}.{} ms", micros / 1_000, micros % 1_000 / 100),
        10_000..1_000_000 => format!("{} ms", micros / 1_000),
        1_000_000..10_000_000 => format!("{}.{:02} s", micros / 1_000_000, micros % 1_000_000 / 10_000),
        _ => format!("{}.{} s", micros / 1_000_000, micros % 1_000_000 / 100_000),
    }
}

/// The rows with their head, in columns, no line longer than [`WIDTH`].
pub(super) fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    columns(&mut text, "what", "result", "measured");
    columns(&mut text, &"-".repeat(WHAT), &"-".repeat(RESULT), &"-".repeat(MEASURED));
    for row in rows {
        columns(&mut text, &row.what, if row.passed { "ok" } else { "FAILED" }, &row.measured);
    }
    text
}

fn columns(text: &mut String, what: &str, result: &str, measured: &str) {
    let (left, right) = (wrap(what, WHAT), wrap(measured, MEASURED));
    for index in 0..left.len().max(right.len()) {
        let cell = |lines: &[String]| lines.get(index).cloned().unwrap_or_default();
        let result = if index == 0 { result } else { "" };
        let line = format!("{:<WHAT$}  {result:<RESULT$}  {}", cell(&left), cell(&right));
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

/// Breaks at spaces, and inside a word that is longer than a line.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        loop {
            let used = lines.last().map_or(0, |line| line.chars().count());
            let space = usize::from(used > 0);
            if used + space + word.len() <= width {
                if let Some(line) = lines.last_mut() {
                    line.extend(std::iter::repeat_n(' ', space).chain(word));
                }
                break;
            }
            if used == 0 {
                let rest = word.split_off(width);
                if let Some(line) = lines.last_mut() {
                    line.extend(word);
                }
                word = rest;
            }
            lines.push(String::new());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits() {
        let table = [
            (17, "17 µs"),
            (1_234, "1.2 ms"),
            (45_678, "45 ms"),
            (999_999, "999 ms"),
            (1_234_567, "1.23 s"),
            (12_345_678, "12.3 s"),
        ];
        for (micros, text) in table {
            assert_eq!(duration(Duration::from_micros(micros)), text);
        }
    }

    #[test]
    fn no_line_is_too_long_and_no_word_is_lost() {
        let long = "word ".repeat(60) + &"x".repeat(130);
        let rows = [
            Row::passed("a pod joins", "100.64.0.1 fd7a:115c:a1e0::1 in 182 ms"),
            Row::failed(long.clone(), long.clone()),
        ];
        let text = table(&rows);
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert_eq!(text.matches("word").count(), 120);
        assert_eq!(text.matches('x').count(), 260);
        assert!(text.lines().nth(2).unwrap().starts_with("a pod joins "));
        assert_eq!(text.lines().nth(2).unwrap().find("ok"), Some(WHAT + 2));
        assert_eq!(text.lines().nth(2).unwrap().find("100.64"), Some(WHAT + RESULT + 4));
    }

    #[test]
    fn an_empty_cell_is_one_line() {
        assert_eq!(wrap("", 5), [""]);
        assert_eq!(wrap("ab cd", 5), ["ab cd"]);
        assert_eq!(wrap("ab cde", 5), ["ab", "cde"]);
    }
}
