//! A socket that nobody serves, and one whose owner says nothing.

use std::os::unix::net::UnixListener;
use std::time::Duration;

use podtether_devnet::DevnetConfig;
use podtether_devnet::lab::{CniCall, Pod};
use podtether_net::testing::in_namespaces;
use serde_json::json;

use crate::place::{Place, brief, newest, refusal};

/// Every verb while the supervisor is away; `why` is in each sentence.
fn nobody(place: &Place, pod: &Pod, case: &str, why: &str) {
    let socket = place.node.socket().display().to_string();
    for verb in ["ADD", "CHECK"] {
        let call = CniCall { timeout_s: 5, ..CniCall::new(verb) };
        let mut config = pod.stdin(&place.node, &call);
        config["prevResult"] = joined(pod, verb);
        let outcome = place.raw(&pod.environment(verb), config.to_string().as_bytes());
        refusal(&format!("{verb}, {case}"), &outcome, 11, &[&socket, why, "podtether-supervisor"]);
        assert!(outcome.took < Duration::from_secs(2), "{case}: {:?}", outcome.took);
    }
    let status = place.refused(&format!("STATUS, {case}"), pod, &newest("STATUS"), 50, &[&socket, why]);
    assert!(status.took < Duration::from_secs(3));
    let mut config = pod.stdin(&place.node, &newest("GC"));
    config["cni.dev/valid-attachments"] = json!([]);
    let outcome = place.raw(&pod.environment("GC"), config.to_string().as_bytes());
    refusal(&format!("GC, {case}"), &outcome, 11, &[&socket, why]);
    // The sandbox has to be able to go; a supervisor that starts finds the pod gone and cleans up.
    let outcome = place.call(pod, &CniCall::new("DEL"));
    println!("DEL, {case}: {}", outcome.stderr.trim());
    assert!(outcome.success && outcome.stderr.contains(&socket), "{case}: {outcome:?}");
    let outcome = place.call(pod, &newest("VERSION"));
    assert_eq!(
        outcome.answer["supportedVersions"],
        json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]),
        "{case}"
    );
}

/// What a runtime that has seen ADD succeed passes to CHECK.
fn joined(pod: &Pod, verb: &str) -> serde_json::Value {
    let mut result = pod.primary_result.clone();
    if verb == "CHECK" {
        let ts0 = json!({"name": "ts0", "sandbox": pod.netns_path});
        result["interfaces"].as_array_mut().unwrap().push(ts0);
    }
    result
}

#[test]
fn a_socket_that_nobody_serves() {
    in_namespaces("unserved::a_socket_that_nobody_serves", |dir| {
        let mut place = Place::bare(dir, DevnetConfig::default());
        let pod = place.pod("p");
        let before = place.state(&pod);
        nobody(&place, &pod, "no directory", "No such file");
        place.unchanged("calls without a supervisor", &pod, &before);
        std::fs::create_dir(place.node.run_dir()).unwrap();
        nobody(&place, &pod, "no socket", "No such file");
        drop(UnixListener::bind(place.node.socket()).unwrap());
        nobody(&place, &pod, "a socket left behind", "refused");
        std::fs::remove_file(place.node.socket()).unwrap();
        std::fs::write(place.node.socket(), "").unwrap();
        nobody(&place, &pod, "a file in its place", "refused");

        // Somebody listens and says nothing: every verb ends by its time.
        std::fs::remove_file(place.node.socket()).unwrap();
        let _silent = UnixListener::bind(place.node.socket()).unwrap();
        std::thread::scope(|scope| {
            for (verb, code) in [("ADD", 11), ("DEL", 11)] {
                let (place, pod) = (&place, &pod);
                scope.spawn(move || {
                    let says = ["no answer in time", "the runtime tries again"];
                    let outcome =
                        place.refused(&format!("{verb}, silence"), pod, &brief(verb, 2), code, &says);
                    assert!(outcome.took < Duration::from_millis(2500), "{verb}: {:?}", outcome.took);
                });
            }
            let outcome =
                place.refused("STATUS, silence", &pod, &newest("STATUS"), 50, &["no answer in time"]);
            assert!(outcome.took < Duration::from_millis(3300), "STATUS: {:?}", outcome.took);
        });

        place.secrets_kept();
    });
}
