//! The control client: one task that keeps a session with the control server for ever.
//!
//! A session is dial, Noise, HTTP/2, register (once per process), then the map stream until it ends.
//! Whatever happens is told to the driver through a bounded channel; what the driver wants reported
//! (endpoints, NetInfo) sits in a watch cell, so that only the newest counts.

mod answer;
mod connect;
mod login;
mod noise_stream;
mod session;
#[cfg(test)]
mod tests;

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use podtether_core::backoff::Backoff;
use podtether_core::engine::{ControlAnswer, HostUpdate, PeerList};
use podtether_core::key::{MachinePrivate, NodePublic};
use podtether_core::map_stream::MapStream;
use podtether_core::retry_after;
use podtether_core::tailcfg::{ControlDialPlan, HostParams, Hostinfo, MapResponse, Node, UnixTime};
use podtether_proto::secret::SecretString;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::dial::{ControlUrl, Dialer};
use crate::log::Complaints;
use crate::reason::Ending;
use connect::Way;
use session::Session;

/// Pieces of map messages that wait for the driver; more stay in the session's flow control window. Each may
/// be large.
const EVENT_QUEUE: usize = 2;
const ANSWER_QUEUE: usize = 8;
/// Longest wait after a server that could not be reached: a server that is back is found within 5 s.
const RECONNECT_MAX: Duration = Duration::from_secs(4);
/// A session that ends sooner after its first netmap does not make the next one come sooner.
const WORTH_RESETTING: Duration = Duration::from_secs(2);
/// For a server that says "too many requests" but not until when, or asks for more than
/// [`RETRY_AFTER_MAX`].
const BUSY_WAIT: Duration = Duration::from_secs(7);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);
/// A logout that has to open a session of its own.
const LOGOUT_TIMEOUT: Duration = Duration::from_secs(5);

/// Who this node is towards control.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) url: ControlUrl,
    pub(crate) machine_key: MachinePrivate,
    pub(crate) node_key: NodePublic,
    pub(crate) old_node_key: NodePublic,
    pub(crate) auth_key: Option<SecretString>,
    /// A person lets the node in.
    pub(crate) interactive: bool,
    /// The URL that an earlier engine waited for.
    pub(crate) login_url: Option<String>,
    /// It may be changed while the task runs.
    pub(crate) hostname: std::sync::Mutex<String>,
    pub(crate) ephemeral: bool,
    pub(crate) request_tags: Vec<String>,
}

impl Identity {
    fn hostinfo(&self, host: &HostUpdate) -> Hostinfo {
        Hostinfo::outgoing(&HostParams {
            hostname: self.hostname.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            version: concat!(env!("CARGO_PKG_VERSION"), "-podtether").to_owned(),
            request_tags: self.request_tags.clone(),
            net_info: Some(host.net_info.clone()),
            exit_node_id: host.exit_node_id.clone(),
            ..HostParams::default()
        })
    }
}

/// What the control task tells the driver.
#[derive(Debug)]
pub(crate) enum Event {
    /// Not in a session; one sentence says what it waits for or what failed.
    Trying { reason: String },
    /// A person has to open the URL.
    NeedsLogin { url: String },
    /// Registered; the machine may still have to be approved.
    Registered { approved: bool },
    /// A map stream is open.
    SessionStarted,
    /// Nodes of a message of the map stream whose rest is still to come.
    Peers(PeerList, Vec<Node>),
    /// A message of the map stream, or the rest of it.
    Map(Box<MapResponse>),
    /// The message whose nodes came was passed over.
    PeersUnfinished,
    /// The map stream ended.
    SessionLost,
    /// The engine has to end: what is wrong does not go away by trying again.
    Ended(Ending),
}

/// Why a session ended or did not come about.
#[derive(Debug)]
enum Failure {
    /// The network or the server is down: try again soon.
    Unreachable(String),
    /// The server answered, with a no that may be temporary.
    Refused { reason: String, retry_after: Option<Duration>, status: Option<u16> },
    /// Trying again does not help.
    Fatal(Ending),
}

impl Failure {
    fn refused(reason: impl Into<String>) -> Self {
        Self::Refused { reason: reason.into(), retry_after: None, status: None }
    }

    /// An HTTP status other than the one that was hoped for.
    fn status(reason: String, status: u16, retry_after: Option<&str>) -> Self {
        let asked = retry_after.and_then(|value| retry_after::parse(value, wall_clock()));
        let retry_after = match asked.filter(|asked| *asked <= RETRY_AFTER_MAX) {
            None if status == 429 || asked.is_some() => Some(BUSY_WAIT),
            asked => asked,
        };
        Self::Refused { reason, retry_after, status: Some(status) }
    }
}

