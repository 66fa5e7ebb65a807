//! The page that shows the node's pods live, and what it asks for (`docs/page.md`).
//!
//! It is one file without anything from elsewhere; its script asks for [`Live`] every two seconds while
//! somebody sees it, so it costs nothing when nobody does, and those who look at a time share one answer.

use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use podtether_proto::node::{Live as EngineLive, PodSummary};
use serde::Serialize;

use crate::cli::status::{self, Standing};
use crate::log;
use crate::recent::{Told, recent};
use crate::table::{Handle, LastExit};

const PAGE: &str = include_str!("page.html");
/// Where the page has the word that lets its own script and style run, and no other.
const NONCE: &str = "{NONCE}";
/// Lines that are shown of all pods.
const EVENTS: usize = 30;
/// How long it is told of an engine that ended.
const EXIT_TOLD_S: u64 = 60;

/// What the page shows.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Live {
    node: String,
    version: &'static str,
    unix_ms: u64,
    /// `12 pods: 10 joined, 1 pending, 1 failed`
    totals: String,
    /// How many are not as they should be.
    trouble: usize,
    pods: Vec<Pod>,
    /// The latest first.
    events: Vec<Event>,
}

/// A pod, with what the tools would say of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Pod {
    /// Tells it from others of its name.
    key: String,
    namespace: String,
    pod: String,
    state: String,
    standing: &'static str,
    notes: Vec<String>,
    name: String,
    address: String,
    addresses: Vec<std::net::IpAddr>,
    path: String,
    tailnet: String,
    tags: Vec<String>,
    control_connected: bool,
    home_derp: u32,
    restarts: u64,
    handovers: u64,
    memory_bytes: Option<u64>,
    engine_pid: Option<u32>,
    added_unix_ms: u64,
    join: String,
    live: Option<EngineLive>,
}

/// A line of the log.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    seq: u64,
    unix_ms: u64,
    level: String,
    /// `namespace/name`
    pod: String,
    message: String,
    /// ` name=value` of each.
    fields: String,
}

impl Pod {
    fn of(pod: PodSummary, join: String, last_exit: Option<&LastExit>) -> Pod {
        let mut notes = status::notes(&pod);
        if let Some(exit) = last_exit.filter(|exit| exit.seconds_ago < EXIT_TOLD_S)
            && !notes.contains(&exit.reason)
        {
            notes.push(format!("its engine ended {} s ago: {}", exit.seconds_ago, exit.reason));
        }
        Pod {
            key: format!("{} {}", pod.container_id, pod.tailnet),
            standing: match status::standing(&pod) {
                Standing::Joined => "joined",
                Standing::Pending => "pending",
                Standing::Failed => "failed",
                Standing::Leaving => "leaving",
            },
            address: status::address(&pod),
            path: status::path(&pod),
            notes,
            namespace: pod.namespace,
            pod: pod.pod,
            state: pod.state,
            name: pod.name,
            addresses: pod.addresses,
            tailnet: pod.tailnet,
            tags: pod.tags,
            control_connected: pod.control_connected,
            home_derp: pod.home_derp,
            restarts: pod.restarts,
            handovers: pod.handovers,
            memory_bytes: pod.memory_bytes,
            engine_pid: pod.engine_pid,
            added_unix_ms: pod.added_unix_ms,
            join,
            live: pod.live,
        }
    }

    fn in_trouble(&self) -> bool {
        self.standing != "joined" || !self.notes.is_empty()
    }
}

impl From<Told> for Event {
    fn from(told: Told) -> Event {
        let Told { namespace, pod, line } = told;
        Event {
            seq: line.seq,
            unix_ms: line.unix_ms,
            level: line.level,
            pod: format!("{namespace}/{pod}"),
            message: line.message,
            fields: log::fields(&serde_json::from_str(&line.fields).unwrap_or_default()),
        }
    }
}

/// The page's answer to its script, as JSON.
pub async fn live(table: &Handle) -> Vec<u8> {
    let all = table.live().await;
    let totals = status::totals(all.iter().map(|(pod, ..)| pod));
    let pods: Vec<Pod> = all.into_iter().map(|(pod, join, exit)| Pod::of(pod, join, exit.as_ref())).collect();
    let live = Live {
        node: status::node_name(),
        version: env!("CARGO_PKG_VERSION"),
        unix_ms: status::now_ms(),
        totals,
        trouble: pods.iter().filter(|pod| pod.in_trouble()).count(),
        pods,
        events: recent().latest(EVENTS).into_iter().map(Event::from).collect(),
    };
    serde_json::to_vec(&live).unwrap_or_default()
}

