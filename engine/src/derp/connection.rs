//! One region's connection, made again for ever.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use podtether_core::backoff::Backoff;
use podtether_core::derp::{DerpError, Frame, FrameReader, client_greeting, open_server_info};
use podtether_core::key::NodePrivate;
use podtether_core::tailcfg::{DerpNode, DerpRegion, RegionId};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

use super::{Event, MAX_PACKET, Message, Packet};
use crate::dial::{self, Dialer, Io};
use crate::http1;
use crate::log::Complaints;
use crate::refused::Refused;
use crate::tls::Trust;

/// One server's time to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// One server's time from there to the end of the greeting.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Servers send a keepalive about every minute.
const READ_TIMEOUT: Duration = Duration::from_secs(120);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// A server that is back is found within 5 s.
const RECONNECT_MAX: Duration = Duration::from_secs(4);
/// The most of a restarting server's hint when to come back that is followed.
const RESTART_HINT_MAX: Duration = Duration::from_secs(10);
/// Bytes written at a time when packets queue up.
const WRITE_BYTES: usize = 16 << 10;
/// A server that greets and ends the connection sooner is not hurried back to.
const WORTH_RESETTING: Duration = Duration::from_secs(2);
const PIN_PREFIX: &str = "sha256-raw:";

pub(super) struct Connection {
    pub(super) region: RegionId,
    pub(super) node_key: Arc<NodePrivate>,
    pub(super) dialer: Dialer,
    pub(super) servers: watch::Receiver<DerpRegion>,
    pub(super) preferred: watch::Receiver<bool>,
    pub(super) pings: watch::Receiver<u64>,
    pub(super) given_up: watch::Receiver<u64>,
    pub(super) packets: mpsc::Receiver<Packet>,
    pub(super) messages: mpsc::Sender<Message>,
}

/// A greeted server.
struct Greeted {
    stream: Box<dyn Io>,
    frames: FrameReader,
}

/// Why a connection ended, and how long a server that restarts wants to be left alone.
struct Ended {
    error: io::Error,
    hint: Option<Duration>,
}

/// Room of the driver's queue is gone: the engine ends.
struct Gone;

impl Connection {
    pub(super) async fn keep(mut self) {
        let mut backoff = Backoff::new();
        let mut complaints = Complaints::default();
        loop {
            let servers = self.servers.borrow_and_update().clone();
            let Ended { error, hint } = match self.connect(&servers).await {
                Ok(greeted) => {
                    tracing::info!(region = self.region.0, code = servers.region_code, "DERP connected");
                    if self.tell(Event::Connected).await.is_err() {
                        return;
                    }
                    let since = Instant::now();
                    let pumped = self.pump(greeted).await;
                    if since.elapsed() >= WORTH_RESETTING {
                        backoff.reset();
                        complaints = Complaints::default();
                    }
                    match pumped {
                        Ok(()) => return,
                        Err(ended) => ended,
                    }
                }
                Err(error) => Ended { error, hint: None },
            };
            // What queued up for this connection would be late on the next one.
            while self.packets.try_recv().is_ok() {}
            if self.tell(Event::Disconnected).await.is_err() {
                return;
            }
            let random = getrandom::u64().unwrap_or(u64::MAX / 2);
            let jitter = f64::from(u32::try_from(random >> 32).unwrap_or(u32::MAX)) / f64::from(u32::MAX);
            let wait = backoff.next(random).min(RECONNECT_MAX.mul_f64(0.5 + 0.5 * jitter));
            let wait = rest(wait, hint);
            complaints.say(&error.to_string(), wait, |error, wait_ms| {
                let (region, code) = (self.region.0, &servers.region_code);
                tracing::warn!(region, code, error, wait_ms, "no DERP connection; trying again");
            });
            tokio::time::sleep(wait).await;
        }
    }

    async fn tell(&self, event: Event) -> Result<(), Gone> {
        self.messages.send(Message { region: self.region, event }).await.map_err(|_| Gone)
    }

