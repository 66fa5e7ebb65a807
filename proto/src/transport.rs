//! How the services travel: length-delimited bincode over a Unix stream socket.

use std::io;

use serde::{Deserialize, Serialize};
use tarpc::serde_transport::{Transport, new};
use tarpc::tokio_serde::formats::Bincode;
use tokio::net::UnixStream;
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
