//! One call of the plugin.
//!
//! What the absence of the supervisor means differs by verb:
//!
//! | verb | no supervisor | no answer in time, or a broken connection |
//! |---|---|---|
//! | ADD | 11 (or prevResult unchanged when `failurePolicy` is `open`) | the same |
//! | DEL | success: its record is still there, and a starting supervisor removes what has no pod | 11; asked again first if broken |
//! | CHECK, GC | 11 | 11 |
//! | STATUS | 50 | 50 |

use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use podtether_proto::log::LogLevel;
use podtether_proto::node::{AddRequest, Attached, AttachmentId, CheckRequest, CniError, GcRequest, code};
use serde_json::{Map, Value, json};

use crate::config::{
    Config, DEFAULT_SOCKET, SpecVersion, invalid, parse_object, read_bytes, socket_of, version_of,
};
use crate::env::{Lookup, Params, Verb};
use crate::log::Log;
use crate::result::PrevResult;
use crate::supervisor::{Supervisor, Unanswered};

/// How long STATUS waits, so that its answer is out within three seconds.
const STATUS_TIMEOUT: Duration = Duration::from_millis(2800);
/// How long the supervisor is waited for when all it is told is that a call makes no sense.
const COMPLAINT_TIMEOUT: Duration = Duration::from_millis(500);
/// After the connection broke in the middle of a DEL.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// How long the half-made attachment of a pod that starts without a tailnet may take to go.
const UNDO_TIMEOUT: Duration = Duration::from_secs(3);

/// What the process prints and how it exits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// One JSON object, or nothing where a verb has no result.
    pub stdout: String,
    /// For the runtime's log.
    pub stderr: String,
    /// Whether the exit code is 0.
    pub success: bool,
}

impl Outcome {
    /// What to print when the process cannot even wait for an answer.
    #[must_use]
    pub fn failed_to_start(error: &std::io::Error) -> Self {
        let details = "the node is short of descriptors or memory; the runtime tries again".into();
        let error = CniError { code: code::IO, msg: format!("cannot start: {error}"), details };
        Self::failure(SpecVersion::NEWEST, &error)
    }

    fn failure(version: SpecVersion, error: &CniError) -> Self {
        let stdout = json!({
            "cniVersion": version.text(),
            "code": error.code,
            "msg": error.msg,
            "details": error.details,
        });
        Self { stdout: format!("{stdout}\n"), stderr: String::new(), success: false }
    }
}

/// What a successful verb says.
#[derive(Default)]
struct Said {
    result: Option<Value>,
}

/// Runs the plugin with this environment and this stdin.
pub async fn run(lookup: Lookup<'_>, stdin: &mut dyn Read) -> Outcome {
    let mut seen = Seen {
        version: SpecVersion::NEWEST,
        socket: DEFAULT_SOCKET.into(),
        asked: false,
        log: Log::new(lookup),
    };
    let began = Instant::now();
    let answer = answer(lookup, stdin, &mut seen).await;
    let ms = Value::from(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX));
    match answer {
        Ok(said) => {
            seen.log.say(LogLevel::Info, "done", &[("ms", ms)]);
            Outcome {
                stdout: said.result.map(|result| format!("{result}\n")).unwrap_or_default(),
                stderr: seen.log.into_lines(),
                success: true,
            }
        }
        Err(error) => {
            // What is on stdout already is no warning.
            let told = [("code", error.code.into()), ("ms", ms)];
            seen.log.say(LogLevel::Info, &format!("failed: {error}"), &told);
            // What was asked of the supervisor it has counted itself.
            if !seen.asked && is_callers_fault(&error) {
                complain(&seen, &error).await;
            }
            Outcome { stderr: seen.log.into_lines(), ..Outcome::failure(seen.version, &error) }
        }
    }
}

/// What is known of a call so far, for its error's sake.
struct Seen {
    /// The configuration's, as soon as it is known.
    version: SpecVersion,
    /// See `version`.
    socket: PathBuf,
    /// Something was asked of the supervisor.
    asked: bool,
    log: Log,
}

