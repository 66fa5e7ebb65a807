//! The directory of network configurations and the directories of plugins, on disk.
//!
//! Others write there too and know nothing of us. A text is replaced by exchanging two files, after which one
//! holds exactly what was displaced: where that is not what was expected, somebody wrote in between, and the
//! files are exchanged back.

use std::fs::{self, File as Handle, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::conf::{self, OURS};
use super::plan::{File, SAVED, Step};

/// Largest configuration that is read.
const MAX_BYTES: u64 = 1 << 20;
/// Of a file that is not whole yet; no runtime reads it.
const PARTIAL: &str = ".podtether-partial";
/// How often somebody may write in between before that is left to the next round.
const MAX_EXCHANGES: usize = 16;

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Done {
    /// It is done, and on disk.
    Yes,
    /// The directory is not what the plan was made for; nothing was changed.
    Overtaken,
}

/// What of the directory matters, made first where there is none.
///
/// # Errors
/// It cannot be made or listed.
pub(super) fn list(dir: &Path) -> io::Result<Vec<File>> {
    fs::create_dir_all(dir)?;
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let is_one = conf::form(&name).is_some() || name.ends_with(SAVED);
        match entry.file_type() {
            Ok(kind) if kind.is_dir() || !is_one => {}
            // Gone again.
            Err(_) => {}
            Ok(kind) if kind.is_symlink() => {
                let to = fs::read_link(entry.path()).unwrap_or_default();
                let why = format!("is a link to {}, and files are replaced whole", to.display());
                files.push(File { name, text: Err(why) });
            }
            Ok(_) => match read(&entry.path()) {
                Ok(text) => files.push(File { name, text: Ok(text) }),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => files.push(File { name, text: Err(format!("cannot be read: {e}")) }),
            },
        }
    }
    Ok(files)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    Handle::open(path)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    Ok(text)
}

/// Removes what an end in the middle of a step left.
///
/// # Errors
/// The directory cannot be listed.
pub(super) fn tidy(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with('.') && name.ends_with(PARTIAL)) {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

fn partial(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!(".{name}{PARTIAL}"))
}

/// Does one step.
///
/// # Errors
/// The disk's own; nothing is half done then.
pub(super) fn apply(dir: &Path, step: &Step) -> io::Result<Done> {
    let done = match step {
        Step::Write { name, expected: None, text } => {
            let whole = write(dir, name, text, None)?;
            let made = rename(&whole, &dir.join(name), Flag::NoReplace);
            settle(made, &whole)
        }
        Step::Write { name, expected: Some(expected), text } => {
            let target = dir.join(name);
            match fs::symlink_metadata(&target) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Done::Overtaken),
                Err(e) => return Err(e),
                Ok(like) => {
                    let whole = write(dir, name, text, Some(&like))?;
                    let done = exchange(&whole, &target, expected, text);
                    let _ = fs::remove_file(&whole);
                    done
                }
            }
        }
        Step::Move { name, expected, to, replace } => {
            let (from, to) = (dir.join(name), dir.join(to));
            if !holds(&from, expected)? {
                return Ok(Done::Overtaken);
            }
            let flag = if *replace { Flag::Replace } else { Flag::NoReplace };
            match rename(&from, &to, flag) {
                // Somebody wrote it after it was looked at: it goes back, unless they have again.
                Ok(()) if !holds(&to, expected)? => {
                    rename(&to, &from, Flag::NoReplace).map(|()| Done::Overtaken)
                }
                other => settle(other, &partial(dir, name)),
            }
        }
        Step::Remove { name, expected } => {
            let target = dir.join(name);
            // Under another name first, so that what is removed is what was looked at.
            let away = partial(dir, name);
            match rename(&target, &away, Flag::Replace) {
                Ok(()) if !holds(&away, expected)? => {
                    rename(&away, &target, Flag::NoReplace).map(|()| Done::Overtaken)
                }
                Ok(()) => fs::remove_file(&away).map(|()| Done::Yes),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Done::Overtaken),
                Err(e) => Err(e),
            }
        }
    }?;
    sync(dir)?;
    Ok(done)
}

fn holds(path: &Path, expected: &str) -> io::Result<bool> {
    match read(path) {
        Ok(text) => Ok(text == expected),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => Ok(false),
        Err(e) => Err(e),
    }
}

fn settle(made: io::Result<()>, whole: &Path) -> io::Result<Done> {
    match made {
        Ok(()) => Ok(Done::Yes),
        Err(e) => {
            let _ = fs::remove_file(whole);
            if matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) {
                Ok(Done::Overtaken)
            } else {
                Err(e)
            }
        }
    }
}

