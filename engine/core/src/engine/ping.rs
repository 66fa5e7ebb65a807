//! Pings of peers, for control and for people: by disco, by TSMP and by ICMP, each with one result.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::*;
use crate::disco::TxId;
use crate::packet::{Parsed, protocol};
use crate::tailcfg::{PingRequest, PingResponse};

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pings under way at a time.
const MAX_WAITING: usize = 16;
/// Kinds of ping taken from one request.
const MAX_KINDS: usize = 4;
/// Requests remembered by their URL, so that a repeated one is answered once.
const REMEMBERED: usize = 32;
const TSMP_PING: u8 = b'p';
const TSMP_PONG: u8 = b'o';
/// Type, code, checksum, identifier and sequence number.
const ECHO_HEADER: usize = 8;

/// How to ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PingKind {
    /// The path, outside the tunnel.
    Disco,
    /// The other node, inside the tunnel.
    Tsmp,
    /// What is behind the other node: the host or pod itself.
    Icmp,
}

impl PingKind {
    /// The name that control and `tailscale ping` use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disco => "disco",
            Self::Tsmp => "TSMP",
            Self::Icmp => "ICMP",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Disco, Self::Tsmp, Self::Icmp].into_iter().find(|kind| kind.name() == name)
    }
}

/// Names a ping that was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PingId(u64);

/// A ping's end.
#[derive(Debug, Clone, PartialEq)]
pub struct PingResult {
    /// What [`Engine::ping`] gave.
    pub id: PingId,
    /// As asked.
    pub kind: PingKind,
    /// As asked.
    pub ip: IpAddr,
    /// Fully qualified name of the peer, empty when there is none.
    pub peer: String,
    /// The peer's own first address, which `ip` need not be.
    pub peer_ip: Option<IpAddr>,
    /// The answer, or why there is none.
    pub outcome: Result<PingReply, PingError>,
}

/// An answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PingReply {
    /// Round trip.
    pub latency: Duration,
    /// The way it took (disco), or the way packets take now.
    pub path: PathView,
}

/// Why a ping has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PingError {
    /// Nobody in the tailnet has the address.
    #[error("no matching peer")]
    NoPeer,
    /// It is this node's own.
    #[error("that is this node's own address")]
    OwnAddress,
    /// The peer has no disco key, or no path to it is known.
    #[error("no path to the peer")]
    NoPath,
    /// This node has no address of the family.
    #[error("this node has no address of that family")]
    NoSource,
    /// Too many pings are under way.
    #[error("too many pings at once")]
    TooMany,
    /// Nothing came back within 5 s.
    #[error("no answer within 5 s")]
    NoAnswer,
}

/// What control asked for, answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlAnswer {
    /// Where it goes, as control named it: the shell decides whether it may go there.
    pub url: String,
    /// Through the control session rather than by a connection of its own.
    pub over_session: bool,
    /// Posted; without one the URL is only asked for its head.
    pub body: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Waiting {
    id: PingId,
    kind: PingKind,
    ip: IpAddr,
    slot: Slot,
    sent: Instant,
    /// Sent out and to come back.
    token: [u8; 8],
    tx: TxId,
    asker: Option<Asker>,
}

/// Control wants to know.
#[derive(Debug, Clone)]
struct Asker {
    url: String,
    over_session: bool,
}

/// The pings under way.
#[derive(Debug, Default)]
pub(super) struct Pings {
    waiting: Vec<Waiting>,
    /// Answered inside the tunnel, found while its packet was judged.
    heard: Option<PingId>,
    next: u64,
    urls: VecDeque<String>,
}

impl Pings {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.iter().map(|w| w.sent + PATIENCE).min()
    }

    /// True when a decrypted packet of `slot` answers a ping: it is not for the pod then.
    pub(super) fn hear(&mut self, slot: Slot, packet: &[u8], parsed: &Parsed) -> bool {
        if self.waiting.is_empty() {
            return false;
        }
        let Some(payload) = packet.get(parsed.transport..parsed.length) else { return false };
        let (kind, token) = match parsed.protocol {
            protocol::TSMP if payload.first() == Some(&TSMP_PONG) => (PingKind::Tsmp, payload.get(1..9)),
            protocol::ICMPV4 | protocol::ICMPV6 if parsed.is_echo_reply() => {
                (PingKind::Icmp, payload.get(ECHO_HEADER..))
            }
            _ => return false,
        };
        let found = self.waiting.iter().find(|w| {
            w.kind == kind && w.slot == slot && w.ip == parsed.src && token == Some(w.token.as_slice())
        });
        self.heard = found.map(|w| w.id);
        found.is_some()
    }

    fn is_new(&mut self, url: &str) -> bool {
        if self.urls.iter().any(|known| known == url) {
            return false;
        }
        if self.urls.len() >= REMEMBERED {
            self.urls.pop_front();
        }
        self.urls.push_back(url.to_owned());
        true
    }
}

