//! One record, one file.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Deserialize;
use zeroize::Zeroizing;

use super::{Aside, Record, StoreError};

/// Version this build writes, and the newest it reads.
const VERSION: u32 = 1;
/// Largest record that is read.
const MAX_BYTES: u64 = 1 << 20;
/// What stands between header and body: the checksum covers the body's exact bytes.
const BODY: &str = ",\"body\":";

/// In the name of a file that was put aside.
const BAD: &str = "bad-";

#[derive(Deserialize)]
struct Header {
    version: u32,
    #[serde(default)]
    checksum: String,
}

/// FNV-1a, 64 bits: enough to notice a torn or edited file; it is no defence against a forger.
#[must_use]
pub fn fnv64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// Twelve hex digits nobody else has.
///
/// # Panics
/// The kernel gives no random bytes.
#[must_use]
pub fn random_id() -> String {
    let random = getrandom::u64().expect("the kernel gives random bytes");
    format!("{:012x}", random >> 16)
}

pub(super) fn lock(dir: &Path, what: &str) -> Result<File, StoreError> {
    let path = dir.join("lock");
    let wrap = |what: &str, source| StoreError { what: format!("{what} {}", path.display()), source };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(|e| wrap("cannot open", e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError {
            what: format!("another supervisor uses the {what} directory {}", dir.display()),
            source: io::Error::other(format!("stop it first, or give this one its own node.{what}_dir")),
        }),
        Err(TryLockError::Error(e)) => Err(wrap("cannot lock", e)),
    }
}

pub(super) fn write<R: Record>(dir: &Path, id: &str, record: &R) -> Result<(), StoreError> {
    let wrap = |source: io::Error| StoreError {
        what: format!("cannot write record {id} in {}", dir.display()),
        source,
    };
    let body = Zeroizing::new(serde_json::to_string(record).map_err(|e| wrap(e.into()))?);
    let checksum = fnv64(body.as_bytes());
    let text = Zeroizing::new(format!(
        "{{\"version\":{VERSION},\"checksum\":\"{checksum:016x}\"{BODY}{}}}\n",
        body.as_str()
    ));
    let temporary = dir.join(format!(".{id}.tmp"));
    let written = (|| {
        let mut file =
            OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, dir.join(format!("{id}.json")))?;
        File::open(dir)?.sync_all()
    })();
    if written.is_err() {
        // A full disk must not be kept full by what did not fit.
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(wrap)
}

pub(super) fn remove(dir: &Path, id: &str) -> Result<(), StoreError> {
    let path = dir.join(format!("{id}.json"));
    let removed = match fs::remove_file(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        // A read-only disk says so before it looks whether there is anything to remove.
        Err(_) if fs::symlink_metadata(&path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) => {
            return Ok(());
        }
        other => other,
    };
    removed
        .and_then(|()| File::open(dir)?.sync_all())
        .map_err(|source| StoreError { what: format!("cannot remove record {}", path.display()), source })
}

pub(super) fn load_all<R: Record>(dir: &Path) -> Result<(Vec<R>, Vec<Aside>), StoreError> {
    let wrap = |source: io::Error| StoreError { what: format!("cannot read {}", dir.display()), source };
    let mut records = Vec::new();
    let mut asides = Vec::new();
    for entry in fs::read_dir(dir).map_err(wrap)? {
        let path = entry.map_err(wrap)?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name.starts_with('.') && name.ends_with(".tmp") {
            // A write that a crash cut off; the record it was to replace is whole.
            let _ = fs::remove_file(&path);
            continue;
        }
        if let Some(kind) = path.extension().and_then(|e| e.to_str()?.strip_prefix(BAD)) {
            let reason = format!("it was put aside before ({kind})");
            asides.push(Aside { path, reason, found: None });
            continue;
        }
        let Some(id) = name.strip_suffix(".json") else { continue };
        match read::<R>(&path) {
            Ok(record) if record.id() == id => records.push(record),
            Ok(_) => asides.push(keep_aside(&path, "foreign", "it was renamed by hand")),
            Err((kind, reason)) => asides.push(keep_aside(&path, kind, &reason)),
        }
    }
    Ok((records, asides))
}

/// The record, or a word for the file name and a sentence.
fn read<R: Record>(path: &Path) -> Result<R, (&'static str, String)> {
    let io = |e: io::Error| ("unreadable", format!("it cannot be read: {e}"));
    let mut text = Zeroizing::new(String::new());
    let file = File::open(path).map_err(io)?;
    file.take(MAX_BYTES).read_to_string(&mut text).map_err(io)?;
    decode(&text)
}

/// The record in a file's text.
///
/// # Errors
/// A word for the name of the file that is put aside, and a sentence.
pub fn decode<R: Record>(text: &str) -> Result<R, (&'static str, String)> {
    let torn = |what: &str| ("torn", format!("it is cut off or damaged ({what})"));
    let (head, rest) = text.split_once(BODY).ok_or_else(|| torn("no body"))?;
    let header: Header = serde_json::from_str(&format!("{head}}}")).map_err(|_| torn("bad header"))?;
    if header.version > VERSION {
        let reason =
            format!("a newer podtether wrote it (version {}, this build reads {VERSION})", header.version);
        return Err(("newer", reason));
    }
    let body = rest.trim_end().strip_suffix('}').ok_or_else(|| torn("no end"))?;
    if format!("{:016x}", fnv64(body.as_bytes())) != header.checksum {
        return Err(torn("wrong checksum"));
    }
    // The message of a parser could quote the body, which holds keys.
    serde_json::from_str(body).map_err(|_| torn("its fields do not fit"))
}

fn keep_aside(path: &Path, kind: &'static str, reason: &str) -> Aside {
    let mut to = path.with_extension(format!("{BAD}{kind}"));
    for n in 1..1000 {
        if !to.exists() {
            break;
        }
        to = path.with_extension(format!("{BAD}{kind}-{n}"));
    }
    match fs::rename(path, &to) {
        Ok(()) => Aside { path: to, reason: reason.to_owned(), found: Some(kind) },
        Err(e) => Aside {
            path: path.to_owned(),
            reason: format!("{reason}; and it cannot be renamed: {e}"),
            found: Some(kind),
        },
    }
}
