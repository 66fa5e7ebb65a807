//! One rule: its JSON as control sent it, and what that comes to.
//!
//! Servers send the whole filter again when one node joins. So the JSON is kept in place of the texts in
//! it: a rule that is byte for byte one of those there is that rule, before anything of it is decoded, and
//! a snapshot takes it as it is. Rules share their source sets, since policies name few groups.

use std::collections::HashMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::sync::{Arc, Weak};

use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use super::compile::{Address, Set, Sources, Span, Spans, parse_set, protocols};
use crate::tailcfg::{CapGrant, FilterRule, NetPortRange, list, or_default};

/// A rule of the packet filter, shared between the netmap, the filter in force and the decoder.
#[derive(Clone)]
pub struct Rule(Arc<Kept>);

/// See the module.
pub(super) struct Kept {
    json: Box<[u8]>,
    pub(super) v4: Part<u32>,
    pub(super) v6: Part<u128>,
    pub(super) protocols: Box<[u8]>,
    pub(super) grants: Box<[CapGrant]>,
    /// Sources and destinations that did not parse.
    pub(super) odd: (usize, usize),
    /// Of what decides about packets. Two rules that differ in it are counted apart.
    pub(super) print: u64,
}

/// Addresses, and ports of theirs.
type Destination<A> = (Span<A>, (u16, u16));

/// One address family's part of a rule.
pub(super) struct Part<A> {
    pub(super) sources: Arc<Sources<A>>,
    pub(super) destinations: Box<[Destination<A>]>,
}

impl Rule {
    pub(super) fn kept(&self) -> &Kept {
        &self.0
    }

    /// Whether both are one: what a decoder gives for the same JSON.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Its JSON, as control sent it.
    pub(crate) fn json(&self) -> &[u8] {
        &self.0.json
    }

    /// About how many bytes it takes in memory; sources that it shares count for each rule.
    #[must_use]
    pub fn footprint(&self) -> usize {
        let Kept { json, v4, v6, grants, .. } = &*self.0;
        let grants: usize = grants.iter().map(CapGrant::footprint).sum();
        // With the reference counts, and the entry of a book.
        std::mem::size_of::<Kept>() + 64 + json.len() + v4.footprint() + v6.footprint() + grants
    }

    #[cfg(test)]
    pub(crate) fn decoded(&self) -> FilterRule {
        serde_json::from_slice(self.json()).unwrap()
    }
}

impl<A> Part<A> {
    fn footprint(&self) -> usize {
        std::mem::size_of_val(&*self.destinations) + self.sources.footprint()
    }
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        self.is(other) || self.0.json == other.0.json
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0.json))
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let value: Value = serde_json::from_slice(&self.0.json).map_err(serde::ser::Error::custom)?;
        value.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = Value::deserialize(deserializer)?.to_string();
        RuleBook::default().rule(json.as_bytes()).map_err(serde::de::Error::custom)
    }
}

impl From<FilterRule> for Rule {
    fn from(rule: FilterRule) -> Self {
        RuleBook::default().rule_of(&rule)
    }
}

/// Rules that are in use somewhere, to be found by their JSON. It keeps none of them alive.
#[derive(Default)]
pub struct RuleBook {
    rules: HashMap<u64, Weak<Kept>>,
    v4: HashMap<u64, Weak<Sources<u32>>>,
    v6: HashMap<u64, Weak<Sources<u128>>>,
    decoded: u64,
}

impl fmt::Debug for RuleBook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuleBook").field("rules", &self.rules.len()).finish_non_exhaustive()
    }
}

