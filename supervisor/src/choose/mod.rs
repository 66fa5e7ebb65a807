//! Which pods join, and as what: a pure decision of annotations and configuration.
//!
//! A pod's own annotation goes before its namespace's, and that before the cluster's configuration. What an
//! annotation asks for is had only when the configuration gives it to the namespace ([`Grant`]), so that nobody
//! who may write annotations gets a stronger identity by that. A value that cannot be read or is not granted is
//! a [`Refusal`]: nothing is guessed.

mod annotations;
mod chooser;
mod policy;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use podtether_proto::node::{self, Routing, Setting, Source};

pub use annotations::{ANNOTATIONS, Key, PREFIX};
pub use chooser::{Chooser, Decision};
pub use policy::{Grant, Join};

use crate::config::{self, Config, Tailnet};
use crate::hostname::{self, Names, Whose};
use annotations::{flag, shown, unread};

/// Annotations by their full names.
pub type Annotations = BTreeMap<String, String>;

/// Most tags of one pod.
const MAX_TAGS: usize = 16;

/// What is known of a pod when it is decided about.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub pod: &'a str,
    /// Its own annotations.
    pub own: &'a Annotations,
    /// Its namespace's; none where nobody reads them.
    pub defaults: &'a Annotations,
    /// Kind of its controller, where that is known.
    pub owner: Option<&'a str>,
    /// The tailnet of the CNI network's configuration.
    pub tailnet: &'a str,
}

/// An identity-to-be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Key of a `[tailnet.NAME]` table.
    pub tailnet: String,
    /// ACL tags, sorted.
    pub tags: Vec<String>,
    /// Device names.
    pub names: Names,
    /// Whether the server may forget it while it is away.
    pub ephemeral: bool,
    /// What it uses of other nodes' routes.
    pub routing: Routing,
    /// Whether the pod waits until it has joined.
    pub required: bool,
    /// Each setting with its rule.
    pub told: node::Choice,
}

/// What is decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The pod joins nothing.
    Nothing(node::Choice),
    /// It joins.
    Join(Box<Choice>),
    /// It asks for what it cannot have.
    Refused(Refused),
}

/// Why a pod cannot be what it asks to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Each annotation that is wrong, at least one.
    pub refusals: Vec<Refusal>,
    /// Whether the pod waits until that is mended.
    pub required: bool,
    /// What was decided before.
    pub told: node::Choice,
}

/// One annotation that cannot be fulfilled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Which.
    pub key: Key,
    /// The pod's or its namespace's; the cluster's for what no annotation is at fault for.
    pub source: Source,
    /// Its value, bounded and escaped.
    pub value: String,
    /// What is wrong.
    pub why: String,
    /// What to do.
    pub fix: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Refusal { key, source, value, why, fix } = self;
        if *source == Source::Cluster {
            return write!(f, "{why}: {fix}");
        }
        let name = key.annotation();
        let whose = if *source == Source::Namespace { " of the namespace" } else { "" };
        write!(f, "annotation {name}: \"{value}\"{whose} {why}: {fix}")
    }
}

/// The annotation that counts for one setting.
#[derive(Debug, Clone, Copy)]
struct Given<'a> {
    key: Key,
    value: &'a str,
    source: Source,
}

impl Given<'_> {
    fn refuse(&self, why: impl Into<String>, fix: impl Into<String>) -> Refusal {
        let value = shown(self.value);
        Refusal { key: self.key, source: self.source, value, why: why.into(), fix: fix.into() }
    }
}

/// Collects what is decided, setting by setting.
struct Deciding<'a> {
    facts: &'a Facts<'a>,
    told: node::Choice,
    refusals: Vec<Refusal>,
}

impl<'a> Deciding<'a> {
    fn given(&self, key: Key) -> Option<Given<'a>> {
        let Facts { own, defaults, .. } = *self.facts;
        let of = |all: &'a Annotations, source| {
            all.get(&key.annotation()).map(|value| Given { key, value: value.trim(), source })
        };
        of(own, Source::Pod).or_else(|| of(defaults, Source::Namespace))
    }

    fn tell(&mut self, key: Key, value: impl Into<String>, source: Source, rule: impl Into<String>) {
        let (name, value, rule) = (key.name().to_owned(), value.into(), rule.into());
        self.told.settings.push(Setting { name, value, source, rule });
    }

    /// Takes what an annotation gave, or notes why it cannot be had.
    fn annotated<T>(
        &mut self,
        given: Given<'a>,
        read: Result<T, Refusal>,
        text: impl Fn(&T) -> String,
    ) -> Option<T> {
        match read {
            Ok(value) => {
                let rule = match given.source {
                    Source::Namespace => {
                        format!("annotation {} of namespace {}", given.key.annotation(), self.facts.namespace)
                    }
                    Source::Pod | Source::Cluster | Source::Policy => {
                        format!("annotation {} of the pod", given.key.annotation())
                    }
                };
                self.tell(given.key, text(&value), given.source, rule);
                Some(value)
            }
            Err(refusal) => {
                self.refusals.push(refusal);
                None
            }
        }
    }

    /// `true` or `false`.
    fn flag(&mut self, key: Key, default: bool, rule: &str) -> bool {
        let Some(given) = self.given(key) else {
            self.tell(key, default.to_string(), Source::Cluster, rule);
            return default;
        };
        let read = flag(given.value)
            .ok_or_else(|| given.refuse("is neither true nor false", "write \"true\" or \"false\""));
        self.annotated(given, read, bool::to_string).unwrap_or(default)
    }

    fn refused(self, required: bool) -> Verdict {
        let Deciding { mut told, refusals, .. } = self;
        told.refusals = refusals.iter().map(ToString::to_string).collect();
        Verdict::Refused(Refused { refusals, required, told })
    }
}