pub(crate) fn wall_clock() -> UnixTime {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    UnixTime::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// How long what is waited for; tests wait less.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    /// Silence for this long means that the session is dead, also before the first message.
    pub(crate) watchdog: Duration,
    /// A register request without a login.
    pub(crate) register: Duration,
    /// A login that was completed meanwhile is answered at once: only one that takes longer is told.
    pub(crate) login_told: Duration,
    /// A request that waits for a login is made again after this, in a new session: the old one may be
    /// dead without anybody noticing.
    pub(crate) login: Duration,
    /// A node that has nothing to report asks this often whether it is still known.
    pub(crate) still_known: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            watchdog: Duration::from_secs(120),
            register: Duration::from_secs(30),
            login_told: Duration::from_millis(1500),
            login: Duration::from_secs(120),
            still_known: Duration::from_secs(60),
        }
    }
}

/// Tells in the debug log where the time until a session goes.
#[derive(Debug)]
struct Steps {
    began: Instant,
    last: Instant,
}

impl Steps {
    fn new() -> Self {
        let now = Instant::now();
        Self { began: now, last: now }
    }

    fn done(&mut self, step: &'static str) {
        let now = Instant::now();
        let micros = |since: Instant| u64::try_from((now - since).as_micros()).unwrap_or(u64::MAX);
        tracing::debug!(step, us = micros(self.last), total_us = micros(self.began), "control");
        self.last = now;
    }
}

type LogoutAnswer = oneshot::Sender<Result<(), String>>;

/// The driver's end. Dropping it ends the task.
#[derive(Debug)]
pub(crate) struct Control {
    host: watch::Sender<HostUpdate>,
    identity: Arc<Identity>,
    answers: mpsc::Sender<ControlAnswer>,
    logouts: mpsc::Sender<LogoutAnswer>,
    events: mpsc::Receiver<Event>,
    _task: JoinSet<()>,
}

impl Control {
    /// Starts the task.
    pub(crate) fn start(
        dialer: Dialer,
        identity: Identity,
        host: HostUpdate,
        plan: ControlDialPlan,
        timing: Timing,
    ) -> Self {
        let (host, host_changes) = watch::channel(host);
        let (events_in, events) = mpsc::channel(EVENT_QUEUE);
        let (answers, answers_out) = mpsc::channel(ANSWER_QUEUE);
        let (logouts, logouts_out) = mpsc::channel(1);
        let mut task = JoinSet::new();
        let identity = Arc::new(identity);
        let client = Client {
            dialer,
            login: identity.login_url.clone().filter(|_| identity.interactive),
            identity: Arc::clone(&identity),
            timing,
            host: host_changes,
            events: events_in,
            answers: answers_out,
            logouts: logouts_out,
            way: Way::new(plan),
            registered: false,
            useful_since: None,
            complaints: Complaints::default(),
            map: MapStream::new(),
        };
        task.spawn(client.run());
        Self { host, identity, answers, logouts, events, _task: task }
    }

    /// The next thing that happened; `None` never comes while the task lives.
    pub(crate) async fn event(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Reports this from now on.
    pub(crate) fn set_host(&self, host: HostUpdate) {
        self.host.send_if_modified(|old| {
            let changed = *old != host;
            *old = host;
            changed
        });
    }

    /// Asks for this host name from now on.
    pub(crate) fn rename(&self, hostname: String) {
        *self.identity.hostname.lock().unwrap_or_else(PoisonError::into_inner) = hostname;
        self.host.send_modify(|_| {});
    }

    /// Gives control what it asked for; too many at once are dropped, which control sees as no answer.
    pub(crate) fn answer(&self, answer: ControlAnswer) {
        if self.answers.try_send(answer).is_err() {
            tracing::debug!("too many answers to control at once");
        }
    }

    /// Gives the node key up.
    pub(crate) fn logout(&self, answer: LogoutAnswer) {
        if let Err(error) = self.logouts.try_send(answer) {
            let _ = error.into_inner().send(Err("a logout is under way".to_owned()));
        }
    }
}

struct Client {
    dialer: Dialer,
    identity: Arc<Identity>,
    host: watch::Receiver<HostUpdate>,
    events: mpsc::Sender<Event>,
    answers: mpsc::Receiver<ControlAnswer>,
    logouts: mpsc::Receiver<LogoutAnswer>,
    timing: Timing,
    way: Way,
    /// The URL whose visit is waited for.
    login: Option<String>,
    registered: bool,
    /// When this session gave its first netmap.
    useful_since: Option<Instant>,
    complaints: Complaints,
    /// It outlives sessions, for the sake of the rules that it knows.
    map: MapStream,
}

/// The driver is gone, so this task ends too.
struct Gone;

impl Client {
    async fn run(mut self) {
        let mut soon = Backoff::default();
        let mut refused = Backoff::default();
        loop {
            let Err(Gone) = self.round(&mut soon, &mut refused).await else { continue };
            return;
        }
    }