impl Engine {
    /// Pings the peer that has `ip`. The result comes as [`Event::Pong`], at the latest after 5 s.
    pub fn ping(&mut self, ip: IpAddr, kind: PingKind, now: Instant, out: &mut Outbox) -> PingId {
        self.begin_ping(ip, kind, None, now, out)
    }

    /// Control wants a sign of life: answers at once what can be, begins pings for the rest. One request
    /// is answered once, however often it is sent.
    pub(super) fn answer_control(&mut self, request: &PingRequest, now: Instant, out: &mut Outbox) {
        if request.url.is_empty() || !self.pings.is_new(&request.url) {
            return;
        }
        let mut answer = |over_session, body| {
            let answer = ControlAnswer { url: request.url.clone(), over_session, body };
            self.events.push_back(Event::ControlAnswer(Box::new(answer)));
        };
        match request.types.as_str() {
            "" => answer(request.url_is_noise, None),
            // The answer to a command never leaves the session, whatever the request says.
            "c2n" => answer(true, Some(crate::c2n::answer(&request.payload()))),
            types => {
                let asker = Asker { url: request.url.clone(), over_session: request.url_is_noise };
                let Some(ip) = request.ip else { return };
                for name in types.split(',').take(MAX_KINDS) {
                    match PingKind::from_name(name) {
                        Some(kind) => {
                            self.begin_ping(ip, kind, Some(asker.clone()), now, out);
                        }
                        None if name == "peerapi" => {
                            let err = "this node does not speak to peers' APIs";
                            self.respond(
                                &asker,
                                PingResponse {
                                    r#type: name.to_owned(),
                                    ip: ip.to_string(),
                                    err: err.to_owned(),
                                    ..PingResponse::default()
                                },
                            );
                        }
                        None => tracing::debug!(name, "control asks for an unknown kind of ping"),
                    }
                }
            }
        }
    }

    fn begin_ping(
        &mut self,
        ip: IpAddr,
        kind: PingKind,
        asker: Option<Asker>,
        now: Instant,
        out: &mut Outbox,
    ) -> PingId {
        let id = PingId(self.pings.next);
        self.pings.next += 1;
        let mut tx = [0; 12];
        tx[..8].copy_from_slice(&self.random.next_u64().to_le_bytes());
        tx[8..].copy_from_slice(&self.random.next_u64().to_le_bytes()[..4]);
        let token = self.random.next_u64().to_le_bytes();
        let slot = match self.pingable(ip, now) {
            Ok(slot) => slot,
            Err(error) => {
                self.finish(id, kind, ip, None, asker, Err(error));
                return id;
            }
        };
        self.pings.waiting.push(Waiting { id, kind, ip, slot, sent: now, token, tx, asker });
        let sent = match kind {
            PingKind::Disco => self.ping_disco(slot, tx, now, out),
            PingKind::Tsmp => self.ping_inside(slot, ip, now, out, |_, _| {
                (protocol::TSMP, [[TSMP_PING].as_slice(), &token].concat())
            }),
            PingKind::Icmp => self.ping_inside(slot, ip, now, out, |from, to| echo(from, to, token)),
        };
        if let Err(error) = sent {
            self.end(id, Err(error));
        }
        id
    }

    /// The peer, ready to be spoken to.
    fn pingable(&mut self, ip: IpAddr, now: Instant) -> Result<Slot, PingError> {
        if self.own.contains(&ip) {
            return Err(PingError::OwnAddress);
        }
        if self.pings.waiting.len() >= MAX_WAITING {
            return Err(PingError::TooMany);
        }
        let slot = self.peers.by_ip(ip).ok_or(PingError::NoPeer)?;
        if self.activate(slot, now) { Ok(slot) } else { Err(PingError::NoPeer) }
    }

    fn ping_disco(&mut self, slot: Slot, tx: TxId, now: Instant, out: &mut Outbox) -> Result<(), PingError> {
        let message = disco::Message::Ping { tx, node_key: Some(self.node_key.public()) };
        let peer = self.peers.get(slot).ok_or(PingError::NoPeer)?;
        if peer.disco.is_zero() {
            return Err(PingError::NoPath);
        }
        let active = peer.active.as_deref().ok_or(PingError::NoPeer)?;
        let (key, best) = (peer.key, active.path.best());
        let relay = outbound::relay_for(active, peer.home, key, &self.relays, now);
        // As packets go: by the best path, and by the relay when that is in doubt.
        let trusted = active.path.trusted(now).is_some();
        if let Some(best) = best {
            self.send_disco(slot, Via::Udp(best), &message, now, out);
        }
        if let Some(relay) = relay.filter(|_| !trusted) {
            self.send_disco(slot, Via::Derp(relay.region, key), &message, now, out);
        }
        if best.is_none() && relay.is_none() {
            return Err(PingError::NoPath);
        }
        // Who pings wants to know about paths, so they are looked for.
        self.with_path(slot, now, out, crate::path::PathAgent::note_send);
        self.schedule(slot);
        Ok(())
    }

