//! One attachment as the table knows it.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use podtether_net::link::{Configured, DnsSockets, Link as NetLink, PodConfig};
use podtether_proto::calls::KnownEngine;
use podtether_proto::engine::{EngineStatus, HealthMessage, NodeState, Routing};
use podtether_proto::fds;
use podtether_proto::node::{AddRequest, Attached, CniError};
use tokio::sync::oneshot;

use super::handover::Handover;
use super::identities::Identity;
use super::naming::Naming;
use super::renew::Renewal;
use super::routing::Router;
use super::timeline::Clock;
use crate::cgroup::Hold;
use crate::choose::Choice;
use crate::context::MTU;
use crate::credentials::Key;
use crate::dns::{self, Interception};
use crate::engine::Place;
use crate::guard::{Processor, Queue, Repairs};
use crate::log;
use crate::plan::{self, Observed, Records, Step, Wanted};
use crate::record::{self, IdentityKey};
use crate::restart::History;
use crate::spawn::Process;

/// Everything an engine is handed and the supervisor keeps. Never read here: a packet taken by the
/// supervisor would be lost to the pod.
#[derive(Debug)]
pub(super) struct Fds {
    pub(super) link: NetLink,
    pub(super) tun: OwnedFd,
    pub(super) dns: Vec<DnsSockets>,
    pub(super) underlay: Underlay,
}

/// The UDP sockets of the underlay: they stay when the link has to be made anew.
#[derive(Debug, Clone, Default)]
pub(super) struct Underlay {
    pub(super) udp4: Option<Arc<UdpSocket>>,
    pub(super) udp6: Option<Arc<UdpSocket>>,
}

/// Duplicates of an adopted engine's descriptors.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) tun: OwnedFd,
    pub(super) dns: Vec<DnsSockets>,
}

impl Taken {
    /// For a step that may fail and be run again.
    pub(super) fn duplicate(&self) -> std::io::Result<Self> {
        let dns: std::io::Result<_> = self
            .dns
            .iter()
            .map(|s| Ok(DnsSockets { udp: s.udp.try_clone()?, tcp: s.tcp.try_clone()? }))
            .collect();
        Ok(Self { tun: self.tun.try_clone()?, dns: dns? })
    }
}

impl Fds {
    pub(super) fn named(&self) -> Vec<(&'static str, BorrowedFd<'_>)> {
        let mut named = vec![(fds::TUN, self.tun.as_fd())];
        named.extend(self.dns.iter().map(|s| (fds::DNS, s.udp.as_fd())));
        named.extend(self.dns.iter().map(|s| (fds::DNS_TCP, s.tcp.as_fd())));
        named.extend(self.underlay.udp4.as_ref().map(|s| (fds::UDP4, s.as_fd())));
        named.extend(self.underlay.udp6.as_ref().map(|s| (fds::UDP6, s.as_fd())));
        named
    }
}

/// A living engine.
#[derive(Debug)]
pub(super) struct Running {
    /// Tells its events from those of engines before it.
    pub(super) epoch: u64,
    pub(super) process: Arc<Process>,
    /// Which of the two sets of files it has.
    pub(super) place: Place,
    /// The routing it uses; `None` while nobody knows what an earlier supervisor told it.
    pub(super) told: Option<Routing>,
    /// Version of the extra roots it knows.
    pub(super) roots: u64,
    /// From its first answer on.
    pub(super) client: Option<KnownEngine>,
    pub(super) status: Option<EngineStatus>,
    /// The supervisor told it to end.
    pub(super) asked: bool,
    /// When it replaced one that died.
    pub(super) replaces_since: Option<Instant>,
    /// Waits for its first answer: only then does anybody answer the pod.
    pub(super) interception: Option<Interception>,
    /// What limits it.
    pub(super) holds: Vec<Hold>,
    /// What the kernel had killed in its memory cgroup before it.
    pub(super) memory_kills: u64,
    /// Why the pod's DNS is not intercepted although it should be.
    pub(super) dns_problem: Option<String>,
    pub(super) processor: Processor,
    pub(super) queue: Queue,
    /// Why it was killed, with figures.
    pub(super) killed_for: Option<String>,
}

