//! `podtether-devnet chaos`: kills, hangs and outages in a seeded order under continuous traffic, and a
//! checker that knows what each may cost.
//!
//! A node with the pods that are hurt (*home*) and one with their peers (*away*) run the real programs in
//! the [`crate::lab`]. Every home pod is pinged and holds a TCP connection all the time; further pairs show
//! what bystanders lose. What was seen of each event goes to the [`checker`], which alone judges.
//!
//! | part | module |
//! |---|---|
//! | which events, in which order | [`schedule`] |
//! | what each may cost; the table | [`checker`] |
//! | pings of many pairs from one thread | `traffic` |
//! | TCP connections that check every byte | `talk` |
//! | pods that come and go meanwhile | `churn` |
//! | memory that an engine's cgroup does not have | `hog` |
//! | what it runs on | `world` |
//! | doing it | [`run`](run()) |

pub mod checker;
mod churn;
mod hog;
mod run;
pub mod schedule;
mod talk;
mod traffic;
mod world;

pub use checker::Report;
pub use hog::Cgroups;
pub use run::{Options, run};
pub use schedule::Counts;
