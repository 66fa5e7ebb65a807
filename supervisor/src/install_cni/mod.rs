//! `podtether-supervisor install-cni` and `uninstall-cni`: our plugin on a node, and our entry in the network
//! configuration that its runtime takes.
//!
//! [`conf`] knows one configuration, [`plan`] decides from the directory's files alone, `disk` does one step
//! whole or not at all. Every state between two steps is one in which pods start: the plugin is there before any
//! entry names it and goes after the last, and the runtime's first configuration always has the primary plugin.

mod arguments;
mod cluster;
pub mod conf;
mod disk;
mod pace;
pub mod plan;
#[cfg(test)]
mod tests;
mod watch;

use std::cell::Cell;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use conf::Entry;
use disk::Done;
use pace::Pace;
use plan::Plan;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use watch::Watch;

pub use arguments::{INSTALL, UNINSTALL, commands, options};
pub use cluster::{Cluster, DaemonSet};

/// How often others may be ahead of one round.
const MAX_ROUNDS: usize = 16;
/// A file that is being written is none to complain of.
const WRITTEN_WITHIN: Duration = Duration::from_secs(1);
/// After a failure of the disk.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// What the commands were given.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the runtime reads network configurations.
    pub conf_dir: PathBuf,
    /// Where it may look for plugins; those that exist get ours.
    pub bin_dirs: Vec<PathBuf>,
    /// Our plugin.
    pub plugin: PathBuf,
    /// Our entry.
    pub entry: Entry,
    /// What to do.
    pub mode: Mode,
    /// Asked by [`Mode::Watch`] alone, and only where one of the two below is given.
    pub cluster: Option<Cluster>,
    /// When we are told to end and this is being deleted, our entry goes, for the supervisor does.
    pub daemon_set: Option<DaemonSet>,
    /// A node, and the key of taints that it loses when pods can join there.
    pub taint: Option<(String, String)>,
}

/// What `install-cni` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Installs, waiting this long for a primary plugin's configuration.
    Once(Duration),
    /// Installs and stays, and puts back what another writer drops. The first time it waits for the supervisor, so
    /// that no pod is sent to a socket that nobody serves yet.
    Watch,
    /// Says whether all is installed.
    Check,
}

/// Why the commands failed: sentences.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The disk's.
    #[error("{0}: {1}")]
    Disk(String, #[source] io::Error),
    /// What else.
    #[error("{0}")]
    Other(String),
}

/// One look at the directories, and what it came to.
#[derive(Debug, Default)]
struct Round {
    plan: Plan,
    /// Our entry was put somewhere.
    wrote: bool,
}

impl Options {
    fn disk(&self, what: &str, error: io::Error) -> Failure {
        Failure::Disk(format!("cannot {what} {}", self.conf_dir.display()), error)
    }

    fn plan(&self) -> Result<Plan, Failure> {
        let files = disk::list(&self.conf_dir).map_err(|e| self.disk("read", e))?;
        Ok(plan::install(&files, &self.entry))
    }

    /// Puts the plugin where a runtime looks for it.
    fn install_plugin(&self) -> Result<(), Failure> {
        let mut found = false;
        for dir in self.bin_dirs.iter().filter(|dir| dir.is_dir()) {
            found = true;
            match disk::install_plugin(&self.plugin, dir) {
                Ok(true) => tracing::info!(dir = %dir.display(), "installed podtether-cni"),
                Ok(false) => {}
                Err(e) => {
                    let what = format!("cannot copy {} to {}", self.plugin.display(), dir.display());
                    return Err(Failure::Disk(what, e));
                }
            }
        }
        if found {
            return Ok(());
        }
        let dirs: Vec<_> = self.bin_dirs.iter().map(|dir| dir.display().to_string()).collect();
        Err(Failure::Other(format!(
            "there is no {}: name the directory in which the runtime looks for plugins (--cni-bin-dir)",
            dirs.join(" and no ")
        )))
    }

    /// Brings everything to where it should be, as far as others let it.
    fn round(&self) -> Result<Round, Failure> {
        self.install_plugin()?;
        let mut wrote = false;
        for _ in 0..MAX_ROUNDS {
            let plan = self.plan()?;
            if plan.steps.is_empty() {
                return Ok(Round { plan, wrote });
            }
            wrote |= self.apply(&plan)?;
        }
        Err(Failure::Other(format!(
            "others write {} faster than podtether can read it; it goes on trying",
            self.conf_dir.display()
        )))
    }

