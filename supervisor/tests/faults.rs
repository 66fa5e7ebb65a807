//! What goes wrong, and what a pod and its caller see of it.

mod rig;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use podtether_devnet::AuthKeyOptions;
use podtether_devnet::fault::{Fault, Target};
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::node::{CheckRequest, GcRequest, code};
use rig::*;

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_killed_supervisor_comes_back_to_the_same_links() {
    in_namespaces("a_killed_supervisor_comes_back_to_the_same_links", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let (a, b) = (rig.netns("a").await, rig.netns("b").await);
            let (first, second) = tokio::join!(rig.add("a"), rig.add("b"));
            let (first, second) = (first.unwrap(), second.unwrap());
            echo(&b, 7);
            let to = SocketAddr::new(v4(&second), 7);
            reachable(&a, to);
            let before = rig.pod("a");
            let pinger = Pinger::start(&a, to, Duration::from_millis(5));
            tokio::time::sleep(Duration::from_millis(300)).await;
            rig.kill();
            tokio::time::sleep(Duration::from_millis(300)).await;
            let start = Instant::now();
            rig.start();
            rig.client().await;
            let after = rig.until("a", "running", |p| p["state"] == "running").await;
            println!("running again {:?} after the start", start.elapsed());
            for same in ["ifindex", "udpPort", "udp6Port", "addresses", "mac"] {
                assert_eq!(after[same], before[same], "{same}");
            }
            tokio::time::sleep(Duration::from_millis(1000)).await;
            let back = pinger.finish();
            let tail = &back[back.len() - 50..];
            assert!(tail.iter().all(Option::is_some), "traffic flows again: {tail:?}");
            assert_eq!(rig.add("a").await.unwrap(), first, "ADD after the restart: the same answer");
            assert_eq!(devnet.nodes().len(), 2, "nobody registered anew");

            // Politely, while a pod's namespace goes away.
            rig.terminate();
            drop(a);
            podtether_net::netns::unpin(&rig.netns_path("a")).unwrap();
            rig.start();
            rig.client().await;
            rig.until("b", "running", |p| p["state"] == "running").await;
            rig.until("a", "cleaned up", serde_json::Value::is_null).await;
            assert_eq!(devnet.nodes().len(), 2, "a pod that vanished may come back for its identity");
            rig.netns("a").await;
            let mut again = rig.request("a");
            again.attachment.container_id = "c-a-new".into();
            let client = rig.client().await;
            let attached = client.add(within(TIMEOUT), again).await.unwrap().unwrap();
            assert_eq!(attached.addresses, first.addresses, "same pod, new sandbox, same addresses");
            rig.del("a").await.unwrap();
            assert_eq!(rig.pod("a")["state"], "running", "a late DEL of the old sandbox touches nothing");
        });
    });
}

#[test]
fn a_newer_sandbox_takes_the_identity_over() {
    in_namespaces("a_newer_sandbox_takes_the_identity_over", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            rig.netns("a").await;
            let first = rig.add("a").await.unwrap();
            rig.netns("a2").await;
            let mut newer = rig.request("a");
            newer.attachment.container_id = "c-a2".into();
            newer.netns = rig.netns_path("a2").display().to_string();
            let client = rig.client().await;
            let attached = client.add(within(TIMEOUT), newer.clone()).await.unwrap().unwrap();
            assert_eq!(attached.addresses, first.addresses);
            rig.del("a").await.unwrap();

            // One that fails on its way leaves the device as it was.
            let mut failing = newer.clone();
            failing.attachment.container_id = "c-a3".into();
            failing.netns = rig.netns_path("nobodys").display().to_string();
            let error = client.add(within(TIMEOUT), failing).await.unwrap().unwrap_err();
            assert_eq!(error.code, code::UNKNOWN_CONTAINER);
            assert_eq!(devnet.nodes().len(), 1);
            let attached = client.add(within(TIMEOUT), newer.clone()).await.unwrap().unwrap();
            assert_eq!(attached.addresses, first.addresses);
            rig.until("a", "up", |p| p["state"] == "running" && p["containerId"] == "c-a2").await;
            assert_eq!(devnet.nodes().len(), 1);
            client.del(within(TIMEOUT), newer.attachment).await.unwrap().unwrap();
            assert!(devnet.wait_for(SOON, <[_]>::is_empty).await);
            rig.until_clean(SOON).await;
        });
    });
}

