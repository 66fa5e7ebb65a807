//! Finding podtether's own programs.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// Where to look before anywhere else.
const BIN_DIR: &str = "PODTETHER_BIN_DIR";

/// Paths of the programs that a node runs.
#[derive(Debug, Clone)]
pub struct Programs {
    /// `podtether-supervisor`.
    pub supervisor: PathBuf,
    /// `podtether-engine`.
    pub engine: PathBuf,
    /// `podtether`.
    pub tool: PathBuf,
    /// `podtether-cni`.
    pub cni: PathBuf,
}

impl Programs {
    /// Looks in `$PODTETHER_BIN_DIR`, else beside `beside` (a program of the same build) and one and two
    /// directories above.
    ///
    /// # Errors
    /// Naming the program that is missing and how to build it.
    pub fn find(beside: &Path) -> Result<Self> {
        let places: Vec<PathBuf> = match std::env::var_os(BIN_DIR) {
            Some(dir) => vec![dir.into()],
            None => beside.ancestors().skip(1).take(3).map(Path::to_path_buf).collect(),
        };
        let find = |name: &str| match places.iter().map(|dir| dir.join(name)).find(|p| p.is_file()) {
            Some(path) => Ok(path),
            None => bail!(
                "{name} is not in {}: run `cargo build --workspace --bins` first, or set {BIN_DIR}",
                places.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" or ")
            ),
        };
        Ok(Self {
            supervisor: find("podtether-supervisor")?,
            engine: find("podtether-engine")?,
            tool: find("podtether")?,
            cni: find("podtether-cni")?,
        })
    }
}
