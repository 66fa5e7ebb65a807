//! Calls that are wrong in themselves: nothing is asked of the tailnet, and nothing is made.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use podtether_devnet::lab::{CniCall, Pod};
use podtether_net::testing::in_namespaces;
use serde_json::{Value, json};

use crate::place::{Place, newest, refusal};

const VERBS: [&str; 3] = ["ADD", "DEL", "CHECK"];

/// The environment of `verb` with one variable changed, or taken away.
fn environment(pod: &Pod, verb: &str, name: &str, value: Option<&str>) -> Vec<(&'static str, String)> {
    let mut environment = pod.environment(verb);
    environment.retain(|(n, _)| *n != name || value.is_some());
    for (n, v) in &mut environment {
        if *n == name
            && let Some(value) = value
        {
            *v = value.to_owned();
        }
    }
    environment
}

#[test]
fn wrong_calls_are_refused_and_change_nothing() {
    in_namespaces("calls::wrong_calls_are_refused_and_change_nothing", |dir| {
        let mut place = Place::new(dir);
        let pod = place.pod("p");
        let before = place.state(&pod);

        malformed(&place, &pod);
        variables(&place, &pod);
        fields(&place, &pod);
        previous_results(&place, &pod);
        counted(&place);

        place.unchanged("a wrong call", &pod, &before);
        assert_eq!(place.devnet.auth_keys(), [], "nothing was minted");
        assert!(place.devnet.nodes().is_empty());
        assert_eq!(place.node.pods().unwrap(), [Value::Null; 0]);
        place.finish();
    });
}

/// What of the above the plugin could tell, each kind in one line; and a caller that speaks something else.
fn counted(place: &Place) {
    for noise in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0, 0, 0, 1, 0xff], &[0xff; 64]].repeat(5) {
        let mut stream = UnixStream::connect(place.node.run_dir().join("supervisor.sock")).unwrap();
        stream.write_all(noise).unwrap();
        // It hangs up.
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let metrics = place.node.http_get("/metrics").unwrap();
    let count = |reason: &str| -> u64 {
        let name = format!("podtether_refused_total{{reason=\"{reason}\"}} ");
        metrics.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |n| n.parse().unwrap())
    };
    let log = place.log();
    for (reason, least) in [("rpc_frame", 15), ("cni_version", 20), ("cni_field", 1), ("cni_config", 15)] {
        assert!(count(reason) >= least, "{reason}: {}", count(reason));
        let lines = log.lines().filter(|l| l.contains(&format!("\"reason\":\"{reason}\""))).count();
        println!("{reason}: {} counted, {lines} lines", count(reason));
        assert!((1..=3).contains(&lines), "{reason}: {lines} lines");
    }
}

fn malformed(place: &Place, pod: &Pod) {
    let good = pod.stdin(&place.node, &CniCall::new("ADD")).to_string();
    let halves: [(&str, &[u8]); 6] = [
        ("an empty stdin", b""),
        ("half a configuration", &good.as_bytes()[..good.len() / 2]),
        ("two configurations", &[good.as_bytes(), good.as_bytes()].concat()),
        ("bytes that are no text", b"\xff\xfe\x00{}"),
        ("a list", b"[]"),
        ("a number", b"42"),
    ];
    for verb in VERBS {
        for (what, stdin) in halves {
            let outcome = place.raw(&pod.environment(verb), stdin);
            refusal(&format!("{verb} of {what}"), &outcome, 6, &["network configuration"]);
        }
    }
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    let deep = format!("{{\"cniVersion\":\"1.0.0\",\"name\":\"x\",\"args\":{deep}}}");
    refusal("nesting", &place.raw(&pod.environment("ADD"), deep.as_bytes()), 6, &["recursion limit"]);
    for version in [json!("0.1.0"), json!("0.2.0"), json!("2.0.0"), json!("1"), json!(""), Value::Null] {
        for verb in VERBS {
            let mut config = pod.stdin(&place.node, &CniCall::new(verb));
            config["cniVersion"] = version.clone();
            let outcome = place.raw(&pod.environment(verb), config.to_string().as_bytes());
            let what = format!("{verb} in cniVersion {version}");
            refusal(&what, &outcome, 1, &["cniVersion", "0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"]);
        }
    }
    for (verb, version) in [("GC", "1.0.0"), ("STATUS", "0.4.0")] {
        let call = CniCall { version: version.into(), ..newest(verb) };
        place.refused(verb, pod, &call, 1, &[verb, "1.1.0"]);
    }
}

