//! One network configuration as a runtime reads it, and our entry put into it and taken out again.
//!
//! What a file means is decided on parsed JSON; what is written is its own text with one piece put in or cut
//! out, so that everything else in it, known or not, stays byte for byte. Every edit is read back before it
//! leaves this module.

use std::ops::Range;

use serde_json::{Map, Value, json};

/// Type of our entry, and name of our plugin.
pub const OURS: &str = "podtether-cni";
/// Versions of the specification that our plugin speaks: those whose results have today's lists.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Of our entry when it is put in.
const INDENT: &str = "    ";

/// How a runtime reads a file, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `.conflist`: a list of plugins.
    List,
    /// `.conf` and `.json`: one plugin.
    Single,
}

/// The form of a file that runtimes read; `None` for every other.
#[must_use]
pub fn form(name: &str) -> Option<Form> {
    match name.rsplit_once('.')?.1 {
        "conflist" => Some(Form::List),
        "conf" | "json" => Some(Form::Single),
        _ => None,
    }
}

/// A configuration that a runtime can use.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Types of its plugins, in order.
    pub types: Vec<String>,
    /// What it speaks; empty where it does not say.
    pub versions: Vec<String>,
}

impl Network {
    /// Reads one as a runtime would.
    ///
    /// # Errors
    /// Why it cannot be used: the rest of a sentence that begins with the file's name.
    pub fn read(form: Form, text: &str) -> Result<Self, String> {
        let json: Value = serde_json::from_str(text).map_err(|e| format!("is not JSON: {e}"))?;
        let Value::Object(json) = json else { return Err("is not a JSON object".to_owned()) };
        let text_of = |key: &str| json.get(key).and_then(Value::as_str).map(str::to_owned);
        let kind = |plugin: &Value| {
            let kind = plugin.get("type").and_then(Value::as_str).filter(|kind| !kind.is_empty());
            kind.map(str::to_owned)
        };
        let types = match (form, json.get("plugins")) {
            (Form::List, Some(Value::Array(plugins))) => {
                let types: Vec<String> = plugins.iter().filter_map(kind).collect();
                if types.len() != plugins.len() {
                    return Err("has a plugin without a type".to_owned());
                }
                types
            }
            (Form::List, Some(_)) => return Err("has plugins that are not a list".to_owned()),
            (Form::List, None) => return Err("has no plugins".to_owned()),
            (Form::Single, Some(_)) if text_of("type").is_none() => {
                return Err("holds a list of plugins, which runtimes take from a .conflist only".to_owned());
            }
            (Form::Single, _) => {
                vec![kind(&Value::Object(json.clone())).ok_or("names no type of plugin")?]
            }
        };
        if types.is_empty() {
            return Err("has no plugins".to_owned());
        }
        let name = text_of("name").filter(|name| !name.is_empty()).ok_or("has no name")?;
        let several = json.get("cniVersions").and_then(Value::as_array);
        let several = several.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned);
        let versions = text_of("cniVersion").into_iter().chain(several).collect();
        Ok(Self { name, types, versions })
    }

    /// Where our entry is.
    #[must_use]
    pub fn ours(&self) -> Option<usize> {
        self.types.iter().position(|kind| kind == OURS)
    }

    /// Whether our plugin can be called in it.
    fn speaks(&self) -> Result<(), String> {
        if self.versions.is_empty() {
            return Err(format!("has no cniVersion; podtether-cni speaks {}", VERSIONS.join(", ")));
        }
        match self.versions.iter().find(|version| !VERSIONS.contains(&version.as_str())) {
            None => Ok(()),
            Some(other) => {
                Err(format!("speaks CNI {other:?}, which podtether-cni does not ({})", VERSIONS.join(", ")))
            }
        }
    }
}

/// Our entry of a list of plugins. What else an entry has, put there by hand, is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// `socket`
    pub socket: String,
    /// `tailnet`
    pub tailnet: String,
    /// `timeoutSeconds`
    pub timeout_seconds: u64,
    /// `failurePolicy`: `closed` or `open`.
    pub failure_policy: String,
}

