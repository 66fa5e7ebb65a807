//! What a program wrote to a terminal, as text and as a picture: lines, columns and the colours of
//! SGR (ECMA-48 8.3.117) as far as podtether's programs use them. The same text is the same picture.

pub mod document;

use std::fmt::Write as _;

/// Columns of the terminal that documents show.
pub const COLUMNS: usize = 100;
/// Size of a character's cell, in the picture's units.
const CELL: (usize, usize) = (8, 18);
/// Around the text.
const MARGIN: usize = 14;
/// Below the top of a cell, where letters stand.
const BASELINE: usize = 13;

/// How characters look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Style {
    bold: bool,
    /// 0 for the terminal's own, else 31 to 36.
    colour: u8,
}

impl Style {
    /// As a `CSI … m` changes it.
    fn change(&mut self, codes: &str) {
        for code in codes.split(';') {
            match code.parse().unwrap_or(0) {
                0 => *self = Self::default(),
                1 => self.bold = true,
                22 => self.bold = false,
                colour @ 31..=36 => self.colour = colour,
                39 => self.colour = 0,
                _ => {}
            }
        }
    }

    /// The class that the picture's style sheet has for it.
    fn class(self) -> &'static str {
        match (self.bold, self.colour) {
            (_, 31) => "r",
            (_, 32) => "g",
            (_, 33) => "y",
            (true, _) => "b",
            _ => "",
        }
    }
}

type Line = Vec<(char, Style)>;

/// The characters that are seen, line by line: what is wider than `columns` goes on in the next line, and what was
/// there before the screen was cleared is gone.
fn lines(written: &str, columns: usize) -> Vec<Line> {
    let mut lines: Vec<Line> = vec![Line::new()];
    let mut style = Style::default();
    let mut rest = written.chars();
    while let Some(c) = rest.next() {
        match c {
            '\x1b' => {
                let mut codes = String::new();
                let end = rest.by_ref().find(|c| {
                    codes.push(*c);
                    c.is_ascii_alphabetic()
                });
                match end {
                    Some('m') => style.change(codes.trim_matches(['[', 'm'])),
                    Some('J') => lines = vec![Line::new()],
                    _ => {}
                }
            }
            '\n' => lines.push(Line::new()),
            c if c.is_control() => {}
            c => {
                if lines.last().is_some_and(|line| line.len() >= columns) {
                    lines.push(Line::new());
                }
                if let Some(line) = lines.last_mut() {
                    line.push((c, style));
                }
            }
        }
    }
    while lines.last().is_some_and(Vec::is_empty) {
        lines.pop();
    }
    lines
}

/// What is seen, without colours; each line ends.
#[must_use]
pub fn text(written: &str) -> String {
    let mut text = String::new();
    for line in lines(written, COLUMNS) {
        text.extend(line.iter().map(|(c, _)| *c));
        text.push('\n');
    }
    text
}

/// The widest line that was written, in columns.
#[must_use]
pub fn widest(written: &str) -> usize {
    lines(written, usize::MAX).iter().map(Vec::len).max().unwrap_or(0)
}

/// What is seen, as a picture (SVG 1.1). Every run of one colour has its width, so that columns stand below each other
/// in whatever font the viewer has; nothing is loaded from anywhere.
#[must_use]
pub fn svg(written: &str, title: &str) -> String {
    let lines = lines(written, COLUMNS);
    let (width, height) = (COLUMNS * CELL.0 + 2 * MARGIN, lines.len().max(1) * CELL.1 + 2 * MARGIN);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         role=\"img\">\n<title>{}</title>\n<style>text{{font:13px ui-monospace,Menlo,Consolas,'DejaVu Sans \
         Mono',monospace;fill:#d8dee9;white-space:pre}}.g{{fill:#8fce7e}}.y{{fill:#e6c35c}}.r{{fill:#f2777a}}.b{{fill:#fff;\
         font-weight:bold}}.p{{fill:#7aa6da}}</style>\n<rect width=\"{width}\" height=\"{height}\" rx=\"8\" \
         fill=\"#1b1f27\"/>\n",
        escaped(title)
    );
    for (row, line) in lines.iter().enumerate() {
        let y = MARGIN + row * CELL.1 + BASELINE;
        let is_prompt = line.starts_with(&[('$', Style::default()), (' ', Style::default())]);
        let mut from = 0;
        while let Some((_, style)) = line.get(from) {
            let run = line[from..].iter().take_while(|(_, other)| other == style).count();
            let said: String = line[from..from + run].iter().map(|(c, _)| *c).collect();
            let class = if is_prompt { "p" } else { style.class() };
            let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
            // Writing to a String cannot fail.
            let _ = writeln!(
                svg,
                "<text{class} x=\"{}\" y=\"{y}\" textLength=\"{}\" xml:space=\"preserve\">{}</text>",
                MARGIN + from * CELL.0,
                run * CELL.0,
                escaped(&said)
            );
            from += run;
        }
    }
    svg + "</svg>\n"
}

/// The text that a picture shows, as [`text`] has it.
#[must_use]
pub fn text_of_svg(svg: &str) -> String {
    let mut rows: Vec<String> = Vec::new();
    for line in svg.lines().filter(|line| line.starts_with("<text")) {
        let number = |name: &str| -> Option<usize> {
            line.split_once(&format!(" {name}=\""))?.1.split_once('"')?.0.parse().ok()
        };
        let said =
            line.split_once('>').and_then(|(_, rest)| rest.strip_suffix("</text>")).unwrap_or_default();
        let row = (number("y").unwrap_or(0).saturating_sub(MARGIN + BASELINE)) / CELL.1;
        rows.resize(rows.len().max(row + 1), String::new());
        rows[row].push_str(&said.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"));
    }
    rows.iter().map(|row| format!("{row}\n")).collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn colours_wrapping_and_a_cleared_screen() {
        let written = "gone\x1b[2J\x1b[H\x1b[1mPOD\x1b[0m  \x1b[32mrunning\x1b[0m a<b>&\r\n\nend";
        assert_eq!(text(written), "POD  running a<b>&\n\nend\n");
        let svg = svg(written, "a & b");
        assert!(
            svg.contains("<text class=\"b\" x=\"14\" y=\"27\" textLength=\"24\" xml:space=\"preserve\">POD<"),
            "{svg}"
        );
        assert!(svg.contains("<text class=\"g\" x=\"54\" y=\"27\" textLength=\"56\""), "{svg}");
        assert!(svg.contains("a&lt;b&gt;&amp;</text>") && svg.contains("<title>a &amp; b</title>"), "{svg}");
        assert!(svg.contains("height=\"82\""), "three lines: {svg}");
        assert_eq!(text_of_svg(&svg), text(written));
        let long = "x".repeat(COLUMNS + 1);
        assert_eq!(text(&long), format!("{}\nx\n", "x".repeat(COLUMNS)));
        assert_eq!((widest(&long), widest("")), (COLUMNS + 1, 0));
        assert_eq!(text(""), "");
    }

    proptest! {
        #[test]
        fn a_picture_shows_its_text_whatever_that_is(written in "(\\PC|[ <>&$\"]|\n|\x1b\\[[0-9;]{0,4}m){0,200}") {
            prop_assert_eq!(text_of_svg(&svg(&written, "t")), text(&written));
            prop_assert_eq!(svg(&written, "t"), svg(&written, "t"));
        }

        #[test]
        fn anything_is_survived(written in any::<String>()) {
            prop_assert!(text(&written).lines().all(|line| line.chars().count() <= COLUMNS));
        }
    }
}
