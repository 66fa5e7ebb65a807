//! An engine whose build knows other fields and calls than this one: its types are written down here, and
//! share nothing with the crate's.

use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt as _;
use podtether_proto::{PROTO_VERSION, transport};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tarpc::context::Context;
use tarpc::server::{BaseChannel, Channel as _};

/// The minor next to this build's, the older one where there is one.
pub(crate) fn minor() -> u16 {
    PROTO_VERSION.minor.checked_sub(1).unwrap_or(PROTO_VERSION.minor + 1)
}

/// What it reads of a start request: not all that is in it.
#[derive(Debug, Serialize, Deserialize)]
struct Start {
    pod: Pod,
    hostname: String,
    mtu: u16,
    /// It never comes.
    #[serde(default)]
    of_another_minor: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Pod {
    uid: String,
}

#[tarpc::service]
trait Engine {
    async fn hello() -> Value;
    async fn start(request: Start) -> Result<(), String>;
    async fn watch(after: u64) -> Value;
    async fn set_underlay(underlay: Value);
    async fn set_routing(routing: Value) -> Value;
    async fn metrics() -> Value;
    async fn peers() -> Vec<Value>;
    async fn why(packet: Value) -> Result<Value, String>;
    async fn set_roots(extra_roots_pem: String) -> Result<(), String>;
    async fn ping(peer: String, kind: String) -> Result<Value, String>;
    async fn peer_caps(peer: String) -> Vec<Value>;
    async fn logout() -> Result<(), String>;
    async fn prepare_handover() -> Result<u8, String>;
    async fn ready(within_ms: u64) -> u64;
    async fn take_over(alone: bool) -> Result<Value, String>;
    async fn stop();
    async fn a_call_of_another_minor() -> u64;
}

#[derive(Clone, Default)]
struct Another {
    pod_uid: Arc<Mutex<String>>,
    name: Arc<Mutex<String>>,
}

fn status(name: &str) -> Value {
    json!({
        "seq": 1, "state": "Running", "control_connected": true, "control_age_ms": 0, "home_derp": 0,
        "node": {"name": name, "addresses": ["100.64.0.8/32"], "tags": [], "stable_id": "n8",
                 "key_expiry_unix_s": null, "of_another_minor": {"a": 1}},
        "health": [{"title": "t", "text": "", "severity": "low", "of_another_minor": 1}],
        "routes_version": 0, "accepted_routes": [], "exit_node_id": null, "sandbox": [], "of_another_minor": [1, 2],
    })
}

impl Engine for Another {
    async fn hello(self, _: Context) -> Value {
        json!({
            "version": {"major": PROTO_VERSION.major, "minor": minor()}, "build": "another", "pid": std::process::id(),
            "pod_uid": *self.pod_uid.lock().unwrap(), "of_another_minor": "x",
        })
    }

    async fn start(self, _: Context, request: Start) -> Result<(), String> {
        assert_eq!((request.mtu, request.of_another_minor), (1280, None));
        *self.pod_uid.lock().unwrap() = request.pod.uid;
        // A server that has given the name to another device already.
        *self.name.lock().unwrap() = match request.hostname.as_str() {
            "taken" => "taken-1.tailnet.test".into(),
            _ => "another.tailnet.test".into(),
        };
        Ok(())
    }

    async fn watch(self, _: Context, after: u64) -> Value {
        if after > 0 {
            tokio::time::sleep(Duration::from_secs(20)).await;
        }
        status(&self.name.lock().unwrap())
    }

    async fn set_underlay(self, _: Context, _: Value) {}

    async fn set_routing(self, _: Context, _: Value) -> Value {
        status(&self.name.lock().unwrap())
    }

    async fn metrics(self, _: Context) -> Value {
        json!({"tx_packets": 4711, "of_another_minor": 1})
    }

    async fn peers(self, _: Context) -> Vec<Value> {
        Vec::new()
    }

    async fn why(self, _: Context, _: Value) -> Result<Value, String> {
        Err("of another minor".into())
    }

    async fn set_roots(self, _: Context, _: String) -> Result<(), String> {
        Ok(())
    }

    async fn ping(self, _: Context, peer: String, kind: String) -> Result<Value, String> {
        Ok(json!({"name": peer, "address": "100.64.0.3", "kind": kind, "latencyUs": 1, "path": "Idle"}))
    }

    async fn peer_caps(self, _: Context, _: String) -> Vec<Value> {
        Vec::new()
    }

    async fn logout(self, _: Context) -> Result<(), String> {
        Ok(())
    }

    async fn prepare_handover(self, _: Context) -> Result<u8, String> {
        Err("of another minor".into())
    }

    async fn ready(self, _: Context, _: u64) -> u64 {
        0
    }

    async fn take_over(self, _: Context, _: bool) -> Result<Value, String> {
        Err("of another minor".into())
    }

    async fn stop(self, _: Context) {
        std::process::exit(0);
    }

    async fn a_call_of_another_minor(self, _: Context) -> u64 {
        0
    }
}

pub(super) async fn serve(listener: UnixListener) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::UnixListener::from_std(listener).unwrap();
    let another = Another::default();
    while let Ok((stream, _)) = listener.accept().await {
        let channel = BaseChannel::with_defaults(transport::served(stream));
        let calls = channel.execute(another.clone().serve());
        tokio::spawn(calls.for_each(|call| async {
            tokio::spawn(call);
        }));
    }
}
