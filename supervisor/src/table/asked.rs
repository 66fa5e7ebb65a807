//! What a person asks about pods: of the table, and of the engines.

use std::time::Duration;

use futures_util::future::join_all;
use podtether_proto::calls::{self, KnownEngine};
use podtether_proto::engine::{EngineMetrics, Flow, NetReport, PeerStatus, Verdict, Way};
use podtether_proto::node::{CniError, Explained, Live, PodSelector, PodSummary, code};
use tarpc::client::RpcError;

use super::{Handle, LastExit, MAX_REASON, Message, PodReport, ending};
use crate::distrust::{self, tame};
use crate::engine::within;
use crate::memory;

/// How long an engine may take to answer.
const ENGINE_WITHIN: Duration = Duration::from_secs(1);
/// Pods of one answer whose engines are asked.
const LIVE_PODS: usize = 128;
/// Bytes of JSON in one answer: far below what a frame takes.
const PAGE_BYTES: usize = 256 << 10;
/// Peers of one answer.
const PAGE_PEERS: usize = 1000;
const MAX_NAME: usize = 255;
const MAX_ADDRESSES: usize = 8;
const MAX_ENDPOINTS: usize = 64;
const MAX_REGIONS: usize = 256;

impl Handle {
    /// Pods from number `skip` on, as many as fit into an answer, at least one while there are any.
    pub async fn pods(&self, skip: usize, live: bool) -> Vec<PodSummary> {
        let listing = self.list().await;
        let pods = listing.pods.into_iter().zip(listing.clients).skip(skip);
        let pods = pods.take(if live { LIVE_PODS } else { usize::MAX });
        let asked = pods.map(|(report, client)| summarised(report, client.filter(|_| live)));
        page(join_all(asked).await)
    }

    /// All pods with what their engines say, and of each the id of its join and how its last engine ended.
    pub async fn live(&self) -> Vec<(PodSummary, String, Option<LastExit>)> {
        let listing = self.list().await;
        let pods = listing.pods.into_iter().zip(listing.clients);
        let asked = pods.map(|(mut report, client)| async move {
            let (join, exit) = (std::mem::take(&mut report.join), report.last_exit.take());
            (summarised(report, client).await, join, exit)
        });
        join_all(asked).await
    }

    /// How a pod came to be what it is.
    ///
    /// # Errors
    /// No such pod.
    pub async fn explain(&self, pod: PodSelector) -> Result<Explained, CniError> {
        self.ask(|to| Message::Explain(pod, to)).await.unwrap_or_else(|| Err(ending()))
    }

    /// Peers of a pod from number `skip` on.
    ///
    /// # Errors
    /// No such pod, no engine, or no answer.
    pub async fn peers(&self, pod: PodSelector, skip: usize) -> Result<Vec<PeerStatus>, CniError> {
        let (name, client) = self.client(pod).await?;
        let peers = client.peers(within(ENGINE_WITHIN)).await.map_err(|e| silent(&name, &e))?;
        let fit = |mut peer: PeerStatus| {
            tame(&mut peer.name, MAX_NAME);
            peer.addresses.truncate(MAX_ADDRESSES);
            peer
        };
        Ok(page(peers.into_iter().skip(skip).take(PAGE_PEERS).map(fit).collect()))
    }

    /// Everything known of the way from a pod to a peer.
    ///
    /// # Errors
    /// No such pod, no engine, no such peer, or no answer.
    pub async fn way(&self, pod: PodSelector, peer: String) -> Result<Way, CniError> {
        let (name, client) = self.client(pod).await?;
        let asked = client.way(within(ENGINE_WITHIN), peer.clone()).await.map_err(|e| silent(&name, &e))?;
        let mut way = asked.map_err(|why| refused(&format!("{name}: {}", distrust::label(&peer)), why))?;
        tame(&mut way.name, MAX_NAME);
        way.addresses.truncate(MAX_ADDRESSES);
        way.endpoints.truncate(MAX_ENDPOINTS);
        way.obstacle = way.obstacle.map(|why| distrust::label(&why));
        Ok(way)
    }

    /// What would become of a packet in a pod's engine.
    ///
    /// # Errors
    /// No such pod, no engine, or no answer.
    pub async fn why(&self, pod: PodSelector, packet: Flow) -> Result<Verdict, CniError> {
        let (name, client) = self.client(pod).await?;
        let asked = client.why(within(ENGINE_WITHIN), packet).await.map_err(|e| silent(&name, &e))?;
        let mut verdict = asked.map_err(|why| refused(&name, why))?;
        tame(&mut verdict.reason, MAX_NAME);
        if let Some((chunk, _)) = &mut verdict.rule {
            tame(chunk, MAX_NAME);
        }
        if let Some(peer) = &mut verdict.peer {
            tame(peer, MAX_NAME);
        }
        Ok(verdict)
    }