    /// The first of the region's servers that greets.
    async fn connect(&self, region: &DerpRegion) -> io::Result<Greeted> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the region has no server");
        for node in region.nodes.iter().filter(|node| !node.stun_only) {
            match self.greet(node).await {
                Ok(greeted) => return Ok(greeted),
                Err(error) => last = io::Error::new(error.kind(), format!("{}: {error}", node.host_name)),
            }
        }
        Err(last)
    }

    async fn greet(&self, node: &DerpNode) -> io::Result<Greeted> {
        let port = node.relay_port().ok_or_else(|| io::Error::other("the DERP map gives no usable port"))?;
        let trust = trust(node)?;
        let tcp = connect(&self.dialer, node, port).await?;
        let greeting = async {
            let mut stream = self.dialer.secure(tcp, &node.host_name, &trust).await?;
            let frames = self.greeting(&mut stream, &node.host_name, port).await?;
            Ok(Greeted { stream, frames })
        };
        tokio::time::timeout(GREETING_TIMEOUT, greeting)
            .await
            .unwrap_or_else(|_| Err(timed_out("connected, but no DERP greeting came")))
    }

    async fn greeting(&self, stream: &mut Box<dyn Io>, host: &str, port: u16) -> io::Result<FrameReader> {
        let request = format!(
            "GET /derp HTTP/1.1\r\nHost: {}\r\nUser-Agent: podtether\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n",
            dial::host_header(host, port, 443)
        );
        let reply = http1::exchange(stream, &request).await.inspect_err(|error| {
            if http1::is_malformed(error) {
                Refused::DerpGreeting.count();
            }
        })?;
        if reply.status != 101 {
            return Err(io::Error::other(format!("/derp answered HTTP {}", reply.status)));
        }
        let mut frames = FrameReader::new();
        frames.push(&reply.rest);
        let server = loop {
            match frames.next_frame().map_err(odd_greeting)? {
                Some(Frame::ServerKey(key)) => break key,
                Some(_) => return Err(odd_greeting("the server did not greet")),
                None => fill(stream, &mut frames).await?,
            }
        };
        let mut nonce = [0; 24];
        getrandom::fill(&mut nonce).map_err(io::Error::other)?;
        let mut greeting = Vec::new();
        client_greeting(&self.node_key, &server, nonce, &mut greeting).map_err(io::Error::other)?;
        stream.write_all(&greeting).await?;
        stream.flush().await?;
        loop {
            match frames.next_frame().map_err(odd_greeting)? {
                Some(Frame::ServerInfo(body)) => {
                    open_server_info(&self.node_key, &server, body).map_err(odd_greeting)?;
                    return Ok(frames);
                }
                Some(_) => return Err(odd_greeting("the server did not answer the greeting")),
                None => fill(stream, &mut frames).await?,
            }
        }
    }

    /// Moves packets until the connection fails; `Ok` means that the engine ends.
    async fn pump(&mut self, greeted: Greeted) -> Result<(), Ended> {
        let Greeted { stream, mut frames } = greeted;
        let hint_ms = Arc::new(AtomicU32::new(0));
        let told = hint_ms.clone();
        // What was asked of the connection before does not concern this one.
        self.pings.mark_unchanged();
        self.given_up.mark_unchanged();
        let (mut read, write) = tokio::io::split(stream);
        let (pongs, pongs_out) = mpsc::channel(4);
        let (region, messages) = (self.region, self.messages.clone());
        let reader = async move {
            loop {
                loop {
                    let frame = match frames.next_frame() {
                        Ok(Some(frame)) => frame,
                        Ok(None) => break,
                        // One odd frame among sound ones; the reader stands behind it.
                        Err(DerpError::Malformed(_) | DerpError::Greeting) => {
                            Refused::DerpFrame.count();
                            continue;
                        }
                        // What is announced is passed over as it comes.
                        Err(DerpError::TooLarge(_)) => {
                            Refused::DerpLongFrame.count();
                            continue;
                        }
                        Err(error) => return Err(io::Error::other(error)),
                    };
                    let event = match frame {
                        Frame::RecvPacket(source, payload) if payload.len() <= MAX_PACKET => {
                            Event::Packet { source, payload: payload.to_vec() }
                        }
                        Frame::Ping(data) => {
                            // A server that pings faster than we can write gets fewer answers.
                            let _ = pongs.try_send(data);
                            continue;
                        }
                        Frame::PeerGone(peer, _) => Event::PeerGone { peer },
                        Frame::Health(text) => Event::Health(String::from_utf8_lossy(text).into_owned()),
                        Frame::Restarting(reconnect_ms, _) => {
                            if told.load(Ordering::Relaxed) == 0 {
                                tracing::info!(%region, reconnect_ms, "the DERP server is restarting");
                            }
                            told.store(reconnect_ms.max(1), Ordering::Relaxed);
                            continue;
                        }
                        Frame::KeepAlive | Frame::Pong(_) => Event::Heard,
                        Frame::RecvPacket(..) => {
                            Refused::DerpLongPacket.count();
                            continue;
                        }
                        // For servers among themselves, or newer than this build.
                        Frame::Other(_) => continue,
                        Frame::ServerKey(_)
                        | Frame::ClientInfo(..)
                        | Frame::ServerInfo(_)
                        | Frame::SendPacket(..)
                        | Frame::NotePreferred(_) => {
                            Refused::DerpOutOfTurn.count();
                            continue;
                        }
                    };
                    if messages.send(Message { region, event }).await.is_err() {
                        return Ok(());
                    }
                }
                tokio::time::timeout(READ_TIMEOUT, fill(&mut read, &mut frames))
                    .await
                    .map_err(|_| timed_out("the server was silent for 120 s"))??;
            }
        };
        let given_up = async {
            match self.given_up.changed().await {
                Ok(()) => Err(timed_out("the server does not answer pings")),
                Err(_) => Ok(()),
            }
        };
        let writer = write_all(write, &mut self.packets, &mut self.preferred, &mut self.pings, pongs_out);
        let result = tokio::select! {
            result = reader => result,
            result = writer => result,
            result = given_up => result,
        };
        result.map_err(|error| {
            let hint = u64::from(hint_ms.load(Ordering::Relaxed));
            Ended { error, hint: (hint > 0).then(|| Duration::from_millis(hint)) }
        })
    }
}

