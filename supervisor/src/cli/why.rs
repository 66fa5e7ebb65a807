//! `why`: what becomes of a packet between two nodes, and which rule says so.

use std::net::IpAddr;

use clap::{Arg, ArgMatches, Command};
use podtether_core::engine::DropReason;
use podtether_proto::engine::{Decision, Flow, Verdict};
use podtether_proto::node::{NodeClient, PodSelector, PodSummary};
use serde::{Deserialize, Serialize};

use super::call::{self, DEFAULT_NAMESPACE, READ_WITHIN, answered};
use super::text::{Paint, paragraph, printable};
use super::{Exit, Screen, json_arg, show, text_of};
use crate::engine::within;

/// The port that the packet comes from: no rule goes by it.
const SOURCE_PORT: u16 = 50_000;
/// What is said of a target that is no pod of this node.
const NOT_HERE: &str = "not a pod of this node: ask on its own node";
/// Peers that are searched for a name.
const MAX_PEERS: usize = 100_000;

pub(super) fn command() -> Command {
    Command::new("why")
        .about("Tell which rule of the packet filter lets a new connection in, or that none does")
        .long_about(
            "Tell which rule of the packet filter lets a new connection in, or that none does. One end, or both, is a \
             pod of this node: its engine is asked. Rules of the other end are known there alone.",
        )
        .args(args("a pod of this node, a peer's name, or an address"))
}

/// The arguments, of `kubectl ts why` too.
pub(super) fn args(source: &'static str) -> [Arg; 3] {
    [
        Arg::new("source").value_name("SRC").required(true).help(source),
        Arg::new("target").value_name("DST:PORT[/PROTO]").required(true).help(
            "the same with a port; PROTO is tcp (default), udp, sctp or a number; DST/icmp without a port",
        ),
        json_arg(),
    ]
}

/// `DST:PORT/PROTO`, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) host: String,
    port: u16,
    protocol: Protocol,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Icmp,
    Number(u8),
}

impl Target {
    pub(super) fn parse(text: &str) -> Result<Target, String> {
        let wrong =
            || format!("{text:?} is not DST:PORT/PROTO, as in db-0:5432/tcp, [fd7a::1]:53/udp or db-0/icmp");
        // A pod may be named with its namespace: only what comes last can be a protocol.
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, word)) => match protocol(word) {
                Some(protocol) => (rest, protocol),
                None => (text, Protocol::Number(6)),
            },
            None => (text, Protocol::Number(6)),
        };
        let bare = |host: &str| host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let has_ports = matches!(protocol, Protocol::Number(6 | 17 | 132));
        if !has_ports {
            let host = bare(rest);
            return if host.is_empty() { Err(wrong()) } else { Ok(Target { host, port: 0, protocol }) };
        }
        let (host, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
        if host.contains(':') && !host.starts_with('[') {
            return Err(wrong());
        }
        let host = bare(host);
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
        if host.is_empty() { Err(wrong()) } else { Ok(Target { host, port, protocol }) }
    }

    /// As it is typed, of another host.
    pub(super) fn typed(&self, host: &str) -> String {
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        match (self.protocol, self.port) {
            (Protocol::Icmp, _) => format!("{host}/icmp"),
            (Protocol::Number(number), 0) => format!("{host}/{number}"),
            (Protocol::Number(number), port) => format!("{host}:{port}/{number}"),
        }
    }

    fn text(&self) -> String {
        match self.protocol {
            Protocol::Icmp => "icmp echo".to_owned(),
            Protocol::Number(6) => format!("port {}/tcp", self.port),
            Protocol::Number(17) => format!("port {}/udp", self.port),
            Protocol::Number(132) => format!("port {}/sctp", self.port),
            Protocol::Number(n) => format!("protocol {n}"),
        }
    }
}

fn protocol(word: &str) -> Option<Protocol> {
    Some(match word {
        "tcp" => Protocol::Number(6),
        "udp" => Protocol::Number(17),
        "sctp" => Protocol::Number(132),
        "icmp" => Protocol::Icmp,
        number => Protocol::Number(number.parse().ok()?),
    })
}

/// One end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct End {
    pub(super) name: String,
    addresses: Vec<IpAddr>,
    /// Namespace and name of the pod, where it is one of this node.
    #[serde(skip)]
    pod: Option<(String, String)>,
}

impl End {
    pub(super) fn of_pod(pod: &PodSummary) -> End {
        End {
            name: format!("{}/{}", pod.namespace, pod.pod),
            addresses: pod.addresses.clone(),
            pod: Some((pod.namespace.clone(), pod.pod.clone())),
        }
    }

