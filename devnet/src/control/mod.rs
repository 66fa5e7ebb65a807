//! The control server: what happens inside the Noise connection, and what the tailnet knows.
//!
//! [`state`] is the whole tailnet behind one lock. A change bumps a revision and wakes every map
//! session; each session compares the state with what it last sent ([`view`]) and sends the
//! difference. So nothing is queued per session, and a client that reads slowly gets one merged
//! message, or is cut off when it reads nothing for the write timeout.

pub(crate) mod crowd;
pub(crate) mod kinds;
pub(crate) mod map;
pub(crate) mod noise_server;
pub mod noise_stream;
pub(crate) mod register;
pub(crate) mod routes;
pub(crate) mod shares;
pub(crate) mod state;
pub(crate) mod view;
pub(crate) mod wire;
