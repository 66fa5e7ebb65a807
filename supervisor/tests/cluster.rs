//! What the API server tells, and what its faults cost.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod kubeapi;
mod rig;

use std::path::Path;
use std::time::{Duration, Instant};

use kubeapi::KubeApi;
use podtether_devnet::Devnet;
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::node::{AddRequest, PodSelector, Source, code};
use rig::*;
use serde_json::{Value, json};

fn with_api(dir: &Path, devnet: &Devnet, api: &KubeApi) -> Rig {
    let mut rig = Rig::oauth(dir, devnet);
    rig.config.push_str(&format!(
        "name = \"node-1\"\napi_server = {:?}\nservice_account_dir = \"{}/account\"\nidentity_grace = \"10m\"\n",
        api.url,
        dir.display()
    ));
    rig.config.push_str("[namespace.\"*\"]\ntags = [\"tag:web\"]\nhostnames = [\"*\"]\n");
    rig
}

/// A runtime that passes annotations.
fn with(mut request: AddRequest, annotations: &[(&str, &str)]) -> AddRequest {
    request.annotations.insert("kubernetes.io/config.source".into(), "api".into());
    for (key, value) in annotations {
        request.annotations.insert((*key).to_owned(), (*value).to_owned());
    }
    request
}

/// What the supervisor says of one watch.
fn health(what: &str) -> Value {
    let all: Value = serde_json::from_str(&http("/v1/kubernetes")).unwrap();
    all.as_array().unwrap().iter().find(|health| health["what"] == what).cloned().unwrap_or(Value::Null)
}

