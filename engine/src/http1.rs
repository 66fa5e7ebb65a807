//! As much HTTP/1.1 as a key fetch and two protocol upgrades need: one request, a bounded reply head,
//! a bounded body.

use std::fmt;
use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

const MAX_HEAD_BYTES: usize = 16 << 10;
const MAX_HEADERS: usize = 64;
const MAX_BODY_BYTES: usize = 1 << 20;

/// A reply's head, and what the reader already had of the bytes behind it.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) rest: Vec<u8>,
}

impl Reply {
    /// First header of that name.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }
}

/// Sends `request` (a whole head, ending in an empty line) and reads the reply's head.
pub(crate) async fn exchange<S>(stream: &mut S, request: &str) -> io::Result<Reply>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    exchange_bytes(stream, request.as_bytes()).await
}

/// As [`exchange`], for a request with a body.
pub(crate) async fn exchange_bytes<S>(stream: &mut S, request: &[u8]) -> io::Result<Reply>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(request).await?;
    stream.flush().await?;
    let mut buffer = Vec::with_capacity(2048);
    loop {
        if let Some(reply) = parse_head(&buffer)? {
            return Ok(reply);
        }
        if buffer.len() >= MAX_HEAD_BYTES {
            return Err(bad("the reply's head is too long"));
        }
        if stream.read_buf(&mut buffer).await? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed without an answer"));
        }
    }
}

fn parse_head(buffer: &[u8]) -> io::Result<Option<Reply>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(buffer) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(bad(&format!("not an HTTP reply: {error}"))),
    };
    let headers = response
        .headers
        .iter()
        .map(|h| (h.name.to_owned(), String::from_utf8_lossy(h.value).trim().to_owned()))
        .collect();
    let status = response.code.unwrap_or(0);
    Ok(Some(Reply { status, headers, rest: buffer[length..].to_vec() }))
}

/// The body behind `reply`'s head, up to [`MAX_BODY_BYTES`].
pub(crate) async fn body<S>(stream: &mut S, reply: &mut Reply) -> io::Result<Vec<u8>>
where
    S: AsyncRead + Unpin,
{
    let mut raw = std::mem::take(&mut reply.rest);
    let chunked = reply.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked"));
    let length = reply.header("content-length").and_then(|v| v.parse::<usize>().ok());
    loop {
        match (chunked, length) {
            (true, _) => {
                if let Some(body) = unchunk(&raw)? {
                    return Ok(body);
                }
            }
            (false, Some(length)) if raw.len() >= length => {
                raw.truncate(length);
                return Ok(raw);
            }
            (false, _) => {}
        }
        if raw.len() >= MAX_BODY_BYTES {
            return Err(bad("the reply's body is too long"));
        }
        if stream.read_buf(&mut raw).await? == 0 {
            return match (chunked, length) {
                (false, None) => Ok(raw),
                _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the reply's body is cut off")),
            };
        }
    }
}

/// The decoded body once its last chunk is there.
fn unchunk(mut raw: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    loop {
        let (start, size) = match httparse::parse_chunk_size(raw) {
            Ok(httparse::Status::Complete(found)) => found,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => return Err(bad("the reply's body has a bad chunk")),
        };
        if size == 0 {
            return Ok(Some(body));
        }
        let size = usize::try_from(size).ok().filter(|s| *s <= MAX_BODY_BYTES);
        let size = size.ok_or_else(|| bad("the reply's body is too long"))?;
        let Some(chunk) = raw.get(start..start + size) else { return Ok(None) };
        body.extend_from_slice(chunk);
        raw = raw.get(start + size + 2..).unwrap_or_default();
    }
}

/// What the server sent is not HTTP, or over a bound.
#[derive(Debug)]
struct Malformed(String);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Malformed {}

/// Whether an error of this module is about what came, not about the connection.
pub(crate) fn is_malformed(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Malformed>())
}

fn bad(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Malformed(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn fetch(reply: &'static str) -> io::Result<(u16, Vec<u8>)> {
        let (mut client, mut server) = tokio::io::duplex(7);
        let server = tokio::spawn(async move {
            let mut request = vec![0; "GET / HTTP/1.1\r\n\r\n".len()];
            server.read_exact(&mut request).await.unwrap();
            server.write_all(reply.as_bytes()).await.unwrap();
        });
        let mut reply = exchange(&mut client, "GET / HTTP/1.1\r\n\r\n").await?;
        let body = body(&mut client, &mut reply).await;
        server.abort();
        Ok((reply.status, body?))
    }

    #[tokio::test]
    async fn bodies_by_length_by_chunks_and_to_the_end() {
        let by_length = fetch("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc").await.unwrap();
        assert_eq!(by_length, (200, b"abc".to_vec()));
        let chunks =
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\n\r\n";
        assert_eq!(fetch(chunks).await.unwrap(), (200, b"abc".to_vec()));
        assert_eq!(fetch("HTTP/1.0 404 No\r\n\r\nabc").await.unwrap(), (404, b"abc".to_vec()));
    }

    #[tokio::test]
    async fn torn_replies_are_errors() {
        for torn in [
            "",
            "HTTP/1.1 200",
            "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffff\r\nab",
            "SSH-2.0-OpenSSH\r\n\r\n",
        ] {
            assert!(fetch(torn).await.is_err(), "{torn:?}");
        }
    }

    #[test]
    fn fuzz_heads_and_chunks_never_panic() {
        use proptest::prelude::*;
        proptest!(|(bytes in proptest::collection::vec(any::<u8>(), 0..300))| {
            let _ = parse_head(&bytes);
            let _ = unchunk(&bytes);
        });
        proptest!(|(text in "[0-9a-f]{0,17}(;[a-z]{0,3})?\r\n.{0,20}")| { let _ = unchunk(text.as_bytes()); });
    }
}