impl Running {
    pub(super) fn state(&self) -> Option<&NodeState> {
        self.status.as_ref().map(|status| &status.state)
    }

    /// Where a person is to log the device in.
    pub(super) fn login_url(&self) -> Option<&str> {
        match self.state()? {
            NodeState::NeedsLogin { url } => Some(url),
            NodeState::Waiting
            | NodeState::Connecting { .. }
            | NodeState::NeedsApproval
            | NodeState::Running
            | NodeState::LoggedOut => None,
        }
    }

    /// The node's addresses, once a netmap is in force.
    pub(super) fn addresses(&self) -> Option<&[IpNet]> {
        let status = self.status.as_ref()?;
        let node = status.node.as_ref()?;
        (status.state == NodeState::Running && !node.addresses.is_empty()).then_some(&node.addresses)
    }
}

/// How an engine ended.
#[derive(Debug, Clone)]
pub(super) struct LastExit {
    /// As the metric has it, see [`crate::restart::kind`].
    pub(super) kind: &'static str,
    /// One sentence.
    pub(super) reason: String,
    pub(super) at: Instant,
}

/// An ADD that has not been answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Join {
    /// When it has failed.
    pub(super) deadline: Instant,
    /// When it is answered at the latest, cleaned up or not.
    pub(super) reply_by: Instant,
    pub(super) started: Instant,
}

pub(super) type Adder = oneshot::Sender<Result<Attached, CniError>>;
/// An ADD that came while its container was being removed, and when.
pub(super) type Waiting = (AddRequest, Choice, Adder, Instant);
pub(super) type Leaver = oneshot::Sender<Result<(), CniError>>;

#[derive(Debug)]
pub(super) struct Pod {
    pub(super) record: record::Attachment,
    /// In which all that is done for it is logged.
    pub(super) span: tracing::Span,
    pub(super) clock: Clock,
    /// Grows with every change of the record; what the disk has is `saved`.
    pub(super) version: u64,
    pub(super) saved: u64,
    pub(super) identity: IdentityKey,
    /// The device was in the tailnet before this attachment: an ADD that fails leaves it there.
    pub(super) had_device: bool,
    /// Whether its device got the name that it asked for.
    pub(super) naming: Naming,
    /// Its device waits for a person: an ADD that fails for that keeps the identity, so that a later one
    /// finds what the person did.
    pub(super) awaits_person: bool,

    pub(super) wanted: Wanted,
    /// INVARIANT: at most one step of a pod runs at a time.
    pub(super) busy: Option<Step>,
    pub(super) failures: u32,
    pub(super) retry_at: Option<Instant>,

    pub(super) link: plan::Link,
    pub(super) repairs: Repairs,
    pub(super) fds: Option<Arc<Fds>>,
    pub(super) underlay: Underlay,
    pub(super) configured: Option<Configured>,
    /// What `configured` was made for.
    pub(super) configured_for: Option<PodConfig>,
    /// What the interface should carry; `None` until an engine has said so in this supervisor's life.
    pub(super) target: Option<PodConfig>,
    /// Routes of other nodes that the engine accepts.
    pub(super) accepted: Vec<IpNet>,
    /// The routing that the engine should use.
    pub(super) engine_routing: Routing,

    pub(super) engine: Option<Running>,
    /// A successor is being brought up; it lives until its task has said otherwise.
    pub(super) handover: Option<Handover>,
    /// The engine before, which has let go and ends soon.
    pub(super) predecessor: Option<Arc<Process>>,
    /// An earlier supervisor may have left an engine, and nobody has looked yet.
    pub(super) unseen: bool,
    /// What an adopted engine holds, until the link around it has been looked at.
    pub(super) taken: Option<Taken>,
    pub(super) history: History,
    pub(super) hold_until: Option<Instant>,
    /// No engine may start any more, and why.
    pub(super) stopped: Option<String>,
    pub(super) died_at: Option<Instant>,

