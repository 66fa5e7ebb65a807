//! A byte stream over Noise records: what HTTP/2 runs on.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use podtether_core::noise::{MAX_PLAINTEXT_LEN, RecordReader, Transport};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::refused::Refused;

/// Bytes taken from the stream below at a time.
const READ_BYTES: usize = 8 << 10;
/// Records sealed ahead of the stream below.
const RECORDS_AHEAD: usize = 4;

/// Sealed on the way out, opened on the way in.
pub(super) struct NoiseStream<S> {
    inner: S,
    transport: Transport,
    records: RecordReader,
    /// Opened bytes not read yet, from `plain_at` on.
    plain: Vec<u8>,
    plain_at: usize,
    /// Sealed bytes not written yet, from `sealed_at` on.
    sealed: Vec<u8>,
    sealed_at: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> NoiseStream<S> {
    /// `records` may hold what came behind the handshake already.
    pub(super) fn new(inner: S, transport: Transport, records: RecordReader) -> Self {
        Self { inner, transport, records, plain: Vec::new(), plain_at: 0, sealed: Vec::new(), sealed_at: 0 }
    }

    /// Puts back bytes that were read too far; only between reads that emptied the buffer.
    pub(super) fn unread(&mut self, bytes: &[u8]) {
        let mut plain = bytes.to_vec();
        plain.extend_from_slice(&self.plain[self.plain_at..]);
        self.plain = plain;
        self.plain_at = 0;
    }

    fn poll_send_sealed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sealed_at < self.sealed.len() {
            let sent = ready!(Pin::new(&mut self.inner).poll_write(cx, &self.sealed[self.sealed_at..]))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sealed_at += sent;
        }
        self.sealed.clear();
        self.sealed_at = 0;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for NoiseStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            let plain = &this.plain[this.plain_at..];
            if !plain.is_empty() {
                let count = plain.len().min(out.remaining());
                out.put_slice(&plain[..count]);
                this.plain_at += count;
                return Poll::Ready(Ok(()));
            }
            // An empty record is legal and only means another turn of this loop.
            let record = this.records.next_frame().inspect_err(|_| Refused::ControlNoise.count());
            if let Some(record) = record.map_err(io::Error::other)? {
                this.plain.clear();
                this.plain_at = 0;
                let opened = this.transport.open(record, &mut this.plain);
                opened.inspect_err(|_| Refused::ControlNoise.count()).map_err(io::Error::other)?;
                continue;
            }
            let mut bytes = [0; READ_BYTES];
            let mut buffer = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut buffer))?;
            crate::intake::count_bytes(buffer.filled().len());
            if buffer.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.records.feed(buffer.filled());
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for NoiseStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        ready!(this.poll_send_sealed(cx))?;
        let mut taken = 0;
        for piece in data.chunks(MAX_PLAINTEXT_LEN).take(RECORDS_AHEAD) {
            this.transport.seal(piece, &mut this.sealed).map_err(io::Error::other)?;
            taken += piece.len();
        }
        // What the stream below does not take now goes with the next write or flush.
        match this.poll_send_sealed(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(taken)),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send_sealed(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send_sealed(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podtether_core::key::MachinePrivate;
    use podtether_core::noise::{ClientHandshake, ServerHandshake};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    fn pair(room: usize) -> (NoiseStream<DuplexStream>, NoiseStream<DuplexStream>) {
        let keys = || MachinePrivate::generate().unwrap();
        let (client_key, server_key) = (keys(), keys());
        let (client, initiation) = ClientHandshake::start(&client_key, &server_key.public(), 115).unwrap();
        let (server, response) = ServerHandshake::read(&server_key, &initiation).unwrap().respond().unwrap();
        let client = client.finish(&response).unwrap();
        let (near, far) = duplex(room);
        (
            NoiseStream::new(near, client, RecordReader::new()),
            NoiseStream::new(far, server, RecordReader::new()),
        )
    }

    #[tokio::test]
    async fn bytes_arrive_whole_and_in_order_through_any_room() {
        for room in [1, 7, 100, 5000, 100_000] {
            let (client, server) = pair(room);
            let sent: Vec<u8> = (0..60_000_u32).map(|n| n.to_le_bytes()[0]).collect();
            let echo = tokio::spawn(async move {
                let (mut read, mut write) = tokio::io::split(server);
                tokio::io::copy(&mut read, &mut write).await.unwrap();
                write.shutdown().await.unwrap();
            });
            let (mut read, mut write) = tokio::io::split(client);
            let writer = tokio::spawn({
                let sent = sent.clone();
                async move {
                    write.write_all(&sent).await.unwrap();
                    write.shutdown().await.unwrap();
                }
            });
            let mut got = Vec::new();
            read.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, sent, "room {room}");
            writer.await.unwrap();
            echo.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_changed_byte_ends_the_stream() {
        let (mut client, server) = pair(100_000);
        client.write_all(b"hello").await.unwrap();
        client.flush().await.unwrap();
        let NoiseStream { mut inner, transport, .. } = server;
        let mut record = vec![0; 3 + 5 + 16];
        inner.read_exact(&mut record).await.unwrap();
        record[5] ^= 1;
        let mut records = RecordReader::new();
        records.feed(&record);
        let mut tampered = NoiseStream::new(inner, transport, records);
        assert!(tampered.read_u8().await.is_err());
    }
}