/// Decides about one pod.
#[must_use]
pub fn choose(facts: &Facts<'_>, config: &Config) -> Verdict {
    let mut at = Deciding { facts, told: node::Choice::default(), refusals: Vec::new() };
    if config.node.exempt_namespaces.iter().any(|name| name == facts.namespace) {
        at.tell(Key::Enabled, "false", Source::Policy, "node.exempt_namespaces has its namespace");
        return Verdict::Nothing(at.told);
    }
    at.told.notes = unread(facts);
    let default = config.node.join == Join::OptOut;
    let enabled = at.flag(Key::Enabled, default, &format!("node.join = \"{}\"", config.node.join.name()));
    let readable = at.refusals.is_empty();
    if readable && !enabled {
        return Verdict::Nothing(at.told);
    }
    let required = at.flag(Key::Required, true, "every pod waits until it has joined, unless told otherwise");
    let Some((name, tailnet)) = tailnet(&mut at, config) else {
        return at.refused(required);
    };
    let tags = tags(&mut at, config, name, tailnet);
    let names = names(&mut at, config, name, tailnet);
    let ephemeral = at.flag(Key::Ephemeral, tailnet.ephemeral, &format!("tailnet.{name}.ephemeral"));
    let exit_node = exit_node(&mut at, config, name, tailnet);
    let accept_routes =
        at.flag(Key::AcceptRoutes, tailnet.routing.accept_routes, &format!("tailnet.{name}.accept_routes"));
    if !at.refusals.is_empty() {
        return at.refused(required);
    }
    at.told.joins = true;
    Verdict::Join(Box::new(Choice {
        tailnet: name.to_owned(),
        tags,
        names,
        ephemeral,
        routing: Routing { accept_routes, exit_node },
        required,
        told: at.told,
    }))
}

/// `None` when no tailnet is the one that is asked for.
fn tailnet<'c>(at: &mut Deciding<'_>, config: &'c Config) -> Option<(&'c str, &'c Tailnet)> {
    let find =
        |name: &str| config.tailnets.get_key_value(name).map(|(name, tailnet)| (name.as_str(), tailnet));
    let Some(given) = at.given(Key::Tailnet) else {
        let name = at.facts.tailnet;
        at.tell(Key::Tailnet, name, Source::Cluster, "\"tailnet\" of the CNI network's configuration");
        let found = find(name);
        if found.is_none() {
            let known: Vec<&str> = config.tailnets.keys().map(String::as_str).collect();
            at.refusals.push(Refusal {
                key: Key::Tailnet,
                source: Source::Cluster,
                value: shown(name),
                why: format!(
                    "no tailnet is called \"{}\", as the CNI network's configuration has it",
                    shown(name)
                ),
                fix: format!("the supervisor's configuration has: {}", known.join(", ")),
            });
        }
        return found;
    };
    let namespace = at.facts.namespace;
    let allowed = given.value == at.facts.tailnet
        || config.granted(namespace).any(|grant| grant.tailnets.iter().any(|name| name == given.value));
    let read = find(given.value).filter(|_| allowed).ok_or_else(|| {
        // Which tailnets there are is nothing to everybody who may annotate.
        given.refuse(
            format!("is no tailnet that namespace {namespace} may use"),
            format!("correct it, or have the cluster's operator add it to namespace.{namespace}.tailnets"),
        )
    });
    at.annotated(given, read, |(name, _)| (*name).to_owned())
}

fn tags(at: &mut Deciding<'_>, config: &Config, name: &str, tailnet: &Tailnet) -> Vec<String> {
    let namespace = at.facts.namespace;
    let mut tags = match at.given(Key::Tags) {
        None => {
            at.tell(Key::Tags, tailnet.tags.join(","), Source::Cluster, format!("tailnet.{name}.tags"));
            tailnet.tags.clone()
        }
        Some(given) => {
            let read = read_tags(given, config, name, tailnet, namespace);
            at.annotated(given, read, |tags| tags.join(",")).unwrap_or_default()
        }
    };
    if tailnet.namespace_tag {
        let tag = format!("tag:ns-{namespace}");
        at.tell(Key::Tags, tag.clone(), Source::Policy, format!("tailnet.{name}.namespace_tag"));
        tags.push(tag);
    }
    tags.sort();
    tags.dedup();
    tags
}

