//! What the cluster is told of its pods.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod kubeapi;
mod rig;

use std::path::Path;

use kubeapi::KubeApi;
use podtether_devnet::Devnet;
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::node::{AddRequest, code};
use rig::*;
use serde_json::{Value, json};

fn with_api(dir: &Path, devnet: &Devnet, api: &KubeApi) -> Rig {
    let mut rig = Rig::oauth(dir, devnet);
    rig.config.push_str(&format!(
        "name = \"node-1\"\napi_server = {:?}\nservice_account_dir = \"{}/account\"\n",
        api.url,
        dir.display()
    ));
    rig
}

fn gated(api: &KubeApi, name: &str, annotations: &[(&str, &str)]) {
    api.pod("default", name, &format!("uid-{name}"), annotations);
    api.change_pod(
        "default",
        name,
        json!({"spec": {"readinessGates": [{"conditionType": "podtether.dev/ready"}]}}),
    );
}

fn ready(api: &KubeApi, name: &str) -> Option<(String, String, String)> {
    let pod = api.get_pod("default", name)?;
    let conditions = pod["status"]["conditions"].as_array()?.clone();
    let found = conditions.iter().find(|c| c["type"] == "podtether.dev/ready")?;
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("reason"), text("message")))
}

#[test]
fn what_happens_to_pods_is_told_to_the_cluster() {
    in_namespaces("what_happens_to_pods_is_told_to_the_cluster", |dir| {
        let devnet = devnet(|_| {});
        let api = KubeApi::start();
        let mut rig = with_api(dir, &devnet, &api);
        rig.start();
        block_on(async {
            let client = rig.client().await;
            let add = async |request: AddRequest| client.add(within(TIMEOUT), request).await.unwrap();
            for name in ["a", "b", "c"] {
                rig.netns(name).await;
            }
            gated(&api, "a", &[]);
            let attached = rig.add("a").await.unwrap();
            let told = api.until("it is ready", |api| ready(api, "a").filter(|told| told.0 == "True")).await;
            assert_eq!(told.1, "Joined");
            let addresses: Vec<String> = attached.addresses.iter().map(|a| a.addr().to_string()).collect();
            let pod = api.get_pod("default", "a").unwrap();
            let annotations = &pod["metadata"]["annotations"];
            assert_eq!(annotations["podtether.dev/addresses"], addresses.join(","));
            assert_eq!(annotations["podtether.dev/name"], "k8s-default-a.tailnet.test");
            let expiry = annotations["podtether.dev/key-expiry"].as_str().unwrap();
            assert!(expiry == "never" || expiry.ends_with('Z'), "{expiry}");
            let event = api.until("it is told", |api| api.events_of("a").first().cloned()).await;
            assert_eq!((event.0.as_str(), event.1.as_str()), ("Normal", "Joined"));
            assert!(
                event.2.contains("k8s-default-a.tailnet.test") && event.2.contains(&addresses[0]),
                "{event:?}"
            );

            // Bad values: an event and a condition that name the annotation and the fix.
            api.pod("default", "b", "uid-b", &[("tailscale.com/tags", "tag:admin")]);
            let error = add(rig.request("b")).await.unwrap_err();
            assert_eq!(error.code, code::BAD_CONFIG);
            let told = api.until("a condition", |api| ready(api, "b")).await;
            assert_eq!((told.0.as_str(), told.1.as_str()), ("False", "AnnotationRefused"));
            for text in [told.2, api.events_of("b")[0].2.clone()] {
                assert!(
                    text.contains("tailscale.com/tags") && text.contains("namespace.default.tags"),
                    "{text}"
                );
            }
            // The runtime tries again and again; the event is not repeated.
            for _ in 0..3 {
                add(rig.request("b")).await.unwrap_err();
            }

            // A tag that the credential does not own.
            rig.kill();
            rig.config = rig.config.replace("[\"tag:k8s-pod\"]", "[\"tag:k8s-pod\", \"tag:not-owned\"]");
            rig.start();
            let client = rig.client().await;
            api.pod("default", "c", "uid-c", &[]);
            let error = client.add(within(TIMEOUT), rig.request("c")).await.unwrap().unwrap_err();
            assert_eq!(error.code, code::REFUSED);
            let told = api.until("an event", |api| api.events_of("c").first().cloned()).await;
            assert_eq!((told.0.as_str(), told.1.as_str()), ("Warning", "JoinRefused"));
            assert!(told.2.contains("tag:not-owned"), "{told:?}");
            assert_eq!(api.events_of("a").len(), 1, "another supervisor does not tell it again");
            assert_eq!(api.events_of("b").len(), 1);
            let patches = api.patches();
            let of_a = patches.iter().filter(|(path, _)| path.contains("/pods/a")).count();
            assert!(of_a <= 4, "few patches: {patches:?}");
            assert!(patches.iter().all(|(_, patch)| patch["metadata"]["uid"].is_string()));
        });
    });
}

