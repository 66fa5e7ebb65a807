//! `ping`: a peer of a pod's tailnet, the way there, and why it is not a direct one.

use clap::{Arg, ArgMatches, Command};
use podtether_proto::engine::{NetReport, PING_MAX, PathStatus, PingKind, Pong, Way};
use podtether_proto::node::NodeClient;
use serde::Serialize;

use super::call::{READ_WITHIN, answered, selector};
use super::text::{WIDTH, paragraph, time};
use super::{Exit, Output, Screen, output, output_arg, pod_arg, text_of, to_json};
use crate::engine::within;

/// More pings than this are a job for another tool.
const MAX_PINGS: u16 = 1000;
/// An endpoint that was asked longer ago than this has had its time to answer.
const ANSWER_MS: u64 = 1000;

pub(super) fn command() -> Command {
    Command::new("ping")
        .about("Ping a peer of a pod's tailnet from the pod's engine, and tell why the way is not direct")
        .arg(pod_arg())
        .arg(Arg::new("peer").value_name("PEER").required(true).help("its name, address or stable id"))
        .arg(
            Arg::new("kind")
                .long("kind")
                .default_value("disco")
                .value_parser(["disco", "tsmp", "icmp"])
                .help("disco: the path; tsmp: the other node; icmp: the host or pod behind it"),
        )
        .arg(
            Arg::new("count")
                .long("count")
                .short('c')
                .default_value("1")
                .value_parser(clap::value_parser!(u16).range(1..=i64::from(MAX_PINGS)))
                .help("how many, one after another"),
        )
        .arg(output_arg(false))
}

/// What `-o json` prints.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Pinged {
    pongs: Vec<Pong>,
    way: Way,
    /// Why packets do not go straight; empty while they do.
    why_not_direct: String,
}

pub(super) async fn run(
    client: &NodeClient,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let kind = match text_of(matches, "kind").as_str() {
        "tsmp" => PingKind::Tsmp,
        "icmp" => PingKind::Icmp,
        _ => PingKind::Disco,
    };
    let (pod, peer) = (selector(&text_of(matches, "pod")), text_of(matches, "peer"));
    let json = output(matches) == Output::Json;
    let mut pongs = Vec::new();
    let mut failed = None;
    for _ in 0..matches.get_one::<u16>("count").copied().unwrap_or(1) {
        match answered(client.ping(within(PING_MAX * 2), pod.clone(), peer.clone(), kind).await) {
            Ok(pong) if json => pongs.push(pong),
            Ok(pong) => screen.print(&pong_text(&pong)),
            Err(why) => {
                failed = Some(why);
                break;
            }
        }
    }
    let way = answered(client.way(within(READ_WITHIN), pod.clone(), peer).await);
    // What was asked for is the ping; the way to a peer that is none is no news.
    let (way, why) = match (way, failed) {
        (Ok(way), None) => (way, None),
        (Ok(way), Some(why)) => (way, Some(why)),
        (Err(why), failed) => return Err(failed.unwrap_or(why)),
    };
    let net = answered(client.netcheck(within(READ_WITHIN), pod).await)?;
    let why_not_direct = why_not_direct(&way, &net).unwrap_or_default();
    if json {
        screen.print(&to_json(&Pinged { pongs, way, why_not_direct })?);
    } else if why_not_direct.is_empty() {
        screen.print(&format!("{}\n", way_text(&way, &net)));
    } else {
        screen.print(&format!("{}\n{}", way_text(&way, &net), paragraph("not direct: ", &why_not_direct)));
    }
    why.map_or(Ok(Exit::Done), Err)
}

fn pong_text(pong: &Pong) -> String {
    let way = match pong.path {
        PathStatus::Idle => String::new(),
        PathStatus::Relay { region } => format!(" by relay region {region}"),
        PathStatus::Direct { endpoint, .. } => format!(" straight at {endpoint}"),
    };
    let (ms, us) = (pong.latency_us / 1000, pong.latency_us % 1000);
    let line = format!("pong from {} ({}){way} in {ms}.{us:03} ms", pong.name, pong.address);
    if line.chars().count() <= WIDTH {
        return line + "\n";
    }
    format!("pong from {} ({})\n {way} in {ms}.{us:03} ms\n", pong.name, pong.address)
}

/// `region 4 (fra)`
pub(super) fn region(id: u32, net: &NetReport) -> String {
    let code = net.regions.iter().find(|region| region.id == id).map(|region| region.code.as_str());
    match code.filter(|code| !code.is_empty()) {
        Some(code) => format!("region {id} ({code})"),
        None => format!("region {id}"),
    }
}

