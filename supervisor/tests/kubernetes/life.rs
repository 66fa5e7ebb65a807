//! What happens to pods in a cluster: rollouts, sandboxes that end under them, and the node's restart.
//!
//! `SEED` repeats a run's dice, `PODTETHER_KUBE_ROUNDS=10 PODTETHER_KUBE_PODS=20` makes it a long one.

use std::time::{Duration, Instant};

use podtether_net::testing::block_on;
use podtether_proto::node::{AttachmentId, NodeClient};
use podtether_proto::transport;
use podtether_supervisor::record::{Identity, Store};

use crate::cluster::{Cluster, Owned, Pod, identity, kill_task, pods};
use crate::node::{PATIENCE, RUN_DIR, STATE_DIR, kubectl, named, on_a_cluster};
use crate::rig::within;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// xorshift64*
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % sides
    }
}

/// Lets the time of identities that are kept run out, as nobody tells a supervisor of a pod whose DEL found none.
fn age_identities() -> usize {
    let store = Store::open(std::path::Path::new(STATE_DIR)).unwrap();
    let (records, asides) = store.load::<Identity>().unwrap();
    assert!(asides.is_empty(), "{asides:?}");
    let count = records.len();
    for mut record in records {
        assert!(record.keep_until_unix_s.is_some() || record.leaving, "nothing ends it: {record:?}");
        record.keep_until_unix_s = Some(1);
        store.save(&record).unwrap();
    }
    count
}

/// It may have ended by itself.
fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
}

/// Rolls `name` out anew, and kills until that is done: how many supervisors and engines.
fn rollout(cluster: &Cluster<'_>, name: &str, round: u64, dice: &mut Dice) -> [u64; 2] {
    cluster.must(&format!("set env deployment/{name} ROUND={round}"));
    let arguments = format!("rollout status deployment/{name} --timeout={}s", PATIENCE.as_secs());
    let waits = std::thread::spawn(move || kubectl(&arguments.split(' ').collect::<Vec<_>>(), None));
    let mut killed = [0, 0];
    while !waits.is_finished() {
        std::thread::sleep(Duration::from_millis(50 + dice.roll(500)));
        // Kubernetes waits ten seconds and more before it starts a container again that ended twice, and makes a
        // pod that is deleted anew at once.
        if killed[0] == 0 && dice.roll(3) == 0 {
            if dice.roll(2) == 0 {
                named("podtether-supervisor").into_iter().for_each(kill);
            } else {
                cluster
                    .must("-n podtether delete pod -l app=podtether --grace-period=0 --force --wait=false");
            }
            killed[0] += 1;
            continue;
        }
        let engines = named("podtether-engine");
        if let Some(pid) = engines.get(usize::try_from(dice.roll(64)).unwrap() % engines.len().max(1)) {
            kill(*pid);
            killed[1] += 1;
        }
    }
    let (text, done) = waits.join().unwrap();
    assert!(done, "round {round}: {text}");
    killed
}

/// Pods, and what is theirs whatever sandbox they are in.
struct Before {
    pods: Vec<Pod>,
    identities: Vec<Owned>,
    devices: Vec<String>,
}

impl Before {
    fn of(cluster: &Cluster<'_>, pods: Vec<Pod>) -> Self {
        let identities = pods.iter().map(|pod| identity(&cluster.devnet, pod)).collect();
        let devices = cluster.devnet.nodes().into_iter().map(|node| node.stable_id).collect();
        Self { pods, identities, devices }
    }

    /// Waits for the same pods in other sandboxes.
    fn came_back(&self, cluster: &Cluster<'_>) -> Vec<Pod> {
        let after = cluster.until("the same pods run in other sandboxes", || {
            let after = cluster.running(self.pods.len())?;
            let moved = |b: &Pod| after.iter().any(|a| a.uid == b.uid && a.container != b.container);
            self.pods.iter().all(moved).then_some(after)
        });
        for (before, was) in self.pods.iter().zip(&self.identities) {
            let after = after.iter().find(|after| after.uid == before.uid).unwrap();
            assert_eq!(identity(&cluster.devnet, after), *was);
        }
        let strangers: Vec<_> =
            cluster.devnet.nodes().into_iter().filter(|n| !self.devices.contains(&n.stable_id)).collect();
        assert!(strangers.is_empty(), "nobody joined anew: {strangers:?}");
        after
    }
}

