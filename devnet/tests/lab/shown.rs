//! What `docs/cli.md` shows: each command of `podtether` and `kubectl ts`, on a terminal, in front of a cluster of two
//! nodes. With `PODTETHER_PICTURES=DIR` the document's samples and pictures are written, `DIR` being `docs/img`;
//! without, they are compared with what is printed now.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::FromRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use podtether_devnet::DevnetConfig;
use podtether_devnet::acl::Policy;
use podtether_devnet::lab::{Lab, Node, Pod, Programs, Tailnet};
use podtether_devnet::terminal::document::{Sample, samples, shape, with};
use podtether_devnet::terminal::{COLUMNS, svg, text, widest};
use serde_json::{Value, json};

use crate::kubeapi::KubeApi;
use crate::tool::POLICY;
use crate::{Rig, lab_test, wait_for, wait_reachable};

/// Samples whose lines are those of one moment: which lines a log has, or which peers a pod has used.
const OF_A_MOMENT: [&str; 4] = ["logs", "ts-logs", "explain", "ts-explain"];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What `command` writes to a terminal as wide as the document's.
fn on_a_terminal(mut command: Command) -> String {
    let (mut near, mut far) = (-1, -1);
    let columns = u16::try_from(COLUMNS).unwrap();
    let size = libc::winsize { ws_row: 50, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: both numbers are there to be written, and the size to be read.
    let made = unsafe {
        libc::openpty(&raw mut near, &raw mut far, std::ptr::null_mut(), std::ptr::null(), &raw const size)
    };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: openpty opened it, and nobody else has it.
    let mut near = unsafe { File::from_raw_fd(near) };
    // SAFETY: as before.
    let far = unsafe { File::from_raw_fd(far) };
    command.env_remove("NO_COLOR").stdin(Stdio::null());
    command.stdout(far.try_clone().unwrap()).stderr(far);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut written = Vec::new();
    // EIO is how a terminal tells that nobody has its other end any more.
    let mut part = [0; 4096];
    while let Ok(n @ 1..) = near.read(&mut part) {
        written.extend(&part[..n]);
    }
    child.wait().unwrap();
    String::from_utf8(written).unwrap()
}

/// Two nodes of a cluster with three pods; the API server answers the first node alone.
struct Shown {
    rig: Rig,
    programs: Programs,
    dir: PathBuf,
    pods: Vec<Pod>,
    /// By name: prompts and what followed.
    samples: Vec<(String, String)>,
    /// What should not have been printed.
    odd: Vec<String>,
}

impl Shown {
    fn make(dir: &Path) -> Self {
        let programs = Programs::find(Path::new(env!("CARGO_BIN_EXE_podtether-devnet"))).unwrap();
        let policy: Policy = POLICY.parse().unwrap();
        let config = DevnetConfig { policy: Some(policy), ..DevnetConfig::default() };
        let mut lab = Lab::new(dir, programs.clone()).unwrap();
        let (devnet, ca) = lab.start_devnet(config).unwrap();
        let mut rig = Rig { lab, devnet, ca, nodes: Vec::new() };
        let mut api = None;
        for name in ["node-a", "node-b"] {
            let mut node = rig.lab.add_node(name).unwrap();
            let mut extra = String::new();
            if name == "node-a" {
                let made = node.netns.run_blocking(KubeApi::start).unwrap();
                extra = format!(
                    "name = \"node-1\"\napi_server = {:?}\nservice_account_dir = \"{}/account\"\n",
                    made.url,
                    dir.display()
                );
                api = Some(made);
            }
            let file = node.configure(&[Tailnet::oauth("default", &rig.devnet, &rig.ca)], &extra).unwrap();
            let text = fs::read_to_string(&file).unwrap();
            let named =
                text.replace("\"{pod}\"", "\"{cluster}-{namespace}-{pod}\"").replace("\"lab\"", "\"prod\"");
            fs::write(&file, named).unwrap();
            node.start_supervisor().unwrap();
            rig.nodes.push(node);
        }
        let api = api.unwrap();
        let mut pods = Vec::new();
        for (node, name) in [(0, "web-1"), (0, "db-1"), (1, "far-1")] {
            let mut pod = rig.nodes[node].create_pod(name).unwrap();
            if node == 0 {
                api.pod(&pod.namespace, name, &pod.uid, &[]);
            }
            pod.add(&rig.nodes[node]).unwrap();
            pods.push(pod);
        }
        let shown = Self { rig, programs, dir: dir.to_owned(), pods, samples: Vec::new(), odd: Vec::new() };
        shown.install();
        shown
    }

    /// What a node has where `check` looks, and a kubectl.
    fn install(&self) {
        for node in &self.rig.nodes {
            let (cni, bin) = (node.dir().join("net.d"), node.dir().join("bin"));
            fs::create_dir_all(&cni).unwrap();
            fs::create_dir_all(&bin).unwrap();
            fs::copy(&self.programs.cni, bin.join("podtether-cni")).unwrap();
            let conflist = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge","ipam":{"subnet":"10.9.9.0/24"}},
                {"type":"podtether-cni","capabilities":{"io.kubernetes.cri.pod-annotations":true}}]}"#;
            fs::write(cni.join("10-n.conflist"), conflist).unwrap();
        }
        let item = |node: &Node| {
            let state = json!([{"name": "supervisor", "state": {"running": {}}}]);
            json!({"metadata": {"name": format!("podtether-{}", node.name)}, "spec": {"nodeName": node.name},
                   "status": {"phase": "Running", "containerStatuses": state}})
        };
        let items: Vec<Value> = self.rig.nodes.iter().map(item).collect();
        fs::write(self.dir.join("pods.json"), json!({"items": items}).to_string()).unwrap();
        // Answers as kubectl does in front of this cluster; a program runs in its node's namespace.
        let script = format!(
            "#!/bin/sh\n\
             case \"$1 $2\" in\n\
             'config view') echo default;;\n\
             'get pods') exec cat {dir}/pods.json;;\n\
             'get pod') case $5 in\n\
               far-*) echo node-b;;\n\
               web-*|db-*) echo node-a;;\n\
               *) echo \"Error from server (NotFound): pods \\\"$5\\\" not found\" >&2; exit 1;;\n\
               esac;;\n\
             'exec -n')\n\
               node=${{4#podtether-}}; shift 8\n\
               case $1 in check|bugreport) set -- \"$@\" {places};; esac\n\
               PODTETHER_NODE_NAME=$node PODTETHER_SOCKET={dir}/$node/run/supervisor.sock \\\n\
                 PODTETHER_CONFIG={dir}/$node/supervisor.toml nsenter --net={dir}/netns/$node {tool} \"$@\"\n\
               code=$?\n\
               [ $code = 0 ] || echo \"command terminated with exit code $code\" >&2\n\
               exit $code;;\n\
             *) echo \"error: unknown command $*\" >&2; exit 1;;\n\
             esac\n",
            dir = self.dir.display(),
            places = format_args!(
                "--cni-conf-dir {dir}/$node/net.d --cni-bin-dir {dir}/$node/bin",
                dir = self.dir.display()
            ),
            tool = self.programs.tool.display(),
        );
        let path = self.dir.join("kubectl");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }

    /// `podtether` on a node, as the document has it: the places are a node's.
    fn podtether(&self, node: usize, arguments: &[&str]) -> Command {
        let node = &self.rig.nodes[node];
        let mut command = node.command(&self.programs.tool);
        command.args(arguments).current_dir(&self.dir);
        command.env("PODTETHER_NODE_NAME", &node.name).env("PODTETHER_SOCKET", node.socket());
        if !arguments.contains(&"--config") {
            command.env("PODTETHER_CONFIG", node.dir().join("supervisor.toml"));
        }
        if ["check", "bugreport"].contains(&arguments[0]) {
            command.arg("--cni-conf-dir").arg(node.dir().join("net.d"));
            command.arg("--cni-bin-dir").arg(node.dir().join("bin"));
        }
        command
    }

    fn kubectl_ts(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.programs.tool.with_file_name("kubectl-ts"));
        command.args(arguments).current_dir(&self.dir).env("KUBECTL", self.dir.join("kubectl"));
        command
    }

    /// Shows a command in the sample of this name; `lines` of it, where it prints more than a document should.
    fn show(&mut self, name: &str, node: usize, line: &str, lines: Option<usize>) -> String {
        let words: Vec<&str> =
            line.split_whitespace().take_while(|word| !["|", ">"].contains(word)).collect();
        let command = match words.as_slice() {
            ["podtether", arguments @ ..] => self.podtether(node, arguments),
            ["kubectl", "ts", arguments @ ..] => self.kubectl_ts(arguments),
            _ => panic!("{line}"),
        };
        // Of what looks again and again, one look.
        let mut written = on_a_terminal(command).replace("\x1b[2J\x1b[H", "");
        for node in &self.rig.nodes {
            let of = |name: &str| node.dir().join(name).display().to_string();
            for (place, shown) in [
                (of("run"), "/run/podtether"),
                (of("supervisor.toml"), "/etc/podtether/supervisor.toml"),
                (of("net.d"), "/etc/cni/net.d"),
                (of("bin"), "/opt/cni/bin"),
            ] {
                written = written.replace(&place, shown);
            }
        }
        let engine = self.programs.engine.display().to_string();
        written = written.replace(&engine, "/usr/local/bin/podtether-engine");
        if let Some(lines) = lines {
            written = written.split_inclusive('\n').take(lines).collect();
        }
        println!("$ {line}\n{written}");
        // A line of a log and a complaint are as long as they are, and go on in the terminal's next line.
        let is_line = name.ends_with("logs") || name == "refusals";
        self.expect(is_line || widest(&written) <= COLUMNS, &written);
        let is_of_lab = ["/node-a/", "/node-b/", "/target/"].iter().any(|place| written.contains(place));
        self.expect(!is_of_lab, &written);
        let sample = format!("$ {line}\n{written}");
        match self.samples.iter_mut().find(|(known, _)| known == name) {
            Some((_, samples)) => samples.push_str(&sample),
            None => self.samples.push((name.to_owned(), sample)),
        }
        text(&written)
    }

    /// Notes what should not be; the rest is looked at first.
    fn expect(&mut self, is_so: bool, written: &str) {
        if !is_so {
            self.odd.push(written.to_owned());
        }
    }

    /// Writes what the document shows, or sees that it shows this.
    fn done(self) {
        let path = repository().join("docs/cli.md");
        let mut document = fs::read_to_string(&path).unwrap();
        let pictures = std::env::var_os("PODTETHER_PICTURES").map(PathBuf::from);
        for (name, written) in &self.samples {
            let sample =
                Sample { name: name.clone(), text: text(written), picture: format!("img/cli-{name}.svg") };
            if let Some(pictures) = &pictures {
                let picture = svg(written, &format!("{name}, as it looks on a terminal"));
                fs::write(pictures.join(format!("cli-{name}.svg")), picture).unwrap();
                document =
                    with(&document, &sample).unwrap_or_else(|| panic!("docs/cli.md has no place for {name}"));
                continue;
            }
            let known = samples(&document).into_iter().find(|known| known.name == *name);
            let known = known.unwrap_or_else(|| panic!("docs/cli.md has no sample {name}"));
            if !OF_A_MOMENT.contains(&name.as_str()) {
                assert_eq!(
                    shape(&known.text),
                    shape(&sample.text),
                    "docs/cli.md shows something else of {name}: write it again with PODTETHER_PICTURES=docs/img"
                );
            }
        }
        if pictures.is_some() {
            fs::write(&path, document).unwrap();
        }
        assert!(self.odd.is_empty(), "not as it should be: {:#?}", self.odd);
    }
}

