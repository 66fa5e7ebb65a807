//! What stands between a host and the others: NAT boxes, one inside another, several hosts behind one.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

/// A kind of NAT, by what it gives a host and what it lets in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Nat {
    /// A public address of its own.
    None,
    /// One mapping for all destinations, open to everybody.
    FullCone,
    /// One mapping for all destinations, answers only from the hosts that were sent to.
    AddressRestricted,
    /// One mapping for all destinations, answers only from where was sent to.
    PortRestricted,
    /// A mapping for each destination, answers only from there.
    Symmetric,
}

impl Nat {
    pub(crate) const ALL: [Self; 5] =
        [Self::None, Self::FullCone, Self::AddressRestricted, Self::PortRestricted, Self::Symmetric];
}

struct Mapping {
    inside: SocketAddr,
    /// The one destination it is for, with a symmetric NAT.
    to: Option<SocketAddr>,
    port: u16,
    used: Instant,
    /// Where was sent to.
    peers: Vec<SocketAddr>,
}

struct NatBox {
    nat: Nat,
    outside: IpAddr,
    /// The box whose inside this one's outside is; none for the internet.
    behind: Option<usize>,
    hairpin: bool,
    /// A mapping that nothing was sent through for so long is gone.
    timeout: Duration,
    next_port: u16,
    mappings: Vec<Mapping>,
}

/// Where a host is attached.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) address: SocketAddr,
    pub(crate) behind: Option<usize>,
}

/// Where a datagram ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    Host(usize),
    /// An address of the internet that is no host of ours.
    Internet,
}

/// The boxes and which host is where.
#[derive(Default)]
pub(crate) struct Topology {
    boxes: Vec<NatBox>,
    places: Vec<Place>,
    networks: u8,
}

const PORT: u16 = 41641;

impl Topology {
    /// A box with an address of its own, inside `behind` or on the internet.
    pub(crate) fn add_box(&mut self, nat: Nat, behind: Option<usize>) -> usize {
        self.networks += 1;
        let outside = match behind {
            None => IpAddr::from([203, 0, 114, self.networks]),
            Some(outer) => inside_address(outer, 100 + self.networks),
        };
        self.boxes.push(NatBox {
            nat,
            outside,
            behind,
            hairpin: false,
            timeout: Duration::from_secs(120),
            next_port: 20_000,
            mappings: Vec::new(),
        });
        self.boxes.len() - 1
    }

    pub(crate) fn set_box(&mut self, at: usize, hairpin: bool, timeout: Duration) {
        self.boxes[at].hairpin = hairpin;
        self.boxes[at].timeout = timeout;
    }

    /// A host behind a box of its own, or with a public address.
    pub(crate) fn add_host(&mut self, nat: Nat) -> usize {
        let behind = (nat != Nat::None).then(|| self.add_box(nat, None));
        self.add_host_behind(behind)
    }

    pub(crate) fn add_host_behind(&mut self, behind: Option<usize>) -> usize {
        let n = self.places.len();
        let place = self.new_place(n, behind);
        self.places.push(place);
        n
    }

    fn new_place(&mut self, host: usize, behind: Option<usize>) -> Place {
        self.networks += 1;
        let ip = match behind {
            None => IpAddr::from([203, 0, 113, self.networks]),
            Some(b) => inside_address(b, u8::try_from(host + 2).expect("few hosts")),
        };
        Place { address: SocketAddr::new(ip, PORT), behind }
    }

    pub(crate) fn place(&self, host: usize) -> Place {
        self.places[host]
    }

    /// The host moves to another network with a NAT of this kind.
    pub(crate) fn roam(&mut self, host: usize, nat: Nat) {
        let behind = (nat != Nat::None).then(|| self.add_box(nat, None));
        self.places[host] = self.new_place(host, behind);
    }

    pub(crate) fn nat(&self, host: usize) -> Nat {
        self.places[host].behind.map_or(Nat::None, |b| self.boxes[b].nat)
    }

    /// The host's box forgets everything and gives new ports from now on.
    pub(crate) fn reset(&mut self, host: usize) {
        if let Some(b) = self.places[host].behind {
            self.boxes[b].mappings.clear();
            self.boxes[b].next_port += 1000;
        }
    }

    /// A datagram of `host` to `to`: where it ends, and from where it seems to come.
    pub(crate) fn send(&mut self, host: usize, to: SocketAddr, now: Instant) -> Option<(End, SocketAddr)> {
        let Place { address, mut behind } = self.places[host];
        let mut from = address;
        loop {
            if let Some(end) = self.inside(behind, from, to, now) {
                return end.map(|end| (end, from));
            }
            let Some(b) = behind else { return Some((End::Internet, from)) };
            let back = to.ip() == self.boxes[b].outside;
            from = self.boxes[b].out(from, to, now);
            if back {
                let hairpin = self.boxes[b].hairpin;
                return hairpin.then(|| self.enter(b, from, to, now)).flatten().map(|end| (end, from));
            }
            behind = self.boxes[b].behind;
        }
    }

