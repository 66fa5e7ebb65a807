//! Servers that answer nonsense: each kind is counted under its own reason, and none of it ends the client.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use podtether_core::key::MachinePrivate;
use podtether_core::noise::{RecordReader, ServerHandshake};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::control::noise_stream::NoiseStream;

/// How far a server plays along before the nonsense begins.
#[derive(Debug, Clone, Copy)]
enum Nonsense {
    Key(&'static str),
    Upgrade(&'static [u8]),
    Handshake,
    Record,
    Http2,
    Register(&'static [u8]),
    MapFrame,
}

fn http(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

async fn answer(mut stream: TcpStream, key: MachinePrivate, what: Nonsense) -> Option<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    let head = String::from_utf8(head).ok()?;
    if head.starts_with("GET /key") {
        let good = serde_json::json!({"publicKey": key.public()}).to_string();
        let reply = if let Nonsense::Key(reply) = what { reply.to_owned() } else { http(&good) };
        return stream.write_all(reply.as_bytes()).await.ok();
    }
    if let Nonsense::Upgrade(reply) = what {
        return stream.write_all(reply).await.ok();
    }
    let initiation = head.lines().find_map(|line| line.strip_prefix("X-Tailscale-Handshake: "))?;
    let initiation = STANDARD.decode(initiation).ok()?;
    let (transport, response) = ServerHandshake::read(&key, &initiation).ok()?.respond().ok()?;
    let upgrade = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: tailscale-control-protocol\r\n\r\n";
    stream.write_all(upgrade.as_bytes()).await.ok()?;
    if let Nonsense::Handshake = what {
        let torn: Vec<u8> = response.iter().rev().copied().collect();
        return stream.write_all(&[&response[..3], &torn[3..]].concat()).await.ok();
    }
    stream.write_all(&response).await.ok()?;
    if let Nonsense::Record = what {
        // The header of a record of 32 bytes, and as many that nobody sealed.
        return stream.write_all(&[&[4, 0, 32][..], &[7; 32]].concat()).await.ok();
    }
    let mut noise = NoiseStream::new(stream, transport, RecordReader::new());
    if let Nonsense::Http2 = what {
        // SETTINGS of a length that is no multiple of six.
        noise.write_all(&[0, 0, 5, 4, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5]).await.ok()?;
        noise.flush().await.ok()?;
        return noise.read_to_end(&mut Vec::new()).await.ok().map(drop);
    }
    let mut connection = h2::server::handshake(noise).await.ok()?;
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let body: &[u8] = match (request.uri().path(), what) {
            ("/machine/register", Nonsense::Register(body)) => body,
            ("/machine/register", _) => br#"{"MachineAuthorized":true}"#,
            // Four gigabytes are announced.
            ("/machine/map", Nonsense::MapFrame) => &[0xff; 8],
            _ => b"",
        };
        let mut send = respond.send_response(http::Response::new(()), false).ok()?;
        send.send_data(bytes::Bytes::copy_from_slice(body), true).ok()?;
    }
    Some(())
}

fn count(reason: &str) -> u64 {
    crate::refused::named().find(|(name, _)| *name == reason).map_or(0, |(_, n)| n)
}

#[tokio::test]
async fn nonsense_from_control_is_counted_by_what_it_is() {
    let mut place = Place::new(|_| ()).await;
    for (what, reason) in [
        (Nonsense::Key("SSH-2.0-OpenSSH_9\r\n\r\n"), "control_http_reply"),
        (Nonsense::Key("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "control_http_reply"),
        (Nonsense::Key("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"), "control_key"),
        (Nonsense::Key("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"), "control_key"),
        (Nonsense::Upgrade(b"\x15\x03\x01\x00\x02\x02\x50\r\n\r\n"), "control_http_reply"),
        (Nonsense::Upgrade(b"HTTP/1.1 101 Ok\r\nUpgrade: websocket\r\n\r\n"), "control_http_reply"),
        (Nonsense::Handshake, "control_noise"),
        (Nonsense::Record, "control_noise"),
        (Nonsense::Http2, "control_http2"),
        (Nonsense::Register(b"<html>"), "control_register"),
        (Nonsense::Register(br#"{"MachineAuthorized":"#), "control_register"),
        (Nonsense::MapFrame, "control_map_frame"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        place.url = format!("http://{}", listener.local_addr().unwrap());
        let key = MachinePrivate::generate().unwrap();
        let server = tokio::spawn(async move {
            let mut answers = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                answers.spawn(answer(stream, key.clone(), what));
            }
        });
        let before = count(reason);
        let mut control = place.start(&Node::new(Some("key")));
        // It says why, waits, and tries again.
        for _ in 0..2 {
            let why = until(&mut control, trying).await;
            assert!(why.contains("127.0.0.1"), "{what:?}: {why}");
        }
        assert!(count(reason) >= before + 2, "{what:?}: {reason} is {} after {before}", count(reason));
        server.abort();
    }
}
