//! The loop that owns the node: bytes from descriptors go into the core in batches, what the core
//! wants sent goes out, and nothing here decides anything about the protocol.
//!
//! One wake-up handles one source, then flushes what came of it; [`turns`] has the order. Queues from other
//! tasks are bounded; where one is full its writer waits (control, DERP in) or the packet is dropped and
//! counted (DERP out, sockets).

mod drops;
mod fence;
mod handover;
mod mmsg;
mod partner;
mod report;
mod rest;
mod shield;
mod start;
mod tun;
mod turns;
mod udp;

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use podtether_core::batch::{Batch, Origin, Outbox, RegionId};
use podtether_core::dns::Action;
use podtether_core::engine::{self, ControlEvent, DerpEvent, Engine, PingId};
use podtether_core::offload::VnetHeader;
use podtether_core::snapshot::SnapshotWriter;
use podtether_proto::engine::{Pong, Role, Underlay};
use podtether_proto::exit::EngineExit;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::control::{self, Control};
use crate::derp::{self, Regions};
use crate::dial::Dialer;
use crate::fds::Names as NameFds;
use crate::intake::Intake;
use crate::names::Names;
use crate::reason::Ending;
use crate::rpc::Command;
use crate::snapshot_file::SnapshotFile;
use crate::status::Board;
pub(crate) use drops::Drop;
pub(crate) use drops::Drops;
use fence::Fence;
use handover::{Handover, Next};
use report::Membership;
use rest::Rest;
use tun::Tun;
use turns::{Alarm, Source, Wake};
use udp::Udp;

/// Descriptors of the link and the underlay, before a start request.
#[derive(Debug, Default)]
pub(crate) struct Link {
    pub(crate) tun: Option<OwnedFd>,
    pub(crate) udp4: Option<OwnedFd>,
    pub(crate) udp6: Option<OwnedFd>,
    pub(crate) names: NameFds,
    pub(crate) snapshot: Option<OwnedFd>,
    /// Where a successor connects, and whose word for it counts.
    pub(crate) heir: Option<OwnedFd>,
    pub(crate) supervisor_uid: u32,
    /// To the process that this one replaces.
    pub(crate) partner: Option<OwnedFd>,
}

/// A snapshot is written this long after the core asked for it.
const SNAPSHOT_DELAY: Duration = Duration::from_secs(1);
/// Without any snapshot a restart has to wait for control.
const FIRST_SNAPSHOT_DELAY: Duration = Duration::from_millis(20);
/// At most so often.
const SNAPSHOT_PAUSE: Duration = Duration::from_secs(3);
/// Messages from relays that are handled before what came of them is sent, so that packets of one flow go to
/// the pod together.
const RELAYED: usize = 64;
/// Names being looked up at a time.
const MAX_LOOKUPS: usize = 16;

const NO_IDENTITY: &str = "the engine has no identity yet";
/// An engine that nobody gave an identity by then belongs to a supervisor that died while starting it.
const STARTED_WITHIN: Duration = Duration::from_secs(30);

