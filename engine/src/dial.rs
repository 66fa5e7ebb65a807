//! From a URL or a DERP node to a connected stream.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::resolve::Resolver;
use crate::tls::{Tls, Trust};

/// The next address gets its turn when one has not answered for this long.
const STAGGER: Duration = Duration::from_millis(250);
/// All addresses together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connected stream, TLS or not.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// What everything that dials shares.
#[derive(Debug, Clone)]
pub(crate) struct Dialer {
    pub(crate) resolver: Resolver,
    pub(crate) tls: Tls,
}

/// A control server's URL: scheme, host, port and a path prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ControlUrl {
    pub(crate) tls: bool,
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Without a trailing slash; mostly empty.
    pub(crate) prefix: String,
}

/// Why a control URL cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the control URL {url:?} cannot be used: {why}; it looks like https://headscale.example.com")]
pub(crate) struct BadUrl {
    url: String,
    why: String,
}

impl FromStr for ControlUrl {
    type Err = BadUrl;

    fn from_str(url: &str) -> Result<Self, BadUrl> {
        let bad = |why: &str| BadUrl { url: url.to_owned(), why: why.to_owned() };
        let uri: http::Uri = url.trim().parse().map_err(|_| bad("it is not a URL"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(bad("it must start with https:// or http://")),
        };
        let authority = uri.authority().ok_or_else(|| bad("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("it must hold no user name"));
        }
        if uri.query().is_some() {
            return Err(bad("it must hold no query"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(bad("it names no host"));
        }
        let port = match (authority.port(), tls) {
            (Some(port), _) => port.as_u16(),
            (None, true) => 443,
            (None, false) => 80,
        };
        let prefix = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { tls, host: host.to_owned(), port, prefix })
    }
}

impl fmt::Display for ControlUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.prefix)
    }
}

impl ControlUrl {
    /// `host:port` for a Host header.
    pub(crate) fn authority(&self) -> String {
        host_header(&self.host, self.port, if self.tls { 443 } else { 80 })
    }
}

/// `host[:port]`, the port only when it is not the scheme's own.
pub(crate) fn host_header(host: &str, port: u16, default_port: u16) -> String {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    if port == default_port { host } else { format!("{host}:{port}") }
}

impl Dialer {
    /// A stream to the control server.
    pub(crate) async fn control(&self, url: &ControlUrl) -> io::Result<Box<dyn Io>> {
        let addresses = self.resolver.lookup(&url.host).await.map_err(io::Error::other)?;
        let tcp = race(&addresses, url.port).await?;
        if !url.tls {
            return Ok(Box::new(tcp));
        }
        self.secure(tcp, &url.host, &Trust::Roots).await
    }

    /// TLS over `tcp` for the server called `name`.
    pub(crate) async fn secure(&self, tcp: TcpStream, name: &str, trust: &Trust) -> io::Result<Box<dyn Io>> {
        let config = self.tls.client(trust).map_err(io::Error::other)?;
        let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
        let handshake = tokio_rustls::TlsConnector::from(config).connect(name, tcp);
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, handshake)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long"))?;
        Ok(Box::new(stream.map_err(|e| io::Error::other(format!("TLS: {e}")))?))
    }
}

/// Connects to the first address that answers, each starting a little after the one before it.
pub(crate) async fn race(addresses: &[IpAddr], port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "no address to connect to");
    let mut attempts = FuturesUnordered::new();
    let mut waiting = addresses.iter();
    let deadline = tokio::time::sleep(CONNECT_TIMEOUT);
    tokio::pin!(deadline);
    loop {
        if let Some(address) = waiting.next() {
            attempts.push(connect(SocketAddr::new(*address, port)));
        } else if attempts.is_empty() {
            return Err(last);
        }
        let turn = tokio::time::sleep(STAGGER);
        tokio::select! {
            Some(result) = attempts.next() => match result {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            },
            () = turn, if waiting.len() > 0 => {}
            () = &mut deadline => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer on port {port} from {addresses:?}")));
            }
        }
    }
}

/// One TCP connection without Nagle's delay.
pub(crate) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)
        .await
        .map_err(|e| io::Error::new(e.kind(), format!("connect to {address}: {e}")))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let url = |text: &str| text.parse::<ControlUrl>();
        let ok = |tls, host: &str, port, prefix: &str| {
            Ok(ControlUrl { tls, host: host.into(), port, prefix: prefix.into() })
        };
        assert_eq!(url("https://control.test"), ok(true, "control.test", 443, ""));
        assert_eq!(url("http://control.test/"), ok(false, "control.test", 80, ""));
        assert_eq!(url("http://10.0.0.1:8080/hs/"), ok(false, "10.0.0.1", 8080, "/hs"));
        assert_eq!(url("https://[fd00::1]:8443"), ok(true, "fd00::1", 8443, ""));
        assert_eq!(url("https://[fd00::1]:8443").unwrap().authority(), "[fd00::1]:8443");
        for bad in ["", "control.test", "ftp://x", "https://", "https://a:b@c", "https://a/?q", "https://:80"]
        {
            assert!(url(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn race_goes_past_an_address_that_refuses() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let addresses = ["127.0.0.9".parse().unwrap(), "127.0.0.1".parse().unwrap()];
        let stream = race(&addresses, port).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap().ip(), addresses[1]);
        assert!(race(&addresses[..1], port).await.is_err());
        assert!(race(&[], port).await.is_err());
    }
}
