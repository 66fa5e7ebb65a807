//! A whole tailnet on one machine: control server, DERP, STUN, admin API and a network lab.
//!
//! ```no_run
//! # async fn example() -> Result<(), podtether_devnet::StartError> {
//! use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig};
//! let devnet = Devnet::start(DevnetConfig::default()).await?;
//! let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() });
//! println!("tailscale up --login-server {} --authkey {}", devnet.http_url(), key.secret);
//! # Ok(())
//! # }
//! ```
//!
//! It stands in for the outside world, so it is as strict as the real servers: what they refuse is
//! refused with their words, and what they let pass although it is wrong is recorded in
//! [`Devnet::complaints`]. State is in memory only.
//!
//! | part | modules |
//! |---|---|
//! | start, handle, settings | [`Devnet`], [`DevnetConfig`] |
//! | control server | `control`, inside the connections of `http_server` |
//! | access rules | [`acl`] |
//! | admin API | `api` |
//! | odd peers | `peers`, `control::kinds` |
//! | relays | `derp`, `stun`, `regions`, `distance` |
//! | what goes wrong on request | [`fault`] |
//! | seeded trouble under traffic, and its judge | [`chaos`] |
//! | what it all costs, beside its peers | [`bench`] |

pub mod acl;
mod api;
pub mod bench;
pub mod ca;
pub mod chaos;
mod config;
pub mod control;
mod derp;
mod devnet;
mod distance;
pub mod fault;
mod http_server;
pub mod lab;
mod listen;
mod peers;
mod random;
mod regions;
mod shared;
mod start;
mod stun;
mod sync;
pub mod terminal;

pub use config::{DevnetConfig, Dialect, DnsSettings, Families, HeadscaleApi, OauthConfig, RegionConfig};
pub use control::crowd::Crowd;
pub use control::state::AuthKeyOptions;
pub use derp::{Mode, RelayStats};
pub use devnet::{AuthKeyInfo, Devnet, NodeInfo};
pub use regions::RelayNotice;
pub use start::StartError;
pub mod probe;
