//! Connections to DERP regions: one task each, that stays connected for as long as the core wants the
//! region and moves packets between it and the driver.
//!
//! Both directions are bounded. Packets for a region whose queue is full are dropped and counted, as a
//! full socket would; packets from regions wait in TCP when the driver is behind.

mod connection;
mod latency;

use std::collections::HashMap;
use std::sync::Arc;

use podtether_core::key::{NodePrivate, NodePublic};
use podtether_core::tailcfg::{DerpRegion, RegionId};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::dial::Dialer;
use crate::driver::Drop;
use connection::Connection;
pub(crate) use latency::measure;

/// Packets for one region: several super-packets of the pod, some 330 KB at most.
const SEND_QUEUE: usize = 256;
/// Messages of all regions.
const RECEIVE_QUEUE: usize = 128;
/// Nothing that a tunnel of MTU 1280 carries is longer; with the queues it bounds what a relay can make
/// us hold.
const MAX_PACKET: usize = 2048;

/// Something that happened on a region's connection.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) region: RegionId,
    pub(crate) event: Event,
}

/// See [`podtether_core::engine::DerpEvent`].
#[derive(Debug)]
pub(crate) enum Event {
    Connected,
    /// Also after every failed attempt.
    Disconnected,
    Packet {
        source: NodePublic,
        payload: Vec<u8>,
    },
    /// A pong or a keepalive.
    Heard,
    PeerGone {
        peer: NodePublic,
    },
    Health(String),
}

/// A packet on its way to a region.
#[derive(Debug)]
struct Packet {
    peer: NodePublic,
    payload: Vec<u8>,
}

/// The regions that the core wants.
#[derive(Debug)]
pub(crate) struct Regions {
    node_key: Arc<NodePrivate>,
    home: RegionId,
    regions: HashMap<RegionId, Region>,
    messages_in: mpsc::Sender<Message>,
    messages: mpsc::Receiver<Message>,
}

#[derive(Debug)]
struct Region {
    packets: mpsc::Sender<Packet>,
    preferred: watch::Sender<bool>,
    servers: watch::Sender<DerpRegion>,
    /// Counts the pings asked for.
    pings: watch::Sender<u64>,
    /// Counts the connections given up.
    given_up: watch::Sender<u64>,
    _task: JoinSet<()>,
}

impl Regions {
    pub(crate) fn new(node_key: NodePrivate) -> Self {
        let (messages_in, messages) = mpsc::channel(RECEIVE_QUEUE);
        Self {
            node_key: Arc::new(node_key),
            home: RegionId::default(),
            regions: HashMap::new(),
            messages_in,
            messages,
        }
    }

    /// The next thing that happened on any connection.
    pub(crate) async fn message(&mut self) -> Message {
        match self.messages.recv().await {
            Some(message) => message,
            // Not reached: this struct holds a sender itself.
            None => std::future::pending().await,
        }
    }

    /// What has happened by now, if anything has.
    pub(crate) fn waiting(&mut self) -> Option<Message> {
        self.messages.try_recv().ok()
    }

    /// Connects, and stays connected until [`Regions::close`].
    pub(crate) fn connect(&mut self, region: RegionId, servers: DerpRegion, dialer: &Dialer) {
        if self.regions.contains_key(&region) {
            return self.set_servers(region, servers);
        }
        let (packets, packets_out) = mpsc::channel(SEND_QUEUE);
        let (preferred, preferred_out) = watch::channel(region == self.home);
        let (servers, servers_out) = watch::channel(servers);
        let (pings, pings_out) = watch::channel(0);
        let (given_up, given_up_out) = watch::channel(0);
        let mut task = JoinSet::new();
        let connection = Connection {
            region,
            node_key: self.node_key.clone(),
            dialer: dialer.clone(),
            servers: servers_out,
            preferred: preferred_out,
            pings: pings_out,
            given_up: given_up_out,
            packets: packets_out,
            messages: self.messages_in.clone(),
        };
        task.spawn(connection.keep());
        self.regions.insert(region, Region { packets, preferred, servers, pings, given_up, _task: task });
    }

    /// Where the region is from the next attempt on.
    pub(crate) fn set_servers(&self, region: RegionId, servers: DerpRegion) {
        if let Some(region) = self.regions.get(&region) {
            region.servers.send_if_modified(|old| {
                let changed = *old != servers;
                *old = servers;
                changed
            });
        }
    }

    /// Sends a ping on the region's connection.
    pub(crate) fn ping(&self, region: RegionId) {
        if let Some(region) = self.regions.get(&region) {
            region.pings.send_modify(|count| *count += 1);
        }
    }

    /// Ends the region's connection, which is silent, and makes another.
    pub(crate) fn reconnect(&self, region: RegionId) {
        if let Some(region) = self.regions.get(&region) {
            region.given_up.send_modify(|count| *count += 1);
        }
    }

    pub(crate) fn close(&mut self, region: RegionId) {
        self.regions.remove(&region);
    }

    /// Tells the region that it is home, and the others that they are not.
    pub(crate) fn prefer(&mut self, home: RegionId) {
        self.home = home;
        for (id, region) in &self.regions {
            region.preferred.send_if_modified(|old| std::mem::replace(old, *id == home) != (*id == home));
        }
    }

    /// Queues a packet; why not, if not.
    pub(crate) fn send(&self, region: RegionId, peer: NodePublic, packet: &[u8]) -> Result<(), Drop> {
        let region = self.regions.get(&region).ok_or(Drop::DerpNotConnected)?;
        // A permit first: a full queue then costs no copy.
        let permit = region.packets.try_reserve().map_err(|_| Drop::DerpQueueFull)?;
        permit.send(Packet { peer, payload: packet.to_vec() });
        Ok(())
    }
}
