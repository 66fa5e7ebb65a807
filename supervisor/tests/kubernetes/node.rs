//! A node and its control plane: every process of them, where their files are, and the node's restart.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::runtime::{Names, Runtime, cgroups_named, on_a_node, remove_below};

/// A Kubernetes does everything in its own time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);
/// Everything of the node that a restart keeps, apart from the supervisor's state.
const FILES: &str = "/var/lib/node";
pub(crate) const STATE_DIR: &str = "/var/lib/podtether";
pub(crate) const RUN_DIR: &str = "/run/podtether";
const NEEDED: [&str; 7] =
    ["kubelet", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "etcd", "openssl"];
const ADDRESS: &str = "192.168.99.1";

/// As [`on_a_node`], where Kubernetes is on PATH.
pub(crate) fn on_a_cluster(name: &str, body: impl FnOnce(&Names)) {
    let path = std::env::var("PATH").unwrap_or_default();
    let there = |program: &&&str| path.split(':').any(|dir| Path::new(dir).join(program).exists());
    let missing: Vec<_> = NEEDED.iter().filter(|program| !there(program)).collect();
    if !missing.is_empty() {
        println!("{name}: skipped, {missing:?} are not on PATH");
        return;
    }
    on_a_node(name, |dir, names| {
        assert_eq!(dir, Path::new(RUN_DIR), "where the manifest has it");
        own_files();
        own_cgroup(&names.containers);
        for arguments in [
            "link add node0 type bridge",
            "addr add 192.168.99.1/24 dev node0",
            "link set node0 up",
            "route add default dev node0",
        ] {
            let status = Command::new("busybox").arg("ip").args(arguments.split(' ')).status().unwrap();
            assert!(status.success(), "ip {arguments}");
        }
        body(names);
    });
}

/// Directories whose names are fixed, on file systems of this test's own.
fn own_files() {
    let (none, nothing) = (None::<&str>, None::<&str>);
    let own = std::env::current_exe().unwrap();
    for dir in ["/var/lib", "/var/log"] {
        assert!(!own.starts_with(dir), "{} would be hidden", own.display());
        mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), Some("mode=0755")).unwrap();
        mount(none, dir, none, MsFlags::MS_SHARED, nothing).unwrap();
    }
    // A kubelet sets some of the machine's own settings, and ends where it cannot.
    let settings = Path::new("/var/lib/settings");
    fs::create_dir(settings).unwrap();
    // A file system's device is named by whichever of its mounts the kubelet finds last.
    mount(Some("tmpfs"), settings, Some("tmpfs"), MsFlags::empty(), nothing).unwrap();
    for key in [
        "vm/overcommit_memory",
        "vm/panic_on_oom",
        "kernel/panic",
        "kernel/panic_on_oops",
        "kernel/keys/root_maxkeys",
        "kernel/keys/root_maxbytes",
    ] {
        let real = Path::new("/proc/sys").join(key);
        let Ok(value) = fs::read_to_string(&real) else { continue };
        let own = settings.join(key.replace('/', "-"));
        fs::write(&own, value).unwrap();
        mount(Some(&own), &real, none, MsFlags::MS_BIND, nothing).unwrap();
    }
}

/// Goes to a cgroup of this test's own in every hierarchy: a runtime puts containers below the cgroup it is in
/// when nobody names one.
fn own_cgroup(name: &str) {
    let all = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|e| e.path());
    for hierarchy in all.chain([PathBuf::from("/sys/fs/cgroup")]) {
        if !hierarchy.join("cgroup.procs").exists() || hierarchy.is_symlink() {
            continue;
        }
        let dir = hierarchy.join(name);
        fs::create_dir_all(&dir).unwrap();
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if dir.join(file).exists() && hierarchy.join(file).exists() {
                fs::write(dir.join(file), fs::read_to_string(hierarchy.join(file)).unwrap().trim()).unwrap();
            }
        }
        fs::write(dir.join("cgroup.procs"), "0").unwrap();
    }
}

/// What is started as a process.
pub(crate) struct Node<'a> {
    pub(crate) runtime: Option<Runtime>,
    names: &'a Names,
    control_plane: Vec<Child>,
    kubelet: Option<Child>,
}