async fn until_health(what: &str, wanted: impl Fn(&Value) -> bool) {
    let begun = Instant::now();
    while !wanted(&health(what)) {
        assert!(begun.elapsed() < TIMEOUT, "{what}: {}", health(what));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn annotations_come_from_the_api_where_the_runtime_passes_none() {
    in_namespaces("annotations_come_from_the_api_where_the_runtime_passes_none", |dir| {
        let devnet = devnet(|config| config.oauth.tags.push("tag:web".into()));
        let api = KubeApi::start();
        api.namespace(
            "default",
            &[("tailscale.com/ephemeral", "true"), ("tailscale.com/tags", "tag:k8s-pod")],
        );
        for n in 0..7 {
            api.pod("default", &format!("other-{n}"), &format!("uid-other-{n}"), &[]);
        }
        let mut rig = with_api(dir, &devnet, &api);
        rig.start();
        block_on(async {
            let client = rig.client().await;
            rig.netns("a").await;
            // The news of the pod comes after its ADD.
            let request = rig.request("a");
            let adding = tokio::spawn({
                let client = client.clone();
                async move { client.add(within(TIMEOUT), request).await.unwrap() }
            });
            until_health("pods", |health| health["current"] == true).await;
            assert!(!adding.is_finished());
            api.pod("default", "a", "uid-a", &[("tailscale.com/tags", "tag:web")]);
            adding.await.unwrap().unwrap();
            assert_eq!(rig.pod("a")["tags"][0], "tag:web", "{}", rig.pod("a"));
            assert!(devnet.nodes()[0].ephemeral, "by its namespace");
            let named = PodSelector::Pod { namespace: "default".into(), name: "a".into() };
            let told = client.choice(within(TIMEOUT), named).await.unwrap().unwrap();
            let of = |name: &str| told.settings.iter().find(|s| s.name == name).map(|s| s.source);
            assert_eq!((of("tags"), of("ephemeral")), (Some(Source::Pod), Some(Source::Namespace)));

            // A static pod is known to its runtime by its hash alone.
            rig.netns("static").await;
            let hash = [
                ("kubernetes.io/config.hash", "uid-static"),
                ("kubernetes.io/config.mirror", "uid-static"),
                ("tailscale.com/hostname", "from-a-file"),
            ];
            api.pod("default", "static", "uid-of-its-mirror", &hash);
            rig.add("static").await.unwrap();
            assert_eq!(rig.pod("static")["name"], "from-a-file.tailnet.test");
            // Its mirror goes and comes as the API likes.
            api.delete_pod("default", "static");
            api.pod("default", "static", "uid-of-another-mirror", &hash);
            rig.del("static").await.unwrap();
            assert!(devnet.node("from-a-file").is_some(), "the pod is still there: its sandbox is made anew");
            rig.add("static").await.unwrap();
            assert_eq!(rig.pod("static")["name"], "from-a-file.tailnet.test");
        });
    });
}

#[test]
fn an_identity_ends_with_its_pod() {
    in_namespaces("an_identity_ends_with_its_pod", |dir| {
        let devnet = devnet(|_| {});
        let api = KubeApi::start();
        let mut rig = with_api(dir, &devnet, &api);
        rig.start();
        block_on(async {
            for name in ["a", "b", "c"] {
                rig.netns(name).await;
                api.pod("default", name, &format!("uid-{name}"), &[]);
                rig.add(name).await.unwrap();
            }
            let left = async |count: usize| devnet.wait_for(TIMEOUT, |nodes| nodes.len() == count).await;
            // A sandbox that ends: the pod lives, and so does its device.
            rig.del("a").await.unwrap();
            assert_eq!(devnet.nodes().len(), 3);
            rig.add("a").await.unwrap();
            assert_eq!(devnet.nodes().len(), 3, "the same device");
            // Deleted before DEL: it is gone when DEL is answered.
            api.change_pod(
                "default",
                "a",
                json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
            rig.del("a").await.unwrap();
            assert_eq!(devnet.nodes().len(), 2, "{:?}", devnet.nodes());
            // Finished.
            api.change_pod("default", "b", json!({"status": {"phase": "Succeeded"}}));
            tokio::time::sleep(Duration::from_millis(200)).await;
            rig.del("b").await.unwrap();
            assert!(left(1).await);
            // DEL first, and gone while the watch had lost its place.
            rig.del("c").await.unwrap();
            assert_eq!(devnet.nodes().len(), 1, "it may come back");
            api.fault(|faults| faults.down = true);
            api.delete_pod("default", "c");
            api.forget();
            tokio::time::sleep(Duration::from_millis(1500)).await;
            assert_eq!(devnet.nodes().len(), 1, "nobody can say");
            api.fault(|faults| faults.down = false);
            assert!(left(0).await, "{:?}", devnet.nodes());
            assert!(api.requests().iter().filter(|r| *r == "list pods").count() >= 2);
            rig.until_clean(TIMEOUT).await;
        });
    });
}

#[test]
fn an_api_server_that_is_away_stops_no_pod_whose_facts_are_known() {
    in_namespaces("an_api_server_that_is_away_stops_no_pod_whose_facts_are_known", |dir| {
        let devnet = devnet(|config| config.oauth.tags.push("tag:web".into()));
        let api = KubeApi::start();
        api.namespace("default", &[("tailscale.com/tags", "tag:web")]);
        let mut rig = with_api(dir, &devnet, &api);
        rig.start();
        block_on(async {
            rig.client().await;
            until_health("namespaces", |health| health["current"] == true).await;
            let file = dir.join("state/namespaces.json");
            let begun = Instant::now();
            while !file.exists() {
                assert!(begun.elapsed() < TIMEOUT);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            api.fault(|faults| faults.down = true);
            // Also of a supervisor that never saw it.
            for round in ["a", "b"] {
                until_health("pods", |health| health["sentence"] != "").await;
                let client = rig.client().await;
                rig.netns(round).await;
                let begun = Instant::now();
                client.add(within(TIMEOUT), with(rig.request(round), &[])).await.unwrap().unwrap();
                println!("joined {:?} after ADD", begun.elapsed());
                assert_eq!(rig.pod(round)["tags"][0], "tag:web", "what its namespace said is known");
                assert!(http("/metrics").contains("podtether_kubernetes_current{what=\"pods\"} 0"));
                drop(client);
                rig.kill();
                rig.start();
                rig.client().await;
            }
            let client = rig.client().await;
            // Who joins nothing needs nobody.
            rig.netns("c").await;
            let off = with(rig.request("c"), &[("tailscale.com/enabled", "false")]);
            let mut unknown = off.clone();
            unknown.pod.namespace = "never-seen".into();
            for request in [off, unknown] {
                let begun = Instant::now();
                assert!(client.add(within(TIMEOUT), request).await.unwrap().unwrap().is_nothing());
                // Half of its patience is what a wait would take.
                assert!(begun.elapsed() < Duration::from_secs(9));
            }
            // Whose facts nobody knows is told so in time.
            for (request, says) in [
                (rig.request("c"), "its annotations are not known"),
                (
                    AddRequest {
                        pod: podtether_proto::engine::PodRef {
                            namespace: "never-seen".into(),
                            ..rig.request("c").pod
                        },
                        ..with(rig.request("c"), &[])
                    },
                    "the annotations of namespace never-seen are not known",
                ),
            ] {
                let request = AddRequest { timeout_ms: 2000, ..request };
                let begun = Instant::now();
                let error = client.add(within(TIMEOUT), request).await.unwrap().unwrap_err();
                assert_eq!(error.code, code::TRY_AGAIN);
                assert!(error.msg.contains(says) && error.details.contains("cannot"), "{error}");
                assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
            }
            // Nor does it stop anybody from leaving.
            for name in ["a", "b"] {
                rig.del(name).await.unwrap();
                assert_eq!(rig.pod(name), Value::Null);
            }
            api.fault(|faults| faults.down = false);
            until_health("pods", |health| health["current"] == true && health["sentence"] == "").await;
        });
    });
}

#[test]
fn a_slow_server_a_missing_verb_and_nonsense_are_said_and_outlived() {
    in_namespaces("a_slow_server_a_missing_verb_and_nonsense_are_said_and_outlived", |dir| {
        let devnet = devnet(|config| config.oauth.tags.push("tag:web".into()));
        let api = KubeApi::start();
        api.fault(|faults| {
            faults.forbidden.insert("list namespaces".into());
            faults.forbidden.insert("watch pods".into());
        });
        let mut rig = with_api(dir, &devnet, &api);
        rig.start();
        block_on(async {
            let client = rig.client().await;
            for (what, verb) in [("namespaces", "list namespaces"), ("pods", "watch pods")] {
                until_health(what, |health| {
                    let sentence = health["sentence"].as_str().unwrap_or_default();
                    sentence.contains(verb) && sentence.contains("ClusterRole")
                })
                .await;
            }
            let metrics = http("/metrics");
            assert!(metrics.contains("podtether_kubernetes_current{what=\"namespaces\"} 0"), "{metrics}");
            // A namespace that cannot be read: the operator is told with the pod.
            rig.netns("a").await;
            let request = AddRequest { timeout_ms: 2000, ..with(rig.request("a"), &[]) };
            let error = client.add(within(TIMEOUT), request).await.unwrap().unwrap_err();
            assert!(error.details.contains("list namespaces"), "{error}");

            api.fault(|faults| {
                faults.forbidden.clear();
                faults.garbage = true;
                faults.delay = Duration::from_secs(10);
            });
            // Ten seconds for every answer: ADD waits for what it needs, and no longer.
            let begun = Instant::now();
            let request = AddRequest { timeout_ms: 120_000, ..rig.request("a") };
            let adding = tokio::spawn({
                let client = client.clone();
                async move { client.add(within(Duration::from_secs(120)), request).await.unwrap() }
            });
            api.pod("default", "a", "uid-a", &[("tailscale.com/tags", "tag:web")]);
            adding.await.unwrap().unwrap();
            println!("joined {:?} after ADD, ten seconds an answer", begun.elapsed());
            assert_eq!(rig.pod("a")["tags"][0], "tag:web");
            // And nobody waits for it to leave.
            let begun = Instant::now();
            rig.del("a").await.unwrap();
            assert!(begun.elapsed() < Duration::from_secs(5));
        });
    });
}

#[test]
fn a_namespace_that_goes_in_the_middle_of_a_join_leaves_nothing() {
    in_namespaces("a_namespace_that_goes_in_the_middle_of_a_join_leaves_nothing", |dir| {
        let devnet = devnet(|_| {});
        let api = KubeApi::start();
        api.namespace("short", &[]);
        let mut rig = with_api(dir, &devnet, &api);
        rig.start();
        block_on(async {
            let client = rig.client().await;
            rig.netns("a").await;
            devnet
                .set_fault(podtether_devnet::fault::Target::Upgrade, podtether_devnet::fault::Fault::hang());
            let mut request = with(rig.request("a"), &[]);
            request.pod.namespace = "short".into();
            api.pod("short", "a", "uid-a", &[]);
            let adding = tokio::spawn({
                let (client, request) = (client.clone(), request.clone());
                async move { client.add(within(TIMEOUT), request).await.unwrap() }
            });
            rig.until("a", "joining", |pod| pod["state"] == "joining").await;
            api.delete_pod("short", "a");
            api.delete_namespace("short");
            rig.del("a").await.unwrap();
            let error = adding.await.unwrap().unwrap_err();
            assert!(error.msg.contains("pod short/a") && error.msg.contains("deleted"), "{error}");
            rig.until_clean(TIMEOUT).await;
            // A late try of the runtime.
            let late = AddRequest { timeout_ms: 2000, ..request };
            let error = client.add(within(TIMEOUT), late).await.unwrap().unwrap_err();
            assert!(error.msg.contains("namespace short are not known"), "{error}");
            assert!(devnet.nodes().is_empty());
        });
    });
}
