//! From a URL or a DERP node to a connected stream.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use podtether_core::dial_plan::Attempt;
use podtether_proto::clock;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::control::wall_clock;
use crate::proxy::Proxy;
use crate::resolve::Resolver;
use crate::tls::{Tls, Trust};

/// The next address gets its turn when one has not answered for this long.
const STAGGER: Duration = Duration::from_millis(250);
/// TLS gets its turn when plain TCP has not led to a session for this long.
const TLS_DELAY: Duration = Duration::from_millis(500);
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
    pub(crate) proxy: Option<Arc<Proxy>>,
}

/// How a control session is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carriage {
    /// TCP to this port. Noise protects what is said.
    Plain(u16),
    /// TLS to this port.
    Tls(u16),
}

/// A control server's URL: scheme, host, port and a path prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ControlUrl {
    pub(crate) tls: bool,
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Whether the URL names the port, rather than leaving it to the scheme.
    pub(crate) explicit_port: bool,
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
        let explicit_port = authority.port().is_some();
        Ok(Self { tls, host: host.to_owned(), port, explicit_port, prefix })
    }
}

impl fmt::Display for ControlUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.prefix)
    }
}

impl ControlUrl {
    /// As the URL says.
    pub(crate) fn carriage(&self) -> Carriage {
        if self.tls { Carriage::Tls(self.port) } else { Carriage::Plain(self.port) }
    }

    /// The ways to try for a Noise session, each with its delay.
    ///
    /// The usual URL means port 80 without TLS, where nothing on the way breaks TLS open, then 443;
    /// `straight` leaves port 80 out. A port in the URL is the only one, but that a public host that is
    /// asked without TLS may be listening on 443 as well.
    pub(crate) fn carriages(&self, straight: bool) -> Vec<(Duration, Carriage)> {
        let own = (Duration::ZERO, self.carriage());
        match (self.tls, self.explicit_port) {
            (true, true) => vec![own],
            (true, false) if straight => vec![own],
            (true, false) => vec![(Duration::ZERO, Carriage::Plain(80)), (TLS_DELAY, own.1)],
            (false, _) if self.is_private() => vec![own],
            (false, _) => vec![own, (TLS_DELAY, Carriage::Tls(443))],
        }
    }

    /// Nobody but the operator can have put a server there: it is where the URL says or nowhere.
    fn is_private(&self) -> bool {
        match self.host.parse() {
            Ok(IpAddr::V4(ip)) => {
                let [a, b, ..] = ip.octets();
                ip.is_loopback() || ip.is_private() || ip.is_link_local() || (a == 100 && b & 0xc0 == 64)
            }
            Ok(IpAddr::V6(ip)) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
            Err(_) => {
                let name = self.host.trim_end_matches('.').to_ascii_lowercase();
                !name.contains('.') || [".local", ".internal", ".svc"].iter().any(|end| name.ends_with(end))
            }
        }
    }

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
    /// A stream to the control server. `plan` holds addresses that the server itself has named; DNS is
    /// asked when none of them answers.
    pub(crate) async fn control(
        &self,
        url: &ControlUrl,
        carriage: Carriage,
        plan: &[Attempt],
    ) -> io::Result<Box<dyn Io>> {
        let (port, tls) = match carriage {
            Carriage::Plain(port) => (port, false),
            Carriage::Tls(port) => (port, true),
        };
        let tcp = match self.proxy_for(&url.host, port).filter(|_| tls) {
            Some(proxy) => proxy.connect(&self.resolver, &url.host, port).await?,
            None => match planned(plan, port).await {
                Some(tcp) => tcp,
                None => {
                    let addresses = self.resolver.lookup(&url.host).await.map_err(io::Error::other)?;
                    race(&addresses, port).await?
                }
            },
        };
        if tls { self.secure(tcp, &url.host, &Trust::Roots).await } else { Ok(Box::new(tcp)) }
    }

    /// The proxy that TLS connections to `host` go through.
    pub(crate) fn proxy_for(&self, host: &str, port: u16) -> Option<&Proxy> {
        self.proxy.as_deref().filter(|proxy| proxy.applies(host, port))
    }

