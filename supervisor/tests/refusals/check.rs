//! CHECK names the first thing that is not as ADD left it.

use std::fs;
use std::time::Duration;

use ipnet::IpNet;
use podtether_devnet::DevnetConfig;
use podtether_devnet::lab::{CniCall, Tailnet};
use podtether_net::testing::in_namespaces;

use crate::place::{Place, in_pod, refusal};

fn send(pid: u64, signal: i32) {
    // SAFETY: signals an engine that a supervisor of this test started, in the test's own PID namespace.
    assert_eq!(unsafe { libc::kill(i32::try_from(pid).unwrap(), signal) }, 0);
}

/// Leaves a process so many further descriptors, or as many as it could have at first.
fn descriptors(pid: i32, more: Option<usize>) {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: fills one rlimit, which outlives the call.
    let read = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) };
    assert_eq!(read, 0);
    limit.rlim_cur = more.map_or(limit.rlim_max, |more| libc::rlim_t::try_from(open + more).unwrap());
    // SAFETY: reads one rlimit, which outlives the call.
    let set = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(set, 0);
}

#[test]
fn the_first_fault_is_named() {
    in_namespaces("check::the_first_fault_is_named", |dir| {
        let mut place = Place::bare(dir, DevnetConfig::default());
        place.node.configure(&[Tailnet::oauth("default", &place.devnet, &place.ca)], "").unwrap();
        place.node.start_supervisor().unwrap();
        let supervisor = i32::try_from(place.node.supervisor_pid().unwrap()).unwrap();

        let mut pod = place.pod("p");
        let before = place.state(&pod);
        place.add(&mut pod);
        let call = CniCall::new("CHECK");
        let well = |what: &str| drop(place.succeeds(what, &pod, &call));
        well("CHECK of a pod that joined");
        let index = in_pod(&pod, async |n| n.link("ts0").await.unwrap().unwrap().index);
        let failing = |what: &str, says: &[&str]| {
            let says: Vec<&str> = says.iter().copied().chain(["pod default/p"]).collect();
            place.refused(what, &pod, &call, 103, &says)
        };

        for address in pod.addresses().to_vec() {
            let net = IpNet::from(address);
            let (routes, neighbours) = in_pod(&pod, async |n| {
                let found = (n.routes().await.unwrap(), n.neighbours().await.unwrap());
                n.delete_address(index, net).await.unwrap();
                found
            });
            failing("address removed", &["ts0", &format!("no address {net}")]);
            in_pod(&pod, async |n| {
                n.add_address(index, net).await.unwrap();
                // The kernel takes what hangs on a family's last address with it.
                for neighbour in neighbours {
                    n.set_neighbour(neighbour).await.unwrap();
                }
                for route in routes.into_iter().filter(|r| r.link == index && r.gateway.is_some()) {
                    n.add_route(route).await.unwrap();
                }
            });
            well("address put back");
        }
        for range in ["100.64.0.0/10", "fd7a:115c:a1e0::/48"] {
            let dst: IpNet = range.parse().unwrap();
            let route = in_pod(&pod, async |n| {
                let route = n.routes().await.unwrap().into_iter().find(|r| r.dst == dst).unwrap();
                n.delete_route(route).await.unwrap();
                route
            });
            failing("route removed", &["ts0", &format!("no route to {range}")]);
            in_pod(&pod, async |n| n.add_route(route).await.unwrap());
            well("route put back");
        }

        // What the runtime remembers is not what is there.
        for (list, key, value) in [("ips", "address", "100.64.9.9/32"), ("routes", "dst", "100.99.0.0/16")] {
            let mut config = pod.stdin(&place.node, &call);
            let previous = config["prevResult"][list].as_array_mut().unwrap();
            previous.last_mut().unwrap()[key] = value.into();
            let outcome = place.raw(&pod.environment("CHECK"), config.to_string().as_bytes());
            refusal("CHECK of another result", &outcome, 103, &["pod default/p", value, "prevResult"]);
        }

        let report = || place.node.pod_report("p").unwrap();
        let pid = || report()["enginePid"].as_u64().unwrap();
        let first = pid();
        send(first, libc::SIGSTOP);
        let outcome = failing("engine stopped", &["engine", "not answer", "restarted by itself"]);
        assert!(outcome.took < Duration::from_secs(6), "{:?}", outcome.took);
        place.wait("killed and replaced", || {
            let now = report();
            now["state"] == "running" && now["enginePid"] != first
        });
        well("CHECK after a new engine");

        // Enough for a caller or two, too few for another engine.
        descriptors(supervisor, Some(8));
        send(pid(), libc::SIGKILL);
        place.wait("without an engine", || {
            report()["reason"].as_str().unwrap().contains("Too many open files")
        });
        failing("engine dead", &["engine is not running", "Too many open files", "restarted by itself"]);
        descriptors(supervisor, None);
        place.wait("running again", || report()["state"] == "running");
        well("CHECK after the engine is back");

        in_pod(&pod, async |n| n.set_down(index).await.unwrap());
        failing("ts0 down", &["ts0"]);
        in_pod(&pod, async |n| n.delete_link("ts0").await.unwrap());
        failing("ts0 gone", &["ts0 is missing"]);

        place.del(&pod);
        place.no_devices();
        place.soon_unchanged("a pod that was broken", &pod, &before);
        place.finish();
    });
}
