//! What an engine says, made fit to be kept, compared and shown. An engine reads what strangers send, so
//! one may have been broken into: it gets to say only so much, in printable text, and only so often.

use std::time::{Duration, Instant};

use ipnet::IpNet;
use podtether_proto::engine::{EngineMetrics, EngineStatus, NodeState};
use podtether_proto::sandbox::Step;

/// Characters of a sentence, a URL and a name.
const MAX_SENTENCE: usize = 500;
const MAX_URL: usize = 2048;
const MAX_NAME: usize = 255;
/// Entries of the lists.
const MAX_ADDRESSES: usize = 8;
const MAX_TAGS: usize = 64;
const MAX_HEALTH: usize = 32;
const MAX_ROUTES: usize = 4096;
/// Reasons for drops, and characters of each.
const MAX_REASONS: usize = 96;
const MAX_REASON: usize = 48;
/// What counts are added up under whose reason is no label.
pub const OTHER: &str = "other";

/// Cuts `text` to `most` characters, none of which moves a cursor.
pub fn tame(text: &mut String, most: usize) {
    if text.chars().take(most + 1).any(char::is_control) || text.len() > most {
        *text = text.chars().take(most).map(|c| if c.is_control() { ' ' } else { c }).collect();
    }
}

/// A status without what is too long, too much or not printable.
#[must_use]
pub fn status(mut status: EngineStatus) -> EngineStatus {
    match &mut status.state {
        NodeState::Connecting { reason } => tame(reason, MAX_SENTENCE),
        NodeState::NeedsLogin { url } => tame(url, MAX_URL),
        NodeState::Waiting | NodeState::NeedsApproval | NodeState::Running | NodeState::LoggedOut => {}
    }
    if let Some(node) = &mut status.node {
        tame(&mut node.name, MAX_NAME);
        tame(&mut node.stable_id, MAX_NAME);
        node.addresses.retain(usable);
        node.addresses.truncate(MAX_ADDRESSES);
        node.tags.truncate(MAX_TAGS);
        for tag in &mut node.tags {
            tame(tag, MAX_NAME);
        }
    }
    status.health.truncate(MAX_HEALTH);
    for problem in &mut status.health {
        tame(&mut problem.title, MAX_SENTENCE);
        tame(&mut problem.text, MAX_SENTENCE);
        tame(&mut problem.severity, MAX_NAME);
    }
    status.accepted_routes.truncate(MAX_ROUTES);
    if let Some(id) = &mut status.exit_node_id {
        tame(id, MAX_NAME);
    }
    // By the names that are known: they become labels.
    status.sandbox.retain(|report| Step::ALL.iter().any(|step| step.name() == report.step));
    status.sandbox.truncate(Step::ALL.len());
    for report in &mut status.sandbox {
        tame(&mut report.why, MAX_SENTENCE);
    }
    status
}

