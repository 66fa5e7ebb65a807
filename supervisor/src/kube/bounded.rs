//! An answer's body that breaks off where one line of it, which is an object of a watch or a whole list, grows
//! beyond all measure.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tower::BoxError;

/// Longest line: a page of a list is one.
const MAX_LINE: usize = 32 << 20;

/// See the module.
pub(super) struct Bounded<B> {
    body: B,
    /// Bytes since the last line's end.
    line: usize,
}

impl<B> Bounded<B> {
    pub(super) fn new(body: B) -> Bounded<B> {
        Bounded { body, line: 0 }
    }
}

impl<B: Body<Data = Bytes, Error = BoxError> + Unpin> Body for Bounded<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            self.line = match data.iter().rposition(|byte| *byte == b'\n') {
                Some(end) => data.len() - end - 1,
                None => self.line.saturating_add(data.len()),
            };
            if self.line > MAX_LINE {
                return Poll::Ready(Some(Err("the API server sent a line without an end".into())));
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    struct Frames(VecDeque<Bytes>);

    impl Body for Frames {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            Poll::Ready(self.0.pop_front().map(|data| Ok(Frame::data(data))))
        }
    }

    fn read(frames: impl IntoIterator<Item = Vec<u8>>) -> Result<usize, String> {
        let mut body = Bounded::new(Frames(frames.into_iter().map(Bytes::from).collect()));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut read = 0;
        while let Poll::Ready(Some(frame)) = Pin::new(&mut body).poll_frame(&mut cx) {
            read += frame.map_err(|e| e.to_string())?.data_ref().map_or(0, Bytes::len);
        }
        Ok(read)
    }

    #[test]
    fn lines_end_and_those_that_do_not_break_off() {
        let piece = || vec![b'x'; MAX_LINE / 4];
        assert_eq!(read(std::iter::repeat_with(piece).take(4)), Ok(MAX_LINE));
        assert!(read(std::iter::repeat_with(piece).take(5)).unwrap_err().contains("without an end"));
        let line = || [piece(), b"\nx".to_vec()].concat();
        assert!(read(std::iter::repeat_with(line).take(9)).is_ok());
        let short = || b"{}\n{}\n{".to_vec();
        assert!(read(std::iter::repeat_with(short).take(1000)).is_ok());
    }
}
