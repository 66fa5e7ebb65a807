//! What the operator gives to namespaces.

use crate::config::Config;

/// Which pods join when neither they nor their namespace says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Join {
    /// All.
    OptOut,
    /// None.
    OptIn,
}

impl Join {
    /// As the configuration has it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Join> {
        [Join::OptOut, Join::OptIn].into_iter().find(|join| join.name() == text)
    }

    /// As the configuration has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Join::OptOut => "opt-out",
            Join::OptIn => "opt-in",
        }
    }
}

/// What annotations in a namespace may ask for, beyond what every pod of the tailnet gets. In tags and host names
/// `*` stands for anything and `{namespace}` for the namespace's name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grant {
    /// ACL tags.
    pub tags: Vec<String>,
    /// Host names.
    pub hostnames: Vec<String>,
    /// Exit nodes, as annotations name them; `*` for any.
    pub exit_nodes: Vec<String>,
    /// Tailnets.
    pub tailnets: Vec<String>,
}

impl Grant {
    pub(super) fn has_tag(&self, tag: &str, namespace: &str) -> bool {
        one_matches(&self.tags, tag, namespace)
    }

    /// Whether some namespace gets the tag by this.
    pub(crate) fn has_tag_anywhere(&self, tag: &str) -> bool {
        one_matches(&self.tags, tag, "*")
    }

    pub(super) fn has_hostname(&self, name: &str, namespace: &str) -> bool {
        one_matches(&self.hostnames, name, namespace)
    }
}

impl Config {
    /// What `namespace` was given: by its own table and by that for all.
    pub fn granted(&self, namespace: &str) -> impl Iterator<Item = &Grant> {
        self.namespaces.get(namespace).into_iter().chain(self.namespaces.get("*"))
    }
}

fn one_matches(patterns: &[String], text: &str, namespace: &str) -> bool {
    patterns.iter().any(|pattern| matches(&pattern.replace("{namespace}", namespace), text))
}

/// Whether `text` is what `pattern` describes, whose `*` stand for any text.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}
