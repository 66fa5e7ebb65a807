//! `netcheck`: what the network looks like from here, as an engine measured it.

use std::fmt::Write as _;
use std::time::Duration;

use clap::{ArgMatches, Command};
use podtether_proto::engine::NetReport;
use podtether_proto::node::NodeClient;

use super::call::{self, READ_WITHIN, answered, selector};
use super::text::{Cell, Look, Paint, Table, age, fixed, flexible, paragraph, time};
use super::{Exit, Screen, of_pod, show, text_of};
use crate::engine::within;

pub(super) fn command() -> Command {
    of_pod(
        "netcheck",
        "Show what the network looks like from a pod's engine: UDP, NAT, relay regions and how far they are",
    )
    .mut_arg("pod", |pod| pod.required(false).help("a pod of this node; without, the first that runs"))
}

pub(super) async fn run(
    client: &NodeClient,
    matches: &ArgMatches,
    screen: &mut Screen<'_>,
) -> Result<Exit, String> {
    let pod = match text_of(matches, "pod") {
        name if !name.is_empty() => name,
        _ => any_pod(client).await?,
    };
    let report = answered(client.netcheck(within(READ_WITHIN), selector(&pod)).await)?;
    let look = screen.look;
    show(&report, matches, screen, |report| text(&pod, report, look))
}

/// The first pod that runs: engines of a node share its network.
pub(super) async fn any_pod(client: &NodeClient) -> Result<String, String> {
    let pods = call::pods(client, false).await?;
    let running = pods.iter().find(|pod| pod.state == "running");
    running.map(|pod| format!("{}/{}", pod.namespace, pod.pod)).ok_or_else(|| {
        "no pod of this node runs, so nobody has measured the network; see `podtether status`".to_owned()
    })
}

/// What kind of NAT there is, in a sentence.
pub(super) fn mapping(report: &NetReport) -> &'static str {
    match report.mapping_varies {
        Some(true) => {
            "each destination sees another port (hard: direct paths only to peers with an open port)"
        }
        Some(false) => "every destination sees the same port (easy: direct paths can be found)",
        None => "unknown: it takes answers of two STUN servers",
    }
}

pub(super) fn text(pod: &str, report: &NetReport, look: Look) -> String {
    let measured = report.age_ms.map_or_else(
        || "not measured yet".to_owned(),
        |ms| format!("measured {} ago", age(Duration::from_millis(ms))),
    );
    let mut text = paragraph("", &format!("network as the engine of {pod} sees it, {measured}"));
    let udp = if report.udp { look.paint(Paint::Good, "works") } else { look.paint(Paint::Bad, "no answer") };
    let _ = writeln!(text, "  UDP       {udp}");
    let address =
        |mapped: Option<std::net::SocketAddr>| mapped.map_or_else(|| "no".to_owned(), |a| a.to_string());
    let _ = writeln!(text, "  IPv4      {}", address(report.mapped_v4));
    let _ = writeln!(text, "  IPv6      {}", address(report.mapped_v6));
    text.push_str(&paragraph("  NAT       ", mapping(report)));
    let told: Vec<String> = report.endpoints.iter().map(ToString::to_string).collect();
    let told = if told.is_empty() { "nothing".to_owned() } else { told.join(" ") };
    text.push_str(&paragraph("  told      ", &told));
    let mut table =
        Table::new(vec![fixed("REGION"), fixed("CODE"), flexible("NAME", 10), fixed("LATENCY"), fixed("")]);
    for region in &report.regions {
        let home = if region.id == report.home_derp {
            "home"
        } else if region.connected {
            "connected"
        } else {
            ""
        };
        table.row(vec![
            region.id.to_string().into(),
            region.code.as_str().into(),
            region.name.as_str().into(),
            region.latency_us.map_or_else(|| "no answer".to_owned(), time).into(),
            Cell::painted(home, Paint::Good),
        ]);
    }
    if report.regions.is_empty() {
        text.push_str("  no relay region is known: control has not sent a relay map yet\n");
    } else {
        text.push_str(&table.render(look));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::text::WIDTH;
    use podtether_proto::engine::NetRegion;

    #[test]
    fn what_the_network_looks_like() {
        let region = |id, code: &str, latency_us, connected| NetRegion {
            id,
            code: code.into(),
            name: format!("Region {code}"),
            latency_us,
            connected,
        };
        let report = NetReport {
            udp: true,
            mapped_v4: Some("192.0.2.7:41641".parse().unwrap()),
            mapped_v6: None,
            mapping_varies: Some(false),
            endpoints: vec!["192.0.2.7:41641".parse().unwrap(), "10.0.0.5:41641".parse().unwrap()],
            home_derp: 4,
            regions: vec![region(4, "fra", Some(12_300), true), region(1, "nyc", None, false)],
            age_ms: Some(12_000),
        };
        assert_eq!(
            text("shop/web", &report, Look::PLAIN),
            "network as the engine of shop/web sees it, measured 12s ago\n  \
             UDP       works\n  \
             IPv4      192.0.2.7:41641\n  \
             IPv6      no\n  \
             NAT       every destination sees the same port (easy: direct paths can be found)\n  \
             told      192.0.2.7:41641 10.0.0.5:41641\n\
             REGION  CODE  NAME        LATENCY\n\
             4       fra   Region fra  12.3 ms    home\n\
             1       nyc   Region nyc  no answer\n"
        );
        let nothing = text("shop/web", &NetReport::default(), Look::PLAIN);
        assert!(nothing.contains("no answer") && nothing.contains("no relay region is known"), "{nothing}");
        let many = NetReport {
            endpoints: vec!["[2001:db8:1234:5678:9abc:def0:1234:5678]:41641".parse().unwrap(); 9],
            ..report
        };
        assert!(text("shop/web", &many, Look::PLAIN).lines().all(|line| line.chars().count() <= WIDTH));
    }
}