    /// A datagram of the internet to a mapped address.
    pub(crate) fn receive(&mut self, from: SocketAddr, to: SocketAddr, now: Instant) -> Option<End> {
        self.inside(None, from, to, now).flatten()
    }

    /// Delivers in the network inside `at`. `None`: nobody there has the address.
    fn inside(
        &mut self,
        at: Option<usize>,
        from: SocketAddr,
        to: SocketAddr,
        now: Instant,
    ) -> Option<Option<End>> {
        let host = self.places.iter().position(|p| p.behind == at && p.address.ip() == to.ip());
        if let Some(host) = host {
            return Some((self.places[host].address == to).then_some(End::Host(host)));
        }
        let b = self.boxes.iter().position(|b| b.behind == at && b.outside == to.ip())?;
        Some(self.enter(b, from, to, now))
    }

    fn enter(&mut self, b: usize, from: SocketAddr, to: SocketAddr, now: Instant) -> Option<End> {
        let inside = self.boxes[b].admit(from, to.port(), now)?;
        self.inside(Some(b), from, inside, now).flatten()
    }
}

impl NatBox {
    fn out(&mut self, inside: SocketAddr, to: SocketAddr, now: Instant) -> SocketAddr {
        let timeout = self.timeout;
        self.mappings.retain(|m| now.duration_since(m.used) < timeout);
        let key = (self.nat == Nat::Symmetric).then_some(to);
        let at = self.mappings.iter().position(|m| m.inside == inside && m.to == key);
        let at = at.unwrap_or_else(|| {
            let port = self.next_port;
            self.next_port += 1;
            self.mappings.push(Mapping { inside, to: key, port, used: now, peers: Vec::new() });
            self.mappings.len() - 1
        });
        let mapping = &mut self.mappings[at];
        mapping.used = now;
        if !mapping.peers.contains(&to) {
            mapping.peers.push(to);
        }
        SocketAddr::new(self.outside, mapping.port)
    }

    fn admit(&self, from: SocketAddr, port: u16, now: Instant) -> Option<SocketAddr> {
        let live = |m: &&Mapping| m.port == port && now.duration_since(m.used) < self.timeout;
        let mapping = self.mappings.iter().find(live)?;
        let passes = match self.nat {
            Nat::None | Nat::FullCone => true,
            Nat::AddressRestricted => mapping.peers.iter().any(|p| p.ip() == from.ip()),
            Nat::PortRestricted | Nat::Symmetric => mapping.peers.contains(&from),
        };
        passes.then_some(mapping.inside)
    }
}

fn inside_address(b: usize, host: u8) -> IpAddr {
    Ipv4Addr::new(192, 168, u8::try_from(b).expect("few boxes"), host).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(n: u8) -> SocketAddr {
        SocketAddr::from(([198, 51, 100, n], 3478))
    }

    #[test]
    fn each_kind_of_nat_admits_what_it_should() {
        let now = Instant::now();
        let other_port = SocketAddr::new(server(1).ip(), 9);
        for (nat, stranger, same_host) in [
            (Nat::FullCone, true, true),
            (Nat::AddressRestricted, false, true),
            (Nat::PortRestricted, false, false),
            (Nat::Symmetric, false, false),
        ] {
            let mut net = Topology::default();
            let host = net.add_host(nat);
            let (end, mapped) = net.send(host, server(1), now).expect("out");
            assert_eq!(end, End::Internet);
            let (_, again) = net.send(host, server(2), now).expect("out");
            assert_eq!(mapped == again, nat != Nat::Symmetric, "{nat:?}");
            let admitted = |net: &mut Topology, from| net.receive(from, mapped, now) == Some(End::Host(host));
            assert!(admitted(&mut net, server(1)));
            assert_eq!(admitted(&mut net, server(9)), stranger, "{nat:?}");
            assert_eq!(admitted(&mut net, other_port), same_host, "{nat:?}");
            let later = now + Duration::from_secs(121);
            assert_eq!(net.receive(server(1), mapped, later), None, "{nat:?}: timed out");
        }
    }

    #[test]
    fn two_hosts_behind_one_box_need_hairpin_or_their_inside_addresses() {
        let now = Instant::now();
        for hairpin in [false, true] {
            let mut net = Topology::default();
            let outer = net.add_box(Nat::FullCone, None);
            let inner = net.add_box(Nat::FullCone, Some(outer));
            net.set_box(outer, hairpin, Duration::from_secs(60));
            let hosts = [net.add_host_behind(Some(outer)), net.add_host_behind(Some(inner))];
            let mapped = hosts.map(|h| net.send(h, server(1), now).expect("out").1);
            assert_eq!(mapped[0].ip(), mapped[1].ip(), "double NAT ends at the same address");
            let found = net.send(hosts[0], mapped[1], now).map(|(end, _)| end);
            assert_eq!(found, hairpin.then_some(End::Host(hosts[1])));
            let inside = net.place(hosts[0]).address;
            assert_eq!(net.send(hosts[1], inside, now).map(|f| f.0), Some(End::Host(hosts[0])));
        }
    }
}
