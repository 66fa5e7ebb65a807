//! Pods come and go through CRI behind Debian's plugins, while the supervisor and engines are killed.
//!
//! `SEED` repeats a run's dice, `PODTETHER_CRI_ROUNDS=20 PODTETHER_CRI_PODS=30` makes it a long one.

use std::fs;
use std::time::{Duration, Instant};

use podtether_net::testing::block_on;
use podtether_supervisor::record::{Identity, Store};

use crate::cri::Cri;
use crate::outlive::engines;
use crate::rig::*;
use crate::runtime::{Runtime, cgroups_named, on_a_node};

/// A pod that the runtime could not start or remove is tried again this long, as a kubelet does.
const PATIENCE: Duration = Duration::from_secs(180);
/// Supervisors killed while pods come, or go: without an end to it no ADD would ever get through.
const SUPERVISORS: u64 = 3;

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

async fn come(cri: Cri, name: String, cgroup: String) -> String {
    let start = Instant::now();
    let mut attempt = 0;
    loop {
        match cri.run(&name, attempt, &cgroup).await {
            Ok(id) => return id,
            Err(e) => assert!(start.elapsed() < PATIENCE, "{name}: {e}"),
        }
        attempt += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn go(cri: Cri, id: String) -> String {
    let start = Instant::now();
    while let Err(e) = cri.remove(&id).await {
        assert!(start.elapsed() < PATIENCE, "{id}: {e}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    id
}

/// Kills until all of `tasks` are done; what they returned, and how many supervisors and engines died.
async fn trouble(
    rig: &mut Rig,
    dice: &mut Dice,
    tasks: Vec<tokio::task::JoinHandle<String>>,
    killed: &mut [u64; 2],
) -> Vec<String> {
    let mut left = SUPERVISORS;
    while !tasks.iter().all(|task| task.is_finished()) {
        tokio::time::sleep(Duration::from_millis(50 + dice.roll(400))).await;
        if left > 0 && dice.roll(3) == 0 {
            left -= 1;
            rig.kill();
            // Calls of the runtime may find nobody.
            tokio::time::sleep(Duration::from_millis(dice.roll(150))).await;
            rig.start();
            killed[0] += 1;
            continue;
        }
        let engines = engines();
        if let Some(pid) = engines.get(usize::try_from(dice.roll(64)).unwrap() % engines.len().max(1)) {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(*pid).unwrap());
            killed[1] += u64::from(nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).is_ok());
        }
    }
    let mut done = Vec::new();
    for task in tasks {
        done.push(task.await.unwrap());
    }
    done
}

impl Rig {
    async fn until_clean_but_identities(&self) {
        let start = Instant::now();
        loop {
            let left: Vec<_> = self.leftovers().into_iter().filter(|l| !l.contains("/identities/")).collect();
            if left.is_empty() {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{left:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Lets the time of identities that are kept run out. How many there are.
fn age_identities(state_dir: &std::path::Path) -> usize {
    let store = Store::open(state_dir).unwrap();
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

fn entries(dir: &std::path::Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn pods_come_and_go_while_everything_is_killed() {
    on_a_node("churn::pods_come_and_go_while_everything_is_killed", |dir, names| {
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let clock = clock.subsec_nanos().into();
        let seed = number("SEED", clock);
        let (rounds, pods) = (number("PODTETHER_CRI_ROUNDS", 2), number("PODTETHER_CRI_PODS", 12));
        println!("SEED={seed} PODTETHER_CRI_ROUNDS={rounds} PODTETHER_CRI_PODS={pods}");
        let mut dice = Dice(seed | 1);
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        names.configure(&mut rig);
        rig.stderr = Some(dir.join("supervisor.log"));
        rig.start();
        let runtime = Runtime::start(dir);
        runtime.chain(&dir.join("run/supervisor.sock"));
        runtime.import_pause();
        let mut killed = [0, 0];
        block_on(async {
            rig.client().await;
            let cri = Cri::connect(&runtime.socket()).await;
            let start = Instant::now();
            for round in 0..rounds {
                let come = (0..pods).map(|n| {
                    let cgroup = format!("/{}", names.containers);
                    tokio::spawn(come(cri.clone(), format!("r{round}-{n}"), cgroup))
                });
                let ids = trouble(&mut rig, &mut dice, come.collect(), &mut killed).await;
                // All at once are there and run.
                for n in 0..pods {
                    let up = |p: &serde_json::Value| p["state"] == "running" && p["controlConnected"] == true;
                    rig.client().await;
                    rig.until(&format!("r{round}-{n}"), "running", up).await;
                }
                let go = ids.into_iter().map(|id| tokio::spawn(go(cri.clone(), id)));
                trouble(&mut rig, &mut dice, go.collect(), &mut killed).await;
            }
            let [supervisors, engines_killed] = killed;
            println!(
                "{} pods in {:?}; killed {supervisors} supervisors and {engines_killed} engines",
                rounds * pods,
                start.elapsed()
            );
            rig.client().await;
            rig.until_clean_but_identities().await;
            // A DEL that found no supervisor ends the pod, and its identity is kept for a while: as if that had gone by.
            rig.kill();
            let kept = age_identities(&dir.join("state"));
            println!("{kept} identities of pods whose DEL found no supervisor");
            rig.start();
            rig.client().await;
            rig.until_clean(PATIENCE).await;
            assert!(devnet.wait_for(PATIENCE, <[_]>::is_empty).await, "{:?}", devnet.nodes());
        });
        assert_eq!(engines(), [] as [u32; 0]);
        let leased: Vec<String> =
            entries(&runtime.leases()).into_iter().filter(|n| n.starts_with("10.")).collect();
        assert_eq!(
            leased,
            [] as [String; 0],
            "addresses of host-local; the runtime says\n{}",
            runtime.about("destroy network")
        );
        assert_eq!(entries(std::path::Path::new("/run/netns")), [] as [String; 0]);
        let links = fs::read_to_string("/proc/self/net/dev").unwrap();
        let links: Vec<&str> = links.lines().skip(2).filter_map(|l| l.trim().split(':').next()).collect();
        assert!(links.iter().all(|l| ["lo", "cni0"].contains(l)), "{links:?}");
        for dir in cgroups_named(&names.engines) {
            let left: Vec<_> = entries(&dir).into_iter().filter(|n| dir.join(n).is_dir()).collect();
            assert_eq!(left, [] as [String; 0], "{}", dir.display());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let left: Vec<&str> =
            mounts.lines().filter(|l| l.contains("/run/netns/") || l.contains("rootfs")).collect();
        assert!(left.is_empty(), "{left:?}");
    });
}
