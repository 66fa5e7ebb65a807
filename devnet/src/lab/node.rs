//! A node: its namespace, its supervisor, and what a person on it could ask.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podtether_net::netlink::{Netlink, VethEnd};
use podtether_net::{Netns, sysctl};
use serde_json::Value;

use super::{HostState, Pod, Programs, block_on, default_route, host_state, index_of, make_namespace};
use crate::Devnet;

/// Where each supervisor answers HTTP, inside its node.
const HTTP: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9465);
const PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);

/// See the module.
pub struct Node {
    /// Name.
    pub name: String,
    /// The namespace a supervisor calls its host.
    pub netns: Netns,
    number: u8,
    dir: PathBuf,
    pins: PathBuf,
    programs: Programs,
    cgroup_root: String,
    pods: u8,
    supervisor: Option<Child>,
    environment: Vec<(String, String)>,
}

/// A `[tailnet.NAME]` table of a node's configuration.
#[derive(Debug, Clone)]
pub struct Tailnet {
    name: String,
    control_url: String,
    ca_file: PathBuf,
    credentials: Vec<(&'static str, String)>,
    tags: Vec<String>,
}

impl Tailnet {
    /// Joins `devnet` with keys minted through its admin API.
    #[must_use]
    pub fn oauth(name: &str, devnet: &Devnet, ca_file: &Path) -> Self {
        let (id, secret) = devnet.oauth_client();
        let credentials = vec![
            ("kind", "oauth".into()),
            ("api_url", devnet.https_url()),
            ("client_id_file", id.to_owned()),
            ("client_secret_file", secret.to_owned()),
        ];
        Self::new(name, devnet, ca_file, credentials)
    }

    /// Joins `devnet` with one key for all.
    #[must_use]
    pub fn auth_key(name: &str, devnet: &Devnet, ca_file: &Path, key: &str) -> Self {
        let credentials = vec![("kind", "auth-key".into()), ("auth_key_file", key.to_owned())];
        Self::new(name, devnet, ca_file, credentials)
    }

    /// Joins `devnet`, whose admin API is Headscale's, with keys minted with its API key.
    #[must_use]
    pub fn headscale(name: &str, devnet: &Devnet, ca_file: &Path) -> Self {
        let credentials = vec![("kind", "headscale".into()), ("api_key_file", devnet.api_key())];
        Self::new(name, devnet, ca_file, credentials)
    }

    /// Joins any Headscale at `control_url` with keys minted with `api_key`.
    #[must_use]
    pub fn other_headscale(name: &str, control_url: &str, ca_file: &Path, api_key: &str) -> Self {
        let credentials = vec![("kind", "headscale".into()), ("api_key_file", api_key.to_owned())];
        Self::at(name, control_url, ca_file, credentials)
    }

    /// Joins any control server with one key for all.
    #[must_use]
    pub fn other_auth_key(name: &str, control_url: &str, ca_file: &Path, key: &str) -> Self {
        let credentials = vec![("kind", "auth-key".into()), ("auth_key_file", key.to_owned())];
        Self { tags: Vec::new(), ..Self::at(name, control_url, ca_file, credentials) }
    }

    /// The same with other tags.
    #[must_use]
    pub fn tagged(self, tags: &[&str]) -> Self {
        Self { tags: tags.iter().map(ToString::to_string).collect(), ..self }
    }

    /// The same without tags, for a user of Headscale's.
    #[must_use]
    pub fn of_user(mut self, user: &str) -> Self {
        self.credentials.push(("user", user.to_owned()));
        Self { tags: Vec::new(), ..self }
    }

