//! What the driver tells its supervisor: status, metrics, peers.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use podtether_core::dns;
use podtether_core::engine::{self as core, PathView, PeerView, SelfView, Status};
use podtether_core::health::{HealthMessage as Health, Severity};
use podtether_proto::engine::{
    Decision, EngineMetrics, Flow, HealthMessage, NetRegion, NetReport, NodeState, PathStatus, PeerStatus,
    PingKind, Pong, Rtt, SelfNode, Verdict, Way, WayEndpoint,
};

use super::Driver;

/// How far the node has come with the control server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Membership {
    /// Not registered in this process yet.
    Connecting,
    /// A person has to open the URL.
    NeedsLogin { url: String },
    /// Registered in this process.
    Registered { approved: bool },
    /// Logged out on request.
    LoggedOut,
}

impl Driver {
    /// Brings the status up to date; watchers wake when it differs.
    pub(super) fn report(&self) {
        let core = self.engine.status();
        self.board.update(|status| {
            status.state = state(&self.membership, &self.trouble, &core);
            status.control_connected = core.control_connected;
            status.home_derp = core.home_derp.0;
            status.health = core.health.iter().map(health).collect();
            if let Membership::NeedsLogin { url } = &self.membership
                && core.running
            {
                let text = format!("open {url}");
                let login = Health::new(Severity::High, "somebody has to log this node in").with_text(text);
                status.health.push(health(&login));
            } else if core.running && !core.control_connected && !self.trouble.is_empty() {
                let lost = Health::new(Severity::Medium, "no control session").with_text(&self.trouble);
                status.health.push(health(&lost));
            }
            status.node = core.node.map(self_node);
            let so_far = || Some(micros(self.started.elapsed()));
            let reached = [
                (
                    matches!(self.membership, Membership::Registered { .. }),
                    &mut status.milestones.registered_us,
                ),
                (core.running, &mut status.milestones.netmap_us),
                (self.engine.counters().handshakes > 0, &mut status.milestones.handshake_us),
            ];
            for (_, at) in reached.into_iter().filter(|(is, at)| *is && at.is_none()) {
                *at = so_far();
            }
            // Thousands, perhaps.
            if status.routes_version != self.engine.routes_version() {
                let routes = self.engine.routes();
                status.routes_version = self.engine.routes_version();
                status.accepted_routes = routes.accepted;
                status.exit_node_id = routes.exit_node;
            }
        });
    }

    pub(super) fn metrics(&self, now: Instant) -> EngineMetrics {
        let counters = self.engine.counters();
        let gauges = self.engine.gauges(now);
        let core = counters.drops().filter(|(_, n)| *n > 0).map(|(why, n)| (why.name(), n));
        let names = self.engine.dns_counts().filter(|(_, n)| *n > 0);
        let log = Some(("log_line", crate::log::dropped())).filter(|(_, n)| *n > 0);
        let status = self.engine.status();
        EngineMetrics {
            tun_packets: self.intake.tun_packets,
            inputs: self.intake.inputs(),
            tx_packets: counters.tx_packets,
            tx_bytes: counters.tx_bytes,
            rx_packets: counters.rx_packets,
            rx_bytes: counters.rx_bytes,
            drops: core
                .chain(self.drops.named())
                .chain(names)
                .chain(crate::refused::named())
                .chain(odd_map(counters))
                .chain(log)
                .map(|(why, n)| (why.to_owned(), n))
                .collect(),
            filter_passed: self.engine.filter_passed(),
            filter_unruled: self.engine.filter_unruled().map(|(what, n)| (what.to_owned(), n)).into(),
            filter_rules: wide(gauges.filter_rules),
            filter_skipped: wide(gauges.filter_skipped),
            rejects_sent: counters.rejects_sent,
            rejects_received: counters.rejects_received,
            disco_adverts: counters.disco_adverts,
            handshakes: counters.handshakes,
            peers: wide(gauges.peers),
            peers_direct: wide(gauges.peers_direct),
            peers_relay: wide(gauges.peers_relay),
            peers_unanswered: wide(gauges.peers_unanswered),
            rtt: rtt(&gauges),
            control_connected: status.control_connected,
            derp_connected: wide(gauges.derp_connected),
            home_derp_connected: gauges.home_connected,
            home_derp_rtt_us: gauges.home_latency.map(micros),
            home_derp: status.home_derp.0,
            last_handshake_unix_s: counters
                .last_handshake
                .and_then(|at| u64::try_from(at.as_millis() / 1000).ok())
                .unwrap_or(0),
        }
    }

    pub(super) fn why(&self, packet: Flow, now: Instant) -> Verdict {
        let Flow { src, dst, protocol, src_port, dst_port } = packet;
        let why = self.engine.why(core::Question { src, dst, protocol, src_port, dst_port }, now);
        Verdict {
            inbound: why.direction == core::Direction::In,
            decision: match why.decision {
                core::Decision::Accept => Decision::Accept,
                core::Decision::Drop => Decision::Drop,
                core::Decision::RefusedByPeer => Decision::RefusedByPeer,
            },
            rule: why.rule.map(|rule| (rule.chunk, rule.index)),
            reason: why.reason.to_owned(),
            peer: why.peer,
        }
    }