    /// Control does not take the node without a new key.
    pub(super) need_key: bool,
    pub(super) rotate: bool,
    /// An auth key did not renew an expired node key.
    pub(super) device_spent: bool,
    pub(super) key: Option<(Key, Instant)>,
    /// An engine has been given a key: control may know the device.
    pub(super) key_given: bool,
    pub(super) rejections: u32,
    pub(super) logout_tried: bool,
    pub(super) delete_failed: bool,

    pub(super) join: Option<Join>,
    pub(super) adders: Vec<Adder>,
    pub(super) leavers: Vec<Leaver>,
    /// Who waits for a change of routing.
    pub(super) routers: Vec<Router>,
    /// Who waits for a new engine.
    pub(super) renewals: Vec<Renewal>,
    /// ADDs of the same container that came while it was being removed, and when.
    pub(super) next: Vec<Waiting>,
    /// Why the ADD fails, while it is rolled back.
    pub(super) failure: Option<CniError>,
    /// What the rollback did that the caller should know.
    pub(super) notes: Vec<String>,

    pub(super) restarts: u64,
    /// The same by how the engine before had ended.
    pub(super) restarts_by: BTreeMap<&'static str, u64>,
    /// From the death of the engine before to the first answer of this one.
    pub(super) last_recovery: Option<Duration>,
    /// How its last engine ended.
    pub(super) last_exit: Option<LastExit>,
    pub(super) handovers: u64,
    /// The last thing worth telling, in one sentence.
    pub(super) reason: String,
}

impl Pod {
    pub(super) fn new(record: record::Attachment, identity: IdentityKey, saved: bool) -> Pod {
        let span = log::scope::of(&record.pod, &record.attachment.container_id, &record.join);
        Pod {
            naming: if record.addresses.is_empty() { Naming::Unknown } else { Naming::Loaded },
            record,
            span,
            clock: Clock::default(),
            version: 1,
            saved: u64::from(saved),
            identity,
            had_device: false,
            awaits_person: false,
            wanted: Wanted::Attached,
            busy: None,
            failures: 0,
            retry_at: None,
            link: plan::Link::Absent,
            repairs: Repairs::default(),
            fds: None,
            underlay: Underlay::default(),
            configured: None,
            configured_for: None,
            target: None,
            accepted: Vec::new(),
            engine_routing: Routing::default(),
            engine: None,
            handover: None,
            predecessor: None,
            unseen: false,
            taken: None,
            history: History::default(),
            hold_until: None,
            stopped: None,
            died_at: None,
            need_key: false,
            rotate: false,
            device_spent: false,
            key: None,
            key_given: false,
            rejections: 0,
            logout_tried: false,
            delete_failed: false,
            join: None,
            adders: Vec::new(),
            leavers: Vec::new(),
            routers: Vec::new(),
            renewals: Vec::new(),
            next: Vec::new(),
            failure: None,
            notes: Vec::new(),
            restarts: 0,
            restarts_by: BTreeMap::new(),
            last_recovery: None,
            last_exit: None,
            handovers: 0,
            reason: String::new(),
        }
    }