fn file(name: &str) -> String {
    format!("{FILES}/{name}")
}

fn start(name: &str, arguments: &[&str]) -> Child {
    let log = fs::File::options().create(true).append(true).open(file(&format!("{name}.log"))).unwrap();
    Command::new(name)
        .args(arguments)
        .env("HOME", FILES)
        .current_dir(FILES)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl<'a> Node<'a> {
    /// Starts everything and waits until the API server answers.
    pub(crate) fn start(names: &'a Names) -> Self {
        fs::create_dir_all(FILES).unwrap();
        let config = "apiVersion: v1\nkind: Config\ncurrent-context: x\n\
             clusters: [{name: c, cluster: {server: 'https://127.0.0.1:6443', insecure-skip-tls-verify: true}}]\n\
             users: [{name: u, user: {token: admin}}]\ncontexts: [{name: x, context: {cluster: c, user: u}}]\n";
        fs::write(file("kubeconfig"), config).unwrap();
        fs::write(file("tokens.csv"), "admin,admin,admin,system:masters\n").unwrap();
        let made =
            Command::new("openssl").args(["genrsa", "-out", &file("sa.key"), "2048"]).output().unwrap();
        assert!(made.status.success());
        let public = ["rsa", "-in", &file("sa.key"), "-pubout", "-out", &file("sa.pub")];
        assert!(Command::new("openssl").args(public).output().unwrap().status.success());
        let mut control_plane = vec![start(
            "etcd",
            &[
                "--data-dir=etcd",
                "--unsafe-no-fsync",
                "--listen-client-urls=http://127.0.0.1:2379",
                "--advertise-client-urls=http://127.0.0.1:2379",
            ],
        )];
        control_plane.push(start(
            "kube-apiserver",
            &[
                "--etcd-servers=http://127.0.0.1:2379",
                "--service-account-key-file=sa.pub",
                "--service-account-signing-key-file=sa.key",
                "--service-account-issuer=https://kubernetes.default.svc",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--token-auth-file=tokens.csv",
                "--authorization-mode=RBAC",
                "--bind-address=127.0.0.1",
                "--advertise-address=192.168.99.1",
                "--cert-dir=certs",
                "--kubelet-preferred-address-types=InternalIP",
                "--allow-privileged=true",
            ],
        ));
        let runtime = Runtime::start(Path::new(FILES));
        let mut node = Self { runtime: Some(runtime), names, control_plane, kubelet: None };
        node.runtime().network("");
        node.runtime().import_pause();
        node.runtime().import_supervisor("k8s.io");
        let begun = Instant::now();
        while !kubectl(&["get", "--raw=/readyz"], None).1 {
            assert!(begun.elapsed() < PATIENCE, "no API server: {}", tail("kube-apiserver"));
            std::thread::sleep(Duration::from_millis(200));
        }
        node.control_plane.push(start(
            "kube-controller-manager",
            &[
                "--kubeconfig=kubeconfig",
                "--service-account-private-key-file=sa.key",
                "--root-ca-file=certs/apiserver.crt",
                "--leader-elect=false",
                "--bind-address=127.0.0.1",
            ],
        ));
        node.control_plane.push(start(
            "kube-scheduler",
            &["--kubeconfig=kubeconfig", "--leader-elect=false", "--bind-address=127.0.0.1"],
        ));
        node.start_kubelet();
        node
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().unwrap()
    }

    fn start_kubelet(&mut self) {
        // Cgroup v1, and no cgroups but those of containers; nothing of the machine's is set.
        let config = format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
             authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}\n\
             authorization: {{mode: AlwaysAllow}}\naddress: {ADDRESS}\nreadOnlyPort: 0\n\
             cgroupDriver: cgroupfs\nfailSwapOn: false\nfailCgroupV1: false\ncgroupsPerQOS: false\n\
             enforceNodeAllocatable: []\nlocalStorageCapacityIsolation: false\n\
             featureGates: {{KubeletInUserNamespace: true}}\nimageGCHighThresholdPercent: 100\n\
             evictionHard: {{memory.available: 1Mi, nodefs.available: 1%, imagefs.available: 1%}}\n\
             containerRuntimeEndpoint: unix://{}\nvolumePluginDir: {FILES}/volume-plugins\n\
             makeIPTablesUtilChains: false\n",
            self.runtime().socket().display()
        );
        fs::write(file("kubelet.yaml"), config).unwrap();
        self.kubelet = Some(start(
            "kubelet",
            &[
                "--kubeconfig=kubeconfig",
                "--config=kubelet.yaml",
                "--hostname-override=node",
                &format!("--node-ip={ADDRESS}"),
            ],
        ));
    }

    /// The power goes, and comes back: every process of the node ends, mounts and everything in memory with them.
    pub(crate) fn restart(&mut self) {
        let kept: Vec<u32> = self.control_plane.iter().map(Child::id).chain([std::process::id()]).collect();
        assert!(end_all_but(&kept), "processes do not end");
        if let Some(mut kubelet) = self.kubelet.take() {
            let _ = kubelet.wait();
        }
        drop(self.runtime.take());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        let mut points: Vec<&str> = points
            .filter(|p| ["/run/", "/var/lib/kubelet/", FILES].iter().any(|above| p.starts_with(above)))
            .collect();
        points.reverse();
        for point in points {
            umount2(point, MntFlags::MNT_DETACH).unwrap();
        }
        for entry in fs::read_dir("/run").unwrap().flatten() {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                fs::remove_dir_all(path)
            } else {
                fs::remove_file(path)
            }
            .unwrap();
        }
        let _ = Command::new("busybox").args(["ip", "link", "del", "cni0"]).output();
        for dir in cgroups_named(&self.names.containers) {
            fs::read_dir(dir).unwrap().flatten().for_each(|inner| remove_below(&inner.path()));
        }
        for dir in cgroups_named(&self.names.engines) {
            remove_below(&dir);
        }
        fs::remove_dir_all(file("ctd/state")).unwrap();
        self.runtime = Some(Runtime::start(Path::new(FILES)));
        self.start_kubelet();
    }
}