    fn new(name: &str, devnet: &Devnet, ca: &Path, credentials: Vec<(&'static str, String)>) -> Self {
        Self::at(name, &devnet.https_url(), ca, credentials)
    }

    fn at(name: &str, control_url: &str, ca: &Path, credentials: Vec<(&'static str, String)>) -> Self {
        Self {
            name: name.to_owned(),
            control_url: control_url.to_owned(),
            ca_file: ca.to_owned(),
            credentials,
            tags: vec!["tag:k8s-pod".into()],
        }
    }
}

impl Node {
    pub(super) fn new(
        name: &str,
        number: u8,
        netns: Netns,
        lab_dir: &Path,
        programs: &Programs,
    ) -> Result<Self> {
        let dir = lab_dir.join(name);
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let node = Self {
            name: name.to_owned(),
            netns,
            number,
            dir,
            pins: lab_dir.join("netns"),
            programs: programs.clone(),
            cgroup_root: String::new(),
            pods: 0,
            supervisor: None,
            environment: Vec::new(),
        };
        block_on(async {
            let netlink = Netlink::open(&node.netns).await?;
            netlink.add_bridge("cni0").await?;
            let bridge = index_of(&netlink, "cni0").await?;
            // Otherwise it takes its ports' addresses in turn.
            netlink.set_mac(bridge, [0x0a, 0, 0, 0, 0, number]).await?;
            for address in node.pod_addresses(1) {
                netlink.add_address(bridge, address).await?;
            }
            // No link-local address that would come and go with the carrier.
            node.netns.run(|| sysctl::write("net/ipv6/conf/cni0/addr_gen_mode", "1")).await??;
            netlink.set_up(bridge).await.map_err(anyhow::Error::from)
        })?;
        Ok(node)
    }

    /// The same node for another thread, which may ask and call the plugin; the supervisor stays with this
    /// one. Only one of the two makes pods from then on: they would get the same addresses.
    #[must_use]
    pub fn caller(&self) -> Self {
        Self {
            name: self.name.clone(),
            netns: self.netns.clone(),
            number: self.number,
            dir: self.dir.clone(),
            pins: self.pins.clone(),
            programs: self.programs.clone(),
            cgroup_root: self.cgroup_root.clone(),
            pods: self.pods,
            supervisor: None,
            environment: self.environment.clone(),
        }
    }

    /// Addresses of host `p` of the node's pod network.
    fn pod_addresses(&self, p: u8) -> [IpNet; 2] {
        pod_addresses(self.number, p)
    }

    /// Where the node's files live.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The supervisor's `run_dir`.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The supervisor's `state_dir`.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Where CNI finds the supervisor.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("supervisor.sock")
    }

    /// Output of every supervisor this node has had.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.dir.join("supervisor.log")
    }

    /// The next [`Node::configure`] gives engines cgroups below this one, instead of none of their own. Whoever
    /// names it removes it: it is the machine's.
    pub fn set_cgroup_root(&mut self, name: &str) {
        name.clone_into(&mut self.cgroup_root);
    }

    /// Sets a variable for the supervisors and the plugins that are started from now on.
    pub fn set_environment(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    pub(super) fn environment(&self) -> &[(String, String)] {
        &self.environment
    }

    /// Writes `supervisor.toml` and the files it names. `extra` is more of the `[node]` table.
    ///
    /// # Errors
    /// As the file system says.
    pub fn configure(&self, tailnets: &[Tailnet], extra: &str) -> Result<PathBuf> {
        let mut text = String::new();
        for tailnet in tailnets {
            let name = &tailnet.name;
            text += &format!("[tailnet.{name}]\ncontrol_url = {:?}\n", tailnet.control_url);
            text += &format!("ca_file = {:?}\ntags = {:?}\n", tailnet.ca_file, tailnet.tags);
            text += "hostname_template = \"{pod}\"\n";
            text += &format!("[tailnet.{name}.credentials]\n");
            for (key, value) in &tailnet.credentials {
                if key.ends_with("_file") {
                    let path = self.dir.join(format!("{name}-{key}"));
                    fs::write(&path, value)?;
                    text += &format!("{key} = {path:?}\n");
                } else {
                    text += &format!("{key} = {value:?}\n");
                }
            }
        }
        text += &format!(
            "[namespace.\"*\"]\nexit_nodes = [\"*\"]\n[node]\ncluster_name = \"lab\"\nstate_dir = {:?}\nrun_dir = {:?}\nengine_path = {:?}\n\
             cgroup_root = {:?}\nhttp_listen = \"{HTTP}\"\n{extra}\n",
            self.state_dir(),
            self.run_dir(),
            self.programs.engine,
            self.cgroup_root,
        );
        let path = self.dir.join("supervisor.toml");
        fs::write(&path, text)?;
        Ok(path)
    }

    /// A command that starts inside the node.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        let ns = self.netns.clone();
        // SAFETY: entering a namespace is one system call on a descriptor that is open before the fork.
        unsafe {
            command.pre_exec(move || {
                ns.enter().map_err(|e| std::io::Error::from_raw_os_error(e.errno().unwrap_or(libc::EPERM)))
            });
        }
        command
    }

