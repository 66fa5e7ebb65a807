//! containerd with everything it has in a directory of its own, and the supervisor in a container of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use podtether_net::isolate;
use podtether_net::testing::block_on;

use crate::rig::{Rig, TIMEOUT};

/// Names the test whose process in namespaces of its own this is.
const TEST: &str = "PODTETHER_TEST_CONTAINERD";
/// Tells its cgroups from another run's.
const RUN: &str = "PODTETHER_TEST_RUN";
/// The supervisor, the engine and what they need.
pub(crate) const IMAGE: &str = "docker.io/local/podtether:1";
/// What pods run, and their sandboxes.
pub(crate) const PAUSE: &str = "docker.io/local/pause:1";
/// Debian's package containernetworking-plugins.
const PLUGINS: &str = "/usr/lib/cni";
const NEEDED: [&str; 6] = ["containerd", "ctr", "runc", "busybox", "unshare", "tar"];

/// Runs `body` in mount, network and PID namespaces of its own but the machine's user and cgroup namespaces,
/// with a directory on a tmpfs that mounts propagate from, as a node's `/run` is.
///
/// The cgroups of [`Names`] are removed at the end, however it ends.
pub(crate) fn on_a_node(name: &str, body: impl FnOnce(&Path, &Names)) {
    if std::env::var(TEST).is_ok_and(|inside| inside == name) {
        let names = Names::of(&std::env::var(RUN).unwrap());
        let dir = block_on(isolate::settle()).unwrap();
        let none = None::<&str>;
        mount(none, dir.parent().unwrap(), none, MsFlags::MS_SHARED, none).unwrap();
        body(&dir, &names);
        return;
    }
    if let Some(why) = unfit() {
        assert!(std::env::var_os("CI").is_none(), "{name}: {why}");
        println!("{name}: skipped, {why}");
        return;
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    let run = format!("{}-{now}", std::process::id());
    let output = Command::new("unshare")
        .args(["--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(TEST, name)
        .env(RUN, &run)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Names::of(&run).remove();
    let stdout = String::from_utf8_lossy(&output.stdout);
    println!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && stdout.contains("1 passed"), "{name} failed ({})", output.status);
}

fn unfit() -> Option<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let missing: Vec<_> =
        NEEDED.iter().filter(|n| !path.split(':').any(|dir| Path::new(dir).join(n).exists())).collect();
    if !missing.is_empty() {
        return Some(format!("{missing:?} are not on PATH"));
    }
    if !Path::new(PLUGINS).join("bridge").exists() {
        return Some(format!("{PLUGINS}/bridge is not there"));
    }
    let whole = fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| map.contains(" 4294967295"));
    if !nix::unistd::geteuid().is_root() || !whole {
        return Some("it needs real root".into());
    }
    None
}

/// Cgroups of one test.
pub(crate) struct Names {
    /// `node.cgroup_root`
    pub(crate) engines: String,
    /// Above those of containers.
    pub(crate) containers: String,
}

impl Names {
    fn of(run: &str) -> Self {
        Self { engines: format!("podtether-test-{run}"), containers: format!("podtether-test-c-{run}") }
    }

    pub(crate) fn configure(&self, rig: &mut Rig) {
        let own = format!("cgroup_root = \"{}\"", self.engines);
        rig.config = rig.config.replace("cgroup_root = \"\"", &own);
        fs::write(rig.dir.join("supervisor.toml"), &rig.config).unwrap();
    }

