//! The supervisor's pod is deleted, rolled out and killed while pods talk.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cluster::{Cluster, Pod};
use crate::node::{kubectl, named, on_a_cluster};
use crate::rig::{Pinger, signal};
use crate::traffic::Stream;

const PACE: Duration = Duration::from_millis(5);

/// The uid of the supervisor's pod: of the one that is not being deleted.
fn uid(cluster: &Cluster<'_>) -> String {
    cluster.until("the supervisor has one pod", || {
        let (text, done) = kubectl(&["-n", "podtether", "get", "pods", "-o", "json"], None);
        let listed: Value = serde_json::from_str(&text).ok().filter(|_| done)?;
        let pods = listed["items"].as_array()?;
        let mut living = pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let uid = living.next()?["metadata"]["uid"].as_str()?.to_owned();
        living.next().is_none().then_some(uid)
    })
}

/// Nothing of a pod is left on the node: no directory, and no mount in any process's eyes.
fn is_gone(cluster: &Cluster<'_>, uid: &str) {
    let dir = format!("/var/lib/kubelet/pods/{uid}");
    cluster.until("the old pod's directory is gone", || (!Path::new(&dir).exists()).then_some(()));
    for pid in named("podtether-engine") {
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        assert!(mounts.lines().count() == 1 && mounts.contains(" / / ro,"), "{mounts}");
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let left: Vec<&str> = mounts.lines().filter(|line| line.contains(uid)).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_supervisors_pod_goes_and_traffic_does_not_notice() {
    on_a_cluster("deleted::the_supervisors_pod_goes_and_traffic_does_not_notice", |names| {
        let cluster = Cluster::start(names);
        cluster.deploy("web", 2);
        let before = cluster.settled(2);
        cluster.until("Kubernetes is told of both", || {
            let (text, done) = kubectl(&["get", "pods", "-o", "json"], None);
            let listed: Value = serde_json::from_str(&text).ok().filter(|_| done)?;
            let told = |pod: &Pod| {
                let of =
                    listed["items"].as_array()?.iter().find(|item| item["metadata"]["name"] == pod.name)?;
                let addresses = of["metadata"]["annotations"]["podtether.dev/addresses"].as_str()?;
                addresses.contains(&pod.address.to_string()).then_some(())
            };
            before.iter().map(told).collect::<Option<Vec<()>>>()?;
            let (events, done) =
                kubectl(&["get", "events", "--field-selector=reason=Joined", "-o", "name"], None);
            (done && events.lines().count() == 2).then_some(())
        });
        assert_eq!(
            before[0].listed["limits"],
            serde_json::json!(["cgroup", "memory", "pids", "cpu", "mounts"])
        );
        let answering = cluster.listen(&before);
        cluster.all_reach(&before);
        let [a, b] = [&before[0], &before[1]].map(|pod| cluster.netns(pod));
        let ping = Pinger::start(&a, SocketAddr::new(before[1].address, 7), PACE);
        let stream = Stream::start(&a, &b, SocketAddr::new(before[1].address, 9), PACE);
        let mut supervisor = cluster.serving();
        let delete = "-n podtether delete pod -l app=podtether --wait=false";
        type Way<'a> = (&'a str, Box<dyn Fn(u32) + 'a>);
        let ways: [Way<'_>; 4] = [
            ("deleted", Box::new(|_| drop(cluster.must(delete)))),
            (
                "deleted by force",
                Box::new(|_| drop(cluster.must(&format!("{delete} --grace-period=0 --force")))),
            ),
            ("rolled out", Box::new(|_| drop(cluster.must("-n podtether rollout restart ds/podtether")))),
            ("killed", Box::new(|pid| signal(pid, libc::SIGKILL))),
        ];
        for (way, end) in ways {
            let old = uid(&cluster);
            let begun = Instant::now();
            end(supervisor);
            supervisor = cluster.serving_but(&[supervisor]);
            let after = cluster.settled(2);
            println!("{way}: the pods are taken up {:?} later", begun.elapsed());
            for (before, after) in before.iter().zip(&after) {
                same(before, after);
            }
            if way == "killed" {
                assert_eq!(uid(&cluster), old, "its container was started again");
            } else {
                assert_ne!(uid(&cluster), old);
                is_gone(&cluster, &old);
                println!("{way}: nothing is left of the old pod {:?} later", begun.elapsed());
            }
        }
        let (sent, slowest) = stream.finish();
        let back = ping.finish();
        let lost = back.iter().filter(|b| b.is_none()).count();
        println!(
            "{} pings, {lost} lost, the slowest took {:?}; {sent} numbers over one TCP connection, the slowest took {slowest:?}",
            back.len(),
            back.iter().flatten().max()
        );
        assert_eq!(lost, 0);

        // The last one can do all that the first one could.
        signal(before[0].engine, libc::SIGKILL);
        let after = cluster
            .until("another engine", || cluster.running(2).filter(|pods| pods[0].engine != before[0].engine));
        assert_eq!(after[0].address, before[0].address);
        cluster.all_reach(&after);
        drop((answering, a, b));
        cluster.must("delete deployment/web");
        cluster.nothing_left();
    });
}

fn same(before: &Pod, after: &Pod) {
    for same in
        ["uid", "enginePid", "ifindex", "udpPort", "udp6Port", "addresses", "mac", "restarts", "limits"]
    {
        assert_eq!(after.listed[same], before.listed[same], "{same}");
    }
}