    /// Starts the supervisor and waits until it serves CNI calls.
    ///
    /// # Errors
    /// When it ends instead, with the end of its log.
    pub fn start_supervisor(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.log())?;
        let child = self
            .command(&self.programs.supervisor)
            .arg("--config")
            .arg(self.dir.join("supervisor.toml"))
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", self.programs.supervisor.display()))?;
        self.supervisor = Some(child);
        let until = Instant::now() + PATIENCE;
        while UnixStream::connect(self.socket()).is_err() {
            if let Some(status) =
                self.supervisor.as_mut().and_then(|c| c.try_wait().transpose()).transpose()?
            {
                self.supervisor = None;
                bail!("the supervisor of {} ended at once ({status}):\n{}", self.name, self.log_end(20));
            }
            if Instant::now() > until {
                bail!("the supervisor of {} does not serve its socket:\n{}", self.name, self.log_end(20));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Asks the supervisor by one of its program's sub-commands; what it printed.
    ///
    /// # Errors
    /// What it printed as an error.
    pub fn operate(&self, arguments: &[&str]) -> Result<String> {
        let program = &self.programs.tool;
        let output = Command::new(program).args(arguments).arg("--socket").arg(self.socket()).output();
        let output = output.with_context(|| format!("start {}", program.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("podtether {}: {}", arguments.join(" "), said.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The last `lines` of the supervisor's output.
    #[must_use]
    pub fn log_end(&self, lines: usize) -> String {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// The supervisor's process id.
    #[must_use]
    pub fn supervisor_pid(&self) -> Option<u32> {
        self.supervisor.as_ref().map(Child::id)
    }

    /// Asks the supervisor to stop and waits for it.
    ///
    /// # Errors
    /// When it does not within ten seconds; it is killed then.
    pub fn stop_supervisor(&mut self) -> Result<Option<ExitStatus>> {
        self.end_supervisor(Signal::SIGTERM)
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill_supervisor(&mut self) -> Result<Option<ExitStatus>> {
        self.end_supervisor(Signal::SIGKILL)
    }

    /// `kill -9` of the supervisor and of every engine it had, before any of them is started again.
    ///
    /// # Errors
    /// When nobody can say which engines there are.
    pub fn kill_everything(&mut self) -> Result<()> {
        let pods = self.pods_alone()?;
        self.kill_supervisor()?;
        for pid in pods.iter().filter_map(|pod| pod["enginePid"].as_i64()) {
            match kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL) {
                Ok(()) | Err(nix::Error::ESRCH) => {}
                Err(e) => bail!("cannot kill engine {pid}: {e}"),
            }
        }
        Ok(())
    }

    fn end_supervisor(&mut self, signal: Signal) -> Result<Option<ExitStatus>> {
        let Some(mut child) = self.supervisor.take() else { return Ok(None) };
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        let (done, ended) = std::sync::mpsc::channel();
        kill(pid, signal)?;
        std::thread::spawn(move || done.send(child.wait()));
        match ended.recv_timeout(PATIENCE) {
            Ok(status) => Ok(Some(status?)),
            Err(_) => {
                kill(pid, Signal::SIGKILL)?;
                ended.recv()??;
                bail!("the supervisor of {} did not stop:\n{}", self.name, self.log_end(20));
            }
        }
    }

    /// Makes a pod as a runtime and the primary CNI would: a namespace with `eth0`.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn create_pod(&mut self, name: &str) -> Result<Pod> {
        self.pods += 1;
        let p = self.pods + 1;
        let pin = self.pins.join(format!("{}-{name}", self.name));
        let netns = make_namespace(&pin)?;
        let port = format!("veth{}", self.pods);
        let addresses = self.pod_addresses(p);
        let mac = block_on(async {
            let node = Netlink::open(&self.netns).await?;
            let pod = Netlink::open(&netns).await?;
            let far = VethEnd { namespace: Some(&netns), name: "eth0", mac: None, mtu: super::MTU };
            node.add_veth(VethEnd { namespace: None, name: &port, mac: None, mtu: super::MTU }, far).await?;
            let outside = index_of(&node, &port).await?;
            node.set_master(outside, index_of(&node, "cni0").await?).await?;
            let key = format!("net/ipv6/conf/{port}/addr_gen_mode");
            self.netns.run(move || sysctl::write(&key, "1")).await??;
            node.set_up(outside).await?;
            let Some(eth0) = pod.link("eth0").await? else { bail!("no eth0") };
            for address in addresses {
                pod.add_address(eth0.index, address).await?;
            }
            pod.set_up(eth0.index).await?;
            node.wait_running(&port).await?;
            pod.wait_running("eth0").await?;
            pod.wait_local(&addresses.map(|a| a.addr())).await?;
            for gateway in self.pod_addresses(1) {
                pod.add_route(default_route(gateway.addr(), eth0.index)).await?;
            }
            Ok(eth0.mac.unwrap_or_default())
        })
        .with_context(|| format!("make pod {name}"))?;
        Ok(Pod::new(self, name, netns, pin, port, addresses, mac))
    }

    /// Takes the sandbox of the pod that was made last away; the next gets its addresses.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn destroy_last(&mut self, pod: Pod) -> Result<()> {
        pod.destroy(self)?;
        self.pods = self.pods.saturating_sub(1);
        Ok(())
    }

    pub(super) fn number(&self) -> u8 {
        self.number
    }

    pub(super) fn cni_program(&self) -> &Path {
        &self.programs.cni
    }

    /// One request to the supervisor's HTTP interface; the body of a 200.
    ///
    /// # Errors
    /// When it does not answer, or otherwise.
    pub fn http_get(&self, path: &str) -> Result<String> {
        let mut stream = self.netns.run_blocking(|| TcpStream::connect_timeout(&HTTP, PATIENCE))??;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
        if !head.starts_with("HTTP/1.1 200 ") {
            bail!("GET {path}: {}", head.lines().next().unwrap_or_default());
        }
        Ok(body.to_owned())
    }

    /// `/v1/pods`.
    ///
    /// # Errors
    /// As [`Node::http_get`].
    pub fn pods(&self) -> Result<Vec<Value>> {
        let body = self.http_get("/v1/pods")?;
        serde_json::from_str(&body).context("/v1/pods")
    }

    /// `/v1/pods` without paths to peers, which costs the engines nothing.
    ///
    /// # Errors
    /// As [`Node::http_get`].
    pub fn pods_alone(&self) -> Result<Vec<Value>> {
        let body = self.http_get("/v1/pods?peers=false")?;
        serde_json::from_str(&body).context("/v1/pods")
    }

    /// The entry of `/v1/pods` for the pod called `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod_report(&self, name: &str) -> Result<Value> {
        let pods = self.pods()?;
        let found = pods.iter().find(|p| p["pod"] == name).cloned();
        found.with_context(|| format!("{name} is not in /v1/pods of {}", self.name))
    }

    /// Everything on the node that a pod could have changed.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn host_state(&self) -> Result<HostState> {
        host_state(&self.netns, &[&self.dir])
    }
}

/// Addresses of host `p` of node `n`'s pod network.
fn pod_addresses(n: u8, p: u8) -> [IpNet; 2] {
    [
        Ipv4Net::new_assert(Ipv4Addr::new(10, 244, n, p), 24).into(),
        Ipv6Net::new_assert(Ipv6Addr::new(0xfd44, n.into(), 0, 0, 0, 0, 0, p.into()), 64).into(),
    ]
}

/// The pod network of node `n`, IPv4 and IPv6.
pub(super) fn pod_networks(n: u8) -> [IpNet; 2] {
    pod_addresses(n, 0).map(|net| net.trunc())
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(child) = &mut self.supervisor {
            // Dropped on the way out of a failure: nothing more can be told.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
