//! From a control URL to an HTTP/2 session over Noise.

use std::io;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use podtether_core::dial_plan::{self, Attempt};
use podtether_core::key::MachinePublic;
use podtether_core::noise::{ClientHandshake, EarlyPayload, RecordReader};
use podtether_core::tailcfg::{CAPABILITY_VERSION, ControlDialPlan, ServerKeys};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::task::JoinSet;

use super::noise_stream::NoiseStream;
use super::session::Session;
use super::{Failure, Identity, Steps};
use crate::dial::{Carriage, ControlUrl, Dialer, Io, first_of, host_header};
use crate::http1;
use crate::refused::Refused;

/// From the first packet to the HTTP/2 session.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
const UPGRADE: &str = "tailscale-control-protocol";
/// HTTP/2 flow control: bounds what a server can make us hold.
const WINDOW_BYTES: u32 = 64 << 10;

/// After a session began there, 443 is asked at once: port 80 led nowhere, or the network changed.
const STRAIGHT_FOR: Duration = Duration::from_secs(120);

/// What is known about the way to the server.
#[derive(Debug, Default)]
pub(super) struct Way {
    /// From the last `/key`; forgotten when a handshake fails, in case the server has a new one.
    server_key: Option<MachinePublic>,
    /// What the server said about its other addresses.
    pub(super) plan: ControlDialPlan,
    /// The plan led nowhere the last time: DNS has its turn.
    plan_failed: bool,
    last_dial: Option<Instant>,
}

impl Way {
    pub(super) fn new(plan: ControlDialPlan) -> Self {
        Self { plan, ..Self::default() }
    }
}

/// Opens a session; fetches the server's key when it is not known.
pub(super) async fn open(
    dialer: &Dialer,
    identity: &Identity,
    way: &mut Way,
    steps: &mut Steps,
) -> Result<Session, Failure> {
    let url = &identity.url;
    let plan = if way.plan_failed { Vec::new() } else { dial_plan::attempts(&way.plan) };
    let recent = way.last_dial.is_some_and(|at| at.elapsed() < STRAIGHT_FOR);
    let known = way.server_key.take();
    let opening = async {
        let key = match known {
            Some(key) => key,
            None => {
                let key = fetch_key(dialer, url, &plan).await?;
                steps.done("server key");
                key
            }
        };
        way.server_key = Some(key);
        way.last_dial = Some(Instant::now());
        upgrade(dialer, identity, key, recent, &plan, steps).await
    };
    let opened = tokio::time::timeout(OPEN_TIMEOUT, opening)
        .await
        .unwrap_or_else(|_| Err(Failure::Unreachable(format!("{url} did not answer within 15 s"))));
    if opened.is_err() {
        way.server_key = None;
        way.plan_failed = !plan.is_empty();
    } else {
        way.plan_failed = false;
    }
    opened
}

fn unreachable(url: &ControlUrl, doing: &str) -> impl FnOnce(io::Error) -> Failure {
    let place = format!("{doing} {url}");
    move |error| Failure::Unreachable(format!("{place}: {error}; check control_url, its CA and the network"))
}

async fn fetch_key(dialer: &Dialer, url: &ControlUrl, plan: &[Attempt]) -> Result<MachinePublic, Failure> {
    let failed = || unreachable(url, "cannot fetch the server key from");
    let mut stream = dialer.control(url, url.carriage(), plan).await.map_err(failed())?;
    let request = format!(
        "GET {}/key?v={CAPABILITY_VERSION} HTTP/1.1\r\nHost: {}\r\nUser-Agent: podtether\r\nConnection: close\r\n\r\n",
        url.prefix,
        url.authority()
    );
    let mut reply = http1::exchange(&mut stream, &request).await.inspect_err(count_reply).map_err(failed())?;
    if reply.status != 200 {
        return Err(refusal(url, "/key", &reply));
    }
    let body = http1::body(&mut stream, &mut reply).await.inspect_err(count_reply).map_err(failed())?;
    let keys: ServerKeys = serde_json::from_slice(&body).map_err(|_| {
        Refused::ControlKey.count();
        Failure::refused(format!("{url}/key did not answer with a key: is this a control server?"))
    })?;
    if keys.public_key.is_zero() {
        Refused::ControlKey.count();
        return Err(Failure::refused(format!("{url} speaks no TS2021: it is too old, or no control server")));
    }
    Ok(keys.public_key)
}