/// How long to stay away. A hint differs between clients, so that they do not come back all at once; a server
/// that hints again and again at no time at all is not hurried back to.
fn rest(backoff: Duration, hint: Option<Duration>) -> Duration {
    hint.map_or(backoff, |hint| hint.min(RESTART_HINT_MAX).max(backoff))
}

async fn write_all(
    mut stream: impl AsyncWrite + Unpin,
    packets: &mut mpsc::Receiver<Packet>,
    preferred: &mut watch::Receiver<bool>,
    pings: &mut watch::Receiver<u64>,
    mut pongs: mpsc::Receiver<[u8; 8]>,
) -> io::Result<()> {
    let mut out = Vec::new();
    if *preferred.borrow_and_update() {
        Frame::NotePreferred(true).encode(&mut out);
    }
    loop {
        while out.len() < WRITE_BYTES
            && let Ok(packet) = packets.try_recv()
        {
            Frame::SendPacket(packet.peer, &packet.payload).encode(&mut out);
        }
        if !out.is_empty() {
            let write = async {
                stream.write_all(&out).await?;
                stream.flush().await
            };
            tokio::time::timeout(WRITE_TIMEOUT, write)
                .await
                .map_err(|_| timed_out("the server takes no more data"))??;
            out.clear();
            out.shrink_to(WRITE_BYTES);
        }
        tokio::select! {
            packet = packets.recv() => match packet {
                Some(packet) => Frame::SendPacket(packet.peer, &packet.payload).encode(&mut out),
                None => return Ok(()),
            },
            changed = preferred.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                Frame::NotePreferred(*preferred.borrow_and_update()).encode(&mut out);
            }
            changed = pings.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                Frame::Ping(pings.borrow_and_update().to_be_bytes()).encode(&mut out);
            }
            // When the reader has ended, so has this function.
            Some(data) = pongs.recv() => Frame::Pong(data).encode(&mut out),
        }
    }
}

/// Adds what the stream has to `frames`.
async fn fill(stream: &mut (impl AsyncRead + Unpin), frames: &mut FrameReader) -> io::Result<()> {
    let mut bytes = [0; 4096];
    match stream.read(&mut bytes).await? {
        0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")),
        count => {
            frames.push(&bytes[..count]);
            Ok(())
        }
    }
}

