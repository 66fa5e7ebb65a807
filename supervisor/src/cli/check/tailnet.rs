//! The tailnet from here: control, its clock, the credential and its tags, UDP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use podtether_core::stun;
use tokio::net::UdpSocket;

use super::Found;
use crate::config::{Credentials, Tailnet};
use crate::credentials::{self, Credential, CredentialError, Roots, Wish};

/// How long control, or the API, may take.
const WITHIN: Duration = Duration::from_secs(10);
/// A clock that is further off breaks certificates and WireGuard's protection against replays.
const CLOCK_FAIL: u64 = 300;
const CLOCK_WARN: u64 = 30;
/// STUN requests that are sent, and how far apart.
const TRIES: u32 = 4;
const TRY_EVERY: Duration = Duration::from_millis(500);
/// What a key that is only tried is called where the API shows one.
const TRIED: &str = "podtether-check";

pub(super) async fn all(name: &str, tailnet: &Tailnet) -> Vec<Found> {
    let roots = match Roots::new(tailnet.ca_file.as_deref()) {
        Ok(roots) => Arc::new(roots),
        Err(e) => {
            return vec![Found::fail(format!("tailnet.{name}.ca_file: {e}"), "put the right PEM file there")];
        }
    };
    let mut found = control(name, tailnet, &roots).await;
    found.push(credential(name, tailnet, &roots).await);
    found
}

async fn control(name: &str, tailnet: &Tailnet, roots: &Roots) -> Vec<Found> {
    let url = tailnet.control_url.trim_end_matches('/');
    let answer = async {
        let client = credentials::client(&roots.now().1)?;
        // The capability version is that of the engine's own request; any is answered.
        let request = client.get(format!("{url}/key?v=113")).timeout(WITHIN).send();
        request.await.map_err(|e| credentials::say(&e))
    };
    match answer.await {
        Err(e) => vec![Found::fail(
            format!("control does not answer: {e}"),
            format!(
                "does tailnet.{name}.control_url ({url}) resolve and open from this node? A proxy goes in HTTPS_PROXY"
            ),
        )],
        Ok(response) if !response.status().is_success() => vec![Found::fail(
            format!("{url} answers {} to a request for its key", response.status()),
            format!("is tailnet.{name}.control_url a control server, without a path?"),
        )],
        Ok(response) => {
            let date = response.headers().get(reqwest::header::DATE).and_then(|date| date.to_str().ok());
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            vec![Found::ok(format!("control answers at {url}")), clock(date, now)]
        }
    }
}

/// `Date` of an answer against this node's clock.
fn clock(date: Option<&str>, now_unix_s: u64) -> Found {
    let Some(there) = date.and_then(unix_s) else {
        return Found::skip("control tells no time", "");
    };
    let off = there.abs_diff(now_unix_s);
    let side = if there > now_unix_s { "behind" } else { "ahead of" };
    let fix = "set it, and let NTP (chrony, systemd-timesyncd) keep it";
    match off {
        CLOCK_FAIL.. => Found::fail(format!("this node's clock is {off} s {side} control's"), fix),
        CLOCK_WARN.. => Found::warn(format!("this node's clock is {off} s {side} control's"), fix),
        _ => Found::ok("the clock agrees with control's"),
    }
}

/// An HTTP date (RFC 9110, 5.6.7) in the form that servers send: `Sun, 06 Nov 1994 08:49:37 GMT`.
fn unix_s(date: &str) -> Option<u64> {
    let mut words = date.split_once(", ")?.1.split(' ');
    let day: u64 = words.next()?.parse().ok()?;
    let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let month = words.next()?;
    let month = u64::try_from(months.iter().position(|name| *name == month)?).ok()? + 1;
    let year: u64 = words.next()?.parse().ok().filter(|year| (1970..3000).contains(year))?;
    let mut time = words.next()?.split(':').map(str::parse::<u64>);
    let (h, m, s) = (time.next()?.ok()?, time.next()?.ok()?, time.next()?.ok()?);
    // The days of a date as in Howard Hinnant's "chrono-compatible low-level date algorithms".
    let year = year - u64::from(month <= 2);
    let (era, yoe) = (year / 400, year % 400);
    let doy = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = (era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy).checked_sub(719_468)?;
    Some(days * 86_400 + h * 3600 + m * 60 + s)
}