fn count_reply(error: &io::Error) {
    if http1::is_malformed(error) {
        Refused::ControlReply.count();
    }
}

fn refusal(url: &ControlUrl, path: &str, reply: &http1::Reply) -> Failure {
    let reason = format!("{url}{path} answered HTTP {}", reply.status);
    Failure::status(reason, reply.status, reply.header("retry-after"))
}

type Noise = NoiseStream<Box<dyn Io>>;

/// The first of the URL's ways that leads to a Noise session.
async fn upgrade(
    dialer: &Dialer,
    identity: &Identity,
    key: MachinePublic,
    recent: bool,
    plan: &[Attempt],
    steps: &mut Steps,
) -> Result<Session, Failure> {
    let url = &identity.url;
    // A proxy is asked for TLS connections alone.
    let straight = recent || dialer.proxy_for(&url.host, url.port).is_some();
    let ways = url.carriages(straight).into_iter().map(|(delay, carriage)| {
        let attempt = async move {
            let upgraded = upgrade_one(dialer, identity, key, carriage, plan).await;
            upgraded.map_err(|failure| (carriage, failure))
        };
        (delay, attempt)
    });
    let noise = first_of(ways.collect()).await.map_err(|errors| worth_telling(url, errors))?;
    let (requests, connection) = h2::client::Builder::new()
        .initial_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .enable_push(false)
        .handshake(noise)
        .await
        .map_err(|e| unreachable(url, "no control session with")(io::Error::other(e)))?;
    steps.done("noise");
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        if let Err(error) = connection.await {
            if error.is_library() {
                Refused::ControlHttp2.count();
            }
            tracing::debug!(%error, "the control connection ended");
        }
    });
    Ok(Session::new(url.clone(), requests, tasks))
}

/// Of several failures, the one that says when to come back, else that of the way the URL names.
fn worth_telling(url: &ControlUrl, mut errors: Vec<(Carriage, Failure)>) -> Failure {
    let busy =
        |(_, failure): &(Carriage, Failure)| matches!(failure, Failure::Refused { retry_after: Some(_), .. });
    let own = |(carriage, _): &(Carriage, Failure)| *carriage == url.carriage();
    let at = errors.iter().position(busy).or_else(|| errors.iter().position(own)).unwrap_or(0);
    if at < errors.len() {
        return errors.swap_remove(at).1;
    }
    Failure::Unreachable(format!("no way leads to {url}"))
}