impl Entry {
    fn members(&self) -> [(&'static str, Value); 6] {
        [
            ("type", OURS.into()),
            ("socket", self.socket.as_str().into()),
            ("tailnet", self.tailnet.as_str().into()),
            ("timeoutSeconds", self.timeout_seconds.into()),
            ("failurePolicy", self.failure_policy.as_str().into()),
            ("capabilities", json!({"io.kubernetes.cri.pod-annotations": true, "dns": true})),
        ]
    }

    /// On one line, with the members of `kept` that are not ours behind it.
    fn text(&self, kept: &Map<String, Value>) -> String {
        let ours = self.members();
        let others = kept.iter().filter(|(key, _)| ours.iter().all(|(name, _)| name != key));
        let pair = |key: &str, value: &Value| format!("{}: {value}", Value::from(key));
        let all = ours.iter().map(|(key, value)| pair(key, value));
        let all: Vec<String> = all.chain(others.map(|(key, value)| pair(key, value))).collect();
        format!("{{{}}}", all.join(", "))
    }

    fn is(&self, plugin: &Map<String, Value>) -> bool {
        self.members().iter().all(|(key, value)| plugin.get(*key) == Some(value))
    }
}

/// The list with our entry in it: where it is, brought up to date; else as the last. The same text when it is
/// right as it is.
///
/// # Errors
/// Why not: the rest of a sentence that begins with the file's name.
pub fn chain(text: &str, entry: &Entry) -> Result<String, String> {
    let network = Network::read(Form::List, text)?;
    network.speaks()?;
    if network.types.iter().all(|kind| kind == OURS) {
        return Err("has podtether-cni alone, which needs a primary plugin before it".to_owned());
    }
    // At the beginning it could never work, and a second one would be refused by the first.
    let at = network.ours().filter(|at| *at > 0 && network.types.iter().filter(|t| *t == OURS).count() == 1);
    let Some(at) = at else {
        let bare = if network.ours().is_some() { unchain(text)? } else { text.to_owned() };
        let plugins = Plugins::of(&bare).ok_or("cannot be edited")?;
        let last = plugins.elements.last().ok_or("has no plugins")?.end;
        let piece = format!(",\n{INDENT}{}", entry.text(&Map::new()));
        return checked(splice(&bare, last..last, &piece), &network, true);
    };
    let plugins = Plugins::of(text).ok_or("cannot be edited")?;
    let range = plugins.elements.get(at).ok_or("cannot be edited")?.clone();
    let Ok(Value::Object(old)) = serde_json::from_str(&text[range.clone()]) else {
        return Err("cannot be edited".to_owned());
    };
    if entry.is(&old) {
        return Ok(text.to_owned());
    }
    checked(splice(text, range, &entry.text(&old)), &network, true)
}

/// The list without our entries; empty when it had no others.
///
/// # Errors
/// As for [`chain`].
pub fn unchain(text: &str) -> Result<String, String> {
    let network = Network::read(Form::List, text)?;
    let mut left = text.to_owned();
    let mut types = network.types.clone();
    while let Some(at) = types.iter().position(|kind| kind == OURS) {
        let plugins = Plugins::of(&left).ok_or("cannot be edited")?.elements;
        if plugins.len() == 1 {
            return Ok(String::new());
        }
        let cut = match at.checked_sub(1) {
            Some(before) => plugins[before].end..plugins[at].end,
            None => plugins[at].start..plugins[at + 1].start,
        };
        left = splice(&left, cut, "");
        types.remove(at);
    }
    checked(left, &network, false)
}

/// A list of one plugin, which is `conf` as it is.
///
/// # Errors
/// As for [`chain`].
pub fn list_of(conf: &str) -> Result<String, String> {
    let network = Network::read(Form::Single, conf)?;
    network.speaks()?;
    if network.ours().is_some() {
        return Err("is podtether-cni alone, which needs a primary plugin before it".to_owned());
    }
    let version = network.versions.first().cloned().unwrap_or_default();
    Ok(format!(
        "{{\n  \"cniVersion\": {},\n  \"name\": {},\n  \"plugins\": [\n{INDENT}{}\n  ]\n}}\n",
        Value::from(version),
        Value::from(network.name.as_str()),
        conf.trim(),
    ))
}

/// Reads an edited list back: the same network, the same other plugins in the same order, ours once or not at all.
fn checked(text: String, before: &Network, with_ours: bool) -> Result<String, String> {
    let after = Network::read(Form::List, &text)?;
    let others = |network: &Network| -> Vec<String> {
        network.types.iter().filter(|kind| *kind != OURS).cloned().collect()
    };
    let ours = after.types.len() - others(&after).len();
    let same = after.name == before.name && after.versions == before.versions;
    if same && others(&after) == others(before) && ours == usize::from(with_ours) {
        Ok(text)
    } else {
        Err("cannot be edited: it would not be the same network".to_owned())
    }
}

fn splice(text: &str, range: Range<usize>, piece: &str) -> String {
    [&text[..range.start], piece, &text[range.end..]].concat()
}

/// Where the elements of `plugins` are in a text that is known to be JSON.
#[derive(Debug)]
struct Plugins {
    elements: Vec<Range<usize>>,
}

impl Plugins {
    fn of(text: &str) -> Option<Self> {
        let mut found = None;
        let mut at = Cursor { text: text.as_bytes(), at: 0 };
        at.eat(b'{')?;
        while !at.is(b'}') {
            let key = at.value()?;
            at.eat(b':')?;
            let value = at.value()?;
            // As parsers do, the last of several.
            if serde_json::from_str::<String>(&text[key]).ok()? == "plugins" {
                found = Some(value);
            }
            if !at.is(b'}') {
                at.eat(b',')?;
            }
        }
        let list = found?;
        let mut at = Cursor { text: text.get(..list.end)?.as_bytes(), at: list.start };
        at.eat(b'[')?;
        let mut elements = Vec::new();
        while !at.is(b']') {
            elements.push(at.value()?);
            if !at.is(b']') {
                at.eat(b',')?;
            }
        }
        Some(Self { elements })
    }
}

struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at)?.is_ascii_whitespace() {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn is(&mut self, byte: u8) -> bool {
        self.peek() == Some(byte)
    }

    fn eat(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }

    /// Past one value: where it was.
    fn value(&mut self) -> Option<Range<usize>> {
        self.peek()?;
        let start = self.at;
        let mut depth = 0_usize;
        loop {
            match self.text.get(self.at)? {
                b'"' => {
                    self.string()?;
                    if depth == 0 {
                        break;
                    }
                    continue;
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' if depth > 0 => {
                    depth -= 1;
                    if depth == 0 {
                        self.at += 1;
                        break;
                    }
                }
                b',' | b'}' | b']' | b':' if depth == 0 => break,
                byte if depth == 0 && byte.is_ascii_whitespace() => break,
                _ => {}
            }
            self.at += 1;
        }
        (self.at > start).then_some(start..self.at)
    }

    fn string(&mut self) -> Option<()> {
        self.at += 1;
        loop {
            match self.text.get(self.at)? {
                b'\\' => self.at += 2,
                b'"' => {
                    self.at += 1;
                    return Some(());
                }
                _ => self.at += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::entry;
    use super::*;

    const PLAIN: &str = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]}"#;

    #[test]
    fn everything_else_stays_byte_for_byte() {
        let texts = [
            PLAIN,
            "{ \"plugins\" :\t[ {\"type\":\"a\"} ,\r\n{ \"type\" : \"b\" }\r\n ],\r\n\"name\":\"n\",\"cniVersion\":\"0.3.1\" }\r\n",
            r#"{"name":"n","cniVersion":"1.1.0","plu\u0067ins":[{"type":"a","x":"]},{\"\\","n":[1.0,1e3,12345678901234567890123]}]}"#,
            r#"{"name":"n","cniVersion":"1.1.0","cniVersions":["0.4.0","1.1.0"],"plugins":[],"plugins":[{"type":"a"}]}"#,
            "{\"name\":\"n\",\"cniVersion\":\"0.4.0\",\"disableCheck\":true,\"ü\":\"ü\",\"plugins\":[{\"type\":\"a\"}\n]\n}",
        ];
        for text in texts {
            let chained = chain(text, &entry()).unwrap();
            let at = text.bytes().zip(chained.bytes()).take_while(|(a, b)| a == b).count();
            assert!(chained.ends_with(&text[at..]), "one piece was put in: {chained}");
            assert_eq!(chain(&chained, &entry()).unwrap(), chained, "again");
            assert_eq!(unchain(&chained).unwrap(), text);
            let network = Network::read(Form::List, &chained).unwrap();
            assert_eq!(network.ours(), Some(network.types.len() - 1));
        }
    }

    #[test]
    fn an_entry_is_brought_up_to_date_where_it_is() {
        let old = PLAIN.replace(
            "]}",
            r#",{"type":"podtether-cni","ifName":"ts7","tailnet":"prod"},{"type":"istio-cni"}]}"#,
        );
        let new = chain(&old, &entry()).unwrap();
        let json: Value = serde_json::from_str(&new).unwrap();
        assert_eq!(json["plugins"][1]["ifName"], "ts7");
        assert_eq!(json["plugins"][1]["tailnet"], "default");
        assert_eq!(json["plugins"][2], json!({"type": "istio-cni"}));
        // At the beginning, and twice: once, and behind the others.
        let twice = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"podtether-cni"},{"type":"bridge"},{"type":"podtether-cni"}]}"#;
        assert_eq!(unchain(twice).unwrap(), PLAIN);
        assert_eq!(unchain(&chain(twice, &entry()).unwrap()).unwrap(), PLAIN);
    }

    #[test]
    fn what_a_runtime_would_refuse() {
        let with = |plugins: &str| PLAIN.replace(r#"[{"type":"bridge"}]"#, plugins);
        let table = [
            ("", "is not JSON"),
            ("{", "is not JSON"),
            ("\u{feff}{}", "is not JSON"),
            ("[]", "is not a JSON object"),
            (r#"{"name":"n"}"#, "has no plugins"),
            (&with("{}"), "are not a list"),
            (&with("[]"), "has no plugins"),
            (&with("[{}]"), "a plugin without a type"),
            (&with("[{\"type\":\"\"}]"), "a plugin without a type"),
            (&PLAIN.replace("\"n\"", "\"\""), "has no name"),
            (&PLAIN.replace("\"cniVersion\":\"1.0.0\",", ""), "has no cniVersion"),
            (&PLAIN.replace("1.0.0", "2.0.0"), "speaks CNI \"2.0.0\""),
            (&with("[{\"type\":\"podtether-cni\"}]"), "alone"),
        ];
        for (text, says) in table {
            let why = chain(text, &entry()).unwrap_err();
            assert!(why.contains(says), "{text}: {why}");
        }
        assert_eq!(unchain(&with("[{\"type\":\"podtether-cni\"}]")).unwrap(), "");
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "\\PC*".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("\\PC*", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_list_comes_back_as_it_was(
            extra in prop::collection::btree_map("[^pnc]\\PC{0,8}", json_value(), 0..4),
            inside in prop::collection::vec(json_value(), 1..4),
            pretty in any::<bool>(),
        ) {
            let mut list = json!({"cniVersion": "1.0.0", "name": "n"});
            list["plugins"] = inside.into_iter().map(|x| json!({"a": x, "type": "t", "z": 1})).collect();
            for (key, value) in extra {
                list[key] = value;
            }
            let text = if pretty { serde_json::to_string_pretty(&list) } else { serde_json::to_string(&list) }.unwrap();
            let chained = chain(&text, &entry()).unwrap();
            let mut wanted: Value = serde_json::from_str(&text).unwrap();
            let members = entry().members().map(|(key, value)| (key.to_owned(), value));
            wanted["plugins"].as_array_mut().unwrap().push(Value::Object(members.into_iter().collect()));
            prop_assert_eq!(serde_json::from_str::<Value>(&chained).unwrap(), wanted);
            prop_assert_eq!(unchain(&chained).unwrap(), text);
        }

        #[test]
        fn no_text_makes_it_panic(text in "[\\[\\]{}\":,\\\\ a-z0-9]*", cut in 0..64_usize) {
            let _ = (chain(&text, &entry()), unchain(&text), list_of(&text), Plugins::of(&text));
            let whole = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]}"#;
            let mut hurt = whole.to_owned();
            hurt.insert_str(cut.min(whole.len()), &text);
            if let Ok(chained) = chain(&hurt, &entry()) {
                prop_assert_eq!(unchain(&chained).unwrap(), hurt);
            }
        }
    }
}
