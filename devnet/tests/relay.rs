//! DERP and STUN, seen by a client.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a test fails by panicking and looks for one frame"
)]

mod support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use podtether_core::derp::{Frame, FrameReader, GoneReason, client_greeting, open_server_info};
use podtether_core::key::{NodePrivate, NodePublic};
use podtether_core::stun;
use podtether_devnet::{AuthKeyOptions, Devnet, Mode, RegionConfig};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use support::{Machine, devnet, soon};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const DISCO: &[u8] = b"TS\xf0\x9f\x92\xac padded to the least length of a sealed disco message, which is 62";

/// A frame in a form that can be kept and compared.
#[derive(Debug, PartialEq)]
enum Got {
    Packet(NodePublic, Vec<u8>),
    Gone(NodePublic, GoneReason),
    Pong([u8; 8]),
}

struct Client {
    stream: TlsStream<TcpStream>,
    frames: FrameReader,
}

fn region(devnet: &Devnet) -> (SocketAddr, u16) {
    let region = devnet.regions().remove(0);
    (SocketAddr::new(region.addresses[0], region.derp_port), region.stun_port)
}

async fn tls(devnet: &Devnet, name: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(devnet.ca_pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(region(devnet).0).await?;
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(name.to_owned()).unwrap(), stream).await
}

impl Client {
    async fn connect(devnet: &Devnet, key: &NodePrivate) -> Option<Self> {
        soon(Self::dial(devnet, key)).await
    }

    async fn dial(devnet: &Devnet, key: &NodePrivate) -> Option<Self> {
        let mut stream = tls(devnet, "derp1.tailnet.test").await.ok()?;
        stream
            .write_all(b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n")
            .await
            .ok()?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.ok()?);
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        let mut client = Self { stream, frames: FrameReader::new() };
        let mut greeting = Vec::new();
        let server = client
            .take(|frame| match frame {
                Frame::ServerKey(key) => Some(key),
                _ => None,
            })
            .await?;
        client_greeting(key, &server, [7; 24], &mut greeting).unwrap();
        client.stream.write_all(&greeting).await.ok()?;
        let info = client
            .take(|frame| match frame {
                Frame::ServerInfo(body) => Some(body.to_vec()),
                _ => None,
            })
            .await?;
        assert_eq!(open_server_info(key, &server, &info).unwrap().version, 2);
        Some(client)
    }