/// Serves commands until a start request is good, then runs the node to its end.
pub(crate) async fn run(link: Link, board: Board, mut commands: mpsc::Receiver<Command>) -> Ending {
    let mut link = Some(link);
    let until = tokio::time::Instant::now() + STARTED_WITHIN;
    loop {
        let command = match tokio::time::timeout_at(until, commands.recv()).await {
            Ok(Some(command)) => command,
            Ok(None) => return Ending::new(EngineExit::Orphaned, "nobody can reach this engine any more"),
            Err(_) => {
                let reason = format!("nobody started this engine within {} s", STARTED_WITHIN.as_secs());
                return Ending::new(EngineExit::Orphaned, reason);
            }
        };
        match command {
            Command::Start(request, answer) => {
                let Some(parts) = link.take() else { continue };
                match Driver::start(parts, &request, board.clone()) {
                    Ok(driver) => {
                        board.set_pod_uid(&request.pod.uid);
                        board.set_role(driver.handover.role);
                        return Box::pin(driver.run(commands, answer)).await;
                    }
                    Err((parts, reason)) => {
                        let _ = answer.send(Err(reason));
                        link = Some(*parts);
                    }
                }
            }
            Command::Turn(answer) => {
                let _ = answer.send(());
            }
            Command::SetUnderlay(_) => {}
            Command::SetRouting(_, answer) => {
                let _ = answer.send(board.read());
            }
            Command::Metrics(answer) => {
                let _ = answer.send(Default::default());
            }
            Command::Way(_, answer) => {
                let _ = answer.send(Err(NO_IDENTITY.to_owned()));
            }
            Command::Netcheck(answer) => {
                let _ = answer.send(Default::default());
            }
            Command::Why(_, answer) => {
                let _ = answer.send(Err(NO_IDENTITY.to_owned()));
            }
            Command::SetRoots(_, answer) | Command::Rename(_, answer) => {
                let _ = answer.send(Err(NO_IDENTITY.to_owned()));
            }
            Command::Ping(_, _, answer) => {
                let _ = answer.send(Err(NO_IDENTITY.to_owned()));
            }
            Command::PeerCaps(_, answer) => {
                let _ = answer.send(Vec::new());
            }
            Command::Peers(answer) => {
                let _ = answer.send(Vec::new());
            }
            Command::Logout(answer) => {
                let _ = answer.send(Err("this engine was not started".to_owned()));
            }
            Command::PrepareHandover(answer) => {
                let _ = answer.send(Err(NO_IDENTITY.to_owned()));
            }
            Command::Ready(_, answer) => {
                let _ = answer.send(0);
            }
            Command::TakeOver { answer, .. } => {
                let _ = answer.send(Err(NO_IDENTITY.to_owned()));
            }
            Command::Stop(answer) => {
                let _ = answer.send(());
                return Ending::new(EngineExit::Stopped, "asked to stop before it was started");
            }
        }
    }
}

/// A running node.
struct Driver {
    engine: Engine,
    outbox: Outbox,
    tun: Tun,
    udp4: Option<Udp>,
    udp6: Option<Udp>,
    /// Those of the process before are in use as long as it is the node.
    names: Option<Names>,
    /// What was read last.
    last: Source,
    alarm: Alarm,
    from_tun: Batch<VnetHeader>,
    passed: Batch<Origin>,
    drops: Drops,
    intake: Intake,
    rest: Rest,
    dialer: Dialer,
    /// The node alone has one.
    control: Option<Control>,
    derp: Regions,
    lookups: JoinSet<(String, Vec<IpAddr>)>,
    latencies: JoinSet<(RegionId, Option<Duration>)>,
    snapshot: Option<SnapshotFile>,
    snapshot_due: Option<Instant>,
    snapshot_written: Option<Instant>,
    snapshot_writer: Option<SnapshotWriter>,
    snapshot_piece: Vec<u8>,
    membership: Membership,
    /// Who waits for the end of a ping. The core bounds them.
    pings: HashMap<PingId, oneshot::Sender<Result<Pong, String>>>,
    /// When this process took its start request.
    started: Instant,
    /// The first handshake is in the status.
    greeted: bool,
    refused: crate::refused::Lines,
    /// Why there is no control session now; empty while there is one.
    trouble: String,
    logging_out: Option<oneshot::Receiver<Result<(), String>>>,
    logout_answer: Option<oneshot::Sender<Result<(), String>>>,
    board: Board,
    ending: Option<Ending>,
    fence: Fence,
    handover: Handover,
    /// Whether the last snapshot that was begun is whole in its file.
    snapshot_kept: bool,
}

const NO_SUCH_PEER: &str = "no peer of the tailnet has that name or address";

