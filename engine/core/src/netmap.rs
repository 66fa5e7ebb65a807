//! The tailnet as control describes it, peers apart: one full message when a session starts, then deltas.
//!
//! A new session replaces everything, but only when its first message has arrived: until then the last
//! session's map stays in force, so that a control outage does not touch traffic. Peers are in the peer
//! table, which takes their part of each message.

use std::collections::BTreeMap;

use crate::filter::{MAX_CHUNKS, MAX_FILTER_BYTES, Rule};
use crate::health::{HealthMessage, Severity};
use crate::tailcfg::{
    ControlDialPlan, DerpMap, DisplayMessage, DnsConfig, MapResponse, Node, PingRequest, UnixTime,
};

/// Most health texts and display messages kept.
const MAX_MESSAGES: usize = 32;
/// Below this, a difference to the server's clock is noise.
const CLOCK_TOLERANCE_MS: i64 = 60_000;

/// The rules of the packet filter by the name of their chunk.
type Chunks = BTreeMap<String, Vec<Rule>>;

/// A message that cannot be taken; the session has to start anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// Without this node itself nothing else of a first message has a meaning.
    #[error("the first message of a map session does not contain this node")]
    FirstWithoutNode,
}

/// What one message changed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NetMapChange {
    /// A sign of life and nothing else.
    pub keep_alive: bool,
    /// First message of a session: every part is new.
    pub session: bool,
    /// This node: addresses, name, tags, expiry.
    pub self_changed: bool,
    /// MagicDNS configuration.
    pub dns_changed: bool,
    /// Relay map.
    pub derp_changed: bool,
    /// Packet filter.
    pub filter_changed: bool,
    /// Health texts or display messages.
    pub health_changed: bool,
    /// A check the server wants answered.
    pub ping_request: Option<PingRequest>,
    /// Where to find the server next time.
    pub dial_plan_changed: bool,
    /// Elements over a bound.
    pub ignored: u64,
}

/// The map. One owner; see the module's header.
#[derive(Debug, Default)]
pub struct NetMap {
    awaiting_first: bool,
    self_node: Option<Node>,
    derp_map: DerpMap,
    dns: Option<DnsConfig>,
    domain: String,
    /// `None` until a session brought a filter: then everything inbound is dropped.
    chunks: Option<Chunks>,
    /// What they take in memory.
    filter_bytes: usize,
    health: Vec<String>,
    messages: BTreeMap<String, DisplayMessage>,
    clock_offset_ms: i64,
    dial_plan: ControlDialPlan,
    /// A tailnet lock is in force.
    locked: bool,
}

impl NetMap {
    /// An empty map that waits for a session's first message.
    #[must_use]
    pub fn new() -> Self {
        Self { awaiting_first: true, ..Self::default() }
    }

    /// A new stream begins; what is known stays until its first message.
    pub fn begin_session(&mut self) {
        self.awaiting_first = true;
    }

    /// This node, once known.
    #[must_use]
    pub fn self_node(&self) -> Option<&Node> {
        self.self_node.as_ref()
    }

    /// Relay map.
    #[must_use]
    pub fn derp_map(&self) -> &DerpMap {
        &self.derp_map
    }

    /// MagicDNS configuration.
    #[must_use]
    pub fn dns(&self) -> Option<&DnsConfig> {
        self.dns.as_ref()
    }

    /// The tailnet's name.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The rules by the name of their chunk. `None` while there is no filter: drop everything.
    #[must_use]
    pub fn packet_filter(&self) -> Option<&BTreeMap<String, Vec<Rule>>> {
        self.chunks.as_ref()
    }

