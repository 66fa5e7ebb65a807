//! `podtether-devnet bench`: what podtether costs, beside the bare network and a stock `tailscaled`.
//!
//! Two nodes with a supervisor each, pods on both, real engines joined through the real plugin, a devnet with
//! its relay, all in the [`crate::lab`]. Where `tailscaled` and `tailscale` are on PATH two more nodes run one
//! each. Every figure of ours is measured in turn with its peers', so that what the machine does meanwhile
//! hits all alike; only the ratios can be carried to another machine.
//!
//! | part | module |
//! |---|---|
//! | what has to be reached | [`bars`] |
//! | samples, medians, ratios | [`figure`] |
//! | the table and the JSON file | [`report`] |
//! | `iperf3` and what it says | [`iperf`] |
//! | the highest rate without loss | [`search`] |
//! | what a process has used | [`usage`] |
//! | what it runs on | `world` |
//! | rates and processor time | `speed` |
//! | round trips | `latency` |
//! | what engines keep | `memory` |
//! | pods that join, alone and all at once | [`joins`] |
//! | engines that idle | `idle` |
//! | engines that are killed and start | `life` |
//! | the order of things | [`run`](run()) |

pub mod bars;
pub mod figure;
mod idle;
pub mod iperf;
pub mod joins;
mod latency;
mod life;
mod memory;
pub mod report;
mod run;
pub mod search;
mod speed;
pub mod usage;
mod world;

pub use report::Report;
pub use run::{Options, PARTS, run};
