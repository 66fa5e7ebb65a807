//! Whole calls, table by table, against a supervisor that answers by a script.

use podtether_proto::PROTO_VERSION;
use podtether_proto::engine::PodRef;
use podtether_proto::node::{Attached, Version};

use self::fake::{Asked, Fake, NETNS, Script, attachment, config, environment, joined, primary};
use super::*;

#[path = "../../tests/fake/mod.rs"]
mod fake;

const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const ASKING: [&str; 5] = ["ADD", "DEL", "CHECK", "GC", "STATUS"];

/// Runs `verb` with the configuration changed by `change`.
async fn call(verb: &str, fake: &Fake, change: impl FnOnce(&mut Value)) -> Outcome {
    let mut config = config(verb, "1.1.0", &fake.socket);
    change(&mut config);
    call_raw(&environment(verb), config.to_string().as_bytes()).await
}

async fn call_raw(environment: &[(&str, String)], mut stdin: &[u8]) -> Outcome {
    let lookup = |name: &str| environment.iter().find(|(key, _)| *key == name).map(|(_, v)| v.clone());
    run(&lookup, &mut stdin).await
}

fn error(outcome: &Outcome) -> (u64, String) {
    assert!(!outcome.success, "{outcome:?}");
    let value: Value = serde_json::from_str(&outcome.stdout).unwrap();
    for key in ["msg", "details"] {
        assert!(value[key].as_str().is_some_and(|text| !text.is_empty()), "{key} in {value}");
    }
    (value["code"].as_u64().unwrap(), value["msg"].as_str().unwrap().to_owned())
}

fn result(outcome: &Outcome) -> Value {
    assert!(outcome.success, "{outcome:?}");
    serde_json::from_str(&outcome.stdout).unwrap()
}

fn quiet_success() -> Outcome {
    Outcome { stdout: String::new(), stderr: String::new(), success: true }
}

fn failing(code: u32) -> CniError {
    CniError { code, msg: "web-0 cannot".into(), details: "do this".into() }
}

/// A socket path where nobody is.
fn nobody() -> Fake {
    let mut fake = Fake::start(Script::default());
    fake.socket.set_file_name("other.sock");
    fake
}

#[tokio::test]
async fn add_asks_once_and_appends_to_prev_result() {
    for version in VERSIONS {
        let fake = Fake::start(Script::default());
        let outcome = call("ADD", &fake, |config| {
            config["cniVersion"] = version.into();
            config["prevResult"] = primary(version);
            config["tailnet"] = "prod".into();
            config["timeoutSeconds"] = 20.into();
        });
        assert_eq!(result(&outcome.await), joined(version));
        let asked = fake.asked();
        let [Asked::Add(request)] = &asked[..] else { panic!("{asked:?}") };
        assert_eq!(request.attachment, attachment());
        assert_eq!((request.netns.as_str(), request.tailnet.as_str()), (NETNS, "prod"));
        let pod = PodRef { uid: "u-1".into(), namespace: "shop".into(), name: "web-0".into() };
        assert_eq!(request.pod, pod);
        assert_eq!(request.annotations["tailscale.com/tags"], "tag:web");
        assert!((10_000..=19_000).contains(&request.timeout_ms), "{} ms", request.timeout_ms);
    }
}

#[tokio::test]
async fn an_exempt_pod_keeps_what_it_has() {
    let fake = Fake::start(Script { add: Ok(Attached::default()), ..Script::default() });
    assert_eq!(result(&call("ADD", &fake, |_| {}).await), primary("1.1.0"));
    let check = call("CHECK", &fake, |config| config["prevResult"] = primary("1.1.0")).await;
    assert_eq!(check, quiet_success());
    assert_eq!(fake.asked().len(), 1, "nothing of ours to check");
}

#[tokio::test]
async fn add_that_is_wrong_in_itself_asks_nobody() {
    let fake = Fake::start(Script::default());
    type Change = fn(&mut Value);
    let table: [(u64, &str, Change); 8] = [
        (7, "prevResult", |c| c["prevResult"] = Value::Null),
        (7, "prevResult", |c| c["prevResult"] = json!([])),
        (100, "ts0", |c| c["prevResult"] = joined("1.1.0")),
        (1, "0.2.0", |c| c["prevResult"]["cniVersion"] = "0.2.0".into()),
        (1, "9.9.9", |c| c["cniVersion"] = "9.9.9".into()),
        (7, "name", |c| c["name"] = Value::Null),
        (7, "failurePolicy", |c| c["failurePolicy"] = "ajar".into()),
        (2, "colour", |c| c["colour"] = "red".into()),
    ];
    for (code, word, change) in table {
        // An open policy does not hide a mistake in the file.
        for policy in ["open", "closed"] {
            let outcome = call("ADD", &fake, |config| {
                config["failurePolicy"] = policy.into();
                change(config);
            });
            let (got, msg) = error(&outcome.await);
            assert_eq!(got, code, "{word}");
            assert!(msg.contains(word), "{msg}");
        }
    }
    let mut environment = environment("ADD");
    environment.retain(|(key, _)| *key != "CNI_ARGS");
    environment.push(("CNI_ARGS", "nonsense".into()));
    let stdin = config("ADD", "1.1.0", &fake.socket).to_string();
    assert_eq!(error(&call_raw(&environment, stdin.as_bytes()).await).0, 4);
    assert_eq!(fake.asked(), []);
    let unchained = call("ADD", &fake, |c| c["prevResult"] = Value::Null).await;
    assert!(unchained.stdout.contains("chain it after the primary plugin"), "{}", unchained.stdout);
}