impl Driver {
    async fn handle(&mut self, wake: Wake) {
        let now = Instant::now();
        match wake {
            Wake::Packets => {
                if let Err(gone) = self.tun.read(&mut self.from_tun, &mut self.drops) {
                    return self.ending = Some(Ending::new(EngineExit::LinkLost, gone.to_string()));
                }
                self.intake.tun_packets += self.engine.handle_tun(&mut self.from_tun, now, &mut self.outbox);
                self.from_tun.clear();
                self.send_packets().await;
            }
            Wake::Datagrams { v4 } => {
                if let Some(udp) = if v4 { &mut self.udp4 } else { &mut self.udp6 } {
                    self.drops.add(Drop::UdpTruncated, udp.receive());
                    let datagrams = udp.datagrams().inspect(|_| self.intake.others += 1);
                    self.engine.handle_udp(datagrams, now, &mut self.outbox);
                }
                self.send_packets().await;
            }
            Wake::Names(event) => {
                self.intake.others += 1;
                if let Some(names) = &mut self.names {
                    names.handle(event, &mut self.engine, now);
                }
            }
            Wake::Handover(Next::Connected(Some(partner))) => self.heir_connected(partner),
            Wake::Handover(Next::Connected(None)) => {}
            Wake::Handover(Next::Said(message)) => self.partner_said(message).await,
            Wake::Command(Command::TakeOver { alone, answer }) => self.take_over(alone, answer).await,
            Wake::Control(event) => {
                self.intake.others += 1;
                self.handle_control(event, now);
            }
            Wake::Derp(message) => {
                let mut next = Some(message);
                let mut taken = 0;
                while let Some(message) = next {
                    self.intake.others += 1;
                    if self.connected_while_the_other_is_there(&message) {
                        self.tell_relay_up(message.region).await;
                    }
                    self.handle_derp(message, now);
                    taken += 1;
                    next = if taken < RELAYED { self.derp.waiting() } else { None };
                }
            }
            Wake::Resolved(host, addresses) => {
                self.engine.handle_resolved(&host, &addresses, now, &mut self.outbox);
            }
            Wake::Latency(region, latency) => self.engine.handle_https_latency(region, latency, now),
            Wake::Command(command) => self.handle_command(command, now),
            Wake::LoggedOut(outcome) => self.logged_out(outcome),
            Wake::Time => {}
            Wake::Ended(ending) => self.ending = Some(ending),
        }
        if self.rest.look(self.intake.inputs(), now) {
            self.give_back();
        }
        if self.engine.counters().handshakes > 0 && !self.greeted {
            self.greeted = true;
            self.report();
        }
        self.tell_refused(now);
        self.look_after_handover(now);
        // Also under load, when the loop never sleeps until the deadline.
        if self.handover.role != Role::LetGo && self.engine.poll_timeout().is_some_and(|at| at <= now) {
            self.engine.handle_timeout(now, &mut self.outbox);
        }
    }

    /// Sends what the core wants sent and does what it wants done.
    async fn settle(&mut self) {
        // A standby's wishes wait until it is the node.
        while self.handover.reads()
            && let Some(event) = self.engine.poll_event()
        {
            self.handle_event(event);
        }
        while let Some(action) = self.engine.poll_dns() {
            if let Action::Ask { server, stream: true, .. } = &action
                && !self.fence.allows(server.port())
            {
                self.make_room(server.port());
            }
            if let Some(names) = &mut self.names {
                names.act(action, &mut self.drops);
            }
        }
        self.pass_on().await;
        self.send_packets().await;
        for (to, packet) in self.outbox.derp.iter() {
            if let Err(why) = self.derp.send(to.region, to.peer, packet) {
                self.drops.count(why);
            }
        }
        self.outbox.clear();
        if self.snapshot_writer.is_some() {
            self.continue_snapshot();
        } else if self.snapshot_due.is_some_and(|at| at <= Instant::now()) {
            self.snapshot_due = None;
            self.begin_snapshot();
        }
    }

    /// Hands packets to the pod and datagrams to the kernel.
    async fn send_packets(&mut self) {
        if !self.outbox.tun.is_empty() {
            self.tun.write(&mut self.outbox.tun, &mut self.drops);
            self.outbox.tun.clear();
        }
        // One that has let go sends nothing.
        if self.outbox.udp.is_empty() || self.handover.role == Role::LetGo {
            return;
        }
        let (v4, v6) = (self.udp4.is_some(), self.udp6.is_some());
        if !v4 || !v6 {
            self.drops.add(Drop::UdpNoSocket, udp::without_socket(&self.outbox.udp, v4, v6));
        }
        for udp in [&mut self.udp4, &mut self.udp6].into_iter().flatten() {
            udp.send(&self.outbox.udp, &mut self.drops).await;
        }
        self.outbox.udp.clear();
    }