async fn upgrade_one(
    dialer: &Dialer,
    identity: &Identity,
    key: MachinePublic,
    carriage: Carriage,
    plan: &[Attempt],
) -> Result<Noise, Failure> {
    let url = &identity.url;
    let failed = || unreachable(url, "no control session with");
    let (handshake, initiation) = ClientHandshake::start(&identity.machine_key, &key, CAPABILITY_VERSION)
        .map_err(|e| Failure::refused(e.to_string()))?;
    let mut stream = dialer.control(url, carriage, plan).await.map_err(failed())?;
    let host = match carriage {
        Carriage::Plain(port) => host_header(&url.host, port, 80),
        Carriage::Tls(port) => host_header(&url.host, port, 443),
    };
    let request = format!(
        "POST {}/ts2021 HTTP/1.1\r\nHost: {host}\r\nUser-Agent: podtether\r\nUpgrade: {UPGRADE}\r\nConnection: upgrade\r\n\
         X-Tailscale-Handshake: {}\r\nContent-Length: 0\r\n\r\n",
        url.prefix,
        STANDARD.encode(initiation)
    );
    let reply = http1::exchange(&mut stream, &request).await.inspect_err(count_reply).map_err(failed())?;
    if reply.status != 101 {
        return Err(refusal(url, "/ts2021", &reply));
    }
    if !reply.header("upgrade").is_some_and(|v| v.eq_ignore_ascii_case(UPGRADE)) {
        Refused::ControlReply.count();
        return Err(Failure::refused(format!("{url}/ts2021 switched to another protocol")));
    }
    let mut frames = RecordReader::new();
    frames.feed(&reply.rest);
    let transport = loop {
        let frame = frames.next_frame().inspect_err(|_| Refused::ControlNoise.count());
        if let Some(frame) = frame.map_err(|e| failed()(io::Error::other(e)))? {
            let finished = handshake.finish(frame).inspect_err(|_| Refused::ControlNoise.count());
            break finished.map_err(|e| Failure::refused(format!("no Noise handshake with {url}: {e}")))?;
        }
        let mut bytes = [0; 1024];
        let count = stream.read(&mut bytes).await.map_err(failed())?;
        if count == 0 {
            return Err(failed()(io::Error::new(io::ErrorKind::UnexpectedEof, "closed in the handshake")));
        }
        frames.feed(&bytes[..count]);
    };
    let mut noise = NoiseStream::new(stream, transport, frames);
    skip_early_payload(&mut noise).await.map_err(failed())?;
    Ok(noise)
}

/// The server's first bytes may be a payload of its own; without the magic they are HTTP/2 already.
/// The challenge in it is not needed by an engine.
async fn skip_early_payload<S>(noise: &mut NoiseStream<S>) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut early = EarlyPayload::new();
    let mut bytes = [0; 1024];
    loop {
        let count = noise.read(&mut bytes).await?;
        if count == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed after the Noise handshake"));
        }
        let fed = early.feed(&bytes[..count]).inspect_err(|_| Refused::ControlEarly.count());
        if let Some(done) = fed.map_err(io::Error::other)? {
            noise.unread(&done.rest);
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podtether_core::key::MachinePrivate;
    use podtether_core::noise::ServerHandshake;
    use podtether_core::tailcfg::EarlyNoise;
    use tokio::io::AsyncWriteExt as _;

    /// HTTP/2's first frame header, then its payload.
    const FIRST_FRAME: &[u8] = &[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 100];

    #[tokio::test]
    async fn the_early_payload_may_be_there_may_straddle_records_and_may_be_absent() {
        let early = EarlyPayload::encode(&EarlyNoise::default());
        let with = [early.as_slice(), FIRST_FRAME].concat();
        for (bytes, record_length) in [
            (with.as_slice(), 4000),
            (&with, 1),
            (&with, 11),
            (&with, early.len()),
            (FIRST_FRAME, 4000),
            (FIRST_FRAME, 2),
        ] {
            let keys = || MachinePrivate::generate().unwrap();
            let (client_key, server_key) = (keys(), keys());
            let (client, initiation) =
                ClientHandshake::start(&client_key, &server_key.public(), 115).unwrap();
            let (mut server, response) =
                ServerHandshake::read(&server_key, &initiation).unwrap().respond().unwrap();
            let (near, mut far) = tokio::io::duplex(100_000);
            let mut sealed = Vec::new();
            for piece in bytes.chunks(record_length) {
                server.seal(piece, &mut sealed).unwrap();
            }
            far.write_all(&sealed).await.unwrap();
            let mut noise = NoiseStream::new(near, client.finish(&response).unwrap(), RecordReader::new());
            skip_early_payload(&mut noise).await.unwrap();
            let mut first = vec![0; FIRST_FRAME.len()];
            noise.read_exact(&mut first).await.unwrap();
            assert_eq!(first, FIRST_FRAME, "records of {record_length}");
        }
    }
}