#[tokio::test]
async fn undecodable_stdin_and_missing_environment() {
    for verb in ASKING {
        assert_eq!(error(&call_raw(&environment(verb), b"{").await).0, 6, "{verb}");
        assert_eq!(error(&call_raw(&environment(verb), b"").await).0, 6, "{verb}");
    }
    for verb in ["ADD", "DEL", "CHECK"] {
        let (code, msg) = error(&call_raw(&[("CNI_COMMAND", verb.to_owned())], b"{}").await);
        assert_eq!(code, 4);
        assert!(msg.contains("CNI_CONTAINERID") && msg.contains("CNI_IFNAME"), "{msg}");
        assert_eq!(msg.contains("CNI_NETNS"), verb != "DEL", "{msg}");
    }
    assert_eq!(error(&call_raw(&[], b"{}").await).0, 4);
}

#[tokio::test]
async fn the_failure_policy_decides_whether_a_pod_starts_without_a_tailnet() {
    // (code from the supervisor, whether "open" lets the pod start)
    let table = [
        (code::TRY_AGAIN, true),
        (code::IO, true),
        (code::REFUSED, true),
        (code::LINK, true),
        (code::NEEDS_ACTION, true),
        (code::BAD_CONFIG, false),
        (code::UNKNOWN_CONTAINER, false),
        (code::INTERFACE_EXISTS, false),
    ];
    for (code, starts) in table {
        let fake = Fake::start(Script { add: Err(failing(code)), ..Script::default() });
        let closed = call("ADD", &fake, |_| {}).await;
        assert_eq!(error(&closed), (code.into(), "web-0 cannot".into()));
        assert_eq!(fake.asked().len(), 1);
        let open = call("ADD", &fake, |config| config["failurePolicy"] = "open".into()).await;
        if starts {
            assert_eq!(result(&open), primary("1.1.0"));
            assert!(open.stderr.contains("web-0 cannot"), "{}", open.stderr);
            assert_eq!(fake.asked().last(), Some(&Asked::Del(attachment())), "nothing appears later");
        } else {
            assert_eq!(error(&open).0, u64::from(code));
        }
    }
    let open = call("ADD", &nobody(), |config| config["failurePolicy"] = "open".into()).await;
    assert_eq!(result(&open), primary("1.1.0"));
}

#[tokio::test]
async fn del_check_and_gc_pass_on_what_the_supervisor_needs() {
    let fake = Fake::start(Script::default());
    for verb in ["DEL", "CHECK", "GC", "STATUS"] {
        assert_eq!(call(verb, &fake, |_| {}).await, quiet_success(), "{verb}");
    }
    let check = CheckRequest {
        attachment: attachment(),
        netns: NETNS.into(),
        addresses: fake::attached().addresses,
        routes: vec!["100.64.0.0/10".parse().unwrap()],
    };
    let gc = GcRequest { network: "pods".into(), valid: vec![("0cff".into(), "eth0".into())] };
    assert_eq!(fake.asked(), [Asked::Del(attachment()), Asked::Check(check), Asked::Gc(gc)]);
}

#[tokio::test]
async fn errors_of_the_supervisor_come_out_as_they_are() {
    for (verb, code) in [("DEL", code::CLEANUP), ("CHECK", code::CHECK_FAILED), ("GC", code::CLEANUP)] {
        for version in VERSIONS {
            if (verb == "GC" && version != "1.1.0") || (verb == "CHECK" && version < "0.4.0") {
                continue;
            }
            let fake = Fake::start(Script { others: Err(failing(code)), ..Script::default() });
            let outcome = call(verb, &fake, |config| config["cniVersion"] = version.into()).await;
            let printed: Value = serde_json::from_str(&outcome.stdout).unwrap();
            let expected =
                json!({"cniVersion": version, "code": code, "msg": "web-0 cannot", "details": "do this"});
            assert_eq!(printed, expected);
            assert!(!outcome.success);
        }
    }
}

#[tokio::test]
async fn del_needs_neither_namespace_nor_prev_result_nor_a_sound_file() {
    let fake = Fake::start(Script::default());
    let mut environment = environment("DEL");
    environment.retain(|(key, _)| !matches!(*key, "CNI_NETNS" | "CNI_ARGS"));
    let mut config = config("DEL", "0.4.0", &fake.socket);
    config["prevResult"] = Value::Null;
    config["timeoutSeconds"] = "soon".into();
    config["colour"] = "red".into();
    let outcome = call_raw(&environment, config.to_string().as_bytes()).await;
    assert_eq!(outcome, quiet_success());
    assert_eq!(fake.asked(), [Asked::Del(attachment())]);
}