    /// TLS over `tcp` for the server called `name`.
    pub(crate) async fn secure(&self, tcp: TcpStream, name: &str, trust: &Trust) -> io::Result<Box<dyn Io>> {
        let config = self.tls.client(trust).map_err(io::Error::other)?;
        let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
        let handshake = tokio_rustls::TlsConnector::from(config).connect(name, tcp);
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, handshake)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long"))?;
        let failed = |e| io::Error::other(clock::blamed(format!("TLS: {e}"), wall_clock()));
        Ok(Box::new(stream.map_err(failed)?))
    }
}

/// The first attempt that succeeds. Each begins at its own time, counted from now, or as soon as nothing
/// else is under way; the others end with it.
pub(crate) async fn first_of<T, E, F>(attempts: Vec<(Duration, F)>) -> Result<T, Vec<E>>
where
    F: Future<Output = Result<T, E>>,
{
    let began = tokio::time::Instant::now();
    let mut waiting = attempts.into_iter().peekable();
    let mut running = FuturesUnordered::new();
    let mut errors = Vec::new();
    loop {
        if running.is_empty() {
            match waiting.next() {
                Some((_, attempt)) => running.push(attempt),
                None => return Err(errors),
            }
        }
        let next = waiting.peek().map(|(delay, _)| began + *delay);
        tokio::select! {
            Some(result) = running.next() => match result {
                Ok(done) => return Ok(done),
                Err(error) => errors.push(error),
            },
            () = tokio::time::sleep_until(next.unwrap_or(began)), if next.is_some() => {
                running.extend(waiting.next().map(|(_, attempt)| attempt));
            }
        }
    }
}

/// Connects to the first address that answers: the families in turn, each a little after the one before.
pub(crate) async fn race(addresses: &[IpAddr], port: u16) -> io::Result<TcpStream> {
    let mut delay = Duration::ZERO;
    let attempts = in_turn(addresses).into_iter().map(|address| {
        let begin = delay;
        delay += STAGGER;
        (begin, connect(SocketAddr::new(address, port)))
    });
    match tokio::time::timeout(CONNECT_TIMEOUT, first_of(attempts.collect())).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(mut errors)) => Err(errors
            .pop()
            .unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no address to connect to"))),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer on port {port} from {addresses:?}"),
        )),
    }
}

/// One address of each family after the other, so that a family that does not work costs one delay.
fn in_turn(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let first_is_v4 = addresses.first().is_some_and(IpAddr::is_ipv4);
    let (same, other): (Vec<IpAddr>, Vec<IpAddr>) =
        addresses.iter().partition(|address| address.is_ipv4() == first_is_v4);
    let mut merged = Vec::with_capacity(addresses.len());
    let (mut same, mut other) = (same.into_iter(), other.into_iter());
    loop {
        let pair = [same.next(), other.next()];
        if pair == [None, None] {
            return merged;
        }
        merged.extend(pair.into_iter().flatten());
    }
}

