//! A small control client for tests, written from the wire format.
#![allow(dead_code, unreachable_pub, clippy::missing_panics_doc, reason = "each test binary uses a part")]

use std::net::SocketAddr;
use std::time::Duration;

use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Request, StatusCode};
use podtether_core::key::{DiscoPrivate, MachinePrivate, MachinePublic, NodePrivate};
use podtether_core::noise::{ClientHandshake, EarlyPayload, RESPONSE_LEN};
use podtether_devnet::control::noise_stream::NoiseStream;
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

pub const VERSION: u16 = 113;
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Fails the test instead of waiting for ever.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("took too long")
}

/// A devnet that notices absence quickly.
pub async fn devnet(change: impl FnOnce(&mut DevnetConfig)) -> Devnet {
    let mut config = DevnetConfig {
        offline_delay: Duration::from_millis(300),
        ephemeral_timeout: Duration::from_millis(600),
        ..DevnetConfig::default()
    };
    change(&mut config);
    Devnet::start(config).await.unwrap()
}

pub struct Response {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Response {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// One HTTP/1.1 request on a connection of its own.
pub async fn http(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Option<Response> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut raw = Vec::new();
    stream.read_to_end(&mut raw).await.ok()?;
    let mut space = [httparse::EMPTY_HEADER; 32];
    let mut parsed = httparse::Response::new(&mut space);
    let httparse::Status::Complete(head) = parsed.parse(&raw).ok()? else { return None };
    let mut headers = HeaderMap::new();
    for header in parsed.headers.iter() {
        headers.insert(
            http::HeaderName::from_bytes(header.name.as_bytes()).ok()?,
            http::HeaderValue::from_bytes(header.value).ok()?,
        );
    }
    let status = StatusCode::from_u16(parsed.code?).ok()?;
    let body = &raw[head..];
    let chunked = headers.get("transfer-encoding").is_some_and(|v| v == "chunked");
    Some(Response { status, headers, body: if chunked { joined(body)? } else { body.to_vec() } })
}

/// A body that came in chunks.
fn joined(mut chunks: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = chunks.windows(2).position(|pair| pair == b"\r\n")?;
        let length = usize::from_str_radix(std::str::from_utf8(&chunks[..end]).ok()?, 16).ok()?;
        if length == 0 {
            return Some(body);
        }
        let chunk = &chunks[end + 2..];
        body.extend_from_slice(chunk.get(..length)?);
        chunks = chunk.get(length + 2..)?;
    }
}

/// One device with its keys.
pub struct Machine {
    pub machine: MachinePrivate,
    pub node: NodePrivate,
    pub disco: DiscoPrivate,
    pub hostname: String,
}

impl Machine {
    pub fn new(hostname: &str) -> Self {
        Self {
            machine: MachinePrivate::generate().unwrap(),
            node: NodePrivate::generate().unwrap(),
            disco: DiscoPrivate::generate().unwrap(),
            hostname: hostname.into(),
        }
    }

    pub fn hostinfo(&self) -> Value {
        json!({"OS": "linux", "IPNVersion": "1.0-test", "Hostname": self.hostname,
               "NetInfo": {"PreferredDERP": 1}})
    }

    pub fn register_request(&self, auth: Option<&str>) -> Value {
        let mut request = json!({
            "Version": VERSION,
            "NodeKey": self.node.public(),
            "OldNodeKey": "nodekey:0000000000000000000000000000000000000000000000000000000000000000",
            "NLKey": "nlpub:0000000000000000000000000000000000000000000000000000000000000000",
            "Expiry": "0001-01-01T00:00:00Z",
            "Followup": "",
            "Hostinfo": self.hostinfo(),
        });
        if let Some(key) = auth {
            request["Auth"] = json!({ "AuthKey": key });
        }
        request
    }

    pub fn map_request(&self) -> Value {
        json!({
            "Version": VERSION, "KeepAlive": true, "Stream": true, "NodeKey": self.node.public(),
            "DiscoKey": self.disco.public(), "Hostinfo": self.hostinfo(),
            "Endpoints": ["192.0.2.1:41641"], "EndpointTypes": [1],
        })
    }

    pub fn lite_update(&self, endpoint: &str) -> Value {
        let mut request = self.map_request();
        request["Stream"] = json!(false);
        request["OmitPeers"] = json!(true);
        request["Endpoints"] = json!([endpoint]);
        request
    }

    pub async fn connect(&self, devnet: &Devnet) -> Control {
        Control::connect(devnet.http_addresses()[0], &self.machine, VERSION).await.unwrap()
    }

    /// Joins with a fresh single-use key, and opens a map stream.
    pub async fn join(&self, devnet: &Devnet, options: AuthKeyOptions) -> (Control, MapStream) {
        let key = devnet.create_auth_key(options);
        let mut control = self.connect(devnet).await;
        let answer = control.register(&self.register_request(Some(&key.secret))).await;
        assert_eq!(answer["Error"], "", "{answer}");
        assert_eq!(answer["MachineAuthorized"], true);
        let stream = control.map(&self.map_request()).await.unwrap();
        (control, stream)
    }
}

/// A control connection after the handshake.
pub struct Control {
    send: h2::client::SendRequest<Bytes>,
    driver: tokio::task::JoinHandle<Result<(), h2::Error>>,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

pub async fn server_key(address: SocketAddr) -> MachinePublic {
    let answer = http(address, "GET", &format!("/key?v={VERSION}"), &[], "").await.unwrap();
    answer.json()["publicKey"].as_str().unwrap().parse().unwrap()
}

impl Control {
    pub async fn connect(
        address: SocketAddr,
        machine: &MachinePrivate,
        version: u16,
    ) -> Result<Self, String> {
        soon(Self::dial(address, machine, version)).await
    }

