//! A tailnet's extra roots, read again when their file changes.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::http;

/// What tells one state of a file from another. A mounted secret is replaced by a rename, which changes the
/// inode behind its name.
type Signature = (u64, i64, i64, u64);

#[derive(Debug)]
struct Held {
    seen: Option<Signature>,
    pem: Arc<str>,
    version: u64,
}

/// The extra roots of one tailnet: what `ca_file` holds now, or held when it could last be used.
#[derive(Debug)]
pub struct Roots {
    path: Option<PathBuf>,
    held: Mutex<Held>,
}

impl Roots {
    /// Reads `ca_file`; without one there are no extra roots.
    ///
    /// # Errors
    /// The file cannot be read, or holds no usable certificate.
    pub fn new(ca_file: Option<&Path>) -> Result<Roots, String> {
        let seen = ca_file.and_then(signature);
        let pem = ca_file.map(read).transpose()?.unwrap_or_default();
        let held = Held { seen, pem: pem.into(), version: 0 };
        Ok(Roots { path: ca_file.map(Path::to_owned), held: Mutex::new(held) })
    }

    /// The roots (PEM, empty when there are none) and a number that grows with each change. A file that
    /// cannot be used any more is told once and leaves the roots as they are.
    #[must_use]
    pub fn now(&self) -> (u64, Arc<str>) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = &self.path {
            let seen = signature(path);
            if seen != held.seen {
                held.seen = seen;
                match read(path) {
                    Ok(pem) if *pem == *held.pem => {}
                    Ok(pem) => {
                        tracing::info!(ca_file = %path.display(), "the roots have changed");
                        held.pem = pem.into();
                        held.version += 1;
                    }
                    Err(e) => tracing::error!("ca_file: {e}; the roots it held before stay in use"),
                }
            }
        }
        (held.version, Arc::clone(&held.pem))
    }
}

fn signature(path: &Path) -> Option<Signature> {
    let data = std::fs::metadata(path).ok()?;
    Some((data.ino(), data.mtime(), data.mtime_nsec(), data.size()))
}

/// The text of `path`, checked.
///
/// # Errors
/// One sentence that names the file.
pub(super) fn read(path: &Path) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    http::root_store(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotated_file_is_read_again_and_a_broken_one_keeps_what_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let replace = |text: &str| {
            let new = dir.path().join("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(&new, &path).unwrap();
        };
        assert!(Roots::new(Some(&path)).unwrap_err().contains("ca.pem"));
        replace("nothing");
        assert!(Roots::new(Some(&path)).unwrap_err().contains("holds no certificate"));
        let root = || podtether_devnet::ca::issue(vec!["x".into()]).unwrap().root;
        let (one, two) = (root(), root());
        replace(&one);
        let roots = Roots::new(Some(&path)).unwrap();
        assert_eq!(roots.now(), (0, one.as_str().into()));
        replace("nothing");
        assert_eq!(roots.now(), (0, one.as_str().into()));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(roots.now(), (0, one.as_str().into()));
        replace(&two);
        assert_eq!(roots.now(), (1, two.as_str().into()));
        assert_eq!(Roots::new(None).unwrap().now(), (0, "".into()));
    }
}