fn is_callers_fault(error: &CniError) -> bool {
    let codes = [
        code::INCOMPATIBLE_VERSION,
        code::UNSUPPORTED_FIELD,
        code::BAD_ENV,
        code::UNDECODABLE,
        code::BAD_CONFIG,
    ];
    codes.contains(&error.code)
}

/// Tells the supervisor, for its counters, what it would not hear of. What the runtime is told does not
/// depend on it.
async fn complain(seen: &Seen, error: &CniError) {
    if let Ok(supervisor) = Supervisor::reach(&seen.socket, Instant::now() + COMPLAINT_TIMEOUT).await {
        let _ = supervisor.wait(supervisor.client.misread(supervisor.context(), error.clone())).await;
    }
}

async fn answer(lookup: Lookup<'_>, stdin: &mut dyn Read, seen: &mut Seen) -> Result<Said, CniError> {
    let started = Instant::now();
    let params = Params::read(lookup)?;
    if params.verb == Verb::Version {
        return versions(stdin);
    }
    seen.log.name("verb", params.verb.name());
    if !params.container_id.is_empty()
        && let Ok(pod) = params.pod()
    {
        seen.log.name("namespace", &pod.namespace);
        seen.log.name("pod", &pod.name);
        seen.log.name("container", &params.container_id);
    }
    let object = parse_object(&read_bytes(stdin)?)?;
    if let Some(socket) = socket_of(&object) {
        seen.socket = socket;
    }
    seen.version = version_of(&object)?;
    let config = Config::read(params.verb, seen.version, object)?;
    let deadline = started + config.timeout;
    match params.verb {
        Verb::Add => add(&params, &config, deadline, seen).await,
        Verb::Del => del(&params, &config, deadline, seen).await,
        Verb::Check => check(&params, &config, deadline, seen).await,
        Verb::Gc => gc(&config, deadline, seen).await,
        Verb::Status => status(&config, started + STATUS_TIMEOUT.min(config.timeout)).await,
        Verb::Version => Ok(Said::default()),
    }
}

/// Everything a call reads before it asks the supervisor.
pub(crate) fn rehearse(lookup: Lookup<'_>, stdin: &mut dyn Read) -> Result<(), CniError> {
    let params = Params::read(lookup)?;
    if params.verb == Verb::Version {
        return versions(stdin).map(drop);
    }
    let object = parse_object(&read_bytes(stdin)?)?;
    let version = version_of(&object)?;
    let config = Config::read(params.verb, version, object)?;
    if params.verb == Verb::Gc {
        config.valid_attachments()?;
    }
    let Some(prev) = &config.prev_result else { return Ok(()) };
    let prev = PrevResult::read(prev, version)?;
    let _ = prev.ours(&config.ifname);
    // What is printed after ADD must be readable as the next plugin's prevResult.
    let printed =
        prev.with(&Attached { ifname: config.ifname.clone(), ..Attached::default() }, &params.netns);
    PrevResult::read(&printed, version).map(drop)
}

/// VERSION takes whatever version it is asked in: it is how a runtime finds out.
fn versions(stdin: &mut dyn Read) -> Result<Said, CniError> {
    let bytes = read_bytes(stdin)?;
    let object = if bytes.trim_ascii().is_empty() { Map::new() } else { parse_object(&bytes)? };
    let asked = object.get("cniVersion").and_then(Value::as_str).unwrap_or(SpecVersion::NEWEST.text());
    let result = json!({"cniVersion": asked, "supportedVersions": SpecVersion::ALL.map(SpecVersion::text)});
    Ok(Said { result: Some(result) })
}