    /// True when all of it was done.
    fn apply(&self, plan: &Plan) -> Result<bool, Failure> {
        for step in &plan.steps {
            match disk::apply(&self.conf_dir, step) {
                Ok(Done::Yes) => {}
                Ok(Done::Overtaken) => return Ok(false),
                Err(e) => return Err(self.disk("write", e)),
            }
        }
        Ok(true)
    }

    /// Why not all is installed.
    fn missing(&self) -> Result<Option<String>, Failure> {
        let dirs: Vec<_> = self.bin_dirs.iter().filter(|dir| dir.is_dir()).collect();
        let lacks = dirs.iter().find(|dir| !disk::is_installed(&self.plugin, dir).unwrap_or(false));
        if let Some(dir) = lacks.copied().or(self.bin_dirs.first().filter(|_| dirs.is_empty())) {
            return Ok(Some(format!("{} has not this podtether-cni", dir.display())));
        }
        let plan = self.plan()?;
        Ok((!plan.is_done()).then(|| about(&plan, &self.conf_dir.display().to_string())))
    }
}

/// What a plan that is not done waits for.
fn about(plan: &Plan, dir: &str) -> String {
    match (&plan.chosen, plan.refused.first()) {
        (_, Some(refused)) => refused.clone(),
        (Some(chosen), None) => format!("{chosen} has not podtether-cni as it should be"),
        (None, None) => format!(
            "{dir} has no network configuration: podtether is chained behind a primary CNI, which is not installed yet"
        ),
    }
}

/// Runs `install-cni`.
pub fn install(options: &Options) -> ExitCode {
    run(async {
        if options.mode == Mode::Check {
            return match options.missing()? {
                None => Ok(()),
                Some(why) => Err(Failure::Other(why)),
            };
        }
        disk::list(&options.conf_dir)
            .and_then(|_| disk::tidy(&options.conf_dir))
            .map_err(|e| options.disk("read", e))?;
        match options.mode {
            Mode::Once(patience) => once(options, patience).await,
            Mode::Watch | Mode::Check => stay(options).await,
        }
    })
}

/// Runs `uninstall-cni`.
pub fn uninstall(options: &Options) -> ExitCode {
    run(async { remove(options) })
}

/// Our entry out of every configuration, then the plugin off the node.
fn remove(options: &Options) -> Result<(), Failure> {
    disk::list(&options.conf_dir)
        .and_then(|_| disk::tidy(&options.conf_dir))
        .map_err(|e| options.disk("read", e))?;
    let mut rounds = 0..MAX_ROUNDS;
    let plan = loop {
        let files = disk::list(&options.conf_dir).map_err(|e| options.disk("read", e))?;
        let plan = plan::uninstall(&files);
        if plan.steps.is_empty() {
            break plan;
        }
        if rounds.next().is_none() {
            return Err(Failure::Other(format!(
                "others write {} all the time: end `install-cni --watch` first",
                options.conf_dir.display()
            )));
        }
        if options.apply(&plan)? {
            for step in &plan.steps {
                tracing::info!(file = step.name(), "took podtether-cni out");
            }
        }
    };
    if !plan.possible {
        return Err(Failure::Other(plan.refused.join("; ")));
    }
    for dir in &options.bin_dirs {
        match disk::remove_plugin(dir) {
            Ok(true) => tracing::info!(dir = %dir.display(), "removed podtether-cni"),
            Ok(false) => {}
            Err(e) => {
                return Err(Failure::Disk(format!("cannot remove podtether-cni in {}", dir.display()), e));
            }
        }
    }
    Ok(())
}

fn run(work: impl Future<Output = Result<(), Failure>>) -> ExitCode {
    // What runs beside the supervisor on a node should not be taken for one in lists of processes.
    let _ = nix::sys::prctl::set_name(c"install-cni");
    let done = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(work),
        Err(e) => Err(Failure::Disk("cannot start".to_owned(), e)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e}");
            ExitCode::FAILURE
        }
    }
}

async fn once(options: &Options, patience: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + patience;
    let watch = watching(options)?;
    loop {
        let round = options.round()?;
        if round.plan.is_done() {
            told(&round);
            return Ok(());
        }
        let why = about(&round.plan, &options.conf_dir.display().to_string());
        let left = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, watch.changed()).await {
            Ok(changed) => changed.map_err(|e| options.disk("watch", e))?,
            Err(_) => return Err(Failure::Other(why)),
        }
    }
}

