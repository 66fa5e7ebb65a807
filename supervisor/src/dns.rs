//! A pod's names: which of its name servers are intercepted, and the sockets for it.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use podtether_net::Netns;
use podtether_net::intercept::{self, MAX_SERVERS, Owner, StandIn};
use podtether_net::link::{SERVICE_V4, SERVICE_V6};
use podtether_net::sockets::{self, Askers};
use podtether_proto::engine::HealthMessage;
use podtether_proto::fds;
use podtether_proto::node::{AddRequest, CniError, code};

use crate::config::Tailnet;
use crate::record::Attachment;

/// A pod's own choice, over its tailnet's.
pub const ANNOTATION: &str = "podtether.dev/dns";

/// What is done about names that a pod asks its own name servers for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DnsMode {
    /// Nothing: tailnet names are known at 100.100.100.100 alone.
    #[default]
    Off,
    /// Tailnet names are answered, everything else is passed on to the name server.
    Intercept,
}

impl DnsMode {
    /// As configurations and annotations write it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Off, Self::Intercept].into_iter().find(|mode| mode.name() == text)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Intercept => "intercept",
        }
    }
}

/// The name servers to intercept for a pod that joins; none where that is not wanted.
///
/// # Errors
/// A CNI error when the pod's annotation makes no sense, or nobody says which name servers it has.
pub fn intercepted(tailnet: &Tailnet, request: &AddRequest) -> Result<Vec<IpAddr>, CniError> {
    let error = |msg: String, details: &str| CniError {
        code: code::BAD_CONFIG,
        msg: format!("pod {}/{}: {msg}", request.pod.namespace, request.pod.name),
        details: details.into(),
    };
    let mode = match request.annotations.get(ANNOTATION) {
        None => tailnet.dns,
        Some(text) => DnsMode::parse(text).ok_or_else(|| {
            error(format!("its annotation {ANNOTATION} is {text:?}"), "write off or intercept")
        })?,
    };
    if mode == DnsMode::Off {
        return Ok(Vec::new());
    }
    let told = [&request.name_servers, &tailnet.dns_servers].into_iter().find(|list| !list.is_empty());
    let told = told.ok_or_else(|| {
        error(
            "its DNS is to be intercepted, but its name servers are not known".into(),
            "give the plugin \"capabilities\": {\"dns\": true}, or the tailnet dns_servers",
        )
    })?;
    let mut servers = Vec::new();
    for server in told {
        // MagicDNS itself needs nobody in front of it.
        let own = *server == SERVICE_V4 || *server == SERVICE_V6;
        if !own && !servers.contains(server) && servers.len() < MAX_SERVERS {
            servers.push(*server);
        }
    }
    Ok(servers)
}

/// The sockets for names of one engine, made anew for each: nothing of them outlives it.
#[derive(Debug, Default)]
pub struct Sockets {
    askers: Askers,
    stand_ins: Vec<StandIn>,
    owner: Option<Owner>,
    problem: Option<String>,
}

impl Sockets {
    /// Opens what can be opened in the pod. A pod whose names cannot be served still gets its tailnet; what
    /// is missing is said in the log and kept as [`Self::problem`].
    #[must_use]
    pub fn open(pod: &Netns, record: &Attachment) -> Self {
        let askers = sockets::askers(pod).unwrap_or_else(|e| {
            tell(record, "cannot ask name servers for it", &e.to_string());
            Askers::default()
        });
        let mut sockets = Self { askers, ..Self::default() };
        if !record.name_servers.is_empty() {
            let opened =
                intercept::stand_ins(pod, &record.name_servers).and_then(|s| Ok((s, Owner::open(pod)?)));
            match opened {
                Ok((stand_ins, owner)) => {
                    sockets.stand_ins = stand_ins;
                    sockets.owner = Some(owner);
                }
                Err(e) => {
                    tell(record, NOT_INTERCEPTED, &e.to_string());
                    sockets.problem = Some(e.to_string());
                }
            }
        }
        sockets
    }

    /// Why the pod's DNS will not be intercepted although it should be.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.problem.clone()
    }

    /// The name servers that there are stand-ins for.
    #[must_use]
    pub fn servers(&self) -> Vec<IpAddr> {
        self.stand_ins.iter().map(|stand_in| stand_in.server).collect()
    }

    /// For the engine.
    #[must_use]
    pub fn named(&self) -> Vec<(&'static str, BorrowedFd<'_>)> {
        let mut named: Vec<(&'static str, BorrowedFd<'_>)> = Vec::new();
        named.extend(self.stand_ins.iter().map(|s| (fds::STAND_IN, s.udp.as_fd())));
        named.extend(self.stand_ins.iter().map(|s| (fds::STAND_IN_TCP, s.tcp.as_fd())));
        let askers = [
            (fds::ASK_UDP4, &self.askers.udp4),
            (fds::ASK_UDP6, &self.askers.udp6),
            (fds::ASK_TCP4, &self.askers.tcp4),
            (fds::ASK_TCP6, &self.askers.tcp6),
        ];
        for (name, sockets) in askers {
            named.extend(sockets.iter().map(|s| (name, s.as_fd())));
        }
        named.extend(self.owner.as_ref().map(|owner| (fds::DNS_OWNER, owner.descriptor().as_fd())));
        named
    }

    /// [`Self::interception`] and [`Self::problem`].
    #[must_use]
    pub fn interception_with(self, record: &Attachment) -> (Option<Interception>, Option<String>) {
        let problem = self.problem();
        (self.interception(record), problem)
    }

    /// What is to begin when the engine is there.
    #[must_use]
    pub fn interception(self, record: &Attachment) -> Option<Interception> {
        let addresses = |s: &StandIn| Some((s.server, s.udp.local_addr().ok()?, s.tcp.local_addr().ok()?));
        let stand_ins = self.stand_ins.iter().filter_map(addresses).collect();
        let table = format!("podtether-{}", record.attachment.ifname);
        Some(Interception { owner: self.owner?, table, stand_ins })
    }
}

