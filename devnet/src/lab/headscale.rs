//! A real Headscale at the lab's router, when a test has found one.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use podtether_net::Netns;
use serde_json::Value;

use super::Lab;
use crate::ca;

const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
const PORT: u16 = 8480;
/// The region of the relay that is part of Headscale.
pub const EMBEDDED_REGION: u32 = 999;

/// What a test may say about the server.
#[derive(Debug, Clone, Default)]
pub struct HeadscaleConfig {
    /// The `dns:` block below `magic_dns` and `base_domain`, in YAML, indented by two spaces; empty for no
    /// name servers.
    pub dns: String,
    /// Further top-level YAML.
    pub extra: String,
    /// A DERP map in YAML beside the embedded region, empty for none.
    pub derp: String,
    /// The tailnet has no IPv6.
    pub v4_alone: bool,
    /// No relay of Headscale's own in the map.
    pub without_embedded: bool,
    /// PEM roots of what the DERP map names, beside the server's own.
    pub roots: String,
}

/// See the module.
pub struct Headscale {
    program: PathBuf,
    dir: PathBuf,
    ns: Netns,
    addresses: [IpAddr; 2],
    config: HeadscaleConfig,
    server: Option<Child>,
    /// PEM file with every root its clients need.
    pub ca_file: PathBuf,
}

impl Lab {
    /// Starts `program` on addresses of its own at the router: control, API, embedded relay and STUN, with
    /// `policy` as its policy file.
    ///
    /// # Errors
    /// When it does not serve, with its log.
    pub fn start_headscale(
        &mut self,
        program: &Path,
        config: HeadscaleConfig,
        policy: &Value,
    ) -> Result<Headscale> {
        let addresses = self.server_addresses()?;
        let dir = self.dir.join(format!("headscale-{}", self.devnets));
        fs::create_dir(&dir)?;
        let issued = ca::issue(addresses.iter().map(ToString::to_string).collect())?;
        fs::write(dir.join("cert.pem"), &issued.certificate)?;
        fs::write(dir.join("key.pem"), &issued.key)?;
        let ca_file = dir.join("ca.pem");
        fs::write(&ca_file, format!("{}{}", issued.root, config.roots))?;
        let (program, ns) = (program.to_owned(), self.router.clone());
        let mut headscale = Headscale { program, dir, ns, addresses, config, server: None, ca_file };
        headscale.policy(policy)?;
        headscale.start()?;
        Ok(headscale)
    }

    /// The next addresses for a server at the router, IPv4 and IPv6.
    pub(super) fn server_addresses(&mut self) -> Result<[IpAddr; 2]> {
        self.devnets += 1;
        let addresses = super::region_addresses(0, self.devnets);
        super::add_local(&self.router, &addresses)?;
        Ok(addresses)
    }
}

