//! What no node can answer alone: `top`, `cleanup` and `bugreport` of all nodes, and `why` between two of them.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::ArgMatches;
use futures_util::future::join_all;
use podtether_proto::node::PodSummary;

use super::super::status::{CLEAR, now_ms};
use super::super::text::utc;
use super::super::why::{self, Answer, End, Target};
use super::super::{Exit, Screen, bugreport, output, show, text_of, top};
use super::{Cluster, Output, Ran, Remote, Silent, Whole, ask, look, namespace_of};

/// What `why` says of an end that nobody could be asked about.
const NOBODY_ASKED: &str = "no pod of this cluster, or its node did not answer: ask where it runs";

/// `top` of all nodes.
pub(super) async fn top(
    cluster: &impl Cluster,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let namespace = namespace_of(cluster, matches);
    let (every, count) = top::looks(matches, screen.terminal);
    let mut before = look(cluster).await?;
    let mut exit = before.exit();
    for _ in 0..count {
        tokio::time::sleep(every).await;
        let mut now = look(cluster).await?;
        now.keep(namespace.as_deref());
        let text = format!(
            "{}{}",
            top::text(&before.nodes, &now.nodes, true, screen.look),
            now.who_is_silent(screen.look)
        );
        screen.print(&if screen.terminal { format!("{CLEAR}{text}") } else { text });
        exit = now.exit();
        before = now;
    }
    Ok(exit)
}

/// `cleanup` by the first node that can: each looks at all devices of the tailnets and at all pods of the cluster.
pub(super) async fn cleanup(
    cluster: &impl Cluster,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let mut arguments = vec!["cleanup".to_owned()];
    arguments.extend(matches.get_flag("dry-run").then(|| "--dry-run".to_owned()));
    if output(matches) == Output::Json {
        arguments.extend(["-o", "json"].map(str::to_owned));
    }
    let remotes = cluster.remotes().await?;
    let mut failed = String::new();
    for remote in &remotes {
        match ask(cluster, remote, &arguments).await {
            Ok(ran) => {
                screen.print(&String::from_utf8_lossy(&ran.stdout));
                return Ok(Exit::Done);
            }
            Err(why) => {
                let _ = write!(failed, "; {}: {why}", remote.node);
            }
        }
    }
    Err(match failed.strip_prefix("; ") {
        Some(failed) => format!("no node could clean up: {failed}"),
        None => super::NO_REMOTES.to_owned(),
    })
}

/// The reports of all nodes in one file.
pub(super) async fn bugreport(
    cluster: &impl Cluster,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let mut remotes = cluster.remotes().await?;
    if remotes.is_empty() {
        return Err(super::NO_REMOTES.to_owned());
    }
    remotes.sort_by(|a, b| a.node.cmp(&b.node));
    let arguments = ["bugreport", "--file", "-"].map(str::to_owned);
    let answers = join_all(remotes.iter().map(|remote| ask(cluster, remote, &arguments))).await;
    let now = now_ms();
    let mut report = format!("######## {} nodes, taken {} UTC\n\n", remotes.len(), utc(now / 1000));
    let mut whole = Whole::default();
    for (remote, answer) in remotes.iter().zip(&answers) {
        let _ = writeln!(report, "######## node {}, pod {}", remote.node, remote.pod);
        match answer {
            Ok(ran) => report.push_str(&String::from_utf8_lossy(&ran.stdout)),
            Err(why) => {
                let _ = writeln!(report, "no report: {why}\n");
                whole.silent.push(Silent { node: remote.node.clone(), why: why.clone() });
            }
        }
    }
    let file = matches.get_one::<PathBuf>("file").cloned();
    let file = file.unwrap_or_else(|| format!("podtether-cluster-{}.txt", now / 1000).into());
    // The nodes' programs may be of an earlier build, and know less of what has to go.
    bugreport::put(&file, &bugreport::redacted(&report), screen)?;
    if file.as_os_str() != "-" {
        screen.print(&whole.who_is_silent(screen.look));
    }
    Ok(match whole.silent.len() {
        0 => Exit::Done,
        n if n == remotes.len() => Exit::Failed,
        _ => Exit::Partly,
    })
}