#[tokio::test]
async fn check_and_gc_without_their_input_ask_nobody() {
    let fake = Fake::start(Script::default());
    assert_eq!(error(&call("CHECK", &fake, |c| c["prevResult"] = Value::Null).await).0, 7);
    let no_list = |c: &mut Value| drop(c.as_object_mut().unwrap().remove("cni.dev/valid-attachments"));
    assert_eq!(error(&call("GC", &fake, no_list).await).0, 7);
    assert_eq!(fake.asked(), []);
}

#[tokio::test]
async fn verbs_that_a_version_does_not_have() {
    let fake = Fake::start(Script::default());
    for verb in ["GC", "STATUS", "CHECK"] {
        for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0"] {
            if verb == "CHECK" && version >= "0.4.0" {
                continue;
            }
            let (code, msg) = error(&call(verb, &fake, |c| c["cniVersion"] = version.into()).await);
            assert_eq!(code, 1, "{verb} {version}");
            assert!(msg.contains(verb) && msg.contains(version), "{msg}");
        }
    }
    assert_eq!(fake.asked(), []);
}

#[tokio::test]
async fn a_socket_that_nobody_serves() {
    let fake = nobody();
    // A file left behind by a supervisor that was killed, too.
    let left_behind = nobody();
    drop(std::os::unix::net::UnixListener::bind(&left_behind.socket).unwrap());
    for fake in [&fake, &left_behind] {
        for (verb, expected) in [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)] {
            let (code, msg) = error(&call(verb, fake, |_| {}).await);
            assert_eq!(code, expected, "{verb}");
            assert!(msg.contains(&fake.socket.display().to_string()), "{msg}");
        }
        let del = call("DEL", fake, |_| {}).await;
        assert!(del.success && del.stdout.is_empty());
        assert!(del.stderr.contains("0cff"), "{}", del.stderr);
    }
}

#[tokio::test]
async fn a_supervisor_that_does_not_answer() {
    let table = [
        (Script { stuck: true, ..Script::default() }, "no answer in time"),
        (Script { breaks: true, ..Script::default() }, "broke"),
    ];
    for (script, word) in table {
        let fake = Fake::start(script);
        for verb in ["ADD", "DEL", "CHECK", "GC"] {
            let (code, msg) = error(&call(verb, &fake, |c| c["timeoutSeconds"] = 1.into()).await);
            assert_eq!(code, 11, "{verb}");
            assert!(msg.contains(word), "{verb}: {msg}");
        }
    }
}

#[tokio::test]
async fn del_asks_again_when_the_supervisor_ends_in_the_middle_and_succeeds_when_it_stays_away() {
    let fake = Fake::start(Script { breaks: true, ..Script::default() });
    error(&call("DEL", &fake, |c| c["timeoutSeconds"] = 1.into()).await);
    assert!(fake.asked().len() > 1, "{:?}", fake.asked());

    let fake = Fake::start(Script { breaks: true, ..Script::default() });
    let socket = fake.socket.clone();
    let removed = async {
        while fake.asked().is_empty() {
            tokio::task::yield_now().await;
        }
        std::fs::remove_file(&socket).unwrap();
    };
    let (del, ()) = tokio::join!(call("DEL", &fake, |_| {}), removed);
    assert!(del.success, "{}", del.stdout);
}

#[tokio::test]
async fn status_answers_within_three_seconds() {
    let fake = Fake::start(Script { silent: true, ..Script::default() });
    let started = Instant::now();
    assert_eq!(error(&call("STATUS", &fake, |_| {}).await).0, 50);
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_supervisor_of_another_version_is_not_talked_to() {
    let old = Version { major: PROTO_VERSION.major + 1, minor: 0 };
    let fake = Fake::start(Script { version: old, ..Script::default() });
    for (verb, expected) in [("ADD", 11), ("DEL", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)] {
        let (code, msg) = error(&call(verb, &fake, |_| {}).await);
        assert_eq!(code, expected, "{verb}");
        assert!(msg.contains(&format!("{}.{}", PROTO_VERSION.major, PROTO_VERSION.minor)), "{msg}");
    }
    assert_eq!(fake.asked(), []);
}

#[tokio::test]
async fn version_lists_what_is_spoken() {
    let supported = json!(VERSIONS);
    for (stdin, version) in [
        (r#"{"cniVersion":"0.4.0"}"#, "0.4.0"),
        (r#"{"cniVersion":"1.0.0","name":"x"}"#, "1.0.0"),
        (r#"{"cniVersion":"0.3.1"}"#, "0.3.1"),
        ("{}", "1.1.0"),
        ("", "1.1.0"),
        ("\n", "1.1.0"),
    ] {
        let outcome = call_raw(&environment("VERSION"), stdin.as_bytes()).await;
        assert_eq!(
            result(&outcome),
            json!({"cniVersion": version, "supportedVersions": supported}),
            "{stdin}"
        );
    }
    assert_eq!(error(&call_raw(&environment("VERSION"), b"nonsense").await).0, 6);
}