/// Mints a key with the configured tags, and deletes it.
async fn credential(name: &str, tailnet: &Tailnet, roots: &Arc<Roots>) -> Found {
    let key = format!("tailnet.{name}.credentials");
    match &tailnet.credentials {
        Credentials::Interactive => {
            return Found::skip(
                "no credentials: a person logs each pod in",
                "with an OAuth client nobody has to",
            );
        }
        Credentials::AuthKey { key: source } => {
            return match source.read() {
                Ok(_) => Found::skip("an auth key, which cannot be tried without using it", ""),
                Err(e) => Found::fail(format!("{key}.auth_key_file: {e}"), "put the key there"),
            };
        }
        Credentials::OAuth { .. } | Credentials::Headscale { .. } => {}
    }
    let deadline = Instant::now() + WITHIN;
    let tags = tailnet.tags.join(" ");
    let wish = Wish { hostname: TRIED, tags: &tailnet.tags, ephemeral: tailnet.ephemeral };
    let minted = match Credential::new(tailnet, roots) {
        Ok(credential) => credential.mint(wish, deadline).await.map(|minted| (credential, minted)),
        Err(e) => Err(CredentialError::Refused(e)),
    };
    match minted {
        Ok((credential, minted)) => {
            let deleted = match &minted.id {
                Some(id) => credential.delete_key(id, Instant::now() + WITHIN).await,
                None => Ok(()),
            };
            match deleted {
                Ok(()) => Found::ok(format!("a key for {tags} was minted, and deleted")),
                Err(e) => Found::warn(
                    format!("a key for {tags} was minted, but not deleted: {e}"),
                    "it expires by itself; the credential needs the scope auth_keys to delete keys",
                ),
            }
        }
        Err(CredentialError::Temporary(e)) => {
            Found::fail(e, format!("does the api_url of {key} answer from this node?"))
        }
        Err(CredentialError::Refused(e)) => Found::fail(
            e,
            format!(
                "look at {key} and tailnet.{name}.tags: the credential has to own each tag (tagOwners in the policy)"
            ),
        ),
    }
}

/// Asks a STUN server.
pub(super) async fn udp(server: Option<&str>) -> Found {
    let Some(server) = server else {
        return Found::skip(
            "UDP was not tried: no pod runs whose engine has a relay map",
            "name a server: --stun HOST:3478 (derp1.tailscale.com:3478, or your DERP server's)",
        );
    };
    match ask(server).await {
        Ok(seen) => Found::ok(format!("UDP gets out: {server} sees this node as {seen}")),
        Err(e) => Found::fail(
            format!("no answer over UDP from {server}: {e}"),
            "allow UDP out, to 3478 (STUN) and to any port (peers); without, all traffic goes through relays",
        ),
    }
}

async fn ask(server: &str) -> Result<SocketAddr, String> {
    let mut servers = tokio::net::lookup_host(server).await.map_err(|e| e.to_string())?;
    let server = servers.next().ok_or("it has no address")?;
    let any: SocketAddr = if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await.map_err(|e| e.to_string())?;
    socket.connect(server).await.map_err(|e| e.to_string())?;
    let mut tx = [0; 12];
    getrandom::fill(&mut tx).map_err(|e| e.to_string())?;
    for _ in 0..TRIES {
        socket.send(&stun::request(&tx)).await.map_err(|e| e.to_string())?;
        let mut buffer = [0; 1500];
        let until = tokio::time::Instant::now() + TRY_EVERY;
        while let Ok(received) = tokio::time::timeout_at(until, socket.recv(&mut buffer)).await {
            let datagram = buffer.get(..received.map_err(|e| e.to_string())?).unwrap_or_default();
            match stun::parse_response(datagram) {
                Ok((of, seen)) if of == tx => return Ok(seen),
                Ok(_) | Err(_) => {}
            }
        }
    }
    Err("nothing came back".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::Grade;
    use super::*;

    #[test]
    fn clocks() {
        assert_eq!(unix_s("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(unix_s("Thu, 29 Feb 2024 00:00:00 GMT"), Some(1_709_164_800));
        for bad in ["", "Sun, 06 Nov", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun, 06 Xyz 1994 08:49:37 GMT"] {
            assert_eq!(unix_s(bad), None, "{bad}");
        }
        let at = |off: i64| {
            clock(Some("Sun, 06 Nov 1994 08:49:37 GMT"), 784_111_777_u64.saturating_add_signed(off)).0
        };
        assert_eq!([0, 29, -29].map(at), [Grade::Ok; 3]);
        assert_eq!([30, -299].map(at), [Grade::Warn; 2]);
        assert_eq!([300, -86_400].map(at), [Grade::Fail; 2]);
        assert_eq!(clock(None, 0).0, Grade::Skip);
    }

    #[tokio::test]
    async fn udp_is_tried_with_a_server_that_is_named() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = server.local_addr().unwrap().to_string();
        let answering = tokio::spawn(async move {
            let mut buffer = [0; 1500];
            // The first request is lost.
            server.recv_from(&mut buffer).await.unwrap();
            let (n, from) = server.recv_from(&mut buffer).await.unwrap();
            let tx = stun::parse_request(&buffer[..n]).unwrap();
            server.send_to(b"noise", from).await.unwrap();
            server.send_to(&stun::response(&tx, from), from).await.unwrap();
        });
        let found = udp(Some(&at)).await;
        assert!(found.0 == Grade::Ok && found.1.contains("127.0.0.1:"), "{}", found.1);
        answering.await.unwrap();
        assert_eq!(udp(None).await.0, Grade::Skip);
        assert_eq!(udp(Some("127.0.0.1:1")).await.0, Grade::Fail);
    }
}
