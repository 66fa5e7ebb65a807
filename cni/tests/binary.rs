//! The real binary, called as a runtime calls it.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod fake;

use std::io::Write;
use std::process::{Command, Output, Stdio};

use fake::{Asked, Fake, Script, config, environment, joined, primary};
use podtether_proto::node::{CniError, code};
use serde_json::{Value, json};

const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

fn call(environment: &[(&str, String)], stdin: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_podtether-cni"))
        .env_clear()
        .envs(environment.iter().map(|(key, value)| (key, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may have answered without reading.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

fn printed(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error} in {:?}", String::from_utf8_lossy(&output.stdout)))
}

#[test]
fn every_verb_in_every_version() {
    for version in VERSIONS {
        for verb in ["ADD", "CHECK", "DEL", "GC", "STATUS", "VERSION"] {
            let fake = Fake::start(Script::default());
            let output = call(&environment(verb), config(verb, version, &fake.socket).to_string().as_bytes());
            let case = format!("{verb} {version}");
            let exit = output.status.code();
            if matches!(verb, "GC" | "STATUS") && version != "1.1.0" || verb == "CHECK" && version < "0.4.0" {
                assert_eq!(exit, Some(1), "{case}");
                assert_eq!(printed(&output)["code"], 1, "{case}");
                assert_eq!(printed(&output)["cniVersion"], version, "{case}");
                assert_eq!(fake.asked(), [], "{case}");
                continue;
            }
            assert_eq!(exit, Some(0), "{case}: {output:?}");
            assert!(output.stderr.is_empty(), "{case}: {output:?}");
            match verb {
                "ADD" => assert_eq!(printed(&output), joined(version), "{case}"),
                "VERSION" => assert_eq!(
                    printed(&output),
                    json!({"cniVersion": version, "supportedVersions": VERSIONS}),
                    "{case}"
                ),
                _ => assert!(output.stdout.is_empty(), "{case}"),
            }
            assert_eq!(fake.asked().len(), usize::from(!matches!(verb, "STATUS" | "VERSION")), "{case}");
        }
    }
}

#[test]
fn errors_are_json_on_stdout_with_exit_code_1() {
    let refused = CniError { code: code::REFUSED, msg: "no such tag".into(), details: "own it".into() };
    let fake = Fake::start(Script { add: Err(refused.clone()), others: Err(refused), ..Script::default() });
    for version in VERSIONS {
        for verb in ["ADD", "CHECK", "DEL"].into_iter().filter(|verb| *verb != "CHECK" || version >= "0.4.0")
        {
            let output = call(&environment(verb), config(verb, version, &fake.socket).to_string().as_bytes());
            assert_eq!(output.status.code(), Some(1));
            let expected =
                json!({"cniVersion": version, "code": 101, "msg": "no such tag", "details": "own it"});
            assert_eq!(printed(&output), expected);
        }
    }
    for (variables, stdin, code) in [
        (vec![], &b"{}"[..], 4),
        (environment("PING"), b"{}", 4),
        (environment("ADD"), b"not json", 6),
        (environment("ADD"), b"\xff\xfe", 6),
        (environment("ADD"), br#"{"cniVersion":"0.2.0","name":"pods"}"#, 1),
        (environment("ADD"), br#"{"cniVersion":"1.0.0","name":"pods"}"#, 7),
    ] {
        let output = call(&variables, stdin);
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(printed(&output)["code"], code, "{variables:?}");
    }
}

#[test]
fn a_request_the_size_of_the_largest_annotations_goes_through() {
    let fake = Fake::start(Script::default());
    let mut config = config("ADD", "1.1.0", &fake.socket);
    let annotations = "io.kubernetes.cri.pod-annotations";
    config["runtimeConfig"] = json!({annotations: {"big": "x".repeat(900_000)}});
    let output = call(&environment("ADD"), config.to_string().as_bytes());
    assert_eq!(printed(&output), joined("1.1.0"));
    config["runtimeConfig"] = json!({annotations: {"big": "x".repeat(1_100_000)}});
    let output = call(&environment("ADD"), config.to_string().as_bytes());
    assert_eq!(printed(&output)["code"], 6);
    assert_eq!(fake.asked().len(), 1);
}

#[test]
fn an_open_policy_says_on_stderr_what_went_wrong() {
    let fake = Fake::start(Script::default());
    let mut config = config("ADD", "1.0.0", &fake.socket.with_file_name("other.sock"));
    config["failurePolicy"] = "open".into();
    let output = call(&environment("ADD"), config.to_string().as_bytes());
    assert!(output.status.success());
    assert_eq!(printed(&output), primary("1.0.0"));
    assert!(String::from_utf8_lossy(&output.stderr).contains("without a tailnet"), "{output:?}");
}

#[test]
fn calls_for_many_pods_at_once_do_not_wait_for_each_other() {
    let fake = Fake::start(Script::default());
    let stdin = config("ADD", "1.1.0", &fake.socket).to_string();
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| {
                let output = call(&environment("ADD"), stdin.as_bytes());
                assert_eq!(printed(&output), joined("1.1.0"));
            });
        }
    });
    assert_eq!(fake.asked().iter().filter(|asked| matches!(asked, Asked::Add(_))).count(), 20);
}

#[test]
fn the_supervisor_hears_of_calls_that_it_would_not_see_and_counts_its_own_itself() {
    let fake = Fake::start(Script::default());
    let with = |key: &str, value: Value| {
        let mut config = config("ADD", "1.0.0", &fake.socket);
        config[key] = value;
        call(&environment("ADD"), config.to_string().as_bytes())
    };
    for (key, value, code) in [
        ("sokcet", json!("/x"), 2),
        ("timeoutSeconds", json!(0), 7),
        ("cniVersion", json!("0.2.0"), 1),
        ("prevResult", Value::Null, 7),
    ] {
        assert_eq!(printed(&with(key, value))["code"], code, "{key}");
    }
    assert_eq!(fake.misread(), [2, 7, 1, 7]);
    assert_eq!(fake.asked(), []);
    drop(fake);

    let refuses = CniError { code: code::BAD_CONFIG, msg: "no such tailnet".into(), details: String::new() };
    let fake = Fake::start(Script { add: Err(refuses), ..Script::default() });
    let output = call(&environment("ADD"), config("ADD", "1.0.0", &fake.socket).to_string().as_bytes());
    assert_eq!(printed(&output)["code"], 7);
    assert_eq!(fake.misread(), [0; 0]);
}
