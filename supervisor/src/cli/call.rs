//! Calls on the running supervisor.

use std::path::Path;
use std::time::Duration;

use podtether_proto::engine::HealthMessage;
use podtether_proto::node::{CniError, NodeClient, PodSelector, PodSummary};
use podtether_proto::{PROTO_VERSION, transport};
use tarpc::client::{self, RpcError};

use crate::engine::within;

/// A call that only reads.
pub(super) const READ_WITHIN: Duration = Duration::from_secs(5);
/// New routes are in force and on disk by then, or a step of it failed.
pub(super) const CHANGE_WITHIN: Duration = Duration::from_secs(30);

/// Connects to the running supervisor.
///
/// # Errors
/// A sentence: none is there, this user may not, or it is of another build.
pub(super) async fn connect(socket: &Path) -> Result<NodeClient, String> {
    let transport = transport::connect(socket).await.map_err(|e| unconnected(socket, &e))?;
    let client = NodeClient::new(client::Config::default(), transport).spawn();
    let version = client.status(within(READ_WITHIN)).await.map_err(|e| match e {
        RpcError::DeadlineExceeded => broken(&e),
        // The kernel lets anybody in who finds the socket; the supervisor then hangs up on strangers.
        RpcError::Shutdown | RpcError::Send(_) | RpcError::Channel(_) | RpcError::Server(_) => {
            format!("{}; it answers root alone: try it with sudo", broken(&e))
        }
    })?;
    if !PROTO_VERSION.accepts(version) {
        return Err(format!(
            "the supervisor speaks version {}.{} and this program {}.{}: use the program of its build",
            version.major, version.minor, PROTO_VERSION.major, PROTO_VERSION.minor
        ));
    }
    Ok(client)
}

fn unconnected(socket: &Path, error: &std::io::Error) -> String {
    let at = socket.display();
    if error.kind() == std::io::ErrorKind::PermissionDenied {
        return format!("the supervisor's socket {at} is root's: {error}; try it with sudo");
    }
    format!(
        "no supervisor answers at {at}: {error}; is podtether-supervisor running, and is node.run_dir another \
         (--socket)?"
    )
}

/// A call that got no answer, as a sentence.
pub(super) fn broken(error: &RpcError) -> String {
    match error {
        RpcError::DeadlineExceeded => "the supervisor did not answer in time; see its log".to_owned(),
        RpcError::Shutdown | RpcError::Send(_) | RpcError::Channel(_) | RpcError::Server(_) => {
            format!("the supervisor ended the connection ({error}); see its log")
        }
    }
}

/// A refusal, for a person: without the number that is for runtimes.
pub(super) fn refused(error: &CniError) -> String {
    match error.details.as_str() {
        "" => error.msg.clone(),
        details => format!("{}: {details}", error.msg),
    }
}

/// What a call came to.
///
/// # Errors
/// A sentence.
pub(super) fn answered<T>(answer: Result<Result<T, CniError>, RpcError>) -> Result<T, String> {
    answer.map_err(|e| broken(&e))?.map_err(|e| refused(&e))
}

/// Something that is wrong, in a line.
pub(super) fn problem(problem: &HealthMessage) -> String {
    match problem.text.as_str() {
        "" => problem.title.clone(),
        text => format!("{}: {text}", problem.title),
    }
}

/// `namespace/name`, or a name in the namespace `default`.
pub(super) fn selector(text: &str) -> PodSelector {
    let (namespace, name) = named(text);
    PodSelector::Pod { namespace: namespace.to_owned(), name: name.to_owned() }
}

/// The namespace of a pod that is named without one.
pub(super) const DEFAULT_NAMESPACE: &str = "default";

/// Namespace and name.
pub(super) fn named(text: &str) -> (&str, &str) {
    text.split_once('/').unwrap_or((DEFAULT_NAMESPACE, text))
}

/// All pods of the node.
///
/// # Errors
/// A sentence.
pub(super) async fn pods(client: &NodeClient, live: bool) -> Result<Vec<PodSummary>, String> {
    let mut pods = Vec::new();
    loop {
        let skip = u32::try_from(pods.len()).unwrap_or(u32::MAX);
        let page = client.pods(within(READ_WITHIN), skip, live).await.map_err(|e| broken(&e))?;
        if page.is_empty() {
            return Ok(pods);
        }
        pods.extend(page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_named_with_or_without_their_namespace() {
        let named =
            |namespace: &str, name: &str| PodSelector::Pod { namespace: namespace.into(), name: name.into() };
        assert_eq!(selector("web-0"), named("default", "web-0"));
        assert_eq!(selector("shop/web-0"), named("shop", "web-0"));
    }

    #[test]
    fn who_may_not_is_told_so_and_who_finds_nobody_too() {
        let told = |kind: std::io::ErrorKind| unconnected(Path::new("/x/s.sock"), &kind.into());
        assert!(told(std::io::ErrorKind::PermissionDenied).contains("try it with sudo"));
        assert!(told(std::io::ErrorKind::NotFound).starts_with("no supervisor answers at /x/s.sock: "));
    }
}
