use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::object::Odd;
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

/// What a line of a watch becomes.
fn line(text: &str) -> Option<kube::api::WatchEvent<Odd<PodObject>>> {
    serde_json::from_str(text).ok()
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,40}".prop_map(Value::from),
        Just(Value::from("x".repeat(5000))),
        Just(json!({"conditionType": GATE})),
        Just(json!({"kind": "ReplicaSet", "controller": true})),
    ];
    let key = prop_oneof![
        Just("metadata"),
        Just("name"),
        Just("uid"),
        Just("annotations"),
        Just("ownerReferences"),
        Just("spec"),
        Just("readinessGates"),
        Just("status"),
        Just("phase"),
        Just("resourceVersion"),
        Just("deletionTimestamp"),
        Just("tailscale.com/tags"),
        Just(CONFIG_HASH),
        Just(MIRROR),
    ];
    leaf.prop_recursive(5, 64, 8, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::btree_map(key.clone().prop_map(str::to_owned), inner, 0..8)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn fuzz_objects_and_lines_of_any_kind_cost_no_other(
        objects in proptest::collection::vec(json_value(), 0..6),
        text in ".{0,200}",
        cut in 0_usize..400,
    ) {
        let good = json!({"metadata": {"name": "good", "uid": "good"}});
        let mut items = objects.clone();
        items.push(good.clone());
        let list = json!({"metadata": {"resourceVersion": "7", "continue": "c"}, "items": items}).to_string();
        let list: kube::core::ObjectList<Odd<PodObject>> = serde_json::from_str(&list).unwrap();
        let seen: Vec<Seen> = list.items.into_iter().filter_map(|item| Seen::of(item.0)).collect();
        prop_assert!(seen.iter().any(|seen| seen.uid == "good"));
        let mut store = Store::default();
        store.works("pods");
        store.pods_are(seen.clone());
        for one in seen {
            let size: usize = one.annotations.iter().map(|(key, value)| key.len() + value.len()).sum();
            prop_assert!(size <= MAX_ANNOTATIONS * 2 * MAX_VALUE && !one.uid.is_empty());
            prop_assert!(store.pod(&asked(&one.uid)).is_some());
        }
        for object in &objects {
            let whole = json!({"type": "MODIFIED", "object": object}).to_string();
            prop_assert!(line(&whole).is_some(), "an odd object is none, and its line is one");
            let cut = whole.floor_char_boundary(cut.min(whole.len()));
            if let Some(kube::api::WatchEvent::Modified(Odd(object))) = line(&whole[..cut])
                && let Some(seen) = Seen::of(object)
            {
                store.see(seen);
            }
        }
        let _ = line(&text);
        store.see(Seen::of(serde_json::from_value(good).unwrap()).unwrap());
        prop_assert_eq!(store.fate(&asked("good"), Instant::now()), Fate::Lives);
    }
}