    fn selector(&self) -> Option<PodSelector> {
        let (namespace, name) = self.pod.clone()?;
        Some(PodSelector::Pod { namespace, name })
    }
}

/// What `-o json` prints.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Answer {
    pub(super) source: End,
    pub(super) target: End,
    what: String,
    /// What the source's engine says; absent where it is no pod of this node.
    pub(super) leaves: Option<Verdict>,
    /// What the target's engine says; absent where it is no pod of this node.
    pub(super) enters: Option<Verdict>,
}

impl Answer {
    /// How the program ends: whether every end that was asked lets it pass.
    pub(super) fn exit(&self) -> Exit {
        let passes = |verdict: &Verdict| verdict.decision == Decision::Accept;
        if self.leaves.iter().chain(&self.enters).all(passes) { Exit::Done } else { Exit::No }
    }
}

pub(super) async fn run(
    client: &NodeClient,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let (source, target) = (text_of(matches, "source"), Target::parse(&text_of(matches, "target"))?);
    let pods = call::pods(client, false).await?;
    let called = |text: &str| pod_called(&pods, text, DEFAULT_NAMESPACE);
    let (from, to) = (called(&source), called(&target.host));
    let from_end = match (from, to) {
        (Some(pod), _) => End::of_pod(pod),
        (None, Some(to)) => peer_end(client, to, &source).await?,
        (None, None) => return Err(neither(&source, &target.host)),
    };
    let to_end = match (to, from) {
        (Some(pod), _) => End::of_pod(pod),
        (None, Some(from)) => peer_end(client, from, &target.host).await?,
        (None, None) => return Err(neither(&source, &target.host)),
    };
    let flow = flow(&from_end, &to_end, &target)?;
    let mut answer =
        Answer { what: target.text(), source: from_end, target: to_end, leaves: None, enters: None };
    if let Some(pod) = answer.source.selector() {
        answer.leaves = Some(answered(client.why(within(READ_WITHIN), pod, flow).await)?);
    }
    if let Some(pod) = answer.target.selector() {
        answer.enters = Some(answered(client.why(within(READ_WITHIN), pod, flow).await)?);
    }
    let look = screen.look;
    show(&answer, matches, screen, |answer| text(answer, flow, NOT_HERE, look))?;
    Ok(answer.exit())
}

fn neither(source: &str, target: &str) -> String {
    format!(
        "neither {source} nor {target} is a pod of this node: name one as NAMESPACE/POD (`podtether status` lists them), \
         or ask on the node of one"
    )
}

/// The pod with this name or address; `namespace` is meant where none is said.
pub(super) fn pod_called<'a>(pods: &'a [PodSummary], text: &str, namespace: &str) -> Option<&'a PodSummary> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return pods.iter().find(|pod| pod.addresses.contains(&ip));
    }
    let (namespace, name) = text.split_once('/').unwrap_or((namespace, text));
    let exact = pods.iter().find(|pod| pod.namespace == namespace && pod.pod == name);
    exact.or_else(|| pods.iter().find(|pod| is_called(&pod.name, text)))
}

/// Whether a node with this fully qualified name is meant: in full or by its first label.
fn is_called(name: &str, text: &str) -> bool {
    let text = text.trim_end_matches('.');
    !text.is_empty()
        && (name.eq_ignore_ascii_case(text)
            || name.split('.').next().is_some_and(|label| label.eq_ignore_ascii_case(text)))
}

/// The other end, as the engine of `pod` knows it.
async fn peer_end(client: &NodeClient, pod: &PodSummary, text: &str) -> Result<End, String> {
    let selector = || PodSelector::Pod { namespace: pod.namespace.clone(), name: pod.pod.clone() };
    if let Ok(ip) = text.parse::<IpAddr>() {
        let way = client.way(within(READ_WITHIN), selector(), text.to_owned()).await;
        let name = way.ok().and_then(Result::ok).map_or_else(|| text.to_owned(), |way| way.name);
        return Ok(End { name, addresses: vec![ip], pod: None });
    }
    let mut seen = 0;
    while seen < MAX_PEERS {
        let skip = u32::try_from(seen).unwrap_or(u32::MAX);
        let page = answered(client.peers(within(READ_WITHIN), selector(), skip).await)?;
        if page.is_empty() {
            break;
        }
        seen += page.len();
        if let Some(peer) = page.into_iter().find(|peer| is_called(&peer.name, text)) {
            return Ok(End { name: peer.name, addresses: peer.addresses, pod: None });
        }
    }
    Err(format!(
        "{text} is neither a pod of this node nor among the {seen} peers of {}/{}",
        pod.namespace, pod.pod
    ))
}