fn watching(options: &Options) -> Result<Watch, Failure> {
    let dirs: Vec<PathBuf> = [&options.conf_dir].into_iter().chain(&options.bin_dirs).cloned().collect();
    Watch::new(&dirs).map_err(|e| options.disk("watch", e))
}

fn told(round: &Round) {
    if let (true, Some(file)) = (round.wrote, &round.plan.chosen) {
        tracing::info!(file, "podtether-cni is chained behind the primary plugin");
    }
}

async fn stay(options: &Options) -> Result<(), Failure> {
    let wrap = |e| Failure::Disk("cannot wait for signals".to_owned(), e);
    let mut term = signal(SignalKind::terminate()).map_err(wrap)?;
    let mut int = signal(SignalKind::interrupt()).map_err(wrap)?;
    let chained = Notify::new();
    let known = Cell::new(false);
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
        failed = keep(options, &chained) => return failed,
        () = look_after(options, &chained, &known) => {}
    }
    if let (Some(cluster), Some(set)) = (&options.cluster, &options.daemon_set)
        && cluster.uninstalls(set, known.get()).await
    {
        tracing::info!("podtether is being uninstalled");
        return remove(options);
    }
    Ok(())
}

/// What the API server is asked while all goes well; never ends.
async fn look_after(options: &Options, chained: &Notify, known: &Cell<bool>) {
    let Some(cluster) = &options.cluster else { return std::future::pending().await };
    let daemon_set = async {
        if let Some(set) = &options.daemon_set {
            cluster.knows(set).await;
            known.set(true);
        }
    };
    let taint = async {
        if let Some((node, key)) = &options.taint {
            chained.notified().await;
            // An entry of an earlier time may be there before the supervisor is.
            if watch::answers(options.entry.socket.as_ref()).await.is_ok() {
                cluster.remove_taint(node, key).await;
            }
        }
    };
    tokio::join!(daemon_set, taint);
    std::future::pending().await
}

/// Never ends but with a failure.
async fn keep(options: &Options, chained: &Notify) -> Result<(), Failure> {
    let watch = watching(options)?;
    let mut pace = Pace::default();
    let mut was_done = options.plan()?.is_done();
    if !was_done {
        options.install_plugin()?;
        tokio::select! {
            there = watch::answers(options.entry.socket.as_ref()) => {
                there.map_err(|e| Failure::Disk(format!("cannot wait for {}", options.entry.socket), e))?;
            }
            () = says_that_it_waits(&options.entry.socket) => {}
        }
    }
    let mut said = String::new();
    loop {
        let mut patience = None;
        let mut complaint = match options.round() {
            Ok(round) => {
                if was_done && round.wrote {
                    tracing::warn!(
                        file = round.plan.chosen.as_deref(),
                        "another writer dropped podtether-cni; it is chained again"
                    );
                } else {
                    told(&round);
                }
                let wait = if was_done && round.wrote { pace.lost(Instant::now()) } else { Duration::ZERO };
                was_done = round.plan.is_done();
                if was_done {
                    chained.notify_one();
                }
                if !wait.is_zero() {
                    tracing::warn!(
                        seconds = wait.as_secs(),
                        "another writer drops podtether-cni again and again; until this is tried again pods start \
                         without a tailnet. With Cilium set cni.exclusive to false"
                    );
                    tokio::time::sleep(wait).await;
                    continue;
                }
                let dir = options.conf_dir.display().to_string();
                if was_done { round.plan.refused.join("; ") } else { about(&round.plan, &dir) }
            }
            Err(e) => {
                patience = Some(TRY_AGAIN);
                e.to_string()
            }
        };
        let told = |changed: io::Result<()>| changed.map_err(|e| options.disk("watch", e));
        if complaint == said {
            // What failed may go well without a change that can be seen: a disk has space again.
            let wait = tokio::time::timeout(patience.unwrap_or(Duration::MAX), watch.changed());
            if let Ok(changed) = wait.await {
                told(changed)?;
            }
            continue;
        }
        if !complaint.is_empty() {
            match tokio::time::timeout(WRITTEN_WITHIN, watch.changed()).await {
                Ok(changed) => {
                    told(changed)?;
                    continue;
                }
                Err(_) => tracing::warn!("{complaint}"),
            }
        }
        std::mem::swap(&mut said, &mut complaint);
    }
}

/// After a while; never ends.
async fn says_that_it_waits(socket: &str) {
    tokio::time::sleep(WRITTEN_WITHIN).await;
    tracing::info!(socket, "waits for the supervisor before podtether-cni is chained");
    std::future::pending().await
}
