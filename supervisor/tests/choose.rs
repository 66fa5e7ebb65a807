//! Which pods join, and as what, with annotations that come with the CNI call.

mod rig;

use std::time::{Duration, Instant};

use podtether_devnet::fault::{Fault, Target};
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::node::{AddRequest, PodSelector, Source, code};
use rig::*;

fn asking(rig: &Rig, name: &str, annotations: &[(&str, &str)]) -> AddRequest {
    let mut request = rig.request(name);
    // As containerd adds to whatever there is.
    request.annotations.insert("kubernetes.io/config.source".into(), "api".into());
    for (key, value) in annotations {
        request.annotations.insert(format!("tailscale.com/{key}"), (*value).to_owned());
    }
    request
}

fn named(name: &str) -> PodSelector {
    PodSelector::Pod { namespace: "default".into(), name: name.into() }
}

const GRANTS: &str = "[namespace.default]\ntags = [\"tag:web\"]\nhostnames = [\"db\"]\n";

#[test]
fn pods_join_as_their_annotations_ask() {
    in_namespaces("pods_join_as_their_annotations_ask", |dir| {
        let devnet = devnet(|config| config.oauth.tags.push("tag:web".into()));
        let mut rig = Rig::oauth(dir, &devnet);
        rig.config.push_str(GRANTS);
        rig.start();
        block_on(async {
            let client = rig.client().await;
            let add = async |request: AddRequest| client.add(within(TIMEOUT), request).await.unwrap();
            let choice = async |name: &str| client.choice(within(TIMEOUT), named(name)).await.unwrap();
            for name in ["a", "b-x2", "c", "d"] {
                rig.netns(name).await;
            }

            let wanted = [("tags", "tag:web"), ("hostname", "db"), ("ephemeral", "true")];
            add(asking(&rig, "a", &wanted)).await.unwrap();
            let pod = rig.pod("a");
            assert_eq!(
                (&pod["name"], &pod["tags"][0]),
                (&"db.tailnet.test".into(), &"tag:web".into()),
                "{pod}"
            );
            assert!(devnet.node("db").is_some_and(|node| node.ephemeral), "{:?}", devnet.nodes());
            let told = choice("a").await.unwrap();
            let setting = |name: &str| told.settings.iter().find(|s| s.name == name).unwrap().clone();
            assert_eq!((setting("tags").value.as_str(), setting("tags").source), ("tag:web", Source::Pod));
            assert_eq!(setting("enabled").rule, "node.join = \"opt-out\"");

            // The name is taken: nobody gets a number behind it.
            add(asking(&rig, "b-x2", &[("hostname", "db")])).await.unwrap();
            assert_eq!(rig.pod("b-x2")["name"], "db-x2.tailnet.test");
            let told = choice("b-x2").await.unwrap();
            assert!(told.notes[0].contains("db is taken by pod default/a"), "{:?}", told.notes);
            let setting = told.settings.iter().find(|s| s.name == "hostname").unwrap();
            assert_eq!((setting.value.as_str(), setting.source), ("db-x2", Source::Pod));

            // Who does not want to joins nothing.
            assert!(add(asking(&rig, "c", &[("enabled", "false")])).await.unwrap().is_nothing());
            let told = choice("c").await.unwrap();
            assert!(
                !told.joins && told.settings[0].rule.contains("tailscale.com/enabled of the pod"),
                "{told:?}"
            );

            // What was not given is refused with a sentence, and is nothing to who need not join.
            let begun = Instant::now();
            let error = add(asking(&rig, "d", &[("tags", "tag:admin")])).await.unwrap_err();
            assert_eq!(error.code, code::BAD_CONFIG);
            for part in ["pod default/d", "tailscale.com/tags", "tag:admin", "namespace.default.tags"] {
                assert!(error.msg.contains(part), "{error}");
            }
            assert!(begun.elapsed() < Duration::from_secs(5));
            assert_eq!(choice("d").await.unwrap().refusals.len(), 1);
            let lax = [("tags", "tag:admin"), ("required", "false")];
            assert!(add(asking(&rig, "d", &lax)).await.unwrap().is_nothing());
            assert_eq!(devnet.nodes().len(), 2);

            // What was decided outlives the supervisor.
            drop(client);
            rig.kill();
            rig.start();
            let client = rig.client().await;
            let told = client.choice(within(TIMEOUT), named("b-x2")).await.unwrap().unwrap();
            assert_eq!(told.settings.iter().find(|s| s.name == "hostname").unwrap().value, "db-x2");
            for name in ["a", "b-x2", "c", "d"] {
                rig.del(name).await.unwrap();
            }
            rig.until_clean(TIMEOUT).await;
            assert!(devnet.wait_for(TIMEOUT, <[_]>::is_empty).await);
        });
    });
}

