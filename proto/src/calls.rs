//! Which minor of [`PROTO_VERSION`](crate::PROTO_VERSION) has which call of an engine. The table below is the one
//! place that says so, and [`Known`] the one that asks it, before each call: an engine that reads a call that it
//! does not know ends the connection, and with that itself.

use std::io::ErrorKind;

use tarpc::client::stub::Stub;
use tarpc::client::{self, Channel, RpcError};
use tarpc::context::Context;
use tarpc::{ClientMessage, Response, ServerError};

use crate::engine::{EngineClient, EngineRequest, EngineResponse, Hello};
use crate::transport::{Frames, Json};
use crate::{PROTO_VERSION, Version};

/// A call of [`Engine`](crate::engine::Engine).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// As the trait has it.
    pub name: &'static str,
    /// The first minor that has it.
    pub since: u16,
}

impl Call {
    /// Whether an engine that said `version` in its `hello` knows it.
    #[must_use]
    pub fn is_known_to(self, version: Version) -> bool {
        self.since <= version.minor
    }
}

/// A call without a line here does not compile.
macro_rules! calls {
    ($($variant:ident $name:literal since $minor:literal;)*) => {
        /// All of them.
        pub const CALLS: &[Call] = &[$(Call { name: $name, since: $minor }),*];

        /// What a request asks.
        #[must_use]
        pub fn asked(request: &EngineRequest) -> Call {
            match request {
                $(EngineRequest::$variant { .. } => Call { name: $name, since: $minor },)*
            }
        }

        /// What an answer answers.
        #[must_use]
        pub fn answered(response: &EngineResponse) -> Call {
            match response {
                $(EngineResponse::$variant(_) => Call { name: $name, since: $minor },)*
            }
        }
    };
}

calls! {
    Hello "hello" since 0;
    Start "start" since 0;
    Watch "watch" since 0;
    SetUnderlay "set_underlay" since 0;
    SetRouting "set_routing" since 0;
    Metrics "metrics" since 0;
    Peers "peers" since 0;
    Why "why" since 0;
    SetRoots "set_roots" since 0;
    Ping "ping" since 0;
    PeerCaps "peer_caps" since 0;
    Logout "logout" since 0;
    PrepareHandover "prepare_handover" since 0;
    Ready "ready" since 0;
    TakeOver "take_over" since 0;
    Stop "stop" since 0;
    Way "way" since 1;
    Netcheck "netcheck" since 1;
    SetLog "set_log" since 1;
    Rename "rename" since 1;
}

/// Calls to an engine that are no others than it knows.
pub type KnownEngine = EngineClient<Known>;

/// A connection to an engine that has said of which version it is. A call that is none of that version is not sent:
/// it fails with [`ErrorKind::Unsupported`], see [`unknown`]. An answer to something else than was asked is an
/// error of the engine's as well, where tarpc would panic.
#[derive(Debug, Clone)]
pub struct Known {
    channel: Channel<EngineRequest, EngineResponse>,
    version: Version,
}

impl Known {
    /// What an engine of `version` is asked goes through `channel`.
    #[must_use]
    pub fn new(channel: Channel<EngineRequest, EngineResponse>, version: Version) -> Self {
        Self { channel, version }
    }
}

impl Stub for Known {
    type Req = EngineRequest;
    type Resp = EngineResponse;

    async fn call(&self, context: Context, request: EngineRequest) -> Result<EngineResponse, RpcError> {
        let call = asked(&request);
        if !call.is_known_to(self.version) {
            let (theirs, major) = (self.version, PROTO_VERSION.major);
            let what = format!(
                "it speaks version {}.{} and has no {}, which came with {major}.{}",
                theirs.major, theirs.minor, call.name, call.since
            );
            return Err(RpcError::Server(ServerError::new(ErrorKind::Unsupported, what)));
        }
        let response = self.channel.call(context, request).await?;
        let got = answered(&response);
        if got != call {
            let what = format!("it answered {} when it was asked {}", got.name, call.name);
            return Err(RpcError::Server(ServerError::new(ErrorKind::InvalidData, what)));
        }
        Ok(response)
    }
}

/// A connection to an engine.
pub type ToEngine = Frames<Json<Response<EngineResponse>>, ClientMessage<EngineRequest>>;