fn read_tags(
    given: Given<'_>,
    config: &Config,
    name: &str,
    tailnet: &Tailnet,
    namespace: &str,
) -> Result<Vec<String>, Refusal> {
    let form = "write tag:NAME, several with commas between them";
    let tags: Vec<String> = given.value.split(',').map(|tag| tag.trim().to_owned()).collect();
    if tags.len() > MAX_TAGS {
        return Err(given.refuse(format!("names more than {MAX_TAGS} tags"), form));
    }
    if let Some(odd) = tags.iter().find(|tag| !config::is_tag(tag)) {
        return Err(given.refuse(format!("has \"{}\", which is no tag", shown(odd)), form));
    }
    if !tailnet.credentials.mints() {
        return Err(given.refuse(
            format!("asks for tags, and those of tailnet {name} are fixed by its auth key or login"),
            format!("remove the annotation, or give tailnet.{name}.credentials the kind oauth or headscale"),
        ));
    }
    let granted = |tag: &str| {
        tailnet.tags.iter().any(|own| own == tag)
            || config.granted(namespace).any(|grant| grant.has_tag(tag, namespace))
    };
    match tags.iter().find(|tag| !granted(tag)) {
        Some(tag) => Err(given.refuse(
            format!("asks for {tag}, which namespace {namespace} was not given"),
            format!("correct it, or have the cluster's operator add it to namespace.{namespace}.tags"),
        )),
        None => Ok(tags),
    }
}

fn names(at: &mut Deciding<'_>, config: &Config, name: &str, tailnet: &Tailnet) -> Names {
    let Facts { namespace, pod, owner, .. } = *at.facts;
    let whose = Whose { cluster: &config.node.cluster_name, namespace, pod, owner };
    let Some(given) = at.given(Key::Hostname) else {
        let names = hostname::names(&tailnet.hostname_template, whose);
        let rule = format!("tailnet.{name}.hostname_template = \"{}\"", tailnet.hostname_template);
        at.tell(Key::Hostname, names.wanted.clone(), Source::Cluster, rule);
        return names;
    };
    let read = read_names(given, config, whose);
    let names = at.annotated(given, read, |names| names.wanted.clone());
    names.unwrap_or_else(|| hostname::names(&tailnet.hostname_template, whose))
}

fn read_names(given: Given<'_>, config: &Config, whose: Whose<'_>) -> Result<Names, Refusal> {
    let namespace = whose.namespace;
    let form = "write one label of a-z, 0-9 and -, at most 63 bytes; {namespace}, {pod} and {workload} stand for the \
                pod's own";
    if let Err(e) = hostname::check_template(given.value) {
        return Err(given.refuse(e, form));
    }
    let mut plain = given.value.to_owned();
    for field in ["{cluster}", "{namespace}", "{pod}", "{workload}"] {
        plain = plain.replace(field, "x");
    }
    let safe = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !plain.chars().all(safe) || plain.starts_with('-') || plain.ends_with('-') || plain.len() > 63 {
        return Err(given.refuse("is no host name", form));
    }
    let names = hostname::names(given.value, whose);
    if config.granted(namespace).any(|grant| grant.has_hostname(&names.wanted, namespace)) {
        return Ok(names);
    }
    Err(given.refuse(
        format!("comes to {}, a name that namespace {namespace} was not given", names.wanted),
        format!(
            "remove the annotation, or have the cluster's operator add it to namespace.{namespace}.hostnames"
        ),
    ))
}

fn exit_node(at: &mut Deciding<'_>, config: &Config, name: &str, tailnet: &Tailnet) -> Option<String> {
    let configured = &tailnet.routing.exit_node;
    let Some(given) = at.given(Key::ExitNode) else {
        let value = configured.clone().unwrap_or_default();
        at.tell(Key::ExitNode, value, Source::Cluster, format!("tailnet.{name}.exit_node"));
        return configured.clone();
    };
    let namespace = at.facts.namespace;
    let granted = |node: &str| {
        configured.as_deref() == Some(node)
            || config.granted(namespace).any(|grant| grant.exit_nodes.iter().any(|n| n == node || n == "*"))
    };
    let read = match crate::routing::exit_node(given.value) {
        Err(_) => Err(given.refuse("is no node", "write its name, one of its addresses or its stable id")),
        Ok(Some(node)) if !granted(&node) => Err(given.refuse(
            format!("is an exit node that namespace {namespace} was not given"),
            format!("correct it, or have the cluster's operator add it to namespace.{namespace}.exit_nodes"),
        )),
        Ok(node) => Ok(node),
    };
    at.annotated(given, read, |node| node.clone().unwrap_or_default()).flatten()
}