    async fn dial(address: SocketAddr, machine: &MachinePrivate, version: u16) -> Result<Self, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let server = server_key(address).await;
        let (handshake, initiation) = ClientHandshake::start(machine, &server, version).unwrap();
        let mut io = TcpStream::connect(address).await.map_err(|error| text(&error))?;
        let initiation = base64::engine::general_purpose::STANDARD.encode(initiation);
        let request = format!(
            "POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: tailscale-control-protocol\r\n\
             Connection: upgrade\r\nX-Tailscale-Handshake: {initiation}\r\n\r\n"
        );
        io.write_all(request.as_bytes()).await.map_err(|error| text(&error))?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(io.read_u8().await.map_err(|error| text(&error))?);
        }
        let head = String::from_utf8(head).unwrap();
        if !head.starts_with("HTTP/1.1 101 ") {
            return Err(head);
        }
        assert!(head.to_lowercase().contains("upgrade: tailscale-control-protocol"), "{head}");
        let mut response = [0; RESPONSE_LEN];
        io.read_exact(&mut response).await.map_err(|error| text(&error))?;
        let transport = handshake.finish(&response).map_err(|error| text(&error))?;
        let mut stream = NoiseStream::new(io, transport);
        let mut early = EarlyPayload::new();
        let done = loop {
            let byte = stream.read_u8().await.map_err(|error| text(&error))?;
            if let Some(done) = early.feed(&[byte]).map_err(|error| text(&error))? {
                break done;
            }
        };
        assert!(done.early.is_some(), "the early payload comes first");
        assert_eq!(done.rest, b"");
        let (send, connection) = h2::client::handshake(stream).await.map_err(|error| text(&error))?;
        Ok(Self { send, driver: tokio::spawn(connection) })
    }

    pub async fn request(&mut self, method: Method, path: &str, body: &[u8]) -> Response {
        let (parts, mut stream) = self.open(method, path, body).await;
        let mut collected = Vec::new();
        while let Some(data) = soon(stream.data()).await {
            let data = data.unwrap();
            stream.flow_control().release_capacity(data.len()).unwrap();
            collected.extend_from_slice(&data);
        }
        Response { status: parts.status, headers: parts.headers, body: collected }
    }

    async fn open(
        &mut self,
        method: Method,
        path: &str,
        body: &[u8],
    ) -> (http::response::Parts, h2::RecvStream) {
        let request =
            Request::builder().method(method).uri(format!("https://devnet{path}")).body(()).unwrap();
        std::future::poll_fn(|context| self.send.poll_ready(context)).await.unwrap();
        let (response, mut sender) = self.send.send_request(request, false).unwrap();
        sender.send_data(Bytes::copy_from_slice(body), true).unwrap();
        soon(response).await.unwrap().into_parts()
    }

    pub async fn register(&mut self, request: &Value) -> Value {
        let answer = self.request(Method::POST, "/machine/register", request.to_string().as_bytes()).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        answer.json()
    }

    /// The answer to a lite update.
    pub async fn update(&mut self, request: &Value) -> Response {
        self.request(Method::POST, "/machine/map", request.to_string().as_bytes()).await
    }

    /// Opens a map stream; the error is the status and text of a refusal.
    pub async fn map(&mut self, request: &Value) -> Result<MapStream, (StatusCode, String)> {
        let (parts, stream) = self.open(Method::POST, "/machine/map", request.to_string().as_bytes()).await;
        let mut stream =
            MapStream { stream, buffer: BytesMut::new(), compressed: request["Compress"] == "zstd" };
        if parts.status == StatusCode::OK {
            return Ok(stream);
        }
        let mut text = Vec::new();
        while let Some(Ok(data)) = soon(stream.stream.data()).await {
            text.extend_from_slice(&data);
        }
        Err((parts.status, String::from_utf8_lossy(&text).trim().to_owned()))
    }
}

/// A stream of netmaps.
pub struct MapStream {
    stream: h2::RecvStream,
    buffer: BytesMut,
    compressed: bool,
}

impl MapStream {
    /// The next message, or none when the stream ended; fails the test after [`PATIENCE`].
    pub async fn next(&mut self) -> Option<Value> {
        soon(self.read()).await
    }

    /// The next message that is no keepalive.
    pub async fn news(&mut self) -> Option<Value> {
        loop {
            let message = self.next().await?;
            if message["KeepAlive"] != true {
                return Some(message);
            }
        }
    }

    /// The first message for which `wanted` finds something.
    pub async fn find<T>(&mut self, wanted: impl Fn(&Value) -> Option<T>) -> T {
        loop {
            let message = self.next().await.expect("stream ended");
            if let Some(found) = wanted(&message) {
                return found;
            }
        }
    }

    async fn read(&mut self) -> Option<Value> {
        loop {
            if let Some((length, rest)) = self.buffer.split_first_chunk::<4>() {
                let length = usize::try_from(u32::from_le_bytes(*length)).unwrap();
                if rest.len() >= length {
                    let message = self.buffer.split_to(4 + length);
                    let body = if self.compressed {
                        zstd::bulk::decompress(&message[4..], 1 << 20).unwrap()
                    } else {
                        message[4..].to_vec()
                    };
                    return Some(serde_json::from_slice(&body).unwrap());
                }
            }
            let data = self.stream.data().await?.ok()?;
            let _ = self.stream.flow_control().release_capacity(data.len());
            self.buffer.extend_from_slice(&data);
        }
    }
}

/// Names of the peers in a list of nodes.
pub fn names(nodes: &Value) -> Vec<String> {
    let nodes = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
    nodes.iter().map(|node| node["Name"].as_str().unwrap().split('.').next().unwrap().to_owned()).collect()
}
