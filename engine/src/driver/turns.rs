//! What the loop does next.
//!
//! Packets come first: a pod's ping should meet as little of the engine as there can be, whose code and data the
//! processor has forgotten while it was idle. Everything else is asked once nothing waits there, and every few rounds
//! of a busy one.

use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use podtether_core::batch::RegionId;
use podtether_proto::engine::Role;
use podtether_proto::exit::EngineExit;
use tokio::sync::{mpsc, oneshot};

use super::tun::Tun;
use super::udp::Udp;
use super::{Driver, handover};
use crate::control::{self, Control};
use crate::derp;
use crate::names::{self, Names};
use crate::reason::Ending;
use crate::rpc::Command;

/// Rounds between which other sources, other tasks and the poller surely get their turn.
const ROUNDS_PER_YIELD: u32 = 4;

/// What woke the loop.
pub(super) enum Wake {
    /// The TUN may have packets.
    Packets,
    /// A socket may have datagrams.
    Datagrams {
        v4: bool,
    },
    Names(names::Event),
    Control(control::Event),
    Derp(derp::Message),
    Resolved(String, Vec<IpAddr>),
    Latency(RegionId, Option<Duration>),
    Handover(handover::Next),
    Command(Command),
    LoggedOut(Result<(), String>),
    Time,
    Ended(Ending),
}

/// One timer for the loop's deadlines. They move with every packet, and a timer that is set anew wakes the poller:
/// one that is set for earlier than need be stays, and is set again when it has gone off.
#[derive(Default)]
pub(super) struct Alarm {
    sleep: Option<Pin<Box<tokio::time::Sleep>>>,
    /// For when; `None` once it has gone off.
    set: Option<Instant>,
}

impl Alarm {
    /// Goes off at `deadline` or earlier.
    fn set(&mut self, deadline: Instant) {
        if self.set.is_some_and(|set| set <= deadline) {
            return;
        }
        self.set = Some(deadline);
        match &mut self.sleep {
            Some(sleep) => sleep.as_mut().reset(deadline.into()),
            None => self.sleep = Some(Box::pin(tokio::time::sleep_until(deadline.into()))),
        }
    }

    async fn gone_off(&mut self) {
        match &mut self.sleep {
            Some(sleep) if self.set.is_some() => sleep.as_mut().await,
            _ => std::future::pending().await,
        }
        self.set = None;
    }
}

impl Driver {
    pub(super) async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        started: oneshot::Sender<Result<(), String>>,
    ) -> Ending {
        // With a snapshot the first handshakes leave here, before the supervisor hears back.
        self.engine.handle_timeout(Instant::now(), &mut self.outbox);
        self.settle().await;
        let _ = started.send(Ok(()));
        if let Some(ending) = self.ending.take() {
            return ending;
        }
        // Since it last had nothing to do, or asked everybody.
        let mut rounds = 1_u32;
        loop {
            if rounds >= ROUNDS_PER_YIELD {
                tokio::task::yield_now().await;
            }
            let (wake, waited) = self.wake(&mut commands, rounds).await;
            rounds = if waited || rounds >= ROUNDS_PER_YIELD { 1 } else { rounds + 1 };
            self.handle(wake).await;
            self.settle().await;
            if let Some(ending) = self.ending.take() {
                if self.handover.reads() {
                    self.write_snapshot();
                }
                return ending;
            }
        }
    }

    /// Waits for whatever comes first; whether there was nothing at once. `rounds`: since that was so last.
    async fn wake(&mut self, commands: &mut mpsc::Receiver<Command>, rounds: u32) -> (Wake, bool) {
        let reads = self.handover.reads();
        let packets_first = reads && rounds < ROUNDS_PER_YIELD;
        if packets_first && let Some(wake) = self.packets_now().await {
            return (wake, false);
        }
        if let Some(deadline) = self.deadline() {
            self.alarm.set(deadline);
        }
        let Self { tun, udp4, udp6, names, control, derp, lookups, latencies, .. } = self;
        let Self { handover, passed, logging_out, alarm, last, .. } = self;
        let (tun, udp4, udp6, before) = (&*tun, udp4.as_ref(), udp6.as_ref(), *last);
        // In no order: one that always has something does not keep the others waiting.
        let others = async {
            tokio::select! {
                event = asked(names.as_mut()) => Wake::Names(event),
                event = said(control.as_mut()) => event.map_or(Wake::Time, Wake::Control),
                message = derp.message() => Wake::Derp(message),
                Some(found) = lookups.join_next() => match found {
                    Ok((host, addresses)) => Wake::Resolved(host, addresses),
                    Err(_) => Wake::Time,
                },
                Some(Ok((region, latency))) = latencies.join_next() => Wake::Latency(region, latency),
                next = handover.next(passed) => Wake::Handover(next),
                command = commands.recv() => command.map_or_else(orphaned, Wake::Command),
                outcome = finished(logging_out.as_mut()) => Wake::LoggedOut(outcome),
                () = alarm.gone_off() => Wake::Time,
                gone = tun.gone(), if reads => lost(gone.to_string()),
            }
        };
        let mut waited = false;
        let (source, wake) = tokio::select! {
            biased;
            found = poll_fn(|cx| packets(before, tun, udp4, udp6, cx)), if packets_first => found,
            other = others => (before, other),
            found = poll_fn(|cx| packets(before, tun, udp4, udp6, cx)), if reads && !packets_first => found,
            () = poll_fn(|_| { waited = true; Poll::Pending }) => (before, Wake::Time),
        };
        *last = source;
        (wake, waited)
    }

    /// Packets of which the poller has told.
    async fn packets_now(&mut self) -> Option<Wake> {
        let Self { last, tun, udp4, udp6, .. } = self;
        let (source, wake) = poll_fn(|cx| {
            Poll::Ready(match packets(*last, tun, udp4.as_ref(), udp6.as_ref(), cx) {
                Poll::Ready(found) => Some(found),
                Poll::Pending => None,
            })
        })
        .await?;
        *last = source;
        Some(wake)
    }

    /// When the loop has something to do in any case.
    fn deadline(&self) -> Option<Instant> {
        let snapshot = match self.snapshot_writer {
            Some(_) => self.snapshot_written,
            None => self.snapshot_due,
        };
        let refused = self.refused.deadline(self.refused_sum());
        let handover = self.handover.deadline();
        let core = self.engine.poll_timeout().filter(|_| self.handover.role != Role::LetGo);
        [core, snapshot, refused, handover, self.rest.deadline()].into_iter().flatten().min()
    }
}

