//! Frames on a stream: four bytes of length, most significant first, and so many of JSON.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::{Sink, Stream};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

use super::MAX_FRAME_BYTES;

/// Bytes of a frame's length.
const HEAD: usize = 4;
/// Read at once, on the stack: most frames whole.
const READ: usize = 4096;
/// Written before more is taken to be written.
const ENOUGH: usize = 8 << 10;

/// How one side reads.
pub trait Format {
    /// What comes in.
    type Item;

    /// A frame's content.
    ///
    /// # Errors
    /// `InvalidData` for what is no such message.
    fn read(frame: &[u8]) -> io::Result<Self::Item>;
}

/// Messages over a stream. Between two messages there is no buffer: a supervisor has a stream to each of hundreds
/// of engines, of which hardly any has a message on its way.
#[derive(Debug)]
pub struct Frames<F, Out> {
    stream: UnixStream,
    /// Came in, and is not a whole frame yet or was not asked for yet.
    came: Vec<u8>,
    /// Ends a stream that cannot be read any further.
    is_over: bool,
    leaving: Vec<u8>,
    /// Of `leaving`.
    written: usize,
    format: PhantomData<fn(Out) -> F>,
}

// The stream can be moved, and nothing points into the rest.
impl<F, Out> Unpin for Frames<F, Out> {}

impl<F, Out> Frames<F, Out> {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            came: Vec::new(),
            is_over: false,
            leaving: Vec::new(),
            written: 0,
            format: PhantomData,
        }
    }

    /// Takes the next frame out of what came, if it is whole, and gives its content to `read`.
    fn next_frame<T>(&mut self, read: impl FnOnce(&[u8]) -> io::Result<T>) -> Option<io::Result<T>> {
        let head: [u8; HEAD] = self.came.get(..HEAD)?.try_into().ok()?;
        let length = usize::try_from(u32::from_be_bytes(head)).unwrap_or(usize::MAX);
        if length > MAX_FRAME_BYTES {
            return Some(Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a frame of {length} bytes, more than {MAX_FRAME_BYTES}"),
            )));
        }
        let message = read(self.came.get(HEAD..HEAD + length)?);
        if self.came.len() == HEAD + length {
            self.came = Vec::new();
        } else {
            self.came.drain(..HEAD + length);
        }
        Some(message)
    }

    /// Reads what there is; how many bytes.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut place = [MaybeUninit::uninit(); READ];
        let mut read = ReadBuf::uninit(&mut place);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut read))?;
        self.came.extend_from_slice(read.filled());
        Poll::Ready(Ok(read.filled().len()))
    }

    fn poll_written(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest) = self.leaving.get(self.written..).filter(|rest| !rest.is_empty()) {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.written += count,
            }
        }
        (self.leaving, self.written) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }
}

impl<F: Format, Out> Stream for Frames<F, Out> {
    type Item = io::Result<F::Item>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        while !self.is_over {
            if let Some(message) = self.next_frame(F::read) {
                self.is_over = message.is_err();
                return Poll::Ready(Some(message));
            }
            match ready!(self.poll_more(cx)) {
                Ok(0) => {
                    self.is_over = true;
                    if !std::mem::take(&mut self.came).is_empty() {
                        return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into())));
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    self.is_over = true;
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
        Poll::Ready(None)
    }
}

