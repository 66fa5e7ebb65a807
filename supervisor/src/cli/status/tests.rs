use podtether_proto::engine::HealthMessage;
use podtether_proto::node::Live;

use super::*;
use crate::cli::text::WIDTH;

pub(crate) fn pod(namespace: &str, name: &str, state: &str) -> PodSummary {
    PodSummary {
        namespace: namespace.into(),
        pod: name.into(),
        container_id: "c1".into(),
        tailnet: "default".into(),
        state: state.into(),
        reason: String::new(),
        name: String::new(),
        addresses: Vec::new(),
        restarts: 0,
        handovers: 0,
        limits: Vec::new(),
        sandbox: Vec::new(),
        control_connected: true,
        home_derp: 0,
        accept_routes: false,
        exit_node: None,
        health: Vec::new(),
        uid: String::new(),
        tags: Vec::new(),
        added_unix_ms: 0,
        engine_pid: None,
        memory_bytes: None,
        cpu_us: None,
        live: None,
    }
}

fn node() -> NodeStatus {
    let now_ms = 1_795_314_786_000;
    let live = |direct, relay| {
        let (rx_bytes, tx_bytes) = (1_300_000, 34_000);
        let last_handshake_unix_s = now_ms / 1000 - 42;
        Some(Live {
            peers: 12,
            peers_direct: direct,
            peers_relay: relay,
            last_handshake_unix_s,
            rx_bytes,
            tx_bytes,
            drops: 3,
        })
    };
    let web = PodSummary {
        name: "k8s-shop-web-6f7d9c5b4-x2x7k.tailnet.ts.net".into(),
        addresses: vec!["fd7a:115c:a1e0::1".parse().unwrap(), "100.101.102.103".parse().unwrap()],
        tags: vec!["tag:k8s-pod".into(), "tag:ns-shop".into()],
        added_unix_ms: now_ms - 3 * 3_600_000,
        memory_bytes: Some(1_480 << 10),
        engine_pid: Some(4711),
        live: live(10, 2),
        restarts: 1,
        home_derp: 4,
        ..pod("shop", "web-6f7d9c5b4-x2x7k", "running")
    };
    let db = PodSummary {
        addresses: vec!["100.64.0.9".parse().unwrap()],
        added_unix_ms: now_ms - 95_000,
        memory_bytes: Some(2 << 20),
        live: live(0, 0),
        health: vec![HealthMessage {
            title: "no control session".into(),
            text: "control.example.com: connection refused".into(),
            severity: "medium".into(),
        }],
        control_connected: false,
        ..pod("shop", "db-0", "running")
    };
    let waiting = PodSummary {
        reason: "the tailnet wants somebody to log in: https://login.example.com/a/0123456789abcdef0123456789abcdef".into(),
        added_unix_ms: now_ms - 7000,
        ..pod("a-namespace-with-a-rather-long-name", "batch-job-with-a-long-name-28375943-kq8wz", "needs-login")
    };
    let refused = PodSummary {
        reason: "pod default/old: tag:web is not owned by the OAuth client; add it to its tags, or to tagOwners of the \
                 policy, then delete the pod"
            .into(),
        ..pod("default", "old", "stopped")
    };
    NodeStatus {
        node: "node-a".into(),
        version: "0.1.0".into(),
        unix_ms: now_ms,
        pods: vec![web, db, waiting, refused],
    }
}

#[test]
fn a_pod_a_line_and_what_is_wrong_below() {
    let text = table(&node(), Look::PLAIN);
    golden(&text, include_str!("golden.txt"));
    for line in text.lines() {
        assert!(line.chars().count() <= WIDTH, "{line}");
    }
    let coloured = table(&node(), Look { colour: true, ..Look::PLAIN });
    assert!(coloured.contains("\x1b[32mrunning\x1b[0m") && coloured.contains("\x1b[31mstopped\x1b[0m"));
    let empty = NodeStatus { pods: Vec::new(), ..node() };
    assert_eq!(table(&empty, Look::PLAIN), "0 pods: 0 joined, 0 pending, 0 failed\n");
}

#[test]
fn wide_is_everything_in_as_many_columns() {
    let text = wide(&node(), Look::PLAIN);
    golden(&text, include_str!("golden-wide.txt"));
    for line in text.lines() {
        assert!(line.chars().count() <= WIDTH, "{line}");
    }
}

#[test]
fn what_another_build_prints_is_read_as_far_as_it_goes() {
    let mut json = serde_json::to_value(node()).unwrap();
    for pod in json["pods"].as_array_mut().unwrap() {
        let pod = pod.as_object_mut().unwrap();
        pod.insert("later".into(), 1.into());
        for field in ["uid", "tags", "live", "cpuUs"] {
            pod.remove(field);
        }
    }
    let read: NodeStatus = serde_json::from_value(json).unwrap();
    assert_eq!(read.pods.len(), 4);
}

#[test]
fn nothing_that_a_pod_is_called_moves_the_cursor() {
    let mut node = node();
    node.pods[0].pod = "x\x1b[2J\ny".into();
    node.pods[2].reason = "a\x1b[31m\rb".into();
    for text in [table(&node, Look::PLAIN), wide(&node, Look::PLAIN)] {
        assert!(!text.contains('\x1b') && !text.contains('\r'), "{text}");
    }
}

/// Compares with a file; a failure shows what it should hold.
fn golden(text: &str, file: &str) {
    assert_eq!(text, file, "\n{text}");
}
