use serde_json::{Value, json};

use super::*;

fn pod(uid: &str, change: Value) -> Seen {
    let mut object = json!({
        "metadata": {"name": format!("pod-{uid}"), "namespace": "shop", "uid": uid},
        "status": {"phase": "Running"},
    });
    merge(&mut object, change);
    Seen::of(serde_json::from_value(object).unwrap()).unwrap()
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

fn asked(uid: &str) -> PodRef {
    PodRef { uid: uid.into(), namespace: "shop".into(), name: format!("pod-{uid}") }
}

#[test]
fn no_more_is_kept_than_is_read() {
    let long = "ü".repeat(5000);
    let seen = pod(
        "a",
        json!({
            "metadata": {
                "annotations": {
                    "tailscale.com/tags": "tag:web", "podtether.dev/dns": "off", "other/annotation": "x",
                    "tailscale.com/hostname": long,
                },
                "ownerReferences": [{"kind": "X"}, {"kind": "ReplicaSet", "controller": true}],
            },
            "spec": {"readinessGates": [{"conditionType": "other"}, {"conditionType": GATE}]},
        }),
    );
    let kept: Vec<_> = seen.annotations.iter().map(|(key, value)| (key.as_str(), value.len())).collect();
    let hostname = ("tailscale.com/hostname", 2048);
    assert_eq!(kept, [("podtether.dev/dns", 3), hostname, ("tailscale.com/tags", 7)]);
    assert_eq!((seen.owner.as_deref(), seen.gate, seen.ending), (Some("ReplicaSet"), true, false));
    assert!(Seen::of(PodObject::default()).is_none());
}

#[test]
fn who_ends() {
    let now = Instant::now();
    let later = now + ABSENT_FOR;
    let mut store = Store::default();
    assert_eq!(store.fate(&asked("a"), now), Fate::Unknown, "nothing is known");
    store.works("pods");
    store.pods_are(vec![
        pod("a", json!({})),
        pod("b", json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})),
        pod("c", json!({"status": {"phase": "Succeeded"}})),
        pod("d", json!({"status": {"phase": "Failed"}})),
        pod("e", json!({"status": {"phase": "Unknown"}})),
    ]);
    for (uid, fate) in [
        ("a", Fate::Lives),
        ("b", Fate::Ended),
        ("c", Fate::Ended),
        ("d", Fate::Ended),
        ("e", Fate::Lives),
        ("new", Fate::Unknown),
    ] {
        assert_eq!(store.fate(&asked(uid), now), fate, "{uid}");
    }
    assert_eq!(store.fate(&asked("new"), later), Fate::Ended, "it never came");
    // A list without it, as after 410.
    store.pods_are(vec![pod("e", json!({}))]);
    assert_eq!(store.fate(&asked("a"), now), Fate::Ended);
    assert_eq!(store.fate(&asked("e"), now), Fate::Lives);
    // The API server is away: what is known stays known, and who is not is not thought gone.
    assert!(store.fails("pods", "away".into(), now));
    assert!(!store.fails("pods", "still away".into(), now), "once a minute");
    assert_eq!(store.fate(&asked("e"), later), Fate::Lives);
    assert_eq!(store.fate(&asked("a"), later), Fate::Ended);
    assert_eq!(store.fate(&asked("x"), now), Fate::Unknown);
    assert_eq!(store.fate(&asked("x"), later), Fate::Unknown);
    store.works("pods");
    assert_eq!(store.fate(&asked("x"), later), Fate::Unknown, "counted anew");
}

#[test]
fn static_pods_are_known_by_their_hash_and_outlive_their_mirrors() {
    let now = Instant::now();
    let mirror = |uid: &str| {
        let hashes = json!({"kubernetes.io/config.hash": "h1", "kubernetes.io/config.mirror": "h1"});
        pod(uid, json!({"metadata": {"annotations": hashes, "deletionTimestamp": "x"}}))
    };
    let mut store = Store::default();
    store.works("pods");
    store.see(mirror("api-uid"));
    assert_eq!(store.pod(&asked("h1")).map(|seen| seen.uid.as_str()), Some("api-uid"));
    assert_eq!(store.fate(&asked("h1"), now), Fate::Lives, "a mirror that is deleted deletes no pod");
    store.gone("api-uid");
    assert_eq!(store.fate(&asked("h1"), now), Fate::Unknown);
    store.see(mirror("api-uid-2"));
    assert_eq!(store.fate(&asked("h1"), now + ABSENT_FOR), Fate::Lives, "the kubelet made another");
    store.gone("api-uid-2");
    assert_eq!(store.fate(&asked("h1"), now), Fate::Unknown);
    assert_eq!(store.fate(&asked("h1"), now + ABSENT_FOR), Fate::Ended, "its file is gone");
}

#[test]
fn namespaces_outlive_the_supervisor() {
    let namespace = |name: &str, tags: &str| -> NamespaceObject {
        let annotations = json!({"tailscale.com/tags": tags, "x": "y"});
        serde_json::from_value(json!({"metadata": {"name": name, "annotations": annotations}})).unwrap()
    };
    let mut store = Store::default();
    assert!(store.see_namespace(namespace("shop", "tag:web")));
    assert!(!store.see_namespace(namespace("shop", "tag:web")), "no news");
    store.see_namespace(namespace("old", "tag:old"));
    let mut next = Store::default();
    next.recall(Some(&store.remembered()));
    assert_eq!(next.namespace("shop").unwrap().len(), 1);
    next.recall(Some(b"torn"));
    next.namespaces_are(vec![namespace("shop", "tag:b")]);
    assert_eq!(next.namespace("shop").unwrap()["tailscale.com/tags"], "tag:b");
    assert!(next.namespace("old").is_none(), "it is gone");
    assert!(next.namespace_gone("shop") && !next.namespace_gone("shop"));
}

#[test]
fn everything_is_bounded() {
    let mut store = Store::default();
    for n in 0..MAX_ENDED + 10 {
        store.see(pod(&format!("u{n}"), json!({"status": {"phase": "Failed"}})));
    }
    assert_eq!(
        (store.pods.len(), store.ended.len(), store.ended_order.len()),
        (MAX_PODS, MAX_ENDED, MAX_ENDED)
    );
}
