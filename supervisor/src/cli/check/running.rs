//! What is running: the supervisor, its pods, their sandboxes.

use std::path::Path;

use podtether_proto::engine::NetReport;
use podtether_proto::node::PodSummary;

use super::super::call::{self, READ_WITHIN, answered, selector};
use super::super::netcheck::{any_pod, mapping};
use super::super::status::{Standing, notes, standing, totals};
use super::Found;
use crate::engine::within;

/// Pods that are named one by one.
const NAMED: usize = 10;

/// What an engine measured of UDP, where one runs, and the rest.
pub(super) async fn all(socket: &Path) -> (Option<Found>, Vec<Found>) {
    let client = match call::connect(socket).await {
        Ok(client) => client,
        Err(e) => {
            let fix =
                "start podtether-supervisor; new pods do not start without it, running ones do not need it";
            return (None, vec![Found::fail(e, fix)]);
        }
    };
    let mut found = vec![Found::ok(format!("it answers at {}", socket.display()))];
    match call::pods(&client, false).await {
        Ok(pods) => found.extend(judge(&pods)),
        Err(e) => found.push(Found::fail(e, "see its log")),
    }
    let measured = async {
        let pod = any_pod(&client).await.ok()?;
        answered(client.netcheck(within(READ_WITHIN), selector(&pod)).await).ok()
    };
    (measured.await.filter(|report| report.age_ms.is_some()).map(|report| udp(&report)), found)
}

fn udp(report: &NetReport) -> Found {
    if !report.udp {
        return Found::fail(
            "no STUN server answers the engines: all traffic goes through relays",
            "allow UDP out, to 3478 (STUN) and to any port (peers)",
        );
    }
    let what = format!("UDP gets out; {}", mapping(report));
    match report.mapping_varies {
        Some(true) => Found::warn(
            what,
            "no --random-fully in the node's NAT, or open node.udp_port_range to the internet",
        ),
        Some(false) | None => Found::ok(what),
    }
}

fn judge(pods: &[PodSummary]) -> Vec<Found> {
    let mut found = vec![Found::ok(totals(pods.iter()))];
    let wrong: Vec<&PodSummary> = pods.iter().filter(|pod| !notes(pod).is_empty()).collect();
    for pod in wrong.iter().take(NAMED) {
        let (name, notes) = (format!("{}/{}", pod.namespace, pod.pod), notes(pod).join("; "));
        let what = format!("pod {name} is {}: {notes}", pod.state);
        let fix = format!("podtether explain {name}; podtether logs {name}");
        found.push(if standing(pod) == Standing::Failed {
            Found::fail(what, fix)
        } else {
            Found::warn(what, fix)
        });
    }
    if wrong.len() > NAMED {
        found.push(Found::warn(format!("and {} pods more", wrong.len() - NAMED), "podtether status"));
    }
    let mut missed: Vec<&str> = pods
        .iter()
        .flat_map(|pod| &pod.sandbox)
        .filter(|step| step.is_missed())
        .map(|s| s.step.as_str())
        .collect();
    missed.sort_unstable();
    missed.dedup();
    if !missed.is_empty() {
        found.push(Found::warn(
            format!("engines run without these steps of their sandbox: {}", missed.join(", ")),
            "docs/sandbox.md has what each needs; node.require_sandbox = true refuses to run without",
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::Grade;
    use super::*;
    use crate::cli::status::tests::pod;

    #[test]
    fn pods_that_are_wrong_are_named_up_to_a_number() {
        let grades = |pods: &[PodSummary]| judge(pods).iter().map(|found| found.0).collect::<Vec<_>>();
        assert_eq!(grades(&[pod("a", "b", "running")]), [Grade::Ok]);
        let wrong = PodSummary { reason: "no key".into(), ..pod("a", "b", "stopped") };
        let waits = PodSummary { reason: "open https://x".into(), ..pod("a", "c", "needs-login") };
        assert_eq!(grades(&[wrong.clone(), waits]), [Grade::Ok, Grade::Fail, Grade::Warn]);
        assert_eq!(grades(&vec![wrong; 25]).len(), 1 + NAMED + 1);
    }

    #[test]
    fn udp_as_measured() {
        let report = |udp, mapping_varies| NetReport { udp, mapping_varies, ..NetReport::default() };
        assert_eq!(super::udp(&report(false, None)).0, Grade::Fail);
        assert_eq!(super::udp(&report(true, Some(true))).0, Grade::Warn);
        assert_eq!(super::udp(&report(true, Some(false))).0, Grade::Ok);
    }
}