#[test]
fn add_fails_in_time_and_leaves_nothing() {
    in_namespaces("add_fails_in_time_and_leaves_nothing", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.config.push_str("exempt_namespaces = [\"kube-system\"]\n");
        rig.start();
        block_on(async {
            let client = rig.client().await;
            rig.netns("a").await;
            let mut request = rig.request("a");
            request.timeout_ms = 3000;
            let add = async |request: &podtether_proto::node::AddRequest| {
                let start = Instant::now();
                let result = client.add(within(TIMEOUT), request.clone()).await.unwrap();
                let took = start.elapsed();
                println!("{took:?}: {result:?}");
                assert!(took < Duration::from_millis(request.timeout_ms), "{took:?}");
                result.map_err(|e| (e.code, format!("{} {}", e.msg, e.details)))
            };

            // Control is away, the API is there: the key that was minted goes.
            devnet.set_fault(Target::Upgrade, Fault::hang());
            let (code, text) = add(&request).await.unwrap_err();
            assert_eq!(code, code::TRY_AGAIN, "{text}");
            assert!(text.contains("rolled back") && text.contains("minted auth key was deleted"), "{text}");
            assert!(devnet.auth_keys().iter().all(|k| k.revoked || k.used), "{:?}", devnet.auth_keys());
            assert_eq!(rig.leftovers(), [""; 0]);
            devnet.clear_faults();

            // Everything is away.
            devnet.set_refusing(true);
            let (code, text) = add(&request).await.unwrap_err();
            assert_eq!(code, code::TRY_AGAIN, "{text}");
            assert_eq!(rig.leftovers(), [""; 0]);
            devnet.set_refusing(false);

            // The API is limiting: not even tried until the deadline.
            devnet.set_fault(Target::Api, Fault::rate_limit(60).times(1));
            let (code, text) = add(&request).await.unwrap_err();
            assert_eq!(code, code::TRY_AGAIN);
            assert!(text.contains("rate limited"), "{text}");

            let mut wrong = request.clone();
            wrong.tailnet = "nope".into();
            let (code, text) = add(&wrong).await.unwrap_err();
            assert!(code == code::BAD_CONFIG && text.contains("default"), "{text}");

            let mut wrong = request.clone();
            wrong.netns = "/proc/1/ns/none".into();
            let (code, text) = add(&wrong).await.unwrap_err();
            assert!(code == code::UNKNOWN_CONTAINER, "{text}");

            let mut wrong = request.clone();
            wrong.netns = "/proc/self/ns/net".into();
            let (code, text) = add(&wrong).await.unwrap_err();
            assert!(code == code::BAD_ENV && text.contains("node's own"), "{text}");

            let mut wrong = request.clone();
            wrong.attachment.ifname = "lo".into();
            let (code, _) = add(&wrong).await.unwrap_err();
            assert_eq!(code, code::BAD_ENV);

            let mut exempt = request.clone();
            exempt.pod.namespace = "kube-system".into();
            assert!(add(&exempt).await.unwrap().is_nothing());
            assert_eq!(rig.leftovers(), [""; 0]);
        });
        assert!(devnet.nodes().is_empty());
    });
}