#[test]
fn every_command_prints_what_the_document_shows() {
    lab_test("shown::every_command_prints_what_the_document_shows", |dir| {
        let mut shown = Shown::make(dir);
        for (from, to) in [(0, 1), (0, 2), (2, 1)] {
            let to = shown.pods[to].v4().unwrap();
            wait_reachable(&shown.pods[from], to);
        }
        let asked = |shown: &Shown, node: usize, arguments: &[&str]| -> Value {
            let output = shown.podtether(node, &[arguments, &["-o", "json"]].concat()).output().unwrap();
            serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
        };
        for (pod, node) in [("web-1", 0), ("db-1", 0), ("far-1", 1)] {
            wait_for("the first handshake and the network to be known", || {
                let explained = asked(&shown, node, &["explain", pod]);
                let net = asked(&shown, node, &["netcheck", pod]);
                let is_home =
                    net["regions"].as_array().is_some_and(|all| all.iter().any(|r| r["latencyUs"].is_u64()));
                (explained.to_string().contains("\"handshake\"") && net["udp"] == true && is_home)
                    .then_some(())
            });
        }
        for (pod, peer, node) in [
            ("web-1", "prod-default-far-1", 0),
            ("web-1", "prod-default-db-1", 0),
            ("far-1", "prod-default-web-1", 1),
        ] {
            wait_for("a direct path", || {
                (asked(&shown, node, &["ping", pod, peer])["whyNotDirect"] == "").then_some(())
            });
        }

        for line in ["podtether status", "podtether status -o wide"] {
            shown.show("status", 0, line, None);
        }
        let told = shown.show("explain", 0, "podtether explain web-1", None);
        shown.expect(told.contains("first WireGuard handshake") && told.contains(" in the logs"), &told);
        shown.show("ping", 0, "podtether ping web-1 prod-default-far-1", None);
        for line in [
            "podtether why web-1 db-1:8080/tcp",
            "podtether why web-1 db-1:9090",
            "podtether why prod-default-far-1 web-1:53/udp",
        ] {
            shown.show("why", 0, line, None);
        }
        shown.show("netcheck", 0, "podtether netcheck db-1", None);
        let told = shown.show("check", 0, "podtether check", None);
        shown.expect(told.contains(" 0 failed, 0 not tried"), &told);
        shown.show("top", 0, "podtether top --delay 1 --count 1", None);
        shown.show("logs", 0, "podtether logs db-1 --tail 4", None);
        for line in ["podtether log-level web-1 debug --minutes 5", "podtether log-level web-1 default"] {
            shown.show("log-level", 0, line, None);
        }
        for line in [
            "podtether routing web-1",
            "podtether routing web-1 --accept-routes true --exit-node nobody",
            "podtether routing web-1 --accept-routes false --exit-node=",
        ] {
            shown.show("routing", 0, line, None);
        }
        shown.show("restart", 0, "podtether restart --all --pause 0", None);
        let hours = Duration::from_secs(2 * 3600);
        let ghost =
            shown.rig.devnet.add_node_of("prod-default-web-0", &["tag:k8s-pod"], "0.1.0-podtether", hours);
        assert!(!ghost.is_empty());
        wait_for("the API server's pods to be known", || {
            let health = shown.rig.nodes[0].http_get("/v1/kubernetes").ok()?;
            let health: Vec<Value> = serde_json::from_str(&health).ok()?;
            let is_known = |what: &str| health.iter().any(|h| h["what"] == what && h["current"] == true);
            (is_known("pods") && is_known("namespaces")).then_some(())
        });
        let told = shown.show("cleanup", 0, "podtether cleanup --dry-run", None);
        shown.expect(
            told.contains("prod-default-web-0.tailnet.test (tailnet default): would be deleted"),
            &told,
        );
        let told = shown.show("bugreport", 0, "podtether bugreport --file report.txt", None);
        shown.expect(told.contains("report.txt: read it before"), &told);
        shown.show("completion", 0, "podtether completion bash | head -4", Some(4));
        shown.show("man", 0, "podtether man man1", None);

        shown.show("ts-status", 0, "kubectl ts status -A", None);
        shown.show("ts-explain", 0, "kubectl ts explain far-1", None);
        shown.show("ts-ping", 0, "kubectl ts ping far-1 prod-default-web-1", None);
        for (line, says) in [
            ("kubectl ts why web-1 far-1:8080", "enters default/far-1: yes, rule "),
            ("kubectl ts why far-1 web-1:53/udp", "enters default/web-1: dropped, no rule"),
        ] {
            let told = shown.show("ts-why", 0, line, None);
            shown.expect(told.contains("  leaves default/") && told.contains(says), &told);
        }
        shown.show("ts-netcheck", 0, "kubectl ts netcheck far-1", None);
        let told = shown.show("ts-check", 0, "kubectl ts check --quiet", None);
        shown.expect(told.matches("none failed").count() == 2, &told);
        shown.show("ts-top", 0, "kubectl ts top -A --delay 1 --count 1", None);
        shown.show("ts-logs", 0, "kubectl ts logs far-1 --tail 2", None);
        for line in ["kubectl ts log-level far-1 debug", "kubectl ts log-level far-1 default"] {
            shown.show("ts-log-level", 0, line, None);
        }
        shown.show("ts-routing", 0, "kubectl ts routing far-1", None);
        shown.show("ts-restart", 0, "kubectl ts restart far-1", None);
        let told = shown.show("ts-cleanup", 0, "kubectl ts cleanup", None);
        shown.expect(told.contains("prod-default-web-0.tailnet.test (tailnet default): deleted"), &told);
        let told = shown.show("ts-bugreport", 0, "kubectl ts bugreport --file cluster.txt", None);
        shown.expect(told.contains("cluster.txt: read it before"), &told);
        let report = fs::read_to_string(dir.join("cluster.txt")).unwrap();
        for part in [
            "######## node node-a",
            "######## node node-b",
            "==== pod default/far-1",
            "==== pod default/web-1",
        ] {
            assert!(report.contains(part), "{part}: {report}");
        }
        shown.show("ts-completion", 0, "kubectl ts completion fish | head -2", Some(2));
        shown.show("ts-man", 0, "kubectl ts man man1", None);

        for line in ["podtether explain nobody", "podtether ping web-1 nobody", "podtether why web-1 db-1"] {
            shown.show("refusals", 0, line, None);
        }
        shown.rig.nodes[0].kill_supervisor().unwrap();
        shown.show("refusals", 0, "podtether logs web-1", None);
        shown.show("refusals", 0, "podtether check --config /nowhere.toml", None);
        shown.show("refusals", 0, "kubectl ts status -A", None);
        shown.done();
    });
}
