//! The servers' side: sockets that were made where the pod is, lent to one question at a time.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use podtether_core::dns::{AskId, Capacity, Failure};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, UdpSocket};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::Event;
use super::listen::{framed, read_message};

const MAX_DATAGRAM: usize = 4096;
/// Kinds of sockets: UDP and TCP, each of both families.
const KINDS: usize = 4;

#[derive(Debug)]
pub(super) struct Askers {
    idle: [Vec<OwnedFd>; KINDS],
    capacity: Capacity,
    busy: HashMap<AskId, Busy>,
    events: mpsc::Sender<Event>,
}

#[derive(Debug)]
struct Busy {
    socket: OwnedFd,
    kind: usize,
    task: AbortHandle,
}

impl Askers {
    /// Sockets in the order UDP/IPv4, UDP/IPv6, TCP/IPv4, TCP/IPv6.
    pub(super) fn new(idle: [Vec<OwnedFd>; KINDS], events: mpsc::Sender<Event>) -> Self {
        let [udp4, udp6, tcp4, tcp6] = [0, 1, 2, 3].map(|kind: usize| idle.get(kind).map_or(0, Vec::len));
        let capacity = Capacity { udp4, udp6, tcp4, tcp6 };
        Self { idle, capacity, busy: HashMap::new(), events }
    }

    pub(super) fn capacity(&self) -> Capacity {
        self.capacity
    }

    pub(super) fn ask(&mut self, ask: AskId, server: SocketAddr, stream: bool, message: Vec<u8>) {
        let kind = usize::from(server.is_ipv6()) + 2 * usize::from(stream);
        let events = self.events.clone();
        let socket = self.idle.get_mut(kind).and_then(Vec::pop);
        let Some((socket, lent)) = socket.and_then(|s| s.try_clone().ok().map(|lent| (s, lent))) else {
            // The queue may be full, and this is its reader: nobody may wait here.
            tokio::spawn(async move {
                let _ = events.send(Event::Answer(ask, Err(Failure))).await;
            });
            return;
        };
        let task = tokio::spawn(async move {
            let asked = async {
                if stream {
                    over_tcp(lent, server, &message, ask, &events).await
                } else {
                    over_udp(lent, server, &message, ask, &events).await
                }
            };
            if asked.await.is_err() {
                let _ = events.send(Event::Answer(ask, Err(Failure))).await;
            }
        });
        self.busy.insert(ask, Busy { socket, kind, task: task.abort_handle() });
    }

    pub(super) fn stop(&mut self, ask: AskId) {
        let Some(busy) = self.busy.remove(&ask) else { return };
        busy.task.abort();
        // One that cannot be made fit for another server is not lent again.
        if disconnect(&busy.socket).is_ok()
            && let Some(idle) = self.idle.get_mut(busy.kind)
        {
            idle.insert(0, busy.socket);
        }
    }
}

async fn over_udp(
    socket: OwnedFd,
    server: SocketAddr,
    message: &[u8],
    ask: AskId,
    events: &mpsc::Sender<Event>,
) -> io::Result<()> {
    let socket = UdpSocket::from_std(socket.into())?;
    socket.connect(server).await?;
    socket.send(message).await?;
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = buffer.get(..length).unwrap_or_default().to_vec();
        if events.send(Event::Answer(ask, Ok(answer))).await.is_err() {
            return Ok(());
        }
    }
}