    /// All rules, chunks in order of their name.
    pub fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.chunks.iter().flat_map(BTreeMap::values).flatten()
    }

    /// Health texts and display messages, for people.
    pub fn health(&self) -> impl Iterator<Item = HealthMessage> {
        let texts = self.health.iter().map(|text| HealthMessage::new(Severity::Medium, text));
        texts.chain(self.messages.values().map(HealthMessage::from))
    }

    /// Where else the server can be reached.
    #[must_use]
    pub fn dial_plan(&self) -> &ControlDialPlan {
        &self.dial_plan
    }

    /// Milliseconds that this machine's clock is behind the server's, negative when it is ahead; 0 when
    /// they agree to a minute.
    #[must_use]
    pub fn clock_offset_ms(&self) -> i64 {
        self.clock_offset_ms
    }

    /// Whether a tailnet lock is in force, so that peers take signed nodes only.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.locked
    }

    /// The server's time, given ours.
    #[must_use]
    pub fn control_time(&self, wall: UnixTime) -> UnixTime {
        wall.offset_millis(self.clock_offset_ms)
    }

    /// Takes one message, or what is left of it when its peers went ahead; `wall` is this machine's time
    /// when it arrived.
    ///
    /// # Errors
    /// [`ApplyError`] when the session cannot go on; nothing was changed here then.
    pub fn apply(&mut self, message: &mut MapResponse, wall: UnixTime) -> Result<NetMapChange, ApplyError> {
        let mut change =
            NetMapChange { ping_request: message.ping_request.take(), ..NetMapChange::default() };
        if let Some(plan) = message.control_dial_plan.take() {
            change.dial_plan_changed = plan != self.dial_plan;
            self.dial_plan = plan;
        }
        if let Some(time) = message.control_time {
            let offset = time.millis_from(wall);
            self.clock_offset_ms = if offset.abs() > CLOCK_TOLERANCE_MS { offset } else { 0 };
        }
        if message.keep_alive {
            change.keep_alive = true;
            return Ok(change);
        }
        if self.awaiting_first {
            if message.node.is_none() {
                return Err(ApplyError::FirstWithoutNode);
            }
            self.start(&mut change);
        }
        self.apply_self(message, &mut change);
        self.apply_filter(message, &mut change);
        self.apply_health(message, &mut change);
        if let Some(lock) = &message.tka_info {
            let locked = !lock.disabled && !lock.head.is_empty();
            change.health_changed |= locked != self.locked;
            self.locked = locked;
        }
        Ok(change)
    }

    fn start(&mut self, change: &mut NetMapChange) {
        self.awaiting_first = false;
        change.session = true;
        change.dns_changed = true;
        change.health_changed = true;
        self.dns = None;
        self.domain.clear();
        self.health.clear();
        self.messages.clear();
        self.locked = false;
    }

    fn apply_self(&mut self, message: &mut MapResponse, change: &mut NetMapChange) {
        if let Some(node) = message.node.take() {
            change.self_changed = self.self_node.as_ref() != Some(&node);
            self.self_node = Some(node);
        }
        if let Some(update) = message.derp_map.take() {
            let before = self.derp_map.clone();
            self.derp_map.merge(update);
            change.derp_changed = before != self.derp_map;
        }
        if let Some(dns) = message.dns_config.take() {
            change.dns_changed |= self.dns.as_ref() != Some(&dns);
            self.dns = Some(dns);
        }
        if !message.domain.is_empty() {
            self.domain = std::mem::take(&mut message.domain);
        }
    }

    /// Servers send everything again when a little has changed; only what differs from before counts.
    fn apply_filter(&mut self, message: &mut MapResponse, change: &mut NetMapChange) {
        let updates = message.packet_filters.take();
        let all = updates.as_ref().is_some_and(|updates| matches!(updates.get("*"), Some(None)));
        let before = (change.session || all).then(|| {
            self.filter_bytes = 0;
            self.chunks.take()
        });
        if let Some(rules) = message.packet_filter.take() {
            // The older form comes first, so that the newer one replaces it.
            self.set_chunk(String::from("base"), rules, change);
            if all {
                self.remove_chunk("base");
            }
        }
        if let Some(updates) = updates {
            self.chunks.get_or_insert_default();
            for (name, rules) in updates {
                match rules {
                    Some(rules) => self.set_chunk(name, rules, change),
                    None => change.filter_changed |= self.remove_chunk(&name),
                }
            }
        }
        if let Some(before) = before {
            change.filter_changed = match (&before, &self.chunks) {
                (Some(before), Some(now)) => {
                    before.len() != now.len()
                        || before.iter().zip(now).any(|(a, b)| a.0 != b.0 || !same(a.1, b.1))
                }
                (before, now) => before.is_some() != now.is_some(),
            };
        }
    }

    fn remove_chunk(&mut self, name: &str) -> bool {
        let removed = self.chunks.as_mut().and_then(|chunks| chunks.remove(name));
        self.filter_bytes -= removed.as_ref().map_or(0, |rules| footprint(name, rules));
        removed.is_some()
    }

    /// Rules over the bounds are left out, which opens nothing.
    fn set_chunk(&mut self, name: String, mut rules: Vec<Rule>, change: &mut NetMapChange) {
        if self.chunks.get_or_insert_default().get(&name).is_some_and(|before| same(before, &rules)) {
            return;
        }
        change.filter_changed = true;
        self.remove_chunk(&name);
        let mut left = MAX_FILTER_BYTES.saturating_sub(self.filter_bytes).saturating_sub(name.len());
        let fit = rules.iter().take_while(|rule| {
            let rest = left.checked_sub(rule.footprint());
            left = rest.unwrap_or(left);
            rest.is_some()
        });
        let fit = fit.count();
        let chunks = self.chunks.get_or_insert_default();
        if chunks.len() >= MAX_CHUNKS || fit < rules.len() {
            change.ignored += u64::try_from(rules.len() - fit).unwrap_or(1).max(1);
            rules.truncate(fit);
        }
        if chunks.len() < MAX_CHUNKS {
            rules.shrink_to_fit();
            self.filter_bytes += footprint(&name, &rules);
            chunks.insert(name, rules);
        }
    }

    fn apply_health(&mut self, message: &mut MapResponse, change: &mut NetMapChange) {
        if let Some(mut health) = message.health.take() {
            health.truncate(MAX_MESSAGES);
            change.health_changed |= health != self.health;
            self.health = health;
        }
        if let Some(updates) = message.display_messages.take() {
            if matches!(updates.get("*"), Some(None)) {
                self.messages.clear();
            }
            for (id, text) in updates {
                match text {
                    Some(text) if self.messages.len() < MAX_MESSAGES || self.messages.contains_key(&id) => {
                        self.messages.insert(id, text);
                    }
                    Some(_) => change.ignored += 1,
                    None => {
                        self.messages.remove(&id);
                    }
                }
            }
            change.health_changed = true;
        }
    }
}

fn same(a: &[Rule], b: &[Rule]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.is(b))
}

fn footprint(name: &str, rules: &[Rule]) -> usize {
    name.len() + rules.iter().map(Rule::footprint).sum::<usize>()
}

#[cfg(test)]
mod tests;