    fn ping_inside(
        &mut self,
        slot: Slot,
        to: IpAddr,
        now: Instant,
        out: &mut Outbox,
        payload: impl FnOnce(IpAddr, IpAddr) -> (u8, Vec<u8>),
    ) -> Result<(), PingError> {
        let mut own =
            self.netmap.self_node().into_iter().flat_map(|node| &node.addresses).map(ipnet::IpNet::addr);
        let own = own.find(|own| own.is_ipv4() == to.is_ipv4()).ok_or(PingError::NoSource)?;
        let from = self.mask(slot, own).unwrap_or(own);
        let (protocol, payload) = payload(from, to);
        let packet = datagram(from, to, protocol, &payload).ok_or(PingError::NoSource)?;
        self.send_data(slot, &packet, now, out).map_err(|_| PingError::NoPath)
    }

    /// A disco pong; true when it answers one of these pings.
    pub(super) fn pong(&mut self, tx: &TxId, via: Via, now: Instant) -> bool {
        let Some(waiting) = self.pings.waiting.iter().find(|w| w.kind == PingKind::Disco && w.tx == *tx)
        else {
            return false;
        };
        let latency = now.saturating_duration_since(waiting.sent);
        let path = match via {
            Via::Udp(from) => PathView::Direct(from, latency),
            Via::Derp(region, _) => PathView::Relay(region),
        };
        self.end(waiting.id, Ok(PingReply { latency, path }));
        true
    }

    /// After a data message: what [`Pings::hear`] found.
    pub(super) fn pong_inside(&mut self, now: Instant) {
        let Some(id) = self.pings.heard.take() else { return };
        let Some(waiting) = self.pings.waiting.iter().find(|w| w.id == id) else { return };
        let latency = now.saturating_duration_since(waiting.sent);
        let peer = self.peers.get(waiting.slot);
        let active = peer.and_then(|peer| Some((peer.active.as_deref()?, peer.home)));
        let path = active.map_or(PathView::Idle, |(active, home)| self.path_view(active, home, now));
        self.end(id, Ok(PingReply { latency, path }));
    }

    pub(super) fn pings_timeout(&mut self, now: Instant) {
        while let Some(late) = self.pings.waiting.iter().find(|w| w.sent + PATIENCE <= now) {
            self.end(late.id, Err(PingError::NoAnswer));
        }
    }

    fn end(&mut self, id: PingId, outcome: Result<PingReply, PingError>) {
        let Some(at) = self.pings.waiting.iter().position(|w| w.id == id) else { return };
        let done = self.pings.waiting.swap_remove(at);
        self.finish(id, done.kind, done.ip, Some(done.slot), done.asker, outcome);
    }

    fn finish(
        &mut self,
        id: PingId,
        kind: PingKind,
        ip: IpAddr,
        slot: Option<Slot>,
        asker: Option<Asker>,
        outcome: Result<PingReply, PingError>,
    ) {
        let facts = slot.and_then(|slot| self.peers.get(slot)).map(|peer| &peer.facts);
        let peer = facts.map(crate::peer::Facts::called).unwrap_or_default();
        let peer_ip = facts.and_then(|facts| facts.addresses().next()).map(|net| net.addr());
        let result = PingResult { id, kind, ip, peer, peer_ip, outcome };
        match asker {
            Some(asker) => {
                let mut response = response(&result);
                if let Some(region) = self.netmap.derp_map().region(response.derp_region_id) {
                    response.derp_region_code.clone_from(&region.region_code);
                }
                self.respond(&asker, response);
            }
            None => self.events.push_back(Event::Pong(Box::new(result))),
        }
    }

    fn respond(&mut self, asker: &Asker, response: PingResponse) {
        // Texts and numbers only: it always serializes.
        let body = serde_json::to_vec(&response).unwrap_or_default();
        let Asker { url, over_session } = asker.clone();
        let answer = ControlAnswer { url, over_session, body: Some(body) };
        self.events.push_back(Event::ControlAnswer(Box::new(answer)));
    }
}