    /// `person` is true in a tailnet without credentials.
    pub(super) fn observe(&self, identity: &Identity, person: bool, now: Instant) -> Observed {
        let records = if self.saved == 0 || identity.saved == 0 {
            Records::Missing
        } else if self.saved < self.version || identity.saved < identity.version {
            Records::Stale
        } else {
            Records::Saved
        };
        let held = self.stopped.is_some() || self.hold_until.is_some_and(|at| at > now);
        let addresses = self.engine.as_ref().and_then(Running::addresses);
        let engine = match (&self.engine, addresses) {
            (None, _) if self.unseen => plan::Engine::Unknown,
            // A successor is on its way.
            (None, _) if self.handover.is_some() => plan::Engine::Starting,
            (None, _) if held => plan::Engine::Held,
            (None, _) => plan::Engine::None,
            (Some(_), None) => plan::Engine::Starting,
            (Some(_), Some(_)) => plan::Engine::Running,
        };
        let key = match &self.key {
            Some((key, at)) if at.elapsed() < key.ttl => plan::Key::InHand,
            _ if person || (identity.record.registered && !self.need_key) => plan::Key::NotNeeded,
            _ => plan::Key::Needed,
        };
        Observed {
            records,
            identity_free: identity.unseen == 0
                && identity.holder.as_ref().is_none_or(|h| *h == self.record.attachment),
            link: self.link,
            engine,
            others: self.handover.is_some() || self.predecessor.is_some(),
            key,
            rotate: self.rotate,
            device_spent: self.device_spent,
            configured: self.configured.is_some()
                && self.target.as_ref().is_none_or(|target| Some(target) == self.configured_for.as_ref()),
            configurable: self.target.is_some() && self.fds.is_some(),
            routing_told: self.engine.as_ref().is_none_or(|engine| {
                engine.client.is_none() || engine.told.as_ref() == Some(&self.engine_routing)
            }),
            device: identity.record.registered || self.key_given,
            logout_tried: self.logout_tried,
            delete_failed: self.delete_failed,
        }
    }

    /// Whether the runtime is told now, although the pod has not joined: who must not wait for that has an
    /// interface, and a record that says so to whichever supervisor comes next.
    pub(super) fn may_start_early(&self, observed: &Observed) -> bool {
        self.record.unhurried
            && self.wanted == Wanted::Attached
            && self.join.is_some()
            && self.link == plan::Link::Up
            && !self.record.mac.is_empty()
            && observed.records != Records::Missing
    }

    /// What ADD answers.
    pub(super) fn attached(&self) -> Option<Attached> {
        let mut addresses = match &self.configured {
            Some(made) => made.addresses.clone(),
            None if self.record.unhurried => Vec::new(),
            None => return None,
        };
        addresses.sort_by_key(|a| matches!(a, IpNet::V6(_)));
        Some(Attached {
            ifname: self.record.attachment.ifname.clone(),
            mac: self.record.mac.clone(),
            mtu: MTU.into(),
            addresses,
            routes: super::routing::routes(self),
        })
    }

    /// What control, the engine and this supervisor find wrong.
    pub(super) fn health(&self) -> Vec<HealthMessage> {
        let Some(engine) = &self.engine else { return Vec::new() };
        let mut health = engine.status.as_ref().map(|s| s.health.clone()).unwrap_or_default();
        health.extend(engine.dns_problem.as_deref().map(dns::not_intercepted));
        health
    }

    /// One word for people and metrics.
    pub(super) fn state(&self, now: Instant) -> &'static str {
        match self.wanted {
            Wanted::Gone { .. } => "leaving",
            Wanted::Attached => match &self.engine {
                _ if self.stopped.is_some() => "stopped",
                None if self.hold_until.is_some_and(|at| at > now) => "backoff",
                Some(engine)
                    if engine.addresses().is_some()
                        && self.configured.is_some()
                        && !self.naming.is_open(now) =>
                {
                    "running"
                }
                Some(engine) if engine.login_url().is_some() => "needs-login",
                Some(engine) if engine.state() == Some(&NodeState::NeedsApproval) => "needs-approval",
                _ if self.configured.is_some() => "restarting",
                None | Some(_) => "joining",
            },
        }
    }

    /// Another engine comes after one that ended like this.
    pub(super) fn restarts_after(&mut self, kind: &'static str) {
        self.restarts += 1;
        *self.restarts_by.entry(kind).or_default() += 1;
    }

    pub(super) fn changed(&mut self) {
        self.version += 1;
    }
}
