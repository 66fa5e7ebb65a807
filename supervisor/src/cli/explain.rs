//! `explain`: how a pod came to be what it is: when, and by which rules.

use std::fmt::Write as _;

use clap::{ArgMatches, Command};
use podtether_proto::node::{Explained, NodeClient, PodSummary, Setting, Timeline};
use serde::Serialize;

use super::call::{self, READ_WITHIN, answered, named, selector};
use super::status::{node_name, now_ms};
use super::text::{Look, Paint, Table, fixed, flexible, paragraph, time, utc};
use super::{Exit, Screen, of_pod, show, status, text_of};
use crate::engine::within;

pub(super) fn command() -> Command {
    of_pod(
        "explain",
        "Tell how a pod came to be what it is: from CNI ADD to the first handshake, and which rule gave each setting",
    )
}

/// What `-o json` prints.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Explanation {
    pub(super) pod: Option<PodSummary>,
    #[serde(flatten)]
    pub(super) explained: Explained,
}

pub(super) async fn run(
    client: &NodeClient,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let wanted = text_of(matches, "pod");
    let explained = match answered(client.explain(within(READ_WITHIN), selector(&wanted)).await) {
        Ok(explained) => explained,
        // One that joins nothing has no link, but somebody decided so.
        Err(why) => match answered(client.choice(within(READ_WITHIN), selector(&wanted)).await) {
            Ok(choice) => Explained { choice, ..Explained::default() },
            Err(_) => return Err(why),
        },
    };
    let (namespace, name) = named(&wanted);
    let pods = call::pods(client, true).await?;
    let pod = pods.into_iter().find(|pod| pod.namespace == namespace && pod.pod == name);
    let explanation = Explanation { pod, explained };
    let look = screen.look;
    show(&explanation, matches, screen, |explanation| text(explanation, &node_name(), now_ms(), look))
}

/// What a milestone is called for people.
fn step(what: &str) -> &str {
    match what {
        "saved" => "records on disk",
        "link" => "interfaces and sockets made",
        "key" => "auth key minted",
        "engine" => "engine started, in its sandbox",
        "registered" => "registered with control",
        "netmap" => "netmap in force, addresses known",
        "configured" => "ts0 configured",
        "answered" => "CNI ADD answered",
        "handshake" => "first WireGuard handshake",
        other => other,
    }
}

pub(super) fn text(explanation: &Explanation, node: &str, now_ms: u64, look: Look) -> String {
    let mut text = String::new();
    if let Some(pod) = &explanation.pod {
        status::block(&mut text, pod, node, now_ms, look);
    }
    let Explained { timeline: line, choice, further, last_exit, join } = &explanation.explained;
    if explanation.pod.is_some() {
        text.push_str(&timeline(line, join, look));
    } else {
        text.push_str(if choice.joins { "it has not joined\n" } else { "it joins no tailnet\n" });
    }
    let settings: Vec<&Setting> = choice.settings.iter().chain(further).collect();
    if !settings.is_empty() {
        let columns = vec![fixed("SETTING"), flexible("VALUE", 20), fixed("FROM"), flexible("RULE", 20)];
        let mut table = Table::new(columns);
        for setting in settings {
            table.row(vec![
                setting.name.as_str().into(),
                if setting.value.is_empty() { "none".into() } else { setting.value.as_str().into() },
                setting.source.to_string().into(),
                setting.rule.as_str().into(),
            ]);
        }
        let _ = write!(text, "\n{}", table.render(look));
    }
    for (what, sentences) in [("refused: ", &choice.refusals), ("note: ", &choice.notes)] {
        for sentence in sentences {
            text.push_str(&paragraph(what, sentence));
        }
    }
    if !last_exit.is_empty() {
        text.push('\n');
        text.push_str(&paragraph("its engine ended ", last_exit));
    }
    text
}