/// The first address of a dial plan that accepts a connection.
async fn planned(plan: &[Attempt], port: u16) -> Option<TcpStream> {
    let attempts = plan.iter().map(|attempt| {
        let connecting = connect(SocketAddr::new(attempt.ip, port));
        let limit = attempt.timeout;
        let within = async move {
            tokio::time::timeout(limit, connecting)
                .await
                .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
        };
        (attempt.delay, within)
    });
    match first_of(attempts.collect()).await {
        Ok(stream) => Some(stream),
        Err(errors) => {
            if !errors.is_empty() {
                tracing::debug!(?errors, "no address of the dial plan answers; asking DNS");
            }
            None
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
            let explicit_port = !matches!(port, 80 | 443);
            Ok(ControlUrl { tls, host: host.into(), port, explicit_port, prefix: prefix.into() })
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

    #[test]
    fn ways_to_a_noise_session() {
        use Carriage::{Plain, Tls};
        let table: &[(&str, bool, &[Carriage])] = &[
            ("https://controlplane.tailscale.com", false, &[Plain(80), Tls(443)]),
            ("https://controlplane.tailscale.com", true, &[Tls(443)]),
            ("https://controlplane.tailscale.com:443", false, &[Tls(443)]),
            ("https://headscale.example:8443", false, &[Tls(8443)]),
            ("http://headscale.example", false, &[Plain(80), Tls(443)]),
            ("http://headscale.example:8080", false, &[Plain(8080), Tls(443)]),
            ("http://10.1.2.3:8080", false, &[Plain(8080)]),
            ("http://192.168.1.1", false, &[Plain(80)]),
            ("http://100.64.0.1:80", false, &[Plain(80)]),
            ("http://127.0.0.1:1", false, &[Plain(1)]),
            ("http://[::1]:1", false, &[Plain(1)]),
            ("http://[fd00::1]:1", false, &[Plain(1)]),
            ("http://192.0.2.1:1", false, &[Plain(1), Tls(443)]),
            ("http://localhost:1", false, &[Plain(1)]),
            ("http://headscale:1", false, &[Plain(1)]),
            ("http://headscale.headscale.svc:1", false, &[Plain(1)]),
        ];
        for (url, straight, expected) in table {
            let ways = url.parse::<ControlUrl>().unwrap().carriages(*straight);
            assert_eq!(ways.iter().map(|way| way.1).collect::<Vec<_>>(), *expected, "{url}");
            assert!(ways[0].0.is_zero() && ways.iter().skip(1).all(|way| way.0 == TLS_DELAY));
        }
    }

    #[test]
    fn families_take_turns() {
        let ips = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<IpAddr>>();
        let table: [(&[&str], &[&str]); 4] = [
            (&["1.0.0.1", "1.0.0.2", "::1", "::2"], &["1.0.0.1", "::1", "1.0.0.2", "::2"]),
            (&["::1", "::2", "::3", "1.0.0.1"], &["::1", "1.0.0.1", "::2", "::3"]),
            (&["1.0.0.1"], &["1.0.0.1"]),
            (&[], &[]),
        ];
        for (addresses, expected) in table {
            assert_eq!(in_turn(&ips(addresses)), ips(expected));
        }
    }

    #[tokio::test]
    async fn attempts_begin_at_their_time_or_when_nothing_else_runs() {
        let ms = Duration::from_millis;
        let began = tokio::time::Instant::now();
        let attempt = |takes: u64, outcome: Result<u8, u8>| async move {
            tokio::time::sleep(ms(takes)).await;
            outcome
        };
        // A dead one costs its successor's delay, not its own time-out.
        let first = first_of(vec![(ms(0), attempt(60_000, Err(1))), (ms(100), attempt(10, Ok(2)))]).await;
        assert_eq!(first, Ok(2));
        assert!(began.elapsed() >= ms(110), "not before its time");
        // One that fails costs nothing more.
        let first = first_of(vec![(ms(0), attempt(1, Err(1))), (ms(600_000), attempt(1, Ok(2)))]).await;
        assert_eq!(first, Ok(2));
        assert!(began.elapsed() < ms(50_000));
        let all = first_of(vec![(ms(0), attempt(1, Err(1))), (ms(0), attempt(2, Err::<u8, u8>(2)))]).await;
        assert_eq!(all, Err(vec![1, 2]));
        assert_eq!(first_of(Vec::<(Duration, std::future::Ready<Result<u8, u8>>)>::new()).await, Err(vec![]));
    }

    #[tokio::test]
    async fn a_dial_plan_is_tried_and_its_failure_is_no_error() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let attempt = |ip: &str| Attempt {
            ip: ip.parse().unwrap(),
            delay: Duration::ZERO,
            timeout: Duration::from_secs(2),
        };
        let tcp = planned(&[attempt("127.0.0.9"), attempt("127.0.0.1")], port).await.unwrap();
        assert_eq!(tcp.peer_addr().unwrap().ip().to_string(), "127.0.0.1");
        assert!(planned(&[attempt("127.0.0.9")], port).await.is_none());
        assert!(planned(&[], port).await.is_none());
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
