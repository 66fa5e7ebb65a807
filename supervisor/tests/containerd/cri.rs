//! As much of the Kubernetes CRI (runtime.v1) as starting and stopping pods takes: gRPC over h2, and protobuf
//! messages by hand.

use std::path::Path;

use bytes::Bytes;
use h2::client::SendRequest;

/// A connection to the runtime.
#[derive(Clone)]
pub(crate) struct Cri {
    send: SendRequest<Bytes>,
}

/// A field of kind 2: text, bytes or a message.
fn field(number: u8, value: &[u8]) -> Vec<u8> {
    let mut message = vec![number << 3 | 2];
    let mut length = value.len();
    while length >= 0x80 {
        message.push(u8::try_from(length & 0x7f).unwrap() | 0x80);
        length >>= 7;
    }
    message.push(u8::try_from(length).unwrap());
    message.extend_from_slice(value);
    message
}

impl Cri {
    pub(crate) async fn connect(socket: &Path) -> Self {
        let stream = tokio::net::UnixStream::connect(socket).await.unwrap();
        let (send, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        Self { send }
    }

    /// RunPodSandbox: the id of the sandbox.
    pub(crate) async fn run(&self, name: &str, attempt: u8, cgroup: &str) -> Result<String, String> {
        let mut metadata = [field(1, name.as_bytes()), field(2, format!("uid-{name}").as_bytes())].concat();
        metadata.extend(field(3, b"default"));
        metadata.extend([4 << 3, attempt & 0x7f]);
        let config =
            [field(1, &metadata), field(2, name.as_bytes()), field(8, &field(1, cgroup.as_bytes()))].concat();
        let answer = self.call("RunPodSandbox", field(1, &config)).await?;
        // Its only field, and shorter than 128 bytes.
        Ok(String::from_utf8_lossy(answer.get(2..).unwrap_or_default()).into_owned())
    }

    /// StopPodSandbox, then RemovePodSandbox.
    pub(crate) async fn remove(&self, id: &str) -> Result<(), String> {
        self.call("StopPodSandbox", field(1, id.as_bytes())).await?;
        self.call("RemovePodSandbox", field(1, id.as_bytes())).await.map(drop)
    }

    async fn call(&self, method: &str, message: Vec<u8>) -> Result<Vec<u8>, String> {
        let told = |e: h2::Error| format!("{method}: {e}");
        let request = http::Request::post(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .unwrap();
        let mut send = self.send.clone().ready().await.map_err(told)?;
        let (response, mut body) = send.send_request(request, false).map_err(told)?;
        let mut framed = vec![0];
        framed.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        framed.extend(message);
        body.send_data(framed.into(), true).map_err(told)?;
        let response = response.await.map_err(told)?;
        let (head, mut stream) = response.into_parts();
        let mut answer = Vec::new();
        while let Some(chunk) = stream.data().await {
            let chunk = chunk.map_err(told)?;
            let _ = stream.flow_control().release_capacity(chunk.len());
            answer.extend_from_slice(&chunk);
        }
        // An error without an answer comes in the head.
        let trailers = stream.trailers().await.map_err(told)?.unwrap_or(head.headers);
        let text = |name: &str| trailers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
        match text("grpc-status") {
            "0" => Ok(answer.split_off(answer.len().min(5))),
            status => Err(format!("{method}: {status} {}", text("grpc-message"))),
        }
    }
}