impl<F, Out: Serialize> Sink<Out> for Frames<F, Out> {
    type Error = io::Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.leaving.len() - self.written < ENOUGH { Poll::Ready(Ok(())) } else { self.poll_written(cx) }
    }

    fn start_send(mut self: Pin<&mut Self>, item: Out) -> io::Result<()> {
        let before = self.leaving.len();
        let written = append(&mut self.leaving, &item);
        if written.is_err() {
            self.leaving.truncate(before);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_written(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_written(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Appends `item` as a frame.
fn append(bytes: &mut Vec<u8>, item: &impl Serialize) -> io::Result<()> {
    let at = bytes.len();
    bytes.extend_from_slice(&[0; HEAD]);
    serde_json::to_writer(&mut *bytes, item).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    let length = bytes.len() - at - HEAD;
    let head = u32::try_from(length).ok().filter(|_| length <= MAX_FRAME_BYTES).map(u32::to_be_bytes);
    match (bytes.get_mut(at..at + HEAD), head) {
        (Some(place), Some(head)) => {
            place.copy_from_slice(&head);
            Ok(())
        }
        _ => {
            let what = format!("a message of {length} bytes, more than {MAX_FRAME_BYTES}");
            Err(io::Error::new(io::ErrorKind::InvalidInput, what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{SinkExt as _, StreamExt as _};
    use tokio::io::AsyncWriteExt as _;

    struct Text;

    impl Format for Text {
        type Item = String;

        fn read(frame: &[u8]) -> io::Result<String> {
            serde_json::from_slice(frame).map_err(|_| io::ErrorKind::InvalidData.into())
        }
    }

    fn pair() -> (Frames<Text, String>, Frames<Text, String>) {
        let (near, far) = UnixStream::pair().expect("a pair");
        (Frames::new(near), Frames::new(far))
    }

    fn held<F, Out>(frames: &Frames<F, Out>) -> usize {
        frames.came.capacity() + frames.leaving.capacity()
    }

    #[tokio::test]
    async fn messages_of_any_length_arrive_in_order_and_leave_no_buffer() {
        let (mut near, mut far) = pair();
        let lengths = [0, 1, READ - 7, READ - 6, READ - 5, READ, 3 * READ, 100 << 10, 5, MAX_FRAME_BYTES - 2];
        let texts: Vec<String> = lengths.iter().map(|length| "x".repeat(*length)).collect();
        let sent = texts.clone();
        let sender = tokio::spawn(async move {
            for text in sent {
                near.feed(text).await.expect("room");
            }
            near.flush().await.expect("room");
            near
        });
        for text in &texts {
            assert_eq!(far.next().await.expect("a message").expect("whole"), *text);
        }
        let mut near = sender.await.expect("no panic");
        assert_eq!((held(&near), held(&far)), (0, 0), "bytes");
        near.close().await.expect("open");
        assert!(far.next().await.is_none() && far.next().await.is_none());
    }

    #[tokio::test]
    async fn a_message_in_pieces_is_put_together() {
        let (near, mut far) = UnixStream::pair().expect("a pair");
        let mut near = Frames::<Text, String>::new(near);
        let frames = b"\0\0\0\x04\"ab\"\0\0\0\x03\"c\"";
        let reader = tokio::spawn(async move {
            let both = [near.next().await, near.next().await];
            (both.map(|text| text.expect("a message").expect("whole")), near.next().await.is_none())
        });
        for byte in frames {
            far.write_all(&[*byte]).await.expect("room");
            tokio::task::yield_now().await;
        }
        drop(far);
        assert_eq!(reader.await.expect("no panic"), (["ab".to_owned(), "c".to_owned()], true));
    }

    #[tokio::test]
    async fn what_cannot_be_read_ends_the_stream() {
        for (bytes, kind) in [
            (&b"\xff\xff\xff\xff\0\0\0\x04\"ab\""[..], io::ErrorKind::InvalidData),
            (b"\0\0\0\x01x\0\0\0\x04\"ab\"", io::ErrorKind::InvalidData),
            (b"\0\0\0\x05\"ab\"", io::ErrorKind::UnexpectedEof),
            (b"\0\0", io::ErrorKind::UnexpectedEof),
        ] {
            let (near, mut far) = UnixStream::pair().expect("a pair");
            let mut near = Frames::<Text, String>::new(near);
            far.write_all(bytes).await.expect("room");
            drop(far);
            let error = near.next().await.expect("the end is told").expect_err("no message");
            assert_eq!(error.kind(), kind, "{bytes:?}");
            assert!(near.next().await.is_none(), "and nothing after it");
        }
    }

    #[tokio::test]
    async fn a_message_that_is_too_large_is_not_sent_and_the_next_one_is() {
        let (mut near, mut far) = pair();
        near.feed("before".to_owned()).await.expect("room");
        let error = near.feed("x".repeat(MAX_FRAME_BYTES)).await.expect_err("too large");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        near.send("after".to_owned()).await.expect("room");
        for text in ["before", "after"] {
            assert_eq!(far.next().await.expect("a message").expect("whole"), text);
        }
    }
}
