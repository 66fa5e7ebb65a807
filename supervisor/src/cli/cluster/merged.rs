//! Answers of many nodes as one.

use std::fmt::Write as _;

use podtether_proto::node::PodSummary;
use serde::{Deserialize, Serialize};

use super::super::Exit;
use super::super::check::{Check, Grade, text as check_text};
use super::super::status::{self, NodeStatus, address, handshake, notes, path, since, state, totals};
use super::super::text::{Cell, Look, Paint, Table, fixed, flexible, paragraph, printable};

/// What `kubectl ts status -o json` prints.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whole {
    /// Nodes that answered.
    pub nodes: Vec<NodeStatus>,
    /// Nodes that did not.
    pub silent: Vec<Silent>,
}

/// A node that did not answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Silent {
    /// Which.
    pub node: String,
    /// Why.
    pub why: String,
}

impl Whole {
    /// Keeps the pods of one namespace.
    pub(super) fn keep(&mut self, namespace: Option<&str>) {
        for node in &mut self.nodes {
            node.pods.retain(|pod| namespace.is_none_or(|wanted| pod.namespace == wanted));
        }
    }

    fn pods(&self) -> impl Iterator<Item = &PodSummary> {
        self.nodes.iter().flat_map(|node| &node.pods)
    }

    /// How the program ends.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match (self.nodes.is_empty(), self.silent.is_empty()) {
            (_, true) => Exit::Done,
            (true, false) => Exit::Failed,
            (false, false) => Exit::Partly,
        }
    }

    /// A line for each node that did not answer.
    pub(super) fn who_is_silent(&self, look: Look) -> String {
        let mut text = String::new();
        for Silent { node, why } in &self.silent {
            let line = paragraph(&format!("{}: ", printable(node)), why);
            text.push_str(&look.paint(Paint::Bad, line.trim_end()));
            text.push('\n');
        }
        text
    }

    fn end(&self, namespace: Option<&str>, look: Look) -> String {
        let mut text = self.who_is_silent(look);
        let asked = self.nodes.len() + self.silent.len();
        let nodes = if asked == 1 { "node" } else { "nodes" };
        let silent = match self.silent.len() {
            0 => String::new(),
            n => format!(", {n} silent"),
        };
        let which = namespace.map_or_else(String::new, |ns| format!(" (namespace {ns}; -A for all)"));
        let _ = writeln!(text, "{}; {asked} {nodes}{silent}{which}", totals(self.pods()));
        text
    }

    /// A pod a line.
    pub(super) fn table(&self, namespace: Option<&str>, look: Look) -> String {
        let mut table = Table::new(vec![
            flexible("POD", 16),
            flexible("NODE", 8),
            fixed("ADDRESS"),
            fixed("STATE"),
            fixed("PATH"),
            fixed("HANDSHAKE"),
            fixed("RESTARTS"),
            fixed("AGE"),
        ]);
        let mut rows: Vec<(&NodeStatus, &PodSummary)> =
            self.nodes.iter().flat_map(|node| node.pods.iter().map(move |pod| (node, pod))).collect();
        rows.sort_by_key(|(_, pod)| (&pod.namespace, &pod.pod));
        for (node, pod) in &rows {
            table.row(vec![
                format!("{}/{}", pod.namespace, pod.pod).into(),
                node.node.as_str().into(),
                address(pod).into(),
                state(pod),
                path(pod).into(),
                handshake(pod, node.unix_ms).into(),
                pod.restarts.to_string().into(),
                since(node.unix_ms, pod.added_unix_ms).into(),
            ]);
            for note in notes(pod) {
                table.note(Cell::painted(&note, Paint::Warn));
            }
        }
        let rows = if rows.is_empty() { String::new() } else { table.render(look) };
        format!("{rows}{}", self.end(namespace, look))
    }

    /// All that is known of each pod.
    pub(super) fn wide(&self, look: Look) -> String {
        let mut text = String::new();
        for node in &self.nodes {
            for pod in &node.pods {
                status::block(&mut text, pod, &node.node, node.unix_ms, look);
            }
        }
        text + &self.end(None, look)
    }
}

/// What checks of nodes found.
pub(super) fn checks(nodes: &[(String, Result<Vec<Check>, String>)], quiet: bool, look: Look) -> String {
    let mut text = String::new();
    for (node, answer) in nodes {
        match answer {
            Err(why) => {
                let line = paragraph(&format!("{}: ", printable(node)), why);
                let _ = writeln!(text, "{}", look.paint(Paint::Bad, line.trim_end()));
            }
            Ok(checks) => {
                let shown: Vec<Check> =
                    checks.iter().filter(|check| !quiet || check.grade == Grade::Fail).cloned().collect();
                let failed = checks.iter().filter(|check| check.grade == Grade::Fail).count();
                if shown.is_empty() {
                    let _ = writeln!(text, "{}: {} checks, none failed", printable(node), checks.len());
                } else {
                    text.push_str(&check_text(
                        &format!("{node}: {} checks, {failed} failed", checks.len()),
                        &shown,
                        look,
                    ));
                }
            }
        }
    }
    text
}

pub(super) fn exit_of_checks(nodes: &[(String, Result<Vec<Check>, String>)]) -> Exit {
    let failed = |checks: &Vec<Check>| checks.iter().any(|check| check.grade == Grade::Fail);
    let answered = nodes.iter().filter(|(_, answer)| answer.is_ok()).count();
    if nodes.iter().any(|(_, answer)| answer.as_ref().is_ok_and(failed)) {
        return Exit::No;
    }
    match answered {
        all if all == nodes.len() => Exit::Done,
        0 => Exit::Failed,
        _ => Exit::Partly,
    }
}
