//! A supervisor that must not start.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use podtether_devnet::DevnetConfig;
use podtether_devnet::lab::{CniCall, Node, Tailnet};
use podtether_net::testing::in_namespaces;

use crate::place::{PATIENCE, Place, programs};

/// Exit code for a configuration that cannot be used, as sysexits has it.
const BAD_CONFIG: i32 = 78;

fn start(node: &Node, config: &Path, environment: &[(&str, &str)]) -> Output {
    let mut child = node
        .command(&programs().supervisor)
        .arg("--config")
        .arg(config)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(2));
    }
    // One that runs on is found by its exit status.
    let _ = child.kill();
    child.wait_with_output().unwrap()
}

fn said(place: &Place, what: &str, output: &Output, code: i32, says: &[&str]) {
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    place.heard(&text);
    let last = text.lines().last().unwrap_or_default();
    let line: serde_json::Value =
        serde_json::from_str(last).unwrap_or_else(|e| panic!("{what}: {e} in {text}"));
    let message = line["message"].as_str().unwrap();
    println!("{what}: {:?} {message}", output.status.code());
    assert_eq!(output.status.code(), Some(code), "{what}: {text}");
    assert_eq!(line["level"], "ERROR", "{what}");
    let twice = message.split(": ").collect::<Vec<_>>().windows(2).any(|pair| pair[0] == pair[1]);
    assert!(!twice, "{what} says something twice: {message}");
    for words in says {
        assert!(message.contains(words), "{what} does not say {words:?}: {message}");
    }
}

#[test]
fn one_supervisor_for_a_directory() {
    in_namespaces("start::one_supervisor_for_a_directory", |dir| {
        let mut place = Place::new(dir);
        let mut pod = place.pod("p");
        place.add(&mut pod);
        let text = fs::read_to_string(place.node.dir().join("supervisor.toml")).unwrap();
        let (state, run) = (place.node.state_dir(), place.node.run_dir());
        let (state, run) = (state.to_str().unwrap(), run.to_str().unwrap());
        let socket = fs::metadata(place.node.socket()).unwrap().ino();
        let before = place.state(&pod);
        let with = |from: &str, to: &str, listen: &str| {
            let path = dir.join("second.toml");
            let text = text.replace(from, to).replace("http_listen = \"127.0.0.1:9465\"", listen);
            fs::write(&path, text).unwrap();
            path
        };
        let elsewhere = dir.join("elsewhere");
        let elsewhere = elsewhere.to_str().unwrap();
        let stop = "stop it first";
        let second = with("", "", "http_listen = \"\"");
        let both = start(&place.node, &second, &[]);
        said(
            &place,
            "the same directories",
            &both,
            1,
            &["another supervisor", state, stop, "node.state_dir"],
        );
        let second = with(run, elsewhere, "http_listen = \"\"");
        let output = start(&place.node, &second, &[]);
        said(&place, "the same state_dir", &output, 1, &["another supervisor", state, stop]);
        // Its links and its socket are in run_dir.
        let second = with(state, elsewhere, "http_listen = \"\"");
        let output = start(&place.node, &second, &[]);
        said(&place, "the same run_dir", &output, 1, &["another supervisor", run, stop, "node.run_dir"]);

        place.unchanged("a second supervisor", &pod, &before);
        assert_eq!(
            fs::metadata(place.node.socket()).unwrap().ino(),
            socket,
            "the socket is still the first's"
        );
        place.succeeds("CHECK", &pod, &CniCall::new("CHECK"));
        place.del(&pod);
        place.no_devices();
        place.finish();
    });
}

