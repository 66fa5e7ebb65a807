//! From a start request to a running driver; what is wrong with the request is one sentence.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use podtether_core::batch::{Batch, Outbox};
use podtether_core::engine::{Config, Engine};
use podtether_core::key::{DiscoPrivate, MachinePrivate, NodePrivate, NodePublic};
use podtether_core::routes::Routing;
use podtether_core::snapshot::Snapshot;
use podtether_core::tailcfg::UnixTime;
use podtether_proto::engine::StartRequest;
use tokio::task::JoinSet;

use super::drops::Drops;
use super::fence::Fence;
use super::handover::{Handover, Pending};
use super::partner::Partner;
use super::report::Membership;
use super::rest::Rest;
use super::tun::Tun;
use super::udp::Udp;
use super::{Driver, Link};
use crate::control::Identity;
use crate::derp::Regions;
use crate::dial::{ControlUrl, Dialer};
use crate::intake::Intake;
use crate::proxy::Proxy;
use crate::resolve::Resolver;
use crate::snapshot_file::SnapshotFile;
use crate::status::Board;
use crate::tls::Tls;

/// What IPv6 needs.
const MIN_MTU: u16 = 1280;

impl Driver {
    /// Everything the node needs, made; a refused request gives the descriptors back.
    pub(super) fn start(
        link: Link,
        request: &StartRequest,
        board: Board,
    ) -> Result<Self, (Box<Link>, String)> {
        match Checked::new(&link, request) {
            // A descriptor that turns out to be unusable stays unusable: keeping the rest is no loss.
            Ok(checked) => {
                checked.start(link, request, board).map_err(|reason| (Box::new(Link::default()), reason))
            }
            Err(reason) => Err((Box::new(link), reason)),
        }
    }
}

/// A request found good, before any descriptor is touched.
struct Checked {
    dialer: Dialer,
    identity: Identity,
    node_key: NodePrivate,
    disco_key: DiscoPrivate,
    random_seed: [u8; 32],
}

impl Checked {
    fn new(link: &Link, request: &StartRequest) -> Result<Self, String> {
        if link.tun.is_none() {
            return Err("this engine has no TUN descriptor".to_owned());
        }
        if link.udp4.is_none() && link.udp6.is_none() {
            return Err("this engine has no UDP socket".to_owned());
        }
        let stand_ins = request.name_servers.len();
        if link.names.stand_in.len() != stand_ins || link.names.stand_in_tcp.len() != stand_ins {
            return Err(format!("this engine's descriptors do not stand in for {stand_ins} name servers"));
        }
        if request.mtu < MIN_MTU {
            return Err(format!("an MTU of {} is below IPv6's minimum of {MIN_MTU}", request.mtu));
        }
        check_label(&request.hostname)?;
        let url: ControlUrl = request.control_url.parse().map_err(|e| format!("{e}"))?;
        let tls = Tls::new(&request.extra_roots_pem).map_err(|e| e.to_string())?;
        let resolver = Resolver::default();
        resolver.set_underlay(&request.underlay);
        let zero = |key: &podtether_proto::secret::SecretKey| key.expose().iter().all(|byte| *byte == 0);
        if zero(&request.machine_key) || zero(&request.node_key) {
            return Err("the machine key or the node key is missing".to_owned());
        }
        let node_key = NodePrivate::from_bytes(*request.node_key.expose());
        let mut random_seed = [0; 32];
        getrandom::fill(&mut random_seed).map_err(|e| format!("no random numbers: {e}"))?;
        let identity = Identity {
            url,
            machine_key: MachinePrivate::from_bytes(*request.machine_key.expose()),
            node_key: node_key.public(),
            old_node_key: request.old_node_key.map(NodePublic::from_bytes).unwrap_or_default(),
            auth_key: request.auth_key.clone(),
            interactive: request.interactive,
            login_url: request.login_url.clone(),
            hostname: std::sync::Mutex::new(request.hostname.clone()),
            ephemeral: request.ephemeral,
            request_tags: request.request_tags.clone(),
        };
        let disco_key = DiscoPrivate::generate().map_err(|e| format!("no random numbers: {e}"))?;
        let proxy = request.proxy.as_ref().map(Proxy::new).transpose()?.map(Arc::new);
        Ok(Self { dialer: Dialer { resolver, tls, proxy }, identity, node_key, disco_key, random_seed })
    }