    pub(super) fn peer_caps(&self, peer: IpAddr) -> Vec<(String, Vec<String>)> {
        let text = |arguments: Vec<_>| arguments.iter().map(ToString::to_string).collect();
        self.engine.peer_caps(peer).into_iter().map(|(name, arguments)| (name, text(arguments))).collect()
    }

    /// Says in the log what was refused, each reason at most once a minute.
    pub(super) fn tell_refused(&mut self, now: Instant) {
        if self.refused.deadline(self.refused_sum()).is_none_or(|at| at > now) && self.refused.began() {
            return;
        }
        let mut lines = std::mem::take(&mut self.refused);
        lines.look(now, self.refused_counts(), |reason, count| {
            let meaning = meaning(reason);
            tracing::warn!(pod = self.board.pod_uid(), reason, count, "refused bad input: {meaning}");
        });
        self.refused = lines;
    }

    /// All that may be told of.
    pub(super) fn refused_sum(&self) -> u64 {
        self.refused_counts().map(|(_, n)| n).fold(0, u64::wrapping_add)
    }

    fn refused_counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let bad = self.engine.counters().drops().filter(|(why, _)| why.is_bad_input());
        let bad = bad.map(|(why, n)| (why.name(), n)).chain(self.engine.dns_counts());
        bad.chain(crate::refused::named()).chain(odd_map(self.engine.counters()))
    }

    pub(super) fn way(&self, peer: &str, now: Instant) -> Option<Way> {
        let ip = peer.parse().ok().or_else(|| self.engine.find_peer(peer))?;
        let view = self.engine.way(ip, now)?;
        let endpoint = |seen: core::EndpointView| WayEndpoint {
            endpoint: seen.address,
            asked_ms_ago: seen.asked_age.map(millis),
            reachable: seen.reachable,
        };
        Some(Way {
            name: view.peer.name,
            addresses: view.peer.addresses,
            path: path(view.peer.path),
            home_derp: view.home.0,
            online: view.online,
            handshake_age_ms: view.peer.handshake_age.map(millis),
            endpoints: view.endpoints.into_iter().map(endpoint).collect(),
            obstacle: view.obstacle.map(|why| why.name().to_owned()),
        })
    }

    pub(super) fn netcheck(&self, now: Instant) -> NetReport {
        let view = self.engine.net_view(now);
        let region = |seen: core::RegionView| NetRegion {
            id: seen.id.0,
            code: seen.code,
            name: seen.name,
            latency_us: seen.latency.map(micros),
            connected: seen.connected,
        };
        NetReport {
            udp: view.udp,
            mapped_v4: view.mapped[0],
            mapped_v6: view.mapped[1],
            mapping_varies: view.mapping_varies,
            endpoints: view.endpoints,
            home_derp: view.home.0,
            regions: view.regions.into_iter().map(region).collect(),
            age_ms: view.age.map(millis),
        }
    }

    pub(super) fn peers(&self, now: Instant) -> Vec<PeerStatus> {
        self.engine.peers(now).into_iter().map(peer).collect()
    }
}

fn meaning(reason: &str) -> &'static str {
    let of_packets =
        || core::DropReason::ALL.iter().find(|why| why.name() == reason).map(|why| why.meaning());
    let of_map = || ODD_MAP.iter().find(|(name, _)| *name == reason).map(|(_, meaning)| *meaning);
    let known = crate::refused::meaning(reason).or_else(|| dns::meaning(reason));
    known.or_else(of_packets).or_else(of_map).unwrap_or_default()
}

/// What the core passes over in netmaps.
const ODD_MAP: [(&str, &str); 2] = [
    ("control_map_part", "an element of a netmap that makes no sense or is over a bound"),
    ("control_map_unknown_peer", "news of a peer that the netmap does not have"),
];

/// How much of that there was.
fn odd_map(counters: &core::Counters) -> impl Iterator<Item = (&'static str, u64)> {
    let counts = [counters.map_ignored, counters.map_unknown];
    ODD_MAP.iter().zip(counts).map(|((name, _), n)| (*name, n)).filter(|(_, n)| *n > 0)
}

fn state(membership: &Membership, trouble: &str, core: &Status) -> NodeState {
    let approved = core.node.as_ref().is_none_or(|node| node.machine_authorized);
    match membership {
        Membership::LoggedOut => NodeState::LoggedOut,
        Membership::NeedsLogin { url } if !core.running => NodeState::NeedsLogin { url: url.clone() },
        _ if core.running && approved => NodeState::Running,
        _ if core.running => NodeState::NeedsApproval,
        Membership::Registered { approved: false } => NodeState::NeedsApproval,
        Membership::Registered { approved: true } if trouble.is_empty() => {
            NodeState::Connecting { reason: "registered, waiting for the first netmap".to_owned() }
        }
        Membership::Connecting | Membership::NeedsLogin { .. } | Membership::Registered { .. } => {
            let reason = if trouble.is_empty() { "connecting to the control server" } else { trouble };
            NodeState::Connecting { reason: reason.to_owned() }
        }
    }
}

