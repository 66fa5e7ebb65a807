//! One process of a node replaces another. The core decides what each may do; here is who reads.
//!
//! The order at a takeover: the standby asks, the other one stops reading (what it has read is dealt with by
//! then) and says so, the standby reads. Without that word, or the supervisor's that the other one is dead,
//! nobody begins: two readers of one socket would share its datagrams.

use std::time::{Duration, Instant};

use podtether_core::batch::{Batch, Origin, RegionId};
use podtether_core::engine::DerpEvent;
use podtether_proto::engine::{Role, TakenOver, Underlay};
use podtether_proto::exit::EngineExit;
use tokio::net::UnixListener;
use tokio::sync::oneshot;

use super::Driver;
use super::partner::{Message, Partner};
use crate::control::{Control, Identity, Timing};
use crate::derp;
use crate::fds::Names as NameFds;
use crate::names::Names;
use crate::reason::Ending;

/// What was sent to the sessions before is opened for so long. A peer uses the new ones a round trip after the
/// takeover.
const LINGERS: Duration = Duration::from_secs(3);
/// For no longer than this after the last of it.
const LINGERS_IDLE: Duration = Duration::from_secs(1);
/// What a relay has sent on the connection before is read for so long after the new one is up. No longer: relays
/// complain about two connections of one node.
const RELAY_LINGERS: Duration = Duration::from_millis(300);
/// A standby that nobody wants any more ends.
const WANTED_WITHIN: Duration = Duration::from_secs(30);

/// What a process needs when it becomes the node.
pub(super) struct Pending {
    pub(super) identity: Identity,
    pub(super) names: NameFds,
    pub(super) name_servers: Vec<std::net::IpAddr>,
    pub(super) underlay: Underlay,
}

/// What happened between the two.
#[derive(Debug)]
pub(super) enum Next {
    Connected(Option<Partner>),
    Said(Message),
}

/// Where this process is in a handover, if it is in one.
#[derive(Default)]
pub(super) struct Handover {
    pub(super) role: Role,
    pub(super) partner: Option<Partner>,
    /// Where a successor's connection comes in.
    pub(super) heir: Option<UnixListener>,
    pub(super) supervisor_uid: u32,
    /// Of a standby.
    pub(super) pending: Option<Box<Pending>>,
    /// When this process ends if it is not the node.
    pub(super) until: Option<Instant>,
    /// Regions that the other process is connected to, and when to close them.
    pub(super) superseded: Vec<(RegionId, Instant)>,
    /// When it let go.
    pub(super) gone_since: Option<Instant>,
    /// Who waits for the snapshot.
    pub(super) prepared: Option<oneshot::Sender<Result<u8, String>>>,
    /// Who waits for the handshakes, and until when.
    pub(super) ready: Option<(oneshot::Sender<u64>, Instant)>,
    /// Who waits for the takeover, and since when.
    pub(super) taking: Option<(oneshot::Sender<Result<TakenOver, String>>, Instant)>,
}

impl Handover {
    pub(super) fn stand_by(&mut self, partner: Partner, pending: Pending) {
        self.role = Role::Standby;
        self.partner = Some(partner);
        self.pending = Some(Box::new(pending));
        self.until = Some(Instant::now() + WANTED_WITHIN);
    }

    pub(super) fn reads(&self) -> bool {
        self.role == Role::InCharge
    }

    /// When there is something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let superseded = self.superseded.iter().map(|(_, at)| *at).min();
        [self.until, self.ready.as_ref().map(|(_, at)| *at), superseded].into_iter().flatten().min()
    }

    /// What comes from the other process; without one, its connection.
    pub(super) async fn next(&mut self, passed: &mut Batch<Origin>) -> Next {
        match &mut self.partner {
            Some(partner) => Next::Said(partner.message(passed).await),
            None => Next::Connected(self.connection().await),
        }
    }

    async fn connection(&self) -> Option<Partner> {
        let Some(heir) = self.heir.as_ref().filter(|_| self.reads()) else {
            return std::future::pending().await;
        };
        let stream = match heir.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept on the socket for successors failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
                return None;
            }
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 || peer.uid() == self.supervisor_uid => {}
            other => {
                tracing::warn!(?other, "refused a successor that is not the supervisor's");
                return None;
            }
        }
        let partner = stream.into_std().and_then(|stream| Partner::new(stream.into()));
        partner.inspect_err(|error| tracing::warn!(%error, "a successor's connection is unusable")).ok()
    }
}