async fn over_tcp(
    socket: OwnedFd,
    server: SocketAddr,
    message: &[u8],
    ask: AskId,
    events: &mpsc::Sender<Event>,
) -> io::Result<()> {
    let mut stream = TcpSocket::from_std_stream(socket.into()).connect(server).await?;
    let framed = framed(message).ok_or(io::ErrorKind::InvalidInput)?;
    stream.write_all(&framed).await?;
    while let Some(answer) = read_message(&mut stream).await {
        if events.send(Event::Answer(ask, Ok(answer))).await.is_err() {
            return Ok(());
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// Makes a socket as it was born: no peer, no port, nothing left of what came.
fn disconnect(socket: &OwnedFd) -> io::Result<()> {
    // SAFETY: all zero is a valid sockaddr, and AF_UNSPEC is zero.
    let nobody: libc::sockaddr = unsafe { std::mem::zeroed() };
    let length = libc::socklen_t::try_from(size_of_val(&nobody)).map_err(io::Error::other)?;
    // SAFETY: one sockaddr of this length that outlives the call.
    if unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, length) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut byte = [0_u8; 1];
    loop {
        // SAFETY: writes at most one byte into a buffer of one byte.
        let read = unsafe {
            libc::recv(socket.as_raw_fd(), byte.as_mut_ptr().cast(), byte.len(), libc::MSG_DONTWAIT)
        };
        // Errors that an earlier question caused come one at a time, each once.
        if read < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::ECONNREFUSED) {
            return Ok(());
        }
        if read == 0 && is_stream(socket) {
            return Ok(());
        }
    }
}

fn is_stream(socket: &OwnedFd) -> bool {
    nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::SockType)
        .is_ok_and(|kind| kind == nix::sys::socket::SockType::Stream)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn askers() -> (Askers, mpsc::Receiver<Event>) {
        // One socket of each kind: it is used again and again.
        let socket = |kind| {
            let flags = nix::sys::socket::SockFlag::SOCK_NONBLOCK;
            nix::sys::socket::socket(nix::sys::socket::AddressFamily::Inet, kind, flags, None).unwrap()
        };
        let (udp, tcp) =
            (socket(nix::sys::socket::SockType::Datagram), socket(nix::sys::socket::SockType::Stream));
        let (events, received) = mpsc::channel(8);
        (Askers::new([vec![udp], vec![], vec![tcp], vec![]], events), received)
    }

    async fn next(events: &mut mpsc::Receiver<Event>) -> (AskId, Result<Vec<u8>, Failure>) {
        match tokio::time::timeout(Duration::from_secs(10), events.recv()).await {
            Ok(Some(Event::Answer(ask, answer))) => (ask, answer),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_socket_hears_its_own_server_and_leaves_from_another_port_each_time() {
        let (mut askers, mut events) = askers();
        assert_eq!(askers.capacity(), Capacity { udp4: 1, tcp4: 1, ..Capacity::default() });
        let servers =
            [UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap()];
        let mut ports = std::collections::HashSet::new();
        let mut buffer = [0; 64];
        for round in 0..6_u64 {
            let server = &servers[usize::from(round % 2 == 1)];
            askers.ask(AskId(round), server.local_addr().unwrap(), false, vec![1, 2, 3]);
            let (length, from) = server.recv_from(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], [1, 2, 3]);
            ports.insert(from.port());
            // Somebody else's answer does not arrive, nor does one that is late.
            servers[usize::from(round % 2 == 0)].send_to(b"other", from).await.unwrap();
            server.send_to(&[u8::try_from(round).unwrap()], from).await.unwrap();
            assert_eq!(next(&mut events).await, (AskId(round), Ok(vec![u8::try_from(round).unwrap()])));
            server.send_to(b"late", from).await.unwrap();
            askers.stop(AskId(round));
        }
        assert!(ports.len() > 3, "{ports:?}");
    }

    #[tokio::test]
    async fn tcp_is_used_again_and_what_is_not_there_fails_at_once() {
        let (mut askers, mut events) = askers();
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = server.local_addr().unwrap();
        for round in 0..3 {
            askers.ask(AskId(round), at, true, b"question".to_vec());
            let (mut stream, _) = server.accept().await.unwrap();
            assert_eq!(read_message(&mut stream).await.unwrap(), b"question");
            stream.write_all(&framed(b"answer").unwrap()).await.unwrap();
            assert_eq!(next(&mut events).await, (AskId(round), Ok(b"answer".to_vec())));
            askers.ask(AskId(100), at, true, vec![]);
            assert_eq!(next(&mut events).await, (AskId(100), Err(Failure)), "no second socket");
            askers.stop(AskId(round));
        }
        drop(server);
        let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        for round in 0..3 {
            for (stream, at) in [(true, at), (false, gone)] {
                askers.ask(AskId(round), at, stream, vec![0; 12]);
                assert_eq!(next(&mut events).await, (AskId(round), Err(Failure)), "{stream}");
                askers.stop(AskId(round));
            }
        }
    }
}