/// Counts a greeting that is none.
fn odd_greeting(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    Refused::DerpGreeting.count();
    io::Error::other(why)
}

fn timed_out(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, text.to_owned())
}

/// A TCP connection to the server, through the proxy where there is one.
pub(super) async fn connect(dialer: &Dialer, node: &DerpNode, port: u16) -> io::Result<TcpStream> {
    if let Some(proxy) = dialer.proxy_for(&node.host_name, port) {
        let connecting = proxy.connect(&dialer.resolver, &node.host_name, port);
        return tokio::time::timeout(GREETING_TIMEOUT, connecting)
            .await
            .map_err(|_| timed_out(&format!("{proxy:?} did not connect to port {port}")))?;
    }
    let addresses = addresses(dialer, node).await?;
    tokio::time::timeout(CONNECT_TIMEOUT, dial::race(&addresses, port))
        .await
        .map_err(|_| timed_out(&format!("no TCP connection to port {port} of {addresses:?}")))?
}

/// Where the server is.
async fn addresses(dialer: &Dialer, node: &DerpNode) -> io::Result<Vec<IpAddr>> {
    let literals: Vec<IpAddr> =
        [&node.ipv4, &node.ipv6].into_iter().filter_map(|text| text.parse().ok()).collect();
    if !literals.is_empty() {
        return Ok(literals);
    }
    let mut found = dialer.resolver.lookup(&node.host_name).await.map_err(io::Error::other)?;
    found.retain(|address| if address.is_ipv4() { node.ipv4 != "none" } else { node.ipv6 != "none" });
    Ok(found)
}

/// How the DERP map says to trust this server.
pub(super) fn trust(node: &DerpNode) -> io::Result<Trust> {
    if node.insecure_for_tests {
        return Ok(Trust::Nothing);
    }
    if let Some(hash) = node.cert_name.strip_prefix(PIN_PREFIX) {
        let pin =
            parse_hash(hash).ok_or_else(|| io::Error::other("the pin in the DERP map is no SHA-256"))?;
        return Ok(Trust::Pin(pin));
    }
    if node.cert_name.is_empty() { Ok(Trust::Roots) } else { Ok(Trust::Name(node.cert_name.clone())) }
}