    fn start(self, link: Link, request: &StartRequest, board: Board) -> Result<Driver, String> {
        let tun = link.tun.ok_or("this engine has no TUN descriptor")?;
        let tun = Tun::new(tun).map_err(|e| format!("the TUN descriptor is unusable: {e}"))?;
        let udp = |fd: Option<_>| {
            fd.map(Udp::new).transpose().map_err(|e| format!("a UDP descriptor is unusable: {e}"))
        };
        let (udp4, udp6) = (udp(link.udp4)?, udp(link.udp6)?);
        let mut handover = Handover { supervisor_uid: link.supervisor_uid, ..Handover::default() };
        if let Some(heir) = link.heir {
            let heir = UnixListener::from(heir);
            let heir = heir.set_nonblocking(true).and_then(|()| tokio::net::UnixListener::from_std(heir));
            handover.heir =
                Some(heir.map_err(|e| format!("the descriptor for successors is unusable: {e}"))?);
        }
        let opened = link.snapshot.map(|fd| SnapshotFile::open(fd, *self.node_key.public().as_bytes()));
        let (snapshot_file, left) = opened.unzip();
        let snapshot = left.flatten().and_then(|bytes| match Snapshot::from_bytes(&bytes) {
            Ok(snapshot) => Some(snapshot),
            Err(error) => {
                tracing::warn!(%error, "the snapshot of the engine before is unusable");
                None
            }
        });
        tracing::info!(
            pod = request.pod.name,
            namespace = request.pod.namespace,
            control = %self.identity.url,
            warm = snapshot.is_some(),
            "engine starts"
        );
        let own = [Some(self.identity.url.port), self.dialer.proxy.as_deref().map(Proxy::port)];
        let fence = Fence::new(&board, own.into_iter().flatten());
        let config = Config {
            node_key: self.node_key.clone(),
            disco_key: self.disco_key,
            mtu: request.mtu,
            random_seed: self.random_seed,
            standby: request.standby,
            wall: wall_clock(),
            snapshot,
        };
        let mut engine = Engine::new(config, Instant::now());
        engine.set_routing(routing(&request.routing));
        let pending = Pending {
            identity: self.identity,
            names: link.names,
            name_servers: request.name_servers.clone(),
            underlay: request.underlay.clone(),
        };
        match (request.standby, link.partner) {
            (None, _) => handover.pending = Some(Box::new(pending)),
            (Some(_), Some(partner)) => {
                let partner = Partner::new(partner);
                let partner = partner.map_err(|e| format!("the partner's descriptor is unusable: {e}"))?;
                handover.stand_by(partner, pending);
                engine.begin_passing();
            }
            (Some(_), None) => return Err("this engine cannot reach the one it is to replace".to_owned()),
        }
        let derp = Regions::new(self.node_key);
        let mut driver = Driver {
            engine,
            outbox: Outbox::default(),
            tun,
            udp4,
            udp6,
            names: None,
            last: Default::default(),
            alarm: Default::default(),
            from_tun: Batch::new(),
            passed: Batch::new(),
            drops: Drops::default(),
            intake: Intake::default(),
            rest: Rest::default(),
            dialer: self.dialer,
            control: None,
            derp,
            lookups: JoinSet::new(),
            latencies: JoinSet::new(),
            snapshot: snapshot_file,
            snapshot_due: None,
            snapshot_written: None,
            snapshot_writer: None,
            snapshot_piece: Vec::new(),
            membership: Membership::Connecting,
            pings: std::collections::HashMap::new(),
            started: Instant::now(),
            greeted: false,
            refused: crate::refused::Lines::default(),
            trouble: String::new(),
            logging_out: None,
            logout_answer: None,
            board,
            ending: None,
            fence,
            handover,
            snapshot_kept: false,
        };
        if !driver.engine.tcp_ports().is_empty() {
            driver.shut_fence();
        }
        if request.standby.is_none() {
            driver.begin()?;
        }
        driver.report();
        Ok(driver)
    }
}

pub(super) fn routing(wanted: &podtether_proto::engine::Routing) -> Routing {
    Routing {
        accept_routes: wanted.accept_routes,
        exit_node: wanted.exit_node.clone(),
        exclude: wanted.exclude.clone(),
    }
}

fn wall_clock() -> UnixTime {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    UnixTime::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// What a host name has to be.
pub(super) fn check_label(name: &str) -> Result<(), String> {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    let fits = (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-');
    if fits {
        return Ok(());
    }
    Err(format!("the host name {name:?} is not a DNS label (a-z, 0-9, -, at most 63 long)"))
}
