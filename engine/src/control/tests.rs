//! The control client against a devnet in the same process, without kernel objects.
#![allow(clippy::wildcard_enum_match_arm, reason = "a test looks for one event among all")]

mod carriage;
mod life;
mod refused;
mod stream;

use std::net::IpAddr;
use std::sync::Arc;

use podtether_core::key::DiscoPrivate;
use podtether_core::tailcfg::{ControlIpCandidate, NetInfo};
use podtether_devnet::fault::{Fault, Target};
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig};
use podtether_proto::engine::Underlay;
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::proxy::Proxy;
use crate::resolve::Resolver;
use crate::tls::Tls;

const PATIENCE: Duration = Duration::from_secs(60);

/// Who joins.
#[derive(Clone)]
struct Node {
    machine_key: [u8; 32],
    node_key: [u8; 32],
    auth_key: Option<String>,
    interactive: bool,
    login_url: Option<String>,
}

impl Node {
    fn new(auth_key: Option<&str>) -> Self {
        let mut keys = [0; 64];
        getrandom::fill(&mut keys).unwrap();
        Self {
            machine_key: keys[..32].try_into().unwrap(),
            node_key: keys[32..].try_into().unwrap(),
            auth_key: auth_key.map(str::to_owned),
            interactive: auth_key.is_none(),
            login_url: None,
        }
    }

    fn identity(&self, url: &str) -> Identity {
        Identity {
            url: url.parse().unwrap(),
            machine_key: MachinePrivate::from_bytes(self.machine_key),
            node_key: podtether_core::key::NodePrivate::from_bytes(self.node_key).public(),
            old_node_key: NodePublic::default(),
            auth_key: self.auth_key.clone().map(SecretString::new),
            interactive: self.interactive,
            login_url: self.login_url.clone(),
            hostname: std::sync::Mutex::new("pod".into()),
            ephemeral: false,
            request_tags: Vec::new(),
        }
    }
}

/// The world as an engine sees it.
struct Place {
    devnet: Devnet,
    dialer: Dialer,
    timing: Timing,
    plan: ControlDialPlan,
    url: String,
}

impl Place {
    async fn new(edit: impl FnOnce(&mut DevnetConfig)) -> Self {
        let mut config = DevnetConfig::default();
        edit(&mut config);
        let devnet = Devnet::start(config).await.unwrap();
        let dialer =
            Dialer { resolver: Resolver::default(), tls: Tls::new(devnet.ca_pem()).unwrap(), proxy: None };
        let timing = Timing { login_told: Duration::from_millis(300), ..Timing::default() };
        let url = devnet.http_url();
        Self { devnet, dialer, timing, plan: ControlDialPlan::default(), url }
    }

    fn hosts(&self, entries: &[(&str, &str)]) {
        let hosts = entries.iter().map(|(name, ip)| ((*name).to_owned(), ip.parse().unwrap())).collect();
        self.dialer.resolver.set_underlay(&Underlay { hosts, ..Underlay::default() });
    }

    fn key(&self) -> String {
        self.devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() }).secret
    }

    fn start(&self, node: &Node) -> Control {
        let disco = DiscoPrivate::generate().unwrap().public();
        let (endpoints, net_info) = (Vec::new(), NetInfo::default());
        let host = HostUpdate { endpoints, net_info, disco, exit_node_id: String::new() };
        let identity = node.identity(&self.url);
        Control::start(self.dialer.clone(), identity, host, self.plan.clone(), self.timing)
    }
}

/// The first event that `wanted` makes something of.
async fn until<T>(control: &mut Control, mut wanted: impl FnMut(&Event) -> Option<T>) -> T {
    let mut seen = Vec::new();
    let waiting = async {
        loop {
            let event = control.event().await.unwrap();
            if let Some(found) = wanted(&event) {
                return found;
            }
            seen.push(match &event {
                Event::Map(_) => "a map message".to_owned(),
                Event::Peers(list, nodes) => format!("{} peers of {list:?}", nodes.len()),
                event => format!("{event:?}"),
            });
        }
    };
    match tokio::time::timeout(PATIENCE, waiting).await {
        Ok(found) => found,
        Err(_) => panic!("waited in vain; seen: {seen:?}"),
    }
}

fn started(event: &Event) -> Option<()> {
    matches!(event, Event::SessionStarted).then_some(())
}

fn login(event: &Event) -> Option<String> {
    if let Event::NeedsLogin { url } = event { Some(url.clone()) } else { None }
}

fn registered(event: &Event) -> Option<bool> {
    if let Event::Registered { approved } = event { Some(*approved) } else { None }
}

fn trying(event: &Event) -> Option<String> {
    if let Event::Trying { reason } = event { Some(reason.clone()) } else { None }
}

fn ended(event: &Event) -> Option<Ending> {
    if let Event::Ended(ending) = event { Some(ending.clone()) } else { None }
}

#[test]
fn a_busy_server_is_left_alone_as_long_as_it_asks() {
    let wait = |status, header| match Failure::status(String::new(), status, header) {
        Failure::Refused { retry_after, .. } => retry_after.map(|d| d.as_secs()),
        Failure::Unreachable(_) | Failure::Fatal(_) => panic!("not a refusal"),
    };
    assert_eq!(wait(429, Some("3")), Some(3));
    assert_eq!(wait(503, Some(" 30 ")), Some(30));
    for header in [None, Some("soon"), Some("3601"), Some("Wed, 21 Oct 2099 07:28:00 GMT")] {
        assert_eq!(wait(429, header), Some(7), "{header:?}");
    }
    assert_eq!(wait(503, Some("Wed, 21 Oct 2015 07:28:00 GMT")), Some(0), "the time has come");
    assert_eq!(wait(500, None), None);
}
