//! Text that a person reads: tables that fit a width, quantities, colour.

use std::fmt::Write as _;
use std::time::Duration;

pub use podtether_proto::log::utc;

/// Columns that everything for a person fits into.
pub const WIDTH: usize = 100;
const GAP: usize = 2;
const INDENT: &str = "  ";

/// How text is to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Colours, for a terminal.
    pub colour: bool,
    /// Columns that tables may have: [`WIDTH`], or those of a wider terminal.
    pub width: usize,
}

impl Look {
    /// Without colours.
    pub const PLAIN: Look = Look { colour: false, width: WIDTH };

    /// Colours on a terminal of so many columns, unless `NO_COLOR` is set to something (<https://no-color.org>).
    #[must_use]
    pub fn of(terminal: Option<usize>, no_color: Option<&std::ffi::OsStr>) -> Look {
        let colour = terminal.is_some() && no_color.is_none_or(std::ffi::OsStr::is_empty);
        Look { colour, width: terminal.unwrap_or_default().max(WIDTH) }
    }

    /// `text` as `paint` has it.
    #[must_use]
    pub fn paint(self, paint: Paint, text: &str) -> String {
        let code = match paint {
            Paint::Plain => return text.to_owned(),
            Paint::Good => "32",
            Paint::Warn => "33",
            Paint::Bad => "31",
            Paint::Head => "1",
        };
        if self.colour && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

nix::ioctl_read_bad!(
    /// `TIOCGWINSZ`, see tty_ioctl(4).
    window_size,
    libc::TIOCGWINSZ,
    libc::winsize
);

/// Columns of a terminal.
pub fn terminal_width(terminal: &impl std::os::fd::AsRawFd) -> Option<usize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel writes a winsize, which is there.
    unsafe { window_size(terminal.as_raw_fd(), &raw mut size) }.ok()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

/// What a text means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Paint {
    /// Nothing special.
    #[default]
    Plain,
    /// As it should be.
    Good,
    /// On its way, or worth a look.
    Warn,
    /// Wrong.
    Bad,
    /// A title.
    Head,
}

/// A cell. Characters that move a cursor do not get into it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cell {
    text: String,
    paint: Paint,
}

impl Cell {
    /// With a meaning.
    pub fn painted(text: &str, paint: Paint) -> Cell {
        Cell { text: printable(text), paint }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell::painted(text.as_ref(), Paint::Plain)
    }
}

/// `text` in one line, without control characters.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A column.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    title: &'static str,
    /// How narrow it may become when the table is too wide.
    least: usize,
}

/// A column as wide as its widest cell.
#[must_use]
pub fn fixed(title: &'static str) -> Column {
    Column { title, least: usize::MAX }
}

/// A column whose cells are shortened to no less than `least` when the table is too wide.
#[must_use]
pub fn flexible(title: &'static str, least: usize) -> Column {
    Column { title, least }
}

#[derive(Debug, Clone)]
struct Row {
    cells: Vec<Cell>,
    notes: Vec<Cell>,
}

/// A table with notes below its rows.
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Row>,
}

impl Table {
    /// Without rows.
    #[must_use]
    pub fn new(columns: Vec<Column>) -> Table {
        Table { columns, rows: Vec::new() }
    }

    /// A row; its cells in the order of the columns.
    pub fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(Row { cells, notes: Vec::new() });
    }

    /// A sentence below the last row.
    pub fn note(&mut self, note: impl Into<Cell>) {
        if let Some(row) = self.rows.last_mut() {
            row.notes.push(note.into());
        }
    }

    /// The text, no line of it wider than the look has it as far as the columns allow that.
    #[must_use]
    pub fn render(&self, look: Look) -> String {
        let width = look.width;
        let widths = self.widths(width);
        let mut text = String::new();
        let titles: Vec<Cell> =
            self.columns.iter().map(|column| Cell::painted(column.title, Paint::Head)).collect();
        line(&mut text, &titles, &widths, look);
        for row in &self.rows {
            line(&mut text, &row.cells, &widths, look);
            for note in &row.notes {
                for part in wrap(&note.text, width.saturating_sub(INDENT.len())) {
                    let _ = writeln!(text, "{INDENT}{}", look.paint(note.paint, &part));
                }
            }
        }
        text
    }

    fn widths(&self, width: usize) -> Vec<usize> {
        let mut widths: Vec<usize> = self.columns.iter().map(|column| count(column.title)).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(&row.cells) {
                *width = count(&cell.text).max(*width);
            }
        }
        let gaps = GAP * widths.len().saturating_sub(1);
        loop {
            let total: usize = widths.iter().sum::<usize>() + gaps;
            let room = |(at, _): &(usize, &Column)| widths[*at].saturating_sub(self.columns[*at].least);
            let widest = self.columns.iter().enumerate().filter(|c| room(c) > 0).max_by_key(room);
            match widest.map(|(at, _)| at) {
                Some(at) if total > width => widths[at] -= 1,
                _ => return widths,
            }
        }
    }
}

fn line(text: &mut String, cells: &[Cell], widths: &[usize], look: Look) {
    let last = cells.len().saturating_sub(1);
    for (at, (cell, width)) in cells.iter().zip(widths).enumerate() {
        let short = shorten(&cell.text, *width);
        let pad = if at == last { 0 } else { width - count(&short) + GAP };
        let _ = write!(text, "{}{:pad$}", look.paint(cell.paint, &short), "");
    }
    while text.ends_with(' ') {
        text.pop();
    }
    text.push('\n');
}

fn count(text: &str) -> usize {
    text.chars().count()
}