fn variables(place: &Place, pod: &Pod) {
    let long = "x".repeat(300);
    let table = [
        ("ADD", "CNI_CONTAINERID", None, "CNI_CONTAINERID not set"),
        ("DEL", "CNI_CONTAINERID", None, "CNI_CONTAINERID not set"),
        ("CHECK", "CNI_CONTAINERID", Some(""), "CNI_CONTAINERID not set"),
        ("ADD", "CNI_NETNS", None, "CNI_NETNS not set"),
        ("CHECK", "CNI_NETNS", None, "CNI_NETNS not set"),
        ("ADD", "CNI_IFNAME", None, "CNI_IFNAME not set"),
        ("ADD", "CNI_COMMAND", None, "CNI_COMMAND is not set"),
        ("ADD", "CNI_COMMAND", Some("add"), "it must be ADD"),
        ("ADD", "CNI_CONTAINERID", Some("../../etc"), "CNI_CONTAINERID is"),
        ("DEL", "CNI_CONTAINERID", Some("a/b"), "CNI_CONTAINERID is"),
        ("ADD", "CNI_CONTAINERID", Some(&long), "CNI_CONTAINERID is"),
        ("ADD", "CNI_IFNAME", Some("a name of 16 or more"), "CNI_IFNAME is"),
        ("ADD", "CNI_IFNAME", Some(".."), "CNI_IFNAME is"),
        ("ADD", "CNI_ARGS", Some("K8S_POD_NAME"), "KEY=VALUE"),
        ("ADD", "CNI_ARGS", Some("K8S_POD_NAME=../x;IgnoreUnknown=1"), "K8S_POD_NAME"),
        ("ADD", "CNI_ARGS", Some("K8S_POD_UID=a\nb"), "K8S_POD_UID"),
        ("ADD", "CNI_ARGS", Some("ODD=1"), "ODD"),
        ("ADD", "CNI_NETNS", Some("netns/relative"), "CNI_NETNS"),
        // The node's own namespace: a link there would change the node.
        ("ADD", "CNI_NETNS", Some("/proc/1/ns/mnt"), ""),
    ];
    for (verb, name, value, says) in table {
        let config = pod.stdin(&place.node, &CniCall::new(verb)).to_string();
        let outcome = place.raw(&environment(pod, verb, name, value), config.as_bytes());
        let code = if value == Some("/proc/1/ns/mnt") { 3 } else { 4 };
        refusal(&format!("{verb} with {name} = {value:?}"), &outcome, code, &[says]);
    }
    let config = pod.stdin(&place.node, &CniCall::new("ADD")).to_string();
    let all = place.raw(&[("CNI_COMMAND", "ADD".into())], config.as_bytes());
    refusal("ADD without anything", &all, 4, &["CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME"]);
    let supervisor = format!("/proc/{}/ns/net", place.node.supervisor_pid().unwrap());
    let outcome = place.raw(&environment(pod, "ADD", "CNI_NETNS", Some(&supervisor)), config.as_bytes());
    refusal(
        "ADD of a pod on the host network",
        &outcome,
        4,
        &["pod default/p", "node's own", "host network"],
    );
}

fn fields(place: &Place, pod: &Pod) {
    let table = [
        ("sokcet", json!("/x"), 2, "\"sokcet\""),
        ("name", json!(""), 7, "name"),
        ("name", json!("a b"), 7, "name"),
        ("name", Value::Null, 7, "no name"),
        ("socket", json!("relative.sock"), 7, "absolute path"),
        ("socket", json!(1), 7, "absolute path"),
        ("timeoutSeconds", json!(0), 7, "from 1 to 600"),
        ("timeoutSeconds", json!("60"), 7, "from 1 to 600"),
        ("failurePolicy", json!("maybe"), 7, "\"closed\" or \"open\""),
        ("ifName", json!("a/b"), 7, "interface name"),
        ("tailnet", json!("../x"), 7, "[tailnet.NAME]"),
        ("tailnet", json!("other"), 7, "no tailnet is called \"other\""),
        ("runtimeConfig", json!([]), 7, "runtimeConfig"),
        ("prevResult", Value::Null, 7, "ADD without prevResult"),
    ];
    for (key, value, code, says) in table {
        let mut config = pod.stdin(&place.node, &CniCall::new("ADD"));
        config[key] = value.clone();
        let outcome = place.raw(&pod.environment("ADD"), config.to_string().as_bytes());
        refusal(&format!("ADD with {key} = {value}"), &outcome, code, &[says]);
    }
    for valid in [None, Some(json!({})), Some(json!([{"containerID": 1}]))] {
        let mut config = pod.stdin(&place.node, &newest("GC"));
        config["cni.dev/valid-attachments"] = valid.clone().unwrap_or_default();
        if valid.is_none() {
            config.as_object_mut().unwrap().remove("cni.dev/valid-attachments");
        }
        let outcome = place.raw(&pod.environment("GC"), config.to_string().as_bytes());
        refusal(&format!("GC of {valid:?}"), &outcome, 7, &["cni.dev/valid-attachments"]);
    }
}

fn previous_results(place: &Place, pod: &Pod) {
    let table = [
        (json!("x"), 7, "prevResult is not an object"),
        (json!({"ips": {}}), 7, "ips"),
        (json!({"ips": [{"address": "10.0.0.1"}]}), 7, "CIDR"),
        (json!({"cniVersion": "0.2.0", "ip4": {}}), 1, "prevResult has cniVersion"),
        (json!({"interfaces": [{"name": "ts0", "sandbox": "/x"}]}), 100, "interface ts0 in the pod already"),
    ];
    for (value, code, says) in table {
        let mut config = pod.stdin(&place.node, &CniCall::new("ADD"));
        config["prevResult"] = value.clone();
        let outcome = place.raw(&pod.environment("ADD"), config.to_string().as_bytes());
        refusal(&format!("ADD after {value}"), &outcome, code, &[says]);
    }
}
