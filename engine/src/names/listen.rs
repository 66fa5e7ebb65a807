//! The pod's side: listeners and their connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use podtether_core::dns::Client;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc};

use super::Event;

/// Longest question over UDP that is taken.
const MAX_DATAGRAM: usize = 4096;
/// Connections of the pod, all listeners together.
const MAX_CONNECTIONS: usize = 16;
/// Questions of one connection that wait for their answers.
const MAX_WAITING: usize = 16;
/// A connection on which nothing happens for so long is closed.
const IDLE: Duration = Duration::from_secs(15);
/// How long a slow reader may hold up an answer.
const WRITE: Duration = Duration::from_secs(5);
/// After an error (descriptors exhausted), so that it does not spin.
const PAUSE: Duration = Duration::from_millis(100);

/// What the listeners share.
#[derive(Debug, Clone)]
pub(super) struct Connections {
    places: Arc<Semaphore>,
    numbers: Arc<AtomicU64>,
}

impl Default for Connections {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(MAX_CONNECTIONS)), numbers: Arc::default() }
    }
}

/// Questions over UDP.
pub(super) async fn datagrams(socket: Arc<UdpSocket>, listener: u16, events: mpsc::Sender<Event>) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let message = buffer.get(..length).unwrap_or_default().to_vec();
        let client = Client { listener, from, stream: None };
        if events.send(Event::Query { client, answers: None, message }).await.is_err() {
            return;
        }
    }
}

/// Connections. When all places are taken, further ones wait in the kernel.
pub(super) async fn streams(
    socket: TcpListener,
    listener: u16,
    connections: Connections,
    events: mpsc::Sender<Event>,
) {
    loop {
        let Ok(place) = Arc::clone(&connections.places).acquire_owned().await else { return };
        match socket.accept().await {
            Ok((stream, from)) => {
                let number = connections.numbers.fetch_add(1, Ordering::Relaxed);
                let client = Client { listener, from, stream: Some(number) };
                let events = events.clone();
                tokio::spawn(async move {
                    connection(stream, client, &events).await;
                    let _ = events.send(Event::Closed(number)).await;
                    drop(place);
                });
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

async fn connection(stream: TcpStream, client: Client, events: &mpsc::Sender<Event>) {
    let (mut reader, mut writer) = stream.into_split();
    let (answers, mut to_write) = mpsc::channel(MAX_WAITING);
    // Each question takes a place, which its answer gives back; unanswered ones count until the end.
    let places = Semaphore::new(MAX_WAITING);
    let reading = read_all(&mut reader, client, events, &answers, &places);
    let writing = write_all(&mut writer, &mut to_write, &places);
    tokio::pin!(reading, writing);
    tokio::select! {
        () = &mut reading => {}
        () = &mut writing => return,
    }
    // Who has asked all its questions may close its side before it has the answers.
    let answered = async {
        let all = u32::try_from(MAX_WAITING).unwrap_or(u32::MAX);
        let _ = places.acquire_many(all).await;
    };
    tokio::select! {
        () = writing => {}
        () = answered => {}
        () = tokio::time::sleep(IDLE) => {}
    }
}

async fn read_all(
    reader: &mut OwnedReadHalf,
    client: Client,
    events: &mpsc::Sender<Event>,
    answers: &mpsc::Sender<Vec<u8>>,
    places: &Semaphore,
) {
    loop {
        let next = async {
            let place = places.acquire().await.ok()?;
            place.forget();
            let message = read_message(reader).await;
            if message.is_none() {
                places.add_permits(1);
            }
            message
        };
        let Ok(Some(message)) = tokio::time::timeout(IDLE, next).await else { return };
        let answers = Some(answers.clone());
        if events.send(Event::Query { client, answers, message }).await.is_err() {
            return;
        }
    }
}

async fn write_all(writer: &mut OwnedWriteHalf, messages: &mut mpsc::Receiver<Vec<u8>>, places: &Semaphore) {
    while let Some(message) = messages.recv().await {
        let Some(framed) = framed(&message) else { return };
        match tokio::time::timeout(WRITE, writer.write_all(&framed)).await {
            // The messages of a transfer are more than its question: a place too many does no harm.
            Ok(Ok(())) => places.add_permits(1),
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

/// A message behind its length.
pub(super) fn framed(message: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(message.len()).ok()?;
    Some([&length.to_be_bytes()[..], message].concat())
}

/// The next message of a stream; `None` at its end.
pub(super) async fn read_message(reader: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<Vec<u8>> {
    let length = reader.read_u16().await.ok()?;
    let mut message = vec![0; usize::from(length)];
    reader.read_exact(&mut message).await.ok()?;
    Some(message)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[tokio::test]
    async fn a_connection_carries_many_questions_and_half_closes() {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at: SocketAddr = socket.local_addr().unwrap();
        let (events, mut received) = mpsc::channel(8);
        tokio::spawn(streams(socket, 7, Connections::default(), events));
        let mut stream = TcpStream::connect(at).await.unwrap();
        for n in 0..3_u8 {
            stream.write_all(&framed(&[n; 5]).unwrap()).await.unwrap();
        }
        stream.shutdown().await.unwrap();
        let mut askers = vec![];
        for n in 0..3_u8 {
            let Some(Event::Query { client, answers: Some(answers), message }) = received.recv().await else {
                panic!("a question");
            };
            assert_eq!(
                (client.listener, client.from, message),
                (7, stream.local_addr().unwrap(), vec![n; 5])
            );
            askers.push((n, answers));
        }
        for (n, answers) in askers.into_iter().rev() {
            answers.send(vec![n, n]).await.unwrap();
        }
        for n in [2_u8, 1, 0] {
            assert_eq!(read_message(&mut stream).await.unwrap(), [n, n]);
        }
        assert_eq!(read_message(&mut stream).await, None, "closed when all is answered");
        assert!(matches!(received.recv().await, Some(Event::Closed(0))));
    }
}
