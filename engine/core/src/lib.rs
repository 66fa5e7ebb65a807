//! A tailnet node's protocol logic, without I/O and without a clock.
//!
//! Facts go in through `handle_*(…, now)`, results come out through [`batch::Outbox`] and `poll_*`, and
//! `poll_timeout` says when to call again. Batches of packets cross the border, not packets, and the
//! data path allocates nothing per packet. The one exception to "no clock" is `wg`: boringtun dates cookies by it.
//!
//! | part | modules |
//! |---|---|
//! | the node as a whole | `engine`, `batch`, `snapshot`, `health` |
//! | control protocol | `noise`, `map_stream`, `tailcfg`, `netmap`, `register`, `c2n`, `dial_plan`, `retry_after`, `backoff` |
//! | paths to peers | `path`, `disco`, `stun`, `netcheck`, `derp`, `routes` |
//! | what flows | `wg`, `aead`, `packet`, `offload`, `nat`, `filter`, `dns` |
//! | names of things | `key` |

pub mod aead;
pub mod backoff;
pub mod batch;
mod budget;
pub mod c2n;
pub mod derp;
pub mod dial_plan;
pub mod disco;
pub mod dns;
pub mod engine;
pub mod filter;
pub mod health;
pub mod key;
pub mod map_stream;
mod nat;
mod netcheck;
pub mod netmap;
pub mod noise;
pub mod offload;
pub mod packet;
mod path;
mod peer;
mod random;
pub mod register;
pub mod retry_after;
pub mod routes;
pub mod snapshot;
pub mod stun;
pub mod tailcfg;
mod wg;
