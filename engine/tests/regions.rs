//! Several DERP regions: which is home, what becomes of nodes when one dies, and what relays say.

#![allow(clippy::unwrap_used)]
#![allow(clippy::print_stdout, reason = "the harness shows what a failed test printed")]

mod common;

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{ENGINE, Join, PATIENCE, Pod, Probed, echo, patient, probe};
use podtether_devnet::lab::{Lab, Nat, Node, Programs};
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig, Mode, NodeInfo, RegionConfig, RelayNotice};
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::engine::{PathStatus, Underlay};

const TICK: Duration = Duration::from_millis(10);

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

struct World {
    lab: Lab,
    devnet: Devnet,
    join: Join,
}

impl World {
    /// With regions 1, 2, … so many milliseconds away.
    fn new(dir: &Path, distances_ms: &[u64]) -> Self {
        let none = PathBuf::new;
        let programs = Programs { supervisor: none(), engine: ENGINE.into(), tool: none(), cni: none() };
        let mut lab = Lab::new(dir, programs).unwrap();
        let regions = (1..).zip(distances_ms).map(|(id, away)| RegionConfig::new(id, vec![]).at(ms(*away)));
        let config = DevnetConfig { regions: regions.collect(), ..DevnetConfig::default() };
        let (devnet, _) = lab.start_devnet(config).unwrap();
        let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() });
        let join = Join {
            control_url: devnet.https_url(),
            ca_pem: devnet.ca_pem().to_owned(),
            auth_key: Some(key.secret),
            addresses: Vec::new(),
        };
        Self { lab, devnet, join }
    }

    /// A pod on a node of the lab that speaks to nobody but relays and control.
    async fn member(&self, dir: &Path, name: &str, node: &Node, n: u8) -> Member {
        let mut pod = Pod::make_on(dir, name, Some(&node.netns)).await;
        let join = Join { addresses: vec![[10, n, 0, 2].into()], ..self.join.clone() };
        let address = pod.join(&join).await[0];
        let echo = echo(&pod, SocketAddr::new(address, 7)).await;
        Member { pod, address, underlay: RefCell::new(join.addresses), _echo: echo }
    }

    fn node(&self, name: &str) -> NodeInfo {
        self.devnet.node(name).unwrap()
    }

    fn set_distances(&self, distances_ms: &[u64]) {
        for (id, away) in (1..).zip(distances_ms) {
            assert!(self.devnet.set_region_distance(id, ms(*away)));
        }
    }

    /// Waits until a node has measured every region anew, which it does when its addresses change.
    async fn measure(&self, member: &Member) {
        let answers = || -> Vec<u64> {
            self.devnet
                .regions()
                .iter()
                .map(|r| self.devnet.region_stats(r.id).unwrap().stun_answers)
                .collect()
        };
        let before = answers();
        member.change_addresses().await;
        until("every region is measured", async || {
            answers().iter().zip(&before).all(|(now, then)| now > then)
        })
        .await;
    }

    /// Waits until control knows a node's home, too.
    async fn home(&self, member: &Member, region: u32) {
        member.pod.wait(|status| status.home_derp == region).await;
        let name = &member.pod.name;
        let told = self
            .devnet
            .wait_for(PATIENCE, |nodes| nodes.iter().any(|n| n.name == *name && n.home_derp == region))
            .await;
        assert!(told, "control is not told that {name} moved to region {region}");
    }
}

/// A pod that joined, and its first address.
struct Member {
    pod: Pod,
    address: IpAddr,
    underlay: RefCell<Vec<IpAddr>>,
    _echo: tokio::task::JoinSet<()>,
}

impl Member {
    async fn change_addresses(&self) {
        let other: IpAddr = [192, 0, 2, 7].into();
        let mut addresses = self.underlay.take();
        match addresses.iter().position(|address| *address == other) {
            Some(at) => drop(addresses.remove(at)),
            None => addresses.push(other),
        }
        self.underlay.replace(addresses.clone());
        let underlay = Underlay { addresses, ..Underlay::default() };
        self.pod.client().set_underlay(patient(), underlay).await.unwrap();
    }

    async fn home(&self) -> u32 {
        self.pod.client().metrics(patient()).await.unwrap().home_derp
    }

    async fn talk(&self, other: &Self, count: u32) -> Probed {
        probe(&self.pod, self.address, SocketAddr::new(other.address, 7), count, TICK).await
    }

    async fn path_to(&self, other: &Self) -> PathStatus {
        let peers = self.pod.client().peers(patient()).await.unwrap();
        peers.into_iter().find(|p| p.addresses.contains(&other.address)).unwrap().path
    }
}