#[test]
fn pods_keep_what_is_theirs_and_leave_nothing() {
    on_a_cluster("life::pods_keep_what_is_theirs_and_leave_nothing", |names| {
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = number("SEED", clock.subsec_nanos().into());
        let (rounds, count) = (number("PODTETHER_KUBE_ROUNDS", 3), number("PODTETHER_KUBE_PODS", 6));
        println!("SEED={seed} PODTETHER_KUBE_ROUNDS={rounds} PODTETHER_KUBE_PODS={count}");
        let mut dice = Dice(seed | 1);
        let mut cluster = Cluster::start(names);
        let replicas = u32::try_from(count).unwrap();
        let count = usize::try_from(count).unwrap();
        let begun = Instant::now();
        cluster.deploy("web", replicas);
        let first = cluster.settled(count);
        cluster.all_talk(&first);
        println!("{count} pods reach each other {:?} after they were asked for", begun.elapsed());

        // Rollouts under fire.
        let begun = Instant::now();
        let mut killed = [0, 0];
        for round in 0..rounds {
            let now = rollout(&cluster, "web", round, &mut dice);
            killed = [killed[0] + now[0], killed[1] + now[1]];
        }
        let [supervisors, engines] = killed;
        println!(
            "{rounds} rollouts in {:?}; killed {supervisors} supervisors and {engines} engines",
            begun.elapsed()
        );
        let last = cluster.settled(count);
        assert!(last.iter().all(|l| first.iter().all(|f| f.uid != l.uid)), "all pods are others");
        cluster.all_talk(&last);
        cluster.must("scale deployment/web --replicas=2");
        let two = cluster.settled(2);

        // A sandbox ends under its pod.
        let before = Before::of(&cluster, two.clone());
        let begun = Instant::now();
        for pod in &two {
            kill_task(cluster.node.runtime(), &pod.container);
        }
        let after = before.came_back(&cluster);
        println!("two pods are back {:?} after their sandboxes were killed", begun.elapsed());
        block_on(async {
            let transport =
                transport::connect(&std::path::Path::new(RUN_DIR).join("supervisor.sock")).await.unwrap();
            let client = NodeClient::new(tarpc::client::Config::default(), transport).spawn();
            for old in &two {
                let text = |name: &str| old.listed[name].as_str().unwrap().to_owned();
                let late = AttachmentId {
                    network: text("network"),
                    container_id: text("containerId"),
                    ifname: text("ifname"),
                };
                client.del(within(PATIENCE), late).await.unwrap().unwrap();
            }
        });
        let which =
            |pods: &[Pod]| -> Vec<_> { pods.iter().map(|p| (p.container.clone(), p.engine)).collect() };
        assert_eq!(which(&cluster.settled(2)), which(&after), "a late DEL is nothing to the new sandbox");
        cluster.all_talk(&after);

        // The node restarts.
        let before = Before::of(&cluster, after);
        let begun = Instant::now();
        cluster.node.restart();
        let again = before.came_back(&cluster);
        println!("two pods are back {:?} after the power went", begun.elapsed());
        cluster.all_talk(&again);

        cluster.must("delete deployment/web");
        cluster.until("no pod is listed", || pods()?.is_empty().then_some(()));
        let supervisor = cluster.serving();
        cluster.must("-n podtether patch ds/podtether -p {\"spec\":{\"template\":{\"spec\":{\"nodeSelector\":{\"no\":\"where\"}}}}}");
        cluster.until("the supervisor is gone", || named("podtether-supervisor").is_empty().then_some(()));
        println!("{} identities of pods whose DEL found no supervisor", age_identities());
        cluster.must("-n podtether patch ds/podtether --type=json -p [{\"op\":\"remove\",\"path\":\"/spec/template/spec/nodeSelector\"}]");
        cluster.serving_but(&[supervisor]);
        cluster.nothing_left();
    });
}