    /// One session and the wait after it.
    async fn round(&mut self, soon: &mut Backoff, refused: &mut Backoff) -> Result<(), Gone> {
        let mut established = false;
        let failure = match self.session(&mut established).await? {
            Ok(never) => match never {},
            Err(failure) => failure,
        };
        let useful = self.useful_since.take();
        if useful.is_some_and(|since| since.elapsed() >= WORTH_RESETTING) {
            soon.reset();
            refused.reset();
            self.complaints = Complaints::default();
        }
        if established {
            self.tell(Event::SessionLost).await?;
        }
        let (reason, wait) = match failure {
            Failure::Fatal(ending) => {
                self.tell(Event::Ended(ending)).await?;
                // The driver ends the process; there is nothing left to try.
                std::future::pending::<()>().await;
                return Err(Gone);
            }
            Failure::Unreachable(reason) => {
                let random = random_u64();
                // Still jittered when the limit applies: between half of it and all of it.
                let limit = RECONNECT_MAX.mul_f64(0.5 + 0.5 * unit(random));
                (reason, soon.next(random).min(limit))
            }
            Failure::Refused { reason, retry_after, .. } => {
                let wait = match retry_after {
                    // Everyone was told the same; spread the return.
                    Some(asked) => asked + BUSY_WAIT.mul_f64(0.4 * unit(random_u64())),
                    None => refused.next(random_u64()),
                };
                (reason, wait)
            }
        };
        self.complaints.say(&reason, wait, |reason, wait_ms| {
            tracing::warn!(reason, wait_ms, "no control session; trying again");
        });
        self.tell(Event::Trying { reason }).await?;
        self.rest(wait).await
    }

    /// Waits before the next attempt; a logout does not wait.
    async fn rest(&mut self, wait: Duration) -> Result<(), Gone> {
        tokio::select! {
            () = tokio::time::sleep(wait) => Ok(()),
            answer = self.logouts.recv() => {
                let answer = answer.ok_or(Gone)?;
                let outcome = tokio::time::timeout(LOGOUT_TIMEOUT, self.logout_alone()).await;
                let outcome = outcome.unwrap_or_else(|_| Err("the control server did not answer".to_owned()));
                let _ = answer.send(outcome);
                Ok(())
            }
        }
    }

    async fn logout_alone(&mut self) -> Result<(), String> {
        let session = self.open(&mut Steps::new()).await.map_err(|failure| match failure {
            Failure::Unreachable(reason) | Failure::Refused { reason, .. } => reason,
            Failure::Fatal(ending) => ending.reason,
        })?;
        let host = self.host.borrow().clone();
        session.logout(&self.identity, &host).await
    }

    async fn open(&mut self, steps: &mut Steps) -> Result<Session, Failure> {
        connect::open(&self.dialer, &self.identity, &mut self.way, steps).await
    }

    /// Dial to map stream's end.
    async fn session(
        &mut self,
        established: &mut bool,
    ) -> Result<Result<std::convert::Infallible, Failure>, Gone> {
        let mut steps = Steps::new();
        let session = match self.open(&mut steps).await {
            Ok(session) => session,
            Err(failure) => return Ok(Err(failure)),
        };
        if !self.registered {
            if let Err(failure) = self.register(&session).await? {
                return Ok(Err(failure));
            }
            self.registered = true;
            steps.done("register");
        }
        self.stream(session, established, steps).await
    }

    async fn tell(&self, event: Event) -> Result<(), Gone> {
        self.events.send(event).await.map_err(|_| Gone)
    }
}

fn random_u64() -> u64 {
    getrandom::u64().unwrap_or(u64::MAX / 2)
}

/// Between 0 and 1.
fn unit(random: u64) -> f64 {
    f64::from(u32::try_from(random >> 32).unwrap_or(u32::MAX)) / f64::from(u32::MAX)
}