#[test]
fn a_configuration_that_is_wrong_is_named() {
    in_namespaces("start::a_configuration_that_is_wrong_is_named", |dir| {
        let mut place = Place::bare(dir, DevnetConfig::default());
        let good = place.node.configure(&[Tailnet::oauth("default", &place.devnet, &place.ca)], "").unwrap();
        let good = fs::read_to_string(good).unwrap();
        let pod = place.pod("p");
        let before = place.state(&pod);
        let path = dir.join("other.toml");
        let file = path.to_str().unwrap();

        // What is changed in a good file, and what the sentence says.
        let table = [
            (
                "[node]",
                "[node]\nstate_dirr = \"/x\"",
                vec!["unknown key node.state_dirr", "state_dir?", file],
            ),
            ("[node]", "[nodes]\nx = 1\n[node]", vec!["unknown key nodes", "[tailnet.NAME]"]),
            ("ca_file", "cafile", vec!["unknown key tailnet.default.cafile", "ca_file"]),
            ("client_id_file", "client_file", vec!["unknown key tailnet.default.credentials.client_file"]),
            (
                "kind = \"oauth\"",
                "kind = \"magic\"",
                vec!["tailnet.default.credentials.kind", "magic", "oauth"],
            ),
            ("kind = \"oauth\"", "kind = \"auth-key\"", vec!["tailnet.default.credentials."]),
            ("kind = \"oauth\"", "", vec!["tailnet.default.credentials.kind", "missing"]),
            ("control_url = \"https", "control_url = \"ftp", vec!["tailnet.default.control_url"]),
            ("tag:k8s-pod", "k8s pod", vec!["tailnet.default.tags", "tag:"]),
            ("{pod}", "{pdo}", vec!["tailnet.default.hostname_template", "pdo"]),
            ("127.0.0.1:9465", "0.0.0.0:9465", vec!["node.http_listen", "loopback"]),
            ("127.0.0.1:9465", "9465", vec!["node.http_listen"]),
            ("[node]", "[node]\nuid_base = \"many\"", vec!["node.uid_base", "whole number"]),
            ("[node]", "[node]\nuid_base = 4294967295", vec!["node.uid_base"]),
            ("[node]", "[node]\nudp_port_range = \"9-1\"", vec!["node.udp_port_range", "9-1"]),
            ("[node]", "[node]\nidentity_grace = \"soon\"", vec!["node.identity_grace", "soon"]),
            ("[node]", "[node]\nexclude_cidrs = [\"10.0.0.0/33\"]", vec!["node.exclude_cidrs"]),
            ("[node]", "[node]\nrequire_sandbox = \"yes\"", vec!["node.require_sandbox"]),
            ("state_dir = \"/", "state_dir = \"", vec!["node.state_dir", "absolute"]),
            ("[node]", "[node", vec!["TOML"]),
            ("[node]", "[node]\nrun_dir = \"/a\"", vec!["TOML", "duplicate key"]),
        ];
        for (from, to, says) in table {
            assert!(good.contains(from), "{from}");
            fs::write(&path, good.replacen(from, to, 1)).unwrap();
            said(&place, &format!("{to:?}"), &start(&place.node, &path, &[]), BAD_CONFIG, &says);
        }
        fs::write(&path, "").unwrap();
        said(&place, "an empty file", &start(&place.node, &path, &[]), BAD_CONFIG, &["no tailnet"]);
        fs::remove_file(&path).unwrap();
        said(&place, "no file", &start(&place.node, &path, &[]), BAD_CONFIG, &[file]);

        // From the environment, where a secret may stand.
        fs::write(&path, &good).unwrap();
        let table = [
            ("PODTETHER_NODE_STATE_DIRR", "/x", "PODTETHER_NODE_STATE_DIRR"),
            ("PODTETHER_TAILNET_DEFAULT_SECRET", "hush-0123456789", "PODTETHER_TAILNET_DEFAULT_SECRET"),
            ("PODTETHER_NODE_UID_BASE", "x", "PODTETHER_NODE_UID_BASE"),
            ("AUTH_KEY_TTL", "soon", "AUTH_KEY_TTL"),
        ];
        for (name, value, says) in table {
            said(&place, name, &start(&place.node, &path, &[(name, value)]), BAD_CONFIG, &[says]);
        }
        place.secret("hush-0123456789");
        place.secret("hush-secret-value");
        let output =
            start(&place.node, &path, &[("TS_OAUTH_CLIENT_SECRET", "hush-secret-value"), ("TS_TAGS", "x")]);
        said(&place, "a bad tag from TS_TAGS", &output, BAD_CONFIG, &["TS_TAGS"]);

        place.unchanged("a configuration that is wrong", &pod, &before);

        // Right in itself, but not on this node.
        let state = place.node.state_dir();
        let table = [
            ("ca_file = \"", "ca_file = \"/nonexistent", vec!["tailnet.default.ca_file", "/nonexistent"]),
            ("engine_path = \"", "engine_path = \"/nonexistent", vec!["node.engine_path", "/nonexistent"]),
        ];
        for (from, to, says) in table {
            fs::write(&path, good.replacen(from, to, 1)).unwrap();
            said(&place, &format!("{to:?}"), &start(&place.node, &path, &[]), 1, &says);
        }
        fs::remove_dir_all(&state).unwrap();
        fs::write(&state, "").unwrap();
        fs::write(&path, &good).unwrap();
        said(
            &place,
            "a file as state_dir",
            &start(&place.node, &path, &[]),
            1,
            &["node.state_dir", "File exists"],
        );
        place.secrets_kept();
    });
}
