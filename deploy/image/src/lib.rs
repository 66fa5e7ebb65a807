//! A container image from static programs: an OCI layout in one tar file, the same bytes whenever and wherever it
//! is made of the same files. Also a list of what the programs were built from ([`sbom`]).

pub mod elf;
pub mod oci;
pub mod sbom;
mod tar;