#[test]
fn credentials_that_do_not_work_are_named() {
    in_namespaces("credentials_that_do_not_work_are_named", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        let reusable = devnet.create_auth_key(AuthKeyOptions {
            reusable: true,
            tags: vec!["tag:k8s-pod".into()],
            ..AuthKeyOptions::default()
        });
        std::fs::write(dir.join("auth-key"), &reusable.secret).unwrap();
        std::fs::write(dir.join("wrong"), "tskey-client-wrong").unwrap();
        let table = Rig::table("wrong", dir, &devnet).replace("/secret\"", "/wrong\"");
        rig.config = format!(
            "{table}\n[tailnet.key]\ncontrol_url = {:?}\nca_file = \"{dir}/wrong-ca.pem\"\n\
             [tailnet.key.credentials]\nkind = \"auth-key\"\nauth_key_file = \"{dir}/auth-key\"\n{}",
            devnet.http_url(),
            rig.config,
            dir = dir.display()
        );
        rig.start();
        block_on(async {
            let client = rig.client().await;
            rig.netns("a").await;
            let mut request = rig.request("a");
            request.tailnet = "wrong".into();
            let error = client.add(within(TIMEOUT), request.clone()).await.unwrap().unwrap_err();
            assert_eq!(error.code, code::REFUSED, "{error}");
            assert!(error.msg.contains("OAuth client id and secret"), "{error}");

            request.tailnet = "key".into();
            client.add(within(TIMEOUT), request.clone()).await.unwrap().unwrap();
            client.del(within(TIMEOUT), request.attachment.clone()).await.unwrap().unwrap();
            assert!(
                devnet.wait_for(SOON, |nodes| nodes.iter().all(|n| n.expired)).await,
                "logged out: {:?}",
                devnet.nodes()
            );

            assert!(devnet.revoke_auth_key(&reusable.id));
            let error = client.add(within(TIMEOUT), request.clone()).await.unwrap().unwrap_err();
            assert_eq!(error.code, code::REFUSED, "{error}");
            assert!(error.msg.contains("refused the auth key"), "{error}");
            std::fs::write(dir.join("auth-key"), "\n").unwrap();
            let error = client.add(within(TIMEOUT), request).await.unwrap().unwrap_err();
            assert!(error.code == code::REFUSED && error.msg.contains("is empty"), "{error}");
            rig.until_clean(SOON).await;
        });
    });
}

#[test]
fn an_engine_that_hangs_is_replaced() {
    in_namespaces("an_engine_that_hangs_is_replaced", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            rig.netns("a").await;
            rig.add("a").await.unwrap();
            tokio::time::sleep(Duration::from_millis(1100)).await;
            let before = rig.pod("a")["enginePid"].as_u64().unwrap();
            let start = Instant::now();
            signal(u32::try_from(before).unwrap(), libc::SIGSTOP);
            let pod = rig
                .until("a", "replaced", |p| p["enginePid"].as_u64().is_some_and(|pid| pid != before))
                .await;
            println!("replaced after {:?}", start.elapsed());
            assert!(start.elapsed() < Duration::from_millis(7500), "{:?}", start.elapsed());
            assert_eq!(pod["restarts"], 1);
            rig.until("a", "running", |p| p["state"] == "running").await;
        });
    });
}

#[test]
fn control_forgets_expires_and_deletes() {
    in_namespaces("control_forgets_expires_and_deletes", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            rig.netns("a").await;
            rig.add("a").await.unwrap();
            let node = devnet.nodes()[0].clone();
            devnet.expire_node(node.id);
            let renewed = |nodes: &[podtether_devnet::NodeInfo]| {
                nodes.len() == 1 && nodes[0].node_key != node.node_key && nodes[0].streaming
            };
            assert!(devnet.wait_for(SOON, renewed).await, "a new node key: {:?}", devnet.nodes());
            rig.until("a", "running", |p| p["state"] == "running").await;
            let node = devnet.nodes()[0].clone();
            assert!(devnet.delete_node(node.id));
            let anew = |nodes: &[podtether_devnet::NodeInfo]| nodes.len() == 1 && nodes[0].streaming;
            assert!(devnet.wait_for(SOON, anew).await, "registered anew: {:?}", devnet.nodes());
            rig.until("a", "running", |p| p["state"] == "running" && p["controlConnected"] == true).await;

            // Control and API are away while the pod goes: DEL does not wait for them.
            devnet.set_refusing(true);
            devnet.drop_connections();
            let start = Instant::now();
            rig.del("a").await.unwrap();
            println!("DEL without control took {:?}", start.elapsed());
            assert!(start.elapsed() < Duration::from_secs(8));
            assert_eq!(devnet.nodes().len(), 1);
            devnet.set_refusing(false);
            assert!(devnet.wait_for(Duration::from_secs(20), <[_]>::is_empty).await, "{:?}", devnet.nodes());
            rig.until_clean(SOON).await;
        });
    });
}

