//! `install-cni` and `uninstall-cni` as programs: killed at any moment, told to end, asked whether all is well.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::print_stdout, reason = "the seed is for people to replay")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podtether_supervisor::install_cni::conf::{self, Network, OURS};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_podtether-supervisor");
const LIST: &str = r#"{"cniVersion":"0.3.1","name":"n","plugins":[{"type":"flannel"},{"type":"portmap"}]}"#;
const SINGLE: &str = r#"{"cniVersion":"0.4.0","name":"n","type":"bridge"}"#;

struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    fn new(files: &[(&str, &str)]) -> Self {
        let node = Self { dir: tempfile::tempdir().unwrap() };
        for dir in ["net.d", "bin"] {
            fs::create_dir(node.at(dir)).unwrap();
        }
        fs::write(node.at("podtether-cni"), "the plugin").unwrap();
        for (name, text) in files {
            fs::write(node.at("net.d").join(name), text).unwrap();
        }
        node
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, what: &str, more: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .arg(what)
            .arg("--cni-conf-dir")
            .arg(self.at("net.d"))
            .arg("--cni-bin-dir")
            .arg(self.at("bin"));
        if what == "install-cni" {
            command.arg("--plugin").arg(self.at("podtether-cni")).arg("--socket").arg(self.at("s"));
        }
        command.args(more).env_remove("KUBERNETES_SERVICE_HOST").stdin(Stdio::null());
        command
    }

    fn run(&self, what: &str, more: &[&str]) -> Output {
        self.command(what, more).output().unwrap()
    }

    fn start(&self, what: &str, more: &[&str]) -> Child {
        self.command(what, more).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn files(&self) -> BTreeMap<String, String> {
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        let entries = fs::read_dir(self.at("net.d")).unwrap().map(Result::unwrap);
        entries.map(|e| (e.file_name().into_string().unwrap(), read(&e.path()))).collect()
    }

    /// What a runtime would run.
    fn types(&self) -> Vec<String> {
        let usable =
            |(name, text): (&String, &String)| Some(Network::read(conf::form(name)?, text).ok()?.types);
        self.files().iter().find_map(usable).unwrap()
    }

    fn until(&self, what: &str, wanted: impl Fn() -> bool) {
        let begun = Instant::now();
        while !wanted() {
            assert!(begun.elapsed() < Duration::from_secs(60), "not: {what}: {:?}", self.files());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn killed_at_any_moment_it_leaves_a_node_whose_pods_start() {
    let seed =
        std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| getrandom::u64().unwrap());
    println!("SEED={seed}");
    let mut random = seed;
    for (name, text) in [("10-n.conflist", LIST), ("10-n.conf", SINGLE)] {
        let node = Node::new(&[(name, text)]);
        let (before, primary) = (node.files(), node.types());
        for _ in 0..40 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let what = if random >> 40 & 1 == 0 { "install-cni" } else { "uninstall-cni" };
            let mut child = node.start(what, &[]);
            std::thread::sleep(Duration::from_micros(random >> 48));
            child.kill().unwrap();
            child.wait().unwrap();
            let types = node.types();
            assert_eq!(types[..primary.len()], primary, "{what}: {:?}", node.files());
            // What is named is there to be run.
            assert!(!types.contains(&OURS.to_owned()) || node.at("bin/podtether-cni").exists(), "{what}");
        }
        let output = node.run("install-cni", &[]);
        assert!(output.status.success(), "{}", said(&output));
        assert_eq!(node.types().last().unwrap(), OURS);
        assert!(node.run("install-cni", &["--check"]).status.success());
        assert!(node.run("uninstall-cni", &[]).status.success());
        assert_eq!(node.files(), before);
        assert!(fs::read_dir(node.at("bin")).unwrap().next().is_none());
    }
}

#[test]
fn told_to_end_it_leaves_the_entry_and_without_a_word_it_stays() {
    let node = Node::new(&[("10-n.conflist", LIST)]);
    let _supervisor = UnixListener::bind(node.at("s")).unwrap();
    let child = node.start(
        "install-cni",
        &["--watch", "--daemonset=podtether/podtether", "--api-server=http://127.0.0.1:9"],
    );
    node.until("it is chained", || node.types().contains(&OURS.to_owned()));
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(node.types().contains(&OURS.to_owned()), "an API server that is away is no end");
}

#[test]
fn what_is_missing_is_said() {
    let node = Node::new(&[]);
    let check = node.run("install-cni", &["--check"]);
    assert!(
        !check.status.success() && said(&check).contains("has not this podtether-cni"),
        "{}",
        said(&check)
    );
    let waited = node.run("install-cni", &["--wait", "0"]);
    assert!(!waited.status.success() && said(&waited).contains("primary CNI"), "{}", said(&waited));
    fs::write(node.at("net.d/10-n.conflist"), "{\"podtether-cni\": ").unwrap();
    let refused = node.run("install-cni", &["--wait", "0"]);
    assert!(said(&refused).contains("10-n.conflist is not JSON"), "{}", said(&refused));
    let kept = node.run("uninstall-cni", &[]);
    assert!(!kept.status.success() && said(&kept).contains("mend or remove"), "{}", said(&kept));
    assert!(node.at("bin/podtether-cni").exists(), "who knows whether it is named");
    for wrong in [&["--daemonset=x"][..], &["--failure-policy=ajar"], &["--remove-taint=x", "--watch"]] {
        assert_eq!(node.run("install-cni", wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn the_plugin_speaks_what_install_cni_takes_for_granted() {
    let mut plugin = Command::new(Path::new(PROGRAM).with_file_name(OURS));
    let output = plugin.env("CNI_COMMAND", "VERSION").stdin(Stdio::null()).output().unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["supportedVersions"], json!(conf::VERSIONS));
}
