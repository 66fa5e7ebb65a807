//! What each event may cost, and whether it cost more: pure, so that it can be shown to be able to fail.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use super::schedule::{Event, Kind};

/// An engine that does not answer is killed within this.
pub const HANG_WITHIN: Duration = Duration::from_secs(6);

/// One end of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// A pod of the node that is hurt.
    Home(usize),
    /// A pod of the other node.
    Away(usize),
}

/// What pings of one pair saw while an event happened, from the end of the event before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairSeen {
    /// Who pings whom.
    pub ends: [End; 2],
    /// Requests.
    pub sent: u64,
    /// Those that had no reply, however late.
    pub lost: u64,
}

/// What was seen of one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// What was done.
    pub event: Event,
    /// Every pair.
    pub pairs: Vec<PairSeen>,
    /// The figure that the event is judged by, absent when it never ended: silence of the victim for
    /// killed engines (after its death for stopped ones), time until all engines are taken up for
    /// supervisors, until every pod carries traffic for everything, until all is as before for outages.
    pub figure: Option<Duration>,
    /// Of a stopped engine: until it was dead.
    pub killed_after: Option<Duration>,
    /// Of a killed supervisor: until the next one has also looked at every pod's link.
    pub looked_at: Option<Duration>,
    /// Home pods whose engine is another process than before.
    pub replaced: BTreeSet<usize>,
    /// Addresses, interface, ports, hardware address or tailnet entry of a pod that are not what they were.
    pub changed: Vec<String>,
    /// Pods that do not run.
    pub missing: Vec<String>,
    /// TCP connections that broke or carried a wrong byte.
    pub broken: Vec<String>,
}

/// What pods that came and went meanwhile saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChurnSeen {
    /// From the first try of an ADD to its success.
    pub joins: Vec<Duration>,
    /// Failures while the supervisor or control was away: the runtime tries again.
    pub excused: Vec<String>,
    /// All others.
    pub failures: Vec<String>,
}

/// All of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Events in order.
    pub events: Vec<Observed>,
    /// Pods that came and went.
    pub churn: ChurnSeen,
    /// Found after the last pod left.
    pub left_over: Vec<String>,
    /// TCP connections that did not carry on at the end.
    pub stuck: Vec<String>,
}

/// A line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The event.
    pub what: &'static str,
    /// How often.
    pub count: usize,
    /// Lost pings of pairs that the event must not touch, and all that those sent.
    pub others: (u64, u64),
    /// p50, p99 and longest of its figure; absent without one.
    pub figures: Option<[Duration; 3]>,
    /// What it is held to.
    pub bar: &'static str,
    /// Whether it holds.
    pub met: bool,
}

/// The judgement.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The table.
    pub rows: Vec<Row>,
    /// What must not happen at any speed, a sentence each.
    pub breaches: Vec<String>,
}

/// Whether the event may cost this pair packets.
#[must_use]
pub fn may_lose(event: &Event, ends: [End; 2]) -> bool {
    let home = |end: &End| matches!(end, End::Home(_));
    match event {
        Event::EngineKill { victim } | Event::EngineStop { victim } | Event::MemoryBomb { victim } => {
            ends.contains(&End::Home(*victim))
        }
        Event::KillEverything { .. } => ends.iter().any(home),
        Event::LinkDown { .. } => home(&ends[0]) != home(&ends[1]),
        Event::Handover { .. }
        | Event::SupervisorKill { .. }
        | Event::ControlAway { .. }
        | Event::DerpAway { .. }
        | Event::DevnetAway { .. } => false,
    }
}

/// Which of `pods` home pods have another engine after the event.
fn replaces(event: &Event, pods: usize) -> BTreeSet<usize> {
    match event {
        Event::EngineKill { victim }
        | Event::EngineStop { victim }
        | Event::MemoryBomb { victim }
        | Event::Handover { victim } => BTreeSet::from([*victim]),
        Event::KillEverything { .. } => (0..pods).collect(),
        Event::SupervisorKill { .. }
        | Event::ControlAway { .. }
        | Event::DerpAway { .. }
        | Event::DevnetAway { .. }
        | Event::LinkDown { .. } => BTreeSet::new(),
    }
}

