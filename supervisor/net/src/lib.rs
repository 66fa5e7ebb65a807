//! The kernel objects of a pod's link: namespaces, veth pairs, TUN devices, sockets, routes.
//!
//! * [`netns`]: network namespaces as owned handles, pinned by a bind mount so that they outlive every
//!   process. A thread enters another namespace only when it was made for that and ends afterwards:
//!   `setns` never happens on a runtime's worker.
//! * [`netlink`]: the only user of rtnetlink. A netlink socket belongs to the namespace it was made in,
//!   so a socket per namespace replaces entering one for every request.
//! * [`link`]: a pod's link as a plan: observed state and wanted state make steps; no steps means it is
//!   as it should be, and the first step is what CHECK reports.
//! * [`intercept`]: a pod's DNS led to its engine, for as long as that lives.
//! * [`tun`], [`sockets`], [`sysctl`], [`underlay`]: what the link and the engine need besides.
//! * [`isolate`], [`testing`]: a process of its own namespaces, for tests and the demo.

mod error;
pub mod intercept;
pub mod isolate;
pub mod link;
pub mod netlink;
pub mod netns;
mod nfnetlink;
pub mod sockets;
pub mod sysctl;
pub mod testing;
pub mod tun;
pub mod underlay;

pub use error::{Error, Result};
pub use netns::Netns;