/// The packet: IPv4 where both ends have it.
pub(super) fn flow(from: &End, to: &End, target: &Target) -> Result<Flow, String> {
    let pair = |v4: bool| {
        let of = |end: &End| end.addresses.iter().copied().find(|ip| ip.is_ipv4() == v4);
        of(from).zip(of(to))
    };
    let (src, dst) = pair(true).or_else(|| pair(false)).ok_or_else(|| {
        format!("{} and {} have no addresses of the same family, or none yet", from.name, to.name)
    })?;
    let protocol = match target.protocol {
        Protocol::Number(n) => n,
        Protocol::Icmp if src.is_ipv4() => 1,
        Protocol::Icmp => 58,
    };
    let src_port = if target.port == 0 { 0 } else { SOURCE_PORT };
    Ok(Flow { src, dst, protocol, src_port, dst_port: target.port })
}

/// The answer, for a person; `unknown` is what is said of a target that was not asked.
pub(super) fn text(answer: &Answer, flow: Flow, unknown: &str, look: super::text::Look) -> String {
    let head = format!(
        "{} ({}) to {} ({}), {}",
        answer.source.name, flow.src, answer.target.name, flow.dst, answer.what
    );
    let mut text = paragraph("", &head);
    let ends = [
        ("leaves ", &answer.source, &answer.leaves, "the rules of the peer it goes to decide there"),
        ("enters ", &answer.target, &answer.enters, unknown),
    ];
    for (verb, end, verdict, unknown) in ends {
        let (paint, word, why) = match verdict {
            None => (Paint::Warn, "unknown", unknown.to_owned()),
            Some(verdict) => {
                let (paint, word) = match verdict.decision {
                    Decision::Accept => (Paint::Good, "yes"),
                    Decision::Drop => (Paint::Bad, "dropped"),
                    Decision::RefusedByPeer => (Paint::Bad, "refused"),
                };
                (paint, word, because(verdict))
            }
        };
        if verdict.is_none() && verb == "leaves " {
            continue;
        }
        let line = paragraph(&format!("  {verb}{}: ", printable(&end.name)), &format!("{word}, {why}"));
        text.push_str(&line.replacen(word, &look.paint(paint, word), 1));
    }
    text
}

fn because(verdict: &Verdict) -> String {
    match &verdict.rule {
        Some((chunk, index)) => format!("rule {index} of chunk {chunk:?} of the packet filter lets it in"),
        None => meaning(&verdict.reason),
    }
}