/// A pod, and the node it runs on.
type Found<'a> = (&'a str, &'a PodSummary);

/// `why`, by the nodes of both ends.
pub(super) async fn why(
    cluster: &impl Cluster,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let (source, target) = (text_of(matches, "source"), Target::parse(&text_of(matches, "target"))?);
    let whole = look(cluster).await?;
    let pods: Vec<PodSummary> = whole.nodes.iter().flat_map(|node| node.pods.clone()).collect();
    let nodes: Vec<&str> =
        whole.nodes.iter().flat_map(|node| node.pods.iter().map(|_| node.node.as_str())).collect();
    let found = |text: &str| -> Option<Found<'_>> {
        let pod = why::pod_called(&pods, text, cluster.namespace())?;
        let at = pods.iter().position(|one| std::ptr::eq(one, pod))?;
        Some((*nodes.get(at)?, pod))
    };
    let (from, to) = (found(&source), found(&target.host));
    let (mut first, second) = match asks(from, to, &source, &target)? {
        (None, None) => {
            return Err(format!(
                "neither {source} nor {} is a pod of this cluster that has joined a tailnet: name one as \
                 NAMESPACE/POD (`kubectl ts status -A` lists them){}",
                target.host,
                silent_nodes(&whole)
            ));
        }
        (Some(first), second) => (asked(cluster, &first).await, second),
        (None, Some(second)) => (asked(cluster, &second).await, None),
    };
    let mut complaint = String::new();
    if let Some(second) = second {
        match (&mut first, asked(cluster, &second).await) {
            (Ok(answer), Ok(other)) => {
                answer.target = other.target;
                answer.enters = other.enters;
            }
            (Ok(_), Err(why)) => complaint = why,
            (Err(why), other) => {
                complaint = std::mem::take(why);
                first = other;
            }
        }
    }
    // Where both are silent, one of the two says enough.
    let mut answer = first?;
    if let Some((_, pod)) = from {
        answer.source = End::of_pod(pod);
    }
    if let Some((_, pod)) = to {
        answer.target = End::of_pod(pod);
    }
    let flow = why::flow(&answer.source, &answer.target, &target)?;
    let look = screen.look;
    show(&answer, matches, screen, |answer| why::text(answer, flow, NOBODY_ASKED, look))?;
    if complaint.is_empty() {
        return Ok(answer.exit());
    }
    if output(matches) != Output::Json {
        screen.print(&format!("{complaint}\n"));
    }
    Ok(Exit::Partly)
}

/// A question to a node.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    node: String,
    arguments: Vec<String>,
}

/// Whom to ask what: of each end that is a pod its node, once where both are on one. A node knows a pod of another
/// by its address alone.
fn asks(
    from: Option<Found<'_>>,
    to: Option<Found<'_>>,
    source: &str,
    target: &Target,
) -> Result<(Option<Asked>, Option<Asked>), String> {
    let named = |pod: &PodSummary| format!("{}/{}", pod.namespace, pod.pod);
    let ask = |node: &str, source: String, target: String| Asked {
        node: node.to_owned(),
        arguments: vec!["why".to_owned(), source, target, "-o".to_owned(), "json".to_owned()],
    };
    Ok(match (from, to) {
        (None, None) => (None, None),
        (Some((node, pod)), None) => (Some(ask(node, named(pod), target.typed(&target.host))), None),
        (None, Some((node, pod))) => (None, Some(ask(node, source.to_owned(), target.typed(&named(pod))))),
        (Some((node, from)), Some((other, to))) if node == other => {
            (Some(ask(node, named(from), target.typed(&named(to)))), None)
        }
        (Some((node, from)), Some((other, to))) => {
            let flow = why::flow(&End::of_pod(from), &End::of_pod(to), target)?;
            (
                Some(ask(node, named(from), target.typed(&flow.dst.to_string()))),
                Some(ask(other, flow.src.to_string(), target.typed(&named(to)))),
            )
        }
    })
}