/// Asks an engine who it is; what it can be asked from then on.
///
/// # Errors
/// As of any call.
pub async fn greet(transport: ToEngine, context: Context) -> Result<(KnownEngine, Hello), RpcError> {
    let channel = client::new(client::Config::default(), transport).spawn();
    let first = Known::new(channel.clone(), Version { minor: 0, ..PROTO_VERSION });
    let hello = KnownEngine::from(first).hello(context).await?;
    let known = Known::new(channel, hello.version);
    Ok((known.into(), hello))
}

/// Of a call that was not made because the engine does not know it: that, in words.
#[must_use]
pub fn unknown(error: &RpcError) -> Option<&str> {
    match error {
        RpcError::Server(error) if error.kind == ErrorKind::Unsupported => Some(&error.detail),
        RpcError::Shutdown
        | RpcError::Send(_)
        | RpcError::Channel(_)
        | RpcError::DeadlineExceeded
        | RpcError::Server(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixStream;

    use super::*;
    use crate::transport;

    fn version(minor: u16) -> Version {
        Version { minor, ..PROTO_VERSION }
    }

    fn within(time: Duration) -> Context {
        let mut context = tarpc::context::current();
        context.deadline = Instant::now() + time;
        context
    }

    #[test]
    fn each_minor_has_the_calls_of_those_before_and_its_own() {
        let of = |minor| {
            let mut names: Vec<&str> =
                CALLS.iter().filter(|call| call.is_known_to(version(minor))).map(|call| call.name).collect();
            names.sort_unstable();
            names
        };
        let first = [
            "hello",
            "logout",
            "metrics",
            "peer_caps",
            "peers",
            "ping",
            "prepare_handover",
            "ready",
            "set_roots",
            "set_routing",
            "set_underlay",
            "start",
            "stop",
            "take_over",
            "watch",
            "why",
        ];
        assert_eq!(of(0), first);
        let mut second = [&first[..], &["netcheck", "rename", "set_log", "way"]].concat();
        second.sort_unstable();
        assert_eq!(of(1), second);
        assert!(CALLS.iter().all(|call| call.since <= PROTO_VERSION.minor), "a minor for each call");
        assert_eq!(of(PROTO_VERSION.minor).len(), CALLS.len());
    }

    #[tokio::test]
    async fn what_an_engine_does_not_know_is_not_sent() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let channel = client::new(client::Config::default(), transport::framed(near)).spawn();
        let engine = KnownEngine::from(Known::new(channel, version(0)));
        let refused = [
            engine.set_log(within(Duration::from_secs(60)), None).await.unwrap_err(),
            engine.rename(within(Duration::from_secs(60)), "web".into()).await.unwrap_err(),
        ];
        for (error, name) in refused.iter().zip(["set_log", "rename"]) {
            let text = unknown(error).unwrap();
            assert!(
                text.contains(&format!("version {}.0 and has no {name}, which", PROTO_VERSION.major)),
                "{text}"
            );
        }
        drop(engine);
        let mut sent = Vec::new();
        far.read_to_end(&mut sent).await.unwrap();
        assert_eq!(sent, b"", "the connection ends with nothing in it");
    }

    #[tokio::test]
    async fn an_answer_to_something_else_is_an_error_and_no_panic() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let channel = client::new(client::Config::default(), transport::framed(near)).spawn();
        let engine = KnownEngine::from(Known::new(channel, PROTO_VERSION));
        let answer = async {
            let answer = Response { request_id: 0, message: Ok(EngineResponse::Peers(Vec::new())) };
            let text = serde_json::to_vec(&answer).unwrap();
            let mut length = [0; 4];
            far.read_exact(&mut length).await.unwrap();
            let mut frame = vec![0; usize::try_from(u32::from_be_bytes(length)).unwrap()];
            far.read_exact(&mut frame).await.unwrap();
            assert!(String::from_utf8_lossy(&frame).contains("Metrics"));
            far.write_all(&u32::try_from(text.len()).unwrap().to_be_bytes()).await.unwrap();
            far.write_all(&text).await.unwrap();
        };
        let (asked, ()) = tokio::join!(engine.metrics(within(Duration::from_secs(60))), answer);
        let error = asked.unwrap_err();
        let RpcError::Server(said) = &error else { panic!("{error}") };
        assert!(said.detail.contains("answered peers when it was asked metrics"), "{error}");
        assert_eq!(unknown(&error), None);
    }
}