/// What is wrong with one event, whatever time it took.
#[must_use]
pub fn breaches(number: usize, seen: &Observed, pods: usize) -> Vec<String> {
    let mut found = Vec::new();
    let mut say = |text: String| found.push(format!("event {number}, {:?}: {text}", seen.event));
    for pair in seen.pairs.iter().filter(|pair| pair.lost > 0 && !may_lose(&seen.event, pair.ends)) {
        let [from, to] = pair.ends;
        say(format!("{from:?} lost {} of {} pings to {to:?}", pair.lost, pair.sent));
    }
    let expected = replaces(&seen.event, pods);
    if seen.missing.is_empty() && seen.replaced != expected {
        say(format!("new engines for {:?}, not for {expected:?}", seen.replaced));
    }
    if seen.figure.is_none() {
        say("not over within its limit".into());
    }
    if seen.event.kind() == Kind::EngineStop && seen.killed_after.is_none() {
        say("the stopped engine was not killed".into());
    }
    for text in &seen.missing {
        say(format!("pod lost: {text}"));
    }
    for text in &seen.changed {
        say(format!("changed: {text}"));
    }
    for text in &seen.broken {
        say(format!("TCP broke: {text}"));
    }
    found
}

const MS: fn(u64) -> Duration = Duration::from_millis;

/// The name of a kind, its bar in words, and the bounds of p50, p99 and longest.
fn bar(kind: Kind) -> (&'static str, &'static str, [Duration; 3]) {
    let restart = ("p50 50 ms, p99 200 ms", [MS(50), MS(200), Duration::MAX]);
    let all = |ms| [Duration::MAX, Duration::MAX, MS(ms)];
    match kind {
        Kind::EngineKill => ("engine kill -9: gap", restart.0, restart.1),
        Kind::EngineStop => ("engine hangs: gap after its death", restart.0, restart.1),
        Kind::MemoryBomb => ("engine out of memory: gap", restart.0, restart.1),
        Kind::Handover => {
            ("planned handover: gap of 1 ms pings", "p50 10 ms, p99 200 ms", [MS(10), MS(200), Duration::MAX])
        }
        Kind::SupervisorKill => ("supervisor kill -9: all engines taken up", "1 s", all(1000)),
        Kind::KillEverything => ("everything kill -9: all pods carry traffic", "3 s", all(3000)),
        Kind::ControlAway => ("control away: back in session", "5 s", all(5000)),
        Kind::DerpAway => ("DERP away: back on the relay", "5 s", all(5000)),
        Kind::DevnetAway => ("control and DERP away: back on both", "5 s", all(5000)),
        Kind::LinkDown => ("uplink down: traffic after it is up", "5 s", all(5000)),
    }
}

/// p50, p99 (nearest rank) and longest.
#[must_use]
pub fn percentiles(mut times: Vec<Duration>) -> Option<[Duration; 3]> {
    times.sort_unstable();
    let at = |per_cent: usize| times.get((times.len() * per_cent).div_ceil(100).saturating_sub(1)).copied();
    Some([at(50)?, at(99)?, at(100)?])
}