/// Rules that are ready to be made.
#[derive(Debug)]
pub struct Interception {
    owner: Owner,
    table: String,
    stand_ins: Vec<(IpAddr, SocketAddr, SocketAddr)>,
}

impl Interception {
    /// Makes the rules and leaves them to the engine; why they could not be made, if so. Returns when that is
    /// known.
    pub async fn begin(self, record: Attachment) -> Option<String> {
        let armed = tokio::task::spawn_blocking(move || self.owner.arm(&self.table, &self.stand_ins)).await;
        let why = armed.map_or_else(|e| Some(e.to_string()), |made| made.err().map(|e| e.to_string()))?;
        tell(&record, NOT_INTERCEPTED, &why);
        Some(why)
    }
}

/// What is wrong with a pod whose DNS should be intercepted and is not, and what to do.
#[must_use]
pub fn not_intercepted(why: &str) -> HealthMessage {
    HealthMessage { title: NOT_INTERCEPTED.into(), text: format!("{why}; {MEND}"), severity: "high".into() }
}

/// For a pod whose DNS should be intercepted and is not.
pub const NOT_INTERCEPTED: &str = "its DNS is not intercepted";
/// What to do about it.
pub const MEND: &str = "until then its name servers answer it as if podtether were not there. The node's kernel must \
                        have nf_tables with table owners (5.12), and nobody else may use the table podtether-… in the \
                        pod: mend that and delete the pod, or give it the annotation podtether.dev/dns: \"off\"";

fn tell(record: &Attachment, what: &str, why: &str) {
    let (namespace, pod) = (&record.pod.namespace, &record.pod.name);
    tracing::error!(
        namespace,
        pod,
        "{what}: {why}; its name servers answer it as if podtether were not there"
    );
}

#[cfg(test)]
mod tests {
    use podtether_proto::engine::PodRef;
    use podtether_proto::node::AttachmentId;

    use super::*;
    use crate::config::{Config, Inputs};

    fn tailnet(text: &str) -> Tailnet {
        let rest = "[tailnet.default.credentials]\nkind = \"auth-key\"\nauth_key_file = \"/k\"\n";
        let file = Some(format!("[tailnet.default]\n{text}\n{rest}"));
        let config = Config::load(&Inputs { file, ..Inputs::default() }).unwrap();
        config.tailnets["default"].clone()
    }

    fn request(annotation: Option<&str>, servers: &[&str]) -> AddRequest {
        AddRequest {
            join: String::new(),
            attachment: AttachmentId { network: "n".into(), container_id: "c".into(), ifname: "ts0".into() },
            netns: "/n".into(),
            pod: PodRef { uid: "u".into(), namespace: "ns".into(), name: "p".into() },
            tailnet: "default".into(),
            timeout_ms: 1000,
            annotations: annotation.map(|a| (ANNOTATION.to_owned(), a.to_owned())).into_iter().collect(),
            name_servers: servers.iter().map(|s| s.parse().unwrap()).collect(),
            primary: Vec::new(),
        }
    }

    #[test]
    fn who_decides_and_whose_servers() {
        let off = tailnet("");
        let on = tailnet("dns = \"intercept\"");
        let own = tailnet("dns = \"intercept\"\ndns_servers = [\"10.0.0.9\"]");
        let cluster = &["10.96.0.10"][..];
        type Case<'a> = (&'a str, &'a Tailnet, Option<&'a str>, &'a [&'a str], Option<&'a [&'a str]>);
        let table: &[Case<'_>] = &[
            ("off by default", &off, None, cluster, Some(&[])),
            ("the pod asks for it", &off, Some("intercept"), cluster, Some(cluster)),
            ("the pod refuses it", &on, Some("off"), cluster, Some(&[])),
            ("the tailnet's choice", &on, None, cluster, Some(cluster)),
            ("the runtime knows best", &own, None, cluster, Some(cluster)),
            ("nobody but the configuration knows", &own, None, &[], Some(&["10.0.0.9"])),
            ("nobody knows", &on, None, &[], None),
            ("no such mode", &on, Some("maybe"), cluster, None),
            ("MagicDNS is not intercepted", &on, None, &["100.100.100.100", "fd7a:115c:a1e0::53"], Some(&[])),
            ("twice the same", &on, None, &["10.0.0.1", "10.0.0.1", "::1"], Some(&["10.0.0.1", "::1"])),
            (
                "no more than can be",
                &on,
                None,
                &["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"],
                Some(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"]),
            ),
        ];
        for (what, tailnet, annotation, servers, want) in table {
            let got = intercepted(tailnet, &request(*annotation, servers));
            let want = want.map(|list| list.iter().map(|s| s.parse().unwrap()).collect::<Vec<IpAddr>>());
            assert_eq!(got.as_ref().ok(), want.as_ref(), "{what}: {got:?}");
            if let Err(e) = got {
                assert!(e.code == code::BAD_CONFIG && e.msg.contains("ns/p"), "{e}");
            }
        }
    }
}
