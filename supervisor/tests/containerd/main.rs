//! The supervisor in a real containerd container, as a DaemonSet would run it: the container is killed and
//! deleted, engines and their traffic are not. And what each setting of it is for: without it, what dies. And
//! pods that come and go through CRI, with the plugin behind Debian's.
//!
//! As real root with Debian's packages containerd, runc, containernetworking-plugins and busybox-static; elsewhere this says that it skips.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::print_stdout, reason = "what was measured is for people to judge, too")]

mod churn;
mod cri;
mod limits;
mod outlive;
#[path = "../rig/mod.rs"]
mod rig;
mod runtime;