/// Where packets come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Source {
    #[default]
    Tun,
    Udp4,
    Udp6,
}

impl Source {
    /// The order to ask in after this one had its turn: it is the last, so that a busy one keeps none waiting.
    fn order_after(self) -> [Self; 3] {
        match self {
            Self::Tun => [Self::Udp4, Self::Udp6, Self::Tun],
            Self::Udp4 => [Self::Udp6, Self::Tun, Self::Udp4],
            Self::Udp6 => [Self::Tun, Self::Udp4, Self::Udp6],
        }
    }
}

/// Where packets may be, if anywhere.
fn packets(
    last: Source,
    tun: &Tun,
    udp4: Option<&Udp>,
    udp6: Option<&Udp>,
    cx: &mut Context<'_>,
) -> Poll<(Source, Wake)> {
    for source in last.order_after() {
        let ready = match source {
            Source::Tun => tun.poll_ready(cx),
            Source::Udp4 => udp4.map_or(Poll::Pending, |udp| udp.poll_ready(cx)),
            Source::Udp6 => udp6.map_or(Poll::Pending, |udp| udp.poll_ready(cx)),
        };
        let wake = match (ready, source) {
            (Poll::Pending, _) => continue,
            (Poll::Ready(Ok(())), Source::Tun) => Wake::Packets,
            (Poll::Ready(Ok(())), Source::Udp4) => Wake::Datagrams { v4: true },
            (Poll::Ready(Ok(())), Source::Udp6) => Wake::Datagrams { v4: false },
            (Poll::Ready(Err(error)), _) => lost(format!("a descriptor cannot be waited for: {error}")),
        };
        return Poll::Ready((source, wake));
    }
    Poll::Pending
}

fn lost(reason: String) -> Wake {
    Wake::Ended(Ending::new(EngineExit::LinkLost, reason))
}

fn orphaned() -> Wake {
    Wake::Ended(Ending::new(EngineExit::Orphaned, "nobody can reach this engine any more"))
}

async fn asked(names: Option<&mut Names>) -> names::Event {
    match names {
        Some(names) => names.event().await,
        None => std::future::pending().await,
    }
}

async fn said(control: Option<&mut Control>) -> Option<control::Event> {
    match control {
        Some(control) => control.event().await,
        None => std::future::pending().await,
    }
}

async fn finished(outcome: Option<&mut oneshot::Receiver<Result<(), String>>>) -> Result<(), String> {
    match outcome {
        Some(outcome) => outcome.await.unwrap_or_else(|_| Err("the control client ended".to_owned())),
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_source_is_asked_and_the_last_one_read_is_asked_last() {
        for last in [Source::Tun, Source::Udp4, Source::Udp6] {
            let order = last.order_after();
            assert_eq!(order[2], last);
            assert!([Source::Tun, Source::Udp4, Source::Udp6].iter().all(|source| order.contains(source)));
        }
        // All busy: each has its turn.
        let turns = (0..6).scan(Source::Tun, |last, _| {
            *last = last.order_after()[0];
            Some(*last)
        });
        let [tun, udp4, udp6] = [Source::Tun, Source::Udp4, Source::Udp6];
        assert_eq!(turns.collect::<Vec<_>>(), [udp4, udp6, tun, udp4, udp6, tun]);
    }

    #[tokio::test]
    async fn the_alarm_is_never_late_and_is_set_again_for_what_is_earlier_alone() {
        let mut alarm = Alarm::default();
        let mut waiting = Box::pin(alarm.gone_off());
        assert!(poll_fn(|cx| Poll::Ready(waiting.as_mut().poll(cx))).await.is_pending(), "nothing is set");
        std::mem::drop(waiting);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        alarm.set(at(30));
        // Traffic: the deadline moves away.
        alarm.set(at(60_000));
        assert_eq!(alarm.set, Some(at(30)));
        alarm.gone_off().await;
        assert!(Instant::now() >= at(30));
        assert_eq!(alarm.set, None);
        alarm.set(at(60_000));
        // Something is due earlier, and then something that is past.
        alarm.set(at(40));
        assert_eq!(alarm.set, Some(at(40)));
        alarm.set(at(10));
        alarm.gone_off().await;
        alarm.set(at(10));
        alarm.gone_off().await;
    }
}
