//! A document's samples: between `<!-- shown: NAME -->` and `<!-- /shown -->` stand a picture and, to be searched and
//! copied, the same as text.

const BEGIN: &str = "<!-- shown: ";
const BEGUN: &str = " -->\n";
const END: &str = "<!-- /shown -->";
const FENCE: &str = "```\n";

/// A sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Its name.
    pub name: String,
    /// Its text.
    pub text: String,
    /// The picture's path, from the document.
    pub picture: String,
}

/// The samples of a document, in their order.
#[must_use]
pub fn samples(document: &str) -> Vec<Sample> {
    document.split(BEGIN).skip(1).filter_map(sample).collect()
}

fn sample(part: &str) -> Option<Sample> {
    let (name, rest) = part.split_once(BEGUN)?;
    let (body, _) = rest.split_once(END)?;
    let (_, fenced) = body.split_once(FENCE)?;
    let (text, _) = fenced.rsplit_once(FENCE.trim_end())?;
    let picture = body.split_once("](")?.1.split_once(')')?.0;
    Some(Sample { name: name.to_owned(), text: text.to_owned(), picture: picture.to_owned() })
}

/// The document with this sample in the place of the one of its name; `None` where it has no such place.
#[must_use]
pub fn with(document: &str, sample: &Sample) -> Option<String> {
    let begin = format!("{BEGIN}{}{BEGUN}", sample.name);
    let (before, rest) = document.split_once(&begin)?;
    let (_, after) = rest.split_once(END)?;
    let Sample { name, text, picture } = sample;
    Some(format!(
        "{before}{begin}![{name}]({picture})\n\n<details><summary>as text</summary>\n\n{FENCE}{text}{FENCE}</details>\n\
         {END}{after}"
    ))
}

/// Words that are another at another moment: which way packets go, units of time, which family has an address.
const OF_A_MOMENT: [&str; 9] = ["direct", "direct,", "relay", "mixed", "idle", "-", "µs", "ms", "no"];
/// What begins lines that tell of the machine.
const OF_A_MACHINE: [&str; 2] = ["limits", "sandbox"];

/// What stays of a text when another machine, at another time, writes it: words that have no figure in them, line by
/// line; each line of a shape once.
#[must_use]
pub fn shape(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let stays = |word: &&str| !word.contains(|c: char| c.is_ascii_digit()) && !OF_A_MOMENT.contains(word);
        let words: Vec<&str> = line.split_whitespace().filter(stays).collect();
        let is_of_machine = words.first().is_some_and(|first| OF_A_MACHINE.contains(first));
        let line = words.join(" ");
        if !line.is_empty() && !is_of_machine && !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines.sort();
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_put_where_its_place_is_and_found_again() {
        let document =
            "# a\n<!-- shown: x -->\n<!-- /shown -->\nb\n<!-- shown: y -->\nold\n<!-- /shown -->\n";
        let sample = |name: &str, text: &str| Sample {
            name: name.into(),
            text: text.into(),
            picture: format!("img/{name}.svg"),
        };
        let (x, y) = (sample("x", "$ one\n1\n"), sample("y", "$ two\n```\n"));
        let document = with(document, &x).and_then(|document| with(&document, &y)).unwrap();
        assert_eq!(samples(&document), [x.clone(), y]);
        assert!(document.starts_with("# a\n") && document.contains("\nb\n") && !document.contains("old"));
        assert_eq!(with(&document, &x).as_ref(), Some(&document), "twice is once");
        assert_eq!(with(&document, &sample("z", "")), None);
    }

    #[test]
    fn a_shape_is_what_stays() {
        assert_eq!(
            shape("POD  AGE\na/web-1  3s\na/web-2  4s\n\n2 pods: 2 joined"),
            ["POD AGE", "pods: joined"]
        );
    }
}