/// The page itself.
pub fn page() -> Response {
    // Who has no random bytes gets a page whose script does not run.
    let nonce = getrandom::u64().map(|random| format!("{random:016x}")).unwrap_or_default();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (header::REFERRER_POLICY, "no-referrer".to_owned()),
        (header::CACHE_CONTROL, "no-store".to_owned()),
    ];
    (headers, PAGE.replace(NONCE, &nonce)).into_response()
}

/// The refusal for who calls this host by a name that anybody could have given it: a page from elsewhere whose
/// name leads to the loopback would otherwise read what is shown here in the browser of somebody who may. A browser
/// that says whose page asks (`Origin`) has to say this one.
#[must_use]
pub fn refusal(headers: &HeaderMap) -> Option<Response> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let origin = headers.get(header::ORIGIN).map(|origin| origin.to_str().unwrap_or_default());
    let is_ours =
        |origin: &str| origin.split_once("://").is_some_and(|(_, from)| from.eq_ignore_ascii_case(host));
    let is_here = bare == "localhost" || bare.parse::<std::net::IpAddr>().is_ok();
    if is_here && origin.is_none_or(is_ours) {
        return None;
    }
    let why = "this is for localhost and for addresses, and for no other page: open http://localhost:PORT/\n";
    Some((StatusCode::FORBIDDEN, why).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_brings_everything_and_its_policy_lets_nothing_else_in() {
        let response = page();
        let policy = response.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap().to_owned();
        assert!(policy.starts_with("default-src 'none';") && !policy.contains("unsafe"), "{policy}");
        assert_eq!(PAGE.matches(NONCE).count(), 2, "one script, one style");
        for foreign in [
            "http://",
            "https://",
            "//cdn",
            "@import",
            "url(",
            "src=",
            "innerHTML",
            "insertAdjacentHTML",
            "eval(",
        ] {
            let found: Vec<&str> = PAGE
                .lines()
                .filter(|line| line.contains(foreign) && !line.contains("www.w3.org/2000/svg"))
                .collect();
            assert!(found.is_empty(), "{foreign}: {found:?}");
        }
        assert!(PAGE.len() < 32 << 10, "{} bytes", PAGE.len());
    }

    #[test]
    fn names_that_anybody_could_give_are_refused() {
        let asked = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().unwrap());
            refusal(&headers).is_none()
        };
        for host in ["localhost", "localhost:9465", "127.0.0.1:9465", "[::1]:9465", "[::1]", "10.0.0.7"] {
            assert!(asked(host), "{host}");
        }
        for host in ["", "evil.example:9465", "localhost.evil.example", "127.0.0.1.evil.example"] {
            assert!(!asked(host), "{host}");
        }
        assert!(refusal(&HeaderMap::new()).is_some());
    }

    #[test]
    fn a_line_of_the_log_has_its_fields() {
        let line = podtether_proto::node::LogLine {
            seq: 1,
            unix_ms: 2,
            level: "WARN".into(),
            from: "engine".into(),
            message: "DERP lost".into(),
            fields: r#"{"region":9,"why":"gone"}"#.into(),
            join: String::new(),
        };
        let told = |line| Told { namespace: "shop".into(), pod: "web".into(), line };
        let event = Event::from(told(line.clone()));
        assert_eq!((event.message.as_str(), event.fields.as_str()), ("DERP lost", " region=9 why=gone"));
        // Cut off where it was too long.
        let event =
            Event::from(told(podtether_proto::node::LogLine { fields: r#"{"region":"#.into(), ..line }));
        assert_eq!(event.fields, "");
    }

    #[test]
    fn an_engine_that_ended_a_moment_ago_is_told_of() {
        let exit = |seconds_ago| LastExit { kind: "crash", reason: "the engine crashed".into(), seconds_ago };
        let of = |exit: Option<&LastExit>| {
            let summary = status::tests::pod("shop", "web", "running");
            Pod::of(
                PodSummary { control_connected: true, health: Vec::new(), ..summary },
                "4c1f".into(),
                exit,
            )
        };
        assert!(!of(None).in_trouble());
        assert_eq!(of(Some(&exit(3))).notes, ["its engine ended 3 s ago: the engine crashed"]);
        assert!(!of(Some(&exit(EXIT_TOLD_S))).in_trouble());
    }
}