/// A word of the metrics as a sentence.
pub(super) fn meaning(reason: &str) -> String {
    let own = match reason {
        "to_peer" => "it goes to the peer, whose rules then decide",
        "flow" => "it belongs to a connection that the pod itself began",
        "tcp_segment" => "it is no beginning of a connection",
        "icmp_answer" => "it is an answer",
        "tsmp" => "nodes speak it among themselves",
        "filter" | "no_rule" => "no rule of the tailnet's policy lets it in: add one to its acls or grants",
        "filter_discarded" => {
            "the policy lets in peers that tailnet lock does not vouch for, so no rule of it is used"
        }
        "acl" => "the peer said that its policy does not let it in",
        "shields_up" => "the peer said that it lets nobody in (shields up)",
        "host_firewall" => "the peer said that its own firewall drops it",
        "ip_forwarding_off" => "the peer said that it does not forward",
        "peer_source" => "no peer has that source address",
        _ => "",
    };
    if !own.is_empty() {
        return own.to_owned();
    }
    let of_core = DropReason::ALL.iter().find(|why| why.name() == reason);
    of_core.map_or_else(
        || reason.to_owned(),
        |why| {
            let sentence = why.meaning().trim_end_matches('.');
            let mut letters = sentence.chars();
            letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::tests::pod;
    use crate::cli::text::{Look, WIDTH};

    #[test]
    fn targets() {
        let of = |text: &str| Target::parse(text).ok().map(|t| (t.host, t.port, t.protocol));
        let some = |host: &str, port, protocol| Some((host.to_owned(), port, protocol));
        let (tcp, udp) = (Protocol::Number(6), Protocol::Number(17));
        assert_eq!(of("db-0:5432"), some("db-0", 5432, tcp));
        assert_eq!(of("shop/db-0:5432"), some("shop/db-0", 5432, tcp));
        assert_eq!(of("shop/db-0:53/udp"), some("shop/db-0", 53, udp));
        assert_eq!(of("[fd7a::1]:53/udp"), some("fd7a::1", 53, udp));
        assert_eq!(of("fd7a::1/icmp"), some("fd7a::1", 0, Protocol::Icmp));
        assert_eq!(of("a/47"), some("a", 0, Protocol::Number(47)));
        for typed in ["shop/db-0:5432/6", "[fd7a::1]:53/17", "[fd7a::1]/icmp", "a/47"] {
            let target = Target::parse(typed).unwrap();
            assert_eq!(target.typed(&target.host), typed);
        }
        for bad in
            ["", "db-0", "db-0:0", "db-0:x/tcp", ":80", "fd7a::1:80", "db-0:70000", "/icmp", "a:80/x/y"]
        {
            assert_eq!(of(bad), None, "{bad}");
            assert!(Target::parse(bad).unwrap_err().contains("DST:PORT/PROTO"));
        }
    }

    #[test]
    fn a_pod_is_found_by_name_address_and_tailnet_name() {
        let named = PodSummary {
            name: "k8s-shop-db-0.tailnet.test".into(),
            addresses: vec!["100.64.0.1".parse().unwrap()],
            ..pod("shop", "db-0", "running")
        };
        let pods = [named, pod("default", "db-0", "running")];
        let found = |text: &str| pod_called(&pods, text, "default").map(|pod| pod.namespace.as_str());
        assert_eq!(found("shop/db-0"), Some("shop"));
        assert_eq!(found("db-0"), Some("default"));
        assert_eq!(found("100.64.0.1"), Some("shop"));
        assert_eq!(found("K8S-shop-db-0.tailnet.test."), Some("shop"));
        assert_eq!(found("k8s-shop-db-0"), Some("shop"));
        for nobody in ["", "web", "100.64.0.2", "shop/web"] {
            assert_eq!(found(nobody), None, "{nobody}");
        }
    }

    #[test]
    fn an_answer_says_which_rule_or_what_is_missing() {
        let end =
            |name: &str, ip: &str, pod| End { name: name.into(), addresses: vec![ip.parse().unwrap()], pod };
        let own = |name: &str| Some(("shop".to_owned(), name.to_owned()));
        let verdict = |inbound, decision, rule, reason: &str| {
            Some(Verdict { inbound, decision, rule, reason: reason.into(), peer: None })
        };
        let (source, target) =
            (end("shop/web", "100.64.0.1", own("web")), end("shop/db", "100.64.0.2", own("db")));
        let what = Target::parse("db:5432").unwrap();
        let flow = flow(&source, &target, &what).unwrap();
        assert_eq!((flow.protocol, flow.dst_port), (6, 5432));
        let mut answer = Answer {
            source,
            target,
            what: what.text(),
            leaves: verdict(false, Decision::Accept, None, "to_peer"),
            enters: verdict(true, Decision::Accept, Some(("base".into(), 3)), "rule"),
        };
        assert_eq!(
            text(&answer, flow, NOT_HERE, Look::PLAIN),
            "shop/web (100.64.0.1) to shop/db (100.64.0.2), port 5432/tcp\n  \
             leaves shop/web: yes, it goes to the peer, whose rules then decide\n  \
             enters shop/db: yes, rule 3 of chunk \"base\" of the packet filter lets it in\n"
        );
        answer.enters = verdict(true, Decision::Drop, None, "filter");
        let dropped = text(&answer, flow, NOT_HERE, Look { colour: true, ..Look::PLAIN });
        assert!(dropped.contains("\x1b[31mdropped\x1b[0m, no rule of the tailnet's policy"), "{dropped}");
        answer.enters = None;
        assert!(text(&answer, flow, NOT_HERE, Look::PLAIN).contains("unknown, not a pod of this node"));
        answer.target.name = "n".repeat(70);
        assert!(text(&answer, flow, NOT_HERE, Look::PLAIN).lines().all(|line| line.chars().count() <= WIDTH));
    }

    #[test]
    fn every_word_has_a_sentence() {
        for reason in DropReason::ALL {
            let sentence = meaning(reason.name());
            assert!(sentence.contains(' ') && !sentence.ends_with('.'), "{sentence}");
        }
        assert_eq!(meaning("something_new"), "something_new");
    }
}