#[test]
fn who_need_not_join_starts_at_once_and_joins_when_it_can() {
    in_namespaces("who_need_not_join_starts_at_once_and_joins_when_it_can", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let a = rig.netns("a").await;
            devnet.set_fault(Target::Upgrade, Fault::hang());
            let client = rig.client().await;
            let request = asking(&rig, "a", &[("required", "false")]);
            let begun = Instant::now();
            let attached = client.add(within(TIMEOUT), request.clone()).await.unwrap().unwrap();
            println!("answered after {:?}", begun.elapsed());
            assert_eq!(
                (attached.ifname.as_str(), attached.addresses.len(), attached.routes.len()),
                ("ts0", 0, 0)
            );
            assert_eq!(attached.mac.len(), 17);
            assert_eq!(rig.pod("a")["state"], "joining");
            assert_eq!(client.add(within(TIMEOUT), request).await.unwrap().unwrap(), attached, "asked again");
            let check = podtether_proto::node::CheckRequest {
                attachment: attachment("a"),
                netns: rig.netns_path("a").display().to_string(),
                addresses: vec![],
                routes: vec![],
            };
            client.check(within(TIMEOUT), check.clone()).await.unwrap().unwrap();
            drop(client);

            // Another supervisor goes on with it.
            rig.kill();
            rig.start();
            let client = rig.client().await;
            rig.until("a", "taken up", |pod| pod["state"] == "joining").await;
            devnet.clear_faults();
            let pod = rig.until("a", "running", |pod| pod["state"] == "running").await;
            let address: std::net::IpAddr = pod["addresses"][0].as_str().unwrap().parse().unwrap();
            // Bound, so it is on the interface.
            a.run_blocking(move || std::net::UdpSocket::bind((address, 0)).map(drop)).unwrap().unwrap();
            client.check(within(TIMEOUT), check).await.unwrap().unwrap();
            rig.del("a").await.unwrap();
            rig.until_clean(TIMEOUT).await;
        });
    });
}

#[test]
fn a_pod_that_is_made_anew_under_its_name_keeps_the_name() {
    in_namespaces("a_pod_that_is_made_anew_under_its_name_keeps_the_name", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.config = rig.config.replace("[node]", "[node]\nidentity_grace = \"10m\"");
        rig.start();
        block_on(async {
            rig.netns("web-0").await;
            rig.add("web-0").await.unwrap();
            rig.del("web-0").await.unwrap();
            assert_eq!(devnet.nodes().len(), 1, "for as long as nobody knows whether the pod lives");
            let client = rig.client().await;
            let mut next = rig.request("web-0");
            next.pod.uid = "uid-another".into();
            next.attachment.container_id = "c-another".into();
            client.add(within(TIMEOUT), next.clone()).await.unwrap().unwrap();
            assert_eq!(rig.pod("web-0")["name"], "k8s-default-web-0.tailnet.test");
            assert_eq!(devnet.nodes().len(), 1, "{:?}", devnet.nodes());
        });
    });
}
