//! Pods whose device waits for a person: a login by URL, an administrator's approval.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a panic is how a test fails; it says what it measured"
)]

mod rig;

use std::path::Path;
use std::time::{Duration, Instant};

use podtether_devnet::{AuthKeyOptions, Devnet};
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::node::{Attached, CniError, code};
use rig::*;

const SOON: Duration = Duration::from_secs(20);

/// ADD of a new sandbox of the pod called `name`.
async fn add_sandbox(rig: &Rig, name: &str, sandbox: u32, timeout_ms: u64) -> Result<Attached, CniError> {
    let mut request = rig.request(name);
    request.attachment.container_id = format!("c-{name}-{sandbox}");
    request.timeout_ms = timeout_ms;
    rig.client().await.add(within(Duration::from_secs(30)), request).await.unwrap()
}

fn tailnet(dir: &Path, devnet: &Devnet, credentials: &str) -> String {
    std::fs::write(dir.join("ca.pem"), devnet.ca_pem()).unwrap();
    format!(
        "[tailnet.default]\ncontrol_url = {:?}\nca_file = \"{}/ca.pem\"\n{credentials}",
        devnet.http_url(),
        dir.display()
    )
}

fn identities(dir: &Path) -> usize {
    std::fs::read_dir(dir.join("state/identities")).unwrap().count()
}

#[test]
fn a_login_outlives_the_add_that_failed_for_it() {
    in_namespaces("a_login_outlives_the_add_that_failed_for_it", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::new(dir, &tailnet(dir, &devnet, ""));
        rig.start();
        block_on(async {
            rig.netns("a").await;
            let refused = async |sandbox| {
                let began = Instant::now();
                let failure = add_sandbox(&rig, "a", sandbox, 20_000).await.unwrap_err();
                assert_eq!(failure.code, code::NEEDS_ACTION, "{failure}");
                assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
                let start = failure.details.find("http://").unwrap();
                failure.details[start..].split([';', ' ']).next().unwrap().to_owned()
            };
            let url = refused(1).await;
            assert!(url.contains("/register/"), "{url}");
            assert_eq!(identities(dir), 1, "the keys that the URL is for are kept");
            assert_eq!(refused(2).await, url, "the same URL while it is good");
            assert!(devnet.nodes().is_empty());
            devnet.forget_logins();
            let newer = refused(3).await;
            assert_ne!(newer, url);
            devnet.approve_login(&newer).unwrap();
            let attached = add_sandbox(&rig, "a", 4, 20_000).await.unwrap();
            let node = devnet.nodes()[0].clone();
            assert_eq!(attached.addresses.len(), node.addresses.len());

            // Its key runs out: the pod says so, and goes on when somebody logs it in again.
            devnet.expire_node(node.id);
            let pod = rig.until("a", "waiting for a login", |p| p["state"] == "needs-login").await;
            let url = pod["loginUrl"].as_str().unwrap().to_owned();
            assert!(pod["reason"].as_str().unwrap().contains(&url), "{pod}");
            let metrics = http("/metrics");
            let line = metrics.lines().find(|line| line.starts_with("podtether_pod_needs_login{")).unwrap();
            assert!(line.ends_with(" 1"), "{line}");
            assert!(!metrics.contains(&url), "whoever reads metrics could log the device in");
            devnet.approve_login(&url).unwrap();
            let pod = rig.until("a", "running again", |p| p["state"] == "running").await;
            let renewed = devnet.nodes()[0].clone();
            assert_ne!(renewed.node_key, node.node_key, "a new node key");
            assert_eq!((renewed.id, &renewed.addresses), (node.id, &node.addresses), "for the same node");
            assert_eq!(pod["loginUrl"], "");
            assert!(!http("/metrics").contains("podtether_pod_needs_login{"));
            assert_eq!(devnet.complaints(), [""; 0]);
        });
    });
}

#[test]
fn a_login_outlives_the_supervisor() {
    in_namespaces("a_login_outlives_the_supervisor", |dir| {
        let devnet = devnet(|_| {});
        let mut rig =
            Rig::new(dir, &tailnet(dir, &devnet, "[tailnet.default.credentials]\nkind = \"interactive\"\n"));
        rig.start();
        let first = block_on(async {
            rig.netns("a").await;
            add_sandbox(&rig, "a", 1, 20_000).await.unwrap_err()
        });
        rig.kill();
        rig.start();
        block_on(async {
            let second = add_sandbox(&rig, "a", 2, 20_000).await.unwrap_err();
            assert_eq!((second.code, &second.msg), (code::NEEDS_ACTION, &first.msg));
            let url = |failure: &CniError| failure.details.split([';', ' ']).nth(1).unwrap().to_owned();
            assert_eq!(url(&first), url(&second));
            devnet.approve_login(&url(&second)).unwrap();
            add_sandbox(&rig, "a", 3, 20_000).await.unwrap();
        });
    });
}

