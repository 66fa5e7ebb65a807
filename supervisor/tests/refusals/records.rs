//! Records that are damaged, or from another build.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use podtether_devnet::lab::{CniCall, Pod};
use podtether_devnet::probe::udp::{UdpEcho, ask};
use podtether_net::testing::in_namespaces;
use serde_json::Value;

use crate::place::{Place, ts0_addresses};

/// The file in `state_dir/kind` that speaks of a pod.
fn record(place: &Place, kind: &str, pod: &Pod) -> PathBuf {
    let files = fs::read_dir(place.node.state_dir().join(kind)).unwrap().flatten();
    let needle = format!("\"{}\"", pod.uid);
    let found = files.map(|f| f.path()).find(|p| fs::read_to_string(p).is_ok_and(|t| t.contains(&needle)));
    found.unwrap_or_else(|| panic!("no record of {} in {kind}", pod.name))
}

/// Of a line `+ process: PID NAME`.
fn is_zombie(line: &str) -> bool {
    let pid = line.split(' ').nth(2).unwrap();
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

#[test]
fn damaged_records_are_kept_aside_and_the_others_start() {
    in_namespaces("records::damaged_records_are_kept_aside_and_the_others_start", |dir| {
        let mut place = Place::new(dir);
        let names = ["half", "newer", "keyless", "well", "fine"];
        let mut pods: Vec<Pod> = names.iter().map(|n| place.pod(n)).collect();
        let before = place.state(&pods[0]);
        for pod in &mut pods {
            place.add(pod);
        }
        let [half, newer, keyless, well, fine] = &pods[..] else { unreachable!() };
        let _echo = UdpEcho::start(&fine.netns, "[::]:7".parse().unwrap()).unwrap();
        let reach = |limit| {
            let to = SocketAddr::new(fine.v4().unwrap(), 7);
            ask(&well.netns, to, b"x", limit).unwrap().is_some()
        };
        assert!(reach(Duration::from_secs(10)));
        place.node.kill_supervisor().unwrap();

        let torn = record(&place, "attachments", half);
        let text = fs::read_to_string(&torn).unwrap();
        fs::write(&torn, &text[..text.len() / 2]).unwrap();
        let future = record(&place, "attachments", newer);
        let future_text = fs::read_to_string(&future).unwrap().replacen(
            "{\"version\":1,",
            "{\"version\":7,\"more\":{},",
            1,
        );
        fs::write(&future, &future_text).unwrap();
        let identity = record(&place, "identities", keyless);
        let identity_text = fs::read_to_string(&identity).unwrap();
        fs::write(&identity, identity_text.replace("\"registered\":true", "\"registered\":null")).unwrap();
        place.node.start_supervisor().unwrap();

        // The others work, with the addresses they had.
        for pod in [well, fine] {
            place.wait("running again", || {
                place.node.pod_report(&pod.name).is_ok_and(|p| p["state"] == "running")
            });
            place.succeeds("CHECK beside damaged records", pod, &CniCall::new("CHECK"));
            assert_eq!(ts0_addresses(pod), pod.addresses());
        }
        place.wait("reachable", || reach(Duration::from_millis(200)));

        // Those are told of, kept aside as they were, and never overwritten.
        let reports = place.node.pods().unwrap();
        println!(
            "{}",
            reports
                .iter()
                .map(|p| format!("{} {} {}\n", p["pod"], p["state"], p["reason"]))
                .collect::<String>()
        );
        let log = place.log();
        for (path, kind, says) in [
            (&torn, "bad-torn", "cut off or damaged"),
            (&future, "bad-newer", "a newer podtether wrote it (version 7, this build reads 1)"),
            (&identity, "bad-torn", "wrong checksum"),
        ] {
            let aside = path.with_extension(kind);
            assert!(aside.is_file() && !path.exists(), "{} is not aside", path.display());
            let line = log.lines().find(|l| l.contains(aside.to_str().unwrap()));
            let line: Value =
                serde_json::from_str(line.unwrap_or_else(|| panic!("no word of {kind}"))).unwrap();
            println!("{}", line["message"]);
            assert!(line["level"] == "WARN" && line["message"].as_str().unwrap().contains(says), "{line}");
        }
        assert_eq!(fs::read_to_string(future.with_extension("bad-newer")).unwrap(), future_text);
        let metrics = place.node.http_get("/metrics").unwrap();
        for counted in [
            "podtether_records_aside 3",
            "podtether_refused_total{reason=\"record_torn\"} 2",
            "podtether_refused_total{reason=\"record_newer\"} 1",
        ] {
            assert!(metrics.contains(counted), "{counted} is not in {metrics}");
        }
        assert_eq!(log.matches("\"reason\":\"record_torn\"").count(), 1, "one line for both");
        let report = place.node.pod_report("keyless").unwrap();
        assert_eq!(report["state"], "stopped");
        assert!(report["reason"].as_str().unwrap().contains("delete the pod"), "{report}");
        let says = ["pod default/keyless", "damaged or missing", "delete the pod"];
        place.refused("CHECK without an identity", keyless, &CniCall::new("CHECK"), 103, &says);
        for pod in [half, newer] {
            let says = [pod.container_id.as_str(), "delete the pod"];
            place.refused("CHECK without a record", pod, &CniCall::new("CHECK"), 103, &says);
        }

        // It stays told after another restart: the files are still there.
        place.node.kill_supervisor().unwrap();
        place.node.start_supervisor().unwrap();
        assert!(place.node.http_get("/metrics").unwrap().contains("podtether_records_aside 3"));

        for pod in &pods {
            place.del(pod);
            assert!(ts0_addresses(pod).is_empty(), "{} keeps its ts0", pod.name);
        }
        let mut again = place.pod("again");
        place.add(&mut again);
        place.del(&again);
        again.destroy(&place.node).unwrap();
        for pod in pods.drain(1..).collect::<Vec<_>>() {
            pod.destroy(&place.node).unwrap();
        }
        // But for the damaged files, the identities they may have belonged to, and this pod itself.
        let mut left = place.changes(&pods[0], &before);
        left.retain(|l| !l.contains(".bad-") && !l.contains("/state/identities/"));
        left.retain(|l| !l.starts_with("- "));
        // The supervisor is another process, and its predecessors' engines are waited for by nobody here.
        left.retain(|l| !l.contains(" process: ") || (l.contains("engin") && !is_zombie(l)));
        assert_eq!(left, [""; 0]);
        place.finish();
    });
}