    /// What `wanted` finds in the next frame it finds something in; none when the connection ends.
    async fn take<T>(&mut self, wanted: impl Fn(Frame<'_>) -> Option<T>) -> Option<T> {
        let mut chunk = vec![0; 16384];
        loop {
            while let Some(frame) = self.frames.next_frame().unwrap() {
                if let Some(found) = wanted(frame) {
                    return Some(found);
                }
            }
            match soon(self.stream.read(&mut chunk)).await {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.frames.push(&chunk[..count]),
            }
        }
    }

    async fn next(&mut self) -> Option<Got> {
        self.take(|frame| match frame {
            Frame::RecvPacket(source, packet) => Some(Got::Packet(source, packet.to_vec())),
            Frame::PeerGone(key, reason) => Some(Got::Gone(key, reason)),
            Frame::Pong(data) => Some(Got::Pong(data)),
            _ => None,
        })
        .await
    }

    async fn send(&mut self, frame: Frame<'_>) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.stream.write_all(&bytes).await.unwrap();
    }
}

/// A devnet and nodes that belong to it.
async fn nodes(devnet: &Devnet, count: usize) -> Vec<Machine> {
    let mut machines = Vec::new();
    for number in 0..count {
        let machine = Machine::new(&format!("n{number}"));
        machine.join(devnet, AuthKeyOptions::default()).await;
        machines.push(machine);
    }
    machines
}

#[tokio::test]
async fn packets_pass_between_nodes_and_absence_is_told() {
    let devnet = devnet(|_| {}).await;
    let machines = nodes(&devnet, 2).await;
    let [a_key, b_key] = [machines[0].node.public(), machines[1].node.public()];
    let mut a = Client::connect(&devnet, &machines[0].node).await.unwrap();
    a.send(Frame::SendPacket(b_key, b"nobody is there")).await;
    a.send(Frame::SendPacket(b_key, DISCO)).await;
    assert_eq!(a.next().await.unwrap(), Got::Gone(b_key, GoneReason::NotHere), "told for disco only");
    let mut b = Client::connect(&devnet, &machines[1].node).await.unwrap();
    a.send(Frame::SendPacket(b_key, b"hello")).await;
    assert_eq!(b.next().await.unwrap(), Got::Packet(a_key, b"hello".to_vec()));
    b.send(Frame::SendPacket(a_key, DISCO)).await;
    assert_eq!(a.next().await.unwrap(), Got::Packet(b_key, DISCO.to_vec()));
    a.send(Frame::Ping(*b"12345678")).await;
    assert_eq!(a.next().await.unwrap(), Got::Pong(*b"12345678"));
    drop(a);
    assert_eq!(b.next().await.unwrap(), Got::Gone(a_key, GoneReason::Disconnected));
    let stats = devnet.region_stats(1).unwrap();
    assert_eq!((stats.packets, stats.clients, stats.dropped), (2, 1, 2));
    assert!(devnet.is_on_relay(1, &b_key) && !devnet.is_on_relay(1, &a_key));
}

#[tokio::test]
async fn the_newest_connection_of_a_key_receives() {
    let devnet = devnet(|_| {}).await;
    let machines = nodes(&devnet, 2).await;
    let (sender, receiver) = (machines[0].node.public(), machines[1].node.public());
    let mut a = Client::connect(&devnet, &machines[0].node).await.unwrap();
    let mut old = Client::connect(&devnet, &machines[1].node).await.unwrap();
    let mut new = Client::connect(&devnet, &machines[1].node).await.unwrap();
    a.send(Frame::SendPacket(receiver, b"1")).await;
    assert_eq!(new.next().await.unwrap(), Got::Packet(sender, b"1".to_vec()));
    drop(new);
    while devnet.region_stats(1).unwrap().packets < 10 {
        a.send(Frame::SendPacket(receiver, b"2")).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(old.next().await.unwrap(), Got::Packet(sender, b"2".to_vec()), "the older one again");
}

#[tokio::test]
async fn strangers_and_liars_are_not_served() {
    let devnet = devnet(|_| {}).await;
    let stranger = NodePrivate::generate().unwrap();
    assert!(Client::connect(&devnet, &stranger).await.is_none(), "not a node");
    assert!(tls(&devnet, "127.0.0.1").await.is_ok(), "the address is in the certificate");
    assert!(tls(&devnet, "other.test").await.is_err());
    let machines = nodes(&devnet, 1).await;
    let mut a = Client::connect(&devnet, &machines[0].node).await.unwrap();
    a.send(Frame::Other(0x10)).await;
    assert!(a.next().await.is_none(), "watching needs a mesh key");
    let mut a = Client::connect(&devnet, &machines[0].node).await.unwrap();
    a.send(Frame::SendPacket(stranger.public(), &vec![0; (64 << 10) + 1])).await;
    assert!(a.next().await.is_none(), "too long a packet");
}

#[tokio::test]
async fn a_region_goes_down_is_blocked_and_comes_back() {
    let devnet = devnet(|_| {}).await;
    let machines = nodes(&devnet, 1).await;
    let key = &machines[0].node;
    let mut a = Client::connect(&devnet, key).await.unwrap();
    assert!(devnet.restart_region(1));
    assert!(a.next().await.is_none());
    let mut a = Client::connect(&devnet, key).await.unwrap();
    devnet.set_region(1, Mode::Blackhole);
    a.send(Frame::Ping([1; 8])).await;
    assert!(tokio::time::timeout(Duration::from_millis(200), a.next()).await.is_err());
    devnet.set_region(1, Mode::Down);
    assert!(a.next().await.is_none());
    assert!(Client::connect(&devnet, key).await.is_none());
    devnet.set_region(1, Mode::Up);
    while Client::connect(&devnet, key).await.is_none() {
        tokio::task::yield_now().await;
    }
    assert!(!devnet.set_region(2, Mode::Up), "there is no second region");
}

#[tokio::test]
async fn stun_answers_clients_of_both_families_and_nobody_else() {
    let devnet = devnet(|config| {
        let addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        config.regions = vec![RegionConfig::new(1, addresses)];
    })
    .await;
    let port = region(&devnet).1;
    let mut buffer = [0; 1500];
    for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let socket = UdpSocket::bind(SocketAddr::new(ip, 0)).await.unwrap();
        socket.connect(SocketAddr::new(ip, port)).await.unwrap();
        let request = stun::request(&[5; 12]);
        let mut bare = request[..20].to_vec();
        bare[2..4].copy_from_slice(&[0, 0]);
        let mut wrong = request;
        wrong[39] ^= 1;
        for bad in [&bare[..], &wrong, &request[..30]] {
            socket.send(bad).await.unwrap();
        }
        socket.send(&request).await.unwrap();
        let length = soon(socket.recv(&mut buffer)).await.unwrap();
        let (transaction, seen) = stun::parse_response(&buffer[..length]).unwrap();
        assert_eq!((transaction, seen), ([5; 12], socket.local_addr().unwrap()));
        devnet.set_region(1, Mode::Blackhole);
        socket.send(&request).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_millis(100), socket.recv(&mut buffer)).await;
        assert!(answer.is_err(), "one answer for four requests, none when blocked");
        devnet.set_region(1, Mode::Up);
    }
}