impl Headscale {
    /// What clients are told to dial.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}:{PORT}", self.addresses[0])
    }

    /// Where its files live.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The settings it is started with the next time.
    pub fn config(&mut self) -> &mut HeadscaleConfig {
        &mut self.config
    }

    fn write_config(&self) -> Result<()> {
        let Self { dir, addresses: [v4, v6], config, .. } = self;
        let HeadscaleConfig { dns, extra, derp, .. } = config;
        let paths = if derp.is_empty() {
            String::new()
        } else {
            fs::write(dir.join("derp.yaml"), derp)?;
            format!("{}/derp.yaml", dir.display())
        };
        let (d, url) = (dir.display(), self.url());
        let v6_prefix = if config.v4_alone { "" } else { ", v6: 'fd7a:115c:a1e0::/48'" };
        let dns = if dns.is_empty() { "  override_local_dns: false" } else { dns.as_str() };
        let text = format!(
            "server_url: {url}
listen_addr: '[::]:{PORT}'
tls_cert_path: {d}/cert.pem
tls_key_path: {d}/key.pem
metrics_listen_addr: ''
noise: {{private_key_path: {d}/noise.key}}
prefixes: {{v4: 100.64.0.0/10{v6_prefix}, allocation: sequential}}
derp:
  server:
    enabled: {}
    region_id: {EMBEDDED_REGION}
    region_code: embedded
    region_name: Embedded
    verify_clients: true
    stun_listen_addr: '[::]:3479'
    private_key_path: {d}/derp.key
    automatically_add_embedded_derp_region: true
    ipv4: '{v4}'
    ipv6: '{v6}'
  urls: []
  paths: [{paths}]
  auto_update_enabled: false
disable_check_updates: true
database: {{type: sqlite, sqlite: {{path: {d}/db.sqlite}}}}
policy: {{mode: file, path: {d}/policy.json}}
unix_socket: {d}/headscale.sock
unix_socket_permission: '0700'
logtail: {{enabled: false}}
log: {{level: warn}}
dns:
  magic_dns: true
  base_domain: ts.example
{dns}
{extra}
",
            !config.without_embedded
        );
        fs::write(dir.join("config.yaml"), text)?;
        Ok(())
    }

    /// The command line client, or with `serve` the server itself.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("-c").arg(self.dir.join("config.yaml")).args(arguments).stdin(Stdio::null());
        command.env("HOME", &self.dir);
        let ns = self.ns.clone();
        // SAFETY: entering a namespace is one system call on a descriptor that is open before the fork.
        unsafe {
            command.pre_exec(move || {
                ns.enter().map_err(|e| std::io::Error::from_raw_os_error(e.errno().unwrap_or(libc::EPERM)))
            });
        }
        command
    }

    /// Starts the server and waits until it serves.
    ///
    /// # Errors
    /// When it does not within half a minute, with its log.
    pub fn start(&mut self) -> Result<()> {
        self.write_config()?;
        let log = File::options().create(true).append(true).open(self.dir.join("log"))?;
        let server = self.command(&["serve"]).stdout(log.try_clone()?).stderr(log).spawn();
        self.server = Some(server.with_context(|| format!("start {}", self.program.display()))?);
        let until = Instant::now() + PATIENCE;
        let at = SocketAddr::new(self.addresses[0], PORT);
        loop {
            // The socket is there before the listener.
            let listens = self.ns.run_blocking(move || TcpStream::connect_timeout(&at, PATIENCE))?.is_ok();
            if listens && self.run(&["users", "list"]).is_ok() {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("headscale does not serve:\n{}", self.log());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Ends the server.
    pub fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }

    /// Its output.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// The process id of the server, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(Child::id)
    }

    /// Asks the command line client for JSON.
    ///
    /// # Errors
    /// With its words when it refuses.
    pub fn run(&self, arguments: &[&str]) -> Result<Value> {
        let output = self.command(arguments).args(["--force", "-o", "json"]).output()?;
        if !output.status.success() {
            let said = [output.stdout, output.stderr].concat();
            bail!("headscale {}: {}", arguments.join(" "), String::from_utf8_lossy(&said));
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Makes a user; its number.
    ///
    /// # Errors
    /// As [`Headscale::run`].
    pub fn user(&self, name: &str) -> Result<String> {
        let user = self.run(&["users", "create", name])?;
        Ok(user["id"].to_string().trim_matches('"').to_owned())
    }

    /// Makes a pre-auth key with further arguments of `preauthkeys create`.
    ///
    /// # Errors
    /// As [`Headscale::run`].
    pub fn key(&self, arguments: &[&str]) -> Result<String> {
        let made = self.run(&[&["preauthkeys", "create"], arguments].concat())?;
        made["key"].as_str().map(str::to_owned).with_context(|| format!("no key in {made}"))
    }

    /// Makes a key for the API.
    ///
    /// # Errors
    /// As [`Headscale::run`].
    pub fn api_key(&self) -> Result<String> {
        let made = self.run(&["apikeys", "create"])?;
        made.as_str().map(str::to_owned).with_context(|| format!("no key in {made}"))
    }

    /// `nodes list`.
    ///
    /// # Errors
    /// As [`Headscale::run`].
    pub fn nodes(&self) -> Result<Vec<Value>> {
        Ok(self.run(&["nodes", "list"])?.as_array().cloned().unwrap_or_default())
    }

    /// The node that is called `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<Value> {
        let found = self.nodes()?.into_iter().find(|n| n["givenName"] == name);
        found.with_context(|| format!("Headscale has no node {name}"))
    }

    /// The number of the node that is called `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn node_id(&self, name: &str) -> Result<String> {
        Ok(self.node(name)?["id"].to_string().trim_matches('"').to_owned())
    }

    /// Whether Headscale would take `policy`.
    ///
    /// # Errors
    /// With what it says against it.
    pub fn check_policy(&self, policy: &Value) -> Result<()> {
        let path = self.dir.join("candidate.json");
        fs::write(&path, policy.to_string())?;
        let output = self.command(&["policy", "check", "--file"]).arg(&path).output()?;
        if !output.status.success() {
            let said = [output.stdout, output.stderr].concat();
            bail!("{}", String::from_utf8_lossy(&said));
        }
        Ok(())
    }

    /// Writes the policy; a server that runs reads it again.
    ///
    /// # Errors
    /// As the file system says.
    pub fn policy(&self, policy: &Value) -> Result<()> {
        fs::write(self.dir.join("policy.json"), policy.to_string())?;
        if let Some(server) = &self.server {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(server.id())?);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP)?;
        }
        Ok(())
    }
}

impl Drop for Headscale {
    fn drop(&mut self) {
        self.stop();
    }
}