fn way_text(way: &Way, net: &NetReport) -> String {
    match way.path {
        PathStatus::Direct { endpoint, rtt_us } => format!("path: direct, {endpoint}, {}", time(rtt_us)),
        PathStatus::Relay { region: id } => format!("path: relay {}", region(id, net)),
        PathStatus::Idle => "path: none in use".to_owned(),
    }
}

/// Why packets to the peer do not go straight; `None` while they do.
fn why_not_direct(way: &Way, net: &NetReport) -> Option<String> {
    if matches!(way.path, PathStatus::Direct { .. }) {
        return None;
    }
    if let Some(obstacle) = &way.obstacle {
        return Some(format!(
            "no packet is exchanged with this peer at all: {}",
            super::why::meaning(obstacle)
        ));
    }
    if way.online == Some(false) {
        return Some("control says that the peer is offline".to_owned());
    }
    if way.endpoints.is_empty() {
        return Some(
            "the peer has told no address: it has not come up yet, or UDP does not get out where it runs"
                .to_owned(),
        );
    }
    let reachable: Vec<_> = way.endpoints.iter().filter(|e| e.reachable).collect();
    if reachable.is_empty() {
        return Some(
            "the peer's addresses are all of an address family that this node does not have".to_owned(),
        );
    }
    let asked = reachable.iter().filter(|e| e.asked_ms_ago.is_some()).count();
    if asked == 0 {
        return Some(
            "no address of the peer's was tried yet: that happens while packets flow, so ping again"
                .to_owned(),
        );
    }
    if reachable.iter().any(|e| e.asked_ms_ago.is_some_and(|ms| ms < ANSWER_MS)) && net.udp {
        return Some(format!(
            "{asked} of the peer's addresses were asked less than a second ago: ping again, a direct path may be found"
        ));
    }
    let here = match (net.udp, net.mapping_varies) {
        (false, _) => {
            "no STUN server answers this node: a firewall drops its UDP (allow UDP out to any port, or to 3478 and 41641)"
        }
        (true, Some(true)) => {
            "the NAT here gives each destination another port, so a peer behind a NAT of its own cannot find this pod \
             (let the node keep its ports: no --random-fully, or open node.udp_port_range)"
        }
        (true, Some(false) | None) => "UDP works here; look at the firewall or NAT on the peer's side",
    };
    Some(format!("{asked} of the peer's addresses were asked and none answered; {here}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use podtether_proto::engine::WayEndpoint;

    #[test]
    fn a_pong_reads_as_a_sentence() {
        let pong = Pong {
            name: "b.example".into(),
            address: "100.64.0.2".parse().unwrap(),
            kind: PingKind::Disco,
            latency_us: 12_034,
            path: PathStatus::Relay { region: 7 },
        };
        assert_eq!(pong_text(&pong), "pong from b.example (100.64.0.2) by relay region 7 in 12.034 ms\n");
        let long = Pong { name: format!("{}.example", "b".repeat(60)), ..pong };
        assert!(pong_text(&long).lines().all(|line| line.len() <= WIDTH), "{}", pong_text(&long));
    }

    #[test]
    fn why_not_direct_table() {
        let endpoint = |asked_ms_ago, reachable| WayEndpoint {
            endpoint: "192.0.2.1:41641".parse().unwrap(),
            asked_ms_ago,
            reachable,
        };
        let way = Way {
            name: "b".into(),
            addresses: Vec::new(),
            path: PathStatus::Relay { region: 7 },
            home_derp: 7,
            online: Some(true),
            handshake_age_ms: None,
            endpoints: vec![endpoint(Some(3000), true)],
            obstacle: None,
        };
        let net = NetReport { udp: true, ..NetReport::default() };
        let hard = NetReport { mapping_varies: Some(true), ..net.clone() };
        let shut = NetReport::default();
        let with = |endpoints: Vec<WayEndpoint>| Way { endpoints, ..way.clone() };
        let straight = PathStatus::Direct { endpoint: "192.0.2.1:1".parse().unwrap(), rtt_us: 5 };
        let table = [
            (Way { path: straight, ..way.clone() }, &net, ""),
            (Way { obstacle: Some("peer_expired".into()), ..way.clone() }, &net, "key has expired"),
            (Way { online: Some(false), ..way.clone() }, &net, "offline"),
            (with(Vec::new()), &net, "has told no address"),
            (with(vec![endpoint(None, false)]), &net, "address family"),
            (with(vec![endpoint(None, true)]), &net, "tried yet"),
            (with(vec![endpoint(Some(10), true)]), &net, "ping again"),
            (way.clone(), &shut, "no STUN server answers"),
            (way.clone(), &hard, "another port"),
            (way.clone(), &net, "on the peer's side"),
        ];
        for (way, net, says) in table {
            let why = why_not_direct(&way, net).unwrap_or_default();
            assert!(if says.is_empty() { why.is_empty() } else { why.contains(says) }, "{says:?}: {why:?}");
        }
    }
}