async fn add(params: &Params, config: &Config, deadline: Instant, seen: &mut Seen) -> Result<Said, CniError> {
    let Some(prev) = &config.prev_result else {
        return Err(invalid(
            "ADD without prevResult",
            "podtether-cni adds to a pod that another plugin has networked: \
             chain it after the primary plugin in the network's list of plugins",
        ));
    };
    let prev = PrevResult::read(prev, config.version)?;
    if prev.has_interface(&config.ifname) {
        return Err(CniError {
            code: code::INTERFACE_EXISTS,
            msg: format!("prevResult has an interface {} in the pod already", config.ifname),
            details: "chain this plugin once only, or give it another \"ifName\"".into(),
        });
    }
    let pod = params.pod()?;
    let join = join_id()?;
    seen.log.name("join", &join);
    let joined = async {
        let supervisor = reach(config, deadline, seen).await?;
        seen.log.say(LogLevel::Debug, "the supervisor is there", &[]);
        let request = AddRequest {
            attachment: attachment(params, config),
            netns: params.netns.clone(),
            pod,
            tailnet: config.tailnet.clone(),
            timeout_ms: supervisor.budget_ms(),
            annotations: config.annotations.clone(),
            name_servers: config.name_servers.clone(),
            primary: prev.networks(),
            join,
        };
        let call = supervisor.client.add(supervisor.context(), request);
        supervisor.wait(call).await.map_err(|why| no_answer(config, &why))?
    };
    match joined.await {
        Ok(attached) if attached.is_nothing() => {
            seen.log.say(LogLevel::Debug, "the pod joins nothing", &[]);
            Ok(Said { result: Some(prev.unchanged()) })
        }
        Ok(attached) => {
            seen.log.say(LogLevel::Debug, "the pod has joined", &[("addresses", json!(attached.addresses))]);
            Ok(Said { result: Some(prev.with(&attached, &params.netns)) })
        }
        Err(error) if config.fail_open && may_start_without(&error) => {
            undo(params, config).await;
            let warning = format!("{} starts without a tailnet: {error}", params.container_id);
            seen.log.say(LogLevel::Warn, &warning, &[("code", error.code.into())]);
            Ok(Said { result: Some(prev.unchanged()) })
        }
        Err(error) => Err(error),
    }
}

/// An id for this call, by which its lines are found in every program's log.
fn join_id() -> Result<String, CniError> {
    let random = getrandom::u64().map_err(|e| CniError {
        code: code::IO,
        msg: format!("the kernel gives no random bytes: {e}"),
        details: "the runtime tries again".into(),
    })?;
    Ok(format!("{:012x}", random >> 16))
}

/// With `failurePolicy` `open`: what another try or another day could mend. A request that is wrong in
/// itself is an error under either policy, or nobody would ever notice.
fn may_start_without(error: &CniError) -> bool {
    matches!(
        error.code,
        code::IO | code::TRY_AGAIN | code::UNAVAILABLE | code::REFUSED | code::LINK | code::NEEDS_ACTION
    )
}

/// The runtime will believe that ADD succeeded, so nothing half-made may appear in the pod later.
async fn undo(params: &Params, config: &Config) {
    if let Ok(supervisor) = Supervisor::reach(&config.socket, Instant::now() + UNDO_TIMEOUT).await {
        let call = supervisor.client.del(supervisor.context(), attachment(params, config));
        // A supervisor that cannot do it now has the record and goes on trying.
        let _ = supervisor.wait(call).await;
    }
}

/// A supervisor that ends in the middle of the call is asked again, or its successor is, or nobody is there: a
/// runtime that clears up after an ADD that failed asks once, and what stands behind us in the chain would keep
/// its addresses.
async fn del(params: &Params, config: &Config, deadline: Instant, seen: &mut Seen) -> Result<Said, CniError> {
    loop {
        match del_once(params, config, deadline, &mut seen.log).await {
            Err(Unmade::Unanswered(Unanswered::Broken(_))) if Instant::now() + ASK_AGAIN < deadline => {
                tokio::time::sleep(ASK_AGAIN).await;
            }
            Err(Unmade::Unanswered(why)) => return Err(no_answer(config, &why)),
            Err(Unmade::Refused(error)) => return Err(error),
            Ok(said) => return Ok(said),
        }
    }
}