fn timeline(timeline: &Timeline, join: &str, look: Look) -> String {
    if timeline.added_unix_ms == 0 {
        return "no timeline: the pod was added by an earlier build\n".to_owned();
    }
    let mut milestones = timeline.milestones.clone();
    milestones.sort_by_key(|milestone| milestone.after_us);
    let mut table = Table::new(vec![fixed("AFTER"), flexible("STEP", 20), fixed("TOOK")]);
    let join = if join.is_empty() { String::new() } else { format!(", {join} in the logs") };
    let added = format!("CNI ADD at {} UTC{join}", utc(timeline.added_unix_ms / 1000));
    table.row(vec!["0".into(), added.into(), "".into()]);
    let mut before = 0;
    for milestone in &milestones {
        let took = milestone.after_us.saturating_sub(before);
        table.row(vec![time(milestone.after_us).into(), step(&milestone.what).into(), time(took).into()]);
        before = milestone.after_us;
    }
    if !milestones.iter().any(|milestone| milestone.what == "handshake") {
        table.row(vec![
            "-".into(),
            super::text::Cell::painted(
                "no handshake noted: no traffic yet, or the supervisor was restarted",
                Paint::Warn,
            ),
            "".into(),
        ]);
    }
    table.render(look)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::text::WIDTH;
    use podtether_proto::node::{Choice, Milestone, Source};

    #[test]
    fn a_timeline_has_every_step_with_its_time() {
        let milestone = |what: &str, after_us| Milestone { what: what.into(), after_us };
        let all = [
            ("saved", 2_100),
            ("link", 9_300),
            ("key", 21_000),
            ("engine", 29_400),
            ("netmap", 52_000),
            ("registered", 41_000),
            ("configured", 54_100),
            ("answered", 56_700),
            ("handshake", 1_230_000),
        ];
        let explained = Explained {
            join: "4c1f".into(),
            timeline: Timeline {
                added_unix_ms: 1_795_314_786_000,
                milestones: all.iter().map(|(what, us)| milestone(what, *us)).collect(),
            },
            choice: Choice {
                joins: true,
                settings: vec![Setting {
                    name: "tags".into(),
                    value: "tag:k8s-pod".into(),
                    source: Source::Cluster,
                    rule: "tailnet.default.tags".into(),
                }],
                refusals: Vec::new(),
                notes: vec!["a note".into()],
            },
            further: Vec::new(),
            last_exit: "3 s ago: the engine crashed (crash)".into(),
        };
        let pod = crate::cli::status::tests::pod("shop", "web", "running");
        let mut explanation = Explanation { pod: Some(pod), explained };
        let whole = text(&explanation, "node-a", 0, Look::PLAIN);
        let (block, rest) = whole.split_once("\n\n").unwrap();
        assert!(block.starts_with("shop/web  running\n"), "{block}");
        assert_eq!(
            rest,
            "AFTER    STEP                                                  TOOK\n\
             0        CNI ADD at 2026-11-22 02:33:06 UTC, 4c1f in the logs\n\
             2.1 ms   records on disk                                       2.1 ms\n\
             9.3 ms   interfaces and sockets made                           7.2 ms\n\
             21.0 ms  auth key minted                                       11.7 ms\n\
             29.4 ms  engine started, in its sandbox                        8.4 ms\n\
             41.0 ms  registered with control                               11.6 ms\n\
             52.0 ms  netmap in force, addresses known                      11.0 ms\n\
             54.1 ms  ts0 configured                                        2.1 ms\n\
             56.7 ms  CNI ADD answered                                      2.6 ms\n\
             1.23 s   first WireGuard handshake                             1.17 s\n\
             \n\
             SETTING  VALUE        FROM     RULE\n\
             tags     tag:k8s-pod  cluster  tailnet.default.tags\n\
             note: a note\n\
             \n\
             its engine ended 3 s ago: the engine crashed (crash)\n"
        );
        explanation.pod = None;
        explanation.explained.choice.joins = false;
        explanation.explained.choice.refusals.push("tag:x is not allowed here".into());
        let refused = text(&explanation, "node-a", 0, Look::PLAIN);
        assert!(
            refused.starts_with("it joins no tailnet\n") && refused.contains("refused: tag:x"),
            "{refused}"
        );
        let none = timeline(&Timeline { added_unix_ms: 1, ..Timeline::default() }, "", Look::PLAIN);
        assert!(
            none.contains("no handshake noted") && none.lines().all(|l| l.chars().count() <= WIDTH),
            "{none}"
        );
        assert!(timeline(&Timeline::default(), "", Look::PLAIN).starts_with("no timeline"));
    }
}
