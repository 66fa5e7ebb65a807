//! What a join leaves in the logs: who said what about whom, and no secret.

use std::fs;
use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE, BASE64_URL_SAFE_NO_PAD};
use podtether_core::key::DiscoPrivate;
use podtether_devnet::DevnetConfig;
use podtether_devnet::lab::{CniCall, Node, Programs, Tailnet};
use serde_json::Value;

use crate::{Rig, engine_pid, lab_test, wait_for, wait_reachable};

/// A secret that the lab used, by name, and in every form in which it might be written.
struct Secret {
    name: String,
    forms: Vec<String>,
}

impl Secret {
    /// Of a text: itself, and its bytes' forms.
    fn text(name: &str, text: &str) -> Self {
        let mut secret = Self::bytes(name, text.as_bytes());
        secret.forms.push(text.to_owned());
        secret
    }

    fn bytes(name: &str, bytes: &[u8]) -> Self {
        let engines = [BASE64_STANDARD, BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE, BASE64_URL_SAFE_NO_PAD];
        let mut forms: Vec<String> = engines.iter().map(|engine| engine.encode(bytes)).collect();
        let list =
            |separator: &str| bytes.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator);
        let hex = hex::encode(bytes);
        forms.extend([hex.to_uppercase(), hex, list(","), list(", ")]);
        Self { name: name.to_owned(), forms }
    }
}

/// What is found of `secrets` in `lines`.
fn leaks(secrets: &[Secret], lines: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for line in lines {
        for secret in secrets {
            if secret.forms.iter().any(|form| line.contains(form.as_str())) {
                found.push(format!("{}: {line}", secret.name));
            }
        }
    }
    found
}

/// Everything secret that this node, its pods and its credential have.
fn secrets(rig: &Rig, node: &Node) -> Vec<Secret> {
    let mut secrets = Vec::new();
    let (_, secret) = rig.devnet.oauth_client();
    secrets.push(Secret::text("OAuth secret", secret));
    secrets.extend(rig.devnet.api_tokens().iter().map(|token| Secret::text("API token", token)));
    secrets.extend(rig.devnet.auth_keys().iter().map(|key| Secret::text("auth key", &key.secret)));
    for entry in fs::read_dir(node.state_dir().join("identities")).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        let record: Value = serde_json::from_str(&text).unwrap();
        for name in ["machine_key", "node_key"] {
            let bytes = record["body"][name].as_array().unwrap();
            let bytes: Vec<u8> = bytes.iter().map(|b| u8::try_from(b.as_u64().unwrap()).unwrap()).collect();
            assert_eq!(bytes.len(), 32);
            secrets.push(Secret::bytes(name, &bytes));
        }
    }
    for entry in fs::read_dir(node.run_dir().join("engines")).unwrap() {
        let path = entry.unwrap().path().join("snapshot");
        let disco = wait_for("a snapshot", || disco_of(&fs::read(&path).ok()?));
        // It is the one in use: the tailnet knows its other half.
        let public = DiscoPrivate::from_bytes(disco).public();
        assert!(rig.devnet.nodes().iter().any(|node| node.disco_key == public));
        secrets.push(Secret::bytes("disco private key", &disco));
    }
    secrets
}

/// The disco private key in a snapshot file: behind the slot's header of 60 bytes, a magic and a version.
fn disco_of(file: &[u8]) -> Option<[u8; 32]> {
    let whole = file.starts_with(b"ptsnap\x00\x01");
    whole.then(|| file.get(66..98)).flatten()?.try_into().ok()
}

fn json_lines(text: &str) -> Vec<Value> {
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    text.lines().map(parse).collect()
}

