//! The node as a whole.

pub mod api;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Instant;

pub use api::{
    Config, ControlEvent, Counters, DerpEvent, DropReason, Event, Gauges, HostUpdate, PathView, PeerView,
    SelfView, Status,
};

use crate::batch::{Batch, Outbox, RegionId};
use crate::snapshot::{Body, Snapshot};
use crate::tailcfg::{DerpRegion, NetInfo};
use std::net::SocketAddr;

/// One node of a tailnet, without I/O.
pub struct Engine {
    config: Config,
    events: VecDeque<Event>,
    counters: Counters,
}

impl Engine {
    /// A node that starts now; with a snapshot it is running at once.
    #[must_use]
    pub fn new(config: Config, _now: Instant) -> Self {
        Self { config, events: VecDeque::new(), counters: Counters::default() }
    }

    /// IP packets from the pod.
    pub fn handle_tun(&mut self, _packets: &mut Batch<()>, _now: Instant, _out: &mut Outbox) {}

    /// Datagrams from the underlay, with their sources.
    pub fn handle_udp(&mut self, _datagrams: &mut Batch<SocketAddr>, _now: Instant, _out: &mut Outbox) {}

    /// News of a DERP connection.
    pub fn handle_derp(
        &mut self,
        _region: RegionId,
        _event: DerpEvent<'_>,
        _now: Instant,
        _out: &mut Outbox,
    ) {
    }

    /// News of the control session.
    pub fn handle_control(&mut self, _event: ControlEvent, _now: Instant, _out: &mut Outbox) {}

    /// The underlay's addresses and the ports that the UDP sockets are bound to; `None` without a socket
    /// of the family.
    pub fn handle_underlay(
        &mut self,
        _addresses: &[IpAddr],
        _port_v4: Option<u16>,
        _port_v6: Option<u16>,
        _now: Instant,
        _out: &mut Outbox,
    ) {
    }

    /// Answer to [`Event::Resolve`]; none when the name has no address or nobody knows.
    pub fn handle_resolved(&mut self, _host: &str, _addresses: &[IpAddr], _now: Instant, _out: &mut Outbox) {}

    /// The time of [`Engine::poll_timeout`] has come. Calling early does no harm.
    pub fn handle_timeout(&mut self, _now: Instant, _out: &mut Outbox) {}

    /// When to call [`Engine::handle_timeout`] next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        None
    }

    /// The next thing for the shell to do. Ask after every call until there is none.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The node as its netmap has it.
    #[must_use]
    pub fn status(&self) -> Status {
        Status::default()
    }

    /// One entry per peer.
    #[must_use]
    pub fn peers(&self, _now: Instant) -> Vec<PeerView> {
        Vec::new()
    }

    /// Counters since the start.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Gauges of now.
    #[must_use]
    pub fn gauges(&self, _now: Instant) -> Gauges {
        Gauges::default()
    }

    /// What control must know about this node's reachability.
    #[must_use]
    pub fn host_update(&self) -> HostUpdate {
        HostUpdate {
            endpoints: Vec::new(),
            net_info: NetInfo::default(),
            disco: self.config.disco_key.public(),
        }
    }

    /// How to reach a region.
    #[must_use]
    pub fn derp_node(&self, _region: RegionId) -> Option<&DerpRegion> {
        None
    }

    /// What the next life needs.
    #[must_use]
    pub fn snapshot(&self, _now: Instant) -> Snapshot {
        Snapshot { disco: self.config.disco_key.clone(), body: Body::default() }
    }
}
