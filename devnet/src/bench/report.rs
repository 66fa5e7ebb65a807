//! What a run found, as a table and as a file.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::bars::{self, Bar};
use super::figure::{Figure, spread};

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Where and on what it ran.
    pub machine: Vec<String>,
    /// In the order they were measured.
    pub figures: Vec<Figure>,
    /// What was left out, and why, a sentence each.
    pub skipped: Vec<String>,
}

const HEADS: [&str; 9] =
    ["what", "value", "unit", "min – max", "bare", "tailscaled", "×bare", "×tailscaled", "bar"];

impl Report {
    /// Whether no bar was missed; those that were not measured do not count.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.missed().next().is_none()
    }

    /// Bars that were missed.
    pub fn missed(&self) -> impl Iterator<Item = (&Figure, &'static Bar)> {
        self.judged().filter(|(.., met)| *met == Some(false)).map(|(figure, bar, _)| (figure, bar))
    }

    fn judged(&self) -> impl Iterator<Item = (&Figure, &'static Bar, Option<bool>)> {
        self.figures.iter().flat_map(|f| bars::of(&f.name).map(move |bar| (f, bar, bar.met(f))))
    }

    /// The table, and below it what was missed, what was not measured and what was left out.
    #[must_use]
    pub fn table(&self) -> String {
        let mut rows = vec![[&HEADS[..], &["met"]].concat().into_iter().map(str::to_owned).collect()];
        rows.extend(self.figures.iter().map(row));
        let mut text: String = self.machine.iter().map(|line| format!("{line}\n")).collect();
        text += "\n";
        text += &columns(&rows);
        let unmeasured: Vec<String> = bars::BARS
            .iter()
            .filter(|bar| {
                let figure = self.figures.iter().find(|f| f.name == bar.figure);
                figure.is_none_or(|figure| bar.met(figure).is_none())
            })
            .map(|bar| format!("{} {}", bar.figure, bar.text()))
            .collect();
        text += "\n";
        for line in &self.skipped {
            text += &format!("left out: {line}\n");
        }
        if !unmeasured.is_empty() {
            text += &format!("not measured, so neither met nor missed: {}\n", unmeasured.join("; "));
        }
        for (figure, bar) in self.missed() {
            text += &format!("MISSED {}: {}\n", figure.name, bar.text());
        }
        text
    }

    /// A list with an object for each figure.
    #[must_use]
    pub fn json(&self) -> Value {
        self.figures.iter().map(Figure::json).collect()
    }

    /// Writes [`Report::json`].
    ///
    /// # Errors
    /// As the file system says.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.json())? + "\n";
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }
}

fn row(figure: &Figure) -> Vec<String> {
    let shown = |value: Option<f64>| value.map(digits).unwrap_or_default();
    let met = match (figure.bar_text().is_empty(), figure.met()) {
        (true, _) => "",
        (_, Some(true)) => "yes",
        (_, Some(false)) => "MISSED",
        (_, None) => "not measured",
    };
    vec![
        figure.what.clone(),
        shown(figure.value()),
        figure.unit.to_owned(),
        spread(&figure.ours).map(|(a, b)| format!("{} – {}", digits(a), digits(b))).unwrap_or_default(),
        shown(figure.bare_value()),
        shown(figure.stock_value()),
        shown(figure.over_bare()),
        shown(figure.over_tailscaled()),
        figure.bar_text(),
        met.to_owned(),
    ]
}

/// Three of them, and more where they stand before the point.
fn digits(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The first column and the texts to the left, numbers to the right.
fn columns(rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..=HEADS.len()).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, width))| match column {
                0 | 2 | 8 | 9 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            })
            .collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let tcp = Figure {
            ours: vec![4.0, 5.0],
            bare: vec![18.0],
            stock: vec![2.0],
            ..Figure::new("tcp1.v4", "TCP, 1 stream", "Gbit/s")
        };
        let start = Figure::of("start.ready", "engine exec to ready", "ms", 12.0);
        let machine = vec!["2 processors".into()];
        let skipped = vec!["memory: not asked for".into()];
        Report { machine, figures: vec![tcp, start, Figure::of("x", "other", "s", 120.4)], skipped }
    }

    #[test]
    fn the_table_says_what_was_met_missed_and_left_out() {
        let table = report().table();
        let text: String =
            table.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ") + "\n").collect();
        for wanted in [
            "2 processors\n",
            "TCP, 1 stream 4.50 Gbit/s 4.00 – 5.00 18.0 2.00 0.250 2.25 ≥ 1.8 × tailscaled, ≥ 0.22 × bare yes\n",
            "engine exec to ready 12.0 ms 12.0 – 12.0 ≤ 10 MISSED\n",
            "other 120 s 120 – 120\n",
            "left out: memory: not asked for\n",
            "MISSED start.ready: ≤ 10\n",
            "neither met nor missed: tcp1.v4.cpu.sender ≤ 0.18;",
        ] {
            assert!(text.contains(wanted), "no {wanted:?} in\n{text}");
        }
        assert!(!report().passed());
        let mut good = report();
        good.figures.remove(1);
        assert!(good.passed());
    }

    #[test]
    fn the_file_is_a_list() {
        let json = report().json();
        let names: Vec<&str> = json.as_array().unwrap().iter().map(|f| f["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["tcp1.v4", "start.ready", "x"]);
        assert_eq!((&json[0]["met"], &json[1]["met"]), (&Value::Bool(true), &Value::Bool(false)));
        assert_eq!(json[2]["met"], Value::Null);
    }
}
