//! `logs`: what was logged of one pod lately, by the supervisor and by the pod's engines.

use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};
use podtether_proto::node::{LogLine, NodeClient, PodSelector};
use serde_json::Value;

use super::call::{self, READ_WITHIN, answered, broken, selector};
use super::text::Look;
use super::{Exit, Output, Screen, output, output_arg, pod_arg, text_of};
use crate::engine::within;
use crate::log::human;

/// Between two looks of `--follow`.
const FOLLOW_EVERY: Duration = Duration::from_millis(500);

pub(super) fn command() -> Command {
    Command::new("logs")
        .about("Show what was logged of a pod lately, by the supervisor and by its engines")
        .long_about(
            "Show what was logged of a pod lately, by the supervisor and by its engines: up to 200 lines, also of a pod \
             that has gone, as long as there is room. The whole log is the supervisor's own output.",
        )
        .arg(pod_arg())
        .arg(Arg::new("follow").short('f').long("follow").action(ArgAction::SetTrue).help("go on with what comes"))
        .arg(
            Arg::new("tail")
                .long("tail")
                .value_name("LINES")
                .value_parser(clap::value_parser!(usize))
                .help("no more than the last so many"),
        )
        .arg(output_arg(false))
}

pub(super) async fn run(
    client: &NodeClient,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let pod = selector(&text_of(matches, "pod"));
    let json = output(matches) == Output::Json;
    let mut lines = all(client, &pod, 0).await?;
    if lines.is_empty() && !matches.get_flag("follow") {
        // Nothing may have been logged of a pod that is there; of one that is not, the supervisor says so.
        answered(client.explain(within(READ_WITHIN), pod.clone()).await)?;
    }
    if let Some(tail) = matches.get_one::<usize>("tail") {
        lines.drain(..lines.len().saturating_sub(*tail));
    }
    let mut after = 0;
    loop {
        let text: String =
            lines.iter().map(|l| if json { json_line(l) } else { line(l, screen.look) }).collect();
        screen.print(&text);
        after = lines.last().map_or(after, |line| line.seq);
        if !matches.get_flag("follow") {
            return Ok(Exit::Done);
        }
        tokio::time::sleep(FOLLOW_EVERY).await;
        lines = all(client, &pod, after).await?;
    }
}

/// Every line after `after`.
pub(super) async fn all(
    client: &NodeClient,
    pod: &PodSelector,
    mut after: u64,
) -> Result<Vec<LogLine>, String> {
    let mut lines: Vec<LogLine> = Vec::new();
    loop {
        let page = client.logs(within(READ_WITHIN), pod.clone(), after).await.map_err(|e| broken(&e))?;
        let Some(last) = page.last() else { return Ok(lines) };
        after = last.seq;
        lines.extend(page);
    }
}

fn json_line(line: &LogLine) -> String {
    let fields: Value = serde_json::from_str(&line.fields).unwrap_or(Value::Null);
    let object = serde_json::json!({
        "unixMs": line.unix_ms, "level": line.level, "from": line.from, "join": line.join, "message": line.message,
        "fields": fields,
    });
    format!("{object}\n")
}

/// A log line is as long as it is: it is not cut to a width.
pub(super) fn line(line: &LogLine, look: Look) -> String {
    let whose = format!("{:10} {}", line.from, line.join);
    let fields = serde_json::from_str(&line.fields).unwrap_or_default();
    human(line.unix_ms, &line.level, whose.trim_end(), &line.message, &fields, look)
}

/// For `bugreport`.
pub(super) async fn text(client: &NodeClient, namespace: &str, name: &str) -> Result<String, String> {
    let pod = call::selector(&format!("{namespace}/{name}"));
    Ok(all(client, &pod, 0).await?.iter().map(|l| line(l, Look::PLAIN)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_people_and_one_for_programs() {
        let said = LogLine {
            seq: 1,
            unix_ms: 1_795_314_786_007,
            level: "WARN".into(),
            from: "engine".into(),
            message: "derp \x1b[31mlost".into(),
            fields: r#"{"region":9,"why":"gone"}"#.into(),
            join: "4c1f".into(),
        };
        assert_eq!(
            line(&said, Look::PLAIN),
            "2026-11-22 02:33:06.007 WARN  engine     4c1f derp  [31mlost region=9 why=gone\n"
        );
        let json: Value = serde_json::from_str(&json_line(&said)).unwrap();
        assert_eq!((&json["fields"]["region"], &json["message"]), (&9.into(), &"derp \x1b[31mlost".into()));
    }
}
