//! `top`: who uses how much, look by look.

use std::collections::HashMap;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use podtether_proto::node::{NodeClient, PodSummary};

use super::status::{self, CLEAR, NodeStatus, totals};
use super::text::{Look, Table, bytes, fixed, flexible};
use super::{Exit, Screen};

pub(super) fn command() -> Command {
    Command::new("top")
        .about("Show which pods' links use how much: traffic, processor, memory, drops")
        .args(args())
}

/// The arguments, of `kubectl ts top` too.
pub(crate) fn args() -> [Arg; 2] {
    [
        Arg::new("every")
            .short('d')
            .long("delay")
            .value_name("SECONDS")
            .default_value("2")
            .value_parser(clap::value_parser!(u16).range(1..=3600))
            .help("between two looks"),
        Arg::new("count")
            .long("count")
            .short('c')
            .value_name("N")
            .value_parser(clap::value_parser!(u32).range(1..))
            .help("end after so many looks; else at Ctrl-C, or after one where nobody watches"),
    ]
}

/// The time between two looks, and how many there are.
pub(crate) fn looks(matches: &ArgMatches, terminal: bool) -> (Duration, u32) {
    let every = Duration::from_secs(matches.get_one::<u16>("every").copied().unwrap_or(2).into());
    let count = matches.get_one::<u32>("count").copied();
    (every, count.or((!terminal).then_some(1)).unwrap_or(u32::MAX))
}

pub(super) async fn run(
    client: &NodeClient,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let (every, count) = looks(matches, screen.terminal);
    let mut before = [status::look(client).await?];
    for _ in 0..count {
        tokio::time::sleep(every).await;
        let now = [status::look(client).await?];
        let text = text(&before, &now, false, screen.look);
        screen.print(&if screen.terminal { format!("{CLEAR}{text}") } else { text });
        before = now;
    }
    Ok(Exit::Done)
}

/// What a pod's link did in a second, and what it has.
struct Use {
    rx: u64,
    tx: u64,
    drops: u64,
    /// Of one processor, in tenths of a percent.
    permille: u64,
}

fn used(before: Option<&PodSummary>, now: &PodSummary, ms: u64) -> Use {
    // A new engine counts from zero.
    let before = before.filter(|before| before.engine_pid == now.engine_pid);
    let per_s = |of: fn(&PodSummary) -> u64| {
        before.map_or(0, |before| of(now).saturating_sub(of(before)).saturating_mul(1000) / ms)
    };
    Use {
        rx: per_s(|pod| pod.live.as_ref().map_or(0, |live| live.rx_bytes)),
        tx: per_s(|pod| pod.live.as_ref().map_or(0, |live| live.tx_bytes)),
        drops: per_s(|pod| pod.live.as_ref().map_or(0, |live| live.drops)),
        permille: per_s(|pod| pod.cpu_us.unwrap_or(0)) / 1000,
    }
}

type Row<'a> = (&'a NodeStatus, &'a PodSummary, Use);

/// The pods of a node, each with what it used since the look before.
fn rows<'a>(before: Option<&NodeStatus>, now: &'a NodeStatus) -> Vec<Row<'a>> {
    let ms = before.map_or(1, |before| now.unix_ms.saturating_sub(before.unix_ms).max(1));
    let old: HashMap<(&str, &str), &PodSummary> = before
        .into_iter()
        .flat_map(|before| &before.pods)
        .map(|pod| ((pod.namespace.as_str(), pod.pod.as_str()), pod))
        .collect();
    let was = |pod: &PodSummary| old.get(&(pod.namespace.as_str(), pod.pod.as_str())).copied();
    now.pods.iter().map(|pod| (now, pod, used(was(pod), pod, ms))).collect()
}