#[test]
fn two_tailnets_with_the_same_addresses() {
    in_namespaces("two_tailnets_with_the_same_addresses", |dir| {
        let (one, two) = (devnet(|_| {}), devnet(|_| {}));
        let mut rig = Rig::oauth(dir, &one);
        let (id, secret) = two.oauth_client();
        std::fs::write(dir.join("id2"), id).unwrap();
        std::fs::write(dir.join("secret2"), secret).unwrap();
        let table =
            Rig::table("two", dir, &two).replace("/id\"", "/id2\"").replace("/secret\"", "/secret2\"");
        rig.config = format!("{table}\n{}", rig.config);
        rig.start();
        block_on(async {
            let client = rig.client().await;
            let mut spaces = Vec::new();
            let mut made = Vec::new();
            for (name, tailnet) in [("a", "default"), ("b", "default"), ("c", "two"), ("d", "two")] {
                spaces.push(rig.netns(name).await);
                let mut request = rig.request(name);
                request.tailnet = tailnet.into();
                made.push(client.add(within(TIMEOUT), request).await.unwrap().unwrap());
            }
            assert_eq!(made[0].addresses, made[2].addresses);
            assert_eq!(made[1].addresses, made[3].addresses);
            tcp_echo(&spaces[1], &spaces[0], SocketAddr::new(v4(&made[1]), 80));
            tcp_echo(&spaces[3], &spaces[2], SocketAddr::new(v4(&made[3]), 80));
            assert_eq!((one.nodes().len(), two.nodes().len()), (2, 2));
        });
    });
}

#[test]
fn check_and_gc() {
    in_namespaces("check_and_gc", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let client = rig.client().await;
            let ns = rig.netns("a").await;
            rig.netns("b").await;
            let attached = rig.add("a").await.unwrap();
            rig.add("b").await.unwrap();
            let request = CheckRequest {
                attachment: attachment("a"),
                netns: rig.netns_path("a").display().to_string(),
                addresses: attached.addresses.clone(),
                routes: attached.routes.iter().map(|r| r.dst).collect(),
            };
            client.check(within(TIMEOUT), request.clone()).await.unwrap().unwrap();
            let mut wrong = request.clone();
            wrong.addresses = vec!["100.64.9.9/32".parse().unwrap()];
            let error = client.check(within(TIMEOUT), wrong).await.unwrap().unwrap_err();
            assert!(error.msg.contains("100.64.9.9"), "{error}");

            let netlink = podtether_net::netlink::Netlink::open(&ns).await.unwrap();
            let link = netlink.link("ts0").await.unwrap().unwrap();
            netlink.delete_address(link.index, attached.addresses[0]).await.unwrap();
            let error = client.check(within(TIMEOUT), request).await.unwrap().unwrap_err();
            assert_eq!(error.code, code::CHECK_FAILED);
            println!("{error}");

            let other = GcRequest { network: "other".into(), valid: vec![] };
            client.gc(within(TIMEOUT), other).await.unwrap().unwrap();
            assert_eq!(devnet.nodes().len(), 2, "another network's garbage is not ours");
            let gc = GcRequest { network: "net".into(), valid: vec![("c-b".into(), "eth0".into())] };
            client.gc(within(TIMEOUT), gc).await.unwrap().unwrap();
            assert!(devnet.wait_for(SOON, |n| n.len() == 1 && n[0].name == "k8s-default-b").await);
            assert_eq!(rig.pod("b")["state"], "running");
        });
    });
}

#[test]
fn damaged_records_and_a_second_supervisor() {
    in_namespaces("damaged_records_and_a_second_supervisor", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            rig.netns("a").await;
            rig.netns("b").await;
            rig.add("a").await.unwrap();
            rig.add("b").await.unwrap();
            // Records are brought up to date behind the answer.
            let saved = |name: &str| {
                std::fs::read_dir(dir.join("state/attachments")).unwrap().flatten().any(|e| {
                    let text = std::fs::read_to_string(e.path()).unwrap();
                    text.contains(&format!("c-{name}")) && text.contains("/128")
                })
            };
            let start = Instant::now();
            while !(saved("a") && saved("b")) {
                assert!(start.elapsed() < SOON);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }

            let output = rig.command(&dir.join("supervisor.toml"));
            let second = tokio::process::Command::from(output)
                .stderr(std::process::Stdio::piped())
                .output()
                .await
                .unwrap();
            let said = String::from_utf8_lossy(&second.stderr);
            assert!(!second.status.success());
            assert!(said.contains("another supervisor uses the state directory"), "{said}");
            assert_eq!(rig.pod("a")["state"], "running", "the first goes on");

            rig.terminate();
            let record = |name: &str| {
                std::fs::read_dir(dir.join("state/attachments"))
                    .unwrap()
                    .flatten()
                    .map(|e| e.path())
                    .find(|p| std::fs::read_to_string(p).unwrap().contains(&format!("c-{name}")))
                    .unwrap()
            };
            let torn = record("a");
            let text = std::fs::read(&torn).unwrap();
            std::fs::write(&torn, &text[..text.len() / 2]).unwrap();
            rig.start();
            rig.client().await;
            rig.until("b", "running", |p| p["state"] == "running").await;
            assert!(rig.pod("a").is_null());
            assert!(torn.with_extension("bad-torn").exists());
            assert!(http("/metrics").contains("podtether_records_aside 1"));
            tokio::time::sleep(Duration::from_millis(1500)).await;
            assert_eq!(devnet.nodes().len(), 2, "nobody is logged out because a file is damaged");
            rig.del("a").await.unwrap();
        });
    });
}

