//! How the services travel: length-delimited JSON over a Unix stream socket.
//!
//! Fields are known by their names, so that two builds understand each other when one of them knows more;
//! the rules are in [`crate::PROTO_VERSION`].

mod frames;

use std::io;
use std::marker::PhantomData;
use std::time::Duration;

use serde::Deserialize;
use tarpc::ClientMessage;
use tokio::net::UnixStream;

pub use frames::{Format, Frames};

/// Largest frame either side takes, bytes. The peers of a tailnet of ten thousand are the largest one.
pub const MAX_FRAME_BYTES: usize = 4 << 20;

/// Frames `stream` for one of the services.
pub fn framed<Item, SinkItem>(stream: UnixStream) -> Frames<Json<Item>, SinkItem>
where
    Item: for<'de> Deserialize<'de>,
{
    Frames::new(stream)
}

/// Frames `stream` for the side that serves: like [`framed`], and a request's deadline is looked at first.
pub fn served<Call, SinkItem>(stream: UnixStream) -> Frames<Requests<Call>, SinkItem>
where
    Call: for<'de> Deserialize<'de>,
{
    Frames::new(stream)
}

/// JSON.
#[derive(Debug)]
pub struct Json<Item>(PhantomData<fn() -> Item>);

impl<Item: for<'de> Deserialize<'de>> Format for Json<Item> {
    type Item = Item;

    fn read(frame: &[u8]) -> io::Result<Item> {
        read(frame)
    }
}

fn read<T: for<'de> Deserialize<'de>>(frame: &[u8]) -> io::Result<T> {
    // The message of a parser could quote a secret.
    serde_json::from_slice(frame).map_err(|error| {
        let what = format!("not a message of this protocol (column {})", error.column());
        io::Error::new(io::ErrorKind::InvalidData, what)
    })
}

/// Longest time a client may give a call. tarpc adds it to the clock without looking, and a sum that does
/// not fit ends the program.
const MAX_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// What has to be known of a client's message before it is read as a [`ClientMessage`].
#[derive(Deserialize)]
enum Beginning {
    Request { context: Deadline },
    Cancel {},
}

#[derive(Deserialize)]
struct Deadline {
    /// tarpc has a default of its own.
    deadline: Option<Duration>,
}

/// JSON for requests, refusing those whose deadline the server could not keep.
#[derive(Debug)]
pub struct Requests<Call>(PhantomData<fn() -> Call>);

impl<Call: for<'de> Deserialize<'de>> Format for Requests<Call> {
    type Item = ClientMessage<Call>;

    fn read(frame: &[u8]) -> io::Result<ClientMessage<Call>> {
        match read(frame)? {
            Beginning::Request { context: Deadline { deadline: Some(deadline) } }
                if deadline > MAX_DEADLINE =>
            {
                let what = format!("a call with a deadline of {deadline:?}");
                Err(io::Error::new(io::ErrorKind::InvalidData, what))
            }
            Beginning::Request { .. } | Beginning::Cancel {} => read(frame),
        }
    }
}

/// Whether a connection ended because of what came, not because it broke.
#[must_use]
pub fn is_malformed(error: &tarpc::ChannelError<io::Error>) -> bool {
    matches!(error, tarpc::ChannelError::Read(error) if error.kind() == io::ErrorKind::InvalidData)
}