/// A whole file beside its place, with the mode and owner of the one that it replaces.
fn write(dir: &Path, name: &str, text: &str, like: Option<&fs::Metadata>) -> io::Result<PathBuf> {
    let path = partial(dir, name);
    let mode = like.map_or(0o644, |like| like.mode() & 0o777);
    let written = (|| {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&path)?;
        file.write_all(text.as_bytes())?;
        if let Some(like) = like {
            let own = file.metadata()?;
            if (own.uid(), own.gid()) != (like.uid(), like.gid()) {
                fchown(&file, Some(like.uid()), Some(like.gid()))?;
            }
        }
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&path);
    }
    written.map(|()| path)
}

/// `whole`, which holds `text`, and `target` change places if `target` holds `expected`.
fn exchange(whole: &Path, target: &Path, expected: &str, text: &str) -> io::Result<Done> {
    match rename(whole, target, Flag::Exchange) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Done::Overtaken),
        // A file system without it.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) => {
            if !holds(target, expected)? {
                return Ok(Done::Overtaken);
            }
            return rename(whole, target, Flag::Replace).map(|()| Done::Yes);
        }
        Err(e) => return Err(e),
    }
    if holds(whole, expected)? {
        return Ok(Done::Yes);
    }
    // What came out is newer than what the text was made from. It goes back; what then comes out is what was put
    // there last, or somebody wrote again and that is newer still.
    let mut put = text.as_bytes().to_vec();
    for _ in 0..MAX_EXCHANGES {
        let newer = fs::read(whole)?;
        match rename(whole, target, Flag::Exchange) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                // Removed in between: so it shall be.
                return Ok(Done::Overtaken);
            }
            other => other?,
        }
        if fs::read(whole)? == put {
            return Ok(Done::Overtaken);
        }
        put = newer;
    }
    Err(io::Error::other(format!("somebody writes {} without pause", target.display())))
}

#[derive(Debug, Clone, Copy)]
enum Flag {
    Replace,
    NoReplace,
    Exchange,
}

fn rename(from: &Path, to: &Path, flag: Flag) -> io::Result<()> {
    let flags = match flag {
        Flag::Replace => return fs::rename(from, to),
        Flag::NoReplace => RenameFlags::RENAME_NOREPLACE,
        Flag::Exchange => RenameFlags::RENAME_EXCHANGE,
    };
    renameat2(AT_FDCWD, from, AT_FDCWD, to, flags).map_err(io::Error::from)
}

fn sync(dir: &Path) -> io::Result<()> {
    Handle::open(dir)?.sync_all()
}

/// Puts the plugin into `dir`; false when it is there already.
///
/// # Errors
/// It cannot be read or written.
pub(super) fn install_plugin(plugin: &Path, dir: &Path) -> io::Result<bool> {
    if is_installed(plugin, dir)? {
        return Ok(false);
    }
    let whole = partial(dir, OURS);
    let copied = (|| {
        fs::copy(plugin, &whole)?;
        fs::set_permissions(&whole, fs::Permissions::from_mode(0o755))?;
        Handle::open(&whole)?.sync_all()?;
        fs::rename(&whole, dir.join(OURS))?;
        sync(dir)
    })();
    if copied.is_err() {
        let _ = fs::remove_file(&whole);
    }
    copied.map(|()| true)
}

/// Whether the plugin in `dir` is this one and can be run.
///
/// # Errors
/// `plugin` cannot be read.
pub(super) fn is_installed(plugin: &Path, dir: &Path) -> io::Result<bool> {
    let there = dir.join(OURS);
    let fits = |meta: &fs::Metadata| meta.is_file() && meta.mode() & 0o777 == 0o755;
    Ok(fs::symlink_metadata(&there).is_ok_and(|meta| fits(&meta))
        && fs::metadata(plugin)?.len() == fs::metadata(&there).map_or(u64::MAX, |meta| meta.len())
        && fs::read(&there).is_ok_and(|there| fs::read(plugin).is_ok_and(|ours| ours == there)))
}

/// Removes the plugin; false when it is not there.
///
/// # Errors
/// It cannot be removed.
pub(super) fn remove_plugin(dir: &Path) -> io::Result<bool> {
    let _ = fs::remove_file(partial(dir, OURS));
    match fs::remove_file(dir.join(OURS)) {
        Ok(()) => sync(dir).map(|()| true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}
