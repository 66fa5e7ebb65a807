//! That something changed in a namespace. What it was is found by looking again.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use crate::error::{Result, Step};
use crate::netns::Netns;

/// Hears of changes from its opening on.
#[derive(Debug)]
pub(crate) struct Events(AsyncFd<OwnedFd>);

impl Events {
    /// `groups` are the `RTMGRP_` bits of what is to be heard of.
    ///
    /// # Errors
    /// As the kernel says.
    pub(crate) async fn open(ns: &Netns, groups: u32) -> Result<Self> {
        let step = || "listen to a namespace's changes".to_owned();
        let socket = ns.run(move || subscribe(groups)).await?.step(step)?;
        // SAFETY: an OwnedFd is always the same descriptor and stays open until it is dropped.
        unsafe { AsyncFd::register(socket) }.step(step).map(Self)
    }

    /// Waits for a change. What was missed while the queue overflowed counts as one.
    ///
    /// # Errors
    /// As the kernel says.
    pub(crate) async fn wait(&self) -> Result<()> {
        let mut ready = self.0.readable().await.step(|| "wait for netlink events".into())?;
        drain(ready.get_inner());
        ready.clear_ready();
        Ok(())
    }

    /// Forgets what was heard so far: it is going to be looked at anyway.
    pub(crate) fn forget(&self) {
        drain(self.0.get_ref());
    }
}

/// When to look again for something that the kernel does in its own time.
#[derive(Debug)]
pub(crate) struct Changes<'a> {
    ns: &'a Netns,
    groups: u32,
    deadline: Instant,
    events: Option<Events>,
    late: bool,
}

impl<'a> Changes<'a> {
    /// As [`Events::open`], for at most so long.
    pub(crate) fn new(ns: &'a Netns, groups: u32, at_most: Duration) -> Self {
        Self { ns, groups, deadline: Instant::now() + at_most, events: None, late: false }
    }

    /// Waits until there may be something new. The first time there may be at once: listening begins here,
    /// after the caller has looked.
    ///
    /// # Errors
    /// As the kernel says, and when the time is over and the caller has looked once more.
    pub(crate) async fn next(&mut self, step: impl FnOnce() -> String) -> Result<()> {
        if self.late {
            return Err(io::Error::from(io::ErrorKind::TimedOut)).step(step);
        }
        match &self.events {
            None => self.events = Some(Events::open(self.ns, self.groups).await?),
            Some(events) => match tokio::time::timeout_at(self.deadline, events.wait()).await {
                Ok(heard) => heard?,
                Err(_) => self.late = true,
            },
        }
        Ok(())
    }
}

/// Runs on the thread inside the namespace.
fn subscribe(groups: u32) -> io::Result<OwnedFd> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind(&SocketAddr::new(0, groups))?;
    socket.set_non_blocking(true)?;
    // SAFETY: the descriptor was just released by its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(socket.into_raw_fd()) })
}

/// Reads until the queue is empty. That something happened is all that matters, so a message may be cut.
fn drain(socket: &OwnedFd) {
    let mut buffer = [0_u8; 64];
    loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(_) | Err(nix::Error::ENOBUFS | nix::Error::EINTR) => {}
            Err(_) => return,
        }
    }
}