fn tool(node: &Node, arguments: &[&str]) -> String {
    let program = Programs::find(Path::new(env!("CARGO_BIN_EXE_podtether-devnet"))).unwrap().tool;
    let mut command: Command = node.command(&program);
    let output = command.args(arguments).arg("--socket").arg(node.socket()).output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "podtether {}: {err}", arguments.join(" "));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_join_at_trace_level_is_one_story_from_the_plugin_to_the_engine_and_tells_no_secret() {
    lab_test(
        "logs::a_join_at_trace_level_is_one_story_from_the_plugin_to_the_engine_and_tells_no_secret",
        |dir| {
            let mut rig = Rig::start(dir, 0, DevnetConfig::default());
            let mut node = rig.lab.add_node("node0").unwrap();
            node.configure(&[Tailnet::oauth("default", &rig.devnet, &rig.ca)], "").unwrap();
            node.set_environment("PODTETHER_LOG", "trace");
            node.start_supervisor().unwrap();
            let mut stories = Vec::new();
            let mut plugin = String::new();
            let mut pods = Vec::new();
            for name in ["one", "two"] {
                let pod = node.create_pod(name).unwrap();
                let outcome = pod.cni(&node, &CniCall::new("ADD")).unwrap();
                plugin += &outcome.stderr;
                let lines = json_lines(&outcome.stderr);
                let said = lines.last().expect("the plugin says something");
                assert_eq!(
                    (&said["pod"], &said["container"]),
                    (&name.into(), &pod.container_id.clone().into())
                );
                stories.push((name, pod.container_id.clone(), said["join"].as_str().unwrap().to_owned()));
                outcome.ok().unwrap();
                pods.push(pod);
            }
            assert_ne!(stories[0].2, stories[1].2);
            rig.nodes.push(node);
            let node = &rig.nodes[0];
            let address = |name: &str| {
                let report = node.pod_report(name).unwrap();
                report["addresses"][0].as_str().unwrap().parse().unwrap()
            };
            wait_reachable(&pods[0], address("two"));
            let secrets = secrets(&rig, node);
            for kind in
                ["OAuth secret", "API token", "auth key", "machine_key", "node_key", "disco private key"]
            {
                assert!(secrets.iter().any(|secret| secret.name == kind), "{kind} was not found");
            }

            // One event a line, in the fields that are documented, and one id from end to end.
            let log = wait_for("the handshakes to be told", || {
                let log = fs::read_to_string(node.log()).unwrap();
                (log.matches("handshake done").count() >= 2).then_some(log)
            });
            let lines = json_lines(&log);
            for (name, container, join) in &stories {
                let of = |target: &str| -> Vec<&Value> {
                    let of_it = |line: &&Value| {
                        line["join"] == **join && line["target"].as_str().unwrap().starts_with(target)
                    };
                    lines.iter().filter(of_it).collect()
                };
                for target in ["podtether_supervisor", "engine"] {
                    let said = of(target);
                    assert!(said.len() > 3, "{target} of {name}: {said:?}");
                    for line in said {
                        assert_eq!(
                            (&line["pod"], &line["namespace"]),
                            (&(*name).into(), &"default".into()),
                            "{line}"
                        );
                        assert_eq!(line["container"], **container, "{line}");
                    }
                }
                let shaken = of("engine").into_iter().find(|line| line["message"] == "handshake done");
                let peer = shaken.expect("a handshake")["engine"]["peer"].as_str().unwrap().to_owned();
                assert!(peer.len() == 7 && peer.starts_with('[') && peer.ends_with(']'), "{peer}");
                let explained = tool(node, &["explain", name]);
                assert!(explained.contains(join.as_str()), "{explained}");
            }
            // Nothing that names a pod leaves out which join of it.
            for line in lines.iter().filter(|line| line["target"] == "engine") {
                assert!(line["join"].is_string(), "{line}");
            }
            assert!(lines.iter().any(|line| line["level"] == "TRACE"), "that was all that there is to say");
            assert!(!log.contains("lines are missing"), "what is missing cannot be looked at");

            // And none of it is a secret, whoever collects it.
            let report = dir.join("report.txt");
            let config = node.dir().join("supervisor.toml");
            tool(
                node,
                &["bugreport", "--file", report.to_str().unwrap(), "--config", config.to_str().unwrap()],
            );
            let mut all: Vec<String> =
                [&log, &plugin].iter().flat_map(|text| text.lines()).map(str::to_owned).collect();
            all.extend(tool(node, &["logs", "one", "-o", "json"]).lines().map(str::to_owned));
            all.extend(tool(node, &["status", "-o", "json"]).lines().map(str::to_owned));
            all.extend(fs::read_to_string(&report).unwrap().lines().map(str::to_owned));
            all.extend(["/v1/pods", "/metrics"].map(|path| node.http_get(path).unwrap()));
            let found = leaks(&secrets, &all);
            assert!(found.is_empty(), "{found:#?}");

            // It would have been found: each secret in each of its forms, in the middle of a line of each.
            let line = all.iter().find(|line| line.contains("handshake done")).unwrap();
            for secret in &secrets {
                for form in &secret.forms {
                    let leaky = line.replacen("handshake done", &format!("handshake {form} done"), 1);
                    let named = leaks(&secrets, &[leaky]);
                    assert!(
                        named.iter().any(|found| found.starts_with(&secret.name)),
                        "{}: {form}",
                        secret.name
                    );
                }
            }
        },
    );
}

#[test]
fn one_pods_level_is_raised_while_it_runs_outlives_its_engine_and_is_taken_back() {
    lab_test("logs::one_pods_level_is_raised_while_it_runs_outlives_its_engine_and_is_taken_back", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        let pods = rig.join(&[(0, "one"), (0, "two")]);
        wait_reachable(&pods[0], pods[1].v4().unwrap());
        let node = &rig.nodes[0];
        let debug = |pod: &str| -> Vec<Value> {
            let all = json_lines(&tool(node, &["logs", pod, "-o", "json"]));
            all.into_iter().filter(|line| line["level"] == "DEBUG").collect()
        };
        assert_eq!((debug("one").len(), debug("two").len()), (0, 0));
        assert_eq!(tool(node, &["log-level", "one"]), "one: the default\n");
        assert_eq!(tool(node, &["log-level", "one", "debug", "--minutes", "5"]), "one: debug, for 5m\n");
        assert!(tool(node, &["log-level", "one"]).starts_with("one: debug, for "));

        // Its next engine is as loud, from its first line on, and so is the supervisor about it.
        let before = engine_pid(node, "one").unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(before), nix::sys::signal::Signal::SIGKILL)
            .unwrap();
        wait_for("debug lines of both", || {
            let lines = debug("one");
            ["engine", "supervisor"]
                .iter()
                .all(|from| lines.iter().any(|line| line["from"] == *from))
                .then_some(())
        });
        assert_eq!(debug("two").len(), 0, "nobody raised that one's");

        assert_eq!(tool(node, &["log-level", "one", "default"]), "one: the default\n");
        let told = wait_for("the engine to say so", || {
            let lines = json_lines(&tool(node, &["logs", "one", "-o", "json"]));
            lines.iter().rev().find(|line| {
                line["from"] == "engine" && line["message"] == "the log's level is the default again"
            })?;
            Some(debug("one").len())
        });
        let second = engine_pid(node, "one").unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(second), nix::sys::signal::Signal::SIGKILL)
            .unwrap();
        wait_for("another engine", || engine_pid(node, "one").filter(|pid| *pid != second));
        wait_reachable(&pods[0], pods[1].v4().unwrap());
        assert_eq!(debug("one").len(), told);
    });
}
