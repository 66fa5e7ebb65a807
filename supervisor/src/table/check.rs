//! CNI CHECK: the first thing that is not as it should be.

use std::time::Duration;

use podtether_net::link::{self, PodConfig};
use podtether_proto::calls::KnownEngine;
use podtether_proto::engine::{NodeState, PeerStatus};
use podtether_proto::node::{CheckRequest, CniError, code};

use super::Table;
use super::attach::{error, pod_name};
use super::pod::Leaver;
use crate::dns;
use crate::engine::within;

/// A control session older than this is a fault.
const CONTROL_WITHIN: Duration = Duration::from_secs(300);
/// A handshake older than this is a fault for a peer with traffic.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(180);
/// Sent that lately counts as traffic.
const TRAFFIC_WITHIN: Duration = Duration::from_secs(60);
/// How long the engine may take for an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

const RESTARTED: &str = "it is restarted by itself";

fn failed(what: impl Into<String>, details: impl Into<String>) -> CniError {
    error(code::CHECK_FAILED, what, details)
}

impl Table {
    pub(super) fn check(&mut self, request: CheckRequest, reply: Leaver) {
        let Some(pod) = self.pods.get(&request.attachment) else {
            let what = format!("container {} has no ts0 of ours", request.attachment.container_id);
            let _ = reply.send(Err(failed(what, "delete the pod, or ADD again")));
            return;
        };
        let name = pod_name(&pod.record.pod);
        let mut spec = self.context.link_spec(&pod.record);
        spec.pod_netns = request.netns.clone().into();
        let config = pod.checked_config(self.context.routes(&pod.record.addresses));
        if pod.record.unhurried && pod.configured.is_none() && pod.record.addresses.is_empty() {
            // It joins when it can, and its runtime was told of no address.
            let _ = reply.send(Ok(()));
            return;
        }
        let client = pod.engine.as_ref().and_then(|e| e.client.clone());
        let dns_problem = pod.engine.as_ref().and_then(|e| e.dns_problem.clone());
        let (reason, stopped) = (pod.reason.clone(), pod.stopped.is_some());
        tokio::spawn(async move {
            let result = async {
                compare(&name, &request, &config)?;
                link::check(&spec, &config).await.map_err(|e| {
                    failed(format!("{name}: {e}"), "delete the pod, or restart the supervisor")
                })?;
                let client = client.ok_or_else(|| {
                    failed(
                        format!("{name}: its engine is not running: {reason}"),
                        if stopped { "mend that, then delete the pod" } else { RESTARTED },
                    )
                })?;
                check_engine(&name, &client).await?;
                dns_problem.map_or(Ok(()), |why| {
                    Err(failed(format!("{name}: {}: {why}", dns::NOT_INTERCEPTED), dns::MEND))
                })
            }
            .await;
            let _ = reply.send(result);
        });
    }
}

/// What the runtime remembers against what we made.
fn compare(name: &str, request: &CheckRequest, config: &PodConfig) -> Result<(), CniError> {
    for address in &request.addresses {
        if !config.addresses.iter().any(|a| a.addr() == address.addr()) {
            let what = format!("{name}: {address} of prevResult is not its address");
            return Err(failed(what, "delete the pod, or ADD again"));
        }
    }
    for route in &request.routes {
        if !config.routes.contains(route) {
            let what = format!("{name}: the route to {route} of prevResult is not ours");
            return Err(failed(what, "delete the pod, or ADD again"));
        }
    }
    Ok(())
}

async fn check_engine(name: &str, client: &KnownEngine) -> Result<(), CniError> {
    let silent = |e| failed(format!("{name}: its engine does not answer: {e}"), RESTARTED);
    let status = client.watch(within(ANSWER_WITHIN), 0).await.map_err(silent)?;
    if status.state != NodeState::Running {
        let what = format!("{name}: its node is not running: {:?}", status.state);
        return Err(failed(what, "see the supervisor's log"));
    }
    let age = status.control_age_ms.map(Duration::from_millis);
    if !status.control_connected && age.is_none_or(|a| a > CONTROL_WITHIN) {
        let seen = age.map_or("never in this process".to_owned(), |a| format!("{} s ago", a.as_secs()));
        let what = format!("{name}: no control session; last heard {seen}");
        return Err(failed(what, "is the control server reachable from this node?"));
    }
    let peers = client.peers(within(ANSWER_WITHIN)).await.map_err(silent)?;
    match peers.iter().find(|p| is_stale(p)) {
        Some(peer) => {
            let what = format!("{name}: no fresh handshake with {} in spite of traffic", peer.name);
            Err(failed(what, "is that peer reachable from this node?"))
        }
        None => Ok(()),
    }
}

/// Data goes to a peer that once answered, but its last handshake is too old.
fn is_stale(peer: &PeerStatus) -> bool {
    let recent =
        |age: Option<u64>, within: Duration| age.is_some_and(|ms| u128::from(ms) <= within.as_millis());
    peer.rx_bytes > 0
        && recent(peer.last_tx_age_ms, TRAFFIC_WITHIN)
        && !recent(peer.handshake_age_ms, HANDSHAKE_WITHIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use podtether_proto::engine::PathStatus;

    #[test]
    fn stale_handshakes() {
        let peer = |rx_bytes, tx_age, handshake_age| PeerStatus {
            name: "p".into(),
            addresses: vec![],
            path: PathStatus::Idle,
            handshake_age_ms: handshake_age,
            last_tx_age_ms: tx_age,
            last_rx_age_ms: None,
            tx_bytes: 1,
            rx_bytes,
        };
        assert!(!is_stale(&peer(1, Some(100), Some(100_000))));
        assert!(is_stale(&peer(1, Some(100), Some(181_000))));
        assert!(is_stale(&peer(1, Some(100), None)));
        assert!(!is_stale(&peer(0, Some(100), None)), "a peer that is away is no fault of the link");
        assert!(!is_stale(&peer(1, Some(61_000), Some(500_000))), "no traffic");
        assert!(!is_stale(&peer(1, None, None)));
    }
}