    fn handle_event(&mut self, event: engine::Event) {
        match event {
            engine::Event::SelfChanged | engine::Event::RoutesChanged => self.report(),
            engine::Event::HostUpdate => {
                if let Some(control) = &self.control {
                    control.set_host(self.engine.host_update());
                }
                self.report();
            }
            engine::Event::DerpConnect { region } if !self.may_dial(region) => {}
            engine::Event::DerpConnect { region } => match self.engine.derp_node(region) {
                Some(nodes) => self.derp.connect(region, nodes.clone(), &self.dialer),
                None => tracing::warn!(%region, "the core wants a DERP region that the map does not have"),
            },
            engine::Event::DerpClose { region } => self.derp.close(region),
            engine::Event::DerpPing { region } => self.derp.ping(region),
            engine::Event::DerpReconnect { region } => self.derp.reconnect(region),
            engine::Event::HttpsLatency { region } if !self.may_dial(region) => {}
            engine::Event::HttpsLatency { region } => {
                let servers = self.engine.derp_node(region).cloned().unwrap_or_default();
                let dialer = self.dialer.clone();
                self.latencies.spawn(async move { (region, derp::measure(&dialer, &servers).await) });
            }
            engine::Event::DerpPreferred { region } => {
                self.derp.prefer(region);
                self.report();
            }
            engine::Event::Resolve { host } => {
                if self.lookups.len() < MAX_LOOKUPS {
                    let resolver = self.dialer.resolver.clone();
                    self.lookups.spawn(async move {
                        let found = resolver.lookup(&host).await;
                        (host, found.unwrap_or_default())
                    });
                }
            }
            engine::Event::SnapshotDirty => {
                let now = Instant::now();
                let due = match self.snapshot_written {
                    None => now + FIRST_SNAPSHOT_DELAY,
                    Some(at) => (at + SNAPSHOT_PAUSE).max(now + SNAPSHOT_DELAY),
                };
                self.snapshot_due.get_or_insert(due);
            }
            engine::Event::ControlAnswer(answer) => {
                if let Some(control) = &self.control {
                    control.answer(*answer);
                }
            }
            engine::Event::Pong(result) => {
                if let Some(asker) = self.pings.remove(&result.id) {
                    let _ = asker.send(report::pong(*result));
                }
            }
            // That is what a logout does; its answer is on the way.
            engine::Event::ShieldChanged => self.change_shield(),
            engine::Event::CountShielded => self.count_lost(),
            engine::Event::KeyExpired if self.logging_out.is_some() => {}
            engine::Event::KeyExpired => {
                let reason = "the node key has expired";
                self.ending = Some(Ending::new(EngineExit::NodeKeyExpired, reason));
            }
        }
    }

    fn handle_control(&mut self, event: control::Event, now: Instant) {
        let event = match event {
            control::Event::Trying { reason } => {
                self.trouble = reason;
                return self.report();
            }
            control::Event::NeedsLogin { url } => {
                self.membership = Membership::NeedsLogin { url };
                return self.report();
            }
            control::Event::Registered { approved } => {
                self.membership = Membership::Registered { approved };
                self.trouble.clear();
                return self.report();
            }
            control::Event::Ended(ending) => {
                // A server may forget the node before it answers the logout.
                let gone = matches!(ending.exit, EngineExit::NodeUnknown | EngineExit::NodeKeyExpired);
                return match self.logging_out.take() {
                    Some(_) if gone => self.logged_out(Ok(())),
                    _ => self.ending = Some(ending),
                };
            }
            control::Event::SessionStarted => {
                self.trouble.clear();
                ControlEvent::SessionStarted
            }
            control::Event::Peers(list, nodes) => {
                // A message's end is what status has news from.
                let event = ControlEvent::Peers { list, nodes };
                return self.engine.handle_control(event, now, &mut self.outbox);
            }
            control::Event::PeersUnfinished => ControlEvent::PeersUnfinished,
            control::Event::Map(message) => {
                self.board.control_heard(now);
                ControlEvent::Map(message)
            }
            control::Event::SessionLost => ControlEvent::SessionLost,
        };
        self.engine.handle_control(event, now, &mut self.outbox);
        self.report();
    }

    fn handle_derp(&mut self, message: derp::Message, now: Instant) {
        let derp::Message { region, event } = message;
        let mut packet;
        let health;
        let event = match event {
            derp::Event::Connected => DerpEvent::Connected,
            derp::Event::Disconnected => DerpEvent::Disconnected,
            derp::Event::Heard => DerpEvent::Heard,
            derp::Event::Packet { source, payload } => {
                packet = payload;
                DerpEvent::Packet { source, payload: &mut packet }
            }
            derp::Event::PeerGone { peer } => DerpEvent::PeerGone { peer },
            derp::Event::Health(problem) => {
                health = problem;
                DerpEvent::Health { problem: &health }
            }
        };
        if let (DerpEvent::Disconnected, Some(servers)) = (&event, self.engine.derp_node(region)) {
            self.derp.set_servers(region, servers.clone());
        }
        let reports = !matches!(event, DerpEvent::Packet { .. } | DerpEvent::Heard);
        self.engine.handle_derp(region, event, now, &mut self.outbox);
        if reports {
            self.report();
        }
    }