/// `text` in at most `width` characters; what is left out is in the middle, since names differ at their ends.
#[must_use]
pub fn shorten(text: &str, width: usize) -> String {
    let length = count(text);
    if length <= width {
        return text.to_owned();
    }
    let kept = width.saturating_sub(1);
    let (head, tail) = (kept / 2, kept - kept / 2);
    let mut short: String = text.chars().take(head).collect();
    short.push('…');
    short.extend(text.chars().skip(length - tail));
    short
}

/// `text` cut between words into lines of at most `width` characters; a longer word stands alone.
#[must_use]
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in printable(text).split_whitespace() {
        match lines.last_mut() {
            Some(line) if count(line) + 1 + count(word) <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// A paragraph behind `head`, its further lines indented.
#[must_use]
pub fn paragraph(head: &str, text: &str) -> String {
    let mut paragraph = String::new();
    for (at, part) in wrap(text, WIDTH - count(head)).iter().enumerate() {
        let head = if at == 0 { head.to_owned() } else { " ".repeat(count(head)) };
        let _ = writeln!(paragraph, "{head}{part}");
    }
    if paragraph.is_empty() { format!("{}\n", head.trim_end()) } else { paragraph }
}

/// A time span in at most four characters, coarse.
#[must_use]
pub fn age(span: Duration) -> String {
    let s = span.as_secs();
    match s {
        0..100 => format!("{s}s"),
        100..6000 => format!("{}m", s / 60),
        6000..172_800 => format!("{}h", s / 3600),
        _ => format!("{}d", s / 86_400),
    }
}

/// Microseconds in three figures or so.
#[must_use]
pub fn time(us: u64) -> String {
    match us {
        0..1000 => format!("{us} µs"),
        1000..1_000_000 => format!("{}.{} ms", us / 1000, us % 1000 / 100),
        1_000_000..100_000_000 => format!("{}.{:02} s", us / 1_000_000, us % 1_000_000 / 10_000),
        _ => format!("{} s", us / 1_000_000),
    }
}

/// Bytes in at most five characters, in powers of 1024.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    let mut unit = 'B';
    let mut tenths = u128::from(bytes) * 10;
    for larger in ['K', 'M', 'G', 'T', 'P', 'E'] {
        if tenths < 10_240 {
            break;
        }
        tenths /= 1024;
        unit = larger;
    }
    match unit {
        'B' => format!("{bytes}B"),
        _ if tenths < 100 => format!("{}.{}{unit}", tenths / 10, tenths % 10),
        _ => format!("{}{unit}", tenths / 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantities() {
        let ages = [0, 99, 100, 5999, 6000, 172_799, 172_800].map(|s| age(Duration::from_secs(s)));
        assert_eq!(ages, ["0s", "99s", "1m", "99m", "1h", "47h", "2d"]);
        let sizes = [0, 1023, 1024, 10_239, 10_240, 1_048_575, 1_048_576, u64::MAX].map(bytes);
        assert_eq!(sizes, ["0B", "1023B", "1.0K", "9.9K", "10K", "1023K", "1.0M", "15E"]);
        let times = [0, 999, 1000, 12_340, 1_000_000, 61_230_000, 100_000_000].map(time);
        assert_eq!(times, ["0 µs", "999 µs", "1.0 ms", "12.3 ms", "1.00 s", "61.23 s", "100 s"]);
    }

    #[test]
    fn the_widest_columns_give_way_and_notes_are_wrapped() {
        let mut table = Table::new(vec![flexible("POD", 8), fixed("STATE"), flexible("PATH", 4)]);
        table.row(vec![
            "shop/web-6f7d9c5b4-x2x7k".into(),
            Cell::painted("running", Paint::Good),
            "direct 3".into(),
        ]);
        table.row(vec!["a".into(), "x".into(), Cell::default()]);
        table.note("one two three four five six seven");
        assert_eq!(
            table.render(Look { width: 30, ..Look::PLAIN }),
            "POD           STATE    PATH\n\
             shop/…-x2x7k  running  dir…t 3\n\
             a             x\n  one two three four five six\n  seven\n"
        );
        let wide = table.render(Look { colour: true, ..Look::PLAIN });
        assert!(wide.contains("shop/web-6f7d9c5b4-x2x7k  \x1b[32mrunning\x1b[0m  direct 3\n"), "{wide}");
        assert_eq!(paragraph("why: ", ""), "why:\n");
        assert_eq!(paragraph("why: ", "a b"), "why: a b\n");
    }

    #[test]
    fn colour_is_for_terminals_and_for_those_who_want_it() {
        use std::ffi::OsStr;
        assert_eq!(Look::of(Some(80), None), Look { colour: true, width: WIDTH });
        assert_eq!(Look::of(Some(160), None).width, 160);
        assert!(Look::of(Some(100), Some(OsStr::new(""))).colour);
        assert!(!Look::of(Some(100), Some(OsStr::new("1"))).colour);
        assert!(!Look::of(None, None).colour);
    }

    proptest! {
        #[test]
        fn whatever_is_in_it_a_table_fits(
            rows in proptest::collection::vec((any::<String>(), ".{0,300}", "[a-z]{0,9}"), 0..6),
            width in 40_usize..120,
        ) {
            let mut table = Table::new(vec![flexible("POD", 8), flexible("NAME", 8), fixed("STATE")]);
            for (a, b, c) in &rows {
                table.row(vec![a.into(), b.into(), c.into()]);
                table.note(b);
            }
            for line in table.render(Look { width, ..Look::PLAIN }).lines() {
                let words = line.split_whitespace().count();
                prop_assert!(line.chars().count() <= width || words == 1, "{line:?}");
                prop_assert!(!line.chars().any(char::is_control));
            }
        }

        #[test]
        fn a_shortened_text_is_as_long_as_allowed(text in ".{0,80}", width in 1_usize..100) {
            prop_assert_eq!(shorten(&text, width).chars().count(), text.chars().count().min(width));
        }
    }
}
