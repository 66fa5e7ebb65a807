//! A stock `tailscaled` on a node of its own, with a kernel TUN, when a test has found one.

use std::ffi::CString;
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::Node;

const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// The stock programs.
#[derive(Debug, Clone)]
pub struct StockPrograms {
    /// `tailscaled`.
    pub daemon: PathBuf,
    /// `tailscale`.
    pub client: PathBuf,
}

/// See the module.
pub struct Stock {
    /// Name in the tailnet.
    pub name: String,
    /// Where it runs.
    pub node: Node,
    programs: StockPrograms,
    dir: PathBuf,
    ca_file: PathBuf,
    daemon: Option<Child>,
}

impl Stock {
    /// Starts a daemon on `node`. It trusts `ca_file` alone and sees a private `/etc`, whose `resolv.conf`
    /// names `name_servers`.
    ///
    /// # Errors
    /// When it does not listen, with its log.
    pub fn start(
        node: Node,
        programs: &StockPrograms,
        ca_file: &Path,
        name_servers: &[IpAddr],
    ) -> Result<Self> {
        let dir = node.dir().join("stock");
        fs::create_dir_all(dir.join("etc"))?;
        let servers: Vec<String> = name_servers.iter().map(|ip| format!("nameserver {ip}\n")).collect();
        fs::write(dir.join("etc/resolv.conf"), servers.concat())?;
        for file in ["passwd", "group", "nsswitch.conf"] {
            let text = fs::read(Path::new("/etc").join(file)).unwrap_or_default();
            fs::write(dir.join("etc").join(file), text)?;
        }
        fs::write(dir.join("etc/hosts"), "127.0.0.1 localhost\n")?;
        let (name, programs, ca_file) = (node.name.clone(), programs.clone(), ca_file.to_owned());
        let mut stock = Self { name, node, programs, dir, ca_file, daemon: None };
        stock.restart()?;
        Ok(stock)
    }

    /// The node's command with the environment that stock programs get here.
    fn command(&self, program: &Path) -> Command {
        let mut command = self.node.command(program);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", &self.dir)
            .env("SSL_CERT_FILE", &self.ca_file)
            .env("SSL_CERT_DIR", self.dir.join("none"))
            .env("TS_LOGS_DIR", &self.dir)
            .env("TS_NO_LOGS_NO_SUPPORT", "true")
            .env("TS_DISABLE_PORTMAPPER", "1")
            .env("TS_PANIC_IF_HIT_MAIN_CONTROL", "1")
            .env("TS_DEBUG_FIREWALL_MODE", "nftables")
            .stdin(Stdio::null());
        command
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("sock")
    }

    /// Starts the daemon, after ending the one that runs; its state stays.
    ///
    /// # Errors
    /// When it does not listen, with the end of its log.
    pub fn restart(&mut self) -> Result<()> {
        self.stop();
        let _ = fs::remove_file(self.socket());
        let log = File::options().create(true).append(true).open(self.dir.join("log"))?;
        let mut command = self.command(&self.programs.daemon);
        let etc = CString::new(self.dir.join("etc").as_os_str().as_bytes())?;
        // SAFETY: three system calls on strings that were made before the fork.
        unsafe {
            command.pre_exec(move || private_etc(&etc));
        }
        let child = command
            .args(["--tun=tailscale0", "--port=0", "--no-logs-no-support", "--encrypt-state=false"])
            .arg(format!("--statedir={}", self.dir.join("state").display()))
            .arg(format!("--socket={}", self.socket().display()))
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", self.programs.daemon.display()))?;
        self.daemon = Some(child);
        let until = Instant::now() + PATIENCE;
        while !self.socket().exists() {
            if Instant::now() > until {
                bail!("tailscaled of {} does not listen:\n{}", self.name, self.log_end(20));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// The daemon's process id, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Child::id)
    }

    /// Kills the daemon.
    pub fn stop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// The last `lines` of the daemon's log.
    #[must_use]
    pub fn log_end(&self, lines: usize) -> String {
        let text = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Joins with further arguments of `tailscale up`, and waits until it runs.
    ///
    /// # Errors
    /// With the client's words and the end of the daemon's log.
    pub fn up(&self, url: &str, key: &str, more: &[&str]) -> Result<()> {
        let mut command = self.command(&self.programs.client);
        command.arg(format!("--socket={}", self.socket().display()));
        command.args(["up", "--timeout=40s"]);
        command.arg(format!("--hostname={}", self.name)).arg(format!("--login-server={url}"));
        let output = command.arg(format!("--auth-key={key}")).args(more).output()?;
        if !output.status.success() {
            let said = [output.stdout, output.stderr].concat();
            bail!("{}: {}\n{}", self.name, String::from_utf8_lossy(&said), self.log_end(30));
        }
        Ok(())
    }

    /// What `tailscale` says to these arguments, whatever comes of it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn say(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(&self.programs.client);
        command.arg(format!("--socket={}", self.socket().display()));
        let output = command.args(arguments).output()?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    }

    /// `tailscale status --json`.
    ///
    /// # Errors
    /// When the answer is no JSON.
    pub fn status(&self) -> Result<Value> {
        let said = self.say(&["status", "--json"])?;
        serde_json::from_str(&said).with_context(|| said)
    }

    /// How `tailscale status --json` shows the peer called `name` in the tailnet.
    ///
    /// # Errors
    /// When it shows none.
    pub fn peer(&self, name: &str) -> Result<Value> {
        let status = self.status()?;
        let wanted = format!("{name}.");
        let peers = status["Peer"].as_object().into_iter().flatten();
        let found = peers
            .map(|(_, peer)| peer)
            .find(|p| p["DNSName"].as_str().is_some_and(|n| n.starts_with(&wanted)));
        found.cloned().with_context(|| format!("{} sees no {name}", self.name))
    }

    /// Its addresses in the tailnet, IPv4 first.
    ///
    /// # Errors
    /// Before it has joined.
    pub fn addresses(&self) -> Result<Vec<IpAddr>> {
        let said = self.say(&["ip"])?;
        let mut found: Vec<IpAddr> = said.lines().filter_map(|line| line.trim().parse().ok()).collect();
        found.sort();
        if found.is_empty() {
            bail!("{} has no address: {said}", self.name);
        }
        Ok(found)
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        self.stop();
        if std::thread::panicking() {
            let mut out = std::io::stdout().lock();
            let _ = std::io::Write::write_fmt(
                &mut out,
                format_args!("--- tailscaled of {}\n{}\n", self.name, self.log_end(40)),
            );
        }
    }
}

/// A mount namespace in which `/etc` is `etc`: the daemon writes `resolv.conf`.
fn private_etc(etc: &CString) -> std::io::Result<()> {
    let mount = |source: *const libc::c_char, target: &std::ffi::CStr, flags| {
        // SAFETY: the strings live for the call; the other pointers are null, which these flags allow.
        let made = unsafe { libc::mount(source, target.as_ptr(), std::ptr::null(), flags, std::ptr::null()) };
        if made == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: plain system call without pointers.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    mount(std::ptr::null(), c"/", libc::MS_REC | libc::MS_PRIVATE)?;
    mount(etc.as_ptr(), c"/etc", libc::MS_BIND)
}