#[test]
fn who_may_not_tell_says_so_and_goes_on() {
    in_namespaces("who_may_not_tell_says_so_and_goes_on", |dir| {
        let devnet = devnet(|_| {});
        let api = KubeApi::start();
        api.fault(|faults| {
            faults.forbidden = ["patch pods", "create events"].map(str::to_owned).into();
        });
        let mut rig = with_api(dir, &devnet, &api);
        rig.start();
        block_on(async {
            rig.client().await;
            rig.netns("a").await;
            api.pod("default", "a", "uid-a", &[]);
            rig.add("a").await.unwrap();
            for (what, verb) in [("patches", "patch pods"), ("events", "create events")] {
                let begun = std::time::Instant::now();
                loop {
                    let all: Value = serde_json::from_str(&http("/v1/kubernetes")).unwrap();
                    let health = all.as_array().unwrap().iter().find(|h| h["what"] == what).cloned().unwrap();
                    let sentence = health["sentence"].as_str().unwrap();
                    if sentence.contains(verb) && sentence.contains("ClusterRole") {
                        break;
                    }
                    assert!(begun.elapsed() < TIMEOUT, "{health}");
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
            }
            // It is not asked again at once, and the pod is none the worse.
            let asked = |api: &KubeApi| api.requests().iter().filter(|r| *r == "patch pods").count();
            assert_eq!(asked(&api), 1);
            assert_eq!(rig.pod("a")["state"], "running");
            rig.del("a").await.unwrap();
        });
    });
}

#[test]
fn what_somebody_else_changed_at_the_same_time_is_told_again() {
    in_namespaces("what_somebody_else_changed_at_the_same_time_is_told_again", |dir| {
        let devnet = devnet(|_| {});
        let api = KubeApi::start();
        api.fault(|faults| faults.conflicts = 2);
        let mut rig = with_api(dir, &devnet, &api);
        rig.start();
        block_on(async {
            rig.netns("a").await;
            gated(&api, "a", &[]);
            rig.add("a").await.unwrap();
            let named = |api: &KubeApi| {
                let pod = api.get_pod("default", "a")?;
                pod["metadata"]["annotations"]["podtether.dev/name"].as_str().map(str::to_owned)
            };
            assert_eq!(api.until("its name is told", named).await, "k8s-default-a.tailnet.test");
            api.until("it is ready", |api| ready(api, "a").filter(|told| told.0 == "True")).await;
            assert_eq!(api.patches().len(), 4, "two in vain and two that were taken");
        });
    });
}

#[test]
fn a_clock_that_control_disagrees_with_is_named_to_the_pod() {
    in_namespaces("a_clock_that_control_disagrees_with_is_named_to_the_pod", |dir| {
        let api = KubeApi::start();
        let (url, root) = kubeapi::out_of_time(2090..2095);
        std::fs::write(dir.join("ca.pem"), root).unwrap();
        std::fs::write(dir.join("key"), "tskey-auth-x-y").unwrap();
        let at = dir.display();
        let tailnet = format!(
            "[tailnet.default]\ncontrol_url = {url:?}\nca_file = \"{at}/ca.pem\"\n[tailnet.default.credentials]\n\
             kind = \"auth-key\"\nauth_key_file = \"{at}/key\"\n",
        );
        let mut rig = Rig::new(dir, &tailnet);
        rig.config.push_str(&format!(
            "name = \"node-1\"\napi_server = {:?}\nservice_account_dir = \"/nowhere\"\n",
            api.url
        ));
        rig.start();
        block_on(async {
            let client = rig.client().await;
            rig.netns("a").await;
            api.pod("default", "a", "uid-a", &[]);
            let names_it =
                |text: &str| text.contains("not valid yet") && text.contains("this node's clock reads 20");
            // Until the engine has come so far within the runtime's patience.
            for timeout_ms in [4000, 16_000, 64_000] {
                let request = AddRequest { timeout_ms, ..rig.request("a") };
                let patience = std::time::Duration::from_millis(timeout_ms) + TIMEOUT;
                let error = client.add(within(patience), request).await.unwrap().unwrap_err();
                assert_eq!(error.code, code::TRY_AGAIN, "{error}");
                if names_it(&error.msg) {
                    break;
                }
                assert!(timeout_ms < 64_000, "{error}");
            }
            let told = |api: &KubeApi| api.events_of("a").into_iter().find(|event| names_it(&event.2));
            let event = api.until("an event", told).await;
            assert_eq!((event.0.as_str(), event.1.as_str()), ("Warning", "JoinFailed"));
        });
    });
}

#[test]
fn a_person_who_has_to_act_is_told_where() {
    in_namespaces("a_person_who_has_to_act_is_told_where", |dir| {
        let devnet = devnet(|_| {});
        let api = KubeApi::start();
        std::fs::write(dir.join("default-ca.pem"), devnet.ca_pem()).unwrap();
        let tailnet = format!(
            "[tailnet.default]\ncontrol_url = {:?}\nca_file = \"{}/default-ca.pem\"\n",
            devnet.http_url(),
            dir.display()
        );
        let mut rig = Rig::new(dir, &tailnet);
        rig.config.push_str(&format!(
            "name = \"node-1\"\napi_server = {:?}\nservice_account_dir = \"/nowhere\"\n",
            api.url
        ));
        rig.start();
        block_on(async {
            let client = rig.client().await;
            rig.netns("a").await;
            api.pod("default", "a", "uid-a", &[("tailscale.com/required", "false")]);
            client.add(within(TIMEOUT), rig.request("a")).await.unwrap().unwrap();
            let event = api.until("an event", |api| api.events_of("a").first().cloned()).await;
            assert_eq!((event.0.as_str(), event.1.as_str()), ("Warning", "WaitingForLogin"));
            let url = event.2.split_whitespace().find(|word| word.starts_with("http")).unwrap().to_owned();
            devnet.approve_login(&url).unwrap();
            api.until("it has joined", |api| {
                api.events_of("a").iter().any(|e| e.1 == "Joined").then_some(())
            })
            .await;
        });
    });
}

#[test]
fn devices_of_a_node_that_is_gone_are_cleaned_up() {
    in_namespaces("devices_of_a_node_that_is_gone_are_cleaned_up", |dir| {
        let devnet = devnet(|_| {});
        let api = KubeApi::start();
        let mut rig = with_api(dir, &devnet, &api);
        let long = std::time::Duration::from_secs(2 * 3600);
        let (tags, ours) = (["tag:k8s-pod"], "0.1.0-podtether");
        for (name, tags, version, away) in [
            ("k8s-default-ghost", &tags[..], ours, long),
            ("k8s-default-other-client", &tags[..], "1.90.6-t2b1c5f4a6", long),
            ("k8s-default-other-tag", &["tag:admin"][..], ours, long),
            ("prod-default-ghost", &tags[..], ours, long),
            ("k8s-default-just-away", &tags[..], ours, std::time::Duration::from_secs(60)),
            ("k8s-default-elsewhere", &tags[..], ours, long),
        ] {
            assert!(!devnet.add_node_of(name, tags, version, away).is_empty());
        }
        // Lives on another node, and nobody hears of its device just now.
        api.pod("default", "elsewhere", "uid-elsewhere", &[]);
        api.change_pod("default", "elsewhere", json!({"spec": {"nodeName": "node-2"}}));
        rig.start();
        block_on(async {
            let client = rig.client().await;
            rig.netns("a").await;
            api.pod("default", "a", "uid-a", &[]);
            rig.add("a").await.unwrap();
            let names = || devnet.nodes().into_iter().map(|node| node.name).collect::<Vec<_>>();
            let count = names().len();
            assert_eq!(count, 7);

            // Who cannot be sure of the pods removes nothing.
            api.fault(|faults| {
                faults.forbidden.insert("list pods".into());
            });
            let done = client.cleanup(within(TIMEOUT), false).await.unwrap().unwrap();
            assert!(done.ghosts.is_empty() && done.notes[0].contains("ClusterRole"), "{done:?}");
            api.fault(|faults| faults.forbidden.clear());

            let socket = dir.join("run/supervisor.sock");
            let run = |arguments: &[&str]| {
                let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_podtether"));
                let output =
                    command.arg("cleanup").arg("--socket").arg(&socket).args(arguments).output().unwrap();
                (String::from_utf8(output.stdout).unwrap(), output.status.success())
            };
            let (text, done) = run(&["--dry-run"]);
            assert!(
                done && text.contains("k8s-default-ghost.tailnet.test (tailnet default): would be deleted"),
                "{text}"
            );
            assert_eq!((text.lines().count(), names().len()), (1, count), "{text}");
            let done = client.cleanup(within(TIMEOUT), false).await.unwrap().unwrap();
            assert_eq!(done.ghosts.iter().map(|ghost| ghost.deleted).collect::<Vec<_>>(), [true], "{done:?}");
            assert!(!names().iter().any(|name| name.contains("default-ghost") && name.starts_with("k8s")));
            assert_eq!(names().len(), count - 1);
            assert!(client.cleanup(within(TIMEOUT), false).await.unwrap().unwrap().ghosts.is_empty());
        });
    });
}

/// A supervisor of another node, of which nobody asks anything by HTTP.
fn node(dir: &Path, name: &str, devnet: &Devnet, api: &KubeApi) -> Rig {
    let dir = dir.join(name);
    std::fs::create_dir(&dir).unwrap();
    let mut rig = with_api(&dir, devnet, api);
    rig.config = rig
        .config
        .replace("127.0.0.1:9465", "")
        .replace("\"node-1\"", &format!("\"{name}\""))
        .replace("tags = ", "hostname_template = \"{workload}\"\ntags = ");
    rig.config.push_str("[namespace.default]\nhostnames = [\"*\"]\n");
    rig.start();
    rig
}

/// What the API server has as the pod's name, once it has one.
fn told_name(api: &KubeApi, pod: &str) -> Option<String> {
    let pod = api.get_pod("default", pod)?;
    pod["metadata"]["annotations"]["podtether.dev/name"].as_str().map(str::to_owned)
}

fn taken(api: &KubeApi, pod: &str) -> Option<(String, String)> {
    let events = api.events_of(pod);
    events.into_iter().find(|event| event.1 == "HostNameTaken").map(|event| (event.0, event.2))
}

#[test]
fn of_two_nodes_that_give_one_name_one_gets_it() {
    in_namespaces("of_two_nodes_that_give_one_name_one_gets_it", |dir| {
        let devnet = devnet(|_| {});
        let api = KubeApi::start();
        let nodes = ["node-1", "node-2"].map(|name| node(dir, name, &devnet, &api));
        block_on(async {
            let pods = ["web-5d4f8c7b9-x2x4z", "web-5d4f8c7b9-b4b5c"];
            let mut adding = Vec::new();
            for (n, pod) in pods.iter().enumerate() {
                let rig = &nodes[n];
                rig.netns(pod).await;
                gated(&api, pod, &[]);
                api.change_pod("default", pod, json!({"spec": {"nodeName": format!("node-{}", n + 1)}}));
                let (client, request) = (rig.client().await, rig.request(pod));
                adding.push(async move { client.add(within(TIMEOUT), request).await.unwrap() });
            }
            for done in futures_util::future::join_all(adding).await {
                done.unwrap();
            }
            // At once, and nobody was ever known by a number.
            let mut names: Vec<String> = devnet.nodes().into_iter().map(|node| node.name).collect();
            names.sort();
            assert_eq!(names[0], "web", "{names:?}");
            let loser = pods.iter().find(|pod| names[1] == **pod).unwrap_or_else(|| panic!("{names:?}"));
            let told = api.until("its name is told", |api| told_name(api, loser)).await;
            assert_eq!(told, format!("{loser}.tailnet.test"));
            let event = api.until("an event", |api| taken(api, loser)).await;
            assert_eq!(event.0, "Normal", "it is no mistake: {event:?}");
            assert!(
                event.1.contains("another device called web, so this one is web-5d4f8c7b9-"),
                "{event:?}"
            );
            let told =
                api.until("it is ready", |api| ready(api, loser).filter(|told| told.0 == "True")).await;
            assert!(told.2.contains("another device called web"), "{told:?}");
            let winner = pods.iter().find(|pod| *pod != loser).unwrap();
            assert_eq!(taken(&api, winner), None);

            // A name that an annotation asks for, and somebody's machine has.
            let rig = &nodes[0];
            assert!(!devnet.add_node("db").is_empty());
            let hostname = [("tailscale.com/hostname", "db")];
            rig.netns("a-x2x4z").await;
            api.pod("default", "a-x2x4z", "uid-a-x2x4z", &hostname);
            rig.add("a-x2x4z").await.unwrap();
            let told = api.until("its name is told", |api| told_name(api, "a-x2x4z")).await;
            assert_eq!(told, "db-x2x4z.tailnet.test");
            let event = api.until("an event", |api| taken(api, "a-x2x4z")).await;
            assert!(event.0 == "Warning" && event.1.contains("another device called db,"), "{event:?}");
            let selector = podtether_proto::node::PodSelector::Pod {
                namespace: "default".into(),
                name: "a-x2x4z".into(),
            };
            let choice = rig.client().await.choice(within(TIMEOUT), selector).await.unwrap().unwrap();
            assert!(choice.notes[0].contains("taken by another device of tailnet default"), "{choice:?}");

            // All that it could be called is taken: the number stays, and is told.
            let whose = podtether_supervisor::hostname::Whose {
                cluster: "k8s",
                namespace: "default",
                pod: "b-x9x9z",
                owner: None,
            };
            for name in podtether_supervisor::hostname::names("db", whose).all().skip(1) {
                assert!(!devnet.add_node(&name).is_empty());
            }
            rig.netns("b-x9x9z").await;
            api.pod("default", "b-x9x9z", "uid-b-x9x9z", &hostname);
            rig.add("b-x9x9z").await.unwrap();
            let told = api.until("its name is told", |api| told_name(api, "b-x9x9z")).await;
            assert!(told.ends_with("-1.tailnet.test"), "{told}");
            let event = api.until("an event", |api| taken(api, "b-x9x9z")).await;
            assert!(event.0 == "Warning" && event.1.contains("tailscale.com/hostname"), "{event:?}");
        });
    });
}