/// Connects to the service at `path`.
///
/// # Errors
/// As `connect(2)`: nobody serves the socket, or it is not ours to open.
pub async fn connect<Item, SinkItem>(
    path: impl AsRef<std::path::Path>,
) -> io::Result<Frames<Json<Item>, SinkItem>>
where
    Item: for<'de> Deserialize<'de>,
{
    Ok(framed(UnixStream::connect(path).await?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::*;
    use crate::node::NodeRequest;
    use serde_json::{Value, json};

    fn request(bytes: &[u8]) -> io::Result<ClientMessage<NodeRequest>> {
        Requests::<NodeRequest>::read(bytes)
    }

    #[tokio::test]
    async fn noise_is_told_from_a_caller_that_went_away() {
        use futures_util::StreamExt as _;
        use tarpc::server::{BaseChannel, Channel as _};
        use tokio::io::AsyncWriteExt as _;

        for (bytes, malformed) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], Some(true)),
            (&[0, 0, 0, 2, 0, 0xff], Some(true)),
            (&[0, 0, 0, 9, 0], Some(false)),
            (b"", None),
        ] {
            let (mut near, far) = UnixStream::pair().expect("a pair");
            near.write_all(bytes).await.expect("room");
            drop(near);
            let channel = BaseChannel::<NodeRequest, (), _>::with_defaults(served(far));
            let end = std::pin::pin!(channel.requests()).next().await;
            assert_eq!(end.map(|end| end.err().is_some_and(|e| is_malformed(&e))), malformed, "{bytes:?}");
        }
    }

    #[test]
    fn a_deadline_past_all_time_is_refused_and_a_usual_one_is_taken() {
        let asked = ClientMessage::Request(tarpc::Request {
            context: tarpc::context::current(),
            id: 7,
            message: NodeRequest::Status {},
        });
        let text = serde_json::to_string(&asked).expect("serializable");
        assert!(matches!(request(text.as_bytes()), Ok(ClientMessage::Request(back)) if back.id == 7));
        let mut endless: Value = serde_json::from_str(&text).expect("JSON");
        for secs in [u64::MAX, u64::MAX / 2, 24 * 3600 + 1] {
            endless["Request"]["context"]["deadline"] = json!({ "secs": secs, "nanos": 0 });
            assert!(request(endless.to_string().as_bytes()).is_err(), "{secs} s");
        }
        // The same message in another shape that serde takes.
        let context = endless["Request"]["context"].clone();
        let as_list = json!({ "Request": [context, 7, { "Status": {} }] });
        assert!(request(as_list.to_string().as_bytes()).is_err());
        let cancel =
            ClientMessage::<NodeRequest>::Cancel { trace_context: Default::default(), request_id: 9 };
        let bytes = serde_json::to_vec(&cancel).expect("serializable");
        assert!(matches!(request(&bytes), Ok(ClientMessage::Cancel { request_id: 9, .. })));
    }

    #[test]
    fn what_is_refused_is_not_quoted() {
        let error = read::<StartRequest>(br#"{"auth_key":"tskey-secret","mtu":"tskey-secret"}"#);
        let text = error.expect_err("no request").to_string();
        assert!(!text.contains("tskey"), "{text}");
    }

    /// Puts a field that nobody knows into every structure.
    fn with_news(value: &mut Value) {
        match value {
            Value::Array(items) => items.iter_mut().for_each(with_news),
            Value::Object(fields) => {
                fields.values_mut().for_each(with_news);
                let is_variant = fields.len() == 1
                    && fields.keys().all(|name| name.starts_with(|c: char| c.is_ascii_uppercase()));
                if !is_variant {
                    fields.insert("of_a_later_minor".into(), json!({ "a": [1] }));
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    #[test]
    fn fields_of_a_later_minor_are_passed_over_and_those_of_an_earlier_one_are_enough() {
        let status = EngineStatus {
            milestones: Default::default(),
            seq: 3,
            state: NodeState::Connecting { reason: "r".into() },
            control_connected: true,
            control_age_ms: Some(1),
            node: Some(SelfNode {
                name: "n".into(),
                addresses: vec!["100.64.0.1/32".parse().expect("a net")],
                tags: vec!["tag:a".into()],
                stable_id: "s".into(),
                key_expiry_unix_s: None,
            }),
            home_derp: 1,
            health: vec![HealthMessage::default()],
            routes_version: 2,
            accepted_routes: Vec::new(),
            exit_node_id: None,
            sandbox: Vec::new(),
        };
        let mut text = serde_json::to_value(&status).expect("serializable");
        with_news(&mut text);
        assert_eq!(serde_json::from_value::<EngineStatus>(text).expect("understood"), status);

        let hello = json!({ "version": { "major": 3, "minor": 1, "patch": 5 }, "build": "b", "pid": 1, "pod_uid": "u",
                            "of_a_later_minor": null });
        assert_eq!(serde_json::from_value::<Hello>(hello).expect("understood").version.minor, 1);
        // Counters that an earlier minor does not have are zero.
        let metrics: EngineMetrics =
            serde_json::from_value(json!({ "tx_packets": 5, "made_up": 1 })).expect("understood");
        assert_eq!(metrics, EngineMetrics { tx_packets: 5, ..EngineMetrics::default() });
    }

    #[test]
    fn ten_thousand_peers_fit_a_frame() {
        let peer = PeerStatus {
            name: format!("{}.tailnet-name.ts.net", "k8s-cluster-namespace-deployment-5d8f9c7b6d-x7k2p"),
            addresses: vec![
                "100.127.255.254".parse().expect("v4"),
                "fd7a:115c:a1e0:ab12:4843:cd96:627f:ffff".parse().expect("v6"),
            ],
            path: PathStatus::Direct {
                endpoint: "[2001:db8:1234:5678:9abc:def0:1234:5678]:41641".parse().expect("an endpoint"),
                rtt_us: 123_456,
            },
            handshake_age_ms: Some(123_456),
            last_tx_age_ms: Some(123_456),
            last_rx_age_ms: Some(123_456),
            tx_bytes: 123_456_789_012,
            rx_bytes: 123_456_789_012,
        };
        // Only so many have a path and traffic at a time.
        let idle = PeerStatus {
            path: PathStatus::Idle,
            handshake_age_ms: None,
            last_tx_age_ms: None,
            last_rx_age_ms: None,
            tx_bytes: 0,
            rx_bytes: 0,
            ..peer.clone()
        };
        let peers: Vec<PeerStatus> =
            (0..10_000).map(|n| if n % 10 == 0 { peer.clone() } else { idle.clone() }).collect();
        let frame = serde_json::to_vec(&EngineResponse::Peers(peers)).expect("serializable");
        assert!(frame.len() < MAX_FRAME_BYTES, "{} bytes", frame.len());
    }
}
