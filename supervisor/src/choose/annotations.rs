//! The annotations' names, and what their values may look like.

use podtether_proto::node::Source;

use super::{Annotations, Facts};

/// Before every key.
pub const PREFIX: &str = "tailscale.com/";
/// Characters of a value that a sentence repeats.
const MAX_SHOWN: usize = 60;
/// What other programs read below the same prefix, on pods or on namespaces.
const OTHERS: [&str; 5] = ["expose", "proxy-class", "proxy-group", "tailnet-fqdn", "tailnet-ip"];

/// What an annotation is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// Whether the pod joins.
    Enabled,
    /// ACL tags.
    Tags,
    /// Device name.
    Hostname,
    /// Whether the server may forget it.
    Ephemeral,
    /// Node that carries everything else.
    ExitNode,
    /// Whether routes of subnet routers are used.
    AcceptRoutes,
    /// Whether the pod waits until it has joined.
    Required,
    /// Which tailnet.
    Tailnet,
}

/// Every key.
pub const ANNOTATIONS: [Key; 8] = [
    Key::Enabled,
    Key::Tags,
    Key::Hostname,
    Key::Ephemeral,
    Key::ExitNode,
    Key::AcceptRoutes,
    Key::Required,
    Key::Tailnet,
];

impl Key {
    /// Behind the prefix.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Key::Enabled => "enabled",
            Key::Tags => "tags",
            Key::Hostname => "hostname",
            Key::Ephemeral => "ephemeral",
            Key::ExitNode => "exit-node",
            Key::AcceptRoutes => "accept-routes",
            Key::Required => "required",
            Key::Tailnet => "tailnet",
        }
    }

    /// In full.
    #[must_use]
    pub fn annotation(self) -> String {
        format!("{PREFIX}{}", self.name())
    }
}

/// `true` or `false`, and nothing that looks like it.
pub(super) fn flag(text: &str) -> Option<bool> {
    match text {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

/// What is told of a value that somebody wrote.
pub(super) fn shown(value: &str) -> String {
    let mut text: String = value.chars().take(MAX_SHOWN).flat_map(char::escape_debug).collect();
    if value.chars().nth(MAX_SHOWN).is_some() {
        text.push('…');
    }
    text
}

/// Annotations that look like ours and are none, a sentence each.
pub(super) fn unread(facts: &Facts<'_>) -> Vec<String> {
    let levels = [(facts.own, Source::Pod), (facts.defaults, Source::Namespace)];
    levels.into_iter().flat_map(|(all, source)| unread_of(all, source)).collect()
}

fn unread_of(all: &Annotations, source: Source) -> Vec<String> {
    let known = |name: &str| ANNOTATIONS.iter().any(|key| key.name() == name) || OTHERS.contains(&name);
    let ours = all.keys().filter_map(|key| key.strip_prefix(PREFIX)).filter(|name| !known(name));
    let sentence = |name: &str| {
        let names = ANNOTATIONS.map(Key::name).join(", ");
        format!("annotation {PREFIX}{} of the {source} is not read: there are {names}", shown(name))
    };
    ours.take(ANNOTATIONS.len()).map(sentence).collect()
}
