//! Moves DNS messages between the pod, the core and name servers.
//!
//! Each listener, connection and asking is a small task; all of them hand what they have to the driver
//! through one bounded queue, and who finds it full waits, so that the kernel's buffers are what overflows.

mod ask;
mod listen;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use podtether_core::dns::{Action, AskId, Asked, Capacity, Client, Failure};
use podtether_core::engine::Engine;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::driver::{Drop, Drops};
use crate::fds;
use ask::Askers;

/// Messages that wait for the driver.
const QUEUE: usize = 32;
const PORT: u16 = 53;

/// What a task has for the driver.
#[derive(Debug)]
pub(crate) enum Event {
    /// The pod asks; over TCP with where the answers go.
    Query { client: Client, answers: Option<mpsc::Sender<Vec<u8>>>, message: Vec<u8> },
    /// A connection has ended.
    Closed(u64),
    /// A server's message, or why there will be none.
    Answer(AskId, Result<Vec<u8>, Failure>),
}

/// The sockets for names.
#[derive(Debug)]
pub(crate) struct Names {
    events: mpsc::Receiver<Event>,
    listeners: Vec<Listener>,
    streams: HashMap<u64, mpsc::Sender<Vec<u8>>>,
    askers: Askers,
    listening: JoinSet<()>,
    /// Closing it ends the rules that lead the pod's questions here.
    owner: Vec<OwnedFd>,
}

#[derive(Debug)]
struct Listener {
    udp: Arc<UdpSocket>,
    /// The name server that it stands in for.
    meant_for: Option<SocketAddr>,
}

impl Names {
    /// Begins to listen; the stand-ins are for `servers`, in their order.
    pub(crate) fn start(fds: fds::Names, servers: &[IpAddr]) -> std::io::Result<Self> {
        let (to_self, events) = mpsc::channel(QUEUE);
        let own = fds.dns.into_iter().zip(fds.dns_tcp).map(|pair| (None, pair));
        let stand_ins = fds.stand_in.into_iter().zip(fds.stand_in_tcp).zip(servers);
        let stand_ins = stand_ins.map(|(pair, server)| (Some(SocketAddr::new(*server, PORT)), pair));
        let mut listeners = Vec::new();
        let mut listening = JoinSet::new();
        let connections = listen::Connections::default();
        for (number, (meant_for, (udp, tcp))) in (0..).zip(own.chain(stand_ins)) {
            let udp = std::net::UdpSocket::from(udp);
            udp.set_nonblocking(true)?;
            let udp = Arc::new(UdpSocket::from_std(udp)?);
            listening.spawn(listen::datagrams(Arc::clone(&udp), number, to_self.clone()));
            let tcp = std::net::TcpListener::from(tcp);
            tcp.set_nonblocking(true)?;
            let tcp = tokio::net::TcpListener::from_std(tcp)?;
            listening.spawn(listen::streams(tcp, number, connections.clone(), to_self.clone()));
            listeners.push(Listener { udp, meant_for });
        }
        let askers = Askers::new([fds.ask_udp4, fds.ask_udp6, fds.ask_tcp4, fds.ask_tcp6], to_self);
        Ok(Self { events, listeners, streams: HashMap::new(), askers, listening, owner: fds.owner })
    }

    /// Another process listens from now on; what was asked here is still answered.
    pub(crate) fn let_go(&mut self) {
        self.listening.abort_all();
        self.owner.clear();
    }

    /// How many servers can be asked at a time.
    pub(crate) fn capacity(&self) -> Capacity {
        self.askers.capacity()
    }

    /// Waits for something to handle. The sockets for asking hold a sender, so the queue never ends.
    pub(crate) async fn event(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    pub(crate) fn handle(&mut self, event: Event, engine: &mut Engine, now: Instant) {
        match event {
            Event::Query { client, answers, message } => {
                if let (Some(stream), Some(answers)) = (client.stream, answers) {
                    self.streams.entry(stream).or_insert(answers);
                }
                let Some(listener) = self.listeners.get(usize::from(client.listener)) else { return };
                engine.handle_dns(Asked { client, meant_for: listener.meant_for }, &message, now);
            }
            Event::Closed(stream) => {
                self.streams.remove(&stream);
            }
            Event::Answer(ask, answer) => {
                engine.handle_dns_answer(ask, answer.as_deref().map_err(|failure| *failure), now);
            }
        }
    }

    /// Does what the core wants done.
    pub(crate) fn act(&mut self, action: Action, drops: &mut Drops) {
        match action {
            Action::Reply { to, message } => {
                let sent = match to.stream {
                    // A connection that is gone wants no answer.
                    Some(stream) => self.streams.get(&stream).is_none_or(|s| s.try_send(message).is_ok()),
                    None => self
                        .listeners
                        .get(usize::from(to.listener))
                        .is_some_and(|l| l.udp.try_send_to(&message, to.from).is_ok()),
                };
                if !sent {
                    drops.count(Drop::DnsReply);
                }
            }
            Action::Ask { ask, server, stream, message } => self.askers.ask(ask, server, stream, message),
            Action::Stop { ask } => self.askers.stop(ask),
        }
    }
}