impl RuleBook {
    /// The rule with this JSON; decoded only if it is none of those there.
    ///
    /// # Errors
    /// When it is no rule, or a part that narrows it does not parse.
    pub fn rule(&mut self, json: &[u8]) -> Result<Rule, serde_json::Error> {
        let hash = hash_of(json);
        if let Some(rule) = self.rules.get(&hash).and_then(Weak::upgrade).filter(|rule| *rule.json == *json) {
            return Ok(Rule(rule));
        }
        self.decoded += 1;
        let Wire { sources, dst_ports, ip_proto, cap_grant } = serde_json::from_slice(json)?;
        let SourceTexts { v4, v6, caps, mut odd } = sources;
        let (mut to4, mut to6) = (Vec::new(), Vec::new());
        for to in &dst_ports {
            let ports = (to.ports.first, to.ports.last);
            match parse_set(&to.ip) {
                Some(Set::Cap(_)) | None => odd.1 += 1,
                Some(set) => {
                    to4.extend(set.span().map(|span| (span, ports)));
                    to6.extend(set.span().map(|span| (span, ports)));
                }
            }
        }
        let v4 = Part { sources: intern(&mut self.v4, v4, &caps), destinations: to4.into() };
        let v6 = Part { sources: intern(&mut self.v6, v6, &caps), destinations: to6.into() };
        let protocols: Box<[u8]> = protocols(&ip_proto).into();
        let print = hash_of(&(&*v4.sources, &*v6.sources, &v4.destinations, &v6.destinations, &protocols));
        let json = json.into();
        let kept = Arc::new(Kept { json, v4, v6, protocols, grants: cap_grant.into(), odd, print });
        self.rules.insert(hash, Arc::downgrade(&kept));
        Ok(Rule(kept))
    }

    /// The rule that says this.
    pub(super) fn rule_of(&mut self, rule: &FilterRule) -> Rule {
        // Its keys are strings and nothing else can fail; an empty object opens nothing.
        let json = serde_json::to_vec(rule).unwrap_or_default();
        let empty = |_| RuleBook::default().rule_of(&FilterRule::default());
        self.rule(&json).unwrap_or_else(empty)
    }

    /// Forgets rules that are in use nowhere any more.
    pub fn sweep(&mut self) {
        self.rules.retain(|_, rule| rule.strong_count() > 0);
        self.v4.retain(|_, sources| sources.strong_count() > 0);
        self.v6.retain(|_, sources| sources.strong_count() > 0);
    }

    /// How many rules had to be decoded so far.
    #[must_use]
    pub fn decoded(&self) -> u64 {
        self.decoded
    }
}

/// Not for tables that others fill: whoever finds two of one hash has the second one decoded again.
fn hash_of<T: Hash + ?Sized>(what: &T) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

fn intern<A: Address>(
    known: &mut HashMap<u64, Weak<Sources<A>>>,
    spans: Vec<Span<A>>,
    caps: &[Box<str>],
) -> Arc<Sources<A>> {
    let sources = Sources { spans: Spans::new(spans), caps: caps.into() };
    let hash = hash_of(&sources);
    if let Some(same) = known.get(&hash).and_then(Weak::upgrade).filter(|same| **same == sources) {
        return same;
    }
    let sources = Arc::new(sources);
    known.insert(hash, Arc::downgrade(&sources));
    sources
}

/// [`FilterRule`] as it is decoded here: no text of a source is copied.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Wire {
    #[serde(rename = "SrcIPs")]
    sources: SourceTexts,
    #[serde(deserialize_with = "list")]
    dst_ports: Vec<NetPortRange>,
    #[serde(rename = "IPProto", deserialize_with = "or_default")]
    ip_proto: Vec<i32>,
    #[serde(deserialize_with = "list")]
    cap_grant: Vec<CapGrant>,
}

#[derive(Default)]
struct SourceTexts {
    v4: Vec<Span<u32>>,
    v6: Vec<Span<u128>>,
    caps: Vec<Box<str>>,
    odd: (usize, usize),
}

impl SourceTexts {
    fn add(&mut self, text: &str) {
        match parse_set(text) {
            Some(Set::Cap(cap)) => self.caps.push(cap.into()),
            Some(set) => {
                self.v4.extend(set.span());
                self.v6.extend(set.span());
            }
            None => self.odd.0 += 1,
        }
    }
}

impl<'de> Deserialize<'de> for SourceTexts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = SourceTexts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of strings or null")
            }

            fn visit_unit<E>(self) -> Result<SourceTexts, E> {
                Ok(SourceTexts::default())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<SourceTexts, A::Error> {
                let mut texts = SourceTexts::default();
                while seq.next_element_seed(Add(&mut texts))?.is_some() {}
                Ok(texts)
            }
        }

        struct Add<'a>(&'a mut SourceTexts);
        impl<'de> DeserializeSeed<'de> for Add<'_> {
            type Value = ();

            fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
                deserializer.deserialize_str(self)
            }
        }
        impl Visitor<'_> for Add<'_> {
            type Value = ();

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E>(self, text: &str) -> Result<(), E> {
                self.0.add(text);
                Ok(())
            }
        }
        deserializer.deserialize_any(Texts)
    }
}