/// Rates of the pods of nodes, the busiest first; with the nodes' names where `nodes`.
pub(crate) fn text(before: &[NodeStatus], now: &[NodeStatus], nodes: bool, look: Look) -> String {
    let of = |node: &NodeStatus| before.iter().find(|before| before.node == node.node);
    let mut rows: Vec<Row<'_>> = now.iter().flat_map(|node| rows(of(node), node)).collect();
    rows.sort_by_key(|(_, _, used)| std::cmp::Reverse((used.rx.saturating_add(used.tx), used.permille)));
    let mut columns = vec![flexible("POD", 20)];
    columns.extend(nodes.then(|| flexible("NODE", 8)));
    columns.extend([
        fixed("STATE"),
        fixed("RX/S"),
        fixed("TX/S"),
        fixed("DROPS/S"),
        fixed("CPU"),
        fixed("MEM"),
        fixed("PATH"),
    ]);
    let mut table = Table::new(columns);
    for (node, pod, used) in &rows {
        let mut cells = vec![format!("{}/{}", pod.namespace, pod.pod).into()];
        cells.extend(nodes.then(|| node.node.as_str().into()));
        cells.extend([
            status::state(pod),
            bytes(used.rx).into(),
            bytes(used.tx).into(),
            used.drops.to_string().into(),
            format!("{}.{}%", used.permille / 10, used.permille % 10).into(),
            pod.memory_bytes.map_or_else(|| "-".to_owned(), bytes).into(),
            status::path(pod).into(),
        ]);
        table.row(cells);
    }
    let sum = |of: fn(&Use) -> u64| rows.iter().map(|(_, _, used)| of(used)).fold(0, u64::saturating_add);
    let memory = rows.iter().filter_map(|(_, pod, _)| pod.memory_bytes).fold(0, u64::saturating_add);
    let permille = sum(|used| used.permille);
    let all = format!(
        "{}; {}/s in, {}/s out, {}.{}% of a processor, {}\n",
        totals(rows.iter().map(|(_, pod, _)| *pod)),
        bytes(sum(|used| used.rx)),
        bytes(sum(|used| used.tx)),
        permille / 10,
        permille % 10,
        bytes(memory)
    );
    if rows.is_empty() { all } else { format!("{}{all}", table.render(look)) }
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;
    use crate::cli::status::tests::pod;
    use podtether_proto::node::Live;

    #[test]
    fn rates_are_of_one_engine_and_the_busiest_is_first() {
        let at = |unix_ms, pods| NodeStatus { node: "n".into(), version: String::new(), unix_ms, pods };
        let of = |name: &str, pid, rx_bytes, cpu_us| PodSummary {
            engine_pid: Some(pid),
            cpu_us: Some(cpu_us),
            memory_bytes: Some(3 << 19),
            live: Some(Live { rx_bytes, tx_bytes: rx_bytes / 2, drops: 4, ..Live::default() }),
            ..pod("shop", name, "running")
        };
        let before = at(1000, vec![of("a", 1, 0, 0), of("b", 2, 1000, 0), of("c", 3, 9_000_000, 5)]);
        let now = at(3000, vec![of("a", 1, 2048, 2_000), of("b", 2, 4_195_304, 250_000), of("c", 4, 5, 5)]);
        assert_eq!(
            text(from_ref(&before), from_ref(&now), false, Look::PLAIN),
            "POD     STATE    RX/S  TX/S  DROPS/S  CPU    MEM   PATH\n\
             shop/b  running  2.0M  1.0M  0        12.5%  1.5M  idle\n\
             shop/a  running  1.0K  512B  0        0.1%   1.5M  idle\n\
             shop/c  running  0B    0B    0        0.0%   1.5M  idle\n\
             3 pods: 3 joined, 0 pending, 0 failed; 2.0M/s in, 1.0M/s out, 12.6% of a processor, 4.5M\n"
        );
        // Pods of one name on two nodes are two, and one that was not there before has no rate yet.
        let other = NodeStatus { node: "m".into(), ..now.clone() };
        let both = text(&[before], &[now, other], true, Look::PLAIN);
        let first = both.lines().nth(1).unwrap();
        assert!(first.starts_with("shop/b  n     running  2.0M"), "{both}");
        assert_eq!(both.matches("  m     running  0B    0B    0        0.0%").count(), 3, "{both}");
        assert!(
            both.ends_with(
                "6 pods: 6 joined, 0 pending, 0 failed; 2.0M/s in, 1.0M/s out, 12.6% of a processor, 9.0M\n"
            ),
            "{both}"
        );
    }
}
