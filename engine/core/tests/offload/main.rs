//! Segmentation and coalescing against a naive way of doing it.
//!
//! `naive` makes every packet whole from what it is to carry; nothing of it is shared with the library.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../counting/mod.rs"]
mod counting;

mod coalesce;
mod naive;
mod segment;
mod steady;
