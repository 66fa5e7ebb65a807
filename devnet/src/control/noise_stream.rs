//! A byte stream over Noise records, for either side.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use podtether_core::noise::{FrameReader, MAX_PLAINTEXT_LEN, Transport};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

const READ_CHUNK: usize = 16 << 10;

/// Encrypts what is written and decrypts what is read.
pub struct NoiseStream<S> {
    io: S,
    transport: Transport,
    records: FrameReader,
    /// Decrypted and not yet read, from `taken` on.
    plain: Vec<u8>,
    taken: usize,
    /// Sealed and not yet written, from `written` on: at most one record.
    sealed: Vec<u8>,
    written: usize,
}

impl<S> NoiseStream<S> {
    /// A stream over `io` after the handshake.
    pub fn new(io: S, transport: Transport) -> Self {
        Self {
            io,
            transport,
            records: FrameReader::new(),
            plain: Vec::new(),
            taken: 0,
            sealed: Vec::new(),
            written: 0,
        }
    }
}

impl<S: AsyncWrite + Unpin> NoiseStream<S> {
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.sealed.len() {
            let count = ready!(Pin::new(&mut self.io).poll_write(context, &self.sealed[self.written..]))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += count;
        }
        self.sealed.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for NoiseStream<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_drain(context))?;
        let count = data.len().min(MAX_PLAINTEXT_LEN);
        this.transport.seal(&data[..count], &mut this.sealed).map_err(io::Error::other)?;
        // Start writing now; what does not fit goes with the next write or flush.
        if let Poll::Ready(Err(error)) = this.poll_drain(context) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(context))?;
        Pin::new(&mut this.io).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(context))?;
        Pin::new(&mut this.io).poll_shutdown(context)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for NoiseStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.taken < this.plain.len() {
                let count = out.remaining().min(this.plain.len() - this.taken);
                out.put_slice(&this.plain[this.taken..this.taken + count]);
                this.taken += count;
                return Poll::Ready(Ok(()));
            }
            this.plain.clear();
            this.taken = 0;
            if this.open_record()? {
                continue;
            }
            let mut chunk = [MaybeUninit::uninit(); READ_CHUNK];
            let mut buffer = ReadBuf::uninit(&mut chunk);
            ready!(Pin::new(&mut this.io).poll_read(context, &mut buffer))?;
            if buffer.filled().is_empty() {
                return Poll::Ready(if this.records.is_empty() {
                    Ok(())
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                });
            }
            this.records.feed(buffer.filled());
        }
    }
}

impl<S> NoiseStream<S> {
    /// Decrypts the next whole record, if there is one.
    fn open_record(&mut self) -> io::Result<bool> {
        match self.records.next_frame().map_err(io::Error::other)? {
            None => Ok(false),
            Some(frame) => {
                self.transport.open(frame, &mut self.plain).map_err(io::Error::other)?;
                Ok(true)
            }
        }
    }
}
