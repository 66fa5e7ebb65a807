//! The HTTP proxy that a node may need to reach the outside: `CONNECT` for TLS connections, and which
//! hosts are reached without it.

use std::io;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use podtether_proto::engine::ProxySettings;
use tokio::net::TcpStream;
use zeroize::Zeroizing;

use crate::dial::{host_header, race};
use crate::http1;
use crate::resolve::Resolver;

/// Entries of a bypass list that are looked at.
const MAX_ENTRIES: usize = 256;

/// Where the proxy is and when it is asked. Its credentials never print.
pub(crate) struct Proxy {
    host: String,
    port: u16,
    authorization: Option<Zeroizing<String>>,
    bypass: Bypass,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Proxy({})", host_header(&self.host, self.port, 80))
    }
}

impl Proxy {
    /// Reads the settings; what is wrong is one sentence without credentials.
    pub(crate) fn new(settings: &ProxySettings) -> Result<Self, String> {
        let bad =
            |why: &str| format!("the proxy URL {why}; it looks like http://user:password@proxy.example:3128");
        let text = settings.url.expose().trim();
        let uri: http::Uri = text.parse().map_err(|_| bad("is not a URL"))?;
        if uri.scheme_str() != Some("http") {
            return Err(bad("does not start with http://, the only kind of proxy that is supported"));
        }
        let authority =
            uri.authority().filter(|a| !a.host().is_empty()).ok_or_else(|| bad("names no host"))?;
        let authorization = match authority.as_str().rsplit_once('@') {
            None => None,
            Some((credentials, _)) => {
                let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
                let decoded =
                    |text| percent_decoded(text).ok_or_else(|| bad("has a bad %XX in its credentials"));
                let plain = Zeroizing::new(format!("{}:{}", *decoded(user)?, *decoded(password)?));
                Some(Zeroizing::new(format!("Basic {}", STANDARD.encode(plain.as_bytes()))))
            }
        };
        Ok(Self {
            host: bare(authority.host()).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            authorization,
            bypass: Bypass::parse(&settings.bypass),
        })
    }

    /// The port it listens on.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Whether a TLS connection to `host` goes through the proxy.
    pub(crate) fn applies(&self, host: &str, port: u16) -> bool {
        !self.bypass.covers(host, port)
    }

    /// A connection to `host`, whose name the proxy resolves.
    pub(crate) async fn connect(&self, resolver: &Resolver, host: &str, port: u16) -> io::Result<TcpStream> {
        let place = format!("the proxy {}", host_header(&self.host, self.port, 80));
        let failed = |error: io::Error| io::Error::new(error.kind(), format!("{place}: {error}"));
        let addresses = resolver.lookup(&self.host).await.map_err(io::Error::other).map_err(failed)?;
        let mut stream = race(&addresses, self.port).await.map_err(failed)?;
        // Always with the port, unlike a Host header.
        let target = host_header(host, port, 0);
        let authorization = self
            .authorization
            .as_ref()
            .map(|value| Zeroizing::new(format!("Proxy-Authorization: {}\r\n", **value)));
        let request = Zeroizing::new(format!(
            "CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: podtether\r\n{}\r\n",
            authorization.as_ref().map_or("", |line| line.as_str())
        ));
        let reply = http1::exchange(&mut stream, &request).await.map_err(failed)?;
        match reply.status {
            // A TLS server does not speak first.
            200..300 if reply.rest.is_empty() => Ok(stream),
            200..300 => Err(failed(io::Error::other("something else than the proxy answered"))),
            407 => Err(failed(io::Error::other("it wants other credentials (HTTP 407)"))),
            status => Err(failed(io::Error::other(format!("it answered HTTP {status} to CONNECT {target}")))),
        }
    }
}

fn percent_decoded(text: &str) -> Option<Zeroizing<String>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digit = |byte: Option<u8>| char::from(byte?).to_digit(16).and_then(|d| u8::try_from(d).ok());
            bytes.push(digit(rest.next())? << 4 | digit(rest.next())?);
        } else {
            bytes.push(byte);
        }
    }
    std::str::from_utf8(&bytes).ok().map(|text| Zeroizing::new(text.to_owned()))
}

/// Without the brackets of an IPv6 address.
fn bare(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
}

/// What `NO_PROXY` says, in the dialect of Go programs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Bypass {
    all: bool,
    entries: Vec<(Entry, Option<u16>)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Net(IpNet),
    /// The domain and what is below it.
    Domain(String),
    /// Only what is below it.
    Below(String),
}

impl Bypass {
    fn parse(list: &str) -> Self {
        let mut bypass = Self::default();
        for text in list.split(',').map(|text| text.trim().to_ascii_lowercase()).take(MAX_ENTRIES) {
            if text.is_empty() {
                continue;
            }
            if text == "*" {
                bypass.all = true;
                continue;
            }
            let net = text.parse().ok().or_else(|| text.parse().ok().map(|ip: IpAddr| ip.into()));
            let (entry, port) = match net {
                Some(net) => (Entry::Net(net), None),
                None => {
                    let (host, port) = match text.rsplit_once(':') {
                        Some((host, port)) => (host, port.parse().ok()),
                        None => (text.as_str(), None),
                    };
                    let entry = match bare(host).parse::<IpAddr>() {
                        Ok(ip) => Entry::Net(ip.into()),
                        Err(_) => match host.strip_prefix("*.").or_else(|| host.strip_prefix('.')) {
                            Some(domain) => Entry::Below(domain.to_owned()),
                            None => Entry::Domain(host.to_owned()),
                        },
                    };
                    (entry, port)
                }
            };
            bypass.entries.push((entry, port));
        }
        bypass
    }