/// Why a DEL did nothing.
enum Unmade {
    Unanswered(Unanswered),
    Refused(CniError),
}

async fn del_once(
    params: &Params,
    config: &Config,
    deadline: Instant,
    log: &mut Log,
) -> Result<Said, Unmade> {
    let supervisor = match Supervisor::reach(&config.socket, deadline).await {
        Ok(supervisor) => supervisor,
        Err(why @ Unanswered::Nobody(_)) => {
            let warning = format!(
                "supervisor at {}: {why}; it removes {} when it is back",
                config.socket.display(),
                params.container_id
            );
            log.say(LogLevel::Warn, &warning, &[]);
            return Ok(Said::default());
        }
        Err(why) => return Err(Unmade::Unanswered(why)),
    };
    let call = supervisor.client.del(supervisor.context(), attachment(params, config));
    supervisor.wait(call).await.map_err(Unmade::Unanswered)?.map_err(Unmade::Refused)?;
    Ok(Said::default())
}

async fn check(
    params: &Params,
    config: &Config,
    deadline: Instant,
    seen: &mut Seen,
) -> Result<Said, CniError> {
    let Some(prev) = &config.prev_result else {
        return Err(invalid("CHECK without prevResult", "the runtime must pass the result of the last ADD"));
    };
    // A pod that was let through without a tailnet has nothing of ours to check.
    let Some(ours) = PrevResult::read(prev, config.version)?.ours(&config.ifname) else {
        return Ok(Said::default());
    };
    let supervisor = reach(config, deadline, seen).await?;
    let request = CheckRequest {
        attachment: attachment(params, config),
        netns: params.netns.clone(),
        addresses: ours.addresses,
        routes: ours.routes,
    };
    let call = supervisor.client.check(supervisor.context(), request);
    supervisor.wait(call).await.map_err(|why| no_answer(config, &why))??;
    Ok(Said::default())
}

async fn gc(config: &Config, deadline: Instant, seen: &mut Seen) -> Result<Said, CniError> {
    let request = GcRequest { network: config.network.clone(), valid: config.valid_attachments()? };
    let supervisor = reach(config, deadline, seen).await?;
    let call = supervisor.client.gc(supervisor.context(), request);
    supervisor.wait(call).await.map_err(|why| no_answer(config, &why))??;
    Ok(Said::default())
}

async fn status(config: &Config, deadline: Instant) -> Result<Said, CniError> {
    match Supervisor::reach(&config.socket, deadline).await {
        Ok(_) => Ok(Said::default()),
        Err(why) => Err(CniError { code: code::UNAVAILABLE, ..no_answer(config, &why) }),
    }
}

async fn reach(config: &Config, deadline: Instant, seen: &mut Seen) -> Result<Supervisor, CniError> {
    seen.asked = true;
    Supervisor::reach(&config.socket, deadline).await.map_err(|why| no_answer(config, &why))
}

fn no_answer(config: &Config, why: &Unanswered) -> CniError {
    let details = match why {
        Unanswered::Nobody(_) => "see whether podtether-supervisor runs on this node with this socket",
        Unanswered::Late => "see podtether-supervisor's log; the runtime tries again",
        Unanswered::Broken(_) => "podtether-supervisor restarted or crashed; the runtime tries again",
        Unanswered::Foreign(_) => "an upgrade is under way, or one of the two was left behind by it",
    };
    CniError {
        code: code::TRY_AGAIN,
        msg: format!("supervisor at {}: {why}", config.socket.display()),
        details: details.into(),
    }
}

fn attachment(params: &Params, config: &Config) -> AttachmentId {
    AttachmentId {
        network: config.network.clone(),
        container_id: params.container_id.clone(),
        ifname: config.ifname.clone(),
    }
}

#[cfg(test)]
mod tests;
