//! What the kernel leaves to network cards, done here: checksums, segmentation of what comes out of a TUN,
//! and coalescing of what goes into one.
//!
//! A TUN with `IFF_VNET_HDR` hands over packets of up to 64 KiB with a [`vnet::VnetHeader`] in front that
//! says how to cut them, and takes such packets as well. One system call and one walk through the kernel's
//! stack then serve some fifty packets. All of it is pure: bytes in, bytes out.

pub mod checksum;
pub mod coalesce;
mod headers;
pub mod segment;
pub mod vnet;

pub use coalesce::{Coalescer, MAX_PIECES, Write};
pub use segment::{SegmentError, Segments};
pub use vnet::{BadHeader, Gso, VNET_HEADER_LEN, VnetHeader};
