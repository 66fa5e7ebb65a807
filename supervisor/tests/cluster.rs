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
        // A machine that does much else takes long for megabytes.
        assert!(begun.elapsed() < 6 * TIMEOUT, "{what}: {}", health(what));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until the supervisor knows what the API server has told of pods so far: of `last`, too, which joins nothing.
async fn heard(rig: &Rig, api: &KubeApi, last: &str) {
    api.pod("default", last, &format!("uid-{last}"), &[("tailscale.com/enabled", "false")]);
    let client = rig.client().await;
    assert!(client.add(within(TIMEOUT), rig.request(last)).await.unwrap().unwrap().is_nothing());
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
            heard(&rig, &api, "after-a").await;
            rig.del("a").await.unwrap();
            assert_eq!(devnet.nodes().len(), 2, "{:?}", devnet.nodes());
            // Finished.
            api.change_pod("default", "b", json!({"status": {"phase": "Succeeded"}}));
            heard(&rig, &api, "after-b").await;
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

#[test]
fn who_asks_is_read_again_from_files_that_are_rotated() {
    in_namespaces("who_asks_is_read_again_from_files_that_are_rotated", |dir| {
        let devnet = devnet(|_| {});
        let api = KubeApi::start();
        let account = dir.join("account");
        std::fs::create_dir(&account).unwrap();
        let token = |value: &str| {
            std::fs::write(account.join("new"), value).unwrap();
            std::fs::rename(account.join("new"), account.join("token")).unwrap();
        };
        let wants = |value: &str| api.fault(|faults| faults.token = Some(value.to_owned()));
        // Ends the watches, so that there is something to ask.
        let interrupt = async || {
            api.fault(|faults| faults.down = true);
            until_health("pods", |health| health["current"] == false).await;
            api.fault(|faults| faults.down = false);
        };
        let refused = |health: &Value| {
            let sentence = health["sentence"].as_str().unwrap_or_default();
            sentence.contains("service account") && sentence.contains("token")
        };
        token("one");
        wants("one");
        let mut rig = with_api(dir, &devnet, &api);
        // It is for others.
        rig.environment.push(("HTTPS_PROXY", "http://127.0.0.1:1".into()));
        rig.start();
        block_on(async {
            rig.client().await;
            for what in ["pods", "namespaces"] {
                until_health(what, |health| health["current"] == true).await;
            }
            wants("two");
            interrupt().await;
            until_health("pods", refused).await;
            token("two");
            for what in ["pods", "namespaces"] {
                until_health(what, |health| health["current"] == true && health["sentence"] == "").await;
            }
            rig.kill();

            // As a kubeconfig has it, where the supervisor is no pod.
            let kubeconfig = dir.join("kubeconfig");
            let user = |value: &str| {
                let text = format!(
                    "apiVersion: v1\nkind: Config\ncurrent-context: here\nclusters:\n- name: c\n  cluster: {{server: \
                     {:?}}}\nusers:\n- name: u\n  user: {{token: {value}}}\ncontexts:\n- name: here\n  context: \
                     {{cluster: c, user: u}}\n",
                    api.url
                );
                std::fs::write(&kubeconfig, text).unwrap();
            };
            user("two");
            rig.config = rig.config.replace(
                "api_server = ",
                &format!("kubeconfig = {:?}\napi_server = \"http://127.0.0.1:1\"\n# ", kubeconfig.display()),
            );
            rig.start();
            rig.client().await;
            until_health("pods", |health| health["current"] == true).await;
            wants("three");
            interrupt().await;
            until_health("pods", refused).await;
            user("three");
            until_health("pods", |health| health["current"] == true && health["sentence"] == "").await;
            let config = std::fs::read_to_string(&kubeconfig).unwrap();
            assert!(config.contains("three"));
            let told = http("/v1/kubernetes");
            assert!(!told.contains("three"), "no secret is told: {told}");
        });
    });
}

#[test]
fn a_watch_that_ends_without_a_word_is_not_asked_again_at_once() {
    in_namespaces("a_watch_that_ends_without_a_word_is_not_asked_again_at_once", |dir| {
        let devnet = devnet(|_| {});
        let api = KubeApi::start();
        api.fault(|faults| faults.mute = true);
        let mut rig = with_api(dir, &devnet, &api);
        rig.start();
        block_on(async {
            rig.client().await;
            until_health("pods", |health| health["known"] == true).await;
            let watches = || api.requests().iter().filter(|request| *request == "watch pods").count();
            tokio::time::sleep(Duration::from_secs(3)).await;
            // Pauses from a quarter of a second on, each twice the one before it, less jitter.
            assert!((2..=8).contains(&watches()), "{}", watches());
            api.fault(|faults| faults.mute = false);
            api.pod("default", "a", "uid-a", &[]);
            rig.netns("a").await;
            rig.add("a").await.unwrap();
        });
    });
}

#[test]
fn a_certificate_out_of_its_time_names_the_clock() {
    in_namespaces("a_certificate_out_of_its_time_names_the_clock", |dir| {
        let devnet = devnet(|_| {});
        let account = dir.join("account");
        std::fs::create_dir(&account).unwrap();
        let mut rig = with_api(dir, &devnet, &KubeApi::start());
        let config = rig.config.clone();
        for (years, says) in [(2090..2095, "not valid yet"), (2001..2005, "certificate expired")] {
            let (url, root) = kubeapi::out_of_time(years);
            std::fs::write(account.join("ca.crt"), root).unwrap();
            let at = config.find("api_server").unwrap();
            let rest = &config[at..];
            let rest = &rest[rest.find('\n').unwrap()..];
            rig.config = format!("{}api_server = {url:?}{rest}", &config[..at]);
            rig.start();
            block_on(async {
                rig.client().await;
                until_health("pods", |health| {
                    let sentence = health["sentence"].as_str().unwrap_or_default();
                    sentence.contains("cannot list pods")
                        && sentence.contains(says)
                        && sentence.contains("this node's clock reads 20")
                })
                .await;
                // And whoever waits for what nobody knows is told so too.
                rig.netns("a").await;
                let client = rig.client().await;
                let request = AddRequest { timeout_ms: 2000, ..rig.request("a") };
                let error = client.add(within(TIMEOUT), request).await.unwrap().unwrap_err();
                assert!(error.code == code::TRY_AGAIN && error.details.contains("clock"), "{error}");
            });
            rig.kill();
        }
    });
}

/// A pod as large as they are: most of it is who set which field.
fn large_pod(n: usize) -> Value {
    let field = json!({"f:metadata": {"f:annotations": {}, "f:labels": {}}, "f:spec": {"f:containers": {}}});
    let managed: Vec<Value> = (0..40)
        .map(|m| json!({"manager": format!("m{m}"), "operation": "Update", "fieldsV1": field}))
        .collect();
    let containers: Vec<Value> = (0..3)
        .map(|c| {
            let env: Vec<Value> =
                (0..20).map(|e| json!({"name": format!("VARIABLE_{e}"), "value": "v".repeat(60)})).collect();
            json!({"name": format!("c{c}"), "image": "registry.example/app:1", "env": env})
        })
        .collect();
    json!({
        "metadata": {
            "annotations": {"tailscale.com/tags": "tag:web", "last-applied": "x".repeat(2000)},
            "managedFields": managed,
            "ownerReferences": [{"kind": "ReplicaSet", "name": "rs", "controller": true}],
            "labels": {"app": format!("app-{n}")},
        },
        "spec": {"containers": containers},
    })
}

#[test]
fn what_is_known_of_many_pods_is_small() {
    in_namespaces("what_is_known_of_many_pods_is_small", |dir| {
        const PODS: u64 = 250;
        let devnet = devnet(|_| {});
        let api = KubeApi::start();
        api.page(100);
        for n in 0..usize::try_from(PODS).unwrap() {
            let name = format!("pod-{n}");
            api.pod("default", &name, &format!("uid-{n}"), &[]);
            api.change_pod("default", &name, large_pod(n));
        }
        let mut rig = with_api(dir, &devnet, &api);
        rig.start();
        block_on(async {
            rig.client().await;
            until_health("pods", |health| health["current"] == true).await;
            // And each once more.
            for n in 0..usize::try_from(PODS).unwrap() {
                api.change_pod("default", &format!("pod-{n}"), json!({"status": {"phase": "Running"}}));
            }
            rig.netns("a").await;
            api.pod("default", "a", "uid-a", &[]);
            rig.add("a").await.unwrap();
            let status = std::fs::read_to_string(format!("/proc/{}/status", rig.pid())).unwrap();
            let kib = |name: &str| -> u64 {
                let line = status.lines().find(|line| line.starts_with(name)).unwrap();
                line.split_whitespace().nth(1).unwrap().parse().unwrap()
            };
            let bytes = serde_json::to_vec(&api.get_pod("default", "pod-1").unwrap()).unwrap().len();
            println!(
                "{PODS} pods of {bytes} bytes: RSS {} KiB, anonymous {} KiB, at most ever {} KiB",
                kib("VmRSS:"),
                kib("RssAnon:"),
                kib("VmHWM:")
            );
            assert!(kib("RssAnon:") < 20 * 1024 + PODS * 50, "{status}");
        });
    });
}