/// Ends every process but these, and removes the cgroups of containers, which nobody does who ends so.
fn end_all_but(kept: &[u32]) -> bool {
    let tasks = fs::read_dir(file("ctd/state/io.containerd.runtime.v2.task/k8s.io"));
    let ids = tasks.into_iter().flatten().flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    // Where containerd puts a container for which the kubelet names no cgroup.
    let cgroups: Vec<PathBuf> = ids.flat_map(|id| cgroups_named(&format!("k8s.io/{id}"))).collect();
    let begun = Instant::now();
    // Twice or more: a shim may be about to start something.
    loop {
        let doomed = others(kept);
        if doomed.is_empty() {
            break;
        }
        if begun.elapsed() > PATIENCE {
            return false;
        }
        for pid in doomed {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    for dir in &cgroups {
        remove_below(dir);
        // The one above, for whoever is last.
        let _ = dir.parent().map(fs::remove_dir);
    }
    true
}

/// Living processes but `kept` and what the kernel has yet to bury.
fn others(kept: &[u32]) -> Vec<i32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| !kept.contains(pid) && lives(*pid))
        .map(|pid| i32::try_from(pid).unwrap())
        .collect()
}

pub(crate) fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Living processes of this name, which the kernel cuts at 15 bytes.
pub(crate) fn named(name: &str) -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
    let is_one = |pid: &u32| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        comm.trim() == &name[..name.len().min(15)] && lives(*pid)
    };
    pids.filter(is_one).collect()
}

/// What it printed, and whether it succeeded.
pub(crate) fn kubectl(arguments: &[&str], input: Option<&str>) -> (String, bool) {
    use std::io::Write;
    let mut child = Command::new("kubectl")
        .arg(format!("--kubeconfig={FILES}/kubeconfig"))
        .args(arguments)
        .env("HOME", FILES)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.unwrap_or_default().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = if output.status.success() { output.stdout } else { [output.stdout, output.stderr].concat() };
    (String::from_utf8_lossy(&text).into_owned(), output.status.success())
}

/// The last lines of a process's log.
pub(crate) fn tail(name: &str) -> String {
    let log = fs::read_to_string(file(&format!("{name}.log"))).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        for child in self.kubelet.iter_mut().chain(&mut self.control_plane) {
            let _ = child.kill();
            let _ = child.wait();
        }
        end_all_but(&[std::process::id()]);
    }
}