    fn handle_command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Turn(answer) => {
                let _ = answer.send(());
            }
            Command::Start(_, answer) => {
                let _ = answer.send(Err("this engine was started already".to_owned()));
            }
            Command::SetUnderlay(underlay) => self.set_underlay(&underlay, now),
            Command::SetRouting(wanted, answer) => {
                self.engine.set_routing(start::routing(&wanted));
                self.report();
                let _ = answer.send(self.board.read());
            }
            Command::Metrics(answer) => {
                self.count_lost();
                let _ = answer.send(self.metrics(now));
            }
            Command::Why(packet, answer) => {
                let _ = answer.send(Ok(self.why(packet, now)));
            }
            Command::SetRoots(pem, answer) => {
                let replaced = self.dialer.tls.replace_roots(&pem).map_err(|e| e.to_string());
                if replaced.is_ok() {
                    tracing::info!(pod = self.board.pod_uid(), "other extra roots from now on");
                }
                let _ = answer.send(replaced);
            }
            Command::Rename(hostname, answer) => {
                let _ = answer.send(self.rename(hostname));
            }
            Command::Ping(peer, kind, answer) => {
                match peer.parse().ok().or_else(|| self.engine.find_peer(&peer)) {
                    Some(ip) => {
                        let id = self.engine.ping(ip, report::ping_kind(kind), now, &mut self.outbox);
                        self.pings.insert(id, answer);
                    }
                    None => {
                        let _ = answer.send(Err(NO_SUCH_PEER.to_owned()));
                    }
                }
            }
            Command::Way(peer, answer) => {
                let way = self.way(&peer, now);
                let _ = answer.send(way.ok_or_else(|| NO_SUCH_PEER.to_owned()));
            }
            Command::Netcheck(answer) => {
                let _ = answer.send(self.netcheck(now));
            }
            Command::PeerCaps(peer, answer) => {
                let _ = answer.send(self.peer_caps(peer));
            }
            Command::Peers(answer) => {
                let _ = answer.send(self.peers(now));
            }
            Command::PrepareHandover(answer) => self.prepare_handover(answer),
            Command::Ready(within, answer) => self.tell_ready(within, answer),
            Command::TakeOver { answer, .. } => {
                let _ = answer.send(Err("it cannot be asked for now".to_owned()));
            }
            Command::Logout(answer) if self.control.is_none() => {
                let _ = answer.send(Err("another process is the node".to_owned()));
            }
            Command::Logout(answer) => {
                let (done, outcome) = oneshot::channel();
                if let Some(control) = &self.control {
                    control.logout(done);
                }
                self.logging_out = Some(outcome);
                self.logout_answer = Some(answer);
            }
            Command::Stop(answer) => {
                if self.handover.reads() {
                    self.write_snapshot();
                }
                let _ = answer.send(());
                self.ending = Some(Ending::new(EngineExit::Stopped, "asked to stop"));
            }
        }
    }

    /// Puts the core's shield on the sockets, or takes it away.
    fn change_shield(&mut self) {
        // What was dropped until here belongs to the filter before.
        self.count_lost();
        let shield = self.engine.shield();
        for udp in [&mut self.udp4, &mut self.udp6].into_iter().flatten() {
            if let Err(error) = udp.set_shield(shield) {
                tracing::error!(%error, "no filter for the UDP sockets: floods will cost more");
                return self.engine.forgo_shield();
            }
        }
    }

    /// Counts what the kernel dropped: while a shield is up nearly all of it by the filter, else because
    /// the socket's queue was full.
    fn count_lost(&mut self) {
        for udp in [&mut self.udp4, &mut self.udp6].into_iter().flatten() {
            let lost = udp.lost();
            if udp.is_shielded() {
                self.engine.handle_shielded(lost, Instant::now());
            } else {
                self.drops.add(Drop::UdpUnread, lost);
            }
        }
    }

    fn logged_out(&mut self, outcome: Result<(), String>) {
        self.logging_out = None;
        if outcome.is_ok() {
            self.membership = Membership::LoggedOut;
            self.report();
            // What is left of this identity must not come back to life.
            self.snapshot = None;
            self.ending = Some(Ending::new(EngineExit::Stopped, "logged out as asked"));
        }
        if let Some(answer) = self.logout_answer.take() {
            let _ = answer.send(outcome);
        }
    }

    fn set_underlay(&mut self, underlay: &Underlay, now: Instant) {
        self.dialer.resolver.set_underlay(underlay);
        let port = |udp: &Option<Udp>| udp.as_ref().map(Udp::port);
        let (v4, v6) = (port(&self.udp4), port(&self.udp6));
        self.engine.handle_underlay(&underlay.addresses, v4, v6, now, &mut self.outbox);
    }

    fn rename(&self, hostname: String) -> Result<(), String> {
        start::check_label(&hostname)?;
        let control = self.control.as_ref().ok_or("another engine is in charge of the pod")?;
        control.rename(hostname);
        Ok(())
    }

    /// Leaves no TCP port to connect to but those known by now.
    fn shut_fence(&mut self) {
        if let Err(error) = self.fence.shut(self.engine.tcp_ports(), &self.board) {
            let reason = format!("the engine cannot confine itself: the list of TCP ports: {error}");
            self.ending = Some(Ending::new(EngineExit::Sandbox, reason));
        }
    }

    /// Whether a region's relays can be connected to. If not, the engine makes room for one that can.
    fn may_dial(&mut self, region: RegionId) -> bool {
        if self.fence.is_open() {
            self.shut_fence();
        }
        let nodes = self.engine.derp_node(region).map(|region| region.nodes.as_slice()).unwrap_or_default();
        let relays = nodes.iter().filter(|node| !node.stun_only);
        let outside = relays.filter_map(|node| node.relay_port()).find(|port| !self.fence.allows(*port));
        outside.is_none_or(|port| {
            self.make_room(port);
            false
        })
    }

    /// Ends for a successor that may connect to `port`, which takes it from the snapshot.
    fn make_room(&mut self, port: u16) {
        self.write_snapshot();
        if self.snapshot_kept {
            let reason = format!("a server is on TCP port {port}, which the sandbox was not made for");
            self.ending = Some(Ending::new(EngineExit::NewPorts, reason));
        } else {
            // The successor would know no more than this one.
            tracing::error!(
                port,
                "a server's TCP port is outside the sandbox, and without a snapshot stays so"
            );
        }
    }

    /// Writes a snapshot to its end.
    fn write_snapshot(&mut self) {
        self.snapshot_due = None;
        self.begin_snapshot();
        while self.snapshot_writer.is_some() {
            self.continue_snapshot();
        }
    }

    /// Begins a snapshot; one that is under way is given up for it.
    fn begin_snapshot(&mut self) {
        let Some(file) = &mut self.snapshot else { return };
        let now = Instant::now();
        self.snapshot_written = Some(now);
        self.snapshot_kept = false;
        file.begin();
        let mut piece = zeroize::Zeroizing::new(Vec::new());
        self.snapshot_writer = Some(self.engine.begin_snapshot(now, &mut piece));
        self.append_snapshot(&piece, false);
        // With few peers this is all.
        self.continue_snapshot();
    }

    /// Writes some more of the snapshot under way; packets are handled in between.
    fn continue_snapshot(&mut self) {
        let Some(writer) = &mut self.snapshot_writer else { return };
        let mut piece = std::mem::take(&mut self.snapshot_piece);
        piece.clear();
        let last = !self.engine.continue_snapshot(writer, &mut piece);
        self.append_snapshot(&piece, last);
        // Kept only while it is of use.
        self.snapshot_piece = if self.snapshot_writer.is_some() { piece } else { Vec::new() };
    }

    fn append_snapshot(&mut self, piece: &[u8], last: bool) {
        let Some(file) = &mut self.snapshot else {
            self.snapshot_writer = None;
            return;
        };
        let written = file.append(piece).and_then(|()| if last { file.commit() } else { Ok(()) });
        if let Err(error) = &written {
            tracing::error!(%error, "could not write the snapshot; a restart will be slower");
        }
        self.snapshot_kept = last && written.is_ok();
        if last || written.is_err() {
            self.snapshot_writer = None;
        }
    }
}
