//! Pods in a tailnet whose control server is Headscale: the devnet with Headscale's admin API, and the real
//! one where it is on PATH.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::print_stdout, reason = "what was measured is for people to judge, too")]

mod admin;
mod life;
mod real;
#[path = "../rig/mod.rs"]
mod rig;
