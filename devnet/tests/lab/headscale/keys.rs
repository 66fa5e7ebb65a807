//! Pods that join with Headscale's pre-auth keys, and a runtime's calls with many pods at once.

use std::time::Instant;

use podtether_devnet::lab::{CniCall, HeadscaleConfig, Node, Tailnet};
use podtether_devnet::probe::ping::ping;
use serde_json::json;

use super::{World, headscale_test, open_policy, wait_ping};
use crate::{TICK, wait_for, wait_for_within};

/// A tailnet table for a key that `preauthkeys create` makes with `arguments`.
fn keyed(world: &World, name: &str, arguments: &[&str]) -> Tailnet {
    let key = world.server.key(arguments).unwrap();
    Tailnet::other_auth_key(name, &world.server.url(), &world.server.ca_file, &key)
}

/// ADD into `tailnet` that must be refused: its code and words.
fn refused(node: &mut Node, pod: &str, tailnet: &str) -> (Option<u64>, String) {
    let pod = node.create_pod(pod).unwrap();
    let before = node.host_state().unwrap();
    let call = CniCall { tailnet: tailnet.into(), ..CniCall::new("ADD") };
    let outcome = pod.cni(node, &call).unwrap();
    println!("{tailnet}: {} in {:?}", outcome.answer, outcome.took);
    assert_eq!(before.diff(&node.host_state().unwrap()), [""; 0], "{tailnet}: nothing half-made");
    (outcome.code(), outcome.answer.to_string())
}

#[test]
fn auth_keys_of_every_kind() {
    let name = "headscale::keys::auth_keys_of_every_kind";
    let mut policy = open_policy();
    policy["tagOwners"] = json!({"tag:k8s-pod": [], "tag:two": []});
    let extra = "node: {ephemeral: {inactivity_timeout: 66s}}\n".to_owned();
    headscale_test(
        name,
        |_| HeadscaleConfig { extra, ..HeadscaleConfig::default() },
        &policy,
        |mut world| {
            let user = world.server.user("person").unwrap();
            let wrong = Tailnet::other_auth_key(
                "wrong",
                &world.server.url(),
                &world.server.ca_file,
                "hskey-auth-aaaaaaaaaaaa-bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
            );
            world.tailnets = vec![
                keyed(&world, "default", &["-u", &user, "--reusable"]),
                keyed(&world, "tagged", &["--tags", "tag:k8s-pod,tag:two", "--reusable"]),
                keyed(&world, "once", &["-u", &user]),
                keyed(&world, "ephemeral", &["--tags", "tag:two", "--reusable", "--ephemeral"]),
                keyed(&world, "expired", &["-u", &user, "--reusable", "-e", "1ms"]),
                wrong,
            ];
            world.add_node("");
            let (a, b) = (world.join(0, "a"), world.join(0, "b"));
            let (tagged, once) = (world.join_in(0, "t", "tagged"), world.join_in(0, "o", "once"));
            let gone = world.join_in(0, "e", "ephemeral");
            let killed = world.join_in(0, "f", "ephemeral");
            for pod in [&b, &tagged, &once, &gone, &killed] {
                wait_ping(&a.netns, pod.v4().unwrap(), &pod.name);
            }
            let tags = |name: &str| world.nodes[0].pod_report(name).unwrap()["tags"].clone();
            assert_eq!(tags("t"), json!(["tag:k8s-pod", "tag:two"]));
            assert_eq!(world.server.node("a").unwrap()["user"]["name"], "person");

            for (tailnet, words) in [("once", "used"), ("expired", "expired"), ("wrong", "")] {
                let (code, said) = refused(&mut world.nodes[0], &format!("r-{tailnet}"), tailnet);
                assert_eq!(code, Some(101), "{tailnet}: {said}");
                assert!(said.contains("key") && said.contains(words), "{tailnet}: {said}");
            }

            // A supervisor that starts again needs no key for those who are in.
            world.nodes[0].kill_supervisor().unwrap();
            world.nodes[0].start_supervisor().unwrap();
            for pod in [&b, &tagged, &once, &gone] {
                wait_ping(&a.netns, pod.v4().unwrap(), &pod.name);
            }

            // DEL logs out: an ephemeral node is gone at once, others stay as expired.
            gone.del(&world.nodes[0]).unwrap();
            wait_for("the ephemeral node to be gone", || world.server.node("e").is_err().then_some(()));
            once.del(&world.nodes[0]).unwrap();
            let expiry = wait_for("the other to be logged out", || {
                let node = world.server.node("o").ok()?;
                (node["online"] != true).then(|| node["expiry"].clone())
            });
            println!("logged out: expiry {expiry}");
            // One that just vanishes goes when Headscale has missed it for long enough.
            let start = Instant::now();
            world.nodes[0].kill_everything().unwrap();
            wait_for_within(std::time::Duration::from_secs(150), "the vanished node to be gone", || {
                world.server.node("f").is_err().then_some(())
            });
            println!("a vanished ephemeral node was gone after {:?}", start.elapsed());
            // It comes back as a new one, with the key it has.
            world.nodes[0].start_supervisor().unwrap();
            let back = wait_for_within(std::time::Duration::from_secs(150), "the pod to be back", || {
                let report = world.nodes[0].pod_report("f").ok()?;
                (report["state"] == "running" && world.server.node("f").is_ok()).then_some(report)
            });
            let address = back["addresses"][0].as_str().unwrap().parse().unwrap();
            wait_ping(&a.netns, address, "the pod that is back");
        },
    );
}

