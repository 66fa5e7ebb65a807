//! What an administrator does to nodes while their pods run. The steps are the same for the devnet and for
//! the real server; the devnet's are run here.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use podtether_core::tailcfg::UnixTime;
use podtether_devnet::fault::{Fault, Target};
use podtether_devnet::probe::dns::lookup;
use podtether_devnet::{Devnet, Families, HeadscaleApi};
use podtether_net::Netns;
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::node::code;
use serde_json::Value;

use crate::admin::{Admin, PATIENCE};
use crate::rig::*;

pub(crate) const TAGS: &str = "\"tag:k8s-pod\"";

/// Two pods that answer on UDP port 7, and what tells them apart.
pub(crate) struct Pair {
    pub(crate) rig: Rig,
    pub(crate) a: Netns,
    pub(crate) b: Netns,
}

impl Pair {
    pub(crate) async fn join(mut rig: Rig) -> Pair {
        rig.start();
        let (a, b) = (rig.netns("a").await, rig.netns("b").await);
        for name in ["a", "b"] {
            let start = Instant::now();
            let made = rig.add(name).await.unwrap();
            println!("ADD of {name} took {:?}: {:?}", start.elapsed(), made.addresses);
        }
        echo(&a, 7);
        echo(&b, 7);
        Pair { rig, a, b }
    }

    pub(crate) fn address(&self, pod: &str) -> IpAddr {
        self.rig.pod(pod)["addresses"][0].as_str().unwrap().parse().unwrap()
    }

    pub(crate) fn engine(&self, pod: &str) -> Value {
        self.rig.pod(pod)["enginePid"].clone()
    }

    pub(crate) fn talk(&self) {
        reachable(&self.a, SocketAddr::new(self.address("b"), 7));
        reachable(&self.b, SocketAddr::new(self.address("a"), 7));
    }