/// What a node says.
async fn asked(cluster: &impl Cluster, question: &Asked) -> Result<Answer, String> {
    let Asked { node, arguments } = question;
    let of_node = |why: String| format!("on {node}: {why}");
    let remotes = cluster.remotes().await?;
    let remote = remotes.iter().find(|remote| remote.node == *node);
    let remote: &Remote = remote.ok_or_else(|| of_node("no podtether runs there".to_owned()))?;
    let ran: Ran = cluster.run(remote, arguments).await.map_err(of_node)?;
    if ran.code != Exit::Done as u8 && ran.code != Exit::No as u8 {
        let said = ran.stderr.trim().trim_start_matches("podtether: ");
        return Err(of_node(if said.is_empty() {
            format!("podtether ended with {}", ran.code)
        } else {
            said.to_owned()
        }));
    }
    serde_json::from_slice(&ran.stdout).map_err(|e| of_node(format!("its answer makes no sense: {e}")))
}

fn silent_nodes(whole: &Whole) -> String {
    let names: Vec<&str> = whole.silent.iter().map(|silent| silent.node.as_str()).collect();
    if names.is_empty() {
        String::new()
    } else {
        format!("; these nodes did not answer: {}", names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::tests::pod;

    #[test]
    fn each_end_is_asked_where_it_runs() {
        let of = |name: &str, ip: &str| PodSummary {
            addresses: vec![ip.parse().unwrap(), "fd7a::9".parse().unwrap()],
            ..pod("shop", name, "running")
        };
        let (web, db) = (of("web", "100.64.0.1"), of("db", "100.64.0.2"));
        let only_v6 = PodSummary { addresses: vec!["fd7a::2".parse().unwrap()], ..of("db", "100.64.0.2") };
        let ask = |node: &str, source: &str, target: &str| Asked {
            node: node.into(),
            arguments: ["why", source, target, "-o", "json"].map(str::to_owned).to_vec(),
        };
        type Row<'a> = (&'a str, Option<Found<'a>>, Option<Found<'a>>, Option<Asked>, Option<Asked>);
        let rows: [Row<'_>; 6] = [
            ("nobody", None, None, None, None),
            ("the source", Some(("n1", &web)), None, Some(ask("n1", "shop/web", "far:53/17")), None),
            ("the target", None, Some(("n2", &db)), None, Some(ask("n2", "near", "shop/db:53/17"))),
            (
                "one node",
                Some(("n1", &web)),
                Some(("n1", &db)),
                Some(ask("n1", "shop/web", "shop/db:53/17")),
                None,
            ),
            (
                "two nodes",
                Some(("n1", &web)),
                Some(("n2", &db)),
                Some(ask("n1", "shop/web", "100.64.0.2:53/17")),
                Some(ask("n2", "100.64.0.1", "shop/db:53/17")),
            ),
            (
                "two nodes, IPv6",
                Some(("n1", &web)),
                Some(("n2", &only_v6)),
                Some(ask("n1", "shop/web", "[fd7a::2]:53/17")),
                Some(ask("n2", "fd7a::9", "shop/db:53/17")),
            ),
        ];
        let target = Target::parse("far:53/udp").unwrap();
        for (what, from, to, first, second) in rows {
            assert_eq!(asks(from, to, "near", &target), Ok((first, second)), "{what}");
        }
        let nowhere = PodSummary { addresses: Vec::new(), ..of("db", "100.64.0.2") };
        let error = asks(Some(("n1", &web)), Some(("n2", &nowhere)), "near", &target).unwrap_err();
        assert!(error.contains("no addresses of the same family"), "{error}");
    }
}