/// Whether a node can have this address: one host's, that means something beyond the machine.
fn usable(net: &IpNet) -> bool {
    let ip = net.addr();
    let local = match ip {
        std::net::IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        std::net::IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    net.prefix_len() == net.max_prefix_len()
        && !(local || ip.is_loopback() || ip.is_multicast() || ip.is_unspecified())
}

/// Drops by reason as labels: few, short, of `a` to `z`, digits and `_`; the rest together as [`OTHER`].
#[must_use]
pub fn drops(metrics: &EngineMetrics) -> Vec<(&str, u64)> {
    let mut kept: Vec<(&str, u64)> = Vec::new();
    for (reason, count) in &metrics.drops {
        let is_label = (1..=MAX_REASON).contains(&reason.len())
            && reason.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        let label = if is_label && kept.len() < MAX_REASONS { reason.as_str() } else { OTHER };
        match kept.iter_mut().find(|(known, _)| *known == label) {
            Some((_, sum)) => *sum = sum.saturating_add(*count),
            None => kept.push((label, *count)),
        }
    }
    kept
}

/// A name that control chose, as a label.
#[must_use]
pub fn label(name: &str) -> String {
    let mut label: String = name.chars().take(MAX_REASON).collect();
    tame(&mut label, MAX_REASON);
    label
}

/// Lets something happen so often in the long run, and so many times at once.
#[derive(Debug)]
pub struct Pace {
    every: Duration,
    burst: u32,
    full_at: Option<Instant>,
}

impl Pace {
    /// One in `every`, `burst` at once.
    #[must_use]
    pub fn new(every: Duration, burst: u32) -> Self {
        Self { every, burst, full_at: None }
    }

    /// How long the next one has to wait; it then counts as having happened.
    pub fn wait(&mut self, now: Instant) -> Duration {
        let full_at = self.full_at.map_or(now, |at| at.max(now)) + self.every;
        self.full_at = Some(full_at);
        full_at.saturating_duration_since(now).saturating_sub(self.every * self.burst)
    }

    /// Whether one may happen at once; if not, it does not count.
    pub fn take(&mut self, now: Instant) -> bool {
        let full_at = self.full_at.map_or(now, |at| at.max(now)) + self.every;
        let allowed = full_at.saturating_duration_since(now) <= self.every * self.burst;
        if allowed {
            self.full_at = Some(full_at);
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podtether_proto::engine::{HealthMessage, SelfNode};
    use podtether_proto::sandbox::{StepReport, StepState};

    #[test]
    fn a_status_is_bounded_and_printable() {
        let long = "x\n\u{1b}[31m".repeat(100_000);
        let node = SelfNode {
            name: long.clone(),
            addresses: [
                "100.64.0.1/32",
                "fd7a:115c:a1e0::1/128",
                "0.0.0.0/0",
                "127.0.0.1/32",
                "::1/128",
                "fe80::1/128",
                "224.0.0.1/32",
                "10.0.0.0/8",
                "169.254.1.1/32",
                "255.255.255.255/32",
            ]
            .map(|net| net.parse().unwrap())
            .into(),
            tags: vec![long.clone(); 1000],
            stable_id: long.clone(),
            key_expiry_unix_s: None,
        };
        let problem = HealthMessage { title: long.clone(), text: long.clone(), severity: long.clone() };
        let said = EngineStatus {
            milestones: Default::default(),
            seq: 1,
            state: NodeState::Connecting { reason: long.clone() },
            control_connected: true,
            control_age_ms: None,
            node: Some(node),
            home_derp: 0,
            health: vec![problem; 1000],
            routes_version: 0,
            accepted_routes: vec!["10.0.0.0/8".parse().unwrap(); 100_000],
            exit_node_id: Some(long.clone()),
            sandbox: (0..2000)
                .map(|n| StepReport {
                    step: if n % 2 == 0 { "calls" } else { "ca\nlls" }.into(),
                    state: StepState::Held,
                    why: long.clone(),
                })
                .collect(),
        };
        let tamed = status(said);
        let text = format!("{tamed:?}");
        assert!(text.len() < 200_000, "{}", text.len());
        assert!(!text.contains("\\n") && !text.contains("\\u{1b}"));
        assert!(tamed.sandbox.len() <= Step::ALL.len() && tamed.sandbox.iter().all(|s| s.step == "calls"));
        let addresses = tamed.node.unwrap().addresses;
        assert_eq!(
            addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["100.64.0.1/32", "fd7a:115c:a1e0::1/128"]
        );
    }

    #[test]
    fn what_a_sound_engine_says_is_left_alone() {
        let mut text = "déjà vu, not long".to_owned();
        tame(&mut text, MAX_SENTENCE);
        assert_eq!(text, "déjà vu, not long");
    }

    #[test]
    fn labels_are_few_and_plain() {
        let odd = ["", "a b", "A", "x\n", "é", &"a".repeat(49), "a\"} 1\nforged{x=\""];
        let mut said: Vec<(String, u64)> = odd.iter().map(|reason| ((*reason).to_owned(), 1)).collect();
        said.push(("bad_crypto".into(), u64::MAX));
        said.push(("bad_crypto".into(), 2));
        said.extend((0..10_000).map(|n| (format!("made_up_{n}"), 1)));
        let metrics = EngineMetrics { drops: said, ..EngineMetrics::default() };
        let kept = drops(&metrics);
        assert!(kept.len() <= MAX_REASONS + 1, "{}", kept.len());
        assert_eq!(kept[..2], [(OTHER, kept[0].1), ("bad_crypto", u64::MAX)]);
        assert!(kept[0].1 > 7 + 9_000);
    }

    #[test]
    fn a_pace_lets_a_burst_through_and_then_one_at_a_time() {
        let now = Instant::now();
        let mut pace = Pace::new(Duration::from_millis(100), 3);
        let waits: Vec<u128> = (0..5).map(|_| pace.wait(now).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100, 200]);
        let mut pace = Pace::new(Duration::from_millis(100), 3);
        assert_eq!((0..50).filter(|_| pace.take(now)).count(), 3);
        assert!(pace.take(now + Duration::from_millis(100)));
        assert!(!pace.take(now + Duration::from_millis(100)));
    }
}
