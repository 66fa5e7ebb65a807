//! The node's supervisor: pods' links, records and engines.
//!
//! One task ([`table`]) owns what is known of every pod. What a pod needs next is a pure function of
//! what is wanted and what is there ([`plan`]); each step runs as its own task and reports back, so
//! pods never wait for each other and create, restart, recover and leave are the same code.

pub mod adopt;
pub mod cgroup;
pub mod choose;
pub mod cli;
pub mod config;
pub mod context;
pub mod credentials;
pub mod daemon;
pub mod detach;
pub mod distrust;
pub mod dns;
pub mod engine;
pub mod ghosts;
pub mod guard;
pub mod hostname;
pub mod http;
pub mod install_cni;
pub mod kube;
pub mod log;
pub mod lookup;
pub mod memory;
pub mod metrics;
pub mod node;
pub mod output;
pub mod page;
pub mod plan;
pub mod recent;
pub mod record;
pub mod refused;
pub mod restart;
pub mod routing;
pub mod sandbox;
pub mod shared;
pub mod spawn;
pub mod table;
pub mod trace;
pub mod underlay;
