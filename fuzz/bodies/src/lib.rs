//! What the fuzz targets do with their input.
//!
//! Each function takes any bytes and must come back: no panic, no endless loop, and memory in
//! proportion to the input. Where a reader promises more than that, the promise is asserted. The
//! functions are deterministic, so that a saved input shows the same fault again.

mod control;
mod frames;
mod node;
mod offload;
mod packets;
mod stored;

pub use control::{map, register};
pub use frames::{derp, disco, noise, stun};
pub use node::{cni, rpc};
pub use offload::offload;
pub use packets::{dns, peer, tun, underlay};
pub use stored::{record, snapshot};

/// What a target does with an input.
pub type Target = fn(&[u8]);

/// Every target, by the name of its corpus directory.
pub const TARGETS: &[(&str, Target)] = &[
    ("cni", cni),
    ("derp", derp),
    ("disco", disco),
    ("dns", dns),
    ("map", map),
    ("noise", noise),
    ("offload", offload),
    ("peer", peer),
    ("record", record),
    ("register", register),
    ("rpc", rpc),
    ("snapshot", snapshot),
    ("stun", stun),
    ("tun", tun),
    ("underlay", underlay),
];

/// Cuts an input into pieces: a length byte pair (little-endian), then that many bytes or what is left.
fn pieces(mut data: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, rest) = data.split_first_chunk::<2>()?;
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let (piece, rest) = rest.split_at(length);
        data = rest;
        Some(piece)
    })
}