fn health(message: &Health) -> HealthMessage {
    HealthMessage {
        title: message.title.clone(),
        text: message.text.clone(),
        severity: message.severity.name().to_owned(),
    }
}

fn self_node(view: SelfView) -> SelfNode {
    SelfNode {
        name: view.name,
        addresses: view.addresses,
        tags: view.tags,
        stable_id: view.stable_id,
        key_expiry_unix_s: view.key_expiry.map(|at| at.as_millis().div_euclid(1000)),
    }
}

fn peer(view: PeerView) -> PeerStatus {
    PeerStatus {
        name: view.name,
        addresses: view.addresses,
        path: path(view.path),
        handshake_age_ms: view.handshake_age.map(millis),
        last_tx_age_ms: view.last_tx_age.map(millis),
        last_rx_age_ms: view.last_rx_age.map(millis),
        tx_bytes: view.tx_bytes,
        rx_bytes: view.rx_bytes,
    }
}

fn path(view: PathView) -> PathStatus {
    match view {
        PathView::Idle => PathStatus::Idle,
        PathView::Relay(region) => PathStatus::Relay { region: region.0 },
        PathView::Direct(endpoint, rtt) => PathStatus::Direct { endpoint, rtt_us: micros(rtt) },
    }
}

/// What a ping came to, for who asked.
pub(super) fn pong(result: core::PingResult) -> Result<Pong, String> {
    let reply = result.outcome.map_err(|error| error.to_string())?;
    Ok(Pong {
        name: result.peer.trim_end_matches('.').to_owned(),
        address: result.ip,
        kind: match result.kind {
            core::PingKind::Disco => PingKind::Disco,
            core::PingKind::Tsmp => PingKind::Tsmp,
            core::PingKind::Icmp => PingKind::Icmp,
        },
        latency_us: micros(reply.latency),
        path: path(reply.path),
    })
}

pub(super) fn ping_kind(kind: PingKind) -> core::PingKind {
    match kind {
        PingKind::Disco => core::PingKind::Disco,
        PingKind::Tsmp => core::PingKind::Tsmp,
        PingKind::Icmp => core::PingKind::Icmp,
    }
}

fn rtt(gauges: &core::Gauges) -> Option<Rtt> {
    let [least, sum, most] = gauges.rtt?;
    let paths = wide(gauges.peers_direct).max(1);
    Some(Rtt { min_us: micros(least), mean_us: micros(sum) / paths, max_us: micros(most) })
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn millis(age: Duration) -> u64 {
    u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
}

fn wide(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states() {
        let core = |running, approved| Status {
            running,
            node: running.then(|| SelfView { machine_authorized: approved, ..SelfView::default() }),
            ..Status::default()
        };
        let login = Membership::NeedsLogin { url: "https://x/1".into() };
        let table = [
            (Membership::Connecting, "", core(false, true), "Connecting"),
            (Membership::Connecting, "it is down", core(false, true), "it is down"),
            // From a snapshot, before control is back.
            (Membership::Connecting, "it is down", core(true, true), "Running"),
            (login.clone(), "", core(false, true), "NeedsLogin"),
            (login, "", core(true, true), "Running"),
            (Membership::Registered { approved: true }, "", core(false, true), "netmap"),
            (Membership::Registered { approved: false }, "", core(false, true), "NeedsApproval"),
            (Membership::Registered { approved: true }, "", core(true, false), "NeedsApproval"),
            (Membership::Registered { approved: true }, "", core(true, true), "Running"),
            (Membership::LoggedOut, "", core(true, true), "LoggedOut"),
        ];
        for (membership, trouble, core, expected) in table {
            let state = format!("{:?}", state(&membership, trouble, &core));
            assert!(state.contains(expected), "{membership:?}: {state} should say {expected}");
        }
    }

    #[test]
    fn every_reason_is_documented_with_its_meaning() {
        let document = include_str!("../../../docs/metrics.md");
        let of_core = core::DropReason::ALL.iter().map(|why| (why.name(), why.meaning()));
        for (name, meaning) in of_core.chain(ODD_MAP) {
            let row = document.lines().find_map(|line| line.strip_prefix(&format!("| `{name}` | ")));
            let said =
                row.unwrap_or_else(|| panic!("{name} is not in docs/metrics.md")).trim_end_matches(" |");
            let same = meaning.trim_end_matches('.');
            assert!(said.eq_ignore_ascii_case(same), "{name}: {said:?} is not {same:?}");
        }
    }

    #[test]
    fn what_the_core_passes_over_in_a_netmap_has_a_name_and_a_meaning() {
        let mut counters = core::Counters::default();
        (counters.map_ignored, counters.map_unknown) = (3, 5);
        let counts: Vec<_> = odd_map(&counters).collect();
        assert_eq!(counts, [("control_map_part", 3), ("control_map_unknown_peer", 5)]);
        assert!(counts.iter().all(|(name, _)| !meaning(name).is_empty()));
        assert_eq!(odd_map(&core::Counters::default()).count(), 0);
    }
}