    /// Waits until the pod runs with a node key other than `old`, and ts0 has what control gave.
    pub(crate) async fn again(&self, admin: &Admin, pod: &str, old: &Value) -> Value {
        let start = Instant::now();
        loop {
            let (node, report) = (admin.node(pod).await, self.rig.pod(pod));
            let want = texts(&node["ipAddresses"]);
            let made = self.on_ts0(pod).await;
            if !want.is_empty()
                && node["nodeKey"] != old["nodeKey"]
                && report["state"] == "running"
                && report["controlConnected"] == true
                && texts(&report["addresses"]) == want
                && made == want
            {
                return node;
            }
            // Headscale does not tell a node that it was deleted: it asks about once a minute.
            assert!(start.elapsed() < 4 * PATIENCE, "{pod} is not back: {node} {report} {made:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn on_ts0(&self, pod: &str) -> Vec<String> {
        let ns = if pod == "a" { &self.a } else { &self.b };
        let netlink = podtether_net::netlink::Netlink::open(ns).await.unwrap();
        let Some(link) = netlink.link("ts0").await.unwrap() else { return Vec::new() };
        let all = netlink.addresses().await.unwrap();
        let mut found: Vec<String> =
            all.iter().filter(|a| a.link == link.index).map(|a| a.net.addr().to_string()).collect();
        found.sort();
        found
    }
}

/// A list of texts, sorted.
fn texts(list: &Value) -> Vec<String> {
    let list = list.as_array().into_iter().flatten();
    let mut texts: Vec<String> = list.map(|a| a.as_str().unwrap().to_owned()).collect();
    texts.sort();
    texts
}

/// Expired and deleted by an administrator: that pod comes back, the other notices nothing. A node without
/// tags is renewed; a tagged one Headscale leaves expired, so the pod has to come as another.
pub(crate) async fn touched_by_admin(pair: &Pair, admin: &Admin, tagged: bool) {
    let other = pair.engine("b");
    let before = admin.node("a").await;
    let start = Instant::now();
    admin.expire("a").await;
    let after = pair.again(admin, "a", &before).await;
    println!("back {:?} after it was expired", start.elapsed());
    if !tagged {
        assert_eq!(after["id"], before["id"], "the same device");
        assert_eq!(after["ipAddresses"], before["ipAddresses"]);
    }
    assert_eq!(admin.nodes().await.len(), 2, "none is left behind");
    pair.talk();

    let start = Instant::now();
    admin.delete("a").await;
    let anew = pair.again(admin, "a", &after).await;
    println!("back {:?} after it was deleted", start.elapsed());
    assert_ne!(anew["id"], after["id"], "another device");
    pair.talk();
    assert_eq!(pair.engine("b"), other, "nothing happened to the other pod");
    assert_eq!(admin.live_keys().await, 0, "every minted key was used");
}

/// A database without nodes: everybody registers anew, with other keys and addresses. `c` joined first and
/// has left since, so that the numbers move.
pub(crate) async fn after_a_wipe(pair: &Pair, admin: &Admin, before: &[Value], start: Instant) {
    let old = |pod: &str| {
        let name = format!("k8s-default-{pod}");
        before.iter().find(|n| n["name"] == name.as_str()).unwrap().clone()
    };
    for pod in ["a", "b"] {
        let node = pair.again(admin, pod, &old(pod)).await;
        assert_eq!(node["machineKey"], old(pod)["machineKey"]);
    }
    println!("both pods back {:?} after the wipe", start.elapsed());
    pair.talk();
}

/// DEL takes the devices out of the tailnet, also when the engine or the API is away at the time.
pub(crate) async fn leave(pair: &Pair, admin: &Admin) {
    // An engine that is stopped cannot log out.
    let pid = u32::try_from(pair.engine("a").as_u64().unwrap()).unwrap();
    signal(pid, libc::SIGSTOP);
    pair.rig.del("a").await.unwrap();
    pair.rig.del("b").await.unwrap();
    admin.until("empty", <[Value]>::is_empty).await;
    pair.rig.until_clean(PATIENCE).await;
}

/// Supervisors of two nodes want one name: the second pod is called after itself, and not by a number. And what the
/// API tells of nodes whose keys were minted is what they are known by.
pub(crate) async fn one_name_on_two_nodes(dir: &Path, admin: &Admin) {
    let mut rigs = Vec::new();
    for node in ["one", "two"] {
        let dir = dir.join(node);
        std::fs::create_dir(&dir).unwrap();
        let mut rig = admin.rig(&dir, TAGS, "");
        rig.config = rig.config.replace("127.0.0.1:9465", "");
        rig.start();
        rig.netns("a").await;
        rig.add("a").await.unwrap();
        rigs.push(rig);
    }
    let nodes = admin.nodes().await;
    let mut names: Vec<&str> = nodes.iter().map(|node| node["givenName"].as_str().unwrap()).collect();
    names.sort_unstable();
    let own = names[1].strip_prefix("k8s-default-a-").unwrap_or_default();
    assert!(names[0] == "k8s-default-a" && own.len() == 8, "{names:?}");
    for node in &nodes {
        let key = &node["preAuthKey"];
        let at = |field: &str| key[field].as_str().unwrap().parse::<UnixTime>().unwrap();
        let lived = at("expiration").saturating_since(at("createdAt"));
        assert_eq!((&key["reusable"], &key["aclTags"][0]), (&false.into(), &"tag:k8s-pod".into()), "{key}");
        assert!(lived.abs_diff(Duration::from_secs(300)) < Duration::from_secs(5), "{lived:?}");
    }
    for rig in &rigs {
        rig.del("a").await.unwrap();
    }
    admin.until("empty", <[Value]>::is_empty).await;
}

#[test]
fn one_name_on_two_nodes_of_either_api() {
    in_namespaces("life::one_name_on_two_nodes_of_either_api", |dir| {
        for v2 in [true, false] {
            let (_devnet, admin) = headscale(v2);
            let dir = dir.join(format!("v2-{v2}"));
            std::fs::create_dir(&dir).unwrap();
            block_on(Box::pin(one_name_on_two_nodes(&dir, &admin)));
        }
    });
}

fn headscale(v2: bool) -> (Devnet, Admin) {
    let devnet = devnet(|config| {
        config.headscale = Some(HeadscaleApi { api_key: String::new(), v2 });
    });
    let admin = admin_of(&devnet);
    (devnet, admin)
}

fn admin_of(devnet: &Devnet) -> Admin {
    Admin { url: devnet.https_url(), key: devnet.api_key(), ca: devnet.ca_pem().to_owned() }
}

fn life_with(dir: &std::path::Path, v2: bool) {
    let (devnet, admin) = headscale(v2);
    block_on(async {
        let mut rig = admin.rig(dir, TAGS, "");
        rig.start();
        rig.netns("c").await;
        rig.add("c").await.unwrap();
        rig.terminate();
        let pair = Pair::join(rig).await;
        pair.rig.del("c").await.unwrap();
        pair.talk();
        Box::pin(touched_by_admin(&pair, &admin, true)).await;
        let before = admin.nodes().await;
        let start = Instant::now();
        devnet.wipe();
        Box::pin(after_a_wipe(&pair, &admin, &before, start)).await;

        // A number that another device has by now is not ours to delete.
        Box::pin(leave(&pair, &admin)).await;
    });
    assert_eq!(devnet.complaints(), [""; 0]);
}

#[test]
fn pods_live_with_the_second_api() {
    in_namespaces("life::pods_live_with_the_second_api", |dir| life_with(dir, true));
}

#[test]
fn pods_live_with_the_first_api() {
    in_namespaces("life::pods_live_with_the_first_api", |dir| life_with(dir, false));
}

#[test]
fn a_removal_waits_for_an_api_that_is_away_and_touches_no_other_node() {
    in_namespaces("life::a_removal_waits_for_an_api_that_is_away_and_touches_no_other_node", |dir| {
        for v2 in [true, false] {
            let (devnet, admin) = headscale(v2);
            let dir = dir.join(if v2 { "v2" } else { "v1" });
            std::fs::create_dir(&dir).unwrap();
            let mut rig = admin.rig(&dir, TAGS, "");
            rig.start();
            block_on(async {
                rig.netns("a").await;
                rig.add("a").await.unwrap();
                rig.until("a", "saved", |_| {
                    let records = std::fs::read_dir(dir.join("state/identities")).unwrap();
                    records
                        .flatten()
                        .any(|e| std::fs::read_to_string(e.path()).unwrap().contains("\"stable_id\":\"1\""))
                })
                .await;
                // The engine dies with its supervisor; the API is away when the runtime says DEL.
                devnet.set_fault(Target::Api, Fault::status(500));
                devnet.set_fault(Target::Upgrade, Fault::status(500));
                rig.kill();
                rig.start();
                rig.client().await;
                rig.del("a").await.unwrap();
                assert_eq!(devnet.nodes().len(), 1, "not removed yet");
                assert_eq!(rig.leftovers().len(), 1, "the identity's record stays: {:?}", rig.leftovers());
                // Another supervisor goes on with it.
                rig.kill();
                rig.start();
                rig.client().await;
                devnet.clear_faults();
                assert!(devnet.wait_for(PATIENCE, <[_]>::is_empty).await, "{:?}", devnet.nodes());

                // With an empty database the same number is soon another's.
                rig.add("a").await.unwrap();
                devnet.set_fault(Target::Api, Fault::status(500));
                devnet.set_fault(Target::Upgrade, Fault::status(500));
                rig.kill();
                devnet.wipe();
                let stranger = devnet.add_node("stranger");
                rig.start();
                rig.client().await;
                rig.del("a").await.unwrap();
                devnet.clear_faults();
                rig.until_clean(PATIENCE).await;
                assert_eq!(devnet.nodes().len(), 1, "somebody else's node stays");
                assert_eq!(devnet.nodes()[0].stable_id, stranger);
            });
            rig.terminate();
        }
    });
}

#[test]
fn refusals_have_the_right_code_and_leave_nothing() {
    in_namespaces("life::refusals_have_the_right_code_and_leave_nothing", |dir| {
        let (devnet, admin) = headscale(false);
        let mut rig = admin.rig(dir, "", "user = \"nobody\"");
        rig.start();
        block_on(async {
            rig.netns("a").await;
            let client = rig.client().await;
            let mut request = rig.request("a");
            request.timeout_ms = 3000;
            let add = async || {
                let result = client.add(within(TIMEOUT), request.clone()).await.unwrap();
                result.map_err(|e| (e.code, format!("{} {}", e.msg, e.details)))
            };
            let (code, text) = add().await.unwrap_err();
            println!("{text}");
            assert_eq!(code, code::REFUSED, "{text}");
            assert!(text.contains("has no user \"nobody\""), "{text}");
            devnet.add_user("nobody", "&<>\"é");
            let made = add().await.unwrap();
            assert_eq!(made.addresses.len(), 2);
            let node = admin.node("a").await;
            assert_eq!(node["user"]["name"], "nobody");
            rig.del("a").await.unwrap();

            std::fs::write(dir.join("api-key"), "hskey-api-wrong").unwrap();
            let (code, text) = add().await.unwrap_err();
            println!("{text}");
            assert_eq!(code, code::REFUSED, "{text}");
            assert!(text.contains("headscale apikeys create") && !text.contains("wrong"), "{text}");
            std::fs::write(dir.join("api-key"), &admin.key).unwrap();

            for (fault, says) in
                [(Fault::status(503), "503"), (Fault::rate_limit(60).times(1), "rate limited")]
            {
                devnet.set_fault(Target::Api, fault);
                let (code, text) = add().await.unwrap_err();
                assert_eq!(code, code::TRY_AGAIN, "{text}");
                assert!(text.contains(says), "{text}");
                devnet.clear_faults();
            }
            rig.kill();
            rig.start();
            let client = rig.client().await;
            devnet.set_fault(Target::Upgrade, Fault::hang());
            let failed = client.add(within(TIMEOUT), request.clone()).await.unwrap().unwrap_err();
            assert_eq!(failed.code, code::TRY_AGAIN, "{failed}");
            devnet.clear_faults();
            assert_eq!(admin.live_keys().await, 0, "a key that nobody used was ended");
            assert_eq!(rig.leftovers(), [""; 0]);
            devnet.set_refusing(true);
            let failed = client.add(within(TIMEOUT), request.clone()).await.unwrap().unwrap_err();
            assert_eq!(failed.code, code::TRY_AGAIN, "{failed}");
        });
        rig.terminate();
    });
}

#[test]
fn a_tailnet_may_have_one_family_alone() {
    in_namespaces("life::a_tailnet_may_have_one_family_alone", |dir| {
        for (families, range) in [(Families::V4, "100.64.0.0/10"), (Families::V6, "fd7a:115c:a1e0::/48")] {
            let devnet = devnet(|config| {
                config.families = families;
                config.headscale = Some(HeadscaleApi { api_key: String::new(), v2: true });
            });
            let dir = dir.join(format!("{families:?}"));
            std::fs::create_dir(&dir).unwrap();
            let admin = admin_of(&devnet);
            block_on(async {
                let pair = Pair::join(admin.rig(&dir, TAGS, "")).await;
                one_family(&pair, range).await;
            });
            assert_eq!(devnet.complaints(), [""; 0]);
        }
    });
}

/// Addresses, routes and MagicDNS are of one family.
pub(crate) async fn one_family(pair: &Pair, range: &str) {
    let made = pair.rig.add("a").await.unwrap();
    let routes: Vec<String> = made.routes.iter().map(|r| r.dst.to_string()).collect();
    assert_eq!((made.addresses.len(), routes), (1, vec![range.to_owned()]));
    pair.talk();
    let service: IpAddr =
        if range.contains(':') { "fd7a:115c:a1e0::53" } else { "100.100.100.100" }.parse().unwrap();
    let name = pair.rig.pod("b")["name"].as_str().unwrap().to_owned();
    let answer = lookup(&pair.a, SocketAddr::new(service, 53), &name, service.is_ipv6(), TIMEOUT).unwrap();
    assert_eq!(answer.addresses, [pair.address("b")], "{name} at {service}");
    let request = podtether_proto::node::CheckRequest {
        attachment: attachment("a"),
        netns: pair.rig.netns_path("a").display().to_string(),
        addresses: made.addresses.clone(),
        routes: made.routes.iter().map(|r| r.dst).collect(),
    };
    pair.rig.client().await.check(within(TIMEOUT), request).await.unwrap().unwrap();
}

#[test]
fn names_of_users_may_hold_anything() {
    in_namespaces("life::names_of_users_may_hold_anything", |dir| {
        let (devnet, admin) = headscale(false);
        let id = devnet.add_user("ref", "Ref");
        block_on(async {
            let pair = Pair::join(admin.rig(dir, "", "user = \"ref\"")).await;
            pair.talk();
            let untouched = (pair.engine("a"), pair.engine("b"));
            assert!(devnet.rename_user(id, "<é&\">", "\u{1F980} & <D> \"é"));
            pair.talk();
            assert_eq!((pair.engine("a"), pair.engine("b")), untouched, "nobody lost a session over it");
            Box::pin(touched_by_admin(&pair, &admin, false)).await;
            let engines = (pair.engine("a"), pair.engine("b"));
            // The number stays, so pods go on joining.
            pair.rig.netns("c").await;
            pair.rig.add("c").await.unwrap();
            assert_eq!(admin.node("c").await["user"]["name"], "<é&\">");
            pair.talk();
            assert_eq!((pair.engine("a"), pair.engine("b")), engines);
        });
        assert_eq!(devnet.complaints(), [""; 0]);
    });
}