impl Driver {
    pub(super) fn set_role(&mut self, role: Role) {
        self.handover.role = role;
        self.board.set_role(role);
    }

    /// A snapshot for a successor; the answer comes when it is whole.
    pub(super) fn prepare_handover(&mut self, answer: oneshot::Sender<Result<u8, String>>) {
        let refusal = if !self.handover.reads() {
            Some("this engine is not the pod's node")
        } else if self.handover.heir.is_none() || self.snapshot.is_none() {
            Some("this engine was born without what a handover takes")
        } else if self.engine.shield().is_some() {
            // It would drop what belongs to the successor.
            Some("a flood of datagrams is being kept out")
        } else {
            None
        };
        if let Some(why) = refusal {
            let _ = answer.send(Err(why.to_owned()));
            return;
        }
        self.snapshot_due = None;
        self.begin_snapshot();
        self.handover.prepared = Some(answer);
    }

    pub(super) fn tell_ready(&mut self, within: Duration, answer: oneshot::Sender<u64>) {
        self.handover.ready = Some((answer, Instant::now() + within));
    }

    /// Answers who waits, and ends who is not wanted any more.
    pub(super) fn look_after_handover(&mut self, now: Instant) {
        if self.snapshot_writer.is_none()
            && let Some(answer) = self.handover.prepared.take()
        {
            let written = self.snapshot_kept.then(|| self.engine.index_mark());
            let _ = answer.send(written.ok_or_else(|| "the snapshot could not be written".to_owned()));
        }
        if let Some((answer, until)) = self.handover.ready.take() {
            let unready = self.engine.unready(now);
            if unready == 0 || until <= now {
                let _ = answer.send(u64::try_from(unready).unwrap_or(u64::MAX));
            } else {
                self.handover.ready = Some((answer, until));
            }
        }
        while let Some(at) = self.handover.superseded.iter().position(|(_, at)| *at <= now) {
            let (region, _) = self.handover.superseded.swap_remove(at);
            self.derp.close(region);
            self.engine.handle_derp(region, DerpEvent::Disconnected, now, &mut self.outbox);
        }
        if self.handover.until.is_some_and(|at| at <= now) {
            self.ending = Some(match self.handover.role {
                Role::LetGo => Ending::new(EngineExit::Stopped, "handed over"),
                Role::Standby | Role::InCharge => {
                    Ending::new(EngineExit::Orphaned, "nobody wanted this standby to take over")
                }
            });
        }
    }

    /// Somebody stands by.
    pub(super) fn heir_connected(&mut self, partner: Partner) {
        tracing::info!(pod = self.board.pod_uid(), "another process stands by");
        self.handover.partner = Some(partner);
        self.engine.begin_passing();
    }

    pub(super) async fn take_over(
        &mut self,
        alone: bool,
        answer: oneshot::Sender<Result<TakenOver, String>>,
    ) {
        let now = Instant::now();
        if self.handover.role != Role::Standby {
            let _ = answer.send(Err("this engine does not stand by".to_owned()));
        } else if alone {
            self.be_the_node(&[], now);
            let _ = answer.send(Ok(TakenOver { gap_us: 0 }));
        } else {
            match &self.handover.partner {
                Some(partner) if partner.let_go().await => self.handover.taking = Some((answer, now)),
                _ => drop(answer.send(Err("the engine before cannot be asked to let go".to_owned()))),
            }
        }
    }

    pub(super) async fn partner_said(&mut self, message: Message) {
        let now = Instant::now();
        match message {
            Message::Passed => {
                self.engine.handle_passed(&mut self.passed, now, &mut self.outbox);
                self.lend_relays(now);
                self.passed.clear();
                if let Some(since) = self.handover.gone_since {
                    self.handover.until = Some((now + LINGERS_IDLE).min(since + LINGERS));
                }
            }
            Message::LetGo if self.handover.role == Role::InCharge => self.let_go(now).await,
            Message::Gone(flows) if self.handover.role == Role::Standby => {
                let asked = self.handover.taking.take();
                self.be_the_node(&flows, now);
                if let Some((answer, since)) = asked {
                    let gap_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
                    let _ = answer.send(Ok(TakenOver { gap_us }));
                }
            }
            Message::RelayUp(region) if self.handover.role == Role::LetGo => {
                // Regions that this process has no connection to are few and cost nothing.
                self.handover.superseded.push((region, now + RELAY_LINGERS));
            }
            Message::LetGo | Message::Gone(_) | Message::RelayUp(_) | Message::Ended => {
                self.handover.partner = None;
                self.engine.end_passing();
                match self.handover.role {
                    Role::LetGo => {
                        // Whatever became of the other one, this process is not the node any more.
                        self.ending = Some(Ending::new(EngineExit::Stopped, "handed over"));
                    }
                    Role::Standby => {
                        if let Some((answer, _)) = self.handover.taking.take() {
                            let _ = answer.send(Err("the engine before ended".to_owned()));
                        }
                    }
                    Role::InCharge => {}
                }
            }
        }
    }