/// Judges a run with `pods` home pods.
#[must_use]
pub fn judge(seen: &Seen, pods: usize) -> Report {
    let mut report = Report::default();
    for (number, event) in (1..).zip(&seen.events) {
        report.breaches.extend(breaches(number, event, pods));
    }
    for kind in Kind::ALL {
        let events: Vec<&Observed> = seen.events.iter().filter(|e| e.event.kind() == kind).collect();
        if events.is_empty() {
            continue;
        }
        let (what, bar, bounds) = bar(kind);
        let others = events
            .iter()
            .flat_map(|e| e.pairs.iter().filter(|pair| !may_lose(&e.event, pair.ends)))
            .fold((0, 0), |(lost, sent), pair| (lost + pair.lost, sent + pair.sent));
        let figures = percentiles(events.iter().filter_map(|e| e.figure).collect());
        let fast = figures.is_some_and(|f| f.iter().zip(bounds).all(|(figure, bound)| *figure <= bound));
        let met = fast && others.0 == 0 && events.iter().all(|e| e.figure.is_some());
        report.rows.push(Row { what, count: events.len(), others, figures, bar, met });
        if kind == Kind::EngineStop {
            let figures = percentiles(events.iter().filter_map(|e| e.killed_after).collect());
            let met = figures.is_some_and(|[_, _, longest]| longest <= HANG_WITHIN);
            let what = "engine hangs: until killed";
            report.rows.push(Row { what, count: events.len(), others, figures, bar: "6 s", met });
        }
    }
    let looked_at = percentiles(seen.events.iter().filter_map(|e| e.looked_at).collect());
    if let Some(row) = report.rows.iter().position(|row| row.what == bar(Kind::SupervisorKill).0)
        && looked_at.is_some()
    {
        let what = "supervisor kill -9: all links looked at";
        let row_after = Row { what, figures: looked_at, bar: "none", met: true, ..report.rows[row].clone() };
        report.rows.insert(row + 1, row_after);
    }
    let churn = &seen.churn;
    if !churn.joins.is_empty() || !churn.failures.is_empty() {
        report.rows.push(Row {
            what: "pods come and go: ADD, tries included",
            count: churn.joins.len(),
            others: (0, 0),
            figures: percentiles(churn.joins.clone()),
            bar: "no failure unexcused",
            met: churn.failures.is_empty(),
        });
    }
    report.breaches.extend(churn.failures.iter().map(|text| format!("churn: {text}")));
    report.breaches.extend(seen.stuck.iter().map(|text| format!("TCP stuck at the end: {text}")));
    report.breaches.extend(seen.left_over.iter().map(|text| format!("left over: {text}")));
    report
}

impl Report {
    /// No breach and every bar met.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.breaches.is_empty() && !self.rows.is_empty() && self.rows.iter().all(|row| row.met)
    }

    /// The table as text.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut line = |cells: [&str; 8]| {
            let [what, count, others, p50, p99, max, bar, ok] = cells;
            let line =
                format!("{what:<43} {count:>5}  {others:<13} {p50:>8} {p99:>8} {max:>8}  {bar:<22} {ok}");
            let _ = writeln!(text, "{}", line.trim_end());
        };
        line(["event", "count", "others lost", "p50", "p99", "max", "bar", ""]);
        for row in &self.rows {
            let others = format!("{}/{}", row.others.0, row.others.1);
            let [p50, p99, max] =
                row.figures.map_or([const { String::new() }; 3], |figures| figures.map(milliseconds));
            let ok = if row.met { "ok" } else { "MISSED" };
            line([row.what, &row.count.to_string(), &others, &p50, &p99, &max, row.bar, ok]);
        }
        text
    }
}