    fn covers(&self, host: &str, port: u16) -> bool {
        let host = bare(host).trim_end_matches('.').to_ascii_lowercase();
        let ip: Option<IpAddr> = host.parse().ok();
        if self.all || host == "localhost" || ip.is_some_and(|ip| ip.is_loopback()) {
            return true;
        }
        let below = |domain: &str| host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'));
        self.entries.iter().any(|(entry, only)| {
            only.is_none_or(|only| only == port)
                && match entry {
                    Entry::Net(net) => ip.is_some_and(|ip| net.contains(&ip)),
                    Entry::Domain(domain) => host == *domain || below(domain),
                    Entry::Below(domain) => below(domain),
                }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podtether_proto::secret::SecretString;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    fn settings(url: &str, bypass: &str) -> ProxySettings {
        ProxySettings { url: SecretString::new(url.to_owned()), bypass: bypass.to_owned() }
    }

    #[test]
    fn who_is_reached_without_the_proxy() {
        let list = "internal.example, .below.example,*.star.example,10.0.0.0/8,192.0.2.7,fd00::/8,\
                    only.example:8443,[2001:db8::1]:443,,bad:port";
        let bypass = Bypass::parse(list);
        for (host, port, covered) in [
            ("localhost", 443, true),
            ("127.0.0.1", 443, true),
            ("::1", 443, true),
            ("internal.example", 443, true),
            ("INTERNAL.example.", 443, true),
            ("a.internal.example", 443, true),
            ("notinternal.example", 443, false),
            ("below.example", 443, false),
            ("a.below.example", 443, true),
            ("star.example", 443, false),
            ("a.star.example", 443, true),
            ("10.1.2.3", 443, true),
            ("11.1.2.3", 443, false),
            ("192.0.2.7", 443, true),
            ("192.0.2.8", 443, false),
            ("fd00::1", 443, true),
            ("[fd00::1]", 443, true),
            ("only.example", 8443, true),
            ("only.example", 443, false),
            ("2001:db8::1", 443, true),
            ("2001:db8::1", 444, false),
            ("controlplane.tailscale.com", 443, false),
        ] {
            assert_eq!(bypass.covers(host, port), covered, "{host}:{port}");
        }
        assert!(Bypass::parse("x, *").covers("anything.example", 1));
        assert!(!Bypass::parse("").covers("anything.example", 1));
    }

    #[test]
    fn urls_are_read_and_credentials_never_print() {
        let proxy = Proxy::new(&settings("http://us%40er:p%3Ass@[fd00::5]:3128", "")).unwrap();
        assert_eq!((proxy.host.as_str(), proxy.port), ("fd00::5", 3128));
        assert_eq!(*proxy.authorization.clone().unwrap(), format!("Basic {}", STANDARD.encode("us@er:p:ss")));
        assert_eq!(format!("{proxy:?}"), "Proxy([fd00::5]:3128)");
        let plain = Proxy::new(&settings("http://proxy.example", "")).unwrap();
        assert_eq!((plain.port, plain.authorization.is_none()), (80, true));
        for bad in
            ["", "proxy:3128", "https://proxy", "socks5://u:sesame@p", "http://", "http://u:sesame%4@p"]
        {
            let error = Proxy::new(&settings(bad, "")).unwrap_err();
            assert!(error.contains("http://user") && !error.contains("sesame"), "{bad}: {error}");
        }
    }

    #[tokio::test]
    async fn connect_asks_once_and_says_what_is_wrong() {
        for (reply, expected) in [
            ("HTTP/1.1 200 Connection established\r\n\r\n", Ok(())),
            ("HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n", Err("407")),
            ("HTTP/1.1 502 Bad Gateway\r\n\r\n", Err("HTTP 502 to CONNECT control.test:443")),
            ("HTTP/1.1 200 OK\r\n\r\n<html>", Err("something else")),
            ("", Err("closed")),
        ] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let server = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    assert!(stream.read_buf(&mut request).await.unwrap() > 0);
                }
                stream.write_all(reply.as_bytes()).await.unwrap();
                String::from_utf8(request).unwrap()
            });
            let proxy = Proxy::new(&settings(&format!("http://u:sesame@127.0.0.1:{port}"), "")).unwrap();
            let outcome = proxy.connect(&Resolver::default(), "control.test", 443).await;
            let request = server.await.unwrap();
            let expected_head = "CONNECT control.test:443 HTTP/1.1\r\nHost: control.test:443\r\n";
            assert!(request.starts_with(expected_head), "{request}");
            assert!(
                request
                    .contains(&format!("\r\nProxy-Authorization: Basic {}\r\n", STANDARD.encode("u:sesame")))
            );
            match (outcome, expected) {
                (Ok(_), Ok(())) => {}
                (Err(error), Err(says)) => {
                    let error = error.to_string();
                    assert!(error.contains(says) && !error.contains("sesame"), "{error}");
                }
                (outcome, _) => panic!("{reply:?}: {outcome:?}"),
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn fuzz_lists_and_urls(list in ".{0,60}", url in ".{0,40}", host in "[a-z.:\\[\\]0-9]{0,20}") {
            let _ = Bypass::parse(&list).covers(&host, 443);
            let _ = Proxy::new(&settings(&url, &list));
        }
    }
}