#[test]
fn a_wrong_configuration_stops_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("supervisor.toml");
    std::fs::write(&path, "[node]\nstate_dri = \"/x\"\n").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_podtether-supervisor"))
        .arg("--config")
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(78));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("unknown key node.state_dri") && said.contains("did you mean state_dir?"),
        "{said}"
    );
}

#[test]
fn an_identity_outlives_its_sandbox_by_the_grace() {
    in_namespaces("an_identity_outlives_its_sandbox_by_the_grace", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.config.push_str("identity_grace = \"3s\"\n");
        rig.start();
        block_on(async {
            rig.netns("a").await;
            let first = rig.add("a").await.unwrap();
            rig.del("a").await.unwrap();
            assert_eq!(devnet.nodes().len(), 1, "kept");
            assert_eq!(rig.add("a").await.unwrap().addresses, first.addresses);
            let start = Instant::now();
            rig.del("a").await.unwrap();
            assert!(devnet.wait_for(SOON, <[_]>::is_empty).await);
            assert!(start.elapsed() >= Duration::from_secs(2), "{:?}", start.elapsed());
        });
    });
}

#[test]
fn an_add_that_died_with_its_supervisor_is_rolled_back() {
    in_namespaces("an_add_that_died_with_its_supervisor_is_rolled_back", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let client = rig.client().await;
            let ns = rig.netns("a").await;
            devnet.set_fault(Target::Map, Fault::hang());
            let request = rig.request("a");
            let call = tokio::spawn(async move { client.add(within(TIMEOUT), request).await });
            assert!(devnet.wait_for(SOON, |nodes| nodes.len() == 1).await, "registered, without a netmap");
            rig.kill();
            assert!(call.await.unwrap().is_err());
            assert_ne!(rig.leftovers(), [""; 0]);
            devnet.clear_faults();
            rig.start();
            rig.client().await;
            assert!(devnet.wait_for(SOON, <[_]>::is_empty).await, "{:?}", devnet.nodes());
            rig.until_clean(SOON).await;
            let netlink = podtether_net::netlink::Netlink::open(&ns).await.unwrap();
            assert!(netlink.link("ts0").await.unwrap().is_none());
            rig.add("a").await.unwrap();
        });
    });
}

#[test]
fn a_full_disk_fails_an_add_and_nothing_else() {
    in_namespaces("a_full_disk_fails_an_add_and_nothing_else", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        let state = dir.join("state");
        std::fs::create_dir(&state).unwrap();
        let none: Option<&str> = None;
        nix::mount::mount(none, &state, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=64k"))
            .unwrap();
        rig.start();
        block_on(async {
            rig.netns("a").await;
            rig.netns("b").await;
            rig.add("a").await.unwrap();
            rig.until("a", "running", |p| p["state"] == "running").await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            let fill = state.join("fill");
            let _ = std::fs::write(&fill, vec![0; 1 << 20]);
            let error = rig.add("b").await.unwrap_err();
            assert_eq!(error.code, code::IO, "{error}");
            assert!(error.msg.contains("No space left"), "{error}");
            assert_eq!(rig.pod("a")["state"], "running");
            std::fs::remove_file(&fill).unwrap();
            rig.add("b").await.unwrap();
            rig.del("a").await.unwrap();
            rig.del("b").await.unwrap();
            rig.until_clean(SOON).await;
        });
    });
}