fn milliseconds(time: Duration) -> String {
    format!("{} ms", time.as_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PODS: usize = 3;

    fn good(event: Event) -> Observed {
        let pair = |ends| PairSeen { ends, sent: 100, lost: 0 };
        Observed {
            event,
            pairs: vec![
                pair([End::Away(0), End::Home(0)]),
                pair([End::Away(1), End::Home(1)]),
                pair([End::Home(1), End::Home(2)]),
                pair([End::Away(0), End::Away(1)]),
            ],
            figure: Some(MS(if event.kind() == Kind::Handover { 5 } else { 40 })),
            killed_after: (event.kind() == Kind::EngineStop).then(|| MS(5000)),
            looked_at: None,
            replaced: replaces(&event, PODS),
            changed: Vec::new(),
            missing: Vec::new(),
            broken: Vec::new(),
        }
    }

    fn one_of_each() -> [Event; 10] {
        let (down, away) = (MS(100), MS(100));
        [
            Event::EngineKill { victim: 0 },
            Event::EngineStop { victim: 0 },
            Event::MemoryBomb { victim: 0 },
            Event::Handover { victim: 0 },
            Event::SupervisorKill { down },
            Event::KillEverything { down },
            Event::ControlAway { away },
            Event::DerpAway { away },
            Event::DevnetAway { away },
            Event::LinkDown { away },
        ]
    }

    fn run(events: Vec<Observed>) -> Report {
        judge(&Seen { events, ..Seen::default() }, PODS)
    }

    #[test]
    fn a_run_as_it_should_be_passes() {
        let report = run(one_of_each().map(good).into());
        assert_eq!(report.breaches, [""; 0]);
        assert!(report.passed(), "{}", report.table());
        assert_eq!(report.rows.len(), 11, "a hang has two rows");
        assert!(!run(Vec::new()).passed(), "a run without events shows nothing");
    }

    #[test]
    fn who_may_lose() {
        // Per event: the pairs of `good` that may lose.
        let one = [1, 0, 0, 0];
        let table = [one, one, one, [0; 4], [0; 4], [1, 1, 1, 0], [0; 4], [0; 4], [0; 4], [1, 1, 0, 0]];
        for (event, allowed) in one_of_each().into_iter().zip(table) {
            for (index, allowed) in allowed.into_iter().enumerate() {
                let mut seen = good(event);
                seen.pairs[index].lost = 1;
                let report = run(vec![seen]);
                assert_eq!(report.passed(), allowed == 1, "{event:?}, pair {index}");
                assert_eq!(report.breaches.is_empty(), allowed == 1, "{event:?}, pair {index}");
            }
        }
    }

    #[test]
    fn whatever_must_not_happen_is_a_breach() {
        type Spoil = fn(&mut Observed);
        let spoils: [(&str, Spoil); 6] = [
            ("changed", |seen| seen.changed.push("ifindex".into())),
            ("lost", |seen| seen.missing.push("pod 1".into())),
            ("reset", |seen| seen.broken.push("connection 1".into())),
            ("another engine died, or the victim did not", |seen| {
                if !seen.replaced.remove(&1) {
                    seen.replaced.insert(1);
                }
            }),
            ("no end", |seen| seen.figure = None),
            ("too slow", |seen| seen.figure = Some(MS(5001))),
        ];
        for event in one_of_each() {
            for (what, spoil) in spoils {
                let mut seen = good(event);
                spoil(&mut seen);
                let report = run(vec![good(event), seen]);
                assert!(!report.passed(), "{event:?}: {what}");
                assert_eq!(report.breaches.is_empty(), what == "too slow", "{event:?}: {what}");
            }
        }
        let mut hang = good(Event::EngineStop { victim: 0 });
        hang.killed_after = Some(MS(6001));
        let slow = run(vec![hang.clone()]);
        assert!(!slow.passed() && slow.breaches.is_empty(), "{}", slow.table());
        hang.killed_after = None;
        assert!(!run(vec![hang]).breaches.is_empty());
    }

    #[test]
    fn what_is_found_at_the_end_counts() {
        let events = vec![good(Event::EngineKill { victim: 0 })];
        let good = Seen { events, ..Seen::default() };
        assert!(judge(&good, PODS).passed());
        let text = || vec!["x".to_owned()];
        let bad = |churn, left_over, stuck| Seen { churn, left_over, stuck, ..good.clone() };
        let churn = |failures, excused| ChurnSeen { joins: vec![MS(100)], excused, failures };
        for (seen, passes) in [
            (bad(churn(Vec::new(), text()), Vec::new(), Vec::new()), true),
            (bad(churn(text(), Vec::new()), Vec::new(), Vec::new()), false),
            (bad(ChurnSeen::default(), text(), Vec::new()), false),
            (bad(ChurnSeen::default(), Vec::new(), text()), false),
        ] {
            assert_eq!(judge(&seen, PODS).passed(), passes, "{seen:?}");
        }
    }

    #[test]
    fn bars_are_those_of_the_table() {
        let kill = |ms| Observed { figure: Some(MS(ms)), ..good(Event::EngineKill { victim: 0 }) };
        let passes = |times: &[u64]| run(times.iter().map(|ms| kill(*ms)).collect()).passed();
        assert!(passes(&[50]) && !passes(&[51]));
        assert!(passes(&[40, 40, 200]) && !passes(&[40, 40, 201]), "p99 of few is the longest");
        let mut hundred = vec![40; 100];
        hundred[7] = 900;
        assert!(passes(&hundred), "one in a hundred");
        hundred[8] = 900;
        assert!(!passes(&hundred));
        assert_eq!(percentiles(Vec::new()), None);
        assert_eq!(percentiles((1..=1000).map(MS).collect()), Some([MS(500), MS(990), MS(1000)]));
    }
}