async fn until(what: &str, mut reached: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !reached().await {
            tokio::time::sleep(ms(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.is_ok(), "not in time: {what}");
}

#[test]
fn homes_follow_latency_and_regions_die_and_return() {
    in_namespaces("homes_follow_latency_and_regions_die_and_return", |dir| {
        let mut world = World::new(dir, &[30, 80, 150]);
        let nodes = ["node1", "node2"].map(|name| world.lab.add_node(name).unwrap());
        world.lab.block_udp().unwrap();
        block_on(Box::pin(lives(dir, &world, &nodes)));
    });
}

async fn lives(dir: &Path, world: &World, nodes: &[Node; 2]) {
    let devnet = &world.devnet;
    let a = world.member(dir, "a", &nodes[0], 1).await;
    world.home(&a, 1).await;

    // Region 2 becomes nearer by too little: who is at home in region 1 stays, who comes anew does not.
    world.set_distances(&[200, 150, 500]);
    world.measure(&a).await;
    let b = world.member(dir, "b", &nodes[1], 2).await;
    world.home(&b, 2).await;
    assert_eq!(a.home().await, 1, "a quarter is no reason to move");
    until("they know each other", async || a.talk(&b, 1).await.answered == 1).await;
    for (from, to) in [(&a, &b), (&b, &a)] {
        let probed = from.talk(to, 100).await;
        assert_eq!(probed.answered, 100, "{} to {}: {probed:?}", from.pod.name, to.pod.name);
        assert!(matches!(from.path_to(to).await, PathStatus::Relay { .. }));
    }

    // One relay drops its connections: they come back, and the other relay's are not touched.
    let greeted = |region| devnet.region_stats(region).unwrap().greeted;
    let (before, other) = (greeted(2), greeted(1));
    let cut = Instant::now();
    assert!(devnet.restart_region(2));
    until("both are connected again", async || greeted(2) >= before + 2).await;
    println!("connected again after {:?}", cut.elapsed());
    assert_eq!((greeted(1), greeted(2)), (other, before + 2));
    until("they talk again", async || a.talk(&b, 1).await.answered == 1).await;

    // What is heard by way of a relay is answered there until that relay says that the peer has left.
    let (at, gone, home) = match (a.path_to(&b).await, b.path_to(&a).await) {
        (PathStatus::Relay { region: 1 }, _) => (&a, &b, 2),
        (_, PathStatus::Relay { region: 2 }) => (&b, &a, 1),
        paths => panic!("{paths:?}"),
    };
    let key = world.node(&at.pod.name).node_key;
    let notice = RelayNotice::PeerGone(world.node(&gone.pod.name).node_key);
    assert!(devnet.say_on_relay(3 - home, &key, &notice));
    until("the way is by the peer's home", async || {
        at.path_to(gone).await == PathStatus::Relay { region: home }
    })
    .await;

    // A clear gain: home moves, and the peer follows without loss.
    world.set_distances(&[60, 5, 150]);
    let (probed, ()) = tokio::join!(b.talk(&a, 300), async {
        world.measure(&a).await;
        world.home(&a, 2).await;
    });
    println!("home moved: {probed:?}");
    relayed_by(&a, &b, 2).await;
    assert!(probed.answered >= 297, "{probed:?}");

    // The relay of both dies and is noticed at once; it returns.
    for (how, bar) in [("refuses", 10), ("is silent", 15)] {
        let addresses = devnet.regions()[1].addresses.clone();
        let die = async {
            tokio::time::sleep(ms(500)).await;
            match how {
                "refuses" => assert!(devnet.set_region(2, Mode::Down)),
                _ => on_thread(|| world.lab.silence(&addresses).unwrap()),
            }
        };
        let (probed, ()) = tokio::join!(a.talk(&b, 2000), die);
        println!(
            "region 2 {how}: {:?} without an answer, {} of {} lost",
            probed.gap,
            probed.sent - probed.answered,
            probed.sent
        );
        assert!(probed.gap < Duration::from_secs(bar), "region 2 {how}: {:?}", probed.gap);
        world.home(&a, 1).await;
        world.home(&b, 1).await;
        relayed_by(&a, &b, 1).await;
        let settled = a.talk(&b, 100).await;
        assert_eq!(settled.answered, 100, "region 2 {how}: {settled:?}");
        match how {
            "refuses" => assert!(devnet.set_region(2, Mode::Up)),
            _ => on_thread(|| world.lab.silence(&[]).unwrap()),
        }
        world.measure(&a).await;
        world.measure(&b).await;
        world.home(&a, 2).await;
        world.home(&b, 2).await;
        relayed_by(&a, &b, 2).await;
        until("they talk at the old home", async || a.talk(&b, 20).await.answered == 20).await;
    }
    assert_eq!(devnet.complaints(), Vec::<String>::new());
}

/// Talks until both send by this region.
async fn relayed_by(a: &Member, b: &Member, region: u32) {
    until("the conversation has moved", async || {
        a.talk(b, 5).await;
        let paths = [a.path_to(b).await, b.path_to(a).await];
        paths.iter().all(|path| *path == PathStatus::Relay { region })
    })
    .await;
}

/// Calls of the lab block.
fn on_thread(call: impl FnOnce() + Send) {
    std::thread::scope(|s| s.spawn(call).join()).unwrap();
}

#[test]
fn without_udp_home_is_the_region_whose_https_answers_soonest() {
    in_namespaces("without_udp_home_is_the_region_whose_https_answers_soonest", |dir| {
        let mut world = World::new(dir, &[150, 10]);
        let mut gateway = world.lab.add_gateway("gateway", Nat::NoUdp).unwrap();
        let host = world.lab.add_host_behind("host", &mut gateway).unwrap();
        block_on(async {
            let mut pod = Pod::make_on(dir, "a", Some(&host.netns)).await;
            let underlay = vec![IpAddr::from(host.address)];
            let address = pod.join(&Join { addresses: underlay.clone(), ..world.join.clone() }).await[0];
            let echo = echo(&pod, SocketAddr::new(address, 7)).await;
            let a = Member { pod, address, underlay: RefCell::new(underlay), _echo: echo };
            let asked = Instant::now();
            world.home(&a, 2).await;
            println!("home after {:?}", asked.elapsed());
            // Both ways, as one of them could be chance.
            world.set_distances(&[10, 150]);
            a.change_addresses().await;
            let asked = Instant::now();
            world.home(&a, 1).await;
            println!("another home after {:?}", asked.elapsed());
            for region in [1, 2] {
                assert_eq!(world.devnet.region_stats(region).unwrap().stun_answers, 0, "UDP got through");
            }
            let net_info = world.devnet.hostinfo(world.node("a").id, "NetInfo").unwrap();
            assert_eq!(net_info["WorkingUDP"], false, "{net_info}");
        });
    });
}

#[test]
fn what_a_relay_says_is_heeded() {
    in_namespaces("what_a_relay_says_is_heeded", |dir| {
        let mut world = World::new(dir, &[0]);
        let node = world.lab.add_node("node1").unwrap();
        block_on(async {
            let a = world.member(dir, "a", &node, 1).await;
            let (devnet, key) = (&world.devnet, world.node("a").node_key);
            until("it is connected", async || devnet.is_on_relay(1, &key)).await;
            let say = |notice| assert!(devnet.say_on_relay(1, &key, &notice));

            say(RelayNotice::Health("the disk is full".into()));
            a.pod.wait(|s| s.health.iter().any(|h| h.title.contains("the disk is full"))).await;
            // What is of no use here does no harm.
            say(RelayNotice::PeerPresent(key));
            say(RelayNotice::PeerGone(podtether_core::key::NodePublic::from_bytes([9; 32])));
            say(RelayNotice::Health(String::new()));
            a.pod.wait(|s| s.health.iter().all(|h| !h.title.contains("disk"))).await;
            assert_eq!(devnet.region_stats(1).unwrap().greeted, 1);

            // Connections that end come back at once, or when the relay asked them to.
            let again = async |hint: Option<Duration>| {
                let greeted = devnet.region_stats(1).unwrap().greeted;
                if let Some(hint) = hint {
                    say(RelayNotice::Restarting(hint, Duration::from_secs(60)));
                    // In one stream with the hint, and after it.
                    say(RelayNotice::Health("about to end".into()));
                    a.pod.wait(|s| s.health.iter().any(|h| h.title.contains("about to end"))).await;
                }
                let cut = Instant::now();
                assert!(devnet.restart_region(1));
                until("it is connected again", async || devnet.region_stats(1).unwrap().greeted > greeted)
                    .await;
                cut.elapsed()
            };
            let (plain, asked) = (again(None).await, again(Some(ms(2500))).await);
            println!("connected again after {plain:?}, and after {asked:?} when asked to wait for 2.5 s");
            assert!(plain < ms(2000), "{plain:?}");
            assert!(asked >= ms(2500) && asked < ms(8000), "{asked:?}");
            let after = again(None).await;
            assert!(after < ms(2000), "the hint was for once: {after:?}");
        });
    });
}
