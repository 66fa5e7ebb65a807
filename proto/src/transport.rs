//! How the services travel: length-delimited bincode over a Unix stream socket.

use std::io;
use std::marker::PhantomData;
use std::pin::Pin;
use std::time::Duration;

use bincode::Options as _;
use serde::{Deserialize, Serialize};
use tarpc::ClientMessage;
use tarpc::serde_transport::{Transport, new};
use tarpc::tokio_serde::formats::Bincode;
use tarpc::tokio_serde::{Deserializer, Serializer};
use tokio::net::UnixStream;
use tokio_util::bytes::{Bytes, BytesMut};
use tokio_util::codec::length_delimited::LengthDelimitedCodec;

/// Largest frame either side takes, bytes. A CNI request with its annotations is the largest one.
pub const MAX_FRAME_BYTES: usize = 1 << 20;

/// Frames `stream` for one of the services.
pub fn framed<Item, SinkItem>(
    stream: UnixStream,
) -> Transport<UnixStream, Item, SinkItem, Bincode<Item, SinkItem>>
where
    Item: for<'de> Deserialize<'de>,
    SinkItem: Serialize,
{
    let mut codec = LengthDelimitedCodec::builder();
    codec.max_frame_length(MAX_FRAME_BYTES);
    new(codec.new_framed(stream), Bincode::default())
}

/// Frames `stream` for the side that serves: like [`framed`], and a request's deadline is looked at first.
pub fn served<Call, SinkItem>(
    stream: UnixStream,
) -> Transport<UnixStream, ClientMessage<Call>, SinkItem, Requests<Call, SinkItem>>
where
    Call: for<'de> Deserialize<'de>,
    SinkItem: Serialize,
{
    let mut codec = LengthDelimitedCodec::builder();
    codec.max_frame_length(MAX_FRAME_BYTES);
    new(codec.new_framed(stream), Requests::default())
}

/// Longest time a client may give a call. tarpc adds it to the clock without looking, and a sum that does
/// not fit ends the program.
const MAX_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// How a message of a client begins: as [`ClientMessage`], up to the deadline.
#[derive(Deserialize)]
enum Beginning {
    Request(Duration),
    Cancel,
}

/// Bincode for requests, refusing those whose deadline the server could not keep.
pub struct Requests<Call, SinkItem>(PhantomData<fn(SinkItem) -> Call>);

impl<Call, SinkItem> Default for Requests<Call, SinkItem> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<Call, SinkItem> Deserializer<ClientMessage<Call>> for Requests<Call, SinkItem>
where
    Call: for<'de> Deserialize<'de>,
{
    type Error = io::Error;

    fn deserialize(self: Pin<&mut Self>, source: &BytesMut) -> io::Result<ClientMessage<Call>> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let options = bincode::DefaultOptions::new();
        match options.allow_trailing_bytes().deserialize(source) {
            Ok(Beginning::Request(deadline)) if deadline > MAX_DEADLINE => {
                return Err(invalid(format!("a call with a deadline of {deadline:?}")));
            }
            Ok(Beginning::Request(_) | Beginning::Cancel) => {}
            Err(error) => return Err(invalid(error.to_string())),
        }
        options.deserialize(source).map_err(|error| invalid(error.to_string()))
    }
}

impl<Call, SinkItem> Serializer<SinkItem> for Requests<Call, SinkItem>
where
    SinkItem: Serialize,
{
    type Error = io::Error;

    fn serialize(self: Pin<&mut Self>, item: &SinkItem) -> io::Result<Bytes> {
        bincode::DefaultOptions::new()
            .serialize(item)
            .map(Bytes::from)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

/// Whether a connection ended because of what came, not because it broke.
#[must_use]
pub fn is_malformed(error: &tarpc::ChannelError<io::Error>) -> bool {
    // tarpc puts what the frames and the format say into another error.
    let tarpc::ChannelError::Read(error) = error else { return false };
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<io::Error>());
    inner.unwrap_or(error).kind() == io::ErrorKind::InvalidData
}

/// Connects to the service at `path`.
///
/// # Errors
/// As `connect(2)`: nobody serves the socket, or it is not ours to open.
pub async fn connect<Item, SinkItem>(
    path: impl AsRef<std::path::Path>,
) -> io::Result<Transport<UnixStream, Item, SinkItem, Bincode<Item, SinkItem>>>
where
    Item: for<'de> Deserialize<'de>,
    SinkItem: Serialize,
{
    Ok(framed(UnixStream::connect(path).await?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::NodeRequest;

    fn read(bytes: &[u8]) -> io::Result<ClientMessage<NodeRequest>> {
        let mut format = Requests::<NodeRequest, ()>::default();
        Pin::new(&mut format).deserialize(&BytesMut::from(bytes))
    }

    #[tokio::test]
    async fn noise_is_told_from_a_caller_that_went_away() {
        use futures_util::StreamExt as _;
        use tarpc::server::{BaseChannel, Channel as _};
        use tokio::io::AsyncWriteExt as _;

        for (bytes, malformed) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], Some(true)),
            (&[0, 0, 0, 2, 0, 0xff], Some(true)),
            (&[0, 0, 0, 9, 0], Some(false)),
            (b"", None),
        ] {
            let (mut near, far) = UnixStream::pair().expect("a pair");
            near.write_all(bytes).await.expect("room");
            drop(near);
            let channel = BaseChannel::<NodeRequest, (), _>::with_defaults(served(far));
            let end = std::pin::pin!(channel.requests()).next().await;
            assert_eq!(end.map(|end| end.err().is_some_and(|e| is_malformed(&e))), malformed, "{bytes:?}");
        }
    }

    #[test]
    fn a_deadline_past_all_time_is_refused_and_a_usual_one_is_taken() {
        let endless = [0, 253, 255, 255, 0, 0, 0, 64, 255, 0];
        assert!(read(&endless).is_err());

        let request = ClientMessage::Request(tarpc::Request {
            context: tarpc::context::current(),
            id: 7,
            message: NodeRequest::Status {},
        });
        let bytes = bincode::DefaultOptions::new().serialize(&request).expect("serializable");
        assert!(matches!(read(&bytes), Ok(ClientMessage::Request(back)) if back.id == 7));
        let cancel =
            ClientMessage::<NodeRequest>::Cancel { trace_context: Default::default(), request_id: 9 };
        let bytes = bincode::DefaultOptions::new().serialize(&cancel).expect("serializable");
        assert!(matches!(read(&bytes), Ok(ClientMessage::Cancel { request_id: 9, .. })));
    }
}