fn parse_hash(text: &str) -> Option<[u8; 32]> {
    let mut hash = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (index, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use podtether_core::derp;
    use serde_json::json;
    use tokio::net::TcpListener;

    use super::super::Regions;
    use super::*;
    use crate::resolve::Resolver;
    use crate::tls::Tls;

    fn greetings() -> u64 {
        crate::refused::named().find(|(name, _)| *name == "derp_greeting").map_or(0, |(_, n)| n)
    }

    #[tokio::test]
    async fn greetings_that_are_none_are_counted() {
        let key = || NodePrivate::from_bytes([7; 32]);
        let server = NodePrivate::from_bytes([9; 32]);
        let (_servers, servers) = watch::channel(DerpRegion::default());
        let (_preferred, preferred) = watch::channel(false);
        let (_pings, pings) = watch::channel(0);
        let (_packets, packets) = mpsc::channel(1);
        let (messages, _messages) = mpsc::channel(1);
        let connection = Connection {
            region: RegionId(1),
            node_key: Arc::new(key()),
            dialer: Dialer { resolver: Resolver::default(), tls: Tls::new("").unwrap(), proxy: None },
            servers,
            preferred,
            given_up: pings.clone(),
            pings,
            packets,
            messages,
        };
        let frame = |frame: Frame<'_>| {
            let mut out = Vec::new();
            frame.encode(&mut out);
            out
        };
        let upgraded = b"HTTP/1.1 101 Ok\r\n\r\n".to_vec();
        let hello = frame(Frame::ServerKey(server.public()));
        let about = derp::ServerInfo::default();
        let mut info = Vec::new();
        derp::server_info(&server, &key().public(), [1; 24], &about, &mut info).unwrap();
        let mut others = Vec::new();
        derp::server_info(&server, &server.public(), [1; 24], &about, &mut others).unwrap();
        for (what, replies, counted) in [
            ("a greeting", vec![&upgraded, &hello, &info], 0),
            ("no HTTP", vec![&b"SSH-2.0\r\n\r\n".to_vec()], 1),
            ("a refusal", vec![&b"HTTP/1.1 503 Busy\r\n\r\n".to_vec()], 0),
            ("another magic", vec![&upgraded, &hello.iter().map(|b| b ^ 0x40).collect()], 1),
            ("another frame", vec![&upgraded, &frame(Frame::KeepAlive)], 1),
            ("info for somebody else", vec![&upgraded, &hello, &others], 1),
            ("no info", vec![&upgraded, &hello, &hello], 1),
        ] {
            let before = greetings();
            let (near, mut far) = tokio::io::duplex(10_000);
            far.write_all(&replies.into_iter().flatten().copied().collect::<Vec<u8>>()).await.unwrap();
            let mut near: Box<dyn Io> = Box::new(near);
            let greeted =
                tokio::time::timeout(GREETING_TIMEOUT, connection.greeting(&mut near, "x", 443)).await;
            assert_eq!(
                greeted.unwrap_or_else(|_| panic!("{what}: no end")).is_ok(),
                what == "a greeting",
                "{what}"
            );
            assert_eq!(greetings() - before, counted, "{what}");
        }
    }

    #[test]
    fn certificates_are_trusted_as_the_map_says() {
        let node = |cert_name: &str, insecure_for_tests| DerpNode {
            cert_name: cert_name.to_owned(),
            insecure_for_tests,
            ..DerpNode::default()
        };
        assert_eq!(trust(&node("", false)).unwrap(), Trust::Roots);
        assert_eq!(trust(&node("", true)).unwrap(), Trust::Nothing);
        assert_eq!(trust(&node("other.test", false)).unwrap(), Trust::Name("other.test".into()));
        let pin = format!("{PIN_PREFIX}{}", "0f".repeat(32));
        assert_eq!(trust(&node(&pin, false)).unwrap(), Trust::Pin([15; 32]));
        for bad in ["", "0f", &"0g".repeat(32), &"é".repeat(32)] {
            assert!(trust(&node(&format!("{PIN_PREFIX}{bad}"), false)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_hint_lengthens_the_wait_and_never_shortens_it() {
        let ms = Duration::from_millis;
        for (backoff, hint, wait) in [
            (ms(10), None, ms(10)),
            (ms(10), Some(ms(1)), ms(10)),
            (ms(4000), Some(ms(1)), ms(4000)),
            (ms(10), Some(ms(700)), ms(700)),
            (ms(10), Some(ms(3_600_000)), RESTART_HINT_MAX),
        ] {
            assert_eq!(rest(backoff, hint), wait);
        }
    }

    #[tokio::test]
    async fn a_relay_that_hangs_up_at_once_is_asked_ever_less_often() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let servers: DerpRegion =
            serde_json::from_value(json!({"RegionID": 1, "RegionCode": "r1", "Nodes": [
            {"Name": "1a", "RegionID": 1, "HostName": "relay.test", "IPv4": "127.0.0.1",
             "DERPPort": listener.local_addr().unwrap().port()}]}))
            .unwrap();
        let dialer = Dialer { resolver: Resolver::default(), tls: Tls::new("").unwrap(), proxy: None };
        let mut regions = Regions::new(NodePrivate::from_bytes([7; 32]));
        regions.connect(RegionId(1), servers, &dialer);
        let (mut accepted, mut tries) = (0, Vec::new());
        while tries.len() < 10 {
            tokio::select! {
                socket = listener.accept() => {
                    drop(socket.unwrap());
                    accepted += 1;
                }
                message = regions.message() => {
                    assert!(matches!(message.event, Event::Disconnected), "{message:?}");
                    tries.push(Instant::now());
                }
            }
        }
        for (n, pair) in (1_u64..).zip(tries.windows(2)) {
            let wait = pair[1] - pair[0];
            assert!(wait >= Duration::from_millis(n * n * 5), "wait {n} was {wait:?}");
        }
        assert!((10..=20).contains(&accepted), "{accepted} connections in ten tries");
    }
}