fn response(result: &PingResult) -> PingResponse {
    let mut response = PingResponse {
        r#type: result.kind.name().to_owned(),
        ip: result.ip.to_string(),
        node_ip: result.peer_ip.map(|ip| ip.to_string()).unwrap_or_default(),
        // As stock nodes say it: the first label.
        node_name: result.peer.split('.').next().unwrap_or_default().to_owned(),
        ..PingResponse::default()
    };
    match &result.outcome {
        Ok(reply) => {
            response.latency_seconds = reply.latency.as_secs_f64();
            match reply.path {
                PathView::Direct(endpoint, _) => response.endpoint = endpoint.to_string(),
                PathView::Relay(region) => response.derp_region_id = region,
                PathView::Idle => {}
            }
        }
        Err(error) => response.err = error.to_string(),
    }
    response
}

/// An ICMP echo request that carries `token`.
fn echo(from: IpAddr, to: IpAddr, token: [u8; 8]) -> (u8, Vec<u8>) {
    let (protocol, kind) = match to {
        IpAddr::V4(_) => (protocol::ICMPV4, 8),
        IpAddr::V6(_) => (protocol::ICMPV6, 128),
    };
    let mut message = vec![kind, 0, 0, 0, token[0], token[1], 0, 1];
    message.extend_from_slice(&token);
    let mut sum = Checksum::default();
    if let (IpAddr::V6(from), IpAddr::V6(to)) = (from, to) {
        // The pseudo header of RFC 8200, 8.1; the message is shorter than 256 bytes.
        sum.add(&from.octets());
        sum.add(&to.octets());
        sum.add(&[0, u8::try_from(message.len()).unwrap_or_default(), 0, protocol]);
    }
    sum.add(&message);
    message[2..4].copy_from_slice(&sum.finish().to_be_bytes());
    (protocol, message)
}

/// A whole IP packet; none when the addresses are of different families.
fn datagram(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Option<Vec<u8>> {
    let mut packet = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = vec![0; 20];
            header[0] = 0x45;
            header[2..4].copy_from_slice(&u16::try_from(20 + payload.len()).ok()?.to_be_bytes());
            header[8] = 64;
            header[9] = protocol;
            header[12..16].copy_from_slice(&from.octets());
            header[16..20].copy_from_slice(&to.octets());
            let mut sum = Checksum::default();
            sum.add(&header);
            header[10..12].copy_from_slice(&sum.finish().to_be_bytes());
            header
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut header = vec![0; 40];
            header[0] = 0x60;
            header[4..6].copy_from_slice(&u16::try_from(payload.len()).ok()?.to_be_bytes());
            header[6] = protocol;
            header[7] = 64;
            header[8..24].copy_from_slice(&from.octets());
            header[24..40].copy_from_slice(&to.octets());
            header
        }
        _ => return None,
    };
    packet.extend_from_slice(payload);
    Some(packet)
}

/// The Internet checksum over pieces of even length.
#[derive(Debug, Default)]
struct Checksum(u32);

impl Checksum {
    fn add(&mut self, bytes: &[u8]) {
        for pair in bytes.chunks(2) {
            self.0 += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }

    fn finish(&self) -> u16 {
        let folded = (self.0 & 0xffff) + (self.0 >> 16);
        !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_packets_with_right_checksums() {
        let table =
            [("100.64.0.1", "100.64.0.2", protocol::ICMPV4), ("fd7a::1", "fd7a::2", protocol::ICMPV6)];
        for (from, to, expected) in table {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let (protocol, message) = echo(from, to, *b"12345678");
            assert_eq!(protocol, expected);
            let packet = datagram(from, to, protocol, &message).unwrap();
            let parsed = Parsed::parse(&packet).unwrap();
            assert_eq!((parsed.src, parsed.dst, parsed.length), (from, to, packet.len()));
            let mut sum = Checksum::default();
            if let (IpAddr::V6(from), IpAddr::V6(to)) = (from, to) {
                sum.add(&from.octets());
                sum.add(&to.octets());
                sum.add(&[0, 16, 0, protocol]);
            }
            sum.add(&message);
            assert_eq!(sum.finish(), 0, "a right checksum sums to zero");
            assert_eq!(&message[ECHO_HEADER..], b"12345678");
        }
        assert!(datagram("::1".parse().unwrap(), "1.2.3.4".parse().unwrap(), 99, &[]).is_none());
    }

    #[test]
    fn a_request_is_taken_once_and_memory_is_bounded() {
        let mut pings = Pings::default();
        assert!(pings.is_new("a") && !pings.is_new("a"));
        for n in 0..1000 {
            assert!(pings.is_new(&format!("u{n}")));
        }
        assert_eq!(pings.urls.len(), REMEMBERED);
    }
}
