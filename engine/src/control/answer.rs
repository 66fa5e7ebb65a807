//! What control asked for, on its way back.

use std::net::IpAddr;
use std::time::Duration;

use http::{Method, Uri};
use podtether_core::engine::ControlAnswer;
use tokio::task::JoinSet;

use super::session::Session;
use crate::dial::{ControlUrl, Dialer};
use crate::http1;

const TIMEOUT: Duration = Duration::from_secs(15);
/// Answers under way at a time.
const MAX_RUNNING: usize = 4;
const MAX_PATH: usize = 2048;

/// Sends the answers of one session; they end with it.
pub(super) struct Answers {
    session: Session,
    dialer: Dialer,
    running: JoinSet<()>,
}

impl Answers {
    pub(super) fn new(session: Session, dialer: Dialer) -> Self {
        Self { session, dialer, running: JoinSet::new() }
    }

    /// Too many at once are dropped, which control sees as no answer.
    pub(super) fn send(&mut self, answer: ControlAnswer) {
        while self.running.try_join_next().is_some() {}
        if self.running.len() >= MAX_RUNNING {
            tracing::debug!("too many answers to control at once");
            return;
        }
        let (session, dialer) = (self.session.clone(), self.dialer.clone());
        self.running.spawn(async move {
            match tokio::time::timeout(TIMEOUT, deliver(&session, &dialer, answer)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "an answer to control failed"),
                Err(_) => tracing::debug!("an answer to control timed out"),
            }
        });
    }
}

async fn deliver(session: &Session, dialer: &Dialer, answer: ControlAnswer) -> anyhow::Result<()> {
    let uri: Uri = answer.url.parse()?;
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    anyhow::ensure!(path.len() <= MAX_PATH, "the URL's path is too long");
    let method = if answer.body.is_some() { Method::POST } else { Method::HEAD };
    let body = answer.body.unwrap_or_default();
    if answer.over_session {
        session.request(method, path, body.into()).await?;
        return Ok(());
    }
    anyhow::ensure!(permitted(session.url(), &uri), "{} is not the control server's", answer.url);
    let base =
        format!("{}://{}", uri.scheme_str().unwrap_or_default(), uri.authority().map_or("", |a| a.as_str()));
    let base: ControlUrl = base.parse()?;
    let mut stream = dialer.control(&base, base.carriage(), &[]).await?;
    let mut request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {}\r\nUser-Agent: podtether\r\nConnection: close\r\n",
        base.authority()
    );
    if method == Method::POST {
        request += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    }
    request += "\r\n";
    http1::exchange_bytes(&mut stream, &[request.as_bytes(), &body].concat()).await?;
    Ok(())
}

/// Whether control may have an answer sent there outside its session.
///
/// A pod's engine sits inside a network that the control server does not see: it must not become that
/// server's way to ask hosts there for something. So the answer goes to the host of the control URL, or
/// to a name beside it in the same domain, on the usual ports.
fn permitted(control: &ControlUrl, uri: &Uri) -> bool {
    let Some(host) = uri.host().map(|host| host.trim_start_matches('[').trim_end_matches(']')) else {
        return false;
    };
    let schemes = matches!(uri.scheme_str(), Some("http" | "https"));
    if !schemes || uri.authority().is_some_and(|a| a.as_str().contains('@')) {
        return false;
    }
    let lower = |name: &str| name.trim_end_matches('.').to_ascii_lowercase();
    let (host, own) = (lower(host), lower(&control.host));
    if host == own {
        return true;
    }
    let is_ip = |name: &str| name.parse::<IpAddr>().is_ok();
    let usual = matches!(uri.port_u16(), None | Some(80 | 443));
    let parent = |name: &str| name.split_once('.').map(|(_, parent)| parent.to_owned());
    let beside = parent(&host).filter(|domain| domain.contains('.')) == parent(&own);
    usual && !is_ip(&host) && !is_ip(&own) && beside
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_go_to_the_control_server_and_its_neighbours_alone() {
        let table = [
            ("https://controlplane.tailscale.com", "https://controlplane.tailscale.com/x?y", true),
            ("https://controlplane.tailscale.com", "https://login.tailscale.com/x", true),
            ("https://controlplane.tailscale.com", "https://LOGIN.tailscale.com.:443/x", true),
            ("https://controlplane.tailscale.com", "https://login.tailscale.com:22/x", false),
            ("https://controlplane.tailscale.com", "https://evil.example.com/x", false),
            ("https://controlplane.tailscale.com", "http://169.254.169.254/latest/meta-data", false),
            ("https://controlplane.tailscale.com", "http://10.0.0.1/", false),
            ("https://controlplane.tailscale.com", "http://metadata.google.internal/", false),
            ("https://controlplane.tailscale.com", "https://u:p@controlplane.tailscale.com/x", false),
            ("https://controlplane.tailscale.com", "ftp://controlplane.tailscale.com/x", false),
            ("https://controlplane.tailscale.com", "/x", false),
            // Two names below one top-level domain have nothing in common.
            ("https://headscale.example", "https://metadata.example/", false),
            ("https://hs.corp.example", "https://other.corp.example/", true),
            ("http://10.0.0.1:8080", "http://10.0.0.1:9090/x", true),
            ("http://10.0.0.1:8080", "http://10.0.0.2:8080/x", false),
            ("http://[fd00::1]:8080", "http://[fd00::1]/x", true),
            ("http://10.0.0.1:8080", "http://a.0.0.1/x", false),
        ];
        for (control, url, expected) in table {
            let control: ControlUrl = control.parse().unwrap();
            assert_eq!(permitted(&control, &url.parse().unwrap()), expected, "{control} {url}");
        }
    }
}
