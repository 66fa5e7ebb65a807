//! What a pod's link does: a pure function of what the supervisor and the engine say. It tells a link that has
//! nothing to do from one that could not.

use podtether_proto::engine::EngineMetrics;

/// The label `state` of `podtether_pod_link` and `podtether_links`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinkState {
    /// Packets go to peers that answer.
    Active,
    /// Control and the home relay are connected, and nobody has anything to send: the next packet would go.
    Idle,
    /// Control and the home relay are connected, and none of the peers that the pod sends to answers.
    Unanswered,
    /// Control or the home relay is missing; what is up may still carry packets.
    Degraded,
    /// Neither control nor any relay nor any peer is connected: nobody reaches the pod.
    Disconnected,
    /// The engine does not run, does not answer, or has no netmap yet.
    Down,
}

impl LinkState {
    /// Every one.
    pub const ALL: [Self; 6] =
        [Self::Active, Self::Idle, Self::Unanswered, Self::Degraded, Self::Disconnected, Self::Down];

    /// The label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Idle => "idle",
            Self::Unanswered => "unanswered",
            Self::Degraded => "degraded",
            Self::Disconnected => "disconnected",
            Self::Down => "down",
        }
    }

    /// `running`: the supervisor takes the pod for joined. `engine`: its engine's answer, if it gave one.
    #[must_use]
    pub fn of(running: bool, engine: Option<&EngineMetrics>) -> Self {
        let Some(engine) = engine.filter(|_| running) else { return Self::Down };
        let answering = engine.peers_direct > 0 || engine.peers_relay > 0;
        // A tailnet without relays has no home.
        let home = engine.home_derp_connected || engine.home_derp == 0;
        match (engine.control_connected, home) {
            (true, true) if answering => Self::Active,
            (true, true) if engine.peers_unanswered > 0 => Self::Unanswered,
            (true, true) => Self::Idle,
            (false, _) if engine.derp_connected == 0 && engine.peers_direct == 0 => Self::Disconnected,
            (true | false, _) => Self::Degraded,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_is_not_disconnected() {
        let table = [
            // control, home region, home connected, regions, direct, relay, unanswered
            ((true, 1, true, 1, 0, 0, 0), LinkState::Idle),
            ((true, 1, true, 1, 3, 0, 0), LinkState::Active),
            ((true, 1, true, 2, 0, 1, 4), LinkState::Active),
            ((true, 1, true, 1, 0, 0, 2), LinkState::Unanswered),
            ((true, 1, false, 0, 2, 0, 0), LinkState::Degraded),
            ((true, 1, false, 0, 0, 0, 0), LinkState::Degraded),
            ((false, 1, true, 1, 0, 0, 0), LinkState::Degraded),
            ((false, 1, true, 1, 0, 0, 2), LinkState::Degraded),
            ((false, 1, false, 0, 2, 0, 0), LinkState::Degraded),
            ((false, 1, false, 0, 0, 0, 0), LinkState::Disconnected),
            ((false, 1, false, 0, 0, 0, 2), LinkState::Disconnected),
            // No relay map.
            ((true, 0, false, 0, 0, 0, 0), LinkState::Idle),
            ((false, 0, false, 0, 0, 0, 0), LinkState::Disconnected),
        ];
        for (facts, expected) in table {
            let (
                control_connected,
                home_derp,
                home_derp_connected,
                derp_connected,
                direct,
                relay,
                unanswered,
            ) = facts;
            let engine = EngineMetrics {
                control_connected,
                home_derp,
                home_derp_connected,
                derp_connected,
                peers: 9,
                peers_direct: direct,
                peers_relay: relay,
                peers_unanswered: unanswered,
                ..EngineMetrics::default()
            };
            assert_eq!(LinkState::of(true, Some(&engine)), expected, "{facts:?}");
            assert_eq!(LinkState::of(false, Some(&engine)), LinkState::Down);
        }
        assert_eq!(LinkState::of(true, None), LinkState::Down);
    }
}