#[test]
fn approval_is_waited_for_and_outlives_the_add() {
    in_namespaces("approval_is_waited_for_and_outlives_the_add", |dir| {
        let devnet = devnet(|_| {});
        devnet.set_device_approval(true);
        let options = AuthKeyOptions {
            reusable: true,
            preauthorized: false,
            tags: vec!["tag:k8s-pod".into()],
            ..AuthKeyOptions::default()
        };
        std::fs::write(dir.join("key"), devnet.create_auth_key(options).secret).unwrap();
        let credentials = format!(
            "[tailnet.default.credentials]\nkind = \"auth-key\"\nauth_key_file = \"{}/key\"\n",
            dir.display()
        );
        let mut rig = Rig::new(dir, &tailnet(dir, &devnet, &credentials));
        rig.start();
        block_on(async {
            rig.netns("a").await;
            let failure = add_sandbox(&rig, "a", 1, 5000).await.unwrap_err();
            assert_eq!(failure.code, code::NEEDS_ACTION, "{failure}");
            assert!(failure.to_string().contains("approve"), "{failure}");
            let node = devnet.nodes()[0].clone();
            assert!(!node.expired && !node.authorized, "what an administrator sees is still there: {node:?}");

            // Approved while the next ADD waits.
            let approve = async {
                let streams = |nodes: &[podtether_devnet::NodeInfo]| nodes.iter().any(|n| n.streaming);
                assert!(devnet.wait_for(SOON, streams).await);
                rig.until("a", "waiting for approval", |p| p["state"] == "needs-approval").await;
                assert!(devnet.set_authorized(node.id, true));
            };
            let (attached, ()) = tokio::join!(add_sandbox(&rig, "a", 2, 20_000), approve);
            attached.unwrap();
            assert_eq!((devnet.nodes().len(), devnet.nodes()[0].id), (1, node.id), "the same device");
            assert_eq!(rig.pod("a")["restarts"], 0, "without a restart");
            assert_eq!(devnet.complaints(), [""; 0]);
        });
    });
}

#[test]
fn peers_follow_a_new_key_and_a_crash_in_between_loses_nothing() {
    in_namespaces("peers_follow_a_new_key_and_a_crash_in_between_loses_nothing", |dir| {
        let devnet = devnet(|_| {});
        // Servers do not renew a tagged node, so it is a user's.
        let options = AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() };
        std::fs::write(dir.join("key"), devnet.create_auth_key(options).secret).unwrap();
        let credentials = format!(
            "[tailnet.default.credentials]\nkind = \"auth-key\"\nauth_key_file = \"{}/key\"\n",
            dir.display()
        );
        let mut rig = Rig::new(dir, &tailnet(dir, &devnet, &credentials));
        rig.start();
        let (a, b, to) = block_on(async {
            let (a, b) = (rig.netns("a").await, rig.netns("b").await);
            let (first, second) = tokio::join!(rig.add("a"), rig.add("b"));
            first.unwrap();
            (a, b, std::net::SocketAddr::new(v4(&second.unwrap()), 7))
        });
        echo(&b, 7);
        reachable(&a, to);
        let before = devnet.nodes();
        let node = |name: &str| devnet.nodes().into_iter().find(|n| n.name.ends_with(name)).unwrap();
        // The supervisor dies at some step or other of the rotation, and is continued.
        for after_ms in [None, Some(0), Some(20), Some(60), Some(150), Some(400)] {
            let old = node("-b");
            let pings = Pinger::start(&a, to, Duration::from_millis(20));
            std::thread::sleep(Duration::from_millis(200));
            devnet.expire_node(old.id);
            if let Some(ms) = after_ms {
                std::thread::sleep(Duration::from_millis(ms));
                rig.kill();
                rig.start();
            }
            let renewed = block_on(async {
                let renewed = devnet.wait_for(SOON, |nodes| {
                    nodes
                        .iter()
                        .any(|n| n.id == old.id && n.node_key != old.node_key && n.streaming && !n.expired)
                });
                let renewed = renewed.await;
                rig.client().await;
                for name in ["a", "b"] {
                    rig.until(name, "running", |p| p["state"] == "running" && p["controlConnected"] == true)
                        .await;
                }
                renewed
            });
            assert!(renewed, "killed after {after_ms:?}: {:?}", devnet.nodes());
            std::thread::sleep(Duration::from_millis(500));
            let back = pings.finish();
            let lost = back.iter().filter(|answer| answer.is_none()).count();
            println!("killed after {after_ms:?} ms: {lost} of {} pings at 20 ms lost", back.len());
            assert!(back.iter().rev().take(5).all(Option::is_some), "killed after {after_ms:?}: {back:?}");
            // Between the expiry and the new key nobody speaks to the node, rightly.
            assert!(lost < 250, "killed after {after_ms:?}: {lost} pings lost");
            assert_eq!(devnet.nodes().len(), 2, "killed after {after_ms:?}: no second device");
            assert_eq!(node("-b").addresses, old.addresses, "killed after {after_ms:?}");
        }
        // The key is on disk before control has it: whoever reads that disk goes on with it.
        let old = node("-b");
        devnet.expire_node(old.id);
        let learned = |nodes: &[podtether_devnet::NodeInfo]| {
            nodes.iter().any(|n| n.id == old.id && n.node_key != old.node_key)
        };
        assert!(block_on(devnet.wait_for(SOON, learned)));
        rig.kill();
        let key = node("-b").node_key;
        rig.start();
        block_on(async {
            rig.client().await;
            let pod = rig.until("b", "running", |p| p["state"] == "running").await;
            let pid = pod["enginePid"].as_u64().unwrap();
            signal(u32::try_from(pid).unwrap(), libc::SIGKILL);
            rig.until("b", "running again", |p| {
                p["state"] == "running" && p["controlConnected"] == true && p["enginePid"] != pid
            })
            .await;
        });
        assert_eq!(node("-b").node_key, key);
        reachable(&a, to);
        assert_eq!(
            devnet.nodes().iter().map(|n| n.id).collect::<Vec<_>>(),
            before.iter().map(|n| n.id).collect::<Vec<_>>()
        );
        block_on(async {
            let (one, two) = tokio::join!(rig.del("a"), rig.del("b"));
            one.unwrap();
            two.unwrap();
        });
        assert_eq!(devnet.complaints(), [""; 0]);
    });
}