    /// What the network looks like from a pod's engine.
    ///
    /// # Errors
    /// No such pod, no engine, or no answer.
    pub async fn netcheck(&self, pod: PodSelector) -> Result<NetReport, CniError> {
        let (name, client) = self.client(pod).await?;
        let mut report = client.netcheck(within(ENGINE_WITHIN)).await.map_err(|e| silent(&name, &e))?;
        report.endpoints.truncate(MAX_ENDPOINTS);
        report.regions.truncate(MAX_REGIONS);
        for region in &mut report.regions {
            tame(&mut region.code, MAX_NAME);
            tame(&mut region.name, MAX_NAME);
        }
        Ok(report)
    }

    async fn client(&self, pod: PodSelector) -> Result<(String, KnownEngine), CniError> {
        self.ask(|to| Message::Client(pod, to)).await.unwrap_or_else(|| Err(ending()))
    }
}

/// Why the engine of a pod gave no answer, and what to do.
pub(super) fn silent(pod: &str, error: &RpcError) -> CniError {
    let (mut msg, details) = if let Some(why) = calls::unknown(error) {
        let name = pod.strip_prefix("pod ").unwrap_or(pod);
        (
            format!("{pod}: its engine is of an earlier build and was not asked: {why}"),
            format!("`podtether restart {name}` hands the pod over to an engine of this build"),
        )
    } else {
        let details = "one that hangs is restarted within seconds".to_owned();
        (format!("{pod}: its engine does not answer: {error}"), details)
    };
    // It may have said so itself.
    tame(&mut msg, MAX_REASON);
    CniError { code: code::TRY_AGAIN, msg, details }
}

fn refused(what: &str, mut why: String) -> CniError {
    tame(&mut why, MAX_REASON);
    CniError { code: code::TRY_AGAIN, msg: format!("{what}: {why}"), details: String::new() }
}

fn live(m: &EngineMetrics) -> Live {
    Live {
        peers: m.peers,
        peers_direct: m.peers_direct,
        peers_relay: m.peers_relay,
        last_handshake_unix_s: m.last_handshake_unix_s,
        tx_bytes: m.tx_bytes,
        rx_bytes: m.rx_bytes,
        drops: m.drops.iter().map(|(_, count)| *count).fold(0, u64::saturating_add),
    }
}

/// As many as fit, at least one.
fn page<T: serde::Serialize>(all: Vec<T>) -> Vec<T> {
    let mut bytes = 0;
    let mut page = Vec::new();
    for one in all {
        bytes += serde_json::to_string(&one).map_or(0, |text| text.len());
        if bytes > PAGE_BYTES && !page.is_empty() {
            break;
        }
        page.push(one);
    }
    page
}

/// With what the engine says, where it is asked and answers.
async fn summarised(report: PodReport, client: Option<KnownEngine>) -> PodSummary {
    let metrics = match client {
        Some(client) => client.metrics(within(ENGINE_WITHIN)).await.ok(),
        None => None,
    };
    PodSummary { live: metrics.as_ref().map(live), ..summary(report) }
}

fn summary(report: PodReport) -> PodSummary {
    PodSummary {
        memory_bytes: report.engine_pid.and_then(memory::of_process),
        namespace: report.namespace,
        pod: report.pod,
        container_id: report.container_id,
        tailnet: report.tailnet,
        state: report.state.to_owned(),
        reason: report.reason,
        name: report.name,
        addresses: report.addresses,
        restarts: report.restarts,
        handovers: report.handovers,
        limits: report.limits.into_iter().map(str::to_owned).collect(),
        sandbox: report.sandbox,
        control_connected: report.control_connected,
        home_derp: report.home_derp,
        accept_routes: report.accept_routes,
        exit_node: report.exit_node,
        health: report.health,
        uid: report.uid,
        tags: report.tags,
        added_unix_ms: report.added_unix_ms,
        engine_pid: report.engine_pid,
        cpu_us: report.engine_cpu_us,
        live: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_a_bounded_size_and_at_least_one_entry() {
        let big = "x".repeat(PAGE_BYTES);
        assert_eq!(page(vec![big.clone(), big.clone()]).len(), 1);
        assert_eq!(page(vec!["a", "b"]), ["a", "b"]);
        assert_eq!(page(Vec::<u8>::new()), [0; 0]);
    }
}