    /// The other process is the node from now on.
    async fn let_go(&mut self, now: Instant) {
        let flows = self.engine.let_go(&mut self.outbox);
        let told = match &self.handover.partner {
            Some(partner) => partner.gone(&flows).await,
            None => false,
        };
        self.set_role(Role::LetGo);
        self.control = None;
        if let Some(names) = &mut self.names {
            names.let_go();
        }
        // The other one writes it.
        self.snapshot = None;
        self.snapshot_writer = None;
        self.handover.gone_since = Some(now);
        self.handover.until = Some(now + LINGERS_IDLE);
        if told {
            tracing::info!(pod = self.board.pod_uid(), "another process took over");
        } else {
            self.ending = Some(Ending::new(EngineExit::Stopped, "the successor does not listen"));
        }
    }

    /// This process is the node from now on.
    fn be_the_node(&mut self, flows: &[u8], now: Instant) {
        self.set_role(Role::InCharge);
        self.handover.until = None;
        self.engine.take_over(flows, now, &mut self.outbox);
        if let Err(reason) = self.begin() {
            self.ending = Some(Ending::new(EngineExit::BadConfig, reason));
        }
        tracing::info!(pod = self.board.pod_uid(), "took over");
    }

    /// Begins what only the node does.
    pub(super) fn begin(&mut self) -> Result<(), String> {
        let Some(pending) = self.handover.pending.take() else { return Ok(()) };
        let Pending { identity, names, name_servers, underlay } = *pending;
        self.tun.begin();
        for udp in [&mut self.udp4, &mut self.udp6].into_iter().flatten() {
            udp.begin().map_err(|e| format!("a UDP descriptor is unusable: {e}"))?;
        }
        let names = Names::start(names, &name_servers)
            .map_err(|e| format!("a descriptor for names is unusable: {e}"))?;
        self.engine.set_dns_capacity(names.capacity());
        self.names = Some(names);
        if let Some(snapshot) = &mut self.snapshot {
            snapshot.catch_up();
        }
        self.control = Some(Control::start(
            self.dialer.clone(),
            identity,
            self.engine.host_update(),
            self.engine.dial_plan().clone(),
            Timing::default(),
        ));
        self.set_underlay(&underlay, Instant::now());
        Ok(())
    }

    /// Sends what the other process has for relays that it is not connected to yet.
    fn lend_relays(&mut self, now: Instant) {
        for (origin, packet) in self.passed.iter() {
            let Origin::ToRelay(to) = origin else { continue };
            let to = self.engine.lent_relay(*to, now);
            if let Err(why) = self.derp.send(to.region, to.peer, packet) {
                self.drops.count(why);
            }
        }
    }

    /// What a handover changes in what is sent: a standby sends handshakes alone, and who has let go nothing.
    pub(super) async fn pass_on(&mut self) {
        if self.handover.role == Role::LetGo {
            self.outbox.udp.clear();
            self.outbox.derp.clear();
        }
        if self.outbox.passed.is_empty() {
            return;
        }
        let lost = match &mut self.handover.partner {
            Some(partner) => partner.pass(&self.outbox.passed).await,
            None => u64::try_from(self.outbox.passed.len()).unwrap_or(u64::MAX),
        };
        self.drops.add(super::Drop::NotPassed, lost);
    }

    /// Whether the other process's connection to this region has become one too many.
    pub(super) fn connected_while_the_other_is_there(&self, message: &derp::Message) -> bool {
        matches!(message.event, derp::Event::Connected)
            && self.handover.reads()
            && self.handover.partner.is_some()
    }

    pub(super) async fn tell_relay_up(&self, region: RegionId) {
        if let Some(partner) = &self.handover.partner {
            // Not told, it closes it when it ends.
            let _ = partner.relay_up(region).await;
        }
    }
}