    /// The processes in them ended with their PID namespace, whose end the kernel may still be about.
    fn remove(&self) {
        let start = Instant::now();
        loop {
            for name in [&self.engines, &self.containers] {
                cgroups_named(name).iter().for_each(|dir| remove_below(dir));
            }
            let left = [cgroups_named(&self.engines), cgroups_named(&self.containers)].concat();
            if left.is_empty() {
                return;
            }
            assert!(start.elapsed() < TIMEOUT, "still there: {left:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Removes a cgroup and those below it, which are empty.
pub(crate) fn remove_below(dir: &Path) {
    for inner in fs::read_dir(dir).into_iter().flatten().flatten() {
        if inner.file_type().is_ok_and(|t| t.is_dir()) {
            remove_below(&inner.path());
        }
    }
    let _ = fs::remove_dir(dir);
}

/// A containerd.
pub(crate) struct Runtime {
    dir: PathBuf,
    daemon: Child,
}

impl Runtime {
    pub(crate) fn start(dir: &Path) -> Self {
        let dir = dir.join("ctd");
        fs::create_dir_all(&dir).unwrap();
        let at = dir.display();
        let config = format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n[grpc]\naddress = \"{at}/sock\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{PAUSE}\"\n\
             restrict_oom_score_adj = true\ndisable_hugetlb_controller = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"native\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"{at}/cni-bin\"\nconf_dir = \"{at}/cni\"\n"
        );
        fs::write(dir.join("config.toml"), config).unwrap();
        let daemon = Command::new("containerd")
            .arg("-c")
            .arg(dir.join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.join("log")).unwrap())
            .spawn()
            .unwrap();
        let runtime = Self { dir, daemon };
        let start = Instant::now();
        while !runtime.ctr(&["version"]).1 {
            assert!(start.elapsed() < TIMEOUT, "{}", fs::read_to_string(runtime.dir.join("log")).unwrap());
            std::thread::sleep(Duration::from_millis(50));
        }
        runtime
    }

    /// What it printed, and whether it succeeded.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> (String, bool) {
        let output =
            Command::new("ctr").arg("-a").arg(self.dir.join("sock")).args(arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (String::from_utf8_lossy(&text).into_owned(), output.status.success())
    }

    pub(crate) fn must(&self, arguments: &[&str]) -> String {
        let (text, done) = self.ctr(arguments);
        assert!(done, "ctr {arguments:?}: {text}");
        text
    }

    /// Packs the supervisor, the engine, busybox and the libraries that a development build needs.
    pub(crate) fn import_image(&self) {
        self.import_supervisor("default");
    }

    /// As [`Runtime::import_image`], for a namespace of the runtime's.
    pub(crate) fn import_supervisor(&self, namespace: &str) {
        let supervisor = Path::new(env!("CARGO_BIN_EXE_podtether-supervisor"));
        let beside = |name: &str| supervisor.with_file_name(name);
        let programs = ["podtether-engine", "podtether", "podtether-cni"].map(beside);
        let programs: Vec<&Path> =
            [supervisor].into_iter().chain(programs.iter().map(PathBuf::as_path)).collect();
        self.import(namespace, IMAGE, &programs, "");
    }

    /// What pods run.
    pub(crate) fn import_pause(&self) {
        let path = std::env::var("PATH").unwrap();
        let busybox = path.split(':').map(|dir| Path::new(dir).join("busybox")).find(|p| p.exists()).unwrap();
        let command = "\"Cmd\":[\"/bin/busybox\",\"sleep\",\"100000\"],";
        self.import("k8s.io", PAUSE, &[&busybox], command);
    }

    /// Puts the plugin behind Debian's.
    pub(crate) fn chain(&self, supervisor: &Path) {
        let ours = Path::new(env!("CARGO_BIN_EXE_podtether-supervisor")).with_file_name("podtether-cni");
        self.network(&format!(
            ",{{\"type\":\"podtether-cni\",\"socket\":{supervisor:?},\"tailnet\":\"default\",\"timeoutSeconds\":30,\
             \"failurePolicy\":\"closed\",\"capabilities\":{{\"io.kubernetes.cri.pod-annotations\":true}}}}"
        ));
        fs::copy(&ours, self.plugin_dir().join("podtether-cni")).unwrap();
    }

    /// Debian's plugins, and what stands behind them in the list.
    pub(crate) fn network(&self, behind: &str) {
        let (bin, conf) = (self.plugin_dir(), self.conf_dir());
        fs::create_dir_all(&bin).unwrap();
        fs::create_dir_all(&conf).unwrap();
        for plugin in ["bridge", "host-local", "portmap", "loopback"] {
            fs::copy(Path::new(PLUGINS).join(plugin), bin.join(plugin)).unwrap();
        }
        let list = format!(
            "{{\"cniVersion\":\"1.0.0\",\"name\":\"net\",\"plugins\":[\
             {{\"type\":\"bridge\",\"bridge\":\"cni0\",\"isGateway\":true,\"ipam\":{{\"type\":\"host-local\",\"dataDir\":{:?},\
             \"ranges\":[[{{\"subnet\":\"10.244.0.0/24\"}}]],\"routes\":[{{\"dst\":\"0.0.0.0/0\"}}]}}}},\
             {{\"type\":\"portmap\",\"capabilities\":{{\"portMappings\":true}}}}{behind}]}}",
            self.dir.join("ipam")
        );
        fs::write(conf.join("10-net.conflist"), list).unwrap();
    }

    /// Where it reads network configurations.
    pub(crate) fn conf_dir(&self) -> PathBuf {
        self.dir.join("cni")
    }

    /// Where it looks for plugins.
    pub(crate) fn plugin_dir(&self) -> PathBuf {
        self.dir.join("cni-bin")
    }

    /// Where CRI is served.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("sock")
    }

    /// Lines of its log with `words`.
    pub(crate) fn about(&self, words: &str) -> String {
        let log = fs::read_to_string(self.dir.join("log")).unwrap();
        log.lines().filter(|line| line.contains(words)).map(|line| format!("{line}\n")).collect()
    }

    /// What host-local has given away.
    pub(crate) fn leases(&self) -> PathBuf {
        self.dir.join("ipam/net")
    }

    fn import(&self, namespace: &str, name: &str, programs: &[&Path], command: &str) {
        let image = self.dir.join("image");
        let root = image.join("rootfs");
        fs::create_dir_all(root.join("bin")).unwrap();
        for program in programs {
            fs::copy(program, root.join("bin").join(program.file_name().unwrap())).unwrap();
            for library in libraries(program) {
                let target = root.join(library.strip_prefix("/").unwrap());
                fs::create_dir_all(target.parent().unwrap()).unwrap();
                fs::copy(&library, &target).unwrap();
            }
        }
        let run = |command: &mut Command| {
            let output = command.current_dir(&image).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        run(Command::new("tar").args(["-C", "rootfs", "-cf", "layer.tar", "."]));
        let sum = run(Command::new("sha256sum").arg("layer.tar"));
        let sum = sum.split(' ').next().unwrap();
        let config = format!(
            "{{\"architecture\":\"amd64\",\"os\":\"linux\",\"config\":{{{command}\"Env\":[\"PATH=/bin\"]}},\
             \"rootfs\":{{\"type\":\"layers\",\"diff_ids\":[\"sha256:{sum}\"]}}}}"
        );
        fs::write(image.join("config.json"), config).unwrap();
        let manifest =
            format!("[{{\"Config\":\"config.json\",\"RepoTags\":[\"{name}\"],\"Layers\":[\"layer.tar\"]}}]");
        fs::write(image.join("manifest.json"), manifest).unwrap();
        run(Command::new("tar").args(["-cf", "image.tar", "manifest.json", "config.json", "layer.tar"]));
        self.must(&[
            "--namespace",
            namespace,
            "images",
            "import",
            "--snapshotter",
            "native",
            &image.join("image.tar").display().to_string(),
        ]);
        fs::remove_dir_all(&image).unwrap();
    }

    /// Where the file systems of containers are.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir.join("root")
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn libraries(program: &Path) -> Vec<PathBuf> {
    let listed = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// What the supervisor uses of the capabilities that a privileged container has.
const CAPABILITIES: [&str; 10] = [
    "SYS_ADMIN",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "SYS_PTRACE",
    "SYS_CHROOT",
    "DAC_OVERRIDE",
    "SETUID",
    "SETGID",
    "SETPCAP",
    "KILL",
];

/// Settings of the container, as a DaemonSet gives them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    /// `hostPID: true`
    pub(crate) host_pid: bool,
    /// The node's `/sys/fs/cgroup`, writable.
    pub(crate) cgroups: bool,
    /// `mountPropagation: Bidirectional` for `node.run_dir`.
    pub(crate) bidirectional: bool,
}

impl Settings {
    pub(crate) const ALL: Settings = Settings { host_pid: true, cgroups: true, bidirectional: true };
}

/// The supervisor's container.
pub(crate) struct Container<'a> {
    runtime: &'a Runtime,
    id: String,
    cgroup: String,
}

impl<'a> Container<'a> {
    /// Starts one; `dir` holds what [`crate::rig::Rig`] made, `cgroup` is the container's.
    pub(crate) fn start(
        runtime: &'a Runtime,
        id: &str,
        dir: &Path,
        cgroup: &str,
        settings: Settings,
    ) -> Self {
        let bind = |path: &Path, options: &str| {
            let path = path.display();
            ["--mount".to_owned(), format!("type=bind,src={path},dst={path},options=rbind:{options}")]
        };
        fs::create_dir_all(dir.join("run")).unwrap();
        fs::create_dir_all(dir.join("state")).unwrap();
        let mut arguments: Vec<String> =
            ["run", "--detach", "--snapshotter", "native", "--privileged", "--net-host"]
                .map(str::to_owned)
                .to_vec();
        arguments.extend(["--rootfs-propagation".into(), "rshared".into(), "--cgroup".into(), cgroup.into()]);
        arguments.extend(["--log-uri".into(), format!("file://{}", dir.join(format!("{id}.log")).display())]);
        for name in caps::all().iter().map(ToString::to_string) {
            if !CAPABILITIES.contains(&&name["CAP_".len()..]) {
                arguments.extend(["--cap-drop".into(), name]);
            }
        }
        if settings.host_pid {
            arguments.extend(["--with-ns".into(), "pid:/proc/1/ns/pid".into()]);
        }
        if settings.cgroups {
            arguments.extend(bind(Path::new("/sys/fs/cgroup"), "rw"));
        }
        arguments.extend(bind(&dir.join("run"), if settings.bidirectional { "rshared" } else { "rslave" }));
        arguments.extend(bind(&dir.join("state"), "rw"));
        arguments.extend(bind(&dir.join("netns"), "rslave"));
        for file in ["supervisor.toml", "id", "secret", "default-ca.pem"] {
            arguments.extend(bind(&dir.join(file), "ro"));
        }
        arguments.extend([IMAGE.into(), id.into(), "/bin/podtether-supervisor".into(), "--config".into()]);
        arguments.push(dir.join("supervisor.toml").display().to_string());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        runtime.must(&arguments);
        Self { runtime, id: id.to_owned(), cgroup: cgroup.to_owned() }
    }

    /// The pid of the supervisor.
    pub(crate) fn pid(&self) -> u32 {
        let text = self.runtime.must(&["task", "ls"]);
        let line = text.lines().find(|line| line.starts_with(&format!("{} ", self.id))).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Kills the supervisor without a word, then removes task, container and file system.
    pub(crate) fn kill_and_delete(self) {
        self.runtime.must(&["task", "kill", "--signal", "SIGKILL", &self.id]);
        let start = Instant::now();
        while !self.runtime.must(&["task", "ls"]).contains("STOPPED") {
            assert!(start.elapsed() < TIMEOUT, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.runtime.must(&["task", "rm", &self.id]);
        self.runtime.must(&["container", "rm", &self.id]);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(
            !mounts.contains(&format!("{}/rootfs", self.id)),
            "its root file system is unmounted: {mounts}"
        );
        assert_eq!(cgroups_named(&self.cgroup), [] as [PathBuf; 0], "its cgroups are gone");
    }
}

/// Cgroups of this path in every hierarchy.
pub(crate) fn cgroups_named(path: &str) -> Vec<PathBuf> {
    let hierarchies = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|e| e.path());
    let all = hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]);
    all.map(|h| h.join(path.trim_start_matches('/'))).filter(|p| p.is_dir()).collect()
}