#[test]
fn a_runtime_makes_and_removes_many_pods_at_once() {
    let name = "headscale::keys::a_runtime_makes_and_removes_many_pods_at_once";
    headscale_test(
        name,
        |_| HeadscaleConfig::default(),
        &open_policy(),
        |mut world| {
            world.add_node("");
            let stock = world.join_stock("stock", &["--tags", "tag:k8s-pod"], &[]);
            let mut pods: Vec<_> =
                (0..8).map(|n| world.nodes[0].create_pod(&format!("p{n}")).unwrap()).collect();
            let before = world.nodes[0].host_state().unwrap();
            let start = Instant::now();
            let node = &world.nodes[0];
            std::thread::scope(|scope| {
                for pod in &mut pods {
                    scope.spawn(move || {
                        let took = pod.add(node).unwrap();
                        println!("ADD of {}: {took:?}", pod.name);
                    });
                }
            });
            println!("8 ADD at once: {:?}", start.elapsed());
            let version = |verb: &str| CniCall { version: "1.1.0".into(), ..CniCall::new(verb) };
            assert!(pods[0].cni(node, &version("STATUS")).unwrap().success);
            let from = &world.stocks[stock].node.netns;
            for pod in &pods {
                for address in pod.addresses() {
                    wait_ping(from, *address, &pod.name);
                }
                wait_ping(&pod.netns, pods[0].v4().unwrap(), "the first pod");
                pod.check(node).unwrap();
                let report = ping(&pod.netns, pods[1].v4().unwrap(), 50, TICK, crate::PATIENCE / 10).unwrap();
                assert!(report.lost() <= 1, "{}: {report:?}", pod.name);
            }
            assert_eq!(world.server.nodes().unwrap().len(), 9);

            let (del, rest) = pods.split_at(4);
            std::thread::scope(|scope| {
                for pod in del {
                    scope.spawn(move || pod.del(node).unwrap());
                }
            });
            wait_for("four devices to be gone", || (world.server.nodes().ok()?.len() == 5).then_some(()));
            for pod in rest {
                pod.check(node).unwrap();
                assert!(pod.cni(node, &version("STATUS")).unwrap().success);
            }
            // Headscale away: DEL succeeds, STATUS stays well, ADD says that it may be tried again.
            world.server.stop();
            rest[0].del(node).unwrap();
            assert!(rest[1].cni(node, &version("STATUS")).unwrap().success);
            let late = CniCall { timeout_s: 4, ..CniCall::new("ADD") };
            assert_eq!(del[0].cni(node, &late).unwrap().code(), Some(11));
            world.server.start().unwrap();
            // GC with nothing valid takes the others.
            assert!(rest[1].cni(&world.nodes[0], &version("GC")).unwrap().success);
            wait_for("all devices of pods to be gone", || {
                (world.server.nodes().ok()?.len() == 1).then_some(())
            });
            let node = &world.nodes[0];
            wait_for("all identities to be gone", || {
                let left = std::fs::read_dir(node.state_dir().join("identities")).unwrap().count();
                (left == 0).then_some(())
            });
            let left = before.diff(&world.nodes[0].host_state().unwrap());
            // Headscale was started anew meanwhile.
            let left: Vec<_> = left.iter().filter(|line| !line.contains("headscale")).collect();
            assert!(left.is_empty(), "{left:?}");
        },
    );
}
