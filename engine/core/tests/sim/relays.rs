//! The relays, and the connections of nodes to them.

use super::*;

/// Pause between a node's tries to connect to a relay that is away.
const RETRY: Duration = Duration::from_secs(2);
/// Without a frame for so long a stock node gives its connection up; keepalives come every 60 s or so.
const STOCK_SILENCE: Duration = Duration::from_secs(120);

impl World {
    pub(crate) fn distance(&self, region: RegionId) -> Duration {
        let detour = self.detours.get(&region).copied().unwrap_or_default();
        ms(u64::from(region.0) * 7) + detour
    }

    /// Whether a node's connection to a region gets anything across.
    pub(crate) fn carries(&self, n: usize, region: RegionId) -> bool {
        let node = &self.nodes[n];
        node.connected.contains(&region)
            && !node.silent.contains_key(&region)
            && !self.derp_down.contains(&region)
    }

    pub(super) fn derp(&mut self, n: usize, to: DerpDestination, packet: Vec<u8>) {
        if packet.first() == Some(&4) && packet.len() > 32 {
            self.derp_data += 1;
        }
        if !self.carries(n, to.region) {
            return;
        }
        let source = self.nodes[n].key.public();
        let target = self.nodes.iter().position(|node| node.key.public() == to.peer);
        // A connection that died without a word is still one to the relay.
        match target.filter(|t| self.nodes[*t].connected.contains(&to.region)) {
            Some(target) => {
                let life = self.nodes[target].life;
                let what = What::Derp { to: target, life, region: to.region, source, packet };
                self.push(self.derp_latency, what);
            }
            None => {
                let life = self.nodes[n].life;
                let gone = What::PeerGone { to: n, life, region: to.region, peer: to.peer };
                self.push(self.derp_latency, gone);
            }
        }
    }

    pub(crate) fn take_derp_down(&mut self) {
        for region in self.derp_regions.clone() {
            self.take_region_down(RegionId(region));
        }
    }

    pub(crate) fn bring_derp_up(&mut self) {
        for region in std::mem::take(&mut self.derp_down) {
            self.bring_region_up(region);
        }
    }

    /// A relay ends: its connections are reset, new ones refused.
    pub(crate) fn take_region_down(&mut self, region: RegionId) {
        self.derp_down.insert(region);
        for n in 0..self.nodes.len() {
            self.nodes[n].silent.remove(&region);
            if self.nodes[n].connected.remove(&region) {
                self.tell_derp(n, region, DerpEvent::Disconnected);
                let life = self.nodes[n].life;
                self.push(self.derp_connect, What::DerpUp { node: n, life, region });
            }
        }
    }

    /// It begins again; who was connected is so again at once, as the first to try.
    pub(crate) fn bring_region_up(&mut self, region: RegionId) {
        self.derp_down.remove(&region);
        for n in 0..self.nodes.len() {
            if self.nodes[n].wanted.contains(&region) && !self.nodes[n].connected.contains(&region) {
                let life = self.nodes[n].life;
                self.push(self.derp_connect, What::DerpUp { node: n, life, region });
            }
        }
    }

    /// What the node is connected to by TCP now carries nothing any more, without a word.
    pub(crate) fn silence_derp(&mut self, n: usize) {
        let (now, life) = (self.now, self.nodes[n].life);
        for region in self.nodes[n].connected.clone() {
            if self.nodes[n].silent.contains_key(&region) {
                continue;
            }
            self.nodes[n].silent.insert(region, now);
            if self.nodes[n].stock {
                self.push(STOCK_SILENCE, What::StockTimeout { node: n, life, region, silent: now });
            }
        }
    }

    pub(super) fn derp_ping(&mut self, n: usize, region: RegionId) {
        let life = self.nodes[n].life;
        // Stock nodes do not ping, so a model of one must never miss a pong.
        if self.nodes[n].stock && self.nodes[n].connected.contains(&region) {
            self.tell_derp_later(n, region);
        } else if self.carries(n, region) {
            self.push(self.derp_latency * 2, What::DerpHeard { to: n, life, region });
        }
    }

    fn tell_derp_later(&mut self, n: usize, region: RegionId) {
        let now = self.now;
        let mut out = Outbox::default();
        self.engine(n).handle_derp(region, DerpEvent::Heard, now, &mut out);
        assert!(out.is_empty());
    }

    pub(super) fn tell_derp(&mut self, n: usize, region: RegionId, event: DerpEvent<'_>) {
        let mut out = Outbox::default();
        let now = self.now;
        if let Some(engine) = self.nodes[n].engine.as_mut() {
            engine.handle_derp(region, event, now, &mut out);
            self.emit(n, &mut out);
        }
    }

    pub(super) fn derp_up(&mut self, n: usize, life: u32, region: RegionId) {
        let node = &mut self.nodes[n];
        if node.life != life || !node.wanted.contains(&region) || node.connected.contains(&region) {
            return;
        }
        if self.derp_down.contains(&region) {
            self.tell_derp(n, region, DerpEvent::Disconnected);
            self.push(RETRY, What::DerpUp { node: n, life, region });
            return;
        }
        node.connected.insert(region);
        self.tell_derp(n, region, DerpEvent::Connected);
    }
}
